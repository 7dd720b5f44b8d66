//! Valid input of every kind, most of it from the real thing.

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;

use crate::delta;
use crate::dictionary;
use crate::mqtt;
use crate::mux::{Class, Mux, Side};
use crate::sync::{
    Collection, Edge, EdgeInput, EdgeOutput, Encoding, Entry, Hub, HubInput, HubOutput, Object, Report, ReportKind,
    encode,
};
use crate::wire::{self, Frame, frame::Body};

/// What one side hears, frame by frame.
type Sequence = Vec<Vec<u8>>;

/// Frames of one session.
const LONGEST: usize = 40;

pub(super) fn frames() -> Vec<Vec<u8>> {
    let (up, down) = sessions();
    let nothing = [
        Body::Inventory(wire::Inventory { entries: vec![wire::Entry::default(); 50], ..wire::Inventory::default() }),
        Body::Hello(wire::Hello { digests: vec![wire::Digest::default(); 50], ..wire::Hello::default() }),
    ];
    let nothing = nothing.map(|body| Frame { body: Some(body) }.encode_to_vec());
    up.into_iter().chain(down).chain(streams()).flatten().chain(nothing).collect()
}

/// What a hub hears in some sessions, and what an edge hears, from their first frames on.
pub(super) fn sessions() -> (Vec<Sequence>, Vec<Sequence>) {
    let held = |n: u64| Entry { key: format!("ns/{n}"), uid: format!("u{n}"), version: n };
    // A new store, one that holds something else, and one with many rows.
    let stores = [0..0, 1..4, 1..1500].map(|rows| rows.map(|n| (Collection::Pods, held(n))).collect::<Vec<_>>());
    stores.into_iter().map(|rows| session(Edge::new("n", "b", "s", "edge", 4, rows))).unzip()
}

pub(super) fn object(n: usize, size: usize) -> Object {
    let collection = [Collection::ConfigMaps, Collection::Pods][n % 2];
    let json = serde_json::to_vec(&"some text ".repeat(size / 10)).unwrap();
    Object::new(collection, format!("ns/{n}"), format!("u{n}"), &json)
}

fn session(edge: Edge) -> (Sequence, Sequence) {
    let now = Duration::ZERO;
    let mut edge = edge.with_revisions([(Collection::Pods, 3)]);
    let mut hub: Option<Hub> = None;
    let (mut up, mut down) = (Vec::new(), Vec::new());
    let mut to_edge = vec![EdgeInput::Connected];
    let mut said = 0;
    for id in 1..4 {
        let kind = [ReportKind::Event, ReportKind::PodStatus, ReportKind::NodeStatus][usize::try_from(id).unwrap() - 1];
        let payload = Bytes::from(vec![b'r'; 400 * usize::try_from(id).unwrap()]);
        let report = Report { id, kind, namespace: "ns".into(), name: "a".into(), uid: "u".into(), payload };
        to_edge.push(EdgeInput::Report(report));
    }
    loop {
        let mut to_hub = Vec::new();
        for output in to_edge.drain(..).flat_map(|input| edge.step(now, input)).collect::<Vec<_>>() {
            match output {
                EdgeOutput::Send(frame) => to_hub.push(frame),
                EdgeOutput::Apply { ticket, .. } => to_edge.push(EdgeInput::Committed { ticket }),
                _ => {}
            }
        }
        let mut out = Vec::new();
        for frame in to_hub {
            up.push(frame.encode_to_vec());
            match (&mut hub, frame.body) {
                (None, Some(Body::Hello(hello))) => {
                    let (machine, welcome) = Hub::new(now, &hello, 5, 0, "hub");
                    hub = Some(machine);
                    out.extend(welcome);
                }
                (Some(hub), body) => out.extend(hub.step(now, HubInput::Frame(Frame { body }))),
                (None, _) => panic!("the first frame is a Hello"),
            }
        }
        let Some(hub) = &mut hub else { continue };
        out.extend(words(said, None).into_iter().flat_map(|input| hub.step(now, input)));
        said += 1;
        for output in out {
            match output {
                HubOutput::Send(frame) => {
                    down.push(frame.encode_to_vec());
                    to_edge.push(EdgeInput::Frame(frame));
                }
                HubOutput::Report(report) => {
                    let answer = hub.step(now, HubInput::Reported { id: report.id, refused: "no".into() });
                    for output in answer {
                        if let HubOutput::Send(frame) = output {
                            down.push(frame.encode_to_vec());
                            to_edge.push(EdgeInput::Frame(frame));
                        }
                    }
                }
                _ => {}
            }
        }
        if said > 12 && to_edge.is_empty() {
            // Of many deletes, some are enough.
            up.truncate(LONGEST);
            down.truncate(LONGEST);
            for (id, size) in [(8, 1000), (9, crate::sync::MAX_REPORT + 1)] {
                let (kind, encoding) = (ReportKind::Event.into(), Encoding::Zstd.into());
                let payload = without_size(&vec![b'x'; size]);
                let report = wire::Report { id, kind, encoding, payload, ..wire::Report::default() };
                up.push(Frame { body: Some(Body::Report(report)) }.encode_to_vec());
            }
            for body in [Body::Ping(wire::Ping { token: 1 }), Body::Goodbye(wire::Goodbye::default())] {
                let frame = Frame { body: Some(body) }.encode_to_vec();
                up.push(frame.clone());
                down.push(frame);
            }
            return (up, down);
        }
    }
}

