//! How often a target is given damaged input. The tests of edgecore have this file, too.

use std::time::{Duration, Instant};

use crate::dice::{self, Dice};

/// Inputs for each target when nobody asks for more.
const USUAL: u64 = 3000;

/// An input is a string of bytes, or of messages.
pub(super) fn fuzz<T: Sync>(target: fn(&[T]), seeds: &[Vec<T>], damaged: fn(&mut Dice, &[Vec<T>]) -> Vec<T>) {
    seeds.iter().for_each(|seed| target(seed));
    let one = |seed| target(&damaged(&mut Dice::new(seed), seeds));
    let seconds = std::env::var("FUZZ").ok().filter(|_| std::env::var("SEED").is_err());
    let Some(seconds) = seconds.map(|seconds| Duration::from_secs(seconds.parse().unwrap())) else {
        dice::seeds("RUNS", USUAL, one);
        return;
    };
    let begin = now();
    while begin.elapsed() < seconds {
        dice::seeds("RUNS", dice::MANY, |seed| {
            if begin.elapsed() < seconds {
                one(seed);
            }
        });
    }
}

#[expect(clippy::disallowed_methods, reason = "it says how long to go on, and nothing else depends on it")]
fn now() -> Instant {
    Instant::now()
}
