//! A node is taken out of the cluster.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use skerry_proto::wire::{Goodbye, goodbye::Reason};
use skerry_tests::cloudcore::kubelet_address;
use skerry_tests::guest;
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::paths;
use skerry_tests::peer::{self, Session};
use skerry_tests::procfs;
use skerry_tests::runtime::Cni;
use skerry_tests::systemd::Systemd;
use skerry_tests::wait::{stays, until};

use crate::world::{Setup, World, alone};

#[test]
fn a_deleted_node_winds_down_and_stays_out() -> Result<()> {
    alone("nodedelete", Setup::default(), |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&list(&[sleeper("one", &node, true), sleeper("two", &node, false)]), "app=sleeper", 2)?;
        let port = world.port()?;
        let systemd = Systemd::new(&world.dir().join("systemd"))?;
        becomes_a_service(world, &systemd)?;
        world.admin().delete("node", &node)?;
        until("its pods to be wound down", 60, || Ok(world.running()?.is_empty()))?;
        until("its port to be closed", 30, || Ok(TcpStream::connect((kubelet_address(), port)).is_err()))?;
        until("edgecore to say what happened", 30, || {
            let said = world.edge.status()? + &world.edge.log_text();
            Ok(said.contains("deleted") && said.contains("join"))
        })?;
        world.restart_edge()?;
        stays("the node's absence", Duration::from_secs(10), || Ok(world.admin().find("node", &node)?.is_none()))?;

        // No mounts are left, of which it would see its own alone.
        let (output, calls) = systemd.run(world.edge.command(&["reset"])?.arg("--yes"))?;
        ensure!(output.success, "edgecore reset failed: {}", output.text());
        ensure!(calls == ["disable --now edgecore.service", "daemon-reload"], "systemctl was called with {calls:?}");
        ensure!(systemd.unit("edgecore.service").is_none(), "the unit is left");
        until("edgecore to end", 30, || Ok(!world.edge.is_running()))?;
        nothing_is_left(world)?;

        // The same box may come back.
        world.join()
    })
}

#[test]
fn a_node_deleted_while_it_was_away_hears_of_it() -> Result<()> {
    alone("nodedelete-away", Setup::default(), |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&sleeper("one", &node, true).to_string(), "app=sleeper", 1)?;
        // A reset is heard of at once on both sides, and the edge comes to nothing.
        world.carry_over("websocket")?;
        world.relay.set(|line| line.refuse = true);
        world.relay.reset();
        until("cloudcore to miss it", 10, || Ok(world.cloud.metric("skerry_sessions")? == 0.0))?;
        world.admin().delete("node", &node)?;
        world.nothing_changes(5, "the pod of a node that cannot hear")?;
        world.relay.heal();
        until("its pod to be wound down", 60, || Ok(world.running()?.is_empty()))?;
        ensure!(world.admin().find("node", &node)?.is_none(), "the node came back");
        Ok(())
    })
}

#[test]
fn the_certificate_of_a_deleted_node_is_refused() -> Result<()> {
    alone("nodedelete-certificate", Setup { joined: false, ..Setup::default() }, |world| {
        let token = world.cloud.new_token(&[])?.token;
        let address = world.cloud.address();
        let identity = match peer::join(address, &token, "short-lived", "machine-short-lived")? {
            Ok(identity) => identity,
            Err(refusal) => anyhow::bail!("refused: {}", refusal.message),
        };
        let mut session = Session::establish(address, &identity, "short-lived")?;
        session.receive_until("Welcome", |body| {
            matches!(body, skerry_proto::wire::frame::Body::Welcome(_)).then_some(())
        })?;
        world.admin().delete("node", "short-lived")?;
        says_why(session.receive_end()?)?;
        let refusals = || -> Result<()> {
            says_why(Session::establish(address, &identity, "short-lived")?.receive_end()?)?;
            let refusal = peer::renew(address, &identity)?.err().context("its certificate was renewed")?;
            ensure!(refusal.reason == "node_deleted", "another refusal: {refusal:?}");
            Ok(())
        };
        refusals().context("after the Node was deleted")?;
        // One of that name, made by somebody, is another Node.
        let node =
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "short-lived", "labels": guest::marks()}});
        world.admin().create(&node)?;
        refusals().context("after another Node of that name was made")?;
        world.admin().delete("node", "short-lived")?;
        stays("the node's absence", Duration::from_secs(2), || {
            Ok(world.admin().find("node", "short-lived")?.is_none())
        })?;
        ensure!(world.cloud.is_running(), "cloudcore is gone");
        // Whoever joins anew is let in.
        let token = world.cloud.new_token(&[])?.token;
        let again = peer::join(address, &token, "short-lived", "machine-short-lived")?;
        ensure!(again.is_ok(), "it may not come back: {again:?}");
        Ok(())
    })
}

