//! Seeded schedules over a pair, and each way to break the rules. `SEED=n` replays one schedule, `SCHEDULES=n` sets how many run.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::{Strategy, any, prop_oneof};
use proptest::proptest;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;
use crate::sync::MAX_FRAME;
use crate::wire::{self, Goodbye, Ping};

fn chores(mux: &Mux) -> usize {
    mux.classes.iter().map(|lane| lane.chores.len()).sum()
}

/// What one side's owner wrote to a stream and has read of it.
#[derive(Debug, Default)]
struct Ends {
    wrote: Vec<u8>,
    read: Vec<u8>,
    /// Read and not yet told of.
    unconsumed: usize,
    finished: bool,
    saw_end: bool,
    /// We or the peer ended it early: what was written may be lost.
    reset: bool,
    /// Its owner has let go of it.
    dropped: bool,
}

#[derive(Debug)]
struct Actor {
    mux: Mux,
    streams: BTreeMap<StreamId, Ends>,
    /// Waiting for room.
    starved: BTreeSet<StreamId>,
    sent_control: VecDeque<Frame>,
    sent_pings: VecDeque<Frame>,
    /// On its way to the other one.
    line: VecDeque<Frame>,
}

struct Pair {
    random: StdRng,
    pattern: Vec<u8>,
    actors: [Actor; 2],
}

impl Actor {
    fn new(side: Side) -> Self {
        Self {
            mux: Mux::new(side),
            streams: BTreeMap::new(),
            starved: BTreeSet::new(),
            sent_control: VecDeque::new(),
            sent_pings: VecDeque::new(),
            line: VecDeque::new(),
        }
    }

    fn ended(&self, id: StreamId) -> bool {
        self.streams.get(&id).is_none_or(|ends| ends.dropped || ends.reset)
    }
}

fn ping(token: u64) -> Frame {
    Frame { body: Some(Body::Ping(Ping { token })) }
}

/// A control frame of about this size.
fn control(size: usize) -> Frame {
    let goodbye = Goodbye { message: "c".repeat(size), ..Goodbye::default() };
    // Goodbye may overtake parts; a Hello may not.
    let hello = wire::Hello { agent: goodbye.message, ..wire::Hello::default() };
    Frame { body: Some(Body::Hello(hello)) }
}

impl Pair {
    fn new(seed: u64) -> Self {
        let actors = [Actor::new(Side::Cloud), Actor::new(Side::Edge)];
        let mut random = StdRng::seed_from_u64(seed);
        let mut pattern = vec![0; 101 << 10];
        random.fill(&mut pattern[..]);
        Self { random, pattern, actors }
    }

    fn roll(&mut self, n: usize) -> usize {
        self.random.random_range(0..n)
    }

    fn some_stream(&mut self, at: usize) -> Option<StreamId> {
        let count = self.actors[at].streams.len();
        let n = if count == 0 { 0 } else { self.roll(count) };
        self.actors[at].streams.keys().nth(n).copied()
    }

    /// One thing that an owner does.
    fn act(&mut self, at: usize) {
        let what = self.roll(22);
        let id = self.some_stream(at);
        let size = [1, 10, 500, 4 << 10, 30 << 10, 100 << 10][self.roll(6)];
        let class = Class::ALL[self.roll(3)];
        let actor = &mut self.actors[at];
        match (what, id) {
            (0 | 1, _) => match actor.mux.open(class, vec![7; size.min(MAX_HEADER)].into()) {
                Ok(id) => drop(actor.streams.insert(id, Ends::default())),
                Err(error) => assert_eq!(error, OpenError::TooMany),
            },
            (2, _) => {
                let frame = control(size);
                actor.sent_control.push_back(frame.clone());
                actor.mux.control(frame);
            }
            (3, _) => {
                let frame = ping(self.random.random::<u64>() & !PROBE);
                actor.sent_pings.push_back(frame.clone());
                actor.mux.control(frame);
            }
            (4..=12, Some(id)) => self.write(at, id, size),
            (13, Some(id)) if !actor.ended(id) => {
                actor.mux.finish(id);
                actor.starved.remove(&id);
                if let Some(ends) = actor.streams.get_mut(&id) {
                    ends.finished = true;
                }
            }
            (14, Some(id)) if !actor.ended(id) => {
                actor.mux.reset(id, "no more");
                self.broken(id);
            }
            (15, Some(id)) if !actor.ended(id) => self.abandon(at, id),
            (_, Some(id)) => self.consume(at, id, size),
            _ => {}
        }
        self.check(at);
    }

