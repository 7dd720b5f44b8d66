//! What one session's reports wait in: bounded, coalesced by what is reported, and each with a time of its own for its next try.
//!
//! Pure state. It also remembers the last status of each pod that was taken, for as long as the session lives, to apply it again when
//! someone else's write hides it.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use skerry_proto::sync::{Encoding, Report, ReportKind, decode, encode};

use super::pod::StatusFacts;
use crate::closure::{PodFacts, version_less};

/// Reports of different things that wait for one session; the edge's window is smaller.
pub(super) const WAITING: usize = 256;
/// A report that someone overwrites is applied again this often in a row, then once in [`REFILL`].
const REAPPLY_BURST: u32 = 3;
const REFILL: Duration = Duration::from_secs(10);

/// One session's queue.
#[derive(Default)]
pub(super) struct State {
    waiting: VecDeque<Waiting>,
    /// The last status of each pod that was taken, by UID.
    accepted: HashMap<String, Accepted>,
    /// The last status of the node that was taken, and how often it may be applied again.
    node: Option<(Report, Allowance)>,
}

/// Something to bring to the apiserver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Job {
    /// A report of the edge's.
    Report(Report),
    /// Someone else's write hides what was reported for the pod of this UID.
    Reapply(String),
    /// The Node's status was written over, as happens when its lease could not be renewed for a while.
    ReapplyNode,
}

/// A job, and when its next try is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    pub(super) job: Job,
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

struct Accepted {
    namespace: String,
    name: String,
    status: StatusFacts,
    resource_version: String,
    encoding: Encoding,
    payload: Bytes,
    allowance: Allowance,
}

/// How often a report may be applied again.
#[derive(Clone, Copy, Debug)]
struct Allowance {
    left: u32,
    refilled: Duration,
}

impl State {
    /// Hands out the first job that is due.
    pub(super) fn next(&mut self, now: Duration) -> Next {
        if let Some(waiting) =
            self.waiting.iter().position(|waiting| waiting.due <= now).and_then(|at| self.waiting.remove(at))
        {
            return Next::Now(waiting);
        }
        self.waiting
            .iter()
            .map(|waiting| waiting.due)
            .min()
            .map_or(Next::Never, |due| Next::In(due.saturating_sub(now)))
    }

    /// Queues a report. Answers one that ended by it.
    pub(super) fn push(&mut self, report: Report) -> Option<(ReportKind, u64, String)> {
        let job = Job::Report(report);
        let same = self.waiting.iter().position(|other| other.job.is_about_the_same_as(&job));
        let replaced = same.and_then(|at| self.waiting.remove(at));
        let Job::Report(report) = &job else { return None };
        if self.waiting.len() >= WAITING {
            return Some((report.kind, report.id, "too many reports in flight".into()));
        }
        self.waiting.push_back(Waiting { job, attempt: 0, due: Duration::ZERO });
        match replaced?.job {
            Job::Report(older) => Some((older.kind, older.id, String::new())),
            Job::Reapply(_) | Job::ReapplyNode => None,
        }
    }

    /// Queues a job again that was not taken. Answers whether it is queued: a newer one of the same thing makes it needless.
    pub(super) fn again(&mut self, tried: Waiting, due: Duration) -> bool {
        if self.waiting.iter().any(|other| other.job.is_about_the_same_as(&tried.job)) {
            return false;
        }
        self.waiting.push_back(Waiting { job: tried.job, attempt: tried.attempt.saturating_add(1), due });
        true
    }

    /// The report that was taken for the pod of this UID.
    pub(super) fn accepted(&self, uid: &str) -> Option<Report> {
        self.accepted.get(uid)?.report(uid.to_owned())
    }

    /// The last status of the node that was taken.
    pub(super) fn accepted_node(&self) -> Option<Report> {
        self.node.as_ref().map(|(report, _)| report.clone())
    }

    /// The apiserver has what the node says of itself.
    pub(super) fn accept_node(&mut self, report: &Report, now: Duration) {
        let allowance = self.node.take().map_or(Allowance { left: REAPPLY_BURST, refilled: now }, |(_, before)| before);
        self.node = Some((report.clone(), allowance));
    }

