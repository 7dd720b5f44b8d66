//! What becomes of requests that are let through.

use super::*;

#[tokio::test]
async fn heads_arrive_without_credentials_and_as_they_were_else() {
    let bed = Bed::start().await;
    let _edge = bed.connect("box-1", 1);
    bed.allow("apiserver", "box-1", "get", "pods");
    bed.script.tokens.lock().unwrap().insert("t0ken".to_owned(), "apiserver".to_owned());
    let shows = Shows { token: Some("t0ken".to_owned()), ..Shows::default() };
    let mut client = bed.client(bed.port("box-1"), &shows).await;
    let request = Request::get("/pods?a=1&b=%2F&a=2")
        .header("x-stream-protocol-version", "v4")
        .header("x-stream-protocol-version", "v3")
        .header("connection", "x-private")
        .header("x-private", "secret")
        .header("cookie", "secret")
        .body(nothing());
    let said = whole(client.send(request.unwrap()).await).await.unwrap();
    let said: Value = serde_json::from_slice(&said).unwrap();
    assert_eq!(said["uri"], "/pods?a=1&b=%2F&a=2");
    let mut headers: Vec<[String; 2]> = serde_json::from_value(said["headers"].clone()).unwrap();
    headers.sort();
    let expected = [
        ["connection", "close"],
        ["host", "node"],
        ["x-stream-protocol-version", "v3"],
        ["x-stream-protocol-version", "v4"],
    ];
    assert_eq!(headers, expected.map(|pair| pair.map(str::to_owned)));
    // The connection is kept for the next one.
    assert_eq!(client.get("/pods").await.status(), 200);
}

#[tokio::test]
async fn bodies_go_both_ways_at_once() {
    let bed = Bed::start().await;
    let edge = bed.connect("box-1", 1);
    let admin = bed.admin("box-1");
    let mut client = bed.client(bed.port("box-1"), &admin).await;
    let sent: Vec<u8> = (0..500_000_u32).flat_map(u32::to_le_bytes).collect();
    let parts = sent.chunks(10_000).map(|part| Ok(Frame::data(Bytes::copy_from_slice(part)))).collect::<Vec<_>>();
    let body = StreamBody::new(futures_util::stream::iter(parts)).boxed();
    let request = Request::post("/run/ns/pod/c?cmd=cat").header("content-type", "x/y").body(body).unwrap();
    let response = client.send(request).await;
    assert_eq!((response.status().as_u16(), response.headers()["content-type"].to_str().unwrap()), (200, "x/y"));
    assert!(whole(response).await.unwrap() == sent);
    assert_eq!(client.get("/exec/none").await.status(), 502, "an upgrade that nobody asked for");
    until("no stream is left", || edge.open() == 0).await;
}

/// Sends the head of an upgrade; answers what comes until the end of the other head.
async fn upgrade(stream: &mut TlsStream<TcpStream>, path: &str, protocol: &str) -> String {
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\
         X-Stream-Protocol-Version: v4.channel.k8s.io\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut got = Vec::new();
    while !got.ends_with(b"\r\n\r\n") {
        got.push(tokio::time::timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap());
    }
    String::from_utf8(got).unwrap().to_lowercase()
}