    fn write(&mut self, at: usize, id: StreamId, size: usize) {
        let byte: u8 = self.random.random();
        let actor = &mut self.actors[at];
        if actor.ended(id) || actor.starved.contains(&id) {
            return;
        }
        let Some(ends) = actor.streams.get_mut(&id).filter(|ends| !ends.finished) else { return };
        let data = &self.pattern[usize::from(byte)..usize::from(byte) + size];
        let taken = actor.mux.write(id, data);
        ends.wrote.extend_from_slice(&data[..taken]);
        if taken < size {
            actor.starved.insert(id);
        }
    }

    /// The stream is over for both, whatever was on its way.
    fn broken(&mut self, id: StreamId) {
        for actor in &mut self.actors {
            actor.starved.remove(&id);
            if let Some(ends) = actor.streams.get_mut(&id) {
                ends.reset = true;
            }
        }
    }

    fn abandon(&mut self, at: usize, id: StreamId) {
        let actor = &mut self.actors[at];
        actor.mux.abandon(id, "nobody reads");
        actor.starved.remove(&id);
        let Some(ends) = actor.streams.get_mut(&id) else { return };
        ends.dropped = true;
        // What was finished before still arrives.
        if !ends.finished {
            self.broken(id);
        }
    }

    fn consume(&mut self, at: usize, id: StreamId, most: usize) {
        let actor = &mut self.actors[at];
        let Some(ends) = actor.streams.get_mut(&id) else { return };
        let bytes = most.min(ends.unconsumed);
        ends.unconsumed -= bytes;
        actor.mux.consumed(id, bytes);
    }

    /// What must hold at any time.
    fn check(&self, at: usize) {
        let Actor { mux, streams, .. } = &self.actors[at];
        let waiting = mux.waiting();
        for class in Class::ALL {
            let bytes = waiting.streams[class.index()];
            // A frame for each that found the class full.
            let open = mux.streams.keys().filter(|id| id.class() == class).count();
            assert!(bytes <= CLASS_BUFFER + open * CUT);
            let buffered: usize =
                mux.streams.iter().filter(|(id, _)| id.class() == class).map(|(_, s)| s.buffer.len()).sum();
            assert_eq!(bytes, buffered);
        }
        assert!(mux.streams.values().all(|stream| stream.buffer.len() <= STREAM_BUFFER));
        assert!(mux.streams() <= 2 * Class::ALL.len() * MAX_STREAMS);
        assert!(
            chores(mux) <= mux.streams()
                && mux.classes.iter().map(|lane| lane.ready.len()).sum::<usize>() <= mux.streams()
        );
        assert!(streams.values().all(|ends| ends.unconsumed <= MAX_WINDOW));
        assert!(mux.streams.values().all(|stream| stream.window + stream.unread <= stream.limit));
        let growth: usize = mux.streams.values().map(|stream| stream.limit - stream.class.window()).sum();
        assert!(growth == mux.growth && growth <= MAX_GROWTH);
    }

