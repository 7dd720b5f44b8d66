//! A pod as the watch brings it, taken apart once.

use serde_json::Value;
use skerry_proto::sync::{Collection, Object};

use super::references::{References, references};
use super::sanitise;
use crate::upstream::pod::StatusFacts;

/// A pod of the apiserver's.
#[derive(Clone, Debug)]
pub(crate) struct PodInput {
    /// `namespace/name`.
    pub(crate) key: String,
    /// The Node it is bound to.
    pub(crate) node: String,
    /// As the edge gets it.
    pub(crate) object: Object,
    /// What it needs.
    pub(crate) references: References,
    /// What reports are held against.
    pub(crate) facts: PodFacts,
}

/// What cloudcore remembers of a pod's API object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PodFacts {
    /// metadata.uid
    pub(crate) uid: String,
    /// metadata.resourceVersion
    pub(crate) resource_version: String,
    /// Whether it is being deleted.
    pub(crate) deleting: bool,
    /// Of its status.
    pub(crate) status: StatusFacts,
}

impl PodFacts {
    /// Reads them off a pod.
    pub(crate) fn of(pod: &Value) -> Self {
        let metadata = &pod["metadata"];
        Self {
            uid: metadata["uid"].as_str().unwrap_or_default().to_owned(),
            resource_version: metadata["resourceVersion"].as_str().unwrap_or_default().to_owned(),
            deleting: !metadata["deletionTimestamp"].is_null(),
            status: StatusFacts::of(&pod["status"]),
        }
    }

    /// Whether this is an older state of the same pod.
    pub(crate) fn older_than(&self, other: &Self) -> bool {
        self.uid == other.uid && version_less(&self.resource_version, &other.resource_version)
    }
}

impl PodInput {
    /// Takes a pod apart.
    pub(crate) fn of(pod: Value) -> Self {
        Self {
            key: sanitise::key(&pod),
            node: pod["spec"]["nodeName"].as_str().unwrap_or_default().to_owned(),
            references: references(&pod),
            facts: PodFacts::of(&pod),
            object: sanitise::object(Collection::Pods, pod),
        }
    }
}

/// Resource versions of one kind are decimal numbers that rise; what is not a number is not compared.
pub(crate) fn version_less(a: &str, b: &str) -> bool {
    matches!((a.parse::<u64>(), b.parse::<u64>()), (Ok(a), Ok(b)) if a < b)
}
