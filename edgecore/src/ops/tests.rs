//! The endpoint over a pipe and over the streams of a link, with a runtime and a streaming server that do as they are told.

use bytes::Bytes;
use http_body_util::Empty;
use hyper::client::conn::http1 as client;
use serde_json::{Value, json};
use skerry_proto::cri;
use skerry_proto::mux::Class;
use skerry_proto::streams::Streams;
use skerry_proto::streams::double::Line;
use skerry_proto::sync::{Collection, Object, Op};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::*;
use crate::control::POD_STATUS_NOTES;
use crate::kubelet::observed::label;
use crate::runtime::connect;
use crate::runtime::fake::{ExecScript, FakeRuntime, Script};

/// A node with one pod, `default/web` of UID `u1`, whose container `main` runs.
pub(super) struct Bed {
    pub(super) ops: Ops,
    pub(super) fake: FakeRuntime,
    pub(super) container: String,
    pub(super) dir: tempfile::TempDir,
    streaming: TcpListener,
}

impl Bed {
    pub(super) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, fake) = FakeRuntime::start(dir.path()).unwrap();
        fake.image("app:1", Script::default());
        let channel = connect::channel(&endpoint).unwrap();
        let cri = Cri::new(channel.clone());
        let named = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let labels = [
            named(label::POD_UID, "u1"),
            named(label::POD_NAME, "web"),
            named(label::POD_NAMESPACE, "default"),
            named(label::CONTAINER_NAME, "main"),
        ];
        let sandbox = cri::PodSandboxConfig { labels: labels.clone().into(), ..Default::default() };
        let image = cri::ImageSpec { image: "app:1".into(), ..Default::default() };
        let config = cri::ContainerConfig { image: Some(image), labels: labels.into(), ..Default::default() };
        let pod = cri.run_sandbox(sandbox.clone(), "").await.unwrap();
        let container = cri.create_container(&pod, config, sandbox).await.unwrap();
        cri.start_container(&container).await.unwrap();
        fake.log_path(&container, &dir.path().join("0.log"));
        let streaming = TcpListener::bind("127.0.0.1:0").await.unwrap();
        fake.streaming(&format!("http://{}/exec/TOKEN", streaming.local_addr().unwrap()));
        fake.calls();

        let store = Store::open(dir.path(), jiff::Timestamp::UNIX_EPOCH).unwrap();
        let spec = json!({ "containers": [{ "name": "main", "image": "app:1", "tty": true }, { "name": "late" }, { "name": "odd" }] });
        let object = json!({ "metadata": { "name": "web", "namespace": "default", "uid": "u1" }, "spec": spec });
        let object = Object::new(Collection::Pods, "default/web".into(), "u1".into(), object.to_string().as_bytes());
        store.apply(vec![Op::Upsert(object)]).await.unwrap();
        let status = json!({ "phase": "Running", "containerStatuses": [
            { "name": "main", "containerID": format!("containerd://{container}"), "state": { "running": {} },
              "ready": true, "restartCount": 0, "image": "app:1", "imageID": "" },
            { "name": "late", "state": { "waiting": { "reason": "ContainerCreating" } },
              "ready": false, "restartCount": 0, "image": "", "imageID": "" }] });
        store.remember(POD_STATUS_NOTES, "u1", status.to_string().into()).await.unwrap();
        let mut config = Config::new(&"h:1".parse().unwrap(), "box");
        config.runtime_endpoint = endpoint;
        let ops = Ops::new(store, Arc::new(config), channel, watch::channel(None).1);
        Self { ops, fake, container, dir, streaming }
    }

    /// A pipe to the endpoint.
    pub(super) fn pipe(&self) -> DuplexStream {
        let (client, server) = tokio::io::duplex(16 << 10);
        let ops = self.ops.clone();
        supervise::spawn("pipe", async move { ops.local(server).await });
        client
    }

    /// A session with the endpoint at its edge side.
    fn link(&self) -> Streams {
        let mut line = Line::default();
        let requests = Requests::new(line.at_edge.serve(Class::Ops, WAITING));
        supervise::spawn("serve", serve(self.ops.clone(), requests, CancellationToken::new()));
        let streams = line.cloud.streams();
        supervise::spawn("line", async move { panic!("{}", line.carry().await) });
        streams
    }

    pub(super) async fn get(&self, path: &str) -> (u16, String) {
        self.ask("GET", path).await
    }

    async fn ask(&self, method: &str, path: &str) -> (u16, String) {
        let (mut sender, connection) = client::handshake(TokioIo::new(self.pipe())).await.unwrap();
        supervise::spawn("client", async move { drop(connection.await) });
        let request = Request::builder().method(method).uri(path).body(Empty::<Bytes>::new()).unwrap();
        let answer = sender.send_request(request).await.unwrap();
        let status = answer.status().as_u16();
        let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    /// The request that was passed on to the streaming server, and its connection.
    async fn asked(&self) -> (String, BufReader<TcpStream>) {
        let (stream, _) = self.streaming.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        (head(&mut stream).await, stream)
    }
}

