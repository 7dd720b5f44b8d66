//! `edgecore describe pod`: what the node knows of a pod, for people, in kubectl's habits.

use std::fmt::Write as _;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde_json::Value;

use super::node::find;
use super::{DataDir, print, table};
use crate::clock;
use crate::config::Config;
use crate::control::{self, AskError, POD_STATUS_NOTES, Request, What, age};
use crate::store::Snapshot;

/// Show what this node knows of an object, with no cloud needed.
#[derive(Args, Debug)]
pub(super) struct Describe {
    #[command(subcommand)]
    what: Kind,
}

#[derive(Subcommand, Debug)]
enum Kind {
    /// A pod: its containers, what they do, and why; and events that the cloud does not have yet.
    #[command(
        alias = "pods",
        alias = "po",
        after_help = "\
Examples:
  edgecore describe pod web            pod web
  edgecore describe pod web -n shop    of namespace shop"
    )]
    Pod(PodArgs),
}

#[derive(Args, Debug)]
struct PodArgs {
    /// The pod, as `edgecore get pods` shows it.
    name: String,
    /// Its namespace; unless given `default`, or the only one that has a pod of this name here.
    #[arg(short, long)]
    namespace: Option<String>,
    #[command(flatten)]
    data: DataDir,
}

impl Describe {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let Kind::Pod(PodArgs { name, namespace, data }) = self.what;
        let config = Config::load(&data.data_dir)?;
        let socket = config.control_socket(&data.data_dir);
        let request = Request::Get { what: What::Pods, namespace: namespace.clone() };
        let (pods, snapshot): (Vec<Value>, _) = match control::ask(&socket, &request).await {
            Ok(pods) => (pods, None),
            Err(AskError::NotRunning(_)) => {
                super::note("edgecore is not running: this is what its store holds, the status may be old");
                let mut snapshot = Snapshot::open(&data.data_dir)?;
                let notes = snapshot.notes(POD_STATUS_NOTES)?;
                let rows = snapshot.list(What::Pods.collection())?;
                (control::objects(&rows, &notes, namespace.as_deref()), Some(snapshot))
            }
            Err(error) => return Err(error.into()),
        };
        let pod = find(&pods, namespace.as_deref(), &name)?.object;
        let uid = pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        let events: Vec<Value> = match snapshot {
            Some(mut snapshot) => control::events(&snapshot.events(&uid)?),
            None => control::ask(&socket, &Request::Events { uid }).await?,
        };
        print(&describe(&pod, &events, clock::wall()));
        Ok(ExitCode::SUCCESS)
    }
}

/// Lines of a name and a value, the values in one column.
#[derive(Default)]
struct Page(String);

impl Page {
    fn line(&mut self, indent: usize, name: &str, value: &str) {
        let name = format!("{}{name}:", " ".repeat(indent));
        let width = if indent == 0 { 18 } else { indent + 18 };
        let line = format!("{name:<width$}{value}");
        self.0.push_str(line.trim_end());
        self.0.push('\n');
    }

    /// One line for each of several values, the name before the first.
    fn lines(&mut self, indent: usize, name: &str, values: &[String]) {
        let width = if indent == 0 { 18 } else { indent + 18 };
        self.line(indent, name, values.first().map_or("<none>", String::as_str));
        for value in values.iter().skip(1) {
            let _ = writeln!(self.0, "{:width$}{value}", "");
        }
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) if !text.is_empty() => text.clone(),
        Value::String(_) | Value::Null => "<none>".to_owned(),
        other => other.to_string(),
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// `key=value`, in order, which an object of `serde_json` is in.
fn pairs(value: &Value, between: &str) -> Vec<String> {
    value
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}{between}{}", value.as_str().unwrap_or_default()))
        .collect()
}

