//! How long to wait before the next attempt: doubling, bounded, jittered so that boxes which failed together do not return together.

use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

/// A jittered exponential back-off. Knows no clock.
#[derive(Debug)]
pub struct Backoff {
    base: Duration,
    max: Duration,
    failures: u32,
    random: StdRng,
}

impl Backoff {
    /// Waits from half of `base` to `max`; the seed decides the jitter.
    pub fn new(base: Duration, max: Duration, seed: u64) -> Self {
        Self { base, max, failures: 0, random: StdRng::seed_from_u64(seed) }
    }

    /// The wait after one more failure: between half of and the whole of base · 2ⁿ, at most `max`.
    pub fn wait(&mut self) -> Duration {
        let ceiling = self.base.saturating_mul(1 << self.failures.min(20)).min(self.max);
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(self.random.random_range(0.5..=1.0))
    }

    /// Failures since the last [`Backoff::reset`].
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// It works again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_stays_in_its_bounds_and_starts_over() {
        for seed in 0..200 {
            let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30), seed);
            for failure in 0..100 {
                let ceiling = Duration::from_millis(500 << failure.min(10)).min(Duration::from_secs(30));
                let wait = backoff.wait();
                assert!(wait >= ceiling / 2 && wait <= ceiling, "seed {seed}, failure {failure}: {wait:?}");
            }
            backoff.reset();
            assert!(backoff.wait() <= Duration::from_millis(500), "seed {seed}");
        }
    }

    #[test]
    fn boxes_that_failed_together_spread_out() {
        let mut waits: Vec<Duration> = (0..100)
            .map(|seed| {
                let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30), seed);
                (0..8).map(|_| backoff.wait()).last().unwrap_or_default()
            })
            .collect();
        waits.sort();
        waits.dedup();
        assert!(waits.len() > 90, "{} different waits", waits.len());
        assert!(waits[waits.len() - 1] - waits[0] > Duration::from_secs(10));
    }
}
