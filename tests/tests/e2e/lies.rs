//! Nodes with a good certificate and bad manners: what they do costs nobody else anything, and cloudcore no more than it gives each.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use rand::RngExt as _;
use serde_json::{Value, json};
use skerry_proto::mux::{CUT, Class, MAX_HEADER, MAX_STREAMS};
use skerry_proto::sync::{Entry, MAX_DEVICES, MAX_DEVICES_BYTES, MAX_FRAME, MAX_INVENTORY};
use skerry_proto::wire::{self, Collection, frame::Body, goodbye::Reason};
use skerry_tests::cloudcore::Cloudcore;
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::peer::{Identity, Session, hello};
use skerry_tests::procfs;
use skerry_tests::wait::{eventually, until};

use crate::hostile::{enter_as, still_well};
use crate::linkcut::{config, reader};
use crate::world::{World, story};

/// For how long they lie.
const LIES_FOR: Duration = Duration::from_secs(20);
/// Who does.
const LIARS: [&str; 2] = ["liar-websocket", "liar-quic"];
/// Who does not read what it is sent.
const SLOW: [&str; 4] = ["slow-websocket-1", "slow-websocket-2", "slow-quic-1", "slow-quic-2"];
/// ConfigMaps that they are sent, and how many bytes are in each.
const LARGE: usize = 6;
const LARGE_BYTES: usize = 700 << 10;
/// Of each transport, those who have shown a certificate and do not go on.
const UNDECIDED: usize = 16;
/// What a session may make cloudcore hold, in bytes: a frame that is put together and what it is made of, or an object and the frame of it that
/// is sent.
const SESSION: usize = 2 * MAX_FRAME;
/// What it may make it hold of an inventory of devices besides: rows, in a vector that doubles, and their names.
const INVENTORY: usize = 2 * MAX_DEVICES * 2 * size_of::<Entry>() + 2 * MAX_DEVICES_BYTES;

