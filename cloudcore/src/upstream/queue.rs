//! What one session's reports wait in, and what was taken of each pod, remembered for as long as the session lives, to notice when someone
//! else's write hides it: then the edge is asked to report once more. Pure state.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use skerry_proto::sync::ReportKind;
use skerry_proto::sync::inbox::{Inbox, Next};

use super::pod::StatusFacts;
use crate::closure::{PodFacts, version_less};

/// A report that someone overwrites is asked for again this often in a row, then once in [`REFILL`].
const ASK_BURST: u32 = 3;
const REFILL: Duration = Duration::from_secs(10);
/// A claim that fails is told of this often, and then once in so long.
const TOLD_AT_ONCE: u32 = 2;
const TOLD: Duration = Duration::from_secs(600);
/// Devices that are asked for one by one; instead of more, all are: each asking costs the edge a look at all it has.
const MOST_BY_NAME: usize = 64;
/// Instead of a UID: every device of the node.
const ALL: &str = "";

/// One session's queue.
#[derive(Default)]
pub(super) struct State {
    pub(super) inbox: Inbox,
    /// UID of the pod whose report is on its way to the apiserver.
    in_hand: Option<String>,
    /// By UID.
    pods: HashMap<String, Pod>,
    node: Allowance,
    pub(super) claiming: Claiming,
    /// What the edge is to report once more; each at most once, so no more than its pods, its devices and itself.
    wanted: VecDeque<(ReportKind, String)>,
}

/// What is remembered of a pod.
#[derive(Default)]
struct Pod {
    /// The last status that was taken, and the resource version it made.
    taken: Option<(StatusFacts, String)>,
    allowance: Allowance,
}

/// A claim of the session's node that fails.
#[derive(Debug, Default)]
pub(super) struct Claiming {
    /// How often it has.
    pub(super) attempt: u32,
    since: Duration,
    /// When it was told last.
    told: Duration,
    /// When it is tried again.
    due: Duration,
}

/// How often a report may be asked for again.
#[derive(Clone, Copy, Debug)]
struct Allowance {
    left: u32,
    refilled: Duration,
}

impl State {
    /// As [`Inbox::next`].
    pub(super) fn next(&mut self, now: Duration) -> Next {
        let next = self.inbox.next(now);
        if let Next::Now(waiting) = &next
            && waiting.report.kind == ReportKind::PodStatus
        {
            self.in_hand = Some(waiting.report.uid.clone());
        }
        next
    }

    /// What was handed out has been tried. Meanwhile nothing that the apiserver showed of its pod counted, for that may have come of the try:
    /// what is known of it now is to be looked at.
    pub(super) fn tried(&mut self) {
        self.in_hand = None;
    }

    /// The pod of this UID is gone.
    pub(super) fn forget(&mut self, uid: &str) {
        self.pods.remove(uid);
    }

    /// Whether this status is what this session wrote last of the pod.
    pub(super) fn wrote(&self, uid: &str, shown: &StatusFacts) -> bool {
        let taken = self.pods.get(uid).and_then(|pod| pod.taken.as_ref());
        taken.is_some_and(|(status, _)| status.fingerprint == shown.fingerprint)
    }

    /// The apiserver has what was reported of this pod, and shows it so.
    pub(super) fn accept(&mut self, uid: &str, status: StatusFacts, resource_version: &str) {
        let pod = self.pods.entry(uid.to_owned()).or_default();
        if pod.taken.as_ref().is_some_and(|(before, _)| *before != status) {
            pod.allowance = Allowance::default();
        }
        pod.taken = Some((status, resource_version.to_owned()));
    }

    /// The apiserver shows this of a pod: has it reported once more if that is not what its node says. Answers whether it is.
    pub(super) fn see(&mut self, facts: &PodFacts, now: Duration) -> bool {
        if self.in_hand.as_deref() == Some(facts.uid.as_str()) {
            return false;
        }
        let known = self.pods.get(&facts.uid).and_then(|pod| pod.taken.as_ref());
        let is_older = known.is_some_and(|(_, written)| version_less(&facts.resource_version, written));
        if is_older || !facts.status.hides(known.map(|(status, _)| status)) {
            return false;
        }
        if self.expects(ReportKind::PodStatus, &facts.uid)
            || !self.pods.entry(facts.uid.clone()).or_default().allowance.take(now)
        {
            return false;
        }
        self.wanted.push_back((ReportKind::PodStatus, facts.uid.clone()));
        true
    }

