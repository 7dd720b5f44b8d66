//! One thing at a time: what a link costs, when it is dead, and each way to break the protocol.

use prost::Message as _;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::cloud::{Apiserver, Id, PODS, Replica, TOKENS};
use super::world::Connection;
use super::*;
use crate::wire::{self, Frame, frame::Body};

/// A world of one replica, whose edge holds twenty pods and is in sync.
fn in_sync() -> World {
    let mut world = World::new(1, None);
    world.apiserver.clear();
    for n in 0..20 {
        let id = (PODS, format!("0b9cb2a2-4d3a-4a6e-8a26-0123456789{n:02}"));
        world.apiserver.write(&mut world.dice, &id, &format!("default/web-{n}"));
    }
    world.with_one_replica();
    world.settle();
    world
}

fn some_pod(world: &World) -> Id {
    world.apiserver.objects.keys().next().unwrap().clone()
}

/// An object changes, and the session says so.
fn change(world: &mut World, id: &Id, text: &str) {
    world.apiserver.put(id, "default/web", &serde_json::to_vec(text).unwrap());
    hear(world, id.0);
}

/// The replica sees all that happened, and its session says so.
fn hear(world: &mut World, order: usize) {
    while world.replicas[0].watch(&world.apiserver, order) {}
    for _ in 0..100 {
        world.feed(0);
    }
}

/// Everything moves but the replicas' watches.
fn go_on(world: &mut World) {
    for _ in 0..200 {
        world.feed(0);
        world.deliver_up(world.connections.len() - 1);
        world.deliver_down();
        world.commit();
    }
}

fn line(world: &World) -> &Connection {
    world.connections.last().unwrap()
}

fn is_change(frame: &Frame) -> bool {
    matches!(frame.body, Some(Body::Upsert(_) | Body::Delete(_)))
}

fn is_inventory_request(frame: &Frame) -> bool {
    matches!(frame.body, Some(Body::InventoryRequest(_)))
}

#[test]
fn reconnecting_with_nothing_changed_sends_no_object() {
    let mut world = in_sync();
    world.connect();
    let mut bytes = 0;
    for _ in 0..100 {
        let line = line(&world);
        bytes += line.up.iter().chain(&line.down).map(prost::Message::encoded_len).sum::<usize>();
        assert!(!line.down.iter().any(|frame| matches!(frame.body, Some(Body::Upsert(_) | Body::InventoryRequest(_)))));
        world.deliver_up(world.connections.len() - 1);
        world.feed(0);
        world.deliver_down();
    }
    assert!(bytes < 1024, "{bytes} bytes");
}

#[test]
fn another_replica_resumes_in_one_round_trip() {
    for seed in 0..20 {
        let mut world = in_sync();
        world.dice = Dice::new(seed);
        for n in 0..3 {
            world.apiserver.write(&mut world.dice, &(TOKENS, format!("token-{n}")), &format!("default/web-{n}"));
        }
        hear(&mut world, TOKENS);
        world.settle_on();
        world.assert_converged();
        // One that has never seen the node, and has not minted the tokens that its pods have.
        world.with_one_replica();
        world.connect();
        let last = world.connections.len() - 1;
        while !line(&world).up.is_empty() {
            world.deliver_up(last);
        }
        for _ in 0..100 {
            world.feed(0);
        }
        assert!(!line(&world).down.iter().any(|frame| is_change(frame) || is_inventory_request(frame)));
        while !line(&world).down.is_empty() {
            world.deliver_down();
        }
        // All that agrees is said of the pods alone.
        assert!(world.node.agreed.contains(&PODS), "seed {seed}: in sync when the first answer is here");
        world.assert_converged();
        // What the edge says to that is the last word.
        while !line(&world).up.is_empty() {
            world.deliver_up(last);
        }
        assert!(line(&world).down.is_empty(), "seed {seed}: {:?}", line(&world).down);
    }
}

#[test]
fn a_letter_changed_is_sent_as_a_delta() {
    let mut world = in_sync();
    let id = some_pod(&world);
    let noise: String = (0..4).map(|_| world.dice.letters(12_000)).collect();
    let mut other = noise.clone();
    other.replace_range(24_000..24_001, "_");
    change(&mut world, &id, &noise);
    world.settle_on();
    let before = world.node.deltas;
    change(&mut world, &id, &other);
    let sent = line(&world).down.iter().map(prost::Message::encoded_len).max().unwrap();
    world.settle_on();
    assert!(sent < 300, "{sent} bytes");
    assert_eq!(world.node.deltas, before + 1);
    world.assert_converged();
}

