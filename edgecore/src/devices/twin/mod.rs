//! The twins of this node's devices: what each should be, what it is, who reaches it, and what the cloud and the mappers are still to be told.
//!
//! No IO, no clock, no task: [`Twins`] takes what happens with the time it happens at, and is asked what is to be done ([`Twins::next_call`],
//! [`Twins::take_report`], [`Twins::take_notes`]). It keeps what is to be done as a difference between what should be known and what was
//! told, so that whatever is lost, late, or happens twice, ends in the same state. A report changes values only, never what mappers are told.
//!
//! Of a device that says nothing it keeps little more than its name; what else there is to know is in the store.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Weak};
use std::time::Duration;

use skerry_proto::device::{DeviceModelSpec, DeviceSpec, TwinProperty};

use self::desired::{Desired, Word};
use self::mappers::Mapper;
use self::shape::Shape;
use self::state::Active;
use crate::order;

pub(crate) mod desired;
mod documents;
mod mappers;
mod reports;
pub(crate) mod shape;
pub(crate) mod state;
#[cfg(test)]
mod tests;
mod values;

pub(crate) use self::documents::Filter;
pub use self::documents::{Property, Twin, Value, Wanted};
pub(crate) use self::mappers::{Call, MapperId, MapperInfo, NOT_TAKEN, Outcome, ToTell};
pub use self::state::{Change, State};

/// What the latest values of all devices may take together, in bytes; one more is refused.
const MAX_VALUES: usize = 32 << 20;
/// Strange devices that are remembered, so that their mappers are told to drop them.
const MAX_STRANGERS: usize = 1024;

/// Now, on both clocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    /// Since any fixed origin; never goes back.
    pub(crate) mono: Duration,
    /// Milliseconds since the Unix epoch.
    pub(crate) wall: i64,
}

/// What a module remembers of desired values over a restart: by property.
pub(crate) type Note = BTreeMap<String, Desired>;

/// Figures of what was refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// Values taken.
    pub(crate) values: u64,
    /// Values and states refused: of the wrong type, out of bounds, unknown, too large.
    pub(crate) refused: u64,
    /// Samples whose time was put right.
    pub(crate) corrected: u64,
    /// Connections closed because their process had as many as it may.
    pub(crate) refused_connections: u64,
    /// Calls refused because their process reported more than it may.
    pub(crate) floods: u64,
    /// Calls refused because they were longer than any may be.
    pub(crate) too_long: u64,
    /// Words of the cloud that were older than what was written at the box.
    pub(crate) lost: u64,
    /// Calls of mappers that failed.
    pub(crate) failed_calls: u64,
    /// Calls of mappers that were answered, by what they are for: register, update, remove, models.
    pub(crate) calls: [u64; 4],
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Twins {
    devices: Vec<Option<Box<Device>>>,
    free: Vec<u32>,
    by_key: HashMap<Arc<str>, u32>,
    models: BTreeMap<Arc<str>, Model>,
    shapes: HashMap<u64, Vec<Weak<Shape>>>,
    protocols: BTreeSet<Arc<str>>,
    mappers: BTreeMap<MapperId, Mapper>,
    next_mapper: MapperId,
    /// Of devices that are not there yet, by UID.
    notes: HashMap<Box<str>, Note>,
    /// Devices whose note is to be written.
    unwritten: BTreeSet<u32>,
    /// UIDs whose note is to go.
    forgotten: Vec<Box<str>>,
    /// Devices whose spec is to be told again.
    reread: BTreeSet<u32>,
    active: BTreeSet<u32>,
    reports: reports::Queue,
    strangers: BTreeMap<Box<str>, Duration>,
    changes: Vec<Change>,
    watched: bool,
    bytes: usize,
    pub(crate) counters: Counters,
}

#[derive(Debug)]
struct Model {
    uid: Box<str>,
    spec: Arc<DeviceModelSpec>,
    hash: u64,
}

/// A device.
#[derive(Debug)]
struct Device {
    /// `namespace/name`.
    key: Arc<str>,
    uid: Box<str>,
    model: Option<Arc<str>>,
    protocol: Arc<str>,
    /// None while the model is unknown.
    shape: Option<Arc<Shape>>,
    /// Of the spec without what is desired.
    hash: u64,
    /// Of properties of the shape, where there is any.
    desired: Vec<(u16, Desired)>,
    owner: Option<MapperId>,
    told: mappers::Told,
    active: Option<Box<Active>>,
    /// The last thing that was wrong with it.
    trouble: Option<Box<str>>,
    refused: u32,
}

