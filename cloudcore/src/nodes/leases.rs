//! Leases: renewed for a node exactly as long as its newest session lives here.
//!
//! What that is good for: the node lifecycle controller takes a node for away whose lease it has not seen renewed for 40 s. Of two renewals
//! the second begins 24 s after the first at the latest; it may fail, or be given up after [`PATIENCE`], so may the one that follows at once,
//! and the one after that, [`AGAIN`] later, be answered as late: that is [`WORST`], so two renewals lost in a row show nowhere. From the third
//! on an apiserver that answers none is not asked more and more often. All this holds as long as the apiserver takes what is due:
//! [`AT_ONCE`] at a time, so at 100 ms each some 13,000 nodes' leases.
//!
//! A lease in which nothing is that others wrote is replaced as a whole, and nobody keeps count of whose its fields are
//! (`metadata.managedFields`): that costs the apiserver less than half of what a patch does, and leases are most of what it is asked.
//!
//! [`Wheel`] decides who is due; [`Leases::run`] carries it out. A session only ends the renewals of its own epoch. When the lease shows a
//! session of a higher epoch, at another replica, it stops renewing and is over: either that one has taken over, or it ended before the edge
//! or the Node knew of it, at a replica whose clock is ahead, and then the edge's next session here gets an epoch that is higher yet. If the
//! lease shows a lower epoch, whose last renewal came late, or none, the next renewal says again whose it is.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use jiff::Timestamp;
use kube::api::{DynamicObject, Patch};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tracing::{debug, warn};

use crate::apiserver::{Apiserver, Kind, Verdict, verdict};
use crate::backend::{BackendError, NodeIdentity};
use crate::backend_k8s::Shared;
use crate::clock;
use crate::nodes::{Claim, EPOCH_ANNOTATION, epoch_of};
use crate::retry::chain;

/// Where node leases live.
pub(crate) const NAMESPACE: &str = "kube-node-lease";
/// How long a lease is good without renewal.
pub(crate) const DURATION_SECONDS: i64 = 40;
/// How often it is renewed at least and at most: more seldom the more nodes there are.
const RENEW: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(24)];
/// Renewals a second, of all nodes, that [`RENEW`] is stretched for.
const RATE: u32 = 100;
/// What one renewal may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(4);
/// At most so long after the second failure in a row. After the first it is tried again at once.
const AGAIN: Duration = Duration::from_secs(2);
/// After the third failure in a row, and each one more, stretched as [`RENEW`] is.
const RETRY: Duration = Duration::from_secs(2);
/// The longest between two renewals of which two in between were lost.
const WORST: Duration = RENEW[1].saturating_add(PATIENCE.saturating_mul(3)).saturating_add(AGAIN);
const _: () = assert!(WORST.as_secs() < DURATION_SECONDS.unsigned_abs());
/// A renewal that is so late has the apiserver to itself: reports wait.
const LATE: Duration = Duration::from_secs(3);
/// Requests under way at once.
const AT_ONCE: usize = 64;

/// One renewal to carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Renewal {
    node: NodeIdentity,
    epoch: u64,
    /// It also says whose the lease is: the first of its session does, and one after an answer that named another or nobody.
    whole: bool,
    /// The lease's resourceVersion, if nothing is in it that others wrote.
    version: Option<Box<str>>,
}

/// How a renewal ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Renewed {
    /// The lease names no session.
    Yes,
    Failed,
    /// A session of this epoch has the lease.
    Epoch(u64),
}

/// Who is due when.
#[derive(Debug, Default)]
struct Wheel {
    nodes: HashMap<String, Spoke>,
    due: BTreeSet<(Duration, String)>,
    /// Whose last renewal was lost, or the last two: those that are due go first.
    lost: BTreeSet<(Duration, String)>,
}

