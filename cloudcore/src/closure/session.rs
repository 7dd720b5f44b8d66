//! What one session still has to tell its edge.
//!
//! Level-triggered: changes only mark an object of a node as worth a look; what is told is decided when the session asks, by comparing what
//! it told last with what is true now. So changes coalesce by object, and the backlog of a slow session is never larger than its closure.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use jiff::Timestamp;
use skerry_proto::sync::{COLLECTIONS, Collection, Entry, Object};
use tokio::sync::Notify;

use super::marks::Said;
use super::services::{KUBERNETES, namespace_of};
use super::told::{Telling, Told};
use super::{Closures, Known, Node, Pod, Source};
use crate::backend::{FeedEvent, NodeIdentity};
use crate::sa_tokens::Wanted;

/// Key and UID of the one object of the settings collection.
pub(crate) const SETTINGS: &str = "settings";

/// A session's memory: what it told its edge.
#[derive(Debug)]
pub(crate) struct Session {
    pub(super) node: NodeIdentity,
    epoch: u64,
    /// The epoch that the edge had before.
    last_epoch: u64,
    /// Another replica may have a session of this node still.
    claims: bool,
    wake: Arc<Notify>,
    told: Told,
    pub(super) said: Said,
    complete: Collections,
    /// Pods that wait for something they refer to.
    pub(super) held_back: BTreeSet<String>,
    pub(super) begun: bool,
    /// Collections whose inventory was asked for, because something of them cannot be fetched.
    asked: Collections,
    /// Collections whose inventory came.
    answered: Collections,
    /// What the edge holds of what cannot be fetched: it keeps that.
    kept: HashMap<(Collection, String), Entry>,
}

/// Some collections, in as many bits: there are thousands of sessions.
#[derive(Clone, Copy, Debug, Default)]
struct Collections(u32);

impl Collections {
    fn bit(of: Collection) -> u32 {
        1 << of as u32
    }

    fn contains(self, one: Collection) -> bool {
        self.0 & Self::bit(one) != 0
    }

    /// Whether it was not among them before.
    fn insert(&mut self, one: Collection) -> bool {
        let before = std::mem::replace(self, Self(self.0 | Self::bit(one)));
        !before.contains(one)
    }
}

impl Session {
    /// Whether it has to claim the node before anything of it may be written.
    pub(crate) fn claims(&self) -> bool {
        self.claims
    }

    /// Whose it is.
    pub(crate) fn node(&self) -> &NodeIdentity {
        &self.node
    }

    /// Notified when there may be something to say.
    pub(crate) fn wake(&self) -> Arc<Notify> {
        self.wake.clone()
    }
}

/// Who wants to know what changed for a node.
#[derive(Debug, Default)]
pub(super) struct Subscribers {
    by_node: HashMap<String, Vec<Subscriber>>,
    /// How many are behind.
    behind: usize,
}

#[derive(Debug)]
struct Subscriber {
    uid: String,
    epoch: u64,
    /// Which start of the agent it is.
    who: u64,
    wake: Arc<Notify>,
    changed: BTreeSet<(Collection, String)>,
    everything: bool,
    /// It waits for what its edge has seen already.
    behind: bool,
}

impl Subscribers {
    pub(super) fn any(&self, node: &str) -> bool {
        self.by_node.contains_key(node)
    }

    pub(super) fn has(&self, node: &NodeIdentity) -> bool {
        self.by_node.get(&node.name).into_iter().flatten().any(|subscriber| subscriber.uid == node.uid)
    }

