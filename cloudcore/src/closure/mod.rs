//! Which objects each edge node should hold: its pods, and by reference counting everything they need.
//!
//! Pure state: watches put in what the apiserver says, sessions take out what changed for them, no IO happens here. Invariants: an object
//! is in a node's closure exactly while a pod of that node refers to it; ConfigMaps and Secrets are held only while some node needs them;
//! a collection is complete for a node only once everything that decides it is known.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;
use skerry_proto::AUTONOMY_ANNOTATION;
use skerry_proto::payload::{Settings, Token};
use skerry_proto::sync::{Collection, Object};
use tokio::sync::Notify;

pub(crate) use self::pod::{PodFacts, PodInput, version_less};
pub(crate) use self::references::Reference;
use self::references::References;
pub(crate) use self::session::Session;
use self::session::Subscribers;
use crate::backend::NodeIdentity;
use crate::nodes::EPOCH_ANNOTATION;
use crate::sa_tokens::{TokenRequest, Tokens};
use crate::upstream::node::NodeShown;

mod objects;
mod pod;
mod references;
pub(crate) mod sanitise;
mod session;
#[cfg(test)]
mod tests;

/// The Service every pod learns of whatever its namespace.
const KUBERNETES: &str = "default/kubernetes";
/// The Service whose address pods ask for names.
const CLUSTER_DNS: &str = "kube-system/kube-dns";

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
}

/// How many sources there are.
const SOURCES: usize = 6;

/// An edge node of the apiserver's.
#[derive(Clone, Debug)]
pub(crate) struct NodeInput {
    /// Who it is.
    pub(crate) identity: NodeIdentity,
    /// As the edge gets it.
    pub(crate) object: Object,
    /// Whether its pods stay while it is away.
    pub(crate) autonomous: bool,
    /// status.capacity
    pub(crate) capacity: Value,
    /// What reports are held against.
    pub(crate) shown: NodeShown,
    /// The session that has it, as far as the Node says.
    pub(crate) claim: u64,
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
            autonomous: metadata["annotations"][AUTONOMY_ANNOTATION].as_str() != Some("false"),
            capacity: node["status"]["capacity"].clone(),
            shown: NodeShown::of(&node),
            claim: metadata["annotations"][EPOCH_ANNOTATION]
                .as_str()
                .and_then(|text| text.parse().ok())
                .unwrap_or_default(),
            object: sanitise::object(Collection::Node, node),
        }
    }
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
    settings: Object,
    cluster_domain: String,
    /// Not to be looked for in the cluster.
    configured_dns: Vec<String>,
    nodes: HashMap<Arc<str>, Node>,
    /// Which node has the pod of this key.
    bound: HashMap<String, Arc<str>>,
    slots: HashMap<Reference, Slot>,
    services: BTreeMap<String, Object>,
    runtime_classes: HashMap<String, Object>,
    /// How many lists of pods have begun.
    lists: u64,
    ready: BTreeSet<Source>,
    ready_wake: Arc<Notify>,
    subscribers: Subscribers,
    fetch: VecDeque<Reference>,
    fetch_wake: Arc<Notify>,
    /// A set: however often an edge comes back, each token is here once for each time that it was due at.
    due: BTreeSet<(Timestamp, Arc<str>, String)>,
    token_wake: Arc<Notify>,
}

#[derive(Debug)]
struct Node {
    uid: String,
    object: Object,
    autonomous: bool,
    capacity: Value,
    shown: NodeShown,
    /// The newest session that the Node names, whoever has it.
    claim: u64,
    /// The newest session here.
    here: u64,
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
    object: Object,
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
    Present(Object),
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
            services: BTreeMap::new(),
            runtime_classes: HashMap::new(),
            lists: 0,
            ready: BTreeSet::new(),
            ready_wake: Arc::default(),
            subscribers: Subscribers::default(),
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

