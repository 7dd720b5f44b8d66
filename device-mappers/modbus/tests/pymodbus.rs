//! The mapper against pymodbus's devices, over TCP and a serial line.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at the first thing that is not so")]

use std::time::Duration;

use serde_json::json;
use skerry_mapper::clock;
use skerry_mapper::testing::{Edge, Process, desire, device, eventually, free_port, model};
use skerry_proto::dmi;

const MAPPER: &str = env!("CARGO_BIN_EXE_skerry-mapper-modbus");
const SIMULATOR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/simulator.py");

fn boiler() -> dmi::DeviceModel {
    model(
        "boiler",
        &[
            ("temperature", "FLOAT!"),
            ("raw", "INT"),
            ("unit", "INT"),
            ("pressure", "FLOAT!"),
            ("label", "STRING"),
            ("burner", "BOOLEAN!"),
            ("door", "BOOLEAN"),
            ("input", "INT"),
        ],
    )
}

fn holding(offset: u16, limit: u16) -> serde_json::Value {
    json!({"register": "HoldingRegister", "offset": offset, "limit": limit})
}

fn properties() -> Vec<(&'static str, serde_json::Value)> {
    vec![
        ("temperature", json!({"register": "HoldingRegister", "offset": 0, "limit": 1, "scale": 0.1})),
        ("raw", json!({"register": "HoldingRegister", "offset": 1, "limit": 1, "dataType": "int16"})),
        ("unit", holding(2, 1)),
        ("pressure", holding(10, 2)),
        ("label", holding(20, 2)),
        ("burner", json!({"register": "CoilRegister", "offset": 0, "limit": 1})),
        ("door", json!({"register": "DiscreteInputRegister", "offset": 1, "limit": 1})),
        ("input", json!({"register": "InputRegister", "offset": 0, "limit": 1})),
    ]
}

async fn reads_all(edge: &Edge, device: &str, unit: &str) {
    for (property, value) in [
        ("temperature", "21.5"),
        ("raw", "-1"),
        ("unit", unit),
        ("pressure", "3.5"),
        ("label", "ABC"),
        ("burner", "true"),
        ("door", "true"),
        ("input", "1234"),
    ] {
        edge.reads(device, property, value).await;
    }
}

async fn writes(edge: &Edge, boiler: dmi::Device) {
    let name = boiler.name.clone();
    let boiler = desire(boiler, "temperature", "19.5");
    let boiler = desire(boiler, "burner", "false");
    let boiler = desire(boiler, "pressure", "4.25");
    edge.update(boiler.clone()).await;
    for (property, value) in [("temperature", "19.5"), ("burner", "false"), ("pressure", "4.25")] {
        edge.reads(&name, property, value).await;
        assert_eq!(edge.written(&name, property).as_deref(), Some(value));
    }
    // What cannot be is neither written nor said to be, and the rest goes on.
    edge.update(desire(boiler.clone(), "temperature", "9999")).await;
    edge.is(&name, "unhealthy").await;
    assert_eq!(edge.written(&name, "temperature").as_deref(), Some("19.5"));
    edge.update(desire(boiler, "temperature", "20")).await;
    edge.reads(&name, "temperature", "20").await;
    edge.is(&name, "ok").await;
}

/// When a device was back, on both clocks.
struct Back(Duration, i64);

impl Back {
    fn now() -> Self {
        Self(clock::monotonic(), clock::wall())
    }

    /// It has forgotten what was written: it has it again soon, as is read since then.
    async fn recovered(self, edge: &Edge, device: &str, temperature: &str) {
        let read = || {
            let seen = edge.seen.lock().unwrap();
            let twin = seen.twins.get(&(device.to_owned(), "temperature".to_owned()))?;
            let value = twin.reported.clone()?;
            Some((value.metadata.get("timestamp")?.parse::<i64>().ok()?, value.value))
        };
        let is_new = || read().is_some_and(|(at, value)| at > self.1 && value == temperature);
        eventually(&format!("{device} has {temperature} again"), is_new, || format!("{:?}", read())).await;
        // What is promised of that `scripts/bench devices --part recovery` holds it to.
        eprintln!("{device} recovered after {:?}", clock::monotonic() - self.0);
    }
}

