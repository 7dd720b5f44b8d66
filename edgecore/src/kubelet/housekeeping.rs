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
/// A log that has grown to this is rotated.
const LOG_SIZE: u64 = 10 << 20;
/// How many files there are of one log, the current one included.
const LOG_FILES: usize = 5;
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

/// Looks at the sizes first, and asks the runtime only when a log is too large.
async fn rotate_logs(context: &Context) {
    let root = context.node().logs_root.clone();
    let large = blocking(move || logs::larger_than(&root, LOG_SIZE)).await;
    if large.is_empty() {
        return;
    }
    let Ok(observed) = context.cri.observe(None).await else { return };
    let running = observed.values().flat_map(|pod| &pod.containers).filter(|instance| instance.state == State::Running);
    for instance in running.filter(|instance| large.contains(&PathBuf::from(&instance.log_path))) {
        let file = PathBuf::from(&instance.log_path);
        let now = clock::wall();
        let renamed = match blocking(move || logs::start_rotation(&file, LOG_SIZE, LOG_FILES, now)).await {
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