#[derive(Debug)]
struct Spoke {
    uid: String,
    epoch: u64,
    due: Duration,
    /// The lease said last that it is this session's.
    written: bool,
    /// See [`Renewal::version`].
    version: Option<Box<str>>,
    /// Renewals in a row that failed.
    failures: u32,
}

impl Wheel {
    fn begin(&mut self, node: &NodeIdentity, epoch: u64, now: Duration) {
        if self.nodes.get(&node.name).is_some_and(|spoke| spoke.epoch > epoch) {
            return;
        }
        self.remove(&node.name);
        self.due.insert((now, node.name.clone()));
        let spoke = Spoke { uid: node.uid.clone(), epoch, due: now, written: false, version: None, failures: 0 };
        self.nodes.insert(node.name.clone(), spoke);
    }

    fn end(&mut self, name: &str, epoch: u64) {
        if self.nodes.get(name).is_some_and(|spoke| spoke.epoch == epoch) {
            self.remove(name);
        }
    }

    /// Takes the next one that is due; it is due again when [`Wheel::renewed`] says so.
    fn take(&mut self, now: Duration) -> Option<Renewal> {
        let is_due = |(due, _): &&(Duration, String)| *due <= now;
        let from = if self.lost.first().filter(is_due).is_some() { &mut self.lost } else { &mut self.due };
        from.first().filter(is_due)?;
        let (_, name) = from.pop_first()?;
        let spoke = self.nodes.get_mut(&name)?;
        let node = NodeIdentity { name, uid: spoke.uid.clone() };
        Some(Renewal { node, epoch: spoke.epoch, whole: !spoke.written, version: spoke.version.take() })
    }

    /// `spread` in 0..1 keeps renewals apart. The renewal has the version that it made. Answers the epoch of the session that has taken this
    /// one's place.
    fn renewed(&mut self, renewal: &Renewal, how: Renewed, now: Duration, spread: f64) -> Option<u64> {
        let period = self.period();
        let spoke = self.nodes.get_mut(&renewal.node.name).filter(|spoke| spoke.epoch == renewal.epoch)?;
        spoke.version.clone_from(&renewal.version);
        let wait = match how {
            Renewed::Epoch(epoch) if epoch > spoke.epoch => {
                self.remove(&renewal.node.name);
                return Some(epoch);
            }
            Renewed::Failed if spoke.failures < 2 => {
                let wait = if spoke.failures == 0 { Duration::ZERO } else { AGAIN.mul_f64(spread.mul_add(0.5, 0.5)) };
                spoke.failures += 1;
                spoke.due = now + wait;
                self.lost.insert((spoke.due, renewal.node.name.clone()));
                return None;
            }
            // Those that begin together do not go on together.
            Renewed::Yes | Renewed::Epoch(_) if renewal.whole => period.mul_f64(spread.mul_add(0.75, 0.25)),
            Renewed::Yes | Renewed::Epoch(_) => period.mul_f64(spread.mul_add(0.2, 0.8)),
            Renewed::Failed => RETRY.mul_f64(period.div_duration_f64(RENEW[0]) * spread.mul_add(0.2, 0.9)),
        };
        if how == Renewed::Failed {
            spoke.failures = spoke.failures.saturating_add(1);
        } else {
            spoke.written = how == Renewed::Epoch(spoke.epoch);
            spoke.failures = 0;
        }
        spoke.due = now + wait;
        self.due.insert((spoke.due, renewal.node.name.clone()));
        None
    }

    /// Whoever renewed is gone: all are due.
    fn abandoned(&mut self, now: Duration) {
        self.due.clear();
        self.lost.clear();
        for (name, spoke) in &mut self.nodes {
            spoke.due = now;
            self.due.insert((now, name.clone()));
        }
    }

    /// How often each lease is renewed, at least.
    fn period(&self) -> Duration {
        let nodes = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        (Duration::from_secs(1) * nodes / RATE).clamp(RENEW[0], RENEW[1])
    }

