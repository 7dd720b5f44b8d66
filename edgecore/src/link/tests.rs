//! The link against a cloud of the test's own: real sockets, real TLS with client certificates, the real hub machine or a script.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::{SinkExt as _, StreamExt as _};
use prost::Message as _;
use skerry_proto::mux::{Class, Side};
use skerry_proto::streams::{Carrier, Received, Stream};
use skerry_proto::sync::{COLLECTIONS, Collection, Hub, HubInput, HubOutput, Object, Report, ReportKind};
use skerry_proto::wire::{self, Frame, frame::Body};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use super::*;
use crate::identity::tests::{Authority, identity_of};
use crate::supervise;

mod reconnects;
mod transports;

/// The cloud's end of a connection, which breaks when it has sent as much as it may.
struct Line {
    stream: TcpStream,
    /// Bytes that it may send yet.
    left: usize,
}

impl AsyncRead for Line {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, to)
    }
}

impl AsyncWrite for Line {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.left == 0 {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let count = bytes.len().min(self.left);
        let sent = ready!(Pin::new(&mut self.stream).poll_write(context, &bytes[..count]))?;
        self.left -= sent;
        Poll::Ready(Ok(sent))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The cloud's end of a session.
struct Peer {
    socket: WebSocketStream<TlsStream<Line>>,
    carrier: Carrier,
}

impl Peer {
    /// Sends what waits.
    async fn flush(&mut self) -> Result<(), WsError> {
        while let Some(frame) = poll_fn(|context| match self.carrier.poll_frame(context) {
            Poll::Ready(frame) => Poll::Ready(Some(frame)),
            Poll::Pending => Poll::Ready(None),
        })
        .await
        {
            self.socket.send(Message::Binary(frame.encode_to_vec().into())).await?;
        }
        Ok(())
    }

    /// It breaks when so many bytes more have been sent.
    fn break_after(&mut self, bytes: usize) {
        self.socket.get_mut().get_mut().0.left = bytes;
    }

    /// What comes next; `None` at the end.
    async fn next(&mut self) -> Option<Received> {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Binary(bytes))) => {
                    return Some(self.carrier.receive(Frame::decode(bytes).unwrap()).unwrap());
                }
                Some(Ok(Message::Close(_))) | Some(Err(_)) | None => return None,
                Some(Ok(_)) => {}
            }
        }
    }

    /// Carries streams both ways until the connection ends; what the edge opens is echoed.
    async fn carry(&mut self) {
        let mut echoes = tokio::task::JoinSet::new();
        loop {
            self.flush().await.unwrap();
            let received = tokio::select! {
                frame = poll_fn(|context| self.carrier.poll_frame(context)) => {
                    self.socket.send(Message::Binary(frame.encode_to_vec().into())).await.unwrap();
                    continue;
                }
                message = self.socket.next() => match message {
                    Some(Ok(Message::Binary(bytes))) => self.carrier.receive(Frame::decode(bytes).unwrap()).unwrap(),
                    _ => return,
                },
            };
            if let Received::Opened(incoming) = received {
                echoes.spawn(echo(incoming.stream));
            }
        }
    }
}

/// A service for tests: sends back what comes.
async fn echo(stream: Stream) {
    let (mut read, mut write) = tokio::io::split(stream);
    if tokio::io::copy(&mut read, &mut write).await.is_ok() {
        write.shutdown().await.unwrap();
    }
}

/// Writes all of this, and reads to the end.
async fn exchange(stream: Stream, sent: &[u8]) -> io::Result<Vec<u8>> {
    let (mut read, mut write) = tokio::io::split(stream);
    let mut got = Vec::new();
    let writes = async { write.write_all(sent).await.and(write.shutdown().await) };
    let (wrote, read) = tokio::join!(writes, read.read_to_end(&mut got));
    wrote.and(read).map(|_| got)
}

