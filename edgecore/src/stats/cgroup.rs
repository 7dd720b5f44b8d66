//! What a cgroup's files say, of v1 and v2.
//!
//! Reading never fails as a whole: a file that is missing, or that makes no sense, leaves its own value empty.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::clock;
use crate::kubelet::cgroup::Cgroups;

/// Nanoseconds of one tick of `cpuacct.stat`: USER_HZ is 100 wherever this runs.
pub(super) const TICK: u64 = 10_000_000;
/// v1 says "no limit" with the largest multiple of the page size.
const UNLIMITED: u64 = 1 << 62;

/// How much of a cgroup is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Depth {
    /// CPU time: for a sample.
    Cpu,
    /// And memory: what autoscaling needs.
    Core,
    /// And processes and pressure.
    Full,
    /// And IO, limits, throttling, for the page of cAdvisor's metrics.
    All,
}

/// A cgroup at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Usage {
    /// When it was read.
    pub(super) at: Timestamp,
    /// The same, monotonic.
    pub(super) since: Duration,
    pub(super) cpu: Option<Cpu>,
    pub(super) memory: Option<Memory>,
    /// In it, not below.
    pub(super) processes: Option<u64>,
    /// In it and below.
    pub(super) threads: Option<u64>,
    /// How many there may be; none: as many as there can.
    pub(super) threads_max: Option<u64>,
    /// Processes that were killed because there was no memory.
    pub(super) oom_kills: Option<u64>,
    pub(super) pressure: Pressure,
    /// Of each block device.
    pub(super) io: Vec<Io>,
    pub(super) limits: Limits,
}

/// CPU time, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cpu {
    pub(super) usage: u64,
    pub(super) user: Option<u64>,
    pub(super) system: Option<u64>,
    /// Only where a limit holds.
    pub(super) throttling: Option<Throttling>,
    /// The rate, in billionths of a core, once there are two samples.
    pub(super) rate: Option<u64>,
}

/// Periods of the CPU limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Throttling {
    pub(super) periods: u64,
    pub(super) throttled: u64,
    /// Nanoseconds.
    pub(super) time: u64,
}

/// Memory, in bytes, of the cgroup and all below.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) usage: u64,
    /// What is not easily given up: usage without inactive files.
    pub(super) working_set: u64,
    pub(super) rss: Option<u64>,
    pub(super) cache: Option<u64>,
    pub(super) mapped: Option<u64>,
    pub(super) swap: Option<u64>,
    /// What may be in swap; of v1 with what may be in memory. None: as much as there is.
    pub(super) swap_limit: Option<u64>,
    pub(super) active_file: Option<u64>,
    pub(super) inactive_file: Option<u64>,
    /// How often the limit was met.
    pub(super) failures: Option<u64>,
    /// What is kept for it.
    pub(super) reserved: Option<u64>,
    /// The most that it ever was.
    pub(super) peak: Option<u64>,
    pub(super) faults: Option<u64>,
    pub(super) major_faults: Option<u64>,
    /// None: as much as there is.
    pub(super) limit: Option<u64>,
}

/// Bytes and operations from and to a block device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Io {
    /// Its numbers, `major:minor`.
    pub(super) device: String,
    pub(super) read: u64,
    pub(super) written: u64,
    pub(super) reads: u64,
    pub(super) writes: u64,
}

/// CPU limits in v1's terms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) shares: Option<u64>,
    /// Microseconds.
    pub(super) period: Option<u64>,
    /// Microseconds in each period; none without a limit.
    pub(super) quota: Option<u64>,
}

/// Pressure stall information, which v2 has.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Pressure {
    pub(super) cpu: Option<Stall>,
    pub(super) memory: Option<Stall>,
    pub(super) io: Option<Stall>,
}

/// How much tasks waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Stall {
    /// All of them at once.
    pub(super) full: Share,
    /// Some of them.
    pub(super) some: Share,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Share {
    /// In all; as the kernel counts, in microseconds.
    pub(super) total: u64,
    avg10: f64,
    avg60: f64,
    avg300: f64,
}

