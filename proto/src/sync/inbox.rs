//! Reports of one session on their way from its hub to the apiserver: bounded, coalesced by what is reported, and each with a time of its own
//! for its next try.
//!
//! Pure state, as the edge's outbox is. Whoever drives it asks for what is next, tries that, and says how it ended; one at a time, so that a
//! session has one request under way. A report ends when the apiserver took it, has refused it for good, or when a newer one of the same
//! thing makes it needless, which the edge still holds then. Anything else is tried again, or given back to the edge for a while, so that it
//! holds nothing else up.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Report, ReportKind};

/// Reports of different things that wait for one session; the edge's window is smaller.
const WAITING: usize = 256;
/// Bytes of reports that wait for one session, beyond what a first one has: an edge has a quarter of a megabyte on its way, and one more.
/// Few in tests, so that they are met often.
pub(super) const WAITING_BYTES: usize = if cfg!(test) { 2 << 10 } else { 4 << 20 };
/// When an edge that sends more is to send it again.
const CROWDED: Duration = Duration::from_secs(10);
/// What a session's devices may have written: so often, and so many at once.
const DEVICE_PACE: Duration = Duration::from_millis(200);
const DEVICE_BURST: u32 = 5;
/// A report that meets only doubtful answers is tried this often, which takes a minute or so, so that it does not hold its place in the edge's
/// window for ever. Less often in tests.
pub(super) const DOUBTFUL_ATTEMPTS: u32 = if cfg!(test) { 3 } else { 10 };
/// So long at least the edge then keeps a pod's status, which nobody says again: rights come back.
const DOUBTED: Duration = Duration::from_secs(300);
/// A report that is not taken, though others are, is tried this often, which takes a quarter of a minute, before the edge has it back: most
/// failures are over by then. Less often in tests.
const ATTEMPTS: u32 = if cfg!(test) { 2 } else { 7 };
/// So long at least: what is never taken has no place most of the time, and what fails for a minute is not late by many.
const GIVEN_BACK: Duration = Duration::from_secs(30);

/// One session's reports.
#[derive(Debug, Default)]
pub struct Inbox {
    waiting: VecDeque<Waiting>,
    /// When the next thing would be due that devices have written, if each came in its time.
    devices: Duration,
    /// Reports that are answered, and how: no more than the edge may have on their way at once.
    ended: VecDeque<(u64, End)>,
    /// Somebody asks for what is next until there is nothing.
    is_driven: bool,
}

/// What the edge is told of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It is over; why it was refused, or nothing if it was taken.
    Done(String),
    /// It is the edge's again, for so long.
    Later(Duration),
}

/// A report to bring to the apiserver, and when its next try is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The report.
    pub report: Report,
    /// How often it was tried.
    pub attempt: u32,
    due: Duration,
}

/// What there is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// This.
    Now(Waiting),
    /// Something after this long.
    In(Duration),
    /// Nothing.
    Never,
}

impl Inbox {
    /// Whoever asks for what is next is about to. Answers whether somebody does already.
    pub fn begin(&mut self) -> bool {
        std::mem::replace(&mut self.is_driven, true)
    }

    /// A report is answered.
    pub fn end(&mut self, id: u64, how: End) {
        self.ended.push_back((id, how));
    }

    /// The next one that is.
    pub fn ended(&mut self) -> Option<(u64, End)> {
        let first = self.ended.pop_front();
        if self.ended.is_empty() {
            // Sessions are many, and most report little: what is empty keeps no room.
            self.ended = VecDeque::new();
        }
        first
    }