    /// The Node of this UID is not shown as what it reports: has it reported once more. Answers whether it is.
    pub(super) fn node_hidden(&mut self, uid: &str, now: Duration) -> bool {
        let again = !self.expects(ReportKind::NodeStatus, uid) && self.node.take(now);
        if again {
            self.wanted.push_back((ReportKind::NodeStatus, uid.to_owned()));
        }
        again
    }

    /// A device is shown as unknown: has it reported once more, or all of them where there are many. Answers whether it is.
    pub(super) fn device_hidden(&mut self, uid: &str) -> bool {
        let kind = ReportKind::DeviceStatus;
        if self.expects(kind, ALL) || self.expects(kind, uid) {
            return false;
        }
        let is_device = |(of, _): &(ReportKind, String)| *of == kind;
        if self.wanted.iter().filter(|wanted| is_device(wanted)).count() < MOST_BY_NAME {
            self.wanted.push_back((kind, uid.to_owned()));
        } else {
            self.wanted.retain(|wanted| !is_device(wanted));
            self.wanted.push_back((kind, ALL.to_owned()));
        }
        true
    }

    /// The next thing that the edge is to report once more.
    pub(super) fn wanted(&mut self) -> Option<(ReportKind, String)> {
        self.wanted.pop_front()
    }

    /// Whether a report of it waits, or is about to be asked for.
    fn expects(&self, kind: ReportKind, uid: &str) -> bool {
        self.inbox.holds(kind, uid) || self.wanted.iter().any(|(of, wanted)| *of == kind && wanted == uid)
    }
}

impl Claiming {
    /// It failed once more, and is tried again after so long. Answers for how long it has, when that is to be told.
    pub(super) fn failed(&mut self, now: Duration, wait: Duration) -> Option<Duration> {
        if self.attempt == 0 {
            self.since = now;
        }
        self.due = now + wait;
        self.attempt = self.attempt.saturating_add(1);
        let tells = self.attempt <= TOLD_AT_ONCE || now.saturating_sub(self.told) >= TOLD;
        if tells {
            self.told = now;
        }
        tells.then(|| now.saturating_sub(self.since))
    }

    /// Until it is tried again, if that is not now.
    pub(super) fn waits(&self, now: Duration) -> Option<Duration> {
        Some(self.due.saturating_sub(now)).filter(|wait| !wait.is_zero())
    }
}

impl Default for Allowance {
    fn default() -> Self {
        Self { left: ASK_BURST, refilled: Duration::ZERO }
    }
}

