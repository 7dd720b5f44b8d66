//! What to do next about one pod: a pure function of what is wanted, what runs, what is remembered and the time.
//!
//! The shell's loop for a pod, one at a time and never two loops for one UID:
//!
//! 1. read [`Observed`] from the runtime, *after* everything done before has ended;
//! 2. [`plan`]; [`Memory::note`] it; compute and store the status ([`super::status::status`]), which becomes `memory.last_status`;
//! 3. carry out the steps in order, around each action [`Memory::before`] and [`Memory::done`] or [`Memory::failed`];
//! 4. if there were steps: again from 1 at once, or, when some failed, at the time [`Memory::failed`] gave. Else wait for an event or [`Plan::wake_at`].
//!
//! A running step may be abandoned when the pod begins to terminate or its grace shrinks, and only then; the loop goes on at 1.
//!
//! Invariants, kept under any interleaving (the simulator in the tests tries thousands): a container that may run is never started
//! a second time; nothing starts without a ready sandbox and volumes; a terminal pod never starts anything; only ids that were
//! observed under this pod's UID are ever named.

mod sync;
mod terminate;

#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

use super::backoff::after;
use super::memory::{Memory, Outcome, Termination};
use super::observed::{Instance, Observed, Sandbox, State};
use super::references::PodEvent;
use super::spec::{ContainerView, Kind, RestartPolicy, Spec, is_terminal_phase};
use super::status;

/// What the store says about the pod's existence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It is wanted.
    Wanted,
    /// It has a deletionTimestamp; its object waits for the end to be reported.
    Deleting,
    /// Its object left the store; the Pod at hand is its last version. Nothing is reported.
    Removed,
    /// The runtime holds something of a UID that the store, being in sync, does not know. The Pod at hand has metadata only.
    Orphan,
}

impl Life {
    /// Of a pod that is in the store.
    pub fn of(pod: &Pod) -> Self {
        if pod.metadata.deletion_timestamp.is_some() { Self::Deleting } else { Self::Wanted }
    }

    /// The pod's records are not kept once it has ended.
    pub fn is_over(self) -> bool {
        self != Self::Wanted
    }
}

/// Where a pod is in its life here. Never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// May start containers.
    Sync,
    /// Is being stopped.
    Terminating,
    /// Nothing of it runs.
    Terminated,
    /// Nothing of it is left: its worker may go.
    Finished,
}

/// Why a container is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KillReason {
    /// The pod ends.
    PodEnds,
    /// Its sandbox is being replaced.
    SandboxChanged,
    /// Its image changed.
    SpecChanged,
    /// The liveness probe failed.
    Liveness,
    /// The startup probe failed.
    Startup,
    /// The postStart hook failed.
    PostStart,
    /// The runtime lost track of it; only a stop gives it an exit code.
    Unknown,
    /// A newer instance of the same container exists, or it is not in the pod's sandbox.
    Stray,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Directories, volumes, cgroup. Idempotent.
    SetUpVolumes,
    /// Run a sandbox with this attempt number.
    CreateSandbox {
        /// For its metadata.
        attempt: u32,
    },
    /// Pull if needed, create, start, and begin the postStart hook.
    StartContainer {
        /// Which list it is in.
        kind: Kind,
        /// Its position there.
        index: usize,
        /// Its name.
        name: String,
        /// Its image as the spec names it.
        image: String,
        /// [`ContainerView::hash`], for the annotation.
        hash: u64,
        /// For metadata, annotation and log path. If nothing of the container was observed, the shell raises it above the logs on disk.
        restart_count: i32,
        /// The sandbox to be in; `None`: the one made by this plan.
        sandbox: Option<String>,
        /// When the instance before it ended, if that counts for the back-off.
        after: Option<Timestamp>,
    },
    /// preStop (at once), then wait for `after`, then stop, all within `grace`; see [`stop_timeout`]. Event `Killing` with the message.
    KillContainer {
        /// CRI id.
        id: String,
        /// Container name.
        name: String,
        /// Seconds for all of it.
        grace: i64,
        /// Run the preStop hook, if the container has one.
        pre_stop: bool,
        /// Instances that must be gone first, as far as the grace allows.
        after: Vec<String>,
        /// Why.
        why: KillReason,
        /// Text of the event.
        message: String,
    },
    /// StopPodSandbox; tears its network down.
    StopSandbox {
        /// CRI id.
        id: String,
    },
    /// Remove a dead instance with its logs' link (and its logs, if the pod is gone).
    RemoveContainer {
        /// CRI id.
        id: String,
        /// Container name.
        name: String,
        /// Where its log is.
        log_path: String,
    },
    /// Stop, then remove a sandbox.
    RemoveSandbox {
        /// CRI id.
        id: String,
    },
    /// Unmount volumes, remove the pod's directory and cgroup. Idempotent.
    TearDown,
    /// Report the last status with `finished`, so that the Pod object goes.
    ReportFinished,
}

