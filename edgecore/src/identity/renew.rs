//! Keeps the certificate young: at 60 % of its life, give or take, a new key and certificate are fetched; the old ones serve until the
//! new ones are on the disk.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use jiff::Timestamp;
use skerry_proto::payload::JoinResponse;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Identity, IdentityError, pending_key, request};
use crate::clock;
use crate::https::{self, Ask};
use crate::link::backoff::Backoff;
use crate::link::dial::Server;

/// Clocks may jump: the time is looked at this often.
const LOOK: Duration = Duration::from_secs(3600);

/// When a certificate is due: between 54 % and 66 % of its life, so that boxes that joined together do not renew together.
/// `jitter` is from 0 to 1.
pub fn due(identity: &Identity, jitter: f64) -> Timestamp {
    let life =
        Duration::from_secs((identity.not_after.as_second() - identity.not_before.as_second()).max(0).unsigned_abs());
    let after = life.mul_f64(0.54 + 0.12 * jitter.clamp(0.0, 1.0)).as_secs();
    let at = identity.not_before.as_second().saturating_add_unsigned(after);
    Timestamp::from_second(at).unwrap_or(identity.not_after)
}

/// Renews for ever.
pub async fn run(
    data_dir: PathBuf,
    server: Server,
    identity: watch::Sender<Arc<Identity>>,
    shutdown: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_secs(60), LOOK, rand::random());
    let mut jitter: f64 = rand::random();
    loop {
        let current = Arc::clone(&identity.borrow());
        let now = clock::wall();
        let left = due(&current, jitter).as_second() - now.as_second();
        let wait = if left > 0 {
            Duration::from_secs(left.unsigned_abs()).min(LOOK)
        } else {
            match renew(&data_dir, &server, &current).await {
                Ok(renewed) => {
                    info!(until = %renewed.not_after, "the node's certificate was renewed");
                    backoff.reset();
                    jitter = rand::random();
                    identity.send_replace(Arc::new(renewed));
                    continue;
                }
                Err(failed) => {
                    let days = (current.not_after.as_second() - now.as_second()) / 86_400;
                    warn!(error = %failed, days_left = days, "the node's certificate cannot be renewed; it is tried again");
                    backoff.wait()
                }
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// Keys, certificates and their files.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The way to the server, and its answer.
    #[error(transparent)]
    Https(#[from] https::HttpsError),
    /// The answer is not what was asked for.
    #[error("the cloud's answer cannot be read: {0}")]
    Answer(String),
}

/// Renews once, under the old certificate.
pub async fn renew(data_dir: &std::path::Path, server: &Server, current: &Identity) -> Result<Identity, RenewError> {
    let key = pending_key(data_dir)?;
    let body = serde_json::json!({ "csr": request(&current.node, &key)? });
    let body = serde_json::to_vec(&body).map_err(|error| RenewError::Answer(error.to_string()))?;
    let ask = Ask { method: Method::POST, path: "/v1/renew", bearer: None, body };
    let answer = https::ask(server, current.client_config()?, ask).await?;
    let answer: JoinResponse =
        serde_json::from_slice(&answer.body).map_err(|error| RenewError::Answer(error.to_string()))?;
    let (node, ..) = super::describe(&answer.certificate).map_err(IdentityError::Unusable)?;
    if node != current.node {
        return Err(IdentityError::Unusable(format!("it is for node {node}, this is {}", current.node)).into());
    }
    Ok(Identity::install(data_dir, &answer.certificate, &key, &answer.ca)?)
}
