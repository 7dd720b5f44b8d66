//! Mounts a part of a volume: finds a `subPath` without ever leaving the volume, whatever containers do to its links meanwhile.
//!
//! The walk opens one name after the other, relative to what is open already, and follows links by hand: an upward step goes back to a
//! directory that was passed, an absolute link must lead back into the volume, and what is found is bound through its open handle, so
//! that there is no second look-up to race with.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat, readlinkat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat, stat};
use thiserror::Error;

use super::{mountinfo, tree};
use crate::kubelet::dirs::{At, PathError, make_dirs};
use crate::kubelet::expand::MissingValues;

const LINKS_MAX: usize = 40;

/// Why a part of a volume cannot be mounted.
#[derive(Debug, Error)]
pub(crate) enum SubPathError {
    #[error(transparent)]
    MissingValue(#[from] MissingValues),
    #[error("it must not be an absolute path")]
    Absolute,
    #[error("it must not contain \"..\"")]
    Upward,
    #[error("a symbolic link in it leaves the volume at {}", at.display())]
    Escape { at: PathBuf },
    #[error("it has too many symbolic links")]
    Loop,
    #[error("{} is not a directory", at.display())]
    NotDirectory { at: PathBuf },
    #[error("a symbolic link in it leads to {}, which does not exist", at.display())]
    Dangling { at: PathBuf },
    #[error("cannot make the directory {}: {source}", at.display())]
    Make { at: PathBuf, source: io::Error },
    #[error("cannot open {}: {source}", at.display())]
    Open { at: PathBuf, source: io::Error },
    #[error(transparent)]
    Path(#[from] PathError),
}

/// What a subPath names, held open.
#[derive(Debug)]
pub(crate) struct Found {
    file: OwnedFd,
    stat: FileStat,
}

/// Opens a subPath of a volume, making the directories that are missing with the permissions of the volume's own.
pub(crate) fn open(volume: &Path, sub_path: &str) -> Result<Found, SubPathError> {
    let path = Path::new(sub_path);
    if path.is_absolute() {
        return Err(SubPathError::Absolute);
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(SubPathError::Upward);
    }
    Walk::start(volume)?.run(path)
}

/// Binds what was found to a path of the pod's, replacing what an earlier attempt bound there.
pub(crate) fn bind(found: &Found, target: &Path) -> Result<(), SubPathError> {
    if is_bound(found, target)? {
        return Ok(());
    }
    make_target(found, target)?;
    mount(Some(&tree::path_of(&found.file)), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .at("bind a part of a volume to", target)?;
    Ok(())
}

struct Walk {
    /// The volume's real path, by which absolute links are judged.
    volume: PathBuf,
    /// The volume and the directories passed since, each inside the one before.
    passed: Vec<(OwnedFd, OsString)>,
    /// What new directories get.
    mode: u32,
}

impl Walk {
    fn start(volume: &Path) -> Result<Self, SubPathError> {
        let opened = || -> io::Result<_> {
            let top = openat(AT_FDCWD, volume, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
            let real = fs::read_link(tree::path_of(&top))?;
            let mode = fstat(&top)?.st_mode & 0o777;
            Ok(Self { volume: real, passed: vec![(top, OsString::new())], mode })
        };
        opened().map_err(|source| SubPathError::Open { at: volume.to_owned(), source })
    }

    fn run(mut self, path: &Path) -> Result<Found, SubPathError> {
        let mut todo: VecDeque<OsString> = names(path);
        let mut links = 0;
        // Names that came from a link and are not passed yet: what a link promises is not made on its behalf.
        let mut from_link = 0_usize;
        while let Some(name) = todo.pop_front() {
            let is_from_link = from_link > 0;
            from_link = from_link.saturating_sub(1);
            if name == ".." {
                if self.passed.len() == 1 {
                    return Err(SubPathError::Escape { at: self.place(&name) });
                }
                self.passed.pop();
                continue;
            }
            let (file, stat) = self.step(&name, is_from_link)?;
            if tree::kind(stat.st_mode) == SFlag::S_IFLNK {
                links += 1;
                if links > LINKS_MAX {
                    return Err(SubPathError::Loop);
                }
                let target = readlinkat(&file, "").map_err(|error| self.unopened(&name, error))?;
                let mut target = PathBuf::from(target);
                if target.is_absolute() {
                    match target.strip_prefix(&self.volume) {
                        Ok(inside) => target = inside.to_owned(),
                        Err(_) => return Err(SubPathError::Escape { at: self.place(&name) }),
                    }
                    self.passed.truncate(1);
                }
                let next = names(&target);
                from_link += next.len();
                for name in next.into_iter().rev() {
                    todo.push_front(name);
                }
                continue;
            }
            if !tree::is_dir(stat.st_mode) && !todo.is_empty() {
                return Err(SubPathError::NotDirectory { at: self.place(&name) });
            }
            self.passed.push((file, name));
        }
        let place = self.place(OsStr::new(""));
        let Some((file, _)) = self.passed.pop() else { return Err(SubPathError::Loop) };
        let stat = fstat(&file).map_err(|error| SubPathError::Open { at: place, source: error.into() })?;
        Ok(Found { file, stat })
    }

    /// Opens one name in the directory that was reached, without following it.
    fn step(&self, name: &OsStr, is_from_link: bool) -> Result<(OwnedFd, FileStat), SubPathError> {
        let Some((dir, _)) = self.passed.last() else { return Err(SubPathError::Loop) };
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = match openat(dir, name, flags, Mode::empty()) {
            Err(Errno::ENOENT) if is_from_link => return Err(SubPathError::Dangling { at: self.place(name) }),
            Err(Errno::ENOENT) => {
                self.make(dir, name).map_err(|source| SubPathError::Make { at: self.place(name), source })?;
                openat(dir, name, flags, Mode::empty())
            }
            other => other,
        };
        let file = file.map_err(|error| self.unopened(name, error))?;
        let stat = fstat(&file).map_err(|error| self.unopened(name, error))?;
        Ok((file, stat))
    }

    fn make(&self, dir: &OwnedFd, name: &OsStr) -> io::Result<()> {
        match mkdirat(dir, name, Mode::from_bits_truncate(self.mode)) {
            Ok(()) => {}
            // Another container of the pod was quicker.
            Err(Errno::EEXIST) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let made = tree::open_dir(dir, name)?;
        // The set-group-id bit comes from the directory above and stays.
        let inherited = fstat(&made)?.st_mode & 0o2000;
        fs::set_permissions(tree::path_of(&made), Permissions::from_mode(self.mode | inherited))
    }

    fn place(&self, name: &OsStr) -> PathBuf {
        let mut place: PathBuf = self.passed.iter().map(|(_, name)| name).collect();
        place.push(name);
        place
    }

    fn unopened(&self, name: &OsStr, error: Errno) -> SubPathError {
        SubPathError::Open { at: self.place(name), source: error.into() }
    }
}

fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsString::from("..")),
            Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
        })
        .collect()
}

/// Whether the target shows what was found. Something else that is bound there (a file that was replaced since) is let go.
fn is_bound(found: &Found, target: &Path) -> Result<bool, SubPathError> {
    if fs::symlink_metadata(target).is_err() {
        return Ok(false);
    }
    let Some(real) = real_path(target) else { return Ok(false) };
    let bound = mountinfo::scan(|mount_point| mount_point == real).at("look for mounts on", target)?.len();
    for layer in 0..bound {
        if layer == 0
            && stat(target).is_ok_and(|now| (now.st_dev, now.st_ino) == (found.stat.st_dev, found.stat.st_ino))
        {
            return Ok(true);
        }
        umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).at("unmount", target)?;
    }
    Ok(false)
}

fn make_target(found: &Found, target: &Path) -> Result<(), PathError> {
    if let Some(parent) = target.parent() {
        make_dirs(parent, 0o750)?;
    }
    let wants_dir = tree::is_dir(found.stat.st_mode);
    match fs::symlink_metadata(target) {
        Ok(there) if there.is_dir() == wants_dir && !there.is_symlink() => return Ok(()),
        Ok(there) if there.is_dir() => fs::remove_dir(target).at("remove", target)?,
        Ok(_) => fs::remove_file(target).at("remove", target)?,
        Err(_) => {}
    }
    if wants_dir {
        DirBuilder::new().mode(0o750).create(target).at("make the directory", target)
    } else {
        OpenOptions::new().write(true).create_new(true).mode(0o640).open(target).at("make", target).map(drop)
    }
}

/// A path as the mount table spells it: without links in it, the last name left alone.
fn real_path(path: &Path) -> Option<PathBuf> {
    Some(fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?))
}

#[cfg(test)]
mod tests;