struct Bed {
    store: Store,
    state: watch::Receiver<LinkState>,
    streams: Streams,
    /// Says that the network may be back.
    network: watch::Sender<u64>,
    identity: watch::Sender<Arc<Identity>>,
    /// Identities that the cloud took for expired.
    expired: watch::Receiver<Option<Arc<Identity>>>,
    /// Streams of class ops that the cloud opens.
    incoming: mpsc::Receiver<Incoming>,
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    shutdown: CancellationToken,
    link: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Bed {
    async fn new() -> Self {
        Self::with(Transport::WebSocket).await
    }

    async fn with(transport: Transport) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let identity = identity_of(&authority, "box", dir.path());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        for ca in identity.authorities() {
            roots.add(ca).unwrap();
        }
        let clients =
            rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .build()
                .unwrap();
        let (certificate, key) = authority.server("localhost");
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let listener = TcpListener::bind("localhost:0").await.unwrap();
        let server = Server { host: "localhost".to_owned(), port: listener.local_addr().unwrap().port() };
        let store = Store::open(dir.path(), Timestamp::UNIX_EPOCH).unwrap();
        let (sender, state) = watch::channel(LinkState::Connecting { attempt: 1, last_error: None });
        let shutdown = CancellationToken::new();
        let mut services = Services::default();
        let incoming = services.serve(Class::Ops, 4);
        let (opener, streams) = watch::channel(None);
        let (network, network_seen) = watch::channel(0);
        let (identity, identity_seen) = watch::channel(Arc::new(identity));
        let (expired, expired_seen) = watch::channel(None);
        let link = Link {
            node: "box".to_owned(),
            server,
            transport,
            store: store.clone(),
            identity: identity_seen,
            expired,
            wanted: broadcast::channel(1).0,
            services,
            network: network_seen,
            streams: opener,
            state: sender,
            shutdown: shutdown.clone(),
        };
        let link = supervise::spawn("link", link.run());
        Self {
            store,
            state,
            streams: Streams::new(streams),
            network,
            identity,
            expired: expired_seen,
            incoming,
            listener,
            tls: Arc::new(config),
            shutdown,
            link,
            _dir: dir,
        }
    }

    async fn accept(&self) -> Peer {
        loop {
            let (stream, _) = self.listener.accept().await.unwrap();
            // The link may have been turned away by a test before.
            if let Some(peer) = self.upgrade(stream).await {
                return peer;
            }
        }
    }

    /// TLS on a connection that may send so many bytes.
    async fn tls(&self, stream: TcpStream, left: usize) -> Option<TlsStream<Line>> {
        // As cloudcore does. Or each record waits for an acknowledgement that the other side keeps back for 40 ms.
        stream.set_nodelay(true).unwrap();
        tokio_rustls::TlsAcceptor::from(Arc::clone(&self.tls)).accept(Line { stream, left }).await.ok()
    }

    async fn upgrade(&self, stream: TcpStream) -> Option<Peer> {
        let stream = self.tls(stream, usize::MAX).await?;
        let socket = tokio_tungstenite::accept_async(stream).await.ok()?;
        Some(Peer { socket, carrier: Carrier::new(Side::Cloud) })
    }

    /// The link's next connection. The network is back until it comes, so that pauses between attempts are short.
    async fn dialled(&self) -> TcpStream {
        loop {
            tokio::select! {
                accepted = self.listener.accept() => return accepted.unwrap().0,
                () = tokio::time::sleep(Duration::from_millis(1)) => self.network.send_modify(|news| *news += 1),
            }
        }
    }

    async fn state(&mut self, wanted: impl FnMut(&LinkState) -> bool) -> LinkState {
        self.state.wait_for(wanted).await.unwrap().clone()
    }

    async fn end(self) {
        self.shutdown.cancel();
        self.link.await.unwrap();
    }
}

async fn receive(peer: &mut Peer) -> Option<Frame> {
    loop {
        if let Received::Control(frame) = peer.next().await? {
            return Some(frame);
        }
    }
}

async fn send(peer: &mut Peer, body: Body) {
    peer.carrier.control(Frame { body: Some(body) });
    peer.flush().await.unwrap();
}

