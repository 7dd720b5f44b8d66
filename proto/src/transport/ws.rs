//! Frames as the binary messages of a WebSocket.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::{Message, WebSocketConfig};

use super::{BURST, End, Meter, longest, malformed};
use crate::frame;
use crate::mux::class_of;
use crate::streams::Carrier;
use crate::sync::MAX_FRAME;
use crate::wire::Frame;

/// Small frames are sent together until they are this long, in bytes.
const BATCH: usize = 1 << 10;

/// Small buffers, for a cloud has many sessions and most are idle.
pub fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(2 << 10)
        // A batch fits: it is written when it is flushed.
        .write_buffer_size(8 << 10)
        .max_write_buffer_size(2 * MAX_FRAME)
        .max_message_size(Some(MAX_FRAME))
        .max_frame_size(Some(MAX_FRAME))
}

#[derive(Debug)]
pub(super) struct Ws<T> {
    socket: WebSocketStream<T>,
    /// Bytes of frames that the system has not taken yet.
    unflushed: usize,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Ws<T> {
    pub(super) fn new(socket: WebSocketStream<T>) -> Self {
        Self { socket, unflushed: 0 }
    }

    pub(super) fn poll_send(
        &mut self,
        carrier: &mut Carrier,
        meter: &impl Meter,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), End>> {
        for _ in 0..BURST {
            while self.unflushed < BATCH
                && let Poll::Ready(frame) = carrier.poll_frame(context)
            {
                let bytes = Bytes::from(frame.encode_to_vec());
                meter.sent(class_of(&frame).flatten(), bytes.len());
                self.unflushed += bytes.len();
                self.socket.start_send_unpin(Message::Binary(bytes)).map_err(end)?;
            }
            if self.unflushed == 0 {
                return Poll::Ready(Ok(()));
            }
            ready!(self.socket.poll_flush_unpin(context)).map_err(end)?;
            self.unflushed = 0;
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    pub(super) fn poll_receive(&mut self, meter: &impl Meter, context: &mut Context<'_>) -> Poll<Result<Frame, End>> {
        loop {
            let message = match ready!(self.socket.poll_next_unpin(context)) {
                Some(Ok(message)) => message,
                Some(Err(error)) => return Poll::Ready(Err(end(error))),
                None => return Poll::Ready(Err(End::Closed)),
            };
            return Poll::Ready(match message {
                Message::Binary(bytes) => {
                    let length = bytes.len();
                    let decoded = frame::decode(bytes);
                    let class = decoded.as_ref().ok().and_then(class_of);
                    meter.received(class.flatten(), length);
                    match decoded {
                        Ok(_) if class.is_some_and(|class| length > longest(class)) => {
                            Err(End::Garbage(format!("a frame of a stream has {length} bytes, more than are cut")))
                        }
                        decoded => decoded.map_err(|error| malformed(&error)),
                    }
                }
                Message::Text(_) => Err(End::Garbage("a frame is text where it must be binary".to_owned())),
                Message::Close(_) => Err(End::Closed),
                // Pings are answered by the protocol's implementation.
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            });
        }
    }

    /// Sends what waits, closes, and reads what comes until the peer closes too: closing on unread bytes resets the connection, and the last
    /// words with it.
    pub(super) async fn finish(&mut self, carrier: &mut Carrier, meter: &impl Meter) -> Result<(), End> {
        poll_fn(|context| self.poll_send(carrier, meter, context)).await?;
        self.socket.close(None).await.map_err(end)?;
        while let Some(Ok(_)) = self.socket.next().await {}
        Ok(())
    }
}

fn end(error: Error) -> End {
    match error {
        Error::ConnectionClosed
        | Error::AlreadyClosed
        | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => End::Closed,
        Error::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof && error.get_ref().is_none() => {
            End::Closed
        }
        Error::Capacity(CapacityError::MessageTooLong { size, max_size }) => {
            End::Garbage(format!("a frame of {size} bytes is larger than {max_size}"))
        }
        Error::Capacity(_) | Error::Protocol(_) | Error::Utf8(_) => {
            End::Garbage(format!("not a WebSocket of frames: {error}"))
        }
        other => End::WebSocket(other),
    }
}
