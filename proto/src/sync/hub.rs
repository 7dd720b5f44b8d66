//! The cloud's side of one session.
//!
//! It compares what the edge holds with what the caller says is desired, and sends the difference. What the edge holds is known
//! from its digests when they agree and from its inventory when they do not; from then on it is what was held plus what was sent,
//! checked by a digest behind every batch. A collection is neither sent nor deleted from before it is declared complete, and none before
//! what was said is as new as what the edge has seen, from whatever replica; what agrees already is in sync without that.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;

use self::held::{Desired, Held, Knowledge, Parts};
use super::revisions::Freshness;
use super::{
    COLLECTIONS, DEAD_AFTER, Digest, Entry, MAX_NAME, MAX_REPORT, Object, PROTOCOL, REPORT_WINDOW, Report,
    decode_within, decoded_size, max_inventory, rank,
};
use crate::dictionary;
use crate::wire::{self, Collection, Frame, ReportKind, frame::Body, goodbye::Reason};

mod held;

/// Unacknowledged bytes beyond which nothing more is sent; one object may exceed it alone. Small in tests, so that it is met often.
const WINDOW: usize = if cfg!(test) { 2 << 10 } else { 256 << 10 };

/// Digests, revisions or dictionaries in a Hello: more than there are collections, for an edge that is newer may know of others.
const MAX_LISTED: usize = 64;

/// The cloud's side of one session: from the edge's Hello to the end of the connection.
#[derive(Debug)]
pub struct Hub {
    collections: [Held; COLLECTIONS.len()],
    freshness: Freshness,
    /// What differs, in the order in which it is to be sent.
    dirty: BTreeSet<Turn>,
    sent_seq: u64,
    acked_seq: u64,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: usize,
    /// Those that are not answered yet, at most [`REPORT_WINDOW`].
    reports: Vec<u64>,
    /// The edge has the dictionary.
    dictionary: bool,
    last_heard: Duration,
    in_sync: bool,
    closed: bool,
    tally: Tally,
}

/// What became of what a hub was told, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Changes, deletes among them, that the edge has acknowledged.
    pub acknowledged: u32,
    /// Changes that were not sent, for another state took their place before.
    pub superseded: u32,
    /// Reports that were refused here.
    pub refused: u32,
}

/// What the edge still lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Changes that are to be sent once there is room.
    pub waiting: u32,
    /// Bytes of what was sent and is not acknowledged.
    pub unacknowledged: u32,
}

/// What happens to a hub.
#[derive(Debug)]
pub enum HubInput {
    /// A frame of the edge's.
    Frame(Frame),
    /// Something else of the edge's: a part of a frame, data of a stream.
    Heard,
    /// The edge should hold this object; replaces an older version, also one not sent yet.
    Desired(Arc<Object>),
    /// The edge should hold this version, which it holds already as far as the caller knows (from [`HubOutput::Inventory`]), so that no
    /// payload is at hand.
    Keep(Collection, Entry),
    /// The edge should no longer hold this object.
    Gone(Collection, String),
    /// Everything the edge should hold of this collection has been said: from now on it is compared, sent and deleted.
    Complete(Collection),
    /// What is said of any collection from now on, and what is said to be gone, may show changes of this one up to this revision of the
    /// apiserver's, none beyond. To be said before it.
    Newest(Collection, u64),
    /// Every change of this collection up to this revision shows in what was said of every collection; see [`Hub::is_behind`].
    Reached(Collection, u64),
    /// The apiserver's revisions began anew (it was restored from a backup): those that the edge has seen mean nothing.
    Restored,
    /// The apiserver took the report of this id (`refused` empty) or refused it for good.
    Reported {
        /// The report's id.
        id: u64,
        /// Why it was refused; empty if it was taken.
        refused: String,
    },
    /// The apiserver cannot take the report of this id for now: the edge has it back.
    ReportLater {
        /// The report's id.
        id: u64,
        /// How long the edge is to keep it.
        after: Duration,
    },
    /// The time of [`Hub::next_timeout`] has come.
    Timeout,
}

