//! `/stats/summary` in the types of `stats.k8s.io/v1alpha1` (k8s.io/kubelet/pkg/apis/stats/v1alpha1). What is not known is left out.

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::cgroup::{Stall, Usage};
use super::disk::{Used, used};
use super::proc::{Interface, NodeMemory};
use super::snapshot::{Container, Pod, Snapshot};
use crate::kubelet::node::{Disk, Load};

/// What belongs to the node beside its cgroup; absent parts are left out.
#[derive(Debug, Default)]
pub(super) struct NodeParts {
    pub(super) load: Load,
    pub(super) interfaces: Vec<Interface>,
    /// The interface with the default route.
    pub(super) default_link: Option<String>,
    /// What images take.
    pub(super) images: Option<Used>,
    /// What writable layers take.
    pub(super) layers: Option<Used>,
}

#[derive(Serialize)]
pub(super) struct Summary<'a> {
    node: NodeStats<'a>,
    pods: Vec<PodStats<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeStats<'a> {
    node_name: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    system_containers: Vec<ContainerStats<'a>>,
    start_time: Option<Time>,
    #[serde(flatten)]
    basics: Basics,
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<NetworkStats<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fs: Option<FsStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    runtime: Option<RuntimeStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rlimit: Option<RlimitStats>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PodStats<'a> {
    pod_ref: PodReference<'a>,
    start_time: Option<Time>,
    containers: Vec<ContainerStats<'a>>,
    #[serde(flatten)]
    basics: Basics,
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<NetworkStats<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    volume: Vec<VolumeStats<'a>>,
    #[serde(rename = "ephemeral-storage", skip_serializing_if = "Option::is_none")]
    ephemeral_storage: Option<FsStats>,
    #[serde(rename = "process_stats", skip_serializing_if = "Option::is_none")]
    process_stats: Option<ProcessStats>,
}

#[derive(Serialize)]
struct PodReference<'a> {
    name: &'a str,
    namespace: &'a str,
    uid: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ContainerStats<'a> {
    name: &'a str,
    start_time: Option<Time>,
    #[serde(flatten)]
    basics: Basics,
    #[serde(skip_serializing_if = "Option::is_none")]
    rootfs: Option<FsStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logs: Option<FsStats>,
}

/// What nodes, pods and containers have in common.
#[derive(Serialize)]
struct Basics {
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<CpuStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<MemoryStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    io: Option<IoStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    swap: Option<SwapStats>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CpuStats {
    time: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage_nano_cores: Option<u64>,
    usage_core_nano_seconds: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Stall>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MemoryStats {
    time: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    available_bytes: Option<u64>,
    usage_bytes: u64,
    working_set_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    rss_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    page_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    major_page_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Stall>,
}

#[derive(Serialize)]
struct IoStats {
    time: Time,
    psi: Stall,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SwapStats {
    time: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    swap_available_bytes: Option<u64>,
    swap_usage_bytes: u64,
}

#[derive(Serialize)]
struct NetworkStats<'a> {
    time: Time,
    /// The one that leads out; without one, an empty name.
    #[serde(flatten)]
    default: InterfaceStats<'a>,
    interfaces: Vec<InterfaceStats<'a>>,
}

#[derive(Clone, Copy, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct InterfaceStats<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rx_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rx_errors: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tx_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tx_errors: Option<u64>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RuntimeStats {
    #[serde(skip_serializing_if = "Option::is_none")]
    image_fs: Option<FsStats>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container_fs: Option<FsStats>,
}

#[derive(Serialize)]
struct RlimitStats {
    time: Time,
    maxpid: u64,
    curproc: u64,
}

#[derive(Serialize)]
struct ProcessStats {
    process_count: u64,
}

#[derive(Serialize)]
struct VolumeStats<'a> {
    #[serde(flatten)]
    fs: FsStats,
    name: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FsStats {
    time: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    available_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    capacity_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    used_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    inodes_free: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    inodes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    inodes_used: Option<u64>,
}

/// In RFC 3339 with whole seconds, as metav1.Time is written.
#[derive(Clone, Copy)]
struct Time(Timestamp);

impl Serialize for Time {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let whole = self.0 - SignedDuration::from_nanos(i64::from(self.0.subsec_nanosecond()));
        serializer.collect_str(&whole)
    }
}

