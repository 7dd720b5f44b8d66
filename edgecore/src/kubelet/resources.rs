//! What a pod asks for and what it is held to: QoS class, effective requests and limits, the resources of containers and sandboxes in
//! CRI's terms, and the cgroups that the kubelet itself keeps.
//!
//! Everything here is computed from the pod and from facts that are passed in. Nothing is written: [`PodCgroup`] says what the files
//! must hold, another module writes them. Exclusive CPUs, swap for pods and memory QoS are not offered.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use skerry_proto::cri;

use crate::kubelet::field::is_static;
use crate::kubelet::quantity::{Amount, QuantityError};
use crate::kubelet::references::NodeFacts;
use crate::order;

/// Length of a CFS period in microseconds.
pub const CPU_PERIOD: u64 = 100_000;

const MIN_SHARES: u64 = 2;
const MAX_SHARES: u64 = 262_144;
const MIN_QUOTA: i64 = 1000;
const OOM_GUARANTEED: i64 = -997;
const OOM_BEST_EFFORT: i64 = 1000;

/// What the kernel of this box offers, and what the node as a whole may give to pods. Read once, at start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// `/sys/fs/cgroup` is the unified hierarchy.
    pub cgroup_v2: bool,
    /// Swap is accounted per cgroup: `memory.swap.max` exists (v2), or `memory.memsw.limit_in_bytes` (v1).
    pub swap_accounting: bool,
    /// Bytes of memory of the box; 0 where unknown, then what is allocatable stands in.
    pub memory: i64,
    /// Page sizes in CRI's words (`2MB`) that the hugetlb controller knows; see [`hugepage_sizes`]. Empty without that controller.
    pub hugepage_sizes: Vec<String>,
    /// Existing `/sys/devices/system/cpu/cpu<N>/thermal_throttle` directories, to be masked in containers.
    pub thermal_throttle: Vec<String>,
    /// How many processes one pod may have.
    pub pod_pids: Option<i64>,
    /// Bytes all pods together may use: what is allocatable.
    pub pods_memory: Option<i64>,
    /// Processes all pods together may have.
    pub pods_pids: Option<i64>,
}

/// Quality of service class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qos {
    /// Limits equal requests for CPU and memory, everywhere.
    Guaranteed,
    /// Neither of the others.
    Burstable,
    /// Nothing is asked for.
    BestEffort,
}

impl Qos {
    /// The class in the words of the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

/// A cgroup the kubelet keeps, and the values that hold in it. `None` leaves the kernel's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodCgroup {
    /// Below the mount point, such as `/kubepods/burstable/pod<uid>`, or the slice path with the systemd driver.
    pub path: String,
    /// In v1 terms, 2 to 262144.
    pub cpu_shares: Option<u64>,
    /// Microseconds per [`PodCgroup::cpu_period`].
    pub cpu_quota: Option<i64>,
    /// Microseconds.
    pub cpu_period: u64,
    /// Bytes.
    pub memory_limit: Option<i64>,
    /// Processes and threads.
    pub pids_limit: Option<i64>,
}

/// Amounts by resource name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals(BTreeMap<String, Amount>);

impl Totals {
    /// The amount of a resource; nothing if it is not named.
    pub fn get(&self, resource: &str) -> Amount {
        self.0.get(resource).copied().unwrap_or_default()
    }

    /// CPU in thousandths of a core.
    pub fn cpu_milli(&self) -> i64 {
        self.get("cpu").milli()
    }

    /// Memory in bytes.
    pub fn memory(&self) -> i64 {
        self.get("memory").units()
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Amount)> {
        self.0.iter().map(|(name, amount)| (name.as_str(), *amount))
    }

    fn parse(list: Option<&BTreeMap<String, Quantity>>) -> Result<Self, QuantityError> {
        let mut totals = BTreeMap::new();
        for (name, quantity) in list.into_iter().flatten() {
            totals.insert(name.clone(), Amount::of(quantity)?);
        }
        Ok(Self(totals))
    }

    /// Adds another one's amounts.
    pub fn add(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            let sum = self.get(name) + *amount;
            self.0.insert(name.clone(), sum);
        }
    }

    fn raise_to(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            let largest = self.get(name).max(*amount);
            self.0.insert(name.clone(), largest);
        }
    }
}

/// The class the API has set, or else the one the spec gives. A quantity that cannot be read counts as asked for and not guaranteed.
pub fn qos_class(pod: &Pod) -> Qos {
    match pod.status.as_ref().and_then(|status| status.qos_class.as_deref()) {
        Some("Guaranteed") => Qos::Guaranteed,
        Some("Burstable") => Qos::Burstable,
        Some("BestEffort") => Qos::BestEffort,
        _ => computed_qos(pod).unwrap_or(Qos::Burstable),
    }
}

