//! What comes from mappers: values and states. Nothing of it changes what mappers are told.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skerry_proto::device::{PropertyType, stamp};
use skerry_proto::dmi;
use skerry_proto::dmi::extensions::{self, PropertyReport};

use super::shape::Shape;
use super::values::{Extra, Sample, Slot, extras, weight};
use super::{Device, MAX_VALUES, MapperId, Now, Refused, Twins};

/// A state that changes more often than this is shown only when it has stayed, unless it is a better one.
const DAMPED: Duration = Duration::from_secs(10);
/// A device of which nothing is heard for so long, or longer where its properties may be silent for longer, is in a state that nobody knows.
const SILENT: Duration = Duration::from_secs(60);
/// How long a device's mapper may be away before nobody knows its state.
const ORPHANED: Duration = Duration::from_secs(5);
/// How long after a device that is not of this node was dropped its mapper is told so again, if it goes on about it.
const STRANGE: Duration = Duration::from_secs(60);
/// What is said of a device whose samples' times cannot be.
const WRONG_TIME: &str = "samples of it are from the future, or from before the ones before them; their times are put right: look at its clock and this node's";
/// The longest value that goes along with the news of it, in bytes; a longer one is asked for.
const MAX_NEWS: usize = 4 << 10;

/// Whether a device can be reached, in the words of the device mapper interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It can.
    Online,
    /// It can.
    Ok,
    /// It cannot.
    Offline,
    /// It can, and something is wrong with it.
    Unhealthy,
    /// Nobody knows.
    #[default]
    Unknown,
    /// It cannot, for now.
    Disconnected,
}

impl State {
    /// As mappers write it, in whatever case.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let all = [Self::Online, Self::Ok, Self::Offline, Self::Unhealthy, Self::Unknown, Self::Disconnected];
        all.into_iter().find(|state| state.as_str().eq_ignore_ascii_case(text))
    }

    /// As the API has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Ok => "ok",
            Self::Offline => "offline",
            Self::Unhealthy => "unhealthy",
            Self::Unknown => "unknown",
            Self::Disconnected => "disconnected",
        }
    }

    /// The higher, the better: a device that is as it should be, or only said a value, or is not well, or cannot be reached.
    fn rank(self) -> u8 {
        match self {
            Self::Ok => 3,
            Self::Online => 2,
            Self::Unhealthy => 1,
            Self::Offline | Self::Unknown | Self::Disconnected => 0,
        }
    }

    /// Whether the device answers.
    pub fn is_up(self) -> bool {
        matches!(self, Self::Online | Self::Ok | Self::Unhealthy)
    }
}

/// What changed, for whoever subscribed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A device is there, or is gone.
    Device {
        /// `namespace/name`.
        device: Arc<str>,
        /// Which of the two.
        present: bool,
    },
    /// A value was read.
    Value {
        /// `namespace/name`.
        device: Arc<str>,
        /// The property.
        property: Arc<str>,
        /// The value; `None` if it is longer than 4 KiB: ask for the twin.
        value: Option<Arc<str>>,
        /// Milliseconds since the Unix epoch.
        at: i64,
        /// Whether it differs from the one before.
        changed: bool,
    },
    /// Something else is wanted.
    Desired {
        /// `namespace/name`.
        device: Arc<str>,
        /// The property.
        property: Arc<str>,
        /// The value; `None`: whatever it is.
        value: Option<Arc<str>>,
        /// Who wants it: `cloud`, or whoever wrote at the box.
        origin: Arc<str>,
    },
    /// The device is in another state.
    State {
        /// `namespace/name`.
        device: Arc<str>,
        /// Which.
        state: State,
    },
}

/// What there is of a device that said something.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) slots: Box<[Slot]>,
    /// As it is shown.
    pub(super) state: State,
    /// As it is known.
    known: State,
    shown_at: Option<Duration>,
    /// The state that its mapper said last: where it says any, a value alone says none.
    spoken: Option<State>,
    heard: Duration,
    /// Whether it was no mapper's when it was heard: it speaks for itself.
    by_itself: bool,
    /// Milliseconds since the Unix epoch.
    pub(super) last_seen: i64,
    /// The same, of when it answered last.
    pub(super) last_online: i64,
    pub(super) reported_at: Option<Duration>,
    /// What `last_online` was then.
    pub(super) reported_online: i64,
    /// Something is to be told to the cloud.
    pub(super) dirty: bool,
}

