//! A UDP socket and the connections on it.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use quinn_proto::{
    ClientConfig, ConnectError, ConnectionError, ConnectionEvent, ConnectionHandle, DatagramEvent, EcnCodepoint,
    EndpointConfig, EndpointEvent, ServerConfig, Transmit, TransportError, TransportErrorCode, VarInt,
};
use quinn_udp::{BATCH_SIZE, RecvMeta, UdpSocketState};
use tokio::io::Interest;
use tokio::sync::Notify;

use super::connection::{Connection, Line};

/// Reads of the socket, of a batch each, before others have their turn.
const ROUNDS: usize = 8;
/// Datagrams that are handed to the system at once, as far as it can.
const MAX_SEGMENTS: usize = 10;

/// A UDP socket and the QUIC connections on it (RFC 9000). It lives until nobody holds it and the last connection is gone.
#[derive(Debug)]
pub struct Endpoint(Arc<Shared>);

/// What the connections of an endpoint share.
pub(super) struct Shared {
    io: tokio::net::UdpSocket,
    udp: UdpSocketState,
    state: Mutex<State>,
    /// Somebody wants a connection, or nobody can have one any more.
    arrival: Notify,
    /// The last connection is gone, or who held the endpoint.
    idle: Notify,
}

struct State {
    quic: quinn_proto::Endpoint,
    connections: HashMap<ConnectionHandle, Arc<Line>>,
    /// Who wants a connection; how many that are is bounded by [`ServerConfig::max_incoming`].
    incoming: VecDeque<quinn_proto::Incoming>,
    /// Nobody gets a connection any more.
    closed: bool,
    /// An [`Endpoint`] is held.
    held: bool,
}

/// Somebody who wants a connection. Letting go of it refuses him.
#[derive(Debug)]
pub struct Caller {
    /// Until it is decided.
    quic: Option<quinn_proto::Incoming>,
    address: SocketAddr,
    endpoint: Arc<Shared>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Shared").field(&self.io).finish_non_exhaustive()
    }
}

impl Endpoint {
    /// On a socket that is bound. With `server`, clients may come.
    pub fn new(config: EndpointConfig, server: Option<ServerConfig>, socket: UdpSocket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let udp = UdpSocketState::new((&socket).into())?;
        let quic = quinn_proto::Endpoint::new(Arc::new(config), server.map(Arc::new), !udp.may_fragment(), None);
        let state = State { quic, connections: HashMap::new(), incoming: VecDeque::new(), closed: false, held: true };
        let shared = Arc::new(Shared {
            io: tokio::net::UdpSocket::from_std(socket)?,
            udp,
            state: Mutex::new(state),
            arrival: Notify::new(),
            idle: Notify::new(),
        });
        #[expect(
            clippy::disallowed_methods,
            reason = "it ends with the last connection; what is wrong each of them says"
        )]
        tokio::spawn(Arc::clone(&shared).read());
        Ok(Self(shared))
    }

    /// On a new socket of this address, to connect from.
    pub fn client(local: SocketAddr) -> io::Result<Self> {
        Self::new(EndpointConfig::default(), None, UdpSocket::bind(local)?)
    }

    /// The socket's address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.io.local_addr()
    }

    /// Begins a connection; what is returned waits until it stands.
    pub fn connect(
        &self,
        config: ClientConfig,
        remote: SocketAddr,
        server_name: &str,
    ) -> Result<impl Future<Output = Result<Connection, ConnectionError>> + use<>, ConnectError> {
        let mut state = self.0.state();
        if state.closed {
            return Err(ConnectError::EndpointStopping);
        }
        let (handle, quic) = state.quic.connect(now(), config, remote, server_name)?;
        let connection = state.add(&self.0, handle, quic);
        Ok(connection.established())
    }

    /// The next one who wants a connection; none any more when the endpoint is closed or its socket broken. Cancel safe.
    pub async fn accept(&self) -> Option<Caller> {
        loop {
            let arrival = self.0.arrival.notified();
            {
                let mut state = self.0.state();
                if let Some(quic) = state.incoming.pop_front() {
                    let address = quic.remote_address();
                    return Some(Caller { quic: Some(quic), address, endpoint: Arc::clone(&self.0) });
                }
                if state.closed {
                    return None;
                }
            }
            arrival.await;
        }
    }

    /// From here on whoever comes hears nothing, as if nobody was here.
    pub fn ignore_new(&self) {
        self.0.state().quic.set_server_config(None);
    }

    /// Closes every connection and refuses new ones.
    pub fn close(&self, code: VarInt, reason: &[u8]) {
        self.0.close_all(|line| line.close(code, Bytes::copy_from_slice(reason)));
    }

    /// Waits until no connection is left, also none that is only waiting for stragglers after its end.
    pub async fn wait_idle(&self) {
        self.0.until(|state| state.connections.is_empty()).await;
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.0.state().held = false;
        self.0.idle.notify_waiters();
    }
}

