//! The probes of one pod: one task that runs what is due and says what the results add up to.
//!
//! It goes on while the pod's worker waits for something else, a slow stop for example: a pod that ends must still be seen to become
//! unready.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::context::{Context, reference};
use super::execute::field_path;
use super::memory::{ProbeResult, Probes};
use super::observed::{Observed, State};
use super::probe::{Attempt, Kind, Outcome, ProbeSpec, Step, Subject, Worker};
use super::prober::{self, Target};
use super::references::PodEvent;
use super::spec::{self, Spec};
use crate::{clock, order, supervise};

/// What the worker tells the probes of its pod.
#[derive(Clone, Debug, Default)]
struct View {
    pod: Arc<Pod>,
    instances: Vec<Seen>,
    deleting: bool,
    pod_ip: Option<IpAddr>,
}

#[derive(Clone, Debug, PartialEq)]
struct Seen {
    name: String,
    id: String,
    running: bool,
    started_at: Option<Timestamp>,
}

/// Results by instance id.
pub type Results = BTreeMap<String, Probes>;

/// The probes of a pod. Dropping it ends them.
#[derive(Debug)]
pub struct PodProbes {
    view: watch::Sender<View>,
    results: watch::Receiver<Results>,
    task: JoinHandle<()>,
}

impl Drop for PodProbes {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl PodProbes {
    /// Starts probing, if the pod has any probe. `adopted`: what was known of instances that an earlier process started. `spread`: this
    /// process has just started, so that first runs are spread over a period.
    pub fn start(context: Arc<Context>, pod: &Arc<Pod>, adopted: Results, spread: bool) -> Option<Self> {
        let views = Spec::new(pod).all();
        let any = views.iter().any(|view| {
            view.liveness_probe().is_some() || view.readiness_probe().is_some() || view.startup_probe().is_some()
        });
        if !any {
            return None;
        }
        let (view, views) = watch::channel(View { pod: pod.clone(), ..View::default() });
        let (sender, results) = watch::channel(adopted.clone());
        let task = supervise::spawn("pod-probes", run(context, views, sender, adopted, spread));
        Some(Self { view, results, task })
    }

    /// Tells what runs now.
    pub fn see(&self, pod: &Arc<Pod>, observed: &Observed, deleting: bool, pod_ip: Option<IpAddr>) {
        let mut instances: Vec<Seen> = Vec::new();
        for instance in &observed.containers {
            if instances.iter().all(|newer| newer.name != instance.name) {
                instances.push(Seen {
                    name: instance.name.clone(),
                    id: instance.id.clone(),
                    running: instance.state == State::Running,
                    started_at: instance.started_at,
                });
            }
        }
        self.view.send_if_modified(|view| {
            let same = Arc::ptr_eq(&view.pod, pod)
                && view.instances == instances
                && view.deleting == deleting
                && view.pod_ip == pod_ip;
            if !same {
                *view = View { pod: pod.clone(), instances, deleting, pod_ip };
            }
            !same
        });
    }

    /// The results so far.
    pub fn results(&self) -> Results {
        self.results.borrow().clone()
    }

