//! Against a real mosquitto, with real clients.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use serde_json::json;
use skerry_proto::sync::{Collection, Object, Op};

use super::*;
use crate::devices::tests::Bed;
use crate::supervise;

const BOILER: &str = "$hw/events/device/ns/boiler";

/// MQTT of a node with a boiler, and the broker that edgecore starts.
struct Node {
    bed: Bed,
    run: tempfile::TempDir,
    port: u16,
    status: watch::Receiver<Status>,
    stop: CancellationToken,
    done: tokio::task::JoinHandle<()>,
}

impl Node {
    async fn new() -> Self {
        Self::with(None, free_port()).await
    }

    /// With a broker at an address, or whichever is there.
    async fn with(at: Option<String>, port: u16) -> Self {
        let bed = Bed::new().await;
        bed.heater().await;
        let run = tempfile::tempdir().unwrap();
        std::fs::set_permissions(run.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let (stop, (status, seen)) = (CancellationToken::new(), watch::channel(Status::default()));
        let mut broker = broker(&bed, at, port);
        broker.dir = run.path().join("mqtt");
        let done = Self::serve(&bed, broker, status, &stop);
        Self { bed, run, port, status: seen, stop, done }
    }

    fn serve(
        bed: &Bed,
        broker: Broker,
        status: watch::Sender<Status>,
        stop: &CancellationToken,
    ) -> tokio::task::JoinHandle<()> {
        let parts = Parts {
            devices: bed.devices.clone(),
            store: bed.store.clone(),
            node: "n".to_owned(),
            broker: MqttBroker::Auto,
            data_dir: bed.dir.path().to_owned(),
            status,
            shutdown: stop.clone(),
        };
        supervise::spawn("mqtt", serve(parts, broker))
    }

    /// The boiler is written to by this user alone.
    async fn guard(&self, user: &str) {
        let json = json!({
            "metadata": { "name": "boiler", "namespace": "ns", "uid": "u1", "annotations": { "skerry.dev/mqtt-writers": user } },
            "spec": { "deviceModelRef": { "name": "heater" }, "nodeName": "box", "properties": [{ "name": "temp" }, { "name": "on" }] },
        });
        let object =
            Object::new(Collection::Devices, "ns/boiler".to_owned(), "u1".to_owned(), json.to_string().as_bytes());
        self.bed.store.apply(vec![Op::Upsert(object)]).await.unwrap();
    }

    /// Users who have passwords.
    fn admit(&self, users: &[&str]) -> PathBuf {
        let passwords = self.bed.dir.path().join(PASSWORDS);
        for user in users {
            let create: &[&str] = if passwords.exists() { &["-b"] } else { &["-c", "-b"] };
            let made =
                Command::new("mosquitto_passwd").args(create).arg(&passwords).args([user, "secret"]).status().unwrap();
            assert!(made.success());
        }
        passwords
    }

    async fn connected(&self) {
        eventually("the broker", || self.status.borrow().connected).await;
    }

    fn publish(&self, user: Option<&str>, topic: &str, payload: &[u8]) -> bool {
        let mut command = Command::new("mosquitto_pub");
        command.args(["-p", &self.port.to_string(), "-q", "1", "-t", topic, "-s"]).stdin(Stdio::piped());
        if let Some(user) = user {
            command.args(["-u", user, "-P", "secret"]);
        }
        let mut child = command.stderr(Stdio::null()).spawn().expect("mosquitto-clients: scripts/install-deps");
        child.stdin.take().unwrap().write_all(payload).unwrap();
        child.wait().unwrap().success()
    }

    fn subscribe(&self, topics: &[&str]) -> Heard {
        Heard::new(self.port, topics)
    }
}

fn broker(bed: &Bed, at: Option<String>, port: u16) -> Broker {
    let mut broker = Broker::new(at, bed.store.clone(), bed.dir.path());
    broker.local.set_port(port);
    broker.is_expected = false;
    broker
}

/// What a client hears, from when it has been let in.
struct Heard {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Heard {
    fn new(port: u16, topics: &[&str]) -> Self {
        let mut command = Command::new("mosquitto_sub");
        command.args(["-p", &port.to_string(), "-q", "1", "-v"]).args(topics.iter().flat_map(|topic| ["-t", topic]));
        let mut child = command.stdout(Stdio::piped()).spawn().expect("mosquitto-clients: scripts/install-deps");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (kept, output) = (Arc::clone(&lines), child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                kept.lock().unwrap().push(line);
            }
        });
        Self { child, lines }
    }