#[tokio::test]
async fn tcp_devices_are_read_written_and_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_port();
    let config = |unit| json!({"communicateMode": "TCP", "ip": "127.0.0.1", "port": port, "slaveID": unit});
    let (one, two) =
        (device("one", "boiler", &config(1), &properties()), device("two", "boiler", &config(2), &properties()));
    let edge = Edge::start(directory.path(), vec![boiler()], vec![one.clone(), two.clone()]);
    let mut simulator = Process::python(SIMULATOR, &["tcp", &port.to_string()]).await;
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    reads_all(&edge, "one", "1").await;
    reads_all(&edge, "two", "2").await;
    edge.is("one", "ok").await;
    writes(&edge, one).await;
    edge.reads("two", "temperature", "21.5").await;

    simulator.kill().await;
    edge.is("one", "offline").await;
    edge.is("two", "offline").await;
    let _simulator = Process::python(SIMULATOR, &["tcp", &port.to_string()]).await;
    let back = Back::now();
    edge.is("two", "ok").await;
    edge.is("one", "ok").await;
    back.recovered(&edge, "one", "20").await;
}

#[tokio::test]
async fn a_serial_line_is_spoken_on_and_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let line = directory.path().join("line").to_str().unwrap().to_owned();
    let mut simulator = Process::python(SIMULATOR, &["rtu", &line]).await;
    let config = |unit: u8| json!({"serialPort": line, "baudRate": 115_200, "dataBits": 8, "parity": "none", "stopBits": 1, "slaveID": unit});
    let (one, absent) = (
        device("one", "boiler", &config(1), &properties()),
        device("absent", "boiler", &config(77), &properties()[..2]),
    );
    let edge = Edge::start(directory.path(), vec![boiler()], vec![one.clone(), absent]);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    reads_all(&edge, "one", "1").await;
    writes(&edge, one.clone()).await;
    // Nobody answers for it, and the other takes its turns all the same.
    edge.is("absent", "offline").await;
    edge.is("one", "ok").await;

    // Slow, but within its time-out: written all the same.
    simulator.say("delay 0.3").await;
    let warm = desire(one, "temperature", "22.5");
    edge.update(warm).await;
    edge.reads("one", "temperature", "22.5").await;
    // Slower than that.
    simulator.say("delay 1.5").await;
    edge.is("one", "offline").await;
    simulator.say("delay 0").await;
    edge.is("one", "ok").await;

    simulator.kill().await;
    edge.is("one", "offline").await;
    let _simulator = Process::python(SIMULATOR, &["rtu", &line]).await;
    let back = Back::now();
    edge.is("one", "ok").await;
    back.recovered(&edge, "one", "22.5").await;
}

#[tokio::test]
async fn wrong_units_wrong_registers_and_slow_devices_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_port();
    let config = |unit, timeout| json!({"ip": "127.0.0.1", "port": port, "slaveID": unit, "timeout": timeout});
    let few = [("unit", holding(2, 1)), ("raw", holding(1, 1)), ("input", holding(9000, 1))];
    let devices = vec![
        device("fine", "boiler", &config(1, 1000), &few[..2]),
        device("wrong-unit", "boiler", &config(77, 200), &few[..2]),
        device("wrong-register", "boiler", &config(2, 1000), &few),
        device(
            "wrong-key",
            "boiler",
            &config(2, 1000),
            &[("unit", json!({"register": "Holding", "offset": -1})), few[1].clone()],
        ),
    ];
    let edge = Edge::start(directory.path(), vec![boiler()], devices);
    let mut simulator = Process::python(SIMULATOR, &["tcp", &port.to_string()]).await;
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    edge.is("fine", "ok").await;
    // pymodbus answers for a unit it does not have: device failure.
    edge.is("wrong-unit", "unhealthy").await;
    edge.is("wrong-register", "unhealthy").await;
    edge.is("wrong-key", "unhealthy").await;
    edge.reads("wrong-register", "unit", "2").await;
    edge.reads("wrong-key", "raw", "65535").await;

    // Slow, but within its time-out: read all the same.
    simulator.say("delay 0.3").await;
    edge.update(device("late", "boiler", &config(1, 3000), &few[..2])).await;
    edge.reads("late", "unit", "1").await;
    // Slower than the time-out of some.
    simulator.say("delay 1.2").await;
    edge.is("fine", "offline").await;
    simulator.say("delay 0").await;
    edge.is("fine", "ok").await;
}
