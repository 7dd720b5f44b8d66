//! What directories of pods take: volumes, logs.
//!
//! A volume in memory is asked by one call. What is on a disk has to be walked: at most so many files for one volume and for one request,
//! and a finding is good for a minute. A volume with more files has no figure, rather than one that is too low.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::stat::{fstat, fstatat};
use skerry_proto::cri;

use crate::kubelet::dirs::{PodDirs, is_plain_name};
use crate::kubelet::node::Disk;
use crate::kubelet::volumes::tree;
use crate::order;

/// Most files that are looked at in one volume.
const PER_VOLUME: usize = 20_000;
/// Most files that are looked at for one request.
pub(super) const PER_REQUEST: usize = 100_000;
/// Directories nest no deeper in good faith.
const DEEPEST: usize = 64;
/// How long a finding is good.
const GOOD_FOR: Duration = Duration::from_secs(60);
/// Most findings that are kept.
const MOST: usize = 1024;

/// What is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) bytes: u64,
    pub(super) inodes: u64,
}

/// A volume of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Volume {
    pub(super) name: String,
    /// Its own file system, if it is in memory; else it shares the node's.
    pub(super) memory: Option<Disk>,
    pub(super) used: Option<Used>,
}

/// What was found lately.
#[derive(Debug, Default)]
pub(super) struct Findings(Mutex<HashMap<PathBuf, Finding>>);

/// When, and what; nothing if there was too much.
type Finding = (Duration, Option<Used>);

impl Findings {
    /// Forgets all of it.
    pub(super) fn clear(&self) {
        *self.locked() = HashMap::new();
    }

    fn good(&self, path: &Path, now: Duration) -> Option<Option<Used>> {
        let (at, found) = *self.locked().get(path)?;
        (now.saturating_sub(at) < GOOD_FOR).then_some(found)
    }

