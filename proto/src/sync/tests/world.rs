//! Everything between the machines: connections that lose, delay and end, the replicas and the node.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use prost::Message as _;

use super::cloud::{Apiserver, Replica, Session};
use super::desk::{Desk, NEIGHBOURS, NODE, Neighbour};
use super::mutations::Mutation;
use super::node::{self, Batch, Job, Node, Said};
use super::reports::{Ledger, subject_of};
use super::*;
use crate::sync::edge::TOO_MANY_EVENTS;
use crate::wire::{self, Frame, frame::Body};

/// Connections that are remembered, with what is still on its way on them.
const CONNECTIONS: usize = 4;

pub(super) struct World {
    pub(super) dice: Dice,
    pub(super) now: Duration,
    pub(super) mutation: Option<Mutation>,
    pub(super) apiserver: Apiserver,
    pub(super) replicas: Vec<Replica>,
    pub(super) node: Node,
    pub(super) connections: Vec<Connection>,
    /// The one that the node uses.
    pub(super) current: Option<u64>,
    next_connection: u64,
    /// The clocks of all replicas are the same. Only then a disk is replaced: who has forgotten its epoch may get one from a clock that is
    /// behind, and then a session that is half open writes once more what is older, is noticed, and written over.
    pub(super) same_clocks: bool,
    pub(super) ledger: Ledger,
    pub(super) neighbours: Vec<Neighbour>,
    /// Nothing goes wrong any more.
    pub(super) is_clear: bool,
}

/// One connection: what was sent arrives in order, at any time, or from some point on not at all.
pub(super) struct Connection {
    pub(super) id: u64,
    pub(super) replica: usize,
    pub(super) up: VecDeque<Frame>,
    pub(super) down: VecDeque<Frame>,
    /// What is sent this way is swallowed.
    pub(super) is_up_lost: bool,
    pub(super) is_down_lost: bool,
    /// The node, or the replica, has let go of it; the other one hears that behind what was sent.
    left_by_node: bool,
    left_by_hub: bool,
    /// Numbers of digest checks that were left out.
    left_out: Vec<u64>,
}

impl World {
    pub(super) fn new(seed: u64, mutation: Option<Mutation>) -> Self {
        let mut world = Self {
            dice: Dice::new(seed),
            now: Duration::ZERO,
            mutation,
            apiserver: Apiserver::default(),
            replicas: Vec::new(),
            node: Node::new(mutation),
            connections: Vec::new(),
            current: None,
            next_connection: 0,
            same_clocks: true,
            ledger: Ledger::default(),
            neighbours: Vec::new(),
            is_clear: false,
        };
        for _ in 0..world.dice.roll(12) {
            world.apiserver.create(&mut world.dice);
        }
        world.same_clocks = world.dice.one_in(2);
        for salt in 0..=world.dice.roll(3) {
            let skew = if world.same_clocks { 0 } else { world.dice.pick(&[0, 1000, 3_600_000]) };
            world.replicas.push(Replica::new(&world.apiserver).with_clock(skew, salt.try_into().unwrap()));
        }
        for who in 1..=NEIGHBOURS {
            let replica = world.dice.roll(world.replicas.len());
            world.neighbours.push(Neighbour::new(who, replica));
        }
        world
    }

    /// A new one, in which the neighbours have their sessions, too.
    pub(super) fn with_one_replica(&mut self) {
        self.replicas = vec![Replica::new(&self.apiserver)];
        self.neighbours = (1..=NEIGHBOURS).map(|who| Neighbour::new(who, 0)).collect();
    }

    pub(super) fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    pub(super) fn connection(&mut self, id: u64) -> Option<&mut Connection> {
        self.connections.iter_mut().find(|connection| connection.id == id)
    }