/// The session was ended because there is no such Node, with the remedy.
fn says_why(goodbye: Option<Goodbye>) -> Result<()> {
    let goodbye = goodbye.context("no Goodbye")?;
    ensure!(goodbye.reason() == Reason::NodeDeleted, "another reason: {goodbye:?}");
    let says = |word| goodbye.message.contains(word);
    ensure!(says("deleted") && says("edgecore reset") && says("join"), "it does not say why: {goodbye:?}");
    Ok(())
}

#[test]
fn reset_of_a_living_node_leaves_nothing() -> Result<()> {
    reset_leaves_nothing("nodedelete-reset", Setup::default())
}

#[test]
fn reset_takes_the_network_along_that_edgecore_brought() -> Result<()> {
    reset_leaves_nothing("nodedelete-network", Setup { cni: Cni::Empty, ..Setup::default() })
}

fn reset_leaves_nothing(name: &str, setup: Setup) -> Result<()> {
    alone(name, setup, |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&list(&[sleeper("one", &node, true), sleeper("two", &node, false)]), "app=sleeper", 2)?;
        world.edge.stop();
        ensure!(world.running()?.len() == 2, "stopping edgecore stopped pods");
        for _ in 0..2 {
            let output = world.edge.cli(&["reset", "--yes"])?;
            ensure!(output.success, "edgecore reset failed: {}", output.text());
        }
        nothing_is_left(world)
    })
}

/// Where systemd runs, `edgecore join` leaves starting the agent to it.
fn becomes_a_service(world: &World, systemd: &Systemd) -> Result<()> {
    let start = ["enable edgecore.service", "start edgecore.service"];
    for before in [&["daemon-reload"][..], &[]] {
        let token = world.cloud.new_token(&[])?.token;
        let mut join = world.edge.join_command(&world.address().to_string(), &token, &[])?;
        let (output, calls) = systemd.run(&mut join)?;
        ensure!(output.success && output.stdout.contains("starts at boot"), "edgecore join: {}", output.text());
        ensure!(calls == [before, &start].concat(), "systemctl was called with {calls:?}");
    }
    let unit = systemd.unit("edgecore.service").context("no unit was installed")?;
    let product = paths::product("edgecore")?.canonicalize()?;
    let start = format!("ExecStart={} run --data-dir {}", product.display(), world.edge.data().display());
    ensure!(unit.lines().any(|line| line == start), "no {start:?} in: {unit}");
    Ok(())
}

/// Of what edgecore, and the runtime on its behalf, put on the box.
fn nothing_is_left(world: &World) -> Result<()> {
    let cri = world.runtime.cri();
    ensure!(cri.containers()?.is_empty(), "containers are left: {:?}", cri.containers()?);
    ensure!(cri.sandboxes()?.is_empty(), "sandboxes are left: {:?}", cri.sandboxes()?);
    for dir in [world.edge.data(), world.edge.pods(), world.edge.logs(), world.edge.log_links()] {
        let mounts = procfs::mounts_below(&dir);
        ensure!(mounts.is_empty(), "mounts are left: {mounts:?}");
        ensure!(entries(&dir).is_empty(), "files are left: {:?}", entries(&dir));
    }
    let namespaces = entries(&world.runtime.network_namespaces());
    ensure!(namespaces.is_empty(), "network namespaces are left: {namespaces:?}");
    let cgroups = Path::new("/sys/fs/cgroup");
    let roots = entries(cgroups).into_iter().chain([cgroups.to_owned()]);
    let pods: Vec<_> = roots.flat_map(|root| entries(&root)).filter(|path| is_called(path, "kubepods")).collect();
    ensure!(pods.is_empty(), "cgroups are left: {pods:?}");
    let links = fs::read_to_string("/proc/self/net/dev")?;
    ensure!(!links.contains("skerry0:"), "the bridge is left: {links}");
    for path in [Path::new("/var/lib/cni/networks/skerry"), &world.runtime.cni_conf_dir().join("10-skerry.conflist")] {
        ensure!(!path.exists(), "{} is left", path.display());
    }
    let results = entries(Path::new("/var/lib/cni/results"));
    ensure!(!results.iter().any(|path| is_called(path, "skerry-")), "results of the network are left: {results:?}");
    Ok(())
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn is_called(path: &Path, prefix: &str) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
}
