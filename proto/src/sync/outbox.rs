//! Reports on their way up: sent in order, kept until the cloud says what became of them, and sent again on the next session otherwise. One
//! that the cloud gives back holds up no other until its time comes, which is later each time. An event that is not taken for a day ends, and
//! so does the oldest of too many; a status is kept for as long as there is what it is about, since nobody may say it again. Half of what may
//! be on its way is for statuses alone.

use std::collections::VecDeque;
use std::time::Duration;

use super::inbox::is_about_the_same;
use super::{REPORT_WINDOW, Report, is_coalesced};

/// A report that is given back again and again waits twice as long each time, and so long at most; or as long as the cloud says.
const MOST_LATER: Duration = Duration::from_secs(1800);
/// An event that is still given back so long after the first time has come to its end.
const MOST_KEPT: Duration = Duration::from_secs(24 * 60 * 60);
/// Events that are given back at once; stores keep no more. Fewer in tests, so that they are met.
const MOST_EVENTS: usize = if cfg!(test) { 4 } else { 500 };
/// Events on their way at once: of those that are not taken each is for a while.
const EVENT_WINDOW: usize = REPORT_WINDOW / 2;

#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// Waiting to be sent.
    pub(super) queued: VecDeque<Kept>,
    /// Sent in this session.
    pub(super) sent: VecDeque<Kept>,
    /// Given back by the cloud, and when they are to be sent again. Of the same thing there is none in `queued`, too.
    later: Vec<Later>,
}

#[derive(Debug)]
pub(super) struct Kept {
    pub(super) report: Report,
    /// How often in this session.
    given_back: u32,
    /// When it was for the first time, in whatever session.
    since: Option<Duration>,
}

#[derive(Debug)]
struct Later {
    due: Duration,
    /// For how long the cloud gave it back.
    told: Duration,
    kept: Kept,
}

impl Outbox {
    /// Takes a report. The newest about the same thing replaces an older one that has not been sent, or was given back: its time stays
    /// that one's, but for what that waited longer because it had been given back before.
    pub(super) fn push(&mut self, now: Duration, report: Report) {
        let kept = Kept { report, given_back: 0, since: None };
        match self.later.iter_mut().find(|old| kept.replaces(&old.kept)) {
            Some(old) => {
                old.due = old.due.min(now + old.told);
                old.kept = kept;
            }
            None => {
                self.queued.retain(|old| !kept.replaces(old));
                self.queued.push_back(kept);
            }
        }
    }

    /// A session begins. What was sent on the last one and not answered goes again, before what is newer, except what was replaced meanwhile.
    /// Another cloud may take what the last one gave back, but need not do so first.
    pub(super) fn begin_again(&mut self) {
        self.queued.extend(self.later.drain(..).map(|later| later.kept));
        for unanswered in self.sent.drain(..).rev() {
            if !self.queued.iter().any(|new| new.replaces(&unanswered)) {
                self.queued.push_front(unanswered);
            }
        }
        for kept in &mut self.queued {
            kept.given_back = 0;
        }
    }

    /// The cloud has said what became of a report.
    pub(super) fn answered(&mut self, id: u64) -> Result<(), String> {
        self.take_sent(id).map(drop)
    }

    /// The cloud cannot take a report for so long. Of two about the same thing the newer goes again, if it is not on its way, or given back,
    /// already. Answers one that has come to its end by that.
    pub(super) fn give_back(&mut self, now: Duration, id: u64, told: Duration) -> Result<Option<u64>, String> {
        let (at, mut kept) = self.take_sent(id)?;
        let since = *kept.since.get_or_insert(now);
        if kept.is_event() && now.saturating_sub(since) >= MOST_KEPT {
            return Ok(Some(id));
        }
        let mut newer = self.sent.iter().skip(at).chain(self.later.iter().map(|later| &later.kept));
        if !newer.any(|new| new.replaces(&kept)) {
            if let Some(at) = self.queued.iter().position(|new| new.replaces(&kept))
                && let Some(newest) = self.queued.remove(at)
            {
                kept.report = newest.report;
            }
            let after = told.saturating_mul(2_u32.saturating_pow(kept.given_back)).min(MOST_LATER).max(told);
            kept.given_back += 1;
            self.later.push(Later { due: now + after, told, kept });
        }
        let events = || self.later.iter().enumerate().filter(|(_, later)| later.kept.is_event());
        if events().count() <= MOST_EVENTS {
            return Ok(None);
        }
        let oldest = events().min_by_key(|(_, later)| later.kept.since).map(|(at, _)| at);
        Ok(oldest.map(|at| self.later.remove(at).kept.report.id))
    }