impl Twins {
    /// As new, but for the numbers of mappers, which none has twice.
    pub(crate) fn clear(&mut self) {
        *self = Self { next_mapper: self.next_mapper, ..Self::default() };
    }

    /// What was remembered; before the devices are told.
    pub(crate) fn remember(&mut self, uid: &str, note: Note) {
        self.notes.insert(uid.into(), note);
    }

    /// All devices of the store were told: notes of others are forgotten.
    pub(crate) fn loaded(&mut self) {
        let mut others = std::mem::take(&mut self.notes);
        for (_, device) in self.slots().map(|(slot, device)| (slot, device.uid.clone())).collect::<Vec<_>>() {
            if let Some(note) = others.remove(&device) {
                // Its model is yet to come.
                self.notes.insert(device, note);
            }
        }
        self.forgotten.extend(others.into_keys());
    }

    /// A model is there, or is another one.
    pub(crate) fn model(&mut self, key: &str, uid: &str, spec: DeviceModelSpec) {
        let hash = hash_of(&spec);
        let key = self.models.get_key_value(key).map_or_else(|| key.into(), |(key, _)| Arc::clone(key));
        if self.models.get(&key).is_some_and(|old| old.hash == hash) {
            if let Some(old) = self.models.get_mut(&key) {
                old.uid = uid.into();
            }
            return;
        }
        self.models.insert(Arc::clone(&key), Model { uid: uid.into(), spec: Arc::new(spec), hash });
        for mapper in self.mappers.values_mut() {
            mapper.model_changed(&key);
        }
        let of: Vec<u32> =
            self.slots().filter(|(_, device)| device.model.as_ref() == Some(&key)).map(|(slot, _)| slot).collect();
        // What follows for them only whoever has their specs can tell.
        self.reread.extend(of);
    }

    /// A model is gone, if it is still the one of this UID.
    pub(crate) fn model_gone(&mut self, key: &str, uid: &str) {
        if self.models.get(key).is_some_and(|model| &*model.uid == uid) {
            self.models.remove(key);
            for mapper in self.mappers.values_mut() {
                mapper.model_gone(key);
            }
        }
    }

    /// A device is there, or is another one.
    pub(crate) fn device(&mut self, key: &str, uid: &str, mut spec: DeviceSpec, now: Now) {
        let mut slot = self.by_key.get(key).copied();
        if let Some(old) = slot
            && self.get(old).is_some_and(|device| &*device.uid != uid)
        {
            // Another one of the same name: nothing of the old one is its.
            self.drop_device(old, now);
            slot = None;
        }
        let namespace = key.split_once('/').map_or("", |(namespace, _)| namespace);
        let model = spec.device_model_ref.as_ref().map(|model| Arc::<str>::from(format!("{namespace}/{}", model.name)));
        let wanted: Vec<_> =
            spec.properties.iter_mut().map(|property| (property.name.clone(), property.desired.take())).collect();
        let slot = slot.unwrap_or_else(|| {
            let device = Device {
                key: key.into(),
                uid: uid.into(),
                model: None,
                protocol: Arc::from(""),
                shape: None,
                hash: 0,
                desired: Vec::new(),
                owner: None,
                told: mappers::Told::Never,
                active: None,
                trouble: None,
                refused: 0,
            };
            let key = Arc::clone(&device.key);
            let slot = match self.free.pop() {
                Some(slot) => slot,
                None => {
                    self.devices.push(None);
                    u32::try_from(self.devices.len() - 1).unwrap_or(u32::MAX)
                }
            };
            self.devices[slot as usize] = Some(Box::new(device));
            self.by_key.insert(Arc::clone(&key), slot);
            self.change(|| Change::Device { device: key, present: true });
            slot
        });
        let Some(device) = self.devices[slot as usize].as_deref_mut() else { return };
        device.model = model;
        self.reshape(slot, &spec, &wanted, now);
    }

    /// A device is gone, if it is still the one of this UID.
    pub(crate) fn device_gone(&mut self, key: &str, uid: &str, now: Now) {
        if let Some(&slot) = self.by_key.get(key)
            && self.get(slot).is_some_and(|device| &*device.uid == uid)
        {
            self.drop_device(slot, now);
        }
    }

