//! Which node has which port, and the sockets that listen on them.
//!
//! A node has a port while this cloudcore answers for it: as long as it has a session here, and after that until its Node is deleted or
//! shows that another replica took it over. One that is nowhere (its Node is shown as unknown) and shows an address that is not this
//! cloudcore's, which may be long gone, is answered for here as well, so that whoever asks for it is told at once. The port is the one that the Node shows already, if that can be had: so it stays what it is
//! through reconnects and restarts, and nothing is kept but what the Node itself says.
//!
//! Binding a socket does not wait for anything, so it is done under the lock: whoever asks finds the port of a node that has one.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::backend::NodeIdentity;
use crate::config::PortRange;

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

#[derive(Debug)]
struct Inner {
    range: PortRange,
    /// Nodes are all known; before that nobody gets a port, so that nobody gets one that another had.
    listed: bool,
    nodes: HashMap<String, Node>,
    /// Until nobody listens on them any more, which is a little longer than a node has them.
    taken: HashSet<u16>,
    /// Ports that Nodes show: how many of them show it. Whoever gets a new one gets none of these, as long as there are others.
    shown: HashMap<u16, u32>,
    /// Ports that something else on this machine listens on.
    occupied: HashSet<u16>,
    /// No port below this is free, other than those that are shown.
    free_from: u16,
    /// The last attempt to open a port failed, and that was said.
    in_trouble: bool,
    opened: VecDeque<(Arc<Door>, TcpListener)>,
    unpublished: VecDeque<String>,
}

#[derive(Debug)]
struct Node {
    uid: String,
    /// Its port in the range, or 0.
    shown_port: u16,
    /// Whether its address is this cloudcore's.
    shows_us: bool,
    shown_since: Option<Timestamp>,
    session: Option<u64>,
    /// It is nowhere, and its Node is to show this cloudcore; not seen yet that it does.
    adopting: bool,
    /// Once for each time it was here: replicas do not take what is nowhere from each other for ever.
    was_adopted: bool,
    ended: Option<Timestamp>,
    door: Option<Arc<Door>>,
    queued: bool,
}

