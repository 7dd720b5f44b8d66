//! What a hub knows of one collection: what is desired, and what the edge holds of it.

use std::sync::Arc;

use super::super::{Digest, Entry, Object};

/// One collection as this session knows it.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Sorted by UID. A cloud has many sessions, and of each most collections are small: a map would be empty room for the most part.
    #[expect(clippy::vec_box, reason = "room that a vector has for more of them is a pointer each")]
    rows: Vec<Box<Row>>,
    /// Of what is desired.
    pub(super) wanted: Digest,
    /// Of what the edge holds once it has applied everything sent.
    pub(super) held: Digest,
    pub(super) complete: bool,
    pub(super) knowledge: Knowledge,
    /// Something was sent since the last digest check.
    pub(super) unchecked: bool,
    /// There may be rows that are neither desired nor held.
    has_needless: bool,
}

/// Where the knowledge of what an edge holds comes from.
#[derive(Debug, Default)]
pub(super) enum Knowledge {
    /// Its Hello did not tell.
    #[default]
    None,
    /// The digest of its Hello.
    Digest(Digest),
    /// Its inventory is on the way.
    Asked(Parts),
    /// [`Row::held`] says it.
    Rows,
}

/// What came of an inventory.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) entries: Vec<Entry>,
    /// Bytes of their keys and UIDs.
    pub(super) names: usize,
}

#[derive(Debug)]
pub(super) struct Row {
    pub(super) desired: Desired,
    /// The version that the edge holds.
    pub(super) held: Option<u64>,
    /// The edge holds it under this key, when that is not the one of `desired`.
    held_key: Option<Box<str>>,
}

/// What is desired of a UID.
#[derive(Debug)]
pub(super) enum Desired {
    /// This, which all sessions share.
    Object(Arc<Object>),
    /// This version, of which the caller has no payload (see [`super::HubInput::Keep`]).
    Version(Box<Entry>),
    /// Nothing any more; the version says nothing.
    Nothing(Box<Entry>),
}

impl Desired {
    fn entry(&self) -> &Entry {
        match self {
            Self::Object(object) => &object.entry,
            Self::Version(entry) | Self::Nothing(entry) => entry,
        }
    }

    pub(super) fn key(&self) -> &str {
        &self.entry().key
    }

    pub(super) fn uid(&self) -> &str {
        &self.entry().uid
    }

    pub(super) fn version(&self) -> Option<u64> {
        match self {
            Self::Object(_) | Self::Version(_) => Some(self.entry().version),
            Self::Nothing(_) => None,
        }
    }
}

impl Row {
    /// What an edge may hold, and should not.
    fn of_nothing(entry: &Entry) -> Self {
        Self { desired: Desired::Nothing(Box::new(entry.clone())), held: None, held_key: None }
    }

    /// Whether the edge holds what is desired, under its key.
    pub(super) fn agrees(&self) -> bool {
        self.held == self.desired.version() && self.held_key.is_none()
    }

    /// The key under which the edge holds it, if it does.
    fn held_key(&self) -> &str {
        self.held_key.as_deref().unwrap_or_else(|| self.desired.key())
    }
}

impl Held {
    pub(super) fn row(&self, uid: &str) -> Option<&Row> {
        self.find(uid).ok().map(|at| &*self.rows[at])
    }

    pub(super) fn uids(&self) -> Vec<String> {
        self.rows.iter().map(|row| row.desired.uid().to_owned()).collect()
    }

    /// The version that is desired of a UID.
    pub(super) fn wanted_version(&self, uid: &str) -> Option<u64> {
        self.row(uid)?.desired.version()
    }

