//! Scratch space of a pod: a directory, or memory.
//!
//! Set up once per life of the pod, which a marker file remembers: what containers did to modes and owners later is theirs. Content in
//! memory is lost with the mount, so after a reboot the marker alone is not believed.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use k8s_openapi::api::core::v1::EmptyDirVolumeSource;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::{Reason, VolumeContext, fs_group};
use crate::kubelet::dirs::{At, PathError, PodDirs, make_dir, make_dirs};
use crate::kubelet::quantity::Amount;

/// The plugin's name in paths.
pub(super) const PLUGIN: &str = "kubernetes.io/empty-dir";

pub(super) fn set_up(
    dirs: &PodDirs,
    name: &str,
    source: &EmptyDirVolumeSource,
    group: Option<u32>,
    context: &VolumeContext<'_>,
) -> Result<(), Reason> {
    let in_memory = match source.medium.as_deref().unwrap_or_default() {
        "" => false,
        "Memory" => true,
        other => return Err(Reason::Medium(other.to_owned())),
    };
    let limit = match &source.size_limit {
        Some(limit) => {
            let bytes = Amount::of(limit).ok().and_then(|amount| u64::try_from(amount.units()).ok());
            Some(bytes.ok_or_else(|| Reason::Quantity(limit.0.clone()))?)
        }
        None => None,
    };
    let dir = dirs.volume(PLUGIN, name);
    let marker = dirs.ready_marker(PLUGIN, name);
    if marker.exists() && if in_memory { is_mounted(&dir) } else { dir.is_dir() } {
        return Ok(());
    }
    make_open_dir(&dir)?;
    if in_memory {
        ensure_tmpfs(&dir, tmpfs_size(limit, context))?;
    }
    if let Some(group) = group {
        fs_group::apply(&dir, group, false).at("set the group of", &dir)?;
    }
    if let Some(parent) = marker.parent() {
        make_dirs(parent, 0o750)?;
    }
    fs::write(&marker, "").at("make", &marker)?;
    Ok(())
}

/// The smallest of what the node has, what the pod may use and what the volume says.
pub(super) fn tmpfs_size(limit: Option<u64>, context: &VolumeContext<'_>) -> Option<u64> {
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    let candidates =
        [positive(context.node.memory), context.pod_memory_limit.and_then(positive), limit.filter(|limit| *limit > 0)];
    candidates.into_iter().flatten().min()
}

/// Makes a directory that everyone may use, as the root of a volume is. Modes inside a mounted one are left alone.
pub(super) fn make_open_dir(dir: &Path) -> Result<(), PathError> {
    if let Some(parent) = dir.parent() {
        make_dirs(parent, 0o750)?;
    }
    make_dir(dir, 0o777)?;
    let now = fs::symlink_metadata(dir).at("look at", dir)?.mode();
    if is_mounted(dir) || now & 0o777 == 0o777 {
        return Ok(());
    }
    fs::set_permissions(dir, Permissions::from_mode(0o777)).at("set the mode of", dir)
}

/// Mounts memory on a directory, unless that is done.
pub(super) fn ensure_tmpfs(dir: &Path, size: Option<u64>) -> Result<(), PathError> {
    if is_mounted(dir) {
        return Ok(());
    }
    let options = size.map_or_else(|| "mode=0777".to_owned(), |size| format!("mode=0777,size={size}"));
    let try_mount = |options: &str| mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), Some(options));
    // Kernels before 6.4 do not know noswap.
    match try_mount(&format!("{options},noswap")) {
        Err(Errno::EINVAL) => try_mount(&options),
        other => other,
    }
    .at("mount memory (tmpfs) on", dir)
}

/// Whether another file system is mounted on a directory.
pub(super) fn is_mounted(dir: &Path) -> bool {
    let device = |path: &Path| fs::symlink_metadata(path).ok().map(|data| data.dev());
    match (device(dir), dir.parent().and_then(device)) {
        (Some(own), Some(parent)) => own != parent,
        _ => false,
    }
}
