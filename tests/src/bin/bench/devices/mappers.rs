//! The memory of each mapper with a hundred devices, which are third parties' where there are any.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Child;

use super::*;

const DEVICES: usize = 100;

/// Whatever a mapper's devices are; it ends with this.
struct Peer(Vec<Child>);

impl Drop for Peer {
    fn drop(&mut self) {
        for child in &mut self.0 {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

pub(super) fn measure(bed: &Bed) -> Result<()> {
    for protocol in ["virtual", "modbus", "mqtt", "opcua", "http"] {
        eprintln!("{protocol}: {DEVICES} devices");
        let port = ports::free()?;
        let name = format!("some-{protocol}");
        let _peer = peer(protocol, port)?;
        bed.create("devicemodels", 1, |_| objects::model(&name, "ReadOnly"))?;
        let config = config(protocol, if protocol == "http" { bed.server.port() } else { port });
        let property = |number: usize| objects::read(&name, 1000, &visitor(protocol, number));
        bed.create("devices", DEVICES, |number| {
            let mut config = config.clone();
            if protocol == "mqtt" {
                config["clientID"] = format!("device-{number}").into();
            }
            objects::device(&format!("{name}-{number}"), &name, &config, property)
        })?;
        let mapper = bed.mapper(protocol, &name)?;
        bed.reached(&format!("{name}-"), DEVICES)?;
        sleep(SETTLE);
        tell("mapper.rss", &format!("mapper-{protocol}"), rss(mapper.pid())?, "MB");
        mapper.stop(Duration::from_secs(15));
    }
    Ok(())
}

fn peer(protocol: &str, port: u16) -> Result<Peer> {
    let python = |arguments: &[&str]| {
        let mut command = Command::new(paths::cache().join("venv/bin/python"));
        command.arg(paths::repository().join(format!("device-mappers/{protocol}/tests/simulator.py")));
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().context("cannot start a simulator: run scripts/install-deps")?;
        let mut output = BufReader::new(child.stdout.take().context("no output")?);
        output.read_line(&mut String::new())?;
        // What it says of each request is nobody's.
        std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        anyhow::Ok(Peer(vec![child]))
    };
    let port = port.to_string();
    match protocol {
        "modbus" => python(&["tcp", &port]),
        "opcua" => python(&[&port]),
        "mqtt" => {
            let broker = Command::new(paths::tool("mosquitto", "mosquitto")?)
                .args(["-p", &port])
                .stderr(Stdio::null())
                .spawn()?;
            let mut peer = Peer(vec![broker]);
            sleep(Duration::from_secs(1));
            let mut publisher = Command::new(paths::tool("mosquitto_pub", "mosquitto-clients")?);
            publisher.args(["-h", "127.0.0.1", "-p", &port, "-t", "plant/state", "-l"]).stdin(Stdio::piped());
            let mut publisher = publisher.spawn()?;
            let mut input = publisher.stdin.take().context("no input")?;
            peer.0.push(publisher);
            std::thread::spawn(move || {
                for round in 0_u64.. {
                    let numbers: Vec<String> =
                        (0..objects::PROPERTIES).map(|number| format!("\"p{number}\":{round}")).collect();
                    if writeln!(input, "{{{}}}", numbers.join(",")).is_err() {
                        return;
                    }
                    sleep(Duration::from_secs(1));
                }
            });
            Ok(peer)
        }
        _ => Ok(Peer(Vec::new())),
    }
}

fn config(protocol: &str, port: u16) -> serde_json::Value {
    match protocol {
        "modbus" => json!({"communicateMode": "TCP", "ip": "127.0.0.1", "port": port, "slaveID": 1}),
        "mqtt" => json!({"brokerURL": format!("tcp://127.0.0.1:{port}")}),
        "opcua" => json!({"url": format!("opc.tcp://127.0.0.1:{port}/")}),
        "http" => json!({"url": format!("http://127.0.0.1:{port}")}),
        _ => json!({}),
    }
}

fn visitor(protocol: &str, number: usize) -> serde_json::Value {
    match protocol {
        "modbus" => json!({"register": "HoldingRegister", "offset": 100 + number, "limit": 1}),
        "mqtt" => json!({"topic": "plant/state", "jsonPointer": format!("/p{number}")}),
        "opcua" => json!({"nodeID": "ns=2;s=count"}),
        "http" => json!({"path": "/state", "jsonPointer": format!("/p{number}")}),
        _ => json!({"pattern": "random"}),
    }
}
