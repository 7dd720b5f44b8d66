//! Joining as a technician does it: again and again, interrupted, and in the wrong place.

use super::*;
use crate::enroll::tests::{FakeCloud, Reply, now};
use crate::runtime::fake::FakeRuntime;
use crate::store::Store;

/// A box on which nothing is wrong.
struct Bench {
    runtime: FakeRuntime,
    endpoint: String,
    places: Places,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        let (endpoint, runtime) = FakeRuntime::start(dir.path()).unwrap();
        std::fs::write(dir.path().join("cgroup.controllers"), "cpu memory\n").unwrap();
        let places = Places {
            cgroups: dir.path().to_owned(),
            kubelet: "127.0.0.1:0".parse().unwrap(),
            locks: dir.path().into(),
            root: true,
        };
        Self { runtime, endpoint, places, dir }
    }

    fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    async fn joined(&self, join: &Join) -> anyhow::Result<String> {
        self.said(join).await.map_err(|(error, _)| error)
    }

    /// What was said, also by a join that fails.
    async fn said(&self, join: &Join) -> Result<String, (anyhow::Error, String)> {
        let mut out = Vec::new();
        let result = join.join(&self.places, now(), &mut out).await;
        let text = String::from_utf8(out).unwrap();
        result.map(|_| text.clone()).map_err(|error| (error, text))
    }
}

fn arguments(cloud: &FakeCloud, bench: &Bench) -> Join {
    Join {
        server: cloud.server.clone(),
        token: cloud.token(),
        node_name: Some("box".to_owned()),
        data: DataDir { data_dir: bench.data_dir() },
        transport: None,
        runtime_endpoint: Some(bench.endpoint.clone()),
        labels: Vec::new(),
        cni_conf_dir: None,
        pods_dir: None,
        no_start: true,
    }
}

/// The steps behind the checks.
async fn enrolled(join: &Join) -> anyhow::Result<String> {
    let mut out = Vec::new();
    join.enroll(&join.config(None)?, now(), &mut out).await?;
    Ok(String::from_utf8(out)?)
}

#[tokio::test]
async fn joining_ten_times_is_joining_once() {
    let bench = Bench::new();
    let dir = bench.data_dir();
    let cloud = FakeCloud::new().await;
    let mut join = arguments(&cloud, &bench);
    let text = enrolled(&join).await.unwrap();
    assert!(text.contains("ok       certificate: for node box"), "{text}");
    // The power went before the configuration was written: the identity is there, so it only has to be completed.
    for _ in 0..10 {
        assert!(bench.joined(&join).await.unwrap().contains("already joined"));
    }
    assert_eq!(cloud.requests.lock().unwrap().len(), 1);
    let before = Config::load(&dir).unwrap();
    join.labels = vec![("site".to_owned(), "north".to_owned())];
    join.pods_dir = Some("/var/lib/pods".into());
    let text = bench.joined(&join).await.unwrap();
    assert!(text.contains("configuration"), "{text}");
    assert!(text.contains("warning  labels: ") && text.contains("kubectl label node box"), "{text}");
    let after = Config::load(&dir).unwrap();
    assert_eq!(after.labels["site"], "north");
    assert_eq!(after.pods_dir, Path::new("/var/lib/pods"));
    join.labels.clear();
    join.pods_dir = None;
    assert!(!bench.joined(&join).await.unwrap().contains("labels"));
    assert_eq!(Config::load(&dir).unwrap(), after, "flags that are not given change nothing");
    assert_eq!(after.server, before.server);
}

