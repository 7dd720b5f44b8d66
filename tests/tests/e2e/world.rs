//! The stage: a cloudcore, a relay, a runtime and a joined edge, kept from story to story for as long as nothing breaks.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};
use skerry_tests::cloudcore::{Cloudcore, kubelet_address};
use skerry_tests::controlplane::{ControlPlane, theirs};
use skerry_tests::edge::Edge;
use skerry_tests::fault::FaultProxy;
use skerry_tests::guest;
use skerry_tests::kubectl::{Kubectl, is_ready, kubelet_port};
use skerry_tests::paths::RunDir;
use skerry_tests::process::{self, Output};
use skerry_tests::relay::Relay;
use skerry_tests::runtime::{Cni, Runtime};
use skerry_tests::wait::{eventually, stays, until};

/// Everything one story plays on. Fields are dropped in this order.
pub(crate) struct World {
    pub(crate) edge: Edge,
    pub(crate) cloud: Cloudcore,
    pub(crate) relay: Relay,
    pub(crate) runtime: Runtime,
    pub(crate) fault: Option<FaultProxy>,
    /// kubectl in the story's own namespace.
    pub(crate) kubectl: Kubectl,
    admin: Kubectl,
    run: RunDir,
}

/// What a world is made of.
#[derive(Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) cni: Cni,
    /// A fault proxy stands between cloudcore and the apiserver.
    pub(crate) fault: bool,
    /// The edge has joined and its node is Ready.
    pub(crate) joined: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { cni: Cni::Ours, fault: false, joined: true }
    }
}

static POOL: Mutex<Option<World>> = Mutex::new(None);

/// Tells a story on the common stage, in a namespace of its own. A story that succeeds leaves the stage as it found it.
pub(crate) fn story(name: &str, tell: impl FnOnce(&mut World) -> Result<()>) -> Result<()> {
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let mut world = match pool.take() {
        Some(world) => world,
        None => World::new(Setup::default())?,
    };
    play(&mut world, name, tell)?;
    world.settle().inspect_err(|_| world.autopsy(name))?;
    *pool = Some(world);
    Ok(())
}

/// Takes the common stage down, and keeps others from building one meanwhile.
pub(crate) fn no_stage() -> MutexGuard<'static, Option<World>> {
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    drop(pool.take());
    pool
}

/// Tells a story on a stage of its own, which is taken down afterwards.
pub(crate) fn alone(name: &str, setup: Setup, tell: impl FnOnce(&mut World) -> Result<()>) -> Result<()> {
    let _alone = no_stage();
    let mut world = World::new(setup)?;
    play(&mut world, name, tell)
}

fn play(world: &mut World, name: &str, tell: impl FnOnce(&mut World) -> Result<()>) -> Result<()> {
    let told = world.open_namespace(name).and_then(|()| tell(world));
    told.inspect_err(|_| world.autopsy(name))
}

/// The control plane of this binary, to be broken by one story at a time. In somebody else's, the first story meets nothing of an earlier run.
pub(crate) fn control() -> Result<MutexGuard<'static, ControlPlane>> {
    static CONTROL: OnceLock<Result<(Mutex<ControlPlane>, RunDir)>> = OnceLock::new();
    let started = CONTROL.get_or_init(|| {
        let run = RunDir::temporary(janitor())?;
        let control = ControlPlane::start(&run.path().join("control"))?;
        if !control.is_ours() {
            guest::clean(control.kubectl())
                .context("what an earlier test run put into the cluster of $KUBECONFIG cannot be removed")?;
        }
        Ok((Mutex::new(control), run))
    });
    match started {
        Ok((control, _)) => Ok(control.lock().unwrap_or_else(PoisonError::into_inner)),
        Err(error) => anyhow::bail!("no control plane: {error:#}"),
    }
}

