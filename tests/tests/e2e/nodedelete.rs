//! A node is taken out of the cluster.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::peer::{self, Session};
use skerry_tests::procfs;
use skerry_tests::wait::{stays, until};

use crate::world::{Setup, alone};

#[test]
fn a_deleted_node_winds_down_and_stays_out() -> Result<()> {
    alone("nodedelete", Setup::default(), |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&list(&[sleeper("one", &node, true), sleeper("two", &node, false)]), "app=sleeper", 2)?;
        world.admin().delete("node", &node)?;
        until("its pods to be wound down", 60, || Ok(world.running()?.is_empty()))?;
        until("edgecore to say what happened", 30, || {
            let said = world.edge.status()? + &world.edge.log_text();
            Ok(said.contains("deleted") && said.contains("join"))
        })?;
        world.restart_edge()?;
        stays("the node's absence", Duration::from_secs(10), || Ok(world.admin().find("node", &node)?.is_none()))?;

        let output = world.edge.cli(&["reset", "--yes"])?;
        ensure!(output.success, "edgecore reset failed: {}", output.text());
        until("edgecore to end", 30, || Ok(!world.edge.is_running()))?;
        nothing_is_left(world.edge.data().as_path(), world.edge.pods().as_path())?;
        ensure!(
            world.runtime.cri().sandboxes()?.is_empty(),
            "sandboxes are left: {:?}",
            world.runtime.cri().sandboxes()?
        );

        // The same box may come back.
        world.join()
    })
}

#[test]
fn a_node_deleted_while_it_was_away_hears_of_it() -> Result<()> {
    alone("nodedelete-away", Setup::default(), |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&sleeper("one", &node, true).to_string(), "app=sleeper", 1)?;
        world.relay.cut();
        world.wait_node_lost()?;
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
        session.receive_end()?;
        let again = Session::establish(address, &identity, "short-lived").and_then(|mut session| session.receive_end());
        if let Ok(goodbye) = again {
            let goodbye = goodbye.unwrap_or_default();
            ensure!(
                goodbye.message.contains("deleted") || goodbye.message.contains("join"),
                "it does not say why: {goodbye:?}"
            );
        }
        ensure!(world.admin().find("node", "short-lived")?.is_none(), "the old certificate brought the node back");
        Ok(())
    })
}

#[test]
fn reset_of_a_living_node_leaves_nothing() -> Result<()> {
    alone("nodedelete-reset", Setup::default(), |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&list(&[sleeper("one", &node, true), sleeper("two", &node, false)]), "app=sleeper", 2)?;
        world.edge.stop();
        ensure!(world.running()?.len() == 2, "stopping edgecore stopped pods");
        for _ in 0..2 {
            let output = world.edge.cli(&["reset", "--yes"])?;
            ensure!(output.success, "edgecore reset failed: {}", output.text());
        }
        ensure!(world.running()?.is_empty(), "containers are left: {:?}", world.running());
        ensure!(world.runtime.cri().sandboxes()?.is_empty(), "sandboxes are left");
        nothing_is_left(world.edge.data().as_path(), world.edge.pods().as_path())
    })
}

fn nothing_is_left(data: &Path, pods: &Path) -> Result<()> {
    for dir in [data, pods] {
        let mounts = procfs::mounts_below(dir);
        ensure!(mounts.is_empty(), "mounts are left: {mounts:?}");
        let files: Vec<_> = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        ensure!(files.is_empty(), "files are left: {files:?}");
    }
    Ok(())
}
