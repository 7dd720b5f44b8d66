//! Devices and the models they refer to.
//!
//! Of a device whose node is no edge node only its name is held: if that node joins, the device is fetched. All models are held, for there
//! are few, and a node gets those that its devices refer to.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use serde_json::Value;
use skerry_proto::sync::{Collection, MAX_DEVICES, MAX_DEVICES_BYTES, Object};
use tokio::sync::Notify;
use tracing::warn;

use super::pods::release;
use super::{Closures, Node, Reference, Source, objects, sanitise, version_less};

pub(crate) mod lost;
#[cfg(test)]
mod tests;

/// Devices that one node gets; more, or more than [`MAX_DEVICES_BYTES`] of names, are left out, and an event on each says so. Few in tests.
pub(crate) const MOST: usize = if cfg!(test) { 500 } else { MAX_DEVICES };

/// A Device or DeviceModel of the apiserver's.
#[derive(Clone, Debug)]
pub(crate) struct DeviceInput {
    /// `namespace/name`.
    pub(crate) key: String,
    uid: String,
    resource_version: String,
    node: String,
    model: Option<String>,
    state: String,
    /// As the edge gets it; of a device only if its node is an edge node.
    object: Option<Object>,
}

impl DeviceInput {
    /// Takes a Device apart; `ours`: its node is an edge node.
    pub(crate) fn device(device: Value, ours: bool) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let model = device["spec"]["deviceModelRef"]["name"].as_str().filter(|name| !name.is_empty());
        let namespace = device["metadata"]["namespace"].as_str().unwrap_or_default();
        Self {
            key: sanitise::key(&device),
            uid: text(&device["metadata"]["uid"]),
            resource_version: text(&device["metadata"]["resourceVersion"]),
            node: text(&device["spec"]["nodeName"]),
            model: model.map(|name| format!("{namespace}/{name}")),
            state: text(&device["status"]["state"]),
            object: ours.then(|| sanitise::object(Collection::Devices, device)),
        }
    }

    /// Takes a DeviceModel apart.
    pub(crate) fn model(model: Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Self {
            key: sanitise::key(&model),
            uid: text(&model["metadata"]["uid"]),
            resource_version: text(&model["metadata"]["resourceVersion"]),
            node: String::new(),
            model: None,
            state: String::new(),
            object: Some(sanitise::object(Collection::DeviceModels, model)),
        }
    }
}

impl DeviceInput {
    /// Node and UID of a device that shows that nothing is known of it.
    pub(crate) fn is_unknown(&self) -> Option<(&str, &str)> {
        (self.state == lost::UNKNOWN).then_some((&*self.node, &*self.uid))
    }

    /// What reports are held against; whether it fits its model is not known here.
    pub(crate) fn facts(self) -> DeviceFacts {
        let Self { node, uid, state, resource_version: version, .. } = self;
        DeviceFacts { node, uid, state, problem: None, version, written: None }
    }
}

/// What reports of a device are held against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeviceFacts {
    /// spec.nodeName
    pub(crate) node: String,
    /// metadata.uid
    pub(crate) uid: String,
    /// status.state
    pub(crate) state: String,
    /// Why it does not fit its model, if it does not.
    pub(crate) problem: Option<String>,
    /// metadata.resourceVersion
    pub(crate) version: String,
    /// The version of its DeviceStatus, if that was last written here for all that is known.
    pub(crate) written: Option<String>,
}

