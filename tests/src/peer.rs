//! A client of the link that has no manners: it joins and opens sessions as an edge does, and sends what it likes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use rcgen::{CertificateParams, DnType, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use skerry_proto::frame::Lane;
use skerry_proto::mux::{Class, Event, Mux, Side, class_of};
use skerry_proto::payload::{JoinRequest, JoinResponse, Refusal};
use skerry_proto::sync::MAX_FRAME;
use skerry_proto::wire::{self, Frame, frame::Body};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::time::error::Elapsed;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Message;

pub use self::strangers::Strangers;

mod strangers;

/// Where sessions are opened.
const SESSION_PATH: &str = "/v1/session";

/// What a node proves itself with.
#[derive(Clone, Debug)]
pub struct Identity {
    /// PEM certificate chain.
    pub certificate: String,
    /// PEM key.
    pub key: String,
}

/// Joins with a token as `node` on the box `machine_id`; the inner error is what cloudcore refused it with.
pub fn join(address: SocketAddr, token: &str, node: &str, machine_id: &str) -> Result<Result<Identity, Refusal>> {
    let key = KeyPair::generate()?;
    let request = JoinRequest {
        node: node.to_owned(),
        csr: signing_request(&key)?,
        machine_id: machine_id.to_owned(),
        labels: std::collections::BTreeMap::new(),
        time: time::OffsetDateTime::now_utc().unix_timestamp(),
    };
    let body = serde_json::to_vec(&request)?;
    certified(&key, post(address, None, "/v1/join", &format!("Authorization: Bearer {token}\r\n"), &body)?)
}

/// Asks for a new certificate in place of this one; the inner error is what cloudcore refused it with.
pub fn renew(address: SocketAddr, identity: &Identity) -> Result<Result<Identity, Refusal>> {
    let key = KeyPair::generate()?;
    let body = serde_json::to_vec(&serde_json::json!({"csr": signing_request(&key)?}))?;
    certified(&key, post(address, Some(identity), "/v1/renew", "", &body)?)
}

fn signing_request(key: &KeyPair) -> Result<String> {
    let mut params = CertificateParams::new(Vec::new())?;
    // More than is its due: cloudcore must write the subject itself.
    params.distinguished_name.push(DnType::CommonName, "system:node:somebody-else");
    params.distinguished_name.push(DnType::OrganizationName, "system:masters");
    Ok(params.serialize_request(key)?.pem()?)
}

fn certified(key: &KeyPair, (status, answer): (u16, Vec<u8>)) -> Result<Result<Identity, Refusal>> {
    if status == 200 {
        let response: JoinResponse = serde_json::from_slice(&answer)?;
        return Ok(Ok(Identity { certificate: response.certificate, key: key.serialize_pem() }));
    }
    let text = String::from_utf8_lossy(&answer).into_owned();
    Ok(Err(serde_json::from_str(&text).with_context(|| format!("a refusal ({status}) that is no Refusal: {text}"))?))
}

/// POSTs to cloudcore's port: status and body.
pub fn post(
    address: SocketAddr,
    identity: Option<&Identity>,
    path: &str,
    headers: &str,
    body: &[u8],
) -> Result<(u16, Vec<u8>)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let exchange = exchange(address, identity, path, headers, body);
        tokio::time::timeout(Duration::from_secs(30), exchange).await.context("cloudcore did not answer within 30 s")?
    })
}

/// As [`post`], for as long as it takes.
pub async fn exchange(
    address: SocketAddr,
    identity: Option<&Identity>,
    path: &str,
    headers: &str,
    body: &[u8],
) -> Result<(u16, Vec<u8>)> {
    let mut stream = connect(address, identity).await?;
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {address}\r\n{headers}Content-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    // A refusal may come before the whole body went.
    stream.write_all(body).await.ok();
    let mut answer = Vec::new();
    // A server that closes without close_notify has still answered.
    stream.read_to_end(&mut answer).await.ok();
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").context("no complete answer")?;
    let body = answer.split_off(end + 4);
    let status = String::from_utf8_lossy(&answer).split(' ').nth(1).and_then(|word| word.parse().ok());
    Ok((status.context("no status in the answer")?, body))
}

/// A TLS handshake, and nothing after it.
pub fn handshake(address: SocketAddr, identity: &Identity) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut stream = connect(address, Some(identity)).await?;
        stream.shutdown().await?;
        // The server's word after it is a part of it.
        tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut Vec::new())).await.ok();
        Ok(())
    })
}

