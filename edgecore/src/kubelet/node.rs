//! What this box is and how it fares, as a NodeStatus: capacity, conditions, nodeInfo, images; and the facts that pods see.
//!
//! Measuring ([`Machine::read`], [`Load::read`]) is apart from judging ([`Pressure`], [`status`], [`due`]), which is pure. The cloud
//! owns the Node object; from here comes a report only when something is different, or after [`REPORT_EVERY`].

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{
    ContainerImage, NodeCondition, NodeFeatures, NodeRuntimeHandler, NodeRuntimeHandlerFeatures, NodeStatus,
    NodeSwapStatus, NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use skerry_proto::payload::Settings;
use skerry_proto::{BROKER_CONDITION, cri};

use super::references::NodeFacts;
use crate::devices::mqtt;
use crate::order;
use crate::runtime::cri::{CgroupDriver, Error, Health, Setup};

mod machine;

pub use machine::{Disk, Load, Machine, addresses, default_link};

/// How often the status is computed.
pub const EVERY: Duration = Duration::from_secs(10);
/// How often it is reported although nothing changed: heartbeats are for people, for the lease says that the node lives. Every report is
/// written to the disk twice; at the kubelet's five minutes that was most of what an idle box writes.
pub const REPORT_EVERY: Duration = Duration::from_secs(900);
/// A pressure is told for this long after it was last seen.
const STICKY: Duration = Duration::from_secs(300);
/// Below this much available memory is pressure, and as much is kept from pods.
const MEMORY_RESERVE: u64 = 100 << 20;
const MAX_IMAGES: usize = 50;
const MAX_NAMES: usize = 5;
/// Bytes of a label's value.
const MAX_LABEL: usize = 63;

/// The version that the cluster sees: the Kubernetes release whose behaviour this follows, and ours as build metadata.
pub const KUBELET_VERSION: &str = concat!("v1.36.3+skerry-", env!("CARGO_PKG_VERSION"));

/// What a pod could be given on this box.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Logical CPUs.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// The file system of the pods, in bytes.
    pub ephemeral_storage: u64,
    /// Most pods.
    pub pods: u32,
    /// Size such as `2Mi` to bytes reserved in huge pages.
    pub hugepages: BTreeMap<String, u64>,
}

impl Resources {
    /// What is left for pods after what eviction keeps free.
    #[must_use]
    pub fn allocatable(&self) -> Self {
        let huge: u64 = self.hugepages.values().sum();
        Self {
            memory: self.memory.saturating_sub(MEMORY_RESERVE).saturating_sub(huge),
            ephemeral_storage: self.ephemeral_storage - self.ephemeral_storage / 10,
            ..self.clone()
        }
    }

    fn quantities(&self) -> BTreeMap<String, Quantity> {
        let mut quantities = BTreeMap::from([
            ("cpu".to_owned(), Quantity(self.cpus.to_string())),
            ("memory".to_owned(), bytes(self.memory)),
            ("ephemeral-storage".to_owned(), bytes(self.ephemeral_storage)),
            ("pods".to_owned(), Quantity(self.pods.to_string())),
        ]);
        quantities.extend(self.hugepages.iter().map(|(size, all)| (format!("hugepages-{size}"), bytes(*all))));
        quantities
    }
}

fn bytes(bytes: u64) -> Quantity {
    Quantity(if bytes > 0 && bytes.is_multiple_of(1024) { format!("{}Ki", bytes / 1024) } else { bytes.to_string() })
}

/// Which pressures there are. Each stays for five minutes after it was last seen, so that it does not flap.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pressure {
    memory: Option<Duration>,
    disk: Option<Duration>,
    pids: Option<Duration>,
}

/// What [`Pressure::observe`] finds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressures {
    /// Too little memory.
    pub memory: bool,
    /// Too little room or too few inodes, for pods or for images.
    pub disk: bool,
    /// Too few process ids.
    pub pids: bool,
}

