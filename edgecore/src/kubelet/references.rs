//! What a pod refers to, as the store holds it at one moment, and what the kubelet knows of its node.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service};
use skerry_proto::payload::{Settings, Token};

/// The objects of the pod's namespace (and the `kubernetes` Service of `default`) that the store holds. What is missing is absent.
#[derive(Clone, Debug, Default)]
pub struct References {
    /// ConfigMaps by name.
    pub config_maps: BTreeMap<String, ConfigMap>,
    /// Secrets by name.
    pub secrets: BTreeMap<String, Secret>,
    /// Tokens by [`skerry_proto::payload::token_key`].
    pub tokens: BTreeMap<String, Token>,
    /// Services for environment variables, of any namespace.
    pub services: Vec<Service>,
}

/// The node as pods see it. Computed at start and when the Node or the settings change.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    /// Node name.
    pub name: String,
    /// The box's own addresses, primary first.
    pub host_ips: Vec<IpAddr>,
    /// Allocatable CPU in milli.
    pub cpu_milli: i64,
    /// Allocatable memory in bytes.
    pub memory: i64,
    /// Allocatable ephemeral storage in bytes.
    pub ephemeral_storage: i64,
    /// Allocatable pods.
    pub pods: i64,
    /// Labels of the Node object.
    pub labels: BTreeMap<String, String>,
    /// Cluster DNS and domain.
    pub settings: Settings,
    /// Where pod directories are, `/var/lib/kubelet`.
    pub pods_root: PathBuf,
    /// Where pod logs are, `/var/log/pods`.
    pub logs_root: PathBuf,
    /// Where the links for log collectors are, `/var/log/containers`.
    pub log_links: PathBuf,
    /// The runtime uses the systemd cgroup driver.
    pub systemd_cgroups: bool,
    /// Names of runtime handlers; the empty one always exists.
    pub runtime_handlers: Vec<String>,
    /// Those of them that can make a mount read-only all the way down.
    pub recursive_read_only: Vec<String>,
    /// The runtime can leave out the groups that an image gives to a user.
    pub strict_groups: bool,
    /// RuntimeClass name to (handler, overhead) of what the store holds.
    pub runtime_classes: BTreeMap<String, RuntimeHandler>,
}

/// What a RuntimeClass says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeHandler {
    /// CRI runtime handler.
    pub handler: String,
    /// Overhead CPU in milli.
    pub overhead_cpu_milli: i64,
    /// Overhead memory in bytes.
    pub overhead_memory: i64,
}

/// An event to be recorded about a pod, in the words of the upstream kubelet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodEvent {
    /// `true`: Warning, `false`: Normal.
    pub warning: bool,
    /// CamelCase reason.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// `spec.containers{name}` and the like, for events about a container.
    pub field_path: Option<String>,
}
