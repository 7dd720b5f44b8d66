//! Processes die at any moment; containers do not.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rand::RngExt as _;
use serde_json::{Value, json};
use skerry_tests::kubectl::{is_ready, restarts};
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::wait::until;

use crate::world::{World, seeded, story};

#[test]
fn edgecore_is_killed_while_nothing_happens() -> Result<()> {
    story("crash-edge-idle", |world| {
        three_pods(world)?;
        let before = world.running()?;
        let mut random = seeded()?;
        for _ in 0..8 {
            world.edge.kill();
            world.edge.start()?;
            std::thread::sleep(Duration::from_millis(random.random_range(0..1500)));
            ensure!(world.running()? == before, "a crash touched containers: {before:?} {:?}", world.running());
        }
        world.wait_connected()?;
        world.nothing_changes(3, "containers after the last crash")?;
        ensure!(world.running()? == before, "containers changed: {before:?} {:?}", world.running());
        never_restarted(&world.wait_ready("app=sleeper", 3)?)
    })
}

#[test]
fn edgecore_is_killed_while_pods_come_and_go() -> Result<()> {
    story("crash-edge-busy", |world| {
        let node = world.edge.name().to_owned();
        let mut random = seeded()?;
        let mut lives = Lives::default();
        for round in 0..5_u32 {
            // In the middle of a pod's setup,
            world.wait_connected()?;
            world.kubectl.apply(&sleeper(&format!("pod-{round}"), &node, round % 2 == 0).to_string())?;
            lives.kill_after(world, random.random_range(0..500))?;
            // of edgecore's own start,
            lives.kill_after(world, random.random_range(0..300))?;
            // and of a pod's end, which takes its grace period of a second.
            if let Some(last) = round.checked_sub(1) {
                let name = format!("pod-{last}");
                world.wait_ready("app=sleeper", 2)?;
                lives.look(world)?;
                lives.0.retain(|(pod, _), _| *pod != name);
                world.kubectl.delete("pod", &name)?;
                lives.kill_after(world, random.random_range(0..1200))?;
                world.kubectl.wait_gone("pod", &name, 60)?;
            }
        }
        never_restarted(&world.wait_ready("app=sleeper", 1)?)?;
        until("exactly the last pod to run", 30, || Ok(world.running()?.len() == 1))?;
        lives.look(world)?;
        let sandboxes = || Ok(world.runtime.cri().ready_sandboxes()?.len() == 1);
        until("no sandbox to be left over", 30, sandboxes)
    })
}

/// The containers that are to go on as they are, by pod and name.
#[derive(Default)]
struct Lives(BTreeMap<(String, String), String>);

impl Lives {
    /// Kills edgecore in a moment, and starts it.
    fn kill_after(&mut self, world: &mut World, millis: u64) -> Result<()> {
        std::thread::sleep(Duration::from_millis(millis));
        world.edge.kill();
        self.look(world).with_context(|| format!("edgecore was killed after {millis} ms"))?;
        world.edge.start()
    }

    /// Each still runs, and is still the same one; whatever else runs is to go on from now on, unless it is being ended.
    fn look(&mut self, world: &World) -> Result<()> {
        let running = world.running()?;
        let left = self.0.iter().find(|(name, id)| running.get(*name) != Some(id));
        ensure!(left.is_none(), "{left:?} is not there any more; what runs: {running:?}");
        let ends = world.kubectl.list("pods", "")?;
        let ends = ends.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_string());
        let ends: Vec<_> = ends.filter_map(|pod| pod["metadata"]["name"].as_str()).collect();
        self.0.extend(running.into_iter().filter(|((pod, _), _)| !ends.contains(&pod.as_str())));
        Ok(())
    }
}

/// No container of these pods was ever started a second time.
fn never_restarted(pods: &[Value]) -> Result<()> {
    let restarted = pods.iter().find(|pod| restarts(pod) != 0);
    ensure!(restarted.is_none(), "restarts are counted: {}", restarted.unwrap_or(&Value::Null)["status"]);
    Ok(())
}

#[test]
fn cloudcore_is_killed() -> Result<()> {
    story("crash-cloud", |world| {
        let node = world.edge.name().to_owned();
        three_pods(world)?;
        let before = world.running()?;
        let mut random = seeded()?;
        for round in 0..4 {
            world.cloud.kill();
            let name = format!("meanwhile-{round}");
            world
                .kubectl
                .apply(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}).to_string())?;
            std::thread::sleep(Duration::from_millis(random.random_range(0..1000)));
            world.cloud.spawn()?;
            std::thread::sleep(Duration::from_millis(random.random_range(0..2000)));
            ensure!(world.running()? == before, "a crash of cloudcore touched containers");
        }
        world.cloud.kill();
        world.kubectl.delete("pod", "two")?;
        world.kubectl.apply(&sleeper("four", &node, true).to_string())?;
        // It may come back as a pod.
        world.cloud.move_into_cluster();
        world.cloud.boot()?;
        world.kubectl.wait_gone("pod", "two", 90)?;
        world.wait_ready("app=sleeper", 3)?;
        let mut after = world.running()?;
        after.remove(&("four".to_owned(), "main".to_owned()));
        let mut expected = before;
        expected.remove(&("two".to_owned(), "main".to_owned()));
        ensure!(after == expected, "containers changed: {expected:?} {after:?}");
        world.wait_node_ready()
    })
}

