//! The listeners, one for each node, and what becomes of a connection to one.
//!
//! A connection belongs to the node whose port it came to, whatever it asks for. Strangers are bounded as on the front's port: whoever has
//! proved nothing longest gives way. Those that were authenticated are bounded for each node and in all, and told so beyond it.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use skerry_proto::streams::Streams;
use skerry_proto::transport::TLS_BUFFER;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::peer::Peer;
use super::authn::{Authenticator, ClientAuthorities, Unauthenticated};
use super::authz::{Attributes, Authoriser};
use super::metrics::Metrics;
use super::ports::{Door, Ports};
use super::relay::{self, Answer, BUFFER};
use super::reviews::Reviews;
use crate::front::places::{Place, Places};
use crate::retry::{Backoff, chain};
use crate::supervise::Tasks;

mod peer;

const STRANGER_GRACE: Duration = Duration::from_secs(3);
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);
/// How long what came before a stream or its session was ended may take to get to a client.
const FAREWELL: Duration = Duration::from_secs(1);
/// The same for a command's: without its status it would be taken for a success.
const COMMAND_FAREWELL: Duration = Duration::from_secs(30);
/// How long a node may take to say why it refused.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(10);
/// A peer that is gone without a word is noticed so.
const KEEPALIVE: Duration = Duration::from_secs(30);
const PROBE: Duration = Duration::from_secs(10);

/// What connections may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// How many nobody has been authenticated on, of all nodes.
    pub(crate) strangers: usize,
    /// How many past that: of all nodes.
    pub(crate) all: usize,
    /// And of one. A session carries 128 streams.
    pub(crate) of_node: usize,
    /// How long a stranger's first head may be on its way; and one past that be idle, where few places are left.
    pub(crate) patience: Duration,
    /// How long one past that may be idle, or a head be on its way: as with a kubelet. What scrapes would shake hands each time.
    pub(crate) idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let (patience, idle) = (Duration::from_secs(10), Duration::from_secs(90));
        Self { strangers: 1024, all: 8192, of_node: 96, patience, idle }
    }
}

/// Finds a node's session.
type Find = Box<dyn Fn(&str) -> Option<Streams> + Send + Sync>;

/// All that a connection needs.
pub(crate) struct Server<R> {
    ports: Arc<Ports>,
    tls: TlsAcceptor,
    authenticator: Authenticator<R>,
    authoriser: Authoriser<R>,
    find: Find,
    metrics: Metrics,
    limits: Limits,
    strangers: Places,
    connections: Arc<Semaphore>,
    /// The apiserver could not be asked, and that was said.
    unasked: AtomicBool,
    stop: CancellationToken,
}

/// A port that is listened on; it is given back when nobody does any more.
struct Listening {
    ports: Arc<Ports>,
    port: u16,
    listener: Option<TcpListener>,
}

/// An answer that is not the node's.
struct No {
    status: StatusCode,
    message: String,
}

impl<R: Reviews> Server<R> {
    pub(crate) fn new(
        ports: Arc<Ports>,
        tls: Arc<ServerConfig>,
        (authorities, reviews): (Arc<ClientAuthorities>, R),
        find: impl Fn(&str) -> Option<Streams> + Send + Sync + 'static,
        (metrics, limits): (Metrics, Limits),
        stop: CancellationToken,
    ) -> Arc<Self> {
        let reviews = Arc::new(reviews);
        Arc::new(Self {
            ports,
            tls: tls.into(),
            authenticator: Authenticator::new(authorities, Arc::clone(&reviews)),
            authoriser: Authoriser::new(reviews),
            find: Box::new(find),
            metrics,
            limits,
            strangers: Places::new(limits.strangers, STRANGER_GRACE),
            connections: Arc::new(Semaphore::new(limits.all)),
            unasked: AtomicBool::new(false),
            stop,
        })
    }

    /// Listens for every node that has a port, until told to stop; what is open then ends within `drain`.
    pub(crate) async fn serve(self: Arc<Self>, drain: Duration) {
        let mut listeners = Tasks::new("kubelet port");
        loop {
            let (door, listener) = tokio::select! {
                () = self.stop.cancelled() => break,
                () = listeners.reap() => continue,
                opened = self.ports.opened() => opened,
            };
            let mut listening = Listening { ports: Arc::clone(&self.ports), port: door.port, listener: None };
            match TcpListener::from_std(listener) {
                Ok(listener) => {
                    listening.listener = Some(listener);
                    listeners.spawn(Arc::clone(&self).listen(door, listening, drain));
                }
                Err(error) => warn!(node = door.node.name, port = door.port, "cannot listen: {error}"),
            }
        }
        listeners.drain(drain + Duration::from_secs(1)).await;
    }