impl World {
    pub(crate) fn new(setup: Setup) -> Result<Self> {
        let run = RunDir::temporary(janitor())?;
        let control = control()?;
        let dir = run.path();
        let fault = match setup.fault {
            true => Some(FaultProxy::start(&dir.join("fault"), &control.server()?, &control.ca_pem()?)?),
            false => None,
        };
        let cloud = Cloudcore::start(&control, &dir.join("cloudcore"), fault.as_ref().map(FaultProxy::front))?;
        let relay = Relay::start(cloud.address())?;
        let runtime = Runtime::start(&dir.join("runtime"), setup.cni)?;
        let name = format!(
            "edge-{}",
            dir.file_name().and_then(|name| name.to_str()?.rsplit_once("test-")).map_or("0", |(_, id)| id)
        );
        let edge = Edge::new(&dir.join("edge"), &name, &runtime)?;
        let admin = control.kubectl().clone();
        let mut world = Self { edge, cloud, relay, runtime, fault, kubectl: admin.clone(), admin, run };
        if setup.joined {
            world.join()?;
        }
        Ok(world)
    }

    /// Joins through the relay, starts edgecore, waits for the node.
    pub(crate) fn join(&mut self) -> Result<()> {
        let token = self.cloud.new_token(&[])?.token;
        self.edge.join(&self.relay.address().to_string(), &token)?;
        guest::mark_node(&self.admin, self.edge.name())?;
        self.edge.start()?;
        self.wait_node_ready()
    }

    /// A directory for this world's other things.
    pub(crate) fn dir(&self) -> &Path {
        self.run.path()
    }

    /// kubectl outside namespaces.
    pub(crate) fn admin(&self) -> &Kubectl {
        &self.admin
    }

    /// Where the edge dials.
    pub(crate) fn address(&self) -> SocketAddr {
        self.relay.address()
    }

    pub(crate) fn node(&self) -> Result<Value> {
        self.admin.get("node", self.edge.name())
    }

    /// Where the cluster reaches the node's kubelet.
    pub(crate) fn port(&self) -> Result<u16> {
        kubelet_port(&self.node()?).context("the Node names no port")
    }

    /// The URL of that port.
    pub(crate) fn kubelet(&self) -> Result<String> {
        Ok(format!("https://{}:{}", kubelet_address(), self.port()?))
    }

    /// kubectl straight at that port.
    pub(crate) fn straight(&self, kubectl: &Kubectl, arguments: &[&str]) -> Result<Output> {
        let server = format!("--server={}", self.kubelet()?);
        kubectl.output(&[&[&server, "--insecure-skip-tls-verify=true"], arguments].concat())
    }

    /// A page that is there, for who may read it.
    pub(crate) fn page(&self, path: &str) -> Result<String> {
        let answer = self.straight(&self.admin, &["get", "--raw", path])?;
        ensure!(answer.success, "{path}: {}", answer.text());
        Ok(answer.stdout)
    }

    pub(crate) fn wait_node_ready(&self) -> Result<()> {
        self.admin.wait("node", self.edge.name(), "Ready", 60, is_ready).map(drop)
    }

    /// Waits until cloudcore has missed the edge for so long that Kubernetes does too.
    pub(crate) fn wait_node_lost(&self) -> Result<()> {
        self.admin.wait("node", self.edge.name(), "not Ready", 120, |node| !is_ready(node)).map(drop)
    }

    /// Applies a manifest of pods and waits until all of this selector are Ready; their objects.
    pub(crate) fn run_pods(&self, manifest: &str, selector: &str, count: usize) -> Result<Vec<Value>> {
        self.kubectl.apply(manifest)?;
        self.wait_ready(selector, count)
    }

    /// Waits until exactly `count` pods of the selector exist and are Ready; their objects.
    pub(crate) fn wait_ready(&self, selector: &str, count: usize) -> Result<Vec<Value>> {
        eventually(&format!("{count} pods of {selector} to be Ready"), 90, || {
            let pods = self.kubectl.list("pods", selector)?;
            let ready = pods.iter().all(is_ready) && pods.len() == count;
            Ok(ready.then_some(pods))
        })
    }

    /// Running containers by (pod, container). Two of the same name are an error: that is what must never happen.
    pub(crate) fn running(&self) -> Result<BTreeMap<(String, String), String>> {
        let mut found = BTreeMap::new();
        for (pod, container, id) in self.runtime.cri().running()? {
            if let Some(twin) = found.insert((pod.clone(), container.clone()), id.clone()) {
                anyhow::bail!("container {container} of pod {pod} runs twice: {twin} and {id}");
            }
        }
        Ok(found)
    }

    /// Nothing of what runs changes for so long.
    pub(crate) fn nothing_changes(&self, seconds: u64, what: &str) -> Result<()> {
        let before = self.running()?;
        stays(what, Duration::from_secs(seconds), || Ok(self.running()? == before))
            .with_context(|| format!("before: {before:?}; now: {:?}", self.running()))
    }

