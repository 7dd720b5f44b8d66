//! Pod status: how a report is brought to its pod, the patch that carries it, and what is remembered of a status to tell whether one is
//! needed.
//!
//! The edge is the author of what a kubelet writes; conditions of other authors are never touched, for lists of conditions merge by type.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::{Map, Value, json};
use skerry_proto::payload::PodReport;
use skerry_proto::sync::Report;

use super::{Outcome, Queue, Upstream, lock};
use crate::apiserver::{Kind, Verdict, verdict};
use crate::backend::NodeIdentity;
use crate::closure::{PodFacts, Source};
use crate::nodes::{self, Claim, Named};

/// Written whole; those that may vanish are written as null when the report lacks them.
const FIELDS: [&str; 7] = ["phase", "hostIP", "startTime", "qosClass", "observedGeneration", "reason", "message"];
const MAY_VANISH: [&str; 2] = ["reason", "message"];
/// Lists without a merge key.
const ATOMIC: [&str; 3] = ["initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses"];
/// Lists that would merge by `ip` and must not.
const ADDRESSES: [&str; 2] = ["hostIPs", "podIPs"];
/// Maps that would merge by key and must not.
const MAPS: [&str; 2] = ["resources", "allocatedResources"];
/// Conditions of the edge's own that a report may leave out, which ends them.
const MAY_END: [&str; 2] = ["PodResizePending", "PodResizeInProgress"];
/// Conditions that count when a status is compared.
const OWN_CONDITIONS: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready", "PodScheduled"];

/// What is remembered of a status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct StatusFacts {
    /// status.phase
    pub(crate) phase: String,
    /// A node has written it.
    pub(crate) begun: bool,
    /// The node lifecycle controller, which writes no reason, says that the pod is not ready although its containers are.
    pub(crate) disowned: bool,
    /// Of all that the edge is the author of.
    pub(crate) fingerprint: u64,
}

impl StatusFacts {
    /// Reads them off a status.
    pub(crate) fn of(status: &Value) -> Self {
        let condition = |kind: &str| conditions(status).find(|condition| condition["type"] == kind);
        let holds = |found: &Value| found["status"] == "True";
        let ready = ["Ready", "ContainersReady"].map(condition);
        let silent = |found: &Value| !holds(found) && found["reason"].as_str().is_none_or(str::is_empty);
        Self {
            phase: status["phase"].as_str().unwrap_or_default().to_owned(),
            begun: !status["startTime"].is_null(),
            disowned: ready[0].is_some_and(silent) && ready[1].is_some_and(holds),
            fingerprint: fingerprint(status),
        }
    }

    /// Whether the pod has ended for good.
    pub(crate) fn terminal(&self) -> bool {
        matches!(self.phase.as_str(), "Succeeded" | "Failed")
    }

    /// Whether what the apiserver shows is not what the edge says: known for certain when `report` was taken in this session, else by
    /// the traces that others leave.
    pub(crate) fn hides(&self, report: Option<&Self>) -> bool {
        !self.terminal() && report.map_or(self.disowned, |report| report.fingerprint != self.fingerprint)
    }
}

impl Upstream {
    pub(super) async fn pod_status(&self, queue: &Queue, report: &Report) -> Outcome {
        let content: PodReport = match serde_json::from_slice(&report.payload) {
            Ok(content) => content,
            Err(error) => return Outcome::Refused(format!("not a pod report: {error}")),
        };
        let key = format!("{}/{}", report.namespace, report.name);
        let mut facts = match self.own_pod(&queue.node, &report.namespace, &report.name, &report.uid).await {
            Ok(facts) => facts,
            Err(Outcome::Gone(_)) if content.finished && self.pod_is_gone(&key, &report.uid) => {
                return Outcome::Unchanged;
            }
            Err(outcome) => return outcome,
        };
        let before = facts.resource_version.clone();
        facts = match self.write_status(queue, report, &content, facts).await {
            Ok(facts) => facts,
            Err(outcome) => return outcome,
        };
        let unchanged = facts.resource_version == before;
        lock(&queue.state).accept(&report.uid, facts.status.clone(), &facts.resource_version);
        if !content.finished {
            return if unchanged { Outcome::Unchanged } else { Outcome::Taken };
        }
        if !facts.deleting {
            facts = match self.fetch_own_pod(&queue.node, &report.namespace, &report.name, &report.uid).await {
                Ok(facts) => facts,
                Err(outcome) => return outcome,
            };
            if !facts.deleting {
                return Outcome::Refused("the pod is not being deleted".into());
            }
        }
        match self.api.delete_now(Kind::Pod, &report.namespace, &report.name, &report.uid).await {
            Ok(()) => Outcome::Taken,
            Err(error) => match verdict(&error) {
                Verdict::NotFound | Verdict::Conflict => Outcome::Taken,
                verdict => Outcome::of(verdict),
            },
        }
    }

