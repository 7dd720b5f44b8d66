//! What has to be tidied now and then: large logs, images nobody needs, directories and cgroups of pods that are gone.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::sync::Collection;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::context::{Context, blocking};
use super::gather::parse;
use super::image_gc::{self, Policy};
use super::logs::{self, Rotation};
use super::node_loop;
use super::observed::{Observed, State};
use super::references::PodEvent;
use super::spec::Spec;
use crate::{clock, order};

/// How often it is looked whether logs have grown too large.
const LOGS_EVERY: Duration = Duration::from_secs(10);
/// How often orphans are looked for.
const ORPHANS_EVERY: Duration = Duration::from_secs(60);

/// Tidies until shutdown.
pub async fn run(context: Arc<Context>, sandbox_image: Option<String>, shutdown: CancellationToken) {
    let mut images = image_gc::Memory::default();
    let mut orphans_at = clock::monotonic() + ORPHANS_EVERY;
    let mut images_at = clock::monotonic() + image_gc::EVERY;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(LOGS_EVERY) => {}
        }
        rotate_logs(&context).await;
        let now = clock::monotonic();
        if now >= orphans_at {
            orphans_at = now + ORPHANS_EVERY;
            remove_orphans(&context).await;
            let store = context.store.clone();
            blocking(move || store.keep_ballast()).await;
        }
        if now >= images_at {
            images_at = now + image_gc::EVERY;
            collect_images(&context, &mut images, sandbox_image.as_deref()).await;
        }
    }
}

/// Looks at the files first, and asks the runtime only when a log is too large, or gone.
async fn rotate_logs(context: &Context) {
    let root = context.node().logs_root.clone();
    let due = blocking(move || logs::due(&root, logs::MAX_SIZE)).await;
    if due.is_empty() {
        return;
    }
    let Ok(observed) = context.cri.observe(None).await else { return };
    let running = observed.values().flat_map(|pod| &pod.containers).filter(|instance| instance.state == State::Running);
    for instance in running.filter(|instance| due.contains(&PathBuf::from(&instance.log_path))) {
        let file = PathBuf::from(&instance.log_path);
        let now = clock::wall();
        let renamed = match blocking(move || logs::start_rotation(&file, logs::MAX_SIZE, logs::MAX_FILES, now)).await {
            Ok(Rotation::NotDue) => continue,
            Ok(rotation) => rotation,
            Err(error) => {
                warn!(container = instance.name, %error, "a log cannot be rotated");
                continue;
            }
        };
        let Err(error) = context.cri.reopen_log(&instance.id).await else { continue };
        warn!(container = instance.name, %error, "the runtime did not open a new log");
        if let Rotation::Renamed(renamed) = renamed {
            let file = PathBuf::from(&instance.log_path);
            if let Err(error) = blocking(move || logs::put_back(&file, &renamed)).await {
                warn!(container = instance.name, %error, "the log could not get its name back");
            }
        }
    }
}

/// Removes what is on disk, or in cgroups, of pods that neither the store wants nor the runtime holds. It looks at the disk first, so that
/// a pod that comes meanwhile is not taken for one that is gone.
async fn remove_orphans(context: &Arc<Context>) {
    let (finder, node) = (context.clone(), context.node());
    let found = blocking(move || {
        let mut found: BTreeSet<String> = order::set(finder.volumes.pod_uids_on_disk().unwrap_or_default());
        found.extend(finder.cgroups.pods().into_keys());
        found.extend(logs::pod_dirs(&node.logs_root).unwrap_or_default().into_iter().map(|(uid, _)| uid));
        found
    })
    .await;
    let Ok(observed) = context.cri.observe(None).await else { return };
    for uid in found.iter().filter(|uid| !observed.contains_key(*uid)) {
        let unwanted = matches!(context.store.row(Collection::Pods, uid).await, Ok(None));
        if unwanted && *context.store.pods_known().borrow() {
            info!(pod = uid, "what was left of a pod that is gone is removed");
            context.remove_rest(uid).await;
        }
    }
    let ended: BTreeSet<String> = order::set(observed.values().flat_map(ended_ids));
    let alive: BTreeSet<String> =
        order::set(observed.values().flat_map(|pod| &pod.containers).map(|one| one.id.clone()));
    let links = context.node().log_links.clone();
    blocking(move || {
        let over = |id: &str| !alive.contains(id) || ended.contains(id);
        if let Err(error) = logs::remove_dangling(&links, over) {
            warn!(%error, "links of logs that are gone cannot be removed");
        }
    })
    .await;
}