impl Active {
    fn new(shape: &Shape, now: Now) -> Self {
        Self {
            slots: shape.properties.iter().map(|_| Slot::default()).collect(),
            state: State::Unknown,
            known: State::Unknown,
            shown_at: None,
            spoken: None,
            heard: now.mono,
            by_itself: false,
            last_seen: now.wall,
            last_online: 0,
            reported_at: None,
            reported_online: 0,
            dirty: false,
        }
    }

    /// Of its values, in bytes.
    pub(super) fn bytes(&self) -> usize {
        let samples = self.slots.iter().flat_map(|slot| [slot.reported.as_ref(), slot.observed.as_deref()]);
        samples.flatten().map(Sample::bytes).sum()
    }

    /// Carries values over to other properties, by name; those whose type no longer fits go.
    pub(super) fn reshape(&mut self, old: Option<&Shape>, new: &Shape) {
        let mut slots = std::mem::take(&mut self.slots).into_vec();
        self.slots = new
            .properties
            .iter()
            .map(|property| {
                let place = old.and_then(|old| old.place(&property.name));
                let fits = |slot: &Slot| {
                    let text = slot.reported.as_ref().map(|sample| &*sample.text);
                    text.is_none_or(|text| property.check(text).is_ok())
                };
                place
                    .and_then(|place| slots.get_mut(place))
                    .filter(|slot| fits(slot))
                    .map(std::mem::take)
                    .unwrap_or_default()
            })
            .collect();
        self.dirty = true;
    }
}

/// What is said of a property.
pub(crate) struct Said<'a> {
    property: &'a str,
    /// What was read.
    reported: Option<Word<'a>>,
    /// What was desired, and has been written.
    observed: Option<Word<'a>>,
}

/// A value as it is said.
struct Word<'a> {
    value: &'a str,
    /// Milliseconds since the Unix epoch, if that is said.
    at: Option<i64>,
    extra: Option<Box<[Extra]>>,
}

impl<'a> From<&'a dmi::Twin> for Said<'a> {
    fn from(twin: &'a dmi::Twin) -> Self {
        let word = |said: &'a dmi::TwinProperty| Word {
            value: &said.value,
            at: said.metadata.get("timestamp").and_then(|text| text.parse().ok()),
            extra: if said.metadata.len() > 1 { extras(said.metadata.iter()) } else { None },
        };
        Self {
            property: &twin.property_name,
            reported: twin.reported.as_ref().map(word),
            observed: twin.observed_desired.as_ref().map(word),
        }
    }
}

impl<'a> From<&'a PropertyReport> for Said<'a> {
    fn from(of: &'a PropertyReport) -> Self {
        let word = |said: &'a extensions::Sample| Word { value: &said.value, at: said.timestamp, extra: None };
        Self {
            property: &of.property,
            reported: of.reported.as_ref().map(word),
            observed: of.written.as_ref().map(word),
        }
    }
}

