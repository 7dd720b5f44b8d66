//! Pods on a runtime in this process.

use std::path::Path;

use bytes::Bytes;
use serde_json::{Value, json};
use skerry_proto::payload::PodReport;
use skerry_proto::sync::{Object, Op, Report};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::*;
use crate::kubelet::cgroup::Cgroups;
use crate::kubelet::context::Parts;
use crate::kubelet::images::Images;
use crate::kubelet::node::{Paths, Resources, facts};
use crate::kubelet::resources::Machine;
use crate::kubelet::volumes::Volumes;
use crate::link::{LinkState, Transport};
use crate::runtime::cri::Setup;
use crate::runtime::fake::{ExecScript, FakeRuntime, Script};
use crate::runtime::{Cri, connect};
use crate::store::Store;
use crate::supervise;

/// A kubelet's pods on a store, until it is dropped.
pub(crate) struct Agent {
    pub(crate) store: Store,
    pub(crate) context: Arc<Context>,
    shutdown: CancellationToken,
    pods: JoinHandle<()>,
    _wanted: broadcast::Sender<ReportWanted>,
}

impl Agent {
    pub(crate) fn start(dir: &Path, store: &str, endpoint: &str) -> Self {
        let store = Store::open(&dir.join(store), jiff::Timestamp::UNIX_EPOCH).unwrap();
        let channel = connect::channel(endpoint).unwrap();
        let cri = Cri::new(channel.clone());
        let paths = Paths { pods_root: dir.join("pods"), logs_root: dir.join("logs"), log_links: dir.join("links") };
        let capacity =
            Resources { cpus: 4, memory: 4 << 30, ephemeral_storage: 1 << 30, pods: 110, hugepages: BTreeMap::new() };
        let facts = facts("box", &capacity, vec!["192.0.2.1".parse().unwrap()], paths, &Setup::default(), None);
        let parts = Parts {
            store: store.clone(),
            cri: cri.clone(),
            volumes: Volumes::new(dir.join("pods")),
            // None is made: with systemd's driver the pods' paths are not those of slices.
            cgroups: Cgroups::discover(true).unwrap(),
            images: Images::new(
                cri.clone(),
                watch::channel(LinkState::Online {
                    since: jiff::Timestamp::UNIX_EPOCH,
                    epoch: 1,
                    transport: Transport::Quic,
                })
                .1,
            ),
            facts: watch::channel(Arc::new(facts)).1,
            machine: Machine::default(),
            network: watch::channel(None).1,
            sandbox_turns: Semaphore::new(4),
        };
        let (context, events) = Context::new(parts, "box");
        let context = Arc::new(context);
        supervise::spawn("events", crate::kubelet::context::keep_events(store.clone(), events));
        let (shutdown, wanted) = (CancellationToken::new(), broadcast::channel(1).0);
        let pods = Pods::new(context.clone()).run(
            crate::runtime::events(cri, channel),
            wanted.subscribe(),
            ResetRequests::new(mpsc::channel(1).1),
            shutdown.clone(),
        );
        Self { store, context, shutdown, pods: supervise::spawn("pods", pods), _wanted: wanted }
    }

    pub(crate) async fn apply(&self, collection: Collection, name: &str, json: &Value) {
        let object = Object::new(collection, name.to_owned(), format!("uid-{name}"), json.to_string().as_bytes());
        self.store.apply(vec![Op::Upsert(object)]).await.unwrap();
    }

    /// The service that every pod is told of.
    async fn service(&self) {
        let ports = json!([{"port": 443, "protocol": "TCP"}]);
        let service = json!({
            "metadata": {"name": "kubernetes", "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.1", "ports": ports},
        });
        self.apply(Collection::Services, "default/kubernetes", &service).await;
    }

    pub(crate) async fn want(&self, pod: &Value) {
        self.service().await;
        self.apply(Collection::Pods, "p", pod).await;
    }

    /// The first status reported for which this holds.
    pub(crate) async fn status(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        let status = |report: &Report| serde_json::from_slice::<PodReport>(&report.payload).unwrap().status;
        self.reported(ReportKind::PodStatus, status, wanted).await
    }

    /// The first event recorded with this reason.
    pub(crate) async fn event(&self, reason: &str) -> Value {
        let event = |report: &Report| serde_json::from_slice::<Value>(&report.payload).unwrap();
        self.reported(ReportKind::Event, event, |event| event["reason"] == reason).await
    }

