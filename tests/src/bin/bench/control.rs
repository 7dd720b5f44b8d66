//! How long what is urgent takes while all else floods a narrow line.
//!
//! Both ends are the product's own transport on real sockets, in TLS as both programs set it up, with the relay between them at 256 kbit/s
//! each way; what floods are streams of the classes ops and device in both directions, as much as they take. Control frames are pings of both, one every 100 ms;
//! what is told is the time until the other has them. A fake stands in for cloudcore and edgecore, whose own streams would be as many as
//! whoever uses them opens.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ServerConfig};
use skerry_proto::mux::{Class, Side};
use skerry_proto::streams::{Stream, Streams};
use skerry_proto::transport::{self, Event, TLS_BUFFER, UNSENT, ws_config};
use skerry_proto::wire::{Frame, Ping, frame::Body};
use skerry_tests::relay::Relay;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::figures::tell;

type Wire = transport::Wire<TlsStream<TcpStream>, ()>;

/// 256 kbit/s, in bytes.
const BANDWIDTH: u64 = 32_000;
/// What a modem holds of a TCP connection, in bytes.
const ROOM: usize = 4 << 10;
/// Whom the certificate is for.
const NAME: &str = "localhost";
const EVERY: Duration = Duration::from_millis(100);
const PINGS: usize = 600;
/// What a stream has to come to its rate, and for how long that is counted then.
const GROWING: Duration = Duration::from_secs(6);

pub(crate) fn run(subject: &'static str) -> Result<()> {
    eprintln!("control frames over {subject} while a line of 256 kbit/s is flooded");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (relay, door) = line(subject, Some(ROOM))?;
    let times = runtime.block_on(async {
        let (cloud, edge, _endpoints) = pair(door, &relay).await?;
        measure(&relay, cloud, edge).await
    })?;
    let mut worst = 0.0_f64;
    for (direction, mut times) in ["down", "up"].into_iter().zip(times) {
        times.sort();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64();
        eprintln!(
            "{direction}: median {:.3} s, 99 of 100 in {:.3} s, worst {:.3} s of {}",
            at(50),
            at(99),
            at(100),
            times.len()
        );
        worst = worst.max(at(99));
    }
    tell("link.control.p99", subject, worst, "s");
    let (relay, door) = line(subject, None)?;
    let rate = runtime.block_on(async {
        let (cloud, edge, _endpoints) = pair(door, &relay).await?;
        rate(&relay, cloud, edge).await
    })?;
    tell("link.stream.rate", subject, rate / 1e6, "MB/s");
    Ok(())
}

/// What the cloud's end listens on.
enum Door {
    Tcp(std::net::TcpListener),
    Udp(std::net::UdpSocket),
}

/// The line, with so much room for TCP, to a door for this transport.
fn line(subject: &str, room: Option<usize>) -> Result<(Relay, Door)> {
    let loopback = (Ipv4Addr::LOCALHOST, 0);
    if subject == "quic" {
        let socket = std::net::UdpSocket::bind(loopback)?;
        return Ok((Relay::start(socket.local_addr()?)?, Door::Udp(socket)));
    }
    let listener = std::net::TcpListener::bind(loopback)?;
    let relay = match room {
        Some(room) => Relay::start_narrow(listener.local_addr()?, room)?,
        None => Relay::start(listener.local_addr()?)?,
    };
    Ok((relay, Door::Tcp(listener)))
}

/// Both ends of it; and what QUIC runs on.
async fn pair(door: Door, relay: &Relay) -> Result<(Wire, Wire, Vec<transport::Endpoint>)> {
    match door {
        Door::Udp(socket) => {
            let (cloud, edge, endpoints) = quic(socket, relay).await?;
            Ok((cloud, edge, endpoints.into()))
        }
        Door::Tcp(listener) => {
            let (cloud, edge) = websocket(listener, relay).await?;
            Ok((cloud, edge, Vec::new()))
        }
    }
}

/// How long pings took down and up.
async fn measure(relay: &Relay, mut cloud: Wire, mut edge: Wire) -> Result<[Vec<Duration>; 2]> {
    for streams in [cloud.streams(), edge.streams()] {
        for class in [Class::Ops, Class::Device] {
            for _ in 0..4 {
                tokio::spawn(flood(streams.clone(), class));
            }
        }
    }
    let (mut sent, mut times) = (Vec::new(), [Vec::new(), Vec::new()]);
    let mut tick = tokio::time::interval(EVERY);
    let begin = Instant::now();
    while times.iter().any(|times| times.len() < PINGS) {
        let (direction, event) = tokio::select! {
            _ = tick.tick(), if sent.len() < PINGS => {
                // The line first fills up.
                if begin.elapsed() > Duration::from_secs(5) {
                    for wire in [&mut cloud, &mut edge] {
                        wire.push(Frame { body: Some(Body::Ping(Ping { token: sent.len() as u64 })) });
                    }
                    sent.push(Instant::now());
                } else {
                    relay.set(|line| line.bandwidth = BANDWIDTH);
                }
                continue;
            }
            event = edge.next(true) => (0, event?),
            event = cloud.next(true) => (1, event?),
        };
        match event {
            Event::Frame(Frame { body: Some(Body::Ping(ping)) }) => {
                let sent: &Instant = sent.get(usize::try_from(ping.token)?).context("a ping that was never sent")?;
                times[direction].push(sent.elapsed());
            }
            event => serve(event),
        }
        if begin.elapsed() > Duration::from_secs(180) {
            bail!("only {} and {} of {PINGS} pings came within three minutes", times[0].len(), times[1].len());
        }
    }
    Ok(times)
}

