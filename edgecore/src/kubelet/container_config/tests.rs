use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::fixtures::{machine, node, rich_pod};
use super::*;
use crate::kubelet::references::References;
use crate::kubelet::{env, field, hosts, sandbox_config as sandbox};

fn references() -> References {
    let api = json!({
        "metadata": {"name": "kubernetes", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443}]}
    });
    References { services: vec![serde_json::from_value(api).unwrap()], ..Default::default() }
}

fn image() -> cri::Image {
    cri::Image { id: "sha256:1234".to_owned(), username: "nginx".to_owned(), ..Default::default() }
}

fn make(pod: &Pod, name: &str, target: Option<&str>) -> Result<cri::ContainerConfig, ConfigError> {
    let container = ContainerSpec::all(pod.spec.as_ref().unwrap()).find(|container| container.name() == name).unwrap();
    let ips = ["10.1.2.3".parse().unwrap()];
    let envs = env::environment(pod, &container.container(), &references(), &node(), &ips)?;
    container_config(ContainerInput {
        pod,
        container,
        restart_count: 2,
        image: &image(),
        image_ref: "sha256:1234".to_owned(),
        envs,
        mounts: vec![cri::Mount {
            container_path: "/etc/hosts".to_owned(),
            host_path: "/var/lib/kubelet/pods/u/etc-hosts".to_owned(),
            ..Default::default()
        }],
        target_container_id: target.map(str::to_owned),
        node: &node(),
        machine: &machine(),
    })
}

/// The config without its maps and with readable variables, the maps in order, the variables.
fn ordered(mut config: cri::ContainerConfig) -> (cri::ContainerConfig, [BTreeMap<String, String>; 3], Vec<String>) {
    let resources = config.linux.as_mut().unwrap().resources.as_mut().unwrap();
    let maps = [&mut config.labels, &mut config.annotations, &mut resources.unified];
    let maps = maps.map(|map| std::mem::take(map).into_iter().collect());
    let envs = std::mem::take(&mut config.envs).into_iter();
    let envs = envs.map(|env| format!("{}={}", env.key, String::from_utf8(env.value).unwrap())).collect();
    (config, maps, envs)
}

#[test]
fn a_rich_container() {
    let pod = serde_json::from_value(rich_pod()).unwrap();
    insta::assert_debug_snapshot!(ordered(make(&pod, "main", None).unwrap()));
}

#[test]
fn stop_signals_are_spelt_as_the_runtime_does() {
    let signals = [
        (None, cri::Signal::RuntimeDefault),
        (Some("SIGUSR1"), cri::Signal::Sigusr1),
        (Some("SIGRTMIN"), cri::Signal::Sigrtmin),
        (Some("SIGRTMIN+3"), cri::Signal::Sigrtminplus3),
        (Some("SIGRTMAX-14"), cri::Signal::Sigrtmaxminus14),
    ];
    for (named, signal) in signals {
        let mut pod: Pod = serde_json::from_value(rich_pod()).unwrap();
        for container in &mut pod.spec.as_mut().unwrap().containers {
            container.lifecycle.get_or_insert_default().stop_signal = named.map(str::to_owned);
        }
        assert_eq!(make(&pod, "main", None).unwrap().stop_signal(), signal, "{named:?}");
    }
}

#[test]
fn a_sidecar() {
    let pod = serde_json::from_value(rich_pod()).unwrap();
    insta::assert_debug_snapshot!(ordered(make(&pod, "proxy", None).unwrap()));
}

#[test]
fn an_ephemeral_container_sees_its_target() {
    let mut pod: Pod = serde_json::from_value(rich_pod()).unwrap();
    let namespaces = |config: cri::ContainerConfig| {
        let found = config.linux.unwrap().security_context.unwrap().namespace_options.unwrap();
        (found.pid(), found.target_id)
    };
    let found = make(&pod, "debug", Some("id-of-main")).unwrap();
    assert_eq!(found.command, ["sh"]);
    assert_eq!(found.labels[label::CONTAINER_NAME], "debug");
    assert_eq!(namespaces(found), (cri::NamespaceMode::Target, "id-of-main".to_owned()));
    let error = make(&pod, "debug", None).unwrap_err();
    assert_eq!(error.to_string(), "unable to find target container \"main\": it must be running");
    assert_eq!(error.reason(), "CreateContainerConfigError");
    // Only an ephemeral container has a target.
    assert_eq!(namespaces(make(&pod, "main", Some("x")).unwrap()), (cri::NamespaceMode::Container, String::new()));
    pod.spec.as_mut().unwrap().share_process_namespace = Some(true);
    assert_eq!(namespaces(make(&pod, "debug", Some("x")).unwrap()), (cri::NamespaceMode::Pod, String::new()));
}

