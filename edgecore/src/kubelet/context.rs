//! What all pods of the kubelet share: handles, the node's facts, the recorder of events.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use k8s_openapi::api::core::v1::{ObjectReference, Pod, PodStatus};
use skerry_proto::payload::PodReport;
use skerry_proto::sync::{Report, ReportKind};
use tokio::sync::{Semaphore, mpsc, watch};
use tracing::{debug, warn};

use super::cgroup::Cgroups;
use super::events::Recorder;
use super::images::Images;
use super::logs;
use super::references::{NodeFacts, PodEvent};
use super::resources::Machine;
use super::volumes::Volumes;
use crate::clock;
use crate::runtime::Cri;
use crate::stats::{Counts, Ends};
use crate::store::{self, Store};

/// Kind of the store's notes that hold the last status of each pod, by UID.
pub use crate::control::POD_STATUS_NOTES as STATUS_NOTE;

/// Handles that all pods use.
#[derive(Debug)]
pub struct Parts {
    /// What is wanted, and where reports go.
    pub store: Store,
    /// The runtime.
    pub cri: Cri,
    /// Volumes below the pods' root.
    pub volumes: Volumes,
    /// Pods' cgroups.
    pub cgroups: Cgroups,
    /// Images, pulled one at a time.
    pub images: Images,
    /// The node as pods see it.
    pub facts: watch::Receiver<Arc<NodeFacts>>,
    /// What the hardware and kernel give.
    pub machine: Machine,
    /// Why pods cannot have a network now; `None` if they can.
    pub network: watch::Receiver<Option<String>>,
    /// Sandboxes that are made at the same time. When a box boots, its first pods should run before its last ones get a network.
    pub sandbox_turns: Semaphore,
}

/// The loop that looks after pods comes round this often, whatever happens.
pub const ROUND: Duration = Duration::from_secs(60);
/// Events on their way to the store; beyond it new ones are dropped.
const EVENTS: usize = 256;

/// Shared by the workers of all pods.
#[derive(Debug)]
pub struct Context {
    parts: Parts,
    recorder: Mutex<Recorder>,
    events: mpsc::Sender<Report>,
    probe_counts: Counts,
    ends: Ends,
    /// Milliseconds, monotonic.
    round_at: AtomicU64,
}

impl std::ops::Deref for Context {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

impl Context {
    /// Puts the parts together. Events come out of the receiver, for [`keep_events`].
    pub fn new(parts: Parts, node: &str) -> (Self, mpsc::Receiver<Report>) {
        let (events, receiver) = mpsc::channel(EVENTS);
        let recorder = Mutex::new(Recorder::new(node));
        let context = Self {
            parts,
            recorder,
            events,
            probe_counts: Counts::default(),
            ends: Ends::default(),
            round_at: AtomicU64::new(0),
        };
        context.came_round();
        (context, receiver)
    }

    /// The loop that looks after pods begins a round; it does at least every [`ROUND`].
    pub fn came_round(&self) {
        let now = u64::try_from(clock::monotonic().as_millis()).unwrap_or(u64::MAX);
        self.round_at.store(now, Ordering::Relaxed);
    }

    /// How long ago that was.
    pub fn since_round(&self) -> Duration {
        clock::monotonic().saturating_sub(Duration::from_millis(self.round_at.load(Ordering::Relaxed)))
    }

    /// The node's facts of this moment.
    pub fn node(&self) -> Arc<NodeFacts> {
        self.facts.borrow().clone()
    }

    /// How the probes of pods went.
    pub fn probe_counts(&self) -> &Counts {
        &self.probe_counts
    }

    /// How containers ended.
    pub fn ends(&self) -> &Ends {
        &self.ends
    }

    /// Records an event about an object. No work waits for it.
    pub fn record(&self, about: &ObjectReference, event: &PodEvent) {
        let report = {
            let mut recorder = self.recorder.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            recorder.record(about, event, clock::wall())
        };
        if let Some(report) = report
            && self.events.try_send(report).is_err()
        {
            debug!(reason = event.reason, "an event was dropped: the disk does not keep up");
        }
    }

    /// A pod is gone: its counts go too.
    pub fn forget_events(&self, uid: &str) {
        self.recorder.lock().unwrap_or_else(std::sync::PoisonError::into_inner).forget(uid);
    }

    /// Removes what stays of a pod until its object is gone: its directory, its logs, its cgroup if it is still there.
    pub async fn remove_rest(self: &Arc<Self>, uid: &str) {
        let (context, node, uid) = (self.clone(), self.node(), uid.to_owned());
        blocking(move || {
            if let Err(error) = context.volumes.tear_down(&uid) {
                warn!(pod = uid, %error, "the directory of a pod that is gone cannot be removed");
            }
            if let Some(path) = context.cgroups.pods().get(&uid)
                && let Err(error) = context.cgroups.destroy(path)
            {
                warn!(pod = uid, %error, "the cgroup of a pod that is gone cannot be removed");
            }
            let logs = logs::pod_dirs(&node.logs_root).unwrap_or_default();
            for (_, directory) in logs.into_iter().filter(|(of, _)| *of == uid) {
                if let Err(error) = logs::remove_pod(&directory) {
                    warn!(pod = uid, %error, "the logs of a pod that is gone cannot be removed");
                }
            }
        })
        .await;
    }

    /// Reports a pod's status and keeps it over restarts.
    pub async fn publish(&self, pod: &Pod, status: &PodStatus, finished: bool) -> Result<(), store::Error> {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let value = serde_json::to_value(status).unwrap_or_default();
        let note: Bytes = value.to_string().into();
        let report = Report {
            id: 0,
            kind: ReportKind::PodStatus,
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid: uid.clone(),
            payload: serde_json::to_vec(&PodReport { status: value, finished }).unwrap_or_default().into(),
        };
        // The report first: a note alone would say after a crash that all was said.
        let (reported, noted) = tokio::join!(self.store.report(report), self.store.remember(STATUS_NOTE, &uid, note));
        reported.and(noted)
    }
}

/// Writes events to the store as they come.
pub async fn keep_events(store: Store, mut events: mpsc::Receiver<Report>) {
    while let Some(event) = events.recv().await {
        if let Err(error) = store.report(event).await {
            warn!(%error, "an event could not be kept");
        }
    }
}

/// Runs what blocks (files, mounts) on the small blocking pool.
#[expect(clippy::disallowed_methods, reason = "this is the place that the ban points to")]
pub async fn blocking<T, F>(work: F) -> T
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(ended) => std::panic::resume_unwind(ended.into_panic()),
    }
}

/// How events name a pod.
pub fn reference(pod: &Pod) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: pod.metadata.name.clone(),
        namespace: pod.metadata.namespace.clone(),
        uid: pod.metadata.uid.clone(),
        ..ObjectReference::default()
    }
}