/// Actions that may be carried out at the same time.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What to do.
    pub actions: Vec<Action>,
    /// If one of them fails, the rest of the plan is void.
    pub must: bool,
}

/// A container that would be started but for a timer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// Container name.
    pub name: String,
    /// [`ContainerView::hash`].
    pub hash: u64,
    /// Waiting reason.
    pub reason: String,
    /// Waiting message.
    pub message: String,
    /// A back-off timer blocks it, not the retry time of its last error.
    pub by_timer: bool,
}

/// What is to be done now.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Where the pod is.
    pub stage: Stage,
    /// What to do, in order.
    pub steps: Vec<Step>,
    /// When to look again if nothing happens before.
    pub wake_at: Option<Timestamp>,
    /// What waits for a timer.
    pub blocked: Vec<Blocked>,
    /// The pod is on its way out, and why.
    pub termination: Option<Termination>,
    /// To be recorded, apart from those the actions bring.
    pub events: Vec<PodEvent>,
}

/// What to do next about a pod. See the module's documentation for the loop around it.
pub fn plan(pod: &Pod, life: Life, observed: &Observed, memory: &Memory, now: Timestamp) -> Plan {
    let spec = Spec::new(pod);
    let now_is = Moment { spec, life, observed, memory, now };
    match now_is.ending() {
        Some(termination) => terminate::plan(&now_is, termination),
        None => sync::plan(&now_is),
    }
}

/// Seconds for CRI StopContainer when `used` seconds of the grace went to hooks and waiting.
pub fn stop_timeout(grace: i64, used: i64) -> i64 {
    /// However little is left, a process gets this long to hear its signal.
    const MINIMUM: i64 = 2;
    grace.saturating_sub(used.max(0)).max(MINIMUM)
}

/// All that decisions are made from.
#[derive(Clone, Copy)]
pub(super) struct Moment<'a> {
    pub(super) spec: Spec<'a>,
    pub(super) life: Life,
    pub(super) observed: &'a Observed,
    pub(super) memory: &'a Memory,
    pub(super) now: Timestamp,
}

impl<'a> Moment<'a> {
    /// The pod is on its way out: how.
    pub(super) fn ending(&self) -> Option<Termination> {
        // One that has ended was not ended by it, however long ago that was.
        let outcome = (self.deadline_passed() && !self.was_terminal()).then(|| Outcome {
            reason: "DeadlineExceeded".to_owned(),
            message: "Pod was active on the node longer than the specified deadline".to_owned(),
            disruption: false,
        });
        let known = self.memory.termination.clone();
        if known.is_none() && !self.life.is_over() && outcome.is_none() && !self.was_terminal() && !self.is_done() {
            return None;
        }
        let mut termination = known.unwrap_or(Termination { since: self.now, grace: None, outcome });
        if matches!(self.life, Life::Deleting | Life::Removed)
            && let Some(grace) = self.spec.deletion_grace()
        {
            termination.grace = Some(termination.grace.map_or(grace, |known| known.min(grace)));
        }
        Some(termination)
    }

    /// A terminal phase was reported: it is not taken back.
    pub(super) fn was_terminal(&self) -> bool {
        let last = self.memory.last_status.as_ref().and_then(|status| status.phase.as_deref());
        self.spec.is_terminal() || last.is_some_and(is_terminal_phase)
    }