    /// Puts one frame on the line, and makes sure that it was the right one.
    fn send(&mut self, at: usize) -> bool {
        let actor = &mut self.actors[at];
        let had_control = !actor.mux.is_control_empty();
        let chore_may_come = actor.mux.control_was_last;
        let highest = Class::ALL
            .into_iter()
            .find(|class| actor.mux.streams.iter().any(|(id, stream)| id.class() == *class && stream.can_send()));
        let Some(frame) = actor.mux.next_frame() else {
            assert!(!had_control && highest.is_none(), "something waits, and nothing is sent");
            return false;
        };
        match &frame.body {
            Some(Body::StreamOpen(wire::StreamOpen { id, .. }) | Body::StreamData(wire::StreamData { id, .. })) => {
                assert!(!had_control, "data goes before control");
                assert_eq!(StreamId::parse(*id).map(StreamId::class), highest, "a class goes before a higher one");
            }
            Some(Body::StreamCredit(_) | Body::StreamReset(_)) => {
                assert!(!had_control || chore_may_come, "two small frames go before control");
            }
            _ => {}
        }
        let bytes = frame.encode_to_vec();
        assert!(bytes.len() <= CUT + 32, "a frame of {} bytes", bytes.len());
        actor.line.push_back(Frame::decode(bytes.as_slice()).unwrap());
        self.events(at);
        self.check(at);
        true
    }

    /// The other side takes one frame off the line.
    fn deliver(&mut self, from: usize) -> bool {
        let Some(frame) = self.actors[from].line.pop_front() else { return false };
        self.actors[1 - from].mux.receive(frame).expect("nobody breaks the rules");
        self.events(1 - from);
        self.check(1 - from);
        true
    }

    fn events(&mut self, at: usize) {
        while let Some(event) = self.actors[at].mux.poll() {
            let [a, b] = &mut self.actors;
            let (here, there) = if at == 0 { (a, b) } else { (b, a) };
            match event {
                Event::Control(frame) if matches!(frame.body, Some(Body::Ping(_))) => {
                    assert_eq!(Some(frame), there.sent_pings.pop_front());
                }
                Event::Control(frame) => assert_eq!(Some(frame), there.sent_control.pop_front()),
                Event::Opened { id, header } => {
                    assert!(there.streams.contains_key(&id) && header.iter().all(|byte| *byte == 7));
                    let reset = there.streams[&id].reset;
                    assert!(here.streams.insert(id, Ends { reset, ..Ends::default() }).is_none());
                }
                Event::Data(id, data) => {
                    let ends = here.streams.get_mut(&id).unwrap();
                    assert!(!ends.saw_end && !ends.dropped);
                    let wrote = there.streams[&id].wrote.get(ends.read.len()..).unwrap_or_default();
                    assert!(wrote.starts_with(&data), "{id:?} is not what was written");
                    ends.read.extend_from_slice(&data);
                    ends.unconsumed += data.len();
                }
                Event::Finished(id) => {
                    let ends = here.streams.get_mut(&id).unwrap();
                    ends.saw_end = true;
                    assert!(
                        there.streams[&id].finished && there.streams[&id].wrote == ends.read,
                        "{id:?} is not whole"
                    );
                }
                Event::Reset(id, reason) => {
                    assert!(["", "no more", "nobody reads"].contains(&reason.as_str()));
                    here.starved.remove(&id);
                    here.streams.get_mut(&id).unwrap().reset = true;
                }
                Event::Writable(id) => {
                    here.starved.remove(&id);
                }
            }
        }
    }

    /// Everything arrives.
    fn settle(&mut self) {
        loop {
            let mut busy = false;
            for at in 0..2 {
                for id in self.actors[at].streams.keys().copied().collect::<Vec<_>>() {
                    self.consume(at, id, usize::MAX);
                }
                while self.send(at) {
                    busy = true;
                }
                while self.deliver(at) {
                    busy = true;
                }
            }
            if !busy {
                return;
            }
        }
    }

    fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            let at = self.roll(2);
            match self.roll(5) {
                0 => self.act(at),
                1 | 2 => drop(self.send(at)),
                _ => drop(self.deliver(at)),
            }
        }
        self.settle();
        for at in 0..2 {
            assert!(self.actors[at].sent_control.is_empty() && self.actors[at].sent_pings.is_empty());
            assert!(self.actors[at].starved.is_empty(), "{:?} wait for room", self.actors[at].starved);
            for (id, ends) in &self.actors[at].streams {
                let Some(there) = self.actors[1 - at].streams.get(id) else {
                    assert!(ends.reset, "{id:?} was never told of");
                    continue;
                };
                let whole = ends.finished && !there.dropped && !there.reset;
                assert!(!whole || there.saw_end, "{id:?} lost its end");
                assert!(ends.reset || there.reset || there.dropped || ends.wrote == there.read, "{id:?} lost data");
            }
        }
        for at in 0..2 {
            for id in self.actors[at].streams.keys().copied().collect::<Vec<_>>() {
                self.abandon(at, id);
            }
        }
        self.settle();
        for actor in &self.actors {
            assert_eq!(actor.mux.streams(), 0, "a stream is not forgotten: {:?}", actor.mux.streams);
            assert!(chores(&actor.mux) == 0 && actor.mux.waiting() == Waiting::default());
            assert!(actor.mux.classes.iter().all(|lane| lane.ready.is_empty()));
        }
    }
}

#[test]
fn schedules() {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let seeds = match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SCHEDULES").unwrap_or(100),
    };
    for seed in seeds {
        let shown = Shown(seed);
        Pair::new(seed).run(1000);
        std::mem::forget(shown);
    }
}

/// Says which seed it was when a schedule panics.
struct Shown(u64);

impl Drop for Shown {
    fn drop(&mut self) {
        eprintln!("SEED={}", self.0);
    }
}

/// An edge, and a cloud's stream of class ops on it.
fn edge_with_stream() -> (Mux, StreamId) {
    let mut cloud = Mux::new(Side::Cloud);
    let id = cloud.open(Class::Ops, Bytes::from_static(b"logs")).unwrap();
    let mut edge = Mux::new(Side::Edge);
    edge.receive(cloud.next_frame().unwrap()).unwrap();
    assert_eq!(edge.poll(), Some(Event::Opened { id, header: Bytes::from_static(b"logs") }));
    (edge, id)
}

fn open(id: u32, header: usize) -> Frame {
    Frame { body: Some(Body::StreamOpen(wire::StreamOpen { id, header: vec![0; header].into() })) }
}

fn data(id: impl Into<u32>, bytes: usize, fin: bool) -> Frame {
    Frame { body: Some(Body::StreamData(wire::StreamData { id: id.into(), data: vec![0; bytes].into(), fin })) }
}

fn credit(id: impl Into<u32>, bytes: u32) -> Frame {
    Frame { body: Some(Body::StreamCredit(wire::StreamCredit { id: id.into(), bytes })) }
}

fn reset(id: impl Into<u32>) -> Frame {
    Frame { body: Some(Body::StreamReset(wire::StreamReset { id: id.into(), reason: "r".repeat(1000) })) }
}

fn part(bytes: Vec<u8>, last: bool) -> Frame {
    Frame { body: Some(Body::ControlPart(wire::ControlPart { data: bytes.into(), last })) }
}

