//! `testbed`: the bed for hands. scripts/quickstart brings it up to stay; the tests use it as the janitor of their directories.
#![allow(clippy::print_stdout, reason = "a command line tool")]

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use skerry_tests::cloudcore::Cloudcore;
use skerry_tests::controlplane::ControlPlane;
use skerry_tests::edge::Edge;
use skerry_tests::kubectl::{Kubectl, is_ready};
use skerry_tests::runtime::{Cni, Runtime};
use skerry_tests::{cleanup, images, procfs};

/// The node that this machine becomes.
const NODE: &str = "edge-1";

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
    /// Removes what killed test runs left.
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
            cleanup::stale();
            Ok(())
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
    edge.detach();
    cloudcore.detach();
    runtime.detach();
    control.detach();
    Ok(())
}

fn down(dir: &Path) -> Result<()> {
    if !dir.exists() {
        println!("nothing is up");
        return Ok(());
    }
    // Nothing here needs a goodbye: the node, its pods and the cluster end together. In somebody else's cluster, what the example
    // put there goes first.
    if std::env::var_os("KUBECONFIG").is_some_and(|value| !value.is_empty())
        && let Ok(kubectl) = Kubectl::new(&dir.join("kubeconfig"), dir)
    {
        kubectl.delete("deployment,configmap", "hello").ok();
        kubectl.delete("node", NODE).ok();
        kubectl.run(&["delete", "namespace", "skerry-system", "--ignore-not-found"]).ok();
    }
    cleanup::sweep(dir)
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
        && ["containerd", "cloudcore", "edgecore"].into_iter().all(runs)
        && Kubectl::new(&kubeconfig, dir)
            .and_then(|kubectl| kubectl.get("node", NODE))
            .is_ok_and(|node| is_ready(&node))
}
