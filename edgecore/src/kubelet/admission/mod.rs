//! Whether a pod may run here: asked once, when the pod is first seen and has not ended.
//!
//! [`admit`] refuses for good (the pod becomes Failed and its controller makes another); [`unsupported`] names what this node cannot
//! give, and such a pod stays Pending with nothing started. Nothing is ever run with a part of its spec left out.

mod affinity;
#[cfg(test)]
mod tests;

use k8s_openapi::api::core::v1::{Pod, PodSpec, Taint, Toleration, Volume};

use super::references::{NodeFacts, PodEvent};
use super::resources::{Totals, pod_requests};
use super::security::check_sysctls;
use super::spec::{Kind, Spec, is_terminal_phase};

/// Why a pod was refused: the status becomes Failed with these, see [`super::memory::Memory::reject`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct Rejection {
    /// CamelCase, also the reason of the Warning event.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// Whether the pod may run beside `others`, the pods of this node; those that have ended do not count, nor does the pod itself. Of the
/// node's taints those count that would evict it; the others are the scheduler's.
pub fn admit(pod: &Pod, others: &[&Pod], node: &NodeFacts, taints: &[Taint]) -> Result<(), Rejection> {
    let Some(spec) = pod.spec.as_ref() else {
        return Err(reject("UnexpectedAdmissionError", "the pod has no spec"));
    };
    let uid = Spec::new(pod).uid();
    let others: Vec<&Pod> =
        others.iter().copied().filter(|other| Spec::new(other).uid() != uid && !is_over(other)).collect();
    check_sysctls(pod).map_err(|message| reject("SysctlForbidden", message))?;
    system(pod, spec, node)?;
    features(pod, spec)?;
    resources(pod, &others, node)?;
    if !affinity::matches(spec, node) {
        return Err(predicate("NodeAffinity", "node(s) didn't match Pod's node affinity/selector"));
    }
    if spec.node_name.as_ref().is_some_and(|name| !name.is_empty() && *name != node.name) {
        return Err(predicate("NodeName", "node(s) didn't match the requested node name"));
    }
    let taken: Vec<HostPort<'_>> = others.iter().flat_map(|other| host_ports(other)).collect();
    if host_ports(pod).iter().any(|port| taken.iter().any(|other| port.conflicts(other))) {
        return Err(predicate("NodePorts", "node(s) didn't have free ports for the requested pod ports"));
    }
    let tolerations = spec.tolerations.as_deref().unwrap_or_default();
    let evicting = taints.iter().filter(|taint| taint.effect == "NoExecute");
    if evicting.into_iter().any(|taint| !tolerations.iter().any(|toleration| tolerates(toleration, taint))) {
        return Err(predicate("TaintToleration", "node(s) had taints that the pod didn't tolerate"));
    }
    Ok(())
}

/// What the pod wants that this node cannot give, as the event that tells so; `None`: nothing. Such a pod is held
/// ([`super::memory::Volumes::Unsupported`]).
pub fn unsupported(pod: &Pod) -> Option<PodEvent> {
    let spec = pod.spec.as_ref()?;
    let event = |reason, message| PodEvent { warning: true, reason, message, field_path: None };
    let volumes = spec.volumes.as_deref().unwrap_or_default();
    if let Some((volume, what)) = volumes.iter().find_map(|volume| Some((volume, foreign_volume(volume)?))) {
        let message = format!(
            "MountVolume.SetUp failed for volume \"{}\" : {what} is not supported on this node; use emptyDir, hostPath, \
             configMap, secret, downwardAPI or projected, or run the pod on another node",
            volume.name
        );
        return Some(event("FailedMount", message));
    }
    let init = spec.init_containers.as_deref().unwrap_or_default();
    if let Some(container) = spec
        .containers
        .iter()
        .chain(init)
        .find(|container| container.volume_devices.as_ref().is_some_and(|devices| !devices.is_empty()))
    {
        let message = format!("volumeDevices of container \"{}\" are not supported on this node", container.name);
        return Some(event("FailedMapVolume", message));
    }
    if spec.resource_claims.as_ref().is_some_and(|claims| !claims.is_empty()) {
        let message = "resourceClaims are not supported on this node; run the pod on another node";
        return Some(event("FailedPrepareDynamicResources", message.to_owned()));
    }
    if spec.host_users == Some(false) {
        let message = "Failed to create pod sandbox: hostUsers: false (user namespaces) is not supported on this node";
        return Some(event("FailedCreatePodSandBox", message.to_owned()));
    }
    None
}

