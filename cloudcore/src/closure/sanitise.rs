//! What of an object goes to the edge.
//!
//! The version of an object is a fingerprint of what comes out of here, so everything that changes without meaning anything to the edge is
//! taken out: managedFields, resourceVersion, the status that the edge itself writes, and the taints that only say whether the link stands.
//! Of a pod's status that leaves the conditions its readiness gates name, which others write and the edge's own condition Ready waits for,
//! and a terminal phase: a pod that is over must not run again on an edge that lost its memory of it.

use serde_json::{Map, Value, json};
use skerry_proto::ADDRESSES_ANNOTATION;
use skerry_proto::sync::{Collection, Object};

use crate::nodes::{AGENTS_ANNOTATION, EPOCH_ANNOTATION};

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Taints the node lifecycle controller sets by what it hears of the lease.
const LINK_TAINTS: [&str; 2] = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];

/// Makes the object as the edge gets it. Keys are sorted, so that every replica makes the same bytes.
pub(crate) fn object(collection: Collection, mut value: Value) -> Object {
    let status = if collection == Collection::Pods { pod_status(&value) } else { Map::new() };
    if let Value::Object(fields) = &mut value {
        fields.remove("status");
        if !status.is_empty() {
            fields.insert("status".into(), status.into());
        }
    }
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        for noise in ["managedFields", "resourceVersion", "selfLink"] {
            metadata.remove(noise);
        }
        if matches!(collection, Collection::Devices | Collection::DeviceModels) {
            // Their status is no subresource, so that it counts: reports would come back to the edge that made them.
            metadata.remove("generation");
        }
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove(LAST_APPLIED);
            if collection == Collection::Node {
                annotations.remove(ADDRESSES_ANNOTATION);
                annotations.remove(EPOCH_ANNOTATION);
                annotations.remove(AGENTS_ANNOTATION);
            }
            if annotations.is_empty() {
                metadata.remove("annotations");
            }
        }
    }
    if collection == Collection::Node {
        without_link_taints(&mut value);
    }
    let key = key(&value);
    let uid = value["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
    Object::new(collection, key, uid, value.to_string().as_bytes())
}

/// `namespace/name`, or `name` for what has no namespace.
pub(crate) fn key(value: &Value) -> String {
    let metadata = &value["metadata"];
    let name = metadata["name"].as_str().unwrap_or_default();
    match metadata["namespace"].as_str() {
        Some(namespace) if !namespace.is_empty() => format!("{namespace}/{name}"),
        _ => name.to_owned(),
    }
}

/// What of a pod's status the edge does not know by itself.
fn pod_status(pod: &Value) -> Map<String, Value> {
    let mut status = Map::new();
    let gates = gates(pod);
    if !gates.is_empty() {
        status.insert("conditions".into(), gates.into());
    }
    let phase = &pod["status"]["phase"];
    if matches!(phase.as_str(), Some("Succeeded" | "Failed")) {
        status.insert("phase".into(), phase.clone());
    }
    status
}

/// The conditions that the pod's readiness gates name, as far as they are there: type and status, for the rest decides nothing.
fn gates(pod: &Value) -> Vec<Value> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let gates = list(&pod["spec"]["readinessGates"]);
    let named = |kind: &Value| kind.is_string() && gates.iter().any(|gate| gate["conditionType"] == *kind);
    let mut found = list(&pod["status"]["conditions"]);
    found.retain(|condition| named(&condition["type"]));
    found.sort_by_key(|condition| condition["type"].to_string());
    found.iter().map(|condition| json!({"type": condition["type"], "status": condition["status"]})).collect()
}

fn without_link_taints(node: &mut Value) {
    let Some(spec) = node.get_mut("spec").and_then(Value::as_object_mut) else { return };
    if let Some(taints) = spec.get_mut("taints").and_then(Value::as_array_mut) {
        taints.retain(|taint| !taint["key"].as_str().is_some_and(|key| LINK_TAINTS.contains(&key)));
        if taints.is_empty() {
            spec.remove("taints");
        }
    }
}

