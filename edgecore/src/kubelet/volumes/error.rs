//! Why volumes cannot be had, in the words people know.

use thiserror::Error;

use super::atomic::WriteError;
use crate::kubelet::dirs::PathError;

/// Why a pod cannot have one of its volumes. The texts are those people know from elsewhere, where there are such.
#[derive(Debug, Error)]
pub enum VolumeError {
    /// Setting up failed, event `FailedMount`.
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {reason}")]
    SetUp {
        /// The volume's name.
        volume: String,
        /// What is wrong.
        #[source]
        reason: Reason,
    },
    /// The pod's own directory cannot be made.
    #[error("cannot prepare the pod's directories: {0}")]
    PodDirs(#[from] PathError),
    /// A mount names a volume that the pod does not have, or that is not set up.
    #[error("cannot find volume \"{volume}\" to mount into container \"{container}\"")]
    NotFound {
        /// The volume's name.
        volume: String,
        /// The container's name.
        container: String,
    },
    /// A part of a volume cannot be had, waiting reason `CreateContainerConfigError`.
    #[error("failed to prepare subPath for volumeMount \"{mount}\" of container \"{container}\": {why}")]
    SubPath {
        /// The mount's name.
        mount: String,
        /// The container's name.
        container: String,
        /// What is wrong.
        why: String,
    },
    /// A directory for a part of a volume cannot be made, waiting reason `CreateContainerConfigError`.
    #[error("failed to create subPath directory for volumeMount \"{mount}\" of container \"{container}\": {why}")]
    SubPathDirectory {
        /// The mount's name.
        mount: String,
        /// The container's name.
        container: String,
        /// What is wrong.
        why: String,
    },
    /// The mount insists on being read-only throughout, which the runtime cannot do.
    #[error(
        "volumeMount \"{mount}\" has recursiveReadOnly \"Enabled\", which the pod's runtime handler does not support"
    )]
    RecursiveReadOnly {
        /// The mount's name.
        mount: String,
    },
    /// A field has a value of no meaning.
    #[error("volumeMount \"{mount}\" has an unknown {field} {value:?}")]
    Value {
        /// The mount's name.
        mount: String,
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
    },
}

/// What is wrong with a volume.
#[derive(Debug, Error)]
pub enum Reason {
    /// The ConfigMap is not in the store.
    #[error("configmap \"{0}\" not found")]
    ConfigMapNotFound(String),
    /// The Secret is not in the store.
    #[error("secret \"{0}\" not found")]
    SecretNotFound(String),
    /// The ConfigMap lacks a key.
    #[error("configmap references non-existent config key: {0}")]
    ConfigMapKey(String),
    /// The Secret lacks a key.
    #[error("references non-existent secret key: {0}")]
    SecretKey(String),
    /// The cloud has not sent the token.
    #[error("service account token for \"{0}\" is not here yet")]
    TokenMissing(String),
    /// A downward API value cannot be had.
    #[error("{0}")]
    Field(String),
    /// The box's path is not what it should be.
    #[error("hostPath type check failed: {path} is not {wanted}")]
    HostPathType {
        /// The path.
        path: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// There is no such type.
    #[error("{0} is an invalid volume type")]
    HostPathKind(String),
    /// The path goes upward.
    #[error("hostPath {0} must not contain \"..\"")]
    HostPathUpward(String),
    /// The path is relative.
    #[error("hostPath {0} must be absolute")]
    HostPathRelative(String),
    /// An emptyDir on something else than disk or memory.
    #[error("emptyDir medium {0:?} is not supported on this node; use \"\" or \"Memory\"")]
    Medium(String),
    /// Not a quantity.
    #[error("sizeLimit {0:?} is not a quantity")]
    Quantity(String),
    /// The type needs a driver.
    #[error("volume type {0} is not supported on this node")]
    Unsupported(&'static str),
    /// The projected source is not supported.
    #[error("projected volume source {0} is not supported on this node")]
    Projection(&'static str),
    /// Its name could leave the pod's directory.
    #[error("{0:?} is not a volume name")]
    Name(String),
    /// A file's path is refused.
    #[error("{0}")]
    FilePath(String),
    /// The file system refused.
    #[error(transparent)]
    Io(#[from] PathError),
    /// More than one thing.
    #[error("[{}]", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    Several(Vec<Self>),
}

impl Reason {
    pub(super) fn all(mut reasons: Vec<Self>) -> Result<(), Self> {
        match reasons.len() {
            0 => Ok(()),
            1 => Err(reasons.remove(0)),
            _ => Err(Self::Several(reasons)),
        }
    }
}

impl From<WriteError> for Reason {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Io(error) => Self::Io(error),
            refused @ WriteError::Path { .. } => Self::FilePath(refused.to_string()),
        }
    }
}
