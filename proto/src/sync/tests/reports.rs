//! Reports, from what the kubelet sees to what the apiserver shows, and the account that is kept of them.

use std::collections::{BTreeMap, BTreeSet};

use super::cloud::{Apiserver, Status};
use super::desk::{Hand, NODE, Outcome};
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
    /// The newest of each thing of which the node has heard what became of it.
    answered: BTreeMap<Subject, u64>,
    /// Newer ones took their places.
    pub(super) superseded: BTreeSet<u64>,
    /// It refused them for good.
    pub(super) refused: BTreeSet<u64>,
    /// The newest of each thing.
    last: BTreeMap<Subject, u64>,
    /// Events that reached a hub.
    pub(super) arrived: BTreeSet<u64>,
    /// How often each event happened, of those whose reports cannot have been lost with a disk.
    events: BTreeMap<String, u64>,
    /// A disk was put back or replaced when so many rows had been made: those may come again.
    pub(super) restored: u64,
    /// What was written by a session of a node that a newer one had taken over, and by none since.
    late: BTreeSet<Subject>,
}

impl World {
    /// The kubelet sees something.
    pub(super) fn observe(&mut self) {
        let Some(report) = self.node.observe(&mut self.dice) else { return };
        if report.kind == ReportKind::Event {
            self.ledger.happened(&report.name, Said::of(&report).number);
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
        self.ledger.said(&report);
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
        let shows = |subject: &Subject| self.apiserver.statuses.get(subject).map(|shown| shown.said.value);
        let mut hidden = session.taken.iter().filter(|(subject, taken)| shows(subject) != Some(**taken));
        let hidden = hidden.find(|(subject, _)| !session.asked.contains(*subject) && !session.desk.holds(subject));
        let Some(subject) = hidden.map(|(subject, _)| subject.clone()) else { return false };
        session.asked.insert(subject.clone());
        let out = session.hub.ask_report(subject.0, subject.1);
        self.hub_outputs(at, out);
        true
    }

    /// Whether the node's session at a replica may write what it has in hand. Where the Node names another start of the agent, or none, it is
    /// to claim the Node before it writes of anything else: the Node's own report names it.
    pub(super) fn may_write(&mut self, at: usize) -> bool {
        let names_none = self.replicas[at].known == 0;
        let unfenced = self.is(if names_none { Mutation::FirstUnclaimed } else { Mutation::OthersUnclaimed });
        let replica = &mut self.replicas[at];
        let Some(session) = &mut replica.session else { return false };
        let kind = session.desk.hand.as_ref().map(|hand| hand.waiting.report.kind);
        let is_fenced = matches!(kind, Some(ReportKind::PodStatus | ReportKind::DeviceStatus)) && !unfenced;
        session.claims |= is_fenced && replica.agent != session.run;
        !session.claims
    }

    /// A session brings a report to the apiserver, in three steps between which anything may happen: it reads the status, looks whether
    /// the Node names no newer session, and writes if the status is still what was read. So the session of an older epoch never
    /// overwrites what a newer one wrote. But for pods it remembers what it has read or written last, and looks only if that was not the
    /// last.
    pub(super) fn bring(&mut self, at: usize, who: usize) {
        let (unfenced, too_early) = (self.is(Mutation::EpochUnread), self.is(Mutation::EpochReadTooEarly));
        let unversioned = self.is(Mutation::VersionUnread);
        let Some(hand) = self.hand(at, who) else { return };
        let Hand { read, is_ours, is_second, ref waiting } = *hand;
        let (report, tried) = (waiting.report.clone(), waiting.attempt > 0 || is_second);
        if report.kind == ReportKind::Event {
            return self.bring_event(at, who, &report, tried);
        }
        let unread = tried && self.is(Mutation::AgainUnread);
        let (said, subject) = (Said::of(&report), subject_of(&report));
        let shown = self.apiserver.statuses.get(&subject).copied().unwrap_or_default();
        let is_pod = report.kind == ReportKind::PodStatus;
        if let Some(known) = self.replicas[at].versions.get(&subject).copied()
            && read.is_none()
            && !tried
        {
            return self.reads(at, who, Some(known), true);
        }
        let look = if too_early { read.is_none() } else { read.is_some() };
        if look && !is_ours && !unfenced {
            let is_ours = self.epoch_of(at, who) >= self.apiserver.epoch;
            if !is_ours {
                return self.end_session(at, Some(Reason::Superseded));
            }
            return self.reads(at, who, read, true);
        }
        let Some(read) = read else {
            self.reads(at, who, Some(shown.version), is_ours);
            if is_pod && shown.version > 0 && shown.said.value == said.value && !unread {
                self.took(at, who, &report);
            }
            return;
        };
        if read != shown.version && (is_pod || !unversioned) {
            if is_second || !is_pod {
                return self.tried(at, who, Outcome::Later(None));
            }
            self.reads(at, who, None, who != NODE);
            if let Some(hand) = self.hand(at, who) {
                hand.is_second = true;
            }
            return;
        }
        assert!(who != NODE || self.epoch_of(at, who) >= shown.epoch, "a session overwrote what a newer one wrote");
        let is_restored = shown.said.serial <= self.ledger_of(who).restored;
        assert!(said.number >= shown.said.number || is_restored, "an older report overwrote a newer one");
        let answer = self.answer();
        match answer {
            Answer::Takes | Answer::Dies => {
                self.write(at, who, &subject, said);
                self.ledger_of(who).wrote(said.serial, shown.said.serial == said.serial && !unread);
                if answer == Answer::Dies {
                    return self.tried(at, who, Outcome::Later(None));
                }
                if subject == node::node() && self.apiserver.epoch == self.epoch_of(at, who) {
                    self.replicas[at].has_claimed(&self.apiserver);
                }
                if !is_pod {
                    self.replicas[at].versions.insert(subject, shown.version + 1);
                }
                self.took(at, who, &report);
            }
            Answer::Conflicts => self.apiserver.statuses.entry(subject).or_default().version += 1,
            Answer::Ends(outcome) => self.tried(at, who, outcome),
        }
    }

    /// What is there already is only counted up.
    fn bring_event(&mut self, at: usize, who: usize, report: &Report, tried: bool) {
        let said = Said::of(report);
        let shown = self.apiserver.events.get(&report.name).copied().unwrap_or_default();
        let unread = tried && self.is(Mutation::AgainUnread);
        let counts = said.number > shown || self.is(Mutation::EventOverwritten) || unread;
        if !counts {
            return self.took(at, who, report);
        }
        let answer = self.answer();
        match answer {
            Answer::Takes | Answer::Dies => {
                assert!(said.number >= shown, "an event's count went back");
                self.apiserver.events.insert(report.name.clone(), said.number);
                self.ledger_of(who).wrote(said.serial, false);
                if answer == Answer::Dies {
                    return self.tried(at, who, Outcome::Later(None));
                }
                self.took(at, who, report);
            }
            Answer::Conflicts => self.tried(at, who, Outcome::Later(None)),
            Answer::Ends(outcome) => self.tried(at, who, outcome),
        }
    }

    fn write(&mut self, at: usize, who: usize, subject: &Subject, said: Said) {
        let epoch = self.epoch_of(at, who);
        if who == NODE && epoch < self.apiserver.epoch {
            self.ledger.late.insert(subject.clone());
        } else {
            self.ledger.late.remove(subject);
        }
        let shown = self.apiserver.statuses.entry(subject.clone()).or_default();
        *shown = Status { said, epoch, version: shown.version + 1 };
        if *subject == node::node()
            && epoch > self.apiserver.epoch
            && let Some(session) = &self.replicas[at].session
        {
            (self.apiserver.epoch, self.apiserver.agent) = (epoch, session.run.clone());
        }
    }

    /// What the apiserver makes of a request that it could grant.
    fn answer(&mut self) -> Answer {
        if self.apiserver.is_down {
            return Answer::Ends(Outcome::Later(None));
        }
        let roll = self.dice.roll(40);
        match roll {
            0 => Answer::Ends(Outcome::Refused),
            _ if self.is_clear => Answer::Takes,
            1 | 2 => Answer::Ends(Outcome::Doubtful),
            3 => Answer::Ends(Outcome::Later(Some(Duration::from_secs(3)))),
            4 | 5 => Answer::Ends(Outcome::Later(None)),
            6 | 7 => Answer::Dies,
            8 => Answer::Conflicts,
            _ => Answer::Takes,
        }
    }

    fn hand(&mut self, at: usize, who: usize) -> Option<&mut Hand> {
        self.desk(at, who)?.hand.as_mut()
    }

    fn reads(&mut self, at: usize, who: usize, version: Option<u64>, is_ours: bool) {
        if let Some(hand) = self.hand(at, who) {
            (hand.read, hand.is_ours) = (version, is_ours);
        }
    }

    /// That of the node's session. Its neighbours' never change.
    fn epoch_of(&self, at: usize, who: usize) -> u64 {
        let session = self.replicas[at].session.as_ref().filter(|_| who == NODE);
        session.map_or(0, |session| session.epoch)
    }

    /// The apiserver has a report, which may have changed nothing.
    fn took(&mut self, at: usize, who: usize, report: &Report) {
        let said = Said::of(report);
        self.ledger_of(who).taken.insert(said.serial);
        if who == NODE
            && report.kind == ReportKind::PodStatus
            && let Some(session) = &mut self.replicas[at].session
        {
            session.taken.insert(subject_of(report), said.value);
            session.asked.remove(&subject_of(report));
        }
        self.tried(at, who, Outcome::Taken);
    }

    /// The disk was replaced: what was reported of late may be lost, and what was reported before may come again.
    pub(super) fn disk_replaced(&mut self) {
        self.ledger.restored = self.node.serials;
        let shown = &self.apiserver.events;
        self.ledger.events.retain(|name, count| shown.get(name) >= Some(count));
    }

    pub(super) fn assert_reported(&self) {
        assert!(self.node.disk.outbox.is_empty(), "reports were left");
        self.ledger.assert_shown(&self.apiserver, &self.node.truths);
        self.assert_neighbours_reported();
    }
}

/// What the apiserver makes of a request.
#[derive(PartialEq, Eq)]
enum Answer {
    Takes,
    /// It takes it, and dies before it says so.
    Dies,
    /// Somebody else writes just before.
    Conflicts,
    Ends(Outcome),
}

impl Ledger {
    /// Something is reported.
    pub(super) fn said(&mut self, report: &Report) {
        self.last.insert(subject_of(report), Said::of(report).serial);
    }

