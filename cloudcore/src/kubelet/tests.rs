//! The ports of nodes over real sockets: a scripted apiserver behind them, and a kubelet in hyper at the other end of each session.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::header::HeaderValue;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use skerry_proto::mux::Class;
use skerry_proto::ops;
use skerry_proto::streams::Stream;
use skerry_proto::streams::double::Line;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::reviews::{Reviews, User};
use super::*;
use crate::backend::{BackendError, NodeIdentity};
use crate::clock;
use crate::config::{Advertise, PortRange};
use crate::pki::{CertificateAuthority, CurrentAuthority, ServerCertificate};
use crate::secrets::fake::MemorySecrets;

mod access;
mod relaying;

/// More than sockets and buffers hold, in bytes.
const MUCH: usize = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// What the apiserver says, and how often it was asked.
#[derive(Default)]
struct Script {
    tokens: Mutex<HashMap<String, String>>,
    /// User, node or device (`namespace/name`), verb and subresource.
    allowed: Mutex<Vec<[String; 4]>>,
    away: AtomicBool,
    token_reviews: AtomicUsize,
    access_reviews: AtomicUsize,
}

struct FakeReviews(Arc<Script>);

fn away() -> BackendError {
    BackendError { action: "ask".to_owned(), source: kube::Error::Service("connection refused".into()) }
}

impl Reviews for FakeReviews {
    async fn token(&self, token: &str) -> Result<Option<User>, BackendError> {
        self.0.token_reviews.fetch_add(1, Ordering::SeqCst);
        if self.0.away.load(Ordering::SeqCst) {
            return Err(away());
        }
        let name = self.0.tokens.lock().unwrap().get(token).cloned();
        Ok(name.map(|name| User { name, ..User::default() }))
    }

    async fn access(&self, spec: &Value) -> Result<bool, BackendError> {
        self.0.access_reviews.fetch_add(1, Ordering::SeqCst);
        if self.0.away.load(Ordering::SeqCst) {
            return Err(away());
        }
        assert!(spec["groups"].as_array().unwrap().contains(&json!("system:authenticated")));
        let attributes = &spec["resourceAttributes"];
        let asked = [&spec["user"], &attributes["name"], &attributes["verb"], &attributes["subresource"]];
        let mut asked = asked.map(|value| value.as_str().unwrap().to_owned());
        if attributes["resource"] == "devices" {
            assert_eq!(attributes["group"], "devices.kubeedge.io");
            asked[1] = format!("{}/{}", attributes["namespace"].as_str().unwrap(), asked[1]);
        } else {
            assert_eq!(attributes["resource"], "nodes");
        }
        Ok(self.0.allowed.lock().unwrap().contains(&asked))
    }
}

/// Everything but the apiserver.
struct Bed {
    host: String,
    ports: Arc<Ports>,
    script: Arc<Script>,
    authorities: Arc<ClientAuthorities>,
    sessions: Arc<Mutex<HashMap<String, Streams>>>,
    metrics: Metrics,
    roots: RootCertStore,
    clients: Ca,
    stop: CancellationToken,
    serving: JoinHandle<()>,
}

/// A CA of a cluster's clients.
struct Ca {
    key: KeyPair,
    params: CertificateParams,
    pem: String,
}

/// What a client shows.
#[derive(Clone, Default)]
struct Shows {
    certificate: Option<(CertificateDer<'static>, Vec<u8>)>,
    token: Option<String>,
}

impl Ca {
    fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let pem = params.clone().self_signed(&key).unwrap().pem();
        Self { key, params, pem }
    }

    fn client(&self, name: &str, group: &str) -> Shows {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.distinguished_name.push(DnType::OrganizationName, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let issuer = Issuer::from_params(&self.params, &self.key);
        let certificate = params.signed_by(&key, &issuer).unwrap().der().clone();
        Shows { certificate: Some((certificate, key.serialize_der())), token: None }
    }
}

fn node(name: &str) -> NodeIdentity {
    NodeIdentity { name: name.to_owned(), uid: format!("uid-of-{name}") }
}

impl Bed {
    async fn start() -> Self {
        Self::with(Limits::default()).await
    }