/// What a hub is told by its own side at the `n`th of a session's steps.
pub(super) fn words(n: usize, report: Option<u64>) -> Vec<HubInput> {
    let mut said = match n {
        0 => vec![HubInput::Newest(Collection::Pods, 9)],
        1..5 => vec![HubInput::Desired(object(n, n * 400).into())],
        5 => crate::sync::COLLECTIONS.into_iter().map(HubInput::Complete).collect(),
        6 => vec![HubInput::Reached(Collection::Pods, 9)],
        7..9 => {
            let new = object(n - 5, 2000);
            vec![HubInput::Desired(new.succeeding(&object(n - 5, (n - 5) * 400)).into())]
        }
        9 => vec![HubInput::Gone(Collection::Pods, "u1".to_owned())],
        _ => Vec::new(),
    };
    said.extend(report.map(|id| HubInput::Reported { id, refused: String::new() }));
    said
}

/// What comes on one of QUIC's streams.
pub(super) fn lanes() -> Vec<Vec<u8>> {
    let (up, down) = sessions();
    let behind_their_lengths = |frames: Sequence| {
        let frames = frames.into_iter().flat_map(|frame| {
            let mut bytes = Vec::new();
            prost::encode_length_delimiter(frame.len(), &mut bytes).unwrap();
            bytes.extend(frame);
            bytes
        });
        frames.collect()
    };
    up.into_iter().chain(down).chain(streams()).map(behind_their_lengths).collect()
}

/// What an edge's multiplexer hears, and a cloud's.
pub(super) fn streams() -> Vec<Sequence> {
    let heard = |from: Side, size: usize| {
        let mut mux = Mux::new(from);
        let mut frames = vec![vec![u8::from(from == Side::Cloud)]];
        for class in Class::ALL {
            let id = mux.open(class, Bytes::from_static(b"logs")).unwrap();
            mux.write(id, &vec![7; size]);
            let hello = wire::Hello { agent: "a".repeat(size), ..wire::Hello::default() };
            mux.control(Frame { body: Some(Body::Hello(hello)) });
            mux.control(Frame { body: Some(Body::Ping(wire::Ping { token: 7 })) });
            match class {
                Class::Api => mux.finish(id),
                Class::Ops => {}
                Class::Device => mux.abandon(id, "enough"),
            }
            frames.extend(std::iter::from_fn(|| mux.next_frame()).map(|frame| frame.encode_to_vec()));
            let credit = wire::StreamCredit { id: id.into(), bytes: 0 };
            frames.push(Frame { body: Some(Body::StreamCredit(credit)) }.encode_to_vec());
            mux.reset(id, "over");
            frames.extend(std::iter::from_fn(|| mux.next_frame()).map(|frame| frame.encode_to_vec()));
        }
        frames
    };
    vec![heard(Side::Edge, 10), heard(Side::Cloud, 10), heard(Side::Edge, 10_000), heard(Side::Cloud, 10_000)]
}

