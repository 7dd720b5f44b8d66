//! What the runtime holds of pods, and the cache that makes looking cheap.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use skerry_proto::cri;

use super::{Cri, DEADLINE, Error, call};
use crate::kubelet::observed::{Instance, Observed, Sandbox, State, label};
use crate::runtime::termination;
use crate::{clock, order};

/// How many detail calls are under way at once.
const PARALLEL: usize = 8;
/// Above this the cache is dropped and filled again: more objects than a node has, between two looks at everything.
const CACHE_LIMIT: usize = 4096;
/// An end younger than this is asked for again: the word that it was the OOM killer may come after the exit.
const SETTLED: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(super) struct Cache {
    instances: HashMap<String, Instance>,
    sandboxes: HashMap<String, Details>,
    /// Container or sandbox id to pod UID.
    owners: HashMap<String, Arc<str>>,
    /// Containers and sandboxes that were heard to have ended and are not yet seen so.
    ended: HashSet<String>,
}

/// Of a sandbox that is ready.
#[derive(Clone, Debug)]
struct Details {
    ips: Vec<IpAddr>,
    host_network: bool,
}

impl Cri {
    /// The pod of a container or sandbox, as far as it was seen.
    pub fn owner(&self, id: &str) -> Option<Arc<str>> {
        self.cache().owners.get(id).cloned()
    }

    /// Forgets what is known of a container, since something happened to it.
    pub fn invalidate(&self, id: &str) {
        let mut cache = self.cache();
        cache.instances.remove(id);
        cache.sandboxes.remove(id);
    }

    /// The process of a container or sandbox has ended. The runtime's own account of it follows: see [`Cri::is_settled`].
    pub fn note_end(&self, id: &str) {
        let mut cache = self.cache();
        if cache.ended.len() >= CACHE_LIMIT {
            cache.ended.clear();
        }
        cache.ended.insert(id.to_owned());
    }

    /// Nothing of it is shown as running that was heard to have ended. A runtime tells of an end before its own account of the
    /// container is up to date, so that one who looks at once sees it running still.
    pub fn is_settled(&self, observed: &Observed) -> bool {
        let mut cache = self.cache();
        let mut settled = true;
        let running = |instance: &Instance| (instance.id.clone(), instance.state == State::Running);
        let ready = |sandbox: &Sandbox| (sandbox.id.clone(), sandbox.ready);
        for (id, alive) in observed.containers.iter().map(running).chain(observed.sandboxes.iter().map(ready)) {
            if alive {
                settled &= !cache.ended.contains(&id);
            } else {
                cache.ended.remove(&id);
            }
        }
        settled
    }

    /// Forgets everything, as after the runtime was away.
    pub fn invalidate_all(&self) {
        let mut cache = self.cache();
        cache.instances.clear();
        cache.sandboxes.clear();
    }

    /// What the runtime holds of one pod, or of all of them, by pod UID. Pods of which it holds nothing are absent; what does not
    /// carry a pod UID belongs to someone else.
    pub async fn observe(&self, uid: Option<&str>) -> Result<BTreeMap<String, Observed>, Error> {
        let selector: HashMap<String, String> =
            uid.map(|uid| (label::POD_UID.to_owned(), uid.to_owned())).into_iter().collect();
        let filter = cri::PodSandboxFilter { label_selector: selector.clone(), ..Default::default() };
        let mut client = self.runtime.clone();
        let sandboxes = client.list_pod_sandbox(cri::ListPodSandboxRequest { filter: Some(filter) });
        let filter = cri::ContainerFilter { label_selector: selector, ..Default::default() };
        let mut client = self.runtime.clone();
        let containers = client.list_containers(cri::ListContainersRequest { filter: Some(filter) });
        let (sandboxes, containers) = tokio::try_join!(
            call("ListPodSandbox", DEADLINE, sandboxes),
            call("ListContainers", DEADLINE, containers)
        )?;
        self.note(uid, &sandboxes.items, &containers.containers);

        let mut pods: BTreeMap<String, Observed> = BTreeMap::new();
        let sandboxes = stream::iter(with_newest(sandboxes.items))
            .map(|(uid, sandbox, newest)| async move {
                Ok::<_, Error>(self.sandbox(sandbox, newest).await?.map(|sandbox| (uid, sandbox)))
            })
            .buffer_unordered(PARALLEL);
        let sandboxes: Vec<_> = sandboxes.try_collect().await?;
        for (uid, sandbox) in sandboxes.into_iter().flatten() {
            pods.entry(uid).or_default().sandboxes.push(sandbox);
        }
        let owned = containers.containers.into_iter().filter_map(|mut container| {
            let uid = container.labels.remove(label::POD_UID)?;
            Some((uid, container))
        });
        let instances = stream::iter(owned)
            .map(|(uid, container)| async move {
                Ok::<_, Error>(self.instance(&container).await?.map(|instance| (uid, instance)))
            })
            .buffer_unordered(PARALLEL);
        let instances: Vec<_> = instances.try_collect().await?;
        for (uid, instance) in instances.into_iter().flatten() {
            pods.entry(uid).or_default().containers.push(instance);
        }
        for pod in pods.values_mut() {
            order::sort_by_key(&mut pod.sandboxes, |sandbox| Reverse((sandbox.attempt, sandbox.created_at)));
            order::sort_by_key(&mut pod.containers, |instance| Reverse(instance.created_at));
        }
        Ok(pods)
    }