/// What the pod needs at once in the worst moment of its life: the sum of what runs together, or an init container with the sidecars
/// before it; replaced by pod-level resources where given; plus the overhead of its RuntimeClass.
pub fn pod_requests(pod: &Pod) -> Result<Totals, QuantityError> {
    let mut totals = requests_without_overhead(pod)?;
    totals.add(&Totals::parse(pod.spec.as_ref().and_then(|spec| spec.overhead.as_ref()))?);
    Ok(totals)
}

/// What the pod may use. A resource without a limit in some container still shows the sum of the limits there are.
pub fn pod_limits(pod: &Pod) -> Result<Totals, QuantityError> {
    let mut totals = limits_without_overhead(pod)?;
    let overhead = Totals::parse(pod.spec.as_ref().and_then(|spec| spec.overhead.as_ref()))?;
    for (name, amount) in overhead.iter() {
        // Nothing limits what has no limit.
        if let Some(limit) = totals.0.get_mut(name).filter(|limit| !limit.is_zero()) {
            *limit = *limit + amount;
        }
    }
    Ok(totals)
}

/// What a container asks for; a limit without a request is a request too.
pub fn container_requests(container: &Container) -> Result<Totals, QuantityError> {
    let mut totals = container_limits(container)?;
    let requests = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
    totals.0.extend(Totals::parse(requests)?.0);
    Ok(totals)
}

/// What a container may use.
pub fn container_limits(container: &Container) -> Result<Totals, QuantityError> {
    Totals::parse(container.resources.as_ref().and_then(|resources| resources.limits.as_ref()))
}

/// The pod's own resources, if it has any that count for pods: CPU, memory, huge pages.
pub fn pod_level(pod: &Pod) -> Option<&ResourceRequirements> {
    let resources = pod.spec.as_ref()?.resources.as_ref()?;
    let names = resources.requests.iter().flatten().chain(resources.limits.iter().flatten()).map(|(name, _)| name);
    names.into_iter().any(|name| is_pod_level(name)).then_some(resources)
}

/// CRI resources of a container.
pub fn container_resources(
    pod: &Pod,
    container: &Container,
    node: &NodeFacts,
    machine: &Machine,
) -> Result<cri::LinuxContainerResources, QuantityError> {
    let mut limits = container_limits(container)?;
    if let Some(whole) = pod_level(pod) {
        // A container without a limit of its own may use what the whole pod may use.
        let whole = Totals::parse(whole.limits.as_ref())?;
        for name in ["cpu", "memory"] {
            if limits.get(name).is_zero() {
                limits.0.insert(name.to_owned(), whole.get(name));
            }
        }
    }
    let requested = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
    let cpu_request = match requested.and_then(|requests| requests.get("cpu")) {
        Some(quantity) => Amount::of(quantity)?.milli(),
        None => limits.cpu_milli(),
    };
    let mut resources = linux_resources(cpu_request, limits.cpu_milli(), limits.memory());
    resources.oom_score_adj = oom_score_adj(pod, container, node, machine)?;
    resources.hugepage_limits = machine
        .hugepage_sizes
        .iter()
        .map(|size| cri::HugepageLimit { page_size: size.clone(), limit: hugepage_limit(&limits, size) })
        .collect();
    if machine.cgroup_v2 {
        resources.unified = HashMap::from([("memory.oom.group".to_owned(), "1".to_owned())]);
        if machine.swap_accounting {
            resources.unified.insert("memory.swap.max".to_owned(), "0".to_owned());
        }
    } else if machine.swap_accounting {
        // v1 limits memory and swap together, so that equal limits leave no swap.
        resources.memory_swap_limit_in_bytes = resources.memory_limit_in_bytes;
    }
    Ok(resources)
}

/// CRI resources of the sandbox, and of the RuntimeClass's overhead, in that order. Runtimes that put a pod in a virtual machine size it
/// by them.
pub fn sandbox_resources(
    pod: &Pod,
) -> Result<(cri::LinuxContainerResources, cri::LinuxContainerResources), QuantityError> {
    let (requests, limits) = (requests_without_overhead(pod)?, limits_without_overhead(pod)?);
    let resources = linux_resources(requests.cpu_milli(), limits.cpu_milli(), limits.memory());
    let overhead = match pod.spec.as_ref().and_then(|spec| spec.overhead.as_ref()) {
        Some(overhead) => {
            let overhead = Totals::parse(Some(overhead))?;
            linux_resources(overhead.cpu_milli(), overhead.cpu_milli(), overhead.memory())
        }
        None => cri::LinuxContainerResources::default(),
    };
    Ok((resources, overhead))
}

