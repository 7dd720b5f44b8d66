//! Trying again: jittered exponential back-off, and one log line when trouble begins and one when it ends.

use std::fmt::Write as _;
use std::future::Future;
use std::time::Duration;

use tracing::{info, warn};

/// How long to wait before try number `attempt` (from 0): doubling from `first` to `most`, the upper half of it drawn by `spread` in 0..1.
pub fn pause(first: Duration, most: Duration, attempt: u32, spread: f64) -> Duration {
    let full = first.saturating_mul(2_u32.saturating_pow(attempt)).min(most);
    full.mul_f64(spread.clamp(0.0, 1.0).mul_add(0.5, 0.5))
}

/// Counts the attempts of one thing, and draws its [`pause`]s.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    attempt: u32,
}

impl Backoff {
    /// Begins at `first`.
    pub fn new(first: Duration, most: Duration) -> Self {
        Self { first, most, attempt: 0 }
    }

    /// How long to wait now.
    pub fn wait(&mut self) -> Duration {
        let wait = pause(self.first, self.most, self.attempt, rand::random());
        self.attempt = self.attempt.saturating_add(1);
        wait
    }

    /// It went well.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

/// Repeats `attempt` until it succeeds or fails with what `worthwhile` says is not worth another.
pub async fn persist<T, E, F, A>(what: &str, worthwhile: impl Fn(&E) -> bool, mut attempt: F) -> Result<T, E>
where
    E: std::error::Error + 'static,
    F: FnMut() -> A,
    A: Future<Output = Result<T, E>>,
{
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));
    let mut failing = false;
    loop {
        match attempt().await {
            Ok(value) => {
                if failing {
                    info!("{what}: it works again");
                }
                return Ok(value);
            }
            Err(error) if worthwhile(&error) => {
                if !failing {
                    failing = true;
                    warn!("{what}: {}; trying again until it works", chain(&error));
                }
                tokio::time::sleep(backoff.wait()).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// An error and its causes in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let (mut text, mut source) = told(error);
    while let Some(cause) = source {
        let (more, next) = told(cause);
        if !text.contains(&more) {
            let _ = write!(text, ": {more}");
        }
        source = next;
    }
    text
}

fn told<'a>(error: &'a (dyn std::error::Error + 'static)) -> (String, Option<&'a (dyn std::error::Error + 'static)>) {
    match error.downcast_ref::<kube::Error>() {
        // Its own text repeats the whole status in Rust's debug form.
        Some(kube::Error::Api(status)) => (format!("{} ({})", status.message, status.code), None),
        _ => (error.to_string(), error.source()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::BackendError;

    #[test]
    fn an_apiservers_answer_is_told_as_it_said_it() {
        let status = kube::core::Status::failure("pods are forbidden", "Forbidden").with_code(403);
        let error = BackendError { action: "read".to_owned(), source: kube::Error::Api(Box::new(status)) };
        assert_eq!(chain(&error), "cannot read: pods are forbidden (403)");
        assert_eq!(chain(&error.source), "pods are forbidden (403)");
    }

    #[test]
    fn waits_grow_to_a_bound_and_begin_anew() {
        let (first, most) = (Duration::from_millis(100), Duration::from_secs(1));
        let mut backoff = Backoff::new(first, most);
        for full in [100, 200, 400, 800, 1000, 1000].map(Duration::from_millis) {
            let wait = backoff.wait();
            assert!(wait >= full / 2 && wait <= full, "{wait:?} of {full:?}");
        }
        backoff.reset();
        assert!(backoff.wait() <= first);
        assert_eq!(pause(first, most, u32::MAX, 1.0), most);
        assert_eq!(pause(first, most, 1, 0.0), first);
    }
}
