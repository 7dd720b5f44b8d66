//! Seeded schedules over an in-memory pair: a cloud that knows what is desired, an edge with a store, a link that loses its
//! connections, and crashes of either side between any two steps. `SEED=n` replays one schedule, `SCHEDULES=n` sets how many run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use prost::Message as _;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;
use crate::wire::{self, Frame, frame::Body};

type Id = (usize, String);

/// Both machines and everything around them.
struct World {
    random: StdRng,
    now: Duration,
    /// What the apiserver says, and every state each object ever had, in order.
    desired: BTreeMap<Id, Object>,
    states: BTreeMap<String, Vec<u64>>,
    next_uid: u64,
    /// The edge's disk, and an old copy of it.
    store: Disk,
    backup: Option<Disk>,
    /// What was written and is not durable yet.
    writes: VecDeque<(u64, Vec<Op>)>,
    edge: Edge,
    hub: Option<CloudSide>,
    /// Frames on their way. `None` in `connected`: the edge knows of no connection.
    up: VecDeque<Frame>,
    down: VecDeque<Frame>,
    connected: bool,
    /// The connection swallows what is sent.
    silent: bool,
    /// What the apiserver took, by report key: the id of the newest.
    taken: BTreeMap<String, u64>,
    epoch: u64,
    /// Deltas that fitted.
    deltas: u64,
}

#[derive(Clone, Default)]
struct Disk {
    rows: BTreeMap<Id, Entry>,
    /// What the rows say: the JSON.
    payloads: BTreeMap<Id, Vec<u8>>,
    /// Up to which of its `states` each object has come.
    seen: BTreeMap<String, usize>,
    outbox: BTreeMap<u64, Report>,
    next_report: u64,
    epoch: u64,
}

