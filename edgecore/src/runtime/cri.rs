//! Typed CRI calls with their deadlines, and [`Cri::observe`], which reads what the runtime holds of pods in as few calls as it takes.
//!
//! A detail is asked for once it can no longer change, and kept: a running container's start, an ended one's end, the addresses
//! of a ready sandbox. So looking at a node where nothing happens is two calls, whatever the number of pods. The cache is bounded
//! by what the last look at everything saw; losing it costs calls, never truth.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use skerry_proto::cri::image_service_client::ImageServiceClient;
use skerry_proto::cri::runtime_service_client::RuntimeServiceClient;
use skerry_proto::cri::{self};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::connect::MAX_MESSAGE;
use crate::kubelet::observed::label;

mod observe;
mod streaming;

use observe::Cache;
pub use streaming::{LogFile, Stdio};

/// What a call may take unless it says otherwise.
const DEADLINE: Duration = Duration::from_secs(120);
/// A sandbox needs its image and its network.
const SANDBOX_DEADLINE: Duration = Duration::from_secs(240);
/// Why a call did not do it.
#[derive(Debug, thiserror::Error)]
#[expect(clippy::error_impl_error, reason = "it is named through its module")]
pub enum Error {
    /// Nobody listens, or the connection broke.
    #[error("the container runtime does not answer ({call}): {}", .source.message())]
    Unreachable {
        /// The CRI call.
        call: &'static str,
        /// What the transport said.
        #[source]
        source: Status,
    },
    /// It took too long.
    #[error("the container runtime did not answer {call} within {} s", .within.as_secs())]
    Deadline {
        /// The CRI call.
        call: &'static str,
        /// How long it was given.
        within: Duration,
    },
    /// The runtime says no.
    #[error("{}", .source.message())]
    Refused {
        /// The CRI call.
        call: &'static str,
        /// What the runtime said.
        #[source]
        source: Status,
    },
    /// The runtime's answer lacks what it must have.
    #[error("the container runtime answered {call} without {missing}")]
    Incomplete {
        /// The CRI call.
        call: &'static str,
        /// What is not there.
        missing: &'static str,
    },
}

/// What to do after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// When the runtime is back.
    Backoff,
    /// The same call will fail the same way.
    Never,
}

impl Error {
    /// Whether the same call may work later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Refused { source, .. }
                if matches!(source.code(), Code::InvalidArgument | Code::Unimplemented | Code::NotFound) =>
            {
                Retry::Never
            }
            _ => Retry::Backoff,
        }
    }

    /// What the call was about does not exist.
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(Code::NotFound)
    }

    /// The runtime itself is away or hangs, so this says nothing about what the call was about.
    pub fn is_runtime_down(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Deadline { .. })
    }

    fn is_unimplemented(&self) -> bool {
        self.code() == Some(Code::Unimplemented)
    }

    fn code(&self) -> Option<Code> {
        match self {
            Self::Unreachable { source, .. } | Self::Refused { source, .. } => Some(source.code()),
            Self::Deadline { .. } | Self::Incomplete { .. } => None,
        }
    }
}

/// Who places containers in cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupDriver {
    /// Paths below the cgroup root.
    Cgroupfs,
    /// Slices.
    Systemd,
}

/// What [`Cri::health`] says. `Err` holds the runtime's words.
#[derive(Clone, Debug, Default)]
pub struct Health {
    /// RuntimeReady.
    pub runtime: Option<String>,
    /// NetworkReady.
    pub network: Option<String>,
    /// Runtime handlers, as reported; empty with runtimes that do not.
    pub handlers: Vec<cri::RuntimeHandler>,
    /// Strict supplemental groups; `None` with runtimes that do not say.
    pub supplemental_groups_policy: Option<bool>,
}

/// What the runtime tells of its own configuration. containerd does; another runtime leaves it empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// Of the default runtime handler.
    pub cgroup_driver: Option<CgroupDriver>,
    /// The image of the pause container, which no list of containers shows.
    pub sandbox_image: Option<String>,
    /// Where it reads CNI configuration.
    pub cni_conf_dir: Option<String>,
    /// Where it looks for CNI plugins.
    pub cni_bin_dirs: Vec<String>,
}

/// What an exec left behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exec {
    /// Standard output, then standard error.
    pub output: Vec<u8>,
    /// Its exit code.
    pub exit_code: i32,
}

