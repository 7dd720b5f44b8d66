//! The thread that owns the connection, and what it does with it.

use std::path::PathBuf;

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension as _, TransactionBehavior, params};
use skerry_proto::delta;
use skerry_proto::sync::{
    Collection, Delta, Encoding, Entry, Object, Op, Report, ReportKind, decode, encode, fingerprint,
};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tracing::{error, warn};

use super::db::{COLUMNS, Db, Lost, Opened, StoredObject, StoredReport, note_sum, seal_name};
use super::revisions::{self, Revisions};
use super::schema::{self, meta};
use super::seal::Sealer;
use super::{Change, Error, MAX_EVENTS, Row, Signals, migrate, open};
use crate::clock;

/// Commands taken into one commit at most.
const BATCH: usize = 256;

/// Tells whoever asked.
pub(super) type Answer = Box<dyn FnOnce() + Send>;
/// Asks the database; told whether it is the last time. `None`: the file is damaged, and it wants to be asked once more.
type Query = Box<dyn FnMut(&mut Db, bool) -> Option<Answer> + Send>;
/// A write, who waits for it, and its room in the queue.
type Waiting = (Write, oneshot::Sender<Result<(), Error>>, OwnedSemaphorePermit);

pub(super) enum Command {
    Write { write: Write, answer: oneshot::Sender<Result<(), Error>>, _room: OwnedSemaphorePermit },
    Read { run: Query, _room: OwnedSemaphorePermit },
    Close(oneshot::Sender<()>),
}

