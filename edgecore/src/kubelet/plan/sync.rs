//! The way up: sandbox, init containers and sidecars in order, regular containers, restarts, back-off.

use jiff::{SignedDuration, Timestamp};

use super::{Action, Blocked, KillReason, Moment, Plan, Stage, Step, earliest, is_alive, removals};
use crate::kubelet::backoff::{after, holds};
use crate::kubelet::gc;
use crate::kubelet::memory::{PostStart, ProbeResult, RETRY, SANDBOX_RETRY_MAX, VOLUMES_RETRY_MAX, Volumes};
use crate::kubelet::observed::{Instance, State};
use crate::kubelet::references::PodEvent;
use crate::kubelet::spec::{ContainerView, Kind};
use crate::kubelet::status;

/// How often it is looked whether an image came by itself.
const IMAGE_LOOK: SignedDuration = SignedDuration::from_secs(60);

pub(super) fn plan(at: &Moment<'_>) -> Plan {
    let mut sync = Sync {
        at,
        set_up: false,
        may_start: false,
        kills: Vec::new(),
        stops: Vec::new(),
        discards: Vec::new(),
        sandbox: None,
        starts: Vec::new(),
        blocked: Vec::new(),
        wake: at.deadline(),
        events: Vec::new(),
    };
    sync.look_at_volumes();
    match (at.sandbox(), at.sandbox_needed()) {
        (Some(sandbox), _) => sync.within(&sandbox.id),
        (None, attempt) => sync.anew(attempt.unwrap_or(0)),
    }
    sync.into_plan()
}

struct Sync<'a> {
    at: &'a Moment<'a>,
    set_up: bool,
    may_start: bool,
    kills: Vec<Action>,
    stops: Vec<Action>,
    discards: Vec<Action>,
    sandbox: Option<Action>,
    starts: Vec<Action>,
    blocked: Vec<Blocked>,
    wake: Option<Timestamp>,
    events: Vec<PodEvent>,
}

/// How a container that should run is doing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Health {
    /// It runs and is left alone.
    Good,
    /// It runs, but what comes later in the pod waits for it.
    Starting,
    /// It does not run, or not for long.
    Down,
}