#[tokio::test]
async fn an_upgrade_carries_bytes_until_both_halves_are_closed() {
    let bed = Bed::start().await;
    let edge = bed.connect("box-1", 1);
    let mut stream = bed.tls(bed.port("box-1"), &bed.admin("box-1")).await.unwrap();
    let head = upgrade(&mut stream, "/portForward/ns/pod", "bytes").await;
    assert!(head.starts_with("http/1.1 101 "), "{head}");
    for header in ["connection: upgrade", "upgrade: bytes", "x-stream-protocol-version: v4.channel.k8s.io"] {
        assert!(head.contains(header), "{header} is not in {head}");
    }
    let mut ready = [0; 5];
    stream.read_exact(&mut ready).await.unwrap();
    assert_eq!(&ready, b"ready");
    let sent = vec![7; 300_000];
    let (mut read, mut write) = tokio::io::split(stream);
    let mut got = Vec::new();
    let writes = async {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let both = async { tokio::join!(writes, read.read_to_end(&mut got)) };
    tokio::time::timeout(PATIENCE, both).await.unwrap().1.unwrap();
    assert!(got[..sent.len()] == sent && got[sent.len()..] == *b"and that was 300000");
    until("nothing is left", || edge.open() == 0 && bed.metrics.open() == 0).await;
}

/// What a client gets, behind what it had, at the end of streams that were cut off in the middle.
async fn cut_off<const N: usize>(path: &str, protocol: &str, had: &[u8; N]) -> Vec<u8> {
    let bed = Bed::start().await;
    let (edge, admin) = (bed.connect("box-1", 1), bed.admin("box-1"));
    let mut client = bed.tls(bed.port("box-1"), &admin).await.unwrap();
    upgrade(&mut client, path, protocol).await;
    let mut said = [0; N];
    client.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, had);
    edge.cut();
    let mut rest = Vec::new();
    tokio::time::timeout(PATIENCE, client.read_to_end(&mut rest)).await.expect("it ends").unwrap();
    rest
}

/// A piece of the frame, with a head of its own.
const SPDY: &[u8; 13] = b"\0\0\0\x03\0\0\0\x05hello";
const WEBSOCKET: &[u8; 8] = b"\x82\x06\x01hello";

#[tokio::test]
async fn a_command_that_breaks_off_is_no_success() {
    let rest = cut_off("/attach/ns/pod/c", "SPDY/3.1", SPDY).await;
    let (head, status) = rest.split_at(8);
    assert_eq!(head[..5], [0, 0, 0, 1, 1], "the error stream, and its end");
    let status: Value = serde_json::from_slice(status).unwrap();
    assert_eq!(status["status"], "Failure");
    assert!(status["message"].as_str().unwrap().contains("node box-1 broke off"), "{status}");

    let rest = cut_off("/attach/ns/pod/c", "websocket", WEBSOCKET).await;
    assert_eq!((rest[..2].to_vec(), rest[4]), (vec![0x82, 126], 3), "a message in the channel of errors");
    let length = usize::from(u16::from_be_bytes([rest[2], rest[3]]));
    let status: Value = serde_json::from_slice(&rest[5..4 + length]).unwrap();
    assert_eq!(status["status"], "Failure");
    assert_eq!(rest[4 + length], 0x88, "a Close frame");
}

#[tokio::test]
async fn forwarded_ports_that_break_off_are_told_to_be_gone() {
    assert_eq!(cut_off("/portForward/ns/pod", "SPDY/3.1", SPDY).await[..8], [0x80, 3, 0, 7, 0, 0, 0, 8], "GOAWAY");
    assert_eq!(cut_off("/portForward/ns/pod", "websocket", WEBSOCKET).await[0], 0x88, "a Close frame");
}