/// A change of the store; done twice it does the same, but that a report gets another id.
pub(super) enum Write {
    /// The link's, with how new the objects may be after it.
    Apply(Vec<Op>, Revisions),
    Report(Report),
    Done(Vec<(u64, String)>),
    Remember(&'static str, String, Bytes),
    Forget(&'static str, String),
    Epoch(u64),
    /// Void if rows were lost since [`Signals::damaged`] was this.
    PodsKnown(u64),
}

impl Write {
    /// About how much memory it holds while it waits.
    pub(super) fn bytes(&self) -> usize {
        128 + match self {
            Self::Apply(ops, _) => ops
                .iter()
                .map(|op| match op {
                    Op::Upsert(object) => 128 + object.entry.key.len() + object.entry.uid.len() + object.payload.len(),
                    Op::Patch(_, entry, delta) => 128 + entry.key.len() + entry.uid.len() + delta.payload.len(),
                    Op::Delete(_, uid) => 64 + uid.len(),
                })
                .sum(),
            Self::Report(report) => {
                report.namespace.len() + report.name.len() + report.uid.len() + report.payload.len()
            }
            Self::Done(done) => done.iter().map(|(_, refused)| 32 + refused.len()).sum(),
            Self::Remember(_, key, value) => key.len() + value.len(),
            Self::Forget(_, key) => key.len(),
            Self::Epoch(_) | Self::PodsKnown(_) => 0,
        }
    }
}

/// What a transaction brought about, told after its commit.
#[derive(Default)]
struct Effects {
    wrote: bool,
    changes: Vec<Change>,
    reports: bool,
    pods_known: bool,
    /// Deltas that did not fit what they were to be applied to.
    misfits: u64,
}

pub(super) struct Writer {
    db: Option<Db>,
    data_dir: PathBuf,
    signals: Signals,
}

impl Writer {
    pub(super) fn new(db: Db, data_dir: PathBuf, signals: Signals) -> Self {
        Self { db: Some(db), data_dir, signals }
    }

    /// Until it is closed or the last handle is dropped.
    pub(super) fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut closing = None;
        while let Some(first) = inbox.blocking_recv() {
            let mut writes = Vec::new();
            let mut next = Some(first);
            let mut taken = 0;
            while let Some(command) = next {
                match command {
                    Command::Write { write, answer, _room } => writes.push((write, answer, _room)),
                    Command::Read { run, _room } => self.read(run),
                    Command::Close(answer) => closing = Some(answer),
                }
                taken += 1;
                next = if taken < BATCH { inbox.try_recv().ok() } else { None };
            }
            self.commit(writes);
            if closing.is_some() {
                break;
            }
        }
        self.db = None;
        if let Some(answer) = closing {
            let _ = answer.send(());
        }
    }

    fn read(&mut self, mut run: Query) {
        let Some(db) = self.db() else { return };
        let mut answer = run(db, false);
        if answer.is_none() {
            self.replace();
            answer = self.db().and_then(|db| run(db, true));
        }
        // Before the answer: a row that was found to be damaged must not pass for one that is gone.
        self.drop_lost();
        if let Some(answer) = answer {
            answer();
        }
    }

    fn commit(&mut self, writes: Vec<Waiting>) {
        if writes.is_empty() {
            return;
        }
        if self.db().is_some_and(|db| db.moved()) {
            warn!("the store's file was moved or deleted while in use, a new one is made of what is in memory");
            self.replace();
        }
        let all: Vec<&Write> = writes.iter().map(|(write, ..)| write).collect();
        let together = self.transact(&all);
        drop(all);
        let alone = together.is_err() && writes.len() > 1;
        let together = together.map_err(|source| Error::sqlite("write to the store", source));
        for (write, answer, _room) in writes {
            // One that cannot be written (too large for what space is left) does not keep the others from the disk.
            let result = if alone {
                self.transact(&[&write]).map_err(|source| Error::sqlite("write to the store", source))
            } else {
                match &together {
                    Ok(()) => Ok(()),
                    Err(Error::DiskFull { action, source }) => Err(Error::DiskFull { action, source: source.clone() }),
                    Err(Error::ReadOnly { action, source }) => Err(Error::ReadOnly { action, source: source.clone() }),
                    Err(Error::Sqlite { action, source }) => Err(Error::Sqlite { action, source: source.clone() }),
                    Err(_) => Err(Error::Closed),
                }
            };
            let _ = answer.send(result);
        }
        self.drop_lost();
        if let Some(db) = self.db() {
            db.shrink();
        }
    }

    fn transact(&mut self, writes: &[&Write]) -> rusqlite::Result<()> {
        let damaged = *self.signals.damaged.borrow();
        let done = match self.db() {
            Some(db) => db.transact(writes, damaged),
            None => return Err(closed()),
        };
        let effects = match done {
            Err(damage) if open::is_damage(&damage) => {
                self.replace();
                let damaged = *self.signals.damaged.borrow();
                match self.db() {
                    Some(db) => db.transact(writes, damaged)?,
                    None => return Err(damage),
                }
            }
            done => done?,
        };
        for change in effects.changes {
            // Nobody listening is fine.
            let _ = self.signals.changes.send(change);
        }
        // After the changes, so that who hears it has been told of every row there is.
        if effects.pods_known {
            self.signals.pods_known.send_if_modified(|known| !std::mem::replace(known, true));
        }
        if effects.reports {
            self.signals.outbox.notify_one();
        }
        if effects.misfits > 0 {
            error!(
                rows = effects.misfits,
                "what the cloud changed does not fit what is stored; it is fetched as a whole"
            );
            self.signals.damaged.send_modify(|count| *count += effects.misfits);
        }
        Ok(())
    }

    /// The database; opened again if that failed before.
    fn db(&mut self) -> Option<&mut Db> {
        if self.db.is_none() {
            match open::open(&self.data_dir, clock::wall()) {
                Ok((db, _)) => self.db = Some(db),
                Err(failed) => {
                    error!(error = %failed, cause = ?std::error::Error::source(&failed), "the store cannot be opened")
                }
            }
        }
        self.db.as_mut()
    }

    /// Puts a new file in the place of one that turned out damaged or is no longer there, with what can still be read.
    fn replace(&mut self) {
        let Some(db) = self.db.take() else { return };
        let moved = db.moved();
        let Db { connection, sealer, .. } = db;
        let kept = moved.then(|| open::salvage(&connection));
        // Before another connection exists, for closing removes the log by its name.
        drop((connection, sealer));
        if let Some(db) = self.db()
            && let Some(kept) = kept
            && let Err(failed) = kept.write_into(&mut db.connection)
        {
            error!(error = %failed, "what the deleted store held cannot be written to the new one");
        }
        let known = self.db().and_then(|db| db.pods_known().ok()).unwrap_or(false);
        self.signals.pods_known.send_if_modified(|old| std::mem::replace(old, known) != known);
        self.signals.damaged.send_modify(|count| *count += 1);
        self.signals.outbox.notify_one();
    }

    fn drop_lost(&mut self) {
        let Some(db) = self.db.as_mut() else { return };
        let lost = std::mem::take(&mut db.lost);
        if lost.is_empty() {
            return;
        }
        for row in &lost {
            error!(
                ?row,
                "a damaged row was found in the store and dropped; what the cloud wants of it is fetched again"
            );
        }
        let pods = lost.iter().any(|row| matches!(row, Lost::Object(Collection::Pods, _)));
        if let Err(failed) = db.delete_lost(&lost, pods) {
            warn!(error = %failed, "damaged rows cannot be removed from the disk yet");
        }
        if pods {
            self.signals.pods_known.send_if_modified(|known| std::mem::replace(known, false));
        }
        self.signals.damaged.send_modify(|count| *count += lost.len() as u64);
    }
}

fn closed() -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CANTOPEN), None)
}

impl Db {
    fn transact(&mut self, writes: &[&Write], damaged: u64) -> rusqlite::Result<Effects> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut effects = Effects::default();
        for write in writes {
            perform(&transaction, self.sealer.as_ref(), write, damaged, &mut effects)?;
        }
        if effects.wrote {
            transaction.commit()?
        } else {
            transaction.rollback()?
        }
        Ok(effects)
    }
}

