//! The store, edgecore's bus: what the cloud wants, what is reported upward, and what modules must remember over a restart.
//!
//! One thread owns the SQLite connection and commits whatever has queued up in one transaction (group commit). Readers ask that
//! thread. A clone is a handle. Every row carries a checksum: a damaged one is dropped, counted and fetched again from the cloud; it
//! is never handed out. What was acknowledged is on the disk. Nothing is written when nothing changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use skerry_proto::sync::{Collection, Entry, Op, Report, ReportKind};
use tokio::sync::{Notify, Semaphore, broadcast, mpsc, oneshot, watch};
use tracing::warn;

use self::writer::{Answer, Command, Write};

mod ballast;
mod db;
mod migrate;
mod open;
mod revisions;
mod schema;
mod seal;
mod snapshot;
#[cfg(test)]
mod tests;
mod writer;

pub use self::ballast::FILE as BALLAST;
pub use self::revisions::Revisions;
pub use self::snapshot::Snapshot;

/// Bytes of commands that may wait for the store thread; a sender waits beyond it. The largest object fits, with what may come before it.
pub const QUEUE_BYTES: usize = 16 << 20;
/// Commands that may wait for the store thread.
const QUEUE_LENGTH: usize = 1024;
/// Changes a subscriber may lag behind before it is told to read everything again.
const CHANGES: usize = 1024;
/// Events kept in the outbox; the oldest goes first.
pub const MAX_EVENTS: usize = 500;
/// Name of the database file in the data directory.
pub const FILE: &str = "store.db";

/// A handle of the store.
#[derive(Clone, Debug)]
pub struct Store {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    commands: mpsc::Sender<Command>,
    room: Arc<Semaphore>,
    store_id: String,
    signals: Signals,
    opened: Opened,
    data_dir: PathBuf,
}

/// What the store thread tells without being asked.
#[derive(Clone, Debug)]
struct Signals {
    changes: broadcast::Sender<Change>,
    outbox: Arc<Notify>,
    pods_known: watch::Sender<bool>,
    damaged: watch::Sender<u64>,
}

/// What opening the store found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// The file was damaged and is kept here; what could be read of it was carried over.
    pub set_aside: Option<PathBuf>,
    /// Rows carried over from it.
    pub salvaged: u64,
}

/// Why the store could not do it.
#[derive(Debug, thiserror::Error)]
#[expect(clippy::error_impl_error, reason = "the module is its qualifier: store::Error")]
pub enum Error {
    /// The writer thread ended.
    #[error("the store is closed")]
    Closed,
    /// No space, or a quota.
    #[error("cannot {action}: the disk is full; free space under the data directory")]
    DiskFull {
        /// What was tried.
        action: &'static str,
        /// SQLite's word.
        #[source]
        source: Arc<rusqlite::Error>,
    },
    /// The file system takes no writes.
    #[error("cannot {action}: the file system is read-only; see the kernel's log for disk errors, then remount it")]
    ReadOnly {
        /// What was tried.
        action: &'static str,
        /// SQLite's word.
        #[source]
        source: Arc<rusqlite::Error>,
    },
    /// Anything else SQLite says.
    #[error("cannot {action}")]
    Sqlite {
        /// What was tried.
        action: &'static str,
        /// SQLite's word.
        #[source]
        source: Arc<rusqlite::Error>,
    },
    /// A later edgecore wrote it. The file is left as it is.
    #[error(
        "{path} has schema {found}, this edgecore knows up to {known}; install the newer edgecore again, or move the file away (desired state is fetched again)"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// The newest schema known here.
        known: i64,
    },
    /// The file or the node key cannot be made, read or moved.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// A report or object that can never be stored.
    #[error("{0} bytes are more than the store's queue takes")]
    TooLarge(usize),
}

impl Error {
    fn sqlite(action: &'static str, source: rusqlite::Error) -> Self {
        let code = source.sqlite_error_code();
        let source = Arc::new(source);
        match code {
            Some(rusqlite::ErrorCode::DiskFull) => Self::DiskFull { action, source },
            Some(rusqlite::ErrorCode::ReadOnly) => Self::ReadOnly { action, source },
            _ => Self::Sqlite { action, source },
        }
    }