    async fn reported(
        &self,
        kind: ReportKind,
        read: impl Fn(&Report) -> Value,
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        let patience = clock::monotonic() + Duration::from_secs(60);
        loop {
            let reports = self.store.all_reports(0, 1 << 20).await.unwrap();
            let found = reports.iter().filter(|report| report.kind == kind).map(&read).find(&wanted);
            tokio::time::sleep(Duration::from_millis(5)).await;
            match found {
                Some(found) => return found,
                None => assert!(clock::monotonic() < patience, "never said; instead: {reports:?}"),
            }
        }
    }

    pub(crate) async fn end(self) {
        self.shutdown.cancel();
        self.pods.await.unwrap();
        self.store.close().await;
    }
}

fn pod() -> Value {
    json!({
        "metadata": {"name": "p", "namespace": "default", "uid": "uid-p"},
        "spec": {"nodeSelector": {"disk": "ssd"}, "containers": [{"name": "c", "image": "img:1"}]},
    })
}

/// An agent whose pod runs, as it has reported.
async fn running(dir: &Path) -> (String, FakeRuntime, Agent) {
    let (endpoint, fake) = FakeRuntime::start(dir).unwrap();
    fake.image("img:1", Script::default());
    let agent = Agent::start(dir, "store", &endpoint);
    agent.apply(Collection::Node, "box", &json!({"metadata": {"labels": {"disk": "ssd"}}})).await;
    agent.want(&pod()).await;
    agent.status(|status| status["phase"] == "Running").await;
    (endpoint, fake, agent)
}

#[tokio::test]
async fn a_pod_that_runs_is_not_judged_again_when_the_store_was_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, fake, agent) = running(dir.path()).await;
    let running = fake.running("c");
    assert_eq!(running.len(), 1);
    agent.end().await;

    // The label by which the pod was scheduled went, which ends no pod that runs.
    let agent = Agent::start(dir.path(), "another-store", &endpoint);
    agent.apply(Collection::Node, "box", &json!({"metadata": {"labels": {}}})).await;
    agent.apply(Collection::Pods, "p", &pod()).await;
    let status = agent.status(|_| true).await;
    assert_eq!(status["phase"], "Running", "{status}");
    assert_eq!(fake.running("c"), running);
    agent.end().await;
}

#[tokio::test]
async fn a_kubelet_that_starts_reports_every_pod_whatever_its_notes_say() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, _fake, agent) = running(dir.path()).await;
    agent.end().await;
    let store = Store::open(&dir.path().join("store"), jiff::Timestamp::UNIX_EPOCH).unwrap();
    let pending = store.all_reports(0, 1 << 20).await.unwrap();
    store.reports_done(pending.iter().map(|report| (report.id, String::new())).collect()).await.unwrap();
    store.close().await;

    // A store that was put back says what was reported then, and not what has been since.
    let agent = Agent::start(dir.path(), "store", &endpoint);
    agent.status(|status| status["phase"] == "Running").await;
    agent.end().await;
}

#[tokio::test]
async fn a_new_pod_is_judged_when_the_runtime_can_be_asked_about_it() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, fake) = FakeRuntime::start(dir.path()).unwrap();
    let agent = Agent::start(dir.path(), "store", &endpoint);
    agent.store.remember("kind", "key", Bytes::new()).await.unwrap();
    fake.stop();
    agent.apply(Collection::Pods, "p", &pod()).await;
    fake.serve().unwrap();
    let status = agent.status(|_| true).await;
    assert_eq!((&status["phase"], &status["reason"]), (&json!("Failed"), &json!("NodeAffinity")), "{status}");
    agent.end().await;
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let patience = clock::monotonic() + Duration::from_secs(60);
    while !holds() {
        assert!(clock::monotonic() < patience, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn with_hooks(hooks: &Value) -> Value {
    json!({
        "metadata": {"name": "p", "namespace": "default", "uid": "uid-p"},
        "spec": {"enableServiceLinks": false, "containers": [{"name": "c", "image": "img:1", "lifecycle": hooks}]},
    })
}

#[tokio::test]
async fn a_pod_that_nobody_knows_any_more_hears_its_hook() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, fake) = FakeRuntime::start(dir.path()).unwrap();
    fake.image("img:1", Script::default());
    let agent = Agent::start(dir.path(), "store", &endpoint);
    agent.want(&with_hooks(&json!({"preStop": {"exec": {"command": ["say", "bye"]}}}))).await;
    agent.status(|status| status["phase"] == "Running").await;
    agent.end().await;

    // Its object went while edgecore was away.
    let store = Store::open(&dir.path().join("another-store"), jiff::Timestamp::UNIX_EPOCH).unwrap();
    store.set_pods_known(0).await.unwrap();
    store.close().await;
    let agent = Agent::start(dir.path(), "another-store", &endpoint);
    eventually("the sandbox is removed", || fake.sandboxes().is_empty()).await;
    let calls = fake.calls();
    let at = |call: &str| calls.iter().position(|one| one.starts_with(call));
    assert!(at("ExecSync say bye").is_some() && at("ExecSync say bye") < at("StopContainer"), "{calls:?}");
    let event = agent.event("Killing").await;
    let of = ["name", "namespace", "uid"].map(|key| event["involvedObject"][key].clone());
    assert_eq!(
        (&of, &event["metadata"]["namespace"]),
        (&["p", "default", "uid-p"].map(Value::from), &"default".into())
    );
    agent.end().await;
}

