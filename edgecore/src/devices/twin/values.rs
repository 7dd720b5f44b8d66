//! The values of a device that has said something: the latest of each property, and a short history, as small as can be.

use std::collections::VecDeque;

use smol_str::SmolStr;

use crate::order;

/// What the history of one property may take, in bytes; a longer value is not kept in it. About 40 numbers.
pub(crate) const HISTORY: usize = 256;
/// What it takes as long as few values were said: it does not grow bit by bit, which would leave holes in the heap of every size.
const BEGINNING: usize = 32;
/// Of what a mapper adds to a value, in bytes, names and all, with what it takes to keep each; more is left out.
const MAX_EXTRA: usize = 1 << 10;

/// A value, when it was sampled, and what its mapper added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// A number, as most values are, is held in place.
    pub(crate) text: SmolStr,
    /// Milliseconds since the Unix epoch.
    pub(crate) at: i64,
    /// Counts the samples of the property since the start.
    pub(crate) version: u32,
    pub(crate) extra: Option<Box<[Extra]>>,
}

/// Key and value of what a mapper adds.
pub(crate) type Extra = (Box<str>, Box<str>);

impl Sample {
    /// What it takes, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.text.len() + weight(self.extra.as_deref())
    }
}

/// What extras take, in bytes.
pub(super) fn weight(extra: Option<&[Extra]>) -> usize {
    extra.into_iter().flatten().map(|(key, value)| size_of::<Extra>() + key.len() + value.len()).sum()
}

/// One property's.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) reported: Option<Sample>,
    /// What the mapper says it has written.
    pub(super) observed: Option<Box<Sample>>,
    /// What the cloud was told.
    pub(super) sent: Option<SmolStr>,
    pub(super) history: History,
}

/// The extras of what a mapper sent: all but the timestamp and the type, which are ours.
pub(super) fn extras<'a>(metadata: impl Iterator<Item = (&'a String, &'a String)>) -> Option<Box<[Extra]>> {
    let mut room = MAX_EXTRA;
    let mut extras = Vec::new();
    for (key, value) in metadata.filter(|(key, _)| !matches!(key.as_str(), "timestamp" | "type")) {
        if let Some(left) = room.checked_sub(size_of::<Extra>() + key.len() + value.len()) {
            room = left;
            extras.push((key.as_str().into(), value.as_str().into()));
        }
    }
    order::sort(&mut extras);
    (!extras.is_empty()).then(|| extras.into())
}

/// The last values of a property: a ring of records, each the time since the one before, its length, both as varints, and its bytes. With
/// whole times it would be twice as large for the same number of values.
#[derive(Debug, Default)]
pub(super) struct History {
    ring: VecDeque<u8>,
    /// What the time of the oldest counts from.
    origin: i64,
    /// Of the newest.
    newest: i64,
}

/// Time and length, at most: ten bytes and two.
const RECORD: usize = 10 + 2;

impl History {
    /// Adds a value; the oldest go for it.
    pub(super) fn push(&mut self, at: i64, text: &str) {
        let mut head = [0; RECORD];
        let mut length = 0;
        if RECORD + text.len() > HISTORY {
            return;
        }
        // Clocks go back too.
        let since = at.wrapping_sub(self.newest);
        for mut number in [((since << 1) ^ (since >> 63)).cast_unsigned(), text.len() as u64] {
            loop {
                let byte = number.to_le_bytes()[0] & 0x7f;
                number >>= 7;
                head[length] = byte | if number > 0 { 0x80 } else { 0 };
                length += 1;
                if number == 0 {
                    break;
                }
            }
        }
        while self.ring.len() + length + text.len() > HISTORY {
            let Some((at, _, to)) = self.record(0, self.origin) else { break };
            self.origin = at;
            self.ring.drain(..to);
        }
        let needed = self.ring.len() + length + text.len();
        if needed > self.ring.capacity() {
            let room = if needed <= BEGINNING { BEGINNING } else { HISTORY };
            self.ring.reserve_exact(room - self.ring.len());
        }
        self.ring.extend(&head[..length]);
        self.ring.extend(text.as_bytes());
        self.newest = at;
    }

    /// The record at a place: its time, counted from that of the one before, and where its text begins and ends.
    fn record(&self, at: usize, before: i64) -> Option<(i64, usize, usize)> {
        let (since, at) = self.varint(at)?;
        let (length, at) = self.varint(at)?;
        let since = (since >> 1).cast_signed() ^ -(since & 1).cast_signed();
        Some((before.wrapping_add(since), at, (at + usize::try_from(length).ok()?).min(self.ring.len())))
    }

    fn varint(&self, mut at: usize) -> Option<(u64, usize)> {
        let (mut number, mut shift) = (0, 0);
        loop {
            let byte = *self.ring.get(at)?;
            number |= u64::from(byte & 0x7f) << shift;
            (at, shift) = (at + 1, shift + 7);
            if byte & 0x80 == 0 || shift > 63 {
                return Some((number, at));
            }
        }
    }

    /// From the oldest to the newest.
    pub(super) fn read(&self) -> Vec<(i64, String)> {
        let (mut place, mut time, mut samples) = (0, self.origin, Vec::new());
        while let Some((at, from, to)) = self.record(place, time) {
            let text: Vec<u8> = self.ring.range(from..to).copied().collect();
            samples.push((at, String::from_utf8_lossy(&text).into_owned()));
            (place, time) = (to, at);
        }
        samples
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_history_is_the_end_of_what_was_said_and_bounded(step: i64, texts in proptest::collection::vec(".{0,20}", 0..60)) {
            let mut history = History::default();
            let mut all = Vec::new();
            for (number, text) in (0_i64..).zip(&texts) {
                let at = number.wrapping_mul(step);
                history.push(at, text);
                all.push((at, text.clone()));
                prop_assert!(history.ring.len() <= HISTORY);
            }
            let kept = history.read();
            prop_assert_eq!(&all[all.len() - kept.len()..], &kept[..]);
            prop_assert!(kept.len() == all.len() || kept.len() >= 2);
        }
    }

    #[test]
    fn what_is_too_long_is_left_out() {
        let mut history = History::default();
        history.push(1, "1");
        history.push(2, &"x".repeat(HISTORY));
        history.push(3, &"y".repeat(1 << 17));
        assert_eq!(history.read(), [(1, "1".to_owned())]);
        let metadata = std::collections::BTreeMap::from([
            ("timestamp".to_owned(), "1".to_owned()),
            ("quality".to_owned(), "good".to_owned()),
            ("huge".to_owned(), "z".repeat(MAX_EXTRA)),
        ]);
        assert_eq!(extras(metadata.iter()).unwrap().as_ref(), [("quality".into(), "good".into())]);
    }
}
