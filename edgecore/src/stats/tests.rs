//! Pages over real sockets: a runtime in this process, and directories that stand for cgroups.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use skerry_proto::sync::{Collection, Object, Op};
use tokio::sync::watch;

use super::page::strict::{self, Sample};
use super::*;
use crate::kubelet::cgroup::Cgroups;
use crate::kubelet::context::Parts;
use crate::kubelet::images::Images;
use crate::kubelet::memory::ProbeResult;
use crate::kubelet::node::{Paths, Resources, facts};
use crate::kubelet::observed::{Instance, Sandbox, State, label};
use crate::kubelet::probes::{PodProbes, Results};
use crate::kubelet::resources;
use crate::kubelet::volumes::Volumes;
use crate::kubelet::volumes::tests::is_root;
use crate::link::LinkState;
use crate::runtime::cri::Setup;
use crate::runtime::fake::{FakeRuntime, Script};
use crate::runtime::{Cri, connect};
use crate::store::Store;

const MEMORY_V2: &str = "anon 300\nfile 500\nfile_mapped 20\ninactive_file 400\npgfault 7\npgmajfault 1\n";
const MEMORY_V1: &str = "cache 1\nrss 1\ninactive_file 1\ntotal_cache 500\ntotal_rss 300\ntotal_mapped_file 20\n\
    total_swap 8\ntotal_pgfault 7\ntotal_pgmajfault 1\ntotal_inactive_file 400\n";

/// A box with its pods.
struct Bench {
    dir: tempfile::TempDir,
    version: u8,
    fake: FakeRuntime,
    store: Store,
    cri: Cri,
    context: Arc<Context>,
    stats: Stats,
}

impl Bench {
    fn new(version: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, fake) = FakeRuntime::start(dir.path()).unwrap();
        fake.image("nginx:1", Script::default());
        fake.setup(r#"{"sandboxImage": "pause:3"}"#, None);
        let cri = Cri::new(connect::channel(&endpoint).unwrap());
        let store = Store::open(&dir.path().join("store"), Timestamp::UNIX_EPOCH).unwrap();
        let at = |name: &str| dir.path().join(name);
        let paths = Paths { pods_root: at("pods"), logs_root: at("logs"), log_links: at("links") };
        let capacity =
            Resources { cpus: 4, memory: 4 << 30, ephemeral_storage: 1 << 30, pods: 110, hugepages: BTreeMap::new() };
        let facts = facts("box", &capacity, Vec::new(), paths, &Setup::default(), None);
        let link = LinkState::Offline { since: Timestamp::UNIX_EPOCH, reason: String::new() };
        let parts = Parts {
            store: store.clone(),
            cri: cri.clone(),
            volumes: Volumes::new(at("pods")),
            cgroups: Cgroups::standing_at(&at("cgroup"), version),
            images: Images::new(cri.clone(), watch::channel(link).1),
            facts: watch::channel(Arc::new(facts)).1,
            machine: resources::Machine::default(),
            network: watch::channel(None).1,
            sandbox_turns: Semaphore::new(4),
        };
        let context = Arc::new(Context::new(parts, "box").0);
        let bench = Self {
            stats: Stats::new(context.clone(), connect::socket_path(&endpoint).unwrap()),
            dir,
            version,
            fake,
            store,
            cri,
            context,
        };
        bench.cgroup("", 9_000_000_000, 0);
        bench.cgroup("kubepods", 3_000_000_000, 2000);
        bench
    }

