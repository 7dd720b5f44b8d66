//! Who reaches which device, and what each mapper is still to be told.
//!
//! A mapper is known by the socket it registered. The devices of a protocol are shared out among the mappers of that protocol that are there,
//! each device to the mapper whose name and it weigh most together (rendezvous hashing): when one comes or goes, only devices that come to
//! it or were its own move. One that is away keeps its devices for [`GRACE`], so that its restart moves none.
//!
//! What a mapper is told is the difference between what it should know and what it was told last; changes that come faster than it takes
//! them become one call. A call that fails is made again later, each device on its own, so that one that cannot be told holds up no other.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skerry_proto::device::DeviceModelSpec;

use super::{Device, MAX_STRANGERS, Now, Twins, turn};
use crate::devices::convert::Wanted;

/// How long a mapper that is away keeps its devices, if there is another one for them.
const GRACE: Duration = Duration::from_secs(3);
/// How long a mapper that registers may take, besides, until its socket takes calls.
const START: Duration = Duration::from_secs(10);
/// Between attempts to tell a mapper of a device: doubling from the first to the last.
const RETRY: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(60)];
/// Mappers that are remembered; beyond it one that is away gives way.
pub(crate) const MAX_MAPPERS: usize = 64;

/// What is wrong with a device that its mapper does not take; why comes after it.
pub(crate) const NOT_TAKEN: &str = "its mapper does not take it: ";

/// Which mapper, in the life of this process.
pub(crate) type MapperId = u32;

/// What a mapper said of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MapperInfo {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) version: String,
    pub(crate) protocol: String,
    /// Path of its socket.
    pub(crate) address: String,
}

/// A mapper.
#[derive(Debug)]
pub(super) struct Mapper {
    pub(super) info: MapperInfo,
    /// Since when its socket is not connected; `None` while it is.
    away: Option<Duration>,
    /// Its devices are shared out anew if it stays away.
    is_waited_for: bool,
    /// It may hold what an edgecore before this one told it.
    is_found: bool,
    /// It is being answered, and is told nothing besides.
    on_hold: bool,
    /// Devices that may differ from what it was told.
    queue: BTreeSet<u32>,
    /// The turn of those.
    next: u32,
    later: BTreeSet<(Duration, u32)>,
    /// Failures since the last success, by device, and when it is due again.
    failures: BTreeMap<u32, (u8, Duration)>,
    /// Devices that it must drop, by key: attempts so far, and when it is due.
    removals: BTreeMap<Arc<str>, (u8, Duration)>,
    models: BTreeMap<Arc<str>, ToldModel>,
    /// Models that it does not know to update.
    unknown: BTreeSet<Arc<str>>,
    in_flight: BTreeSet<Arc<str>>,
    models_in_flight: BTreeSet<Arc<str>>,
    /// Models that it did not answer to: failures so far, and when the next attempt is due, if that is to come.
    models_lost: BTreeMap<Arc<str>, (u8, Option<Duration>)>,
    pub(super) devices: u32,
}

/// What a mapper was told of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ToldModel {
    /// This one.
    At(u64),
    /// An older one.
    Old,
    /// To be dropped.
    Gone,
}

/// What a device's owner was told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// Nothing.
    Never,
    /// It may know it.
    Perhaps,
    /// All this.
    At(u64),
}

/// A call to be made.
#[derive(Clone, Debug)]
pub(crate) enum Call {
    /// CreateDeviceModel, or UpdateDeviceModel.
    Model { key: Arc<str>, spec: Arc<DeviceModelSpec>, hash: u64, update: bool },
    /// RemoveDeviceModel.
    DropModel { key: Arc<str> },
    /// RegisterDevice, or UpdateDevice.
    Device { slot: u32, key: Arc<str>, uid: Box<str>, told: u64, update: bool },
    /// RemoveDevice.
    Remove { key: Arc<str> },
}

/// What came of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The mapper took it.
    Done,
    /// It refused.
    Refused,
    /// It did not answer in time, or went away.
    Lost,
}

impl Mapper {
    pub(super) fn model_changed(&mut self, key: &str) {
        if let Some(told) = self.models.get_mut(key) {
            *told = ToldModel::Old;
        }
    }

    pub(super) fn model_gone(&mut self, key: &str) {
        if let Some(told) = self.models.get_mut(key) {
            *told = ToldModel::Gone;
        }
    }

    /// How long it has been away, if it is.
    pub(super) fn away_for(&self, now: Now) -> Option<Duration> {
        self.away.map(|since| now.mono.saturating_sub(since))
    }

    fn is_there(&self, now: Now) -> bool {
        self.away_for(now).is_none_or(|away| away < GRACE)
    }