impl Caller {
    /// Where he seems to be.
    pub fn remote_address(&self) -> SocketAddr {
        self.address
    }

    /// Whether he has shown that he receives what is sent there.
    pub fn remote_address_validated(&self) -> bool {
        self.quic.as_ref().is_some_and(quinn_proto::Incoming::remote_address_validated)
    }

    /// The connection, when it stands.
    pub async fn accept(mut self) -> Result<Connection, ConnectionError> {
        let connection = {
            let mut state = self.endpoint.state();
            // Whoever is left when the endpoint is closed is refused.
            let Some(quic) = self.quic.take_if(|_| !state.closed) else { return Err(ConnectionError::LocallyClosed) };
            let mut answer = Vec::new();
            match state.quic.accept(quic, now(), &mut answer, None) {
                Ok((handle, quic)) => state.add(&self.endpoint, handle, quic),
                Err(error) => {
                    if let Some(transmit) = error.response {
                        self.endpoint.respond(&transmit, &answer);
                    }
                    return Err(error.cause);
                }
            }
        };
        connection.established().await
    }

    /// Has him show first that he receives what is sent to his address (RFC 9000, 8.1.2). Who has done so is refused.
    pub fn retry(mut self) {
        let Some(quic) = self.quic.take() else { return };
        let mut answer = Vec::new();
        let mut state = self.endpoint.state();
        match state.quic.retry(quic, &mut answer) {
            Ok(transmit) => self.endpoint.respond(&transmit, &answer),
            Err(error) => self.endpoint.refuse(&mut state, error.into_incoming()),
        }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        if let Some(quic) = self.quic.take() {
            self.endpoint.refuse(&mut self.endpoint.state(), quic);
        }
    }
}

impl State {
    fn add(&mut self, endpoint: &Arc<Shared>, handle: ConnectionHandle, quic: quinn_proto::Connection) -> Connection {
        let connection = Connection::begin(Arc::clone(endpoint), handle, quic);
        self.connections.insert(handle, Arc::clone(connection.line()));
        connection
    }
}

