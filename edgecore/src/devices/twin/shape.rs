//! What a device's values may be: the properties that it and its model name together. Devices of a kind share one, so that tens of
//! thousands that are declared cost little.

use std::sync::Arc;
use std::time::Duration;

use skerry_proto::device::{AccessMode, DeviceModelSpec, DeviceSpec, Domain, Unfit, cycle};

/// Between reports of a property to the cloud, unless the Device says otherwise.
const REPORT_CYCLE: Duration = Duration::from_secs(60);
/// No property is reported more often.
const SHORTEST_CYCLE: Duration = Duration::from_secs(1);
/// A property of which nothing is heard for so many reads, and for so many of the cycles in which mappers say again what has not changed, is
/// not read any more.
const MISSED_READS: u32 = 3;
/// See [`MISSED_READS`].
const MISSED_REPORTS: u32 = 2;
/// After so long a device of which there is no news is reported again, for when it answered last, unless its stateReport says otherwise.
const RENEWAL: Duration = Duration::from_secs(600);
/// And no more often than this.
const SHORTEST_RENEWAL: Duration = Duration::from_secs(10);
/// Key of a property's `visitors.configData`: how much a number must change to be reported to the cloud.
const DEAD_BAND: &str = "reportDeadBand";

/// The properties of a kind of device.
#[derive(Debug, PartialEq)]
pub(crate) struct Shape {
    pub(super) properties: Box<[Property]>,
    /// Whether the state goes to the cloud.
    pub(super) report_state: bool,
    /// After how long without news it is reported again that it answers.
    pub(super) renewal: Duration,
    /// Named by the Device, unknown to its model.
    pub(super) strangers: Box<[Box<str>]>,
    /// What is wrong with what the Device says of its properties.
    pub(super) wrong: Option<Box<str>>,
}

/// One property.
#[derive(Debug, PartialEq)]
pub(crate) struct Property {
    pub(crate) name: Arc<str>,
    pub(crate) domain: Domain,
    pub(crate) access: AccessMode,
    pub(crate) unit: Box<str>,
    /// Whether its values go into the DeviceStatus, and how long after the one before.
    pub(super) report: Option<Duration>,
    pub(super) dead_band: f64,
    /// After so long without a word of it something is wrong.
    pub(super) silence: Duration,
}

impl Shape {
    /// Of a device with what its model adds.
    pub(super) fn of(spec: &DeviceSpec, model: &DeviceModelSpec) -> Self {
        let (mut properties, mut strangers, mut wrong) = (Vec::new(), Vec::new(), None);
        for of in &spec.properties {
            let Some(base) = model.properties.iter().find(|base| base.name == of.name) else {
                strangers.push(of.name.as_str().into());
                continue;
            };
            let report = cycle(of.report_cycle).unwrap_or(REPORT_CYCLE);
            let collect = cycle(of.collect_cycle).unwrap_or(SHORTEST_CYCLE);
            let said = of.visitors.as_ref().and_then(|visitors| visitors.config_data.as_ref()?.get(DEAD_BAND));
            let band = said.and_then(dead_band);
            if let Some(said) = said.filter(|_| band.is_none()) {
                let said: String = said.to_string().chars().take(64).collect();
                wrong = Some(format!("{DEAD_BAND} of {} is {said}, which is no number, and so is 0", of.name).into());
            }
            properties.push(Property {
                name: of.name.as_str().into(),
                domain: Domain::of(base),
                access: base.access_mode,
                unit: base.unit.as_str().into(),
                report: of.report_to_cloud.then(|| report.max(SHORTEST_CYCLE)),
                dead_band: band.unwrap_or(0.0),
                silence: (collect * MISSED_READS).max(report * MISSED_REPORTS),
            });
        }
        let state = spec.state_report.as_ref();
        Self {
            properties: properties.into(),
            report_state: state.is_none_or(|report| report.report_to_cloud),
            renewal: state
                .and_then(|report| cycle(report.report_cycle))
                .map_or(RENEWAL, |cycle| cycle.max(SHORTEST_RENEWAL)),
            strangers: strangers.into(),
            wrong,
        }
    }

    /// Place of a property.
    pub(super) fn place(&self, name: &str) -> Option<usize> {
        self.properties.iter().position(|property| &*property.name == name)
    }
}

/// A number, or one as text, as mappers of KubeEdge write them.
fn dead_band(said: &serde_json::Value) -> Option<f64> {
    let number = said.as_f64().or_else(|| said.as_str()?.trim().parse().ok())?;
    (number.is_finite() && number >= 0.0).then_some(number)
}

impl Property {
    /// Whether a value can be one of this property's; otherwise why not.
    pub(crate) fn check(&self, value: &str) -> Result<(), String> {
        self.domain.check(value).map_err(|unfit| self.words(&unfit))
    }

    /// Whether it can be told to be something.
    pub(crate) fn check_desired(&self, value: &str) -> Result<(), String> {
        match self.access {
            AccessMode::ReadOnly => Err(self.words(&Unfit::ReadOnly)),
            AccessMode::ReadWrite => self.check(value),
        }
    }

    fn words(&self, unfit: &Unfit) -> String {
        format!("{} {unfit}", self.name)
    }

    /// Whether a value differs enough from the one that was reported to be reported, too.
    pub(super) fn is_news(&self, sent: Option<&str>, value: &str) -> bool {
        match sent {
            Some(sent) if sent == value => false,
            Some(sent) if self.dead_band > 0.0 => match (sent.parse::<f64>(), value.parse::<f64>()) {
                (Ok(sent), Ok(value)) => (sent - value).abs() > self.dead_band,
                _ => true,
            },
            _ => true,
        }
    }
}