    /// Devices whose spec is to be told again, since their model is another one.
    pub(crate) fn take_rereads(&mut self) -> Vec<(Arc<str>, Box<str>)> {
        let slots = std::mem::take(&mut self.reread);
        slots.into_iter().filter_map(|slot| self.get(slot)).map(|of| (Arc::clone(&of.key), of.uid.clone())).collect()
    }

    /// Keys and UIDs of all devices and models there are.
    #[expect(clippy::type_complexity, reason = "two lists of keys and UIDs")]
    pub(crate) fn names(&self) -> (Vec<(Arc<str>, Box<str>)>, Vec<(Arc<str>, Box<str>)>) {
        let devices = self.slots().map(|(_, device)| (Arc::clone(&device.key), device.uid.clone())).collect();
        let models = self.models.iter().map(|(key, model)| (Arc::clone(key), model.uid.clone())).collect();
        (devices, models)
    }

    fn drop_device(&mut self, slot: u32, now: Now) {
        self.disown(slot, now);
        let Some(device) = self.devices[slot as usize].take() else { return };
        self.by_key.remove(&device.key);
        self.active.remove(&slot);
        self.reports.gone(slot);
        self.unwritten.remove(&slot);
        if let Some(active) = &device.active {
            self.bytes = self.bytes.saturating_sub(active.bytes());
        }
        let noted = self.notes.remove(&device.uid).is_some();
        if noted || device.desired.iter().any(|(_, desired)| desired.is_local()) {
            self.forgotten.push(device.uid.clone());
        }
        self.free.push(slot);
        let key = Arc::clone(&device.key);
        self.change(|| Change::Device { device: key, present: false });
    }

    /// Takes a spec: what the device's properties are, and what the cloud wants of them.
    fn reshape(&mut self, slot: u32, spec: &DeviceSpec, wanted: &[(String, Option<TwinProperty>)], now: Now) {
        let Some(device) = self.get(slot) else { return };
        let uid = device.uid.clone();
        let model = device.model.as_ref().and_then(|model| self.models.get(model)).map(|model| Arc::clone(&model.spec));
        let no_model: Box<str> = match &device.model {
            Some(model) => {
                format!("its device model {model} is not on this node; check deviceModelRef, or create the model")
                    .into()
            }
            None => "it has no deviceModelRef".into(),
        };
        let own = spec.protocol.as_ref().map_or("", |protocol| protocol.protocol_name.as_str());
        let protocol = match &model {
            Some(model) if own.is_empty() => self.protocol(&model.protocol),
            _ => self.protocol(own),
        };
        let whole = model.map(|model| {
            let spec = super::convert::with_model(spec.clone(), &model);
            (hash_of(&spec), self.intern(Shape::of(&spec, &model)))
        });
        let (hash, shape) = whole.unzip();
        let note = if shape.is_some() { self.notes.remove(&uid) } else { None };
        if self.get(slot).is_some_and(|device| device.protocol != protocol) {
            self.disown(slot, now);
            if let Some(device) = self.get_mut(slot) {
                device.protocol = protocol;
            }
        }
        let Some(device) = self.devices.get_mut(slot as usize).and_then(Option::as_deref_mut) else { return };
        let Some(shape) = shape else {
            device.trouble = Some(no_model);
            return self.place(slot, now);
        };
        let mut before: BTreeMap<String, Desired> = note.unwrap_or_default();
        if let Some(old) = &device.shape {
            for (place, desired) in device.desired.drain(..) {
                before.insert(old.properties[usize::from(place)].name.to_string(), desired);
            }
        }
        let had_local = before.values().any(Desired::is_local);
        let mut trouble = shape
            .strangers
            .first()
            .map(|name| format!("property {name} is not in its device model; values of it are refused").into())
            .or_else(|| shape.wrong.clone());
        let mut desired = Vec::new();
        for (place, property) in shape.properties.iter().enumerate() {
            let mut wanting = before.remove(&*property.name).unwrap_or_default();
            let said = wanted.iter().find(|(name, _)| **name == *property.name).and_then(|(_, said)| said.as_ref());
            let old = wanting.value().map(str::to_owned);
            if wanting.cloud(said, now.wall) == Word::Loses {
                self.counters.lost += 1;
                if let Some(active) = &mut device.active {
                    active.dirty = true;
                }
            }
            if let Some((value, at)) = wanting.lost() {
                let (value, at) = (value.chars().take(64).collect::<String>(), at.unwrap_or_default());
                trouble = Some(
                    format!(
                        "{} is not {value:?} as the cloud wants since {at}: it was written at the box by {} at {}, which is newer; give desired a later metadata.timestamp, or none",
                        property.name, wanting.origin(), wanting.at()
                    )
                    .into(),
                );
            }
            if let Some(value) = wanting.value()
                && let Err(wrong) = property.check_desired(value)
            {
                trouble = Some(format!("what is desired of it is not passed on: {wrong}").into());
            }
            if wanting.value().map(str::to_owned) != old {
                let (device, property) = (Arc::clone(&device.key), Arc::clone(&property.name));
                let (value, origin) = (wanting.value().map(Arc::from), Arc::from(wanting.origin()));
                if self.watched {
                    self.changes.push(Change::Desired { device, property, value, origin });
                }
            }
            if !wanting.is_empty() {
                desired.push((u16::try_from(place).unwrap_or(u16::MAX), wanting));
            }
        }
        let same_shape = device.shape.as_ref().is_some_and(|old| Arc::ptr_eq(old, &shape));
        if let Some(active) = &mut device.active
            && !same_shape
        {
            let before = active.bytes();
            active.reshape(device.shape.as_deref(), &shape);
            self.bytes = (self.bytes + active.bytes()).saturating_sub(before);
        }
        device.hash = hash.unwrap_or_default();
        device.desired = desired;
        device.desired.shrink_to_fit();
        device.shape = Some(shape);
        device.trouble = trouble;
        let is_local = device.desired.iter().any(|(_, desired)| desired.is_local());
        if had_local && !is_local {
            self.forgotten.push(uid);
        } else if is_local {
            self.unwritten.insert(slot);
        }
        self.place(slot, now);
    }

