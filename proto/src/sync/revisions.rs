//! How new what an edge holds may be, so that a replica of the cloud whose caches lag behind another's does not take any of it back.
//!
//! The apiserver numbers its changes: of two states of a collection, the one of the larger revision is the later one. The revisions
//! belong to collections, the versions of objects stay opaque. A hub says with what it sends up to which revision of each collection
//! that may show; the edge keeps this with its rows and says it in its next Hello; and a hub that has not reached all of it neither
//! sends nor deletes before it has. All collections count for each: what an edge should hold of one follows from others too (a ConfigMap
//! is wanted because of the pod that refers to it).

use super::{COLLECTIONS, rank};
use crate::wire;

/// Of each collection, by its rank; 0: nothing was said.
pub(super) type Revisions = [u64; COLLECTIONS.len()];

/// No revision at all.
const UNTOLD: u64 = u64::MAX;

/// A hub's side of it.
#[derive(Debug, Default)]
pub(super) struct Freshness {
    /// What the hub has to reach: what the edge said.
    least: Revisions,
    /// Everything up to here shows in what was said to the hub.
    reached: Revisions,
    /// Nothing beyond does.
    newest: Revisions,
    /// What the edge knows once it has applied everything sent.
    told: Revisions,
}

impl Freshness {
    pub(super) fn new(hello: &[wire::Revision]) -> Self {
        let mut least = Revisions::default();
        note(&mut least, hello);
        Self { least, told: least, ..Self::default() }
    }

    pub(super) fn newest(&mut self, order: usize, revision: u64) {
        self.newest[order] = self.newest[order].max(revision);
    }

    pub(super) fn reached(&mut self, order: usize, revision: u64) {
        self.reached[order] = self.reached[order].max(revision);
    }

    /// What the edge said counts no more, and it is told all anew.
    pub(super) fn disregard(&mut self) {
        self.least = Revisions::default();
        self.told = [UNTOLD; COLLECTIONS.len()];
    }

    pub(super) fn is_behind(&self) -> bool {
        self.reached.iter().zip(&self.least).any(|(reached, least)| reached < least)
    }

    /// What the edge has to be told before, or with, the next change.
    pub(super) fn untold(&mut self) -> Vec<wire::Revision> {
        let mut untold = Vec::new();
        for (order, collection) in COLLECTIONS.into_iter().enumerate() {
            let (told, newest) = (self.told[order], self.newest[order]);
            if newest > told || told == UNTOLD {
                self.told[order] = newest;
                untold.push(wire::Revision { collection: collection.into(), newest });
            }
        }
        untold
    }
}

/// Takes over what is said; a collection that is not known here stays out.
pub(super) fn note(revisions: &mut Revisions, said: &[wire::Revision]) {
    for revision in said {
        if let Some(order) = rank(revision.collection()) {
            revisions[order] = revision.newest;
        }
    }
}