    async fn with(limits: Limits) -> Self {
        let [a, b, c]: [u8; 3] = rand::random();
        let host = format!("127.{a}.{b}.{}", c.clamp(1, 254));
        let ports = Arc::new(Ports::new(&host, PortRange { first: 20000, last: 20009 }, 16));
        ports.listed();
        let authority = CertificateAuthority::load_or_create(&MemorySecrets::default(), None, clock::wall()).await;
        let authority = Arc::new(CurrentAuthority::new(authority.unwrap()));
        let advertised = [Advertise { host: host.clone(), port: None }];
        let certificate = ServerCertificate::issue(Arc::clone(&authority), &advertised, clock::wall()).unwrap();
        let tls = tls::config(Arc::new(certificate)).unwrap();
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(authority.current().pem().as_bytes()) {
            roots.add(root.unwrap()).unwrap();
        }
        let clients = Ca::new("cluster");
        let authorities = Arc::new(ClientAuthorities::default());
        authorities.set(Some(&clients.pem));
        let (script, sessions) = (Arc::<Script>::default(), Arc::<Mutex<HashMap<String, Streams>>>::default());
        let (stop, metrics, held) = (CancellationToken::new(), Metrics::default(), Arc::clone(&sessions));
        let server = Server::new(
            Arc::clone(&ports),
            tls,
            (Arc::clone(&authorities), FakeReviews(Arc::clone(&script))),
            move |node| held.lock().unwrap().get(node).cloned(),
            (metrics.clone(), limits),
            stop.clone(),
        );
        let serving = supervise::spawn("kubelets", server.serve(Duration::from_secs(5)));
        Self { host, ports, script, authorities, sessions, metrics, roots, clients, stop, serving }
    }

    /// A client that may do everything on this node.
    fn admin(&self, node: &str) -> Shows {
        for verb in ["get", "create"] {
            for subresource in ["proxy", "stats", "metrics", "log"] {
                self.allow("apiserver", node, verb, subresource);
            }
        }
        self.clients.client("apiserver", "system:masters")
    }

    fn allow(&self, user: &str, node: &str, verb: &str, subresource: &str) {
        self.script.allowed.lock().unwrap().push([user, node, verb, subresource].map(str::to_owned));
    }

    /// A session of the node, and what is at its other end.
    fn connect(&self, name: &str, epoch: u64) -> Edge {
        self.ports.connected(&node(name), epoch, false);
        let edge = Edge::start(name, true);
        self.sessions.lock().unwrap().insert(name.to_owned(), edge.streams.clone());
        edge
    }

    fn port(&self, name: &str) -> u16 {
        self.ports.wanted(name).expect("it has a port").port
    }

    async fn tls(&self, port: u16, shows: &Shows) -> std::io::Result<TlsStream<TcpStream>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(self.roots.clone());
        let mut config = match shows.certificate.clone() {
            Some((certificate, key)) => {
                let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
                config.with_client_auth_cert(vec![certificate], key).unwrap()
            }
            None => config.with_no_client_auth(),
        };
        // As the apiserver for what it does not upgrade: HTTP/2 is not to be had here.
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let stream = TcpStream::connect((self.host.as_str(), port)).await?;
        let name = ServerName::try_from(self.host.clone()).unwrap();
        let tls = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        Ok(tls)
    }

