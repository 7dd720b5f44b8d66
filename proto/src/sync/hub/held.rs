//! What a hub knows of one collection: what is desired, and what the edge holds of it.

use std::collections::BTreeMap;

use super::super::{Digest, Entry, Object};

/// One collection as this session knows it.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Boxed, for most collections are small, and a map has room for eleven at once.
    pub(super) rows: BTreeMap<String, Box<Row>>,
    /// Of what is desired.
    pub(super) wanted: Digest,
    /// Of what the edge holds once it has applied everything sent.
    pub(super) held: Digest,
    pub(super) complete: bool,
    pub(super) knowledge: Knowledge,
    /// Something was sent since the last digest check.
    pub(super) unchecked: bool,
}

/// Where the knowledge of what an edge holds comes from.
#[derive(Debug, Default)]
pub(super) enum Knowledge {
    /// Its Hello did not tell.
    #[default]
    None,
    /// The digest of its Hello.
    Digest(Digest),
    /// Its inventory is on the way; the parts that came.
    Asked(Vec<Entry>),
    /// `Row::held` says it.
    Rows,
}

#[derive(Debug)]
pub(super) struct Row {
    pub(super) key: String,
    pub(super) wanted: Option<Wanted>,
    pub(super) held: Option<u64>,
    /// The edge holds it under this key, when that is not `key`.
    pub(super) held_key: Option<String>,
}

#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) version: u64,
    /// `None`: the caller has no payload (see [`super::HubInput::Keep`]).
    pub(super) object: Option<Object>,
}

impl Held {
    /// Notes what the edge holds of one UID, and keeps the digest of it.
    pub(super) fn set_held(&mut self, uid: &str, change: Option<&Entry>) {
        if change.is_none() && !self.rows.contains_key(uid) {
            return;
        }
        let row = self.rows.entry(uid.to_owned()).or_insert_with(|| {
            Box::new(Row {
                key: change.map(|change| change.key.clone()).unwrap_or_default(),
                wanted: None,
                held: None,
                held_key: None,
            })
        });
        if let Some(version) = row.held.take() {
            let key = row.held_key.take().unwrap_or_else(|| row.key.clone());
            self.held.remove(&entry(&key, uid, version));
        }
        if let Some(change) = change {
            self.held.insert(change);
            row.held = Some(change.version);
            row.held_key = (row.key != change.key).then(|| change.key.clone());
        } else if row.wanted.is_none() {
            self.rows.remove(uid);
        }
    }

    pub(super) fn held_entries(&self) -> Vec<Entry> {
        let held = self.rows.iter().filter_map(|(uid, row)| {
            let key = row.held_key.as_ref().unwrap_or(&row.key);
            row.held.map(|version| entry(key, uid, version))
        });
        held.collect()
    }
}

pub(super) fn entry(key: &str, uid: &str, version: u64) -> Entry {
    Entry { key: key.to_owned(), uid: uid.to_owned(), version }
}
