//! Events: what a node may say in its own name, made anew from the fields an event has.

use serde_json::{Map, Value, json};
use skerry_proto::sync::Report;

/// The longest message that is passed on, in bytes, as the apiserver's own recorders hold it.
const MESSAGE: usize = 1024;

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum About {
    /// The node itself.
    Node,
    /// A pod, which must be one of the node's.
    Pod {
        /// Its name; its namespace is the event's.
        name: String,
        /// Its UID.
        uid: String,
    },
    /// A device, which must be one of the node's.
    Device {
        /// Its name; its namespace is the event's.
        name: String,
        /// Its UID.
        uid: String,
    },
}

/// An event to create.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outgoing {
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its name.
    pub(crate) name: String,
    /// What it is about.
    pub(crate) about: About,
    /// The object.
    pub(crate) body: Value,
    /// How often it happened; more than once means that it may be there already.
    pub(crate) count: i64,
}

/// Reads an event off its report; `Err` says why it is refused.
pub(crate) fn outgoing(node: &str, report: &Report) -> Result<Outgoing, String> {
    let event: Value = serde_json::from_slice(&report.payload).map_err(|error| format!("not an event: {error}"))?;
    let name = event["metadata"]["name"].as_str().filter(|name| !name.is_empty()).ok_or("the event has no name")?;
    let involved = &event["involvedObject"];
    let object_namespace = involved["namespace"].as_str().unwrap_or_default();
    let namespace = event["metadata"]["namespace"].as_str().unwrap_or(object_namespace);
    let object = involved["name"].as_str().unwrap_or_default();
    let about = match involved["kind"].as_str() {
        Some("Node") if object != node => return Err(format!("node {node} may not report events of node {object}")),
        Some("Node") => About::Node,
        Some(kind @ ("Pod" | "Device")) => {
            let uid = involved["uid"].as_str().unwrap_or_default();
            let what = kind.to_lowercase();
            if object_namespace != namespace || namespace.is_empty() {
                return Err(format!("the event's namespace is not its {what}'s"));
            }
            if object.is_empty() || uid.is_empty() {
                return Err(format!("the event does not say which {what} it is about"));
            }
            let (name, uid) = (object.to_owned(), uid.to_owned());
            if kind == "Pod" { About::Pod { name, uid } } else { About::Device { name, uid } }
        }
        other => return Err(format!("a node may not report events of a {}", other.unwrap_or("nothing"))),
    };
    // Names say whose an event is, so that no node counts another's up. edgecore makes them of a hash.
    let suffix = name.strip_prefix(object).and_then(|rest| rest.strip_prefix('.'));
    if !suffix.is_some_and(|suffix| !suffix.is_empty() && suffix.bytes().all(|byte| byte.is_ascii_hexdigit())) {
        return Err(format!("an event of {object} must be named {object}.HASH, not {name}"));
    }
    // Events of what has no namespace live in the default one.
    let namespace = if about == About::Node { "default" } else { namespace };
    let count = event["count"].as_i64().unwrap_or(1).max(1);

    let mut body = Map::new();
    for field in ["reason", "type", "firstTimestamp", "lastTimestamp", "eventTime", "action"] {
        if let Some(value) = event.get(field).filter(|value| !value.is_null()) {
            body.insert(field.into(), value.clone());
        }
    }
    let component = event["source"]["component"].as_str().unwrap_or("kubelet");
    body.insert("apiVersion".into(), "v1".into());
    body.insert("kind".into(), "Event".into());
    body.insert("metadata".into(), json!({"name": name, "namespace": namespace}));
    body.insert("involvedObject".into(), involved.clone());
    body.insert("message".into(), shortened(event["message"].as_str().unwrap_or_default()).into());
    body.insert("count".into(), count.into());
    body.insert("source".into(), json!({"component": component, "host": node}));
    body.insert("reportingComponent".into(), component.into());
    body.insert("reportingInstance".into(), node.into());
    Ok(Outgoing { namespace: namespace.to_owned(), name: name.to_owned(), about, body: body.into(), count })
}