    async fn client(&self, port: u16, shows: &Shows) -> Client {
        let io = TokioIo::new(self.tls(port, shows).await.unwrap());
        let (sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        let task = supervise::spawn("test client", async move { drop(connection.with_upgrades().await) });
        Client { sender, task, token: shows.token.clone() }
    }

    /// One request on a connection of its own: code and body.
    async fn get(&self, port: u16, shows: &Shows, path: &str) -> (u16, String) {
        let mut client = self.client(port, shows).await;
        let response = client.get(path).await;
        let code = response.status().as_u16();
        (code, String::from_utf8(whole(response).await.unwrap()).unwrap())
    }
}

/// A client's connection.
struct Client {
    sender: SendRequest<BoxBody<Bytes, std::io::Error>>,
    task: JoinHandle<()>,
    token: Option<String>,
}

impl Client {
    async fn send(&mut self, mut request: Request<BoxBody<Bytes, std::io::Error>>) -> Response<Incoming> {
        if let Some(token) = &self.token {
            request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        request.headers_mut().insert("host", "node".parse().unwrap());
        let sent = self.sender.send_request(request);
        tokio::time::timeout(PATIENCE, sent).await.expect("an answer comes").expect("a head comes")
    }

    async fn get(&mut self, path: &str) -> Response<Incoming> {
        self.send(Request::get(path).body(nothing()).unwrap()).await
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn nothing() -> BoxBody<Bytes, std::io::Error> {
    Empty::new().map_err(|never| match never {}).boxed()
}

async fn whole(response: Response<Incoming>) -> Result<Vec<u8>, hyper::Error> {
    let body = tokio::time::timeout(PATIENCE, response.into_body().collect()).await.expect("the body ends");
    body.map(|body| body.to_bytes().to_vec())
}

/// Waits until it is so.
async fn until(what: &str, so: impl Fn() -> bool) {
    let wait = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{what}: it never came to that"));
}

/// A node's end of a session.
struct Edge {
    streams: Streams,
    /// Requests whose stream stands.
    open: Arc<AtomicUsize>,
    /// Bytes of what has no end.
    produced: Arc<AtomicUsize>,
    /// Lets go of every stream, and keeps the session.
    let_go: Arc<tokio::sync::Notify>,
    task: JoinHandle<()>,
}

impl Edge {
    fn start(name: &str, serves: bool) -> Self {
        let mut line = Line::default();
        let streams = line.cloud.streams();
        let mut incoming = serves.then(|| line.at_edge.serve(Class::Ops, 16));
        let open = Arc::<AtomicUsize>::default();
        let produced = Arc::<AtomicUsize>::default();
        let let_go = Arc::<tokio::sync::Notify>::default();
        let letting_go = Arc::clone(&let_go);
        let (name, counted, made) = (name.to_owned(), Arc::clone(&open), Arc::clone(&produced));
        let task = supervise::spawn("test edge", async move {
            let mut served = tokio::task::JoinSet::new();
            let mut carry = std::pin::pin!(line.carry());
            loop {
                let next = async {
                    match &mut incoming {
                        Some(incoming) => incoming.recv().await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    violation = &mut carry => panic!("{violation}"),
                    () = letting_go.notified() => served.abort_all(),
                    opened = next => {
                        let opened = opened.unwrap();
                        assert_eq!((opened.class, &opened.header[..]), (Class::Ops, ops::KUBELET));
                        served.spawn(serve(name.clone(), opened.stream, Count::one(&counted), Arc::clone(&made)));
                    }
                }
            }
        });
        Self { streams, open, produced, let_go, task }
    }

    fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    /// The cable is pulled.
    fn cut(&self) {
        self.task.abort();
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.cut();
    }
}

struct Count(Arc<AtomicUsize>);

impl Count {
    fn one(of: &Arc<AtomicUsize>) -> Self {
        of.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(of))
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A kubelet on one stream.
async fn serve(name: String, stream: Stream, count: Count, produced: Arc<AtomicUsize>) {
    let service = service_fn(|request| kubelet(name.clone(), request, Arc::clone(&produced)));
    let connection = hyper::server::conn::http1::Builder::new()
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    drop(connection.await);
    drop(count);
}

type Body = BoxBody<Bytes, hyper::Error>;

fn text(code: StatusCode, text: impl Into<Bytes>) -> Response<Body> {
    let body = Full::new(text.into()).map_err(|never| match never {}).boxed();
    Response::builder().status(code).body(body).unwrap()
}

fn switching(protocol: Option<HeaderValue>) -> Response<Body> {
    let mut response = text(StatusCode::SWITCHING_PROTOCOLS, "");
    let headers = response.headers_mut();
    headers.insert("connection", "Upgrade".parse().unwrap());
    headers.insert("upgrade", protocol.unwrap_or(HeaderValue::from_static("SPDY/3.1")));
    headers.insert("x-stream-protocol-version", "v4.channel.k8s.io".parse().unwrap());
    response
}

async fn kubelet(
    name: String,
    mut request: Request<Incoming>,
    produced: Arc<AtomicUsize>,
) -> Result<Response<Body>, hyper::Error> {
    let path = request.uri().path().to_owned();
    let protocol = request.headers().get("upgrade").cloned();
    let broken: Option<&[u8]> = match protocol.as_ref().map(HeaderValue::as_bytes) {
        // A frame of ten bytes of which five come.
        Some(b"SPDY/3.1") => Some(b"\0\0\0\x03\0\0\0\x0ahello"),
        Some(b"websocket") => Some(b"\x82\x06\x01hello"),
        _ => None,
    };
    Ok(match path.split('/').nth(1).unwrap_or_default() {
        // What came of the head.
        "pods" => {
            let headers = request.headers().iter();
            let headers: Vec<_> = headers.map(|(name, value)| [name.as_str(), value.to_str().unwrap()]).collect();
            let said = json!({"node": name, "uri": request.uri().to_string(), "headers": headers});
            text(StatusCode::OK, said.to_string())
        }
        "metrics" | "devices" => text(StatusCode::OK, name),
        // What comes goes back while more comes.
        "run" => {
            let kind = request.headers().get("content-type").cloned();
            let mut response = Response::new(request.into_body().boxed());
            if let Some(kind) = kind {
                response.headers_mut().insert("content-type", kind);
            }
            response
        }
        // A line, and then nothing for ever.
        "containerLogs" => {
            let (sender, receiver) = tokio::sync::mpsc::channel(1);
            sender.send(Ok(Frame::data(Bytes::from_static(b"first line\n")))).await.unwrap();
            let kept = futures_util::stream::unfold((receiver, sender), |(mut receiver, sender)| async {
                receiver.recv().await.map(|frame| (frame, (receiver, sender)))
            });
            Response::new(StreamBody::new(kept).boxed())
        }
        // Without end.
        "logs" => {
            let parts = futures_util::stream::repeat_with(move || {
                produced.fetch_add(10_000, Ordering::SeqCst);
                Ok(Frame::data(Bytes::from_static(&[b'x'; 10_000])))
            });
            Response::new(StreamBody::new(parts).boxed())
        }
        "stats" => std::future::pending().await,
        // Much, at once.
        "configz" => text(StatusCode::OK, vec![b'z'; MUCH]),
        "debug" => text(StatusCode::INTERNAL_SERVER_ERROR, "rpc error: code = Unknown desc = at 10:20 it:\nbroke:"),
        // Somewhere else.
        "pprof" => {
            let mut response = text(StatusCode::FOUND, "");
            response.headers_mut().insert("location", "https://elsewhere/".parse().unwrap());
            response
        }
        // What says the first half of something, and no more.
        "attach" | "portForward" if let Some(said) = broken => {
            let upgraded = hyper::upgrade::on(&mut request);
            drop(supervise::spawn("test streams", async move {
                let mut io = TokioIo::new(upgraded.await.unwrap());
                io.write_all(said).await.unwrap();
                std::future::pending::<()>().await;
            }));
            switching(protocol)
        }
        // Reads to the end, then says how much that was: what comes back needs the half that is still open.
        "exec" | "portForward" => {
            let upgraded = hyper::upgrade::on(&mut request);
            drop(supervise::spawn("test echo", async move {
                let mut io = TokioIo::new(upgraded.await.unwrap());
                io.write_all(b"ready").await.unwrap();
                let mut got = Vec::new();
                if io.read_to_end(&mut got).await.is_ok() {
                    io.write_all(&got).await.unwrap();
                    io.write_all(format!("and that was {}", got.len()).as_bytes()).await.unwrap();
                    io.shutdown().await.unwrap();
                }
            }));
            switching(protocol)
        }
        _ => text(StatusCode::NOT_FOUND, "404 page not found"),
    })
}
