//! What a property should be, and who says so: the cloud or somebody at the box.
//!
//! The rule: the newer of the two wins.
//! - A value written at the box takes effect when it is written. It is as new as the box's clock says, but newer than whatever was in
//!   force: a clock that was set back does not let an older one win later.
//!   The same value again is a write, too: it is told again, so that a device that has drifted is put right.
//! - The cloud has written when what it says is not what it said before, in value or in `metadata.timestamp`: saying the same again, as
//!   after a restart or a resync, is no writing. What it writes is as new as `metadata.timestamp` (milliseconds) says. Without one, or with
//!   the one it had before, which is that of another value, it is as new as its arrival: the one that reaches the box last wins.
//! - Of two that are equally new the cloud's wins; and where the box's time is known to be wrong, since it lies ahead of the box's own
//!   clock, the cloud's wins, too. A word of the cloud that loses is remembered as that, and said.

use serde::{Deserialize, Serialize};
use skerry_proto::device::TwinProperty;

/// How far ahead of the clock a time may be that is still believed, in milliseconds.
const TOLERANCE: i64 = 1000;

/// A property's: what is in force, and what the cloud said last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Desired {
    /// What the cloud said last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    seen: Option<Seen>,
    /// What was written at the box, while it is in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    local: Option<Local>,
    /// When what is in force was written, milliseconds since the Unix epoch.
    at: i64,
    /// How often another value came into force.
    #[serde(default)]
    pub(crate) version: u32,
    /// What the cloud said last was older than what is in force.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    has_lost: bool,
}

/// What came of what the cloud says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// It is what it said before.
    Same,
    /// It is in force.
    Wins,
    /// It is older than what was written at the box.
    Loses,
}

/// The cloud's word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    value: Box<str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    timestamp: Option<i64>,
}

/// The box's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Local {
    value: Box<str>,
    origin: Box<str>,
}

/// Who says so, where it is the cloud.
pub(crate) const CLOUD: &str = "cloud";

impl Desired {
    /// The value in force.
    pub(crate) fn value(&self) -> Option<&str> {
        match (&self.local, &self.seen) {
            (Some(local), _) => Some(&local.value),
            (None, Some(seen)) => Some(&seen.value),
            (None, None) => None,
        }
    }

    /// When it was written.
    pub(crate) fn at(&self) -> i64 {
        self.at
    }

    /// The same, if that outlasts a restart: of what the cloud does not date only this process knows the arrival.
    pub(crate) fn stamp(&self) -> Option<i64> {
        match (&self.local, &self.seen) {
            (None, Some(seen)) => seen.timestamp,
            _ => Some(self.at),
        }
    }

    /// What the cloud wants, and since when, if that was older than what is in force.
    pub(crate) fn lost(&self) -> Option<(&str, Option<i64>)> {
        let seen = self.seen.as_ref().filter(|_| self.has_lost)?;
        Some((&seen.value, seen.timestamp))
    }

    /// Who wrote it.
    pub(crate) fn origin(&self) -> &str {
        self.local.as_ref().map_or(CLOUD, |local| &local.origin)
    }

    /// Whether it is the box's, and so must be remembered.
    pub(crate) fn is_local(&self) -> bool {
        self.local.is_some()
    }