/// A QUIC handshake, and nothing after it.
pub fn quic_handshake(address: SocketAddr, identity: &Identity) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (endpoint, connection) = connect_quic(address, identity).await?;
        // Until the server has confirmed it.
        tokio::time::sleep(Duration::from_secs(1)).await;
        connection.close(quinn::VarInt::from_u32(0), b"");
        tokio::time::timeout(Duration::from_secs(5), endpoint.wait_idle()).await.ok();
        Ok(())
    })
}

/// The chain of certificates that who connects is shown: over TCP, and over QUIC.
pub fn shown(address: SocketAddr, identity: &Identity) -> Result<[Vec<CertificateDer<'static>>; 2]> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let stream = connect(address, None).await?;
        let over_tcp = stream.get_ref().1.peer_certificates().context("no certificate over TCP")?.to_vec();
        let (_endpoint, connection) = connect_quic(address, identity).await?;
        let chain = connection.peer_identity().context("no certificate over QUIC")?;
        let chain = chain.downcast::<Vec<CertificateDer<'static>>>();
        Ok([over_tcp, *chain.map_err(|_| anyhow::anyhow!("QUIC shows something else"))?])
    })
}

/// A session, driven frame by frame.
#[derive(Debug)]
pub struct Session {
    runtime: Runtime,
    line: Line,
    /// Puts large frames together.
    mux: Mux,
}

/// What carries its frames, whatever they are.
#[derive(Debug)]
enum Line {
    WebSocket(Box<WebSocketStream<TlsStream<TcpStream>>>),
    Quic(Quic),
}

/// Frames on QUIC, of one class in a stream, each behind its length.
#[derive(Debug)]
struct Quic {
    _endpoint: quinn::Endpoint,
    connection: quinn::Connection,
    /// Control, then the classes.
    lanes: Vec<quinn::SendStream>,
    /// What comes in any of the other side's.
    frames: mpsc::Receiver<Frame>,
}

impl Session {
    /// Opens a WebSocket with this identity; without a certificate where `identity` is `None`.
    pub fn open(address: SocketAddr, identity: Option<&Identity>) -> Result<Self> {
        Self::over(async { Line::websocket(address, connect(address, identity).await?).await })
    }

    /// As [`Session::open`], over a connection of which the system takes only so many bytes before they are read.
    pub fn open_narrow(address: SocketAddr, identity: &Identity, room: u32) -> Result<Self> {
        Self::over(async {
            let socket = TcpSocket::new_v4()?;
            socket.set_recv_buffer_size(room)?;
            Line::websocket(address, encrypted(socket.connect(address).await?, Some(identity)).await?).await
        })
    }

    /// Opens a QUIC connection with this identity.
    pub fn open_quic(address: SocketAddr, identity: &Identity) -> Result<Self> {
        Self::over(async { Ok(Line::Quic(Quic::open(address, identity).await?)) })
    }