/// Reads a cgroup, given by its path below the hierarchies' roots.
pub(super) fn read(cgroups: &Cgroups, path: &str, depth: Depth) -> Usage {
    let place = |controller: &str| cgroups.place(controller, path);
    let mut usage = Usage { at: clock::wall(), since: clock::monotonic(), ..Usage::default() };
    if cgroups.version() == 2 {
        if let Some(dir) = place("") {
            read_v2(&dir, depth, &mut usage);
        }
    } else {
        read_v1(place, depth, &mut usage);
    }
    if depth >= Depth::Full {
        usage.processes = processes(cgroups, path);
    }
    usage
}

/// Processes in a cgroup.
pub(super) fn processes(cgroups: &Cgroups, path: &str) -> Option<u64> {
    Some(procs(cgroups, path)?.split_ascii_whitespace().count() as u64)
}

/// The processes of a cgroup; those of another PID namespace show as 0.
pub(super) fn procs(cgroups: &Cgroups, path: &str) -> Option<String> {
    fs::read_to_string(place(cgroups, path)?.join("cgroup.procs")).ok()
}

/// The hierarchy that every process is in, whatever the runtime does with the others.
pub(super) fn place(cgroups: &Cgroups, path: &str) -> Option<PathBuf> {
    ["cpuacct", "memory"].iter().find_map(|controller| cgroups.place(controller, path))
}

fn read_v1(place: impl Fn(&str) -> Option<PathBuf>, depth: Depth, usage: &mut Usage) {
    let text = |controller: &str, file: &str| {
        let dir = place(controller)?;
        fs::read_to_string(dir.join(file)).ok()
    };
    let value = |controller: &str, file: &str| number(&text(controller, file)?);
    usage.cpu = value("cpuacct", "cpuacct.usage").map(|usage| Cpu { usage, ..Cpu::default() });
    if depth >= Depth::Core {
        let stat = text("memory", "memory.stat").unwrap_or_default();
        usage.memory = value("memory", "memory.usage_in_bytes").map(|usage| memory_v1(usage, &stat));
        if let Some(memory) = &mut usage.memory {
            memory.limit = value("memory", "memory.limit_in_bytes").filter(|limit| *limit < UNLIMITED);
            memory.swap_limit = value("memory", "memory.memsw.limit_in_bytes").filter(|limit| *limit < UNLIMITED);
        }
    }
    if depth >= Depth::All {
        if let Some(cpu) = &mut usage.cpu {
            let stat = text("cpuacct", "cpuacct.stat").unwrap_or_default();
            cpu.user = keyed(&stat, "user").map(|ticks| ticks.saturating_mul(TICK));
            cpu.system = keyed(&stat, "system").map(|ticks| ticks.saturating_mul(TICK));
            cpu.throttling = text("cpu", "cpu.stat").and_then(|stat| throttling(&stat));
        }
        let of_devices = |file: &str| text("blkio", file).unwrap_or_default();
        usage.io = io_v1(
            &of_devices("blkio.throttle.io_service_bytes_recursive"),
            &of_devices("blkio.throttle.io_serviced_recursive"),
        );
        usage.oom_kills = text("memory", "memory.oom_control").and_then(|text| keyed(&text, "oom_kill"));
        if let Some(memory) = &mut usage.memory {
            memory.peak = value("memory", "memory.max_usage_in_bytes");
            memory.failures = value("memory", "memory.failcnt");
            memory.reserved = value("memory", "memory.soft_limit_in_bytes").filter(|limit| *limit < UNLIMITED);
        }
        usage.threads = value("pids", "pids.current");
        usage.threads_max = value("pids", "pids.max");
        usage.limits = Limits {
            shares: value("cpu", "cpu.shares"),
            period: value("cpu", "cpu.cfs_period_us"),
            // -1 is none.
            quota: value("cpu", "cpu.cfs_quota_us"),
        };
    }
}