/// A handle of the runtime; a clone shares the connection and the cache.
#[derive(Clone, Debug)]
pub struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    image: ImageServiceClient<Channel>,
    cache: Arc<Mutex<Cache>>,
}

impl Cri {
    /// Over a channel of [`super::connect::channel`].
    pub fn new(channel: Channel) -> Self {
        Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            image: ImageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE),
            cache: Arc::default(),
        }
    }

    /// Name and version of the runtime.
    pub async fn version(&self) -> Result<cri::VersionResponse, Error> {
        let request = cri::VersionRequest { version: "v1".to_owned() };
        call("Version", DEADLINE, self.runtime.clone().version(request)).await
    }

    /// Whether the runtime and its network are ready, and which handlers it has.
    pub async fn health(&self) -> Result<Health, Error> {
        let answer =
            call("Status", DEADLINE, self.runtime.clone().status(cri::StatusRequest { verbose: false })).await?;
        let conditions = answer.status.map(|status| status.conditions).unwrap_or_default();
        let words = |name: &str| match conditions.iter().find(|condition| condition.r#type == name) {
            Some(condition) if condition.status => None,
            Some(condition) => Some(match (condition.reason.as_str(), condition.message.as_str()) {
                ("", "") => format!("{name} is false"),
                (reason, "") => reason.to_owned(),
                ("", message) => message.to_owned(),
                (reason, message) => format!("{name}=false reason:{reason} message:{message}"),
            }),
            None => Some(format!("the container runtime does not report {name}")),
        };
        Ok(Health {
            runtime: words("RuntimeReady"),
            network: words("NetworkReady"),
            handlers: answer.runtime_handlers,
            supplemental_groups_policy: answer.features.map(|features| features.supplemental_groups_policy),
        })
    }

    /// The cgroup driver by `RuntimeConfig`; `None` with runtimes that lack the call.
    pub async fn runtime_config(&self) -> Result<Option<CgroupDriver>, Error> {
        match call("RuntimeConfig", DEADLINE, self.runtime.clone().runtime_config(cri::RuntimeConfigRequest {})).await {
            Ok(answer) => Ok(answer.linux.map(|linux| match linux.cgroup_driver() {
                cri::CgroupDriver::Systemd => CgroupDriver::Systemd,
                cri::CgroupDriver::Cgroupfs => CgroupDriver::Cgroupfs,
            })),
            Err(error) if error.is_unimplemented() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What the runtime tells of its configuration, and the cgroup driver by whichever way it is told.
    pub async fn setup(&self) -> Result<Setup, Error> {
        let answer =
            call("Status", DEADLINE, self.runtime.clone().status(cri::StatusRequest { verbose: true })).await?;
        let mut setup = answer.info.get("config").map(|config| parse_setup(config)).unwrap_or_default();
        if let Some(driver) = self.runtime_config().await? {
            setup.cgroup_driver = Some(driver);
        }
        Ok(setup)
    }

    /// Makes and starts a sandbox; returns its id.
    pub async fn run_sandbox(&self, config: cri::PodSandboxConfig, handler: &str) -> Result<String, Error> {
        let uid = config.labels.get(label::POD_UID).cloned();
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.to_owned() };
        let id = call("RunPodSandbox", SANDBOX_DEADLINE, self.runtime.clone().run_pod_sandbox(request))
            .await?
            .pod_sandbox_id;
        self.own(&id, uid);
        Ok(id)
    }

    /// Stops a sandbox and what is in it. One that is gone counts as stopped.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), Error> {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        gone(call("StopPodSandbox", DEADLINE, self.runtime.clone().stop_pod_sandbox(request)).await.map(drop))
    }

    /// Removes a sandbox and what is in it. One that is gone counts as removed.
    pub async fn remove_sandbox(&self, id: &str) -> Result<(), Error> {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        gone(call("RemovePodSandbox", DEADLINE, self.runtime.clone().remove_pod_sandbox(request)).await.map(drop))
    }

    /// Makes a container in a sandbox (whose config is passed again); returns its id.
    pub async fn create_container(
        &self,
        sandbox: &str,
        config: cri::ContainerConfig,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Result<String, Error> {
        let uid = config.labels.get(label::POD_UID).cloned();
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let id = call("CreateContainer", DEADLINE, self.runtime.clone().create_container(request)).await?.container_id;
        self.own(&id, uid);
        Ok(id)
    }

    /// Starts a container that was made.
    pub async fn start_container(&self, id: &str) -> Result<(), Error> {
        let request = cri::StartContainerRequest { container_id: id.to_owned() };
        call("StartContainer", DEADLINE, self.runtime.clone().start_container(request)).await.map(drop)
    }

    /// Stops a container: its stop signal, and SIGKILL after `grace`. One that is gone counts as stopped.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), Error> {
        let request = cri::StopContainerRequest { container_id: id.to_owned(), timeout: whole_seconds(grace) };
        gone(call("StopContainer", DEADLINE + grace, self.runtime.clone().stop_container(request)).await.map(drop))
    }

    /// Removes a container. One that is gone counts as removed.
    pub async fn remove_container(&self, id: &str) -> Result<(), Error> {
        let request = cri::RemoveContainerRequest { container_id: id.to_owned() };
        gone(call("RemoveContainer", DEADLINE, self.runtime.clone().remove_container(request)).await.map(drop))
    }

    /// Tells the runtime that a container's log was moved away.
    pub async fn reopen_log(&self, id: &str) -> Result<(), Error> {
        let request = cri::ReopenContainerLogRequest { container_id: id.to_owned() };
        call("ReopenContainerLog", DEADLINE, self.runtime.clone().reopen_container_log(request)).await.map(drop)
    }

    /// What the runtime holds of a container; `None` when it is gone.
    pub async fn container_status(&self, id: &str) -> Result<Option<cri::ContainerStatus>, Error> {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        match call("ContainerStatus", DEADLINE, self.runtime.clone().container_status(request)).await {
            Err(error) if error.is_not_found() => Ok(None),
            answer => {
                answer?.status.ok_or(Error::Incomplete { call: "ContainerStatus", missing: "a status" }).map(Some)
            }
        }
    }

    /// Runs a command in a container to its end. With `timeout` the runtime kills it then and the answer is
    /// [`Error::Deadline`]; without, it may take for ever.
    pub async fn exec_sync(&self, id: &str, command: &[String], timeout: Option<Duration>) -> Result<Exec, Error> {
        let request = cri::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.to_vec(),
            timeout: timeout.map_or(0, whole_seconds),
        };
        let mut client = self.runtime.clone();
        let answer = match timeout {
            Some(timeout) => match call("ExecSync", DEADLINE + timeout, client.exec_sync(request)).await {
                Err(Error::Refused { source, .. }) if source.code() == Code::DeadlineExceeded => {
                    return Err(Error::Deadline { call: "ExecSync", within: timeout });
                }
                answer => answer?,
            },
            None => {
                Box::pin(client.exec_sync(request)).await.map_err(|status| refused("ExecSync", status))?.into_inner()
            }
        };
        let mut output = answer.stdout;
        output.extend_from_slice(&answer.stderr);
        Ok(Exec { output, exit_code: answer.exit_code })
    }

    /// An image on the box; `None` when it is not there.
    pub async fn image_status(&self, image: cri::ImageSpec) -> Result<Option<cri::Image>, Error> {
        let request = cri::ImageStatusRequest { image: Some(image), verbose: false };
        match call("ImageStatus", DEADLINE, self.image.clone().image_status(request)).await {
            Ok(answer) => Ok(answer.image),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Pulls an image; returns its reference on the box. It takes as long as it takes; dropping the future cancels the pull.
    pub async fn pull_image(
        &self,
        image: cri::ImageSpec,
        auth: Option<cri::AuthConfig>,
        sandbox_config: Option<cri::PodSandboxConfig>,
    ) -> Result<String, Error> {
        let request = cri::PullImageRequest { image: Some(image), auth, sandbox_config };
        let answer = Box::pin(self.image.clone().pull_image(request))
            .await
            .map_err(|status| refused("PullImage", status))?
            .into_inner();
        if answer.image_ref.is_empty() {
            return Err(Error::Incomplete { call: "PullImage", missing: "an image reference" });
        }
        Ok(answer.image_ref)
    }

    /// All images on the box.
    pub async fn list_images(&self) -> Result<Vec<cri::Image>, Error> {
        let request = cri::ListImagesRequest { filter: None };
        Ok(call("ListImages", DEADLINE, self.image.clone().list_images(request)).await?.images)
    }

    /// Removes an image by id. One that is gone counts as removed.
    pub async fn remove_image(&self, id: &str) -> Result<(), Error> {
        let image = Some(cri::ImageSpec { image: id.to_owned(), ..Default::default() });
        let request = cri::RemoveImageRequest { image };
        gone(call("RemoveImage", DEADLINE, self.image.clone().remove_image(request)).await.map(drop))
    }

    /// Where images are and what they take.
    pub async fn image_fs_info(&self) -> Result<cri::ImageFsInfoResponse, Error> {
        call("ImageFsInfo", DEADLINE, self.image.clone().image_fs_info(cri::ImageFsInfoRequest {})).await
    }

    /// All containers, of pods or not: what image collection must spare.
    pub async fn list_containers(&self) -> Result<Vec<cri::Container>, Error> {
        let request = cri::ListContainersRequest { filter: None };
        Ok(call("ListContainers", DEADLINE, self.runtime.clone().list_containers(request)).await?.containers)
    }

    /// What each container's writable layer takes, by container id: the one thing that cgroups do not tell. `within` bounds it, for it
    /// makes the runtime look at every container.
    pub async fn writable_layers(&self, within: Duration) -> Result<HashMap<String, cri::FilesystemUsage>, Error> {
        let mut client = self.runtime.clone();
        let answer = client.list_container_stats(cri::ListContainerStatsRequest {});
        let stats = call("ListContainerStats", within, answer).await?.stats;
        Ok(stats.into_iter().filter_map(|one| Some((one.attributes?.id, one.writable_layer?))).collect())
    }

    /// The runtime's own event stream (CRI `GetContainerEvents`).
    pub(crate) async fn container_events(&self) -> Result<tonic::Streaming<cri::ContainerEventResponse>, Error> {
        let mut client = self.runtime.clone();
        let answer = client.get_container_events(cri::GetEventsRequest {}).await;
        answer.map(Response::into_inner).map_err(|status| refused("GetContainerEvents", status))
    }
}

/// Boxed, for the generated futures are tens of KiB and would make those of all that call, down to every pod's task.
fn call<'a, T: 'a>(
    name: &'static str,
    within: Duration,
    future: impl Future<Output = Result<Response<T>, Status>> + Send + 'a,
) -> BoxFuture<'a, Result<T, Error>> {
    Box::pin(async move {
        match tokio::time::timeout(within, future).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(refused(name, status)),
            Err(_) => Err(Error::Deadline { call: name, within }),
        }
    })
}

