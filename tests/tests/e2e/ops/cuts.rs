//! What becomes of kubectl's sessions when the link goes under them, and what another node's edge can do to them.

use std::fs::File;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use skerry_proto::wire::{self, frame::Body, goodbye::Reason};
use skerry_tests::cloudcore::kubelet_address;
use skerry_tests::images::BUSYBOX;
use skerry_tests::kubectl::{Kubectl, kubelet_port};
use skerry_tests::peer::{Session, hello};
use skerry_tests::ports;
use skerry_tests::process::read_all;
use skerry_tests::procfs::{self, Entry};
use skerry_tests::wait::{eventually, patience, until};

use super::{
    DIALECTS, FAR, TRANSPORTS, Verb, at_a_terminal, attaches, copies, execs, forwards, logs, nothing, shells, start_pod,
};
use crate::hostile::{NODE, enter, welcome};
use crate::world::{World, control, story};

/// The link's liveness bound, in seconds.
pub(super) const BOUND: u64 = 30;
/// What cloudcore, the apiserver and kubectl take to pass it on, in seconds.
pub(super) const PASSING: u64 = 5;
/// How long a machine that is busy may hold up what takes less than a second, in seconds.
const LATE: u64 = 10;
/// Connections to a node's port that the apiserver may keep for its next requests.
const POOLED: usize = 4;
/// What a cut link is told by, of which kubectl says one: of a 503 that a POST of its own gets it shows nothing but its name.
const CAUSES: [&str; 4] = ["broke off", "is offline since", "lost connection to pod", "(ServiceUnavailable)"];

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
    // Slow enough that copies are under way when the link goes.
    let [large, copy] = ["large", "copy"].map(|name| world.dir().join(name));
    std::fs::write(&large, vec![7; 64 << 20])?;
    kubectl.run(&["exec", "ops", "-c", "box", "--", "sh", "-c", "head -c 67108864 /dev/zero > /tmp/zeros"])?;
    let before = descriptors_at_rest(world)?;
    let mut clients = vec![debugger(kubectl)?];
    let mut connections = Vec::new();
    for dialect in DIALECTS {
        let port = ports::free()?;
        clients.extend(self::clients(&kubectl.websockets(dialect), port)?);
        connections.push(forwarded(port)?);
    }
    let namespace = kubectl.namespace();
    clients.push(through_proxy(world, &["get"], &format!("/containerLogs/{namespace}/ops/talker?follow=true"))?);
    let run = format!("/run/{namespace}/ops/box?cmd=sleep%20100");
    clients.push(through_proxy(world, &["create", "-f", &nothing(world)?], &run)?);
    connected(world, clients.len())?;
    world.relay.set(|line| (line.bandwidth, line.latency) = (2 << 20, FAR));
    let copying: [&[&str]; 2] = [
        &["cp", "-c", "box", large.to_str().context("a path")?, "ops:/tmp/large"],
        &["cp", "-c", "box", "ops:/tmp/zeros", copy.to_str().context("a path")?],
    ];
    for arguments in copying {
        clients.push(Client::begin(kubectl, arguments)?);
    }
    sleep(Duration::from_secs(3));
    world.relay.cut();
    let cut = Instant::now();
    // Nobody knows yet: it waits for its answer.
    clients.push(through_proxy(world, &["get"], "/metrics/cadvisor")?);
    for client in &mut clients {
        client.ends_with_an_error(cut)?;
    }
    // What came of the answer before is still there to be read.
    for through in &mut connections {
        through.set_read_timeout(Some(Duration::from_secs(5)))?;
        ensure!(has_ended(through), "the forwarded connection goes on");
    }
    let away = kubectl.output(&["logs", "ops", "-c", "talker"])?;
    ensure!(!away.success && away.stderr.contains("is offline since"), "{}", away.stderr);
    world.relay.heal();
    // The edge may not have noticed yet.
    until("the logs to be there again", 60, || {
        let output = kubectl.output(&["logs", "ops", "-c", "talker", "--tail=1"])?;
        Ok(output.success && output.stdout == "last\n")
    })?;
    logs(kubectl)?;
    world.page("/metrics/cadvisor")?;
    let verbs: [(_, Verb); 5] =
        [("exec", execs), ("port-forward", forwards), ("cp", copies), ("attach", attaches), ("exec -it", shells)];
    for (verb, works) in verbs {
        works(world, kubectl).with_context(|| format!("{verb} after the cut"))?;
    }
    wait_over(world, 40, before)
}

