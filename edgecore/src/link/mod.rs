//! The link: keeps one session with cloudcore as long as there is a way to it, and carries between it and the store.
//!
//! It owns the edge's sync machine and decides nothing about content: what the cloud sends goes to the store and is acknowledged when
//! it is durable; what the outbox holds goes up. No other module waits for it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use skerry_proto::streams::{Incoming, Services};
use skerry_proto::sync::{Edge, Op, Reason, ReportKind};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use self::backoff::Backoff;
pub use self::connect::Transport;
use self::connect::{Choice, ConnectError, connect};
use self::dial::Server;
use self::session::{Ended, Session};
pub use self::streams::{OpenError, Streams};
use crate::clock;
use crate::identity::Identity;
use crate::store::{self, Store};

pub mod backoff;
mod connect;
pub mod dial;
pub mod network;
mod session;
mod streams;
#[cfg(test)]
mod tests;

/// Kind of the notes about the node itself.
pub const NODE_NOTES: &str = "node";
/// Key of the note that says that the Node was deleted in the cloud; its value is a [`Deleted`] as JSON.
pub const DELETED_NOTE: &str = "deleted";

/// The first wait after a failure, at most; half of it at least.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest wait between attempts.
const LAST_RETRY: Duration = Duration::from_secs(30);
/// A session that lasted so long was a good one: what ends it is not the same trouble again.
const STEADY: Duration = Duration::from_secs(30);
/// The longest wait that a cloud may ask for.
const MAX_TOLD: Duration = Duration::from_secs(300);
/// Between attempts of a node that was deleted in the cloud.
const DELETED_RETRY: Duration = Duration::from_secs(300);

/// What the cloud asks to be reported once more: a status of this kind, by the UID of what it is about.
pub type ReportWanted = (ReportKind, String);

/// How the link is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Trying for the first time since the start.
    Connecting {
        /// From 1.
        attempt: u32,
        /// What came of the attempt before.
        last_error: Option<String>,
    },
    /// A session stands.
    Online {
        /// Since when.
        since: Timestamp,
        /// Its epoch: another one means another session.
        epoch: u64,
        /// What carries it.
        transport: Transport,
    },
    /// There was a session, there is none now; attempts go on. Or, for want of a certificate, there can be none.
    Offline {
        /// Since when.
        since: Timestamp,
        /// What came of the last attempt, or what ended the session.
        reason: String,
    },
    /// The Node was deleted in the cloud: what ran for it ends.
    Deleted {
        /// The cloud's words.
        message: String,
    },
}

/// The note [`DELETED_NOTE`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Deleted {
    /// The cloud's words.
    pub message: String,
    /// When the node heard of it, seconds since the Unix epoch.
    pub time: i64,
}

/// What the link is made of.
pub struct Link {
    /// Node name.
    pub node: String,
    /// Where cloudcore is.
    pub server: Server,
    /// How it is reached.
    pub transport: Transport,
    /// What it commits to and drains.
    pub store: Store,
    /// Who it is; a renewed identity is used at the next connect.
    pub identity: watch::Receiver<Arc<Identity>>,
    /// Where it puts an identity whose certificate the cloud takes for expired: it is renewed, whatever this box's clock says.
    pub expired: watch::Sender<Option<Arc<Identity>>>,
    /// Where it says what is to be reported once more.
    pub wanted: broadcast::Sender<ReportWanted>,
    /// Who serves the streams that the cloud opens.
    pub services: Services<Incoming>,
    /// Counts up whenever the network may be back; see [`network`].
    pub network: watch::Receiver<u64>,
    /// Where it puts what opens streams of the session that stands.
    pub streams: watch::Sender<Option<skerry_proto::streams::Streams>>,
    /// Where it says how it is.
    pub state: watch::Sender<LinkState>,
    /// Ends it.
    pub shutdown: CancellationToken,
}

