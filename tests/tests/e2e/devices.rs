//! Devices: their CRDs, the way of a Device to its node, and of its status back.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skerry_proto::device::{DeviceReport, DeviceStatusStatus};
use skerry_proto::wire::{self, Collection, frame::Body};
use skerry_tests::kubectl::Kubectl;
use skerry_tests::paths;
use skerry_tests::peer::Session;
use skerry_tests::wait::until;

use crate::hostile::{NODE, answer_until_quiet, enter, welcome};
use crate::mappers::{self, MAPPERS};
use crate::world::{World, story};

/// Of the shapes of KubeEdge's samples.
const SAMPLES: &str = include_str!("../../manifests/devices-samples.yaml");

#[test]
fn manifests_for_kubeedge_apply_and_what_cannot_be_is_refused_at_once() -> Result<()> {
    story("devices-manifests", |world| {
        for name in ["devicemodels", "devices", "devicestatuses"] {
            let established = ["wait", "--for=condition=Established", "--timeout=30s"];
            world.admin().run(&[&established[..], &[&format!("crd/{name}.devices.kubeedge.io")]].concat())?;
        }
        world.kubectl.apply(SAMPLES)?;
        for mapper in MAPPERS {
            let example = paths::repository().join(format!("device-mappers/{mapper}/example.yaml"));
            world.kubectl.run(&["apply", "--dry-run=server", "-f", &example.display().to_string()])?;
            // edgecore calls only what the Device itself declares.
            for object in mappers::example(world, mapper)? {
                let spec = &object["spec"];
                let declared: Vec<&Value> =
                    spec["methods"].as_array().into_iter().flatten().map(|of| &of["name"]).collect();
                for name in spec["protocol"]["configData"]["methods"].as_object().into_iter().flat_map(|of| of.keys()) {
                    ensure!(declared.iter().any(|of| *of == name), "{mapper}: spec.methods has no {name}");
                }
            }
        }
        let table = world.kubectl.run(&["get", "devices"])?;
        for word in ["NODE", "MODEL", "PROTOCOL", "STATE", "boiler-1", "edge-node", "boiler-model", "modbus"] {
            ensure!(table.contains(word), "kubectl get devices does not show {word}:\n{table}");
        }
        let table = world.kubectl.run(&["get", "devicestatuses"])?;
        ensure!(table.contains("LAST SEEN") && table.contains("online"), "kubectl get devicestatuses shows:\n{table}");
        let device = world.kubectl.get("device", "boiler-1")?;
        let push = &device["spec"]["properties"][0]["pushMethod"];
        ensure!(push["dbMethod"]["Kwdb"]["KWDBClientConfig"]["dbName"] == "plant", "a database got lost: {push}");
        ensure!(device["spec"]["protocol"]["configData"]["slaveID"] == 1, "configData got lost: {device}");

        for (what, manifest, words) in refused_manifests() {
            let answer = world.kubectl.create(&manifest);
            let text = answer.err().with_context(|| format!("{what} was not refused"))?.to_string();
            for word in words {
                ensure!(text.contains(word), "{what}: the refusal does not say {word:?}: {text}");
            }
        }
        Ok(())
    })
}

