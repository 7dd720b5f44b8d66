//! Thousands of seeded lives of a pod on a fake runtime that fails, loses power and loses its agent at any moment.
//!
//! `SEED=n cargo test sim` replays one of them and prints what happened.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde_json::{Value, json};

use super::*;
use crate::kubelet::memory::{Failure, ProbeResult, Probes};
use crate::kubelet::status::status;

/// splitmix64
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.roll(n) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.roll(from.len() as u64)).unwrap()].clone()
    }
}

struct World {
    dice: Dice,
    calm: bool,
    now: Timestamp,
    made: u64,
    pod: Pod,
    life: Life,
    observed: Observed,
    memory: Memory,
    /// What the store holds of the last status, and whether the end was reported.
    stored: Option<PodStatus>,
    reported: bool,
    volumes: bool,
    agents: u32,
    /// The spec hashes with which each container ever ran, and the highest restart count.
    runs: BTreeMap<String, (BTreeSet<u64>, i32)>,
    /// (sandbox, container) that ended well, or began.
    ended: BTreeSet<(String, String)>,
    begun: BTreeSet<(String, String)>,
    log: Option<Vec<String>>,
}

fn random_pod(dice: &mut Dice) -> Pod {
    let probe = json!({"tcpSocket": {"port": 80}});
    let mut container = |name: String, sidecar: bool, app: bool| {
        let mut container = json!({"name": name, "image": "img:1"});
        if sidecar {
            container["restartPolicy"] = json!("Always");
        }
        if (sidecar || app) && dice.one_in(3) {
            container["livenessProbe"] = probe.clone();
        }
        if (sidecar || app) && dice.one_in(4) {
            container["startupProbe"] = probe.clone();
        }
        if dice.one_in(3) {
            container["lifecycle"] = json!({"preStop": {"exec": {"command": ["x"]}}});
        }
        (container, dice.roll(2) == 0)
    };
    let mut inits: Vec<Value> = Vec::new();
    for index in 0..3 {
        let (plain, include) = container(format!("i{index}"), false, false);
        if include {
            inits.push(plain);
        }
        let (sidecar, include) = container(format!("s{index}"), true, false);
        if include {
            inits.push(sidecar);
        }
    }
    let mut apps = vec![container("a0".to_owned(), false, true).0];
    for index in 1..3 {
        let (app, include) = container(format!("a{index}"), false, true);
        if include {
            apps.push(app);
        }
    }
    let mut spec = json!({"restartPolicy": dice.pick(&["Always", "OnFailure", "Never"]), "initContainers": inits,
        "containers": apps, "hostNetwork": dice.one_in(4), "terminationGracePeriodSeconds": dice.roll(40)});
    if dice.one_in(6) {
        spec["activeDeadlineSeconds"] = json!(60 + dice.roll(600));
    }
    let meta = json!({"name": "p", "namespace": "n", "uid": "u", "generation": 1});
    serde_json::from_value(json!({"metadata": meta, "spec": spec})).unwrap()
}

enum Outcome {
    Fine,
    Failed(&'static str),
    AgentDied,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let pod = random_pod(&mut dice);
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let mut world = Self {
            dice,
            calm: false,
            now,
            made: 0,
            pod,
            life: Life::Wanted,
            observed: Observed::default(),
            memory: Memory::default(),
            stored: None,
            reported: false,
            volumes: false,
            agents: 0,
            runs: BTreeMap::new(),
            ended: BTreeSet::new(),
            begun: BTreeSet::new(),
            log: None,
        };
        world.memory.accept(now);
        world
    }

