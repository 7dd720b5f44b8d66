//! `edgecore device`: what devices are and should be, from the running agent.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use bytes::Bytes;
use clap::{Args, Subcommand, ValueEnum};
use http_body_util::{BodyExt as _, Limited};
use hyper::Method;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use skerry_proto::ops::percent_encode;

use super::node::Node;
use super::{DataDir, note, print, table};
use crate::control::age;
use crate::devices::Twin;
use crate::{clock, order};

/// The most of an answer that is taken, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// See, follow, write and call devices of this node. It works with no cloud, as long as edgecore runs.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  edgecore device list                          all devices, their states and mappers
  edgecore device get boiler                    one with its properties, namespace default
  edgecore device watch boiler --property temp  what it says, as it says it
  edgecore device set boiler setpoint=21.5      write a property; the cloud's value is set aside until it changes
  edgecore device call boiler purge seconds=5   call a method and wait for its results
  edgecore device history boiler temp           the last values of a property")]
pub(super) struct Device {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// List devices.
    List(List),
    /// Show one with its properties.
    Get(Get),
    /// Print values and states as they come.
    Watch(Watch),
    /// Write what properties should be.
    Set(Set),
    /// Call a method and print its results.
    Call(Call),
    /// Print the last values of a property.
    History(History),
}

#[derive(Args, Debug)]
struct Common {
    /// How to print it.
    #[arg(short, long)]
    output: Option<Output>,
    #[command(flatten)]
    data: DataDir,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    Json,
}

#[derive(Args, Debug)]
struct Name {
    /// The device, as `edgecore device list` shows it.
    device: String,
    /// Its namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

#[derive(Args, Debug)]
struct List {
    /// Only of this namespace; of all unless given.
    #[arg(short, long)]
    namespace: Option<String>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug)]
struct Get {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug)]
struct Watch {
    /// Only this device.
    device: Option<String>,
    /// Only of this namespace; `default` for a device that is named.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Only this property.
    #[arg(short, long)]
    property: Option<String>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug)]
struct Set {
    #[command(flatten)]
    name: Name,
    /// Properties and what they should be.
    #[arg(required = true, value_name = "PROPERTY=VALUE", value_parser = pair)]
    values: Vec<(String, String)>,
    #[command(flatten)]
    data: DataDir,
}

#[derive(Args, Debug)]
struct Call {
    #[command(flatten)]
    name: Name,
    /// The method, as the Device declares it.
    method: String,
    /// What it is given.
    #[arg(value_name = "NAME=VALUE", value_parser = pair)]
    arguments: Vec<(String, String)>,
    /// How long it may take, in seconds.
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    timeout: f64,
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug)]
struct History {
    #[command(flatten)]
    name: Name,
    /// The property.
    property: String,
    #[command(flatten)]
    common: Common,
}

fn pair(text: &str) -> anyhow::Result<(String, String)> {
    let (name, value) = text.split_once('=').with_context(|| format!("{text:?} is not NAME=VALUE"))?;
    anyhow::ensure!(!name.is_empty(), "{text:?} has no name before its =");
    Ok((name.to_owned(), value.to_owned()))
}

impl Name {
    fn path(&self) -> String {
        format!("/devices/{}/{}", percent_encode(&self.namespace), percent_encode(&self.device))
    }
}

#[derive(Deserialize)]
struct Devices {
    devices: Vec<Twin>,
}

#[derive(Deserialize)]
struct Samples {
    samples: Vec<Sample>,
}

#[derive(Deserialize)]
struct Sample {
    timestamp: i64,
    value: String,
}