    /// Writes the files of a cgroup that has used so much, in nanoseconds and bytes. Of the bytes 400 are inactive.
    fn cgroup(&self, path: &str, cpu: u64, memory: u64) {
        let put = |dir: PathBuf, files: &[(&str, String)]| {
            fs::create_dir_all(&dir).unwrap();
            for (name, text) in files {
                fs::write(dir.join(name), text).unwrap();
            }
        };
        let at = |controller: &str| self.dir.path().join("cgroup").join(controller).join(path);
        let pid = ("cgroup.procs", format!("{}\n", std::process::id()));
        if self.version == 2 {
            let files = [
                ("cpu.stat", format!("usage_usec {}\nuser_usec 3\nsystem_usec 4\n", cpu / 1000)),
                ("memory.current", format!("{memory}\n")),
                ("memory.stat", MEMORY_V2.to_owned()),
                ("memory.swap.current", "8\n".to_owned()),
                ("memory.max", "1048576\n".to_owned()),
                ("memory.swap.max", "4096\n".to_owned()),
                ("pids.current", "3\n".to_owned()),
                ("cpu.pressure", "some avg10=0.50 avg60=0.00 avg300=0.00 total=7\n".to_owned()),
                ("cpu.max", "50000 100000\n".to_owned()),
                ("io.stat", "8:7777 rbytes=1 wbytes=2 rios=3 wios=4\n".to_owned()),
                ("memory.events", "oom 2\noom_kill 1\n".to_owned()),
                pid,
            ];
            return put(at(""), &files);
        }
        put(at("cpuacct"), &[("cpuacct.usage", format!("{cpu}\n")), pid]);
        put(at("pids"), &[("pids.current", "3\n".to_owned())]);
        let stat = ("memory.stat", MEMORY_V1.to_owned());
        let limit = ("memory.limit_in_bytes", "1048576\n".to_owned());
        let swap = ("memory.memsw.limit_in_bytes", "4096\n".to_owned());
        put(at("memory"), &[("memory.usage_in_bytes", format!("{memory}\n")), stat, limit, swap]);
        put(at("cpu"), &[("cpu.cfs_quota_us", "50000\n".to_owned()), ("cpu.cfs_period_us", "100000\n".to_owned())]);
    }

    /// A pod of one container, `app`, that runs; its sandbox and its container.
    async fn pod(&self, name: &str) -> (String, String) {
        let (uid, key) = (format!("uid-{name}"), format!("shop/{name}"));
        let object = Object::new(Collection::Pods, key, uid.clone(), b"{}");
        self.store.apply(vec![Op::Upsert(object)]).await.unwrap();
        let labels = HashMap::from([(label::POD_UID.to_owned(), uid.clone())]);
        let logs = self.dir.path().join("logs").join(name);
        fs::create_dir_all(logs.join("app")).unwrap();
        fs::write(logs.join("app/0.log"), vec![b'x'; 5000]).unwrap();
        let sandbox_config = cri::PodSandboxConfig {
            labels: labels.clone(),
            log_directory: logs.to_string_lossy().into_owned(),
            ..Default::default()
        };
        let sandbox = self.cri.run_sandbox(sandbox_config.clone(), "").await.unwrap();
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "app".to_owned(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: "nginx:1".to_owned(), ..Default::default() }),
            labels: labels.into_iter().chain([(label::CONTAINER_NAME.to_owned(), "app".to_owned())]).collect(),
            log_path: "app/0.log".to_owned(),
            ..Default::default()
        };
        let container = self.cri.create_container(&sandbox, config, sandbox_config).await.unwrap();
        self.cri.start_container(&container).await.unwrap();
        let path = format!("kubepods/burstable/pod{uid}");
        self.cgroup(&path, 2_000_000_000, 1500);
        self.cgroup(&format!("{path}/{sandbox}"), 1000, 500);
        self.cgroup(&format!("{path}/{container}"), 1_500_000_000, 1000);
        let volumes = self.dir.path().join("pods/pods").join(&uid).join("volumes/kubernetes.io~empty-dir/cache");
        fs::create_dir_all(&volumes).unwrap();
        (sandbox, container)
    }

    async fn resource(&self) -> Vec<Sample> {
        strict::parse(&self.stats.resource().await).unwrap()
    }

    async fn summary(&self, only_cpu_and_memory: bool) -> Value {
        serde_json::from_slice(&self.stats.summary(only_cpu_and_memory).await).unwrap()
    }
}

fn value(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    samples.iter().find(|sample| sample.is(name, labels)).map(|sample| sample.value)
}

const APP: [(&str, &str); 3] = [("namespace", "shop"), ("pod", "web"), ("container", "app")];

