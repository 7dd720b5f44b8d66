//! Many nodes on one cloudcore: what a node costs it, how long everybody takes, and what the apiserver is asked meanwhile.
//!
//! etcd, the apiserver and cloudcore are the real ones; the nodes are a swarm (see [`skerry_tests::swarm`]). The controller-manager and the
//! scheduler are ended once the cluster stands: they would watch every write too, and their work is not what is measured.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use skerry_tests::cloudcore::Cloudcore;
use skerry_tests::controlplane::ControlPlane;
use skerry_tests::swarm::{Command, Options, Status, Swarm, Transport};
use skerry_tests::{paths, procfs};

use crate::figures::{rss, tell, tell_unpromised};

/// How long the swarm has dialled in vain before cloudcore starts.
const HEADSTART: Duration = Duration::from_secs(20);
/// How long requests are counted while nothing happens.
const IDLE: Duration = Duration::from_secs(30);
/// What any phase may take at most.
const PATIENCE: Duration = Duration::from_secs(600);
/// Writes that are not on account of what is delivered.
const APART: [&str; 4] = ["leases", "pods/status", "nodes/status", "events"];

const CLOUD: &str = "cloudcore";
/// Of so many nodes figures are promised.
const PROMISED: usize = 10_000;

/// Requests to the apiserver so far, by verb and resource.
type Requests = BTreeMap<(String, String), f64>;

pub(crate) fn run(dir: &Path, nodes: usize, transport: Transport) -> Result<()> {
    eprintln!("starting a control plane");
    let mut control = ControlPlane::start(&dir.join("control"))?;
    control.stop_controllers()?;
    let mut cloud = Cloudcore::start(&control, &dir.join("cloudcore"), None)?;
    // What a cloudcore without nodes weighs.
    sleep(Duration::from_secs(5));
    let base = rss(cloud.pid().context("cloudcore does not run")?)?;
    let options =
        Options { nodes, cloud: cloud.address(), transport, kubeconfig: control.admin_kubeconfig().to_owned() };
    let mut swarm = Swarm::start(&paths::product("swarm")?, &dir.join("swarm"), &options)?;
    let token = cloud.new_token(&["--ttl", "2h"])?.token;
    eprintln!("{nodes} nodes join");
    let seconds = swarm.run(&Command::Join { token })?;
    eprintln!("joined in {seconds:.1} s; creating their pods, ConfigMaps and Secrets");
    let seconds = swarm.run(&Command::Populate)?;
    eprintln!("created in {seconds:.1} s");
    cloud.kill();

    let mut scale = Scale { control, cloud, swarm, nodes, transport, base, writes: 0.0, delivered: 0.0 };
    scale.sync()?;
    scale.idle()?;
    scale.change()?;
    scale.reconnect()?;
    scale.figure("cloud.api.writes", CLOUD, scale.writes / scale.delivered, "1");
    scale.writes = 0.0;
    scale.restart()?;
    scale.figure("cloud.restart.writes", CLOUD, scale.writes / scale.delivered, "1");
    Ok(())
}

struct Scale {
    control: ControlPlane,
    cloud: Cloudcore,
    swarm: Swarm,
    nodes: usize,
    transport: Transport,
    /// Memory of a cloudcore that serves nobody, in MB.
    base: f64,
    writes: f64,
    delivered: f64,
}

/// Where a phase began.
struct Mark {
    time: Instant,
    requests: Requests,
    processors: Vec<(&'static str, f64)>,
}

impl Scale {
    /// From the start of a cloudcore that knows nothing, with everybody dialling and nobody holding anything.
    fn sync(&mut self) -> Result<()> {
        eprintln!("the swarm dials for {} s before cloudcore starts", HEADSTART.as_secs());
        self.swarm.run(&Command::Dial)?;
        sleep(HEADSTART);
        self.cloud.spawn()?;
        let mark = self.mark()?;
        self.wait("in sync", &mark, |status, nodes| status.in_sync == nodes)?;
        self.tell("sync", &mark)?;
        self.delivered += count(self.swarm.status()?.applied);
        self.settle("sync")
    }

