use std::collections::HashMap;

use super::*;
use crate::kubelet::observed::State;
use crate::runtime::connect;
use crate::runtime::fake::{ExecScript, FakeRuntime, Script};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn start() -> Result<(tempfile::TempDir, FakeRuntime, Cri), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let (endpoint, fake) = FakeRuntime::start(dir.path())?;
    let cri = Cri::new(connect::channel(&endpoint)?);
    Ok((dir, fake, cri))
}

fn labels(uid: &str) -> HashMap<String, String> {
    HashMap::from([(label::POD_UID.to_owned(), uid.to_owned())])
}

fn sandbox(uid: &str, attempt: u32) -> cri::PodSandboxConfig {
    let metadata = cri::PodSandboxMetadata { name: uid.to_owned(), uid: uid.to_owned(), attempt, ..Default::default() };
    cri::PodSandboxConfig {
        metadata: Some(metadata),
        labels: labels(uid),
        log_directory: "/logs".into(),
        ..Default::default()
    }
}

fn container(uid: &str, name: &str) -> cri::ContainerConfig {
    let mut labels = labels(uid);
    labels.insert(label::CONTAINER_NAME.into(), name.into());
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: name.into(), attempt: 2 }),
        image: Some(cri::ImageSpec { image: "app:1".into(), ..Default::default() }),
        labels,
        annotations: HashMap::from([
            (label::CONTAINER_HASH.to_owned(), "ff".to_owned()),
            (label::RESTART_COUNT.to_owned(), "7".to_owned()),
            (label::GRACE_PERIOD.to_owned(), "30".to_owned()),
        ]),
        log_path: format!("{name}/2.log"),
        ..Default::default()
    }
}

async fn run(cri: &Cri, uid: &str, name: &str) -> Result<(String, String), Error> {
    let pod = cri.run_sandbox(sandbox(uid, 0), "").await?;
    let id = cri.create_container(&pod, container(uid, name), sandbox(uid, 0)).await?;
    cri.start_container(&id).await?;
    Ok((pod, id))
}

#[tokio::test]
async fn a_second_look_at_a_quiet_node_is_two_calls() -> Outcome {
    let (_dir, fake, cri) = start()?;
    fake.image("app:1", Script::default());
    for uid in ["a", "b", "c"] {
        run(&cri, uid, "main").await?;
    }
    let first = cri.observe(None).await?;
    assert_eq!(first.len(), 3);
    let pod = &first["a"];
    assert_eq!(pod.sandboxes[0].ips.len(), 1);
    let instance = &pod.containers[0];
    assert_eq!((instance.name.as_str(), instance.restart_count, instance.hash), ("main", 7, 255));
    assert_eq!((instance.state, instance.grace_period), (State::Running, Some(30)));
    assert_eq!((instance.log_path.as_str(), instance.image.as_str()), ("/logs/main/2.log", "app:1"));
    assert!(instance.started_at.is_some() && instance.finished_at.is_none());

    fake.calls();
    assert_eq!(cri.observe(None).await?, first);
    let mut calls = fake.calls();
    calls.sort();
    assert_eq!(calls, ["ListContainers", "ListPodSandbox"]);
    assert_eq!(cri.observe(Some("b")).await?.into_keys().collect::<Vec<_>>(), ["b"]);
    assert_eq!(cri.observe(Some("x")).await?.len(), 0);
    Ok(())
}

#[tokio::test]
async fn an_end_is_seen_and_asked_for_again_while_it_is_fresh() -> Outcome {
    let (_dir, fake, cri) = start()?;
    fake.image("app:1", Script::default());
    let (pod, id) = run(&cri, "a", "main").await?;
    cri.observe(None).await?;
    assert_eq!((fake.running("main"), fake.sandboxes()), (vec![id.clone()], vec![(pod.clone(), true)]));
    assert_eq!(fake.config(&id).map(|config| config.log_path).as_deref(), Some("main/2.log"));
    fake.exit(&id, 137, "Error");
    let seen = cri.observe(Some("a")).await?;
    assert_eq!((seen["a"].containers[0].state, seen["a"].containers[0].exit_code), (State::Exited, 137));
    fake.calls();
    cri.observe(Some("a")).await?;
    assert!(fake.calls().contains(&format!("ContainerStatus {id}")));

    fake.kill_sandbox(&pod);
    cri.run_sandbox(sandbox("a", 1), "").await?;
    let seen = cri.observe(Some("a")).await?;
    let sandboxes = &seen["a"].sandboxes;
    assert_eq!(sandboxes.iter().map(|one| (one.attempt, one.ready)).collect::<Vec<_>>(), [(1, true), (0, false)]);
    assert_eq!(cri.owner(&id).as_deref(), Some("a"));
    Ok(())
}

#[tokio::test]
async fn what_is_gone_is_stopped_and_a_runtime_that_is_away_is_told_from_one_that_refuses() -> Outcome {
    let (_dir, fake, cri) = start()?;
    cri.stop_container("none", Duration::from_secs(1)).await?;
    cri.remove_container("none").await?;
    cri.stop_sandbox("none").await?;
    cri.remove_sandbox("none").await?;
    cri.remove_image("none").await?;
    let Err(error) = cri.start_container("none").await else { return Err("it started".into()) };
    assert!(error.is_not_found() && !error.is_runtime_down());

    fake.execs([ExecScript::TimesOut]);
    let timeout = Duration::from_secs(1);
    let Err(error) = cri.exec_sync("c", &["a".to_owned()], Some(timeout)).await else { return Err("in time".into()) };
    assert!(matches!(error, Error::Deadline { within, .. } if within == timeout));

    fake.stop();
    let Err(error) = cri.version().await else { return Err("it answered".into()) };
    assert!(error.is_runtime_down(), "{error:?}");
    assert_eq!(error.retry(), Retry::Backoff);
    fake.serve()?;
    assert_eq!(cri.version().await?.runtime_name, "fake");
    Ok(())
}

#[tokio::test]
async fn the_setup_of_a_runtime() -> Outcome {
    let (_dir, fake, cri) = start()?;
    assert_eq!(cri.setup().await?, Setup::default());
    let old = r#"{"containerd":{"defaultRuntimeName":"runc","runtimes":{"runc":{"options":{"SystemdCgroup":true}}}},
        "cni":{"binDir":"/usr/lib/cni","confDir":"/etc/cni/net.d"},"sandboxImage":"pause:1"}"#;
    fake.setup(old, None);
    let setup = cri.setup().await?;
    assert_eq!(setup.cgroup_driver, Some(CgroupDriver::Systemd));
    assert_eq!(
        (setup.sandbox_image.as_deref(), setup.cni_bin_dirs),
        (Some("pause:1"), vec!["/usr/lib/cni".to_owned()])
    );
    fake.setup(old, Some(cri::CgroupDriver::Cgroupfs));
    assert_eq!(cri.setup().await?.cgroup_driver, Some(CgroupDriver::Cgroupfs));
    fake.condition("NetworkReady", false, "no network config");
    let health = cri.health().await?;
    assert_eq!(health.runtime, None);
    assert_eq!(
        health.network.as_deref(),
        Some("NetworkReady=false reason:NetworkReadyReason message:no network config")
    );
    Ok(())
}
