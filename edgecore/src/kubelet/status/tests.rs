#![allow(clippy::needless_pass_by_value, reason = "json!(…) reads best as an argument")]

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde_json::{Value, json};

use super::*;
use crate::kubelet::memory::{ProbeResult, Probes, StartError};
use crate::kubelet::observed::{Instance, Sandbox, State};
use crate::kubelet::spec::container_hash;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

struct Scene {
    pod: Pod,
    observed: Observed,
    memory: Memory,
}

fn scene(spec: Value) -> Scene {
    let meta = json!({"name": "web", "namespace": "ns", "uid": "u1", "generation": 3});
    let pod = serde_json::from_value(json!({"metadata": meta, "spec": spec})).unwrap();
    let memory = Memory { start_time: Some(at(0)), ..Memory::default() };
    Scene { pod, observed: Observed::default(), memory }
}

impl Scene {
    fn sandbox(&mut self, ready: bool) {
        let ips = vec!["fd00::5".parse().unwrap(), "10.1.0.5".parse().unwrap(), "10.1.0.6".parse().unwrap()];
        let sandbox = Sandbox {
            id: "sb".to_owned(),
            pod: Default::default(),
            attempt: 0,
            ready,
            created_at: at(0),
            ips,
            host_network: false,
        };
        self.observed.sandboxes = vec![sandbox];
    }

    fn instance(&mut self, name: &str, id: &str, state: State, code: i32) -> &mut Instance {
        let instance = Instance {
            id: id.to_owned(),
            sandbox: "sb".to_owned(),
            name: name.to_owned(),
            restart_count: 0,
            state,
            hash: container_hash(name, ""),
            image: "img".to_owned(),
            image_id: "sha256:1".to_owned(),
            created_at: at(1),
            started_at: Some(at(1) + SignedDuration::from_millis(700)),
            finished_at: (state == State::Exited).then(|| at(9)),
            exit_code: code,
            reason: String::new(),
            message: String::new(),
            grace_period: None,
            log_path: String::new(),
        };
        self.observed.containers.insert(0, instance);
        &mut self.observed.containers[0]
    }

    /// The next status, which is remembered.
    fn next(&mut self, second: i64) -> PodStatus {
        let ips = ["192.168.1.2".parse().unwrap()];
        let life = Life::of(&self.pod);
        let status = status(&self.pod, life, &self.observed, &self.memory, &ips, at(second));
        self.memory.last_status = Some(status.clone());
        status
    }
}

fn condition(status: &PodStatus, type_: &str) -> String {
    let condition = status.conditions.iter().flatten().find(|condition| condition.type_ == type_).unwrap();
    let part = |text: &Option<String>| text.as_deref().map(|text| format!(" {text}")).unwrap_or_default();
    assert_eq!(condition.observed_generation, Some(3));
    format!("{}{}{}", condition.status, part(&condition.reason), part(&condition.message))
}

fn state(status: &PodStatus, name: &str) -> Value {
    let all = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    serde_json::to_value(all.into_iter().find(|container| container.name == name).unwrap().state.as_ref()).unwrap()
}

#[test]
fn a_plain_pod_comes_up() {
    let mut scene = scene(json!({"containers": [{"name": "b"}, {"name": "a"}]}));
    let first = scene.next(0);
    assert_eq!(first.phase.as_deref(), Some("Pending"));
    assert_eq!(condition(&first, "Initialized"), "True");
    assert_eq!(condition(&first, "PodReadyToStartContainers"), "False");
    assert_eq!(condition(&first, "Ready"), "False ContainersNotReady containers with unready status: [b a]");
    assert_eq!(state(&first, "a"), json!({"waiting": {"reason": "ContainerCreating"}}));
    assert_eq!((first.pod_ip.as_deref(), first.host_ip.as_deref()), (None, Some("192.168.1.2")));
    assert_eq!(first.qos_class.as_deref(), Some("BestEffort"));

    scene.sandbox(true);
    scene.instance("b", "b0", State::Running, 0);
    scene.instance("a", "a0", State::Running, 0);
    let up = scene.next(2);
    assert_eq!(up.phase.as_deref(), Some("Running"));
    assert_eq!(condition(&up, "Ready"), "True");
    assert_eq!(state(&up, "a"), json!({"running": {"startedAt": "2027-01-15T08:00:01Z"}}));
    let ips: Vec<&str> = up.pod_ips.iter().flatten().map(|ip| ip.ip.as_str()).collect();
    assert_eq!((up.pod_ip.as_deref(), ips), (Some("10.1.0.5"), vec!["10.1.0.5", "fd00::5"]));
    let names: Vec<&str> = up.container_statuses.iter().flatten().map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert!(same(&up, &scene.next(99)), "nothing changed, so nothing is sent");
}

