//! cloudcore: watches the apiserver and keeps edge nodes in step with it.

pub mod admin;
mod apiserver;
pub mod app;
pub mod backend;
pub mod backend_k8s;
pub mod cli;
pub mod clock;
mod closure;
pub mod config;
mod devices;
pub mod front;
pub mod kubelet;
pub mod log;
pub mod metrics;
mod nodes;
pub mod pki;
pub mod registry;
pub mod retry;
mod sa_tokens;
pub mod secrets;
pub mod supervise;
pub mod token;
mod upstream;
mod watch;