#[tokio::test]
async fn both_versions_of_cgroups_give_the_resources_that_metrics_server_reads() {
    for version in [1, 2] {
        let bench = Bench::new(version);
        bench.pod("web").await;
        let samples = bench.resource().await;
        let of = |name: &str, labels: &[(&str, &str)]| value(&samples, name, labels);
        assert_eq!(of("container_cpu_usage_seconds_total", &APP), Some(1.5), "v{version}");
        assert_eq!(of("container_memory_working_set_bytes", &APP), Some(600.0), "v{version}");
        assert_eq!(of("container_swap_usage_bytes", &APP), Some(8.0));
        assert_eq!(of("container_swap_limit_bytes", &APP), Some(4096.0));
        assert_eq!(of("pod_cpu_usage_seconds_total", &APP[..2]), Some(2.0));
        assert_eq!(of("pod_memory_working_set_bytes", &APP[..2]), Some(1100.0));
        assert_eq!(of("node_cpu_usage_seconds_total", &[]), Some(9.0));
        assert!(of("node_memory_working_set_bytes", &[]) > Some(0.0));
        assert!(of("container_start_time_seconds", &APP) > Some(1.7e9));
        assert_eq!(of("resource_scrape_error", &[]), Some(0.0));
        // metrics-server takes rates by these.
        let dated = |sample: &Sample| {
            sample.at.is_some() == (sample.name.ends_with("_total") || sample.name.contains("_bytes"))
        };
        assert!(samples.iter().all(dated), "{samples:?}");
    }
}

#[tokio::test]
async fn the_summary_has_rates_at_once_and_everything_when_asked_for_everything() {
    let bench = Bench::new(2);
    let (_, container) = bench.pod("web").await;
    let summary = bench.summary(false).await;
    let node = &summary["node"];
    assert_eq!(node["nodeName"], "box");
    assert_eq!(node["cpu"]["usageCoreNanoSeconds"], 9_000_000_000_u64);
    assert_eq!(node["cpu"]["usageNanoCores"], 0);
    for part in ["startTime", "memory", "swap", "fs", "rlimit", "runtime"] {
        assert!(!node[part].is_null(), "{part}: {node}");
    }
    let names: Vec<_> = node["systemContainers"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["kubelet", "runtime", "pods"]);
    for program in &node["systemContainers"].as_array().unwrap()[..2] {
        assert!(program["memory"]["rssBytes"].as_u64() > Some(0), "{program}");
        assert!(program["cpu"]["usageNanoCores"].is_u64(), "{program}");
    }
    let pod = &summary["pods"][0];
    assert_eq!(pod["podRef"], serde_json::json!({"name": "web", "namespace": "shop", "uid": "uid-web"}));
    assert_eq!(pod["memory"]["workingSetBytes"], 1100);
    assert_eq!(pod["memory"]["availableBytes"], 1_048_576 - 1100);
    // One in its sandbox and one in its container, of three threads each.
    assert_eq!((&pod["process_stats"]["process_count"], &pod["cpu"]["psi"]["some"]["total"]), (&2.into(), &7.into()));
    assert_eq!(pod["containers"][0]["swap"]["swapAvailableBytes"], 4096 - 8);
    assert_eq!(pod["volume"][0]["name"], "cache");
    let app = &pod["containers"][0];
    assert_eq!((&app["name"], &app["cpu"]["usageNanoCores"]), (&"app".into(), &0.into()));
    // The fake's layers are as large as ids are long.
    assert_eq!(app["rootfs"]["usedBytes"], container.len());
    assert!(app["logs"]["usedBytes"].as_u64() >= Some(5000) && app["logs"]["inodesUsed"] == 2);
    let parts = [&app["rootfs"], &app["logs"], &pod["volume"][0]].map(|fs| fs["usedBytes"].as_u64().unwrap());
    assert_eq!(pod["ephemeral-storage"]["usedBytes"], parts.iter().sum::<u64>());

    let few = bench.summary(true).await;
    for part in ["network", "fs", "rlimit", "runtime"] {
        assert!(few["node"][part].is_null(), "{part}");
    }
    let pod = &few["pods"][0];
    assert!(pod["volume"].is_null() && pod["ephemeral-storage"].is_null() && pod["process_stats"].is_null());
    assert!(pod["containers"][0]["rootfs"].is_null() && !pod["containers"][0]["memory"].is_null());
}

