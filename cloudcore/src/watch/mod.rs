//! Watches: what the apiserver says goes into the closures, from [`stream`]s that never end.
//!
//! Nothing is taken for gone because a list did not show it: a pod or Node that a new list lacks is asked for by name first. ConfigMaps and
//! Secrets are watched by their metadata only; [`fetch`] gets those that are needed.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::{FutureExt as _, StreamExt as _};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::ResourceExt;
use kube::api::{Api, DynamicObject, ListParams};
use kube::core::PartialObjectMeta;
use serde_json::Value;
use skerry_proto::EDGE_LABEL;
use skerry_proto::sync::{Collection, decode};
use tokio::sync::{Notify, broadcast};
use tracing::{debug, error, info, warn};

pub(crate) use self::stream::follow;
use crate::apiserver::{Apiserver, Kind, backoff};
use crate::backend::NodeIdentity;
use crate::backend_k8s::Shared;
use crate::closure::{self, NodeInput, PodInput, Source, sanitise};
use crate::kubelet::{Ports, Shown};
use crate::nodes::autonomy::Autonomy;
use crate::nodes::{self, EPOCH_ANNOTATION};
use crate::retry::chain;
use crate::upstream::Upstream;
use crate::{clock, supervise};

pub(crate) mod devices;
pub(crate) mod fetch;
pub(crate) mod services;
mod stream;

/// Requests under way at once to find out whether something is really gone.
const CONFIRM_AT_ONCE: usize = 8;

/// Where the streams lead.
#[derive(Clone)]
pub(crate) struct Watches {
    pub(crate) api: Apiserver,
    pub(crate) client: kube::Client,
    pub(crate) shared: Arc<Shared>,
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) autonomy: Arc<Autonomy>,
    pub(crate) ports: Arc<Ports>,
    pub(crate) deletions: broadcast::Sender<NodeIdentity>,
    /// Nodes of which it is being asked whether they are gone, and whether that is to be asked once more.
    pub(crate) doubtful: Arc<Mutex<HashMap<NodeIdentity, bool>>>,
}

/// What a stream's events do.
pub(crate) trait Sink<K> {
    /// What is watched and why, where the kind alone does not say it; for messages, behind "the watch".
    fn of(&self) -> &'static str {
        ""
    }

    /// A new list begins.
    fn begin(&mut self) {}
    /// An object is there.
    fn apply(&mut self, object: K);
    /// An object is gone.
    fn delete(&mut self, object: K);
    /// The list is complete, as of this revision.
    fn complete(&mut self, revision: &str);
}

/// How far a watch has come, for whoever compares that with what another replica knows.
pub(crate) struct Progress {
    shared: Arc<Shared>,
    source: Source,
    /// Some edge has seen more than this watch has come to.
    hurry: Arc<Notify>,
}

impl Progress {
    /// Whether that is so still.
    fn lacks(&self) -> bool {
        self.shared.closures().lacks(self.source)
    }

    fn shows(&self, revision: &str) {
        self.shared.closures().shows(self.source, revision);
    }

    fn reached(&self, revision: &str) {
        if !self.shared.closures().reached(self.source, revision) {
            error!(source = ?self.source, revision, "the apiserver's revisions went back");
            self.shared.restored();
        }
    }
}

/// Ends what [`Closures::confirming`](crate::closure::Closures::confirming) began, however whoever asks comes to an end.
struct Confirming(Arc<Shared>);

impl Drop for Confirming {
    fn drop(&mut self) {
        self.0.closures().confirmed();
    }
}

impl Watches {
    fn progress(&self, source: Source) -> Option<Progress> {
        let hurry = self.shared.closures().hurry(source);
        Some(Progress { shared: self.shared.clone(), source, hurry })
    }

    /// Edge nodes, for ever.
    pub(crate) async fn nodes(self) {
        let sink = Nodes { watches: self.clone(), seen: HashSet::new() };
        let progress = self.progress(Source::Nodes);
        let (nodes, edges) = (self.api.api(Kind::Node, ""), ListParams::default().labels(EDGE_LABEL));
        follow(&self.api, Kind::Node, nodes, edges, progress, sink).await;
    }