/// As a session that ends at the edge ends at the client, one whose client goes ends at the edge, and one whose container goes at both.
#[test]
fn a_client_or_a_container_that_is_killed_leaves_nothing() -> Result<()> {
    story("ops-killed", |world| {
        let shims_before = shims(world);
        start_pod(world)?;
        let (mut commands, mut clients) = (Vec::new(), Vec::new());
        for transport in TRANSPORTS {
            world.carry_over(transport)?;
            let before = descriptors_at_rest(world)?;
            for dialect in DIALECTS {
                let command = ends_with_its_command(world, &world.kubectl.websockets(dialect));
                let of = || format!("{transport}, {dialect}");
                commands.push(command.with_context(of)?);
                clients.push(killed(world, dialect, before).with_context(of)?);
            }
        }
        // What a busy machine holds up it does not hold up each time.
        for (what, times) in [("its command", commands), ("its client", clients)] {
            let soonest = times.iter().min().context("none")?;
            ensure!(*soonest <= patience(1), "no session ended within a second of {what}: {times:?}");
        }
        ended(world, descriptors_at_rest(world)?).context("with their pod")?;
        until("the pod's shim to end", 20, || Ok(shims(world) == shims_before))
    })
}

/// How long after the command that it ran kubectl goes.
fn ends_with_its_command(world: &World, kubectl: &Kubectl) -> Result<Duration> {
    let script = format!("echo x; sleep 2; : {} {}", world.edge.name(), kubectl.namespace());
    let mut client = Client::begin(kubectl, &["exec", "ops", "-c", "box", "--", "sh", "-c", &script])?;
    let is_command = |entry: &&Entry| entry.program() == "sh" && entry.arguments.contains(&script);
    let command = eventually("the command to run", 20, || {
        Ok(procfs::processes().iter().find(is_command).map(|entry| entry.pid))
    })?;
    let (begin, mut gone) = (Instant::now(), None);
    let status = loop {
        // Both are looked at in the same round: a busy machine sees both late.
        if !procfs::is_running(command) {
            gone.get_or_insert_with(Instant::now);
        }
        if let Some(status) = client.child.try_wait()? {
            break status;
        }
        let late = gone.is_some_and(|gone| gone.elapsed() > patience(LATE));
        if late || begin.elapsed() > patience(20) {
            client.kill()?;
            bail!("kubectl goes on, its command {}", if late { "has ended" } else { "does too" });
        }
        sleep(Duration::from_millis(5));
    };
    ensure!(status.success() && !procfs::is_running(command), "kubectl ended with {status} before its command");
    let after = gone.map_or(Duration::ZERO, |gone| gone.elapsed());
    eprintln!("kubectl {} ended {after:.2?} after its command", client.what);
    Ok(after)
}

/// How long after its clients both sides hold nothing of them.
fn killed(world: &World, dialect: &'static str, before: Descriptors) -> Result<Duration> {
    let port = ports::free()?;
    let clients = clients(&world.kubectl.websockets(dialect), port)?;
    let through = forwarded(port)?;
    connected(world, clients.len())?;
    let shims_before = shims(world);
    for client in clients {
        client.kill()?;
    }
    drop(through);
    let after = let_go(world, before)?;
    wait_over(world, 5, before)?;
    ensure!(shims(world) == shims_before, "{} shims have become {}", shims_before, shims(world));
    Ok(after)
}

/// What is under way in containers ends with them, but for what kubectl goes on with for whatever pod comes next.
fn ended(world: &World, before: Descriptors) -> Result<()> {
    let port = ports::free()?;
    let mut clients = clients(&world.kubectl, port)?;
    let mut through = forwarded(port)?;
    connected(world, clients.len())?;
    let forward = clients.pop().context("no clients")?;
    world.kubectl.run(&["delete", "pod", "ops"])?;
    let begin = Instant::now();
    for client in &mut clients {
        let status = client.ends(begin)?;
        eprintln!("kubectl {} ended with {status} {:.1} s after its pod", client.what, begin.elapsed().as_secs_f64());
    }
    through.set_read_timeout(Some(Duration::from_secs(5)))?;
    ensure!(has_ended(&mut through), "the forwarded connection goes on");
    forward.kill()?;
    let_go(world, before).map(drop)
}