/// Limits of the pod that nobody here holds it to, as the event that tells so. It runs all the same.
pub fn unenforced(pod: &Pod) -> Option<PodEvent> {
    let spec = pod.spec.as_ref()?;
    let mut limits = Vec::new();
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let own = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
        if own.is_some_and(|limits| limits.contains_key("ephemeral-storage")) {
            limits.push(format!("ephemeral-storage of container \"{}\"", container.name));
        }
        // A device plugin's, or one that somebody says the node has: that is told apart by nobody here, and a kubelet runs it, too.
        for name in own.into_iter().flatten().map(|(name, _)| name).filter(|name| name.contains('/')) {
            limits.push(format!("{name} of container \"{}\", which gets no device with it", container.name));
        }
    }
    for volume in spec.volumes.iter().flatten() {
        let on_disk = volume.empty_dir.as_ref().filter(|empty| empty.medium.as_deref() != Some("Memory"));
        if on_disk.is_some_and(|empty| empty.size_limit.is_some()) {
            limits.push(format!("sizeLimit of emptyDir \"{}\"", volume.name));
        }
    }
    let message = format!("this node does not enforce these limits: {}", limits.join(", "));
    (!limits.is_empty()).then_some(PodEvent { warning: true, reason: "LimitNotEnforced", message, field_path: None })
}

fn reject(reason: &'static str, message: impl Into<String>) -> Rejection {
    Rejection { reason, message: message.into() }
}

fn predicate(name: &'static str, message: &str) -> Rejection {
    reject(name, format!("Predicate {name} failed: {message}"))
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let covers = |wanted: Option<&str>, own: &str| wanted.is_none_or(|wanted| wanted.is_empty() || wanted == own);
    covers(toleration.effect.as_deref(), &taint.effect)
        && covers(toleration.key.as_deref(), &taint.key)
        && match toleration.operator.as_deref() {
            Some("Exists") => true,
            None | Some("" | "Equal") => {
                toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
            }
            Some(_) => false,
        }
}

fn is_over(pod: &Pod) -> bool {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).is_some_and(is_terminal_phase)
}

fn system(pod: &Pod, spec: &PodSpec, node: &NodeFacts) -> Result<(), Rejection> {
    const OS: &str = "kubernetes.io/os";
    let own = node.labels.get(OS).map_or("linux", String::as_str);
    if pod.metadata.labels.as_ref().and_then(|labels| labels.get(OS)).is_some_and(|os| os != own) {
        return Err(reject(
            "PodOSSelectorNodeLabelDoesNotMatch",
            "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label",
        ));
    }
    if spec.os.as_ref().is_some_and(|os| os.name != "linux") {
        return Err(reject("PodOSNotSupported", "Failed to admit pod as the OS field doesn't match node OS"));
    }
    let strict = spec.security_context.as_ref().and_then(|context| context.supplemental_groups_policy.as_deref());
    if strict == Some("Strict") && !node.strict_groups {
        return Err(reject(
            "SupplementalGroupsPolicyNotSupported",
            "SupplementalGroupsPolicy=Strict is not supported in this node",
        ));
    }
    Ok(())
}

fn features(pod: &Pod, spec: &PodSpec) -> Result<(), Rejection> {
    let refuse = |what: &str| Err(reject("PodFeatureUnsupported", format!("{what} is not supported on this node")));
    if spec.resource_claims.as_ref().is_some_and(|claims| !claims.is_empty()) {
        return refuse("spec.resourceClaims (dynamic resource allocation)");
    }
    let init = spec.init_containers.as_deref().unwrap_or_default();
    let restarts_all = spec
        .containers
        .iter()
        .chain(init)
        .filter_map(|container| container.restart_policy_rules.as_deref())
        .flatten()
        .any(|rule| rule.action == "RestartAllContainers");
    if restarts_all {
        return refuse("the RestartAllContainers action of restartPolicyRules");
    }
    if pod
        .metadata
        .annotations
        .as_ref()
        .is_some_and(|annotations| annotations.contains_key("kubernetes.io/config.mirror"))
    {
        return refuse("a mirror pod");
    }
    Ok(())
}

