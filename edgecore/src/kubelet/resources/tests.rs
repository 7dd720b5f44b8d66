use serde_json::{Value, json};

use super::*;
use crate::kubelet::container_config::fixtures::{machine, node};

fn pod(spec: Value) -> Pod {
    let mut pod: Pod =
        serde_json::from_value(json!({"metadata": {"name": "p", "uid": "a-b-c"}, "spec": {"containers": []}})).unwrap();
    pod.spec = serde_json::from_value(spec).unwrap();
    pod
}

fn container(name: &str, requests: Value, limits: Value) -> Value {
    json!({"name": name, "resources": {"requests": requests, "limits": limits}})
}

fn sidecar(name: &str, requests: Value, limits: Value) -> Value {
    let mut container = container(name, requests, limits);
    container["restartPolicy"] = json!("Always");
    container
}

fn one(requests: Value, limits: Value) -> Pod {
    pod(json!({"containers": [container("c", requests, limits)]}))
}

#[test]
fn classes() {
    let full = json!({"cpu": "1", "memory": "1Gi"});
    let same = json!({"cpu": "1000m", "memory": "1024Mi"});
    for (expected, spec) in [
        (Qos::BestEffort, json!({"containers": [{"name": "c"}]})),
        (
            Qos::BestEffort,
            json!({"containers": [container("c", json!({"cpu": "0"}), json!({"ephemeral-storage": "1Gi"}))]}),
        ),
        (Qos::Guaranteed, json!({"containers": [container("c", full.clone(), same.clone())]})),
        (Qos::Guaranteed, json!({"containers": [container("c", json!({}), full.clone())]})),
        (
            Qos::Guaranteed,
            json!({"containers": [container("c", full.clone(), same.clone()), container("d", same.clone(), full.clone())]}),
        ),
        (Qos::Burstable, json!({"containers": [container("c", full.clone(), same.clone()), {"name": "d"}]})),
        (
            Qos::Burstable,
            json!({"containers": [container("c", full.clone(), full.clone())], "initContainers": [{"name": "i"}]}),
        ),
        (Qos::Burstable, json!({"containers": [container("c", json!({"cpu": "1m"}), json!({}))]})),
        (
            Qos::Burstable,
            json!({"containers": [container("c", json!({"cpu": "500m", "memory": "1Gi"}), full.clone())]}),
        ),
        (Qos::Burstable, json!({"containers": [container("c", json!({}), json!({"memory": "1Gi"}))]})),
        (Qos::Guaranteed, json!({"containers": [{"name": "c"}], "resources": {"requests": full, "limits": same}})),
        (
            Qos::Burstable,
            json!({"containers": [container("c", full.clone(), full)], "resources": {"requests": {"cpu": "2"}}}),
        ),
        (Qos::Burstable, json!({"containers": [container("c", json!({"cpu": "nonsense"}), json!({}))]})),
    ] {
        assert_eq!(qos_class(&pod(spec.clone())), expected, "{spec}");
    }
    let mut told = one(json!({"cpu": "1"}), json!({}));
    told.status = serde_json::from_value(json!({"qosClass": "Guaranteed"})).unwrap();
    assert_eq!(qos_class(&told), Qos::Guaranteed);
    assert_eq!(qos_class(&Pod::default()), Qos::BestEffort);
}

#[test]
fn effective_requests_are_those_of_the_worst_moment() {
    let cpu = |spec: Value| pod_requests(&pod(spec)).unwrap().cpu_milli();
    let run = |name: &str, cpu: &str| container(name, json!({"cpu": cpu}), json!({}));
    let side = |name: &str, cpu: &str| sidecar(name, json!({"cpu": cpu}), json!({}));
    let two = json!([run("a", "100m"), run("b", "200m")]);
    assert_eq!(cpu(json!({"containers": two})), 300);
    assert_eq!(cpu(json!({"containers": two, "initContainers": [run("i", "250m"), run("j", "50m")]})), 300);
    assert_eq!(cpu(json!({"containers": two, "initContainers": [run("i", "250m"), run("j", "700m")]})), 700);
    assert_eq!(cpu(json!({"containers": two, "initContainers": [side("s", "50m"), run("j", "700m")]})), 750);
    assert_eq!(cpu(json!({"containers": two, "initContainers": [run("j", "700m"), side("s", "50m")]})), 700);
    assert_eq!(cpu(json!({"containers": two, "initContainers": [side("s", "500m"), side("t", "50m")]})), 850);
    assert_eq!(cpu(json!({"containers": two, "overhead": {"cpu": "10m"}})), 310);
    assert_eq!(
        cpu(json!({"containers": two, "overhead": {"cpu": "10m"}, "resources": {"requests": {"cpu": "1"}}})),
        1010
    );
    let limits = pod_limits(&pod(json!({
        "containers": [container("a", json!({}), json!({"cpu": "1", "memory": "0"}))],
        "overhead": {"cpu": "10m", "memory": "1Mi", "ephemeral-storage": "1Gi"}
    })))
    .unwrap();
    assert_eq!((limits.cpu_milli(), limits.memory(), limits.get("ephemeral-storage")), (1010, 0, Amount::ZERO));
}