#[tokio::test]
async fn the_runtime_is_asked_for_its_storage_once_for_all_pages_of_a_while() {
    let bench = Bench::new(2);
    bench.pod("web").await;
    let asked = || {
        let calls = bench.fake.calls();
        ["ListContainerStats", "ImageFsInfo"].map(|name| calls.iter().filter(|call| call.starts_with(name)).count())
    };
    let first = bench.summary(false).await;
    assert_eq!(asked(), [1, 1]);
    bench.stats.cadvisor().await;
    let again = bench.summary(false).await;
    assert_eq!(asked(), [0, 0]);
    let layer = |summary: &Value| summary["pods"][0]["containers"][0]["rootfs"]["usedBytes"].clone();
    assert!(layer(&first).is_u64() && layer(&first) == layer(&again));
    // As if a while had gone by.
    if let Some((until, _)) = &mut bench.stats.0.kept().stored {
        *until = Duration::ZERO;
    }
    bench.summary(false).await;
    assert_eq!(asked(), [1, 1]);
}

#[tokio::test]
async fn cadvisors_page_is_labelled_as_cadvisor_does() {
    for version in [1, 2] {
        let bench = Bench::new(version);
        let (sandbox, container) = bench.pod("web").await;
        let samples = strict::parse(&bench.stats.cadvisor().await).unwrap();
        let of = |name: &str, labels: &[(&str, &str)]| value(&samples, name, labels);
        let id = format!("/kubepods/burstable/poduid-web/{container}");
        let labels = [APP[0], APP[1], APP[2], ("id", id.as_str()), ("name", container.as_str()), ("image", "nginx:1")];
        assert_eq!(of("container_memory_usage_bytes", &labels), Some(1000.0));
        assert_eq!(of("container_memory_rss", &labels), Some(300.0));
        assert_eq!(of("container_memory_cache", &labels), Some(500.0));
        assert_eq!(of("container_spec_cpu_quota", &labels), Some(50_000.0));
        assert_eq!(of("container_spec_memory_limit_bytes", &labels), Some(1_048_576.0));
        assert_eq!(of("container_spec_memory_swap_limit_bytes", &labels), Some(4096.0));
        assert_eq!((of("container_processes", &labels), of("container_threads", &labels)), (Some(1.0), Some(3.0)));
        assert_eq!(of("container_threads_max", &labels), Some(0.0));
        assert_eq!(of("container_memory_total_inactive_file_bytes", &labels), Some(400.0));
        assert_eq!(of("container_fs_usage_bytes", &labels), Some(container.len() as f64));
        assert!(of("container_start_time_seconds", &labels) > Some(1.7e9));
        let total = [labels[0], labels[1], labels[2], ("cpu", "total")];
        assert_eq!(of("container_cpu_usage_seconds_total", &total), Some(1.5));
        let pod = [APP[0], APP[1], ("container", ""), ("image", ""), ("id", "/kubepods/burstable/poduid-web")];
        assert_eq!(of("container_memory_working_set_bytes", &pod), Some(1100.0));
        assert_eq!(of("container_cpu_usage_seconds_total", &[("id", "/"), ("pod", "")]), Some(9.0));
        assert_eq!(of("container_scrape_error", &[]), Some(0.0));
        assert!(of("machine_cpu_cores", &[]) > Some(0.0) && of("machine_memory_bytes", &[]) > Some(0.0));
        assert!(of("machine_swap_bytes", &[]).is_some());
        // As many interfaces as this process has: the sandbox is in the same namespace.
        let here = proc::interfaces("self").unwrap().len();
        let traffic = samples.iter().filter(|sample| {
            let labels = [("container", ""), ("name", sandbox.as_str()), ("image", "pause:3"), ("pod", "web")];
            sample.is("container_network_receive_bytes_total", &labels)
        });
        assert_eq!(traffic.count(), here);
        let of_node = [("id", "/"), ("pod", "")];
        let traffic = samples.iter().filter(|sample| sample.is("container_network_receive_bytes_total", &of_node));
        assert_eq!(traffic.count(), here);
        if version == 2 {
            let device = [labels[0], labels[1], labels[2], ("device", "8:7777")];
            assert_eq!(of("container_fs_reads_total", &device), Some(3.0));
            assert_eq!(of("container_fs_writes_bytes_total", &device), Some(2.0));
            assert_eq!(of("container_oom_events_total", &labels), Some(1.0));
            assert_eq!(of("container_pressure_cpu_waiting_seconds_total", &labels), Some(0.000_007));
        }
        assert!(of("container_last_seen", &labels) > Some(1.7e9) && of("cadvisor_version_info", &[]) == Some(1.0));
    }
}

