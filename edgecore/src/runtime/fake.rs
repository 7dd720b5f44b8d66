//! A container runtime in this process, on a real socket: the CRI calls over a few maps, with a script of what goes wrong.
//!
//! Containers do what their image's [`Script`] says; calls can be made to fail or to wait. What was called is written down.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{Stream, stream};
use jiff::Timestamp;
use skerry_proto::cri::image_service_server::{ImageService, ImageServiceServer};
use skerry_proto::cri::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use skerry_proto::cri::{self, ContainerState, PodSandboxState};
use tokio::net::UnixListener;
use tokio::sync::{Notify, broadcast, oneshot};
use tonic::{Request, Response, Status};

/// What a container of an image does.
#[derive(Clone, Debug, Default)]
pub(crate) struct Script {
    /// It ends with this code as soon as it is started; otherwise it runs until it is stopped.
    pub(crate) exits: Option<i32>,
    /// It ignores its stop signal, so that it ends with 137 when the grace is over.
    pub(crate) stubborn: bool,
}

/// What an exec answers.
#[derive(Clone, Debug)]
pub(crate) enum ExecScript {
    /// Output and exit code.
    Ends(&'static str, i32),
    /// It takes longer than its timeout.
    TimesOut,
    /// The runtime cannot do it.
    Fails(&'static str),
}

/// The runtime while it serves, and the hand that moves it.
#[derive(Clone)]
pub(crate) struct FakeRuntime {
    inner: Arc<Inner>,
    path: PathBuf,
}

struct Inner {
    state: Mutex<World>,
    events: broadcast::Sender<cri::ContainerEventResponse>,
    /// Wakes calls that were told to wait.
    released: Notify,
}

#[derive(Default)]
struct World {
    sandboxes: BTreeMap<String, cri::PodSandboxStatus>,
    containers: BTreeMap<String, Made>,
    images: BTreeMap<String, cri::Image>,
    /// By image name.
    scripts: HashMap<String, Script>,
    /// What every further exec answers, in order; the last one stays.
    execs: VecDeque<ExecScript>,
    /// Call name to the errors of its next calls.
    failures: HashMap<&'static str, VecDeque<Status>>,
    /// Calls that wait until they are released.
    held: Vec<&'static str>,
    calls: Vec<String>,
    auths: Vec<Option<cri::AuthConfig>>,
    pullable: BTreeMap<String, u64>,
    counter: u64,
    conditions: Vec<cri::RuntimeCondition>,
    info: HashMap<String, String>,
    driver: Option<cri::CgroupDriver>,
    /// Where exec, attach and port-forward are served.
    streaming: Option<String>,
    server: Option<Server>,
}

/// A thread with a tokio runtime of its own, so that ending it closes every connection.
struct Server {
    end: oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

struct Made {
    status: cri::ContainerStatus,
    sandbox: String,
    config: cri::ContainerConfig,
}

impl FakeRuntime {
    /// Serves on a socket in `dir`; the endpoint comes with the handle.
    pub(crate) fn start(dir: &Path) -> std::io::Result<(String, Self)> {
        let ready = |name: &str| cri::RuntimeCondition { r#type: name.to_owned(), status: true, ..Default::default() };
        let world = World { conditions: vec![ready("RuntimeReady"), ready("NetworkReady")], ..Default::default() };
        let inner = Inner { state: Mutex::new(world), events: broadcast::channel(1024).0, released: Notify::new() };
        let fake = Self { inner: Arc::new(inner), path: dir.join("cri.sock") };
        fake.serve()?;
        Ok((format!("unix://{}", fake.path.display()), fake))
    }

    /// Serves again after [`Self::stop`]; what it holds is still there.
    pub(crate) fn serve(&self) -> std::io::Result<()> {
        let _ = std::fs::remove_file(&self.path);
        let listener = std::os::unix::net::UnixListener::bind(&self.path)?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (end, ended) = oneshot::channel();
        let fake = self.clone();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async move {
                let Ok(listener) = UnixListener::from_std(listener) else { return };
                let incoming = stream::unfold(listener, |listener| async move {
                    let accepted = listener.accept().await.map(|(stream, _)| stream);
                    Some((accepted, listener))
                });
                let server = tonic::transport::Server::builder()
                    .add_service(RuntimeServiceServer::new(fake.clone()))
                    .add_service(ImageServiceServer::new(fake))
                    .serve_with_incoming(incoming);
                tokio::select! {
                    _ = server => {}
                    _ = ended => {}
                }
            });
        });
        self.world().server = Some(Server { end, thread });
        Ok(())
    }

    /// Goes away as if killed, with every connection; containers stay as they are.
    pub(crate) fn stop(&self) {
        let server = self.world().server.take();
        if let Some(Server { end, thread }) = server {
            let _ = end.send(());
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }

    /// Puts an image on the box.
    pub(crate) fn image(&self, name: &str, script: Script) {
        let mut world = self.world();
        world.scripts.insert(name.to_owned(), script);
        insert_image(&mut world, name, 1000);
    }

    /// Makes an image pullable.
    pub(crate) fn registry(&self, name: &str, size: u64) {
        self.world().pullable.insert(name.to_owned(), size);
    }

    /// The next call of this name (as in the .proto) fails so.
    pub(crate) fn fail(&self, call: &'static str, status: Status) {
        self.world().failures.entry(call).or_default().push_back(status);
    }

    /// Calls of this name wait until [`Self::release`].
    pub(crate) fn hold(&self, call: &'static str) {
        self.world().held.push(call);
    }

    /// Lets calls of this name go on.
    pub(crate) fn release(&self, call: &'static str) {
        self.world().held.retain(|held| *held != call);
        self.inner.released.notify_waiters();
    }

    /// What execs answer from now on, the last one for ever.
    pub(crate) fn execs(&self, execs: impl IntoIterator<Item = ExecScript>) {
        self.world().execs = execs.into_iter().collect();
    }

    /// The URL that exec, attach and port-forward are answered with.
    pub(crate) fn streaming(&self, url: &str) {
        self.world().streaming = Some(url.to_owned());
    }

    /// Where a container's log is.
    pub(crate) fn log_path(&self, container: &str, path: &Path) {
        if let Some(made) = self.world().containers.get_mut(container) {
            made.status.log_path = path.to_string_lossy().into_owned();
        }
    }

    /// A condition of its Status.
    pub(crate) fn condition(&self, name: &str, status: bool, message: &str) {
        let mut world = self.world();
        for condition in &mut world.conditions {
            if condition.r#type == name {
                condition.status = status;
                condition.reason = format!("{name}Reason");
                condition.message = message.to_owned();
            }
        }
    }

    /// The verbose part of its Status, and the answer to RuntimeConfig (none: unimplemented).
    pub(crate) fn setup(&self, config: &str, driver: Option<cri::CgroupDriver>) {
        let mut world = self.world();
        world.info.insert("config".to_owned(), config.to_owned());
        world.driver = driver;
    }

    /// A container ends.
    pub(crate) fn exit(&self, container: &str, code: i32, reason: &str) {
        let ended = self.world().containers.get_mut(container).is_some_and(|made| end(made, code, reason));
        if ended {
            self.tell(container, cri::ContainerEventType::ContainerStoppedEvent);
        }
    }

    /// A sandbox ends, as when its pause container is killed, and everything in it.
    pub(crate) fn kill_sandbox(&self, id: &str) {
        let mut world = self.world();
        if let Some(sandbox) = world.sandboxes.get_mut(id) {
            sandbox.set_state(PodSandboxState::SandboxNotready);
        }
        let inside: Vec<String> =
            world.containers.iter().filter(|(_, made)| made.sandbox == id).map(|(id, _)| id.clone()).collect();
        drop(world);
        for container in inside {
            self.exit(&container, 137, "Error");
        }
        self.tell(id, cri::ContainerEventType::ContainerStoppedEvent);
    }

    /// Ids of running containers by this name.
    pub(crate) fn running(&self, name: &str) -> Vec<String> {
        let world = self.world();
        let is_running = |made: &&Made| {
            made.status.state() == ContainerState::ContainerRunning
                && made.config.metadata.as_ref().is_some_and(|metadata| metadata.name == name)
        };
        world.containers.values().filter(is_running).map(|made| made.status.id.clone()).collect()
    }

    /// What a container was made from.
    pub(crate) fn config(&self, container: &str) -> Option<cri::ContainerConfig> {
        self.world().containers.get(container).map(|made| made.config.clone())
    }

    /// Ids of sandboxes, and whether they are ready.
    pub(crate) fn sandboxes(&self) -> Vec<(String, bool)> {
        let world = self.world();
        let ready = |sandbox: &cri::PodSandboxStatus| sandbox.state() == PodSandboxState::SandboxReady;
        world.sandboxes.values().map(|sandbox| (sandbox.id.clone(), ready(sandbox))).collect()
    }

    /// What was called since the last time, each as `Call subject`.
    pub(crate) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.world().calls)
    }

    /// With which credentials was pulled.
    pub(crate) fn auths(&self) -> Vec<Option<cri::AuthConfig>> {
        std::mem::take(&mut self.world().auths)
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn url(&self, of: &str) -> Result<String, Status> {
        let world = self.world();
        if !world.containers.contains_key(of) && !world.sandboxes.contains_key(of) {
            return Err(missing(of));
        }
        world.streaming.clone().ok_or_else(|| Status::unavailable("no streaming server"))
    }

    fn tell(&self, id: &str, kind: cri::ContainerEventType) {
        let world = self.world();
        let sandbox = world.containers.get(id).map_or(id, |made| made.sandbox.as_str());
        let event = cri::ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind.into(),
            pod_sandbox_status: world.sandboxes.get(sandbox).cloned(),
            ..Default::default()
        };
        // Nobody may be listening.
        let _ = self.inner.events.send(event);
    }

    /// Writes a call down, waits if it is held, and fails if it was told to.
    async fn enter(&self, call: &'static str, subject: &str) -> Result<(), Status> {
        self.world().calls.push(format!("{call} {subject}").trim_end().to_owned());
        loop {
            let released = self.inner.released.notified();
            if !self.world().held.contains(&call) {
                break;
            }
            released.await;
        }
        match self.world().failures.get_mut(call).and_then(VecDeque::pop_front) {
            Some(status) => Err(status),
            None => Ok(()),
        }
    }
}

