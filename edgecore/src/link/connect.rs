//! From a server's name to a session's connection, by the transport that works, and what went wrong in words that help.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use quinn_proto::ConnectionError;
use serde::{Deserialize, Serialize};
use skerry_proto::mux::Side;
use skerry_proto::payload::Refusal;
use skerry_proto::transport::{self, End, ws_config};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::Error as WsError;
use tokio_tungstenite::tungstenite::http::Response;
use tracing::debug;

use super::MAX_TOLD;
use super::dial::{CONNECT_TIMEOUT, DialError, Server, dial_any, each, resolve, tls_error};
use crate::clock;

/// How long QUIC is tried alone where there is another way. Where the name has several addresses it is tried twice as long in all.
const QUIC_PATIENCE: Duration = Duration::from_secs(2);
/// How long QUIC is left alone after the first time that only a WebSocket came through; twice as long each time after that.
const FIRST_AVOIDANCE: Duration = Duration::from_secs(600);
/// The longest that QUIC is left alone.
const LAST_AVOIDANCE: Duration = Duration::from_secs(6 * 3600);

/// How long a cloud is left alone that has no room for a connection. On a WebSocket it says a time of its own.
const BUSY: Duration = Duration::from_secs(5);
/// A session on QUIC that stood so long was a good one, even if it fell silent then.
const GOOD: Duration = Duration::from_secs(300);
/// So many sessions on QUIC that fall silent before, without a good one between them, say that UDP does not stay open here.
const SILENCES: u32 = 3;

/// A session's connection.
pub(super) type Wire = transport::Wire<TlsStream<TcpStream>, ()>;

/// What carries the link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Transport {
    /// QUIC, and a WebSocket where UDP does not come through.
    #[default]
    Auto,
    /// QUIC alone.
    Quic,
    /// A WebSocket alone.
    WebSocket,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Quic => "QUIC",
            Self::WebSocket => "WebSocket",
        })
    }
}

/// Which transport is next. A WebSocket that works where nothing came of QUIC says that UDP is blocked here, and so do sessions on QUIC
/// that fall silent again and again; the next attempts do without QUIC for a while, until the network changes. What does not work either
/// way says nothing, and a cloud that says no over QUIC says that UDP comes through.
#[derive(Debug)]
pub(super) struct Choice {
    wanted: Transport,
    avoid_until: Duration,
    avoidance: Duration,
    /// Sessions on QUIC that fell silent since the last good one.
    silences: u32,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    /// No connection.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The server said no, and why, and perhaps how long it is not to be asked again.
    #[error("the cloud refuses this node: {}", .0.message)]
    Refused(Refusal, Option<Duration>),
    /// The server said no.
    #[error("{server} answered {status} instead of opening a session; check that this is cloudcore's port")]
    Status {
        /// Who.
        server: Server,
        /// HTTP status.
        status: u16,
        /// How long it is not to be asked again.
        retry_after: Option<Duration>,
    },
    /// The server closed the connection and said why, and perhaps how long it is not to be asked again.
    #[error("the cloud closed the connection: {0}")]
    Closed(String, Option<Duration>),
    /// It broke before there was a session.
    #[error("{0}")]
    Ended(String),
}

impl ConnectError {
    /// Whether the server answered, and what it said is the trouble.
    fn is_answer(&self) -> bool {
        match self {
            Self::Dial(error) => error.is_answer(),
            Self::Refused(..) | Self::Status { .. } | Self::Closed(..) => true,
            Self::Ended(_) => false,
        }
    }

    /// How long the server is not to be asked again, if it said so.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(_, retry_after) | Self::Status { retry_after, .. } | Self::Closed(_, retry_after) => {
                *retry_after
            }
            Self::Dial(_) | Self::Ended(_) => None,
        }
    }
}

impl Choice {
    pub(super) fn new(wanted: Transport) -> Self {
        Self { wanted, avoid_until: Duration::ZERO, avoidance: FIRST_AVOIDANCE, silences: 0 }
    }

    /// Whether QUIC is tried, and whether a WebSocket is if that fails.
    fn plan(&self, now: Duration) -> (bool, bool) {
        match self.wanted {
            Transport::Auto => (now >= self.avoid_until, true),
            Transport::Quic => (true, false),
            Transport::WebSocket => (false, true),
        }
    }

    /// QUIC did not come through, or does not stay open.
    fn avoid_quic(&mut self, now: Duration) {
        self.avoid_until = now + self.avoidance;
        self.avoidance = LAST_AVOIDANCE.min(2 * self.avoidance);
    }

