//! `testbed`: the bed for hands. scripts/quickstart brings it up to stay; the tests use it as the janitor of their directories.
#![allow(clippy::print_stdout, reason = "a command line tool")]

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use skerry_tests::cloudcore::{self, Cloudcore, NAMESPACE};
use skerry_tests::controlplane::{self, ControlPlane};
use skerry_tests::edge::Edge;
use skerry_tests::kubectl::{Kubectl, is_ready};
use skerry_tests::mapper::{self, Modbus};
use skerry_tests::process::Process;
use skerry_tests::runtime::{Cni, Runtime};
use skerry_tests::{cleanup, guest, images, procfs};

/// The node that this machine becomes.
const NODE: &str = "edge-1";
/// Where scripts/quickstart puts its example.
const EXAMPLE: &str = "skerry-quickstart";
/// A file in the state directory: the cluster is somebody else's, and everything there that carries our names is from here.
const GUEST: &str = "guest";
/// What it says if the CRDs of devices are from here, too.
const DEVICES: &str = "devices.devices.kubeedge.io";

#[derive(Parser)]
#[command(about = "A control plane, a runtime, cloudcore and one edge node on this machine")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts what is not running, and leaves it running.
    Up,
    /// Ends it all and removes every trace.
    Down,
    /// Says what runs.
    Status,
    /// Makes the images' archive and prints where it is.
    Images,
    /// Removes what killed test runs left here, and what any left in the cluster of $KUBECONFIG.
    Clean,
    /// Waits for standard input to close, then removes a test run's directory and all that belongs to it.
    #[command(hide = true)]
    Janitor {
        /// The directory.
        dir: PathBuf,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Up => up(&state()),
        Command::Down => down(&state()),
        Command::Status => status(&state()),
        Command::Images => {
            println!("{}", images::archive()?.display());
            Ok(())
        }
        Command::Clean => {
            // The cluster first: meanwhile the janitor of a run that has just ended does what is to be done here.
            let cleaned = clean_cluster();
            cleanup::stale();
            cleaned
        }
        Command::Janitor { dir } => {
            std::io::stdin().read_to_end(&mut Vec::new()).context("standard input is the sign of life of the run")?;
            cleanup::sweep(&dir)
        }
    }
}

fn state() -> PathBuf {
    std::env::var_os("SKERRY_STATE").map_or_else(|| "/var/lib/skerry-quickstart".into(), PathBuf::from)
}

