//! The open database: rows as they are on the disk, believed only if their checksum holds.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use bytes::Bytes;
use rusqlite::{Connection, TransactionBehavior, params};
use skerry_proto::sync::{COLLECTIONS, Collection, Encoding, Entry, Report, ReportKind, decode};
use tracing::warn;

use super::revisions::{self, Revisions};
use super::schema::{self, Checksum, meta};
use super::seal::Sealer;
use super::{Row, Stats, migrate};

/// Free pages above which the file is made smaller, a few pages after each commit.
const FREE_PAGES: i64 = 256;

/// A row whose checksum or seal does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    Object(Collection, String),
    Report(i64),
    Note(String, String),
}

/// An open database.
pub(super) struct Db {
    pub(super) connection: Connection,
    /// Without it, sealed rows are passed over.
    pub(super) sealer: Option<Sealer>,
    pub(super) path: PathBuf,
    pub(super) inode: u64,
    /// Found since the last time somebody looked.
    pub(super) lost: Vec<Lost>,
}

pub(super) const COLUMNS: &str = "SELECT collection, uid, key, version, encoding, checksum, payload FROM objects";

impl Db {
    pub(super) fn list(&mut self, collection: Collection) -> rusqlite::Result<Vec<Row>> {
        self.objects(&format!("{COLUMNS} WHERE collection = ?1 ORDER BY uid"), params![collection as i32])
    }

    /// A damaged row is passed over, and those after it come all the same.
    pub(super) fn page(&mut self, collection: Collection, after: &str, count: usize) -> rusqlite::Result<Vec<Row>> {
        let query = format!("{COLUMNS} WHERE collection = ?1 AND uid > ?2 ORDER BY uid LIMIT ?3");
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.objects(&query, params![collection as i32, after, count])
    }

    pub(super) fn named(&mut self, collection: Collection, key: &str) -> rusqlite::Result<Vec<Row>> {
        self.objects(
            &format!("{COLUMNS} WHERE collection = ?1 AND key = ?2 ORDER BY uid"),
            params![collection as i32, key],
        )
    }

    pub(super) fn row(&mut self, collection: Collection, uid: &str) -> rusqlite::Result<Option<Row>> {
        let query = format!("{COLUMNS} WHERE collection = ?1 AND uid = ?2");
        Ok(self.objects(&query, params![collection as i32, uid])?.pop())
    }

    pub(super) fn index(&mut self) -> rusqlite::Result<Vec<(Collection, Entry)>> {
        let mut index = Vec::new();
        for collection in COLLECTIONS {
            let query = format!("{COLUMNS} WHERE collection = ?1 ORDER BY uid");
            self.each(&query, params![collection as i32], |row| index.push((collection, row.entry)))?;
        }
        Ok(index)
    }

    fn objects(&mut self, query: &str, values: &[&dyn rusqlite::ToSql]) -> rusqlite::Result<Vec<Row>> {
        let mut rows = Vec::new();
        self.each(query, values, |row| rows.push(row))?;
        Ok(rows)
    }

    fn each(
        &mut self,
        query: &str,
        values: &[&dyn rusqlite::ToSql],
        mut take: impl FnMut(Row),
    ) -> rusqlite::Result<()> {
        let mut statement = self.connection.prepare_cached(query)?;
        let mut rows = statement.query(values)?;
        while let Some(row) = rows.next()? {
            let stored = StoredObject::read(row)?;
            match stored.open(self.sealer.as_ref()) {
                Opened::Good(row) => take(row),
                Opened::Unreadable => {}
                Opened::Damaged => {
                    let collection = Collection::try_from(stored.collection).unwrap_or(Collection::Unspecified);
                    self.lost.push(Lost::Object(collection, stored.uid));
                }
            }
        }
        Ok(())
    }

    pub(super) fn pending_reports(
        &mut self,
        events: bool,
        after: u64,
        max_bytes: usize,
    ) -> rusqlite::Result<Vec<Report>> {
        let (after, event) = (i64::try_from(after).unwrap_or(i64::MAX), ReportKind::Event as i32);
        let query = "SELECT id, kind, uid, namespace, name, checksum, payload FROM outbox WHERE id > ?1 AND (kind = ?2) = ?3 ORDER BY id";
        self.reports(query, &[&after, &event, &events], max_bytes)
    }

    /// The events about an object that wait for the cloud.
    pub(super) fn events(&mut self, uid: &str) -> rusqlite::Result<Vec<Report>> {
        let kind = ReportKind::Event as i32;
        let query = "SELECT id, kind, uid, namespace, name, checksum, payload FROM outbox WHERE kind = ?1 AND uid = ?2 ORDER BY id";
        self.reports(query, &[&kind, &uid], usize::MAX)
    }

