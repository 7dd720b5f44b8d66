//! What kubectl and monitoring see of a node: the same client asks edgecore, through cloudcore and over loopback, and the upstream kubelet.
//!
//! Times are a client's, from its start to its end, so both subjects' have kubectl's own start in them.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use skerry_tests::kubectl::{is_ready, kubelet_port};
use skerry_tests::manifests::{GRACE, container};
use skerry_tests::pki::Pair;

use crate::agents::Bench;
use crate::figures::{megabytes, rss, tell};

/// How often `kubectl exec … true` is timed, and how often the pages are read.
const ROUNDS: usize = 20;
/// How often a throughput is taken.
const RUNS: usize = 5;
/// What goes through for a throughput, in bytes.
const BYTES: usize = 256 << 20;
const SESSIONS: usize = 50;
/// How often a log may be rotated under a reading.
const ROTATIONS: usize = 3;
const SETTLE: Duration = Duration::from_secs(5);
const REST: Duration = Duration::from_secs(25);
/// How far scrapes are apart that find nothing known: edgecore keeps what the runtime says of its storage for 10 s.
const APART: Duration = Duration::from_secs(11);
/// A line of a log as the runtime writes it.
const STAMP: &str = "2026-01-02T15:04:05.123456789Z stdout F ";
const WORDS: usize = 100;

pub(crate) fn measure(bench: &Bench, scraper: &Pair) -> Result<()> {
    let pod = start_pod(bench)?;
    eprintln!("{}: kubectl exec, {ROUNDS} times", bench.name);
    bench.say("ops.exec.s", median(ROUNDS, || time(bench, &["exec", "ops", "-c", "box", "--", "true"], 0))?, "s");
    sessions(bench)?;
    eprintln!("{}: {BYTES} bytes of a log, {RUNS} times", bench.name);
    let uid = pod["metadata"]["uid"].as_str().context("a pod without a UID")?;
    let log = bench.agent.logs_dir().join(format!("default_ops_{uid}/talker/0.log"));
    let line = [STAMP, &"x".repeat(WORDS - 1), "\n"].concat();
    let text = line.repeat(BYTES / WORDS).into_bytes();
    let read = BYTES / WORDS * WORDS;
    let seconds = median(RUNS, || {
        // edgecore looks every ten seconds whether a log is large enough to be rotated: a reading that met it is not one.
        for _ in 0..ROTATIONS {
            let mut file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
            file.write_all(&text)?;
            let inode = file.metadata()?.ino();
            let taken = time(bench, &["logs", "ops", "-c", "talker"], read);
            if taken.is_ok() || fs::metadata(&log)?.ino() == inode {
                return taken;
            }
        }
        bail!("the log was rotated {ROTATIONS} times while it was read")
    })?;
    bench.say("ops.logs.MBps", megabytes(read as u64) / seconds, "MB/s");
    fs::write(&log, "")?;
    drop(text);
    eprintln!("{}: {BYTES} bytes out of a container, and into it, {RUNS} times", bench.name);
    let count = BYTES.to_string();
    let out = ["exec", "ops", "-c", "box", "--", "head", "-c", &count, "/dev/zero"];
    bench.say("ops.exec.MBps", megabytes(BYTES as u64) / median(RUNS, || time(bench, &out, BYTES))?, "MB/s");
    bench.say("ops.exec.in.MBps", megabytes(BYTES as u64) / median(RUNS, || time_in(bench))?, "MB/s");
    scrapes(bench, scraper)
}

fn start_pod(bench: &Bench) -> Result<Value> {
    let sleeper = |name| container(name, &["sleep", "1000000"]);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "ops", "labels": {"app": "ops"}},
        "spec": {
            "nodeName": bench.name, "terminationGracePeriodSeconds": GRACE, "automountServiceAccountToken": false,
            "containers": [sleeper("box"), sleeper("talker")],
        },
    });
    bench.kubectl.apply(&pod.to_string())?;
    bench.kubectl.wait("pod", "ops", "Ready", 60, is_ready)
}