/// A connection to the pod's server through a kubectl that forwards a port; the server has answered.
fn forwarded(port: u16) -> Result<TcpStream> {
    let mut through = eventually("the port to be forwarded", 20, || Ok(TcpStream::connect(("127.0.0.1", port)).ok()))?;
    through.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")?;
    ensure!(through.read(&mut [0; 64])? > 0, "no answer through the forwarded port");
    Ok(through)
}

/// Waits until so many clients have their sessions.
fn connected(world: &World, clients: usize) -> Result<()> {
    let all = f64::from(u32::try_from(clients)?);
    until("all to be connected", 20, || Ok(world.cloud.metric("skerry_kubelet_streams")? >= all))?;
    sleep(Duration::from_secs(1));
    Ok(())
}

/// A shell in an ephemeral container of the pod.
fn debugger(kubectl: &Kubectl) -> Result<Client> {
    let image = format!("--image={BUSYBOX}");
    Client::begin_at_a_terminal(
        kubectl,
        &["debug", "ops", "-it", &image, "--image-pull-policy=IfNotPresent", "--", "sh"],
    )
}

/// What the apiserver asks the node for, for somebody else; straight from the node where the apiserver proxies to no address that it has.
fn through_proxy(world: &World, verb: &[&str], path: &str) -> Result<Client> {
    if kubelet_address().is_loopback() {
        let server = format!("--server={}", world.kubelet()?);
        let straight = ["--raw", path, &server, "--insecure-skip-tls-verify=true"];
        return Client::begin(world.admin(), &[verb, &straight].concat());
    }
    Client::begin(
        world.admin(),
        &[verb, &["--raw", &format!("/api/v1/nodes/{}/proxy{path}", world.edge.name())]].concat(),
    )
}

/// Waits until nobody holds anything of sessions whose other ends are gone; how long that took.
fn let_go(world: &World, before: Descriptors) -> Result<Duration> {
    let begin = Instant::now();
    let (mut edge, mut cloud) = (None, None);
    let both = eventually("both sides to let go", LATE, || {
        if descriptors(world)?.edge <= before.edge {
            edge.get_or_insert_with(|| begin.elapsed());
        }
        if world.cloud.metric("skerry_kubelet_streams")? == 0.0 {
            cloud.get_or_insert_with(|| begin.elapsed());
        }
        Ok(edge.zip(cloud))
    });
    let (edge, cloud) = both.with_context(|| format!("edgecore did after {edge:?}, cloudcore after {cloud:?}"))?;
    eprintln!("edgecore has let go after {:.1} s, cloudcore after {:.1} s", edge.as_secs_f64(), cloud.as_secs_f64());
    Ok(edge.max(cloud))
}

/// The processes that keep this runtime's pods.
fn shims(world: &World) -> usize {
    let dir = world.runtime.socket();
    let dir = dir.parent().unwrap_or(&dir);
    let is_ours = |entry: &&Entry| entry.program().starts_with("containerd-shim") && entry.mentions(dir);
    procfs::processes().iter().filter(is_ours).count()
}

/// A client of each kind, as long as nobody ends it.
fn clients(kubectl: &Kubectl, port: u16) -> Result<Vec<Client>> {
    Ok(vec![
        Client::begin(kubectl, &["logs", "-f", "ops", "-c", "talker"])?,
        Client::begin(kubectl, &["exec", "-i", "ops", "-c", "box", "--", "cat"])?,
        // It goes on without its client, as under a kubelet: the runtime keeps the terminal.
        Client::begin_at_a_terminal(kubectl, &["exec", "-it", "ops", "-c", "box", "--", "sleep", "100"])?,
        Client::begin(kubectl, &["attach", "-i", "ops", "-c", "echo"])?,
        Client::begin(kubectl, &["port-forward", "pod/ops", &format!("{port}:8080")])?,
    ])
}

