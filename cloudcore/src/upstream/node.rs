//! Node status: the patch that carries a report.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use skerry_proto::payload::NodeReport;
use skerry_proto::{ADDRESSES_ANNOTATION, BROKER_CONDITION};

use super::pod::meaning;
use crate::backend::{Agents, NodeIdentity};
use crate::nodes::{self, labels};

/// What an edge may say of its node; the rest of a NodeStatus is the cloud's.
const FIELDS: [&str; 8] = [
    "capacity",
    "allocatable",
    "conditions",
    "nodeInfo",
    "images",
    "volumesInUse",
    "runtimeHandlers",
    "declaredFeatures",
];

/// Conditions of a kubelet's, and edgecore's own.
const OWN_CONDITIONS: [&str; 5] = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready", BROKER_CONDITION];
/// In a list of a strategic merge patch: what is to be done with the element of that key.
const DIRECTIVE: &str = "$patch";
/// Heartbeats of conditions are for people, and so are renewed this seldom, in seconds: a little more often than an edge that has nothing new
/// reports.
const HEARTBEAT: i64 = 870;

/// What is remembered of a Node's status, to tell whether a report changes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeShown {
    /// Of all that the edge is the author of, heartbeats apart.
    fingerprint: u64,
    /// When the condition Ready was last confirmed, seconds since the Unix epoch.
    heartbeat: i64,
}

impl NodeShown {
    /// Reads it off a Node as the apiserver has it.
    pub(crate) fn of(node: &Value) -> Self {
        Self { fingerprint: fingerprint(node, None), heartbeat: heartbeat(node) }
    }

    /// Whether a patch that [`patch`] made would change nothing that anybody waits for.
    pub(super) fn says(&self, patch: &Value, capacity: Option<&Value>) -> bool {
        self.fingerprint == fingerprint(patch, capacity) && heartbeat(patch).saturating_sub(self.heartbeat) < HEARTBEAT
    }
}

/// Of a Node, or of a patch and the capacity that it is merged into. What the patch would not take away, but the Node has, makes a difference
/// too: that costs a write and loses nothing.
fn fingerprint(node: &Value, capacity: Option<&Value>) -> u64 {
    let (metadata, status) = (&node["metadata"], &node["status"]);
    let mut own = Map::new();
    for field in FIELDS.into_iter().chain(["features"]).filter(|field| !matches!(*field, "conditions" | "capacity")) {
        own.extend(status.get(field).and_then(meaning).map(|value| (field.to_owned(), value)));
    }
    let mut merged = status["capacity"].as_object().cloned().unwrap_or_default();
    for (resource, quantity) in foreign(capacity, status.get("capacity")) {
        merged.entry(resource).or_insert(quantity);
    }
    own.insert("capacity".into(), merged.into());
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let mut conditions: Vec<Value> = conditions
        .filter(|condition| condition["type"].as_str().is_some_and(|kind| OWN_CONDITIONS.contains(&kind)))
        .filter(|condition| condition.get(DIRECTIVE).is_none())
        .filter_map(|condition| {
            let mut condition = meaning(condition)?;
            condition.as_object_mut()?.remove("lastHeartbeatTime");
            Some(condition)
        })
        .collect();
    conditions.sort_by_key(|condition| condition["type"].to_string());
    own.insert("conditions".into(), conditions.into());
    let labels = metadata["labels"].as_object().into_iter().flatten();
    let measured = labels.filter(|(key, _)| labels::is_measured(key)).map(|(key, value)| (key.clone(), value.clone()));
    own.insert("labels".into(), measured.collect::<Map<_, _>>().into());
    own.insert("box".into(), metadata["annotations"][ADDRESSES_ANNOTATION].clone());
    let mut hasher = DefaultHasher::new();
    Value::Object(own).to_string().hash(&mut hasher);
    hasher.finish()
}

fn heartbeat(node: &Value) -> i64 {
    let conditions = node["status"]["conditions"].as_array().into_iter().flatten();
    let ready = conditions.into_iter().find(|condition| condition["type"] == "Ready");
    let time = ready.and_then(|ready| ready["lastHeartbeatTime"].as_str()?.parse::<Timestamp>().ok());
    time.map(Timestamp::as_second).unwrap_or_default()
}

