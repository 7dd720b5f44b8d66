//! The kubelet: makes what the runtime holds of each pod agree with what the store says is wanted.
//!
//! Decisions are pure ([`plan`], [`status`], [`probe`]); what carries them out is thin.

pub mod observed;
pub mod references;