fn describe(pod: &Value, events: &[Value], now: Timestamp) -> String {
    let (meta, spec, status) = (&pod["metadata"], &pod["spec"], &pod["status"]);
    let mut page = Page::default();
    page.line(0, "Name", &text(&meta["name"]));
    page.line(0, "Namespace", &text(&meta["namespace"]));
    if spec["priority"].is_number() {
        page.line(0, "Priority", &text(&spec["priority"]));
    }
    page.line(0, "Service Account", &text(&spec["serviceAccountName"]));
    page.line(0, "Node", &[text(&spec["nodeName"]), text(&status["hostIP"])].join("/"));
    page.line(0, "Start Time", &since(&status["startTime"], now));
    page.lines(0, "Labels", &pairs(&meta["labels"], "="));
    page.lines(0, "Annotations", &pairs(&meta["annotations"], ": "));
    if meta["deletionTimestamp"].is_string() {
        page.line(0, "Status", &format!("Terminating ({})", since(&meta["deletionTimestamp"], now)));
        page.line(0, "Grace Period", &format!("{}s", text(&meta["deletionGracePeriodSeconds"])));
    } else {
        page.line(0, "Status", &text(&status["phase"]));
    }
    for (name, field) in [("Reason", "reason"), ("Message", "message")] {
        if status[field].is_string() {
            page.line(0, name, &text(&status[field]));
        }
    }
    page.line(0, "IP", &text(&status["podIP"]));
    let ips: Vec<String> = list(&status["podIPs"]).map(|ip| text(&ip["ip"])).collect();
    page.lines(0, "IPs", &ips);
    for owner in list(&meta["ownerReferences"]).filter(|owner| owner["controller"] == true) {
        page.line(0, "Controlled By", &format!("{}/{}", text(&owner["kind"]), text(&owner["name"])));
    }
    for (title, containers, statuses) in [
        ("Init Containers", "initContainers", "initContainerStatuses"),
        ("Containers", "containers", "containerStatuses"),
        ("Ephemeral Containers", "ephemeralContainers", "ephemeralContainerStatuses"),
    ] {
        if spec[containers].as_array().is_some_and(|containers| !containers.is_empty()) {
            page.line(0, title, "");
            for of in list(&spec[containers]) {
                let status = list(&status[statuses]).find(|status| status["name"] == of["name"]);
                container(&mut page, of, status.unwrap_or(&Value::Null), now);
            }
        }
    }
    page.line(0, "Conditions", "");
    for condition in list(&status["conditions"]) {
        let why = [&condition["reason"], &condition["message"]];
        let why: Vec<&str> = why.into_iter().filter_map(Value::as_str).filter(|why| !why.is_empty()).collect();
        let shown = format!("{:<8}{}", text(&condition["status"]), why.join(": "));
        let _ = writeln!(page.0, "{}", format!("  {:<28}{shown}", text(&condition["type"])).trim_end());
    }
    page.line(0, "Volumes", "");
    for volume in list(&spec["volumes"]) {
        page.line(2, &text(&volume["name"]), &volume_kind(volume));
    }
    page.line(0, "QoS Class", &text(&status["qosClass"]));
    page.lines(0, "Node-Selectors", &pairs(&spec["nodeSelector"], "="));
    let tolerations: Vec<String> = list(&spec["tolerations"]).map(toleration).collect();
    page.lines(0, "Tolerations", &tolerations);
    if events.is_empty() {
        page.line(0, "Events", "<none>");
    } else {
        page.line(0, "Events", "");
        let header = ["Type", "Reason", "Age", "From", "Message"];
        let rule = header.map(|name| "-".repeat(name.len())).to_vec();
        let rows: Vec<Vec<String>> = std::iter::once(rule).chain(events.iter().map(|of| event(of, now))).collect();
        for line in table(&header, &rows).lines() {
            let _ = writeln!(page.0, "  {line}");
        }
    }
    page.0
}

/// The cells of an event.
fn event(event: &Value, now: Timestamp) -> Vec<String> {
    let ago = |at: &Value| {
        at.as_str().and_then(|at| at.parse().ok()).map_or_else(|| "<unknown>".to_owned(), |at| age(at, now))
    };
    let (first, last) = (ago(&event["firstTimestamp"]), ago(&event["lastTimestamp"]));
    let seen = match event["count"].as_i64() {
        Some(count @ 2..) => format!("{last} (x{count} over {first})"),
        _ => first,
    };
    let message = event["message"].as_str().unwrap_or_default().trim().to_owned();
    vec![text(&event["type"]), text(&event["reason"]), seen, text(&event["source"]["component"]), message]
}

