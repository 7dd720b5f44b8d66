//! Carries out the actions of a pod's plan: the only place where the kubelet changes anything.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Lifecycle, Pod, PodStatus, Secret};
use skerry_proto::cri;
use tokio::sync::{mpsc, watch};
use tracing::debug;

use super::container_config::{ConfigError, ContainerInput, ContainerSpec, container_config};
use super::context::{Context, blocking, reference};
use super::dirs::PodDirs;
use super::dns;
use super::env::environment;
use super::field::{self, FieldContext};
use super::gather::Needs;
use super::hooks::{self, Hook};
use super::hosts;
use super::images::{self, Found, Image, PullPolicy, Want};
use super::logs;
use super::memory::{Failure, NETWORK_NOT_READY};
use super::observed::{Observed, label};
use super::plan::{Action, stop_timeout};
use super::prober::Target;
use super::references::{NodeFacts, PodEvent, References};
use super::resources;
use super::sandbox_config::sandbox_config;
use super::spec::{Kind, Spec};
use super::volumes::{self, Propagation, VolumeContext};
use crate::clock;

/// Reason of the event that says that something of a pod could not be ended.
const KILL_FAILED: &str = "FailedKillPod";

/// What the actions of one plan share.
#[derive(Debug)]
pub struct Execution {
    /// Everything that is not this pod's.
    pub context: Arc<Context>,
    /// The pod.
    pub pod: Arc<Pod>,
    /// What it refers to.
    pub needs: Needs,
    /// What ran when the plan was made.
    pub observed: Observed,
    /// The status of that moment.
    pub status: PodStatus,
    /// The sandbox this plan made.
    pub sandbox: Option<Made>,
    /// Instances that this plan has stopped; stops that wait for others look here.
    pub stopped: watch::Sender<BTreeSet<String>>,
}

/// A sandbox that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// CRI id.
    pub id: String,
    /// Its attempt number.
    pub attempt: u32,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
}

/// What an action brought forth.
#[derive(Debug, Default)]
pub struct Done {
    /// The sandbox it made.
    pub sandbox: Option<Made>,
    /// The instance it started, which has a postStart hook to run.
    pub started: Option<String>,
}

impl Execution {
    /// Carries out one action.
    pub async fn run(&self, action: &Action) -> Result<Done, Failure> {
        let done = self.carry_out(action).await;
        if let Err(Failure { reason, message }) = &done
            && reason == KILL_FAILED
        {
            self.event(true, KILL_FAILED, format!("error killing pod: {message}"));
        }
        done
    }

    async fn carry_out(&self, action: &Action) -> Result<Done, Failure> {
        match action {
            Action::SetUpVolumes => self.set_up().await.map(|()| Done::default()),
            Action::CreateSandbox { attempt } => {
                let made = self.create_sandbox(*attempt).await?;
                Ok(Done { sandbox: Some(made), started: None })
            }
            Action::StartContainer { kind, index, name, restart_count, sandbox, .. } => {
                let started = self.start(*kind, *index, name, *restart_count, sandbox.as_deref()).await;
                if let Err(failure) = &started {
                    let message = format!("Error: {}", failure.message);
                    self.container_event(*kind, name, true, "Failed", message);
                }
                started
            }
            Action::KillContainer { id, name, grace, pre_stop, after, message, .. } => {
                self.kill(id, name, *grace, *pre_stop, after, message).await.map(|()| Done::default())
            }
            Action::StopSandbox { id } => done(self.context.cri.stop_sandbox(id).await, KILL_FAILED),
            Action::RemoveContainer { id, name, log_path } => self.remove_container(id, name, log_path).await,
            Action::RemoveSandbox { id } => {
                done(self.context.cri.stop_sandbox(id).await, KILL_FAILED)?;
                done(self.context.cri.remove_sandbox(id).await, KILL_FAILED)
            }
            Action::TearDown => self.tear_down().await.map(|()| Done::default()),
            Action::ReportFinished => done(self.context.publish(&self.pod, &self.status, true).await, "FailedReport"),
        }
    }

