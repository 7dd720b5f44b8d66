//! What `/proc` says: the node's memory, interfaces of a network namespace, this process.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use nix::unistd::{SysconfVar, sysconf};

use super::cgroup::{Memory, TICK, keyed};
use crate::clock;

/// Counters of a network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) received: Traffic,
    pub(super) sent: Traffic,
}

/// One direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Traffic {
    pub(super) bytes: u64,
    pub(super) packets: u64,
    pub(super) errors: u64,
    pub(super) dropped: u64,
}

/// The node's memory; v2 has no cgroup that counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct NodeMemory {
    pub(super) total: u64,
    /// In the terms of a cgroup; never limited.
    pub(super) used: Memory,
    pub(super) swap_total: u64,
}

/// A process at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Process {
    /// When it was read, monotonic.
    pub(super) since: Duration,
    /// CPU time in nanoseconds.
    pub(super) cpu: Option<u64>,
    /// Its rate, in billionths of a core, once there are two samples.
    pub(super) rate: Option<u64>,
    /// Bytes in memory.
    pub(super) resident: u64,
    /// Bytes of address space.
    pub(super) addressed: u64,
    /// Nanoseconds after the boot at which it was started.
    pub(super) started: u64,
    pub(super) faults: u64,
    pub(super) major_faults: u64,
    pub(super) open_files: Option<u64>,
    /// Anonymous: what only it has.
    pub(super) own: Option<u64>,
}

/// The interfaces of the network namespace of a process, without loopback and the near ends of pods' interfaces; `None` when it is gone.
pub(super) fn interfaces(pid: &str) -> Option<Vec<Interface>> {
    Some(net_dev(&fs::read_to_string(format!("/proc/{pid}/net/dev")).ok()?))
}

/// The node's memory now.
pub(super) fn node_memory() -> Option<NodeMemory> {
    let vmstat = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    meminfo(&fs::read_to_string("/proc/meminfo").ok()?, &vmstat)
}

/// The device file of a block device, by its numbers (`major:minor`); those where it has none.
pub(super) fn device_name(numbers: &str) -> String {
    let name = fs::read_link(format!("/sys/dev/block/{numbers}")).ok();
    let name = name.as_ref().and_then(|path| path.file_name()).and_then(|name| name.to_str());
    // The kernel writes a slash so.
    name.map_or_else(|| numbers.to_owned(), |name| format!("/dev/{}", name.replace('!', "/")))
}

/// The numbers of the block device that a file system is on.
pub(super) fn device_of(path: &Path) -> Option<String> {
    let device = path.ancestors().find_map(|path| fs::metadata(path).ok())?.dev();
    Some(format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device)))
}

/// CPU time of all CPUs since the boot in nanoseconds, and when the boot was, in seconds of Unix time.
pub(super) fn node_stat() -> (Option<u64>, Option<i64>) {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    (busy(&text), keyed(&text, "btime").and_then(|at| i64::try_from(at).ok()))
}

/// This process now.
pub(super) fn own() -> Option<Process> {
    let mut own = process("self")?;
    let cpu = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).ok();
    own.cpu = cpu.and_then(|cpu| u64::try_from(Duration::from(cpu).as_nanos()).ok());
    // Without the one that lists them.
    own.open_files = fs::read_dir("/proc/self/fd").ok().map(|all| all.count().saturating_sub(1) as u64);
    Some(own)
}

/// A process now, but for its files.
pub(super) fn process(pid: &str) -> Option<Process> {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|size| u64::try_from(size).ok()).unwrap_or(4096);
    let mut process = stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?, page)?;
    process.since = clock::monotonic();
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    process.own = anonymous(&statm).map(|pages| pages * page);
    Some(process)
}

fn net_dev(text: &str) -> Vec<Interface> {
    let lines = text.lines().filter_map(|line| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<u64> =
            counters.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>().unwrap_or_default();
        let traffic = |counters: &[u64]| match counters {
            [bytes, packets, errors, dropped, ..] => {
                Some(Traffic { bytes: *bytes, packets: *packets, errors: *errors, dropped: *dropped })
            }
            _ => None,
        };
        let (received, sent) = (traffic(counters.get(..8)?)?, traffic(counters.get(8..)?)?);
        Some(Interface { name: name.trim().to_owned(), received, sent })
    });
    // As cadvisor: a hundred pods would be a hundred interfaces of random names.
    let counts = |name: &str| name != "lo" && !["veth", "docker", "nerdctl"].iter().any(|near| name.starts_with(near));
    lines.filter(|interface| counts(&interface.name)).collect()
}

