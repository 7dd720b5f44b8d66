//! One agent, ours or the upstream kubelet, on a runtime of its own: what it weighs, and how fast its pods are.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, sleep};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skerry_tests::cloudcore::Cloudcore;
use skerry_tests::controlplane::ControlPlane;
use skerry_tests::edge::Edge;
use skerry_tests::kubectl::{Kubectl, is_ready};
use skerry_tests::kubelet::Kubelet;
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::relay::Relay;
use skerry_tests::runtime::{Cni, Runtime};
use skerry_tests::wait::until;
use skerry_tests::{paths, procfs};

use crate::Subject;
use crate::figures::{megabytes, rss, tell};

/// How many pods the figures with many pods use.
const MANY: usize = 11;
/// How often a timing is taken; its median is told.
const ROUNDS: usize = 5;
/// What memory is given to settle.
const SETTLE: Duration = Duration::from_secs(20);
/// How long an agent is idle until what it does each minute has been done twice.
const IDLE: Duration = Duration::from_secs(150);
/// How long processor time is counted.
const WINDOW: Duration = Duration::from_secs(60);

/// One agent on a runtime of its own.
pub(crate) struct Bench {
    pub(crate) name: &'static str,
    pub(crate) agent: Agent,
    runtime: Runtime,
    pub(crate) kubectl: Kubectl,
}

pub(crate) enum Agent {
    Edgecore { edge: Box<Edge>, cloud: Box<Cloudcore>, relay: Relay },
    Kubelet(Kubelet),
}

impl Bench {
    /// `straight`: edgecore dials cloudcore and not the relay, which is no part of what is measured then.
    pub(crate) fn start(control: &ControlPlane, dir: &Path, subject: Subject, straight: bool) -> Result<Self> {
        let name = match subject {
            Subject::Edgecore => "edgecore",
            Subject::Kubelet => "kubelet",
        };
        eprintln!("{name}: starting it on a runtime of its own");
        let runtime = Runtime::start(&dir.join(format!("{name}-runtime")), Cni::Ours)?;
        let dir = dir.join(name);
        let mut agent = match subject {
            Subject::Edgecore => {
                let cloud = Cloudcore::start(control, &dir.join("cloudcore"), None)?;
                let relay = Relay::start(cloud.address())?;
                let edge = Edge::new(&dir.join("edge"), name, &runtime)?;
                let address = if straight { cloud.address() } else { relay.address() };
                edge.join(&address.to_string(), &cloud.new_token(&[])?.token)?;
                Agent::Edgecore { edge: Box::new(edge), cloud: Box::new(cloud), relay }
            }
            Subject::Kubelet => Agent::Kubelet(Kubelet::new(control, &runtime, &dir, name)?),
        };
        agent.start()?;
        let kubectl = control.kubectl().clone();
        kubectl.wait("node", name, "Ready", 60, is_ready)?;
        Ok(Self { name, agent, runtime, kubectl })
    }

    pub(crate) fn weight(&mut self) -> Result<()> {
        self.say("agent.binary", megabytes(fs::metadata(self.agent.binary()?)?.len()), "MB");
        if let Agent::Edgecore { .. } = &self.agent {
            tell("cloud.binary", "cloudcore", megabytes(fs::metadata(paths::product("cloudcore")?)?.len()), "MB");
        }
        eprintln!("{}: idle for {} s", self.name, IDLE.as_secs());
        sleep(SETTLE);
        let soon = rss(self.agent.pid()?)?;
        sleep(IDLE - SETTLE);
        self.say("agent.rss.idle", rss(self.agent.pid()?)?.max(soon), "MB");
        if let Agent::Edgecore { cloud, .. } = &self.agent {
            tell("cloud.rss.idle", "cloudcore", rss(cloud.pid().context("cloudcore does not run")?)?, "MB");
        }
        eprintln!("{}: {MANY} pods, {} s to settle, {} s of counting", self.name, SETTLE.as_secs(), WINDOW.as_secs());
        self.apply_many()?;
        sleep(SETTLE);
        self.say("agent.rss.11pods", rss(self.agent.pid()?)?, "MB");
        let pid = self.agent.pid()?;
        let before = procfs::cpu_seconds(pid).context("no processor time")?;
        let begin = Instant::now();
        sleep(WINDOW);
        let used = procfs::cpu_seconds(pid).context("no processor time")? - before;
        self.say("agent.cpu.11pods", 100.0 * used / begin.elapsed().as_secs_f64(), "%");
        self.remove_pods()
    }

