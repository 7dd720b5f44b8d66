//! The store, edgecore's bus: what the cloud wants, what is reported upward, and what modules must remember over a restart.
//!
//! One thread owns the SQLite connection and commits whatever has queued up in one transaction (group commit). Readers ask that
//! thread. A clone is a handle.

use bytes::Bytes;
use skerry_proto::sync::{Collection, Entry, Op, Report, ReportKind};
use tokio::sync::broadcast;

/// A handle of the store.
#[derive(Clone, Debug)]
pub struct Store {}

/// Why the store could not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The writer thread ended.
    #[error("the store is closed")]
    Closed,
}

/// A row of what the cloud wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Name, identity, version.
    pub entry: Entry,
    /// JSON, decoded.
    pub json: Bytes,
}

/// Tells which row changed. A receiver that lagged behind (`RecvError::Lagged`) reads everything again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its collection.
    pub collection: Collection,
    /// Its key.
    pub key: String,
    /// Its UID.
    pub uid: String,
}

impl Store {
    /// Commits a batch of the link's; returns when it is durable. Subscribers are told after the commit.
    pub async fn apply(&self, ops: Vec<Op>) -> Result<(), Error> {
        let _ = ops;
        todo!()
    }

    /// All rows of a collection.
    pub async fn list(&self, collection: Collection) -> Result<Vec<Row>, Error> {
        let _ = collection;
        todo!()
    }

    /// The rows of a key: more than one only while an old UID of the same name is on its way out.
    pub async fn named(&self, collection: Collection, key: &str) -> Result<Vec<Row>, Error> {
        let _ = (collection, key);
        todo!()
    }

    /// One row by its UID.
    pub async fn row(&self, collection: Collection, uid: &str) -> Result<Option<Row>, Error> {
        let _ = (collection, uid);
        todo!()
    }

    /// What changes from now on.
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        todo!()
    }

    /// Puts a report in the outbox; returns when it is durable. A status report replaces the one of the same kind and UID; events
    /// are kept up to a bound, oldest dropped first. `id` is ignored, the store gives the next one.
    pub async fn report(&self, report: Report) -> Result<(), Error> {
        let _ = report;
        todo!()
    }

    /// A note that a module keeps for itself over restarts, by kind and key (the kubelet's last status of a pod, for example).
    pub async fn remember(&self, kind: &'static str, key: &str, value: Bytes) -> Result<(), Error> {
        let _ = (kind, key, value);
        todo!()
    }

    /// All notes of a kind.
    pub async fn notes(&self, kind: &'static str) -> Result<Vec<(String, Bytes)>, Error> {
        let _ = kind;
        todo!()
    }

    /// Drops a note.
    pub async fn forget(&self, kind: &'static str, key: &str) -> Result<(), Error> {
        let _ = (kind, key);
        todo!()
    }
}

/// Which report this is: what the outbox keeps one of.
pub fn is_coalesced(kind: ReportKind) -> bool {
    !matches!(kind, ReportKind::Event)
}
