//! What cloudcore's front counts. The back registers its own in the same registry.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use skerry_proto::mux::Class;
use skerry_proto::streams::Streams;
use skerry_proto::sync::{Backlog, Hub};
use skerry_proto::transport::Meter;

use crate::registry::Sessions;

/// Control, and [`Class::ALL`].
const CLASSES: [&str; 1 + Class::ALL.len()] = ["control", "api", "ops", "device"];
/// Up to these an edge was in sync again, in seconds.
const SYNC_BUCKETS: [f64; 11] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// How something ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    result: &'static str,
}

/// Which way something went, and in which class.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Flow {
    direction: &'static str,
    class: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfClass {
    class: &'static str,
}

/// What an edge is in sync again after.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct After {
    after: &'static str,
}

/// Why something was not passed on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// The counters; cloning shares them.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    sessions: Gauge,
    behind: Gauge,
    starts: Family<Outcome, Counter>,
    ends: Family<Outcome, Counter>,
    syncs: Counter,
    sync_times: SyncTimes,
    waiting: Gauge,
    unacknowledged: Gauge,
    acknowledged: Counter,
    drops: Family<Reason, Counter>,
    joins: Family<Outcome, Counter>,
    renewals: Family<Outcome, Counter>,
    handshake_failures: Counter,
    frames: Flows,
    bytes: Flows,
    ca_expiry: Gauge,
}

/// A counter for each direction and class, at hand without looking for its labels: frames are many.
#[derive(Debug)]
struct Flows {
    family: Family<Flow, Counter>,
    /// In and out; in each control and then [`Class::ALL`].
    lanes: [[Counter; 1 + Class::ALL.len()]; 2],
}

/// How long edges were not in sync.
#[derive(Debug)]
struct SyncTimes(Family<After, Histogram, fn() -> Histogram>);

impl Metrics {
    /// Makes them known to a registry.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let counters = &metrics.0;
        registry.register("skerry_sessions", "Sessions that stand", counters.sessions.clone());
        registry.register("skerry_session_starts", "Sessions begun, by result", counters.starts.clone());
        registry.register("skerry_session_ends", "Sessions that stood and ended, by result", counters.ends.clone());
        registry.register(
            "skerry_session_syncs",
            "Times that a session found its edge in sync",
            counters.syncs.clone(),
        );
        registry.register(
            "skerry_sync_seconds",
            "How long it took until an edge was in sync, from its Hello or from when its session had a change for it",
            counters.sync_times.0.clone(),
        );
        registry.register("skerry_sessions_behind", "Sessions whose edges are not in sync", counters.behind.clone());
        registry.register(
            "skerry_changes_waiting",
            "Changes for edges that wait until what was sent before is acknowledged",
            counters.waiting.clone(),
        );
        registry.register(
            "skerry_changes_unacknowledged_bytes",
            "Bytes of changes that were sent to edges and that they have not acknowledged",
            counters.unacknowledged.clone(),
        );
        registry.register(
            "skerry_changes_acknowledged",
            "Changes that edges have acknowledged, once they were on their disks",
            counters.acknowledged.clone(),
        );
        registry.register(
            "skerry_drops",
            "What sessions did not pass on, by reason: changes for edges that newer ones took the place of, reports and streams of edges \
             that were refused",
            counters.drops.clone(),
        );
        registry.register("skerry_joins", "Joins, by result", counters.joins.clone());
        registry.register("skerry_renewals", "Renewals of node certificates, by result", counters.renewals.clone());
        registry.register(
            "skerry_handshake_failures",
            "TLS handshakes that failed",
            counters.handshake_failures.clone(),
        );
        registry.register("skerry_frames", "Frames of sessions, by class", counters.frames.family.clone());
        registry.register("skerry_bytes", "Bytes of frames of sessions, by class", counters.bytes.family.clone());
        registry.register("skerry_ca_expiry_timestamp_seconds", "When the CA expires", counters.ca_expiry.clone());
        registry.register_collector(Box::new(Process));
        metrics
    }

    /// A session stands, until what this answers is dropped; the edge's Hello came at this time.
    pub fn session(&self, hello: Duration) -> Standing {
        self.0.sessions.inc();
        self.0.behind.inc();
        Standing { metrics: self.clone(), backlog: Backlog::default(), behind: Some(hello), was_in_sync: false }
    }

    /// A session was begun or refused.
    pub fn session_start(&self, result: &'static str) {
        self.0.starts.get_or_create(&Outcome { result }).inc();
    }

    /// A session that stood has ended.
    pub fn session_end(&self, result: &'static str) {
        self.0.ends.get_or_create(&Outcome { result }).inc();
    }

    /// An edge is in sync.
    pub fn in_sync(&self) {
        self.0.syncs.inc();
    }

    /// A stream that an edge opened was refused.
    pub fn stream_refused(&self) {
        self.dropped("stream_refused", 1);
    }

    /// A join ended.
    pub fn join(&self, result: &'static str) {
        self.0.joins.get_or_create(&Outcome { result }).inc();
    }

    /// A renewal ended.
    pub fn renewal(&self, result: &'static str) {
        self.0.renewals.get_or_create(&Outcome { result }).inc();
    }

    /// A handshake failed.
    pub fn handshake_failed(&self) {
        self.0.handshake_failures.inc();
    }

    /// When the CA expires, seconds since the Unix epoch.
    pub fn ca_expires(&self, seconds: i64) {
        self.0.ca_expiry.set(seconds);
    }

    fn dropped(&self, reason: &'static str, many: u32) {
        if many > 0 {
            self.0.drops.get_or_create(&Reason { reason }).inc_by(many.into());
        }
    }

    fn frame(&self, direction: usize, class: Option<Class>, bytes: usize) {
        let lane = class.map_or(0, |class| 1 + class.index());
        self.0.frames.lanes[direction][lane].inc();
        self.0.bytes.lanes[direction][lane].inc_by(u64::try_from(bytes).unwrap_or(u64::MAX));
    }
}

