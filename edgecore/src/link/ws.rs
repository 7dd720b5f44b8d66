//! Frames over a WebSocket: one binary message each. What waits to be sent is held here, so that sending can be interrupted at any
//! point without losing a frame.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::{Sink, Stream};
use prost::Message as _;
use skerry_proto::payload::Refusal;
use skerry_proto::sync::MAX_FRAME;
use skerry_proto::wire::Frame;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::http::Response;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use super::dial::{CONNECT_TIMEOUT, DialError, Server, dial, tls_error};

/// A session's connection.
pub(super) struct Socket {
    stream: WebSocketStream<TlsStream<TcpStream>>,
    server: Server,
    waiting: VecDeque<Message>,
    bytes: usize,
    flushed: bool,
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
    /// A message that is no frame.
    #[error("the cloud sent something that is not a frame: {0}")]
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
        Ok(Self { stream, server: server.clone(), waiting: VecDeque::new(), bytes: 0, flushed: true })
    }

    /// Puts a frame behind those that wait.
    pub(super) fn queue(&mut self, frame: &Frame) {
        let bytes = frame.encode_to_vec();
        self.bytes += bytes.len();
        self.waiting.push_back(Message::Binary(bytes.into()));
    }

    /// Bytes that wait to be handed to the system.
    pub(super) fn waiting(&self) -> usize {
        self.bytes
    }

    /// Nothing waits.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.flushed
    }

    async fn send(&mut self) -> Result<(), SocketError> {
        std::future::poll_fn(|context| self.poll_send(context)).await
    }

    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<Result<(), SocketError>> {
        loop {
            let mut stream = std::pin::Pin::new(&mut self.stream);
            if self.waiting.is_empty() {
                let flushed = ready!(stream.poll_flush(context));
                self.flushed = true;
                return Poll::Ready(flushed.map_err(|error| classify(&self.server, error)));
            }
            let ready = ready!(stream.as_mut().poll_ready(context));
            ready.map_err(|error| classify(&self.server, error))?;
            if let Some(message) = self.waiting.pop_front() {
                self.bytes -= message.len();
                self.flushed = false;
                stream.start_send(message).map_err(|error| classify(&self.server, error))?;
            }
        }
    }

    fn poll_receive(&mut self, context: &mut Context<'_>) -> Poll<Result<Frame, SocketError>> {
        loop {
            let next = ready!(std::pin::Pin::new(&mut self.stream).poll_next(context));
            return Poll::Ready(match next {
                Some(Ok(Message::Binary(bytes))) => {
                    Frame::decode(bytes).map_err(|error| SocketError::Malformed(error.to_string()))
                }
                Some(Ok(Message::Text(_))) => Err(SocketError::Malformed("a text message".to_owned())),
                // Pings are answered by the protocol's implementation.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
                Some(Ok(Message::Close(_))) | None => Err(SocketError::Closed),
                Some(Err(error)) => Err(classify(&self.server, error)),
            });
        }
    }

    /// Sends what waits and receives: the next frame, or `None` when all is sent and nothing is to be read. Can be dropped at any
    /// point.
    pub(super) async fn exchange(&mut self, reading: bool, mut sending: bool) -> Result<Option<Frame>, SocketError> {
        std::future::poll_fn(|context| {
            if sending && let Poll::Ready(result) = self.poll_send(context) {
                result?;
                sending = false;
                if !reading {
                    return Poll::Ready(Ok(None));
                }
            }
            if reading { self.poll_receive(context).map_ok(Some) } else { Poll::Pending }
        })
        .await
    }

    /// Sends what waits and says goodbye, if that goes quickly.
    pub(super) async fn close(mut self) {
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