    /// Pods that are bound, for ever. Which of them matter is known once the nodes are.
    pub(crate) async fn pods(self) {
        self.shared.until_ready(Source::Nodes).await;
        let sink = Pods { watches: self.clone(), list: 0, nodes: Vec::new() };
        let progress = self.progress(Source::Pods);
        let (pods, bound) = (self.api.api(Kind::Pod, ""), ListParams::default().fields("spec.nodeName!="));
        follow(&self.api, Kind::Pod, pods, bound, progress, sink).await;
    }

    /// Services, for ever. Which of them matter is known once the pods are.
    pub(crate) async fn services(self) {
        self.shared.until_ready(Source::Pods).await;
        let sink = Whole { shared: self.shared.clone(), kind: Kind::Service, seen: None };
        let progress = self.progress(Source::Services);
        let services = self.api.api(Kind::Service, "");
        follow(&self.api, Kind::Service, services, ListParams::default(), progress, sink).await;
    }

    /// RuntimeClasses, for ever.
    pub(crate) async fn runtime_classes(self) {
        let sink = Whole { shared: self.shared.clone(), kind: Kind::RuntimeClass, seen: None };
        let progress = self.progress(Source::RuntimeClasses);
        let classes = self.api.api(Kind::RuntimeClass, "");
        follow(&self.api, Kind::RuntimeClass, classes, ListParams::default(), progress, sink).await;
    }

    /// Metadata of ConfigMaps, for ever.
    pub(crate) async fn config_maps(self) {
        let objects = Api::<PartialObjectMeta<ConfigMap>>::all(self.client.clone());
        let sink = Metadata::new(&self.shared, Collection::ConfigMaps, Source::ConfigMaps);
        let progress = self.progress(Source::ConfigMaps);
        follow(&self.api, Kind::ConfigMap, objects, ListParams::default(), progress, sink).await;
    }

    /// Metadata of Secrets, for ever.
    pub(crate) async fn secrets(self) {
        let objects = Api::<PartialObjectMeta<Secret>>::all(self.client.clone());
        let sink = Metadata::new(&self.shared, Collection::Secrets, Source::Secrets);
        let progress = self.progress(Source::Secrets);
        follow(&self.api, Kind::Secret, objects, ListParams::default(), progress, sink).await;
    }

    /// What is asked for by name may be newer than what the watch has shown.
    fn answered(&self, source: Source, answer: &Result<Option<DynamicObject>, kube::Error>) {
        if let Ok(Some(found)) = answer {
            self.shared.closures().shows(source, &found.resource_version().unwrap_or_default());
        }
    }

    fn node_there(&self, node: &DynamicObject, listed_with_pods: bool) {
        if closure::is_lost(&node.data) {
            self.upstream.node_hidden(&node.name_any());
        }
        let mut input = NodeInput::of(Kind::Node.json(node));
        if input.claim != nodes::epoch_of(node).unwrap_or_default() {
            warn!(
                node = input.identity.name,
                epoch = input.claim,
                "the Node's annotation {EPOCH_ANNOTATION} names an epoch that cannot have been: it is disregarded, and written over by the node's next session"
            );
            input.claim = 0;
        }
        let identity = input.identity.clone();
        let change = self.shared.closures().node_applied(input);
        self.ports.seen(&identity, &Shown::of(node));
        if let Some(gone) = change.replaced {
            self.node_gone(gone);
        }
        if change.new && !listed_with_pods {
            supervise::spawn("list pods of a new node", self.clone().list_pods(identity));
        } else if change.now_autonomous {
            self.look_at_pods(&identity);
        }
    }

    fn node_gone(&self, node: NodeIdentity) {
        info!(node = node.name, uid = node.uid, "the Node was deleted");
        self.ports.gone(&node);
        // Nobody listening is no session to end.
        drop(self.deletions.send(node));
    }

