//! Devices of nodes that are lost must not show for ever what was last known of them: they are marked as unknown.
//!
//! A node is lost when Kubernetes says so (its Ready condition is Unknown, since its lease was not renewed) and no session of it is here; or
//! it is deleted. The state alone is written, and why; what was read last, and when, stays. When the node is back, it is asked to
//! report these devices once more, and its report replaces what is written here.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use kube::api::Patch;
use serde_json::json;
use tracing::{debug, info};

use crate::apiserver::{Apiserver, Kind, Verdict, verdict};
use crate::backend_k8s::Shared;
use crate::closure::devices::lost::{UNKNOWN, Unheard};
use crate::retry::chain;

/// How long after the start nothing is marked: the nodes are about to come back.
const GRACE: Duration = Duration::from_secs(60);
/// Between the few that are marked at once: at most four writes a second for each node, and twenty for all.
const ROUND: Duration = Duration::from_secs(1);

/// Marks, for ever.
pub(crate) async fn run(api: Apiserver, shared: Arc<Shared>) {
    tokio::time::sleep(GRACE).await;
    // UIDs of those that could not be marked: others come first.
    let mut put_off = HashSet::new();
    loop {
        tokio::time::sleep(ROUND).await;
        let unheard = shared.closures().unheard(&put_off);
        if unheard.is_empty() {
            put_off.clear();
        }
        for device in &unheard {
            match mark(&api, device).await {
                Ok(()) => info!(device = &*device.key, "it shows that nothing is known of it: {}", device.why),
                Err(error) if matches!(verdict(&error), Verdict::Later(_) | Verdict::Doubtful(_)) => {
                    debug!(device = &*device.key, "it cannot be marked as unknown yet: {}", chain(&error));
                    put_off.insert(device.uid.clone());
                    break;
                }
                // It is gone, or another one has its name, or this is not allowed.
                Err(error) => debug!(device = &*device.key, "it is not marked as unknown: {}", chain(&error)),
            }
            shared.closures().marked_unheard(device);
        }
    }
}

async fn mark(api: &Apiserver, device: &Unheard) -> Result<(), kube::Error> {
    let (namespace, name) = device.key.split_once('/').unwrap_or_default();
    let status = json!({"status": {"state": UNKNOWN, "extensions": {"message": device.why}}});
    match api.patch(Kind::DeviceStatus, namespace, name, &Patch::Merge(status)).await {
        // It never reported.
        Err(error) if verdict(&error) == Verdict::NotFound => {}
        answer => drop(answer?),
    }
    let shown = json!({"metadata": {"uid": device.uid}, "status": {"state": UNKNOWN}});
    api.patch(Kind::Device, namespace, name, &Patch::Merge(shown)).await.map(drop)
}
