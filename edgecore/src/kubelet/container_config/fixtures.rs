//! The node that tests of this area run on.

use std::collections::BTreeMap;

use serde_json::json;
use skerry_proto::payload::Settings;

use crate::kubelet::references::{NodeFacts, RuntimeHandler};
use crate::kubelet::resources::Machine;

pub(crate) fn node() -> NodeFacts {
    let gvisor = RuntimeHandler { handler: "runsc".to_owned(), ..Default::default() };
    let kata = RuntimeHandler { handler: "kata".to_owned(), ..Default::default() };
    NodeFacts {
        name: "edge-1".to_owned(),
        host_ips: vec!["192.168.7.2".parse().unwrap(), "fd77::2".parse().unwrap()],
        cpu_milli: 1900,
        memory: 2_000_000_000,
        ephemeral_storage: 30_000_000_000,
        pods: 110,
        labels: BTreeMap::new(),
        settings: Settings { cluster_dns: vec!["10.96.0.10".to_owned()], cluster_domain: "cluster.local".to_owned() },
        pods_root: "/var/lib/kubelet".into(),
        logs_root: "/var/log/pods".into(),
        log_links: "/var/log/containers".into(),
        systemd_cgroups: false,
        runtime_handlers: vec![String::new(), "runsc".to_owned()],
        recursive_read_only: Vec::new(),
        strict_groups: true,
        runtime_classes: BTreeMap::from([("gvisor".to_owned(), gvisor), ("kata".to_owned(), kata)]),
    }
}

pub(crate) fn machine() -> Machine {
    Machine {
        cgroup_v2: true,
        swap_accounting: true,
        memory: 2_000_000_000,
        hugepage_sizes: vec!["2MB".to_owned(), "1GB".to_owned()],
        thermal_throttle: vec!["/sys/devices/system/cpu/cpu0/thermal_throttle".to_owned()],
        pod_pids: Some(1024),
        pods_memory: Some(2_100_000_000),
        pods_pids: Some(30_000),
    }
}

/// A pod that uses most of what there is.
pub(crate) fn rich_pod() -> serde_json::Value {
    json!({
        "metadata": {
            "name": "web-7d9", "namespace": "shop", "uid": "5f1c2d3e-aaaa-bbbb-cccc-0123456789ab",
            "labels": {"app": "web", "io.kubernetes.pod.name": "forged"},
            "annotations": {"note": "kept", "container.apparmor.security.beta.kubernetes.io/main": "runtime/default"},
            "deletionGracePeriodSeconds": 5
        },
        "spec": {
            "nodeName": "edge-1",
            "hostname": "web", "subdomain": "shops", "setHostnameAsFQDN": true,
            "serviceAccountName": "robot",
            "terminationGracePeriodSeconds": 30,
            "runtimeClassName": "gvisor",
            "overhead": {"cpu": "50m", "memory": "16Mi"},
            "shareProcessNamespace": false,
            "dnsConfig": {"options": [{"name": "ndots", "value": "2"}], "searches": ["mine"]},
            "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["db"]}],
            "securityContext": {
                "runAsUser": 1000, "runAsGroup": 1001, "runAsNonRoot": true, "fsGroup": 2000, "supplementalGroups": [3000],
                "seccompProfile": {"type": "RuntimeDefault"},
                "sysctls": [{"name": "net/ipv4/ip_local_port_range", "value": "2000 3000"}]
            },
            "initContainers": [
                {"name": "setup", "image": "busybox", "resources": {"requests": {"cpu": "1"}}},
                {"name": "proxy", "image": "proxy:1", "restartPolicy": "Always", "resources": {"requests": {"memory": "8Mi"}}}
            ],
            "containers": [
                {
                    "name": "main", "image": "registry.example:5000/shop/web:1.2", "workingDir": "/srv",
                    "command": ["/bin/web", "--name=$(POD)", "$$(POD)"], "args": ["$(MISSING)", "$(A)"],
                    "env": [
                        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                        {"name": "A", "value": "on $(POD)"},
                        {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}}
                    ],
                    "envFrom": [{"prefix": "C_", "configMapRef": {"name": "settings", "optional": true}}],
                    "ports": [{"name": "http", "containerPort": 8080, "hostPort": 80, "protocol": "TCP"}, {"containerPort": 9090, "protocol": "UDP"}],
                    "resources": {
                        "requests": {"cpu": "250m", "memory": "64Mi"},
                        "limits": {"cpu": "500m", "memory": "128Mi", "hugepages-2Mi": "2Mi"}
                    },
                    "securityContext": {
                        "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}
                    },
                    "lifecycle": {"preStop": {"exec": {"command": ["sleep", "1"]}}},
                    "terminationMessagePath": "/tmp/last", "terminationMessagePolicy": "FallbackToLogsOnError",
                    "stdin": true, "stdinOnce": true, "tty": true
                },
                {"name": "second", "image": "busybox"}
            ],
            "ephemeralContainers": [{"name": "debug", "image": "busybox", "targetContainerName": "main", "command": ["sh"]}]
        }
    })
}
