//! The status of one pod: a pure function of what is wanted, what runs, what is remembered and the time.
//!
//! A terminal phase is given only when nothing of the pod runs any more, and is never taken back. Every time has whole seconds, as
//! the API has. Conditions that belong to others are left out.

mod conditions;
mod containers;
mod phase;

#[cfg(test)]
mod tests;

use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{HostIP, Pod, PodIP, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::memory::Memory;
use super::observed::{Instance, Observed};
use super::plan::{Life, Moment};
use super::resources::qos_class;
use super::spec::{ContainerView, Spec, is_terminal_phase};
use crate::order;
use phase::Phase;

/// The status of a pod. Call after [`Memory::note`], so that what was decided shows.
pub fn status(
    pod: &Pod,
    life: Life,
    observed: &Observed,
    memory: &Memory,
    node_ips: &[IpAddr],
    now: Timestamp,
) -> PodStatus {
    let at = Moment { spec: Spec::new(pod), life, observed, memory, now };
    let old = containers::old(&at);
    let termination = at.ending();
    let ended = termination.is_some() && !observed.is_alive();
    let old_phase = old.and_then(|old| old.phase.as_deref());

    let mut statuses = containers::of(&at, termination.is_some());
    let mut phase = phase::phase(&at, &statuses, ended, true);
    if ended {
        statuses.close();
        if !phase.is_terminal() {
            phase = Phase::Failed;
        }
    }
    let outcome = termination.as_ref().and_then(|termination| termination.outcome.as_ref());
    if outcome.is_some() {
        phase = Phase::Failed;
    }
    let (phase, outcome) = match old_phase {
        Some(old) if is_terminal_phase(old) => (old, None),
        _ if phase.is_terminal() && !ended => (old_phase.unwrap_or("Pending"), None),
        _ => (phase.as_str(), outcome),
    };
    let kept = old.filter(|_| old_phase == Some(phase));
    let (reason, message) = match outcome {
        Some(outcome) => (Some(outcome.reason.clone()), Some(outcome.message.clone())),
        None => (kept.and_then(|old| old.reason.clone()), kept.and_then(|old| old.message.clone())),
    };
    let disruption = termination.as_ref().and_then(|termination| termination.outcome.as_ref());
    let disruption = disruption.filter(|outcome| outcome.disruption && is_terminal_phase(phase));
    let conditions = conditions::of(&at, &statuses, phase, disruption);

    let mut status = PodStatus {
        phase: Some(phase.to_owned()),
        reason,
        message,
        conditions: Some(conditions),
        start_time: memory.start_time.map(whole).or_else(|| old.and_then(|old| old.start_time.clone())),
        observed_generation: pod.metadata.generation,
        qos_class: old.and_then(|old| old.qos_class.clone()).or_else(|| Some(qos_class(pod).as_str().to_owned())),
        ..PodStatus::default()
    };
    addresses(&at, old, node_ips, &mut status);
    if !memory.rejected {
        statuses.put(&mut status);
    }
    status
}

/// Two statuses say the same: parts of a second do not count.
pub fn same(a: &PodStatus, b: &PodStatus) -> bool {
    a == b || matches!((serde_json::to_value(a), serde_json::to_value(b)), (Ok(a), Ok(b)) if a == b)
}

fn addresses(at: &Moment<'_>, old: Option<&PodStatus>, node_ips: &[IpAddr], status: &mut PodStatus) {
    status.host_ip = node_ips.first().map(ToString::to_string);
    let host_ips = node_ips.iter().map(|ip| HostIP { ip: ip.to_string() }).collect();
    status.host_ips = (!node_ips.is_empty()).then_some(host_ips);

    let mut ips: Vec<IpAddr> = if at.spec.host_network() {
        node_ips.to_vec()
    } else {
        at.observed
            .sandboxes
            .iter()
            .find(|sandbox| sandbox.ready)
            .map(|sandbox| sandbox.ips.clone())
            .unwrap_or_default()
    };
    // One of the node's family, then one of the other.
    let primary_is_v4 = node_ips.first().is_none_or(IpAddr::is_ipv4);
    order::sort_by_key(&mut ips, |ip| ip.is_ipv4() != primary_is_v4);
    let mut families = Vec::new();
    ips.retain(|ip| {
        let fresh = !families.contains(&ip.is_ipv4());
        families.push(ip.is_ipv4());
        fresh
    });

    let before = old.filter(|old| old.pod_ip.is_some());
    match before {
        Some(old) if ips.is_empty() || at.spec.host_network() => {
            (status.pod_ip, status.pod_ips) = (old.pod_ip.clone(), old.pod_ips.clone());
        }
        _ if ips.is_empty() || at.memory.rejected => {}
        _ => {
            status.pod_ip = ips.first().map(ToString::to_string);
            status.pod_ips = Some(ips.iter().map(|ip| PodIP { ip: ip.to_string() }).collect());
        }
    }
}

/// All regular containers have ended for good, or an init container has failed for good.
pub(super) fn is_done(at: &Moment<'_>) -> bool {
    phase::phase(at, &containers::of(at, false), false, false).is_terminal()
}

/// Exit code of a container that has run and does not run now, as far as is known; 137 if it vanished.
pub(super) fn exit_code(at: &Moment<'_>, view: &ContainerView<'_>) -> Option<i32> {
    containers::exit_code(at, view)
}

/// The instance runs and its startup probe, if any, has succeeded.
pub(super) fn has_started(at: &Moment<'_>, view: &ContainerView<'_>, instance: &Instance) -> bool {
    containers::has_started(at, view, instance)
}

/// Restart count of the next instance: never below what was reported.
pub(super) fn next_restart_count(at: &Moment<'_>, view: &ContainerView<'_>, previous: Option<&Instance>) -> i32 {
    containers::next_restart_count(at, view, previous)
}

fn whole(time: Timestamp) -> Time {
    Time(Timestamp::from_second(time.as_second()).unwrap_or(time))
}
