//! One edge side, from its first dialling to the end of the process.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use rand::RngExt as _;
use skerry_proto::delta;
use skerry_proto::sync::{Collection, Edge, EdgeInput, EdgeOutput, Op, Report, ReportKind};
use skerry_proto::transport::Event;
use skerry_proto::wire::Goodbye;
use tokio::sync::watch;

use super::dial::Dialler;
use super::{PODS, SHARED, objects};

/// As edgecore's: an attempt and the upgrade may each take this long.
const PATIENCE: Duration = Duration::from_secs(10);
/// As edgecore's: how long the last words may take.
const FAREWELL: Duration = Duration::from_secs(1);
/// As edgecore's, too, and from how long on a session counts as one that stood.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const STOOD: Duration = Duration::from_secs(30);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// What others may know of a node.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Since when the session stands, in milliseconds since all began; 0 if none does.
    pub(super) established: AtomicU64,
    pub(super) in_sync: AtomicBool,
    /// Whether cloudcore took a report in the session that stands.
    pub(super) reported: AtomicBool,
    /// The version of the shared ConfigMap it holds.
    pub(super) shared: AtomicU64,
    pub(super) applied: AtomicU64,
}

/// One node.
pub(super) struct Node {
    pub(super) index: usize,
    pub(super) cloud: SocketAddr,
    pub(super) dialler: Dialler,
    pub(super) seen: Arc<Seen>,
    /// Changes when every connection is to be reset.
    pub(super) generation: watch::Receiver<u64>,
    pub(super) begun: Instant,
    pub(super) troubles: Arc<super::fleet::Troubles>,
}

/// What lies in the store: by UID, the key and the decoded JSON.
type Rows = HashMap<String, (Collection, String, Bytes)>;

struct Machine {
    edge: Edge,
    rows: Rows,
    next_report: u64,
    /// Whether the digest of the pods agreed in this session.
    agreed: bool,
    uid: String,
}

impl Node {
    /// Dials, and dials again, for ever.
    pub(super) async fn run(mut self) {
        let name = objects::name(self.index);
        let edge = Edge::new(&name, "00000000-0000-0000-0000-000000000000", "swarm", "swarm", 0, []);
        let mut machine = Machine { edge, rows: Rows::new(), next_report: 1, agreed: false, uid: String::new() };
        let mut failures: u32 = 0;
        loop {
            let ended = self.attempt(&mut machine).await;
            let established = Duration::from_millis(self.seen.established.load(Ordering::Relaxed));
            if !established.is_zero() && self.begun.elapsed().saturating_sub(established) >= STOOD {
                failures = 0;
            }
            self.seen.established.store(0, Ordering::Relaxed);
            self.seen.in_sync.store(false, Ordering::Relaxed);
            self.seen.reported.store(false, Ordering::Relaxed);
            machine.agreed = false;
            machine.edge.step(self.begun.elapsed(), EdgeInput::Disconnected);
            let told = match ended {
                Ok(told) => told,
                Err(error) => {
                    self.troubles.note(&format!("{error:#}"));
                    None
                }
            };
            let ceiling = (FIRST_RETRY * (1 << failures.min(20))).min(LAST_RETRY);
            failures += 1;
            let own = ceiling.mul_f64(rand::rng().random_range(0.5..=1.0));
            tokio::time::sleep(told.unwrap_or(own)).await;
        }
    }

    /// One session. When cloudcore ended it: after how long it wants to be dialled again.
    async fn attempt(&mut self, machine: &mut Machine) -> Result<Option<Duration>> {
        self.generation.borrow_and_update();
        // What it takes to connect is gone before the session begins, which lives long.
        let connecting = Box::pin(tokio::time::timeout(PATIENCE, self.dialler.connect(self.cloud)));
        let mut wire = connecting.await.context("the connection took too long")??;
        let mut goodbye = None;
        let mut inputs = VecDeque::from([EdgeInput::Connected]);
        loop {
            while let Some(input) = inputs.pop_front() {
                let outputs = machine.edge.step(self.begun.elapsed(), input);
                for output in outputs {
                    match output {
                        EdgeOutput::Send(frame) => wire.push(frame),
                        EdgeOutput::Established { .. } => {
                            let since = u64::try_from(self.begun.elapsed().as_millis())?;
                            self.seen.established.store(since.max(1), Ordering::Relaxed);
                            inputs.push_back(EdgeInput::Report(machine.node_report(self.index)));
                        }
                        EdgeOutput::Apply { ops, ticket } => {
                            // What is durable is acknowledged before anything is reported.
                            inputs.push_back(EdgeInput::Committed { ticket });
                            self.apply(machine, ops, &mut inputs);
                        }
                        EdgeOutput::Reported { refused, .. } if refused.is_empty() => {
                            self.seen.reported.store(true, Ordering::Relaxed);
                        }
                        EdgeOutput::Reported { refused, .. } => self.troubles.note(&format!("refused: {refused}")),
                        EdgeOutput::ReportWanted { kind, uid } => inputs.extend(machine.again(kind, &uid, self.index)),
                        EdgeOutput::InSync(Collection::Pods) => machine.agreed = true,
                        EdgeOutput::InSync(_) => {}
                        EdgeOutput::Dismissed(said) => goodbye = Some(said),
                        EdgeOutput::Close(said) => {
                            if let Some(said) = said {
                                let message = said.message.clone();
                                wire.finish(&message, Some(said), FAREWELL).await;
                                bail!("the edge closed: {message}");
                            }
                            return match goodbye {
                                Some(said) => Ok(self.dismissed(&said)),
                                None => bail!("cloudcore went silent"),
                            };
                        }
                    }
                }
            }
            let whole =
                machine.agreed && machine.holds(Collection::Pods) == PODS && machine.holds(Collection::Secrets) == 1;
            self.seen.in_sync.store(whole && machine.holds(Collection::ConfigMaps) == 2, Ordering::Relaxed);
            let due = machine.edge.next_timeout().map_or(LAST_RETRY, |due| due.saturating_sub(self.begun.elapsed()));
            tokio::select! {
                event = wire.next(true) => match event? {
                    Event::Frame(frame) => inputs.push_back(EdgeInput::Frame(frame)),
                    // It serves no streams: one that was opened is over when it is let go.
                    Event::Opened(_) | Event::Heard => inputs.push_back(EdgeInput::Heard),
                    Event::Drained => {}
                },
                () = tokio::time::sleep(due) => inputs.push_back(EdgeInput::Timeout),
                _ = self.generation.changed() => return Ok(None),
            }
        }
    }

