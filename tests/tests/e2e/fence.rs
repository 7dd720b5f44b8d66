//! What a pod may not do, and what it finds, when its specification asks for more than most.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skerry_tests::cloudcore;
use skerry_tests::images::SERVER;
use skerry_tests::manifests::sleeper;

use crate::world::story;

#[test]
fn a_pod_is_fenced_in_and_furnished_as_it_asks() -> Result<()> {
    story("work-fence", |world| {
        world.kubectl.create(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "the-shop"}, "spec": {"ports": [{"port": 8042}]},
        }))?;
        let shop = world.kubectl.get("service", "the-shop")?["spec"]["clusterIP"].clone();
        let mut rooted = sleeper("rooted", world.edge.name(), false);
        rooted["spec"]["securityContext"] = json!({"runAsNonRoot": true});
        rooted["metadata"]["labels"] = json!({"app": "rooted"});
        world.kubectl.create(&rooted)?;
        let pod = fenced(world.edge.name());
        world.run_pods(&pod.to_string(), "app=sleeper", 1)?;
        let shown = |command: &[&str]| world.inside("fenced", command);

        ensure!(shown(&["id", "-u"])?.trim() == "1000", "it runs as {}", shown(&["id", "-u"])?);
        let status = shown(&["cat", "/proc/self/status"])?;
        for line in ["CapBnd:\t0000000000000400", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
            ensure!(status.lines().any(|have| have == line), "no {line:?} in: {status}");
        }
        let refused = world.runtime.cri().exec("fenced", "main", &["touch", "/tmp/file"])?;
        ensure!(!refused.success && refused.text().contains("Read-only"), "its root: {}", refused.text());
        shown(&["touch", "/mine/file"])?;
        shown(&["test", "-e", "/whole/fenced/file"])?;
        ensure!(!shown(&["pidof", "testserver"])?.trim().is_empty(), "it does not see the pod's other processes");
        let hosts = shown(&["cat", "/etc/hosts"])?;
        let alias = |line: &str| line.split_whitespace().eq(["10.1.2.3", "far.away", "far"]);
        ensure!(hosts.lines().any(alias), "no alias in: {hosts}");
        let resolve = shown(&["cat", "/etc/resolv.conf"])?;
        for line in ["nameserver 10.9.8.7", "search here.example", "options ndots:3"] {
            ensure!(resolve.lines().any(|have| have == line), "no {line:?} in: {resolve}");
        }
        let environment = shown(&["env"])?;
        let shop = shop.as_str().context("the Service has no address")?;
        for line in [format!("THE_SHOP_SERVICE_HOST={shop}"), "THE_SHOP_SERVICE_PORT=8042".to_owned()] {
            ensure!(environment.lines().any(|have| have == line), "no {line} in: {environment}");
        }
        // The hook was to make the server fail.
        let address = world.kubectl.get("pod", "fenced")?["status"]["podIP"].as_str().context("no pod IP")?.to_owned();
        let (status, _) = cloudcore::get(format!("{address}:8080").parse()?, "/healthz")?;
        ensure!(status == 503, "postStart asked for nothing: the server answers {status}");

        let waiting = |pod: &Value| {
            let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
            let message = waiting["message"].as_str().unwrap_or_default();
            waiting["reason"] == "CreateContainerConfigError" && message.contains("root")
        };
        world.kubectl.wait("pod", "rooted", "refused, for its image is root's", 30, waiting)?;
        let begin = Instant::now();
        world.kubectl.run(&["delete", "pod", "fenced"])?;
        let took = begin.elapsed();
        let (least, most) = (Duration::from_secs(2), Duration::from_secs(15));
        ensure!(took >= least && took < most, "preStop sleeps for two seconds, and its end took {took:?}");
        Ok(())
    })
}

/// A pod of one that may hardly do anything, beside a server.
fn fenced(node: &str) -> Value {
    let mut pod = sleeper("fenced", node, false);
    let server = json!({
        "name": "server", "image": SERVER, "imagePullPolicy": "Never", "restartPolicy": "Always",
        "startupProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1, "failureThreshold": 30},
    });
    let spec = &mut pod["spec"];
    spec["terminationGracePeriodSeconds"] = json!(20);
    spec["shareProcessNamespace"] = json!(true);
    spec["hostAliases"] = json!([{"ip": "10.1.2.3", "hostnames": ["far.away", "far"]}]);
    spec["dnsPolicy"] = json!("None");
    spec["dnsConfig"] = json!({
        "nameservers": ["10.9.8.7"], "searches": ["here.example"], "options": [{"name": "ndots", "value": "3"}],
    });
    spec["securityContext"] =
        json!({"runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}});
    spec["volumes"] = json!([{"name": "work", "emptyDir": {}}]);
    spec["initContainers"] = json!([server]);
    let main = &mut spec["containers"][0];
    main["env"] = json!([{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]);
    main["securityContext"] = json!({
        "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false,
        "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
    });
    main["volumeMounts"] = json!([
        {"name": "work", "mountPath": "/whole"},
        {"name": "work", "mountPath": "/mine", "subPathExpr": "$(POD)"},
    ]);
    main["lifecycle"] =
        json!({"postStart": {"httpGet": {"port": 8080, "path": "/fail"}}, "preStop": {"sleep": {"seconds": 2}}});
    pod
}
