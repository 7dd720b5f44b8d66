//! How a replica brings reports to the apiserver: an inbox for each session, one report in hand, and turns that all sessions of the replica
//! take, first come first served. With it other nodes of the same replicas, which say much: their lines are never the trouble.

use std::collections::{BTreeMap, VecDeque};

use super::mutations::Mutation;
use super::node::{Said, Subject};
use super::reports::{Ledger, subject_of};
use super::world::World;
use super::*;
use crate::sync::inbox::{DOUBTFUL_ATTEMPTS, End, Inbox, Next, WAITING_BYTES, Waiting};
use crate::sync::outbox::Outbox;

/// Whose session it is: the node's, of which everything else is told; the others are its neighbours.
pub(super) const NODE: usize = 0;
pub(super) const NEIGHBOURS: usize = 3;
/// Requests under way at once at one replica.
const AT_ONCE: usize = 2;
/// Different pods, or devices, of a neighbour: more than wait together.
const THINGS: usize = 24;

/// No report has more bytes. One that was tried in vain waits beside what has come meanwhile.
const LARGEST: usize = 1000;

/// One session's reports at its replica.
#[derive(Default)]
pub(super) struct Desk {
    inbox: Inbox,
    pub(super) hand: Option<Hand>,
    /// Somebody takes up what waits.
    is_driven: bool,
    /// What is not answered yet, by id: its serial, and how often it was tried in vain though it might have been taken.
    open: BTreeMap<u64, (u64, u32)>,
}

/// A report on its way to the apiserver.
pub(super) struct Hand {
    pub(super) waiting: Waiting,
    /// What was read before: the status's version.
    pub(super) read: Option<u64>,
    /// The epoch was this session's, looked at after that.
    pub(super) is_ours: bool,
    /// It is read again, for somebody wrote meanwhile.
    pub(super) is_second: bool,
}

/// How a try ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Taken,
    Refused,
    /// Refused, which may pass.
    Doubtful,
    Later(Option<Duration>),
}

/// Who may ask the apiserver for something: the first so many of those who have come, as a fair semaphore has it.
#[derive(Default)]
pub(super) struct Turns(VecDeque<Turn>);

struct Turn {
    who: usize,
    /// How many others have had theirs since it came.
    passed: usize,
}

impl Turns {
    fn come(&mut self, who: usize, jumps: bool) {
        let at = if jumps { self.0.len().min(AT_ONCE) } else { self.0.len() };
        self.0.insert(at, Turn { who, passed: 0 });
    }

    fn has(&self, who: usize) -> bool {
        self.0.iter().take(AT_ONCE).any(|turn| turn.who == who)
    }

    /// Whether it has come.
    fn waits(&self, who: usize) -> bool {
        self.0.iter().any(|turn| turn.who == who)
    }

    /// Its request has ended.
    fn end(&mut self, who: usize) {
        self.leave(who);
        for waiting in self.0.iter_mut().skip(AT_ONCE - 1) {
            waiting.passed += 1;
            assert!(waiting.passed <= NEIGHBOURS + 1 - AT_ONCE, "a report is kept waiting by what others report");
        }
    }

    /// Its session is over.
    pub(super) fn leave(&mut self, who: usize) {
        self.0.retain(|turn| turn.who != who);
    }

    fn any(&self, dice: &mut Dice) -> Option<usize> {
        self.0.get(dice.roll(self.0.len().min(AT_ONCE))).map(|turn| turn.who)
    }
}

impl Desk {
    /// Whether a report of it waits, or is being brought.
    pub(super) fn holds(&self, (kind, uid): &Subject) -> bool {
        let in_hand = |hand: &Hand| hand.waiting.report.kind == *kind && hand.waiting.report.uid == *uid;
        self.inbox.holds(*kind, uid) || self.hand.as_ref().is_some_and(in_hand)
    }

    /// Nothing is to be done, or nothing before its time.
    pub(super) const fn rests(&self) -> bool {
        self.hand.is_none()
    }

