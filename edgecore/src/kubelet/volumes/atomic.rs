//! Writes a set of files into a directory so that readers see all of the old set or all of the new one, never a mixture.
//!
//! The files are in a hidden directory named after the time, `..data` links to it, and what users see are links through `..data`;
//! renaming a new link over `..data` is the one moment of change. A crash at any point leaves one complete set behind, and the next
//! write finishes or removes what was begun. Nothing is flushed to disk: after a power cut the comparison with the wanted files finds
//! what was lost, before any container of the pod starts.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use jiff::Timestamp;
use thiserror::Error;

use super::{fs_group, tree};
use crate::kubelet::dirs::{At, PathError};
use crate::order;

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";
const PATH_MAX: usize = 4096;
const NAME_MAX: usize = 255;

/// One file of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct File<'a> {
    pub(crate) bytes: Cow<'a, [u8]>,
    pub(crate) mode: u32,
    /// Owner, when it is not root.
    pub(crate) owner: Option<u32>,
}

/// The files of a volume by their relative path.
pub(crate) type Payload<'a> = BTreeMap<String, File<'a>>;

/// Why files could not be written.
#[derive(Debug, Error)]
pub(crate) enum WriteError {
    #[error("path {path:?} is not allowed in a volume: {why}")]
    Path { path: String, why: &'static str },
    #[error(transparent)]
    Io(#[from] PathError),
}

/// Writes to one directory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AtomicWriter<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) fs_group: Option<u32>,
}

/// Is told of every step once it is done; its error stops the writer where a crash would.
type Checkpoint<'a> = &'a mut dyn FnMut(&'static str) -> io::Result<()>;

impl AtomicWriter<'_> {
    /// Makes the directory show exactly these files. Says whether the content changed.
    pub(crate) fn write(&self, payload: &Payload<'_>, now: Timestamp) -> Result<bool, WriteError> {
        let result = self.write_in_steps(payload, now, &mut |_| Ok(()));
        if result.is_err() {
            // The disk may be full of what was begun. The error that is reported is the first one.
            let _ = self.sweep(self.current().as_deref(), &mut |_| Ok(()));
        }
        result
    }

    fn write_in_steps(&self, payload: &Payload<'_>, now: Timestamp, done: Checkpoint<'_>) -> Result<bool, WriteError> {
        let payload = clean(payload)?;
        let mut current = self.current();
        let is_same = current.as_ref().is_some_and(|current| self.holds(current, &payload));
        if !is_same {
            self.sweep(current.as_deref(), done)?;
            let fresh = self.write_fresh(&payload, now, done)?;
            let name = fresh.file_name().unwrap_or_default();
            let link = self.dir.join(DATA_NEW);
            symlink(name, &link).at("link", &link)?;
            done("link new data").at("link", &link)?;
            let data = self.dir.join(DATA);
            fs::rename(&link, &data).at("replace", &data)?;
            done("switch").at("replace", &data)?;
            current = Some(fresh);
        }
        let visible: BTreeSet<&str> = order::set(payload.keys().filter_map(|path| path.split('/').next()));
        for name in &visible {
            self.show(name, done)?;
        }
        self.hide_others(&visible, done)?;
        self.sweep(current.as_deref(), done)?;
        Ok(!is_same)
    }

    /// The directory that `..data` names, if it names one of ours.
    fn current(&self) -> Option<PathBuf> {
        let target = fs::read_link(self.dir.join(DATA)).ok()?;
        let mut parts = target.components();
        match (parts.next(), parts.next()) {
            (Some(Component::Normal(name)), None) if is_hidden(name.as_bytes()) => {
                Some(self.dir.join(name)).filter(|path| path.is_dir())
            }
            _ => None,
        }
    }

    /// Whether a directory holds exactly these files, with these modes and owners.
    fn holds(&self, dir: &Path, payload: &BTreeMap<String, &File<'_>>) -> bool {
        let is_right = |(path, file): (&String, &&File<'_>)| -> io::Result<bool> {
            let path = dir.join(path);
            let data = fs::symlink_metadata(&path)?;
            Ok(data.is_file()
                && data.len() == file.bytes.len() as u64
                && data.mode() & 0o7777 == self.mode(file)
                && file.owner.is_none_or(|owner| data.uid() == owner)
                && self.fs_group.is_none_or(|group| data.gid() == group)
                && fs::read(&path)? == *file.bytes)
        };
        payload.iter().all(|entry| is_right(entry).unwrap_or(false))
            && count_files(dir).is_ok_and(|count| count == payload.len())
    }

    fn mode(&self, file: &File<'_>) -> u32 {
        let mode = file.mode & 0o7777;
        if self.fs_group.is_some() { fs_group::mode_for_group(mode, false, true) } else { mode }
    }

    fn write_fresh(
        &self,
        payload: &BTreeMap<String, &File<'_>>,
        now: Timestamp,
        done: Checkpoint<'_>,
    ) -> Result<PathBuf, WriteError> {
        let name = format!("..{}.{:010}", now.strftime("%Y_%m_%d_%H_%M_%S"), rand::random::<u32>());
        let fresh = self.dir.join(name);
        self.make_dir(&fresh, done)?;
        for (path, file) in payload {
            let mut parent = fresh.clone();
            let mut names = path.split('/').peekable();
            while let Some(name) = names.next() {
                parent.push(name);
                if names.peek().is_some() && !parent.is_dir() {
                    self.make_dir(&parent, done)?;
                }
            }
            self.write_file(&parent, file, done)?;
        }
        Ok(fresh)
    }

    fn make_dir(&self, path: &Path, done: Checkpoint<'_>) -> Result<(), PathError> {
        fs::DirBuilder::new().mode(0o755).create(path).at("make the directory", path)?;
        done("make directory").at("make the directory", path)?;
        let mode = if self.fs_group.is_some() { fs_group::mode_for_group(0o755, true, true) } else { 0o755 };
        if let Some(group) = self.fs_group {
            lchown(path, None, Some(group)).at("set the group of", path)?;
        }
        fs::set_permissions(path, Permissions::from_mode(mode)).at("set the mode of", path)?;
        done("set directory mode").at("set the mode of", path)
    }

    fn write_file(&self, path: &Path, file: &File<'_>, done: Checkpoint<'_>) -> Result<(), PathError> {
        let mut out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).at("make", path)?;
        done("make file").at("make", path)?;
        out.write_all(&file.bytes).at("write", path)?;
        done("write file").at("write", path)?;
        if file.owner.is_some() || self.fs_group.is_some() {
            std::os::unix::fs::fchown(&out, file.owner, self.fs_group).at("set the owner of", path)?;
        }
        // After the owner: changing that clears set-id bits.
        out.set_permissions(Permissions::from_mode(self.mode(file))).at("set the mode of", path)?;
        done("set file mode").at("set the mode of", path)
    }

