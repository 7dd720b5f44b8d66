//! The mapper against asyncua's server.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at the first thing that is not so")]

use std::time::Duration;

use serde_json::json;
use skerry_mapper::testing::{Edge, Process, desire, device, eventually, free_port, model};
use skerry_proto::dmi;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

const MAPPER: &str = env!("CARGO_BIN_EXE_skerry-mapper-opcua");
const SIMULATOR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/simulator.py");

fn press_model() -> dmi::DeviceModel {
    model(
        "press",
        &[
            ("temperature", "DOUBLE!"),
            ("followed", "DOUBLE"),
            ("count", "INT!"),
            ("on", "BOOLEAN!"),
            ("label", "STRING!"),
            ("big", "STRING"),
            ("none", "INT"),
        ],
    )
}

fn node(name: &str) -> serde_json::Value {
    json!({"nodeID": format!("ns=2;s={name}")})
}

fn press(name: &str, config: &serde_json::Value) -> dmi::Device {
    let followed = json!({"nodeID": "ns=2;s=temperature", "subscribe": true, "samplingInterval": 100});
    device(
        name,
        "press",
        config,
        &[
            ("temperature", node("temperature")),
            ("followed", followed),
            ("count", node("count")),
            ("on", node("on")),
            ("label", node("label")),
        ],
    )
}

#[tokio::test]
async fn a_server_is_read_followed_written_and_called() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut simulator = Process::python(SIMULATOR, &[&port.to_string()]).await;
    let mut config = json!({"url": format!("opc.tcp://127.0.0.1:{port}/"), "methods": {"add": {
        "objectID": "ns=2;s=plant", "methodID": "ns=2;s=add",
        "inputs": [{"name": "one", "type": "Int64"}, {"name": "two", "type": "Int64"}], "outputs": ["sum"],
    }}});
    let anyone = press("anyone", &config);
    config["userName"] = "operator".into();
    config["password"] = "secret".into();
    let operator = press("operator", &config);
    config["password"] = "guessed".into();
    let stranger = press("stranger", &config);
    let edge = Edge::start(directory.path(), vec![press_model()], vec![anyone.clone(), operator, stranger]);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    for device in ["anyone", "operator"] {
        for (property, value) in
            [("temperature", "21.5"), ("followed", "21.5"), ("count", "7"), ("on", "true"), ("label", "pump")]
        {
            edge.reads(device, property, value).await;
        }
        edge.is(device, "ok").await;
    }
    edge.is("stranger", "offline").await;

    simulator.say("set 30.25").await;
    edge.reads("anyone", "followed", "30.25").await;
    edge.reads("anyone", "temperature", "30.25").await;

    let wanted = [("temperature", "18.5"), ("count", "9"), ("on", "false"), ("label", "press & pump")];
    edge.update(wanted.iter().fold(anyone.clone(), |device, (property, value)| desire(device, property, value))).await;
    for (property, value) in wanted {
        edge.reads("anyone", property, value).await;
        edge.reads("operator", property, value).await;
        eventually("told to be written", || edge.written("anyone", property).as_deref() == Some(value), String::new)
            .await;
    }
    edge.reads("anyone", "followed", "18.5").await;

    let sum = edge.call("anyone", "add", &[("one", "40"), ("two", "2")]).await.unwrap();
    assert_eq!(sum.get("sum").map(String::as_str), Some("42"));
    let missing = edge.call("anyone", "add", &[("one", "40")]).await.unwrap_err();
    assert!(missing.message().contains("\"two\""), "{missing}");

    // A node that is not there and ten mebibytes do not disturb the others.
    let mut more = anyone.clone();
    let with_more = device("anyone", "press", &json!({}), &[("big", node("big")), ("none", node("none"))]);
    more.spec.as_mut().unwrap().properties.extend(with_more.spec.unwrap().properties);
    edge.update(more).await;
    edge.is("anyone", "unhealthy").await;
    simulator.say("set 50").await;
    edge.reads("anyone", "temperature", "50").await;
    edge.reads("anyone", "followed", "50").await;
    assert_eq!(edge.value("anyone", "big"), None);

    simulator.kill().await;
    edge.is("anyone", "offline").await;
    let _simulator = Process::python(SIMULATOR, &[&port.to_string()]).await;
    edge.reads("operator", "followed", "21.5").await;
    edge.is("operator", "ok").await;
}

#[tokio::test]
async fn what_is_no_server_is_tried_again_and_again() {
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = json!({"url": format!("opc.tcp://127.0.0.1:{}", listener.local_addr().unwrap().port())});
    let edge = Edge::start(directory.path(), vec![press_model()], vec![press("press", &config)]);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    let ack = [&b"ACKF\x1c\0\0\0"[..], &[0; 20]].concat();
    for answer in [
        b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
        b"ERRF\x10\0\0\0\0\0\x80\x80\xff\xff\xff\xff".to_vec(),
        b"ACKF\xff\xff\xff\xff".to_vec(),
        b"ACKF\0\0\0\0".to_vec(),
        [&ack[..], b"OPNF\x0c\0\0\0\0\0\0\0"].concat(),
        [&ack[..], b"MSGF\x20\0\0\0", &[0xff; 24]].concat(),
        [&ack[..], b"OPNF\x20\0\0\0", &[0; 24]].concat(),
    ] {
        let (mut stream, _) = tokio::time::timeout(Duration::from_secs(20), listener.accept()).await.unwrap().unwrap();
        let mut hello = [0; 256];
        assert!(stream.read(&mut hello).await.unwrap() > 0);
        let _ = stream.write_all(&answer).await;
        let _ = tokio::time::timeout(Duration::from_millis(300), stream.read(&mut hello)).await;
    }
    edge.is("press", "offline").await;
}
