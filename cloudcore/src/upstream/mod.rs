//! Reports on their way to the apiserver.
//!
//! One queue a session, bounded and coalesced by what is reported; one request at a time for a node, a bounded number for all, first come
//! first served, so that no node starves another. A report ends when the apiserver took it or refused it for good; anything else is tried
//! again. Where the apiserver takes others meanwhile, the edge has it back for a while after some tries, so that it holds nothing else up. A node may report for itself, for its own pods and its own devices: everything else is refused, logged and counted.

use std::collections::HashMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use kube::api::Patch;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use skerry_proto::payload::NodeReport;
use skerry_proto::sync::inbox::{End, Next, Waiting};
use skerry_proto::sync::{Report, ReportKind};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tracing::{error, warn};

use self::event::About;
use self::queue::{Claiming, State};
use crate::apiserver::{Apiserver, Kind, Verdict, backoff, verdict};
use crate::backend::{FeedEvent, NodeIdentity};
use crate::backend_k8s::Shared;
use crate::closure::PodFacts;
use crate::kubelet::Ports;
use crate::nodes::Claim;
use crate::nodes::leases::Leases;
use crate::retry::chain;
use crate::{clock, nodes, supervise};

mod device;
mod event;
pub(crate) mod node;
pub(crate) mod pod;
mod queue;
#[cfg(test)]
mod tests;

/// Requests for reports under way at once, of all nodes.
const AT_ONCE: usize = 32;
/// What the edge is told of a report over which there was a panic.
const BUG: &str = "cloudcore failed over this report, which is a bug; its log says where";

/// Takes the reports of all sessions.
pub(crate) struct Upstream {
    api: Apiserver,
    shared: Arc<Shared>,
    leases: Arc<Leases>,
    ports: Arc<Ports>,
    permits: Semaphore,
    queues: Mutex<HashMap<String, Arc<Queue>>>,
    /// Somebody else's CRD: a Device shows no state, however often it is written.
    states_are_lost: AtomicBool,
}

/// One session's reports. Dropping it ends what is under way.
pub(crate) struct Reports {
    upstream: Arc<Upstream>,
    queue: Arc<Queue>,
    /// Brings them to the apiserver while there are any: most sessions report nothing most of the time.
    task: Option<JoinHandle<()>>,
}

struct Queue {
    node: NodeIdentity,
    epoch: u64,
    /// One start of the agent.
    who: u64,
    state: Mutex<State>,
    wake: Notify,
    /// Something came to its end, or is to be reported once more.
    news: Notify,
}

/// How an attempt ended.
enum Outcome {
    Taken,
    /// It is what the apiserver has already.
    Unchanged,
    Refused(String),
    /// What it is about is not there any more, or another one has its name.
    Gone(&'static str),
    /// Refused unless it passes.
    Doubtful(String),
    Later(Option<Duration>),
    /// A newer session has the node, and the report: this one only has to end.
    Superseded,
}

/// Why the Node does not name a session.
struct Unclaimed {
    /// Until it is tried again.
    wait: Duration,
    panicked: bool,
}

impl Outcome {
    /// What a failed request makes of a report, when nothing else is known.
    fn of(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Refused(reason) => Self::Refused(reason),
            Verdict::Doubtful(reason) => Self::Doubtful(reason),
            Verdict::Later(after) => Self::Later(after),
            Verdict::NotFound | Verdict::Conflict => Self::Later(None),
        }
    }
}

impl Upstream {
    /// `leases` go first.
    pub(crate) fn new(api: Apiserver, shared: Arc<Shared>, leases: Arc<Leases>, ports: Arc<Ports>) -> Arc<Self> {
        let permits = Semaphore::new(AT_ONCE);
        Arc::new(Self {
            api,
            shared,
            leases,
            ports,
            permits,
            queues: Mutex::default(),
            states_are_lost: AtomicBool::new(false),
        })
    }

    /// Bytes of reports that wait, of all nodes.
    fn waiting_bytes(&self) -> usize {
        lock(&self.queues).values().map(|queue| lock(&queue.state).inbox.waiting_bytes()).sum()
    }

    /// Begins a session. One that `claims` writes nothing before the Node says that it has it.
    pub(crate) fn open(self: &Arc<Self>, node: &NodeIdentity, epoch: u64, who: u64, claims: bool) -> Reports {
        let (state, wake, news) = (Mutex::default(), Notify::new(), Notify::new());
        let queue = Arc::new(Queue { node: node.clone(), epoch, who, state, wake, news });
        lock(&self.queues).insert(node.name.clone(), queue.clone());
        let mut reports = Reports { upstream: self.clone(), queue, task: None };
        if claims {
            lock(&reports.queue.state).inbox.begin();
            reports.drive(true);
        }
        reports
    }

