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
