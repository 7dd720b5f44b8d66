//! A device of pymodbus behind the Modbus mapper, on a node with a cloud: with it, without it, and when everything falls over.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skerry_tests::cloudcore::kubelet_address;
use skerry_tests::kubectl::{Kubectl, restarts};
use skerry_tests::mapper::{self, Modbus};
use skerry_tests::ports;
use skerry_tests::process::Process;
use skerry_tests::wait::{stays, until};

use crate::mappers;
use crate::world::{World, control, story};

#[test]
fn a_modbus_device_follows_the_cloud_and_the_box_through_cuts_and_crashes() -> Result<()> {
    story("modbus", |world| {
        let directory = world.dir().join("modbus");
        let mut plant = Modbus::start(&directory, false)?;
        let mapper = start_mapper(world, &directory)?;
        world.kubectl.create(&model())?;
        world.kubectl.create(&device(world.edge.name(), plant.port(), &desired("19.5", None)))?;
        register(&plant, 0, 195, "what the Device was created with")?;
        world.kubectl.patch("device", "boiler", &desired("23", None))?;
        register(&plant, 0, 230, "what was patched")?;
        plant.set_register(1, 100, 42)?;
        until("a register's change in the DeviceStatus", 10, || {
            Ok(shown(world, "level", "reported")?["value"] == "42")
        })?;
        until("the state", 30, || Ok(world.kubectl.get("device", "boiler")?["status"]["state"] == "ok"))?;

        // Without a link: somebody at the box writes both, and meanwhile somebody in the cloud does, with one value that was wanted earlier.
        world.relay.cut();
        let earlier = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
        at_the_box(world, &["set", "boiler", "temperature=25", "speed=7"])?;
        register(&plant, 0, 250, "what was set at the box")?;
        register(&plant, 2, 7, "what was set at the box")?;
        world.kubectl.patch("device", "boiler", &desired("23", Some(("3", earlier))))?;

        // The device forgets everything and is back.
        plant.kill();
        until("the device to be missed", 30, || Ok(state(world)? == "offline"))?;
        plant.restart()?;
        until("what is wanted to be written to a device that is back", 30, || Ok(plant.register(1, 0)? == 250))?;

        // All of it falls over but the disk.
        world.edge.kill();
        mapper.kill();
        plant.restart()?;
        let mapper = start_mapper(world, &directory)?;
        world.edge.start()?;
        register(&plant, 0, 250, "what is wanted, after all came back without a link")?;
        register(&plant, 2, 7, "what is wanted, after all came back without a link")?;

        world.kubectl.patch("device", "boiler", &desired("21", Some(("3", earlier))))?;
        world.relay.heal();
        register(&plant, 0, 210, "the cloud's value, which is newer")?;
        until("both values in the DeviceStatus", 30, || {
            let (cloud, local) =
                (shown(world, "temperature", "observedDesired")?, shown(world, "speed", "observedDesired")?);
            let are = |value: &Value, what, origin| value["value"] == what && value["metadata"]["origin"] == origin;
            Ok(are(&cloud, "21", "cloud") && are(&local, "7", "cli"))
        })?;
        register(&plant, 2, 7, "the box's value, which is newer")?;
        until("the device to be well", 30, || Ok(state(world)? == "ok"))?;
        mapper.kill();
        Ok(())
    })
}