/// A device to be looked at: see [`Closures::take_review`].
#[derive(Clone, Debug)]
pub(crate) struct Review {
    /// `namespace/name`.
    pub(crate) key: Arc<str>,
    /// The device; `None` when its node has too many.
    pub(crate) device: Option<Arc<Object>>,
    /// Its UID.
    pub(crate) uid: String,
    /// The model, if it is there.
    pub(crate) model: Option<Arc<Object>>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Devices {
    /// Whether the apiserver serves devices, once that is known.
    served: Option<bool>,
    devices: HashMap<Arc<str>, Device>,
    nodes: HashMap<Arc<str>, OnNode>,
    models: HashMap<String, Model>,
    /// How many lists have begun, of devices and of models.
    lists: u64,
    fetch: VecDeque<Arc<str>>,
    fetch_wake: Arc<Notify>,
    /// Those that show a state, and that no node has any more.
    left: BTreeSet<Arc<str>>,
    review: BTreeSet<Arc<str>>,
    review_wake: Arc<Notify>,
}

#[derive(Debug)]
struct Device {
    uid: String,
    resource_version: Box<str>,
    /// Empty: on none.
    node: Arc<str>,
    /// The list it was last seen in or after.
    seen: u64,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// Its node is no edge node.
    Elsewhere,
    /// It is being fetched.
    Missing,
    /// Its node has as many as it may.
    LeftOut,
    Held(Box<Held>),
}

#[derive(Debug)]
struct Held {
    object: Arc<Object>,
    model: Option<Reference>,
    state: String,
    problem: Option<String>,
    /// The version of its DeviceStatus that a session here has written.
    written: Option<Box<str>>,
}

/// The devices of one node, be it an edge node or not.
#[derive(Debug, Default)]
struct OnNode {
    keys: BTreeSet<Arc<str>>,
    missing: usize,
    held: usize,
    left_out: usize,
    /// Bytes of keys and UIDs of those that are held.
    names: usize,
    /// How many of those that are held show that something is known of them.
    known: usize,
}

#[derive(Debug)]
struct Model {
    resource_version: String,
    object: Arc<Object>,
    seen: u64,
}

impl OnNode {
    fn is_full(&self, key: &str, uid: &str) -> bool {
        self.held >= MOST || self.names + key.len() + uid.len() > MAX_DEVICES_BYTES
    }

    fn count(&mut self, place: &Place) -> Option<&mut usize> {
        match place {
            Place::Elsewhere => None,
            Place::Missing => Some(&mut self.missing),
            Place::LeftOut => Some(&mut self.left_out),
            Place::Held(_) => Some(&mut self.held),
        }
    }
}

impl Devices {
    fn put(&mut self, key: Arc<str>, device: Device) {
        let on = self.nodes.entry(device.node.clone()).or_default();
        on.keys.insert(key.clone());
        on.count(&device.place).into_iter().for_each(|count| *count += 1);
        if matches!(device.place, Place::Held(_)) {
            on.names += key.len() + device.uid.len();
        }
        on.known += usize::from(device.is_known());
        if matches!(device.place, Place::Missing) {
            self.fetch.push_back(key.clone());
            self.fetch_wake.notify_one();
        }
        if matches!(device.place, Place::Held(_) | Place::LeftOut) {
            self.review(key.clone());
        }
        self.devices.insert(key, device);
    }

    fn take(&mut self, key: &str) -> Option<(Arc<str>, Device)> {
        let (key, device) = self.devices.remove_entry(key)?;
        if let Some(on) = self.nodes.get_mut(&device.node) {
            on.keys.remove(&key);
            on.count(&device.place).into_iter().for_each(|count| *count -= 1);
            if matches!(device.place, Place::Held(_)) {
                on.names -= key.len() + device.uid.len();
            }
            on.known -= usize::from(device.is_known());
            if on.keys.is_empty() {
                self.nodes.remove(&device.node);
            }
        }
        self.review.remove(&key);
        self.left.remove(&key);
        Some((key, device))
    }

    fn review(&mut self, key: Arc<str>) {
        self.review.insert(key);
        self.review_wake.notify_one();
    }

    /// A device of a node, as the node gets it.
    pub(super) fn of(&self, node: &str, key: &str) -> Option<&Arc<Object>> {
        match self.devices.get(key).filter(|device| *device.node == *node).map(|device| &device.place) {
            Some(Place::Held(held)) => Some(&held.object),
            _ => None,
        }
    }

    /// A model, whoever refers to it.
    pub(super) fn model(&self, key: &str) -> Option<&Arc<Object>> {
        self.models.get(key).map(|model| &model.object)
    }

    /// The devices of a node.
    pub(super) fn keys(&self, node: &str) -> impl Iterator<Item = &Arc<str>> {
        self.nodes.get(node).into_iter().flat_map(|on| &on.keys)
    }

    /// Whether every device of a node is here that should be.
    pub(super) fn all_here(&self, node: &str) -> bool {
        self.nodes.get(node).is_none_or(|on| on.missing == 0)
    }

    /// Whether the apiserver is known not to have any.
    pub(super) fn is_unserved(&self) -> bool {
        self.served == Some(false)
    }

    /// How many devices and models are held.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.nodes.values().map(|on| on.held).sum(), self.models.len())
    }
}