    /// Has it asked whether a Node is really gone: once at a time, however often that is in doubt.
    fn confirm_node(&self, node: NodeIdentity) {
        if let Some(again) = self.doubtful().get_mut(&node) {
            *again = true;
            return;
        }
        self.doubtful().insert(node.clone(), false);
        let watches = self.clone();
        supervise::spawn("confirm a Node's deletion", async move {
            loop {
                let asked = AssertUnwindSafe(watches.look_for_node(&node)).catch_unwind().await;
                let mut doubtful = watches.doubtful();
                // What was in doubt meanwhile may have happened behind the answer.
                match doubtful.get_mut(&node) {
                    Some(again) if *again && asked.is_ok() => *again = false,
                    _ => drop(doubtful.remove(&node)),
                }
                match asked {
                    Err(panic) => std::panic::resume_unwind(panic),
                    Ok(()) if doubtful.contains_key(&node) => {}
                    Ok(()) => return,
                }
            }
        });
    }

    fn doubtful(&self) -> MutexGuard<'_, HashMap<NodeIdentity, bool>> {
        self.doubtful.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks whether a Node is really gone, until there is an answer.
    async fn look_for_node(&self, node: &NodeIdentity) {
        let mut attempt = 0;
        loop {
            let found = self.api.get(Kind::Node, "", &node.name).await;
            self.answered(Source::Nodes, &found);
            match found {
                Ok(found) if found.as_ref().and_then(ResourceExt::uid).as_deref() != Some(node.uid.as_str()) => {
                    let known = self.shared.closures().node_removed(&node.name, Some(&node.uid)).is_some();
                    // One that came and went between two lists was never known, and has a session all the same.
                    if known || self.shared.closures().has_session(node) {
                        self.node_gone(node.clone());
                    }
                    return found
                        .iter()
                        .filter(|node| node.labels().contains_key(EDGE_LABEL))
                        .for_each(|node| self.node_there(node, false));
                }
                Ok(None) => return,
                Ok(Some(found)) if found.labels().contains_key(EDGE_LABEL) => return,
                Ok(Some(_)) => {
                    warn!(
                        node = node.name,
                        "the Node lost its label {EDGE_LABEL}: putting it back; delete the Node to remove it"
                    );
                    if nodes::relabel(&self.api, node).await.is_ok() {
                        return;
                    }
                }
                Err(error) => debug!(node = node.name, "cannot look whether the Node is gone: {}", chain(&error)),
            }
            tokio::time::sleep(backoff(attempt, rand::random())).await;
            attempt += 1;
        }
    }

    /// Lists the pods of a Node that was not known when the watch of pods began.
    async fn list_pods(self, node: NodeIdentity) {
        let mut attempt = 0;
        while self.shared.closures().node(&node.name).as_ref() == Some(&node) {
            match self.api.list(Kind::Pod, &format!("spec.nodeName={}", node.name)).await {
                Ok(pods) => {
                    for pod in pods {
                        self.shared.closures().shows(Source::Pods, &pod.resource_version().unwrap_or_default());
                        self.pod_there(&pod, 0);
                    }
                    self.shared.closures().node_listed(&node);
                    return;
                }
                Err(error) if attempt == 0 => {
                    warn!(
                        node = node.name,
                        "cannot list the node's pods: {}; trying again until it works",
                        chain(&error)
                    );
                }
                Err(error) => debug!(node = node.name, "cannot list the node's pods yet: {}", chain(&error)),
            }
            tokio::time::sleep(backoff(attempt, rand::random())).await;
            attempt += 1;
        }
    }

    fn pod_there(&self, pod: &DynamicObject, list: u64) {
        // Most pods of a large cluster are not the edge's: they are dropped before any work is done on them.
        let node = pod.data["spec"]["nodeName"].as_str().unwrap_or_default().to_owned();
        let ours = self.shared.closures().knows(&node);
        if !ours {
            return;
        }
        let pod = Kind::Pod.json(pod);
        let key = sanitise::key(&pod);
        if self.shared.closures().autonomous(&node) {
            self.autonomy.look(&key, &pod);
        }
        let input = PodInput::of(pod);
        let facts = input.facts.clone();
        self.shared.closures().pod_applied(input, list, clock::wall());
        self.upstream.pod_seen(&node, &facts);
    }

