use super::*;

const MINUTE: Duration = Duration::from_secs(60);

fn machine() -> Machine {
    Machine { architecture: "arm64", cpus: 4, memory: 1 << 30, ..Default::default() }
}

fn resources() -> Resources {
    Resources {
        cpus: 4,
        memory: 1 << 30,
        ephemeral_storage: 10_000,
        pods: 110,
        hugepages: BTreeMap::from([("2Mi".to_owned(), 2 << 20)]),
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::new(1_800_000_000 + second, 123_456_789).unwrap_or_default()
}

fn healthy() -> Result<Health, Error> {
    Ok(Health::default())
}

fn compute(
    health: &Result<Health, Error>,
    pressures: Pressures,
    previous: Option<&NodeStatus>,
    now: Timestamp,
) -> NodeStatus {
    let (machine, capacity) = (machine(), resources());
    let version = RuntimeVersion { name: "containerd".into(), version: "1.6.20".into() };
    let inputs = Inputs {
        machine: &machine,
        capacity: &capacity,
        pressures,
        health,
        faults: &[],
        version: Some(&version),
        images: &[],
        broker: None,
    };
    status(&inputs, previous, now)
}

#[test]
fn allocatable_leaves_what_eviction_keeps_free() {
    let status = compute(&healthy(), Pressures::default(), None, at(0));
    let text = |of: &Option<BTreeMap<String, Quantity>>, key: &str| {
        of.as_ref().map(|all| all[key].0.clone()).unwrap_or_default()
    };
    assert_eq!(text(&status.capacity, "memory"), "1048576Ki");
    assert_eq!(text(&status.allocatable, "memory"), format!("{}Ki", 1_048_576 - 102_400 - 2048));
    assert_eq!(text(&status.allocatable, "ephemeral-storage"), "9000");
    assert_eq!(text(&status.capacity, "hugepages-2Mi"), "2048Ki");
    let info = status.node_info.unwrap_or_default();
    assert_eq!(info.container_runtime_version, "containerd://1.6.20");
    assert!(info.kubelet_version.starts_with("v1.36.3+skerry-"));
}

#[test]
fn what_a_runtime_can_is_told_as_far_as_pods_may_have_it() {
    let features = cri::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: true };
    let handler = |name: &str, features| cri::RuntimeHandler { name: name.to_owned(), features };
    let handlers = vec![handler("", Some(features)), handler("runsc", None)];
    let health = Health { handlers, supplemental_groups_policy: Some(true), ..Default::default() };
    let paths = Paths { pods_root: PathBuf::new(), logs_root: PathBuf::new(), log_links: PathBuf::new() };
    let facts = facts("box", &resources(), Vec::new(), paths, &Setup::default(), Some(&health));
    assert_eq!(facts.runtime_handlers, ["", "runsc"]);
    assert_eq!((facts.recursive_read_only, facts.strict_groups), (vec![String::new()], true));
    let told = serde_json::to_value(compute(&Ok(health), Pressures::default(), None, at(0))).unwrap();
    assert_eq!(
        told["runtimeHandlers"],
        serde_json::json!([
            {"name": "", "features": {"recursiveReadOnlyMounts": true, "userNamespaces": false}},
            {"name": "runsc"},
        ])
    );
    assert_eq!(told["features"], serde_json::json!({"supplementalGroupsPolicy": true}));
}

#[test]
fn the_hostname_label_is_the_nodes_name_where_it_fits() {
    let of = |name: &str| labels(name, &machine());
    assert_eq!(of("box-1.site")["kubernetes.io/hostname"], "box-1.site");
    assert_eq!(of("box-1.site")["kubernetes.io/arch"], "arm64");
    let long = format!("{}.site", "x".repeat(60));
    assert!(!of(&long).contains_key("kubernetes.io/hostname"));
}

