//! The port over real sockets, with a backend and Secrets in memory.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex};

use futures_util::{SinkExt as _, StreamExt as _};
use jiff::Timestamp;
use prost::Message as _;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use skerry_proto::mux::Side;
use skerry_proto::payload::{JoinRequest, JoinResponse, Refusal};
use skerry_proto::streams::{Carrier, Received, Stream};
use skerry_proto::sync::{Collection, Entry, MAX_FRAME, Object, Reason, Report, fingerprint};
use skerry_proto::token::JoinToken;
use skerry_proto::wire::frame::Body;
use skerry_proto::wire::{Frame, Goodbye, Hello, Inventory, Ping, Revision, Welcome};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{broadcast, mpsc};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Message;

use super::*;
use crate::backend::{Agents, BackendError, Feed, FeedEvent, RegisterError};
use crate::clock;
use crate::pki::{CertificateAuthority, node_of};
use crate::secrets::fake::MemorySecrets;
use crate::token::TokenSpec;

mod certificates;
mod counted;
mod joins;
mod quic_sessions;
mod reconnects;
mod streams;

const PATIENCE: Duration = Duration::from_secs(20);

/// What the fake apiserver says, and what it was told.
#[derive(Default)]
struct Script {
    nodes: BTreeMap<String, (String, String)>,
    foreign: Vec<String>,
    away: bool,
    /// A deletion that falls between a check and what follows it.
    deletes_behind_check: bool,
    /// Epochs on leases.
    leased: BTreeMap<String, u64>,
    /// What Nodes name.
    named: BTreeMap<String, (u64, Agents)>,
}

struct FakeBackend {
    script: Mutex<Script>,
    deletions: broadcast::Sender<NodeIdentity>,
    opened: mpsc::Sender<Opened>,
}

/// The test's end of a feed.
struct Opened {
    epoch: u64,
    events: mpsc::Sender<Vec<FeedEvent>>,
    reports: mpsc::Receiver<Report>,
}

struct FakeFeed {
    events: mpsc::Receiver<Vec<FeedEvent>>,
    reports: mpsc::Sender<Report>,
}

fn api_error(code: u16) -> BackendError {
    let status = kube::core::Status::failure("scripted", "Scripted").with_code(code);
    BackendError { action: "do it".to_owned(), source: kube::Error::Api(Box::new(status)) }
}

impl Backend for FakeBackend {
    type Feed = FakeFeed;

    async fn register(
        &self,
        name: &str,
        machine_id: &str,
        _: &BTreeMap<String, String>,
        connected: bool,
    ) -> Result<NodeIdentity, RegisterError> {
        let mut script = self.script.lock().unwrap();
        if script.away {
            return Err(RegisterError::Api(api_error(500)));
        }
        if script.foreign.iter().any(|foreign| foreign == name) {
            return Err(RegisterError::NotEdge(name.to_owned()));
        }
        let uid = format!("uid-of-{name}");
        let held = script.nodes.entry(name.to_owned()).or_insert_with(|| (uid, machine_id.to_owned()));
        if held.1 != machine_id {
            return Err(RegisterError::NameTaken(name.to_owned()));
        }
        if connected {
            return Err(RegisterError::Connected(name.to_owned()));
        }
        Ok(NodeIdentity { name: name.to_owned(), uid: held.0.clone() })
    }

    async fn leased(&self, name: &str) -> Result<Option<u64>, BackendError> {
        let script = self.script.lock().unwrap();
        if script.away { Err(api_error(500)) } else { Ok(script.leased.get(name).copied()) }
    }

    async fn check(&self, node: &NodeIdentity) -> Result<NodeCheck, BackendError> {
        let script = self.script.lock().unwrap();
        if script.away {
            return Err(api_error(503));
        }
        if script.deletes_behind_check {
            let _ = self.deletions.send(node.clone());
        }
        Ok(match script.nodes.get(&node.name) {
            None => NodeCheck::Deleted,
            Some((uid, _)) if *uid == node.uid => {
                let (epoch, agents) = script.named.get(&node.name).copied().unwrap_or_default();
                NodeCheck::Live { epoch, agents }
            }
            Some(_) => NodeCheck::OtherUid,
        })
    }

