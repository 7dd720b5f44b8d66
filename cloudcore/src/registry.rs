//! Which node has which session, and who may end it.
//!
//! A node has at most one session; a newer one evicts the older. Epochs of one node only rise: each is greater than any that this
//! registry gave to that node, than what the edge says it has seen, and not behind the wall clock. No other replica gives the same: the
//! lowest bits are this process's own, by chance. The end of a session removes that session and no other. Of two boxes with one identity, a
//! clone or a data directory that was copied, the one that came last stays for as long as it is connected: else they would end each other's
//! sessions for ever. Of those at another replica the Node tells, before anybody comes here ([`crate::backend::Agents`]).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use skerry_proto::streams::Streams;
use tokio::sync::oneshot;

use crate::backend::{Agents, NodeIdentity};

/// Epochs of one process are so far apart, in milliseconds.
const STEP: u64 = 1 << 10;
/// How far an epoch may be ahead of the clock, in milliseconds: a century. Epochs are begun by the clock and rise by a step where that is
/// behind, so only a clock that was far off once, or somebody who writes what he likes, makes one that is further ahead. Edges that come
/// back again and again wait longer than a step, so what may be now may always be followed by another.
const MOST_AHEAD: u64 = 100 * 365 * 24 * 60 * 60 * 1000;

/// Why a session has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eviction {
    /// A newer session of the same node.
    Superseded,
    /// The apiserver said for certain that the Node is gone.
    NodeDeleted,
}

/// Why a session cannot begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BeginError {
    /// As many as there may be.
    #[error("this cloudcore serves as many nodes as it may")]
    Full,
    /// The edge says it has seen an epoch that cannot have been.
    #[error(
        "the edge says that its last session had epoch {0}, which lies more than a century ahead of cloudcore's clock; set that clock right if \
         it is wrong, else `edgecore reset` and joining again begin anew"
    )]
    Epoch(u64),
    /// The session that stands took over from this box, so that there are two of them.
    #[error(
        "another box with the identity of node {0} has taken over, such as a clone of this one or of its data directory; on the one that is \
         not to be {0} run `edgecore reset`, give it a machine id of its own (`rm /etc/machine-id && systemd-machine-id-setup`) and join it \
         under another name"
    )]
    Twin(String),
}

/// All sessions of this process; cloning shares them.
#[derive(Clone, Debug)]
pub struct Sessions {
    most: usize,
    /// What the epochs given here are beyond a multiple of [`STEP`].
    own: u64,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: HashMap<String, Node>,
    live: usize,
    /// The wall clock, which here never goes back.
    now: u64,
}

/// A node that has a session, or whose last epoch is ahead of the clock.
#[derive(Debug)]
struct Node {
    epoch: u64,
    session: Option<Session>,
}

#[derive(Debug)]
struct Session {
    uid: String,
    agents: Agents,
    evict: oneshot::Sender<Eviction>,
    /// Once it stands.
    streams: Option<Streams>,
}

/// A session's place; dropping it gives the place up.
#[derive(Debug)]
pub struct Place {
    epoch: u64,
    name: String,
    evicted: oneshot::Receiver<Eviction>,
    sessions: Sessions,
}

/// Whether a session can have had this epoch. `now` is Unix milliseconds.
pub(crate) fn is_possible(epoch: u64, now: u64) -> bool {
    epoch <= now.saturating_add(MOST_AHEAD)
}

impl Sessions {
    /// At most so many.
    pub fn new(most: usize) -> Self {
        Self { most, own: rand::random_range(0..STEP), inner: Arc::default() }
    }

