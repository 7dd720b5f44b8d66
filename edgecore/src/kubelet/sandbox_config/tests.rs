use std::collections::BTreeMap;

use super::*;
use crate::kubelet::container_config::fixtures::{node, rich_pod};

/// The config without its maps, and the maps in order.
fn ordered(mut config: cri::PodSandboxConfig) -> (cri::PodSandboxConfig, [BTreeMap<String, String>; 3]) {
    let linux = config.linux.as_mut().unwrap();
    let maps = [&mut config.labels, &mut config.annotations, &mut linux.sysctls];
    let maps = maps.map(|map| std::mem::take(map).into_iter().collect());
    (config, maps)
}

#[test]
fn a_rich_pod() {
    let pod: Pod = serde_json::from_value(rich_pod()).unwrap();
    let (config, handler, events) = sandbox_config(&pod, 3, &node(), "search lan\n").unwrap();
    assert_eq!((handler.as_str(), events), ("runsc", Vec::new()));
    insta::assert_debug_snapshot!(ordered(config));
}

#[test]
fn a_bare_pod() {
    let pod: Pod = serde_json::from_value(serde_json::json!({
        "metadata": {"name": "bare", "namespace": "default", "uid": "u"},
        "spec": {"hostNetwork": true, "hostPID": true, "containers": [{"name": "c", "ports": [{"containerPort": 80}]}]}
    }))
    .unwrap();
    let node = NodeFacts { systemd_cgroups: true, ..node() };
    let (config, handler, events) = sandbox_config(&pod, 0, &node, "nameserver 192.168.7.1\n").unwrap();
    assert_eq!((handler.as_str(), events), ("", Vec::new()));
    insta::assert_debug_snapshot!(ordered(config));
}

#[test]
fn what_no_sandbox_is_made_for() {
    let with = |change: &dyn Fn(&mut Pod), node: &NodeFacts| {
        let mut pod: Pod = serde_json::from_value(rich_pod()).unwrap();
        change(&mut pod);
        let result = sandbox_config(&pod, 0, node, "");
        result.map(|(_, handler, _)| handler).map_err(|error| {
            assert_eq!(error.reason(), "FailedCreatePodSandBox");
            error.to_string()
        })
    };
    let class =
        |name: &'static str| move |pod: &mut Pod| pod.spec.as_mut().unwrap().runtime_class_name = Some(name.to_owned());
    let own_users = |pod: &mut Pod| pod.spec.as_mut().unwrap().host_users = Some(false);
    assert_eq!(with(&class("absent"), &node()), Err("RuntimeClass \"absent\" not found".to_owned()));
    assert_eq!(
        with(&class("kata"), &node()),
        Err("RuntimeClass \"kata\" needs the runtime handler \"kata\", which the runtime of this node does not have: configure it there"
            .to_owned())
    );
    // A runtime that lists no handlers is asked.
    assert_eq!(
        with(&class("kata"), &NodeFacts { runtime_handlers: vec![String::new()], ..node() }),
        Ok("kata".to_owned())
    );
    assert_eq!(with(&class(""), &node()), Ok(String::new()));
    assert_eq!(
        with(&own_users, &node()),
        Err("can't set `spec.hostUsers: false`, RuntimeClass handler \"runsc\" does not support user namespaces"
            .to_owned())
    );
    let both = |pod: &mut Pod| {
        class("")(pod);
        own_users(pod);
    };
    assert_eq!(
        with(&both, &node()),
        Err("can't set `spec.hostUsers: false`, runtime does not support user namespaces".to_owned())
    );
}
