//! Values of a pod's fields and resources, as environment variables and downwardAPI volumes show them.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::kubelet::container_config::ContainerSpec;
use crate::kubelet::quantity::{Amount, QuantityError};
use crate::kubelet::references::NodeFacts;
use crate::kubelet::resources;

/// Why a value cannot be given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    /// No such field, or not one that may be shown.
    #[error("unsupported fieldPath: {0}")]
    UnsupportedField(String),
    /// Only labels and annotations have keys.
    #[error("fieldPath {0:?} does not support subscript")]
    NoSubscript(String),
    /// The addresses of the box are not known yet.
    #[error("the node has no address yet, so {0} has no value")]
    NoHostIp(&'static str),
    /// The pod has no such container.
    #[error("container {0} not found")]
    NoContainer(String),
    /// No such resource, or not one that may be shown.
    #[error("unsupported container resource : {0}")]
    UnsupportedResource(String),
    /// A quantity in the pod cannot be read.
    #[error(transparent)]
    Quantity(#[from] QuantityError),
}

/// What the pod object itself does not say. Volumes that show metadata only may leave everything empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct FieldContext<'a> {
    /// The pod's addresses, primary first; the box's for host network.
    pub pod_ips: &'a [IpAddr],
    /// The box's addresses, primary first.
    pub host_ips: &'a [IpAddr],
    /// Name of the node, for a pod that does not say.
    pub node_name: &'a str,
}

impl<'a> FieldContext<'a> {
    /// The context of a pod with these addresses on this node.
    pub fn new(node: &'a NodeFacts, pod_ips: &'a [IpAddr]) -> Self {
        Self { pod_ips, host_ips: &node.host_ips, node_name: &node.name }
    }
}

/// Who a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity<'p> {
    /// Its name.
    pub name: &'p str,
    /// Its namespace.
    pub namespace: &'p str,
    /// Its UID.
    pub uid: &'p str,
}

impl<'p> Identity<'p> {
    /// Of this pod.
    pub fn of(pod: &'p Pod) -> Self {
        Self {
            name: pod.metadata.name.as_deref().unwrap_or_default(),
            namespace: pod.metadata.namespace.as_deref().unwrap_or("default"),
            uid: pod.metadata.uid.as_deref().unwrap_or_default(),
        }
    }
}

impl std::fmt::Display for Identity<'_> {
    /// `name_namespace(uid)`, as messages show a pod.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}_{}({})", self.name, self.namespace, self.uid)
    }
}

/// The pod comes from a file on the box, not from the API.
pub fn is_static(pod: &Pod) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    annotations.and_then(|all| all.get("kubernetes.io/config.source")).is_some_and(|source| source != "api")
}

