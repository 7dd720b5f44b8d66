//! Scratch space of a pod: a directory, or memory.
//!
//! Set up once per life of the pod, which a marker file remembers: what containers did to modes and owners later is theirs. Content in
//! memory is lost with the mount, so after a reboot the marker alone is not believed.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use k8s_openapi::api::core::v1::EmptyDirVolumeSource;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::{Reason, VolumeContext, fs_group};
use crate::kubelet::dirs::{At, PathError, PodDirs, make_dir, make_dirs};

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
        Some(limit) => Some(bytes(limit).ok_or_else(|| Reason::Quantity(limit.0.clone()))?),
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

/// A quantity in whole bytes, rounded up.
fn bytes(quantity: &Quantity) -> Option<u64> {
    let text = quantity.0.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + fraction.len() == 0 || whole.len() > 19 || fraction.len() > 15 || fraction.contains('.') {
        return None;
    }
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let mut divisor = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let factor = match suffix {
        "" => 1,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        "Ei" => 1 << 60,
        "k" => 10_u128.pow(3),
        "M" => 10_u128.pow(6),
        "G" => 10_u128.pow(9),
        "T" => 10_u128.pow(12),
        "P" => 10_u128.pow(15),
        "E" => 10_u128.pow(18),
        "m" | "u" | "n" => {
            divisor *= 10_u128.pow(match suffix {
                "m" => 3,
                "u" => 6,
                _ => 9,
            });
            1
        }
        exponent => {
            let exponent: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10_u128.checked_pow(exponent.unsigned_abs()).filter(|_| exponent.abs() <= 18)?;
            if exponent < 0 {
                divisor *= power;
                1
            } else {
                power
            }
        }
    };
    u64::try_from(digits.checked_mul(factor)?.div_ceil(divisor)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_in_bytes() {
        let cases = [
            ("0", Some(0)),
            ("100", Some(100)),
            ("64Mi", Some(64 << 20)),
            ("1.5Gi", Some(3 << 29)),
            ("0.1Ki", Some(103)),
            ("12k", Some(12_000)),
            ("1500m", Some(2)),
            ("1e3", Some(1000)),
            ("25e-1", Some(3)),
            ("1E", Some(10_u64.pow(18))),
            ("99E", None),
            ("", None),
            ("Mi", None),
            ("-1", None),
            ("1..5", None),
            ("1MiB", None),
            ("99999999999999999999", None),
        ];
        for (text, want) in cases {
            assert_eq!(bytes(&Quantity(text.to_owned())), want, "{text}");
        }
    }
}
