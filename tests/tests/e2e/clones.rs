//! Two boxes with one identity, as when a disk is cloned, at two replicas of cloudcore at once.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skerry_tests::cloudcore::Cloudcore;
use skerry_tests::edge::Edge;
use skerry_tests::kubectl::{Kubectl, condition, is_ready};
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::process::{self, Process};
use skerry_tests::wait::{stays, until};

use crate::linkcut::{fall, falls};
use crate::replicas::sessions;
use crate::world::{World, control, story};

/// What the one that is not to be the node is told, and told to do.
const TOLD: [&str; 3] = ["another box with the identity of node", "has taken over", "edgecore reset"];

/// It has no runtime, and so no use for cgroups, which a machine has for one edgecore.
const NO_CGROUPS: &str = "mount -t tmpfs none /sys/fs/cgroup";

#[test]
fn of_two_boxes_with_one_identity_the_last_to_start_has_the_node_at_whatever_replica() -> Result<()> {
    story("clones-start", |world| {
        let node = world.edge.name().to_owned();
        let second = second(world, "start")?;
        let pods = [falls(&node), sleeper("stays", &node, true)];
        let mut clone = clone(world, &second, "quic", &list(&pods))?;
        let before = world.running()?;
        let record = Record::begin(world)?;
        let mut epochs = BTreeMap::from([(world.session()?.1, true)]);

        let mut turn = |world: &World, clone: &Edge, original: bool| -> Result<()> {
            let (ours, other) = if original { (&world.edge, clone) } else { (clone, &world.edge) };
            let (has, has_not) = if original { (&world.cloud, &second) } else { (&second, &world.cloud) };
            let refused = refusals(has_not);
            until("the one that started last to have the node", 30, || Ok(session(ours).is_ok()))?;
            until("the other one to be told so", 30, || told(other))?;
            // So is the cluster's operator.
            until("its replica to say so", 10, || {
                Ok(refusals(has_not) > refused && has_not.log_text().contains(TOLD[0]))
            })?;
            epochs.insert(session(ours)?, original);
            stays("the session of the last to start", Duration::from_secs(3), || {
                Ok(sessions(has)? == 1.0 && sessions(has_not)? == 0.0)
            })?;
            ensure!(world.running()?.len() == before.len(), "containers came or went");
            Ok(())
        };
        clone.start_apart(NO_CGROUPS)?;
        turn(world, &clone, false)?;
        world.admin().wait("node", &node, "as the clone is, without a runtime", 30, |node| !is_ready(node))?;
        // The box that runs them looks after its pods, whoever has the node.
        let restarted = fall(world)?;
        world.restart_edge()?;
        turn(world, &clone, true)?;
        world.wait_node_ready()?;
        clone.kill();
        clone.start_apart(NO_CGROUPS)?;
        turn(world, &clone, false)?;
        world.restart_edge()?;
        turn(world, &clone, true)?;
        clone.kill();

        world.wait_node_ready()?;
        world.kubectl.wait("pod", "falls", "the restart to be told", 30, |pod| {
            pod["status"]["containerStatuses"][0]["restartCount"] == 1
        })?;
        let mut expected = before;
        expected.insert(("falls".to_owned(), "main".to_owned()), restarted);
        ensure!(world.running()? == expected, "containers changed: {expected:?} {:?}", world.running());
        record.end()?.acted_for_by_one(&epochs)
    })
}