#[tokio::test]
async fn a_container_whose_first_hook_failed_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, fake) = FakeRuntime::start(dir.path()).unwrap();
    fake.image("img:1", Script::default());
    fake.execs([ExecScript::Ends("", 1)]);
    fake.hold("ExecSync");
    let agent = Agent::start(dir.path(), "store", &endpoint);
    agent.want(&with_hooks(&json!({"postStart": {"exec": {"command": ["x"]}}}))).await;
    agent.status(|status| status["phase"] == "Running").await;
    fake.hold("CreateContainer");
    fake.release("ExecSync");
    let reason = |status: &Value| status["containerStatuses"][0]["state"]["waiting"]["reason"].clone();
    let status = agent.status(|status| reason(status) == "PostStartHookError").await;
    assert_eq!(status["containerStatuses"][0]["lastState"]["terminated"]["exitCode"], 143, "{status}");
    fake.release("CreateContainer");
    agent.end().await;
}

#[tokio::test]
async fn a_container_that_cannot_be_stopped_is_an_event() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, fake) = FakeRuntime::start(dir.path()).unwrap();
    fake.image("img:1", Script::default());
    let agent = Agent::start(dir.path(), "store", &endpoint);
    let mut pod = with_hooks(&json!({}));
    agent.want(&pod).await;
    agent.status(|status| status["phase"] == "Running").await;
    fake.fail("StopContainer", tonic::Status::unknown("the shim is gone"));
    pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    pod["metadata"]["deletionGracePeriodSeconds"] = json!(1);
    agent.apply(Collection::Pods, "p", &pod).await;
    let event = agent.event("FailedKillPod").await;
    let message = event["message"].as_str().unwrap();
    assert!(message.starts_with("error killing pod: ") && message.contains("the shim is gone"), "{message}");
    agent.end().await;
}

#[tokio::test]
async fn an_image_that_somebody_else_brought_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, fake) = FakeRuntime::start(dir.path()).unwrap();
    let agent = Agent::start(dir.path(), "store", &endpoint);
    agent.service().await;
    let pod: Pod = serde_json::from_value(with_hooks(&json!({}))).unwrap();
    // Minutes of back-off, of which hardly any has gone by.
    let failed = clock::wall().checked_sub(Duration::from_secs(20)).unwrap();
    let mut memory = Memory::default();
    let due = (0..6).map(|_| memory.pulls.failed("img:1", failed)).last();
    assert!(due.unwrap().duration_since(clock::wall()) > jiff::SignedDuration::from_secs(200));
    fake.image("img:1", Script::default());
    let desired = Desired {
        life: Life::of(&pod),
        pod: Arc::new(pod),
        admission: Admission::Admitted,
        references: 0,
        look: 0,
        resend: 0,
    };
    let (_desired, receiver) = watch::channel(desired);
    let beginning = Beginning { memory, observed: None, at_start: false, over: Arc::default() };
    let worker = supervise::spawn("worker", worker::run(agent.context.clone(), receiver, beginning));
    agent.status(|status| status["phase"] == "Running").await;
    worker.abort();
    agent.end().await;
}