#[test]
fn a_new_cloudcore_notices_what_was_marked_unready_before_it() -> Result<()> {
    story("crash-cloud-unready", |world| {
        // Over QUIC nothing tells the edge at once that cloudcore is gone.
        world.carry_over("websocket")?;
        world.run_pods(&sleeper("marked", world.edge.name(), false).to_string(), "app=sleeper", 1)?;
        world.cloud.kill();
        // As the node lifecycle controller does when a lease runs out.
        let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}).to_string();
        world.kubectl.run(&["patch", "pod", "marked", "--subresource=status", "-p", &unready])?;
        ensure!(!is_ready(&world.kubectl.get("pod", "marked")?), "the patch had no effect: the test tests nothing");
        world.cloud.boot()?;
        world.wait_ready("app=sleeper", 1).map(drop)
    })
}

#[test]
fn the_store_is_deleted_under_a_running_agent() -> Result<()> {
    story("crash-store-unlinked", |world| {
        three_pods(world)?;
        let before = world.running()?;
        for file in world.edge.data_files("store") {
            fs::remove_file(file)?;
        }
        let node = world.edge.name().to_owned();
        world.kubectl.apply(&sleeper("four", &node, true).to_string())?;
        world.wait_ready("app=sleeper", 4)?;
        world.kubectl.delete("pod", "four")?;
        world.kubectl.wait_gone("pod", "four", 60)?;
        world.restart_edge()?;
        back_in_step(world, &before)
    })
}

#[test]
fn the_store_is_deleted_under_running_pods() -> Result<()> {
    story("crash-store-deleted", |world| {
        three_pods(world)?;
        let before = world.running()?;
        world.edge.kill();
        let files = world.edge.data_files("store");
        ensure!(!files.is_empty(), "no store in {}", world.edge.data().display());
        for file in files {
            fs::remove_file(file)?;
        }
        world.edge.start()?;
        back_in_step(world, &before)
    })
}

#[test]
fn the_store_is_damaged_under_running_pods() -> Result<()> {
    for (name, harm) in [("crash-store-cut", Harm::Truncate), ("crash-store-noise", Harm::Overwrite)] {
        story(name, |world| {
            three_pods(world)?;
            let before = world.running()?;
            world.edge.kill();
            for file in world.edge.data_files("store").iter().filter(|file| file.is_file()) {
                let length = fs::metadata(file)?.len();
                let open = OpenOptions::new().write(true).open(file)?;
                match harm {
                    Harm::Truncate => open.set_len(length / 2 + 100)?,
                    Harm::Overwrite => {
                        use std::os::unix::fs::FileExt as _;
                        let noise: Vec<u8> = (0..length).map(|at| u8::try_from(at * 31 % 251).unwrap_or(0)).collect();
                        open.write_all_at(&noise, 0)?;
                    }
                }
            }
            world.edge.start()?;
            back_in_step(world, &before)
        })?;
    }
    Ok(())
}

#[test]
fn the_store_is_damaged_under_a_running_agent() -> Result<()> {
    story("crash-store-live", |world| {
        three_pods(world)?;
        let before = world.running()?;
        for file in ["store.db", "store.db-wal"] {
            OpenOptions::new().write(true).open(world.edge.data().join(file))?.set_len(100)?;
        }
        // More than the store keeps in memory, so that it has to look at its file. From then on it lacks what the link's session believes
        // to be there.
        let node = world.edge.name().to_owned();
        let noise: Vec<u8> = (0..400_000).map(|_| rand::rng().random()).collect();
        let text: String = noise.iter().map(|byte| format!("{byte:02x}")).collect();
        let large =
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "large"}, "data": {"noise": text}});
        world.kubectl.create(&large)?;
        let mut four = sleeper("four", &node, true);
        four["spec"]["volumes"] = json!([{"name": "large", "configMap": {"name": "large"}}]);
        world.kubectl.apply(&four.to_string())?;
        world.wait_ready("app=sleeper", 4)?;
        until("the damage to be noticed", 30, || {
            world.edge.cli(&["get", "pods"])?;
            Ok(world.edge.log_text().contains("the store is damaged"))
        })?;
        world.kubectl.delete("pod", "four")?;
        world.kubectl.wait_gone("pod", "four", 60)?;
        back_in_step(world, &before)
    })
}

#[test]
fn the_runtime_is_restarted_and_killed() -> Result<()> {
    story("crash-runtime", |world| {
        three_pods(world)?;
        let before = world.running()?;
        world.runtime.restart()?;
        world.nothing_changes(3, "containers after the runtime's restart")?;
        world.runtime.kill();
        std::thread::sleep(Duration::from_secs(3));
        ensure!(world.edge.is_running(), "edgecore ended because the runtime did");
        world.runtime.boot()?;
        world.nothing_changes(3, "containers after the runtime's crash")?;
        ensure!(world.running()? == before, "containers changed: {before:?} {:?}", world.running());
        world.wait_node_ready()?;
        // It works again, too.
        let node = world.edge.name().to_owned();
        world.kubectl.apply(&sleeper("after", &node, false).to_string())?;
        world.wait_ready("app=sleeper", 4).map(drop)
    })
}

#[derive(Clone, Copy)]
enum Harm {
    Truncate,
    Overwrite,
}

fn three_pods(world: &World) -> Result<()> {
    let node = world.edge.name();
    let pods = [sleeper("one", node, true), sleeper("two", node, false), sleeper("three", node, true)];
    world.run_pods(&list(&pods), "app=sleeper", 3).map(drop)
}

/// The edge is connected again, has the same containers, and follows the cloud.
fn back_in_step(world: &World, before: &BTreeMap<(String, String), String>) -> Result<()> {
    world.wait_connected()?;
    world.nothing_changes(5, "containers after the resync")?;
    ensure!(&world.running()? == before, "containers changed: {before:?} {:?}", world.running());
    world.wait_ready("app=sleeper", 3)?;
    world.kubectl.delete("pod", "three")?;
    world.kubectl.wait_gone("pod", "three", 60)
}
