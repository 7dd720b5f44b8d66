//! Which objects each edge node should hold: its pods, and by reference counting everything they need.
//!
//! Pure state: watches put in what the apiserver says, sessions take out what changed for them, no IO happens here. Invariants: an object
//! is in a node's closure exactly while a pod of that node refers to it; ConfigMaps, Secrets and Services are held only while some node needs them;
//! a collection is complete for a node only once everything that decides it is known.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;
use skerry_proto::AUTONOMY_ANNOTATION;
use skerry_proto::payload::{Settings, Token};
use skerry_proto::sync::{Collection, Object};
use tokio::sync::Notify;

use self::devices::Devices;
pub(crate) use self::devices::{DeviceFacts, DeviceInput};
use self::marks::Marks;
pub(crate) use self::pod::{PodFacts, PodInput, version_less};
pub(crate) use self::references::Reference;
use self::references::References;
pub(crate) use self::services::NamespaceList;
use self::services::Services;
pub(crate) use self::session::Session;
use self::session::Subscribers;
use crate::backend::{Agents, NodeIdentity};
use crate::nodes::{AGENTS_ANNOTATION, Claim, EPOCH_ANNOTATION, Named, parse_agents};
use crate::sa_tokens::{TokenRequest, Tokens};
use crate::upstream::node::NodeShown;

pub(crate) mod devices;
mod marks;
mod objects;
mod pod;
mod pods;
mod references;
pub(crate) mod sanitise;
mod services;
mod session;
#[cfg(test)]
mod tests;
mod told;

/// A watch whose first list is through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Source {
    /// Edge nodes.
    Nodes,
    /// Bound pods.
    Pods,
    /// Services.
    Services,
    /// RuntimeClasses.
    RuntimeClasses,
    /// Metadata of ConfigMaps.
    ConfigMaps,
    /// Metadata of Secrets.
    Secrets,
    /// Devices, which the apiserver need not serve.
    Devices,
    /// DeviceModels, likewise.
    DeviceModels,
}

/// How many sources there are.
const SOURCES: usize = 8;
/// Those that need not be there.
const DEVICE_SOURCES: [Source; 2] = [Source::Devices, Source::DeviceModels];

/// An edge node of the apiserver's.
#[derive(Clone, Debug)]
pub(crate) struct NodeInput {
    /// Who it is.
    pub(crate) identity: NodeIdentity,
    /// metadata.resourceVersion
    pub(crate) resource_version: Box<str>,
    /// As the edge gets it.
    pub(crate) object: Object,
    /// Whether its pods stay while it is away.
    pub(crate) autonomous: bool,
    /// status.capacity, as JSON.
    pub(crate) capacity: Box<str>,
    /// What reports are held against.
    pub(crate) shown: NodeShown,
    /// The session that has it, as far as the Node says.
    pub(crate) claim: u64,
    /// Whose that is.
    pub(crate) agents: Agents,
    /// Kubernetes has not heard of it for too long.
    pub(crate) lost: bool,
}

impl NodeInput {
    /// Takes a Node apart.
    pub(crate) fn of(node: Value) -> Self {
        let metadata = &node["metadata"];
        Self {
            identity: NodeIdentity {
                name: metadata["name"].as_str().unwrap_or_default().to_owned(),
                uid: metadata["uid"].as_str().unwrap_or_default().to_owned(),
            },
            resource_version: metadata["resourceVersion"].as_str().unwrap_or_default().into(),
            autonomous: metadata["annotations"][AUTONOMY_ANNOTATION].as_str() != Some("false"),
            capacity: node["status"]["capacity"].to_string().into(),
            shown: NodeShown::of(&node),
            claim: metadata["annotations"][EPOCH_ANNOTATION]
                .as_str()
                .and_then(|text| text.parse().ok())
                .unwrap_or_default(),
            agents: metadata["annotations"][AGENTS_ANNOTATION].as_str().and_then(parse_agents).unwrap_or_default(),
            lost: is_lost(&node),
            object: sanitise::object(Collection::Node, node),
        }
    }
}