    pub(super) fn who(&self, node: &NodeIdentity, epoch: u64) -> Option<u64> {
        let mut all = self.by_node.get(&node.name).into_iter().flatten();
        all.find(|one| one.uid == node.uid && one.epoch == epoch).map(|one| one.who)
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = NodeIdentity> {
        let all = self.by_node.iter().flat_map(|(name, all)| all.iter().map(move |subscriber| (name, subscriber)));
        all.map(|(name, subscriber)| NodeIdentity { name: name.clone(), uid: subscriber.uid.clone() })
    }

    pub(super) fn mark(&mut self, node: &str, collection: Collection, key: &str) {
        for subscriber in self.by_node.get_mut(node).into_iter().flatten() {
            if !subscriber.everything {
                subscriber.changed.insert((collection, key.to_owned()));
            }
            subscriber.wake.notify_one();
        }
    }

    pub(super) fn mark_all(&mut self, node: &str) {
        for subscriber in self.by_node.get_mut(node).into_iter().flatten() {
            subscriber.everything = true;
            subscriber.changed.clear();
            subscriber.wake.notify_one();
        }
    }

    pub(super) fn wake(&self, node: &str) {
        for subscriber in self.by_node.get(node).into_iter().flatten() {
            subscriber.wake.notify_one();
        }
    }

    pub(super) fn wake_all(&self) {
        for subscriber in self.by_node.values().flatten() {
            subscriber.wake.notify_one();
        }
    }

    pub(super) fn wake_behind(&self) {
        if self.behind > 0 {
            self.by_node.values().flatten().filter(|one| one.behind).for_each(|one| one.wake.notify_one());
        }
    }

    pub(super) fn set_behind(&mut self, session: &Session, behind: bool) {
        let mut all = self.by_node.get_mut(&session.node.name).into_iter().flatten();
        if let Some(one) = all.find(|one| Arc::ptr_eq(&one.wake, &session.wake))
            && std::mem::replace(&mut one.behind, behind) != behind
        {
            self.behind = if behind { self.behind + 1 } else { self.behind - 1 };
        }
    }

    fn take(&mut self, node: &str, epoch: u64) -> Option<(BTreeSet<(Collection, String)>, bool)> {
        let subscriber = self.by_node.get_mut(node)?.iter_mut().find(|subscriber| subscriber.epoch == epoch)?;
        Some((std::mem::take(&mut subscriber.changed), std::mem::take(&mut subscriber.everything)))
    }
}

/// What is true of one object for one node.
enum Truth {
    Is(Arc<Object>),
    Kept(Entry),
    Not,
    /// Not to be told yet.
    NotYet,
}

impl Closures {
    /// Begins a session of an edge whose last one, wherever that was, had `last_epoch`; `who` stands for one start of its agent.
    pub(crate) fn open(&mut self, node: &NodeIdentity, epoch: u64, last_epoch: u64, who: u64) -> Session {
        let wake = Arc::new(Notify::new());
        let uid = node.uid.clone();
        let subscriber = Subscriber {
            uid,
            epoch,
            who,
            wake: wake.clone(),
            changed: BTreeSet::new(),
            everything: true,
            behind: false,
        };
        // Hardly ever there is more than one.
        self.subscribers.by_node.entry(node.name.clone()).or_insert_with(|| Vec::with_capacity(1)).push(subscriber);
        let known = self.nodes.get_mut(node.name.as_str()).filter(|known| known.uid == node.uid);
        // An agent whose last session was here, as it knows itself and the Node does not deny, was nobody else's since. One that has just
        // started may have lost its store, or an old one was put back: the watch alone, which may lag, does not say whose it was.
        let claims = known.is_none_or(|known| {
            let claims =
                if last_epoch == 0 { known.claim != 0 } else { (last_epoch.max(known.claim), who) != known.here };
            if !claims {
                known.here = (epoch, who);
            }
            claims
        });
        Session {
            node: node.clone(),
            epoch,
            last_epoch,
            claims,
            wake,
            told: Told::default(),
            said: Said::default(),
            complete: Collections::default(),
            held_back: BTreeSet::new(),
            begun: false,
            asked: Collections::default(),
            answered: Collections::default(),
            kept: HashMap::new(),
        }
    }

    /// Ends one.
    pub(crate) fn close(&mut self, session: &Session) {
        self.subscribers.set_behind(session, false);
        if let Some(subscribers) = self.subscribers.by_node.get_mut(&session.node.name) {
            subscribers.retain(|subscriber| !Arc::ptr_eq(&subscriber.wake, &session.wake));
            if subscribers.is_empty() {
                self.subscribers.by_node.remove(&session.node.name);
            }
        }
    }

    /// The edge said what it holds.
    pub(crate) fn inventory(
        &mut self,
        session: &mut Session,
        collection: Collection,
        entries: &[Entry],
        now: Timestamp,
    ) {
        if matches!(collection, Collection::ConfigMaps | Collection::Secrets) {
            self.keep_unfetched(session, collection, entries);
        }
        if collection != Collection::Tokens {
            return;
        }
        let Some(node) = self.nodes.get_mut(session.node.name.as_str()).filter(|node| node.uid == session.node.uid)
        else {
            return;
        };
        for key in node.tokens.inventory(entries, now) {
            self.subscribers.mark(&session.node.name, Collection::Tokens, &key);
        }
        self.subscribers.wake(&session.node.name);
        let name: Arc<str> = session.node.name.as_str().into();
        self.schedule(&name);
    }