impl Pressure {
    /// Takes down the load at `now` (monotonic).
    pub fn observe(&mut self, now: Duration, load: &Load) -> Pressures {
        let is_short = |disk: &Disk, percent: u64| {
            below(disk.available, disk.capacity, percent) || below(disk.inodes_free, disk.inodes, 5)
        };
        let sees = Pressures {
            memory: load.memory_available < MEMORY_RESERVE,
            disk: load.pods_disk.as_ref().is_some_and(|disk| is_short(disk, 10))
                || load.image_disk.as_ref().is_some_and(|disk| is_short(disk, 15)),
            pids: below(load.pids_max.saturating_sub(load.pids), load.pids_max, 5),
        };
        let stick = |last: &mut Option<Duration>, seen: bool| {
            if seen {
                *last = Some(now);
            }
            last.is_some_and(|last| now.saturating_sub(last) < STICKY)
        };
        Pressures {
            memory: stick(&mut self.memory, sees.memory),
            disk: stick(&mut self.disk, sees.disk),
            pids: stick(&mut self.pids, sees.pids),
        }
    }
}

/// Less than so many percent; what has no total (inodes of some file systems) is never short.
fn below(part: u64, whole: u64, percent: u64) -> bool {
    whole > 0 && u128::from(part) * 100 < u128::from(whole) * u128::from(percent)
}

/// What the runtime is, which changes only when it is restarted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeVersion {
    /// `containerd`.
    pub name: String,
    /// `1.6.20`.
    pub version: String,
}

/// Everything a status is computed from.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The box.
    pub machine: &'a Machine,
    /// What it has.
    pub capacity: &'a Resources,
    /// What is short.
    pub pressures: Pressures,
    /// What the runtime says of itself.
    pub health: &'a Result<Health, Error>,
    /// What else keeps the node from being ready, in words.
    pub faults: &'a [String],
    /// What the runtime is; `None` before it answered.
    pub version: Option<&'a RuntimeVersion>,
    /// What the runtime lists.
    pub images: &'a [cri::Image],
    /// The MQTT broker, where one is needed.
    pub broker: Option<&'a mqtt::Status>,
}

/// The status at `now`. `previous` is the one before, for the times of transitions.
pub fn status(inputs: &Inputs<'_>, previous: Option<&NodeStatus>, now: Timestamp) -> NodeStatus {
    let health = inputs.health.as_ref().ok();
    let handlers = health.map(|health| health.handlers.as_slice()).unwrap_or_default();
    let previous_conditions = previous.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    NodeStatus {
        capacity: Some(inputs.capacity.quantities()),
        allocatable: Some(inputs.capacity.allocatable().quantities()),
        conditions: Some(conditions(inputs, &faults(inputs), previous_conditions, now)),
        node_info: Some(node_info(inputs.machine, inputs.version)),
        images: Some(images(inputs.images)),
        runtime_handlers: if handlers.is_empty() {
            previous.and_then(|status| status.runtime_handlers.clone())
        } else {
            Some(handlers.iter().map(handler).collect())
        },
        features: match health.and_then(|health| health.supplemental_groups_policy) {
            Some(policy) => Some(NodeFeatures { supplemental_groups_policy: Some(policy) }),
            None => previous.and_then(|status| status.features.clone()),
        },
        ..Default::default()
    }
}

/// Whether a status has to be reported: never yet, something changed but the heartbeats, or [`REPORT_EVERY`] went by (monotonic times).
pub fn due(last_sent: Option<Duration>, now: Duration, old: &NodeStatus, new: &NodeStatus) -> bool {
    let Some(last_sent) = last_sent else { return true };
    now.saturating_sub(last_sent) >= REPORT_EVERY || !is_same(old, new)
}

fn is_same(old: &NodeStatus, new: &NodeStatus) -> bool {
    let (a, b) = (old.conditions.as_deref().unwrap_or_default(), new.conditions.as_deref().unwrap_or_default());
    let same_condition = |(a, b): (&NodeCondition, &NodeCondition)| {
        a.type_ == b.type_
            && a.status == b.status
            && a.reason == b.reason
            && a.message == b.message
            && a.last_transition_time == b.last_transition_time
    };
    a.len() == b.len()
        && a.iter().zip(b).all(same_condition)
        && old.capacity == new.capacity
        && old.allocatable == new.allocatable
        && old.node_info == new.node_info
        && old.images == new.images
        && old.runtime_handlers == new.runtime_handlers
        && old.features == new.features
}