    /// Runs a command inside the container `main` of a pod; its standard output.
    pub(crate) fn inside(&self, pod: &str, command: &[&str]) -> Result<String> {
        let output = self.runtime.cri().exec(pod, "main", command)?;
        ensure!(output.success, "{command:?} in {pod} failed: {}", output.text());
        Ok(output.stdout)
    }

    /// Has edgecore take this transport: `auto`, `quic` or `websocket`.
    pub(crate) fn carry_over(&mut self, transport: &str) -> Result<()> {
        self.edge.configure("transport", transport)?;
        self.edge.stop();
        self.edge.start()?;
        self.wait_connected()
    }

    /// What carries the session that stands, and its number, as `edgecore status` says it.
    pub(crate) fn session(&self) -> Result<(String, u64)> {
        let text = self.edge.status()?;
        let line = text.lines().find(|line| line.contains("online for")).context("edgecore is offline")?;
        let over = line.split_once(" over ").and_then(|(_, rest)| rest.split_once(", session "));
        let (transport, epoch) = over.with_context(|| format!("no transport in {line:?}"))?;
        Ok((transport.to_owned(), epoch.trim().parse()?))
    }

    /// Starts edgecore again after it ended.
    pub(crate) fn restart_edge(&mut self) -> Result<()> {
        self.edge.kill();
        self.edge.start()
    }

    /// Waits until the session stands: the agent itself says so.
    pub(crate) fn wait_connected(&self) -> Result<()> {
        until("edgecore to be connected", 60, || self.is_connected())
    }

    /// What `edgecore status` says of the link.
    pub(crate) fn is_connected(&self) -> Result<bool> {
        let text = self.edge.status()?.to_lowercase();
        Ok(text.contains("online for"))
    }

    /// The story's namespace is one that it made itself: it is deleted afterwards.
    fn open_namespace(&mut self, name: &str) -> Result<()> {
        let metadata = json!({"name": name, "labels": guest::marks()});
        self.admin.create(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}))?;
        self.kubectl = self.admin.in_namespace(name);
        until("the namespace's service account", 30, || Ok(self.kubectl.find("serviceaccount", "default")?.is_some()))?;
        until("the namespace's CA", 30, || Ok(self.kubectl.find("configmap", "kube-root-ca.crt")?.is_some()))
    }

    /// Ends what a story left running, and proves that the node is idle and well.
    fn settle(&mut self) -> Result<()> {
        self.relay.heal();
        if self.edge.configured("transport")?.is_some_and(|transport| transport != "auto") {
            self.carry_over("auto")?;
        }
        self.admin.run(&["delete", "namespace", self.kubectl.namespace(), "--wait=false"])?;
        self.see_off()?;
        until("the story's containers to end", 60, || Ok(self.runtime.cri().running()?.is_empty()))?;
        ensure!(self.edge.is_running(), "edgecore ended by itself: {}", process::tail(&self.edge.log(), 20));
        ensure!(self.cloud.is_running(), "cloudcore ended by itself");
        self.wait_node_ready()
    }

    /// Deletes the Nodes of visitors.
    fn see_off(&self) -> Result<()> {
        if theirs().is_some() {
            return guest::see_off(&self.admin);
        }
        let delete = ["delete", "node", "--ignore-not-found", "--wait=false"];
        self.admin.run(&[&delete[..], &guest::VISITORS[..]].concat()).map(drop)
    }

    /// Shows and keeps what is needed to understand a failure.
    fn autopsy(&self, name: &str) {
        let place = std::env::var_os("SKERRY_TEST_LOGS")
            .map_or_else(|| std::env::temp_dir().join("skerry-failed"), PathBuf::from);
        let keep = place.join(name);
        std::fs::create_dir_all(&keep).ok();
        let mut logs = vec![
            self.edge.log(),
            self.dir().join("cloudcore/cloudcore.log"),
            self.dir().join("runtime/containerd.log"),
        ];
        // Those of the story's own processes, and of its other cloudcores.
        let entries = std::fs::read_dir(self.dir()).into_iter().flatten().flatten().map(|entry| entry.path());
        let (dirs, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
        logs.extend(files.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "log")));
        let others: Vec<_> =
            dirs.into_iter().map(|dir| dir.join("cloudcore.log")).filter(|log| !logs.contains(log)).collect();
        logs.extend(others);
        for log in logs {
            let file = log.strip_prefix(self.dir()).unwrap_or(&log).to_string_lossy().replace('/', "-");
            std::fs::copy(&log, keep.join(&file)).ok();
            eprintln!("--- the end of {file} ---\n{}", process::tail(&log, 30));
        }
        let node = ["get", "node", self.edge.name(), "-o", "yaml"];
        for what in [&["get", "pods", "-o", "wide"][..], &["get", "events", "--sort-by=.lastTimestamp"], &node] {
            match self.kubectl.output(what) {
                Ok(output) => eprintln!("--- kubectl {} ---\n{}", what.join(" "), output.text()),
                Err(error) => eprintln!("--- kubectl {} ---\n{error:#}", what.join(" ")),
            }
        }
        eprintln!("--- running: {:?}", self.runtime.cri().running());
        eprintln!("the logs are kept in {}", keep.display());
    }
}