fn now() -> i64 {
    nanoseconds(crate::clock::wall())
}

fn nanoseconds(at: Timestamp) -> i64 {
    i64::try_from(at.as_nanosecond()).unwrap_or(i64::MAX)
}

fn end(made: &mut Made, code: i32, reason: &str) -> bool {
    if made.status.state() == ContainerState::ContainerExited {
        return false;
    }
    made.status.set_state(ContainerState::ContainerExited);
    made.status.exit_code = code;
    made.status.finished_at = now();
    made.status.reason = reason.to_owned();
    true
}

fn insert_image(world: &mut World, name: &str, size: u64) -> String {
    let id = format!("sha256:{:0>64}", hex::encode(name.as_bytes()).chars().take(60).collect::<String>());
    let image = cri::Image { id: id.clone(), repo_tags: vec![name.to_owned()], size, ..Default::default() };
    world.images.insert(id.clone(), image);
    id
}

fn find_image<'a>(world: &'a World, name: &str) -> Option<&'a cri::Image> {
    let same = |tag: &String| tag == name || tag.strip_suffix(":latest") == Some(name);
    world.images.values().find(|image| image.id == name || image.repo_tags.iter().any(same))
}

fn has_labels(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// `io-et`, with a dash for what is not wanted.
fn stdio(stdin: bool, stdout: bool, stderr: bool, tty: bool) -> String {
    let letter = |wanted: bool, letter: char| if wanted { letter } else { '-' };
    [letter(stdin, 'i'), letter(stdout, 'o'), letter(stderr, 'e'), letter(tty, 't')].iter().collect()
}

fn missing(what: &str) -> Status {
    Status::not_found(format!("{what}: not found"))
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl RuntimeService for FakeRuntime {
    type GetContainerEventsStream = Pin<Box<dyn Stream<Item = Result<cri::ContainerEventResponse, Status>> + Send>>;

    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        self.enter("Version", "").await?;
        Ok(Response::new(cri::VersionResponse {
            version: "0.1.0".to_owned(),
            runtime_name: "fake".to_owned(),
            runtime_version: "1.0.0".to_owned(),
            runtime_api_version: "v1".to_owned(),
        }))
    }

    async fn run_pod_sandbox(&self, request: Request<cri::RunPodSandboxRequest>) -> Answer<cri::RunPodSandboxResponse> {
        let config = request.into_inner().config.unwrap_or_default();
        let metadata = config.metadata.clone().unwrap_or_default();
        self.enter("RunPodSandbox", &metadata.name).await?;
        let mut world = self.world();
        world.counter += 1;
        let id = format!("sandbox{}", world.counter);
        let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let options = security.and_then(|security| security.namespace_options.clone()).unwrap_or_default();
        let ip = match options.network() {
            cri::NamespaceMode::Node => String::new(),
            _ => format!("10.88.{}.{}", world.counter / 250, world.counter % 250 + 2),
        };
        let status = cri::PodSandboxStatus {
            id: id.clone(),
            metadata: Some(metadata),
            created_at: now(),
            network: Some(cri::PodSandboxNetworkStatus { ip, ..Default::default() }),
            linux: Some(cri::LinuxPodSandboxStatus { namespaces: Some(cri::Namespace { options: Some(options) }) }),
            labels: config.labels,
            annotations: config.annotations,
            ..Default::default()
        };
        world.sandboxes.insert(id.clone(), status);
        Ok(Response::new(cri::RunPodSandboxResponse { pod_sandbox_id: id }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        self.enter("StopPodSandbox", &id).await?;
        if !self.world().sandboxes.contains_key(&id) {
            return Err(missing(&id));
        }
        self.kill_sandbox(&id);
        Ok(Response::new(cri::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        self.enter("RemovePodSandbox", &id).await?;
        let mut world = self.world();
        world.containers.retain(|_, made| made.sandbox != id);
        world.sandboxes.remove(&id).ok_or_else(|| missing(&id))?;
        Ok(Response::new(cri::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        let id = request.into_inner().pod_sandbox_id;
        self.enter("PodSandboxStatus", &id).await?;
        let status = self.world().sandboxes.get(&id).cloned().ok_or_else(|| missing(&id))?;
        Ok(Response::new(cri::PodSandboxStatusResponse { status: Some(status), ..Default::default() }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        self.enter("ListPodSandbox", "").await?;
        let selector = request.into_inner().filter.unwrap_or_default().label_selector;
        let items = self
            .world()
            .sandboxes
            .values()
            .filter(|sandbox| has_labels(&sandbox.labels, &selector))
            .map(|sandbox| cri::PodSandbox {
                id: sandbox.id.clone(),
                metadata: sandbox.metadata.clone(),
                state: sandbox.state,
                created_at: sandbox.created_at,
                labels: sandbox.labels.clone(),
                ..Default::default()
            })
            .collect();
        Ok(Response::new(cri::ListPodSandboxResponse { items }))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        let request = request.into_inner();
        let config = request.config.unwrap_or_default();
        let metadata = config.metadata.clone().unwrap_or_default();
        self.enter("CreateContainer", &metadata.name).await?;
        let mut world = self.world();
        let sandbox = world.sandboxes.get(&request.pod_sandbox_id).ok_or_else(|| missing(&request.pod_sandbox_id))?;
        if sandbox.state() != PodSandboxState::SandboxReady {
            return Err(Status::unknown("the sandbox is not running"));
        }
        let name = config.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
        let image = find_image(&world, &name).ok_or_else(|| missing(&name))?.clone();
        world.counter += 1;
        let id = format!("container{}", world.counter);
        let directory = request.sandbox_config.map(|config| config.log_directory).unwrap_or_default();
        let status = cri::ContainerStatus {
            id: id.clone(),
            metadata: Some(metadata),
            state: ContainerState::ContainerCreated.into(),
            created_at: now(),
            image: Some(cri::ImageSpec {
                image: image.repo_tags.first().cloned().unwrap_or(name),
                ..Default::default()
            }),
            image_ref: image.id,
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
            mounts: config.mounts.clone(),
            log_path: Path::new(&directory).join(&config.log_path).to_string_lossy().into_owned(),
            ..Default::default()
        };
        world.containers.insert(id.clone(), Made { status, sandbox: request.pod_sandbox_id, config });
        drop(world);
        self.tell(&id, cri::ContainerEventType::ContainerCreatedEvent);
        Ok(Response::new(cri::CreateContainerResponse { container_id: id }))
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        let id = request.into_inner().container_id;
        self.enter("StartContainer", &id).await?;
        let script = {
            let mut world = self.world();
            let image = {
                let made = world.containers.get_mut(&id).ok_or_else(|| missing(&id))?;
                if made.status.state() != ContainerState::ContainerCreated {
                    return Err(Status::failed_precondition("the container was started before"));
                }
                made.status.set_state(ContainerState::ContainerRunning);
                made.status.started_at = now();
                made.status.image.clone().unwrap_or_default().image
            };
            world.scripts.get(&image).cloned().unwrap_or_default()
        };
        self.tell(&id, cri::ContainerEventType::ContainerStartedEvent);
        if let Some(code) = script.exits {
            self.exit(&id, code, if code == 0 { "Completed" } else { "Error" });
        }
        Ok(Response::new(cri::StartContainerResponse {}))
    }

    async fn stop_container(&self, request: Request<cri::StopContainerRequest>) -> Answer<cri::StopContainerResponse> {
        let request = request.into_inner();
        self.enter("StopContainer", &format!("{} {}", request.container_id, request.timeout)).await?;
        let script = {
            let world = self.world();
            let made = world.containers.get(&request.container_id).ok_or_else(|| missing(&request.container_id))?;
            let image = made.status.image.clone().unwrap_or_default().image;
            world.scripts.get(&image).cloned().unwrap_or_default()
        };
        if script.stubborn {
            let grace = u64::try_from(request.timeout).unwrap_or_default();
            tokio::time::sleep(Duration::from_secs(grace)).await;
        }
        self.exit(&request.container_id, if script.stubborn { 137 } else { 143 }, "Error");
        Ok(Response::new(cri::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        self.enter("RemoveContainer", &id).await?;
        self.world().containers.remove(&id).ok_or_else(|| missing(&id))?;
        Ok(Response::new(cri::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        self.enter("ListContainers", "").await?;
        let selector = request.into_inner().filter.unwrap_or_default().label_selector;
        let world = self.world();
        let containers = world.containers.values().filter(|made| has_labels(&made.status.labels, &selector));
        let containers = containers.map(|made| cri::Container {
            id: made.status.id.clone(),
            pod_sandbox_id: made.sandbox.clone(),
            metadata: made.status.metadata.clone(),
            image: made.config.image.clone(),
            image_ref: made.status.image_ref.clone(),
            state: made.status.state,
            created_at: made.status.created_at,
            labels: made.status.labels.clone(),
            annotations: made.status.annotations.clone(),
            ..Default::default()
        });
        Ok(Response::new(cri::ListContainersResponse { containers: containers.collect() }))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        let id = request.into_inner().container_id;
        self.enter("ContainerStatus", &id).await?;
        let status = self.world().containers.get(&id).map(|made| made.status.clone());
        let status = Some(status.ok_or_else(|| missing(&id))?);
        Ok(Response::new(cri::ContainerStatusResponse { status, ..Default::default() }))
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        self.enter("ReopenContainerLog", &request.into_inner().container_id).await?;
        Ok(Response::new(cri::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(&self, request: Request<cri::ExecSyncRequest>) -> Answer<cri::ExecSyncResponse> {
        let request = request.into_inner();
        self.enter("ExecSync", &request.cmd.join(" ")).await?;
        let script = {
            let mut world = self.world();
            if world.execs.len() > 1 { world.execs.pop_front() } else { world.execs.front().cloned() }
        };
        match script.unwrap_or(ExecScript::Ends("", 0)) {
            ExecScript::Ends(output, exit_code) => Ok(Response::new(cri::ExecSyncResponse {
                stdout: output.as_bytes().to_vec(),
                exit_code,
                ..Default::default()
            })),
            ExecScript::TimesOut => Err(Status::deadline_exceeded("timeout exceeded")),
            ExecScript::Fails(message) => Err(Status::unknown(message)),
        }
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        let request = request.into_inner();
        let cri::ExecRequest { container_id, cmd, tty, stdin, stdout, stderr } = &request;
        let wanted = stdio(*stdin, *stdout, *stderr, *tty);
        self.enter("Exec", &format!("{container_id} {wanted} {}", cmd.join(" "))).await?;
        Ok(Response::new(cri::ExecResponse { url: self.url(container_id)? }))
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        let cri::AttachRequest { container_id, stdin, tty, stdout, stderr } = request.into_inner();
        let wanted = stdio(stdin, stdout, stderr, tty);
        self.enter("Attach", &format!("{container_id} {wanted}")).await?;
        Ok(Response::new(cri::AttachResponse { url: self.url(&container_id)? }))
    }

    async fn port_forward(&self, request: Request<cri::PortForwardRequest>) -> Answer<cri::PortForwardResponse> {
        let cri::PortForwardRequest { pod_sandbox_id, port } = request.into_inner();
        self.enter("PortForward", &format!("{pod_sandbox_id} {port:?}")).await?;
        Ok(Response::new(cri::PortForwardResponse { url: self.url(&pod_sandbox_id)? }))
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        self.enter("Status", "").await?;
        let world = self.world();
        let info = if request.into_inner().verbose { world.info.clone() } else { HashMap::new() };
        let status = Some(cri::RuntimeStatus { conditions: world.conditions.clone() });
        Ok(Response::new(cri::StatusResponse { status, info, ..Default::default() }))
    }

    async fn get_container_events(&self, _: Request<cri::GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
        let receiver = self.inner.events.subscribe();
        self.enter("GetContainerEvents", "").await?;
        let events = stream::unfold(receiver, |mut receiver| async move {
            let event = receiver.recv().await.ok()?;
            Some((Ok(event), receiver))
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn runtime_config(&self, _: Request<cri::RuntimeConfigRequest>) -> Answer<cri::RuntimeConfigResponse> {
        let driver = self.world().driver.ok_or_else(|| Status::unimplemented("unknown method RuntimeConfig"))?;
        let linux = cri::LinuxRuntimeConfiguration { cgroup_driver: driver.into() };
        Ok(Response::new(cri::RuntimeConfigResponse { linux: Some(linux) }))
    }

    /// A container's writable layer takes as many bytes as its id has, in one inode.
    async fn list_container_stats(
        &self,
        _: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        self.enter("ListContainerStats", "").await?;
        let layer = |id: &String| cri::FilesystemUsage {
            used_bytes: Some(cri::UInt64Value { value: id.len() as u64 }),
            inodes_used: Some(cri::UInt64Value { value: 1 }),
            ..Default::default()
        };
        let stats = |id: &String| cri::ContainerStats {
            attributes: Some(cri::ContainerAttributes { id: id.clone() }),
            writable_layer: Some(layer(id)),
        };
        let stats = self.world().containers.keys().map(stats).collect();
        Ok(Response::new(cri::ListContainerStatsResponse { stats }))
    }
}

#[tonic::async_trait]
impl ImageService for FakeRuntime {
    async fn list_images(&self, _: Request<cri::ListImagesRequest>) -> Answer<cri::ListImagesResponse> {
        self.enter("ListImages", "").await?;
        let images = self.world().images.values().cloned().collect();
        Ok(Response::new(cri::ListImagesResponse { images }))
    }

    async fn image_status(&self, request: Request<cri::ImageStatusRequest>) -> Answer<cri::ImageStatusResponse> {
        let name = request.into_inner().image.unwrap_or_default().image;
        self.enter("ImageStatus", &name).await?;
        let image = find_image(&self.world(), &name).cloned();
        Ok(Response::new(cri::ImageStatusResponse { image, ..Default::default() }))
    }

    async fn pull_image(&self, request: Request<cri::PullImageRequest>) -> Answer<cri::PullImageResponse> {
        let request = request.into_inner();
        let name = request.image.unwrap_or_default().image;
        self.world().auths.push(request.auth);
        self.enter("PullImage", &name).await?;
        let mut world = self.world();
        let size = world.pullable.get(&name).copied();
        let size = size.ok_or_else(|| Status::unknown(format!("dial tcp: lookup {name}: no such host")))?;
        let image_ref = insert_image(&mut world, &name, size);
        Ok(Response::new(cri::PullImageResponse { image_ref }))
    }

    async fn remove_image(&self, request: Request<cri::RemoveImageRequest>) -> Answer<cri::RemoveImageResponse> {
        let name = request.into_inner().image.unwrap_or_default().image;
        self.enter("RemoveImage", &name).await?;
        let mut world = self.world();
        let id = find_image(&world, &name).ok_or_else(|| missing(&name))?.id.clone();
        world.images.remove(&id);
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<cri::ImageFsInfoRequest>) -> Answer<cri::ImageFsInfoResponse> {
        self.enter("ImageFsInfo", "").await?;
        let mountpoint = self.path.parent().map(|dir| dir.to_string_lossy().into_owned()).unwrap_or_default();
        let usage =
            cri::FilesystemUsage { fs_id: Some(cri::FilesystemIdentifier { mountpoint }), ..Default::default() };
        Ok(Response::new(cri::ImageFsInfoResponse { image_filesystems: vec![usage], ..Default::default() }))
    }
}
