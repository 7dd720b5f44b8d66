//! The power fails while the link is down.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use skerry_tests::kubectl::{container_ids, is_ready};
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::wait::until;

use crate::world::story;

#[test]
fn eleven_pods_come_back_from_the_store_alone() -> Result<()> {
    story("powercycle-offline", |world| {
        let node = world.edge.name().to_owned();
        world.kubectl.apply(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"mode": "storm"}}).to_string())?;
        world.kubectl.apply(&json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"key": "hunter2"}}).to_string())?;
        let pods: Vec<Value> =
            (0..11).map(|number| configured(&format!("pod-{number:02}"), &node, number % 2 == 0)).collect();
        world.run_pods(&list(&pods), "app=sleeper", 11)?;
        let before = world.running()?;
        let token_before = world.inside("pod-00", &["cat", "/var/run/secrets/kubernetes.io/serviceaccount/token"])?;

        world.relay.cut();
        world.edge.kill();
        let pods_dir = world.edge.pods();
        world.runtime.power_off(&[&pods_dir])?;
        world.runtime.boot()?;
        ensure!(world.running()?.is_empty(), "containers outlived the power cut");
        world.edge.start()?;

        until("all containers to run again", 60, || Ok(world.running()?.len() == 11))?;
        let after = world.running()?;
        ensure!(before.keys().eq(after.keys()), "other containers than before: {before:?} {after:?}");
        let ids: BTreeSet<&String> = before.values().collect();
        ensure!(after.values().all(|id| !ids.contains(id)), "a container of before the power cut is said to run");
        let token = world.inside("pod-00", &["cat", "/var/run/secrets/kubernetes.io/serviceaccount/token"])?;
        ensure!(token == token_before, "the token is another one, offline");
        ensure!(world.inside("pod-01", &["cat", "/config/mode"])? == "storm", "the ConfigMap is not what it was");
        ensure!(world.inside("pod-01", &["cat", "/secret/key"])? == "hunter2", "the Secret is not what it was");
        ensure!(
            world.inside("pod-01", &["sh", "-c", "echo $MODE"])?.trim() == "storm",
            "the environment is not what it was"
        );

        world.relay.heal();
        world.wait_connected()?;
        until("the new statuses to arrive", 60, || {
            let pods = world.kubectl.list("pods", "app=sleeper")?;
            Ok(pods.len() == 11
                && pods.iter().all(|pod| {
                    let name = pod["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                    is_ready(pod) && container_ids(pod).get("main") == after.get(&(name, "main".to_owned()))
                }))
        })?;
        world.nothing_changes(5, "pods after the link came back")?;
        ensure!(world.running()? == after, "the link's return restarted something: {after:?} {:?}", world.running());
        world.wait_node_ready()
    })
}

#[test]
fn what_the_cloud_wanted_meanwhile_wins_after_the_link_is_back() -> Result<()> {
    story("powercycle-changed", |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&list(&[sleeper("old", &node, true), sleeper("kept", &node, true)]), "app=sleeper", 2)?;
        world.relay.cut();
        world.kubectl.delete("pod", "old")?;
        world.edge.kill();
        let pods_dir = world.edge.pods();
        world.runtime.power_cycle(&[&pods_dir])?;
        world.edge.start()?;
        until("both pods to run again", 60, || Ok(world.running()?.len() == 2))?;
        let kept = world.runtime.cri().container("kept", "main")?;
        world.relay.heal();
        world.kubectl.wait_gone("pod", "old", 60)?;
        until("only the other one to run", 30, || Ok(world.running()?.len() == 1))?;
        ensure!(world.runtime.cri().container("kept", "main")? == kept, "the pod that was not deleted was restarted");
        Ok(())
    })
}

/// A sleeper with settings and a secret, mounted and in its environment.
fn configured(name: &str, node: &str, token: bool) -> Value {
    let mut pod = sleeper(name, node, token);
    pod["spec"]["volumes"] = json!([
        {"name": "config", "configMap": {"name": "settings"}},
        {"name": "secret", "secret": {"secretName": "key"}},
        {"name": "scratch", "emptyDir": {"medium": "Memory"}},
    ]);
    let main = &mut pod["spec"]["containers"][0];
    main["volumeMounts"] = json!([
        {"name": "config", "mountPath": "/config"},
        {"name": "secret", "mountPath": "/secret"},
        {"name": "scratch", "mountPath": "/scratch"},
    ]);
    main["env"] = json!([{"name": "MODE", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "mode"}}}]);
    pod
}