    fn enqueue(&mut self, slot: u32) {
        self.queue.insert(slot);
    }

    fn forget(&mut self, slot: u32) {
        self.queue.remove(&slot);
        if let Some((_, due)) = self.failures.remove(&slot) {
            self.later.remove(&(due, slot));
        }
    }

    /// Whether it may be told of a model now.
    fn takes(&self, model: &str) -> bool {
        !self.models_in_flight.contains(model) && self.models_lost.get(model).is_none_or(|(_, due)| due.is_none())
    }
}

/// Half to the whole of a wait that doubles with each failure.
fn retry(failures: u8, salt: u64) -> Duration {
    let [first, last] = RETRY;
    let whole = first.saturating_mul(1 << u32::from(failures).min(10)).min(last);
    let mut hasher = DefaultHasher::new();
    (failures, salt).hash(&mut hasher);
    whole / 2 + whole / 2 * u32::try_from(hasher.finish() % 1000).unwrap_or(0) / 1000
}

/// What a mapper is told of a device beside its spec.
#[derive(Debug)]
pub(crate) struct ToTell {
    /// Of its model.
    pub(crate) model_key: Arc<str>,
    pub(crate) model: Arc<DeviceModelSpec>,
    pub(crate) wanted: Vec<Wanted>,
    /// Of all of it: equal marks are equal news.
    pub(crate) mark: u64,
}

impl Twins {
    /// A mapper registers: it knows nothing, whatever it was told before. It is told nothing by calls before [`Twins::answered`].
    pub(crate) fn register(&mut self, info: MapperInfo, now: Now) -> MapperId {
        self.add_mapper(info, now, false)
    }

    /// A mapper that registered with an edgecore before this one.
    pub(crate) fn found(&mut self, info: MapperInfo, now: Now) -> MapperId {
        self.add_mapper(info, now, true)
    }

    fn add_mapper(&mut self, info: MapperInfo, now: Now, is_found: bool) -> MapperId {
        let known = self.mappers.iter().find(|(_, mapper)| mapper.info.address == info.address).map(|(id, _)| *id);
        let id = known.unwrap_or_else(|| {
            if self.mappers.len() >= MAX_MAPPERS
                && let Some(id) = self.longest_away()
            {
                self.remove_mapper(id, now);
            }
            self.next_mapper += 1;
            self.next_mapper
        });
        let before = self.mappers.remove(&id);
        // What it says of itself may be new, and what it holds is nothing: only where it is stays.
        let mapper = Mapper {
            info,
            away: match before {
                Some(Mapper { away: None, .. }) => None,
                _ if is_found => Some(now.mono),
                _ => Some(now.mono + START),
            },
            is_waited_for: true,
            is_found,
            on_hold: !is_found,
            queue: BTreeSet::new(),
            next: 0,
            later: BTreeSet::new(),
            failures: BTreeMap::new(),
            removals: BTreeMap::new(),
            models: BTreeMap::new(),
            unknown: BTreeSet::new(),
            in_flight: BTreeSet::new(),
            models_in_flight: BTreeSet::new(),
            models_lost: BTreeMap::new(),
            devices: 0,
        };
        self.mappers.insert(id, mapper);
        for device in self.devices.iter_mut().flatten().filter(|device| device.owner == Some(id)) {
            (device.owner, device.told) = (None, Told::Never);
        }
        self.share_out(now);
        id
    }

    /// The one that has been away longest.
    fn longest_away(&self) -> Option<MapperId> {
        let away = self.mappers.iter().filter_map(|(id, mapper)| Some((mapper.away?, *id)));
        away.min().map(|(_, id)| id)
    }

    fn remove_mapper(&mut self, id: MapperId, now: Now) {
        self.mappers.remove(&id);
        for device in self.devices.iter_mut().flatten().filter(|device| device.owner == Some(id)) {
            (device.owner, device.told) = (None, Told::Never);
        }
        self.share_out(now);
    }

    /// A mapper that registered has been answered.
    pub(crate) fn answered(&mut self, id: MapperId) {
        if let Some(mapper) = self.mappers.get_mut(&id) {
            mapper.on_hold = false;
        }
    }

