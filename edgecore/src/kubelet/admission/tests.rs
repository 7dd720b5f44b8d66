#![allow(clippy::needless_pass_by_value, reason = "json!(…) reads best as an argument")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Value, json};
use skerry_proto::payload::Settings;

use super::*;

fn node() -> NodeFacts {
    NodeFacts {
        name: "edge-1".to_owned(),
        host_ips: Vec::new(),
        cpu_milli: 2000,
        memory: 1 << 30,
        ephemeral_storage: 1 << 34,
        pods: 3,
        labels: [("kubernetes.io/os", "linux"), ("zone", "north"), ("slot", "7")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        settings: Settings::default(),
        pods_root: PathBuf::new(),
        logs_root: PathBuf::new(),
        log_links: PathBuf::new(),
        systemd_cgroups: false,
        runtime_handlers: Vec::new(),
        recursive_read_only: Vec::new(),
        strict_groups: false,
        runtime_classes: BTreeMap::new(),
    }
}

fn pod(uid: &str, spec: Value) -> Pod {
    serde_json::from_value(json!({"metadata": {"name": uid, "uid": uid}, "spec": spec})).unwrap()
}

fn cpu(amount: &str) -> Value {
    json!({"containers": [{"name": "a", "resources": {"requests": {"cpu": amount}}}]})
}

fn verdict(spec: Value, others: &[&Pod]) -> Result<(), &'static str> {
    admit(&pod("new", spec), others, &node(), &[]).map_err(|rejection| rejection.reason)
}

#[test]
fn resources_count_what_runs_and_not_what_has_ended() {
    let running = pod("r", cpu("1500m"));
    let mut ended = running.clone();
    ended.metadata.uid = Some("e".to_owned());
    ended.status = Some(serde_json::from_value(json!({"phase": "Succeeded"})).unwrap());
    assert_eq!(verdict(cpu("500m"), &[&running, &ended]), Ok(()));
    let refused = admit(&pod("new", cpu("501m")), &[&running, &ended], &node(), &[]).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "OutOfcpu: Node didn't have enough resource: cpu, requested: 501, used: 1500, capacity: 2000"
    );
    let (a, b, c) = (pod("a", cpu("0")), pod("b", cpu("0")), pod("c", cpu("0")));
    assert_eq!(verdict(cpu("0"), &[&a, &b, &c]), Err("OutOfpods"));
    assert_eq!(admit(&a, &[&a, &b, &c], &node(), &[]), Ok(()));
}

