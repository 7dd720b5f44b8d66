//! What waits in memory for one sink: the batch that is being filled, and full ones.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::{BATCH_AGE, BATCH_BYTES, BATCH_RECORDS};
use crate::clock;
use crate::counters::COUNTERS;

/// Full batches in memory; then the oldest is dropped. The writer moves them to disk long before, unless the disk hangs.
const MOST: usize = 32;

/// Records of some properties, in the order they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Batch {
    /// Each record after its length, four bytes, big endian.
    pub(crate) bytes: Vec<u8>,
    pub(crate) records: u32,
}

impl Batch {
    /// The records.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.bytes.as_slice();
        std::iter::from_fn(move || {
            let (length, after) = rest.split_first_chunk::<4>()?;
            let (record, after) = after.split_at_checked(u32::from_be_bytes(*length) as usize)?;
            rest = after;
            Some(record)
        })
    }

    /// Appends one record, whose bytes `write` appends.
    pub(crate) fn push(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        write(&mut self.bytes);
        let length = u32::try_from(self.bytes.len() - start - 4).unwrap_or(0).to_be_bytes();
        if let Some(place) = self.bytes.get_mut(start..start + 4) {
            place.copy_from_slice(&length);
        }
        self.records += 1;
    }
}

/// Shared by the properties that fill it and the writer that empties it.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    /// Something became ready, or the first record came into an empty batch.
    pub(crate) wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    open: Batch,
    /// When its first record came.
    since: Duration,
    full: VecDeque<Arc<Batch>>,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a record, whose bytes `write` appends.
    pub(crate) fn push(&self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.lock();
        let first = state.open.records == 0;
        if first {
            state.since = clock::monotonic();
        }
        state.open.push(write);
        let full = state.open.records >= BATCH_RECORDS || state.open.bytes.len() >= BATCH_BYTES;
        if full {
            state.seal();
        }
        drop(state);
        if first || full {
            self.wake.notify_one();
        }
    }

    /// The oldest batch, sealed if it is old enough or `now` is not asked for; or when to ask again.
    pub(crate) fn front(&self, now: Option<Duration>) -> Result<Arc<Batch>, Option<Duration>> {
        let mut state = self.lock();
        if let Some(front) = state.full.front() {
            return Ok(Arc::clone(front));
        }
        if state.open.records == 0 {
            return Err(None);
        }
        let ripe = state.since + BATCH_AGE;
        if now.is_some_and(|now| now < ripe) {
            return Err(Some(ripe));
        }
        state.seal();
        state.full.front().cloned().ok_or(None)
    }

    /// Forgets a batch that is pushed or on disk.
    pub(crate) fn done(&self, batch: &Arc<Batch>) {
        let mut state = self.lock();
        if state.full.front().is_some_and(|front| Arc::ptr_eq(front, batch)) {
            state.full.pop_front();
        }
    }

    /// How many full batches wait.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().full.len()
    }
}

impl State {
    fn seal(&mut self) {
        let capacity = self.open.bytes.len().min(BATCH_BYTES) / 2;
        let open = Batch { bytes: Vec::with_capacity(capacity), records: 0 };
        self.full.push_back(Arc::new(std::mem::replace(&mut self.open, open)));
        if self.full.len() > MOST
            && let Some(dropped) = self.full.pop_front()
        {
            COUNTERS.dropped_values_total.add(dropped.records.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_bounded_by_number_and_bytes() {
        let queue = Queue::default();
        for _ in 0..1200 {
            queue.push(|bytes| bytes.extend_from_slice(b"record"));
        }
        assert_eq!(queue.waiting(), 2);
        queue.push(|bytes| bytes.resize(bytes.len() + BATCH_BYTES, 7));
        assert_eq!(queue.waiting(), 3);
        let batch = queue.front(Some(Duration::ZERO)).unwrap();
        assert_eq!(batch.records, BATCH_RECORDS);
        assert!(batch.iter().all(|record| record == b"record"));
        assert_eq!(batch.iter().count(), 500);
        queue.done(&batch);
        queue.done(&batch);
        assert_eq!(queue.waiting(), 2, "a batch is forgotten once");
    }

    #[test]
    fn a_young_batch_waits_for_more() {
        let queue = Queue::default();
        assert_eq!(queue.front(Some(Duration::ZERO)), Err(None));
        queue.push(|bytes| bytes.push(1));
        let ripe = queue.front(Some(clock::monotonic())).unwrap_err().unwrap();
        assert_eq!(queue.front(Some(ripe)).unwrap().records, 1);
    }

    #[test]
    fn what_hangs_for_ever_drops_the_oldest() {
        let queue = Queue::default();
        for count in 0..u32::try_from(MOST + 3).unwrap() {
            queue.push(|bytes| {
                bytes.resize(bytes.len() + BATCH_BYTES, 0);
                bytes.extend_from_slice(&count.to_be_bytes());
            });
        }
        assert_eq!(queue.waiting(), MOST);
        assert!(queue.front(None).unwrap().bytes.ends_with(&3u32.to_be_bytes()));
    }
}
