//! The Services of namespaces whose pods link to them, and two that are always known. The watch tells of all there are: those of other
//! namespaces are dropped as they come.
//!
//! A namespace that nobody used before is listed by itself while the watch goes on, and both are compared by the versions of what they show. A
//! new list of everything covers all namespaces that are used when it begins, and what was being listed then is given up.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use serde_json::Value;
use skerry_proto::sync::{Collection, Object};
use tokio::sync::Notify;

use super::objects::succeeding;
use super::pod::version_less;
use super::{Closures, Node, Source, sanitise, session, settings};

/// The Service every pod learns of whatever its namespace.
pub(super) const KUBERNETES: &str = "default/kubernetes";
/// The Service whose address pods ask for names.
const CLUSTER_DNS: &str = "kube-system/kube-dns";

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Services {
    held: BTreeMap<String, Held>,
    namespaces: HashMap<String, Namespace>,
    /// Namespaces to be listed; some of them may not be any more.
    unlisted: VecDeque<String>,
    lists: u64,
    wake: Arc<Notify>,
}

#[derive(Debug)]
struct Held {
    object: Arc<Object>,
    version: Box<str>,
}

/// One that pods on edge nodes use.
#[derive(Debug, Default)]
struct Namespace {
    nodes: HashSet<Arc<str>>,
    known: Listed,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Listed {
    #[default]
    Not,
    /// By the list of everything that is under way.
    WithAll,
    /// By the list of this number, since when the watch said that these are gone: key and version.
    Alone(u64, HashMap<String, String>),
    Yes,
}

/// A list of one namespace that is under way.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NamespaceList {
    /// Of what.
    pub(crate) namespace: String,
    number: u64,
}

impl Services {
    pub(super) fn wake(&self) -> Arc<Notify> {
        self.wake.clone()
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    pub(super) fn get(&self, key: &str) -> Option<&Arc<Object>> {
        self.held.get(key).map(|held| &held.object)
    }

    /// The keys of a namespace's.
    pub(super) fn keys_in(&self, namespace: &str) -> impl Iterator<Item = &String> {
        let prefix = format!("{namespace}/");
        self.held.range(prefix.clone()..).map(|(key, _)| key).take_while(move |key| key.starts_with(&prefix))
    }

    /// Whether all of a namespace are known.
    pub(super) fn are_known(&self, namespace: &str) -> bool {
        self.namespaces.get(namespace).is_some_and(|namespace| namespace.known == Listed::Yes)
    }

    /// A node uses a namespace.
    pub(super) fn acquire(&mut self, namespace: &str, node: &Arc<str>) {
        let known = self.namespaces.entry(namespace.to_owned()).or_default();
        known.nodes.insert(Arc::clone(node));
        if known.nodes.len() == 1 {
            self.unlisted.push_back(namespace.to_owned());
            self.wake.notify_one();
        }
    }

    /// It does no more.
    pub(super) fn release(&mut self, namespace: &str, node: &str) {
        let Some(known) = self.namespaces.get_mut(namespace) else { return };
        known.nodes.remove(node);
        if known.nodes.is_empty() {
            self.namespaces.remove(namespace);
            let keys: Vec<String> = self.keys_in(namespace).filter(|key| !is_always_held(key)).cloned().collect();
            keys.iter().for_each(|key| drop(self.held.remove(key)));
        }
    }

    fn holds(&self, key: &str) -> bool {
        is_always_held(key) || self.namespaces.contains_key(namespace_of(key))
    }
}

impl Closures {
    /// Notified when a namespace's Services are to be listed.
    pub(crate) fn services_wake(&self) -> Arc<Notify> {
        self.services.wake()
    }

    /// A list of all Services begins.
    pub(crate) fn services_begin(&mut self) {
        for namespace in self.services.namespaces.values_mut().filter(|namespace| namespace.known != Listed::Yes) {
            namespace.known = Listed::WithAll;
        }
    }

    /// It has shown these, by key, as of a revision. What is newer came from the list of a namespace meanwhile.
    pub(crate) fn services_listed(&mut self, shown: &HashSet<String>, revision: &str) {
        let held = self.services.held.iter();
        let gone = held.filter(|(key, held)| !shown.contains(*key) && !version_less(revision, &held.version));
        let gone: Vec<String> = gone.map(|(key, _)| key.clone()).collect();
        for key in gone {
            self.service_lost(&key);
        }
        let covered = self.services.namespaces.iter_mut().filter(|(_, known)| known.known == Listed::WithAll);
        let covered: Vec<String> = covered
            .map(|(name, known)| {
                known.known = Listed::Yes;
                name.clone()
            })
            .collect();
        covered.iter().for_each(|namespace| self.wake_namespace(namespace));
        // Those that were used first while the first one was under way.
        self.services.wake.notify_one();
    }

