#![allow(clippy::needless_pass_by_value, reason = "json!(…) reads best as an argument")]

use std::fmt::Write as _;

use insta::assert_snapshot;
use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Value, json};

use super::*;
use crate::kubelet::memory::{Failure, PostStart, ProbeResult, Probes, StartError, Volumes};
use crate::kubelet::spec::container_hash;
use crate::kubelet::status::status;

/// A pod at a moment; times are seconds since it was accepted.
struct Scene {
    pod: Pod,
    life: Life,
    observed: Observed,
    memory: Memory,
}

const EPOCH: i64 = 1_800_000_000;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(EPOCH + second).unwrap()
}

fn scene(spec: Value) -> Scene {
    let mut spec = spec;
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            if container["image"].is_null() {
                container["image"] = json!("img");
            }
        }
    }
    let meta = json!({"name": "web", "namespace": "ns", "uid": "u1"});
    let pod = serde_json::from_value(json!({"metadata": meta, "spec": spec})).unwrap();
    let memory = Memory { start_time: Some(at(0)), volumes: Volumes::Ready, ..Memory::default() };
    Scene { pod, life: Life::Wanted, observed: Observed::default(), memory }
}

impl Scene {
    fn sandbox(mut self, attempt: u32, ready: bool) -> Self {
        let ips = vec!["10.1.0.5".parse().unwrap()];
        let id = format!("sb{attempt}");
        let sandbox =
            Sandbox { id, pod: Default::default(), attempt, ready, created_at: at(0), ips, host_network: false };
        self.observed.sandboxes.insert(0, sandbox);
        self
    }

    /// The newest instance so far, in the newest sandbox: `code` if it ended, at `second`.
    fn ran(mut self, name: &str, restart_count: i32, second: i64, code: Option<i32>) -> Self {
        let image = Spec::new(&self.pod).find(name).map(|view| view.image.to_owned()).unwrap_or_default();
        let instance = Instance {
            id: format!("{name}-{restart_count}"),
            sandbox: self.observed.sandboxes[0].id.clone(),
            name: name.to_owned(),
            restart_count,
            state: if code.is_some() { State::Exited } else { State::Running },
            hash: container_hash(name, &image),
            image,
            image_id: "sha256:1".to_owned(),
            created_at: at(second),
            started_at: Some(at(second)),
            finished_at: code.map(|_| at(second)),
            exit_code: code.unwrap_or(0),
            reason: String::new(),
            message: String::new(),
            grace_period: Some(7),
            log_path: String::new(),
        };
        self.observed.containers.insert(0, instance);
        self
    }

    fn running(self, name: &str) -> Self {
        self.ran(name, 0, 1, None)
    }

    fn deleted(mut self, grace: i64) -> Self {
        let mut pod = serde_json::to_value(&self.pod).unwrap();
        pod["metadata"]["deletionTimestamp"] = json!("2027-01-15T08:00:00Z");
        pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        self.pod = serde_json::from_value(pod).unwrap();
        self.life = Life::of(&self.pod);
        self
    }

    fn probed(mut self, id: &str, probes: Probes) -> Self {
        self.memory.probes.insert(id.to_owned(), probes);
        self
    }

    fn plan(&self, second: i64) -> Plan {
        plan(&self.pod, self.life, &self.observed, &self.memory, at(second))
    }

    fn show(&self, second: i64) -> String {
        show(&self.plan(second))
    }

    fn status(&self, second: i64) -> PodStatus {
        status(&self.pod, self.life, &self.observed, &self.memory, &["192.168.1.2".parse().unwrap()], at(second))
    }
}

fn show(plan: &Plan) -> String {
    let mut text = format!("{:?}", plan.stage);
    for step in &plan.steps {
        let actions: Vec<String> = step.actions.iter().map(line).collect();
        write!(text, "\n{}{}", actions.join(" + "), if step.must { " !" } else { "" }).unwrap();
    }
    for blocked in &plan.blocked {
        write!(text, "\nblocked {}: {}: {}", blocked.name, blocked.reason, blocked.message).unwrap();
    }
    for event in &plan.events {
        write!(text, "\nevent {}: {}", event.reason, event.message).unwrap();
    }
    if let Some(outcome) = plan.termination.as_ref().and_then(|termination| termination.outcome.as_ref()) {
        write!(text, "\noutcome {}", outcome.reason).unwrap();
    }
    if let Some(wake) = plan.wake_at {
        write!(text, "\nwake at {}", wake.as_second() - EPOCH).unwrap();
    }
    text
}

