//! What cloudcore's front counts. The back registers its own in the same registry.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Registry, Unit};
use skerry_proto::transport::Meter;

/// How something ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    result: &'static str,
}

/// Which way something went.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Direction {
    direction: &'static str,
}

/// The counters; cloning shares them.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    sessions: Gauge,
    starts: Family<Outcome, Counter>,
    ends: Family<Outcome, Counter>,
    syncs: Counter,
    joins: Family<Outcome, Counter>,
    renewals: Family<Outcome, Counter>,
    handshake_failures: Counter,
    frames: Family<Direction, Counter>,
    bytes: Family<Direction, Counter>,
    ca_expiry: Gauge,
}

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
        registry.register("skerry_joins", "Joins, by result", counters.joins.clone());
        registry.register("skerry_renewals", "Renewals of node certificates, by result", counters.renewals.clone());
        registry.register(
            "skerry_handshake_failures",
            "TLS handshakes that failed",
            counters.handshake_failures.clone(),
        );
        registry.register("skerry_frames", "Frames of sessions", counters.frames.clone());
        registry.register("skerry_bytes", "Bytes of frames of sessions", counters.bytes.clone());
        registry.register("skerry_ca_expiry_timestamp_seconds", "When the CA expires", counters.ca_expiry.clone());
        registry.register_collector(Box::new(Process));
        metrics
    }

    /// A session stands, until what this answers is dropped.
    pub fn session(&self) -> Standing {
        self.0.sessions.inc();
        Standing(self.clone())
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

    fn frame(&self, direction: &'static str, bytes: usize) {
        let label = Direction { direction };
        self.0.frames.get_or_create(&label).inc();
        self.0.bytes.get_or_create(&label).inc_by(u64::try_from(bytes).unwrap_or(u64::MAX));
    }
}

/// A session that is counted.
#[derive(Debug)]
pub struct Standing(Metrics);

impl Drop for Standing {
    fn drop(&mut self) {
        self.0.0.sessions.dec();
    }
}

/// What the kernel and the runtime say of this process, asked when it is read.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut gauge = |name, help, unit, value| {
            let kind = prometheus_client::metrics::MetricType::Gauge;
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, unit, kind)?)
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
    fn sent(&self, bytes: usize) {
        self.frame("out", bytes);
    }

    fn received(&self, bytes: usize) {
        self.frame("in", bytes);
    }
}
