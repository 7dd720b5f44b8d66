//! What a session told its edge.

use std::sync::Arc;

use skerry_proto::sync::{Collection, Entry, Object};

/// All of it, sorted by collection and key. A vector, for there are many sessions, and most were told little.
#[derive(Debug, Default)]
pub(super) struct Told(Vec<Telling>);

/// One object.
#[derive(Debug)]
pub(super) enum Telling {
    /// To hold this, which all sessions share.
    Object(Arc<Object>),
    /// To keep what it holds.
    Keep(Collection, Box<Entry>),
}

impl Telling {
    pub(super) fn entry(&self) -> &Entry {
        match self {
            Self::Object(object) => &object.entry,
            Self::Keep(_, entry) => entry,
        }
    }

    fn id(&self) -> (Collection, &str) {
        let collection = match self {
            Self::Object(object) => object.collection,
            Self::Keep(collection, _) => *collection,
        };
        (collection, &self.entry().key)
    }
}

impl Told {
    /// What was told of everything.
    pub(super) fn ids(&self) -> impl Iterator<Item = (Collection, &str)> {
        self.0.iter().map(Telling::id)
    }

    /// Notes what is told now. Answers what was told before.
    pub(super) fn insert(&mut self, telling: Telling) -> Option<Telling> {
        match self.find(telling.id()) {
            Ok(at) => Some(std::mem::replace(&mut self.0[at], telling)),
            Err(at) => {
                self.0.insert(at, telling);
                None
            }
        }
    }

    /// Forgets an object. Answers what was told of it.
    pub(super) fn remove(&mut self, id: (Collection, &str)) -> Option<Telling> {
        self.find(id).ok().map(|at| self.0.remove(at))
    }

    fn find(&self, id: (Collection, &str)) -> Result<usize, usize> {
        self.0.binary_search_by(|telling| telling.id().cmp(&id))
    }
}