#[tokio::test]
async fn what_is_gone_costs_its_own_value_and_is_told() {
    let bench = Bench::new(2);
    let (_, container) = bench.pod("gone").await;
    bench.pod("web").await;
    fs::remove_dir_all(bench.dir.path().join("cgroup/kubepods/burstable/poduid-gone").join(container)).unwrap();
    let samples = bench.resource().await;
    assert_eq!(value(&samples, "resource_scrape_error", &[]), Some(1.0));
    assert_eq!(value(&samples, "container_cpu_usage_seconds_total", &APP), Some(1.5));
    assert_eq!(value(&samples, "pod_cpu_usage_seconds_total", &[("pod", "gone")]), Some(2.0));
    assert_eq!(value(&samples, "container_cpu_usage_seconds_total", &[("pod", "gone")]), None);
    let summary = bench.summary(false).await;
    assert_eq!(summary["pods"].as_array().unwrap().len(), 2);
    assert!(summary["pods"][0]["containers"][0]["cpu"].is_null());
    strict::parse(&bench.stats.cadvisor().await).unwrap();
}

#[tokio::test]
async fn without_the_runtime_pods_have_figures_and_containers_have_none() {
    let bench = Bench::new(2);
    bench.pod("web").await;
    bench.fake.stop();
    let samples = bench.resource().await;
    assert_eq!(value(&samples, "resource_scrape_error", &[]), Some(1.0));
    assert_eq!(value(&samples, "pod_cpu_usage_seconds_total", &APP[..2]), Some(2.0));
    assert_eq!(value(&samples, "container_cpu_usage_seconds_total", &[]), None);
    assert_eq!(bench.summary(false).await["pods"][0]["memory"]["usageBytes"], 1500);
    let cadvisor = strict::parse(&bench.stats.cadvisor().await).unwrap();
    assert_eq!(value(&cadvisor, "container_scrape_error", &[]), Some(1.0));
    let metrics = strict::parse(&bench.stats.metrics(&mqtt::Status::default()).await).unwrap();
    assert_eq!(value(&metrics, "kubelet_node_name", &[("node", "box")]), Some(1.0));
    assert_eq!(value(&metrics, "kubelet_running_pods", &[]), None);
}

#[tokio::test]
async fn the_kubelets_own_page_counts_pods_and_containers() {
    let bench = Bench::new(2);
    let (_, container) = bench.pod("web").await;
    bench.pod("other").await;
    bench.fake.exit(&container, 1, "Error");
    let mqtt = mqtt::Status { connected: true, refused: 3, ..mqtt::Status::default() };
    let metrics = strict::parse(&bench.stats.metrics(&mqtt).await).unwrap();
    let state = |state| value(&metrics, "kubelet_running_containers", &[("container_state", state)]);
    assert_eq!((state("running"), state("exited"), state("created")), (Some(1.0), Some(1.0), Some(0.0)));
    assert_eq!(value(&metrics, "kubelet_running_pods", &[]), Some(2.0));
    assert_eq!(value(&metrics, "skerry_mqtt_connected", &[]), Some(1.0));
    assert_eq!(value(&metrics, "skerry_mqtt_refused_total", &[]), Some(3.0));
    for name in ["process_start_time_seconds", "process_cpu_seconds_total", "process_resident_memory_bytes"] {
        assert!(value(&metrics, name, &[]) > Some(0.0), "{name}");
    }
    assert!(bench.stats.probes().await.is_empty());
}

