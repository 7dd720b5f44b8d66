//! The cgroups of pods, on cgroup v1 (one hierarchy per controller) and v2.
//!
//! Owns `kubepods`, its two QoS children and the pod cgroups in them; containers' cgroups below are the runtime's. What a kernel lacks
//! (a controller, bandwidth control) costs a [`Warning`], never a pod: the limits of its containers still hold.
//!
//! With the systemd driver cgroups are units and making them by hand would fight with systemd: systemd makes a pod's slice
//! when the runtime starts the sandbox, with what it was told of it before. The slice would stay for ever, and so would what was told:
//! nobody but who is done with the pod stops the one and takes back the other.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use thiserror::Error;

use super::dirs::{At, PathError, is_plain_name};
use super::resources::PodCgroup;
use super::volumes::mountinfo;
use crate::order;

const KILL_TRIES: usize = 5;
/// Between the tries: a killed process needs a moment to be gone.
const KILL_PAUSE: Duration = Duration::from_millis(20);
/// Cgroups nest by container, and by whatever runs in it; nobody nests this deep in good faith.
const DEEPEST: usize = 64;
/// Where systemd keeps what it was told of units until the box is started again: a directory `<unit>.d` for each.
pub const TOLD: &str = "/run/systemd/system.control";
/// Slices of which it is remembered what systemd was told: more than a node has pods. One that is forgotten is told of again.
const MOST_SLICES: usize = 1024;
/// How often it is looked whether `systemctl` has ended, with [`KILL_PAUSE`] between: ten seconds. The threads that may wait are few.
const LOOKS: usize = 500;

/// Something that could not be done and that nothing depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning(pub String);

/// Why a cgroup is still there.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// No hierarchy is mounted.
    #[error("no cgroup file system is mounted; mount cgroup2 on /sys/fs/cgroup")]
    NotMounted,
    /// Not a path of a pod.
    #[error("{0:?} is not the path of a pod's cgroup")]
    Path(String),
    /// Processes live on.
    #[error("{} still has {left} processes after they were killed", path.display())]
    Busy {
        /// The cgroup.
        path: PathBuf,
        /// How many.
        left: usize,
    },
    /// The kernel refused.
    #[error(transparent)]
    Io(#[from] PathError),
}

/// The hierarchies of this box.
#[derive(Clone, Debug)]
pub struct Cgroups {
    hierarchies: Hierarchies,
    /// Name of the top cgroup of pods, `kubepods`.
    base: String,
    systemd: bool,
    /// What systemd was told last of each slice, see [`set_property`].
    told: Arc<Mutex<Vec<Vec<String>>>>,
}

#[derive(Clone, Debug)]
enum Hierarchies {
    /// Mount point by controller; those without controllers by their name.
    V1(BTreeMap<String, PathBuf>),
    V2(PathBuf),
}

impl Cgroups {
    /// Finds the hierarchies in the mount table. A box that has v1 controllers is a v1 box, also when v2 is mounted beside them.
    pub fn discover(systemd: bool) -> Result<Self, CgroupError> {
        let table = mountinfo::read().at("read the mount table", Path::new("/proc/self/mountinfo"))?;
        let hierarchies = hierarchies(&table).ok_or(CgroupError::NotMounted)?;
        Ok(Self::new(hierarchies, systemd))
    }

    fn new(hierarchies: Hierarchies, systemd: bool) -> Self {
        Self { hierarchies, base: "kubepods".to_owned(), systemd, told: Arc::default() }
    }

    /// Directories that stand for hierarchies: `root` is the one of v2; those of v1 are below it by their controllers' names.
    #[cfg(test)]
    pub(crate) fn standing_at(root: &Path, version: u8) -> Self {
        let v1 = ["cpu", "cpuacct", "memory", "pids", "blkio"].map(|name| (name.to_owned(), root.join(name)));
        let hierarchies =
            if version == 2 { Hierarchies::V2(root.to_owned()) } else { Hierarchies::V1(v1.into_iter().collect()) };
        Self::new(hierarchies, false)
    }

    /// The same hierarchies, with another top cgroup.
    #[cfg(test)]
    pub(crate) fn with_base(self, base: String) -> Self {
        Self { base, ..self }
    }

    /// 1 or 2.
    pub fn version(&self) -> u8 {
        match self.hierarchies {
            Hierarchies::V1(_) => 1,
            Hierarchies::V2(_) => 2,
        }
    }

