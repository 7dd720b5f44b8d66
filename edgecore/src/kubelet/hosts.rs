//! A pod's host name, and the hosts file that goes with it.

use std::fmt::Write;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, Pod};

use crate::kubelet::container_config::ConfigError;
use crate::kubelet::field::Identity;
use crate::kubelet::references::NodeFacts;

/// Where the hosts file is in a container.
pub const HOSTS_PATH: &str = "/etc/hosts";

const LONGEST_HOSTNAME: usize = 63;
const LONGEST_FQDN: usize = 64;

/// What a pod calls itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hostname {
    /// Host name, at most 63 bytes.
    pub name: String,
    /// Domain of a pod with a subdomain; else empty.
    pub domain: String,
}

/// Name and domain of a pod.
pub fn hostname(pod: &Pod, node: &NodeFacts) -> Result<Hostname, ConfigError> {
    let identity = Identity::of(pod);
    let spec = pod.spec.as_ref();
    let given = |text: Option<&String>| text.filter(|text| !text.is_empty()).cloned();
    if let Some(name) = spec.and_then(|spec| spec.hostname_override.as_ref()) {
        return Ok(Hostname { name: cut(identity.name, name)?, domain: String::new() });
    }
    let name = given(spec.and_then(|spec| spec.hostname.as_ref()));
    let name = cut(identity.name, name.as_deref().unwrap_or(identity.name))?;
    let domain = given(spec.and_then(|spec| spec.subdomain.as_ref()))
        .map(|subdomain| {
            let domain = format!("{subdomain}.{}.svc.{}", identity.namespace, node.settings.cluster_domain);
            domain.trim_end_matches('.').to_owned()
        })
        .unwrap_or_default();
    Ok(Hostname { name, domain })
}

/// The name the pod's kernel knows: empty for host network, the whole name with `setHostnameAsFQDN`.
pub fn kernel_hostname(pod: &Pod, node: &NodeFacts) -> Result<String, ConfigError> {
    let spec = pod.spec.as_ref();
    if spec.is_some_and(|spec| spec.host_network == Some(true)) {
        return Ok(String::new());
    }
    let Hostname { name, domain } = hostname(pod, node)?;
    if domain.is_empty() || spec.and_then(|spec| spec.set_hostname_as_fqdn) != Some(true) {
        return Ok(name);
    }
    let fqdn = format!("{name}.{domain}");
    if fqdn.len() > LONGEST_FQDN {
        return Err(ConfigError::FqdnTooLong { length: fqdn.len(), fqdn });
    }
    Ok(fqdn)
}

/// The hosts file of a pod; `None` while it has no address. `host_file` is the node's own `/etc/hosts`, which a pod of host network
/// gets.
pub fn hosts_file(
    pod: &Pod,
    node: &NodeFacts,
    pod_ips: &[IpAddr],
    host_file: &str,
) -> Result<Option<String>, ConfigError> {
    let spec = pod.spec.as_ref();
    let mut content;
    if spec.is_some_and(|spec| spec.host_network == Some(true)) {
        content = format!("# Kubernetes-managed hosts file (host network).\n{host_file}");
    } else if pod_ips.is_empty() {
        return Ok(None);
    } else {
        content = POD_NETWORK.to_owned();
        let Hostname { name, domain } = hostname(pod, node)?;
        for ip in pod_ips {
            // Writing to a String cannot fail.
            let _ = if domain.is_empty() {
                writeln!(content, "{ip}\t{name}")
            } else {
                writeln!(content, "{ip}\t{name}.{domain}\t{name}")
            };
        }
    }
    let aliases = spec.and_then(|spec| spec.host_aliases.as_deref()).unwrap_or_default();
    if !aliases.is_empty() {
        content.push_str("\n# Entries added by HostAliases.\n");
    }
    for alias in aliases {
        let names = alias.hostnames.as_deref().unwrap_or_default().join("\t");
        let _ = writeln!(content, "{}\t{names}", alias.ip);
    }
    Ok(Some(content))
}

/// The container brings no hosts file of its own.
pub fn wants_hosts_file(container: &Container) -> bool {
    !container.volume_mounts.iter().flatten().any(|mount| mount.mount_path == HOSTS_PATH)
}

fn cut(pod: &str, name: &str) -> Result<String, ConfigError> {
    let mut end = name.len().min(LONGEST_HOSTNAME);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    // Only a cut can leave a name that ends badly.
    let short = if end < name.len() { name[..end].trim_end_matches(['-', '.']) } else { name };
    if short.is_empty() {
        return Err(ConfigError::Hostname { pod: pod.to_owned(), name: name.to_owned() });
    }
    Ok(short.to_owned())
}

const POD_NETWORK: &str = "# Kubernetes-managed hosts file.
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
fe00::0\tip6-mcastprefix
fe00::1\tip6-allnodes
fe00::2\tip6-allrouters
";