impl Closures {
    /// Whether the apiserver serves devices: without, nothing waits for them.
    pub(crate) fn devices_served(&mut self, is_served: bool) {
        if self.devices.served.replace(is_served) != Some(is_served) {
            self.subscribers.wake_all();
            self.ready_wake.notify_waiters();
        }
    }

    /// Whether it is known that it does.
    pub(crate) fn serves_devices(&self) -> bool {
        self.devices.served == Some(true)
    }

    /// A list of devices or models begins: its number.
    pub(crate) fn devices_list_begins(&mut self) -> u64 {
        self.devices.lists += 1;
        self.devices.lists
    }

    /// A device is there; `seen` is the list that shows it, or the last before the change that does.
    pub(crate) fn device_applied(&mut self, input: DeviceInput, seen: u64) {
        let DeviceInput { key, uid, resource_version, node, model, state, object } = input;
        if let Some(known) = self.devices.devices.get_mut(key.as_str()) {
            known.seen = known.seen.max(seen);
            if known.uid == uid && !version_less(&known.resource_version, &resource_version) {
                // The same state again is news only if more of it came this time.
                let is_wanted = matches!(known.place, Place::Missing) && *known.resource_version == *resource_version;
                if !is_wanted || object.is_none() {
                    return;
                }
            }
        }
        let was_left = self.devices.left.contains(key.as_str());
        let before = self.devices.take(&key);
        let (key, before) = match before {
            Some((key, before)) => (key, Some(before)),
            None => (Arc::from(key), None),
        };
        let seen = before.as_ref().map_or(seen, |before| before.seen.max(seen));
        let name = self.nodes.get_key_value(node.as_str()).map(|(name, _)| name.clone());
        let name = name.or_else(|| self.devices.nodes.get_key_value(node.as_str()).map(|(name, _)| name.clone()));
        let name = name.unwrap_or_else(|| node.as_str().into());
        let is_ours = self.nodes.contains_key(&name);
        let (mut was_on, mut was) = (None, None);
        let was_ours = before.as_ref().is_some_and(|before| matches!(before.place, Place::Held(_)));
        let is_left = !is_ours && lost::is_known(&state) && (was_ours || was_left);
        if let Some(before) = before {
            if let Place::Held(held) = before.place {
                self.release_model(&before.node, held.model.as_ref());
                was = Some(held);
            }
            was_on = Some(before.node);
        }
        let place = match object {
            _ if !is_ours => Place::Elsewhere,
            None => Place::Missing,
            Some(_) if self.devices.nodes.get(&name).is_some_and(|on| on.is_full(&key, &uid)) => Place::LeftOut,
            Some(object) => {
                let object = objects::succeeding(object, was.as_ref().map(|was| &was.object));
                let model = model.map(|model| (Collection::DeviceModels, model));
                let (problem, written) = was.map_or((None, None), |was| (was.problem, was.written));
                self.acquire_model(&name, model.as_ref());
                Place::Held(Box::new(Held { object, model, state, problem, written }))
            }
        };
        self.devices.put(
            key.clone(),
            Device { uid, resource_version: resource_version.into(), node: name.clone(), seen, place },
        );
        if is_left {
            self.devices.left.insert(key.clone());
        }
        self.subscribers.mark(&name, Collection::Devices, &key);
        if let Some(was_on) = was_on.filter(|was_on| *was_on != name) {
            self.subscribers.mark(&was_on, Collection::Devices, &key);
            self.admit(&was_on);
        }
    }

    /// The apiserver no longer has this device.
    pub(crate) fn device_removed(&mut self, key: &str, uid: &str) {
        if self.devices.devices.get(key).is_none_or(|device| device.uid != uid) {
            return;
        }
        let Some((key, device)) = self.devices.take(key) else { return };
        if let Place::Held(held) = &device.place {
            self.release_model(&device.node, held.model.as_ref());
        }
        self.subscribers.mark(&device.node, Collection::Devices, &key);
        self.admit(&device.node);
    }

    /// A model is there.
    pub(crate) fn model_applied(&mut self, input: DeviceInput, seen: u64) {
        let DeviceInput { key, resource_version, object, .. } = input;
        let Some(object) = object else { return };
        let before = self.devices.models.get_mut(&key);
        if let Some(before) = before {
            before.seen = before.seen.max(seen);
            if before.object.entry.uid == object.entry.uid && version_less(&resource_version, &before.resource_version)
            {
                return;
            }
        }
        let before = self.devices.models.remove(&key);
        let object = objects::succeeding(object, before.as_ref().map(|before| &before.object));
        let is_news = before.as_ref().is_none_or(|before| before.object != object);
        let seen = before.map_or(seen, |before| before.seen.max(seen));
        self.devices.models.insert(key.clone(), Model { resource_version, object, seen });
        if is_news {
            self.model_changed(key);
        }
    }