    fn next(&self) -> Option<Duration> {
        let next = |queue: &BTreeSet<(Duration, String)>| queue.first().map(|(due, _)| *due);
        next(&self.lost).into_iter().chain(next(&self.due)).min()
    }

    fn is_late(&self, now: Duration) -> bool {
        self.next().is_some_and(|due| now >= due + LATE)
    }

    fn remove(&mut self, name: &str) {
        if let Some(spoke) = self.nodes.remove(name) {
            let key = (spoke.due, name.to_owned());
            self.due.remove(&key);
            self.lost.remove(&key);
        }
    }
}

/// The leases of all sessions.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    wheel: Mutex<Wheel>,
    wake: Notify,
}

impl Leases {
    /// A session begins.
    pub(crate) fn begin(&self, node: &NodeIdentity, epoch: u64) {
        self.lock().begin(node, epoch, clock::monotonic());
        self.wake.notify_one();
    }

    /// A session began before anything did, and was never renewed.
    #[cfg(test)]
    pub(crate) fn begin_late(&self, node: &NodeIdentity, epoch: u64) {
        self.lock().begin(node, epoch, Duration::ZERO);
    }

    /// A session ends.
    pub(crate) fn end(&self, node: &NodeIdentity, epoch: u64) {
        self.lock().end(&node.name, epoch);
    }