    /// Remembers whose everything is and, after a look at everything, forgets what is no more.
    fn note(&self, uid: Option<&str>, sandboxes: &[cri::PodSandbox], containers: &[cri::Container]) {
        let mut cache = self.cache();
        if uid.is_none() {
            let alive: HashSet<&str> = sandboxes
                .iter()
                .map(|sandbox| sandbox.id.as_str())
                .chain(containers.iter().map(|container| container.id.as_str()))
                .collect();
            cache.instances.retain(|id, _| alive.contains(id.as_str()));
            cache.sandboxes.retain(|id, _| alive.contains(id.as_str()));
            // Not those that were made while the lists were on their way.
            if cache.owners.len() > 2 * alive.len() + 64 {
                cache.owners.retain(|id, _| alive.contains(id.as_str()));
            }
        }
        if cache.owners.len() > CACHE_LIMIT || cache.instances.len() > CACHE_LIMIT {
            *cache = Cache::default();
        }
        let all = sandboxes.iter().map(|sandbox| (&sandbox.id, &sandbox.labels));
        let all = all.chain(containers.iter().map(|container| (&container.id, &container.labels)));
        let mut last: Option<Arc<str>> = None;
        for (id, labels) in all {
            let Some(uid) = labels.get(label::POD_UID) else { continue };
            if cache.owners.contains_key(id) {
                continue;
            }
            let uid = match &last {
                Some(last) if **last == **uid => Arc::clone(last),
                _ => Arc::from(uid.as_str()),
            };
            last = Some(Arc::clone(&uid));
            cache.owners.insert(id.clone(), uid);
        }
    }

    /// A sandbox; with its addresses if it is the pod's newest one. `None`: it went away meanwhile.
    async fn sandbox(&self, listed: cri::PodSandbox, newest: bool) -> Result<Option<Sandbox>, Error> {
        let mut ready = listed.state() == cri::PodSandboxState::SandboxReady;
        let known = self.cache().sandboxes.get(&listed.id).cloned();
        let details = match known {
            Some(details) => details,
            None if newest => {
                let request = cri::PodSandboxStatusRequest { pod_sandbox_id: listed.id.clone(), verbose: false };
                let answer = call("PodSandboxStatus", DEADLINE, self.runtime.clone().pod_sandbox_status(request)).await;
                let status = match answer {
                    Err(error) if error.is_not_found() => return Ok(None),
                    answer => answer?.status,
                };
                let status = status.ok_or(Error::Incomplete { call: "PodSandboxStatus", missing: "a status" })?;
                ready = status.state() == cri::PodSandboxState::SandboxReady;
                let details = details(&status);
                if ready && (details.host_network || !details.ips.is_empty()) {
                    self.cache().sandboxes.insert(listed.id.clone(), details.clone());
                }
                details
            }
            None => Details { ips: Vec::new(), host_network: false },
        };
        let metadata = listed.metadata.unwrap_or_default();
        Ok(Some(Sandbox {
            ready,
            pod: (metadata.name, metadata.namespace),
            attempt: metadata.attempt,
            created_at: timestamp(listed.created_at).unwrap_or_default(),
            ips: details.ips,
            host_network: details.host_network,
            id: listed.id,
        }))
    }

    /// A container; from the cache if nothing can have changed. `None`: it went away meanwhile.
    async fn instance(&self, listed: &cri::Container) -> Result<Option<Instance>, Error> {
        let state = state(listed.state());
        if let Some(known) = self.cache().instances.get(&listed.id)
            && known.state == state
        {
            return Ok(Some(known.clone()));
        }
        let Some(status) = self.container_status(&listed.id).await? else { return Ok(None) };
        let instance = instance(status, &listed.pod_sandbox_id);
        let settled = match instance.state {
            State::Running => true,
            State::Exited => instance
                .finished_at
                .is_some_and(|finished| clock::wall().duration_since(finished).unsigned_abs() > SETTLED),
            State::Created | State::Unknown => false,
        };
        if settled {
            self.cache().instances.insert(instance.id.clone(), instance.clone());
        }
        Ok(Some(instance))
    }

