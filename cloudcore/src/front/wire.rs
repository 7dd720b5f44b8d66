//! A WebSocket as a pipe of frames, with one writer and a count of what is not yet written.
//!
//! Reading and writing go on in one poll, so that a session is one task; whatever is dropped half-way, no byte is lost, because what
//! waits is here and not in a future. No more than a frame or two is handed to the system, so that what is urgent goes first. What
//! waits of the control class is bounded by whoever pushes: see [`Wire::is_full`].

use std::future::poll_fn;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use skerry_proto::mux::Side;
use skerry_proto::streams::{Carrier, Incoming, Received, Streams};
use skerry_proto::sync::MAX_FRAME;
use skerry_proto::wire::frame::Body;
use skerry_proto::wire::{Frame, Goodbye};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::{Message, WebSocketConfig};

use crate::metrics::Metrics;

/// From here on, no more is taken from whoever can wait.
const FULL: usize = 512 << 10;
/// Small frames are sent together until they are this long.
const BATCH: usize = 1 << 10;
/// Batches that are sent before what came is looked at.
const BURST: usize = 16;
/// How long the last words may take.
const FAREWELL: Duration = Duration::from_secs(3);

/// Small buffers, for there are many sessions and most are idle.
pub(super) fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(2 << 10)
        // A batch fits: it is written when it is flushed.
        .write_buffer_size(8 << 10)
        .max_message_size(Some(MAX_FRAME))
        .max_frame_size(Some(MAX_FRAME))
}

/// A session's connection.
pub(super) struct Wire<T> {
    socket: WebSocketStream<T>,
    carrier: Carrier,
    /// Bytes of frames that the system has not taken yet.
    unflushed: usize,
    metrics: Metrics,
}

/// What came.
#[derive(Debug)]
pub(super) enum Event {
    /// A frame of the control class.
    Frame(Frame),
    /// The edge opened a stream.
    Opened(Incoming),
    /// Something else, which has been dealt with.
    Heard,
    /// It was full and is no more.
    Drained,
}

/// Why nothing more comes.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// The edge closed the connection.
    #[error("the edge closed the connection")]
    Closed,
    /// The connection broke.
    #[error("the connection broke")]
    Broken(#[source] Error),
    /// The edge sent what is no frame.
    #[error("{0}")]
    Garbage(String),
}

impl<T: AsyncRead + AsyncWrite + Unpin> Wire<T> {
    pub(super) fn new(socket: WebSocketStream<T>, metrics: Metrics) -> Self {
        Self { socket, carrier: Carrier::new(Side::Cloud), unflushed: 0, metrics }
    }

    /// Queues a frame of the control class; it is written while [`Wire::next`] is awaited.
    pub(super) fn push(&mut self, frame: Frame) {
        self.carrier.control(frame);
    }

    /// What opens streams of this session.
    pub(super) fn streams(&self) -> Streams {
        self.carrier.streams()
    }

    /// Whether the edge does not keep up. One large object does not count: on a slow line it takes longer than an edge that is not
    /// listened to is taken for alive.
    pub(super) fn is_full(&self) -> bool {
        let waiting = self.carrier.waiting();
        waiting.control - waiting.cut >= FULL
    }

