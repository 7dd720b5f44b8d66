//! Device status: what a node reports of its devices becomes a DeviceStatus of the Device's name, which the Device owns.
//!
//! The whole status is replaced, for nobody else writes it. Of the Device itself nothing but its `status.state` is written, and only when
//! that is another one than it shows, for `kubectl get devices`.

use std::sync::atomic::Ordering;

use kube::api::Patch;
use serde_json::{Map, Value, json};
use skerry_proto::device::{DeviceReport, DeviceStatusStatus, GROUP, VERSION};
use skerry_proto::sync::Report;
use tracing::{debug, info};

use super::{Outcome, Queue, Upstream, lock};
use crate::apiserver::{Kind, Verdict, verdict};
use crate::backend::NodeIdentity;
use crate::clock;
use crate::closure::{DeviceFacts, DeviceInput, Source};
use crate::retry::chain;

impl Upstream {
    pub(super) async fn device_status(&self, queue: &Queue, report: &Report, tried: bool) -> Outcome {
        let content: DeviceReport = match serde_json::from_slice(&report.payload) {
            Ok(content) => content,
            Err(error) => return Outcome::Refused(format!("not a device report: {error}")),
        };
        let Report { namespace, name, uid, .. } = report;
        let facts = match self.own_device(&queue.node, namespace, name, uid).await {
            Ok(facts) => facts,
            Err(outcome) => return outcome,
        };
        let key = format!("{namespace}/{name}");
        let over = match facts.written.filter(|_| !tried) {
            Some(written) => Some(written),
            None => match self.device_shown(queue, namespace, name).await {
                Ok(shown) => shown,
                Err(outcome) => return outcome,
            },
        };
        let state = content.status.state.clone();
        let status = shown(content.status, &queue.node.name, facts.problem.as_deref());
        let owners = owners(name, uid);
        let written = match &over {
            Some(over) => {
                self.api.patch(Kind::DeviceStatus, namespace, name, &replacement(over, &owners, &status)).await
            }
            None => {
                let metadata = json!({"namespace": namespace, "name": name, "ownerReferences": owners});
                let body = json!({
                    "apiVersion": format!("{GROUP}/{VERSION}"), "kind": "DeviceStatus", "metadata": metadata, "status": status,
                });
                self.api.create(Kind::DeviceStatus, namespace, body).await
            }
        };
        let version = written.as_ref().ok().and_then(|written| written.metadata.resource_version.as_deref());
        self.shared.closures().device_written(&key, uid, version);
        if let Err(error) = written {
            return match verdict(&error) {
                Verdict::NotFound if over.is_none() => Outcome::Gone("the device's namespace is gone"),
                // Somebody wrote it, or made one, or deleted it meanwhile: it is looked at then.
                Verdict::Conflict | Verdict::NotFound => Outcome::Later(None),
                _ => self.no_device_status(&error),
            };
        }
        if !state.is_empty() && state != facts.state && !self.states_are_lost.load(Ordering::Relaxed) {
            lock(&queue.state).inbox.device_written(clock::monotonic());
            let metadata = json!({"uid": uid, "resourceVersion": facts.version});
            let patch = Patch::Merge(json!({"metadata": metadata, "status": {"state": state}}));
            match self.api.patch(Kind::Device, namespace, name, &patch).await {
                Ok(device) if device.data["status"]["state"] == state => {
                    // The next state is written over this, wherever the watch is by then.
                    let mut closures = self.shared.closures();
                    if closures.device(&key).is_some_and(|known| known.uid == *uid) {
                        closures.device_applied(DeviceInput::device(Kind::Device.json(&device), true), 0);
                    }
                }
                Ok(_) => {
                    info!(
                        "the CRD of Devices, which is not cloudcore's, keeps no status.state: Devices do not show theirs"
                    );
                    self.states_are_lost.store(true, Ordering::Relaxed);
                }
                Err(error) => match verdict(&error) {
                    Verdict::Later(after) => return Outcome::Later(after),
                    Verdict::Conflict => return Outcome::Later(None),
                    _ => debug!(%namespace, %name, "the Device does not show its state: {}", chain(&error)),
                },
            }
        }
        Outcome::Taken
    }

    /// The version of a DeviceStatus, if there is one, while no newer session has the node, looked at after that: in the watch of Nodes where
    /// that is as new.
    async fn device_shown(&self, queue: &Queue, namespace: &str, name: &str) -> Result<Option<String>, Outcome> {
        let shown = match self.api.version(Kind::DeviceStatus, namespace, name).await {
            Ok(Some(shown)) => shown,
            Ok(None) => return Ok(None),
            Err(error) => return Err(self.no_device_status(&error)),
        };
        let has_reached = {
            let closures = self.shared.closures();
            if closures.is_superseded(&queue.node, queue.epoch) {
                return Err(Outcome::Superseded);
            }
            closures.has_reached(Source::Nodes, &shown)
        };
        if !has_reached {
            self.newest(queue).await?;
        }
        Ok(Some(shown))
    }

