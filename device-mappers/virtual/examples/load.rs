//! What a mapper costs: `load BINARY [--devices N] [--properties N] [--cycle MS] [--push none|file|mqtt://…] [--seconds N]`.
//!
//! Runs the virtual mapper's binary with that many devices against the stand-in for edgecore (whose cost is not counted), and prints
//! what it read, reported and pushed in a second, its share of a core, and its memory.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "an example ends with what went wrong"
)]

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;
use skerry_mapper::clock;
use skerry_mapper::testing::{Edge, Process, device, free_port, model};
use skerry_proto::dmi;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

async fn counters(port: u16) -> HashMap<String, f64> {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let values = text.lines().filter_map(|line| line.split_once(' '));
    values.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()
}

/// Seconds of CPU that a process has used.
fn cpu(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_ascii_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

fn memory(pid: u32, key: &str) -> f64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let binary = arguments.next().unwrap();
    let options: Vec<String> = arguments.collect();
    let option = |name: &str, usual: &str| {
        let place = options.iter().position(|option| option == name);
        place.and_then(|place| options.get(place + 1)).map_or(usual, String::as_str).to_owned()
    };
    let number = |name: &str, usual: &str| option(name, usual).parse::<usize>().unwrap();
    let (devices, properties) = (number("--devices", "100"), number("--properties", "10"));
    let (cycle, seconds, push) = (number("--cycle", "1000"), number("--seconds", "20"), option("--push", "none"));

    let directory = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..properties).map(|index| format!("value-{index}")).collect();
    let model = model("load", &names.iter().map(|name| (name.as_str(), "DOUBLE")).collect::<Vec<_>>());
    let visitors: Vec<_> = names.iter().map(|name| (name.as_str(), json!({"pattern": "random"}))).collect();
    let method = match push.as_str() {
        "none" => None,
        "file" => {
            let path = directory.path().join("values").display().to_string();
            let file = dmi::PushMethodFile { path, max_bytes: 64 << 20 };
            Some(dmi::PushMethod { file: Some(file), ..dmi::PushMethod::default() })
        }
        address => {
            let mqtt =
                dmi::PushMethodMqtt { address: address.to_owned(), topic: "load".to_owned(), qos: 1, retained: false };
            Some(dmi::PushMethod { mqtt: Some(mqtt), ..dmi::PushMethod::default() })
        }
    };
    let devices = (0..devices).map(|index| {
        let mut device = device(&format!("device-{index}"), "load", &json!({}), &visitors);
        for property in &mut device.spec.as_mut().unwrap().properties {
            property.collect_cycle = i64::try_from(cycle).unwrap();
            property.push_method.clone_from(&method);
        }
        device
    });
    let edge = Edge::start(directory.path(), vec![model], devices.collect());
    let port = free_port();
    let mapper = Process::mapper(&binary, &edge, &["--metrics", &format!("127.0.0.1:{port}")]);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (before, used, begin) = (counters(port).await, cpu(mapper.pid()), clock::monotonic());
    tokio::time::sleep(Duration::from_secs(seconds as u64)).await;
    let (after, used_after, took) =
        (counters(port).await, cpu(mapper.pid()), (clock::monotonic() - begin).as_secs_f64());
    let rate = |name: &str| {
        let name = format!("skerry_mapper_{name}_total");
        (after[&name] - before[&name]) / took
    };
    println!(
        "values/s {:.0}  reports/s {:.0}  pushed/s {:.0}  dropped/s {:.0}  cpu {:.1} %  rss {:.1} MB  pss {:.1} MB",
        rate("values"),
        rate("reports"),
        rate("pushed_values"),
        rate("dropped_values"),
        (used_after - used) / took * 100.0,
        memory(mapper.pid(), "Rss:"),
        memory(mapper.pid(), "Pss:"),
    );
}
