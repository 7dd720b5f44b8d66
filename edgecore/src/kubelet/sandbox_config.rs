//! The sandbox of a pod as CRI takes it. The same config, with the same attempt, goes with every container made in the sandbox.

use std::collections::HashMap;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::cri;

use crate::kubelet::container_config::ConfigError;
use crate::kubelet::dns::pod_dns;
use crate::kubelet::field::Identity;
use crate::kubelet::hosts::kernel_hostname;
use crate::kubelet::observed::label;
use crate::kubelet::ports::port_mappings;
use crate::kubelet::references::{NodeFacts, PodEvent};
use crate::kubelet::{resources, security};

/// The config, the runtime handler (empty for the default one), and events to record when the sandbox is made.
///
/// `host_resolv_conf` is the content of the node's resolv.conf.
pub fn sandbox_config(
    pod: &Pod,
    attempt: u32,
    node: &NodeFacts,
    host_resolv_conf: &str,
) -> Result<(cri::PodSandboxConfig, String, Vec<PodEvent>), ConfigError> {
    let handler = runtime_handler(pod, node)?;
    security::refuse_user_namespace(pod, &handler)?;
    let identity = Identity::of(pod);
    let (dns, events) = pod_dns(pod, node, host_resolv_conf);
    let (own, overhead) = resources::sandbox_resources(pod)?;
    let mut labels: HashMap<String, String> = pod.metadata.labels.clone().into_iter().flatten().collect();
    labels.extend(identity_labels(identity));
    let config = cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: identity.name.to_owned(),
            uid: identity.uid.to_owned(),
            namespace: identity.namespace.to_owned(),
            attempt,
        }),
        hostname: kernel_hostname(pod, node)?,
        log_directory: log_directory(pod, node).to_string_lossy().into_owned(),
        dns_config: Some(dns),
        port_mappings: port_mappings(pod),
        labels,
        annotations: pod.metadata.annotations.clone().into_iter().flatten().collect(),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: resources::pod_cgroup_path(pod, node.systemd_cgroups),
            security_context: Some(security::sandbox_security(pod)?),
            sysctls: security::sysctls(pod),
            overhead: Some(overhead),
            resources: Some(own),
        }),
    };
    Ok((config, handler, events))
}

/// Where the logs of a pod's containers are.
pub fn log_directory(pod: &Pod, node: &NodeFacts) -> PathBuf {
    let Identity { name, namespace, uid } = Identity::of(pod);
    node.logs_root.join(format!("{namespace}_{name}_{uid}"))
}

/// The CRI handler of the pod's RuntimeClass; empty for the default one.
pub fn runtime_handler(pod: &Pod, node: &NodeFacts) -> Result<String, ConfigError> {
    let class = pod.spec.as_ref().and_then(|spec| spec.runtime_class_name.as_deref());
    let Some(class) = class.filter(|class| !class.is_empty()) else { return Ok(String::new()) };
    let known = node.runtime_classes.get(class).ok_or_else(|| ConfigError::RuntimeClassNotFound(class.to_owned()))?;
    let handler = known.handler.clone();
    // Runtimes that do not list their handlers report none but the default; they know themselves what to refuse.
    let listed = node.runtime_handlers.iter().any(|name| !name.is_empty());
    if listed && !handler.is_empty() && !node.runtime_handlers.contains(&handler) {
        return Err(ConfigError::RuntimeHandlerUnknown { class: class.to_owned(), handler });
    }
    Ok(handler)
}

/// The labels by which a sandbox or a container is known as the pod's.
pub(crate) fn identity_labels(identity: Identity<'_>) -> [(String, String); 3] {
    [(label::POD_NAME, identity.name), (label::POD_NAMESPACE, identity.namespace), (label::POD_UID, identity.uid)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests;
