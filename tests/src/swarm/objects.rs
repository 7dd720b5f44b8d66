//! What the swarm's nodes hold in the apiserver, and what they report of it: small, and as the apiserver takes it.

use serde_json::{Value, json};
use skerry_proto::payload::{NodeReport, PodReport};

use super::SHARED;

/// The name of node number `index`, and of its ConfigMap and Secret.
pub(super) fn name(index: usize) -> String {
    format!("swarm-{index:05}")
}

/// A pod of a node. It tolerates everything, as a DaemonSet's does, and mounts no token: minting is another figure.
pub(super) fn pod(node: &str, number: usize) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": format!("{node}-{number}"),
            "namespace": "default",
            "labels": {"app": "swarm", "app.kubernetes.io/name": "sensor-gateway", "app.kubernetes.io/version": "1.4.2"},
        },
        "spec": {
            "nodeName": node,
            "automountServiceAccountToken": false,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{
                "name": "main",
                "image": "registry.example.com/plant/sensor-gateway:1.4.2",
                "args": ["--listen=:8080", "--config=/etc/gateway/config.yaml"],
                "ports": [{"name": "http", "containerPort": 8080}],
                "env": [
                    {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                    {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": node, "key": "password"}}},
                ],
                "resources": {"requests": {"cpu": "50m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}},
                "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 10},
                "volumeMounts": [{"name": "config", "mountPath": "/etc/gateway"}, {"name": "shared", "mountPath": "/etc/plant"}],
            }],
            "volumes": [
                {"name": "config", "configMap": {"name": node}},
                {"name": "shared", "configMap": {"name": SHARED}},
            ],
        },
    })
}

/// The ConfigMap of that name.
pub(super) fn config_map(name: &str, round: u64) -> Value {
    let lines: String = (0..12).map(|line| format!("key-{line}: value of {name}, round {round}\n")).collect();
    json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "default"}, "data": {"config.yaml": lines},
    })
}

/// The Secret of that name.
pub(super) fn secret(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "default"},
        "stringData": {"password": format!("not-a-secret-of-{name}")},
    })
}

/// What a node says of itself.
pub(super) fn node_report(index: usize, now: &str) -> NodeReport {
    let resources = json!({"cpu": "4", "memory": "4019820Ki", "pods": "110", "ephemeral-storage": "30298176Ki", "hugepages-2Mi": "0"});
    let condition = |kind: &str, status: &str, reason: &str, message: &str| {
        json!({
            "type": kind, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": now, "lastTransitionTime": "2026-01-01T00:00:00Z",
        })
    };
    let image = |name: &str, size: u64| json!({"names": [format!("registry.example.com/plant/{name}@sha256:{}", "4b".repeat(32)), format!("registry.example.com/plant/{name}:1.4.2")], "sizeBytes": size});
    let status = json!({
        "capacity": resources, "allocatable": resources,
        "conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
            condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
        ],
        "nodeInfo": {
            "machineID": format!("{index:032x}"), "systemUUID": format!("{index:032x}"), "bootID": "00000000-0000-0000-0000-000000000000",
            "kernelVersion": "6.12.0", "osImage": "Debian GNU/Linux 12", "containerRuntimeVersion": "containerd://1.6.20",
            "kubeletVersion": "v1.36.3", "kubeProxyVersion": "", "operatingSystem": "linux", "architecture": "arm64",
        },
        "images": [image("sensor-gateway", 31_457_280), image("historian", 52_428_800), image("pause", 702_464)],
    });
    let labels = [("kubernetes.io/os", "linux"), ("kubernetes.io/arch", "arm64")];
    NodeReport {
        status,
        addresses: vec![format!("10.{}.{}.{}", index >> 16 & 255, index >> 8 & 255, index & 255)],
        labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
    }
}

/// What a node says of a pod that runs.
pub(super) fn pod_report(uid: &str, now: &str) -> PodReport {
    let kinds = ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];
    let conditions = kinds.map(|kind| json!({"type": kind, "status": "True", "lastTransitionTime": now}));
    let status = json!({
        "phase": "Running",
        "conditions": conditions,
        "hostIP": "10.0.0.1", "hostIPs": [{"ip": "10.0.0.1"}], "podIP": "10.88.0.2", "podIPs": [{"ip": "10.88.0.2"}],
        "startTime": now, "qosClass": "Burstable",
        "containerStatuses": [{
            "name": "main", "image": "registry.example.com/plant/sensor-gateway:1.4.2", "imageID": format!("sha256:{}", "4b".repeat(32)),
            "containerID": format!("containerd://{}", uid.replace('-', "").repeat(2)),
            "ready": true, "started": true, "restartCount": 0, "state": {"running": {"startedAt": now}}, "lastState": {},
        }],
    });
    PodReport { status, finished: false }
}