/// A kubectl that goes on.
struct Client {
    what: String,
    child: Child,
    /// The other end of its terminal, if it has one.
    screen: Option<File>,
}

impl Client {
    fn begin(kubectl: &Kubectl, arguments: &[&str]) -> Result<Self> {
        let mut command = kubectl.command();
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Self { what: arguments.join(" "), child: command.spawn()?, screen: None })
    }

    fn begin_at_a_terminal(kubectl: &Kubectl, arguments: &[&str]) -> Result<Self> {
        let (child, screen, _) = at_a_terminal(kubectl.command().args(arguments))?;
        Ok(Self { what: arguments.join(" "), child, screen: Some(screen) })
    }

    fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits until it ends by itself, as it must.
    fn ends(&mut self, since: Instant) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if since.elapsed() > patience(BOUND + PASSING) {
                self.child.kill()?;
                bail!("kubectl {} still waits for what is gone", self.what);
            }
            sleep(Duration::from_millis(50));
        }
    }

    /// Waits until it ends because its link is gone, which it must by an error that says something.
    fn ends_with_an_error(&mut self, since: Instant) -> Result<()> {
        let status = self.ends(since)?;
        let what = &self.what;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let (said, errors) = match self.screen.take() {
            // A terminal shows both.
            Some(screen) => (String::new(), text(read_all(Some(screen)))),
            None => (text(read_all(self.child.stdout.take())), text(read_all(self.child.stderr.take()))),
        };
        eprintln!("kubectl {what} after {:.1} s ({status}): {}", since.elapsed().as_secs_f64(), errors.trim());
        if what.starts_with("logs") || what.contains("/containerLogs/") {
            // The apiserver hides from kubectl that the log did not end.
            ensure!(said.contains("\nthe log broke off, node "), "kubectl {what}: {status}, {said:?}");
            return Ok(());
        }
        let says_why = CAUSES.iter().any(|cause| errors.contains(cause));
        ensure!(!status.success() && says_why, "kubectl {what}: {status}, {errors:?}");
        Ok(())
    }
}

/// Whether nothing more comes of a connection than what came before.
fn has_ended(connection: &mut TcpStream) -> bool {
    connection.read_to_end(&mut Vec::new()).map_or_else(|error| error.kind() != ErrorKind::WouldBlock, |_| true)
}

/// Waits until nothing is left of what went before: no command that reads, which has read the end of its input; no stream; no descriptor. What only
/// writes has the runtime wait for somebody to read it, as under a kubelet.
fn wait_over(world: &World, seconds: u64, before: Descriptors) -> Result<()> {
    let mut left = Vec::new();
    until("the commands to be gone", seconds, || {
        let listed = world.kubectl.pipe(&["exec", "ops", "-c", "box", "--", "ps", "-o", "args"], b"")?;
        left = listed.output;
        let commands = String::from_utf8_lossy(&left);
        // Itself, at least.
        let is_listed = listed.code == Some(0) && commands.contains("ps -o args");
        Ok(is_listed && !commands.lines().any(|line| line.starts_with("cat") || line.starts_with("tar -x")))
    })
    .with_context(|| String::from_utf8_lossy(&left).into_owned())?;
    until("the streams to be gone", 20, || Ok(world.cloud.metric("skerry_kubelet_streams")? == 0.0))?;
    until("the descriptors to be closed", 20, || {
        let now = descriptors(world)?;
        Ok(now.edge <= before.edge && now.cloud <= before.cloud + POOLED)
    })
    .with_context(|| format!("before: {before:?}; now: {:?}", descriptors(world)))?;
    eprintln!("{before:?} have become {:?}", descriptors(world)?);
    Ok(())
}

/// How many descriptors both programs have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descriptors {
    edge: usize,
    cloud: usize,
}

/// How many there are once what a start opens is open.
fn descriptors_at_rest(world: &World) -> Result<Descriptors> {
    let mut last = descriptors(world)?;
    eventually("the descriptors to stay as many", 30, || {
        sleep(Duration::from_secs(1));
        let before = std::mem::replace(&mut last, descriptors(world)?);
        Ok((before == last).then_some(last))
    })
}