    /// Directories, cgroup, volumes; also brings the content of volumes up to date.
    pub async fn set_up(&self) -> Result<(), Failure> {
        let references = self.references().await?;
        let (context, pod, node) = (self.context.clone(), self.pod.clone(), self.context.node());
        let ips = self.observed.sandboxes.first().map(|sandbox| sandbox.ips.clone()).unwrap_or_default();
        let errors = blocking(move || {
            let machine = &context.machine;
            let cgroup = resources::pod_cgroup(&pod, &node, machine).map_err(|error| vec![error.to_string()])?;
            // A missing controller degrades the pod's limits; it does not stop the pod.
            for warning in context.cgroups.apply(&cgroup) {
                debug!(path = cgroup.path, warning = warning.0, "the pod's cgroup lacks something");
            }
            let fields = FieldContext::new(&node, &ips);
            let volume_context = VolumeContext {
                node: &node,
                pod_memory_limit: cgroup.memory_limit,
                now: clock::wall(),
                field: &|path| field::value(&pod, path, &fields).map_err(|error| error.to_string()),
                resource: &|container, resource, divisor| {
                    field::resource_value(&pod, container, resource, divisor, &node).map_err(|error| error.to_string())
                },
            };
            context
                .volumes
                .set_up(&pod, &references, &volume_context)
                .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>())
        })
        .await;
        let Err(errors) = errors else { return Ok(()) };
        for message in &errors {
            self.event(true, "FailedMount", message.clone());
        }
        Err(Failure { reason: "FailedMount".to_owned(), message: errors.join("; ") })
    }

    async fn create_sandbox(&self, attempt: u32) -> Result<Made, Failure> {
        let failed = |message: String| Failure { reason: "FailedCreatePodSandBox".to_owned(), message };
        let made = async {
            let spec = Spec::new(&self.pod);
            let trouble = self.context.network.borrow().clone();
            if let Some(message) = trouble.filter(|_| !spec.host_network()) {
                self.event(true, NETWORK_NOT_READY, format!("network is not ready: {message}"));
                return Err(Failure { reason: NETWORK_NOT_READY.to_owned(), message });
            }
            // Never closed; if it were, all at once would do no harm.
            let _turn = self.context.sandbox_turns.acquire().await;
            let (config, handler, events) = self.sandbox_config(attempt).await?;
            for event in &events {
                self.context.record(&reference(&self.pod), event);
            }
            let directory = config.log_directory.clone();
            blocking(move || std::fs::create_dir_all(&directory))
                .await
                .map_err(|error| failed(format!("cannot make the log directory: {error}")))?;
            let id = self
                .context
                .cri
                .run_sandbox(config, &handler)
                .await
                .map_err(|error| failed(format!("Failed to create pod sandbox: {error}")))?;
            let uid = spec.uid();
            let observed = self.context.cri.observe(Some(uid)).await.map_err(|error| failed(error.to_string()))?;
            let sandboxes = observed.get(uid).map(|observed| observed.sandboxes.as_slice()).unwrap_or_default();
            let ips = sandboxes.iter().find(|sandbox| sandbox.id == id).map(|sandbox| sandbox.ips.clone());
            Ok(Made { id, attempt, ips: ips.unwrap_or_default() })
        }
        .await;
        if let Err(failure) = &made {
            self.event(true, "FailedCreatePodSandBox", failure.message.clone());
        }
        made
    }

    /// The sandbox's config, its runtime handler, and what there is to say about it.
    async fn sandbox_config(&self, attempt: u32) -> Result<(cri::PodSandboxConfig, String, Vec<PodEvent>), Failure> {
        let (etc, resolved) = (Path::new("/etc/resolv.conf"), Path::new("/run/systemd/resolve/resolv.conf"));
        let resolv_conf = blocking(|| dns::read_resolv_conf(etc, resolved)).await;
        sandbox_config(&self.pod, attempt, &self.context.node(), &resolv_conf)
            .map_err(|error| Failure { reason: "FailedCreatePodSandBox".to_owned(), message: error.to_string() })
    }

    async fn start(
        &self,
        kind: Kind,
        index: usize,
        name: &str,
        restart_count: i32,
        sandbox: Option<&str>,
    ) -> Result<Done, Failure> {
        let invalid = |message: String| Failure { reason: "CreateContainerConfigError".to_owned(), message };
        let spec = self.spec(kind, index).ok_or_else(|| invalid(format!("the pod has no container {name:?}")))?;
        let container = spec.container();
        let sandbox = self.sandbox(sandbox).ok_or_else(|| invalid("the sandbox is gone".to_owned()))?;
        let node = self.context.node();
        let references = self.references().await?;
        let (sandbox_config, handler, _) = self.sandbox_config(sandbox.attempt).await?;
        let image = self.image(kind, &container, &references, &sandbox_config, &handler).await?;

        let ips = if Spec::new(&self.pod).host_network() { node.host_ips.clone() } else { sandbox.ips.clone() };
        let envs = environment(&self.pod, &container, &references, &node, &ips).map_err(|error| refused(&error))?;
        let restart_count = self.restart_count(name, restart_count).await;
        let recursive_read_only = node.recursive_read_only.contains(&handler);
        let mounts = self.mounts(&container, &node, &ips, &envs, recursive_read_only).await?;
        let config = container_config(ContainerInput {
            pod: &self.pod,
            container: spec,
            restart_count,
            image: &cri::Image {
                id: image.id.clone(),
                uid: image.uid.map(|value| cri::Int64Value { value }),
                username: image.username,
                ..cri::Image::default()
            },
            image_ref: image.id,
            envs,
            mounts,
            target_container_id: spec
                .target()
                .and_then(|target| self.observed.newest(target))
                .map(|one| one.id.clone()),
            node: &node,
            machine: &self.context.machine,
        })
        .map_err(|error| refused(&error))?;
        let log = Path::new(&sandbox_config.log_directory).join(&config.log_path);
        let directory = PathBuf::from(&sandbox_config.log_directory);
        let owned = name.to_owned();
        blocking(move || logs::make_container_dir(&directory, &owned))
            .await
            .map_err(|error| invalid(error.to_string()))?;

        let cri = &self.context.cri;
        let id = cri
            .create_container(&sandbox.id, config, sandbox_config)
            .await
            .map_err(|error| Failure { reason: "CreateContainerError".to_owned(), message: error.to_string() })?;
        self.container_event(kind, name, false, "Created", "Container created".to_owned());
        if let Err(error) = cri.start_container(&id).await {
            return Err(Failure { reason: "RunContainerError".to_owned(), message: error.to_string() });
        }
        self.container_event(kind, name, false, "Started", "Container started".to_owned());
        self.link_log(name, &id, log).await;
        let has_hook = container.lifecycle.as_ref().is_some_and(|hooks| hooks.post_start.is_some());
        Ok(Done { sandbox: None, started: has_hook.then_some(id) })
    }

    /// The image on the box, pulled if the policy says so.
    async fn image(
        &self,
        kind: Kind,
        container: &Container,
        references: &References,
        sandbox: &cri::PodSandboxConfig,
        handler: &str,
    ) -> Result<Image, Failure> {
        let about = reference(&self.pod);
        let path = field_path(kind, &container.name);
        let name = container.image.as_deref().unwrap_or_default();
        let want = Want {
            image: name,
            policy: PullPolicy::of(container.image_pull_policy.as_deref(), name),
            credentials: images::credentials(name, self.pull_secrets(references)),
            sandbox: Some(sandbox),
            handler,
            field_path: Some(&path),
        };
        let mut events = Vec::new();
        let found = self.context.images.find(&want, &mut events).await;
        for event in events.drain(..) {
            self.context.record(&about, &event);
        }
        let failed = |failure: images::Failure| Failure { reason: failure.reason.to_owned(), message: failure.message };
        let present = match found.map_err(failed)? {
            Found::Ready(image) => return Ok(image),
            Found::Absent(present) => present,
        };
        let missing: Vec<String> = self
            .pull_secret_names()
            .filter(|name| !references.secrets.get(*name).is_some_and(images::usable_secret))
            .map(str::to_owned)
            .collect();
        if !missing.is_empty() {
            self.context.record(&about, &images::secret_missing(&missing));
        }
        // Told as it happens: a pull may take an hour.
        let (sender, mut receiver) = mpsc::channel(8);
        let pull = self.context.images.pull(&want, present, move |event| {
            let _full = sender.try_send(event);
        });
        let tell = async {
            while let Some(event) = receiver.recv().await {
                self.context.record(&about, &event);
            }
        };
        let (pulled, ()) = tokio::join!(pull, tell);
        pulled.map_err(failed)
    }

    fn pull_secret_names(&self) -> impl Iterator<Item = &str> {
        let secrets = self.pod.spec.as_ref().and_then(|spec| spec.image_pull_secrets.as_ref());
        secrets.into_iter().flatten().map(|secret| secret.name.as_str())
    }

    fn pull_secrets<'a>(&'a self, references: &'a References) -> impl Iterator<Item = &'a Secret> {
        self.pull_secret_names().filter_map(|name| references.secrets.get(name))
    }

    async fn mounts(
        &self,
        container: &Container,
        node: &Arc<NodeFacts>,
        ips: &[IpAddr],
        envs: &[(String, String)],
        recursive_read_only: bool,
    ) -> Result<Vec<cri::Mount>, Failure> {
        let (context, pod, node) = (self.context.clone(), self.pod.clone(), node.clone());
        let (container, ips, envs) = (container.clone(), ips.to_vec(), envs.to_vec());
        let mounts = blocking(move || -> Result<Vec<cri::Mount>, String> {
            let text = |error: &dyn std::error::Error| error.to_string();
            let mounts = context.volumes.mounts(&pod, &container, &envs, recursive_read_only);
            let mounts = mounts.map_err(|error| text(&error))?;
            let mut mounts: Vec<cri::Mount> = mounts.into_iter().map(cri_mount).collect();
            let uid = pod.metadata.uid.as_deref().unwrap_or_default();
            let dirs = PodDirs::new(&node.pods_root, uid).map_err(|error| text(&error))?;
            let host_file = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
            let hosts = hosts::hosts_file(&pod, &node, &ips, &host_file).map_err(|error| text(&error))?;
            if let Some(content) = hosts.filter(|_| hosts::wants_hosts_file(&container)) {
                let path = dirs.write_etc_hosts(&content).map_err(|error| text(&error))?;
                mounts.push(bind(&path, "/etc/hosts"));
            }
            if let Some(path) = container.termination_message_path.as_deref().filter(|path| !path.is_empty()) {
                let file = dirs.termination_log(&container.name).map_err(|error| text(&error))?;
                mounts.push(bind(&file, path));
            }
            Ok(mounts)
        });
        mounts.await.map_err(|message| Failure { reason: "CreateContainerConfigError".to_owned(), message })
    }

    /// preStop, then the others it has to wait for, then the stop, all within the grace.
    async fn kill(
        &self,
        id: &str,
        name: &str,
        grace: i64,
        pre_stop: bool,
        after: &[String],
        message: &str,
    ) -> Result<(), Failure> {
        let began = clock::monotonic();
        let kind = Spec::new(&self.pod).find(name).map_or(Kind::App, |view| view.kind);
        self.container_event(kind, name, false, "Killing", message.to_owned());
        let budget = Duration::from_secs(grace.max(0).unsigned_abs());
        let preparation = async {
            if pre_stop {
                self.pre_stop(id, name, kind).await;
            }
            let mut stopped = self.stopped.subscribe();
            let all_gone = stopped.wait_for(|gone| after.iter().all(|id| gone.contains(id)));
            // The sender is ours, so it is there as long as we are.
            let _ = all_gone.await;
        };
        if tokio::time::timeout(budget, preparation).await.is_err() {
            debug!(container = name, "the grace ended before its hook, or what it waited for");
        }
        let used = i64::try_from(clock::monotonic().saturating_sub(began).as_secs()).unwrap_or(i64::MAX);
        let rest = Duration::from_secs(stop_timeout(grace, used).unsigned_abs());
        let stopped = self.context.cri.stop_container(id, rest).await;
        if stopped.is_ok() {
            self.stopped.send_modify(|gone| {
                gone.insert(id.to_owned());
            });
        }
        done(stopped, KILL_FAILED).map(|_| ())
    }

    async fn pre_stop(&self, id: &str, name: &str, kind: Kind) {
        let view = Spec::new(&self.pod).find(name);
        let noted = if self.pod.spec.is_none() { self.noted(id).await } else { None };
        let Some(container) = view.and_then(|view| view.container).or(noted.as_ref()) else { return };
        let Some(handler) = container.lifecycle.as_ref().and_then(|hooks| hooks.pre_stop.as_ref()) else { return };
        let target = Target { container_id: id, container, pod_ip: self.pod_ip() };
        let field_path = Some(field_path(kind, name));
        let event = match hooks::run(&self.context.cri, &target, handler).await {
            Ok(ran) => ran.event(field_path),
            Err(error) => {
                debug!(container = name, %error, "preStop hook");
                Some(Hook::PreStop.failed(field_path))
            }
        };
        if let Some(event) = event {
            self.context.record(&reference(&self.pod), &event);
        }
    }

    /// As much of a container's spec as its preStop hook needs, from what was noted on it: the pod's object is gone.
    async fn noted(&self, id: &str) -> Option<Container> {
        let noted = self.context.cri.container_status(id).await.ok()??.annotations;
        let pre_stop = serde_json::from_slice(noted.get(label::PRE_STOP)?.as_bytes()).ok();
        let ports = noted.get(label::PORTS).and_then(|ports| serde_json::from_slice(ports.as_bytes()).ok());
        let lifecycle = Some(Lifecycle { pre_stop, ..Lifecycle::default() });
        Some(Container { lifecycle, ports, ..Container::default() })
    }

    async fn remove_container(&self, id: &str, name: &str, log_path: &str) -> Result<Done, Failure> {
        done(self.context.cri.remove_container(id).await, "ContainerGCFailed")?;
        let node = self.context.node();
        let link = node.log_links.join(logs::link_name(self.meta().1, self.meta().0, name, id));
        let log_path = PathBuf::from(log_path);
        blocking(move || logs::remove_container(&log_path, &link))
            .await
            .map_err(|error| Failure { reason: "ContainerGCFailed".to_owned(), message: error.to_string() })?;
        Ok(Done::default())
    }

    /// Volumes and cgroup go when nothing runs any more. Termination messages and logs stay readable until the pod's object is gone
    /// ([`Context::remove_rest`]).
    async fn tear_down(&self) -> Result<(), Failure> {
        let (context, pod, node) = (self.context.clone(), self.pod.clone(), self.context.node());
        let torn = blocking(move || -> Result<(), String> {
            context.volumes.tear_down_volumes(Spec::new(&pod).uid()).map_err(|error| error.to_string())?;
            // Of an orphan the class is not known; its cgroup is found with those of all pods that are gone.
            if pod.spec.is_none() {
                return Ok(());
            }
            let path = resources::pod_cgroup_path(&pod, node.systemd_cgroups);
            context.cgroups.destroy(&path).map_err(|error| error.to_string())
        });
        torn.await.map_err(|message| Failure { reason: KILL_FAILED.to_owned(), message })
    }

    fn log_directory(&self) -> PathBuf {
        logs::pod_dir(&self.context.node().logs_root, self.meta().1, self.meta().0, Spec::new(&self.pod).uid())
    }

    async fn references(&self) -> Result<References, Failure> {
        self.needs.read(&self.context.store).await.map_err(|error| Failure {
            reason: "CreateContainerConfigError".to_owned(),
            message: format!("the store cannot be read: {error}"),
        })
    }

    fn sandbox(&self, id: Option<&str>) -> Option<Made> {
        let Some(id) = id else { return self.sandbox.clone() };
        let sandbox = self.observed.sandboxes.iter().find(|sandbox| sandbox.id == id)?;
        Some(Made { id: sandbox.id.clone(), attempt: sandbox.attempt, ips: sandbox.ips.clone() })
    }

    fn spec(&self, kind: Kind, index: usize) -> Option<ContainerSpec<'_>> {
        let spec = self.pod.spec.as_ref()?;
        match kind {
            Kind::Init | Kind::Sidecar => spec.init_containers.as_ref()?.get(index).map(ContainerSpec::Init),
            Kind::App => spec.containers.get(index).map(ContainerSpec::Regular),
            Kind::Ephemeral => spec.ephemeral_containers.as_ref()?.get(index).map(ContainerSpec::Ephemeral),
        }
    }

    /// Never below the number of a log that is there already.
    async fn restart_count(&self, name: &str, restart_count: i32) -> i32 {
        if self.observed.newest(name).is_some() {
            return restart_count;
        }
        let directory = self.log_directory().join(name);
        let next = blocking(move || logs::next_attempt(&directory)).await;
        restart_count.max(next)
    }

    async fn link_log(&self, name: &str, id: &str, log: PathBuf) {
        let node = self.context.node();
        let link = logs::link_name(self.meta().1, self.meta().0, name, id);
        if let Err(error) = blocking(move || logs::link(&node.log_links, &link, &log)).await {
            debug!(container = name, %error, "no link for log collectors");
        }
    }

    fn pod_ip(&self) -> Option<IpAddr> {
        if Spec::new(&self.pod).host_network() {
            return self.context.node().host_ips.first().copied();
        }
        self.observed.sandboxes.first()?.ips.first().copied()
    }

    /// Name and namespace.
    fn meta(&self) -> (&str, &str) {
        let meta = &self.pod.metadata;
        (meta.name.as_deref().unwrap_or_default(), meta.namespace.as_deref().unwrap_or_default())
    }

    fn event(&self, warning: bool, reason: &'static str, message: String) {
        let event = PodEvent { warning, reason, message, field_path: None };
        self.context.record(&reference(&self.pod), &event);
    }

    fn container_event(&self, kind: Kind, name: &str, warning: bool, reason: &'static str, message: String) {
        let event = PodEvent { warning, reason, message, field_path: Some(field_path(kind, name)) };
        self.context.record(&reference(&self.pod), &event);
    }
}

