//! The last sample of each cgroup's CPU time, from which the next request makes a rate.

use std::collections::HashMap;
use std::time::Duration;

/// Most cgroups that are remembered; more have no rate.
const MOST: usize = 2048;
/// Samples that are nearer together make a rate of noise.
const NEAREST: Duration = Duration::from_millis(50);
/// Within this the rate is told again: who asks twice in a row does not make it worse for the other.
const FRESH: Duration = Duration::from_secs(1);

/// Samples by the cgroup's path.
#[derive(Debug, Default)]
pub(super) struct Samples(HashMap<String, Sample>);

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Duration,
    usage: u64,
    rate: Option<u64>,
}

impl Samples {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes down what a cgroup had used (nanoseconds) at a (monotonic) moment; the rate since the sample before, in billionths of a core.
    pub(super) fn observe(&mut self, path: &str, at: Duration, usage: u64) -> Option<u64> {
        let Some(last) = self.0.get_mut(path) else {
            if self.0.len() < MOST {
                self.0.insert(path.to_owned(), Sample { at, usage, rate: None });
            }
            return None;
        };
        let span = at.saturating_sub(last.at);
        if usage < last.usage {
            // Another cgroup of the same name.
            *last = Sample { at, usage, rate: None };
        } else if span >= FRESH || (last.rate.is_none() && span >= NEAREST) {
            let rate = u128::from(usage - last.usage) * 1_000_000_000 / span.as_nanos().max(1);
            *last = Sample { at, usage, rate: u64::try_from(rate).ok() };
        }
        last.rate
    }

    /// Forgets cgroups that are no more.
    pub(super) fn keep(&mut self, is_there: impl Fn(&str) -> bool) {
        self.0.retain(|path, _| is_there(path));
        self.0.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_rate_needs_two_samples_that_are_apart() {
        let mut samples = Samples::default();
        assert_eq!(samples.observe("/a", ms(0), 1_000_000_000), None);
        assert_eq!(samples.observe("/a", ms(10), 1_005_000_000), None);
        // Half a core since the first.
        assert_eq!(samples.observe("/a", ms(100), 1_050_000_000), Some(500_000_000));
        assert_eq!(samples.observe("/a", ms(200), 2_000_000_000), Some(500_000_000));
        assert_eq!(samples.observe("/a", ms(10_100), 21_050_000_000), Some(2_000_000_000));
        // Made anew.
        assert_eq!(samples.observe("/a", ms(20_100), 1), None);
        assert_eq!(samples.observe("/a", ms(21_100), 1), Some(0));
    }

    #[test]
    fn what_is_gone_is_forgotten_and_there_is_a_bound() {
        let mut samples = Samples::default();
        for number in 0..MOST + 10 {
            samples.observe(&number.to_string(), ms(0), 1);
        }
        assert_eq!(samples.0.len(), MOST);
        samples.keep(|path| path == "7");
        assert_eq!(samples.0.len(), 1);
    }
}