#[test]
fn selector_and_affinity() {
    let with = |rules: Value| {
        verdict(
            json!({"containers": [], "affinity": {"nodeAffinity":
                {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": rules}}}}),
            &[],
        )
    };
    let rule = |key: &str, operator: &str, values: &[&str]| json!({"key": key, "operator": operator, "values": values});
    assert_eq!(verdict(json!({"containers": [], "nodeSelector": {"zone": "north"}}), &[]), Ok(()));
    assert_eq!(verdict(json!({"containers": [], "nodeSelector": {"zone": "south"}}), &[]), Err("NodeAffinity"));
    assert_eq!(
        with(json!([{"matchExpressions": [rule("zone", "In", &["north", "x"]), rule("slot", "Gt", &["6"])]}])),
        Ok(())
    );
    assert_eq!(with(json!([{"matchExpressions": [rule("slot", "Lt", &["7"])]}])), Err("NodeAffinity"));
    assert_eq!(
        with(json!([{"matchExpressions": [rule("none", "NotIn", &["a"]), rule("none", "DoesNotExist", &[])]}])),
        Ok(())
    );
    assert_eq!(with(json!([{}, {"matchFields": [rule("metadata.name", "In", &["edge-1"])]}])), Ok(()));
    assert_eq!(with(json!([{}])), Err("NodeAffinity"));
}

#[test]
fn host_ports_conflict_by_port_protocol_and_address() {
    let ports = |port: Value| json!({"containers": [{"name": "a", "ports": [port]}]});
    let other = pod("o", ports(json!({"containerPort": 80, "hostPort": 8080, "hostIP": "10.0.0.1"})));
    let verdict = |port| verdict(ports(port), &[&other]);
    assert_eq!(verdict(json!({"containerPort": 1, "hostPort": 8080})), Err("NodePorts"));
    assert_eq!(verdict(json!({"containerPort": 1, "hostPort": 8080, "hostIP": "10.0.0.2"})), Ok(()));
    assert_eq!(verdict(json!({"containerPort": 1, "hostPort": 8080, "protocol": "UDP"})), Ok(()));
    assert_eq!(verdict(json!({"containerPort": 8080})), Ok(()));
}

#[test]
fn system_sysctls_and_features() {
    let sysctl = |name: &str, host: bool| {
        verdict(
            json!({"containers": [], "hostNetwork": host, "securityContext": {"sysctls": [{"name": name, "value": "1"}]}}),
            &[],
        )
    };
    assert_eq!(sysctl("net/ipv4/tcp_syncookies", false), Ok(()));
    assert_eq!(sysctl("net.ipv4.tcp_syncookies", true), Err("SysctlForbidden"));
    assert_eq!(sysctl("kernel.msgmax", false), Err("SysctlForbidden"));
    assert_eq!(verdict(json!({"containers": [], "os": {"name": "windows"}}), &[]), Err("PodOSNotSupported"));
    assert_eq!(verdict(json!({"containers": [], "nodeName": "other"}), &[]), Err("NodeName"));
    assert_eq!(
        verdict(json!({"containers": [], "resourceClaims": [{"name": "gpu"}]}), &[]),
        Err("PodFeatureUnsupported")
    );
    let rule = json!({"containers": [{"name": "a", "restartPolicy": "Never",
        "restartPolicyRules": [{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [3]}}]}]});
    assert_eq!(verdict(rule, &[]), Err("PodFeatureUnsupported"));
}

#[test]
fn strict_groups_need_a_runtime_that_has_them() {
    let strict = json!({"containers": [], "securityContext": {"supplementalGroupsPolicy": "Strict"}});
    assert_eq!(verdict(strict.clone(), &[]), Err("SupplementalGroupsPolicyNotSupported"));
    assert_eq!(admit(&pod("new", strict), &[], &NodeFacts { strict_groups: true, ..node() }, &[]), Ok(()));
}

#[test]
fn a_pod_that_a_taint_would_evict_is_not_taken() {
    let taint = |effect: &str| {
        let taint = json!({"key": "maintenance", "value": "disk", "effect": effect});
        serde_json::from_value::<Taint>(taint).unwrap()
    };
    let verdict = |tolerations: Value, effect: &str| {
        let pod = pod("new", json!({"containers": [], "tolerations": tolerations}));
        admit(&pod, &[], &node(), &[taint(effect)]).map_err(|rejection| rejection.to_string())
    };
    let refused =
        Err("TaintToleration: Predicate TaintToleration failed: node(s) had taints that the pod didn't tolerate"
            .to_owned());
    for toleration in [
        json!({"key": "maintenance", "value": "disk"}),
        json!({"key": "maintenance", "operator": "Equal", "value": "disk", "effect": "NoExecute"}),
        json!({"key": "maintenance", "operator": "Exists", "tolerationSeconds": 5}),
        json!({"operator": "Exists"}),
    ] {
        assert_eq!(verdict(json!([toleration]), "NoExecute"), Ok(()), "{toleration}");
    }
    for toleration in [
        json!({"key": "maintenance"}),
        json!({"key": "maintenance", "value": "other"}),
        json!({"key": "other", "operator": "Exists"}),
        json!({"operator": "Exists", "effect": "NoSchedule"}),
    ] {
        assert_eq!(verdict(json!([toleration]), "NoExecute"), refused, "{toleration}");
    }
    assert_eq!(verdict(json!([]), "NoExecute"), refused);
    // Those are for the scheduler, and a pod that was bound by hand runs.
    assert_eq!(verdict(json!([]), "NoSchedule"), Ok(()));
}

#[test]
fn limits_that_nobody_enforces_are_named() {
    let limits = json!({"limits": {"memory": "1Gi", "ephemeral-storage": "1Gi"}});
    let message = |spec: Value| unenforced(&pod("p", spec)).map(|event| event.message);
    let empty = |value: Value| json!([{"name": "v", "emptyDir": value}]);
    let spec = json!({
        "containers": [{"name": "a"}],
        "initContainers": [{"name": "i", "resources": limits}],
        "volumes": empty(json!({"sizeLimit": "1Gi"})),
    });
    assert_eq!(
        message(spec).as_deref(),
        Some(
            "this node does not enforce these limits: ephemeral-storage of container \"i\", sizeLimit of emptyDir \"v\""
        )
    );
    let memory = json!({"containers": [], "volumes": empty(json!({"sizeLimit": "1Gi", "medium": "Memory"}))});
    assert_eq!(message(memory), None);
    let whole = json!({"containers": [], "resources": {"limits": {"memory": "1Gi"}}});
    assert_eq!(message(whole), None);
    let gpu = json!({"containers": [{"name": "a", "resources": {"limits": {"cpu": "1", "vendor.com/gpu": "1"}}}]});
    assert!(message(gpu).unwrap().ends_with(": vendor.com/gpu of container \"a\", which gets no device with it"));
}

#[test]
fn what_cannot_be_mounted_is_named() {
    let reason = |spec: Value| unsupported(&pod("p", spec)).map(|event| event.reason);
    let volume = |source: Value| {
        let mut volume = json!({"name": "v"});
        volume.as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
        reason(json!({"containers": [], "volumes": [volume]}))
    };
    for fine in [
        json!({"emptyDir": {"medium": "Memory"}}),
        json!({"hostPath": {"path": "/x"}}),
        json!({"configMap": {"name": "c"}}),
        json!({"secret": {"secretName": "c"}}),
        json!({"downwardAPI": {}}),
        json!({"projected": {"sources": [{"serviceAccountToken": {"path": "token"}}, {"configMap": {"name": "c"}}]}}),
    ] {
        assert_eq!(volume(fine), None);
    }
    for foreign in [
        json!({"emptyDir": {"medium": "HugePages-2Mi"}}),
        json!({"persistentVolumeClaim": {"claimName": "c"}}),
        json!({"ephemeral": {}}),
        json!({"csi": {"driver": "d"}}),
        json!({"image": {"reference": "r"}}),
        json!({"nfs": {"server": "s", "path": "/"}}),
        json!({"projected": {"sources": [{"configMap": {"name": "c"}}, {"clusterTrustBundle": {"path": "p"}}]}}),
    ] {
        assert_eq!(volume(foreign), Some("FailedMount"));
    }
    assert_eq!(reason(json!({"containers": [], "hostUsers": false})), Some("FailedCreatePodSandBox"));
    let device = json!({"containers": [{"name": "a", "volumeDevices": [{"name": "v", "devicePath": "/dev/x"}]}]});
    assert_eq!(reason(device), Some("FailedMapVolume"));
    let claims = json!({"containers": [{"name": "a"}], "resourceClaims": [{"name": "gpu"}]});
    assert_eq!(reason(claims), Some("FailedPrepareDynamicResources"));
}
