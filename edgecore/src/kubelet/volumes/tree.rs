//! Walks directory trees whose content was written by containers.
//!
//! Every step is relative to an open directory and follows no link, so a tree that is being rearranged cannot lead the walk out of
//! itself. No other file system is entered, and neither depth nor width costs more than a bounded number of open files.

use std::ffi::OsStr;
use std::fs::{self, ReadDir};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// A directory this far down is moved up to the top and removed from there.
const DEEP: usize = 32;

/// Opens a directory that is not a link.
pub(crate) fn open_dir(at: impl AsFd, name: &OsStr) -> nix::Result<OwnedFd> {
    openat(at, name, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
}

/// A path that names the very file that is open.
pub(crate) fn path_of(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Lists an open directory.
pub(crate) fn list(dir: &OwnedFd) -> io::Result<ReadDir> {
    fs::read_dir(path_of(dir))
}

/// Removes a file or a tree; what is not there is fine. A mount point of another file system in it is an error, and nothing behind
/// it is touched; bind mounts from the same file system cannot be told apart here, so whoever calls has looked at the mount table.
/// What can be removed is removed, the first error is returned.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let parent = match openat(AT_FDCWD, parent, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(parent) => parent,
        Err(Errno::ENOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let stat = match fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::ENOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if !is_dir(stat.st_mode) {
        return gone(unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir));
    }
    let device = fstat(&parent)?.st_dev;
    let top = open_dir(&parent, name)?;
    let mut removal = Removal { top: &top, device, moved: 0, error: None };
    if fstat(&top)?.st_dev != device {
        return Err(crossing(path));
    }
    loop {
        let before = removal.moved;
        removal.empty(&top, 0);
        if removal.moved == before {
            break;
        }
    }
    match removal.error {
        Some(error) => Err(error),
        None => gone(unlinkat(&parent, name, UnlinkatFlags::RemoveDir)),
    }
}

struct Removal<'a> {
    top: &'a OwnedFd,
    device: nix::libc::dev_t,
    moved: u64,
    error: Option<io::Error>,
}

impl Removal<'_> {
    fn empty(&mut self, dir: &OwnedFd, depth: usize) {
        let entries = match list(dir) {
            Ok(entries) => entries,
            Err(error) => return self.note(Err(error)),
        };
        for entry in entries {
            match entry {
                Ok(entry) => {
                    let result = self.remove_entry(dir, &entry.file_name(), depth);
                    self.note(result);
                }
                Err(error) => return self.note(Err(error)),
            }
        }
    }

    fn remove_entry(&mut self, dir: &OwnedFd, name: &OsStr, depth: usize) -> io::Result<()> {
        let child = match open_dir(dir, name) {
            Ok(child) => child,
            Err(Errno::ENOENT) => return Ok(()),
            Err(Errno::ENOTDIR | Errno::ELOOP) => return gone(unlinkat(dir, name, UnlinkatFlags::NoRemoveDir)),
            Err(error) => return Err(error.into()),
        };
        if fstat(&child)?.st_dev != self.device {
            return Err(crossing(Path::new(name)));
        }
        if depth >= DEEP {
            return self.move_up(dir, name);
        }
        self.empty(&child, depth + 1);
        match unlinkat(dir, name, UnlinkatFlags::RemoveDir) {
            // Something in it failed or was moved: that is on record already.
            Err(Errno::ENOTEMPTY | Errno::EEXIST) if self.error.is_some() => Ok(()),
            other => gone(other),
        }
    }

    fn move_up(&mut self, dir: &OwnedFd, name: &OsStr) -> io::Result<()> {
        for _ in 0..1000 {
            self.moved += 1;
            let free = format!(".removed-{}-{:08x}", self.moved, rand::random::<u32>());
            match renameat(dir, name, self.top, free.as_str()) {
                Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::ENOTDIR) => {}
                other => return gone(other),
            }
        }
        Err(io::Error::from(io::ErrorKind::AlreadyExists))
    }

    fn note(&mut self, result: io::Result<()>) {
        if let Err(error) = result {
            self.error.get_or_insert(error);
        }
    }
}

/// Whether a mode is a directory's.
pub(crate) fn is_dir(mode: nix::libc::mode_t) -> bool {
    kind(mode) == SFlag::S_IFDIR
}

/// The type bits of a mode.
pub(crate) fn kind(mode: nix::libc::mode_t) -> SFlag {
    SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits())
}

fn gone(result: nix::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn crossing(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::CrossesDevices, format!("something is still mounted on {}", path.display()))
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::mkdirat;

    use super::*;

    #[test]
    fn links_are_removed_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("keep"), "x").unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(tree.join("a/file"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("a/b/link")).unwrap();
        std::os::unix::fs::symlink(&outside, dir.path().join("link")).unwrap();
        remove(&tree).unwrap();
        remove(&dir.path().join("link")).unwrap();
        remove(&dir.path().join("missing/too")).unwrap();
        assert!(!tree.exists() && outside.join("keep").exists());
    }

    #[test]
    fn depth_costs_no_open_files() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let mut at = open_dir(AT_FDCWD, tree.as_os_str()).unwrap();
        // More than a process may have files open.
        for _ in 0..1100 {
            mkdirat(&at, "d", Mode::S_IRWXU).unwrap();
            at = open_dir(&at, OsStr::new("d")).unwrap();
        }
        drop(at);
        remove(&tree).unwrap();
        assert!(!tree.exists());
    }
}
