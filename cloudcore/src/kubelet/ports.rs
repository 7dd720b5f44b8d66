//! Which node has which port, and the sockets that listen on them.
//!
//! A node has a port while this cloudcore answers for it: as long as it has a session here, and after that until its Node is deleted or
//! shows that another replica took it over. One that is nowhere (its Node is shown as unknown) and shows an address that is not this
//! cloudcore's, which may be long gone, is answered for here as well, so that whoever asks for it is told at once. The port is the one that
//! the Node shows already, if that can be had: so it stays what it is through reconnects and restarts, and nothing is kept but what the
//! Node itself says. Replicas may share an address, and then a Node's port tells which has it: one without a session leaves the node to
//! whoever wrote another port, and one with a session writes its own while the Node names that session, so that two never overwrite each
//! other for long.
//!
//! Binding a socket does not wait for anything, so it is done under the lock: whoever asks finds the port of a node that has one.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::DynamicObject;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::table::{Inner, Node};
use crate::backend::NodeIdentity;
use crate::closure::version_less;
use crate::config::PortRange;
use crate::nodes;

mod table;
#[cfg(test)]
mod tests;

/// All of them; asked by sessions, watches, listeners and whoever writes them into Nodes.
#[derive(Debug)]
pub struct Ports {
    address: Address,
    bind: IpAddr,
    /// How many may be listened on.
    most: usize,
    inner: Mutex<Inner>,
    opened: Notify,
    unpublished: Notify,
}

/// What a Node shows as its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    /// `InternalIP` or `InternalDNS`.
    pub(crate) kind: &'static str,
    /// The address.
    pub(crate) host: String,
}

/// What a Node shows of its kubelet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shown {
    /// Its only address, if it has one alone: type and address.
    address: Option<(String, String)>,
    port: u16,
    /// Since when it is shown as unknown.
    unknown_since: Option<Timestamp>,
    /// The epoch of the session that it names, or 0.
    epoch: u64,
    version: String,
}

/// A port of one node.
#[derive(Debug)]
pub(crate) struct Door {
    /// Whose it is, and nobody else's.
    pub(crate) node: NodeIdentity,
    /// Its number.
    pub(crate) port: u16,
    /// Cancelled when the node has it no more.
    pub(crate) closed: CancellationToken,
}

impl Address {
    /// An IP address, or else a name.
    pub(crate) fn of(host: &str) -> Self {
        let kind = if host.parse::<IpAddr>().is_ok() { "InternalIP" } else { "InternalDNS" };
        Self { kind, host: host.to_owned() }
    }
}

impl Shown {
    /// Reads it off a Node.
    pub(crate) fn of(node: &DynamicObject) -> Self {
        let status = &node.data["status"];
        let address = match status["addresses"].as_array().map(Vec::as_slice) {
            Some([only]) => {
                Some((only["type"].as_str().unwrap_or_default(), only["address"].as_str().unwrap_or_default()))
            }
            _ => None,
        };
        let port = status["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64();
        let conditions = status["conditions"].as_array().into_iter().flatten();
        let mut unknown =
            conditions.filter(|condition| condition["type"] == "Ready" && condition["status"] == "Unknown");
        Self {
            address: address.map(|(kind, host)| (kind.to_owned(), host.to_owned())),
            port: port.and_then(|port| u16::try_from(port).ok()).unwrap_or_default(),
            unknown_since: unknown.next().and_then(|ready| ready["lastTransitionTime"].as_str()?.parse().ok()),
            epoch: nodes::epoch_of(node).unwrap_or_default(),
            version: node.resource_version().unwrap_or_default(),
        }
    }

    fn is_at(&self, address: &Address) -> bool {
        self.address.as_ref().is_some_and(|(kind, host)| kind == address.kind && *host == address.host)
    }
}

impl Ports {
    /// None yet, and never more than `most`, for each is an open file. `host` is what Nodes show; it is listened on where it is an address of
    /// this machine, else on all addresses.
    pub fn new(host: &str, range: PortRange, most: usize) -> Self {
        let local = host.parse().ok().filter(|ip| TcpListener::bind((*ip, 0)).is_ok());
        let any = if TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok() {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        } else {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        };
        let inner = Inner {
            range,
            listed: false,
            nodes: HashMap::new(),
            taken: HashSet::new(),
            closing: HashMap::new(),
            shown: HashMap::new(),
            occupied: HashSet::new(),
            free_from: range.first,
            in_trouble: false,
            opened: VecDeque::new(),
            unpublished: VecDeque::new(),
        };
        Self {
            address: Address::of(host),
            bind: local.unwrap_or(any),
            most,
            inner: Mutex::new(inner),
            opened: Notify::new(),
            unpublished: Notify::new(),
        }
    }

    /// What Nodes show.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// A Node was written, and this is the answer: the watch may have shown another one of its name meanwhile.
    pub(crate) fn written(&self, node: &NodeIdentity, shown: &Shown) {
        let inner = self.lock();
        if inner.nodes.get(&node.name).is_some_and(|held| held.uid == node.uid) {
            self.see(inner, node, shown);
        }
    }

    /// A Node is there, and shows this.
    pub(crate) fn seen(&self, node: &NodeIdentity, shown: &Shown) {
        self.see(self.lock(), node, shown);
    }

