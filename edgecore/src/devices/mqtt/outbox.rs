//! What is said once and must arrive: results, documents, deltas, membership. QoS 1, each kept until the broker has taken it.

use std::collections::VecDeque;

use bytes::BytesMut;
use skerry_proto::mqtt::{self, Publish};

/// What may wait, in bytes. Beyond it the oldest goes, and is counted.
pub(super) const MAX_WAITING: usize = 1 << 20;
/// Messages on their way at once.
const WINDOW: usize = 32;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) topic: String,
    pub(super) payload: Vec<u8>,
}

impl Event {
    fn size(&self) -> usize {
        self.topic.len() + self.payload.len()
    }
}

/// Messages in the order in which they are sent.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    waiting: VecDeque<Event>,
    sent: VecDeque<(u16, Event)>,
    bytes: usize,
    last_id: u16,
    dropped: u64,
}

impl Outbox {
    /// One more, behind all others.
    pub(super) fn push(&mut self, event: Event) {
        self.bytes += event.size();
        self.waiting.push_back(event);
        while self.bytes > MAX_WAITING
            // The only one may be as long as it is: the twin bounds what it can be.
            && self.waiting.len() > 1
            && let Some(oldest) = self.waiting.pop_front()
        {
            self.bytes -= oldest.size();
            self.dropped += 1;
        }
    }

    /// Writes what may be sent now.
    pub(super) fn send(&mut self, out: &mut BytesMut) {
        while self.sent.len() < WINDOW
            && let Some(event) = self.waiting.pop_front()
        {
            // Never 0, and long unused when it comes again.
            self.last_id = self.last_id.checked_add(1).unwrap_or(1);
            let publish = Publish { topic: &event.topic, payload: &event.payload, qos: 1, retain: false };
            mqtt::publish(out, &publish, self.last_id);
            self.sent.push_back((self.last_id, event));
        }
    }

    /// The broker has taken one.
    pub(super) fn taken(&mut self, id: u16) {
        if let Some(at) = self.sent.iter().position(|(sent, _)| *sent == id)
            && let Some((_, event)) = self.sent.remove(at)
        {
            self.bytes -= event.size();
        }
    }

    /// The connection is gone: what was not taken is sent again in the next.
    pub(super) fn disconnected(&mut self) {
        while let Some((_, event)) = self.sent.pop_back() {
            self.waiting.push_front(event);
        }
    }

    /// Whether there is room for what nobody asked for.
    pub(super) fn has_room(&self) -> bool {
        self.bytes < MAX_WAITING / 2
    }

    /// How many went unsent.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: usize, size: usize) -> Event {
        Event { topic: format!("t/{number}"), payload: vec![b'x'; size] }
    }

    #[test]
    fn all_is_sent_until_it_is_taken() {
        let (mut outbox, mut out) = (Outbox::default(), BytesMut::new());
        for number in 0..WINDOW + 2 {
            outbox.push(event(number, 3));
        }
        outbox.send(&mut out);
        assert_eq!((outbox.sent.len(), outbox.waiting.len()), (WINDOW, 2));
        outbox.taken(1);
        outbox.taken(1);
        outbox.taken(999);
        outbox.send(&mut out);
        assert_eq!((outbox.sent.len(), outbox.waiting.len()), (WINDOW, 1));
        outbox.disconnected();
        assert_eq!((outbox.sent.len(), outbox.waiting.front()), (0, Some(&event(1, 3))));
        let ids = |outbox: &Outbox| outbox.sent.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        while !outbox.waiting.is_empty() || !outbox.sent.is_empty() {
            outbox.send(&mut out);
            ids(&outbox).into_iter().for_each(|id| outbox.taken(id));
        }
        assert_eq!((outbox.bytes, outbox.dropped), (0, 0));
        outbox.last_id = u16::MAX;
        outbox.push(event(1, 1));
        outbox.send(&mut out);
        assert_eq!(ids(&outbox), [1]);
    }

    #[test]
    fn the_oldest_go_when_nobody_takes_them() {
        let mut outbox = Outbox::default();
        for number in 0..100 {
            outbox.push(event(number, 100 << 10));
            assert!(outbox.bytes <= MAX_WAITING);
        }
        assert_eq!((outbox.waiting.len(), outbox.dropped()), (10, 90));
        assert_eq!(outbox.waiting.back(), Some(&event(99, 100 << 10)));
        assert!(!outbox.has_room());
        outbox.push(event(100, 2 << 20));
        assert_eq!((outbox.waiting.len(), outbox.dropped()), (1, 100));
    }
}
