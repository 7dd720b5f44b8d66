//! Tasks that have a name and do not die unseen.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;
use tokio::task::JoinHandle;
use tracing::error;

/// Spawns a task; a panic in it is logged with its name.
#[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    // A block of its own would have room for it twice.
    tokio::spawn(AssertUnwindSafe(future).catch_unwind().map(move |outcome| {
        if outcome.is_err() {
            error!(task = name, "the task panicked");
        }
    }))
}

/// Runs what blocks, files for the most part, off the one thread that everything waits on.
///
/// # Errors
///
/// What the work says; when it panicked, that.
#[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)?
}