fn meminfo(text: &str, vmstat: &str) -> Option<NodeMemory> {
    let bytes = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kibibytes| kibibytes.saturating_mul(1024))
    };
    let total = bytes("MemTotal")?;
    let usage = total.saturating_sub(bytes("MemFree")?);
    let swap_total = bytes("SwapTotal").unwrap_or_default();
    let inactive_file = bytes("Inactive(file)");
    let used = Memory {
        usage,
        working_set: usage.saturating_sub(inactive_file.unwrap_or_default()),
        inactive_file,
        active_file: bytes("Active(file)"),
        rss: bytes("AnonPages"),
        cache: bytes("Cached"),
        mapped: bytes("Mapped"),
        swap: Some(swap_total.saturating_sub(bytes("SwapFree").unwrap_or(swap_total))),
        faults: keyed(vmstat, "pgfault"),
        major_faults: keyed(vmstat, "pgmajfault"),
        ..Memory::default()
    };
    Some(NodeMemory { total, used, swap_total })
}

/// Of `cpu user nice system idle iowait irq softirq steal …`, in ticks, what was neither idle nor stolen.
fn busy(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else { return None };
    Some((user + nice + system + irq + softirq).saturating_mul(TICK))
}

fn stat(stat: &str, page: u64) -> Option<Process> {
    // The name is in parentheses and may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    // Counted as in proc(5), where the state is the third.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(Process {
        cpu: Some((field(14)? + field(15)?).saturating_mul(TICK)),
        resident: field(24)?.saturating_mul(page),
        addressed: field(23)?,
        started: field(22)?.saturating_mul(TICK),
        faults: field(10)?,
        major_faults: field(12)?,
        ..Process::default()
    })
}

/// Of `size resident shared …`, in pages.
fn anonymous(statm: &str) -> Option<u64> {
    let mut pages = statm.split_ascii_whitespace().skip(1).map(|pages| pages.parse::<u64>().ok());
    Some(pages.next()??.saturating_sub(pages.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_of_a_namespace() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
            lo:     840      10    0    0    0     0          0         0      840      10    0    0    0     0       0          0\n  \
            eth0: 1296817   12345    1    2    0     0          0         0   654321    4321    3    4    0     0       0          0\n\
            veth81f2: 1 2 0 0 0 0 0 0 1 2 0 0 0 0 0 0\n            broken: 1 2\n";
        let found = net_dev(text);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "eth0");
        assert_eq!(found[0].received, Traffic { bytes: 1_296_817, packets: 12_345, errors: 1, dropped: 2 });
        assert_eq!(found[0].sent, Traffic { bytes: 654_321, packets: 4321, errors: 3, dropped: 4 });
        assert!(interfaces("self").is_some() && interfaces("nobody").is_none());
    }

    #[test]
    fn memory_of_the_node() {
        let text = "MemTotal:        2000 kB\nMemFree:          500 kB\nMemAvailable:    1500 kB\nCached:  700 kB\n\
            SwapCached:   0 kB\nInactive:  900 kB\nInactive(anon):  400 kB\nInactive(file):   300 kB\nAnonPages:  450 kB\n\
            Mapped: 20 kB\nSwapTotal:  100 kB\nSwapFree:  60 kB\n";
        let memory = meminfo(text, "nr_free_pages 1\npgfault 7\npgmajfault 3\n").unwrap();
        assert_eq!((memory.total, memory.swap_total), (2_048_000, 102_400));
        assert_eq!((memory.used.usage, memory.used.working_set), (1_536_000, 1_228_800));
        assert_eq!((memory.used.swap, memory.used.rss), (Some(40_960), Some(460_800)));
        assert_eq!((memory.used.faults, memory.used.major_faults), (Some(7), Some(3)));
        assert_eq!(meminfo("MemTotal: x kB\n", ""), None);
    }

    #[test]
    fn processor_time_of_the_node() {
        let stat = "cpu  100 10 50 9000 40 5 5 999 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\nintr 1\nbtime 1633253812\n";
        assert_eq!(busy(stat), Some(1_700_000_000));
        assert_eq!(keyed(stat, "btime"), Some(1_633_253_812));
        assert_eq!(busy("cpu 1 2\n"), None);
    }

    #[test]
    fn a_process() {
        let stat =
            "4711 (a) (b c) S 1 4711 4711 0 -1 4194560 1234 0 56 0 78 9 0 0 20 0 3 0 8900 123456789 2048 1844674407\n";
        let own = super::stat(stat, 4096).unwrap();
        assert_eq!(own.cpu, Some(870_000_000));
        assert_eq!((own.faults, own.major_faults), (1234, 56));
        assert_eq!((own.started, own.addressed, own.resident), (89_000_000_000, 123_456_789, 8 << 20));
        assert_eq!(anonymous("30140 2048 1048 1 0 2000 0\n"), Some(1000));
        let real = super::own().unwrap();
        let other = process(&std::process::id().to_string()).unwrap();
        assert!(other.started == real.started && other.resident > 0 && process("nobody").is_none());
        assert!(real.resident > 0 && real.cpu > Some(0) && real.open_files > Some(2) && real.own > Some(0));
    }
}
