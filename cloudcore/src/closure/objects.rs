//! What pods refer to: RuntimeClasses held whole, ConfigMaps and Secrets fetched while some node needs them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use serde_json::Value;
use skerry_proto::sync::{Collection, Object};
use tracing::warn;

use super::{Closures, Fetch, Known, Reference, Source, sanitise};

impl Closures {
    /// A RuntimeClass is there.
    pub(crate) fn runtime_class_applied(&mut self, class: Value) {
        let object = sanitise::object(Collection::RuntimeClasses, class);
        let name = object.entry.key.clone();
        let object = succeeding(object, self.runtime_classes.get(&name));
        if self.runtime_classes.get(&name) != Some(&object) {
            self.runtime_classes.insert(name.clone(), object);
            self.mark_referring(&(Collection::RuntimeClasses, name));
        }
    }

    /// A RuntimeClass is gone.
    pub(crate) fn runtime_class_removed(&mut self, name: &str) {
        if self.runtime_classes.remove(name).is_some() {
            self.mark_referring(&(Collection::RuntimeClasses, name.to_owned()));
        }
    }

    /// Drops the RuntimeClasses that a complete list did not show.
    pub(crate) fn runtime_classes_retain(&mut self, names: &HashSet<String>) {
        let gone: Vec<String> = self.runtime_classes.keys().filter(|name| !names.contains(*name)).cloned().collect();
        for name in gone {
            self.runtime_class_removed(&name);
        }
    }

    /// A ConfigMap's or Secret's metadata says it is at this version now.
    pub(crate) fn metadata_seen(&mut self, reference: &Reference, resource_version: &str) {
        let Some(slot) = self.slots.get_mut(reference).filter(|slot| slot.resource_version != resource_version) else {
            return;
        };
        match slot.state {
            Fetch::UnderWay | Fetch::Again(Some(_)) => slot.state = Fetch::Again(Some(resource_version.to_owned())),
            Fetch::Idle | Fetch::Queued | Fetch::Again(None) => self.request(reference),
        }
    }

    /// Its metadata says it is gone, or a complete list did not show it: the object itself is asked.
    pub(crate) fn metadata_gone(&mut self, reference: &Reference) {
        self.request(reference);
    }

    /// Whether some node still refers to it.
    pub(crate) fn needs(&self, reference: &Reference) -> bool {
        self.slots.get(reference).is_some_and(|slot| !slot.nodes.is_empty())
    }

    /// Whether what is held of it may be older than what the watch told.
    pub(super) fn is_being_fetched(&self, reference: &Reference) -> bool {
        self.slots.get(reference).is_some_and(|slot| slot.state != Fetch::Idle)
    }

    /// What is held of a collection.
    pub(crate) fn held(&self, collection: Collection) -> Vec<Reference> {
        self.slots.keys().filter(|(of, _)| *of == collection).cloned().collect()
    }

    /// The next object to fetch.
    pub(crate) fn take_fetch(&mut self) -> Option<Reference> {
        while let Some(reference) = self.fetch.pop_front() {
            if let Some(slot) = self.slots.get_mut(&reference).filter(|slot| slot.state == Fetch::Queued) {
                slot.state = Fetch::UnderWay;
                return Some(reference);
            }
        }
        None
    }

    /// What waits to be fetched of one kind in one namespace, where it is so much that a list costs less.
    pub(crate) fn take_bulk(&mut self, least: usize) -> Option<(Collection, String, HashSet<Reference>)> {
        if self.fetch.len() < least {
            return None;
        }
        let mut counts: HashMap<(Collection, &str), usize> = HashMap::new();
        let namespace = |key: &str| key.split_once('/').map_or(0, |(namespace, _)| namespace.len());
        for (collection, key) in &self.fetch {
            *counts.entry((*collection, &key[..namespace(key)])).or_default() += 1;
        }
        let (collection, name) =
            counts.into_iter().find(|(_, count)| *count >= least).map(|((of, name), _)| (of, name.to_owned()))?;
        let is_part = |(of, key): &Reference| *of == collection && key[..namespace(key)] == name;
        let (taken, rest): (VecDeque<Reference>, _) = self.fetch.drain(..).partition(is_part);
        self.fetch = rest;
        let begun = |reference: &Reference| {
            let slot = self.slots.get_mut(reference).filter(|slot| slot.state == Fetch::Queued);
            slot.map(|slot| slot.state = Fetch::UnderWay).is_some()
        };
        Some((collection, name, taken.into_iter().filter(begun).collect()))
    }

    /// Nobody fetches any more: everything is to be fetched anew, for what was in hand or waited for its next try is not known.
    pub(crate) fn fetches_abandoned(&mut self) {
        self.slots.retain(|_, slot| !slot.nodes.is_empty());
        self.fetch = self.slots.keys().cloned().collect();
        for slot in self.slots.values_mut() {
            slot.state = Fetch::Queued;
        }
    }

    /// What became of a fetch: the object, nothing (404), or no answer; the last is to be asked again by [`Closures::metadata_gone`].
    pub(crate) fn fetched(&mut self, reference: &Reference, answer: Result<Option<Value>, ()>) {
        if let Ok(Some(value)) = &answer {
            let source = if reference.0 == Collection::Secrets { Source::Secrets } else { Source::ConfigMaps };
            self.shows(source, value["metadata"]["resourceVersion"].as_str().unwrap_or_default());
        }
        let Some(slot) = self.slots.get_mut(reference) else { return };
        if slot.nodes.is_empty() {
            self.slots.remove(reference);
            return;
        }
        let before = std::mem::take(&mut slot.state);
        match answer {
            Ok(Some(value)) => {
                slot.resource_version = value["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
                let object = sanitise::object(reference.0, value);
                slot.value = if object.is_deliverable() {
                    Known::Present(match &slot.value {
                        Known::Present(before) => succeeding(object, Some(before)),
                        Known::Unknown | Known::Failed | Known::Absent => object.into(),
                    })
                } else {
                    warn!(collection = ?reference.0, key = reference.1, "too large to be sent to an edge node, which does without it");
                    Known::Absent
                };
            }
            Ok(None) => {
                slot.resource_version.clear();
                slot.value = Known::Absent;
            }
            Err(()) if matches!(slot.value, Known::Unknown) => slot.value = Known::Failed,
            Err(()) => {}
        }
        for node in &slot.nodes {
            self.subscribers.mark(node, reference.0, &reference.1);
        }
        if matches!(before, Fetch::Again(version) if version.as_ref() != Some(&slot.resource_version)) {
            self.request(reference);
        }
    }

    /// Has an object fetched unless that is about to happen anyway.
    pub(super) fn request(&mut self, reference: &Reference) {
        let Some(slot) = self.slots.get_mut(reference) else { return };
        match slot.state {
            Fetch::Idle => {
                slot.state = Fetch::Queued;
                self.fetch.push_back(reference.clone());
                self.fetch_wake.notify_one();
            }
            Fetch::UnderWay | Fetch::Again(_) => slot.state = Fetch::Again(None),
            Fetch::Queued => {}
        }
    }

    pub(super) fn mark_referring(&mut self, reference: &Reference) {
        for (name, node) in &self.nodes {
            if node.references.contains_key(reference) {
                self.subscribers.mark(name, reference.0, &reference.1);
            }
        }
    }
}

/// An object in the place of the one that was known before, if any; that one itself when nothing changed.
pub(super) fn succeeding(object: Object, before: Option<&Arc<Object>>) -> Arc<Object> {
    match before {
        Some(before) if before.entry == object.entry => Arc::clone(before),
        Some(before) => object.succeeding(before).into(),
        None => object.into(),
    }
}