impl Drop for State {
    fn drop(&mut self) {
        for incoming in self.incoming.drain(..) {
            self.quic.ignore(incoming);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Whoever panicked while he held it is gone with his connection; the others' state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands connections what comes for them, until nobody needs it.
    async fn read(self: Arc<Self>) {
        let size = usize::from(u16::MAX).min(self.largest() * self.udp.gro_segments());
        let mut buffer = vec![0; size * BATCH_SIZE];
        let mut unused = pin!(self.until(|state| !state.held && state.connections.is_empty()));
        let broken = loop {
            let readable = tokio::select! {
                () = &mut unused => return,
                readable = self.io.readable() => readable,
            };
            if let Err(error) = readable {
                break error;
            }
            match self.read_some(&mut buffer, size) {
                Ok(true) => {}
                Ok(false) => tokio::task::yield_now().await,
                Err(error) => break error,
            }
        };
        let broken = TransportError {
            code: TransportErrorCode::INTERNAL_ERROR,
            frame: None,
            reason: format!("the socket cannot be read: {broken}"),
        };
        self.close_all(|line| line.lose(ConnectionError::TransportError(broken.clone())));
    }

    /// Whether that was all.
    fn read_some(&self, buffer: &mut [u8], size: usize) -> io::Result<bool> {
        for _ in 0..ROUNDS {
            let mut metas = [RecvMeta::default(); BATCH_SIZE];
            let mut parts = buffer.chunks_mut(size).map(IoSliceMut::new);
            let mut parts: [_; BATCH_SIZE] =
                std::array::from_fn(|_| parts.next().unwrap_or_else(|| IoSliceMut::new(&mut [])));
            let read = || self.udp.recv((&self.io).into(), &mut parts, &mut metas);
            match self.io.try_io(Interest::READABLE, read) {
                Ok(count) => {
                    self.hear(parts.iter().zip(&metas).take(count).map(|(part, meta)| (&part[..meta.len], meta)))
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                // It says something of one peer, or of who wants to be one.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn hear<'a>(&self, came: impl Iterator<Item = (&'a [u8], &'a RecvMeta)>) {
        let now = now();
        let mut state = self.state();
        let mut answer = Vec::new();
        for (bytes, meta) in came {
            let mut bytes = BytesMut::from(bytes);
            let ecn = meta.ecn.and_then(|ecn| EcnCodepoint::from_bits(ecn as u8));
            while !bytes.is_empty() {
                let datagram = bytes.split_to(meta.stride.min(bytes.len()));
                answer.clear();
                match state.quic.handle(now, meta.addr, meta.dst_ip, ecn, datagram, &mut answer) {
                    Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                        if let Some(line) = state.connections.get(&handle) {
                            line.inbox.push(event);
                        }
                    }
                    Some(DatagramEvent::NewConnection(incoming)) if state.closed => self.refuse(&mut state, incoming),
                    Some(DatagramEvent::NewConnection(incoming)) => {
                        state.incoming.push_back(incoming);
                        self.arrival.notify_one();
                    }
                    Some(DatagramEvent::Response(transmit)) => self.respond(&transmit, &answer),
                    None => {}
                }
            }
        }
    }

    /// The largest datagram that is understood, in bytes.
    fn largest(&self) -> usize {
        usize::try_from(self.state().quic.config().get_max_udp_payload_size()).unwrap_or(usize::MAX)
    }

    fn refuse(&self, state: &mut State, incoming: quinn_proto::Incoming) {
        let mut answer = Vec::new();
        let transmit = state.quic.refuse(incoming, &mut answer);
        self.respond(&transmit, &answer);
    }

    /// Sends what belongs to no connection, if the system takes it now: who does not hear it asks again.
    fn respond(&self, transmit: &Transmit, bytes: &[u8]) {
        let _ = self.send(transmit, bytes);
    }

    /// [`io::ErrorKind::WouldBlock`] is the only error: whatever else goes wrong is as a datagram that was lost on its way.
    pub(super) fn send(&self, transmit: &Transmit, bytes: &[u8]) -> io::Result<()> {
        let transmit = quinn_udp::Transmit {
            destination: transmit.destination,
            ecn: transmit.ecn.and_then(|ecn| quinn_udp::EcnCodepoint::from_bits(ecn as u8)),
            contents: &bytes[..transmit.size],
            segment_size: transmit.segment_size,
            src_ip: transmit.src_ip,
        };
        self.io.try_io(Interest::WRITABLE, || self.udp.send((&self.io).into(), &transmit))
    }

    pub(super) async fn writable(&self) {
        // What is wrong with it the reader finds.
        let _ = self.io.writable().await;
    }

    /// Datagrams that may be sent at once.
    pub(super) fn segments(&self) -> usize {
        self.udp.max_gso_segments().min(MAX_SEGMENTS)
    }

    /// What a connection says to its endpoint, which may have an answer for it.
    pub(super) fn tell(&self, handle: ConnectionHandle, event: EndpointEvent) -> Option<ConnectionEvent> {
        let mut state = self.state();
        if event.is_drained() && state.connections.remove(&handle).is_some() && state.connections.is_empty() {
            self.idle.notify_waiters();
        }
        state.quic.handle_event(handle, event)
    }

    fn close_all(&self, close: impl Fn(&Line)) {
        let lines: Vec<_> = {
            let mut state = self.state();
            state.closed = true;
            let refused: Vec<_> = state.incoming.drain(..).collect();
            for incoming in refused {
                self.refuse(&mut state, incoming);
            }
            state.connections.values().cloned().collect()
        };
        self.arrival.notify_one();
        lines.iter().for_each(|line| close(line));
    }

    async fn until(&self, is_so: impl Fn(&State) -> bool) {
        loop {
            let mut idle = pin!(self.idle.notified());
            idle.as_mut().enable();
            if is_so(&self.state()) {
                return;
            }
            idle.await;
        }
    }
}

/// The clock of timers and of QUIC.
pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
