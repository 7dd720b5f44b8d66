//! QUIC on the port's number: the handshake, and the session of who proves to be a node.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn_proto::{EndpointConfig, HashedConnectionIdGenerator, VarInt};
use ring::hmac;
use rustls::ServerConfig;
use skerry_proto::mux::Side;
use skerry_proto::transport::{self, BUSY, Caller, Endpoint};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tracing::{debug, error, info};

use super::http;
use super::places::Place;
use super::{Front, HANDSHAKE_PATIENCE, MAX_HANDSHAKES, Stranger, Wire, session, shake};
use crate::backend::Backend;
use crate::pki::{CaError, CertificateAuthority};
use crate::secrets::SecretStore;
use crate::supervise::Tasks;

/// What a client that cannot be served is closed with; the reason says why.
const REFUSED: VarInt = VarInt::from_u32(1);
/// Clients that wait for a place; half of those that QUIC holds, so that there is always one more to be told that he has to prove his
/// address.
const MAX_WAITERS: usize = MAX_HANDSHAKES / 2;
/// Bytes that came for handshakes that wait to begin.
const MAX_WAITING: u64 = 4 << 20;
/// Between stateless resets, each smaller than what it answers: after a start there may be thousands of connections that are not known.
const RESET_INTERVAL: Duration = Duration::from_millis(1);
/// What the system is asked to hold of what came and what goes, in bytes: thousands of edges share one socket.
const SOCKET_BUFFER: usize = 4 << 20;

/// A socket for QUIC: both families, or IPv4 where there is no IPv6.
pub fn bind(port: u16) -> io::Result<UdpSocket> {
    let both = || {
        let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_only_v6(false)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
        Ok::<_, io::Error>(UdpSocket::from(socket))
    };
    let socket = match both() {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?,
        bound => bound?,
    };
    // The system gives as much as it allows; less costs only retransmissions.
    let _ = SockRef::from(&socket).set_recv_buffer_size(SOCKET_BUFFER);
    let _ = SockRef::from(&socket).set_send_buffer_size(SOCKET_BUFFER);
    Ok(socket)
}

/// QUIC with the TLS of the port. Each cloudcore of a CA, also one that was started anew, can tell an edge that a connection is not known
/// to it (a stateless reset, RFC 9000, 10.3): otherwise only silence would.
pub fn endpoint(socket: UdpSocket, tls: &ServerConfig, authority: &CertificateAuthority) -> Result<Endpoint, CaError> {
    let broken = |error: &dyn std::fmt::Display| CaError::Damaged(error.to_string());
    let mut config = transport::server_config(tls).map_err(|error| broken(&error))?;
    config.max_incoming(MAX_HANDSHAKES).incoming_buffer_size_total(MAX_WAITING);
    let [a, b, c, d, e, f, g, h, ..] = authority.secret_for("QUIC connection IDs");
    let ids = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
    let resets = hmac::Key::new(hmac::HMAC_SHA256, &authority.secret_for("QUIC stateless resets"));
    let mut own = EndpointConfig::new(Arc::new(resets));
    own.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids))).min_reset_interval(RESET_INTERVAL);
    Endpoint::new(own, Some(config), socket).map_err(|error| broken(&error))
}

impl<B: Backend, S: SecretStore> Front<B, S> {
    /// Serves QUIC until told to stop, then lets every session say goodbye, but for no longer than `drain`.
    pub async fn serve_quic(self: Arc<Self>, endpoint: Endpoint, drain: Duration) {
        let mut connections = Tasks::new("quic connection");
        // Whose place is not free yet.
        let mut waiting = VecDeque::new();
        let mut is_broken = false;
        loop {
            let caller = tokio::select! {
                () = self.stop.cancelled() => break,
                () = connections.reap() => continue,
                () = self.handshakes.room(), if !waiting.is_empty() => {
                    if let Some(caller) = waiting.pop_front() {
                        let (front, place) = (Arc::clone(&self), self.handshakes.take());
                        connections.spawn(front.quic_connection(caller, place));
                    }
                    continue;
                }
                caller = endpoint.accept(), if !is_broken => caller,
            };
            let Some(caller) = caller else {
                error!(
                    "the socket of QUIC is broken: nodes come over WebSockets only until cloudcore is started again"
                );
                is_broken = true;
                continue;
            };
            // Whoever sends from an address that is not his own gets no place while places are short, and keeps nobody from hearing so.
            if self.handshakes.taken() + waiting.len() > MAX_HANDSHAKES / 2 && !caller.remote_address_validated() {
                // The client comes again with a token.
                caller.retry();
            } else if waiting.len() < MAX_WAITERS {
                waiting.push_back(caller);
            } else {
                // The client takes it for an answer and comes again later.
                drop(caller);
            }
        }
        drop(waiting);
        endpoint.stop_listening();
        let cut = connections.drain(drain).await;
        if cut > 0 {
            info!(connections = cut, "connections that did not end in time were cut");
        }
        endpoint.close(VarInt::from_u32(0), b"cloudcore is going down");
        let _ = tokio::time::timeout(Duration::from_secs(1), endpoint.wait_idle()).await;
    }

    async fn quic_connection(self: Arc<Self>, caller: Caller, place: Place) {
        let session = Box::pin(session::open(&self, self.open(caller, place))).await;
        if let Some(session) = session {
            session::run(&self, session).await;
        }
    }

    async fn open(self: &Arc<Self>, caller: Caller, place: Place) -> Option<Stranger> {
        let peer = caller.remote_address();
        let connection = match shake(caller.accept(), place).await {
            Ok(connection) => connection,
            Err(what) => {
                self.metrics.handshake_failed();
                debug!(%peer, "no QUIC connection: {what}");
                return None;
            }
        };
        let chain = connection.peer_certificates();
        let certificate = match http::node(chain.as_ref().and_then(|chain| chain.first())) {
            Ok(certificate) => certificate,
            Err(no) => {
                debug!(%peer, reason = no.reason, "refused: {}", no.message);
                connection.close(REFUSED, no.message.as_bytes());
                return None;
            }
        };
        let Ok(request) = Arc::clone(&self.requests).try_acquire_owned() else {
            debug!(%peer, "too many requests at once, the connection is closed");
            connection.close(BUSY, b"too many requests at once");
            return None;
        };
        // A client that allows no streams would hold its place for ever.
        let opening = Wire::over_quic(connection, Side::Cloud, self.metrics.clone());
        let Ok(opened) = tokio::time::timeout(HANDSHAKE_PATIENCE, opening).await else {
            debug!(%peer, "no session: the client allows no streams");
            return None;
        };
        match opened {
            Ok(wire) => Some((wire, certificate, request)),
            Err(end) => {
                debug!(%peer, "no session: {end}");
                None
            }
        }
    }
}
