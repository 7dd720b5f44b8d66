//! The timers that keep a failing container, or a failing pull, from being tried without pause.
//!
//! Pure: time comes as an argument. A clock that was set back never holds anything for longer than its delay.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};

/// The first delay.
pub const INITIAL: SignedDuration = SignedDuration::from_secs(10);
/// No delay grows beyond this.
pub const MAX: SignedDuration = SignedDuration::from_secs(300);
/// A container that ran for longer than this since its last restart starts afresh.
const EXPIRY: SignedDuration = SignedDuration::from_secs(600);

/// A moment later, held at the end of time.
pub fn after(start: Timestamp, delay: SignedDuration) -> Timestamp {
    start.checked_add(delay).unwrap_or(Timestamp::MAX)
}

/// Whether something has to wait until then. A time further away than the longest delay tells of a clock that was set back, and holds nothing.
pub fn holds(until: Timestamp, longest: SignedDuration, now: Timestamp) -> bool {
    until > now && until <= after(now, longest)
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: u64,
    delay: SignedDuration,
    updated: Timestamp,
}

/// CrashLoopBackOff: per container and image, 10 s doubling to 300 s.
#[derive(Clone, Debug, Default)]
pub struct CrashBackoff {
    entries: BTreeMap<String, Entry>,
}

impl CrashBackoff {
    /// Until when a container whose last instance ended at `finished` must wait, and the delay that makes it so; `None` if it may start.
    pub fn blocked(
        &self,
        name: &str,
        hash: u64,
        finished: Timestamp,
        now: Timestamp,
    ) -> Option<(Timestamp, SignedDuration)> {
        let entry = self.current(name, hash, finished)?;
        let until = after(finished, entry.delay);
        // An end that lies in the future tells of a clock that was set back, not of a crash just now.
        (finished <= after(now, INITIAL) && until > now).then_some((until, entry.delay))
    }

    /// A container whose last instance ended at `finished` is started again.
    pub fn restarted(&mut self, name: &str, hash: u64, finished: Timestamp, now: Timestamp) {
        let delay = match self.current(name, hash, finished) {
            Some(entry) => entry.delay.saturating_mul(2).min(MAX),
            None => INITIAL,
        };
        self.entries.insert(name.to_owned(), Entry { hash, delay, updated: now });
    }

    fn current(&self, name: &str, hash: u64, finished: Timestamp) -> Option<&Entry> {
        let entry = self.entries.get(name).filter(|entry| entry.hash == hash)?;
        (finished.duration_since(entry.updated) <= EXPIRY).then_some(entry)
    }
}

/// ImagePullBackOff: per image, 10 s doubling to 300 s, from the last failure on.
#[derive(Clone, Debug, Default)]
pub struct ImageBackoff {
    entries: BTreeMap<String, (SignedDuration, Timestamp)>,
}

impl ImageBackoff {
    /// Until when the image must not be pulled; `None` if it may.
    pub fn blocked(&self, image: &str, now: Timestamp) -> Option<Timestamp> {
        let (delay, failed) = self.entries.get(image)?;
        let until = after(*failed, *delay);
        (until > now && *failed <= now).then_some(until)
    }

    /// A pull failed. Returns when the next one is due.
    pub fn failed(&mut self, image: &str, now: Timestamp) -> Timestamp {
        let delay = match self.entries.get(image) {
            Some((delay, failed)) if now.duration_since(*failed) <= EXPIRY => delay.saturating_mul(2).min(MAX),
            _ => INITIAL,
        };
        self.entries.insert(image.to_owned(), (delay, now));
        after(now, delay)
    }

    /// The images that must not be pulled now, but for those whose pull has only just failed.
    pub fn held(&self, now: Timestamp) -> impl Iterator<Item = &str> {
        let is_held =
            move |image: &&String| self.blocked(image, now).is_some() && self.entries[*image].1 <= now - INITIAL;
        self.entries.keys().filter(is_held).map(String::as_str)
    }

    /// The image is there.
    pub fn forget(&mut self, image: &str) {
        self.entries.remove(image);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).unwrap()
    }

    #[test]
    fn crashes_double_to_five_minutes() {
        let (mut backoff, mut now, mut delays) = (CrashBackoff::default(), 0, Vec::new());
        for _ in 0..8 {
            let finished = at(now);
            if let Some((until, _)) = backoff.blocked("c", 1, finished, at(now)) {
                delays.push(until.duration_since(finished).as_secs());
                now += delays[delays.len() - 1];
            }
            backoff.restarted("c", 1, finished, at(now));
            now += 1;
        }
        assert_eq!(delays, [10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn ten_good_minutes_or_another_image_start_afresh() {
        let mut backoff = CrashBackoff::default();
        backoff.restarted("c", 1, at(0), at(0));
        assert!(backoff.blocked("c", 1, at(1), at(2)).is_some());
        assert!(backoff.blocked("c", 2, at(1), at(2)).is_none());
        assert!(backoff.blocked("c", 1, at(601), at(602)).is_none());
        backoff.restarted("c", 1, at(601), at(602));
        assert_eq!(backoff.blocked("c", 1, at(603), at(603)), Some((at(613), INITIAL)));
    }

    #[test]
    fn a_clock_set_back_holds_nothing() {
        let mut backoff = CrashBackoff::default();
        backoff.restarted("c", 1, at(5000), at(5000));
        assert!(backoff.blocked("c", 1, at(5001), at(0)).is_none());
        let mut pulls = ImageBackoff::default();
        pulls.failed("i", at(5000));
        assert!(pulls.blocked("i", at(0)).is_none());
    }

    #[test]
    fn a_time_holds_until_it_comes_and_not_when_the_clock_was_set_back() {
        assert!(holds(at(10), INITIAL, at(0)) && holds(at(10), INITIAL, at(9)));
        assert!(!holds(at(10), INITIAL, at(10)) && !holds(at(10), INITIAL, at(-1)));
    }

    #[test]
    fn pulls_double_and_are_forgiven() {
        let mut pulls = ImageBackoff::default();
        assert_eq!(pulls.failed("i", at(0)), at(10));
        assert_eq!(pulls.blocked("i", at(5)), Some(at(10)));
        assert_eq!(pulls.blocked("i", at(10)), None);
        assert_eq!(pulls.failed("i", at(10)), at(30));
        assert_eq!(pulls.held(at(19)).count(), 0);
        assert_eq!(pulls.held(at(20)).collect::<Vec<_>>(), ["i"]);
        assert_eq!(pulls.held(at(30)).count(), 0);
        pulls.forget("i");
        assert_eq!(pulls.failed("i", at(40)), at(50));
    }
}
