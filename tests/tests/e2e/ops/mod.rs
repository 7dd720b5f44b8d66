//! kubectl on an edge node: what an operator types must not tell it from any other node.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::pty::{OpenptyResult, Winsize, openpty};
use rand::{RngExt as _, SeedableRng as _};
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};
use skerry_tests::cloudcore::{get as get_plain, kubelet_address};
use skerry_tests::images::{BUSYBOX, SERVER};
use skerry_tests::kubectl::Kubectl;
use skerry_tests::manifests::{GRACE, container, sleeper};
use skerry_tests::pki::Authority;
use skerry_tests::ports;
use skerry_tests::process::{Piped, Process, under};
use skerry_tests::wait::{eventually, until};

use crate::world::{World, control, story};

mod cuts;
mod monitoring;
mod offline;
mod soak;
mod websocket;

type Verb = fn(&World, &Kubectl) -> Result<()>;

/// What kubectl speaks: WebSockets first, or only SPDY.
const DIALECTS: [&str; 2] = ["true", "false"];
const TRANSPORTS: [&str; 2] = ["websocket", "quic"];
/// One way, of a round trip of 50 ms.
const FAR: Duration = Duration::from_millis(25);

#[test]
fn kubectl_works_on_an_edge_node_over_quic() -> Result<()> {
    story("ops-quic", |world| every_verb(world, "quic"))
}

#[test]
fn kubectl_works_on_an_edge_node_over_websocket() -> Result<()> {
    story("ops-websocket", |world| every_verb(world, "websocket"))
}

fn every_verb(world: &mut World, transport: &str) -> Result<()> {
    world.carry_over(transport)?;
    start_pod(world)?;
    world.relay.set(|line| line.latency = FAR);
    let kubectl = world.kubectl.clone();

    crash_once(world)?;
    logs(&kubectl)?;
    for (again, dialect) in DIALECTS.into_iter().enumerate() {
        if again > 0 {
            kubectl.run(&["delete", "pod", "ops"])?;
            start_pod(world)?;
        }
        let kubectl = kubectl.websockets(dialect);
        let sessions: [(_, Verb); 6] = [
            ("exec", execs),
            ("port-forward", forwards),
            ("cp", copies),
            ("attach", attaches),
            ("exec -it", shells),
            ("debug", debugs),
        ];
        for (verb, works) in sessions {
            let begin = Instant::now();
            works(world, &kubectl).with_context(|| format!("{verb}, KUBECTL_…_WEBSOCKETS={dialect}"))?;
            eprintln!("{verb}, {dialect}: {:.1} s", begin.elapsed().as_secs_f64());
        }
    }
    pages(world)?;
    proxied(world, &nobody(world)?).context("through the apiserver's proxy")?;
    eventually("the log of a container before its crash", 60, || {
        let before = kubectl.output(&["logs", "crashed", "--previous"])?;
        Ok((before.success && before.stdout == "before the crash\n").then_some(()))
    })?;
    // Nothing of it is left on either side.
    until("the streams to be gone", 20, || Ok(world.cloud.metric("skerry_kubelet_streams")? == 0.0))
}

/// A pod with a talker, a box to run things in, an echo that reads its input, and a server.
fn start_pod(world: &World) -> Result<()> {
    let node = world.edge.name();
    let mut echo = container("echo", &["sh", "-c", "while read line; do echo \"heard $line\"; done"]);
    echo["stdin"] = true.into();
    let probe = json!({"httpGet": {"port": 8080, "path": "/healthz"}, "periodSeconds": 1});
    let server = json!({"name": "server", "image": SERVER, "imagePullPolicy": "IfNotPresent", "readinessProbe": probe});
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "ops", "labels": {"app": "ops"}},
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": GRACE, "automountServiceAccountToken": false,
            "containers": [
                container("box", &["sleep", "1000000"]),
                container("talker", &["sh", "-c", "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); echo line $i; done; echo last; exec sleep 1000000"]),
                echo, server,
            ],
        },
    });
    world.run_pods(&pod.to_string(), "app=ops", 1).map(drop)
}

/// A pod that sleeps and mounts a ConfigMap.
fn mounting(world: &World, name: &str, configmap: &str) -> Value {
    let mut pod = sleeper(name, world.edge.name(), false);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "mounted", "mountPath": "/mounted"}]);
    pod["spec"]["volumes"] = json!([{"name": "mounted", "configMap": {"name": configmap}}]);
    pod
}

