//! What the SDK does for every mapper, tried with devices that are made up, mosquitto, and an HTTP server.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at the first thing that is not so")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use skerry_mapper::testing::{Edge, Process, desire, device, eventually, free_port, model};
use skerry_proto::dmi;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::process::Command;

const MAPPER: &str = env!("CARGO_BIN_EXE_skerry-mapper-virtual");

fn pump() -> dmi::DeviceModel {
    let mut model = model("pump", &[("speed", "DOUBLE!"), ("level", "INT"), ("name", "STRING!"), ("turns", "INT")]);
    let speed = &mut model.spec.as_mut().unwrap().properties[0];
    (speed.minimum, speed.maximum) = ("0".to_owned(), "3000".to_owned());
    model
}

fn properties() -> Vec<(&'static str, Value)> {
    vec![
        ("speed", json!({})),
        ("level", json!({"min": 0, "max": 10})),
        ("name", json!({})),
        ("turns", json!({"pattern": "counter"})),
    ]
}

fn pump_of(name: &str, config: &Value) -> dmi::Device {
    let mut device = device(name, "pump", config, &properties());
    device.spec.as_mut().unwrap().methods = vec![dmi::DeviceMethod {
        name: "run".to_owned(),
        description: String::new(),
        property_names: vec!["speed".to_owned(), "name".to_owned()],
    }];
    device
}