    /// A session on QUIC stood so long, zero if it did not begin, and ended: because nothing was heard any more, or in another way.
    pub(super) fn quic_ended(&mut self, stood: Duration, silent: bool, now: Duration) {
        if !silent || stood >= GOOD {
            (self.avoidance, self.silences) = (FIRST_AVOIDANCE, 0);
            return;
        }
        self.silences = self.silences.saturating_add(1);
        // What connects and then carries nothing is no way.
        if stood.is_zero() || self.silences >= SILENCES {
            self.avoid_quic(now);
        }
    }

    /// What was found out was about another network.
    pub(super) fn network_changed(&mut self) {
        *self = Self::new(self.wanted);
    }
}

/// A session's connection.
pub(super) async fn connect(
    server: &Server,
    tls: Arc<rustls::ClientConfig>,
    choice: &mut Choice,
) -> Result<Wire, ConnectError> {
    let (quic, websocket) = choice.plan(clock::monotonic());
    // The name's time is not QUIC's: servers of names that are slow say nothing about UDP.
    let addresses = resolve(server).await?;
    let over_websocket = over_websocket(server, &addresses, tls.clone());
    if !quic {
        return over_websocket.await;
    }
    if !websocket {
        return over_quic(server, &addresses, &tls, CONNECT_TIMEOUT).await;
    }
    let alone = tokio::time::sleep(QUIC_PATIENCE);
    let patience = if addresses.len() > 1 { 2 * QUIC_PATIENCE } else { QUIC_PATIENCE };
    let over_quic = over_quic(server, &addresses, &tls, patience);
    let (wire, has_quic) = Box::pin(either(over_quic, over_websocket, alone)).await?;
    if !has_quic {
        choice.avoid_quic(clock::monotonic());
    }
    Ok(wire)
}

/// What QUIC brings, or once that has failed or had its time alone, what either of both brings first; says whether it was QUIC.
async fn either<T>(
    quic: impl Future<Output = Result<T, ConnectError>>,
    websocket: impl Future<Output = Result<T, ConnectError>>,
    alone: impl Future<Output = ()>,
) -> Result<(T, bool), ConnectError> {
    let (mut quic, mut websocket, mut alone) = (pin!(quic), pin!(websocket), pin!(alone));
    let (mut tried, mut quic_failed, mut websocket_failed) = (false, false, None);
    loop {
        tokio::select! {
            biased;
            done = &mut quic, if !quic_failed => match done {
                Ok(wire) => return Ok((wire, true)),
                // A cloud that is busy, or does not want this node, is so on both ways.
                Err(error @ ConnectError::Closed(..)) => return Err(error),
                Err(error) => {
                    if let Some(error) = websocket_failed {
                        return Err(error);
                    }
                    debug!(%error, "no QUIC, a WebSocket is tried");
                    (quic_failed, tried) = (true, true);
                }
            },
            done = &mut websocket, if tried && websocket_failed.is_none() => match done {
                Ok(wire) => return Ok((wire, false)),
                Err(error) if quic_failed => return Err(error),
                Err(error) => websocket_failed = Some(error),
            },
            () = &mut alone, if !tried => tried = true,
        }
    }
}

async fn over_quic(
    server: &Server,
    addresses: &[SocketAddr],
    tls: &rustls::ClientConfig,
    patience: Duration,
) -> Result<Wire, ConnectError> {
    let failed = |error: io::Error| ConnectError::Dial(DialError::Network(server.clone(), error));
    let config = transport::client_config(tls).map_err(|error| failed(io::Error::other(error)))?;
    let attempt = |address| {
        let config = config.clone();
        async move {
            // An address of its own for each: the system chooses by the route, and again when the route changes.
            let local = match address {
                SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
                SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
            };
            let endpoint = transport::Endpoint::client(local).map_err(failed)?;
            let connecting = endpoint.connect(config, address, &server.host);
            let connection = connecting.map_err(|error| failed(io::Error::other(error)))?.await;
            let connection = connection.map_err(|error| quic_error(server, error))?;
            Wire::over_quic(connection, Side::Edge, ()).await.map_err(|end| ended(server, end))
        }
    };
    each(server, addresses, patience, ConnectError::is_answer, attempt).await
}

async fn over_websocket(
    server: &Server,
    addresses: &[SocketAddr],
    tls: Arc<rustls::ClientConfig>,
) -> Result<Wire, ConnectError> {
    let stream = dial_any(server, addresses, tls).await?;
    let request = format!("wss://{server}/v1/session");
    let upgrade = tokio_tungstenite::client_async_with_config(request, stream, Some(ws_config()));
    match tokio::time::timeout(CONNECT_TIMEOUT, upgrade).await {
        Ok(Ok((socket, _))) => Ok(Wire::over_websocket(socket, Side::Edge, ())),
        Ok(Err(WsError::Http(response))) => Err(refusal(server, *response)),
        Ok(Err(error)) => Err(ended(server, End::WebSocket(error))),
        Err(_) => Err(DialError::Timeout(server.clone(), CONNECT_TIMEOUT).into()),
    }
}

