//! What a pod's worker remembers between two plans. In RAM only, a few hundred bytes per container.
//!
//! Losing it (an agent restart, a power cut) costs crash history and nothing else: the runtime tells what runs, and the store
//! gives the last status back. What was decided or has failed is entered here by the methods below, never by [`super::plan`].

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::PodStatus;

use super::backoff::{CrashBackoff, ImageBackoff, after};
use super::observed::{Instance, Observed, State};
use super::plan::{Action, Plan};

/// A failed step that has no timer of its own is tried again after this.
pub(super) const RETRY: SignedDuration = SignedDuration::from_secs(10);
/// A sandbox that could not be made is tried again after this, doubling to [`SANDBOX_RETRY_MAX`] unless the network is not there yet.
const SANDBOX_RETRY: SignedDuration = SignedDuration::from_secs(1);
pub(super) const SANDBOX_RETRY_MAX: SignedDuration = SignedDuration::from_secs(60);
/// A volume that could not be set up is tried again after this, doubling to [`VOLUMES_RETRY_MAX`].
const VOLUMES_RETRY: SignedDuration = SignedDuration::from_millis(500);
pub(super) const VOLUMES_RETRY_MAX: SignedDuration = SignedDuration::from_secs(120);

/// Why there is no sandbox when the runtime says that it cannot give a network yet.
pub const NETWORK_NOT_READY: &str = "NetworkNotReady";

/// What a pod's worker remembers.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// When the pod was accepted here.
    pub start_time: Option<Timestamp>,
    /// The status computed last, by this process or by the one before it.
    pub last_status: Option<PodStatus>,
    /// CrashLoopBackOff per container.
    pub crashes: CrashBackoff,
    /// Back-off per image.
    pub pulls: ImageBackoff,
    /// Why a container is not running, by container name.
    pub start_errors: BTreeMap<String, StartError>,
    /// Probe results, by instance id.
    pub probes: BTreeMap<String, Probes>,
    /// postStart hooks that run or have failed, by instance id.
    pub post_start: BTreeMap<String, PostStart>,
    /// Stops that were begun, by instance id.
    pub stopping: BTreeMap<String, Stopping>,
    /// Set once the pod is on its way out; never unset.
    pub termination: Option<Termination>,
    /// Admission refused the pod; [`Memory::termination`] says why.
    pub rejected: bool,
    /// Directories, volumes, cgroup.
    pub volumes: Volumes,
    /// Why there is no sandbox.
    pub sandbox_error: Option<Held>,
    /// One more than the highest attempt tried.
    pub sandbox_attempts: u32,
    /// Volumes, directories and cgroup of the ended pod are gone.
    pub torn_down: bool,
    /// The end of a deleted pod was reported.
    pub finished: bool,
}

/// Why a container could not be started, or must wait: the reason and message of its waiting state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartError {
    /// ErrImagePull, CreateContainerConfigError, CrashLoopBackOff, …
    pub reason: String,
    /// For people.
    pub message: String,
    /// Of the container it is about; one with another image starts with a clean sheet.
    pub hash: u64,
    /// Not before this; `None`: a back-off timer decides.
    pub retry_at: Option<Timestamp>,
}

/// What a probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeResult {
    /// Not decided yet.
    Unknown,
    /// Passed.
    Success,
    /// Failed as often as its threshold says.
    Failure,
}

/// Results of one instance. `None`: this process has no result of its own yet, so the last status still counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probes {
    /// Liveness.
    pub liveness: Option<ProbeResult>,
    /// Readiness.
    pub readiness: Option<ProbeResult>,
    /// Startup.
    pub startup: Option<ProbeResult>,
}

/// A postStart hook that did not succeed (yet).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PostStart {
    /// It runs: what comes later in the pod waits.
    Running,
    /// It failed: the container is to be killed.
    Failed,
}

/// A stop that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopping {
    /// When.
    pub since: Timestamp,
    /// With how much grace, in seconds.
    pub grace: i64,
}

/// The pod is on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Termination {
    /// Since when.
    pub since: Timestamp,
    /// Grace in seconds; only ever shrinks. `None`: what the spec says.
    pub grace: Option<i64>,
    /// What the status says of it when it was not simply deleted or done.
    pub outcome: Option<Outcome>,
}

/// Why the kubelet ended a pod: its phase becomes Failed with this reason and message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// `Evicted`, `DeadlineExceeded`, `OutOfcpu`, …
    pub reason: String,
    /// For people.
    pub message: String,
    /// The node ended it for reasons of its own: condition DisruptionTarget.
    pub disruption: bool,
}

