//! Devices in the cloud, beside what the closure, the watches and the reports do for them: their CRDs, and what is wrong with one.

mod check;
pub(crate) mod crds;
pub(crate) mod lost;
pub(crate) mod review;
#[cfg(test)]
mod schema;
