//! The mapper with mosquitto between it and a device of paho's, and hostile ones.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at the first thing that is not so")]

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use serde_json::{Value, json};
use skerry_mapper::testing::{Edge, Process, desire, device, eventually, free_port, model};
use skerry_proto::dmi;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};

const MAPPER: &str = env!("CARGO_BIN_EXE_skerry-mapper-mqtt");
const SIMULATOR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/simulator.py");

fn lamp_model() -> dmi::DeviceModel {
    model(
        "lamp",
        &[("level", "INT!"), ("on", "BOOLEAN!"), ("power", "DOUBLE"), ("note", "STRING"), ("beep", "STRING!")],
    )
}

fn lamp(config: &Value) -> dmi::Device {
    device(
        "lamp",
        "lamp",
        config,
        &[
            (
                "level",
                json!({"topic": "plant/lamp/state", "qos": 1, "jsonPointer": "/level", "commandTopic": "plant/lamp/set", "writeTemplate": "{\"level\": ${value}}"}),
            ),
            (
                "on",
                json!({"topic": "plant/lamp/state", "qos": 1, "jsonPointer": "/on", "commandTopic": "plant/lamp/set", "writeTemplate": "{\"on\": ${value}}"}),
            ),
            ("power", json!({"topic": "plant/+/power", "jsonPointer": "/w", "timestampPointer": "/ts"})),
            ("note", json!({"topic": "plant/lamp/note"})),
            ("beep", json!({"commandTopic": "plant/lamp/beep"})),
        ],
    )
}

async fn mosquitto(port: u16) -> Child {
    let broker = Command::new("mosquitto")
        .args(["-p", &port.to_string()])
        .kill_on_drop(true)
        .spawn()
        .expect("scripts/install-deps");
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    broker
}

async fn publish(port: u16, topic: &str, payload: &str) {
    let port = port.to_string();
    let status =
        Command::new("mosquitto_pub").args(["-h", "127.0.0.1", "-p", &port, "-t", topic, "-m", payload]).status();
    assert!(status.await.unwrap().success());
}

fn time(edge: &Edge, property: &str) -> i64 {
    let seen = edge.seen.lock().unwrap();
    let twin = &seen.twins[&("lamp".to_owned(), property.to_owned())];
    twin.reported.as_ref().unwrap().metadata["timestamp"].parse().unwrap()
}

