//! Sessions over QUIC, against the same port.

use std::net::SocketAddr;

use skerry_proto::transport::{self, End, Event};
use tokio::sync::Notify;

use super::*;

pub(super) type Wire = transport::Wire<TcpStream, ()>;

impl Cloud {
    pub(super) async fn connection(&self, identity: Option<&Identity>) -> (transport::Endpoint, transport::Connection) {
        self.connection_at(identity, self.address).await
    }

    /// By way of this address.
    async fn connection_at(
        &self,
        identity: Option<&Identity>,
        address: SocketAddr,
    ) -> (transport::Endpoint, transport::Connection) {
        let config = transport::client_config(&client(identity, &self.authority())).unwrap();
        let endpoint = transport::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let connection = endpoint.connect(config, address, "localhost").unwrap().await.unwrap();
        (endpoint, connection)
    }
}

pub(super) async fn body(wire: &mut Wire) -> Body {
    loop {
        match tokio::time::timeout(PATIENCE, wire.next(true)).await.expect("something comes").unwrap() {
            Event::Frame(frame) => return frame.body.unwrap(),
            Event::Opened(_) | Event::Heard | Event::Drained => {}
        }
    }
}

/// How a connection ends on which an edge asks whether it is known.
async fn end(connection: transport::Connection) -> End {
    let mut wire = match Wire::over_quic(connection, Side::Edge, ()).await {
        Ok(wire) => wire,
        Err(end) => return end,
    };
    wire.push(Frame { body: Some(hello("box-1", 0)) });
    loop {
        if let Err(end) = wire.next(true).await {
            return end;
        }
    }
}

/// Passes datagrams on, to and from an address that is another one whenever it is told to.
async fn pass_on(near: tokio::net::UdpSocket, cloud: SocketAddr, moves: &Notify) {
    let (mut to_edge, mut to_cloud, mut edge) = ([0; 2000], [0; 2000], None);
    let far = async || tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut socket = far().await;
    loop {
        tokio::select! {
            () = moves.notified() => socket = far().await,
            came = near.recv_from(&mut to_cloud) => {
                let (bytes, from) = came.unwrap();
                edge = Some(from);
                socket.send_to(&to_cloud[..bytes], cloud).await.unwrap();
            }
            came = socket.recv(&mut to_edge) => {
                let bytes = came.unwrap();
                if let Some(edge) = edge {
                    near.send_to(&to_edge[..bytes], edge).await.unwrap();
                }
            }
        }
    }
}

#[tokio::test]
async fn an_edge_of_a_cloudcore_that_was_killed_hears_so_from_the_next() {
    let cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let tls = tls(Arc::clone(&cloud.front.authority), Arc::clone(&cloud.certificate)).unwrap();
    let authority = cloud.authority();
    let start = |socket| quic::endpoint(socket, &tls, &authority).unwrap();
    let killed = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let first = {
        let _in = killed.enter();
        start(socket)
    };
    let serving = killed.spawn(async move { (first.accept().await.unwrap().accept().await.unwrap(), first) });
    let config = transport::client_config(&client(Some(&identity), &authority)).unwrap();
    let endpoint = transport::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connection = endpoint.connect(config, address, "localhost").unwrap().await.unwrap();
    let known = serving.await.unwrap();
    // Whoever knows the connection is gone, and could not say so.
    std::thread::spawn(move || killed.shutdown_timeout(PATIENCE)).join().unwrap();
    drop(known);
    let socket = loop {
        match std::net::UdpSocket::bind(address) {
            Ok(socket) => break socket,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    let _next = start(socket);
    let end = tokio::time::timeout(PATIENCE, end(connection)).await.expect("it is said");
    assert!(matches!(end, End::Closed), "{end:?}");
}

#[tokio::test]
async fn a_session_on_quic_is_a_session() {
    let mut cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let (endpoint, connection) = cloud.connection(Some(&identity)).await;
    let mut edge = Wire::over_quic(connection, Side::Edge, ()).await.unwrap();
    edge.push(Frame { body: Some(hello("box-1", 0)) });
    let Body::Welcome(welcome) = body(&mut edge).await else { panic!("a Welcome comes first") };
    let opened = cloud.opened.recv().await.unwrap();
    assert_eq!(opened.epoch, welcome.epoch);
    // A session on a WebSocket takes over, as any newer one does.
    let (_edge, newer, _) = cloud.session(&identity, "box-1", welcome.epoch).await;
    assert!(newer.epoch > opened.epoch);
    let Body::Goodbye(said) = body(&mut edge).await else { panic!("the older session hears why") };
    assert_eq!(said.reason(), Reason::Superseded);
    edge.finish("over", None, PATIENCE).await;
    endpoint.wait_idle().await;

    let (_endpoint, connection) = cloud.connection(Some(&identity)).await;
    let mut edge = Wire::over_quic(connection, Side::Edge, ()).await.unwrap();
    edge.push(Frame { body: Some(hello("box-1", newer.epoch)) });
    assert!(matches!(body(&mut edge).await, Body::Welcome(_)));
    cloud.stop.cancel();
    let Body::Goodbye(said) = body(&mut edge).await else { panic!("every session hears goodbye") };
    assert_eq!(said.reason(), Reason::Shutdown);
    edge.finish("over", None, PATIENCE).await;
    tokio::time::timeout(PATIENCE, cloud.quic).await.expect("it ends").unwrap();
    // Whoever reads the socket ends after who served it.
    until("the port is given back", || std::net::UdpSocket::bind(cloud.address).is_ok()).await;
}

#[tokio::test]
async fn the_address_of_a_node_changes_and_its_session_goes_on() {
    let cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let near = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (address, moves) = (near.local_addr().unwrap(), Notify::new());
    let story = async {
        let (_endpoint, connection) = cloud.connection_at(Some(&identity), address).await;
        let mut edge = Wire::over_quic(connection, Side::Edge, ()).await.unwrap();
        edge.push(Frame { body: Some(hello("box-1", 0)) });
        assert!(matches!(body(&mut edge).await, Body::Welcome(_)));
        moves.notify_one();
        edge.push(Frame { body: Some(Body::Ping(Ping { token: 7 })) });
        loop {
            match body(&mut edge).await {
                Body::Pong(pong) => break assert_eq!(pong.token, 7),
                Body::Goodbye(said) => panic!("{said:?}"),
                _ => {}
            }
        }
    };
    tokio::select! {
        () = pass_on(near, cloud.address, &moves) => {}
        () = story => {}
    }
}

#[tokio::test]
async fn who_has_no_certificate_is_told_what_is_missing() {
    let cloud = Cloud::start().await;
    let (_endpoint, connection) = cloud.connection(None).await;
    let closed = tokio::time::timeout(PATIENCE, end(connection)).await.unwrap();
    assert!(closed.to_string().contains("`edgecore join` gets one"), "{closed}");
}

#[tokio::test]
async fn a_hello_that_is_none_ends_the_session_with_words() {
    let cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let (_endpoint, connection) = cloud.connection(Some(&identity)).await;
    let mut edge = Wire::over_quic(connection, Side::Edge, ()).await.unwrap();
    edge.push(Frame { body: Some(hello("box-2", 0)) });
    let Body::Goodbye(said) = body(&mut edge).await else { panic!("it is told") };
    assert_eq!(said.reason(), Reason::Refused);
    // What it is closed with says the same once more.
    match tokio::time::timeout(PATIENCE, edge.next(true)).await.unwrap() {
        Err(End::Closed) => {}
        Err(End::Told(again)) => assert_eq!(again, said.message),
        other => panic!("{other:?}"),
    }
}
