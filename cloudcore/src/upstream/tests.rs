//! Reports at two replicas, to an apiserver that keeps one pod, its Node, an event and a DeviceStatus, and refuses what was made for another
//! version.

use std::convert::Infallible;

use kube::client::Body;
use serde_json::{Value, json};

use super::*;
use crate::closure::{Closures, DeviceInput, NodeInput, PodInput, Source};
use crate::config::PortRange;
use crate::nodes::EPOCH_ANNOTATION;

#[derive(Default)]
struct World {
    pod: Value,
    node: Value,
    /// Null: there is none.
    event: Value,
    device_status: Value,
    device: Value,
    version: u64,
    asked: Vec<String>,
    /// Of whose message no status is taken.
    poison: &'static str,
    /// What claims are answered. 0: they are taken.
    claims: u16,
}

type Shown = Arc<Mutex<World>>;

fn world(status: &Value) -> Shown {
    let pod = json!({
        "metadata": {"namespace": "n", "name": "p", "uid": "u", "resourceVersion": "10"},
        "spec": {"nodeName": "e", "containers": [{"name": "c"}]}, "status": status,
    });
    let annotations = json!({EPOCH_ANNOTATION: "1"});
    let node = json!({"metadata": {"name": "e", "uid": "e-1", "resourceVersion": "9", "annotations": annotations}});
    let device = json!({
        "metadata": {"namespace": "n", "name": "d", "uid": "u-d", "resourceVersion": "3"},
        "spec": {"nodeName": "e"}, "status": {"state": "online"},
    });
    Arc::new(Mutex::new(World { pod, node, device, version: 10, ..World::default() }))
}

/// Takes a status of the version that is there.
fn show(object: &mut Value, body: &[u8], version: &mut u64) -> (u16, Value) {
    let patch: Value = serde_json::from_slice(body).unwrap();
    if patch["metadata"]["resourceVersion"] != object["metadata"]["resourceVersion"] {
        return conflict();
    }
    *version += 1;
    object["metadata"]["resourceVersion"] = version.to_string().into();
    object["status"] = patch["status"].clone();
    (200, object.clone())
}

impl World {
    fn answer(&mut self, method: &str, path: &str, body: &[u8]) -> (u16, Value) {
        self.asked.push(format!("{method} {}", path.rsplit('/').next().unwrap_or_default()));
        match (method, path) {
            ("GET", "/api/v1/nodes/e") => (200, self.node.clone()),
            ("PATCH", "/api/v1/nodes/e/status") => show(&mut self.node, body, &mut self.version),
            (_, "/api/v1/namespaces/n/events" | "/api/v1/namespaces/n/events/p.1") => {
                let (code, answer, event) = keep(method, body, std::mem::take(&mut self.event), &mut self.version);
                self.event = event;
                (code, answer)
            }
            (_, DEVICE_STATUSES | DEVICE_STATUS) => {
                let kept = std::mem::take(&mut self.device_status);
                let (code, answer, kept) = keep(method, body, kept, &mut self.version);
                self.device_status = kept;
                (code, answer)
            }
            ("PATCH", DEVICE) => show(&mut self.device, body, &mut self.version),
            ("GET", path) if path.starts_with("/api/v1/namespaces/n/pods/of-") => not_found(),
            ("PATCH", "/api/v1/nodes/e") if self.claims == PANIC => panic!("over a claim"),
            ("PATCH", "/api/v1/nodes/e") if self.claims != 0 => {
                (self.claims, json!({"status": "Failure", "code": self.claims, "message": "a policy"}))
            }
            ("PATCH", "/api/v1/nodes/e") => {
                let patch: Value = serde_json::from_slice(body).unwrap();
                assert_eq!(patch["metadata"]["resourceVersion"], self.node["metadata"]["resourceVersion"]);
                self.claim(patch["metadata"]["annotations"][EPOCH_ANNOTATION].as_str().unwrap().parse().unwrap());
                (200, self.node.clone())
            }
            ("GET", "/api/v1/namespaces/n/pods/p") => (200, self.pod.clone()),
            ("PATCH", "/api/v1/namespaces/n/pods/p/status") => {
                let patch: Value = serde_json::from_slice(body).unwrap();
                if patch["metadata"]["resourceVersion"] != self.pod["metadata"]["resourceVersion"] {
                    return conflict();
                }
                let mut status = patch["status"].clone();
                if status["message"] == self.poison {
                    return (500, json!({"status": "Failure", "code": 500, "message": "a webhook failed"}));
                }
                for list in status.as_object_mut().unwrap().values_mut().filter_map(Value::as_array_mut) {
                    list.retain(|item| item["$patch"].is_null());
                }
                self.write(|pod| pod["status"] = status);
                (200, self.pod.clone())
            }
            other => panic!("{other:?}"),
        }
    }

