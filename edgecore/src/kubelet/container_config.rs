//! One container as CRI takes it, and the errors of everything that turns a pod into CRI configs.

use std::borrow::Cow;
use std::collections::HashMap;

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec};
use skerry_proto::cri;

use crate::kubelet::expand::{expand, value_in};
use crate::kubelet::field::{FieldError, Identity};
use crate::kubelet::observed::label;
use crate::kubelet::quantity::QuantityError;
use crate::kubelet::references::NodeFacts;
use crate::kubelet::resources::{self, Machine};
use crate::kubelet::sandbox_config::identity_labels;
use crate::kubelet::security;
use crate::kubelet::spec::container_hash;

/// Where a container leaves its last words unless it says otherwise.
pub const TERMINATION_MESSAGE_PATH: &str = "/dev/termination-log";

const DELETION_GRACE_PERIOD: &str = "io.kubernetes.pod.deletionGracePeriod";

/// Why a pod cannot be turned into what the runtime takes. The texts are what users see in events and waiting messages.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A ConfigMap that must exist does not.
    #[error("configmap {0:?} not found")]
    ConfigMapNotFound(String),
    /// A Secret that must exist does not.
    #[error("secret {0:?} not found")]
    SecretNotFound(String),
    /// The object exists, the key does not.
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    KeyNotFound {
        /// The key.
        key: String,
        /// ConfigMap or Secret.
        kind: &'static str,
        /// Namespace of the object.
        namespace: String,
        /// Name of the object.
        name: String,
    },
    /// The Service by which pods find the API has not arrived.
    #[error(
        "services have not yet been read at least once, cannot construct envvars: the Service kubernetes of the namespace default has \
         not arrived at this node"
    )]
    ServicesUnknown,
    /// A variable from a file in a volume.
    #[error(
        "environment variable {0:?}: fileKeyRef is not supported by this node, use configMapKeyRef or secretKeyRef"
    )]
    FileKeyRef(String),
    /// A value that no process can be given.
    #[error("environment variable {0:?} contains a NUL byte: mount the value as a file instead")]
    NulInVariable(String),
    /// A field or resource cannot be shown.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// A quantity in the pod cannot be read.
    #[error(transparent)]
    Quantity(#[from] QuantityError),
    /// runAsNonRoot, and the pod asks for root.
    #[error("container's runAsUser breaks non-root policy (pod: {pod:?}, container: {container})")]
    RunAsUserIsRoot {
        /// `name_namespace(uid)`.
        pod: String,
        /// Its name.
        container: String,
    },
    /// runAsNonRoot, and the image runs as root.
    #[error("container has runAsNonRoot and image will run as root (pod: {pod:?}, container: {container})")]
    ImageRunsAsRoot {
        /// `name_namespace(uid)`.
        pod: String,
        /// Its name.
        container: String,
    },
    /// runAsNonRoot, and the image's user is a name.
    #[error(
        "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root (pod: {pod:?}, container: \
         {container})"
    )]
    ImageUserNotNumeric {
        /// The user of the image.
        user: String,
        /// `name_namespace(uid)`.
        pod: String,
        /// Its name.
        container: String,
    },
    /// runAsNonRoot, and the image's user is out of range.
    #[error(
        "container has runAsNonRoot and image has an invalid user id ({uid}): must be between 1 and 2147483647 (pod: {pod:?}, container: \
         {container})"
    )]
    ImageUserInvalid {
        /// The user of the image.
        uid: i64,
        /// `name_namespace(uid)`.
        pod: String,
        /// Its name.
        container: String,
    },
    /// A Localhost seccomp profile without a name.
    #[error("localhostProfile must be set if seccompProfile type is Localhost.")]
    SeccompProfileMissing,
    /// A Localhost seccomp profile that is not below the directory of profiles.
    #[error("seccomp localhostProfile {0:?} must be a relative path without ..")]
    SeccompProfileOutside(String),
    /// No such type.
    #[error("unknown seccomp profile type: {0:?}")]
    SeccompTypeUnknown(String),
    /// A Localhost AppArmor profile without a name.
    #[error("missing localhost apparmor profile name")]
    AppArmorProfileMissing,
    /// No such type.
    #[error("unknown apparmor profile type: {0:?}")]
    AppArmorTypeUnknown(String),
    /// No such policy.
    #[error("unsupported supplementalGroupsPolicy: {0}")]
    GroupsPolicyUnknown(String),
    /// The container an ephemeral one wants to see is not there.
    #[error("unable to find target container {0:?}: it must be running")]
    TargetNotFound(String),
    /// `hostUsers: false`.
    #[error("can't set `spec.hostUsers: false`, {0} does not support user namespaces")]
    UserNamespace(String),
    /// The store has no such RuntimeClass.
    #[error("RuntimeClass {0:?} not found")]
    RuntimeClassNotFound(String),
    /// The runtime has no such handler.
    #[error(
        "RuntimeClass {class:?} needs the runtime handler {handler:?}, which the runtime of this node does not have: configure it there"
    )]
    RuntimeHandlerUnknown {
        /// Name of the RuntimeClass.
        class: String,
        /// Name of the handler.
        handler: String,
    },
    /// Nothing is left of the name.
    #[error("hostname for pod {pod:?} was invalid: {name:?}")]
    Hostname {
        /// Name of the pod.
        pod: String,
        /// The wanted name.
        name: String,
    },
    /// The kernel keeps 64 bytes.
    #[error(
        "failed to construct FQDN from pod hostname and cluster domain, FQDN {fqdn} is too long (64 characters is the max, {length} \
         characters requested)"
    )]
    FqdnTooLong {
        /// The whole name.
        fqdn: String,
        /// Its length.
        length: usize,
    },
}