#[test]
fn devices_go_to_their_node_and_only_it_reports_them() -> Result<()> {
    story("devices-way", |world| {
        // Before its node is there.
        world.kubectl.create(&model("oven", &[("heat", "INT"), ("door", "BOOLEAN")]))?;
        let mine = apply(world, "mine", NODE, &json!([{"name": "heat", "desired": {"value": "9"}}]))?;
        let others = apply(world, "others", world.edge.name(), &json!([{"name": "heat"}, {"name": "hat"}]))?;
        let namespace = world.kubectl.namespace().to_owned();
        let (address, identity) = enter(world)?;
        let mut session = Session::establish(address, &identity, NODE)?;
        welcome(&mut session)?;
        let seen = answer_until_quiet(&mut session, &[])?;
        let keys = |of: Collection| -> Vec<&str> {
            seen.iter().filter(|upsert| upsert.collection() == of).map(|upsert| upsert.key.as_str()).collect()
        };
        ensure!(
            keys(Collection::Devices) == [format!("{namespace}/mine")],
            "it got devices {:?}",
            keys(Collection::Devices)
        );
        ensure!(
            keys(Collection::DeviceModels) == [format!("{namespace}/oven")],
            "it got models {:?}",
            keys(Collection::DeviceModels)
        );

        let refused = report(&mut session, 1, &namespace, "others", &others)?;
        ensure!(refused.contains("another node"), "the report for another node's device: {refused:?}");
        let refused = report(&mut session, 2, &namespace, "mine", &others)?;
        ensure!(!refused.is_empty(), "a report of another UID was taken");
        let refused = report(&mut session, 3, &namespace, "mine", &mine)?;
        ensure!(refused.is_empty(), "its own report was refused: {refused}");
        let status = world.kubectl.get("devicestatus", "mine")?;
        ensure!(status["status"]["twins"][0]["reported"]["value"] == "8", "the twin is not there: {status}");
        ensure!(status["metadata"]["ownerReferences"][0]["uid"] == mine.as_str(), "it has another owner: {status}");
        ensure!(world.kubectl.find("devicestatus", "others")?.is_none(), "the lie is there");
        ensure!(
            world.kubectl.get("device", "mine")?["status"]["state"] == "online",
            "kubectl get device shows no state"
        );
        let echoes = heard(&mut session, 3)?;
        ensure!(echoes.is_empty(), "a report came back as {echoes:?}");

        // What no rule of the CRD can find is said on the Device.
        until("the event about the property that no model has", 30, || {
            let events = world.kubectl.list("events", "")?;
            Ok(events.iter().any(|event| {
                event["involvedObject"]["name"] == "others"
                    && event["message"].as_str().is_some_and(|text| text.contains("hat"))
            }))
        })?;

        // Moved to the edge, whose store takes it: it stays connected, and this one's is told that it goes.
        world.kubectl.patch("device", "mine", &json!({"spec": {"nodeName": world.edge.name()}}))?;
        let gone = heard(&mut session, 5)?;
        ensure!(gone.iter().any(|word| *word == format!("- {mine}")), "it was told {gone:?}");
        let refused = report(&mut session, 4, &namespace, "mine", &mine)?;
        ensure!(refused.contains("another node"), "the report for a device that moved: {refused:?}");
        world.wait_connected()?;
        world.kubectl.delete("device", "mine")?;
        world.kubectl.wait_gone("devicestatus", "mine", 60)
    })
}

