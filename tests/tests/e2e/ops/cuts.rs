//! What becomes of kubectl's sessions when the link goes under them, and what another node's edge can do to them.

use std::ffi::OsStr;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use skerry_proto::wire::{self, frame::Body};
use skerry_tests::cloudcore::kubelet_address;
use skerry_tests::kubectl::{Kubectl, kubelet_port};
use skerry_tests::peer::{self, Session};
use skerry_tests::ports;
use skerry_tests::wait::{eventually, until};

use super::{DIALECTS, start_pod};
use crate::world::{World, control, story};

/// The link's liveness bound, and what kubectl and the apiserver take to pass it on.
const BOUND: Duration = Duration::from_secs(45);
const TRANSPORTS: [&str; 2] = ["websocket", "quic"];
/// The visitor's name; see [`crate::world`].
const NEIGHBOUR: &str = "hostile";

#[test]
fn a_cut_link_ends_what_went_over_it_and_the_next_try_works() -> Result<()> {
    story("ops-cut", |world| {
        start_pod(world)?;
        for transport in TRANSPORTS {
            world.carry_over(transport)?;
            cut(world).with_context(|| format!("over {transport}"))?;
        }
        Ok(())
    })
}

fn cut(world: &World) -> Result<()> {
    let kubectl = &world.kubectl;
    let descriptors = descriptors_at_rest(world)?;
    // Slow enough that a copy is under way when the link goes.
    let large = world.dir().join("large");
    std::fs::write(&large, vec![7; 64 << 20])?;
    let port = ports::free()?;
    let mut clients = clients(kubectl, port)?;
    let mut through = eventually("the port to be forwarded", 20, || Ok(TcpStream::connect(("127.0.0.1", port)).ok()))?;
    through.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")?;
    ensure!(through.read(&mut [0; 64])? > 0, "no answer through the forwarded port");
    world.relay.set(|line| line.bandwidth = 2 << 20);
    clients.push(begin(kubectl, &["cp", "-c", "box", large.to_str().context("a path")?, "ops:/tmp/large"])?);
    std::thread::sleep(Duration::from_secs(3));
    world.relay.cut();
    let cut = Instant::now();
    for (what, client) in &mut clients {
        end_by_themselves(what, client, cut)?;
    }
    // What came of the answer before is still there to be read.
    through.set_read_timeout(Some(Duration::from_secs(5)))?;
    let ended =
        through.read_to_end(&mut Vec::new()).map_or_else(|error| error.kind() != ErrorKind::WouldBlock, |_| true);
    ensure!(ended, "the forwarded connection goes on");
    let away = kubectl.output(&["logs", "ops", "-c", "talker"])?;
    ensure!(!away.success && away.stderr.contains("is offline since"), "{}", away.stderr);
    world.relay.set(|line| line.bandwidth = 0);
    world.relay.heal();
    // The edge may not have noticed yet.
    until("the logs to be there again", 60, || {
        let output = kubectl.output(&["logs", "ops", "-c", "talker", "--tail=1"])?;
        Ok(output.success && output.stdout == "last\n")
    })?;
    let again = kubectl.pipe(&["exec", "ops", "-c", "box", "--", "true"], b"")?;
    ensure!(again.code == Some(0), "{}", again.errors);
    wait_over(world, 40, descriptors)
}

/// As a session that ends at the edge ends at the client, one whose client goes ends at the edge.
#[test]
fn a_client_that_is_killed_leaves_nothing() -> Result<()> {
    story("ops-killed", |world| {
        start_pod(world)?;
        for (transport, dialect) in TRANSPORTS.into_iter().zip(DIALECTS) {
            world.carry_over(transport)?;
            let before = descriptors_at_rest(world)?;
            let port = ports::free()?;
            let clients = clients(&world.kubectl.websockets(dialect), port)?;
            let through =
                eventually("the port to be forwarded", 20, || Ok(TcpStream::connect(("127.0.0.1", port)).ok()))?;
            let count = || world.cloud.metric("skerry_kubelet_connections");
            until("all to be connected", 20, || Ok(count()? >= f64::from(u32::try_from(clients.len())?)))?;
            std::thread::sleep(Duration::from_secs(1));
            for (_, mut client) in clients {
                client.kill()?;
                client.wait()?;
            }
            drop(through);
            let killed = Instant::now();
            until("cloudcore to let go", 3, || Ok(count()? == 0.0))?;
            until("edgecore to let go", 3, || Ok(descriptors(world)? <= before))?;
            eprintln!("nothing is left after {:.1} s, {transport}, {dialect}", killed.elapsed().as_secs_f64());
            wait_over(world, 5, before)?;
        }
        Ok(())
    })
}

/// A client of each kind, as long as nobody ends it.
fn clients(kubectl: &Kubectl, port: u16) -> Result<Vec<(String, Child)>> {
    Ok(vec![
        begin(kubectl, &["logs", "-f", "ops", "-c", "talker"])?,
        begin(kubectl, &["exec", "-i", "ops", "-c", "box", "--", "cat"])?,
        // It goes on without its client, as under a kubelet: the runtime keeps the terminal.
        at_a_terminal(kubectl, &["exec", "-it", "ops", "-c", "box", "--", "sleep", "100"])?,
        begin(kubectl, &["attach", "-i", "ops", "-c", "echo"])?,
        begin(kubectl, &["port-forward", "pod/ops", &format!("{port}:8080")])?,
    ])
}

fn begin(kubectl: &Kubectl, arguments: &[&str]) -> Result<(String, Child)> {
    let mut command = kubectl.command();
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok((arguments.join(" "), command.spawn()?))
}