    /// Makes the pod show the status, if it does not. Answers the pod as it is then.
    ///
    /// A status is written only over the one that was looked at, and only by a session that had the node after that look: so none of an older
    /// session takes the place of what a newer one wrote.
    async fn write_status(
        &self,
        queue: &Queue,
        report: &Report,
        content: &PodReport,
        mut facts: PodFacts,
    ) -> Result<PodFacts, Outcome> {
        let key = format!("{}/{}", report.namespace, report.name);
        let status = StatusFacts::of(&content.status);
        let mut is_second = false;
        loop {
            if facts.status.terminal() && status.phase != facts.status.phase {
                return if content.finished {
                    Ok(facts)
                } else {
                    Err(Outcome::Refused(format!("the pod's phase {} is final", facts.status.phase)))
                };
            }
            if status.fingerprint == facts.status.fingerprint {
                return Ok(facts);
            }
            if !self.has_node(queue, &facts).await? {
                return Err(Outcome::Superseded);
            }
            let patch = patch(&report.uid, &facts.resource_version, &content.status).map_err(Outcome::Refused)?;
            let error = match self.api.patch_status(Kind::Pod, &report.namespace, &report.name, patch).await {
                Ok(written) => {
                    facts = PodFacts::of(&Kind::Pod.json(&written));
                    self.shared.closures().pod_written(&key, facts.clone());
                    return Ok(facts);
                }
                Err(error) => verdict(&error),
            };
            let otherwise = match error {
                // The UID guard answers 422, which a status that cannot be does as well: the pod itself is asked.
                Verdict::Refused(reason) => Some(Outcome::Refused(reason)),
                Verdict::NotFound => Some(Outcome::Later(None)),
                // Somebody wrote the pod meanwhile, or it is another one.
                Verdict::Conflict => std::mem::replace(&mut is_second, true).then_some(Outcome::Later(None)),
                verdict => return Err(Outcome::of(verdict)),
            };
            facts = match self.fetch_own_pod(&queue.node, &report.namespace, &report.name, &report.uid).await {
                Ok(facts) => facts,
                Err(Outcome::Gone(_)) if content.finished => return Err(Outcome::Taken),
                Err(outcome) => return Err(outcome),
            };
            self.shared.closures().pod_written(&key, facts.clone());
            if let Some(outcome) = otherwise {
                return Err(outcome);
            }
        }
    }

    /// Whether this session has the node, looked at after this state of one of its pods. Whoever takes a node over says so on the Node before
    /// writing anything: what the watch shows is enough if it is as new as the pod, or if nobody else has written the status.
    async fn has_node(&self, queue: &Queue, pod: &PodFacts) -> Result<bool, Outcome> {
        {
            let closures = self.shared.closures();
            if closures.is_superseded(&queue.node, queue.epoch) {
                return Ok(false);
            }
            if !pod.status.begun || closures.has_reached(Source::Nodes, &pod.resource_version) {
                return Ok(true);
            }
        }
        if lock(&queue.state).wrote(&pod.uid, &pod.status) {
            return Ok(true);
        }
        match self.newest(queue).await {
            Ok(_) => Ok(true),
            Err(Outcome::Superseded) => Ok(false),
            Err(outcome) => Err(outcome),
        }
    }

    /// The Node, asked for at the apiserver, unless it names a newer session than this.
    pub(super) async fn newest(&self, queue: &Queue) -> Result<Named, Outcome> {
        match nodes::look(&self.api, &queue.node).await {
            Ok(Some(named)) if named.epoch > queue.epoch => {
                let theirs = Claim::Theirs(named.epoch, Some(named.agents));
                self.shared.closures().claimed(&queue.node, queue.epoch, theirs);
                Err(Outcome::Superseded)
            }
            Ok(Some(found)) => Ok(found),
            Ok(None) => Err(Outcome::Gone("the Node is gone")),
            Err(error) => Err(Outcome::of(verdict(&error))),
        }
    }

    fn pod_is_gone(&self, key: &str, uid: &str) -> bool {
        self.shared.closures().pod(key).is_none_or(|(_, facts)| facts.uid != uid)
    }

    /// A pod that this node may report for, from the cache if that agrees, else from the apiserver.
    pub(super) async fn own_pod(
        &self,
        node: &NodeIdentity,
        namespace: &str,
        name: &str,
        uid: &str,
    ) -> Result<PodFacts, Outcome> {
        let known = self
            .shared
            .closures()
            .pod(&format!("{namespace}/{name}"))
            .map(|(on, facts)| (on == node.name, facts.clone()));
        match known {
            Some((true, facts)) if facts.uid == uid => Ok(facts),
            _ => self.fetch_own_pod(node, namespace, name, uid).await,
        }
    }