/// How readily the kernel kills the container when the box runs out of memory.
pub fn oom_score_adj(
    pod: &Pod,
    container: &Container,
    node: &NodeFacts,
    machine: &Machine,
) -> Result<i64, QuantityError> {
    if is_node_critical(pod) {
        return Ok(OOM_GUARANTEED);
    }
    match qos_class(pod) {
        Qos::Guaranteed => return Ok(OOM_GUARANTEED),
        Qos::BestEffort => return Ok(OOM_BEST_EFFORT),
        Qos::Burstable => {}
    }
    let capacity = i128::from(if machine.memory > 0 { machine.memory } else { node.memory }.max(1));
    let share = unassigned_memory_per_container(pod)?;
    let score = |request: i64| 1000 - 1000 * (i128::from(request) + share) / capacity;
    let mut adjusted = score(container_requests(container)?.memory());
    if is_sidecar_of(pod, container) {
        // A sidecar must not be killed before the containers it serves.
        let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
        let requests = containers.map(|container| Ok(container_requests(container)?.memory()));
        if let Some(smallest) = requests.collect::<Result<Vec<_>, _>>()?.into_iter().min() {
            adjusted = adjusted.min(score(smallest));
        }
    }
    Ok(i64::try_from(adjusted.clamp(i128::from(1000 + OOM_GUARANTEED), i128::from(OOM_BEST_EFFORT - 1))).unwrap_or(999))
}

/// The pod's cgroup: where it is and what holds in it.
pub fn pod_cgroup(pod: &Pod, node: &NodeFacts, machine: &Machine) -> Result<PodCgroup, QuantityError> {
    let qos = qos_class(pod);
    let (requests, limits) = (pod_requests(pod)?, pod_limits(pod)?);
    let mut cgroup = PodCgroup {
        path: pod_cgroup_path(pod, node.systemd_cgroups),
        cpu_shares: Some(if qos == Qos::BestEffort { MIN_SHARES } else { shares(requests.cpu_milli()) }),
        cpu_quota: None,
        cpu_period: CPU_PERIOD,
        memory_limit: None,
        pids_limit: machine.pod_pids.filter(|limit| *limit > 0),
    };
    let limited = |resource| -> Result<bool, QuantityError> {
        Ok(qos == Qos::Guaranteed || qos == Qos::Burstable && is_limited(pod, resource)?)
    };
    if limited("cpu")? {
        cgroup.cpu_quota = Some(quota(limits.cpu_milli())).filter(|quota| *quota > 0);
    }
    if limited("memory")? {
        cgroup.memory_limit = Some(limits.memory()).filter(|limit| *limit > 0);
    }
    Ok(cgroup)
}

/// Path of a pod's cgroup, which is also CRI's `cgroup_parent`.
pub fn pod_cgroup_path(pod: &Pod, systemd: bool) -> String {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let parent = qos_cgroup_path(qos_class(pod), systemd);
    if systemd {
        // A dash in a slice's name separates it from its parent, so a UID must not have any.
        let slice = parent.rsplit('/').next().unwrap_or_default().trim_end_matches(".slice");
        format!("{parent}/{slice}-pod{}.slice", uid.replace('-', "_"))
    } else {
        format!("{parent}/pod{uid}")
    }
}

/// The cgroup pods of a class are in; for [`Qos::Guaranteed`] that is the root of all pods.
pub fn qos_cgroup_path(qos: Qos, systemd: bool) -> String {
    let path = match (qos, systemd) {
        (Qos::Guaranteed, false) => "/kubepods",
        (Qos::Burstable, false) => "/kubepods/burstable",
        (Qos::BestEffort, false) => "/kubepods/besteffort",
        (Qos::Guaranteed, true) => "/kubepods.slice",
        (Qos::Burstable, true) => "/kubepods.slice/kubepods-burstable.slice",
        (Qos::BestEffort, true) => "/kubepods.slice/kubepods-besteffort.slice",
    };
    path.to_owned()
}

