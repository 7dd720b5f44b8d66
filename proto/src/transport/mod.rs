//! The connection of a session: frames both ways over a WebSocket or over QUIC, the same for whoever uses it.
//!
//! Reading and writing go on in one poll, so that a session is one task; whatever is dropped half-way, no byte is lost, because what
//! waits is here and not in a future. No more is handed to the transport than it sends soon, so that what is urgent goes first.
//!
//! - On a WebSocket every frame is one binary message, in the one order that [`Mux`](crate::mux::Mux) gives them.
//! - On QUIC each side has four unidirectional streams, in the order of their priority: control, api, ops, device. In them the frames
//!   follow each other, each behind its length as a varint. A loss in one class holds up no other.

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite;

use self::quic::Quic;
pub use self::quic::{ALPN, BUSY, Caller, Connection, Endpoint, alert, client_config, lost, server_config};
use self::ws::Ws;
pub use self::ws::config as ws_config;
use crate::mux::{CUT, Class, Side, Waiting};
use crate::streams::{Carrier, Incoming, Received, Streams};
use crate::sync::MAX_FRAME;
use crate::wire::{Frame, Goodbye, frame::Body};

mod congestion;
mod quic;
#[cfg(test)]
mod tests;
mod ws;

/// Bytes of a TCP connection that the system is to hold before it has sent them: it would take megabytes, and what is urgent waits behind
/// them (`TCP_NOTSENT_LOWAT`).
pub const UNSENT: u32 = 1 << 10;
/// Bytes that TLS is to take before the system does.
pub const TLS_BUFFER: usize = 16 << 10;
/// At what frames are cut on a WebSocket, in bytes: what is urgent waits for one in its buffer and for one in the system.
const WS_CUT: usize = 1 << 10;
/// The longest frame of a class of streams, in bytes. Those are cut at [`CUT`]; what is longer has only its sender to thank.
const MAX_CUT_FRAME: usize = 2 * CUT;
/// Batches that are sent before what came is looked at.
const BURST: usize = 16;

/// Counts what goes through a connection. The class is the one of the frame's stream, `None` for control and for what has none.
pub trait Meter {
    /// A frame of so many bytes was handed over.
    fn sent(&self, class: Option<Class>, bytes: usize);
    /// A frame of so many bytes came.
    fn received(&self, class: Option<Class>, bytes: usize);
}

impl Meter for () {
    fn sent(&self, _: Option<Class>, _: usize) {}
    fn received(&self, _: Option<Class>, _: usize) {}
}

/// A session's connection. `T` is what a WebSocket runs on.
#[derive(Debug)]
pub struct Wire<T, M> {
    carrier: Carrier,
    transport: Transport<T>,
    meter: M,
    full: usize,
    /// Nothing can be sent any more; what came before is still read.
    broken: Option<End>,
}

#[derive(Debug)]
enum Transport<T> {
    // Its buffers are large, and QUIC has none of them here.
    Ws(Box<Ws<T>>),
    Quic(Quic),
}

/// What came of waiting.
#[derive(Debug)]
pub enum Event {
    /// A frame of the control class.
    Frame(Frame),
    /// The peer opened a stream.
    Opened(Incoming),
    /// Something else, which has been dealt with.
    Heard,
    /// It was full and is no more.
    Drained,
}

