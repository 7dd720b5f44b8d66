//! What the runtime itself says of containers, and commands inside them, over CRI.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use skerry_proto::cri::runtime_service_client::RuntimeServiceClient;
use skerry_proto::cri::{
    Container, ContainerConfig, ContainerMetadata, ContainerState, ContainerStatus, ContainerStatusRequest,
    CreateContainerRequest, ExecSyncRequest, ImageSpec, LinuxPodSandboxConfig, ListContainersRequest,
    ListPodSandboxRequest, PodSandbox, PodSandboxConfig, PodSandboxMetadata, PodSandboxState, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StatusRequest, StopPodSandboxRequest,
};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use crate::images;
use crate::process::Output;

/// The label by which kubelets name the pod of a container.
pub const POD_NAME: &str = "io.kubernetes.pod.name";
/// The label for the container's name in its pod.
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";

/// A CRI client, blocking.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
}

impl Cri {
    /// A client of the runtime behind this socket; connects when first used, and again when the runtime was restarted.
    pub fn new(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))?.timeout(Duration::from_secs(60));
        let client = {
            let _entered = runtime.enter();
            RuntimeServiceClient::new(endpoint.connect_lazy())
        };
        Ok(Self { runtime, client })
    }

    /// Whether the runtime answers.
    pub fn is_ready(&self) -> bool {
        let mut client = self.client.clone();
        self.runtime.block_on(async { client.status(StatusRequest { verbose: false }).await }).is_ok()
    }

    /// Containers in any state.
    pub fn containers(&self) -> Result<Vec<Container>> {
        let mut client = self.client.clone();
        let answer =
            self.runtime.block_on(async { client.list_containers(ListContainersRequest { filter: None }).await });
        Ok(answer.context("the runtime does not list its containers")?.into_inner().containers)
    }

    /// Containers that run, as (pod, container, id), sorted.
    pub fn running(&self) -> Result<Vec<(String, String, String)>> {
        let mut found: Vec<_> = self
            .containers()?
            .into_iter()
            .filter(|container| container.state() == ContainerState::ContainerRunning)
            .map(|container| (label(&container, POD_NAME), label(&container, CONTAINER_NAME), container.id))
            .collect();
        found.sort();
        Ok(found)
    }

    /// Sandboxes in any state.
    pub fn sandboxes(&self) -> Result<Vec<PodSandbox>> {
        let mut client = self.client.clone();
        let answer =
            self.runtime.block_on(async { client.list_pod_sandbox(ListPodSandboxRequest { filter: None }).await });
        Ok(answer.context("the runtime does not list its sandboxes")?.into_inner().items)
    }

    /// Sandboxes that are ready.
    pub fn ready_sandboxes(&self) -> Result<Vec<PodSandbox>> {
        let ready = |sandbox: &PodSandbox| sandbox.state() == PodSandboxState::SandboxReady;
        Ok(self.sandboxes()?.into_iter().filter(ready).collect())
    }

    /// All the runtime knows of a container.
    pub fn status(&self, id: &str) -> Result<ContainerStatus> {
        let mut client = self.client.clone();
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let answer = self.runtime.block_on(async { client.container_status(request).await })?;
        answer.into_inner().status.with_context(|| format!("the runtime has no status for {id}"))
    }

    /// The process id of a container's first process.
    pub fn pid(&self, id: &str) -> Result<i32> {
        let mut client = self.client.clone();
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
        let answer = self.runtime.block_on(async { client.container_status(request).await })?.into_inner();
        let info: Value = serde_json::from_str(answer.info.get("info").map_or("{}", String::as_str))?;
        let pid = info["pid"].as_i64().with_context(|| format!("the runtime tells no process of {id}"))?;
        Ok(pid.try_into()?)
    }

    /// The id of a pod's running container.
    pub fn container(&self, pod: &str, container: &str) -> Result<String> {
        let running = self.running()?;
        let found = running.iter().find(|(of, name, _)| of == pod && name == container);
        found.map(|(.., id)| id.clone()).with_context(|| format!("no container {container} of pod {pod} runs"))
    }

    /// Runs a command inside a pod's container.
    pub fn exec(&self, pod: &str, container: &str, command: &[&str]) -> Result<Output> {
        let container_id = self.container(pod, container)?;
        let mut client = self.client.clone();
        let cmd = command.iter().map(|word| (*word).to_owned()).collect();
        let request = ExecSyncRequest { container_id, cmd, timeout: 30 };
        let answer = self.runtime.block_on(async { client.exec_sync(request).await })?.into_inner();
        Ok(Output {
            success: answer.exit_code == 0,
            code: answer.exit_code,
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
        })
    }

    /// Runs so many bare pods that sleep, with a network and one container each, as no kubelet is there to do it. So many sandboxes are
    /// made at a time, and containers beside them.
    pub fn run_bare(&self, pods: usize, at_once: usize) -> Result<()> {
        let turns = Arc::new(Semaphore::new(at_once));
        self.runtime.block_on(async {
            let mut all = JoinSet::new();
            for number in 0..pods {
                all.spawn_on(run_bare_pod(self.client.clone(), number, turns.clone()), self.runtime.handle());
            }
            all.join_all().await.into_iter().collect()
        })
    }

    /// Stops and removes every sandbox with its containers.
    pub fn remove_all(&self) -> Result<()> {
        for sandbox in self.sandboxes()? {
            let mut client = self.client.clone();
            self.runtime.block_on(async {
                client.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: sandbox.id.clone() }).await?;
                client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: sandbox.id.clone() }).await
            })?;
        }
        Ok(())
    }
}

async fn run_bare_pod(mut client: RuntimeServiceClient<Channel>, number: usize, turns: Arc<Semaphore>) -> Result<()> {
    let turn = turns.acquire().await?;
    let name = format!("bare-{number}");
    let sandbox = PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.clone(),
            uid: name.clone(),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        hostname: name,
        // Where kubelets have them, and where it is cleaned up.
        linux: Some(LinuxPodSandboxConfig { cgroup_parent: "/kubepods".to_owned(), ..Default::default() }),
        ..Default::default()
    };
    let request = RunPodSandboxRequest { config: Some(sandbox.clone()), runtime_handler: String::new() };
    let pod_sandbox_id = client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
    drop(turn);
    let container = ContainerConfig {
        metadata: Some(ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: images::BUSYBOX.to_owned(), ..Default::default() }),
        command: ["sleep", "1000000"].map(str::to_owned).into(),
        ..Default::default()
    };
    let request = CreateContainerRequest { pod_sandbox_id, config: Some(container), sandbox_config: Some(sandbox) };
    let container_id = client.create_container(request).await?.into_inner().container_id;
    client.start_container(StartContainerRequest { container_id }).await?;
    Ok(())
}

fn label(container: &Container, name: &str) -> String {
    container.labels.get(name).cloned().unwrap_or_default()
}
