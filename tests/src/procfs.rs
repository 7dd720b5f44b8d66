//! What /proc tells of processes, mounts and memory.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A process as /proc shows it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its id.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// Its arguments.
    pub arguments: Vec<String>,
}

impl Entry {
    /// The name of the program, without its path.
    pub fn program(&self) -> &str {
        let first = self.arguments.first().map_or("", String::as_str);
        first.rsplit('/').next().unwrap_or(first)
    }

    /// Whether an argument names a path in this directory.
    pub fn mentions(&self, dir: &Path) -> bool {
        let inside = format!("{}/", dir.display());
        self.arguments.iter().any(|argument| argument.contains(&inside))
    }

    /// Whether its standard error is a file in this directory.
    pub fn complains_into(&self, dir: &Path) -> bool {
        fs::read_link(format!("/proc/{}/fd/2", self.pid)).is_ok_and(|file| file.starts_with(dir))
    }
}

/// Every process there is.
pub fn processes() -> Vec<Entry> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let parent = stat_field(pid, 1)?.parse().ok()?;
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let arguments = line
                .split(|byte| *byte == 0)
                .map(|part| String::from_utf8_lossy(part).into_owned())
                .collect::<Vec<_>>();
            Some(Entry { pid, parent, arguments })
        })
        .collect()
}

/// The processes below `roots`, without them.
pub fn descendants(all: &[Entry], roots: &BTreeSet<i32>) -> BTreeSet<i32> {
    let mut found = BTreeSet::new();
    loop {
        let before = found.len();
        for entry in all {
            if (roots.contains(&entry.parent) || found.contains(&entry.parent)) && !roots.contains(&entry.pid) {
                found.insert(entry.pid);
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

/// When a process started, in ticks since boot: with the pid it identifies a process for good.
pub fn start_time(pid: i32) -> Option<u64> {
    stat_field(pid, 19)?.parse().ok()
}

/// Whether a process runs (a zombie does not).
pub fn is_running(pid: i32) -> bool {
    stat_field(pid, 0).is_some_and(|state| state != "Z" && state != "X")
}

/// User and system time of a process so far, in seconds.
pub fn cpu_seconds(pid: i32) -> Option<f64> {
    let ticks: u32 = stat_field(pid, 11)?.parse::<u32>().ok()? + stat_field(pid, 12)?.parse::<u32>().ok()?;
    // USER_HZ is 100 on every Linux that Rust runs on.
    Some(f64::from(ticks) / 100.0)
}

/// Resident memory of a process in kB.
pub fn rss_kb(pid: i32) -> Option<u32> {
    rollup_kb(pid, "Rss:")
}

/// The part of it that no file has: without code and constants, which come and go as they are used.
pub fn anonymous_kb(pid: i32) -> Option<u32> {
    rollup_kb(pid, "Anonymous:")
}

fn rollup_kb(pid: i32, field: &str) -> Option<u32> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    rollup.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB")?.trim().parse().ok())
}

/// The most resident memory that a process has had since [`forget_peak`], or ever, in kB.
pub fn peak_rss_kb(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
}

/// Has [`peak_rss_kb`] begin anew (proc(5), `clear_refs`).
pub fn forget_peak(pid: i32) -> std::io::Result<()> {
    fs::write(format!("/proc/{pid}/clear_refs"), "5")
}

/// How many descriptors a process has open.
pub fn descriptors(pid: i32) -> Option<usize> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count())
}

/// How many threads a process has.
pub fn threads(pid: i32) -> Option<usize> {
    Some(fs::read_dir(format!("/proc/{pid}/task")).ok()?.count())
}

/// Bytes that a process has caused to be written to disks so far.
pub fn written_bytes(pid: i32) -> Option<u64> {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    io.lines().find_map(|line| line.strip_prefix("write_bytes: ")?.parse().ok())
}

/// Where a process is in the hierarchy of a controller, which may be that of all of them (cgroups v1 and v2).
pub fn cgroup(pid: i32, controller: &str) -> Option<PathBuf> {
    let lines = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path_of = |wanted: &str| {
        lines.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|name| name == wanted).then(|| path.trim_start_matches('/'))
        })
    };
    let root = Path::new("/sys/fs/cgroup");
    match path_of(controller) {
        Some(path) => Some(root.join(controller).join(path)),
        None => Some(root.join(path_of("")?)),
    }
}

/// What tells the network of a process (or of `self`) from others.
pub fn network_namespace(pid: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/net")).ok()
}

/// Mount points inside a directory, the latest first, as this thread sees them: it may have mounts of its own.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let mut found: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| PathBuf::from(path.replace("\\040", " ")))
        .filter(|path| path.starts_with(dir))
        .collect();
    found.reverse();
    found
}

/// A field of /proc/PID/stat, counted from the state (0), which follows the command's closing bracket.
fn stat_field(pid: i32, index: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(index).map(str::to_owned)
}
