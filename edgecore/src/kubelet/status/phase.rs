//! The phase, from the statuses of the containers.

use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus};

use super::containers::{Containers, is_running, last_terminated, terminated};
use crate::kubelet::plan::Moment;
use crate::kubelet::spec::{ContainerView, Kind};

/// A pod's phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

impl Phase {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }

    pub(super) fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

/// The phase that these statuses make. `ended`: nothing runs and nothing will; `sidecars`: a running sidecar makes the pod Running.
pub(super) fn phase(at: &Moment<'_>, statuses: &Containers, ended: bool, sidecars: bool) -> Phase {
    let (mut pending, mut waiting, mut running) = (false, false, false);
    let app_created = at
        .sandbox()
        .is_some_and(|sandbox| at.spec.apps().iter().any(|app| at.newest_in(&sandbox.id, app.name).is_some()));
    for (view, status) in at.spec.inits().iter().zip(&statuses.inits) {
        match view.kind {
            Kind::Sidecar if !sidecars => {}
            Kind::Sidecar => {
                let started = status.started == Some(true);
                let fresh = !is_running(status) && terminated(status).is_none() && last_terminated(status).is_none();
                running |= is_running(status);
                waiting |= fresh;
                pending |= !app_created && (fresh || (is_running(status) && !started));
            }
            Kind::Init | Kind::App | Kind::Ephemeral => match ended_state(status) {
                Some(state) if init_failed(state) && !view.restarts(state.exit_code.max(1)) => return Phase::Failed,
                Some(_) => {}
                None => pending = true,
            },
        }
    }
    if pending {
        return Phase::Pending;
    }

    let mut stopped: Vec<(&ContainerView<'_>, i32)> = Vec::new();
    let apps = at.spec.apps();
    for (view, status) in apps.iter().zip(&statuses.apps) {
        if is_running(status) {
            running = true;
        } else if let Some(state) = ended_state(status) {
            stopped.push((view, state.exit_code));
        } else {
            waiting = true;
        }
    }
    if waiting {
        Phase::Pending
    } else if running {
        Phase::Running
    } else if stopped.is_empty() {
        Phase::Pending
    } else if !ended && stopped.iter().any(|(view, code)| view.restarts(*code)) {
        Phase::Running
    } else if stopped.iter().all(|(_, code)| *code == 0) {
        Phase::Succeeded
    } else {
        Phase::Failed
    }
}

/// How a container that does not run has ended last.
fn ended_state(status: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    if is_running(status) { None } else { terminated(status).or_else(|| last_terminated(status)) }
}

fn init_failed(state: &ContainerStateTerminated) -> bool {
    state.exit_code != 0 || state.reason.as_deref() == Some("OOMKilled")
}
