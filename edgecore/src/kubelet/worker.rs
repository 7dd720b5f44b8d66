//! The worker of one pod UID: looks, plans, publishes the status, acts, waits. One at a time for a UID, so that nothing is ever
//! started twice.

use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::admission;
use super::backoff::{after, holds};
use super::context::{Context, reference};
use super::execute::{Done, Execution, post_start};
use super::gather::Needs;
use super::images::PullPolicy;
use super::memory::{Failure, Memory, PostStart, ProbeResult, Probes, Volumes};
use super::observed::{Observed, State};
use super::plan::{Action, Life, Plan, Stage, Step, plan};
use super::probes::{PodProbes, Results};
use super::references::PodEvent;
use super::spec::{ContainerView, Spec, is_terminal_phase};
use super::status;
use crate::clock;

/// How long to wait before asking a runtime again that does not answer. Its return wakes the worker earlier.
const RUNTIME_RETRY: Duration = Duration::from_secs(5);

/// How long until volumes that could not be brought up to date are tried again.
const REFRESH_RETRY: SignedDuration = SignedDuration::from_secs(10);
/// How long until a status that could not be kept is tried again.
const PUBLISH_RETRY: SignedDuration = SignedDuration::from_secs(10);
/// How long to wait for the runtime's account of a container that was heard to have ended, first and last of doubling pauses.
const FIRST_SETTLING: Duration = Duration::from_millis(10);
const LAST_SETTLING: Duration = Duration::from_millis(1280);

/// What the worker of a pod is told. Counters rise when something happened that it has to look at.
#[derive(Clone, Debug)]
pub struct Desired {
    /// The object; of a pod whose object is gone its last version, of an orphan its UID only.
    pub pod: Arc<Pod>,
    /// What the store says about its existence.
    pub life: Life,
    /// Whether this node takes it.
    pub admission: Admission,
    /// A ConfigMap, Secret or token of the pod changed.
    pub references: u64,
    /// Something happened in the runtime.
    pub look: u64,
    /// The status has to be reported again.
    pub resend: u64,
}

/// Whether the node takes a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Yes.
    Admitted,
    /// No, for good.
    Rejected {
        /// `OutOfcpu`, `NodeAffinity`, …
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// It asks for something that is not supported here: it stays Pending and says why.
    Unsupported(PodEvent),
}

/// How a worker begins.
#[derive(Debug)]
pub struct Beginning {
    /// The status the pod had when an earlier process kept it.
    pub memory: Memory,
    /// What was seen of the pod when everything was looked at; `None`: look.
    pub observed: Option<Observed>,
    /// edgecore itself has just started.
    pub at_start: bool,
    /// Set once the pod's phase is Succeeded or Failed: it takes nothing of the node any more.
    pub over: Arc<AtomicBool>,
}

struct Worker {
    context: Arc<Context>,
    desired: watch::Receiver<Desired>,
    memory: Memory,
    probes: Option<PodProbes>,
    hooks: JoinSet<Hooked>,
    /// What was last acted upon.
    seen: Option<Desired>,
    /// Volumes could not be brought up to date; they are tried again then.
    refresh_at: Option<Timestamp>,
    /// The last status could not be kept, and so was not reported.
    unpublished: bool,
    at_start: bool,
    over: Arc<AtomicBool>,
    /// Instances that were seen to have ended.
    ended: BTreeSet<String>,
}