    /// A mapper's socket is connected, or no longer.
    pub(crate) fn connected(&mut self, id: MapperId, is_connected: bool, now: Now) {
        let Some(mapper) = self.mappers.get_mut(&id) else { return };
        mapper.away = match mapper.away {
            _ if is_connected => None,
            Some(since) => Some(since),
            None => Some(now.mono),
        };
        mapper.is_waited_for = !is_connected;
        // What became of calls that were under way nobody knows.
        mapper.models_in_flight.clear();
        mapper.models_lost.clear();
        for key in std::mem::take(&mut mapper.in_flight) {
            let slot = self.by_key.get(&key).copied();
            if let Some((slot, device)) =
                slot.and_then(|slot| Some((slot, self.devices.get_mut(slot as usize)?.as_mut()?)))
                && device.owner == Some(id)
            {
                device.told = Told::Perhaps;
                mapper.enqueue(slot);
            }
        }
        self.share_out(now);
    }

    /// Those that are known.
    pub(crate) fn mappers(&self) -> impl Iterator<Item = (MapperId, &MapperInfo)> {
        self.mappers.iter().map(|(id, mapper)| (*id, &mapper.info))
    }

    /// Who reaches a device.
    pub(crate) fn owner(&self, key: &str) -> Option<MapperId> {
        self.by_key.get(key).and_then(|slot| self.get(*slot)?.owner)
    }