    /// More room on the disk may help. SQLite does not say so for every file of its.
    fn may_be_for_room(&self) -> bool {
        match self {
            Self::DiskFull { .. } => true,
            Self::Sqlite { source, .. } => matches!(
                source.sqlite_error_code(),
                Some(rusqlite::ErrorCode::SystemIoFailure | rusqlite::ErrorCode::CannotOpen)
            ),
            Self::Io { source, .. } => {
                matches!(source.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
            }
            Self::Closed | Self::ReadOnly { .. } | Self::Newer { .. } | Self::TooLarge(_) => false,
        }
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
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

/// Figures for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Rows of desired state.
    pub rows: u64,
    /// Bytes of the database and its log.
    pub bytes: u64,
    /// Damaged rows dropped so far, in the life of this file.
    pub damaged: u64,
    /// Reports that wait for the cloud.
    pub pending: u64,
    /// Reports that the cloud refused for good.
    pub refused: u64,
    /// What it said of the last one.
    pub last_refusal: String,
    /// The last session's epoch.
    pub epoch: u64,
    /// Whether the pods that should run are known: false in a new store until the cloud has said them.
    pub pods_known: bool,
}

impl Store {
    /// Opens the store of a data directory, making what is missing, and starts its thread. `now` names a file that is set aside.
    ///
    /// Blocks on the disk: call it before anything else runs.
    pub fn open(data_dir: &Path, now: Timestamp) -> Result<Self, Error> {
        let (db, opened) = match open::open(data_dir, now) {
            Err(error) if error.may_be_for_room() && ballast::release(data_dir) => {
                warn!(%error, "what is kept free for a full disk is used to open the store");
                open::open(data_dir, now)
            }
            opened => opened,
        }?;
        ballast::keep(data_dir);
        let store_id = db.store_id().map_err(|source| Error::sqlite("read the store's identity", source))?;
        let known = db.pods_known().map_err(|source| Error::sqlite("read the store's state", source))?;
        let (commands, inbox) = mpsc::channel(QUEUE_LENGTH);
        let signals = Signals {
            changes: broadcast::channel(CHANGES).0,
            outbox: Arc::new(Notify::new()),
            pods_known: watch::channel(known).0,
            damaged: watch::channel(0).0,
        };
        let thread = writer::Writer::new(db, data_dir.to_owned(), signals.clone());
        std::thread::Builder::new()
            .name("store".to_owned())
            .stack_size(512 << 10)
            .spawn(move || thread.run(inbox))
            .map_err(Error::io("start the thread for", data_dir))?;
        let room = Arc::new(Semaphore::new(QUEUE_BYTES));
        Ok(Self {
            shared: Arc::new(Shared { commands, room, store_id, signals, opened, data_dir: data_dir.to_owned() }),
        })
    }

    /// Keeps room on the disk for the next start, if there is some again. Blocks on the disk.
    pub fn keep_ballast(&self) {
        ballast::keep(&self.shared.data_dir);
    }

    /// What opening found.
    pub fn opened(&self) -> &Opened {
        &self.shared.opened
    }

    /// Random, made with the file: another one means another store. A file that had to be replaced while running keeps it in memory
    /// until the next start; the digests tell the cloud what is missing.
    pub fn store_id(&self) -> &str {
        &self.shared.store_id
    }

    /// Commits a batch; returns when it is durable. Subscribers are told after the commit.
    pub async fn apply(&self, ops: Vec<Op>) -> Result<(), Error> {
        self.apply_at(ops, Revisions::new()).await
    }

    /// As [`Store::apply`], with how new the objects may be after it; none: as before.
    pub async fn apply_at(&self, ops: Vec<Op>, revisions: Revisions) -> Result<(), Error> {
        self.write(Write::Apply(ops, revisions)).await
    }

    /// What [`Store::apply_at`] was last told.
    pub async fn revisions(&self) -> Result<Revisions, Error> {
        self.read("read how new the objects are", |db| db.revisions()).await
    }

    /// All rows of a collection.
    pub async fn list(&self, collection: Collection) -> Result<Vec<Row>, Error> {
        self.read("read a collection", move |db| db.list(collection)).await
    }

    /// So many rows of a collection, in the order of their UIDs, after one: for a collection that may be large.
    pub async fn page(&self, collection: Collection, after: &str, count: usize) -> Result<Vec<Row>, Error> {
        let after = after.to_owned();
        self.read("read a part of a collection", move |db| db.page(collection, &after, count)).await
    }

    /// The rows of a key: more than one only while an old UID of the same name is on its way out.
    pub async fn named(&self, collection: Collection, key: &str) -> Result<Vec<Row>, Error> {
        let key = key.to_owned();
        self.read("read an object by name", move |db| db.named(collection, &key)).await
    }

    /// One row by its UID.
    pub async fn row(&self, collection: Collection, uid: &str) -> Result<Option<Row>, Error> {
        let uid = uid.to_owned();
        self.read("read an object", move |db| db.row(collection, &uid)).await
    }

    /// Name and version of every row, each of which has been read whole and found good.
    pub async fn index(&self) -> Result<Vec<(Collection, Entry)>, Error> {
        self.read("read the index", db::Db::index).await
    }

    /// What changes from now on.
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.shared.signals.changes.subscribe()
    }

    /// Whether the pods that should run on this node are known. False in a store that was made anew, or that lost a pod to damage,
    /// until the cloud has confirmed the collection: a pod that runs and is not in the store may only be ended while this is true.
    pub fn pods_known(&self) -> watch::Receiver<bool> {
        self.shared.signals.pods_known.subscribe()
    }

    /// Records that the collection of pods is what the cloud wants. `damaged` is [`Store::damaged`] from before whoever says so looked at
    /// the store: if rows were lost since then, it does not know of that, and what it says is passed over.
    pub async fn set_pods_known(&self, damaged: u64) -> Result<(), Error> {
        self.write(Write::PodsKnown(damaged)).await
    }

    /// Rises whenever rows were found damaged and dropped, before whoever asked gets its answer: whoever keeps a [`Store::index`] reads it
    /// again.
    pub fn damaged(&self) -> watch::Receiver<u64> {
        self.shared.signals.damaged.subscribe()
    }

    /// Puts a report in the outbox; returns when it is durable. A status report replaces the one of the same kind and UID; an
    /// event the one of its name; events are kept up to a bound, oldest dropped first. `id` is ignored, the store gives the next one.
    pub async fn report(&self, report: Report) -> Result<(), Error> {
        self.write(Write::Report(report)).await
    }

    /// The events, or all other reports, after an id, in order, as many as fit and at least one if there is one.
    pub async fn pending_reports(&self, events: bool, after: u64, max_bytes: usize) -> Result<Vec<Report>, Error> {
        self.read("read the outbox", move |db| db.pending_reports(events, after, max_bytes)).await
    }

    /// All of both, in order, as many of each as fit.
    #[cfg(test)]
    pub async fn all_reports(&self, after: u64, max_bytes: usize) -> Result<Vec<Report>, Error> {
        let mut all = self.pending_reports(false, after, max_bytes).await?;
        all.extend(self.pending_reports(true, after, max_bytes).await?);
        all.sort_by_key(|report| report.id);
        Ok(all)
    }

    /// The events about an object, by its UID, that wait for the cloud; the last one is the newest.
    pub async fn events(&self, uid: &str) -> Result<Vec<Report>, Error> {
        let uid = uid.to_owned();
        self.read("read the events of an object", move |db| db.events(&uid)).await
    }

    /// Removes a report that the cloud took (`refused` empty) or refused for good, which is recorded.
    pub async fn report_done(&self, id: u64, refused: String) -> Result<(), Error> {
        self.write(Write::Done(vec![(id, refused)])).await
    }

    /// As [`Store::report_done`], for several in one commit.
    pub async fn reports_done(&self, done: Vec<(u64, String)>) -> Result<(), Error> {
        self.write(Write::Done(done)).await
    }

    /// Woken when the outbox got a report.
    pub fn outbox(&self) -> Arc<Notify> {
        Arc::clone(&self.shared.signals.outbox)
    }

    /// The highest epoch a session had.
    pub async fn epoch(&self) -> Result<u64, Error> {
        self.read("read the epoch", |db| db.epoch()).await
    }

    /// Records a session's epoch.
    pub async fn set_epoch(&self, epoch: u64) -> Result<(), Error> {
        self.write(Write::Epoch(epoch)).await
    }

    /// A note that a module keeps for itself over restarts, by kind and key (the kubelet's last status of a pod, for example).
    /// Writes nothing when the note says so already.
    pub async fn remember(&self, kind: &'static str, key: &str, value: Bytes) -> Result<(), Error> {
        self.write(Write::Remember(kind, key.to_owned(), value)).await
    }

    /// All notes of a kind.
    pub async fn notes(&self, kind: &'static str) -> Result<Vec<(String, Bytes)>, Error> {
        self.read("read notes", move |db| db.notes(kind)).await
    }

    /// One note.
    pub async fn note(&self, kind: &'static str, key: &str) -> Result<Option<Bytes>, Error> {
        let key = key.to_owned();
        self.read("read a note", move |db| db.note(kind, &key)).await
    }

    /// Drops a note.
    pub async fn forget(&self, kind: &'static str, key: &str) -> Result<(), Error> {
        self.write(Write::Forget(kind, key.to_owned())).await
    }

    /// Figures for people.
    pub async fn stats(&self) -> Result<Stats, Error> {
        self.read("read the store's figures", db::Db::stats).await
    }

    /// Commits what was sent before, closes the file and ends the thread; every handle answers [`Error::Closed`] from then on.
    pub async fn close(&self) {
        let (answer, answered) = oneshot::channel();
        if self.shared.commands.send(Command::Close(answer)).await.is_ok() {
            // An error means that the thread has ended some other way.
            let _ = answered.await;
        }
    }

    /// Ends when the store's thread has, which only a defect makes it do while a handle lives.
    pub async fn closed(&self) {
        self.shared.commands.closed().await;
    }

    async fn write(&self, write: Write) -> Result<(), Error> {
        let bytes = write.bytes();
        if bytes > QUEUE_BYTES {
            return Err(Error::TooLarge(bytes));
        }
        let (answer, answered) = oneshot::channel();
        self.send(bytes, |room| Command::Write { write, answer, _room: room }).await?;
        answered.await.unwrap_or(Err(Error::Closed))
    }

    async fn read<T, F>(&self, action: &'static str, mut query: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnMut(&mut db::Db) -> rusqlite::Result<T> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let mut answer = Some(answer);
        let run = move |db: &mut db::Db, last: bool| -> Option<Answer> {
            let result = match query(db) {
                Err(error) if !last && open::is_damage(&error) => return None,
                result => result.map_err(|source| Error::sqlite(action, source)),
            };
            let answer = answer.take()?;
            // Whoever asked may be gone.
            Some(Box::new(move || drop(answer.send(result))))
        };
        self.send(1 << 10, |room| Command::Read { run: Box::new(run), _room: room }).await?;
        answered.await.unwrap_or(Err(Error::Closed))
    }

    async fn send(
        &self,
        bytes: usize,
        command: impl FnOnce(tokio::sync::OwnedSemaphorePermit) -> Command,
    ) -> Result<(), Error> {
        let permits = u32::try_from(bytes).map_err(|_| Error::TooLarge(bytes))?;
        let room = Arc::clone(&self.shared.room).acquire_many_owned(permits).await.map_err(|_| Error::Closed)?;
        self.shared.commands.send(command(room)).await.map_err(|_| Error::Closed)
    }
}

/// Which report this is: what the outbox keeps one of.
pub fn is_coalesced(kind: ReportKind) -> bool {
    skerry_proto::sync::is_coalesced(kind)
}
