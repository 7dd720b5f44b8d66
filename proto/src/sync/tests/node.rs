//! The edge: its machine, its disk, what is on its way from one to the other, and the kubelet, which sees what is true of the node and
//! reports it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::cloud::{Apiserver, CONFIG_MAPS, Id};
use super::mutations::Mutation;
use super::*;
use crate::wire;

#[derive(Clone, Default)]
pub(super) struct Disk {
    pub(super) rows: BTreeMap<Id, Entry>,
    /// What the rows say: the JSON.
    pub(super) payloads: BTreeMap<Id, Vec<u8>>,
    /// Rows whose JSON was damaged without notice.
    pub(super) rotten: BTreeSet<Id>,
    pub(super) revisions: Vec<(Collection, u64)>,
    pub(super) outbox: BTreeMap<u64, Report>,
    last_report: u64,
    /// What was reported last: the kubelet's notes.
    notes: BTreeMap<Subject, u8>,
    pub(super) epoch: u64,
    /// How far each object has come.
    seen: BTreeMap<String, Seen>,
}

/// What a report is about.
pub(super) type Subject = (ReportKind, String);

/// What a report says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// Which state it is of all that were ever true, or how often an event happened.
    pub(super) number: u64,
    /// One of a few: a state may come back.
    pub(super) value: u8,
    /// Of the row in the outbox: no other had it.
    pub(super) serial: u64,
}

/// How far an object has come: up to which of its states, and up to which change of whether a pod refers to it.
#[derive(Clone, Default)]
struct Seen {
    state: usize,
    referred: usize,
    deleted: bool,
}

/// What is to be written and is not durable yet, in order.
pub(super) enum Job {
    Apply(Batch),
    /// The report of this id came to its end.
    Done(u64),
}

pub(super) struct Batch {
    pub(super) ticket: u64,
    pub(super) connection: u64,
    pub(super) seq: u64,
    pub(super) ops: Vec<Op>,
    pub(super) revisions: Vec<(Collection, u64)>,
}

pub(super) struct Node {
    pub(super) edge: Edge,
    pub(super) disk: Disk,
    pub(super) backup: Option<Disk>,
    pub(super) jobs: VecDeque<Job>,
    /// Collections, by rank, of which the machine found on this connection that they are as the cloud has them.
    pub(super) agreed: BTreeSet<usize>,
    /// Deltas that fitted.
    pub(super) deltas: u64,
    /// What is true of each thing that is reported on.
    pub(super) truths: BTreeMap<Subject, Said>,
    /// What the kubelet is still to report, since it started or was asked to.
    pub(super) unsaid: BTreeSet<Subject>,
    /// Reports that this process gave to its machine.
    pub(super) given: BTreeMap<u64, Report>,
    /// How often this process saw each event. Another one begins another event.
    counts: BTreeMap<String, u64>,
    life: u64,
    numbers: u64,
    pub(super) serials: u64,
    pub(super) mutation: Option<Mutation>,
}

impl Node {
    pub(super) fn new(mutation: Option<Mutation>) -> Self {
        Self {
            edge: Edge::new("n", "b", "s", "edge", 0, []),
            disk: Disk::default(),
            backup: None,
            jobs: VecDeque::new(),
            agreed: BTreeSet::new(),
            deltas: 0,
            truths: BTreeMap::new(),
            unsaid: BTreeSet::new(),
            given: BTreeMap::new(),
            counts: BTreeMap::new(),
            life: 0,
            numbers: 0,
            serials: 0,
            mutation,
        }
    }

    /// Batches of changes that are not durable yet.
    pub(super) fn batches(&self) -> impl DoubleEndedIterator<Item = &Batch> {
        self.jobs.iter().filter_map(|job| match job {
            Job::Apply(batch) => Some(batch),
            Job::Done(_) => None,
        })
    }

    /// A new machine of what the disk holds.
    pub(super) fn boot(&mut self, now: Duration) {
        let rows = self.disk.rows.iter().map(|((order, _), entry)| (COLLECTIONS[*order], entry.clone()));
        self.life += 1;
        self.edge = Edge::new("n", &self.life.to_string(), "s", "edge", self.disk.epoch, rows);
        if self.mutation != Some(Mutation::RevisionsForgotten) {
            let edge = std::mem::replace(&mut self.edge, Edge::new("", "", "", "", 0, []));
            self.edge = edge.with_revisions(self.disk.revisions.iter().copied());
        }
        self.given.clone_from(&self.disk.outbox);
        for report in self.disk.outbox.values().cloned() {
            assert!(self.edge.step(now, EdgeInput::Report(report)).is_empty());
        }
        self.counts.clear();
        // All, whatever the notes say: they may have been put back with the rest of the disk.
        let believed = self.mutation == Some(Mutation::NotesBelieved);
        let is_new =
            |(subject, said): &(&Subject, &Said)| !believed || self.disk.notes.get(*subject) != Some(&said.value);
        self.unsaid = self.truths.iter().filter(is_new).map(|(subject, _)| subject.clone()).collect();
    }