/// What a node says that cannot be.
struct Lie {
    what: &'static str,
    tell: fn(&mut Session) -> Result<()>,
    /// In the words of the Goodbye that it ends with, over a WebSocket and over QUIC.
    answer: [&'static str; 2],
}

#[test]
fn lies_and_slow_readers_cost_nobody_else_anything() -> Result<()> {
    story("lies", |world| {
        world.kubectl.apply(&config("blue"))?;
        world.run_pods(&reader(world.edge.name(), false).to_string(), "app=sleeper", 1)?;
        for number in 0..LARGE {
            world.kubectl.create(&large(number)?)?;
        }
        let liars = LIARS.iter().map(|name| enter_as(world, name)).collect::<Result<Vec<_>>>()?;
        let slow = SLOW.iter().map(|name| enter_as(world, name)).collect::<Result<Vec<_>>>()?;
        let pods: Vec<_> = SLOW.iter().map(|node| burdened(node)).collect();
        world.kubectl.apply(&list(&pods))?;
        let address = world.cloud.address();
        let pid = world.cloud.pid().context("cloudcore does not run")?;
        let session = world.session()?;
        let usual = (0..5).map(|round| shown(world, &format!("usual-{round}"))).collect::<Result<Vec<_>>>()?;
        let usual = usual.into_iter().max().unwrap_or_default();
        let before = procfs::rss_kb(pid).context("no memory")?;
        procfs::forget_peak(pid)?;

        let mut readers = Vec::new();
        for (name, (_, identity)) in SLOW.iter().zip(&slow) {
            readers.push(stop_reading(address, identity, name)?);
        }
        let undecided = count(&world.cloud, "starts", "protocol");
        let mut silent = Vec::new();
        for number in 0..2 * UNDECIDED {
            silent.push(open(address, &liars[number % 2].1, number % 2 == 1)?);
        }
        let ended = count(&world.cloud, "ends", "protocol");
        let end = Instant::now() + LIES_FOR;
        let (told, slowest) = thread::scope(|scope| {
            let lying: Vec<_> = LIARS
                .iter()
                .zip(&liars)
                .enumerate()
                .map(|(at, (name, (_, identity)))| scope.spawn(move || lie(address, identity, name, at == 1, end)))
                .collect();
            let mut slowest = Duration::ZERO;
            let mut round = 0;
            while lying.iter().any(|liar| !liar.is_finished()) {
                slowest = slowest.max(shown(world, &format!("amid-{round}"))?);
                replace(world, &large(round % LARGE)?)?;
                round += 1;
            }
            let told = lying.into_iter().map(|liar| liar.join().unwrap_or_else(|_| bail!("a liar panicked")));
            Ok::<_, anyhow::Error>((told.collect::<Result<Vec<_>>>()?, slowest))
        })?;
        let peak = procfs::peak_rss_kb(pid).context("no memory")?.saturating_sub(before);
        eprintln!("{told:?} lies; a changed ConfigMap took {usual:?} at most before them and {slowest:?} amid them");

        // Each was noticed, said and counted.
        let counted = count(&world.cloud, "ends", "protocol") - ended;
        ensure!(counted == f64::from(told.iter().sum::<u32>()), "{counted} of {told:?} lies were counted");
        let log = world.cloud.log_text();
        for (lie, at) in LIES.iter().flat_map(|lie| [(lie, 0), (lie, 1)]) {
            ensure!(log.contains(lie.answer[at]), "the log does not say {:?} of {}", lie.answer[at], lie.what);
        }
        // Who has said nothing is told so, and who hears and says nothing is taken for dead.
        let mut first = silent.swap_remove(0);
        let goodbye = first.receive_farewell()?.context("it is put off without a word")?;
        ensure!(goodbye.message.contains("no Hello"), "it is told: {}", goodbye.message);
        until("those who said no Hello to be put off", 10, || {
            Ok(count(&world.cloud, "starts", "protocol") - undecided >= (2 * UNDECIDED) as f64)
        })?;
        until("those who do not read to be taken for dead", 40, || Ok(world.cloud.metric("skerry_sessions")? == 1.0))?;
        drop((readers, silent));

        // Those that stand, and those that are ending while the next begin.
        let objects = 2 * LARGE * LARGE_BYTES * 4 / 3;
        let most = (SLOW.len() + 2 * LIARS.len()) * SESSION + LIARS.len() * INVENTORY + objects;
        let left = eventually("cloudcore's memory to be given back", 60, || {
            let left = procfs::rss_kb(pid).context("no memory")?.saturating_sub(before);
            Ok((left < 16 << 10).then_some(left))
        })?;
        eprintln!("cloudcore had {before} kB, up to {peak} kB more amid them and {left} kB more after");
        ensure!((peak as usize) << 10 < most, "{peak} kB for them, where {most} B are bounds enough");
        ensure!(
            slowest < Duration::from_secs(15).max(usual * 8),
            "a node waited {slowest:?} for a change, else {usual:?}"
        );
        ensure!(world.session()? == session, "the node lost its session");
        world.kubectl.run(&["delete", "pods", "-l", "app=burdened", "--force", "--grace-period=0"])?;
        still_well(world)
    })
}

/// How long a change takes until the node's pod sees it.
fn shown(world: &World, colour: &str) -> Result<Duration> {
    let begin = Instant::now();
    world.kubectl.apply(&config(colour))?;
    until("the new ConfigMap in the mount", 30, || Ok(world.inside("reader", &["cat", "/config/colour"])? == colour))?;
    Ok(begin.elapsed())
}

/// A ConfigMap of what cannot be compressed.
fn large(number: usize) -> Result<Value> {
    let mut content = vec![0; LARGE_BYTES];
    rand::rng().fill(&mut content[..]);
    let name = format!("large-{number}");
    let blob = BASE64.encode(content);
    Ok(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "binaryData": {"blob": blob}}))
}

fn replace(world: &World, object: &Value) -> Result<()> {
    let done = world.kubectl.pipe(&["replace", "-f", "-"], object.to_string().as_bytes())?;
    ensure!(done.code == Some(0), "kubectl replace failed: {}", done.errors);
    Ok(())
}

/// A pod that has all of these sent to its node.
fn burdened(node: &str) -> Value {
    let mut pod = sleeper(&format!("on-{node}"), node, false);
    pod["metadata"]["labels"] = json!({"app": "burdened"});
    let volume = |number| json!({"name": format!("c-{number}"), "configMap": {"name": format!("large-{number}")}});
    pod["spec"]["volumes"] = (0..LARGE).map(volume).collect();
    pod
}

/// How many sessions began, or ended, with this result.
fn count(cloud: &Cloudcore, what: &str, result: &str) -> f64 {
    cloud.metric(&format!("skerry_session_{what}_total{{result=\"{result}\"}}")).unwrap_or_default()
}

fn open(address: SocketAddr, identity: &Identity, quic: bool) -> Result<Session> {
    if quic { Session::open_quic(address, identity) } else { Session::open(address, Some(identity)) }
}

/// Has a session begun, and reads nothing of what follows.
fn stop_reading(address: SocketAddr, identity: &Identity, name: &str) -> Result<Session> {
    let mut session = match name.contains("quic") {
        true => Session::open_quic(address, identity)?,
        false => Session::open_narrow(address, identity, 4 << 10)?,
    };
    session.send(Body::Hello(hello(name)))?;
    session.receive_until("Welcome", |body| matches!(body, Body::Welcome(_)).then_some(()))?;
    Ok(session)
}

