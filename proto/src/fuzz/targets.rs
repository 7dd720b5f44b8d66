//! What is given damaged input, and what must hold of what comes out.

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use serde::{Serialize, de::DeserializeOwned};

use super::alloc::peak;
use super::corpus;
use crate::delta;
use crate::device::{DeviceModelSpec, DeviceReport, DeviceSpec};
use crate::frame::{self, Lane};
use crate::mqtt;
use crate::mux::{CLASS_BUFFER, CUT, Class, Event, MAX_GROWTH, MAX_STREAMS, Mux, Side};
use crate::payload::{JoinRequest, JoinResponse, NodeReport, PodReport, Refusal, Settings, Token};
use crate::sync::{
    Collection, Edge, EdgeInput, EdgeOutput, Encoding, Entry, Hub, HubInput, HubOutput, MAX_FRAME, MAX_INVENTORY,
    MAX_OBJECT, MAX_REPORT, Op, REPORT_WINDOW, decode, max_inventory,
};
use crate::token::JoinToken;
use crate::wire::{self, Frame, frame::Body};

/// What zstd and the like may take for themselves, beside what they make.
const WORKSPACE: usize = 1 << 20;

/// A frame takes memory as its length says, but for a number of rows that is bounded.
pub(super) fn frame(bytes: &[u8]) {
    let input = Bytes::copy_from_slice(bytes);
    let (frame, most) = peak(|| frame::decode(input));
    assert!(most < 4 * bytes.len() + 2 * 64 * MAX_INVENTORY, "{most} bytes for a frame of {}", bytes.len());
    if let Ok(frame) = frame {
        assert_eq!(Frame::decode(frame.encode_to_vec().as_slice()), Ok(frame));
    }
}

/// A stream of QUIC's: however its bytes are cut, the same frames come of them, and no more is kept than the longest takes.
pub(super) fn lane(bytes: &[u8]) {
    const LONGEST: usize = 3000;
    let read = |part: usize| {
        let (mut lane, mut taken, mut frames) = (Lane::default(), 0, Vec::new());
        for part in bytes.chunks(part) {
            lane.hear(part);
            loop {
                match lane.take(LONGEST) {
                    Ok(Some((frame, length))) => {
                        taken += length;
                        frames.push(frame);
                    }
                    Ok(None) => break,
                    Err(_) => return (frames, taken, false),
                }
            }
            lane.rest();
        }
        (frames, taken, true)
    };
    let in_parts = read(7);
    assert!(in_parts.1 <= bytes.len());
    assert_eq!(in_parts, read(usize::MAX));
    let ((), most) = peak(|| {
        let mut lane = Lane::default();
        for part in bytes.chunks(100) {
            lane.hear(part);
            loop {
                match lane.take(LONGEST) {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => return,
                }
            }
        }
    });
    // Rows of nothing are all that grows.
    assert!(most < 128 * LONGEST, "{most} bytes for a stream of {}", bytes.len());
}

/// The cloud's side of a session with an edge that may say anything.
pub(super) fn hub(heard: &[Vec<u8>]) {
    let mut frames = heard.iter().filter_map(|bytes| frame::decode(bytes.clone().into()).ok()).peekable();
    let mut hello = wire::Hello { protocol_min: 1, protocol_max: 1, ..wire::Hello::default() };
    if let Some(Frame { body: Some(Body::Hello(first)) }) = frames.peek() {
        hello = first.clone();
        frames.next();
    }
    let (mut hub, mut out) = Hub::new(Duration::ZERO, &hello, 7, 0, "hub");
    let mut reports = std::collections::BTreeSet::new();
    for (n, frame) in frames.enumerate() {
        out.extend(hub.step(Duration::ZERO, HubInput::Frame(frame)));
        // The apiserver is slow.
        let answered = if n % 2 == 0 { reports.pop_first() } else { None };
        for input in corpus::words(n, answered) {
            out.extend(hub.step(Duration::ZERO, input));
        }
        let mut sent = 0;
        for output in out.drain(..) {
            match output {
                HubOutput::Send(frame) => sent += frame.encoded_len(),
                HubOutput::Report(report) => {
                    assert!(report.payload.len() <= MAX_REPORT);
                    assert!(reports.insert(report.id) && reports.len() <= REPORT_WINDOW);
                }
                HubOutput::Inventory(collection, rows) => {
                    let (count, bytes) = max_inventory(collection);
                    let names = |row: &Entry| row.key.len() + row.uid.len();
                    assert!(rows.len() <= count + 10);
                    assert!(rows.iter().map(names).sum::<usize>() <= bytes + 1000);
                }
                HubOutput::InSync => {}
                HubOutput::Close(_) => {
                    assert!(hub.step(Duration::ZERO, HubInput::Complete(Collection::Pods)).is_empty());
                    return;
                }
            }
        }
        // What is on its way is bounded, whatever the edge claims to hold.
        assert!(sent < 64 << 10, "{sent} bytes in answer to one frame");
    }
}