#[tokio::test]
async fn probes_are_counted_as_they_run() {
    let bench = Bench::new(2);
    bench.pod("web").await;
    let pod = serde_json::json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "uid-web"},
        "spec": {"containers": [{"name": "app", "readinessProbe": {"exec": {"command": ["true"]}}}]},
    });
    let pod: Arc<Pod> = Arc::new(serde_json::from_value(pod).unwrap());
    let mut probes = PodProbes::start(bench.context.clone(), &pod, Results::new(), false).unwrap();
    let observed = bench.cri.observe(Some("uid-web")).await.unwrap().remove("uid-web").unwrap();
    probes.see(&pod, &observed, false, None);
    while probes.results().values().all(|known| known.readiness != Some(ProbeResult::Success)) {
        probes.changed().await;
    }
    let samples = strict::parse(&bench.stats.probes().await).unwrap();
    let labels =
        [APP[0], APP[1], APP[2], ("pod_uid", "uid-web"), ("probe_type", "Readiness"), ("result", "successful")];
    assert_eq!(value(&samples, "prober_probe_total", &labels), Some(1.0));
}

#[tokio::test]
async fn an_idle_node_asks_the_runtime_little() {
    let bench = Bench::new(2);
    bench.pod("web").await;
    bench.resource().await;
    bench.fake.calls();
    bench.resource().await;
    assert_eq!(bench.fake.calls().len(), 2);
    // Nothing is kept for who does not ask for rates.
    assert!(bench.stats.0.kept().samples.is_empty());
    bench.summary(true).await;
    assert_eq!(bench.fake.calls().len(), 2);
    assert!(!bench.stats.0.kept().samples.is_empty());
}

#[test]
fn what_is_kept_is_dropped_when_nobody_asks() {
    let asked = Duration::from_secs(1000);
    let mut kept = Kept { asked, expires: true, ..Kept::default() };
    kept.samples.observe("/a", asked, 1);
    assert_eq!(kept.expire(asked + Duration::from_secs(100)), Some(Duration::from_secs(200)));
    assert!(!kept.samples.is_empty());
    assert_eq!(kept.expire(asked + KEPT_FOR), None);
    assert!(kept.samples.is_empty() && !kept.expires);
    // Other pages are asked for all the time, a summary now and then.
    assert!(kept.lacks_samples(asked));
    kept.samples.observe("/", Duration::ZERO, 1);
    assert!(!kept.lacks_samples(asked + Duration::from_secs(299)));
    assert!(kept.lacks_samples(asked + Duration::from_secs(600)));
}

#[test]
fn figures_are_of_the_stores_pods_that_run() {
    let entry = |key: &str, uid: &str| (Collection::Pods, entry_of(key, uid));
    let index = || vec![entry("b/two", "2"), entry("a/one", "1"), (Collection::Secrets, entry_of("a/one", "9"))];
    let names = |listed: &[Listed]| -> Vec<String> { listed.iter().map(|one| one.name.clone()).collect() };
    assert_eq!(names(&snapshot::list(index(), None)), ["one", "two"]);
    let observed = BTreeMap::from([("1".to_owned(), Observed::default()), ("7".to_owned(), Observed::default())]);
    assert!(snapshot::list(index(), Some(observed)).is_empty());
}

fn entry_of(key: &str, uid: &str) -> skerry_proto::sync::Entry {
    skerry_proto::sync::Entry { key: key.to_owned(), uid: uid.to_owned(), version: 1 }
}

/// On a box with cgroups the figures of the real root.
#[test]
fn the_real_root_can_be_read() {
    let Ok(cgroups) = Cgroups::discover(false) else { return };
    let node = cgroup::read(&cgroups, "/", Depth::All);
    let none = |_: &str, _: &mut usize| Vec::new();
    let snapshot = snapshot::take(&cgroups, Vec::new(), &Wanted::cgroups(Depth::All), &none);
    assert!(snapshot.node.cpu.is_some() && snapshot.memory.is_some() && snapshot.booted.is_some());
    assert!(!snapshot.is_lacking && node.at <= snapshot.node.at);
    assert!(!Path::new("/proc/stat").exists() || snapshot.booted > Timestamp::from_second(1).ok());
}

/// A child in a cgroup; both go with it.
struct Child {
    process: std::process::Child,
    cgroups: Cgroups,
    pod: String,
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = self.cgroups.destroy(&self.pod);
        for controller in CONTROLLERS {
            let _ = self.cgroups.place(controller, &self.cgroups.top()).map(fs::remove_dir);
        }
    }
}