#[test]
fn with_the_policy_a_device_that_does_not_fit_its_model_is_refused() -> Result<()> {
    story("devices-policy", |world| {
        let policy = Policy::apply(world)?;
        let mut oven = model("oven", &[("heat", "INT"), ("door", "BOOLEAN"), ("glow", "DOUBLE"), ("note", "STRING")]);
        oven["spec"]["properties"][0]["minimum"] = "0".into();
        oven["spec"]["properties"][0]["maximum"] = "300".into();
        // A device that is there before its model, and fits it as little as others, stays, and can be written to but for its spec.
        let nowhere =
            |name: &str, properties: &Value| device(name, &json!({"nodeName": "nowhere", "properties": properties}));
        world.kubectl.create(&nowhere("early", &json!([{"name": "hat"}])))?;
        world.kubectl.create(&oven)?;
        world.kubectl.create(&model("kiln", &[("hat", "INT")]))?;
        // Why it would be refused; nothing if it would be taken.
        let dry = |manifest: &Value| -> Result<String> {
            let arguments = ["create", "--dry-run=server", "-f", "-"];
            let done = world.kubectl.pipe(&arguments, manifest.to_string().as_bytes())?;
            Ok(if done.code == Some(0) { String::new() } else { done.errors })
        };
        until("the policy to be in force", 60, || {
            Ok(dry(&nowhere("bad", &json!([{"name": "hat"}])))?.contains("does not have the property hat"))
        })?;
        let desired = |name: &str, value: &str| json!([{"name": "heat"}, {"name": name, "desired": {"value": value}}]);
        for (name, value, word) in [
            ("door", "yes", "of another type"),
            ("glow", "1.5.2", "of another type"),
            ("heat", "1.5", "of another type"),
            ("heat", "301", "beyond the bounds"),
            ("heat", "-1", "beyond the bounds"),
        ] {
            let properties = json!([{"name": name, "desired": {"value": value}}]);
            let said = dry(&nowhere("bad", &properties))?;
            ensure!(said.contains(word) && said.contains(&format!("property {name}")), "{name}={value}: {said}");
        }
        for (name, value) in [("door", "true"), ("glow", "-1.5e3"), ("glow", ".5"), ("note", "so"), ("door", "")] {
            let said = dry(&nowhere("good", &desired(name, value)))?;
            ensure!(said.is_empty(), "{name}={value}: {said}");
        }
        let said = dry(&nowhere("good", &json!([{"name": "heat", "desired": {"value": "300"}}])))?;
        ensure!(said.is_empty(), "a value at its bound: {said}");
        world.kubectl.patch(
            "device",
            "early",
            &json!({"metadata": {"annotations": {"x": "y"}}, "status": {"state": "ok"}}),
        )?;
        let refused = world.kubectl.patch("device", "early", &json!({"spec": {"nodeName": "elsewhere"}}));
        ensure!(
            refused.is_err_and(|error| error.to_string().contains("property hat")),
            "a spec that does not fit was taken"
        );
        // As large as any that the edge is likely to have.
        let many: Vec<String> = (0..100).map(|number| format!("p{number}")).collect();
        let typed: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "INT")).collect();
        let mut large = model("large", &typed);
        large["spec"]["properties"][99]["maximum"] = "5".into();
        world.kubectl.create(&large)?;
        let properties: Vec<Value> = many.iter().map(|name| json!({"name": name, "desired": {"value": "6"}})).collect();
        let mut of_it = nowhere("large", &properties.into());
        of_it["spec"]["deviceModelRef"]["name"] = "large".into();
        until("a device of a hundred properties to be refused", 30, || {
            Ok(dry(&of_it)?.contains("bounds of the DeviceModel large: property p99"))
        })?;
        drop(policy);
        until("the policy to be gone", 60, || Ok(dry(&nowhere("bad", &json!([{"name": "hat"}])))?.is_empty()))
    })
}

/// The policy, until this is dropped: it is everybody's.
struct Policy(Kubectl, String);

impl Policy {
    fn apply(world: &World) -> Result<Self> {
        let file = paths::repository().join("deploy/device-policy.yaml").display().to_string();
        world.admin().run(&["apply", "-f", &file])?;
        Ok(Self(world.admin().clone(), file))
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        self.0.run(&["delete", "--ignore-not-found", "-f", &self.1]).ok();
    }
}

