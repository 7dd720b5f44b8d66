//! Random numbers of a seed (splitmix64): the same on every machine, and cheap where nothing is optimised. And what runs many seeds.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

/// How many letters there are to take texts from.
const LETTERS: usize = 16 << 10;

/// Of so many seeds and more, some are run on every core, and progress is told.
pub(crate) const MANY: u64 = 100_000;

/// Runs the seed that `$SEED` gives, or as many as `variable` says, and says which one failed. Answers how many.
pub(crate) fn seeds(variable: &str, usual: u64, run: impl Fn(u64) + Sync) -> u64 {
    let number = |name| std::env::var(name).ok().map(|n| n.parse::<u64>().unwrap());
    let (first, count) = match number("SEED") {
        Some(seed) => (seed, 1),
        None => (u64::from(rand::random::<u32>()), number(variable).unwrap_or(usual)),
    };
    let threads = if count < MANY { 1 } else { thread::available_parallelism().map_or(1, usize::from) };
    let next = AtomicU64::new(0);
    let work = || {
        loop {
            let n = next.fetch_add(1, Relaxed);
            if n >= count {
                return;
            }
            if n > 0 && n.is_multiple_of(MANY / 2) {
                eprintln!("{n} of {count} done");
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(first + n))) {
                next.store(count, Relaxed);
                eprintln!("replay with SEED={}", first + n);
                resume_unwind(panic);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    count
}

#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of `0..n`; 0 if there is none.
    pub(crate) fn roll(&mut self, n: usize) -> usize {
        let n = u64::try_from(n.max(1)).unwrap();
        usize::try_from(self.next() % n).unwrap()
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.roll(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len())]
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.roll(at + 1));
        }
    }

    /// So many letters without a pattern.
    pub(crate) fn letters(&mut self, count: usize) -> &'static str {
        static POOL: OnceLock<String> = OnceLock::new();
        let pool = POOL.get_or_init(|| {
            let mut dice = Self::new(7);
            (0..LETTERS).map(|_| char::from(b'a' + u8::try_from(dice.roll(26)).unwrap())).collect()
        });
        let from = self.roll(LETTERS - count);
        &pool[from..from + count]
    }
}