/// What ended a connection.
pub(super) fn ended(server: &Server, end: End) -> ConnectError {
    match end {
        // In TLS 1.3 a client learns only with its first read that its certificate was refused.
        End::WebSocket(WsError::Io(error)) | End::Quic(error)
            if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) =>
        {
            tls_error(server, error).into()
        }
        End::WebSocket(WsError::Io(error)) | End::Quic(error) => DialError::Network(server.clone(), error).into(),
        End::WebSocket(error) => ConnectError::Ended(format!("the connection broke: {error}")),
        End::Closed => ConnectError::Ended("the cloud closed the connection".to_owned()),
        End::Told(reason) => ConnectError::Closed(reason, None),
        End::Busy(reason) => ConnectError::Closed(reason, Some(BUSY)),
        End::Garbage(cause) => ConnectError::Ended(format!("the cloud broke the protocol: {cause}")),
    }
}

fn quic_error(server: &Server, error: ConnectionError) -> ConnectError {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error as Tls};
    match error {
        // Our own TLS says no. QUIC keeps of that only what the peer is told.
        ConnectionError::TransportError(error) => {
            let refused = match transport::alert(error.code) {
                Some(Alert::CertificateExpired) => Tls::InvalidCertificate(Bad::Expired),
                Some(Alert::BadCertificate) => Tls::InvalidCertificate(Bad::NotValidForName),
                Some(Alert::UnknownCA | Alert::DecryptError) => Tls::InvalidCertificate(Bad::UnknownIssuer),
                Some(_) => Tls::General(error.to_string()),
                None => return DialError::Network(server.clone(), io::Error::other(error)).into(),
            };
            tls_error(server, io::Error::new(io::ErrorKind::InvalidData, refused)).into()
        }
        error => ended(server, transport::lost(error)),
    }
}

