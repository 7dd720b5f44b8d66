//! The ports of a sandbox, from which the runtime's CNI plugins make host ports.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{ContainerPort, Pod};
use skerry_proto::cri;

/// Every port of every regular container, with a host port or without. None for host network, where nothing needs to be mapped.
///
/// Within one container a port name, or without a name the same address, counts once.
pub fn port_mappings(pod: &Pod) -> Vec<cri::PortMapping> {
    let Some(spec) = pod.spec.as_ref().filter(|spec| spec.host_network != Some(true)) else { return Vec::new() };
    let mut mappings = Vec::new();
    for container in &spec.containers {
        let mut seen = BTreeSet::new();
        mappings.extend(container.ports.iter().flatten().filter(|port| seen.insert(key(port))).map(mapping));
    }
    mappings
}

fn mapping(port: &ContainerPort) -> cri::PortMapping {
    let protocol = match port.protocol.as_deref() {
        Some("UDP") => cri::Protocol::Udp,
        Some("SCTP") => cri::Protocol::Sctp,
        _ => cri::Protocol::Tcp,
    };
    cri::PortMapping {
        protocol: protocol.into(),
        container_port: port.container_port,
        host_port: port.host_port.unwrap_or(0),
        host_ip: port.host_ip.clone().unwrap_or_default(),
    }
}

fn key(port: &ContainerPort) -> String {
    match port.name.as_deref() {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => format!(
            "{}-{}:{}:{}",
            port.protocol.as_deref().unwrap_or("TCP"),
            port.host_ip.as_deref().unwrap_or_default(),
            port.container_port,
            port.host_port.unwrap_or(0)
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn mapped(host_network: bool) -> Vec<(i32, i32, i32, String)> {
        let pod: Pod = serde_json::from_value(json!({"spec": {"hostNetwork": host_network, "containers": [
            {"name": "a", "ports": [
                {"containerPort": 80},
                {"containerPort": 80},
                {"containerPort": 80, "protocol": "UDP"},
                {"containerPort": 80, "hostPort": 8080, "hostIP": "127.0.0.1"},
                {"containerPort": 80, "hostPort": 8080, "hostIP": "::1"},
                {"containerPort": 81, "name": "x"},
                {"containerPort": 82, "name": "x"}
            ]},
            {"name": "b", "ports": [{"containerPort": 81, "name": "x", "protocol": "SCTP"}]}
        ], "initContainers": [{"name": "i", "ports": [{"containerPort": 1}]}]}}))
        .unwrap();
        let mappings = port_mappings(&pod).into_iter();
        mappings.map(|port| (port.protocol, port.container_port, port.host_port, port.host_ip)).collect()
    }

    #[test]
    fn every_port_once() {
        let (tcp, udp, sctp) = (0, 1, 2);
        assert_eq!(
            mapped(false),
            [
                (tcp, 80, 0, String::new()),
                (udp, 80, 0, String::new()),
                (tcp, 80, 8080, "127.0.0.1".to_owned()),
                (tcp, 80, 8080, "::1".to_owned()),
                (tcp, 81, 0, String::new()),
                (sctp, 81, 0, String::new()),
            ]
        );
        assert_eq!(mapped(true), []);
    }
}
