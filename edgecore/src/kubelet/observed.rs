//! What the runtime holds of one pod, read from CRI. The runtime is the only truth about containers: nothing of this is stored.

use std::net::IpAddr;

use jiff::Timestamp;

/// Labels and annotations by which a restarted edgecore (or another kubelet) knows its own objects.
pub mod label {
    /// Label: pod name.
    pub const POD_NAME: &str = "io.kubernetes.pod.name";
    /// Label: pod namespace.
    pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    /// Label: pod UID.
    pub const POD_UID: &str = "io.kubernetes.pod.uid";
    /// Label: container name.
    pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
    /// Annotation: hash of container name and image, hexadecimal.
    pub const CONTAINER_HASH: &str = "io.kubernetes.container.hash";
    /// Annotation: how often the container was restarted before this instance.
    pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
    /// Annotation: path of the termination message inside the container.
    pub const TERMINATION_MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
    /// Annotation: File or FallbackToLogsOnError.
    pub const TERMINATION_MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
    /// Annotation: the pod's grace period in seconds, for a pod whose object is gone.
    pub const GRACE_PERIOD: &str = "io.kubernetes.pod.terminationGracePeriod";
    /// Annotation: the preStop handler as JSON, for a pod whose object is gone.
    pub const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
    /// Annotation: the container's ports as JSON, by whose names that handler may go.
    pub const PORTS: &str = "io.kubernetes.container.ports";
}

/// Everything the runtime holds of one pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Newest attempt first.
    pub sandboxes: Vec<Sandbox>,
    /// Newest first (by creation time).
    pub containers: Vec<Instance>,
}

/// A pod sandbox.
#[derive(Clone, Debug, PartialEq)]
pub struct Sandbox {
    /// CRI id.
    pub id: String,
    /// The pod's name and namespace.
    pub pod: (String, String),
    /// Attempt number in its metadata.
    pub attempt: u32,
    /// SANDBOX_READY.
    pub ready: bool,
    /// When it was made.
    pub created_at: Timestamp,
    /// IPs, primary first; empty for host network.
    pub ips: Vec<IpAddr>,
    /// Its network namespace is the node's.
    pub host_network: bool,
}

/// One instance (attempt) of a container.
#[derive(Clone, Debug, PartialEq)]
pub struct Instance {
    /// CRI id, without `containerd://`.
    pub id: String,
    /// The sandbox it is in.
    pub sandbox: String,
    /// Container name in the pod.
    pub name: String,
    /// Restart count, from its annotation.
    pub restart_count: i32,
    /// What it does now.
    pub state: State,
    /// [`label::CONTAINER_HASH`], parsed; 0 if missing.
    pub hash: u64,
    /// `status.image.image`.
    pub image: String,
    /// `status.image_ref`.
    pub image_id: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was started; `None` if never.
    pub started_at: Option<Timestamp>,
    /// When it ended; `None` if it did not.
    pub finished_at: Option<Timestamp>,
    /// Exit code, when it ended.
    pub exit_code: i32,
    /// Completed, Error, OOMKilled, …
    pub reason: String,
    /// The runtime's message, with the termination message appended (already cut to size).
    pub message: String,
    /// [`label::GRACE_PERIOD`], when present.
    pub grace_period: Option<i64>,
    /// Where its log is on this box, absolute.
    pub log_path: String,
}

/// What a container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Made, not started.
    Created,
    /// Runs.
    Running,
    /// Ended.
    Exited,
    /// The runtime does not know.
    Unknown,
}

impl Observed {
    /// The newest instance of a container.
    pub fn newest(&self, name: &str) -> Option<&Instance> {
        self.containers.iter().find(|instance| instance.name == name)
    }

    /// Something of the pod may still run.
    pub fn is_alive(&self) -> bool {
        self.sandboxes.iter().any(|sandbox| sandbox.ready)
            || self.containers.iter().any(|instance| matches!(instance.state, State::Running | State::Unknown))
    }
}