    /// The next namespace to list.
    pub(crate) fn take_namespace(&mut self) -> Option<NamespaceList> {
        if !self.is_ready(Source::Services) {
            return None;
        }
        while let Some(namespace) = self.services.unlisted.pop_front() {
            if let Some(known) = self.services.namespaces.get_mut(&namespace).filter(|known| known.known == Listed::Not)
            {
                self.services.lists += 1;
                let number = self.services.lists;
                known.known = Listed::Alone(number, HashMap::new());
                return Some(NamespaceList { namespace, number });
            }
        }
        None
    }

    /// Nobody lists any more: what was being listed is to be listed anew.
    pub(crate) fn namespaces_abandoned(&mut self) {
        for (name, known) in &mut self.services.namespaces {
            if matches!(known.known, Listed::Alone(..)) {
                known.known = Listed::Not;
            }
            if known.known == Listed::Not {
                self.services.unlisted.push_back(name.clone());
            }
        }
    }

    /// A list of one namespace shows a Service. Answers whether it is wanted still.
    pub(crate) fn service_shown(&mut self, list: &NamespaceList, service: Value) -> bool {
        let Some(gone) = self.gone_since(list) else { return false };
        let key = sanitise::key(&service);
        let version = service["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        if !gone.get(&key).is_some_and(|gone| version_less(version, gone)) {
            self.service_applied(service);
        }
        true
    }

    /// It is complete.
    pub(crate) fn namespace_listed(&mut self, list: &NamespaceList) {
        if self.gone_since(list).is_none() {
            return;
        }
        if let Some(known) = self.services.namespaces.get_mut(&list.namespace) {
            known.known = Listed::Yes;
        }
        self.wake_namespace(&list.namespace);
    }

    fn gone_since(&self, list: &NamespaceList) -> Option<&HashMap<String, String>> {
        match &self.services.namespaces.get(&list.namespace)?.known {
            Listed::Alone(number, gone) if *number == list.number => Some(gone),
            _ => None,
        }
    }

    /// A Service is there.
    pub(crate) fn service_applied(&mut self, service: Value) {
        let key = sanitise::key(&service);
        if !self.services.holds(&key) {
            return;
        }
        let version: Box<str> = service["metadata"]["resourceVersion"].as_str().unwrap_or_default().into();
        let before = self.services.held.get(&key);
        if before.is_some_and(|before| version_less(&version, &before.version)) {
            return;
        }
        let found = (key == CLUSTER_DNS).then(|| addresses(&service["spec"]));
        let object = succeeding(sanitise::object(Collection::Services, service), before.map(|before| &before.object));
        let is_news = before.is_none_or(|before| !Arc::ptr_eq(&before.object, &object));
        self.services.held.insert(key.clone(), Held { object, version });
        if is_news {
            self.mark_service(&key);
        }
        if let Some(found) = found {
            self.dns_found(&found);
        }
    }

    /// A Service is gone, as of a version.
    pub(crate) fn service_removed(&mut self, key: &str, version: &str) {
        if let Some(Namespace { known: Listed::Alone(_, gone), .. }) =
            self.services.namespaces.get_mut(namespace_of(key))
        {
            gone.insert(key.to_owned(), version.to_owned());
        }
        // Another one of this name may have been listed before.
        if self.services.held.get(key).is_some_and(|held| !version_less(version, &held.version)) {
            self.service_lost(key);
        }
    }

    fn service_lost(&mut self, key: &str) {
        self.services.held.remove(key);
        self.mark_service(key);
        if key == CLUSTER_DNS {
            self.dns_found(&[]);
        }
    }

    /// Whether all Services are known that a node's pods link to.
    pub(super) fn services_known(&self, node: &Node) -> bool {
        node.service_namespaces.keys().all(|namespace| self.services.are_known(namespace))
    }

    fn mark_service(&mut self, key: &str) {
        let users = self.services.namespaces.get(namespace_of(key)).into_iter().flat_map(|known| &known.nodes);
        let all = self.nodes.keys().filter(|_| key == KUBERNETES);
        for name in users.chain(all) {
            self.subscribers.mark(name, Collection::Services, key);
        }
    }

    fn wake_namespace(&self, namespace: &str) {
        let users = self.services.namespaces.get(namespace).into_iter().flat_map(|known| &known.nodes);
        users.for_each(|name| self.subscribers.wake(name));
    }

    fn dns_found(&mut self, addresses: &[String]) {
        if !self.configured_dns.is_empty() {
            return;
        }
        let object = settings(&self.cluster_domain, addresses);
        if object != self.settings {
            self.settings = object;
            for name in self.nodes.keys() {
                self.subscribers.mark(name, Collection::Settings, session::SETTINGS);
            }
        }
    }
}

pub(super) fn namespace_of(key: &str) -> &str {
    key.split('/').next().unwrap_or_default()
}

fn is_always_held(key: &str) -> bool {
    key == KUBERNETES || key == CLUSTER_DNS
}

fn addresses(spec: &Value) -> Vec<String> {
    let all = spec["clusterIPs"].as_array().cloned().unwrap_or_else(|| vec![spec["clusterIP"].clone()]);
    all.iter()
        .filter_map(Value::as_str)
        .filter(|address| !address.is_empty() && *address != "None")
        .map(str::to_owned)
        .collect()
}