    fn over(line: impl Future<Output = Result<Line>>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let line = runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(30), line).await.context("no session within 30 s")?
        })?;
        Ok(Self { runtime, line, mux: Mux::new(Side::Edge) })
    }

    /// Opens one and says Hello as `node`, whose store is empty.
    pub fn establish(address: SocketAddr, identity: &Identity, node: &str) -> Result<Self> {
        let mut session = Self::open(address, Some(identity))?;
        session.send(Body::Hello(hello(node)))?;
        Ok(session)
    }

    /// Sends a frame.
    pub fn send(&mut self, body: Body) -> Result<()> {
        let frame = Frame { body: Some(body) };
        let lane = class_of(&frame).flatten().map_or(0, |class| 1 + class.index());
        self.send_on(lane, frame.encode_to_vec())
    }

    /// Sends bytes as a frame, whatever they are.
    pub fn send_bytes(&mut self, bytes: Vec<u8>) -> Result<()> {
        self.send_on(0, bytes)
    }

    fn send_on(&mut self, lane: usize, bytes: Vec<u8>) -> Result<()> {
        match &mut self.line {
            Line::WebSocket(socket) => within(&self.runtime, socket.send(Message::Binary(bytes.into()))),
            Line::Quic(quic) => {
                let mut delimited = Vec::new();
                prost::encode_length_delimiter(bytes.len(), &mut delimited)?;
                delimited.extend(bytes);
                within(&self.runtime, quic.lanes[lane].write_all(&delimited))
            }
        }
    }

    /// Sends a frame among those of this class, or of control where that is `None`, wherever it belongs. A WebSocket has one order for all.
    pub fn send_among(&mut self, class: Option<Class>, body: Body) -> Result<()> {
        let frame = Frame { body: Some(body) };
        self.send_on(class.map_or(0, |class| 1 + class.index()), frame.encode_to_vec())
    }

    /// Sends what says that a frame of so many bytes follows, and nothing else.
    pub fn announce(&mut self, length: u64) -> Result<()> {
        match &mut self.line {
            Line::WebSocket(socket) => {
                // A binary message of one frame, masked by nothing (RFC 6455, 5.2).
                let head = [&[0x82, 0xff][..], &length.to_be_bytes(), &[0; 4]].concat();
                let stream = socket.get_mut();
                within(&self.runtime, async {
                    stream.write_all(&head).await?;
                    stream.flush().await
                })
            }
            Line::Quic(quic) => {
                let mut head = Vec::new();
                prost::encoding::encode_varint(length, &mut head);
                within(&self.runtime, quic.lanes[0].write_all(&head))
            }
        }
    }

    /// Sends a text message, which the link has no use for.
    pub fn send_text(&mut self, text: &str) -> Result<()> {
        let Line::WebSocket(socket) = &mut self.line else { bail!("QUIC has no text messages") };
        within(&self.runtime, socket.send(Message::Text(text.into())))
    }

    /// The next frame, `None` when the session is over; an error after `seconds` of silence.
    pub fn receive(&mut self, seconds: u64) -> Result<Option<Body>> {
        loop {
            match self.next(seconds)? {
                Some(Event::Control(frame)) => return Ok(frame.body),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    /// The next frame, `None` after `seconds` of silence; an error when the session is over.
    pub fn receive_unless_quiet(&mut self, seconds: u64) -> Result<Option<Body>> {
        match self.receive(seconds) {
            Ok(None) => bail!("cloudcore ended the session"),
            Err(error) if error.is::<Elapsed>() => Ok(None),
            received => received,
        }
    }

    /// Waits until cloudcore opens a stream; its id as it is on the wire.
    pub fn receive_opened(&mut self, seconds: u64) -> Result<u32> {
        loop {
            match self.next(seconds)? {
                Some(Event::Opened { id, .. }) => return Ok(id.into()),
                Some(_) => {}
                None => bail!("the session ended before a stream was opened"),
            }
        }
    }

    fn next(&mut self, seconds: u64) -> Result<Option<Event>> {
        let Self { runtime, line, mux } = self;
        runtime.block_on(async {
            let next = async {
                loop {
                    if let Some(event) = mux.poll() {
                        return Ok(Some(event));
                    }
                    let Some(frame) = line.receive().await? else { return Ok(None) };
                    mux.receive(frame).context("cloudcore broke the protocol")?;
                }
            };
            tokio::time::timeout(Duration::from_secs(seconds), next)
                .await
                .with_context(|| format!("no frame within {seconds} s"))?
        })
    }

    /// Reads until `wanted` finds what it looks for; fails when the session ends before.
    pub fn receive_until<T>(&mut self, what: &str, mut wanted: impl FnMut(&Body) -> Option<T>) -> Result<T> {
        for _ in 0..10_000 {
            let Some(body) = self.receive(30).with_context(|| format!("waiting for {what}"))? else {
                bail!("the session ended before {what}");
            };
            if let Some(found) = wanted(&body) {
                return Ok(found);
            }
        }
        bail!("10000 frames and no {what}")
    }

    /// As [`Session::receive_end`], whatever else comes that may make no sense to a client that has lied.
    pub fn receive_farewell(&mut self) -> Result<Option<wire::Goodbye>> {
        let Self { runtime, line, .. } = self;
        let end = async {
            let mut goodbye = None;
            while let Some(frame) = line.receive().await? {
                if let Some(Body::Goodbye(said)) = frame.body {
                    goodbye = Some(said);
                }
            }
            Ok(goodbye)
        };
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(30), end).await })?
    }

    /// Reads until cloudcore ends the session; the Goodbye it said, if any.
    pub fn receive_end(&mut self) -> Result<Option<wire::Goodbye>> {
        let mut goodbye = None;
        while let Some(body) = self.receive(60)? {
            if let Body::Goodbye(said) = body {
                goodbye = Some(said);
            }
        }
        Ok(goodbye)
    }
}

impl Line {
    async fn websocket(address: SocketAddr, stream: TlsStream<TcpStream>) -> Result<Self> {
        let (socket, _) = tokio_tungstenite::client_async(format!("wss://{address}{SESSION_PATH}"), stream).await?;
        Ok(Self::WebSocket(Box::new(socket)))
    }