#[test]
fn a_terminal_phase_waits_for_the_last_process_and_stays() {
    let mut scene = scene(json!({"restartPolicy": "Never", "containers": [{"name": "c"}]}));
    scene.sandbox(true);
    scene.instance("c", "c0", State::Running, 0);
    scene.next(2);
    let instance = &mut scene.observed.containers[0];
    (instance.state, instance.exit_code, instance.finished_at) = (State::Exited, 3, Some(at(9)));
    assert_eq!(scene.next(9).phase.as_deref(), Some("Running"), "the sandbox is still there");
    scene.sandbox(false);
    let over = scene.next(10);
    assert_eq!(over.phase.as_deref(), Some("Failed"));
    assert_eq!(condition(&over, "Ready"), "False PodFailed");
    assert_eq!(condition(&over, "PodReadyToStartContainers"), "False");
    assert_eq!(over.pod_ip.as_deref(), Some("10.1.0.5"));
    assert_eq!(state(&over, "c")["terminated"]["exitCode"], 3);
    scene.observed = Observed::default();
    assert!(same(&over, &scene.next(50)), "the records may go");
}

#[test]
fn what_never_started_ends_unknown() {
    let mut scene = scene(json!({"containers": [{"name": "c"}]}));
    scene.next(0);
    scene.pod.metadata.deletion_timestamp = Some(whole(at(1)));
    let over = scene.next(2);
    assert_eq!(over.phase.as_deref(), Some("Failed"));
    assert_eq!(state(&over, "c")["terminated"]["reason"], "ContainerStatusUnknown");
    assert_eq!(state(&over, "c")["terminated"]["exitCode"], 137);
}

#[test]
fn a_crash_loop_shows_as_waiting_with_the_last_end() {
    let mut scene = scene(json!({"containers": [{"name": "c"}]}));
    scene.sandbox(true);
    let instance = scene.instance("c", "c4", State::Exited, 1);
    (instance.restart_count, instance.message) = (4, "é".repeat(10_000));
    let error = StartError {
        reason: "CrashLoopBackOff".to_owned(),
        message: "back-off".to_owned(),
        hash: container_hash("c", ""),
        retry_at: None,
    };
    scene.memory.start_errors.insert("c".to_owned(), error);
    let status = scene.next(9);
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(state(&status, "c"), json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}));
    let container = &status.container_statuses.as_ref().unwrap()[0];
    let last = container.last_state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!((container.restart_count, last.reason.as_deref()), (4, Some("Error")));
    assert_eq!(last.message.as_ref().unwrap().len(), 12_288);
    scene.pod.metadata.deletion_timestamp = Some(whole(at(10)));
    assert_eq!(state(&scene.next(10), "c")["terminated"]["exitCode"], 1, "a pod that ends restarts nothing");
}

#[test]
fn readiness_is_kept_over_an_agent_restart_until_the_first_result() {
    let probe = json!({"tcpSocket": {"port": 1}});
    let mut scene = scene(json!({"containers": [{"name": "c", "readinessProbe": probe, "startupProbe": probe}]}));
    scene.sandbox(true);
    scene.instance("c", "c0", State::Running, 0);
    let ready = |status: &PodStatus| {
        let container = &status.container_statuses.as_ref().unwrap()[0];
        (container.started, container.ready)
    };
    assert_eq!(ready(&scene.next(1)), (Some(false), false));
    let mut probes = Probes { startup: Some(ProbeResult::Success), ..Probes::default() };
    scene.memory.probes.insert("c0".to_owned(), probes);
    assert_eq!(ready(&scene.next(2)), (Some(true), false));
    probes.readiness = Some(ProbeResult::Success);
    scene.memory.probes.insert("c0".to_owned(), probes);
    assert_eq!(ready(&scene.next(3)), (Some(true), true));
    scene.memory = Memory::restored(scene.memory.last_status);
    assert_eq!(ready(&scene.next(4)), (Some(true), true));
    probes.readiness = Some(ProbeResult::Failure);
    scene.memory.probes.insert("c0".to_owned(), probes);
    assert_eq!(ready(&scene.next(5)), (Some(true), false));
    // Another instance starts from nothing.
    scene.memory = Memory::restored(scene.memory.last_status);
    scene.observed.containers[0].id = "c1".to_owned();
    assert_eq!(ready(&scene.next(6)), (Some(false), false));
}