    fn insert(&self, path: PathBuf, now: Duration, found: Option<Used>) {
        let mut all = self.locked();
        if all.len() >= MOST {
            all.retain(|_, (at, _)| now.saturating_sub(*at) < GOOD_FOR);
        }
        if all.len() < MOST {
            all.insert(path, (now, found));
        }
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<PathBuf, Finding>> {
        // Losing any of it costs a walk.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a file system has in use.
pub(super) fn used(disk: &Disk) -> Used {
    Used { bytes: disk.capacity.saturating_sub(disk.available), inodes: disk.inodes.saturating_sub(disk.inodes_free) }
}

/// What the runtime says of a file system's use.
pub(super) fn told(usage: &cri::FilesystemUsage) -> Used {
    let value = |value: &Option<cri::UInt64Value>| value.as_ref().map(|value| value.value).unwrap_or_default();
    Used { bytes: value(&usage.used_bytes), inodes: value(&usage.inodes_used) }
}

/// The volumes of a pod that have a directory below the kubelet root.
pub(super) fn volumes(root: &Path, uid: &str, budget: &mut usize, now: Duration, findings: &Findings) -> Vec<Volume> {
    let Ok(dirs) = PodDirs::new(root, uid) else { return Vec::new() };
    let mut volumes = Vec::new();
    for plugin in subdirectories(&dirs.volumes()) {
        for path in subdirectories(&plugin) {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let name = name.to_owned();
            if is_mounted(&path, &plugin) {
                let memory = Disk::read(&path);
                volumes.push(Volume { name, memory, used: memory.as_ref().map(used) });
                continue;
            }
            let found = match findings.good(&path, now) {
                Some(found) => found,
                // Another request's turn: what this one found costs that one nothing.
                None if *budget == 0 => None,
                None => {
                    let found = walk(&path, budget);
                    findings.insert(path, now, found);
                    found
                }
            };
            volumes.push(Volume { name, memory: None, used: found });
        }
    }
    volumes
}

/// What a directory and all below take, or nothing if there are too many files in it. The directory itself counts.
pub(super) fn walk(dir: &Path, budget: &mut usize) -> Option<Used> {
    let top = tree::open_dir(AT_FDCWD, dir.as_os_str()).ok()?;
    let stat = fstat(&top).ok()?;
    let given = (*budget).min(PER_VOLUME);
    let mut walk = Walk { device: stat.st_dev, left: given, linked: HashSet::new(), used: Used::default() };
    walk.count(&stat);
    let is_whole = walk.enter(&top, 0);
    *budget -= given - walk.left;
    is_whole.then_some(walk.used)
}

struct Walk {
    device: nix::libc::dev_t,
    left: usize,
    /// Files of several names that were counted.
    linked: HashSet<nix::libc::ino_t>,
    used: Used,
}

impl Walk {
    /// Whether all of it was seen. Nothing is followed out of it: every step is relative to an open directory.
    fn enter(&mut self, dir: &std::os::fd::OwnedFd, depth: usize) -> bool {
        let Ok(entries) = tree::list(dir) else { return false };
        for entry in entries {
            let Ok(entry) = entry else { return false };
            if self.left == 0 || depth >= DEEPEST {
                return false;
            }
            self.left -= 1;
            let name = entry.file_name();
            let stat = match fstatat(dir, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::ENOENT) => continue,
                Err(_) => return false,
            };
            if stat.st_dev != self.device {
                continue;
            }
            self.count(&stat);
            if tree::is_dir(stat.st_mode) {
                match tree::open_dir(dir, &name) {
                    // Something may have been mounted on it meanwhile.
                    Ok(child) if fstat(&child).is_ok_and(|stat| stat.st_dev == self.device) => {
                        if !self.enter(&child, depth + 1) {
                            return false;
                        }
                    }
                    Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                    Err(_) => return false,
                }
            }
        }
        true
    }

    fn count(&mut self, stat: &nix::sys::stat::FileStat) {
        if stat.st_nlink > 1 && !tree::is_dir(stat.st_mode) && !self.linked.insert(stat.st_ino) {
            return;
        }
        self.used.bytes += u64::try_from(stat.st_blocks).unwrap_or_default() * 512;
        self.used.inodes += 1;
    }
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_ours = |entry: &fs::DirEntry| {
        entry.file_type().is_ok_and(|kind| kind.is_dir())
            && entry.file_name().to_str().is_some_and(|name| is_plain_name(&name.replace('~', "-")))
    };
    let mut found: Vec<PathBuf> = entries.filter(is_ours).map(|entry| entry.path()).collect();
    order::sort(&mut found);
    found
}

fn is_mounted(dir: &Path, parent: &Path) -> bool {
    let device = |path: &Path| fs::symlink_metadata(path).map(|data| data.dev()).ok();
    device(dir) != device(parent)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_walk_counts_blocks_once_follows_nothing_and_ends() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("volume");
        fs::create_dir_all(dir.join("a/b")).unwrap();
        fs::write(dir.join("a/file"), vec![7; 10_000]).unwrap();
        fs::hard_link(dir.join("a/file"), dir.join("a/b/again")).unwrap();
        fs::write(root.path().join("outside"), vec![7; 1 << 20]).unwrap();
        symlink(root.path(), dir.join("link")).unwrap();
        let mut budget = 100;
        let used = walk(&dir, &mut budget).unwrap();
        // The directory, two below, the file, the link.
        assert_eq!((used.inodes, budget), (5, 95));
        assert!((10_000..100_000).contains(&used.bytes), "{used:?}");
        let mut small = 3;
        assert_eq!((walk(&dir, &mut small), small), (None, 0));
        assert_eq!(walk(&dir.join("link"), &mut budget), None);
        assert_eq!(walk(&dir.join("missing"), &mut budget), None);
    }

    #[test]
    fn volumes_are_found_and_a_finding_is_good_for_a_minute() {
        let root = tempfile::tempdir().unwrap();
        let dirs = PodDirs::new(root.path(), "u1").unwrap();
        for (plugin, name) in [("kubernetes.io/empty-dir", "cache"), ("kubernetes.io/configmap", "settings")] {
            fs::create_dir_all(dirs.volume(plugin, name)).unwrap();
        }
        let findings = Findings::default();
        let look =
            |budget: &mut usize, seconds| volumes(root.path(), "u1", budget, Duration::from_secs(seconds), &findings);
        let mut budget = 10;
        let first = look(&mut budget, 0);
        assert_eq!(first.iter().map(|volume| volume.name.as_str()).collect::<Vec<_>>(), ["settings", "cache"]);
        assert_eq!(first[1].used.unwrap().inodes, 1);
        fs::write(dirs.volume("kubernetes.io/empty-dir", "cache").join("new"), "x").unwrap();
        assert_eq!(look(&mut 0, 59), first);
        assert_eq!(look(&mut 0, 61)[1].used, None);
        assert_eq!(look(&mut budget, 61)[1].used.unwrap().inodes, 2);
        assert!(volumes(root.path(), "../x", &mut 1, Duration::ZERO, &findings).is_empty());
    }
}