/// Runs the postStart hook of an instance that was just started.
pub async fn post_start(
    context: Arc<Context>,
    pod: Arc<Pod>,
    name: String,
    id: String,
    pod_ip: Option<IpAddr>,
) -> bool {
    let Some(view) = Spec::new(&pod).find(&name) else { return true };
    let Some(container) = view.container else { return true };
    let Some(handler) = container.lifecycle.as_ref().and_then(|hooks| hooks.post_start.as_ref()) else { return true };
    let target = Target { container_id: &id, container, pod_ip };
    let field_path = Some(field_path(view.kind, &name));
    let (event, passed) = match hooks::run(&context.cri, &target, handler).await {
        Ok(ran) => (ran.event(field_path), true),
        Err(error) => {
            debug!(container = name, %error, "postStart hook");
            (Some(Hook::PostStart.failed(field_path)), false)
        }
    };
    if let Some(event) = event {
        context.record(&reference(&pod), &event);
    }
    passed
}

/// How events name a container of a pod.
pub fn field_path(kind: Kind, name: &str) -> String {
    let list = match kind {
        Kind::Init | Kind::Sidecar => "initContainers",
        Kind::App => "containers",
        Kind::Ephemeral => "ephemeralContainers",
    };
    format!("spec.{list}{{{name}}}")
}