/// What a hub wants done, in order.
#[derive(Debug)]
pub enum HubOutput {
    /// Send this.
    Send(Frame),
    /// What the edge says it holds of a collection. It was asked because digests differed, because of [`Hub::ask`], or because a
    /// version given by [`HubInput::Keep`] turned out to be missing there and has to be given by [`HubInput::Desired`].
    Inventory(Collection, Vec<Entry>),
    /// The edge acknowledged everything sent so far and its digests agree.
    InSync,
    /// Hand this to the apiserver, then answer with [`HubInput::Reported`] or [`HubInput::ReportLater`].
    Report(Report),
    /// End the connection. If `Some`, send this Goodbye first.
    Close(Option<wire::Goodbye>),
}

/// A place in the order of sending: upserts go in the order of [`COLLECTIONS`], so that a pod comes after what it needs; then
/// deletes in the opposite order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    delete: bool,
    order: usize,
    uid: String,
}

#[derive(Debug)]
struct InFlight {
    seq: u64,
    bytes: usize,
    /// The row it changes and what it changes it to; `None` for a digest check.
    change: Option<(usize, String, Option<Entry>)>,
}

/// Whether a Hello is one: nothing in it is longer, and there is no more of it, than an edge has to say.
pub fn check_hello(hello: &wire::Hello) -> Result<(), String> {
    let wire::Hello { node, agent, run_id, store_id, .. } = hello;
    if [node, agent, run_id, store_id].iter().any(|name| name.len() > MAX_NAME) {
        return Err(format!("a Hello with a name of more than {MAX_NAME} bytes"));
    }
    if [hello.digests.len(), hello.revisions.len(), hello.dictionaries.len()].iter().any(|many| *many > MAX_LISTED) {
        return Err(format!("a Hello with more than {MAX_LISTED} digests, revisions or dictionaries"));
    }
    Ok(())
}

impl Hub {
    /// Answers a Hello. `epoch` must be greater than `hello.last_epoch`. `server_time` is Unix milliseconds.
    pub fn new(
        now: Duration,
        hello: &wire::Hello,
        epoch: u64,
        server_time: u64,
        agent: &str,
    ) -> (Self, Vec<HubOutput>) {
        let mut hub = Self {
            collections: Default::default(),
            freshness: Freshness::new(&hello.revisions),
            dirty: BTreeSet::new(),
            sent_seq: 0,
            acked_seq: 0,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            reports: Vec::new(),
            dictionary: hello.dictionaries.contains(&dictionary::ID),
            last_heard: now,
            in_sync: false,
            closed: false,
            tally: Tally::default(),
        };
        if hello.protocol_max < *PROTOCOL.start() || hello.protocol_min > *PROTOCOL.end() {
            hub.closed = true;
            let message = format!(
                "{} speaks protocol {} to {}, {agent} speaks {} to {}: upgrade the older of the two",
                hello.agent,
                hello.protocol_min,
                hello.protocol_max,
                PROTOCOL.start(),
                PROTOCOL.end(),
            );
            return (hub, vec![goodbye(Reason::Version, message)]);
        }
        for digest in &hello.digests {
            // A digest that cannot be read leaves the collection unknown, and so its inventory is asked for.
            if let (Some(order), Some(value)) = (rank(digest.collection()), Digest::from_wire(digest)) {
                hub.collections[order].knowledge = Knowledge::Digest(value);
            }
        }
        let protocol = hello.protocol_max.min(*PROTOCOL.end());
        let dictionaries = vec![dictionary::ID];
        let welcome = wire::Welcome { protocol, epoch, server_time, agent: agent.to_owned(), dictionaries };
        (hub, vec![send(Body::Welcome(welcome))])
    }

    /// Asks for the edge's inventory of a collection whatever its digest says.
    pub fn ask(&mut self, collection: Collection) -> Vec<HubOutput> {
        match rank(collection) {
            Some(order) if !self.closed => self.request_inventory(order).into_iter().collect(),
            _ => Vec::new(),
        }
    }