    /// Makes `kubepods` and its QoS children and sets their limits ([`super::resources::qos_cgroups`]). Only changes are written.
    pub fn set_tiers(&self, tiers: &[PodCgroup; 3]) -> Vec<Warning> {
        tiers.iter().flat_map(|tier| self.apply(tier)).collect()
    }

    /// Makes a cgroup and sets its limits; what was limited and no longer is gets free. Only changes are written.
    /// With the systemd driver systemd is told of changes, also of a slice that is not there yet, and may take its time.
    pub fn apply(&self, limits: &PodCgroup) -> Vec<Warning> {
        let mut writer = Writer::default();
        let Some(relative) = self.relative(&limits.path) else {
            return vec![Warning(CgroupError::Path(limits.path.clone()).to_string())];
        };
        if self.systemd {
            let slice = slice_of(&relative);
            if let Err(error) = self.tell(&slice, set_property(&slice, limits, self.version()), systemctl) {
                writer.warn(format!("systemd does not limit {slice}: {error}"));
            }
            return writer.warnings;
        }
        match &self.hierarchies {
            Hierarchies::V1(mounts) => writer.apply_v1(mounts, &relative, limits),
            Hierarchies::V2(root) => writer.apply_v2(root, &relative, limits),
        }
        writer.warnings
    }

    /// Kills what is left in a pod's cgroup and removes it with everything below, in every hierarchy. One that is gone is fine.
    /// With the systemd driver the slice is stopped, with which systemd removes it, and forgets what it was told of it.
    /// Blocks for up to a tenth of a second, and for up to ten seconds if systemd takes that.
    pub fn destroy(&self, path: &str) -> Result<(), CgroupError> {
        let refused = || CgroupError::Path(path.to_owned());
        let relative = self.relative(path).filter(|_| self.uid_of(path).is_some()).ok_or_else(refused)?;
        let dirs: Vec<PathBuf> = self.roots().map(|root| root.join(&relative)).filter(|dir| dir.is_dir()).collect();
        for attempt in 0..KILL_TRIES {
            if attempt > 0 {
                pause();
            }
            let left: BTreeSet<i32> = order::set(dirs.iter().flat_map(|dir| processes(dir, 0)));
            if left.is_empty() {
                break;
            }
            for dir in &dirs {
                thaw(dir, 0);
            }
            kill_all(&left);
        }
        if self.systemd {
            // What still lives would be waited for.
            if let Some((dir, left)) = dirs.iter().map(|dir| (dir, processes(dir, 0).len())).find(|(_, left)| *left > 0)
            {
                return Err(CgroupError::Busy { path: dir.clone(), left });
            }
            let slice = slice_of(&relative);
            if !dirs.is_empty()
                && let Err(error) = systemctl(&["stop".to_owned(), slice.clone()])
            {
                // An empty one that stays is not worth holding up a pod's end.
                tracing::warn!(slice, %error, "systemd does not stop a pod's slice");
            }
            self.forget(&slice);
            // Not there if systemd was told nothing.
            let _ = fs::remove_dir_all(Path::new(TOLD).join(format!("{slice}.d")));
            return Ok(());
        }
        for dir in &dirs {
            remove(dir, 0)?;
        }
        Ok(())
    }

