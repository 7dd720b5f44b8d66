//! A box becomes a node.

use std::collections::BTreeMap;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skerry_proto::{ADDRESSES_ANNOTATION, EDGE_LABEL};
use skerry_tests::guest;
use skerry_tests::kubectl::{container_ids, is_ready};
use skerry_tests::manifests::sleeper;
use skerry_tests::paths;
use skerry_tests::runtime::Cni;
use skerry_tests::wait::until;

use crate::world::{Setup, World, alone, story};

#[test]
fn a_joined_node_is_ready_and_says_what_it_is() -> Result<()> {
    story("join-node", |world| {
        let node = world.node()?;
        ensure!(is_ready(&node), "the node is not Ready: {}", node["status"]["conditions"]);
        ensure!(node["metadata"]["labels"].get(EDGE_LABEL).is_some(), "no role: {}", node["metadata"]["labels"]);
        let hostname = &node["metadata"]["labels"]["kubernetes.io/hostname"];
        ensure!(hostname == world.edge.name(), "the hostname label is not the node's name: {hostname}");
        let info = &node["status"]["nodeInfo"];
        for key in [
            "kubeletVersion",
            "containerRuntimeVersion",
            "kernelVersion",
            "osImage",
            "architecture",
            "bootID",
            "machineID",
        ] {
            ensure!(info[key].as_str().is_some_and(|value| !value.is_empty()), "nodeInfo.{key} is empty: {info}");
        }
        for of in ["capacity", "allocatable"] {
            for key in ["cpu", "memory", "pods", "ephemeral-storage"] {
                ensure!(node["status"][of][key].is_string(), "no {of}.{key}: {}", node["status"][of]);
            }
        }
        let addresses = node["status"]["addresses"].as_array().context("no addresses")?;
        ensure!(addresses.iter().any(|address| address["type"] == "InternalIP"), "no InternalIP: {addresses:?}");
        let boxes = node["metadata"]["annotations"][ADDRESSES_ANNOTATION].as_str().unwrap_or("");
        ensure!(!boxes.is_empty(), "the box's own addresses are not told: {}", node["metadata"]["annotations"]);
        let manifest = paths::repository().join("deploy/cloudcore.yaml").display().to_string();
        world.admin().run(&["apply", "--dry-run=server", "-f", &manifest])?;
        let table = world.admin().run(&["get", "node", world.edge.name()])?;
        ensure!(table.contains("edge") && table.contains(" Ready"), "kubectl shows: {table}");
        Ok(())
    })
}

/// Of the node: its UID, since when its conditions are as they are, and the containers of the first of these pods.
fn shown(world: &World, pods: &[Value]) -> Result<(Value, Vec<Value>, BTreeMap<String, String>)> {
    let node = world.node()?;
    let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let since = conditions.iter().map(|one| one["lastTransitionTime"].clone()).collect();
    Ok((node["metadata"]["uid"].clone(), since, container_ids(&pods[0])))
}

#[test]
fn joining_again_changes_nothing() -> Result<()> {
    story("join-again", |world| {
        let pods = world.run_pods(&sleeper("stays", world.edge.name(), false).to_string(), "app=sleeper", 1)?;
        let before = shown(world, &pods)?;
        // One of the same image is told that the node is there already.
        let token = world.cloud.new_token(&[])?.token;
        let other = world.dir().join("other-box").display().to_string();
        let clone = world.edge.try_join(&world.address().to_string(), &token, &["--data-dir", &other])?;
        ensure!(
            !clone.success && clone.text().contains("is connected, or was"),
            "a second box joined: {}",
            clone.text()
        );
        for _ in 0..3 {
            let token = world.cloud.new_token(&["--uses", "1"])?.token;
            let output = world.edge.try_join(&world.address().to_string(), &token, &[])?;
            ensure!(output.success, "the second join failed: {}", output.text());
        }
        world.restart_edge()?;
        world.wait_connected()?;
        let pods = world.wait_ready("app=sleeper", 1)?;
        let after = shown(world, &pods)?;
        ensure!(before == after, "joining again changed something: {before:?} {after:?}");
        Ok(())
    })
}

