//! What the cloud is told: the latest values of each device that has news, at its report cycle, and no more than [`PACE`] devices a second
//! of the whole node, in turns. A first value and another state go before the rest; one without news is reported now and then, for when it
//! answered last.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use skerry_proto::device::{DeviceReport, DeviceStatusStatus, Twin, TwinProperty};

use super::desired::Desired;
use super::shape::Property;
use super::values::Sample;
use super::{Device, Now, Twins, turn};
use crate::devices::convert::type_name;

/// Devices that are reported in a second.
const PACE: u32 = 5;

/// Whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Queue {
    urgent: BTreeSet<u32>,
    /// The turn of those.
    next_urgent: u32,
    /// The turn of the rest.
    next: u32,
    /// Thousandths of reports that may be made.
    room: u32,
    filled: Option<Duration>,
}

impl Queue {
    pub(super) fn urgent(&mut self, slot: u32) {
        self.urgent.insert(slot);
    }

    pub(super) fn gone(&mut self, slot: u32) {
        self.urgent.remove(&slot);
    }

    fn fill(&mut self, now: Duration) {
        let since = self.filled.map_or(Duration::from_secs(1), |filled| now.saturating_sub(filled));
        let more = u32::try_from(since.as_millis().min(1000)).unwrap_or(1000) * PACE;
        self.room = (self.room + more).min(PACE * 1000);
        self.filled = Some(now);
    }
}

/// A report to be made.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Due {
    /// `namespace/name`.
    pub(crate) key: String,
    pub(crate) uid: String,
    pub(crate) report: DeviceReport,
}

impl Twins {
    /// The next report that is due, if the pace lets there be one.
    pub(crate) fn take_report(&mut self, now: Now) -> Option<Due> {
        self.reports.fill(now.mono);
        if self.reports.room < 1000 {
            return None;
        }
        let slot = self.next_report(now)?;
        self.reports.room -= 1000;
        let device = self.get_mut(slot)?;
        let status = device.status();
        let (Some(active), Some(shape)) = (&mut device.active, &device.shape) else { return None };
        (active.dirty, active.reported_at, active.reported_online) = (false, Some(now.mono), active.last_online);
        for (property, slot) in shape.properties.iter().zip(&mut active.slots) {
            if property.report.is_some()
                && let Some(sample) = &slot.reported
                && slot.sent.as_deref() != Some(&sample.text)
            {
                slot.sent = Some(sample.text.clone());
            }
        }
        Some(Due { key: device.key.to_string(), uid: device.uid.to_string(), report: DeviceReport { status } })
    }

    fn next_report(&mut self, now: Now) -> Option<u32> {
        while let Some(slot) = turn(&mut self.reports.urgent, &mut self.reports.next_urgent) {
            if self.get(slot).is_some_and(|device| device.active.as_ref().is_some_and(|active| active.dirty)) {
                return Some(slot);
            }
        }
        let from = self.reports.next;
        let turn = self.active.range(from..).chain(self.active.range(..from));
        let slot = turn.copied().find(|slot| self.get(*slot).is_some_and(|device| device.is_due(now.mono)))?;
        self.reports.next = slot + 1;
        Some(slot)
    }

    /// A report that came to nothing, or that the cloud wants once more; all with an empty UID.
    pub(crate) fn report_again(&mut self, uid: &str) {
        for slot in self.active.clone() {
            if let Some(device) = self.get_mut(slot)
                && (uid.is_empty() || *device.uid == *uid)
                && let Some(active) = &mut device.active
            {
                (active.dirty, active.reported_at) = (true, None);
            }
        }
    }

    /// Whether a report waits that is not to wait for the next second.
    pub(crate) fn is_urgent(&self) -> bool {
        !self.reports.urgent.is_empty()
    }
}

impl Device {
    fn is_due(&self, now: Duration) -> bool {
        let (Some(active), Some(shape)) = (&self.active, &self.shape) else { return false };
        let cycle = shape.properties.iter().filter_map(|property| property.report).min();
        let since = active.reported_at.map(|at| now.saturating_sub(at));
        match active.dirty {
            true => since.is_none_or(|since| since >= cycle.unwrap_or_default()),
            // Without news: that it still answers.
            false => active.last_online > active.reported_online && since.is_some_and(|since| since >= shape.renewal),
        }
    }

    /// Its DeviceStatus.
    pub(super) fn status(&self) -> DeviceStatusStatus {
        let (Some(active), Some(shape)) = (&self.active, &self.shape) else { return DeviceStatusStatus::default() };
        let twins = (0..).zip(shape.properties.iter().zip(&active.slots)).filter_map(|(place, (property, slot))| {
            property.report?;
            let desired = self.desired.iter().find(|(of, _)| *of == place).map(|(_, desired)| desired);
            let reported = slot.reported.as_ref().map(|sample| reported(sample, property));
            let observed_desired = match &slot.observed {
                Some(sample) => Some(observed(sample, desired, property)),
                None => desired
                    .filter(|desired| desired.is_local() && self.is_told())
                    .and_then(|desired| given(desired, property)),
            };
            (reported.is_some() || observed_desired.is_some()).then(|| Twin {
                property_name: property.name.to_string(),
                reported,
                observed_desired,
            })
        });
        let extensions = self.trouble.as_ref().map(|trouble| {
            let mut extensions = serde_json::Map::new();
            extensions.insert("message".to_owned(), trouble.to_string().into());
            extensions.insert("refused".to_owned(), self.refused.into());
            extensions
        });
        DeviceStatusStatus {
            twins: twins.collect(),
            state: if shape.report_state { active.state.as_str().to_owned() } else { String::new() },
            last_online_time: if active.last_online > 0 { rfc3339(active.last_online) } else { String::new() },
            extensions,
        }
    }
}

fn reported(sample: &Sample, property: &Property) -> TwinProperty {
    let mut metadata: BTreeMap<String, String> = BTreeMap::new();
    for (key, value) in sample.extra.iter().flatten() {
        metadata.insert(key.to_string(), value.to_string());
    }
    metadata.insert("timestamp".to_owned(), sample.at.to_string());
    metadata.insert("type".to_owned(), type_name(property.domain.kind).to_owned());
    TwinProperty { value: sample.text.to_string(), metadata }
}

/// The desired value that the device has been given, as its mapper says; and who wanted it, if it is what is wanted now.
fn observed(sample: &Sample, desired: Option<&Desired>, property: &Property) -> TwinProperty {
    match desired.filter(|desired| desired.value() == Some(&sample.text)).and_then(|desired| given(desired, property)) {
        Some(given) => given,
        None => reported(sample, property),
    }
}

fn given(desired: &Desired, property: &Property) -> Option<TwinProperty> {
    let metadata = [
        ("timestamp", desired.at().to_string()),
        ("type", type_name(property.domain.kind).to_owned()),
        ("origin", desired.origin().to_owned()),
    ];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value)).into();
    desired.value().map(|value| TwinProperty { value: value.to_owned(), metadata })
}

/// Milliseconds since the Unix epoch as RFC 3339, in whole seconds.
pub(super) fn rfc3339(millis: i64) -> String {
    Timestamp::from_second(millis.div_euclid(1000)).unwrap_or_default().to_string()
}