    pub(crate) fn pods(&mut self) -> Result<()> {
        for (figure, count) in [("pods.ready.1", 1), ("pods.ready.10", 10)] {
            let mut times = Vec::new();
            for round in 1..=ROUNDS {
                eprintln!("{}: {count} pods, round {round} of {ROUNDS}", self.name);
                times.push(self.time_to_ready(count)?);
                self.remove_pods()?;
            }
            times.sort_by(f64::total_cmp);
            self.say(figure, times[times.len() / 2], "s");
        }
        // The kubelet cannot do it without its apiserver, so it is measured with one.
        let subject = match &self.agent {
            Agent::Edgecore { .. } => "edgecore",
            Agent::Kubelet(_) => "kubelet-online",
        };
        power_cycles(subject, || {
            let times = self.power_cycle()?;
            self.remove_pods()?;
            Ok(times)
        })?;
        if matches!(self.agent, Agent::Edgecore { .. }) {
            self.agent.kill();
            power_cycles("containerd", || self.runtime_alone())?;
            self.agent.start()?;
        }
        Ok(())
    }

    /// From the call of kubectl apply to the moment a watch says that all are Ready.
    fn time_to_ready(&self, count: usize) -> Result<f64> {
        let pods: Vec<Value> = (0..count).map(|number| sleeper(&format!("pod-{number}"), self.name, true)).collect();
        let manifest = list(&pods);
        let watch = Watch::start(&self.kubectl)?;
        let begin = Instant::now();
        self.kubectl.apply(&manifest)?;
        let end = watch.all_ready(count)?;
        Ok((end - begin).as_secs_f64())
    }

    /// From the agent's start to the start of the first and of the last container, by the runtime's clock.
    fn power_cycle(&mut self) -> Result<(f64, f64)> {
        self.apply_many()?;
        if let Agent::Edgecore { relay, .. } = &self.agent {
            relay.cut();
        }
        self.agent.kill();
        let pods_dir = self.agent.pods_dir();
        self.runtime.power_cycle(&[&pods_dir])?;
        let start = SystemTime::now().duration_since(UNIX_EPOCH)?;
        self.agent.start()?;
        until("all pods to run again", 60, || Ok(self.runtime.cri().running()?.len() == MANY))?;
        let times = self.started_after(start)?;
        if let Agent::Edgecore { relay, .. } = &self.agent {
            relay.heal();
        }
        self.kubectl.wait("node", self.name, "Ready", 90, is_ready)?;
        Ok(times)
    }

    /// The same for as many pods without volumes, probes, statuses or an agent: what of a power cycle is the runtime's.
    fn runtime_alone(&mut self) -> Result<(f64, f64)> {
        let pods_dir = self.agent.pods_dir();
        self.runtime.power_cycle(&[&pods_dir])?;
        let start = SystemTime::now().duration_since(UNIX_EPOCH)?;
        // As many sandboxes at a time as edgecore makes.
        self.runtime.cri().run_bare(MANY, thread::available_parallelism()?.get() + 1)?;
        let times = self.started_after(start)?;
        self.runtime.cri().remove_all()?;
        Ok(times)
    }

