//! Removes what a run left: processes, mounts, network, cgroups, files. Everything is found by the run's directory, so nothing
//! of anybody else's is touched.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xxhash_rust::xxh3::xxh3_64;

use crate::paths::RUN_PREFIX;
use crate::process::run;
use crate::procfs::Entry;
use crate::{network, procfs};

/// Programs that a run starts, beside our mappers. Others that happen to mention its directory (an editor, a `tail -f`) are left alone.
const PROGRAMS: [&str; 15] = [
    "cloudcore",
    "containerd",
    "containerd-shim-runc-v2",
    "edgecore",
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubectl",
    "kubelet",
    "metrics-server",
    "prometheus",
    "python",
    "python3",
    "qemu-system-x86_64",
];
/// How the names of our mappers begin.
const MAPPER_PREFIX: &str = "skerry-mapper-";
/// Where an edgecore keeps what the broker reads that it starts.
const BROKERS: &str = "/run/skerry-mqtt-";

/// Removes the directories of runs whose process is gone, and all that belongs to them.
pub fn stale() {
    let entries = fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
    let ours = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(RUN_PREFIX));
    let dirs: Vec<PathBuf> = ours.map(|entry| entry.path()).filter(|path| path.is_dir() && !has_owner(path)).collect();
    for dir in &dirs {
        // Another may have taken it away meanwhile, and somebody begun anew.
        if !has_owner(dir)
            && !is_next_door(dir, &dirs)
            && let Err(error) = sweep(dir)
        {
            eprintln!("could not remove {}, left by a run that was killed: {error:#}", dir.display());
        }
    }
}

/// Removes everything that belongs to a directory, and the directory.
pub fn sweep(dir: &Path) -> Result<()> {
    // One at a time: whoever comes second would miss what the first has forgotten the names of.
    let _lock = match File::open(dir).map(|dir| Flock::lock(dir, FlockArg::LockExclusive)) {
        Ok(lock) => lock.ok(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot open {}", dir.display())),
    };
    if !dir.exists() {
        return Ok(());
    }
    kill_all(dir);
    let mut owners = container_ids(dir);
    owners.extend(pod_ids(dir));
    unmount_below(dir);
    for conf_dir in directories_called(dir, "cni") {
        for network in network::networks(&conf_dir) {
            network::forget(&network);
        }
    }
    remove_cgroups(&owners);
    remove_empty_tiers();
    remove_kubelet_traces();
    remove_shim_sockets(dir);
    remove_brokers(dir);
    remove_links_into(dir, Path::new("/var/log/containers"));
    remove_locks(dir);
    network::end_losses();
    fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}

/// Removes the locks that an edgecore took on sockets and directories here: their names are these. And those on cgroups that nobody holds.
fn remove_locks(dir: &Path) {
    let prefix = format!("edgecore{}-", dir.display()).replace('/', "-");
    for entry in fs::read_dir("/run").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_free = || {
            let lock = File::open(entry.path()).map(|lock| Flock::lock(lock, FlockArg::LockExclusiveNonblock));
            matches!(lock, Ok(Ok(_)))
        };
        // The tree of cgroups that a lock was on has no name.
        let is_ours = name.starts_with(&prefix) || name.starts_with("edgecore-cgroups-") && is_free();
        if is_ours && name.ends_with(".lock") {
            fs::remove_file(entry.path()).ok();
        }
    }
}

