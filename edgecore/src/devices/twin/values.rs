//! The values of a device that has said something: the latest of each property, and a short history, as small as can be.

use std::collections::VecDeque;

/// What the history of one property may take, in bytes; a longer value is not kept in it. About 40 numbers.
pub(crate) const HISTORY: usize = 512;
/// Of what a mapper adds to a value, in bytes, names and all; more is left out.
const MAX_EXTRA: usize = 1 << 10;

/// A value, when it was sampled, and what its mapper added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) text: Box<str>,
    /// Milliseconds since the Unix epoch.
    pub(crate) at: i64,
    /// Counts the samples of the property since the start.
    pub(crate) version: u32,
    pub(crate) extra: Option<Box<[Extra]>>,
}

/// Key and value of what a mapper adds.
pub(crate) type Extra = (Box<str>, Box<str>);

/// One property's.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) reported: Option<Sample>,
    /// What the mapper says it has written.
    pub(super) observed: Option<Sample>,
    /// What the cloud was told.
    pub(super) sent: Option<Box<str>>,
    pub(super) history: History,
}

/// The extras of what a mapper sent: all but the timestamp and the type, which are ours.
pub(super) fn extras<'a>(metadata: impl Iterator<Item = (&'a String, &'a String)>) -> Option<Box<[Extra]>> {
    let mut room = MAX_EXTRA;
    let mut extras = Vec::new();
    for (key, value) in metadata.filter(|(key, _)| !matches!(key.as_str(), "timestamp" | "type")) {
        if let Some(left) = room.checked_sub(key.len() + value.len()) {
            room = left;
            extras.push((key.as_str().into(), value.as_str().into()));
        }
    }
    extras.sort();
    (!extras.is_empty()).then(|| extras.into())
}

/// The last values of a property: a ring of records, each its time, its length and its bytes.
#[derive(Debug, Default)]
pub(super) struct History(VecDeque<u8>);

/// Time and length.
const RECORD: usize = 8 + 2;

impl History {
    /// Adds a value; the oldest go for it.
    pub(super) fn push(&mut self, at: i64, text: &str) {
        let Ok(length) = u16::try_from(text.len()) else { return };
        if RECORD + text.len() > HISTORY {
            return;
        }
        while self.0.len() + RECORD + text.len() > HISTORY {
            let Some(length) = self.length_at(0) else { break };
            self.0.drain(..(RECORD + length).min(self.0.len()));
        }
        self.0.extend(at.to_le_bytes());
        self.0.extend(length.to_le_bytes());
        self.0.extend(text.as_bytes());
    }

    fn length_at(&self, at: usize) -> Option<usize> {
        Some(usize::from(u16::from_le_bytes([*self.0.get(at + 8)?, *self.0.get(at + 9)?])))
    }

    /// From the oldest to the newest.
    pub(super) fn read(&self) -> Vec<(i64, String)> {
        let (mut at, mut samples) = (0, Vec::new());
        while let Some(length) = self.length_at(at) {
            let mut time = [0; 8];
            time.iter_mut().zip(self.0.range(at..at + 8)).for_each(|(to, byte)| *to = *byte);
            at += RECORD;
            let text: Vec<u8> = self.0.range(at..(at + length).min(self.0.len())).copied().collect();
            samples.push((i64::from_le_bytes(time), String::from_utf8_lossy(&text).into_owned()));
            at += length;
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
        fn a_history_is_the_end_of_what_was_said_and_bounded(texts in proptest::collection::vec(".{0,40}", 0..60)) {
            let mut history = History::default();
            let mut all = Vec::new();
            for (at, text) in (0..).zip(&texts) {
                history.push(at, text);
                all.push((at, text.clone()));
                prop_assert!(history.0.len() <= HISTORY);
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