/// Up to and with the empty line.
pub(super) async fn head(stream: &mut (impl tokio::io::AsyncBufRead + Unpin)) -> String {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(stream.read_line(&mut head).await.unwrap() > 0, "{head}");
    }
    head
}

const EXEC: &str = "POST /exec/default/web/main?command=ls&command=-l&input=1&output=1&error=1 HTTP/1.1\r\nHost: node\r\n\
    Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\
    X-Stream-Protocol-Version: v3.channel.k8s.io\r\nContent-Length: 0\r\n\r\n";
const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
    X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n";

async fn upgrades(bed: &Bed, client: impl AsyncRead + AsyncWrite + Unpin) {
    let mut client = BufReader::new(client);
    client.write_all(EXEC.as_bytes()).await.unwrap();
    let (asked, mut runtime) = bed.asked().await;
    assert!(asked.starts_with("POST /exec/TOKEN HTTP/1.1\r\n"), "{asked}");
    let lines: Vec<String> = asked.lines().map(str::to_ascii_lowercase).collect();
    for line in [
        "upgrade: spdy/3.1",
        "x-stream-protocol-version: v4.channel.k8s.io",
        "x-stream-protocol-version: v3.channel.k8s.io",
    ] {
        assert!(lines.iter().any(|of| of == line), "{asked}");
    }
    assert!(lines.contains(&format!("host: {}", bed.streaming.local_addr().unwrap())));
    assert_eq!(bed.fake.calls(), [format!("Exec {} ioe- ls -l", bed.container)]);
    // What comes with the head is not lost.
    runtime.write_all(format!("{SWITCH}early").as_bytes()).await.unwrap();
    let answer = head(&mut client).await;
    assert!(answer.starts_with("HTTP/1.1 101 ") && answer.contains("v4.channel.k8s.io"), "{answer}");
    let sent: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let (mut from_client, mut to_runtime) = tokio::io::split(client);
    let echo = async {
        let (mut read, mut write) = runtime.get_mut().split();
        tokio::io::copy(&mut read, &mut write).await.unwrap();
        // It has seen the end, and still speaks.
        write.write_all(b"late").await.unwrap();
        write.shutdown().await.unwrap();
    };
    let write = async {
        to_runtime.write_all(&sent).await.unwrap();
        to_runtime.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let ((), (), read) = tokio::join!(echo, write, from_client.read_to_end(&mut got));
    read.unwrap();
    assert!(got == [&b"early"[..], &sent, b"late"].concat());
}

#[tokio::test]
async fn what_is_upgraded_is_relayed_both_ways_to_both_ends() {
    let bed = Bed::new().await;
    upgrades(&bed, bed.pipe()).await;
    upgrades(&bed, bed.link().open(Class::Ops, Bytes::from_static(KUBELET)).unwrap()).await;
    eventually(|| bed.ops.places.available_permits() == MAX_REQUESTS).await;
}

async fn eventually(holds: impl Fn() -> bool) {
    let patience = Duration::from_secs(20);
    let wait = async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(patience, wait).await.expect("it does not come to that");
}

async fn is_refused(bed: &Bed, client: impl AsyncRead + AsyncWrite + Unpin) {
    let mut client = BufReader::new(client);
    client.write_all(EXEC.as_bytes()).await.unwrap();
    let (_, mut runtime) = bed.asked().await;
    runtime.write_all(b"HTTP/1.1 403 Forbidden\r\nX-Why: v5\r\nContent-Length: 9\r\n\r\nunable to").await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("x-why: v5\r\n"), "{answer}");
    assert!(answer.ends_with("\r\n\r\nunable to"), "{answer}");
}

