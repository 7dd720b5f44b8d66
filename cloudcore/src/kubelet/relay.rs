//! One request on one stream of the node's session: HTTP/1.1 both ways, with what an upgrade makes of it.
//!
//! Nothing outlives the request: whoever drops the answer's body or the upgraded pair ends the stream, and a stream that ends ends them.
//! Both directions go through buffers of [`BUFFER`] at most; the rest waits where it comes from.

use std::error::Error;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::FusedFuture as _;
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{
    AUTHORIZATION, CONNECTION, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::TokioIo;
use skerry_proto::mux::Class;
use skerry_proto::ops;
use skerry_proto::streams::{Gone, StreamError, Streams};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Sleep;
use tracing::debug;

use super::metrics::Open;
use super::spdy::Kind;
use super::{spdy, websocket};
use crate::retry::chain;
use crate::supervise::spawn;

/// What a direction may hold, and so the longest head.
pub(super) const BUFFER: usize = 64 << 10;
/// What an upgraded direction holds: what a runtime puts into one frame of a command's output.
const COPY_BUFFER: usize = 32 << 10;
/// How long both ends may take to have changed their protocol.
const UPGRADE_PATIENCE: Duration = Duration::from_secs(10);
/// What a client may have to say yet when the node has ended.
const LINGER: Duration = Duration::from_secs(5);
/// How long a node may take to begin an answer: a little more than its runtime may.
const HEAD_PATIENCE: Duration = Duration::from_secs(130);
/// A stream that broke says why at once.
const CAUSE_PATIENCE: Duration = Duration::from_secs(1);

/// What the last words of a log may take to get to the client's socket.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What a client gets.
pub(super) type Answer = Response<Either<Full<Bytes>, Relayed>>;

/// A body that comes from the node, and the stream that it comes on.
#[derive(Debug)]
pub(super) struct Relayed {
    body: Incoming,
    /// Whose log it is, if it is one.
    log_of: Option<String>,
    /// What comes once it was said that the log broke off.
    broke: Option<(hyper::Error, Pin<Box<Sleep>>)>,
    _exchange: Exchange,
}

/// Both ends of what was upgraded.
pub(super) struct Upgrades {
    client: OnUpgrade,
    node: OnUpgrade,
    /// What is looked at of what the node says.
    frames: Option<Frames>,
    _exchange: Exchange,
}

/// The frames of a session that is to be told when it breaks off.
enum Frames {
    Spdy(spdy::Frames),
    WebSocket(websocket::Frames),
}

/// The task that drives a stream; it ends with this.
#[derive(Debug)]
pub(super) struct Exchange {
    task: JoinHandle<()>,
    _open: Open,
}

/// Why there is no answer of the node's.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    /// The session is over.
    #[error("node {node} is offline, {cause}")]
    Offline { node: String, cause: String },
    /// The session cannot take another stream.
    #[error("node {node} serves as many requests as it may, {cause}")]
    Busy { node: String, cause: String },
    /// The node did not answer as it should.
    #[error("node {node} did not answer, {cause}")]
    Broken { node: String, cause: String },
    /// The node has the request, and says nothing.
    #[error("node {node} has a session with cloudcore and did not begin an answer within {} s", HEAD_PATIENCE.as_secs())]
    Silent { node: String },
}

impl Failed {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Offline { .. } | Self::Busy { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::Broken { .. } => StatusCode::BAD_GATEWAY,
            Self::Silent { .. } => StatusCode::GATEWAY_TIMEOUT,
        }
    }
}