#[test]
fn when_one_of_two_boxes_with_one_identity_ends_the_other_comes_back_by_itself() -> Result<()> {
    story("clones-end", |world| {
        let node = world.edge.name().to_owned();
        let second = second(world, "end")?;
        let pods = [falls(&node), sleeper("stays", &node, true), sleeper("goes", &node, false)];
        let mut clone = clone(world, &second, "websocket", &list(&pods))?;
        let before = world.running()?;
        let record = Record::begin(world)?;
        let first = world.session()?.1;
        clone.start_apart(NO_CGROUPS)?;
        until("the clone to have the node", 30, || Ok(session(&clone).is_ok() && !is_ready(&world.node()?)))?;
        let clones = session(&clone)?;
        world.kubectl.delete("pod", "goes")?;
        clone.kill();
        until("the clone's session to end", 10, || Ok(sessions(&second)? == 0.0))?;

        // Nobody knows that it is gone for good as long as its lease lasts.
        until("the first box to be told", 10, || told(&world.edge))?;
        let restarted = fall(world)?;
        ensure!(world.kubectl.find("pod", "goes")?.is_some(), "a pod that runs was said to have ended");
        let mut expected = before;
        expected.insert(("falls".to_owned(), "main".to_owned()), restarted);
        ensure!(world.running()? == expected, "containers changed: {expected:?} {:?}", world.running());

        // And the longest pause between two attempts.
        until("the first box to be let in", 80, || world.is_connected())?;
        let back = world.session()?.1;
        world.wait_node_ready()?;
        world.kubectl.wait_gone("pod", "goes", 30)?;
        expected.remove(&("goes".to_owned(), "main".to_owned()));
        world.wait_ready("app=sleeper", 2)?;
        world.kubectl.wait("pod", "falls", "the restart to be told", 30, |pod| {
            pod["status"]["containerStatuses"][0]["restartCount"] == 1
        })?;
        ensure!(world.running()? == expected, "containers changed: {expected:?} {:?}", world.running());
        record.end()?.acted_for_by_one(&BTreeMap::from([(first, true), (clones, false), (back, true)]))
    })
}

fn second(world: &World, name: &str) -> Result<Cloudcore> {
    let control = control()?;
    Cloudcore::start(&control, &world.dir().join(format!("clones-{name}")), None)
}

/// Runs these pods, and copies the box: a box of the same name, certificate, key and store that finds the other replica first. It has
/// no runtime, for pods have one tree of cgroups a machine.
fn clone(world: &mut World, second: &Cloudcore, transport: &str, pods: &str) -> Result<Edge> {
    world.kubectl.apply(pods)?;
    until("the pods to be Ready", 60, || {
        let pods = world.kubectl.list("pods", "app=sleeper")?;
        Ok(pods.iter().all(is_ready))
    })?;
    world.edge.configure("transport", transport)?;
    world.edge.stop();
    let clone = Edge::new(&world.dir().join(format!("clone-{transport}")), world.edge.name(), &world.runtime)?;
    let (from, to) = (world.edge.data(), clone.data());
    let copied = process::run(std::process::Command::new("cp").arg("-a").arg(from).arg(to), 30)?;
    ensure!(copied.success, "the box cannot be copied: {}", copied.text());
    let own = clone.pods();
    for (key, path) in [
        ("pods_dir", own.clone()),
        ("logs_dir", clone.logs()),
        ("log_links_dir", clone.log_links()),
        ("dmi_socket", clone.dmi_socket()),
    ] {
        clone.configure(key, &path.display().to_string())?;
    }
    clone.configure("runtime_endpoint", &format!("unix://{}", own.with_file_name("no-runtime.sock").display()))?;
    clone.configure("server", &second.address().to_string())?;
    world.edge.start()?;
    world.wait_connected()?;
    // It is as it was before the first has a clone.
    world.wait_node_ready()?;
    Ok(clone)
}

/// The number of a box's session.
fn session(edge: &Edge) -> Result<u64> {
    let text = edge.status()?;
    let (_, after) = text.split_once(", session ").with_context(|| format!("no session: {text}"))?;
    Ok(after.split_whitespace().next().unwrap_or_default().parse()?)
}

/// Whether a box that has no session says why, and what is to be done.
fn told(edge: &Edge) -> Result<bool> {
    let said = |text: &str| TOLD.iter().all(|words| text.contains(words));
    let status = edge.status()?;
    Ok(!status.contains("online for") && said(&status) && said(&edge.log_text()))
}

/// How often a replica has refused one of two boxes.
fn refusals(cloud: &Cloudcore) -> f64 {
    cloud.metric("skerry_session_starts_total{result=\"twin\"}").unwrap_or_default()
}