impl ConfigError {
    /// The waiting reason of the container, or the reason of the event if no sandbox can be made.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UserNamespace(_)
            | Self::RuntimeClassNotFound(_)
            | Self::RuntimeHandlerUnknown { .. }
            | Self::Hostname { .. }
            | Self::FqdnTooLong { .. } => "FailedCreatePodSandBox",
            _ => "CreateContainerConfigError",
        }
    }
}

/// A container of any kind in a pod's spec.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ContainerSpec<'p> {
    /// One of `initContainers`.
    Init(&'p Container),
    /// One of `containers`.
    Regular(&'p Container),
    /// One of `ephemeralContainers`.
    Ephemeral(&'p EphemeralContainer),
}

impl<'p> ContainerSpec<'p> {
    /// Every container of a pod: init containers, regular ones, ephemeral ones.
    pub fn all(spec: &'p PodSpec) -> impl Iterator<Item = Self> {
        let init = spec.init_containers.iter().flatten().map(Self::Init);
        let ephemeral = spec.ephemeral_containers.iter().flatten().map(Self::Ephemeral);
        init.chain(spec.containers.iter().map(Self::Regular)).chain(ephemeral)
    }

    /// Its name.
    pub fn name(self) -> &'p str {
        match self {
            Self::Init(container) | Self::Regular(container) => &container.name,
            Self::Ephemeral(container) => &container.name,
        }
    }

    /// Its image as written.
    pub fn image(self) -> &'p str {
        match self {
            Self::Init(container) | Self::Regular(container) => container.image.as_deref(),
            Self::Ephemeral(container) => container.image.as_deref(),
        }
        .unwrap_or_default()
    }

    /// The container whose processes it wants to see.
    pub fn target(self) -> Option<&'p str> {
        match self {
            Self::Init(_) | Self::Regular(_) => None,
            Self::Ephemeral(container) => container.target_container_name.as_deref().filter(|name| !name.is_empty()),
        }
    }

    /// The path of events about it: `spec.containers{name}` and the like.
    pub fn field_path(self) -> String {
        let list = match self {
            Self::Init(_) => "initContainers",
            Self::Regular(_) => "containers",
            Self::Ephemeral(_) => "ephemeralContainers",
        };
        format!("spec.{list}{{{}}}", self.name())
    }

    /// It as a container; an ephemeral one is converted.
    pub fn container(self) -> Cow<'p, Container> {
        match self {
            Self::Init(container) | Self::Regular(container) => Cow::Borrowed(container),
            Self::Ephemeral(container) => Cow::Owned(as_container(container)),
        }
    }
}

/// What a container is made from.
#[derive(Clone, Debug)]
pub struct ContainerInput<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// The container in its spec.
    pub container: ContainerSpec<'a>,
    /// How often it was restarted before.
    pub restart_count: i32,
    /// What the runtime says of its image.
    pub image: &'a cri::Image,
    /// The id or reference the runtime resolved the image to.
    pub image_ref: String,
    /// Its environment, from [`crate::kubelet::env::environment`].
    pub envs: Vec<(String, String)>,
    /// Its mounts, those of the kubelet (hosts file, termination message) among them.
    pub mounts: Vec<cri::Mount>,
    /// CRI id of the container that [`ContainerSpec::target`] names.
    pub target_container_id: Option<String>,
    /// The node.
    pub node: &'a NodeFacts,
    /// The box.
    pub machine: &'a Machine,
}

