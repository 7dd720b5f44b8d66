//! The link fails; the node does not.

use std::fs::File;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rand::RngExt as _;
use serde_json::{Value, json};
use skerry_proto::AUTONOMY_ANNOTATION;
use skerry_tests::kubectl::{container_ids, is_ready};
use skerry_tests::manifests::{container, list, sleeper};
use skerry_tests::process::Process;
use skerry_tests::relay::Flow;
use skerry_tests::wait::{eventually, until};
use skerry_tests::{mapper, procfs};

use crate::replicas::sessions;
use crate::world::{World, story};

mod reconnects;

#[test]
fn what_changed_during_a_silent_cut_happens_after_it_and_nothing_else() -> Result<()> {
    story("linkcut-silent", |world| {
        let node = world.edge.name().to_owned();
        ensure!(
            world.node()?["metadata"]["annotations"].get(AUTONOMY_ANNOTATION).is_none_or(|value| value != "false"),
            "autonomy is off"
        );
        world.kubectl.apply(&config("blue"))?;
        let pods = [
            reader(&node, false),
            falls(&node),
            sleeper("goes", &node, false),
            sleeper("stays-1", &node, true),
            sleeper("stays-2", &node, false),
        ];
        let pods = world.run_pods(&list(&pods), "app=sleeper", 5)?;
        until("the unlimited tolerations", 30, || Ok(world.kubectl.list("pods", "")?.iter().all(tolerates)))?;
        let before = world.running()?;

        let mapper = gauge(world)?;
        let cut = Instant::now();
        world.relay.cut();
        world.wait_node_lost()?;
        ensure!(world.running()? == before, "the cut touched pods: {before:?} {:?}", world.running());
        taint(world)?;
        let uids = |pods: &[Value]| pods.iter().map(|pod| pod["metadata"]["uid"].clone()).collect::<Vec<_>>();
        let now = world.kubectl.list("pods", "app=sleeper")?;
        let evicted = now.iter().any(|pod| pod["metadata"]["deletionTimestamp"].is_string());
        ensure!(!evicted && uids(&now) == uids(&pods), "pods of an autonomous node are evicted: {now:?}");
        until("the device to be shown as unknown", 90, || {
            Ok(gauge_state(world)?.iter().all(|state| state == "unknown"))
        })?;
        world.kubectl.delete("pod", "goes")?;
        world.kubectl.apply(&config("green"))?;
        world.kubectl.apply(&sleeper("comes", &node, false).to_string())?;
        world.nothing_changes(5, "pods of a node that hears nothing")?;
        ensure!(world.inside("reader", &["cat", "/config/colour"])? == "blue", "the ConfigMap changed without a link");
        let offline = world.edge.cli(&["get", "pods"])?;
        ensure!(
            offline.success && offline.stdout.contains("stays-1"),
            "edgecore get pods needs the cloud: {}",
            offline.text()
        );
        let restarted = fall(world)?;

        std::thread::sleep(Duration::from_secs(60).saturating_sub(cut.elapsed()));
        let healed = Instant::now();
        world.relay.heal();
        world.wait_connected()?;
        // The longest pause between two attempts, and an attempt that began in the cut.
        let took = healed.elapsed();
        ensure!(took < Duration::from_secs(45), "{took:?} until there was a session again");
        world.kubectl.wait_gone("pod", "goes", 60)?;
        until("the new ConfigMap in the mount", 60, || {
            Ok(world.inside("reader", &["cat", "/config/colour"])? == "green")
        })?;
        let told = world.kubectl.wait("pod", "falls", "the restart to be told", 60, |pod| {
            container_ids(pod).get("main") == Some(&restarted)
                && pod["status"]["containerStatuses"][0]["restartCount"] == 1
        })?;
        let last = &told["status"]["containerStatuses"][0]["lastState"]["terminated"];
        ensure!(last["exitCode"] == 7, "the end of the first one is lost: {last}");
        world.wait_ready("app=sleeper", 5)?;
        world.wait_node_ready()?;
        until("the device to be shown as it is", 60, || {
            Ok(gauge_state(world)?.iter().all(|state| state == "ok" || state == "online"))
        })
        .with_context(|| format!("it is shown as {:?}", gauge_state(world)))?;
        mapper.kill();
        let mut expected = before;
        expected.remove(&("goes".to_owned(), "main".to_owned()));
        expected.insert(("falls".to_owned(), "main".to_owned()), restarted);
        let mut after = world.running()?;
        ensure!(
            after.remove(&("comes".to_owned(), "main".to_owned())).is_some(),
            "the new pod does not run: {after:?}"
        );
        ensure!(after == expected, "other containers changed too: {expected:?} {after:?}");
        Ok(())
    })
}