    /// The apiserver shows this state of a pod: if that hides what the pod's node says, the node is asked to report once more.
    pub(crate) fn pod_seen(&self, node: &str, facts: &PodFacts) {
        let queue = lock(&self.queues).get(node).cloned();
        if let Some(queue) = queue {
            queue.see(facts);
        }
    }

    /// A Node is shown as unknown although its session lives: it is asked to report once more.
    pub(crate) fn node_hidden(&self, node: &str) {
        let Some(queue) = lock(&self.queues).get(node).cloned() else { return };
        if lock(&queue.state).node_hidden(&queue.node.uid, clock::monotonic()) {
            queue.news.notify_one();
        }
    }

    /// A Device is shown as unknown although its node's session lives: it is asked to report once more.
    pub(crate) fn device_hidden(&self, node: &str, uid: &str) {
        let Some(queue) = lock(&self.queues).get(node).cloned() else { return };
        if lock(&queue.state).device_hidden(uid) {
            queue.news.notify_one();
        }
    }

    /// A pod is gone: what was reported for it is forgotten.
    pub(crate) fn pod_gone(&self, node: &str, uid: &str) {
        if let Some(queue) = lock(&self.queues).get(node) {
            lock(&queue.state).forget(uid);
        }
    }

    /// Ends when nothing waits any more.
    async fn drive(self: Arc<Self>, queue: Arc<Queue>, claims: bool) {
        if claims {
            self.claim(&queue).await;
        }
        loop {
            let next = lock(&queue.state).next(clock::monotonic());
            match next {
                Next::Now(waiting) => {
                    let Report { namespace, name, .. } = &waiting.report;
                    let pod = (waiting.report.kind == ReportKind::PodStatus).then(|| format!("{namespace}/{name}"));
                    let id = waiting.report.id;
                    if let Some(how) = self.carry_out(&queue, waiting).await {
                        queue.end(id, how);
                    }
                    lock(&queue.state).tried();
                    let known = pod.and_then(|key| self.shared.closures().pod(&key).map(|(_, facts)| facts.clone()));
                    if let Some(facts) = known {
                        queue.see(&facts);
                    }
                }
                // A new report may be due before.
                Next::In(wait) => drop(tokio::time::timeout(wait, queue.wake.notified()).await),
                Next::Never => return,
            }
        }
    }

    /// Takes the node over from whatever replica had it, however long that takes.
    async fn claim(&self, queue: &Queue) {
        while let Err(failed) = self.try_claim(queue).await {
            tokio::time::sleep(failed.wait).await;
        }
    }

    /// Tries once to have the Node name this session, and counts what comes of it. What fails is told, now and then.
    async fn try_claim(&self, queue: &Queue) -> Result<(), Unclaimed> {
        let attempt = lock(&queue.state).claiming.attempt;
        let tried = AssertUnwindSafe(Box::pin(self.claim_once(queue, attempt == 0))).catch_unwind().await;
        let (result, after, remedy) = match tried.as_ref().map(|tried| tried.as_ref().map_err(verdict)) {
            Ok(Ok(Claim::Ours)) => ("taken", None, ""),
            Ok(Ok(Claim::Theirs(..))) => ("superseded", None, ""),
            Ok(Err(Verdict::Doubtful(_))) => {
                ("refused", None, "; if it is forbidden, apply deploy/rbac.yaml, or see which policy forbids it")
            }
            Ok(Err(Verdict::Refused(_))) => {
                ("refused", None, "; see which webhook or policy for Nodes does not take it")
            }
            Ok(Err(Verdict::Later(after))) => ("later", after, ""),
            Ok(Err(Verdict::NotFound | Verdict::Conflict)) => ("later", None, ""),
            Err(_) => ("refused", None, ""),
        };
        self.api.metrics().claim(result);
        let panicked = tried.is_err();
        let cause = match tried {
            Ok(Ok(_)) => {
                lock(&queue.state).claiming = Claiming::default();
                return Ok(());
            }
            Ok(Err(error)) => chain(&error),
            Err(_) => "cloudcore failed over it, which is a bug; its log says where".to_owned(),
        };
        let wait = backoff(attempt, rand::random()).max(after.unwrap_or_default());
        let lasts = lock(&queue.state).claiming.failed(clock::monotonic(), wait);
        if let Some(lasts) = lasts {
            warn!(
                node = queue.node.name,
                lasts_s = lasts.as_secs(),
                "cannot take the node over for its newest session, for which reports of it wait: {cause}{remedy}; trying again"
            );
        }
        Err(Unclaimed { wait, panicked })
    }