async fn hello(peer: &mut Peer) -> wire::Hello {
    match receive(peer).await.unwrap().body {
        Some(Body::Hello(hello)) => hello,
        other => panic!("not a hello: {other:?}"),
    }
}

fn object(collection: Collection, name: &str, content: &str) -> Object {
    let json = format!(r#"{{"name":"{name}","data":"{content}"}}"#);
    Object::new(collection, format!("default/{name}"), format!("uid-{name}"), json.as_bytes())
}

/// A hub that wants these objects, driven until it is in sync; answers the reports it got.
async fn serve(peer: &mut Peer, wanted: &[Object], reports: usize) -> (u64, Vec<Report>) {
    let hello = hello(peer).await;
    welcome(peer, &hello, wanted, reports).await
}

/// The same, after the Hello.
async fn welcome(peer: &mut Peer, hello: &wire::Hello, wanted: &[Object], reports: usize) -> (u64, Vec<Report>) {
    until_broken(peer, hello, wanted, reports).await.expect("the session stands")
}

/// The same; `None` if the connection breaks before.
async fn until_broken(
    peer: &mut Peer,
    hello: &wire::Hello,
    wanted: &[Object],
    reports: usize,
) -> Option<(u64, Vec<Report>)> {
    let epoch = hello.last_epoch + 1;
    let server_time = u64::try_from(clock::wall().as_millisecond()).unwrap();
    let (mut hub, mut outputs) = Hub::new(clock::monotonic(), hello, epoch, server_time, "test");
    for object in wanted {
        outputs.extend(hub.step(clock::monotonic(), HubInput::Desired(object.clone().into())));
    }
    for collection in COLLECTIONS {
        outputs.extend(hub.step(clock::monotonic(), HubInput::Complete(collection)));
    }
    let (mut in_sync, mut got) = (false, Vec::new());
    loop {
        for output in std::mem::take(&mut outputs) {
            match output {
                HubOutput::Send(frame) => {
                    peer.carrier.control(frame);
                    peer.flush().await.ok()?;
                }
                HubOutput::InSync => in_sync = true,
                HubOutput::Report(report) => {
                    outputs.extend(
                        hub.step(clock::monotonic(), HubInput::Reported { id: report.id, refused: String::new() }),
                    );
                    got.push(report);
                }
                HubOutput::Inventory(collection, held) => {
                    for object in wanted.iter().filter(|object| object.collection == collection) {
                        outputs.extend(hub.step(clock::monotonic(), HubInput::Desired(object.clone().into())));
                    }
                    drop(held);
                }
                HubOutput::Close(goodbye) => panic!("the hub ends the session: {goodbye:?}"),
            }
        }
        if outputs.is_empty() {
            if in_sync && got.len() >= reports {
                return Some((epoch, got));
            }
            let frame = receive(peer).await?;
            outputs = hub.step(clock::monotonic(), HubInput::Frame(frame));
        }
    }
}

async fn eventually<F: Future<Output = bool>>(mut holds: impl FnMut() -> F) {
    while !holds().await {
        tokio::task::yield_now().await;
    }
}

fn report(name: &str) -> Report {
    let payload = Bytes::from(format!(r#"{{"status":"{name}"}}"#));
    Report {
        id: 0,
        kind: ReportKind::PodStatus,
        namespace: "default".to_owned(),
        name: name.to_owned(),
        uid: format!("uid-{name}"),
        payload,
    }
}

#[tokio::test]
async fn events_that_the_cloud_gives_back_hold_nothing_up() {
    const EVENTS: usize = 300;
    let bed = Bed::new().await;
    // Together more than the machine is given at once.
    let event = |n: usize| Report {
        kind: ReportKind::Event,
        payload: vec![b'x'; 1 << 10].into(),
        ..report(&format!("event-{n}"))
    };
    let events = (0..EVENTS).map(|n| bed.store.report(event(n)));
    futures_util::future::try_join_all(events).await.unwrap();
    let mut peer = bed.accept().await;
    let hello = hello(&mut peer).await;
    let epoch = hello.last_epoch + 1;
    send(&mut peer, Body::Welcome(wire::Welcome { protocol: 1, epoch, ..wire::Welcome::default() })).await;
    bed.store.report(report("web")).await.unwrap();
    let (mut given_back, mut status_at) = (0, None);
    while given_back < EVENTS {
        let Body::Report(report) = receive(&mut peer).await.unwrap().body.unwrap() else { continue };
        if report.kind() == ReportKind::Event {
            given_back += 1;
            let later = wire::ReportLater { id: report.id, after_ms: 600_000 };
            send(&mut peer, Body::ReportLater(later)).await;
        } else {
            status_at = Some(given_back);
        }
    }
    let status_at = status_at.expect("no status came");
    assert!(status_at < EVENTS / 2, "the status came behind {status_at} events");
    bed.end().await;
}

#[tokio::test]
async fn what_the_cloud_wants_reaches_the_disk_and_reports_reach_the_cloud() {
    let mut bed = Bed::new().await;
    bed.store.report(report("before")).await.unwrap();
    let wanted: Vec<Object> = (0..200)
        .map(|n| {
            object(
                if n % 2 == 0 { Collection::Pods } else { Collection::ConfigMaps },
                &format!("o{n}"),
                &"x".repeat(n * 100),
            )
        })
        .collect();
    let mut peer = bed.accept().await;
    let (epoch, reports) = serve(&mut peer, &wanted, 1).await;
    assert_eq!(reports[0].name, "before");
    assert!(
        matches!(bed.state(|state| matches!(state, LinkState::Online { .. })).await, LinkState::Online { epoch: shown, .. } if shown == epoch)
    );
    assert_eq!(bed.store.index().await.unwrap().len(), 200);
    bed.store.pods_known().wait_for(|known| *known).await.unwrap();
    let store = bed.store.clone();
    drop(peer);
    // Nothing changed but one object and one report: the next session knows.
    bed.store.report(report("between")).await.unwrap();
    let mut peer = bed.accept().await;
    let (next, reports) = serve(&mut peer, &wanted[1..], 1).await;
    assert!(next > epoch);
    assert_eq!(reports.iter().map(|report| report.name.as_str()).collect::<Vec<_>>(), ["between"]);
    assert_eq!(store.index().await.unwrap().len(), 199);
    eventually(|| async { store.stats().await.unwrap().pending == 0 }).await;
    assert_eq!(store.epoch().await.unwrap(), next);
    let (last, ()) = tokio::join!(
        async {
            while let Some(frame) = receive(&mut peer).await {
                if let Some(Body::Goodbye(goodbye)) = frame.body {
                    return Some(goodbye.reason());
                }
            }
            None
        },
        bed.end()
    );
    assert_eq!(last, Some(Reason::Shutdown));
}

#[tokio::test]
async fn a_deleted_node_is_wound_down_and_comes_back_when_the_cloud_takes_it() {
    let mut bed = Bed::new().await;
    let mut peer = bed.accept().await;
    serve(&mut peer, &[object(Collection::Pods, "p", "1")], 0).await;
    let mut changes = bed.store.changes();
    let goodbye =
        wire::Goodbye { reason: Reason::NodeDeleted.into(), message: "deleted by hand".to_owned(), retry_after_ms: 0 };
    send(&mut peer, Body::Goodbye(goodbye)).await;
    let state = bed.state(|state| matches!(state, LinkState::Deleted { .. })).await;
    assert_eq!(state, LinkState::Deleted { message: "deleted by hand".to_owned() });
    assert_eq!(changes.recv().await.unwrap().uid, "uid-p");
    assert!(bed.store.index().await.unwrap().is_empty());
    assert!(*bed.store.pods_known().borrow());
    assert_eq!(bed.store.notes(NODE_NOTES).await.unwrap().len(), 1);
    bed.end().await;
}

#[tokio::test]
async fn what_is_no_frame_ends_the_session_and_the_next_one_stands() {
    let mut bed = Bed::new().await;
    let malformed = [
        Message::Binary(Bytes::from_static(b"\xff\xff\xff")),
        Message::Text("hello".into()),
        Message::Binary(vec![0; 5 << 20].into()),
    ];
    for (attempt, message) in malformed.into_iter().enumerate() {
        let mut peer = bed.accept().await;
        let hello = hello(&mut peer).await;
        send(
            &mut peer,
            Body::Welcome(wire::Welcome { protocol: 1, epoch: hello.last_epoch + 1, ..wire::Welcome::default() }),
        )
        .await;
        bed.state(|state| matches!(state, LinkState::Online { .. })).await;
        // A message that is too large is refused while it is still being sent.
        let _ = peer.socket.send(message).await;
        while receive(&mut peer).await.is_some() {}
        bed.state(|state| matches!(state, LinkState::Offline { .. })).await;
        assert!(attempt < 3);
    }
    let mut peer = bed.accept().await;
    serve(&mut peer, &[object(Collection::Pods, "p", "1")], 0).await;
    assert_eq!(bed.store.index().await.unwrap().len(), 1);
    bed.end().await;
}

#[tokio::test]
async fn a_row_lost_to_damage_comes_again() {
    let bed = Bed::new().await;
    let wanted = [object(Collection::Pods, "p", "1"), object(Collection::Pods, "q", "1")];
    let mut peer = bed.accept().await;
    let first = hello(&mut peer).await;
    welcome(&mut peer, &first, &wanted, 0).await;
    let vandal = rusqlite::Connection::open(bed._dir.path().join(store::FILE)).unwrap();
    vandal.execute("UPDATE objects SET version = version + 1 WHERE uid = 'uid-p'", []).unwrap();
    assert_eq!(bed.store.list(Collection::Pods).await.unwrap().len(), 1);
    assert!(receive(&mut peer).await.is_none(), "the link starts over");
    let mut peer = bed.accept().await;
    let second = hello(&mut peer).await;
    assert_eq!((&second.run_id, &second.store_id), (&first.run_id, &first.store_id), "the same start of the agent");
    welcome(&mut peer, &second, &wanted, 0).await;
    assert_eq!(bed.store.list(Collection::Pods).await.unwrap().len(), 2);
    bed.end().await;
}

#[tokio::test]
async fn a_refused_upgrade_is_shown_with_the_clouds_words() {
    let mut bed = Bed::new().await;
    let (stream, _) = bed.listener.accept().await.unwrap();
    let mut stream = tokio_rustls::TlsAcceptor::from(Arc::clone(&bed.tls)).accept(stream).await.unwrap();
    let mut request = [0; 4096];
    let read = stream.read(&mut request).await.unwrap();
    assert!(request[..read].starts_with(b"GET /v1/session HTTP/1.1\r\n"));
    let body = r#"{"reason":"overloaded","message":"too many sessions; wait"}"#;
    stream
        .write_all(format!("HTTP/1.1 503 X\r\ncontent-length: {}\r\n\r\n{body}", body.len()).as_bytes())
        .await
        .unwrap();
    let state = bed.state(|state| matches!(state, LinkState::Connecting { last_error: Some(_), .. })).await;
    assert!(format!("{state:?}").contains("too many sessions; wait"), "{state:?}");
    bed.end().await;
}

#[tokio::test]
async fn streams_go_both_ways_and_end_with_the_session() {
    let mut bed = Bed::new().await;
    assert!(matches!(bed.streams.open(Class::Api, Bytes::new()), Err(OpenError::Offline)));
    let mut peer = bed.accept().await;
    let (epoch, _) = serve(&mut peer, &[object(Collection::Pods, "p", "1")], 0).await;
    bed.state(|state| matches!(state, LinkState::Online { .. })).await;
    let cloud = peer.carrier.streams();
    let sent: Vec<u8> = (0..600_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut unread = {
        let (incoming, streams, sent) = (&mut bed.incoming, &bed.streams, &sent);
        let story = async {
            let ours = async {
                let stream = streams.open(Class::Api, Bytes::from_static(b"GET /")).unwrap();
                assert!(exchange(stream, sent).await.unwrap() == *sent);
            };
            let theirs = async {
                let stream = cloud.open(Class::Ops, Bytes::from_static(b"logs")).unwrap();
                let served = incoming.recv().await.unwrap();
                assert_eq!((served.class, &served.header[..]), (Class::Ops, &b"logs"[..]));
                let (got, ()) = tokio::join!(exchange(stream, sent), echo(served.stream));
                assert!(got.unwrap() == *sent);
            };
            let unserved = async {
                let mut stream = cloud.open(Class::Device, Bytes::new()).unwrap();
                let error = stream.read(&mut [0]).await.unwrap_err();
                assert!(error.to_string().contains("nobody serves streams of class device"), "{error}");
            };
            tokio::join!(ours, theirs, unserved);
            streams.open(Class::Api, Bytes::new()).unwrap()
        };
        tokio::select! { unread = story => unread, () = peer.carry() => panic!("the link ended the session") }
    };
    assert!(
        matches!(&*bed.state.borrow(), LinkState::Online { epoch: shown, .. } if *shown == epoch),
        "it is still the same session"
    );
    drop(peer);
    assert_eq!(unread.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    assert!(matches!(bed.streams.open(Class::Api, Bytes::new()), Err(OpenError::Offline)));
    bed.end().await;
}

#[tokio::test]
async fn a_peer_that_breaks_the_rules_of_streams_is_told() {
    let bed = Bed::new().await;
    let mut peer = bed.accept().await;
    serve(&mut peer, &[object(Collection::Pods, "p", "1")], 0).await;
    let data = wire::StreamData { id: 4, data: Bytes::from_static(b"x"), fin: false };
    let frame = Frame { body: Some(Body::StreamData(data)) };
    peer.socket.send(Message::Binary(frame.encode_to_vec().into())).await.unwrap();
    let goodbye = loop {
        if let Some(Body::Goodbye(goodbye)) = receive(&mut peer).await.expect("a Goodbye comes").body {
            break goodbye;
        }
    };
    assert!(goodbye.reason() == Reason::Protocol && goodbye.message.contains("never opened"), "{goodbye:?}");
    bed.end().await;
}

#[test]
fn a_session_that_stood_starts_the_back_off_over() {
    let new = || Backoff::new(FIRST_RETRY, LAST_RETRY, 7);
    let own = |wait| match wait {
        Wait::Own(wait) => wait,
        Wait::Told(wait) => panic!("nobody said {wait:?}"),
    };
    let mut backoff = new();
    for _ in 0..20 {
        own(after_session(&mut backoff, Duration::ZERO, None));
    }
    // Sessions that break off soon are failures like others: half a minute at most, a quarter at least.
    let soon = own(after_session(&mut backoff, STEADY - Duration::from_millis(1), None));
    assert!((LAST_RETRY / 2..=LAST_RETRY).contains(&soon), "{soon:?}");
    let steady = own(after_session(&mut backoff, STEADY, None));
    assert!((FIRST_RETRY / 2..=FIRST_RETRY).contains(&steady), "{steady:?}");
    let again = own(after_session(&mut backoff, Duration::ZERO, None));
    assert!((FIRST_RETRY..=2 * FIRST_RETRY).contains(&again), "{again:?}");
    // What the cloud says goes, within bounds, and nothing ends it before; not all that were told the same come at once.
    let told = Duration::from_secs(77);
    for (says, least) in [(told, told), (100 * told, MAX_TOLD)] {
        let Wait::Told(wait) = after_session(&mut backoff, STEADY, Some(says)) else { panic!("it was told") };
        assert!((least + FIRST_RETRY / 2..=least + FIRST_RETRY).contains(&wait), "{wait:?}");
    }
}

#[tokio::test]
async fn news_of_the_network_end_the_wait_and_start_the_back_off_over() {
    let bed = Bed::new().await;
    for _ in 0..3 {
        drop(bed.listener.accept().await.unwrap());
    }
    // Now it rests for two seconds at least.
    let quiet = tokio::time::timeout(Duration::from_secs(1), bed.listener.accept()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    bed.network.send_modify(|count| *count += 1);
    let (at_once, soon) = (Duration::from_millis(900), Duration::from_millis(1900));
    drop(tokio::time::timeout(at_once, bed.listener.accept()).await.expect("it tries at once").unwrap());
    drop(tokio::time::timeout(soon, bed.listener.accept()).await.expect("the first step is short").unwrap());
    bed.end().await;
}

#[tokio::test]
async fn news_of_the_network_start_dialling_over() {
    let bed = Bed::new().await;
    // TCP stands, TLS does not come: as on a path that broke meanwhile.
    let _stuck = bed.listener.accept().await.unwrap();
    bed.network.send_modify(|count| *count += 1);
    let soon = dial::CONNECT_TIMEOUT / 2;
    let _again = tokio::time::timeout(soon, bed.listener.accept()).await.expect("it dials anew").unwrap();
    // Once is enough: news that do not end must not keep it from ever connecting.
    bed.network.send_modify(|count| *count += 1);
    let quiet = tokio::time::timeout(Duration::from_secs(1), bed.listener.accept()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    bed.end().await;
}

#[tokio::test]
async fn news_of_the_network_have_a_standing_session_asked_whether_it_lives() {
    let mut bed = Bed::new().await;
    let mut peer = bed.accept().await;
    serve(&mut peer, &[], 0).await;
    bed.state(|state| matches!(state, LinkState::Online { .. })).await;
    bed.network.send_modify(|count| *count += 1);
    let asked = async {
        loop {
            if let Some(Body::Ping(ping)) = receive(&mut peer).await.expect("the session stands").body {
                break ping;
            }
        }
    };
    // Of its own accord it would ask much later.
    tokio::time::timeout(skerry_proto::sync::PING_AFTER / 2, asked).await.expect("it asks at once");
    // Nobody answers.
    let state = tokio::time::timeout(
        skerry_proto::sync::PING_AFTER,
        bed.state(|state| matches!(state, LinkState::Offline { .. })),
    );
    let state = state.await.expect("it does not wait as long as it would without news");
    assert!(format!("{state:?}").contains("nothing was heard"), "{state:?}");
    bed.end().await;
}

#[tokio::test]
async fn an_identity_that_expired_is_renewed_and_used_at_once() {
    let mut bed = Bed::new().await;
    let old = Arc::clone(&bed.identity.borrow());
    for _ in 0..4 {
        let mut peer = bed.accept().await;
        hello(&mut peer).await;
        let message = "the certificate of the node box expired at noon; edgecore renews it".to_owned();
        let goodbye = wire::Goodbye { reason: Reason::CertificateExpired.into(), message, retry_after_ms: 0 };
        send(&mut peer, Body::Goodbye(goodbye)).await;
        let told = bed.expired.wait_for(Option::is_some).await.unwrap().clone();
        assert!(told.is_some_and(|told| Arc::ptr_eq(&told, &old)));
    }
    bed.state(
        |state| matches!(state, LinkState::Connecting { last_error: Some(cause), .. } if cause.contains("renews it")),
    )
    .await;
    let quiet = tokio::time::timeout(Duration::from_secs(1), bed.listener.accept()).await;
    assert!(quiet.is_err(), "now it rests for two seconds at least: {quiet:?}");
    bed.identity.send_replace(Arc::new(old.as_ref().clone()));
    let accepted = tokio::time::timeout(Duration::from_millis(900), bed.listener.accept()).await;
    assert!(accepted.is_ok(), "the new one is used at once");
    drop(accepted);
    bed.end().await;
}