    async fn revision(&self, at_least: u64) -> Result<u64, BackendError> {
        Ok(at_least)
    }

    fn open(&self, _: &NodeIdentity, epoch: u64, _: u64, _: u64, _: &[Revision]) -> FakeFeed {
        let (events, events_out) = mpsc::channel(16);
        let (reports, reports_out) = mpsc::channel(64);
        self.opened.try_send(Opened { epoch, events, reports: reports_out }).expect("the test takes feeds");
        FakeFeed { events: events_out, reports }
    }

    fn deletions(&self) -> broadcast::Receiver<NodeIdentity> {
        self.deletions.subscribe()
    }

    fn ready(&self) -> bool {
        true
    }
}

impl Feed for FakeFeed {
    async fn next(&mut self) -> Vec<FeedEvent> {
        match self.events.recv().await {
            Some(events) => events,
            None => std::future::pending().await,
        }
    }

    fn inventory(&mut self, _: Collection, _: Vec<Entry>) {}

    fn report(&mut self, report: Report) {
        self.reports.try_send(report).expect("the test takes reports");
    }
}

/// A front on a port of this machine.
struct Cloud {
    front: Arc<Front<FakeBackend, MemorySecrets>>,
    certificate: Arc<ServerCertificate>,
    secrets: Arc<MemorySecrets>,
    opened: mpsc::Receiver<Opened>,
    /// Streams of class api that edges open.
    incoming: mpsc::Receiver<(NodeIdentity, Incoming)>,
    address: std::net::SocketAddr,
    /// QUIC on the same number.
    quic: tokio::task::JoinHandle<()>,
    registry: Registry,
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

/// A node's key and certificate.
struct Identity {
    key: KeyPair,
    certificate: Option<String>,
}

impl Identity {
    fn new() -> Self {
        Self { key: KeyPair::generate().unwrap(), certificate: None }
    }

    fn csr(&self) -> String {
        CertificateParams::default().serialize_request(&self.key).unwrap().pem().unwrap()
    }
}

impl Cloud {
    async fn start() -> Self {
        Self::with_ca_since(clock::wall()).await
    }

    /// With a CA that was made then.
    async fn with_ca_since(made: Timestamp) -> Self {
        let secrets = Arc::new(MemorySecrets::default());
        let authority = CertificateAuthority::load_or_create(&*secrets, None, made).await.unwrap();
        let authority = Arc::new(CurrentAuthority::new(authority));
        let certificate = ServerCertificate::issue(Arc::clone(&authority), &[], clock::wall()).unwrap();
        let certificate = Arc::new(certificate);
        let tls = tls(Arc::clone(&authority), Arc::clone(&certificate)).unwrap();
        let (opened, opened_out) = mpsc::channel(16);
        let script = Script::default();
        let backend = FakeBackend { script: Mutex::new(script), deletions: broadcast::channel(8).0, opened };
        let stop = CancellationToken::new();
        let tokens = JoinTokens::new(Arc::clone(&secrets));
        let mut registry = Registry::default();
        let mut front = Front::new(backend, authority, tokens, Metrics::new(&mut registry), stop.clone());
        front.count_queues(&mut registry);
        let incoming = front.serve_streams(Class::Api, 4);
        let front = Arc::new(front);
        let (listener, datagrams) = loop {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            // Somebody else may have the same number for UDP.
            if let Ok(datagrams) = std::net::UdpSocket::bind(listener.local_addr().unwrap()) {
                break (listener, datagrams);
            }
        };
        let address = listener.local_addr().unwrap();
        let endpoint = quic::endpoint(datagrams, &tls, &front.authority.current()).unwrap();
        let quic = crate::supervise::spawn("quic", Arc::clone(&front).serve_quic(endpoint, Duration::from_secs(5)));
        let serving = crate::supervise::spawn("port", Arc::clone(&front).serve(listener, tls, Duration::from_secs(5)));
        drop(crate::supervise::spawn("deletions", Arc::clone(&front).watch_deletions()));
        Self { front, certificate, secrets, opened: opened_out, incoming, address, quic, registry, stop, serving }
    }

