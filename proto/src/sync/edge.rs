//! The edge's side of the link: outlives sessions, lives as long as the store is open.
//!
//! It knows of every row of the store its name and version, no more. It applies what the cloud sends in order, acknowledges what is
//! durable, keeps a digest for each collection, and drains the outbox.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::outbox::Outbox;
use super::revisions::{self, Revisions};
use super::{
    ANSWER_DUE, COLLECTIONS, DEAD_AFTER, DOUBT_PACE, Delta, Digest, Encoding, Entry, INVENTORY_PART, MAX_NAME, Object,
    PING_AFTER, PROTOCOL, Report, decode, encode, rank,
};
use crate::dictionary;
use crate::wire::{self, Collection, Frame, ReportKind, frame::Body, goodbye::Reason};

/// Why an event is given up.
pub(super) const TOO_MANY_EVENTS: &str = "the apiserver has not taken it for a day, or too many others neither";

/// Durable changes that are acknowledged at the latest, though more of them are on their way to the disk.
const ACK_EVERY: u64 = 16;

/// The edge's side of the link.
#[derive(Debug)]
pub struct Edge {
    node: String,
    run_id: String,
    store_id: String,
    agent: String,
    last_epoch: u64,
    collections: [Rows; COLLECTIONS.len()],
    revisions: Revisions,
    outbox: Outbox,
    /// Names the next [`EdgeOutput::Apply`]; goes on over sessions, so that a commit that ends late acknowledges nothing of another.
    next_ticket: u64,
    session: Option<Session>,
}

/// One change of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Insert or replace the row of this UID. The payload is decoded.
    Upsert(Object),
    /// Replace the row of this UID, which holds the delta's base, by what the delta makes of it; the version is that one's fingerprint. If
    /// it does not fit, the row is to be given the version 0, which no object has, and a new [`Edge`] made: the cloud then sends the whole.
    Patch(Collection, Entry, Delta),
    /// Remove the row of this UID.
    Delete(Collection, String),
}

/// What happens to an edge.
#[derive(Debug)]
pub enum EdgeInput {
    /// A connection stands: say Hello.
    Connected,
    /// A frame of the cloud's.
    Frame(Frame),
    /// Something else of the cloud's: a part of a frame, data of a stream.
    Heard,
    /// The batch of this ticket, and every one before it, is durable.
    Committed {
        /// [`EdgeOutput::Apply`]'s `ticket`.
        ticket: u64,
    },
    /// The outbox holds this report, new or left from before a restart; each once, of the same thing in order of id.
    Report(Report),
    /// The way to the cloud may be another one by now: a ping goes at once, and the session ends if nothing is heard soon.
    Doubt,
    /// The connection is gone.
    Disconnected,
    /// The time of [`Edge::next_timeout`] has come.
    Timeout,
}

/// What an edge wants done, in order.
#[derive(Debug)]
pub enum EdgeOutput {
    /// Send this.
    Send(Frame),
    /// The session stands. Store the epoch.
    Established {
        /// The session's epoch.
        epoch: u64,
        /// The cloud's clock, Unix milliseconds.
        server_time: u64,
    },
    /// Write these and [`Edge::revisions`] to the store in one transaction, then answer [`EdgeInput::Committed`]. If that fails, make a
    /// new [`Edge`] from what the store holds: this one is ahead of it.
    Apply {
        /// In order.
        ops: Vec<Op>,
        /// Names this batch.
        ticket: u64,
    },
    /// The cloud has taken (`refused` empty) or refused the report, or has given it back for too long: remove it from the outbox.
    Reported {
        /// The report's id.
        id: u64,
        /// Why it was refused; empty if it was taken.
        refused: String,
    },
    /// The cloud does not see what was reported of this object any more: it is to be reported once more.
    ReportWanted {
        /// A pod's status or the node's.
        kind: ReportKind,
        /// UID of the pod or Node.
        uid: String,
    },
    /// A digest check agreed: what the store holds of this collection is what the cloud wants.
    InSync(Collection),
    /// End the connection; if `Some`, send this Goodbye first.
    Close(Option<wire::Goodbye>),
    /// The cloud ended the session and said why. A [`EdgeOutput::Close`] follows.
    Dismissed(wire::Goodbye),
}

#[derive(Debug, Default)]
struct Rows {
    rows: BTreeMap<String, (String, u64)>,
    digest: Digest,
}