    fn write(&mut self, change: impl FnOnce(&mut Value)) {
        self.version += 1;
        change(&mut self.pod);
        self.pod["metadata"]["resourceVersion"] = self.version.to_string().into();
    }

    fn claim(&mut self, epoch: u64) {
        self.version += 1;
        self.node["metadata"]["annotations"] = json!({EPOCH_ANNOTATION: epoch.to_string()});
        self.node["metadata"]["resourceVersion"] = self.version.to_string().into();
    }
}

/// In place of an answer.
const PANIC: u16 = 1;
const DEVICE_STATUSES: &str = "/apis/devices.kubeedge.io/v1beta1/namespaces/n/devicestatuses";
const DEVICE_STATUS: &str = "/apis/devices.kubeedge.io/v1beta1/namespaces/n/devicestatuses/d";

const DEVICE: &str = "/apis/devices.kubeedge.io/v1beta1/namespaces/n/devices/d";

fn conflict() -> (u16, Value) {
    (409, json!({"status": "Failure", "code": 409, "reason": "Conflict", "message": "modified"}))
}

fn not_found() -> (u16, Value) {
    let details = json!({"name": "it", "kind": "things"});
    (404, json!({"status": "Failure", "code": 404, "reason": "NotFound", "message": "none", "details": details}))
}

/// An object is shown, or created or patched, if it is of the version that was meant. Answers what there is then, too.
fn keep(method: &str, body: &[u8], kept: Value, version: &mut u64) -> (u16, Value, Value) {
    let said: Value = serde_json::from_slice(body).unwrap_or_default();
    let is_there = !kept.is_null();
    let mut new = kept.clone();
    match (method, said) {
        ("POST", _) if is_there => return (409, conflict().1, kept),
        ("POST", said) => new = said,
        ("GET" | "PATCH", _) if !is_there => return (404, not_found().1, kept),
        ("GET", _) => return (200, kept.clone(), kept),
        ("PATCH", Value::Array(steps)) => {
            assert_eq!(steps[0]["path"], "/metadata/resourceVersion");
            if steps[0]["value"] != kept["metadata"]["resourceVersion"] {
                return (409, conflict().1, kept);
            }
            new["status"] = steps[2]["value"].clone();
        }
        ("PATCH", said) => {
            if said["metadata"]["resourceVersion"] != kept["metadata"]["resourceVersion"] {
                return (409, conflict().1, kept);
            }
            new["count"] = said["count"].clone();
        }
        other => panic!("{other:?}"),
    }
    *version += 1;
    new["metadata"]["resourceVersion"] = version.to_string().into();
    (200, new.clone(), new)
}

/// A replica that has just listed everything.
fn replica(world: &Shown) -> Arc<Upstream> {
    let serve = {
        let world = world.clone();
        tower::service_fn(move |request: hyper::Request<Body>| {
            let world = world.clone();
            async move {
                let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
                let body = request.into_body().collect_bytes().await.unwrap();
                let (code, answer) = lock(&world).answer(&method, &path, &body);
                let answer = hyper::Response::builder().status(code).body(Body::from(answer.to_string().into_bytes()));
                Ok::<_, Infallible>(answer.unwrap())
            }
        })
    };
    let api = Apiserver::new(kube::Client::new(serve, "default"), crate::apiserver::Metrics::default());
    let shared = Shared::new(Closures::new("cluster.local", Vec::new()));
    let ports = Arc::new(Ports::new("127.0.0.1", PortRange { first: 20000, last: 20000 }, 1));
    let upstream = Upstream::new(api, shared, Arc::default(), ports);
    see_node(&upstream, world);
    see_pod(&upstream, world);
    upstream
}

