//! What a kubelet answers about use: `/stats/summary` and the pages of metrics.
//!
//! Nothing is measured while nobody asks. A request makes one pass over the cgroups, one request at a time, and what cannot be read loses
//! its own value only: a page is always a page, and says by `resource_scrape_error` or `container_scrape_error` that something was
//! missing. Kept between requests are the last samples of CPU time, for rates, and what volumes, images and writable layers took; five
//! minutes after the last request they are dropped.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use skerry_proto::cri;
use tokio::net::UnixStream;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use self::cadvisor::Around;
use self::cgroup::Depth;
use self::disk::{Findings, Used};
use self::samples::Samples;
use self::snapshot::{Listed, Snapshot, Wanted};
use self::summary::NodeParts;
use crate::devices::mqtt;
use crate::kubelet::context::{Context, blocking};
use crate::kubelet::node::{Disk, Load, Machine, default_link};
use crate::kubelet::observed::Observed;
use crate::{clock, order, supervise};

mod cadvisor;
mod cgroup;
mod disk;
mod ends;
mod own;
mod page;
mod probes;
mod proc;
mod resource;
mod samples;
mod snapshot;
mod summary;

pub use ends::Ends;
pub use probes::{Counts, PodCounts};

/// The content type of the pages of metrics.
pub const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// The content type of the summary.
pub const SUMMARY_TYPE: &str = "application/json";

/// How long the runtime may take to answer; who asks waits for ten seconds mostly.
const PATIENCE: Duration = Duration::from_secs(4);
/// Between the two samples of a request that no other came before.
const BETWEEN: Duration = Duration::from_millis(100);
/// How long the runtime's word on images and writable layers is good. containerd looks at them as often (`stats_collect_period`), but
/// asks every shim whenever it is asked.
const STORED_FOR: Duration = Duration::from_secs(10);
/// How long after the last request anything is kept.
const KEPT_FOR: Duration = Duration::from_secs(300);

/// Answers what is asked of the kubelet's use of the box. A clone shares what is kept.
#[derive(Clone, Debug)]
pub struct Stats(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    context: Arc<Context>,
    /// Where the runtime listens.
    runtime: PathBuf,
    /// One pass over cgroups at a time; others wait for their turn, as long as whoever asked does.
    turn: Arc<Semaphore>,
    /// The same for summaries, which walk directories: nobody else waits for that.
    summing: Arc<Semaphore>,
    sandbox_image: OnceCell<String>,
    kept: Mutex<Kept>,
    findings: Findings,
}

/// What the runtime says its storage takes.
#[derive(Clone, Debug, Default)]
struct Stored {
    /// Writable layers, by container.
    layers: Arc<HashMap<String, cri::FilesystemUsage>>,
    /// Where images are, and what they take.
    images: Option<(String, Used)>,
}

#[derive(Debug, Default)]
struct Kept {
    samples: Samples,
    /// Of the last summary, monotonic: what the samples are of.
    sampled: Duration,
    /// What the runtime told, and until when that is good, monotonic.
    stored: Option<(Duration, Stored)>,
    /// Of the last request, monotonic.
    asked: Duration,
    /// A task is there that will drop it.
    expires: bool,
}

