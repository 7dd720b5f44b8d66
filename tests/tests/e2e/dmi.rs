//! A mapper that others wrote against KubeEdge's interface, in Python with everything at its default, on a node with a cloud.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skerry_tests::paths;
use skerry_tests::process::Process;
use skerry_tests::wait::{eventually, until};

use crate::world::{World, story};

/// A mapper's process, and what it says.
struct Mapper {
    process: Process,
    log: PathBuf,
}

impl Mapper {
    fn start(world: &World, name: &str) -> Result<Self> {
        let python = paths::cache().join("venv/bin/python");
        ensure!(python.exists(), "{} is missing: run scripts/install-deps", python.display());
        let repository = paths::repository();
        let log = world.dir().join(format!("{name}.log"));
        let mut command = Command::new(python);
        command.arg(repository.join("tests/mappers/python/mapper.py")).arg(repository.join("proto/dmi"));
        command.arg(world.edge.dmi_socket()).arg(world.dir().join("mapper.sock")).arg("thermostat");
        let process = Process::spawn(name, &mut command, &log)?;
        Ok(Self { process, log })
    }

    /// What it said so far.
    fn said(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits until it was called so, or answered; whatever it said then.
    fn wait(&self, call: &str, what: impl Fn(&Value) -> bool) -> Result<Value> {
        let wanted = format!("a mapper to be called: {call}");
        eventually(&wanted, 30, || Ok(self.said().into_iter().find(|said| said["call"] == call && what(said))))
            .with_context(|| format!("it said: {:?}", self.said()))
    }
}

#[test]
fn a_mapper_in_another_language_works_unchanged() -> Result<()> {
    story("dmi-python", |world| {
        let namespace = world.kubectl.namespace().to_owned();
        // The mapper is there before there is anything for it.
        let mapper = Mapper::start(world, "mapper")?;
        until("the mapper to be registered", 60, || {
            Ok(mapper.said().iter().any(|said| said["registered"] == "thermostat"))
        })?;
        world.kubectl.create(&json!({
            "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "DeviceModel", "metadata": {"name": "thermostat"},
            "spec": {"protocol": "thermostat", "properties": [
                {"name": "temperature", "type": "INT", "accessMode": "ReadWrite", "minimum": "5", "maximum": "35", "unit": "°C"}]},
        }))?;
        world.kubectl.create(&json!({
            "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device", "metadata": {"name": "hall"},
            "spec": {
                "deviceModelRef": {"name": "thermostat"}, "nodeName": world.edge.name(),
                "protocol": {"protocolName": "thermostat", "configData": {"port": 7, "scale": 0.5, "name": "x", "fast": true}},
                "properties": [{"name": "temperature", "reportToCloud": true, "visitors": {"protocolName": "thermostat", "configData": {"at": 3}}}],
                "methods": [{"name": "warm", "propertyNames": ["temperature"]}],
            },
        }))?;
        let told = mapper.wait("register", |said| said["device"] == "hall")?;
        ensure!(told["protocol"] == json!({"port": 7, "scale": 0.5, "name": "x", "fast": true}), "it was told {told}");
        ensure!(told["visitors"]["temperature"] == json!({"at": 3}), "it was told {told}");
        until("the status in the cloud", 30, || {
            let status = world.kubectl.find("devicestatus", "hall")?.unwrap_or_default();
            Ok(status["status"]["twins"][0]["reported"]["value"] == "20" && status["status"]["state"] == "online")
        })?;

        // The cloud writes, then somebody at the box.
        let desired = |value: &str| {
            json!({"spec": {"properties": [
            {"name": "temperature", "reportToCloud": true, "desired": {"value": value}, "visitors": {"protocolName": "thermostat", "configData": {"at": 3}}}]}})
        };
        world.kubectl.patch("device", "hall", &desired("25"))?;
        mapper.wait("update", |said| said["desired"]["temperature"] == "25")?;
        let cli = |arguments: &[&str]| {
            let output = world.edge.cli(&[&["device"], arguments, &["-n", &namespace]].concat())?;
            ensure!(output.success, "edgecore device {arguments:?} failed: {}", output.text());
            Ok(output.stdout)
        };
        let listed = cli(&["list"])?;
        let row = listed.lines().find(|line| line.split_whitespace().nth(1) == Some("hall"));
        let row: Vec<&str> =
            row.with_context(|| format!("edgecore device list shows {listed:?}"))?.split_whitespace().collect();
        ensure!(
            row[2] == "thermostat" && row[4] == "online" && row.last() == Some(&"yes"),
            "edgecore device list shows {row:?}"
        );
        let mut watch = world.edge.command(&["device", "watch"])?;
        watch.args(["hall", "--property", "temperature", "-n", &namespace, "-o", "json"]);
        let watch = Process::spawn("a watch", &mut watch, &world.dir().join("watch.log"))?;
        until("the watch to show what is", 20, || Ok(watch.log_tail(20).contains("\"25\"")))?;
        cli(&["set", "hall", "temperature=30"])?;
        until("the watch to show what comes", 20, || Ok(watch.log_tail(20).contains("\"30\"")))?;
        watch.kill();
        mapper.wait("update", |said| said["desired"]["temperature"] == "30")?;
        until("the value at the box", 10, || Ok(cli(&["get", "hall"])?.contains("30°C")))?;
        ensure!(cli(&["call", "hall", "warm", "temperature=31"])? == "temperature=31\n");
        ensure!(cli(&["history", "hall", "temperature"])?.lines().count() > 2);
        let refused = world.edge.cli(&["device", "set", "hall", "temperature=90", "-n", &namespace])?;
        ensure!(!refused.success && refused.text().contains("above its maximum 35"), "{}", refused.text());

        // edgecore dies; the mapper knows nothing of it, and all is as it was.
        let calls = mapper.said().len();
        world.edge.kill();
        world.edge.start()?;
        eventually("the mapper to be told again", 30, || {
            Ok(mapper.said().into_iter().skip(calls).find(|said| said["call"] == "update"))
        })
        .and_then(|said| {
            ensure!(said["desired"]["temperature"] == "31", "it was told {said}");
            Ok(())
        })?;
        until("the twin to be ready", 30, || {
            let output = world.edge.cli(&["device", "get", "hall", "-n", &namespace, "-o", "json"])?;
            let twin: Value = serde_json::from_str(&output.stdout).unwrap_or_default();
            Ok(twin["ready"] == true && twin["state"] == "online")
        })?;
        // The mapper dies and comes back, with the answer to its registration.
        mapper.process.kill();
        let mapper = Mapper::start(world, "mapper-again")?;
        mapper.wait("answer", |said| said["desired"]["temperature"] == "31")?;
        world.kubectl.delete("device", "hall")?;
        mapper.wait("remove", |said| said["device"] == "hall")?;
        mapper.process.kill();
        Ok(())
    })
}