fn ended_ids(pod: &Observed) -> impl Iterator<Item = String> {
    let ended = pod.containers.iter().filter(|one| matches!(one.state, State::Exited | State::Unknown));
    ended.map(|one| one.id.clone())
}

/// Images of pods in the store are never collected, whether they run now or not.
async fn collect_images(context: &Context, memory: &mut image_gc::Memory, sandbox_image: Option<&str>) {
    let Ok(rows) = context.store.list(Collection::Pods).await else { return };
    let mut wanted: BTreeSet<String> = order::set(sandbox_image.map(str::to_owned));
    for pod in rows.iter().filter_map(parse::<Pod>) {
        wanted.extend(Spec::new(&pod).all().into_iter().map(|container| container.image.to_owned()));
    }
    match image_gc::collect(&context.cri, memory, &wanted, &Policy::default(), clock::monotonic()).await {
        Ok(collected) => {
            if let Some(message) = collected.short {
                warn!(message, "not enough images could be removed");
                let event = PodEvent { warning: true, reason: "FreeDiskSpaceFailed", message, field_path: None };
                context.record(&node_loop::reference(&context.node().name), &event);
            }
        }
        Err(error) => warn!(%error, "images cannot be collected"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kubelet::pods::tests::Agent;
    use crate::runtime::fake::{FakeRuntime, Script};

    #[tokio::test]
    async fn a_log_keeps_its_name_until_the_runtime_opens_another() {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, fake) = FakeRuntime::start(dir.path()).unwrap();
        fake.image("img:1", Script::default());
        let agent = Agent::start(dir.path(), "store", &endpoint);
        let pod = json!({
            "metadata": {"name": "p", "namespace": "default", "uid": "uid-p"},
            "spec": {"enableServiceLinks": false, "containers": [{"name": "c", "image": "img:1"}]},
        });
        agent.want(&pod).await;
        agent.status(|status| status["phase"] == "Running").await;
        let logs = dir.path().join("logs/default_p_uid-p/c");
        let names = || {
            let mut names: Vec<_> = std::fs::read_dir(&logs)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        std::fs::File::create(logs.join("0.log")).unwrap().set_len(logs::MAX_SIZE).unwrap();
        // Of a container that somebody else's runtime has.
        let others = dir.path().join("logs/default_other_uid-other/c/0.log");
        std::fs::create_dir_all(others.parent().unwrap()).unwrap();
        std::fs::File::create(&others).unwrap().set_len(logs::MAX_SIZE).unwrap();
        fake.fail("ReopenContainerLog", tonic::Status::unknown("no"));
        rotate_logs(&agent.context).await;
        assert_eq!(names(), ["0.log"]);
        rotate_logs(&agent.context).await;
        let rotated = names();
        assert!(rotated.len() == 1 && rotated[0].starts_with("0.log."), "{rotated:?}");
        let asked = || fake.calls().iter().filter(|call| call.starts_with("ReopenContainerLog")).count();
        assert_eq!(asked(), 2);
        // As if the agent had died before it asked: this runtime has not opened another.
        rotate_logs(&agent.context).await;
        assert_eq!((asked(), names()), (1, rotated));
        std::fs::write(logs.join("0.log"), "").unwrap();
        rotate_logs(&agent.context).await;
        assert_eq!(asked(), 0);
        assert!(others.exists());
        agent.end().await;
    }
}