#[tokio::test]
async fn who_reads_slowly_gets_all_that_the_node_said() {
    let bed = Bed::start().await;
    let (edge, admin) = (bed.connect("box-1", 1), bed.admin("box-1"));
    let mut slow = bed.tls(bed.port("box-1"), &admin).await.unwrap();
    slow.write_all(b"GET /configz HTTP/1.1\r\nHost: node\r\n\r\n").await.unwrap();
    let (mut piece, mut got) = (vec![0; 64 << 10], 0);
    while got == 0 || edge.open() > 0 {
        got += slow.read(&mut piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    // The node has finished and let go; what it said is still on its way.
    assert!(got < MUCH, "nothing was left to be read");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    while got < MUCH {
        let read = slow.read(&mut piece).await.unwrap();
        assert!(read > 0, "cut after {got} bytes");
        got += read;
    }
    // The connection is good for another request.
    slow.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n").await.unwrap();
    tokio::time::timeout(PATIENCE, slow.read_u8()).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_node_sends_nobody_elsewhere() {
    let bed = Bed::start().await;
    let (_edge, admin) = (bed.connect("box-1", 1), bed.admin("box-1"));
    let (code, said) = bed.get(bed.port("box-1"), &admin, "/pprof").await;
    assert!(code == 502 && said.contains("somewhere else"), "{code}: {said}");
}

#[tokio::test]
async fn what_is_under_way_ends_with_the_session() {
    let bed = Bed::start().await;
    let (edge, admin) = (bed.connect("box-1", 1), bed.admin("box-1"));
    let port = bed.port("box-1");
    let mut logs = bed.client(port, &admin).await;
    let mut following = logs.get("/containerLogs/ns/pod/c?follow=true").await.into_body();
    assert_eq!(following.frame().await.unwrap().unwrap().into_data().unwrap(), "first line\n");
    let mut shell = bed.tls(port, &admin).await.unwrap();
    upgrade(&mut shell, "/portForward/ns/pod", "bytes").await;
    shell.read_exact(&mut [0; 5]).await.unwrap();
    let mut waiting = bed.client(port, &admin).await;
    let waiting = async { waiting.get("/stats/summary").await };
    let cut = async {
        until("all three are under way", || edge.open() == 2 + 1 || edge.open() == 2).await;
        edge.cut();
    };
    let (answer, ()) = tokio::join!(waiting, cut);
    let code = answer.status().as_u16();
    let said = String::from_utf8(whole(answer).await.unwrap()).unwrap();
    assert!(code == 503 && said.contains("box-1 is offline"), "{code}: {said}");
    let said = tokio::time::timeout(PATIENCE, following.frame()).await.expect("it ends at once");
    let said = String::from_utf8(said.unwrap().unwrap().into_data().unwrap().to_vec()).unwrap();
    assert!(said.starts_with("\nthe log broke off, node box-1: the session has ended"), "{said:?}");
    let broken = tokio::time::timeout(PATIENCE, following.frame()).await.expect("it ends at once");
    assert!(broken.unwrap().is_err(), "it is not taken for the end of the log");
    let ended = tokio::time::timeout(PATIENCE, shell.read_to_end(&mut Vec::new())).await.expect("it ends at once");
    drop(ended);
    drop((logs, shell));
    until("nothing is left", || bed.metrics.open() == 0).await;
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_up_the_node_and_nothing_else() {
    let bed = Bed::start().await;
    let (edge, admin) = (bed.connect("box-1", 1), bed.admin("box-1"));
    let port = bed.port("box-1");
    let ends: [&dyn Fn(); 2] = [&|| edge.let_go.notify_one(), &|| edge.cut()];
    for end in ends {
        let mut unread = bed.tls(port, &admin).await.unwrap();
        unread.write_all(b"GET /logs/syslog HTTP/1.1\r\nHost: node\r\n\r\n").await.unwrap();
        let produced = || edge.produced.load(Ordering::SeqCst);
        // What the sockets take, which is the kernel's to say; and then no more comes.
        let (first, mut before) = (produced(), produced());
        while produced() == first || produced() > before {
            before = produced();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(produced() - first < 16 << 20, "{} bytes wait somewhere", produced() - first);
        assert_eq!(bed.get(port, &admin, "/metrics").await.0, 200, "others get through");
        end();
        until("nothing is left", || bed.metrics.open() == 0).await;
        drop(unread);
    }
}

#[tokio::test]
async fn who_leaves_ends_what_was_under_way() {
    let bed = Bed::start().await;
    let (edge, admin) = (bed.connect("box-1", 1), bed.admin("box-1"));
    let port = bed.port("box-1");
    let mut logs = bed.client(port, &admin).await;
    let mut following = logs.get("/containerLogs/ns/pod/c?follow=true").await.into_body();
    following.frame().await.unwrap().unwrap();
    let mut shell = bed.tls(port, &admin).await.unwrap();
    upgrade(&mut shell, "/portForward/ns/pod", "bytes").await;
    let mut asking = bed.tls(port, &admin).await.unwrap();
    asking.write_all(b"GET /stats/summary HTTP/1.1\r\nHost: node\r\n\r\n").await.unwrap();
    until("both of them are under way", || edge.open() == 2).await;
    assert_eq!(bed.metrics.open(), 3);
    drop((following, logs, shell, asking));
    until("nothing is left", || edge.open() == 0 && bed.metrics.open() == 0).await;
    assert_eq!(bed.get(port, &admin, "/metrics").await.0, 200, "the session stands");
}

#[tokio::test]
async fn a_port_is_one_nodes_and_no_others() {
    let bed = Bed::start().await;
    let (one, _two) = (bed.connect("box-1", 1), bed.connect("box-2", 1));
    let (first, second) = (bed.port("box-1"), bed.port("box-2"));
    bed.admin("box-1");
    let admin = bed.admin("box-2");
    for (port, name) in [(first, "box-1"), (second, "box-2")] {
        assert_eq!(bed.get(port, &admin, "/metrics").await, (200, name.to_owned()));
    }
    // Away, it answers for itself.
    let shown = json!({"metadata": {}, "status": {
        "addresses": [{"type": "InternalIP", "address": bed.host}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": first}},
    }});
    bed.ports.seen(&node("box-1"), &Shown::of(&serde_json::from_value(shown).unwrap()));
    drop(one);
    bed.sessions.lock().unwrap().remove("box-1");
    bed.ports.disconnected(&node("box-1"), 1, "2026-01-01T00:00:00Z".parse().unwrap());
    let (code, said) = bed.get(first, &admin, "/metrics").await;
    assert!(code == 503 && said.contains("node box-1 is offline since 2026-01-01T00:00:00Z"), "{code}: {said}");
    assert_eq!(bed.get(first, &admin, "/containerLogs/ns/pod/c").await.0, 502);
    // And is back where it was.
    let _one = bed.connect("box-1", 2);
    assert_eq!(bed.get(first, &admin, "/metrics").await, (200, "box-1".to_owned()));
    // Deleted, it is nobody's, and then another's, which those who knew it do not get at.
    let mut kept = bed.client(first, &admin).await;
    kept.get("/metrics").await;
    bed.ports.gone(&node("box-1"));
    until("its connections are cut", || bed.metrics.open() == 0).await;
    assert!(kept.sender.is_closed() || kept.sender.send_request(Request::new(nothing())).await.is_err());
    let refused = || async { TcpStream::connect((bed.host.as_str(), first)).await.is_err() };
    while !refused().await {
        tokio::task::yield_now().await;
    }
    bed.sessions.lock().unwrap().remove("box-1");
    let _three = bed.connect("box-3", 1);
    assert_eq!(bed.port("box-3"), first);
    assert_eq!(bed.get(first, &admin, "/metrics").await.0, 403, "what was allowed on box-1 is not on box-3");
}

#[tokio::test]
async fn a_node_that_serves_nobody_says_so() {
    let bed = Bed::start().await;
    bed.ports.connected(&node("box-1"), 1, false);
    let edge = Edge::start("box-1", false);
    bed.sessions.lock().unwrap().insert("box-1".to_owned(), edge.streams.clone());
    let (code, said) = bed.get(bed.port("box-1"), &bed.admin("box-1"), "/metrics").await;
    assert!(code == 502 && said.contains("nobody serves streams of class ops"), "{code}: {said}");
    edge.cut();
    until("the session is over", || edge.streams.is_ended()).await;
    let (code, said) = bed.get(bed.port("box-1"), &bed.admin("box-1"), "/metrics").await;
    assert!(code == 503 && said.contains("box-1 is offline"), "{code}: {said}");
}

#[tokio::test]
async fn what_refuses_an_upgrade_is_no_yaml() {
    let bed = Bed::start().await;
    let (_edge, admin) = (bed.connect("box-1", 1), bed.admin("box-1"));
    let port = bed.port("box-1");
    let refused = async |shows: &Shows, path: &str| {
        let mut client = bed.client(port, shows).await;
        let request = Request::get(path).header("connection", "Upgrade").header("upgrade", "websocket");
        let response = client.send(request.body(nothing()).unwrap()).await;
        let code = response.status().as_u16();
        (code, String::from_utf8(whole(response).await.unwrap()).unwrap())
    };
    let words = "rpc error, code = Unknown desc = at 10:20 it,\nbroke,";
    assert_eq!(refused(&admin, "/debug/x").await, (500, words.to_owned()), "the node's own words");
    let asked_plainly = "rpc error: code = Unknown desc = at 10:20 it:\nbroke:";
    assert_eq!(bed.get(port, &admin, "/debug/x").await, (500, asked_plainly.to_owned()));
    bed.script.away.store(true, Ordering::SeqCst);
    let token = Shows { token: Some("t0ken".to_owned()), ..Shows::default() };
    let (code, said) = refused(&token, "/exec/ns/pod/c").await;
    assert!(code == 503 && said.contains("so it is not, ") && !said.contains(": "), "{said}");
}

#[tokio::test]
async fn who_is_known_may_be_idle_and_a_stranger_not() {
    let bed = Bed::with(Limits { patience: Duration::from_secs(2), of_node: 8, ..Limits::default() }).await;
    let (_edge, admin) = (bed.connect("box-1", 1), bed.admin("box-1"));
    let port = bed.port("box-1");
    let mut known = bed.client(port, &admin).await;
    whole(known.get("/metrics").await).await.unwrap();
    for _ in 0..2 {
        let mut stranger = bed.tls(port, &Shows::default()).await.unwrap();
        let said = tokio::time::timeout(PATIENCE, stranger.read(&mut [0])).await.expect("it is hung up on");
        assert_eq!(said.unwrap_or_default(), 0);
    }
    assert_eq!(whole(known.get("/metrics").await).await.unwrap(), b"box-1", "it stood all that time");
    // Where few places are left, who is idle gives way.
    let mut following = bed.client(port, &admin).await;
    let mut log = following.get("/containerLogs/ns/pod/c?follow=true").await.into_body();
    log.frame().await.unwrap().unwrap();
    let mut others = Vec::new();
    for _ in 0..4 {
        let mut client = bed.client(port, &admin).await;
        whole(client.get("/metrics").await).await.unwrap();
        others.push(client);
    }
    until("the idle ones are gone", || bed.metrics.open() < 6).await;
    assert_eq!(bed.get(port, &admin, "/metrics").await.0, 200);
    let next = tokio::time::timeout(Duration::from_millis(1), log.frame()).await;
    assert!(next.is_err(), "what is under way goes on");
}

#[tokio::test]
async fn a_node_has_so_many_connections_and_no_more() {
    let bed = Bed::with(Limits { of_node: 4, ..Limits::default() }).await;
    let (_edge, _other) = (bed.connect("box-1", 1), bed.connect("box-2", 1));
    bed.admin("box-1");
    let admin = bed.admin("box-2");
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut client = bed.client(bed.port("box-1"), &admin).await;
        assert_eq!(whole(client.get("/metrics").await).await.unwrap(), b"box-1");
        clients.push(client);
    }
    let (code, said) = bed.get(bed.port("box-1"), &admin, "/metrics").await;
    assert!(code == 503 && said.contains("too many connections"), "{code}: {said}");
    assert_eq!(bed.get(bed.port("box-2"), &admin, "/metrics").await.0, 200, "it is no other node's matter");
    clients.pop();
    until("one has left", || bed.metrics.open() == 3).await;
    assert_eq!(bed.get(bed.port("box-1"), &admin, "/metrics").await.0, 200);
}

#[tokio::test]
async fn everything_ends_when_cloudcore_goes_down() {
    let bed = Bed::start().await;
    let (edge, admin) = (bed.connect("box-1", 1), bed.admin("box-1"));
    let port = bed.port("box-1");
    let mut idle = bed.client(port, &admin).await;
    whole(idle.get("/metrics").await).await.unwrap();
    let mut logs = bed.client(port, &admin).await;
    let mut following = logs.get("/containerLogs/ns/pod/c").await.into_body();
    following.frame().await.unwrap().unwrap();
    bed.stop.cancel();
    // As the front does.
    edge.cut();
    tokio::time::timeout(PATIENCE, bed.serving).await.expect("it ends").unwrap();
    assert_eq!(bed.metrics.open(), 0);
    assert!(TcpStream::connect((bed.host.as_str(), port)).await.is_err());
}