    fn authority(&self) -> Arc<CertificateAuthority> {
        self.front.authority.current()
    }

    fn script(&self) -> std::sync::MutexGuard<'_, Script> {
        self.front.backend.script.lock().unwrap()
    }

    async fn token(&self, spec: TokenSpec) -> JoinToken {
        self.front.tokens.create(&spec, self.authority().pin(clock::wall()), clock::wall()).await.unwrap().0
    }

    async fn any_token(&self) -> JoinToken {
        self.token(TokenSpec { ttl: Duration::from_secs(3600), uses: None, node: None }).await
    }

    /// A joined node.
    async fn node(&self, name: &str) -> Identity {
        let mut identity = Identity::new();
        let token = self.any_token().await;
        let joined = self.join(&token.to_string(), &request(name, &identity)).await.expect("joining works");
        identity.certificate = Some(joined.certificate);
        identity
    }

    async fn tls(&self, identity: Option<&Identity>) -> TlsStream<TcpStream> {
        self.try_tls(identity, &self.authority()).await.unwrap()
    }

    async fn try_tls(
        &self,
        identity: Option<&Identity>,
        trusted: &CertificateAuthority,
    ) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(client(identity, trusted))).connect(name, stream).await
    }

    /// One HTTP exchange: the status and the body.
    async fn exchange(&self, identity: Option<&Identity>, head: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let mut stream = self.tls(identity).await;
        let length = body.len();
        let head = format!("{head}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        // A refusal may come before the whole body went.
        let _ = stream.write_all(body).await;
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an answer comes");
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n").expect("a head comes");
        let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
        (status, answer.split_off(end + 4))
    }

    async fn post<T: serde::de::DeserializeOwned>(
        &self,
        identity: Option<&Identity>,
        head: &str,
        body: &[u8],
    ) -> Result<T, (u16, Refusal)> {
        let (status, body) = self.exchange(identity, head, body).await;
        match status {
            200 => Ok(serde_json::from_slice(&body).unwrap()),
            _ => Err((status, serde_json::from_slice(&body).expect("a refusal is JSON"))),
        }
    }

    async fn join(&self, token: &str, request: &JoinRequest) -> Result<JoinResponse, (u16, Refusal)> {
        let head = format!("POST /v1/join HTTP/1.1\r\nAuthorization: Bearer {token}");
        self.post(None, &head, &serde_json::to_vec(request).unwrap()).await
    }

    async fn connect(&self, identity: &Identity) -> Edge {
        let stream = self.tls(Some(identity)).await;
        let (socket, _) = tokio_tungstenite::client_async("ws://localhost/v1/session", stream).await.unwrap();
        Edge(socket)
    }

    /// A session that stands, and the backend's end of it.
    async fn session(&mut self, identity: &Identity, name: &str, last_epoch: u64) -> (Edge, Opened, Welcome) {
        let mut edge = self.connect(identity).await;
        edge.send(hello(name, last_epoch)).await;
        let Body::Welcome(welcome) = edge.body().await else { panic!("a Welcome comes first") };
        let opened = tokio::time::timeout(PATIENCE, self.opened.recv()).await.unwrap().unwrap();
        assert_eq!(opened.epoch, welcome.epoch);
        (edge, opened, welcome)
    }
}

/// TLS as a node, or as nobody.
fn client(identity: Option<&Identity>, trusted: &CertificateAuthority) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(trusted.pem().as_bytes()) {
        roots.add(root.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots);
    match identity {
        Some(Identity { key, certificate: Some(pem) }) => {
            let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
            config.with_client_auth_cert(vec![certificate], key).unwrap()
        }
        _ => config.with_no_client_auth(),
    }
}

/// A scripted edge.
struct Edge(WebSocketStream<TlsStream<TcpStream>>);