    fn say(&mut self, what: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(format!("{:>5} {}", self.now.as_second() - 1_800_000_000, what()));
        }
    }

    fn chance(&mut self, n: u64) -> bool {
        !self.calm && self.dice.one_in(n)
    }

    fn pass(&mut self, seconds: i64) {
        self.now += SignedDuration::from_secs(seconds);
    }

    /// One round of the shell's loop. Returns the plan if there was nothing to do.
    fn turn(&mut self) -> Option<Plan> {
        self.memory.prune(&self.observed);
        self.memory.take_back_interrupted(&mut self.observed);
        let plan = plan(&self.pod, self.life, &self.observed, &self.memory, self.now);
        let known: BTreeSet<String> = self.observed.containers.iter().map(|instance| instance.id.clone()).collect();
        self.memory.note(&plan);
        let again = super::plan(&self.pod, self.life, &self.observed, &self.memory, self.now);
        assert_eq!(plan.steps, again.steps, "noting a plan changed it");
        self.report(&plan);
        if plan.steps.is_empty() {
            return Some(plan);
        }
        'plan: for step in &plan.steps {
            let mut failed = false;
            for action in &step.actions {
                if self.chance(60) {
                    self.restart_agent();
                    break 'plan;
                }
                let agents = self.agents;
                self.disturb();
                if agents != self.agents {
                    break 'plan;
                }
                self.memory.before(action, self.now);
                match self.act(action, &plan, &known) {
                    Outcome::Fine => self.memory.done(action),
                    Outcome::Failed(reason) => {
                        self.say(|| format!("failed ({reason}): {action:?}"));
                        let failure = Failure { reason: reason.to_owned(), message: "it broke".to_owned() };
                        let retry = self.memory.failed(action, failure, self.now);
                        assert!(retry > self.now);
                        failed = true;
                    }
                    Outcome::AgentDied => {
                        self.restart_agent();
                        break 'plan;
                    }
                }
            }
            if failed && step.must {
                self.pass(1);
                break;
            }
        }
        None
    }

    fn report(&mut self, plan: &Plan) {
        if self.life == Life::Orphan {
            return;
        }
        let ips = [IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1))];
        let new = status(&self.pod, self.life, &self.observed, &self.memory, &ips, self.now);
        let phase = new.phase.clone().unwrap();
        if is_terminal_phase(&phase) {
            assert!(!self.observed.is_alive(), "{phase} while something runs");
            assert!(plan.stage >= Stage::Terminated, "{phase} at {:?}", plan.stage);
            for container in new.container_statuses.iter().flatten() {
                assert!(container.state.as_ref().unwrap().terminated.is_some(), "{container:?}");
                assert!(!container.ready);
            }
        }
        if let Some(old) = &self.stored {
            let before = old.phase.as_deref().unwrap();
            assert!(!is_terminal_phase(before) || before == phase, "{before} became {phase}");
            for (old, new) in [
                (&old.container_statuses, &new.container_statuses),
                (&old.init_container_statuses, &new.init_container_statuses),
            ] {
                for (old, new) in old.iter().flatten().zip(new.iter().flatten()) {
                    assert!(new.restart_count >= old.restart_count, "{old:?} became {new:?}");
                }
            }
        }
        self.memory.last_status = Some(new.clone());
        if !self.chance(40) {
            self.stored = Some(new);
        }
    }

    fn act(&mut self, action: &Action, plan: &Plan, known: &BTreeSet<String>) -> Outcome {
        self.say(|| format!("{action:?}"));
        match action {
            Action::SetUpVolumes => {
                if self.chance(10) {
                    return Outcome::Failed("");
                }
                self.volumes = true;
            }
            Action::CreateSandbox { attempt } => {
                assert_eq!(plan.stage, Stage::Sync);
                self.pass(1);
                let fails = self.chance(10);
                if fails && self.dice.one_in(2) {
                    return Outcome::Failed("");
                }
                self.made += 1;
                let host_network = self.pod.spec.as_ref().unwrap().host_network == Some(true);
                let ips = if host_network || self.chance(30) { vec![] } else { vec!["10.1.0.9".parse().unwrap()] };
                assert!(self.observed.sandboxes.iter().all(|other| other.attempt < *attempt), "the attempt grows");
                let id = format!("sb{}", self.made);
                let pod = Default::default();
                let sandbox =
                    Sandbox { id, pod, attempt: *attempt, ready: !fails, created_at: self.now, ips, host_network };
                self.observed.sandboxes.insert(0, sandbox);
                if fails {
                    return Outcome::Failed("");
                }
            }
            Action::StartContainer { kind, index, name, hash, restart_count, sandbox, .. } => {
                assert_eq!(plan.stage, Stage::Sync);
                assert!(self.volumes, "{name} without volumes");
                return self.start(*kind, *index, name, *hash, *restart_count, sandbox.as_deref());
            }
            Action::KillContainer { id, grace, .. } => {
                assert!(known.contains(id) && *grace >= 1);
                if self.chance(15) {
                    return Outcome::Failed("");
                }
                self.pass(1);
                let (now, code) = (self.now, self.dice.pick(&[0, 137, 143]));
                let instance = self.observed.containers.iter_mut().find(|instance| instance.id == *id).unwrap();
                if is_alive(instance) {
                    exit(instance, code, now);
                }
            }
            Action::StopSandbox { id } => {
                if self.chance(15) {
                    return Outcome::Failed("");
                }
                let now = self.now;
                self.observed.sandboxes.iter_mut().find(|sandbox| sandbox.id == *id).unwrap().ready = false;
                for instance in &mut self.observed.containers {
                    if instance.sandbox == *id && is_alive(instance) {
                        exit(instance, 137, now);
                    }
                }
            }
            Action::RemoveContainer { id, .. } => {
                assert!(known.contains(id));
                let instance = self.observed.containers.iter().find(|instance| instance.id == *id).unwrap();
                assert!(!is_alive(instance), "{instance:?} is removed");
                if self.chance(20) {
                    return Outcome::Failed("");
                }
                self.observed.containers.retain(|instance| instance.id != *id);
            }
            Action::RemoveSandbox { id } => {
                let holds =
                    |instance: &Instance| instance.sandbox == *id && (is_alive(instance) || self.life == Life::Wanted);
                if self.observed.containers.iter().any(|instance| instance.sandbox == *id) {
                    // Only after a failed removal of its containers, which the runtime then does itself.
                    assert!(!self.observed.containers.iter().any(|instance| holds(instance) && is_alive(instance)));
                }
                self.observed.containers.retain(|instance| instance.sandbox != *id);
                self.observed.sandboxes.retain(|sandbox| sandbox.id != *id);
            }
            Action::TearDown => {
                assert!(!self.observed.is_alive(), "volumes go under a running container");
                if self.chance(10) {
                    return Outcome::Failed("");
                }
                self.volumes = false;
            }
            Action::ReportFinished => {
                assert!(!self.observed.is_alive() && !self.volumes && self.life == Life::Deleting);
                let phase = self.memory.last_status.as_ref().and_then(|status| status.phase.as_deref()).unwrap();
                assert!(is_terminal_phase(phase));
                self.stored = self.memory.last_status.clone();
                self.reported = true;
            }
        }
        Outcome::Fine
    }

    fn start(
        &mut self,
        kind: Kind,
        index: usize,
        name: &str,
        hash: u64,
        restart_count: i32,
        sandbox: Option<&str>,
    ) -> Outcome {
        let ready = self.observed.sandboxes.first().filter(|sandbox| sandbox.ready).map(|sandbox| sandbox.id.clone());
        let Some(own) = ready.filter(|ready| sandbox.is_none_or(|sandbox| sandbox == ready)) else {
            return Outcome::Failed("CreateContainerError");
        };
        let twin = self.observed.containers.iter().find(|other| other.name == name && is_alive(other));
        assert!(twin.is_none(), "{name} runs already: {twin:?}");
        let taken =
            self.observed.containers.iter().any(|other| {
                other.name == name && other.restart_count == restart_count && other.state == State::Created
            });
        assert!(!taken, "the name of {name} is taken");
        let spec = Spec::new(&self.pod);
        let before = spec.inits().into_iter().filter(|init| kind == Kind::App || init.index < index);
        for init in before {
            let key = (own.clone(), init.name.to_owned());
            let passed = if init.kind == Kind::Init { &self.ended } else { &self.begun };
            assert!(passed.contains(&key), "{name} before {}", init.name);
        }
        if kind != Kind::App {
            let apps = spec.apps();
            let running = apps
                .iter()
                .any(|app| self.observed.newest(app.name).is_some_and(|app| app.sandbox == own && is_alive(app)));
            assert!(kind == Kind::Sidecar || !running, "{name} beside regular containers");
        }
        let (mut runs, highest) = self.runs.get(name).cloned().unwrap_or_default();
        assert!(restart_count >= highest, "restart count of {name} fell from {highest} to {restart_count}");
        if kind == Kind::App && spec.restart_policy() == RestartPolicy::Never {
            // Only another image is a reason.
            assert!(!runs.contains(&hash), "{name} of a Never pod runs again");
        }
        if self.chance(12) {
            return Outcome::Failed(self.dice.pick(&["ErrImagePull", "CreateContainerConfigError"]));
        }
        self.pass(1);
        self.made += 1;
        let instance = Instance {
            id: format!("c{}", self.made),
            sandbox: own.clone(),
            name: name.to_owned(),
            restart_count,
            state: State::Created,
            hash,
            image: "img".to_owned(),
            image_id: "sha".to_owned(),
            created_at: self.now,
            started_at: None,
            finished_at: None,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            grace_period: Some(5),
            log_path: String::new(),
        };
        self.observed.containers.insert(0, instance);
        if self.chance(40) {
            if self.chance(2) {
                // With it, what the runtime was asked for.
                let now = self.now;
                exit(&mut self.observed.containers[0], 128, now);
            }
            return Outcome::AgentDied;
        }
        runs.insert(hash);
        self.runs.insert(name.to_owned(), (runs, restart_count));
        self.begun.insert((own, name.to_owned()));
        let (now, broken) = (self.now, self.chance(25));
        let instance = &mut self.observed.containers[0];
        instance.started_at = Some(now);
        instance.state = State::Running;
        if broken {
            exit(instance, 128, now);
            return Outcome::Failed("RunContainerError");
        }
        Outcome::Fine
    }

    fn restart_agent(&mut self) {
        self.agents += 1;
        self.say(|| "the agent is restarted".to_owned());
        self.memory = Memory::restored(self.stored.clone());
        self.memory.accept(self.now);
        self.memory.finished = self.reported;
        if self.life == Life::Removed && self.dice.one_in(2) {
            self.say(|| "it knows nothing of the pod".to_owned());
            self.life = Life::Orphan;
            self.pod.spec = None;
        }
    }

    /// Something happens to what runs.
    fn disturb(&mut self) {
        let now = self.now;
        for index in 0..self.observed.containers.len() {
            let instance = &self.observed.containers[index];
            if instance.state != State::Running {
                continue;
            }
            let (id, name, sandbox) = (instance.id.clone(), instance.name.clone(), instance.sandbox.clone());
            let view = Spec::new(&self.pod)
                .find(&name)
                .map(|view| (view.kind, view.startup_probe().is_some(), view.liveness_probe().is_some()));
            let Some((kind, startup, liveness)) = view else { continue };
            if (kind == Kind::Init && (self.calm || self.dice.one_in(3))) || self.chance(25) {
                let code = if self.calm || (kind == Kind::Init && !self.dice.one_in(4)) {
                    0
                } else {
                    self.dice.pick(&[0, 1, 137])
                };
                if code == 0 {
                    self.ended.insert((sandbox, name.clone()));
                }
                exit(&mut self.observed.containers[index], code, now);
                self.say(|| format!("{name} ({id}) exits {code}"));
                continue;
            }
            if startup && (self.calm || self.dice.one_in(3)) {
                let result = if self.chance(4) { ProbeResult::Failure } else { ProbeResult::Success };
                self.memory.probes.entry(id.clone()).or_default().startup = Some(result);
            }
            if liveness && self.chance(15) {
                let probes = Probes { liveness: Some(ProbeResult::Failure), ..Probes::default() };
                self.memory.probes.insert(id, probes);
            }
        }
        if self.chance(80) {
            self.power_cycle();
        }
        if self.chance(80)
            && let Some(sandbox) = self.observed.sandboxes.first_mut()
        {
            sandbox.ready = false;
            let id = sandbox.id.clone();
            let now = self.now;
            for instance in self.observed.containers.iter_mut().filter(|instance| instance.sandbox == id) {
                if instance.state == State::Running && self.dice.one_in(2) {
                    exit(instance, 137, now);
                }
            }
            self.say(|| "the sandbox dies".to_owned());
        }
    }

    fn power_cycle(&mut self) {
        self.say(|| "power is lost".to_owned());
        let now = self.now;
        for sandbox in &mut self.observed.sandboxes {
            sandbox.ready = false;
        }
        for instance in self.observed.containers.iter_mut().filter(|instance| is_alive(instance)) {
            if self.dice.one_in(4) {
                instance.state = State::Unknown;
            } else {
                exit(instance, 255, now);
            }
        }
        self.volumes = false;
        self.restart_agent();
    }

    /// The user does something.
    fn user(&mut self) {
        match self.dice.roll(4) {
            0 if self.life == Life::Wanted => {
                let grace = i64::try_from(self.dice.roll(40)).unwrap();
                self.say(|| format!("deleted with grace {grace}"));
                let mut pod = serde_json::to_value(&self.pod).unwrap();
                pod["metadata"]["deletionTimestamp"] = json!("2027-01-01T00:00:00Z");
                pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
                self.pod = serde_json::from_value(pod).unwrap();
                self.life = Life::of(&self.pod);
            }
            1 if self.life == Life::Deleting => {
                self.pod.metadata.deletion_grace_period_seconds = Some(1);
                self.say(|| "deleted again".to_owned());
            }
            2 if self.life != Life::Orphan => {
                self.say(|| "removed".to_owned());
                self.life = Life::Removed;
            }
            3 if self.life == Life::Wanted => {
                let image = format!("img:{}", self.dice.roll(100));
                self.say(|| format!("image becomes {image}"));
                self.pod.spec.as_mut().unwrap().containers[0].image = Some(image);
            }
            _ => {}
        }
    }

    fn live(&mut self) {
        for _ in 0..40 + self.dice.roll(60) {
            if self.turn().is_some() {
                let seconds = i64::try_from(self.dice.roll(30)).unwrap();
                self.pass(seconds);
            }
            self.disturb();
            if self.dice.one_in(40) {
                self.user();
            }
        }
        self.calm = true;
        for _ in 0..400 {
            self.disturb();
            let Some(plan) = self.turn() else { continue };
            match plan.wake_at {
                Some(wake) => self.now = wake.max(self.now + SignedDuration::from_secs(1)),
                None if self.observed.containers.iter().any(|instance| self.is_young(instance)) => self.pass(1),
                None => return self.judge(&plan),
            }
        }
        panic!("it never comes to rest");
    }

    /// It will change by itself.
    fn is_young(&self, instance: &Instance) -> bool {
        instance.state == State::Running
            && Spec::new(&self.pod).find(&instance.name).is_some_and(|view| {
                let probes = self.memory.probes.get(&instance.id).copied().unwrap_or_default();
                view.kind == Kind::Init
                    || (view.startup_probe().is_some() && probes.startup != Some(ProbeResult::Success))
            })
    }

    fn judge(&self, plan: &Plan) {
        assert_eq!(plan.blocked, [], "blocked without a time to wake");
        assert!(self.observed.sandboxes.iter().filter(|sandbox| sandbox.ready).count() <= 1);
        if self.life.is_over() {
            assert_eq!(plan.stage, Stage::Finished);
            assert_eq!(self.observed, Observed::default());
            assert!(!self.volumes);
            assert!(self.reported || self.life != Life::Deleting);
            return;
        }
        let phase = self.memory.last_status.as_ref().and_then(|status| status.phase.clone()).unwrap();
        if plan.stage == Stage::Sync {
            assert_eq!(phase, "Running");
            let spec = Spec::new(&self.pod);
            let mut kept = spec.apps();
            kept.extend(spec.inits().into_iter().filter(|view| view.kind == Kind::Sidecar));
            for view in kept {
                let newest = self.observed.newest(view.name).unwrap();
                assert!(newest.state == State::Running || !view.restarts(newest.exit_code), "{} is down", view.name);
            }
        } else {
            assert_eq!(plan.stage, Stage::Terminated);
            assert!(is_terminal_phase(&phase) && !self.volumes);
            assert!(
                self.pod.spec.as_ref().unwrap().active_deadline_seconds.is_some()
                    || Spec::new(&self.pod).restart_policy() != RestartPolicy::Always
            );
        }
        for name in Spec::new(&self.pod).all().iter().map(|view| view.name) {
            let dead = self
                .observed
                .containers
                .iter()
                .filter(|instance| instance.name == name && instance.state == State::Exited);
            assert!(dead.count() <= 1, "{name} leaves more than one dead instance");
        }
    }
}

fn exit(instance: &mut Instance, code: i32, now: Timestamp) {
    instance.state = State::Exited;
    instance.exit_code = code;
    instance.finished_at = Some(now);
}

fn outlives(seed: u64, tell: bool) -> bool {
    let mut world = World::new(seed);
    world.log = tell.then(Vec::new);
    let survived = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.live())).is_ok();
    if let Some(log) = world.log {
        eprintln!("{}\n{}", serde_json::to_string_pretty(&world.pod.spec).unwrap(), log.join("\n"));
    }
    survived
}

#[test]
fn any_life_keeps_the_invariants() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("SEED") {
        assert!(outlives(seed, true), "SEED={seed}");
        return;
    }
    for seed in 0..number("SEEDS").unwrap_or(1000) {
        if !outlives(seed, false) {
            outlives(seed, true);
            panic!("replay with SEED={seed}");
        }
    }
}