    /// Remembers what the edge holds of what cannot be fetched.
    fn keep_unfetched(&mut self, session: &mut Session, collection: Collection, entries: &[Entry]) {
        let name = session.node.name.clone();
        session.answered.insert(collection);
        let held: HashMap<&str, &Entry> = entries.iter().map(|entry| (entry.key.as_str(), entry)).collect();
        let Some(node) = self.nodes.get(name.as_str()) else { return };
        let failed =
            |id: &&(Collection, String)| id.0 == collection && self.is(id, &|known| matches!(known, Known::Failed));
        let failed: Vec<(Collection, String)> = node.references.keys().filter(failed).cloned().collect();
        for id in failed {
            match held.get(id.1.as_str()) {
                Some(entry) => drop(session.kept.insert(id.clone(), (*entry).clone())),
                None => drop(session.kept.remove(&id)),
            }
            self.subscribers.mark(&name, collection, &id.1);
        }
        self.subscribers.wake(&name);
    }

    fn is(&self, id: &(Collection, String), what: &dyn Fn(&Known) -> bool) -> bool {
        self.slots.get(id).is_some_and(|slot| what(&slot.value))
    }

    /// What a session has to say now: what pods and devices need before them, pods that went before those that come, and what nobody needs any
    /// more last.
    pub(crate) fn drain(&mut self, session: &mut Session) -> Vec<FeedEvent> {
        let mut events = Vec::new();
        if self.is_superseded(&session.node, session.epoch) {
            return vec![FeedEvent::Superseded];
        }
        let Some(node) = self.nodes.get_mut(session.node.name.as_str()).filter(|node| node.uid == session.node.uid)
        else {
            return events;
        };
        let Some((mut changed, everything)) = self.subscribers.take(&session.node.name, session.epoch) else {
            return events;
        };
        if !session.begun && node.listed && self.ready.contains(&Source::Pods) {
            session.begun = true;
            if node.tokens.open(session.epoch, session.last_epoch) {
                events.push(FeedEvent::Ask(Collection::Tokens));
            }
            let name: Arc<str> = session.node.name.as_str().into();
            self.schedule(&name);
        }
        let Some(node) = self.nodes.get(session.node.name.as_str()) else { return events };
        if everything {
            changed.extend(self.keys(&session.node.name, node));
            changed.extend(session.told.ids().map(|(collection, key)| (collection, key.to_owned())));
        }
        changed.extend(std::mem::take(&mut session.held_back).into_iter().map(|key| (Collection::Pods, key)));

        let (mut needed, mut pods_gone, mut pods, mut unneeded) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (collection, key) in changed {
            let id = (collection, key);
            let refers = matches!(collection, Collection::Pods | Collection::Devices);
            let (gone, here) = if refers { (&mut pods_gone, &mut pods) } else { (&mut unneeded, &mut needed) };
            let (telling, event) = match self.truth(session, node, &id) {
                Truth::NotYet => {
                    session.held_back.insert(id.1);
                    continue;
                }
                Truth::Not => {
                    let told = session.told.remove((collection, &id.1));
                    gone.extend(told.map(|told| FeedEvent::Gone(collection, told.entry().uid.clone())));
                    continue;
                }
                Truth::Is(object) => (Telling::Object(object.clone()), FeedEvent::Desired(object)),
                Truth::Kept(entry) => {
                    (Telling::Keep(collection, entry.clone().into()), FeedEvent::Keep(collection, entry))
                }
            };
            let (uid, version) = (telling.entry().uid.clone(), telling.entry().version);
            match session.told.insert(telling) {
                Some(told) if told.entry().uid != uid => {
                    gone.push(FeedEvent::Gone(collection, told.entry().uid.clone()))
                }
                Some(told) if told.entry().version == version => continue,
                _ => {}
            }
            here.push(event);
        }
        for part in [needed, pods_gone, pods, unneeded] {
            events.extend(part);
        }
        for collection in [Collection::ConfigMaps, Collection::Secrets] {
            if session.begun
                && !session.complete.contains(collection)
                && self.stuck(node, collection)
                && session.asked.insert(collection)
            {
                events.insert(0, FeedEvent::Ask(collection));
            }
        }
        for collection in COLLECTIONS {
            if !session.complete.contains(collection) && self.complete(node, session, collection) {
                session.complete.insert(collection);
                events.push(FeedEvent::Complete(collection));
            }
        }
        self.say(session, &mut events);
        events
    }

