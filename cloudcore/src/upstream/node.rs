//! Node status: the patch that carries a report.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use skerry_proto::ADDRESSES_ANNOTATION;
use skerry_proto::payload::NodeReport;

use crate::nodes::labels;

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

/// The strategic merge patch of nodes/status, with the box's addresses and the labels it may set. `capacity` is what the apiserver has: resources that others added to it must also be
/// allocatable.
pub(crate) fn patch(name: &str, uid: &str, report: &NodeReport, capacity: Option<&Value>) -> Result<Value, String> {
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
    }
    let foreign = foreign(capacity, status.get("capacity"));
    if let Some(Value::Object(allocatable)) = status.get_mut("allocatable") {
        for (resource, quantity) in foreign {
            allocatable.entry(resource).or_insert(quantity);
        }
    }
    let mut addresses = vec![json!({"$patch": "replace"})];
    addresses.extend(report.addresses.first().map(|address| json!({"type": "InternalIP", "address": address})));
    addresses.push(json!({"type": "Hostname", "address": name}));
    status.insert("addresses".into(), addresses.into());
    let labels: BTreeMap<&String, &String> =
        report.labels.iter().filter(|(key, value)| labels::is_measured(key) && labels::allowed(key, value)).collect();
    // Those of joining are the operator's from then on. The status of a Node is the one subresource through which its labels and annotations may be written as well.
    let annotations = json!({ADDRESSES_ANNOTATION: report.addresses.join(",")});
    Ok(json!({"metadata": {"uid": uid, "annotations": annotations, "labels": labels}, "status": status}))
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
        assert_eq!(
            patch("edge", "u", &report, Some(&stored)).unwrap(),
            json!({
                "metadata": {"uid": "u", "annotations": {ADDRESSES_ANNOTATION: "192.168.1.5,10.9.9.9"}, "labels": {}},
                "status": {
                    "capacity": {"cpu": "2"}, "allocatable": {"cpu": "1900m", "example.com/dongle": "3"}, "nodeInfo": {"kernelVersion": "6"},
                    "conditions": [{"type": "Ready", "status": "True"}],
                    "addresses": [
                        {"$patch": "replace"}, {"type": "InternalIP", "address": "192.168.1.5"}, {"type": "Hostname", "address": "edge"},
                    ],
                },
            })
        );
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
            patch("e", "u", &report, None).unwrap()["metadata"],
            json!({"uid": "u", "annotations": {ADDRESSES_ANNOTATION: "a,b"}, "labels": {"kubernetes.io/arch": "amd64"}})
        );
    }
}