/// The summary; without `parts` only CPU, memory and swap.
pub(super) fn summary<'a>(node: &'a str, snapshot: &'a Snapshot, parts: Option<&'a NodeParts>) -> Summary<'a> {
    let disks = parts.map(|parts| &parts.load);
    let time = Time(snapshot.node.at);
    let fs = disks.and_then(|load| load.pods_disk.as_ref());
    Summary {
        node: NodeStats {
            node_name: node,
            system_containers: system_containers(snapshot),
            start_time: snapshot.booted.map(Time),
            basics: node_basics(&snapshot.node, snapshot.memory.as_ref(), parts.is_some()),
            network: parts
                .and_then(|parts| network(snapshot.node.at, &parts.interfaces, parts.default_link.as_deref())),
            fs: fs.map(|disk| file_system(time, Some(disk), Some(used(disk)))),
            runtime: parts.map(|parts| runtime(time, parts)),
            rlimit: disks.map(|load| RlimitStats { time, maxpid: load.pids_max, curproc: load.pids }),
        },
        pods: snapshot.pods.iter().map(|pod| pod_stats(pod, parts)).collect(),
    }
}

/// `kubelet` is this process, `runtime` the one that answers on the runtime's socket, and `pods` the cgroup of all of them.
fn system_containers<'a>(snapshot: &Snapshot) -> Vec<ContainerStats<'a>> {
    let start_time = snapshot.booted.map(Time);
    let container = |name, start_time, basics| ContainerStats { name, start_time, basics, rootfs: None, logs: None };
    let time = Time(snapshot.node.at);
    let programs = snapshot.programs.iter().map(|(name, own)| {
        let (usage_nano_cores, psi) = (own.rate, None);
        let cpu = own.cpu.map(|usage| CpuStats { time, usage_nano_cores, usage_core_nano_seconds: usage, psi });
        let memory = MemoryStats {
            time,
            available_bytes: None,
            usage_bytes: own.resident,
            working_set_bytes: own.resident,
            rss_bytes: own.own,
            page_faults: Some(own.faults),
            major_page_faults: Some(own.major_faults),
            psi: None,
        };
        let started = snapshot.booted.map(|booted| Time(super::after(booted, own.started)));
        container(*name, started, Basics { cpu, memory: Some(memory), io: None, swap: None })
    });
    let pods = container("pods", start_time, basics(&snapshot.all_pods, false));
    programs.chain([pods]).collect()
}

fn pod_stats<'a>(pod: &'a Pod, parts: Option<&NodeParts>) -> PodStats<'a> {
    let (at, full) = (Time(pod.usage.at), parts.is_some());
    let disk = parts.and_then(|parts| parts.load.pods_disk.as_ref());
    PodStats {
        pod_ref: PodReference { name: &pod.listed.name, namespace: &pod.listed.namespace, uid: &pod.listed.uid },
        start_time: pod.listed.sandbox.as_ref().map(|sandbox| Time(sandbox.created_at)),
        containers: pod.containers.iter().map(|container| container_stats(container, parts)).collect(),
        basics: basics(&pod.usage, full),
        network: network(pod.usage.at, &pod.interfaces, Some("eth0")).filter(|_| full),
        volume: pod
            .volumes
            .iter()
            .map(|volume| {
                let disk = volume.memory.as_ref().or(disk);
                VolumeStats { fs: file_system(at, disk, volume.used), name: &volume.name }
            })
            .collect(),
        ephemeral_storage: parts.map(|_| file_system(at, disk, Some(ephemeral(pod)))),
        process_stats: pod.usage.processes.filter(|_| full).map(|process_count| ProcessStats { process_count }),
    }
}

/// Writable layers, logs, and volumes that are not in memory.
fn ephemeral(pod: &Pod) -> Used {
    let containers = pod.containers.iter().flat_map(|container| [container.layer, container.logs]);
    let volumes = pod.volumes.iter().filter(|volume| volume.memory.is_none()).map(|volume| volume.used);
    containers.chain(volumes).flatten().fold(Used::default(), |sum, one| Used {
        bytes: sum.bytes.saturating_add(one.bytes),
        inodes: sum.inodes.saturating_add(one.inodes),
    })
}