fn refused(call: &'static str, source: Status) -> Error {
    // What the transport made up has a source; what the runtime sent has not, be it "unavailable" about a registry.
    if std::error::Error::source(&source).is_some() {
        Error::Unreachable { call, source }
    } else {
        Error::Refused { call, source }
    }
}

fn gone(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        result => result,
    }
}

/// Whole seconds, never less than asked for.
fn whole_seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs() + u64::from(duration.subsec_nanos() > 0)).unwrap_or(i64::MAX)
}

/// containerd's own account of its CRI configuration; 1.x and 2.x differ in a few names.
fn parse_setup(config: &str) -> Setup {
    let Ok(config) = serde_json::from_str::<serde_json::Value>(config) else { return Setup::default() };
    let text = |pointer: &str| config.pointer(pointer).and_then(|value| value.as_str()).filter(|text| !text.is_empty());
    let default = text("/containerd/defaultRuntimeName").unwrap_or("runc");
    let systemd = config
        .pointer("/containerd/runtimes")
        .and_then(|runtimes| runtimes.get(default)?.get("options")?.get("SystemdCgroup")?.as_bool());
    let has_runtimes = config.pointer("/containerd/runtimes").is_some();
    let bin_dirs = config.pointer("/cni/binDirs").and_then(|dirs| dirs.as_array());
    let bin_dirs = bin_dirs.into_iter().flatten().filter_map(|dir| dir.as_str());
    Setup {
        // Left out means false: the options are written as they were given.
        cgroup_driver: has_runtimes.then_some(match systemd {
            Some(true) => CgroupDriver::Systemd,
            Some(false) | None => CgroupDriver::Cgroupfs,
        }),
        sandbox_image: text("/sandboxImage").map(str::to_owned),
        cni_conf_dir: text("/cni/confDir").map(str::to_owned),
        cni_bin_dirs: bin_dirs.chain(text("/cni/binDir")).map(str::to_owned).collect(),
    }
}

#[cfg(test)]
mod tests;
