//! Much, many and for long. What takes minutes is run by `scripts/soak ops`; a small form of it always.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ring::digest::{Context, SHA256};
use serde_json::{Value, json};
use skerry_tests::manifests::{GRACE, container, sleeper};
use skerry_tests::procfs;
use skerry_tests::relay::Relay;
use skerry_tests::wait::{patience, until};

use super::{DIALECTS, FAR, TRANSPORTS, mounting, start_pod};
use crate::world::{World, story};

/// What goes through one session.
const GIB: usize = 1 << 30;
/// What one stream may hold on edgecore and cloudcore, with room for what else happens meanwhile, in MB.
const ROOM: [f64; 2] = [4.0, 6.0];
/// The same of all sessions: what `ops.rss.50exec` may be.
const ROOM_OF_ALL: [f64; 2] = [5.0, 10.0];
/// 256 kbit/s, in bytes.
const BANDWIDTH: u64 = 32_000;
/// What a modem holds of a TCP connection, in bytes.
const MODEM: usize = 4 << 10;
const CHANGES: usize = 10;
/// The link's bound for control frames while streams flood it, in seconds.
const PROMISE: f64 = 0.5;
/// What asking the box takes, again and again, in seconds.
const ASKING: f64 = 0.2;

#[test]
#[ignore = "minutes: scripts/soak ops"]
fn a_gibibyte_comes_back_as_it_was() -> Result<()> {
    story("ops-gib", |world| {
        start_pod(world)?;
        world.relay.set(|line| line.latency = FAR);
        for transport in TRANSPORTS {
            world.carry_over(transport)?;
            for dialect in DIALECTS {
                let begin = Instant::now();
                let sent = there_and_back(world, dialect)?;
                eprintln!("1 GiB there and back over {transport}, {dialect}: {:.1} s", begin.elapsed().as_secs_f64());
                ensure!(sent.0 == sent.1, "other bytes came back");
            }
        }
        Ok(())
    })
}

/// Sends so much through `cat`; the hashes of what went and of what came.
fn there_and_back(world: &World, dialect: &'static str) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut cat = start(world, &["exec", "-i", "ops", "-c", "box", "--", "cat"], dialect)?;
    let (mut input, mut output) = ends(&mut cat)?;
    std::thread::scope(|scope| {
        let sent = scope.spawn(move || {
            let mut hash = Context::new(&SHA256);
            let mut piece = vec![0_u8; 1 << 20];
            for number in 0..GIB / piece.len() {
                let seed = u8::try_from(number % 251).unwrap_or_default();
                piece.iter_mut().zip((0..253_u8).cycle()).for_each(|(byte, at)| *byte = seed.wrapping_mul(31) ^ at);
                hash.update(&piece);
                input.write_all(&piece)?;
            }
            Ok::<_, anyhow::Error>(hash.finish().as_ref().to_vec())
        });
        let (mut hash, mut piece) = (Context::new(&SHA256), vec![0; 1 << 20]);
        loop {
            let read = output.read(&mut piece)?;
            if read == 0 {
                break;
            }
            hash.update(&piece[..read]);
        }
        ensure!(cat.wait()?.success(), "the session ended badly");
        let sent = sent.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok((sent, hash.finish().as_ref().to_vec()))
    })
}

#[test]
fn ten_sessions_at_once_each_get_their_own() -> Result<()> {
    story("ops-ten", |world| each_get_their_own(world, 10))
}

#[test]
#[ignore = "minutes: scripts/soak ops"]
fn fifty_sessions_at_once_each_get_their_own() -> Result<()> {
    story("ops-fifty", |world| each_get_their_own(world, 50))
}

fn each_get_their_own(world: &mut World, count: usize) -> Result<()> {
    start_pod(world)?;
    world.relay.set(|line| line.latency = FAR);
    for transport in TRANSPORTS {
        world.carry_over(transport)?;
        let before = memory(world)?;
        let mut sessions = (0..count)
            .map(|_| start(world, &["exec", "-i", "ops", "-c", "box", "--", "cat"], "true"))
            .collect::<Result<Vec<_>>>()?;
        for round in 0..20 {
            let line = |number: usize| format!("{number} says {round} {}\n", "x".repeat(4000));
            for (number, session) in sessions.iter_mut().enumerate() {
                session.stdin.as_mut().context("no input")?.write_all(line(number).as_bytes())?;
            }
            for (number, session) in sessions.iter_mut().enumerate() {
                let mut back = vec![0; line(number).len()];
                session.stdout.as_mut().context("no output")?.read_exact(&mut back)?;
                ensure!(back == line(number).as_bytes(), "session {number} got another's bytes");
            }
        }
        let (edge, cloud) = more(&before, &memory(world)?);
        eprintln!("{count} sessions over {transport}: edgecore {edge:+.1} MB, cloudcore {cloud:+.1} MB");
        ensure!(edge <= ROOM_OF_ALL[0] && cloud <= ROOM_OF_ALL[1], "edgecore {edge:.1} MB, cloudcore {cloud:.1} MB");
        for session in &mut sessions {
            drop(session.stdin.take());
            ensure!(session.wait()?.success(), "a session ended badly");
        }
    }
    until("the streams to be gone", 20, || Ok(world.cloud.metric("skerry_kubelet_streams")? == 0.0))
}