    /// Where what the watch showed was not the newest, the apiserver is asked for it.
    async fn claim_once(&self, queue: &Queue, mut from_watch: bool) -> Result<Claim, kube::Error> {
        // Nobody closes it.
        let _permit = self.permits.acquire().await;
        self.leases.on_time().await;
        let (claim, written) = loop {
            // As it is after the wait.
            let known = from_watch.then(|| self.shared.closures().node_named(&queue.node)).flatten();
            match nodes::claim(&self.api, &queue.node, (queue.epoch, queue.who), known).await {
                Err(error) if from_watch && verdict(&error) == Verdict::Conflict => from_watch = false,
                answer => break answer?,
            }
        };
        {
            let mut closures = self.shared.closures();
            closures.claimed(&queue.node, queue.epoch, claim);
            if let Some(written) = written {
                closures.node_written(&queue.node, written);
            }
        }
        if claim == Claim::Ours {
            self.ports.claimed(&queue.node, queue.epoch);
        }
        Ok(claim)
    }

    /// Tries once. Answers what the edge is to be told; what is to be tried again waits for it, and the others go on.
    async fn carry_out(&self, queue: &Queue, waiting: Waiting) -> Option<End> {
        let report = &waiting.report;
        let kind = kind_name(report.kind);
        // The Node's own report says whose it is. Before that nothing fences what else a session writes: one that began when the Node named
        // none has claimed nothing, and one of the agent's former life, with a lower epoch, may have done so since.
        let is_fenced = matches!(report.kind, ReportKind::PodStatus | ReportKind::DeviceStatus);
        let mut claimed = Ok(());
        if is_fenced && self.shared.closures().names_other(&queue.node, queue.epoch, queue.who) {
            let wait = lock(&queue.state).claiming.waits(clock::monotonic());
            claimed = match wait {
                // It was tried for another report.
                Some(wait) => Err(Unclaimed { wait, panicked: false }),
                None => self.try_claim(queue).await,
            };
        }
        let outcome = match claimed {
            Err(failed) if failed.panicked => Outcome::Refused(BUG.into()),
            // The report is not at fault, and others go on: the Node's own names the session, too.
            Err(failed) => Outcome::Later(Some(failed.wait)),
            Ok(()) => match self.permits.acquire().await {
                Ok(_permit) => {
                    self.leases.on_time().await;
                    if self.shared.closures().is_superseded(&queue.node, queue.epoch) {
                        return None;
                    }
                    // A request is kilobytes, and of all that wait for a permit there may be thousands.
                    let attempt = AssertUnwindSafe(Box::pin(self.attempt(queue, report, waiting.attempt > 0)));
                    attempt.catch_unwind().await.unwrap_or_else(|_| {
                        error!(node = queue.node.name, kind, name = report.name, "a report made cloudcore panic");
                        Outcome::Refused(BUG.into())
                    })
                }
                Err(_) => Outcome::Later(None),
            },
        };
        let end = match &outcome {
            Outcome::Doubtful(reason) => waiting.doubted(reason),
            Outcome::Later(after) => waiting.put_off(*after, self.api.takes_writes()),
            _ => None,
        };
        let outcome = match end {
            Some(End::Done(reason)) => Outcome::Refused(reason),
            Some(End::Later(least)) => {
                self.api.metrics().report(kind, "later");
                if let Outcome::Doubtful(reason) = outcome {
                    let Report { namespace, name, .. } = report;
                    warn!(node = queue.node.name, %namespace, %name, %reason, "the apiserver refuses a pod's status; the edge keeps it, and says it again in minutes");
                }
                return Some(End::Later(least.mul_f64(rand::random_range(1.0..2.0))));
            }
            None => outcome,
        };
        let refused = match outcome {
            Outcome::Superseded => return None,
            Outcome::Taken => {
                self.api.metrics().report(kind, "taken");
                String::new()
            }
            Outcome::Unchanged => {
                self.api.metrics().report(kind, "unchanged");
                String::new()
            }
            Outcome::Gone(reason) => {
                self.api.metrics().report(kind, "gone");
                reason.to_owned()
            }
            Outcome::Refused(reason) => {
                self.api.metrics().report(kind, "refused");
                let Report { namespace, name, uid, .. } = report;
                warn!(node = queue.node.name, kind, %namespace, %name, %uid, %reason, "report refused");
                if reason.is_empty() { "refused".into() } else { reason }
            }
            Outcome::Doubtful(_) | Outcome::Later(_) => {
                let after = if let Outcome::Later(after) = outcome { after } else { None };
                let wait = backoff(waiting.attempt, rand::random()).max(after.unwrap_or_default());
                let id = report.id;
                let ended = lock(&queue.state).inbox.again(waiting, clock::monotonic() + wait)?;
                self.api.metrics().report(kind, "superseded");
                if ended != id {
                    queue.end(ended, End::Done(String::new()));
                    return None;
                }
                String::new()
            }
        };
        Some(End::Done(refused))
    }