#[test]
fn a_container_that_vanished_is_counted_once() {
    let mut scene = scene(json!({"containers": [{"name": "c"}], "initContainers": [{"name": "i"}]}));
    scene.sandbox(true);
    scene.instance("i", "i0", State::Exited, 0);
    scene.instance("c", "c0", State::Running, 0);
    scene.next(1);
    scene.observed.containers.clear();
    for second in 2..4 {
        let status = scene.next(second);
        let container = &status.container_statuses.as_ref().unwrap()[0];
        let last = container.last_state.as_ref().unwrap().terminated.as_ref().unwrap();
        assert_eq!((container.restart_count, last.exit_code), (1, 137));
        assert_eq!(state(&status, "c")["waiting"]["reason"], "PodInitializing");
        assert_eq!(state(&status, "i")["terminated"]["exitCode"], 0);
    }
}

#[test]
fn sidecars_and_init_containers_in_phase_and_conditions() {
    let probe = json!({"tcpSocket": {"port": 1}});
    let mut scene = scene(json!({"restartPolicy": "OnFailure", "containers": [{"name": "m"}], "initContainers": [
        {"name": "s", "restartPolicy": "Always", "startupProbe": probe}, {"name": "i"}]}));
    scene.sandbox(true);
    scene.instance("s", "s0", State::Running, 0);
    let status = scene.next(1);
    assert_eq!(status.phase.as_deref(), Some("Pending"));
    let text = "False ContainersNotInitialized containers with incomplete status: [s i]";
    assert_eq!(condition(&status, "Initialized"), text);
    let probes = Probes { startup: Some(ProbeResult::Success), ..Probes::default() };
    scene.memory.probes.insert("s0".to_owned(), probes);
    scene.instance("i", "i0", State::Exited, 0);
    scene.instance("m", "m0", State::Running, 0);
    let status = scene.next(2);
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(
        (condition(&status, "Initialized"), condition(&status, "Ready")),
        ("True".to_owned(), "True".to_owned())
    );
    scene.observed.containers[0].state = State::Exited;
    assert_eq!(scene.next(3).phase.as_deref(), Some("Running"), "the sidecar still runs");
    scene.observed.containers.iter_mut().for_each(|one| one.state = State::Exited);
    scene.sandbox(false);
    let over = scene.next(4);
    assert_eq!(over.phase.as_deref(), Some("Succeeded"));
    assert_eq!(condition(&over, "Initialized"), "True PodCompleted");
}

#[test]
fn a_rejected_pod_says_why() {
    let mut scene = scene(json!({"containers": [{"name": "c"}]}));
    scene.memory.reject("OutOfcpu", "Node didn't have enough resource", at(0));
    let status = scene.next(0);
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(status.reason.as_deref(), Some("OutOfcpu"));
    assert_eq!(status.message.as_deref(), Some("Pod was rejected: Node didn't have enough resource"));
    assert!(status.container_statuses.is_none());
    assert!(same(&status, &scene.next(30)));
}

#[test]
fn a_resize_of_a_running_container_is_deferred() {
    let resources = |cpu: &str| json!({"requests": {"cpu": cpu}});
    let mut scene = scene(json!({"containers": [{"name": "c", "resources": resources("1")}]}));
    scene.sandbox(true);
    scene.instance("c", "c0", State::Running, 0);
    scene.next(1);
    let changed = serde_json::from_value(resources("2")).unwrap();
    scene.pod.spec.as_mut().unwrap().containers[0].resources = Some(changed);
    let status = scene.next(2);
    assert!(condition(&status, "PodResizePending").starts_with("True Deferred"));
    assert_eq!(status.container_statuses.unwrap()[0].allocated_resources.as_ref().unwrap()["cpu"].0, "1");
}