/// Its watch of Nodes shows what there is.
fn see_node(upstream: &Upstream, world: &Shown) {
    let version = lock(world).version.to_string();
    let mut closures = upstream.shared.closures();
    closures.node_applied(NodeInput::of(lock(world).node.clone()));
    closures.reached(Source::Nodes, &version);
}

/// Its watch of pods does.
fn see_pod(upstream: &Upstream, world: &Shown) {
    let pod = lock(world).pod.clone();
    upstream.shared.closures().pod_applied(PodInput::of(pod), 1, clock::wall());
}

/// Its watch of devices does.
fn see_device(upstream: &Upstream, world: &Shown) {
    let device = lock(world).device.clone();
    upstream.shared.closures().device_applied(DeviceInput::device(device, true), 1);
}

fn status(word: &str) -> Value {
    json!({"phase": "Running", "startTime": "2026-01-01T00:00:00Z", "message": word})
}

fn report(word: &str) -> Report {
    let payload = json!({"status": status(word)}).to_string().into();
    let (namespace, name, uid) = ("n".to_owned(), "p".to_owned(), "u".to_owned());
    Report { id: 1, kind: ReportKind::PodStatus, namespace, name, uid, payload }
}

fn of_device(state: &str, word: &str) -> Report {
    let payload = json!({"status": {"state": state, "extensions": {"word": word}}}).to_string().into();
    let (namespace, name, uid) = ("n".to_owned(), "d".to_owned(), "u-d".to_owned());
    Report { id: 1, kind: ReportKind::DeviceStatus, namespace, name, uid, payload }
}

fn open(upstream: &Arc<Upstream>, epoch: u64) -> Arc<Queue> {
    let node = NodeIdentity { name: "e".to_owned(), uid: "e-1".to_owned() };
    upstream.open(&node, epoch, 1, false).queue.clone()
}

/// What a report comes to, and what is asked of the apiserver for it.
async fn tell(world: &Shown, upstream: &Upstream, queue: &Queue, word: &str) -> (Outcome, Vec<String>) {
    lock(world).asked.clear();
    let outcome = upstream.attempt(queue, &report(word), false).await;
    (outcome, std::mem::take(&mut lock(world).asked))
}

