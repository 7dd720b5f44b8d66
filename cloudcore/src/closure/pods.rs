//! The pods of each node, and what they hold by reference: an object is in a node's closure while one of its pods refers to it.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use skerry_proto::sync::{Collection, Object};

use super::references::References;
use super::{Closures, Fetch, Known, Pod, PodFacts, PodInput, objects};

impl Closures {
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
    pub(crate) fn pods_of(&self, node: &str) -> Vec<(String, Arc<Object>, PodFacts)> {
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

    pub(super) fn unbind(&mut self, name: &str, key: &str) {
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
                // One that is being fetched is as new as its answer, whoever it was begun for.
                if matches!(slot.value, Known::Unknown | Known::Failed) && slot.state == Fetch::Idle {
                    fetch.push(reference.clone());
                }
            }
        }
        if let Some(namespace) = &references.service_namespace {
            let count = node.service_namespaces.entry(namespace.clone()).or_default();
            *count += 1;
            if *count == 1 {
                self.services.acquire(namespace, name);
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
                // What is under way for nobody goes when its answer comes: until then it must not be taken for the answer to another question.
                if slot.nodes.is_empty() && matches!(slot.state, Fetch::Idle | Fetch::Queued) {
                    self.slots.remove(reference);
                }
            }
        }
        if let Some(namespace) = &references.service_namespace
            && release(&mut node.service_namespaces, namespace)
        {
            self.mark_namespace(name, namespace);
            self.services.release(namespace, name);
        }
    }
}

/// Counts one down. Answers whether it was the last.
pub(super) fn release<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, u32>, key: &K) -> bool {
    match counts.get_mut(key) {
        Some(count) if *count > 1 => {
            *count -= 1;
            false
        }
        Some(_) => counts.remove(key).is_some(),
        None => false,
    }
}