impl Twins {
    /// Values that a mapper read, and what it says it has written. Answers what was refused, with the first reason; the rest is taken.
    pub(crate) fn report_values<'a, T>(
        &mut self,
        key: &str,
        reporters: &[MapperId],
        said: &'a [T],
        now: Now,
    ) -> Result<(), Refused>
    where
        Said<'a>: From<&'a T>,
    {
        self.take_values(key, reporters, &mut said.iter().map(Said::from), now)
    }

    fn take_values(
        &mut self,
        key: &str,
        reporters: &[MapperId],
        said: &mut dyn Iterator<Item = Said<'_>>,
        now: Now,
    ) -> Result<(), Refused> {
        let slot = self.reported_by(key, reporters, now)?;
        let (watched, mut room) = (self.watched, MAX_VALUES.saturating_sub(self.bytes));
        let Some(device) = self.devices.get_mut(slot as usize).and_then(Option::as_deref_mut) else {
            return Err(Refused::NoDevice);
        };
        let Device { key, shape, active, owner, trouble, .. } = device;
        let Some(shape) = shape.as_ref() else { return Err(Refused::NoDevice) };
        let is_new = active.is_none();
        let active = active.get_or_insert_with(|| Box::new(Active::new(shape, now)));
        let (mut wrong, mut refused, mut corrected) = (None, 0_u32, 0_u64);
        let (mut is_urgent, mut taken) = (false, 0_u64);
        for of in said {
            taken += 1;
            let Some(place) = shape.place(of.property) else {
                let name: String = of.property.chars().take(64).collect();
                wrong.get_or_insert_with(|| format!("it has no property {name:?}"));
                refused += 1;
                continue;
            };
            let property = &shape.properties[place];
            let slot = &mut active.slots[place];
            let is_text = property.domain.kind == PropertyType::String;
            for (is_reported, said) in [(true, of.reported), (false, of.observed)] {
                let Some(said) = said.filter(|said| !said.value.is_empty() || (is_text && is_reported)) else {
                    continue;
                };
                let kept = if is_reported { slot.reported.as_mut() } else { slot.observed.as_deref_mut() };
                let old = kept.as_ref().map_or(0, |kept| kept.bytes());
                let bytes = said.value.len() + weight(said.extra.as_deref());
                let fits = property.check(said.value).and_then(|()| {
                    if bytes > room + old {
                        return Err(format!("all values of this node would take more than {MAX_VALUES} bytes"));
                    }
                    Ok(())
                });
                if let Err(reason) = fits {
                    wrong.get_or_insert(reason);
                    refused += 1;
                    continue;
                }
                room = (room + old).saturating_sub(bytes);
                let mut at = said.at.unwrap_or(now.wall);
                if is_reported {
                    let last = kept.as_ref().map_or(i64::MIN, |sample| sample.at);
                    let (right, is_corrected) = stamp(said.at, now.wall, last);
                    (at, corrected) = (right, corrected + u64::from(is_corrected));
                }
                let extra = said.extra;
                let changed = match kept {
                    Some(sample) => {
                        let changed = *sample.text != *said.value;
                        if changed {
                            sample.text = said.value.into();
                        }
                        (sample.at, sample.extra, sample.version) = (at, extra, sample.version.wrapping_add(1));
                        changed
                    }
                    None => {
                        let sample = Sample { text: said.value.into(), at, version: 1, extra };
                        if is_reported {
                            slot.reported = Some(sample);
                        } else {
                            slot.observed = Some(Box::new(sample));
                        }
                        true
                    }
                };
                if !is_reported {
                    active.dirty |= changed && property.report.is_some();
                    continue;
                }
                slot.history.push(at, said.value);
                if property.report.is_some() && property.is_news(slot.sent.as_deref(), said.value) {
                    is_urgent |= slot.sent.is_none() && !active.dirty;
                    active.dirty = true;
                }
                if watched {
                    self.changes.push(Change::Value {
                        device: Arc::clone(key),
                        property: Arc::clone(&property.name),
                        value: (said.value.len() <= MAX_NEWS).then(|| said.value.into()),
                        at,
                        changed,
                    });
                }
            }
        }
        if corrected == 0 {
            drop(trouble.take_if(|trouble| **trouble == *WRONG_TIME));
        } else if trouble.is_none() {
            *trouble = Some(WRONG_TIME.into());
        }
        self.counters.corrected += corrected;
        self.bytes = MAX_VALUES.saturating_sub(room);
        (active.heard, active.last_seen, active.by_itself) = (now.mono, now.wall, owner.is_none());
        if active.spoken.is_none() || active.known == State::Unknown {
            active.known = active.spoken.filter(|said| said.is_up()).unwrap_or(State::Online);
        }
        if active.known.is_up() {
            active.last_online = now.wall;
        }
        if is_new {
            self.active.insert(slot);
        }
        if is_urgent {
            self.reports.urgent(slot);
        }
        self.counters.values += taken.saturating_sub(refused.into());
        self.show(slot, now);
        match wrong {
            None => Ok(()),
            Some(reason) => Err(self.refuse(slot, refused, reason)),
        }
    }

    /// What a mapper says of a device's state.
    pub(crate) fn report_state(
        &mut self,
        key: &str,
        reporters: &[MapperId],
        said: &str,
        now: Now,
    ) -> Result<(), Refused> {
        let slot = self.reported_by(key, reporters, now)?;
        let Some(state) = State::parse(said.trim()) else {
            let said: String = said.chars().take(32).collect();
            let known = "online, ok, offline, unhealthy, unknown and disconnected";
            return Err(self.refuse(slot, 1, format!("{said:?} is no state; states are {known}")));
        };
        let Some(device) = self.get_mut(slot) else { return Err(Refused::NoDevice) };
        let Some(shape) = device.shape.clone() else { return Err(Refused::NoDevice) };
        let by_itself = device.owner.is_none();
        let active = device.active.get_or_insert_with(|| Box::new(Active::new(&shape, now)));
        (active.known, active.spoken, active.heard, active.by_itself) = (state, Some(state), now.mono, by_itself);
        active.last_seen = now.wall;
        if state.is_up() {
            active.last_online = now.wall;
        }
        self.active.insert(slot);
        self.show(slot, now);
        Ok(())
    }

    /// The device, if whoever reports of it may: one of these mappers; or whoever is none, while the device's is not there.
    fn reported_by(&mut self, key: &str, reporters: &[MapperId], now: Now) -> Result<u32, Refused> {
        let slot = self.by_key.get(key).copied();
        let Some((slot, device)) = slot.and_then(|slot| Some((slot, self.get(slot)?))) else {
            self.counters.refused += 1;
            return Err(Refused::NoDevice);
        };
        let refused = if device.shape.is_none() {
            Refused::Value(device.trouble.as_deref().unwrap_or("its device model is missing").to_owned())
        } else if !device.owner.is_some_and(|owner| reporters.contains(&owner))
            && (!reporters.is_empty() || self.is_attended(device, now))
        {
            Refused::NotYours
        } else {
            return Ok(slot);
        };
        let of = Arc::clone(&device.key);
        self.counters.refused += 1;
        if refused == Refused::NotYours {
            if reporters.is_empty()
                && let Some(device) = self.get_mut(slot)
            {
                device.refused = device.refused.saturating_add(1);
            }
            for reporter in reporters {
                self.drop_by(*reporter, Arc::clone(&of), now);
            }
        }
        Err(refused)
    }

    /// Whether a device's mapper is connected.
    fn is_attended(&self, device: &Device, now: Now) -> bool {
        device.owner.and_then(|owner| self.mappers.get(&owner)).is_some_and(|mapper| mapper.away_for(now).is_none())
    }

    fn refuse(&mut self, slot: u32, count: u32, reason: String) -> Refused {
        self.counters.refused += u64::from(count);
        if let Some(device) = self.get_mut(slot) {
            device.refused = device.refused.saturating_add(count);
            if device.trouble.as_deref() != Some(&reason) {
                device.trouble = Some(reason.as_str().into());
            }
        }
        Refused::Value(reason)
    }

    /// Shows the state as it is known, unless it has just changed and is no better.
    fn show(&mut self, slot: u32, now: Now) {
        let Some(device) = self.devices.get_mut(slot as usize).and_then(Option::as_deref_mut) else { return };
        let (Some(active), Some(shape)) = (&mut device.active, &device.shape) else { return };
        let is_fresh = active.shown_at.is_some_and(|shown| now.mono.saturating_sub(shown) < DAMPED);
        if active.known == active.state || (is_fresh && active.known.rank() <= active.state.rank()) {
            return;
        }
        (active.state, active.shown_at) = (active.known, Some(now.mono));
        let (key, state) = (Arc::clone(&device.key), active.state);
        if shape.report_state {
            active.dirty = true;
            self.reports.urgent(slot);
        }
        self.change(|| Change::State { device: key, state });
    }

    /// What time brings about: states that are due, devices that say nothing. Once a second while [`Twins::is_busy`].
    pub(crate) fn tick(&mut self, now: Now) {
        let slots: Vec<u32> = self.active.iter().copied().collect();
        for slot in slots {
            let Some(device) = self.get(slot) else { continue };
            let orphaned = match device.owner.and_then(|owner| self.mappers.get(&owner)) {
                Some(mapper) => mapper.away_for(now).is_some_and(|away| away >= ORPHANED),
                None => device.active.as_ref().is_none_or(|active| !active.by_itself),
            };
            let Some(device) = self.get_mut(slot) else { continue };
            let (Some(active), Some(shape)) = (&mut device.active, &device.shape) else { continue };
            let silence = shape.properties.iter().map(|property| property.silence).max().unwrap_or_default();
            let silent = now.mono.saturating_sub(active.heard);
            if active.known != State::Unknown && (silent > SILENT.max(silence) || (orphaned && silent >= ORPHANED)) {
                active.known = State::Unknown;
            }
            if active.known != active.state {
                self.show(slot, now);
            }
        }
        self.strangers.retain(|_, since| now.mono.saturating_sub(*since) < STRANGE);
        self.share_out_due(now);
    }

    /// Whether time brings anything about.
    pub(crate) fn is_busy(&self) -> bool {
        !self.active.is_empty() || !self.strangers.is_empty() || self.waits()
    }
}
