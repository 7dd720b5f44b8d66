//! The statuses of the containers, from their instances, their probes and the statuses before.

use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus, PodStatus,
    ResourceRequirements,
};

use super::whole;
use crate::kubelet::memory::{PostStart, ProbeResult, Probes};
use crate::kubelet::observed::{Instance, State};
use crate::kubelet::plan::Moment;
use crate::kubelet::spec::{ContainerView, Kind};
use crate::order;

/// All termination messages of a pod together are held to this.
const MESSAGES: usize = 12_288;
const LOST: &str = "ContainerStatusUnknown";
const LOST_MESSAGE: &str = "The container could not be located when the pod was terminated";
const LOST_EXIT_CODE: i32 = 137;

/// Statuses in the order of the spec.
pub(super) struct Containers {
    pub(super) inits: Vec<ContainerStatus>,
    pub(super) apps: Vec<ContainerStatus>,
    pub(super) ephemerals: Vec<ContainerStatus>,
}

impl Containers {
    /// The pod has ended: whatever has not, as far as is known, is lost.
    pub(super) fn close(&mut self) {
        for status in self.inits.iter_mut().chain(&mut self.apps).chain(&mut self.ephemerals) {
            if terminated(status).is_none() {
                let state = lost(status);
                status.state = Some(ContainerState { terminated: Some(state), ..ContainerState::default() });
                (status.ready, status.started) = (false, status.started.map(|_| false));
            }
        }
    }

    pub(super) fn put(self, status: &mut PodStatus) {
        let sorted = |mut list: Vec<ContainerStatus>| {
            order::sort_by(&mut list, |a, b| a.name.cmp(&b.name));
            (!list.is_empty()).then_some(list)
        };
        status.init_container_statuses = (!self.inits.is_empty()).then_some(self.inits);
        status.container_statuses = sorted(self.apps);
        status.ephemeral_container_statuses = sorted(self.ephemerals);
    }
}

/// The statuses now. `ending`: nothing is restarted any more, so nothing waits for that.
pub(super) fn of(at: &Moment<'_>, ending: bool) -> Containers {
    let apps = at.spec.apps();
    let initialized = apps.iter().any(|app| at.observed.newest(app.name).is_some());
    let list =
        |views: &[ContainerView<'_>]| views.iter().map(|view| one(at, view, ending, initialized)).collect::<Vec<_>>();
    Containers { inits: list(&at.spec.inits()), apps: list(&apps), ephemerals: list(&at.spec.ephemerals()) }
}

/// The status this one follows.
pub(super) fn old<'a>(at: &Moment<'a>) -> Option<&'a PodStatus> {
    at.memory.last_status.as_ref().or(at.spec.pod.status.as_ref())
}

pub(super) fn exit_code(at: &Moment<'_>, view: &ContainerView<'_>) -> Option<i32> {
    if let Some(instance) = at.observed.newest(view.name) {
        return (instance.state == State::Exited).then_some(instance.exit_code);
    }
    let before = old_container(at, view)?;
    if is_running(before) {
        return Some(LOST_EXIT_CODE);
    }
    terminated(before).or_else(|| last_terminated(before)).map(|state| state.exit_code)
}

pub(super) fn has_started(at: &Moment<'_>, view: &ContainerView<'_>, instance: &Instance) -> bool {
    if instance.state != State::Running {
        return false;
    }
    if view.startup_probe().is_none() {
        return true;
    }
    match probes(at, instance).startup {
        Some(result) => result == ProbeResult::Success,
        None => same_instance(at, view, instance).is_some_and(|before| before.started == Some(true)),
    }
}

pub(super) fn next_restart_count(at: &Moment<'_>, view: &ContainerView<'_>, previous: Option<&Instance>) -> i32 {
    let before = old_container(at, view);
    let reported = before.map_or(0, |before| before.restart_count);
    match (previous, before) {
        // It never ran, so its number is still free.
        (Some(made), _) if made.state == State::Created => made.restart_count.max(reported),
        (Some(instance), _) => instance.restart_count.max(reported).saturating_add(1),
        (None, Some(before)) => {
            let waits = before.state.as_ref().and_then(|state| state.waiting.as_ref());
            let counted = waits.is_some_and(|waiting| {
                last_terminated(before).is_none()
                    || matches!(waiting.reason.as_deref(), Some("ContainerCreating" | "PodInitializing"))
            });
            if counted || before.state.is_none() { reported } else { reported.saturating_add(1) }
        }
        (None, None) => 0,
    }
}

pub(super) fn is_running(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|state| state.running.is_some())
}