#[derive(Debug)]
struct Session {
    established: bool,
    /// The cloud has the dictionary.
    dictionary: bool,
    /// The last sequence number applied.
    seq: u64,
    acked: u64,
    /// Batches on their way to the disk, and what becomes acknowledgeable when they are there.
    pending: VecDeque<(u64, u64)>,
    last_heard: Duration,
    last_sent: Duration,
    last_ping: Duration,
    pings: u64,
    last_doubt: Option<Duration>,
    /// When something must have been heard since the last doubt; `None` when it was.
    answer_due: Option<Duration>,
}

impl Edge {
    /// An edge whose store holds `rows`.
    pub fn new(
        node: &str,
        run_id: &str,
        store_id: &str,
        agent: &str,
        last_epoch: u64,
        rows: impl IntoIterator<Item = (Collection, Entry)>,
    ) -> Self {
        let mut edge = Self {
            node: node.to_owned(),
            run_id: run_id.to_owned(),
            store_id: store_id.to_owned(),
            agent: agent.to_owned(),
            last_epoch,
            collections: Default::default(),
            revisions: Revisions::default(),
            outbox: Outbox::default(),
            next_ticket: 1,
            session: None,
        };
        for (collection, entry) in rows {
            if let Some(order) = rank(collection) {
                edge.collections[order].set(&entry.uid, Some((entry.key, entry.version)));
            }
        }
        edge
    }

    /// This, whose store holds these [`Edge::revisions`].
    #[must_use]
    pub fn with_revisions(mut self, stored: impl IntoIterator<Item = (Collection, u64)>) -> Self {
        for (collection, newest) in stored {
            if let Some(order) = rank(collection) {
                self.revisions[order] = newest;
            }
        }
        self
    }

    /// How new what it holds may be: the apiserver's revision of each collection. A replica of the cloud that has not come as far waits
    /// with what it has to say. It belongs to the rows: stored with them, and lost and restored with them.
    pub fn revisions(&self) -> impl Iterator<Item = (Collection, u64)> {
        COLLECTIONS.into_iter().zip(self.revisions).filter(|(_, newest)| *newest > 0)
    }

    /// Bytes of reports, of events or of all others, that wait to be sent or to be answered: none of what the cloud has given back.
    pub fn waiting_bytes(&self, events: bool) -> usize {
        self.outbox.bytes(events)
    }

    /// What its reports wait in, for tests to break.
    #[cfg(test)]
    pub(super) const fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Loses a row unnoticed: what no edge should.
    #[cfg(test)]
    pub(super) fn lose(&mut self, order: usize, uid: &str) {
        self.collections[order].set(uid, None);
    }

    /// Takes an input at a time.
    pub fn step(&mut self, now: Duration, input: EdgeInput) -> Vec<EdgeOutput> {
        let mut out = Vec::new();
        match input {
            EdgeInput::Connected => self.connected(now, &mut out),
            EdgeInput::Frame(frame) => {
                let Some(session) = &mut self.session else { return out };
                session.heard(now);
                if let Err(violation) = self.frame(now, frame, &mut out) {
                    self.session = None;
                    let reason = Reason::Protocol.into();
                    out.push(EdgeOutput::Close(Some(wire::Goodbye { reason, message: violation, retry_after_ms: 0 })));
                }
            }
            EdgeInput::Heard => {
                if let Some(session) = &mut self.session {
                    session.heard(now);
                }
            }
            EdgeInput::Committed { ticket } => self.committed(ticket, &mut out),
            EdgeInput::Report(report) => self.outbox.push(now, report),
            EdgeInput::Doubt => {
                if let Some(session) = &mut self.session {
                    session.doubt(now, &mut out);
                }
            }
            EdgeInput::Disconnected => self.session = None,
            EdgeInput::Timeout => self.timeout(now, &mut out),
        }
        self.drain(now, &mut out);
        if let Some(session) = &mut self.session
            && out.iter().any(|output| matches!(output, EdgeOutput::Send(_)))
        {
            session.last_sent = now;
        }
        out
    }

    /// When [`EdgeInput::Timeout`] is due; `None` without a connection.
    pub fn next_timeout(&self) -> Option<Duration> {
        self.session.as_ref().map(|session| {
            let dead = session.dead();
            if !session.established {
                return dead;
            }
            session.ping_due().min(dead).min(self.outbox.due().unwrap_or(dead))
        })
    }