const CONTROLLERS: [&str; 4] = ["cpu", "cpuacct", "memory", "pids"];

#[test]
#[expect(clippy::print_stdout, reason = "a test that is skipped says so")]
#[expect(clippy::disallowed_methods, reason = "a test's thread may wait")]
fn a_container_on_the_real_hierarchies() {
    let name = "a_container_on_the_real_hierarchies";
    if !is_root(name) {
        return;
    }
    let base = format!("skerry-stats-test-{}", std::process::id());
    let cgroups = Cgroups::discover(false).unwrap().with_base(base);
    let pod = format!("{}/pod0b7a-2", cgroups.top());
    let container = format!("{pod}/cri-containerd-c0ffee.scope");
    // It says when it has worked, and works when it is told.
    let script = "read x; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; sleep 600";
    let (input, output) = (std::process::Stdio::piped(), std::process::Stdio::piped());
    let process = std::process::Command::new("sh").args(["-c", script]).stdin(input).stdout(output).spawn().unwrap();
    let mut child = Child { process, cgroups: cgroups.clone(), pod: pod.clone() };
    cgroups.apply(&resources::PodCgroup { path: pod, memory_limit: Some(64 << 20), ..resources::PodCgroup::default() });
    for controller in CONTROLLERS {
        let Some(dir) = cgroups.place(controller, &container) else { continue };
        let moved =
            fs::create_dir_all(&dir).and_then(|()| fs::write(dir.join("cgroup.procs"), child.process.id().to_string()));
        if let Err(error) = moved {
            println!("skipped, as cgroups cannot be made here ({error}): {name}");
            return;
        }
    }
    writeln!(child.process.stdin.as_mut().unwrap()).unwrap();
    let mut line = String::new();
    BufReader::new(child.process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "done\n");

    let instance = Instance {
        id: "c0ffee".to_owned(),
        sandbox: "5a4d".to_owned(),
        name: "app".to_owned(),
        restart_count: 0,
        state: State::Running,
        hash: 0,
        image: String::new(),
        image_id: String::new(),
        created_at: Timestamp::UNIX_EPOCH,
        started_at: None,
        finished_at: None,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        grace_period: None,
        log_path: String::new(),
    };
    let sandbox = Sandbox {
        id: "5a4d".to_owned(),
        pod: Default::default(),
        attempt: 0,
        ready: true,
        created_at: Timestamp::UNIX_EPOCH,
        ips: Vec::new(),
        host_network: false,
    };
    let listed =
        Listed { uid: "0b7a-2".to_owned(), sandbox: Some(sandbox), running: vec![instance], ..Listed::default() };
    let wanted = Wanted { network: true, ..Wanted::cgroups(Depth::All) };
    let take = || snapshot::take(&cgroups, vec![listed.clone()], &wanted, &|_, _| Vec::new());
    let counted =
        |snapshot: &Snapshot| snapshot.pods[0].containers[0].usage.memory.is_some_and(|memory| memory.faults > Some(0));
    let mut snapshot = take();
    // The kernel adds up what each processor counted every two seconds; on a busy machine nothing of it shows before.
    for _ in 0..100 {
        if counted(&snapshot) {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        snapshot = take();
    }
    assert!(!snapshot.is_lacking, "{snapshot:?}");
    let (above, below) = (&snapshot.pods[0], &snapshot.pods[0].containers[0]);
    let (cpu, memory) = (below.usage.cpu.unwrap(), below.usage.memory.unwrap());
    // The pod was read first, while the child went on.
    assert!(cpu.usage > 1_000_000 && above.usage.cpu.unwrap().usage > 1_000_000, "{snapshot:?}");
    assert!(memory.usage > 0 && memory.working_set <= memory.usage && memory.faults > Some(0), "{memory:?}");
    assert_eq!(above.usage.memory.unwrap().limit, Some(64 << 20));
    assert!(below.usage.processes >= Some(1));
    assert_eq!(above.interfaces.len(), proc::interfaces("self").unwrap().len());
    let cadvisor = strict::parse(&cadvisor::page(&snapshot, &Around::default())).unwrap();
    assert!(value(&cadvisor, "container_cpu_usage_seconds_total", &[("container", "app")]) > Some(0.0));
}
