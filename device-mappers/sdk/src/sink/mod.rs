//! Sinks: where values go besides edgecore. One queue, one connection and one task for each target, shared by all properties that name it.
//!
//! Values become records as they come, and records batches: of at most [`BATCH_RECORDS`], [`BATCH_BYTES`] and [`BATCH_AGE`]. A batch is
//! kept until its sink has confirmed it. While the sink is away, batches go to disk, in order; when the disk's share is used up, the oldest
//! goes, and is counted. So nothing is lost to a sink that is away, at most the last [`BATCH_AGE`] to a power cut, and what was on its way
//! when the process ended may arrive twice.

mod file;
mod format;
mod http;
mod mqtt;
mod queue;
mod store;
mod writer;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use skerry_proto::dmi;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

pub(crate) use format::Format;
use queue::Queue;

use crate::task;
use crate::value::{Kind, Value};

/// Records in a batch.
pub(crate) const BATCH_RECORDS: u32 = 500;
/// Bytes in a batch, unless a single record is longer.
pub(crate) const BATCH_BYTES: usize = 64 << 10;
/// How long what waits for a target that no device names stays: devices may be on their way, or come back.
const SWEEP: Duration = Duration::from_secs(86_400);
/// How long a record waits for others.
pub(crate) const BATCH_AGE: Duration = Duration::from_secs(1);

/// Where values are pushed to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Target {
    /// `address`.
    Mqtt(String),
    /// URL, time-out in milliseconds.
    Http(String, u32),
    /// URL, organisation, bucket.
    Influx(String, String, String),
    /// Path, most bytes.
    File(PathBuf, u64),
}

/// The end of a property that a target is fed by.
#[derive(Clone, Debug)]
pub(crate) struct Outlet {
    handle: Arc<Handle>,
    format: Format,
}

/// Keeps a sink's task running.
#[derive(Debug)]
struct Handle {
    target: Target,
    queue: Arc<Queue>,
    end: CancellationToken,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

impl PartialEq for Outlet {
    fn eq(&self, other: &Self) -> bool {
        self.handle.target == other.handle.target && self.format == other.format
    }
}

impl Outlet {
    /// Takes a value along. Never waits.
    pub(crate) fn push(&self, value: &Value, kind: Kind, time: i64) {
        self.handle.queue.push(|bytes| self.format.record(value, kind, time, bytes));
    }
}

/// All sinks of this process.
#[derive(Debug)]
pub(crate) struct Sinks {
    directory: PathBuf,
    most: u64,
    running: Mutex<HashMap<Target, Weak<Handle>>>,
    tasks: TaskTracker,
    end: CancellationToken,
    is_swept: AtomicBool,
}

impl Sinks {
    /// Sinks whose batches wait in `directory`, at most `most` bytes for each.
    pub(crate) fn new(directory: PathBuf, most: u64) -> Arc<Self> {
        Arc::new(Self {
            directory,
            most,
            running: Mutex::default(),
            tasks: TaskTracker::new(),
            end: CancellationToken::new(),
            is_swept: AtomicBool::new(false),
        })
    }

    /// From now on, once a day, what waits for targets that no device names any more is dropped.
    pub(crate) fn sweep(self: &Arc<Self>) {
        if self.is_swept.swap(true, Ordering::Relaxed) {
            return;
        }
        let sinks = Arc::clone(self);
        self.tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = sinks.end.cancelled() => return,
                    () = tokio::time::sleep(SWEEP) => {}
                }
                let (directory, known) = (sinks.directory.clone(), sinks.names());
                match task::blocking(move || store::sweep(&directory, &known)).await {
                    Ok(0) => {}
                    Ok(bytes) => {
                        warn!(bytes, "values that waited for targets that no device names any more are dropped")
                    }
                    Err(error) => debug!(%error, "what waits for targets that no device names any more stays"),
                }
            }
        });
    }

    /// The directories of the targets that devices name.
    fn names(&self) -> HashSet<String> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running
            .iter()
            .filter(|(_, handle)| handle.strong_count() > 0)
            .map(|(target, _)| writer::name_of(target))
            .collect()
    }

    /// What a property's `pushMethod` asks for. What is not understood is said, and left out.
    pub(crate) fn outlets(
        &self,
        namespace: &str,
        device: &str,
        property: &str,
        kind: Kind,
        push: &dmi::PushMethod,
    ) -> Vec<Outlet> {
        let mut outlets = Vec::new();
        for wanted in format::targets(namespace, device, property, kind, push) {
            match wanted {
                Ok((target, format)) => outlets.push(Outlet { handle: self.handle(target), format }),
                Err(error) => warn!(device = format!("{namespace}/{device}"), property, error, "values are not pushed"),
            }
        }
        outlets
    }

    fn handle(&self, target: Target) -> Arc<Handle> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = running.get(&target).and_then(Weak::upgrade) {
            return handle;
        }
        running.retain(|_, handle| handle.strong_count() > 0);
        let queue = Arc::new(Queue::default());
        let end = self.end.child_token();
        let writer = writer::Writer::new(&target, Arc::clone(&queue), &self.directory, self.most, end.clone());
        self.tasks.spawn(writer.run());
        let handle = Arc::new(Handle { target: target.clone(), queue, end });
        running.insert(target, Arc::downgrade(&handle));
        handle
    }

    /// Ends all sinks: what is not pushed by then is on disk.
    pub(crate) async fn close(&self) {
        self.end.cancel();
        self.tasks.close();
        if tokio::time::timeout(Duration::from_secs(10), self.tasks.wait()).await.is_err() {
            warn!("not all values could be put on disk in time");
        }
    }
}
