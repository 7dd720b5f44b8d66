//! Who may do what with one device: by rights of its own, at the node's port of cloudcore.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skerry_tests::mapper;
use skerry_tests::process::{self, Process};
use skerry_tests::wait::until;

use crate::world::{World, story};

/// What docs/operating.md gives to whoever may press a button.
const ROLE: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: tank-operator}
rules:
- {apiGroups: [devices.kubeedge.io], resources: [devices/methods], verbs: [create]}
";

#[test]
fn whoever_may_call_a_method_may_nothing_else() -> Result<()> {
    story("rights", |world| {
        let (directory, log) = (world.dir().join("virtual"), world.dir().join("mapper-virtual.log"));
        fs::create_dir_all(&directory)?;
        let mapper = Process::spawn("the mapper", &mut mapper::command(&world.edge, "virtual", &directory)?, &log)?;
        world.kubectl.create(&json!({
            "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "DeviceModel", "metadata": {"name": "tank"},
            "spec": {"protocol": "virtualProtocol", "properties": [
                {"name": "level", "type": "INT", "accessMode": "ReadWrite", "minimum": "0", "maximum": "10"}]},
        }))?;
        let visitor = json!({"protocolName": "virtualProtocol", "configData": {"pattern": "settable"}});
        world.kubectl.create(&json!({
            "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device", "metadata": {"name": "tank"},
            "spec": {
                "deviceModelRef": {"name": "tank"}, "nodeName": world.edge.name(),
                "protocol": {"protocolName": "virtualProtocol", "configData": {"deviceID": 1}},
                "properties": [{"name": "level", "desired": {"value": "5"}, "visitors": visitor}],
                "methods": [{"name": "fill", "propertyNames": ["level"]}],
            },
        }))?;
        world.kubectl.apply(ROLE)?;
        let namespace = world.kubectl.namespace().to_owned();
        for (account, role) in [("button", Some("tank-operator")), ("panel", Some("reader")), ("nobody", None)] {
            world.kubectl.run(&["create", "serviceaccount", account])?;
            if account == "panel" {
                let rule = ["--verb=get", "--resource=devices.devices.kubeedge.io/values", "--resource-name=tank"];
                world.kubectl.run(&[&["create", "role", "reader"][..], &rule].concat())?;
            }
            if let Some(role) = role {
                let bound = [format!("--role={role}"), format!("--serviceaccount={namespace}:{account}")];
                world.kubectl.run(&["create", "rolebinding", account, &bound[0], &bound[1]])?;
            }
        }
        let (button, panel, nobody) =
            (Client::new(world, "button")?, Client::new(world, "panel")?, Client::new(world, "nobody")?);
        let tank = format!("/devices/{namespace}/tank");
        let fill = format!("{tank}/methods/fill");
        let arguments = json!({"arguments": {"level": "7"}}).to_string();
        until("the value at the box", 60, || Ok(panel.asks("GET", &tank, "")?.1.contains("\"value\":\"5\"")))?;

        let (code, said) = button.asks("POST", &fill, &arguments)?;
        ensure!(code == "200", "{code} {said}");
        until("what the method did", 30, || {
            let twin: Value = serde_json::from_str(&panel.asks("GET", &tank, "")?.1)?;
            Ok(twin["properties"][0]["reported"]["value"] == "7")
        })?;
        for (client, method, path) in [
            (&nobody, "POST", fill.as_str()),
            (&panel, "POST", &fill),
            (&button, "GET", &tank),
            (&button, "PUT", &format!("{tank}/properties/level")),
            // Whether it is there or not.
            (&button, "POST", "/devices/elsewhere/tank/methods/fill"),
            (&panel, "GET", &format!("/devices/{namespace}/other")),
            (&panel, "PUT", &format!("{tank}/properties/level")),
            (&panel, "GET", "/devices"),
            (&panel, "GET", "/devices/values?follow=false"),
            (&panel, "GET", "/metrics/devices"),
            (&button, "POST", &format!("/exec/{namespace}/pod/main?command=id")),
        ] {
            let (code, said) = client.asks(method, path, &arguments)?;
            ensure!(code == "403" && said.contains("Forbidden"), "{method} {path}: {code} {said}");
        }
        let (_, said) = nobody.asks("POST", &fill, &arguments)?;
        let right =
            format!("resource=devices.devices.kubeedge.io, subresource=methods, namespace={namespace}, name=tank");
        ensure!(said.contains(&right), "the refusal does not say which right is missing: {said}");
        mapper.kill();
        Ok(())
    })
}

/// A program with the token of a service account.
struct Client {
    url: String,
    token: String,
}

impl Client {
    fn new(world: &World, account: &str) -> Result<Self> {
        let token = world.kubectl.run(&["create", "token", account])?.trim().to_owned();
        Ok(Self { url: world.kubelet()?, token })
    }

    /// Code and body of an answer.
    fn asks(&self, method: &str, path: &str, body: &str) -> Result<(String, String)> {
        let (url, header) = (format!("{}{path}", self.url), format!("Authorization: Bearer {}", self.token));
        let mut command = Command::new("curl");
        command.args(["-sk", "-m", "20", "-X", method, "-H", &header, "-w", "\n%{http_code}"]);
        if method != "GET" {
            command.args(["-d", body]);
        }
        let output = process::run(command.arg(&url), 30)?;
        ensure!(output.success, "{method} {url}: {}", output.text());
        let (said, code) = output.stdout.rsplit_once('\n').context("no code")?;
        Ok((code.to_owned(), said.to_owned()))
    }
}
