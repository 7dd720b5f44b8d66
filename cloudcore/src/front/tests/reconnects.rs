//! A node whose connection breaks a thousand times, at any moment and over either transport, leaves one session and nothing else.

use std::any::Any;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use skerry_proto::transport;
use tokio_tungstenite::client_async;

use super::*;

const ROUNDS: usize = 1000;

/// A connection as far as it came: only held open.
type Held = Box<dyn Any>;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Tasks of this test's own runtime.
fn tasks() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

fn is_deserted(cloud: &Cloud) -> bool {
    cloud.front.requests.available_permits() == MAX_REQUESTS
        && cloud.front.handshakes.taken() == 0
        && cloud.front.sessions.nodes().is_empty()
}

/// Connects as far as `stage`, from 0: a connection, TLS, an upgrade, a Hello, its Welcome.
async fn connect(cloud: &Cloud, identity: &Identity, quic: &transport::Endpoint, stage: u32, is_quic: bool) -> Held {
    if is_quic {
        let config = transport::client_config(&client(Some(identity), &cloud.front.authority.current())).unwrap();
        let connection = quic.connect(config, cloud.address, "localhost").unwrap().await.unwrap();
        if stage < 2 {
            return Box::new(connection);
        }
        let mut wire = transport::Wire::<TcpStream, ()>::over_quic(connection, Side::Edge, ()).await.unwrap();
        if stage >= 3 {
            wire.push(Frame { body: Some(hello("box-1", 0)) });
            // What is pushed goes when it is waited for; an answer may come or not.
            let patience = if stage == 3 { Duration::from_millis(1) } else { PATIENCE };
            let _ = tokio::time::timeout(patience, wire.next(true)).await;
        }
        return Box::new(wire);
    }
    if stage == 0 {
        return Box::new(TcpStream::connect(cloud.address).await.unwrap());
    }
    let stream = cloud.tls(Some(identity)).await;
    if stage == 1 {
        return Box::new(stream);
    }
    let (mut socket, _) = client_async("ws://localhost/v1/session", stream).await.unwrap();
    if stage >= 3 {
        let hello = Frame { body: Some(hello("box-1", 0)) };
        socket.send(Message::Binary(hello.encode_to_vec().into())).await.unwrap();
        if stage == 4 {
            tokio::time::timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap();
        }
    }
    Box::new(socket)
}

#[tokio::test]
async fn a_thousand_broken_connections_leave_one_session_and_nothing_else() {
    let seed = std::env::var("SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    eprintln!("SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let quic = transport::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    until("joining is over", || is_deserted(&cloud)).await;
    let before = descriptors();
    let (edge, ..) = cloud.session(&identity, "box-1", 0).await;
    let tasks_of_one = tasks();
    drop(edge);
    // The last two stay open for a while: what is newer has to take over from what does not know yet that it is over.
    let mut held = std::collections::VecDeque::new();
    let mut highest = 0;
    for _ in 0..ROUNDS {
        held.push_back(connect(&cloud, &identity, &quic, random.random_range(0..5), random.random_bool(0.5)).await);
        if held.len() > 2 {
            held.pop_front();
        }
        while let Ok(opened) = cloud.opened.try_recv() {
            assert!(opened.epoch > highest, "epochs only rise");
            highest = opened.epoch;
        }
    }
    drop(held);
    // A Hello of before may still be on its way, and would take over from what comes now.
    until("every broken connection ends", || is_deserted(&cloud)).await;
    while let Ok(opened) = cloud.opened.try_recv() {
        highest = highest.max(opened.epoch);
    }
    let (_edge, last, _) = cloud.session(&identity, "box-1", 0).await;
    assert!(last.epoch > highest);
    until("descriptors are given back", || descriptors() <= before + 2).await;
    until("tasks end", || tasks() <= tasks_of_one).await;
    let one = [NodeIdentity { name: "box-1".to_owned(), uid: "uid-of-box-1".to_owned() }];
    assert_eq!(cloud.front.sessions.nodes(), one);
    assert_eq!(cloud.front.requests.available_permits(), MAX_REQUESTS);
    assert!(!last.events.is_closed(), "the last session stands");
}