    fn connected(&mut self, now: Duration, out: &mut Vec<EdgeOutput>) {
        self.outbox.begin_again();
        self.session = Some(Session {
            established: false,
            dictionary: false,
            seq: 0,
            acked: 0,
            pending: VecDeque::new(),
            last_heard: now,
            last_sent: now,
            last_ping: now,
            pings: 0,
            last_doubt: None,
            answer_due: None,
        });
        let digests = COLLECTIONS.into_iter().zip(&self.collections);
        out.push(send(Body::Hello(wire::Hello {
            protocol_min: *PROTOCOL.start(),
            protocol_max: *PROTOCOL.end(),
            node: self.node.clone(),
            run_id: self.run_id.clone(),
            store_id: self.store_id.clone(),
            last_epoch: self.last_epoch,
            digests: digests.map(|(collection, rows)| rows.digest.to_wire(collection)).collect(),
            agent: self.agent.clone(),
            dictionaries: vec![dictionary::ID],
            revisions: self
                .revisions()
                .map(|(collection, newest)| wire::Revision { collection: collection.into(), newest })
                .collect(),
        })));
    }

    fn timeout(&mut self, now: Duration, out: &mut Vec<EdgeOutput>) {
        let Some(session) = &mut self.session else { return };
        if now >= session.dead() {
            self.session = None;
            out.push(EdgeOutput::Close(None));
        } else if session.established && now >= session.ping_due() {
            session.ping(now, out);
        }
    }

    fn frame(&mut self, now: Duration, frame: Frame, out: &mut Vec<EdgeOutput>) -> Result<(), String> {
        let Some(session) = &mut self.session else { return Ok(()) };
        match frame.body {
            Some(Body::Goodbye(goodbye)) => {
                self.session = None;
                out.extend([EdgeOutput::Dismissed(goodbye), EdgeOutput::Close(None)]);
                Ok(())
            }
            Some(Body::Welcome(welcome)) => {
                if session.established {
                    return Err("a second welcome".to_owned());
                }
                if !PROTOCOL.contains(&welcome.protocol) {
                    return Err(format!(
                        "{} chose protocol {}, {} speaks {} to {} and offered no other",
                        welcome.agent,
                        welcome.protocol,
                        self.agent,
                        PROTOCOL.start(),
                        PROTOCOL.end(),
                    ));
                }
                if welcome.epoch <= self.last_epoch {
                    return Err(format!("epoch {} is not newer than {}", welcome.epoch, self.last_epoch));
                }
                session.established = true;
                session.dictionary = welcome.dictionaries.contains(&dictionary::ID);
                self.last_epoch = welcome.epoch;
                out.push(EdgeOutput::Established { epoch: welcome.epoch, server_time: welcome.server_time });
                Ok(())
            }
            _ if !session.established => Err("a frame before the welcome".to_owned()),
            Some(Body::Upsert(upsert)) => self.upsert(upsert, out),
            Some(Body::Delete(delete)) => {
                let collection = delete.collection();
                let order = rank(collection).ok_or("a delete in an unknown collection")?;
                session.advance(delete.seq)?;
                revisions::note(&mut self.revisions, &delete.revisions);
                self.collections[order].set(&delete.uid, None);
                self.apply(Op::Delete(collection, delete.uid), out);
                Ok(())
            }
            Some(Body::DigestCheck(check)) => self.digest_check(&check, out),
            Some(Body::InventoryRequest(request)) => {
                let order = rank(request.collection()).ok_or("a request for an unknown collection")?;
                let seq = session.seq;
                self.inventory(order, seq, out);
                Ok(())
            }
            Some(Body::ReportAck(ack)) => {
                self.outbox.answered(ack.id)?;
                out.push(EdgeOutput::Reported { id: ack.id, refused: ack.refused });
                Ok(())
            }
            Some(Body::ReportLater(later)) => {
                if let Some(id) = self.outbox.give_back(now, later.id, Duration::from_millis(later.after_ms.into()))? {
                    out.push(EdgeOutput::Reported { id, refused: TOO_MANY_EVENTS.to_owned() });
                }
                Ok(())
            }
            Some(Body::ReportRequest(request)) => {
                out.push(EdgeOutput::ReportWanted { kind: request.kind(), uid: request.uid });
                Ok(())
            }
            Some(Body::Ping(wire::Ping { token })) => {
                out.push(send(Body::Pong(wire::Pong { token })));
                Ok(())
            }
            // A frame of a kind that is not known here comes from a newer cloud, which can do without an answer.
            Some(Body::Pong(_)) | None => Ok(()),
            Some(body) if body.is_control() => Err("a frame that only the edge sends".to_owned()),
            Some(_) => Err("a frame that is not of the control class".to_owned()),
        }
    }

