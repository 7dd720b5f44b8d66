//! Opening the file: what is missing is made, what is damaged is set aside and what can be read of it is carried over.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use ring::rand::SecureRandom as _;
use rusqlite::{Connection, ErrorCode, OpenFlags, params};
use tracing::{error, warn};

use super::db::{Db, StoredObject, StoredReport, note_sum};
use super::migrate::{self, Found};
use super::schema::meta;
use super::seal::Sealer;
use super::{Error, FILE, Opened};
use crate::order;

/// Damaged files kept for whoever wants to know why; the oldest goes.
const KEPT: usize = 2;
const DAMAGED: &str = "store.db.damaged-";

/// Opens, checks, repairs and migrates.
pub(super) fn open(data_dir: &Path, now: Timestamp) -> Result<(Db, Opened), Error> {
    fs::create_dir_all(data_dir).map_err(Error::io("make", data_dir))?;
    let sealer = Sealer::open(data_dir)?;
    let path = data_dir.join(FILE);
    let mut opened = Opened::default();
    let mut kept = None;
    let mut connection = match check(&path) {
        Ok(connection) => connection,
        Err(Verdict::Refuse(error)) => return Err(error),
        Err(Verdict::Damaged(cause)) => {
            let rescued = rescue(&path);
            let aside = set_aside(data_dir, &path, now)?;
            error!(%cause, kept = %aside.display(), rows = rescued.rows(), "the store is damaged: a new one is made of what can be read, the rest is fetched again");
            opened = Opened { set_aside: Some(aside), salvaged: rescued.rows() };
            kept = Some(rescued);
            check(&path).map_err(|verdict| match verdict {
                Verdict::Refuse(error) => error,
                Verdict::Damaged(cause) => Error::io("make", &path)(std::io::Error::other(cause)),
            })?
        }
    };
    let failed = |source| Error::sqlite("prepare the store", source);
    if migrate::get(&connection, meta::STORE_ID).map_err(failed)?.is_none() {
        let mut id = [0; 16];
        let random = ring::rand::SystemRandom::new();
        random.fill(&mut id).map_err(|_| Error::io("name", &path)(std::io::Error::other("no random bytes")))?;
        migrate::set(&connection, meta::STORE_ID, &hex::encode(id)).map_err(failed)?;
        // Report ids of a new file are above those of the one before it.
        connection
            .execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('outbox', ?1)", [now.as_millisecond().max(0)])
            .map_err(failed)?;
    }
    if let Some(kept) = kept {
        kept.write_into(&mut connection).map_err(failed)?;
    }
    let inode = fs::metadata(&path).map_err(Error::io("look at", &path))?.ino();
    Ok((Db { connection, sealer: Some(sealer), path, inode, lost: Vec::new() }, opened))
}

/// The file is damaged, or no longer the one that was opened; trying again in a new one helps.
pub(super) fn is_damage(error: &rusqlite::Error) -> bool {
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => {
            matches!(failure.code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
                || matches!(
                    failure.extended_code,
                    rusqlite::ffi::SQLITE_IOERR_SHORT_READ | rusqlite::ffi::SQLITE_READONLY_DBMOVED
                )
        }
        rusqlite::Error::FromSqlConversionFailure(..)
        | rusqlite::Error::IntegralValueOutOfRange(..)
        | rusqlite::Error::InvalidColumnType(..)
        | rusqlite::Error::Utf8Error(..) => true,
        _ => false,
    }
}

enum Verdict {
    Refuse(Error),
    Damaged(String),
}