fn refused(error: &ConfigError) -> Failure {
    Failure { reason: error.reason().to_owned(), message: error.to_string() }
}

fn done<E: std::fmt::Display>(result: Result<(), E>, reason: &str) -> Result<Done, Failure> {
    match result {
        Ok(()) => Ok(Done::default()),
        Err(error) => Err(Failure { reason: reason.to_owned(), message: error.to_string() }),
    }
}

fn bind(host: &Path, container: &str) -> cri::Mount {
    cri::Mount {
        container_path: container.to_owned(),
        host_path: host.to_string_lossy().into_owned(),
        ..cri::Mount::default()
    }
}

fn cri_mount(mount: volumes::Mount) -> cri::Mount {
    let propagation = match mount.propagation {
        Propagation::Private => cri::MountPropagation::PropagationPrivate,
        Propagation::HostToContainer => cri::MountPropagation::PropagationHostToContainer,
        Propagation::Bidirectional => cri::MountPropagation::PropagationBidirectional,
    };
    cri::Mount {
        container_path: mount.container_path,
        host_path: mount.host_path.to_string_lossy().into_owned(),
        readonly: mount.read_only,
        propagation: propagation.into(),
        recursive_read_only: mount.recursive_read_only,
        ..cri::Mount::default()
    }
}