    /// Whether the edge has seen later changes than [`HubInput::Reached`] has told of: until they are reached, nothing is sent but what
    /// finds out whether both sides agree all the same.
    pub fn is_behind(&self) -> bool {
        self.freshness.is_behind()
    }

    /// Whether the edge acknowledged everything and its digests agree; see [`HubOutput::InSync`].
    pub fn is_in_sync(&self) -> bool {
        self.in_sync
    }

    /// What the edge still lacks, as far as it was compared.
    pub fn backlog(&self) -> Backlog {
        let number = |of| u32::try_from(of).unwrap_or(u32::MAX);
        Backlog { waiting: number(self.dirty.len()), unacknowledged: number(self.in_flight_bytes) }
    }

    /// What came about since this was asked the last time.
    pub fn take_tally(&mut self) -> Tally {
        std::mem::take(&mut self.tally)
    }

    /// Has the edge report once more what it knows of an object.
    pub fn ask_report(&mut self, kind: ReportKind, uid: String) -> Vec<HubOutput> {
        if self.closed {
            return Vec::new();
        }
        vec![send(Body::ReportRequest(wire::ReportRequest { kind: kind.into(), uid }))]
    }

    /// Takes an input at a time.
    pub fn step(&mut self, now: Duration, input: HubInput) -> Vec<HubOutput> {
        let mut out = Vec::new();
        if self.closed {
            return out;
        }
        match input {
            HubInput::Frame(frame) => {
                self.last_heard = now;
                if let Err(violation) = self.frame(frame, &mut out) {
                    self.closed = true;
                    out.push(goodbye(Reason::Protocol, violation));
                    return out;
                }
            }
            HubInput::Heard => {
                self.last_heard = now;
                return out;
            }
            HubInput::Desired(object) => self.want(object.collection, Desired::Object(object)),
            HubInput::Keep(collection, entry) => self.want(collection, Desired::Version(Box::new(entry))),
            HubInput::Gone(collection, uid) => {
                if let Some(order) = rank(collection) {
                    let before = self.collections[order].wanted_version(&uid);
                    self.collections[order].unwant(&uid);
                    let is_superseded = self.requeue(order, uid) && before.is_some();
                    self.tally.superseded += u32::from(is_superseded);
                }
            }
            HubInput::Complete(collection) => {
                if let Some(order) = rank(collection) {
                    self.collections[order].complete = true;
                    out.extend(self.compare(order));
                }
            }
            HubInput::Newest(collection, revision) => {
                if let Some(order) = rank(collection) {
                    self.freshness.newest(order, revision);
                }
            }
            HubInput::Reached(collection, revision) => {
                if let Some(order) = rank(collection) {
                    self.catch_up(|freshness| freshness.reached(order, revision), &mut out);
                }
            }
            HubInput::Restored => self.catch_up(Freshness::disregard, &mut out),
            HubInput::Reported { id, refused } => {
                if self.forget_report(id) {
                    out.push(send(Body::ReportAck(wire::ReportAck { id, refused })));
                }
            }
            HubInput::ReportLater { id, after } => {
                if self.forget_report(id) {
                    let after_ms = u32::try_from(after.as_millis()).unwrap_or(u32::MAX);
                    out.push(send(Body::ReportLater(wire::ReportLater { id, after_ms })));
                }
            }
            HubInput::Timeout => {
                if now >= self.next_timeout() {
                    self.closed = true;
                    return vec![HubOutput::Close(None)];
                }
            }
        }
        self.pump(&mut out);
        out
    }

    /// When [`HubInput::Timeout`] is due.
    pub fn next_timeout(&self) -> Duration {
        self.last_heard + DEAD_AFTER
    }