impl Link {
    /// Until the shutdown.
    pub async fn run(self) {
        // Whatever becomes of its machines, it is one start of the agent.
        let run = tokio::fs::read_to_string("/proc/sys/kernel/random/uuid").await.unwrap_or_default();
        let mut backoff = Backoff::new(FIRST_RETRY, LAST_RETRY, rand::random());
        let mut edge: Option<(Edge, u64)> = None;
        let mut given = session::Given::default();
        let mut choice = Choice::new(self.transport);
        let mut network = self.network.clone();
        let mut known = *network.borrow();
        let mut restarted = false;
        if let Some(deleted) = self.deleted().await {
            // The end may have come between the note and what follows from it.
            if let Err(failed) = self.wind_down(&deleted.message).await {
                error!(error = %failed, "the node was deleted in the cloud, but its pods cannot be ended yet");
            }
            self.state.send_replace(LinkState::Deleted { message: deleted.message });
        }
        while !self.shutdown.is_cancelled() {
            // A machine whose rows are not those of the store any more is of no use.
            let damaged = *self.store.damaged().borrow();
            if edge.as_ref().is_some_and(|(_, known)| *known != damaged) {
                edge = None;
            }
            let machine = match edge.take() {
                Some((machine, _)) => machine,
                None => match self.machine(run.trim()).await {
                    Ok(machine) => {
                        given = session::Given::default();
                        machine
                    }
                    Err(failed) => {
                        error!(error = %failed, "the store cannot be read, there can be no session");
                        tokio::select! {
                            () = tokio::time::sleep(backoff.wait()) => {}
                            () = self.shutdown.cancelled() => {}
                        }
                        continue;
                    }
                },
            };
            // What happens from here on is news.
            let heard = *network.borrow_and_update();
            if std::mem::replace(&mut known, heard) != heard {
                choice.network_changed();
            }
            let identity = Arc::clone(&self.identity.borrow());
            // What was restarted is not restarted again, or news that do not end would let no attempt come to its end.
            let news = (!restarted).then(|| network.clone());
            let attempt = self.attempt(&identity, machine, damaged, &mut given, &mut choice, news);
            let (outcome, machine) = Box::pin(attempt).await;
            restarted = matches!(outcome, Outcome::Restart);
            edge = machine.map(|machine| (machine, damaged));
            if matches!(outcome, Outcome::Ended { .. }) {
                // Old news, for which the session stood.
                network.mark_unchanged();
            }
            if matches!(outcome, Outcome::Expired(_)) {
                self.expired.send_replace(Some(Arc::clone(&identity)));
            }
            let wait = self.digest(outcome, &mut backoff).await;
            if matches!(*self.state.borrow(), LinkState::Deleted { .. }) {
                edge = None;
            }
            if self.rest(wait, &identity, &mut network).await {
                backoff.reset();
            }
        }
    }

    /// One session, from dialling to its end. The machine comes back unless it is ahead of the store.
    /// `damaged` is the store's damage that the machine knows of; dialling is given up for `news`.
    async fn attempt(
        &self,
        identity: &Identity,
        machine: Edge,
        damaged: u64,
        given: &mut session::Given,
        choice: &mut Choice,
        news: Option<watch::Receiver<u64>>,
    ) -> (Outcome, Option<Edge>) {
        let config = match identity.client_config() {
            Ok(config) => config,
            Err(failed) => {
                return (Outcome::Failed { cause: failed.to_string(), retry_after: None }, Some(machine));
            }
        };
        let connected = tokio::select! {
            connected = connect(&self.server, config, choice) => connected,
            () = changed(news) => {
                debug!("the network may be another one, dialling starts over");
                return (Outcome::Restart, Some(machine));
            }
            () = self.shutdown.cancelled() => return (Outcome::Shutdown, Some(machine)),
        };
        let wire = match connected {
            Ok(wire) => wire,
            Err(ConnectError::Refused(refusal, _)) if refusal.reason == "node_deleted" => {
                return (Outcome::Deleted(refusal.message), Some(machine));
            }
            Err(failed) => {
                let (cause, retry_after) = (failed.to_string(), failed.retry_after());
                return (Outcome::Failed { cause, retry_after }, Some(machine));
            }
        };
        let is_quic = wire.is_quic();
        let begun = clock::monotonic();
        let (ended, machine) = Session::new(self, machine, damaged, wire, given).run().await;
        let lasted = clock::monotonic().saturating_sub(begun);
        let stood = |established: bool| if established { lasted } else { Duration::ZERO };
        if is_quic {
            match ended {
                Ended::Broken { established, silent, .. } => {
                    choice.quic_ended(stood(established), silent, clock::monotonic());
                }
                Ended::Dismissed { established, .. } => {
                    choice.quic_ended(stood(established), false, clock::monotonic());
                }
                Ended::Shutdown => {}
            }
        }
        let outcome = match ended {
            Ended::Shutdown => Outcome::Shutdown,
            Ended::Broken { established, cause, retry_after, .. } => {
                Outcome::Ended { stood: stood(established), cause, retry_after }
            }
            Ended::Dismissed { goodbye, .. } if goodbye.reason() == Reason::NodeDeleted => {
                Outcome::Deleted(goodbye.message)
            }
            Ended::Dismissed { goodbye, .. } if goodbye.reason() == Reason::CertificateExpired => {
                Outcome::Expired(goodbye.message)
            }
            Ended::Dismissed { goodbye, established } => Outcome::Ended {
                stood: stood(established),
                cause: format!("the cloud ended the session ({:?}): {}", goodbye.reason(), goodbye.message),
                retry_after: (goodbye.retry_after_ms > 0).then(|| Duration::from_millis(goodbye.retry_after_ms.into())),
            },
        };
        (outcome, machine)
    }

