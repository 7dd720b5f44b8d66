//! Where a pod's files are: the layout below the kubelet root, which log collectors, CSI drivers and people know by heart.
//!
//! Owns names and modes, the hosts file and the termination messages. Modes never depend on the umask. A name that could leave the
//! root (a UID with a slash in it) is refused before it becomes a path. Removing a pod's directory is [`super::volumes`]'s, which
//! knows of mounts.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::order;

/// Termination message files kept per container; a container that crashes for months leaves no more.
const TERMINATION_LOGS_KEPT: usize = 8;

/// An action on a path that failed.
#[derive(Debug, Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub struct PathError {
    /// What was tried, as in "cannot … /path".
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// Names the action and the path of an error.
pub(crate) trait At<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, PathError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, PathError> {
        self.map_err(|source| PathError { action, path: path.to_owned(), source: source.into() })
    }
}

/// The paths of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodDirs {
    root: PathBuf,
    uid: String,
}

impl PodDirs {
    /// The pod's paths below a kubelet root, `/var/lib/kubelet`. Refuses a UID that is no plain file name.
    pub fn new(root: impl Into<PathBuf>, uid: &str) -> Result<Self, PathError> {
        let root = root.into();
        if !is_plain_name(uid) {
            return Err(refused("use as a pod UID", Path::new(uid)));
        }
        Ok(Self { root, uid: uid.to_owned() })
    }

    /// `pods/<uid>`.
    pub fn pod(&self) -> PathBuf {
        self.root.join("pods").join(&self.uid)
    }

    /// `etc-hosts`, the hosts file of all its containers.
    pub fn etc_hosts(&self) -> PathBuf {
        self.pod().join("etc-hosts")
    }

    /// `containers/<name>`, where termination message files are.
    pub fn container(&self, name: &str) -> PathBuf {
        self.pod().join("containers").join(name)
    }

    /// `volumes`.
    pub fn volumes(&self) -> PathBuf {
        self.pod().join("volumes")
    }

    /// `volumes/<plugin with / as ~>/<volume>`; `plugin` as in `kubernetes.io/empty-dir`.
    pub fn volume(&self, plugin: &str, volume: &str) -> PathBuf {
        self.volumes().join(plugin.replace('/', "~")).join(volume)
    }

    /// `plugins/<plugin with / as ~>/<volume>/ready`: says that a volume was completely set up once.
    pub fn ready_marker(&self, plugin: &str, volume: &str) -> PathBuf {
        self.pod().join("plugins").join(plugin.replace('/', "~")).join(volume).join("ready")
    }

    /// `volume-subpaths`.
    pub fn subpaths(&self) -> PathBuf {
        self.pod().join("volume-subpaths")
    }

    /// `volume-subpaths/<volume>/<container>/<index>`, where a subPath is bound.
    pub fn subpath(&self, volume: &str, container: &str, index: usize) -> PathBuf {
        self.subpaths().join(volume).join(container).join(index.to_string())
    }

    /// Makes the pod's directory and those that every pod has. Harmless when they are there.
    pub fn create(&self) -> Result<(), PathError> {
        let pod = self.pod();
        make_dirs(&self.root.join("pods"), 0o750)?;
        make_dir(&pod, 0o750)?;
        for name in ["containers", "plugins", "volumes"] {
            make_dir(&pod.join(name), 0o750)?;
        }
        Ok(())
    }

    /// Puts the hosts file in place, whole or not at all, and returns its path. A file that is right already stays the same inode,
    /// which running containers have mounted.
    pub fn write_etc_hosts(&self, content: &str) -> Result<PathBuf, PathError> {
        let path = self.etc_hosts();
        if !fs::read(&path).is_ok_and(|now| now == content.as_bytes()) {
            replace_file(&path, content.as_bytes(), 0o644)?;
        }
        Ok(path)
    }

    /// Makes a fresh termination message file for one attempt of a container: empty, writable by any user in it.
    /// The oldest ones beyond a small number go.
    pub fn termination_log(&self, container: &str) -> Result<PathBuf, PathError> {
        if !is_plain_name(container) {
            return Err(refused("use as a container name", Path::new(container)));
        }
        let dir = self.container(container);
        make_dirs(&dir, 0o750)?;
        let mut number = next_termination_log(&dir);
        loop {
            let path = dir.join(format!("{number:08x}"));
            match OpenOptions::new().write(true).create_new(true).mode(0o666).open(&path) {
                Ok(file) => {
                    file.set_permissions(Permissions::from_mode(0o666)).at("set the mode of", &path)?;
                    return Ok(path);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number = rand::random(),
                Err(error) => return Err(error).at("make", &path),
            }
        }
    }
}

/// What lies directly below the kubelet root.
pub const ROOT_DIRS: [&str; 7] =
    ["pods", "plugins", "plugins_registry", "pod-resources", "device-plugins", "checkpoints", "seccomp"];

/// Makes the kubelet root and what lies directly below it.
pub fn prepare_root(root: &Path) -> Result<(), PathError> {
    make_dirs(root, 0o750)?;
    for name in ROOT_DIRS {
        make_dir(&root.join(name), 0o750)?;
    }
    Ok(())
}

/// UIDs of the pods that have a directory below a kubelet root, sorted. What does not look like a pod's directory is left out.
pub fn pod_uids(root: &Path) -> Result<Vec<String>, PathError> {
    let pods = root.join("pods");
    let entries = match fs::read_dir(&pods) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).at("list", &pods),
    };
    let mut uids = Vec::new();
    for entry in entries {
        let entry = entry.at("list", &pods)?;
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if let Some(name) = entry.file_name().to_str().filter(|name| is_dir && is_plain_name(name)) {
            uids.push(name.to_owned());
        }
    }
    order::sort(&mut uids);
    Ok(uids)
}

