//! `/metrics/probes`: how often the probes of containers went how.
//!
//! The probes of a pod count for themselves and keep their counts; here is only known where. With the pod's probes the counts go, as the
//! kubelet's do.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use k8s_openapi::api::core::v1::Pod;

use super::page::{Labels, Page};
use crate::kubelet::probe::{Attempt, Kind};
use crate::order;

/// The counts of all pods.
#[derive(Debug, Default)]
pub struct Counts(Mutex<Vec<Weak<PodCounts>>>);

/// The counts of the probes of one pod.
#[derive(Debug)]
pub struct PodCounts {
    name: String,
    namespace: String,
    uid: String,
    /// By container and kind: successes, failures, and probes that could not be run.
    counts: Mutex<BTreeMap<(String, Kind), [u64; 3]>>,
}

impl Counts {
    /// Counts for a pod's probes, known here for as long as they are kept.
    pub fn of(&self, pod: &Pod) -> Arc<PodCounts> {
        let metadata = &pod.metadata;
        let counts = Arc::new(PodCounts {
            name: metadata.name.clone().unwrap_or_default(),
            namespace: metadata.namespace.clone().unwrap_or_default(),
            uid: metadata.uid.clone().unwrap_or_default(),
            counts: Mutex::default(),
        });
        let mut all = locked(&self.0);
        all.retain(|counts| counts.strong_count() > 0);
        all.push(Arc::downgrade(&counts));
        counts
    }

    /// Writes the page.
    pub(super) fn page(&self) -> Bytes {
        let mut pods: Vec<Arc<PodCounts>> = locked(&self.0).iter().filter_map(Weak::upgrade).collect();
        order::sort_by(&mut pods, |a, b| (&a.namespace, &a.name, &a.uid).cmp(&(&b.namespace, &b.name, &b.uid)));
        // A pod that is taken up anew while what it had is not yet dropped.
        pods.dedup_by(|a, b| a.uid == b.uid);
        let mut page = Page::default();
        let mut family = page.counter(
            "prober_probe_total",
            "[BETA] Cumulative number of a liveness, readiness or startup probe for a container by result.",
        );
        for pod in pods {
            for ((container, kind), counts) in locked(&pod.counts).iter() {
                let kind = match kind {
                    Kind::Startup => "Startup",
                    Kind::Liveness => "Liveness",
                    Kind::Readiness => "Readiness",
                };
                let labels = Labels::new([
                    ("container", container.as_str()),
                    ("namespace", pod.namespace.as_str()),
                    ("pod", pod.name.as_str()),
                    ("pod_uid", pod.uid.as_str()),
                    ("probe_type", kind),
                ]);
                for (result, count) in ["successful", "failed", "unknown"].iter().zip(counts) {
                    if *count > 0 {
                        family.add(&labels.and("result", result), count, None);
                    }
                }
            }
        }
        page.finish()
    }
}

impl PodCounts {
    /// Counts one run of a probe.
    pub fn add(&self, probe: &(String, Kind), attempt: &Attempt) {
        let which = match attempt {
            Attempt::Success | Attempt::Warning(_) => 0,
            Attempt::Failure(_) => 1,
            Attempt::Error(_) => 2,
        };
        let mut counts = locked(&self.counts);
        match counts.get_mut(probe) {
            Some(counts) => counts[which] += 1,
            None => counts.entry(probe.clone()).or_default()[which] += 1,
        }
    }
}

/// Counting cannot leave anything half done.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::page::strict;

    #[test]
    fn runs_are_counted_by_result_until_the_probes_go() {
        let counts = Counts::default();
        let pod = |name: &str| {
            let mut pod = Pod::default();
            pod.metadata.name = Some(name.to_owned());
            pod.metadata.namespace = Some("ns".to_owned());
            pod.metadata.uid = Some(format!("uid-{name}"));
            pod
        };
        let (a, b) = (counts.of(&pod("a")), counts.of(&pod("b")));
        let (live, ready) = (("c".to_owned(), Kind::Liveness), ("c".to_owned(), Kind::Readiness));
        a.add(&live, &Attempt::Success);
        a.add(&live, &Attempt::Warning("w".to_owned()));
        a.add(&live, &Attempt::Failure("f".to_owned()));
        a.add(&ready, &Attempt::Error("e".to_owned()));
        b.add(&ready, &Attempt::Success);
        let samples = strict::parse(&counts.page()).unwrap();
        let count = |pod: &str, kind: &str, result: &str| {
            let labels =
                [("pod", pod), ("probe_type", kind), ("result", result), ("container", "c"), ("namespace", "ns")];
            samples.iter().find(|sample| sample.is("prober_probe_total", &labels)).map(|sample| sample.value)
        };
        assert_eq!(count("a", "Liveness", "successful"), Some(2.0));
        assert_eq!(count("a", "Liveness", "failed"), Some(1.0));
        assert_eq!(count("a", "Readiness", "unknown"), Some(1.0));
        assert_eq!(count("b", "Readiness", "successful"), Some(1.0));
        assert_eq!(samples.len(), 4);
        drop(a);
        assert_eq!(strict::parse(&counts.page()).unwrap().len(), 1);
        drop((b, counts.of(&pod("c"))));
        assert!(counts.page().is_empty());
        assert_eq!(locked(&counts.0).len(), 2);
    }
}
