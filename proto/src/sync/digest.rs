//! A 128-bit hash of a set of rows that does not depend on their order and is kept up to date in O(1) for each change.

use super::Entry;

/// Count and sum modulo 2^128 of the hash of every row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest {
    /// How many rows.
    pub count: u64,
    /// The sum.
    pub sum: u128,
}

impl Digest {
    /// Adds a row that was not there.
    pub fn insert(&mut self, row: &Entry) {
        self.count += 1;
        self.sum = self.sum.wrapping_add(hash(row));
    }

    /// Removes a row that was there.
    pub fn remove(&mut self, row: &Entry) {
        self.count -= 1;
        self.sum = self.sum.wrapping_sub(hash(row));
    }
}

fn hash(row: &Entry) -> u128 {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    for part in [row.key.as_bytes(), row.uid.as_bytes()] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.update(&row.version.to_le_bytes());
    hasher.digest128()
}
