//! What sessions need of the rest of cloudcore.
//!
//! A session owns one [`Feed`]: what its node should hold comes out of it, what the node reports goes into it. Neither side of this
//! contract knows the other's IO: sessions never see the apiserver, feeds never see a socket.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use skerry_proto::sync::{Collection, Entry, Object, Report, ReportKind};
use skerry_proto::wire::Revision;

/// Identity of a registered node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeIdentity {
    /// The Node's name.
    pub name: String,
    /// The Node object's UID: a node deleted and joined again is another one.
    pub uid: String,
}

/// Starts of agents that a Node tells of, each a number; 0: none. An agent that starts anew is never again who it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agents {
    /// Whose the newest session is.
    pub who: u64,
    /// Whose sessions were taken over by somebody else, the last one first. Of more than two boxes with one identity each is to be known.
    pub ousted: [u64; 4],
}

impl Agents {
    /// These, after a session of `who` has begun.
    pub(crate) fn followed_by(self, who: u64) -> Self {
        if self.who == who || self.who == 0 {
            return Self { who, ..self };
        }
        let mut ousted = [0; 4];
        let all = std::iter::once(self.who).chain(self.ousted).filter(|&one| one != who && one != 0);
        ousted.iter_mut().zip(all).for_each(|(slot, one)| *slot = one);
        Self { who, ousted }
    }

    /// Whether `who` was here before and comes back, though somebody else has the node: there are two of them.
    pub(crate) fn have_ousted(self, who: u64) -> bool {
        self.ousted.contains(&who) && self.who != who && who != 0
    }
}

/// What the apiserver says about an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeCheck {
    /// The Node exists under this UID.
    Live {
        /// The highest epoch that a session of it is known to have had, at whatever replica; 0 if none is.
        epoch: u64,
        /// Whose sessions they were.
        agents: Agents,
    },
    /// There is no Node of this name.
    Deleted,
    /// The name belongs to another Node by now.
    OtherUid,
}

/// One thing a session must tell its hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FeedEvent {
    /// What is said from now on may show changes of this collection up to this revision of the apiserver's.
    Newest(Collection, u64),
    /// Every change of this collection up to this revision shows in what was said.
    Reached(Collection, u64),
    /// The edge should hold this object.
    Desired(Arc<Object>),
    /// The edge should hold this version, which it said it holds; there is no payload.
    Keep(Collection, Entry),
    /// The edge should no longer hold the object of this UID.
    Gone(Collection, String),
    /// Everything the edge should hold of this collection has been said.
    Complete(Collection),
    /// Ask the edge for its inventory of this collection, whatever its digest says, and pass it to [`Feed::inventory`].
    Ask(Collection),
    /// The apiserver does not show what the edge reports of the pod or Node of this UID: have it report once more.
    ReportWanted(ReportKind, String),
    /// Another replica has a newer session of this node: this one is over.
    Superseded,
    /// A report given to [`Feed::report`] cannot be taken for now: the edge is to send the newest about the same after this long.
    ReportLater {
        /// The report's id.
        id: u64,
        /// How long.
        after: Duration,
    },
    /// A report given to [`Feed::report`] came to its end.
    Reported {
        /// The report's id.
        id: u64,
        /// Why it was refused for good; empty: the apiserver has taken it.
        refused: String,
    },
}

/// The part of cloudcore that talks to the apiserver.
pub trait Backend: Send + Sync + 'static {
    /// What a session gets.
    type Feed: Feed;

    /// Creates the Node, or takes it over for the same machine unless that is `connected`. The name can be a Node's; labels a node may not
    /// set are left out.
    fn register(
        &self,
        name: &str,
        machine_id: &str,
        labels: &BTreeMap<String, String>,
        connected: bool,
    ) -> impl Future<Output = Result<NodeIdentity, RegisterError>> + Send;

    /// The epoch on the lease of a Node of this name, while that lasts: of a session here or at another replica.
    fn leased(&self, name: &str) -> impl Future<Output = Result<Option<u64>, BackendError>> + Send;

    /// Whether this identity still stands.
    fn check(&self, node: &NodeIdentity) -> impl Future<Output = Result<NodeCheck, BackendError>> + Send;

    /// The apiserver's revision, which is asked for only if it is not known to be at least this.
    fn revision(&self, at_least: u64) -> impl Future<Output = Result<u64, BackendError>> + Send;

    /// Begins a session: its lease is renewed until the feed is dropped. `last_epoch` is that of the session the edge had before, here or
    /// elsewhere, 0 if it remembers none; `who` stands for one start of the agent on one box; `seen` is what the edge knows of, so that the
    /// feed tells when it has come as far. Called from within a tokio runtime.
    fn open(&self, node: &NodeIdentity, epoch: u64, last_epoch: u64, who: u64, seen: &[Revision]) -> Self::Feed;

    /// Nodes whose object was deleted.
    fn deletions(&self) -> tokio::sync::broadcast::Receiver<NodeIdentity>;

    /// Whether every cache has been filled once.
    fn ready(&self) -> bool;
}

/// One session's view. Dropping it ends the session: its lease is no longer renewed, unless a newer epoch took over.
pub trait Feed: Send + 'static {
    /// Waits for something to say. First the whole closure, then `Complete` for each collection, then changes; coalesced by object.
    /// Ends of reports in between. Cancel safe.
    fn next(&mut self) -> impl Future<Output = Vec<FeedEvent>> + Send;

    /// What the edge said it holds.
    fn inventory(&mut self, collection: Collection, entries: Vec<Entry>);

    /// Takes a report. Its end comes out of [`Feed::next`] as a [`FeedEvent::Reported`] or a
    /// [`FeedEvent::ReportLater`], so that a session waits in one place.
    fn report(&mut self, report: Report);
}

/// Why a node was not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// Another machine joined under this name. Which one is not told: that is what proves a machine to be the same.
    #[error(
        "node {0} is another machine: pick another name with --node-name, or, if that machine is gone for good or was set up anew, run \
         `kubectl delete node {0}` first"
    )]
    NameTaken(String),
    /// A box that has joined does not ask again: this one is another of the same image, or has lost what it had.
    #[error(
        "a box that joined as {0} is connected, or was a moment ago; if it is this one, set up anew, join again in a minute, with no other \
         edgecore running here; if it is another box of the same image, give this one a machine id of its own \
         (`rm /etc/machine-id && systemd-machine-id-setup`) and a name (--node-name)"
    )]
    Connected(String),
    /// The Node exists and is none of ours.
    #[error("node {0} exists and is not an edge node: pick another name, or run `kubectl delete node {0}` first")]
    NotEdge(String),
    /// The apiserver did not answer as it should.
    #[error("cannot register the node")]
    Api(#[source] BackendError),
}

/// The apiserver could not be asked or refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub struct BackendError {
    /// What was tried.
    pub action: String,
    /// Why it failed.
    #[source]
    pub source: kube::Error,
}