#[test]
fn a_hub_that_is_not_complete_neither_sends_nor_deletes() {
    let mut world = in_sync();
    world.apiserver.clear();
    world.replicas[0] = Replica::new(&world.apiserver);
    world.connect();
    world.deliver_up(world.connections.len() - 1);
    let session = world.replicas[0].session.as_mut().unwrap();
    // Everything but that pods are complete.
    session.untold.retain(|input| !matches!(input, HubInput::Complete(Collection::Pods)));
    // And as if nothing were missing.
    world.say(0, HubInput::Restored);
    go_on(&mut world);
    assert_eq!(world.node.disk.rows.len(), 20);
}

#[test]
fn a_replica_that_lags_takes_nothing_back() {
    let mut world = in_sync();
    let (changed, gone) = (some_pod(&world), world.apiserver.objects.keys().nth(1).unwrap().clone());
    let late = Replica::new(&world.apiserver);
    change(&mut world, &changed, "newer");
    world.apiserver.delete(&gone);
    let new = (PODS, "new".to_owned());
    change(&mut world, &new, "not known yet");
    go_on(&mut world);
    let held = world.node.disk.rows.clone();
    assert_eq!(held, world.apiserver.desired());

    // What it has seen is older, whatever it is: a state, an object that is gone, one that is not there yet.
    world.replicas[0] = late;
    world.connect();
    go_on(&mut world);
    assert!(world.replicas[0].session.as_ref().unwrap().hub.is_behind());
    assert_eq!(world.node.disk.rows, held);
    // When it has caught up, both agree, and nothing is sent.
    hear(&mut world, PODS);
    assert!(!world.replicas[0].session.as_ref().unwrap().hub.is_behind());
    assert!(!line(&world).down.iter().any(is_change));
    change(&mut world, &changed, "newest");
    go_on(&mut world);
    world.assert_converged();
}

#[test]
fn an_apiserver_that_was_restored_is_believed() {
    let mut world = in_sync();
    let held: Vec<_> = world.node.edge.revisions().collect();
    assert!(!held.is_empty());
    // Its revisions begin anew, far below what the edge has seen.
    let epoch = world.apiserver.epoch;
    world.apiserver = Apiserver::default();
    world.apiserver.epoch = epoch;
    world.apiserver.write(&mut world.dice, &(PODS, "other".to_owned()), "default/other");
    world.with_one_replica();
    world.connect();
    go_on(&mut world);
    assert_eq!(world.node.disk.rows.len(), 20);
    world.say(0, HubInput::Restored);
    go_on(&mut world);
    world.assert_converged();
    assert_eq!(world.node.edge.revisions().collect::<Vec<_>>(), [(Collection::Pods, 1)]);
}

#[test]
fn a_slow_edge_gets_the_newest_only() {
    let mut world = in_sync();
    let id = some_pod(&world);
    for n in 0..50 {
        // Too varied to be compressed below the window.
        let noise = world.dice.letters(9000);
        change(&mut world, &id, &format!("{n}{noise}"));
    }
    let queued = line(&world).down.iter().filter(|frame| is_change(frame)).count();
    assert!(queued <= 2, "{queued} queued");
    world.settle();
    world.assert_converged();
}