    /// The pod cgroups there are: path by pod UID. Compare with what is known to find the orphans.
    pub fn pods(&self) -> BTreeMap<String, String> {
        let mut pods = BTreeMap::new();
        let parents = if self.systemd {
            let base = &self.base;
            vec![
                format!("/{base}.slice"),
                format!("/{base}.slice/{base}-burstable.slice"),
                format!("/{base}.slice/{base}-besteffort.slice"),
            ]
        } else {
            ["", "/burstable", "/besteffort"].map(|qos| format!("/{}{qos}", self.base)).to_vec()
        };
        for root in self.roots() {
            for parent in &parents {
                let Ok(entries) = fs::read_dir(root.join(parent.trim_start_matches('/'))) else { continue };
                for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
                    let path = format!("{parent}/{}", entry.file_name().to_string_lossy());
                    if let Some(uid) = self.uid_of(&path) {
                        pods.insert(uid, path);
                    }
                }
            }
        }
        pods
    }

    /// Where the files of a v1 controller are for a cgroup (a path below a hierarchy's root, as [`Self::pods`] has them; `/` is the root).
    /// With v2 all are in one place.
    pub fn place(&self, controller: &str, path: &str) -> Option<PathBuf> {
        let root = match &self.hierarchies {
            Hierarchies::V1(mounts) => mounts.get(controller)?,
            Hierarchies::V2(root) => root,
        };
        Some(root.join(path.trim_start_matches('/')))
    }

    /// The cgroup that all pods are in.
    pub fn top(&self) -> String {
        if self.systemd { format!("/{}.slice", self.base) } else { format!("/{}", self.base) }
    }

    /// Has systemd told of a slice, unless it was told the same last. What is there is not read: systemd makes it as it pleases, and later.
    fn tell(&self, slice: &str, arguments: Vec<String>, call: fn(&[String]) -> io::Result<()>) -> io::Result<()> {
        if self.told.lock().unwrap_or_else(PoisonError::into_inner).contains(&arguments) {
            return Ok(());
        }
        // Of what failed nobody knows how far it came.
        self.forget(slice);
        call(&arguments)?;
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() >= MOST_SLICES {
            told.remove(0);
        }
        told.push(arguments);
        Ok(())
    }

    fn forget(&self, slice: &str) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|arguments| !arguments.iter().any(|argument| argument == slice));
    }

    /// A path of ours as it is below a hierarchy's root; `None` for any other. Of a slice given by its own name the slices around
    /// it are put in front.
    fn relative(&self, path: &str) -> Option<PathBuf> {
        let path = path.trim_matches('/');
        let expanded = match path.strip_suffix(".slice") {
            Some(_) if !path.contains('/') => slice_path(path)?,
            _ => path.to_owned(),
        };
        let mut names = expanded.split('/');
        let top = names.next()?;
        let is_ours =
            if self.systemd { top.strip_suffix(".slice") == Some(self.base.as_str()) } else { top == self.base };
        (is_ours && names.all(is_plain_name)).then(|| PathBuf::from(expanded))
    }

    /// The pod a cgroup is of, if it is a pod's and not a container's or a QoS class's.
    fn uid_of(&self, path: &str) -> Option<String> {
        let name = path.trim_matches('/').rsplit('/').next()?;
        let uid = if self.systemd {
            let inside = name.strip_prefix(self.base.as_str())?.strip_suffix(".slice")?;
            let inside =
                ["-burstable", "-besteffort"].iter().find_map(|qos| inside.strip_prefix(qos)).unwrap_or(inside);
            inside.strip_prefix("-pod")?.replace('_', "-")
        } else {
            name.strip_prefix("pod")?.to_owned()
        };
        is_plain_name(&uid).then_some(uid)
    }

    fn roots(&self) -> impl Iterator<Item = &PathBuf> {
        let (many, one) = match &self.hierarchies {
            Hierarchies::V1(mounts) => (Some(mounts.values()), None),
            Hierarchies::V2(root) => (None, Some(root)),
        };
        many.into_iter().flatten().chain(one)
    }
}

/// Where systemd puts a slice: `a-b.slice` is in `a.slice/a-b.slice`.
pub fn slice_path(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(".slice").filter(|name| !name.is_empty() && !name.contains('/'))?;
    let mut path = String::new();
    for (at, _) in name.match_indices('-').chain([(name.len(), "")]) {
        if at == 0 || name[..at].ends_with('-') {
            return None;
        }
        if !path.is_empty() {
            path.push('/');
        }
        path.push_str(&name[..at]);
        path.push_str(".slice");
    }
    Some(path)
}

/// Shares of v1 as a weight of v2: 2 to 262144 becomes 1 to 10000.
pub fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn hierarchies(table: &[mountinfo::Entry]) -> Option<Hierarchies> {
    let mut v1 = BTreeMap::new();
    let mut has_controllers = false;
    for entry in table.iter().filter(|entry| entry.fs_type == "cgroup") {
        for option in entry.super_options.split(',') {
            let is_controller = matches!(
                option,
                "cpu"
                    | "cpuacct"
                    | "cpuset"
                    | "memory"
                    | "pids"
                    | "devices"
                    | "freezer"
                    | "blkio"
                    | "hugetlb"
                    | "net_cls"
                    | "net_prio"
                    | "perf_event"
                    | "rdma"
                    | "misc"
            );
            if is_controller || option.starts_with("name=") {
                has_controllers |= matches!(option, "cpu" | "memory");
                v1.entry(option.to_owned()).or_insert_with(|| entry.mount_point.clone());
            }
        }
    }
    let v2 = table.iter().find(|entry| entry.fs_type == "cgroup2").map(|entry| entry.mount_point.clone());
    match v2 {
        Some(root) if !has_controllers => Some(Hierarchies::V2(root)),
        _ if v1.is_empty() => None,
        unified => {
            v1.extend(unified.map(|root| ("unified".to_owned(), root)));
            Some(Hierarchies::V1(v1))
        }
    }
}