/// Kills the processes of a run and what they started, by their ids.
pub fn kill_all(dir: &Path) {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    // Several rounds: whoever is killed last may have started another one.
    for _ in 0..20 {
        let all = procfs::processes();
        let roots: BTreeSet<i32> =
            all.iter().filter(|entry| entry.pid != own && belongs(entry, dir)).map(|entry| entry.pid).collect();
        if roots.is_empty() {
            return;
        }
        // The roots first stand still, so that none of them answers to the death of its children.
        signal_all(&roots, Signal::SIGSTOP);
        let mut below = procfs::descendants(&all, &roots);
        below.remove(&own);
        signal_all(&below, Signal::SIGKILL);
        signal_all(&roots, Signal::SIGKILL);
        for _ in 0..100 {
            if !roots.iter().chain(&below).any(|pid| procfs::is_running(*pid)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Whether a run that has its files here started it. What has no argument to tell by, a simulator say, has its log here: so does whatever
/// else writes its standard error into the directory, which is not for others to write in.
fn belongs(entry: &Entry, dir: &Path) -> bool {
    let program = entry.program();
    let is_ours = PROGRAMS.contains(&program) || program.starts_with(MAPPER_PREFIX);
    (is_ours && entry.mentions(dir)) || entry.complains_into(dir)
}

/// Unmounts everything inside a directory.
pub fn unmount_below(dir: &Path) {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    // A mount may hide another one at the same place.
    for _ in 0..5 {
        let mounts = procfs::mounts_below(&dir);
        if mounts.is_empty() {
            return;
        }
        for mount in &mounts {
            umount2(mount, MntFlags::MNT_DETACH).ok();
        }
    }
}

/// The ids of the containers and sandboxes that the runtimes inside a directory run; asked when all of them are dead.
pub fn container_ids(dir: &Path) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    for tasks in directories_called(dir, "io.containerd.runtime.v2.task") {
        for entry in fs::read_dir(tasks.join("k8s.io")).into_iter().flatten().flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            remove_loopback_result(&id);
            ids.insert(id);
        }
    }
    ids
}

/// The UIDs of the pods that the agents inside a directory had files for, as cgroups of either driver spell them.
pub fn pod_ids(dir: &Path) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    let mut places = directories_called(dir, "pods");
    places.extend(places.clone().iter().map(|place| place.join("pods")));
    places.extend([dir.to_owned(), dir.join("pods")]);
    for place in places {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.len() == 36 && name.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit()) {
                ids.insert(name.replace('-', "_"));
                ids.insert(name);
            }
        }
    }
    ids
}