#[test]
fn field_paths() {
    let pod: Pod = serde_json::from_value(rich_pod()).unwrap();
    let paths: Vec<_> = ContainerSpec::all(pod.spec.as_ref().unwrap()).map(ContainerSpec::field_path).collect();
    assert_eq!(
        paths,
        [
            "spec.initContainers{setup}",
            "spec.initContainers{proxy}",
            "spec.containers{main}",
            "spec.containers{second}",
            "spec.ephemeralContainers{debug}"
        ]
    );
}

#[test]
fn the_hash_is_of_name_and_image_and_does_not_change_between_releases() {
    assert_eq!(container_hash("main", "web:1"), 1_750_664_899_969_743_032);
    assert_ne!(container_hash("main", "web:1"), container_hash("main", "web:2"));
    assert_ne!(container_hash("ab", "c"), container_hash("a", "bc"));
}

/// Everything of this area on one pod; only that nothing panics counts.
fn exercise(pod: &Pod) {
    let node = node();
    let ips = ["10.1.2.3".parse().unwrap()];
    let _ = sandbox::sandbox_config(pod, 0, &node, "nameserver 1.1.1.1\nsearch a\n");
    let _ = hosts::hosts_file(pod, &node, &ips, "");
    let _ = resources::pod_cgroup(pod, &node, &machine());
    let _ = resources::qos_cgroups([pod], &node, &machine());
    let _ = security::check_sysctls(pod);
    let _ = field::value(pod, "metadata.annotations", &field::FieldContext::default());
    for container in pod.spec.iter().flat_map(ContainerSpec::all) {
        let _ = make(pod, container.name(), Some("target"));
        for resource in ["limits.cpu", "requests.memory", "limits.ephemeral-storage", "limits.hugepages-2Mi"] {
            let _ = field::resource_value(pod, container.name(), resource, None, &node);
        }
    }
}

/// Puts `value` in the place of the `index`-th leaf, or takes the leaf away.
fn disturb(tree: &mut Value, index: &mut usize, value: Option<&Value>) {
    let children: Vec<&mut Value> = match tree {
        Value::Object(map) => map.values_mut().collect(),
        Value::Array(list) => list.iter_mut().collect(),
        _ => {
            if *index == 0 {
                *tree = value.cloned().unwrap_or_default();
            }
            *index = index.wrapping_sub(1);
            return;
        }
    };
    for child in children {
        disturb(child, index, value);
    }
}

fn odd() -> impl Strategy<Value = Option<Value>> {
    prop_oneof![
        Just(None),
        any::<String>().prop_map(|text| Some(json!(text))),
        "[-+]?[0-9.]{0,25}[eEinumkKMGTP]{0,2}[-+]?[0-9]{0,10}".prop_map(|text| Some(json!(text))),
        "[$()A-Z./:'\\[\\]-]{0,80}".prop_map(|text| Some(json!(text))),
        any::<i64>().prop_map(|number| Some(json!(number))),
        any::<i32>().prop_map(|number| Some(json!(number))),
        any::<bool>().prop_map(|flag| Some(json!(flag))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn no_pod_panics(changes in proptest::collection::vec((0_usize..110, odd()), 1..5)) {
        let mut tree = rich_pod();
        for (index, value) in changes {
            let mut next = tree.clone();
            disturb(&mut next, &mut { index }, value.as_ref());
            // Keep what is still a pod, so that most cases reach the code.
            if serde_json::from_value::<Pod>(next.clone()).is_ok() {
                tree = next;
            }
        }
        exercise(&serde_json::from_value(tree).unwrap());
    }
}

#[test]
fn an_empty_pod_does_not_panic() {
    exercise(&Pod::default());
}
