//! Which dead containers and sandboxes of a pod may go. A pure choice; nothing that may run is ever in it.
//!
//! One dead instance per container stays, for logs and for the last state; a pod that is gone keeps nothing.

use std::collections::BTreeSet;

use super::observed::{Instance, Observed, Sandbox, State};
use crate::order;

/// What may be removed.
#[derive(Debug, Default, PartialEq)]
pub struct Surplus<'a> {
    /// Dead instances.
    pub containers: Vec<&'a Instance>,
    /// Sandboxes that are not ready and hold nothing that stays. Containers go first.
    pub sandboxes: Vec<&'a Sandbox>,
}

/// What may be removed of a pod; of a pod whose object is gone or going, everything dead.
pub fn surplus(observed: &Observed, deleted: bool) -> Surplus<'_> {
    let dead = |instance: &&Instance| matches!(instance.state, State::Exited | State::Created);
    let mut kept = BTreeSet::new();
    let containers: Vec<&Instance> = observed
        .containers
        .iter()
        .enumerate()
        // The newest instance is the container's state even if it has only been made.
        .filter(|(index, instance)| {
            deleted
                || instance.state != State::Created
                || observed.containers[..*index].iter().any(|newer| newer.name == instance.name)
        })
        .map(|(_, instance)| instance)
        .filter(dead)
        .filter(|instance| deleted || instance.state == State::Created || !kept.insert(instance.name.as_str()))
        .collect();

    let gone: BTreeSet<&str> = order::set(containers.iter().map(|instance| instance.id.as_str()));
    let sandboxes = observed
        .sandboxes
        .iter()
        .enumerate()
        .filter(|(index, sandbox)| !sandbox.ready && (deleted || *index > 0))
        .map(|(_, sandbox)| sandbox)
        .filter(|sandbox| {
            observed
                .containers
                .iter()
                .all(|instance| instance.sandbox != sandbox.id || gone.contains(instance.id.as_str()))
        })
        .collect();
    Surplus { containers, sandboxes }
}