    fn idle(&mut self) -> Result<()> {
        eprintln!("idle for {} s", IDLE.as_secs());
        let mark = self.mark()?;
        sleep(IDLE);
        self.tell("idle", &mark)?;
        let rss = rss(self.pid()?)?;
        self.figure("cloud.rss.nodes", CLOUD, rss, "MB");
        self.figure("cloud.rss.pernode", CLOUD, 1e6 / 1024.0 * (rss - self.base) / count(self.nodes as u64), "KB");
        let standing = self.swarm.status()?.established;
        ensure!(standing == self.nodes, "only {standing} sessions stood through the idle time");
        Ok(())
    }

    /// The ConfigMap that all refer to changes.
    fn change(&mut self) -> Result<()> {
        eprintln!("the shared ConfigMap changes");
        let (mark, before) = (self.mark()?, self.swarm.status()?);
        self.swarm.run(&Command::Touch)?;
        self.wait("the new ConfigMap", &mark, |now, nodes| now.version != before.version && now.newest == nodes)?;
        self.tell("configmap", &mark)?;
        self.delivered += count(self.swarm.status()?.applied - before.applied);
        Ok(())
    }

    /// Every connection is reset at once.
    fn reconnect(&mut self) -> Result<()> {
        eprintln!("every session is dropped");
        let mark = self.mark()?;
        self.swarm.run(&Command::Drop)?;
        self.wait("in sync again", &mark, |status, nodes| status.in_sync == nodes)?;
        self.tell("reconnect", &mark)?;
        self.settle("reconnect")
    }

    /// cloudcore is killed and starts again; the nodes hold what they held.
    fn restart(&mut self) -> Result<()> {
        eprintln!("cloudcore is killed and started");
        let killed = Instant::now();
        self.cloud.kill();
        self.cloud.spawn()?;
        let mark = self.mark()?;
        // Over QUIC nodes hear nothing of the end of their sessions: those do not count.
        let is_new = |status: &Status| status.oldest < killed.elapsed().as_secs_f64();
        self.wait("in sync with the new one", &mark, |status, nodes| status.in_sync == nodes && is_new(status))?;
        self.tell("restart", &mark)?;
        self.wait("heard by the new one", &mark, |status, nodes| status.reported == nodes && is_new(status))?;
        self.figure(&format!("cloud.restart.reports.{}.s", self.size()), CLOUD, mark.time.elapsed().as_secs_f64(), "s");
        Ok(())
    }

    /// Waits until statuses and first leases have been written.
    fn settle(&mut self, phase: &str) -> Result<()> {
        let begin = Instant::now();
        let mut quiet = Instant::now();
        let mut last = 0.0;
        while quiet.elapsed() < Duration::from_secs(3) {
            sleep(Duration::from_millis(250));
            let now = self.requests()?;
            let statuses: f64 =
                now.iter().filter(|((_, resource), _)| resource.ends_with("/status")).map(|(_, count)| count).sum();
            if statuses > last {
                (last, quiet) = (statuses, Instant::now());
            }
            ensure!(begin.elapsed() < PATIENCE, "statuses are still being written");
        }
        let seconds = (begin.elapsed() - quiet.elapsed()).as_secs_f64();
        eprintln!("{phase}: the last status was written {seconds:.1} s later; {last} statuses written so far");
        Ok(())
    }