    /// The apiserver no longer has this model.
    pub(crate) fn model_removed(&mut self, key: &str, uid: &str) {
        if self.devices.models.get(key).is_some_and(|model| model.object.entry.uid == uid) {
            self.devices.models.remove(key);
            self.model_changed(key.to_owned());
        }
    }

    /// Devices that a complete list, the one of this number, did not show: key and UID.
    pub(crate) fn devices_unseen(&self, list: u64) -> Vec<(String, String)> {
        let unseen = self.devices.devices.iter().filter(|(_, device)| device.seen < list);
        unseen.map(|(key, device)| (key.to_string(), device.uid.clone())).collect()
    }

    /// The same of models.
    pub(crate) fn models_unseen(&self, list: u64) -> Vec<(String, String)> {
        let unseen = self.devices.models.iter().filter(|(_, model)| model.seen < list);
        unseen.map(|(key, model)| (key.clone(), model.object.entry.uid.clone())).collect()
    }

    /// What is known of a device.
    pub(crate) fn device(&self, key: &str) -> Option<DeviceFacts> {
        let device = self.devices.devices.get(key)?;
        let held = match &device.place {
            Place::Held(held) => Some(held),
            _ => None,
        };
        Some(DeviceFacts {
            node: device.node.to_string(),
            uid: device.uid.clone(),
            state: held.map(|held| held.state.clone()).unwrap_or_default(),
            problem: held.and_then(|held| held.problem.clone()),
            version: device.resource_version.to_string(),
            written: held.and_then(|held| held.written.as_deref().map(str::to_owned)),
        })
    }

    /// A session here has written the DeviceStatus of a device, or found that somebody else has (`None`).
    pub(crate) fn device_written(&mut self, key: &str, uid: &str, version: Option<&str>) {
        let device = self.devices.devices.get_mut(key).filter(|device| device.uid == uid);
        if let Some(Device { place: Place::Held(held), .. }) = device {
            held.written = version.map(Into::into);
        }
    }

    /// Notified when there is a device to fetch.
    pub(crate) fn device_wake(&self) -> Arc<Notify> {
        self.devices.fetch_wake.clone()
    }

    /// The next device to fetch. It is to be asked for until there is an answer.
    pub(crate) fn take_device(&mut self) -> Option<Arc<str>> {
        while let Some(key) = self.devices.fetch.pop_front() {
            if self.is_missing(&key) {
                return Some(key);
            }
        }
        None
    }

    /// What became of it: the device, or nothing (404).
    pub(crate) fn device_fetched(&mut self, key: &str, found: Option<DeviceInput>) {
        // What the watch has taken away meanwhile does not come back by an answer that is older.
        let Some(device) = self.devices.devices.get(key).filter(|device| matches!(device.place, Place::Missing)) else {
            return;
        };
        let uid = device.uid.clone();
        match found {
            Some(input) => self.device_applied(input, 0),
            None => self.device_removed(key, &uid),
        }
    }

    /// Nobody fetches any more: all that is missing is to be fetched anew.
    pub(crate) fn devices_abandoned(&mut self) {
        let missing = self.devices.devices.iter().filter(|(_, device)| matches!(device.place, Place::Missing));
        self.devices.fetch = missing.map(|(key, _)| key.clone()).collect();
    }

    /// Whether this device is still being fetched.
    pub(crate) fn is_missing(&self, key: &str) -> bool {
        self.devices.devices.get(key).is_some_and(|device| matches!(device.place, Place::Missing))
    }

    /// Notified when there is a device to look at.
    pub(crate) fn review_wake(&self) -> Arc<Notify> {
        self.devices.review_wake.clone()
    }