    pub(super) fn own(&self, id: &str, uid: Option<String>) {
        if let Some(uid) = uid {
            self.cache().owners.insert(id.to_owned(), Arc::from(uid));
        }
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        // Every change to it is one insert or removal, so a panic elsewhere leaves it whole.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn timestamp(nanoseconds: i64) -> Option<Timestamp> {
    (nanoseconds > 0).then(|| Timestamp::from_nanosecond(i128::from(nanoseconds)).ok()).flatten()
}

fn state(state: cri::ContainerState) -> State {
    match state {
        cri::ContainerState::ContainerCreated => State::Created,
        cri::ContainerState::ContainerRunning => State::Running,
        cri::ContainerState::ContainerExited => State::Exited,
        cri::ContainerState::ContainerUnknown => State::Unknown,
    }
}

/// Sandboxes of pods, each with the pod's UID and whether it is the newest one of its pod.
fn with_newest(sandboxes: Vec<cri::PodSandbox>) -> Vec<(String, cri::PodSandbox, bool)> {
    let order = |sandbox: &cri::PodSandbox| {
        (sandbox.metadata.as_ref().map(|metadata| metadata.attempt).unwrap_or_default(), sandbox.created_at)
    };
    let mut newest: HashMap<String, (u32, i64)> = HashMap::new();
    let mut owned = Vec::with_capacity(sandboxes.len());
    for mut sandbox in sandboxes {
        let Some(uid) = sandbox.labels.remove(label::POD_UID) else { continue };
        let at = order(&sandbox);
        newest.entry(uid.clone()).and_modify(|newest| *newest = at.max(*newest)).or_insert(at);
        owned.push((uid, sandbox));
    }
    owned
        .into_iter()
        .map(|(uid, sandbox)| {
            let is_newest = newest.get(&uid) == Some(&order(&sandbox));
            (uid, sandbox, is_newest)
        })
        .collect()
}

fn details(status: &cri::PodSandboxStatus) -> Details {
    let ips = status.network.as_ref().map_or_else(Vec::new, |network| {
        std::iter::once(network.ip.as_str())
            .chain(network.additional_ips.iter().map(|ip| ip.ip.as_str()))
            .filter_map(|ip| ip.parse().ok())
            .collect()
    });
    let options = status.linux.as_ref().and_then(|linux| linux.namespaces.as_ref()?.options.as_ref());
    Details { ips, host_network: options.is_some_and(|options| options.network() == cri::NamespaceMode::Node) }
}

fn instance(status: cri::ContainerStatus, sandbox: &str) -> Instance {
    let state = state(status.state());
    let annotation = |key: &str| status.annotations.get(key).map(String::as_str);
    let message = if state == State::Exited {
        let path = annotation(label::TERMINATION_MESSAGE_PATH).filter(|path| !path.is_empty());
        let mount = path.and_then(|path| status.mounts.iter().find(|mount| mount.container_path == path));
        termination::message(&termination::Ended {
            message: &status.message,
            reason: &status.reason,
            exit_code: status.exit_code,
            file: mount.map(|mount| mount.host_path.as_str()),
            fall_back: annotation(label::TERMINATION_MESSAGE_POLICY) == Some("FallbackToLogsOnError"),
            log_path: &status.log_path,
        })
    } else {
        status.message.clone()
    };
    let metadata = status.metadata.as_ref();
    let name = status.labels.get(label::CONTAINER_NAME).or_else(|| metadata.map(|metadata| &metadata.name));
    let attempt = metadata.and_then(|metadata| i32::try_from(metadata.attempt).ok());
    Instance {
        sandbox: sandbox.to_owned(),
        name: name.cloned().unwrap_or_default(),
        restart_count: annotation(label::RESTART_COUNT)
            .and_then(|count| count.parse().ok())
            .or(attempt)
            .unwrap_or_default(),
        state,
        hash: annotation(label::CONTAINER_HASH).and_then(|hash| u64::from_str_radix(hash, 16).ok()).unwrap_or_default(),
        grace_period: annotation(label::GRACE_PERIOD).and_then(|grace| grace.parse().ok()),
        image: status.image.map(|image| image.image).unwrap_or_default(),
        created_at: timestamp(status.created_at).unwrap_or_default(),
        started_at: timestamp(status.started_at),
        finished_at: timestamp(status.finished_at),
        exit_code: status.exit_code,
        message,
        id: status.id,
        image_id: status.image_ref,
        reason: status.reason,
        log_path: status.log_path,
    }
}