#[test]
fn containers() {
    let of =
        |pod: &Pod| container_resources(pod, &pod.spec.as_ref().unwrap().containers[0], &node(), &machine()).unwrap();
    for (requests, limits, shares, quota, memory) in [
        (json!({}), json!({}), 2, 0, 0),
        (json!({"cpu": "0"}), json!({}), 2, 0, 0),
        (json!({"cpu": "1m"}), json!({}), 2, 0, 0),
        (json!({"cpu": "250m", "memory": "1Mi"}), json!({"cpu": "1", "memory": "64Mi"}), 256, 100_000, 67_108_864),
        (json!({}), json!({"cpu": "500m"}), 512, 50_000, 0),
        (json!({"cpu": "0"}), json!({"cpu": "5m"}), 2, 1000, 0),
        (json!({"cpu": "1000"}), json!({}), 262_144, 0, 0),
        (json!({}), json!({"memory": "1k"}), 2, 0, 1000),
    ] {
        let found = of(&one(requests.clone(), limits.clone()));
        assert_eq!(
            (found.cpu_shares, found.cpu_quota, found.cpu_period, found.memory_limit_in_bytes),
            (shares, quota, 100_000, memory),
            "{requests} {limits}"
        );
    }
    let whole = pod(json!({
        "containers": [container("c", json!({}), json!({"memory": "1Mi"}))],
        "resources": {"limits": {"cpu": "2", "memory": "1Gi"}}
    }));
    let found = of(&whole);
    assert_eq!((found.cpu_shares, found.cpu_quota, found.memory_limit_in_bytes), (2048, 200_000, 1 << 20));
    let unreadable = one(json!({}), json!({"memory": "1X"}));
    let container = &unreadable.spec.as_ref().unwrap().containers[0];
    assert!(container_resources(&unreadable, container, &node(), &machine()).is_err());
}

#[test]
fn swap_and_huge_pages() {
    let pod = one(json!({}), json!({"memory": "64Mi", "hugepages-2Mi": "4Mi", "hugepages-64Ki": "1Mi"}));
    let container = &pod.spec.as_ref().unwrap().containers[0];
    let on = |machine: &Machine| container_resources(&pod, container, &node(), machine).unwrap();
    let v2 = on(&machine());
    assert_eq!(
        v2.unified,
        HashMap::from([("memory.oom.group", "1"), ("memory.swap.max", "0")].map(|(k, v)| (k.into(), v.into())))
    );
    assert_eq!(v2.memory_swap_limit_in_bytes, 0);
    let pages = |size: &str, limit| cri::HugepageLimit { page_size: size.to_owned(), limit };
    assert_eq!(v2.hugepage_limits, [pages("2MB", 4 << 20), pages("1GB", 0)]);
    let without_swap = on(&Machine { swap_accounting: false, ..machine() });
    assert_eq!(without_swap.unified.len(), 1);
    let v1 = on(&Machine { cgroup_v2: false, ..machine() });
    assert!(v1.unified.is_empty());
    assert_eq!(v1.memory_swap_limit_in_bytes, 64 << 20);
    let entries =
        ["hugepages-1048576kB", "hugepages-2048kB", "hugepages-64kB", "hugepages-2048kB", "junk", "hugepages-xkB"];
    assert_eq!(hugepage_sizes(entries), ["64KB", "2MB", "1GB"]);
}

