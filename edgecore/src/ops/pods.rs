//! Pods as the node knows them: what the store wants, with the status that the kubelet noted last. A name becomes a container's id through
//! that status.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde_json::{Value, json};
use skerry_proto::cri::{Container, ContainerState};
use skerry_proto::sync::Collection;

use super::answer::Refusal;
use super::route::{ContainerPath, PodPath};
use crate::control::{POD_STATUS_NOTES, objects};
use crate::kubelet::observed::label;
use crate::runtime::cri;
use crate::store::{self, Store};

/// The pod of a name; of several the one that is not on its way out. `None`: there is none, or not with that UID.
pub(super) async fn find(store: &Store, path: &PodPath) -> Result<Option<Pod>, store::Error> {
    let rows = store.named(Collection::Pods, &format!("{}/{}", path.namespace, path.name)).await?;
    let mut pods: Vec<Pod> = rows.iter().filter_map(|row| serde_json::from_slice(&row.json).ok()).collect();
    pods.retain(|pod| path.uid.is_none() || pod.metadata.uid == path.uid);
    let Some(mut pod) = pods.into_iter().min_by_key(|pod| pod.metadata.deletion_timestamp.is_some()) else {
        return Ok(None);
    };
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    if let Some(note) = store.note(POD_STATUS_NOTES, &uid).await?
        && let Ok(status) = serde_json::from_slice::<PodStatus>(&note)
    {
        pod.status = Some(status);
    }
    Ok(Some(pod))
}

/// A pod for a request that streams.
pub(super) async fn pod(store: &Store, path: &PodPath) -> Result<Pod, Refusal> {
    find(store, path).await?.ok_or_else(|| Refusal::missing("pod does not exist"))
}

/// A pod, and the id of its container that runs.
pub(super) async fn running(store: &Store, of: &ContainerPath) -> Result<(Pod, String), Refusal> {
    // By name first: that there is another pod of the name is the same as that the container is not there.
    let pod = pod(store, &PodPath { uid: None, ..of.pod.clone() }).await?;
    let name = &of.container;
    let missing = || Refusal::failed(format!("container not found ({name:?})"));
    if of.pod.uid.is_some() && pod.metadata.uid != of.pod.uid {
        return Err(missing());
    }
    let statuses = pod.status.iter().flat_map(|status| {
        [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses]
    });
    let runs = statuses
        .flatten()
        .flatten()
        .find(|status| status.name == *name && status.state.as_ref().is_some_and(|state| state.running.is_some()));
    let id = runs.and_then(|status| status.container_id.as_deref()).map(|id| runtime_id(id).to_owned());
    let id = id.ok_or_else(missing)?;
    Ok((pod, id))
}

/// `containerd://id` without what stands before the id.
pub(super) fn runtime_id(id: &str) -> &str {
    id.split_once("://").map_or(id, |(_, id)| id)
}

/// The pods that are wanted, with what the node knows of them.
pub(super) async fn desired(store: &Store) -> Result<Value, store::Error> {
    let rows = store.list(Collection::Pods).await?;
    let notes = store.notes(POD_STATUS_NOTES).await?;
    Ok(list(objects(&rows, &notes, None)))
}

/// The pods that the runtime has running containers of.
pub(super) async fn in_runtime(cri: &cri::Cri) -> Result<Value, cri::Error> {
    let containers = cri.list_containers().await?;
    let mut pods: BTreeMap<&str, (&Container, Vec<Value>)> = BTreeMap::new();
    for container in containers.iter().filter(|container| container.state() == ContainerState::ContainerRunning) {
        let Some(uid) = container.labels.get(label::POD_UID) else { continue };
        let name = container.labels.get(label::CONTAINER_NAME);
        let image = container.image.as_ref().map(|image| &image.image);
        let shown = json!({ "name": name, "image": image, "resources": {} });
        pods.entry(uid).or_insert_with(|| (container, Vec::new())).1.push(shown);
    }
    let pod = |(uid, (container, containers)): (&str, (&Container, Vec<Value>))| {
        let label = |key: &str| container.labels.get(key);
        let metadata = json!({ "name": label(label::POD_NAME), "namespace": label(label::POD_NAMESPACE), "uid": uid });
        json!({ "metadata": metadata, "spec": { "containers": containers }, "status": {} })
    };
    Ok(list(pods.into_iter().map(pod).collect()))
}

fn list(items: Vec<Value>) -> Value {
    let items = Value::Array(items);
    json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items })
}
