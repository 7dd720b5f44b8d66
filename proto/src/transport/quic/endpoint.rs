//! A UDP socket and the connections on it.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn_proto::{
    ClientConfig, ConnectError, ConnectionError, ConnectionEvent, ConnectionHandle, DatagramEvent, EcnCodepoint,
    EndpointConfig, EndpointEvent, ServerConfig, Transmit, TransportError, TransportErrorCode, VarInt,
};
use quinn_udp::{BATCH_SIZE, RecvMeta, UdpSocketState};
use tokio::io::Interest;
use tokio::sync::Notify;

use super::connection::{Connection, Line};
use super::tls;

/// Messages that are read before others have their turn, of which the system may have put many datagrams into one: fewer, and what comes fast
/// is lost where there is much else to do.
const TURN: usize = 8 * BATCH_SIZE;
/// What a client reads at once: one part, of datagrams of one sender. A batch of parts takes 2 MB, which malloc maps, and gives back, the first
/// time alone: for the next one it has a heap of that size, and clears all of it.
const CLIENT_ROOM: usize = 64 << 10;
/// Reads in a row that fail before there is a pause. An error that says something of a datagram that was sent, or of the way it took, is
/// said once.
const FAILURES: usize = 16;
/// How long it is.
const PAUSE: Duration = Duration::from_millis(50);
/// For so long they fail until the socket counts as broken: a system may be short of memory for a moment.
const BROKEN_AFTER: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
/// Datagrams that are handed to the system at once, as far as it can.
const MAX_SEGMENTS: usize = 10;

/// A UDP socket and the QUIC connections on it (RFC 9000). Who lets go of it ends none of them: the socket goes with the last one.
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

/// Reads the socket.
struct Reader {
    shared: Arc<Shared>,
    /// Bytes that it reads at once, if there are more than of one part.
    room: usize,
}

/// Somebody who wants a connection. Letting go of it refuses him.
#[derive(Debug)]
pub struct Caller {
    /// Until it is decided. Boxed: it is large, and what takes it may live as long as the connection.
    quic: Option<Box<quinn_proto::Incoming>>,
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
    pub fn new(mut config: EndpointConfig, server: Option<ServerConfig>, socket: UdpSocket) -> io::Result<Self> {
        // What the cloud's TLS speaks; others are told.
        config.supported_versions(vec![tls::V1]);
        socket.set_nonblocking(true)?;
        let udp = UdpSocketState::new((&socket).into())?;
        let room = if server.is_some() { usize::MAX } else { CLIENT_ROOM };
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
        tokio::spawn(Reader { shared: Arc::clone(&shared), room }.read());
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
        let line = {
            let mut state = self.0.state();
            if state.closed {
                return Err(ConnectError::EndpointStopping);
            }
            let (handle, quic) = state.quic.connect(now(), config, remote, server_name)?;
            state.add(&self.0, handle, quic)
        };
        Ok(Connection::begin(line).established())
    }

    /// The next one who wants a connection; none any more when the endpoint is closed or its socket broken. Cancel safe.
    pub async fn accept(&self) -> Option<Caller> {
        loop {
            let arrival = self.0.arrival.notified();
            {
                let mut state = self.0.state();
                if let Some(quic) = state.incoming.pop_front() {
                    let address = quic.remote_address();
                    return Some(Caller { quic: Some(Box::new(quic)), address, endpoint: Arc::clone(&self.0) });
                }
                if state.closed {
                    return None;
                }
            }
            arrival.await;
        }
    }

    /// From here on nobody comes: who waits is refused, and who comes gets no handshake, as if nobody listened.
    pub fn stop_listening(&self) {
        let mut state = self.0.state();
        state.quic.set_server_config(None);
        self.0.refuse_waiting(&mut state);
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
        let mut state = self.0.state();
        state.held = false;
        self.0.close(&mut state);
        drop(state);
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
        self.quic.as_ref().is_some_and(|quic| quic.remote_address_validated())
    }

    /// The connection, when it stands.
    pub async fn accept(mut self) -> Result<Connection, ConnectionError> {
        let line = {
            let mut state = self.endpoint.state();
            // Whoever is left when the endpoint is closed is refused.
            let Some(quic) = self.quic.take_if(|_| !state.closed) else { return Err(ConnectionError::LocallyClosed) };
            let mut answer = Vec::new();
            match state.quic.accept(*quic, now(), &mut answer, None) {
                Ok((handle, quic)) => state.add(&self.endpoint, handle, quic),
                Err(error) => {
                    if let Some(transmit) = error.response {
                        self.endpoint.respond(&transmit, &answer);
                    }
                    return Err(error.cause);
                }
            }
        };
        Connection::begin(line).established().await
    }