    /// Bytes of what waits to be sent or for an answer, of events or of all others: what was given back is not on anybody's way.
    pub(super) fn bytes(&self, events: bool) -> usize {
        let all = self.queued.iter().chain(&self.sent).filter(|kept| kept.is_event() == events);
        all.map(|kept| kept.report.payload.len()).sum()
    }

    /// The next report to send now, if there is one and no more are on their way than may be.
    pub(super) fn send_next(&mut self, now: Duration) -> Option<&Report> {
        while let Some(at) = self.later.iter().position(|later| later.due <= now) {
            self.queued.push_back(self.later.remove(at).kept);
        }
        if self.sent.len() == REPORT_WINDOW {
            return None;
        }
        let events_wait = self.sent.iter().filter(|kept| kept.is_event()).count() == EVENT_WINDOW;
        let next = self.queued.iter().position(|kept| !events_wait || !kept.is_event())?;
        self.sent.push_back(self.queued.remove(next)?);
        self.sent.back().map(|kept| &kept.report)
    }

    /// When the first of those that were given back is due.
    pub(super) fn due(&self) -> Option<Duration> {
        self.later.iter().map(|later| later.due).min()
    }

    /// One that was sent, and its place among them.
    fn take_sent(&mut self, id: u64) -> Result<(usize, Kept), String> {
        let at = self.sent.iter().position(|kept| kept.report.id == id);
        at.and_then(|at| Some((at, self.sent.remove(at)?)))
            .ok_or_else(|| format!("an answer to report {id}, which was not sent"))
    }
}

impl Kept {
    /// Whether of both only this, the newer one, counts: both are about the same. An event counts what the older one of its name did.
    fn replaces(&self, old: &Self) -> bool {
        is_about_the_same(&self.report, &old.report)
    }

    fn is_event(&self) -> bool {
        !is_coalesced(self.report.kind)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::ReportKind;
    use super::*;

    #[test]
    fn an_event_that_is_not_taken_for_a_day_ends_and_a_status_does_not() {
        let mut outbox = Outbox::default();
        for (id, kind) in [(1, ReportKind::PodStatus), (2, ReportKind::Event)] {
            let (namespace, name, uid, payload) = ("ns".into(), "a".into(), "u".into(), Bytes::from_static(b"{}"));
            outbox.push(Duration::ZERO, Report { id, kind, namespace, name, uid, payload });
        }
        let (mut now, mut ended) = (Duration::ZERO, Vec::new());
        for round in 0..100 {
            let mut sent = Vec::new();
            while let Some(report) = outbox.send_next(now) {
                sent.push(report.id);
            }
            for id in sent {
                ended.extend(outbox.give_back(now, id, Duration::from_secs(30)).unwrap().map(|id| (id, now)));
            }
            now += MOST_LATER;
            if round % 10 == 0 {
                // A new session changes nothing about that.
                outbox.begin_again();
            }
        }
        assert_eq!(ended, [(2, MOST_KEPT)]);
        outbox.begin_again();
        assert_eq!(outbox.send_next(now).map(|report| report.id), Some(1));
    }

    fn event(id: u64, name: &str) -> Report {
        let (namespace, uid, payload) = ("ns".into(), "u".into(), Bytes::from_static(b"{}"));
        Report { id, kind: ReportKind::Event, namespace, name: name.into(), uid, payload }
    }

    #[test]
    fn events_that_are_not_taken_leave_room_for_statuses_and_are_bounded() {
        let (mut outbox, mut now) = (Outbox::default(), Duration::ZERO);
        let window = u64::try_from(EVENT_WINDOW).unwrap();
        for id in 1..=2 * window {
            outbox.push(now, event(id, &format!("e{id}")));
        }
        let status = Report { kind: ReportKind::PodStatus, ..event(100, "p") };
        outbox.push(now, status);
        let mut sent = Vec::new();
        while let Some(report) = outbox.send_next(now) {
            sent.push(report.id);
        }
        assert_eq!(sent, Vec::from_iter((1..=window).chain([100])));
        assert_eq!((outbox.bytes(true), outbox.bytes(false)), (4 * EVENT_WINDOW, 2));
        let mut ended = Vec::new();
        for id in 1..=window {
            now += Duration::from_secs(1);
            ended.extend(outbox.give_back(now, id, Duration::from_secs(900)).unwrap());
        }
        assert_eq!(ended, Vec::from_iter(1..=window - u64::try_from(MOST_EVENTS).unwrap()), "the oldest go");
        assert_eq!(outbox.bytes(true), 2 * EVENT_WINDOW, "what was given back does not count");
        // One that happens again counts the older one, too.
        outbox.push(now, event(200, &format!("e{window}")));
        assert_eq!(outbox.later.len(), MOST_EVENTS);
    }
}