#[tokio::test]
async fn an_upgrade_that_the_runtime_refuses_is_refused_in_its_words() {
    let bed = Bed::new().await;
    is_refused(&bed, bed.pipe()).await;
    is_refused(&bed, bed.link().open(Class::Ops, Bytes::from_static(KUBELET)).unwrap()).await;
    // Neither an upgrade nor an error is no answer.
    let mut client = bed.pipe();
    client.write_all(EXEC.as_bytes()).await.unwrap();
    let (_, mut runtime) = bed.asked().await;
    runtime.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 500 ") && answer.ends_with("status code 200"), "{answer}");
}

async fn switched<C: AsyncRead + AsyncWrite + Unpin>(bed: &Bed, client: C) -> (BufReader<C>, BufReader<TcpStream>) {
    let mut client = BufReader::new(client);
    client.write_all(EXEC.as_bytes()).await.unwrap();
    let (_, mut runtime) = bed.asked().await;
    runtime.write_all(SWITCH.as_bytes()).await.unwrap();
    head(&mut client).await;
    (client, runtime)
}

#[tokio::test]
async fn when_one_side_is_gone_the_other_is_closed() {
    let bed = Bed::new().await;
    let link = bed.link();
    let open = || link.open(Class::Ops, Bytes::from_static(KUBELET)).unwrap();
    let (client, mut runtime) = switched(&bed, bed.pipe()).await;
    drop(client);
    assert_eq!(runtime.read(&mut [0]).await.unwrap(), 0);
    drop(runtime);
    let (client, mut runtime) = switched(&bed, open()).await;
    drop(client);
    // Reset or ended, but closed.
    assert_eq!(runtime.read(&mut [0]).await.unwrap_or(0), 0);
    // Also when it had finished its half before, so that nobody reads from it any more.
    let (mut client, mut runtime) = switched(&bed, open()).await;
    client.shutdown().await.unwrap();
    assert_eq!(runtime.read(&mut [0]).await.unwrap(), 0);
    drop(client);
    eventually(|| bed.ops.places.available_permits() == MAX_REQUESTS).await;

    let (mut client, runtime) = switched(&bed, open()).await;
    drop(runtime);
    let mut rest = Vec::new();
    // An end, or an error.
    let _ = client.read_to_end(&mut rest).await;
    // The client does not hang up; it is hung up on.
    eventually(|| bed.ops.places.available_permits() == MAX_REQUESTS).await;
    drop(client);
}

#[tokio::test]
async fn attach_takes_the_terminal_of_the_spec_and_port_forward_the_sandbox() {
    let bed = Bed::new().await;
    let sandbox = bed.fake.sandboxes()[0].0.clone();
    let upgrade = "Host: node\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n";
    for (request, call) in [
        ("POST /attach/default/web/u1/main?input=1&output=1&error=1", format!("Attach {} io-t", bed.container)),
        ("GET /portForward/default/web/u1?port=80&port=81", format!("PortForward {sandbox} [80, 81]")),
        ("GET /exec/default/web/u1/main?command=a&output=1&tty=1&error=1", format!("Exec {} -o-t a", bed.container)),
    ] {
        let mut client = BufReader::new(bed.pipe());
        client.write_all(format!("{request} HTTP/1.1\r\n{upgrade}").as_bytes()).await.unwrap();
        let (_, mut runtime) = bed.asked().await;
        runtime.write_all(SWITCH.as_bytes()).await.unwrap();
        assert!(head(&mut client).await.starts_with("HTTP/1.1 101 "));
        assert_eq!(bed.fake.calls().pop(), Some(call));
    }
}

#[tokio::test]
async fn what_cannot_be_streamed_is_refused_with_upstreams_words() {
    let bed = Bed::new().await;
    let upgrade =
        |request: &str| format!("{request} HTTP/1.1\r\nHost: n\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n");
    for (request, status, words) in [
        ("GET /exec/default/none/main?output=1", 404, "pod does not exist"),
        ("GET /exec/default/web/late?output=1", 500, "container not found (\"late\")"),
        ("GET /exec/default/web/u2/main?output=1", 500, "container not found (\"main\")"),
        ("GET /exec/default/web/main", 400, "you must specify at least 1 of stdin, stdout, stderr"),
        ("GET /portForward/default/web", 400, "query parameter \"port\" is required"),
        ("GET /portForward/default/web/u2?port=1", 404, "pod not found"),
    ] {
        let mut client = bed.pipe();
        client.write_all(upgrade(request).as_bytes()).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.ends_with(words), "{request}: {answer}");
    }
    assert_eq!(bed.get("/exec/default/web/main?output=1").await, (400, "Upgrade request required".to_owned()));
    for (url, says) in [("http://10.0.0.1:1/x", "loopback"), ("https://127.0.0.1:1/x", "plain HTTP")] {
        bed.fake.streaming(url);
        let mut client = bed.pipe();
        client.write_all(EXEC.as_bytes()).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 500 ") && answer.contains(says), "{answer}");
    }
    bed.fake.fail("Exec", tonic::Status::not_found("no such container"));
    let mut client = bed.pipe();
    client.write_all(EXEC.as_bytes()).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 404 ") && answer.ends_with("no such container"), "{answer}");
}