    /// Says what came of an attempt, and how long to wait before the next.
    async fn digest(&self, outcome: Outcome, backoff: &mut Backoff) -> Wait {
        match outcome {
            Outcome::Shutdown => {
                self.lost("edgecore ends");
                Wait::Told(Duration::ZERO)
            }
            Outcome::Restart => {
                backoff.reset();
                Wait::Told(Duration::ZERO)
            }
            Outcome::Deleted(message) => {
                if let Err(failed) = self.wind_down(&message).await {
                    error!(error = %failed, "the node was deleted in the cloud, which cannot be recorded yet");
                    return Wait::Told(backoff.wait());
                }
                self.state.send_replace(LinkState::Deleted { message });
                backoff.reset();
                Wait::Told(DELETED_RETRY)
            }
            Outcome::Failed { cause, retry_after } => {
                self.lost(&cause);
                self.after_failure(backoff, retry_after)
            }
            Outcome::Expired(cause) => {
                self.lost(&cause);
                self.after_failure(backoff, None)
            }
            Outcome::Ended { stood, cause, retry_after } => {
                self.lost(&cause);
                after_session(backoff, stood, retry_after)
            }
        }
    }

    /// How long to wait where there was no session.
    fn after_failure(&self, backoff: &mut Backoff, retry_after: Option<Duration>) -> Wait {
        if matches!(*self.state.borrow(), LinkState::Deleted { .. }) {
            return Wait::Told(DELETED_RETRY);
        }
        let own = backoff.wait();
        // Everybody is told the same: each waits a little longer, and not all alike.
        retry_after.map_or(Wait::Own(own), |told| Wait::Told(told + own))
    }

    fn lost(&self, cause: &str) {
        let mut told = false;
        self.state.send_if_modified(|state| match state {
            LinkState::Online { .. } => {
                told = true;
                *state = LinkState::Offline { since: clock::wall(), reason: cause.to_owned() };
                true
            }
            LinkState::Offline { reason, .. } if reason != cause => {
                told = true;
                cause.clone_into(reason);
                true
            }
            LinkState::Connecting { attempt, last_error } => {
                told = last_error.as_deref() != Some(cause);
                *last_error = Some(cause.to_owned());
                *attempt = attempt.saturating_add(1);
                true
            }
            LinkState::Offline { .. } | LinkState::Deleted { .. } => false,
        });
        if told {
            warn!(%cause, "no session with the cloud; the pods go on");
        }
    }

    /// A machine that knows what the store holds.
    async fn machine(&self, run: &str) -> Result<Edge, store::Error> {
        let rows = self.store.index().await?;
        let epoch = self.store.epoch().await?;
        let agent = concat!("edgecore ", env!("CARGO_PKG_VERSION"));
        let edge = Edge::new(&self.node, run, self.store.store_id(), agent, epoch, rows);
        Ok(edge.with_revisions(self.store.revisions().await?))
    }

