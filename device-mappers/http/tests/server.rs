//! The mapper with a device of Python's http.server.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at the first thing that is not so")]

use serde_json::json;
use skerry_mapper::testing::{Edge, Process, desire, device, eventually, free_port, model};

const MAPPER: &str = env!("CARGO_BIN_EXE_skerry-mapper-http");
const SIMULATOR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/simulator.py");

#[tokio::test]
async fn a_device_is_read_and_written() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut simulator = Process::python(SIMULATOR, &[&port.to_string()]).await;
    let model = model(
        "meter",
        &[("power", "DOUBLE"), ("limit", "INT!"), ("requests", "INT"), ("big", "STRING"), ("none", "INT")],
    );
    let config = json!({"url": format!("http://127.0.0.1:{port}/api"), "username": "u", "password": "p", "headers": {"x-key": "k"}});
    let limit = json!({"path": "/state", "jsonPointer": "/limit", "writePath": "/limit", "writeTemplate": "{\"limit\": ${value}}"});
    let few = [
        ("power", json!({"path": "/state", "jsonPointer": "/power/w"})),
        ("limit", limit),
        ("requests", json!({"path": "/state", "jsonPointer": "/requests"})),
    ];
    let mut all = few.to_vec();
    all.push(("big", json!({"path": "/big"})));
    all.push(("none", json!({"path": "/none"})));
    let meter = device("meter", "meter", &config, &few);
    let edge = Edge::start(directory.path(), vec![model], vec![meter.clone()]);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    edge.reads("meter", "power", "230.5").await;
    edge.is("meter", "ok").await;
    edge.update(desire(meter.clone(), "limit", "16")).await;
    edge.reads("meter", "limit", "16").await;
    eventually(
        "told to be written",
        || edge.written("meter", "limit").as_deref() == Some("16"),
        || format!("{:?}", edge.written("meter", "limit")),
    )
    .await;

    // A path that is not there and ten mebibytes do not disturb the others.
    edge.update(device("meter", "meter", &config, &all)).await;
    edge.is("meter", "unhealthy").await;
    let requests = || edge.value("meter", "requests").and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
    let before = requests();
    eventually("it goes on", || requests() > before + 3, || requests().to_string()).await;
    assert_eq!(edge.value("meter", "big"), None);

    simulator.kill().await;
    edge.is("meter", "offline").await;
    let _simulator = Process::python(SIMULATOR, &[&port.to_string()]).await;
    edge.update(meter).await;
    edge.is("meter", "ok").await;
}