#[test]
fn a_log_that_is_read_slowly_for_a_while_fills_no_memory() -> Result<()> {
    story("ops-slow", |world| fills_no_memory(world, 10))
}

#[test]
#[ignore = "minutes: scripts/soak ops"]
fn a_log_that_is_read_slowly_fills_no_memory() -> Result<()> {
    story("ops-slower", |world| fills_no_memory(world, 60))
}

fn fills_no_memory(world: &mut World, seconds: u64) -> Result<()> {
    // About 50 MB a second, which the runtime writes down as fast as it can.
    let talker = format!("exec yes {}", "0123456789".repeat(10));
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "loud", "labels": {"app": "loud"}},
        "spec": {
            "nodeName": world.edge.name(), "terminationGracePeriodSeconds": GRACE, "automountServiceAccountToken": false,
            "containers": [container("main", &["sh", "-c", &talker])],
        },
    });
    world.run_pods(&pod.to_string(), "app=loud", 1)?;
    world.relay.set(|line| line.latency = FAR);
    for transport in TRANSPORTS {
        world.carry_over(transport)?;
        // What serves logs is in memory before it is measured.
        world.kubectl.run(&["logs", "loud", "--tail=1"])?;
        sleep(Duration::from_secs(5));
        let before = memory(world)?;
        let mut follow = start(world, &["logs", "-f", "loud", "--tail=1"], "true")?;
        let mut output = follow.stdout.take().context("no output")?;
        let (mut piece, mut read, begin) = (vec![0; 64 << 10], 0, Instant::now());
        let (mut edge, mut cloud) = (0.0_f64, 0.0_f64);
        while begin.elapsed() < Duration::from_secs(seconds) {
            read += output.read(&mut piece)?;
            sleep(Duration::from_millis(500));
            let (more_edge, more_cloud) = more(&before, &memory(world)?);
            (edge, cloud) = (edge.max(more_edge), cloud.max(more_cloud));
        }
        follow.kill()?;
        follow.wait()?;
        eprintln!("{read} bytes in {seconds} s over {transport}: edgecore {edge:+.1} MB, cloudcore {cloud:+.1} MB");
        ensure!(read > 0, "nothing came of the log");
        ensure!(
            edge <= ROOM[0] && cloud <= ROOM[1],
            "over {transport}: edgecore {edge:.1} MB, cloudcore {cloud:.1} MB"
        );
    }
    world.kubectl.run(&["delete", "pod", "loud", "--force", "--grace-period=0"]).map(drop)
}

#[test]
#[ignore = "minutes: scripts/soak ops"]
fn a_flood_holds_up_neither_the_node_nor_its_objects() -> Result<()> {
    story("ops-flood", |world| {
        start_pod(world)?;
        for transport in TRANSPORTS {
            world.carry_over(transport)?;
            world.relay.set(|line| (line.bandwidth, line.latency) = (1 << 20, FAR));
            let flood = flood(world, 4)?;
            let (_, epoch) = world.session()?;
            for round in 0..10 {
                // From the apiserver to the container that it starts, and its status back.
                let name = format!("small-{round}");
                let begin = Instant::now();
                world.kubectl.apply(&sleeper(&name, world.edge.name(), false).to_string())?;
                world.kubectl.wait("pod", &name, "Ready", 30, skerry_tests::kubectl::is_ready)?;
                eprintln!("{transport}: {name} is ready after {:.1} s", begin.elapsed().as_secs_f64());
                world.kubectl.delete("pod", &name)?;
            }
            ensure!(world.session()?.1 == epoch, "the session did not stand the flood");
            dry(flood)?;
            world.relay.heal();
        }
        until("the streams to be gone", 20, || Ok(world.cloud.metric("skerry_kubelet_streams")? == 0.0))
    })
}