/// The cgroups above the pods', parents first: all pods, burstable, best effort. `pods` are those that may run now; the shares of the
/// burstable tier are the sum of theirs, so this is to be computed again when they change.
pub fn qos_cgroups<'p>(pods: impl IntoIterator<Item = &'p Pod>, node: &NodeFacts, machine: &Machine) -> [PodCgroup; 3] {
    let burstable = pods.into_iter().filter(|pod| qos_class(pod) == Qos::Burstable);
    // A pod whose quantities cannot be read does not start.
    let milli = burstable.filter_map(|pod| pod_requests(pod).ok()).fold(Amount::ZERO, |sum, pod| sum + pod.get("cpu"));
    let tier = |qos, cpu_shares| PodCgroup {
        path: qos_cgroup_path(qos, node.systemd_cgroups),
        cpu_shares: Some(cpu_shares),
        cpu_quota: None,
        cpu_period: CPU_PERIOD,
        memory_limit: None,
        pids_limit: None,
    };
    let positive = |limit: Option<i64>| limit.filter(|limit| *limit > 0);
    [
        PodCgroup {
            memory_limit: positive(machine.pods_memory),
            pids_limit: positive(machine.pods_pids),
            ..tier(Qos::Guaranteed, shares(node.cpu_milli))
        },
        tier(Qos::Burstable, shares(milli.milli())),
        tier(Qos::BestEffort, MIN_SHARES),
    ]
}

/// Page sizes in CRI's words from the names of the entries of `/sys/kernel/mm/hugepages`, such as `hugepages-2048kB`; smallest first.
pub fn hugepage_sizes<'n>(entries: impl IntoIterator<Item = &'n str>) -> Vec<String> {
    let kib = |entry: &str| entry.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<i64>().ok();
    let mut sizes: Vec<i64> = entries.into_iter().filter_map(kib).filter_map(|kib| kib.checked_mul(1024)).collect();
    order::sort(&mut sizes);
    sizes.dedup();
    sizes.into_iter().map(hugepage_size).collect()
}

/// The CPU weight of so many thousandths of a core.
pub fn shares(milli: i64) -> u64 {
    u64::try_from(i128::from(milli) * 1024 / 1000)
        .unwrap_or(if milli < 0 { 0 } else { MAX_SHARES })
        .clamp(MIN_SHARES, MAX_SHARES)
}

/// Microseconds per period for so many thousandths of a core; 0 means no limit.
pub fn quota(milli: i64) -> i64 {
    if milli <= 0 {
        return 0;
    }
    milli.saturating_mul(100).max(MIN_QUOTA)
}

/// An init container that keeps running beside the others.
pub fn is_sidecar(init: &Container) -> bool {
    init.restart_policy.as_deref() == Some("Always")
}

fn linux_resources(cpu_request: i64, cpu_limit: i64, memory_limit: i64) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources {
        cpu_period: i64::try_from(CPU_PERIOD).unwrap_or_default(),
        cpu_quota: quota(cpu_limit),
        cpu_shares: i64::try_from(shares(cpu_request)).unwrap_or_default(),
        memory_limit_in_bytes: memory_limit.max(0),
        ..Default::default()
    }
}

fn computed_qos(pod: &Pod) -> Result<Qos, QuantityError> {
    let Some(spec) = &pod.spec else { return Ok(Qos::BestEffort) };
    let (mut requests, mut limits, mut guaranteed) = (Totals::default(), Totals::default(), true);
    let mut count = |asked: &Totals, limited: &Totals| {
        for name in ["cpu", "memory"] {
            for (totals, list) in [(&mut requests, asked), (&mut limits, limited)] {
                if list.get(name).is_positive() {
                    totals.add(&Totals(BTreeMap::from([(name.to_owned(), list.get(name))])));
                }
            }
            guaranteed &= limited.get(name).is_positive();
        }
    };
    if let Some(whole) = &spec.resources {
        count(&Totals::parse(whole.requests.as_ref())?, &Totals::parse(whole.limits.as_ref())?);
    } else {
        for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
            count(&container_requests(container)?, &container_limits(container)?);
        }
    }
    Ok(match (requests.0.is_empty() && limits.0.is_empty(), guaranteed && requests == limits) {
        (true, _) => Qos::BestEffort,
        (_, true) => Qos::Guaranteed,
        _ => Qos::Burstable,
    })
}

fn requests_without_overhead(pod: &Pod) -> Result<Totals, QuantityError> {
    let mut totals = in_worst_moment(pod, container_requests)?;
    apply_pod_level(&mut totals, pod, |whole| whole.requests.as_ref())?;
    Ok(totals)
}

fn limits_without_overhead(pod: &Pod) -> Result<Totals, QuantityError> {
    let mut totals = in_worst_moment(pod, container_limits)?;
    apply_pod_level(&mut totals, pod, |whole| whole.limits.as_ref())?;
    Ok(totals)
}