    /// The node dials, and gets to some replica.
    pub(super) fn connect(&mut self) {
        self.disconnect();
        // Nobody comes back faster than epochs rise.
        self.now += Duration::from_millis(10);
        self.next_connection += 1;
        let (id, replica) = (self.next_connection, self.dice.roll(self.replicas.len()));
        if self.connections.len() == CONNECTIONS {
            self.connections.remove(0);
        }
        self.connections.push(Connection {
            id,
            replica,
            up: VecDeque::new(),
            down: VecDeque::new(),
            is_up_lost: false,
            is_down_lost: false,
            left_by_node: false,
            left_by_hub: false,
            left_out: Vec::new(),
        });
        self.current = Some(id);
        self.node.agreed.clear();
        let outbox = self.node.edge.outbox();
        match self.mutation {
            Some(Mutation::ReportForgotten) => outbox.sent.clear(),
            Some(Mutation::OlderLast) => outbox.queued.extend(outbox.sent.drain(..).rev()),
            _ => {}
        }
        let out = self.node.edge.step(self.now, EdgeInput::Connected);
        self.edge_outputs(out);
    }

    /// The node lets go of its connection; what it sent may still arrive, and the end may not.
    pub(super) fn disconnect(&mut self) {
        let Some(id) = self.current.take() else { return };
        let is_heard = !self.dice.one_in(3);
        if let Some(connection) = self.connection(id) {
            connection.left_by_node = is_heard;
        }
        let out = self.node.edge.step(self.now, EdgeInput::Disconnected);
        assert!(out.is_empty());
    }

    fn hello(&mut self, at: usize, connection: u64, mut hello: wire::Hello) {
        self.end_session(at, Some(Reason::Superseded));
        let (of_own, now) = (self.is(Mutation::EpochOfOwn), self.now);
        let replica = &mut self.replicas[at];
        if of_own {
            (replica.known, replica.here.0, hello.last_epoch) = (0, 0, 0);
        }
        let (epoch, claims) = replica.epoch(hello.last_epoch, &hello.run_id, now);
        if self.is(Mutation::RevisionsIgnored) {
            hello.revisions.clear();
        }
        let (hub, out) = Hub::new(self.now, &hello, epoch, 0, "hub");
        let session = Session {
            connection,
            epoch,
            run: hello.run_id,
            claims,
            hub,
            untold: VecDeque::new(),
            told: BTreeMap::new(),
            desk: Desk::default(),
            taken: BTreeMap::new(),
            asked: BTreeSet::new(),
        };
        let too_early = self.is(Mutation::CompleteTooEarly);
        self.replicas[at].begin(session, &mut self.dice, too_early);
        self.hub_outputs(at, out);
        if self.is(Mutation::BeforeComplete) {
            COLLECTIONS.into_iter().for_each(|collection| self.say(at, HubInput::Complete(collection)));
        }
    }

    /// What the replica's watch of Nodes shows ends a session that another one has followed.
    pub(super) fn watch_node(&mut self, at: usize) {
        self.replicas[at].see_node(&self.apiserver);
        self.learn(at, self.apiserver.epoch);
    }

    fn learn(&mut self, at: usize, epoch: u64) {
        let replica = &mut self.replicas[at];
        replica.known = replica.known.max(epoch);
        if replica.session.as_ref().is_some_and(|session| session.epoch < replica.known) {
            self.end_session(at, Some(Reason::Superseded));
        }
    }

    /// A session that has to says on the Node that it has it, unless that names another one that is as new.
    pub(super) fn claim(&mut self, at: usize) {
        let replica = &mut self.replicas[at];
        let Some(session) = replica.session.as_mut().filter(|session| session.claims) else { return };
        if self.apiserver.epoch >= session.epoch {
            let newest = self.apiserver.epoch.max(session.epoch + 1);
            return self.learn(at, newest);
        }
        session.claims = false;
        (self.apiserver.epoch, self.apiserver.agent) = (session.epoch, session.run.clone());
        self.apiserver.statuses.entry(node::node()).or_default().version += 1;
        replica.has_claimed(&self.apiserver);
    }

    /// A session renews the lease, if it does not find a newer one's.
    pub(super) fn renew(&mut self, at: usize) {
        let Some(session) = &self.replicas[at].session else { return };
        let lease = self.apiserver.lease;
        if lease <= session.epoch {
            self.apiserver.lease = session.epoch;
        } else if !self.is(Mutation::RenewalsDropped) {
            self.learn(at, lease);
        }
    }