struct CloudSide {
    machine: Hub,
    /// What the closure still has to tell this session before it is complete.
    untold: Vec<HubInput>,
    reports: VecDeque<Report>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            random: StdRng::seed_from_u64(seed),
            now: Duration::ZERO,
            desired: BTreeMap::new(),
            states: BTreeMap::new(),
            next_uid: 0,
            store: Disk::default(),
            backup: None,
            writes: VecDeque::new(),
            edge: Edge::new("n", "b", "s", "edge", 0, []),
            hub: None,
            up: VecDeque::new(),
            down: VecDeque::new(),
            connected: false,
            silent: false,
            taken: BTreeMap::new(),
            epoch: 0,
            deltas: 0,
        };
        for _ in 0..world.random.random_range(0..12) {
            world.create();
        }
        world
    }

    fn roll(&mut self, n: u32) -> u32 {
        self.random.random_range(0..n)
    }

    fn create(&mut self) {
        let order = self.random.random_range(0..COLLECTIONS.len());
        self.next_uid += 1;
        let uid = format!("u{}", self.next_uid);
        // Few names, so that the same name comes back under another UID.
        let key = format!("ns/{}", self.roll(4));
        let old = self.desired.iter().find(|((at, _), object)| *at == order && object.entry.key == key);
        if let Some(id) = old.map(|(id, _)| id.clone()) {
            self.delete(&id);
        }
        self.write((order, uid), key);
    }

    /// A new state of an object, from a few bytes to more than the window.
    fn write(&mut self, id: Id, key: String) {
        let before = self.desired.get(&id);
        let json = match before {
            // A letter of what is there already, or all of it.
            Some(before) if self.random.random_ratio(3, 4) => {
                let mut json = decode(before.encoding, &before.payload).unwrap();
                let at = self.random.random_range(1..json.len() - 1);
                json[at] = self.random.random_range(b'a'..=b'z');
                json
            }
            _ => {
                let size = [1, 1, 300, 300, 800, 6000][self.random.random_range(0..6)];
                let filler: String = (0..size).map(|_| self.random.random_range('a'..='z')).collect();
                serde_json::to_vec(&filler).unwrap()
            }
        };
        let mut object = Object::new(COLLECTIONS[id.0], key, id.1.clone(), &json);
        if let Some(before) = before {
            object = object.succeeding(before);
        }
        self.states.entry(id.1.clone()).or_default().push(object.entry.version);
        self.desired.insert(id, object.clone());
        self.tell(HubInput::Desired(object));
    }

    fn delete(&mut self, id: &Id) {
        self.desired.remove(id);
        self.tell(HubInput::Gone(COLLECTIONS[id.0], id.1.clone()));
    }

    /// The closure tells a live session of a change, behind what it has not told yet.
    fn tell(&mut self, input: HubInput) {
        let Some(hub) = &mut self.hub else { return };
        if hub.untold.is_empty() {
            let out = hub.machine.step(self.now, input);
            self.hub_outputs(out);
        } else {
            hub.untold.insert(0, input);
        }
    }

    fn connect(&mut self) {
        self.disconnect();
        self.silent = false;
        self.connected = true;
        let out = self.edge.step(self.now, EdgeInput::Connected);
        self.edge_outputs(out);
    }

    fn disconnect(&mut self) {
        self.up.clear();
        self.down.clear();
        self.hub = None;
        if std::mem::take(&mut self.connected) {
            let out = self.edge.step(self.now, EdgeInput::Disconnected);
            assert!(out.is_empty());
        }
    }

    fn hello(&mut self, hello: &wire::Hello) {
        self.epoch = self.epoch.max(hello.last_epoch) + 1;
        let (machine, out) = Hub::new(self.now, hello, self.epoch, 0, "hub");
        let mut untold: Vec<HubInput> = self.desired.values().cloned().map(HubInput::Desired).collect();
        for at in (1..untold.len()).rev() {
            untold.swap(at, self.random.random_range(0..=at));
        }
        // A stack: what is told last comes first.
        untold.splice(0..0, COLLECTIONS.into_iter().map(HubInput::Complete));
        self.hub = Some(CloudSide { machine, untold, reports: VecDeque::new() });
        self.hub_outputs(out);
    }

    fn hub_outputs(&mut self, out: Vec<HubOutput>) {
        for output in out {
            match output {
                HubOutput::Send(frame) => self.down.push_back(through_the_wire(&frame)),
                HubOutput::Inventory(..) => {}
                HubOutput::InSync => {
                    let told = self.hub.as_ref().is_none_or(|hub| hub.untold.is_empty());
                    if told && self.writes.is_empty() {
                        self.assert_converged();
                    }
                }
                HubOutput::Report(report) => {
                    if let Some(hub) = &mut self.hub {
                        hub.reports.push_back(report);
                    }
                }
                HubOutput::Close(goodbye) => {
                    assert_eq!(goodbye, None, "no machine breaks the protocol");
                    self.disconnect();
                    return;
                }
            }
        }
    }

    fn edge_outputs(&mut self, out: Vec<EdgeOutput>) {
        for output in out {
            match output {
                EdgeOutput::Send(frame) => self.up.push_back(through_the_wire(&frame)),
                EdgeOutput::Established { epoch, .. } => {
                    assert!(epoch > self.store.epoch, "epochs rise");
                    self.store.epoch = epoch;
                }
                EdgeOutput::Apply { ops, ticket } => self.writes.push_back((ticket, ops)),
                EdgeOutput::Reported { id, .. } => {
                    self.store.outbox.remove(&id);
                }
                EdgeOutput::InSync(_) | EdgeOutput::ReportWanted { .. } => {}
                EdgeOutput::Close(goodbye) => {
                    assert_eq!(goodbye, None, "no machine breaks the protocol");
                    self.disconnect();
                    return;
                }
                EdgeOutput::Dismissed(goodbye) => panic!("dismissed: {goodbye:?}"),
            }
        }
    }

    fn commit(&mut self) {
        let Some((ticket, ops)) = self.writes.pop_front() else { return };
        if !self.make_durable(ops) {
            // The machine is ahead of the store: what it still wanted written is, and a new one takes its place.
            for (_, ops) in std::mem::take(&mut self.writes) {
                self.make_durable(ops);
            }
            self.disconnect();
            return self.boot();
        }
        let out = self.edge.step(self.now, EdgeInput::Committed { ticket });
        self.edge_outputs(out);
    }

    /// Answers whether every delta fitted.
    fn make_durable(&mut self, ops: Vec<Op>) -> bool {
        let mut fits = true;
        for op in ops {
            let object = match op {
                Op::Upsert(object) => Some(object),
                Op::Patch(collection, entry, delta) => {
                    let id = (rank(collection).unwrap(), entry.uid.clone());
                    let new = self.patched(&id, &entry, &delta);
                    if new.is_none() {
                        fits = false;
                        if let Some(row) = self.store.rows.get_mut(&id) {
                            row.version = 0;
                        }
                    }
                    self.deltas += u64::from(new.is_some());
                    new
                }
                Op::Delete(collection, uid) => {
                    let id = (rank(collection).unwrap(), uid);
                    assert!(!self.desired.contains_key(&id), "deleted what is desired");
                    self.store.rows.remove(&id);
                    self.store.payloads.remove(&id);
                    None
                }
            };
            let Some(object) = object else { continue };
            // A state may come back (a version is a fingerprint of the content), so the first one that fits is meant: what the store
            // went through has to be a subsequence of what was desired.
            let seen = self.store.seen.entry(object.entry.uid.clone()).or_default();
            let ahead = self.states[&object.entry.uid].iter().skip(*seen);
            let on = ahead.copied().position(|state| state == object.entry.version);
            *seen += on.expect("a version went backwards");
            let id = (rank(object.collection).unwrap(), object.entry.uid.clone());
            self.store.payloads.insert(id.clone(), object.payload.to_vec());
            self.store.rows.insert(id, object.entry);
        }
        fits
    }

    fn patched(&self, id: &Id, entry: &Entry, delta: &Delta) -> Option<Object> {
        let held = self.store.rows.get(id).filter(|row| row.version == delta.base)?;
        let json = delta::apply(&self.store.payloads[id], &delta.payload).ok()?;
        assert_eq!(held.uid, entry.uid);
        let object = Object::new(COLLECTIONS[id.0], entry.key.clone(), entry.uid.clone(), &json);
        (object.entry.version == entry.version).then(|| Object { payload: json.into(), ..object })
    }

    /// The edge's process dies, with or without what was being written, and starts again from its disk.
    fn crash_edge(&mut self) {
        let survived = self.random.random_range(0..=self.writes.len());
        for (_, ops) in self.writes.drain(..).take(survived).collect::<Vec<_>>() {
            self.make_durable(ops);
        }
        self.writes.clear();
        self.disconnect();
        self.boot();
    }

    fn boot(&mut self) {
        let rows = self.store.rows.iter().map(|((order, _), entry)| (COLLECTIONS[*order], entry.clone()));
        self.edge = Edge::new("n", "b", "s", "edge", self.store.epoch, rows);
        for report in self.store.outbox.values().cloned().collect::<Vec<_>>() {
            let out = self.edge.step(self.now, EdgeInput::Report(report));
            assert!(out.is_empty());
        }
    }

    fn report(&mut self) {
        self.store.next_report += 1;
        let (id, uid) = (self.store.next_report, format!("p{}", self.roll(5)));
        let kind = if self.roll(3) == 0 { ReportKind::Event } else { ReportKind::PodStatus };
        let payload = Bytes::from(vec![b'x'; self.random.random_range(0..2000)]);
        let report = Report { id, kind, namespace: "ns".into(), name: uid.clone(), uid, payload };
        if is_coalesced(kind) {
            self.store.outbox.retain(|_, old| old.kind != kind || old.uid != report.uid);
        }
        self.store.outbox.insert(id, report.clone());
        let out = self.edge.step(self.now, EdgeInput::Report(report));
        self.edge_outputs(out);
    }

    fn apiserver_takes(&mut self) {
        let Some(hub) = &mut self.hub else { return };
        let Some(report) = hub.reports.pop_front() else { return };
        let taken = self.taken.entry(report_key(&report)).or_default();
        assert!(report.id >= *taken, "an older report overwrote a newer one");
        *taken = report.id;
        let out = hub.machine.step(self.now, HubInput::Reported { id: report.id, refused: String::new() });
        self.hub_outputs(out);
    }

    fn deliver_up(&mut self) {
        let Some(frame) = self.up.pop_front().filter(|_| !self.silent) else { return };
        if let Some(Body::Hello(hello)) = &frame.body {
            self.hello(&hello.clone());
        } else if let Some(hub) = &mut self.hub {
            let out = hub.machine.step(self.now, HubInput::Frame(frame));
            self.hub_outputs(out);
        }
    }

    fn deliver_down(&mut self) {
        let Some(frame) = self.down.pop_front().filter(|_| !self.silent) else { return };
        let out = self.edge.step(self.now, EdgeInput::Frame(frame));
        self.edge_outputs(out);
    }

    fn feed(&mut self) {
        let Some(hub) = &mut self.hub else { return };
        let Some(input) = hub.untold.pop() else { return };
        let out = hub.machine.step(self.now, input);
        self.hub_outputs(out);
    }

    fn pass_time(&mut self, by: Duration) {
        self.now += by;
        if self.edge.next_timeout().is_some_and(|due| due <= self.now) {
            let out = self.edge.step(self.now, EdgeInput::Timeout);
            self.edge_outputs(out);
        }
        if let Some(hub) = &mut self.hub
            && hub.machine.next_timeout() <= self.now
        {
            let out = hub.machine.step(self.now, HubInput::Timeout);
            self.hub_outputs(out);
        }
    }

    /// One random thing happens.
    fn chaos(&mut self) {
        let what = self.roll(1000);
        match what {
            0..300 => self.deliver_up(),
            300..600 => self.deliver_down(),
            600..720 => self.commit(),
            720..820 => self.feed(),
            820..860 => self.apiserver_takes(),
            860..875 => self.create(),
            875..910 => {
                if let Some((id, object)) = self.pick() {
                    self.write(id, object.entry.key);
                }
            }
            910..925 => {
                if let Some((id, _)) = self.pick() {
                    self.delete(&id);
                }
            }
            925..950 => self.report(),
            950..965 => {
                let by = Duration::from_millis(u64::from(self.roll(20_000)));
                self.pass_time(by);
            }
            965..972 => self.disconnect(),
            972..985 => self.connect(),
            985..989 => self.silent = true,
            989..993 => self.crash_edge(),
            993..995 => self.hub = None,
            995..996 => {
                self.crash_edge();
                // The disk is replaced; report ids start again, as those of a new store do.
                self.store = Disk { next_report: self.store.next_report, ..Disk::default() };
                self.boot();
            }
            // A byte of what is stored turns, and its checksum does not notice.
            996..997 => {
                let rotten = self.random.random_range(0..self.store.payloads.len().max(1));
                if let Some(payload) = self.store.payloads.values_mut().nth(rotten) {
                    let at = self.random.random_range(0..payload.len());
                    payload[at] ^= 1;
                }
            }
            997..998 => self.backup = Some(self.store.clone()),
            _ => {
                if let Some(backup) = self.backup.take() {
                    self.crash_edge();
                    let next_report = self.store.next_report;
                    self.store = Disk { next_report, outbox: BTreeMap::new(), ..backup };
                    self.boot();
                }
            }
        }
    }

    fn pick(&mut self) -> Option<(Id, Object)> {
        let at = self.random.random_range(0..self.desired.len().max(1));
        self.desired.iter().nth(at).map(|(id, object)| (id.clone(), object.clone()))
    }

    /// The weather clears: everything that is on its way arrives.
    fn settle(&mut self) {
        self.connect();
        self.settle_on();
    }

    /// Until nothing is on its way, on the connection that stands; on a new one after a delta that did not fit.
    fn settle_on(&mut self) {
        for _ in 0..20_000 {
            if !self.connected {
                self.connect();
            }
            self.deliver_up();
            self.feed();
            self.deliver_down();
            self.commit();
            self.apiserver_takes();
            let quiet = self.up.is_empty() && self.down.is_empty() && self.writes.is_empty();
            if quiet && self.hub.as_ref().is_some_and(|hub| hub.untold.is_empty() && hub.reports.is_empty()) {
                return;
            }
        }
        panic!("it does not come to rest");
    }

    fn assert_converged(&self) {
        let desired: BTreeMap<Id, Entry> =
            self.desired.iter().map(|(id, object)| (id.clone(), object.entry.clone())).collect();
        assert_eq!(self.store.rows, desired);
    }
}

