//! What must be right with a box before it joins, each looked at and said on its own, with the remedy.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use skerry_proto::cri::VersionRequest;
use skerry_proto::cri::runtime_service_client::RuntimeServiceClient;

use crate::app::{self, Shared};
use crate::cni::{self, Network, Places as CniPlaces};
use crate::config::Config;
use crate::runtime::cri::Setup;
use crate::runtime::{Cri, connect};

/// Before this, no clock is right.
const EARLIEST_YEAR: i16 = 2025;
/// Where a kubelet serves.
const KUBELET_PORT: u16 = 10250;
const RUNTIME_TIMEOUT: Duration = Duration::from_secs(5);

/// What came of looking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Ok(String),
    /// It works, but somebody should know.
    Warning(String),
    /// It cannot work: cause and remedy.
    Failed(String),
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What.
    pub what: &'static str,
    /// What came of it.
    pub verdict: Verdict,
}

impl Check {
    /// Joining makes no sense.
    pub fn is_fatal(&self) -> bool {
        matches!(self.verdict, Verdict::Failed(_))
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, text) = match &self.verdict {
            Verdict::Ok(text) => ("ok", text),
            Verdict::Warning(text) => ("warning", text),
            Verdict::Failed(text) => ("failed", text),
        };
        write!(f, "{word:<8} {}: {text}", self.what)
    }
}

/// Where to look; another root in tests.
#[derive(Clone, Debug)]
pub struct Places {
    /// `/sys/fs/cgroup`.
    pub cgroups: PathBuf,
    /// Where a kubelet would listen.
    pub kubelet: SocketAddr,
    /// `/run`.
    pub locks: PathBuf,
    /// Whether this process is root's.
    pub root: bool,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            cgroups: "/sys/fs/cgroup".into(),
            kubelet: SocketAddr::from((Ipv4Addr::UNSPECIFIED, KUBELET_PORT)),
            locks: app::LOCKS.into(),
            root: nix::unistd::geteuid().is_root(),
        }
    }
}

/// Looks at everything. `running`: an edgecore of this data directory runs already, which explains what else would be in the way.
pub async fn run(config: &Config, data_dir: &Path, places: &Places, now: Timestamp, running: bool) -> Vec<Check> {
    let setup = setup(&config.runtime_endpoint).await;
    vec![
        Check { what: "privileges", verdict: root(places.root) },
        Check { what: "node name", verdict: name(&config.node_name) },
        Check { what: "data directory", verdict: writable(data_dir) },
        Check { what: "container runtime", verdict: runtime(&config.runtime_endpoint).await },
        Check { what: "pod network", verdict: network(config, &setup) },
        Check { what: "cgroups", verdict: cgroups(&places.cgroups) },
        Check { what: "clock", verdict: clock(now) },
        Check { what: "other agents", verdict: others(config, &places.locks, running) },
        Check {
            what: "kubelet port",
            verdict: if running { Verdict::Ok("edgecore runs here already".to_owned()) } else { port(places.kubelet) },
        },
    ]
}

fn root(root: bool) -> Verdict {
    if root {
        Verdict::Ok("root".to_owned())
    } else {
        Verdict::Failed("not root, which mounting volumes and cgroups needs; run it with sudo".to_owned())
    }
}

fn name(name: &str) -> Verdict {
    if crate::config::is_node_name(name) {
        Verdict::Ok(name.to_owned())
    } else {
        Verdict::Failed(crate::config::name_error(name))
    }
}

fn writable(dir: &Path) -> Verdict {
    let probe = dir.join(".probe");
    let tried = std::fs::create_dir_all(dir)
        .and_then(|()| crate::files::write(&probe, b"", 0o600))
        .and_then(|()| crate::files::remove(&probe));
    match tried {
        Ok(()) => Verdict::Ok(dir.display().to_string()),
        Err(error) => Verdict::Failed(format!(
            "{} cannot be written ({error}); free space, remount it, or choose another with --data-dir",
            dir.display()
        )),
    }
}

async fn runtime(endpoint: &str) -> Verdict {
    let remedy = "install and start containerd (for example `apt-get install containerd`), or name another socket with --runtime-endpoint";
    let (path, channel) = match (connect::socket_path(endpoint), connect::channel(endpoint)) {
        (Ok(path), Ok(channel)) => (path, channel),
        (Err(error), _) | (_, Err(error)) => return Verdict::Failed(error.to_string()),
    };
    if !path.exists() {
        return Verdict::Failed(format!("there is no socket at {}; {remedy}", path.display()));
    }
    let path = path.display();
    let ask = async {
        let mut client = RuntimeServiceClient::new(channel);
        client.version(VersionRequest { version: "v1".to_owned() }).await.map(tonic::Response::into_inner)
    };
    match tokio::time::timeout(RUNTIME_TIMEOUT, ask).await {
        Ok(Ok(version)) => Verdict::Ok(format!("{} {}", version.runtime_name, version.runtime_version)),
        Ok(Err(status)) if status.code() == tonic::Code::Unimplemented => Verdict::Failed(format!(
            "what serves {path} does not speak CRI v1 ({}); if it is containerd, take \"cri\" out of disabled_plugins in /etc/containerd/config.toml",
            status.message()
        )),
        Ok(Err(status)) => {
            Verdict::Failed(format!("what serves {path} does not answer ({}); {remedy}", status.message()))
        }
        Err(_) => Verdict::Failed(format!(
            "what serves {path} did not answer within {} s; restart it",
            RUNTIME_TIMEOUT.as_secs()
        )),
    }
}

