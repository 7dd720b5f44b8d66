//! Joining as a technician does it: again and again, interrupted, and in the wrong place.

use super::*;
use crate::enroll::tests::{FakeCloud, Reply, now};

fn arguments(cloud: &FakeCloud, data_dir: &Path) -> Join {
    Join {
        server: cloud.server.clone(),
        token: cloud.token(),
        node_name: Some("box".to_owned()),
        data: DataDir { data_dir: data_dir.to_owned() },
        transport: None,
        runtime_endpoint: None,
        labels: Vec::new(),
        cni_conf_dir: None,
        pods_dir: None,
        no_start: true,
    }
}

/// The steps behind the checks, which need a real box.
async fn enrolled(join: &Join) -> anyhow::Result<String> {
    let mut out = Vec::new();
    join.enroll(&join.config(None)?, now(), &mut out).await?;
    Ok(String::from_utf8(out)?)
}

async fn joined(join: &Join) -> anyhow::Result<String> {
    let mut out = Vec::new();
    join.join(&Places::default(), now(), &mut out).await?;
    Ok(String::from_utf8(out)?)
}

#[tokio::test]
async fn joining_ten_times_is_joining_once() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = FakeCloud::new().await;
    let mut join = arguments(&cloud, dir.path());
    let text = enrolled(&join).await.unwrap();
    assert!(text.contains("ok       certificate: for node box"), "{text}");
    // The power went before the configuration was written: the identity is there, so it only has to be completed.
    for _ in 0..10 {
        assert!(joined(&join).await.unwrap().contains("already joined"));
    }
    assert_eq!(cloud.requests.lock().unwrap().len(), 1);
    let before = Config::load(dir.path()).unwrap();
    join.labels = vec![("site".to_owned(), "north".to_owned())];
    join.pods_dir = Some("/var/lib/pods".into());
    let text = joined(&join).await.unwrap();
    assert!(text.contains("configuration"), "{text}");
    let after = Config::load(dir.path()).unwrap();
    assert_eq!(after.labels["site"], "north");
    assert_eq!(after.pods_dir, Path::new("/var/lib/pods"));
    join.labels.clear();
    join.pods_dir = None;
    joined(&join).await.unwrap();
    assert_eq!(Config::load(dir.path()).unwrap(), after, "flags that are not given change nothing");
    assert_eq!(after.server, before.server);
}

#[tokio::test]
async fn another_cluster_or_name_is_refused_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let (cloud, other) = (FakeCloud::new().await, FakeCloud::new().await);
    let join = arguments(&cloud, dir.path());
    enrolled(&join).await.unwrap();
    joined(&join).await.unwrap();
    let config = std::fs::read_to_string(dir.path().join(config::FILE)).unwrap();
    let mut renamed = arguments(&cloud, dir.path());
    renamed.node_name = Some("other".to_owned());
    let mut forged = arguments(&cloud, dir.path());
    forged.token = other.token();
    for join in [arguments(&other, dir.path()), renamed, forged] {
        let error = joined(&join).await.unwrap_err().to_string();
        assert!(error.contains("edgecore reset"), "{error}");
        assert_eq!(std::fs::read_to_string(dir.path().join(config::FILE)).unwrap(), config);
    }
    assert!(other.requests.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_failed_step_says_so_and_can_be_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = FakeCloud::new().await;
    let join = arguments(&cloud, dir.path());
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
async fn a_skewed_clock_is_a_warning_while_certificates_are_valid() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = FakeCloud::new().await;
    *cloud.clock.lock().unwrap() += 1000;
    let text = enrolled(&arguments(&cloud, dir.path())).await.unwrap();
    assert!(text.contains("warning  clock: this box's clock is off by"), "{text}");
}

#[tokio::test]
async fn a_damaged_configuration_is_shown_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = FakeCloud::new().await;
    let text = "server = \"h:1\"\nnode_nam = \"box\"\n";
    std::fs::write(dir.path().join(config::FILE), text).unwrap();
    let error = joined(&arguments(&cloud, dir.path())).await.unwrap_err().to_string();
    assert!(error.contains("line 2") && error.contains("node_nam"), "{error}");
    assert_eq!(std::fs::read_to_string(dir.path().join(config::FILE)).unwrap(), text);
}