fn container(page: &mut Page, spec: &Value, status: &Value, now: Timestamp) {
    let _ = writeln!(page.0, "  {}:", text(&spec["name"]));
    page.line(4, "Container ID", &text(&status["containerID"]));
    page.line(4, "Image", &text(&spec["image"]));
    page.line(4, "Image ID", &text(&status["imageID"]));
    let ports: Vec<String> = list(&spec["ports"])
        .map(|port| format!("{}/{}", port["containerPort"], port["protocol"].as_str().unwrap_or("TCP")))
        .collect();
    page.line(4, "Ports", if ports.is_empty() { "<none>".to_owned() } else { ports.join(", ") }.as_str());
    for (name, field) in [("Command", "command"), ("Args", "args")] {
        if let Some(words) = spec[field].as_array() {
            page.line(4, name, "");
            for word in words {
                let _ = writeln!(page.0, "      {}", text(word));
            }
        }
    }
    state(page, "State", &status["state"], now);
    if status["lastState"].as_object().is_some_and(|state| !state.is_empty()) {
        state(page, "Last State", &status["lastState"], now);
    }
    page.line(4, "Ready", if status["ready"] == true { "True" } else { "False" });
    page.line(4, "Restart Count", &status["restartCount"].as_i64().unwrap_or_default().to_string());
    for (name, field) in [("Limits", "limits"), ("Requests", "requests")] {
        let amounts = pairs(&spec["resources"][field], ": ");
        if !amounts.is_empty() {
            page.lines(4, name, &amounts);
        }
    }
    for (name, field) in [("Liveness", "livenessProbe"), ("Readiness", "readinessProbe"), ("Startup", "startupProbe")] {
        if spec[field].is_object() {
            page.line(4, name, &probe(&spec[field]));
        }
    }
    let env = list(&spec["env"]).map(|env| {
        let value = env["value"].as_str().unwrap_or_default();
        let from = env["valueFrom"].as_object().and_then(|from| from.keys().next());
        format!("{}: {}", text(&env["name"]), from.map_or_else(|| value.to_owned(), |from| format!("<from {from}>")))
    });
    page.lines(4, "Environment", &env.collect::<Vec<_>>());
    let mounts = list(&spec["volumeMounts"]).map(|mount| {
        let mode = if mount["readOnly"] == true { "ro" } else { "rw" };
        format!("{} from {} ({mode})", text(&mount["mountPath"]), text(&mount["name"]))
    });
    page.lines(4, "Mounts", &mounts.collect::<Vec<_>>());
}

fn state(page: &mut Page, name: &str, state: &Value, now: Timestamp) {
    let (word, of) = match state.as_object().and_then(|state| state.iter().next()) {
        Some((word, of)) => (word.as_str(), of),
        None => ("waiting", &Value::Null),
    };
    let word = match word {
        "running" => "Running",
        "terminated" => "Terminated",
        _ => "Waiting",
    };
    page.line(4, name, word);
    for (name, field) in [("Reason", "reason"), ("Message", "message"), ("Exit Code", "exitCode")] {
        if !of[field].is_null() {
            page.line(6, name, &text(&of[field]));
        }
    }
    for (name, field) in [("Started", "startedAt"), ("Finished", "finishedAt")] {
        if of[field].is_string() {
            page.line(6, name, &since(&of[field], now));
        }
    }
}

fn probe(probe: &Value) -> String {
    let what = match probe
        .as_object()
        .and_then(|probe| ["httpGet", "exec", "tcpSocket", "grpc"].into_iter().find(|kind| probe.contains_key(*kind)))
    {
        Some("httpGet") => {
            let get = &probe["httpGet"];
            let scheme = get["scheme"].as_str().unwrap_or("HTTP").to_ascii_lowercase();
            let path = get["path"].as_str().unwrap_or_default();
            format!("http-get {scheme}://{}:{}{path}", get["host"].as_str().unwrap_or_default(), bare(&get["port"]))
        }
        Some("exec") => {
            let words: Vec<String> = list(&probe["exec"]["command"]).map(text).collect();
            format!("exec [{}]", words.join(" "))
        }
        Some("tcpSocket") => format!("tcp-socket :{}", bare(&probe["tcpSocket"]["port"])),
        Some("grpc") => format!("grpc :{}", bare(&probe["grpc"]["port"])),
        _ => "unknown".to_owned(),
    };
    let number = |field: &str, default: i64| probe[field].as_i64().unwrap_or(default);
    format!(
        "{what} delay={}s timeout={}s period={}s #success={} #failure={}",
        number("initialDelaySeconds", 0),
        number("timeoutSeconds", 1),
        number("periodSeconds", 10),
        number("successThreshold", 1),
        number("failureThreshold", 3)
    )
}