    async fn fetch_own_pod(
        &self,
        node: &NodeIdentity,
        namespace: &str,
        name: &str,
        uid: &str,
    ) -> Result<PodFacts, Outcome> {
        if namespace.is_empty() || name.is_empty() {
            return Err(Outcome::Refused("the report names no pod".into()));
        }
        match self.api.get(Kind::Pod, namespace, name).await {
            Ok(None) => Err(Outcome::Gone("the pod is gone")),
            Ok(Some(pod)) => {
                let pod = Kind::Pod.json(&pod);
                let facts = PodFacts::of(&pod);
                if facts.uid != uid {
                    Err(Outcome::Gone("the pod is gone: another one has its name"))
                } else if pod["spec"]["nodeName"] != node.name.as_str() {
                    Err(Outcome::Refused("the pod belongs to another node".into()))
                } else {
                    Ok(facts)
                }
            }
            Err(error) => Err(Outcome::of(verdict(&error))),
        }
    }
}

/// The strategic merge patch that makes the status of the pod of this version say what the report says, and of no other version of it;
/// `Err` when the report is no status.
pub(crate) fn patch(uid: &str, version: &str, status: &Value) -> Result<Value, String> {
    let report = status.as_object().ok_or("the status is not an object")?;
    if !report.get("phase").is_some_and(Value::is_string) {
        return Err("the status has no phase".into());
    }
    let mut patch = Map::new();
    for field in FIELDS {
        match report.get(field) {
            Some(value) => drop(patch.insert(field.into(), value.clone())),
            None if MAY_VANISH.contains(&field) => drop(patch.insert(field.into(), Value::Null)),
            None => {}
        }
    }
    patch.insert("podIP".into(), report.get("podIP").cloned().unwrap_or_default());
    for field in ATOMIC {
        patch.insert(field.into(), report.get(field).cloned().unwrap_or_default());
    }
    for field in ADDRESSES {
        let mut list = vec![json!({"$patch": "replace"})];
        list.extend(report.get(field).and_then(Value::as_array).cloned().unwrap_or_default());
        patch.insert(field.into(), list.into());
    }
    for field in MAPS {
        if let Some(Value::Object(map)) = report.get(field) {
            let mut map = map.clone();
            map.insert("$patch".into(), "replace".into());
            patch.insert(field.into(), map.into());
        }
    }
    let mut list = Vec::new();
    for condition in conditions(status) {
        if !condition["type"].is_string() || !condition["status"].is_string() {
            return Err("a condition lacks its type or status".into());
        }
        let mut condition = condition.clone();
        for field in MAY_VANISH {
            // Merged into what is there: a reason why it did not hold would stay when it does.
            if condition.get(field).is_none() {
                condition[field] = Value::Null;
            }
        }
        list.push(condition);
    }
    for kind in MAY_END {
        if !conditions(status).any(|condition| condition["type"] == kind) {
            list.push(json!({"$patch": "delete", "type": kind}));
        }
    }
    patch.insert("conditions".into(), list.into());
    Ok(json!({"metadata": {"uid": uid, "resourceVersion": version}, "status": patch}))
}

fn conditions(status: &Value) -> impl Iterator<Item = &Value> {
    status["conditions"].as_array().into_iter().flatten()
}

/// Two statuses that mean the same have the same one: what is empty is left out and times count in seconds.
fn fingerprint(status: &Value) -> u64 {
    let mut own = Map::new();
    for field in FIELDS.into_iter().chain(["podIP"]).chain(ATOMIC).chain(ADDRESSES).chain(MAPS) {
        if let Some(value) = status.get(field).and_then(meaning) {
            own.insert(field.into(), value);
        }
    }
    let counted =
        |kind: &Value| kind.as_str().is_some_and(|kind| OWN_CONDITIONS.contains(&kind) || MAY_END.contains(&kind));
    let mut list: Vec<Value> =
        conditions(status).filter(|condition| counted(&condition["type"])).filter_map(meaning).collect();
    list.sort_by_key(|condition| condition["type"].to_string());
    own.insert("conditions".into(), list.into());
    let mut hasher = DefaultHasher::new();
    Value::Object(own).to_string().hash(&mut hasher);
    hasher.finish()
}

/// A value without what is empty, and with times in seconds.
pub(super) fn meaning(value: &Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::String(text) if text.is_empty() => None,
        Value::String(text) => Some(match whole_seconds(text) {
            Some(seconds) => seconds.into(),
            None => text.as_str().into(),
        }),
        Value::Array(items) if items.is_empty() => None,
        Value::Array(items) => Some(items.iter().map(|item| meaning(item).unwrap_or_default()).collect()),
        Value::Object(fields) => {
            let fields: Map<String, Value> =
                fields.iter().filter_map(|(name, field)| Some((name.clone(), meaning(field)?))).collect();
            (!fields.is_empty()).then(|| fields.into())
        }
        Value::Bool(_) | Value::Number(_) => Some(value.clone()),
    }
}

