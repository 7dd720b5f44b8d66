//! The real metrics-server and the real Prometheus read a node as they read any other.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skerry_tests::cloudcore::kubelet_address;
use skerry_tests::process::{Process, run};
use skerry_tests::wait::{eventually, until};
use skerry_tests::{guest, paths, ports};

use super::{FAR, TRANSPORTS, start_pod};
use crate::world::{World, control, story};

/// metrics-server takes nothing shorter.
const RESOLUTION: &str = "10s";
/// It has to be less than that.
const TIMEOUT: &str = "9s";

#[test]
fn prometheus_reads_a_node() -> Result<()> {
    story("ops-prometheus", |world| {
        start_pod(world)?;
        world.relay.set(|line| line.latency = FAR);
        let ca = own_ca(world)?;
        for transport in TRANSPORTS {
            world.carry_over(transport)?;
            let prometheus = Prometheus::start(world, transport, &ca)?;
            let read = prometheus.reads(world).inspect_err(|_| tell(&prometheus.process));
            read.with_context(|| format!("over {transport}"))?;
        }
        own_top(world)?;
        signs(world)
    })
}

#[test]
#[ignore = "its build takes minutes: scripts/soak ops"]
fn metrics_server_reads_a_node() -> Result<()> {
    story("ops-metrics-server", |world| {
        if !control()?.is_ours() {
            eprintln!("skipped: it would take the place of the cluster's own metrics-server");
            return Ok(());
        }
        start_pod(world)?;
        world.relay.set(|line| line.latency = FAR);
        let ca = own_ca(world)?;
        for transport in TRANSPORTS {
            world.carry_over(transport)?;
            let metrics_server = MetricsServer::start(world, &ca)?;
            let topped = tops(world).inspect_err(|_| tell(&metrics_server.process));
            topped.with_context(|| format!("over {transport}"))?;
        }
        Ok(())
    })
}

/// Both verify kubelets: by the CA that cloudcore gives everybody.
fn own_ca(world: &World) -> Result<PathBuf> {
    let ca = world.dir().join("skerry-ca.crt");
    let given = run(Command::new("curl").arg("-skf").arg(format!("https://{}/v1/ca", world.cloud.address())), 30)?;
    ensure!(given.stdout.contains("BEGIN CERTIFICATE"), "cloudcore's CA: {}", given.text());
    fs::write(&ca, given.stdout)?;
    Ok(ca)
}

fn tell(process: &Process) {
    eprintln!("--- {} ---\n{}", process.log().display(), process.log_tail(30));
}

/// kubectl top, once metrics-server has seen everything twice.
fn tops(world: &World) -> Result<()> {
    let top = |arguments: &[&str]| -> Result<Option<String>> {
        let output = world.kubectl.output(&[&["top"], arguments].concat())?;
        Ok(output.success.then_some(output.stdout))
    };
    let node = world.edge.name();
    let text = eventually("kubectl top node", 90, || Ok(top(&["node", node])?.filter(|text| text.contains("Mi "))))?;
    ensure!(text.lines().count() == 2 && text.contains(node) && !text.contains("unknown"), "{text}");
    let text = eventually("kubectl top pod", 60, || top(&["pod", "ops", "--containers"]))?;
    for container in ["box", "talker", "echo", "server"] {
        let row = text.lines().find(|line| line.split_whitespace().nth(1) == Some(container));
        let row = row.with_context(|| format!("no {container} in {text}"))?;
        ensure!(row.contains('m') && row.trim_end().ends_with("Mi"), "{row:?}");
    }
    Ok(())
}

/// Once somebody approves, the cluster's own CA is enough to verify a node.
fn signs(world: &World) -> Result<()> {
    let ca = world.dir().join("cluster-ca.crt");
    fs::write(&ca, control()?.ca_pem()?)?;
    let url = format!("{}/healthz", world.kubelet()?);
    let verified = || {
        let answer = run(
            Command::new("curl").args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert"]).arg(&ca).arg(&url),
            20,
        )?;
        Ok(answer.stdout == "401")
    };
    ensure!(!verified()?, "the cluster's CA verifies what it has not signed");
    let requests = world.admin().list("certificatesigningrequests", "")?;
    let of_ours = requests.iter().filter_map(|request| request["metadata"]["name"].as_str());
    let of_ours: Vec<&str> = of_ours.filter(|name| name.starts_with("skerry-cloudcore-")).collect();
    ensure!(!of_ours.is_empty(), "cloudcore asks for no certificate");
    world.admin().run(&[&["certificate", "approve"], &of_ours[..]].concat())?;
    until("the node's port to show what the cluster signed", 60, verified)
}