#[test]
fn a_dead_link_is_noticed_on_both_sides() {
    for (up, down) in [(true, true), (true, false), (false, true)] {
        let mut world = in_sync();
        let id = world.current.unwrap();
        let connection = world.connection(id).unwrap();
        (connection.is_up_lost, connection.is_down_lost) = (up, down);
        for _ in 0..30 {
            world.pass_time(Duration::from_secs(1));
            world.deliver_up(world.connections.len() - 1);
            world.deliver_down();
        }
        assert!(world.current.is_none() && world.replicas[0].session.is_none());
    }
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
fn a_doubt_is_settled_soon() {
    let seconds = Duration::from_secs;
    let is_ping =
        |out: &[EdgeOutput]| matches!(out, [EdgeOutput::Send(Frame { body: Some(Body::Ping(wire::Ping { .. })) })]);
    let mut edge = Edge::new("n", "b", "s", "edge", 0, []);
    assert!(edge.step(seconds(0), EdgeInput::Doubt).is_empty(), "there is nothing to doubt");
    edge.step(seconds(0), EdgeInput::Connected);
    assert!(edge.step(seconds(0), EdgeInput::Doubt).is_empty(), "before the Welcome the cloud takes no ping");
    let welcome = wire::Welcome { protocol: 1, epoch: 1, ..Default::default() };
    edge.step(seconds(1), EdgeInput::Frame(Frame { body: Some(Body::Welcome(welcome)) }));
    assert!(is_ping(&edge.step(seconds(10), EdgeInput::Doubt)));
    assert_eq!(edge.next_timeout(), Some(seconds(10) + ANSWER_DUE));
    assert!(edge.step(seconds(12), EdgeInput::Heard).is_empty());
    assert!(edge.step(seconds(16), EdgeInput::Timeout).is_empty(), "something was heard");
    assert!(edge.step(seconds(20), EdgeInput::Doubt).is_empty(), "the last one was just now");
    assert!(is_ping(&edge.step(seconds(10) + DOUBT_PACE, EdgeInput::Doubt)));
    let out = edge.step(seconds(10) + DOUBT_PACE + ANSWER_DUE, EdgeInput::Timeout);
    assert!(matches!(out.as_slice(), [EdgeOutput::Close(None)]), "{out:?}");
}

#[test]
fn the_dictionary_is_used_where_both_have_it() {
    let text = serde_json::to_vec(&"kubernetes.io/hostname".repeat(40)).unwrap();
    let object = Object::new(Collection::Pods, "ns/a".into(), "u".into(), &text);
    assert_eq!(object.encoding, Encoding::ZstdDictionary);
    for (dictionaries, has) in [(vec![], false), (vec![dictionary::ID + 1], false), (vec![7, dictionary::ID], true)] {
        let hello =
            wire::Hello { protocol_min: 1, protocol_max: 1, dictionaries: dictionaries.clone(), ..Default::default() };
        let (mut hub, out) = Hub::new(Duration::ZERO, &hello, 1, 0, "hub");
        let [HubOutput::Send(Frame { body: Some(Body::Welcome(welcome)) })] = out.as_slice() else { panic!("{out:?}") };
        assert_eq!(welcome.dictionaries, [dictionary::ID]);
        let mut out = hub.step(Duration::ZERO, HubInput::Desired(object.clone().into()));
        for collection in COLLECTIONS {
            out.extend(hub.step(Duration::ZERO, HubInput::Complete(collection)));
        }
        out.extend(hub.step(
            Duration::ZERO,
            HubInput::Frame(Frame {
                body: Some(Body::Inventory(wire::Inventory {
                    collection: Collection::Pods.into(),
                    last: true,
                    ..Default::default()
                })),
            }),
        ));
        let upsert = out.into_iter().find_map(|output| match output {
            HubOutput::Send(Frame { body: Some(Body::Upsert(upsert)) }) => Some(upsert),
            _ => None,
        });
        let upsert = upsert.unwrap();
        assert_eq!(upsert.encoding(), if has { Encoding::ZstdDictionary } else { Encoding::Zstd });
        assert_eq!(decode(upsert.encoding(), &upsert.full).unwrap(), text);
        // And the other way.
        let mut edge = Edge::new("n", "b", "s", "edge", 0, []);
        let hello = edge.step(Duration::ZERO, EdgeInput::Connected);
        let [EdgeOutput::Send(Frame { body: Some(Body::Hello(hello)) })] = hello.as_slice() else {
            panic!("{hello:?}")
        };
        assert_eq!(hello.dictionaries, [dictionary::ID]);
        let (namespace, name, uid) = (String::new(), "n".to_owned(), "u".to_owned());
        let payload = text.clone().into();
        let report = Report { id: 1, kind: ReportKind::NodeStatus, namespace, name, uid, payload };
        edge.step(Duration::ZERO, EdgeInput::Report(report));
        let welcome = wire::Welcome { protocol: 1, epoch: 1, dictionaries, ..Default::default() };
        let out = edge.step(Duration::ZERO, EdgeInput::Frame(Frame { body: Some(Body::Welcome(welcome)) }));
        let Some(EdgeOutput::Send(Frame { body: Some(Body::Report(report)) })) = out.last() else { panic!("{out:?}") };
        assert_eq!(report.encoding(), if has { Encoding::ZstdDictionary } else { Encoding::Zstd });
        assert_eq!(decode(report.encoding(), &report.payload).unwrap(), text);
    }
}

#[test]
fn an_idle_link_is_kept_alive() {
    let mut world = in_sync();
    for _ in 0..600 {
        world.pass_time(Duration::from_secs(1));
        world.deliver_up(world.connections.len() - 1);
        world.deliver_down();
    }
    assert!(world.current.is_some() && world.replicas[0].session.is_some());
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
fn a_node_that_holds_much_that_it_should_not_costs_little() {
    let hello = wire::Hello { protocol_min: 1, protocol_max: 1, ..wire::Hello::default() };
    let (mut hub, _) = Hub::new(Duration::ZERO, &hello, 1, 0, "hub");
    let collection = Collection::Devices;
    let part = |entries, last| {
        let inventory = wire::Inventory { collection: collection.into(), entries, last, seq: 0 };
        HubInput::Frame(Frame { body: Some(Body::Inventory(inventory)) })
    };
    let asked = hub.step(Duration::ZERO, HubInput::Complete(collection));
    assert!(matches!(asked.as_slice(), [HubOutput::Send(Frame { body: Some(Body::InventoryRequest(_)) })]));
    // From the last to the first, in many parts, and each looked at once only: else this takes minutes.
    let rows: Vec<wire::Entry> = (0..2 * MAX_DEVICES)
        .rev()
        .map(|n| wire::Entry { key: format!("ns/{n:06}"), uid: format!("{n:06}"), version: 1 })
        .collect();
    for entries in rows.chunks(10) {
        assert!(hub.step(Duration::ZERO, part(entries.to_vec(), false)).is_empty());
        assert!(hub.step(Duration::ZERO, part(vec![], false)).is_empty());
    }
    let mut out = hub.step(Duration::ZERO, part(vec![], true));
    // They are deleted, from the first on, each once.
    let mut deleted = 0;
    loop {
        let mut last = 0;
        for output in out {
            match output {
                HubOutput::Send(Frame { body: Some(Body::Delete(delete)) }) => {
                    assert_eq!(delete.uid, format!("{deleted:06}"));
                    (deleted, last) = (deleted + 1, delete.seq);
                }
                HubOutput::Send(Frame { body: Some(Body::DigestCheck(check)) }) => last = check.seq,
                HubOutput::Inventory(..) | HubOutput::InSync => {}
                other => panic!("{other:?}"),
            }
        }
        if last == 0 {
            break;
        }
        let ack = Frame { body: Some(Body::Ack(wire::Ack { seq: last })) };
        out = hub.step(Duration::ZERO, HubInput::Frame(ack));
    }
    assert_eq!(deleted, rows.len());
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
fn a_report_that_is_too_large_is_refused_and_holds_nothing_up() {
    let hello = wire::Hello { protocol_min: 1, protocol_max: 1, ..wire::Hello::default() };
    let (mut hub, _) = Hub::new(Duration::ZERO, &hello, 1, 0, "hub");
    for id in 0..100 {
        let (encoding, payload) = encode(&vec![b'x'; MAX_REPORT + 1]);
        let (kind, encoding) = (ReportKind::Event.into(), encoding.into());
        let report = Body::Report(wire::Report { id, kind, encoding, payload, ..wire::Report::default() });
        let out = hub.step(Duration::ZERO, HubInput::Frame(Frame { body: Some(report) }));
        let [HubOutput::Send(Frame { body: Some(Body::ReportAck(ack)) })] = out.as_slice() else { panic!("{out:?}") };
        assert!(ack.id == id && !ack.refused.is_empty());
    }
    assert_eq!(hub.take_tally(), Tally { refused: 100, ..Tally::default() });
    assert_eq!(hub.take_tally(), Tally::default());
}

#[test]
fn a_report_that_does_not_say_its_size_is_held_to_the_bound() {
    for (size, is_taken) in [(MAX_REPORT, true), (MAX_REPORT + 1, false)] {
        let hello = wire::Hello { protocol_min: 1, protocol_max: 1, ..wire::Hello::default() };
        let (mut hub, _) = Hub::new(Duration::ZERO, &hello, 1, 0, "hub");
        let payload = zstd::stream::encode_all(vec![b'x'; size].as_slice(), 3).unwrap().into();
        let (kind, encoding) = (ReportKind::Event.into(), Encoding::Zstd.into());
        let report = Body::Report(wire::Report { id: 1, kind, encoding, payload, ..wire::Report::default() });
        let out = hub.step(Duration::ZERO, HubInput::Frame(Frame { body: Some(report) }));
        let taken = matches!(out.as_slice(), [HubOutput::Report(report)] if report.payload.len() == size);
        assert_eq!(taken, is_taken, "{size}");
        assert!(out.iter().all(|output| taken || !matches!(output, HubOutput::Report(_))), "{size}");
    }
}

/// A session's edge, and what of reports it sends at a step: ids.
fn sent(edge: &mut Edge, now: u64, input: EdgeInput) -> Vec<u64> {
    let out = edge.step(Duration::from_secs(now), input);
    let reports = out.into_iter().filter_map(|output| match output {
        EdgeOutput::Send(Frame { body: Some(Body::Report(report)) }) => Some(report.id),
        _ => None,
    });
    reports.collect()
}

fn pod_report(id: u64, uid: &str) -> EdgeInput {
    let (namespace, name, uid) = ("ns".to_owned(), uid.to_owned(), uid.to_owned());
    EdgeInput::Report(Report { id, kind: ReportKind::PodStatus, namespace, name, uid, payload: Bytes::new() })
}

fn later(id: u64, seconds: u32) -> EdgeInput {
    EdgeInput::Frame(Frame { body: Some(Body::ReportLater(wire::ReportLater { id, after_ms: 1000 * seconds })) })
}

fn welcome(epoch: u64) -> EdgeInput {
    let welcome = wire::Welcome { protocol: 1, epoch, ..Default::default() };
    EdgeInput::Frame(Frame { body: Some(Body::Welcome(welcome)) })
}

#[test]
fn what_the_cloud_gives_back_again_and_again_waits_longer_each_time() {
    let mut edge = Edge::new("n", "b", "s", "edge", 0, []);
    sent(&mut edge, 0, pod_report(1, "p"));
    sent(&mut edge, 0, EdgeInput::Connected);
    assert_eq!(sent(&mut edge, 0, welcome(1)), [1]);
    let mut now = 0;
    for waits in [400, 800, 1600, 1800, 1800] {
        assert!(sent(&mut edge, now, later(1, 400)).is_empty());
        now += waits;
        sent(&mut edge, now - 1, EdgeInput::Heard);
        assert!(sent(&mut edge, now - 1, EdgeInput::Timeout).is_empty(), "{waits}");
        assert_eq!(sent(&mut edge, now, EdgeInput::Timeout), [1], "{waits}");
    }
    // The cloud may ask for more, and something new about the same is tried in its own time.
    assert!(sent(&mut edge, now, later(1, 2000)).is_empty());
    now += 2000;
    sent(&mut edge, now - 1, EdgeInput::Heard);
    assert!(sent(&mut edge, now - 1, EdgeInput::Timeout).is_empty());
    assert_eq!(sent(&mut edge, now, EdgeInput::Timeout), [1]);
    assert_eq!(sent(&mut edge, now, pod_report(2, "p")), [2]);
    sent(&mut edge, now, later(2, 400));
    sent(&mut edge, now + 399, EdgeInput::Heard);
    assert_eq!(sent(&mut edge, now + 400, EdgeInput::Timeout), [2]);
    // What replaces one that waits longer and longer does not wait longer than the cloud said.
    assert!(sent(&mut edge, now + 400, later(2, 400)).is_empty());
    now += 400;
    assert!(sent(&mut edge, now, pod_report(3, "p")).is_empty());
    sent(&mut edge, now + 399, EdgeInput::Heard);
    assert!(sent(&mut edge, now + 399, EdgeInput::Timeout).is_empty());
    now += 400;
    assert_eq!(sent(&mut edge, now, EdgeInput::Timeout), [3]);
    // Of two on their way the older is not needed when the newer was given back.
    assert_eq!(sent(&mut edge, now, pod_report(4, "p")), [4]);
    assert!(sent(&mut edge, now, later(4, 1)).is_empty() && sent(&mut edge, now, later(3, 1)).is_empty());
    now += 1;
    assert_eq!(sent(&mut edge, now, EdgeInput::Timeout), [4]);
    // All of it is new in another session.
    sent(&mut edge, now, EdgeInput::Disconnected);
    sent(&mut edge, now, EdgeInput::Connected);
    assert_eq!(sent(&mut edge, now, welcome(2)), [4]);
    sent(&mut edge, now, later(4, 400));
    sent(&mut edge, now + 399, EdgeInput::Heard);
    assert_eq!(sent(&mut edge, now + 400, EdgeInput::Timeout), [4]);
}

#[test]
fn what_the_cloud_gives_back_holds_nothing_up_and_goes_again_in_its_time() {
    let mut edge = Edge::new("n", "b", "s", "edge", 0, []);
    let window = u64::try_from(REPORT_WINDOW).unwrap();
    for id in 1..=window + 2 {
        assert!(sent(&mut edge, 0, pod_report(id, &format!("p{id}"))).is_empty());
    }
    sent(&mut edge, 0, EdgeInput::Connected);
    assert_eq!(sent(&mut edge, 0, welcome(1)), Vec::from_iter(1..=window));
    // Each that comes back makes room.
    assert_eq!(sent(&mut edge, 0, later(1, 10)), [window + 1]);
    assert_eq!(sent(&mut edge, 0, later(2, 5)), [window + 2]);
    assert!(sent(&mut edge, 0, later(3, 10)).is_empty());
    // News about the same wait as long.
    assert!(sent(&mut edge, 1, pod_report(100, "p1")).is_empty());
    assert_eq!(sent(&mut edge, 2, pod_report(101, "other")), [101]);
    assert!(sent(&mut edge, 2, later(4, 20)).is_empty());
    assert_eq!(edge.next_timeout(), Some(Duration::from_secs(5)));
    assert_eq!(sent(&mut edge, 5, EdgeInput::Timeout), [2]);
    assert!(sent(&mut edge, 5, later(5, 20)).is_empty() && sent(&mut edge, 5, later(6, 20)).is_empty());
    assert_eq!(sent(&mut edge, 10, EdgeInput::Timeout), [100, 3]);
    // Of two about the same that are on their way, the older need not come again.
    assert!(sent(&mut edge, 10, pod_report(102, "p7")).is_empty());
    assert_eq!(sent(&mut edge, 10, later(8, 20)), [102]);
    assert!(sent(&mut edge, 10, later(7, 20)).is_empty());
    // Another session begins with what had no answer.
    sent(&mut edge, 11, EdgeInput::Disconnected);
    sent(&mut edge, 11, EdgeInput::Connected);
    let mut first = sent(&mut edge, 11, welcome(2));
    assert_eq!(first.len(), REPORT_WINDOW);
    while first.last() != Some(&8) {
        let id = first.remove(0);
        let ack = Frame { body: Some(Body::ReportAck(wire::ReportAck { id, refused: String::new() })) };
        first.extend(sent(&mut edge, 11, EdgeInput::Frame(ack)));
    }
    let violation = edge.step(Duration::from_secs(12), later(7, 1));
    assert!(matches!(violation.as_slice(), [EdgeOutput::Close(Some(_))]), "{violation:?}");
}

#[test]
fn peers_that_break_the_protocol_are_dismissed() {
    let long = "k".repeat(MAX_NAME + 1);
    for hello in [
        wire::Hello { agent: long.clone(), ..Default::default() },
        wire::Hello { run_id: long.clone(), ..Default::default() },
        wire::Hello { revisions: vec![wire::Revision::default(); 65], ..Default::default() },
    ] {
        assert!(check_hello(&hello).is_err());
    }
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
    // One that chooses what was not offered.
    let mut edge = Edge::new("n", "b", "s", "edgecore 0", 0, []);
    edge.step(Duration::ZERO, EdgeInput::Connected);
    let welcome = wire::Welcome { protocol: 2, epoch: 1, agent: "cloudcore 9".into(), ..Default::default() };
    let out = edge.step(Duration::ZERO, EdgeInput::Frame(Frame { body: Some(Body::Welcome(welcome)) }));
    let [EdgeOutput::Close(Some(goodbye))] = out.as_slice() else { panic!("{out:?}") };
    let said = "cloudcore 9 chose protocol 2, edgecore 0 speaks 1 to 1";
    assert!(goodbye.message.contains(said), "{}", goodbye.message);

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
        Body::Inventory(wire::Inventory {
            collection: Collection::Pods.into(),
            entries: vec![
                wire::Entry { key: "k".repeat(MAX_NAME), ..Default::default() };
                1 + MAX_INVENTORY_BYTES / MAX_NAME
            ],
            ..Default::default()
        }),
        Body::Report(wire::Report {
            encoding: Encoding::Zstd.into(),
            payload: Bytes::from_static(b"junk"),
            ..Default::default()
        }),
        Body::Report(wire::Report { kind: ReportKind::Event.into(), namespace: long, ..Default::default() }),
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
        Body::Upsert(wire::Upsert {
            seq: 1,
            collection: pods,
            key: "k".repeat(MAX_NAME + 1),
            uid: "u".into(),
            full: Bytes::from_static(b"{}"),
            ..Default::default()
        }),
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