    /// Begins a session and evicts the node's older one. `who` stands for one start of the agent on one box; `now` is Unix milliseconds.
    pub fn begin(&self, node: &NodeIdentity, who: u64, last_epoch: u64, now: u64) -> Result<Place, BeginError> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        inner.now = inner.now.max(now);
        if !is_possible(last_epoch, inner.now) {
            return Err(BeginError::Epoch(last_epoch));
        }
        let held = inner.nodes.get(&node.name);
        let standing = held.and_then(|held| held.session.as_ref());
        if standing.is_none() && inner.live >= self.most {
            return Err(BeginError::Full);
        }
        let agents = standing.map(|standing| standing.agents).unwrap_or_default();
        if agents.have_ousted(who) {
            return Err(BeginError::Twin(node.name.clone()));
        }
        let least = inner.now.max(last_epoch + 1).max(held.map_or(0, |held| held.epoch + 1));
        let epoch = least + (self.own + STEP - least % STEP) % STEP;
        let (evict, evicted) = oneshot::channel();
        let session = Session { uid: node.uid.clone(), agents: agents.followed_by(who), evict, streams: None };
        let older = inner.nodes.insert(node.name.clone(), Node { epoch, session: Some(session) });
        match older.and_then(|older| older.session) {
            // It may have ended by itself just now.
            Some(older) => {
                let _ = older.evict.send(Eviction::Superseded);
            }
            None => inner.live += 1,
        }
        // Epochs of nodes that are gone are remembered for as long as the clock has not passed them, and no more of them than of
        // sessions: only a clock that was set back far, or an edge that lies, makes any.
        if inner.nodes.len() > 2 * self.most {
            inner.nodes.retain(|_, node| node.session.is_some());
        }
        Ok(Place { epoch, name: node.name.clone(), evicted, sessions: self.clone() })
    }

    /// Ends the session of a Node that was deleted; another Node of that name is left alone.
    pub fn node_deleted(&self, node: &NodeIdentity) {
        let mut inner = self.lock();
        let Some(held) = inner.nodes.get_mut(&node.name) else { return };
        if let Some(session) = held.session.take_if(|session| session.uid == node.uid) {
            let _ = session.evict.send(Eviction::NodeDeleted);
            inner.live -= 1;
        }
    }

    /// What opens streams on a node's session, if that stands.
    pub fn streams(&self, name: &str) -> Option<Streams> {
        self.lock().nodes.get(name)?.session.as_ref()?.streams.clone()
    }

    /// The streams of every session that stands.
    pub(crate) fn all_streams(&self) -> Vec<Streams> {
        let inner = self.lock();
        let sessions = inner.nodes.values().filter_map(|node| node.session.as_ref());
        sessions.filter_map(|session| session.streams.clone()).collect()
    }

    /// The nodes that have a session.
    pub fn nodes(&self) -> Vec<NodeIdentity> {
        let inner = self.lock();
        let live = inner.nodes.iter().filter_map(|(name, node)| Some((name, node.session.as_ref()?)));
        live.map(|(name, session)| NodeIdentity { name: name.clone(), uid: session.uid.clone() }).collect()
    }

    /// Whether a node of this name has a session here.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.lock().nodes.get(name).is_some_and(|node| node.session.is_some())
    }

    /// Whether this process gives such epochs.
    pub(crate) fn is_own(&self, epoch: u64) -> bool {
        epoch % STEP == self.own
    }

    fn end(&self, name: &str, epoch: u64) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let Some(held) = inner.nodes.get_mut(name).filter(|held| held.epoch == epoch) else { return };
        if held.session.take().is_some() {
            inner.live -= 1;
        }
        if epoch < inner.now {
            inner.nodes.remove(name);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// The session's epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The session stands: streams can be opened on it.
    pub fn offer(&self, streams: Streams) {
        let mut inner = self.sessions.lock();
        let held = inner.nodes.get_mut(&self.name).filter(|held| held.epoch == self.epoch);
        if let Some(session) = held.and_then(|held| held.session.as_mut()) {
            session.streams = Some(streams);
        }
    }

    /// Waits until the session has to end. Cancel safe; not to be asked again after it answered.
    pub async fn evicted(&mut self) -> Eviction {
        match (&mut self.evicted).await {
            Ok(eviction) => eviction,
            // The registry lets a sender go only by sending, or when a newer session's insertion races with this one's end.
            Err(_) => Eviction::Superseded,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.sessions.end(&self.name, self.epoch);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WHO: u64 = 1;

    fn node(name: &str, uid: &str) -> NodeIdentity {
        NodeIdentity { name: name.to_owned(), uid: uid.to_owned() }
    }

    fn sessions(most: usize) -> Sessions {
        Sessions { own: 7, ..Sessions::new(most) }
    }

    fn eviction(place: &mut Place) -> Option<Eviction> {
        place.evicted.try_recv().ok()
    }

    #[test]
    fn a_newer_session_evicts_and_the_older_ones_end_changes_nothing() {
        let sessions = sessions(10);
        let a = node("a", "1");
        let mut first = sessions.begin(&a, WHO, 0, 1000).unwrap();
        let mut second = sessions.begin(&a, WHO, 0, 1000).unwrap();
        assert_eq!((first.epoch(), second.epoch()), (1031, 2055));
        assert_eq!(eviction(&mut first), Some(Eviction::Superseded));
        drop(first);
        assert_eq!(sessions.nodes(), std::slice::from_ref(&a));
        sessions.node_deleted(&node("a", "2"));
        assert_eq!(eviction(&mut second), None, "another Node was deleted");
        sessions.node_deleted(&a);
        assert_eq!(eviction(&mut second), Some(Eviction::NodeDeleted));
        assert!(sessions.nodes().is_empty());
        drop(second);
        assert_eq!(sessions.begin(&a, WHO, 0, 1000).unwrap().epoch(), 3079);
    }

    #[test]
    fn of_two_boxes_with_one_identity_the_later_one_stays() {
        let sessions = sessions(10);
        let a = node("a", "1");
        let begin = |who| sessions.begin(&a, who, 0, 1000);
        let mut first = begin(1).unwrap();
        let second = begin(2).unwrap();
        assert_eq!(eviction(&mut first), Some(Eviction::Superseded), "a box that started anew, for all that is known");
        assert_eq!(begin(1).unwrap_err(), BeginError::Twin("a".to_owned()));
        let again = begin(2).unwrap();
        drop((first, second));
        assert!(begin(1).is_err(), "it comes again and again, and so does the other");
        drop(again);
        let first = begin(1).unwrap();
        let second = begin(2).unwrap();
        assert!(begin(1).is_err(), "they have taken turns");
        let third = begin(3).unwrap();
        assert!(begin(1).is_err() && begin(2).is_err(), "three do not take turns either");
        // Starting anew is nobody's return.
        let restarts: Vec<_> = (4..7).map(|who| begin(who).unwrap()).collect();
        drop((first, second, third, restarts));
    }

    #[test]
    fn epochs_follow_edge_and_clock() {
        let sessions = sessions(10);
        let a = node("a", "1");
        assert_eq!(sessions.begin(&a, WHO, 5126, 1000).unwrap().epoch(), 5127);
        assert_eq!(sessions.begin(&a, WHO, 0, 1000).unwrap().epoch(), 6151, "an edge that forgot");
        assert_eq!(sessions.begin(&a, WHO, 0, 9000).unwrap().epoch(), 9223);
        assert_eq!(sessions.begin(&node("b", "2"), WHO, 0, 100).unwrap().epoch(), 9223, "a clock that was set back");
        for far in [9001 + MOST_AHEAD, 1 << 62, u64::MAX] {
            assert_eq!(sessions.begin(&a, WHO, far, 9000).unwrap_err(), BeginError::Epoch(far));
        }
        let most = sessions.begin(&a, WHO, 9000 + MOST_AHEAD, 9000).unwrap().epoch();
        assert_eq!(
            sessions.begin(&a, WHO, most, 9000 + STEP).unwrap().epoch(),
            most + STEP,
            "nobody is barred by where the bound is"
        );
    }

    #[test]
    fn there_are_no_more_than_there_may_be() {
        let sessions = sessions(2);
        let (a, b) = (sessions.begin(&node("a", "1"), WHO, 0, 1), sessions.begin(&node("b", "1"), WHO, 0, 1));
        assert_eq!(sessions.begin(&node("c", "1"), WHO, 0, 1).unwrap_err(), BeginError::Full);
        let again = sessions.begin(&node("b", "1"), WHO, 0, 1).unwrap();
        drop((a, b));
        assert_eq!(sessions.nodes(), [node("b", "1")]);
        assert!(sessions.begin(&node("c", "1"), WHO, 0, 1).is_ok());
        drop(again);
    }

    proptest! {
        #[test]
        fn one_session_a_node_whatever_the_order(steps in proptest::collection::vec((0u8..3, 0usize..4, 0u64..50, 0u64..50), 1..80)) {
            let sessions = sessions(3);
            let mut places: Vec<(String, Place)> = Vec::new();
            let mut highest: HashMap<String, u64> = HashMap::new();
            for (step, which, last, now) in steps {
                let (last, now) = (last * STEP / 2, now * STEP / 2);
                let name = ["a", "b", "c", "d"][which];
                match step {
                    0 | 1 => if let Ok(place) = sessions.begin(&node(name, "1"), WHO, last, now) {
                        let before = highest.insert(name.to_owned(), place.epoch());
                        prop_assert!(before.is_none_or(|before| before < place.epoch()));
                        prop_assert!(place.epoch() > last && place.epoch() >= now);
                        places.push((name.to_owned(), place));
                    },
                    _ => if !places.is_empty() {
                        drop(places.swap_remove(which % places.len()));
                    },
                }
                let mut standing: Vec<String> = Vec::new();
                for (name, place) in &mut places {
                    if place.epoch() == highest[name] {
                        prop_assert_eq!(eviction(place), None);
                        standing.push(name.clone());
                    }
                }
                standing.sort();
                let mut told: Vec<String> = sessions.nodes().into_iter().map(|node| node.name).collect();
                told.sort();
                prop_assert_eq!(&told, &standing);
                prop_assert_eq!(sessions.lock().live, standing.len());
            }
        }
    }
}