#[cfg(test)]
#[expect(clippy::needless_pass_by_value, reason = "a literal in a call reads best without a reference")]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::kubelet::container_config::fixtures;

    fn pod(name: &str, spec: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": name, "namespace": "shop"}, "spec": spec})).unwrap()
    }

    #[test]
    fn names() {
        let long = "a".repeat(62);
        for (name, spec, expected, domain, kernel) in [
            ("web-0", json!({}), "web-0", "", "web-0"),
            ("web-0", json!({"hostname": "h"}), "h", "", "h"),
            ("web-0", json!({"hostname": "", "subdomain": ""}), "web-0", "", "web-0"),
            ("web-0", json!({"subdomain": "db"}), "web-0", "db.shop.svc.cluster.local", "web-0"),
            (
                "web-0",
                json!({"subdomain": "db", "setHostnameAsFQDN": true}),
                "web-0",
                "db.shop.svc.cluster.local",
                "web-0.db.shop.svc.cluster.local",
            ),
            ("web-0", json!({"setHostnameAsFQDN": true}), "web-0", "", "web-0"),
            (
                "web-0",
                json!({"hostnameOverride": "x.example.org", "hostname": "h", "subdomain": "db", "setHostnameAsFQDN": true}),
                "x.example.org",
                "",
                "x.example.org",
            ),
            ("web-0", json!({"hostNetwork": true}), "web-0", "", ""),
            (&format!("{long}.b"), json!({}), &long, "", &long),
            (&format!("{long}--b"), json!({}), &long, "", &long),
            (&format!("{long}cde"), json!({}), &format!("{long}c"), "", &format!("{long}c")),
        ] {
            let pod = pod(name, spec);
            let found = hostname(&pod, &fixtures::node()).unwrap();
            assert_eq!((found.name.as_str(), found.domain.as_str()), (expected, domain));
            assert_eq!(kernel_hostname(&pod, &fixtures::node()).unwrap(), kernel);
        }
    }

    #[test]
    fn refusals_of_names() {
        let subdomain = "s".repeat(36);
        let pod = pod("web-0", json!({"subdomain": subdomain, "setHostnameAsFQDN": true}));
        let error = kernel_hostname(&pod, &fixtures::node()).unwrap_err();
        assert_eq!(error.reason(), "FailedCreatePodSandBox");
        assert_eq!(
            error.to_string(),
            format!(
                "failed to construct FQDN from pod hostname and cluster domain, FQDN web-0.{subdomain}.shop.svc.cluster.local is too long \
                 (64 characters is the max, 65 characters requested)"
            )
        );
        let dashes = self::pod(&"-".repeat(70), json!({}));
        assert!(hostname(&dashes, &fixtures::node()).is_err());
        assert!(hostname(&Pod::default(), &fixtures::node()).is_err());
        let wide = self::pod(&"é".repeat(40), json!({}));
        assert_eq!(hostname(&wide, &fixtures::node()).unwrap().name, "é".repeat(31));
    }

    #[test]
    fn files() {
        let ips: Vec<IpAddr> = vec!["10.1.2.3".parse().unwrap(), "fd00::1".parse().unwrap()];
        let aliases = json!([{"ip": "1.2.3.4", "hostnames": ["a", "b"]}, {"ip": "5.6.7.8", "hostnames": ["c"]}]);
        let file = |spec: Value, ips: &[IpAddr]| {
            hosts_file(&pod("web-0", spec), &fixtures::node(), ips, "127.0.0.1 localhost\n").unwrap()
        };
        let head = "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
                    fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n";
        assert_eq!(file(json!({}), &ips).unwrap(), format!("{head}10.1.2.3\tweb-0\nfd00::1\tweb-0\n"));
        assert_eq!(
            file(json!({"subdomain": "db", "hostAliases": aliases}), &ips[..1]).unwrap(),
            format!(
                "{head}10.1.2.3\tweb-0.db.shop.svc.cluster.local\tweb-0\n\n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n5.6.7.8\tc\n"
            )
        );
        assert_eq!(file(json!({}), &[]), None);
        assert_eq!(
            file(json!({"hostNetwork": true, "hostAliases": aliases}), &[]).unwrap(),
            "# Kubernetes-managed hosts file (host network).\n127.0.0.1 localhost\n\n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n5.6.7.8\tc\n"
        );
    }

    #[test]
    fn a_container_may_bring_its_own() {
        let container = |path: &str| -> Container {
            serde_json::from_value(json!({"name": "c", "volumeMounts": [{"name": "v", "mountPath": path}]})).unwrap()
        };
        assert!(wants_hosts_file(&container("/etc")));
        assert!(!wants_hosts_file(&container(HOSTS_PATH)));
    }
}