#[test]
#[ignore = "minutes: scripts/soak ops"]
fn a_flood_of_a_narrow_line_leaves_changes_their_time() -> Result<()> {
    story("ops-narrow", |world| {
        world.kubectl.run(&["create", "configmap", "watched", "--from-literal=change=none"])?;
        start_pod(world)?;
        world.run_pods(&mounting(world, "reader", "watched").to_string(), "app=sleeper", 1)?;
        let line = Relay::start_narrow(world.cloud.address(), MODEM)?;
        world.edge.configure("server", &line.address().to_string())?;
        for transport in TRANSPORTS {
            line.heal();
            world.carry_over(transport)?;
            line.set(|line| (line.bandwidth, line.latency) = (BANDWIDTH, FAR));
            let quiet = changes(world, &format!("{transport}, quiet"))?;
            let flood = flood(world, 4)?;
            let (_, epoch) = world.session()?;
            let flooded = changes(world, &format!("{transport}, flooded"));
            let (up, down) = line.bytes();
            eprintln!("so far {up} bytes have gone up and {down} down");
            ensure!(world.session()?.1 == epoch, "the session did not stand the flood");
            dry(flood)?;
            let more = flooded? - quiet;
            ensure!(more <= PROMISE + ASKING, "over {transport} a change takes {more:.2} s more");
        }
        world.edge.configure("server", &world.relay.address().to_string())?;
        world.carry_over("auto")
    })
}

/// The median of how long changes of a ConfigMap take to the box, in seconds.
fn changes(world: &World, what: &str) -> Result<f64> {
    let get = ["get", "configmaps", "watched", "-o", "json", "-n", world.kubectl.namespace()];
    let mut times = Vec::new();
    for change in 0..CHANGES {
        let wanted = format!("{what}, {change}");
        world.kubectl.patch("configmap", "watched", &json!({"data": {"change": wanted}}))?;
        let begin = Instant::now();
        loop {
            let list: Value = serde_json::from_str(&world.edge.cli(&get)?.stdout)?;
            if list["items"][0]["data"]["change"] == *wanted {
                break;
            }
            ensure!(begin.elapsed() < patience(30), "{wanted} did not come in half a minute");
        }
        times.push(begin.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let (median, worst) = (times[CHANGES / 2], times[CHANGES - 1]);
    eprintln!("{what}: a change takes {median:.2} s, at worst {worst:.2} s");
    Ok(median)
}

/// So many sessions that say as much as they can, and as many that hear it; once all are under way.
fn flood(world: &World, count: usize) -> Result<Vec<Child>> {
    let mut flood = Vec::new();
    for _ in 0..count {
        let mut up = start(world, &["exec", "ops", "-c", "box", "--", "cat", "/dev/zero"], "true")?;
        let mut output = up.stdout.take().context("no output")?;
        std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        let mut down = world.kubectl.command();
        down.args(["exec", "-i", "ops", "-c", "box", "--", "wc", "-c"]);
        flood.extend([up, down.stdin(File::open("/dev/zero")?).spawn()?]);
    }
    let all = f64::from(u32::try_from(flood.len())?);
    until("the flood", 60, || Ok(world.cloud.metric("skerry_kubelet_streams")? >= all))?;
    sleep(Duration::from_secs(5));
    Ok(flood)
}

/// Ends them. Until now they must have gone on.
fn dry(flood: Vec<Child>) -> Result<()> {
    let mut dried_up = None;
    for mut session in flood {
        dried_up = dried_up.or(session.try_wait()?);
        session.kill()?;
        session.wait()?;
    }
    ensure!(dried_up.is_none(), "a session of the flood ended by itself: {dried_up:?}");
    Ok(())
}

fn start(world: &World, arguments: &[&str], dialect: &'static str) -> Result<Child> {
    let mut command = world.kubectl.websockets(dialect).command();
    command.args(arguments);
    Ok(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?)
}

fn ends(session: &mut Child) -> Result<(std::process::ChildStdin, std::process::ChildStdout)> {
    Ok((session.stdin.take().context("no input")?, session.stdout.take().context("no output")?))
}

/// What edgecore and cloudcore have, in kB.
fn memory(world: &World) -> Result<[u32; 2]> {
    let pids = [world.edge.pid(), world.cloud.pid()];
    let [edge, cloud] = pids.map(|pid| procfs::rss_kb(pid?));
    Ok([edge.context("edgecore does not run")?, cloud.context("cloudcore does not run")?])
}

/// In MB.
fn more(before: &[u32; 2], now: &[u32; 2]) -> (f64, f64) {
    let more = |at: usize| (f64::from(now[at]) - f64::from(before[at])) / 1000.0;
    (more(0), more(1))
}
