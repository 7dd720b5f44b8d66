//! Pods whose workers panicked: what panics again and again is taken up anew after growing waits, and not at once for ever.

use std::collections::HashMap;
use std::time::Duration;

use crate::link::backoff::Backoff;

/// The first wait, at most, and the longest.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);
/// A worker that did well for so long starts afresh.
const FORGIVEN: Duration = Duration::from_secs(600);

/// By pod UID. Times are monotonic.
#[derive(Debug, Default)]
pub(super) struct Panics(HashMap<String, Panicked>);

#[derive(Debug)]
struct Panicked {
    backoff: Backoff,
    at: Duration,
    /// When the pod is taken up anew; `None`: it was.
    due: Option<Duration>,
}

impl Panics {
    /// A worker panicked. Returns how long its pod rests.
    pub(super) fn add(&mut self, uid: &str, now: Duration, seed: u64) -> Duration {
        let fresh = || Panicked { backoff: Backoff::new(FIRST, LONGEST, seed), at: now, due: None };
        let panicked = self.0.entry(uid.to_owned()).or_insert_with(fresh);
        if now.saturating_sub(panicked.at) > FORGIVEN {
            panicked.backoff.reset();
        }
        let wait = panicked.backoff.wait();
        (panicked.at, panicked.due) = (now, Some(now + wait));
        wait
    }

    /// Whether the pod is left alone until its wait is over.
    pub(super) fn rests(&self, uid: &str) -> bool {
        self.0.get(uid).is_some_and(|panicked| panicked.due.is_some())
    }

    /// When the next one is due.
    pub(super) fn next(&self) -> Option<Duration> {
        self.0.values().filter_map(|panicked| panicked.due).min()
    }

    /// One that is to be taken up now; it does not rest any more.
    pub(super) fn take_due(&mut self, now: Duration) -> Option<String> {
        let (uid, panicked) = self.0.iter_mut().find(|(_, panicked)| panicked.due.is_some_and(|due| due <= now))?;
        panicked.due = None;
        Some(uid.clone())
    }

    /// The pod ended in order.
    pub(super) fn forget(&mut self, uid: &str) {
        self.0.remove(uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rests_grow_until_it_did_well() {
        let mut panics = Panics::default();
        let (mut now, mut waits) = (Duration::ZERO, Vec::new());
        for _ in 0..9 {
            waits.push(panics.add("a", now, 1));
            assert!(panics.rests("a") && !panics.rests("b"));
            assert_eq!(panics.take_due(now), None);
            now = panics.next().unwrap();
            assert_eq!(panics.take_due(now).as_deref(), Some("a"));
            assert!(!panics.rests("a") && panics.next().is_none());
        }
        assert!(waits[0] <= FIRST && waits[8] >= LONGEST / 2, "{waits:?}");
        assert!(panics.add("a", now + FORGIVEN * 2, 1) <= FIRST);
        panics.forget("a");
        assert!(panics.next().is_none());
    }
}