fn at_a_terminal(kubectl: &Kubectl, arguments: &[&str]) -> Result<(String, Child)> {
    let kubectl = kubectl.command();
    let words =
        std::iter::once(kubectl.get_program()).chain(kubectl.get_args()).chain(arguments.iter().map(OsStr::new));
    let words: Vec<_> = words.map(|word| format!("'{}'", word.display())).collect();
    let mut command = Command::new("script");
    command.envs(kubectl.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.args(["-qec", &format!("exec {}", words.join(" ")), "/dev/null"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok((arguments.join(" "), command.spawn()?))
}

/// Waits until nothing is left of what went before: no command, which has read the end of its input; no connection; no descriptor.
fn wait_over(world: &World, seconds: u64, before: usize) -> Result<()> {
    until("the commands to be gone", seconds, || {
        let count = "pidof cat | wc -w; pidof tar | wc -w";
        let left = world.kubectl.pipe(&["exec", "ops", "-c", "box", "--", "sh", "-c", count], b"")?;
        Ok(left.output == b"0\n0\n")
    })?;
    until("the connections to be gone", 20, || Ok(world.cloud.metric("skerry_kubelet_connections")? == 0.0))?;
    until("edgecore's descriptors to be closed", 20, || Ok(descriptors(world)? <= before))
}

/// Waits until a client whose link is gone ends, which it must by an error that says something.
fn end_by_themselves(what: &str, client: &mut Child, since: Instant) -> Result<()> {
    let status = loop {
        if let Some(status) = client.try_wait()? {
            break status;
        }
        if since.elapsed() > BOUND {
            client.kill()?;
            bail!("kubectl {what} still waits for a link that is gone");
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let (mut said, mut errors) = (String::new(), String::new());
    client.stdout.take().context("no output")?.read_to_string(&mut said)?;
    client.stderr.take().context("no standard error")?.read_to_string(&mut errors)?;
    eprintln!("kubectl {what} after {:.1} s ({status}): {}", since.elapsed().as_secs_f64(), errors.trim());
    if what.starts_with("logs") {
        // The apiserver hides from kubectl that the log did not end.
        ensure!(said.contains("\nthe log broke off, node "), "kubectl {what}: {status}, {said:?}");
        return Ok(());
    }
    // A terminal shows both.
    let errors = if what.starts_with("exec -it") { said } else { errors };
    ensure!(!status.success() && !errors.trim().is_empty(), "kubectl {what}: {status}, {errors:?}");
    Ok(())
}

/// How many edgecore has once what its start opens is open.
fn descriptors_at_rest(world: &World) -> Result<usize> {
    let mut last = descriptors(world)?;
    eventually("edgecore's descriptors to stay as many", 30, || {
        std::thread::sleep(Duration::from_secs(1));
        let before = std::mem::replace(&mut last, descriptors(world)?);
        Ok((before == last).then_some(last))
    })
}

fn descriptors(world: &World) -> Result<usize> {
    let pid = world.edge.pid().context("edgecore does not run")?;
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

#[test]
fn a_hostile_edge_gets_at_no_session_of_another_node() -> Result<()> {
    story("ops-hostile", |world| {
        start_pod(world)?;
        let token = world.cloud.new_token(&[])?.token;
        let address = world.cloud.address();
        let identity = peer::join(address, &token, NEIGHBOUR, "machine-of-the-hostile-one")?
            .map_err(|refusal| anyhow::anyhow!("cloudcore does not let it join: {}", refusal.message))?;
        let mut session = Session::establish(address, &identity, NEIGHBOUR)?;
        session.receive_until("Welcome", |body| matches!(body, Body::Welcome(_)).then_some(()))?;
        let port = eventually("the neighbour's port", 20, || {
            let node = world.admin().find("node", NEIGHBOUR)?;
            Ok(node.as_ref().and_then(kubelet_port))
        })?;
        ensure!(port != world.port()?, "two nodes have one port");
        // What is asked at its port for another node's pod comes to it, and not to that node.
        let admin = control()?.authority()?.client(world.dir(), "asker", "admin", &["system:masters"])?;
        let namespace = world.kubectl.namespace();
        let asker = Command::new("curl")
            .args(["-sk", "-m", "20", "--cert"])
            .arg(&admin.certificate)
            .arg("--key")
            .arg(&admin.key)
            .arg(format!("https://{}:{port}/containerLogs/{namespace}/ops/talker", kubelet_address()))
            .stdout(Stdio::piped())
            .spawn()?;
        let opened = session.receive_opened(20)?;
        // Somebody else's session stands meanwhile.
        let mut other =
            world.kubectl.stream(&["exec", "ops", "-c", "box", "--", "sh", "-c", "echo begin; sleep 4; echo end"])?;
        std::thread::sleep(Duration::from_secs(2));
        let lie = || wire::StreamData { id: 0, data: b"HTTP/1.1 200 OK\r\n\r\nlies".as_slice().into(), fin: false };
        // Other numbers than its own are nobody's: cloudcore ends its session for the first.
        for id in (0..64).filter(|id| *id != opened) {
            if session.send(Body::StreamData(wire::StreamData { id, ..lie() })).is_err() {
                break;
            }
        }
        session.receive_end()?;
        let mut output = String::new();
        other.stdout.take().context("no output")?.read_to_string(&mut output)?;
        ensure!(other.wait()?.success() && output == "begin\nend\n", "the other session got {output:?}");
        let answer = asker.wait_with_output()?;
        let text = String::from_utf8_lossy(&answer.stdout);
        ensure!(!text.contains("line 1\n") && !text.contains("lies"), "the neighbour's port says {text:?}");
        world.wait_connected()
    })
}
