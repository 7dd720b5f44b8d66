//! The container runtime, through CRI v1 on its socket: calls, what it holds of each pod, and a stream that says where to look.
//!
//! The runtime is the only truth about containers. What is cached here is what can no longer change, and only to make looking
//! cheap.

pub mod connect;
pub mod cri;
pub mod events;
#[cfg(test)]
pub mod fake;
mod termination;

pub use cri::{Cri, Error};
pub use events::{Wake, events};