#[test]
fn who_breaks_the_rules_is_told_which() {
    const WINDOW: usize = 64 << 10;
    const MORE: u32 = (1 << 20) - (64 << 10);
    let (_, id) = edge_with_stream();
    let other = u32::from(id) + 8;
    let cases: Vec<(&str, Vec<Frame>, Violation)> = vec![
        ("no class", vec![open(8, 0)], Violation::Id(8)),
        ("the other side's", vec![open(0b11, 0)], Violation::Id(0b11)),
        ("open twice", vec![open(id.into(), 0)], Violation::Reused(id)),
        ("again after its end", vec![reset(id), open(id.into(), 0)], Violation::Reused(id)),
        (
            "header",
            vec![open(other, MAX_HEADER + 1)],
            Violation::Header(StreamId::parse(other).unwrap(), MAX_HEADER + 1),
        ),
        ("never opened", vec![data(other, 1, false)], Violation::Unknown(other)),
        ("never opened, of ours", vec![data(0b101u32, 1, false)], Violation::Unknown(0b101)),
        ("credit for nothing", vec![credit(other, 1)], Violation::Unknown(other)),
        ("reset of nothing", vec![reset(other)], Violation::Unknown(other)),
        ("behind the last", vec![data(id, 1, true), data(id, 1, false)], Violation::Ended(id)),
        ("behind a reset", vec![reset(id), data(id, 1, false)], Violation::Ended(id)),
        ("no data", vec![data(id, 0, false)], Violation::Empty(id)),
        ("overrun", vec![data(id, WINDOW, false), data(id, 1, false)], Violation::Overrun { id, bytes: 1, credit: 0 }),
        ("credit", vec![credit(id, MORE), credit(id, 1)], Violation::Credit(id, 1)),
        ("within parts", vec![part(vec![0; 9], false), control(1)], Violation::Interleaved),
        ("parts without end", vec![part(vec![0; MAX_FRAME], false), part(vec![0], false)], Violation::TooLarge),
        ("parts of nothing", vec![part(vec![0xff; 9], true)], Violation::Malformed),
        ("a part in parts", vec![part(part(Vec::new(), true).encode_to_vec(), true)], Violation::Malformed),
        (
            "too many",
            (1..=u32::try_from(MAX_STREAMS).unwrap()).map(|n| open(u32::from(id) + 8 * n, 0)).collect(),
            Violation::TooMany,
        ),
    ];
    for (name, mut frames, violation) in cases {
        let (mut edge, _) = edge_with_stream();
        let last = frames.pop().unwrap();
        for frame in frames {
            edge.receive(frame).unwrap_or_else(|early| panic!("{name}: {early}"));
        }
        assert_eq!(edge.receive(last), Err(violation), "{name}");
    }
}

#[test]
fn what_was_on_its_way_at_a_reset_is_ignored() {
    let (mut edge, id) = edge_with_stream();
    edge.write(id, b"never sent");
    edge.reset(id, &"é".repeat(1000));
    edge.receive(data(id, 100, false)).unwrap();
    edge.receive(credit(id, 0)).unwrap();
    let Some(Frame { body: Some(Body::StreamReset(sent)) }) = edge.next_frame() else { panic!("a reset goes") };
    assert_eq!(sent.reason, "é".repeat(MAX_REASON / 2));
    edge.receive(data(id, 100, false)).unwrap();
    assert_eq!((edge.poll(), edge.next_frame(), edge.streams()), (None, None, 1));
    edge.receive(reset(id)).unwrap();
    assert_eq!((edge.poll(), edge.next_frame(), edge.streams()), (None, None, 0));
    // And what crosses the end.
    edge.receive(reset(id)).unwrap();
    edge.receive(credit(id, 1)).unwrap();
}

#[test]
fn who_opens_and_resets_without_reading_is_stopped() {
    let mut edge = Mux::new(Side::Edge);
    let stopped = (0..)
        .map(|n| n << 3 | 0b100)
        .find_map(|id: u32| edge.receive(open(id, 0)).and_then(|()| edge.receive(reset(id))).err());
    assert_eq!(stopped, Some(Violation::TooMany));
    assert!(chores(&edge) <= MAX_STREAMS);
}

#[test]
fn a_narrow_carrier_gets_smaller_frames() {
    let mut cloud = Mux::new(Side::Cloud).cut_at(1000);
    let id = cloud.open(Class::Ops, Bytes::new()).unwrap();
    assert_eq!(cloud.write(id, &[7; 2500]), 2500);
    let large = wire::ReportAck { id: 1, refused: "x".repeat(2500) };
    cloud.control(Frame { body: Some(Body::ReportAck(large)) });
    let (mut data, mut parts) = (Vec::new(), Vec::new());
    while let Some(frame) = cloud.next_frame() {
        match frame.body {
            Some(Body::StreamData(frame)) => data.push(frame.data.len()),
            Some(Body::ControlPart(part)) => parts.push(part.data.len()),
            _ => {}
        }
    }
    assert_eq!((data, parts.len()), (vec![1000, 1000, 500], 3));
    assert!(parts.iter().all(|part| *part <= 1000));
    assert_eq!(Mux::new(Side::Cloud).cut_at(CUT + 1).cut, CUT);
}