    fn upsert(&mut self, upsert: wire::Upsert, out: &mut Vec<EdgeOutput>) -> Result<(), String> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let collection = upsert.collection();
        let order = rank(collection).ok_or("an object of an unknown collection")?;
        if upsert.uid.is_empty() || upsert.key.is_empty() {
            return Err("an object without a name or a UID".to_owned());
        }
        if upsert.uid.len() > MAX_NAME || upsert.key.len() > MAX_NAME {
            return Err(format!("an object with a name of more than {MAX_NAME} bytes"));
        }
        if !upsert.delta.is_empty() {
            return self.delta(order, upsert, out);
        }
        let payload = decode(upsert.encoding(), &upsert.full)
            .map_err(|error| format!("{} cannot be read: {error}", upsert.key))?;
        serde_json::from_slice::<serde::de::IgnoredAny>(&payload)
            .map_err(|error| format!("{} is not JSON: {error}", upsert.key))?;
        session.advance(upsert.seq)?;
        revisions::note(&mut self.revisions, &upsert.revisions);
        let wire::Upsert { key, uid, version, .. } = upsert;
        self.collections[order].set(&uid, Some((key.clone(), version)));
        let entry = Entry { key, uid, version };
        let (encoding, payload) = (Encoding::Raw, payload.into());
        self.apply(Op::Upsert(Object { collection, entry, encoding, payload, delta: None }), out);
        Ok(())
    }

    fn delta(&mut self, order: usize, upsert: wire::Upsert, out: &mut Vec<EdgeOutput>) -> Result<(), String> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let wire::Upsert { seq, key, uid, version, delta, base, revisions, .. } = upsert;
        if self.collections[order].rows.get(&uid).is_none_or(|(_, held)| *held != base) {
            return Err(format!("a delta of {key} against a version that is not held"));
        }
        session.advance(seq)?;
        revisions::note(&mut self.revisions, &revisions);
        self.collections[order].set(&uid, Some((key.clone(), version)));
        let op = Op::Patch(COLLECTIONS[order], Entry { key, uid, version }, Delta { base, payload: delta });
        self.apply(op, out);
        Ok(())
    }

    fn apply(&mut self, op: Op, out: &mut Vec<EdgeOutput>) {
        let Some(session) = &mut self.session else { return };
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        session.pending.push_back((ticket, session.seq));
        // What one step brings forth goes to the disk together.
        match out.last_mut() {
            Some(EdgeOutput::Apply { ops, ticket: last }) => {
                ops.push(op);
                *last = ticket;
            }
            _ => out.push(EdgeOutput::Apply { ops: vec![op], ticket }),
        }
    }

    fn digest_check(&mut self, check: &wire::DigestCheck, out: &mut Vec<EdgeOutput>) -> Result<(), String> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let digest = check.digest.as_ref().ok_or("a digest check without a digest")?;
        let order = rank(digest.collection()).ok_or("a digest of an unknown collection")?;
        let expected = Digest::from_wire(digest).ok_or("a digest that is not 16 bytes long")?;
        session.advance(check.seq)?;
        let seq = session.seq;
        match session.pending.back_mut() {
            Some((_, last)) => *last = seq,
            None => session.acknowledge(seq, out),
        }
        if self.collections[order].digest == expected {
            out.push(EdgeOutput::InSync(COLLECTIONS[order]));
        } else {
            // Before the Ack, so that the cloud does not take the collection for settled.
            let acks =
                out.iter().position(|output| matches!(output, EdgeOutput::Send(Frame { body: Some(Body::Ack(_)) })));
            let mut inventory = Vec::new();
            self.inventory(order, seq, &mut inventory);
            let at = acks.unwrap_or(out.len());
            out.splice(at..at, inventory);
        }
        Ok(())
    }

    fn inventory(&self, order: usize, seq: u64, out: &mut Vec<EdgeOutput>) {
        let rows = &self.collections[order].rows;
        let entries: Vec<wire::Entry> = rows
            .iter()
            .map(|(uid, (key, version))| wire::Entry { key: key.clone(), uid: uid.clone(), version: *version })
            .collect();
        let collection = COLLECTIONS[order].into();
        let parts = entries.len().div_ceil(INVENTORY_PART).max(1);
        for part in 0..parts {
            let from = part * INVENTORY_PART;
            let to = entries.len().min(from + INVENTORY_PART);
            let entries = entries[from..to].to_vec();
            out.push(send(Body::Inventory(wire::Inventory { collection, entries, last: part + 1 == parts, seq })));
        }
    }

    fn committed(&mut self, ticket: u64, out: &mut Vec<EdgeOutput>) {
        let Some(session) = &mut self.session else { return };
        let mut durable = session.acked;
        while let Some(&(_, seq)) = session.pending.front().filter(|(first, _)| *first <= ticket) {
            durable = seq;
            session.pending.pop_front();
        }
        if durable > session.acked && (session.pending.is_empty() || durable - session.acked >= ACK_EVERY) {
            session.acknowledge(durable, out);
        } else if durable > session.acked {
            // Remembered in front, so that the next commit acknowledges it too.
            session.pending.push_front((ticket, durable));
        }
    }

    /// Sends as many reports as may be on their way at once.
    fn drain(&mut self, now: Duration, out: &mut Vec<EdgeOutput>) {
        let Some(session) = self.session.as_ref().filter(|session| session.established) else { return };
        while let Some(report) = self.outbox.send_next(now) {
            let small = if session.dictionary { dictionary::compress_once(&report.payload) } else { None };
            let (encoding, payload) = match small {
                Some(small) => (Encoding::ZstdDictionary, small.into()),
                None => encode(&report.payload),
            };
            out.push(send(Body::Report(wire::Report {
                id: report.id,
                kind: report.kind.into(),
                namespace: report.namespace.clone(),
                name: report.name.clone(),
                uid: report.uid.clone(),
                encoding: encoding.into(),
                payload,
            })));
        }
    }
}