fn resources(pod: &Pod, others: &[&Pod], node: &NodeFacts) -> Result<(), Rejection> {
    // A quantity that cannot be read counts as nothing: the apiserver has validated every one that arrives here.
    let requests = |pod: &Pod| pod_requests(pod).unwrap_or_default();
    let own = requests(pod);
    let mut used = Totals::default();
    for other in others {
        used.add(&requests(other));
    }
    let ephemeral = |totals: &Totals| totals.get("ephemeral-storage").units();
    let pods = i64::try_from(others.len()).unwrap_or(i64::MAX);
    for (reason, name, requested, used, capacity) in [
        ("OutOfpods", "pods", 1, pods, node.pods),
        ("OutOfcpu", "cpu", own.cpu_milli(), used.cpu_milli(), node.cpu_milli),
        ("OutOfmemory", "memory", own.memory(), used.memory(), node.memory),
        ("OutOfephemeral-storage", "ephemeral-storage", ephemeral(&own), ephemeral(&used), node.ephemeral_storage),
    ] {
        if requested > 0 && requested.saturating_add(used) > capacity {
            let message = format!(
                "Node didn't have enough resource: {name}, requested: {requested}, used: {used}, capacity: {capacity}"
            );
            return Err(reject(reason, message));
        }
    }
    Ok(())
}

struct HostPort<'a> {
    port: i32,
    protocol: &'a str,
    ip: &'a str,
}

impl HostPort<'_> {
    fn conflicts(&self, other: &Self) -> bool {
        let any = |ip: &str| matches!(ip, "" | "0.0.0.0" | "::");
        self.port == other.port
            && self.protocol == other.protocol
            && (any(self.ip) || any(other.ip) || self.ip == other.ip)
    }
}

fn host_ports(pod: &Pod) -> Vec<HostPort<'_>> {
    let spec = Spec::new(pod);
    let host_network = spec.host_network();
    let mut containers = spec.apps();
    containers.extend(spec.inits().into_iter().filter(|view| view.kind == Kind::Sidecar));
    let ports =
        containers.into_iter().filter_map(|view| view.container?.ports.as_deref()).flatten().filter_map(|port| {
            let host =
                port.host_port.or_else(|| host_network.then_some(port.container_port)).filter(|port| *port > 0)?;
            Some(HostPort {
                port: host,
                protocol: port.protocol.as_deref().unwrap_or("TCP"),
                ip: port.host_ip.as_deref().unwrap_or_default(),
            })
        });
    ports.collect()
}

/// What about a volume cannot be had here.
fn foreign_volume(volume: &Volume) -> Option<&'static str> {
    if let Some(empty) = &volume.empty_dir {
        let huge = empty.medium.as_ref().is_some_and(|medium| medium.starts_with("HugePages"));
        return huge.then_some("emptyDir on huge pages");
    }
    if let Some(projected) = &volume.projected {
        return projected.sources.iter().flatten().find_map(|source| {
            let known = source.config_map.is_some()
                || source.secret.is_some()
                || source.downward_api.is_some()
                || source.service_account_token.is_some();
            match (source.cluster_trust_bundle.is_some(), source.pod_certificate.is_some()) {
                (true, _) => Some("a projected clusterTrustBundle"),
                (_, true) => Some("a projected podCertificate"),
                (false, false) => (!known).then_some("a projected source of this type"),
            }
        });
    }
    let known = volume.host_path.is_some()
        || volume.config_map.is_some()
        || volume.secret.is_some()
        || volume.downward_api.is_some();
    if known {
        return None;
    }
    Some(if volume.persistent_volume_claim.is_some() {
        "a persistentVolumeClaim"
    } else if volume.ephemeral.is_some() {
        "a generic ephemeral volume"
    } else if volume.csi.is_some() {
        "a CSI volume"
    } else if volume.image.is_some() {
        "an image volume"
    } else {
        "this type of volume"
    })
}