#[test]
fn a_place_of_one_class_is_none_of_another() {
    let (mut cloud, mut edge) = (Mux::new(Side::Cloud), Mux::new(Side::Edge));
    for _ in 0..MAX_STREAMS {
        cloud.open(Class::Ops, Bytes::new()).unwrap();
    }
    assert_eq!(cloud.open(Class::Ops, Bytes::new()), Err(OpenError::TooMany));
    cloud.open(Class::Api, Bytes::new()).unwrap();
    for class in [Class::Ops, Class::Api] {
        while let Some(frame) = cloud.next_frame_of(Some(class)) {
            edge.receive(frame).unwrap();
        }
    }
    assert_eq!(edge.streams(), MAX_STREAMS + 1);
}

#[test]
fn readers_that_have_stopped_hold_up_no_others() {
    const MUCH: usize = 1 << 20;
    let (mut cloud, mut edge) = (Mux::new(Side::Cloud), Mux::new(Side::Edge));
    // What can go goes; one stream is read.
    let pump = |cloud: &mut Mux, edge: &mut Mux, reading: Option<StreamId>| {
        let mut read = 0;
        while let Some(frame) = edge.next_frame() {
            cloud.receive(frame).unwrap();
            while let Some(event) = cloud.poll() {
                if let Event::Data(id, data) = event
                    && Some(id) == reading
                {
                    read += data.len();
                    cloud.consumed(id, data.len());
                }
            }
            while let Some(frame) = cloud.next_frame() {
                edge.receive(frame).unwrap();
            }
        }
        read
    };
    for _ in 0..32 {
        let stalled = edge.open(Class::Ops, Bytes::new()).unwrap();
        while edge.write(stalled, &[1; 10_000]) > 0 {
            pump(&mut cloud, &mut edge, None);
        }
    }
    assert!(edge.waiting().streams[Class::Ops.index()] >= CLASS_BUFFER);
    let reading = edge.open(Class::Ops, Bytes::new()).unwrap();
    let (mut written, mut read) = (0, 0);
    while written < MUCH {
        let taken = edge.write(reading, &vec![2; MUCH - written]);
        assert!(taken > 0, "{written} bytes went, and then no more");
        written += taken;
        read += pump(&mut cloud, &mut edge, Some(reading));
        assert!(edge.streams[&reading].room(edge.waiting().streams[Class::Ops.index()]) > 0);
        let told = std::iter::from_fn(|| edge.poll()).any(|event| event == Event::Writable(reading));
        assert!(told || written == MUCH, "nobody is told that there is room");
    }
    assert_eq!(read, MUCH);
}

#[test]
fn a_control_frame_waits_for_one_frame_at_most() {
    let mut cloud = Mux::new(Side::Cloud);
    for class in Class::ALL {
        for _ in 0..20 {
            let id = cloud.open(class, Bytes::new()).unwrap();
            while cloud.write(id, &[1; 10_000]) > 0 {}
        }
    }
    for _ in 0..30 {
        cloud.next_frame().unwrap();
    }
    cloud.control(control(10));
    assert_eq!(cloud.next_frame(), Some(control(10)));
    // A large one is cut, and a ping goes between its parts.
    cloud.control(control(3 * CUT));
    assert!(matches!(cloud.next_frame().unwrap().body, Some(Body::ControlPart(_))));
    cloud.control(ping(1));
    assert_eq!(cloud.next_frame(), Some(ping(1)));
    for _ in 0..3 {
        assert!(matches!(cloud.next_frame().unwrap().body, Some(Body::ControlPart(_))));
    }
    assert_eq!(cloud.waiting().control, 0);
    assert!(matches!(cloud.next_frame().unwrap().body, Some(Body::StreamOpen(_) | Body::StreamData(_))));
}