/// Works until nothing is left of the pod.
pub async fn run(context: Arc<Context>, desired: watch::Receiver<Desired>, beginning: Beginning) {
    let Beginning { memory, mut observed, at_start, over } = beginning;
    let hooks = JoinSet::new();
    let mut worker = Worker {
        context,
        desired,
        memory,
        probes: None,
        hooks,
        seen: None,
        refresh_at: None,
        unpublished: false,
        at_start,
        over,
        ended: BTreeSet::new(),
    };
    loop {
        let desired = worker.desired.borrow_and_update().clone();
        let Some(observed) = worker.look(&desired, observed.take()).await else { continue };
        if worker.turn(&desired, observed).await == Turn::Over {
            return;
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Turn {
    Again,
    Over,
}

impl Worker {
    /// What the runtime holds of the pod; `None`: it could not be asked, and it is time to try again.
    async fn look(&mut self, desired: &Desired, observed: Option<Observed>) -> Option<Observed> {
        if let Some(observed) = observed {
            return Some(observed);
        }
        let uid = Spec::new(&desired.pod).uid();
        match self.context.cri.observe(Some(uid)).await {
            Ok(mut all) => {
                let mut observed = all.remove(uid).unwrap_or_default();
                let mut pause = FIRST_SETTLING;
                while !self.context.cri.is_settled(&observed) && pause <= LAST_SETTLING {
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                    match self.context.cri.observe(Some(uid)).await {
                        Ok(mut all) => observed = all.remove(uid).unwrap_or_default(),
                        Err(error) => debug!(pod = uid, %error, "the runtime cannot be asked"),
                    }
                }
                Some(observed)
            }
            Err(error) => {
                debug!(pod = uid, %error, "the runtime cannot be asked");
                // Waiting for news is enough; the timer is for news that got lost.
                let _ = tokio::time::timeout(RUNTIME_RETRY, self.desired.changed()).await;
                None
            }
        }
    }

    async fn turn(&mut self, desired: &Desired, mut observed: Observed) -> Turn {
        let Desired { pod, life, .. } = desired;
        let now = clock::wall();
        self.memory.take_back_interrupted(&mut observed);
        self.take_in(desired, &observed, now);
        self.memory.prune(&observed);
        self.count_ends(pod, &observed);
        self.forgive_pulls(pod, now).await;
        if let Some(probes) = &self.probes {
            self.memory.probes = probes.results();
        }

        let plan = plan(pod, *life, &observed, &self.memory, now);
        self.memory.note(&plan);
        let node = self.context.node();
        let status = status::status(pod, *life, &observed, &self.memory, &node.host_ips, now);
        let resend = self.seen.as_ref().map_or(0, |seen| seen.resend) != desired.resend;
        // The note of an earlier process may have been put back with the rest of the store: what the cloud was told since, nobody here knows.
        let begins = self.at_start && self.seen.is_none();
        let changed = self.memory.last_status.as_ref().is_none_or(|last| !status::same(last, &status));
        self.memory.last_status = Some(status.clone());
        if status.phase.as_deref().is_some_and(is_terminal_phase) {
            self.over.store(true, Ordering::Relaxed);
        }
        self.watch_probes(desired, &observed, status.pod_ip.as_deref());
        let refresh = self
            .seen
            .as_ref()
            .is_some_and(|seen| seen.references != desired.references || !Arc::ptr_eq(&seen.pod, &desired.pod))
            || self.refresh_at.is_some_and(|at| !holds(at, REFRESH_RETRY, now));
        self.seen = Some(desired.clone());

        for event in &plan.events {
            self.context.record(&reference(pod), event);
        }
        if plan.stage == Stage::Finished && matches!(life, Life::Removed | Life::Orphan) {
            return Turn::Over;
        }
        let reported =
            matches!(life, Life::Wanted | Life::Deleting) && (begins || changed || resend || self.unpublished);
        let (context, finished) = (self.context.clone(), self.memory.finished);
        let publish = async { !reported || keep(&context, pod, &status, finished).await };
        self.unpublished = false;
        let wake_at = plan.wake_at;
        // The end is the last thing to be said of a pod.
        let ends = plan.steps.iter().flat_map(|step| &step.actions).any(|action| *action == Action::ReportFinished);
        let (again, published) = if ends {
            let published = publish.await;
            (self.act(desired, observed, plan, refresh, &status).await, published)
        } else {
            tokio::join!(self.act(desired, observed, plan, refresh, &status), publish)
        };
        self.unpublished |= !published;
        let wake_at = earliest(wake_at, self.refresh_at);
        match again {
            Again::AtOnce => {}
            Again::At(at) => self.wait(earliest(Some(at), wake_at)).await,
            Again::WhenNeeded if self.unpublished => {
                self.wait(earliest(Some(after(now, PUBLISH_RETRY)), wake_at)).await
            }
            Again::WhenNeeded => self.wait(wake_at).await,
        }
        Turn::Again
    }

    /// What ended while no edgecore looked is not counted.
    fn count_ends(&mut self, pod: &Pod, observed: &Observed) {
        let is_known = self.at_start && self.seen.is_none();
        let before = std::mem::take(&mut self.ended);
        let spec = Spec::new(pod).all();
        for instance in observed.containers.iter().filter(|instance| instance.state == State::Exited) {
            let kind = spec.iter().find(|view| view.name == instance.name).map(|view| view.kind);
            if let Some(kind) = kind.filter(|_| !is_known && !before.contains(&instance.id)) {
                self.context.ends().add(kind, instance.exit_code, &instance.reason);
            }
            self.ended.insert(instance.id.clone());
        }
    }

    /// An image that somebody else brought is not waited for.
    async fn forgive_pulls(&mut self, pod: &Pod, now: Timestamp) {
        for image in self.memory.pulls.held(now).map(str::to_owned).collect::<Vec<_>>() {
            let takes_it = |view: &ContainerView<'_>| {
                let policy = view.container.map(|one| PullPolicy::of(one.image_pull_policy.as_deref(), &image));
                policy.is_some_and(|policy| policy != PullPolicy::Always)
            };
            let all = Spec::new(pod).all();
            let takes_it = all.iter().filter(|view| view.image == image).all(takes_it);
            if takes_it && self.context.images.is_at_hand(&image).await {
                self.memory.pulls.forget(&image);
            }
        }
    }

    /// Enters what is new about the pod before planning.
    fn take_in(&mut self, desired: &Desired, observed: &Observed, now: Timestamp) {
        let first = self.seen.is_none();
        if self.seen.as_ref().is_some_and(|seen| seen.references != desired.references) {
            self.memory.references_changed();
        }
        if !first && self.seen.as_ref().is_some_and(|seen| seen.admission == desired.admission) {
            return;
        }
        match &desired.admission {
            Admission::Admitted => {
                // After a lost store the runtime is the only one who remembers.
                let oldest = observed.sandboxes.iter().map(|sandbox| sandbox.created_at).min();
                if self.memory.last_status.is_none()
                    && desired.life == Life::Wanted
                    && let Some(event) = admission::unenforced(&desired.pod)
                {
                    self.context.record(&reference(&desired.pod), &event);
                }
                self.memory.accept(oldest.unwrap_or(now));
            }
            Admission::Rejected { reason, message } => self.memory.reject(reason, message, now),
            Admission::Unsupported(event) => {
                self.memory.accept(now);
                self.memory.volumes = Volumes::Unsupported(event.message.clone());
                self.context.record(&reference(&desired.pod), event);
            }
        }
    }

    fn watch_probes(&mut self, desired: &Desired, observed: &Observed, pod_ip: Option<&str>) {
        if self.probes.is_none() && desired.life != Life::Orphan {
            let adopted = adopted(&self.memory);
            self.probes = PodProbes::start(self.context.clone(), &desired.pod, adopted, self.at_start);
        }
        if let Some(probes) = &self.probes {
            let ending = desired.life != Life::Wanted || self.memory.termination.is_some();
            probes.see(&desired.pod, observed, ending, pod_ip.and_then(|ip| ip.parse().ok()));
        }
    }

    /// Carries a plan out, or as much of it as still makes sense.
    async fn act(
        &mut self,
        desired: &Desired,
        observed: Observed,
        plan: Plan,
        refresh: bool,
        status: &PodStatus,
    ) -> Again {
        let refresh = refresh && self.memory.volumes == Volumes::Ready && desired.life == Life::Wanted;
        if self.memory.volumes != Volumes::Ready || desired.life != Life::Wanted {
            // They are set up anew, or not needed any more.
            self.refresh_at = None;
        }
        if plan.steps.is_empty() && !refresh {
            return Again::WhenNeeded;
        }
        let mut execution = Execution {
            context: self.context.clone(),
            pod: desired.pod.clone(),
            needs: Needs::of(&desired.pod),
            observed,
            status: status.clone(),
            sandbox: None,
            stopped: watch::channel(BTreeSet::new()).0,
        };
        if refresh {
            // What cannot be brought up to date keeps its content; the event says so.
            let failed = execution.set_up().await.is_err();
            self.refresh_at = failed.then(|| after(clock::wall(), REFRESH_RETRY));
        }
        let mut retry: Option<Timestamp> = None;
        let acted = !plan.steps.is_empty();
        for step in plan.steps {
            match self.step(desired, &mut execution, &step).await {
                Stepped::Done => {}
                Stepped::Failed(at) => {
                    retry = Some(retry.map_or(at, |known| known.min(at)));
                    if step.must {
                        break;
                    }
                }
                Stepped::Abandoned => return Again::AtOnce,
            }
            if execution.sandbox.is_some() {
                // The world should see the new sandbox before an image is pulled for it.
                return Again::AtOnce;
            }
        }
        match retry {
            Some(at) => Again::At(at),
            None if acted => Again::AtOnce,
            None => Again::WhenNeeded,
        }
    }

    async fn step(&mut self, desired: &Desired, execution: &mut Execution, step: &Step) -> Stepped {
        let now = clock::wall();
        for action in &step.actions {
            self.memory.before(action, now);
        }
        let results = {
            let mut all = pin!(join_all(step.actions.iter().map(|action| execution.run(action))));
            let mut news = self.desired.clone();
            loop {
                tokio::select! {
                    results = &mut all => break results,
                    () = turned(&mut news, desired) => return Stepped::Abandoned,
                    () = probed(&mut self.probes) => self.tell_probes(desired, &execution.observed).await,
                }
            }
        };
        let mut retry: Option<Timestamp> = None;
        for (action, result) in step.actions.iter().zip(results) {
            match result {
                Ok(done) => self.carried_out(desired, execution, action, done),
                Err(failure) => {
                    let Failure { reason, message } = &failure;
                    let (namespace, name) = (&desired.pod.metadata.namespace, &desired.pod.metadata.name);
                    warn!(?namespace, ?name, reason, message, "failed; will be tried again");
                    let at = self.memory.failed(action, failure, clock::wall());
                    retry = Some(retry.map_or(at, |known| known.min(at)));
                }
            }
        }
        retry.map_or(Stepped::Done, Stepped::Failed)
    }

    fn carried_out(&mut self, desired: &Desired, execution: &mut Execution, action: &Action, done: Done) {
        self.memory.done(action);
        if done.sandbox.is_some() {
            execution.sandbox = done.sandbox;
        }
        if let (Action::StartContainer { name, hash, .. }, Some(id)) = (action, done.started) {
            self.memory.post_start.insert(id.clone(), PostStart::Running);
            let pod_ip = execution.observed.sandboxes.first().and_then(|sandbox| sandbox.ips.first().copied());
            let (context, pod, name, hash) = (self.context.clone(), desired.pod.clone(), name.clone(), *hash);
            self.hooks.spawn(async move {
                let hook = post_start(context, pod, name.clone(), id.clone(), pod_ip);
                // A hook that panics has failed.
                let passed = AssertUnwindSafe(hook).catch_unwind().await.unwrap_or(false);
                Hooked { id, name, hash, passed }
            });
        }
    }

    /// A probe has come to another result while something is done, which may take a pull or a grace period: whether the pod is ready does not
    /// wait for that.
    async fn tell_probes(&mut self, desired: &Desired, observed: &Observed) {
        let Some(probes) = &self.probes else { return };
        self.memory.probes = probes.results();
        let Desired { pod, life, .. } = desired;
        let status = status::status(pod, *life, observed, &self.memory, &self.context.node().host_ips, clock::wall());
        if !matches!(life, Life::Wanted | Life::Deleting)
            || self.memory.last_status.as_ref().is_some_and(|last| status::same(last, &status))
        {
            return;
        }
        // What this turn began with may be kept after it: the newest is said again.
        self.unpublished = true;
        self.memory.last_status = Some(status.clone());
        keep(&self.context, pod, &status, self.memory.finished).await;
    }

    /// Waits for news, for a probe or hook, or for the time.
    async fn wait(&mut self, until: Option<Timestamp>) {
        tokio::select! {
            // An error means that edgecore is shutting down, which ends this task too.
            _ = self.desired.changed() => {}
            () = probed(&mut self.probes) => {}
            Some(Ok(Hooked { id, name, hash, passed })) = self.hooks.join_next(), if !self.hooks.is_empty() => {
                if passed {
                    self.memory.post_start.remove(&id);
                } else {
                    self.memory.hook_failed(id, name, hash);
                }
            }
            () = sleep_until(until) => {}
        }
    }
}

/// A postStart hook that has ended.
struct Hooked {
    id: String,
    name: String,
    /// Of the container.
    hash: u64,
    passed: bool,
}

enum Again {
    AtOnce,
    At(Timestamp),
    WhenNeeded,
}

enum Stepped {
    Done,
    Failed(Timestamp),
    Abandoned,
}

/// Keeps a pod's status, to be reported; whether that worked.
async fn keep(context: &Context, pod: &Pod, status: &PodStatus, finished: bool) -> bool {
    let published = context.publish(pod, status, finished).await;
    if let Err(error) = &published {
        warn!(pod = Spec::new(pod).uid(), %error, "a pod's status cannot be kept; it will be tried again");
    }
    published.is_ok()
}

/// Waits until a probe has come to another result.
async fn probed(probes: &mut Option<PodProbes>) {
    match probes {
        Some(probes) => probes.changed().await,
        None => std::future::pending().await,
    }
}

/// Waits until the pod begins to end, or its grace shrinks: the only news for which a step is abandoned.
async fn turned(news: &mut watch::Receiver<Desired>, was: &Desired) {
    let grace = |desired: &Desired| desired.pod.metadata.deletion_grace_period_seconds;
    let ends = |new: &Desired| {
        (new.life.is_over() && !was.life.is_over())
            || matches!((grace(new), grace(was)), (Some(new), Some(old)) if new < old)
    };
    if news.wait_for(ends).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn earliest(a: Option<Timestamp>, b: Option<Timestamp>) -> Option<Timestamp> {
    a.into_iter().chain(b).min()
}

async fn sleep_until(until: Option<Timestamp>) {
    let Some(until) = until else { return std::future::pending().await };
    // Wall time, since it comes from the runtime; a jump of the clock costs a look, or a minute.
    let rest = until.duration_since(clock::wall());
    let rest = Duration::try_from(rest).unwrap_or_default().min(Duration::from_secs(60));
    tokio::time::sleep(rest).await;
}

/// What the status of an earlier process says of probes, so that nothing flaps when edgecore is restarted.
fn adopted(memory: &Memory) -> Results {
    let Some(status) = &memory.last_status else { return Results::new() };
    let containers = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
    containers
        .filter_map(|container| {
            let id = container.container_id.as_deref()?.rsplit('/').next()?.to_owned();
            let readiness = if container.ready { ProbeResult::Success } else { ProbeResult::Failure };
            let startup = if container.started == Some(true) { ProbeResult::Success } else { ProbeResult::Unknown };
            let probes =
                Probes { liveness: Some(ProbeResult::Success), readiness: Some(readiness), startup: Some(startup) };
            Some((id, probes))
        })
        .collect()
}