/// The config to make a container with.
pub fn container_config(input: ContainerInput<'_>) -> Result<cri::ContainerConfig, ConfigError> {
    let ContainerInput { pod, restart_count, image, node, machine, .. } = input;
    let container = input.container.container();
    let container = container.as_ref();
    let mut security = security::container_security(pod, container, image, node, machine)?;
    if let Some(target) = input.container.target() {
        let id = input.target_container_id.ok_or_else(|| ConfigError::TargetNotFound(target.to_owned()))?;
        // A pod that shares one process namespace sees the target anyway.
        if let Some(namespaces) = &mut security.namespace_options
            && namespaces.pid() == cri::NamespaceMode::Container
        {
            namespaces.set_pid(cri::NamespaceMode::Target);
            namespaces.target_id = id;
        }
    }
    let expanded = |words: &Option<Vec<String>>| -> Vec<String> {
        words.iter().flatten().map(|word| expand(word, |name| value_in(&input.envs, name))).collect()
    };
    let attempt = u32::try_from(restart_count).unwrap_or(0);
    let mut labels = HashMap::from(identity_labels(Identity::of(pod)));
    labels.insert(label::CONTAINER_NAME.to_owned(), container.name.clone());
    Ok(cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: container.name.clone(), attempt }),
        image: Some(cri::ImageSpec {
            image: input.image_ref,
            user_specified_image: container.image.clone().unwrap_or_default(),
            ..Default::default()
        }),
        command: expanded(&container.command),
        args: expanded(&container.args),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        labels,
        annotations: annotations(pod, container, attempt),
        log_path: log_path(&container.name, attempt),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        linux: Some(cri::LinuxContainerConfig {
            resources: Some(resources::container_resources(pod, container, node, machine)?),
            security_context: Some(security),
        }),
        envs: input.envs.into_iter().map(|(key, value)| cri::KeyValue { key, value: value.into_bytes() }).collect(),
        mounts: input.mounts,
        stop_signal: stop_signal(container).into(),
        ..Default::default()
    })
}

/// What ends it in place of the image's signal (KEP-4960), as the apiserver has checked it. The runtime spells those of real time out:
/// `SIGRTMIN+3` is `SIGRTMINPLUS3`.
fn stop_signal(container: &Container) -> cri::Signal {
    let named = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.stop_signal.as_deref());
    let spelt = named.map(|name| name.replace('+', "PLUS").replace('-', "MINUS"));
    spelt.and_then(|name| cri::Signal::from_str_name(&name)).unwrap_or_default()
}

/// The log file of an instance, below the pod's log directory.
pub fn log_path(name: &str, attempt: u32) -> String {
    format!("{name}/{attempt}.log")
}

/// An ephemeral container as an ordinary one. It has no resources, probes or hooks, and never restarts.
pub fn as_container(ephemeral: &EphemeralContainer) -> Container {
    Container {
        args: ephemeral.args.clone(),
        command: ephemeral.command.clone(),
        env: ephemeral.env.clone(),
        env_from: ephemeral.env_from.clone(),
        image: ephemeral.image.clone(),
        image_pull_policy: ephemeral.image_pull_policy.clone(),
        name: ephemeral.name.clone(),
        security_context: ephemeral.security_context.clone(),
        stdin: ephemeral.stdin,
        stdin_once: ephemeral.stdin_once,
        termination_message_path: ephemeral.termination_message_path.clone(),
        termination_message_policy: ephemeral.termination_message_policy.clone(),
        tty: ephemeral.tty,
        volume_devices: ephemeral.volume_devices.clone(),
        volume_mounts: ephemeral.volume_mounts.clone(),
        working_dir: ephemeral.working_dir.clone(),
        ..Default::default()
    }
}

fn annotations(pod: &Pod, container: &Container, attempt: u32) -> HashMap<String, String> {
    let path = container.termination_message_path.as_deref().unwrap_or(TERMINATION_MESSAGE_PATH);
    let policy = container.termination_message_policy.as_deref().unwrap_or("File");
    let hash = container_hash(&container.name, container.image.as_deref().unwrap_or_default());
    let mut annotations = HashMap::new();
    let mut set = |key: &str, value: String| annotations.insert(key.to_owned(), value);
    set(label::CONTAINER_HASH, format!("{hash:x}"));
    set(label::RESTART_COUNT, attempt.to_string());
    set(label::TERMINATION_MESSAGE_PATH, path.to_owned());
    set(label::TERMINATION_MESSAGE_POLICY, policy.to_owned());
    if let Some(seconds) = pod.metadata.deletion_grace_period_seconds {
        set(DELETION_GRACE_PERIOD, seconds.to_string());
    }
    if let Some(seconds) = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds) {
        set(label::GRACE_PERIOD, seconds.to_string());
    }
    // Serialising these types cannot fail: their keys are strings.
    let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
    if let Some(json) = hook.and_then(|hook| serde_json::to_string(hook).ok()) {
        set(label::PRE_STOP, json);
    }
    let ports = container.ports.as_ref().filter(|ports| !ports.is_empty());
    if let Some(json) = ports.and_then(|ports| serde_json::to_string(ports).ok()) {
        set(label::PORTS, json);
    }
    annotations
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