/// A pod, `crashed`, whose container does so once.
fn crash_once(world: &World) -> Result<()> {
    let script = "[ -e /mark/crashed ] && exec sleep 1000000; touch /mark/crashed; echo before the crash; exit 1";
    let mut once = container("main", &["sh", "-c", script]);
    once["volumeMounts"] = json!([{"name": "mark", "mountPath": "/mark"}]);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "crashed"},
        "spec": {
            "nodeName": world.edge.name(), "terminationGracePeriodSeconds": GRACE, "automountServiceAccountToken": false,
            "containers": [once], "volumes": [{"name": "mark", "emptyDir": {}}],
        },
    });
    world.kubectl.create(&pod).map(drop)
}

fn logs(kubectl: &Kubectl) -> Result<()> {
    let read = |arguments: &[&str]| kubectl.run(&[&["logs", "ops", "-c", "talker"], arguments].concat());
    eventually("the talker to have said all", 20, || Ok(Some(read(&[])?).filter(|text| text.lines().count() == 1001)))?;
    ensure!(read(&["--tail=2"])? == "line 1000\nlast\n", "tail: {:?}", read(&["--tail=2"]));
    ensure!(read(&["--limit-bytes=10"])? == "line 1\nlin");
    let stamped = read(&["--tail=1", "--timestamps"])?;
    ensure!(stamped.ends_with(" last\n") && stamped.starts_with("20"), "{stamped:?}");
    ensure!(read(&["--since=1h"])?.lines().count() == 1001);
    let none = kubectl.output(&["logs", "ops", "-c", "talker", "--previous"])?;
    ensure!(!none.success && none.stderr.contains("previous terminated container"), "{}", none.stderr);
    let wrong = kubectl.output(&["logs", "ops", "-c", "nobody"])?;
    ensure!(!wrong.success, "logs of a container that is not there");
    Ok(())
}

fn execs(_: &World, kubectl: &Kubectl) -> Result<()> {
    let run = |arguments: &[&str], input: &[u8]| -> Result<Piped> {
        kubectl.pipe(&[&["exec", "-i", "ops", "-c", "box", "--"], arguments].concat(), input)
    };
    ensure!(run(&["true"], b"")?.code == Some(0));
    ensure!(run(&["sh", "-c", "exit 7"], b"")?.code == Some(7), "the exit code is lost");
    let both = run(&["sh", "-c", "echo out; echo err >&2"], b"")?;
    ensure!(both.output == b"out\n" && both.errors.starts_with("err\n"), "{both:?}");
    // The input ends, the output goes on. busybox's cat would end before it, for nothing can be sent from a pipe to /dev/null.
    let halves = run(&["sh", "-c", "wc -c; sleep 1; echo after the end"], b"some input")?;
    ensure!(halves.output == b"10\nafter the end\n", "{halves:?}");
    let sent = noise(4 << 20);
    let back = run(&["cat"], &sent)?;
    ensure!(
        back.code == Some(0) && digest(&SHA256, &back.output).as_ref() == digest(&SHA256, &sent).as_ref(),
        "{} of {} bytes came back, or other ones: {}",
        back.output.len(),
        sent.len(),
        back.errors
    );
    Ok(())
}

/// Bytes of every kind.
fn noise(length: usize) -> Vec<u8> {
    let mut noise = vec![0; length];
    rand::rngs::SmallRng::seed_from_u64(7).fill(&mut noise[..]);
    noise
}

fn forwards(_: &World, kubectl: &Kubectl) -> Result<()> {
    let port = ports::free()?;
    forward(kubectl.command().args(["port-forward", "pod/ops", &format!("{port}:8080")]), port)
}

/// Twenty connections at once through what this command forwards.
fn forward(command: &mut Command, port: u16) -> Result<()> {
    let mut forward = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let served = (|| {
        until("the port to be forwarded", 20, || Ok(TcpStream::connect(("127.0.0.1", port)).is_ok()))?;
        let url = format!("http://127.0.0.1:{port}/healthz");
        let clients: io::Result<Vec<_>> = (0..20)
            .map(|_| Command::new("curl").args(["-sf", "-m", "20", &url]).stdout(Stdio::null()).spawn())
            .collect();
        for (number, mut client) in clients?.into_iter().enumerate() {
            let status = client.wait()?;
            ensure!(status.success(), "connection {number} failed: {status}");
        }
        Ok(())
    })();
    forward.kill()?;
    forward.wait()?;
    served
}