impl Edge {
    async fn send(&mut self, body: Body) {
        self.raw(Message::Binary(Frame { body: Some(body) }.encode_to_vec().into())).await;
    }

    async fn raw(&mut self, message: Message) {
        self.0.send(message).await.unwrap();
    }

    async fn body(&mut self) -> Body {
        loop {
            let message = tokio::time::timeout(PATIENCE, self.0.next()).await.expect("something comes");
            match message.expect("the connection stands").expect("the connection works") {
                Message::Binary(bytes) => return Frame::decode(bytes).unwrap().body.unwrap(),
                Message::Close(_) => panic!("closed without a Goodbye"),
                _ => {}
            }
        }
    }

    async fn goodbye(&mut self) -> (Reason, Goodbye) {
        loop {
            if let Body::Goodbye(goodbye) = self.body().await {
                // What follows is the end of the connection.
                while let Some(Ok(_)) = self.0.next().await {}
                return (goodbye.reason(), goodbye);
            }
        }
    }
}

fn hello(name: &str, last_epoch: u64) -> Body {
    Body::Hello(Hello {
        protocol_min: 1,
        protocol_max: 1,
        node: name.to_owned(),
        run_id: "run".to_owned(),
        store_id: "store".to_owned(),
        last_epoch,
        digests: Vec::new(),
        agent: "edgecore 0.0.0".to_owned(),
        ..Hello::default()
    })
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    // Whoever said nothing is waited for until it is told so.
    tokio::time::timeout(4 * PATIENCE, waiting).await.expect(what);
}

fn request(name: &str, identity: &Identity) -> JoinRequest {
    JoinRequest {
        node: name.to_owned(),
        csr: identity.csr(),
        machine_id: format!("machine-of-{name}"),
        labels: BTreeMap::new(),
        time: clock::wall().as_second(),
    }
}

#[tokio::test]
async fn what_is_no_request_is_answered_and_harms_nobody() {
    let cloud = Cloud::start().await;
    let reason = |(status, body): (u16, Vec<u8>)| (status, serde_json::from_slice::<Refusal>(&body).unwrap().reason);
    let (status, body) = cloud.exchange(None, "GET / HTTP/1.1", b"").await;
    assert!(status == 200 && String::from_utf8(body).unwrap().contains("edgecore join"));
    assert_eq!(reason(cloud.exchange(None, "GET /nowhere HTTP/1.1", b"").await), (404, "not_found".to_owned()));
    assert_eq!(reason(cloud.exchange(None, "GET /v1/join HTTP/1.1", b"").await), (405, "method".to_owned()));
    assert_eq!(
        reason(cloud.exchange(None, "POST /v1/join HTTP/1.1", b"{}").await),
        (400, "request_malformed".to_owned())
    );
    let large = vec![b' '; (64 << 10) + 1];
    assert_eq!(
        reason(cloud.exchange(None, "POST /v1/join HTTP/1.1", &large).await),
        (413, "request_too_large".to_owned())
    );
    let whole = serde_json::to_vec(&request("box-1", &Identity::new())).unwrap();
    assert_eq!(
        reason(cloud.exchange(None, "POST /v1/join HTTP/1.1", &whole).await),
        (401, "token_malformed".to_owned())
    );

    let mut plain = TcpStream::connect(cloud.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, plain.read_to_end(&mut answer)).await.expect("garbage is not waited for");
    let mut garbage = cloud.tls(None).await;
    garbage.write_all(&[0xff; 4096]).await.unwrap();
    let _ = tokio::time::timeout(PATIENCE, garbage.read_to_end(&mut answer)).await.expect("garbage is not waited for");
    assert_eq!(cloud.exchange(None, "GET /v1/ca HTTP/1.1", b"").await.0, 200);
}