    fn wait(&mut self, what: &str, mark: &Mark, reached: impl Fn(&Status, usize) -> bool) -> Result<()> {
        let mut told = Instant::now();
        loop {
            let status = self.swarm.status()?;
            let passed = mark.time.elapsed();
            if reached(&status, self.nodes) {
                eprintln!("{what} after {:.2} s; troubles so far: {:?}", passed.as_secs_f64(), status.troubles);
                return Ok(());
            }
            ensure!(passed < PATIENCE, "not {what} after {} s: {status:?}", PATIENCE.as_secs());
            if told.elapsed() > Duration::from_secs(5) {
                told = Instant::now();
                let (established, in_sync, megabytes) = (status.established, status.in_sync, rss(self.pid()?)?);
                eprintln!(
                    "{} s: {established} established, {in_sync} in sync; cloudcore {megabytes:.0} MB",
                    passed.as_secs()
                );
            }
            sleep(Duration::from_millis(50));
        }
    }

    fn mark(&self) -> Result<Mark> {
        Ok(Mark { time: Instant::now(), requests: self.requests()?, processors: self.processors() })
    }

    /// Tells how long a phase took, what it cost and what it asked of the apiserver, and adds up the writes that deliveries are to blame for.
    fn tell(&mut self, phase: &str, mark: &Mark) -> Result<()> {
        let seconds = mark.time.elapsed().as_secs_f64();
        if phase != "idle" {
            self.figure(&format!("cloud.{phase}.{}.s", self.size()), CLOUD, seconds, "s");
        }
        for ((name, used), (_, before)) in self.processors().iter().zip(&mark.processors) {
            self.figure(&format!("cloud.cpu.{phase}"), name, used - before, "s");
        }
        for (key, count) in self.requests()? {
            let more = count - mark.requests.get(&key).unwrap_or(&0.0);
            if more > 0.0 {
                let (verb, resource) = key;
                self.figure(&format!("cloud.api.{phase}.{verb}.{resource}"), CLOUD, more / seconds, "1/s");
                let is_read = matches!(verb.as_str(), "get" | "list" | "watch");
                self.writes += if is_read || APART.contains(&resource.as_str()) { 0.0 } else { more };
            }
        }
        Ok(())
    }

    /// Tells a figure. Its subject says so where sessions are not WebSockets.
    fn figure(&self, figure: &str, subject: &str, value: f64, unit: &str) {
        let subject = match self.transport {
            Transport::WebSocket => subject.to_owned(),
            Transport::Quic => format!("{subject}/quic"),
        };
        // Of fewer nodes each has a larger share in what there is once.
        let tell = if self.nodes == PROMISED { tell } else { tell_unpromised };
        tell(figure, &subject, value, unit);
    }

    fn size(&self) -> String {
        if self.nodes == PROMISED { "10k".to_owned() } else { self.nodes.to_string() }
    }

    fn requests(&self) -> Result<Requests> {
        let mut requests = Requests::new();
        // One that has just been started has asked for nothing.
        let Ok((_, text)) = self.cloud.admin("/metrics") else { return Ok(requests) };
        for line in text.lines().filter_map(|line| line.strip_prefix("skerry_apiserver_requests_total{")) {
            let (labels, count) = line.split_once("} ").context("a metric without a value")?;
            let label = |name: &str| {
                let found = labels.split(',').find_map(|label| label.strip_prefix(name)?.strip_prefix("=\""));
                found.map(|value| value.trim_end_matches('"').to_owned()).unwrap_or_default()
            };
            *requests.entry((label("verb"), label("resource"))).or_default() += count.parse::<f64>()?;
        }
        Ok(requests)
    }

    /// Processor seconds of everybody who takes part.
    fn processors(&self) -> Vec<(&'static str, f64)> {
        let (apiserver, etcd) = self.control.pids().unwrap_or_default();
        let all = [
            (CLOUD, self.cloud.pid().unwrap_or_default()),
            ("kube-apiserver", apiserver),
            ("etcd", etcd),
            ("swarm", self.swarm.pid().unwrap_or_default()),
        ];
        all.map(|(name, pid)| (name, procfs::cpu_seconds(pid).unwrap_or_default())).into()
    }

    fn pid(&self) -> Result<i32> {
        self.cloud.pid().context("cloudcore does not run")
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn count(number: u64) -> f64 {
    number as f64
}
