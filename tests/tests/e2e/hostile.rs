//! A node's certificate in the wrong hands: it sees and says nothing that is not that node's.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail, ensure};
use rand::RngExt as _;
use serde_json::{Value, json};
use skerry_proto::payload::{NodeReport, PodReport};
use skerry_proto::sync::{MAX_FRAME, PROTOCOL};
use skerry_proto::wire::{self, Collection, frame::Body};
use skerry_tests::kubectl::is_ready;
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::peer::{self, Identity, Session, Strangers, hello};
use skerry_tests::procfs;
use skerry_tests::wait::{eventually, until};

use crate::linkcut::{config, reader};
use crate::world::{World, seeded, story};

/// The hostile node's name.
pub(crate) const NODE: &str = "hostile";

#[test]
fn it_cannot_read_what_other_nodes_use() -> Result<()> {
    story("hostile-read", |world| {
        let secret = |name: &str| json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": {"key": "hunter2"}});
        let with_secret = |name: &str, node: &str, token| {
            let mut pod = sleeper(name, node, token);
            pod["spec"]["volumes"] = json!([{"name": "s", "secret": {"secretName": name}}]);
            pod
        };
        world.kubectl.apply(&list(&[secret("others"), secret("own")]))?;
        let others = with_secret("others", world.edge.name(), true);
        world.run_pods(&others.to_string(), "app=sleeper", 1)?;
        let (address, identity) = enter(world)?;
        world.kubectl.create(&with_secret("own", NODE, false))?;
        // It asks for nothing, says that it holds what is another's, or says so unasked and behind everything.
        let victim = [
            entry(world, Collection::Pods, "pod", "others")?,
            entry(world, Collection::Secrets, "secret", "others")?,
            entry(world, Collection::ConfigMaps, "configmap", "kube-root-ca.crt")?,
            (Collection::Node, named(world.edge.name(), &world.node()?)),
        ];
        for claimed in [&[][..], &victim] {
            let mut session = Session::open(address, Some(&identity))?;
            session.send(Body::Hello(claiming(claimed)))?;
            welcome(&mut session)?;
            let mut told = answer_until_quiet(&mut session, claimed)?;
            for (collection, entry) in claimed {
                let seq = told.last().map_or(0, |upsert| upsert.seq);
                let (entries, collection) = (vec![entry.clone()], (*collection).into());
                session.send(Body::Inventory(wire::Inventory { collection, entries, last: true, seq }))?;
            }
            if !claimed.is_empty() {
                told.extend(answer_until_quiet(&mut session, claimed)?);
            }
            let own = format!("{}/own", world.kubectl.namespace());
            for collection in [Collection::Pods, Collection::Secrets, Collection::ConfigMaps, Collection::Tokens] {
                let of = told.iter().filter(|upsert| upsert.collection() == collection);
                let keys: BTreeSet<&str> = of.map(|upsert| upsert.key.as_str()).collect();
                let due = matches!(collection, Collection::Pods | Collection::Secrets).then_some(own.as_str());
                ensure!(keys == due.into_iter().collect(), "of {collection:?} it was sent {keys:?}");
            }
            let theirs = told.iter().find(|upsert| victim.iter().any(|(_, entry)| entry.uid == upsert.uid));
            ensure!(theirs.is_none(), "it was sent {theirs:?}");
        }
        // Under another name, its certificate opens nothing.
        let mut session = Session::open(address, Some(&identity))?;
        session.send(Body::Hello(hello(world.edge.name())))?;
        expect_refusal(&mut session)?;
        let pod = world.kubectl.get("pod", "others")?;
        ensure!(is_ready(&pod) && pod["metadata"].get("deletionTimestamp").is_none(), "the victim: {pod}");
        world.kubectl.run(&["delete", "pod", "own", "--force", "--grace-period=0"])?;
        world.wait_connected()
    })
}