    /// The replica ends its session, if it has one.
    pub(super) fn end_session(&mut self, at: usize, reason: Option<Reason>) {
        let Some(session) = self.replicas[at].end() else { return };
        if let Some(connection) = self.connection(session.connection) {
            connection.left_by_hub = true;
            if let Some(reason) = reason {
                let goodbye = wire::Goodbye { reason: reason.into(), ..wire::Goodbye::default() };
                connection.down.push_back(Frame { body: Some(Body::Goodbye(goodbye)) });
            }
        }
    }

    pub(super) fn say(&mut self, at: usize, input: HubInput) {
        let Some(session) = &mut self.replicas[at].session else { return };
        let out = session.hub.step(self.now, input);
        self.hub_outputs(at, out);
    }

    pub(super) fn hub_outputs(&mut self, at: usize, out: Vec<HubOutput>) {
        for output in out {
            let Some(session) = &mut self.replicas[at].session else { return };
            match output {
                HubOutput::Send(mut frame) => {
                    if let Some(Body::Delete(delete)) = &frame.body {
                        let collection = delete.collection();
                        let is_complete =
                            |input: &HubInput| matches!(input, HubInput::Complete(of) if *of == collection);
                        assert!(!session.untold.iter().any(is_complete), "deleted before all was said that is to stay");
                    }
                    let connection = session.connection;
                    if self.is(Mutation::BaseUnheld)
                        && let Some(Body::Upsert(upsert)) = &mut frame.body
                        && let Some(delta) = self.replicas[at].delta(upsert)
                    {
                        (upsert.base, upsert.delta) = (delta.base, delta.payload);
                    }
                    let without_checks = self.is(Mutation::DigestUnsent);
                    if let Some(connection) = self.connection(connection)
                        && !(without_checks && connection.leaves_out(&mut frame))
                    {
                        connection.down.push_back(through_the_wire(&frame));
                    }
                }
                HubOutput::Inventory(collection, held) => self.replicas[at].answer(collection, &held),
                HubOutput::InSync => {
                    if self.current == Some(session.connection)
                        && session.untold.is_empty()
                        && self.node.batches().next().is_none()
                    {
                        assert_eq!(self.node.disk.rows, session.told, "in sync, but not the same");
                    }
                }
                HubOutput::Report(report) => {
                    let id = report.id;
                    self.receive(at, NODE, report);
                    if self.is(Mutation::ReportAckedEarly) {
                        self.say(at, HubInput::Reported { id, refused: String::new() });
                    }
                }
                HubOutput::Close(goodbye) => {
                    assert_eq!(goodbye, None, "no machine breaks the protocol");
                    return self.end_session(at, None);
                }
            }
        }
    }

    pub(super) fn edge_outputs(&mut self, out: Vec<EdgeOutput>) {
        self.outputs_of_frame(out, 0);
    }

    /// `seq` is the number of the change that brought them forth.
    fn outputs_of_frame(&mut self, out: Vec<EdgeOutput>, seq: u64) {
        for output in out {
            let Some(id) = self.current else { return };
            match output {
                EdgeOutput::Send(frame) => {
                    if let Some(Body::Ack(ack)) = &frame.body {
                        let mut written = self.node.batches().filter(|batch| batch.connection == id);
                        assert!(written.all(|batch| batch.seq > ack.seq), "acknowledged before it is durable");
                    }
                    let mut frame = through_the_wire(&frame);
                    if let Some(Body::Inventory(inventory)) = &mut frame.body
                        && self.mutation == Some(Mutation::InventoryCut)
                    {
                        inventory.entries.pop();
                    }
                    if let Some(connection) = self.connection(id) {
                        connection.up.push_back(frame);
                    }
                }
                EdgeOutput::Established { epoch, .. } => {
                    assert!(epoch > self.node.disk.epoch, "epochs rise");
                    self.node.disk.epoch = epoch;
                }
                EdgeOutput::Apply { ops, ticket } => {
                    let revisions = self.node.edge.revisions().collect();
                    self.node.jobs.push_back(Job::Apply(Batch { ticket, connection: id, seq, ops, revisions }));
                    if self.is(Mutation::AckBeforeCommit) {
                        let out = self.node.edge.step(self.now, EdgeInput::Committed { ticket });
                        self.edge_outputs(out);
                    }
                }
                EdgeOutput::Reported { id, refused } => {
                    let report = &self.node.given[&id];
                    if refused == TOO_MANY_EVENTS {
                        assert_eq!(report.kind, ReportKind::Event);
                        self.ledger.refuse(report);
                    }
                    let (subject, serial) = (subject_of(report), Said::of(report).serial);
                    self.ledger.assert_answered(&subject, serial, &self.node.disk.outbox, &refused);
                    self.node.jobs.push_back(Job::Done(id));
                }
                EdgeOutput::InSync(collection) => drop(self.node.agreed.insert(rank(collection).unwrap())),
                EdgeOutput::ReportWanted { kind, uid } => drop(self.node.unsaid.insert((kind, uid))),
                EdgeOutput::Close(goodbye) => {
                    assert_eq!(goodbye, None, "no machine breaks the protocol");
                    return self.disconnect();
                }
                EdgeOutput::Dismissed(goodbye) => {
                    assert!(matches!(goodbye.reason(), Reason::Superseded | Reason::Shutdown), "{goodbye:?}");
                }
            }
        }
    }

