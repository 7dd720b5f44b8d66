//! The one port: TLS over TCP with the endpoints for joining and sessions on WebSockets, and QUIC on the same number with sessions.
//!
//! Whoever connects is a stranger until a certificate of our CA says otherwise: handshakes, requests and their sizes are bounded, and
//! a client that is slow or sends garbage costs one task and a few kilobytes for some seconds.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use rustls::ServerConfig;
use rustls::server::NoServerSessionStorage;
use skerry_proto::mux::{Class, Side};
use skerry_proto::streams::{Incoming, Services, Streams};
use skerry_proto::transport::{self, TLS_BUFFER, UNSENT};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::places::{Place, Places};
use crate::backend::{Backend, NodeCheck, NodeIdentity};
use crate::metrics::{Metrics, Queues};
use crate::pki::{CaError, CurrentAuthority, NodeCertificate, ServerCertificate};
use crate::registry::Sessions;
use crate::retry::{Backoff, chain};
use crate::secrets::SecretStore;
use crate::supervise::Tasks;
use crate::token::JoinTokens;

mod http;
mod join;
pub(crate) mod places;
pub mod quic;
mod session;
#[cfg(test)]
mod tests;

/// How this program calls itself to edges.
pub const AGENT: &str = concat!("cloudcore ", env!("CARGO_PKG_VERSION"));

const MAX_SESSIONS: usize = 100_000;
/// Connections that have not said a word. Who means it speaks at once: whoever has been silent longest gives way at once.
const MAX_SILENT: usize = if cfg!(test) { 8 } else { 1024 };
/// Handshakes at once. One that has begun is not waited for when others do, once it has had [`HANDSHAKE_GRACE`].
const MAX_HANDSHAKES: usize = if cfg!(test) { 8 } else { 512 };
const HANDSHAKE_GRACE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 3 });
/// Connections past the handshake of those who showed a node's certificate, and have no session yet.
const MAX_REQUESTS: usize = 4096;
/// Connections past the handshake of those who showed none, whom joining takes a second: they do not keep nodes out, and among each other
/// whoever has been here longest gives way, once he has had [`STRANGER_GRACE`].
const MAX_STRANGERS: usize = if cfg!(test) { 8 } else { 512 };
const STRANGER_GRACE: Duration = Duration::from_secs(if cfg!(test) { 3600 } else { 5 });
/// How long being told to come again may take.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
const MAX_JOINS: usize = 64;
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);

/// A session's connection.
type Wire = transport::Wire<http::Carried, Metrics>;
/// A node that wants a session, and its place among those who have none yet.
type Stranger = (Wire, NodeCertificate, OwnedSemaphorePermit);

/// Everything that a connection may need.
pub struct Front<B, S> {
    backend: B,
    authority: Arc<CurrentAuthority>,
    tokens: JoinTokens<S>,
    sessions: Sessions,
    services: Services<(NodeIdentity, Incoming)>,
    metrics: Metrics,
    joins: Semaphore,
    handshakes: Places,
    strangers: Places,
    requests: Arc<Semaphore>,
    stop: CancellationToken,
}

impl<B: Backend, S: SecretStore> Front<B, S> {
    /// Ends its sessions when `stop` is cancelled.
    pub fn new(
        backend: B,
        authority: Arc<CurrentAuthority>,
        tokens: JoinTokens<S>,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Self {
        let sessions = Sessions::new(MAX_SESSIONS);
        Self {
            backend,
            authority,
            tokens,
            sessions,
            services: Services::default(),
            metrics,
            joins: Semaphore::new(MAX_JOINS),
            handshakes: Places::new(MAX_HANDSHAKES, HANDSHAKE_GRACE),
            strangers: Places::new(MAX_STRANGERS, STRANGER_GRACE),
            requests: Arc::new(Semaphore::new(MAX_REQUESTS)),
            stop,
        }
    }

    /// The streams of this class that edges open come here; one more than `waiting` that nobody has taken is refused.
    pub fn serve_streams(&mut self, class: Class, waiting: usize) -> mpsc::Receiver<(NodeIdentity, Incoming)> {
        self.services.serve(class, waiting)
    }

    /// What opens streams on a node's session, if it has one.
    pub fn streams(&self, node: &str) -> Option<Streams> {
        self.sessions.streams(node)
    }

    /// Makes known to a registry what waits in its sessions.
    pub fn count_queues(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(Queues(self.sessions.clone())));
    }