fn apply_pod_level(
    totals: &mut Totals,
    pod: &Pod,
    list: impl Fn(&ResourceRequirements) -> Option<&BTreeMap<String, Quantity>>,
) -> Result<(), QuantityError> {
    if let Some(whole) = pod_level(pod) {
        totals.0.extend(Totals::parse(list(whole))?.0.into_iter().filter(|(name, _)| is_pod_level(name)));
    }
    Ok(())
}

fn in_worst_moment(
    pod: &Pod,
    of: impl Fn(&Container) -> Result<Totals, QuantityError>,
) -> Result<Totals, QuantityError> {
    let Some(spec) = &pod.spec else { return Ok(Totals::default()) };
    let mut running = Totals::default();
    for container in &spec.containers {
        running.add(&of(container)?);
    }
    let (mut sidecars, mut starting) = (Totals::default(), Totals::default());
    for init in spec.init_containers.iter().flatten() {
        let own = of(init)?;
        if is_sidecar(init) {
            running.add(&own);
            sidecars.add(&own);
            starting.raise_to(&sidecars);
        } else {
            let mut together = own;
            together.add(&sidecars);
            starting.raise_to(&together);
        }
    }
    running.raise_to(&starting);
    Ok(running)
}

/// Every container, or the pod as a whole, has a limit for the resource. An init container runs beside the sidecars before it, whose
/// limits count for it as well.
fn is_limited(pod: &Pod, resource: &str) -> Result<bool, QuantityError> {
    let whole = pod_level(pod).and_then(|whole| whole.limits.as_ref());
    if !Totals::parse(whole)?.get(resource).is_zero() {
        return Ok(true);
    }
    let Some(spec) = &pod.spec else { return Ok(true) };
    for container in &spec.containers {
        if container_limits(container)?.get(resource).is_zero() {
            return Ok(false);
        }
    }
    let mut sidecars = Amount::ZERO;
    for init in spec.init_containers.iter().flatten() {
        let together = sidecars + container_limits(init)?.get(resource);
        if together.is_zero() {
            return Ok(false);
        }
        if is_sidecar(init) {
            sidecars = together;
        }
    }
    Ok(true)
}

/// What the pod asks for as a whole beyond what its containers ask for, in equal parts.
fn unassigned_memory_per_container(pod: &Pod) -> Result<i128, QuantityError> {
    let (Some(whole), Some(spec)) = (pod_level(pod), &pod.spec) else { return Ok(0) };
    let whole = Totals::parse(whole.requests.as_ref())?;
    if whole.get("memory").is_zero() {
        return Ok(0);
    }
    let count = spec.containers.len() + spec.init_containers.as_ref().map_or(0, Vec::len);
    let rest = i128::from(whole.memory()) - i128::from(in_worst_moment(pod, container_requests)?.memory());
    Ok(rest / i128::try_from(count.max(1)).unwrap_or(1))
}

fn is_sidecar_of(pod: &Pod, container: &Container) -> bool {
    let mut init_containers = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    is_sidecar(container) && init_containers.any(|init| init.name == container.name)
}

/// The pod belongs to the node itself and is killed last.
fn is_node_critical(pod: &Pod) -> bool {
    const SYSTEM_CRITICAL: i32 = 2_000_000_000;
    let Some(spec) = &pod.spec else { return false };
    spec.priority_class_name.as_deref() == Some("system-node-critical")
        && (is_static(pod) || spec.priority.is_some_and(|priority| priority >= SYSTEM_CRITICAL))
}

fn is_pod_level(resource: &str) -> bool {
    matches!(resource, "cpu" | "memory") || resource.starts_with("hugepages-")
}

fn hugepage_limit(limits: &Totals, size: &str) -> u64 {
    let of_size = |resource: &str| {
        let written = resource.strip_prefix("hugepages-").and_then(|text| Amount::parse(text).ok());
        written.is_some_and(|amount| hugepage_size(amount.units()) == size)
    };
    let limit = limits.iter().find(|(resource, _)| of_size(resource)).map_or(0, |(_, amount)| amount.units());
    u64::try_from(limit).unwrap_or(0)
}

fn hugepage_size(bytes: i64) -> String {
    let (mut rest, mut suffix) = (bytes, "B");
    for next in ["KB", "MB", "GB", "TB", "PB"] {
        if rest < 1024 || rest % 1024 != 0 {
            break;
        }
        (rest, suffix) = (rest / 1024, next);
    }
    format!("{rest}{suffix}")
}

#[cfg(test)]
#[expect(clippy::needless_pass_by_value, reason = "a literal in a call reads best without a reference")]
mod tests;
