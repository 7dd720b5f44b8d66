//! `/containerLogs`: a container's log from the file that the runtime writes, followed while the container runs.
//!
//! A reader that is slow holds up the reading and nothing else: a piece is read when the one before was taken. A client that leaves drops
//! the body, and with it the file; one that has stopped has a file that was removed let go of by [`let_go`].

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, stream};
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, PodStatus};
use tokio::task::JoinHandle;

use self::options::Options;
use self::reader::{Next, Reader};
use super::Ops;
use super::answer::{Answer, Refusal, pieces};
use super::pods::{find, runtime_id};
use super::query::Query;
use super::route::ContainerPath;
use super::streaming::promptly;
use crate::clock;
use crate::kubelet::context::blocking;
use crate::kubelet::spec::Spec;
use crate::runtime::Cri;
use crate::supervise;

mod lines;
mod options;
mod reader;
mod tail;

/// The first wait for more of a log that is followed, doubled up to the longest while nothing comes.
const FIRST_WAIT: Duration = Duration::from_millis(25);
const LONGEST_WAIT: Duration = Duration::from_millis(200);
/// How often a container whose log says nothing is asked for.
const LOOK: Duration = Duration::from_secs(1);

/// How long whoever reads may pause before a file that was removed is let go of; at the most twice as long.
const PAUSED: Duration = Duration::from_secs(60);

/// Answers with a container's log.
pub(super) async fn logs(ops: &Ops, of: &ContainerPath, query: &Query) -> Result<Answer, Refusal> {
    let options = Options::parse(query, clock::wall())?;
    let ContainerPath { pod: path, container } = of;
    let name = &path.name;
    let pod = find(&ops.store, path).await?;
    let pod = pod.ok_or_else(|| Refusal::missing(format!("pod {name:?} does not exist")))?;
    if Spec::new(&pod).find(container).is_none() {
        return Err(Refusal::missing(format!("container {container:?} not found in pod {name:?}")));
    }
    let id = choose(name, pod.status.as_ref(), container, options.previous).map_err(Refusal::bad)?;
    let unavailable = |why: String| Refusal::bad(format!("unable to retrieve container logs for {id}: {why}"));
    let id = runtime_id(&id).to_owned();
    let file = promptly(ops.cri.log_file(&id)).await.map_err(|refusal| unavailable(refusal.words))?;
    let file = file.ok_or_else(|| unavailable("the container is gone from the runtime".to_owned()))?;
    if file.path.is_empty() {
        return Err(unavailable("the runtime writes no log of it".to_owned()));
    }
    let reader = blocking({
        let (wanted, tail, path) = (options.wanted(), options.tail, file.path.clone());
        move || Reader::open(path.as_ref(), &wanted, tail)
    });
    let reader = reader.await.map_err(|error| unavailable(format!("cannot read {}: {error}", file.path)))?;
    let reader = Arc::new(Mutex::new(reader));
    let follow = options.follow.then(|| Follow {
        cri: ops.cri.clone(),
        id,
        looked: None,
        ended: !file.is_running,
        _paused: Paused(supervise::spawn("paused log", let_go(Arc::downgrade(&reader)))),
    });
    Ok(pieces("text/plain", read(reader, follow)))
}

/// Looks now and then, for as long as somebody follows a log, whether it holds a file that nobody else has.
async fn let_go(reader: Weak<Mutex<Reader>>) {
    loop {
        tokio::time::sleep(PAUSED).await;
        let Some(reader) = reader.upgrade() else { return };
        blocking(move || lock(&reader).let_go()).await;
    }
}

fn lock(reader: &Mutex<Reader>) -> MutexGuard<'_, Reader> {
    reader.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Of a log that is followed.
#[derive(Debug)]
struct Follow {
    cri: Cri,
    id: String,
    /// When the runtime was asked last whether the container runs.
    looked: Option<Duration>,
    /// It does not any more: what is there by now is all.
    ended: bool,
    _paused: Paused,
}

/// The task of [`let_go`]; it ends with whoever follows.
#[derive(Debug)]
struct Paused(JoinHandle<()>);

impl Drop for Paused {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn read(reader: Arc<Mutex<Reader>>, follow: Option<Follow>) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::try_unfold(Some((reader, follow)), |state| async move {
        let Some((reader, mut follow)) = state else { return Ok(None) };
        let mut wait = FIRST_WAIT;
        loop {
            // Asked before the file is read to its end: what it wrote before it ended is in there.
            let is_last = follow.as_ref().is_none_or(|follow| follow.ended);
            let follows = follow.is_some();
            let reading = Arc::clone(&reader);
            let (piece, next) = blocking(move || lock(&reading).piece(follows)).await?;
            let over = next == Next::Done || next == Next::End && is_last;
            if !piece.is_empty() {
                return Ok(Some((Bytes::from(piece), (!over).then_some((reader, follow)))));
            }
            if over {
                return Ok(None);
            }
            if next == Next::End
                && let Some(follow) = &mut follow
            {
                tokio::time::sleep(wait).await;
                wait = LONGEST_WAIT.min(wait * 2);
                follow.look().await;
            }
        }
    })
}

impl Follow {
    /// Asks whether the container still runs, if that was not just asked.
    async fn look(&mut self) {
        let now = clock::monotonic();
        if now.saturating_sub(*self.looked.get_or_insert(now)) < LOOK {
            return;
        }
        self.looked = Some(now);
        match tokio::time::timeout(LOOK, self.cri.log_file(&self.id)).await {
            Ok(Ok(Some(file))) => self.ended = !file.is_running,
            Ok(Ok(None)) => self.ended = true,
            // A runtime that is away or hangs says nothing about its containers, and holds up no log.
            Ok(Err(_)) | Err(_) => {}
        }
    }
}

/// Which instance's log is meant, by the pod's status; the words for why there is none are upstream's.
fn choose(pod: &str, status: Option<&PodStatus>, container: &str, previous: bool) -> Result<String, String> {
    let all = status.into_iter().flat_map(|status| {
        [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses]
    });
    let found: Option<&ContainerStatus> = all.flatten().flatten().find(|status| status.name == container);
    let Some(status) = found else { return Err(format!("container {container:?} in pod {pod:?} is not available")) };
    let ended = |state: Option<&ContainerState>| state.and_then(|state| state.terminated.clone());
    let id = |id: Option<String>| id.filter(|id| !id.is_empty());
    let last = ended(status.last_state.as_ref());
    let last_id = last.as_ref().and_then(|last| id(last.container_id.clone()));
    let now = status.state.as_ref();
    let waits = format!("container {container:?} in pod {pod:?} is waiting to start");
    let is_over = || format!("container {container:?} in pod {pod:?} is terminated");
    if previous {
        return last_id.ok_or_else(|| format!("previous terminated container {container:?} in pod {pod:?} not found"));
    }
    if now.is_some_and(|state| state.running.is_some()) {
        return id(status.container_id.clone()).ok_or_else(|| format!("{waits} - no logs yet"));
    }
    if let Some(over) = ended(now) {
        return id(over.container_id).or(last_id).ok_or_else(is_over);
    }
    if last.is_some() {
        return last_id.ok_or_else(is_over);
    }
    match now.and_then(|state| state.waiting.as_ref()) {
        Some(waiting) => Err(match waiting.reason.as_deref().unwrap_or_default() {
            "ErrImagePull" => format!("{waits}: image can't be pulled"),
            "ImagePullBackOff" => format!("{waits}: trying and failing to pull image"),
            reason => format!("{waits}: {reason}"),
        }),
        None => Err(format!("{waits} - no logs yet")),
    }
}

#[cfg(test)]
mod tests;