    /// The first and the last start of a container, by the runtime's clock.
    fn started_after(&self, begin: Duration) -> Result<(f64, f64)> {
        let mut times = Vec::new();
        for (.., id) in self.runtime.cri().running()? {
            let started = Duration::from_nanos(u64::try_from(self.runtime.cri().status(&id)?.started_at)?);
            times.push(started.saturating_sub(begin).as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        ensure!(times.len() == MANY, "{} containers run, not {MANY}", times.len());
        Ok((times[0], times[MANY - 1]))
    }

    pub(crate) fn apply_many(&self) -> Result<()> {
        let pods: Vec<Value> = (0..MANY).map(|number| sleeper(&format!("pod-{number}"), self.name, true)).collect();
        self.kubectl.apply(&list(&pods))?;
        until("the pods to be ready", 90, || {
            Ok(self.kubectl.list("pods", "app=sleeper")?.iter().filter(|pod| is_ready(pod)).count() == MANY)
        })
    }

    fn remove_pods(&self) -> Result<()> {
        self.kubectl.run(&["delete", "pods", "-l", "app=sleeper", "--wait=false"])?;
        until("the pods to be gone", 90, || Ok(self.kubectl.list("pods", "app=sleeper")?.is_empty()))?;
        until("their containers to be gone", 90, || Ok(self.runtime.cri().running()?.is_empty()))
    }

    pub(crate) fn say(&self, figure: &str, value: f64, unit: &str) {
        tell(figure, self.name, value, unit);
    }
}

/// The medians of three power cycles: to the first container and to all.
fn power_cycles(subject: &str, mut cycle: impl FnMut() -> Result<(f64, f64)>) -> Result<()> {
    let (mut firsts, mut alls) = (Vec::new(), Vec::new());
    for round in 1..=3 {
        eprintln!("{subject}: power cycle with {MANY} pods, round {round} of 3");
        let (first, all) = cycle()?;
        firsts.push(first);
        alls.push(all);
    }
    firsts.sort_by(f64::total_cmp);
    alls.sort_by(f64::total_cmp);
    tell("pods.powercycle.first", subject, firsts[1], "s");
    tell("pods.powercycle.all", subject, alls[1], "s");
    Ok(())
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.agent.kill();
        self.kubectl.delete("node", self.name).ok();
        self.kubectl.run(&["delete", "pods", "--all", "--force", "--grace-period=0", "--wait=false"]).ok();
    }
}

impl Agent {
    fn start(&mut self) -> Result<()> {
        match self {
            Self::Edgecore { edge, .. } => edge.start(),
            Self::Kubelet(kubelet) => kubelet.start(),
        }
    }

    fn kill(&mut self) {
        match self {
            Self::Edgecore { edge, .. } => edge.kill(),
            Self::Kubelet(kubelet) => kubelet.kill(),
        }
    }

    pub(crate) fn pid(&self) -> Result<i32> {
        match self {
            Self::Edgecore { edge, .. } => edge.pid(),
            Self::Kubelet(kubelet) => kubelet.pid(),
        }
        .context("the agent does not run")
    }

    pub(crate) fn logs_dir(&self) -> PathBuf {
        match self {
            Self::Edgecore { edge, .. } => edge.logs(),
            Self::Kubelet(kubelet) => kubelet.logs(),
        }
    }

    /// cloudcore's process, where there is one.
    pub(crate) fn cloud_pid(&self) -> Option<i32> {
        match self {
            Self::Edgecore { cloud, .. } => cloud.pid(),
            Self::Kubelet(_) => None,
        }
    }

    fn pods_dir(&self) -> PathBuf {
        match self {
            Self::Edgecore { edge, .. } => edge.pods(),
            Self::Kubelet(kubelet) => kubelet.root(),
        }
    }

    fn binary(&self) -> Result<PathBuf> {
        match self {
            Self::Edgecore { .. } => paths::product("edgecore"),
            Self::Kubelet(_) => paths::cached_binary("kubelet"),
        }
    }
}

/// A watch of the test pods whose events carry the time at which they were seen.
struct Watch {
    child: Child,
    events: Receiver<(Instant, String)>,
}

impl Watch {
    fn start(kubectl: &Kubectl) -> Result<Self> {
        let path = r#"jsonpath={.metadata.name} {.status.conditions[?(@.type=="Ready")].status}{"\n"}"#;
        let mut child = kubectl.stream(&["get", "pods", "-l", "app=sleeper", "--watch-only", "-o", path])?;
        let output = child.stdout.take().context("the watch has no output")?;
        let (sender, events) = sync_channel(10_000);
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send((Instant::now(), line)).is_err() {
                    return;
                }
            }
        });
        // kubectl does not say when its watch stands.
        sleep(Duration::from_secs(2));
        Ok(Self { child, events })
    }

    fn all_ready(mut self, count: usize) -> Result<Instant> {
        let mut ready = BTreeSet::new();
        let last = loop {
            let (seen, line) = self
                .events
                .recv_timeout(Duration::from_secs(120))
                .context("no more news of the pods for two minutes")?;
            if let Some(name) = line.strip_suffix(" True") {
                ready.insert(name.to_owned());
            }
            if ready.len() == count {
                break seen;
            }
        };
        self.child.kill()?;
        self.child.wait()?;
        ensure!(ready.len() == count, "other pods than were asked for: {ready:?}");
        Ok(last)
    }
}