/// The value of a fieldRef.
pub fn value(pod: &Pod, field_path: &str, context: &FieldContext<'_>) -> Result<String, FieldError> {
    let metadata = &pod.metadata;
    let spec = pod.spec.as_ref();
    if let Some((path, key)) = subscript(field_path) {
        let map = match path {
            "metadata.labels" => metadata.labels.as_ref(),
            "metadata.annotations" => metadata.annotations.as_ref(),
            _ => return Err(FieldError::NoSubscript(field_path.to_owned())),
        };
        return Ok(map.and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    let identity = Identity::of(pod);
    Ok(match field_path {
        "metadata.name" => identity.name.to_owned(),
        "metadata.namespace" => identity.namespace.to_owned(),
        "metadata.uid" => identity.uid.to_owned(),
        "metadata.labels" => lines(metadata.labels.iter().flatten()),
        "metadata.annotations" => lines(metadata.annotations.iter().flatten()),
        "spec.nodeName" => spec.and_then(|spec| spec.node_name.as_deref()).unwrap_or(context.node_name).to_owned(),
        "spec.serviceAccountName" => spec.and_then(|spec| spec.service_account_name.clone()).unwrap_or_default(),
        "status.hostIP" => context.host_ips.first().ok_or(FieldError::NoHostIp("status.hostIP"))?.to_string(),
        "status.hostIPs" if context.host_ips.is_empty() => return Err(FieldError::NoHostIp("status.hostIPs")),
        "status.hostIPs" => joined(context.host_ips),
        "status.podIP" => context.pod_ips.first().map(IpAddr::to_string).unwrap_or_default(),
        "status.podIPs" => joined(context.pod_ips),
        _ => return Err(FieldError::UnsupportedField(field_path.to_owned())),
    })
}

/// The value of a resourceFieldRef: the amount in `divisor`s, rounded up. A missing or zero divisor counts as 1. What a container does
/// not limit is limited by the pod, or else by what the node can give.
pub fn resource_value(
    pod: &Pod,
    container_name: &str,
    resource: &str,
    divisor: Option<&Quantity>,
    node: &NodeFacts,
) -> Result<String, FieldError> {
    let container =
        find_container(pod, container_name).ok_or_else(|| FieldError::NoContainer(container_name.to_owned()))?;
    let divisor = divisor.map(Amount::of).transpose()?.filter(|divisor| divisor.is_positive());
    let divisor = divisor.unwrap_or_else(|| Amount::from_units(1));
    let unsupported = || FieldError::UnsupportedResource(resource.to_owned());
    let (kind, name) = resource.split_once('.').ok_or_else(unsupported)?;
    if !matches!(name, "cpu" | "memory" | "ephemeral-storage") && !name.starts_with("hugepages-") {
        return Err(unsupported());
    }
    let amount = match kind {
        "requests" => resources::container_requests(&container)?.get(name),
        "limits" => limit(pod, &container, name, node)?,
        _ => return Err(unsupported()),
    };
    let (amount, divisor) =
        if name == "cpu" { (amount.milli(), divisor.milli()) } else { (amount.units(), divisor.units()) };
    let rounded_up = i64::from(amount % divisor > 0) + amount / divisor;
    Ok(rounded_up.to_string())
}

fn limit(pod: &Pod, container: &Container, name: &str, node: &NodeFacts) -> Result<Amount, QuantityError> {
    let own = resources::container_limits(container)?.get(name);
    if !own.is_zero() {
        return Ok(own);
    }
    let allocatable = match name {
        "cpu" => Amount::from_milli(node.cpu_milli),
        "memory" => Amount::from_units(node.memory),
        "ephemeral-storage" => return Ok(Amount::from_units(node.ephemeral_storage)),
        // Huge pages are never overcommitted: no limit is none.
        _ => return Ok(own),
    };
    let whole = resources::pod_level(pod).and_then(|whole| whole.limits.as_ref()).and_then(|limits| limits.get(name));
    Ok(whole.map(Amount::of).transpose()?.filter(|whole| !whole.is_zero()).unwrap_or(allocatable))
}

fn find_container<'p>(pod: &'p Pod, name: &str) -> Option<std::borrow::Cow<'p, Container>> {
    ContainerSpec::all(pod.spec.as_ref()?).find(|container| container.name() == name).map(|spec| spec.container())
}

/// `path['key']` taken apart.
fn subscript(field_path: &str) -> Option<(&str, &str)> {
    field_path.strip_suffix("']")?.split_once("['").filter(|(path, _)| !path.is_empty())
}

fn joined(ips: &[IpAddr]) -> String {
    ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",")
}

/// Sorted `key="value"` lines.
fn lines<'m>(map: impl Iterator<Item = (&'m String, &'m String)>) -> String {
    map.map(|(key, value)| format!("{key}={}", quoted(value))).collect::<Vec<_>>().join("\n")
}

/// The text as Go's `%q` writes it.
fn quoted(text: &str) -> String {
    let mut output = String::with_capacity(text.len() + 2);
    output.push('"');
    for c in text.chars() {
        match c {
            '"' => output.push_str("\\\""),
            '\\' => output.push_str("\\\\"),
            '\x07' => output.push_str("\\a"),
            '\x08' => output.push_str("\\b"),
            '\x0c' => output.push_str("\\f"),
            '\n' => output.push_str("\\n"),
            '\r' => output.push_str("\\r"),
            '\t' => output.push_str("\\t"),
            '\x0b' => output.push_str("\\v"),
            c if is_printable(c) => output.push(c),
            c if c < ' ' || c == '\x7f' => output.push_str(&format!("\\x{:02x}", u32::from(c))),
            c if u32::from(c) < 0x1_0000 => output.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => output.push_str(&format!("\\U{:08x}", u32::from(c))),
        }
    }
    output.push('"');
    output
}

