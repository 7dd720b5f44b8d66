//! Events: what the kubelet tells people, in the words of the upstream kubelet, sent through the outbox.
//!
//! The same event about the same object has the same name as long as it is counted, so that it can be sent twice and counts up instead
//! of piling up; an agent that was started anew begins another one, as the kubelet does. Chatty objects are held back (a burst of 25, then
//! one in 5 minutes, as upstream does), and pods' work never waits.

use std::collections::HashMap;

use bytes::Bytes;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use skerry_proto::sync::{Report, ReportKind};
use xxhash_rust::xxh3::xxh3_64;

use super::references::PodEvent;

/// Events whose counts are remembered; beyond it all counts start again.
const REMEMBERED: usize = 1000;
const BURST: f64 = 25.0;
const REFILL_SECONDS: f64 = 300.0;

/// Counts events and holds back floods of them. Takes the time as an argument and does no IO.
#[derive(Debug)]
pub struct Recorder {
    node: String,
    counts: HashMap<u64, (i32, Timestamp)>,
    buckets: HashMap<String, (f64, Timestamp)>,
}

impl Recorder {
    /// A recorder for the events of one node.
    pub fn new(node: &str) -> Self {
        Self { node: node.to_owned(), counts: HashMap::new(), buckets: HashMap::new() }
    }

    /// The report of an event, or `None` when its object had too many of late, or has no name: of a pod that nobody knows and whose sandbox
    /// is gone.
    pub fn record(&mut self, about: &ObjectReference, event: &PodEvent, now: Timestamp) -> Option<Report> {
        let about_name = about.name.as_deref()?;
        let uid = about.uid.clone().unwrap_or_default();
        if !self.allow(&uid, now) {
            return None;
        }
        let identity = [uid.as_str(), event.reason, &event.message, event.field_path.as_deref().unwrap_or_default()];
        let hash = xxh3_64(identity.join("\0").as_bytes());
        if self.counts.len() >= REMEMBERED {
            self.counts.clear();
        }
        let (count, first) = self.counts.entry(hash).or_insert((0, now));
        *count += 1;

        let hash = hash ^ xxh3_64(&first.as_nanosecond().to_le_bytes());
        let name = format!("{about_name}.{hash:016x}");
        let namespace = about.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let involved_object = ObjectReference { field_path: event.field_path.clone(), ..about.clone() };
        let object = Event {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            involved_object,
            reason: Some(event.reason.to_owned()),
            message: Some(event.message.clone()),
            type_: Some(if event.warning { "Warning" } else { "Normal" }.to_owned()),
            source: Some(EventSource { component: Some("kubelet".to_owned()), host: Some(self.node.clone()) }),
            reporting_component: Some("kubelet".to_owned()),
            reporting_instance: Some(self.node.clone()),
            count: Some(*count),
            first_timestamp: Some(Time(*first)),
            last_timestamp: Some(Time(now)),
            ..Event::default()
        };
        let payload: Bytes = serde_json::to_vec(&object).ok()?.into();
        Some(Report { id: 0, kind: ReportKind::Event, namespace, name, uid, payload })
    }

    /// Forgets a pod that is gone.
    pub fn forget(&mut self, uid: &str) {
        self.buckets.remove(uid);
    }

    fn allow(&mut self, uid: &str, now: Timestamp) -> bool {
        let (tokens, at) = self.buckets.entry(uid.to_owned()).or_insert((BURST, now));
        let passed = now.duration_since(*at).as_secs_f64().max(0.0);
        *tokens = (*tokens + passed / REFILL_SECONDS).min(BURST);
        *at = now;
        let allowed = *tokens >= 1.0;
        if allowed {
            *tokens -= 1.0;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(uid: &str) -> ObjectReference {
        ObjectReference {
            kind: Some("Pod".to_owned()),
            name: Some("web".to_owned()),
            namespace: Some("shop".to_owned()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        }
    }

    fn event(message: &str) -> PodEvent {
        PodEvent { warning: true, reason: "BackOff", message: message.to_owned(), field_path: None }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn parse(report: &Report) -> Event {
        serde_json::from_slice(&report.payload).unwrap()
    }

    #[test]
    fn the_same_event_counts_up_under_one_name() {
        let mut recorder = Recorder::new("box");
        let first = recorder.record(&about("u"), &event("again"), at(0)).unwrap();
        let second = recorder.record(&about("u"), &event("again"), at(9)).unwrap();
        let other = recorder.record(&about("u"), &event("else"), at(9)).unwrap();
        assert_eq!(first.name, second.name);
        assert_ne!(first.name, other.name);
        assert_eq!(parse(&second).count, Some(2));
        assert_eq!(parse(&second).first_timestamp, Some(Time(at(0))));
        let restarted = Recorder::new("box").record(&about("u"), &event("again"), at(20)).unwrap();
        assert_ne!(restarted.name, first.name, "its count does not take the place of a higher one");
        assert_eq!((other.namespace.as_str(), parse(&other).type_.as_deref()), ("shop", Some("Warning")));
    }

    #[test]
    fn a_chatty_pod_is_held_back_and_others_are_not() {
        let mut recorder = Recorder::new("box");
        let taken = (0..100).filter(|n| recorder.record(&about("u"), &event(&n.to_string()), at(0)).is_some()).count();
        assert_eq!(taken, 25);
        assert!(recorder.record(&about("v"), &event("fine"), at(0)).is_some());
        assert!(recorder.record(&about("u"), &event("later"), at(299)).is_none());
        assert!(recorder.record(&about("u"), &event("later"), at(600)).is_some());
    }
}
