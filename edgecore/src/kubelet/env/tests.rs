use serde_json::{Value, json};

use super::*;
use crate::kubelet::container_config::fixtures::node;

fn references() -> References {
    let service = |value: Value| serde_json::from_value(value).unwrap();
    let mut references = References {
        services: vec![
            service(json!({
                "metadata": {"name": "kubernetes", "namespace": "default"},
                "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443, "protocol": "TCP"}]}
            })),
            service(json!({
                "metadata": {"name": "my-db", "namespace": "shop"},
                "spec": {"clusterIP": "fd00::7", "ports": [{"port": 5432}, {"name": "peer-sync", "port": 53, "protocol": "UDP"}]}
            })),
            service(
                json!({"metadata": {"name": "headless", "namespace": "shop"}, "spec": {"clusterIP": "None", "ports": [{"port": 1}]}}),
            ),
            service(
                json!({"metadata": {"name": "external", "namespace": "shop"}, "spec": {"externalName": "example.org"}}),
            ),
            service(
                json!({"metadata": {"name": "foreign", "namespace": "other"}, "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 1}]}}),
            ),
        ],
        ..Default::default()
    };
    let config =
        serde_json::from_value(json!({"data": {"mode": "fast", "level": "3", "key.with-signs": "kept"}})).unwrap();
    references.config_maps.insert("settings".to_owned(), config);
    let secret =
        serde_json::from_value(json!({"data": {"password": "czNjcmV0", "latin": "6Q==", "nul": "YQBi"}})).unwrap();
    references.secrets.insert("login".to_owned(), secret);
    references
}

fn pod(container: Value, spec: Value) -> Pod {
    let mut whole = json!({"containers": [container], "serviceAccountName": "robot", "enableServiceLinks": false});
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "shop", "uid": "u"}, "spec": whole}))
        .unwrap()
}

fn of(container: Value, spec: Value) -> Result<BTreeMap<String, String>, ConfigError> {
    let pod = pod(container, spec);
    let ips = ["10.1.2.3".parse().unwrap()];
    let container = &pod.spec.as_ref().unwrap().containers[0];
    environment(&pod, container, &references(), &node(), &ips).map(|list| {
        let sorted = list.is_sorted_by(|a, b| a.0 < b.0);
        assert!(sorted, "sorted, each name once");
        list.into_iter().collect()
    })
}

fn own(container: Value) -> BTreeMap<String, String> {
    let mut variables = of(container, json!({})).unwrap();
    variables.retain(|name, _| !name.starts_with("KUBERNETES_"));
    variables
}

