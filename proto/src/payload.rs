//! The JSON payloads that are not Kubernetes objects: reports, settings, service account tokens, joining.

use serde::{Deserialize, Serialize};

/// Payload of a pod status report. Applied as one step: first the status, then, when `finished`, the deletion of the Pod object
/// with grace 0 and a UID precondition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PodReport {
    /// A whole core/v1 PodStatus as the edge sees it. Conditions of types the edge does not own are left out.
    pub status: serde_json::Value,
    /// Everything of a pod that is being deleted is gone from the edge: the Pod object may go.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub finished: bool,
}

/// Payload of a node status report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    /// A core/v1 NodeStatus: capacity, allocatable, conditions, nodeInfo, images. Addresses and daemonEndpoints are the cloud's.
    pub status: serde_json::Value,
    /// The box's own addresses, for people.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// Labels that the edge knows best: `kubernetes.io/os`, `kubernetes.io/arch`, `kubernetes.io/hostname` and those given at join.
    #[serde(default)]
    pub labels: std::collections::BTreeMap<String, String>,
}

/// The one object of the settings collection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Settings {
    /// Addresses of the cluster DNS service; empty: pods use the box's resolv.conf.
    pub cluster_dns: Vec<String>,
    /// Such as `cluster.local`.
    pub cluster_domain: String,
}

/// A service account token minted for one projected source of one pod: the object of the tokens collection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Token {
    /// The signed JWT.
    pub token: String,
    /// When it expires, seconds since the Unix epoch.
    pub expires: i64,
}

/// Key of a token in its collection. `audience` is empty for the apiserver's default one.
pub fn token_key(namespace: &str, pod_uid: &str, audience: &str, expiration_seconds: i64) -> String {
    format!("{namespace}/{pod_uid}/{expiration_seconds}/{audience}")
}

/// Body of `POST /v1/join`; the token goes in `Authorization: Bearer`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The wanted node name.
    pub node: String,
    /// PEM certificate signing request. Only its public key is used.
    pub csr: String,
    /// /etc/machine-id, so that the same box may join again while its name is alive.
    pub machine_id: String,
    /// Labels for the Node.
    #[serde(default)]
    pub labels: std::collections::BTreeMap<String, String>,
    /// The box's clock, seconds since the Unix epoch: a skew is reported, not trusted.
    pub time: i64,
}

/// Answer to `POST /v1/join` and `POST /v1/renew` (whose body is `{"csr": PEM}`, under the old certificate).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinResponse {
    /// PEM certificate chain of the node.
    pub certificate: String,
    /// PEM of every CA to trust.
    pub ca: String,
    /// The cloud's clock, seconds since the Unix epoch.
    pub time: i64,
}

/// Body of any refusal of the HTTPS endpoints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// A stable word: `token_expired`, `token_unknown`, `token_used_up`, `token_other_node`, `name_invalid`, `name_taken`, …
    pub reason: String,
    /// Cause and remedy, for people.
    pub message: String,
}
