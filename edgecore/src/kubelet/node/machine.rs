//! Reads what the kernel and the firmware tell of the box. What cannot be read is left empty: a status without a UUID is better than
//! none.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use nix::net::if_::InterfaceFlags;
use nix::sys::statvfs::statvfs;
use nix::unistd::{SysconfVar, sysconf};

use crate::order;

/// What does not change while the box is up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// `/etc/machine-id`.
    pub machine_id: String,
    /// Of the firmware; the machine id where there is none.
    pub system_uuid: String,
    /// Another one after each boot.
    pub boot_id: String,
    /// `uname -r`.
    pub kernel: String,
    /// PRETTY_NAME of os-release.
    pub os_image: String,
    /// As Go spells it: `amd64`, `arm64`.
    pub architecture: &'static str,
    /// Logical CPUs.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// Swap in bytes.
    pub swap: u64,
    /// Size such as `2Mi` to bytes reserved in huge pages.
    pub hugepages: BTreeMap<String, u64>,
}

impl Machine {
    /// Of this box.
    pub fn read() -> Self {
        Self::read_from(Path::new("/"))
    }

    fn read_from(root: &Path) -> Self {
        let word =
            |path: &str| fs::read_to_string(root.join(path)).map(|text| text.trim().to_owned()).unwrap_or_default();
        let meminfo = word("proc/meminfo");
        let machine_id = word("etc/machine-id");
        let mut system_uuid = word("sys/class/dmi/id/product_uuid").to_lowercase();
        if system_uuid.is_empty() {
            system_uuid = word("proc/device-tree/system-id").trim_matches('\0').to_owned();
        }
        if system_uuid.is_empty() {
            system_uuid.clone_from(&machine_id);
        }
        let mut os_release = word("etc/os-release");
        if os_release.is_empty() {
            os_release = word("usr/lib/os-release");
        }
        let kernel = nix::sys::utsname::uname().map(|uname| uname.release().to_string_lossy().into_owned());
        let cpus = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
        Self {
            machine_id,
            system_uuid,
            boot_id: word("proc/sys/kernel/random/boot_id"),
            kernel: kernel.unwrap_or_default(),
            os_image: pretty_name(&os_release),
            architecture: architecture(std::env::consts::ARCH),
            cpus: cpus.and_then(|cpus| u32::try_from(cpus).ok()).unwrap_or(1),
            memory: kibibytes(&meminfo, "MemTotal:"),
            swap: kibibytes(&meminfo, "SwapTotal:"),
            hugepages: hugepages(&root.join("sys/kernel/mm/hugepages")),
        }
    }
}

/// A file system, in bytes and inodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    /// All of it.
    pub capacity: u64,
    /// What may still be written.
    pub available: u64,
    /// All inodes; 0 where they are not counted.
    pub inodes: u64,
    /// Free ones.
    pub inodes_free: u64,
}

impl Disk {
    /// The file system at a path, or at the nearest directory above it that exists.
    pub fn read(path: &Path) -> Option<Self> {
        let stat = path.ancestors().find_map(|path| statvfs(path).ok())?;
        let size = stat.fragment_size();
        Some(Self {
            capacity: stat.blocks() * size,
            available: stat.blocks_available() * size,
            inodes: stat.files(),
            inodes_free: stat.files_available(),
        })
    }
}

/// What changes all the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Bytes that could be had without swapping.
    pub memory_available: u64,
    /// Where pods are.
    pub pods_disk: Option<Disk>,
    /// Where images are.
    pub image_disk: Option<Disk>,
    /// Processes and threads.
    pub pids: u64,
    /// How many there may be.
    pub pids_max: u64,
}

impl Load {
    /// Now. `images` is where the runtime keeps them, as far as it is known.
    pub fn read(pods: &Path, images: Option<&Path>) -> Self {
        let number = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
        let loadavg = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let limits = [number("/proc/sys/kernel/pid_max"), number("/proc/sys/kernel/threads-max")];
        Self {
            memory_available: fs::read_to_string("/proc/meminfo")
                .map_or(u64::MAX, |meminfo| kibibytes(&meminfo, "MemAvailable:")),
            pods_disk: Disk::read(pods),
            image_disk: images.and_then(Disk::read),
            pids: tasks(&loadavg),
            pids_max: limits.into_iter().flatten().min().unwrap_or_default(),
        }
    }
}

