//! Keeping the pods of a node that is away: unlimited tolerations for the taints such a node gets.
//!
//! The taint manager takes, for each taint, the first toleration in the pod's list that matches, and its tolerationSeconds decide. So an
//! unlimited toleration must stand before the one of 300 s that admission adds to every pod; adding to the list of a running pod is allowed,
//! at any place. Nothing is removed: the pod's own tolerations stay as they are.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use kube::api::Patch;
use serde_json::{Value, json};
use skerry_proto::AUTONOMY_ANNOTATION;
use tokio::sync::Notify;
use tracing::{debug, warn};

use crate::apiserver::{Apiserver, Kind, Verdict, backoff, verdict};
use crate::supervise;

const TAINTS: [&str; 2] = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];
/// Patches under way at once.
const AT_ONCE: usize = 4;

/// The tolerations the pod should have; `None` when they are good as they are, or the pod is ending or does not want it.
pub(crate) fn plan(pod: &Value) -> Option<Vec<Value>> {
    let metadata = &pod["metadata"];
    let ended = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    if ended || !metadata["deletionTimestamp"].is_null() || metadata["annotations"][AUTONOMY_ANNOTATION] == "false" {
        return None;
    }
    let there = pod["spec"]["tolerations"].as_array().map_or(&[][..], Vec::as_slice);
    let mut tolerations: Vec<Value> = TAINTS
        .into_iter()
        .filter(|taint| {
            let first = there.iter().find(|toleration| tolerates(toleration, taint));
            first.is_none_or(|toleration| !toleration["tolerationSeconds"].is_null())
        })
        .map(|taint| json!({"key": taint, "operator": "Exists", "effect": "NoExecute"}))
        .collect();
    if tolerations.is_empty() {
        return None;
    }
    tolerations.extend_from_slice(there);
    Some(tolerations)
}

fn tolerates(toleration: &Value, taint: &str) -> bool {
    let text = |field: &str| toleration[field].as_str().unwrap_or_default();
    let effect = matches!(text("effect"), "" | "NoExecute");
    let key = text("key").is_empty() || text("key") == taint;
    // Both taints have an empty value.
    let value = match text("operator") {
        "" | "Equal" => text("value").is_empty() && !text("key").is_empty(),
        "Exists" => true,
        _ => false,
    };
    effect && key && value
}

/// Pods to patch, one entry a pod: the newest decision replaces the one before.
#[derive(Debug, Default)]
pub(crate) struct Autonomy {
    waiting: Mutex<BTreeMap<String, Job>>,
    wake: Notify,
}

#[derive(Clone, Debug)]
struct Job {
    resource_version: String,
    tolerations: Vec<Value>,
    attempt: u32,
}

impl Autonomy {
    /// Looks at a pod as the apiserver has it; `key` is `namespace/name`.
    pub(crate) fn look(&self, key: &str, pod: &Value) {
        let mut waiting = self.lock();
        match plan(pod) {
            None => drop(waiting.remove(key)),
            Some(tolerations) => {
                let resource_version = pod["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
                waiting.insert(key.to_owned(), Job { resource_version, tolerations, attempt: 0 });
                self.wake.notify_one();
            }
        }
    }

    /// Patches what waits, for ever.
    pub(crate) async fn run(self: Arc<Self>, api: Apiserver) {
        let mut under_way = FuturesUnordered::new();
        loop {
            while under_way.len() < AT_ONCE {
                let Some((key, job)) = self.lock().pop_first() else { break };
                under_way.push(apply(&api, key, job));
            }
            tokio::select! {
                Some(again) = under_way.next(), if !under_way.is_empty() => {
                    if let Some((key, job, wait)) = again {
                        self.clone().again(key, job, wait);
                    }
                }
                () = self.wake.notified() => {}
            }
        }
    }

    fn again(self: Arc<Self>, key: String, job: Job, wait: Duration) {
        supervise::spawn("autonomy retry", async move {
            tokio::time::sleep(wait).await;
            // A newer decision stands.
            self.lock().entry(key).or_insert(job);
            self.wake.notify_one();
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Job>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers what to try again, and when.
async fn apply(api: &Apiserver, key: String, mut job: Job) -> Option<(String, Job, Duration)> {
    let (namespace, name) = key.split_once('/')?;
    // The resource version makes it a compare-and-swap: a pod that changed comes along in the watch and is looked at again.
    let patch = json!({
        "metadata": {"resourceVersion": job.resource_version},
        "spec": {"tolerations": job.tolerations},
    });
    let Err(error) = api.patch(Kind::Pod, namespace, name, &Patch::Merge(patch)).await else { return None };
    match verdict(&error) {
        Verdict::NotFound | Verdict::Conflict => {
            debug!(pod = key, "the pod changed before its tolerations did");
            None
        }
        // For as long as it takes: the pod may never change, and so never be looked at again.
        verdict @ (Verdict::Later(_) | Verdict::Doubtful(_)) => {
            let after = match verdict {
                Verdict::Later(after) => after.unwrap_or_default(),
                _ => Duration::ZERO,
            };
            let wait = backoff(job.attempt, rand::random()).max(after);
            job.attempt = job.attempt.saturating_add(1);
            Some((key, job, wait))
        }
        Verdict::Refused(reason) => {
            warn!(pod = key, %reason, "the pod will be evicted if its node is away for long: its tolerations cannot be changed");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(tolerations: &Value) -> Value {
        json!({"metadata": {"name": "p"}, "spec": {"tolerations": tolerations}, "status": {"phase": "Running"}})
    }

    fn limited(taint: &str) -> Value {
        json!({"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})
    }

    fn unlimited(taint: &str) -> Value {
        json!({"key": taint, "operator": "Exists", "effect": "NoExecute"})
    }

    #[test]
    fn unlimited_ones_go_before_the_defaults() {
        let there = json!([limited(TAINTS[0]), limited(TAINTS[1])]);
        let planned = plan(&pod(&there)).unwrap();
        assert_eq!(planned, [unlimited(TAINTS[0]), unlimited(TAINTS[1]), limited(TAINTS[0]), limited(TAINTS[1])]);
        assert_eq!(plan(&pod(&planned.into())), None, "once is enough");
    }

    #[test]
    fn only_what_limits_first_counts() {
        assert_eq!(plan(&pod(&json!([{"operator": "Exists"}]))), None, "tolerates everything for ever");
        let wildcard = json!({"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 10});
        assert_eq!(plan(&pod(&json!([wildcard]))).unwrap().len(), 3);
        assert_eq!(
            plan(&pod(&json!([unlimited(TAINTS[1]), wildcard]))).unwrap().len(),
            3,
            "not-ready is still limited"
        );
        assert_eq!(
            plan(&pod(&json!([{"key": TAINTS[0], "operator": "Exists", "effect": "NoSchedule"}]))).unwrap().len(),
            3
        );
        assert_eq!(plan(&pod(&Value::Null)).unwrap().len(), 2);
    }

    #[test]
    fn pods_that_end_or_object_are_left_alone() {
        for (pointer, value) in [
            ("deletionTimestamp", json!("2026-01-01T00:00:00Z")),
            ("annotations", json!({AUTONOMY_ANNOTATION: "false"})),
        ] {
            let mut pod = pod(&json!([]));
            pod["metadata"][pointer] = value;
            assert_eq!(plan(&pod), None);
        }
        let mut pod = pod(&json!([]));
        pod["status"]["phase"] = "Succeeded".into();
        assert_eq!(plan(&pod), None);
    }
}