    /// Answers whether everything that was to be written fits.
    pub(super) fn write(&mut self, apiserver: &Apiserver, job: Job) -> bool {
        match job {
            Job::Apply(batch) => self.make_durable(apiserver, batch),
            Job::Done(id) => {
                self.disk.outbox.remove(&id);
                true
            }
        }
    }

    /// Answers whether every delta fitted.
    fn make_durable(&mut self, apiserver: &Apiserver, batch: Batch) -> bool {
        let mut fits = true;
        for op in batch.ops {
            let (id, object) = match op {
                Op::Upsert(object) => ((rank(object.collection).unwrap(), object.entry.uid.clone()), Some(object)),
                Op::Patch(collection, entry, delta) => {
                    let id = (rank(collection).unwrap(), entry.uid.clone());
                    let Some(object) = self.patched(&id, &entry, &delta) else {
                        fits = false;
                        if let Some(row) = self.disk.rows.get_mut(&id) {
                            row.version = 0;
                        }
                        continue;
                    };
                    self.deltas += 1;
                    (id, Some(object))
                }
                Op::Delete(collection, uid) => ((rank(collection).unwrap(), uid), None),
            };
            let seen = self.disk.seen.entry(id.1.clone()).or_default();
            self.disk.rotten.remove(&id);
            match object {
                Some(object) => {
                    seen.holds(apiserver, &id, &object.entry);
                    self.disk.payloads.insert(id.clone(), object.payload.to_vec());
                    self.disk.rows.insert(id, object.entry);
                }
                None => {
                    let row = self.disk.rows.remove(&id);
                    seen.lets_go(apiserver, &id, row.as_ref());
                    self.disk.payloads.remove(&id);
                }
            }
        }
        self.disk.revisions = batch.revisions;
        fits
    }

    fn patched(&self, id: &Id, entry: &Entry, delta: &Delta) -> Option<Object> {
        let unchecked = self.mutation == Some(Mutation::DeltaUnchecked);
        self.disk.rows.get(id).filter(|row| unchecked || row.version == delta.base)?;
        let json = delta::apply(&self.disk.payloads[id], &delta.payload);
        let json = if unchecked { json.unwrap_or_default() } else { json.ok()? };
        let object = Object::new(COLLECTIONS[id.0], entry.key.clone(), entry.uid.clone(), &json);
        (unchecked || object.entry.version == entry.version).then(|| Object {
            entry: entry.clone(),
            payload: json.into(),
            ..object
        })
    }

    /// What has the name of what is to be deleted.
    pub(super) fn namesake(&self, delete: &wire::Delete) -> Option<String> {
        let order = rank(delete.collection())?;
        let key = &self.disk.rows.get(&(order, delete.uid.clone()))?.key;
        let last = self.disk.rows.iter().rfind(|((at, _), row)| *at == order && row.key == *key);
        last.map(|((_, uid), _)| uid.clone())
    }

    /// A byte of what is stored turns, and no checksum notices.
    pub(super) fn rot(&mut self, dice: &mut Dice) {
        let at = dice.roll(self.disk.payloads.len());
        if let Some((id, payload)) = self.disk.payloads.iter_mut().nth(at) {
            let at = dice.roll(payload.len());
            payload[at] ^= 1;
            self.disk.rotten.insert(id.clone());
        }
    }

    /// Something of the node becomes another one, whether anybody sees it or not.
    pub(super) fn change(&mut self, dice: &mut Dice) -> Subject {
        let kind = dice.pick(&[
            ReportKind::PodStatus,
            ReportKind::PodStatus,
            ReportKind::NodeStatus,
            ReportKind::DeviceStatus,
        ]);
        let subject = match kind {
            ReportKind::NodeStatus => node(),
            _ => (kind, format!("u{}", dice.roll(3))),
        };
        let value = u8::try_from(dice.roll(3)).unwrap();
        let truth = self.truths.entry(subject.clone()).or_default();
        if truth.number == 0 || truth.value != value {
            self.numbers += 1;
            *truth = Said { number: self.numbers, value, serial: 0 };
        }
        subject
    }

    /// The kubelet sees something: a report if that is news.
    pub(super) fn observe(&mut self, dice: &mut Dice) -> Option<Report> {
        if dice.one_in(3) {
            return Some(self.event(dice));
        }
        let subject = self.change(dice);
        let is_news = self.disk.notes.get(&subject) != Some(&self.truths[&subject].value);
        is_news.then(|| self.report(dice, subject))
    }

