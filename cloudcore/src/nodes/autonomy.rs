//! Keeping the pods of a node that is away: unlimited tolerations for the taints such a node gets.
//!
//! The taint manager takes, for each taint, the first toleration in the pod's list that matches, and its tolerationSeconds decide. So an
//! unlimited toleration must stand before the one of 300 s that admission adds to every pod; adding to the list of a running pod is allowed,
//! at any place. Nothing is removed: the pod's own tolerations stay as they are.

use std::collections::{BTreeMap, BTreeSet};
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
use crate::clock;

const TAINTS: [&str; 2] = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];
/// Patches under way at once.
const AT_ONCE: usize = 4;
/// Refused this often for reasons that may pass, which takes a minute or so, a pod's tolerations are told to be out of reach.
const DOUBTFUL_ATTEMPTS: u32 = 10;
/// From then on they are tried this seldom: rights come back, and policies change.
const DOUBTED: Duration = Duration::from_secs(600);

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
    pods: Mutex<Pods>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Pods {
    /// Of pods that are there, by `namespace/name`.
    jobs: BTreeMap<String, Job>,
    /// When each is tried next, but for those that are under way.
    due: BTreeSet<(Duration, String)>,
}

#[derive(Clone, Debug)]
struct Job {
    resource_version: String,
    tolerations: Vec<Value>,
    attempt: u32,
    /// How often the apiserver refused it for a reason that may pass, whatever version the pod had.
    doubts: u32,
    /// None: it is under way.
    due: Option<Duration>,
}

/// How a try ended.
#[derive(Debug)]
enum Tried {
    /// It is as it should be, or the pod has changed, which the watch tells.
    Over,
    /// The apiserver could not, perhaps not before so long.
    Later(Duration),
    /// Refused, for a reason that may pass.
    Doubtful(String),
    /// Refused.
    Refused(String),
}

impl Autonomy {
    /// Looks at a pod as the apiserver has it; `key` is `namespace/name`.
    pub(crate) fn look(&self, key: &str, pod: &Value) {
        self.lock().look(key, pod, clock::monotonic());
        self.wake.notify_one();
    }

    /// A pod is gone.
    pub(crate) fn forget(&self, key: &str) {
        self.lock().forget(key);
    }

