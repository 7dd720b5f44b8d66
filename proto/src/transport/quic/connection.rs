//! One connection: [`quinn_proto`] says what is to be done, a task of the connection's own does it, and who uses it is one other task.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use bytes::Bytes;
use quinn_proto::{
    ConnectionError, ConnectionEvent, ConnectionHandle, EndpointEvent, Event, StreamEvent, Transmit, VarInt,
};
use rustls::pki_types::CertificateDer;
use tokio::time::Sleep;

use super::endpoint::{Shared, now};
use super::{Lanes, rustls};

/// Datagrams that wait for their connection; what comes beyond is lost, as the network loses it.
const MAX_INBOX: usize = 1024;
/// Of these as many are looked at before something is sent, and others have their turn.
const TURN: usize = 128;
/// Datagrams that are sent before what came is looked at.
const BURST: usize = 20;

/// A QUIC connection that stands. Letting go of it closes it.
#[derive(Debug)]
pub struct Connection(Arc<Line>);

/// A connection, from its first datagram until the last straggler may have come.
pub(super) struct Line {
    endpoint: Arc<Shared>,
    handle: ConnectionHandle,
    pub(super) inbox: Inbox,
    /// The user's own. Whoever has it may take the state below.
    lanes: Mutex<Lanes>,
    /// Whoever has it may take the endpoint's state, but not the other way round.
    state: Mutex<State>,
}

/// What the reader of the socket has for the connection's task: on a lock of its own, for the other is held as long as cryptography takes.
#[derive(Default)]
pub(super) struct Inbox(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    events: Vec<ConnectionEvent>,
    driver: Option<Waker>,
}

pub(super) struct State {
    pub(super) quic: quinn_proto::Connection,
    /// Who waits for something to happen.
    user: Option<Waker>,
    is_established: bool,
    /// The peer has all of the first stream, which was finished, or wants no more of it.
    pub(super) is_finished: bool,
    /// Why the connection is gone; what came before is still read.
    pub(super) gone: Option<ConnectionError>,
}

/// Does what a connection has to do, until nothing more of it can come.
struct Driver {
    line: Arc<Line>,
    /// What was taken from the inbox and has not been looked at.
    came: std::vec::IntoIter<ConnectionEvent>,
    unsent: Option<Box<Unsent>>,
}

/// What the system did not take, and when it will.
struct Unsent {
    transmit: Transmit,
    bytes: Vec<u8>,
    writable: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Line").field(&self.handle).finish_non_exhaustive()
    }
}

impl Connection {
    /// Has its task begin. Where the runtime is being shut down, that ends it at once: nobody may hold the endpoint's state.
    pub(super) fn begin(line: Arc<Line>) -> Self {
        let mut driver = Driver { line: Arc::clone(&line), came: Vec::new().into_iter(), unsent: None };
        let drive = async move {
            let mut timer = pin!(tokio::time::sleep_until(now().into()));
            poll_fn(|context| driver.poll(timer.as_mut(), context)).await;
        };
        #[expect(clippy::disallowed_methods, reason = "it ends with the connection; what is wrong its user hears")]
        tokio::spawn(drive);
        Self(line)
    }

    pub(super) fn line(&self) -> &Arc<Line> {
        &self.0
    }

    /// When the handshake is done.
    pub(super) async fn established(self) -> Result<Self, ConnectionError> {
        poll_fn(|context| {
            let mut state = self.0.state();
            if state.is_established {
                return Poll::Ready(Ok(()));
            }
            state.poll_gone(context).map(Err)
        })
        .await?;
        Ok(self)
    }

    /// The certificates that the peer proved itself with, its own first. A server is told once: whoever has thousands of clients keeps what it
    /// needs of each.
    pub fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        let identity = self.0.state().quic.crypto_session().peer_identity()?;
        identity.downcast().ok().map(|certificates| *certificates)
    }

    /// Tells the peer that it is over, and why. What has not been sent is dropped.
    pub fn close(&self, code: VarInt, reason: &[u8]) {
        self.0.close(code, Bytes::copy_from_slice(reason));
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The line lives on for some time, and nobody reads or writes it any more.
        *self.0.lanes() = Lanes::default();
        self.0.close(VarInt::from_u32(0), Bytes::new());
    }
}

impl Inbox {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, event: ConnectionEvent) {
        let mut waiting = self.waiting();
        if waiting.events.len() < MAX_INBOX {
            waiting.events.push(event);
        }
        waiting.wake();
    }

    /// The connection has something to do.
    pub(super) fn wake(&self) {
        self.waiting().wake();
    }

    /// What came, if it is `wanted`; what comes from here on wakes the driver.
    fn take(&self, context: &Context<'_>, wanted: bool) -> Option<Vec<ConnectionEvent>> {
        let mut waiting = self.waiting();
        waiting.driver = Some(context.waker().clone());
        wanted.then(|| std::mem::take(&mut waiting.events))
    }
}

impl Waiting {
    fn wake(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }
}