    /// Gives every device to its mapper. When a mapper came or went, and [`GRACE`] after it went.
    pub(crate) fn share_out(&mut self, now: Now) {
        let slots: Vec<u32> = self.slots().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.place(slot, now);
        }
    }

    /// As [`Twins::share_out`], when a mapper has been waited for.
    pub(super) fn share_out_due(&mut self, now: Now) {
        let late = |mapper: &Mapper| mapper.is_waited_for && !mapper.is_there(now);
        if self.mappers.values().any(late) {
            for mapper in self.mappers.values_mut().filter(|mapper| late(mapper)) {
                mapper.is_waited_for = false;
            }
            self.share_out(now);
        }
    }

    /// Whether a mapper is waited for.
    pub(super) fn waits(&self) -> bool {
        self.mappers.values().any(|mapper| mapper.is_waited_for)
    }

    /// Gives a device to its mapper.
    pub(super) fn place(&mut self, slot: u32, now: Now) {
        let Some(device) = self.get(slot) else { return };
        let weigh = |info: &MapperInfo| {
            let mut hasher = DefaultHasher::new();
            (&info.address, &device.key).hash(&mut hasher);
            hasher.finish()
        };
        let of = |there: bool| {
            let of = self.mappers.iter().filter(|(_, mapper)| *mapper.info.protocol == *device.protocol);
            let of = of.filter(|(_, mapper)| !there || mapper.is_there(now));
            of.max_by_key(|(_, mapper)| weigh(&mapper.info)).map(|(id, _)| *id)
        };
        // With none there, it stays with whoever had it.
        let owner = of(true).or(device.owner).or_else(|| of(false));
        if owner != device.owner {
            self.disown(slot, now);
            if let Some(mapper) = owner.and_then(|owner| self.mappers.get_mut(&owner)) {
                mapper.devices += 1;
                let told = if mapper.is_found { Told::Perhaps } else { Told::Never };
                if let Some(device) = self.get_mut(slot) {
                    (device.owner, device.told) = (owner, told);
                }
            }
        }
        self.tell(slot);
    }

    /// Takes a device from its mapper.
    pub(super) fn disown(&mut self, slot: u32, now: Now) {
        let Some(device) = self.get_mut(slot) else { return };
        let (owner, told) = (device.owner.take(), std::mem::replace(&mut device.told, Told::Never));
        let key = Arc::clone(&device.key);
        let Some(mapper) = owner.and_then(|owner| self.mappers.get_mut(&owner)) else { return };
        mapper.devices = mapper.devices.saturating_sub(1);
        let tried = mapper.failures.contains_key(&slot);
        mapper.forget(slot);
        if told != Told::Never || tried || mapper.in_flight.contains(&key) {
            mapper.removals.insert(key, (0, now.mono));
        }
    }

    /// Puts a device in its mapper's queue, if there is something to tell.
    pub(super) fn tell(&mut self, slot: u32) {
        let Some(device) = self.get(slot) else { return };
        if device.shape.is_none() || device.is_told() {
            return;
        }
        if let Some(mapper) = device.owner.and_then(|owner| self.mappers.get_mut(&owner)) {
            mapper.enqueue(slot);
        }
    }

    /// A device that is not of this node was reported of: whoever holds it is to drop it.
    pub(crate) fn stranger(&mut self, key: &str, now: Now) {
        let is_new = !self.by_key.contains_key(key) && self.strangers.len() < MAX_STRANGERS;
        if is_new && self.strangers.insert(key.into(), now.mono).is_none() {
            for mapper in self.mappers.values_mut() {
                mapper.removals.insert(key.into(), (0, now.mono));
            }
        }
    }

    /// A mapper that goes on about a device that is another's is to drop it.
    pub(super) fn drop_by(&mut self, id: MapperId, key: Arc<str>, now: Now) {
        if let Some(mapper) = self.mappers.get_mut(&id) {
            mapper.removals.entry(key).or_insert((0, now.mono));
        }
    }

    /// What to call a mapper for now; one call for each device at a time. Told what came of it by [`Twins::called`].
    pub(crate) fn next_call(&mut self, id: MapperId, now: Now) -> Option<Call> {
        let mapper = self.mappers.get_mut(&id).filter(|mapper| !mapper.on_hold)?;
        let due = mapper.removals.iter().find(|(key, (_, due))| *due <= now.mono && !mapper.in_flight.contains(*key));
        if let Some((key, _)) = due {
            let key = Arc::clone(key);
            mapper.in_flight.insert(Arc::clone(&key));
            return Some(Call::Remove { key });
        }
        if let Some((key, _)) = mapper.models.iter().find(|(_, told)| **told == ToldModel::Gone) {
            let key = Arc::clone(key);
            mapper.models.remove(&key);
            return Some(Call::DropModel { key });
        }
        for (_, due) in mapper.models_lost.values_mut() {
            due.take_if(|due| *due <= now.mono);
        }
        let old = mapper.models.iter().find(|(key, told)| **told == ToldModel::Old && mapper.takes(key));
        if let Some((key, _)) = old
            && let Some(model) = self.models.get(key)
        {
            let key = Arc::clone(key);
            mapper.models_in_flight.insert(Arc::clone(&key));
            return Some(Call::Model { key, spec: Arc::clone(&model.spec), hash: model.hash, update: true });
        }
        while let Some(&(due, slot)) = mapper.later.first()
            && due <= now.mono
        {
            mapper.later.pop_first();
            mapper.enqueue(slot);
        }
        for _ in 0..mapper.queue.len() {
            let slot = turn(&mut mapper.queue, &mut mapper.next)?;
            let Some(device) = self.devices.get(slot as usize).and_then(Option::as_deref) else { continue };
            if device.owner != Some(id) || device.is_told() {
                continue;
            }
            if mapper.in_flight.contains(&device.key) || mapper.removals.contains_key(&device.key) {
                // Its turn comes when that has come to an end.
                mapper.enqueue(slot);
                continue;
            }
            let Some((key, model)) = device.model.as_ref().and_then(|key| self.models.get_key_value(key)) else {
                continue;
            };
            if !mapper.models.contains_key(key) {
                let key = Arc::clone(key);
                mapper.enqueue(slot);
                if !mapper.takes(&key) {
                    continue;
                }
                mapper.models_in_flight.insert(Arc::clone(&key));
                let update = mapper.is_found && !mapper.unknown.contains(&key);
                return Some(Call::Model { key, spec: Arc::clone(&model.spec), hash: model.hash, update });
            }
            mapper.in_flight.insert(Arc::clone(&device.key));
            return Some(Call::Device {
                slot,
                key: Arc::clone(&device.key),
                uid: device.uid.clone(),
                told: device.wanted_hash(),
                update: device.told != Told::Never,
            });
        }
        None
    }

    /// When there may be another call, if nothing else happens.
    pub(crate) fn next_due(&self, id: MapperId) -> Option<Duration> {
        let mapper = self.mappers.get(&id).filter(|mapper| !mapper.on_hold)?;
        let later = mapper.later.first().map(|(due, _)| *due);
        let removals = mapper.removals.iter().filter(|(key, _)| !mapper.in_flight.contains(*key));
        let removals = removals.map(|(_, (_, due))| *due).min();
        let models = mapper.models_lost.values().filter_map(|(_, due)| *due).min();
        [later, removals, models].into_iter().flatten().min()
    }

    /// What came of a call.
    pub(crate) fn called(&mut self, id: MapperId, call: &Call, outcome: Outcome, now: Now) {
        let kind = match call {
            Call::Device { update: false, .. } => 0,
            Call::Device { update: true, .. } => 1,
            Call::Remove { .. } => 2,
            Call::Model { .. } | Call::DropModel { .. } => 3,
        };
        match outcome {
            Outcome::Done => self.counters.calls[kind] += 1,
            Outcome::Refused | Outcome::Lost => self.counters.failed_calls += 1,
        }
        let Some(mapper) = self.mappers.get_mut(&id) else { return };
        match call {
            Call::Model { key, hash, update, .. } => {
                mapper.models_in_flight.remove(key);
                if outcome == Outcome::Lost {
                    let (failures, due) = mapper.models_lost.entry(Arc::clone(key)).or_default();
                    *due = Some(now.mono + retry(*failures, 0));
                    *failures = failures.saturating_add(1);
                    return;
                }
                mapper.models_lost.remove(key);
                if outcome == Outcome::Refused && *update && mapper.unknown.insert(Arc::clone(key)) {
                    mapper.models.remove(key);
                } else {
                    // One that is refused is not said again: what matters of it is in each device.
                    let current = self.models.get(key).is_some_and(|model| model.hash == *hash);
                    mapper.models.insert(Arc::clone(key), if current { ToldModel::At(*hash) } else { ToldModel::Old });
                }
            }
            Call::DropModel { .. } => {}
            Call::Remove { key } => {
                mapper.in_flight.remove(key);
                if let Some((attempts, due)) = mapper.removals.get_mut(key) {
                    *attempts = attempts.saturating_add(1);
                    *due = now.mono + retry(*attempts, 0);
                    // A mapper that refuses does not know it.
                    if outcome != Outcome::Lost {
                        mapper.removals.remove(key);
                    }
                }
            }
            Call::Device { slot, key, uid, told, update } => {
                mapper.in_flight.remove(key);
                let device = self.devices.get_mut(*slot as usize).and_then(Option::as_deref_mut);
                let Some(device) = device.filter(|of| of.uid == *uid && of.owner == Some(id)) else {
                    return;
                };
                if outcome == Outcome::Done {
                    device.told = Told::At(*told);
                    mapper.failures.remove(slot);
                    if device.trouble.as_ref().is_some_and(|trouble| trouble.starts_with(NOT_TAKEN)) {
                        device.trouble = None;
                    }
                    if let Some(active) = &mut device.active
                        && device.desired.iter().any(|(_, desired)| desired.is_local())
                    {
                        active.dirty = true;
                    }
                    if !device.is_told() {
                        mapper.enqueue(*slot);
                    }
                    return;
                }
                // The other call may be what it takes: what the mapper knows of it is no longer sure.
                device.told = if *update && outcome == Outcome::Refused { Told::Never } else { Told::Perhaps };
                let (failures, due) = mapper.failures.entry(*slot).or_default();
                let wait = if *update && outcome == Outcome::Refused && *failures == 0 {
                    Duration::ZERO
                } else {
                    retry(*failures, u64::from(*slot))
                };
                (*failures, *due) = (failures.saturating_add(1), now.mono + wait);
                mapper.later.insert((*due, *slot));
            }
        }
    }

    /// The devices that a mapper which has just registered is to be told of in the answer.
    pub(crate) fn for_answer(&self, id: MapperId) -> Vec<(u32, Arc<str>, Box<str>)> {
        let of = |device: &Device| device.owner == Some(id) && device.shape.is_some() && device.model_is_known(self);
        let its = self.slots().filter(|(_, device)| of(device));
        its.map(|(slot, device)| (slot, Arc::clone(&device.key), device.uid.clone())).collect()
    }

    /// A device and its model went into the answer.
    pub(crate) fn told_in_answer(&mut self, id: MapperId, slot: u32, told: u64) {
        let Some(device) = self.devices.get_mut(slot as usize).and_then(Option::as_deref_mut) else { return };
        let Some(mapper) = self.mappers.get_mut(&id) else { return };
        device.told = Told::At(told);
        if let Some((key, model)) = device.model.as_ref().and_then(|key| self.models.get_key_value(key)) {
            mapper.models.insert(Arc::clone(key), ToldModel::At(model.hash));
        }
    }

    /// What it takes to tell a mapper of a device.
    pub(crate) fn to_tell(&self, key: &str) -> Option<ToTell> {
        let device = self.get(*self.by_key.get(key)?)?;
        let (model, spec) = self.models.get_key_value(device.model.as_ref()?)?;
        let shape = device.shape.as_ref()?;
        let wanted = device.wanted().map(|(place, value, at)| Wanted {
            property: shape.properties[place].name.to_string(),
            value: value.to_owned(),
            at,
        });
        Some(ToTell {
            model_key: Arc::clone(model),
            model: Arc::clone(&spec.spec),
            wanted: wanted.collect(),
            mark: device.wanted_hash(),
        })
    }
}

impl Device {
    /// The mark of all that its mapper should know.
    pub(super) fn wanted_hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash.hash(&mut hasher);
        for wanted in self.wanted() {
            wanted.hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Whether its mapper knows all there is.
    pub(super) fn is_told(&self) -> bool {
        self.told == Told::At(self.wanted_hash())
    }

    fn model_is_known(&self, twins: &Twins) -> bool {
        self.model.as_ref().is_some_and(|model| twins.models.contains_key(model))
    }
}