fn whole_seconds(text: &str) -> Option<i64> {
    let looks_like_a_time = text.len() >= 20 && text.as_bytes().get(10) == Some(&b'T') && text.ends_with('Z');
    looks_like_a_time.then(|| text.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_second)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Value {
        json!({
            "phase": "Running", "hostIP": "10.0.0.1", "hostIPs": [{"ip": "10.0.0.1"}], "podIP": "10.1.0.2", "podIPs": [{"ip": "10.1.0.2"}],
            "startTime": "2026-01-01T00:00:00Z", "qosClass": "BestEffort", "observedGeneration": 1,
            "conditions": [
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:02Z"},
                {"type": "ContainersReady", "status": "True"},
            ],
            "containerStatuses": [{"name": "c", "ready": true, "restartCount": 0, "image": "i", "imageID": "", "state": {"running": {}}}],
        })
    }

    #[test]
    fn the_patch_replaces_what_is_the_edges_and_names_nothing_else() {
        insta::assert_json_snapshot!(patch("u", "7", &status()).unwrap(), @r#"
        {
          "metadata": {
            "resourceVersion": "7",
            "uid": "u"
          },
          "status": {
            "conditions": [
              {
                "lastTransitionTime": "2026-01-01T00:00:02Z",
                "message": null,
                "reason": null,
                "status": "True",
                "type": "Ready"
              },
              {
                "message": null,
                "reason": null,
                "status": "True",
                "type": "ContainersReady"
              },
              {
                "$patch": "delete",
                "type": "PodResizePending"
              },
              {
                "$patch": "delete",
                "type": "PodResizeInProgress"
              }
            ],
            "containerStatuses": [
              {
                "image": "i",
                "imageID": "",
                "name": "c",
                "ready": true,
                "restartCount": 0,
                "state": {
                  "running": {}
                }
              }
            ],
            "ephemeralContainerStatuses": null,
            "hostIP": "10.0.0.1",
            "hostIPs": [
              {
                "$patch": "replace"
              },
              {
                "ip": "10.0.0.1"
              }
            ],
            "initContainerStatuses": null,
            "message": null,
            "observedGeneration": 1,
            "phase": "Running",
            "podIP": "10.1.0.2",
            "podIPs": [
              {
                "$patch": "replace"
              },
              {
                "ip": "10.1.0.2"
              }
            ],
            "qosClass": "BestEffort",
            "reason": null,
            "startTime": "2026-01-01T00:00:00Z"
          }
        }
        "#);
    }

    #[test]
    fn what_is_no_status_is_refused() {
        assert!(patch("u", "7", &json!("Running")).is_err());
        assert!(patch("u", "7", &json!({"conditions": []})).is_err());
        assert!(patch("u", "7", &json!({"phase": "Running", "conditions": [{"status": "True"}]})).is_err());
    }

    #[test]
    fn the_apiservers_rendering_of_a_report_counts_as_equal() {
        let mut stored = status();
        stored["startTime"] = "2026-01-01T00:00:00.5Z".into();
        stored["message"] = "".into();
        stored["initContainerStatuses"] = json!([]);
        let conditions = stored["conditions"].as_array_mut().unwrap();
        conditions[0]["lastProbeTime"] = Value::Null;
        conditions.reverse();
        conditions.push(json!({"type": "example.com/gate", "status": "True"}));
        assert_eq!(StatusFacts::of(&stored), StatusFacts::of(&status()));
        stored["containerStatuses"][0]["restartCount"] = 1.into();
        assert_ne!(StatusFacts::of(&stored), StatusFacts::of(&status()));
    }

    #[test]
    fn a_controllers_not_ready_hides_a_report_and_an_end_does_not() {
        let report = StatusFacts::of(&status());
        let mut stored = status();
        stored["conditions"][0]["status"] = "False".into();
        assert!(StatusFacts::of(&stored).hides(Some(&report)) && StatusFacts::of(&stored).hides(None));
        assert!(!report.hides(Some(&report)) && !report.hides(None));
        let mut gated = stored.clone();
        gated["conditions"][0]["reason"] = "ReadinessGatesNotReady".into();
        assert!(!StatusFacts::of(&gated).hides(None), "the edge's own words");
        let mut older = status();
        older["containerStatuses"][0]["restartCount"] = 1.into();
        assert!(StatusFacts::of(&older).hides(Some(&report)), "another replica wrote an older report late");
        assert!(!StatusFacts::of(&older).hides(None));
        stored["phase"] = "Failed".into();
        assert!(!StatusFacts::of(&stored).hides(Some(&report)) && !StatusFacts::of(&stored).hides(None));
    }
}