/// What the runtime tells of itself; nothing if it does not answer, which is another check's matter.
async fn setup(endpoint: &str) -> Setup {
    let Ok(channel) = connect::channel(endpoint) else { return Setup::default() };
    let asked = tokio::time::timeout(RUNTIME_TIMEOUT, Cri::new(channel).setup()).await;
    asked.ok().and_then(Result::ok).unwrap_or_default()
}

fn network(config: &Config, setup: &Setup) -> Verdict {
    let places = CniPlaces::of(config, setup);
    match cni::look(&places) {
        Network::Present(path) => Verdict::Ok(path.display().to_string()),
        Network::Absent => Verdict::Ok(format!("a bridge with {} will be set up", config.pod_cidr)),
        Network::PluginsMissing(missing) => Verdict::Warning(format!(
            "no configuration in {} and no plugins ({}): only pods with hostNetwork will start; install containernetworking-plugins",
            places.conf_dir.display(),
            missing.join(", ")
        )),
    }
}

fn cgroups(root: &Path) -> Verdict {
    let needed = ["cpu", "memory"];
    let remedy = "on a Raspberry Pi add `cgroup_enable=memory cgroup_memory=1` to the kernel's command line and reboot";
    let (version, missing): (_, Vec<&str>) = match std::fs::read_to_string(root.join("cgroup.controllers")) {
        Ok(controllers) => {
            let known: Vec<&str> = controllers.split_whitespace().collect();
            ("v2", needed.into_iter().filter(|name| !known.contains(name)).collect())
        }
        Err(_) => {
            let mounted = |name: &str| root.join(name).join("cgroup.procs").exists();
            if !root.is_dir() || !needed.iter().any(|name| mounted(name)) {
                return Verdict::Failed(format!(
                    "no cgroups are mounted at {}; mount them, or boot with systemd",
                    root.display()
                ));
            }
            ("v1", needed.into_iter().filter(|name| !mounted(name)).collect())
        }
    };
    if missing.is_empty() {
        Verdict::Ok(version.to_owned())
    } else {
        Verdict::Failed(format!("cgroup {version} without {}; {remedy}", missing.join(" and ")))
    }
}

fn clock(now: Timestamp) -> Verdict {
    let year = now.to_zoned(jiff::tz::TimeZone::UTC).year();
    if year < EARLIEST_YEAR {
        Verdict::Failed(format!("it is not {year}; set the clock (`date -s …`, or start chrony or systemd-timesyncd)"))
    } else {
        Verdict::Ok(now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
    }
}

/// It will not start beside one; but that may be meant to end first.
fn others(config: &Config, locks: &Path, running: bool) -> Verdict {
    // An endpoint that is none is another check's matter.
    let shared = app::shared(locks, config).unwrap_or_default();
    match shared.iter().find_map(Shared::taken) {
        Some(taken) if !running => Verdict::Warning(taken),
        _ => Verdict::Ok("none that has its pods, their logs or cgroups where this one will".to_owned()),
    }
}

fn port(address: SocketAddr) -> Verdict {
    match std::net::TcpListener::bind(address) {
        Ok(_) => Verdict::Ok(format!("{} is free, no other kubelet runs", address.port())),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Verdict::Failed(format!(
            "something listens on {}: another kubelet or agent runs here, and two would fight over the pods; stop and disable it (`systemctl disable --now kubelet`)",
            address.port()
        )),
        Err(error) => Verdict::Warning(format!("cannot find out whether a kubelet runs here: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &Path) -> Config {
        let mut config = Config::new(&"h:1".parse().unwrap(), "box");
        config.runtime_endpoint = format!("unix://{}/none.sock", dir.display());
        config.cni_conf_dir = Some(dir.join("net.d"));
        config.cni_bin_dirs = Some(vec![dir.join("bin")]);
        config
    }

    #[tokio::test]
    async fn each_trouble_is_said_with_its_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let places = Places {
            cgroups: dir.path().join("cg"),
            kubelet: busy.local_addr().unwrap(),
            locks: dir.path().into(),
            root: false,
        };
        std::fs::write(dir.path().join("file"), "").unwrap();
        let mut config = config(dir.path());
        config.node_name = "Box".to_owned();
        let _locks = app::lock_pods(&places.locks, &config).unwrap();
        let checks = run(&config, &dir.path().join("file"), &places, Timestamp::UNIX_EPOCH, false).await;
        let text: Vec<String> = checks.iter().map(ToString::to_string).collect();
        for (index, words) in [
            "sudo",
            "--node-name",
            "--data-dir",
            "--runtime-endpoint",
            "containernetworking-plugins",
            "mount",
            "set the clock",
            "another edgecore runs pods on",
            "another kubelet",
        ]
        .iter()
        .enumerate()
        {
            assert!(text[index].contains(words), "{words} is not in {}", text[index]);
            assert!(checks[index].is_fatal() || [4, 7].contains(&index), "{}", text[index]);
        }
    }

    #[test]
    fn cgroups_of_both_kinds() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("cgroup.controllers"), "cpuset cpu io\n").unwrap();
        assert!(
            matches!(cgroups(dir.path()), Verdict::Failed(text) if text.contains("v2 without memory") && text.contains("cgroup_enable"))
        );
        std::fs::write(dir.path().join("cgroup.controllers"), "cpuset cpu io memory\n").unwrap();
        assert_eq!(cgroups(dir.path()), Verdict::Ok("v2".to_owned()));
        let old = tempfile::tempdir().unwrap();
        for name in ["cpu", "memory"] {
            std::fs::create_dir(old.path().join(name)).unwrap();
            std::fs::write(old.path().join(name).join("cgroup.procs"), "").unwrap();
        }
        assert_eq!(cgroups(old.path()), Verdict::Ok("v1".to_owned()));
    }
}