/// The strategic merge patch of nodes/status, with the box's addresses and the labels it may set. `capacity` is what the apiserver has:
/// resources that others added to it must also be allocatable. `version` is that of the Node that was looked at, for no other is it meant;
/// `unnamed` the session's epoch and whose it is, where that Node does not name it.
pub(crate) fn patch(
    node: &NodeIdentity,
    version: &str,
    unnamed: Option<(u64, Agents)>,
    report: &NodeReport,
    capacity: Option<&Value>,
) -> Result<Value, String> {
    let reported = report.status.as_object().ok_or("the status is not an object")?;
    let mut status: Map<String, Value> = FIELDS
        .into_iter()
        .filter_map(|field| Some((field.to_owned(), reported.get(field).filter(|value| !value.is_null())?.clone())))
        .collect();
    if let Some(features) = reported.get("features").filter(|features| features.is_object()) {
        status.insert("features".into(), features.clone());
    }
    for condition in status.get("conditions").and_then(Value::as_array).into_iter().flatten() {
        if !condition["type"].is_string() || !condition["status"].is_string() {
            return Err("a condition lacks its type or status".into());
        }
        if condition.get(DIRECTIVE).is_some() {
            return Err(format!("a condition has {DIRECTIVE}, which would be a directive to the apiserver"));
        }
    }
    if let Some(Value::Array(conditions)) = status.get_mut("conditions")
        && !conditions.iter().any(|condition| condition["type"] == BROKER_CONDITION)
    {
        // The node may have had it, and what a patch does not name stays.
        conditions.push(json!({DIRECTIVE: "delete", "type": BROKER_CONDITION}));
    }
    let foreign = foreign(capacity, status.get("capacity"));
    if let Some(Value::Object(allocatable)) = status.get_mut("allocatable") {
        for (resource, quantity) in foreign {
            allocatable.entry(resource).or_insert(quantity);
        }
    }
    let labels: BTreeMap<&String, &String> =
        report.labels.iter().filter(|(key, value)| labels::is_measured(key) && labels::allowed(key, value)).collect();
    // Those of joining are the operator's from then on. The status of a Node is the one subresource through which its labels and annotations may be written as well.
    let mut annotations = unnamed.map_or_else(|| json!({}), |(epoch, agents)| nodes::annotations(epoch, agents));
    annotations[ADDRESSES_ANNOTATION] = box_addresses(&report.addresses).into();
    let metadata = json!({"uid": node.uid, "resourceVersion": version, "annotations": annotations, "labels": labels});
    Ok(json!({"metadata": metadata, "status": status}))
}

/// What the box says its own addresses are. Those of the Node are where its kubelet is reached ([`crate::kubelet`]).
fn box_addresses(addresses: &[String]) -> String {
    let listed = addresses.iter().map(|address| json!({"type": "InternalIP", "address": address}));
    Value::Array(listed.collect()).to_string()
}