fn line(action: &Action) -> String {
    match action {
        Action::SetUpVolumes => "volumes".to_owned(),
        Action::CreateSandbox { attempt } => format!("sandbox {attempt}"),
        Action::StartContainer { name, restart_count, sandbox, .. } => {
            format!("start {name}/{restart_count} in {}", sandbox.as_deref().unwrap_or("new"))
        }
        Action::KillContainer { id, grace, pre_stop, after, why, message, .. } => {
            let hook = if *pre_stop { " preStop" } else { "" };
            let after = if after.is_empty() { String::new() } else { format!(" after {}", after.join(",")) };
            format!("kill {id} {grace}s{hook}{after} ({why:?}: {message})")
        }
        Action::StopSandbox { id } => format!("stop {id}"),
        Action::RemoveContainer { id, .. } | Action::RemoveSandbox { id } => format!("remove {id}"),
        Action::TearDown => "tear down".to_owned(),
        Action::ReportFinished => "report finished".to_owned(),
    }
}

fn app(policy: &str) -> Scene {
    scene(json!({"restartPolicy": policy, "containers": [{"name": "c"}]}))
}

#[test]
fn a_plain_pod_starts_in_one_plan() {
    let mut fresh = scene(json!({"containers": [{"name": "b"}, {"name": "a"}]}));
    fresh.memory.volumes = Volumes::Pending;
    assert_snapshot!(fresh.show(0), @r"
    Sync
    volumes !
    sandbox 0 !
    start b/0 in new
    start a/0 in new
    ");
    let up = fresh.sandbox(0, true).running("b").running("a");
    assert_snapshot!(up.show(5), @r"
    Sync
    volumes !
    ");
}

#[test]
fn an_adopted_pod_is_left_alone() {
    assert_snapshot!(app("Always").sandbox(0, true).running("c").show(5), @"Sync");
}

#[test]
fn a_never_pod_that_failed_is_wound_up_and_kept_for_its_logs() {
    let mut scene = app("Never").sandbox(0, true).ran("c", 0, 2, Some(3));
    assert_snapshot!(scene.show(3), @r"
    Terminating
    stop sb0 !
    ");
    scene.observed.sandboxes[0].ready = false;
    assert_snapshot!(scene.show(3), @r"
    Terminated
    stop sb0
    tear down !
    ");
    scene.memory.torn_down = true;
    assert_snapshot!(scene.show(3), @"Terminated");
    assert_snapshot!(scene.deleted(0).show(9), @r"
    Terminated
    report finished !
    remove c-0
    remove sb0
    ");
}

#[test]
fn a_crashing_container_backs_off() {
    let mut scene = app("OnFailure").sandbox(0, true).ran("c", 0, 0, Some(1));
    let first = scene.plan(0);
    assert_snapshot!(show(&first), @r"
    Sync
    start c/1 in sb0
    ");
    scene.memory.before(&first.steps[0].actions[0], at(0));
    let mut scene = scene.ran("c", 1, 1, Some(1));
    let blocked = scene.plan(1);
    assert_snapshot!(show(&blocked), @r#"
    Sync
    remove c-0
    blocked c: CrashLoopBackOff: back-off 10s restarting failed container=c pod=web_ns(u1)
    event BackOff: Back-off restarting failed container c in pod web_ns(u1)
    wake at 11
    "#);
    scene.memory.note(&blocked);
    assert_eq!(scene.plan(2).events, [], "said once");
    assert_snapshot!(scene.show(11), @r"
    Sync
    start c/2 in sb0
    remove c-0
    ");
    let done = scene.ran("c", 2, 12, Some(0));
    assert_eq!(done.plan(12).stage, Stage::Terminating);
}

#[test]
fn a_new_image_replaces_the_container_whatever_the_policy() {
    let mut scene = app("Never").sandbox(0, true).running("c");
    scene.pod.spec.as_mut().unwrap().containers[0].image = Some("img:2".to_owned());
    assert_snapshot!(scene.show(3), @r"
    Sync
    kill c-0 30s (SpecChanged: Container c definition changed, will be restarted) !
    start c/1 in sb0
    ");
    scene.observed.containers[0].hash = 0;
    assert_snapshot!(scene.show(3), @"Sync");
}

#[test]
fn probes_kill_and_restart() {
    let probe = json!({"tcpSocket": {"port": 1}, "terminationGracePeriodSeconds": 3});
    let pod = |policy: &str| {
        scene(json!({"restartPolicy": policy, "containers": [
            {"name": "l", "livenessProbe": probe}, {"name": "s", "startupProbe": probe}]}))
        .sandbox(0, true)
        .running("l")
        .running("s")
        .probed("l-0", Probes { liveness: Some(ProbeResult::Failure), ..Probes::default() })
        .probed("s-0", Probes { startup: Some(ProbeResult::Failure), ..Probes::default() })
    };
    assert_snapshot!(pod("Always").show(5), @r"
    Sync
    kill l-0 3s (Liveness: Container l failed liveness probe, will be restarted) + kill s-0 3s (Startup: Container s failed startup probe, will be restarted) !
    start l/1 in sb0
    start s/1 in sb0
    ");
    assert_snapshot!(pod("Never").show(5), @r"
    Sync
    kill l-0 3s (Liveness: Container l failed liveness probe) + kill s-0 3s (Startup: Container s failed startup probe) !
    ");
}

#[test]
fn init_containers_go_one_by_one_and_sidecars_stay() {
    let pod = || {
        scene(json!({"containers": [{"name": "m"}], "initContainers": [
            {"name": "i1"}, {"name": "s", "restartPolicy": "Always", "startupProbe": {"tcpSocket": {"port": 1}}}, {"name": "i2"}]}))
        .sandbox(0, true)
    };
    assert_snapshot!(pod().show(1), @"
    Sync
    start i1/0 in sb0
    ");
    assert_snapshot!(pod().running("i1").show(1), @"Sync");
    assert_snapshot!(pod().ran("i1", 0, 1, Some(1)).show(1), @"
    Sync
    start i1/1 in sb0
    ");
    let sidecar = || pod().ran("i1", 0, 1, Some(0)).running("s");
    let passed = Probes { startup: Some(ProbeResult::Success), ..Probes::default() };
    assert_snapshot!(sidecar().show(1), @"Sync");
    assert_snapshot!(sidecar().probed("s-0", passed).show(1), @"
    Sync
    start i2/0 in sb0
    ");
    let ready = || sidecar().probed("s-0", passed).ran("i2", 0, 2, Some(0));
    assert_snapshot!(ready().show(2), @"
    Sync
    start m/0 in sb0
    ");
    // Records of init containers may go; they are not run again.
    let mut running = ready().running("m");
    running.observed.containers.retain(|instance| instance.name == "m");
    assert_snapshot!(running.show(3), @"
    Sync
    start s/0 in sb0
    ");
}

#[test]
fn a_failed_init_container_of_a_never_pod_ends_it() {
    let pod = scene(json!({"restartPolicy": "Never", "containers": [{"name": "m"}], "initContainers": [
        {"name": "s", "restartPolicy": "Always"}, {"name": "i"}]}))
    .sandbox(0, true)
    .running("s")
    .ran("i", 0, 1, Some(2));
    assert_snapshot!(pod.show(2), @"
    Terminating
    kill s-0 30s (PodEnds: Stopping container s) !
    stop sb0 !
    ");
}

#[test]
fn sidecars_stop_last_and_in_reverse() {
    let hook = json!({"preStop": {"exec": {"command": ["x"]}}});
    let pod = scene(json!({"containers": [{"name": "m"}], "initContainers": [
        {"name": "s1", "restartPolicy": "Always", "lifecycle": hook}, {"name": "s2", "restartPolicy": "Always"}]}))
    .sandbox(0, true)
    .running("s1")
    .running("s2")
    .running("m");
    assert_snapshot!(pod.deleted(20).show(9), @r"
    Terminating
    kill m-0 20s (PodEnds: Stopping container m) + kill s2-0 20s after m-0 (PodEnds: Stopping container s2) + kill s1-0 20s preStop after m-0,s2-0 (PodEnds: Stopping container s1) !
    stop sb0 !
    ");
}

#[test]
fn a_second_delete_shortens_the_stop_and_runs_no_hook_twice() {
    let hook = json!({"preStop": {"exec": {"command": ["x"]}}});
    let mut scene =
        scene(json!({"containers": [{"name": "c", "lifecycle": hook}]})).sandbox(0, true).running("c").deleted(30);
    let first = scene.plan(0);
    assert_snapshot!(show(&first), @"
    Terminating
    kill c-0 30s preStop (PodEnds: Stopping container c) !
    stop sb0 !
    ");
    scene.memory.note(&first);
    scene.memory.before(&first.steps[0].actions[0], at(0));
    assert_snapshot!(scene.show(10), @"
    Terminating
    kill c-0 20s (PodEnds: Stopping container c) !
    stop sb0 !
    ");
    assert_snapshot!(scene.deleted(5).show(3), @"
    Terminating
    kill c-0 5s (PodEnds: Stopping container c) !
    stop sb0 !
    ");
}

#[test]
fn deletion_ends_with_nothing_left() {
    let mut scene = app("Always").sandbox(0, false).ran("c", 0, 1, Some(143)).deleted(0);
    let last = scene.plan(5);
    assert_snapshot!(show(&last), @"
    Terminated
    stop sb0
    tear down !
    report finished !
    remove c-0
    remove sb0
    ");
    scene.memory.note(&last);
    last.steps.iter().flat_map(|step| &step.actions).for_each(|action| scene.memory.done(action));
    scene.observed = Observed::default();
    assert_snapshot!(scene.show(6), @"Finished");
    assert_snapshot!(app("Always").deleted(30).show(0), @"
    Terminated
    tear down !
    report finished !
    ");
}

#[test]
fn what_left_the_store_is_stopped_with_its_own_grace() {
    let mut scene = app("Always").sandbox(0, true).running("c");
    scene.life = Life::Removed;
    assert_snapshot!(scene.show(1), @"
    Terminating
    kill c-0 30s (PodEnds: Stopping container c) !
    stop sb0 !
    ");
    scene.life = Life::Orphan;
    scene.pod.spec = None;
    assert_snapshot!(scene.show(1), @"
    Terminating
    kill c-0 7s preStop (PodEnds: Stopping container c) !
    stop sb0 !
    ");
    scene.observed.sandboxes[0].ready = false;
    scene.observed.containers[0].state = State::Exited;
    assert_snapshot!(scene.show(1), @"
    Terminated
    stop sb0
    tear down !
    remove c-0
    remove sb0
    ");
}

#[test]
fn a_power_cycle_is_one_plan() {
    let mut scene = scene(json!({"containers": [{"name": "a"}, {"name": "b"}]}))
        .sandbox(0, false)
        .ran("a", 4, 5, Some(255))
        .ran("b", 0, 5, Some(255));
    scene.memory.volumes = Volumes::Pending;
    assert_snapshot!(scene.show(6), @"
    Sync
    volumes !
    stop sb0 !
    sandbox 1 !
    start a/5 in new
    start b/1 in new
    event SandboxChanged: Pod sandbox changed, it will be killed and re-created.
    ");
}

#[test]
fn a_lost_sandbox_by_restart_policy() {
    let lost = |policy: &str, code: i32| app(policy).sandbox(0, false).ran("c", 0, 5, Some(code)).plan(6);
    assert_eq!(lost("Never", 0).stage, Stage::Terminated);
    assert_eq!(lost("OnFailure", 0).stage, Stage::Terminated);
    assert_eq!(lost("OnFailure", 1).stage, Stage::Sync);
    let never = scene(json!({"restartPolicy": "Never", "containers": [{"name": "c"}, {"name": "late"}]}))
        .sandbox(0, false)
        .ran("c", 0, 5, Some(0));
    assert_eq!(never.plan(6).stage, Stage::Terminated);
    assert_eq!(never.status(6).phase.as_deref(), Some("Failed"));
    // Nothing had run in it yet.
    assert_snapshot!(app("Never").sandbox(0, false).show(6), @"
    Sync
    stop sb0 !
    sandbox 1 !
    start c/0 in new
    event SandboxChanged: Pod sandbox changed, it will be killed and re-created.
    ");
}

#[test]
fn two_ready_sandboxes_or_one_without_address_are_replaced() {
    let mut scene = app("Always").sandbox(0, true).running("c").sandbox(1, true);
    assert_snapshot!(scene.show(2), @"
    Sync
    kill c-0 30s (SandboxChanged: Stopping container c) !
    stop sb1 + stop sb0 !
    sandbox 2 !
    event SandboxChanged: Pod sandbox changed, it will be killed and re-created.
    ");
    scene.observed.sandboxes.remove(0);
    assert_snapshot!(scene.show(2), @"Sync");
    scene.observed.sandboxes[0].ips.clear();
    assert_eq!(scene.plan(2).steps.len(), 3);
}

#[test]
fn unknown_stray_and_unstarted_instances() {
    let mut unknown = app("Never").sandbox(0, true).running("c");
    unknown.observed.containers[0].state = State::Unknown;
    assert_snapshot!(unknown.show(2), @"
    Sync
    kill c-0 30s (Unknown: Stopping container c) !
    ");
    let twice = app("Always").sandbox(0, true).running("c").ran("c", 1, 2, None);
    assert_snapshot!(twice.show(3), @"
    Sync
    kill c-0 30s (Stray: Stopping container c) !
    ");
    let mut made = app("Always").sandbox(0, true).ran("c", 3, 2, None);
    made.observed.containers[0].state = State::Created;
    assert_snapshot!(made.show(3), @"
    Sync
    remove c-3 !
    start c/3 in sb0
    ");
}

#[test]
fn the_deadline_ends_the_pod() {
    let scene =
        scene(json!({"activeDeadlineSeconds": 60, "containers": [{"name": "c"}]})).sandbox(0, true).running("c");
    assert_snapshot!(scene.show(59), @"
    Sync
    wake at 60
    ");
    assert_snapshot!(scene.show(60), @"
    Terminating
    kill c-0 30s (PodEnds: Stopping container c) !
    stop sb0 !
    event DeadlineExceeded: Pod was active on the node longer than the specified deadline
    outcome DeadlineExceeded
    ");
}

#[test]
fn the_deadline_says_nothing_of_a_pod_that_ended_before_it() {
    let mut scene =
        scene(json!({"activeDeadlineSeconds": 60, "restartPolicy": "Never", "containers": [{"name": "c"}]}))
            .sandbox(0, false)
            .ran("c", 0, 5, Some(0));
    scene.memory.last_status = Some(scene.status(6));
    assert_eq!(scene.memory.last_status.as_ref().unwrap().phase.as_deref(), Some("Succeeded"));
    // After a restart, nothing is remembered but the status.
    let plan = scene.plan(1000);
    assert_eq!((plan.events.len(), plan.termination.unwrap().outcome), (0, None));
    assert_eq!(scene.status(1000).phase.as_deref(), Some("Succeeded"));
}

#[test]
fn nothing_starts_without_volumes() {
    let mut scene = app("Always");
    let failure = Failure { reason: String::new(), message: "no ConfigMap".to_owned() };
    let due = scene.memory.failed(&Action::SetUpVolumes, failure, at(10));
    assert_eq!(due.duration_since(at(10)).as_millis(), 500);
    assert_snapshot!(scene.show(10), @"
    Sync
    wake at 10
    ");
    scene.memory.references_changed();
    assert_eq!(scene.plan(10).steps.len(), 3);
    scene.memory.volumes = Volumes::Unsupported("a CSI volume".to_owned());
    assert_snapshot!(scene.show(10), @"Sync");
}

#[test]
fn failures_to_start_wait_for_their_timers() {
    let mut scene = scene(json!({"containers": [{"name": "a", "image": "x"}, {"name": "b"}]})).sandbox(0, true);
    let plan = scene.plan(0);
    let failure = |reason: &str| Failure { reason: reason.to_owned(), message: "no route".to_owned() };
    scene.memory.failed(&plan.steps[0].actions[0], failure("ErrImagePull"), at(0));
    scene.memory.failed(&plan.steps[1].actions[0], failure("CreateContainerConfigError"), at(2));
    assert_snapshot!(scene.show(3), @r#"
    Sync
    blocked a: ImagePullBackOff: Back-off pulling image "x": ErrImagePull: no route
    blocked b: CreateContainerConfigError: no route
    event BackOff: Back-off pulling image "x"
    wake at 10
    "#);
    scene.memory.references_changed();
    assert_snapshot!(scene.show(10), @"
    Sync
    start a/0 in sb0
    start b/0 in sb0
    ");
}

#[test]
fn hooks_hold_what_comes_later() {
    let mut scene = scene(json!({"containers": [{"name": "a"}, {"name": "b"}]})).sandbox(0, true).running("a");
    scene.memory.post_start.insert("a-0".to_owned(), PostStart::Running);
    assert_snapshot!(scene.show(2), @"Sync");
    scene.memory.post_start.insert("a-0".to_owned(), PostStart::Failed);
    assert_snapshot!(scene.show(2), @"
    Sync
    kill a-0 30s (PostStart: FailedPostStartHook) !
    start b/0 in sb0
    ");
}

#[test]
fn ephemeral_containers_start_once_even_during_initialization() {
    let pod = || {
        scene(json!({"containers": [{"name": "m"}], "initContainers": [{"name": "i"}],
            "ephemeralContainers": [{"name": "debug"}]}))
        .sandbox(0, true)
        .running("i")
    };
    assert_snapshot!(pod().show(2), @"
    Sync
    start debug/0 in sb0
    ");
    assert_snapshot!(pod().ran("debug", 0, 3, Some(1)).show(4), @"Sync");
}

#[test]
fn a_restart_count_survives_the_loss_of_records() {
    let mut scene = app("Always").sandbox(0, true).ran("c", 6, 2, None);
    scene.memory.last_status = Some(scene.status(3));
    scene.observed.containers.clear();
    assert_snapshot!(scene.show(4), @"
    Sync
    start c/7 in sb0
    ");
    scene.memory.last_status = Some(scene.status(4));
    assert_snapshot!(scene.show(4), @"
    Sync
    start c/7 in sb0
    ");
}

#[test]
fn a_start_that_died_with_the_agent_is_no_restart() {
    let interrupted = || {
        let mut scene = app("Always").sandbox(0, true).ran("c", 0, 2, Some(128));
        scene.observed.containers[0].started_at = None;
        scene
    };
    let again = |mut scene: Scene| {
        scene.memory.take_back_interrupted(&mut scene.observed);
        scene.show(3)
    };
    assert_snapshot!(again(interrupted()), @"
    Sync
    remove c-0 !
    start c/0 in sb0
    ");
    // One that failed in this agent's life, or was told of in an earlier one, has been tried.
    let mut failed = interrupted();
    let hash = failed.observed.containers[0].hash;
    let (reason, message) = ("RunContainerError".to_owned(), String::new());
    failed.memory.start_errors.insert("c".to_owned(), StartError { reason, message, hash, retry_at: None });
    assert_snapshot!(again(failed), @"
    Sync
    start c/1 in sb0
    ");
    let mut told = interrupted();
    told.memory.last_status = Some(told.status(3));
    assert_snapshot!(again(told), @"
    Sync
    start c/1 in sb0
    ");
}

#[test]
fn a_stop_never_gets_less_than_two_seconds() {
    assert_eq!([stop_timeout(30, 10), stop_timeout(30, 30), stop_timeout(1, 0)], [20, 2, 2]);
}
