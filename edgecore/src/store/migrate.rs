//! Brings a file to the newest schema, one transaction a step. A file of a later edgecore is refused and left as it is.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension as _, TransactionBehavior};

use super::Error;
use super::schema::{self, Checksum, meta};

type Step = fn(&rusqlite::Transaction<'_>) -> rusqlite::Result<()>;

/// Step `n` makes schema `n + 1` of schema `n`.
const STEPS: &[Step] = &[|transaction| transaction.execute_batch(schema::VERSION_1)];

/// What a file says about its schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Known here; steps may be left to do.
    Known,
    /// Written by a later edgecore.
    Newer(i64),
    /// The two places that say it contradict each other.
    Damaged,
}

pub(super) fn newest() -> i64 {
    STEPS.len().try_into().unwrap_or(i64::MAX)
}

/// Looks, writes nothing. The header's number alone is not believed: one flipped bit in it would lock a box out of its own store.
pub(super) fn inspect(connection: &Connection) -> rusqlite::Result<Found> {
    let header: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get(0))?;
    if tables == 0 {
        return Ok(if header == 0 { Found::Known } else { Found::Damaged });
    }
    let kept: Option<i64> = get(connection, meta::SCHEMA)?.and_then(|text| text.parse().ok());
    Ok(match kept {
        Some(kept) if kept == header && header > newest() => Found::Newer(header),
        Some(kept) if kept == header && header > 0 => Found::Known,
        _ => Found::Damaged,
    })
}

/// Does the steps that are left.
pub(super) fn migrate(connection: &mut Connection, path: &Path) -> Result<(), Error> {
    let failed = |source| Error::sqlite("bring the store to the newest schema", source);
    migrate_with(connection, STEPS).map_err(failed)?;
    match inspect(connection).map_err(failed)? {
        Found::Newer(found) => Err(Error::Newer { path: path.to_owned(), found, known: newest() }),
        Found::Known | Found::Damaged => Ok(()),
    }
}

fn migrate_with(connection: &mut Connection, steps: &[Step]) -> rusqlite::Result<()> {
    let from: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let mut version = from;
    for step in steps.iter().skip(usize::try_from(from).unwrap_or(usize::MAX)) {
        version += 1;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        step(&transaction)?;
        set(&transaction, meta::SCHEMA, &version.to_string())?;
        transaction.pragma_update(None, "user_version", version)?;
        transaction.commit()?;
    }
    Ok(())
}

/// A value of `meta`, if it is there and good.
pub(super) fn get(connection: &Connection, key: &str) -> rusqlite::Result<Option<String>> {
    let row: Option<(i64, String)> = connection
        .prepare_cached("SELECT checksum, value FROM meta WHERE key = ?1")?
        .query_row([key], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    Ok(row.filter(|(sum, value)| *sum == checksum(key, value)).map(|(_, value)| value))
}

/// Sets a value of `meta`, unless it is that already; answers whether it wrote.
pub(super) fn set(connection: &Connection, key: &str, value: &str) -> rusqlite::Result<bool> {
    if get(connection, key)?.as_deref() == Some(value) {
        return Ok(false);
    }
    connection
        .prepare_cached("INSERT OR REPLACE INTO meta (key, checksum, value) VALUES (?1, ?2, ?3)")?
        .execute(rusqlite::params![key, checksum(key, value), value])?;
    Ok(true)
}

fn checksum(key: &str, value: &str) -> i64 {
    Checksum::of("meta").text(key).text(value).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_file_takes_the_steps_that_are_left_and_keeps_its_rows() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate_with(&mut connection, &STEPS[..1]).unwrap();
        set(&connection, "store_id", "abc").unwrap();
        let later: [Step; 2] = [STEPS[0], |t| t.execute_batch("CREATE TABLE later (x INTEGER)")];
        migrate_with(&mut connection, &later).unwrap();
        assert_eq!(get(&connection, "store_id").unwrap().as_deref(), Some("abc"));
        connection.execute("INSERT INTO later VALUES (1)", []).unwrap();
        assert_eq!(inspect(&connection).unwrap(), Found::Newer(2));
    }

    #[test]
    fn a_failing_step_leaves_the_schema_before_it() {
        let mut connection = Connection::open_in_memory().unwrap();
        let broken: [Step; 2] = [STEPS[0], |t| t.execute_batch("CREATE TABLE half (x); CREATE NONSENSE")];
        assert!(migrate_with(&mut connection, &broken).is_err());
        assert_eq!(inspect(&connection).unwrap(), Found::Known);
        assert!(connection.execute("INSERT INTO half VALUES (1)", []).is_err());
    }

    #[test]
    fn a_flipped_header_is_damage_and_not_a_later_schema() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate_with(&mut connection, STEPS).unwrap();
        connection.pragma_update(None, "user_version", 257).unwrap();
        assert_eq!(inspect(&connection).unwrap(), Found::Damaged);
    }
}