impl Device {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::List(list) => {
                let namespace =
                    list.namespace.map(|of| format!("?namespace={}", percent_encode(&of))).unwrap_or_default();
                let answer = get(&Node::of(&list.common.data)?, &format!("/devices{namespace}")).await?;
                if list.common.output.is_some() {
                    return shown(&answer);
                }
                let devices = serde_json::from_slice::<Devices>(&answer)?.devices;
                print(&self::list(&devices, clock::wall()));
                if devices.is_empty() {
                    note("No devices found.");
                }
            }
            Command::Get(get) => {
                let answer = self::get(&Node::of(&get.common.data)?, &get.name.path()).await?;
                if get.common.output.is_some() {
                    return shown(&answer);
                }
                print(&page(&serde_json::from_slice(&answer)?, clock::wall()));
            }
            Command::Watch(watch) => watch.run().await?,
            Command::Set(set) => {
                let node = Node::of(&set.data)?;
                for (property, value) in set.values {
                    let path = format!("{}/properties/{}", set.name.path(), percent_encode(&property));
                    let body = json!({ "value": value, "origin": "cli" }).to_string();
                    node.send(Method::PUT, &path, &[], body.into()).await?;
                }
            }
            Command::Call(call) => {
                let path = format!("{}/methods/{}", call.name.path(), percent_encode(&call.method));
                let arguments: serde_json::Map<String, Value> =
                    call.arguments.into_iter().map(|(name, value)| (name, value.into())).collect();
                let body = json!({ "arguments": arguments, "timeoutSeconds": call.timeout }).to_string();
                let node = Node::of(&call.common.data)?;
                let answer = whole(node.send(Method::POST, &path, &[], body.into()).await?).await?;
                if call.common.output.is_some() {
                    return shown(&answer);
                }
                let results: Value = serde_json::from_slice(&answer)?;
                for (name, value) in results["results"].as_object().into_iter().flatten() {
                    print(&format!("{name}={}\n", value.as_str().unwrap_or_default()));
                }
            }
            Command::History(history) => {
                let path = format!("{}/properties/{}/history", history.name.path(), percent_encode(&history.property));
                let answer = get(&Node::of(&history.common.data)?, &path).await?;
                if history.common.output.is_some() {
                    return shown(&answer);
                }
                for sample in serde_json::from_slice::<Samples>(&answer)?.samples {
                    print(&format!("{}   {}\n", time(sample.timestamp), sample.value));
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Watch {
    async fn run(self) -> anyhow::Result<()> {
        let namespace = self.namespace.or_else(|| self.device.as_ref().map(|_| "default".to_owned()));
        let filters = [("namespace", namespace), ("name", self.device), ("property", self.property)];
        let filters =
            filters.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", percent_encode(&value?))));
        let path = format!("/devices/values?{}", filters.collect::<Vec<_>>().join("&"));
        let mut body = Node::of(&self.common.data)?.ask(Method::GET, &path, &[]).await?.into_body();
        let mut out = std::io::stdout().lock();
        let mut rest = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.context("the stream broke off; see whether edgecore still runs")?;
            let Ok(data) = frame.into_data() else { continue };
            rest.extend_from_slice(&data);
            let Some(end) = rest.iter().rposition(|byte| *byte == b'\n') else { continue };
            let later = rest.split_off(end + 1);
            let lines = std::mem::replace(&mut rest, later);
            let text = match self.common.output {
                Some(Output::Json) => lines,
                None => lines.split(|byte| *byte == b'\n').filter_map(line).collect::<String>().into_bytes(),
            };
            if out.write_all(&text).and_then(|()| out.flush()).is_err() {
                // Who read it has gone (`| head`).
                break;
            }
        }
        Ok(())
    }
}

async fn get(node: &Node, path: &str) -> anyhow::Result<Bytes> {
    whole(node.ask(Method::GET, path, &[]).await?).await
}

async fn whole(answer: hyper::Response<hyper::body::Incoming>) -> anyhow::Result<Bytes> {
    let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("the answer broke off: {error}; ask for one namespace with -n"))?;
    Ok(body.to_bytes())
}

fn shown(answer: &[u8]) -> anyhow::Result<ExitCode> {
    print(&(serde_json::to_string_pretty(&serde_json::from_slice::<Value>(answer)?)? + "\n"));
    Ok(ExitCode::SUCCESS)
}

fn time(millis: i64) -> String {
    Timestamp::from_millisecond(millis).map(|at| at.to_string()).unwrap_or_default()
}

fn ago(millis: Option<i64>, now: Timestamp) -> String {
    match millis.and_then(|at| Timestamp::from_millisecond(at).ok()) {
        Some(at) => format!("{} ago", age(at, now)),
        None => "never".to_owned(),
    }
}

fn or_none(text: &str) -> String {
    if text.is_empty() { "<none>".to_owned() } else { text.to_owned() }
}

fn list(devices: &[Twin], now: Timestamp) -> String {
    if devices.is_empty() {
        return String::new();
    }
    let row = |device: &Twin| {
        vec![
            device.namespace.clone(),
            device.name.clone(),
            or_none(&device.model),
            or_none(&device.protocol),
            device.state.as_str().to_owned(),
            ago(device.last_seen, now),
            or_none(device.mapper.as_deref().unwrap_or_default()),
            if device.ready { "yes" } else { "no" }.to_owned(),
        ]
    };
    let mut rows: Vec<Vec<String>> = devices.iter().map(row).collect();
    order::sort(&mut rows);
    table(&["NAMESPACE", "NAME", "MODEL", "PROTOCOL", "STATE", "LAST-SEEN", "MAPPER", "READY"], &rows)
}

fn page(device: &Twin, now: Timestamp) -> String {
    let mut text = String::new();
    for (name, value) in [
        ("Name", device.name.as_str()),
        ("Namespace", &device.namespace),
        ("Model", &or_none(&device.model)),
        ("Protocol", &or_none(&device.protocol)),
        ("Mapper", &or_none(device.mapper.as_deref().unwrap_or_default())),
        ("Ready", if device.ready { "yes" } else { "no" }),
        ("State", device.state.as_str()),
        ("Last Seen", &ago(device.last_seen, now)),
        ("Refused", &device.refused.to_string()),
        ("Message", &or_none(device.message.as_deref().unwrap_or_default())),
    ] {
        text.push_str(&format!("{:<12}{value}\n", format!("{name}:")));
    }
    let rows: Vec<Vec<String>> = device
        .properties
        .iter()
        .map(|property| {
            let reported = property.reported.as_ref();
            let desired = property.desired.as_ref();
            vec![
                property.name.clone(),
                format!("{:?}", property.access_mode),
                reported.map_or_else(|| "<none>".to_owned(), |of| format!("{}{}", of.value, property.unit)),
                ago(reported.map(|of| of.timestamp), now),
                desired.map_or_else(|| "<none>".to_owned(), |of| of.value.clone()),
                desired.map_or_else(String::new, |of| of.origin.clone()),
            ]
        })
        .collect();
    if !rows.is_empty() {
        text.push('\n');
        text.push_str(&table(&["PROPERTY", "ACCESS", "VALUE", "READ", "DESIRED", "BY"], &rows));
    }
    text
}

/// A line of the stream as people read it.
fn line(text: &[u8]) -> Option<String> {
    let said: Value = serde_json::from_slice(text).ok()?;
    if let Some(count) = said["dropped"].as_u64() {
        return Some(format!("({count} changes came too fast and are left out)\n"));
    }
    let of = |field: &str| said[field].as_str().unwrap_or_default();
    Some(match said["timestamp"].as_i64() {
        Some(at) => format!("{}   {}/{}   {}={}\n", time(at), of("namespace"), of("name"), of("property"), of("value")),
        None => format!("{}/{}   is {}\n", of("namespace"), of("name"), of("state")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_shown_as_people_read_them() {
        let twin: Twin = serde_json::from_value(json!({
            "namespace": "default", "name": "boiler", "uid": "u", "model": "heater", "protocol": "modbus", "mapper": "modbus-1",
            "ready": true, "state": "online", "lastSeen": 60_000, "refused": 1, "message": "temp is hot",
            "properties": [
                { "name": "temp", "type": "FLOAT", "accessMode": "ReadWrite", "unit": "°C", "reported": { "value": "21.5", "timestamp": 58_000, "version": 3 },
                  "desired": { "value": "22", "timestamp": 1000, "origin": "cli", "version": 1 } },
                { "name": "name", "type": "STRING", "accessMode": "ReadOnly" }] }))
        .unwrap();
        let now = Timestamp::from_second(70).unwrap();
        insta::assert_snapshot!(page(&twin, now), @r"
        Name:       boiler
        Namespace:  default
        Model:      heater
        Protocol:   modbus
        Mapper:     modbus-1
        Ready:      yes
        State:      online
        Last Seen:  10s ago
        Refused:    1
        Message:    temp is hot

        PROPERTY   ACCESS      VALUE    READ      DESIRED   BY
        temp       ReadWrite   21.5°C   12s ago   22        cli
        name       ReadOnly    <none>   never     <none>
        ");
        insta::assert_snapshot!(list(&[twin], now), @r"
        NAMESPACE   NAME     MODEL    PROTOCOL   STATE    LAST-SEEN   MAPPER     READY
        default     boiler   heater   modbus     online   10s ago     modbus-1   yes
        ");
        let value = json!({ "namespace": "n", "name": "d", "property": "p", "value": "1", "timestamp": 0 });
        assert_eq!(line(value.to_string().as_bytes()).unwrap(), "1970-01-01T00:00:00Z   n/d   p=1\n");
        assert_eq!(line(b"{\"namespace\":\"n\",\"name\":\"d\",\"state\":\"ok\"}").unwrap(), "n/d   is ok\n");
        assert!(line(b"{\"dropped\":3}").unwrap().contains('3') && line(b"").is_none());
        assert_eq!(pair("a=b=c").unwrap(), ("a".to_owned(), "b=c".to_owned()));
        assert!(pair("a").is_err() && pair("=b").is_err());
    }
}
