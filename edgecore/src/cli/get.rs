//! `edgecore get`: what the node holds, in kubectl's habits, from the running agent or from its store.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, ValueEnum};
use jiff::Timestamp;
use serde_json::Value;

use super::{DataDir, print, table};
use crate::clock;
use crate::config::Config;
use crate::control::{self, AskError, POD_STATUS_NOTES, Request, What, age};
use crate::store::Snapshot;

#[derive(Args, Debug)]
pub(super) struct Get {
    /// What to list.
    what: Kind,
    /// Only of this name.
    name: Option<String>,
    /// Only of this namespace.
    #[arg(short, long, conflicts_with = "all_namespaces")]
    namespace: Option<String>,
    /// Of all namespaces, which is the default.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// How to print it.
    #[arg(short, long)]
    output: Option<Output>,
    #[command(flatten)]
    data: DataDir,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    #[value(alias = "pod", alias = "po")]
    Pods,
    #[value(alias = "node", alias = "no")]
    Nodes,
    #[value(alias = "configmap", alias = "cm")]
    Configmaps,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    Wide,
    Json,
    Name,
}

impl Get {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let data_dir = &self.data.data_dir;
        let config = Config::load(data_dir)?;
        let what = match self.what {
            Kind::Pods => What::Pods,
            Kind::Nodes => What::Nodes,
            Kind::Configmaps => What::ConfigMaps,
        };
        let namespace = self.namespace.filter(|_| what != What::Nodes);
        let request = Request::Get { what, namespace: namespace.clone() };
        let mut objects: Vec<Value> = match control::ask(&config.control_socket(data_dir), &request).await {
            Ok(objects) => objects,
            Err(AskError::NotRunning(_)) => {
                let _ = writeln!(
                    std::io::stderr(),
                    "edgecore is not running: this is what its store holds, statuses may be old"
                );
                let mut snapshot = Snapshot::open(data_dir)?;
                let notes = if what == What::Pods { snapshot.notes(POD_STATUS_NOTES)? } else { Vec::new() };
                control::objects(&snapshot.list(what.collection())?, &notes, namespace.as_deref())
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(name) = &self.name {
            objects.retain(|object| object["metadata"]["name"] == **name);
            if objects.is_empty() {
                bail!("{name:?} is not on this node; without a name `edgecore get` lists what is");
            }
        }
        print(&show(what, &objects, self.output, clock::wall())?);
        if objects.is_empty() && self.output.is_none() {
            let _ = writeln!(std::io::stderr(), "No resources found.");
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The cells of an object.
type Columns = fn(&Value, Timestamp) -> Vec<String>;

fn show(what: What, objects: &[Value], output: Option<Output>, now: Timestamp) -> anyhow::Result<String> {
    let (singular, kind) = match what {
        What::Pods => ("pod", "Pod"),
        What::Nodes => ("node", "Node"),
        What::ConfigMaps => ("configmap", "ConfigMap"),
    };
    match output {
        Some(Output::Json) => {
            let items: Vec<Value> = objects
                .iter()
                .map(|object| {
                    let mut object = object.clone();
                    if let Some(fields) = object.as_object_mut() {
                        fields.insert("apiVersion".to_owned(), "v1".into());
                        fields.insert("kind".to_owned(), kind.into());
                    }
                    object
                })
                .collect();
            let list = serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": items });
            return Ok(serde_json::to_string_pretty(&list)? + "\n");
        }
        Some(Output::Name) => {
            return Ok(objects
                .iter()
                .map(|object| format!("{singular}/{}\n", text(&object["metadata"]["name"])))
                .collect());
        }
        Some(Output::Wide) | None => {}
    }
    if objects.is_empty() {
        return Ok(String::new());
    }
    let wide = output == Some(Output::Wide);
    let (mut header, row): (Vec<&str>, Columns) = match what {
        What::Pods => (vec!["NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP"], pod),
        What::Nodes => (vec!["NAME", "STATUS", "ROLES", "AGE", "VERSION", "OS-IMAGE", "CONTAINER-RUNTIME"], node),
        What::ConfigMaps => (vec!["NAMESPACE", "NAME", "DATA", "AGE"], config_map),
    };
    let narrow = match what {
        What::Pods => 6,
        What::Nodes => 5,
        What::ConfigMaps => 4,
    };
    if !wide {
        header.truncate(narrow);
    }
    let rows: Vec<Vec<String>> = objects.iter().map(|object| row(object, now)).collect();
    Ok(table(&header, &rows))
}

fn pod(pod: &Value, now: Timestamp) -> Vec<String> {
    let list = |pointer: &str| pod.pointer(pointer).and_then(Value::as_array).cloned().unwrap_or_default();
    let statuses = list("/status/containerStatuses");
    let ready = statuses.iter().filter(|status| status["ready"] == true).count();
    let restarts: i64 = statuses.iter().filter_map(|status| status["restartCount"].as_i64()).sum();
    let last = statuses.iter().filter_map(|status| time(&status["lastState"]["terminated"]["finishedAt"])).max();
    let restarts = match last {
        Some(at) if restarts > 0 => format!("{restarts} ({} ago)", age(at, now)),
        _ => restarts.to_string(),
    };
    vec![
        text(&pod["metadata"]["namespace"]),
        text(&pod["metadata"]["name"]),
        format!("{ready}/{}", list("/spec/containers").len()),
        pod_state(pod, &list("/status/initContainerStatuses"), &statuses),
        restarts,
        object_age(pod, now),
        text(&pod["status"]["podIP"]),
    ]
}

/// The one word that says most about a pod.
fn pod_state(pod: &Value, init: &[Value], statuses: &[Value]) -> String {
    let reason = &pod["status"]["reason"];
    let mut word = text(if reason.is_string() { reason } else { &pod["status"]["phase"] });
    if word == "<none>" {
        word = "Pending".to_owned();
    }
    let total = pod.pointer("/spec/initContainers").and_then(Value::as_array).map_or(0, Vec::len);
    let done = init
        .iter()
        .filter(|status| status["state"]["terminated"]["exitCode"] == 0 || status["started"] == true)
        .count();
    let unfinished =
        init.iter().find(|status| !(status["state"]["terminated"]["exitCode"] == 0 || status["started"] == true));
    if let Some(status) = unfinished {
        word = match (&status["state"]["terminated"], &status["state"]["waiting"]["reason"]) {
            (terminated @ Value::Object(_), _) => {
                match terminated["reason"].as_str().filter(|reason| !reason.is_empty()) {
                    Some(reason) => format!("Init:{reason}"),
                    None => format!("Init:ExitCode:{}", terminated["exitCode"]),
                }
            }
            (_, Value::String(reason)) if !reason.is_empty() && reason != "PodInitializing" => format!("Init:{reason}"),
            _ => format!("Init:{done}/{total}"),
        };
    } else {
        for status in statuses.iter().rev() {
            let (waiting, terminated) = (&status["state"]["waiting"]["reason"], &status["state"]["terminated"]);
            if let Some(reason) = waiting.as_str().filter(|reason| !reason.is_empty()) {
                word = reason.to_owned();
            } else if let Some(reason) = terminated["reason"].as_str().filter(|reason| !reason.is_empty()) {
                word = reason.to_owned();
            } else if terminated.is_object() {
                word = format!("ExitCode:{}", terminated["exitCode"]);
            }
        }
        if word == "Completed"
            && statuses.iter().any(|status| status["ready"] == true && status["state"]["running"].is_object())
        {
            word = "Running".to_owned();
        }
    }
    if pod["metadata"]["deletionTimestamp"].is_string() { "Terminating".to_owned() } else { word }
}

fn node(node: &Value, now: Timestamp) -> Vec<String> {
    let conditions = node.pointer("/status/conditions").and_then(Value::as_array);
    let ready = conditions.into_iter().flatten().find(|condition| condition["type"] == "Ready");
    let mut state = match ready.map(|condition| text(&condition["status"])).as_deref() {
        Some("True") => "Ready".to_owned(),
        Some("False") => "NotReady".to_owned(),
        _ => "Unknown".to_owned(),
    };
    if node["spec"]["unschedulable"] == true {
        state += ",SchedulingDisabled";
    }
    let labels = node.pointer("/metadata/labels").and_then(Value::as_object);
    let roles: Vec<&str> = labels
        .into_iter()
        .flat_map(|labels| labels.keys())
        .filter_map(|key| key.strip_prefix("node-role.kubernetes.io/"))
        .collect();
    let info = &node["status"]["nodeInfo"];
    vec![
        text(&node["metadata"]["name"]),
        state,
        if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") },
        object_age(node, now),
        text(&info["kubeletVersion"]),
        text(&info["osImage"]),
        text(&info["containerRuntimeVersion"]),
    ]
}

fn config_map(object: &Value, now: Timestamp) -> Vec<String> {
    let count = |field: &str| object[field].as_object().map_or(0, serde_json::Map::len);
    vec![
        text(&object["metadata"]["namespace"]),
        text(&object["metadata"]["name"]),
        (count("data") + count("binaryData")).to_string(),
        object_age(object, now),
    ]
}

fn object_age(object: &Value, now: Timestamp) -> String {
    time(&object["metadata"]["creationTimestamp"]).map_or_else(|| "<unknown>".to_owned(), |at| age(at, now))
}

fn time(value: &Value) -> Option<Timestamp> {
    value.as_str()?.parse().ok()
}

fn text(value: &Value) -> String {
    value.as_str().filter(|text| !text.is_empty()).unwrap_or("<none>").to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables_read_as_kubectl_writes_them() {
        let now: Timestamp = "2026-01-01T01:00:00Z".parse().unwrap();
        let meta =
            |name: &str| json!({ "namespace": "default", "name": name, "creationTimestamp": "2026-01-01T00:00:00Z" });
        let spec = json!({ "containers": [{}, {}], "initContainers": [{}] });
        let pods = [
            json!({ "metadata": meta("web-1"), "spec": { "containers": [{}] }, "status": { "phase": "Running", "podIP": "10.88.0.2", "containerStatuses": [
                { "ready": true, "restartCount": 2, "state": { "running": {} }, "lastState": { "terminated": { "finishedAt": "2026-01-01T00:59:00Z" } } }] } }),
            json!({ "metadata": meta("crash"), "spec": spec, "status": { "phase": "Running", "containerStatuses": [
                { "ready": false, "restartCount": 5, "state": { "waiting": { "reason": "CrashLoopBackOff" } } }] } }),
            json!({ "metadata": meta("init"), "spec": spec, "status": { "phase": "Pending", "initContainerStatuses": [{ "state": { "running": {} } }] } }),
            json!({ "metadata": meta("fresh"), "spec": { "containers": [{}] } }),
            json!({ "metadata": { "namespace": "default", "name": "going", "deletionTimestamp": "2026-01-01T00:00:00Z" }, "spec": { "containers": [{}] }, "status": { "phase": "Running" } }),
        ];
        insta::assert_snapshot!(show(What::Pods, &pods, None, now).unwrap(), @r"
        NAMESPACE   NAME    READY   STATUS             RESTARTS      AGE
        default     web-1   1/1     Running            2 (60s ago)   60m
        default     crash   0/2     CrashLoopBackOff   5             60m
        default     init    0/2     Init:0/1           0             60m
        default     fresh   0/1     Pending            0             60m
        default     going   0/1     Terminating        0             <unknown>
        ");
        assert_eq!(show(What::Pods, &pods[..1], Some(Output::Name), now).unwrap(), "pod/web-1\n");
        assert!(show(What::Pods, &pods[..1], Some(Output::Wide), now).unwrap().contains("10.88.0.2"));
        let node = json!({ "metadata": { "name": "box", "labels": { "node-role.kubernetes.io/edge": "" } }, "spec": { "unschedulable": true },
            "status": { "conditions": [{ "type": "Ready", "status": "True" }], "nodeInfo": { "kubeletVersion": "v1.36.0" } } });
        insta::assert_snapshot!(show(What::Nodes, &[node], None, now).unwrap(), @r"
        NAME   STATUS                     ROLES   AGE         VERSION
        box    Ready,SchedulingDisabled   edge    <unknown>   v1.36.0
        ");
    }
}