/// The edge's side of a session with a cloud that may say anything.
pub(super) fn edge(heard: &[Vec<u8>]) {
    let rows = (1..4).map(|n| (Collection::Pods, Entry { key: format!("ns/{n}"), uid: format!("u{n}"), version: n }));
    let mut edge = Edge::new("n", "b", "s", "edge", 4, rows);
    edge.step(Duration::ZERO, EdgeInput::Connected);
    for id in 1..4 {
        let uid = id.to_string();
        let kind = crate::sync::ReportKind::Event;
        let (namespace, name, payload) = ("ns".to_owned(), uid.clone(), Bytes::new());
        let report = crate::sync::Report { id, kind, namespace, name, uid, payload };
        edge.step(Duration::ZERO, EdgeInput::Report(report));
    }
    let mut written = 0;
    for (n, bytes) in heard.iter().enumerate() {
        let Ok(frame) = frame::decode(bytes.clone().into()) else { continue };
        let mut out = edge.step(Duration::ZERO, EdgeInput::Frame(frame));
        if n % 3 == 0 {
            out.extend(edge.step(Duration::ZERO, EdgeInput::Committed { ticket: written }));
        }
        for output in out {
            match output {
                EdgeOutput::Send(frame) => assert!(frame.encoded_len() <= MAX_FRAME),
                EdgeOutput::Apply { ops, ticket } => {
                    written = ticket;
                    for op in ops {
                        if let Op::Upsert(object) = op {
                            assert!(object.payload.len() <= MAX_OBJECT && object.encoding == Encoding::Raw);
                            assert!(serde_json::from_slice::<serde::de::IgnoredAny>(&object.payload).is_ok());
                        }
                    }
                }
                EdgeOutput::Close(_) => {
                    assert!(edge.next_timeout().is_none());
                    assert!(edge.step(Duration::ZERO, EdgeInput::Committed { ticket: written }).is_empty());
                    return;
                }
                _ => {}
            }
        }
    }
}

/// A multiplexer whose peer may send anything; the first byte of all says which side it is.
pub(super) fn mux(heard: &[Vec<u8>]) {
    let side = heard
        .first()
        .and_then(|first| first.first())
        .map_or(Side::Edge, |byte| if byte & 1 == 1 { Side::Edge } else { Side::Cloud });
    let mut mux = Mux::new(side);
    let (mut ids, mut unread) = (Vec::new(), 0);
    for (n, bytes) in heard.iter().enumerate() {
        if n % 5 == 0
            && let Ok(id) = mux.open(Class::ALL[n % 3], Bytes::from_static(b"exec"))
        {
            ids.push(id);
        }
        if let Some(id) = ids.get(n % 7) {
            mux.write(*id, bytes);
        }
        let Ok(frame) = frame::decode(bytes.clone().into()) else { continue };
        if mux.receive(frame).is_err() {
            return;
        }
        while let Some(event) = mux.poll() {
            match event {
                Event::Opened { id, .. } => ids.push(id),
                Event::Data(id, data) if n % 2 == 0 => mux.consumed(id, data.len()),
                Event::Data(_, data) => unread += data.len(),
                Event::Control(_) | Event::Finished(_) | Event::Reset(..) | Event::Writable(_) => {}
            }
        }
        if let Some(frame) = mux.next_frame() {
            assert!(frame.encoded_len() <= CUT + 32);
        }
        let most = 2 * MAX_STREAMS;
        assert!(mux.streams() <= most * Class::ALL.len());
        assert!(mux.waiting().streams.iter().all(|bytes| *bytes <= CLASS_BUFFER + most * CUT));
        assert!(unread <= most * Class::ALL.len() * (64 << 10) + MAX_GROWTH);
    }
}