    /// An event has happened so often.
    pub(super) fn happened(&mut self, name: &str, count: u64) {
        self.events.insert(name.to_owned(), count);
    }

    /// The apiserver does what a report says, for a second time if it `shows` that already.
    fn wrote(&mut self, serial: u64, shows: bool) {
        let is_new = shows || self.effects.insert(serial);
        assert!(is_new || serial <= self.restored, "one report did something twice");
    }

    /// It refuses a report for good.
    pub(super) fn refuse(&mut self, report: &Report) {
        self.refused.insert(Said::of(report).serial);
        if report.kind == ReportKind::Event {
            self.events.remove(&report.name);
        }
    }

    /// A node hears what became of a report; `kept` are those that its disk holds.
    pub(super) fn assert_answered(
        &mut self,
        subject: &Subject,
        serial: u64,
        kept: &BTreeMap<u64, Report>,
        refused: &str,
    ) {
        let is_newer = |other: &Report| subject_of(other) == *subject && Said::of(other).serial > serial;
        let is_said = if refused.is_empty() { &self.taken } else { &self.refused }.contains(&serial);
        let newest = self.answered.entry(subject.clone()).or_default();
        let is_needless = *newest > serial || kept.values().any(is_newer);
        let is_replaced = refused.is_empty() && self.superseded.contains(&serial) && is_needless;
        assert!(is_said || is_replaced, "acknowledged, but the apiserver has not said so, and no newer one is kept");
        *newest = serial.max(*newest);
    }

    pub(super) fn assert_shown(&self, apiserver: &Apiserver, truths: &BTreeMap<Subject, Said>) {
        for (subject, truth) in truths.iter().filter(|(subject, _)| !self.is_excused(subject)) {
            let shown = apiserver.statuses.get(subject).map(|shown| shown.said.value);
            assert_eq!(shown, Some(truth.value), "{subject:?} is not shown as it is");
        }
        for (name, count) in &self.events {
            assert_eq!(apiserver.events.get(name), Some(count), "{name} is not shown as often as it happened");
        }
    }

    /// What was reported last was refused, or a session that was over already has written last, and the one that would have seen it has ended.
    fn is_excused(&self, subject: &Subject) -> bool {
        self.late.contains(subject) || self.last.get(subject).is_some_and(|serial| self.refused.contains(serial))
    }
}

/// Names are UIDs here, but for events, which have none of their own.
pub(super) fn subject_of(report: &Report) -> Subject {
    (report.kind, report.name.clone())
}