    fn protocol(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.protocols.get(name) {
            return Arc::clone(known);
        }
        let name: Arc<str> = name.into();
        self.protocols.insert(Arc::clone(&name));
        name
    }

    fn intern(&mut self, shape: Shape) -> Arc<Shape> {
        let mut hasher = DefaultHasher::new();
        for property in &shape.properties {
            property.name.hash(&mut hasher);
        }
        let alike = self.shapes.entry(hasher.finish()).or_default();
        alike.retain(|known| known.strong_count() > 0);
        if let Some(known) = alike.iter().filter_map(Weak::upgrade).find(|known| **known == shape) {
            return known;
        }
        let shape = Arc::new(shape);
        alike.push(Arc::downgrade(&shape));
        shape
    }

    /// Writes a property at the box: it is wanted from now on, and mappers are told, be it what was wanted before.
    pub(crate) fn write(
        &mut self,
        key: &str,
        property: &str,
        value: &str,
        origin: &str,
        now: Now,
    ) -> Result<(), Refused> {
        let (slot, place) = self.find(key, property)?;
        let Some(device) = self.devices.get_mut(slot as usize).and_then(Option::as_deref_mut) else {
            return Err(Refused::NoDevice);
        };
        let Some(of) = device.shape.as_ref().map(|shape| &shape.properties[place]) else {
            return Err(Refused::NoDevice);
        };
        of.check_desired(value).map_err(Refused::Value)?;
        let name = Arc::clone(&of.name);
        let place = u16::try_from(place).unwrap_or(u16::MAX);
        // In the order of places, for what is told is compared by its hash.
        let at = device.desired.binary_search_by_key(&place, |(of, _)| *of).unwrap_or_else(|at| {
            device.desired.insert(at, (place, Desired::default()));
            at
        });
        device.desired[at].1.local(value, origin, now.wall);
        let key = Arc::clone(&device.key);
        self.unwritten.insert(slot);
        self.change(|| Change::Desired {
            device: key,
            property: name,
            value: Some(value.into()),
            origin: origin.into(),
        });
        self.tell(slot);
        Ok(())
    }

    /// Whether a property could have a value: be wanted to have it, or have been read.
    pub(crate) fn check(&self, key: &str, property: &str, value: &str, is_wanted: bool) -> Result<(), Refused> {
        let (slot, place) = self.find(key, property)?;
        let shape = self.get(slot).and_then(|device| device.shape.as_ref()).ok_or(Refused::NoDevice)?;
        let of = &shape.properties[place];
        if is_wanted { of.check_desired(value) } else { of.check(value) }.map_err(Refused::Value)
    }