/// Removes the cgroups of these pods and containers, and the tiers above that became empty by it.
pub fn remove_cgroups(owners: &BTreeSet<String>) {
    // The kernel holds on to the group of a process that it is still burying.
    for _ in 0..20 {
        let mut left = false;
        for hierarchy in hierarchies() {
            for tier in ["kubepods", "kubepods.slice", "k8s.io"] {
                remove_cgroup(&hierarchy.join(tier), owners, &mut left);
            }
        }
        if !left {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Where the upstream kubelet listens, on the loopback interface: it refuses 127.0.0.1 as a node's address, and has none then.
pub const KUBELET_ADDRESS: &str = "10.255.255.254";

/// Gives the loopback interface the upstream kubelet's address, or takes it away: `replace` or `delete`.
pub fn set_kubelet_address(verb: &str) -> Result<()> {
    let output = run(Command::new("ip").args(["address", verb, &format!("{KUBELET_ADDRESS}/32"), "dev", "lo"]), 10)?;
    ensure!(output.success, "ip address {verb} {KUBELET_ADDRESS}/32 dev lo: {}", output.text());
    Ok(())
}

/// The upstream kubelet's address, and its device plugin socket, which lies here whatever its root directory is, once nobody listens on it.
pub fn remove_kubelet_traces() {
    let root = Path::new("/var/lib/kubelet");
    let socket = root.join("device-plugins/kubelet.sock");
    if UnixStream::connect(&socket).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
        set_kubelet_address("delete").ok();
        fs::remove_file(&socket).ok();
        fs::remove_dir(root.join("device-plugins")).ok();
        fs::remove_dir(root).ok();
    }
}

/// Shims of containerd 1.x keep their sockets outside the state directory, under a name that is in it.
pub fn remove_shim_sockets(dir: &Path) {
    for tasks in directories_called(dir, "io.containerd.runtime.v2.task") {
        for entry in fs::read_dir(tasks.join("k8s.io")).into_iter().flatten().flatten() {
            let address = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
            if let Some(socket) = address.trim().strip_prefix("unix://") {
                fs::remove_file(socket).ok();
            }
        }
    }
}

/// Brokers that an edgecore started which could not end them, and what they read: named after the edgecore's data directory.
fn remove_brokers(dir: &Path) {
    for data in directories_called(dir, "data") {
        let name = xxh3_64(data.as_os_str().as_encoded_bytes());
        let place = PathBuf::from(format!("{BROKERS}{name:016x}"));
        let brokers = procfs::processes().into_iter().filter(|entry| entry.mentions(&place));
        signal_all(&brokers.map(|entry| entry.pid).collect(), Signal::SIGKILL);
        fs::remove_dir_all(place).ok();
    }
}

/// Links in `links` that lead into `dir`, such as the kubelet's to its logs.
fn remove_links_into(dir: &Path, links: &Path) {
    for entry in fs::read_dir(links).into_iter().flatten().flatten() {
        if fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(dir)) {
            fs::remove_file(entry.path()).ok();
        }
    }
}

/// The levels above pods, once no pod is left: the kernel keeps what is in use.
fn remove_empty_tiers() {
    for hierarchy in hierarchies() {
        for tier in ["kubepods/burstable", "kubepods/besteffort", "kubepods"] {
            fs::remove_dir(hierarchy.join(tier)).ok();
        }
    }
}

fn has_owner(dir: &Path) -> bool {
    let owner = fs::read_to_string(dir.join("owner")).unwrap_or_default();
    let mut words = owner.split_whitespace();
    let pid: Option<i32> = words.next().and_then(|word| word.parse().ok());
    let born: Option<u64> = words.next().and_then(|word| word.parse().ok());
    pid.is_some_and(|pid| procfs::is_running(pid) && procfs::start_time(pid) == born)
}

/// Whether what still runs of it runs in a network of its own (see scripts/room) where somebody else is, too: bridges and cgroups in there
/// are out of reach from here, and whoever comes next in there would not know of them without the directory. Where nobody but `left` is,
/// all goes with the last of them.
fn is_next_door(dir: &Path, left: &[PathBuf]) -> bool {
    let here = procfs::network_namespace("self");
    let of =
        |entry: &Entry| procfs::network_namespace(&entry.pid.to_string()).filter(|there| Some(there) != here.as_ref());
    let all = procfs::processes();
    let there: BTreeSet<PathBuf> = all.iter().filter(|entry| belongs(entry, dir)).filter_map(of).collect();
    if there.is_empty() {
        return false;
    }
    let is_left = |entry: &&Entry| left.iter().any(|dir| belongs(entry, dir));
    let mut nobodys: BTreeSet<i32> = all.iter().filter(is_left).map(|entry| entry.pid).collect();
    nobodys.extend(procfs::descendants(&all, &nobodys));
    all.iter().filter(|entry| !nobodys.contains(&entry.pid)).filter_map(of).any(|network| there.contains(&network))
}

/// The CNI library notes each sandbox's loopback in a place of its own, which a sandbox that was not stopped leaves behind.
fn remove_loopback_result(id: &str) {
    fs::remove_file(format!("/var/lib/cni/results/cni-loopback-{id}-lo")).ok();
}

fn signal_all(pids: &BTreeSet<i32>, signal: Signal) {
    for pid in pids {
        kill(Pid::from_raw(*pid), signal).ok();
    }
}

/// Directories of this name, at most four levels down, without following links.
fn directories_called(dir: &Path, name: &str) -> Vec<PathBuf> {
    fn walk(dir: &Path, name: &str, depth: u8, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name() == name {
                    found.push(entry.path());
                } else if depth > 0 {
                    walk(&entry.path(), name, depth - 1, found);
                }
            }
        }
    }
    let mut found = Vec::new();
    walk(dir, name, 3, &mut found);
    found
}

/// The cgroup hierarchies of this machine: one, or one a controller.
fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// Removes below `group` what belongs to `owners`; whether anything was removed, so that the caller removes its own level if that
/// became empty. The kernel refuses to remove a group that is in use; `left` tells that one of the owners' stayed.
fn remove_cgroup(group: &Path, owners: &BTreeSet<String>, left: &mut bool) -> bool {
    let name = group.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let own = owners.iter().any(|id| name.contains(id.as_str()));
    let mut removed = false;
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            removed |= remove_cgroup(&entry.path(), owners, left);
        }
    }
    let gone = (own || removed) && fs::remove_dir(group).is_ok();
    *left |= own && !gone;
    gone || removed
}
