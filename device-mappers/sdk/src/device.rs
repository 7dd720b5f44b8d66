//! A Device together with what its DeviceModel says of its properties: all that is needed to run it.

use std::sync::Arc;
use std::time::Duration;

use skerry_proto::device::{AccessMode, NANOSECONDS};
use skerry_proto::dmi;
use tracing::warn;

use crate::config::Config;
use crate::sink::{Outlet, Sinks};
use crate::value::Kind;

/// Cycle of a property that states none; KubeEdge's default.
const DEFAULT_CYCLE: Duration = Duration::from_secs(1);
/// Bounds of a cycle; what is outside is clamped.
const CYCLES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(86_400));
/// How often at least an unchanged value is reported, of a property that states no report cycle.
const DEFAULT_REPORT: Duration = Duration::from_secs(60);

/// A device, ready to run.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) config: Config,
    pub(crate) properties: Vec<Property>,
    pub(crate) methods: Vec<dmi::DeviceMethod>,
}

/// A property of a device, ready to run.
#[derive(Debug)]
pub(crate) struct Property {
    pub(crate) name: String,
    /// None: the model does not have it.
    pub(crate) kind: Option<Kind>,
    pub(crate) writable: bool,
    pub(crate) minimum: Option<f64>,
    pub(crate) maximum: Option<f64>,
    pub(crate) visitor: Config,
    pub(crate) cycle: Duration,
    pub(crate) report_cycle: Duration,
    /// A change of a number that is no larger than this is none.
    pub(crate) dead_band: f64,
    pub(crate) desired: Option<Desired>,
    pub(crate) outlets: Vec<Outlet>,
}

/// What a property should be, and which time it was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Desired {
    pub(crate) value: String,
    /// `metadata.timestamp`: the same value with another time is written again.
    pub(crate) timestamp: String,
}

/// Namespace and name, as one key.
pub(crate) fn key(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}")
}

impl Device {
    /// Puts a device together, with what it lacks of some keys from its first property that has any. What the model lacks is no error here: the
    /// property says so when it is to be read.
    pub(crate) fn new(device: &dmi::Device, model: &dmi::DeviceModel, sinks: &Arc<Sinks>, keys: &[&str]) -> Self {
        let spec = device.spec.clone().unwrap_or_default();
        let empty = dmi::DeviceModelSpec::default();
        let model = model.spec.as_ref().unwrap_or(&empty);
        let properties: Vec<Property> = spec
            .properties
            .iter()
            .map(|property| {
                let of_model = model.properties.iter().find(|of_model| of_model.name == property.name);
                Property::new(device, property, of_model, sinks)
            })
            .collect();
        let mut visitors = properties.iter().map(|property| &property.visitor);
        let other = visitors.find(|visitor| keys.iter().any(|key| visitor.raw(key).is_some()));
        let config = Config::from(spec.protocol.as_ref());
        Self {
            namespace: device.namespace.clone(),
            name: device.name.clone(),
            config: match other {
                Some(other) => config.or(keys, other),
                None => config,
            },
            properties,
            methods: spec.methods,
        }
    }

    pub(crate) fn key(&self) -> String {
        key(&self.namespace, &self.name)
    }
}

