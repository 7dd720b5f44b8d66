//! The apiserver says no, or nothing.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use skerry_tests::fault::{Fault, Request};
use skerry_tests::kubectl::is_ready;
use skerry_tests::manifests::sleeper;

use crate::world::{Setup, World, alone, control, story};

#[test]
fn reports_outlive_an_apiserver_that_refuses_them() -> Result<()> {
    with_proxy("api-refuses", |world| {
        for (number, fault) in
            [429, 500, 409, 403, 404].map(Fault::Status).into_iter().chain([Fault::Hangup, Fault::Silence]).enumerate()
        {
            let mut left = 5;
            inject(world, move |request| {
                let status =
                    request.path.contains("/status") && request.method != "GET" && !request.path.contains("/leases/");
                (status && left > 0).then(|| {
                    left -= 1;
                    fault
                })
            });
            let name = format!("pod-{number}");
            world.kubectl.apply(&sleeper(&name, world.edge.name(), number % 2 == 0).to_string())?;
            world.kubectl.wait("pod", &name, "Ready", 120, is_ready)?;
            let seen = world.fault.as_ref().map(skerry_tests::fault::FaultProxy::take_seen).unwrap_or_default();
            ensure!(
                seen.iter().any(|(_, got)| *got == Some(fault)),
                "no request met {fault:?}: the test tests nothing"
            );
        }
        heal(world);
        world.wait_node_ready()
    })
}

#[test]
fn watches_that_fail_lose_nothing() -> Result<()> {
    with_proxy("api-watches", |world| {
        for (number, fault) in [Fault::Status(429), Fault::Status(500), Fault::Hangup].into_iter().enumerate() {
            let mut left = 12;
            inject(world, move |request| {
                (request.method == "GET" && left > 0).then(|| {
                    left -= 1;
                    fault
                })
            });
            let name = format!("pod-{number}");
            let mut pod = sleeper(&name, world.edge.name(), true);
            pod["spec"]["containers"][0]["envFrom"] = json!([{"configMapRef": {"name": name}}]);
            world
                .kubectl
                .apply(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}).to_string())?;
            world.kubectl.apply(&pod.to_string())?;
            world.kubectl.wait("pod", &name, "Ready", 120, is_ready)?;
        }
        heal(world);
        Ok(())
    })
}

#[test]
fn nothing_is_deleted_because_a_list_is_refused() -> Result<()> {
    with_proxy("api-lists", |world| {
        world.run_pods(&sleeper("stays", world.edge.name(), true).to_string(), "app=sleeper", 1)?;
        let before = world.running()?;
        // A 404 as whatever stands before an apiserver gives it: not the apiserver's word that anything is gone.
        for fault in [Fault::Status(404), Fault::Status(500), Fault::Status(429), Fault::Silence] {
            inject(world, move |request| (request.method == "GET").then_some(fault));
            world.cloud.kill();
            world.cloud.spawn()?;
            world.nothing_changes(8, "pods under a cloudcore that cannot list")?;
            heal(world);
            world.cloud.kill();
            world.cloud.boot()?;
            world.wait_connected()?;
            ensure!(world.running()? == before, "pods were rebuilt: {before:?} {:?}", world.running());
        }
        world.wait_node_ready()
    })
}

#[test]
fn the_apiserver_goes_away_for_a_minute() -> Result<()> {
    story("api-away", |world| {
        if !control()?.is_ours() {
            eprintln!("skipped: the apiserver of $KUBECONFIG is not ours to stop");
            return Ok(());
        }
        world.run_pods(&sleeper("stays", world.edge.name(), true).to_string(), "app=sleeper", 1)?;
        let before = world.running()?;
        let mut control = control()?;

        control.freeze_apiserver()?;
        let minute = world.nothing_changes(60, "pods under a frozen apiserver");
        control.thaw_apiserver()?;
        minute?;
        world.kubectl.apply(&sleeper("after-frost", world.edge.name(), true).to_string())?;
        world.kubectl.wait("pod", "after-frost", "Ready", 90, is_ready)?;

        control.kill_apiserver()?;
        let minute = world.nothing_changes(60, "pods without an apiserver");
        control.start_apiserver()?;
        control.restart_controllers()?;
        minute?;
        drop(control);
        world.kubectl.apply(&sleeper("after-death", world.edge.name(), true).to_string())?;
        world.kubectl.wait("pod", "after-death", "Ready", 90, is_ready)?;
        let now = world.running()?;
        ensure!(before.iter().all(|(name, id)| now.get(name) == Some(id)), "pods were rebuilt: {before:?} {now:?}");
        ensure!(world.cloud.is_running(), "cloudcore ended because the apiserver did");
        world.wait_node_ready()
    })
}

fn with_proxy(name: &str, tell: impl FnOnce(&mut World) -> Result<()>) -> Result<()> {
    alone(name, Setup { fault: true, ..Setup::default() }, tell)
}

fn inject(world: &World, choose: impl FnMut(&Request) -> Option<Fault> + Send + 'static) {
    if let Some(proxy) = &world.fault {
        proxy.inject(choose);
    }
}

fn heal(world: &World) {
    if let Some(proxy) = &world.fault {
        proxy.heal();
    }
    // What was answered with silence is still waiting for its answer; nothing here does.
    std::thread::sleep(Duration::from_millis(100));
}
