//! QUIC, and the way back from it.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::FutureExt as _;
use skerry_proto::transport;
use tokio::net::UdpSocket;

use super::*;
use crate::kubelet::context::blocking;

type Wire = transport::Wire<TcpStream, ()>;

impl Bed {
    /// With a UDP socket on the same number.
    async fn with_udp(transport: Transport) -> (Self, std::net::UdpSocket) {
        loop {
            let bed = Self::with(transport).await;
            // Somebody else may have it.
            match std::net::UdpSocket::bind(bed.listener.local_addr().unwrap()) {
                Ok(udp) => return (bed, udp),
                Err(_) => bed.end().await,
            }
        }
    }
}

/// A hub without wishes, until the session ends.
async fn serve_quic(connection: transport::Connection) -> String {
    let mut wire = Wire::over_quic(connection, Side::Cloud, ()).await.unwrap();
    let mut hub: Option<Hub> = None;
    loop {
        let frame = match wire.next(true).await {
            Ok(transport::Event::Frame(frame)) => frame,
            Ok(_) => continue,
            Err(end) => return end.to_string(),
        };
        let outputs = match (&mut hub, frame) {
            (None, Frame { body: Some(Body::Hello(hello)) }) => {
                let (mut machine, mut outputs) = Hub::new(clock::monotonic(), &hello, hello.last_epoch + 1, 0, "test");
                for collection in COLLECTIONS {
                    outputs.extend(machine.step(clock::monotonic(), HubInput::Complete(collection)));
                }
                hub = Some(machine);
                outputs
            }
            (Some(hub), frame) => hub.step(clock::monotonic(), HubInput::Frame(frame)),
            (None, other) => panic!("not a hello: {other:?}"),
        };
        for output in outputs {
            match output {
                HubOutput::Send(frame) => wire.push(frame),
                HubOutput::Close(_) => return "goodbye".to_owned(),
                _ => {}
            }
        }
    }
}

fn endpoint(udp: std::net::UdpSocket, tls: &rustls::ServerConfig) -> transport::Endpoint {
    let config = transport::server_config(tls).unwrap();
    transport::Endpoint::new(quinn_proto::EndpointConfig::default(), Some(config), udp).unwrap()
}

#[tokio::test]
async fn where_udp_comes_through_the_link_is_quic() {
    let (mut bed, udp) = Bed::with_udp(Transport::Auto).await;
    let endpoint = endpoint(udp, &bed.tls);
    let connection = endpoint.accept().await.unwrap().accept().await.unwrap();
    let serving = serve_quic(connection);
    let story = async {
        let state = bed.state(|state| matches!(state, LinkState::Online { .. })).await;
        assert!(matches!(state, LinkState::Online { transport: Transport::Quic, .. }), "{state:?}");
        bed.end().await;
    };
    let (ended, ()) = tokio::join!(serving, story);
    assert_eq!(ended, "goodbye", "edgecore says that it ends");
}

#[tokio::test]
async fn a_cloud_that_says_no_over_quic_is_heard_and_quic_stays() {
    let (mut bed, udp) = Bed::with_udp(Transport::Auto).await;
    let endpoint = endpoint(udp, &bed.tls);
    let refusing = async {
        for _ in 0..3 {
            let connection = endpoint.accept().await.unwrap().accept().await.unwrap();
            connection.close(1_u32.into(), b"too many requests at once");
        }
        // Once more, and it may.
        serve_quic(endpoint.accept().await.unwrap().accept().await.unwrap()).await
    };
    let story = async {
        let told =
            |state: &LinkState| format!("{state:?}").contains("closed the connection: too many requests at once");
        bed.state(told).await;
        let state = bed.state(|state| matches!(state, LinkState::Online { .. })).await;
        assert!(matches!(state, LinkState::Online { transport: Transport::Quic, .. }), "{state:?}");
        let unasked = tokio::time::timeout(Duration::from_millis(1), bed.listener.accept()).await;
        assert!(unasked.is_err(), "no WebSocket is tried");
        bed.end().await;
    };
    tokio::join!(refusing, story);
}

#[tokio::test]
async fn where_udp_is_swallowed_a_websocket_carries_the_link_and_quic_is_left_alone() {
    let (mut bed, udp) = Bed::with_udp(Transport::Auto).await;
    udp.set_nonblocking(true).unwrap();
    let udp = UdpSocket::from_std(udp).unwrap();
    let swallowed = AtomicUsize::new(0);
    let swallow = async {
        loop {
            udp.recv(&mut [0; 2000]).await.unwrap();
            swallowed.fetch_add(1, Ordering::Relaxed);
        }
    };
    let story = async {
        let mut before = 0;
        for attempt in 0..3 {
            let mut peer = bed.accept().await;
            serve(&mut peer, &[object(Collection::Pods, "p", "1")], 0).await;
            let state = bed.state(|state| matches!(state, LinkState::Online { .. })).await;
            assert!(matches!(state, LinkState::Online { transport: Transport::WebSocket, .. }), "{state:?}");
            let now = swallowed.load(Ordering::Relaxed);
            assert!(if attempt == 0 { now > 0 } else { now == before }, "attempt {attempt}: {before}, {now}");
            before = now;
            drop(peer);
            bed.state(|state| matches!(state, LinkState::Offline { .. })).await;
        }
        bed.end().await;
    };
    tokio::select! { () = swallow => {}, () = story => {} }
}

#[tokio::test(start_paused = true)]
async fn where_udp_is_swallowed_a_websocket_is_tried_after_two_seconds() {
    let (listener, _swallows) = loop {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // Somebody else may have it.
        if let Ok(udp) = std::net::UdpSocket::bind(listener.local_addr().unwrap()) {
            break (listener, udp);
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let tls = identity_of(&Authority::new(), "box", dir.path()).client_config().unwrap();
    let server = Server { host: "127.0.0.1".to_owned(), port: listener.local_addr().unwrap().port() };
    // While this runs the time passes only when it is told to: sockets take what they take. It is there for as long as nobody fails.
    let (done, ending) = std::sync::mpsc::channel::<()>();
    let standstill = blocking(move || ending.recv_timeout(Duration::from_secs(30)).unwrap_or_default());
    let story = async {
        let begin = tokio::time::Instant::now();
        let mut choice = Choice::new(Transport::Auto);
        let asked = async {
            tokio::time::advance(Duration::from_millis(1500)).await;
            for _ in 0..9 {
                tokio::task::yield_now().await;
            }
            assert!(listener.accept().now_or_never().is_none(), "QUIC has its time alone");
            tokio::time::advance(Duration::from_millis(500)).await;
            listener.accept().await.unwrap();
            begin.elapsed()
        };
        let waited = tokio::select! {
            biased;
            connected = connect(&server, tls, &mut choice) => panic!("{:?}", connected.err()),
            waited = asked => waited,
        };
        drop(done);
        waited
    };
    let ((), waited) = tokio::join!(standstill, story);
    assert_eq!(waited, Duration::from_secs(2));
}