    /// Makes one top-level name visible.
    fn show(&self, name: &str, done: Checkpoint<'_>) -> Result<(), PathError> {
        let path = self.dir.join(name);
        let target = Path::new(DATA).join(name);
        match fs::read_link(&path) {
            Ok(found) if found == target => return Ok(()),
            Ok(_) => fs::remove_file(&path).at("remove", &path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A subPath of a name that was not there yet became an empty directory: it makes room.
            Err(_) => fs::remove_dir(&path).at("replace, as something else has its name,", &path)?,
        }
        symlink(&target, &path).at("link", &path)?;
        done("show").at("link", &path)
    }

    /// Removes the links of names that are no longer there, and only those: directories made for nested mounts stay.
    fn hide_others(&self, visible: &BTreeSet<&str>, done: Checkpoint<'_>) -> Result<(), PathError> {
        for entry in fs::read_dir(self.dir).at("list", self.dir)? {
            let name = entry.at("list", self.dir)?.file_name();
            let is_wanted = name.to_str().is_some_and(|name| visible.contains(name));
            if is_wanted || is_hidden(name.as_bytes()) {
                continue;
            }
            let path = self.dir.join(&name);
            if fs::read_link(&path).is_ok_and(|target| target == Path::new(DATA).join(&name)) {
                fs::remove_file(&path).at("remove", &path)?;
                done("hide").at("remove", &path)?;
            }
        }
        Ok(())
    }

    /// Removes every set of files but the current one, and a link that was not switched.
    fn sweep(&self, current: Option<&Path>, done: Checkpoint<'_>) -> Result<(), PathError> {
        for entry in fs::read_dir(self.dir).at("list", self.dir)? {
            let path = entry.at("list", self.dir)?.path();
            let name = path.file_name().unwrap_or_default();
            if is_hidden(name.as_bytes()) && name != DATA && Some(path.as_path()) != current {
                tree::remove(&path).at("remove", &path)?;
                done("sweep").at("remove", &path)?;
            }
        }
        Ok(())
    }
}

fn is_hidden(name: &[u8]) -> bool {
    name.starts_with(b"..")
}

/// Checks all paths and brings them to one spelling.
fn clean<'p, 'a>(payload: &'p Payload<'a>) -> Result<BTreeMap<String, &'p File<'a>>, WriteError> {
    let mut cleaned = BTreeMap::new();
    for (path, file) in payload {
        let refuse = |why| Err(WriteError::Path { path: path.clone(), why });
        if path.is_empty() {
            return refuse("it is empty");
        }
        if path.len() > PATH_MAX {
            return refuse("it is longer than 4096 bytes");
        }
        if path.starts_with('/') {
            return refuse("it must be relative");
        }
        let mut names = Vec::new();
        for name in path.split('/').filter(|name| !name.is_empty() && *name != ".") {
            if name == ".." {
                return refuse("it must not contain \"..\"");
            }
            if name.len() > NAME_MAX {
                return refuse("one of its names is longer than 255 bytes");
            }
            if name.contains('\0') {
                return refuse("it contains a zero byte");
            }
            names.push(name);
        }
        match names.first() {
            None => return refuse("it names no file"),
            Some(first) if first.starts_with("..") => return refuse("it must not start with \"..\""),
            Some(_) => {}
        }
        cleaned.insert(names.join("/"), file);
    }
    for path in cleaned.keys() {
        let mut parent = path.as_str();
        while let Some((above, _)) = parent.rsplit_once('/') {
            if cleaned.contains_key(above) {
                return Err(WriteError::Path { path: path.clone(), why: "another entry makes its directory a file" });
            }
            parent = above;
        }
    }
    Ok(cleaned)
}

fn count_files(dir: &Path) -> io::Result<usize> {
    let mut count = 0;
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
            } else {
                count += 1;
            }
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests;