    pub(super) fn commit(&mut self) {
        let Some(job) = self.node.jobs.pop_front() else { return };
        let Job::Apply(batch) = &job else {
            self.node.write(&self.apiserver, job);
            return;
        };
        let mut ticket = batch.ticket;
        if self.is(Mutation::TicketOfLast) {
            ticket = self.node.batches().next_back().map_or(ticket, |last| last.ticket);
        }
        if self.is(Mutation::BatchLost) && self.dice.one_in(4) {
            drop(job);
        } else if !self.node.write(&self.apiserver, job) {
            // The machine is ahead of the store: what it still wanted written is, and a new one takes its place.
            for job in std::mem::take(&mut self.node.jobs) {
                self.node.write(&self.apiserver, job);
            }
            if !self.is(Mutation::MachineKept) {
                self.disconnect();
                return self.node.boot(self.now);
            }
        }
        let mut out = self.node.edge.step(self.now, EdgeInput::Committed { ticket });
        if self.is(Mutation::AckBeyondCommit)
            && let Some(last) = self.node.batches().rfind(|batch| Some(batch.connection) == self.current)
        {
            out.push(EdgeOutput::Send(Frame { body: Some(Body::Ack(wire::Ack { seq: last.seq })) }));
        }
        self.edge_outputs(out);
    }

    /// The next frame on a connection reaches its replica, or the end of the connection does.
    pub(super) fn deliver_up(&mut self, which: usize) {
        let Some(connection) = self.connections.get_mut(which) else { return };
        let (id, at) = (connection.id, connection.replica);
        let Some(mut frame) = connection.up.pop_front() else {
            if connection.left_by_node && !connection.is_up_lost {
                connection.left_by_hub = true;
                if self.session_on(at, id) {
                    self.replicas[at].end();
                }
            }
            return;
        };
        if connection.is_up_lost || connection.left_by_hub && self.mutation != Some(Mutation::OldConnectionUp) {
            return;
        }
        connection.count_as_hub(&mut frame);
        match frame.body {
            Some(Body::Hello(hello)) => self.hello(at, id, hello),
            Some(Body::Report(mut report)) if self.is(Mutation::ReportTwice) && self.session_on(at, id) => {
                let payload = decode(report.encoding(), &report.payload).unwrap();
                let serial = Said::read(&payload).serial;
                if report.kind() == ReportKind::Event && !self.ledger.arrived.insert(serial) {
                    report.name.push_str("-again");
                }
                self.say(at, HubInput::Frame(Frame { body: Some(Body::Report(report)) }));
            }
            body if self.session_on(at, id) || self.is(Mutation::OldConnectionUp) => {
                self.say(at, HubInput::Frame(Frame { body }))
            }
            _ => {}
        }
    }

    fn session_on(&self, at: usize, connection: u64) -> bool {
        self.replicas[at].session.as_ref().is_some_and(|session| session.connection == connection)
    }