    /// Whether every source is.
    pub(crate) fn ready(&self) -> bool {
        self.ready.len() == SOURCES
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
        let NodeInput { identity, object, autonomous, capacity, shown, claim } = input;
        let mut change = NodeChange::default();
        if let Some(node) = self.nodes.get_mut(identity.name.as_str()) {
            if node.uid == identity.uid {
                change.now_autonomous = autonomous && !node.autonomous;
                node.autonomous = autonomous;
                node.capacity = capacity;
                node.shown = shown;
                if claim > node.claim {
                    node.claim = claim;
                    self.subscribers.wake(&identity.name);
                }
                let object = object.succeeding(&node.object);
                if node.object != object {
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
            object,
            autonomous,
            capacity,
            shown,
            claim,
            here: 0,
            listed: false,
            deleted_meanwhile: HashSet::new(),
            pods: BTreeMap::new(),
            references: HashMap::new(),
            service_namespaces: HashMap::new(),
            tokens: Tokens::default(),
        };
        self.nodes.insert(name.clone(), node);
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

    /// The newest session that a Node is known to have had, if it is known.
    pub(crate) fn claim(&self, node: &NodeIdentity) -> Option<u64> {
        let known = self.nodes.get(node.name.as_str()).filter(|known| known.uid == node.uid)?;
        Some(known.claim.max(known.here))
    }

    /// Whether a session of a higher epoch has the node.
    pub(crate) fn is_superseded(&self, node: &NodeIdentity, epoch: u64) -> bool {
        self.nodes.get(node.name.as_str()).is_some_and(|known| known.uid == node.uid && known.claim > epoch)
    }

    /// A session's claim was written.
    pub(crate) fn claimed(&mut self, name: &str, epoch: u64) {
        if let Some(node) = self.nodes.get_mut(name).filter(|node| node.claim < epoch) {
            node.claim = epoch;
            self.subscribers.wake(name);
        }
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
        let known = |node: &NodeIdentity| self.nodes.get(node.name.as_str()).is_some_and(|known| known.uid == node.uid);
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
    pub(crate) fn capacity(&self, name: &str) -> Option<&Value> {
        self.nodes.get(name).map(|node| &node.capacity)
    }

    /// What the apiserver shows of a node's status.
    pub(crate) fn node_shown(&self, name: &str) -> Option<NodeShown> {
        self.nodes.get(name).map(|node| node.shown)
    }

    /// A pod is there; `seen` counts the watch's lists. Answers whether it was taken: pods of nodes that are not edge nodes are not.
    pub(crate) fn pod_applied(&mut self, input: PodInput, seen: u64, now: Timestamp) -> bool {
        let PodInput { key, node: name, object, references, facts } = input;
        if let Some(before) = self.bound.get(&key).filter(|before| ***before != *name).cloned() {
            self.unbind(&before, &key);
        }
        let Some((name, node)) =
            self.nodes.get_key_value(name.as_str()).map(|(name, _)| name.clone()).and_then(|name| {
                let node = self.nodes.get_mut(&name)?;
                Some((name, node))
            })
        else {
            return false;
        };
        if node.deleted_meanwhile.contains(&facts.uid) {
            return true;
        }
        if let Some(known) = node.pods.get_mut(&key) {
            known.seen = known.seen.max(seen);
            if facts.older_than(&known.facts) {
                return true;
            }
        }
        let before = node.pods.remove(&key);
        let object = objects::succeeding(object, before.as_ref().map(|before| &before.object));
        if before.as_ref().is_none_or(|before| before.object != object) {
            self.subscribers.mark(&name, Collection::Pods, &key);
        }
        if let Some(replaced) = before.as_ref().filter(|before| before.facts.uid != facts.uid) {
            for token in node.tokens.forget(&replaced.facts.uid) {
                self.subscribers.mark(&name, Collection::Tokens, &token);
            }
        }
        let active = !facts.status.terminal() && !facts.deleting;
        for token in node.tokens.set(&facts.uid, &references.tokens, active, now) {
            self.subscribers.mark(&name, Collection::Tokens, &token);
        }
        // First what is needed from now on, then what no longer is: what is needed by both is neither dropped nor fetched anew.
        if before.as_ref().is_none_or(|before| before.references != references) {
            self.acquire(&name, &references);
            if let Some(before) = &before {
                self.release(&name, &before.references);
            }
        }
        if let Some(node) = self.nodes.get_mut(&name) {
            node.pods.insert(key.clone(), Box::new(Pod { object, references, facts, seen }));
        }
        self.bound.insert(key, name.clone());
        self.schedule(&name);
        true
    }

    /// The apiserver no longer has this pod.
    pub(crate) fn pod_removed(&mut self, node: &str, key: &str, uid: &str) {
        let Some(name) = self.bound.get(key).cloned() else {
            if let Some(node) = self.nodes.get_mut(node).filter(|node| !node.listed) {
                node.deleted_meanwhile.insert(uid.to_owned());
            }
            return;
        };
        if let Some(node) = self.nodes.get_mut(&name)
            && node.pods.get(key).is_some_and(|pod| pod.facts.uid == uid)
        {
            if !node.listed {
                node.deleted_meanwhile.insert(uid.to_owned());
            }
            self.unbind(&name, key);
        }
    }

    /// A list of pods begins: its number.
    pub(crate) fn list_begins(&mut self) -> u64 {
        self.lists += 1;
        self.lists
    }

    /// Pods that a complete list, the one of this number, did not show: key and UID.
    pub(crate) fn pods_unseen(&self, list: u64) -> Vec<(String, String)> {
        let pods = self.nodes.values().flat_map(|node| &node.pods);
        pods.filter(|(_, pod)| pod.seen < list).map(|(key, pod)| (key.clone(), pod.facts.uid.clone())).collect()
    }

    /// Which node has the pod, and what is known of it.
    pub(crate) fn pod(&self, key: &str) -> Option<(&str, &PodFacts)> {
        let name = self.bound.get(key)?;
        self.nodes.get(name)?.pods.get(key).map(|pod| (&**name, &pod.facts))
    }

    /// All pods of a node, as the edge gets them, with what is known of them.
    pub(crate) fn pods_of(&self, node: &str) -> Vec<(String, Object, PodFacts)> {
        let pods = self.nodes.get(node).into_iter().flat_map(|node| &node.pods);
        pods.map(|(key, pod)| (key.clone(), pod.object.clone(), pod.facts.clone())).collect()
    }

    /// A status write of ours was taken: what the apiserver answered.
    pub(crate) fn pod_written(&mut self, key: &str, facts: PodFacts) {
        let Some(name) = self.bound.get(key) else { return };
        if let Some(pod) = self.nodes.get_mut(name).and_then(|node| node.pods.get_mut(key))
            && pod.facts.uid == facts.uid
            && !facts.older_than(&pod.facts)
        {
            pod.facts = facts;
        }
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
    pub(crate) fn counts(&self) -> [(Collection, usize); 7] {
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
            (Collection::Tokens, self.nodes.values().map(|node| node.tokens.held()).sum()),
        ]
    }

    fn unbind(&mut self, name: &str, key: &str) {
        self.bound.remove(key);
        let Some(node) = self.nodes.get_mut(name) else { return };
        let Some(pod) = node.pods.remove(key) else { return };
        self.subscribers.mark(name, Collection::Pods, key);
        for token in node.tokens.forget(&pod.facts.uid) {
            self.subscribers.mark(name, Collection::Tokens, &token);
        }
        self.release(name, &pod.references);
    }

    fn acquire(&mut self, name: &Arc<str>, references: &References) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let mut fetch = Vec::new();
        for reference in &references.objects {
            let count = node.references.entry(reference.clone()).or_default();
            *count += 1;
            if *count > 1 {
                continue;
            }
            self.subscribers.mark(name, reference.0, &reference.1);
            if reference.0 != Collection::RuntimeClasses {
                let slot = self.slots.entry(reference.clone()).or_default();
                slot.nodes.insert(name.clone());
                if matches!(slot.value, Known::Unknown | Known::Failed) {
                    fetch.push(reference.clone());
                }
            }
        }
        if let Some(namespace) = &references.service_namespace {
            let count = node.service_namespaces.entry(namespace.clone()).or_default();
            *count += 1;
            if *count == 1 {
                self.mark_namespace(name, namespace);
            }
        }
        for reference in fetch {
            self.request(&reference);
        }
    }

    fn release(&mut self, name: &str, references: &References) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        for reference in &references.objects {
            if !release(&mut node.references, reference) {
                continue;
            }
            self.subscribers.mark(name, reference.0, &reference.1);
            if let Some(slot) = self.slots.get_mut(reference) {
                slot.nodes.remove(name);
                if slot.nodes.is_empty() {
                    self.slots.remove(reference);
                }
            }
        }
        if let Some(namespace) = &references.service_namespace
            && release(&mut node.service_namespaces, namespace)
        {
            self.mark_namespace(name, namespace);
        }
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
        for key in services_in(&self.services, namespace) {
            self.subscribers.mark(name, Collection::Services, key);
        }
    }
}

/// The keys of a namespace's Services.
fn services_in<'a>(services: &'a BTreeMap<String, Object>, namespace: &str) -> impl Iterator<Item = &'a String> {
    let prefix = format!("{namespace}/");
    services.range(prefix.clone()..).map(|(key, _)| key).take_while(move |key| key.starts_with(&prefix))
}

/// Counts one down. Answers whether it was the last.
fn release<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, u32>, key: &K) -> bool {
    match counts.get_mut(key) {
        Some(count) if *count > 1 => {
            *count -= 1;
            false
        }
        Some(_) => counts.remove(key).is_some(),
        None => false,
    }
}

fn settings(cluster_domain: &str, cluster_dns: &[String]) -> Object {
    let settings = Settings { cluster_dns: cluster_dns.to_vec(), cluster_domain: cluster_domain.to_owned() };
    let json = serde_json::to_vec(&settings).unwrap_or_default();
    Object::new(Collection::Settings, session::SETTINGS.into(), session::SETTINGS.into(), &json)
}
