//! `/configz`: how this kubelet is configured, in the terms of `KubeletConfiguration`, as far as it has them.

use serde_json::{Value, json};

use crate::config::Config;
use crate::kubelet::logs;

/// The configuration that is in force.
pub(super) fn configz(config: &Config) -> Value {
    json!({ "kubeletconfig": {
        "kind": "KubeletConfiguration",
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "containerRuntimeEndpoint": config.runtime_endpoint,
        "podLogsDir": config.logs_dir,
        "podCIDR": config.pod_cidr,
        "containerLogMaxSize": format!("{}Mi", logs::MAX_SIZE >> 20),
        "containerLogMaxFiles": logs::MAX_FILES,
        "authentication": { "anonymous": { "enabled": false } },
        "authorization": { "mode": "Webhook" },
        "serializeImagePulls": true,
        "failSwapOn": false,
    } })
}
