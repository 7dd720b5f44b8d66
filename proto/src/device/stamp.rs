//! When a value was sampled, and how often: one rule for mappers, which hear sources, and for edgecore, which hears mappers.

use std::time::Duration;

/// When a sample was taken, and whether that had to be corrected.
///
/// A source's own time is believed unless it lies in the future ([`AHEAD`]) or before the property's previous sample. When it is the clock
/// of this machine that was set back, the previous time is what is wrong, and is given up.
#[must_use]
pub fn stamp(source: Option<i64>, now: i64, last: i64) -> (i64, bool) {
    let claimed = source.unwrap_or(now);
    let (time, ahead) = if claimed > now.saturating_add(AHEAD) { (now, true) } else { (claimed, false) };
    if time >= last {
        (time, ahead)
    } else if last > now.saturating_add(AHEAD) {
        (time, true)
    } else {
        (last, true)
    }
}

/// How far a source's clock may be ahead of ours, milliseconds.
pub const AHEAD: i64 = 60_000;

/// A cycle of so many milliseconds or more, eleven days, is one of nanoseconds, which older manifests of KubeEdge's have.
pub const NANOSECONDS: i64 = 1_000_000_000;

/// `collectCycle` and `reportCycle` of a Device; `None` if it does not say.
#[must_use]
pub fn cycle(stated: i64) -> Option<Duration> {
    let nanoseconds = if stated < NANOSECONDS { stated.checked_mul(1_000_000)? } else { stated };
    u64::try_from(nanoseconds).ok().filter(|cycle| *cycle > 0).map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_source_is_believed_within_reason() {
        assert_eq!(stamp(None, 1_000_000, 999_000), (1_000_000, false));
        assert_eq!(stamp(Some(990_000), 1_000_000, 0), (990_000, false), "a late sample");
        assert_eq!(stamp(Some(9_000_000), 1_000_000, 0), (1_000_000, true), "from the future");
        assert_eq!(stamp(Some(990_000), 1_000_000, 995_000), (995_000, true), "before the previous one");
        assert_eq!(stamp(None, 1_000_000, 9_000_000), (1_000_000, true), "this machine's clock was set back");
    }

    #[test]
    fn cycles_are_milliseconds_and_of_older_manifests_nanoseconds() {
        let cycles = [i64::MIN, -5, 0, 500, 10_000_000_000, i64::MAX].map(cycle);
        let [years, ten] = [Duration::from_nanos(i64::MAX as u64), Duration::from_secs(10)];
        assert_eq!(cycles, [None, None, None, Some(Duration::from_millis(500)), Some(ten), Some(years)]);
    }

    proptest! {
        #[test]
        fn no_time_is_in_the_future_and_none_overflows(source: Option<i64>, now in 0..i64::MAX / 2, last: i64) {
            let (time, _) = stamp(source, now, last);
            prop_assert!(time <= now + AHEAD);
        }
    }
}