fn copies(world: &World, kubectl: &Kubectl) -> Result<()> {
    let (there, back) = (world.dir().join("there"), world.dir().join("back"));
    fs::create_dir_all(there.join("deep/er"))?;
    fs::write(there.join("a"), b"one\0two")?;
    fs::write(there.join("deep/er/b"), vec![b'x'; 1 << 20])?;
    kubectl.run(&["cp", "-c", "box", there.to_str().context("a path")?, "ops:/tmp/tree"])?;
    kubectl.run(&["cp", "-c", "box", "ops:/tmp/tree", back.to_str().context("a path")?])?;
    let same = Command::new("diff").arg("-r").args([&there, &back]).output()?;
    ensure!(same.status.success(), "the tree changed on its way: {}", String::from_utf8_lossy(&same.stdout));
    fs::remove_dir_all(&there)?;
    fs::remove_dir_all(&back)?;
    // What comes next would go into it.
    kubectl.run(&["exec", "ops", "-c", "box", "--", "rm", "-r", "/tmp/tree"]).map(drop)
}

/// What goes in by attach comes out there, and in a log that is followed.
fn attaches(_: &World, kubectl: &Kubectl) -> Result<()> {
    let mut follow = kubectl.stream(&["logs", "-f", "ops", "-c", "echo"])?;
    let followed = (|| {
        attach(kubectl.command().args(["attach", "-i", "ops", "-c", "echo"]))?;
        let mut said = String::new();
        BufReader::new(follow.stdout.as_mut().context("no output")?).read_line(&mut said)?;
        ensure!(said == "heard hello\n", "the log that is followed says {said:?}");
        Ok(())
    })();
    follow.kill()?;
    follow.wait()?;
    followed
}

fn attach(command: &mut Command) -> Result<()> {
    let mut attached = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut input = attached.stdin.take().context("no input")?;
    input.write_all(b"hello\n")?;
    // The runtime lets go of the output as soon as the input ends.
    let mut heard = String::new();
    BufReader::new(attached.stdout.as_mut().context("no output")?).read_line(&mut heard)?;
    drop(input);
    attached.wait()?;
    ensure!(heard == "heard hello\n", "{heard:?}");
    Ok(())
}

fn shells(_: &World, kubectl: &Kubectl) -> Result<()> {
    let code = terminal(kubectl.command().args(["exec", "-it", "ops", "-c", "box", "--", "sh"]))?;
    ensure!(code == Some(5), "the shell's exit code came as {code:?}");
    Ok(())
}

/// A command at a terminal of its own, the other end of that, and its name: who resizes it sends the signal to its foreground.
fn at_a_terminal(command: &Command) -> Result<(Child, File, PathBuf)> {
    let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    let OpenptyResult { master, slave } = openpty(&size, None)?;
    let window = nix::unistd::ttyname(&slave)?;
    let mut command = under(&["setsid", "--ctty"], command);
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    Ok((command.spawn().context("no setsid")?, File::from(master), window))
}