fn container_stats<'a>(container: &'a Container, parts: Option<&NodeParts>) -> ContainerStats<'a> {
    let time = Time(container.usage.at);
    let images = parts.and_then(|parts| parts.load.image_disk.as_ref());
    let pods = parts.and_then(|parts| parts.load.pods_disk.as_ref());
    ContainerStats {
        name: &container.instance.name,
        start_time: container.instance.started_at.map(Time),
        basics: basics(&container.usage, parts.is_some()),
        rootfs: container.layer.filter(|_| parts.is_some()).map(|layer| file_system(time, images, Some(layer))),
        logs: container.logs.filter(|_| parts.is_some()).map(|logs| file_system(time, pods, Some(logs))),
    }
}

fn basics(usage: &Usage, full: bool) -> Basics {
    let time = Time(usage.at);
    Basics {
        cpu: usage.cpu.as_ref().map(|cpu| CpuStats {
            time,
            usage_nano_cores: cpu.rate,
            usage_core_nano_seconds: cpu.usage,
            psi: usage.pressure.cpu,
        }),
        memory: usage.memory.as_ref().map(|memory| MemoryStats {
            time,
            available_bytes: memory.limit.map(|limit| limit.saturating_sub(memory.working_set)),
            usage_bytes: memory.usage,
            working_set_bytes: memory.working_set,
            rss_bytes: memory.rss,
            page_faults: memory.faults,
            major_page_faults: memory.major_faults,
            psi: usage.pressure.memory,
        }),
        io: usage.pressure.io.filter(|_| full).map(|psi| IoStats { time, psi }),
        swap: usage.memory.as_ref().and_then(|memory| {
            let swap_usage_bytes = memory.swap?;
            let swap_available_bytes = memory.swap_limit.map(|limit| limit.saturating_sub(swap_usage_bytes));
            Some(SwapStats { time, swap_available_bytes, swap_usage_bytes })
        }),
    }
}

fn node_basics(usage: &Usage, memory: Option<&NodeMemory>, full: bool) -> Basics {
    let mut basics = basics(usage, full);
    if let (Some(stats), Some(memory)) = (&mut basics.memory, memory) {
        stats.available_bytes = Some(memory.total.saturating_sub(memory.used.working_set));
    }
    if let (Some(stats), Some(memory)) = (&mut basics.swap, memory) {
        stats.swap_available_bytes = Some(memory.swap_total.saturating_sub(stats.swap_usage_bytes));
    }
    basics
}

fn network<'a>(at: Timestamp, interfaces: &'a [Interface], default: Option<&str>) -> Option<NetworkStats<'a>> {
    let interfaces: Vec<InterfaceStats<'_>> = interfaces
        .iter()
        .map(|interface| InterfaceStats {
            name: &interface.name,
            rx_bytes: Some(interface.received.bytes),
            rx_errors: Some(interface.received.errors),
            tx_bytes: Some(interface.sent.bytes),
            tx_errors: Some(interface.sent.errors),
        })
        .collect();
    let default = interfaces.iter().find(|interface| Some(interface.name) == default).copied().unwrap_or_default();
    (!interfaces.is_empty()).then_some(NetworkStats { time: Time(at), default, interfaces })
}

fn runtime(time: Time, parts: &NodeParts) -> RuntimeStats {
    let disk = parts.load.image_disk.as_ref();
    let fs = |used: Option<Used>| (disk.is_some() || used.is_some()).then(|| file_system(time, disk, used));
    RuntimeStats { image_fs: fs(parts.images), container_fs: fs(parts.layers) }
}

fn file_system(time: Time, disk: Option<&Disk>, used: Option<Used>) -> FsStats {
    FsStats {
        time,
        available_bytes: disk.map(|disk| disk.available),
        capacity_bytes: disk.map(|disk| disk.capacity),
        used_bytes: used.map(|used| used.bytes),
        inodes_free: disk.map(|disk| disk.inodes_free),
        inodes: disk.map(|disk| disk.inodes),
        inodes_used: used.map(|used| used.inodes),
    }
}

#[cfg(test)]
mod tests;