#[cfg(test)]
mod tests {
    use skerry_proto::sync::decode;

    use super::*;

    fn sent(object: &Object) -> Value {
        serde_json::from_slice(&decode(object.encoding, &object.payload).unwrap()).unwrap()
    }

    #[test]
    fn only_a_phase_that_is_final_travels() {
        let pod = |phase: &str| {
            let pod = json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "status": {"phase": phase, "podIP": "10.0.0.1"}});
            sent(&object(Collection::Pods, pod)).get("status").cloned()
        };
        assert_eq!((pod("Pending"), pod("Running")), (None, None));
        assert_eq!(pod("Failed"), Some(json!({"phase": "Failed"})));
    }

    #[test]
    fn a_pod_keeps_its_intent_and_loses_its_noise() {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "p", "namespace": "n", "uid": "u", "resourceVersion": "7", "generation": 2, "managedFields": [{}],
                "deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 30, "labels": {"a": "b"},
                "annotations": {LAST_APPLIED: "{}", "keep": "me"},
            },
            "spec": {"containers": [], "aFieldOfTomorrow": {"x": 1}},
            "status": {"phase": "Running"},
        });
        let object = object(Collection::Pods, pod);
        assert_eq!((object.entry.key.as_str(), object.entry.uid.as_str()), ("n/p", "u"));
        assert_eq!(
            sent(&object),
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {
                    "name": "p", "namespace": "n", "uid": "u", "generation": 2, "annotations": {"keep": "me"}, "labels": {"a": "b"},
                    "deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 30,
                },
                "spec": {"containers": [], "aFieldOfTomorrow": {"x": 1}},
            })
        );
    }

    #[test]
    fn conditions_that_readiness_gates_name_travel_and_nothing_else_of_the_status() {
        let pod = |gates: Value, ready: &str, gate: &str, time: &str| {
            let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "lastProbeTime": time, "message": time});
            let conditions = json!([condition("z/late", "True"), condition("Ready", ready), condition("a/gate", gate)]);
            object(
                Collection::Pods,
                json!({
                    "metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": {"readinessGates": gates},
                    "status": {"phase": "Running", "conditions": conditions},
                }),
            )
        };
        let gates = json!([{"conditionType": "z/late"}, {"conditionType": "a/gate"}, {"conditionType": "not/there"}]);
        let closed = pod(gates.clone(), "True", "False", "1");
        let conditions = json!([{"type": "a/gate", "status": "False"}, {"type": "z/late", "status": "True"}]);
        assert_eq!(sent(&closed)["status"], json!({"conditions": conditions}));
        assert_eq!(
            closed.entry.version,
            pod(gates.clone(), "False", "False", "2").entry.version,
            "the edge's own and times"
        );
        assert_ne!(closed.entry.version, pod(gates, "True", "True", "1").entry.version, "a gate that opens is news");
        for none in [json!([]), Value::Null, json!([{"conditionType": "not/there"}])] {
            assert_eq!(sent(&pod(none, "True", "True", "1")).get("status"), None);
        }
    }

    #[test]
    fn a_node_does_not_change_with_the_link() {
        let node = |version: &str, taints: Value| {
            object(
                Collection::Node,
                json!({
                    "metadata": {"name": "e", "uid": "u", "resourceVersion": version, "annotations": {ADDRESSES_ANNOTATION: version}},
                    "spec": {"taints": taints}, "status": {"conditions": [version]},
                }),
            )
        };
        let down = node("1", json!([{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}]));
        let up = json!({"metadata": {"name": "e", "uid": "u"}, "spec": {}});
        assert_eq!(sent(&down), up);
        assert_eq!(down.entry.version, node("2", json!([])).entry.version);
        assert_ne!(down.entry.version, node("2", json!([{"key": "mine"}])).entry.version);
    }
}