/// The merge patch for an event that is there already and shows this; `None` when it says all there is to say.
pub(crate) fn repetition(event: &Outgoing, shown: &Value) -> Option<Value> {
    (event.count > shown["count"].as_i64().unwrap_or_default()).then(|| {
        json!({
            "metadata": {"resourceVersion": shown["metadata"]["resourceVersion"]},
            "count": event.count, "lastTimestamp": event.body["lastTimestamp"], "message": event.body["message"],
        })
    })
}

fn shortened(message: &str) -> &str {
    &message[..message.floor_char_boundary(MESSAGE)]
}

#[cfg(test)]
mod tests {
    use skerry_proto::sync::ReportKind;

    use super::*;

    fn report(event: &Value) -> Report {
        Report {
            id: 1,
            kind: ReportKind::Event,
            namespace: String::new(),
            name: String::new(),
            uid: String::new(),
            payload: event.to_string().into(),
        }
    }

    fn pod_event() -> Value {
        json!({
            "metadata": {"name": "p.17", "namespace": "n", "labels": {"x": "y"}},
            "involvedObject": {"kind": "Pod", "namespace": "n", "name": "p", "uid": "u", "fieldPath": "spec.containers{c}"},
            "reason": "Started", "message": "Started container c", "type": "Normal", "count": 3,
            "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:01:00Z",
            "source": {"component": "kubelet", "host": "someone-else"}, "related": {"kind": "Secret"},
        })
    }

    #[test]
    fn the_host_is_the_node_whatever_the_event_says() {
        let event = outgoing("edge", &report(&pod_event())).unwrap();
        assert_eq!(event.about, About::Pod { name: "p".into(), uid: "u".into() });
        assert_eq!(event.body["source"], json!({"component": "kubelet", "host": "edge"}));
        assert_eq!(event.body["metadata"], json!({"name": "p.17", "namespace": "n"}));
        assert_eq!(event.body.get("related"), None);
        let shown = |count: i64| json!({"metadata": {"resourceVersion": "7"}, "count": count});
        let patch = repetition(&event, &shown(2)).unwrap();
        assert_eq!((&patch["count"], &patch["metadata"]), (&json!(3), &json!({"resourceVersion": "7"})));
        assert_eq!(repetition(&event, &shown(3)), None);
        assert_eq!(repetition(&event, &shown(5)), None, "a count goes back");
    }

    #[test]
    fn node_events_live_in_the_default_namespace() {
        let event = json!({"metadata": {"name": "edge.1"}, "involvedObject": {"kind": "Node", "name": "edge", "uid": "edge"}, "reason": "Starting"});
        let event = outgoing("edge", &report(&event)).unwrap();
        assert_eq!((event.namespace.as_str(), event.about.clone()), ("default", About::Node));
    }

    #[test]
    fn what_is_not_the_nodes_to_say_is_refused() {
        let refused = |change: &dyn Fn(&mut Value)| {
            let mut event = pod_event();
            change(&mut event);
            outgoing("edge", &report(&event)).unwrap_err()
        };
        assert!(refused(&|event| event["metadata"]["namespace"] = "kube-system".into()).contains("namespace"));
        assert!(refused(&|event| event["involvedObject"]["kind"] = "Secret".into()).contains("Secret"));
        assert!(refused(&|event| event["involvedObject"] = json!({"kind": "Node", "name": "other"})).contains("other"));
        assert!(refused(&|event| event["involvedObject"]["uid"] = "".into()).contains("which pod"));
        assert!(refused(&|event| event["metadata"]["name"] = "".into()).contains("no name"));
        for name in ["other.17", "p", "p.", "p.17.x", "p17"] {
            assert!(
                refused(&|event| event["metadata"]["name"] = name.into()).contains("must be named p.HASH"),
                "{name}"
            );
        }
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let mut event = pod_event();
        event["message"] = "ä".repeat(600).into();
        let event = outgoing("edge", &report(&event)).unwrap();
        assert_eq!(event.body["message"].as_str().unwrap().len(), 1024);
    }
}