    /// Has him show first that he receives what is sent to his address (RFC 9000, 8.1.2). Who has done so is refused.
    pub fn retry(mut self) {
        let Some(quic) = self.quic.take() else { return };
        let mut answer = Vec::new();
        let mut state = self.endpoint.state();
        match state.quic.retry(*quic, &mut answer) {
            Ok(transmit) => self.endpoint.respond(&transmit, &answer),
            Err(error) => self.endpoint.refuse(&mut state, error.into_incoming()),
        }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        if let Some(quic) = self.quic.take() {
            self.endpoint.refuse(&mut self.endpoint.state(), *quic);
        }
    }
}

impl State {
    fn add(&mut self, endpoint: &Arc<Shared>, handle: ConnectionHandle, quic: quinn_proto::Connection) -> Arc<Line> {
        let line = Arc::new(Line::new(Arc::clone(endpoint), handle, quic));
        self.connections.insert(handle, Arc::clone(&line));
        line
    }
}

impl Drop for State {
    fn drop(&mut self) {
        for incoming in self.incoming.drain(..) {
            self.quic.ignore(incoming);
        }
    }
}

impl Reader {
    /// Hands connections what comes for them, until nobody needs it.
    async fn read(self) {
        let shared = &*self.shared;
        let size = usize::from(u16::MAX).min(shared.largest() * shared.udp.gro_segments());
        let mut buffer = vec![0; size * (self.room / size).clamp(1, BATCH_SIZE)];
        let mut failures = 0;
        let mut failing_since = None;
        let mut unused = pin!(shared.until(|state| !state.held && state.connections.is_empty()));
        let broken = loop {
            let readable = tokio::select! {
                () = &mut unused => return,
                readable = shared.io.readable() => readable,
            };
            match readable.and_then(|()| shared.read_some(&mut buffer, size, &mut failures)) {
                Ok(was_all) => {
                    if failures == 0 {
                        failing_since = None;
                    }
                    if was_all {
                        tokio::task::coop::consume_budget().await;
                    } else {
                        tokio::task::yield_now().await;
                    }
                }
                Err(error) => {
                    if now().duration_since(*failing_since.get_or_insert_with(now)) >= BROKEN_AFTER {
                        break error;
                    }
                    failures = 0;
                    tokio::time::sleep(PAUSE).await;
                }
            }
        };
        shared.lose_all(&format!("the socket cannot be read: {broken}"));
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // However it came to that, nobody hears anything any more.
        self.shared.lose_all("the socket is not read any more");
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Where somebody panicked while he held it, the rest goes on as far as it can.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether that was all. `failures` counts those in a row.
    fn read_some(&self, buffer: &mut [u8], size: usize, failures: &mut usize) -> io::Result<bool> {
        let batch = (buffer.len() / size).clamp(1, BATCH_SIZE);
        for _ in 0..TURN / batch {
            let mut metas = [RecvMeta::default(); BATCH_SIZE];
            let mut parts = buffer.chunks_mut(size).map(IoSliceMut::new);
            let mut parts: [_; BATCH_SIZE] =
                std::array::from_fn(|_| parts.next().unwrap_or_else(|| IoSliceMut::new(&mut [])));
            let read = || self.udp.recv((&self.io).into(), &mut parts[..batch], &mut metas[..batch]);
            match self.io.try_io(Interest::READABLE, read) {
                Ok(count) => {
                    self.hear(parts.iter().zip(&metas).take(count).map(|(part, meta)| (&part[..meta.len], meta)));
                    *failures = 0;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    *failures = 0;
                    return Ok(true);
                }
                Err(error) => {
                    *failures += 1;
                    if *failures == FAILURES {
                        return Err(error);
                    }
                }
            }
        }
        Ok(false)
    }

    fn hear<'a>(&self, came: impl Iterator<Item = (&'a [u8], &'a RecvMeta)>) {
        let now = now();
        let mut state = self.state();
        let mut answer = Vec::new();
        for (bytes, meta) in came {
            let ecn = meta.ecn.and_then(|ecn| EcnCodepoint::from_bits(ecn as u8));
            for datagram in bytes.chunks(meta.stride.max(1)) {
                answer.clear();
                // Each by itself: a piece of a batch would keep all of it.
                match state.quic.handle(now, meta.addr, meta.dst_ip, ecn, datagram.into(), &mut answer) {
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

    /// Nobody gets a connection any more.
    fn close(&self, state: &mut State) {
        state.closed = true;
        self.refuse_waiting(state);
        self.arrival.notify_waiters();
        self.arrival.notify_one();
    }

    fn refuse_waiting(&self, state: &mut State) {
        while let Some(incoming) = state.incoming.pop_front() {
            self.refuse(state, incoming);
        }
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

    fn lose_all(&self, reason: &str) {
        let cause = TransportError { code: TransportErrorCode::INTERNAL_ERROR, frame: None, reason: reason.to_owned() };
        self.close_all(|line| line.lose(ConnectionError::TransportError(cause.clone())));
    }

    fn close_all(&self, close: impl Fn(&Line)) {
        let lines: Vec<_> = {
            let mut state = self.state();
            self.close(&mut state);
            state.connections.values().cloned().collect()
        };
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
