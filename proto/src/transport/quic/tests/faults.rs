//! Sockets that do not do what they are asked to, as the kernel has them do it.

use std::future::Future;
use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::sync::mpsc;

use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::geteuid;
use quinn_proto::EndpointConfig;

use super::*;
use crate::wire::{Ping, Upsert, frame::Body};

type TestWire = Wire<TcpStream, ()>;

/// Two sessions' ends, the cloud's first, on these sockets, and their endpoints.
async fn wires([cloud, edge]: [UdpSocket; 2]) -> ([TestWire; 2], [Endpoint; 2]) {
    let (server, client) = configs();
    let listening = Endpoint::new(EndpointConfig::default(), Some(server), cloud).unwrap();
    let dialling = Endpoint::new(EndpointConfig::default(), None, edge).unwrap();
    let connecting = dialling.connect(client, listening.local_addr().unwrap(), "localhost").unwrap();
    let accepting = async { listening.accept().await.unwrap().accept().await };
    let (edge, cloud) = timeout(PATIENCE, async { tokio::join!(connecting, accepting) }).await.expect("it stands");
    let cloud = Wire::over_quic(cloud.unwrap(), mux::Side::Cloud, ()).await.unwrap();
    let edge = Wire::over_quic(edge.unwrap(), mux::Side::Edge, ()).await.unwrap();
    ([cloud, edge], [listening, dialling])
}

fn sockets() -> [UdpSocket; 2] {
    [LOOPBACK, LOOPBACK].map(|address| UdpSocket::bind(address).unwrap())
}

/// What either says next, and which of them hears it.
async fn heard([cloud, edge]: &mut [TestWire; 2]) -> (usize, Body) {
    loop {
        let (by, event) = tokio::select! {
            event = cloud.next(true) => (0, event),
            event = edge.next(true) => (1, event),
        };
        match event.unwrap() {
            Event::Frame(frame) => return (by, frame.body.unwrap()),
            Event::Opened(_) | Event::Heard | Event::Drained => {}
        }
    }
}

/// Runs in a network namespace of its own, where only loopback is; not as anybody but root.
fn in_a_namespace<F: Future<Output = ()>>(name: &str, tell: impl FnOnce() -> F + Send + 'static) {
    if !geteuid().is_root() {
        eprintln!("{name} needs root and was not run");
        return;
    }
    let (done, end) = mpsc::channel();
    // The namespace is that of the thread, and of what it starts.
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        run("ip link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(tell());
        done.send(()).unwrap();
    });
    let ended = end.recv_timeout(3 * PATIENCE);
    assert!(ended.is_ok() && thread.join().is_ok(), "{ended:?}");
}