#[tokio::test]
async fn a_device_is_heard_and_told() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut broker = mosquitto(port).await;
    let mut simulator = Process::python(SIMULATOR, &[&port.to_string()]).await;
    let config = json!({"brokerURL": format!("tcp://127.0.0.1:{port}"), "clientID": "mapper"});
    let edge = Edge::start(directory.path(), vec![lamp_model()], vec![lamp(&config)]);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    edge.reads("lamp", "level", "40").await;
    edge.reads("lamp", "on", "false").await;
    edge.is("lamp", "ok").await;

    // Written, and read back from what the device says it is.
    edge.update(desire(desire(lamp(&config), "level", "75"), "on", "true")).await;
    edge.reads("lamp", "level", "75").await;
    edge.reads("lamp", "on", "true").await;
    eventually(
        "told to be written",
        || edge.written("lamp", "on").as_deref() == Some("true"),
        || format!("{:?}", edge.written("lamp", "on")),
    )
    .await;
    // What cannot be read back is written all the same.
    edge.update(desire(lamp(&config), "beep", "twice")).await;
    eventually(
        "told to be written",
        || edge.written("lamp", "beep").as_deref() == Some("twice"),
        || format!("{:?}", edge.written("lamp", "beep")),
    )
    .await;

    // Times: the source's, unless they are from the future or go back.
    publish(port, "plant/lamp/power", r#"{"w": 1.5, "ts": 1700000000000}"#).await;
    edge.reads("lamp", "power", "1.5").await;
    assert_eq!(time(&edge, "power"), 1_700_000_000_000);
    publish(port, "plant/lamp/power", r#"{"w": 2.5, "ts": 1600000000000}"#).await;
    edge.reads("lamp", "power", "2.5").await;
    assert_eq!(time(&edge, "power"), 1_700_000_000_000);
    publish(port, "plant/lamp/power", r#"{"w": 3.5, "ts": 99000000000000}"#).await;
    edge.reads("lamp", "power", "3.5").await;
    assert!((1_700_000_000_001..98_000_000_000_000).contains(&time(&edge, "power")));

    // Nonsense and ten mebibytes are refused; what follows is heard.
    simulator.say("plant/lamp/note *10485760").await;
    for nonsense in ["", "}{", "null", "{\"w\": \"warm\"}", "{\"w\": 1e999}", "\u{0}\u{1}"] {
        simulator.say(&format!("plant/lamp/power {nonsense}")).await;
    }
    edge.is("lamp", "unhealthy").await;
    simulator.say("plant/lamp/note fine").await;
    simulator.say("plant/lamp/power {\"w\": 4.5}").await;
    edge.reads("lamp", "note", "fine").await;
    edge.reads("lamp", "power", "4.5").await;
    edge.is("lamp", "ok").await;

    broker.kill().await.unwrap();
    edge.is("lamp", "offline").await;
    let _broker = mosquitto(port).await;
    edge.is("lamp", "ok").await;
    publish(port, "plant/lamp/note", "back").await;
    edge.reads("lamp", "note", "back").await;
}

#[tokio::test]
async fn a_device_logs_in_by_what_kubeedges_manifests_have_in_visitors() {
    let directory = tempfile::tempdir().unwrap();
    let (port, passwords, config) = (free_port(), directory.path().join("passwd"), directory.path().join("conf"));
    let made = Command::new("mosquitto_passwd").args(["-c", "-b"]).arg(&passwords).args(["lamp", "secret"]).status();
    assert!(made.await.unwrap().success());
    // It may become another user, who is to read it.
    std::fs::set_permissions(&passwords, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let rules = format!("listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {}\n", passwords.display());
    std::fs::write(&config, rules).unwrap();
    let broker = Command::new("mosquitto").arg("-c").arg(&config).kill_on_drop(true).spawn();
    let _broker = broker.expect("scripts/install-deps");
    let place = json!({"ip": "127.0.0.1", "port": port});
    let visitor = json!({
        "topic": "plant/lamp/level", "qos": 1, "retain": false, "clientId": "client123", "username": "lamp", "password": "secret",
        "cleanSession": true, "keepAlive": 60,
    });
    let known = device("known", "lamp", &place, &[("level", visitor)]);
    let stranger = device("stranger", "lamp", &place, &[("level", json!({"topic": "plant/lamp/level"}))]);
    let edge = Edge::start(directory.path(), vec![lamp_model()], vec![known, stranger]);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    edge.is("known", "ok").await;
    edge.is("stranger", "offline").await;
}

#[tokio::test]
async fn what_is_no_broker_is_tried_again_and_again() {
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let config = json!({"ip": "127.0.0.1", "port": port});
    let edge = Edge::start(directory.path(), vec![lamp_model()], vec![lamp(&config)]);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    let accept = b"\x20\x02\x00\x00";
    for answer in [
        &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..],
        b"\x20\x02\x00\x05",
        b"\xff\xff\xff\xff\xff\xff",
        &[&accept[..], b"\x30\xff\xff\xff\xff\xff"].concat(),
        &[&accept[..], b"\x36\x05\x00\x01a\x00\x00"].concat(),
        &[&accept[..], b"\x30\x03\x00\x09a"].concat(),
        &[&accept[..], b"\x32\x04\x00\x02\xff\xfe\x00"].concat(),
        &[&accept[..], &[0x20, 2, 0, 0].repeat(100)].concat(),
    ] {
        let (mut stream, _) = tokio::time::timeout(Duration::from_secs(20), listener.accept()).await.unwrap().unwrap();
        let mut hello = [0; 64];
        assert!(stream.read(&mut hello).await.unwrap() > 0);
        let _ = stream.write_all(answer).await;
        let _ = tokio::time::timeout(Duration::from_millis(300), stream.read(&mut hello)).await;
    }
    edge.is("lamp", "offline").await;
}
