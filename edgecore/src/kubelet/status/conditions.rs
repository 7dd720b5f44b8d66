//! The conditions this node writes.

use k8s_openapi::api::core::v1::{ContainerStatus, PodCondition};

use super::containers::{Containers, is_running, old, terminated};
use super::whole;
use crate::kubelet::memory::Outcome;
use crate::kubelet::plan::Moment;
use crate::kubelet::spec::Kind;

type Verdict = (bool, Option<&'static str>, Option<String>);

const TRUE: Verdict = (true, None, None);

/// The conditions, in the order people are used to.
pub(super) fn of(
    at: &Moment<'_>,
    statuses: &Containers,
    phase: &str,
    disruption: Option<&Outcome>,
) -> Vec<PodCondition> {
    let containers = containers_ready(at, statuses, phase);
    let ready = if containers.0 { gates(at) } else { containers.clone() };
    let sandbox = at.sandbox().is_some() && !matches!(phase, "Succeeded" | "Failed");
    let mut conditions = vec![
        condition(at, "PodReadyToStartContainers", (sandbox, None, None)),
        condition(at, "Initialized", initialized(at, statuses, phase)),
        condition(at, "Ready", ready),
        condition(at, "ContainersReady", containers),
        condition(at, "PodScheduled", TRUE),
    ];
    if let Some(outcome) = disruption {
        let verdict = (true, Some("TerminationByKubelet"), Some(outcome.message.clone()));
        conditions.push(condition(at, "DisruptionTarget", verdict));
    } else if let Some(kept) = before(at, "DisruptionTarget") {
        conditions.push(kept.clone());
    }
    if resize_waits(at, statuses) {
        let message = "resources of a running container cannot be changed on this node".to_owned();
        conditions.push(condition(at, "PodResizePending", (true, Some("Deferred"), Some(message))));
    }
    conditions
}

fn condition(at: &Moment<'_>, type_: &str, (status, reason, message): Verdict) -> PodCondition {
    let status = if status { "True" } else { "False" };
    let since = before(at, type_).filter(|old| old.status == status).and_then(|old| old.last_transition_time.clone());
    PodCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: reason.map(str::to_owned),
        message,
        last_transition_time: Some(since.unwrap_or_else(|| whole(at.now))),
        observed_generation: at.spec.pod.metadata.generation,
        last_probe_time: None,
    }
}

fn before<'a>(at: &Moment<'a>, type_: &str) -> Option<&'a PodCondition> {
    old(at)?.conditions.as_deref()?.iter().find(|condition| condition.type_ == type_)
}

fn initialized(at: &Moment<'_>, statuses: &Containers, phase: &str) -> Verdict {
    if phase == "Succeeded" {
        return (true, Some("PodCompleted"), None);
    }
    if statuses.apps.iter().any(|status| is_running(status) || has_run(status)) {
        return TRUE;
    }
    let incomplete: Vec<&str> = at
        .spec
        .inits()
        .iter()
        .zip(&statuses.inits)
        .filter(|(view, status)| if view.kind == Kind::Sidecar { status.started != Some(true) } else { !status.ready })
        .map(|(view, _)| view.name)
        .collect();
    if incomplete.is_empty() {
        return TRUE;
    }
    let message = format!("containers with incomplete status: [{}]", incomplete.join(" "));
    (false, Some("ContainersNotInitialized"), Some(message))
}

/// It ended, rather than being declared lost without ever having been made.
fn has_run(status: &ContainerStatus) -> bool {
    terminated(status).is_some_and(|state| state.container_id.is_some())
        || status.last_state.as_ref().is_some_and(|state| state.terminated.is_some())
}

fn containers_ready(at: &Moment<'_>, statuses: &Containers, phase: &str) -> Verdict {
    match phase {
        "Succeeded" => return (false, Some("PodCompleted"), None),
        "Failed" => return (false, Some("PodFailed"), None),
        _ => {}
    }
    let (inits, apps) = (at.spec.inits(), at.spec.apps());
    let sidecars = inits.iter().zip(&statuses.inits).filter(|(view, _)| view.kind == Kind::Sidecar);
    let unready: Vec<&str> = sidecars
        .chain(apps.iter().zip(&statuses.apps))
        .filter(|(_, status)| !status.ready)
        .map(|(view, _)| view.name)
        .collect();
    if unready.is_empty() {
        return TRUE;
    }
    (false, Some("ContainersNotReady"), Some(format!("containers with unready status: [{}]", unready.join(" "))))
}

fn gates(at: &Moment<'_>) -> Verdict {
    let gates = at.spec.inner().and_then(|spec| spec.readiness_gates.as_deref()).unwrap_or_default();
    let given = at.spec.pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let missing: Vec<String> = gates
        .iter()
        .filter_map(|gate| {
            let name = &gate.condition_type;
            match given.iter().find(|condition| condition.type_ == *name) {
                None => Some(format!("corresponding condition of pod readiness gate \"{name}\" does not exist.")),
                Some(condition) if condition.status != "True" => Some(format!(
                    "the status of pod readiness gate \"{name}\" is not \"True\", but {}",
                    condition.status
                )),
                Some(_) => None,
            }
        })
        .collect();
    if missing.is_empty() { TRUE } else { (false, Some("ReadinessGatesNotReady"), Some(missing.join(", "))) }
}

/// The spec asks a running container for other resources than it has.
fn resize_waits(at: &Moment<'_>, statuses: &Containers) -> bool {
    let (inits, apps) = (at.spec.inits(), at.spec.apps());
    inits.iter().zip(&statuses.inits).chain(apps.iter().zip(&statuses.apps)).any(|(view, status)| {
        let asked = view.container.and_then(|container| container.resources.as_ref());
        let (Some(asked), Some(given)) = (asked, status.resources.as_ref()) else { return false };
        let differs = |asked: &Option<std::collections::BTreeMap<_, _>>, given: &Option<_>| {
            asked.as_ref().filter(|list| !list.is_empty()) != given.as_ref()
        };
        is_running(status) && (differs(&asked.requests, &given.requests) || differs(&asked.limits, &given.limits))
    })
}
