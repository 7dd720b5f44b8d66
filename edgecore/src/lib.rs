//! edgecore, the agent of an edge node: the link to cloudcore, the store that is its bus, and the kubelet.

pub mod app;
pub mod cli;
pub mod clock;
pub mod cni;
pub mod config;
pub mod control;
pub mod devices;
pub mod enroll;
pub mod files;
pub mod https;
pub mod identity;
pub mod kubelet;
pub mod link;
pub mod ops;
pub mod order;
pub mod preflight;
pub mod runtime;
pub mod stats;
pub mod store;
pub mod supervise;

// What damages input in the tests of proto: its files, for as a feature of it everything would be built once more.
#[cfg(test)]
#[path = "../../proto/src/dice.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
mod dice;
#[cfg(test)]
#[path = "../../proto/src/fuzz/run.rs"]
mod fuzz;
#[cfg(test)]
#[path = "../../proto/src/fuzz/mutate.rs"]
#[allow(dead_code, reason = "not all of it is needed here")]
mod mutate;