    fn find(&self, key: &str, property: &str) -> Result<(u32, usize), Refused> {
        let slot = *self.by_key.get(key).ok_or(Refused::NoDevice)?;
        let device = self.get(slot).ok_or(Refused::NoDevice)?;
        let shape = device.shape.as_ref().ok_or_else(|| {
            Refused::Value(device.trouble.as_deref().unwrap_or("its device model is not on this node").to_owned())
        })?;
        let place = shape.place(property).ok_or_else(|| {
            let names: Vec<&str> = shape.properties.iter().map(|property| &*property.name).collect();
            Refused::NoProperty(format!("it has: {}", names.join(", ")))
        })?;
        Ok((slot, place))
    }

    /// Something is wrong with a device.
    pub(crate) fn trouble(&mut self, key: &str, what: &str) {
        if let Some(slot) = self.by_key.get(key).copied()
            && let Some(device) = self.get_mut(slot)
        {
            device.trouble = Some(what.chars().take(512).collect::<String>().into());
        }
    }

    /// Notes to be written, and UIDs whose notes are to go. Told again after [`Twins::unkept`].
    #[expect(clippy::type_complexity, reason = "two lists, taken apart at once")]
    pub(crate) fn take_notes(&mut self) -> (Vec<(u32, Box<str>, Note)>, Vec<Box<str>>) {
        let unwritten = std::mem::take(&mut self.unwritten);
        let written = unwritten.into_iter().filter_map(|slot| {
            let device = self.get(slot)?;
            Some((slot, device.uid.clone(), device.note()))
        });
        let written = written.collect();
        (written, std::mem::take(&mut self.forgotten))
    }

    /// A note could not be written.
    pub(crate) fn unkept(&mut self, slot: u32, uid: &str) {
        if self.get(slot).is_some_and(|device| &*device.uid == uid) {
            self.unwritten.insert(slot);
        }
    }

    /// Whether changes are kept for [`Twins::take_changes`].
    pub(crate) fn watch(&mut self, watched: bool) {
        self.watched = watched;
    }

    /// What changed since.
    pub(crate) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    fn change(&mut self, change: impl FnOnce() -> Change) {
        if self.watched {
            self.changes.push(change());
        }
    }

    fn get(&self, slot: u32) -> Option<&Device> {
        self.devices.get(slot as usize)?.as_deref()
    }

    fn get_mut(&mut self, slot: u32) -> Option<&mut Device> {
        self.devices.get_mut(slot as usize)?.as_deref_mut()
    }

    fn slots(&self) -> impl Iterator<Item = (u32, &Device)> {
        (0_u32..).zip(&self.devices).filter_map(|(slot, device)| Some((slot, device.as_deref()?)))
    }
}

impl Device {
    fn note(&self) -> Note {
        let Some(shape) = &self.shape else { return Note::new() };
        let local = self.desired.iter().filter(|(_, desired)| desired.is_local());
        order::map(
            local.map(|(place, desired)| (shape.properties[usize::from(*place)].name.to_string(), desired.clone())),
        )
    }

    /// What is wanted and can be: place, value, and when it was written, if that is known for good.
    fn wanted(&self) -> impl Iterator<Item = (usize, &str, Option<i64>)> {
        self.desired.iter().filter_map(|(place, desired)| {
            let property = self.shape.as_ref()?.properties.get(usize::from(*place))?;
            let value = desired.value()?;
            property.check_desired(value).ok()?;
            Some((usize::from(*place), value, desired.stamp()))
        })
    }
}

/// Why a write, or what a mapper said, was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No such device on this node.
    #[error("there is no such device on this node; `edgecore device list` shows those there are")]
    NoDevice,
    /// No such property.
    #[error("the device has no such property; {0}")]
    NoProperty(String),
    /// It cannot have the value.
    #[error("{0}")]
    Value(String),
    /// It is another mapper's.
    #[error("the device is another mapper's, and only the process that registered as it reports of it")]
    NotYours,
}

/// Takes out whose turn it is: from `next` on, and from the beginning again.
fn turn(of: &mut BTreeSet<u32>, next: &mut u32) -> Option<u32> {
    let slot = of.range(*next..).next().or_else(|| of.first()).copied()?;
    of.remove(&slot);
    *next = slot.wrapping_add(1);
    Some(slot)
}

fn hash_of(value: &impl serde::Serialize) -> u64 {
    /// Feeds a hash with what serde_json writes.
    struct Sink(DefaultHasher);
    impl std::io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.write(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut into = Sink(DefaultHasher::new());
    // Writing into a hash does not fail, and these values have only text for keys.
    let _ = serde_json::to_writer(&mut into, value);
    into.0.finish()
}