#[tokio::test]
async fn commands_run_to_their_end() {
    let bed = Bed::new().await;
    bed.fake.execs([ExecScript::Ends("hello", 0), ExecScript::Ends("sorry", 3)]);
    assert_eq!(bed.ask("POST", "/run/default/web/main?cmd=echo+hello").await, (200, "hello".to_owned()));
    assert_eq!(bed.fake.calls(), ["ExecSync echo hello"]);
    let failed = bed.ask("POST", "/run/default/web/u1/main?cmd=x").await;
    assert_eq!(failed, (500, "command 'x' exited with 3: sorry".to_owned()));
}

#[tokio::test]
async fn pods_and_the_rest_are_told() {
    let bed = Bed::new().await;
    let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    let (status, pods) = bed.get("/pods").await;
    let pods = json(&pods);
    assert_eq!(
        (status, &pods["kind"], &pods["items"][0]["status"]["phase"]),
        (200, &json!("PodList"), &json!("Running"))
    );
    let running = json(&bed.get("/runningpods/").await.1);
    let pod = &running["items"][0];
    assert_eq!(pod["metadata"], json!({ "name": "web", "namespace": "default", "uid": "u1" }));
    assert_eq!(pod["spec"]["containers"][0]["name"], "main");
    assert_eq!(bed.get("/healthz/ping").await, (200, "ok".to_owned()));
    let (status, words) = bed.get("/healthz").await;
    assert!(status == 500 && words.contains("the kubelet does not run"), "{words}");
    let slis = bed.get("/metrics/slis").await.1;
    for line in ["{name=\"ping\",type=\"healthz\"} 1\n", "{name=\"syncloop\",type=\"healthz\"} 0\n"] {
        assert!(slis.contains(line), "{slis}");
    }
    let config = json(&bed.get("/configz").await.1);
    assert_eq!(config["kubeletconfig"]["containerLogMaxSize"], "10Mi");
    assert_eq!(bed.ask("POST", "/checkpoint/default/web/main").await.0, 501);
    assert_eq!(bed.get("/stats/summary").await.0, 503, "no kubelet runs here");
    assert_eq!(bed.get("/elsewhere").await, (404, "404: Page Not Found".to_owned()));
    bed.fake.stop();
    let (status, words) = bed.get("/runningpods/").await;
    assert!(status == 500 && words.contains("does not answer"), "{words}");
}

#[tokio::test]
async fn as_many_may_come_at_once_as_a_session_carries() {
    let bed = Bed::new().await;
    let link = bed.link();
    let asking: Vec<_> =
        (0..MAX_STREAMS).map(|_| link.open(Class::Ops, Bytes::from_static(KUBELET)).unwrap()).collect();
    for mut asking in asking {
        asking.write_all(b"GET /healthz/ping HTTP/1.1\r\nHost: n\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        asking.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    }
}

#[tokio::test]
async fn only_the_kubelet_is_here_and_no_more_than_it_can_take() {
    let bed = Bed::new().await;
    let link = bed.link();
    let mut other = link.open(Class::Ops, Bytes::from_static(b"shell")).unwrap();
    let error = other.read(&mut [0]).await.unwrap_err().to_string();
    assert!(error.contains("does not know what \"shell\" is"), "{error}");
    let all = Arc::clone(&bed.ops.places).try_acquire_many_owned(u32::try_from(MAX_REQUESTS).unwrap()).unwrap();
    let mut refused = link.open(Class::Ops, Bytes::from_static(KUBELET)).unwrap();
    let error = refused.read(&mut [0]).await.unwrap_err().to_string();
    assert!(error.contains("try again later"), "{error}");
    assert_eq!(bed.get("/healthz/ping").await.0, 503);
    drop(all);
    assert_eq!(bed.get("/healthz/ping").await.0, 200);
    let mut asking = link.open(Class::Ops, Bytes::from_static(KUBELET)).unwrap();
    asking.write_all(b"GET /healthz/ping HTTP/1.1\r\nHost: n\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    asking.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nok"), "{answer}");
}