/// The box's own addresses, primary first: those of the interface with the default route, else of any that is up, else loopback, so
/// that pods on the host network have one on a box without any link.
pub fn addresses() -> Vec<IpAddr> {
    let default = default_link();
    let mut found: Vec<(u8, bool, IpAddr)> = Vec::new();
    for interface in nix::ifaddrs::getifaddrs().into_iter().flatten() {
        if !interface.flags.contains(InterfaceFlags::IFF_UP) || interface.flags.contains(InterfaceFlags::IFF_LOOPBACK) {
            continue;
        }
        let Some(address) = interface.address else { continue };
        let ip = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => IpAddr::V4(v4.ip()),
            (_, Some(v6)) => IpAddr::V6(v6.ip()),
            _ => continue,
        };
        if !is_usable(&ip) {
            continue;
        }
        let name = interface.interface_name.as_str();
        let rank = if Some(name) == default.as_deref() {
            0
        } else if is_for_pods(name) {
            continue;
        } else {
            1
        };
        found.push((rank, ip.is_ipv6(), ip));
    }
    order::sort(&mut found);
    // Of other interfaces only when the one with the default route has none.
    let best = found.first().map(|(rank, ..)| *rank);
    found.retain(|(rank, ..)| Some(*rank) == best);
    let mut addresses: Vec<IpAddr> = found.into_iter().map(|(_, _, ip)| ip).collect();
    if addresses.is_empty() {
        addresses.push(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    addresses
}

/// The interface with the default route.
pub fn default_link() -> Option<String> {
    let route = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let route6 = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    default_interface(&route).or_else(|| default_interface6(&route6))
}

fn is_usable(ip: &IpAddr) -> bool {
    !ip.is_loopback()
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && match ip {
            IpAddr::V4(v4) => !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_unicast_link_local(),
        }
}

/// Bridges and the like that lead to containers, not out of the box.
fn is_for_pods(name: &str) -> bool {
    ["skerry", "cni", "veth", "docker", "br-", "flannel", "cali", "cilium", "lxc", "kube-", "nodelocaldns", "virbr"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// The interface of the default route with the lowest metric.
fn default_interface(route: &str) -> Option<String> {
    let lines = route.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [name, destination, _, flags, _, _, metric, mask, ..] = fields[..] else { return None };
        let is_up = u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & 1 == 1);
        (destination == "00000000" && mask == "00000000" && is_up)
            .then(|| (metric.parse::<u32>().unwrap_or(u32::MAX), name.to_owned()))
    });
    lines.min_by_key(|(metric, _)| *metric).map(|(_, name)| name)
}

fn default_interface6(route: &str) -> Option<String> {
    let lines = route.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [destination, prefix, _, _, _, metric, _, _, flags, name] = fields[..] else { return None };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        // Up, and not one of the routes that reject.
        let leads_out = flags & 1 == 1 && flags & 0x200 == 0 && name != "lo";
        (destination.bytes().all(|digit| digit == b'0') && prefix == "00" && leads_out)
            .then(|| (u32::from_str_radix(metric, 16).unwrap_or(u32::MAX), name.to_owned()))
    });
    lines.min_by_key(|(metric, _)| *metric).map(|(_, name)| name)
}

fn kibibytes(meminfo: &str, key: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix(key)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .unwrap_or_default()
        * 1024
}

/// The fourth field is `running/all`.
fn tasks(loadavg: &str) -> u64 {
    let field = loadavg.split_ascii_whitespace().nth(3).and_then(|field| field.split_once('/'));
    field.and_then(|(_, all)| all.parse().ok()).unwrap_or_default()
}

fn pretty_name(os_release: &str) -> String {
    let value = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    value.map_or_else(|| "Linux".to_owned(), |value| value.trim_matches(['"', '\'']).to_owned())
}

fn architecture(rust: &'static str) -> &'static str {
    match rust {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
}

fn hugepages(dir: &Path) -> BTreeMap<String, u64> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = entries.filter_map(|entry| {
        let name = entry.file_name();
        let kibibytes: u64 = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let count: u64 = fs::read_to_string(entry.path().join("nr_hugepages")).ok()?.trim().parse().ok()?;
        let size = match kibibytes {
            size if size.is_multiple_of(1 << 20) => format!("{}Gi", size >> 20),
            size if size.is_multiple_of(1 << 10) => format!("{}Mi", size >> 10),
            size => format!("{size}Ki"),
        };
        Some((size, count * kibibytes * 1024))
    });
    order::map(sizes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_box_from_its_files() -> std::io::Result<()> {
        let root = tempfile::tempdir()?;
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap_or_else(|| root.path()))?;
            fs::write(path, text)
        };
        put("proc/meminfo", "MemTotal:       24576 kB\nMemAvailable: 1000 kB\nSwapTotal:        0 kB\n")?;
        put("etc/machine-id", "0123\n")?;
        put("etc/os-release", "NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n")?;
        put("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "3\n")?;
        put("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "0\n")?;
        let machine = Machine::read_from(root.path());
        assert_eq!((machine.memory, machine.swap), (24576 * 1024, 0));
        assert_eq!((machine.machine_id.as_str(), machine.system_uuid.as_str()), ("0123", "0123"));
        assert_eq!(machine.os_image, "Debian GNU/Linux 12 (bookworm)");
        assert_eq!(machine.hugepages, BTreeMap::from([("2Mi".to_owned(), 6 << 20), ("1Gi".to_owned(), 0)]));
        assert!(machine.cpus > 0 && !machine.kernel.is_empty());
        Ok(())
    }

    #[test]
    fn the_default_route_with_the_lowest_metric_wins() {
        let route = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                     wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
                     eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
                     eth0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        assert_eq!(default_interface(route).as_deref(), Some("eth0"));
        assert_eq!(default_interface("Iface\n"), None);
        let zero = "0".repeat(32);
        let line =
            |flags: &str, name: &str| format!("{zero} 00 {zero} 00 {zero} 00000400 00000001 00000000 {flags} {name}\n");
        let route6 = line("00200200", "lo") + &line("00000003", "eth1");
        assert_eq!(default_interface6(&route6).as_deref(), Some("eth1"));
    }

    #[test]
    fn counts_tasks() {
        assert_eq!(tasks("0.00 0.01 0.05 2/345 6789\n"), 345);
        assert_eq!(tasks(""), 0);
    }
}