    /// When activeDeadlineSeconds runs out.
    pub(super) fn deadline(&self) -> Option<Timestamp> {
        let seconds = self.spec.inner()?.active_deadline_seconds?;
        Some(after(self.memory.start_time?, SignedDuration::from_secs(seconds)))
    }

    fn deadline_passed(&self) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= self.now)
    }

    /// Nothing is left to be run, whatever sidecars do.
    fn is_done(&self) -> bool {
        status::is_done(self) || self.is_lost()
    }

    /// A pod that must not run again lost its sandbox after something had run in it.
    fn is_lost(&self) -> bool {
        let restarts = |view: ContainerView<'_>| view.has_own_policy() && view.policy() != RestartPolicy::Never;
        !self.observed.sandboxes.is_empty()
            && !self.observed.containers.is_empty()
            && self.spec.restart_policy() == RestartPolicy::Never
            && self.sandbox_needed().is_some()
            && !self.spec.apps().into_iter().any(restarts)
    }

    /// The attempt number of the sandbox the pod needs; `None`: the one it has is good.
    pub(super) fn sandbox_needed(&self) -> Option<u32> {
        let sandboxes = &self.observed.sandboxes;
        let next = sandboxes.iter().map(|sandbox| sandbox.attempt.saturating_add(1)).max().unwrap_or(0);
        self.sandbox().is_none().then_some(next.max(self.memory.sandbox_attempts))
    }

    /// The sandbox containers run in, if it is good.
    pub(super) fn sandbox(&self) -> Option<&'a Sandbox> {
        let newest = self.observed.sandboxes.first()?;
        let only = self.observed.sandboxes.iter().filter(|sandbox| sandbox.ready).count() == 1;
        let host_network = self.spec.host_network();
        (newest.ready && only && newest.host_network == host_network && (host_network || !newest.ips.is_empty()))
            .then_some(newest)
    }

    /// The newest instance of a container inside a sandbox.
    pub(super) fn newest_in(&self, sandbox: &str, name: &str) -> Option<&'a Instance> {
        self.observed.containers.iter().find(|instance| instance.name == name && instance.sandbox == sandbox)
    }

    /// Instances that run or may run.
    pub(super) fn alive(&self) -> impl Iterator<Item = &'a Instance> {
        self.observed.containers.iter().filter(|instance| is_alive(instance))
    }

    /// The stop of one instance.
    pub(super) fn kill(&self, instance: &Instance, grace: i64, why: KillReason, message: String) -> Action {
        let begun = self.memory.stopping.get(&instance.id);
        let left = begun
            .map_or(i64::MAX, |stop| stop.grace.saturating_sub(self.now.duration_since(stop.since).as_secs().max(0)));
        let has_hook =
            self.life == Life::Orphan || self.spec.find(&instance.name).is_some_and(|view| view.has_pre_stop());
        Action::KillContainer {
            id: instance.id.clone(),
            name: instance.name.clone(),
            grace: grace.min(left).max(1),
            pre_stop: has_hook && begun.is_none() && instance.state == State::Running,
            after: Vec::new(),
            why,
            message,
        }
    }
}

pub(super) fn is_alive(instance: &Instance) -> bool {
    matches!(instance.state, State::Running | State::Unknown)
}

fn earliest(a: Option<Timestamp>, b: Option<Timestamp>) -> Option<Timestamp> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn removals(surplus: super::gc::Surplus<'_>) -> Vec<Step> {
    let containers = surplus.containers.into_iter().map(|instance| Action::RemoveContainer {
        id: instance.id.clone(),
        name: instance.name.clone(),
        log_path: instance.log_path.clone(),
    });
    let sandboxes = surplus.sandboxes.into_iter().map(|sandbox| Action::RemoveSandbox { id: sandbox.id.clone() });
    [containers.collect::<Vec<_>>(), sandboxes.collect()]
        .into_iter()
        .filter(|actions| !actions.is_empty())
        .map(|actions| Step { actions, must: false })
        .collect()
}
