//! The edge: its machine, its disk, and what is on its way from one to the other.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::cloud::{Apiserver, CONFIG_MAPS, Id};
use super::mutations::Mutation;
use super::*;

#[derive(Clone, Default)]
pub(super) struct Disk {
    pub(super) rows: BTreeMap<Id, Entry>,
    /// What the rows say: the JSON.
    pub(super) payloads: BTreeMap<Id, Vec<u8>>,
    /// Rows whose JSON was damaged without notice.
    pub(super) rotten: BTreeSet<Id>,
    pub(super) revisions: Vec<(Collection, u64)>,
    pub(super) outbox: BTreeMap<u64, Report>,
    pub(super) next_report: u64,
    pub(super) epoch: u64,
    /// How far each object has come.
    seen: BTreeMap<String, Seen>,
}

/// How far an object has come: up to which of its states, and up to which change of whether a pod refers to it.
#[derive(Clone, Default)]
struct Seen {
    state: usize,
    referred: usize,
    deleted: bool,
}

/// What is written and not durable yet.
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
    pub(super) batches: VecDeque<Batch>,
    /// Collections, by rank, of which the machine found on this connection that they are as the cloud has them.
    pub(super) agreed: BTreeSet<usize>,
    /// Deltas that fitted.
    pub(super) deltas: u64,
    pub(super) mutation: Option<Mutation>,
}

impl Node {
    pub(super) fn new(mutation: Option<Mutation>) -> Self {
        let edge = Edge::new("n", "b", "s", "edge", 0, []);
        let (disk, batches, agreed) = (Disk::default(), VecDeque::new(), BTreeSet::new());
        Self { edge, disk, backup: None, batches, agreed, deltas: 0, mutation }
    }

    /// A new machine of what the disk holds.
    pub(super) fn boot(&mut self, now: Duration) {
        let rows = self.disk.rows.iter().map(|((order, _), entry)| (COLLECTIONS[*order], entry.clone()));
        self.edge = Edge::new("n", "b", "s", "edge", self.disk.epoch, rows);
        if self.mutation != Some(Mutation::RevisionsForgotten) {
            let edge = std::mem::replace(&mut self.edge, Edge::new("", "", "", "", 0, []));
            self.edge = edge.with_revisions(self.disk.revisions.iter().copied());
        }
        for report in self.disk.outbox.values().cloned() {
            assert!(self.edge.step(now, EdgeInput::Report(report)).is_empty());
        }
    }

    /// Answers whether every delta fitted.
    pub(super) fn make_durable(&mut self, apiserver: &Apiserver, batch: Batch) -> bool {
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

    /// A byte of what is stored turns, and no checksum notices.
    pub(super) fn rot(&mut self, dice: &mut Dice) {
        let at = dice.roll(self.disk.payloads.len());
        if let Some((id, payload)) = self.disk.payloads.iter_mut().nth(at) {
            let at = dice.roll(payload.len());
            payload[at] ^= 1;
            self.disk.rotten.insert(id.clone());
        }
    }

    /// A new report, as the outbox holds it.
    pub(super) fn report(&mut self, dice: &mut Dice) -> Report {
        self.disk.next_report += 1;
        let (id, uid) = (self.disk.next_report, format!("p{}", dice.roll(3)));
        let is_event = dice.one_in(3);
        let kind = if is_event { ReportKind::Event } else { ReportKind::PodStatus };
        let name = if is_event { format!("event-{id}") } else { uid.clone() };
        let payload = Bytes::from(vec![b'x'; dice.roll(800)]);
        let report = Report { id, kind, namespace: "ns".into(), name, uid, payload };
        if is_coalesced(kind) {
            self.disk.outbox.retain(|_, old| old.kind != kind || old.uid != report.uid);
        }
        self.disk.outbox.insert(id, report.clone());
        report
    }

    pub(super) fn assert_holds(&self, desired: &BTreeMap<Id, Entry>) {
        assert_eq!(&self.disk.rows, desired);
        for (id, entry) in desired.iter().filter(|(id, _)| !self.disk.rotten.contains(id)) {
            assert_eq!(fingerprint(&self.disk.payloads[id]), entry.version, "{id:?} holds something else");
        }
    }
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
