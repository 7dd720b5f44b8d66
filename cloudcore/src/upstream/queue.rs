//! What one session's reports wait in: bounded, coalesced by what is reported, and each with a time of its own for its next try.
//!
//! Pure state. It also remembers what was taken of each pod, for as long as the session lives, to notice when someone else's write hides
//! it: then the edge is asked to report once more.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use skerry_proto::sync::{Report, ReportKind};

use super::pod::StatusFacts;
use crate::closure::{PodFacts, version_less};

/// Reports of different things that wait for one session; the edge's window is smaller.
const WAITING: usize = 256;
/// Bytes of reports that wait for one session, beyond what a first one has: an edge has a quarter of a megabyte on its way, and one more.
const WAITING_BYTES: usize = 4 << 20;
/// When an edge that sends more is to send it again.
const CROWDED: Duration = Duration::from_secs(10);
/// A report that someone overwrites is asked for again this often in a row, then once in [`REFILL`].
const ASK_BURST: u32 = 3;
const REFILL: Duration = Duration::from_secs(10);
/// Devices that are asked for one by one; instead of more, all are: each asking costs the edge a look at all it has.
const MOST_BY_NAME: usize = 64;
/// Instead of a UID: every device of the node.
const ALL: &str = "";
/// What a session's devices may have written: so often, and so many at once.
const DEVICE_PACE: Duration = Duration::from_millis(200);
const DEVICE_BURST: u32 = 5;

/// One session's queue.
#[derive(Default)]
pub(super) struct State {
    waiting: VecDeque<Waiting>,
    /// UID of the pod whose report is on its way to the apiserver.
    in_hand: Option<String>,
    /// By UID.
    pods: HashMap<String, Pod>,
    node: Allowance,
    /// When the next thing would be due that devices have written, if each came in its time.
    devices: Duration,
    /// What the edge is to report once more; each at most once, so no more than its pods, its devices and itself.
    wanted: VecDeque<(ReportKind, String)>,
    /// Reports that are answered, and how: no more than the edge may have on their way at once.
    ended: VecDeque<(u64, End)>,
    /// Somebody asks for what is next until there is nothing.
    is_driven: bool,
}

/// What the edge is told of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It is over; why it was refused, or nothing if it was taken.
    Done(String),
    /// It is the edge's again, for so long.
    Later(Duration),
}

/// A report to bring to the apiserver, and when its next try is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    pub(super) report: Report,
    /// How often it was tried.
    pub(super) attempt: u32,
    due: Duration,
}

/// What there is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// This.
    Now(Waiting),
    /// Something after this long.
    In(Duration),
    /// Nothing.
    Never,
}

/// What is remembered of a pod.
#[derive(Default)]
struct Pod {
    /// The last status that was taken, and the resource version it made.
    taken: Option<(StatusFacts, String)>,
    allowance: Allowance,
}

/// How often a report may be asked for again.
#[derive(Clone, Copy, Debug)]
struct Allowance {
    left: u32,
    refilled: Duration,
}

impl State {
    /// Whoever asks for what is next is about to. Answers whether somebody does already.
    pub(super) fn begin(&mut self) -> bool {
        std::mem::replace(&mut self.is_driven, true)
    }

    /// A report is answered.
    pub(super) fn end(&mut self, id: u64, how: End) {
        self.ended.push_back((id, how));
    }

    /// The next one that is.
    pub(super) fn ended(&mut self) -> Option<(u64, End)> {
        let first = self.ended.pop_front();
        if self.ended.is_empty() {
            // Sessions are many, and most report little: what is empty keeps no room.
            self.ended = VecDeque::new();
        }
        first
    }

