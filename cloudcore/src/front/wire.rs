//! A WebSocket as a pipe of frames, with one writer and a count of what is not yet written.
//!
//! Reading and writing go on in one poll, so that a session is one task; whatever is dropped half-way, no byte is lost, because the
//! queue is here and not in a future. What waits here is bounded by whoever pushes: see [`Wire::is_full`].

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink as _, SinkExt as _, StreamExt as _};
use prost::Message as _;
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
/// How long the last words may take.
const FAREWELL: Duration = Duration::from_secs(3);

/// Small buffers, for there are many sessions and most are idle.
pub(super) fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(2 << 10)
        .write_buffer_size(2 << 10)
        .max_message_size(Some(MAX_FRAME))
        .max_frame_size(Some(MAX_FRAME))
}

/// A session's connection.
pub(super) struct Wire<T> {
    socket: WebSocketStream<T>,
    unsent: VecDeque<Bytes>,
    unsent_bytes: usize,
    unflushed: bool,
    metrics: Metrics,
}

/// What came.
#[derive(Debug)]
pub(super) enum Event {
    /// A frame.
    Frame(Frame),
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
        Self { socket, unsent: VecDeque::new(), unsent_bytes: 0, unflushed: false, metrics }
    }

    /// Queues a frame; it is written while [`Wire::next`] is awaited.
    pub(super) fn push(&mut self, frame: &Frame) {
        let bytes = Bytes::from(frame.encode_to_vec());
        self.metrics.sent(bytes.len());
        self.unsent_bytes += bytes.len();
        self.unsent.push_back(bytes);
    }

    /// Whether the edge does not keep up.
    pub(super) fn is_full(&self) -> bool {
        self.unsent_bytes >= FULL
    }

    /// Writes what is queued and waits for a frame. A full one reads nothing: an edge that does not read is not listened to.
    /// Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Event, End> {
        poll_fn(|cx| self.poll(cx)).await
    }

    /// Says goodbye and closes, as far as that works within a few seconds. What was queued before is dropped.
    pub(super) async fn finish(mut self, goodbye: Option<Goodbye>) {
        self.unsent.clear();
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
        if let Poll::Ready(Err(error)) = self.poll_write(cx) {
            return Poll::Ready(Err(End::Broken(error)));
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
                Message::Binary(bytes) => {
                    self.metrics.received(bytes.len());
                    match Frame::decode(bytes) {
                        Ok(frame) => Ok(Event::Frame(frame)),
                        Err(error) => Err(End::Garbage(format!("a frame cannot be decoded: {error}"))),
                    }
                }
                Message::Text(_) => Err(End::Garbage("a frame is text where it must be binary".to_owned())),
                Message::Close(_) => Err(End::Closed),
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            });
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        while !self.unsent.is_empty() {
            ready!(self.socket.poll_ready_unpin(cx))?;
            let Some(bytes) = self.unsent.pop_front() else { break };
            self.unsent_bytes -= bytes.len();
            self.unflushed = true;
            self.socket.start_send_unpin(Message::Binary(bytes))?;
        }
        if self.unflushed {
            ready!(std::pin::Pin::new(&mut self.socket).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
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
            wire.push(&big);
        }
        assert!(wire.is_full());
        assert!(wire.next().now_or_never().is_none(), "a frame waits, and is left waiting");

        let reader = async {
            for _ in 0..7 {
                assert_eq!(edge.next().await.unwrap().unwrap().into_data(), big.encode_to_vec());
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
