//! State sync between one cloud (the hub side) and one edge: two machines, [`Hub`] and [`Edge`], that do no IO.
//!
//! What they guarantee: an edge whose link works converges to what the hub is told to be desired; per object no version goes
//! backwards, also from one replica of the cloud to another; nothing is deleted but by an explicit delete of a UID, which a hub sends
//! only for a collection declared complete, and only when it is known to be as new as what the edge has seen.
//! Time is a [`Duration`] since any fixed origin of the caller's.

use std::time::Duration;

use bytes::Bytes;

use crate::{delta, dictionary};

pub use self::digest::Digest;
pub use self::edge::{Edge, EdgeInput, EdgeOutput, Op};
pub use self::hub::{Backlog, Hub, HubInput, HubOutput, Tally, check_hello};
pub use crate::wire::{Collection, Encoding, ReportKind, goodbye::Reason};

mod digest;
mod edge;
mod hub;
pub mod inbox;
mod outbox;
mod revisions;
#[cfg(test)]
mod tests;

/// The protocol versions this code speaks, inclusive.
pub const PROTOCOL: std::ops::RangeInclusive<u32> = 1..=1;
/// Every collection, in the order in which they are sent: what pods need goes before the pods.
pub const COLLECTIONS: [Collection; 10] = [
    Collection::Settings,
    Collection::Node,
    Collection::Services,
    Collection::RuntimeClasses,
    Collection::ConfigMaps,
    Collection::Secrets,
    Collection::Tokens,
    Collection::Pods,
    Collection::DeviceModels,
    Collection::Devices,
];
/// An edge that sent or heard nothing for this long sends a ping; the cloud answers, so that both sides hear something. Pings are most of
/// what an idle link costs, about 300 bytes each with all headers; ten seconds are left for one to be lost and sent again.
pub const PING_AFTER: Duration = Duration::from_secs(18);
/// A side that heard nothing for this long takes the session for dead.
pub const DEAD_AFTER: Duration = Duration::from_secs(28);
/// How long the answer to a ping may take that was sent because the way may be another one by now.
pub const ANSWER_DUE: Duration = Duration::from_secs(5);
/// Not asked so more often than this.
pub const DOUBT_PACE: Duration = Duration::from_secs(20);
/// The largest frame either side accepts, in bytes.
pub const MAX_FRAME: usize = 4 << 20;
/// The largest object after decompression, in bytes. etcd takes 1.5 MiB of protobuf, of which JSON makes six times as much when it is all
/// control characters.
pub const MAX_OBJECT: usize = 10 << 20;

/// Reports that may be on their way at once; an edge waits beyond it, a hub ends the session of one that does not.
pub const REPORT_WINDOW: usize = 16;
/// The largest report after decompression, in bytes: what etcd takes, and room for how JSON says it. A hub refuses a larger one for good.
pub const MAX_REPORT: usize = 2 << 20;
/// The most rows a hub accepts in one inventory of anything but devices: far above what a node can hold.
pub const MAX_INVENTORY: usize = 10_000;
/// The most bytes of keys and UIDs that a hub accepts in one inventory of anything but devices: so much it remembers of what a node says it
/// holds.
pub const MAX_INVENTORY_BYTES: usize = 1 << 20;
/// The most devices that a hub may want an edge to hold.
pub const MAX_DEVICES: usize = 50_000;
/// The most bytes of keys and UIDs that they may have together.
pub const MAX_DEVICES_BYTES: usize = MAX_DEVICES * 128;
/// The longest key or UID either side accepts, in bytes: namespace, name, a service account and an audience.
const MAX_NAME: usize = 1024;
/// Rows in one inventory frame.
const INVENTORY_PART: usize = 1000;

/// One row: what it is called, which one of that name it is, and which state of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// `namespace/name`, or `name` for what has no namespace.
    pub key: String,
    /// The identity.
    pub uid: String,
    /// Opaque; compared for equality only.
    pub version: u64,
}

/// An object as the hub sends it; cloning shares the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Which collection it belongs to.
    pub collection: Collection,
    /// Name, identity, version.
    pub entry: Entry,
    /// How `payload` is encoded.
    pub encoding: Encoding,
    /// The JSON, encoded once whatever the number of edges that get it.
    pub payload: Bytes,
    /// The same as what differs from the state before, if that is smaller; computed once too.
    pub delta: Option<Delta>,
}

/// What makes an object of an older state of it; see [`crate::delta`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// The version it applies to.
    pub base: u64,
    /// The delta itself.
    pub payload: Bytes,
}

impl Object {
    /// Makes an object of its JSON; the version is a fingerprint of it, so that every replica computes the same one.
    pub fn new(collection: Collection, key: String, uid: String, json: &[u8]) -> Self {
        let version = fingerprint(json);
        Self::with_version(collection, Entry { key, uid, version }, json)
    }

    /// This, which takes the place of `before`: with the delta between the two, or `before` itself when nothing changed. Both versions have
    /// to be fingerprints.
    #[must_use]
    pub fn succeeding(mut self, before: &Self) -> Self {
        if self.entry == before.entry {
            return before.clone();
        }
        if self.entry.uid == before.entry.uid
            && let (Ok(old), Ok(new)) = (decode(before.encoding, &before.payload), decode(self.encoding, &self.payload))
            && let Some(payload) = delta::diff(&old, &new, self.payload.len())
        {
            self.delta = Some(Delta { base: before.entry.version, payload });
        }
        self
    }