    /// Writes what is queued and waits for a frame. A full one reads nothing: an edge that does not read is not listened to.
    /// Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Event, End> {
        poll_fn(|cx| self.poll(cx)).await
    }

    /// Says goodbye and closes, as far as that works within a few seconds. What was queued before is dropped.
    pub(super) async fn finish(mut self, goodbye: Option<Goodbye>) {
        self.carrier.end(goodbye.as_ref().map_or("the connection ended", |said| &said.message));
        let farewell = async {
            if let Some(goodbye) = goodbye {
                let frame = Frame { body: Some(Body::Goodbye(goodbye)) };
                self.socket.send(Message::Binary(frame.encode_to_vec().into())).await?;
            }
            self.socket.close(None).await?;
            // What comes is read until the edge closes too: closing on unread bytes resets the connection, and the goodbye with it.
            while let Some(Ok(_)) = self.socket.next().await {}
            Ok::<_, Error>(())
        };
        // Whether the last words were heard changes nothing here.
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, End>> {
        let was_full = self.is_full();
        let all = match self.write_some(cx) {
            Ok(all) => all,
            Err(error) => return Poll::Ready(Err(End::Broken(error))),
        };
        if !all {
            cx.waker().wake_by_ref();
        }
        if self.is_full() {
            return Poll::Pending;
        }
        if was_full {
            return Poll::Ready(Ok(Event::Drained));
        }
        loop {
            let message = match ready!(self.socket.poll_next_unpin(cx)) {
                Some(Ok(message)) => message,
                Some(Err(error)) => return Poll::Ready(Err(end(error))),
                None => return Poll::Ready(Err(End::Closed)),
            };
            return Poll::Ready(match message {
                Message::Binary(bytes) => self.receive(bytes),
                Message::Text(_) => Err(End::Garbage("a frame is text where it must be binary".to_owned())),
                Message::Close(_) => Err(End::Closed),
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            });
        }
    }

    fn receive(&mut self, bytes: Bytes) -> Result<Event, End> {
        self.metrics.received(bytes.len());
        let frame =
            Frame::decode(bytes).map_err(|error| End::Garbage(format!("a frame cannot be decoded: {error}")))?;
        match self.carrier.receive(frame) {
            Ok(Received::Control(frame)) => Ok(Event::Frame(frame)),
            Ok(Received::Opened(incoming)) => Ok(Event::Opened(incoming)),
            Ok(Received::Other) => Ok(Event::Heard),
            Err(violation) => Err(End::Garbage(violation.to_string())),
        }
    }

    /// Writes until nothing waits or the system takes no more, but not for ever: `false` if there is more to be written now.
    fn write_some(&mut self, cx: &mut Context<'_>) -> Result<bool, Error> {
        for _ in 0..BURST {
            while self.unflushed < BATCH
                && let Poll::Ready(frame) = self.carrier.poll_frame(cx)
            {
                let bytes = Bytes::from(frame.encode_to_vec());
                self.metrics.sent(bytes.len());
                self.unflushed += bytes.len();
                self.socket.start_send_unpin(Message::Binary(bytes))?;
            }
            if self.unflushed == 0 {
                return Ok(true);
            }
            match self.socket.poll_flush_unpin(cx) {
                Poll::Ready(flushed) => flushed?,
                Poll::Pending => return Ok(true),
            }
            self.unflushed = 0;
        }
        Ok(false)
    }
}

fn end(error: Error) -> End {
    match error {
        Error::ConnectionClosed
        | Error::AlreadyClosed
        | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => End::Closed,
        Error::Capacity(CapacityError::MessageTooLong { size, max_size }) => {
            End::Garbage(format!("a frame of {size} bytes is larger than {max_size}"))
        }
        Error::Capacity(_) | Error::Protocol(_) | Error::Utf8(_) => {
            End::Garbage(format!("not a WebSocket of frames: {error}"))
        }
        other => End::Broken(other),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use skerry_proto::mux::Mux;
    use skerry_proto::wire::Ping;
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;

    fn ping(token: u64) -> Frame {
        Frame { body: Some(Body::Ping(Ping { token })) }
    }

    #[tokio::test]
    async fn who_does_not_read_is_not_listened_to_and_nothing_is_lost() {
        let (near, far) = tokio::io::duplex(4096);
        let mut wire =
            Wire::new(WebSocketStream::from_raw_socket(near, Role::Server, Some(config())).await, Metrics::default());
        let mut edge = WebSocketStream::from_raw_socket(far, Role::Client, None).await;
        edge.send(Message::Binary(ping(1).encode_to_vec().into())).await.unwrap();
        let big = Frame { body: Some(Body::Goodbye(Goodbye { message: "x".repeat(100_000), ..Goodbye::default() })) };
        for _ in 0..7 {
            wire.push(big.clone());
        }
        assert!(wire.is_full());
        assert!(wire.next().now_or_never().is_none(), "a frame waits, and is left waiting");

        let reader = async {
            let mut mux = Mux::new(Side::Edge);
            for _ in 0..7 {
                let came = loop {
                    let frame = Frame::decode(edge.next().await.unwrap().unwrap().into_data()).unwrap();
                    mux.receive(frame).unwrap();
                    if let Some(event) = mux.poll() {
                        break event;
                    }
                };
                assert_eq!(came, skerry_proto::mux::Event::Control(big.clone()));
            }
            edge.close(None).await.unwrap();
        };
        let writer = async {
            assert!(matches!(wire.next().await, Ok(Event::Drained)));
            assert!(!wire.is_full());
            let Ok(Event::Frame(frame)) = wire.next().await else { panic!("the frame that waited") };
            assert_eq!(frame, ping(1));
            // The rest is written while nothing comes.
            assert!(matches!(wire.next().await, Err(End::Closed)));
        };
        tokio::join!(writer, reader);
    }
}
