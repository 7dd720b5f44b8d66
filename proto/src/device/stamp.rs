//! When a value was sampled: one rule for mappers, which hear sources, and for edgecore, which hears mappers.

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

    proptest! {
        #[test]
        fn no_time_is_in_the_future_and_none_overflows(source: Option<i64>, now in 0..i64::MAX / 2, last: i64) {
            let (time, _) = stamp(source, now, last);
            prop_assert!(time <= now + AHEAD);
        }
    }
}