    async fn listen(self: Arc<Self>, door: Arc<Door>, listening: Listening, drain: Duration) {
        debug!(node = door.node.name, port = door.port, "listening for kubectl logs and exec of the node");
        let mut connections = Tasks::new("kubelet connection");
        let mut trouble = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
        // Made with the first connection: most nodes have none.
        let mut of_node = None;
        let patience = loop {
            let accepted = tokio::select! {
                // Whoever is connected was connected to a node that is gone, or somebody else's.
                () = door.closed.cancelled() => break FAREWELL,
                () = self.stop.cancelled() => break drain,
                () = connections.reap() => continue,
                accepted = listening.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(port = door.port, "cannot accept a connection: {error}");
                    tokio::select! {
                        () = door.closed.cancelled() => break FAREWELL,
                        () = tokio::time::sleep(trouble.wait()) => continue,
                    }
                }
            };
            trouble.reset();
            tokio::select! {
                () = self.strangers.room() => {}
                () = door.closed.cancelled() => break FAREWELL,
                () = self.stop.cancelled() => break drain,
            }
            let of_node = Arc::clone(of_node.get_or_insert_with(|| Arc::new(Semaphore::new(self.limits.of_node))));
            let (server, door, stranger) = (Arc::clone(&self), Arc::clone(&door), self.strangers.take());
            connections.spawn(async move { Box::pin(server.connection(door, of_node, stream, stranger)).await });
        };
        drop(listening);
        // The session of a node that is gone ends too, and what goes over it is told so.
        connections.drain(patience).await;
    }

    async fn connection(
        self: Arc<Self>,
        door: Arc<Door>,
        of_node: Arc<Semaphore>,
        stream: TcpStream,
        mut stranger: Place,
    ) {
        let _open = self.metrics.connection();
        let _ = stream.set_nodelay(true);
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(PROBE).with_retries(3);
        let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
        let shaken = tokio::select! {
            shaken = tokio::time::timeout(HANDSHAKE_PATIENCE, self.tls.accept(stream)) => shaken,
            () = stranger.evicted() => return,
        };
        let mut tls = match shaken {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => return debug!(node = door.node.name, "no TLS connection to the node's port: {error}"),
            Err(_) => return,
        };
        tls.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
        let certificates = tls.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
        let peer = Arc::new(Peer {
            door,
            of_node,
            certificates,
            place: Mutex::default(),
            asked: AtomicBool::new(false),
            known: Notify::new(),
            stream: watch::Sender::new(None),
            upgrades: Mutex::default(),
        });
        if !self.serve_http(tls, &peer, stranger).await {
            return;
        }
        let upgrades = peer.upgrades.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(upgrades) = upgrades {
            tokio::select! {
                () = upgrades.copy(&peer.door.node.name) => {}
                () = peer.stream_gone(COMMAND_FAREWELL) => {}
            }
        }
    }

    /// Serves requests until one is upgraded, or the connection ends; whether it ended well.
    async fn serve_http(self: &Arc<Self>, tls: TlsStream<TcpStream>, peer: &Arc<Peer>, stranger: Place) -> bool {
        let service = service_fn(|request| {
            let (server, peer) = (Arc::clone(self), Arc::clone(peer));
            async move { Ok::<_, Infallible>(server.answer(&peer, request).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.idle)
            .max_buf_size(BUFFER)
            .serve_connection(TokioIo::new(tls), service)
            .with_upgrades();
        let mut connection = std::pin::pin!(connection);
        let mut stranger = Some(stranger);
        let mut stopping = false;
        let mut patience = tokio::time::interval(self.limits.patience);
        patience.reset();
        loop {
            let evicted = async {
                match &mut stranger {
                    Some(stranger) => stranger.evicted().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                served = connection.as_mut() => {
                    if let Err(error) = &served {
                        debug!(node = peer.door.node.name, "a connection to the node's port broke: {}", chain(error));
                    }
                    return served.is_ok();
                }
                () = evicted => return false,
                () = peer.known.notified() => stranger = None,
                // A client that does not read would not hear of it.
                () = peer.stream_gone(FAREWELL) => return false,
                _ = patience.tick(), if !stopping => {
                    if stranger.is_some() && !peer.asked.load(Ordering::Relaxed) {
                        return false;
                    }
                    if stranger.is_none() && self.has_few_places(&peer.of_node) {
                        stopping = true;
                        connection.as_mut().graceful_shutdown();
                    }
                }
                () = self.stop.cancelled(), if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }

    /// Whether connections end once they are idle, for others to have their places.
    fn has_few_places(&self, of_node: &Semaphore) -> bool {
        let few = |places: &Semaphore, most| places.available_permits() <= most / 4;
        few(of_node, self.limits.of_node) || few(&self.connections, self.limits.all)
    }

    async fn answer(&self, peer: &Peer, request: Request<Incoming>) -> Answer {
        peer.asked.store(true, Ordering::Relaxed);
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let upgrade = relay::upgrade_of(request.headers());
        let node = peer.door.node.name.as_str();
        let Some(wanted) = Attributes::of(&method, &path) else {
            self.metrics.request("other", StatusCode::BAD_REQUEST);
            return no(No { status: StatusCode::BAD_REQUEST, message: "the path is not a plain one\n".to_owned() });
        };
        let answered = self.ask(peer, &wanted, request).await.unwrap_or_else(|No { status, message }| {
            // The apiserver tells whoever asked for logs what a 502 says; of a 503 it tells the number alone
            // (apimachinery's `NewGenericServerResponse`).
            let status = match (wanted.route, status) {
                ("containerLogs", StatusCode::SERVICE_UNAVAILABLE) => StatusCode::BAD_GATEWAY,
                (_, status) => status,
            };
            no(No { status, message })
        });
        let code = answered.status();
        let answered = if upgrade.is_some() && code.as_u16() >= 400 { refusal(answered).await } else { answered };
        self.metrics.request(wanted.route, code);
        debug!(node, %method, path, code = code.as_u16(), "request to the node's kubelet");
        answered
    }

    async fn ask(&self, peer: &Peer, wanted: &Attributes, request: Request<Incoming>) -> Result<Answer, No> {
        let node = peer.door.node.name.as_str();
        peer.stream.send_replace(None);
        let user = match self.authenticator.user(&peer.certificates, request.headers()).await {
            Ok(user) => user,
            Err(Unauthenticated::Nobody(why)) => {
                debug!(node, "unauthorized: {why}");
                return Err(No { status: StatusCode::UNAUTHORIZED, message: "Unauthorized".to_owned() });
            }
            Err(error) => return Err(self.unasked(&error)),
        };
        match self.authoriser.allows(&user, node, wanted).await {
            Ok(true) => self.unasked.store(false, Ordering::Relaxed),
            Ok(false) => return Err(No { status: StatusCode::FORBIDDEN, message: wanted.forbidden(&user) }),
            Err(error) => return Err(self.unasked(&error)),
        }
        peer.settle(&self.connections)?;
        let Some(streams) = (self.find)(node) else { return Err(self.offline(node)) };
        match relay::forward((node, wanted.route), &streams, request, &peer.stream, self.metrics.stream()).await {
            Ok((answer, upgrades)) => {
                *peer.upgrades.lock().unwrap_or_else(PoisonError::into_inner) = upgrades;
                Ok(answer)
            }
            Err(error) => Err(No { status: error.status(), message: format!("{error}\n") }),
        }
    }

    /// What the apiserver does not say is not allowed.
    fn unasked(&self, error: &(dyn std::error::Error + 'static)) -> No {
        let cause = chain(error);
        if !self.unasked.swap(true, Ordering::Relaxed) {
            warn!("requests to kubelets of nodes are refused: {cause}; if it is forbidden, apply deploy/rbac.yaml");
        }
        let message = format!("cloudcore cannot make sure that this is allowed, so it is not: {cause}\n");
        No { status: StatusCode::SERVICE_UNAVAILABLE, message }
    }

    fn offline(&self, node: &str) -> No {
        let since = self.ports.away_since(node).map(|since| format!(" since {since:.0}")).unwrap_or_default();
        let message = format!("node {node} is offline{since}, it has no session with cloudcore; its pods go on\n");
        No { status: StatusCode::SERVICE_UNAVAILABLE, message }
    }
}

impl Listening {
    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        match &self.listener {
            Some(listener) => listener.accept().await,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        drop(self.listener.take());
        self.ports.released(self.port);
    }
}

/// What an upgrade was refused with, by whomever, in words that get to whoever typed the command.
async fn refusal(answer: Answer) -> Answer {
    let (head, body) = answer.into_parts();
    let collected = tokio::time::timeout(REFUSAL_PATIENCE, Limited::new(body, BUFFER).collect()).await;
    let message = match collected {
        Ok(Ok(body)) => without_colons(&String::from_utf8_lossy(&body.to_bytes())),
        Ok(Err(_)) | Err(_) => "the node refused it, and did not say why\n".to_owned(),
    };
    no(No { status: head.status, message })
}

/// kubectl reads the words as YAML first (client-go's transport/websocket), and takes those with a colon before white space for a status that
/// says nothing.
fn without_colons(words: &str) -> String {
    let next = words.chars().skip(1).map(Some).chain([None]);
    let plain = words.chars().zip(next).map(|(this, next)| match (this, next) {
        (':', next) if next.is_none_or(char::is_whitespace) => ',',
        (this, _) => this,
    });
    plain.collect()
}

fn no(no: No) -> Answer {
    let mut response = Response::new(Either::Left(Full::new(Bytes::from(no.message))));
    *response.status_mut() = no.status;
    let headers = response.headers_mut();
    // No Retry-After: client-go would wait and try again, and whoever typed the command would not be told for a minute.
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    // What was not read of the request is not read any more.
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response
}