fn read_v2(dir: &Path, depth: Depth, usage: &mut Usage) {
    let text = |file: &str| fs::read_to_string(dir.join(file)).ok();
    let value = |file: &str| number(&text(file)?);
    usage.cpu = text("cpu.stat").and_then(|stat| cpu_v2(&stat));
    if depth >= Depth::Core {
        let stat = text("memory.stat").unwrap_or_default();
        usage.memory = value("memory.current").map(|usage| memory_v2(usage, &stat));
        if let Some(memory) = &mut usage.memory {
            memory.swap = value("memory.swap.current");
            memory.limit = value("memory.max");
            memory.swap_limit = value("memory.swap.max");
        }
    }
    if depth >= Depth::Full {
        let pressure = |file: &str| text(file).and_then(|text| stall(&text));
        usage.pressure = Pressure {
            cpu: pressure("cpu.pressure"),
            memory: pressure("memory.pressure"),
            io: pressure("io.pressure"),
        };
    }
    if depth >= Depth::All {
        usage.io = io_v2(&text("io.stat").unwrap_or_default());
        let events = text("memory.events").unwrap_or_default();
        usage.oom_kills = keyed(&events, "oom_kill");
        if let Some(memory) = &mut usage.memory {
            memory.peak = value("memory.peak");
            memory.failures = keyed(&events, "max");
            memory.reserved = value("memory.min");
        }
        usage.threads = value("pids.current");
        usage.threads_max = value("pids.max");
        usage.limits = limits_v2(value("cpu.weight"), &text("cpu.max").unwrap_or_default());
    }
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// The value of a line `key value`.
pub(super) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

fn cpu_v2(stat: &str) -> Option<Cpu> {
    let nanoseconds = |key| keyed(stat, key).map(|micros| micros.saturating_mul(1000));
    Some(Cpu {
        usage: nanoseconds("usage_usec")?,
        user: nanoseconds("user_usec"),
        system: nanoseconds("system_usec"),
        throttling: throttling(stat),
        rate: None,
    })
}

/// Of either version's `cpu.stat`; without periods there is no limit.
fn throttling(stat: &str) -> Option<Throttling> {
    let periods = keyed(stat, "nr_periods").filter(|periods| *periods > 0)?;
    let v2 = keyed(stat, "throttled_usec").map(|micros| micros.saturating_mul(1000));
    Some(Throttling {
        periods,
        throttled: keyed(stat, "nr_throttled").unwrap_or_default(),
        time: v2.or_else(|| keyed(stat, "throttled_time")).unwrap_or_default(),
    })
}

fn memory_v1(usage: u64, stat: &str) -> Memory {
    let inactive_file = keyed(stat, "total_inactive_file");
    Memory {
        usage,
        working_set: usage.saturating_sub(inactive_file.unwrap_or_default()),
        inactive_file,
        active_file: keyed(stat, "total_active_file"),
        rss: keyed(stat, "total_rss"),
        cache: keyed(stat, "total_cache"),
        mapped: keyed(stat, "total_mapped_file"),
        swap: keyed(stat, "total_swap"),
        faults: keyed(stat, "total_pgfault"),
        major_faults: keyed(stat, "total_pgmajfault"),
        ..Memory::default()
    }
}

fn memory_v2(usage: u64, stat: &str) -> Memory {
    let inactive_file = keyed(stat, "inactive_file");
    Memory {
        usage,
        working_set: usage.saturating_sub(inactive_file.unwrap_or_default()),
        inactive_file,
        active_file: keyed(stat, "active_file"),
        rss: keyed(stat, "anon"),
        cache: keyed(stat, "file"),
        mapped: keyed(stat, "file_mapped"),
        faults: keyed(stat, "pgfault"),
        major_faults: keyed(stat, "pgmajfault"),
        ..Memory::default()
    }
}

/// Lines `8:0 Read 4096`: of bytes, and of operations.
fn io_v1(bytes: &str, operations: &str) -> Vec<Io> {
    let mut devices: Vec<Io> = Vec::new();
    let mut add = |text: &str, of: fn(&mut Io, bool) -> &mut u64| {
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(device), Some(operation), Some(count)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            let is_read = match operation {
                "Read" => true,
                "Write" => false,
                _ => continue,
            };
            let at = devices.iter().position(|known| known.device == device).unwrap_or_else(|| {
                devices.push(Io { device: device.to_owned(), ..Io::default() });
                devices.len() - 1
            });
            *of(&mut devices[at], is_read) = count.parse().unwrap_or_default();
        }
    };
    add(bytes, |io, is_read| if is_read { &mut io.read } else { &mut io.written });
    add(operations, |io, is_read| if is_read { &mut io.reads } else { &mut io.writes });
    devices
}

/// Lines `8:0 rbytes=4096 wbytes=0 rios=1 wios=0 …`; a device that did nothing has none of it.
fn io_v2(text: &str) -> Vec<Io> {
    let of_line = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let value = |key: &str| rest.split_ascii_whitespace().find_map(|word| word.strip_prefix(key)?.parse().ok());
        Some(Io {
            device: device.to_owned(),
            read: value("rbytes=")?,
            written: value("wbytes=").unwrap_or_default(),
            reads: value("rios=").unwrap_or_default(),
            writes: value("wios=").unwrap_or_default(),
        })
    };
    text.lines().filter_map(of_line).collect()
}