impl Rows {
    fn set(&mut self, uid: &str, value: Option<(String, u64)>) {
        let entry = |(key, version): &(String, u64)| Entry { key: key.clone(), uid: uid.to_owned(), version: *version };
        if let Some(old) = self.rows.remove(uid) {
            self.digest.remove(&entry(&old));
        }
        if let Some(new) = value {
            self.digest.insert(&entry(&new));
            self.rows.insert(uid.to_owned(), new);
        }
    }
}

impl Session {
    fn advance(&mut self, seq: u64) -> Result<(), String> {
        if seq != self.seq + 1 {
            return Err(format!("sequence number {seq} after {}", self.seq));
        }
        self.seq = seq;
        Ok(())
    }

    fn acknowledge(&mut self, seq: u64, out: &mut Vec<EdgeOutput>) {
        self.acked = seq;
        out.push(send(Body::Ack(wire::Ack { seq })));
    }

    fn heard(&mut self, now: Duration) {
        self.last_heard = now;
        self.answer_due = None;
    }

    fn doubt(&mut self, now: Duration, out: &mut Vec<EdgeOutput>) {
        // A machine whose network never rests shall not talk all the time.
        if !self.established || self.last_doubt.is_some_and(|last| now < last + DOUBT_PACE) {
            return;
        }
        self.last_doubt = Some(now);
        self.answer_due = Some(now + ANSWER_DUE);
        self.ping(now, out);
    }

    fn ping(&mut self, now: Duration, out: &mut Vec<EdgeOutput>) {
        self.last_ping = now;
        self.pings += 1;
        out.push(send(Body::Ping(wire::Ping { token: self.pings })));
    }

    /// When it is over if nothing is heard.
    fn dead(&self) -> Duration {
        let dead = self.last_heard + DEAD_AFTER;
        self.answer_due.map_or(dead, |due| due.min(dead))
    }

    fn ping_due(&self) -> Duration {
        self.last_heard.min(self.last_sent).max(self.last_ping) + PING_AFTER
    }
}

fn send(body: Body) -> EdgeOutput {
    EdgeOutput::Send(Frame { body: Some(body) })
}
