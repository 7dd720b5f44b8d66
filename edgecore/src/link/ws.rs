//! Frames over a WebSocket: one binary message each. What waits to be sent is held here, so that sending can be interrupted at any
//! point without losing a frame, and so that what is more urgent still goes first: no more is handed to the system than a frame or two.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::{Sink as _, Stream as _};
use prost::Message as _;
use skerry_proto::mux::Side;
use skerry_proto::payload::Refusal;
use skerry_proto::streams::{Carrier, Incoming, Received, Streams};
use skerry_proto::sync::MAX_FRAME;
use skerry_proto::wire::Frame;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::http::Response;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use super::dial::{CONNECT_TIMEOUT, DialError, Server, dial, tls_error};

/// Small frames are sent together until they are this long.
const BATCH: usize = 1 << 10;
/// Batches that are sent before what came is looked at.
const BURST: usize = 16;

/// A session's connection.
pub(super) struct Socket {
    stream: WebSocketStream<TlsStream<TcpStream>>,
    server: Server,
    carrier: Carrier,
    /// Bytes of frames that the system has not taken yet.
    unflushed: usize,
}

/// What an exchange brought.
pub(super) enum Exchanged {
    /// A frame of the control class.
    Frame(Frame),
    /// The cloud opened a stream.
    Opened(Incoming),
    /// Something else, which has been dealt with.
    Heard,
    /// No control frame waits any more.
    Sent,
}

/// How sending went.
enum Progress {
    /// Nothing waits.
    Done,
    /// The system takes no more.
    Blocked,
    /// There is more.
    Burst,
}

/// Why there is no session, or no longer one.
#[derive(Debug, thiserror::Error)]
pub(super) enum SocketError {
    /// No connection.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The server said no, and why.
    #[error("the cloud refuses this node: {}", .0.message)]
    Refused(Refusal),
    /// The server said no.
    #[error("{server} answered {status} instead of opening a session; check that this is cloudcore's port")]
    Status {
        /// Who.
        server: Server,
        /// HTTP status.
        status: u16,
    },
    /// The peer closed it.
    #[error("the cloud closed the connection")]
    Closed,
    /// A message that is no frame, or one that may not be.
    #[error("the cloud broke the protocol: {0}")]
    Malformed(String),
    /// Any other failure of the WebSocket.
    #[error("the connection broke: {0}")]
    Broken(#[source] WsError),
}

impl Socket {
    /// Dials and asks for a session.
    pub(super) async fn connect(server: &Server, config: Arc<rustls::ClientConfig>) -> Result<Self, SocketError> {
        let stream = dial(server, config).await?;
        let limits = WebSocketConfig::default()
            .read_buffer_size(8 << 10)
            // A batch fits: it is written when it is flushed.
            .write_buffer_size(8 << 10)
            .max_write_buffer_size(2 * MAX_FRAME)
            .max_message_size(Some(MAX_FRAME))
            .max_frame_size(Some(MAX_FRAME));
        let request = format!("wss://{server}/v1/session");
        let upgrade = tokio_tungstenite::client_async_with_config(request, stream, Some(limits));
        let stream = match tokio::time::timeout(CONNECT_TIMEOUT, upgrade).await {
            Ok(Ok((stream, _))) => stream,
            Ok(Err(WsError::Http(response))) => return Err(refusal(server, *response)),
            Ok(Err(error)) => return Err(classify(server, error)),
            Err(_) => return Err(DialError::Timeout(server.clone()).into()),
        };
        Ok(Self { stream, server: server.clone(), carrier: Carrier::new(Side::Edge), unflushed: 0 })
    }

    /// Puts a frame of the control class behind those that wait.
    pub(super) fn queue(&mut self, frame: Frame) {
        self.carrier.control(frame);
    }

    /// Bytes of control frames that wait.
    pub(super) fn waiting(&self) -> usize {
        self.carrier.waiting().control
    }

    /// What opens streams of this session.
    pub(super) fn streams(&self) -> Streams {
        self.carrier.streams()
    }

    /// Sends what waits.
    async fn send(&mut self) -> Result<(), SocketError> {
        std::future::poll_fn(|context| match self.send_some(context) {
            Ok(Progress::Done) => Poll::Ready(Ok(())),
            Ok(Progress::Blocked) => Poll::Pending,
            Ok(Progress::Burst) => {
                context.waker().wake_by_ref();
                Poll::Pending
            }
            Err(failed) => Poll::Ready(Err(failed)),
        })
        .await
    }

