//! All pods of the node: one worker for each UID that the store wants, or that the runtime still holds.
//!
//! It only routes: what the store, the runtime and the link have to say goes to the workers whom it concerns. While the store does not know
//! what is wanted (a new store that has not been in sync yet), nothing is taken for an orphan.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use skerry_proto::sync::{Collection, ReportKind};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::admission;
use super::context::{Context, ROUND, STATUS_NOTE, blocking};
use super::gather::{Needs, parse};
use super::memory::Memory;
use super::observed::Observed;
use super::panics::Panics;
use super::plan::Life;
use super::references::NodeFacts;
use super::resources::{self, PodCgroup};
use super::spec::Spec;
use super::worker::{self, Admission, Beginning, Desired};
use crate::app::ResetRequests;
use crate::control::ResetRequest;
use crate::link::ReportWanted;
use crate::runtime::events::Wake;
use crate::store::{Change, Error};
use crate::{clock, order};

/// How long until a store that could not be read is read again.
const DOUBT: Duration = Duration::from_secs(5);

/// Routes what happens to the workers of pods.
#[derive(Debug)]
pub struct Pods {
    context: Arc<Context>,
    workers: HashMap<String, Worker>,
    ended: JoinSet<()>,
    /// Which pod each task of [`Pods::ended`] is about.
    tasks: HashMap<Id, String>,
    panics: Panics,
    /// The cgroups above the pods' as they are to be; [`keep_tiers`] sets them.
    tiers: watch::Sender<Option<[PodCgroup; 3]>>,
    /// Pods without a worker that the runtime may hold something of; not known until it has been asked once.
    held: Option<BTreeSet<String>>,
    /// Pods came or went since.
    moved: bool,
    /// The store could not be read, or the runtime not be asked: all is compared again soon.
    doubtful: bool,
    /// Set once the node is being reset: whom to tell when no pod is left.
    reset: Option<ResetRequest>,
}

/// What the store wants.
struct Wanted {
    pods: Vec<Pod>,
    /// Also of those that cannot be parsed.
    uids: BTreeSet<String>,
}

#[derive(Debug)]
struct Worker {
    desired: watch::Sender<Desired>,
    needs: Needs,
    over: Arc<AtomicBool>,
}