#[test]
fn a_join_may_be_interrupted_anywhere() -> Result<()> {
    alone("join-interrupted", Setup { joined: false, ..Setup::default() }, |world| {
        let token = world.cloud.new_token(&["--uses", "1"])?.token;
        let id = token.split('.').nth(1).context("no id in the token")?;
        let begin = || -> Result<Child> {
            let mut join = world.edge.join_command(&world.address().to_string(), &token, &["--no-start"])?;
            Ok(join.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
        };
        let is_used = || -> Result<bool> {
            let listed = world.cloud.token(&["list"])?.stdout;
            Ok(listed.lines().any(|line| line.starts_with(id) && line.split_whitespace().nth(2) == Some("0")))
        };
        // Whether it had ended by itself, and well.
        let kill = |mut join: Child| -> Result<bool> {
            let ended = join.try_wait()?.is_some_and(|status| status.success());
            join.kill()?;
            join.wait()?;
            Ok(ended)
        };
        // Before its token is used: over this line that takes several times as long.
        world.relay.set(|line| line.latency = Duration::from_secs(3));
        for moment in 0..8 {
            let join = begin()?;
            std::thread::sleep(Duration::from_millis(60 * moment));
            ensure!(!kill(join)? && !is_used()?, "the join was faster than its line");
        }
        // Between the use and its end: the answer is on its way for three seconds.
        let join = begin()?;
        until("the token to be used", 60, is_used)?;
        ensure!(!kill(join)?, "the join had its answer at once");
        // The token was good for one use, which was this box's, so the box may go on: killed at whatever moment, until one ends by itself.
        world.relay.set(|line| line.latency = Duration::from_millis(150));
        for moment in 0.. {
            let join = begin()?;
            std::thread::sleep(Duration::from_millis(60 * moment));
            if kill(join)? {
                break;
            }
            ensure!(moment < 100, "the join never ends");
        }
        world.edge.join(&world.address().to_string(), &token)?;
        guest::mark_node(world.admin(), world.edge.name())?;
        world.relay.heal();
        world.edge.start()?;
        world.wait_node_ready()
    })
}

#[test]
fn a_box_without_a_pod_network_gets_one() -> Result<()> {
    alone("join-network", Setup { cni: Cni::Empty, ..Setup::default() }, |world| {
        ensure!(
            !world.runtime.networks().is_empty(),
            "no conflist was installed in {}",
            world.runtime.cni_conf_dir().display()
        );
        let pods = world.run_pods(&sleeper("first", world.edge.name(), false).to_string(), "app=sleeper", 1)?;
        let ip = pods[0]["status"]["podIP"].as_str().context("no pod IP")?;
        let shown = world.inside("first", &["ip", "-4", "-o", "addr", "show", "eth0"])?;
        ensure!(shown.contains(ip), "the pod has {shown}, its status says {ip}");
        Ok(())
    })
}

#[test]
fn the_technician_sees_what_runs() -> Result<()> {
    story("join-technician", |world| {
        world.run_pods(&sleeper("seen", world.edge.name(), true).to_string(), "app=sleeper", 1)?;
        for (what, word) in [
            (&["get", "pods"][..], "seen"),
            (&["get", "nodes"], world.edge.name()),
            (&["get", "configmaps"], "kube-root-ca.crt"),
        ] {
            let output = world.edge.cli(what)?;
            ensure!(
                output.success && output.stdout.contains(word),
                "edgecore {what:?} does not show {word}: {}",
                output.text()
            );
        }
        ensure!(
            world.edge.status()?.contains(world.edge.name()),
            "edgecore status does not name the node: {}",
            world.edge.status()?
        );
        Ok(())
    })
}