/// Quotes and backslashes aside.
fn is_printable(c: char) -> bool {
    // Debug output escapes what is not printable. It escapes a combining mark too, but only at the start of a text, hence the letter.
    c == '\'' || format!("a{c}").escape_debug().nth(1) == Some(c)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kubelet::container_config::fixtures;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {
                "name": "web", "namespace": "shop", "uid": "u1",
                "labels": {"b": "2", "a": "1"},
                "annotations": {"text": "line\n\"q\" \\ \t\u{1}é\u{200b}e\u{301}\u{1f600}\u{e000}'", "x/y": "z"}
            },
            "spec": {
                "nodeName": "edge-1", "serviceAccountName": "robot",
                "containers": [{"name": "c", "resources": {
                    "requests": {"cpu": "250m", "memory": "64Mi", "hugepages-2Mi": "4Mi"},
                    "limits": {"cpu": "1500m", "memory": "100M", "hugepages-2Mi": "4Mi"}
                }}, {"name": "free"}],
                "initContainers": [{"name": "init", "resources": {"limits": {"ephemeral-storage": "1G"}}}],
                "ephemeralContainers": [{"name": "debug"}]
            }
        }))
        .unwrap()
    }

    #[test]
    fn fields() {
        let ips: Vec<IpAddr> = vec!["10.1.2.3".parse().unwrap(), "fd00::1".parse().unwrap()];
        let node = fixtures::node();
        let context = FieldContext::new(&node, &ips);
        for (path, expected) in [
            ("metadata.name", "web"),
            ("metadata.namespace", "shop"),
            ("metadata.uid", "u1"),
            ("metadata.labels", "a=\"1\"\nb=\"2\""),
            ("metadata.labels['b']", "2"),
            ("metadata.labels['absent']", ""),
            (
                "metadata.annotations",
                "text=\"line\\n\\\"q\\\" \\\\ \\t\\x01é\\u200be\u{301}\u{1f600}\\ue000'\"\nx/y=\"z\"",
            ),
            ("metadata.annotations['x/y']", "z"),
            ("spec.nodeName", "edge-1"),
            ("spec.serviceAccountName", "robot"),
            ("status.hostIP", "192.168.7.2"),
            ("status.hostIPs", "192.168.7.2,fd77::2"),
            ("status.podIP", "10.1.2.3"),
            ("status.podIPs", "10.1.2.3,fd00::1"),
        ] {
            assert_eq!(value(&pod(), path, &context).as_deref(), Ok(expected), "{path}");
        }
        let message = |path| value(&pod(), path, &FieldContext::default()).unwrap_err().to_string();
        assert_eq!(message("spec.restartPolicy"), "unsupported fieldPath: spec.restartPolicy");
        assert_eq!(message("spec['x']"), "fieldPath \"spec['x']\" does not support subscript");
        assert!(message("status.hostIP").contains("no address yet"));
        assert_eq!(value(&pod(), "status.podIP", &FieldContext::default()).as_deref(), Ok(""));
    }

    #[test]
    fn resources_are_divided_and_rounded_up() {
        let node = fixtures::node();
        for (container, resource, divisor, expected) in [
            ("c", "requests.cpu", None, "1"),
            ("c", "requests.cpu", Some("0"), "1"),
            ("c", "requests.cpu", Some("1m"), "250"),
            ("c", "limits.cpu", None, "2"),
            ("c", "limits.memory", Some("1Mi"), "96"),
            ("c", "limits.memory", Some("1k"), "100000"),
            ("c", "requests.memory", None, "67108864"),
            ("c", "requests.hugepages-2Mi", Some("1Mi"), "4"),
            ("c", "limits.hugepages-1Gi", None, "0"),
            ("free", "limits.cpu", Some("1m"), "1900"),
            ("free", "limits.memory", None, "2000000000"),
            ("free", "limits.ephemeral-storage", None, "30000000000"),
            ("free", "requests.cpu", None, "0"),
            ("init", "limits.ephemeral-storage", Some("1M"), "1000"),
            ("init", "requests.ephemeral-storage", Some("1M"), "1000"),
            ("debug", "limits.cpu", None, "2"),
        ] {
            let divisor = divisor.map(|text| Quantity(text.to_owned()));
            let value = resource_value(&pod(), container, resource, divisor.as_ref(), &node);
            assert_eq!(value.as_deref(), Ok(expected), "{container} {resource}");
        }
        let message =
            |container, resource| resource_value(&pod(), container, resource, None, &node).unwrap_err().to_string();
        assert_eq!(message("nobody", "limits.cpu"), "container nobody not found");
        assert_eq!(message("c", "limits.gpu"), "unsupported container resource : limits.gpu");
        assert_eq!(message("c", "cpu"), "unsupported container resource : cpu");
        assert_eq!(message("c", "wishes.cpu"), "unsupported container resource : wishes.cpu");
    }

    #[test]
    fn the_pod_limits_what_a_container_does_not() {
        let mut pod = pod();
        let whole = json!({"limits": {"cpu": "700m", "memory": "1Gi"}});
        pod.spec.as_mut().unwrap().resources = serde_json::from_value(whole).unwrap();
        let value = |container, resource| resource_value(&pod, container, resource, None, &fixtures::node()).unwrap();
        assert_eq!(value("free", "limits.memory"), "1073741824");
        assert_eq!(value("free", "limits.cpu"), "1");
        assert_eq!(value("c", "limits.memory"), "100000000");
        assert_eq!(value("free", "limits.ephemeral-storage"), "30000000000");
    }
}