    /// Has the node's last status applied again. Answers whether it is.
    pub(super) fn reapply_node(&mut self, now: Duration) -> bool {
        let queued = self.waiting.iter().any(|other| other.job.is_about_the_same_as(&Job::ReapplyNode));
        let again = !queued && self.node.as_mut().is_some_and(|(_, allowance)| allowance.take(now));
        if again {
            self.waiting.push_back(Waiting { job: Job::ReapplyNode, attempt: 0, due: Duration::ZERO });
        }
        again
    }

    /// The pod of this UID is gone.
    pub(super) fn forget(&mut self, uid: &str) {
        self.accepted.remove(uid);
    }

    /// The apiserver has what this report says.
    pub(super) fn accept(&mut self, report: &Report, status: StatusFacts, resource_version: &str, now: Duration) {
        let (encoding, payload) = encode(&report.payload);
        let allowance = match self.accepted.get(&report.uid) {
            Some(before) if before.status == status => before.allowance,
            _ => Allowance { left: REAPPLY_BURST, refilled: now },
        };
        let accepted = Accepted {
            namespace: report.namespace.clone(),
            name: report.name.clone(),
            status,
            resource_version: resource_version.to_owned(),
            encoding,
            payload,
            allowance,
        };
        self.accepted.insert(report.uid.clone(), accepted);
    }

    /// Has the report that was taken for this pod applied again if it is hidden. Answers whether it is.
    pub(super) fn reapply(&mut self, facts: &PodFacts, now: Duration) -> bool {
        let job = Job::Reapply(facts.uid.clone());
        let queued = self.waiting.iter().any(|other| other.job.is_about_the_same_as(&job));
        let Some(accepted) = self.accepted.get_mut(&facts.uid) else { return false };
        let again = !queued
            && accepted.status.hidden_by(&facts.status)
            && !version_less(&facts.resource_version, &accepted.resource_version)
            && accepted.allowance.take(now);
        if again {
            self.waiting.push_back(Waiting { job, attempt: 0, due: Duration::ZERO });
        }
        again
    }
}

impl Job {
    /// Whether both are about the same thing, so that the newer one does.
    fn is_about_the_same_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Report(a), Self::Report(b)) => {
                (a.kind, &a.namespace, &a.name, &a.uid) == (b.kind, &b.namespace, &b.name, &b.uid)
            }
            (Self::Report(report), Self::Reapply(uid)) | (Self::Reapply(uid), Self::Report(report)) => {
                report.kind == ReportKind::PodStatus && report.uid == *uid
            }
            (Self::Report(report), Self::ReapplyNode) | (Self::ReapplyNode, Self::Report(report)) => {
                report.kind == ReportKind::NodeStatus
            }
            (Self::Reapply(a), Self::Reapply(b)) => a == b,
            (Self::ReapplyNode, Self::ReapplyNode) => true,
            (Self::Reapply(_), Self::ReapplyNode) | (Self::ReapplyNode, Self::Reapply(_)) => false,
        }
    }
}

impl Accepted {
    fn report(&self, uid: String) -> Option<Report> {
        let payload = decode(self.encoding, &self.payload).ok()?.into();
        let (namespace, name) = (self.namespace.clone(), self.name.clone());
        Some(Report { id: 0, kind: ReportKind::PodStatus, namespace, name, uid, payload })
    }
}

