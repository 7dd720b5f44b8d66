//! End to end on the real parts: what a user sees of a joined node, on good days and bad ones.
//!
//! One control plane serves all tests of the binary. Pods have one cgroup tree a machine, so there is one edge at a time and the tests
//! run one after another (`--test-threads=1`; a lock holds if that is forgotten).
#![allow(clippy::disallowed_methods, reason = "the world outside waits")]

mod apifaults;
mod badinput;
mod bed;
mod certificates;
mod clones;
mod crashes;
mod defaults;
mod devices;
mod dmi;
mod fence;
mod hostile;
mod join;
mod killed;
mod lies;
mod linkcut;
mod machine;
mod mappers;
mod modbus;
mod mqtt;
mod nodedelete;
mod ops;
mod powercycle;
mod replicas;
mod rights;
mod transports;
mod unused;
mod workloads;
mod world;