    /// The payload of the last message of a topic.
    fn last(&self, topic: &str) -> Option<String> {
        let of = |line: &String| line.split_once(' ').filter(|(of, _)| *of == topic).map(|(_, text)| text.to_owned());
        self.lines.lock().unwrap().iter().rev().find_map(of)
    }

    async fn hears(&self, topic: &str, word: &str) -> String {
        eventually(&format!("{word} on {topic}"), || self.last(topic).is_some_and(|text| text.contains(word))).await;
        self.last(topic).unwrap_or_default()
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let patience = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(60), patience).await.is_ok(), "{what} did not come");
}

#[tokio::test]
async fn a_broker_that_was_there_or_is_to_be_is_waited_for() {
    let bed = Bed::new().await;
    let mut broker = broker(&bed, None, free_port());
    let listener = std::net::TcpListener::bind(broker.local).unwrap();
    broker.connect(true).await.unwrap();
    drop(listener);
    let why = broker.connect(true).await.err().unwrap();
    assert!(why.contains("the box's own was or is to be"), "{why}");
    let listener = std::net::TcpListener::bind(broker.local).unwrap();
    broker.connect(true).await.unwrap();
    drop(listener);
}

#[tokio::test]
async fn where_mosquitto_is_not_installed_it_is_said_how_it_comes() {
    let bed = Bed::new().await;
    let mut broker = broker(&bed, None, free_port());
    broker.binaries = &["/nowhere/mosquitto"];
    let why = broker.connect(true).await.err().unwrap();
    assert!(why.contains("mosquitto is not installed") && why.contains("apt install mosquitto"), "{why}");
    let why = broker.connect(false).await.err().unwrap();
    assert!(why.contains("no device that would need one"), "{why}");
}