/// An encoding, and what is encoded.
pub(super) fn payloads() -> Vec<Vec<u8>> {
    let texts =
        [b"{}".to_vec(), b"some text ".repeat(100), vec![b'a'; 1 << 20], vec![b'a'; crate::sync::MAX_OBJECT + 1]];
    let bytes = |(encoding, payload): (Encoding, Bytes)| {
        let mut bytes = vec![u8::try_from(encoding as i32).unwrap()];
        bytes.extend_from_slice(&payload);
        bytes
    };
    let with_dictionary = json().into_iter().map(|text| text.repeat(4)).chain([vec![b'a'; 60_000]]);
    let with_dictionary =
        with_dictionary.map(|text| (Encoding::ZstdDictionary, dictionary::compress(&text).unwrap().into()));
    let without_size = texts.iter().map(|text| (Encoding::Zstd, without_size(text)));
    texts.iter().map(|text| encode(text)).chain(with_dictionary).chain(without_size).map(bytes).collect()
}

/// As no edge compresses it: the frame does not say how large it becomes.
fn without_size(text: &[u8]) -> Bytes {
    zstd::stream::encode_all(text, 3).unwrap().into()
}

/// The length of a text, the text, and a delta of it.
pub(super) fn deltas() -> Vec<Vec<u8>> {
    let base = b"some text ".repeat(100);
    let new = [base.clone(), base.repeat(2), vec![b'a'; crate::sync::MAX_OBJECT + 1], Vec::new()];
    let delta = |new: Vec<u8>| {
        let mut bytes = u16::try_from(base.len()).unwrap().to_le_bytes().to_vec();
        bytes.extend_from_slice(&base);
        bytes.extend_from_slice(&delta::diff(&base, &new, usize::MAX).unwrap());
        bytes
    };
    new.into_iter().map(delta).collect()
}

pub(super) fn json() -> Vec<Vec<u8>> {
    let texts = [
        r#"{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]},"finished":true}"#,
        r#"{"status":{"capacity":{"cpu":"2"}},"addresses":["10.0.0.1"],"labels":{"kubernetes.io/os":"linux"}}"#,
        r#"{"clusterDns":["10.96.0.10"],"clusterDomain":"cluster.local"}"#,
        r#"{"token":"a.b.c","expires":1700000000}"#,
        r#"{"node":"n","csr":"PEM","machine_id":"m","labels":{"a":"b"},"time":1700000000}"#,
        r#"{"certificate":"PEM","ca":"PEM","time":1700000000}"#,
        r#"{"reason":"token_expired","message":"é\u0000\ud83d\ude00"}"#,
        r#"{"status":{"state":"online","twins":[{"propertyName":"t","reported":{"value":"1","metadata":{"timestamp":"1700000000"}}}]}}"#,
        r#"{"nodeName":"n","deviceModelRef":{"name":"m"},"protocol":{"protocolName":"modbus","configData":{"unit":1,"addr":"[::1]:502"}},"properties":[{"name":"t","desired":{"value":"2"},"reportCycle":1000,"visitors":{"protocolName":"modbus","configData":{"offset":2,"scale":0.1}}}],"methods":[{"name":"go","propertyNames":["t"]}]}"#,
        r#"{"protocol":"modbus","properties":[{"name":"t","type":"FLOAT","accessMode":"ReadWrite","minimum":"-40","maximum":"85","unit":"°C"}]}"#,
        r#"{"status":1e400,"deep":[[[[[[[[[[{"a":{"a":{"a":-0.0}}}]]]]]]]]]]}"#,
    ];
    texts.into_iter().map(|text| text.as_bytes().to_vec()).collect()
}

pub(super) fn tokens() -> Vec<Vec<u8>> {
    let (secret, hash) = ("s".repeat(32), "0f".repeat(32));
    vec![
        format!("skerry.abc123.{secret}.{hash}").into_bytes(),
        b" skerry.a.b.c\n".to_vec(),
        "é".repeat(40).into_bytes(),
    ]
}

/// What a broker says in a session.
pub(super) fn mqtt() -> Vec<Vec<u8>> {
    let mut said = b"\x20\x02\0\0\x90\x03\0\x01\x01\xd0\0\x40\x02\0\x07\x62\x02\0\x08".to_vec();
    let mut long = said.clone();
    for (qos, topic) in [(0, "devices/ns/boiler/temperature"), (1, "$hw/events/device/ns/boiler/twin/get"), (2, "é")] {
        mqtt::publish(&mut said, &mqtt::Publish { topic, payload: b"{\"event_id\":\"1\"}", qos, retain: qos == 0 }, 9);
        mqtt::publish(&mut long, &mqtt::Publish { topic, payload: &[b'x'; 5000], qos, retain: false }, 10);
    }
    vec![said, long]
}