fn refusal(server: &Server, response: Response<Option<Vec<u8>>>) -> ConnectError {
    let status = response.status().as_u16();
    let seconds = response.headers().get("retry-after").and_then(|value| value.to_str().ok()?.trim().parse().ok());
    let retry_after = seconds.map(|seconds| Duration::from_secs(seconds).min(MAX_TOLD));
    let refusal = response.into_body().and_then(|body| serde_json::from_slice(&body).ok());
    match refusal {
        Some(refusal) => ConnectError::Refused(refusal, retry_after),
        None => ConnectError::Status { server: server.clone(), status, retry_after },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quic_that_falls_silent_again_and_again_is_left_alone_until_the_network_changes() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let (with, without) = ((true, true), (false, true));
        let mut choice = Choice::new(Transport::Auto);
        for minute in 0..2 {
            choice.quic_ended(minutes(1), true, minutes(minute));
        }
        // One that stood long, or that the cloud ended, starts the count over.
        choice.quic_ended(minutes(5), true, minutes(2));
        for minute in 3..5 {
            choice.quic_ended(minutes(1), true, minutes(minute));
        }
        choice.quic_ended(minutes(1), false, minutes(5));
        for minute in 6..8 {
            choice.quic_ended(minutes(1), true, minutes(minute));
        }
        assert_eq!(choice.plan(minutes(8)), with);
        choice.quic_ended(minutes(1), true, minutes(8));
        assert_eq!((choice.plan(minutes(17)), choice.plan(minutes(18))), (without, with));
        // It was tried again, and once more was enough.
        choice.quic_ended(minutes(1), true, minutes(19));
        assert_eq!((choice.plan(minutes(38)), choice.plan(minutes(39))), (without, with));
        choice.quic_ended(Duration::ZERO, true, minutes(40));
        assert_eq!(choice.plan(minutes(41)), without);
        choice.network_changed();
        assert_eq!(choice.plan(minutes(41)), with);
        // A session that never began and of which nothing was heard is enough, too; one that was refused is none.
        choice.quic_ended(Duration::ZERO, false, minutes(42));
        assert_eq!(choice.plan(minutes(42)), with);
        choice.quic_ended(Duration::ZERO, true, minutes(43));
        assert_eq!((choice.plan(minutes(52)), choice.plan(minutes(53))), (without, with));
    }

    /// What brings this after so many turns.
    async fn after<T>(turns: u32, brings: T) -> T {
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        brings
    }

    #[tokio::test]
    async fn a_websocket_is_tried_when_quic_has_had_its_time_whatever_quic_does() {
        let broken = |word: &str| ConnectError::Ended(word.to_owned());
        let alone = || after(9, ());
        let never = || std::future::pending::<Result<&str, ConnectError>>();
        let websocket = || async { Ok("websocket") };
        assert_eq!(either(never(), websocket(), alone()).await.unwrap(), ("websocket", false));
        assert_eq!(
            either(after(1, Err(broken("udp"))), websocket(), std::future::pending()).await.unwrap().0,
            "websocket"
        );
        // What is late is not given up because the other has begun, or has failed.
        assert_eq!(either(after(20, Ok("quic")), never(), alone()).await.unwrap(), ("quic", true));
        assert_eq!(either(after(20, Ok("quic")), after(1, Err(broken("tcp"))), alone()).await.unwrap(), ("quic", true));
        // Before that nothing of it begins.
        let none = async { panic!("too early") };
        assert_eq!(either(after(5, Ok("quic")), none, alone()).await.unwrap(), ("quic", true));
        for (quic, websocket) in [(1, 1), (20, 1), (20, 30)] {
            let (quic, websocket) = (after(quic, Err(broken("udp"))), after(websocket, Err(broken("tcp"))));
            assert_eq!(either::<()>(quic, websocket, alone()).await.unwrap_err().to_string(), "tcp");
        }
        let busy = ConnectError::Closed("busy".to_owned(), None);
        assert!(either(after(20, Err(busy)), never(), alone()).await.unwrap_err().to_string().contains("busy"));
    }

    #[test]
    fn how_long_a_server_is_not_to_be_asked_is_read_and_bounded() {
        let server = Server { host: "cloud".to_owned(), port: 1 };
        let retry_after = |value: &str, body: &[u8]| {
            let response = Response::builder().status(503).header("Retry-After", value);
            refusal(&server, response.body(Some(body.to_vec())).unwrap()).retry_after()
        };
        let said = br#"{"reason":"busy","message":"too much is going on"}"#;
        for body in [said.as_slice(), b"no JSON"] {
            assert_eq!(retry_after("5", body), Some(Duration::from_secs(5)));
            assert_eq!(retry_after("999999999999", body), Some(MAX_TOLD));
            assert_eq!(retry_after("Wed, 21 Oct 2026 07:28:00 GMT", body), None);
        }
        let busy = ended(&server, End::Busy("too many requests at once".to_owned()));
        assert_eq!(busy.retry_after(), Some(BUSY));
    }

    #[test]
    fn why_there_is_no_quic_is_said_in_words_that_help() {
        use quinn_proto::{ConnectionClose, TransportErrorCode};
        let server = Server { host: "cloud".to_owned(), port: 1 };
        let told = |error| quic_error(&server, error).to_string();
        let peer = |error_code| {
            let reason = bytes::Bytes::new();
            told(ConnectionError::ConnectionClosed(ConnectionClose { error_code, frame_type: None, reason }))
        };
        let own = |alert| told(ConnectionError::TransportError(TransportErrorCode::crypto(alert).into()));
        let cases = [
            (peer(TransportErrorCode::crypto(45)), "refused this node's certificate (CertificateExpired)"),
            (peer(TransportErrorCode::crypto(48)), "refused this node's certificate (UnknownCA)"),
            (peer(TransportErrorCode::CONNECTION_REFUSED), "closed the connection: the server refused"),
            (own(45), "set the clock"),
            (own(42), "not for the name \"cloud\""),
            (own(48), "not signed by this cluster's CA"),
            (own(48), "if the cluster has another CA by now, run `edgecore reset`"),
            (told(ConnectionError::TimedOut), "cannot be reached: timed out"),
        ];
        for (told, expected) in cases {
            assert!(told.contains(expected), "{told:?} does not say {expected:?}");
        }
    }

    #[test]
    fn quic_is_left_alone_for_longer_and_longer_and_tried_again() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let mut choice = Choice::new(Transport::Auto);
        assert_eq!(choice.plan(minutes(0)), (true, true));
        choice.avoid_quic(minutes(0));
        assert_eq!((choice.plan(minutes(9)), choice.plan(minutes(10))), ((false, true), (true, true)));
        choice.avoid_quic(minutes(10));
        assert_eq!((choice.plan(minutes(29)), choice.plan(minutes(30))), ((false, true), (true, true)));
        for _ in 0..20 {
            choice.avoid_quic(minutes(30));
        }
        assert_eq!(choice.plan(minutes(30 + 360)), (true, true));
        choice.quic_ended(Duration::ZERO, false, minutes(399));
        choice.avoid_quic(minutes(400));
        assert_eq!(choice.plan(minutes(410)), (true, true));
        assert_eq!(Choice::new(Transport::Quic).plan(minutes(0)), (true, false));
        assert_eq!(Choice::new(Transport::WebSocket).plan(minutes(0)), (false, true));
    }
}