#[test]
fn a_mapper_in_a_pod_comes_back_from_a_power_cut_without_a_link() -> Result<()> {
    story("modbus-pod", |world| {
        let mut plant = Modbus::start(&world.dir().join("modbus"), false)?;
        let port = ports::free()?;
        world.kubectl.create(&mappers::pod(world, "modbus", port)?)?;
        world.kubectl.create(&model())?;
        world.kubectl.create(&device(world.edge.name(), plant.port(), &desired("19.5", None)))?;
        register(&plant, 0, 195, "what the Device was created with")?;
        let pod = world.wait_ready("app=skerry-mapper-modbus", 1)?.remove(0);
        stays("the mapper's container under its probe", Duration::from_secs(8), || {
            Ok(restarts(&world.kubectl.get("pod", "mapper-modbus")?) == restarts(&pod))
        })?;
        through_the_cloud(world, &plant)?;

        world.relay.cut();
        at_the_box(world, &["set", "boiler", "temperature=25"])?;
        register(&plant, 0, 250, "what was set at the box")?;
        world.edge.kill();
        world.runtime.power_off(&[&world.edge.pods()])?;
        plant.restart()?;
        world.runtime.boot()?;
        world.edge.start()?;
        register(&plant, 0, 250, "what was set before the power was gone")?;
        until("the device to be well without a link", 30, || Ok(state(world)? == "ok"))?;
        world.relay.heal();
        world.wait_connected()?;
        until(
            "the state to be known to the cloud",
            30,
            || Ok(shown(world, "temperature", "reported")?["value"] == "25"),
        )
    })
}

/// What is asked of the node itself for its devices comes through cloudcore, and a method is called by whoever may.
fn through_the_cloud(world: &World, plant: &Modbus) -> Result<()> {
    let boiler = format!("/devices/{}/boiler", world.kubectl.namespace());
    let listed: Value = serde_json::from_str(&world.page("/devices")?)?;
    ensure!(listed.to_string().contains("boiler"), "{listed}");
    let twin: Value = serde_json::from_str(&world.page(&boiler)?)?;
    ensure!(twin["properties"][0]["reported"]["value"] == "19.5", "{twin}");
    let values = world.page("/devices/values?follow=false")?;
    let lines = values.lines().map(serde_json::from_str).collect::<serde_json::Result<Vec<Value>>>()?;
    ensure!(lines.iter().any(|line| line["value"] == "19.5"), "{values}");
    // As the apiserver proxies it, where it reaches cloudcore.
    let proxy = format!("/api/v1/nodes/{}/proxy", world.edge.name());
    let is_proxied = !kubelet_address().is_loopback();
    if is_proxied {
        let proxied: Value = world.admin().run(&["get", "--raw", &format!("{proxy}{boiler}")])?.parse()?;
        ensure!(proxied["properties"][0]["reported"]["value"] == "19.5", "{proxied}");
    }

    // Followed: what is, then what comes.
    let mut follow = world.admin().command();
    if is_proxied {
        follow.args(["get", "--raw", &format!("{proxy}/devices/values")]);
    } else {
        follow.args([
            "--server",
            &world.kubelet()?,
            "--insecure-skip-tls-verify=true",
            "get",
            "--raw",
            "/devices/values",
        ]);
    }
    let follow = Process::spawn("values that are followed", &mut follow, &world.dir().join("values.log"))?;
    let followed = |value: &str| {
        let is_there = |line: &Value| line["property"] == "level" && line["value"] == value;
        until(&format!("level {value} to be followed"), 30, || {
            let lines = fs::read_to_string(follow.log())?;
            Ok(lines.lines().filter_map(|line| serde_json::from_str(line).ok()).any(|line| is_there(&line)))
        })
    };
    followed("7")?;
    plant.set_register(1, 100, 77)?;
    followed("77")?;
    follow.kill();
    let metrics = world.page("/metrics/devices")?;
    let labels = format!("namespace=\"{}\",device=\"boiler\",property=\"temperature\"", world.kubectl.namespace());
    ensure!(metrics.contains(&format!("device_property_value{{{labels}}} 19.5 ")), "{metrics}");

    let arguments = world.dir().join("arguments");
    fs::write(&arguments, json!({"arguments": {"temperature": "21.5"}}).to_string())?;
    let method = format!("{boiler}/methods/heat");
    let call = ["create", "--raw", &method, "-f", arguments.to_str().context("a path")?];
    let nobody = control()?.certificate_kubeconfig("nobody", "nobody", &[])?;
    let refused = world.straight(&Kubectl::new(&nobody, world.dir())?, &call)?;
    ensure!(!refused.success && refused.stderr.contains("orbidden"), "{}", refused.text());
    let called = world.straight(world.admin(), &call)?;
    ensure!(called.success, "{}", called.text());
    register(plant, 0, 215, "what a method said")?;
    if is_proxied {
        fs::write(&arguments, json!({"arguments": {"temperature": "22.5"}}).to_string())?;
        let proxied = world.admin().run(&["create", "--raw", &format!("{proxy}{method}"), call[3], call[4]])?;
        ensure!(proxied.contains("22.5"), "{proxied}");
        register(plant, 0, 225, "what a method said through the apiserver")?;
    }
    Ok(())
}

