//! Reports, from what the kubelet sees to what the apiserver shows, and the account that is kept of them.

use std::collections::{BTreeMap, BTreeSet};

use super::cloud::{Replica, Status};
use super::mutations::Mutation;
use super::node::{Said, Subject};
use super::*;

/// What became of reports. Rows of outboxes are told apart by their serials.
#[derive(Default)]
pub(super) struct Ledger {
    /// The apiserver took them.
    pub(super) taken: BTreeSet<u64>,
    /// Those changed what it shows.
    effects: BTreeSet<u64>,
    /// It refused them for good.
    pub(super) refused: BTreeSet<u64>,
    /// The newest of each thing.
    last: BTreeMap<Subject, u64>,
    /// Events that reached a hub.
    pub(super) arrived: BTreeSet<u64>,
    /// How often each event happened, of those whose reports cannot have been lost with a disk.
    events: BTreeMap<String, u64>,
    /// A disk was put back or replaced when so many rows had been made: those may come again.
    restored: u64,
    /// What was written by a session of a node that a newer one had taken over, and by none since.
    late: BTreeSet<Subject>,
}

impl World {
    /// The kubelet sees something.
    pub(super) fn observe(&mut self) {
        let Some(report) = self.node.observe(&mut self.dice) else { return };
        if report.kind == ReportKind::Event {
            self.ledger.events.insert(report.name.clone(), Said::of(&report).number);
        }
        self.report(report);
    }

    /// The kubelet reports what it has to since it started, or was asked to.
    pub(super) fn report_again(&mut self) {
        if let Some(subject) = self.node.unsaid.first().cloned() {
            let report = self.node.report(&mut self.dice, subject);
            self.report(report);
        }
    }

    fn report(&mut self, report: Report) {
        self.ledger.last.insert(subject_of(&report), Said::of(&report).serial);
        let is_older = |old: &Report| is_coalesced(report.kind) && subject_of(old) == subject_of(&report);
        if self.is(Mutation::OlderKept) && self.node.edge.outbox().queued.iter().any(|old| is_older(&old.report)) {
            return;
        }
        let out = self.node.edge.step(self.now, EdgeInput::Report(report));
        self.edge_outputs(out);
    }

    /// The watch of pods shows something else than what a session's edge has reported: it is asked to report that once more. Answers
    /// whether there was any.
    pub(super) fn see(&mut self, at: usize) -> bool {
        let Some(session) = &mut self.replicas[at].session else { return false };
        let waits = |subject: &Subject| session.reports.iter().any(|other| subject_of(&other.report) == *subject);
        let shows = |subject: &Subject| self.apiserver.statuses.get(subject).map(|shown| shown.said.value);
        let mut hidden = session.taken.iter().filter(|(subject, taken)| shows(subject) != Some(**taken));
        let hidden = hidden.find(|(subject, _)| !session.asked.contains(*subject) && !waits(subject));
        let Some(subject) = hidden.map(|(subject, _)| subject.clone()) else { return false };
        session.asked.insert(subject.clone());
        let out = session.hub.ask_report(subject.0, subject.1);
        self.hub_outputs(at, out);
        true
    }

    /// A session takes a report to the apiserver, in three steps between which anything may happen: it reads the status, looks whether
    /// the Node names no newer session, and writes if the status is still what was read. So the session of an older epoch never
    /// overwrites what a newer one wrote. But for pods it remembers what it has read or written last, and looks only if that was not the
    /// last.
    pub(super) fn deliver_report(&mut self, at: usize) {
        let (unfenced, too_early) = (self.is(Mutation::EpochUnread), self.is(Mutation::EpochReadTooEarly));
        let unversioned = self.is(Mutation::VersionUnread);
        let names_none = self.replicas[at].known == 0 && !self.is(Mutation::FirstUnclaimed);
        let Replica { session, versions, .. } = &mut self.replicas[at];
        let Some(session) = session else { return };
        session.claims |= names_none;
        if session.claims {
            return;
        }
        let Some(delivery) = session.reports.front_mut() else { return };
        let report = delivery.report.clone();
        if report.kind == ReportKind::Event {
            return self.deliver_event(at, &report);
        }
        let (said, subject) = (Said::of(&report), subject_of(&report));
        let shown = self.apiserver.statuses.get(&subject).copied().unwrap_or_default();
        let is_pod = report.kind == ReportKind::PodStatus;
        if delivery.read.is_none()
            && !delivery.tried
            && let Some(known) = versions.get(&subject)
        {
            (delivery.read, delivery.is_ours) = (Some(*known), true);
            return;
        }
        let look = if too_early { delivery.read.is_none() } else { delivery.read.is_some() };
        if look && !delivery.is_ours && !unfenced {
            delivery.is_ours = session.epoch >= self.apiserver.epoch;
            if !delivery.is_ours {
                self.end_session(at, Some(Reason::Superseded));
            }
            return;
        }
        let Some(read) = delivery.read else {
            delivery.read = Some(shown.version);
            if is_pod && shown.version > 0 && shown.said.value == said.value {
                return self.took(at, &report, true);
            }
            return;
        };
        if read != shown.version && (is_pod || !unversioned) {
            (delivery.read, delivery.is_ours, delivery.tried) = (None, false, true);
            return;
        }
        assert!(session.epoch >= shown.epoch, "a session overwrote what a newer one wrote");
        let is_restored = shown.said.serial <= self.ledger.restored;
        assert!(said.number >= shown.said.number || is_restored, "an older report overwrote a newer one");
        if self.refuses(at, &report) {
            return;
        }
        let Replica { session: Some(session), versions, .. } = &mut self.replicas[at] else { return };
        if session.epoch < self.apiserver.epoch {
            self.ledger.late.insert(subject.clone());
        } else {
            self.ledger.late.remove(&subject);
        }
        let status = Status { said, epoch: session.epoch, version: shown.version + 1 };
        if !is_pod {
            versions.insert(subject.clone(), status.version);
        }
        self.apiserver.statuses.insert(subject, status);
        self.took(at, &report, shown.said.serial == said.serial);
    }