    /// Every report was answered.
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

/// Another node, as far as its reports go.
pub(super) struct Neighbour {
    /// It is told apart by this.
    who: usize,
    outbox: Outbox,
    /// What the outbox is on its disk.
    kept: BTreeMap<u64, Report>,
    /// What is not answered, by id, which is its serial too.
    unanswered: BTreeMap<u64, Subject>,
    last_report: u64,
    truths: BTreeMap<Subject, Said>,
    counts: [u64; 3],
    pub(super) ledger: Ledger,
    /// Where its session is.
    pub(super) replica: usize,
    pub(super) desk: Desk,
}

impl Neighbour {
    pub(super) fn new(who: usize, replica: usize) -> Self {
        Self {
            who,
            outbox: Outbox::default(),
            kept: BTreeMap::new(),
            unanswered: BTreeMap::new(),
            last_report: 0,
            truths: BTreeMap::new(),
            counts: [0; 3],
            ledger: Ledger::default(),
            replica,
            desk: Desk::default(),
        }
    }

    /// It sees something, and reports it.
    fn observe(&mut self, now: Duration, dice: &mut Dice) {
        self.last_report += 1;
        let id = self.last_report;
        let (kind, uid, name, said) = if dice.one_in(4) {
            let at = dice.roll(self.counts.len());
            self.counts[at] += 1;
            let name = format!("event-of-{}-{at}", self.who);
            self.ledger.happened(&name, self.counts[at]);
            (ReportKind::Event, "u".to_owned(), name, Said { number: self.counts[at], value: 0, serial: id })
        } else {
            let kind = dice.pick(&[ReportKind::PodStatus, ReportKind::DeviceStatus, ReportKind::NodeStatus]);
            let thing = if kind == ReportKind::NodeStatus { 0 } else { dice.roll(THINGS) };
            let uid = format!("of-{}-{thing}", self.who);
            let said = Said { number: id, value: u8::try_from(dice.roll(3)).unwrap(), serial: id };
            self.truths.insert((kind, uid.clone()), said);
            (kind, uid.clone(), uid, said)
        };
        let report =
            Report { id, kind, namespace: "ns".into(), name, uid, payload: said.payload(dice.pick(&[0, 0, 700])) };
        self.kept.retain(|_, old| subject_of(old) != subject_of(&report));
        self.kept.insert(id, report.clone());
        self.unanswered.insert(id, subject_of(&report));
        self.ledger.said(&report);
        self.outbox.push(now, report);
    }

    /// Its session begins anew, at some replica.
    fn connect(&mut self, replica: usize) {
        (self.replica, self.desk) = (replica, Desk::default());
        self.outbox.begin_again();
    }

    fn hear(&mut self, now: Duration, id: u64, how: End) {
        match how {
            End::Done(refused) => {
                let subject = self.unanswered.remove(&id).unwrap();
                self.ledger.assert_answered(&subject, id, &self.kept, &refused);
                self.outbox.answered(id).unwrap();
                self.kept.remove(&id);
            }
            End::Later(after) => {
                let ended = self.outbox.give_back(now, id, after).unwrap();
                assert_eq!(ended, None, "it is no day yet, and they are few");
            }
        }
    }
}

impl World {
    pub(super) fn desk(&mut self, at: usize, who: usize) -> Option<&mut Desk> {
        if who == NODE {
            return self.replicas[at].session.as_mut().map(|session| &mut session.desk);
        }
        Some(&mut self.neighbours[who - 1]).filter(|other| other.replica == at).map(|other| &mut other.desk)
    }

    pub(super) fn ledger_of(&mut self, who: usize) -> &mut Ledger {
        if who == NODE { &mut self.ledger } else { &mut self.neighbours[who - 1].ledger }
    }

    /// A replica has a report from its hub.
    pub(super) fn receive(&mut self, at: usize, who: usize, report: Report) {
        let mutation = self.mutation;
        let (id, serial) = (report.id, Said::of(&report).serial);
        let Some(desk) = self.desk(at, who) else { return };
        desk.open.insert(id, (serial, 0));
        let drops =
            mutation == Some(Mutation::NewerDropped) && is_coalesced(report.kind) && desk.holds(&subject_of(&report));
        let ended = if drops { Some((report.kind, id, End::Done(String::new()))) } else { desk.inbox.push(report) };
        assert!(desk.inbox.waiting_bytes() <= WAITING_BYTES + LARGEST, "more waits than may");
        if let Some((_, id, mut how)) = ended {
            if mutation == Some(Mutation::CrowdedRefused) && matches!(how, End::Later(_)) {
                how = End::Done("too many".to_owned());
            }
            let replaced = (how == End::Done(String::new())).then(|| desk.open[&id].0);
            desk.inbox.end(id, how);
            self.ledger_of(who).superseded.extend(replaced);
        }
        if let Some(desk) = self.desk(at, who)
            && !desk.inbox.begin()
        {
            desk.is_driven = true;
        }
    }