fn check(path: &Path) -> Result<Connection, Verdict> {
    let judge = |source: rusqlite::Error| match &source {
        rusqlite::Error::SqliteFailure(failure, _)
            if matches!(
                failure.code,
                ErrorCode::DiskFull
                    | ErrorCode::ReadOnly
                    | ErrorCode::CannotOpen
                    | ErrorCode::PermissionDenied
                    | ErrorCode::OutOfMemory
                    | ErrorCode::DatabaseBusy
                    | ErrorCode::DatabaseLocked
            ) || (failure.code == ErrorCode::SystemIoFailure && !is_damage(&source)) =>
        {
            Verdict::Refuse(Error::sqlite("open the store", source))
        }
        _ => Verdict::Damaged(source.to_string()),
    };
    let mut connection = Connection::open(path).map_err(judge)?;
    // Best effort: what is secret in it is sealed.
    let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o600));
    connection.set_prepared_statement_cache_capacity(24);
    match migrate::inspect(&connection).map_err(judge)? {
        Found::Newer(found) => {
            return Err(Verdict::Refuse(Error::Newer { path: path.to_owned(), found, known: migrate::newest() }));
        }
        Found::Damaged => return Err(Verdict::Damaged("its schema contradicts itself".to_owned())),
        Found::Known => {}
    }
    connection
        .execute_batch(
            "PRAGMA busy_timeout = 5000; PRAGMA auto_vacuum = incremental; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
             PRAGMA cache_size = -256; PRAGMA mmap_size = 0; PRAGMA wal_autocheckpoint = 256; PRAGMA journal_size_limit = 1048576;
             PRAGMA temp_store = MEMORY;",
        )
        .map_err(judge)?;
    // More than quick_check: an index that lost an entry would make an object invisible.
    let word: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(judge)?;
    if word != "ok" {
        return Err(Verdict::Damaged(word));
    }
    migrate::migrate(&mut connection, path).map_err(|error| match error {
        Error::Sqlite { source, .. } if is_damage(&source) => Verdict::Damaged(source.to_string()),
        error => Verdict::Refuse(error),
    })?;
    for table in ["objects", "outbox", "notes", "meta"] {
        connection.prepare(&format!("SELECT * FROM {table} LIMIT 1")).map_err(judge)?;
    }
    Ok(connection)
}

/// Rows whose checksum holds, in the file that is about to be set aside.
fn rescue(path: &Path) -> Salvage {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    match Connection::open_with_flags(path, flags) {
        Ok(connection) => salvage(&connection),
        Err(_) => Salvage::default(),
    }
}

/// What a salvage found.
#[derive(Default)]
pub(super) struct Salvage {
    objects: Vec<StoredObject>,
    reports: Vec<StoredReport>,
    notes: Vec<(String, String, Vec<u8>)>,
    meta: Vec<(&'static str, String)>,
}

/// Reads what can be read, past damage: each table from both ends, and objects one by one by the names that the index still knows.
pub(super) fn salvage(connection: &Connection) -> Salvage {
    let mut found = Salvage::default();
    let objects = "SELECT collection, uid, key, version, encoding, checksum, payload FROM objects";
    let mut seen = std::collections::BTreeSet::new();
    let mut keep = |row: &rusqlite::Row<'_>| {
        if let (Ok(collection), Ok(uid)) = (row.get::<_, i32>(0), row.get::<_, String>(1))
            && let Ok(stored) = StoredObject::read(row)
            && stored.is_good()
            && seen.insert((collection, uid))
        {
            found.objects.push(stored);
        }
    };
    for order in ["ASC", "DESC"] {
        scan(connection, &format!("{objects} ORDER BY collection {order}, uid {order}"), &[], &mut keep);
    }
    for order in ["ASC", "DESC"] {
        let mut names = Vec::new();
        let query = format!(
            "SELECT collection, uid FROM objects INDEXED BY objects_by_key ORDER BY collection {order}, key {order}"
        );
        scan(connection, &query, &[], &mut |row| {
            if let (Ok(collection), Ok(uid)) = (row.get::<_, i32>(0), row.get::<_, String>(1)) {
                names.push((collection, uid));
            }
        });
        for (collection, uid) in names {
            scan(
                connection,
                &format!("{objects} WHERE collection = ?1 AND uid = ?2"),
                params![collection, uid],
                &mut keep,
            );
        }
    }
    let mut ids = std::collections::BTreeSet::new();
    for order in ["ASC", "DESC"] {
        let query = format!("SELECT id, kind, uid, namespace, name, checksum, payload FROM outbox ORDER BY id {order}");
        scan(connection, &query, &[], &mut |row| {
            if let Ok(stored) = StoredReport::read(row)
                && stored.open().is_some()
                && ids.insert(stored.id)
            {
                found.reports.push(stored);
            }
        });
        let query = format!("SELECT kind, key, checksum, value FROM notes ORDER BY kind {order}, key {order}");
        scan(connection, &query, &[], &mut |row| {
            let read = || Ok::<_, rusqlite::Error>((row.get(0)?, row.get(1)?, row.get::<_, i64>(2)?, row.get(3)?));
            if let Ok((kind, key, sum, value)) = read() {
                let note: (String, String, Vec<u8>) = (kind, key, value);
                if sum == note_sum(&note.0, &note.1, &note.2) && !found.notes.contains(&note) {
                    found.notes.push(note);
                }
            }
        });
    }
    for key in [meta::EPOCH, meta::REVISIONS, meta::REFUSED, meta::LAST_REFUSAL, meta::DAMAGED] {
        if let Ok(Some(value)) = migrate::get(connection, key) {
            found.meta.push((key, value));
        }
    }
    found
}