/// Tells all the lies, each in a session of its own, and begins anew until it is time; how many it told.
fn lie(address: SocketAddr, identity: &Identity, name: &str, quic: bool, end: Instant) -> Result<u32> {
    let (mut told, mut epoch) = (0, 0);
    while told == 0 || Instant::now() < end {
        let mut wrong = Vec::new();
        for lie in LIES {
            let mut session = open(address, identity, quic)?;
            session.send(Body::Hello(wire::Hello { last_epoch: epoch, ..hello(name) }))?;
            epoch = session.receive_until("Welcome", |body| match body {
                Body::Welcome(welcome) => Some(welcome.epoch),
                _ => None,
            })?;
            // It may be found out before all of it is said.
            (lie.tell)(&mut session).ok();
            let goodbye = session.receive_farewell().with_context(|| format!("it put up with {}", lie.what))?;
            let is_told = goodbye.as_ref().is_some_and(|said| {
                said.reason() == Reason::Protocol && said.message.contains(lie.answer[usize::from(quic)])
            });
            if !is_told {
                wrong.push(format!("of {} it was told {goodbye:?}", lie.what));
            }
            told += 1;
        }
        ensure!(wrong.is_empty(), "{wrong:#?}");
    }
    Ok(told)
}

const LIES: &[Lie] = &[
    // Of size.
    Lie {
        what: "a frame that has no end",
        tell: |session| session.announce(1 << 62),
        answer: ["is larger than 4194304", "are more than 4194304"],
    },
    Lie {
        what: "a frame that is a byte too long",
        tell: |session| session.announce(MAX_FRAME as u64 + 1),
        answer: ["a frame of 4194305 bytes is larger than", "its 4194305 bytes are more than"],
    },
    Lie {
        what: "no frame",
        tell: |session| session.send_bytes(vec![0xff; 64]),
        answer: ["a frame cannot be decoded"; 2],
    },
    Lie {
        what: "rows of nothing",
        tell: |session| {
            let rows = [0x12, 0x00].repeat(100 << 10);
            let mut frame = vec![0x22];
            prost::encoding::encode_varint(rows.len() as u64, &mut frame);
            frame.extend(rows);
            session.send_bytes(frame)
        },
        answer: ["fields"; 2],
    },
    Lie {
        what: "an inventory that has no end",
        tell: |session| {
            let entries = vec![wire::Entry { key: "k".to_owned(), uid: "u".to_owned(), version: 1 }; 1000];
            (0..=MAX_INVENTORY / 1000).try_for_each(|_| session.send(inventory(entries.clone(), 0)))
        },
        answer: ["an inventory of more than 10000 rows"; 2],
    },
    Lie {
        what: "devices that have no end",
        tell: |session| {
            let name = "d".repeat(MAX_DEVICES_BYTES / MAX_DEVICES / 2);
            let entries = vec![wire::Entry { key: name.clone(), uid: name, version: 1 }; 1000];
            let devices = wire::Inventory { collection: Collection::Devices.into(), entries, last: false, seq: 0 };
            (0..=2 * MAX_DEVICES / 1000).try_for_each(|_| session.send(Body::Inventory(devices.clone())))
        },
        answer: ["an inventory of more than 100000 rows"; 2],
    },
    Lie {
        what: "names without end",
        tell: |session| session.send(inventory(vec![wire::Entry { key: "k".repeat(4096), ..Default::default() }], 0)),
        answer: ["an inventory with a name of more than"; 2],
    },
    Lie {
        what: "a report about a name without end",
        tell: |session| {
            session.send(Body::Report(wire::Report {
                id: 1,
                kind: wire::ReportKind::Event.into(),
                name: "k".repeat(1 << 20),
                ..wire::Report::default()
            }))
        },
        answer: ["a report with a name of more than 1024 bytes"; 2],
    },
    Lie {
        what: "parts of a frame that has no end",
        tell: |session| {
            let data = Bytes::from(vec![0; MAX_FRAME / 8]);
            (0..9).try_for_each(|_| session.send(part(data.clone(), false)))
        },
        answer: ["a control frame in parts is larger than"; 2],
    },
    Lie {
        what: "parts of nothing",
        tell: |session| session.send(part(Bytes::from_static(&[0xff; 64]), true)),
        answer: ["what came in parts is not a control frame"; 2],
    },
    Lie {
        what: "a long header",
        tell: |session| session.send(opening(OWN, MAX_HEADER + 1)),
        answer: ["has a header of"; 2],
    },
    Lie {
        what: "a stream in frames that are not cut",
        tell: |session| {
            session.send(opening(OWN, 1))?;
            session.send(data(OWN, 2 * CUT + 100))
        },
        answer: ["more than are cut", "are more than 8192"],
    },
    // Of sequence.
    Lie {
        what: "what was never sent as applied",
        tell: |session| session.send(Body::Ack(wire::Ack { seq: u64::MAX })),
        answer: ["ack of"; 2],
    },
    Lie {
        what: "an inventory of the future",
        tell: |session| session.send(inventory(Vec::new(), u64::MAX)),
        answer: ["an inventory as of"; 2],
    },
    Lie {
        what: "a second beginning",
        tell: |session| session.send(Body::Hello(hello("liar"))),
        answer: ["a second hello"; 2],
    },
    Lie {
        what: "a stream twice",
        tell: |session| (0..2).try_for_each(|_| session.send(opening(OWN, 1))),
        answer: ["is opened a second time"; 2],
    },
    Lie {
        what: "data of a stream that is none",
        tell: |session| session.send(data(OWN, 1)),
        answer: ["which was never opened"; 2],
    },
    Lie {
        what: "a frame within another",
        tell: |session| {
            session.send(part(Bytes::from_static(b"x"), false))?;
            session.send(Body::Ack(wire::Ack { seq: 0 }))
        },
        answer: ["between the parts of another"; 2],
    },
    // Of credit.
    Lie {
        what: "more than it has credit for",
        tell: |session| {
            session.send(opening(OWN, 1))?;
            (0..=Class::Api.window() / CUT).try_for_each(|_| session.send(data(OWN, CUT)))
        },
        answer: ["were allowed"; 2],
    },
    Lie {
        what: "credit without end",
        tell: |session| {
            session.send(opening(OWN, 1))?;
            session.send(Body::StreamCredit(wire::StreamCredit { id: OWN, bytes: u32::MAX }))
        },
        answer: ["credit of 4294967295 bytes"; 2],
    },
    Lie {
        what: "streams without end",
        tell: |session| {
            let most = u32::try_from(MAX_STREAMS)?;
            (0..=most).try_for_each(|number| session.send(opening(number << 3 | OWN, 1)))
        },
        answer: ["streams of one class at a time"; 2],
    },
    // Of class.
    Lie {
        what: "a stream of the other side's",
        tell: |session| session.send(opening(OWN - 1, 1)),
        answer: ["its id belongs to the other side"; 2],
    },
    Lie {
        what: "a stream of no class, among those of one",
        tell: |session| session.send_among(Some(Class::Ops), opening(1, 1)),
        answer: ["or to no class", "a frame came on the stream of another class"],
    },
    Lie {
        what: "what only the cloud says",
        tell: |session| session.send(Body::Welcome(wire::Welcome::default())),
        answer: ["a frame that only the cloud sends"; 2],
    },
    // Of the size of what is compressed.
    Lie {
        what: "a gigabyte that is said to be ten bytes",
        tell: |session| session.send(report(compressed(Some(10), 8192))),
        answer: ["report 1 cannot be read"; 2],
    },
    Lie {
        what: "a gigabyte of which no size is said",
        tell: |session| session.send(report(compressed(None, 8192))),
        answer: ["report 1 cannot be read"; 2],
    },
    Lie {
        what: "two megabytes that are none",
        tell: |session| session.send(report(compressed(Some(2 << 20), 0))),
        answer: ["report 1 cannot be read"; 2],
    },
];