    /// What a failed request for a DeviceStatus makes of a report.
    fn no_device_status(&self, error: &kube::Error) -> Outcome {
        match verdict(error) {
            Verdict::Doubtful(_) if !self.shared.closures().serves_devices() => Outcome::Refused(
                "the apiserver has no DeviceStatus: kubectl apply --server-side -f deploy/devices.yaml".into(),
            ),
            verdict => Outcome::of(verdict),
        }
    }

    /// A device that this node may report for, from the cache if that agrees, else from the apiserver.
    pub(super) async fn own_device(
        &self,
        node: &NodeIdentity,
        namespace: &str,
        name: &str,
        uid: &str,
    ) -> Result<DeviceFacts, Outcome> {
        if namespace.is_empty() || name.is_empty() || uid.is_empty() {
            return Err(Outcome::Refused("the report names no device".into()));
        }
        let known = self.shared.closures().device(&format!("{namespace}/{name}"));
        if let Some(known) = known.filter(|known| known.node == node.name && known.uid == uid) {
            return Ok(known);
        }
        match self.api.get(Kind::Device, namespace, name).await {
            Ok(None) => Err(Outcome::Gone("the device is gone")),
            Ok(Some(device)) => {
                let facts = DeviceInput::device(Kind::Device.json(&device), false).facts();
                if facts.uid != uid {
                    Err(Outcome::Gone("the device is gone: another one has its name"))
                } else if facts.node != node.name {
                    Err(Outcome::Refused("the device belongs to another node".into()))
                } else {
                    Ok(facts)
                }
            }
            Err(error) => Err(Outcome::of(verdict(&error))),
        }
    }
}

/// What the DeviceStatus is to show: what the edge says, and what the edge cannot know or need not say.
fn shown(status: DeviceStatusStatus, node: &str, problem: Option<&str>) -> Value {
    let mut status = status;
    status.extensions.get_or_insert_with(Map::new).insert("node".into(), node.into());
    if let Some(problem) = problem {
        let condition =
            json!({"type": "FitsModel", "status": "False", "reason": "DoesNotFitModel", "message": problem});
        status.extensions.get_or_insert_with(Map::new).insert("conditions".into(), json!([condition]));
    }
    serde_json::to_value(status).unwrap_or_default()
}

fn owners(name: &str, uid: &str) -> Value {
    json!([{"apiVersion": format!("{GROUP}/{VERSION}"), "kind": "Device", "name": name, "uid": uid}])
}

/// A JSON patch of a DeviceStatus of this version: a merge patch would keep what the status says no more. The owner is written too, for a
/// Device of the same name may have owned it before.
fn replacement(version: &str, owners: &Value, status: &Value) -> Patch<Value> {
    let steps = json!([
        {"op": "add", "path": "/metadata/resourceVersion", "value": version},
        {"op": "add", "path": "/metadata/ownerReferences", "value": owners},
        {"op": "add", "path": "/status", "value": status},
    ]);
    Patch::Json(serde_json::from_value(steps).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_the_model_is_said_beside_what_the_edge_says() {
        let status = || serde_json::from_value(json!({"state": "online", "extensions": {"rssi": 7}})).unwrap();
        assert_eq!(shown(status(), "n", None), json!({"state": "online", "extensions": {"rssi": 7, "node": "n"}}));
        let told = shown(status(), "n", Some("no such property"));
        assert_eq!(told["extensions"]["rssi"], 7);
        assert_eq!(told["extensions"]["conditions"][0]["message"], "no such property");
    }

    #[test]
    fn the_patch_replaces_the_status_and_its_owner_and_nothing_else() {
        let Patch::Json::<Value>(patch) = replacement("7", &owners("d", "u"), &json!({"state": "online"})) else {
            panic!("another patch")
        };
        insta::assert_json_snapshot!(patch, @r#"
        [
          {
            "op": "add",
            "path": "/metadata/resourceVersion",
            "value": "7"
          },
          {
            "op": "add",
            "path": "/metadata/ownerReferences",
            "value": [
              {
                "apiVersion": "devices.kubeedge.io/v1beta1",
                "kind": "Device",
                "name": "d",
                "uid": "u"
              }
            ]
          },
          {
            "op": "add",
            "path": "/status",
            "value": {
              "state": "online"
            }
          }
        ]
        "#);
    }
}