fn descriptors(world: &World) -> Result<Descriptors> {
    let [edge, cloud] = [world.edge.pid(), world.cloud.pid()].map(|pid| procfs::descriptors(pid?));
    Ok(Descriptors { edge: edge.context("edgecore does not run")?, cloud: cloud.context("cloudcore does not run")? })
}

#[test]
fn a_hostile_edge_gets_at_no_session_of_another_node() -> Result<()> {
    story("ops-hostile", |world| {
        start_pod(world)?;
        let (address, identity) = enter(world)?;
        let establish = |transport: &str| -> Result<Session> {
            let mut session = match transport {
                "quic" => Session::open_quic(address, &identity)?,
                _ => Session::open(address, Some(&identity))?,
            };
            session.send(Body::Hello(hello(NODE)))?;
            welcome(&mut session)?;
            Ok(session)
        };
        let session = establish("websocket")?;
        let port = eventually("the hostile node's port", 20, || {
            let node = world.admin().find("node", NODE)?;
            Ok(node.as_ref().and_then(kubelet_port))
        })?;
        ensure!(port != world.port()?, "two nodes have one port");
        drop(session);
        // Somebody else's session stands all the while.
        let mut command = world.kubectl.command();
        command.args(["exec", "-i", "ops", "-c", "box", "--", "sh", "-c", "echo begin; cat; echo end"]);
        let mut other = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut output = BufReader::new(other.stdout.take().context("no output")?);
        let mut first = String::new();
        output.read_line(&mut first)?;
        ensure!(first == "begin\n", "the other session begins with {first:?}");

        for transport in TRANSPORTS {
            // All classes of both sides, and of each the numbers that come first.
            for id in 0..32 {
                let mut session = establish(transport)?;
                let data = b"HTTP/1.1 200 OK\r\n\r\nlies".as_slice().into();
                session.send(Body::StreamData(wire::StreamData { id, data, fin: false }))?;
                let goodbye = session.receive_end().with_context(|| format!("stream {id} over {transport}"))?;
                let said = goodbye.unwrap_or_default();
                ensure!(said.reason() == Reason::Protocol, "the end for stream {id} over {transport}: {said:?}");
            }
            lying(world, &mut establish(transport)?, port).with_context(|| format!("over {transport}"))?;
        }
        drop(other.stdin.take());
        let mut rest = String::new();
        output.read_to_string(&mut rest)?;
        ensure!(other.wait()?.success() && rest == "end\n", "the other session got {rest:?}");
        ensure!(world.cloud.is_running(), "cloudcore is gone");
        world.wait_connected()
    })
}

/// What is asked at its port for another node's pod comes to the node itself, and what it answers is taken for no more than it is.
fn lying(world: &World, session: &mut Session, port: u16) -> Result<()> {
    let admin = control()?.authority()?.client(world.dir(), "asker", "admin", &["system:masters"])?;
    let path = format!("containerLogs/{}/ops/talker", world.kubectl.namespace());
    let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(60 << 10));
    for head in [
        "",
        "\0\u{7f}\u{7f}lies\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nlies",
        "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nlies",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: lies\r\n\r\nlies",
        &endless,
    ] {
        let asker = Command::new("curl")
            .args(["-sk", "-m", "20", "-w", "%{http_code}", "--cert"])
            .arg(&admin.certificate)
            .arg("--key")
            .arg(&admin.key)
            .arg(format!("https://{}:{port}/{path}", kubelet_address()))
            .stdout(Stdio::piped())
            .spawn()?;
        let id = session.receive_opened(20)?;
        let mut parts: Vec<&[u8]> = head.as_bytes().chunks(4 << 10).collect();
        let last = parts.pop().unwrap_or_default();
        for part in parts {
            session.send(Body::StreamData(wire::StreamData { id, data: part.to_vec().into(), fin: false }))?;
        }
        session.send(Body::StreamData(wire::StreamData { id, data: last.to_vec().into(), fin: true }))?;
        let answer = asker.wait_with_output()?;
        let text = String::from_utf8_lossy(&answer.stdout);
        let (begin, _) = head.split_at(head.len().min(80));
        ensure!(text.ends_with("502"), "for {begin:?} the asker gets {text:?}");
        ensure!(!text.contains("line 1\n") && !text.contains("lies"), "for {begin:?} the asker gets {text:?}");
    }
    Ok(())
}
