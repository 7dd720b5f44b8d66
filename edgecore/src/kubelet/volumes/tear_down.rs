//! Takes a pod's volumes and directory away.
//!
//! First every mount below the pod goes, the newest first, then the files. Nothing is deleted while the mount table still shows a
//! mount there, and the deleting itself enters no other file system.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use thiserror::Error;

use super::{Volumes, mountinfo, tree};
use crate::kubelet::dirs::{At, PathError, PodDirs, pod_uids};

/// How often the mount table is looked at again: mounts can lie on top of each other, and more may have come.
const ROUNDS: usize = 4;

/// Why a pod's directory is still there. Trying again later is harmless.
#[derive(Debug, Error)]
pub enum TearDownError {
    /// Something that is mounted is in use.
    #[error("{} is mounted and in use; find who uses it with fuser -m, it is tried again", mount.display())]
    Busy {
        /// The mount.
        mount: PathBuf,
    },
    /// The file system refused.
    #[error(transparent)]
    Io(#[from] PathError),
}

impl Volumes {
    /// Takes all volumes of a pod away, with their content; the rest of its directory stays. Call when no container of it runs.
    pub fn tear_down_volumes(&self, uid: &str) -> Result<(), TearDownError> {
        let dirs = PodDirs::new(&self.root, uid)?;
        let Some(pod) = real_dir(&dirs.pod())? else { return Ok(()) };
        unmount_all(&pod)?;
        // The markers of complete volumes go before the volumes.
        for name in ["plugins", "volume-subpaths", "volumes"] {
            remove(&pod.join(name))?;
        }
        Ok(())
    }

    /// Takes a pod's whole directory away. Call when nothing of it runs and nobody asks for its termination messages.
    pub fn tear_down(&self, uid: &str) -> Result<(), TearDownError> {
        self.tear_down_volumes(uid)?;
        remove(&PodDirs::new(&self.root, uid)?.pod())
    }

    /// UIDs of the pods that have a directory here.
    pub fn pod_uids_on_disk(&self) -> Result<Vec<String>, PathError> {
        pod_uids(&self.root)
    }
}

/// A directory's path as the mount table spells it; `None` when it is gone.
fn real_dir(path: &Path) -> Result<Option<PathBuf>, PathError> {
    match fs::canonicalize(path) {
        Ok(path) => Ok(Some(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at("find", path),
    }
}

fn unmount_all(pod: &Path) -> Result<(), TearDownError> {
    for _ in 0..ROUNDS {
        let mounts = mountinfo::at_or_below(pod).at("look for mounts below", pod)?;
        if mounts.is_empty() {
            return Ok(());
        }
        for entry in mounts.iter().rev() {
            unmount(&entry.mount_point, is_ours(pod, &entry.mount_point))?;
        }
    }
    match mountinfo::at_or_below(pod).at("look for mounts below", pod)?.pop() {
        None => Ok(()),
        Some(entry) => Err(TearDownError::Busy { mount: entry.mount_point }),
    }
}

/// Mounts that were made here: sub-paths, and memory right on a volume's directory. What else is there came from a container.
fn is_ours(pod: &Path, mount: &Path) -> bool {
    let Ok(inside) = mount.strip_prefix(pod) else { return false };
    let depth = inside.components().count();
    (inside.starts_with("volume-subpaths") && depth == 4) || (inside.starts_with("volumes") && depth == 3)
}

/// A mount of ours that something still holds is detached: its containers are gone, and a pod must not stay for ever because of a
/// monitoring agent that looks into it.
fn unmount(mount: &Path, may_detach: bool) -> Result<(), TearDownError> {
    let result = match umount2(mount, MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EBUSY) if may_detach => umount2(mount, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH),
        other => other,
    };
    match result {
        // Not mounted any more, or never seen by this namespace.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(Errno::EBUSY) => Err(TearDownError::Busy { mount: mount.to_owned() }),
        Err(error) => Err(error).at("unmount", mount)?,
    }
}

fn remove(path: &Path) -> Result<(), TearDownError> {
    if let Some(real) = real_dir(path)?
        && let Some(entry) = mountinfo::at_or_below(&real).at("look for mounts below", path)?.pop()
    {
        return Err(TearDownError::Busy { mount: entry.mount_point });
    }
    Ok(tree::remove(path).at("remove", path)?)
}