/// A pod whose container ends once it is told to.
pub(crate) fn falls(node: &str) -> Value {
    let mut pod = sleeper("falls", node, false);
    let script = "until test -e /flag/die; do sleep 0.2; done; rm /flag/die; exit 7";
    pod["spec"]["containers"][0] = container("main", &["sh", "-c", script]);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "flag", "mountPath": "/flag"}]);
    pod["spec"]["volumes"] = json!([{"name": "flag", "emptyDir": {}}]);
    pod
}

/// Tells it to, and waits for the one that takes its place.
pub(crate) fn fall(world: &World) -> Result<String> {
    let first = world.runtime.cri().container("falls", "main")?;
    // Not by an exec: a container that ends kills what was executed in it, at times before it could end well.
    let pod = world.kubectl.get("pod", "falls")?;
    let uid = pod["metadata"]["uid"].as_str().context("a pod without a uid")?;
    std::fs::write(world.edge.pods().join("pods").join(uid).join("volumes/kubernetes.io~empty-dir/flag/die"), "")?;
    eventually("the container to be restarted offline", 60, || {
        Ok(Some(world.runtime.cri().container("falls", "main")?).filter(|id| *id != first))
    })
}

/// Whether a pod may stay for ever on a node that is not there.
fn tolerates(pod: &Value) -> bool {
    let unlimited = |key: &str| {
        pod["spec"]["tolerations"].as_array().into_iter().flatten().any(|toleration| {
            toleration["key"] == key
                && toleration["effect"] == "NoExecute"
                && toleration.get("tolerationSeconds").is_none()
        })
    };
    unlimited("node.kubernetes.io/unreachable") && unlimited("node.kubernetes.io/not-ready")
}

/// Waits until whatever does not tolerate it would be evicted.
fn taint(world: &World) -> Result<()> {
    // Nobody is while every node of a zone is lost, so there is one more, kept alive by hand.
    let neighbour = world.neighbour()?;
    until("the unreachable taint", 150, || {
        neighbour.beat()?;
        let taints = world.node()?["spec"]["taints"].as_array().cloned().unwrap_or_default();
        Ok(taints
            .iter()
            .any(|taint| taint["key"] == "node.kubernetes.io/unreachable" && taint["effect"] == "NoExecute"))
    })
}

#[test]
fn silence_is_noticed_within_thirty_seconds_in_any_direction() -> Result<()> {
    story("linkcut-one-way", |world| {
        world.run_pods(&sleeper("box", world.edge.name(), true).to_string(), "app=sleeper", 1)?;
        for transport in ["websocket", "quic"] {
            world.carry_over(transport)?;
            for (name, up, down, floods) in [
                ("up", Flow::Swallow, Flow::Pass, true),
                ("down", Flow::Pass, Flow::Swallow, true),
                ("either way", Flow::Swallow, Flow::Swallow, true),
                ("either way on an idle line", Flow::Swallow, Flow::Swallow, false),
            ] {
                world.wait_connected()?;
                world.relay.set(|line| line.bandwidth = 2 << 20);
                let flood = if floods { Some(Flood::over(world, "box")?) } else { None };
                // When they noticed is in their logs: to ask them takes time, beside others seconds.
                let logs = |world: &World| [world.edge.log_text(), world.cloud.log_text()];
                let told = logs(world).map(|log| log.len());
                let begin = second_of_day()?;
                world.relay.set(|line| (line.up, line.down) = (up, down));
                let what = format!("both sides to notice that nothing goes {name} over {transport}");
                let [edge, cloud] = eventually(&what, 40, || {
                    let [edge, cloud] = logs(world);
                    let edge = second_of(&edge[told[0]..], "no session with the cloud");
                    Ok(edge.zip(second_of(&cloud[told[1]..], "disconnected")).map(|(edge, cloud)| [edge, cloud]))
                })?
                .map(|at| (at - begin).rem_euclid(DAY));
                eprintln!("{edge:.2} s for edgecore and {cloud:.2} s for cloudcore: {what}");
                ensure!(edge.max(cloud) <= 30.0, "{edge} s for edgecore, {cloud} s for cloudcore: {what}");
                until("what they show to be true", 5, || Ok(!world.is_connected()? && sessions(&world.cloud)? == 0.0))?;
                drop(flood);
                world.relay.heal();
                world.wait_connected()?;
            }
        }
        world.wait_node_ready()
    })
}

