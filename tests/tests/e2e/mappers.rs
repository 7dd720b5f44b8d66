//! The mappers that ship, as their examples have them: each in a pod, and what only one of them does.

use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skerry_tests::images::BUSYBOX;
use skerry_tests::process::Process;
use skerry_tests::wait::until;
use skerry_tests::{mapper, paths, ports};

use crate::world::{World, story};

/// Directories of `device-mappers`.
pub(crate) const MAPPERS: [&str; 5] = ["http", "modbus", "mqtt", "opcua", "virtual"];

#[test]
fn every_mapper_runs_in_a_pod_and_registers() -> Result<()> {
    story("mapper-pods", |world| {
        // The token that the example for HTTP takes.
        world.kubectl.run(&["create", "secret", "generic", "influxdb", "--from-literal=token=t"])?;
        for mapper in MAPPERS {
            let port = ports::free()?;
            let mut pod = pod(world, mapper, port)?;
            // It is healthy once it is registered.
            pod["spec"]["containers"][0]["readinessProbe"] = json!({
                "httpGet": {"host": "127.0.0.1", "port": port, "path": "/healthz"}, "periodSeconds": 1,
            });
            world.kubectl.create(&pod)?;
        }
        for mapper in MAPPERS {
            world.wait_ready(&format!("app=skerry-mapper-{mapper}"), 1)?;
        }
        Ok(())
    })
}

#[test]
fn a_method_of_an_opc_ua_server_is_called_at_the_box() -> Result<()> {
    story("opcua-method", |world| {
        let (port, directory) = (ports::free()?, world.dir().join("opcua"));
        fs::create_dir_all(&directory)?;
        let mut simulator = Command::new(mapper::python()?);
        simulator.arg(paths::repository().join("device-mappers/opcua/tests/simulator.py")).arg(port.to_string());
        let mut plant = Process::spawn("an OPC UA server", &mut simulator, &world.dir().join("opcua-server.log"))?;
        plant.wait_ready(30, || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok())?;
        let log = world.dir().join("mapper-opcua.log");
        let mapper = Process::spawn("the mapper", &mut mapper::command(&world.edge, "opcua", &directory)?, &log)?;
        world.kubectl.create(&json!({
            "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "DeviceModel", "metadata": {"name": "plant"},
            "spec": {"protocol": "opcua", "properties": [{"name": "temperature", "type": "DOUBLE", "accessMode": "ReadOnly"}]},
        }))?;
        let number = |name: &str| json!({"name": name, "type": "Int64"});
        let add = json!({
            "objectID": "ns=2;s=plant", "methodID": "ns=2;s=add", "inputs": [number("one"), number("two")], "outputs": ["sum"],
        });
        let visitor = json!({"protocolName": "opcua", "configData": {"nodeID": "ns=2;s=temperature"}});
        world.kubectl.create(&json!({
            "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device", "metadata": {"name": "plant"},
            "spec": {
                "deviceModelRef": {"name": "plant"}, "nodeName": world.edge.name(),
                "protocol": {"protocolName": "opcua", "configData": {"url": format!("opc.tcp://127.0.0.1:{port}/"), "methods": {"add": add}}},
                "properties": [{"name": "temperature", "visitors": visitor}], "methods": [{"name": "add"}],
            },
        }))?;
        let cli =
            |arguments: &[&str]| world.edge.cli(&[&["device"], arguments, &["-n", world.kubectl.namespace()]].concat());
        until("the server's value at the box", 60, || Ok(cli(&["get", "plant"])?.stdout.contains("21.5")))?;
        let called = cli(&["call", "plant", "add", "one=40", "two=2"])?;
        ensure!(called.stdout == "sum=42\n", "{}", called.text());
        let refused = cli(&["call", "plant", "add", "one=40"])?;
        ensure!(!refused.success && refused.text().contains("\"two\""), "{}", refused.text());
        let absent = cli(&["call", "plant", "subtract"])?;
        ensure!(!absent.success && absent.text().contains("it has: add"), "{}", absent.text());
        mapper.kill();
        plant.kill();
        Ok(())
    })
}

/// The objects of a mapper's example.
pub(crate) fn example(world: &World, mapper: &str) -> Result<Vec<Value>> {
    let example = paths::repository().join(format!("device-mappers/{mapper}/example.yaml"));
    let example = example.to_str().context("a path")?;
    // It prints one document behind the other.
    let objects = world.kubectl.run(&["create", "--dry-run=client", "-o", "json", "-f", example])?;
    Ok(serde_json::Deserializer::from_str(&objects).into_iter().collect::<serde_json::Result<_>>()?)
}

/// The pod of a mapper's example, with this bed's places and with the program and its libraries from this machine, for there is no image of it.
pub(crate) fn pod(world: &World, mapper: &str, port: u16) -> Result<Value> {
    let mut objects = example(world, mapper)?.into_iter();
    let set = objects.find(|object| object["kind"] == "DaemonSet").context("the example has no DaemonSet")?;
    let mut spec = set["spec"]["template"]["spec"].clone();
    let dmi = world.edge.dmi_socket();
    let product = paths::product(&format!("skerry-mapper-{mapper}"))?;
    let store = world.dir().join("mapper-store").join(mapper);
    fs::create_dir_all(&store)?;
    let places = [
        ("dmi", dmi.parent().context("a directory")?),
        ("store", &store),
        ("product", product.parent().context("a directory")?),
        ("lib", Path::new("/lib")),
        ("lib64", Path::new("/lib64")),
    ];
    spec["volumes"] = places.iter().map(|(name, path)| json!({"name": name, "hostPath": {"path": path}})).collect();
    spec["nodeName"] = world.edge.name().into();
    let container = &mut spec["containers"][0];
    container["volumeMounts"] = places.iter().map(|(name, path)| json!({"name": name, "mountPath": path})).collect();
    container["image"] = BUSYBOX.into();
    container["command"] = json!([product]);
    container["args"] = json!([
        format!("--metrics=127.0.0.1:{port}"),
        format!("--dmi-socket={}", dmi.display()),
        format!("--store={}", store.display()),
    ]);
    container["livenessProbe"]["tcpSocket"]["port"] = port.into();
    container["livenessProbe"]["periodSeconds"] = 1.into();
    let labels = &set["spec"]["template"]["metadata"]["labels"];
    let metadata = json!({"name": format!("mapper-{mapper}"), "labels": labels});
    Ok(json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}))
}