#[tokio::test]
async fn any_order_of_starts_and_restarts_converges() {
    let directory = tempfile::tempdir().unwrap();
    let mut edge = Edge::start(directory.path(), vec![], vec![]);
    edge.stop();
    // The mapper first.
    let mut mapper = Process::mapper(MAPPER, &edge, &[]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    edge.restart();
    let registrations = || edge.seen.lock().unwrap().registrations;
    eventually("it registers", || registrations() == 1, || registrations().to_string()).await;
    // A device before its model.
    let one = pump_of("one", &json!({}));
    edge.update(one.clone()).await;
    edge.mapper().await.create_device_model(dmi::CreateDeviceModelRequest { model: Some(pump()) }).await.unwrap();
    edge.is("one", "ok").await;
    edge.update(desire(one.clone(), "speed", "1500")).await;
    edge.reads("one", "speed", "1500").await;

    // edgecore ends and forgets: it is told everything again.
    edge.stop();
    {
        let mut seen = edge.seen.lock().unwrap();
        seen.models = vec![pump()];
        seen.twins.clear();
        seen.states.clear();
    }
    edge.restart();
    edge.reads("one", "speed", "1500").await;
    edge.is("one", "ok").await;
    assert_eq!(edge.written("one", "speed").as_deref(), Some("1500"));

    // The mapper ends: what is desired is written again.
    mapper.terminate().await;
    edge.seen.lock().unwrap().twins.clear();
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    edge.reads("one", "speed", "1500").await;

    // What edgecore has no more is gone.
    edge.stop();
    edge.seen.lock().unwrap().devices.clear();
    edge.restart();
    eventually(
        "it registers again",
        || edge.seen.lock().unwrap().registrations == 4,
        || format!("{}", edge.seen.lock().unwrap().registrations),
    )
    .await;
    let name = dmi::GetDeviceRequest { device_name: "one".to_owned(), device_namespace: "default".to_owned() };
    assert_eq!(edge.mapper().await.get_device(name).await.unwrap_err().code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn an_edgecore_that_takes_each_device_by_itself_is_told_as_much() {
    let directory = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..40).map(|number| format!("pump-{number}")).collect();
    let pumps = names.iter().map(|name| desire(pump_of(name, &json!({})), "speed", "1500")).collect();
    let edge = Edge::start(directory.path(), vec![pump()], pumps);
    edge.seen.lock().unwrap().apart = true;
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    for name in &names {
        edge.is(name, "ok").await;
        edge.reads(name, "speed", "1500").await;
        assert_eq!(edge.written(name, "speed").as_deref(), Some("1500"));
    }
}

#[tokio::test]
async fn a_device_that_an_answer_has_no_room_for_is_run_on() {
    let directory = tempfile::tempdir().unwrap();
    let mut edge = Edge::start(directory.path(), vec![pump()], vec![pump_of("one", &json!({}))]);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    edge.is("one", "ok").await;
    edge.stop();
    {
        let mut seen = edge.seen.lock().unwrap();
        seen.partial = true;
        seen.twins.clear();
    }
    edge.restart();
    let is_told = || edge.value("one", "turns").is_some();
    eventually("it is told of again", is_told, || edge.seen.lock().unwrap().registrations.to_string()).await;
}

#[tokio::test]
async fn a_desired_value_is_a_write_and_not_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let one = pump_of("one", &json!({}));
    let edge = Edge::start(directory.path(), vec![pump()], vec![one.clone()]);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    edge.is("one", "ok").await;
    let turns = || edge.value("one", "turns").and_then(|turns| turns.parse::<u64>().ok()).unwrap_or(0);
    eventually("it has counted", || turns() > 5, || turns().to_string()).await;
    for speed in ["100", "200", "300"] {
        let before = turns();
        edge.update(desire(one.clone(), "speed", speed)).await;
        edge.reads("one", "speed", speed).await;
        assert_eq!(edge.written("one", "speed").as_deref(), Some(speed));
        eventually("it goes on counting", || turns() > before, || turns().to_string()).await;
    }
    // Beyond the maximum, and to what is read only.
    edge.update(desire(desire(one.clone(), "speed", "3001"), "level", "1")).await;
    edge.is("one", "unhealthy").await;
    assert_eq!(edge.written("one", "level"), None);
    assert_eq!(edge.written("one", "speed").as_deref(), Some("300"));
    edge.update(one).await;
    edge.is("one", "ok").await;
}

#[tokio::test]
async fn methods_write_what_they_name() {
    let directory = tempfile::tempdir().unwrap();
    let devices = vec![pump_of("one", &json!({})), pump_of("away", &json!({"offline": true}))];
    let edge = Edge::start(directory.path(), vec![pump()], devices);
    let mut mapper = Process::mapper(MAPPER, &edge, &[]);
    edge.is("one", "ok").await;
    edge.is("away", "offline").await;
    let results = edge.call("one", "run", &[("speed", "42"), ("name", "a b")]).await.unwrap();
    let expected = [("speed", "42"), ("name", "a b")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(results, HashMap::from(expected));
    edge.reads("one", "speed", "42").await;
    let code = async |device: &str, method: &str, arguments: &[(&str, &str)]| {
        edge.call(device, method, arguments).await.unwrap_err().code()
    };
    assert_eq!(code("one", "fly", &[]).await, tonic::Code::Unimplemented);
    assert_eq!(code("one", "run", &[("speed", "42")]).await, tonic::Code::InvalidArgument);
    assert_eq!(code("one", "run", &[("speed", "9999"), ("name", "")]).await, tonic::Code::InvalidArgument);
    assert_eq!(code("away", "run", &[("speed", "42"), ("name", "")]).await, tonic::Code::Unavailable);
    assert_eq!(code("none", "run", &[]).await, tonic::Code::NotFound);
    edge.reads("one", "speed", "42").await;
    // What it wrote edgecore desires from then on: it stands, also after a restart.
    edge.update(desire(pump_of("one", &json!({})), "speed", "42")).await;
    let written = || edge.written("one", "speed");
    eventually("it is written", || written().as_deref() == Some("42"), || format!("{:?}", written())).await;
    mapper.terminate().await;
    edge.seen.lock().unwrap().twins.clear();
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    edge.reads("one", "speed", "42").await;
}

#[tokio::test]
async fn devices_that_fail_or_break_do_not_disturb_others() {
    let directory = tempfile::tempdir().unwrap();
    let devices = vec![
        pump_of("fine", &json!({})),
        pump_of("failing", &json!({"failEvery": 1})),
        pump_of("breaking", &json!({"breakEvery": 1})),
        pump_of("slow", &json!({"delay": 700})),
    ];
    let edge = Edge::start(directory.path(), vec![pump()], devices);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    edge.is("fine", "ok").await;
    edge.is("failing", "unhealthy").await;
    edge.is("breaking", "offline").await;
    edge.is("slow", "ok").await;
    edge.update(pump_of("breaking", &json!({}))).await;
    edge.is("breaking", "ok").await;
}

/// A device whose `turns` are pushed somewhere.
fn pushed(push: dmi::PushMethod) -> dmi::Device {
    let mut device = device("one", "pump", &json!({}), &[("turns", json!({"pattern": "counter"}))]);
    device.spec.as_mut().unwrap().properties[0].push_method = Some(push);
    device
}

/// What counted values lack, between the first and the last.
fn gaps(values: &[i64]) -> Vec<i64> {
    let (Some(first), Some(last)) = (values.iter().min(), values.iter().max()) else { return Vec::new() };
    (*first..=*last).filter(|value| !values.contains(value)).collect()
}

fn values(lines: &str) -> Vec<i64> {
    lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?["value"].as_i64()).collect()
}

#[tokio::test]
async fn an_mqtt_sink_that_was_away_misses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let port = free_port();
    let config = directory.path().join("mosquitto.conf");
    let persistence = directory.path().display();
    std::fs::write(&config, format!("listener {port} 127.0.0.1\nallow_anonymous true\npersistence true\npersistence_location {persistence}/\nuser root\n")).unwrap();
    let mosquitto =
        || Command::new("mosquitto").arg("-c").arg(&config).kill_on_drop(true).spawn().expect("scripts/install-deps");
    // Asked to end, it keeps what it has for the reader.
    let end = async |mut broker: tokio::process::Child| {
        Command::new("kill").arg(broker.id().unwrap().to_string()).status().await.unwrap();
        broker.wait().await.unwrap();
    };
    let mut broker = mosquitto();
    let received = directory.path().join("received");
    let subscriber = async || loop {
        let mut command = Command::new("mosquitto_sub");
        command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-t", "plant/#", "-q", "1", "-c", "-i", "reader"]);
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&received).unwrap();
        let mut child = command.stdout(file).kill_on_drop(true).spawn().unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        if child.try_wait().unwrap().is_none() {
            break child;
        }
    };
    let mut reader = subscriber().await;
    let mqtt = dmi::PushMethodMqtt {
        address: format!("tcp://127.0.0.1:{port}"),
        topic: "plant/one/turns".to_owned(),
        qos: 1,
        retained: false,
    };
    let edge = Edge::start(
        directory.path(),
        vec![pump()],
        vec![pushed(dmi::PushMethod { mqtt: Some(mqtt), ..dmi::PushMethod::default() })],
    );
    let mut mapper = Process::mapper(MAPPER, &edge, &[]);
    let seen = || values(&std::fs::read_to_string(&received).unwrap_or_default());
    eventually("values arrive", || seen().len() > 5, || seen().len().to_string()).await;

    end(broker).await;
    reader.kill().await.unwrap();
    let before = seen().len();
    tokio::time::sleep(Duration::from_secs(3)).await;
    broker = mosquitto();
    reader = subscriber().await;
    eventually("those of the time between arrive", || seen().len() > before + 35, || seen().len().to_string()).await;
    assert_eq!(gaps(&seen()), [0; 0], "{:?}", seen());

    // Those that wait when the mapper ends are pushed by the next one, whose device counts anew.
    end(broker).await;
    reader.kill().await.unwrap();
    let last = edge.value("one", "turns").unwrap().parse::<i64>().unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    mapper.terminate().await;
    broker = mosquitto();
    reader = subscriber().await;
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    let highest = || seen().into_iter().max().unwrap_or(0);
    eventually("those that waited arrive", || highest() > last + 10, || format!("{} of {last}", highest())).await;
    assert_eq!(gaps(&seen()), [0; 0]);
    end(broker).await;
    reader.kill().await.unwrap();
}