fn run(line: &str) {
    let (program, arguments) = line.split_once(' ').unwrap();
    let output = Command::new(program).args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_socket_that_is_full_is_waited_for() {
    in_a_namespace("a_socket_that_is_full_is_waited_for", || async {
        // A line whose queue is longer than what the sockets hold.
        run("tc qdisc add dev lo root tbf rate 8mbit burst 4000 limit 1000000");
        let sockets = sockets();
        for socket in &sockets {
            // The system has a least of its own, some datagrams.
            setsockopt(socket, sockopt::SndBuf, &1).unwrap();
        }
        let probes = sockets.each_ref().map(|socket| socket.try_clone().unwrap());
        let (mut wires, _endpoints) = wires(sockets).await;
        for wire in &mut wires {
            for seq in 0..64 {
                let upsert = Upsert { seq, full: vec![7; 4000].into(), ..Upsert::default() };
                wire.push(Frame { body: Some(Body::Upsert(upsert)) });
            }
        }
        let (mut next, mut was_full) = ([0, 0], [false, false]);
        while next != [64, 64] {
            let (by, body) = timeout(PATIENCE, heard(&mut wires)).await.expect("it goes on");
            assert!(matches!(body, Body::Upsert(upsert) if upsert.seq == next[by]));
            next[by] += 1;
            for (probe, was_full) in probes.iter().zip(&mut was_full) {
                // Nobody is there.
                let sent = probe.send_to(&[], (LOOPBACK.ip(), 9));
                *was_full |= sent.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
            }
        }
        assert_eq!(was_full, [true, true], "the line was never full, the test tests nothing");
    });
}

#[test]
fn what_the_system_does_not_send_is_lost_on_its_way_and_no_more() {
    in_a_namespace("what_the_system_does_not_send_is_lost_on_its_way_and_no_more", || async {
        // Others come before what is local.
        run("ip rule add pref 100 lookup local");
        run("ip rule del pref 0");
        // EACCES, ENETUNREACH, EINVAL.
        let refusals = ["prohibit", "unreachable", "blackhole"];
        let refuse = |how: &str| run(&format!("ip rule add pref 10 ipproto udp {how}"));
        let allow = || run("ip rule del pref 10");
        let a_while = Duration::from_millis(200);
        for (token, how) in (1..).zip(refusals) {
            refuse(how);
            let standing = wires(sockets());
            tokio::pin!(standing);
            assert!(timeout(a_while, &mut standing).await.is_err(), "{how} refuses nothing");
            allow();
            let (mut wires, _endpoints) = standing.await;
            for from in [0, 1] {
                refuse(how);
                wires[from].push(Frame { body: Some(Body::Ping(Ping { token })) });
                assert!(timeout(a_while, heard(&mut wires)).await.is_err(), "{how} refuses nothing");
                allow();
                let (by, body) = timeout(PATIENCE, heard(&mut wires)).await.expect("it comes");
                assert!(by != from && matches!(body, Body::Ping(ping) if ping.token == token));
            }
        }
    });
}

#[tokio::test]
async fn an_error_that_one_peer_makes_is_nobody_elses() {
    let sockets = sockets();
    for socket in &sockets {
        // As no socket of ours has it: that nobody listens is said to whoever reads next.
        setsockopt(socket, sockopt::Ipv4RecvErr, &true).unwrap();
    }
    let nobody = UdpSocket::bind(LOOPBACK).unwrap().local_addr().unwrap();
    let (mut wires, endpoints) = wires(sockets).await;
    let (_, client) = configs();
    for token in 1..=20 {
        for (from, endpoint) in [1, 0].into_iter().zip(&endpoints) {
            let doomed = endpoint.connect(client.clone(), nobody, "localhost").unwrap();
            assert!(timeout(Duration::from_millis(10), doomed).await.is_err(), "nobody is there");
            wires[from].push(Frame { body: Some(Body::Ping(Ping { token })) });
            let (by, body) = timeout(PATIENCE, heard(&mut wires)).await.expect("it comes");
            assert!(by != from && matches!(body, Body::Ping(ping) if ping.token == token));
        }
    }
}

#[tokio::test]
async fn a_socket_that_is_broken_ends_what_is_on_it() {
    let sockets = sockets();
    let broken = sockets[0].as_raw_fd();
    // What comes for it still wakes its reader.
    let _alive = sockets[0].try_clone().unwrap();
    let (mut wires, [listening, _dialling]) = wires(sockets).await;
    let null = std::fs::File::open("/dev/null").unwrap();
    // SAFETY: the descriptor stays open and its owner's, who is told that it is no socket with every call.
    #[expect(unsafe_code, reason = "nothing else breaks a socket")]
    let descriptor = unsafe { libc::dup2(null.as_raw_fd(), broken) };
    assert_eq!(descriptor, broken);
    wires[1].push(Frame { body: Some(Body::Ping(Ping { token: 1 })) });
    let [cloud, edge] = &mut wires;
    let end = async {
        loop {
            tokio::select! {
                event = cloud.next(true) => if let Err(end) = event { break end },
                _ = edge.next(true) => {}
            }
        }
    };
    let end = timeout(PATIENCE, end).await.expect("it hears of it");
    let End::Quic(cause) = &end else { panic!("{end:?}") };
    assert!(cause.to_string().contains("the socket cannot be read"), "{cause}");
    assert!(listening.accept().await.is_none());
    timeout(PATIENCE, listening.wait_idle()).await.expect("no connection is left");
}