pub(super) fn terminated(status: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    status.state.as_ref()?.terminated.as_ref()
}

pub(super) fn last_terminated(status: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    status.last_state.as_ref()?.terminated.as_ref()
}

fn one(at: &Moment<'_>, view: &ContainerView<'_>, ending: bool, initialized: bool) -> ContainerStatus {
    let instances: Vec<&Instance> =
        at.observed.containers.iter().filter(|instance| instance.name == view.name).collect();
    let mut status = match instances.first() {
        Some(newest) => present(at, view, newest, instances.get(1).copied()),
        None => absent(at, view, ending, initialized),
    };
    let restarts = !ending && !is_running(&status) && will_restart(at, view, &status);
    if let Some(error) = at.memory.start_errors.get(view.name).filter(|error| restarts && error.hash == view.hash()) {
        if let Some(state) = status.state.take().filter(|state| state.terminated.is_some()) {
            status.last_state = Some(state);
        }
        status.state = Some(waiting(Some(&error.reason), Some(&error.message)));
        (status.ready, status.started) = (false, status.started.map(|_| false));
    }
    status
}

fn will_restart(at: &Moment<'_>, view: &ContainerView<'_>, status: &ContainerStatus) -> bool {
    let ended = terminated(status).or_else(|| last_terminated(status));
    match at.observed.newest(view.name).map(|instance| instance.state) {
        Some(State::Running) => false,
        Some(State::Created | State::Unknown) => true,
        Some(State::Exited) | None => ended.is_none_or(|state| view.restarts(state.exit_code)),
    }
}

fn present(at: &Moment<'_>, view: &ContainerView<'_>, newest: &Instance, older: Option<&Instance>) -> ContainerStatus {
    let before = old_container(at, view);
    let same = same_instance(at, view, newest);
    let state = match newest.state {
        State::Running => ContainerState {
            running: Some(ContainerStateRunning {
                started_at: Some(whole(newest.started_at.unwrap_or(newest.created_at))),
            }),
            ..ContainerState::default()
        },
        State::Exited => ContainerState { terminated: Some(ended(at, newest)), ..ContainerState::default() },
        State::Created => waiting(None, None),
        State::Unknown => match same {
            Some(same) if is_running(same) || terminated(same).is_some() => {
                ContainerState { terminated: Some(lost(same)), ..ContainerState::default() }
            }
            Some(_) | None => waiting(None, None),
        },
    };
    let last_state = match (older.filter(|older| older.state == State::Exited), same, before) {
        (Some(older), _, _) => Some(ContainerState { terminated: Some(ended(at, older)), ..ContainerState::default() }),
        (None, Some(same), _) => same.last_state.clone(),
        // The instance before was removed; its end is known from the status.
        (None, None, Some(before)) if terminated(before).is_some() => before.state.clone(),
        (None, None, Some(before)) => before.last_state.clone(),
        (None, None, None) => None,
    };
    let started = has_started(at, view, newest) && at.memory.post_start.get(&newest.id) != Some(&PostStart::Running);
    let ready = match view.kind {
        Kind::Init => newest.state == State::Exited && newest.exit_code == 0,
        Kind::Sidecar | Kind::App => started && is_ready(at, view, newest),
        Kind::Ephemeral => false,
    };
    let mut status = ContainerStatus {
        name: view.name.to_owned(),
        state: Some(state),
        last_state,
        restart_count: newest.restart_count.max(before.map_or(0, |before| before.restart_count)),
        ready,
        started: (view.kind != Kind::Ephemeral).then_some(started),
        image: if newest.image.is_empty() { view.image.to_owned() } else { newest.image.clone() },
        image_id: newest.image_id.clone(),
        container_id: Some(container_id(newest)),
        ..ContainerStatus::default()
    };
    resources(view, same, &mut status);
    status
}

