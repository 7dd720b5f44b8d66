//! Tasks that have a name and do not die unseen.

use std::future::Future;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::clock;
use crate::link::backoff::Backoff;

/// Spawns a task; a panic in it is logged with its name.
#[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        let inner = tokio::spawn(future);
        let abort = Abort(inner.abort_handle());
        if let Err(ended) = inner.await
            && ended.is_panic()
        {
            error!(task = name, "the task panicked");
        }
        drop(abort);
    })
}

/// Aborting the outer task aborts the inner one.
struct Abort(tokio::task::AbortHandle);

impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs a module for as long as it likes: one that panics is made anew and started again, after a growing wait; one that ends has
/// ended. The others never notice.
pub fn module<M, F>(name: &'static str, shutdown: CancellationToken, make: M) -> JoinHandle<()>
where
    M: FnMut() -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60), rand::random());
    module_with(name, shutdown, backoff, make)
}

fn module_with<M, F>(
    name: &'static str,
    shutdown: CancellationToken,
    mut backoff: Backoff,
    mut make: M,
) -> JoinHandle<()>
where
    M: FnMut() -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    spawn(name, async move {
        loop {
            let started = clock::monotonic();
            #[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
            let running = tokio::spawn(make());
            let abort = Abort(running.abort_handle());
            let ended = running.await;
            drop(abort);
            if ended.is_ok() || shutdown.is_cancelled() {
                return;
            }
            if clock::monotonic().saturating_sub(started) > Duration::from_secs(600) {
                backoff.reset();
            }
            let wait = backoff.wait();
            error!(module = name, ?wait, "the module panicked and is started again");
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = shutdown.cancelled() => return,
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_module_that_panics_is_started_again_until_it_ends() {
        let starts = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&starts);
        let backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(2), 1);
        module_with("test", CancellationToken::new(), backoff, move || {
            let start = counted.fetch_add(1, Ordering::SeqCst);
            async move { assert!(start >= 3, "not yet") }
        })
        .await
        .unwrap();
        assert_eq!(starts.load(Ordering::SeqCst), 4);
    }
}