/// Every version of the Node, its lease and the story's pods from now on.
struct Record {
    node: Process,
    lease: Process,
    pods: Process,
}

/// What came of it.
struct Recorded {
    node: Vec<Value>,
    lease: Vec<Value>,
    pods: Vec<Value>,
}

impl Record {
    fn begin(world: &World) -> Result<Self> {
        let leases = world.admin().in_namespace("kube-node-lease");
        let watch = |kubectl: &Kubectl, what: &str, arguments: &[&str]| -> Result<Process> {
            let log = world.dir().join(format!("{}-{what}.json", world.kubectl.namespace()));
            let mut command = kubectl.command();
            command.args(["get", "--watch", "-o", "json", what]).args(arguments);
            let process = Process::spawn("a watch", &mut command, &log)?;
            until("the watch to begin", 10, || Ok(!read(&process)?.is_empty()))?;
            Ok(process)
        };
        Ok(Self {
            node: watch(world.admin(), "node", &[world.edge.name()])?,
            lease: watch(&leases, "lease", &[world.edge.name()])?,
            pods: watch(&world.kubectl, "pods", &[])?,
        })
    }

    fn end(self) -> Result<Recorded> {
        // What was written last is on its way.
        std::thread::sleep(Duration::from_secs(1));
        Ok(Recorded { node: read(&self.node)?, lease: read(&self.lease)?, pods: read(&self.pods)? })
    }
}

/// The objects that a watch has shown so far.
fn read(watch: &Process) -> Result<Vec<Value>> {
    let text = fs::read_to_string(watch.log())?;
    // The last one may be half written.
    Ok(serde_json::Deserializer::from_str(&text).into_iter().map_while(Result::ok).collect())
}

impl Recorded {
    /// What was written of the box in an epoch was said by the box whose it is; of these epochs, whether they are the original's.
    fn acted_for_by_one(&self, epochs: &BTreeMap<u64, bool>) -> Result<()> {
        let told = |versions: &[Value], what: &str| -> Result<Vec<(u64, bool)>> {
            let mut told: Vec<(u64, bool)> = Vec::new();
            for version in versions {
                let epoch: u64 = version["metadata"]["annotations"]["skerry.dev/epoch"]
                    .as_str()
                    .with_context(|| format!("{what} without an epoch: {version}"))?
                    .parse()?;
                let before = told.last().map_or(0, |(before, _)| *before);
                ensure!(epoch >= before, "after epoch {before} {what} is epoch {epoch}'s: {version}");
                let whose = epochs.get(&epoch).with_context(|| format!("{what} is epoch {epoch}'s, of {epochs:?}"))?;
                told.push((epoch, *whose));
            }
            ensure!(
                told.last().map(|last| last.0) == epochs.keys().next_back().copied(),
                "{what} missed the last session"
            );
            Ok(told)
        };
        let leases = told(&self.lease, "the lease")?;
        let nodes = told(&self.node, "the Node")?;
        let mut changes = 0;
        for (pair, (epoch, original)) in self.node.windows(2).zip(&nodes[1..]) {
            let (before, now) = (condition(&pair[0], "Ready"), condition(&pair[1], "Ready"));
            // That nothing is known is the controller's word.
            if before != now && now != "Unknown" {
                changes += 1;
                ensure!((now == "True") == *original, "in epoch {epoch} of {epochs:?} Ready became {now}: {}", pair[1]);
            }
        }
        ensure!(changes + 1 >= epochs.len(), "the boxes are not told apart: {changes} changes, {epochs:?}");
        for pod in self.pods.iter().filter(|pod| pod["metadata"].get("deletionTimestamp").is_none()) {
            let status = &pod["status"];
            let (name, restarts) = (&pod["metadata"]["name"], &status["containerStatuses"][0]["restartCount"]);
            ensure!(status["phase"] == "Running", "of pod {name} was said: {status}");
            ensure!(restarts == 0 || name == "falls", "of pod {name} was said: {status}");
        }
        eprintln!("{} versions of the Node, {} of its lease, {} of pods", nodes.len(), leases.len(), self.pods.len());
        Ok(())
    }
}