    fn reports(
        &mut self,
        query: &str,
        values: &[&dyn rusqlite::ToSql],
        max_bytes: usize,
    ) -> rusqlite::Result<Vec<Report>> {
        let mut statement = self.connection.prepare_cached(query)?;
        let mut rows = statement.query(values)?;
        let (mut reports, mut bytes) = (Vec::new(), 0);
        while let Some(row) = rows.next()? {
            let stored = StoredReport::read(row)?;
            let Some(report) = stored.open() else {
                self.lost.push(Lost::Report(stored.id));
                continue;
            };
            bytes += report.payload.len();
            if bytes > max_bytes && !reports.is_empty() {
                break;
            }
            reports.push(report);
        }
        Ok(reports)
    }

    pub(super) fn notes(&mut self, kind: &str) -> rusqlite::Result<Vec<(String, Bytes)>> {
        let mut statement =
            self.connection.prepare_cached("SELECT key, checksum, value FROM notes WHERE kind = ?1 ORDER BY key")?;
        let mut rows = statement.query([kind])?;
        let mut notes = Vec::new();
        while let Some(row) = rows.next()? {
            let (key, sum, value): (String, i64, Vec<u8>) = (row.get(0)?, row.get(1)?, row.get(2)?);
            if sum == note_sum(kind, &key, &value) {
                notes.push((key, value.into()));
            } else {
                self.lost.push(Lost::Note(kind.to_owned(), key));
            }
        }
        Ok(notes)
    }

    pub(super) fn note(&mut self, kind: &str, key: &str) -> rusqlite::Result<Option<Bytes>> {
        let mut statement =
            self.connection.prepare_cached("SELECT checksum, value FROM notes WHERE kind = ?1 AND key = ?2")?;
        let mut rows = statement.query([kind, key])?;
        let Some(row) = rows.next()? else { return Ok(None) };
        let (sum, value): (i64, Vec<u8>) = (row.get(0)?, row.get(1)?);
        if sum == note_sum(kind, key, &value) {
            return Ok(Some(value.into()));
        }
        self.lost.push(Lost::Note(kind.to_owned(), key.to_owned()));
        Ok(None)
    }

    pub(super) fn store_id(&self) -> rusqlite::Result<String> {
        Ok(migrate::get(&self.connection, meta::STORE_ID)?.unwrap_or_default())
    }

    pub(super) fn revisions(&self) -> rusqlite::Result<Revisions> {
        Ok(migrate::get(&self.connection, meta::REVISIONS)?.map(|text| revisions::parse(&text)).unwrap_or_default())
    }

    pub(super) fn epoch(&self) -> rusqlite::Result<u64> {
        self.number(meta::EPOCH)
    }

    pub(super) fn pods_known(&self) -> rusqlite::Result<bool> {
        Ok(self.number(meta::PODS_KNOWN)? == 1)
    }

    fn number(&self, key: &str) -> rusqlite::Result<u64> {
        Ok(migrate::get(&self.connection, key)?.and_then(|text| text.parse().ok()).unwrap_or(0))
    }

    pub(super) fn stats(&mut self) -> rusqlite::Result<Stats> {
        let count = |query: &str| -> rusqlite::Result<u64> {
            self.connection.query_row(query, [], |row| row.get::<_, i64>(0)).map(i64::unsigned_abs)
        };
        let size = |suffix: &str| {
            let mut path = self.path.clone().into_os_string();
            path.push(suffix);
            std::fs::metadata(path).map_or(0, |metadata| metadata.len())
        };
        Ok(Stats {
            rows: count("SELECT count(*) FROM objects")?,
            pending: count("SELECT count(*) FROM outbox")?,
            bytes: size("") + size("-wal"),
            damaged: self.number(meta::DAMAGED)?,
            refused: self.number(meta::REFUSED)?,
            last_refusal: migrate::get(&self.connection, meta::LAST_REFUSAL)?.unwrap_or_default(),
            epoch: self.epoch()?,
            pods_known: self.pods_known()?,
        })
    }

