//! Which labels a node may give itself: those of kubelets, and those outside Kubernetes' own name spaces.

use std::collections::BTreeMap;

use skerry_proto::EDGE_LABEL;

use crate::config::is_node_name;

const KUBELET_LABELS: [&str; 8] = [
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/arch",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
];

/// The labels of a Node when it is registered.
pub(crate) fn of_node(name: &str, wanted: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut labels: BTreeMap<String, String> = wanted
        .iter()
        .filter(|(key, value)| allowed(key, value))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    // A label's value is shorter than a name may be.
    if allowed("kubernetes.io/hostname", name) {
        labels.entry("kubernetes.io/hostname".into()).or_insert_with(|| name.to_owned());
    }
    labels.insert("kubernetes.io/os".into(), "linux".into());
    labels.insert(EDGE_LABEL.into(), String::new());
    labels
}

/// Whether a node may set this label on itself, and the apiserver would take it.
pub(crate) fn allowed(key: &str, value: &str) -> bool {
    is_key(key) && is_value(value) && may_set(key)
}

/// Whether the machine decides this label, and not whoever runs it.
pub(crate) fn is_measured(key: &str) -> bool {
    KUBELET_LABELS.contains(&key)
}

/// Whether a node may set a label of this key on itself.
pub(crate) fn may_set(key: &str) -> bool {
    let Some((prefix, _)) = key.split_once('/') else { return true };
    let within = |domain: &str| prefix == domain || prefix.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'));
    if KUBELET_LABELS.contains(&key) {
        return true;
    }
    if within("node-restriction.kubernetes.io") || within("skerry.dev") {
        return false;
    }
    !(within("kubernetes.io") || within("k8s.io")) || within("kubelet.kubernetes.io") || within("node.kubernetes.io")
}

/// Whether this can be a label's key.
pub(crate) fn is_key(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => is_node_name(prefix) && is_name(name),
        None => is_name(key),
    }
}

/// Whether this can be a label's value.
pub(crate) fn is_value(value: &str) -> bool {
    value.is_empty() || is_name(value)
}

fn is_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.len() <= 63
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_may_describe_itself_and_not_promote_itself() {
        for key in [
            "site",
            "example.com/rack",
            "kubernetes.io/arch",
            "node.kubernetes.io/x",
            "kubelet.kubernetes.io/y",
            "topology.kubernetes.io/zone",
        ] {
            assert!(allowed(key, "v"), "{key}");
        }
        for key in [
            "node-role.kubernetes.io/control-plane",
            "node-restriction.kubernetes.io/trusted",
            "x.node-restriction.kubernetes.io/trusted",
            "kubernetes.io/made-up",
            "k8s.io/made-up",
            "skerry.dev/anything",
            "not a key",
            "a/b/c",
            "",
        ] {
            assert!(!allowed(key, "v"), "{key}");
        }
        assert!(!allowed("site", "no spaces"));
        assert!(allowed("site", ""));
    }

    #[test]
    fn a_new_node_has_its_role_whatever_was_asked() {
        let wanted = [
            ("kubernetes.io/os", "plan9"),
            ("kubernetes.io/arch", "arm64"),
            ("node-role.kubernetes.io/x", ""),
            ("site", "mill"),
        ];
        let wanted = wanted.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let labels = of_node("edge-1", &wanted);
        let labels: Vec<String> = labels.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(
            labels,
            [
                "kubernetes.io/arch=arm64",
                "kubernetes.io/hostname=edge-1",
                "kubernetes.io/os=linux",
                "node-role.kubernetes.io/edge=",
                "site=mill"
            ]
        );
    }
}
