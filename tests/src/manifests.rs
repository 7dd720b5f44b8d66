//! The pods that tests and benchmarks run.

use serde_json::{Value, json};

use crate::images::BUSYBOX;

/// A tolerance for whatever keeps pods off a node that is not quite there yet is never wanted; a short goodbye always is.
pub const GRACE: u64 = 1;

/// A pod that sleeps on a node. With `token` it mounts its service account's token.
pub fn sleeper(name: &str, node: &str, token: bool) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "sleeper"}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": GRACE,
            "automountServiceAccountToken": token,
            "containers": [container("main", &["sleep", "1000000"])],
        },
    })
}

/// A busybox container that runs a command.
pub fn container(name: &str, command: &[&str]) -> Value {
    json!({"name": name, "image": BUSYBOX, "imagePullPolicy": "IfNotPresent", "command": command})
}

/// Several objects as one manifest.
pub fn list(items: &[Value]) -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()
}