/// A shell at a terminal, whose window becomes larger, and which ends with 5: what the command that has it ends with.
fn terminal(kubectl: &Command) -> Result<Option<i32>> {
    let (mut shell, master, window) = at_a_terminal(kubectl)?;
    let mut keys = master.try_clone()?;
    let (sender, screen) = sync_channel(1000);
    std::thread::spawn(move || {
        // The terminal is gone with its last user: that is an error here.
        for line in BufReader::new(master).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let mut write = |text: &str| keys.write_all(text.as_bytes());
    let type_until = |write: &mut dyn FnMut(&str) -> io::Result<()>, command: &str, wanted: &str| {
        let begin = Instant::now();
        let mut seen = Vec::new();
        loop {
            write(command)?;
            while let Ok(line) = screen.recv_timeout(Duration::from_secs(1)) {
                if line.trim() == wanted {
                    return Ok(());
                }
                seen.push(line);
            }
            ensure!(begin.elapsed() < Duration::from_secs(20), "no {wanted:?} on the terminal: {seen:?}");
        }
    };
    let seen = (|| {
        type_until(&mut write, "stty size\n", "24 80")?;
        let resized = Command::new("stty").arg("-F").arg(&window).args(["rows", "40", "columns", "132"]).status()?;
        ensure!(resized.success(), "the window does not become larger");
        type_until(&mut write, "stty size\n", "40 132")?;
        write("exit 5\n")?;
        let begin = Instant::now();
        while shell.try_wait()?.is_none() {
            ensure!(begin.elapsed() < Duration::from_secs(20), "the shell has ended, and kubectl goes on");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(shell.wait()?.code())
    })();
    shell.kill().ok();
    shell.wait()?;
    seen
}

/// Ephemeral containers in a pod that runs: one that does something by itself, and one at a terminal.
fn debugs(_: &World, kubectl: &Kubectl) -> Result<()> {
    let image = format!("--image={BUSYBOX}");
    let debug = ["debug", "ops", "--target=box", &image, "--image-pull-policy=IfNotPresent", "--profile=general"];
    let script = "echo it looks; exec sleep 1000000";
    kubectl.run(&[&debug[..], &["-c", "debugger", "--", "sh", "-c", script]].concat())?;
    eventually("the debugger to run", 30, || {
        let said = kubectl.output(&["logs", "ops", "-c", "debugger"])?;
        Ok((said.success && said.stdout == "it looks\n").then_some(()))
    })?;
    // It sees the processes of the container that it looks into.
    let seen = kubectl.run(&["exec", "ops", "-c", "debugger", "--", "pidof", "sleep"])?;
    ensure!(seen.split_whitespace().count() == 2, "the debugger sees {seen:?}");
    terminal(kubectl.command().args(debug).args(["-c", "shell", "-it", "--", "sh"])).map(drop)
}

/// What monitoring reads.
fn pages(world: &World) -> Result<()> {
    let page = |path: &str| world.page(&format!("/{path}"));
    ensure!(page("healthz")?.trim() == "ok");
    let resource = page("metrics/resource")?;
    ensure!(resource.contains("node_memory_working_set_bytes") && resource.contains("pod=\"ops\""), "{resource}");
    let summary: Value = serde_json::from_str(&page("stats/summary")?)?;
    ensure!(
        summary["node"]["nodeName"] == world.edge.name()
            && summary["pods"].as_array().is_some_and(|pods| !pods.is_empty())
    );
    let pods: Value = serde_json::from_str(&page("pods")?)?;
    ensure!(pods["items"].as_array().is_some_and(|pods| pods.iter().any(|pod| pod["metadata"]["name"] == "ops")));
    ensure!(
        page("metrics")?.contains("kubelet_running_pods")
            && page("metrics/cadvisor")?.contains("container_memory_working_set_bytes")
    );
    let running: Value = serde_json::from_str(&page("runningpods/")?)?;
    ensure!(running["items"].as_array().is_some_and(|pods| !pods.is_empty()), "{running}");
    let config: Value = serde_json::from_str(&page("configz")?)?;
    ensure!(config["kubeletconfig"].is_object(), "{config}");
    ensure!(page("metrics/probes")?.contains("prober_probe_total"), "no probe of the pod is counted");
    ensure!(page("logs/")?.contains("<a href="));
    let nothing = nothing(world)?;
    let post = |path: &str| world.straight(world.admin(), &["create", "--raw", path, "-f", &nothing]);
    let namespace = world.kubectl.namespace();
    let said = post(&format!("/run/{namespace}/ops/box?cmd=echo%20it%20ran"))?;
    ensure!(said.success && said.stdout == "it ran\n", "{}", said.text());
    let refused = post(&format!("/checkpoint/{namespace}/ops/box"))?;
    ensure!(!refused.success && refused.stderr.contains("cannot be checkpointed"), "{}", refused.text());
    Ok(())
}

/// An empty file, for what is posted without a body.
fn nothing(world: &World) -> Result<String> {
    let nothing = world.dir().join("nothing");
    fs::write(&nothing, "")?;
    Ok(nothing.to_str().context("a path")?.to_owned())
}

/// A kubectl of somebody without rights.
fn nobody(world: &World) -> Result<Kubectl> {
    Kubectl::new(&control()?.certificate_kubeconfig("nobody", "nobody", &[])?, world.dir())
}

#[test]
fn only_who_may_reaches_a_node() -> Result<()> {
    story("ops-access", |world| {
        start_pod(world)?;
        let url = format!("{}/pods", world.kubelet()?);
        let ask = |more: &[&str]| -> Result<String> {
            let answer = Command::new("curl")
                .args(["-sk", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}"])
                .args(more)
                .arg(&url)
                .output()?;
            Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
        };
        ensure!(ask(&[])? == "401", "without credentials: {}", ask(&[])?);
        ensure!(ask(&["-H", "Authorization: Bearer nonsense"])? == "401");
        let nobody = nobody(world)?;
        let straight = world.straight(&nobody, &["get", "--raw", "/pods"])?;
        ensure!(!straight.success && straight.stderr.contains("orbidden"), "{}", straight.stderr);
        let exec =
            nobody.in_namespace(world.kubectl.namespace()).output(&["exec", "ops", "-c", "box", "--", "true"])?;
        ensure!(!exec.success && exec.stderr.contains("orbidden"), "{}", exec.stderr);
        proxied(world, &nobody).context("through the apiserver's proxy")?;
        believes(world, &ask).context("once the cluster has another CA of clients")
    })
}

/// The apiserver passes on what is asked of a node, for who may.
fn proxied(world: &World, nobody: &Kubectl) -> Result<()> {
    if kubelet_address().is_loopback() {
        eprintln!("skipped: this machine has no address but loopback, which the apiserver does not proxy to");
        return Ok(());
    }
    let node = format!("/api/v1/nodes/{}", world.edge.name());
    let get = |path: &str| world.admin().run(&["get", "--raw", path]);
    ensure!(get(&format!("{node}:{}/proxy/healthz", world.port()?))?.trim() == "ok");
    ensure!(get(&format!("{node}/proxy/pods"))?.contains("\"ops\""), "the pod is not among the node's");
    let log = format!("{node}/proxy/containerLogs/{}/ops/talker?tailLines=1", world.kubectl.namespace());
    ensure!(get(&log)? == "last\n", "the log's end: {:?}", get(&log)?);
    let refused = nobody.output(&["get", "--raw", &format!("{node}/proxy/pods")])?;
    ensure!(!refused.success && refused.stderr.contains("orbidden"), "{}", refused.text());

    let port = ports::free()?;
    let mut command = world.admin().command();
    command.arg("proxy").arg(format!("--port={port}"));
    let proxy = Process::spawn("kubectl proxy", &mut command, &world.dir().join("proxy.log"))?;
    until("kubectl proxy to listen", 20, || Ok(TcpStream::connect(("127.0.0.1", port)).is_ok()))?;
    let (status, summary) = get_plain(([127, 0, 0, 1], port).into(), &format!("{node}/proxy/stats/summary"))?;
    ensure!(status == 200 && summary.contains(world.edge.name()), "{status}: {summary}");
    proxy.kill();
    Ok(())
}

/// Whoever signs the cluster's clients is read anew when it changes.
fn believes(world: &World, ask: &dyn Fn(&[&str]) -> Result<String>) -> Result<()> {
    if !control()?.is_ours() {
        eprintln!("skipped: whom the cluster of $KUBECONFIG believes is not ours to say");
        return Ok(());
    }
    let stranger = Authority::new(world.dir(), "stranger-ca")?;
    let pair = stranger.client(world.dir(), "stranger", "stranger", &["system:masters"])?;
    let files = [&pair.certificate, &pair.key].map(|path| path.display().to_string());
    let ask = || ask(&["--cert", &files[0], "--key", &files[1]]);
    ensure!(ask()? == "401", "a stranger is let in: {}", ask()?);
    let system = world.admin().in_namespace("kube-system");
    let known = system.get("configmap", "extension-apiserver-authentication")?["data"]["client-ca-file"].clone();
    let believe = |pem: &str| {
        system.patch("configmap", "extension-apiserver-authentication", &json!({"data": {"client-ca-file": pem}}))
    };
    let known = known.as_str().context("the cluster publishes no CA of clients")?;
    believe(&format!("{known}{}", fs::read_to_string(&stranger.certificate)?))?;
    let believed = until("the stranger to be let in", 60, || Ok(ask()? == "200"));
    believe(known)?;
    believed?;
    until("the stranger to be kept out again", 60, || Ok(ask()? == "401"))
}