fn absent(at: &Moment<'_>, view: &ContainerView<'_>, ending: bool, initialized: bool) -> ContainerStatus {
    let before = old_container(at, view);
    if let Some(before) = before.filter(|before| terminated(before).is_some()) {
        return before.clone();
    }
    let reason = if at.spec.inits().is_empty() { "ContainerCreating" } else { "PodInitializing" };
    let mut status = ContainerStatus {
        name: view.name.to_owned(),
        image: view.image.to_owned(),
        state: Some(waiting(Some(reason), None)),
        last_state: before.and_then(|before| before.last_state.clone()),
        restart_count: before.map_or(0, |before| before.restart_count),
        started: (view.kind != Kind::Ephemeral).then_some(false),
        ..ContainerStatus::default()
    };
    if let Some(before) = before.filter(|before| is_running(before)) {
        status.last_state = Some(ContainerState { terminated: Some(lost(before)), ..ContainerState::default() });
        status.restart_count = status.restart_count.saturating_add(i32::from(!ending));
    } else if view.kind == Kind::Init && initialized {
        let done = ContainerStateTerminated {
            exit_code: 0,
            reason: Some("Completed".to_owned()),
            message: Some("Unable to get init container status from container runtime and pod has been initialized, treat it as exited normally".to_owned()),
            ..ContainerStateTerminated::default()
        };
        status.state = Some(ContainerState { terminated: Some(done), ..ContainerState::default() });
        status.ready = true;
    }
    resources(view, None, &mut status);
    status
}

fn is_ready(at: &Moment<'_>, view: &ContainerView<'_>, instance: &Instance) -> bool {
    if view.readiness_probe().is_none() {
        return true;
    }
    match probes(at, instance).readiness {
        Some(result) => result == ProbeResult::Success,
        // Adopted: what was true stays true until this process has probed for itself.
        None => same_instance(at, view, instance).is_some_and(|before| before.ready),
    }
}

/// Requests and limits the instance was made with; those of the spec for a new one.
fn resources(view: &ContainerView<'_>, same: Option<&ContainerStatus>, status: &mut ContainerStatus) {
    if let Some(same) = same.filter(|same| same.resources.is_some()) {
        (status.resources, status.allocated_resources) = (same.resources.clone(), same.allocated_resources.clone());
        return;
    }
    let Some(asked) = view.container.and_then(|container| container.resources.as_ref()) else { return };
    let list = |list: &Option<std::collections::BTreeMap<_, _>>| list.clone().filter(|list| !list.is_empty());
    let (requests, limits) = (list(&asked.requests), list(&asked.limits));
    if requests.is_some() || limits.is_some() {
        status.allocated_resources = requests.clone();
        status.resources = Some(ResourceRequirements { requests, limits, ..ResourceRequirements::default() });
    }
}

fn probes(at: &Moment<'_>, instance: &Instance) -> Probes {
    at.memory.probes.get(&instance.id).copied().unwrap_or_default()
}

fn old_container<'a>(at: &Moment<'a>, view: &ContainerView<'_>) -> Option<&'a ContainerStatus> {
    let status = old(at)?;
    let list = match view.kind {
        Kind::Init | Kind::Sidecar => &status.init_container_statuses,
        Kind::App => &status.container_statuses,
        Kind::Ephemeral => &status.ephemeral_container_statuses,
    };
    list.as_deref().unwrap_or_default().iter().find(|before| before.name == view.name)
}

/// The status before, if it was about this very instance.
fn same_instance<'a>(at: &Moment<'a>, view: &ContainerView<'_>, instance: &Instance) -> Option<&'a ContainerStatus> {
    old_container(at, view).filter(|before| before.container_id.as_deref() == Some(&container_id(instance)))
}

fn container_id(instance: &Instance) -> String {
    format!("containerd://{}", instance.id)
}

fn waiting(reason: Option<&str>, message: Option<&str>) -> ContainerState {
    let state = ContainerStateWaiting { reason: reason.map(str::to_owned), message: message.map(str::to_owned) };
    ContainerState { waiting: Some(state), ..ContainerState::default() }
}

fn ended(at: &Moment<'_>, instance: &Instance) -> ContainerStateTerminated {
    let reason = match (instance.reason.as_str(), instance.exit_code) {
        ("", 0) => "Completed",
        ("", _) => "Error",
        (reason, _) => reason,
    };
    let message = cut(&instance.message, MESSAGES / at.spec.all().len().max(1));
    ContainerStateTerminated {
        exit_code: instance.exit_code,
        reason: Some(reason.to_owned()),
        message: (!message.is_empty()).then(|| message.to_owned()),
        started_at: instance.started_at.map(whole),
        finished_at: instance.finished_at.map(whole),
        container_id: Some(container_id(instance)),
        signal: None,
    }
}

fn lost(before: &ContainerStatus) -> ContainerStateTerminated {
    ContainerStateTerminated {
        exit_code: LOST_EXIT_CODE,
        reason: Some(LOST.to_owned()),
        message: Some(LOST_MESSAGE.to_owned()),
        container_id: before.container_id.clone(),
        ..ContainerStateTerminated::default()
    }
}

fn cut(text: &str, limit: usize) -> &str {
    &text[..text.floor_char_boundary(limit)]
}
