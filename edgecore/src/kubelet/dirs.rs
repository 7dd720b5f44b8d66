//! Where a pod's files are: the layout below the kubelet root, which log collectors, CSI drivers and people know by heart.
//!
//! Owns names and modes, the hosts file and the termination messages. Modes never depend on the umask. A name that could leave the
//! root (a UID with a slash in it) is refused before it becomes a path. Removing a pod's directory is [`super::volumes`]'s, which
//! knows of mounts.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use thiserror::Error;

use crate::order;

/// Most of a termination message that is kept: its end.
pub const TERMINATION_MESSAGE_MAX: usize = 4096;
/// Most of a log that stands in for a termination message: its end.
pub const LOG_TAIL_MAX: usize = 2048;
/// Most lines of a log that stand in for a termination message.
pub const LOG_TAIL_LINES: usize = 80;

/// Termination message files kept per container; a container that crashes for months leaves no more.
const TERMINATION_LOGS_KEPT: usize = 8;
/// How far back in a log file the tail is looked for: several times what 2048 bytes in the longest lines of a runtime take.
const LOG_WINDOW: u64 = 64 * 1024;

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

/// The UIDs on disk that nobody knows: neither wanted nor in the runtime. Only ask once everything wanted is known.
pub fn orphans(root: &Path, is_known: impl Fn(&str) -> bool) -> Result<Vec<String>, PathError> {
    let mut uids = pod_uids(root)?;
    uids.retain(|uid| !is_known(uid));
    Ok(uids)
}

/// The end of a termination message file, at most [`TERMINATION_MESSAGE_MAX`] bytes; empty when the file is gone.
pub fn read_termination_message(path: &Path) -> Result<String, PathError> {
    let (bytes, _) = read_end(path, TERMINATION_MESSAGE_MAX as u64)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The end of a container's log, without the runtime's line headers: at most [`LOG_TAIL_LINES`] lines and [`LOG_TAIL_MAX`] bytes.
/// Stands in for the termination message of `FallbackToLogsOnError`; empty when the file is gone.
pub fn read_log_tail(path: &Path) -> Result<String, PathError> {
    let (bytes, is_whole) = read_end(path, LOG_WINDOW)?;
    Ok(String::from_utf8_lossy(&log_tail(&bytes, is_whole)).into_owned())
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

/// The last bytes of a regular file, and whether that is all of it. The file may have been written by anyone: no link is followed
/// and a pipe does not block.
fn read_end(path: &Path, max: u64) -> Result<(Vec<u8>, bool), PathError> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let mut file: File = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), true)),
        Err(error) => return Err(error).at("read", path),
    };
    let metadata = file.metadata().at("read", path)?;
    if !metadata.is_file() {
        return Err(refused("read, as it is no regular file,", path));
    }
    let start = metadata.len().saturating_sub(max);
    file.seek(SeekFrom::Start(start)).at("read", path)?;
    let mut bytes = Vec::new();
    file.take(max).read_to_end(&mut bytes).at("read", path)?;
    Ok((bytes, start == 0))
}

fn log_tail(window: &[u8], is_whole: bool) -> Vec<u8> {
    let mut lines: VecDeque<&[u8]> = VecDeque::new();
    let mut parts = window.split_inclusive(|byte| *byte == b'\n');
    if !is_whole {
        let first = parts.next().unwrap_or_default();
        if first.len() == window.len() {
            // One line longer than the window: its end is all there is.
            return first[first.len().saturating_sub(LOG_TAIL_MAX)..].to_vec();
        }
    }
    for line in parts {
        let Some(content) = log_content(line) else { continue };
        lines.push_back(content);
        if lines.len() > LOG_TAIL_LINES {
            lines.pop_front();
        }
    }
    let mut text = lines.make_contiguous().concat();
    text.drain(..text.len().saturating_sub(LOG_TAIL_MAX));
    text
}

/// What a line of a CRI log says: `<time> <stream> <tag> <content>\n`, where tag P means that the line goes on in the next one.
fn log_content(line: &[u8]) -> Option<&[u8]> {
    let mut fields = line.splitn(4, |byte| *byte == b' ');
    let _time = fields.next()?;
    let stream = fields.next()?;
    let tag = fields.next()?;
    let content = fields.next()?;
    if !matches!(stream, b"stdout" | b"stderr") {
        return None;
    }
    let is_partial = tag.split(|byte| *byte == b':').any(|word| word == b"P");
    Some(if is_partial { content.strip_suffix(b"\n").unwrap_or(content) } else { content })
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
        assert_eq!(orphans(root.path(), |uid| uid == "a").unwrap(), ["b"]);
    }

    #[test]
    fn termination_message_is_the_end_of_a_regular_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert_eq!(read_termination_message(&path).unwrap(), "");
        fs::write(&path, "x".repeat(5000) + "end").unwrap();
        let message = read_termination_message(&path).unwrap();
        assert_eq!(message.len(), TERMINATION_MESSAGE_MAX);
        assert!(message.ends_with("xend"));

        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        assert!(read_termination_message(&link).is_err());
        assert!(read_termination_message(dir.path()).is_err());
    }

    #[test]
    fn log_tail_counts_lines_and_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let line = |tag: &str, text: &str| format!("2026-01-02T15:04:05.123456789Z stderr {tag} {text}\n");
        fs::write(&path, line("P", "one ") + &line("F", "line") + "garbage\n" + &line("F", "two")).unwrap();
        assert_eq!(read_log_tail(&path).unwrap(), "one line\ntwo\n");

        let many: String = (0..10_000).map(|n| line("F", &n.to_string())).collect();
        fs::write(&path, &many).unwrap();
        let tail = read_log_tail(&path).unwrap();
        assert_eq!(tail.lines().collect::<Vec<_>>(), (9_920..10_000).map(|n| n.to_string()).collect::<Vec<_>>());

        fs::write(&path, line("F", &"y".repeat(3000)) + &line("F", "z")).unwrap();
        let tail = read_log_tail(&path).unwrap();
        assert_eq!((tail.len(), tail.ends_with("y\nz\n")), (LOG_TAIL_MAX, true));

        fs::write(&path, line("F", &"q".repeat(100_000))).unwrap();
        assert_eq!(read_log_tail(&path).unwrap().len(), LOG_TAIL_MAX);
    }
}