    /// Nothing at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.seen.is_none() && self.local.is_none()
    }

    /// Takes what the cloud says.
    pub(crate) fn cloud(&mut self, said: Option<&TwinProperty>, now: i64) -> Word {
        // None, or an empty value without metadata: whatever it is.
        let said = said.filter(|said| !said.value.is_empty() || !said.metadata.is_empty()).map(|said| Seen {
            value: said.value.as_str().into(),
            timestamp: said.metadata.get("timestamp").and_then(|text| text.trim().parse().ok()),
        });
        if said == self.seen {
            return Word::Same;
        }
        let before = self.seen.as_ref().and_then(|seen| seen.timestamp);
        let stamp = said.as_ref().and_then(|said| said.timestamp).filter(|stamp| Some(*stamp) != before);
        let is_newer = match stamp {
            Some(at) => self.local.is_none() || at >= self.at || self.at > now.saturating_add(TOLERANCE),
            None => true,
        };
        let before = self.value().map(str::to_owned);
        (self.seen, self.has_lost) = (said, !is_newer);
        if !is_newer {
            return Word::Loses;
        }
        (self.local, self.at) = (None, stamp.unwrap_or(now));
        if self.value() != before.as_deref() {
            self.version = self.version.wrapping_add(1);
        }
        Word::Wins
    }

    /// Takes what was written at the box.
    pub(crate) fn local(&mut self, value: &str, origin: &str, now: i64) {
        if self.value() != Some(value) {
            self.version = self.version.wrapping_add(1);
        }
        self.at = if self.is_empty() { now } else { now.max(self.at.saturating_add(1)) };
        self.local = Some(Local { value: value.into(), origin: origin.into() });
        self.has_lost = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(value: &str, timestamp: Option<i64>) -> TwinProperty {
        let metadata = timestamp.map(|at| ("timestamp".to_owned(), at.to_string())).into_iter().collect();
        TwinProperty { value: value.to_owned(), metadata }
    }

    #[test]
    fn the_newer_wins_and_the_cloud_of_two_that_are_equal() {
        // (the cloud's first word, time of the local write, the cloud's second word, its arrival, what is in force)
        let none = |value| said(value, None);
        for (first, written, second, arrives, wins) in [
            (none("1"), 100, none("3"), 200, "3"),
            (none("1"), 100, none("1"), 200, "2"),
            (none("1"), 100, said("1", Some(150)), 200, "1"),
            (none("1"), 100, said("3", Some(100)), 200, "3"),
            (none("1"), 100, said("3", Some(99)), 200, "2"),
            (said("1", Some(10)), 100, said("3", Some(50)), 5000, "2"),
            // A manifest's stamp that nobody touches is not the age of another value.
            (said("1", Some(10)), 100, said("3", Some(10)), 5000, "3"),
            (said("1", Some(10)), 100, none("3"), 5000, "3"),
            (none("1"), 100, none("3"), 99, "3"),
            // The clock was ahead, and is right again: nobody knows when the local one was written.
            (none("1"), 1_000_000, said("3", Some(4000)), 5000, "3"),
        ] {
            let mut desired = Desired::default();
            desired.cloud(Some(&first), 50);
            desired.local("2", "cli", written);
            assert_eq!((desired.value(), desired.origin()), (Some("2"), "cli"));
            // A restart or a resync says the same again.
            let text = serde_json::to_string(&desired).unwrap();
            let mut desired: Desired = serde_json::from_str(&text).unwrap();
            assert_eq!(desired.cloud(Some(&first), written + 10), Word::Same);
            assert_eq!((desired.value(), desired.lost()), (Some("2"), None));
            let word = format!("{first:?} {written} {second:?}");
            let same = first == second;
            let expected = if wins != "2" {
                Word::Wins
            } else if same {
                Word::Same
            } else {
                Word::Loses
            };
            assert_eq!(desired.cloud(Some(&second), arrives), expected, "{word}");
            assert_eq!(desired.value(), Some(wins), "{word}");
            assert_eq!(desired.lost().map(|(value, _)| value), (expected == Word::Loses).then_some("3"), "{word}");
        }
    }

    #[test]
    fn a_clock_that_goes_back_lets_no_older_write_win() {
        let mut desired = Desired::default();
        desired.local("a", "mqtt", 1000);
        // Set back: still the newer of the two, also for a cloud that wrote between them.
        desired.local("b", "mqtt", 10);
        assert!(desired.at() > 1000);
        assert_eq!(desired.cloud(Some(&said("c", Some(900))), 1500), Word::Loses);
        assert_eq!((desired.value(), desired.lost()), (Some("b"), Some(("c", Some(900)))));
        assert_eq!(desired.cloud(Some(&said("d", Some(1400))), 1500), Word::Wins);
        // A cloud whose clock is ahead holds up nobody at the box.
        assert_eq!(desired.cloud(Some(&said("e", Some(9_000_000))), 1600), Word::Wins);
        desired.local("f", "cli", 1700);
        assert_eq!(desired.value(), Some("f"));
        assert_eq!(desired.cloud(Some(&said("g", Some(2000))), 2000), Word::Wins);
        assert_eq!(desired.value(), Some("g"));
    }

    #[test]
    fn what_the_cloud_says_again_is_no_change_and_nothing_is_a_word_too() {
        let mut desired = Desired::default();
        assert_eq!((desired.cloud(None, 1), desired.cloud(Some(&said("", None)), 1)), (Word::Same, Word::Same));
        assert!(desired.is_empty());
        assert_eq!(desired.cloud(Some(&said("1", None)), 1), Word::Wins);
        desired.local("2", "cli", 2);
        assert_eq!(desired.version, 2);
        assert_eq!(desired.cloud(None, 3), Word::Wins);
        assert!(desired.value().is_none());
        assert!(serde_json::from_str::<Desired>("{\"at\":\"x\"}").is_err());
    }

    #[test]
    fn the_same_value_written_again_at_the_box_is_newer_and_no_other() {
        let mut desired = Desired::default();
        desired.cloud(Some(&said("1", None)), 1);
        assert_eq!((desired.stamp(), desired.version), (None, 1));
        for written in [2, 3, 3] {
            let before = desired.stamp();
            desired.local("1", "cli", written);
            assert!(desired.is_local() && desired.stamp() > before);
        }
        assert_eq!((desired.value(), desired.origin(), desired.version), (Some("1"), "cli", 1));
        desired.cloud(Some(&said("1", Some(70))), 5);
        assert_eq!(desired.stamp(), Some(70));
    }
}
