//! Tasks that have a name and do not die unseen.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tracing::error;

use crate::clock;
use crate::retry::Backoff;

/// What ran for so long before it ended is not ending again and again.
const STEADY: Duration = Duration::from_secs(60);

/// Spawns a task; a panic in it is logged with its name. Aborting it aborts what it runs.
#[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    // What it was at is dropped with it. A block of its own would have room for it twice.
    tokio::spawn(AssertUnwindSafe(future).catch_unwind().map(move |outcome| {
        if outcome.is_err() {
            error!(task = name, "the task panicked");
        }
    }))
}

/// Spawns something that should not end, and starts it again if it does.
pub fn keep<F>(name: &'static str, run: impl Fn() -> F + Send + 'static) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    spawn(name, async move {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
        loop {
            let begun = clock::monotonic();
            let mut inner = Aborting(spawn(name, run()));
            let _ = (&mut inner.0).await;
            if clock::monotonic().saturating_sub(begun) > STEADY {
                backoff.reset();
            }
            error!(task = name, "the task ended and is started again");
            tokio::time::sleep(backoff.wait()).await;
        }
    })
}

/// Many tasks of one kind, which end with their owner.
#[derive(Debug)]
pub struct Tasks {
    name: &'static str,
    set: JoinSet<()>,
}

impl Tasks {
    /// None yet.
    pub fn new(name: &'static str) -> Self {
        Self { name, set: JoinSet::new() }
    }

    /// Starts one more.
    pub fn spawn(&mut self, future: impl Future<Output = ()> + Send + 'static) {
        self.set.spawn(future);
    }

    /// How many run, or have ended and are not yet reaped.
    pub fn len(&self) -> usize {
        self.set.len()
    }

    /// Whether none runs.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty()
    }

    /// Waits until one has ended; for ever when there is none. Cancel safe.
    pub async fn reap(&mut self) {
        match self.set.join_next().await {
            Some(Ok(())) => {}
            Some(Err(ended)) => note(self.name, &ended),
            None => std::future::pending().await,
        }
    }

    /// Waits for all of them, but not longer than this; aborts the rest and says how many those were.
    pub async fn drain(mut self, within: Duration) -> usize {
        let name = self.name;
        let all = async {
            while let Some(ended) = self.set.join_next().await {
                if let Err(ended) = ended {
                    note(name, &ended);
                }
            }
        };
        let _ = tokio::time::timeout(within, all).await;
        let left = self.set.len();
        self.set.shutdown().await;
        left
    }
}

fn note(name: &'static str, ended: &JoinError) {
    if ended.is_panic() {
        error!(task = name, "the task panicked");
    }
}

/// The inner task ends with the outer one.
struct Aborting(JoinHandle<()>);

impl Drop for Aborting {
    fn drop(&mut self) {
        self.0.abort();
    }
}
