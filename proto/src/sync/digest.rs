//! A 128-bit hash of a set of rows that does not depend on their order and is kept up to date in O(1) for each change.

use super::Entry;
use crate::wire::{self, Collection};

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
        self.add(&row.key, &row.uid, row.version);
    }

    /// Removes a row that was there.
    pub fn remove(&mut self, row: &Entry) {
        self.subtract(&row.key, &row.uid, row.version);
    }

    pub(super) fn add(&mut self, key: &str, uid: &str, version: u64) {
        self.count += 1;
        self.sum = self.sum.wrapping_add(hash(key, uid, version));
    }

    pub(super) fn subtract(&mut self, key: &str, uid: &str, version: u64) {
        self.count -= 1;
        self.sum = self.sum.wrapping_sub(hash(key, uid, version));
    }

    pub(super) fn to_wire(self, collection: Collection) -> wire::Digest {
        let sum = self.sum.to_be_bytes().to_vec().into();
        wire::Digest { collection: collection.into(), count: self.count, sum }
    }

    pub(super) fn from_wire(digest: &wire::Digest) -> Option<Self> {
        let sum = digest.sum.as_ref().try_into().ok()?;
        Some(Self { count: digest.count, sum: u128::from_be_bytes(sum) })
    }
}

fn hash(key: &str, uid: &str, version: u64) -> u128 {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    for part in [key.as_bytes(), uid.as_bytes()] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.update(&version.to_le_bytes());
    hasher.digest128()
}
