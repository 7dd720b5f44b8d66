//! How much a process may report: so many values a second, and as many as that at once. No clock.

use std::time::Duration;

/// Values a second: several times what a node was measured to carry, and less than would keep one of its cores busy.
const RATE: u32 = 200_000;
/// What may come at once, in the time that it takes at [`RATE`].
const BURST: Duration = Duration::from_secs(1);
/// What a call is counted as beside its values: it costs that much, even if there are none.
const CALL: u32 = 8;

/// What is left to one process.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// When all it has reported would have come, had it come at [`RATE`].
    due: Duration,
    /// Calls refused.
    pub(super) refused: u64,
}

impl Pace {
    /// Takes a call with so many values at `now`; whether it may be. One that is longer than what is left may be once, and then is waited for.
    pub(super) fn take(&mut self, values: usize, now: Duration) -> bool {
        if self.is_ahead(now) {
            self.refused += 1;
            return false;
        }
        let cost = u32::try_from(values).unwrap_or(u32::MAX).saturating_add(CALL);
        self.due = self.due.max(now) + Duration::from_secs(1) * cost / RATE;
        true
    }

    /// Whether it has reported more than it may.
    pub(super) fn is_ahead(&self, now: Duration) -> bool {
        self.due.saturating_sub(now) > BURST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values taken of one who reports so many in each millisecond of some seconds.
    fn taken(values: usize, seconds: u64) -> (usize, Pace) {
        let (mut pace, mut taken) = (Pace::default(), 0);
        for milli in 0..seconds * 1000 {
            if pace.take(values, Duration::from_secs(100) + Duration::from_millis(milli)) {
                taken += values;
            }
        }
        (taken, pace)
    }

    #[test]
    fn what_a_node_carries_is_taken_and_a_flood_is_held_to_its_rate() {
        let (all, pace) = taken(100, 10);
        assert_eq!((all, pace.refused), (1_000_000, 0));
        let (some, pace) = taken(1000, 10);
        // The rate, what may come at once, and a call.
        assert!((2_100_000..=2_201_000).contains(&some), "{some}");
        assert!(pace.refused > 7000);
        assert!(taken(0, 1).1.refused == 0, "calls of nothing");
    }

    #[test]
    fn one_long_call_is_taken_and_paid_for() {
        let (mut pace, at) = (Pace::default(), Duration::from_secs(5));
        assert!(pace.take(1_000_000, at));
        assert!(!pace.take(1, at + Duration::from_secs(3)) && pace.is_ahead(at));
        assert!(pace.take(1, at + Duration::from_secs(5)));
        assert!(!Pace::default().is_ahead(at));
        assert!(pace.take(usize::MAX, at + Duration::from_secs(60)), "no count is too large");
    }
}