    /// The next report that is due is taken in hand, and waits for its turn.
    pub(super) fn take_up(&mut self, at: usize, who: usize) {
        let (now, jumps) = (self.now, self.is(Mutation::TurnsJumped));
        let forgets = self.is(Mutation::TriedForEver);
        let Some(desk) = self.desk(at, who).filter(|desk| desk.is_driven) else { return };
        if desk.hand.is_none() {
            match desk.inbox.next(now) {
                Next::Now(mut waiting) => {
                    if forgets {
                        waiting.attempt = 0;
                    }
                    desk.hand = Some(Hand { waiting, read: None, is_ours: who != NODE, is_second: false });
                }
                Next::In(_) => return,
                Next::Never => return desk.is_driven = false,
            }
        }
        if !self.replicas[at].turns.waits(who) && (who != NODE || self.may_write(at)) {
            self.replicas[at].turns.come(who, jumps);
        }
    }

    /// Whoever has a turn at a replica goes on, the node's session if it has one.
    pub(super) fn go_on(&mut self, at: usize) {
        for who in 0..=NEIGHBOURS {
            self.take_up(at, who);
        }
        let turns = &self.replicas[at].turns;
        let who = if turns.has(NODE) { Some(NODE) } else { turns.any(&mut self.dice) };
        if let Some(who) = who {
            self.bring(at, who);
        }
    }

    /// A try has ended, and with it a turn.
    pub(super) fn tried(&mut self, at: usize, who: usize, outcome: Outcome) {
        let (mutation, now, takes_others) = (self.mutation, self.now, !self.apiserver.is_down);
        let pause = self.dice.pick(&[Duration::ZERO, Duration::from_millis(200), Duration::from_secs(2)]);
        let Some(desk) = self.desk(at, who) else { return };
        let Some(Hand { waiting, .. }) = desk.hand.take() else { return };
        let (report, id) = (waiting.report.clone(), waiting.report.id);
        let (_, in_vain) = desk.open.get_mut(&id).unwrap();
        let is_failure = !matches!(outcome, Outcome::Taken | Outcome::Refused);
        if is_failure && takes_others {
            *in_vain += 1;
            assert!(*in_vain <= DOUBTFUL_ATTEMPTS, "it holds its place in the edge's window for ever");
        }
        let end = match &outcome {
            Outcome::Later(_) if mutation == Some(Mutation::FailureAcked) => Some(End::Done(String::new())),
            Outcome::Taken => Some(End::Done(String::new())),
            Outcome::Refused => Some(End::Done("no".to_owned())),
            Outcome::Doubtful => waiting.doubted("not now"),
            Outcome::Later(after) => waiting.put_off(*after, takes_others),
        };
        let is_refused = matches!(outcome, Outcome::Refused | Outcome::Doubtful) && matches!(end, Some(End::Done(_)));
        let mut replaced = None;
        let end = end.or_else(|| {
            let after = if let Outcome::Later(after) = outcome { after.unwrap_or_default() } else { Duration::ZERO };
            let older = (mutation == Some(Mutation::OlderTriedAgain)).then(|| waiting.report.clone());
            if mutation == Some(Mutation::AgainLost) {
                return None;
            }
            let ended = desk.inbox.again(waiting, now + pause.max(after))?;
            if let Some(older) = older {
                // Passes for the newest.
                let (_, id, how) = desk.inbox.push(Report { id: u64::MAX, ..older })?;
                desk.inbox.end(id, how);
                return None;
            }
            replaced = Some(desk.open[&ended].0);
            if ended != id {
                desk.inbox.end(ended, End::Done(String::new()));
                return None;
            }
            Some(End::Done(String::new()))
        });
        if let Some(end) = end {
            desk.inbox.end(id, end);
        }
        let ledger = self.ledger_of(who);
        ledger.superseded.extend(replaced);
        if is_refused {
            ledger.refuse(&report);
        }
        let keeps = self.is(Mutation::TurnKept);
        if keeps {
            self.take_up(at, who);
        }
        let goes_on = self.desk(at, who).is_some_and(|desk| desk.hand.is_some());
        let turns = &mut self.replicas[at].turns;
        turns.end(who);
        if goes_on {
            turns.0.push_front(Turn { who, passed: 0 });
        }
        self.tell_ends(at, who);
    }