    /// No status of an older session takes the place of what a newer one wrote: each is written only over what was looked at while this
    /// session had the node. What was `tried` before is looked at anew. Events count up, whoever says them.
    async fn attempt(&self, queue: &Queue, report: &Report, tried: bool) -> Outcome {
        match report.kind {
            ReportKind::PodStatus => self.pod_status(queue, report).await,
            ReportKind::NodeStatus => self.node_status(queue, report, tried).await,
            ReportKind::Event => self.event(&queue.node, report).await,
            ReportKind::DeviceStatus => self.device_status(queue, report, tried).await,
            ReportKind::Unspecified => {
                Outcome::Refused("cloudcore does not know this kind of report: update it".into())
            }
        }
    }

    async fn node_status(&self, queue: &Queue, report: &Report, tried: bool) -> Outcome {
        let node = &queue.node;
        if report.name != node.name {
            return Outcome::Refused(format!("node {} may not report for node {}", node.name, report.name));
        }
        let content: NodeReport = match serde_json::from_slice(&report.payload) {
            Ok(content) => content,
            Err(error) => return Outcome::Refused(format!("not a node report: {error}")),
        };
        let (capacity, shown, known) = {
            let closures = self.shared.closures();
            (closures.capacity(&node.name), closures.node_shown(&node.name), closures.node_named(node))
        };
        // Whoever takes the node over writes the Node first, and so makes another version of it.
        let named = match known.filter(|_| !tried) {
            Some(known) => known,
            None => match self.newest(queue).await {
                Ok(found) => found,
                Err(outcome) => return outcome,
            },
        };
        // The watch may have come to it since this session was asked for.
        if named.epoch > queue.epoch {
            return Outcome::Superseded;
        }
        let unnamed = (named.epoch < queue.epoch).then(|| (queue.epoch, named.agents.followed_by(queue.who)));
        let patch = match node::patch(node, &named.version, unnamed, &content, capacity.as_ref()) {
            Ok(patch) => patch,
            Err(reason) => return Outcome::Refused(reason),
        };
        if shown.is_some_and(|shown| shown.says(&patch, capacity.as_ref())) {
            return Outcome::Unchanged;
        }
        match self.api.patch_status(Kind::Node, "", &node.name, patch).await {
            Ok(written) => {
                if unnamed.is_some() {
                    lock(&queue.state).claiming = Claiming::default();
                }
                let mut closures = self.shared.closures();
                if unnamed.is_some() {
                    closures.claimed(node, queue.epoch, Claim::Ours);
                }
                closures.node_written(node, nodes::named(&written));
                Outcome::Taken
            }
            Err(error) => match verdict(&error) {
                Verdict::NotFound => Outcome::Gone("the Node is gone"),
                // Two causes: another writer, or another Node of this name.
                Verdict::Conflict if self.shared.closures().node(&node.name).is_some_and(|known| known != *node) => {
                    Outcome::Gone("the Node is gone: another one has its name")
                }
                verdict => Outcome::of(verdict),
            },
        }
    }

    async fn event(&self, node: &NodeIdentity, report: &Report) -> Outcome {
        let event = match event::outgoing(&node.name, report) {
            Ok(event) => event,
            Err(reason) => return Outcome::Refused(reason),
        };
        let outcome = match &event.about {
            About::Node => None,
            About::Pod { name, uid } => self.own_pod(node, &event.namespace, name, uid).await.err(),
            About::Device { name, uid } => self.own_device(node, &event.namespace, name, uid).await.err(),
        };
        if let Some(outcome) = outcome {
            return outcome;
        }
        if event.count > 1
            && let Some(outcome) = self.count_up(&event).await
        {
            return outcome;
        }
        match self.api.create(Kind::Event, &event.namespace, event.body.clone()).await {
            Ok(_) => Outcome::Taken,
            Err(error) => match verdict(&error) {
                Verdict::Conflict if event.count == 1 => Outcome::Unchanged,
                Verdict::NotFound => Outcome::Gone("the event's namespace is gone"),
                verdict => Outcome::of(verdict),
            },
        }
    }