    /// What is behind it.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Serves TCP until told to stop, then says goodbye to every session, but for no longer than `drain`.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, tls: Arc<ServerConfig>, drain: Duration) {
        let acceptor = TlsAcceptor::from(tls);
        let silent = Places::new(MAX_SILENT, Duration::ZERO);
        let mut connections = Tasks::new("connection");
        let mut trouble = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => break,
                () = connections.reap() => continue,
                // What is not accepted waits in the kernel.
                accepted = async { self.handshakes.room().await; silent.room().await; listener.accept().await } => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, mostly: connections that end give some back.
                    warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(trouble.wait()).await;
                    continue;
                }
            };
            trouble.reset();
            let (front, acceptor, silent) = (Arc::clone(&self), acceptor.clone(), silent.take());
            connections.spawn(front.connection(stream, acceptor, silent));
        }
        drop(listener);
        let cut = connections.drain(drain).await;
        if cut > 0 {
            info!(connections = cut, "connections that did not end in time were cut");
        }
    }

    /// Ends the sessions of nodes that are deleted, until told to stop.
    pub async fn watch_deletions(self: Arc<Self>) {
        let mut deletions = self.backend.deletions();
        loop {
            let deleted = tokio::select! {
                () = self.stop.cancelled() => return,
                deleted = deletions.recv() => deleted,
            };
            match deleted {
                Ok(node) => self.sessions.node_deleted(&node),
                Err(RecvError::Lagged(_)) => self.check_all().await,
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// Asks for every node that has a session, because deletions were missed.
    async fn check_all(&self) {
        for node in self.sessions.nodes() {
            let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
            loop {
                match self.backend.check(&node).await {
                    Ok(NodeCheck::Live { .. }) => break,
                    Ok(NodeCheck::Deleted | NodeCheck::OtherUid) => {
                        self.sessions.node_deleted(&node);
                        break;
                    }
                    Err(error) => debug!(node = node.name, "cannot check the node: {}", chain(&error)),
                }
                tokio::select! {
                    () = self.stop.cancelled() => return,
                    () = tokio::time::sleep(backoff.wait()) => {}
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, acceptor: TlsAcceptor, silent: Place) {
        // What it takes to get there is gone before the session begins, which lives long.
        let session = Box::pin(session::open(&self, self.upgrade(stream, acceptor, silent))).await;
        if let Some(session) = session {
            session::run(&self, session).await;
        }
    }

    /// Serves what is asked for; a session if it is that.
    async fn upgrade(self: &Arc<Self>, stream: TcpStream, acceptor: TlsAcceptor, silent: Place) -> Option<Stranger> {
        let peer = stream.peer_addr().map_or_else(|_| "unknown".to_owned(), |address| address.to_string());
        // Small frames go at once, and urgent ones soon; a failure only costs time.
        let _ = stream.set_nodelay(true);
        let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT);
        let tls = match handshake(stream, acceptor, silent, &self.handshakes).await {
            Ok(mut tls) => {
                tls.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
                tls
            }
            Err(what) => {
                self.metrics.handshake_failed();
                debug!(peer, "no TLS connection: {what}");
                return None;
            }
        };
        let Some(certificate) = tls.get_ref().1.peer_certificates().and_then(<[_]>::first).cloned() else {
            // No session comes of it.
            if self.strangers.has_room() {
                let mut place = self.strangers.take();
                tokio::select! {
                    _ = http::serve(Arc::clone(self), tls, None, peer) => {}
                    () = place.evicted() => {}
                }
            } else {
                debug!(peer, "too many requests at once");
                self.put_off(tls).await;
            }
            return None;
        };
        let Ok(request) = Arc::clone(&self.requests).try_acquire_owned() else {
            debug!(peer, "too many requests at once");
            self.put_off(tls).await;
            return None;
        };
        let (websocket, certificate) = http::serve(Arc::clone(self), tls, Some(certificate), peer).await?;
        Some((Wire::over_websocket(websocket, Side::Cloud, self.metrics.clone()), certificate, request))
    }

    /// Tells a client to come again, whatever he wants. It takes a place among the handshakes, which are many and short.
    async fn put_off(&self, tls: TlsStream<TcpStream>) {
        let mut place = self.handshakes.take();
        tokio::select! {
            () = http::busy(tls) => {}
            () = place.evicted() => {}
            () = tokio::time::sleep(BUSY_PATIENCE) => {}
        }
    }
}

/// The TLS side of the port: our certificate, and client certificates of our CA for those who have one.
pub fn tls(
    authority: Arc<CurrentAuthority>,
    certificate: Arc<ServerCertificate>,
) -> Result<Arc<ServerConfig>, CaError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| CaError::Damaged(error.to_string()))?
        .with_client_cert_verifier(authority)
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // Every connection proves its certificate anew, and 10,000 edges leave nothing behind.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Waits for the first byte, then carries out the handshake; `Err` says why there is none.
async fn handshake(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    mut silent: Place,
    handshakes: &Places,
) -> Result<TlsStream<TcpStream>, String> {
    tokio::select! {
        readable = stream.readable() => readable.map_err(|error| error.to_string())?,
        () = silent.evicted() => return Err("silent while others came".to_owned()),
        () = tokio::time::sleep(HANDSHAKE_PATIENCE) => return Err("silent".to_owned()),
    }
    let place = handshakes.take();
    drop(silent);
    shake(acceptor.accept(stream), place).await
}

/// Carries out a handshake for as long as it has its place.
async fn shake<T, E: Display>(handshake: impl Future<Output = Result<T, E>>, mut place: Place) -> Result<T, String> {
    tokio::select! {
        shaken = handshake => shaken.map_err(|error| format!("the handshake failed: {error}")),
        () = place.evicted() => Err("the handshake took too long while others waited".to_owned()),
        () = tokio::time::sleep(HANDSHAKE_PATIENCE) => Err("the handshake took too long".to_owned()),
    }
}

/// What a log line calls a node.
fn shown(node: &NodeIdentity) -> String {
    format!("{} ({})", node.name, node.uid)
}