/// Writes what differs and remembers what could not be written.
#[derive(Default)]
struct Writer {
    warnings: Vec<Warning>,
}

impl Writer {
    fn apply_v1(&mut self, mounts: &BTreeMap<String, PathBuf>, relative: &Path, limits: &PodCgroup) {
        for controller in ["cpu", "memory", "pids"] {
            let Some(root) = mounts.get(controller) else {
                self.warn(format!("the {controller} controller is not there: {} is not limited by it", limits.path));
                continue;
            };
            let dir = root.join(relative);
            if !self.make(&dir) {
                continue;
            }
            match controller {
                "cpu" => {
                    if let Some(shares) = limits.cpu_shares {
                        self.write(&dir, "cpu.shares", &shares.to_string());
                    }
                    if limits.cpu_quota.is_some() {
                        self.write(&dir, "cpu.cfs_period_us", &period(limits).to_string());
                    }
                    self.limit(&dir, "cpu.cfs_quota_us", limits.cpu_quota, "-1");
                }
                "memory" => {
                    // Kernels before 5.11 need to be told that a limit holds for what is below.
                    self.write_unless_absent(&dir, "memory.use_hierarchy", "1", false);
                    self.limit(&dir, "memory.limit_in_bytes", limits.memory_limit, "-1");
                }
                _ => self.limit(&dir, "pids.max", limits.pids_limit, "max"),
            }
        }
    }

    fn apply_v2(&mut self, root: &Path, relative: &Path, limits: &PodCgroup) {
        let dir = root.join(relative);
        if !self.make(&dir) {
            return;
        }
        let mut parent = root.to_owned();
        let mut names: Vec<_> = relative.iter().collect();
        names.pop();
        self.delegate(&parent);
        for name in names {
            parent.push(name);
            self.delegate(&parent);
        }
        if let Some(shares) = limits.cpu_shares {
            self.write(&dir, "cpu.weight", &weight(shares).to_string());
        }
        let quota =
            limits.cpu_quota.filter(|quota| *quota > 0).map_or_else(|| "max".to_owned(), |quota| quota.to_string());
        self.write_unless_absent(&dir, "cpu.max", &format!("{quota} {}", period(limits)), limits.cpu_quota.is_some());
        self.limit(&dir, "memory.max", limits.memory_limit, "max");
        self.limit(&dir, "pids.max", limits.pids_limit, "max");
    }

    /// Hands the controllers of a v2 cgroup on to its children, one by one: one that cannot be had costs only itself.
    fn delegate(&mut self, dir: &Path) {
        let words = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        let (there, given) = (words("cgroup.controllers"), words("cgroup.subtree_control"));
        for controller in
            there.split_whitespace().filter(|word| matches!(*word, "cpu" | "memory" | "pids" | "cpuset" | "io"))
        {
            if given.split_whitespace().any(|word| word == controller) {
                continue;
            }
            let path = dir.join("cgroup.subtree_control");
            if let Err(error) = fs::write(&path, format!("+{controller}")) {
                self.warn(format!("cannot enable {controller} in {}: {error}", path.display()));
            }
        }
    }

    fn make(&mut self, dir: &Path) -> bool {
        match fs::create_dir_all(dir) {
            Ok(()) => true,
            Err(error) => {
                self.warn(format!("cannot make the cgroup {}: {error}", dir.display()));
                false
            }
        }
    }

    fn limit(&mut self, dir: &Path, file: &str, limit: Option<i64>, none: &str) {
        let limit = limit.filter(|limit| *limit > 0);
        let value = limit.map_or_else(|| none.to_owned(), |limit| limit.to_string());
        self.write_unless_absent(dir, file, &value, limit.is_some());
    }

    /// A missing file only matters when something is to be limited by it.
    fn write_unless_absent(&mut self, dir: &Path, file: &str, value: &str, matters: bool) {
        if matters || dir.join(file).exists() {
            self.write(dir, file, value);
        }
    }

    fn write(&mut self, dir: &Path, file: &str, value: &str) {
        let path = dir.join(file);
        if fs::read_to_string(&path).is_ok_and(|now| now.trim_end() == value) {
            return;
        }
        // Not created: where the file is missing the kernel lacks the feature.
        let written = fs::OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(&path)
            .and_then(|mut out| io::Write::write_all(&mut out, value.as_bytes()));
        if let Err(error) = written {
            self.warn(format!("cannot write {value} to {}: {error}", path.display()));
        }
    }