    fn see(&self, mut inner: MutexGuard<'_, Inner>, node: &NodeIdentity, shown: &Shown) {
        inner.replace_other(node);
        let port = if inner.range.contains(shown.port) { shown.port } else { 0 };
        let held = inner.nodes.entry(node.name.clone()).or_insert_with(|| Node::new(&node.uid));
        if version_less(&shown.version, &held.version) {
            // Of an answer and the watch either may come first.
            return;
        }
        let showed_door = held.shows_door();
        let before = std::mem::replace(&mut held.shown_port, port);
        held.shows_us = shown.is_at(&self.address);
        held.shown_since = shown.unknown_since;
        held.named = shown.epoch;
        held.version.clone_from(&shown.version);
        if held.shows_us || shown.unknown_since.is_none() {
            held.adopting = false;
        } else if !std::mem::replace(&mut held.was_adopted, true) {
            held.adopting = true;
        }
        let is_taken_over = !held.is_here() && showed_door && !held.shows_door();
        held.was_adopted |= is_taken_over && held.shows_us;
        inner.shows(before, port);
        if is_taken_over {
            inner.close(&node.name);
        }
        if inner.listed {
            self.settle(&mut inner, &node.name);
        }
    }

    /// Every Node has been seen. Of several that show one port, the first by name keeps it.
    pub(crate) fn listed(&self) {
        let mut inner = self.lock();
        if std::mem::replace(&mut inner.listed, true) {
            return;
        }
        let names: BTreeSet<String> = inner.nodes.keys().cloned().collect();
        for name in names {
            self.settle(&mut inner, &name);
        }
    }

    /// The Node is gone, and its port with it.
    pub(crate) fn gone(&self, node: &NodeIdentity) {
        let mut inner = self.lock();
        if inner.nodes.get(&node.name).is_some_and(|held| held.uid == node.uid) {
            inner.remove(&node.name);
        }
    }

    /// A session of the node began here. One that `claims` is to be [`claimed`](Self::claimed) before the Node is told.
    pub(crate) fn connected(&self, node: &NodeIdentity, epoch: u64, claims: bool) {
        let mut inner = self.lock();
        inner.replace_other(node);
        let held = inner.nodes.entry(node.name.clone()).or_insert_with(|| Node::new(&node.uid));
        if held.session <= Some(epoch) {
            held.session = Some(epoch);
            held.claiming = claims;
        }
        held.was_adopted = false;
        self.settle(&mut inner, &node.name);
    }

    /// The Node names the session: no other replica has it.
    pub(crate) fn claimed(&self, node: &NodeIdentity, epoch: u64) {
        let mut inner = self.lock();
        let held = inner.nodes.get_mut(&node.name).filter(|held| held.uid == node.uid);
        let Some(held) = held.filter(|held| held.session == Some(epoch)) else { return };
        held.claiming = false;
        self.settle(&mut inner, &node.name);
    }

    /// A session of the node ended; if it was the newest, the node is away since `now`.
    pub(crate) fn disconnected(&self, node: &NodeIdentity, epoch: u64, now: Timestamp) {
        let mut inner = self.lock();
        let Some(held) = inner.nodes.get_mut(&node.name).filter(|held| held.uid == node.uid) else { return };
        if held.session == Some(epoch) {
            held.session = None;
            held.claiming = false;
            held.ended = Some(now);
            if !held.shows_door() {
                inner.close(&node.name);
            }
            self.settle(&mut inner, &node.name);
        }
    }

    /// Since when a node has had no session, as far as is known.
    pub(crate) fn away_since(&self, name: &str) -> Option<Timestamp> {
        let inner = self.lock();
        let held = inner.nodes.get(name).filter(|held| held.session.is_none())?;
        held.ended.or(held.shown_since)
    }

    /// Nobody listens on a port any more that came out of [`Ports::opened`].
    pub(crate) fn released(&self, port: u16) {
        let mut inner = self.lock();
        if let Some(name) = inner.released(port) {
            self.settle(&mut inner, &name);
        }
    }

    /// Waits for a port that is to be listened on, until it is given back. Cancel safe.
    pub(crate) async fn opened(&self) -> (Arc<Door>, TcpListener) {
        loop {
            if let Some(opened) = self.lock().opened.pop_front() {
                return opened;
            }
            self.opened.notified().await;
        }
    }

    /// Waits for a node whose Node does not show what it should. Cancel safe.
    pub(crate) async fn unpublished(&self) -> String {
        loop {
            if let Some(name) = self.lock().next_unpublished() {
                return name;
            }
            self.unpublished.notified().await;
        }
    }

    /// What a Node should show, if that is not what it shows.
    pub(crate) fn wanted(&self, name: &str) -> Option<Arc<Door>> {
        let inner = self.lock();
        let held = inner.nodes.get(name)?;
        held.unpublished().cloned()
    }

    fn settle(&self, inner: &mut Inner, name: &str) {
        let Some(held) = inner.nodes.get(name) else { return };
        if !held.is_here() && !held.shows_us && !held.adopting {
            return inner.close(name);
        }
        if held.door.is_none() && inner.listed {
            inner.open(name, self.bind, self.most);
            self.opened.notify_one();
        }
        if inner.publish(name) {
            self.unpublished.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