/// Removes what test runs left in somebody else's cluster.
fn clean_cluster() -> Result<()> {
    if controlplane::theirs().is_none() {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let control = ControlPlane::start(dir.path())?;
    guest::clean(control.kubectl())
        .context("not all that tests put into the cluster of $KUBECONFIG is removed; `testbed clean` tries again")
}

fn up(dir: &Path) -> Result<()> {
    if is_up(dir) {
        println!("it is up already");
        return Ok(());
    }
    if dir.exists() {
        println!("removing what is left of an earlier start in {}", dir.display());
        cleanup::sweep(dir)?;
    }
    std::fs::create_dir_all(dir)?;
    bring_up(dir).inspect_err(|_| {
        eprintln!(
            "what was started is left for looking at: logs below {}, `scripts/quickstart down` removes it",
            dir.display()
        );
    })
}

fn bring_up(dir: &Path) -> Result<()> {
    println!("control plane: etcd, kube-apiserver, kube-controller-manager, kube-scheduler");
    let control = ControlPlane::start_daemon(&dir.join("control"))?;
    std::fs::copy(control.admin_kubeconfig(), dir.join("kubeconfig"))?;
    if !control.is_ours() {
        enter(control.kubectl(), dir)?;
    }
    println!("runtime: a containerd of its own, with the images of the example");
    let runtime = Runtime::start_daemon(&dir.join("runtime"), Cni::Empty)?;
    println!("cloudcore, under the rights of deploy/rbac.yaml");
    let cloudcore = Cloudcore::start_daemon(&control, &dir.join("cloudcore"))?;
    println!("this machine joins as {NODE}");
    let mut edge = Edge::new(&dir.join("edge"), NODE, &runtime)?;
    edge.make_daemon();
    let line = cloudcore.new_token(&["--uses", "1", "--ttl", "1h"])?;
    edge.join(&line.address, &line.token)?;
    edge.start()?;
    let kubectl = control.kubectl().clone();
    kubectl.wait("node", NODE, "Ready", 60, is_ready)?;
    attach_devices(&edge, &dir.join("devices"))?;
    edge.detach();
    cloudcore.detach();
    runtime.detach();
    control.detach();
    Ok(())
}

/// Starts the mappers of the example's devices, and a Modbus device where there is a Python that can be one.
fn attach_devices(edge: &Edge, dir: &Path) -> Result<()> {
    let start = |protocol: &str| -> Result<()> {
        println!("the {protocol} device mapper");
        let command = mapper::command(edge, protocol, dir)?;
        Process::spawn_daemon(protocol, &command, &dir.join(format!("{protocol}.log")))?.detach();
        Ok(())
    };
    start("virtual")?;
    if mapper::python().is_ok() {
        let device = Modbus::start(dir, true)?;
        std::fs::write(dir.join("modbus-port"), device.port().to_string())?;
        device.detach();
        start("modbus")?;
    }
    Ok(())
}

fn down(dir: &Path) -> Result<()> {
    if !dir.exists() {
        println!("nothing is up");
        return Ok(());
    }
    // Nothing here needs a goodbye: the node, its pods and the cluster end together. In somebody else's cluster, what was put there goes
    // first; as long as that fails, what is needed to try again stays.
    if dir.join(GUEST).exists() {
        leave(&Kubectl::new(&dir.join("kubeconfig"), dir)?, dir).context(
            "what was put into the cluster of $KUBECONFIG cannot be removed; when it answers again, try again",
        )?;
    }
    cleanup::sweep(dir)
}

/// Makes sure that nothing in somebody else's cluster carries the names that are used here, so that `down` may remove what does.
fn enter(kubectl: &Kubectl, dir: &Path) -> Result<()> {
    for (kind, name) in [("namespace", NAMESPACE), ("namespace", EXAMPLE), ("node", NODE)] {
        ensure!(
            kubectl.find(kind, name)?.is_none(),
            "the cluster of $KUBECONFIG has a {kind} {name} already; if it runs Skerry, join this machine with the line that `cloudcore \
             token create` prints; else unset KUBECONFIG, and a cluster is made for the example"
        );
    }
    let brings = if cloudcore::brings_crds(kubectl)? { DEVICES } else { "" };
    std::fs::write(dir.join(GUEST), brings)?;
    Ok(())
}

/// Removes from somebody else's cluster what was put there.
fn leave(kubectl: &Kubectl, dir: &Path) -> Result<()> {
    kubectl.run(&["delete", "namespace", EXAMPLE, "--ignore-not-found", "--wait=false"])?;
    if std::fs::read_to_string(dir.join(GUEST))? == DEVICES {
        cloudcore::remove_crds(kubectl, EXAMPLE)?;
    }
    kubectl.run(&["delete", "node", NODE, "--ignore-not-found", "--wait=false"])?;
    cloudcore::remove_rights(kubectl)
}

fn status(dir: &Path) -> Result<()> {
    for entry in procfs::processes().iter().filter(|entry| entry.mentions(dir)) {
        println!("{:>8}  {}", entry.pid, entry.program());
    }
    if dir.join("kubeconfig").exists() {
        let kubectl = Kubectl::new(&dir.join("kubeconfig"), dir)?;
        print!("{}", kubectl.output(&["get", "nodes,pods", "-A", "-o", "wide"])?.text());
    } else {
        println!("nothing is up");
    }
    Ok(())
}

fn is_up(dir: &Path) -> bool {
    let kubeconfig = dir.join("kubeconfig");
    let running = procfs::processes();
    let runs = |program: &str| running.iter().any(|entry| entry.mentions(dir) && entry.program() == program);
    kubeconfig.exists()
        && ["containerd", "cloudcore", "edgecore", "skerry-mapper-virtual"].into_iter().all(runs)
        && Kubectl::new(&kubeconfig, dir)
            .and_then(|kubectl| kubectl.get("node", NODE))
            .is_ok_and(|node| is_ready(&node))
}
