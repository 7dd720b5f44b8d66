//! Random numbers of a seed (splitmix64): the same on every machine, and cheap where nothing is optimised.

use std::sync::OnceLock;

/// How many letters there are to take texts from.
const LETTERS: usize = 16 << 10;

#[derive(Clone, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of `0..n`; 0 if there is none.
    pub(super) fn roll(&mut self, n: usize) -> usize {
        let n = u64::try_from(n.max(1)).unwrap();
        usize::try_from(self.next() % n).unwrap()
    }

    pub(super) fn one_in(&mut self, n: usize) -> bool {
        self.roll(n) == 0
    }

    pub(super) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len())]
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.roll(at + 1));
        }
    }

    /// So many letters without a pattern.
    pub(super) fn letters(&mut self, count: usize) -> &'static str {
        static POOL: OnceLock<String> = OnceLock::new();
        let pool = POOL.get_or_init(|| {
            let mut dice = Self::new(7);
            (0..LETTERS).map(|_| char::from(b'a' + u8::try_from(dice.roll(26)).unwrap())).collect()
        });
        let from = self.roll(LETTERS - count);
        &pool[from..from + count]
    }
}