    async fn receive(&mut self) -> Result<Option<Frame>> {
        let socket = match self {
            Self::Quic(quic) => return Ok(quic.frames.recv().await),
            Self::WebSocket(socket) => socket,
        };
        loop {
            match socket.next().await {
                Some(Ok(Message::Binary(bytes))) => {
                    return Frame::decode(bytes.as_ref()).context("cloudcore sent no frame").map(Some);
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(None),
                Some(Ok(_)) => {}
            }
        }
    }
}

impl Quic {
    async fn open(address: SocketAddr, identity: &Identity) -> Result<Self> {
        let (endpoint, connection) = connect_quic(address, identity).await?;
        let mut lanes = Vec::new();
        for _ in 0..=Class::ALL.len() {
            lanes.push(connection.open_uni().await?);
        }
        let (sender, frames) = mpsc::channel(64);
        let incoming = connection.clone();
        tokio::spawn(async move {
            while let Ok(lane) = incoming.accept_uni().await {
                tokio::spawn(read_frames(lane, sender.clone()));
            }
        });
        Ok(Self { _endpoint: endpoint, connection, lanes, frames })
    }
}

impl Drop for Quic {
    fn drop(&mut self) {
        self.connection.close(quinn::VarInt::from_u32(0), b"");
    }
}

/// Hands on the frames of one stream, to its end or to what is none.
async fn read_frames(mut lane: quinn::RecvStream, frames: mpsc::Sender<Frame>) {
    let mut unread = Lane::default();
    while let Ok(Some(chunk)) = lane.read_chunk(64 << 10, true).await {
        unread.hear(&chunk.bytes);
        loop {
            let Ok(frame) = unread.take(MAX_FRAME) else { return };
            let Some((frame, _)) = frame else { break };
            if frames.send(frame).await.is_err() {
                return;
            }
        }
    }
}

/// Sends, within half a minute.
fn within<E: std::error::Error + Send + Sync + 'static>(
    runtime: &Runtime,
    sending: impl Future<Output = Result<(), E>>,
) -> Result<()> {
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(30), sending).await })??;
    Ok(())
}

/// The Hello of an edge with an empty store.
pub fn hello(node: &str) -> wire::Hello {
    wire::Hello {
        protocol_min: *skerry_proto::sync::PROTOCOL.start(),
        protocol_max: *skerry_proto::sync::PROTOCOL.end(),
        node: node.to_owned(),
        run_id: "00000000-0000-0000-0000-000000000000".to_owned(),
        store_id: "empty".to_owned(),
        last_epoch: 0,
        digests: skerry_proto::sync::COLLECTIONS
            .iter()
            .map(|collection| wire::Digest { collection: (*collection).into(), count: 0, sum: vec![0; 16].into() })
            .collect(),
        agent: "tests".to_owned(),
        revisions: Vec::new(),
        ..wire::Hello::default()
    }
}

/// A TLS connection that takes whoever answers for whom it calls.
pub async fn connect(address: SocketAddr, identity: Option<&Identity>) -> Result<TlsStream<TcpStream>> {
    encrypted(TcpStream::connect(address).await?, identity).await
}

async fn encrypted(stream: TcpStream, identity: Option<&Identity>) -> Result<TlsStream<TcpStream>> {
    let name = ServerName::IpAddress(stream.peer_addr()?.ip().into());
    Ok(TlsConnector::from(Arc::new(client(identity)?)).connect(name, stream).await?)
}

async fn connect_quic(address: SocketAddr, identity: &Identity) -> Result<(quinn::Endpoint, quinn::Connection)> {
    let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let config = skerry_proto::transport::client_config(&client(Some(identity))?)?;
    let connection = endpoint.connect_with(config, address, "localhost")?.await?;
    Ok((endpoint, connection))
}

fn client(identity: Option<&Identity>) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let trust = Arc::new(TrustAnyone(provider.clone()));
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let config = config.dangerous().with_custom_certificate_verifier(trust);
    Ok(match identity {
        Some(identity) => {
            let chain =
                CertificateDer::pem_slice_iter(identity.certificate.as_bytes()).collect::<Result<Vec<_>, _>>()?;
            config.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(identity.key.as_bytes())?)?
        }
        None => config.with_no_client_auth(),
    })
}

/// A verifier for a client with nothing to lose.
#[derive(Debug)]
struct TrustAnyone(Arc<CryptoProvider>);

impl ServerCertVerifier for TrustAnyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
