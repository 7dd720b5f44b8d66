//! Keeps the certificate young: at 60 % of its life, give or take, a new key and certificate are fetched; the old ones serve until the
//! new ones are on the disk.
//!
//! This box's clock may be wrong, and may be set at any time. Once the cloud has told the time, that is gone by; and a certificate that
//! the cloud takes for expired is renewed whatever any clock says.

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
/// Between two renewals at least, whatever the certificates and the clocks say: one of no life, or one that the cloud takes for expired as
/// soon as it has signed it, must not be renewed without end.
const FLOOR: Duration = Duration::from_secs(60);

/// When a certificate is due: between 54 % and 66 % of its life, so that boxes that joined together do not renew together.
/// `jitter` is from 0 to 1.
pub fn due(identity: &Identity, jitter: f64) -> Timestamp {
    let life =
        Duration::from_secs((identity.not_after.as_second() - identity.not_before.as_second()).max(0).unsigned_abs());
    let after = life.mul_f64(0.54 + 0.12 * jitter.clamp(0.0, 1.0)).as_secs();
    let at = identity.not_before.as_second().saturating_add_unsigned(after);
    Timestamp::from_second(at).unwrap_or(identity.not_after)
}

/// Renews for ever: when it is time, and when an identity comes through `expired` that the cloud takes for expired.
pub async fn run(
    data_dir: PathBuf,
    server: Server,
    identity: watch::Sender<Arc<Identity>>,
    mut expired: watch::Receiver<Option<Arc<Identity>>>,
    shutdown: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_secs(60), LOOK, rand::random());
    let mut jitter: f64 = rand::random();
    // The cloud's time, and this machine's at that moment.
    let mut told: Option<(i64, Duration)> = None;
    let mut complaint = String::new();
    // When the last renewal was, by this machine's uptime.
    let mut renewed: Option<Duration> = None;
    loop {
        let current = Arc::clone(&identity.borrow());
        let now = cloud_time(told, clock::monotonic()).unwrap_or_else(|| clock::wall().as_second());
        let left = due(&current, jitter).as_second() - now;
        let refused = expired.borrow_and_update().as_ref().is_some_and(|expired| Arc::ptr_eq(expired, &current));
        let wait = wait(left, refused, renewed.map(|at| clock::monotonic().saturating_sub(at)));
        let wait = if wait > Duration::ZERO {
            wait
        } else {
            match renew(&data_dir, &server, &current).await {
                Ok((fresh, time)) => {
                    info!(until = %fresh.not_after, "the node's certificate was renewed");
                    backoff.reset();
                    jitter = rand::random();
                    complaint.clear();
                    told = Some((time, clock::monotonic()));
                    renewed = Some(clock::monotonic());
                    identity.send_replace(Arc::new(fresh));
                    Duration::ZERO
                }
                Err(failed) => {
                    let days = (current.not_after.as_second() - now) / 86_400;
                    let failed = failed.to_string();
                    // Every session that is refused asks for it again.
                    if failed != complaint {
                        warn!(error = %failed, days_left = days, "the node's certificate cannot be renewed; it is tried again");
                        complaint = failed;
                    }
                    backoff.wait()
                }
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            Ok(()) = expired.changed() => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// How long to wait before it is renewed, or looked at again: it is due in so many seconds, or the cloud refused it, and the last renewal
/// was so long ago.
fn wait(left: i64, refused: bool, ago: Option<Duration>) -> Duration {
    let floor = ago.map_or(Duration::ZERO, |ago| FLOOR.saturating_sub(ago));
    let due = if left > 0 && !refused { Duration::from_secs(left.unsigned_abs()).min(LOOK) } else { Duration::ZERO };
    due.max(floor)
}

/// What time it is in the cloud, seconds since the Unix epoch, if it ever told.
fn cloud_time(told: Option<(i64, Duration)>, now: Duration) -> Option<i64> {
    let (time, at) = told?;
    Some(time.saturating_add_unsigned(now.saturating_sub(at).as_secs()))
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

/// Renews once, under the old certificate; gives the cloud's time, too, in seconds since the Unix epoch.
pub async fn renew(
    data_dir: &std::path::Path,
    server: &Server,
    current: &Identity,
) -> Result<(Identity, i64), RenewError> {
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
    Ok((Identity::install(data_dir, &answer.certificate, &key, &answer.ca)?, answer.time))
}

#[cfg(test)]
mod tests {
    use skerry_proto::payload::Refusal;

    use super::*;
    use crate::enroll::tests::{FakeCloud, Reply};
    use crate::identity::tests::identity_of;

    #[test]
    fn the_cloud_s_time_goes_by_with_this_machine() {
        let seconds = Duration::from_secs;
        assert_eq!(cloud_time(None, seconds(5)), None);
        assert_eq!(cloud_time(Some((1_000_000, seconds(100))), seconds(100)), Some(1_000_000));
        assert_eq!(cloud_time(Some((1_000_000, seconds(100))), seconds(3700)), Some(1_003_600));
        assert_eq!(cloud_time(Some((i64::MAX, seconds(0))), seconds(1)), Some(i64::MAX));
    }

    #[test]
    fn a_certificate_of_no_life_is_not_renewed_without_end() {
        let seconds = Duration::from_secs;
        assert_eq!(wait(10, false, None), seconds(10));
        assert_eq!(wait(i64::MAX, false, None), LOOK);
        assert_eq!(wait(1, false, Some(seconds(1))), seconds(59), "of a life of seconds");
        for (left, refused) in [(0, false), (-5, false), (i64::MIN, false), (10, true), (i64::MAX, true)] {
            assert_eq!(wait(left, refused, None), Duration::ZERO, "at once after a start");
            assert_eq!(wait(left, refused, Some(seconds(0))), FLOOR);
            assert_eq!(wait(left, refused, Some(seconds(59))), seconds(1));
            assert_eq!(wait(left, refused, Some(seconds(3600))), Duration::ZERO);
        }
    }

    #[tokio::test]
    async fn what_the_cloud_takes_for_expired_is_renewed_whatever_the_clock_says() {
        let dir = tempfile::tempdir().unwrap();
        let cloud = FakeCloud::new().await;
        let identity = identity_of(&cloud.authority, "box", dir.path());
        assert!(due(&identity, 1.0) > clock::wall(), "by this box's clock it is young");
        // The key is kept until it has its certificate, so the answer can be made before it is asked for.
        let csr = request("box", &pending_key(dir.path()).unwrap()).unwrap();
        let answer = JoinResponse {
            certificate: cloud.authority.sign("box", &csr),
            ca: cloud.authority.pem(),
            time: 1_900_000_000,
        };
        let no = Refusal { reason: "apiserver_unavailable".to_owned(), message: "later".to_owned() };
        cloud.reply([
            Reply::Raw(503, serde_json::to_string(&no).unwrap()),
            Reply::Raw(200, serde_json::to_string(&answer).unwrap()),
        ]);
        let (sender, mut seen) = watch::channel(Arc::new(identity));
        let old = Arc::clone(&seen.borrow_and_update());
        let (expired, expired_seen) = watch::channel(None);
        let stop = CancellationToken::new();
        let renewal = crate::supervise::spawn(
            "renewal",
            run(dir.path().to_owned(), cloud.server.clone(), sender, expired_seen, stop.clone()),
        );
        let quiet = tokio::time::timeout(Duration::from_millis(200), seen.changed()).await;
        assert!(quiet.is_err(), "it is not due");
        // The first time the cloud cannot; each session that is refused asks again.
        while seen.has_changed().is_ok_and(|changed| !changed) {
            expired.send_replace(Some(Arc::clone(&old)));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let new = Arc::clone(&seen.borrow_and_update());
        assert_ne!(new.certificate, old.certificate);
        assert_eq!(Identity::load(dir.path()).unwrap().unwrap().certificate, new.certificate);
        // The old one is old news.
        expired.send_replace(Some(old));
        let quiet = tokio::time::timeout(Duration::from_millis(200), seen.changed()).await;
        assert!(quiet.is_err(), "it is renewed once");
        stop.cancel();
        renewal.await.unwrap();
    }
}
