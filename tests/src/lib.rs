//! The harness: starts the real parts in throw-away directories, breaks what lies between them, and leaves nothing behind.
//!
//! It is a shell of blocking calls: a test reads from top to bottom, and every wait has a limit that `SKERRY_TEST_PATIENCE`
//! (seconds) stretches. What belongs to a run lies in one directory, [`paths::RunDir`]; everything that a run starts has that
//! directory's path in its arguments, so that whatever outlives it is found and removed, by its janitor or by the next run.
#![allow(
    clippy::disallowed_methods,
    reason = "the harness is the world the product runs in: it waits and reads clocks"
)]

pub mod aged;
pub mod api;
pub mod cleanup;
pub mod cloudcore;
pub mod controlplane;
pub mod cri;
pub mod edge;
pub mod fault;
pub mod guest;
pub mod images;
pub mod kubectl;
pub mod kubelet;
pub mod machine;
pub mod manifests;
pub mod mapper;
pub mod network;
pub mod paths;
pub mod peer;
pub mod pki;
pub mod ports;
pub mod process;
pub mod procfs;
pub mod relay;
pub mod runtime;
pub mod swarm;
pub mod systemd;
pub mod tar;
pub mod wait;
