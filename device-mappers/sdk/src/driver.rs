//! What a protocol brings: how a device is connected, and how its properties are read and written. Everything else is done here, alike for
//! all protocols.

use std::collections::BTreeMap;
use std::future::{Future, pending};

use crate::config::{Config, ConfigError};
use crate::value::{Kind, Value};

/// A protocol.
pub trait Driver: Send + Sync + 'static {
    /// How a property is reached: its `visitors`, understood.
    type Point: Point;
    /// A device that is connected.
    type Link: Link<Point = Self::Point>;

    /// What a device says in `protocol.protocolName`.
    fn protocol(&self) -> &'static str;

    /// Keys that manifests of KubeEdge's may have in `visitors` though they are the device's: what the device itself lacks of them it takes from
    /// its first property that has any.
    fn device_keys_of_visitors(&self) -> &'static [&'static str] {
        &[]
    }

    /// Understands the `visitors` of a property.
    ///
    /// # Errors
    ///
    /// What is missing or wrong; the property is then neither read nor written, the others are.
    fn point(&self, property: &PropertyInfo<'_>, visitor: &Config) -> Result<Self::Point, ConfigError>;

    /// Connects a device. Ends within the driver's own time-outs.
    fn connect(&self, device: &DeviceInfo<'_>) -> impl Future<Output = Result<Self::Link, Fault>> + Send;
}

/// What a driver may want to know of a property besides its visitor.
#[derive(Clone, Copy, Debug)]
pub struct PropertyInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// What its values are.
    pub kind: Kind,
    /// Whether it can be written.
    pub writable: bool,
    /// `configData` of the device.
    pub device: &'a Config,
}

/// What a driver may want to know of a device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceInfo<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// `configData` of its protocol.
    pub config: &'a Config,
}

/// How a property is reached.
pub trait Point: Send + Sync + 'static {
    /// Whether it is read in a cycle; if not, its values come by [`Link::changes`].
    fn polled(&self) -> bool {
        true
    }

    /// Whether a written value can be read back.
    fn verified(&self) -> bool {
        true
    }

    /// How far a value that is read back may be from what was written: half of the least step of the device.
    fn tolerance(&self) -> f64 {
        0.0
    }
}

/// A device that is connected. Dropping it disconnects.
///
/// Any of its futures may be dropped before it ends; the next call then finds a working link, or ends with [`Fault::Offline`].
pub trait Link: Send + 'static {
    /// See [`Driver::Point`].
    type Point: Point;

    /// Reads points in as few requests as they can be read in, and says of each what was read or why it was not.
    ///
    /// # Errors
    ///
    /// When the device cannot be reached.
    fn read(
        &mut self,
        points: &[(usize, &Self::Point)],
        readings: &mut Vec<Reading>,
    ) -> impl Future<Output = Result<(), Fault>> + Send;

    /// Writes one point.
    ///
    /// # Errors
    ///
    /// When the device cannot be reached, or refuses.
    fn write(&mut self, point: &Self::Point, value: &Value) -> impl Future<Output = Result<(), Fault>> + Send;

    /// Asks for the values of the points that are not polled. Called once after connecting, and again when the properties have changed.
    ///
    /// # Errors
    ///
    /// When the device cannot be reached.
    fn subscribe(&mut self, _points: &[(usize, &Self::Point)]) -> impl Future<Output = Result<(), Fault>> + Send {
        async { Ok(()) }
    }

    /// Waits for values of points that are not polled.
    ///
    /// # Errors
    ///
    /// When the device cannot be reached any more.
    fn changes(&mut self, _readings: &mut Vec<Reading>) -> impl Future<Output = Result<(), Fault>> + Send {
        pending()
    }

    /// Runs a method the protocol itself has. `None`: it has no such method, and what the device declares is done by writing properties.
    ///
    /// # Errors
    ///
    /// When the device cannot be reached, or refuses.
    fn call(
        &mut self,
        _method: &str,
        _arguments: &BTreeMap<String, String>,
    ) -> impl Future<Output = Result<Option<BTreeMap<String, String>>, Fault>> + Send {
        async { Ok(None) }
    }
}

/// One property that was read.
#[derive(Debug)]
pub struct Reading {
    /// The number the point was asked for by.
    pub point: usize,
    /// What was read, or why it was not.
    pub outcome: Result<Sample, String>,
}

/// A value and the time its source gives it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The value.
    pub value: Value,
    /// Milliseconds since the Unix epoch, when the source says so.
    pub time: Option<i64>,
}

impl Reading {
    /// A value without a time of its own.
    #[must_use]
    pub fn new(point: usize, value: Value) -> Self {
        Self { point, outcome: Ok(Sample { value, time: None }) }
    }

    /// A property that was not read.
    #[must_use]
    pub fn failed(point: usize, why: impl Into<String>) -> Self {
        Self { point, outcome: Err(why.into()) }
    }
}

/// Why something did not work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The device cannot be reached: it is connected anew, after a while.
    #[error("{0}")]
    Offline(String),
    /// The device is there and says no.
    #[error("{0}")]
    Refused(String),
}