    /// Hands out the first job that is due. With [`Next::Never`] whoever asks is done: [`State::begin`] says when it is to ask again.
    pub(super) fn next(&mut self, now: Duration) -> Next {
        // What devices report may wait for its pace; the others pass it by.
        let paced = self.devices.saturating_sub(DEVICE_PACE * (DEVICE_BURST - 1));
        let due = |waiting: &Waiting| match waiting.report.kind {
            ReportKind::DeviceStatus => waiting.due.max(paced),
            _ => waiting.due,
        };
        let at = self.waiting.iter().position(|waiting| due(waiting) <= now);
        if let Some(waiting) = at.and_then(|at| self.waiting.remove(at)) {
            match waiting.report.kind {
                ReportKind::DeviceStatus => self.device_written(now),
                ReportKind::PodStatus => self.in_hand = Some(waiting.report.uid.clone()),
                ReportKind::NodeStatus | ReportKind::Event | ReportKind::Unspecified => {}
            }
            return Next::Now(waiting);
        }
        if let Some(due) = self.waiting.iter().map(due).min() {
            return Next::In(due.saturating_sub(now));
        }
        self.waiting = VecDeque::new();
        self.is_driven = false;
        Next::Never
    }

    /// What was handed out has been tried. Meanwhile nothing that the apiserver showed of its pod counted, for that may have come of the try:
    /// what is known of it now is to be looked at.
    pub(super) fn tried(&mut self) {
        self.in_hand = None;
    }

    /// A device has something written.
    pub(super) fn device_written(&mut self, now: Duration) {
        self.devices = self.devices.max(now) + DEVICE_PACE;
    }

    /// Queues a report, which is tried at once; what was tried in vain of an older one counts for it. Answers one that ended by it.
    pub(super) fn push(&mut self, report: Report) -> Option<(ReportKind, u64, End)> {
        let same = self.waiting.iter().position(|other| is_about_the_same(&other.report, &report));
        let replaced = same.and_then(|at| self.waiting.remove(at));
        if self.waiting.len() >= WAITING {
            return Some((report.kind, report.id, End::Done("too many reports in flight".into())));
        }
        if !self.waiting.is_empty() && self.waiting_bytes() + report.payload.len() > WAITING_BYTES {
            return Some((report.kind, report.id, End::Later(CROWDED)));
        }
        let attempt = replaced.as_ref().map_or(0, |older| older.attempt);
        self.waiting.push_back(Waiting { report, attempt, due: Duration::ZERO });
        replaced.map(|older| (older.report.kind, older.report.id, End::Done(String::new())))
    }

    /// How much waits.
    pub(super) fn waiting_bytes(&self) -> usize {
        self.waiting.iter().map(|waiting| waiting.report.payload.len()).sum()
    }

    /// Queues a report again that was not taken. Answers whether it is queued: a newer one of the same thing makes it needless.
    pub(super) fn again(&mut self, tried: Waiting, due: Duration) -> bool {
        if self.waiting.iter().any(|other| is_about_the_same(&other.report, &tried.report)) {
            return false;
        }
        self.waiting.push_back(Waiting { report: tried.report, attempt: tried.attempt.saturating_add(1), due });
        true
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
        self.waiting.iter().any(|other| other.report.kind == kind && other.report.uid == uid)
            || self.wanted.iter().any(|(of, wanted)| *of == kind && wanted == uid)
    }
}