/// Reports a status; why it was refused.
fn report(session: &mut Session, id: u64, namespace: &str, name: &str, uid: &str) -> Result<String> {
    let status: DeviceStatusStatus = serde_json::from_value(json!({
        "state": "online", "lastOnlineTime": "2026-01-01T00:00:00Z",
        "twins": [{"propertyName": "heat", "reported": {"value": "8", "metadata": {"type": "INT"}}}],
    }))?;
    session.send(Body::Report(wire::Report {
        id,
        kind: wire::ReportKind::DeviceStatus.into(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: uid.to_owned(),
        encoding: wire::Encoding::Raw.into(),
        payload: serde_json::to_vec(&DeviceReport { status })?.into(),
    }))?;
    session.receive_until("what became of a report", |body| match body {
        Body::ReportAck(ack) if ack.id == id => Some(ack.refused.clone()),
        _ => None,
    })
}

/// What it is told of objects within so long.
fn heard(session: &mut Session, seconds: u64) -> Result<Vec<String>> {
    let mut heard = Vec::new();
    while let Some(body) = session.receive_unless_quiet(seconds)? {
        match body {
            Body::Upsert(upsert) => {
                session.send(Body::Ack(wire::Ack { seq: upsert.seq }))?;
                heard.push(format!("+ {}", upsert.key));
            }
            Body::Delete(delete) => {
                session.send(Body::Ack(wire::Ack { seq: delete.seq }))?;
                heard.push(format!("- {}", delete.uid));
            }
            Body::Ping(ping) => session.send(Body::Pong(wire::Pong { token: ping.token }))?,
            _ => {}
        }
    }
    Ok(heard)
}

/// Creates a device of the model `oven`; its UID.
fn apply(world: &World, name: &str, node: &str, properties: &Value) -> Result<String> {
    let device = device(name, &json!({"nodeName": node, "properties": properties}));
    let made = world.kubectl.create_and_get(&device)?;
    made["metadata"]["uid"].as_str().map(str::to_owned).context("no UID")
}

fn device(name: &str, spec: &Value) -> Value {
    let mut whole = json!({"deviceModelRef": {"name": "oven"}, "protocol": {"protocolName": "modbus", "configData": {"slaveID": 1}}});
    for (field, value) in spec.as_object().into_iter().flatten() {
        whole[field] = value.clone();
    }
    json!({"apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device", "metadata": {"name": name}, "spec": whole})
}

fn model(name: &str, properties: &[(&str, &str)]) -> Value {
    let properties: Vec<Value> =
        properties.iter().map(|(name, kind)| json!({"name": name, "type": kind, "accessMode": "ReadWrite"})).collect();
    json!({
        "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "DeviceModel", "metadata": {"name": name},
        "spec": {"protocol": "modbus", "properties": properties},
    })
}

/// What is refused, and the words that say why.
fn refused_manifests() -> Vec<(&'static str, Value, Vec<&'static str>)> {
    let bad = |spec: Value| device("bad", &spec);
    let modelled = |fields: Value| {
        let mut model = model("bad", &[("heat", "INT")]);
        for (field, value) in fields.as_object().into_iter().flatten() {
            model["spec"]["properties"][0][field] = value.clone();
        }
        model
    };
    vec![
        (
            "a property twice",
            bad(json!({"properties": [{"name": "a"}, {"name": "b"}, {"name": "a"}]})),
            vec!["properties[2]", "Duplicate value", "\"a\""],
        ),
        (
            "a property without a name",
            bad(json!({"properties": [{"collectCycle": 5}]})),
            vec!["properties[0].name", "Required"],
        ),
        ("no protocol", bad(json!({"protocol": null})), vec!["protocolName must name a protocol"]),
        ("an empty protocol", bad(json!({"protocol": {"protocolName": ""}})), vec!["protocol.protocolName"]),
        ("no model", bad(json!({"deviceModelRef": {}})), vec!["deviceModelRef.name must name a DeviceModel"]),
        (
            "a desired value that is no text",
            bad(json!({"properties": [{"name": "a", "desired": {"value": 7}}]})),
            vec!["desired.value", "string"],
        ),
        ("a negative cycle", bad(json!({"properties": [{"name": "a", "reportCycle": -1}]})), vec!["reportCycle"]),
        (
            "a QoS of three",
            bad(json!({"properties": [{"name": "a", "pushMethod": {"mqtt": {"qos": 3}}}]})),
            vec!["qos"],
        ),
        (
            "a method twice",
            bad(json!({"methods": [{"name": "m"}, {"name": "m"}]})),
            vec!["methods[1]", "Duplicate value"],
        ),
        (
            "an unknown field",
            bad(json!({"properties": [{"name": "a", "reportcycle": 1}]})),
            vec!["unknown field", "reportcycle"],
        ),
        ("a type that is none", modelled(json!({"type": "INTEGER"})), vec!["type", "INT", "BOOLEAN"]),
        ("an access mode that is none", modelled(json!({"accessMode": "RW"})), vec!["accessMode", "ReadWrite"]),
        (
            "a range upside down",
            modelled(json!({"minimum": "10", "maximum": "9.5"})),
            vec!["minimum must not be greater than maximum"],
        ),
        ("a range of text", modelled(json!({"type": "STRING", "maximum": "9"})), vec!["minimum and maximum are for"]),
        ("a bound that is no number", modelled(json!({"maximum": "many"})), vec!["maximum"]),
        (
            "a model's property twice",
            model("bad", &[("a", "INT"), ("a", "FLOAT")]),
            vec!["properties[1]", "Duplicate value"],
        ),
    ]
}