    /// The path no longer leads to the open file.
    pub(super) fn moved(&self) -> bool {
        !std::fs::metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode)
    }

    pub(super) fn delete_lost(&mut self, lost: &[Lost], pods: bool) -> rusqlite::Result<()> {
        let count = self.number(meta::DAMAGED)? + lost.len() as u64;
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for row in lost {
            match row {
                Lost::Object(collection, uid) => transaction.execute(
                    "DELETE FROM objects WHERE collection = ?1 AND uid = ?2",
                    params![*collection as i32, uid],
                )?,
                Lost::Report(id) => transaction.execute("DELETE FROM outbox WHERE id = ?1", [id])?,
                Lost::Note(kind, key) => {
                    transaction.execute("DELETE FROM notes WHERE kind = ?1 AND key = ?2", [kind, key])?
                }
            };
        }
        migrate::set(&transaction, meta::DAMAGED, &count.to_string())?;
        if pods {
            migrate::set(&transaction, meta::PODS_KNOWN, "0")?;
        }
        transaction.commit()
    }

    /// Gives pages back to the file system, a few at a time.
    pub(super) fn shrink(&self) {
        let free = self.connection.query_row("PRAGMA freelist_count", [], |row| row.get::<_, i64>(0));
        if free.is_ok_and(|pages| pages > FREE_PAGES)
            && let Err(failed) = self.connection.execute_batch("PRAGMA incremental_vacuum(64)")
        {
            warn!(error = %failed, "the store's file cannot be made smaller yet");
        }
    }
}

pub(super) fn seal_name(collection: i32, uid: &str, version: i64) -> String {
    format!("{collection}|{uid}|{version}")
}

pub(super) fn note_sum(kind: &str, key: &str, value: &[u8]) -> i64 {
    Checksum::of("notes").text(kind).text(key).blob(value).sum()
}

/// A row of `objects` as it is on the disk.
pub(super) struct StoredObject {
    pub(super) collection: i32,
    pub(super) uid: String,
    pub(super) key: String,
    pub(super) version: i64,
    pub(super) encoding: i32,
    pub(super) checksum: i64,
    pub(super) payload: Vec<u8>,
}

pub(super) enum Opened {
    Good(Row),
    /// Sealed, and there is no key here to look with.
    Unreadable,
    Damaged,
}

impl StoredObject {
    pub(super) fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            collection: row.get(0)?,
            uid: row.get(1)?,
            key: row.get(2)?,
            version: row.get(3)?,
            encoding: row.get(4)?,
            checksum: row.get(5)?,
            payload: row.get(6)?,
        })
    }

    pub(super) fn is_good(&self) -> bool {
        self.sum() == self.checksum
    }

    pub(super) fn write(&self, connection: &Connection) -> rusqlite::Result<()> {
        connection
            .prepare_cached(
                "INSERT OR REPLACE INTO objects (collection, uid, key, version, encoding, checksum, payload) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )?
            .execute(params![
                self.collection,
                self.uid,
                self.key,
                self.version,
                self.encoding,
                self.checksum,
                self.payload
            ])?;
        Ok(())
    }

    pub(super) fn sum(&self) -> i64 {
        Checksum::of("objects")
            .number(self.collection.into())
            .text(&self.uid)
            .text(&self.key)
            .number(self.version)
            .number(self.encoding.into())
            .blob(&self.payload)
            .sum()
    }

    pub(super) fn open(&self, sealer: Option<&Sealer>) -> Opened {
        let Ok(collection) = Collection::try_from(self.collection) else { return Opened::Damaged };
        let Ok(encoding) = Encoding::try_from(self.encoding) else { return Opened::Damaged };
        if !self.is_good() {
            return Opened::Damaged;
        }
        let json = if schema::is_sealed(collection) {
            let Some(sealer) = sealer else { return Opened::Unreadable };
            let name = seal_name(self.collection, &self.uid, self.version);
            sealer.unseal(&name, &self.payload).and_then(|plain| decode(encoding, &plain).ok())
        } else {
            decode(encoding, &self.payload).ok()
        };
        let Some(json) = json else { return Opened::Damaged };
        let entry = Entry { key: self.key.clone(), uid: self.uid.clone(), version: self.version.cast_unsigned() };
        Opened::Good(Row { entry, json: json.into() })
    }
}

/// A row of `outbox` as it is on the disk.
pub(super) struct StoredReport {
    pub(super) id: i64,
    pub(super) kind: i32,
    pub(super) uid: String,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) checksum: i64,
    pub(super) payload: Vec<u8>,
}

impl StoredReport {
    pub(super) fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            kind: row.get(1)?,
            uid: row.get(2)?,
            namespace: row.get(3)?,
            name: row.get(4)?,
            checksum: row.get(5)?,
            payload: row.get(6)?,
        })
    }

    pub(super) fn sum(&self) -> i64 {
        Checksum::of("outbox")
            .number(self.id)
            .number(self.kind.into())
            .text(&self.uid)
            .text(&self.namespace)
            .text(&self.name)
            .blob(&self.payload)
            .sum()
    }

    pub(super) fn open(&self) -> Option<Report> {
        (self.sum() == self.checksum).then(|| Report {
            id: self.id.cast_unsigned(),
            kind: ReportKind::try_from(self.kind).unwrap_or(ReportKind::Unspecified),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            payload: self.payload.clone().into(),
        })
    }
}
