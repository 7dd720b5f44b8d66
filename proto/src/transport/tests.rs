//! Both transports over loopback sockets: what goes in at one side comes out at the other, whatever it runs on.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use quinn_proto::rustls;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio_tungstenite::tungstenite::protocol::Role;

use super::*;
use crate::mux::{CUT, Class};
use crate::wire::Ping;

pub(super) const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

type Pair = (Wire<DuplexStream, ()>, Wire<DuplexStream, ()>);

fn ping(token: u64) -> Frame {
    Frame { body: Some(Body::Ping(Ping { token })) }
}

fn goodbye(bytes: usize) -> Goodbye {
    Goodbye { message: "x".repeat(bytes), ..Goodbye::default() }
}

async fn websocket() -> Pair {
    let (near, far) = tokio::io::duplex(4096);
    let cloud = WebSocketStream::from_raw_socket(near, Role::Server, Some(ws_config())).await;
    let edge = WebSocketStream::from_raw_socket(far, Role::Client, Some(ws_config())).await;
    (Wire::over_websocket(cloud, Side::Cloud, ()), Wire::over_websocket(edge, Side::Edge, ()))
}

/// The connections are between the endpoints, which have to be kept.
async fn quic() -> (Pair, [Endpoint; 2]) {
    let (cloud, edge, endpoints) = connections().await;
    let cloud = Wire::over_quic(cloud, Side::Cloud, ()).await.unwrap();
    let edge = Wire::over_quic(edge, Side::Edge, ()).await.unwrap();
    ((cloud, edge), endpoints)
}

/// Of a server and of who trusts it.
pub(super) fn configs() -> (quinn_proto::ServerConfig, quinn_proto::ClientConfig) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(signing_key.serialize_der().into());
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(cert.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (server_config(&server).unwrap(), client_config(&client).unwrap())
}

pub(super) fn listen(config: quinn_proto::ServerConfig) -> Endpoint {
    let socket = std::net::UdpSocket::bind(LOOPBACK).unwrap();
    Endpoint::new(quinn_proto::EndpointConfig::default(), Some(config), socket).unwrap()
}

pub(super) async fn connections() -> (Connection, Connection, [Endpoint; 2]) {
    let (server, client) = configs();
    let (listening, dialling) = (listen(server), Endpoint::client(LOOPBACK).unwrap());
    let connecting = dialling.connect(client, listening.local_addr().unwrap(), "localhost").unwrap();
    let accepting = async { listening.accept().await.unwrap().accept().await.unwrap() };
    let (edge, cloud) = tokio::join!(connecting, accepting);
    (cloud, edge.unwrap(), [listening, dialling])
}