impl Property {
    fn new(
        device: &dmi::Device,
        property: &dmi::DeviceProperty,
        model: Option<&dmi::ModelProperty>,
        sinks: &Arc<Sinks>,
    ) -> Self {
        let visitor = Config::from(property.visitors.as_ref());
        let kind = model.and_then(|model| kind(&model.r#type));
        let dead_band = visitor.number("deadBand").ok().flatten().unwrap_or(0.0).max(0.0);
        let outlets = match (&property.push_method, kind) {
            (Some(push), Some(kind)) => sinks.outlets(&device.namespace, &device.name, &property.name, kind, push),
            _ => Vec::new(),
        };
        let bound = |text: &str| text.trim().parse::<f64>().ok().filter(|bound| bound.is_finite());
        Self {
            name: property.name.clone(),
            kind,
            writable: model.is_some_and(|model| access(&model.access_mode) == AccessMode::ReadWrite),
            minimum: model.and_then(|model| bound(&model.minimum)),
            maximum: model.and_then(|model| bound(&model.maximum)),
            visitor,
            cycle: cycle(&property.name, property.collect_cycle).unwrap_or(DEFAULT_CYCLE),
            report_cycle: cycle(&property.name, property.report_cycle).unwrap_or(DEFAULT_REPORT),
            dead_band,
            desired: property.desired.as_ref().and_then(desired),
            outlets,
        }
    }

    /// Whether everything but the desired value is the same.
    pub(crate) fn same_but_desired(&self, other: &Self) -> bool {
        self.name == other.name
            && self.kind == other.kind
            && self.writable == other.writable
            && self.minimum == other.minimum
            && self.maximum == other.maximum
            && self.visitor == other.visitor
            && self.cycle == other.cycle
            && self.report_cycle == other.report_cycle
            && self.dead_band == other.dead_band
            && self.outlets == other.outlets
    }
}

/// An empty value without metadata is no wish.
fn desired(twin: &dmi::TwinProperty) -> Option<Desired> {
    if twin.value.is_empty() && twin.metadata.is_empty() {
        return None;
    }
    let timestamp = twin.metadata.get("timestamp").cloned().unwrap_or_default();
    Some(Desired { value: twin.value.clone(), timestamp })
}

fn cycle(property: &str, stated: i64) -> Option<Duration> {
    let cycle = skerry_proto::device::cycle(stated)?;
    if stated >= NANOSECONDS {
        warn!(property, cycle = stated, "a cycle of more than eleven days is taken for nanoseconds");
    }
    if cycle < CYCLES.0 || cycle > CYCLES.1 {
        warn!(property, ?cycle, least = ?CYCLES.0, most = ?CYCLES.1, "the cycle is clamped");
    }
    Some(cycle.clamp(CYCLES.0, CYCLES.1))
}

/// The type of a property, in either case.
fn kind(text: &str) -> Option<Kind> {
    Some(match text.to_ascii_uppercase().as_str() {
        "INT" => Kind::Int,
        "FLOAT" => Kind::Float,
        "DOUBLE" => Kind::Double,
        "STRING" => Kind::String,
        "BOOLEAN" => Kind::Boolean,
        "BYTES" => Kind::Bytes,
        "STREAM" => Kind::Stream,
        _ => return None,
    })
}

fn access(text: &str) -> AccessMode {
    if text.eq_ignore_ascii_case("ReadWrite") { AccessMode::ReadWrite } else { AccessMode::ReadOnly }
}

/// As the interface names a type.
pub(crate) fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Int => "INT",
        Kind::Float => "FLOAT",
        Kind::Double => "DOUBLE",
        Kind::String => "STRING",
        Kind::Boolean => "BOOLEAN",
        Kind::Bytes => "BYTES",
        Kind::Stream => "STREAM",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cycles_are_milliseconds_and_older_manifests_nanoseconds() {
        assert_eq!(cycle("p", 0), None);
        assert_eq!(cycle("p", -5), None);
        assert_eq!(cycle("p", 500), Some(Duration::from_millis(500)));
        assert_eq!(cycle("p", 10_000_000_000), Some(Duration::from_secs(10)));
        assert_eq!(cycle("p", 1), Some(CYCLES.0));
        assert_eq!(cycle("p", 900_000_000), Some(CYCLES.1));
        assert_eq!(cycle("p", i64::MAX), Some(CYCLES.1));
    }

    #[test]
    fn an_empty_wish_is_none() {
        assert_eq!(desired(&dmi::TwinProperty::default()), None);
        let metadata = [("timestamp".to_owned(), "7".to_owned())].into();
        let wish = desired(&dmi::TwinProperty { value: String::new(), metadata });
        assert_eq!(wish, Some(Desired { value: String::new(), timestamp: "7".to_owned() }));
    }

    #[test]
    fn types_are_known_in_either_case() {
        for name in ["INT", "FLOAT", "DOUBLE", "STRING", "BOOLEAN", "BYTES", "STREAM"] {
            assert_eq!(kind(name).map(kind_name), Some(name));
            assert_eq!(kind(&name.to_lowercase()).map(kind_name), Some(name));
        }
        assert_eq!(kind("VOID"), None);
    }
}
