//! What a row looks like on the disk, and the checksum by which it is believed.

use skerry_proto::sync::Collection;
use xxhash_rust::xxh3::Xxh3;

/// The tables of schema 1. `auto_vacuum` must be set before the first of them.
pub(super) const VERSION_1: &str = "
CREATE TABLE objects (
    collection INTEGER NOT NULL,
    uid        TEXT    NOT NULL,
    key        TEXT    NOT NULL,
    version    INTEGER NOT NULL,
    encoding   INTEGER NOT NULL,
    checksum   INTEGER NOT NULL,
    payload    BLOB    NOT NULL,
    PRIMARY KEY (collection, uid)
) WITHOUT ROWID;
CREATE INDEX objects_by_key ON objects (collection, key);
CREATE TABLE outbox (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    kind      INTEGER NOT NULL,
    uid       TEXT    NOT NULL,
    namespace TEXT    NOT NULL,
    name      TEXT    NOT NULL,
    checksum  INTEGER NOT NULL,
    payload   BLOB    NOT NULL
);
CREATE INDEX outbox_by_uid ON outbox (kind, uid);
CREATE TABLE notes (
    kind     TEXT    NOT NULL,
    key      TEXT    NOT NULL,
    checksum INTEGER NOT NULL,
    value    BLOB    NOT NULL,
    PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE TABLE meta (
    key      TEXT    NOT NULL PRIMARY KEY,
    checksum INTEGER NOT NULL,
    value    TEXT    NOT NULL
) WITHOUT ROWID;
";

/// Keys of `meta`.
pub(super) mod meta {
    pub(in crate::store) const STORE_ID: &str = "store_id";
    pub(in crate::store) const EPOCH: &str = "last_epoch";
    /// How new the objects may be: `COLLECTION:REVISION` with commas between.
    pub(in crate::store) const REVISIONS: &str = "revisions";
    pub(in crate::store) const SCHEMA: &str = "schema";
    pub(in crate::store) const PODS_KNOWN: &str = "pods_known";
    pub(in crate::store) const DAMAGED: &str = "damaged";
    pub(in crate::store) const REFUSED: &str = "refused";
    pub(in crate::store) const LAST_REFUSAL: &str = "last_refusal";
}

/// A checksum over the columns of a row, each with its length, so that no byte can move from one to the next.
pub(super) struct Checksum(Xxh3);

impl Checksum {
    pub(super) fn of(table: &str) -> Self {
        Self(Xxh3::new()).text(table)
    }

    pub(super) fn text(self, text: &str) -> Self {
        self.blob(text.as_bytes())
    }

    pub(super) fn blob(mut self, bytes: &[u8]) -> Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    pub(super) fn number(mut self, number: i64) -> Self {
        self.0.update(&number.to_le_bytes());
        self
    }

    pub(super) fn sum(&self) -> i64 {
        self.0.digest().cast_signed()
    }
}

/// What is secret is sealed before it reaches the disk.
pub(super) fn is_sealed(collection: Collection) -> bool {
    matches!(collection, Collection::Secrets | Collection::Tokens)
}