/// Where pods and their logs live.
#[derive(Clone, Debug)]
pub struct Paths {
    /// `/var/lib/kubelet`.
    pub pods_root: PathBuf,
    /// `/var/log/pods`.
    pub logs_root: PathBuf,
    /// `/var/log/containers`.
    pub log_links: PathBuf,
}

/// The node as pods see it. Labels, settings and runtime classes come from the store: the caller puts them in.
pub fn facts(
    name: &str,
    capacity: &Resources,
    host_ips: Vec<IpAddr>,
    paths: Paths,
    setup: &Setup,
    health: Option<&Health>,
) -> NodeFacts {
    let allocatable = capacity.allocatable();
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let handlers = health.map(|health| health.handlers.as_slice()).unwrap_or_default();
    let mut runtime_handlers = vec![String::new()];
    runtime_handlers.extend(handlers.iter().map(|handler| handler.name.clone()).filter(|name| !name.is_empty()));
    let reaches_down = |handler: &&cri::RuntimeHandler| {
        handler.features.as_ref().is_some_and(|features| features.recursive_read_only_mounts)
    };
    let recursive_read_only = handlers.iter().filter(reaches_down).map(|handler| handler.name.clone()).collect();
    NodeFacts {
        name: name.to_owned(),
        host_ips,
        cpu_milli: i64::from(allocatable.cpus) * 1000,
        memory: signed(allocatable.memory),
        ephemeral_storage: signed(allocatable.ephemeral_storage),
        pods: i64::from(allocatable.pods),
        labels: BTreeMap::new(),
        settings: Settings::default(),
        pods_root: paths.pods_root,
        logs_root: paths.logs_root,
        log_links: paths.log_links,
        systemd_cgroups: setup.cgroup_driver == Some(CgroupDriver::Systemd),
        runtime_handlers,
        recursive_read_only,
        strict_groups: health.and_then(|health| health.supplemental_groups_policy) == Some(true),
        runtime_classes: BTreeMap::new(),
    }
}

/// Labels that the box knows best. The hostname is the node's name, as schedulers and local volumes take it to be; a name that is too long
/// for a label is left out.
pub fn labels(name: &str, machine: &Machine) -> BTreeMap<String, String> {
    let hostname = (name.len() <= MAX_LABEL).then_some(("kubernetes.io/hostname", name));
    let rest = [
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", machine.architecture),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", machine.architecture),
    ];
    order::map(hostname.into_iter().chain(rest).map(|(key, value)| (key.to_owned(), value.to_owned())))
}

fn faults(inputs: &Inputs<'_>) -> Vec<String> {
    let mut faults = match inputs.health {
        Ok(health) => {
            let runtime = health.runtime.iter().map(|words| format!("container runtime not ready: {words}"));
            let network = health.network.iter().map(|words| format!("container runtime network not ready: {words}"));
            runtime.chain(network).collect()
        }
        Err(error) => vec![format!("container runtime is down: {error}")],
    };
    faults.extend(inputs.faults.iter().cloned());
    let capacity = inputs.capacity;
    let missing = [
        ("CPU", capacity.cpus == 0),
        ("memory", capacity.memory == 0),
        ("ephemeral storage", capacity.ephemeral_storage == 0),
    ];
    faults.extend(
        missing.iter().filter(|(_, none)| *none).map(|(what, _)| format!("the {what} of the box is not known")),
    );
    faults
}

