//! Twins as people and programs read them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use skerry_proto::device::AccessMode;

use super::state::State;
use super::values::Sample;
use super::{Device, Now, Refused, Twins};
use crate::devices::convert::type_name;
use crate::order;

/// A device as it is and as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Twin {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// The Device's.
    pub uid: String,
    /// Name of its DeviceModel.
    pub model: String,
    /// What it speaks.
    pub protocol: String,
    /// Name of the mapper that reaches it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mapper: Option<String>,
    /// Whether that mapper is connected and knows all there is to know of it.
    pub ready: bool,
    /// Whether the device can be reached.
    pub state: State,
    /// When something was heard of it last, milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<i64>,
    /// Of its values and states, how many were refused.
    pub refused: u32,
    /// The last thing that was wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Its properties, as the Device lists them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub properties: Vec<Property>,
}

/// A property of a [`Twin`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Property {
    /// Its name.
    pub name: String,
    /// `INT`, `FLOAT`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it can be written.
    pub access_mode: AccessMode,
    /// Such as `°C`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unit: String,
    /// What was read last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported: Option<Value>,
    /// What it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired: Option<Wanted>,
    /// The desired value that the mapper says it has written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_desired: Option<Value>,
}

/// A value that a mapper said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Value {
    /// As text.
    pub value: String,
    /// When it was sampled, milliseconds since the Unix epoch.
    pub timestamp: i64,
    /// Counts the samples since the start of edgecore.
    pub version: u32,
    /// What the mapper added.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// A value that is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// As text.
    pub value: String,
    /// When it was written, milliseconds since the Unix epoch.
    pub timestamp: i64,
    /// Who wrote it: `cloud`, or whoever did at the box.
    pub origin: String,
    /// Counts its changes.
    pub version: u32,
}

/// Which devices are meant.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    pub(crate) namespace: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) property: Option<String>,
}

impl Filter {
    pub(crate) fn takes(&self, key: &str) -> bool {
        let (namespace, name) = key.split_once('/').unwrap_or_default();
        self.namespace.as_deref().is_none_or(|of| of == namespace) && self.name.as_deref().is_none_or(|of| of == name)
    }

    pub(crate) fn takes_property(&self, property: &str) -> bool {
        self.property.as_deref().is_none_or(|of| of == property)
    }
}

impl Twins {
    /// One device, if it is there.
    pub(crate) fn twin(&self, key: &str, now: Now) -> Option<Twin> {
        self.get(*self.by_key.get(key)?).map(|device| self.document(device, true, now))
    }

    /// So many devices from a place on, without their properties unless asked for; and the next place, if there are more.
    pub(crate) fn page(
        &self,
        from: usize,
        count: usize,
        filter: &Filter,
        whole: bool,
        now: Now,
    ) -> (Vec<Twin>, Option<usize>) {
        let mut twins = Vec::new();
        for (at, device) in self.devices.iter().enumerate().skip(from) {
            if twins.len() == count {
                return (twins, Some(at));
            }
            if let Some(device) = device
                && filter.takes(&device.key)
            {
                twins.push(self.document(device, whole, now));
            }
        }
        (twins, None)
    }

    /// How many devices there are.
    pub(crate) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// The last values of a property, from the oldest to the newest.
    pub(crate) fn history(&self, key: &str, property: &str) -> Result<Vec<(i64, String)>, Refused> {
        let (slot, place) = self.find(key, property)?;
        let active = self.get(slot).and_then(|device| device.active.as_ref());
        Ok(active.map(|active| active.slots[place].history.read()).unwrap_or_default())
    }

    /// Whether a device says that a property has a value: read, or written.
    pub(crate) fn has(&self, key: &str, property: &str, value: &str, since: u32) -> bool {
        let Ok((slot, place)) = self.find(key, property) else { return false };
        let Some(slot) = self.get(slot).and_then(|device| device.active.as_ref()?.slots.get(place)) else {
            return false;
        };
        let is = |sample: &Sample| sample.text == *value;
        slot.observed.as_deref().is_some_and(is)
            || slot.reported.as_ref().is_some_and(|sample| sample.version != since && is(sample))
    }

    fn document(&self, device: &Device, whole: bool, now: Now) -> Twin {
        let (namespace, name) = device.key.split_once('/').unwrap_or_default();
        let mapper = device.owner.and_then(|owner| self.mappers.get(&owner));
        let mut twin = Twin {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: device.uid.to_string(),
            model: device
                .model
                .as_ref()
                .and_then(|model| Some(model.split_once('/')?.1))
                .unwrap_or_default()
                .to_owned(),
            protocol: device.protocol.to_string(),
            mapper: mapper.map(|mapper| mapper.info.name.clone()),
            ready: mapper.is_some_and(|mapper| mapper.away_for(now).is_none()) && device.is_told(),
            state: device.active.as_ref().map_or(State::Unknown, |active| active.state),
            last_seen: device.active.as_ref().map(|active| active.last_seen),
            refused: device.refused,
            message: device.trouble.as_deref().map(str::to_owned),
            properties: Vec::new(),
        };
        let Some(shape) = device.shape.as_ref().filter(|_| whole) else { return twin };
        twin.properties = (0_u16..)
            .zip(&shape.properties)
            .map(|(place, property)| {
                let slot = device.active.as_ref().and_then(|active| active.slots.get(usize::from(place)));
                let desired = device.desired.iter().find(|(of, _)| *of == place).map(|(_, desired)| desired);
                Property {
                    name: property.name.to_string(),
                    kind: type_name(property.domain.kind).to_owned(),
                    access_mode: property.access,
                    unit: property.unit.to_string(),
                    reported: slot.and_then(|slot| slot.reported.as_ref()).map(Value::from),
                    observed_desired: slot.and_then(|slot| slot.observed.as_deref()).map(Value::from),
                    desired: desired.and_then(|desired| {
                        Some(Wanted {
                            value: desired.value()?.to_owned(),
                            timestamp: desired.at(),
                            origin: desired.origin().to_owned(),
                            version: desired.version,
                        })
                    }),
                }
            })
            .collect();
        twin
    }
}

impl From<&Sample> for Value {
    fn from(sample: &Sample) -> Self {
        let extra = sample.extra.iter().flatten();
        Self {
            value: sample.text.to_string(),
            timestamp: sample.at,
            version: sample.version,
            metadata: order::map(extra.map(|(key, value)| (key.to_string(), value.to_string()))),
        }
    }
}