/// An HTTP server that keeps what is posted, and answers with what `status` says.
async fn server(status: Arc<Mutex<&'static str>>, got: Arc<Mutex<Vec<(String, String)>>>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut bytes = Vec::new();
            loop {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                if let Some((head, body)) = text.split_once("\r\n\r\n") {
                    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0");
                    if body.len() >= length.parse::<usize>().unwrap() {
                        let status = *status.lock().unwrap();
                        if status == "200 OK" {
                            got.lock().unwrap().push((head.to_owned(), body.to_owned()));
                        }
                        let _ = stream
                            .write_all(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").as_bytes())
                            .await;
                        bytes.clear();
                        continue;
                    }
                }
                if !matches!(stream.read_buf(&mut bytes).await, Ok(1..)) {
                    break;
                }
            }
        }
    };
    drop(skerry_mapper::task::spawn("server", serve));
    port
}

#[tokio::test]
async fn http_influx_and_file_sinks_get_their_batches() {
    let directory = tempfile::tempdir().unwrap();
    let (status, got) = (Arc::new(Mutex::new("503 Service Unavailable")), Arc::new(Mutex::new(Vec::new())));
    let port = server(Arc::clone(&status), Arc::clone(&got)).await;
    let (influx_status, influx_got) = (Arc::new(Mutex::new("200 OK")), Arc::new(Mutex::new(Vec::new())));
    let influx_port = server(influx_status, Arc::clone(&influx_got)).await;
    let file = directory.path().join("out/values.json");
    let influx = dmi::DbMethodInfluxdb2 {
        influxdb2_client_config: Some(dmi::Influxdb2ClientConfig {
            url: format!("http://127.0.0.1:{influx_port}"),
            org: "my org".to_owned(),
            bucket: "b".to_owned(),
        }),
        influxdb2_data_config: Some(dmi::Influxdb2DataConfig {
            measurement: "pumps".to_owned(),
            tag: HashMap::new(),
            field_key: "turns".to_owned(),
        }),
    };
    let push = dmi::PushMethod {
        http: Some(dmi::PushMethodHttp {
            hostname: "http://127.0.0.1".to_owned(),
            port: port.into(),
            requestpath: "/in".to_owned(),
            timeout: 1000,
        }),
        db_method: Some(dmi::DbMethod { influxdb2: Some(influx), ..dmi::DbMethod::default() }),
        file: Some(dmi::PushMethodFile { path: file.display().to_string(), max_bytes: 0 }),
        ..dmi::PushMethod::default()
    };
    let edge = Edge::start(directory.path(), vec![pump()], vec![pushed(push)]);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);

    // Away at first: everything arrives once it is there.
    tokio::time::sleep(Duration::from_secs(2)).await;
    *status.lock().unwrap() = "200 OK";
    let posted = || -> Vec<i64> {
        let got = got.lock().unwrap();
        let batches = got.iter().map(|(_, body): &(String, String)| serde_json::from_str::<Vec<Value>>(body).unwrap());
        batches.flatten().map(|value| value["value"].as_i64().unwrap()).collect()
    };
    eventually("posts arrive", || posted().len() > 20, || posted().len().to_string()).await;
    assert_eq!(gaps(&posted()), [0; 0]);
    assert_eq!(posted().iter().min(), Some(&1));
    assert!(got.lock().unwrap()[0].0.starts_with("POST /in HTTP/1.1\r\n"));

    let lines =
        || influx_got.lock().unwrap().iter().map(|(_, body): &(String, String)| body.clone()).collect::<String>();
    eventually("lines arrive", || lines().lines().count() > 5, lines).await;
    let head = influx_got.lock().unwrap()[0].0.clone();
    assert!(head.starts_with("POST /api/v2/write?org=my%20org&bucket=b&precision=ms HTTP/1.1\r\n"), "{head}");
    assert!(lines().starts_with("pumps,device=one turns=1i 1"), "{}", lines());

    let written = || values(&std::fs::read_to_string(&file).unwrap_or_default());
    eventually("lines are written", || written().len() > 5, || written().len().to_string()).await;
    assert_eq!(gaps(&written()), [0; 0]);
}
