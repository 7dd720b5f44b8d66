use serde_json::{Value, json};

use super::*;
use crate::kubelet::container_config::fixtures;

const HOST: &str = "# comment\n; other\nnameserver 192.168.7.1\nsearch old.example\noptions timeout:1 rotate\n  nameserver\t1.1.1.1 \n\
                    search lan. . corp.example\nnameserver\noptions timeout:3\ndomain ignored\n";

fn pod(spec: Value) -> Pod {
    serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "shop", "uid": "u"}, "spec": spec})).unwrap()
}

fn dns(servers: &[&str], searches: &[&str], options: &[&str]) -> DnsConfig {
    let owned = |list: &[&str]| list.iter().map(|entry| (*entry).to_owned()).collect();
    DnsConfig { servers: owned(servers), searches: owned(searches), options: owned(options) }
}

#[test]
fn what_a_stub_on_the_box_asks_is_asked_by_pods_too() {
    let dir = tempfile::tempdir().unwrap();
    let (etc, resolved) = (dir.path().join("etc"), dir.path().join("resolved"));
    let read = |content: &str| {
        fs::write(&etc, content).unwrap();
        read_resolv_conf(&etc, &resolved)
    };
    let stub = "nameserver 127.0.0.53\noptions edns0\n";
    assert_eq!(read(stub), stub, "there is nothing else");
    fs::write(&resolved, HOST).unwrap();
    assert_eq!(read(stub), HOST);
    assert_eq!(read("nameserver ::1\n"), HOST);
    let mixed = "nameserver 127.0.0.53\nnameserver 192.0.2.1\n";
    assert_eq!(read(mixed), mixed);
    fs::remove_file(&etc).unwrap();
    assert_eq!(read_resolv_conf(&etc, &resolved), HOST);
}

#[test]
fn policies() {
    let cluster = dns(
        &["10.96.0.10"],
        &["shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "lan", "corp.example"],
        &["ndots:5"],
    );
    let host = dns(&["192.168.7.1", "1.1.1.1"], &["lan", "corp.example"], &["timeout:3", "rotate"]);
    for (spec, expected) in [
        (json!({}), &cluster),
        (json!({"dnsPolicy": "ClusterFirst"}), &cluster),
        (json!({"dnsPolicy": "ClusterFirst", "hostNetwork": true}), &host),
        (json!({"dnsPolicy": "ClusterFirstWithHostNet", "hostNetwork": true}), &cluster),
        (json!({"dnsPolicy": "Default"}), &host),
        (json!({"dnsPolicy": "None"}), &DnsConfig::default()),
        (
            json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["9.9.9.9"], "searches": ["a"], "options": [{"name": "edns0"}]}}),
            &dns(&["9.9.9.9"], &["a"], &["edns0"]),
        ),
        (
            json!({"dnsConfig": {
                "nameservers": ["9.9.9.9", "10.96.0.10"], "searches": ["lan", "mine"],
                "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}, {"name": "timeout", "value": "7"}]
            }}),
            &dns(
                &["10.96.0.10", "9.9.9.9"],
                &["shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "lan", "corp.example", "mine"],
                &["ndots:2", "edns0", "timeout:7"],
            ),
        ),
    ] {
        let found = pod_dns(&pod(spec.clone()), &fixtures::node(), HOST);
        assert_eq!(found, (expected.clone(), Vec::new()), "{spec}");
    }
}

#[test]
fn without_cluster_dns_the_host_answers_and_the_pod_hears_of_it() {
    let mut node = fixtures::node();
    node.settings.cluster_dns.clear();
    let (found, events) = pod_dns(&pod(json!({})), &node, HOST);
    assert_eq!(found.servers, ["192.168.7.1", "1.1.1.1"]);
    let [event] = &events[..] else { panic!("{events:?}") };
    assert!(event.warning);
    assert_eq!(event.reason, "MissingClusterDNS");
    assert_eq!(
        event.message,
        "pod: \"web_shop(u)\". kubelet does not have ClusterDNS IP configured and cannot create Pod using \"ClusterFirst\" policy. Falling \
         back to \"Default\" policy."
    );
    assert_eq!(pod_dns(&pod(json!({"dnsPolicy": "Default"})), &node, HOST).1, []);
}

#[test]
fn without_a_cluster_domain_only_the_hosts_searches_remain() {
    let mut node = fixtures::node();
    node.settings.cluster_domain.clear();
    assert_eq!(pod_dns(&pod(json!({})), &node, HOST).0.searches, ["lan", "corp.example"]);
}

#[test]
fn too_many_nameservers() {
    let servers = ["1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4"];
    let (found, events) =
        pod_dns(&pod(json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": servers}})), &fixtures::node(), "");
    assert_eq!(found.servers, &servers[..3]);
    assert_eq!(
        (events[0].reason, events[0].message.as_str()),
        (
            "DNSConfigForming",
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: 1.1.1.1 1.1.1.2 1.1.1.3"
        )
    );
}

#[test]
fn too_much_to_search() {
    let found = |searches: Vec<String>| {
        let spec = json!({"dnsPolicy": "None", "dnsConfig": {"searches": searches}});
        let (found, events) = pod_dns(&pod(spec), &fixtures::node(), "");
        let told = events.first().map(|event| event.message.clone());
        if let Some(message) = &told {
            let head =
                "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: ";
            assert_eq!(*message, format!("{head}{}", found.searches.join(" ")));
        }
        (found.searches, told.is_some())
    };
    let many: Vec<_> = (0..33).map(|n| format!("s{n}")).collect();
    assert_eq!(found(many.clone()), (many[..32].to_vec(), true));
    assert_eq!(found(many[..32].to_vec()), (many[..32].to_vec(), false));
    assert_eq!(found(vec!["x".repeat(254), "a".to_owned()]), (vec!["a".to_owned()], true));
    // Eight times 253 and the blanks between make 2031; 16 more fit, 17 do not.
    let mut long: Vec<_> = (0..8).map(|n| format!("{n}{}", "x".repeat(252))).collect();
    long.push("y".repeat(16));
    assert_eq!(found(long.clone()), (long.clone(), false));
    long[8].push('y');
    assert_eq!(found(long.clone()), (long[..8].to_vec(), true));
}