/// Frames, large and small, and a stream, both ways at once.
async fn talk((mut cloud, mut edge): Pair) {
    const FRAMES: u64 = 100;
    let large = Frame { body: Some(Body::Goodbye(goodbye(20 * CUT))) };
    let streams = cloud.streams();
    let sent: Vec<u8> = (0..1 << 20).map(|n: u32| n.to_le_bytes()[0]).collect();
    for side in [&mut cloud, &mut edge] {
        for token in 0..FRAMES {
            side.push(Frame { body: Some(Body::Ack(crate::wire::Ack { seq: token })) });
        }
        side.push(large.clone());
    }
    let asking = async {
        let stream = streams.open(Class::Ops, Bytes::from_static(b"echo")).unwrap();
        let (mut read, mut write) = tokio::io::split(stream);
        let mut got = Vec::new();
        let writes = async {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let (_, read) = tokio::join!(writes, read.read_to_end(&mut got));
        read.unwrap();
        assert!(got == sent);
    };
    let carry = async |wire: &mut Wire<DuplexStream, ()>| {
        let mut acks = 0;
        let mut large_ones = 0;
        loop {
            match wire.next(true).await.unwrap() {
                Event::Frame(Frame { body: Some(Body::Ack(ack)) }) => {
                    assert_eq!(ack.seq, acks, "in order");
                    acks += 1;
                }
                Event::Frame(frame) => {
                    assert_eq!((&frame, acks), (&large, FRAMES));
                    large_ones += 1;
                }
                Event::Opened(incoming) => {
                    assert_eq!((incoming.class, &incoming.header[..]), (Class::Ops, &b"echo"[..]));
                    // What serves it outlives the loop that carries.
                    #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
                    tokio::spawn(async move {
                        let (mut read, mut write) = tokio::io::split(incoming.stream);
                        tokio::io::copy(&mut read, &mut write).await.unwrap();
                        write.shutdown().await.unwrap();
                    });
                }
                Event::Heard | Event::Drained => {}
            }
            assert!(large_ones <= 1);
        }
    };
    tokio::select! {
        () = asking => {}
        () = carry(&mut cloud) => {}
        () = carry(&mut edge) => {}
    }
    let (said, heard) = tokio::join!(cloud.finish("over", Some(goodbye(7)), Duration::from_secs(10)), async {
        loop {
            match edge.next(true).await {
                Ok(Event::Frame(Frame { body: Some(Body::Goodbye(said)) })) if said.message.len() == 7 => break,
                Ok(_) => {}
                Err(end) => panic!("no last words: {end}"),
            }
        }
        edge.finish("over", None, Duration::from_secs(10)).await;
    });
    let ((), ()) = (said, heard);
}

#[tokio::test]
async fn frames_and_streams_over_websocket() {
    talk(websocket().await).await;
}

#[tokio::test]
async fn frames_and_streams_over_quic() {
    let (pair, _endpoints) = quic().await;
    talk(pair).await;
}

#[tokio::test]
async fn last_words_that_came_with_the_end_are_heard() {
    let (cloud, edge, [_listening, dialling]) = connections().await;
    let cloud = Wire::<DuplexStream, ()>::over_quic(cloud, Side::Cloud, ()).await.unwrap();
    let mut edge = Wire::<DuplexStream, ()>::over_quic(edge, Side::Edge, ()).await.unwrap();
    cloud.finish("over", Some(goodbye(7)), Duration::from_secs(10)).await;
    // Its connection is over.
    dialling.wait_idle().await;
    // It has something to say, too, which it finds that it cannot.
    edge.push(ping(1));
    loop {
        match edge.next(true).await {
            Ok(Event::Frame(Frame { body: Some(Body::Goodbye(said)) })) => break assert_eq!(said, goodbye(7)),
            Ok(Event::Drained) => {}
            other => panic!("no last words: {other:?}"),
        }
    }
    assert!(matches!(edge.next(true).await, Err(End::Told(said)) if said == "over"));
}

#[tokio::test]
async fn last_words_do_not_wait_for_streams_that_nobody_reads() {
    let (cloud, edge, _endpoints) = connections().await;
    let mut cloud = Wire::<DuplexStream, ()>::over_quic(cloud, Side::Cloud, ()).await.unwrap();
    // More than a lane takes that nobody reads: what is left of a frame waits for room on it.
    let mut opened: Vec<_> = (0..10).map(|_| cloud.streams().open(Class::Device, Bytes::new()).unwrap()).collect();
    for stream in &mut opened {
        let mut written = 0;
        while written < 64 << 10 {
            tokio::select! {
                wrote = stream.write(&[0; 4096]) => written += wrote.unwrap(),
                event = cloud.next(true) => panic!("{event:?}"),
            }
        }
    }
    let patience = Duration::from_secs(3600);
    let finished = tokio::time::timeout(Duration::from_secs(20), cloud.finish("over", Some(goodbye(7)), patience));
    let heard = async {
        let mut edge = Wire::<DuplexStream, ()>::over_quic(edge, Side::Edge, ()).await.unwrap();
        let heard = edge.next(true).await.unwrap();
        // It is kept: a lane that was let go would tell the cloud so.
        (heard, edge)
    };
    let (finished, (heard, _edge)) = tokio::join!(finished, heard);
    finished.expect("only control is waited for");
    assert!(matches!(heard, Event::Frame(_) | Event::Opened(_)), "{heard:?}");
}

/// Nobody reads the device class; what is urgent still goes, and nothing is lost.
async fn flood((mut cloud, mut edge): Pair) {
    let streams = cloud.streams();
    let mut flooding = streams.open(Class::Device, Bytes::new()).unwrap();
    let flood = async {
        loop {
            flooding.write_all(&[0; 4096]).await.unwrap();
        }
    };
    let mut held = None;
    let story = async {
        for token in 0..1000 {
            cloud.push(ping(token));
            loop {
                tokio::select! {
                    event = cloud.next(true) => drop(event.unwrap()),
                    event = edge.next(true) => match event.unwrap() {
                        Event::Frame(frame) => {
                            assert_eq!(frame, ping(token));
                            break;
                        }
                        Event::Opened(incoming) => held = Some(incoming),
                        Event::Heard | Event::Drained => {}
                    }
                }
            }
        }
    };
    tokio::select! { () = flood => {}, () = story => {} }
    assert!(held.is_some());
}

#[tokio::test]
async fn what_nobody_reads_holds_up_nothing() {
    flood(websocket().await).await;
    let (pair, _endpoints) = quic().await;
    flood(pair).await;
}

#[tokio::test]
async fn who_does_not_read_is_not_sent_more_than_fits() {
    let (cloud, mut edge) = websocket().await;
    let mut cloud = cloud.full_at(512 << 10);
    let big = Frame { body: Some(Body::Goodbye(goodbye(100_000))) };
    for _ in 0..7 {
        cloud.push(big.clone());
    }
    assert!(cloud.is_full());
    edge.push(ping(1));
    let mut seen = 0;
    let mut drained = false;
    while seen < 7 {
        tokio::select! {
            event = cloud.next(!cloud.is_full()) => match event.unwrap() {
                Event::Drained => drained = true,
                Event::Frame(frame) => assert_eq!((drained, frame), (true, ping(1))),
                other => panic!("{other:?}"),
            },
            event = edge.next(true) => if let Event::Frame(frame) = event.unwrap() {
                assert_eq!(frame, big);
                seen += 1;
            }
        }
    }
}

/// What an edge of its own making sends on QUIC streams, and how the cloud's end takes it.
async fn garbage(lane: usize, bytes: &[u8]) -> End {
    let (server, client) = configs();
    let (listening, dialling) = (listen(server), quinn::Endpoint::client(LOOPBACK).unwrap());
    let connecting = dialling.connect_with(client, listening.local_addr().unwrap(), "localhost").unwrap();
    let accepting = async { listening.accept().await.unwrap().accept().await.unwrap() };
    let (edge, cloud) = tokio::join!(connecting, accepting);
    let edge = edge.unwrap();
    let mut cloud = Wire::<DuplexStream, ()>::over_quic(cloud, Side::Cloud, ()).await.unwrap();
    let mut streams = Vec::new();
    for _ in 0..=lane {
        streams.push(edge.open_uni().await.unwrap());
    }
    streams[lane].write_all(bytes).await.unwrap();
    cloud.next(true).await.unwrap_err()
}

#[test]
fn why_a_connection_is_gone_is_told() {
    use quinn_proto::{ApplicationClose, ConnectionClose, ConnectionError, TransportErrorCode};
    let said = |reason: &'static str| {
        let reason = Bytes::from_static(reason.as_bytes());
        lost(ConnectionError::ApplicationClosed(ApplicationClose { error_code: 1_u32.into(), reason }))
    };
    assert!(matches!(said("no certificate"), End::Told(said) if said == "no certificate"));
    assert!(matches!(said(""), End::Closed));
    let closed = |error_code| {
        let reason = Bytes::from_static(b"for a reason");
        lost(ConnectionError::ConnectionClosed(ConnectionClose { error_code, frame_type: None, reason }))
    };
    assert!(matches!(closed(TransportErrorCode::NO_ERROR), End::Closed));
    assert!(matches!(closed(TransportErrorCode::CONNECTION_REFUSED), End::Busy(said) if said.contains("for a reason")));
    let full = ApplicationClose { error_code: BUSY, reason: Bytes::from_static(b"full") };
    assert!(matches!(lost(ConnectionError::ApplicationClosed(full)), End::Busy(said) if said == "full"));
    let End::Quic(error) = closed(TransportErrorCode::crypto(45)) else { panic!("an alert is TLS's") };
    let expired = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateExpired);
    assert_eq!(error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()), Some(&expired));
}