#[test]
fn conditions_keep_the_time_of_their_last_change() {
    let first = compute(&healthy(), Pressures::default(), None, at(0));
    let second = compute(&healthy(), Pressures { disk: true, ..Default::default() }, Some(&first), at(60));
    let conditions = |status: &NodeStatus| status.conditions.clone().unwrap_or_default();
    let kinds: Vec<_> = conditions(&first).into_iter().map(|one| one.type_).collect();
    assert_eq!(kinds, ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"]);
    let disk = &conditions(&second)[1];
    assert_eq!((disk.status.as_str(), disk.message.as_deref()), ("True", Some("kubelet has disk pressure")));
    assert_ne!(disk.last_transition_time, conditions(&first)[1].last_transition_time);
    let ready = &conditions(&second)[3];
    assert_eq!(ready.last_transition_time, conditions(&first)[3].last_transition_time);
    assert_ne!(ready.last_heartbeat_time, conditions(&first)[3].last_heartbeat_time);
    assert_eq!(serde_json::to_value(ready).unwrap_or_default()["lastHeartbeatTime"], "2027-01-15T08:01:00Z");
}

#[test]
fn a_broker_is_spoken_of_only_where_one_is_needed() {
    let (machine, capacity, health) = (machine(), resources(), healthy());
    let of = |broker: Option<&mqtt::Status>, previous: Option<&NodeStatus>, second| {
        let inputs = Inputs {
            machine: &machine,
            capacity: &capacity,
            pressures: Pressures::default(),
            health: &health,
            faults: &[],
            version: None,
            images: &[],
            broker,
        };
        status(&inputs, previous, at(second))
    };
    let told = |status: &NodeStatus| {
        let all = status.conditions.clone().unwrap_or_default();
        all.into_iter().find(|one| one.type_ == BROKER_CONDITION).map(|one| {
            (one.status, one.reason.unwrap_or_default(), one.message.unwrap_or_default(), one.last_transition_time)
        })
    };
    let mut broker = mqtt::Status::default();
    let without = of(None, None, 0);
    assert_eq!(told(&without), None);
    let starts = told(&of(Some(&broker), None, 0)).unwrap();
    assert_eq!((starts.0.as_str(), starts.1.as_str()), ("Unknown", "NotTriedYet"));
    (broker.is_missed, broker.message) = (true, "no broker; install one".to_owned());
    let missing = of(Some(&broker), Some(&without), 10);
    let since = Some(Time(whole_second(at(10))));
    let words = |status: &str, reason: &str, message: &str, since| {
        Some((status.to_owned(), reason.to_owned(), message.to_owned(), since))
    };
    assert_eq!(told(&missing), words("False", "NoBroker", "no broker; install one", since));
    assert!(due(Some(MINUTE), MINUTE, &without, &missing) && due(Some(MINUTE), MINUTE, &missing, &without));
    let still = of(Some(&broker), Some(&missing), 20);
    assert_eq!(told(&still), told(&missing));
    assert!(!due(Some(MINUTE), MINUTE, &missing, &still));
    (broker.connected, broker.message) = (true, "127.0.0.1:1883".to_owned());
    let there = of(Some(&broker), Some(&still), 30);
    assert_eq!(told(&there), words("True", "BrokerConnected", "127.0.0.1:1883", Some(Time(whole_second(at(30))))));
}

#[test]
fn not_ready_says_everything_that_is_wrong() {
    let health = Ok(Health { runtime: Some("a".into()), network: Some("b".into()), ..Default::default() });
    let status = compute(&health, Pressures::default(), None, at(0));
    let ready = status.conditions.unwrap_or_default().remove(3);
    assert_eq!((ready.status.as_str(), ready.reason.as_deref()), ("False", Some("KubeletNotReady")));
    assert_eq!(
        ready.message.as_deref(),
        Some("[container runtime not ready: a, container runtime network not ready: b]")
    );
}

#[test]
fn reported_when_something_is_different_or_after_fifteen_minutes() {
    let old = compute(&healthy(), Pressures::default(), None, at(0));
    let same = compute(&healthy(), Pressures::default(), Some(&old), at(10));
    let other = compute(&healthy(), Pressures { pids: true, ..Default::default() }, Some(&old), at(10));
    assert!(due(None, MINUTE, &old, &old));
    assert!(!due(Some(MINUTE), 2 * MINUTE, &old, &same));
    assert!(due(Some(MINUTE), 2 * MINUTE, &old, &other));
    assert!(!due(Some(MINUTE), 15 * MINUTE, &old, &same));
    assert!(due(Some(MINUTE), 16 * MINUTE, &old, &same));
}

#[test]
fn a_pressure_stays_for_five_minutes() {
    let fine = Load { memory_available: 1 << 30, pids: 100, pids_max: 4096, ..Default::default() };
    let disk = Disk { capacity: 1000, available: 99, inodes: 0, inodes_free: 0 };
    let mut pressure = Pressure::default();
    assert_eq!(pressure.observe(MINUTE, &fine), Pressures::default());
    let bad = Load { memory_available: 99 << 20, pods_disk: Some(disk), pids: 4000, ..fine };
    assert_eq!(pressure.observe(2 * MINUTE, &bad), Pressures { memory: true, disk: true, pids: true });
    let better = Load { pids: 4000, ..fine };
    assert_eq!(pressure.observe(6 * MINUTE, &better), Pressures { memory: true, disk: true, pids: true });
    assert_eq!(pressure.observe(7 * MINUTE, &fine), Pressures { pids: true, ..Default::default() });
    let few_inodes = Disk { capacity: 1000, available: 900, inodes: 100, inodes_free: 4 };
    let bad = Load { image_disk: Some(few_inodes), ..fine };
    assert_eq!(pressure.observe(20 * MINUTE, &bad), Pressures { disk: true, ..Default::default() });
}

#[test]
fn the_fifty_largest_images_digests_first() {
    let image = |n: u64| cri::Image {
        id: n.to_string(),
        size: n,
        repo_tags: vec![format!("t{n}")],
        repo_digests: (0..5).map(|d| format!("d{n}.{d}")).collect(),
        ..Default::default()
    };
    let mut all: Vec<_> = (0..60).map(image).collect();
    all.push(cri::Image { size: 999, ..Default::default() });
    let listed = images(&all);
    assert_eq!((listed.len(), listed[0].size_bytes), (50, Some(59)));
    assert_eq!(listed[0].names.as_ref().map(Vec::len), Some(5));
    assert!(listed[0].names.iter().flatten().all(|name| name.starts_with('d')));
}