/// The right to measure, until the last that has it is done.
#[derive(Clone, Debug)]
struct Turn(#[expect(dead_code, reason = "held, not read")] Option<Arc<OwnedSemaphorePermit>>);

impl Turn {
    async fn of(turns: &Arc<Semaphore>) -> Self {
        // It is never closed.
        Self(Arc::clone(turns).acquire_owned().await.ok().map(Arc::new))
    }
}

impl Kept {
    /// Whether a summary that is made now has to begin with samples; those of long ago would give rates of long ago.
    fn lacks_samples(&mut self, now: Duration) -> bool {
        if now.saturating_sub(self.sampled) >= KEPT_FOR {
            self.samples = Samples::default();
        }
        self.sampled = now;
        self.samples.is_empty()
    }

    /// Drops everything if nobody asked for long enough; else says how long that still is.
    fn expire(&mut self, now: Duration) -> Option<Duration> {
        let left = KEPT_FOR.checked_sub(now.saturating_sub(self.asked)).filter(|left| !left.is_zero());
        if left.is_none() {
            *self = Self::default();
        }
        left
    }
}

impl Stats {
    /// Measures nothing before it is asked. The runtime is the one that listens on this socket.
    pub fn new(context: Arc<Context>, runtime: PathBuf) -> Self {
        Self(Arc::new(Inner {
            context,
            runtime,
            turn: Arc::new(Semaphore::new(1)),
            summing: Arc::new(Semaphore::new(1)),
            sandbox_image: OnceCell::new(),
            kept: Mutex::default(),
            findings: Findings::default(),
        }))
    }

    /// The body of `/stats/summary`, JSON ([`SUMMARY_TYPE`]). The first in a while takes a tenth of a second more, for rates.
    pub async fn summary(&self, only_cpu_and_memory: bool) -> Bytes {
        let turn = Turn::of(&self.0.summing).await;
        let (listed, is_whole) = self.listed().await;
        self.remember();
        if self.0.kept().lacks_samples(clock::monotonic()) {
            self.rated(listed.clone(), Wanted::cgroups(Depth::Cpu), &turn).await;
            tokio::time::sleep(BETWEEN).await;
        }
        let mut parts = None;
        let mut wanted = Wanted::cgroups(Depth::Core);
        if !only_cpu_and_memory {
            let stored = self.stored().await;
            parts = Some(self.node_parts(&stored).await);
            wanted = Wanted { depth: Depth::Full, network: true, disk: true, layers: stored.layers };
        }
        let mut snapshot = self.rated(listed, wanted, &turn).await;
        snapshot.is_lacking |= !is_whole;
        if snapshot.is_lacking {
            debug!("the summary lacks something");
        }
        let node = self.0.context.node();
        let summary = summary::summary(&node.name, &snapshot, parts.as_ref());
        serde_json::to_vec(&summary).unwrap_or_default().into()
    }

    /// The page `/metrics/resource`.
    pub async fn resource(&self) -> Bytes {
        let turn = Turn::of(&self.0.turn).await;
        let (listed, is_whole) = self.listed().await;
        let mut snapshot = self.take(listed, Wanted::cgroups(Depth::Core), &turn).await;
        snapshot.is_lacking |= !is_whole;
        resource::page(&snapshot)
    }

    /// The page `/metrics/cadvisor`.
    pub async fn cadvisor(&self) -> Bytes {
        let turn = Turn::of(&self.0.turn).await;
        let ((listed, is_whole), stored, sandbox_image) =
            tokio::join!(self.listed(), self.stored(), self.sandbox_image());
        let wanted = Wanted { depth: Depth::All, network: true, disk: false, layers: stored.layers };
        let mut snapshot = self.take(listed, wanted, &turn).await;
        snapshot.is_lacking |= !is_whole;
        let names = snapshot.devices();
        let around = blocking(move || Around {
            machine: Machine::read(),
            sandbox_image,
            disk: stored.images.and_then(|(place, _)| {
                let device = proc::device_of(place.as_ref()).map(|numbers| proc::device_name(&numbers));
                Some((Disk::read(place.as_ref())?, device.unwrap_or_default()))
            }),
            devices: order::map(names.into_iter().map(|numbers| {
                let name = proc::device_name(&numbers);
                (numbers, name)
            })),
            interfaces: proc::interfaces("self").unwrap_or_default(),
        });
        cadvisor::page(&snapshot, &around.await)
    }

    /// The page `/metrics`.
    pub async fn metrics(&self, mqtt: &mqtt::Status) -> Bytes {
        let observed = self.observed().await;
        let (own, (_, booted)) = blocking(|| (proc::own(), proc::node_stat())).await;
        let booted = booted.and_then(|at| Timestamp::from_second(at).ok());
        let context = &self.0.context;
        own::page(&context.node().name, observed.as_ref(), context.ends(), own.as_ref(), booted, mqtt)
    }

    /// How long the loop that looks after pods has not come round.
    pub fn since_round(&self) -> Duration {
        self.0.context.since_round()
    }

    /// The page `/metrics/probes`.
    pub async fn probes(&self) -> Bytes {
        self.0.context.probe_counts().page()
    }

    /// The pods to look at, and whether both the store and the runtime could be asked.
    async fn listed(&self) -> (Vec<Listed>, bool) {
        let (index, observed) = tokio::join!(self.0.context.store.index(), self.observed());
        let is_whole = index.is_ok() && observed.is_some();
        (snapshot::list(index.unwrap_or_default(), observed), is_whole)
    }

    async fn observed(&self) -> Option<BTreeMap<String, Observed>> {
        let observed = tokio::time::timeout(PATIENCE, self.0.context.cri.observe(None)).await;
        observed.ok()?.inspect_err(|error| debug!(%error, "no statistics of containers")).ok()
    }

    /// What the runtime told lately, or tells now.
    async fn stored(&self) -> Stored {
        let now = clock::monotonic();
        if let Some((until, stored)) = &self.0.kept().stored
            && now < *until
        {
            return stored.clone();
        }
        let cri = &self.0.context.cri;
        let images = tokio::time::timeout(PATIENCE, cri.image_fs_info());
        let (layers, images) = tokio::join!(cri.writable_layers(PATIENCE), images);
        let layers = layers.inspect_err(|error| debug!(%error, "no statistics of writable layers"));
        let is_whole = layers.is_ok() && matches!(images, Ok(Ok(_)));
        let first = images.ok().and_then(Result::ok).and_then(|info| info.image_filesystems.into_iter().next());
        let images = first.and_then(|usage| {
            let used = disk::told(&usage);
            Some((usage.fs_id?.mountpoint, used))
        });
        let stored = Stored { layers: Arc::new(layers.unwrap_or_default()), images };
        if is_whole {
            self.remember();
            self.0.kept().stored = Some((now + STORED_FOR, stored.clone()));
        }
        stored
    }

    async fn node_parts(&self, stored: &Stored) -> NodeParts {
        let layers = stored.layers.values().map(disk::told).fold(Used::default(), |sum, one| Used {
            bytes: sum.bytes.saturating_add(one.bytes),
            inodes: sum.inodes.saturating_add(one.inodes),
        });
        let (place, images) = stored.images.clone().unzip();
        let pods_root = self.0.context.node().pods_root.clone();
        blocking(move || NodeParts {
            load: Load::read(&pods_root, place.as_ref().map(AsRef::as_ref)),
            interfaces: proc::interfaces("self").unwrap_or_default(),
            default_link: default_link(),
            layers: images.map(|_| layers),
            images,
        })
        .await
    }

    /// Empty while the runtime does not tell.
    async fn sandbox_image(&self) -> String {
        let told = self.0.sandbox_image.get_or_try_init(|| async {
            let setup = tokio::time::timeout(PATIENCE, self.0.context.cri.setup()).await;
            setup.ok().and_then(Result::ok).map(|setup| setup.sandbox_image.unwrap_or_default()).ok_or(())
        });
        told.await.cloned().unwrap_or_default()
    }

    async fn take(&self, listed: Vec<Listed>, wanted: Wanted, turn: &Turn) -> Snapshot {
        let (inner, root, turn) = (self.0.clone(), self.0.context.node().pods_root.clone(), turn.clone());
        blocking(move || {
            // Whoever asked may be gone before this ends.
            let _turn = turn;
            let now = clock::monotonic();
            let volumes = |uid: &str, budget: &mut usize| disk::volumes(&root, uid, budget, now, &inner.findings);
            snapshot::take(&inner.context.cgroups, listed, &wanted, &volumes)
        })
        .await
    }

    /// With what serves the pods, and with rates.
    async fn rated(&self, listed: Vec<Listed>, wanted: Wanted, turn: &Turn) -> Snapshot {
        let mut snapshot = self.take(listed, wanted, turn).await;
        // Whoever began to listen there.
        let runtime = UnixStream::connect(&self.0.runtime).await.and_then(|stream| stream.peer_cred());
        // That is init, where a socket is its own and starts the runtime.
        let runtime = runtime.ok().and_then(|credentials| credentials.pid()).filter(|pid| *pid != 1);
        snapshot.programs = blocking(move || {
            let runtime = runtime.and_then(|pid| proc::process(&pid.to_string()));
            let programs = [("kubelet", proc::own()), ("runtime", runtime)];
            programs.into_iter().filter_map(|(name, process)| Some((name, process?))).collect()
        })
        .await;
        self.0.rate(snapshot)
    }

    /// From now on something is kept, which a task drops when nobody asks any more.
    fn remember(&self) {
        let mut kept = self.0.kept();
        kept.asked = clock::monotonic();
        if !std::mem::replace(&mut kept.expires, true) {
            let _detached = supervise::spawn("stats-memory", forget(Arc::downgrade(&self.0)));
        }
    }
}

impl Inner {
    /// Fills in the rates.
    fn rate(&self, mut snapshot: Snapshot) -> Snapshot {
        let mut kept = self.kept();
        let mut seen = HashSet::new();
        let mut rate = |path: &str, usage: &mut cgroup::Usage| {
            if let Some(cpu) = usage.cpu.as_mut().filter(|_| !path.is_empty()) {
                cpu.rate = kept.samples.observe(path, usage.since, cpu.usage);
                seen.insert(path.to_owned());
            }
        };
        rate("/", &mut snapshot.node);
        rate(&snapshot.top, &mut snapshot.all_pods);
        for pod in &mut snapshot.pods {
            rate(&pod.path, &mut pod.usage);
            for container in &mut pod.containers {
                rate(&container.path, &mut container.usage);
            }
        }
        for (name, process) in &mut snapshot.programs {
            process.rate = process.cpu.and_then(|cpu| kept.samples.observe(name, process.since, cpu));
            seen.insert((*name).to_owned());
        }
        kept.samples.keep(|path| seen.contains(path));
        drop(kept);
        snapshot
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Losing any of it costs a rate.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn forget(inner: Weak<Inner>) {
    loop {
        let Some(inner) = inner.upgrade() else { return };
        let Some(left) = inner.kept().expire(clock::monotonic()) else { return inner.findings.clear() };
        drop(inner);
        tokio::time::sleep(left).await;
    }
}

/// So many nanoseconds later.
fn after(at: Timestamp, nanoseconds: u64) -> Timestamp {
    let later = SignedDuration::from_nanos(i64::try_from(nanoseconds).unwrap_or_default());
    at.checked_add(later).unwrap_or(at)
}

#[cfg(test)]
mod tests;