#[tokio::test]
async fn another_cluster_or_name_is_refused_with_the_way_out() {
    let bench = Bench::new();
    let dir = bench.data_dir();
    let (cloud, other) = (FakeCloud::new().await, FakeCloud::new().await);
    let join = arguments(&cloud, &bench);
    enrolled(&join).await.unwrap();
    bench.joined(&join).await.unwrap();
    let config = std::fs::read_to_string(dir.join(config::FILE)).unwrap();
    let mut renamed = arguments(&cloud, &bench);
    renamed.node_name = Some("other".to_owned());
    let mut forged = arguments(&cloud, &bench);
    forged.token = other.token();
    for join in [arguments(&other, &bench), renamed, forged] {
        let error = bench.joined(&join).await.unwrap_err().to_string();
        assert!(error.contains("edgecore reset"), "{error}");
        assert_eq!(std::fs::read_to_string(dir.join(config::FILE)).unwrap(), config);
    }
    assert!(other.requests.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_box_that_has_joined_is_looked_at_again() {
    let bench = Bench::new();
    let cloud = FakeCloud::new().await;
    let join = arguments(&cloud, &bench);
    enrolled(&join).await.unwrap();
    let text = bench.joined(&join).await.unwrap();
    assert!(text.contains("ok       container runtime: ") && text.contains("ok       clock: "), "{text}");
    let config = std::fs::read_to_string(bench.data_dir().join(config::FILE)).unwrap();
    bench.runtime.stop();
    let (error, text) = bench.said(&join).await.unwrap_err();
    assert!(text.contains("failed   container runtime: "), "{text}");
    assert!(error.to_string().contains("1 of 9 checks failed; joined as before"), "{error}");
    assert_eq!(std::fs::read_to_string(bench.data_dir().join(config::FILE)).unwrap(), config);
}

#[tokio::test]
async fn a_box_that_is_not_fit_is_not_joined() {
    let bench = Bench::new();
    let cloud = FakeCloud::new().await;
    bench.runtime.stop();
    let (error, text) = bench.said(&arguments(&cloud, &bench)).await.unwrap_err();
    assert!(text.contains("failed   container runtime: "), "{text}");
    assert!(error.to_string().contains("1 of 9 checks failed; not joined"), "{error}");
    assert!(!bench.data_dir().join(config::FILE).exists());
    assert!(cloud.requests.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_box_whose_node_was_deleted_is_told_to_reset_first() {
    let bench = Bench::new();
    let cloud = FakeCloud::new().await;
    let join = arguments(&cloud, &bench);
    enrolled(&join).await.unwrap();
    bench.joined(&join).await.unwrap();
    let store = Store::open(&bench.data_dir(), now()).unwrap();
    store.remember(NODE_NOTES, DELETED_NOTE, bytes::Bytes::from_static(b"{}")).await.unwrap();
    let error = bench.joined(&join).await.unwrap_err().to_string();
    assert!(error.contains("was deleted from the cluster; run `edgecore reset` first"), "{error}");
    // Another session stands: it was somebody's mistake.
    store.forget(NODE_NOTES, DELETED_NOTE).await.unwrap();
    bench.joined(&join).await.unwrap();
}

#[tokio::test]
async fn a_failed_step_says_so_and_can_be_repeated() {
    let bench = Bench::new();
    let cloud = FakeCloud::new().await;
    let join = arguments(&cloud, &bench);
    cloud.reply([Reply::Proper, Reply::Refuse("token_expired", "the token expired; make a new one")]);
    let mut out = Vec::new();
    let config = join.config(None).unwrap();
    let error = join.enroll(&config, now(), &mut out).await.unwrap_err().to_string();
    let text = String::from_utf8(out).unwrap();
    assert!(text.contains("failed   certificate: the token expired; make a new one"), "{text}");
    assert!(error.contains("can be run again"), "{error}");
    enrolled(&join).await.unwrap();
}

#[tokio::test]
async fn a_skewed_clock_is_a_warning_while_the_servers_certificate_is_valid() {
    // The node's own begins later than now by this box's clock, or has ended.
    for off in [1000, 36_000, -400 * 86_400] {
        let bench = Bench::new();
        let cloud = FakeCloud::new().await;
        *cloud.clock.lock().unwrap() += off;
        let join = arguments(&cloud, &bench);
        let text = bench.joined(&join).await.unwrap();
        assert!(text.contains("warning  clock: this box's clock is off by"), "{text}");
        assert!(text.contains("ok       certificate: for node box"), "{text}");
    }
}

#[tokio::test]
async fn a_clock_by_which_the_servers_certificate_is_not_valid_fails_each_time() {
    let bench = Bench::new();
    let authority = std::sync::Arc::new(crate::identity::tests::Authority::new());
    let certificate = authority.server_valid("localhost", 2000, 2001);
    let cloud = FakeCloud::with(authority, certificate).await;
    let join = arguments(&cloud, &bench);
    for _ in 0..2 {
        let (error, text) = bench.said(&join).await.unwrap_err();
        assert!(text.contains("failed   cluster: ") && text.contains("set the clock"), "{text}");
        assert!(error.to_string().contains("not joined"), "{error}");
        assert!(Identity::load(&bench.data_dir()).unwrap().is_none());
    }
}

#[tokio::test]
async fn a_damaged_configuration_is_shown_and_kept() {
    let bench = Bench::new();
    let dir = bench.data_dir();
    let cloud = FakeCloud::new().await;
    let text = "server = \"h:1\"\nnode_nam = \"box\"\n";
    std::fs::write(dir.join(config::FILE), text).unwrap();
    let error = bench.joined(&arguments(&cloud, &bench)).await.unwrap_err().to_string();
    assert!(error.contains("line 2") && error.contains("node_nam"), "{error}");
    assert_eq!(std::fs::read_to_string(dir.join(config::FILE)).unwrap(), text);
}
