//! What is known of every node's port, and which one it gets.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Door;
use crate::backend::NodeIdentity;
use crate::config::PortRange;

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) range: PortRange,
    /// Nodes are all known; before that nobody gets a port, so that nobody gets one that another had.
    pub(super) listed: bool,
    pub(super) nodes: HashMap<String, Node>,
    /// Until nobody listens on them any more, which is a little longer than a node has them.
    pub(super) taken: HashSet<u16>,
    /// Those of them that no node has any more, and the node that is to get one back.
    pub(super) closing: HashMap<u16, Option<String>>,
    /// Ports that Nodes show: how many of them show it. Whoever gets a new one gets none of these, as long as there are others.
    pub(super) shown: HashMap<u16, u32>,
    /// Ports that something else on this machine listens on.
    pub(super) occupied: HashSet<u16>,
    /// No port below this is free, other than those that are shown.
    pub(super) free_from: u16,
    /// The last attempt to open a port failed, and that was said.
    pub(super) in_trouble: bool,
    pub(super) opened: VecDeque<(Arc<Door>, TcpListener)>,
    pub(super) unpublished: VecDeque<String>,
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) uid: String,
    /// Its port in the range, or 0.
    pub(super) shown_port: u16,
    /// Whether its address is this cloudcore's.
    pub(super) shows_us: bool,
    pub(super) shown_since: Option<Timestamp>,
    /// The epoch of the session that its Node names, or 0.
    pub(super) named: u64,
    /// Its Node's resourceVersion.
    pub(super) version: String,
    pub(super) session: Option<u64>,
    /// Its Node does not name that session yet: before it does, another replica may have it.
    pub(super) claiming: bool,
    /// It is nowhere, and its Node is to show this cloudcore; not seen yet that it does.
    pub(super) adopting: bool,
    /// Once for each time it was here: replicas do not take what is nowhere from each other for ever.
    pub(super) was_adopted: bool,
    pub(super) ended: Option<Timestamp>,
    pub(super) door: Option<Arc<Door>>,
    pub(super) queued: bool,
}

impl Inner {
    /// Another Node of the name is there: the one before is gone.
    pub(super) fn replace_other(&mut self, node: &NodeIdentity) {
        if self.nodes.get(&node.name).is_some_and(|held| held.uid != node.uid) {
            self.remove(&node.name);
        }
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.close(name);
        if let Some(held) = self.nodes.remove(name) {
            self.shows(held.shown_port, 0);
        }
    }

    /// A Node shows another port.
    pub(super) fn shows(&mut self, before: u16, now: u16) {
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

    pub(super) fn open(&mut self, name: &str, bind: IpAddr, most: usize) {
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
        // It is not here, and a replica at the same address may have it: of the port that it shows there is no other.
        let may_be_elsewhere = !held.is_here() && !self.taken.contains(&had);
        let only_shown = may_be_elsewhere && (held.shown_since.is_none() || held.was_adopted && !held.adopting);
        if let Some(waiting @ None) = self.closing.get_mut(&had) {
            // It is given back at once, and whoever knows the node knows it there.
            *waiting = Some(node.name);
            return;
        }
        if only_shown && had == 0 {
            return;
        }
        let mut tried = HashSet::new();
        loop {
            let next = if only_shown { Some(had) } else { self.next_port(had, &tried) };
            let Some(port) = next else {
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
                        held.was_adopted |= may_be_elsewhere && port != had;
                        held.door = Some(door);
                    }
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && only_shown => return,
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

    pub(super) fn next_port(&mut self, had: u16, tried: &HashSet<u16>) -> Option<u16> {
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

    pub(super) fn close(&mut self, name: &str) {
        let Some(door) = self.nodes.get_mut(name).and_then(|held| held.door.take()) else { return };
        door.closed.cancel();
        let before = self.opened.len();
        self.opened.retain(|(opened, _)| !Arc::ptr_eq(opened, &door));
        if self.opened.len() < before {
            self.released(door.port);
        } else {
            self.closing.insert(door.port, None);
        }
    }

    /// Answers which node waits for it.
    pub(super) fn released(&mut self, port: u16) -> Option<String> {
        self.taken.remove(&port);
        self.free_from = self.free_from.min(port);
        self.closing.remove(&port)?
    }

    /// Whether a Node has newly to be written.
    pub(super) fn publish(&mut self, name: &str) -> bool {
        let Some(held) = self.nodes.get_mut(name) else { return false };
        if held.queued || held.unpublished().is_none() {
            return false;
        }
        held.queued = true;
        self.unpublished.push_back(name.to_owned());
        true
    }

    pub(super) fn next_unpublished(&mut self) -> Option<String> {
        let name = self.unpublished.pop_front()?;
        if let Some(held) = self.nodes.get_mut(&name) {
            held.queued = false;
        }
        Some(name)
    }
}

impl Node {
    /// It has a session here, and its Node names no newer one: that would be at another replica, and this one has only not ended yet.
    pub(super) fn is_here(&self) -> bool {
        self.session.is_some_and(|epoch| epoch >= self.named)
    }

    /// Its Node shows the port that it has here.
    pub(super) fn shows_door(&self) -> bool {
        self.shows_us && self.door.as_ref().is_some_and(|door| door.port == self.shown_port)
    }

    /// What its Node is to show and does not.
    pub(super) fn unpublished(&self) -> Option<&Arc<Door>> {
        let is_elsewhere = self.session.is_some() && !self.is_here();
        self.door.as_ref().filter(|_| !self.claiming && !is_elsewhere && !self.shows_door())
    }

    pub(super) fn new(uid: &str) -> Self {
        Self {
            uid: uid.to_owned(),
            shown_port: 0,
            shows_us: false,
            shown_since: None,
            named: 0,
            version: String::new(),
            session: None,
            claiming: false,
            adopting: false,
            was_adopted: false,
            ended: None,
            door: None,
            queued: false,
        }
    }
}

/// The port of a node that had (or shows) one: that if it can be had, else the lowest.
pub(super) fn choose(range: PortRange, had: u16, from: u16, unavailable: impl Fn(u16) -> bool) -> Option<u16> {
    if range.contains(had) && !unavailable(had) {
        return Some(had);
    }
    (from.max(range.first)..=range.last).find(|port| !unavailable(*port))
}