    fn truth(&self, session: &Session, node: &Node, (collection, key): &(Collection, String)) -> Truth {
        let found = match collection {
            Collection::Settings => Some(&self.settings),
            Collection::Node => Some(&node.object).filter(|_| *key == session.node.name),
            Collection::Services => {
                let linked = key == KUBERNETES || node.service_namespaces.contains_key(namespace_of(key));
                self.services.get(key).filter(|_| linked)
            }
            Collection::RuntimeClasses => {
                let referred = node.references.contains_key(&(*collection, key.clone()));
                self.runtime_classes.get(key).filter(|_| referred)
            }
            Collection::ConfigMaps | Collection::Secrets => {
                let id = (*collection, key.clone());
                match self.slots.get(&id).filter(|_| node.references.contains_key(&id)).map(|slot| &slot.value) {
                    Some(Known::Present(object)) => Some(object),
                    Some(Known::Failed) => return session.kept.get(&id).cloned().map_or(Truth::Not, Truth::Kept),
                    _ => None,
                }
            }
            Collection::Tokens => match node.tokens.wanted(key) {
                Some(Wanted::Object(object)) => return Truth::Is(object),
                Some(Wanted::Keep(entry)) => return Truth::Kept(entry),
                None => None,
            },
            Collection::Pods => match node.pods.get(key) {
                Some(pod) if !self.may_start(node, pod) => return Truth::NotYet,
                pod => pod.map(|pod| &pod.object),
            },
            Collection::Devices => self.devices.of(&session.node.name, key),
            Collection::DeviceModels => self.model_of(node, key),
            Collection::Unspecified => None,
        };
        found.cloned().map_or(Truth::Not, Truth::Is)
    }

    /// Whether everything a pod refers to has been looked up. One that is being deleted needs nothing any more.
    fn may_start(&self, node: &Node, pod: &Pod) -> bool {
        pod.facts.deleting
            || self.ready.contains(&Source::Services)
                && pod.references.service_namespace.iter().all(|namespace| self.services.are_known(namespace))
                && self.ready.contains(&Source::RuntimeClasses)
                && node.tokens.pod_settled(&pod.facts.uid)
                && pod
                    .references
                    .objects
                    .iter()
                    .all(|reference| self.slots.get(reference).is_none_or(|slot| !matches!(slot.value, Known::Unknown)))
    }

    fn complete(&self, node: &Node, session: &Session, collection: Collection) -> bool {
        let ready = |source| self.ready.contains(&source);
        let pods = session.begun;
        match collection {
            Collection::Settings => !self.configured_dns.is_empty() || ready(Source::Services),
            Collection::Node => true,
            Collection::Devices => self.devices_complete(&session.node.name),
            Collection::DeviceModels => self.models_complete(&session.node.name),
            Collection::Services => pods && ready(Source::Services) && self.services_known(node),
            Collection::RuntimeClasses => pods && ready(Source::RuntimeClasses),
            Collection::ConfigMaps | Collection::Secrets => {
                let answered = session.answered.contains(collection);
                let known = |known: &Known| match known {
                    Known::Absent | Known::Present(_) => true,
                    Known::Failed => answered,
                    Known::Unknown => false,
                };
                pods && node.references.keys().filter(|id| id.0 == collection).all(|id| self.is(id, &known))
            }
            Collection::Tokens => pods && node.tokens.settled(),
            Collection::Pods => pods && session.held_back.is_empty(),
            Collection::Unspecified => false,
        }
    }

    /// Whether something of a collection cannot be fetched, and all the rest is known.
    fn stuck(&self, node: &Node, collection: Collection) -> bool {
        let ids = || node.references.keys().filter(|id| id.0 == collection);
        ids().any(|id| self.is(id, &|known| matches!(known, Known::Failed)))
            && !ids().any(|id| self.is(id, &|known| matches!(known, Known::Unknown)))
    }

    /// Everything in a node's closure.
    fn keys(&self, name: &str, node: &Node) -> BTreeSet<(Collection, String)> {
        let mut keys: BTreeSet<(Collection, String)> = node.references.keys().cloned().collect();
        keys.insert((Collection::Settings, SETTINGS.to_owned()));
        keys.insert((Collection::Node, name.to_owned()));
        keys.insert((Collection::Services, KUBERNETES.to_owned()));
        for namespace in node.service_namespaces.keys() {
            keys.extend(self.services.keys_in(namespace).map(|key| (Collection::Services, key.clone())));
        }
        keys.extend(node.tokens.keys().map(|key| (Collection::Tokens, key.clone())));
        keys.extend(self.devices.keys(name).map(|key| (Collection::Devices, key.to_string())));
        keys.extend(node.pods.keys().map(|key| (Collection::Pods, key.clone())));
        keys
    }
}