    fn dismissed(&self, said: &Goodbye) -> Option<Duration> {
        self.troubles.note(&format!("goodbye: {}", said.message));
        (said.retry_after_ms > 0).then(|| Duration::from_millis(said.retry_after_ms.into()))
    }

    fn apply(&self, machine: &mut Machine, ops: Vec<Op>, inputs: &mut VecDeque<EdgeInput>) {
        self.seen.applied.fetch_add(ops.len() as u64, Ordering::Relaxed);
        for op in ops {
            let (collection, entry, payload) = match op {
                Op::Upsert(object) => (object.collection, object.entry, object.payload),
                Op::Patch(collection, entry, delta) => {
                    let base = machine.rows.get(&entry.uid).map(|(.., payload)| payload.as_ref());
                    match delta::apply(base.unwrap_or_default(), &delta.payload) {
                        Ok(json) => (collection, entry, json.into()),
                        Err(error) => {
                            self.troubles.note(&error.to_string());
                            continue;
                        }
                    }
                }
                Op::Delete(_, uid) => {
                    machine.rows.remove(&uid);
                    continue;
                }
            };
            if collection == Collection::ConfigMaps && entry.key.ends_with(SHARED) {
                self.seen.shared.store(entry.version, Ordering::Relaxed);
            }
            if collection == Collection::Node {
                machine.uid.clone_from(&entry.uid);
            }
            let new = machine.rows.insert(entry.uid.clone(), (collection, entry.key, payload)).is_none();
            if new && collection == Collection::Pods {
                inputs.extend(machine.pod_report(&entry.uid).map(EdgeInput::Report));
            }
        }
    }
}

impl Machine {
    fn holds(&self, collection: Collection) -> usize {
        self.rows.values().filter(|(of, ..)| *of == collection).count()
    }

    fn again(&mut self, kind: ReportKind, uid: &str, index: usize) -> Option<EdgeInput> {
        let report = match kind {
            ReportKind::PodStatus => self.pod_report(uid),
            ReportKind::NodeStatus => Some(self.node_report(index)),
            ReportKind::DeviceStatus | ReportKind::Event | ReportKind::Unspecified => None,
        };
        report.map(EdgeInput::Report)
    }

    fn pod_report(&mut self, uid: &str) -> Option<Report> {
        let (_, key, _) = self.rows.get(uid)?;
        let (namespace, name) = key.split_once('/')?;
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        let payload = serde_json::to_vec(&objects::pod_report(uid, "2026-01-01T00:00:00Z")).unwrap_or_default();
        Some(self.report(ReportKind::PodStatus, namespace, name, uid, payload))
    }

    fn node_report(&mut self, index: usize) -> Report {
        let now = time::OffsetDateTime::now_utc();
        let (date, clock) = (now.date(), now.time());
        let (hour, minute, second) = clock.as_hms();
        let now = format!("{date}T{hour:02}:{minute:02}:{second:02}Z");
        let payload = serde_json::to_vec(&objects::node_report(index, &now)).unwrap_or_default();
        let uid = self.uid.clone();
        self.report(ReportKind::NodeStatus, String::new(), objects::name(index), &uid, payload)
    }

    fn report(&mut self, kind: ReportKind, namespace: String, name: String, uid: &str, payload: Vec<u8>) -> Report {
        let id = self.next_report;
        self.next_report += 1;
        Report { id, kind, namespace, name, uid: uid.to_owned(), payload: payload.into() }
    }
}