    /// A device that changed, or whose model did, to be looked at outside.
    pub(crate) fn take_review(&mut self) -> Option<Review> {
        if !self.is_ready(Source::Devices) || !self.is_ready(Source::DeviceModels) {
            return None;
        }
        while let Some(key) = self.devices.review.pop_first() {
            let Some(device) = self.devices.devices.get(&key) else { continue };
            let uid = device.uid.clone();
            match &device.place {
                Place::Held(held) => {
                    let model = held.model.as_ref().and_then(|(_, model)| self.devices.model(model)).cloned();
                    return Some(Review { key, device: Some(held.object.clone()), uid, model });
                }
                Place::LeftOut => return Some(Review { key, device: None, uid, model: None }),
                Place::Elsewhere | Place::Missing => {}
            }
        }
        None
    }

    /// What was found. Answers whether that is news.
    pub(crate) fn reviewed(&mut self, key: &str, uid: &str, problem: Option<String>) -> bool {
        let Some(device) = self.devices.devices.get_mut(key).filter(|device| device.uid == uid) else { return false };
        match &mut device.place {
            Place::Held(held) => {
                let is_news = problem.is_some() && held.problem != problem;
                held.problem = problem;
                is_news
            }
            Place::LeftOut => true,
            Place::Elsewhere | Place::Missing => false,
        }
    }

    /// A node became an edge node: its devices are fetched.
    pub(super) fn fetch_devices_of(&mut self, name: &str) {
        self.move_devices_of(name, || Place::Missing);
    }

    /// A node is gone: its devices are not needed.
    pub(super) fn drop_devices_of(&mut self, name: &str) {
        self.move_devices_of(name, || Place::Elsewhere);
    }

    fn move_devices_of(&mut self, name: &str, place: impl Fn() -> Place) {
        let keys: Vec<Arc<str>> = self.devices.keys(name).cloned().collect();
        for key in keys {
            if let Some((key, device)) = self.devices.take(&key) {
                let place = place();
                let shows = device.is_known();
                if shows && matches!(place, Place::Elsewhere) {
                    self.devices.left.insert(key.clone());
                }
                self.devices.put(key, Device { place, ..device });
            }
        }
    }

    /// Fetches one that was left out, if there is room by now.
    fn admit(&mut self, name: &str) {
        let Some(on) = self.devices.nodes.get(name).filter(|on| on.left_out > 0 && on.held + on.missing < MOST) else {
            return;
        };
        let left_out = |key: &&Arc<str>| {
            self.devices.devices.get(*key).is_some_and(|device| matches!(device.place, Place::LeftOut))
        };
        if let Some(key) = on.keys.iter().find(left_out).cloned()
            && let Some((key, device)) = self.devices.take(&key)
        {
            warn!(node = name, device = &*key, "there is room for a device that was left out");
            self.devices.put(key, Device { place: Place::Missing, ..device });
        }
    }

    fn model_changed(&mut self, key: String) {
        let reference = (Collection::DeviceModels, key);
        self.mark_referring(&reference);
        let refers =
            |device: &Device| matches!(&device.place, Place::Held(held) if held.model.as_ref() == Some(&reference));
        let referring = self.devices.devices.iter().filter(|(_, device)| refers(device));
        let referring: Vec<Arc<str>> = referring.map(|(key, _)| key.clone()).collect();
        self.devices.review.extend(referring);
        self.devices.review_wake.notify_one();
    }

    fn acquire_model(&mut self, name: &str, model: Option<&Reference>) {
        let Some((model, node)) = model.zip(self.nodes.get_mut(name)) else { return };
        let count = node.references.entry(model.clone()).or_default();
        *count += 1;
        if *count == 1 {
            self.subscribers.mark(name, Collection::DeviceModels, &model.1);
        }
    }

    fn release_model(&mut self, name: &str, model: Option<&Reference>) {
        let Some((model, node)) = model.zip(self.nodes.get_mut(name)) else { return };
        if release(&mut node.references, model) {
            self.subscribers.mark(name, Collection::DeviceModels, &model.1);
        }
    }
}

impl Closures {
    /// Whether everything that decides which devices a node gets is known.
    pub(super) fn devices_complete(&self, name: &str) -> bool {
        self.is_ready(Source::Devices) && self.devices.all_here(name)
    }

    /// The same of models.
    pub(super) fn models_complete(&self, name: &str) -> bool {
        self.is_ready(Source::DeviceModels) && self.devices_complete(name)
    }

    /// A model, if a device of the node refers to it.
    pub(super) fn model_of(&self, node: &Node, key: &str) -> Option<&Arc<Object>> {
        let reference = (Collection::DeviceModels, key.to_owned());
        self.devices.model(key).filter(|_| node.references.contains_key(&reference))
    }
}
