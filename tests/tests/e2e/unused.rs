//! What cloudcore does not hold: what no pod on an edge node uses.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::procfs;
use skerry_tests::wait::until;

use crate::world::{World, story};

const SERVICES: u32 = 120;
/// Of Secrets, and of ConfigMaps.
const LARGE: usize = 24;
const BYTES: usize = 600 << 10;

#[test]
fn what_no_edge_node_uses_costs_cloudcore_nothing() -> Result<()> {
    story("work-unused", |world| {
        // The pods of whatever was before take what they use with them.
        until("the node to be empty", 60, || Ok(count(world, "pods")? == 0.0))?;
        let pid = world.cloud.pid().context("cloudcore does not run")?;
        let (before, rss) = (held(world)?, procfs::rss_kb(pid).context("no RSS")?);
        let service = |n| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s{n}")}, "spec": {"ports": [{"port": 80}]}});
        world.kubectl.apply(&list(&(0..SERVICES).map(service).collect::<Vec<_>>()))?;
        let content = "x".repeat(BYTES);
        for n in 0..LARGE {
            let name = json!({"name": format!("large-{n}")});
            let secret =
                json!({"apiVersion": "v1", "kind": "Secret", "metadata": name, "stringData": {"blob": content}});
            let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": name, "data": {"blob": content}});
            world.kubectl.create(&secret)?;
            world.kubectl.create(&map)?;
        }
        let mut user = sleeper("user", world.edge.name(), false);
        user["spec"]["volumes"] = json!([{"name": "c", "configMap": {"name": "large-0"}}]);
        let mut other = sleeper("other", world.edge.name(), false);
        for pod in [&mut user, &mut other] {
            pod["spec"]["enableServiceLinks"] = json!(false);
        }
        world.run_pods(&list(&[user, other]), "app=sleeper", 2)?;
        // By now cloudcore has heard of all that.
        let [services, config_maps, secrets] = held(world)?;
        ensure!([services, secrets] == [before[0], before[2]], "it holds what nobody uses: {:?}", held(world)?);
        // The other one is the CA that pods find beside their tokens.
        ensure!((1.0..=2.0).contains(&(config_maps - before[1])), "{config_maps} ConfigMaps, {} before", before[1]);
        let grown = procfs::rss_kb(pid).context("no RSS")?.saturating_sub(rss);
        let all = u32::try_from((2 * LARGE * BYTES) >> 10)?;
        eprintln!("{grown} KB more beside {all} KB of Secrets and ConfigMaps of which {} KB are used", BYTES >> 10);
        ensure!(grown < all / 4, "cloudcore has grown by {grown} KB");

        // The first pod here that links to Services, with all of them, and the last.
        world.run_pods(&sleeper("linked", world.edge.name(), false).to_string(), "app=sleeper", 3)?;
        ensure!(held(world)?[0] == services + f64::from(SERVICES), "it holds {:?}", held(world)?);
        let environment = world.inside("linked", &["env"])?;
        for n in 0..SERVICES {
            ensure!(environment.contains(&format!("\nS{n}_SERVICE_PORT=80\n")), "no Service s{n} in: {environment}");
        }
        world.kubectl.delete("pod", "linked")?;
        until("the Services to be let go of", 30, || Ok(held(world)?[0] == services))
    })
}

/// Services, ConfigMaps and Secrets that cloudcore holds.
fn held(world: &World) -> Result<[f64; 3]> {
    Ok([count(world, "services")?, count(world, "configmaps")?, count(world, "secrets")?])
}

fn count(world: &World, collection: &str) -> Result<f64> {
    world.cloud.metric(&format!("skerry_cached_objects{{collection=\"{collection}\"}}"))
}