    /// Waits for a change of the results. Cancel safe.
    pub async fn changed(&mut self) {
        if self.results.changed().await.is_err() {
            // The task ended; there is nothing to wait for.
            std::future::pending::<()>().await;
        }
    }
}

type Key = (String, Kind);

async fn run(
    context: Arc<Context>,
    mut views: watch::Receiver<View>,
    results: watch::Sender<Results>,
    adopted: Results,
    spread: bool,
) {
    let mut workers: BTreeMap<Key, Worker> = BTreeMap::new();
    let mut running: JoinSet<(Key, String, Attempt)> = JoinSet::new();
    let mut busy: Vec<Key> = Vec::new();
    let counts = context.probe_counts().of(&views.borrow().pod);
    loop {
        let view = views.borrow_and_update().clone();
        fill(&mut workers, &view, &adopted, spread);
        let (now, wall) = (clock::monotonic(), clock::wall());
        let mut wake: Option<Duration> = None;
        let started: BTreeMap<String, bool> = order::map(view.instances.iter().map(|seen| {
            let startup = workers.get(&(seen.name.clone(), Kind::Startup));
            (seen.name.clone(), startup.is_none_or(|worker| worker.outcome(&seen.id) == Outcome::Success))
        }));
        for (key, worker) in &mut workers {
            if busy.contains(key) {
                continue;
            }
            let seen = view.instances.iter().find(|seen| seen.name == key.0);
            let subject = Subject {
                container_id: seen.map(|seen| seen.id.as_str()),
                running: seen.is_some_and(|seen| seen.running),
                // The worker of the pod ends this task with the pod; until then a container may come back.
                over: false,
                started_at: seen.and_then(|seen| seen.started_at),
                started: started.get(&key.0).copied().unwrap_or(false),
                deleting: view.deleting,
            };
            match (worker.step(now, wall, &subject), seen) {
                (Step::Run, Some(seen)) => {
                    busy.push(key.clone());
                    let (key, id) = (key.clone(), seen.id.clone());
                    let attempt = attempt(context.clone(), view.clone(), key.clone(), id.clone());
                    running.spawn(async move {
                        let attempt = AssertUnwindSafe(attempt).catch_unwind().await;
                        (key, id, attempt.unwrap_or_else(|_| Attempt::Error("the probe panicked".to_owned())))
                    });
                }
                (Step::Wait(at), _) => wake = Some(wake.map_or(at, |wake| wake.min(at))),
                (Step::Run | Step::Idle | Step::Stop, _) => {}
            }
        }
        publish(&results, &workers, &view);

        let sleep = wake.map(|wake| tokio::time::sleep(wake.saturating_sub(clock::monotonic())));
        tokio::select! {
            changed = views.changed() => if changed.is_err() { return },
            Some(Ok((key, id, attempt))) = running.join_next(), if !running.is_empty() => {
                busy.retain(|other| *other != key);
                counts.add(&key, &attempt);
                if let Some(worker) = workers.get_mut(&key) {
                    let done = worker.done(clock::monotonic(), &id, &attempt);
                    publish(&results, &workers, &view);
                    if let Some((reason, message)) = done.event {
                        let kind = Spec::new(&view.pod).find(&key.0).map_or(spec::Kind::App, |found| found.kind);
                        let field_path = Some(field_path(kind, &key.0));
                        let event = PodEvent { warning: true, reason, message, field_path };
                        context.record(&reference(&view.pod), &event);
                    }
                }
            }
            () = async { match sleep { Some(sleep) => sleep.await, None => std::future::pending().await } } => {}
        }
    }
}

/// One worker for each probe of the spec.
fn fill(workers: &mut BTreeMap<Key, Worker>, view: &View, adopted: &Results, spread: bool) {
    for container in Spec::new(&view.pod).all() {
        let Some(spec) = container.container.filter(|_| container.kind != spec::Kind::Init) else { continue };
        for kind in [Kind::Startup, Kind::Liveness, Kind::Readiness] {
            let Some(probe) = kind.of(spec) else { continue };
            let key = (container.name.to_owned(), kind);
            if workers.contains_key(&key) {
                continue;
            }
            let numbers = ProbeSpec::from(probe);
            let delay = if spread { numbers.period.mul_f64(rand::random::<f64>()) } else { Duration::ZERO };
            let mut worker = Worker::new(kind, numbers, clock::monotonic() + delay);
            let seen = view.instances.iter().find(|seen| seen.name == container.name);
            if let Some(seen) = seen
                && let Some(known) = adopted.get(&seen.id).and_then(|known| result_of(known, kind))
            {
                worker.adopt(&seen.id, known);
            }
            workers.insert(key, worker);
        }
    }
}

fn result_of(known: &Probes, kind: Kind) -> Option<Outcome> {
    let result = match kind {
        Kind::Startup => known.startup,
        Kind::Liveness => known.liveness,
        Kind::Readiness => known.readiness,
    }?;
    Some(match result {
        ProbeResult::Unknown => Outcome::Unknown,
        ProbeResult::Success => Outcome::Success,
        ProbeResult::Failure => Outcome::Failure,
    })
}

fn publish(results: &watch::Sender<Results>, workers: &BTreeMap<Key, Worker>, view: &View) {
    let mut new = Results::new();
    for seen in &view.instances {
        let result = |kind| {
            let worker = workers.get(&(seen.name.clone(), kind))?;
            Some(match worker.outcome(&seen.id) {
                Outcome::Unknown => ProbeResult::Unknown,
                Outcome::Success => ProbeResult::Success,
                Outcome::Failure => ProbeResult::Failure,
            })
        };
        let probes = Probes {
            liveness: result(Kind::Liveness),
            readiness: result(Kind::Readiness),
            startup: result(Kind::Startup),
        };
        new.insert(seen.id.clone(), probes);
    }
    results.send_if_modified(|old| {
        let changed = *old != new;
        if changed {
            *old = new;
        }
        changed
    });
}

async fn attempt(context: Arc<Context>, view: View, key: Key, id: String) -> Attempt {
    let Some(container) = Spec::new(&view.pod).find(&key.0).and_then(|found| found.container) else {
        return Attempt::Error("the container is gone from the spec".to_owned());
    };
    let Some(probe) = key.1.of(container) else {
        return Attempt::Error("the probe is gone from the spec".to_owned());
    };
    let target = Target { container_id: &id, container, pod_ip: view.pod_ip };
    prober::run(&context.cri, &target, probe).await
}
