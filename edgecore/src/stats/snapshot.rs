//! The node and its pods at one moment: what a page is written from.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use skerry_proto::cri::FilesystemUsage;
use skerry_proto::sync::{Collection, Entry};

use super::cgroup::{self, Depth, Usage};
use super::disk::{self, Used, Volume};
use super::proc::{self, Interface, NodeMemory, Process};
use crate::kubelet::cgroup::Cgroups;
use crate::kubelet::observed::{Instance, Observed, Sandbox, State};
use crate::order;

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    pub(super) node: Usage,
    pub(super) memory: Option<NodeMemory>,
    pub(super) booted: Option<Timestamp>,
    /// All pods together, and the path of their cgroup.
    pub(super) all_pods: Usage,
    pub(super) top: String,
    pub(super) pods: Vec<Pod>,
    /// What serves them, by the names that a kubelet has for it. Empty unless that was asked for.
    pub(super) programs: Vec<(&'static str, Process)>,
    /// Something that should be there could not be read.
    pub(super) is_lacking: bool,
}

/// A pod.
#[derive(Debug, Default)]
pub(super) struct Pod {
    pub(super) listed: Listed,
    /// Of its cgroup; empty if it was not found.
    pub(super) path: String,
    pub(super) usage: Usage,
    pub(super) containers: Vec<Container>,
    /// Cgroup of the sandbox.
    pub(super) sandbox_path: String,
    /// None of pods on the node's network.
    pub(super) interfaces: Vec<Interface>,
    pub(super) volumes: Vec<Volume>,
}

/// A container that runs.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) instance: Instance,
    pub(super) path: String,
    pub(super) usage: Usage,
    /// Its writable layer.
    pub(super) layer: Option<Used>,
    pub(super) logs: Option<Used>,
}

/// A pod as the store and the runtime know it.
#[derive(Clone, Debug, Default)]
pub(super) struct Listed {
    pub(super) uid: String,
    pub(super) name: String,
    pub(super) namespace: String,
    /// The sandbox in use.
    pub(super) sandbox: Option<Sandbox>,
    /// Containers that run, by name.
    pub(super) running: Vec<Instance>,
}

/// What is read beside cgroups.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) depth: Depth,
    pub(super) network: bool,
    /// Volumes and logs.
    pub(super) disk: bool,
    /// Writable layers by container id.
    pub(super) layers: Arc<HashMap<String, FilesystemUsage>>,
}

impl Snapshot {
    /// The numbers of the block devices that something was read from or written to.
    pub(super) fn devices(&self) -> BTreeSet<String> {
        let pods = self
            .pods
            .iter()
            .flat_map(|pod| std::iter::once(&pod.usage).chain(pod.containers.iter().map(|container| &container.usage)));
        let usages = [&self.node, &self.all_pods].into_iter().chain(pods);
        order::set(usages.flat_map(|usage| &usage.io).map(|io| io.device.clone()))
    }
}

impl Wanted {
    /// Nothing but cgroups.
    pub(super) fn cgroups(depth: Depth) -> Self {
        Self { depth, network: false, disk: false, layers: Arc::default() }
    }
}

/// Volumes of a pod, by its UID; counts down what may still be looked at.
pub(super) type Volumes<'a> = dyn Fn(&str, &mut usize) -> Vec<Volume> + 'a;

/// The pods that have a figure: of the store's, those that the runtime runs; all of them while it cannot be asked.
pub(super) fn list(index: Vec<(Collection, Entry)>, observed: Option<BTreeMap<String, Observed>>) -> Vec<Listed> {
    let pods = index.into_iter().filter(|(collection, _)| *collection == Collection::Pods).map(|(_, entry)| entry);
    let mut observed = observed;
    let mut listed: Vec<Listed> = pods
        .filter_map(|entry| {
            let (namespace, name) = entry.key.split_once('/').unwrap_or(("", &entry.key));
            let (namespace, name) = (namespace.to_owned(), name.to_owned());
            let Some(observed) = &mut observed else {
                return Some(Listed { uid: entry.uid, name, namespace, ..Listed::default() });
            };
            let seen = observed.remove(&entry.uid).filter(Observed::is_alive)?;
            let mut running: Vec<Instance> = Vec::new();
            for instance in seen.containers.into_iter().filter(|instance| instance.state == State::Running) {
                if running.iter().all(|newer| newer.name != instance.name) {
                    running.push(instance);
                }
            }
            order::sort_by(&mut running, |a, b| a.name.cmp(&b.name));
            Some(Listed { uid: entry.uid, name, namespace, sandbox: seen.sandboxes.into_iter().next(), running })
        })
        .collect();
    // Of one name the newest: the one before may still be ending, and a page can have each name once.
    let made = |one: &Listed| one.sandbox.as_ref().map(|sandbox| sandbox.created_at);
    order::sort_by(&mut listed, |a, b| {
        (&a.namespace, &a.name, made(b), &a.uid).cmp(&(&b.namespace, &b.name, made(a), &b.uid))
    });
    listed.dedup_by(|later, first| later.namespace == first.namespace && later.name == first.name);
    listed
}

