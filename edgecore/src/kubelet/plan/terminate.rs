//! The way out: containers stop, sidecars last and in reverse; then the sandbox; then what was on disk; then the records.

use super::{Action, KillReason, Life, Moment, Plan, Stage, Step, removals};
use crate::kubelet::gc;
use crate::kubelet::memory::Termination;
use crate::kubelet::observed::Instance;
use crate::kubelet::references::PodEvent;
use crate::kubelet::spec::Kind;

pub(super) fn plan(at: &Moment<'_>, termination: Termination) -> Plan {
    let events = match (&at.memory.termination, &termination.outcome) {
        (None, Some(outcome)) => vec![PodEvent {
            warning: false,
            reason: "DeadlineExceeded",
            message: outcome.message.clone(),
            field_path: None,
        }],
        _ => Vec::new(),
    };
    let (stage, steps) = if at.observed.is_alive() { stop(at, &termination) } else { clean(at) };
    Plan { stage, steps, wake_at: None, blocked: Vec::new(), termination: Some(termination), events }
}

fn stop(at: &Moment<'_>, termination: &Termination) -> (Stage, Vec<Step>) {
    let kills: Vec<Action> = at
        .alive()
        .map(|instance| {
            let grace = match at.life {
                Life::Orphan => instance.grace_period.unwrap_or(1),
                Life::Wanted | Life::Deleting | Life::Removed => termination.grace.unwrap_or_else(|| at.spec.grace()),
            };
            let message = format!("Stopping container {}", instance.name);
            let mut kill = at.kill(instance, grace, KillReason::PodEnds, message);
            if let Action::KillContainer { after, .. } = &mut kill {
                *after = before_it(at, instance);
            }
            kill
        })
        .collect();
    let sandboxes = at.observed.sandboxes.iter().filter(|sandbox| sandbox.ready);
    let stops = sandboxes.map(|sandbox| Action::StopSandbox { id: sandbox.id.clone() }).collect();
    let steps = [kills, stops].into_iter().filter(|actions: &Vec<Action>| !actions.is_empty());
    (Stage::Terminating, steps.map(|actions| Step { actions, must: true }).collect())
}

/// What must be gone before a sidecar hears its signal: all regular containers, and the sidecars that came after it.
fn before_it(at: &Moment<'_>, instance: &Instance) -> Vec<String> {
    let kind_of = |name: &str| at.spec.find(name).map(|view| (view.kind, view.index));
    let Some((Kind::Sidecar, own)) = kind_of(&instance.name) else { return Vec::new() };
    at.alive()
        .filter(|other| match kind_of(&other.name) {
            Some((Kind::App, _)) => true,
            Some((Kind::Sidecar, index)) => index > own,
            Some((Kind::Init | Kind::Ephemeral, _)) | None => false,
        })
        .map(|other| other.id.clone())
        .collect()
}

fn clean(at: &Moment<'_>) -> (Stage, Vec<Step>) {
    let mut steps = Vec::new();
    if !at.memory.torn_down {
        // Those that died without a stop still hold their network.
        let dead: Vec<_> =
            at.observed.sandboxes.iter().map(|sandbox| Action::StopSandbox { id: sandbox.id.clone() }).collect();
        if !dead.is_empty() {
            steps.push(Step { actions: dead, must: false });
        }
        steps.push(Step { actions: vec![Action::TearDown], must: true });
    }
    if at.life == Life::Deleting && !at.memory.finished {
        steps.push(Step { actions: vec![Action::ReportFinished], must: true });
    }
    steps.extend(removals(gc::surplus(at.observed, at.life.is_over())));
    let gone = at.observed.sandboxes.is_empty() && at.observed.containers.is_empty();
    let stage = if steps.is_empty() && at.life.is_over() && gone { Stage::Finished } else { Stage::Terminated };
    (stage, steps)
}