/// A cloud's end, and the WebSocket of an edge that does and sees what it likes.
async fn raw_edge() -> (Wire<DuplexStream, ()>, WebSocketStream<DuplexStream>) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let cloud = WebSocketStream::from_raw_socket(near, Role::Server, Some(ws_config())).await;
    let edge = WebSocketStream::from_raw_socket(far, Role::Client, Some(ws_config())).await;
    (Wire::over_websocket(cloud, Side::Cloud, ()), edge)
}

#[tokio::test]
async fn a_frame_of_a_stream_that_was_not_cut_is_garbage() {
    let (mut cloud, mut edge) = raw_edge().await;
    let open = crate::wire::StreamOpen { id: 3, header: Bytes::new() };
    let long = crate::wire::StreamData { id: 3, data: vec![0; 3 * CUT].into(), fin: false };
    for body in [Body::StreamOpen(open), Body::StreamData(long)] {
        let bytes = prost::Message::encode_to_vec(&Frame { body: Some(body) });
        futures_util::SinkExt::send(&mut edge, tungstenite::Message::Binary(bytes.into())).await.unwrap();
    }
    assert!(matches!(cloud.next(true).await, Ok(Event::Opened(_))));
    let Err(End::Garbage(told)) = cloud.next(true).await else { panic!("it is taken") };
    assert!(told.contains("more than are cut"), "{told}");
}

