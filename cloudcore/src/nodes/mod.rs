//! The Node objects of edge nodes: registering them, their leases, what keeps their pods, and noticing that they are gone.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use kube::api::{DynamicObject, Patch};
use serde_json::{Value, json};
use skerry_proto::EDGE_LABEL;

use crate::apiserver::{Apiserver, Kind, Verdict, verdict};
use crate::backend::{BackendError, NodeCheck, NodeIdentity, RegisterError};

pub(crate) mod autonomy;
pub(crate) mod labels;
pub(crate) mod leases;

/// Which machine a Node is.
const MACHINE_ANNOTATION: &str = "skerry.dev/machine-id";
/// A name is free for another machine when its lease is older than this.
const ALIVE: SignedDuration = SignedDuration::from_secs(leases::DURATION_SECONDS);
/// Someone else may create or delete the Node while we look.
const ATTEMPTS: usize = 4;

/// Creates the Node, or takes it over for the same machine or from one that is not heard of any more. `name` can be a Node's.
pub(crate) async fn register(
    api: &Apiserver,
    name: &str,
    machine_id: &str,
    wanted: &BTreeMap<String, String>,
    now: Timestamp,
) -> Result<NodeIdentity, RegisterError> {
    let failed = |source| RegisterError::Api(BackendError { action: format!("register node {name}"), source });
    let labels = labels::of_node(name, wanted);
    let mut attempt = 0;
    loop {
        attempt += 1;
        let answer = match api.get(Kind::Node, "", name).await.map_err(failed)? {
            None => api.create(Kind::Node, "", new_node(name, machine_id, &labels)).await,
            Some(node) => {
                let lease = api.get(Kind::Lease, leases::NAMESPACE, name).await.map_err(failed)?;
                may_take_over(name, machine_id, &node, lease.as_ref(), now)?;
                let uid = node.metadata.uid.unwrap_or_default();
                let patch = json!({"metadata": {"uid": uid, "labels": labels, "annotations": {MACHINE_ANNOTATION: machine_id}}});
                api.patch(Kind::Node, "", name, &Patch::Merge(patch)).await
            }
        };
        match answer {
            Ok(node) => return Ok(NodeIdentity { name: name.to_owned(), uid: node.metadata.uid.unwrap_or_default() }),
            Err(error) => match verdict(&error) {
                Verdict::Conflict | Verdict::NotFound if attempt < ATTEMPTS => {}
                _ => return Err(failed(error)),
            },
        }
    }
}

/// What the apiserver says about an identity.
pub(crate) async fn check(api: &Apiserver, node: &NodeIdentity) -> Result<NodeCheck, BackendError> {
    let failed = |source| BackendError { action: format!("look up node {}", node.name), source };
    Ok(match api.get(Kind::Node, "", &node.name).await.map_err(failed)? {
        None => NodeCheck::Deleted,
        Some(found) if found.metadata.uid.as_deref() == Some(node.uid.as_str()) => NodeCheck::Live,
        Some(_) => NodeCheck::OtherUid,
    })
}

/// Gives a Node its label back: what carries it is ours to serve.
pub(crate) async fn relabel(api: &Apiserver, node: &NodeIdentity) -> Result<(), kube::Error> {
    let patch = json!({"metadata": {"uid": node.uid, "labels": {EDGE_LABEL: ""}}});
    api.patch(Kind::Node, "", &node.name, &Patch::Merge(patch)).await.map(drop)
}

fn may_take_over(
    name: &str,
    machine_id: &str,
    node: &DynamicObject,
    lease: Option<&DynamicObject>,
    now: Timestamp,
) -> Result<(), RegisterError> {
    let metadata = &node.metadata;
    if !metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(EDGE_LABEL)) {
        return Err(RegisterError::NotEdge(name.to_owned()));
    }
    let machine = metadata.annotations.as_ref().and_then(|annotations| annotations.get(MACHINE_ANNOTATION));
    let Some(machine) = machine.filter(|machine| *machine != machine_id) else { return Ok(()) };
    let renewed = lease.and_then(|lease| lease.data["spec"]["renewTime"].as_str()?.parse::<Timestamp>().ok());
    match renewed {
        Some(renewed) if now.duration_since(renewed) < ALIVE => Err(RegisterError::NameAlive {
            name: name.to_owned(),
            machine_id: machine.clone(),
            last_seen: renewed.to_string(),
        }),
        _ => Ok(()),
    }
}

fn new_node(name: &str, machine_id: &str, labels: &BTreeMap<String, String>) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {MACHINE_ANNOTATION: machine_id}},
        "spec": {},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_belongs_to_the_machine_that_lives_under_it() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let object = |value: Value| serde_json::from_value::<DynamicObject>(value).unwrap();
        let node = |machine: Option<&str>| {
            object(
                json!({"metadata": {"name": "e", "labels": {EDGE_LABEL: ""}, "annotations": machine.map(|id| json!({MACHINE_ANNOTATION: id}))}}),
            )
        };
        let lease = |time: &str| Some(object(json!({"metadata": {"name": "e"}, "spec": {"renewTime": time}})));
        let (fresh, stale) = (lease("2026-01-01T00:00:30.000000Z"), lease("2026-01-01T00:00:10.000000Z"));
        let check =
            |node: &DynamicObject, lease: &Option<DynamicObject>| may_take_over("e", "me", node, lease.as_ref(), now);

        assert!(check(&node(Some("me")), &fresh).is_ok());
        assert!(check(&node(None), &fresh).is_ok());
        assert!(check(&node(Some("other")), &stale).is_ok());
        assert!(check(&node(Some("other")), &None).is_ok());
        let alive = check(&node(Some("other")), &fresh).unwrap_err().to_string();
        assert!(alive.contains("machine id other, last seen 2026-01-01T00:00:30Z"), "{alive}");
        let worker = object(json!({"metadata": {"name": "e"}}));
        assert!(matches!(check(&worker, &stale), Err(RegisterError::NotEdge(_))));
    }
}
