//! The task of one sink: pushes batches, oldest first, and puts them on disk while the sink is away.

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::queue::{Batch, Queue};
use super::store::Store;
use super::{Target, file, http, mqtt};
use crate::backoff::Backoff;
use crate::clock;
use crate::counters::COUNTERS;
use crate::task;

/// Full batches in memory beyond which they go to disk, though the sink works: it is slower than what comes.
const IN_MEMORY: usize = 4;
/// A push that takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(15);

/// Between attempts to read what waits on disk.
const REREAD: Duration = Duration::from_secs(1);

/// Why a batch was not pushed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PushError {
    /// The sink is away: try again.
    Away(String),
    /// The sink never takes this batch.
    Refused(String),
}

enum Transport {
    Mqtt(mqtt::Mqtt),
    Http(http::Http),
    File(file::Lines),
}

impl Transport {
    fn new(target: &Target) -> Self {
        match target {
            Target::Mqtt(address) => Self::Mqtt(mqtt::Mqtt::new(address)),
            Target::Http(url, timeout) => Self::Http(http::Http::json(url, *timeout)),
            Target::Influx(url, org, bucket) => Self::Http(http::Http::influx(url, org, bucket)),
            Target::File(path, most) => Self::File(file::Lines::new(path.clone(), *most)),
        }
    }

    async fn push(&mut self, batch: &Batch) -> Result<(), PushError> {
        let push = async {
            match self {
                Self::Mqtt(mqtt) => mqtt.push(batch).await,
                Self::Http(http) => http.push(batch).await,
                Self::File(lines) => lines.push(batch).await,
            }
        };
        match tokio::time::timeout(DEADLINE, push).await {
            Ok(outcome) => outcome,
            Err(_) => Err(PushError::Away("no answer within 15 s".to_owned())),
        }
    }
}

/// What the directory of a target is called.
pub(crate) fn name_of(target: &Target) -> String {
    format!("{:016x}", xxhash_rust::xxh3::xxh3_64(format!("{target:?}").as_bytes()))
}

pub(crate) struct Writer {
    name: String,
    queue: Arc<Queue>,
    transport: Transport,
    target: Target,
    directory: std::path::PathBuf,
    most: u64,
    store: Option<Store>,
    end: CancellationToken,
}

/// A batch and where it is.
enum Front {
    Memory(Arc<Batch>),
    Disk(Batch),
}

impl Writer {
    pub(crate) fn new(target: &Target, queue: Arc<Queue>, directory: &Path, most: u64, end: CancellationToken) -> Self {
        let name = match target {
            Target::Mqtt(address) => address.clone(),
            Target::Http(url, _) => url.clone(),
            Target::Influx(url, _, bucket) => format!("{url} {bucket}"),
            Target::File(path, _) => path.display().to_string(),
        };
        Self {
            name: crate::net::without_password(&name),
            queue,
            transport: Transport::new(target),
            target: target.clone(),
            directory: directory.join(name_of(target)),
            most,
            store: None,
            end,
        }
    }

    pub(crate) async fn run(mut self) {
        self.open().await;
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
        loop {
            match AssertUnwindSafe(self.pushing(&mut backoff)).catch_unwind().await {
                Ok(()) => break,
                Err(_) => {
                    COUNTERS.panics_total.add(1);
                    error!(sink = self.name, "the sink panicked and is started again");
                    self.transport = Transport::new(&self.target);
                    tokio::time::sleep(backoff.wait()).await;
                }
            }
        }
        self.spill(None).await;
    }

    async fn open(&mut self) {
        let (directory, most) = (self.directory.clone(), self.most);
        match task::blocking(move || Store::open(directory, most)).await {
            Ok(store) => {
                if !store.is_empty() {
                    info!(sink = self.name, "values from before wait on disk");
                }
                self.store = Some(store);
            }
            Err(error) => {
                let directory = self.directory.display().to_string();
                warn!(sink = self.name, directory, %error, "values cannot wait on disk; what the sink misses is lost");
            }
        }
    }