/// Seconds of a day.
const DAY: f64 = 86400.0;

/// The second of the day that it is, in UTC, as logs have it.
fn second_of_day() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64().rem_euclid(DAY))
}

/// The second of the day of the first line of a log that says this.
fn second_of(log: &str, words: &str) -> Option<f64> {
    let line = log.lines().find(|line| line.contains(words))?;
    let time = line.split_once('T')?.1.split_once('Z')?.0;
    time.split(':').try_fold(0.0, |seconds, part| Some(seconds * 60.0 + part.parse::<f64>().ok()?))
}

#[test]
fn a_large_object_on_a_slow_line_does_not_look_like_a_dead_link() -> Result<()> {
    story("linkcut-slow", |world| {
        let node = world.edge.name().to_owned();
        world.kubectl.apply(&config("blue"))?;
        world.run_pods(&reader(&node, false).to_string(), "app=sleeper", 1)?;
        let connections = world.relay.connections();
        // What may wait does so, and does not look like a dead link either.
        let flood = Flood::over(world, "reader")?;

        // What is random takes as long as it is long: 37 s in base64 squeezed again, more than a dead link is given.
        let mut content = vec![0; 900 << 10];
        rand::rng().fill(&mut content[..]);
        let content = BASE64.encode(content);
        world.relay.set(|line| line.bandwidth = 24 << 10);
        world.kubectl.create(&json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "large"}, "binaryData": {"blob": content},
        }))?;
        let mut large = sleeper("large", &node, false);
        large["spec"]["volumes"] = json!([{"name": "c", "configMap": {"name": "large"}}]);
        large["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "c", "mountPath": "/config"}]);
        let (begin, (up, _)) = (Instant::now(), world.relay.bytes());
        world.kubectl.create(&large)?;
        std::thread::sleep(Duration::from_secs(2));
        world.kubectl.apply(&config("green"))?;
        until("the large ConfigMap to arrive", 120, || {
            ensure!(is_ready(&world.node()?), "the node is not Ready though something arrives all the time");
            ensure!(world.is_connected()?, "edgecore lost its session though something arrives all the time");
            Ok(world.running()?.contains_key(&("large".to_owned(), "main".to_owned())))
        })?;
        let took = begin.elapsed();
        eprintln!("the large ConfigMap took {took:?}");
        ensure!(took > Duration::from_secs(30), "it took {took:?}: the line was not slow, the test tests nothing");
        ensure!(world.inside("large", &["wc", "-c", "/config/blob"])?.trim().starts_with("921600 "), "it is not whole");
        until("the small change behind it", 60, || Ok(world.inside("reader", &["cat", "/config/colour"])? == "green"))?;
        ensure!(world.relay.connections() == connections, "there was another session");
        let rate = (world.relay.bytes().0 - up) / begin.elapsed().as_secs();
        // What comes down is acknowledged on it too.
        ensure!(rate > 8 << 10, "{rate} bytes a second went up: the line was not full, the test tests nothing");
        drop(flood);
        world.relay.heal();
        world.wait_ready("app=sleeper", 2).map(drop)
    })
}

#[test]
fn a_flapping_link_rebuilds_nothing() -> Result<()> {
    story("linkcut-flapping", |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&list(&[sleeper("one", &node, true), sleeper("two", &node, false)]), "app=sleeper", 2)?;
        let before = world.running()?;
        // QUIC does not hear of a reset.
        world.carry_over("websocket")?;
        let pid = world.edge.pid().context("edgecore does not run")?;
        let descriptors = procfs::descriptors(pid);
        for round in 0..20_u64 {
            world.relay.reset();
            std::thread::sleep(Duration::from_millis(100 + 37 * round));
        }
        world.relay.close();
        std::thread::sleep(Duration::from_secs(3));
        world.relay.open();
        world.wait_connected()?;
        world.wait_ready("app=sleeper", 2)?;
        ensure!(world.running()? == before, "a flapping link touched containers: {before:?} {:?}", world.running());
        until("edgecore's descriptors to be closed", 20, || Ok(procfs::descriptors(pid) <= descriptors))
    })
}