/// What the box itself says, with nobody's help.
fn own_top(world: &World) -> Result<()> {
    for (arguments, words) in [(&["top", "node"][..], world.edge.name()), (&["top", "pod"], "ops")] {
        let output = world.edge.cli(arguments)?;
        ensure!(output.success && output.stdout.contains(words) && output.stdout.contains("Mi"), "{}", output.text());
    }
    Ok(())
}

struct MetricsServer {
    process: Process,
    admin: skerry_tests::kubectl::Kubectl,
}

impl MetricsServer {
    /// Outside of the cluster: its Service names this machine.
    fn start(world: &World, ca: &Path) -> Result<Self> {
        let (address, port) = (kubelet_address(), ports::free()?);
        ensure!(
            !address.is_loopback(),
            "an apiserver goes to no endpoint on loopback: give this machine another address"
        );
        let admin = world.admin().clone();
        admin.apply(&metrics_server_manifest(address, port).to_string())?;
        let dir = world.dir().join("metrics-server");
        fs::create_dir_all(&dir)?;
        let kubeconfig = control()?.service_account_kubeconfig("kube-system", "metrics-server", None)?;
        let mut command = Command::new(paths::cached_binary("metrics-server")?);
        for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
            command.arg(format!("--{flag}={}", kubeconfig.display()));
        }
        command
            .arg(format!("--secure-port={port}"))
            .arg(format!("--cert-dir={}", dir.display()))
            .arg(format!("--metric-resolution={RESOLUTION}"))
            .arg(format!("--kubelet-certificate-authority={}", ca.display()))
            .arg(format!("--kubelet-request-timeout={TIMEOUT}"))
            .arg(format!("--bind-address={address}"))
            .args(["--kubelet-use-node-status-port", "--kubelet-preferred-address-types=InternalIP"]);
        let process = Process::spawn("metrics-server", &mut command, &dir.join("metrics-server.log"))?;
        Ok(Self { process, admin })
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        // An API that nobody serves would hold up whoever deletes a namespace.
        self.admin.run(&["delete", "apiservice", "v1beta1.metrics.k8s.io", "--ignore-not-found"]).ok();
    }
}

/// What its own deployment has, but for the Deployment.
fn metrics_server_manifest(address: IpAddr, port: u16) -> Value {
    let account = json!([{"kind": "ServiceAccount", "name": "metrics-server", "namespace": "kube-system"}]);
    let rbac = "rbac.authorization.k8s.io";
    let version = format!("{rbac}/v1");
    let cluster_role = |name: &str| json!({"apiGroup": rbac, "kind": "ClusterRole", "name": name});
    json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "metrics-server", "namespace": "kube-system"}},
        {"apiVersion": version, "kind": "ClusterRole", "metadata": {"name": "system:metrics-server"}, "rules": [
            {"apiGroups": [""], "resources": ["nodes/metrics"], "verbs": ["get"]},
            {"apiGroups": [""], "resources": ["pods", "nodes"], "verbs": ["get", "list", "watch"]},
        ]},
        {"apiVersion": version, "kind": "ClusterRoleBinding", "metadata": {"name": "system:metrics-server"},
            "roleRef": cluster_role("system:metrics-server"), "subjects": account},
        {"apiVersion": version, "kind": "ClusterRoleBinding", "metadata": {"name": "metrics-server:system:auth-delegator"},
            "roleRef": cluster_role("system:auth-delegator"), "subjects": account},
        {"apiVersion": version, "kind": "RoleBinding", "metadata": {"name": "metrics-server-auth-reader", "namespace": "kube-system"},
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": "extension-apiserver-authentication-reader"}, "subjects": account},
        // The server is a process of this machine: the endpoint that `--enable-aggregator-routing` goes to.
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "metrics-server", "namespace": "kube-system"},
            "spec": {"ports": [{"port": 443, "targetPort": port}]}},
        {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "metrics-server", "namespace": "kube-system", "labels": {"kubernetes.io/service-name": "metrics-server"}},
            "endpoints": [{"addresses": [address]}], "ports": [{"port": port}]},
        {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": "v1beta1.metrics.k8s.io"}, "spec": {
            "group": "metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100,
            "insecureSkipTLSVerify": true, "service": {"name": "metrics-server", "namespace": "kube-system", "port": 443},
        }},
    ]})
}

struct Prometheus {
    process: Process,
    port: u16,
}

