//! How far each watch has come, by the apiserver's revisions: what a session says of them to its hub, see
//! [`HubInput::Newest`](skerry_proto::sync::HubInput::Newest) and [`HubInput::Reached`](skerry_proto::sync::HubInput::Reached).

use std::sync::Arc;

use skerry_proto::sync::Collection;
use skerry_proto::wire::Revision;
use tokio::sync::Notify;

use super::{Closures, DEVICE_SOURCES, SOURCES, Session, Source};
use crate::backend::FeedEvent;

/// Every source, in the order of its number.
const ALL: [Source; SOURCES] = [
    Source::Nodes,
    Source::Pods,
    Source::Services,
    Source::RuntimeClasses,
    Source::ConfigMaps,
    Source::Secrets,
    Source::Devices,
    Source::DeviceModels,
];

/// A revision for each source; 0: none is known.
type Revisions = [u64; SOURCES];

/// What the watches told.
#[derive(Debug, Default)]
pub(super) struct Marks {
    /// Nothing that is known is newer.
    newest: Revisions,
    /// Every change up to here has been taken in.
    reached: Revisions,
    /// What edges have seen beyond that.
    wanted: Revisions,
    hurry: [Arc<Notify>; SOURCES],
    /// The apiserver had come to here, whatever it was that changed.
    revision: u64,
    /// Questions under way whether something that a list did not show is really gone.
    confirming: usize,
}

/// What a session has said of them.
#[derive(Debug, Default)]
pub(super) struct Said {
    newest: Revisions,
    /// What its edge has seen, until that was reached.
    least: Option<Revisions>,
}

impl Marks {
    fn shows(&mut self, source: Source, revision: u64) {
        let newest = &mut self.newest[source as usize];
        *newest = revision.max(*newest);
        self.now_at(revision);
    }

    fn now_at(&mut self, revision: u64) {
        self.revision = self.revision.max(revision);
    }
}

impl Source {
    fn collection(self) -> Collection {
        match self {
            Self::Nodes => Collection::Node,
            Self::Pods => Collection::Pods,
            Self::Services => Collection::Services,
            Self::RuntimeClasses => Collection::RuntimeClasses,
            Self::ConfigMaps => Collection::ConfigMaps,
            Self::Secrets => Collection::Secrets,
            Self::Devices => Collection::Devices,
            Self::DeviceModels => Collection::DeviceModels,
        }
    }
}

impl Closures {
    /// An object of this revision is about to be taken in. One that is not a number says nothing.
    pub(crate) fn shows(&mut self, source: Source, revision: &str) {
        if let Ok(revision) = revision.parse() {
            self.marks.shows(source, revision);
        }
    }

    /// All changes of a source up to this revision have been taken in. Answers whether revisions go up, as they always do unless the
    /// apiserver was restored from a backup.
    pub(crate) fn reached(&mut self, source: Source, revision: &str) -> bool {
        let Ok(revision) = revision.parse() else { return true };
        self.marks.shows(source, revision);
        let wanted = self.marks.wanted[source as usize];
        let reached = &mut self.marks.reached[source as usize];
        let before = std::mem::replace(reached, revision.max(*reached));
        // Beyond what any edge has seen nobody waits for more: every event comes by here, and thousands of sessions may be behind.
        if before < wanted && before < revision {
            self.subscribers.wake_behind();
        }
        revision >= before
    }

    /// Whether all changes of a source up to this revision have been taken in.
    pub(crate) fn has_reached(&self, source: Source, revision: &str) -> bool {
        revision.parse().is_ok_and(|revision| self.marks.reached[source as usize] >= revision)
    }

    /// Until [`Closures::confirmed`], what is known may show something that is gone.
    pub(crate) fn confirming(&mut self) {
        self.marks.confirming += 1;
    }

    /// Ends it.
    pub(crate) fn confirmed(&mut self) {
        self.marks.confirming -= 1;
        self.subscribers.wake_behind();
    }

    /// The newest revision that is known of.
    pub(crate) fn revision(&self) -> u64 {
        self.marks.revision
    }

    /// The apiserver has come to this revision.
    pub(crate) fn now_at(&mut self, revision: u64) {
        self.marks.now_at(revision);
    }

    /// Notified when some edge has seen more of a source than its watch has come to.
    pub(crate) fn hurry(&self, source: Source) -> Arc<Notify> {
        self.marks.hurry[source as usize].clone()
    }

    /// Whether that is so still.
    pub(crate) fn lacks(&self, source: Source) -> bool {
        self.marks.wanted[source as usize] > self.marks.reached[source as usize]
    }

    /// A session's edge has seen this already, at whatever replica.
    pub(crate) fn expect(&mut self, session: &mut Session, seen: &[Revision]) {
        let mut least = Revisions::default();
        for (source, least) in ALL.into_iter().zip(&mut least) {
            let of = |revision: &&Revision| revision.collection() == source.collection();
            *least = seen.iter().find(of).map_or(0, |revision| revision.newest);
        }
        for (number, least) in least.iter().enumerate() {
            if *least > self.marks.reached[number] {
                self.marks.wanted[number] = self.marks.wanted[number].max(*least);
                self.marks.hurry[number].notify_one();
            }
        }
        let is_behind = least != Revisions::default();
        session.said.least = is_behind.then_some(least);
        self.subscribers.set_behind(session, is_behind);
    }

    /// What a session has to say of them before `events`, and behind.
    pub(super) fn say(&mut self, session: &mut Session, events: &mut Vec<FeedEvent>) {
        let is_settled = self.is_settled(session);
        let mut before = Vec::new();
        if !events.is_empty() {
            for (source, said) in ALL.into_iter().zip(&mut session.said.newest) {
                let newest = self.marks.newest[source as usize];
                if newest > *said {
                    *said = newest;
                    before.push(FeedEvent::Newest(source.collection(), newest));
                }
            }
        }
        events.splice(0..0, before);
        if let Some(least) = session.said.least
            && is_settled
            && ALL.into_iter().all(|source| self.counts_as_reached(source, &least) >= least[source as usize])
        {
            session.said.least = None;
            self.subscribers.set_behind(session, false);
            let marks = ALL.into_iter().map(|source| (source, self.counts_as_reached(source, &least)));
            let marks = marks.filter(|(_, reached)| *reached > 0);
            events.extend(marks.map(|(source, reached)| FeedEvent::Reached(source.collection(), reached)));
        }
    }

    /// How far a source has come. Where devices are not served their collections are not complete, so that nothing is sent or taken away by
    /// what is not known: then the others need not wait for them.
    fn counts_as_reached(&self, source: Source, least: &Revisions) -> u64 {
        let reached = self.marks.reached[source as usize];
        let is_absent = DEVICE_SOURCES.contains(&source) && !self.is_ready(source) && self.devices.is_unserved();
        if is_absent { reached.max(least[source as usize]) } else { reached }
    }

    /// Whether all that the watches told shows in what this session said.
    fn is_settled(&self, session: &Session) -> bool {
        let known = self.nodes.get(session.node.name.as_str());
        self.marks.confirming == 0
            && session.begun
            && session.held_back.is_empty()
            && self.devices.all_here(&session.node.name)
            && known.is_some_and(|known| {
                self.services_known(known) && known.references.keys().all(|reference| !self.is_being_fetched(reference))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_has_its_number_and_collection() {
        for (number, source) in ALL.into_iter().enumerate() {
            assert_eq!(source as usize, number);
            assert!(skerry_proto::sync::COLLECTIONS.contains(&source.collection()));
        }
    }
}