impl Sync<'_> {
    fn look_at_volumes(&mut self) {
        match &self.at.memory.volumes {
            Volumes::Ready => self.may_start = true,
            Volumes::Failed { retry_at, .. } if holds(*retry_at, VOLUMES_RETRY_MAX, self.at.now) => {
                self.wake_at(*retry_at);
            }
            Volumes::Pending | Volumes::Failed { .. } => (self.set_up, self.may_start) = (true, true),
            Volumes::Unsupported(_) => {}
        }
    }

    /// The pod needs a new sandbox: what is left in old ones goes first.
    fn anew(&mut self, attempt: u32) {
        let at = self.at;
        let busy = at.observed.is_alive();
        let held = at.memory.sandbox_error.as_ref();
        if let Some(held) = held.filter(|held| holds(held.retry_at, SANDBOX_RETRY_MAX, at.now)) {
            self.wake_at(held.retry_at);
            self.may_start = false;
        }
        if !self.may_start && !busy {
            return;
        }
        let message = |instance: &Instance| format!("Stopping container {}", instance.name);
        self.kills = at
            .alive()
            .map(|instance| at.kill(instance, at.spec.grace(), KillReason::SandboxChanged, message(instance)))
            .collect();
        // The newest holds its addresses even when it is dead.
        self.stops = (at.observed.sandboxes.iter().enumerate())
            .filter(|(index, sandbox)| sandbox.ready || *index == 0)
            .map(|(_, sandbox)| Action::StopSandbox { id: sandbox.id.clone() })
            .collect();
        if !at.observed.sandboxes.is_empty() {
            self.events.push(PodEvent {
                warning: false,
                reason: "SandboxChanged",
                message: "Pod sandbox changed, it will be killed and re-created.".to_owned(),
                field_path: None,
            });
        }
        if !self.may_start {
            return;
        }
        self.sandbox = Some(Action::CreateSandbox { attempt });
        let inits = at.spec.inits();
        if let Some(first) = inits.first() {
            self.start(first, None, None);
            return;
        }
        for view in at.spec.apps() {
            // What is alive is stopped by this very plan; whether and how it comes back is seen when it has ended.
            if at.alive().any(|instance| instance.name == view.name) {
                continue;
            }
            self.revive(&view, at.observed.newest(view.name), None);
        }
    }

    /// The pod has a good sandbox.
    fn within(&mut self, sandbox: &str) {
        self.ephemerals(sandbox);
        if !self.inits(sandbox) {
            return;
        }
        for view in self.at.spec.apps() {
            if self.tend(&view, self.at.observed.newest(view.name), sandbox) == Health::Starting {
                break;
            }
        }
    }

    fn ephemerals(&mut self, sandbox: &str) {
        for view in self.at.spec.ephemerals() {
            let seen = self.at.observed.newest(view.name);
            match seen {
                None if status::exit_code(self.at, &view).is_none() => self.start(&view, None, Some(sandbox)),
                Some(instance) if instance.state == State::Created => self.revive(&view, seen, Some(sandbox)),
                None | Some(_) => {}
            }
        }
    }

    /// Init containers and sidecars; `true` once regular containers may run.
    fn inits(&mut self, sandbox: &str) -> bool {
        let inits = self.at.spec.inits();
        let here = |view: &ContainerView<'_>| self.at.newest_in(sandbox, view.name);
        if self.at.spec.apps().iter().any(|app| here(app).is_some()) {
            for view in inits.iter().filter(|view| view.kind == Kind::Sidecar) {
                self.tend(view, self.at.newest_in(sandbox, view.name), sandbox);
            }
            return true;
        }
        let Some(frontier) = inits.iter().rposition(|view| here(view).is_some()) else {
            if let Some(first) = inits.first() {
                self.tend(first, None, sandbox);
            }
            return inits.is_empty();
        };
        for view in inits[..frontier].iter().filter(|view| view.kind == Kind::Sidecar) {
            self.tend(view, self.at.newest_in(sandbox, view.name), sandbox);
        }
        let view = &inits[frontier];
        let instance = self.at.newest_in(sandbox, view.name);
        let passed = match (view.kind, instance) {
            (Kind::Init, Some(done)) if done.state == State::Exited && !init_failed(done) => true,
            (Kind::Init, _) => {
                self.tend(view, instance, sandbox);
                false
            }
            (Kind::Sidecar | Kind::App | Kind::Ephemeral, _) => {
                self.tend(view, instance, sandbox) == Health::Good && self.has_started(view, instance)
            }
        };
        match inits.get(frontier + 1) {
            Some(next) if passed => {
                self.tend(next, None, sandbox);
                false
            }
            Some(_) => false,
            None => passed,
        }
    }

    /// Its startup probe, if any, has succeeded.
    fn has_started(&self, view: &ContainerView<'_>, instance: Option<&Instance>) -> bool {
        instance.is_some_and(|instance| status::has_started(self.at, view, instance))
    }

    /// Keeps a container running: leaves it alone, kills it, starts it, or waits for a timer.
    fn tend(&mut self, view: &ContainerView<'_>, instance: Option<&Instance>, sandbox: &str) -> Health {
        let at = self.at;
        let strays: Vec<_> = at
            .alive()
            .filter(|other| other.name == view.name)
            .filter(|other| other.sandbox != sandbox || instance.is_none_or(|instance| instance.id != other.id))
            .collect();
        if !strays.is_empty() {
            for stray in strays {
                self.kill(view, stray, KillReason::Stray, false);
            }
            return Health::Down;
        }
        match instance {
            Some(running) if running.state == State::Running => self.examine(view, running, sandbox),
            Some(unknown) if unknown.state == State::Unknown => {
                self.kill(view, unknown, KillReason::Unknown, false);
                Health::Down
            }
            Some(_) | None => {
                self.revive(view, instance, Some(sandbox));
                Health::Down
            }
        }
    }

    fn examine(&mut self, view: &ContainerView<'_>, running: &Instance, sandbox: &str) -> Health {
        let memory = self.at.memory;
        let probes = memory.probes.get(&running.id).copied().unwrap_or_default();
        let long_lived = view.kind != Kind::Init;
        // An instance without a hash is not ours to judge.
        let why = if long_lived && running.hash != 0 && running.hash != view.hash() && self.may_start {
            KillReason::SpecChanged
        } else if memory.post_start.get(&running.id) == Some(&PostStart::Failed) {
            KillReason::PostStart
        } else if view.liveness_probe().is_some() && probes.liveness == Some(ProbeResult::Failure) {
            KillReason::Liveness
        } else if view.startup_probe().is_some() && probes.startup == Some(ProbeResult::Failure) {
            KillReason::Startup
        } else if memory.post_start.get(&running.id) == Some(&PostStart::Running) {
            return Health::Starting;
        } else {
            return Health::Good;
        };
        let restart = why == KillReason::SpecChanged || view.restarts_after_kill();
        self.kill(view, running, why, restart);
        if restart && why != KillReason::PostStart {
            self.start(view, Some(running), Some(sandbox));
        }
        Health::Down
    }

    fn kill(&mut self, view: &ContainerView<'_>, instance: &Instance, why: KillReason, restart: bool) {
        let name = view.name;
        let (what, probe) = match why {
            KillReason::SpecChanged => (format!("Container {name} definition changed"), None),
            KillReason::Liveness => (format!("Container {name} failed liveness probe"), view.liveness_probe()),
            KillReason::Startup => (format!("Container {name} failed startup probe"), view.startup_probe()),
            KillReason::PostStart => ("FailedPostStartHook".to_owned(), None),
            KillReason::PodEnds | KillReason::SandboxChanged | KillReason::Unknown | KillReason::Stray => {
                (format!("Stopping container {name}"), None)
            }
        };
        let announce = restart && why != KillReason::PostStart;
        let message = if announce { format!("{what}, will be restarted") } else { what };
        let grace = probe.and_then(|probe| probe.termination_grace_period_seconds);
        self.kills.push(self.at.kill(instance, grace.unwrap_or_else(|| self.at.spec.grace()), why, message));
    }

    /// Starts a container that is not running, if the rules allow it.
    fn revive(&mut self, view: &ContainerView<'_>, instance: Option<&Instance>, sandbox: Option<&str>) {
        match instance {
            None if view.kind == Kind::App => {
                if status::exit_code(self.at, view).is_none_or(|code| view.restarts(code)) {
                    self.start(view, None, sandbox);
                }
            }
            None => self.start(view, None, sandbox),
            Some(made) if made.state == State::Created => self.start(view, instance, sandbox),
            Some(dead) => {
                let again = if view.kind == Kind::Init && init_failed(dead) {
                    view.restarts(dead.exit_code.max(1))
                } else {
                    view.restarts(dead.exit_code)
                };
                if again {
                    self.start(view, instance, sandbox);
                }
            }
        }
    }

    /// Starts a container unless a timer is against it. `previous` is the instance it replaces.
    fn start(&mut self, view: &ContainerView<'_>, previous: Option<&Instance>, sandbox: Option<&str>) {
        let at = self.at;
        let (name, hash) = (view.name, view.hash());
        // A new sandbox wipes the slate of init containers, not of the others.
        let finished = at
            .observed
            .containers
            .iter()
            .filter(|old| old.name == name && old.state == State::Exited)
            .filter(|old| view.kind == Kind::App || Some(old.sandbox.as_str()) == sandbox)
            .find_map(|old| old.finished_at);
        let error = at.memory.start_errors.get(name).filter(|error| error.hash == hash);
        let pod = at.spec.full_name();
        let timer = if let Some(until) = at.memory.pulls.blocked(view.image, at.now) {
            let cause = error.map(|error| match error.reason.as_str() {
                "ImagePullBackOff" => error.message.clone(),
                reason => format!("Back-off pulling image \"{}\": {reason}: {}", view.image, error.message),
            });
            let message = cause.unwrap_or_else(|| format!("Back-off pulling image \"{}\"", view.image));
            Some((until, "ImagePullBackOff", message))
        } else {
            let crash = finished.and_then(|finished| at.memory.crashes.blocked(name, hash, finished, at.now));
            crash.map(|(until, delay)| {
                let delay = go_duration(delay);
                (until, "CrashLoopBackOff", format!("back-off {delay} restarting failed container={name} pod={pod}"))
            })
        };
        if let Some((until, reason, message)) = timer {
            // It may be brought by somebody else meanwhile.
            let pulls = reason == "ImagePullBackOff";
            self.wake_at(if pulls { until.min(after(at.now, IMAGE_LOOK)) } else { until });
            if error.is_none_or(|error| error.reason != reason || error.message != message) {
                self.events.push(back_off_event(view, reason, &pod));
            }
            self.blocked.push(Blocked {
                name: name.to_owned(),
                hash,
                reason: reason.to_owned(),
                message,
                by_timer: true,
            });
            return;
        }
        if let Some((error, until)) =
            error.and_then(|error| Some((error, error.retry_at.filter(|until| holds(*until, RETRY, at.now))?)))
        {
            self.wake_at(until);
            let (reason, message) = (error.reason.clone(), error.message.clone());
            self.blocked.push(Blocked { name: name.to_owned(), hash, reason, message, by_timer: false });
            return;
        }
        if !self.may_start {
            return;
        }
        // What was made and never started has the name that is needed now.
        let made = at.observed.containers.iter().filter(|old| old.name == name && old.state == State::Created);
        self.discards.extend(made.map(|made| Action::RemoveContainer {
            id: made.id.clone(),
            name: made.name.clone(),
            log_path: made.log_path.clone(),
        }));
        self.starts.push(Action::StartContainer {
            kind: view.kind,
            index: view.index,
            name: name.to_owned(),
            image: view.image.to_owned(),
            hash,
            restart_count: status::next_restart_count(at, view, previous.or_else(|| at.observed.newest(name))),
            sandbox: sandbox.map(str::to_owned),
            after: finished,
        });
    }

    fn wake_at(&mut self, time: Timestamp) {
        self.wake = earliest(self.wake, Some(time));
    }

    fn into_plan(self) -> Plan {
        let mut steps = Vec::new();
        let mut step = |actions: Vec<Action>, must: bool| {
            if !actions.is_empty() {
                steps.push(Step { actions, must });
            }
        };
        if self.set_up {
            step(vec![Action::SetUpVolumes], true);
        }
        step(self.kills, true);
        step(self.stops, true);
        step(self.discards, true);
        step(self.sandbox.into_iter().collect(), true);
        for start in self.starts {
            step(vec![start], false);
        }
        let discarded: Vec<_> = steps.iter().flat_map(|step| &step.actions).cloned().collect();
        let mut removals = removals(gc::surplus(self.at.observed, false));
        for step in &mut removals {
            step.actions.retain(|action| !discarded.contains(action));
        }
        steps.extend(removals.into_iter().filter(|step| !step.actions.is_empty()));
        let (blocked, events) = (self.blocked, self.events);
        Plan { stage: Stage::Sync, steps, wake_at: self.wake, blocked, termination: None, events }
    }
}

fn init_failed(instance: &Instance) -> bool {
    debug_assert!(!is_alive(instance), "an ended instance");
    instance.exit_code != 0 || instance.reason == "OOMKilled"
}

fn back_off_event(view: &ContainerView<'_>, reason: &str, pod: &str) -> PodEvent {
    let list = match view.kind {
        Kind::Init | Kind::Sidecar => "initContainers",
        Kind::App => "containers",
        Kind::Ephemeral => "ephemeralContainers",
    };
    let crash = reason == "CrashLoopBackOff";
    let message = if crash {
        format!("Back-off restarting failed container {} in pod {pod}", view.name)
    } else {
        format!("Back-off pulling image \"{}\"", view.image)
    };
    PodEvent { warning: crash, reason: "BackOff", message, field_path: Some(format!("spec.{list}{{{}}}", view.name)) }
}

/// A duration of whole seconds as Go prints it.
fn go_duration(duration: SignedDuration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}