    /// The next frame on the node's connection reaches it, or the end of the connection does.
    pub(super) fn deliver_down(&mut self) {
        let mut current = self.current;
        if self.is(Mutation::OldConnection) {
            let at = self.dice.roll(self.connections.len());
            current = current.and_then(|_| self.connections.get(at)).map(|connection| connection.id);
        }
        let Some(connection) = current.and_then(|id| self.connection(id)) else { return };
        let Some(mut frame) = connection.down.pop_front() else {
            if connection.left_by_hub && !connection.is_down_lost {
                self.disconnect();
            }
            return;
        };
        if connection.is_down_lost {
            return;
        }
        if self.is(Mutation::RevisionsApart) {
            match &mut frame.body {
                Some(Body::Upsert(upsert)) => upsert.revisions.retain(|said| said.collection == upsert.collection),
                Some(Body::Delete(delete)) => delete.revisions.retain(|said| said.collection == delete.collection),
                _ => {}
            }
        }
        if self.is(Mutation::GivenBackForgotten)
            && let Some(Body::ReportLater(wire::ReportLater { id, .. })) = frame.body
        {
            frame.body = Some(Body::ReportAck(wire::ReportAck { id, refused: String::new() }));
        }
        if self.is(Mutation::DeleteByKey)
            && let Some(Body::Delete(delete)) = &mut frame.body
            && let Some(namesake) = self.node.namesake(delete)
        {
            delete.uid = namesake;
        }
        let is_check = matches!(frame.body, Some(Body::DigestCheck(_)));
        let seq = match &frame.body {
            Some(Body::Upsert(wire::Upsert { seq, .. }) | Body::Delete(wire::Delete { seq, .. })) => *seq,
            _ => 0,
        };
        let mut out = self.node.edge.step(self.now, EdgeInput::Frame(frame));
        if is_check && self.is(Mutation::DigestIgnored) {
            let is_inventory = |frame: &Frame| matches!(frame.body, Some(Body::Inventory(_)));
            out.retain(|output| !matches!(output, EdgeOutput::Send(frame) if is_inventory(frame)));
        }
        self.outputs_of_frame(out, seq);
    }

    /// A session says the next thing it has to say.
    pub(super) fn feed(&mut self, at: usize) {
        let Some(session) = &mut self.replicas[at].session else { return };
        if let Some(input) = session.untold.pop_front() {
            self.say(at, input);
        }
    }

    pub(super) fn pass_time(&mut self, by: Duration) {
        self.now += by;
        if self.node.edge.next_timeout().is_some_and(|due| due <= self.now) {
            let out = self.node.edge.step(self.now, EdgeInput::Timeout);
            self.edge_outputs(out);
        }
        for at in 0..self.replicas.len() {
            if self.replicas[at].session.as_ref().is_some_and(|session| session.hub.next_timeout() <= self.now) {
                self.say(at, HubInput::Timeout);
            }
        }
    }

    pub(super) fn assert_converged(&self) {
        self.node.assert_holds(&self.apiserver.desired());
        self.assert_reported();
    }
}

impl Connection {
    /// Leaves a digest check out, and gives its number to what comes behind it. Answers whether this is one.
    fn leaves_out(&mut self, frame: &mut Frame) -> bool {
        match &mut frame.body {
            Some(Body::DigestCheck(check)) => {
                self.left_out.push(check.seq);
                return true;
            }
            Some(Body::Upsert(wire::Upsert { seq, .. }) | Body::Delete(wire::Delete { seq, .. })) => {
                *seq -= u64::try_from(self.left_out.len()).unwrap();
            }
            _ => {}
        }
        false
    }

    /// Has what the edge says of numbers mean those that the hub gave, with what was left out.
    fn count_as_hub(&self, frame: &mut Frame) {
        if let Some(Body::Ack(wire::Ack { seq }) | Body::Inventory(wire::Inventory { seq, .. })) = &mut frame.body {
            *seq = self.left_out.iter().fold(*seq, |seq, left_out| seq + u64::from(*left_out <= seq + 1));
        }
    }
}

fn through_the_wire(frame: &Frame) -> Frame {
    Frame::decode(frame.encode_to_vec().as_slice()).unwrap()
}