fn expected<const N: usize>(variables: [(&str, &str); N]) -> BTreeMap<String, String> {
    variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

#[test]
fn the_api_is_always_named() {
    let api = expected([
        ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
        ("KUBERNETES_SERVICE_PORT", "443"),
        ("KUBERNETES_SERVICE_PORT_HTTPS", "443"),
        ("KUBERNETES_PORT", "tcp://10.96.0.1:443"),
        ("KUBERNETES_PORT_443_TCP", "tcp://10.96.0.1:443"),
        ("KUBERNETES_PORT_443_TCP_PROTO", "tcp"),
        ("KUBERNETES_PORT_443_TCP_PORT", "443"),
        ("KUBERNETES_PORT_443_TCP_ADDR", "10.96.0.1"),
    ]);
    assert_eq!(of(json!({"name": "c"}), json!({})).unwrap(), api);

    let mut linked = of(json!({"name": "c"}), json!({"enableServiceLinks": null})).unwrap();
    linked.retain(|name, _| !api.contains_key(name));
    assert_eq!(
        linked,
        expected([
            ("MY_DB_SERVICE_HOST", "fd00::7"),
            ("MY_DB_SERVICE_PORT", "5432"),
            ("MY_DB_SERVICE_PORT_PEER_SYNC", "53"),
            ("MY_DB_PORT", "tcp://[fd00::7]:5432"),
            ("MY_DB_PORT_5432_TCP", "tcp://[fd00::7]:5432"),
            ("MY_DB_PORT_5432_TCP_PROTO", "tcp"),
            ("MY_DB_PORT_5432_TCP_PORT", "5432"),
            ("MY_DB_PORT_5432_TCP_ADDR", "fd00::7"),
            ("MY_DB_PORT_53_UDP", "udp://[fd00::7]:53"),
            ("MY_DB_PORT_53_UDP_PROTO", "udp"),
            ("MY_DB_PORT_53_UDP_PORT", "53"),
            ("MY_DB_PORT_53_UDP_ADDR", "fd00::7"),
        ])
    );
}

#[test]
fn nothing_starts_before_the_api_is_known() {
    let mut pod = pod(json!({"name": "c"}), json!({}));
    let container = pod.spec.as_ref().unwrap().containers[0].clone();
    let none = References::default();
    let error = environment(&pod, &container, &none, &node(), &[]).unwrap_err();
    assert!(error.to_string().starts_with("services have not yet been read at least once, cannot construct envvars"));
    assert_eq!(error.reason(), "CreateContainerConfigError");
    let source = ("kubernetes.io/config.source".to_owned(), "file".to_owned());
    pod.metadata.annotations = Some(BTreeMap::from([source]));
    assert_eq!(environment(&pod, &container, &none, &node(), &[]), Ok(Vec::new()));
}

#[test]
fn later_sources_win() {
    assert_eq!(
        own(json!({
            "name": "c",
            "envFrom": [
                {"configMapRef": {"name": "settings"}},
                {"prefix": "P_", "configMapRef": {"name": "settings"}},
                {"configMapRef": {"name": "absent", "optional": true}},
                {"secretRef": {"name": "absent", "optional": true}}
            ],
            "env": [
                {"name": "level", "value": "4"},
                {"name": "A", "value": "$(level)/$(P_level)/$(B)/$$(A)/$(KUBERNETES_SERVICE_HOST)"},
                {"name": "B", "value": "b"},
                {"name": "B", "value": "$(B)$(B)"},
                {"name": "EMPTY"},
                {"name": "P_mode", "value": ""}
            ]
        })),
        expected([
            ("mode", "fast"),
            ("level", "4"),
            ("key.with-signs", "kept"),
            ("P_mode", ""),
            ("P_level", "3"),
            ("P_key.with-signs", "kept"),
            ("A", "4/3/$(B)/$(A)/10.96.0.1"),
            ("B", "bb"),
            ("EMPTY", ""),
        ])
    );
}

#[test]
fn own_variables_hide_service_variables() {
    let env = json!([{"name": "KUBERNETES_SERVICE_HOST", "value": "proxy"}, {"name": "X", "value": "$(KUBERNETES_SERVICE_HOST)"}]);
    let found = of(json!({"name": "c", "env": env}), json!({})).unwrap();
    assert_eq!((found["KUBERNETES_SERVICE_HOST"].as_str(), found["X"].as_str()), ("proxy", "proxy"));
}

#[test]
fn values_from_elsewhere() {
    assert_eq!(
        own(json!({
            "name": "c",
            "resources": {"limits": {"cpu": "250m", "memory": "$(X)".replace("$(X)", "64Mi")}},
            "env": [
                {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
                {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
                {"name": "MEMORY", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "containerName": "c", "divisor": "0"}}},
                {"name": "MODE", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "mode"}}},
                {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "login", "key": "password"}}},
                {"name": "LATIN", "valueFrom": {"secretKeyRef": {"name": "login", "key": "latin"}}},
                {"name": "NO_KEY", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "no", "optional": true}}},
                {"name": "NO_MAP", "valueFrom": {"configMapKeyRef": {"name": "absent", "key": "no", "optional": true}}},
                {"name": "NO_SECRET", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "no", "optional": true}}}
            ]
        })),
        expected([
            ("NAME", "web"),
            ("IP", "10.1.2.3"),
            ("HOST", "192.168.7.2"),
            ("NODE", "edge-1"),
            ("CPU", "250"),
            ("MEMORY", "67108864"),
            ("MODE", "fast"),
            ("PASSWORD", "s3cret"),
            ("LATIN", "\u{fffd}"),
        ])
    );
}

#[test]
fn what_is_missing_is_named() {
    let from = |source: Value| json!({"name": "c", "env": [{"name": "V", "valueFrom": source}]});
    for (container, message) in [
        (json!({"name": "c", "envFrom": [{"configMapRef": {"name": "x"}}]}), "configmap \"x\" not found"),
        (json!({"name": "c", "envFrom": [{"secretRef": {"name": "x"}}]}), "secret \"x\" not found"),
        (from(json!({"configMapKeyRef": {"name": "x", "key": "k"}})), "configmap \"x\" not found"),
        (from(json!({"secretKeyRef": {"name": "x", "key": "k"}})), "secret \"x\" not found"),
        (
            from(json!({"configMapKeyRef": {"name": "settings", "key": "k"}})),
            "couldn't find key k in ConfigMap shop/settings",
        ),
        (from(json!({"secretKeyRef": {"name": "login", "key": "k"}})), "couldn't find key k in Secret shop/login"),
        (from(json!({"fieldRef": {"fieldPath": "spec.x"}})), "unsupported fieldPath: spec.x"),
        (from(json!({"resourceFieldRef": {"resource": "limits.x"}})), "unsupported container resource : limits.x"),
        (from(json!({"resourceFieldRef": {"resource": "limits.cpu", "containerName": "x"}})), "container x not found"),
        (
            from(json!({"fileKeyRef": {"volumeName": "v", "path": "p", "key": "k", "optional": true}})),
            "environment variable \"V\": fileKeyRef is not supported by this node, use configMapKeyRef or secretKeyRef",
        ),
        (
            from(json!({"secretKeyRef": {"name": "login", "key": "nul"}})),
            "environment variable \"V\" contains a NUL byte: mount the value as a file instead",
        ),
    ] {
        let error = of(container, json!({})).unwrap_err();
        assert_eq!(error.to_string(), message);
        assert_eq!(error.reason(), "CreateContainerConfigError");
    }
}