#[tokio::test]
async fn frames_of_a_websocket_are_cut_shorter() {
    let (mut cloud, mut edge) = raw_edge().await;
    let mut stream = cloud.streams().open(Class::Ops, Bytes::new()).unwrap();
    stream.write_all(&[7; 5 * WS_CUT]).await.unwrap();
    cloud.push(Frame { body: Some(Body::Goodbye(goodbye(5 * WS_CUT))) });
    let (mut data, mut parts) = (0, 0);
    while data < 5 * WS_CUT || parts < 5 * WS_CUT {
        let message = tokio::select! {
            event = cloud.next(true) => panic!("{event:?}"),
            message = futures_util::StreamExt::next(&mut edge) => message.unwrap().unwrap().into_data(),
        };
        assert!(message.len() <= WS_CUT + 16, "a frame has {} bytes", message.len());
        match crate::frame::decode(message).unwrap().body {
            Some(Body::StreamData(frame)) => data += frame.data.len(),
            Some(Body::ControlPart(part)) => parts += part.data.len(),
            _ => {}
        }
    }
}

#[tokio::test]
async fn garbage_on_quic_is_told() {
    use prost::Message as _;
    let control = ping(1).encode_length_delimited_to_vec();
    let data = Frame { body: Some(Body::StreamData(crate::wire::StreamData { id: 3, ..Default::default() })) };
    let cases: [(usize, Vec<u8>, &str); 5] = [
        (0, vec![0xff; 10], "cannot be decoded"),
        (0, vec![0x80, 0x80, 0x80, 0x40], "bytes are more than"),
        // The length alone, of 8193 bytes: what follows is not waited for.
        (2, vec![0x81, 0x40], "its 8193 bytes are more than 8192"),
        (3, control, "another class"),
        (1, data.encode_length_delimited_to_vec(), "never opened"),
    ];
    for (lane, bytes, expected) in cases {
        let End::Garbage(told) = garbage(lane, &bytes).await else { panic!("{expected}") };
        assert!(told.contains(expected), "{told:?} does not say {expected:?}");
    }
}
