//! Writes into Nodes where their kubelet is reached: this cloudcore's address as the only one, and the port that the node has here.
//!
//! Nobody else writes these two fields. What a Node shows is compared with what it should; so a write of a replica that had the node
//! before, however late it comes, is put right.

use std::sync::Arc;

use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tracing::{debug, info, warn};

use super::ports::{Address, Door, Ports, Shown};
use crate::apiserver::{Apiserver, Kind, Verdict, backoff, verdict};
use crate::backend_k8s::Shared;
use crate::nodes;
use crate::retry::chain;

/// Writes under way at once.
const AT_ONCE: usize = 8;

/// Writes what is to be written, for ever.
pub(crate) async fn run(api: Apiserver, shared: Arc<Shared>, ports: Arc<Ports>) {
    let due = futures_util::stream::unfold(Arc::clone(&ports), |ports| async {
        let name = ports.unpublished().await;
        Some((name, ports))
    });
    due.for_each_concurrent(AT_ONCE, |name| publish(&api, &shared, &ports, name)).await;
}

async fn publish(api: &Apiserver, shared: &Shared, ports: &Ports, name: String) {
    let mut attempt = 0;
    // Asked anew each time: the node may have come back to another replica meanwhile, or be gone.
    while let Some(door) = ports.wanted(&name) {
        match api.patch_status(Kind::Node, "", &name, patch(&door, ports.address())).await {
            Ok(written) => {
                debug!(node = name, port = door.port, "the Node says where its kubelet is reached");
                // Reports are written over what the Node is now.
                shared.closures().node_written(&door.node, nodes::named(&written));
                return ports.written(&door.node, &Shown::of(&written));
            }
            Err(error) => match verdict(&error) {
                // Another Node of this name: the watch tells of it.
                Verdict::NotFound | Verdict::Conflict => return,
                Verdict::Refused(reason) => {
                    return warn!(node = name, reason, "the Node cannot be told where its kubelet is reached");
                }
                Verdict::Doubtful(_) | Verdict::Later(_) => {
                    if attempt == 0 {
                        info!(node = name, "cannot tell the Node where its kubelet is reached yet: {}", chain(&error));
                    }
                    tokio::time::sleep(backoff(attempt, rand::random())).await;
                    attempt += 1;
                }
            },
        }
    }
}

/// The strategic merge patch of nodes/status.
fn patch(door: &Door, address: &Address) -> Value {
    json!({
        "metadata": {"uid": door.node.uid},
        "status": {
            "addresses": [{"$patch": "replace"}, {"type": address.kind, "address": address.host}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": door.port}},
        },
    })
}
