//! A list and the changes behind it, for ever.
//!
//! Unlike a stream of events alone, it tells how far it has come: the revision of a list at its end, of each change and of the apiserver's
//! bookmarks. Whoever compares what two replicas know needs that.

use std::fmt::Debug;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::{Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, info, warn};

use super::{Progress, Sink};
use crate::apiserver::{Apiserver, Kind, backoff};
use crate::retry::chain;

/// The longest pause of a watch that keeps breaking. There are a few of them however many nodes there are, and every edge waits for
/// them after an outage: they need not be as patient as what nodes cause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Seconds a watch lasts before it is renewed.
const WATCH_SECONDS: u32 = 60;
/// A watch that has not ended so long after its time is dead, and so is a list or the beginning of a watch that takes as long.
const GRACE: Duration = Duration::from_secs(5);
const LIST_PATIENCE: Duration = Duration::from_secs(60);
/// How much a watch may lag before it is looked whether it does.
const LAG: Duration = Duration::from_secs(1);
/// However many edges come from replicas that know more.
const LISTS_APART: Duration = Duration::from_secs(45);
/// Objects in one part of a list.
const PART: u32 = 500;

/// Why a list or watch has to be begun anew.
enum Broken {
    /// An edge has seen more than the watch tells: a list has to come before the changes that follow.
    Overtaken,
    /// The changes from where it stood are not to be had any more: a list has to come before them.
    Expired,
    /// Something else; it goes on from where it stood.
    Failed(String, bool),
}

/// Follows what `objects` shows of `selected`. Whoever compares replicas is told the `progress`.
pub(crate) async fn follow<K>(
    api: &Apiserver,
    kind: Kind,
    objects: Api<K>,
    selected: ListParams,
    progress: Option<Progress>,
    mut sink: impl Sink<K> + Send,
) where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let progress = progress.as_ref();
    let mut from = None;
    let mut failures = 0;
    let mut listed = Instant::now();
    loop {
        let ended = match &mut from {
            None => {
                listed = Instant::now();
                list(&objects, &selected, progress, &mut sink).await.map(|revision| from = Some(revision))
            }
            Some(from) => tokio::select! {
                ended = watch(&objects, &selected, progress, &mut sink, from) => ended,
                () = overtaken(progress, listed + LISTS_APART) => Err(Broken::Overtaken),
            },
        };
        let code = if matches!(ended, Ok(()) | Err(Broken::Overtaken)) { 200 } else { 0 };
        api.metrics().request("watch", kind.plural(), code);
        match ended {
            Ok(()) => {
                if std::mem::take(&mut failures) > 0 {
                    info!(resource = kind.plural(), "the watch works again");
                }
                continue;
            }
            Err(Broken::Overtaken) => {
                debug!(resource = kind.plural(), "an edge has seen more than the watch tells: listing anew");
                from = None;
                continue;
            }
            Err(Broken::Expired) => {
                debug!(resource = kind.plural(), "the watch fell too far behind: listing anew");
                from = None;
            }
            Err(Broken::Failed(cause, forbidden)) => {
                if failures == 0 {
                    let remedy = if forbidden { "; apply deploy/rbac.yaml" } else { "" };
                    let of = sink.of();
                    warn!(
                        resource = kind.plural(),
                        "the watch{of} broke: {cause}; trying again until it works{remedy}"
                    );
                }
                failures += 1;
            }
        }
        tokio::time::sleep(backoff(failures, rand::random()).min(LONGEST_PAUSE)).await;
    }
}

/// The most recent state, never an older one from a cache; answers its revision.
async fn list<K>(
    objects: &Api<K>,
    selected: &ListParams,
    progress: Option<&Progress>,
    sink: &mut impl Sink<K>,
) -> Result<String, Broken>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    let mut params = selected.clone().limit(PART);
    let mut begun = false;
    loop {
        let part = timeout(LIST_PATIENCE, objects.list(&params)).await.map_err(|_| silent())?.map_err(broken)?;
        if !std::mem::replace(&mut begun, true) {
            sink.begin();
        }
        let revision = part.metadata.resource_version.filter(|revision| !revision.is_empty());
        let revision = revision.ok_or_else(|| Broken::Failed("a list says no revision".to_owned(), false))?;
        if let Some(progress) = progress {
            progress.shows(&revision);
        }
        for mut object in part.items {
            object.managed_fields_mut().clear();
            sink.apply(object);
        }
        params.continue_token = part.metadata.continue_.filter(|token| !token.is_empty());
        if params.continue_token.is_none() {
            sink.complete(&revision);
            if let Some(progress) = progress {
                progress.reached(&revision);
            }
            return Ok(revision);
        }
    }
}

/// The changes from a revision on, which is moved on with them.
async fn watch<K>(
    objects: &Api<K>,
    selected: &ListParams,
    progress: Option<&Progress>,
    sink: &mut impl Sink<K>,
    from: &mut String,
) -> Result<(), Broken>
where
    K: Resource + Clone + Debug + DeserializeOwned + 'static,
{
    let params = WatchParams {
        label_selector: selected.label_selector.clone(),
        field_selector: selected.field_selector.clone(),
        ..WatchParams::default()
    };
    let params = params.timeout(WATCH_SECONDS);
    let dead = Instant::now() + Duration::from_secs(WATCH_SECONDS.into()) + GRACE;
    let events = timeout(LIST_PATIENCE, objects.watch(&params, from)).await.map_err(|_| silent())?.map_err(broken)?;
    let mut events = std::pin::pin!(events);
    loop {
        let event = match timeout_at(dead, events.next()).await {
            Err(_) => return Err(silent()),
            Ok(None) => return Ok(()),
            Ok(Some(event)) => event.map_err(broken)?,
        };
        let (mut object, is_gone) = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => (object, false),
            WatchEvent::Deleted(object) => (object, true),
            WatchEvent::Bookmark(mark) => {
                if let Some(progress) = progress {
                    progress.reached(&mark.metadata.resource_version);
                }
                if !mark.metadata.resource_version.is_empty() {
                    *from = mark.metadata.resource_version;
                }
                continue;
            }
            WatchEvent::Error(status) if status.code == 410 => return Err(Broken::Expired),
            WatchEvent::Error(status) => return Err(broken(kube::Error::Api(status))),
        };
        let revision = object.resource_version().unwrap_or_default();
        if let Some(progress) = progress {
            progress.shows(&revision);
        }
        object.managed_fields_mut().clear();
        if is_gone {
            sink.delete(object)
        } else {
            sink.apply(object)
        }
        if let Some(progress) = progress {
            progress.reached(&revision);
        }
        if !revision.is_empty() {
            *from = revision;
        }
    }
}

/// Waits until an edge has seen more than the watch tells even when it was given some time. Nothing changed since, then, or the watch
/// hangs: a watch of what does not change tells no revision, a list does.
async fn overtaken(progress: Option<&Progress>, not_before: Instant) {
    let Some(progress) = progress else { return std::future::pending().await };
    loop {
        progress.hurry.notified().await;
        tokio::time::sleep_until(not_before.max(Instant::now() + LAG)).await;
        if progress.lacks() {
            return;
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "as map_err gives it")]
fn broken(error: kube::Error) -> Broken {
    match &error {
        kube::Error::Api(status) if status.code == 410 => Broken::Expired,
        kube::Error::Api(status) => Broken::Failed(chain(&error), matches!(status.code, 401 | 403)),
        _ => Broken::Failed(chain(&error), false),
    }
}

fn silent() -> Broken {
    Broken::Failed("the apiserver does not answer".to_owned(), false)
}