pub(super) fn payload(bytes: &[u8]) {
    let Some((encoding, payload)) = bytes.split_first() else { return };
    let encoding = Encoding::try_from(i32::from(*encoding) % 3).unwrap();
    let (decoded, most) = peak(|| decode(encoding, payload));
    assert!(most <= MAX_OBJECT + WORKSPACE, "{most} bytes for a payload of {}", payload.len());
    if let Ok(decoded) = decoded {
        assert!(decoded.len() <= MAX_OBJECT);
    }
}

pub(super) fn delta(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else { return };
    let (base, delta) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
    let (made, most) = peak(|| delta::apply(base, delta));
    // It grows by doubling.
    assert!(most <= 4 * MAX_OBJECT + WORKSPACE, "{most} bytes for a delta of {}", delta.len());
    if let Ok(made) = made {
        assert!(made.len() <= MAX_OBJECT);
    }
}

pub(super) fn json(bytes: &[u8]) {
    fn read<T: DeserializeOwned + Serialize>(bytes: &[u8]) {
        let (read, most) = peak(|| serde_json::from_slice::<T>(bytes));
        assert!(most <= 200 * bytes.len() + WORKSPACE, "{most} bytes for JSON of {}", bytes.len());
        if let Ok(read) = read {
            let written = serde_json::to_vec(&read).unwrap();
            let again: T = serde_json::from_slice(&written).unwrap();
            assert_eq!(serde_json::to_vec(&again).unwrap(), written);
        }
    }
    read::<PodReport>(bytes);
    read::<NodeReport>(bytes);
    read::<Settings>(bytes);
    read::<Token>(bytes);
    read::<JoinRequest>(bytes);
    read::<JoinResponse>(bytes);
    read::<Refusal>(bytes);
    read::<DeviceReport>(bytes);
    read::<DeviceSpec>(bytes);
    read::<DeviceModelSpec>(bytes);
}

pub(super) fn token(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match text.parse::<JoinToken>() {
        Ok(token) => assert_eq!(token.to_string().to_lowercase(), text.trim().to_lowercase()),
        Err(error) => assert!(error.to_string().len() < 300, "an error repeats what was read"),
    }
}

/// A broker's bytes, in parts: what is kept of them is bounded by what the decoder was told to keep, whatever they say.
pub(super) fn mqtt(bytes: &[u8]) {
    const MAX_PAYLOAD: usize = 1000;
    let decode = |part, take: &mut dyn FnMut(mqtt::Packet)| {
        let mut decoder = mqtt::Decoder::new(MAX_PAYLOAD);
        for part in bytes.chunks(part) {
            decoder.room().extend_from_slice(part);
            loop {
                match decoder.take() {
                    Ok(Some(packet)) => take(packet),
                    Ok(None) => break,
                    Err(_) => return,
                }
            }
        }
    };
    let ((), most) = peak(|| decode(100, &mut drop));
    assert!(most < 4 * ((64 << 10) + MAX_PAYLOAD), "{most} bytes are kept");
    let (mut packets, mut at_once) = (Vec::new(), Vec::new());
    decode(100, &mut |packet| packets.push(packet));
    decode(usize::MAX, &mut |packet| at_once.push(packet));
    for packet in &packets {
        if let mqtt::Packet::Publish { payload: Ok(payload), .. } = packet {
            assert!(payload.len() <= MAX_PAYLOAD);
        }
    }
    assert_eq!(packets, at_once);
}