/// The port of a node that had (or shows) one: that if it can be had, else the lowest.
fn choose(range: PortRange, had: u16, from: u16, unavailable: impl Fn(u16) -> bool) -> Option<u16> {
    if range.contains(had) && !unavailable(had) {
        return Some(had);
    }
    (from.max(range.first)..=range.last).find(|port| !unavailable(*port))
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
    pub(crate) fn of(node: &Value) -> Self {
        let status = &node["status"];
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

    /// A Node is there, and shows this.
    pub(crate) fn seen(&self, node: &NodeIdentity, shown: &Shown) {
        let mut inner = self.lock();
        inner.replace_other(node);
        let port = if inner.range.contains(shown.port) { shown.port } else { 0 };
        let held = inner.nodes.entry(node.name.clone()).or_insert_with(|| Node::new(&node.uid));
        let before = std::mem::replace(&mut held.shown_port, port);
        held.shows_us = shown.is_at(&self.address);
        held.shown_since = shown.unknown_since;
        if held.shows_us || shown.unknown_since.is_none() {
            held.adopting = false;
        } else if !std::mem::replace(&mut held.was_adopted, true) {
            held.adopting = true;
        }
        inner.shows(before, port);
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

    /// A session of the node began here.
    pub(crate) fn connected(&self, node: &NodeIdentity, epoch: u64) {
        let mut inner = self.lock();
        inner.replace_other(node);
        let held = inner.nodes.entry(node.name.clone()).or_insert_with(|| Node::new(&node.uid));
        held.session = held.session.max(Some(epoch));
        held.was_adopted = false;
        self.settle(&mut inner, &node.name);
    }

    /// A session of the node ended; if it was the newest, the node is away since `now`.
    pub(crate) fn disconnected(&self, node: &NodeIdentity, epoch: u64, now: Timestamp) {
        let mut inner = self.lock();
        let Some(held) = inner.nodes.get_mut(&node.name).filter(|held| held.uid == node.uid) else { return };
        if held.session == Some(epoch) {
            held.session = None;
            held.ended = Some(now);
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
        self.lock().released(port);
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
        let door = held.door.as_ref()?;
        (!held.shows_us || held.shown_port != door.port).then(|| Arc::clone(door))
    }

    fn settle(&self, inner: &mut Inner, name: &str) {
        let Some(held) = inner.nodes.get(name) else { return };
        if held.session.is_none() && !held.shows_us && !held.adopting {
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

impl Inner {
    /// Another Node of the name is there: the one before is gone.
    fn replace_other(&mut self, node: &NodeIdentity) {
        if self.nodes.get(&node.name).is_some_and(|held| held.uid != node.uid) {
            self.remove(&node.name);
        }
    }

    fn remove(&mut self, name: &str) {
        self.close(name);
        if let Some(held) = self.nodes.remove(name) {
            self.shows(held.shown_port, 0);
        }
    }

    /// A Node shows another port.
    fn shows(&mut self, before: u16, now: u16) {
        if before == now {
            return;
        }
        if now != 0 {
            *self.shown.entry(now).or_default() += 1;
        }
        if let Some(count) = self.shown.get_mut(&before) {
            *count -= 1;
            if *count == 0 {
                self.shown.remove(&before);
                self.free_from = self.free_from.min(before);
            }
        }
    }

    fn open(&mut self, name: &str, bind: IpAddr, most: usize) {
        let Some(held) = self.nodes.get(name) else { return };
        if self.taken.len() >= most {
            if !std::mem::replace(&mut self.in_trouble, true) {
                warn!(
                    node = name,
                    most, "the limit of open files leaves no room for kubectl logs and exec of more nodes; raise it"
                );
            }
            return;
        }
        let (had, node) = (held.shown_port, NodeIdentity { name: name.to_owned(), uid: held.uid.clone() });
        let mut tried = HashSet::new();
        loop {
            let Some(port) = self.next_port(had, &tried) else {
                if !std::mem::replace(&mut self.in_trouble, true) {
                    warn!(node = name, range = %self.range, "no port is left for kubectl logs and exec; give more with --kubelet-ports");
                }
                return;
            };
            let listener = TcpListener::bind((bind, port));
            match listener.and_then(|listener| listener.set_nonblocking(true).map(|()| listener)) {
                Ok(listener) => {
                    if had != 0 && had != port {
                        info!(node = name, had, port, "the node gets another port: somebody else has the one it had");
                    }
                    let door = Arc::new(Door { node, port, closed: CancellationToken::new() });
                    self.in_trouble = false;
                    self.occupied.remove(&port);
                    self.taken.insert(port);
                    self.opened.push_back((Arc::clone(&door), listener));
                    if let Some(held) = self.nodes.get_mut(name) {
                        held.door = Some(door);
                    }
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    if self.occupied.insert(port) {
                        warn!(port, node = name, "something else listens on this port of the range: it is left alone");
                    }
                    tried.insert(port);
                }
                Err(error) => {
                    // Not the port's fault. It is tried again when the node or its Node stirs.
                    if !std::mem::replace(&mut self.in_trouble, true) {
                        warn!(port, node = name, "cannot listen for kubectl logs and exec of a node: {error}");
                    }
                    return;
                }
            }
        }
    }

    fn next_port(&mut self, had: u16, tried: &HashSet<u16>) -> Option<u16> {
        let taken = |port: u16| self.taken.contains(&port) || tried.contains(&port);
        let unavailable = |port: u16| taken(port) || self.occupied.contains(&port);
        // A port that another Node shows may yet be asked for.
        let kept = |port: u16| unavailable(port) || (port != had && self.shown.contains_key(&port));
        if let Some(port) = choose(self.range, had, self.free_from, kept) {
            if port != had {
                self.free_from = port;
            }
            return Some(port);
        }
        let least = self.range.first;
        choose(self.range, 0, least, unavailable).or_else(|| choose(self.range, 0, least, taken))
    }

    fn close(&mut self, name: &str) {
        let Some(door) = self.nodes.get_mut(name).and_then(|held| held.door.take()) else { return };
        door.closed.cancel();
        let before = self.opened.len();
        self.opened.retain(|(opened, _)| !Arc::ptr_eq(opened, &door));
        if self.opened.len() < before {
            self.released(door.port);
        }
    }

    fn released(&mut self, port: u16) {
        self.taken.remove(&port);
        self.free_from = self.free_from.min(port);
    }

    /// Whether a Node has newly to be written.
    fn publish(&mut self, name: &str) -> bool {
        let Some(held) = self.nodes.get_mut(name) else { return false };
        let Some(door) = &held.door else { return false };
        if held.queued || (held.shows_us && held.shown_port == door.port) {
            return false;
        }
        held.queued = true;
        self.unpublished.push_back(name.to_owned());
        true
    }

    fn next_unpublished(&mut self) -> Option<String> {
        let name = self.unpublished.pop_front()?;
        if let Some(held) = self.nodes.get_mut(&name) {
            held.queued = false;
        }
        Some(name)
    }
}

impl Node {
    fn new(uid: &str) -> Self {
        Self {
            uid: uid.to_owned(),
            shown_port: 0,
            shows_us: false,
            shown_since: None,
            session: None,
            adopting: false,
            was_adopted: false,
            ended: None,
            door: None,
            queued: false,
        }
    }
}

#[cfg(test)]
mod tests;