    /// Notes what is desired of a UID.
    pub(super) fn want(&mut self, desired: Desired) {
        if let Some(version) = desired.version() {
            self.wanted.add(desired.key(), desired.uid(), version);
        }
        match self.find(desired.uid()) {
            Ok(at) => {
                let row = &mut self.rows[at];
                if let Some(version) = row.desired.version() {
                    self.wanted.subtract(row.desired.key(), row.desired.uid(), version);
                }
                if row.held.is_some() {
                    let key = row.held_key.take().unwrap_or_else(|| row.desired.key().into());
                    row.held_key = (*key != *desired.key()).then_some(key);
                }
                row.desired = desired;
            }
            Err(at) => self.rows.insert(at, Box::new(Row { desired, held: None, held_key: None })),
        }
    }

    /// Nothing of a UID is desired any more.
    pub(super) fn unwant(&mut self, uid: &str) {
        let Some(row) = self.row(uid) else { return };
        let entry = entry(row.desired.key(), uid, 0);
        self.want(Desired::Nothing(Box::new(entry)));
        self.forget_if_needless(uid);
    }

    /// The edge holds just what is desired.
    pub(super) fn agree(&mut self) {
        for row in &mut self.rows {
            (row.held, row.held_key) = (row.desired.version(), None);
        }
        self.held = self.wanted;
    }

    /// The edge holds these.
    pub(super) fn set_all_held(&mut self, entries: &[Entry]) {
        for row in &mut self.rows {
            (row.held, row.held_key) = (None, None);
        }
        self.held = Digest::default();
        // What is not known is sorted in at once: each by itself would move all that are behind it.
        let mut new: Vec<&Entry> = entries.iter().filter(|entry| self.find(&entry.uid).is_err()).collect();
        new.sort_by(|a, b| a.uid.cmp(&b.uid));
        new.dedup_by(|a, b| a.uid == b.uid);
        self.rows.extend(new.into_iter().map(|entry| Box::new(Row::of_nothing(entry))));
        self.rows.sort_by(|a, b| a.desired.uid().cmp(b.desired.uid()));
        for entry in entries {
            self.set_held(&entry.uid, Some(entry));
        }
    }

    /// Notes what the edge holds of one UID, and keeps the digest of it.
    pub(super) fn set_held(&mut self, uid: &str, change: Option<&Entry>) {
        let at = match (self.find(uid), change) {
            (Ok(at), _) => at,
            (Err(at), Some(change)) => {
                self.rows.insert(at, Box::new(Row::of_nothing(change)));
                at
            }
            (Err(_), None) => return,
        };
        let row = &mut self.rows[at];
        if let Some(version) = row.held.take() {
            self.held.subtract(row.held_key(), uid, version);
            row.held_key = None;
        }
        if let Some(change) = change {
            self.held.insert(change);
            row.held = Some(change.version);
            row.held_key = (*change.key != *row.desired.key()).then(|| change.key.as_str().into());
        } else {
            self.has_needless = true;
        }
    }

    /// Forgets what was deleted, if anything was: all of it at once, for there may be much.
    pub(super) fn forget_deleted(&mut self) {
        if std::mem::take(&mut self.has_needless) {
            self.forget_needless();
        }
    }

    /// Forgets what is neither desired nor held.
    pub(super) fn forget_needless(&mut self) {
        self.rows.retain(|row| row.desired.version().is_some() || row.held.is_some());
    }

    pub(super) fn held_entries(&self) -> Vec<Entry> {
        let held = self.rows.iter().filter_map(|row| {
            let (key, uid) = (row.held_key(), row.desired.uid());
            row.held.map(|version| entry(key, uid, version))
        });
        held.collect()
    }

    fn forget_if_needless(&mut self, uid: &str) {
        if let Ok(at) = self.find(uid)
            && self.rows[at].desired.version().is_none()
            && self.rows[at].held.is_none()
        {
            self.rows.remove(at);
        }
    }

    fn find(&self, uid: &str) -> Result<usize, usize> {
        self.rows.binary_search_by(|row| row.desired.uid().cmp(uid))
    }
}

fn entry(key: &str, uid: &str, version: u64) -> Entry {
    Entry { key: key.to_owned(), uid: uid.to_owned(), version }
}
