//! Runs a lifecycle handler once. How long it may take is the caller's business: dropping the future ends the waiting.
//!
//! An HTTP handler asks for an answer, whatever it says; only no answer at all is a failure.

use std::time::Duration;

use k8s_openapi::api::core::v1::{HTTPGetAction, LifecycleHandler};

use super::prober::{Failed, Target, fetch, headers, url};
use super::references::PodEvent;
use crate::runtime::cri::{self, Cri};

const HOOK_AGENT: &str = "kube-lifecycle/1.36";
/// Of a failed command's output.
const OUTPUT_LIMIT: usize = 1 << 10;

/// Why a handler failed.
#[derive(Debug, thiserror::Error)]
#[expect(clippy::error_impl_error, reason = "it is named through its module")]
pub enum Error {
    /// The command ended with an error.
    #[error("command {command:?} exited with {code}: {output}")]
    Exit {
        /// The command.
        command: String,
        /// Its exit code.
        code: i32,
        /// The beginning of its output.
        output: String,
    },
    /// The command could not be run.
    #[error("the command could not be run: {0}")]
    Exec(#[from] cri::Error),
    /// Nobody answered.
    #[error("{0}")]
    Http(String),
    /// Nothing that a handler can be.
    #[error("invalid handler: {0}")]
    Invalid(String),
}

/// Which hook it is, for its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Right after the start.
    PostStart,
    /// Before the stop signal.
    PreStop,
}

impl Hook {
    /// The event of a failure.
    pub fn failed(self, field_path: Option<String>) -> PodEvent {
        let (reason, message) = match self {
            Self::PostStart => ("FailedPostStartHook", "PostStartHook failed"),
            Self::PreStop => ("FailedPreStopHook", "PreStopHook failed"),
        };
        PodEvent { warning: true, reason, message: message.to_owned(), field_path }
    }
}

/// How a handler succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ran {
    /// As it was written.
    AsAsked,
    /// It asked for HTTPS and the peer speaks HTTP.
    OverHttp,
}

impl Ran {
    /// The event that this is worth, if any.
    pub fn event(self, field_path: Option<String>) -> Option<PodEvent> {
        (self == Self::OverHttp).then(|| PodEvent {
            warning: true,
            reason: "LifecycleHTTPFallback",
            message: "request to HTTPS lifecycle hook got HTTP response, retry with HTTP succeeded".to_owned(),
            field_path,
        })
    }
}

/// Runs the handler to its end.
pub async fn run(cri: &Cri, target: &Target<'_>, handler: &LifecycleHandler) -> Result<Ran, Error> {
    if let Some(action) = &handler.exec {
        let command = action.command.as_deref().unwrap_or_default();
        let exec = cri.exec_sync(target.container_id, command, None).await?;
        if exec.exit_code != 0 {
            let output = &exec.output[..exec.output.len().min(OUTPUT_LIMIT)];
            return Err(Error::Exit {
                command: command.join(" "),
                code: exec.exit_code,
                output: String::from_utf8_lossy(output).into_owned(),
            });
        }
        return Ok(Ran::AsAsked);
    }
    if let Some(action) = &handler.http_get {
        return http(target, action).await;
    }
    if let Some(action) = &handler.sleep {
        let seconds = u64::try_from(action.seconds)
            .map_err(|_| Error::Invalid(format!("sleep of {} seconds", action.seconds)))?;
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        return Ok(Ran::AsAsked);
    }
    Err(Error::Invalid("it is neither exec nor httpGet nor sleep".to_owned()))
}

async fn http(target: &Target<'_>, action: &HTTPGetAction) -> Result<Ran, Error> {
    let address = url(target, action).map_err(Error::Invalid)?;
    let headers = headers(action.http_headers.as_deref().unwrap_or_default(), HOOK_AGENT).map_err(Error::Invalid)?;
    match fetch(&address, &headers).await {
        Ok(_) => Ok(Ran::AsAsked),
        Err(Failed::PlainHttp(_)) => {
            let plain = HTTPGetAction { scheme: Some("HTTP".to_owned()), ..action.clone() };
            let address = url(target, &plain).map_err(Error::Invalid)?;
            let mut headers = headers;
            // Credentials that were meant for an encrypted connection.
            headers.remove(hyper::header::AUTHORIZATION);
            match fetch(&address, &headers).await {
                Ok(_) => Ok(Ran::OverHttp),
                Err(error) => Err(Error::Http(error.to_string())),
            }
        }
        Err(error) => Err(Error::Http(error.to_string())),
    }
}

#[cfg(test)]
mod tests;