/// State of what a pod needs on disk before its containers start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Volumes {
    /// Not set up by this process yet.
    #[default]
    Pending,
    /// All there.
    Ready,
    /// Tried in vain.
    Failed {
        /// For people.
        message: String,
        /// When to try again.
        retry_at: Timestamp,
        /// The delay that led to it.
        delay: SignedDuration,
    },
    /// The pod wants something that cannot be given here; nothing of it is started.
    Unsupported(String),
}

/// Something failed and is left alone for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// For people.
    pub message: String,
    /// When to try again.
    pub retry_at: Timestamp,
    /// The delay that led to it.
    pub delay: SignedDuration,
}

/// How an action failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For a container start the reason of the waiting state; else unused.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Memory {
    /// The memory of a pod that an earlier process knew, from the status it left in the store.
    pub fn restored(last_status: Option<PodStatus>) -> Self {
        let start_time = last_status.as_ref().and_then(|status| status.start_time.as_ref()).map(|time| time.0);
        Self { start_time, last_status, ..Self::default() }
    }

    /// The pod was admitted.
    pub fn accept(&mut self, now: Timestamp) {
        self.start_time.get_or_insert(now);
    }

    /// Admission refused the pod: it never starts.
    pub fn reject(&mut self, reason: &str, message: &str, now: Timestamp) {
        self.accept(now);
        self.rejected = true;
        let message = format!("Pod was rejected: {message}");
        self.kill(None, Some(Outcome { reason: reason.to_owned(), message, disruption: false }), now);
    }

    /// The node ends the pod (eviction, shutdown), or the grace shrinks. The first outcome stays.
    pub fn kill(&mut self, grace: Option<i64>, outcome: Option<Outcome>, now: Timestamp) {
        let termination = self.termination.get_or_insert(Termination { since: now, grace, outcome: None });
        termination.grace = match (termination.grace, grace) {
            (Some(old), Some(new)) => Some(old.min(new)),
            (old, new) => old.or(new),
        };
        if termination.outcome.is_none() {
            termination.outcome = outcome;
        }
    }

    /// Enters what a plan has decided. Call before [`super::status::status`] and before carrying the plan out.
    pub fn note(&mut self, plan: &Plan) {
        if let Some(termination) = &plan.termination {
            self.kill(termination.grace, termination.outcome.clone(), termination.since);
        }
        for blocked in &plan.blocked {
            let retry_at = self.start_errors.get(&blocked.name).and_then(|error| error.retry_at);
            let error = StartError {
                reason: blocked.reason.clone(),
                message: blocked.message.clone(),
                hash: blocked.hash,
                retry_at: retry_at.filter(|_| !blocked.by_timer),
            };
            self.start_errors.insert(blocked.name.clone(), error);
        }
    }

    /// An action is about to be carried out.
    pub fn before(&mut self, action: &Action, now: Timestamp) {
        match action {
            Action::StartContainer { name, hash, after: Some(finished), .. } => {
                self.crashes.restarted(name, *hash, *finished, now);
            }
            Action::KillContainer { id, grace, .. } => {
                let stopping = self.stopping.entry(id.clone()).or_insert(Stopping { since: now, grace: *grace });
                *stopping = Stopping { since: now, grace: *grace };
            }
            Action::CreateSandbox { attempt } => self.sandbox_attempts = attempt.saturating_add(1),
            Action::TearDown => self.volumes = Volumes::Pending,
            Action::StartContainer { .. }
            | Action::StopSandbox { .. }
            | Action::RemoveContainer { .. }
            | Action::RemoveSandbox { .. }
            | Action::SetUpVolumes
            | Action::ReportFinished => {}
        }
    }

    /// An action was carried out.
    pub fn done(&mut self, action: &Action) {
        match action {
            Action::StartContainer { name, image, .. } => {
                self.start_errors.remove(name);
                self.pulls.forget(image);
            }
            Action::CreateSandbox { .. } => self.sandbox_error = None,
            Action::SetUpVolumes => self.volumes = Volumes::Ready,
            Action::TearDown => self.torn_down = true,
            Action::ReportFinished => self.finished = true,
            Action::KillContainer { .. }
            | Action::StopSandbox { .. }
            | Action::RemoveContainer { .. }
            | Action::RemoveSandbox { .. } => {}
        }
    }

    /// An action failed. Returns when the pod is to be looked at again; a plan asked for earlier would want the same again.
    pub fn failed(&mut self, action: &Action, failure: Failure, now: Timestamp) -> Timestamp {
        match action {
            Action::StartContainer { name, image, hash, .. } => {
                let (retry_at, due) = if is_pull_failure(&failure.reason) {
                    (None, self.pulls.failed(image, now))
                } else {
                    let due = after(now, RETRY);
                    (Some(due), due)
                };
                let Failure { reason, message } = failure;
                self.start_errors.insert(name.clone(), StartError { reason, message, hash: *hash, retry_at });
                due
            }
            Action::CreateSandbox { .. } => {
                let delay = match &self.sandbox_error {
                    Some(held) if failure.reason != NETWORK_NOT_READY => {
                        held.delay.saturating_mul(2).min(SANDBOX_RETRY_MAX)
                    }
                    Some(_) | None => SANDBOX_RETRY,
                };
                let retry_at = after(now, delay);
                self.sandbox_error = Some(Held { message: failure.message, retry_at, delay });
                retry_at
            }
            Action::SetUpVolumes => {
                let delay = match &self.volumes {
                    Volumes::Failed { delay, .. } => delay.saturating_mul(2).min(VOLUMES_RETRY_MAX),
                    Volumes::Pending | Volumes::Ready | Volumes::Unsupported(_) => VOLUMES_RETRY,
                };
                let retry_at = after(now, delay);
                self.volumes = Volumes::Failed { message: failure.message, retry_at, delay };
                retry_at
            }
            Action::KillContainer { .. }
            | Action::StopSandbox { .. }
            | Action::RemoveContainer { .. }
            | Action::RemoveSandbox { .. }
            | Action::TearDown
            | Action::ReportFinished => after(now, RETRY),
        }
    }

    /// The postStart hook of an instance failed: it is killed, and until the next one starts that is why the container waits.
    pub fn hook_failed(&mut self, id: String, name: String, hash: u64) {
        self.post_start.insert(id, PostStart::Failed);
        let (reason, message) = ("PostStartHookError".to_owned(), "PostStartHook failed".to_owned());
        self.start_errors.insert(name, StartError { reason, message, hash, retry_at: None });
    }

    /// A ConfigMap, Secret or token of the pod arrived or changed: what failed for want of it is worth another try now.
    pub fn references_changed(&mut self) {
        if matches!(self.volumes, Volumes::Failed { .. }) {
            self.volumes = Volumes::Pending;
        }
        for error in self.start_errors.values_mut() {
            error.retry_at = None;
        }
    }

    /// An instance whose start the agent's death broke off has ended without ever having been started, and nobody has said so yet: it counts
    /// as one that was made and not started. A start that failed in this agent's life has left an error.
    pub fn take_back_interrupted(&self, observed: &mut Observed) {
        let reported = |id: &str| {
            let statuses = self.last_status.iter().flat_map(|status| {
                [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses]
            });
            statuses.flatten().flatten().any(|status| {
                let ended = status.state.as_ref().and_then(|state| state.terminated.as_ref());
                ended.and_then(|ended| ended.container_id.as_deref()).is_some_and(|reported| reported.ends_with(id))
            })
        };
        let is_interrupted = |instance: &Instance| {
            instance.state == State::Exited
                && instance.started_at.is_none()
                && !self.start_errors.contains_key(&instance.name)
                && observed.newest(&instance.name).is_some_and(|newest| newest.id == instance.id)
                && !reported(&instance.id)
        };
        let interrupted: Vec<bool> = observed.containers.iter().map(is_interrupted).collect();
        for (instance, _) in observed.containers.iter_mut().zip(interrupted).filter(|(_, interrupted)| *interrupted) {
            instance.state = State::Created;
        }
    }

    /// Forgets instances that are gone.
    pub fn prune(&mut self, observed: &Observed) {
        let known = |id: &String| observed.containers.iter().any(|instance| instance.id == *id);
        self.probes.retain(|id, _| known(id));
        self.post_start.retain(|id, _| known(id));
        self.stopping.retain(|id, _| known(id));
    }
}

/// The image could not be had, so that its own timer decides about the next try.
pub fn is_pull_failure(reason: &str) -> bool {
    matches!(reason, "ErrImagePull" | "ImagePullBackOff" | "RegistryUnavailable" | "SignatureValidationFailed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sandboxes_are_tried_ever_more_rarely_but_not_for_want_of_a_network() {
        let mut memory = Memory::default();
        let now = Timestamp::UNIX_EPOCH;
        let mut fail = |reason: &str| {
            let failure = Failure { reason: reason.to_owned(), message: String::new() };
            memory.failed(&Action::CreateSandbox { attempt: 0 }, failure, now).as_second()
        };
        let waits: Vec<i64> = (0..8).map(|_| fail("FailedCreatePodSandBox")).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!([fail(NETWORK_NOT_READY), fail(NETWORK_NOT_READY)], [1, 1]);
    }
}