fn perform(
    connection: &Connection,
    sealer: Option<&Sealer>,
    write: &Write,
    damaged: u64,
    effects: &mut Effects,
) -> rusqlite::Result<()> {
    match write {
        Write::Apply(ops, revisions) => {
            if !revisions.is_empty() {
                effects.wrote |= migrate::set(connection, meta::REVISIONS, &revisions::text(revisions))?;
            }
            for op in ops {
                let change = match op {
                    Op::Upsert(object) => upsert(connection, sealer, object)?,
                    Op::Patch(collection, entry, delta) => {
                        match patched(connection, sealer, *collection, entry, delta)? {
                            Some(object) => upsert(connection, sealer, &object)?,
                            None => {
                                effects.misfits += 1;
                                effects.wrote |= unversion(connection, sealer, *collection, &entry.uid)?;
                                None
                            }
                        }
                    }
                    Op::Delete(collection, uid) => delete(connection, *collection, uid)?,
                };
                effects.wrote |= change.is_some();
                effects.changes.extend(change);
            }
        }
        Write::Report(report) => {
            put_report(connection, report)?;
            (effects.wrote, effects.reports) = (true, true);
        }
        Write::Done(done) => {
            for (id, refused) in done {
                let id = i64::try_from(*id).unwrap_or(i64::MAX);
                let gone = connection.prepare_cached("DELETE FROM outbox WHERE id = ?1")?.execute([id])? > 0;
                effects.wrote |= gone;
                if gone && !refused.is_empty() {
                    let count =
                        migrate::get(connection, meta::REFUSED)?.and_then(|text| text.parse().ok()).unwrap_or(0);
                    migrate::set(connection, meta::REFUSED, &(count + 1_u64).to_string())?;
                    migrate::set(connection, meta::LAST_REFUSAL, refused)?;
                }
            }
        }
        Write::Remember(kind, key, value) => {
            let old: Option<(i64, Vec<u8>)> = connection
                .prepare_cached("SELECT checksum, value FROM notes WHERE kind = ?1 AND key = ?2")?
                .query_row([kind, key.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?;
            let sum = note_sum(kind, key, value);
            if !old.is_some_and(|(old_sum, old)| old_sum == sum && old == value.as_ref()) {
                connection
                    .prepare_cached(
                        "INSERT OR REPLACE INTO notes (kind, key, checksum, value) VALUES (?1, ?2, ?3, ?4)",
                    )?
                    .execute(params![kind, key, sum, value.as_ref()])?;
                effects.wrote = true;
            }
        }
        Write::Forget(kind, key) => {
            let mut statement = connection.prepare_cached("DELETE FROM notes WHERE kind = ?1 AND key = ?2")?;
            effects.wrote |= statement.execute([kind, key.as_str()])? > 0;
        }
        Write::Epoch(epoch) => effects.wrote |= migrate::set(connection, meta::EPOCH, &epoch.to_string())?,
        // Said without knowing what was lost.
        Write::PodsKnown(known) if *known != damaged => {}
        Write::PodsKnown(_) => {
            effects.wrote |= migrate::set(connection, meta::PODS_KNOWN, "1")?;
            effects.pods_known = true;
        }
    }
    Ok(())
}

fn upsert(connection: &Connection, sealer: Option<&Sealer>, object: &Object) -> rusqlite::Result<Option<Change>> {
    let Object { collection, entry, encoding, payload, delta: _ } = object;
    let kind = *collection as i32;
    let (encoding, payload) = match encoding {
        Encoding::Raw => encode(payload),
        Encoding::Zstd => (Encoding::Zstd, payload.clone()),
        // What is stored outlives the dictionary. The link decompresses what it has received.
        Encoding::ZstdDictionary => {
            let json = decode(*encoding, payload)
                .map_err(|failed| rusqlite::Error::ToSqlConversionFailure(Box::new(failed)))?;
            encode(&json)
        }
    };
    let payload = if schema::is_sealed(*collection) {
        let sealed =
            sealer.and_then(|sealer| sealer.seal(&seal_name(kind, &entry.uid, entry.version.cast_signed()), &payload));
        sealed
            .ok_or_else(|| rusqlite::Error::ToSqlConversionFailure("no node key to seal a secret with".into()))?
            .into()
    } else {
        payload
    };
    let mut stored = StoredObject {
        collection: kind,
        uid: entry.uid.clone(),
        key: entry.key.clone(),
        version: entry.version.cast_signed(),
        encoding: encoding as i32,
        checksum: 0,
        payload: payload.into(),
    };
    stored.checksum = stored.sum();
    let old = connection
        .prepare_cached(&format!("{COLUMNS} WHERE collection = ?1 AND uid = ?2"))?
        .query_row(params![kind, entry.uid], StoredObject::read)
        .optional()?;
    if old.is_some_and(|old| {
        // A seal differs each time.
        let same = schema::is_sealed(*collection) || old.payload == stored.payload;
        same && old.checksum == old.sum()
            && (old.key == stored.key)
            && (old.version == stored.version)
            && matches!(old.open(sealer), Opened::Good(_))
    }) {
        return Ok(None);
    }
    stored.write(connection)?;
    Ok(Some(Change { collection: *collection, key: entry.key.clone(), uid: entry.uid.clone() }))
}

/// What a delta makes of the row that it is for; `None` if it does not fit.
fn patched(
    connection: &Connection,
    sealer: Option<&Sealer>,
    collection: Collection,
    entry: &Entry,
    delta: &Delta,
) -> rusqlite::Result<Option<Object>> {
    let Some(held) = held(connection, sealer, collection, &entry.uid)?.filter(|held| held.entry.version == delta.base)
    else {
        return Ok(None);
    };
    let json = delta::apply(&held.json, &delta.payload).ok();
    Ok(json.filter(|json| fingerprint(json) == entry.version).map(|json| {
        let (encoding, payload) = (Encoding::Raw, json.into());
        Object { collection, entry: entry.clone(), encoding, payload, delta: None }
    }))
}

/// Gives a row a version that no object has: what it says stands until the cloud sends it as a whole. Answers whether there was one.
fn unversion(
    connection: &Connection,
    sealer: Option<&Sealer>,
    collection: Collection,
    uid: &str,
) -> rusqlite::Result<bool> {
    let Some(Row { entry, json }) = held(connection, sealer, collection, uid)? else { return Ok(false) };
    let entry = Entry { version: 0, ..entry };
    let whole = Object { collection, entry, encoding: Encoding::Raw, payload: json, delta: None };
    upsert(connection, sealer, &whole)?;
    Ok(true)
}

/// A row that can be read.
fn held(
    connection: &Connection,
    sealer: Option<&Sealer>,
    collection: Collection,
    uid: &str,
) -> rusqlite::Result<Option<Row>> {
    let stored = connection
        .prepare_cached(&format!("{COLUMNS} WHERE collection = ?1 AND uid = ?2"))?
        .query_row(params![collection as i32, uid], StoredObject::read)
        .optional()?;
    Ok(stored.and_then(|stored| match stored.open(sealer) {
        Opened::Good(row) => Some(row),
        Opened::Unreadable | Opened::Damaged => None,
    }))
}

fn delete(connection: &Connection, collection: Collection, uid: &str) -> rusqlite::Result<Option<Change>> {
    let key: Option<String> = connection
        .prepare_cached("DELETE FROM objects WHERE collection = ?1 AND uid = ?2 RETURNING key")?
        .query_row(params![collection as i32, uid], |row| row.get(0))
        .optional()?;
    Ok(key.map(|key| Change { collection, key, uid: uid.to_owned() }))
}

fn put_report(connection: &Connection, report: &Report) -> rusqlite::Result<()> {
    let kind = report.kind as i32;
    if super::is_coalesced(report.kind) {
        // An equal one too: it may be answered, and about to go, and this one is said because something else shows.
        connection
            .prepare_cached("DELETE FROM outbox WHERE kind = ?1 AND uid = ?2")?
            .execute(params![kind, report.uid])?;
    }
    if report.kind == ReportKind::Event {
        // It counts what the older one of its name counted, too; one that repeats itself is not to push out all others.
        connection
            .prepare_cached("DELETE FROM outbox WHERE kind = ?1 AND uid = ?2 AND namespace = ?3 AND name = ?4")?
            .execute(params![kind, report.uid, report.namespace, report.name])?;
    }
    let mut insert = connection.prepare_cached(
        "INSERT INTO outbox (kind, uid, namespace, name, checksum, payload) VALUES (?1, ?2, ?3, ?4, 0, ?5)",
    )?;
    let id = insert.insert(params![kind, report.uid, report.namespace, report.name, report.payload.as_ref()])?;
    let stored = StoredReport {
        id,
        kind,
        uid: report.uid.clone(),
        namespace: report.namespace.clone(),
        name: report.name.clone(),
        checksum: 0,
        payload: report.payload.to_vec(),
    };
    connection.prepare_cached("UPDATE outbox SET checksum = ?2 WHERE id = ?1")?.execute([id, stored.sum()])?;
    if report.kind == ReportKind::Event {
        let bound = i64::try_from(MAX_EVENTS).unwrap_or(i64::MAX);
        connection
            .prepare_cached(
                "DELETE FROM outbox WHERE kind = ?1 AND id <= (SELECT id FROM outbox WHERE kind = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)",
            )?
            .execute(params![kind, bound])?;
    }
    Ok(())
}