impl Allowance {
    fn take(&mut self, now: Duration) -> bool {
        while self.left < REAPPLY_BURST && now >= self.refilled + REFILL {
            self.left += 1;
            self.refilled += REFILL;
        }
        if self.left == REAPPLY_BURST {
            self.refilled = now;
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_node_that_was_written_over_is_applied_again_within_its_allowance() {
        let mut state = State::default();
        assert!(!state.reapply_node(Duration::ZERO), "nothing was reported in this session");
        let kind = ReportKind::NodeStatus;
        let report = Report {
            id: 1,
            kind,
            namespace: String::new(),
            name: "e".into(),
            uid: String::new(),
            payload: Bytes::new(),
        };
        state.accept_node(&report, Duration::ZERO);
        for _ in 0..REAPPLY_BURST {
            assert!(state.reapply_node(Duration::ZERO));
            assert!(!state.reapply_node(Duration::ZERO), "it waits");
            assert!(matches!(state.next(Duration::ZERO), Next::Now(Waiting { job: Job::ReapplyNode, .. })));
        }
        assert!(!state.reapply_node(Duration::from_secs(9)));
        assert!(state.reapply_node(Duration::from_secs(10)));
        assert_eq!(state.push(Report { id: 2, ..report }), None, "a newer one takes its place");
        assert!(matches!(state.next(Duration::from_secs(10)), Next::Now(Waiting { job: Job::Report(_), .. })));
        assert_eq!(state.next(Duration::from_secs(10)), Next::Never);
    }

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
        assert_eq!(state.push(report(3, "a")), Some((ReportKind::PodStatus, 1, String::new())));
        let order: Vec<u64> = state
            .waiting
            .iter()
            .map(|waiting| if let Job::Report(report) = &waiting.job { report.id } else { 0 })
            .collect();
        assert_eq!(order, [2, 3]);
    }

    #[test]
    fn what_the_apiserver_fails_over_holds_nothing_else_up() {
        let mut state = State::default();
        let (at, later) = (Duration::from_secs(100), Duration::from_secs(103));
        state.push(report(1, "a"));
        state.push(report(2, "b"));
        let Next::Now(first) = state.next(at) else { panic!("it is due") };
        assert_eq!((&first.job, first.attempt), (&Job::Report(report(1, "a")), 0));
        assert!(state.again(first, later));
        assert!(matches!(state.next(at), Next::Now(Waiting { job: Job::Report(other), .. }) if other.id == 2));
        assert_eq!(state.next(at), Next::In(Duration::from_secs(3)));
        let Next::Now(first) = state.next(later) else { panic!("its time has come") };
        assert_eq!(first.attempt, 1);
        assert_eq!(state.next(later), Next::Never);

        state.push(report(3, "a"));
        assert!(!state.again(first, later), "a newer one came while it was tried");
        assert!(matches!(state.next(at), Next::Now(Waiting { job: Job::Report(other), .. }) if other.id == 3));
        assert_eq!(state.next(at), Next::Never);
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut state = State::default();
        for id in 0..WAITING as u64 {
            assert_eq!(state.push(report(id, &id.to_string())), None);
        }
        let (_, id, refused) = state.push(report(999, "more")).unwrap();
        assert_eq!((id, refused.as_str()), (999, "too many reports in flight"));
    }

    #[test]
    fn a_hidden_report_is_applied_again_but_not_for_ever() {
        let mut state = State::default();
        let taken = facts("Running", true, "10").status;
        state.accept(&report(1, "a"), taken, "10", Duration::ZERO);
        assert!(!state.reapply(&facts("Running", true, "11"), Duration::ZERO), "nothing is hidden");
        assert!(!state.reapply(&facts("Pending", false, "9"), Duration::ZERO), "older than our write");
        assert!(!state.reapply(&facts("Failed", false, "12"), Duration::ZERO), "an end stands");
        for _ in 0..REAPPLY_BURST {
            assert!(state.reapply(&facts("Running", false, "12"), Duration::ZERO));
            assert!(!state.reapply(&facts("Running", false, "12"), Duration::ZERO), "it waits");
            assert!(matches!(state.next(Duration::ZERO), Next::Now(Waiting { job: Job::Reapply(_), .. })));
        }
        assert!(!state.reapply(&facts("Running", false, "12"), Duration::from_secs(9)));
        assert!(state.reapply(&facts("Running", false, "12"), Duration::from_secs(10)));
        assert!(matches!(state.next(Duration::from_secs(10)), Next::Now(_)));
        assert!(!state.reapply(&facts("Running", false, "12"), Duration::from_secs(11)));
        state.push(report(2, "a"));
        assert!(!state.reapply(&facts("Running", false, "12"), Duration::from_secs(99)), "a newer report waits");
    }
}