    /// What is true of something now, as the outbox holds it.
    pub(super) fn report(&mut self, dice: &mut Dice, subject: Subject) -> Report {
        let said = self.truths[&subject];
        self.unsaid.remove(&subject);
        self.disk.notes.insert(subject.clone(), said.value);
        let (kind, uid) = subject;
        self.keep(dice, kind, uid.clone(), uid, said)
    }

    fn event(&mut self, dice: &mut Dice) -> Report {
        let name = format!("event-{}-{}", self.life, dice.roll(3));
        let count = self.counts.entry(name.clone()).or_default();
        *count += 1;
        let said = Said { number: *count, ..Said::default() };
        self.keep(dice, ReportKind::Event, "u0".into(), name, said)
    }

    fn keep(&mut self, dice: &mut Dice, kind: ReportKind, uid: String, name: String, said: Said) -> Report {
        self.disk.last_report += 1;
        self.serials += 1;
        let (id, payload) = (self.disk.last_report, Said { serial: self.serials, ..said }.payload(dice.roll(800)));
        let report = Report { id, kind, namespace: "ns".into(), name, uid, payload };
        let is_same = |old: &Report| (old.kind, &old.uid, &old.name) == (kind, &report.uid, &report.name);
        self.disk.outbox.retain(|_, old| !is_same(old));
        self.disk.outbox.insert(id, report.clone());
        self.given.insert(id, report.clone());
        report
    }

    /// A row is lost, of the disk and of what the machine knows of it, and nobody notices. Answers of which collection.
    pub(super) fn lose_row(&mut self, dice: &mut Dice) -> Option<usize> {
        // What else of these is wanted depends on pods.
        let rows: Vec<&Id> = self.disk.rows.keys().filter(|(order, _)| *order != CONFIG_MAPS).collect();
        let id = (*rows.get(dice.roll(rows.len()))?).clone();
        self.disk.rows.remove(&id);
        self.disk.payloads.remove(&id);
        self.edge.lose(id.0, &id.1);
        Some(id.0)
    }

    pub(super) fn assert_holds(&self, desired: &BTreeMap<Id, Entry>) {
        assert_eq!(&self.disk.rows, desired);
        for (id, entry) in desired.iter().filter(|(id, _)| !self.disk.rotten.contains(id)) {
            assert_eq!(fingerprint(&self.disk.payloads[id]), entry.version, "{id:?} holds something else");
        }
    }
}

impl Said {
    pub(super) fn payload(self, padding: usize) -> Bytes {
        let mut payload = [self.number.to_le_bytes(), self.serial.to_le_bytes()].concat();
        payload.push(self.value);
        payload.resize(payload.len() + padding, b'x');
        payload.into()
    }

    pub(super) fn of(report: &Report) -> Self {
        Self::read(&report.payload)
    }

    pub(super) fn read(payload: &[u8]) -> Self {
        let number = |at: usize| u64::from_le_bytes(payload[at..at + 8].try_into().unwrap());
        Self { number: number(0), serial: number(8), value: payload[16] }
    }
}

pub(super) fn node() -> Subject {
    (ReportKind::NodeStatus, "n".to_owned())
}

impl Seen {
    /// A state may come back (a version is a fingerprint of the content), so the first one that fits is meant: what the disk went through
    /// has to be a subsequence of what was true.
    fn holds(&mut self, apiserver: &Apiserver, id: &Id, entry: &Entry) {
        assert!(!self.deleted, "{id:?} came back after its deletion");
        let ahead = apiserver.states[&entry.uid].iter().skip(self.state).position(|state| *state == entry.version);
        self.state += ahead.expect("a version went backwards");
        if id.0 == CONFIG_MAPS {
            let on = self.turn(apiserver, &entry.key, true);
            self.referred = on.expect("it came back after nothing referred to it any more");
        }
    }

    fn lets_go(&mut self, apiserver: &Apiserver, id: &Id, row: Option<&Entry>) {
        let unreferred = row.filter(|_| id.0 == CONFIG_MAPS).and_then(|row| self.turn(apiserver, &row.key, false));
        match unreferred {
            Some(turn) => self.referred = turn,
            None => {
                assert!(!apiserver.objects.contains_key(id), "{id:?} is desired, and was deleted");
                self.deleted = true;
            }
        }
    }

    fn turn(&self, apiserver: &Apiserver, key: &str, to: bool) -> Option<usize> {
        let history = apiserver.referred.get(key).map_or(&[false][..], Vec::as_slice);
        let ahead = history.iter().skip(self.referred).position(|referred| *referred == to);
        ahead.map(|ahead| self.referred + ahead)
    }
}
