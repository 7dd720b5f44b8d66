//! What a technician does at the box with no link, by the same habits as kubectl's; and that afterwards the cluster reaches the node where it did.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use skerry_tests::manifests::list;
use skerry_tests::ports;
use skerry_tests::process::{Piped, pipe};
use skerry_tests::wait::until;

use super::{attach, forward, mounting, noise, start_pod, terminal};
use crate::world::{World, story};

#[test]
fn the_box_is_operated_with_no_link_and_reached_again_where_it_was() -> Result<()> {
    story("ops-offline", |world| {
        start_pod(world)?;
        let settings = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {}});
        let mut restless = mounting(world, "restless", "settings");
        restless["spec"]["containers"][0]["command"] = json!(["sh", "-c", "sleep 2; exit 1"]);
        world.kubectl.apply(&list(&[settings, restless]))?;
        until("the cloud to have the events of the pod", 60, || Ok(events(world, "ops")? == ["<none>"]))?;
        let port = world.port()?;
        let session = world.session()?.1;
        world.relay.cut();
        at_the_box(world)?;
        world.edge.kill();
        world.relay.heal();
        world.edge.start()?;
        is_reached_at(world, port).context("after the link was cut and edgecore killed")?;
        ensure!(world.session()?.1 > session, "it is the session that was");
        // Over QUIC nothing tells the edge at once that cloudcore is gone.
        world.carry_over("websocket")?;
        world.cloud.kill();
        world.cloud.boot()?;
        is_reached_at(world, port).context("after cloudcore was killed")
    })
}

fn at_the_box(world: &World) -> Result<()> {
    let namespace = world.kubectl.namespace();
    let run = |verb: &str, arguments: &[&str], input: &[u8]| -> Result<Piped> {
        pipe(world.edge.command(&[verb])?.args(["-n", namespace]).args(arguments), input)
    };
    let log = run("logs", &["ops", "-c", "talker", "--tail=2"], b"")?;
    ensure!(log.code == Some(0) && log.output == b"line 1000\nlast\n", "{log:?}");
    let said = run("exec", &["ops", "-c", "box", "--", "sh", "-c", "echo out; echo err >&2; exit 7"], b"")?;
    ensure!(said.code == Some(7) && said.output == b"out\n" && said.errors.starts_with("err\n"), "{said:?}");
    let sent = noise(1 << 20);
    let back = run("exec", &["-i", "ops", "-c", "box", "--", "cat"], &sent)?;
    ensure!(
        back.code == Some(0) && back.output == sent,
        "{} bytes came back, or other ones: {}",
        back.output.len(),
        back.errors
    );
    let mut shell = world.edge.command(&["exec"])?;
    let code = terminal(shell.args(["-n", namespace, "-it", "ops", "-c", "box", "--", "sh"]))?;
    ensure!(code == Some(5), "the shell's exit code came as {code:?}");
    attach(world.edge.command(&["attach"])?.args(["-n", namespace, "-i", "ops", "-c", "echo"]))?;
    let local = ports::free()?;
    forward(world.edge.command(&["port-forward"])?.args(["-n", namespace, "ops", &format!("{local}:8080")]), local)?;
    for (arguments, words) in [
        (&["describe", "pod", "ops", "-n", namespace][..], &["talker", "Running"][..]),
        (&["get", "pods"], &["ops", "Running"]),
        (&["get", "nodes"], &[world.edge.name(), " Ready ", "v1."]),
        (&["get", "configmaps"], &[namespace, "settings"]),
        (&["top", "pod"], &["ops", "Mi"]),
        (&["top", "node"], &[world.edge.name(), "Mi"]),
    ] {
        let output = world.edge.cli(arguments)?;
        let has_all = words.iter().all(|word| output.stdout.contains(word));
        ensure!(output.success && has_all, "edgecore {}: {}", arguments.join(" "), output.text());
    }
    until("events that the cloud cannot have", 90, || {
        let events = events(world, "restless")?;
        let words = |line: usize| events.get(line).map(|line| line.split_whitespace().collect::<Vec<_>>());
        let columns = Some(vec!["Type", "Reason", "Age", "From", "Message"]);
        let is_told = |line: &String| line.contains("Warning") && line.contains("BackOff") && line.contains("kubelet");
        Ok(words(0) == columns && events.iter().skip(2).any(is_told))
    })
    .with_context(|| format!("{:?}", events(world, "restless")))?;
    let wrong = run("logs", &["nobody"], b"")?;
    ensure!(wrong.code == Some(1) && wrong.errors.contains("nobody"), "{wrong:?}");
    let mode = fs::metadata(world.edge.data().join("edgecore.sock"))?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "others may operate the box: its socket has mode {mode:o}");
    Ok(())
}

/// What the box says of a pod's events, line by line.
fn events(world: &World, pod: &str) -> Result<Vec<String>> {
    let page = world.edge.cli(&["describe", "pod", pod, "-n", world.kubectl.namespace()])?;
    ensure!(page.success, "{}", page.text());
    let (_, events) = page.stdout.split_once("Events:").context("no events section")?;
    Ok(events.trim().lines().map(|line| line.trim().to_owned()).collect())
}

fn is_reached_at(world: &World, before: u16) -> Result<()> {
    until("kubectl to reach the pod", 60, || {
        Ok(world.kubectl.output(&["exec", "ops", "-c", "box", "--", "true"])?.success)
    })?;
    let now = world.port()?;
    ensure!(now == before, "the node's port was {before} and is {now}");
    Ok(())
}