impl Salvage {
    fn rows(&self) -> u64 {
        (self.objects.len() + self.reports.len() + self.notes.len()) as u64
    }

    /// In one transaction. Whether all pods are known stays open, for some may be lost.
    pub(super) fn write_into(&self, connection: &mut Connection) -> rusqlite::Result<()> {
        let transaction = connection.transaction()?;
        for object in &self.objects {
            object.write(&transaction)?;
        }
        for report in &self.reports {
            transaction.execute(
                "INSERT OR REPLACE INTO outbox (id, kind, uid, namespace, name, checksum, payload) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                params![report.id, report.kind, report.uid, report.namespace, report.name, report.checksum, report.payload],
            )?;
        }
        for (kind, key, value) in &self.notes {
            transaction.execute(
                "INSERT OR REPLACE INTO notes (kind, key, checksum, value) VALUES (?1, ?2, ?3, ?4)",
                params![kind, key, note_sum(kind, key, value), value],
            )?;
        }
        for (key, value) in &self.meta {
            migrate::set(&transaction, key, value)?;
        }
        transaction.commit()
    }
}

/// Gives each row that can be read, until the first page that cannot.
fn scan(
    connection: &Connection,
    query: &str,
    values: &[&dyn rusqlite::ToSql],
    take: &mut dyn FnMut(&rusqlite::Row<'_>),
) {
    let Ok(mut statement) = connection.prepare(query) else { return };
    let Ok(mut rows) = statement.query(values) else { return };
    while let Ok(Some(row)) = rows.next() {
        take(row);
    }
}

/// Moves the file and what belongs to it out of the way.
fn set_aside(data_dir: &Path, path: &Path, now: Timestamp) -> Result<PathBuf, Error> {
    let stamp = now.strftime("%Y%m%dT%H%M%S%3fZ");
    let aside = data_dir.join(format!("{DAMAGED}{stamp}"));
    fs::rename(path, &aside).map_err(Error::io("set aside", path))?;
    for suffix in ["-wal", "-shm"] {
        let beside = |path: &Path| {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        match fs::rename(beside(path), beside(&aside)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("set aside", &beside(path))(error));
            }
            _ => {}
        }
    }
    let mut old: Vec<PathBuf> = fs::read_dir(data_dir)
        .map_err(Error::io("list", data_dir))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(DAMAGED) && !name.ends_with("-wal") && !name.ends_with("-shm")
        })
        .collect();
    order::sort(&mut old);
    for path in old.iter().take(old.len().saturating_sub(KEPT)) {
        for suffix in ["", "-wal", "-shm"] {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            if let Err(error) = fs::remove_file(&name)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                warn!(%error, path = ?name, "an old damaged store cannot be removed");
            }
        }
    }
    fs::File::open(data_dir).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", data_dir))?;
    Ok(aside)
}