fn limits_v2(weight: Option<u64>, max: &str) -> Limits {
    let mut words = max.split_ascii_whitespace();
    let quota = words.next().and_then(|quota| quota.parse().ok());
    Limits {
        // The inverse of what made the weight of shares.
        shares: weight.map(|weight| 2 + weight.clamp(1, 10_000).saturating_sub(1) * 262_142 / 9_999),
        period: words.next().and_then(|period| period.parse().ok()),
        quota,
    }
}

/// Lines `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`; of CPU pressure older kernels know no `full`.
fn stall(text: &str) -> Option<Stall> {
    let share = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let word = |key: &str| line.split_ascii_whitespace().find_map(|word| word.strip_prefix(key));
        let average =
            |key: &str| word(key).and_then(|value| value.parse::<f64>().ok()).filter(|value| value.is_finite());
        Some(Share {
            total: word("total=")?.parse().ok()?,
            avg10: average("avg10=")?,
            avg60: average("avg60=")?,
            avg300: average("avg300=")?,
        })
    };
    Some(Stall { some: share("some ")?, full: share("full ").unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a root on a kernel 6.18 with v1.
    const MEMORY_STAT_V1: &str = "cache 11096064\nrss 6148096\nrss_huge 0\nshmem 9166848\nmapped_file 7118848\n\
        dirty 20480\nwriteback 0\nswap 0\npgpgin 56121\npgpgout 51911\npgfault 73972\npgmajfault 0\n\
        inactive_anon 0\nactive_anon 1531904\ninactive_file 147456\nactive_file 1781760\nunevictable 13783040\n\
        hierarchical_memory_limit 9223372036854771712\nhierarchical_memsw_limit 9223372036854771712\n\
        total_cache 6989373440\ntotal_rss 1240129536\ntotal_rss_huge 0\ntotal_shmem 9166848\n\
        total_mapped_file 341913600\ntotal_dirty 35074048\ntotal_writeback 0\ntotal_swap 4096\n\
        total_pgpgin 565889114\ntotal_pgpgout 564914763\ntotal_pgfault 676978907\ntotal_pgmajfault 72593\n\
        total_inactive_anon 1233784832\ntotal_active_anon 1609728\ntotal_inactive_file 5335412736\n\
        total_active_file 1644761088\ntotal_unevictable 13783040\n";
    /// In the form that a kernel 6.1 gives it with v2.
    const MEMORY_STAT_V2: &str = "anon 23506944\nfile 41943040\nkernel 3153920\nkernel_stack 163840\npagetables 540672\n\
        sec_pagetables 0\npercpu 576\nsock 4096\nvmalloc 0\nshmem 0\nfile_mapped 12500992\nfile_dirty 0\n\
        file_writeback 0\nswapcached 0\nanon_thp 0\nfile_thp 0\nshmem_thp 0\ninactive_anon 23375872\n\
        active_anon 20480\ninactive_file 30408704\nactive_file 11534336\nunevictable 0\nslab_reclaimable 1544512\n\
        slab_unreclaimable 667232\nslab 2211744\nworkingset_refault_anon 0\nworkingset_refault_file 0\n\
        pgscan 0\npgsteal 0\npgfault 19347\npgmajfault 301\n";
    const CPU_STAT_V2: &str = "usage_usec 1357924\nuser_usec 1000924\nsystem_usec 357000\ncore_sched.force_idle_usec 0\n\
        nr_periods 212\nnr_throttled 17\nthrottled_usec 801234\nnr_bursts 0\nburst_usec 0\n";

    #[test]
    fn memory_of_both_versions() {
        let v1 = memory_v1(8_200_000_000, MEMORY_STAT_V1);
        assert_eq!((v1.usage, v1.working_set), (8_200_000_000, 8_200_000_000 - 5_335_412_736));
        assert_eq!((v1.rss, v1.cache, v1.swap), (Some(1_240_129_536), Some(6_989_373_440), Some(4096)));
        assert_eq!((v1.faults, v1.major_faults), (Some(676_978_907), Some(72_593)));
        assert_eq!((v1.active_file, v1.inactive_file), (Some(1_644_761_088), Some(5_335_412_736)));
        let v2 = memory_v2(68_000_000, MEMORY_STAT_V2);
        assert_eq!((v2.usage, v2.working_set), (68_000_000, 68_000_000 - 30_408_704));
        assert_eq!((v2.rss, v2.cache, v2.mapped), (Some(23_506_944), Some(41_943_040), Some(12_500_992)));
        assert_eq!((v2.faults, v2.major_faults), (Some(19_347), Some(301)));
        assert_eq!((v2.active_file, v2.inactive_file), (Some(11_534_336), Some(30_408_704)));
        // Without a stat, all is in use.
        assert_eq!(memory_v2(5, "").working_set, 5);
        assert_eq!(memory_v1(5, MEMORY_STAT_V1).working_set, 0);
    }

    #[test]
    fn processor_time_and_throttling() {
        let cpu = cpu_v2(CPU_STAT_V2).unwrap();
        assert_eq!((cpu.usage, cpu.user, cpu.system), (1_357_924_000, Some(1_000_924_000), Some(357_000_000)));
        let expected = Throttling { periods: 212, throttled: 17, time: 801_234_000 };
        assert_eq!(cpu.throttling, Some(expected));
        let v1 = throttling("nr_periods 212\nnr_throttled 17\nthrottled_time 801234000\nnr_bursts 0\nburst_time 0\n");
        assert_eq!(v1, Some(expected));
        assert_eq!(throttling("nr_periods 0\nnr_throttled 0\nthrottled_time 0\n"), None);
        assert_eq!(cpu_v2("nr_periods 1\n"), None);
        // Of a root on a kernel 6.18, where nothing limits it.
        let root = "usage_usec 44008782918\nuser_usec 37523459253\nsystem_usec 6485323664\nnice_usec 8081202581\n";
        let root = cpu_v2(root).unwrap();
        assert_eq!((root.usage, root.throttling), (44_008_782_918_000, None));
    }

    #[test]
    fn bytes_of_devices() {
        let v1 = "8:0 Read 4096\n8:0 Write 512\n8:0 Sync 4608\n8:0 Async 0\n8:0 Discard 0\n8:0 Total 4608\n\
            253:0 Read 4\n253:0 Write 0\nTotal 4612\n";
        let served = "8:0 Read 2\n8:0 Write 1\n8:0 Total 3\nTotal 3\n";
        let io = |device: &str, [read, written, reads, writes]: [u64; 4]| Io {
            device: device.to_owned(),
            read,
            written,
            reads,
            writes,
        };
        assert_eq!(io_v1(v1, served), [io("8:0", [4096, 512, 2, 1]), io("253:0", [4, 0, 0, 0])]);
        let v2 =
            "8:0 rbytes=90112 wbytes=4096 rios=4 wios=1 dbytes=0 dios=0\n7:7 \n253:0 rbytes=8 wbytes=0 rios=1 wios=0\n";
        assert_eq!(io_v2(v2), [io("8:0", [90_112, 4096, 4, 1]), io("253:0", [8, 0, 1, 0])]);
        assert!(io_v1("Total 0\n", "").is_empty() && io_v2("").is_empty());
    }

    #[test]
    fn limits_in_the_terms_of_v1() {
        let limits = limits_v2(Some(39), "50000 100000\n");
        assert_eq!(limits, Limits { shares: Some(998), period: Some(100_000), quota: Some(50_000) });
        let none = limits_v2(Some(1), "max 100000\n");
        assert_eq!(none, Limits { shares: Some(2), period: Some(100_000), quota: None });
        assert_eq!(limits_v2(Some(10_000), "").shares, Some(262_144));
    }

    #[test]
    fn pressure() {
        // Of IO, on a kernel 6.18.
        let text = "some avg10=1.25 avg60=1.74 avg300=2.50 total=433296638\n\
            full avg10=0.02 avg60=0.14 avg300=0.42 total=150602786\n";
        let both = stall(text).unwrap();
        assert_eq!((both.some.total, both.some.avg60), (433_296_638, 1.74));
        assert_eq!((both.full.total, both.full.avg300), (150_602_786, 0.42));
        let some = stall("some avg10=0.00 avg60=0.00 avg300=0.00 total=7\n").unwrap();
        assert_eq!((some.some.total, some.full), (7, Share::default()));
        assert_eq!(stall(""), None);
    }

    fn put(dir: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(dir).unwrap();
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
    }

    #[test]
    fn a_v1_cgroup_is_read_from_all_its_hierarchies_and_a_missing_file_costs_only_itself() {
        let root = tempfile::tempdir().unwrap();
        let at = |controller: &str| root.path().join(controller);
        put(&at("cpuacct"), &[("cpuacct.usage", "41977393657532\n"), ("cpuacct.stat", "user 200\nsystem 50\n")]);
        put(&at("memory"), &[("memory.usage_in_bytes", "8200000000\n"), ("memory.stat", MEMORY_STAT_V1)]);
        put(&at("memory"), &[("memory.limit_in_bytes", "9223372036854771712\n"), ("memory.failcnt", "5\n")]);
        put(&at("memory"), &[("memory.memsw.limit_in_bytes", "3000\n"), ("memory.soft_limit_in_bytes", "2000\n")]);
        put(&at("pids"), &[("pids.current", "12\n"), ("pids.max", "100\n")]);
        put(&at("cpu"), &[("cpu.shares", "1024\n"), ("cpu.cfs_quota_us", "-1\n"), ("cpu.cfs_period_us", "100000\n")]);
        let mut usage = Usage::default();
        read_v1(|controller| Some(at(controller)), Depth::All, &mut usage);
        let cpu = usage.cpu.unwrap();
        assert_eq!((cpu.usage, cpu.user, cpu.system), (41_977_393_657_532, Some(2_000_000_000), Some(500_000_000)));
        let memory = usage.memory.unwrap();
        assert_eq!((memory.limit, memory.swap_limit, memory.reserved), (None, Some(3000), Some(2000)));
        assert_eq!((memory.failures, usage.threads, usage.threads_max), (Some(5), Some(12), Some(100)));
        assert_eq!(usage.limits, Limits { shares: Some(1024), period: Some(100_000), quota: None });
        assert!(usage.io.is_empty() && usage.oom_kills.is_none());
        fs::remove_file(at("cpuacct").join("cpuacct.usage")).unwrap();
        let mut less = Usage::default();
        read_v1(|controller| Some(at(controller)).filter(|_| controller != "cpu"), Depth::Core, &mut less);
        let without_all = usage.memory.map(|memory| Memory { failures: None, reserved: None, ..memory });
        assert_eq!((less.cpu, less.memory), (None, without_all));
    }

    #[test]
    fn a_v2_cgroup_is_read_as_deep_as_asked() {
        let root = tempfile::tempdir().unwrap();
        let none = "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n";
        let files = [
            ("cpu.stat", CPU_STAT_V2),
            ("memory.current", "68000000\n"),
            ("memory.stat", MEMORY_STAT_V2),
            ("memory.swap.current", "0\n"),
            ("memory.max", "134217728\n"),
            ("memory.swap.max", "4096\n"),
            ("memory.min", "1048576\n"),
            ("pids.current", "12\n"),
            ("pids.max", "max\n"),
            ("cpu.pressure", none),
            ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4\n"),
            ("memory.events", "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\noom_group_kill 0\n"),
            ("memory.peak", "70000000\n"),
            ("cpu.weight", "39\n"),
            ("cpu.max", "max 100000\n"),
        ];
        put(root.path(), &files);
        let depth = |depth| {
            let mut usage = Usage::default();
            read_v2(root.path(), depth, &mut usage);
            usage
        };
        let all = depth(Depth::All);
        let memory = all.memory.unwrap();
        assert_eq!((memory.working_set, memory.swap, memory.limit), (37_591_296, Some(0), Some(128 << 20)));
        assert_eq!((memory.swap_limit, memory.reserved, memory.failures), (Some(4096), Some(1 << 20), Some(3)));
        assert_eq!((all.threads, all.threads_max), (Some(12), None));
        assert_eq!((all.oom_kills, memory.peak), (Some(1), Some(70_000_000)));
        let io = Io { device: "8:0".to_owned(), read: 1, written: 2, reads: 3, writes: 4 };
        assert_eq!(all.io, [io]);
        assert!(all.pressure.cpu.is_some() && all.pressure.memory.is_none());
        let core = depth(Depth::Core);
        let without_all = all.memory.map(|memory| Memory { peak: None, failures: None, reserved: None, ..memory });
        assert!(core.memory == without_all && core.threads.is_none() && core.io.is_empty());
        assert_eq!(depth(Depth::Cpu).memory, None);
    }
}