    fn frame(&mut self, frame: Frame, out: &mut Vec<HubOutput>) -> Result<(), String> {
        match frame.body {
            Some(Body::Inventory(part)) => self.inventory(part, out),
            Some(Body::Ack(wire::Ack { seq })) => {
                if seq < self.acked_seq || seq > self.sent_seq {
                    return Err(format!(
                        "ack of {seq}, but {} to {} are unacknowledged",
                        self.acked_seq, self.sent_seq
                    ));
                }
                self.acked_seq = seq;
                while let Some(first) = self.in_flight.front().filter(|first| first.seq <= seq) {
                    self.in_flight_bytes -= first.bytes;
                    self.tally.acknowledged += u32::from(first.change.is_some());
                    self.in_flight.pop_front();
                }
                if self.in_flight.is_empty() {
                    // Most sessions are idle most of the time: they keep no room for what they once had on its way.
                    self.in_flight = VecDeque::new();
                }
                Ok(())
            }
            Some(Body::Report(report)) => self.report(report, out),
            Some(Body::Ping(wire::Ping { token })) => {
                out.push(send(Body::Pong(wire::Pong { token })));
                Ok(())
            }
            Some(Body::Goodbye(_)) => {
                self.closed = true;
                out.push(HubOutput::Close(None));
                Ok(())
            }
            // A frame of a kind that is not known here comes from a newer edge, which can do without an answer.
            Some(Body::Pong(_)) | None => Ok(()),
            Some(Body::Hello(_)) => Err("a second hello".to_owned()),
            Some(body) if body.is_control() => Err("a frame that only the cloud sends".to_owned()),
            Some(_) => Err("a frame that is not of the control class".to_owned()),
        }
    }

    fn report(&mut self, report: wire::Report, out: &mut Vec<HubOutput>) -> Result<(), String> {
        if [&report.namespace, &report.name, &report.uid].iter().any(|name| name.len() > MAX_NAME) {
            return Err(format!("a report with a name of more than {MAX_NAME} bytes"));
        }
        if decoded_size(report.encoding(), &report.payload).is_some_and(|size| size > MAX_REPORT) {
            self.tally.refused += 1;
            let refused = format!("a report of more than {MAX_REPORT} bytes");
            out.push(send(Body::ReportAck(wire::ReportAck { id: report.id, refused })));
            return Ok(());
        }
        let payload = decode_within(MAX_REPORT, report.encoding(), &report.payload)
            .map_err(|error| format!("report {} cannot be read: {error}", report.id))?;
        if self.reports.len() >= REPORT_WINDOW {
            return Err(format!("more than {REPORT_WINDOW} reports at once"));
        }
        if self.reports.contains(&report.id) {
            return Err(format!("report {} sent twice", report.id));
        }
        let kind = report.kind();
        if kind == ReportKind::Unspecified {
            self.tally.refused += 1;
            let refused = "a kind of report that this cloudcore does not know".to_owned();
            out.push(send(Body::ReportAck(wire::ReportAck { id: report.id, refused })));
            return Ok(());
        }
        self.reports.push(report.id);
        let wire::Report { id, namespace, name, uid, .. } = report;
        out.push(HubOutput::Report(Report {
            id,
            kind,
            namespace,
            name,
            uid,
            payload: payload.into_boxed_slice().into(),
        }));
        Ok(())
    }

    /// Answers whether the report was one that was not answered yet.
    fn forget_report(&mut self, id: u64) -> bool {
        let at = self.reports.iter().position(|waiting| *waiting == id);
        at.map(|at| self.reports.swap_remove(at)).is_some()
    }

    /// Notes what the edge should hold of one UID.
    fn want(&mut self, collection: Collection, desired: Desired) {
        let Some(order) = rank(collection) else { return };
        let uid = desired.uid().to_owned();
        let (before, after) = (self.collections[order].wanted_version(&uid), desired.version());
        self.collections[order].want(desired);
        let is_superseded = self.requeue(order, uid) && before != after;
        self.tally.superseded += u32::from(is_superseded);
    }

    /// Compares everything once what the edge has seen is reached.
    fn catch_up(&mut self, by: impl FnOnce(&mut Freshness), out: &mut Vec<HubOutput>) {
        let was_behind = self.is_behind();
        by(&mut self.freshness);
        if was_behind && !self.is_behind() {
            for order in 0..COLLECTIONS.len() {
                if self.collections[order].complete {
                    out.extend(self.compare(order));
                }
            }
        }
    }