/// What 50 sessions add that stand and do nothing.
fn sessions(bench: &Bench) -> Result<()> {
    eprintln!("{}: {SESSIONS} sessions at once", bench.name);
    let pids = [(bench.name, Some(bench.agent.pid()?)), ("cloudcore", bench.agent.cloud_pid())];
    let pids = pids.into_iter().filter_map(|(name, pid)| Some((name, pid?)));
    // Behind what edgecore gives back after its pods came: that would hide what sessions add.
    sleep(REST);
    let before = pids.map(|(name, pid)| Ok((name, pid, rss(pid)?))).collect::<Result<Vec<_>>>()?;
    let mut open = Vec::new();
    for _ in 0..SESSIONS {
        let mut command = bench.kubectl.command();
        command.args(["exec", "-i", "ops", "-c", "box", "--", "cat"]);
        open.push(Guard(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?));
    }
    for Guard(session) in &mut open {
        session.stdin.as_mut().context("no input")?.write_all(b"there\n")?;
        let mut back = String::new();
        BufReader::new(session.stdout.as_mut().context("no output")?).read_line(&mut back)?;
        ensure!(back == "there\n", "a session did not begin: {back:?}");
    }
    sleep(SETTLE);
    for (name, pid, before) in before {
        tell("ops.rss.50exec", name, rss(pid)? - before, "MB");
    }
    for mut session in open {
        drop(session.0.stdin.take());
        ensure!(session.0.wait()?.success(), "a session ended badly");
    }
    Ok(())
}

/// The seconds that kubectl takes, which must print so many bytes.
fn time(bench: &Bench, arguments: &[&str], bytes: usize) -> Result<f64> {
    let begin = Instant::now();
    let mut client = Guard(bench.kubectl.command().args(arguments).stdout(Stdio::piped()).spawn()?);
    let mut output = client.0.stdout.take().context("no output")?;
    let (mut buffer, mut read) = (vec![0; 1 << 20], 0);
    loop {
        match output.read(&mut buffer)? {
            0 => break,
            count => read += count,
        }
    }
    ensure!(client.0.wait()?.success(), "kubectl {} failed", arguments.join(" "));
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(read == bytes, "kubectl {} printed {read} bytes, not {bytes}", arguments.join(" "));
    Ok(seconds)
}

/// The seconds until a container has counted all that kubectl was given.
fn time_in(bench: &Bench) -> Result<f64> {
    let begin = Instant::now();
    let mut command = bench.kubectl.command();
    command.args(["exec", "-i", "ops", "-c", "box", "--", "wc", "-c"]);
    let mut client = Guard(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
    let mut input = client.0.stdin.take().context("no input")?;
    let piece = vec![0; 1 << 20];
    for _ in 0..BYTES / piece.len() {
        input.write_all(&piece)?;
    }
    drop(input);
    let mut counted = String::new();
    client.0.stdout.take().context("no output")?.read_to_string(&mut counted)?;
    ensure!(client.0.wait()?.success(), "the input was not taken");
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(counted.trim() == BYTES.to_string(), "{counted:?} bytes came, not {BYTES}");
    Ok(seconds)
}

/// What metrics-server and Prometheus wait for, with as many pods as the other figures have.
fn scrapes(bench: &Bench, scraper: &Pair) -> Result<()> {
    bench.kubectl.delete("pod", "ops")?;
    bench.kubectl.wait_gone("pod", "ops", 60)?;
    eprintln!("{}: its pages, {ROUNDS} times", bench.name);
    bench.apply_many()?;
    sleep(SETTLE);
    let node = bench.kubectl.get("node", bench.name)?;
    let port = kubelet_port(&node).context("no port")?;
    let addresses = node["status"]["addresses"].as_array().context("no addresses")?;
    let internal = addresses.iter().find(|address| address["type"] == "InternalIP").context("no internal address")?;
    let host = internal["address"].as_str().context("no internal address")?;
    let page = |path: &str| -> Result<f64> {
        let mut command = Command::new("curl");
        command
            .args(["-sfk", "-o", "/dev/null", "-w", "%{time_total}", "-m", "30", "--cert"])
            .arg(&scraper.certificate);
        let answer = command.arg("--key").arg(&scraper.key).arg(format!("https://{host}:{port}{path}")).output()?;
        ensure!(answer.status.success(), "{path}: {answer:?}");
        Ok(String::from_utf8_lossy(&answer.stdout).parse()?)
    };
    let both = || Ok(page("/metrics/resource")? + page("/stats/summary")?);
    // Who scrapes does so again and again.
    both()?;
    bench.say("ops.metrics.s", median(ROUNDS, both)?, "s");
    eprintln!("{}: scrapes that are {} s apart", bench.name, APART.as_secs());
    let apart = || {
        sleep(APART);
        both()
    };
    bench.say("ops.metrics.apart.s", median(5, apart)?, "s");
    Ok(())
}

/// The median of so many.
fn median(rounds: usize, mut take: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut all = (0..rounds).map(|_| take()).collect::<Result<Vec<_>>>()?;
    all.sort_by(f64::total_cmp);
    Ok(all[rounds / 2])
}

/// A client that does not outlive what is measured.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