    /// Waits while renewals are late, for reports do more harm than good then; not for ever, because they count too.
    pub(crate) async fn on_time(&self) {
        for _ in 0..40 {
            if !self.lock().is_late(clock::monotonic()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    /// Renews what is due, for ever.
    pub(crate) async fn run(self: Arc<Self>, api: Apiserver, shared: Arc<Shared>) {
        self.lock().abandoned(clock::monotonic());
        let mut under_way = FuturesUnordered::new();
        loop {
            while under_way.len() < AT_ONCE {
                let Some(mut renewal) = self.lock().take(clock::monotonic()) else { break };
                let api = &api;
                under_way.push(async move {
                    // What is given up may still land: its time is older than that of the next one, and the controller looks at the newest.
                    let how = tokio::time::timeout(PATIENCE, renew(api, &mut renewal, clock::wall())).await;
                    let how = how.unwrap_or_else(|_| {
                        debug!(
                            node = renewal.node.name,
                            "the node's lease was not renewed within {} s",
                            PATIENCE.as_secs()
                        );
                        Renewed::Failed
                    });
                    (renewal, how)
                });
            }
            let next = self.lock().next();
            let wait = next.map_or(Duration::from_secs(3600), |due| due.saturating_sub(clock::monotonic()));
            tokio::select! {
                Some((renewal, how)) = under_way.next(), if !under_way.is_empty() => {
                    let newer = self.lock().renewed(&renewal, how, clock::monotonic(), rand::random());
                    if let Some(newer) = newer {
                        shared.closures().claimed(&renewal.node, renewal.epoch, Claim::Theirs(newer, None));
                    }
                }
                () = self.wake.notified() => {}
                () = tokio::time::sleep(wait), if under_way.len() < AT_ONCE => {}
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Wheel> {
        self.wheel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The epoch that a Node's lease names, if that was renewed within its time.
pub(crate) async fn leased(api: &Apiserver, name: &str) -> Result<Option<u64>, BackendError> {
    let failed = |source| BackendError { action: format!("look up the lease of node {name}"), source };
    let lease = api.get(Kind::Lease, NAMESPACE, name).await.map_err(failed)?;
    Ok(lease.filter(|lease| lasts(lease, clock::wall())).as_ref().and_then(epoch_of))
}

fn lasts(lease: &DynamicObject, now: Timestamp) -> bool {
    let renewed = lease.data["spec"]["renewTime"].as_str().and_then(|time| time.parse::<Timestamp>().ok());
    // One of the future is of a clock that is wrong, and says nothing.
    renewed.is_some_and(|renewed| now.duration_since(renewed).as_secs().abs() < DURATION_SECONDS)
}

async fn renew(api: &Apiserver, renewal: &mut Renewal, now: Timestamp) -> Renewed {
    let name = renewal.node.name.clone();
    if let Some(version) = renewal.version.take() {
        let replaced = api.replace(Kind::Lease, NAMESPACE, &name, replacement(renewal, &version, now)).await;
        if let Ok(lease) = &replaced {
            renewal.version = lease.metadata.resource_version.as_deref().map(Into::into);
        }
        match replaced.as_ref().map_err(verdict) {
            Ok(_) | Err(Verdict::Later(_)) => return renewed(&name, replaced),
            // Somebody wrote it since, or an older manifest lets none be replaced: a patch says what is really wrong, if anything is.
            Err(why) => debug!(node = name, ?why, "the node's lease cannot be replaced, and is patched"),
        }
    }
    let patch = Patch::Merge(if renewal.whole { whole(renewal, now) } else { time(now) });
    let mut answer = api.patch(Kind::Lease, NAMESPACE, &name, &patch).await;
    if let Err(error) = &answer
        && verdict(error) == Verdict::NotFound
    {
        answer = api.create(Kind::Lease, NAMESPACE, whole(renewal, now)).await;
    }
    renewal.version = answer.as_ref().ok().and_then(|lease| replaceable(lease, renewal));
    renewed(&name, answer)
}

fn renewed(node: &str, answer: Result<DynamicObject, kube::Error>) -> Renewed {
    match answer {
        Ok(lease) => epoch_of(&lease).map_or(Renewed::Yes, Renewed::Epoch),
        Err(error) => match verdict(&error) {
            Verdict::Refused(reason) | Verdict::Doubtful(reason) => {
                warn!(node, %reason, "cannot renew the node's lease");
                Renewed::Failed
            }
            // The namespace itself is missing: it is made by the apiserver when it starts.
            Verdict::NotFound => Renewed::Failed,
            Verdict::Conflict | Verdict::Later(_) => {
                debug!(node, "the node's lease is not renewed yet: {}", chain(&error));
                Renewed::Failed
            }
        },
    }
}

fn time(now: Timestamp) -> Value {
    json!({"spec": {"renewTime": format!("{now:.6}")}})
}

/// All that a lease has of ours.
fn whole(renewal: &Renewal, now: Timestamp) -> Value {
    let name = &renewal.node.name;
    json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "annotations": {EPOCH_ANNOTATION: renewal.epoch.to_string()},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": name, "uid": renewal.node.uid}],
        },
        "spec": {"holderIdentity": name, "leaseDurationSeconds": DURATION_SECONDS, "renewTime": format!("{now:.6}")},
    })
}

/// What replaces a lease of this version. One empty entry has the apiserver forget whose its fields are, and not keep count again:
/// <https://kubernetes.io/docs/reference/using-api/server-side-apply/#clearing-managedfields>.
fn replacement(renewal: &Renewal, version: &str, now: Timestamp) -> Value {
    let mut lease = whole(renewal, now);
    lease["metadata"]["resourceVersion"] = version.into();
    lease["metadata"]["managedFields"] = json!([{}]);
    lease
}

/// The version of a lease in which nothing is but what is written here, and what the apiserver adds.
fn replaceable(lease: &DynamicObject, renewal: &Renewal) -> Option<Box<str>> {
    let mut shown = Kind::Lease.json(lease);
    let metadata = shown.get_mut("metadata")?.as_object_mut()?;
    for added in ["uid", "resourceVersion", "creationTimestamp", "managedFields"] {
        metadata.remove(added);
    }
    let now = shown["spec"]["renewTime"].as_str()?.parse().ok()?;
    let version = lease.metadata.resource_version.as_deref()?;
    (shown == whole(renewal, now)).then(|| version.into())
}

#[cfg(test)]
mod tests;