#[tokio::test]
async fn who_says_nothing_or_never_ends_keeps_nobody_out() {
    let cloud = Cloud::start().await;
    let mut idlers = Vec::new();
    for _ in 0..4 * MAX_SILENT {
        idlers.push(TcpStream::connect(cloud.address).await.unwrap());
    }
    assert_eq!(cloud.exchange(None, "GET /v1/ca HTTP/1.1", b"").await.0, 200);
    // The head of a record that does not come.
    for idler in idlers.iter_mut().rev().take(MAX_SILENT) {
        let _ = idler.write_all(&[22, 3, 1, 2, 0]).await;
    }
    for _ in 0..2 * MAX_HANDSHAKES {
        let mut begun = TcpStream::connect(cloud.address).await.unwrap();
        begun.write_all(&[22, 3, 1, 2, 0]).await.unwrap();
        idlers.push(begun);
    }
    assert_eq!(cloud.exchange(None, "GET /v1/ca HTTP/1.1", b"").await.0, 200);
    let mut end = [0];
    let first = tokio::time::timeout(PATIENCE, idlers[0].read(&mut end)).await.expect("the first is sent away");
    assert!(matches!(first, Ok(0) | Err(_)));
}

#[tokio::test]
async fn strangers_are_told_to_come_again_and_keep_no_node_out() {
    let mut cloud = Cloud::start().await;
    let node = cloud.node("box-1").await;
    let ask = "GET /v1/ca HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let nobody = async {
        while cloud.front.strangers.taken() > 0 {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(PATIENCE, nobody).await.expect("who joined has left");
    // Each has been served, and keeps its connection.
    let mut strangers = Vec::new();
    for _ in 0..MAX_STRANGERS {
        let mut stream = cloud.tls(None).await;
        stream.write_all(ask.as_bytes()).await.unwrap();
        assert!(stream.read(&mut [0; 12]).await.unwrap() > 0);
        strangers.push(stream);
    }
    let mut stream = cloud.tls(None).await;
    stream.write_all(ask.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an answer comes").unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nretry-after: 5\r\n"), "{answer}");
    assert!(answer.contains(r#""reason":"busy""#), "{answer}");
    drop(cloud.session(&node, "box-1", 0).await);
    strangers.pop();
    let served = async { while cloud.exchange(None, "GET /v1/ca HTTP/1.1", b"").await.0 != 200 {} };
    tokio::time::timeout(PATIENCE, served).await.expect("who leaves makes room");
}

#[tokio::test]
async fn a_session_needs_a_nodes_certificate_of_this_ca() {
    let cloud = Cloud::start().await;
    let upgrade = "GET /v1/session HTTP/1.1\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==";
    let (status, body) = cloud.exchange(None, upgrade, b"").await;
    assert_eq!(
        (status, serde_json::from_slice::<Refusal>(&body).unwrap().reason.as_str()),
        (401, "certificate_required")
    );

    let node = cloud.node("box-1").await;
    let (status, body) = cloud.exchange(Some(&node), "GET /v1/session HTTP/1.1", b"").await;
    assert_eq!(
        (status, serde_json::from_slice::<Refusal>(&body).unwrap().reason.as_str()),
        (426, "websocket_required")
    );

    let other = Cloud::start().await;
    let foreign = other.node("box-1").await;
    // With TLS 1.3 the client hears of it on its first read.
    if let Ok(mut stream) = cloud.try_tls(Some(&foreign), &cloud.authority()).await {
        let _ = stream.write_all(b"GET /v1/ca HTTP/1.1\r\n\r\n").await;
        let mut answer = Vec::new();
        assert!(
            stream.read_to_end(&mut answer).await.is_err() && answer.is_empty(),
            "a foreign certificate gets nothing"
        );
    }
    assert!(cloud.try_tls(None, &other.authority()).await.is_err(), "and a client that pins another CA stays away");
}

#[tokio::test]
async fn a_session_carries_objects_down_and_reports_up() {
    let mut cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let (mut edge, mut opened, welcome) = cloud.session(&identity, "box-1", 77).await;
    assert!(welcome.epoch > 77 && welcome.agent == AGENT);

    let object = Object::new(Collection::Pods, "default/web".to_owned(), "u1".to_owned(), b"{\"kind\":\"Pod\"}");
    let events = vec![FeedEvent::Desired(object.clone().into()), FeedEvent::Complete(Collection::Pods)];
    opened.events.send(events).await.unwrap();
    let upsert = loop {
        match edge.body().await {
            Body::InventoryRequest(asked) => {
                let inventory = Inventory { collection: asked.collection, last: true, ..Inventory::default() };
                edge.send(Body::Inventory(inventory)).await;
            }
            Body::Upsert(upsert) => break upsert,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((upsert.uid.as_str(), &upsert.full), ("u1", &object.payload));

    let (kind, payload) = (skerry_proto::sync::ReportKind::PodStatus.into(), bytes::Bytes::from_static(b"{}"));
    let report = skerry_proto::wire::Report { id: 5, kind, uid: "u1".to_owned(), payload, ..Default::default() };
    edge.send(Body::Report(report)).await;
    let report = tokio::time::timeout(PATIENCE, opened.reports.recv()).await.unwrap().unwrap();
    assert_eq!((report.id, report.uid.as_str()), (5, "u1"));
    opened.events.send(vec![FeedEvent::Reported { id: 5, refused: "no such pod".to_owned() }]).await.unwrap();
    let acked = loop {
        if let Body::ReportAck(acked) = edge.body().await {
            break acked;
        }
    };
    assert_eq!((acked.id, acked.refused.as_str()), (5, "no such pod"));

    edge.send(Body::Ping(Ping { token: 9 })).await;
    loop {
        if let Body::Pong(pong) = edge.body().await {
            assert_eq!(pong.token, 9);
            break;
        }
    }
    drop(edge);
    tokio::time::timeout(PATIENCE, opened.events.closed()).await.expect("the feed ends with the connection");
    assert!(cloud.front.sessions.nodes().is_empty());
}

#[tokio::test]
async fn who_may_not_have_a_session_is_told_why() {
    let cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;

    let mut edge = cloud.connect(&identity).await;
    edge.send(hello("box-2", 0)).await;
    let (reason, said) = edge.goodbye().await;
    assert!(reason == Reason::Refused && said.message.contains("box-1"), "{said:?}");

    let mut edge = cloud.connect(&identity).await;
    edge.send(hello(&"box".repeat(1 << 20), 0)).await;
    let (reason, said) = edge.goodbye().await;
    assert!(reason == Reason::Protocol && said.message.contains("1024 bytes"), "{said:?}");

    cloud.script().away = true;
    let mut edge = cloud.connect(&identity).await;
    edge.send(hello("box-1", 0)).await;
    let (reason, said) = edge.goodbye().await;
    assert_eq!(reason, Reason::Overloaded, "uncertainty never says that a node is deleted");
    assert!((5_000..=15_000).contains(&said.retry_after_ms), "{said:?}");
    cloud.script().away = false;

    cloud.script().nodes.get_mut("box-1").unwrap().0 = "another".to_owned();
    let mut edge = cloud.connect(&identity).await;
    edge.send(hello("box-1", 0)).await;
    assert_eq!(edge.goodbye().await.0, Reason::NodeDeleted);

    cloud.script().nodes.clear();
    let mut edge = cloud.connect(&identity).await;
    edge.send(hello("box-1", 0)).await;
    let (reason, said) = edge.goodbye().await;
    assert!(reason == Reason::NodeDeleted && said.message.contains("edgecore reset"), "{said:?}");
}

#[tokio::test]
async fn a_deletion_between_check_and_session_is_not_missed() {
    let cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    cloud.script().deletes_behind_check = true;
    let mut edge = cloud.connect(&identity).await;
    edge.send(hello("box-1", 0)).await;
    assert_eq!(edge.goodbye().await.0, Reason::NodeDeleted);
    assert!(cloud.front.sessions.nodes().is_empty());
}

#[tokio::test]
async fn what_is_no_frame_ends_the_session_with_a_reason() {
    let mut cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let frame = |body| Message::Binary(Frame { body: Some(body) }.encode_to_vec().into());
    let first = [
        frame(Body::Ping(Ping { token: 1 })),
        Message::Binary(vec![0xff; 64].into()),
        Message::Text("hello".into()),
        Message::Binary(vec![0; MAX_FRAME + 1].into()),
    ];
    for message in first {
        let shown = format!("{message:.40?}");
        let mut edge = cloud.connect(&identity).await;
        // A frame that is too large is refused before all of it was sent.
        let _ = edge.0.send(message).await;
        assert_eq!(edge.goodbye().await.0, Reason::Protocol, "{shown}");
    }
    for message in [Message::Binary(vec![0xff; 64].into()), Message::Text("x".into()), frame(hello("box-1", 0))] {
        let shown = format!("{message:.40?}");
        let (mut edge, opened, _) = cloud.session(&identity, "box-1", 0).await;
        edge.raw(message).await;
        assert_eq!(edge.goodbye().await.0, Reason::Protocol, "{shown}");
        opened.events.closed().await;
    }
    let mut ahead = cloud.connect(&identity).await;
    ahead.send(hello("box-1", u64::MAX)).await;
    let (reason, said) = ahead.goodbye().await;
    assert!(reason == Reason::Refused && said.message.contains("edgecore reset"), "{said:?}");
    let mut old = cloud.connect(&identity).await;
    let Body::Hello(hello) = hello("box-1", 0) else { unreachable!() };
    old.send(Body::Hello(Hello { protocol_min: 90, protocol_max: 99, ..hello })).await;
    let (reason, said) = old.goodbye().await;
    assert!(reason == Reason::Version && said.message.contains("90"), "{said:?}");
}

#[tokio::test]
async fn a_newer_session_takes_over_and_the_older_ones_end_leaves_it_alone() {
    let mut cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let (mut first, first_feed, _) = cloud.session(&identity, "box-1", 0).await;
    let (mut second, second_feed, _) = cloud.session(&identity, "box-1", 0).await;
    assert!(second_feed.epoch > first_feed.epoch);
    assert_eq!(first.goodbye().await.0, Reason::Superseded);
    tokio::time::timeout(PATIENCE, first_feed.events.closed()).await.unwrap();
    assert!(!second_feed.events.is_closed());
    assert_eq!(cloud.front.sessions.nodes().len(), 1);

    let gone = cloud.front.sessions.nodes().remove(0);
    let other = NodeIdentity { uid: "another".to_owned(), ..gone.clone() };
    cloud.front.backend.deletions.send(other).unwrap();
    second.send(Body::Ping(Ping { token: 3 })).await;
    assert!(
        matches!(second.body().await, Body::Pong(_)),
        "the deletion of another Node of that name is none of its business"
    );
    cloud.front.backend.deletions.send(gone).unwrap();
    assert_eq!(second.goodbye().await.0, Reason::NodeDeleted);
}

#[tokio::test]
async fn the_other_of_two_boxes_with_one_identity_is_told_so() {
    let mut cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let (mut first, ..) = cloud.session(&identity, "box-1", 0).await;
    let mut clone = cloud.connect(&identity).await;
    let Body::Hello(hello) = hello("box-1", 0) else { unreachable!() };
    clone.send(Body::Hello(Hello { run_id: "another".to_owned(), ..hello.clone() })).await;
    assert!(matches!(clone.body().await, Body::Welcome(_)));
    assert_eq!(first.goodbye().await.0, Reason::Superseded);
    let mut again = cloud.connect(&identity).await;
    again.send(Body::Hello(hello.clone())).await;
    let (reason, said) = again.goodbye().await;
    assert!(
        reason == Reason::Refused && said.message.contains("another box with the identity of node box-1"),
        "{said:?}"
    );
    drop(clone);
    until("the clone's session ends", || cloud.front.sessions.nodes().is_empty()).await;
    let mut later = cloud.connect(&identity).await;
    later.send(Body::Hello(hello)).await;
    assert!(matches!(later.body().await, Body::Welcome(_)), "it is the only one now");
}

#[tokio::test]
async fn a_box_that_another_replica_took_over_from_is_told_so_while_the_others_session_stands() {
    let cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let Body::Hello(hello) = hello("box-1", 0) else { unreachable!() };
    let who = fingerprint(format!("{}\0{}", hello.run_id, hello.store_id).as_bytes());
    let name = "box-1".to_owned();
    let lease = |epoch: Option<u64>| {
        let mut script = cloud.front.backend.script.lock().unwrap();
        script.named.insert(name.clone(), (5, Agents { who: who.wrapping_add(1), ousted: [0, who, 0, 0] }));
        script.leased = epoch.map(|epoch| (name.clone(), epoch)).into_iter().collect();
    };
    lease(Some(7));
    let mut back = cloud.connect(&identity).await;
    back.send(Body::Hello(hello.clone())).await;
    let (reason, said) = back.goodbye().await;
    assert!(reason == Reason::Refused && said.message.contains("another box with the identity of node box-1"));
    // One that starts anew is nobody's return, and gets an epoch beyond any that its forgotten sessions had.
    let far = clock::wall_millis() + 3_600_000;
    lease(Some(far));
    let mut anew = cloud.connect(&identity).await;
    anew.send(Body::Hello(Hello { run_id: "another".to_owned(), ..hello.clone() })).await;
    let Body::Welcome(welcome) = anew.body().await else { panic!("refused") };
    assert!(welcome.epoch > far);
    drop(anew);
    until("its session ends", || cloud.front.sessions.nodes().is_empty()).await;
    lease(None);
    let mut alone = cloud.connect(&identity).await;
    alone.send(Body::Hello(hello)).await;
    assert!(matches!(alone.body().await, Body::Welcome(_)), "the other one is gone");
}

#[tokio::test]
async fn missed_deletions_are_asked_for() {
    let mut cloud = Cloud::start().await;
    let (kept, gone) = (cloud.node("box-1").await, cloud.node("box-2").await);
    let (mut kept, _kept_feed, _) = cloud.session(&kept, "box-1", 0).await;
    let (mut gone, _gone_feed, _) = cloud.session(&gone, "box-2", 0).await;
    cloud.script().nodes.remove("box-2");
    // More at once than the channel holds, none of them of these nodes.
    for n in 0..64 {
        let other = NodeIdentity { name: format!("other-{n}"), uid: "x".to_owned() };
        cloud.front.backend.deletions.send(other).unwrap();
    }
    assert_eq!(gone.goodbye().await.0, Reason::NodeDeleted);
    kept.send(Body::Ping(Ping { token: 3 })).await;
    assert!(matches!(kept.body().await, Body::Pong(_)));
}

#[tokio::test]
async fn an_edge_that_floods_and_does_not_read_gives_way_to_its_next_session() {
    let mut cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let (mut edge, opened, _) = cloud.session(&identity, "box-1", 0).await;
    let pings = crate::supervise::spawn("pings", async move {
        // Every ping asks for a pong that nobody reads; in the end the cloud no longer reads either, and this blocks.
        let ping = Message::Binary(Frame { body: Some(Body::Ping(Ping { token: u64::MAX })) }.encode_to_vec().into());
        while edge.0.feed(ping.clone()).await.is_ok() {}
    });
    let (_edge, newer, _) = tokio::time::timeout(PATIENCE, cloud.session(&identity, "box-1", 0)).await.unwrap();
    tokio::time::timeout(PATIENCE, opened.events.closed()).await.expect("the stuck session ends");
    assert!(newer.epoch > opened.epoch && !newer.events.is_closed());
    pings.abort();
}

#[tokio::test]
async fn at_the_end_every_session_hears_goodbye() {
    let mut cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let (mut edge, opened, _) = cloud.session(&identity, "box-1", 0).await;
    cloud.stop.cancel();
    assert_eq!(edge.goodbye().await.0, Reason::Shutdown);
    tokio::time::timeout(PATIENCE, cloud.serving).await.expect("the port is given back").unwrap();
    assert!(opened.events.is_closed());
    assert!(TcpStream::connect(cloud.address).await.is_err());
}