    /// The Node is gone: records it and drops what it wanted, so that the kubelet ends its pods.
    async fn wind_down(&self, message: &str) -> Result<(), store::Error> {
        if self.deleted().await.is_none() {
            error!(message, "this node was deleted in the cloud; its pods are ended");
            let note = Deleted { message: message.to_owned(), time: clock::wall().as_second() };
            let note = serde_json::to_vec(&note).unwrap_or_default();
            self.store.remember(NODE_NOTES, DELETED_NOTE, Bytes::from(note)).await?;
        }
        let rows = self.store.index().await?;
        let gone = rows.into_iter().map(|(collection, entry)| Op::Delete(collection, entry.uid)).collect();
        self.store.apply(gone).await?;
        // Nothing is wanted any more, so that nothing can be missing either, whatever damage takes meanwhile.
        let known = self.store.pods_known();
        while !*known.borrow() {
            let damaged = *self.store.damaged().borrow();
            self.store.set_pods_known(damaged).await?;
        }
        Ok(())
    }

    async fn deleted(&self) -> Option<Deleted> {
        let notes = self.store.notes(NODE_NOTES).await.ok()?;
        let (_, value) = notes.into_iter().find(|(key, _)| key == DELETED_NOTE)?;
        serde_json::from_slice(&value).ok()
    }

    /// The session stands.
    pub(in crate::link) async fn established(
        &self,
        epoch: u64,
        server_time: u64,
        is_quic: bool,
    ) -> Result<(), store::Error> {
        // A disk that is full must not keep the node offline: the cloud's next epoch is greater than its own last one anyway.
        if let Err(failed) = self.store.set_epoch(epoch).await {
            warn!(error = %failed, "the session's epoch cannot be kept");
        }
        if self.deleted().await.is_some() {
            self.store.forget(NODE_NOTES, DELETED_NOTE).await?;
        }
        let now = clock::wall();
        let server = i64::try_from(server_time).unwrap_or(i64::MAX);
        let skew = server.saturating_sub(now.as_millisecond()) / 1000;
        if skew.abs() > 30 {
            warn!(
                seconds = skew,
                "this box's clock differs from the cloud's; set it, or times in statuses and events are wrong"
            );
        }
        let transport = if is_quic { Transport::Quic } else { Transport::WebSocket };
        info!(epoch, %transport, server = %self.server, "in session with the cloud");
        self.state.send_replace(LinkState::Online { since: now, epoch, transport });
        Ok(())
    }

    /// Waits; says whether good news ended it: the network may be back, or there is another identity than the one of the last attempt.
    async fn rest(&self, wait: Wait, used: &Arc<Identity>, network: &mut watch::Receiver<u64>) -> bool {
        let (length, ends_by_news) = match wait {
            Wait::Own(length) => (length, true),
            Wait::Told(length) => (length, false),
        };
        let mut identity = self.identity.clone();
        tokio::select! {
            () = tokio::time::sleep(length) => false,
            () = self.shutdown.cancelled() => false,
            Ok(()) = network.changed(), if ends_by_news => {
                debug!("the network may be back, no more waiting");
                true
            }
            Ok(_) = identity.wait_for(|identity| !Arc::ptr_eq(identity, used)), if ends_by_news => true,
        }
    }
}

/// Waits for the next news, if any come.
async fn changed(news: Option<watch::Receiver<u64>>) {
    if let Some(mut news) = news
        && news.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// How long to wait after a session that stood so long.
fn after_session(backoff: &mut Backoff, stood: Duration, retry_after: Option<Duration>) -> Wait {
    if stood >= STEADY {
        backoff.reset();
    }
    let own = backoff.wait();
    // As after a failure: others are told the same.
    retry_after.map_or(Wait::Own(own), |told| Wait::Told(told.min(MAX_TOLD) + own))
}

/// A pause before the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// For want of anything better: good news end it.
    Own(Duration),
    /// To its end: somebody said so, or it is not the network that fails.
    Told(Duration),
}

enum Outcome {
    Shutdown,
    /// The network changed while it was dialled.
    Restart,
    /// There was no session.
    Failed {
        cause: String,
        /// How long the cloud is not to be asked again.
        retry_after: Option<Duration>,
    },
    /// There was none, and there will be none with this certificate.
    Expired(String),
    Deleted(String),
    Ended {
        /// How long the session stood.
        stood: Duration,
        cause: String,
        retry_after: Option<Duration>,
    },
}