impl Pods {
    /// Nothing runs until [`Pods::run`].
    pub fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            workers: HashMap::new(),
            ended: JoinSet::new(),
            tasks: HashMap::new(),
            panics: Panics::default(),
            tiers: watch::Sender::new(None),
            held: None,
            moved: true,
            doubtful: false,
            reset: None,
        }
    }

    /// Routes until shutdown. Containers go on running.
    pub async fn run(
        self,
        wakes: mpsc::Receiver<Wake>,
        wanted: broadcast::Receiver<ReportWanted>,
        reset: ResetRequests,
        shutdown: CancellationToken,
    ) {
        let tiers = keep_tiers(self.context.clone(), self.tiers.subscribe());
        tokio::select! {
            () = self.route(wakes, wanted, reset, shutdown) => {}
            () = tiers => {}
        }
    }

    async fn route(
        mut self,
        mut wakes: mpsc::Receiver<Wake>,
        mut wanted: broadcast::Receiver<ReportWanted>,
        reset: ResetRequests,
        shutdown: CancellationToken,
    ) {
        let mut changes = self.context.store.changes();
        let mut known = self.context.store.pods_known();
        let mut facts = self.context.facts.clone();
        let mut host_ips = facts.borrow_and_update().host_ips.clone();
        self.begin().await;
        loop {
            self.context.came_round();
            if std::mem::take(&mut self.moved) {
                self.want_tiers();
            }
            let next = self.panics.next();
            if self.workers.is_empty()
                && next.is_none()
                && let Some(reset) = self.reset.take()
            {
                // Whoever asked may be gone.
                let _ = reset.send(Ok(()));
                return shutdown.cancelled().await;
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(request) = reset.next() => self.wind_down(request),
                change = changes.recv() => match change {
                    Ok(change) => self.changed(&change).await,
                    Err(broadcast::error::RecvError::Lagged(_)) => self.compare().await,
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                Some(wake) = wakes.recv() => match wake {
                    Wake::Pod(uid) => self.woken(&uid).await,
                    Wake::All | Wake::RuntimeUp => self.look_at_all().await,
                    Wake::RuntimeDown(reason) => warn!(reason, "the runtime is away; what runs goes on running"),
                },
                Ok(()) = known.changed() => {
                    self.moved = true;
                    // What went while the store did not know is only now known to be gone.
                    self.compare().await;
                    self.look_at_all().await;
                }
                Ok(()) = facts.changed() => {
                    let now = facts.borrow_and_update().host_ips.clone();
                    // They are in the status of every pod.
                    if now != host_ips {
                        host_ips = now;
                        self.wake_all();
                    }
                }
                Some(ended) = self.ended.join_next_with_id(), if !self.ended.is_empty() => self.over(ended).await,
                () = rest(next), if next.is_some() => self.take_up_anew().await,
                () = tokio::time::sleep(DOUBT), if self.doubtful => self.compare().await,
                // Round once more, to show that nothing holds this up.
                () = tokio::time::sleep(ROUND), if !self.doubtful => {}
                again = wanted.recv() => match again {
                    Ok((ReportKind::PodStatus, uid)) => self.report_again(|of| *of == uid),
                    Ok(_) => {}
                    Err(broadcast::error::RecvError::Lagged(_)) => self.report_again(|_| true),
                    Err(broadcast::error::RecvError::Closed) => return,
                },
            }
        }
    }

    /// Takes up everything the store and the runtime hold, all at once.
    async fn begin(&mut self) {
        let mut observed = self.context.cri.observe(None).await;
        match &observed {
            Ok(observed) => self.held = Some(observed.keys().cloned().collect()),
            Err(error) => warn!(%error, "the runtime cannot be asked yet"),
        }
        let notes = self.notes().await;
        match self.wanted().await {
            Ok(wanted) => {
                for pod in wanted.pods {
                    let uid = Spec::new(&pod).uid().to_owned();
                    let memory = Memory::restored(notes.get(&uid).cloned());
                    let seen = observed.as_mut().ok().map(|observed| observed.remove(&uid).unwrap_or_default());
                    self.start(pod, memory, seen, true).await;
                }
                info!(pods = self.workers.len(), "pods taken up from the store");
            }
            Err(error) => self.doubt(&error),
        }
        self.adopt_orphans(observed.unwrap_or_default()).await;
    }

    /// The pods the store wants, oldest first.
    async fn wanted(&self) -> Result<Wanted, Error> {
        let rows = self.context.store.list(Collection::Pods).await?;
        let uids = rows.iter().map(|row| row.entry.uid.clone()).collect();
        let mut pods: Vec<Pod> = rows.iter().filter_map(parse).collect();
        order::sort_by_key(&mut pods, |pod: &Pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0));
        Ok(Wanted { pods, uids })
    }

    fn doubt(&mut self, error: &Error) {
        warn!(%error, "the pods in the store cannot be read; everything goes on as it is until they can");
        self.doubtful = true;
    }

    async fn notes(&self) -> BTreeMap<String, PodStatus> {
        let notes = self.context.store.notes(STATUS_NOTE).await.unwrap_or_else(|error| {
            warn!(%error, "the last statuses of pods cannot be read");
            Vec::new()
        });
        order::map(notes.into_iter().filter_map(|(uid, json)| Some((uid, serde_json::from_slice(&json).ok()?))))
    }

    async fn changed(&mut self, change: &Change) {
        if change.collection != Collection::Pods {
            for worker in self.workers.values().filter(|worker| worker.needs.concern(change.collection, &change.key)) {
                worker.desired.send_modify(|desired| desired.references += 1);
            }
            return;
        }
        match self.context.store.row(Collection::Pods, &change.uid).await {
            Ok(Some(row)) => {
                if let Some(pod) = parse(&row) {
                    self.upsert(pod).await;
                }
            }
            // A row may also be gone because it was damaged. Then what is wanted is not known until it has been fetched again.
            Ok(None) if *self.context.store.pods_known().borrow() => self.remove(&change.uid),
            Ok(None) => {}
            Err(error) => self.doubt(&error),
        }
    }

    /// Changes may have been missed: compares all.
    async fn compare(&mut self) {
        let damaged = *self.context.store.damaged().borrow();
        let wanted = match self.wanted().await {
            Ok(wanted) => wanted,
            Err(error) => return self.doubt(&error),
        };
        self.doubtful = false;
        // Looked at after the list, and only if nothing was lost on the way: a damaged row is not one that is gone.
        let known = *self.context.store.pods_known().borrow();
        if known && *self.context.store.damaged().borrow() == damaged {
            let gone = |uid: &&String| !wanted.uids.contains(*uid);
            for uid in self.workers.keys().filter(gone).cloned().collect::<Vec<_>>() {
                self.remove(&uid);
            }
        }
        for pod in wanted.pods {
            self.upsert(pod).await;
        }
        for worker in self.workers.values() {
            worker.desired.send_modify(|desired| desired.references += 1);
        }
    }

    /// Every pod ends, and none is started any more.
    fn wind_down(&mut self, request: ResetRequest) {
        info!(pods = self.workers.len(), "every pod is stopped, for the node is being reset");
        self.reset = Some(request);
        for worker in self.workers.values() {
            worker.desired.send_modify(|desired| desired.life = Life::Removed);
        }
    }

    async fn upsert(&mut self, pod: Pod) {
        if self.reset.is_some() {
            return;
        }
        let uid = Spec::new(&pod).uid().to_owned();
        let Some(worker) = self.workers.get_mut(&uid) else {
            if self.panics.rests(&uid) {
                return;
            }
            return self.start(pod, Memory::default(), None, false).await;
        };
        // A pod that is on its way out and wanted again is taken up anew when it is out.
        if matches!(worker.desired.borrow().life, Life::Orphan | Life::Removed) {
            return;
        }
        worker.needs = Needs::of(&pod);
        worker.desired.send_modify(|desired| {
            desired.life = Life::of(&pod);
            desired.pod = Arc::new(pod);
        });
    }

    fn remove(&mut self, uid: &str) {
        if let Some(worker) = self.workers.get(uid) {
            worker.desired.send_modify(|desired| {
                if desired.life != Life::Orphan {
                    desired.life = Life::Removed;
                }
            });
        }
    }

    async fn start(&mut self, pod: Pod, memory: Memory, observed: Option<Observed>, at_start: bool) {
        let uid = Spec::new(&pod).uid();
        // After a lost store only the runtime knows that a pod runs here already, and so must not be judged again.
        let may_run = memory.last_status.is_none() && self.held.as_ref().is_none_or(|held| held.contains(uid));
        let observed = match observed {
            None if may_run => match self.context.cri.observe(None).await {
                Ok(mut all) => {
                    self.held = Some(all.keys().filter(|uid| !self.workers.contains_key(*uid)).cloned().collect());
                    Some(all.remove(uid).unwrap_or_default())
                }
                Err(error) => {
                    warn!(pod = uid, %error, "the runtime cannot be asked about a new pod; it is taken up when it can");
                    self.doubtful = true;
                    return;
                }
            },
            observed => observed,
        };
        let admission = self.admit(&pod, &memory, observed.as_ref()).await;
        let life = Life::of(&pod);
        self.spawn(pod, life, admission, memory, observed, at_start);
    }

    fn spawn(
        &mut self,
        pod: Pod,
        life: Life,
        admission: Admission,
        memory: Memory,
        observed: Option<Observed>,
        at_start: bool,
    ) {
        let uid = Spec::new(&pod).uid().to_owned();
        let needs = Needs::of(&pod);
        let desired = Desired { pod: Arc::new(pod), life, admission, references: 0, look: 0, resend: 0 };
        let (sender, receiver) = watch::channel(desired);
        let over = Arc::new(AtomicBool::new(false));
        self.workers.insert(uid.clone(), Worker { desired: sender, needs, over: over.clone() });
        let beginning = Beginning { memory, observed, at_start, over };
        self.moved = true;
        if let Some(held) = &mut self.held {
            held.remove(&uid);
        }
        let (context, of) = (self.context.clone(), uid.clone());
        let task = self.ended.spawn(async move {
            worker::run(context.clone(), receiver, beginning).await;
            context.remove_rest(&of).await;
        });
        self.tasks.insert(task.id(), uid);
    }

    /// Pods that may run.
    fn active(&self) -> Vec<Arc<Pod>> {
        let workers = self.workers.values().filter(|worker| !worker.over.load(Ordering::Relaxed));
        workers.map(|worker| worker.desired.borrow().pod.clone()).collect()
    }

    /// Shares and limits of all pods together and of each QoS class. While the store lacks pods that run, they stay as they are.
    fn want_tiers(&self) {
        if !*self.context.store.pods_known().borrow() {
            return;
        }
        let pods = self.active();
        let pods = pods.iter().map(AsRef::as_ref);
        let tiers = Some(resources::qos_cgroups(pods, &self.context.node(), &self.context.machine));
        self.tiers.send_if_modified(|last| {
            let differs = *last != tiers;
            *last = tiers;
            differs
        });
    }

    /// A pod that ran here before, or whose end was reported, is not judged again.
    async fn admit(&self, pod: &Pod, memory: &Memory, observed: Option<&Observed>) -> Admission {
        if let Some(unsupported) = admission::unsupported(pod) {
            return Admission::Unsupported(unsupported);
        }
        let is_known = memory.last_status.is_some() || observed.is_some_and(|observed| !observed.sandboxes.is_empty());
        if is_known || Life::of(pod).is_over() || Spec::new(pod).is_terminal() {
            return Admission::Admitted;
        }
        let mut node = NodeFacts::clone(&self.context.node());
        let mut taints = Vec::new();
        // The pod may have come together with the label that it was scheduled by.
        if let Ok(rows) = self.context.store.list(Collection::Node).await
            && let Some(own) = rows.first().and_then(parse::<Node>)
        {
            node.labels = own.metadata.labels.unwrap_or(node.labels);
            taints = own.spec.and_then(|spec| spec.taints).unwrap_or_default();
        }
        let others: Vec<Arc<Pod>> = self
            .workers
            .values()
            .filter(|worker| !worker.over.load(Ordering::Relaxed))
            .map(|worker| worker.desired.borrow())
            .filter(|desired| desired.admission == Admission::Admitted && desired.life == Life::Wanted)
            .map(|desired| desired.pod.clone())
            .collect();
        let others: Vec<&Pod> = others.iter().map(AsRef::as_ref).collect();
        match admission::admit(pod, &others, &node, &taints) {
            Ok(()) => Admission::Admitted,
            Err(rejection) => Admission::Rejected { reason: rejection.reason, message: rejection.message },
        }
    }

    async fn woken(&mut self, uid: &str) {
        match self.workers.get(uid) {
            Some(worker) => worker.desired.send_modify(|desired| desired.look += 1),
            None => match self.context.cri.observe(Some(uid)).await {
                Ok(observed) => self.adopt_orphans(observed).await,
                Err(error) => warn!(pod = uid, %error, "the runtime cannot be asked"),
            },
        }
    }

    fn wake_all(&self) {
        for worker in self.workers.values() {
            worker.desired.send_modify(|desired| desired.look += 1);
        }
    }

    async fn look_at_all(&mut self) {
        self.wake_all();
        match self.context.cri.observe(None).await {
            Ok(observed) => self.adopt_orphans(observed).await,
            Err(error) => warn!(%error, "the runtime cannot be asked"),
        }
    }

    /// Winds down what the runtime holds of pods that nobody wants. The store is asked about each: it may know of a pod that has not
    /// come by here yet.
    async fn adopt_orphans(&mut self, observed: BTreeMap<String, Observed>) {
        for (uid, observed) in observed {
            if self.workers.contains_key(&uid) || self.panics.rests(&uid) {
                continue;
            }
            let unwanted = matches!(self.context.store.row(Collection::Pods, &uid).await, Ok(None));
            if !unwanted || !*self.context.store.pods_known().borrow() {
                continue;
            }
            // Its name is in its events. A container without a sandbox has none.
            let (name, namespace) = observed.sandboxes.first().map(|sandbox| sandbox.pod.clone()).unzip();
            info!(uid, name, namespace, "nobody wants this pod any more; it is stopped");
            let metadata = ObjectMeta { uid: Some(uid), name, namespace, ..ObjectMeta::default() };
            let pod = Pod { metadata, ..Pod::default() };
            self.spawn(pod, Life::Orphan, Admission::Admitted, Memory::default(), Some(observed), false);
        }
    }

    /// Nothing is left of a pod, or its worker panicked. If the store wants it, it is taken up anew, after a panic not at once.
    async fn over(&mut self, ended: Result<(Id, ()), JoinError>) {
        let (id, panicked) = match &ended {
            Ok((id, ())) => (*id, false),
            Err(error) => (error.id(), true),
        };
        let Some(uid) = self.tasks.remove(&id) else { return };
        self.workers.remove(&uid);
        self.moved = true;
        self.context.forget_events(&uid);
        if panicked {
            if let Some(held) = &mut self.held {
                held.insert(uid.clone());
            }
            let wait = self.panics.add(&uid, clock::monotonic(), rand::random());
            error!(pod = uid, ?wait, "the worker of a pod panicked; the pod is taken up anew");
            return;
        }
        self.panics.forget(&uid);
        if let Err(error) = self.context.store.forget(STATUS_NOTE, &uid).await {
            warn!(pod = uid, %error, "the last status of a pod that is gone cannot be dropped");
        }
        match self.context.store.row(Collection::Pods, &uid).await {
            Ok(Some(row)) => {
                if let Some(pod) = parse(&row) {
                    self.upsert(pod).await;
                }
            }
            Ok(None) => {}
            Err(error) => self.doubt(&error),
        }
    }

    /// Takes up pods that rested after a panic, with what is known of them.
    async fn take_up_anew(&mut self) {
        while let Some(uid) = self.panics.take_due(clock::monotonic()) {
            match self.context.store.row(Collection::Pods, &uid).await {
                Ok(Some(row)) => {
                    let Some(pod) = parse(&row) else { continue };
                    let note = self.notes().await.remove(&uid);
                    self.start(pod, Memory::restored(note), None, true).await;
                    if self.reset.is_some() {
                        self.remove(&uid);
                    }
                }
                Ok(None) => self.woken(&uid).await,
                Err(error) => self.doubt(&error),
            }
        }
    }

    fn report_again(&self, which: impl Fn(&String) -> bool) {
        for (_, worker) in self.workers.iter().filter(|(uid, _)| which(uid)) {
            worker.desired.send_modify(|desired| desired.resend += 1);
        }
    }
}

/// Sets the cgroups above the pods' beside the routing: no pod waits for them.
async fn keep_tiers(context: Arc<Context>, mut wanted: watch::Receiver<Option<[PodCgroup; 3]>>) {
    while wanted.changed().await.is_ok() {
        let Some(tiers) = wanted.borrow_and_update().clone() else { continue };
        let context = context.clone();
        for warning in blocking(move || context.cgroups.set_tiers(&tiers)).await {
            info!(warning = warning.0, "the cgroups of all pods lack something");
        }
    }
}

async fn rest(until: Option<Duration>) {
    tokio::time::sleep(until.unwrap_or_default().saturating_sub(clock::monotonic())).await;
}

#[cfg(test)]
pub(crate) mod tests;
