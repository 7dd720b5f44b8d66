//! Gives a volume to the pod's `fsGroup`.
//!
//! Works on open handles from the top down: a container that swaps a file for a link meanwhile gains nothing. Stays on one file system.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::libc::{dev_t, mode_t};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{Gid, fchownat};

use super::tree;

/// Trees deeper than this are not walked; each level holds two files open.
const DEEPEST: usize = 128;

/// The mode a file or directory gets when its group does: readable (and, unless the volume is read-only, writable) by the group;
/// directories pass the group on.
pub(crate) fn mode_for_group(mode: u32, is_dir: bool, read_only: bool) -> u32 {
    let bits = if read_only { 0o440 } else { 0o660 };
    mode | bits | if is_dir { 0o2110 } else { 0 }
}

/// Hands a whole tree to the group. Links change hands themselves, not what they point at.
pub(crate) fn apply(path: &Path, group: u32, read_only: bool) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let top = openat(AT_FDCWD, path, flags, Mode::empty())?;
    let device = fstat(&top)?.st_dev;
    Walk { group: Gid::from_raw(group), read_only, device }.visit(&top, 0)
}

/// Hands over the directory alone, not what is in it.
pub(crate) fn apply_to_dir(path: &Path, group: u32, read_only: bool) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let top = openat(AT_FDCWD, path, flags, Mode::empty())?;
    let device = fstat(&top)?.st_dev;
    Walk { group: Gid::from_raw(group), read_only, device }.hand_over(&top).map(drop)
}

struct Walk {
    group: Gid,
    read_only: bool,
    device: dev_t,
}

impl Walk {
    fn visit(&self, file: &OwnedFd, depth: usize) -> io::Result<()> {
        if !tree::is_dir(self.hand_over(file)?) {
            return Ok(());
        }
        if depth >= DEEPEST {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("directories are more than {DEEPEST} deep"),
            ));
        }
        let dir = tree::open_dir(file, OsStr::new("."))?;
        for entry in tree::list(&dir)? {
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            match openat(&dir, entry?.file_name().as_os_str(), flags, Mode::empty()) {
                Ok(child) if fstat(&child)?.st_dev == self.device => self.visit(&child, depth + 1)?,
                // What is mounted in it belongs to someone else; what vanished needs nothing.
                Ok(_) | Err(Errno::ENOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn hand_over(&self, file: &OwnedFd) -> io::Result<mode_t> {
        let stat = fstat(file)?;
        if stat.st_gid != self.group.as_raw() {
            fchownat(file, "", None, Some(self.group), AtFlags::AT_EMPTY_PATH)?;
        }
        if tree::kind(stat.st_mode) != SFlag::S_IFLNK {
            let old = stat.st_mode & 0o7777;
            let new = mode_for_group(old, tree::is_dir(stat.st_mode), self.read_only);
            // A change of group may have cleared set-id bits, so that comparing with the old mode is only right without one.
            if new != old || stat.st_gid != self.group.as_raw() {
                fs::set_permissions(tree::path_of(file), Permissions::from_mode(new))?;
            }
        }
        Ok(stat.st_mode)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::kubelet::volumes::tests::is_root;

    #[test]
    fn a_tree_changes_hands_and_links_are_not_followed() {
        if !is_root("fs_group") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::write(&outside, "").unwrap();
        fs::set_permissions(&outside, Permissions::from_mode(0o600)).unwrap();
        let volume = dir.path().join("volume");
        fs::create_dir_all(volume.join("sub")).unwrap();
        fs::write(volume.join("sub/file"), "").unwrap();
        fs::set_permissions(volume.join("sub/file"), Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(volume.join("sub"), Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink(&outside, volume.join("link")).unwrap();

        apply(&volume, 4321, false).unwrap();
        let seen = |path: &str| {
            let data = fs::symlink_metadata(volume.join(path)).unwrap();
            (data.gid(), data.mode() & 0o7777)
        };
        assert_eq!(seen("sub"), (4321, 0o2770));
        assert_eq!(seen("sub/file"), (4321, 0o660));
        assert_eq!(seen("link").0, 4321);
        let data = fs::metadata(&outside).unwrap();
        assert_eq!((data.gid(), data.mode() & 0o7777), (0, 0o600));
        assert_eq!(mode_for_group(0o600, false, true), 0o640);
    }
}