    fn send_some(&mut self, context: &mut Context<'_>) -> Result<Progress, SocketError> {
        for _ in 0..BURST {
            while self.unflushed < BATCH
                && let Poll::Ready(frame) = self.carrier.poll_frame(context)
            {
                let bytes = frame.encode_to_vec();
                self.unflushed += bytes.len();
                let sent = std::pin::Pin::new(&mut self.stream).start_send(Message::Binary(bytes.into()));
                sent.map_err(|error| classify(&self.server, error))?;
            }
            if self.unflushed == 0 {
                return Ok(Progress::Done);
            }
            match std::pin::Pin::new(&mut self.stream).poll_flush(context) {
                Poll::Ready(flushed) => flushed.map_err(|error| classify(&self.server, error))?,
                Poll::Pending => return Ok(Progress::Blocked),
            }
            self.unflushed = 0;
        }
        Ok(Progress::Burst)
    }

    fn poll_receive(&mut self, context: &mut Context<'_>) -> Poll<Result<Exchanged, SocketError>> {
        loop {
            let next = ready!(std::pin::Pin::new(&mut self.stream).poll_next(context));
            return Poll::Ready(match next {
                Some(Ok(Message::Binary(bytes))) => self.receive(bytes),
                Some(Ok(Message::Text(_))) => Err(SocketError::Malformed("a text message".to_owned())),
                // Pings are answered by the protocol's implementation.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
                Some(Ok(Message::Close(_))) | None => Err(SocketError::Closed),
                Some(Err(error)) => Err(classify(&self.server, error)),
            });
        }
    }

    fn receive(&mut self, bytes: Bytes) -> Result<Exchanged, SocketError> {
        let frame = Frame::decode(bytes).map_err(|error| SocketError::Malformed(error.to_string()))?;
        match self.carrier.receive(frame) {
            Ok(Received::Control(frame)) => Ok(Exchanged::Frame(frame)),
            Ok(Received::Opened(incoming)) => Ok(Exchanged::Opened(incoming)),
            Ok(Received::Other) => Ok(Exchanged::Heard),
            Err(violation) => Err(SocketError::Malformed(violation.to_string())),
        }
    }

    /// Sends what waits and receives one frame, if `reading`; ends early when the last control frame that waited is on its way. Can be
    /// dropped at any point.
    pub(super) async fn exchange(&mut self, reading: bool) -> Result<Exchanged, SocketError> {
        let waited = self.waiting() > 0;
        std::future::poll_fn(|context| {
            let progress = self.send_some(context)?;
            if waited && self.waiting() == 0 {
                return Poll::Ready(Ok(Exchanged::Sent));
            }
            if reading && let Poll::Ready(received) = self.poll_receive(context) {
                return Poll::Ready(received);
            }
            if matches!(progress, Progress::Burst) {
                context.waker().wake_by_ref();
            }
            Poll::Pending
        })
        .await
    }

    /// Sends what waits and says goodbye, if that goes quickly.
    pub(super) async fn close(mut self, reason: &str) {
        self.carrier.end(reason);
        let farewell = async {
            self.send().await?;
            self.stream.close(None).await.map_err(SocketError::Broken)
        };
        // A peer that is not there any more needs no farewell.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(1), farewell).await;
    }
}

fn classify(server: &Server, error: WsError) -> SocketError {
    match error {
        WsError::ConnectionClosed | WsError::AlreadyClosed => SocketError::Closed,
        WsError::Io(error) if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) => {
            tls_error(server, error).into()
        }
        WsError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => SocketError::Closed,
        WsError::Io(error) => DialError::Network(server.clone(), error).into(),
        error => SocketError::Broken(error),
    }
}

fn refusal(server: &Server, response: Response<Option<Vec<u8>>>) -> SocketError {
    let status = response.status().as_u16();
    let refusal = response.into_body().and_then(|body| serde_json::from_slice(&body).ok());
    match refusal {
        Some(refusal) => SocketError::Refused(refusal),
        None => SocketError::Status { server: server.clone(), status },
    }
}
