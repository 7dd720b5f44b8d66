//! What every device mapper does alike, so that a protocol's own crate is its [`Driver`] and a `main` of one line.
//!
//! A mapper registers with edgecore over DMI, the device mapper interface, again after every start of either side; reads each device in
//! cycles, its properties in as few requests as the protocol allows; converts what it reads to the type of the model; writes desired
//! values, reads them back and only then says that they were written; reports states and values; and pushes values to sinks, where they
//! wait on disk while the sink is away.
//!
//! Decisions ([`schedule`], [`health`], [`value`], [`clock::stamp`]) know neither IO nor clocks.

mod app;
mod backoff;
pub mod clock;
pub mod config;
pub mod counters;
mod device;
mod directory;
pub mod driver;
pub mod health;
pub mod net;
pub mod payload;
mod report;
pub mod schedule;
mod service;
mod session;
mod sink;
pub mod task;
#[cfg(feature = "testing")]
pub mod testing;
pub mod value;
mod worker;

pub use app::run;
pub use backoff::Backoff;
pub use config::{Config, ConfigError};
pub use driver::{DeviceInfo, Driver, Fault, Link, Point, PropertyInfo, Reading, Sample};
pub use value::{Kind, Value};