    /// Puts a row in the queue, or takes it out, according to its difference. Answers whether it was there.
    fn requeue(&mut self, order: usize, uid: String) -> bool {
        let held = &self.collections[order];
        let ready = held.complete && matches!(held.knowledge, Knowledge::Rows) && !self.is_behind();
        let upsert = Turn { delete: false, order, uid };
        let delete = Turn { delete: true, order: COLLECTIONS.len() - order, uid: upsert.uid.clone() };
        let was_queued = self.dirty.remove(&upsert) | self.dirty.remove(&delete);
        if ready && let Some(row) = held.row(&upsert.uid).filter(|row| !row.agrees()) {
            self.dirty.insert(if row.desired.version().is_some() { upsert } else { delete });
        }
        was_queued
    }

    /// Compares a collection that is complete with what is known of the edge, and asks when that is not enough.
    fn compare(&mut self, order: usize) -> Option<HubOutput> {
        let held = &mut self.collections[order];
        if let Knowledge::Digest(digest) = held.knowledge {
            if digest == held.wanted {
                held.agree();
                held.knowledge = Knowledge::Rows;
                // Said once even if there is nothing to send: an edge with a new store learns from it that it may trust an empty list.
                held.unchecked = COLLECTIONS[order] == Collection::Pods;
            } else if digest.count == 0 {
                held.knowledge = Knowledge::Rows;
            }
        }
        match held.knowledge {
            Knowledge::None | Knowledge::Digest(_) if !self.freshness.is_behind() => self.request_inventory(order),
            // What differs while it is behind may well agree once it is not.
            Knowledge::None | Knowledge::Digest(_) | Knowledge::Asked(_) => None,
            Knowledge::Rows => {
                for uid in held.uids() {
                    self.requeue(order, uid);
                }
                None
            }
        }
    }

    fn request_inventory(&mut self, order: usize) -> Option<HubOutput> {
        let held = &mut self.collections[order];
        if matches!(held.knowledge, Knowledge::Asked(_)) {
            return None;
        }
        held.knowledge = Knowledge::Asked(Parts::default());
        let request = wire::InventoryRequest { collection: COLLECTIONS[order].into() };
        Some(send(Body::InventoryRequest(request)))
    }

    fn inventory(&mut self, part: wire::Inventory, out: &mut Vec<HubOutput>) -> Result<(), String> {
        let collection = part.collection();
        let order = rank(collection).ok_or("an inventory of an unknown collection")?;
        if part.seq > self.sent_seq {
            return Err(format!("an inventory as of {}, but only {} were sent", part.seq, self.sent_seq));
        }
        let held = &mut self.collections[order];
        // An edge whose digest check failed sends its inventory unasked.
        let mut parts = match std::mem::take(&mut held.knowledge) {
            Knowledge::Asked(parts) => parts,
            Knowledge::None | Knowledge::Digest(_) | Knowledge::Rows => Parts::default(),
        };
        if part.entries.iter().any(|entry| entry.key.len() > MAX_NAME || entry.uid.len() > MAX_NAME) {
            return Err(format!("an inventory with a name of more than {MAX_NAME} bytes"));
        }
        parts.names += part.entries.iter().map(|entry| entry.key.len() + entry.uid.len()).sum::<usize>();
        parts.entries.extend(part.entries.into_iter().map(|wire::Entry { key, uid, version }| Entry {
            key,
            uid,
            version,
        }));
        let (rows, bytes) = max_inventory(collection);
        if parts.entries.len() > rows {
            return Err(format!("an inventory of more than {rows} rows"));
        }
        if parts.names > bytes {
            return Err(format!("an inventory with more than {bytes} bytes of names"));
        }
        if !part.last {
            held.knowledge = Knowledge::Asked(parts);
            return Ok(());
        }
        held.knowledge = Knowledge::Rows;
        held.set_all_held(&parts.entries);
        // What was sent after the edge took the inventory is on its way.
        for sent in self.in_flight.iter().filter(|sent| sent.seq > part.seq) {
            if let Some((at, uid, change)) = &sent.change
                && *at == order
            {
                held.set_held(uid, change.as_ref());
            }
        }
        held.forget_needless();
        out.push(HubOutput::Inventory(collection, parts.entries));
        if self.collections[order].complete {
            out.extend(self.compare(order));
        }
        Ok(())
    }