    /// Patches what waits, for ever.
    pub(crate) async fn run(self: Arc<Self>, api: Apiserver) {
        self.lock().begin(clock::monotonic());
        let mut under_way = FuturesUnordered::new();
        loop {
            while under_way.len() < AT_ONCE {
                let Some((key, job)) = self.lock().next(clock::monotonic()) else { break };
                under_way.push(apply(&api, key, job));
            }
            let due = self.lock().due.first().map(|(due, _)| *due);
            let due = due.filter(|_| under_way.len() < AT_ONCE);
            let wait = due.map_or(DOUBTED, |due| due.saturating_sub(clock::monotonic()));
            tokio::select! {
                Some((key, version, how)) = under_way.next(), if !under_way.is_empty() => {
                    let told = self.lock().tried(&key, &version, how, clock::monotonic(), rand::random());
                    if let Some(reason) = told {
                        warn!(pod = key, %reason, "the pod will be evicted if its node is away for long: its tolerations cannot be changed");
                    }
                }
                () = self.wake.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pods> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pods {
    /// Nothing is under way.
    fn begin(&mut self, now: Duration) {
        for (key, job) in self.jobs.iter_mut().filter(|(_, job)| job.due.is_none()) {
            job.due = Some(now);
            self.due.insert((now, key.clone()));
        }
    }

    fn look(&mut self, key: &str, pod: &Value, now: Duration) {
        let before = self.forget(key);
        let Some(tolerations) = plan(pod) else { return };
        let doubts = before.as_ref().map_or(0, |before| before.doubts);
        // What is refused again and again keeps its pace, however often the pod changes.
        let due = before.filter(Job::is_doubted).and_then(|before| before.due).unwrap_or(now);
        let resource_version = pod["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
        let job = Job { resource_version, tolerations, attempt: 0, doubts, due: Some(due) };
        self.jobs.insert(key.to_owned(), job);
        self.due.insert((due, key.to_owned()));
    }

    fn forget(&mut self, key: &str) -> Option<Job> {
        let job = self.jobs.remove(key)?;
        if let Some(due) = job.due {
            self.due.remove(&(due, key.to_owned()));
        }
        Some(job)
    }

    /// The first that is due, which is under way from now on.
    fn next(&mut self, now: Duration) -> Option<(String, Job)> {
        self.due.first().filter(|(due, _)| *due <= now)?;
        let (_, key) = self.due.pop_first()?;
        let job = self.jobs.get_mut(&key)?;
        job.due = None;
        let job = job.clone();
        Some((key, job))
    }

    /// The pod's tolerations were tried over this version of it. Answers why they are refused, once a pod, when that is to be told.
    fn tried(&mut self, key: &str, version: &str, how: Tried, now: Duration, spread: f64) -> Option<String> {
        let job = self.jobs.get_mut(key)?;
        // A newer decision stands.
        let is_newest = job.due.is_none() && job.resource_version == version;
        let was_doubted = job.is_doubted();
        let (least, reason) = match how {
            Tried::Over if is_newest => {
                self.jobs.remove(key);
                return None;
            }
            Tried::Over => return None,
            // For as long as it takes: the pod may never change, and so never be looked at again.
            Tried::Later(after) => (after, None),
            Tried::Doubtful(reason) => {
                job.doubts = job.doubts.saturating_add(1);
                (Duration::ZERO, Some(reason))
            }
            Tried::Refused(reason) => {
                job.doubts = DOUBTFUL_ATTEMPTS;
                (Duration::ZERO, Some(reason))
            }
        };
        let is_doubted = job.is_doubted();
        if is_newest {
            let pace = if is_doubted && reason.is_some() {
                DOUBTED.mul_f64(1.0 + spread / 2.0)
            } else {
                backoff(job.attempt, spread)
            };
            job.attempt = job.attempt.saturating_add(1);
            let due = now + pace.max(least);
            job.due = Some(due);
            self.due.insert((due, key.to_owned()));
        }
        reason.filter(|_| is_doubted && !was_doubted)
    }
}

impl Job {
    fn is_doubted(&self) -> bool {
        self.doubts >= DOUBTFUL_ATTEMPTS
    }
}

/// Answers over which version of the pod it was, and how it ended.
async fn apply(api: &Apiserver, key: String, job: Job) -> (String, String, Tried) {
    // The resource version makes it a compare-and-swap: a pod that changed comes along in the watch and is looked at again.
    let patch = json!({
        "metadata": {"resourceVersion": job.resource_version},
        "spec": {"tolerations": job.tolerations},
    });
    let (namespace, name) = key.split_once('/').unwrap_or_default();
    let how = match api.patch(Kind::Pod, namespace, name, &Patch::Merge(patch)).await {
        Ok(_) => Tried::Over,
        Err(error) => match verdict(&error) {
            Verdict::NotFound | Verdict::Conflict => {
                debug!(pod = key, "the pod changed before its tolerations did");
                Tried::Over
            }
            Verdict::Later(after) => Tried::Later(after.unwrap_or_default()),
            Verdict::Doubtful(reason) => Tried::Doubtful(reason),
            Verdict::Refused(reason) => Tried::Refused(reason),
        },
    };
    (key, job.resource_version, how)
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

    fn wanting(version: &str) -> Value {
        let mut pod = pod(&json!([]));
        pod["metadata"]["resourceVersion"] = version.into();
        pod
    }

    fn forbidden() -> Tried {
        Tried::Doubtful("a policy".to_owned())
    }

    /// When it is tried next, which it is then.
    fn next(pods: &mut Pods) -> Duration {
        let due = pods.due.first().unwrap().0;
        assert_eq!(pods.next(due.saturating_sub(Duration::from_millis(1))).map(|(key, _)| key), None);
        pods.next(due).unwrap();
        due
    }

    #[test]
    fn what_is_forbidden_for_good_is_told_once_and_tried_seldom() {
        let mut pods = Pods::default();
        pods.look("n/p", &wanting("1"), Duration::from_secs(1));
        let mut told = Vec::new();
        let mut at = Vec::new();
        for _ in 0..30 {
            let now = next(&mut pods);
            at.push(now);
            told.push(pods.tried("n/p", "1", forbidden(), now, 0.5).is_some());
        }
        assert_eq!(told.iter().position(|told| *told), Some(9), "others pass");
        assert_eq!(told.iter().filter(|told| **told).count(), 1);
        assert!(at[9] < Duration::from_secs(180), "it takes {:?}", at[9]);
        assert!(at.windows(2).skip(9).all(|two| two[1] - two[0] >= DOUBTED), "{at:?}");
        // However often the pod changes, and whatever else goes wrong.
        let now = at[29];
        for version in ["2", "3"] {
            pods.look("n/p", &wanting(version), now);
        }
        let now = next(&mut pods);
        assert!(now >= at[29] + DOUBTED);
        assert_eq!(pods.tried("n/p", "3", forbidden(), now, 0.5), None);
        let now = next(&mut pods);
        assert_eq!(pods.tried("n/p", "3", Tried::Later(Duration::ZERO), now, 0.5), None);
        assert!(next(&mut pods) < now + DOUBTED, "an apiserver that is out of order says nothing");
        // Another pod of this name has its own.
        pods.forget("n/p");
        pods.look("n/p", &wanting("9"), now);
        assert_eq!(next(&mut pods), now);
        assert_eq!(pods.tried("n/p", "9", Tried::Refused("invalid".to_owned()), now, 0.5), Some("invalid".to_owned()));
        assert!(next(&mut pods) >= now + DOUBTED);
    }

    #[test]
    fn a_pod_has_one_entry_however_often_it_changes_and_none_when_it_is_gone() {
        let mut pods = Pods::default();
        let now = Duration::from_secs(1);
        for version in 0..100 {
            let version = version.to_string();
            pods.look("n/p", &wanting(&version), now);
            if let Some((key, job)) = pods.next(now) {
                pods.look("n/p", &wanting("newer"), now);
                assert_eq!(pods.tried(&key, &job.resource_version, forbidden(), now, 0.5).is_some(), version == "9");
            }
            assert_eq!((pods.jobs.len(), pods.due.len()), (1, 1));
        }
        let (key, _) = pods.next(Duration::MAX).unwrap();
        pods.begin(now);
        assert_eq!((pods.jobs.len(), pods.due.len()), (1, 1), "what was under way is tried again");
        pods.next(now).unwrap();
        assert_eq!(pods.tried(&key, "newer", Tried::Over, now, 0.5), None);
        assert!(pods.jobs.is_empty() && pods.due.is_empty());
        pods.look("n/p", &wanting("1"), now);
        pods.look("n/p", &pod(&json!([{"operator": "Exists"}])), now);
        assert!(pods.jobs.is_empty() && pods.due.is_empty());
        pods.look("n/p", &wanting("1"), now);
        let (key, _) = pods.next(now).unwrap();
        pods.forget("n/p");
        assert_eq!(pods.tried(&key, "1", forbidden(), now, 0.5), None);
        assert!(pods.jobs.is_empty() && pods.due.is_empty());
    }
}