fn conditions(
    inputs: &Inputs<'_>,
    faults: &[String],
    previous: &[NodeCondition],
    now: Timestamp,
) -> Vec<NodeCondition> {
    let (now, pressures) = (whole_second(now), inputs.pressures);
    let condition = |kind: &str, status: &str, reason: &str, message: String| {
        let before = previous.iter().find(|condition| condition.type_ == kind && condition.status == status);
        NodeCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message),
            last_heartbeat_time: Some(Time(now)),
            last_transition_time: before.and_then(|before| before.last_transition_time.clone()).or(Some(Time(now))),
        }
    };
    let pressure = |kind: &str, short: bool, reasons: [&str; 2], messages: [&str; 2]| {
        let which = usize::from(short);
        condition(kind, ["False", "True"][which], reasons[which], format!("kubelet has {}", messages[which]))
    };
    let ready = match faults {
        [] => condition("Ready", "True", "KubeletReady", "kubelet is posting ready status".to_owned()),
        [one] => condition("Ready", "False", "KubeletNotReady", one.clone()),
        many => condition("Ready", "False", "KubeletNotReady", format!("[{}]", many.join(", "))),
    };
    let mut all = vec![
        pressure(
            "MemoryPressure",
            pressures.memory,
            ["KubeletHasSufficientMemory", "KubeletHasInsufficientMemory"],
            ["sufficient memory available", "insufficient memory available"],
        ),
        pressure(
            "DiskPressure",
            pressures.disk,
            ["KubeletHasNoDiskPressure", "KubeletHasDiskPressure"],
            ["no disk pressure", "disk pressure"],
        ),
        pressure(
            "PIDPressure",
            pressures.pids,
            ["KubeletHasSufficientPID", "KubeletHasInsufficientPID"],
            ["sufficient PID available", "insufficient PID available"],
        ),
        ready,
    ];
    if let Some(broker) = inputs.broker {
        all.push(match (broker.connected, broker.is_missed) {
            (true, _) => condition(BROKER_CONDITION, "True", "BrokerConnected", broker.message.clone()),
            (false, true) => condition(BROKER_CONDITION, "False", "NoBroker", broker.message.clone()),
            // Only whoever has just started does not know.
            (false, false) => condition(BROKER_CONDITION, "Unknown", "NotTriedYet", "edgecore starts".to_owned()),
        });
    }
    all
}

fn whole_second(at: Timestamp) -> Timestamp {
    at - SignedDuration::from_nanos(i64::from(at.subsec_nanosecond()))
}

fn node_info(machine: &Machine, version: Option<&RuntimeVersion>) -> NodeSystemInfo {
    NodeSystemInfo {
        architecture: machine.architecture.to_owned(),
        boot_id: machine.boot_id.clone(),
        container_runtime_version: version
            .map(|runtime| format!("{}://{}", runtime.name, runtime.version.trim_start_matches('v')))
            .unwrap_or_default(),
        kernel_version: machine.kernel.clone(),
        kube_proxy_version: String::new(),
        kubelet_version: KUBELET_VERSION.to_owned(),
        machine_id: machine.machine_id.clone(),
        operating_system: "linux".to_owned(),
        os_image: machine.os_image.clone(),
        swap: (machine.swap > 0)
            .then(|| NodeSwapStatus { capacity: Some(i64::try_from(machine.swap).unwrap_or(i64::MAX)) }),
        system_uuid: machine.system_uuid.clone(),
    }
}

fn images(all: &[cri::Image]) -> Vec<ContainerImage> {
    let mut largest: Vec<&cri::Image> = all.iter().collect();
    // By name too, so that the list is the same as long as the images are.
    order::sort_by(&mut largest, |a, b| b.size.cmp(&a.size).then_with(|| a.id.cmp(&b.id)));
    largest
        .into_iter()
        .filter(|image| !image.repo_digests.is_empty() || !image.repo_tags.is_empty())
        .take(MAX_IMAGES)
        .map(|image| ContainerImage {
            names: Some(image.repo_digests.iter().chain(&image.repo_tags).take(MAX_NAMES).cloned().collect()),
            size_bytes: Some(i64::try_from(image.size).unwrap_or(i64::MAX)),
        })
        .collect()
}

fn handler(handler: &cri::RuntimeHandler) -> NodeRuntimeHandler {
    NodeRuntimeHandler {
        name: Some(handler.name.clone()),
        features: handler.features.as_ref().map(|features| NodeRuntimeHandlerFeatures {
            recursive_read_only_mounts: Some(features.recursive_read_only_mounts),
            // Whatever the runtime can: pods with hostUsers: false are refused.
            user_namespaces: Some(false),
        }),
    }
}

/// What pods could be given, measured once at start. `max_pods` is the configured limit.
pub fn capacity(machine: &Machine, pods_root: &Path, max_pods: u32) -> Resources {
    Resources {
        cpus: machine.cpus,
        memory: machine.memory,
        ephemeral_storage: Disk::read(pods_root).map(|disk| disk.capacity).unwrap_or_default(),
        pods: max_pods,
        hugepages: machine.hugepages.clone(),
    }
}

#[cfg(test)]
mod tests;