/// A second Node that only exists in the apiserver: a fake, for what needs more nodes than this machine can be.
pub(crate) struct Neighbour {
    name: String,
    admin: Kubectl,
}

impl World {
    /// A neighbour that is Ready for as long as it [beats](Neighbour::beat).
    pub(crate) fn neighbour(&self) -> Result<Neighbour> {
        let neighbour = Neighbour { name: format!("{}-neighbour", self.edge.name()), admin: self.admin.clone() };
        let metadata = json!({"name": neighbour.name, "labels": guest::marks()});
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"unschedulable": true}});
        neighbour.admin.create(&node)?;
        let ready = json!({"status": {"conditions": [
            {"type": "Ready", "status": "True", "reason": "Pretended", "message": "", "lastHeartbeatTime": now(), "lastTransitionTime": now()},
        ]}});
        let patch = ["patch", "node", &neighbour.name, "--subresource=status", "-p", &ready.to_string()];
        neighbour.admin.run(&patch)?;
        neighbour.beat()?;
        Ok(neighbour)
    }
}

impl Neighbour {
    /// Renews its lease.
    pub(crate) fn beat(&self) -> Result<()> {
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": self.name, "namespace": "kube-node-lease", "labels": guest::marks()},
            "spec": {"holderIdentity": self.name, "leaseDurationSeconds": 40, "renewTime": now()},
        });
        self.admin.apply(&lease.to_string()).map(drop)
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.admin.delete("node", &self.name).ok();
    }
}

/// The time as a MicroTime.
fn now() -> String {
    let now = time::OffsetDateTime::now_utc();
    let (date, clock) = (now.date(), now.time());
    let (month, micros) = (u8::from(date.month()), clock.microsecond());
    let (hour, minute, second) = (clock.hour(), clock.minute(), clock.second());
    format!("{:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z", date.year(), date.day())
}

impl Drop for World {
    fn drop(&mut self) {
        // The node goes before its edgecore can report on it again; its pods follow it.
        self.edge.kill();
        self.admin.delete("node", self.edge.name()).ok();
        self.see_off().ok();
        let namespace = self.kubectl.namespace();
        if namespace != "default" {
            self.kubectl.run(&["delete", "pods", "--all", "--force", "--grace-period=0", "--wait=false"]).ok();
            self.admin.delete("namespace", namespace).ok();
        }
    }
}

/// A command that must be refused: it fails, names cause and remedy by these words, and does not panic.
pub(crate) fn refused(output: &Output, words: &[&str]) -> Result<()> {
    let text = output.text();
    ensure!(!output.success, "it was not refused: {text}");
    ensure!(!text.contains("panicked"), "it panicked: {text}");
    let lower = text.to_lowercase();
    for word in words {
        ensure!(lower.contains(&word.to_lowercase()), "the refusal does not say {word:?}: {text}");
    }
    Ok(())
}

pub(crate) fn janitor() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_testbed"))
}

/// A generator whose seed is printed and can be given as `SEED`.
pub(crate) fn seeded() -> Result<StdRng> {
    let seed = match std::env::var("SEED") {
        Ok(text) => text.parse()?,
        Err(_) => rand::rng().random(),
    };
    eprintln!("SEED={seed}");
    Ok(StdRng::seed_from_u64(seed))
}