    fn pod_gone(&self, node: &str, key: &str, uid: &str) {
        self.autonomy.forget(key);
        self.shared.closures().pod_removed(node, key, uid);
        self.upstream.pod_gone(node, uid);
    }

    /// Asks whether what a list did not show, by key and UID, is really gone: each until there is an answer, which `take` is given.
    async fn confirm(
        self,
        (kind, source): (Kind, Source),
        unseen: Vec<(String, String)>,
        _until_then: Confirming,
        take: impl Fn(&Self, &str, &str, Option<&DynamicObject>),
    ) {
        let confirm = |(key, uid): (String, String)| {
            let (watches, take) = (&self, &take);
            async move {
                let Some((namespace, name)) = key.split_once('/') else { return };
                let mut attempt = 0;
                loop {
                    let found = watches.api.get(kind, namespace, name).await;
                    watches.answered(source, &found);
                    match found {
                        Ok(found) => return take(watches, &key, &uid, found.as_ref()),
                        Err(error) => debug!(?kind, key, "cannot look whether it is gone: {}", chain(&error)),
                    }
                    tokio::time::sleep(backoff(attempt, rand::random())).await;
                    attempt += 1;
                }
            }
        };
        futures_util::stream::iter(unseen).map(confirm).buffer_unordered(CONFIRM_AT_ONCE).collect::<()>().await;
    }

    /// A node became autonomous: its pods are looked at as they were last seen.
    fn look_at_pods(&self, node: &NodeIdentity) {
        let pods = self.shared.closures().pods_of(&node.name);
        for (key, object, facts) in pods {
            let json = decode(object.encoding, &object.payload).unwrap_or_default();
            if let Ok(mut pod) = serde_json::from_slice::<Value>(&json) {
                pod["metadata"]["resourceVersion"] = facts.resource_version.into();
                pod["status"] = serde_json::json!({"phase": facts.status.phase});
                self.autonomy.look(&key, &pod);
            }
        }
    }
}

struct Nodes {
    watches: Watches,
    seen: HashSet<String>,
}

impl Sink<DynamicObject> for Nodes {
    fn begin(&mut self) {
        self.seen.clear();
    }

    fn apply(&mut self, node: DynamicObject) {
        self.seen.insert(node.name_any());
        // Before the first list is through no pod was looked at: those of these nodes come with the watch of pods.
        let first = !self.watches.shared.closures().is_ready(Source::Nodes);
        self.watches.node_there(&node, first);
    }

    fn delete(&mut self, node: DynamicObject) {
        let identity = NodeIdentity { name: node.name_any(), uid: node.uid().unwrap_or_default() };
        self.watches.confirm_node(identity);
    }

    fn complete(&mut self, _: &str) {
        let (known, strangers) = {
            let closures = self.watches.shared.closures();
            (closures.nodes(), closures.strangers())
        };
        let unseen = known.into_iter().filter(|node| !self.seen.contains(&node.name));
        for identity in unseen.chain(strangers) {
            self.watches.confirm_node(identity);
        }
        self.watches.ports.listed();
        self.watches.shared.closures().source_ready(Source::Nodes);
    }
}

struct Pods {
    watches: Watches,
    /// Number of the list under way or last complete.
    list: u64,
    /// The nodes that were known when it began.
    nodes: Vec<NodeIdentity>,
}

impl Sink<DynamicObject> for Pods {
    fn begin(&mut self) {
        let mut closures = self.watches.shared.closures();
        self.list = closures.list_begins();
        self.nodes = closures.nodes();
    }

    fn apply(&mut self, pod: DynamicObject) {
        self.watches.pod_there(&pod, self.list);
    }

    fn delete(&mut self, pod: DynamicObject) {
        let key = format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
        let node = pod.data["spec"]["nodeName"].as_str().unwrap_or_default();
        self.watches.pod_gone(node, &key, &pod.uid().unwrap_or_default());
    }