    /// Who reports hears what became of it.
    pub(super) fn tell_ends(&mut self, at: usize, who: usize) {
        let now = self.now;
        while let Some(desk) = self.desk(at, who)
            && let Some((id, how)) = desk.inbox.ended()
        {
            desk.open.remove(&id);
            match how {
                how if who != NODE => self.neighbours[who - 1].hear(now, id, how),
                End::Done(refused) => self.say(at, HubInput::Reported { id, refused }),
                End::Later(after) => self.say(at, HubInput::ReportLater { id, after }),
            }
        }
    }

    /// Neighbours do something, or something happens to them.
    pub(super) fn neighbours_go_on(&mut self) {
        match self.dice.roll(40) {
            0..10 => self.neighbours_report(),
            10 => {
                let who = 1 + self.dice.roll(NEIGHBOURS);
                self.neighbours_connect(|other| other.who == who);
            }
            11 => self.apiserver.is_down = self.dice.one_in(3),
            _ => {
                let at = self.dice.roll(self.replicas.len());
                for who in 1..=NEIGHBOURS {
                    self.take_up(at, who);
                }
                for _ in 0..=self.dice.roll(4) {
                    if let Some(who) = self.replicas[at].turns.any(&mut self.dice) {
                        self.bring(at, who);
                    }
                }
            }
        }
    }

    /// Neighbours see something, at times much at once, and what they report gets to their replicas.
    fn neighbours_report(&mut self) {
        let at = self.dice.roll(NEIGHBOURS);
        for _ in 0..self.dice.pick(&[1, 1, 2, 12]) {
            self.neighbours[at].observe(self.now, &mut self.dice);
        }
        self.neighbour_sends(at + 1);
    }

    fn neighbour_sends(&mut self, who: usize) {
        let neighbour = &mut self.neighbours[who - 1];
        let at = neighbour.replica;
        while let Some(report) = self.neighbours[who - 1].outbox.send_next(self.now).cloned() {
            self.receive(at, who, report);
        }
        self.tell_ends(at, who);
    }

    /// A replica has died with all that waited there, or one session of its has.
    pub(super) fn neighbours_connect(&mut self, is_over: impl Fn(&Neighbour) -> bool) {
        for at in 0..NEIGHBOURS {
            let neighbour = &mut self.neighbours[at];
            if is_over(neighbour) {
                self.replicas[neighbour.replica].turns.leave(neighbour.who);
                neighbour.connect(self.dice.roll(self.replicas.len()));
                self.neighbour_sends(at + 1);
            }
        }
    }

    /// Answers whether they have nothing to do before the time of something comes.
    pub(super) fn neighbours_settle(&mut self) -> bool {
        for who in 1..=NEIGHBOURS {
            self.neighbour_sends(who);
            let at = self.neighbours[who - 1].replica;
            self.take_up(at, who);
            if self.replicas[at].turns.has(who) {
                self.bring(at, who);
            }
        }
        self.neighbours.iter().all(|other| other.desk.rests())
    }

    pub(super) fn neighbours_are_done(&self) -> bool {
        self.neighbours.iter().all(|other| other.kept.is_empty() && other.desk.is_empty())
    }

    pub(super) fn assert_neighbours_reported(&self) {
        for other in &self.neighbours {
            assert!(other.desk.is_empty() && other.kept.is_empty(), "a neighbour's reports were left");
            other.ledger.assert_shown(&self.apiserver, &other.truths);
        }
    }
}