#[test]
fn a_deletion_under_way_ends_without_the_link() -> Result<()> {
    story("linkcut-deletion", |world| {
        let mut pod = sleeper("leaves", world.edge.name(), false);
        pod["spec"]["containers"][0] = container("main", &["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]);
        pod["spec"]["terminationGracePeriodSeconds"] = json!(8);
        world.run_pods(&pod.to_string(), "app=sleeper", 1)?;
        world.kubectl.delete("pod", "leaves")?;
        until("the box to hear of the deletion", 10, || {
            Ok(world.edge.cli(&["get", "pods"])?.stdout.contains("Terminating"))
        })?;
        world.relay.cut();
        ensure!(!world.running()?.is_empty(), "it ended before the link was cut: the test tests nothing");
        until("the container to end in its grace period", 30, || Ok(world.running()?.is_empty()))?;
        ensure!(world.kubectl.find("pod", "leaves")?.is_some(), "the link was not cut");
        world.relay.heal();
        world.kubectl.wait_gone("pod", "leaves", 90)
    })
}

/// Commands in a pod that send as much as the link takes, both ways, for as long as this is kept.
struct Flood(Vec<Child>);

impl Flood {
    /// Waits until they do.
    fn over(world: &World, pod: &str) -> Result<Self> {
        // edgecore may have just started, and not know its containers yet.
        until("commands to be run", 20, || Ok(world.kubectl.pipe(&["exec", pod, "--", "true"], b"")?.code == Some(0)))?;
        let zeros = || File::open("/dev/zero").map(Stdio::from);
        let mut this = Self(Vec::new());
        // BusyBox's `cat > /dev/null` ends as if its input did once that is empty for a moment.
        for (command, input) in [("cat /dev/zero", Stdio::null()), ("wc -c", zeros()?)] {
            let mut kubectl = world.kubectl.command();
            kubectl.args(["exec", "-i", pod, "--", "sh", "-c", command]);
            this.0.push(kubectl.stdin(input).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
        }
        let before = world.relay.bytes();
        eventually("the link to be full both ways", 30, || {
            let now = world.relay.bytes();
            Ok((now.0 - before.0 > 256 << 10 && now.1 - before.1 > 256 << 10).then_some(()))
        })?;
        Ok(this)
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        for child in &mut self.0 {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// A device, read, and its mapper.
fn gauge(world: &World) -> Result<Process> {
    let mut command = mapper::command(&world.edge, "virtual", &world.dir().join("gauge"))?;
    let mapper = Process::spawn("the virtual mapper", &mut command, &world.dir().join("mapper-virtual.log"))?;
    world.kubectl.create(&json!({
        "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "DeviceModel", "metadata": {"name": "gauge"},
        "spec": {"protocol": "virtualProtocol", "properties": [{"name": "level", "type": "INT", "accessMode": "ReadWrite"}]},
    }))?;
    world.kubectl.create(&json!({
        "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device", "metadata": {"name": "gauge"},
        "spec": {
            "deviceModelRef": {"name": "gauge"}, "nodeName": world.edge.name(),
            "protocol": {"protocolName": "virtualProtocol"}, "properties": [{"name": "level", "reportToCloud": true}],
        },
    }))?;
    until("the device to be shown as it is", 60, || Ok(gauge_state(world)?.iter().all(|state| state == "ok")))?;
    Ok(mapper)
}

/// What Device and DeviceStatus say of it.
fn gauge_state(world: &World) -> Result<[Value; 2]> {
    let of = |kind| -> Result<Value> {
        Ok(world.kubectl.find(kind, "gauge")?.unwrap_or_default()["status"]["state"].clone())
    };
    Ok([of("device")?, of("devicestatus")?])
}

pub(crate) fn config(colour: &str) -> String {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "colour"}, "data": {"colour": colour}})
        .to_string()
}

/// A pod that sees [`config`] as `/config/colour`.
pub(crate) fn reader(node: &str, token: bool) -> Value {
    let mut pod = sleeper("reader", node, token);
    pod["spec"]["volumes"] = json!([{"name": "c", "configMap": {"name": "colour"}}]);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "c", "mountPath": "/config"}]);
    pod
}