/// Bytes a second of one stream at a round trip of 100 ms, on a line that carries more.
async fn rate(relay: &Relay, mut cloud: Wire, mut edge: Wire) -> Result<f64> {
    relay.set(|line| line.latency = Duration::from_millis(50));
    tokio::spawn(flood(cloud.streams(), Class::Ops));
    let read = Arc::new(AtomicUsize::new(0));
    let begin = Instant::now();
    let mut before = None;
    loop {
        let passed = begin.elapsed();
        if before.is_none() && passed > GROWING {
            before = Some((passed, read.load(Ordering::Relaxed)));
        }
        if let Some((from, bytes)) = before
            && passed > 2 * GROWING
        {
            let bytes = read.load(Ordering::Relaxed) - bytes;
            return Ok(bytes as f64 / (passed - from).as_secs_f64());
        }
        tokio::select! {
            event = cloud.next(true) => serve(event?),
            event = edge.next(true) => if let Event::Opened(incoming) = event? {
                let (mut stream, read) = (incoming.stream, Arc::clone(&read));
                tokio::spawn(async move {
                    let mut buffer = vec![0; 64 << 10];
                    while let Ok(bytes @ 1..) = stream.read(&mut buffer).await {
                        read.fetch_add(bytes, Ordering::Relaxed);
                    }
                });
            },
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

async fn flood(streams: Streams, class: Class) -> Result<()> {
    let mut stream = streams.open(class, Bytes::new())?;
    loop {
        stream.write_all(&[7; 8 << 10]).await?;
    }
}

fn serve(event: Event) {
    if let Event::Opened(incoming) = event {
        tokio::spawn(drain(incoming.stream));
    }
}

async fn drain(mut stream: Stream) {
    let mut buffer = vec![0; 64 << 10];
    while stream.read(&mut buffer).await.is_ok_and(|bytes| bytes > 0) {}
}

async fn websocket(listener: std::net::TcpListener, relay: &Relay) -> Result<(Wire, Wire)> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let near = TcpStream::connect(relay.address()).await?;
    let (far, _) = listener.accept().await?;
    for stream in [&near, &far] {
        stream.set_nodelay(true)?;
        socket2::SockRef::from(stream).set_tcp_notsent_lowat(UNSENT)?;
    }
    let (server, client) = tls()?;
    let connecting = TlsConnector::from(Arc::new(client)).connect(ServerName::try_from(NAME)?, near);
    let accepting = TlsAcceptor::from(Arc::new(server)).accept(far);
    let (mut near, mut far) = tokio::try_join!(connecting, accepting)?;
    near.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
    far.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
    let edge = WebSocketStream::from_raw_socket(near.into(), Role::Client, Some(ws_config())).await;
    let cloud = WebSocketStream::from_raw_socket(far.into(), Role::Server, Some(ws_config())).await;
    Ok((Wire::over_websocket(cloud, Side::Cloud, ()), Wire::over_websocket(edge, Side::Edge, ())))
}

/// A server that proves itself, and a client that trusts it.
fn tls() -> Result<(ServerConfig, ClientConfig)> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    let key = PrivateKeyDer::Pkcs8(signing_key.serialize_der().into());
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(cert.der().clone())?;
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok((server, client))
}

async fn quic(socket: std::net::UdpSocket, relay: &Relay) -> Result<(Wire, Wire, [transport::Endpoint; 2])> {
    let (server, client) = tls()?;
    let config = transport::server_config(&server)?;
    let listening = transport::Endpoint::new(quinn_proto::EndpointConfig::default(), Some(config), socket)?;
    let dialling = transport::Endpoint::client(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let connecting = dialling.connect(transport::client_config(&client)?, relay.address(), NAME)?;
    let accepting = async { anyhow::Ok(listening.accept().await.context("the endpoint is closed")?.accept().await?) };
    let (edge, cloud) = tokio::join!(connecting, accepting);
    let cloud = Wire::over_quic(cloud?, Side::Cloud, ()).await?;
    let edge = Wire::over_quic(edge?, Side::Edge, ()).await?;
    Ok((cloud, edge, [listening, dialling]))
}