    /// Sends what differs as far as the window allows, then the digests of what was sent, then says whether all is in sync.
    fn pump(&mut self, out: &mut Vec<HubOutput>) {
        if self.closed {
            return;
        }
        let mut lacking = BTreeSet::new();
        while self.in_flight.is_empty() || self.in_flight_bytes < WINDOW {
            let Some(turn) = self.dirty.pop_first() else { break };
            let order = if turn.delete { COLLECTIONS.len() - turn.order } else { turn.order };
            let uid = turn.uid;
            let Some(row) = self.collections[order].row(&uid) else { continue };
            let (frame, change) = match &row.desired {
                Desired::Object(object) => {
                    let mut upsert = wire::Upsert {
                        seq: self.sent_seq + 1,
                        collection: object.collection.into(),
                        key: object.entry.key.clone(),
                        uid: uid.clone(),
                        version: object.entry.version,
                        revisions: self.freshness.untold(),
                        ..wire::Upsert::default()
                    };
                    // What the edge holds once it has applied everything sent is what it will hold when this arrives.
                    match &object.delta {
                        Some(delta) if row.held == Some(delta.base) => {
                            (upsert.base, upsert.delta) = (delta.base, delta.payload.clone());
                        }
                        Some(_) | None => {
                            let (encoding, full) = object.whole(self.dictionary);
                            upsert.set_encoding(encoding);
                            upsert.full = full;
                        }
                    }
                    (Body::Upsert(upsert), Some(object.entry.clone()))
                }
                Desired::Version(_) => {
                    lacking.insert(order);
                    continue;
                }
                Desired::Nothing(_) => {
                    let (seq, collection) = (self.sent_seq + 1, COLLECTIONS[order].into());
                    let revisions = self.freshness.untold();
                    (Body::Delete(wire::Delete { seq, collection, uid: uid.clone(), revisions }), None)
                }
            };
            let held = &mut self.collections[order];
            held.set_held(&uid, change.as_ref());
            held.unchecked = true;
            self.transmit(frame, Some((order, uid, change)), out);
        }
        for order in lacking {
            out.push(HubOutput::Inventory(COLLECTIONS[order], self.collections[order].held_entries()));
        }
        if self.dirty.is_empty() {
            // An empty set keeps the room of a few.
            self.dirty = BTreeSet::new();
            for (order, collection) in COLLECTIONS.into_iter().enumerate() {
                let held = &mut self.collections[order];
                held.forget_deleted();
                if std::mem::take(&mut held.unchecked) {
                    let digest = Some(held.held.to_wire(collection));
                    let check = wire::DigestCheck { seq: self.sent_seq + 1, digest };
                    self.transmit(Body::DigestCheck(check), None, out);
                }
            }
        }
        let in_sync = self.dirty.is_empty()
            && self.in_flight.is_empty()
            && self
                .collections
                .iter()
                .all(|held| held.complete && matches!(held.knowledge, Knowledge::Rows) && held.held == held.wanted);
        if in_sync && !self.in_sync {
            out.push(HubOutput::InSync);
        }
        self.in_sync = in_sync;
    }

    fn transmit(&mut self, body: Body, change: Option<(usize, String, Option<Entry>)>, out: &mut Vec<HubOutput>) {
        self.sent_seq += 1;
        let frame = Frame { body: Some(body) };
        let bytes = frame.encoded_len();
        self.in_flight_bytes += bytes;
        self.in_flight.push_back(InFlight { seq: self.sent_seq, bytes, change });
        out.push(HubOutput::Send(frame));
    }
}

fn send(body: Body) -> HubOutput {
    HubOutput::Send(Frame { body: Some(body) })
}

fn goodbye(reason: Reason, message: String) -> HubOutput {
    HubOutput::Close(Some(wire::Goodbye { reason: reason.into(), message, retry_after_ms: 0 }))
}