/// One part of a path: no separator, nothing hidden or upward.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// Makes one directory of this mode, whatever the umask; a directory that is there keeps its mode.
pub(crate) fn make_dir(path: &Path, mode: u32) -> Result<(), PathError> {
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(mode)).at("set the mode of", path),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(error).at("make the directory", path),
    }
}

/// Makes a directory and its missing parents, all of this mode.
pub(crate) fn make_dirs(path: &Path, mode: u32) -> Result<(), PathError> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_dirs(parent, mode)?;
    }
    make_dir(path, mode)
}

fn refused(action: &'static str, path: &Path) -> PathError {
    PathError { action, path: path.to_owned(), source: io::Error::from(io::ErrorKind::InvalidInput) }
}

fn replace_file(path: &Path, content: &[u8], mode: u32) -> Result<(), PathError> {
    let draft = path.with_extension("new");
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).at("remove", &draft),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft).at("make", &draft)?;
    file.write_all(content).at("write", &draft)?;
    file.set_permissions(Permissions::from_mode(mode)).at("set the mode of", &draft)?;
    fs::rename(&draft, path).at("replace", path)
}

/// The number of the next file, after the oldest were removed. They are counted, not dated: a box's clock may jump.
fn next_termination_log(dir: &Path) -> u32 {
    let numbers = fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name();
        u32::from_str_radix(name.to_str().filter(|name| name.len() == 8)?, 16).ok()
    });
    let mut numbers: Vec<u32> = numbers.collect();
    order::sort(&mut numbers);
    let excess = (numbers.len() + 1).saturating_sub(TERMINATION_LOGS_KEPT);
    for number in &numbers[..excess] {
        // Failing to save an inode is no reason not to start a container.
        let _ = fs::remove_file(dir.join(format!("{number:08x}")));
    }
    numbers.last().map_or(0, |last| last.wrapping_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn layout_and_modes() {
        let root = tempfile::tempdir().unwrap();
        let dirs = PodDirs::new(root.path(), "0b7a-1").unwrap();
        prepare_root(root.path()).unwrap();
        dirs.create().unwrap();
        dirs.create().unwrap();
        let pod = root.path().join("pods/0b7a-1");
        assert_eq!(dirs.pod(), pod);
        assert_eq!(dirs.volume("kubernetes.io/empty-dir", "cache"), pod.join("volumes/kubernetes.io~empty-dir/cache"));
        assert_eq!(dirs.subpath("v", "c", 3), pod.join("volume-subpaths/v/c/3"));
        assert_eq!(mode(&pod), 0o750);

        let hosts = dirs.write_etc_hosts("127.0.0.1\tlocalhost\n").unwrap();
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        let first = inode(&hosts);
        fs::write(pod.join("etc-hosts.new"), "left by a crash").unwrap();
        dirs.write_etc_hosts("127.0.0.1\tlocalhost\n").unwrap();
        assert_eq!(inode(&hosts), first);
        dirs.write_etc_hosts("127.0.0.1\tlocalhost\n10.0.0.1\tx\n").unwrap();
        assert_eq!(fs::read_to_string(&hosts).unwrap(), "127.0.0.1\tlocalhost\n10.0.0.1\tx\n");
        assert_eq!(mode(&hosts), 0o644);

        let log = dirs.termination_log("app").unwrap();
        assert_eq!(mode(&log), 0o666);
        assert_eq!(log.file_name().unwrap().len(), 8);
        for _ in 0..30 {
            let next = dirs.termination_log("app").unwrap();
            assert!(next > log && next.exists());
        }
        assert_eq!(fs::read_dir(dirs.container("app")).unwrap().count(), TERMINATION_LOGS_KEPT);
    }

    #[test]
    fn names_that_leave_the_root_are_refused() {
        for uid in ["", ".", "..", "../x", "a/b", "a\0b", "/etc", ".hidden"] {
            assert!(PodDirs::new("/var/lib/kubelet", uid).is_err(), "{uid:?}");
        }
        let root = tempfile::tempdir().unwrap();
        assert!(PodDirs::new(root.path(), "u").unwrap().termination_log("../../x").is_err());
    }

    #[test]
    fn pods_on_disk() {
        let root = tempfile::tempdir().unwrap();
        assert!(pod_uids(root.path()).unwrap().is_empty());
        for uid in ["b", "a"] {
            PodDirs::new(root.path(), uid).unwrap().create().unwrap();
        }
        fs::write(root.path().join("pods/file"), "").unwrap();
        assert_eq!(pod_uids(root.path()).unwrap(), ["a", "b"]);
    }
}