impl Frames {
    fn broken(&self, message: &str) -> Option<Vec<u8>> {
        match self {
            Self::Spdy(frames) => frames.broken(message),
            Self::WebSocket(frames) => frames.broken(message),
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Asks the node, on a stream that whoever `watched` tells of it may watch. After a `101` both ends are to be copied into each other. The
/// request is for this `route` of a kubelet's, and counted as `open` while it goes on.
pub(super) async fn forward(
    (node, route): (&str, &str),
    streams: &Streams,
    mut request: Request<Incoming>,
    watched: &watch::Sender<Option<Gone>>,
    open: Open,
) -> Result<(Answer, Option<Upgrades>), Failed> {
    let stream =
        streams.open(class(request.uri().path()), Bytes::from_static(ops::KUBELET)).map_err(|error| match error {
            StreamError::Ended(cause) => Failed::Offline { node: node.to_owned(), cause: cause.to_string() },
            StreamError::Refused(error) => Failed::Busy { node: node.to_owned(), cause: error.to_string() },
        })?;
    watched.send_replace(Some(stream.gone()));
    let client = hyper::upgrade::on(&mut request);
    let upgrade = upgrade_of(request.headers());
    let log_of = (route == "containerLogs").then(|| node.to_owned());
    let broken = |error: &(dyn Error + 'static)| failure(node, streams, error);
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(BUFFER)
        .handshake::<_, Incoming>(TokioIo::new(stream))
        .await
        .map_err(|error| broken(&error))?;
    let (ended, cause) = oneshot::channel();
    let task = spawn("kubelet request", async move {
        if let Err(error) = connection.with_upgrades().await {
            // Nobody listens any more once there was a head: the body says it then.
            let _ = ended.send(error);
        }
    });
    let exchange = Exchange { task, _open: open };
    let answered = async {
        let answered = sender.send_request(outgoing(request, upgrade.as_ref()));
        match route {
            // Its answer begins with the command's end.
            "run" => Ok(answered.await),
            _ => tokio::time::timeout(HEAD_PATIENCE, answered).await,
        }
    };
    let answered = answered.await.map_err(|_| Failed::Silent { node: node.to_owned() })?;
    let mut response = match answered {
        Ok(response) if response.status().is_redirection() && !stays_here(response.headers()) => {
            let cause = "it sent whoever asked to somewhere else, which a node may not".to_owned();
            return Err(Failed::Broken { node: node.to_owned(), cause });
        }
        Ok(response) => response,
        Err(error) if error.source().is_some() => return Err(broken(&error)),
        // The stream broke before the request was on it; its own end says why.
        Err(error) => match tokio::time::timeout(CAUSE_PATIENCE, cause).await {
            Ok(Ok(cause)) => return Err(broken(&cause)),
            _ => return Err(broken(&error)),
        },
    };
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        without_hop(response.headers_mut());
        let relayed = |body: Incoming| {
            // To a length that was told nothing can be added.
            let log_of = log_of.filter(|_| body.size_hint().exact().is_none());
            Either::Right(Relayed { body, log_of, broke: None, _exchange: exchange })
        };
        return Ok((response.map(relayed), None));
    }
    let Some(_) = upgrade else {
        let cause = "it switched protocols, which nobody asked for".to_owned();
        return Err(Failed::Broken { node: node.to_owned(), cause });
    };
    let node = hyper::upgrade::on(&mut response);
    let switched = upgrade_of(response.headers());
    without_hop(response.headers_mut());
    with_upgrade(response.headers_mut(), switched.as_ref());
    let kind = match route {
        "exec" | "attach" => Some(Kind::Command),
        "portForward" => Some(Kind::PortForward),
        _ => None,
    };
    let frames = match switched.as_ref().map(|protocol| protocol.as_bytes().to_ascii_lowercase()).as_deref() {
        Some(b"spdy/3.1") => kind.map(|kind| Frames::Spdy(spdy::Frames::new(kind))),
        Some(b"websocket") => kind.map(|kind| {
            let agreed = response.headers().get(SEC_WEBSOCKET_PROTOCOL).and_then(|agreed| agreed.to_str().ok());
            Frames::WebSocket(websocket::Frames::new(kind, agreed.unwrap_or_default()))
        }),
        _ => None,
    };
    let upgrades = Upgrades { client, node, frames, _exchange: exchange };
    Ok((response.map(|_| Either::Left(Full::default())), Some(upgrades)))
}

/// Whether a redirect is to another path below the same one: where the client's credentials may go.
fn stays_here(headers: &HeaderMap) -> bool {
    let Some(location) = headers.get(LOCATION) else { return true };
    let Ok(location) = location.to_str() else { return false };
    let path = location.split(['?', '#']).next().unwrap_or_default();
    !path.starts_with('/') && !path.contains([':', '\\'])
}

/// Which end of a pair failed.
enum Broke {
    Reading(io::Error),
    Writing(io::Error),
}

impl Upgrades {
    /// Copies both ways until the node has ended, or the client is gone. A client whose command or port-forward broke off is told so.
    pub(super) async fn copy(self, name: &str) {
        let Self { client, node, mut frames, _exchange } = self;
        let upgraded = tokio::time::timeout(UPGRADE_PATIENCE, async { tokio::try_join!(client, node) }).await;
        let Ok(Ok((client, node))) = upgraded else { return };
        let (from_client, mut to_client) = tokio::io::split(TokioIo::new(client));
        let (from_node, mut to_node) = tokio::io::split(TokioIo::new(node));
        let up = async {
            pump(from_client, &mut to_node, None).await?;
            to_node.shutdown().await.map_err(Broke::Writing)
        };
        let mut up = pin!(up.fuse());
        let ended = {
            let mut down = pin!(pump(from_node, &mut to_client, frames.as_mut()));
            tokio::select! {
                ended = &mut down => ended,
                ended = &mut up => match ended {
                    Err(Broke::Reading(error)) => return debug!(node = name, "the client of a stream is gone: {error}"),
                    // What the node has said is still to be read; that it takes no more may be because it is done.
                    Err(Broke::Writing(_)) => down.await,
                    // Its streams end one by one; the end of their connection is a client that has hung up.
                    Ok(()) => tokio::time::timeout(LINGER, down).await.unwrap_or(Ok(())),
                },
            }
        };
        let cause = match ended {
            Ok(()) => "the node ended it without a word on how it went".to_owned(),
            Err(Broke::Reading(error)) => {
                debug!(node = name, "a stream of the node's broke: {error}");
                error.to_string()
            }
            Err(Broke::Writing(error)) => return debug!(node = name, "the client of a stream is gone: {error}"),
        };
        if let Some(farewell) = frames.and_then(|frames| frames.broken(&format!("node {name} broke off, {cause}")))
            && to_client.write_all(&farewell).await.is_err()
        {
            return;
        }
        if to_client.shutdown().await.is_ok() && !up.is_terminated() {
            // Whoever hangs up first loses what is on its way: that is to be the client.
            let _ = tokio::time::timeout(LINGER, up).await;
        }
    }
}

/// Copies to the end; of frames whole ones.
async fn pump(
    from: impl AsyncRead,
    to: &mut (impl AsyncWrite + Unpin),
    mut frames: Option<&mut Frames>,
) -> Result<(), Broke> {
    let (mut from, mut buffer, mut framed) = (pin!(from), vec![0; COPY_BUFFER], Vec::new());
    loop {
        let mut bytes = from.read(&mut buffer).await.map_err(Broke::Reading)?;
        // Frames of the link are small, and each piece costs whoever reads it the same: what has come goes as one. An end comes again.
        let mut broken = None;
        while bytes > 0 && bytes < buffer.len() && broken.is_none() {
            match from.read(&mut buffer[bytes..]).now_or_never() {
                Some(Ok(more @ 1..)) => bytes += more,
                Some(Err(error)) => broken = Some(error),
                Some(Ok(0)) | None => break,
            }
        }
        let data = match &mut frames {
            _ if bytes == 0 => return Ok(()),
            Some(Frames::Spdy(frames)) => {
                framed.clear();
                frames.step(&buffer[..bytes], &mut framed);
                &framed[..]
            }
            Some(Frames::WebSocket(frames)) => {
                frames.see(&buffer[..bytes]);
                &buffer[..bytes]
            }
            None => &buffer[..bytes],
        };
        to.write_all(data).await.map_err(Broke::Writing)?;
        to.flush().await.map_err(Broke::Writing)?;
        if let Some(error) = broken {
            return Err(Broke::Reading(error));
        }
    }
}

/// Telemetry of devices yields to everything else on the link.
fn class(path: &str) -> Class {
    match path.trim_end_matches('/') {
        "/devices/values" | "/metrics/devices" => Class::Device,
        _ => Class::Ops,
    }
}

fn failure(node: &str, streams: &Streams, error: &(dyn Error + 'static)) -> Failed {
    let node = node.to_owned();
    let (io, cause) = cause(error);
    if streams.is_ended() || io.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionAborted) {
        return Failed::Offline { node, cause };
    }
    Failed::Broken { node, cause }
}

/// What an error is of: that of the stream, if there is one, and its words.
fn cause<'a>(error: &'a (dyn Error + 'static)) -> (Option<&'a io::Error>, String) {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    let io = deepest.downcast_ref::<io::Error>();
    (io, io.map_or_else(|| chain(error), io::Error::to_string))
}

/// The request as the node gets it: without credentials, and without what is between two ends of one connection.
fn outgoing(request: Request<Incoming>, upgrade: Option<&HeaderValue>) -> Request<Incoming> {
    let (mut head, body) = request.into_parts();
    let path = head.uri.path_and_query().map_or_else(|| Uri::from_static("/"), |path| Uri::from(path.clone()));
    head.uri = path;
    head.version = Version::HTTP_11;
    without_hop(&mut head.headers);
    for credential in [AUTHORIZATION, PROXY_AUTHORIZATION, hyper::header::COOKIE, EXPECT] {
        head.headers.remove(credential);
    }
    without_claims(&mut head.headers);
    head.headers.entry(HOST).or_insert(HeaderValue::from_static("kubelet"));
    match upgrade {
        Some(_) => with_upgrade(&mut head.headers, upgrade),
        // One request on a stream.
        None => drop(head.headers.insert(CONNECTION, HeaderValue::from_static("close"))),
    }
    Request::from_parts(head, body)
}

/// Removes who the client is, or says to be: the box is told nothing of that, and has nobody's token.
fn without_claims(headers: &mut HeaderMap) {
    let claims =
        |name: &&HeaderName| name.as_str().starts_with("impersonate-") || name.as_str().starts_with("x-remote-");
    for name in headers.keys().filter(claims).cloned().collect::<Vec<_>>() {
        headers.remove(name);
    }
    // The way of browsers to show a token (apiserver's `websocket.protocolAuthenticator`).
    let bearer = |protocol: &&str| !protocol.starts_with("base64url.bearer.authorization.k8s.io.");
    let protocols = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    let rest: Vec<&str> = protocols.flat_map(|value| value.split(',')).map(str::trim).filter(bearer).collect();
    let rest = HeaderValue::try_from(rest.join(", ")).ok().filter(|rest| !rest.is_empty());
    match rest {
        Some(rest) => drop(headers.insert(SEC_WEBSOCKET_PROTOCOL, rest)),
        None => drop(headers.remove(SEC_WEBSOCKET_PROTOCOL)),
    }
}

/// The protocol that is asked for, or switched to.
pub(super) fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let named = listed(headers).any(|name| name.eq_ignore_ascii_case("upgrade"));
    headers.get(UPGRADE).filter(|_| named).cloned()
}

fn with_upgrade(headers: &mut HeaderMap, protocol: Option<&HeaderValue>) {
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    if let Some(protocol) = protocol {
        headers.insert(UPGRADE, protocol.clone());
    }
}

/// What the header Connection names.
fn listed(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

/// Removes what concerns one connection only (RFC 9110, 7.6.1).
fn without_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = listed(headers).filter_map(|name| name.parse().ok()).collect();
    let hop = [CONNECTION, UPGRADE, TE, TRAILER, TRANSFER_ENCODING, PROXY_AUTHENTICATE];
    let hop = hop.into_iter().chain(["keep-alive", "proxy-connection"].map(HeaderName::from_static));
    // An answer's length is no matter of the connection, whoever names it there.
    for name in named.into_iter().filter(|name| *name != hyper::header::CONTENT_LENGTH && *name != HOST).chain(hop) {
        headers.remove(name);
    }
}

impl Body for Relayed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        if let Some((_, said)) = &mut this.broke {
            // An error would have hyper drop what it has not written yet.
            ready!(said.as_mut().poll(context));
            return Poll::Ready(this.broke.take().map(|(error, _)| Err(error)));
        }
        match ready!(Pin::new(&mut this.body).poll_frame(context)) {
            Some(Err(error)) => {
                let Some(node) = this.log_of.take() else { return Poll::Ready(Some(Err(error))) };
                // The apiserver makes a good end of a log that breaks off: `kubectl logs -f` would end without a word.
                let words = format!("\nthe log broke off, node {node}: {}\n", cause(&error).1);
                this.broke = Some((error, Box::pin(tokio::time::sleep(LAST_WORDS))));
                Poll::Ready(Some(Ok(Frame::data(words.into()))))
            }
            frame => Poll::Ready(frame),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.broke.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let parsed = pairs
            .iter()
            .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap()));
        let mut headers = HeaderMap::new();
        for (name, value) in parsed {
            headers.append(name, value);
        }
        headers
    }

    #[test]
    fn what_is_between_two_ends_goes_no_further() {
        let mut got = headers(&[
            ("connection", "keep-alive, X-Private"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("x-stream-protocol-version", "v4.channel.k8s.io"),
            ("x-stream-protocol-version", "v3.channel.k8s.io"),
        ]);
        assert_eq!(upgrade_of(&got), None, "it is not named");
        without_hop(&mut got);
        assert_eq!(got.len(), 2);
        assert_eq!(got.get_all("x-stream-protocol-version").iter().count(), 2);
    }

    #[test]
    fn a_redirect_stays_below_its_path() {
        let stays = |location: &str| stays_here(&headers(&[("location", location)]));
        assert!(stays_here(&HeaderMap::new()) && stays("containers/") && stays("a/?x=http://b"));
        for away in ["http://evil/", "//evil/", "/logs/", "https:evil", "\\\\evil", "javascript:x"] {
            assert!(!stays(away), "{away}");
        }
    }

    #[test]
    fn telemetry_yields() {
        assert_eq!(class("/devices/values"), Class::Device);
        assert_eq!(class("/metrics/devices"), Class::Device);
        for path in ["/devices", "/devices/n/values", "/metrics", "/metrics/cadvisor", "/"] {
            assert_eq!(class(path), Class::Ops, "{path}");
        }
    }

    #[test]
    fn claims_and_tokens_stay_with_cloudcore() {
        let mut got = headers(&[
            ("impersonate-user", "admin"),
            ("x-remote-group", "system:masters"),
            ("sec-websocket-protocol", "v5.channel.k8s.io, base64url.bearer.authorization.k8s.io.c2VjcmV0"),
        ]);
        without_claims(&mut got);
        assert_eq!(got, headers(&[("sec-websocket-protocol", "v5.channel.k8s.io")]));
    }

    #[test]
    fn an_upgrade_is_asked_for_by_two_headers() {
        let asked = headers(&[("connection", "keep-alive, Upgrade"), ("upgrade", "SPDY/3.1")]);
        assert_eq!(upgrade_of(&asked).unwrap(), "SPDY/3.1");
        assert_eq!(upgrade_of(&headers(&[("connection", "upgrade")])), None);
    }
}