#[test]
fn oom_scores() {
    let score = |spec: Value, index: usize| {
        let pod = pod(spec);
        let spec = pod.spec.as_ref().unwrap();
        let all: Vec<_> = spec.containers.iter().chain(spec.init_containers.iter().flatten()).collect();
        oom_score_adj(&pod, all[index], &node(), &machine()).unwrap()
    };
    let asks = |memory: &str| json!([container("c", json!({"memory": memory}), json!({}))]);
    assert_eq!(score(json!({"containers": [{"name": "c"}]}), 0), 1000);
    assert_eq!(
        score(json!({"containers": [container("c", json!({}), json!({"cpu": "1", "memory": "1Gi"}))]}), 0),
        -997
    );
    assert_eq!(score(json!({"containers": asks("500M")}), 0), 750);
    assert_eq!(score(json!({"containers": asks("1")}), 0), 999);
    assert_eq!(score(json!({"containers": asks("9E")}), 0), 3);
    assert_eq!(score(json!({"containers": [container("c", json!({"cpu": "1"}), json!({}))]}), 0), 999);
    let critical =
        json!({"containers": asks("500M"), "priorityClassName": "system-node-critical", "priority": 2_000_001_000});
    assert_eq!(score(critical, 0), -997);
    let cluster =
        json!({"containers": asks("500M"), "priorityClassName": "system-cluster-critical", "priority": 2_000_000_000});
    assert_eq!(score(cluster, 0), 750);
    let served = json!({
        "containers": [container("c", json!({"memory": "500M"}), json!({})), container("d", json!({"memory": "1G"}), json!({}))],
        "initContainers": [sidecar("s", json!({"memory": "100M"}), json!({})), container("i", json!({"memory": "100M"}), json!({}))]
    });
    assert_eq!([0, 1, 2, 3].map(|index| score(served.clone(), index)), [750, 500, 750, 950]);
    let whole = json!({"containers": [container("c", json!({"memory": "200M"}), json!({})), {"name": "d"}],
        "resources": {"requests": {"memory": "1G"}}});
    assert_eq!([0, 1].map(|index| score(whole.clone(), index)), [1000 - 300, 1000 - 200]);
}

#[test]
fn cgroups_of_pods() {
    let of = |pod: &Pod| {
        let cgroup = pod_cgroup(pod, &node(), &machine()).unwrap();
        assert_eq!((cgroup.cpu_period, cgroup.pids_limit), (100_000, Some(1024)));
        (cgroup.path, cgroup.cpu_shares, cgroup.cpu_quota, cgroup.memory_limit)
    };
    let guaranteed = one(json!({}), json!({"cpu": "500m", "memory": "1Mi"}));
    assert_eq!(of(&guaranteed), ("/kubepods/poda-b-c".into(), Some(512), Some(50_000), Some(1 << 20)));
    let burstable = one(json!({"cpu": "250m"}), json!({"memory": "1Mi"}));
    assert_eq!(of(&burstable), ("/kubepods/burstable/poda-b-c".into(), Some(256), None, Some(1 << 20)));
    let best_effort = pod(json!({"containers": [{"name": "c"}]}));
    assert_eq!(of(&best_effort), ("/kubepods/besteffort/poda-b-c".into(), Some(2), None, None));
    let one_unlimited = pod(json!({
        "containers": [container("c", json!({}), json!({"cpu": "1"})), {"name": "d"}], "overhead": {"cpu": "1", "memory": "1Mi"}
    }));
    assert_eq!(of(&one_unlimited), ("/kubepods/burstable/poda-b-c".into(), Some(2048), None, None));
    let whole =
        pod(json!({"containers": [{"name": "d"}], "resources": {"requests": {"cpu": "1"}, "limits": {"cpu": "2"}}}));
    assert_eq!(of(&whole), ("/kubepods/burstable/poda-b-c".into(), Some(1024), Some(200_000), None));

    assert_eq!(
        pod_cgroup_path(&burstable, true),
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda_b_c.slice"
    );
    assert_eq!(pod_cgroup_path(&guaranteed, true), "/kubepods.slice/kubepods-poda_b_c.slice");
}

#[test]
fn cgroups_above_pods() {
    let pods = [
        one(json!({"cpu": "250m"}), json!({})),
        one(json!({"cpu": "500m"}), json!({})),
        one(json!({}), json!({"cpu": "1", "memory": "1Mi"})),
        one(json!({}), json!({})),
        one(json!({"cpu": "!"}), json!({})),
    ];
    let [all, burstable, best_effort] = qos_cgroups(&pods, &node(), &machine());
    assert_eq!((all.path.as_str(), all.cpu_shares), ("/kubepods", Some(1945)));
    assert_eq!((all.memory_limit, all.pids_limit), (Some(2_100_000_000), Some(30_000)));
    assert_eq!((burstable.path.as_str(), burstable.cpu_shares), ("/kubepods/burstable", Some(768)));
    assert_eq!((best_effort.path.as_str(), best_effort.cpu_shares), ("/kubepods/besteffort", Some(2)));
    assert_eq!((burstable.memory_limit, best_effort.pids_limit), (None, None));
}