    /// Hands out the first report that is due. With [`Next::Never`] whoever asks is done: [`Inbox::begin`] says when it is to ask again.
    pub fn next(&mut self, now: Duration) -> Next {
        // What devices report may wait for its pace; the others pass it by.
        let paced = self.devices.saturating_sub(DEVICE_PACE * (DEVICE_BURST - 1));
        let due = |waiting: &Waiting| match waiting.report.kind {
            ReportKind::DeviceStatus => waiting.due.max(paced),
            _ => waiting.due,
        };
        let at = self.waiting.iter().position(|waiting| due(waiting) <= now);
        if let Some(waiting) = at.and_then(|at| self.waiting.remove(at)) {
            if waiting.report.kind == ReportKind::DeviceStatus {
                self.device_written(now);
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

    /// A device has something written.
    pub fn device_written(&mut self, now: Duration) {
        self.devices = self.devices.max(now) + DEVICE_PACE;
    }

    /// Queues a report, which is tried at once; what was tried in vain of an older one counts for it. Answers one that ended by it, for
    /// [`Inbox::end`]: this one, if there is no room for it, and then what it would replace stays; or the older of two about the same. An
    /// event that was given back may come behind a newer one.
    pub fn push(&mut self, report: Report) -> Option<(ReportKind, u64, End)> {
        let same = self.same(&report);
        let (others, mut bytes) = (self.waiting.len() - usize::from(same.is_some()), self.waiting_bytes());
        if let Some(same) = same.map(|at| &self.waiting[at].report) {
            if same.id > report.id {
                return Some((report.kind, report.id, End::Done(String::new())));
            }
            bytes -= same.payload.len();
        }
        if others >= WAITING {
            return Some((report.kind, report.id, End::Done("too many reports in flight".into())));
        }
        if others > 0 && bytes + report.payload.len() > WAITING_BYTES {
            return Some((report.kind, report.id, End::Later(CROWDED)));
        }
        let replaced = same.and_then(|at| self.waiting.remove(at));
        let attempt = replaced.as_ref().map_or(0, |older| older.attempt);
        self.waiting.push_back(Waiting { report, attempt, due: Duration::ZERO });
        replaced.map(|older| (older.report.kind, older.report.id, End::Done(String::new())))
    }

    /// How much waits.
    pub fn waiting_bytes(&self) -> usize {
        self.waiting.iter().map(|waiting| waiting.report.payload.len()).sum()
    }

    /// Whether a report of it waits.
    pub fn holds(&self, kind: ReportKind, uid: &str) -> bool {
        self.waiting.iter().any(|other| other.report.kind == kind && other.report.uid == uid)
    }

    /// Queues a report again that was not taken. If another one of the same thing waits, the newer makes the older needless: answers the
    /// older one's id, for [`Inbox::end`].
    pub fn again(&mut self, tried: Waiting, due: Duration) -> Option<u64> {
        let same = self.same(&tried.report);
        if same.is_some_and(|at| self.waiting[at].report.id > tried.report.id) {
            return Some(tried.report.id);
        }
        let older = same.and_then(|at| self.waiting.remove(at));
        self.waiting.push_back(Waiting { report: tried.report, attempt: tried.attempt.saturating_add(1), due });
        older.map(|older| older.report.id)
    }

    /// Where another one of the same thing waits.
    fn same(&self, report: &Report) -> Option<usize> {
        self.waiting.iter().position(|other| is_about_the_same(&other.report, report))
    }
}

impl Waiting {
    /// The apiserver has refused it once more, for a reason that may pass. Answers how it ends by that; otherwise it is to be tried
    /// [again](Inbox::again). A time is the least that it is given back for.
    pub fn doubted(&self, reason: &str) -> Option<End> {
        if self.attempt + 1 < DOUBTFUL_ATTEMPTS {
            return None;
        }
        Some(match self.report.kind {
            ReportKind::PodStatus => End::Later(DOUBTED),
            _ => End::Done(reason.to_owned()),
        })
    }

    /// The apiserver could not take it once more, perhaps not before so long. Answers as [`Waiting::doubted`] does; where the apiserver takes
    /// nothing at all, everything waits here.
    pub fn put_off(&self, after: Option<Duration>, takes_others: bool) -> Option<End> {
        (self.attempt + 1 >= ATTEMPTS && takes_others).then(|| End::Later(GIVEN_BACK.max(after.unwrap_or_default())))
    }
}

/// Whether both are about the same thing, so that the newer one does.
pub(super) fn is_about_the_same(a: &Report, b: &Report) -> bool {
    (a.kind, &a.namespace, &a.name, &a.uid) == (b.kind, &b.namespace, &b.name, &b.uid)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn report(id: u64, uid: &str) -> Report {
        let payload = Bytes::from_static(br#"{"status": {"phase": "Running"}}"#);
        Report { id, kind: ReportKind::PodStatus, namespace: "n".into(), name: uid.into(), uid: uid.into(), payload }
    }

    #[test]
    fn a_newer_report_replaces_the_one_that_waits() {
        let mut inbox = Inbox::default();
        assert_eq!(inbox.push(report(1, "a")), None);
        assert_eq!(inbox.push(report(2, "b")), None);
        assert_eq!(inbox.push(report(3, "a")), Some((ReportKind::PodStatus, 1, End::Done(String::new()))));
        let order: Vec<u64> = inbox.waiting.iter().map(|waiting| waiting.report.id).collect();
        assert_eq!(order, [2, 3]);
    }

    #[test]
    fn what_the_apiserver_fails_over_holds_nothing_else_up() {
        let mut inbox = Inbox::default();
        let (at, later) = (Duration::from_secs(100), Duration::from_secs(103));
        inbox.push(report(1, "a"));
        inbox.push(report(2, "b"));
        let Next::Now(first) = inbox.next(at) else { panic!("it is due") };
        assert_eq!((&first.report, first.attempt), (&report(1, "a"), 0));
        assert_eq!(inbox.again(first, later), None);
        assert!(matches!(inbox.next(at), Next::Now(Waiting { report, .. }) if report.id == 2));
        assert_eq!(inbox.next(at), Next::In(Duration::from_secs(3)));
        let Next::Now(first) = inbox.next(later) else { panic!("its time has come") };
        assert_eq!(first.attempt, 1);
        assert_eq!(inbox.next(later), Next::Never);

        inbox.push(report(3, "a"));
        assert_eq!(inbox.again(first, later), Some(1), "a newer one came while it was tried");
        assert!(matches!(inbox.next(at), Next::Now(Waiting { report, .. }) if report.id == 3));
        assert_eq!(inbox.next(at), Next::Never);
    }

    #[test]
    fn what_devices_report_is_paced_and_holds_nothing_else_up() {
        let mut inbox = Inbox::default();
        let device = |id: u64| Report { kind: ReportKind::DeviceStatus, ..report(id, &format!("d{id}")) };
        let at = |millis: u64| Duration::from_secs(100) + Duration::from_millis(millis);
        (0..20).for_each(|id| drop(inbox.push(device(id))));
        let mut taken = |millis: u64| {
            let mut ids = Vec::new();
            while let Next::Now(waiting) = inbox.next(at(millis)) {
                ids.push(waiting.report.id);
            }
            (ids, inbox.next(at(millis)))
        };
        assert_eq!(taken(0), (vec![0, 1, 2, 3, 4], Next::In(Duration::from_millis(200))));
        assert_eq!(taken(199).0, [0; 0]);
        assert_eq!(taken(1000).0, [5, 6, 7, 8, 9], "five a second");
        inbox.push(report(99, "pod"));
        assert!(matches!(inbox.next(at(1000)), Next::Now(Waiting { report, .. }) if report.id == 99));
        inbox.push(Report { id: 100, ..device(10) });
        let order: Vec<u64> = inbox.waiting.iter().map(|waiting| waiting.report.id).collect();
        assert_eq!((order.len(), order.last()), (10, Some(&100)), "the newest state only");
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut inbox = Inbox::default();
        let empty = |id: u64| Report { payload: Bytes::new(), ..report(id, &id.to_string()) };
        for id in 0..WAITING as u64 {
            assert_eq!(inbox.push(empty(id)), None);
        }
        let (_, id, how) = inbox.push(empty(999)).unwrap();
        assert_eq!((id, how), (999, End::Done("too many reports in flight".to_owned())));
    }

    #[test]
    fn the_queue_is_bounded_in_bytes() {
        let large =
            |id: u64| Report { payload: vec![b'x'; WAITING_BYTES / 2 + 1].into(), ..report(id, &id.to_string()) };
        let mut inbox = Inbox::default();
        assert_eq!(inbox.push(large(1)), None);
        assert_eq!(inbox.push(report(2, "small")), None);
        assert_eq!(inbox.push(large(3)), Some((ReportKind::PodStatus, 3, End::Later(CROWDED))), "it is not lost");
        assert!(matches!(inbox.next(Duration::ZERO), Next::Now(Waiting { report, .. }) if report.id == 1));
        assert_eq!(inbox.push(large(3)), None);
    }

    #[test]
    fn what_has_no_room_leaves_what_it_would_replace() {
        let mut inbox = Inbox::default();
        inbox.push(report(1, "a"));
        inbox.push(report(2, "b"));
        let large = Report { payload: vec![b'x'; WAITING_BYTES].into(), ..report(3, "a") };
        assert_eq!(inbox.push(large), Some((ReportKind::PodStatus, 3, End::Later(CROWDED))));
        assert!(matches!(inbox.next(Duration::ZERO), Next::Now(Waiting { report, .. }) if report.id == 1));
    }

    #[test]
    fn what_comes_behind_a_newer_one_does_not_take_its_place() {
        let event = |id: u64| Report { kind: ReportKind::Event, ..report(id, "e") };
        let mut inbox = Inbox::default();
        inbox.push(event(3));
        assert_eq!(inbox.push(event(1)), Some((ReportKind::Event, 1, End::Done(String::new()))));
        let Next::Now(newer) = inbox.next(Duration::ZERO) else { panic!("it is due") };
        assert_eq!(newer.report.id, 3);
        assert_eq!(inbox.push(event(1)), None);
        assert_eq!(inbox.again(newer, Duration::ZERO), Some(1));
        assert!(matches!(inbox.next(Duration::ZERO), Next::Now(Waiting { report, .. }) if report.id == 3));
        assert_eq!(inbox.next(Duration::ZERO), Next::Never);
    }

    #[test]
    fn somebody_asks_for_as_long_as_anything_waits() {
        let mut inbox = Inbox::default();
        let (at, later) = (Duration::from_secs(100), Duration::from_secs(103));
        inbox.push(report(1, "a"));
        assert!(!inbox.begin(), "nobody does yet");
        let Next::Now(first) = inbox.next(at) else { panic!("it is due") };
        assert!(inbox.begin(), "it is being carried out");
        assert_eq!(inbox.again(first, later), None);
        assert_eq!(inbox.next(at), Next::In(Duration::from_secs(3)));
        assert!(inbox.begin(), "it is to be tried again");
        assert!(matches!(inbox.next(later), Next::Now(_)));
        assert_eq!(inbox.next(later), Next::Never);
        assert!(!inbox.begin(), "what comes now needs somebody anew");
    }

    #[test]
    fn what_is_never_taken_is_given_back_and_what_may_pass_is_refused_in_the_end() {
        let tried = |kind: ReportKind, attempt: u32| {
            let report = Report { kind, ..report(1, "a") };
            Waiting { report, attempt, due: Duration::ZERO }
        };
        let (pod, node) = (ReportKind::PodStatus, ReportKind::NodeStatus);
        assert_eq!(tried(pod, ATTEMPTS - 2).put_off(None, true), None);
        assert_eq!(tried(pod, ATTEMPTS - 1).put_off(None, true), Some(End::Later(GIVEN_BACK)));
        let told = Some(2 * GIVEN_BACK);
        assert_eq!(tried(pod, ATTEMPTS - 1).put_off(told, true), Some(End::Later(2 * GIVEN_BACK)));
        assert_eq!(tried(pod, 99).put_off(told, false), None, "nothing else is taken either");
        assert_eq!(tried(node, DOUBTFUL_ATTEMPTS - 2).doubted("no"), None);
        assert_eq!(tried(node, DOUBTFUL_ATTEMPTS - 1).doubted("no"), Some(End::Done("no".to_owned())));
        assert_eq!(tried(pod, DOUBTFUL_ATTEMPTS - 1).doubted("no"), Some(End::Later(DOUBTED)), "nobody says it again");
    }
}
