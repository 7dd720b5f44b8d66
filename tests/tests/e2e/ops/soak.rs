//! What takes minutes: much, many and for long. Run by `scripts/soak ops`.

use std::io::{Read as _, Write as _};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ring::digest::{Context, SHA256};
use serde_json::json;
use skerry_tests::manifests::{GRACE, container};
use skerry_tests::procfs;
use skerry_tests::wait::until;

use super::{DIALECTS, FAR, start_pod};
use crate::world::{World, story};

/// What goes through one session.
const GIB: usize = 1 << 30;
const SESSIONS: usize = 50;
/// What one stream may hold on each side, with room for what else happens meanwhile, in MB.
const ROOM: f64 = 4.0;
/// The same of [`SESSIONS`].
const ROOM_OF_ALL: f64 = 16.0;

#[test]
#[ignore = "minutes: scripts/soak ops"]
fn a_gibibyte_comes_back_as_it_was() -> Result<()> {
    story("ops-gib", |world| {
        start_pod(world)?;
        world.relay.set(|line| line.latency = FAR);
        for transport in ["quic", "websocket"] {
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
#[ignore = "minutes: scripts/soak ops"]
fn fifty_sessions_at_once_each_get_their_own() -> Result<()> {
    story("ops-fifty", |world| {
        start_pod(world)?;
        world.relay.set(|line| line.latency = FAR);
        for transport in ["quic", "websocket"] {
            world.carry_over(transport)?;
            let before = memory(world)?;
            let mut sessions = (0..SESSIONS)
                .map(|_| start(world, &["exec", "-i", "ops", "-c", "box", "--", "cat"], "true"))
                .collect::<Result<Vec<_>>>()?;
            for round in 0..20 {
                for (number, session) in sessions.iter_mut().enumerate() {
                    let line = format!("{number} says {round} {}\n", "x".repeat(4000));
                    session.stdin.as_mut().context("no input")?.write_all(line.as_bytes())?;
                }
                for (number, session) in sessions.iter_mut().enumerate() {
                    let line = format!("{number} says {round} {}\n", "x".repeat(4000));
                    let mut back = vec![0; line.len()];
                    session.stdout.as_mut().context("no output")?.read_exact(&mut back)?;
                    ensure!(back == line.as_bytes(), "session {number} got another's bytes");
                }
            }
            let (edge, cloud) = more(&before, &memory(world)?);
            eprintln!("{SESSIONS} sessions over {transport}: edgecore {edge:+.1} MB, cloudcore {cloud:+.1} MB");
            ensure!(edge <= ROOM_OF_ALL && cloud <= ROOM_OF_ALL, "edgecore {edge:.1} MB, cloudcore {cloud:.1} MB");
            for session in &mut sessions {
                drop(session.stdin.take());
                ensure!(session.wait()?.success(), "a session ended badly");
            }
        }
        until("the streams to be gone", 20, || Ok(world.cloud.metric("skerry_kubelet_streams")? == 0.0))
    })
}

#[test]
#[ignore = "minutes: scripts/soak ops"]
fn a_log_that_is_read_slowly_fills_no_memory() -> Result<()> {
    story("ops-slow", |world| {
        // About 50 MB a second, which the runtime writes down as fast as it can.
        let talker = "exec yes 0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789";
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "loud", "labels": {"app": "loud"}},
            "spec": {
                "nodeName": world.edge.name(), "terminationGracePeriodSeconds": GRACE, "automountServiceAccountToken": false,
                "containers": [container("main", &["sh", "-c", talker])],
            },
        });
        world.run_pods(&pod.to_string(), "app=loud", 1)?;
        world.relay.set(|line| line.latency = FAR);
        sleep(Duration::from_secs(5));
        let before = memory(world)?;
        let mut follow = start(world, &["logs", "-f", "loud", "--tail=1"], "true")?;
        let mut output = follow.stdout.take().context("no output")?;
        let (mut piece, mut read, begin) = (vec![0; 64 << 10], 0, Instant::now());
        let (mut edge, mut cloud) = (0.0_f64, 0.0_f64);
        while begin.elapsed() < Duration::from_secs(60) {
            read += output.read(&mut piece)?;
            sleep(Duration::from_millis(500));
            let (more_edge, more_cloud) = more(&before, &memory(world)?);
            (edge, cloud) = (edge.max(more_edge), cloud.max(more_cloud));
        }
        follow.kill()?;
        follow.wait()?;
        eprintln!("{read} bytes in 60 s: edgecore {edge:+.1} MB, cloudcore {cloud:+.1} MB");
        ensure!(edge <= ROOM && cloud <= ROOM, "edgecore {edge:.1} MB, cloudcore {cloud:.1} MB");
        world.kubectl.run(&["delete", "pod", "loud", "--force", "--grace-period=0"]).map(drop)
    })
}

#[test]
#[ignore = "minutes: scripts/soak ops"]
fn a_flood_holds_up_neither_the_node_nor_its_objects() -> Result<()> {
    story("ops-flood", |world| {
        start_pod(world)?;
        for transport in ["quic", "websocket"] {
            world.carry_over(transport)?;
            world.relay.set(|line| (line.bandwidth, line.latency) = (1 << 20, FAR));
            let mut flood = (0..4)
                .map(|_| start(world, &["exec", "ops", "-c", "box", "--", "cat", "/dev/zero"], "true"))
                .collect::<Result<Vec<_>>>()?;
            for session in &mut flood {
                let mut output = session.stdout.take().context("no output")?;
                std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
            }
            sleep(Duration::from_secs(5));
            let (_, epoch) = world.session()?;
            for round in 0..10 {
                // From the apiserver to the container that it starts, and its status back.
                let name = format!("small-{round}");
                let begin = Instant::now();
                world.kubectl.apply(&skerry_tests::manifests::sleeper(&name, world.edge.name(), false).to_string())?;
                world.kubectl.wait("pod", &name, "Ready", 30, skerry_tests::kubectl::is_ready)?;
                eprintln!("{transport}: {name} is ready after {:.1} s", begin.elapsed().as_secs_f64());
                world.kubectl.delete("pod", &name)?;
            }
            ensure!(world.session()?.1 == epoch, "the session did not stand the flood");
            for session in &mut flood {
                session.kill()?;
                session.wait()?;
            }
            world.relay.heal();
        }
        until("the streams to be gone", 20, || Ok(world.cloud.metric("skerry_kubelet_streams")? == 0.0))
    })
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