impl Default for Flows {
    fn default() -> Self {
        let family = Family::default();
        let of = |direction, class| family.get_or_create_owned(&Flow { direction, class });
        let lanes = ["in", "out"].map(|direction| CLASSES.map(|class| of(direction, class)));
        Self { lanes, family }
    }
}

impl Default for SyncTimes {
    fn default() -> Self {
        Self(Family::new_with_constructor(|| Histogram::new(SYNC_BUCKETS)))
    }
}

/// A session that is counted, and what of it is in the sums. Thousands stand.
#[derive(Debug)]
pub struct Standing {
    metrics: Metrics,
    backlog: Backlog,
    /// Since when the edge is not in sync; `None` when it is.
    behind: Option<Duration>,
    was_in_sync: bool,
}

impl Standing {
    /// The session goes on.
    pub fn goes_on(&mut self, now: Duration, hub: &mut Hub) {
        let counters = &self.metrics.0;
        let tally = hub.take_tally();
        counters.acknowledged.inc_by(tally.acknowledged.into());
        self.metrics.dropped("superseded", tally.superseded);
        self.metrics.dropped("report_refused", tally.refused);
        match (self.behind, hub.is_in_sync()) {
            (Some(since), true) => {
                let after = if self.was_in_sync { "change" } else { "hello" };
                let took = now.saturating_sub(since).as_secs_f64();
                counters.sync_times.0.get_or_create(&After { after }).observe(took);
                counters.behind.dec();
                (self.behind, self.was_in_sync) = (None, true);
            }
            (None, false) => {
                counters.behind.inc();
                self.behind = Some(now);
            }
            (Some(_), false) | (None, true) => {}
        }
        self.sum(hub.backlog());
    }

    fn sum(&mut self, backlog: Backlog) {
        let before = std::mem::replace(&mut self.backlog, backlog);
        let counters = &self.metrics.0;
        for (gauge, before, now) in [
            (&counters.waiting, before.waiting, backlog.waiting),
            (&counters.unacknowledged, before.unacknowledged, backlog.unacknowledged),
        ] {
            if now != before {
                gauge.inc_by(i64::from(now) - i64::from(before));
            }
        }
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.sum(Backlog::default());
        if self.behind.is_some() {
            self.metrics.0.behind.dec();
        }
        self.metrics.0.sessions.dec();
    }
}