    /// Pushes until the end is asked for.
    async fn pushing(&mut self, backoff: &mut Backoff) {
        while !self.end.is_cancelled() {
            let Some(front) = self.front().await else {
                self.wait(None).await;
                continue;
            };
            let batch = match &front {
                Front::Memory(batch) => batch,
                Front::Disk(batch) => batch,
            };
            let end = self.end.clone();
            let outcome = tokio::select! {
                outcome = self.transport.push(batch) => outcome,
                // Half a push is no push; the batch goes to disk.
                () = async { end.cancelled().await; tokio::time::sleep(Duration::from_secs(1)).await } => return,
            };
            match outcome {
                Ok(()) => {
                    if backoff.failures() > 0 {
                        info!(sink = self.name, "the sink is back");
                    }
                    backoff.reset();
                    COUNTERS.pushed_values_total.add(batch.records.into());
                    self.done(&front);
                    if self.queue.waiting() > IN_MEMORY {
                        self.spill(Some(IN_MEMORY)).await;
                    }
                }
                Err(PushError::Refused(error)) => {
                    warn!(
                        sink = self.name,
                        error,
                        values = batch.records,
                        "the sink refused values; they are given up"
                    );
                    COUNTERS.pushed_values_refused_total.add(batch.records.into());
                    self.done(&front);
                }
                Err(PushError::Away(error)) => {
                    COUNTERS.push_failures_total.add(1);
                    if backoff.failures() == 0 {
                        warn!(sink = self.name, error, "the sink is away; values wait on disk");
                    }
                    let until = clock::monotonic() + backoff.wait();
                    while !self.end.is_cancelled() && clock::monotonic() < until {
                        self.spill(None).await;
                        self.wait(Some(until)).await;
                    }
                }
            }
        }
    }

    async fn front(&mut self) -> Option<Front> {
        while self.store.as_ref().is_some_and(|store| !store.is_empty()) {
            match self.on_disk(Store::front).await {
                Ok(Some(batch)) => return Some(Front::Disk(batch)),
                Ok(None) => {}
                Err(error) => {
                    error!(sink = self.name, %error, "a file that waits on disk cannot be read; after some attempts it is given up");
                    tokio::select! {
                        () = self.end.cancelled() => return None,
                        () = tokio::time::sleep(REREAD) => {}
                    }
                }
            }
        }
        self.queue.front(Some(clock::monotonic())).ok().map(Front::Memory)
    }

    fn done(&mut self, front: &Front) {
        match front {
            Front::Memory(batch) => self.queue.done(batch),
            Front::Disk(batch) => {
                if let Some(store) = &mut self.store {
                    store.done(batch);
                }
            }
        }
    }

    /// Until there is something to do.
    async fn wait(&mut self, until: Option<Duration>) {
        let ripe = self.queue.front(Some(clock::monotonic())).err().flatten();
        let next = [until, ripe].into_iter().flatten().min();
        let pause = next.map_or(Duration::from_secs(3600), |next| next.saturating_sub(clock::monotonic()));
        tokio::select! {
            () = self.queue.wake.notified() => {}
            () = self.end.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }

    /// Moves batches from memory to disk: all but the youngest `keep`; with none, also the one that is being filled if it is old enough or
    /// the end is near.
    async fn spill(&mut self, keep: Option<usize>) {
        // A file needs no file to wait in.
        if matches!(self.target, Target::File(..)) && !self.end.is_cancelled() {
            return;
        }
        let mut moved = false;
        while keep.is_none_or(|keep| self.queue.waiting() > keep) && self.store.is_some() {
            let now = (!self.end.is_cancelled()).then(clock::monotonic);
            let Ok(batch) = self.queue.front(now) else { break };
            let appended = Arc::clone(&batch);
            if let Err(error) = self.on_disk(move |store| store.append(&appended)).await {
                error!(sink = self.name, %error, "values cannot be put on disk; the oldest in memory will be dropped");
                break;
            }
            self.queue.done(&batch);
            moved = true;
        }
        if moved && let Err(error) = self.on_disk(Store::sync).await {
            error!(sink = self.name, %error, "values on disk may not outlast a power cut");
        }
    }

    /// Works on the store off the main thread.
    async fn on_disk<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Store) -> std::io::Result<T> + Send + 'static,
    ) -> std::io::Result<T> {
        let Some(mut store) = self.store.take() else { return Err(std::io::Error::other("there is no store")) };
        let (store, outcome) = task::blocking(move || {
            let outcome = work(&mut store);
            Ok((store, outcome))
        })
        .await?;
        self.store = Some(store);
        outcome
    }
}
