//! A look at the store without edgecore running: read-only, sealed rows are passed over, damage is left for the next start.

use std::path::Path;

use bytes::Bytes;
use rusqlite::{Connection, OpenFlags};
use skerry_proto::sync::{Collection, Report};

use super::db::Db;
use super::migrate::{self, Found};
use super::{Error, FILE, Row, Stats};

/// The store's file, opened for reading only.
pub struct Snapshot {
    db: Db,
}

impl Snapshot {
    /// Opens the file of a data directory.
    pub fn open(data_dir: &Path) -> Result<Self, Error> {
        let path = data_dir.join(FILE);
        // SQLite would only say that it cannot.
        std::fs::metadata(&path).map_err(Error::io("read", &path))?;
        let failed = |source| Error::sqlite("open the store for reading", source);
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&path, flags).map_err(failed)?;
        connection.execute_batch("PRAGMA busy_timeout = 2000; PRAGMA query_only = ON;").map_err(failed)?;
        if let Found::Newer(found) = migrate::inspect(&connection).map_err(failed)? {
            return Err(Error::Newer { path, found, known: migrate::newest() });
        }
        Ok(Self { db: Db { connection, sealer: None, path, inode: 0, lost: Vec::new() } })
    }

    /// All good rows of a collection.
    pub fn list(&mut self, collection: Collection) -> Result<Vec<Row>, Error> {
        self.db.list(collection).map_err(|source| Error::sqlite("read a collection", source))
    }

    /// All good notes of a kind.
    pub fn notes(&mut self, kind: &str) -> Result<Vec<(String, Bytes)>, Error> {
        self.db.notes(kind).map_err(|source| Error::sqlite("read notes", source))
    }

    /// The events about an object that wait for the cloud.
    pub fn events(&mut self, uid: &str) -> Result<Vec<Report>, Error> {
        self.db.events(uid).map_err(|source| Error::sqlite("read the events of an object", source))
    }

    /// Figures for people.
    pub fn stats(&mut self) -> Result<Stats, Error> {
        self.db.stats().map_err(|source| Error::sqlite("read the store's figures", source))
    }
}
