//! The HTTP/1.1 endpoints. Whatever is refused is refused with a [`Refusal`] in JSON, whose reason is stable.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{
    AUTHORIZATION, CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, SEC_WEBSOCKET_ACCEPT,
    SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::service::service_fn;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::pki_types::CertificateDer;
use skerry_proto::payload::{JoinRequest, Refusal};
use skerry_proto::transport::ws_config;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;
use tracing::debug;

use super::{AGENT, Front};
use crate::backend::Backend;
use crate::clock;
use crate::pki::{NodeCertificate, node_of};
use crate::secrets::SecretStore;

/// A request must have come whole after this long.
const READ_PATIENCE: Duration = Duration::from_secs(10);
/// A connection that is no session ends after this long.
const PATIENCE: Duration = Duration::from_secs(90);
const MAX_BODY: usize = 64 << 10;
/// When to come again whoever cannot be served now.
const RETRY_SECONDS: u16 = 5;

/// What a WebSocket of a session runs on.
pub(super) type Carried = TokioIo<Upgraded>;

/// An answer that says no.
#[derive(Debug)]
pub(super) struct No {
    pub(super) status: StatusCode,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

impl No {
    pub(super) fn new(status: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self { status, reason, message: message.into() }
    }
}

type Answer = Response<Full<Bytes>>;

/// Who is at the other end.
struct Peer {
    address: String,
    certificate: Option<CertificateDer<'static>>,
    upgrade: Mutex<Option<(OnUpgrade, NodeCertificate)>>,
}

/// Serves one connection to its end, or until it becomes a session's.
pub(super) async fn serve<B: Backend, S: SecretStore>(
    front: Arc<Front<B, S>>,
    tls: TlsStream<TcpStream>,
    certificate: Option<CertificateDer<'static>>,
    address: String,
) -> Option<(WebSocketStream<Carried>, NodeCertificate)> {
    let peer = Arc::new(Peer { address, certificate, upgrade: Mutex::default() });
    let service = service_fn(|request| {
        let (front, peer) = (Arc::clone(&front), Arc::clone(&peer));
        async move { Ok::<_, Infallible>(answer(&front, &peer, request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READ_PATIENCE)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(tls), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let served = async {
        tokio::select! {
            served = connection.as_mut() => return served,
            () = front.stop.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        // The request at hand is answered to its end.
        connection.await
    };
    match tokio::time::timeout(PATIENCE, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(peer = peer.address, "the connection broke: {error}"),
        Err(_) => debug!(peer = peer.address, "the connection took too long"),
    }
    let (upgrade, node) = peer.upgrade.lock().unwrap_or_else(PoisonError::into_inner).take()?;
    let upgraded = tokio::time::timeout(READ_PATIENCE, upgrade).await.ok()?.ok()?;
    Some((WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(ws_config())).await, node))
}

/// Says that this is not the time, and hears the request out, as far as it has come: closing on unread bytes would take the answer back.
pub(super) async fn busy(mut tls: TlsStream<TcpStream>) {
    let no = Refusal {
        reason: "busy".to_owned(),
        message: "cloudcore has too many requests at once; try again in some seconds".to_owned(),
    };
    // Strings only: writing them cannot fail.
    let body = serde_json::to_string(&no).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\nretry-after: {RETRY_SECONDS}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let mut heard = [0; 1024];
    if tls.write_all(answer.as_bytes()).await.is_ok() && tls.shutdown().await.is_ok() {
        while let Ok(1..) = tls.read(&mut heard).await {}
    }
}

async fn answer<B: Backend, S: SecretStore>(front: &Front<B, S>, peer: &Peer, request: Request<Incoming>) -> Answer {
    let path = request.uri().path().to_owned();
    let answered = match (request.method(), path.as_str()) {
        (&Method::GET, "/") => Ok(text(format!(
            "{AGENT}: edge nodes join and connect here (`edgecore join HOST:PORT --token T`); `cloudcore token create` makes the token\n"
        ))),
        (&Method::GET, "/v1/ca") => Ok(text(front.authority.current().pem().to_owned())),
        (&Method::POST, "/v1/join") => join(front, peer, request).await,
        (&Method::POST, "/v1/renew") => renew(front, peer, request).await,
        (&Method::GET, "/v1/session") => session(peer, request),
        (_, "/" | "/v1/ca" | "/v1/join" | "/v1/renew" | "/v1/session") => {
            Err(No::new(StatusCode::METHOD_NOT_ALLOWED, "method", format!("{path} is not for {}", request.method())))
        }
        _ => Err(No::new(
            StatusCode::NOT_FOUND,
            "not_found",
            format!("{AGENT} knows no such path; is the edgecore that asks for it much newer?"),
        )),
    };
    answered.unwrap_or_else(|no| {
        debug!(peer = peer.address, path, reason = no.reason, "refused: {}", no.message);
        refusal(no)
    })
}

async fn join<B: Backend, S: SecretStore>(
    front: &Front<B, S>,
    peer: &Peer,
    request: Request<Incoming>,
) -> Result<Answer, No> {
    let bearer = bearer(request.headers());
    let joined = async {
        let body: JoinRequest = json(request).await?;
        front.join(&bearer?, &body, &peer.address, clock::wall()).await
    };
    let joined = joined.await;
    front.metrics.join(joined.as_ref().map_or_else(|no| no.reason, |_| "ok"));
    joined.map(|response| json_answer(StatusCode::OK, &response))
}

async fn renew<B: Backend, S: SecretStore>(
    front: &Front<B, S>,
    peer: &Peer,
    request: Request<Incoming>,
) -> Result<Answer, No> {
    #[derive(serde::Deserialize)]
    struct Renewal {
        csr: String,
    }
    let renewed = async {
        let node = peer.node()?;
        let body: Renewal = json(request).await?;
        front.renew(&node, &body.csr, clock::wall()).await
    };
    let renewed = renewed.await;
    front.metrics.renewal(renewed.as_ref().map_or_else(|no| no.reason, |_| "ok"));
    renewed.map(|response| json_answer(StatusCode::OK, &response))
}

/// Answers the WebSocket handshake; the session begins when the connection has been handed over.
fn session(peer: &Peer, mut request: Request<Incoming>) -> Result<Answer, No> {
    let node = peer.node()?;
    let headers = request.headers();
    let key = headers.get(SEC_WEBSOCKET_KEY).filter(|_| {
        has_token(headers, &CONNECTION, "upgrade")
            && has_token(headers, &UPGRADE, "websocket")
            && headers.get(SEC_WEBSOCKET_VERSION).is_some_and(|version| version == "13")
    });
    let Some(key) = key else {
        let message = "/v1/session is a WebSocket (version 13); the request does not ask for an upgrade to one";
        return Err(No::new(StatusCode::UPGRADE_REQUIRED, "websocket_required", message));
    };
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|_| No::new(StatusCode::BAD_REQUEST, "websocket_required", "the WebSocket key cannot be answered"))?;
    let upgrade = hyper::upgrade::on(&mut request);
    *peer.upgrade.lock().unwrap_or_else(PoisonError::into_inner) = Some((upgrade, node));
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    Ok(response)
}

impl Peer {
    fn node(&self) -> Result<NodeCertificate, No> {
        node(self.certificate.as_ref())
    }
}

/// Whose certificate it is; it may have expired.
pub(super) fn node(certificate: Option<&CertificateDer<'_>>) -> Result<NodeCertificate, No> {
    let certificate = certificate.ok_or_else(|| {
        let message = "this needs the node's certificate, and none was shown; `edgecore join` gets one";
        No::new(StatusCode::UNAUTHORIZED, "certificate_required", message)
    })?;
    node_of(certificate).map_err(|error| {
        let message = format!("{error}; get a node's certificate with `edgecore join`");
        No::new(StatusCode::FORBIDDEN, "certificate_invalid", message)
    })
}

async fn json<T: serde::de::DeserializeOwned>(request: Request<Incoming>) -> Result<T, No> {
    let body = Limited::new(request.into_body(), MAX_BODY).collect();
    let body = match tokio::time::timeout(READ_PATIENCE, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let message = format!("the request's body is larger than {MAX_BODY} bytes");
            return Err(No::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message));
        }
        Ok(Err(error)) => {
            let message = format!("the request's body broke off: {error}");
            return Err(No::new(StatusCode::BAD_REQUEST, "request_malformed", message));
        }
        Err(_) => {
            let message = format!("the request's body did not come within {} s", READ_PATIENCE.as_secs());
            return Err(No::new(StatusCode::REQUEST_TIMEOUT, "request_slow", message));
        }
    };
    serde_json::from_slice(&body).map_err(|error| {
        let message = format!("the request's body is not what this path takes: {error}");
        No::new(StatusCode::BAD_REQUEST, "request_malformed", message)
    })
}

fn bearer(headers: &HeaderMap) -> Result<String, No> {
    let value = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Ok(token.trim().to_owned()),
        _ => {
            let message = "the join token is missing: it goes into `Authorization: Bearer TOKEN`";
            Err(No::new(StatusCode::UNAUTHORIZED, "token_malformed", message))
        }
    }
}

fn has_token(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|token| token.trim().eq_ignore_ascii_case(wanted))
}

fn text(body: String) -> Answer {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

fn refusal(no: No) -> Answer {
    let (status, reason) = (no.status, no.reason.to_owned());
    let mut response = json_answer(status, &Refusal { reason, message: no.message });
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(RETRY_SECONDS));
    }
    response
}

fn json_answer(status: StatusCode, body: &impl serde::Serialize) -> Answer {
    // Strings and numbers only: writing them cannot fail.
    let mut response = Response::new(Full::new(Bytes::from(serde_json::to_vec(body).unwrap_or_default())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