impl Allowance {
    fn take(&mut self, now: Duration) -> bool {
        while self.left < ASK_BURST && now >= self.refilled + REFILL {
            self.left += 1;
            self.refilled += REFILL;
        }
        if self.left == ASK_BURST {
            self.refilled = now;
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use skerry_proto::sync::Report;

    use super::*;

    fn report(id: u64, uid: &str) -> Report {
        let payload = json!({"status": {"phase": "Running"}}).to_string().into();
        Report { id, kind: ReportKind::PodStatus, namespace: "n".into(), name: uid.into(), uid: uid.into(), payload }
    }

    fn facts(phase: &str, ready: bool, version: &str) -> PodFacts {
        let status = if ready { "True" } else { "False" };
        PodFacts::of(&json!({
            "metadata": {"uid": "a", "resourceVersion": version},
            "status": {"phase": phase, "conditions": [{"type": "Ready", "status": status}]},
        }))
    }

    #[test]
    fn a_hidden_report_is_asked_for_again_but_not_for_ever() {
        let mut state = State::default();
        let wanted = Some((ReportKind::PodStatus, "a".to_owned()));
        let hidden = facts("Running", false, "12");
        state.accept("a", facts("Running", true, "10").status, "10");
        assert!(!state.see(&facts("Running", true, "11"), Duration::ZERO), "nothing is hidden");
        assert!(!state.see(&facts("Pending", false, "9"), Duration::ZERO), "older than our write");
        assert!(!state.see(&facts("Failed", false, "12"), Duration::ZERO), "an end stands");
        for _ in 0..ASK_BURST {
            assert!(state.see(&hidden, Duration::ZERO));
            assert!(!state.see(&hidden, Duration::ZERO), "it is asked for");
            assert_eq!(state.wanted(), wanted);
        }
        assert!(!state.see(&hidden, Duration::from_secs(9)));
        assert!(state.see(&hidden, Duration::from_secs(10)));
        assert_eq!(state.wanted(), wanted);
        assert!(!state.see(&hidden, Duration::from_secs(11)));
        state.inbox.push(report(2, "a"));
        assert!(!state.see(&hidden, Duration::from_secs(99)), "a newer report waits");
    }

    #[test]
    fn what_shows_while_a_report_is_written_is_looked_at_afterwards() {
        let mut state = State::default();
        let (before, own, foreign) =
            (facts("Running", false, "10"), facts("Running", true, "11"), facts("Running", false, "12"));
        state.accept("a", before.status, "10");
        state.inbox.push(report(1, "a"));
        assert!(matches!(state.next(Duration::ZERO), Next::Now(_)));
        // The watch may be faster than the answer to the write.
        assert!(!state.see(&own, Duration::ZERO) && !state.see(&foreign, Duration::ZERO));
        state.accept("a", own.status.clone(), "11");
        state.tried();
        assert!(!state.see(&own, Duration::ZERO), "it is its own");
        assert!(state.see(&foreign, Duration::ZERO));
    }

    #[test]
    fn a_pod_that_was_marked_unready_before_the_session_is_asked_for() {
        let mut state = State::default();
        let mut marked = facts("Running", false, "12");
        assert!(!state.see(&marked, Duration::ZERO), "its containers may be unready");
        marked.status.disowned = true;
        assert!(state.see(&marked, Duration::ZERO));
        assert_eq!(state.wanted(), Some((ReportKind::PodStatus, "a".to_owned())));
        assert_eq!(state.wanted(), None);
    }

    #[test]
    fn a_node_that_was_written_over_is_asked_for_within_its_allowance() {
        let mut state = State::default();
        for _ in 0..ASK_BURST {
            assert!(state.node_hidden("e", Duration::ZERO));
            assert!(!state.node_hidden("e", Duration::ZERO), "it is asked for");
            assert_eq!(state.wanted(), Some((ReportKind::NodeStatus, "e".to_owned())));
        }
        assert!(!state.node_hidden("e", Duration::from_secs(9)));
        assert!(state.node_hidden("e", Duration::from_secs(10)));
    }

    #[test]
    fn many_devices_are_asked_for_in_one() {
        let mut state = State::default();
        state.wanted.push_back((ReportKind::NodeStatus, "e".to_owned()));
        for number in 0..10_000 {
            state.device_hidden(&number.to_string());
            assert!(state.wanted.len() <= MOST_BY_NAME + 1);
        }
        assert_eq!(state.wanted(), Some((ReportKind::NodeStatus, "e".to_owned())));
        assert_eq!(state.wanted(), Some((ReportKind::DeviceStatus, ALL.to_owned())));
        assert_eq!(state.wanted(), None);
    }

    #[test]
    fn a_device_that_is_hidden_is_asked_for_once() {
        let mut state = State::default();
        assert!(state.device_hidden("d"));
        assert!(!state.device_hidden("d"), "it is about to be asked for");
        assert_eq!(state.wanted(), Some((ReportKind::DeviceStatus, "d".to_owned())));
        state.inbox.push(Report { kind: ReportKind::DeviceStatus, ..report(1, "d") });
        assert!(!state.device_hidden("d"), "it is about to be written");
    }

    #[test]
    fn a_claim_that_fails_is_told_of_for_as_long_as_it_does() {
        let mut claiming = Claiming::default();
        let seconds = Duration::from_secs;
        assert_eq!(claiming.waits(seconds(100)), None);
        let mut told = Vec::new();
        for now in (100..=1900).step_by(30) {
            told.extend(claiming.failed(seconds(now), seconds(30)));
            assert_eq!(claiming.waits(seconds(now + 10)), Some(seconds(20)));
            assert_eq!(claiming.waits(seconds(now + 30)), None);
        }
        assert_eq!(told, [0, 30, 630, 1230].map(seconds));
    }
}