    /// Whether an edge accepts it.
    pub fn is_deliverable(&self) -> bool {
        let size = decoded_size(self.encoding, &self.payload);
        // Names and numbers go into the same frame.
        let names = self.entry.key.len().max(self.entry.uid.len());
        names <= MAX_NAME && self.payload.len() + 4096 <= MAX_FRAME && size.is_some_and(|size| size <= MAX_OBJECT)
    }

    /// Makes an object whose version has another meaning than its content (a token's).
    pub fn with_version(collection: Collection, entry: Entry, json: &[u8]) -> Self {
        let (encoding, payload) = match dictionary::compress(json) {
            // As in `encode`.
            Some(small) => (Encoding::ZstdDictionary, small.into_boxed_slice().into()),
            None => encode(json),
        };
        Self { collection, entry, encoding, payload, delta: None }
    }

    /// All of it, as an edge can read it that has the dictionary or has it not.
    fn whole(&self, dictionary: bool) -> (Encoding, Bytes) {
        if dictionary || self.encoding != Encoding::ZstdDictionary {
            return (self.encoding, self.payload.clone());
        }
        // It was made here.
        decode(self.encoding, &self.payload)
            .map_or_else(|_| (self.encoding, self.payload.clone()), |json| encode(&json))
    }
}

/// Something the edge observed, on its way to the apiserver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Rises with every report of one store; the newest of one key replaces older ones.
    pub id: u64,
    /// What is reported.
    pub kind: ReportKind,
    /// Namespace of the object it is about, empty for a Node.
    pub namespace: String,
    /// Name of the object it is about.
    pub name: String,
    /// UID of the object it is about.
    pub uid: String,
    /// JSON.
    pub payload: Bytes,
}

/// Whether of this kind only the newest report about an object counts.
pub fn is_coalesced(kind: ReportKind) -> bool {
    match kind {
        ReportKind::PodStatus | ReportKind::NodeStatus | ReportKind::DeviceStatus => true,
        ReportKind::Event | ReportKind::Unspecified => false,
    }
}

/// The most rows, and bytes of keys and UIDs, that a hub accepts in one inventory. Of devices it is twice what an edge may be wanted to hold:
/// when others take their place, they are sent first, and a session may end in between.
pub const fn max_inventory(collection: Collection) -> (usize, usize) {
    match collection {
        Collection::Devices => (2 * MAX_DEVICES, 2 * MAX_DEVICES_BYTES),
        _ => (MAX_INVENTORY, MAX_INVENTORY_BYTES),
    }
}

/// A collection's place in [`COLLECTIONS`]; `None` for what is not known here.
fn rank(collection: Collection) -> Option<usize> {
    COLLECTIONS.iter().position(|known| *known == collection)
}

/// The version of a state of an object: equal for equal JSON.
pub fn fingerprint(json: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(json)
}

/// Compresses what is worth it (over 512 bytes), without the dictionary.
pub fn encode(json: &[u8]) -> (Encoding, Bytes) {
    if json.len() > 512
        && let Ok(small) = zstd::bulk::compress(json, 3)
        && small.len() < json.len()
    {
        // Without the room that compressing took: many of these are held.
        return (Encoding::Zstd, small.into_boxed_slice().into());
    }
    (Encoding::Raw, Bytes::copy_from_slice(json))
}

/// How large it becomes by [`decode`] at most; `None` if that cannot be told.
fn decoded_size(encoding: Encoding, payload: &[u8]) -> Option<usize> {
    match encoding {
        Encoding::Raw => Some(payload.len()),
        Encoding::Zstd | Encoding::ZstdDictionary => zstd::bulk::Decompressor::upper_bound(payload),
    }
}

/// Undoes what either side makes of JSON, refusing more than [`MAX_OBJECT`] bytes.
pub fn decode(encoding: Encoding, payload: &[u8]) -> Result<Vec<u8>, DecodeError> {
    decode_within(MAX_OBJECT, encoding, payload)
}

/// As [`decode`], refusing more than `most` bytes: what is compressed need not say how large it becomes.
fn decode_within(most: usize, encoding: Encoding, payload: &[u8]) -> Result<Vec<u8>, DecodeError> {
    match encoding {
        Encoding::Raw if payload.len() > most => Err(DecodeError::TooLarge(most)),
        Encoding::Raw => Ok(payload.to_vec()),
        Encoding::Zstd => zstd::bulk::decompress(payload, most).map_err(DecodeError::Zstd),
        Encoding::ZstdDictionary => dictionary::decompress(payload, most).map_err(DecodeError::Zstd),
    }
}

/// Why a payload cannot be decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// More bytes than may be.
    #[error("object of more than {0} bytes")]
    TooLarge(usize),
    /// Not zstd, or more bytes when decompressed than may be.
    #[error("damaged or oversized compressed object")]
    Zstd(#[source] std::io::Error),
}