    /// Counts up an event that is there already; `None` if it is not. It never counts down: what is said of it may be older than what it
    /// shows, from a store that was put back, or by a session that is over.
    async fn count_up(&self, event: &event::Outgoing) -> Option<Outcome> {
        let shown = match self.api.get(Kind::Event, &event.namespace, &event.name).await {
            Ok(shown) => Kind::Event.json(&shown?),
            Err(error) => return Some(Outcome::of(verdict(&error))),
        };
        let Some(patch) = event::repetition(event, &shown) else { return Some(Outcome::Unchanged) };
        let written = self.api.patch(Kind::Event, &event.namespace, &event.name, &Patch::Merge(patch)).await;
        Some(written.map_or_else(|error| Outcome::of(verdict(&error)), |_| Outcome::Taken))
    }
}

impl Queue {
    fn see(&self, facts: &PodFacts) {
        if lock(&self.state).see(facts, clock::monotonic()) {
            self.news.notify_one();
        }
    }

    fn end(&self, id: u64, how: End) {
        lock(&self.state).inbox.end(id, how);
        self.news.notify_one();
    }
}

impl Reports {
    /// Takes a report. An older one of the same thing that still waits is replaced, and counts as taken.
    pub(crate) fn push(&mut self, report: Report) {
        let (ended, is_driven) = {
            let mut state = lock(&self.queue.state);
            (state.inbox.push(report), state.inbox.begin())
        };
        if let Some((kind, id, how)) = ended {
            let result = match &how {
                End::Done(refused) if refused.is_empty() => "superseded",
                End::Done(_) => "refused",
                End::Later(_) => "later",
            };
            self.upstream.api.metrics().report(kind_name(kind), result);
            self.queue.end(id, how);
        }
        if is_driven {
            self.queue.wake.notify_one();
        } else {
            self.drive(false);
        }
    }

    /// A report that is answered, or wanted once more, if there is any.
    pub(crate) fn try_next(&mut self) -> Option<FeedEvent> {
        let mut state = lock(&self.queue.state);
        match state.inbox.ended() {
            Some((id, End::Done(refused))) => return Some(FeedEvent::Reported { id, refused }),
            Some((id, End::Later(after))) => return Some(FeedEvent::ReportLater { id, after }),
            None => {}
        }
        state.wanted().map(|(kind, uid)| FeedEvent::ReportWanted(kind, uid))
    }

    /// The next report that is answered, or wanted once more. Cancel safe.
    pub(crate) async fn next(&mut self) -> FeedEvent {
        loop {
            if let Some(event) = self.try_next() {
                return event;
            }
            self.queue.news.notified().await;
        }
    }

    fn drive(&mut self, claims: bool) {
        let drive = self.upstream.clone().drive(self.queue.clone(), claims);
        self.task = Some(supervise::spawn("upstream", drive));
    }
}

impl Drop for Reports {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
        let mut queues = lock(&self.upstream.queues);
        if queues.get(&self.queue.node.name).is_some_and(|queue| Arc::ptr_eq(queue, &self.queue)) {
            queues.remove(&self.queue.node.name);
        }
    }
}

/// Bytes of reports that wait, counted when asked.
pub(crate) struct WaitingBytes(pub(crate) Arc<Upstream>);

impl fmt::Debug for WaitingBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WaitingBytes")
    }
}

impl Collector for WaitingBytes {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let gauge = ConstGauge::new(i64::try_from(self.0.waiting_bytes()).unwrap_or(i64::MAX));
        let (what, unit) = ("Reports of edge nodes that wait for the apiserver", Some(&Unit::Bytes));
        let metric = encoder.encode_descriptor("skerry_reports_waiting", what, unit, MetricType::Gauge)?;
        gauge.encode(metric)
    }
}

const fn kind_name(kind: ReportKind) -> &'static str {
    match kind {
        ReportKind::PodStatus => "pod",
        ReportKind::NodeStatus => "node",
        ReportKind::Event => "event",
        ReportKind::DeviceStatus => "device",
        ReportKind::Unspecified => "unknown",
    }
}

/// What is guarded is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