impl Line {
    pub(super) fn new(endpoint: Arc<Shared>, handle: ConnectionHandle, quic: quinn_proto::Connection) -> Self {
        let state = State { quic, user: None, is_established: false, is_finished: false, gone: None };
        Self { endpoint, handle, inbox: Inbox::default(), lanes: Mutex::default(), state: Mutex::new(state) }
    }

    pub(super) fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn close(&self, code: VarInt, reason: Bytes) {
        let mut state = self.state();
        // Nothing, where it is closed.
        state.quic.close(now(), code, reason);
        state.end(ConnectionError::LocallyClosed);
        drop(state);
        self.inbox.wake();
    }

    /// It is of no use any more.
    pub(super) fn lose(&self, cause: ConnectionError) {
        self.state().end(cause);
        self.close(VarInt::from_u32(0), Bytes::new());
    }
}

impl State {
    /// Whoever uses the connection is woken when anything happens.
    pub(super) fn wait(&mut self, context: &Context<'_>) {
        if !self.user.as_ref().is_some_and(|user| user.will_wake(context.waker())) {
            self.user = Some(context.waker().clone());
        }
    }

    pub(super) fn poll_gone(&mut self, context: &Context<'_>) -> Poll<ConnectionError> {
        if let Some(cause) = self.gone.clone() {
            return Poll::Ready(cause);
        }
        self.wait(context);
        Poll::Pending
    }

    fn end(&mut self, cause: ConnectionError) {
        self.gone.get_or_insert(cause);
        self.wake();
    }

    fn wake(&mut self) {
        if let Some(user) = self.user.take() {
            user.wake();
        }
    }

    /// Tells the user what happened.
    fn notice(&mut self) {
        let mut happened = false;
        while let Some(event) = self.quic.poll() {
            match event {
                Event::Connected => self.is_established = true,
                Event::ConnectionLost { reason } => self.end(reason),
                Event::Stream(StreamEvent::Finished { id } | StreamEvent::Stopped { id, .. }) => {
                    self.is_finished |= id.index() == 0;
                }
                Event::Stream(_) => {}
                Event::HandshakeDataReady | Event::DatagramReceived | Event::DatagramsUnblocked => continue,
            }
            happened = true;
        }
        if happened {
            self.wake();
        }
    }
}

impl Driver {
    fn poll(&mut self, mut timer: Pin<&mut Sleep>, context: &mut Context<'_>) -> Poll<()> {
        let line = Arc::clone(&self.line);
        let more = line.inbox.take(context, self.came.as_slice().is_empty());
        if let Some(came) = more {
            self.came = came.into_iter();
        }
        let mut state = line.state();
        for event in self.came.by_ref().take(TURN) {
            state.quic.handle_event(event);
        }
        if self.came.as_slice().is_empty() {
            // With what it needed.
            self.came = Vec::new().into_iter();
        } else {
            context.waker().wake_by_ref();
        }
        loop {
            let now = now();
            if state.quic.poll_timeout().is_some_and(|at| at <= now) {
                state.quic.handle_timeout(now);
            }
            self.transmit(&mut state.quic, now, context);
            while let Some(event) = state.quic.poll_endpoint_events() {
                if let Some(answer) = line.endpoint.tell(line.handle, event) {
                    state.quic.handle_event(answer);
                    // It may be something to send.
                    context.waker().wake_by_ref();
                }
            }
            state.notice();
            if state.quic.is_drained() {
                return Poll::Ready(());
            }
            let Some(at) = state.quic.poll_timeout() else { return Poll::Pending };
            if timer.deadline() != at.into() {
                timer.as_mut().reset(at.into());
            }
            if timer.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
        }
    }

    fn transmit(&mut self, quic: &mut quinn_proto::Connection, now: Instant, context: &mut Context<'_>) {
        let endpoint = &self.line.endpoint;
        let segments = endpoint.segments();
        let mut buffer = Vec::new();
        let mut sent = 0;
        while sent < BURST {
            let (transmit, bytes) = if let Some(mut unsent) = self.unsent.take() {
                if unsent.writable.as_mut().poll(context).is_pending() {
                    self.unsent = Some(unsent);
                    return;
                }
                (unsent.transmit, unsent.bytes)
            } else {
                buffer.clear();
                let Some(transmit) = quic.poll_transmit(now, segments, &mut buffer) else { return };
                (transmit, std::mem::take(&mut buffer))
            };
            if endpoint.send(&transmit, &bytes).is_err() {
                let line = Arc::clone(&self.line);
                let writable = Box::pin(async move { line.endpoint.writable().await });
                self.unsent = Some(Box::new(Unsent { transmit, bytes, writable }));
                continue;
            }
            sent += transmit.segment_size.map_or(1, |size| transmit.size.div_ceil(size));
            buffer = bytes;
        }
        context.waker().wake_by_ref();
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let mut state = self.line.state();
        if !state.quic.is_drained() {
            state.end(ConnectionError::LocallyClosed);
            drop(state);
            let _ = self.line.endpoint.tell(self.line.handle, EndpointEvent::drained());
        }
    }
}
