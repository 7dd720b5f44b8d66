//! Devices over MQTT on a node with a cloud: mosquitto's clients and paho-mqtt, who may write, a broker that dies, and no broker.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use skerry_tests::kubectl::{condition, is_ready};
use skerry_tests::process::{self, Process};
use skerry_tests::wait::{eventually, until};
use skerry_tests::{mapper, paths, ports, procfs};

use crate::world::{World, story};

const PASSWORD: &str = "secret";
const CONDITION: &str = "MQTTBrokerReady";

#[test]
fn clients_of_a_broker_on_the_box_speak_with_devices() -> Result<()> {
    story("mqtt", |world| {
        let namespace = world.kubectl.namespace().to_owned();
        let passwords = world.edge.data().join("mqtt-passwd");
        for (user, create) in [("app1", &["-c", "-b"][..]), ("app2", &["-b"])] {
            let mut command = Command::new("mosquitto_passwd");
            let made = process::run(command.args(create).arg(&passwords).args([user, PASSWORD]), 10)?;
            ensure!(made.success, "mosquitto_passwd: {}", made.text());
        }
        world.kubectl.create(&json!({
            "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "DeviceModel", "metadata": {"name": "press"},
            "spec": {"protocol": "mqtt-itself", "properties": [
                {"name": "level", "type": "INT", "accessMode": "ReadWrite", "minimum": "0", "maximum": "100"}]},
        }))?;
        world.kubectl.create(&json!({
            "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device",
            "metadata": {"name": "press", "annotations": {"skerry.dev/mqtt-writers": "app1"}},
            "spec": {
                "deviceModelRef": {"name": "press"}, "nodeName": world.edge.name(), "protocol": {"protocolName": "mqtt-itself"},
                "properties": [{"name": "level", "reportToCloud": true, "reportCycle": 1000}],
            },
        }))?;
        until("a broker", 30, || Ok(world.edge.status()?.contains("started by edgecore")))?;
        let heard = Heard::listen(world)?;

        // An app that may, of an older release, which knows no namespaces.
        let answers = eventually("the app to be answered", 30, || paho(world, "app1").map(Some))?;
        let of =
            |end: &str| answers.iter().find(|said| said["topic"].as_str().is_some_and(|topic| topic.ends_with(end)));
        let answer = |end| of(end).map(|said| &said["answer"]).with_context(|| format!("no {end} in {answers:?}"));
        // What the story before had may not be gone yet.
        let members = answer("membership/get/result")?["devices"].as_array().cloned().unwrap_or_default();
        ensure!(members.iter().any(|member| member["name"] == "press"), "{answers:?}");
        ensure!(answer("state/update/result")?["device"]["state"] == "online", "{answers:?}");
        for end in ["twin/update/result", "twin/get/result"] {
            let twin = &answer(end)?["twin"]["level"];
            ensure!(twin["actual"]["value"] == "5" && twin["expected"]["value"] == "9", "{answers:?}");
        }
        heard.hears(&format!("devices/{namespace}/press/level 5"))?;
        heard.hears(&format!("devices/{namespace}/press/$state online"))?;
        heard.hears(r#""delta":{"level":"9"}"#)?;
        heard.hears(&format!("$hw/events/device/{namespace}/press/twin/update/document "))?;
        until("the DeviceStatus", 30, || {
            let status = world.kubectl.find("devicestatus", "press")?.unwrap_or_default();
            Ok(status["status"]["twins"][0]["reported"]["value"] == "5" && status["status"]["state"] == "online")
        })?;

        // Those that may not: another app, and whoever has no password; nor does anybody but edgecore write values.
        let update =
            |value: &str| json!({"event_id": "x", "twin": {"level": {"expected": {"value": value}}}}).to_string();
        let topic = format!("$hw/events/device/{namespace}/press/twin/update");
        for (user, topic) in
            [(Some("app2"), topic.as_str()), (None, &topic), (None, "$hw/events/device/press/twin/update")]
        {
            publish(user, topic, &update("77"))?;
            // What the device's own program would take for edgecore's word.
            publish(user, &format!("{topic}/delta"), r#"{"delta":{"level":"77"}}"#)?;
        }
        publish(Some("app1"), &format!("devices/{namespace}/press/level"), "77")?;
        publish(Some("app1"), &topic, &update("12"))?;
        heard.hears(r#""delta":{"level":"12"}"#)?;
        publish(Some("app1"), &topic, &update("101"))?;
        heard.hears("level is 101, above its maximum 100")?;
        let log = heard.text();
        ensure!(!log.contains("\"77\"") && !log.contains("level 77"), "what was not allowed was carried:\n{log}");
        let twin = twin(world)?;
        let desired = &twin["properties"][0]["desired"];
        ensure!(desired["value"] == "12" && desired["origin"] == "mqtt", "it is {twin}");
        let metrics = metrics(world)?;
        let counted = |line: &str| metrics.lines().any(|said| said.starts_with(line) && !said.ends_with(" 0"));
        for name in ["connected", "published_total", "requests_total", "refused_total"] {
            ensure!(counted(&format!("skerry_mqtt_{name} ")), "{name} is not counted:\n{metrics}");
        }

        // Killed: edgecore starts another one, and publishes again what is retained.
        let edgecore = world.edge.pid().context("edgecore runs")?;
        let broker =
            procfs::processes().into_iter().find(|entry| entry.parent == edgecore && entry.program() == "mosquitto");
        kill(Pid::from_raw(broker.context("mosquitto is edgecore's child")?.pid), Signal::SIGKILL)?;
        until("the value to be retained by the next broker", 30, || {
            let topic = format!("devices/{namespace}/press/level");
            let mut command = Command::new("mosquitto_sub");
            let output = process::run(command.args(["-C", "1", "-W", "1", "-t", &topic]), 10)?;
            Ok(output.stdout.trim() == "5")
        })?;

        // None: it is said why, at the box and on the Node, and everything else works.
        wait_told(world, "True", "started by edgecore")?;
        world.edge.kill();
        let (dir, hidden) = (world.dir().join("hidden"), "/usr/sbin/mosquitto");
        ensure!(Path::new(hidden).exists(), "{hidden} is not where Debian has it");
        std::fs::create_dir_all(&dir)?;
        let dir = dir.display();
        world.edge.start_apart(&format!(
            "mount -t tmpfs none {dir}; mknod {dir}/mosquitto c 0 0; mount -t overlay -o lowerdir={dir}:/usr/sbin none /usr/sbin"
        ))?;
        until("the reason to be said", 30, || Ok(world.edge.status()?.contains("mosquitto is not installed")))?;
        wait_told(world, "False", "`apt install mosquitto` brings it")?;
        ensure!(is_ready(&world.node()?), "the node is not Ready: {}", world.node()?);
        let set = world.edge.cli(&["device", "set", "press", "level=3", "-n", &namespace])?;
        ensure!(set.success, "a write without a broker: {}", set.text());
        ensure!(self::twin(world)?["properties"][0]["desired"]["origin"] == "cli", "{}", self::twin(world)?);

        // Somebody else's comes and goes.
        let port = ports::free()?;
        let at = format!("127.0.0.1:{port}");
        world.edge.configure("mqtt_broker", &at)?;
        world.restart_edge()?;
        let missed = wait_told(world, "False", &format!("no broker at {at}"))?;
        let log = world.dir().join("mosquitto.log");
        let start = || Process::spawn("mosquitto", Command::new("mosquitto").args(["-p", &port.to_string()]), &log);
        let broker = start()?;
        let came = wait_told(world, "True", &at)?;
        broker.kill();
        let went = wait_told(world, "False", &format!("no broker at {at}"))?;
        let _broker = start()?;
        let back = wait_told(world, "True", &at)?;
        ensure!(missed < came && came < went && went < back, "it changed at {missed}, {came}, {went} and {back}");

        // Who has no device needs none.
        world.edge.configure("mqtt_broker", "auto")?;
        world.restart_edge()?;
        world.wait_connected()?;
        wait_told(world, "True", "started by edgecore")?;
        world.kubectl.delete("device", "press")?;
        until("the Node to say nothing of a broker", 60, || Ok(condition(&world.node()?, CONDITION).is_empty()))?;
        std::fs::remove_file(&passwords)?;
        Ok(())
    })
}

/// Waits until the Node says this of the broker; since when it is so.
fn wait_told(world: &World, status: &str, words: &str) -> Result<String> {
    let what = format!("{CONDITION} to be {status}: {words}");
    eventually(&what, 60, || {
        let node = world.node()?;
        let all = node["status"]["conditions"].as_array().into_iter().flatten();
        let found = all.into_iter().find(|condition| condition["type"] == CONDITION);
        Ok(found.and_then(|found| {
            let is_it = found["status"] == status && found["message"].as_str()?.contains(words);
            is_it.then(|| found["lastTransitionTime"].as_str().map(str::to_owned))?
        }))
    })
}

/// The page, as the box itself serves it.
fn metrics(world: &World) -> Result<String> {
    let mut socket = UnixStream::connect(world.edge.data().join("edgecore.sock"))?;
    socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: box\r\nconnection: close\r\n\r\n")?;
    let mut page = String::new();
    socket.read_to_string(&mut page)?;
    Ok(page)
}

fn twin(world: &World) -> Result<Value> {
    let output = world.edge.cli(&["device", "get", "press", "-o", "json", "-n", world.kubectl.namespace()])?;
    ensure!(output.success, "edgecore device get: {}", output.text());
    Ok(serde_json::from_str(&output.stdout)?)
}

/// The answers that the app gets.
fn paho(world: &World, user: &str) -> Result<Vec<Value>> {
    let script = paths::repository().join("tests/mappers/python/client.py");
    let mut command = Command::new(mapper::python()?);
    command.arg(script).args([world.edge.name(), "press", user, PASSWORD]);
    let output = process::run(&mut command, 60)?;
    ensure!(output.success, "the app ended: {}", output.text());
    output.stdout.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

fn publish(user: Option<&str>, topic: &str, payload: &str) -> Result<()> {
    let mut command = Command::new("mosquitto_pub");
    command.args(["-q", "1", "-t", topic, "-m", payload]);
    if let Some(user) = user {
        command.args(["-u", user, "-P", PASSWORD]);
    }
    let output = process::run(&mut command, 10)?;
    ensure!(output.success, "mosquitto_pub: {}", output.text());
    Ok(())
}

/// A mosquitto_sub that hears everything.
struct Heard(Process);

impl Heard {
    fn listen(world: &World) -> Result<Self> {
        let mut command = Command::new("mosquitto_sub");
        command.args(["-v", "-q", "1", "-t", "devices/#", "-t", "$hw/#"]);
        let heard = Self(Process::spawn("mosquitto_sub", &mut command, &world.dir().join("mosquitto_sub.log"))?);
        // It is let in.
        heard.hears("/press/$state ")?;
        Ok(heard)
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.0.log()).unwrap_or_default()
    }

    fn hears(&self, words: &str) -> Result<()> {
        until(&format!("{words:?} to be heard"), 30, || Ok(self.text().contains(words)))
    }
}