    /// What is there already is only counted up.
    fn deliver_event(&mut self, at: usize, report: &Report) {
        if self.refuses(at, report) {
            return;
        }
        let count = Said::of(report).number;
        let shown = self.apiserver.events.get(&report.name).copied().unwrap_or_default();
        if count > shown || self.is(Mutation::EventOverwritten) {
            assert!(count >= shown, "an event's count went back");
            self.apiserver.events.insert(report.name.clone(), count);
        }
        self.took(at, report, count <= shown);
    }

    /// The apiserver may refuse a report for good.
    fn refuses(&mut self, at: usize, report: &Report) -> bool {
        let refuses = self.dice.one_in(40);
        if refuses {
            self.ledger.refused.insert(Said::of(report).serial);
            if report.kind == ReportKind::Event {
                self.ledger.events.remove(&report.name);
            }
            self.answered(at, report.id, "no");
        }
        refuses
    }

    /// The apiserver has a report, which may have changed nothing.
    fn took(&mut self, at: usize, report: &Report, unchanged: bool) {
        let said = Said::of(report);
        self.ledger.taken.insert(said.serial);
        let is_new = unchanged || self.ledger.effects.insert(said.serial);
        assert!(is_new || said.serial <= self.ledger.restored, "one report did something twice");
        if report.kind == ReportKind::PodStatus
            && let Some(session) = &mut self.replicas[at].session
        {
            session.taken.insert(subject_of(report), said.value);
            session.asked.remove(&subject_of(report));
        }
        self.answered(at, report.id, "");
    }

    fn answered(&mut self, at: usize, id: u64, refused: &str) {
        if let Some(session) = &mut self.replicas[at].session {
            session.reports.pop_front();
        }
        self.say(at, HubInput::Reported { id, refused: refused.to_owned() });
    }

    /// The apiserver cannot take the next report for now, and the edge has it back.
    pub(super) fn give_back(&mut self, at: usize) {
        let after = Duration::from_secs(self.dice.pick(&[1, 5, 20, 60]));
        let Some(session) = &mut self.replicas[at].session else { return };
        let Some(delivery) = session.reports.pop_front() else { return };
        self.say(at, HubInput::ReportLater { id: delivery.report.id, after });
    }

    /// The disk was replaced: what was reported of late may be lost, and what was reported before may come again.
    pub(super) fn disk_replaced(&mut self) {
        self.ledger.restored = self.node.serials;
        let shown = &self.apiserver.events;
        self.ledger.events.retain(|name, count| shown.get(name) >= Some(count));
    }

    pub(super) fn assert_reported(&self) {
        assert!(self.node.disk.outbox.is_empty(), "reports were left");
        for (subject, truth) in self.node.truths.iter().filter(|(subject, _)| !self.is_excused(subject)) {
            let shown = self.apiserver.statuses.get(subject).map(|shown| shown.said.value);
            assert_eq!(shown, Some(truth.value), "{subject:?} is not shown as it is");
        }
        for (name, count) in &self.ledger.events {
            assert_eq!(self.apiserver.events.get(name), Some(count), "{name} is not shown as often as it happened");
        }
    }

    /// What was reported last was refused, or a session that was over already has written last, and the one that would have seen it has ended.
    fn is_excused(&self, subject: &Subject) -> bool {
        self.ledger.late.contains(subject)
            || self.ledger.last.get(subject).is_some_and(|serial| self.ledger.refused.contains(serial))
    }
}

fn subject_of(report: &Report) -> Subject {
    (report.kind, report.uid.clone())
}