fn start_mapper(world: &World, directory: &Path) -> Result<Process> {
    let log = world.dir().join("mapper-modbus.log");
    Process::spawn("the modbus mapper", &mut mapper::command(&world.edge, "modbus", directory)?, &log)
}

fn register(plant: &Modbus, address: u16, value: u16, what: &str) -> Result<()> {
    until(&format!("register {address} to be {value}: {what}"), 30, || Ok(plant.register(1, address)? == value))
        .with_context(|| format!("it is {:?}", plant.register(1, address)))
}

/// `edgecore device …`
fn at_the_box(world: &World, arguments: &[&str]) -> Result<String> {
    let namespace = world.kubectl.namespace();
    let output = world.edge.cli(&[&["device"], arguments, &["-n", namespace]].concat())?;
    ensure!(output.success, "edgecore device {arguments:?} failed: {}", output.text());
    Ok(output.stdout)
}

fn state(world: &World) -> Result<String> {
    let twin: Value = serde_json::from_str(&at_the_box(world, &["get", "boiler", "-o", "json"])?)?;
    Ok(twin["state"].as_str().unwrap_or_default().to_owned())
}

/// What the DeviceStatus shows of a property.
fn shown(world: &World, property: &str, what: &str) -> Result<Value> {
    let status = world.kubectl.find("devicestatus", "boiler")?.unwrap_or_default();
    let twins = status["status"]["twins"].as_array().into_iter().flatten();
    Ok(twins.filter(|twin| twin["propertyName"] == property).map(|twin| twin[what].clone()).next().unwrap_or_default())
}

fn model() -> Value {
    json!({
        "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "DeviceModel", "metadata": {"name": "boiler"},
        "spec": {"protocol": "modbus", "properties": [
            {"name": "temperature", "type": "FLOAT", "accessMode": "ReadWrite", "minimum": "5", "maximum": "90"},
            {"name": "speed", "type": "INT", "accessMode": "ReadWrite"},
            {"name": "level", "type": "INT", "accessMode": "ReadOnly"}]},
    })
}

fn device(node: &str, port: u16, properties: &Value) -> Value {
    let protocol = json!({"protocolName": "modbus", "configData": {"communicateMode": "TCP", "ip": "127.0.0.1", "port": port, "slaveID": 1}});
    json!({
        "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device", "metadata": {"name": "boiler"},
        "spec": {
            "deviceModelRef": {"name": "boiler"}, "nodeName": node, "protocol": protocol,
            "properties": properties["spec"]["properties"],
            "methods": [{"name": "heat", "propertyNames": ["temperature"]}],
        },
    })
}

/// The device's properties with what they should be; that of `speed` as of a time in milliseconds since the Unix epoch.
fn desired(temperature: &str, speed: Option<(&str, i64)>) -> Value {
    let property = |name: &str, offset: u16, scale: f64, desired: Value| {
        let visitor = json!({"register": "HoldingRegister", "offset": offset, "limit": 1, "scale": scale});
        json!({
            "name": name, "collectCycle": 200, "reportCycle": 1000, "reportToCloud": true, "desired": desired,
            "visitors": {"protocolName": "modbus", "configData": visitor},
        })
    };
    let speed = speed.map(|(value, at)| json!({"value": value, "metadata": {"timestamp": at.to_string()}}));
    json!({"spec": {"properties": [
        property("temperature", 0, 0.1, json!({"value": temperature})),
        property("speed", 2, 1.0, json!(speed)),
        property("level", 100, 1.0, Value::Null),
    ]}})
}