/// Whether its Ready condition is Unknown, as the node lifecycle controller makes it when the lease is not renewed.
pub(crate) fn is_lost(node: &Value) -> bool {
    let conditions = node["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|one| one["type"] == "Ready" && one["status"] == "Unknown")
}

/// What a Node's arrival changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeChange {
    /// It is new here: its pods must be listed.
    pub(crate) new: bool,
    /// It became autonomous: its pods must be looked at.
    pub(crate) now_autonomous: bool,
    /// Another one of this name was known: it is gone.
    pub(crate) replaced: Option<NodeIdentity>,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Closures {
    settings: Arc<Object>,
    cluster_domain: String,
    /// Not to be looked for in the cluster.
    configured_dns: Vec<String>,
    nodes: HashMap<Arc<str>, Box<Node>>,
    /// Which node has the pod of this key.
    bound: HashMap<String, Arc<str>>,
    slots: HashMap<Reference, Slot>,
    services: Services,
    runtime_classes: HashMap<String, Arc<Object>>,
    devices: Devices,
    /// How many lists of pods have begun.
    lists: u64,
    ready: BTreeSet<Source>,
    ready_wake: Arc<Notify>,
    subscribers: Subscribers,
    marks: Marks,
    fetch: VecDeque<Reference>,
    fetch_wake: Arc<Notify>,
    /// A set: however often an edge comes back, each token is here once for each time that it was due at.
    due: BTreeSet<(Timestamp, Arc<str>, String)>,
    token_wake: Arc<Notify>,
}

#[derive(Debug)]
struct Node {
    uid: String,
    /// As the watch last showed it, or as it was last written here.
    resource_version: Box<str>,
    object: Arc<Object>,
    autonomous: bool,
    capacity: Box<str>,
    shown: NodeShown,
    /// The newest session that the Node names, whoever has it.
    claim: u64,
    /// Whose that is.
    agents: Agents,
    lost: bool,
    /// How often in a row it was found lost.
    lost_rounds: u8,
    /// The newest session here that nobody else may have followed, and which start of the agent that was.
    here: (u64, u64),
    /// All its pods are known.
    listed: bool,
    /// While its pods are being listed: those the watch said were deleted meanwhile.
    deleted_meanwhile: HashSet<String>,
    /// Boxed, for most nodes have few, and a map has room for eleven at once.
    pods: BTreeMap<String, Box<Pod>>,
    references: HashMap<Reference, u32>,
    service_namespaces: HashMap<String, u32>,
    tokens: Tokens,
}

#[derive(Debug)]
struct Pod {
    object: Arc<Object>,
    references: References,
    facts: PodFacts,
    /// The watch's list it was last seen in or after.
    seen: u64,
}

/// A ConfigMap or Secret that some node needs.
#[derive(Debug, Default)]
struct Slot {
    nodes: HashSet<Arc<str>>,
    value: Known,
    resource_version: String,
    state: Fetch,
}

#[derive(Debug, Default)]
enum Known {
    #[default]
    Unknown,
    /// Unknown, and asking failed: pods do not wait for it any longer.
    Failed,
    Absent,
    Present(Arc<Object>),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Fetch {
    #[default]
    Idle,
    Queued,
    UnderWay,
    /// It changed while it was being fetched: the version that its metadata told of, if it did.
    Again(Option<String>),
}

impl Closures {
    /// Knows nothing yet. `cluster_dns` empty: looked for in the cluster.
    pub(crate) fn new(cluster_domain: &str, cluster_dns: Vec<String>) -> Self {
        Self {
            settings: settings(cluster_domain, &cluster_dns),
            cluster_domain: cluster_domain.to_owned(),
            configured_dns: cluster_dns,
            nodes: HashMap::new(),
            bound: HashMap::new(),
            slots: HashMap::new(),
            services: Services::default(),
            runtime_classes: HashMap::new(),
            devices: Devices::default(),
            lists: 0,
            ready: BTreeSet::new(),
            ready_wake: Arc::default(),
            subscribers: Subscribers::default(),
            marks: Marks::default(),
            fetch: VecDeque::new(),
            fetch_wake: Arc::default(),
            due: BTreeSet::new(),
            token_wake: Arc::default(),
        }
    }

    /// Notified when there is something to fetch.
    pub(crate) fn fetch_wake(&self) -> Arc<Notify> {
        self.fetch_wake.clone()
    }

    /// Notified when a token became due earlier than before.
    pub(crate) fn token_wake(&self) -> Arc<Notify> {
        self.token_wake.clone()
    }

    /// Notified when another source is ready.
    pub(crate) fn ready_wake(&self) -> Arc<Notify> {
        self.ready_wake.clone()
    }

    /// Whether every source is that has to be there.
    pub(crate) fn ready(&self) -> bool {
        let needed = self.ready.iter().filter(|source| !DEVICE_SOURCES.contains(source));
        needed.count() == SOURCES - DEVICE_SOURCES.len()
    }

    /// Whether a source is.
    pub(crate) fn is_ready(&self, source: Source) -> bool {
        self.ready.contains(&source)
    }

    /// The first list of a source is through.
    pub(crate) fn source_ready(&mut self, source: Source) {
        if self.ready.insert(source) {
            self.subscribers.wake_all();
            self.ready_wake.notify_waiters();
        }
    }

    /// A Node is there.
    pub(crate) fn node_applied(&mut self, input: NodeInput) -> NodeChange {
        let NodeInput { identity, resource_version, object, autonomous, capacity, shown, claim, agents, lost } = input;
        let mut change = NodeChange::default();
        if let Some(node) = self.nodes.get_mut(identity.name.as_str()) {
            if node.uid == identity.uid {
                change.now_autonomous = autonomous && !node.autonomous;
                node.autonomous = autonomous;
                node.capacity = capacity;
                node.shown = shown;
                node.lost = lost;
                if node.says(Named { version: resource_version.into(), epoch: claim, agents }) {
                    self.subscribers.wake(&identity.name);
                }
                let object = objects::succeeding(object, Some(&node.object));
                if !Arc::ptr_eq(&node.object, &object) {
                    node.object = object;
                    self.subscribers.mark(&identity.name, Collection::Node, &identity.name);
                }
                return change;
            }
            change.replaced = self.node_removed(&identity.name, None);
        }
        change.new = true;
        let name: Arc<str> = identity.name.as_str().into();
        let node = Node {
            uid: identity.uid,
            resource_version,
            object: Arc::new(object),
            autonomous,
            capacity,
            shown,
            claim,
            agents,
            lost,
            lost_rounds: 0,
            here: (0, 0),
            listed: false,
            deleted_meanwhile: HashSet::new(),
            pods: BTreeMap::new(),
            references: HashMap::new(),
            service_namespaces: HashMap::new(),
            tokens: Tokens::default(),
        };
        self.nodes.insert(name.clone(), Box::new(node));
        self.fetch_devices_of(&name);
        self.subscribers.mark_all(&name);
        change
    }

    /// A Node is gone (if it is the one of `uid`, where given). Answers who it was.
    pub(crate) fn node_removed(&mut self, name: &str, uid: Option<&str>) -> Option<NodeIdentity> {
        let node = self.nodes.get(name)?;
        if uid.is_some_and(|uid| uid != node.uid) {
            return None;
        }
        let pods: Vec<String> = node.pods.keys().cloned().collect();
        for key in pods {
            self.unbind(name, &key);
        }
        self.drop_devices_of(name);
        self.nodes.remove(name).map(|node| NodeIdentity { name: name.to_owned(), uid: node.uid })
    }

    /// All pods bound to this node when it became known have been applied.
    pub(crate) fn node_listed(&mut self, identity: &NodeIdentity) {
        if let Some(node) = self.nodes.get_mut(identity.name.as_str()).filter(|node| node.uid == identity.uid) {
            node.listed = true;
            node.deleted_meanwhile = HashSet::new();
            self.subscribers.wake(&identity.name);
        }
    }

    /// Who is known under a name.
    pub(crate) fn node(&self, name: &str) -> Option<NodeIdentity> {
        self.nodes.get(name).map(|node| NodeIdentity { name: name.to_owned(), uid: node.uid.clone() })
    }

    /// What is known of exactly this Node.
    fn known(&self, node: &NodeIdentity) -> Option<&Node> {
        self.nodes.get(node.name.as_str()).map(Box::as_ref).filter(|known| known.uid == node.uid)
    }

    /// The newest session that a Node is known to have had, and whose it was, if it is known.
    pub(crate) fn claim(&self, node: &NodeIdentity) -> Option<(u64, Agents)> {
        let known = self.known(node)?;
        Some((known.claim.max(known.here.0), known.agents))
    }

    /// Whether the Node names an older session of another start of the agent than this one's, or none.
    pub(crate) fn names_other(&self, node: &NodeIdentity, epoch: u64, who: u64) -> bool {
        self.known(node).is_some_and(|known| known.claim < epoch && (known.claim == 0 || known.agents.who != who))
    }

    /// Whether a session of a higher epoch has the node.
    pub(crate) fn is_superseded(&self, node: &NodeIdentity, epoch: u64) -> bool {
        self.known(node).is_some_and(|known| known.claim > epoch)
    }

    /// A session has claimed the node, or another one has.
    pub(crate) fn claimed(&mut self, node: &NodeIdentity, epoch: u64, claim: Claim) {
        let Some(known) = self.nodes.get_mut(node.name.as_str()).filter(|known| known.uid == node.uid) else { return };
        match claim {
            Claim::Ours => {
                if let Some(who) = self.subscribers.who(node, epoch) {
                    known.here = known.here.max((epoch, who));
                    if epoch >= known.claim {
                        known.agents = known.agents.followed_by(who);
                    }
                }
                known.claim = known.claim.max(epoch);
            }
            // Of two that had the same epoch, the one that came too late is over as well.
            Claim::Theirs(newest, agents) => {
                if let Some(agents) = agents.filter(|_| newest >= known.claim) {
                    known.agents = agents;
                }
                known.claim = known.claim.max(newest).max(epoch + 1);
                self.subscribers.wake(&node.name);
            }
        }
    }

    /// A Node was written here, and says this since.
    pub(crate) fn node_written(&mut self, node: &NodeIdentity, named: Named) {
        if let Some(known) = self.nodes.get_mut(node.name.as_str()).filter(|known| known.uid == node.uid)
            && known.says(named)
        {
            self.subscribers.wake(&node.name);
        }
    }

    /// What a Node says of its sessions, as the watch last showed it, or as it was last written here.
    pub(crate) fn node_named(&self, node: &NodeIdentity) -> Option<Named> {
        let known = self.known(node)?;
        Some(Named { version: known.resource_version.to_string(), epoch: known.claim, agents: known.agents })
    }

    /// Whether this is an edge node.
    pub(crate) fn knows(&self, name: &str) -> bool {
        self.nodes.contains_key(name)
    }

    /// Whether this node, and no other of its name, has a session.
    pub(crate) fn has_session(&self, node: &NodeIdentity) -> bool {
        self.subscribers.has(node)
    }

    /// Nodes that have a session and are not known here.
    pub(crate) fn strangers(&self) -> Vec<NodeIdentity> {
        let known = |node: &NodeIdentity| self.known(node).is_some();
        self.subscribers.nodes().filter(|node| !known(node)).collect()
    }

    /// All nodes.
    pub(crate) fn nodes(&self) -> Vec<NodeIdentity> {
        self.nodes.iter().map(|(name, node)| NodeIdentity { name: name.to_string(), uid: node.uid.clone() }).collect()
    }

    /// Whether a node's pods are to stay while it is away.
    pub(crate) fn autonomous(&self, name: &str) -> bool {
        self.nodes.get(name).is_some_and(|node| node.autonomous)
    }

    /// status.capacity of a node as the apiserver has it.
    pub(crate) fn capacity(&self, name: &str) -> Option<Value> {
        self.nodes.get(name).and_then(|node| serde_json::from_str(&node.capacity).ok())
    }

    /// What the apiserver shows of a node's status.
    pub(crate) fn node_shown(&self, name: &str) -> Option<NodeShown> {
        self.nodes.get(name).map(|node| node.shown)
    }

    /// A token that is due now, if any, and when the next one is.
    pub(crate) fn due_token(&mut self, now: Timestamp) -> (Option<(Arc<str>, TokenRequest)>, Option<Timestamp>) {
        while let Some((due, name, key)) = self.due.pop_first() {
            if due > now {
                self.due.insert((due, name, key));
                return (None, Some(due));
            }
            if !self.subscribers.any(&name) {
                continue;
            }
            if let Some(request) = self.nodes.get_mut(&name).and_then(|node| node.tokens.take(&key, due)) {
                return (Some((name, request)), None);
            }
        }
        (None, None)
    }

    /// Nobody works on tokens any more: what was being minted is due again.
    pub(crate) fn mints_abandoned(&mut self) {
        let names: Vec<Arc<str>> = self.nodes.keys().cloned().collect();
        for name in names {
            if let Some(node) = self.nodes.get_mut(&name) {
                node.tokens.abandoned();
            }
            self.schedule(&name);
        }
    }

    /// What became of a token request.
    pub(crate) fn token_minted(&mut self, node: &str, key: &str, answer: Option<&Token>, now: Timestamp) {
        let Some((name, _)) = self.nodes.get_key_value(node) else { return };
        let name = name.clone();
        if self.nodes.get_mut(&name).is_some_and(|node| node.tokens.minted(key, answer, now)) {
            self.subscribers.mark(&name, Collection::Tokens, key);
        }
        self.schedule(&name);
    }

    /// How many objects are held, by collection.
    pub(crate) fn counts(&self) -> [(Collection, usize); 9] {
        let (devices, models) = self.devices.counts();
        let present = |collection| {
            self.slots
                .iter()
                .filter(|((of, _), slot)| *of == collection && matches!(slot.value, Known::Present(_)))
                .count()
        };
        [
            (Collection::Node, self.nodes.len()),
            (Collection::Pods, self.bound.len()),
            (Collection::ConfigMaps, present(Collection::ConfigMaps)),
            (Collection::Secrets, present(Collection::Secrets)),
            (Collection::Services, self.services.len()),
            (Collection::RuntimeClasses, self.runtime_classes.len()),
            (Collection::Devices, devices),
            (Collection::DeviceModels, models),
            (Collection::Tokens, self.nodes.values().map(|node| node.tokens.held()).sum()),
        ]
    }

    fn schedule(&mut self, name: &Arc<str>) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let scheduled = node.tokens.scheduled();
        if !scheduled.is_empty() {
            self.due.extend(scheduled.into_iter().map(|(due, key)| (due, name.clone(), key)));
            self.token_wake.notify_one();
        }
    }

    fn mark_namespace(&mut self, name: &str, namespace: &str) {
        for key in self.services.keys_in(namespace) {
            self.subscribers.mark(name, Collection::Services, key);
        }
    }
}

impl Node {
    /// What it says of its sessions, in an answer or in the watch: either may come first. Answers whether it names a newer one.
    fn says(&mut self, Named { version, epoch, agents }: Named) -> bool {
        if version_less(&version, &self.resource_version) {
            return false;
        }
        self.resource_version = version.into();
        if epoch >= self.claim {
            self.agents = agents;
        }
        let is_newer = epoch > self.claim;
        self.claim = self.claim.max(epoch);
        is_newer
    }
}

fn settings(cluster_domain: &str, cluster_dns: &[String]) -> Arc<Object> {
    let settings = Settings { cluster_dns: cluster_dns.to_vec(), cluster_domain: cluster_domain.to_owned() };
    let json = serde_json::to_vec(&settings).unwrap_or_default();
    Object::new(Collection::Settings, session::SETTINGS.into(), session::SETTINGS.into(), &json).into()
}