#[tokio::test]
async fn clients_are_answered_and_values_are_retained_also_by_a_broker_that_was_killed() {
    let node = Node::new().await;
    node.connected().await;
    let heard = node.subscribe(&["devices/#", "$hw/#"]);
    // It is let in.
    heard.hears("devices/ns/boiler/$state", "").await;
    let update = json!({ "event_id": "e1", "twin": { "temp": { "actual": { "value": "19.5" } } } }).to_string();
    node.publish(None, &format!("{BOILER}/twin/update"), update.as_bytes());
    let result = heard.hears(&format!("{BOILER}/twin/update/result"), "e1").await;
    assert!(result.contains("19.5"), "{result}");
    heard.hears("devices/ns/boiler/temp", "19.5").await;
    heard.hears(&format!("{BOILER}/twin/update/document"), "19.5").await;
    heard.hears(&format!("{BOILER}/twin/update/delta"), r#""delta":{"temp":"20"}"#).await;
    let update = json!({ "event_id": "e2", "twin": { "temp": { "expected": { "value": "42" } } } }).to_string();
    node.publish(None, &format!("{BOILER}/twin/update"), update.as_bytes());
    heard.hears(&format!("{BOILER}/twin/update/delta"), r#""delta":{"temp":"42"}"#).await;
    // Too long, and no worker dies of it.
    let long = json!({ "twin": { "temp": { "actual": { "value": "9".repeat(5 << 20) } } } }).to_string();
    node.publish(None, &format!("{BOILER}/twin/update"), long.as_bytes());
    heard.hears(&format!("{BOILER}/twin/update/result"), "at most 262144").await;
    // The plain topics are edgecore's.
    node.publish(None, "devices/ns/boiler/temp", b"forged");
    node.publish(None, "of/an/app", b"x");
    let late = node.subscribe(&["devices/#", "of/#"]);
    assert_eq!(late.hears("devices/ns/boiler/temp", "").await, "19.5");
    node.publish(None, "of/an/app", b"carried");
    late.hears("of/an/app", "carried").await;
    assert_eq!(late.last("devices/ns/boiler/temp").as_deref(), Some("19.5"));
    // Killed: another one is started, which knows nothing until it is told.
    let pid = std::fs::read_to_string(node.run.path().join("mqtt/pid")).unwrap().parse().unwrap();
    late.lines.lock().unwrap().clear();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(late.hears("devices/ns/boiler/temp", "").await, "19.5");
    let status = node.status.borrow().clone();
    assert!(
        status.message.ends_with("started by edgecore") && status.refused == 1 && status.dropped == 0,
        "{status:?}"
    );
    // Gone from the cluster: what was retained goes, too.
    node.bed.store.apply(vec![Op::Delete(Collection::Devices, "u1".to_owned())]).await.unwrap();
    late.lines.lock().unwrap().clear();
    heard.hears("$hw/events/node/n/membership/updated", r#""removed_devices":[{"id":"ns/boiler"}]"#).await;
    late.hears("devices/ns/boiler/temp", "").await;
    node.stop.cancel();
    node.done.await.unwrap();
    assert!(!node.run.path().join("mqtt").exists());
    assert!(std::net::TcpStream::connect(("127.0.0.1", node.port)).is_err());
}

#[tokio::test]
async fn only_whom_a_device_names_may_write_to_it() {
    let node = Node::new().await;
    node.admit(&["app1", "app2"]);
    node.connected().await;
    let heard = node.subscribe(&["devices/#", "$hw/#"]);
    heard.hears("devices/ns/boiler/$state", "").await;
    let update =
        |value: &str| json!({ "event_id": value, "twin": { "temp": { "expected": { "value": value } } } }).to_string();
    let topic = format!("{BOILER}/twin/update");
    let result = format!("{BOILER}/twin/update/result");
    // Not declared: as before.
    node.publish(None, &topic, update("31").as_bytes());
    heard.hears(&result, "31").await;
    node.guard("app1").await;
    let access = node.run.path().join("mqtt/access");
    eventually("the access list", || {
        std::fs::read_to_string(&access).is_ok_and(|list| list.contains("user app2") && list.contains("deny $hw"))
    })
    .await;
    assert_eq!(std::fs::read(node.bed.dir.path().join(ACCESS)).unwrap(), std::fs::read(&access).unwrap());
    assert!(node.status.borrow().is_own);
    // Read again by mosquitto within a moment of being told; then nobody else gets through, by neither name.
    eventually("the new list", || node.publish(Some("app1"), &topic, update("32").as_bytes())).await;
    heard.hears(&result, "32").await;
    for user in [None, Some("app2")] {
        node.publish(user, &topic, update("66").as_bytes());
        node.publish(user, "$hw/events/device/boiler/twin/update", update("67").as_bytes());
    }
    node.publish(Some("app1"), &topic, update("33").as_bytes());
    heard.hears(&result, "33").await;
    let lines = heard.lines.lock().unwrap().join("\n");
    assert!(!lines.contains("\"66\"") && !lines.contains("\"67\""), "{lines}");
    assert!(!node.publish(Some("app3"), &topic, b"{}"), "a stranger with a password");
    node.stop.cancel();
    node.done.await.unwrap();
}

#[tokio::test]
async fn a_broker_that_is_there_is_used_and_one_that_was_left_is_ended() {
    let (bed, run) = (Bed::new().await, tempfile::tempdir().unwrap());
    bed.heater().await;
    std::fs::set_permissions(run.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let port = free_port();
    // As an edgecore that was killed leaves it.
    let (dir, other) = (run.path().join("mqtt"), free_port());
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("mosquitto.conf"), format!("listener {other} 127.0.0.1\n")).unwrap();
    let mut left = mosquitto(&["-c", dir.join("mosquitto.conf").to_str().unwrap()]);
    std::fs::write(dir.join("pid"), left.id().to_string()).unwrap();
    eventually("the one that was left", || std::net::TcpStream::connect(("127.0.0.1", other)).is_ok()).await;
    let (stop, (status, seen)) = (CancellationToken::new(), watch::channel(Status::default()));
    let at_run = || {
        let mut broker = broker(&bed, None, port);
        broker.dir = dir.clone();
        broker
    };
    let next = Node::serve(&bed, at_run(), status, &stop);
    eventually("its successor", || seen.borrow().connected).await;
    assert!(left.try_wait().unwrap().is_some() && seen.borrow().message.ends_with("started by edgecore"));
    stop.cancel();
    next.await.unwrap();
    // Somebody's own.
    let mut theirs = mosquitto(&["-p", &port.to_string()]);
    eventually("mosquitto", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()).await;
    let (stop, (status, seen)) = (CancellationToken::new(), watch::channel(Status::default()));
    let used = Node::serve(&bed, at_run(), status, &stop);
    eventually("the broker", || seen.borrow().connected).await;
    assert_eq!((seen.borrow().message.clone(), seen.borrow().is_own), (format!("127.0.0.1:{port}"), false));
    assert!(!dir.exists());
    stop.cancel();
    used.await.unwrap();
    theirs.kill().unwrap();
    theirs.wait().unwrap();
}

#[tokio::test]
async fn another_broker_can_be_given_the_rules() {
    let (place, port) = (tempfile::tempdir().unwrap(), free_port());
    let (socket, config) = (place.path().join("socket"), place.path().join("conf"));
    let node = Node::with(Some(format!("unix://{}", socket.display())), port).await;
    let passwords = node.admit(&["app1", "app2"]);
    node.guard("app1").await;
    let access = node.bed.dir.path().join(ACCESS);
    eventually("the list", || std::fs::read_to_string(&access).is_ok_and(|list| list.contains("deny $hw"))).await;
    // As docs/mqtt.md has it.
    let rules = format!(
        "user root\nper_listener_settings true\nlistener 0 {}\nallow_anonymous true\nlistener {port} 127.0.0.1\nallow_anonymous true\n\
         acl_file {}\npassword_file {}\n",
        socket.display(),
        access.display(),
        passwords.display()
    );
    std::fs::write(&config, rules).unwrap();
    let mut theirs = mosquitto(&["-c", config.to_str().unwrap()]);
    node.connected().await;
    assert!(!node.status.borrow().is_own);
    let heard = node.subscribe(&["devices/#", "$hw/#"]);
    heard.hears("devices/ns/boiler/$state", "").await;
    let (topic, result) = (format!("{BOILER}/twin/update"), format!("{BOILER}/twin/update/result"));
    for user in [None, Some("app2"), Some("app1")] {
        let name = user.unwrap_or("nobody");
        let update = json!({ "event_id": name, "twin": { "temp": { "expected": { "value": "21" } } } }).to_string();
        node.publish(user, &topic, update.as_bytes());
    }
    heard.hears(&result, "app1").await;
    let lines = heard.lines.lock().unwrap().join("\n");
    assert!(!lines.contains("app2") && !lines.contains("nobody"), "{lines}");
    node.stop.cancel();
    node.done.await.unwrap();
    theirs.kill().unwrap();
    theirs.wait().unwrap();
}

fn mosquitto(arguments: &[&str]) -> Child {
    let started = Command::new("/usr/sbin/mosquitto").args(arguments).stderr(Stdio::null()).spawn();
    started.expect("mosquitto: scripts/install-deps")
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