/// Whether both are about the same thing, so that the newer one does.
fn is_about_the_same(a: &Report, b: &Report) -> bool {
    (a.kind, &a.namespace, &a.name, &a.uid) == (b.kind, &b.namespace, &b.name, &b.uid)
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
    fn a_newer_report_replaces_the_one_that_waits() {
        let mut state = State::default();
        assert_eq!(state.push(report(1, "a")), None);
        assert_eq!(state.push(report(2, "b")), None);
        assert_eq!(state.push(report(3, "a")), Some((ReportKind::PodStatus, 1, End::Done(String::new()))));
        let order: Vec<u64> = state.waiting.iter().map(|waiting| waiting.report.id).collect();
        assert_eq!(order, [2, 3]);
    }

    #[test]
    fn what_the_apiserver_fails_over_holds_nothing_else_up() {
        let mut state = State::default();
        let (at, later) = (Duration::from_secs(100), Duration::from_secs(103));
        state.push(report(1, "a"));
        state.push(report(2, "b"));
        let Next::Now(first) = state.next(at) else { panic!("it is due") };
        assert_eq!((&first.report, first.attempt), (&report(1, "a"), 0));
        assert!(state.again(first, later));
        assert!(matches!(state.next(at), Next::Now(Waiting { report, .. }) if report.id == 2));
        assert_eq!(state.next(at), Next::In(Duration::from_secs(3)));
        let Next::Now(first) = state.next(later) else { panic!("its time has come") };
        assert_eq!(first.attempt, 1);
        assert_eq!(state.next(later), Next::Never);

        state.push(report(3, "a"));
        assert!(!state.again(first, later), "a newer one came while it was tried");
        assert!(matches!(state.next(at), Next::Now(Waiting { report, .. }) if report.id == 3));
        assert_eq!(state.next(at), Next::Never);
    }

    #[test]
    fn what_devices_report_is_paced_and_holds_nothing_else_up() {
        let mut state = State::default();
        let device = |id: u64| Report { kind: ReportKind::DeviceStatus, ..report(id, &format!("d{id}")) };
        let at = |millis: u64| Duration::from_secs(100) + Duration::from_millis(millis);
        (0..20).for_each(|id| drop(state.push(device(id))));
        let mut taken = |millis: u64| {
            let mut ids = Vec::new();
            while let Next::Now(waiting) = state.next(at(millis)) {
                ids.push(waiting.report.id);
            }
            (ids, state.next(at(millis)))
        };
        assert_eq!(taken(0), (vec![0, 1, 2, 3, 4], Next::In(Duration::from_millis(200))));
        assert_eq!(taken(199).0, [0; 0]);
        assert_eq!(taken(1000).0, [5, 6, 7, 8, 9], "five a second");
        state.push(report(99, "pod"));
        assert!(matches!(state.next(at(1000)), Next::Now(Waiting { report, .. }) if report.id == 99));
        state.push(Report { id: 100, ..device(10) });
        let order: Vec<u64> = state.waiting.iter().map(|waiting| waiting.report.id).collect();
        assert_eq!((order.len(), order.last()), (10, Some(&100)), "the newest state only");
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut state = State::default();
        for id in 0..WAITING as u64 {
            assert_eq!(state.push(report(id, &id.to_string())), None);
        }
        let (_, id, how) = state.push(report(999, "more")).unwrap();
        assert_eq!((id, how), (999, End::Done("too many reports in flight".to_owned())));
    }

    #[test]
    fn the_queue_is_bounded_in_bytes() {
        let large =
            |id: u64| Report { payload: vec![b'x'; WAITING_BYTES / 2 + 1].into(), ..report(id, &id.to_string()) };
        let mut state = State::default();
        assert_eq!(state.push(large(1)), None);
        assert_eq!(state.push(report(2, "small")), None);
        assert_eq!(state.push(large(3)), Some((ReportKind::PodStatus, 3, End::Later(CROWDED))), "it is not lost");
        assert!(matches!(state.next(Duration::ZERO), Next::Now(Waiting { report, .. }) if report.id == 1));
        assert_eq!(state.push(large(3)), None);
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
        state.push(report(2, "a"));
        assert!(!state.see(&hidden, Duration::from_secs(99)), "a newer report waits");
    }

    #[test]
    fn what_shows_while_a_report_is_written_is_looked_at_afterwards() {
        let mut state = State::default();
        let (before, own, foreign) =
            (facts("Running", false, "10"), facts("Running", true, "11"), facts("Running", false, "12"));
        state.accept("a", before.status, "10");
        state.push(report(1, "a"));
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
    fn somebody_asks_for_as_long_as_anything_waits() {
        let mut state = State::default();
        let (at, later) = (Duration::from_secs(100), Duration::from_secs(103));
        state.push(report(1, "a"));
        assert!(!state.begin(), "nobody does yet");
        let Next::Now(first) = state.next(at) else { panic!("it is due") };
        assert!(state.begin(), "it is being carried out");
        assert!(state.again(first, later));
        assert_eq!(state.next(at), Next::In(Duration::from_secs(3)));
        assert!(state.begin(), "it is to be tried again");
        assert!(matches!(state.next(later), Next::Now(_)));
        assert_eq!(state.next(later), Next::Never);
        assert!(!state.begin(), "what comes now needs somebody anew");
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
        state.push(Report { kind: ReportKind::DeviceStatus, ..report(1, "d") });
        assert!(!state.device_hidden("d"), "it is about to be written");
    }
}
