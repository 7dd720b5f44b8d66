//! What becomes of connections and endpoints, over loopback sockets.

use quinn_proto::ConnectError;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::super::tests::{LOOPBACK, configs, connections, listen};
use super::super::{Event, Wire};
use super::*;
use crate::mux;

mod faults;

const PATIENCE: Duration = Duration::from_secs(20);

/// How it ends.
async fn gone(connection: &Connection) -> ConnectionError {
    let gone = poll_fn(|context| connection.line().state().poll_gone(context));
    timeout(PATIENCE, gone).await.expect("it ends")
}

/// Two connections between which nothing is said, as `accept` takes them.
async fn call<T>(accept: impl AsyncFnOnce(&Endpoint) -> T) -> (Result<Connection, ConnectionError>, T) {
    let (server, client) = configs();
    let (listening, dialling) = (listen(server), Endpoint::client(LOOPBACK).unwrap());
    let connecting = dialling.connect(client, listening.local_addr().unwrap(), "localhost").unwrap();
    timeout(PATIENCE, async { tokio::join!(connecting, accept(&listening)) }).await.expect("it is decided")
}

#[tokio::test]
async fn who_lets_go_of_all_leaves_nothing() {
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    let (cloud, edge, endpoints) = connections().await;
    assert_eq!(tasks(), before + 4);
    drop(cloud);
    assert!(matches!(gone(&edge).await, ConnectionError::ApplicationClosed(_)));
    drop(edge);
    for endpoint in &endpoints {
        timeout(PATIENCE, endpoint.wait_idle()).await.expect("stragglers are not waited for that long");
    }
    drop(endpoints);
    let ended = async {
        while tasks() > before {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, ended).await.expect("their tasks end");
}

#[tokio::test]
async fn a_connection_outlives_who_held_its_endpoint() {
    let (cloud, edge, endpoints) = connections().await;
    drop(endpoints);
    edge.close(VarInt::from_u32(7), b"over");
    let ConnectionError::ApplicationClosed(closed) = gone(&cloud).await else { panic!("it hears why") };
    assert_eq!((closed.error_code, &closed.reason[..]), (VarInt::from_u32(7), &b"over"[..]));
}

#[tokio::test]
async fn a_caller_that_is_let_go_is_refused() {
    let (edge, ()) = call(async |listening| drop(listening.accept().await)).await;
    let Err(ConnectionError::ConnectionClosed(closed)) = edge else { panic!("{edge:?}") };
    assert_eq!(closed.error_code, TransportErrorCode::CONNECTION_REFUSED);
}

#[tokio::test]
async fn a_caller_shows_first_that_the_address_is_his() {
    let (edge, cloud) = call(async |listening| {
        let caller = listening.accept().await.unwrap();
        assert!(!caller.remote_address_validated());
        let address = caller.remote_address();
        caller.retry();
        let again = listening.accept().await.unwrap();
        assert_eq!((again.remote_address_validated(), again.remote_address()), (true, address));
        again.accept().await
    })
    .await;
    edge.unwrap();
    cloud.unwrap();
}

#[tokio::test]
async fn an_endpoint_that_is_closed_tells_everybody() {
    let (cloud, edge, [listening, _dialling]) = connections().await;
    let (_, client) = configs();
    let (second, third) = (Endpoint::client(LOOPBACK).unwrap(), Endpoint::client(LOOPBACK).unwrap());
    let address = listening.local_addr().unwrap();
    let waiting = second.connect(client.clone(), address, "localhost").unwrap();
    let caller = listening.accept().await.unwrap();
    listening.close(VarInt::from_u32(7), b"over");
    assert!(matches!(gone(&edge).await, ConnectionError::ApplicationClosed(closed) if closed.reason == "over"));
    assert!(matches!(gone(&cloud).await, ConnectionError::LocallyClosed));
    assert!(matches!(caller.accept().await, Err(ConnectionError::LocallyClosed)));
    let refused = timeout(PATIENCE, waiting).await.unwrap();
    assert!(matches!(refused, Err(ConnectionError::ConnectionClosed(_))), "{refused:?}");
    let late = third.connect(client.clone(), address, "localhost").unwrap();
    let refused = timeout(PATIENCE, late).await.unwrap();
    assert!(matches!(refused, Err(ConnectionError::ConnectionClosed(_))), "{refused:?}");
    assert!(listening.accept().await.is_none());
    let connected = listening.connect(client, LOOPBACK, "localhost").map(drop);
    assert_eq!(connected, Err(ConnectError::EndpointStopping));
}

#[tokio::test]
async fn who_is_not_listening_any_more_is_silent() {
    let (server, client) = configs();
    let (listening, dialling) = (listen(server), Endpoint::client(LOOPBACK).unwrap());
    listening.stop_listening();
    let connecting = dialling.connect(client, listening.local_addr().unwrap(), "localhost").unwrap();
    assert!(timeout(Duration::from_millis(50), connecting).await.is_err());
}

/// Two sides of which one, or the other, changes its keys: each goes on with the other's.
async fn change_keys(of_the_edge: bool) {
    use crate::wire::{Ping, frame::Body};
    let (cloud, edge, _endpoints) = connections().await;
    let line = Arc::clone(if of_the_edge { edge.line() } else { cloud.line() });
    let mut cloud = Wire::<TcpStream, ()>::over_quic(cloud, mux::Side::Cloud, ()).await.unwrap();
    let mut edge = Wire::<TcpStream, ()>::over_quic(edge, mux::Side::Edge, ()).await.unwrap();
    for token in 0..6 {
        if token == 2 {
            line.state().quic.force_key_update();
        }
        let ping = Frame { body: Some(Body::Ping(Ping { token })) };
        cloud.push(ping.clone());
        let heard = async {
            loop {
                tokio::select! {
                    heard = edge.next(true) => break heard,
                    sent = cloud.next(true) => assert!(matches!(sent, Ok(Event::Drained)), "{sent:?}"),
                }
            }
        };
        let heard = timeout(PATIENCE, heard).await.expect("it comes").unwrap();
        assert!(matches!(heard, Event::Frame(frame) if frame == ping));
        std::mem::swap(&mut cloud, &mut edge);
    }
}

#[tokio::test]
async fn keys_change_and_nobody_notices() {
    change_keys(false).await;
    change_keys(true).await;
}

#[tokio::test]
async fn who_speaks_another_version_is_told_which_one_is_spoken() {
    let (server, mut client) = configs();
    client.version(0xff00_001d);
    let (listening, dialling) = (listen(server), quinn::Endpoint::client(LOOPBACK).unwrap());
    let connecting = dialling.connect_with(client, listening.local_addr().unwrap(), "localhost").unwrap();
    let told = timeout(PATIENCE, connecting).await.expect("it is told");
    assert!(matches!(told, Err(ConnectionError::VersionMismatch)), "{told:?}");
}

#[tokio::test]
async fn who_waits_for_an_endpoint_that_is_let_go_is_refused() {
    let (server, client) = configs();
    let (listening, dialling) = (listen(server), Endpoint::client(LOOPBACK).unwrap());
    let connecting = dialling.connect(client, listening.local_addr().unwrap(), "localhost").unwrap();
    let letting_go = async {
        // It is there when the endpoint goes, in the hands of who took it.
        let caller = listening.accept().await.unwrap();
        drop(listening);
        caller.accept().await
    };
    let (edge, cloud) = tokio::join!(timeout(PATIENCE, connecting), letting_go);
    assert!(matches!(cloud, Err(ConnectionError::LocallyClosed)), "{cloud:?}");
    assert!(matches!(edge, Ok(Err(ConnectionError::ConnectionClosed(_)))), "{edge:?}");
}

#[test]
fn a_runtime_that_is_shut_down_ends_everything() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (cloud, edge, endpoints) = runtime.block_on(connections());
    // Its tasks are dropped, and what uses them hears so.
    runtime.shutdown_background();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        gone(&cloud).await;
        gone(&edge).await;
        for endpoint in &endpoints {
            assert!(timeout(PATIENCE, endpoint.accept()).await.expect("nobody can come any more").is_none());
        }
    });
}