#[test]
fn streams_of_a_class_take_turns_and_end_with_the_session() {
    let mut cloud = Mux::new(Side::Cloud);
    let ids: Vec<StreamId> = (0..3).map(|_| cloud.open(Class::Device, Bytes::new()).unwrap()).collect();
    for id in &ids {
        assert_eq!(cloud.write(*id, &[0; 20_000]), 20_000);
    }
    let mut turns = Vec::new();
    for _ in 0..9 {
        match cloud.next_frame().unwrap().body {
            Some(Body::StreamOpen(wire::StreamOpen { id, .. }) | Body::StreamData(wire::StreamData { id, .. })) => {
                turns.push(StreamId::parse(id).unwrap());
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(turns, ids.repeat(3));
    cloud.control(ping(0));
    cloud.end();
    cloud.control(ping(1));
    assert_eq!(cloud.next_frame(), Some(ping(1)));
    assert_eq!((cloud.next_frame(), cloud.waiting()), (None, Waiting::default()));
}

/// A line on which everything takes `delay` steps, with streams from the cloud that always have more, and their readers on the edge.
struct Line {
    cloud: Mux,
    edge: Mux,
    delay: usize,
    /// What goes each way, and when it arrives.
    down: VecDeque<(usize, Frame)>,
    up: VecDeque<(usize, Frame)>,
    /// For each stream, what its reader takes in one step at the most, what it has not taken, and what it took.
    readers: BTreeMap<StreamId, [usize; 3]>,
    now: usize,
}

impl Line {
    fn new(delay: usize, readers: &[usize]) -> Self {
        let mut cloud = Mux::new(Side::Cloud);
        let readers = readers.iter().map(|takes| (cloud.open(Class::Ops, Bytes::new()).unwrap(), [*takes, 0, 0]));
        let readers = readers.collect();
        let (edge, down, up) = (Mux::new(Side::Edge), VecDeque::new(), VecDeque::new());
        Self { cloud, edge, delay, down, up, readers, now: 0 }
    }

    /// Goes on for so many steps, on a line that takes so many bytes in each.
    fn run(&mut self, steps: usize, bandwidth: isize) {
        let mut room = 0_isize;
        for _ in 0..steps {
            self.now += 1;
            while self.down.front().is_some_and(|(at, _)| *at <= self.now) {
                self.edge.receive(self.down.pop_front().unwrap().1).unwrap();
            }
            while self.up.front().is_some_and(|(at, _)| *at <= self.now) {
                self.cloud.receive(self.up.pop_front().unwrap().1).unwrap();
            }
            while let Some(event) = self.edge.poll() {
                if let Event::Data(id, data) = event {
                    self.readers.get_mut(&id).unwrap()[1] += data.len();
                }
            }
            let mut unread = 0;
            for (id, [takes, waits, took]) in &mut self.readers {
                let bytes = (*takes).min(*waits);
                (*waits, *took) = (*waits - bytes, *took + bytes);
                self.edge.consumed(*id, bytes);
                unread += *waits;
            }
            assert!(unread <= self.readers.len() * (64 << 10) + MAX_GROWTH);
            room = bandwidth.saturating_add(room.min(0));
            while room > 0 {
                for id in self.readers.keys() {
                    self.cloud.write(*id, &[1; CUT]);
                }
                let Some(frame) = self.cloud.next_frame() else { break };
                room = room.saturating_sub_unsigned(frame.encoded_len());
                self.down.push_back((self.now + self.delay, frame));
            }
            while let Some(frame) = self.edge.next_frame() {
                self.up.push_back((self.now + self.delay, frame));
            }
            while self.cloud.poll().is_some() {}
        }
    }

    /// What all readers took.
    fn took(&self) -> usize {
        self.readers.values().map(|[_, _, took]| took).sum()
    }

    /// What each round trip brought since `before`.
    fn each_round_trip(&self, before: (usize, usize)) -> usize {
        (self.took() - before.1) * 2 * self.delay / (self.now - before.0)
    }
}

#[test]
fn a_window_grows_with_what_the_line_carries() {
    for delay in [2, 10, 50] {
        let mut line = Line::new(delay, &[usize::MAX]);
        line.run(40 * delay, isize::MAX);
        let before = (line.now, line.took());
        line.run(40 * delay, isize::MAX);
        let carried = line.each_round_trip(before);
        assert!(carried > MAX_WINDOW * 9 / 10, "{carried} bytes for each round trip of {} steps", 2 * delay);
        // The line carries no more than that: nor has the window to be larger.
        let mut line = Line::new(delay, &[usize::MAX]);
        let bandwidth = (100 << 10) / (2 * isize::try_from(delay).unwrap());
        line.run(200 * delay, bandwidth);
        assert!(line.edge.growth < 512 << 10, "{} too many", line.edge.growth);
        let before = (line.now, line.took());
        line.run(100 * delay, bandwidth);
        assert!(line.each_round_trip(before) > 90 << 10, "{}", line.each_round_trip(before));
    }
}

#[test]
fn who_reads_slowly_is_not_sent_more_to_hold() {
    for takes in [1, 100, 1000] {
        let mut line = Line::new(10, &[takes]);
        line.run(600, isize::MAX);
        assert_eq!(line.edge.growth, 0, "a reader of {takes} bytes in each of 20 steps");
        // One that was quick, and is slow: what it is sent more is given back.
        let id = *line.readers.keys().next().unwrap();
        line.readers.get_mut(&id).unwrap()[0] = usize::MAX;
        line.run(600, isize::MAX);
        assert_eq!(line.edge.growth, MAX_WINDOW - (64 << 10));
        line.readers.get_mut(&id).unwrap()[0] = 1000;
        line.run(20_000, isize::MAX);
        assert!(line.edge.growth < MAX_WINDOW / 2, "{}", line.edge.growth);
    }
}

#[test]
fn all_windows_together_are_bounded_and_given_back() {
    let mut line = Line::new(10, &[usize::MAX; 20]);
    line.run(600, isize::MAX);
    assert_eq!(line.edge.growth, MAX_GROWTH);
    for id in line.readers.keys() {
        line.cloud.reset(*id, "enough");
    }
    line.readers.clear();
    line.run(100, isize::MAX);
    assert_eq!((line.edge.growth, line.edge.streams()), (0, 0));
}

proptest! {
    #[test]
    fn no_bytes_panic(inputs in proptest::collection::vec(any_frame(), 0..60)) {
        let (mut edge, _) = edge_with_stream();
        for bytes in inputs {
            let Ok(frame) = Frame::decode(bytes.as_slice()) else { continue };
            if edge.receive(frame).is_err() {
                break;
            }
            while let Some(event) = edge.poll() {
                if let Event::Data(id, data) = event {
                    edge.consumed(id, data.len());
                }
            }
            edge.next_frame();
        }
    }
}

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let id = || 0..40u32;
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..200),
        (id(), 0..9000usize).prop_map(|(id, header)| open(id, header).encode_to_vec()),
        (id(), 0..70_000usize, any::<bool>()).prop_map(|(id, bytes, fin)| data(id, bytes, fin).encode_to_vec()),
        (id(), any::<u32>()).prop_map(|(id, bytes)| credit(id, bytes).encode_to_vec()),
        id().prop_map(|id| reset(id).encode_to_vec()),
        (proptest::collection::vec(any::<u8>(), 0..50), any::<bool>())
            .prop_map(|(bytes, last)| part(bytes, last).encode_to_vec()),
    ]
}
