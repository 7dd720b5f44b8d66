//! Tasks that have a name and do not die unseen.

use std::future::Future;

use tokio::task::JoinHandle;
use tracing::error;

/// Spawns a task; a panic in it is logged with its name.
#[allow(clippy::disallowed_methods)]
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