#[test]
fn it_cannot_report_for_others() -> Result<()> {
    story("hostile-report", |world| {
        let pods = world.run_pods(&sleeper("victim", world.edge.name(), false).to_string(), "app=sleeper", 1)?;
        let uid = pods[0]["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        let node_uid = world.node()?["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        let (address, identity) = enter(world)?;
        let mut session = Session::establish(address, &identity, NODE)?;
        welcome(&mut session)?;
        answer_until_quiet(&mut session, &[])?;
        let failed = PodReport { status: json!({"phase": "Failed", "reason": "Hacked"}), finished: true };
        let not_ready = NodeReport {
            status: json!({"conditions": [{"type": "Ready", "status": "False", "reason": "Hacked"}]}),
            addresses: Vec::new(),
            labels: std::collections::BTreeMap::new(),
        };
        let event = json!({
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": "lie.1", "namespace": world.kubectl.namespace()},
            "involvedObject": {"kind": "Pod", "namespace": world.kubectl.namespace(), "name": "victim", "uid": uid},
            "reason": "Hacked", "message": "lies", "type": "Normal", "source": {"component": "kubelet", "host": world.edge.name()},
        });
        let lies = [
            (
                wire::ReportKind::PodStatus,
                world.kubectl.namespace(),
                "victim",
                uid.as_str(),
                serde_json::to_vec(&failed)?,
            ),
            (wire::ReportKind::NodeStatus, "", world.edge.name(), node_uid.as_str(), serde_json::to_vec(&not_ready)?),
            (wire::ReportKind::Event, world.kubectl.namespace(), "lie.1", "", serde_json::to_vec(&event)?),
        ];
        for (id, (kind, namespace, name, uid, payload)) in (1..).zip(lies) {
            session.send(Body::Report(wire::Report {
                id,
                kind: kind.into(),
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                uid: uid.to_owned(),
                encoding: wire::Encoding::Raw.into(),
                payload: payload.into(),
            }))?;
            let refused = session.receive_until("the answer to a lie", |body| match body {
                Body::ReportAck(ack) if ack.id == id => Some(ack.refused.clone()),
                _ => None,
            })?;
            ensure!(!refused.is_empty(), "the lie about {name} was taken");
        }
        let pod = world.kubectl.get("pod", "victim")?;
        ensure!(
            pod["status"]["phase"] == "Running" && pod["metadata"].get("deletionTimestamp").is_none(),
            "the lie worked: {}",
            pod["status"]
        );
        ensure!(world.kubectl.find("event", "lie.1")?.is_none(), "the false event is there");
        world.wait_node_ready()
    })
}

#[test]
fn garbage_ends_its_session_and_nobody_else_s() -> Result<()> {
    story("hostile-garbage", |world| {
        let (address, identity) = enter(world)?;
        let frames: [(&str, Vec<u8>); 4] = [
            ("noise", (0..2000_u32).map(|at| u8::try_from(at * 7 % 251).unwrap_or(0)).collect()),
            ("an empty frame", Vec::new()),
            ("an oversized frame", vec![0x2a; MAX_FRAME + 1]),
            ("a frame cut short", vec![0x0a, 0xff, 0xff, 0x03, 0x01]),
        ];
        for (what, bytes) in frames {
            for greeted in [false, true] {
                let mut session = Session::open(address, Some(&identity))?;
                if greeted {
                    session.send(Body::Hello(hello(NODE)))?;
                    welcome(&mut session)?;
                }
                // The far side may close while the rest of it is still being sent.
                session.send_bytes(bytes.clone()).ok();
                if !(what == "an empty frame" && greeted) {
                    session
                        .receive_end()
                        .map_err(|error| error.context(format!("{what} (greeted: {greeted}) was put up with")))?;
                }
            }
        }
        let mut session = Session::open(address, Some(&identity))?;
        session.send_text("{}").ok();
        session.receive_end()?;
        still_well(world)
    })
}

#[test]
fn frames_out_of_order_end_its_session() -> Result<()> {
    story("hostile-order", |world| {
        let (address, identity) = enter(world)?;
        let report = Body::Report(wire::Report { id: 1, ..wire::Report::default() });
        let mut session = Session::open(address, Some(&identity))?;
        session.send(report)?;
        session.receive_end()?;
        for body in [
            Body::Ack(wire::Ack { seq: u64::MAX }),
            Body::Hello(hello(NODE)),
            Body::Inventory(wire::Inventory { collection: 999, entries: Vec::new(), last: true, seq: 0 }),
            Body::Welcome(wire::Welcome::default()),
        ] {
            let mut session = Session::establish(address, &identity, NODE)?;
            welcome(&mut session)?;
            let what = format!("{body:?}");
            session.send(body)?;
            let goodbye = session.receive_end().map_err(|error| error.context(format!("put up with {what}")))?;
            ensure!(goodbye.is_some_and(|said| !said.message.is_empty()), "it was not told what was wrong with {what}");
        }
        still_well(world)
    })
}

#[test]
fn versions_out_of_reach_are_told_both() -> Result<()> {
    story("hostile-version", |world| {
        let (address, identity) = enter(world)?;
        let mut session = Session::open(address, Some(&identity))?;
        session.send(Body::Hello(wire::Hello { protocol_min: 70, protocol_max: 71, ..hello(NODE) }))?;
        let Some(goodbye) = session.receive_end()? else { bail!("no Goodbye") };
        ensure!(goodbye.reason() == wire::goodbye::Reason::Version, "another reason: {goodbye:?}");
        let (min, max) = (*PROTOCOL.start(), *PROTOCOL.end());
        for said in ["speaks protocol 70 to 71", &format!("speaks {min} to {max}")] {
            ensure!(goodbye.message.contains(said), "it does not say \"{said}\": {}", goodbye.message);
        }
        Ok(())
    })
}

#[test]
fn no_certificate_no_session() -> Result<()> {
    story("hostile-nobody", |world| {
        let address = world.cloud.address();
        if let Ok(mut session) = Session::open(address, None) {
            expect_refusal(&mut session)?;
        }
        let stranger = skerry_tests::pki::Authority::new(world.dir(), "stranger-ca")?;
        let pair = stranger.client(
            world.dir(),
            "stranger",
            &format!("system:node:{}", world.edge.name()),
            &["system:nodes"],
        )?;
        let identity = Identity {
            certificate: std::fs::read_to_string(&pair.certificate)?,
            key: std::fs::read_to_string(&pair.key)?,
        };
        if let Ok(mut session) = Session::establish(address, &identity, world.edge.name()) {
            expect_refusal(&mut session)?;
        }
        let (status, _) = peer::post(address, None, "/v1/renew", "", br#"{"csr": ""}"#)?;
        ensure!((400..500).contains(&status), "a renewal without a certificate got {status}");
        world.wait_connected()
    })
}

#[test]
fn a_thousand_strangers_are_in_nobody_s_way() -> Result<()> {
    story("hostile-strangers", |world| {
        world.kubectl.apply(&config("blue"))?;
        world.run_pods(&reader(world.edge.name(), true).to_string(), "app=sleeper", 1)?;
        let (session, token) = (world.session()?, world.cloud.new_token(&[])?.token);
        let pid = world.cloud.pid().context("cloudcore does not run")?;
        let before = procfs::rss_kb(pid).context("no memory")?;
        procfs::forget_peak(pid)?;

        let strangers = Strangers::come(world.cloud.address(), 1000)?;
        world.kubectl.apply(&config("green"))?;
        until("the new ConfigMap in the mount", 30, || {
            Ok(world.inside("reader", &["cat", "/config/colour"])? == "green")
        })?;
        // Who has a token is let in, and who has a certificate.
        let address = world.cloud.address();
        let Ok(identity) = peer::join(address, &token, NODE, "machine-of-the-hostile-one")? else {
            bail!("nobody can join")
        };
        welcome(&mut Session::establish(address, &identity, NODE)?)?;
        let grown = procfs::peak_rss_kb(pid).context("no memory")?.saturating_sub(before);
        eprintln!("cloudcore had {before} kB, and up to {grown} kB more");
        ensure!(grown < 64 << 10, "{grown} kB for strangers");
        ensure!(world.session()? == session, "the node lost its session");
        drop(strangers);
        still_well(world)
    })
}

#[test]
fn a_thousand_sessions_that_break_leave_nothing() -> Result<()> {
    story("hostile-reconnects", |world| {
        let session = world.session()?;
        let pid = world.cloud.pid().context("cloudcore does not run")?;
        let (_, identity) = enter(world)?;
        let address = world.relay.address();
        let mut random = seeded()?;
        let mut break_off = |times: u32| -> Result<()> {
            for _ in 0..times {
                let mut session = match random.random_bool(0.5) {
                    true => Session::open_quic(address, &identity)?,
                    false => Session::open(address, Some(&identity))?,
                };
                if random.random_bool(0.7) {
                    session.send(Body::Hello(hello(NODE)))?;
                    if random.random_bool(0.5) {
                        welcome(&mut session)?;
                    }
                }
            }
            Ok(())
        };
        // The node's own is left when all that broke are known to be.
        let deserted = || until("one session", 60, || Ok(world.cloud.metric("skerry_sessions")? == 1.0));
        let has = || {
            Ok::<_, anyhow::Error>((
                procfs::rss_kb(pid).context("no memory")?,
                procfs::descriptors(pid).context("no descriptors")?,
                world.cloud.metric("skerry_tasks")?,
            ))
        };
        break_off(200)?;
        deserted()?;
        let before = has()?;
        break_off(1000)?;
        deserted()?;
        let after = eventually("cloudcore's descriptors to be closed and its tasks to end", 60, || {
            let now = has()?;
            Ok((now.1 <= before.1 && now.2 <= before.2).then_some(now))
        })?;
        eprintln!("cloudcore had {} kB after 200 sessions, {} kB after 1200, {} tasks", before.0, after.0, after.2);
        ensure!(after.0 < before.0 + (4 << 10), "a thousand sessions left {} kB", after.0 - before.0);
        ensure!(world.session()? == session, "the node lost its session");
        still_well(world)
    })
}

/// Joins as the hostile node, past the relay.
pub(crate) fn enter(world: &World) -> Result<(SocketAddr, Identity)> {
    enter_as(world, NODE)
}

/// As [`enter`], as this one of [`VISITORS`](skerry_tests::guest::VISITORS).
pub(crate) fn enter_as(world: &World, node: &str) -> Result<(SocketAddr, Identity)> {
    let token = world.cloud.new_token(&[])?.token;
    match peer::join(world.cloud.address(), &token, node, &format!("machine-of-the-{node}-one"))? {
        Ok(identity) => Ok((world.cloud.address(), identity)),
        Err(refusal) => bail!("cloudcore does not let it join: {}", refusal.message),
    }
}

pub(crate) fn welcome(session: &mut Session) -> Result<()> {
    session.receive_until("Welcome", |body| matches!(body, Body::Welcome(_)).then_some(()))
}

/// Answers as an edge that holds this and takes what it is sent, until the cloud has sent all; what it was sent.
pub(crate) fn answer_until_quiet(session: &mut Session, held: &[Held]) -> Result<Vec<wire::Upsert>> {
    let mut seen = Vec::new();
    let mut applied = 0;
    while let Some(body) = session.receive_unless_quiet(3)? {
        match body {
            Body::InventoryRequest(request) => {
                let of = held.iter().filter(|(collection, _)| *collection == request.collection());
                session.send(Body::Inventory(wire::Inventory {
                    collection: request.collection,
                    entries: of.map(|(_, entry)| entry.clone()).collect(),
                    last: true,
                    seq: applied,
                }))?;
            }
            Body::Upsert(upsert) => {
                applied = upsert.seq;
                session.send(Body::Ack(wire::Ack { seq: applied }))?;
                seen.push(upsert);
            }
            Body::Delete(wire::Delete { seq, .. }) | Body::DigestCheck(wire::DigestCheck { seq, .. }) => {
                applied = seq;
                session.send(Body::Ack(wire::Ack { seq }))?;
            }
            Body::Ping(ping) => session.send(Body::Pong(wire::Pong { token: ping.token }))?,
            _ => {}
        }
    }
    Ok(seen)
}

/// An object that an edge holds.
type Held = (Collection, wire::Entry);

/// One that is there, as somebody who knows of it could claim to hold it.
fn entry(world: &World, collection: Collection, kind: &str, name: &str) -> Result<Held> {
    let key = format!("{}/{name}", world.kubectl.namespace());
    Ok((collection, named(&key, &world.kubectl.get(kind, name)?)))
}

fn named(key: &str, object: &Value) -> wire::Entry {
    let uid = object["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
    wire::Entry { key: key.to_owned(), uid, version: 1 }
}

/// The Hello of an edge that holds this, and of whose digests so much is true.
fn claiming(held: &[Held]) -> wire::Hello {
    let mut hello = hello(NODE);
    for (collection, _) in held {
        for digest in hello.digests.iter_mut().filter(|digest| digest.collection() == *collection) {
            digest.count += 1;
            digest.sum = vec![7; 16].into();
        }
    }
    hello
}

/// The session ends, with a refusal if with anything, and without a Welcome.
fn expect_refusal(session: &mut Session) -> Result<()> {
    while let Some(body) = session.receive(30)? {
        match body {
            Body::Goodbye(goodbye) => ensure!(!goodbye.message.is_empty(), "a refusal without a word"),
            other => bail!("it was let in: {other:?}"),
        }
    }
    Ok(())
}

pub(crate) fn still_well(world: &mut World) -> Result<()> {
    ensure!(world.cloud.is_running(), "cloudcore is gone");
    world.wait_connected()?;
    world.wait_node_ready()
}