    fn complete(&mut self, _: &str) {
        let unseen = {
            let mut closures = self.watches.shared.closures();
            for node in self.nodes.drain(..) {
                closures.node_listed(&node);
            }
            closures.source_ready(Source::Pods);
            let unseen = closures.pods_unseen(self.list);
            if unseen.is_empty() {
                return;
            }
            closures.confirming();
            unseen
        };
        let confirming = Confirming(self.watches.shared.clone());
        let list = self.list;
        let take = move |watches: &Watches, key: &str, uid: &str, found: Option<&DynamicObject>| {
            if found.and_then(|pod| pod.metadata.uid.as_deref()) != Some(uid) {
                let node = watches.shared.closures().pod(key).map(|(node, _)| node.to_owned());
                watches.pod_gone(node.as_deref().unwrap_or_default(), key, uid);
            }
            found.into_iter().for_each(|pod| watches.pod_there(pod, list));
        };
        let confirm = self.watches.clone().confirm((Kind::Pod, Source::Pods), unseen, confirming, take);
        supervise::spawn("confirm deletions of pods", confirm);
    }
}

/// Services and RuntimeClasses: they come whole, and nothing runs or ends by them.
struct Whole {
    shared: Arc<Shared>,
    kind: Kind,
    /// While a list is under way: what it showed.
    seen: Option<HashSet<String>>,
}

impl Sink<DynamicObject> for Whole {
    fn begin(&mut self) {
        self.seen = Some(HashSet::new());
        if self.kind == Kind::Service {
            self.shared.closures().services_begin();
        }
    }

    fn apply(&mut self, object: DynamicObject) {
        let value = self.kind.json(&object);
        if let Some(seen) = &mut self.seen {
            seen.insert(sanitise::key(&value));
        }
        let mut closures = self.shared.closures();
        match self.kind {
            Kind::Service => closures.service_applied(value),
            _ => closures.runtime_class_applied(value),
        }
    }

    fn delete(&mut self, object: DynamicObject) {
        let key = sanitise::key(&self.kind.json(&object));
        let mut closures = self.shared.closures();
        match self.kind {
            Kind::Service => closures.service_removed(&key, &object.resource_version().unwrap_or_default()),
            _ => closures.runtime_class_removed(&key),
        }
    }

    fn complete(&mut self, revision: &str) {
        let seen = self.seen.take().unwrap_or_default();
        let mut closures = self.shared.closures();
        if self.kind == Kind::Service {
            closures.services_listed(&seen, revision);
            closures.source_ready(Source::Services);
        } else {
            closures.runtime_classes_retain(&seen);
            closures.source_ready(Source::RuntimeClasses);
        }
    }
}

struct Metadata {
    shared: Arc<Shared>,
    collection: Collection,
    source: Source,
    /// What was held when the list began and has not been shown since.
    unseen: HashSet<String>,
}

impl Metadata {
    fn new(shared: &Arc<Shared>, collection: Collection, source: Source) -> Self {
        Self { shared: shared.clone(), collection, source, unseen: HashSet::new() }
    }
}

impl<K> Sink<PartialObjectMeta<K>> for Metadata
where
    PartialObjectMeta<K>: ResourceExt,
{
    fn begin(&mut self) {
        self.unseen = self.shared.closures().held(self.collection).into_iter().map(|(_, key)| key).collect();
    }

    fn apply(&mut self, object: PartialObjectMeta<K>) {
        let key = format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any());
        self.unseen.remove(&key);
        let version = object.resource_version().unwrap_or_default();
        self.shared.closures().metadata_seen(&(self.collection, key), &version);
    }

    fn delete(&mut self, object: PartialObjectMeta<K>) {
        let key = format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any());
        self.shared.closures().metadata_gone(&(self.collection, key));
    }

    fn complete(&mut self, _: &str) {
        let mut closures = self.shared.closures();
        for key in self.unseen.drain() {
            closures.metadata_gone(&(self.collection, key));
        }
        closures.source_ready(self.source);
    }
}