fn report_key(report: &Report) -> String {
    if is_coalesced(report.kind) { report.uid.clone() } else { format!("event {}", report.id) }
}

fn through_the_wire(frame: &Frame) -> Frame {
    Frame::decode(frame.encode_to_vec().as_slice()).unwrap()
}

/// Answers how many deltas were sent and fitted.
fn run(seed: u64) -> u64 {
    let mut world = World::new(seed);
    let steps = world.random.random_range(50..600);
    let mut reported = BTreeSet::new();
    for _ in 0..steps {
        world.chaos();
        reported.extend(world.store.outbox.values().map(|report| (report_key(report), report.id)));
    }
    world.settle();
    world.assert_converged();
    assert!(world.store.outbox.is_empty(), "reports were left");
    world.connect();
    world.settle();
    world.assert_converged();
    world.deltas
}

#[test]
fn any_schedule_converges() {
    if let Ok(seed) = std::env::var("SEED") {
        run(seed.parse().unwrap());
        return;
    }
    let mut deltas = 0;
    let schedules = std::env::var("SCHEDULES").map_or(2000, |n| n.parse().unwrap());
    let first = rand::random::<u32>();
    for seed in (0..schedules).map(|n| u64::from(first) + n) {
        match std::panic::catch_unwind(|| run(seed)) {
            Ok(fitted) => deltas += fitted,
            Err(panic) => {
                eprintln!("replay with SEED={seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    assert!(deltas > schedules / 100, "only {deltas} deltas in {schedules} schedules");
}

/// A world whose edge holds twenty pods and is in sync.
fn in_sync() -> World {
    let mut world = World::new(1);
    world.desired.clear();
    world.states.clear();
    for n in 0..20 {
        world.write((7, format!("0b9cb2a2-4d3a-4a6e-8a26-0123456789{n:02}")), format!("default/web-{n}"));
    }
    world.settle();
    world
}

#[test]
fn reconnecting_with_nothing_changed_sends_no_object() {
    let mut world = in_sync();
    world.connect();
    let mut bytes = 0;
    for _ in 0..100 {
        bytes += world.up.iter().chain(&world.down).map(prost::Message::encoded_len).sum::<usize>();
        assert!(
            !world.down.iter().any(|frame| matches!(frame.body, Some(Body::Upsert(_) | Body::InventoryRequest(_))))
        );
        world.deliver_up();
        world.feed();
        world.deliver_down();
    }
    assert!(bytes < 1024, "{bytes} bytes");
}

#[test]
fn a_letter_changed_is_sent_as_a_delta() {
    let mut world = in_sync();
    let id = world.desired.keys().next().unwrap().clone();
    let noise: String = (0..50_000).map(|_| world.random.random_range('a'..='z')).collect();
    for text in [noise.clone(), noise.replacen('a', "b", 1)] {
        let json = serde_json::to_vec(&text).unwrap();
        let object = Object::new(Collection::Pods, "default/web-0".to_owned(), id.1.clone(), &json);
        let object = object.succeeding(&world.desired[&id]);
        world.states.entry(id.1.clone()).or_default().push(object.entry.version);
        world.desired.insert(id.clone(), object.clone());
        world.tell(HubInput::Desired(object));
        let sent = world.down.iter().map(prost::Message::encoded_len).max().unwrap();
        world.settle_on();
        assert!(text == noise || sent < 300, "{sent} bytes");
    }
    assert_eq!(world.deltas, 1);
    world.assert_converged();
}

#[test]
fn a_hub_that_is_not_complete_neither_sends_nor_deletes() {
    let mut world = in_sync();
    world.desired.clear();
    world.connect();
    world.deliver_up();
    let hub = world.hub.as_mut().unwrap();
    // Everything but that pods are complete.
    hub.untold.retain(|input| !matches!(input, HubInput::Complete(Collection::Pods)));
    for _ in 0..100 {
        world.feed();
        world.deliver_up();
        world.deliver_down();
        world.commit();
    }
    assert_eq!(world.store.rows.len(), 20);
}

#[test]
fn a_slow_edge_gets_the_newest_only() {
    let mut world = in_sync();
    world.connect();
    world.settle();
    let id = world.desired.keys().next().unwrap().clone();
    let pause = |world: &World| world.down.iter().filter(|frame| matches!(frame.body, Some(Body::Upsert(_)))).count();
    for n in 0..50 {
        // Too varied to be compressed below the window.
        let noise: String = (0..9000).map(|_| world.random.random_range('a'..='z')).collect();
        let json = serde_json::to_vec(&format!("{n}{noise}")).unwrap();
        let object = Object::new(Collection::Pods, "default/web".to_owned(), id.1.clone(), &json);
        world.states.entry(id.1.clone()).or_default().push(object.entry.version);
        world.desired.insert(id.clone(), object.clone());
        world.tell(HubInput::Desired(object));
    }
    assert!(pause(&world) <= 2, "{} queued", pause(&world));
    world.settle();
    world.assert_converged();
}

#[test]
fn a_dead_link_is_noticed_on_both_sides() {
    let mut world = in_sync();
    world.silent = true;
    for _ in 0..30 {
        world.pass_time(Duration::from_secs(1));
        world.deliver_up();
        world.deliver_down();
    }
    assert!(!world.connected && world.hub.is_none());
}

#[test]
fn parts_of_a_large_frame_are_signs_of_life() {
    let late = DEAD_AFTER - Duration::from_secs(1);
    let hello = wire::Hello { protocol_min: 1, protocol_max: 1, ..wire::Hello::default() };
    let (mut hub, _) = Hub::new(Duration::ZERO, &hello, 1, 0, "hub");
    assert!(hub.step(late, HubInput::Heard).is_empty());
    assert!(hub.step(DEAD_AFTER, HubInput::Timeout).is_empty());
    assert!(matches!(hub.step(late + DEAD_AFTER, HubInput::Timeout).as_slice(), [HubOutput::Close(None)]));
    let mut edge = Edge::new("n", "b", "s", "edge", 0, []);
    edge.step(Duration::ZERO, EdgeInput::Connected);
    assert!(edge.step(late, EdgeInput::Heard).is_empty());
    assert!(edge.step(DEAD_AFTER, EdgeInput::Timeout).is_empty());
    assert!(matches!(edge.step(late + DEAD_AFTER, EdgeInput::Timeout).as_slice(), [EdgeOutput::Close(None)]));
}

#[test]
fn an_idle_link_is_kept_alive() {
    let mut world = in_sync();
    for _ in 0..600 {
        world.pass_time(Duration::from_secs(1));
        world.deliver_up();
        world.deliver_down();
    }
    assert!(world.connected && world.hub.is_some());
}

#[test]
fn a_version_that_was_to_be_kept_but_is_missing_is_asked_for() {
    let hello = wire::Hello { protocol_min: 1, protocol_max: 1, ..wire::Hello::default() };
    let (mut hub, _) = Hub::new(Duration::ZERO, &hello, 1, 0, "hub");
    let entry = Entry { key: "a".into(), uid: "a".into(), version: 7 };
    hub.step(Duration::ZERO, HubInput::Keep(Collection::Tokens, entry));
    let asked = hub.step(Duration::ZERO, HubInput::Complete(Collection::Tokens));
    assert!(matches!(asked.as_slice(), [HubOutput::Send(Frame { body: Some(Body::InventoryRequest(_)) })]));
    let collection = Collection::Tokens.into();
    let inventory = Body::Inventory(wire::Inventory { collection, entries: vec![], last: true, seq: 0 });
    let out = hub.step(Duration::ZERO, HubInput::Frame(Frame { body: Some(inventory) }));
    let inventories =
        out.iter().filter(|output| matches!(output, HubOutput::Inventory(Collection::Tokens, rows) if rows.is_empty()));
    assert_eq!(inventories.count(), 2, "{out:?}");
}

#[test]
fn what_an_edge_would_refuse_is_known_beforehand() {
    let deliverable = |json: &[u8]| {
        let object = Object::new(Collection::ConfigMaps, "a/b".into(), "u".into(), json);
        assert_eq!(decode(object.encoding, &object.payload).is_ok(), json.len() <= MAX_OBJECT);
        object.is_deliverable()
    };
    assert!(deliverable(b"{}"));
    // What a legal ConfigMap of zero bytes becomes.
    assert!(deliverable(serde_json::to_string(&"\0".repeat(1_500_000)).unwrap().as_bytes()));
    assert!(!deliverable(&vec![b'x'; MAX_OBJECT + 1]));
    let mut noise = vec![0; MAX_FRAME];
    StdRng::seed_from_u64(1).fill(&mut noise[..]);
    assert!(!deliverable(&noise));
}

#[test]
fn peers_that_break_the_protocol_are_dismissed() {
    let hello = |min, max| wire::Hello {
        protocol_min: min,
        protocol_max: max,
        agent: "edgecore 9".into(),
        ..Default::default()
    };
    let (_, out) = Hub::new(Duration::ZERO, &hello(2, 3), 1, 0, "cloudcore 0");
    let [HubOutput::Close(Some(goodbye))] = out.as_slice() else { panic!("{out:?}") };
    assert_eq!(goodbye.reason(), Reason::Version);
    assert!(goodbye.message.contains("edgecore 9") && goodbye.message.contains("cloudcore 0"));

    let lies = [
        Body::Ack(wire::Ack { seq: 5 }),
        Body::Hello(wire::Hello::default()),
        Body::Delete(wire::Delete::default()),
        Body::Inventory(wire::Inventory { seq: 9, collection: Collection::Pods.into(), ..Default::default() }),
        Body::Inventory(wire::Inventory { collection: 77, ..Default::default() }),
        Body::Inventory(wire::Inventory {
            collection: Collection::Pods.into(),
            entries: vec![wire::Entry { key: "k".repeat(MAX_NAME + 1), ..Default::default() }],
            ..Default::default()
        }),
        Body::Inventory(wire::Inventory {
            collection: Collection::Pods.into(),
            entries: vec![wire::Entry::default(); MAX_INVENTORY + 1],
            ..Default::default()
        }),
        Body::Report(wire::Report {
            encoding: Encoding::Zstd.into(),
            payload: Bytes::from_static(b"junk"),
            ..Default::default()
        }),
    ];
    for lie in lies {
        let (mut hub, _) = Hub::new(Duration::ZERO, &hello(1, 1), 1, 0, "cloudcore 0");
        let out = hub.step(Duration::ZERO, HubInput::Frame(Frame { body: Some(lie.clone()) }));
        assert!(matches!(out.as_slice(), [HubOutput::Close(Some(_))]), "{lie:?}: {out:?}");
    }
    let (mut hub, _) = Hub::new(Duration::ZERO, &hello(1, 1), 1, 0, "cloudcore 0");
    let flood = (0..100).map(|id| {
        let report = wire::Report { id, kind: ReportKind::Event.into(), ..Default::default() };
        hub.step(Duration::ZERO, HubInput::Frame(Frame { body: Some(Body::Report(report)) }))
    });
    assert_eq!(flood.flatten().filter(|output| matches!(output, HubOutput::Report(_))).count(), REPORT_WINDOW);

    let pods = Collection::Pods.into();
    let upsert = |seq, full: &[u8]| {
        let full = Bytes::copy_from_slice(full);
        Body::Upsert(wire::Upsert {
            seq,
            collection: pods,
            key: "a/b".into(),
            uid: "u".into(),
            full,
            ..Default::default()
        })
    };
    let lies = [
        Body::Welcome(wire::Welcome { protocol: 1, epoch: 6, ..Default::default() }),
        upsert(2, b"{}"),
        upsert(1, b"{"),
        Body::Upsert(wire::Upsert {
            seq: 1,
            collection: pods,
            key: "a/b".into(),
            uid: "u".into(),
            delta: Bytes::from_static(b"x"),
            base: 7,
            ..Default::default()
        }),
        Body::Upsert(wire::Upsert { seq: 1, collection: 99, ..Default::default() }),
        Body::DigestCheck(wire::DigestCheck { seq: 1, digest: None }),
        Body::ReportAck(wire::ReportAck { id: 3, refused: String::new() }),
        Body::Hello(wire::Hello::default()),
    ];
    for lie in lies {
        let mut edge = Edge::new("n", "b", "s", "edge", 4, []);
        edge.step(Duration::ZERO, EdgeInput::Connected);
        let welcome = Body::Welcome(wire::Welcome { protocol: 1, epoch: 5, ..Default::default() });
        edge.step(Duration::ZERO, EdgeInput::Frame(Frame { body: Some(welcome) }));
        let out = edge.step(Duration::ZERO, EdgeInput::Frame(Frame { body: Some(lie.clone()) }));
        assert!(matches!(out.as_slice(), [EdgeOutput::Close(Some(_))]), "{lie:?}: {out:?}");
        assert!(edge.next_timeout().is_none());
    }
    let mut edge = Edge::new("n", "b", "s", "edge", 4, []);
    edge.step(Duration::ZERO, EdgeInput::Connected);
    let stale = Body::Welcome(wire::Welcome { protocol: 1, epoch: 4, ..Default::default() });
    let out = edge.step(Duration::ZERO, EdgeInput::Frame(Frame { body: Some(stale) }));
    assert!(matches!(out.as_slice(), [EdgeOutput::Close(Some(_))]));
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_a_machine_panic(bytes: Vec<u8>, welcome: bool) {
        let Ok(frame) = Frame::decode(bytes.as_slice()) else { return Ok(()) };
        let hello = wire::Hello { protocol_min: 1, protocol_max: 1, ..Default::default() };
        let (mut hub, _) = Hub::new(Duration::ZERO, &hello, 1, 0, "hub");
        hub.step(Duration::ZERO, HubInput::Frame(frame.clone()));
        let mut edge = Edge::new("n", "b", "s", "edge", 0, []);
        edge.step(Duration::ZERO, EdgeInput::Connected);
        if welcome {
            let welcome = Body::Welcome(wire::Welcome { protocol: 1, epoch: 5, ..Default::default() });
            edge.step(Duration::ZERO, EdgeInput::Frame(Frame { body: Some(welcome) }));
        }
        edge.step(Duration::ZERO, EdgeInput::Frame(frame));
    }
}