fn shown(world: &Shown) -> String {
    lock(world).pod["status"]["message"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn a_status_is_one_request_and_none_where_it_shows_already() {
    let world = world(&json!({"phase": "Pending"}));
    let upstream = replica(&world);
    let queue = open(&upstream, 1);
    for word in ["one", "two", "three"] {
        let (outcome, asked) = tell(&world, &upstream, &queue, word).await;
        assert!(matches!(outcome, Outcome::Taken));
        assert_eq!(asked, ["PATCH status"]);
        assert_eq!(shown(&world), word);
    }
    let (outcome, asked) = tell(&world, &upstream, &queue, "three").await;
    assert!(matches!(outcome, Outcome::Unchanged) && asked.is_empty());
    // Whoever writes something else of the pod makes it two more, before the watch shows it.
    lock(&world).write(|pod| pod["metadata"]["labels"] = json!({"a": "b"}));
    let (outcome, asked) = tell(&world, &upstream, &queue, "four").await;
    assert!(matches!(outcome, Outcome::Taken));
    assert_eq!(asked, ["PATCH status", "GET p", "PATCH status"]);
    lock(&world).write(|pod| pod["metadata"]["labels"] = json!({"a": "c"}));
    see_pod(&upstream, &world);
    assert_eq!(tell(&world, &upstream, &queue, "five").await.1, ["PATCH status"]);
    assert_eq!(shown(&world), "five");
}

#[tokio::test]
async fn the_status_of_an_older_session_never_takes_the_place_of_what_a_newer_one_wrote() {
    for sees_pod in [false, true] {
        let world = world(&status("before"));
        let old = replica(&world);
        let first = open(&old, 1);
        assert!(matches!(tell(&world, &old, &first, "one").await.0, Outcome::Taken));
        // Another replica takes the node over. The first one does not know.
        lock(&world).claim(2);
        let new = replica(&world);
        let second = open(&new, 2);
        assert!(matches!(tell(&world, &new, &second, "new").await.0, Outcome::Taken));
        if sees_pod {
            see_pod(&old, &world);
        }
        let (outcome, asked) = tell(&world, &old, &first, "late").await;
        assert!(matches!(outcome, Outcome::Superseded));
        let expected: &[&str] = if sees_pod { &["GET e"] } else { &["PATCH status", "GET p", "GET e"] };
        assert_eq!(asked, expected);
        assert_eq!(shown(&world), "new");
        // From then on it need not ask.
        let (outcome, asked) = tell(&world, &old, &first, "later").await;
        assert!(matches!(outcome, Outcome::Superseded) && asked.is_empty());
    }
}

#[tokio::test]
async fn a_session_that_begins_asks_for_its_node_only_where_its_watch_may_lag() {
    let world = world(&status("before"));
    let upstream = replica(&world);
    let queue = open(&upstream, 1);
    // All that happened to the Node before the pod was written is known.
    assert_eq!(tell(&world, &upstream, &queue, "one").await.1, ["PATCH status"]);
    lock(&world).write(|pod| pod["status"] = status("another replica's"));
    see_pod(&upstream, &world);
    assert_eq!(tell(&world, &upstream, &queue, "two").await.1, ["GET e", "PATCH status"]);
    lock(&world).write(|pod| pod["status"] = status("another replica's"));
    see_pod(&upstream, &world);
    see_node(&upstream, &world);
    assert_eq!(tell(&world, &upstream, &queue, "three").await.1, ["PATCH status"]);
}

#[tokio::test]
async fn what_an_older_session_wrote_late_is_reported_once_more() {
    let world = world(&status("same"));
    let (old, new) = (replica(&world), replica(&world));
    let (first, second) = (open(&old, 1), open(&new, 2));
    assert!(matches!(tell(&world, &new, &second, "same").await.0, Outcome::Unchanged));
    // Nobody has written the pod since it looked.
    assert!(matches!(tell(&world, &old, &first, "late").await.0, Outcome::Taken));
    new.queues.lock().unwrap().insert("e".to_owned(), second.clone());
    new.pod_seen("e", &PodFacts::of(&lock(&world).pod));
    assert_eq!(lock(&second.state).wanted(), Some((ReportKind::PodStatus, "u".to_owned())));
}

#[tokio::test]
async fn the_first_session_of_a_node_names_itself_before_it_writes_what_a_newer_one_may() {
    let world = world(&json!({"phase": "Pending"}));
    lock(&world).node["metadata"].as_object_mut().unwrap().remove("annotations");
    let upstream = replica(&world);
    let queue = open(&upstream, 3);
    for asked in [["PATCH e", "PATCH status"].as_slice(), &[]] {
        let mut state = State::default();
        state.inbox.push(report("one"));
        let Next::Now(waiting) = state.next(Duration::ZERO) else { panic!("it is due") };
        assert_eq!(upstream.carry_out(&queue, waiting).await, Some(End::Done(String::new())));
        assert_eq!(std::mem::take(&mut lock(&world).asked), asked);
    }
    assert_eq!(lock(&world).node["metadata"]["annotations"][EPOCH_ANNOTATION], "3");
}

#[tokio::test]
async fn a_session_that_had_nothing_to_claim_does_so_when_its_agents_former_life_has() {
    let world = world(&json!({"phase": "Pending"}));
    lock(&world).node["metadata"].as_object_mut().unwrap().remove("annotations");
    let upstream = replica(&world);
    let queue = open(&upstream, 3);
    // At another replica, which took its time.
    lock(&world).claim(2);
    see_node(&upstream, &world);
    let mut state = State::default();
    state.inbox.push(report("one"));
    let Next::Now(waiting) = state.next(Duration::ZERO) else { panic!("it is due") };
    assert_eq!(upstream.carry_out(&queue, waiting).await, Some(End::Done(String::new())));
    assert_eq!(lock(&world).asked, ["PATCH e", "PATCH status"]);
    assert_eq!(lock(&world).node["metadata"]["annotations"][EPOCH_ANNOTATION], "3");
}

#[tokio::test]
async fn a_claim_that_waits_is_made_over_the_node_as_it_is_then() {
    let world = world(&json!({}));
    let upstream = replica(&world);
    let busy = upstream.permits.acquire_many(u32::try_from(AT_ONCE).unwrap()).await.unwrap();
    let node = NodeIdentity { name: "e".to_owned(), uid: "e-1".to_owned() };
    let _reports = upstream.open(&node, 3, 1, true);
    tokio::task::yield_now().await;
    lock(&world).claim(2);
    see_node(&upstream, &world);
    drop(busy);
    while lock(&world).asked.is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(lock(&world).asked, ["PATCH e"]);
    assert_eq!(lock(&world).node["metadata"]["annotations"][EPOCH_ANNOTATION], "3");
}

#[tokio::test]
async fn what_a_node_said_is_not_tried_again_when_a_newer_session_has_it() {
    let world = world(&json!({}));
    let upstream = replica(&world);
    let queue = open(&upstream, 1);
    let payload = json!({"status": {"nodeInfo": {"kernelVersion": "6"}}, "addresses": ["10.0.0.1"]}).to_string().into();
    let (name, uid) = ("e".to_owned(), "e-1".to_owned());
    let report = Report { id: 1, kind: ReportKind::NodeStatus, namespace: String::new(), name, uid, payload };
    let asked = || std::mem::take(&mut lock(&world).asked);
    assert!(matches!(upstream.attempt(&queue, &report, false).await, Outcome::Taken));
    assert_eq!(asked(), ["PATCH status"]);
    assert!(matches!(upstream.attempt(&queue, &report, true).await, Outcome::Taken));
    assert_eq!(asked(), ["GET e", "PATCH status"]);
    lock(&world).claim(2);
    assert!(matches!(upstream.attempt(&queue, &report, true).await, Outcome::Superseded));
    assert_eq!(asked(), ["GET e"]);
}

#[tokio::test]
async fn the_node_of_a_newer_session_is_not_written_over() {
    let world = world(&json!({}));
    let (old, new) = (replica(&world), replica(&world));
    let (first, second) = (open(&old, 1), open(&new, 2));
    let report = |kernel: &str| {
        let payload = json!({"status": {"nodeInfo": {"kernelVersion": kernel}}, "addresses": ["10.0.0.1"]});
        let (name, uid, payload) = ("e".to_owned(), "e-1".to_owned(), payload.to_string().into());
        Report { id: 1, kind: ReportKind::NodeStatus, namespace: String::new(), name, uid, payload }
    };
    let shown = || lock(&world).node["status"]["nodeInfo"]["kernelVersion"].clone();
    for kernel in ["5", "6"] {
        // Its own writes do not stand in its way.
        assert!(matches!(old.attempt(&first, &report(kernel), false).await, Outcome::Taken));
        assert_eq!(shown(), kernel);
    }
    lock(&world).claim(2);
    assert!(matches!(old.attempt(&first, &report("late"), false).await, Outcome::Later(None)));
    see_node(&new, &world);
    assert!(matches!(new.attempt(&second, &report("7"), false).await, Outcome::Taken));
    for tried in [false, true] {
        let late = old.attempt(&first, &report("late"), tried).await;
        assert!(matches!(late, Outcome::Later(None)) || tried && matches!(late, Outcome::Superseded));
        assert_eq!(shown(), "7");
    }
    // Its watch comes to the newer one when the report is under way already.
    see_node(&old, &world);
    lock(&world).asked.clear();
    assert!(matches!(old.attempt(&first, &report("late"), false).await, Outcome::Superseded));
    assert_eq!(lock(&world).asked, [""; 0]);
}

#[tokio::test]
async fn the_status_of_a_device_is_looked_at_once_and_not_written_over_a_newer_sessions() {
    let world = world(&json!({}));
    let (old, new) = (replica(&world), replica(&world));
    let (first, second) = (open(&old, 1), open(&new, 2));
    see_device(&old, &world);
    see_device(&new, &world);
    let report = |word| of_device("online", word);
    let shown = || lock(&world).device_status["status"]["extensions"]["word"].clone();
    let asked = || std::mem::take(&mut lock(&world).asked);
    for (word, expected) in [("one", ["GET d", "POST devicestatuses"].as_slice()), ("two", &["PATCH d"])] {
        assert!(matches!(old.attempt(&first, &report(word), false).await, Outcome::Taken));
        assert_eq!(asked(), expected);
        assert_eq!(shown(), word);
    }
    lock(&world).claim(2);
    see_node(&new, &world);
    assert!(matches!(new.attempt(&second, &report("new"), false).await, Outcome::Taken));
    assert_eq!(asked(), ["GET d", "PATCH d"], "its watch of Nodes is as new as the status");
    assert!(matches!(old.attempt(&first, &report("late"), false).await, Outcome::Later(None)));
    assert_eq!(asked(), ["PATCH d"]);
    assert!(matches!(old.attempt(&first, &report("late"), true).await, Outcome::Superseded));
    assert_eq!(asked(), ["GET d", "GET e"]);
    assert_eq!(shown(), "new");
}

#[tokio::test]
async fn states_of_a_device_follow_one_another_faster_than_the_watch() {
    let world = world(&json!({}));
    let upstream = replica(&world);
    let queue = open(&upstream, 1);
    see_device(&upstream, &world);
    for state in ["offline", "online", "offline"] {
        assert!(matches!(upstream.attempt(&queue, &of_device(state, "one"), false).await, Outcome::Taken));
        assert_eq!(lock(&world).device["status"]["state"], state);
    }
    lock(&world).asked.clear();
    assert!(matches!(upstream.attempt(&queue, &of_device("offline", "two"), false).await, Outcome::Taken));
    assert_eq!(lock(&world).asked, ["PATCH d"], "it is known to show that state");
}

#[tokio::test]
async fn an_event_never_counts_down() {
    let world = world(&json!({}));
    let upstream = replica(&world);
    let queue = open(&upstream, 1);
    let report = |count: u64| {
        let involved = json!({"kind": "Pod", "namespace": "n", "name": "p", "uid": "u"});
        let metadata = json!({"name": "p.1", "namespace": "n"});
        let payload = json!({"metadata": metadata, "involvedObject": involved, "reason": "BackOff", "count": count});
        let payload = payload.to_string().into();
        let (namespace, name, uid) = ("n".to_owned(), "p.1".to_owned(), "u".to_owned());
        Report { id: 1, kind: ReportKind::Event, namespace, name, uid, payload }
    };
    let create = ["GET p.1", "POST events"].as_slice();
    let steps: [(u64, &[&str], u64); 5] = [
        (2, create, 2),
        (5, &["GET p.1", "PATCH p.1"], 5),
        (3, &["GET p.1"], 5),
        (5, &["GET p.1"], 5),
        (1, &["POST events"], 5),
    ];
    for (count, asked, shown) in steps {
        let outcome = upstream.attempt(&queue, &report(count), false).await;
        assert!(matches!(outcome, Outcome::Taken | Outcome::Unchanged));
        assert_eq!(std::mem::take(&mut lock(&world).asked), asked);
        assert_eq!(lock(&world).event["count"], shown);
    }
}

fn of_another_pod(id: u64, name: &str) -> Report {
    Report { id, name: name.to_owned(), uid: name.to_owned(), ..report("one") }
}

#[tokio::test]
async fn a_node_that_says_much_does_not_hold_up_one_that_says_little() {
    let world = world(&json!({"phase": "Pending"}));
    let upstream = replica(&world);
    // One request at a time, of all nodes.
    upstream.permits.forget_permits(AT_ONCE - 1);
    let busy = upstream.permits.acquire().await.unwrap();
    let node = |name: &str| NodeIdentity { name: name.to_owned(), uid: format!("{name}-1") };
    let (mut noisy, mut quiet) = (upstream.open(&node("e"), 1, 1, false), upstream.open(&node("q"), 1, 2, false));
    (0..200).for_each(|id| noisy.push(of_another_pod(id, &format!("of-e-{id}"))));
    quiet.push(of_another_pod(1, "of-q"));
    tokio::task::yield_now().await;
    drop(busy);
    let FeedEvent::Reported { id: 1, .. } = quiet.next().await else { panic!("it came to another end") };
    let at = lock(&world).asked.iter().position(|asked| asked == "GET of-q");
    assert!(at.is_some_and(|at| at <= 1), "behind {at:?} others");
    for _ in 0..200 {
        assert!(matches!(noisy.next().await, FeedEvent::Reported { .. }));
    }
}

#[tokio::test]
async fn reports_wait_for_leases_that_are_late() {
    let world = world(&json!({"phase": "Pending"}));
    let upstream = replica(&world);
    let node = NodeIdentity { name: "e".to_owned(), uid: "e-1".to_owned() };
    upstream.leases.begin_late(&node, 1);
    let mut reports = upstream.open(&node, 1, 1, false);
    reports.push(report("one"));
    for _ in 0..9 {
        tokio::task::yield_now().await;
    }
    assert_eq!(lock(&world).asked, [""; 0]);
    // Whoever renews has done it.
    upstream.leases.end(&node, 1);
    assert!(matches!(reports.next().await, FeedEvent::Reported { id: 1, .. }));
    assert_eq!(lock(&world).asked, ["PATCH status"]);
}

#[tokio::test]
async fn what_is_not_taken_is_given_back_where_other_things_are() {
    let world = world(&json!({"phase": "Pending"}));
    let upstream = replica(&world);
    let queue = open(&upstream, 1);
    lock(&world).poison = "poison";
    let waiting = |attempt: u32| {
        let mut state = State::default();
        state.inbox.push(report("poison"));
        let Next::Now(mut waiting) = state.next(Duration::ZERO) else { panic!("it is due") };
        waiting.attempt = attempt;
        waiting
    };
    let forget = || while let Next::Now(_) = lock(&queue.state).next(Duration::MAX) {};
    // Nothing is: it is kept and tried again.
    assert_eq!(upstream.carry_out(&queue, waiting(99)).await, None);
    forget();
    assert!(matches!(tell(&world, &upstream, &queue, "fine").await.0, Outcome::Taken));
    assert_eq!(upstream.carry_out(&queue, waiting(0)).await, None);
    forget();
    let least = waiting(99).put_off(None, true);
    let (Some(End::Later(after)), Some(End::Later(least))) = (upstream.carry_out(&queue, waiting(99)).await, least)
    else {
        panic!("it is kept")
    };
    assert!((least..=2 * least).contains(&after), "{after:?}");
}

fn of_node() -> Report {
    let payload = json!({"status": {"nodeInfo": {"kernelVersion": "6"}}, "addresses": ["10.0.0.1"]}).to_string().into();
    let (name, uid) = ("e".to_owned(), "e-1".to_owned());
    Report { id: 2, kind: ReportKind::NodeStatus, namespace: String::new(), name, uid, payload }
}

/// A session that had nothing to claim, whose Node names one of its agent's former life by now.
fn behind_a_former_life(world: &Shown) -> (Arc<Upstream>, Reports) {
    lock(world).node["metadata"].as_object_mut().unwrap().remove("annotations");
    let upstream = replica(world);
    let node = NodeIdentity { name: "e".to_owned(), uid: "e-1".to_owned() };
    let reports = upstream.open(&node, 3, 1, false);
    lock(world).claim(2);
    see_node(&upstream, world);
    (upstream, reports)
}

/// What comes next, if it comes.
async fn ended(reports: &mut Reports) -> FeedEvent {
    tokio::time::timeout(Duration::from_secs(60), reports.next()).await.expect("it waits for ever")
}

#[tokio::test]
async fn a_claim_that_is_refused_holds_up_nothing_that_needs_none() {
    for answer in [403, 422, 503] {
        let world = world(&json!({"phase": "Pending"}));
        let (upstream, mut reports) = behind_a_former_life(&world);
        lock(&world).claims = answer;
        reports.push(report("one"));
        reports.push(of_another_pod(3, "of-e"));
        reports.push(of_node());
        // The Node's own report names the session, and then the pods' need no claim.
        assert!(matches!(ended(&mut reports).await, FeedEvent::Reported { id: 2, refused } if refused.is_empty()));
        for _ in 0..2 {
            assert!(
                matches!(ended(&mut reports).await, FeedEvent::Reported { id: 1 | 3, refused } if refused.is_empty() || refused.contains("gone"))
            );
        }
        let result = if answer == 503 { "later" } else { "refused" };
        assert!(upstream.api.metrics().claims(result) > 0);
    }
}

#[tokio::test]
async fn what_waits_for_a_claim_is_given_back_and_never_refused() {
    let world = world(&json!({"phase": "Pending"}));
    let (upstream, reports) = behind_a_former_life(&world);
    let queue = reports.queue.clone();
    let waiting = |report: Report| {
        let mut state = State::default();
        state.inbox.push(report);
        let Next::Now(mut waiting) = state.next(Duration::ZERO) else { panic!("it is due") };
        waiting.attempt = 99;
        waiting
    };
    lock(&world).claims = 422;
    // That the apiserver takes others.
    upstream.api.create(Kind::Event, "n", json!({"metadata": {"name": "x"}})).await.unwrap();
    for report in [report("one"), of_device("online", "one")] {
        let end = upstream.carry_out(&queue, waiting(report)).await;
        assert!(matches!(end, Some(End::Later(_))), "{end:?}");
    }
    // Who comes next does not try what was tried just now.
    lock(&queue.state).claiming.failed(clock::monotonic(), Duration::from_secs(3600));
    lock(&world).asked.clear();
    let end = upstream.carry_out(&queue, waiting(report("one"))).await;
    assert!(matches!(end, Some(End::Later(after)) if after > Duration::from_secs(3000)), "{end:?}");
    assert_eq!(lock(&world).asked, [""; 0]);
}

#[tokio::test]
async fn a_panic_over_a_claim_ends_what_it_was_for_and_nothing_else() {
    let world = world(&json!({"phase": "Pending"}));
    let (upstream, mut reports) = behind_a_former_life(&world);
    lock(&world).claims = PANIC;
    reports.push(report("one"));
    assert!(matches!(ended(&mut reports).await, FeedEvent::Reported { id: 1, refused } if refused.contains("a bug")));
    assert_eq!(upstream.api.metrics().claims("refused"), 1);
    reports.push(of_node());
    assert!(matches!(ended(&mut reports).await, FeedEvent::Reported { id: 2, refused } if refused.is_empty()));
    // A session that begins with one.
    let node = NodeIdentity { name: "e".to_owned(), uid: "e-1".to_owned() };
    let mut reports = upstream.open(&node, 4, 2, true);
    reports.push(report("two"));
    while upstream.api.metrics().claims("refused") == 1 {
        tokio::task::yield_now().await;
    }
    lock(&world).claims = 0;
    assert!(matches!(ended(&mut reports).await, FeedEvent::Reported { id: 1, refused } if refused.is_empty()));
    assert_eq!(upstream.api.metrics().claims("taken"), 1);
}