/// Why nothing more comes.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The peer closed the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// The peer closed the connection, and said why.
    #[error("the other side closed the connection: {0}")]
    Told(String),
    /// The peer has no room for the connection now.
    #[error("the other side closed the connection: {0}")]
    Busy(String),
    /// The WebSocket broke.
    #[error("the connection broke")]
    WebSocket(#[source] tungstenite::Error),
    /// QUIC broke. Where the peer's TLS said so, the source is a [`rustls::Error`](quinn_proto::rustls::Error).
    #[error("the connection broke")]
    Quic(#[source] io::Error),
    /// The peer sent what is no frame, or one that may not be.
    #[error("{0}")]
    Garbage(String),
}

impl<T: AsyncRead + AsyncWrite + Unpin, M: Meter> Wire<T, M> {
    /// On a WebSocket made with [`ws_config`].
    pub fn over_websocket(socket: WebSocketStream<T>, side: Side, meter: M) -> Self {
        Self::new(Transport::Ws(Box::new(Ws::new(socket))), Carrier::cut_at(side, WS_CUT), meter)
    }

    /// On a QUIC connection made with [`client_config`] and [`server_config`].
    pub async fn over_quic(connection: Connection, side: Side, meter: M) -> Result<Self, End> {
        Ok(Self::new(Transport::Quic(Quic::open(connection).await?), Carrier::new(side), meter))
    }

    fn new(transport: Transport<T>, carrier: Carrier, meter: M) -> Self {
        Self { carrier, transport, meter, full: 1, broken: None }
    }

    /// Whether it is QUIC.
    pub fn is_quic(&self) -> bool {
        matches!(self.transport, Transport::Quic(_))
    }

    /// From how many bytes of control frames on it is full; without it, as soon as one waits. The one that is being sent in parts does
    /// not count: on a slow line a large object takes longer than a peer that is not listened to is taken for alive.
    #[must_use]
    pub fn full_at(self, bytes: usize) -> Self {
        Self { full: bytes, ..self }
    }

    /// Puts a frame of the control class behind those that wait; it is sent while [`Wire::next`] is awaited. Whoever pushes bounds what
    /// waits.
    pub fn push(&mut self, frame: Frame) {
        self.carrier.control(frame);
    }

    /// What waits to be sent.
    pub fn waiting(&self) -> Waiting {
        self.carrier.waiting()
    }

    /// Whether the peer does not keep up; see [`Wire::full_at`].
    pub fn is_full(&self) -> bool {
        let waiting = self.carrier.waiting();
        waiting.control - waiting.cut >= self.full
    }

    /// What opens streams of this session.
    pub fn streams(&self) -> Streams {
        self.carrier.streams()
    }

    /// Sends what waits; waits for a frame, if `reading`, or for [`Event::Drained`]. What the peer said before the connection broke comes
    /// before the error. Cancel safe.
    pub async fn next(&mut self, reading: bool) -> Result<Event, End> {
        let was_full = self.is_full();
        poll_fn(|context| {
            if self.broken.is_none()
                && let Poll::Ready(Err(end)) = self.poll_send(context)
            {
                self.broken = Some(end);
            }
            if was_full && !self.is_full() {
                return Poll::Ready(Ok(Event::Drained));
            }
            // The reader's error says more: that it is closed, and why, where the writer only knows that the pipe is.
            if reading && let Poll::Ready(received) = self.poll_receive(context) {
                return Poll::Ready(received);
            }
            self.broken.take().map_or(Poll::Pending, |end| Poll::Ready(Err(end)))
        })
        .await
    }

    /// Ends every stream with this reason, drops what waits, says the last words if there are any, as far as that works within
    /// `patience`, and closes.
    pub async fn finish(mut self, reason: &str, goodbye: Option<Goodbye>, patience: Duration) {
        self.carrier.end(reason);
        let Some(goodbye) = goodbye else { return self.close(reason) };
        self.carrier.control(Frame { body: Some(Body::Goodbye(goodbye)) });
        let (carrier, meter) = (&mut self.carrier, &self.meter);
        let farewell = async {
            match &mut self.transport {
                Transport::Ws(ws) => ws.finish(carrier, meter).await,
                Transport::Quic(quic) => quic.finish(carrier, meter).await,
            }
        };
        // Whether the last words were heard changes nothing here.
        let _ = tokio::time::timeout(patience, farewell).await;
        self.close(reason);
    }

    fn close(self, reason: &str) {
        if let Transport::Quic(quic) = &self.transport {
            quic.close(reason);
        }
    }

    /// Ready when nothing waits. Not for ever at a time: after a burst it is pending and has woken whoever polls.
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<Result<(), End>> {
        match &mut self.transport {
            Transport::Ws(ws) => ws.poll_send(&mut self.carrier, &self.meter, context),
            Transport::Quic(quic) => quic.poll_send(&mut self.carrier, &self.meter, context),
        }
    }

    fn poll_receive(&mut self, context: &mut Context<'_>) -> Poll<Result<Event, End>> {
        let frame = ready!(match &mut self.transport {
            Transport::Ws(ws) => ws.poll_receive(&self.meter, context),
            Transport::Quic(quic) => quic.poll_receive(&self.meter, context),
        })?;
        Poll::Ready(match self.carrier.receive(frame) {
            Ok(Received::Control(frame)) => Ok(Event::Frame(frame)),
            Ok(Received::Opened(incoming)) => Ok(Event::Opened(incoming)),
            Ok(Received::Other) => Ok(Event::Heard),
            Err(violation) => Err(End::Garbage(violation.to_string())),
        })
    }
}

/// The longest frame of a class, or of control where that is `None`, in bytes.
fn longest(class: Option<Class>) -> usize {
    if class.is_some() { MAX_CUT_FRAME } else { MAX_FRAME }
}

fn malformed(error: &impl std::fmt::Display) -> End {
    End::Garbage(format!("a frame cannot be decoded: {error}"))
}