/// What waits to be sent to edges, asked of every session when it is read.
#[derive(Debug)]
pub struct Queues(pub Sessions);

impl Collector for Queues {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut bytes = [0; CLASSES.len()];
        for waiting in self.0.all_streams().iter().map(Streams::waiting) {
            let of_session = std::iter::once(waiting.control).chain(waiting.streams);
            bytes.iter_mut().zip(of_session).for_each(|(sum, bytes)| *sum += bytes);
        }
        let (help, unit) = ("Bytes that wait here to be sent to edges, by class", Some(&Unit::Bytes));
        let mut family = encoder.encode_descriptor("skerry_queue", help, unit, MetricType::Gauge)?;
        for (class, bytes) in CLASSES.into_iter().zip(bytes) {
            let gauge = ConstGauge::new(i64::try_from(bytes).unwrap_or(i64::MAX));
            gauge.encode(family.encode_family(&OfClass { class })?)?;
        }
        Ok(())
    }
}

/// What the kernel and the runtime say of this process, asked when it is read.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut gauge = |name, help, unit, value| {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?)
        };
        if let Some(resident) = resident_bytes() {
            gauge("process_resident_memory", "Resident memory of cloudcore", Some(&Unit::Bytes), resident)?;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let tasks = i64::try_from(runtime.metrics().num_alive_tasks()).unwrap_or(i64::MAX);
            gauge("skerry_tasks", "Tasks that have not ended", None, tasks)?;
        }
        Ok(())
    }
}

fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok()?.checked_mul(1024)
}

impl Meter for Metrics {
    fn sent(&self, class: Option<Class>, bytes: usize) {
        self.frame(1, class, bytes);
    }