impl Prometheus {
    /// Without samples of any before it. By a ServiceAccount that may read metrics of nodes. Debian's has no discovery by Kubernetes: it is told what discovery would find.
    fn start(world: &World, name: &str, ca: &Path) -> Result<Self> {
        let kubectl = &world.kubectl;
        let account = json!([{"kind": "ServiceAccount", "name": "prometheus", "namespace": kubectl.namespace()}]);
        let metadata = json!({"name": "skerry-test-prometheus", "labels": guest::marks()});
        let manifest = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "prometheus"}},
            {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": metadata, "rules": [
                {"apiGroups": [""], "resources": ["nodes/metrics"], "verbs": ["get"]},
            ]},
            {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": metadata,
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": metadata["name"]}, "subjects": account},
        ]});
        kubectl.apply(&manifest.to_string())?;
        let dir = world.dir().join(format!("prometheus-{name}"));
        fs::create_dir_all(&dir)?;
        let write = |name: &str, text: &str| -> Result<PathBuf> {
            let path = dir.join(name);
            fs::write(&path, text)?;
            Ok(path)
        };
        let token = write("token", kubectl.run(&["create", "token", "prometheus"])?.trim())?;
        let node = world.node()?;
        let host = node["status"]["addresses"][0]["address"].as_str().context("the Node has no address")?;
        let target = format!("{host}:{}", world.port()?);
        let authorization = json!({"credentials_file": token});
        let job = |name: &str, path: &str| {
            json!({
                "job_name": name, "scheme": "https", "metrics_path": path, "authorization": authorization,
                "tls_config": {"ca_file": ca},
                "static_configs": [{"targets": [target], "labels": {"instance": world.edge.name()}}],
            })
        };
        let jobs = [
            job("cadvisor", "/metrics/cadvisor"),
            job("resource", "/metrics/resource"),
            job("kubelet", "/metrics"),
            job("devices", "/metrics/devices"),
        ];
        let config = json!({"global": {"scrape_interval": "2s", "scrape_timeout": "2s"}, "scrape_configs": jobs});
        let config = write("prometheus.yml", &config.to_string())?;
        let port = ports::free()?;
        let mut command = Command::new(paths::cached_binary("prometheus")?);
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let process = Process::spawn("prometheus", &mut command, &dir.join("prometheus.log"))?;
        Ok(Self { process, port })
    }

    /// What it found.
    fn reads(&self, world: &World) -> Result<()> {
        let node = world.edge.name();
        let namespace = world.kubectl.namespace();
        for job in ["cadvisor", "resource", "kubelet", "devices"] {
            until(&format!("Prometheus to have scraped {job}"), 60, || {
                self.has(&format!("up{{job=\"{job}\",instance=\"{node}\"}} == 1"))
            })?;
        }
        for query in [
            format!(
                "container_memory_working_set_bytes{{job=\"cadvisor\",namespace=\"{namespace}\",pod=\"ops\",container=\"box\"}} > 0"
            ),
            format!("container_cpu_usage_seconds_total{{job=\"cadvisor\",namespace=\"{namespace}\",pod=\"ops\"}}"),
            format!("pod_memory_working_set_bytes{{job=\"resource\",namespace=\"{namespace}\",pod=\"ops\"}} > 0"),
            "resource_scrape_error{job=\"resource\"} == 0".to_owned(),
            "kubelet_running_pods{job=\"kubelet\"} > 0".to_owned(),
            "devices{job=\"devices\"} >= 0".to_owned(),
        ] {
            until(&format!("Prometheus to know {query}"), 20, || self.has(&query))?;
        }
        // Every page was one that it could read whole.
        std::thread::sleep(Duration::from_secs(4));
        ensure!(self.has(&format!("min_over_time(up{{instance=\"{node}\"}}[1m]) == 1"))?, "a scrape failed");
        Ok(())
    }

    fn has(&self, query: &str) -> Result<bool> {
        let url = format!("http://127.0.0.1:{}/api/v1/query", self.port);
        let answer = run(
            Command::new("curl")
                .args(["-s", "-m", "10", "-G", "--data-urlencode"])
                .arg(format!("query={query}"))
                .arg(url),
            20,
        )?;
        let Ok(answer) = serde_json::from_str::<Value>(&answer.stdout) else { return Ok(false) };
        ensure!(answer["status"] != "error", "{query}: {answer}");
        Ok(answer["data"]["result"].as_array().is_some_and(|found| !found.is_empty()))
    }
}
