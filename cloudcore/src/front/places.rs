//! Places for connections that have not proved anything: there are so many, and whoever has had one longest gives way.
//!
//! A place is given up when it is dropped, and taken away by closing [`Place::evicted`]; its holder ends then.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};

use crate::clock;

/// A bounded number of places; cloning shares them.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    most: usize,
    /// How long nobody is sent away.
    grace: Duration,
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    holders: Mutex<Holders>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct Holders {
    next: u64,
    /// In the order in which they came: since when, and what sends them away when it is dropped.
    by_age: BTreeMap<u64, (Duration, oneshot::Sender<()>)>,
}

/// One place.
#[derive(Debug)]
pub(crate) struct Place {
    number: u64,
    evicted: oneshot::Receiver<()>,
    inner: Arc<Inner>,
}

impl Places {
    pub(crate) fn new(most: usize, grace: Duration) -> Self {
        Self { most, grace, inner: Arc::default() }
    }

    /// Waits until there is a free place, or someone who has had one for longer than the grace, who is sent away then. Cancel safe.
    pub(crate) async fn room(&self) {
        loop {
            // Registered before the look, so that no place that becomes free between the two is missed.
            let mut freed = std::pin::pin!(self.inner.freed.notified());
            freed.as_mut().enable();
            let Err(wait) = self.make_room(clock::monotonic()) else { return };
            let _ = tokio::time::timeout(wait, freed).await;
        }
    }

    /// Whether there is a free place, or someone who has had one for longer than the grace, who is sent away then.
    pub(crate) fn has_room(&self) -> bool {
        self.make_room(clock::monotonic()).is_ok()
    }

    /// How many are taken.
    pub(crate) fn taken(&self) -> usize {
        self.inner.lock().by_age.len()
    }

    /// Takes a place, also beyond the number: see [`Places::room`].
    pub(crate) fn take(&self) -> Place {
        self.take_at(clock::monotonic())
    }

    fn take_at(&self, now: Duration) -> Place {
        let (evict, evicted) = oneshot::channel();
        let mut holders = self.inner.lock();
        let number = holders.next;
        holders.next += 1;
        holders.by_age.insert(number, (now, evict));
        drop(holders);
        Place { number, evicted, inner: Arc::clone(&self.inner) }
    }

    /// Answers how long it takes at most until someone can be sent away, where nobody can be now.
    fn make_room(&self, now: Duration) -> Result<(), Duration> {
        let mut holders = self.inner.lock();
        while holders.by_age.len() >= self.most {
            let Some(oldest) = holders.by_age.first_entry() else { break };
            let age = now.saturating_sub(oldest.get().0);
            if age < self.grace {
                return Err(self.grace.saturating_sub(age));
            }
            oldest.remove();
        }
        Ok(())
    }
}

impl Place {
    /// Comes to its end when the place is taken away.
    pub(crate) async fn evicted(&mut self) {
        let _ = (&mut self.evicted).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.inner.lock().by_age.remove(&self.number).is_some() {
            // Everybody who waits looks: who was told alone might take nothing for a long time, for want of a client.
            self.inner.freed.notify_waiters();
        }
    }
}

impl Inner {
    /// What is guarded is whole between any two statements.
    fn lock(&self) -> MutexGuard<'_, Holders> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_oldest_gives_way_once_its_grace_is_over() {
        let places = Places::new(2, seconds(3));
        let mut first = places.take_at(seconds(0));
        let mut second = places.take_at(seconds(1));
        assert_eq!(places.make_room(seconds(2)), Err(seconds(1)));
        assert!(first.evicted().now_or_never().is_none());
        assert_eq!(places.make_room(seconds(3)), Ok(()));
        assert!(first.evicted().now_or_never().is_some() && second.evicted().now_or_never().is_none());
        let third = places.take_at(seconds(3));
        drop(first);
        assert_eq!(places.make_room(seconds(3)), Err(seconds(1)), "who was sent away frees no second place");
        drop(third);
        assert_eq!(places.make_room(seconds(3)), Ok(()));
        assert!(second.evicted().now_or_never().is_none());
    }

    #[tokio::test]
    async fn a_place_that_becomes_free_is_given_at_once() {
        let places = Places::new(1, seconds(3600));
        let place = places.take();
        let mut room = std::pin::pin!(places.room());
        assert!(room.as_mut().now_or_never().is_none());
        drop(place);
        tokio::time::timeout(seconds(10), room).await.expect("there is room");
    }

    #[tokio::test]
    async fn everybody_who_waits_hears_of_a_free_place() {
        let places = Places::new(1, seconds(3600));
        let place = places.take();
        let (mut one, mut other) = (std::pin::pin!(places.room()), std::pin::pin!(places.room()));
        assert!(one.as_mut().now_or_never().is_none() && other.as_mut().now_or_never().is_none());
        drop(place);
        // The first finds room, and nobody comes whom it could give the place.
        tokio::time::timeout(seconds(10), one).await.expect("there is room");
        tokio::time::timeout(seconds(10), other).await.expect("there is room still");
    }
}