fn foreign(there: Option<&Value>, reported: Option<&Value>) -> Vec<(String, Value)> {
    let there = there.and_then(Value::as_object).into_iter().flatten();
    let known = |resource: &String| reported.and_then(|reported| reported.get(resource)).is_some();
    there
        .filter(|(resource, _)| !known(resource))
        .map(|(resource, quantity)| (resource.clone(), quantity.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn e() -> NodeIdentity {
        NodeIdentity { name: "e".to_owned(), uid: "u".to_owned() }
    }

    #[test]
    fn foreign_capacity_becomes_allocatable_and_the_clouds_fields_stay() {
        let report = NodeReport {
            status: json!({
                "capacity": {"cpu": "2"}, "allocatable": {"cpu": "1900m"}, "nodeInfo": {"kernelVersion": "6"},
                "conditions": [{"type": "Ready", "status": "True"}],
                "daemonEndpoints": {"kubeletEndpoint": {"Port": 1}}, "phase": "Running", "addresses": [{"type": "InternalIP", "address": "8.8.8.8"}],
            }),
            addresses: vec!["192.168.1.5".into(), "10.9.9.9".into()],
            labels: BTreeMap::new(),
        };
        let stored = json!({"cpu": "2", "example.com/dongle": "3"});
        let boxes = r#"[{"address":"192.168.1.5","type":"InternalIP"},{"address":"10.9.9.9","type":"InternalIP"}]"#;
        assert_eq!(
            patch(&e(), "3", Some((7, Agents { who: 10, ousted: [11, 0, 0, 0] })), &report, Some(&stored)).unwrap(),
            json!({
                "metadata": {
                    "uid": "u", "resourceVersion": "3", "labels": {},
                    "annotations": {ADDRESSES_ANNOTATION: boxes, "skerry.dev/epoch": "7", "skerry.dev/agents": "a,b"},
                },
                "status": {
                    "capacity": {"cpu": "2"}, "allocatable": {"cpu": "1900m", "example.com/dongle": "3"}, "nodeInfo": {"kernelVersion": "6"},
                    "conditions": [
                        {"type": "Ready", "status": "True"},
                        {"$patch": "delete", "type": BROKER_CONDITION},
                    ],
                },
            })
        );
    }

    #[test]
    fn a_status_is_written_once_until_something_changes_or_its_heartbeat_is_old() {
        let report = |disk: &str, minute: u32| NodeReport {
            status: json!({
                "capacity": {"cpu": "2"}, "allocatable": {"cpu": "2"}, "nodeInfo": {"kernelVersion": "6", "kubeProxyVersion": ""},
                "conditions": [
                    {"type": "Ready", "status": "True", "lastHeartbeatTime": format!("2026-01-01T00:{minute:02}:00Z")},
                    {"type": "DiskPressure", "status": disk, "lastHeartbeatTime": format!("2026-01-01T00:{minute:02}:00Z")},
                ],
            }),
            addresses: vec!["192.168.1.5".into()],
            labels: BTreeMap::from([("kubernetes.io/arch".into(), "arm64".into())]),
        };
        // As the apiserver has it after the first: with what others wrote, in another order.
        let node = json!({
            "metadata": {
                "labels": {"kubernetes.io/arch": "arm64", "site": "mill"},
                "annotations": {ADDRESSES_ANNOTATION: box_addresses(&["192.168.1.5".into()]), "other": "x"},
            },
            "status": {
                "capacity": {"cpu": "2", "example.com/dongle": "3"}, "allocatable": {"cpu": "2", "example.com/dongle": "3"},
                "nodeInfo": {"kernelVersion": "6"}, "daemonEndpoints": {"kubeletEndpoint": {"Port": 20000}},
                "conditions": [
                    {"type": "NetworkUnavailable", "status": "False"},
                    {"type": "DiskPressure", "status": "False", "lastHeartbeatTime": "2026-01-01T00:00:00Z"},
                    {"type": "Ready", "status": "True", "lastHeartbeatTime": "2026-01-01T00:00:00Z"},
                ],
                "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
            },
        });
        let (shown, capacity) = (NodeShown::of(&node), Some(&node["status"]["capacity"]));
        let says = |report: &NodeReport| shown.says(&patch(&e(), "3", None, report, capacity).unwrap(), capacity);
        assert!(says(&report("False", 14)));
        assert!(!says(&report("True", 0)), "something changed");
        assert!(!says(&report("False", 15)), "the heartbeat is old");
        assert!(!says(&NodeReport { addresses: vec!["10.0.0.1".into()], ..report("False", 0) }), "the box moved");
        let mut with_broker = report("False", 0);
        let missing = json!({"type": BROKER_CONDITION, "status": "False", "message": "no broker"});
        with_broker.status["conditions"].as_array_mut().unwrap().push(missing.clone());
        assert!(!says(&with_broker), "a broker is needed");
        let mut had = node.clone();
        had["status"]["conditions"].as_array_mut().unwrap().push(missing);
        let told = |report: &NodeReport| {
            NodeShown::of(&had).says(&patch(&e(), "3", None, report, capacity).unwrap(), capacity)
        };
        assert!(told(&with_broker));
        assert!(!told(&report("False", 0)), "none is needed any more");
        assert!(!NodeShown::default().says(&patch(&e(), "3", None, &report("False", 0), None).unwrap(), None));
    }

    #[test]
    fn only_labels_that_the_machine_decides_are_passed_on() {
        let labels = [
            ("kubernetes.io/arch", "amd64"),
            ("site", "mill"),
            ("node-role.kubernetes.io/control-plane", ""),
            ("bad", "no/slash"),
        ];
        let report = NodeReport {
            status: json!({}),
            addresses: vec!["a".into(), "b".into()],
            labels: labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        };
        assert_eq!(
            patch(&e(), "3", None, &report, None).unwrap()["metadata"],
            json!({
                "uid": "u", "resourceVersion": "3", "annotations": {ADDRESSES_ANNOTATION: box_addresses(&report.addresses)},
                "labels": {"kubernetes.io/arch": "amd64"},
            })
        );
    }
}