/// A stream of the class api that an edge opens, its first.
const OWN: u32 = 0b011;

fn inventory(entries: Vec<wire::Entry>, seq: u64) -> Body {
    Body::Inventory(wire::Inventory { collection: Collection::Pods.into(), entries, last: false, seq })
}

fn part(data: Bytes, last: bool) -> Body {
    Body::ControlPart(wire::ControlPart { data, last })
}

fn opening(id: u32, header: usize) -> Body {
    Body::StreamOpen(wire::StreamOpen { id, header: vec![0; header].into() })
}

fn data(id: u32, bytes: usize) -> Body {
    Body::StreamData(wire::StreamData { id, data: vec![0; bytes].into(), fin: false })
}

fn report(payload: Vec<u8>) -> Body {
    Body::Report(wire::Report {
        id: 1,
        kind: wire::ReportKind::Event.into(),
        encoding: wire::Encoding::Zstd.into(),
        payload: payload.into(),
        ..wire::Report::default()
    })
}

/// A frame of zstd that is so many times 128 KiB of zeros, whatever size it says it has (RFC 8878, 3.1.1).
fn compressed(size: Option<u32>, blocks: u32) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd];
    // The field of the size has four bytes, or is not there; windows have 128 KiB.
    frame.extend(if size.is_some() { [0x80, 0x38] } else { [0x00, 0x38] });
    frame.extend(size.into_iter().flat_map(u32::to_le_bytes));
    for _ in 0..blocks {
        // One byte that is repeated.
        let head = (128_u32 << 10) << 3 | 1 << 1;
        frame.extend(&head.to_le_bytes()[..3]);
        frame.push(0);
    }
    // An empty one, which is the last.
    frame.extend([1, 0, 0]);
    frame
}