    fn warn(&mut self, text: String) {
        self.warnings.push(Warning(text));
    }
}

fn period(limits: &PodCgroup) -> u64 {
    if limits.cpu_period == 0 { 100_000 } else { limits.cpu_period }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// Processes in a cgroup and below. Never this one, nor 0 (one that this PID namespace cannot see) nor 1.
fn processes(dir: &Path, depth: usize) -> Vec<i32> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let own = Pid::this().as_raw();
    let mut found: Vec<i32> =
        text.lines().filter_map(|line| line.trim().parse().ok()).filter(|pid| *pid > 1 && *pid != own).collect();
    if depth < DEEPEST {
        for child in children(dir) {
            found.extend(processes(&child, depth + 1));
        }
    }
    found
}

fn kill_all(pids: &BTreeSet<i32>) {
    for pid in pids {
        match kill(Pid::from_raw(*pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => tracing::warn!(pid, %error, "cannot kill a process left in a pod's cgroup"),
        }
    }
}

/// On v1 a frozen process does not even die.
fn thaw(dir: &Path, depth: usize) {
    let state = dir.join("freezer.state");
    if fs::read_to_string(&state).is_ok_and(|state| state.trim_end() != "THAWED") {
        // It shows in that the processes do not die.
        let _ = fs::write(&state, "THAWED");
    }
    if depth < DEEPEST {
        for child in children(dir) {
            thaw(&child, depth + 1);
        }
    }
}

/// The name of a slice, given by where its cgroup is.
fn slice_of(relative: &Path) -> String {
    relative.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// What `systemctl` is told so that a slice has these limits, and none besides, until the box is started again.
fn set_property(slice: &str, limits: &PodCgroup, version: u8) -> Vec<String> {
    let or = |limit: Option<i64>| {
        limit.filter(|limit| *limit > 0).map_or_else(|| "infinity".to_owned(), |limit| limit.to_string())
    };
    let (weight, memory) = if version == 1 {
        (limits.cpu_shares.map(|shares| format!("CPUShares={shares}")), "MemoryLimit")
    } else {
        (limits.cpu_shares.map(|shares| format!("CPUWeight={}", weight(shares))), "MemoryMax")
    };
    // In whole hundredths of a processor, as a kubelet and runc have it: systemd knew no others for long. Rounded up, so that the containers
    // get theirs. The period is systemd's, a tenth of a second, which is a kubelet's, too. No value takes the limit away.
    let quota = limits.cpu_quota.and_then(|quota| u64::try_from(quota).ok()).filter(|quota| *quota > 0);
    let quota = quota.map(|quota| format!("{}%", quota.saturating_mul(100).div_ceil(period(limits))));
    let mut arguments = vec!["set-property".to_owned(), "--runtime".to_owned(), slice.to_owned()];
    arguments.extend(weight);
    arguments.push(format!("CPUQuota={}", quota.unwrap_or_default()));
    arguments.push(format!("{memory}={}", or(limits.memory_limit)));
    arguments.push(format!("TasksMax={}", or(limits.pids_limit)));
    arguments
}

/// Has systemd do something, or says why it did not. Blocks for up to ten seconds.
fn systemctl(arguments: &[String]) -> io::Result<()> {
    let quiet = || Stdio::null();
    let mut command = Command::new("systemctl");
    let mut child = command.args(arguments).stdin(quiet()).stdout(quiet()).stderr(Stdio::piped()).spawn()?;
    for _ in 0..LOOKS {
        if let Some(status) = child.try_wait()? {
            if status.success() {
                return Ok(());
            }
            let mut said = String::new();
            if let Some(mut stderr) = child.stderr.take() {
                stderr.read_to_string(&mut said)?;
            }
            return Err(io::Error::other(said.trim_end()));
        }
        pause();
    }
    child.kill()?;
    child.wait()?;
    Err(io::ErrorKind::TimedOut.into())
}

fn remove(dir: &Path, depth: usize) -> Result<(), CgroupError> {
    if depth < DEEPEST {
        for child in children(dir) {
            remove(&child, depth + 1)?;
        }
    }
    match fs::remove_dir(dir) {
        Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
            Err(CgroupError::Busy { path: dir.to_owned(), left: processes(dir, 0).len() })
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => Ok(Err(error).at("remove the cgroup", dir)?),
        _ => Ok(()),
    }
}

#[expect(clippy::disallowed_methods, reason = "runs on a thread that may wait, and is bounded")]
fn pause() {
    std::thread::sleep(KILL_PAUSE);
}

#[cfg(test)]
mod tests;