    fn received(&self, class: Option<Class>, bytes: usize) {
        self.frame(0, class, bytes);
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text;
    use skerry_proto::sync::{COLLECTIONS, Collection, HubInput, HubOutput, Object};
    use skerry_proto::wire::frame::Body;
    use skerry_proto::wire::{Ack, Frame, Hello, Inventory};

    use super::*;

    const KIB: usize = 1024;

    /// An edge that acknowledges at once or not, and the session that is counted.
    struct Bed {
        registry: Registry,
        hub: Hub,
        standing: Standing,
        /// The last of what was sent.
        seq: u64,
    }

    impl Bed {
        /// With the Hello of an edge that holds nothing, after one second.
        fn new() -> Self {
            let mut registry = Registry::default();
            let (hello, at) = (Hello { protocol_min: 1, protocol_max: 1, ..Hello::default() }, Duration::from_secs(1));
            let standing = Metrics::new(&mut registry).session(at);
            Self { registry, hub: Hub::new(at, &hello, 1, 0, "hub").0, standing, seq: 0 }
        }

        /// Something happens at this second; inventories are given.
        fn step(&mut self, second: u64, input: HubInput) {
            let now = Duration::from_secs(second);
            let mut inputs = vec![input];
            while let Some(input) = inputs.pop() {
                for output in self.hub.step(now, input) {
                    match output {
                        HubOutput::Send(Frame { body: Some(Body::Upsert(upsert)) }) => self.seq = upsert.seq,
                        HubOutput::Send(Frame { body: Some(Body::Delete(delete)) }) => self.seq = delete.seq,
                        HubOutput::Send(Frame { body: Some(Body::DigestCheck(check)) }) => self.seq = check.seq,
                        HubOutput::Send(Frame { body: Some(Body::InventoryRequest(asked)) }) => {
                            let none = Inventory { collection: asked.collection, last: true, ..Inventory::default() };
                            inputs.push(HubInput::Frame(Frame { body: Some(Body::Inventory(none)) }));
                        }
                        _ => {}
                    }
                }
            }
            self.standing.goes_on(now, &mut self.hub);
        }

        /// The edge acknowledges what was sent until now.
        fn ack(&mut self, second: u64) {
            let ack = Body::Ack(Ack { seq: self.seq });
            self.step(second, HubInput::Frame(Frame { body: Some(ack) }));
        }

        #[track_caller]
        fn shows(&self, lines: &[&str]) {
            let mut text = String::new();
            text::encode(&mut text, &self.registry).unwrap();
            for line in lines {
                assert!(text.lines().any(|shown| shown == *line), "{line} is not in:\n{text}");
            }
        }
    }

    /// One that takes so many bytes.
    fn object(uid: &str, of: u8, bytes: usize) -> HubInput {
        let noise: String = (0..bytes / 16)
            .map(|n| format!("{:016x}", skerry_proto::sync::fingerprint(&[&[of][..], &n.to_le_bytes()].concat())))
            .collect();
        let json = serde_json::to_vec(&noise).unwrap();
        HubInput::Desired(Object::new(Collection::Pods, format!("ns/{uid}"), uid.to_owned(), &json).into())
    }

    #[test]
    fn how_long_an_edge_lags_is_counted_from_its_hello_and_from_each_change() {
        let mut bed = Bed::new();
        bed.shows(&["skerry_sessions 1", "skerry_sessions_behind 1"]);
        bed.step(2, object("a", 1, KIB));
        for collection in COLLECTIONS {
            bed.step(3, HubInput::Complete(collection));
        }
        bed.shows(&["skerry_sessions_behind 1", "skerry_changes_acknowledged_total 0"]);
        bed.ack(4);
        bed.shows(&[
            "skerry_sessions_behind 0",
            "skerry_changes_acknowledged_total 1",
            "skerry_changes_unacknowledged_bytes 0",
            "skerry_sync_seconds_sum{after=\"hello\"} 3.0",
            "skerry_sync_seconds_count{after=\"hello\"} 1",
        ]);
        bed.step(10, object("a", 2, KIB));
        bed.step(11, HubInput::Heard);
        bed.shows(&["skerry_sessions_behind 1"]);
        bed.ack(12);
        bed.step(20, HubInput::Gone(Collection::Pods, "a".to_owned()));
        bed.ack(25);
        bed.shows(&[
            "skerry_changes_acknowledged_total 3",
            "skerry_sync_seconds_sum{after=\"hello\"} 3.0",
            "skerry_sync_seconds_sum{after=\"change\"} 7.0",
            "skerry_sync_seconds_bucket{le=\"2.5\",after=\"change\"} 1",
        ]);
    }

    #[test]
    fn what_waits_and_what_a_newer_one_takes_the_place_of_is_counted() {
        let mut bed = Bed::new();
        for collection in COLLECTIONS {
            bed.step(1, HubInput::Complete(collection));
        }
        // More than may be on its way at once.
        bed.step(2, object("a", 1, 1024 * KIB));
        for (uid, of) in [("b", 1), ("c", 1), ("b", 2), ("b", 2)] {
            bed.step(2, object(uid, of, KIB));
        }
        bed.shows(&["skerry_changes_waiting 2", "skerry_drops_total{reason=\"superseded\"} 1"]);
        assert!(bed.standing.metrics.0.unacknowledged.get() > 256 * 1024);
        bed.step(2, HubInput::Gone(Collection::Pods, "c".to_owned()));
        bed.shows(&["skerry_changes_waiting 1", "skerry_drops_total{reason=\"superseded\"} 2"]);
        let Bed { registry, hub, standing, seq } = bed;
        // Nothing of a session stays in the sums when it ends.
        let next = standing.metrics.session(Duration::from_secs(3));
        drop(standing);
        let bed = Bed { registry, hub, standing: next, seq };
        bed.shows(&[
            "skerry_sessions 1",
            "skerry_sessions_behind 1",
            "skerry_changes_waiting 0",
            "skerry_changes_unacknowledged_bytes 0",
        ]);
    }
}