/// Reads all of them. Blocks.
pub(super) fn take(cgroups: &Cgroups, listed: Vec<Listed>, wanted: &Wanted, volumes: &Volumes<'_>) -> Snapshot {
    let paths = cgroups.pods();
    let top = cgroups.top();
    let mut snapshot = Snapshot {
        node: cgroup::read(cgroups, "/", wanted.depth),
        all_pods: cgroup::read(cgroups, &top, wanted.depth),
        memory: (wanted.depth >= Depth::Core).then(proc::node_memory).flatten(),
        top,
        ..Snapshot::default()
    };
    let (busy, booted) = proc::node_stat();
    snapshot.booted = booted.and_then(|at| Timestamp::from_second(at).ok());
    if snapshot.node.cpu.is_none() {
        snapshot.node.cpu = busy.map(|usage| cgroup::Cpu { usage, ..cgroup::Cpu::default() });
    }
    if let Some(memory) = snapshot.memory {
        snapshot.node.memory = Some(memory.used);
    }
    snapshot.is_lacking =
        snapshot.node.cpu.is_none() || (wanted.depth >= Depth::Core && snapshot.node.memory.is_none());
    let mut budget = disk::PER_REQUEST;
    for one in listed {
        let path = paths.get(&one.uid).cloned();
        // Which of the store's pods run is not known, or this one is only now being made.
        if path.is_none() && one.running.is_empty() {
            continue;
        }
        let mut pod = take_pod(cgroups, one, path.unwrap_or_default(), wanted, &mut snapshot.is_lacking);
        if wanted.disk {
            pod.volumes = volumes(&pod.listed.uid, &mut budget);
            for container in &mut pod.containers {
                let logs = Path::new(&container.instance.log_path).parent().filter(|dir| dir.is_absolute());
                container.logs = logs.and_then(|dir| disk::walk(dir, &mut budget));
            }
        }
        snapshot.pods.push(pod);
    }
    if wanted.depth >= Depth::Full {
        snapshot.all_pods.processes = Some(snapshot.pods.iter().filter_map(|pod| pod.usage.processes).sum());
    }
    snapshot
}

fn take_pod(cgroups: &Cgroups, mut listed: Listed, path: String, wanted: &Wanted, is_lacking: &mut bool) -> Pod {
    let mut pod = Pod::default();
    let children = if path.is_empty() { Vec::new() } else { children(cgroups, &path) };
    // The runtime calls a container's cgroup by its id, with whatever around it.
    let child = |id: &str| {
        let name = children.iter().find(|name| !id.is_empty() && name.contains(id));
        name.map(|name| format!("{path}/{name}")).unwrap_or_default()
    };
    if !path.is_empty() {
        pod.usage = cgroup::read(cgroups, &path, wanted.depth);
    }
    for instance in std::mem::take(&mut listed.running) {
        let path = child(&instance.id);
        let usage = if path.is_empty() { Usage::default() } else { cgroup::read(cgroups, &path, wanted.depth) };
        *is_lacking |= usage.cpu.is_none() || (wanted.depth >= Depth::Core && usage.memory.is_none());
        let layer = wanted.layers.get(&instance.id).map(disk::told);
        pod.containers.push(Container { instance, path, usage, layer, logs: None });
    }
    if let Some(sandbox) = &listed.sandbox {
        pod.sandbox_path = child(&sandbox.id);
        if wanted.depth >= Depth::Full {
            // A pod's are in the cgroups below its own.
            let of_sandbox = cgroup::processes(cgroups, &pod.sandbox_path).filter(|_| !pod.sandbox_path.is_empty());
            let of_containers = pod.containers.iter().filter_map(|container| container.usage.processes);
            pod.usage.processes = Some(of_containers.chain(of_sandbox).sum());
        }
        if wanted.network && !sandbox.host_network {
            let paths = std::iter::once(&pod.sandbox_path).chain(pod.containers.iter().map(|one| &one.path));
            let found = paths.filter_map(|path| process(cgroups, path)).find_map(|pid| proc::interfaces(&pid));
            *is_lacking |= found.is_none();
            pod.interfaces = found.unwrap_or_default();
        }
    }
    pod.path = path;
    pod.listed = listed;
    pod
}

fn children(cgroups: &Cgroups, path: &str) -> Vec<String> {
    let entries = cgroup::place(cgroups, path).and_then(|dir| fs::read_dir(dir).ok()).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// A process in a cgroup; one of another PID namespace shows as 0.
fn process(cgroups: &Cgroups, path: &str) -> Option<String> {
    if path.is_empty() {
        return None;
    }
    cgroup::procs(cgroups, path)?.lines().map(str::trim).find(|pid| !pid.is_empty() && *pid != "0").map(str::to_owned)
}