fn bare(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// What a volume is, and of what.
fn volume_kind(volume: &Value) -> String {
    let kind = volume.as_object().and_then(|volume| volume.iter().find(|(key, _)| *key != "name"));
    let Some((kind, of)) = kind else { return "<none>".to_owned() };
    let names = ["name", "secretName", "path", "claimName"];
    match names.into_iter().find_map(|name| of[name].as_str()) {
        Some(name) => format!("{kind} ({name})"),
        None => kind.clone(),
    }
}

fn toleration(toleration: &Value) -> String {
    let part = |field: &str| toleration[field].as_str().unwrap_or_default();
    let mut words = part("key").to_owned();
    if !part("value").is_empty() {
        words += &format!("={}", part("value"));
    }
    if !part("effect").is_empty() {
        words += &format!(":{}", part("effect"));
    }
    if part("operator") == "Exists" {
        words += " op=Exists";
    }
    if let Some(seconds) = toleration["tolerationSeconds"].as_i64() {
        words += &format!(" for {seconds}s");
    }
    words
}

fn since(value: &Value, now: Timestamp) -> String {
    match value.as_str().and_then(|at| at.parse().ok()) {
        Some(at) => format!("{} ({} ago)", text(value), age(at, now)),
        None => "<none>".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_page_tells_what_there_is_to_know() {
        let pod = json!({
            "metadata": { "name": "web", "namespace": "shop", "labels": { "b": "2", "a": "1" },
                "ownerReferences": [{ "kind": "ReplicaSet", "name": "web-1", "controller": true }] },
            "spec": { "nodeName": "box", "serviceAccountName": "default",
                "containers": [{ "name": "main", "image": "app:1", "command": ["serve", "-v"], "ports": [{ "containerPort": 80 }],
                    "resources": { "limits": { "memory": "64Mi", "cpu": "1" } },
                    "livenessProbe": { "httpGet": { "path": "/live", "port": 80 }, "periodSeconds": 5 },
                    "env": [{ "name": "A", "value": "1" }, { "name": "B", "valueFrom": { "secretKeyRef": {} } }],
                    "volumeMounts": [{ "name": "data", "mountPath": "/data", "readOnly": true }] }],
                "volumes": [{ "name": "data", "configMap": { "name": "files" } }],
                "tolerations": [{ "key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300 }] },
            "status": { "phase": "Running", "hostIP": "10.0.0.1", "podIP": "10.88.0.2", "podIPs": [{ "ip": "10.88.0.2" }], "qosClass": "Burstable",
                "startTime": "2026-01-01T00:00:00Z",
                "conditions": [{ "type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "main" }],
                "containerStatuses": [{ "name": "main", "containerID": "containerd://abc", "imageID": "sha256:1", "ready": false, "restartCount": 3,
                    "state": { "waiting": { "reason": "CrashLoopBackOff", "message": "back-off" } },
                    "lastState": { "terminated": { "exitCode": 1, "reason": "Error", "startedAt": "2026-01-01T00:58:00Z", "finishedAt": "2026-01-01T00:59:00Z" } } }] } });
        let event = |kind: &str, reason: &str, count: i64| {
            json!({ "type": kind, "reason": reason, "message": format!("{reason} it\n"), "source": { "component": "kubelet" },
                "count": count, "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:59:50Z" })
        };
        let events = [event("Normal", "Started", 1), event("Warning", "BackOff", 7)];
        insta::assert_snapshot!(describe(&pod, &events, "2026-01-01T01:00:00Z".parse().unwrap()), @r"
        Name:             web
        Namespace:        shop
        Service Account:  default
        Node:             box/10.0.0.1
        Start Time:       2026-01-01T00:00:00Z (60m ago)
        Labels:           a=1
                          b=2
        Annotations:      <none>
        Status:           Running
        IP:               10.88.0.2
        IPs:              10.88.0.2
        Controlled By:    ReplicaSet/web-1
        Containers:
          main:
            Container ID:     containerd://abc
            Image:            app:1
            Image ID:         sha256:1
            Ports:            80/TCP
            Command:
              serve
              -v
            State:            Waiting
              Reason:           CrashLoopBackOff
              Message:          back-off
            Last State:       Terminated
              Reason:           Error
              Exit Code:        1
              Started:          2026-01-01T00:58:00Z (2m ago)
              Finished:         2026-01-01T00:59:00Z (60s ago)
            Ready:            False
            Restart Count:    3
            Limits:           cpu: 1
                              memory: 64Mi
            Liveness:         http-get http://:80/live delay=0s timeout=1s period=5s #success=1 #failure=3
            Environment:      A: 1
                              B: <from secretKeyRef>
            Mounts:           /data from data (ro)
        Conditions:
          Ready                       False   ContainersNotReady: main
        Volumes:
          data:             configMap (files)
        QoS Class:        Burstable
        Node-Selectors:   <none>
        Tolerations:      node.kubernetes.io/not-ready:NoExecute op=Exists for 300s
        Events:
          Type      Reason    Age                 From      Message
          ----      ------    ---                 ----      -------
          Normal    Started   60m                 kubelet   Started it
          Warning   BackOff   10s (x7 over 60m)   kubelet   BackOff it
        ");
        // Of a pod that has just come nothing is known, and nothing breaks.
        let new = describe(&json!({ "metadata": { "name": "new" } }), &[], Timestamp::UNIX_EPOCH);
        assert!(new.contains("new") && new.ends_with("Events:           <none>\n"), "{new}");
    }
}
