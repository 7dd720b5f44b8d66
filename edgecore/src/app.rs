//! The life of `edgecore run`: what is started in which order, and ended in the reverse.
//!
//! | start | why there |
//! |---|---|
//! | locks on the data directory, the runtime's pods, where pods and their logs lie, and cgroups | two agents on one of them would fight |
//! | configuration | nothing works without |
//! | identity | without a usable one there is no link, and all the rest |
//! | store | everything else reads it |
//! | control socket | a technician can look, whatever comes next |
//! | devices | mappers and people at the box wait for no cloud |
//! | mqtt | waits for a broker, and nobody waits for it |
//! | ops | answers what a kubelet answers, over the control socket and the link |
//! | link, renewal | waits for nobody, and nobody waits for it |
//! | kubelet | starts pods from the store alone |
//!
//! At the end containers are left running: the next edgecore adopts them. The store is closed last.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::NodeStatus;
use nix::fcntl::{Flock, FlockArg};
use sd_notify::NotifyState;
use skerry_proto::footprint;
use skerry_proto::mux::Class;
use skerry_proto::streams::Services;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tracing::{error, info, warn};
use xxhash_rust::xxh3::xxh3_64;

use crate::config::Config;
use crate::control::{self, Control, ResetRequest};
use crate::devices::{self, Devices, mqtt};
use crate::identity::{self, Identity};
use crate::link::{Link, LinkState, ReportWanted, network};
use crate::ops::{self, Ops};
use crate::runtime::connect;
use crate::stats::Stats;
use crate::store::Store;
use crate::{clock, supervise};

/// How often at least code that was used is given back, which costs a few hundred page faults.
const GIVE_BACK: Duration = Duration::from_secs(300);
/// Name of the lock's file in the data directory; it holds the process id.
pub const LOCK: &str = "edgecore.lock";
/// Where the locks are on what agents would fight over: only root can write there, and a reboot clears it.
pub const LOCKS: &str = "/run";
/// Reports wanted once more that the kubelet may fall behind; beyond it, it reports all.
const WANTED: usize = 256;
/// How long a module may take to end.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// What the kubelet is given. It is given the same again if it has to be started again.
#[derive(Clone)]
pub struct KubeletParts {
    /// The bus: desired state, reports, notes.
    pub store: Store,
    /// What the node was told.
    pub config: Arc<Config>,
    /// Who may need a broker.
    pub devices: Devices,
    /// How MQTT is.
    pub mqtt: watch::Receiver<mqtt::Status>,
    /// How the link is; a new epoch is a new session.
    pub link_state: watch::Receiver<LinkState>,
    /// What the cloud asks to be reported once more.
    pub wanted: broadcast::Sender<ReportWanted>,
    /// Requests to end every pod.
    pub reset: ResetRequests,
    /// Where the kubelet puts the node's status.
    pub status: watch::Sender<Option<NodeStatus>>,
    /// Where the kubelet puts what measures its pods, once it runs.
    pub stats: watch::Sender<Option<Stats>>,
    /// To the container runtime.
    pub runtime: Channel,
    /// Ends the kubelet; containers go on.
    pub shutdown: CancellationToken,
}

/// Requests of `edgecore reset` to the kubelet.
#[derive(Clone)]
pub struct ResetRequests(Arc<Mutex<mpsc::Receiver<ResetRequest>>>);

impl ResetRequests {
    /// What comes out of this receiver.
    pub fn new(requests: mpsc::Receiver<ResetRequest>) -> Self {
        Self(Arc::new(Mutex::new(requests)))
    }

    /// The next request: end every pod, start none any more, then answer. Can be dropped at any point.
    pub async fn next(&self) -> Option<ResetRequest> {
        self.0.lock().await.recv().await
    }
}

/// Runs the agent until SIGTERM or SIGINT.
pub async fn run(data_dir: PathBuf) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;

    let config = Arc::new(Config::load(&data_dir)?);
    let _lock = lock(&data_dir.join(LOCK))?;
    let _pods = match lock_pods(Path::new(LOCKS), &config) {
        // Whoever looks whether they are taken has them for a moment.
        Err(_) => {
            tokio::time::sleep(Duration::from_millis(200)).await;
            lock_pods(Path::new(LOCKS), &config)?
        }
        Ok(locks) => locks,
    };
    let identity = identity(&data_dir);
    if let Ok(identity) = &identity {
        anyhow::ensure!(
            identity.node == config.node_name,
            "the certificate is for node {:?}, the configuration says {:?}; correct node_name in {}, or run `edgecore reset` and join again",
            identity.node,
            config.node_name,
            data_dir.join(crate::config::FILE).display()
        );
    }
    let server = config.server()?;
    let store = Store::open(&data_dir, clock::wall())?;

    let (identity, first) = match identity {
        Ok(identity) => {
            (Some(watch::channel(Arc::new(identity))), LinkState::Connecting { attempt: 1, last_error: None })
        }
        Err(reason) => {
            error!(reason, "there is no link without a certificate; the pods run all the same");
            (None, LinkState::Offline { since: clock::wall(), reason })
        }
    };
    let (link_state, link_seen) = watch::channel(first);
    let (wanted, _) = broadcast::channel(WANTED);
    let (reset, resets) = mpsc::channel(1);
    let stop_kubelet = CancellationToken::new();
    let stop = CancellationToken::new();
    let runtime = connect::channel(&config.runtime_endpoint)?;
    let (stats, measured) = watch::channel(None);
    let (status, own_status) = watch::channel(None);
    let devices = Devices::new(store.clone());
    let (mqtt, mqtt_seen) = watch::channel(mqtt::Status::default());
    let ops = Ops::new(store.clone(), Arc::clone(&config), runtime.clone(), measured)
        .with_devices(devices.clone(), mqtt_seen.clone());

    let socket = config.control_socket(&data_dir);
    let listener =
        Arc::new(control::bind(&socket).with_context(|| format!("cannot make the socket {}", socket.display()))?);
    let control = Control {
        node: config.node_name.clone(),
        server: config.server.clone(),
        store: store.clone(),
        link: link_seen.clone(),
        status: own_status,
        identity: identity.as_ref().map(|(_, seen)| seen.clone()),
        reset,
        ops: ops.clone(),
        mqtt: mqtt_seen.clone(),
    };
    let kubelet_devices = devices.clone();
    let control = supervise::module("control", stop.clone(), {
        let stop = stop.clone();
        move || control::serve(Arc::clone(&listener), control.clone(), stop.clone())
    });
    let mqtt = supervise::module("mqtt", stop.clone(), {
        let parts = mqtt::Parts {
            devices: devices.clone(),
            store: store.clone(),
            node: config.node_name.clone(),
            broker: config.mqtt_broker.clone(),
            data_dir: data_dir.clone(),
            status: mqtt,
            shutdown: stop.clone(),
        };
        move || mqtt::run(parts.clone())
    });
    let devices = supervise::module("devices", stop.clone(), {
        let parts = devices::Parts {
            devices,
            socket: config.dmi_socket(),
            link: link_seen.clone(),
            wanted: wanted.clone(),
            shutdown: stop.clone(),
        };
        move || devices::run(parts.clone())
    });
    let mut services = Services::default();
    // What devices say has streams of a class of its own, behind those of people.
    let of_devices = ops::Requests::new(services.serve(Class::Device, ops::WAITING));
    let of_devices = supervise::module("device ops", stop.clone(), {
        let (ops, stop) = (ops.clone(), stop.clone());
        move || ops::serve(ops.clone(), of_devices.clone(), stop.clone())
    });
    let requests = ops::Requests::new(services.serve(Class::Ops, ops::WAITING));
    let ops = supervise::module("ops", stop.clone(), {
        let stop = stop.clone();
        move || ops::serve(ops.clone(), requests.clone(), stop.clone())
    });
    let cloud = identity.map(|(identity, identity_seen)| {
        let (expired, expired_seen) = watch::channel(None);
        let (network, network_seen) = watch::channel(0);
        let network = supervise::module("network", stop.clone(), {
            let stop = stop.clone();
            move || network::run(network.clone(), stop.clone())
        });
        let link = supervise::module("link", stop.clone(), {
            let (node, server, store, stop) = (config.node_name.clone(), server.clone(), store.clone(), stop.clone());
            let wanted = wanted.clone();
            let transport = config.transport;
            // Nobody opens streams yet.
            let streams = watch::Sender::new(None);
            move || {
                let link = Link {
                    node: node.clone(),
                    server: server.clone(),
                    transport,
                    store: store.clone(),
                    identity: identity_seen.clone(),
                    expired: expired.clone(),
                    wanted: wanted.clone(),
                    services: services.clone(),
                    network: network_seen.clone(),
                    streams: streams.clone(),
                    state: link_state.clone(),
                    shutdown: stop.clone(),
                };
                link.run()
            }
        });
        let renewal = supervise::module("renewal", stop.clone(), {
            let (data_dir, stop) = (data_dir.clone(), stop.clone());
            move || {
                let (identity, expired) = (identity.clone(), expired_seen.clone());
                identity::renew::run(data_dir.clone(), server.clone(), identity, expired, stop.clone())
            }
        });
        [("link", link), ("network", network), ("renewal", renewal)]
    });
    let parts = KubeletParts {
        store: store.clone(),
        config: Arc::clone(&config),
        devices: kubelet_devices,
        mqtt: mqtt_seen,
        link_state: link_seen,
        wanted,
        reset: ResetRequests::new(resets),
        status,
        stats,
        runtime,
        shutdown: stop_kubelet.clone(),
    };
    let kubelet = supervise::module("kubelet", stop_kubelet.clone(), move || crate::kubelet::run(parts.clone()));

    info!(node = %config.node_name, server = %config.server, version = env!("CARGO_PKG_VERSION"), "edgecore runs");
    notify(&[NotifyState::Ready]);
    let mut changes = store.changes();
    let footprint = supervise::spawn("footprint", async move {
        loop {
            footprint::settle().await;
            // More work uses more code, and so does, in time, what is done every few minutes.
            tokio::select! {
                change = changes.recv() => {
                    if let Err(broadcast::error::RecvError::Closed) = change {
                        return;
                    }
                }
                () = tokio::time::sleep(GIVE_BACK) => {}
            }
        }
    });
    let failed = tokio::select! {
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
        () = store.closed() => true,
        () = watchdog() => true,
    };
    footprint.abort();
    notify(&[NotifyState::Stopping]);
    info!("edgecore ends; containers go on");

    stop_kubelet.cancel();
    join("kubelet", kubelet).await;
    stop.cancel();
    for (name, module) in cloud.into_iter().flatten() {
        join(name, module).await;
    }
    join("ops", ops).await;
    join("device ops", of_devices).await;
    join("mqtt", mqtt).await;
    join("devices", devices).await;
    join("control", control).await;
    store.close().await;
    // Nobody answers on it any more.
    let _ = crate::files::remove(&socket);
    anyhow::ensure!(!failed, "the store's thread ended; start edgecore again");
    Ok(())
}

/// Who this node is, or why nobody can tell and what to do about it.
fn identity(data_dir: &Path) -> Result<Identity, String> {
    match Identity::load(data_dir) {
        Ok(Some(identity)) => Ok(identity),
        Ok(None) => Err(format!(
            "{} has no certificate; restore it from a backup, or run `edgecore reset` and join again, then start edgecore again",
            data_dir.join(identity::DIR).display()
        )),
        Err(error) => Err(format!("{:#}; then start edgecore again", anyhow::Error::new(error))),
    }
}

/// Takes the lock on a data directory for as long as the result lives.
pub fn lock(path: &Path) -> anyhow::Result<Flock<File>> {
    let dir = path.parent().unwrap_or(path).display();
    take(path, &format!("works on {dir}"), "give this one another --data-dir")
}

/// Takes the locks on all that [`shared`] names.
pub fn lock_pods(locks: &Path, config: &Config) -> anyhow::Result<Vec<Flock<File>>> {
    shared(locks, config)?.iter().map(|one| take(&one.lock, &one.does, one.otherwise)).collect()
}

/// What two agents would fight over: to either, pods that it does not know, their directories and their logs are left over from something,
/// and it takes them away.
pub struct Shared {
    /// Where its lock is.
    pub lock: PathBuf,
    does: String,
    otherwise: &'static str,
}

impl Shared {
    /// Whose it is, if another agent that runs has it.
    pub fn taken(&self) -> Option<String> {
        Some(busy(&self.does, &holder(&self.lock)?, self.otherwise))
    }
}

/// A node's runtime, its directories, each once, and cgroups; `locks` is [`LOCKS`], or another in tests.
pub fn shared(locks: &Path, config: &Config) -> anyhow::Result<Vec<Shared>> {
    let socket = connect::socket_path(&config.runtime_endpoint)?;
    let mut found: Vec<Shared> = Vec::new();
    for (path, does, otherwise) in [
        (&socket, "runs pods on", "give this one a runtime of its own"),
        (&config.pods_dir, "has pods in", "give this one another --pods-dir"),
        (&config.logs_dir, "has logs of pods in", "give this one another logs_dir in config.toml"),
    ] {
        let lock = locks.join(lock_name(path));
        if found.iter().all(|other| other.lock != lock) {
            found.push(Shared { lock, does: format!("{does} {}", path.display()), otherwise });
        }
    }
    // Of pods there is one tree a machine, or a container with cgroups of its own: its inode tells which.
    let tree = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"].iter().find_map(|tree| std::fs::metadata(tree).ok());
    if let Some(tree) = tree {
        let lock = locks.join(format!("edgecore-cgroups-{:x}-{}.lock", tree.dev(), tree.ino()));
        let (does, otherwise) = ("has the cgroups of pods on this machine".to_owned(), "run this one on another");
        found.push(Shared { lock, does, otherwise });
    }
    Ok(found)
}

/// By the path's real name, however much of it is there yet.
fn lock_name(path: &Path) -> String {
    let real = path.ancestors().find_map(|dir| Some(dir.canonicalize().ok()?.join(path.strip_prefix(dir).ok()?)));
    let real = real.as_deref().unwrap_or(path).to_string_lossy();
    let name = real.trim_end_matches('/').replace('/', "-");
    // Longer ones no file system takes.
    let name = if name.len() > 200 { format!("-{:x}", xxh3_64(name.as_bytes())) } else { name };
    format!("edgecore{name}.lock")
}

fn take(path: &Path, does: &str, otherwise: &str) -> anyhow::Result<Flock<File>> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(mut file, errno)| {
        let mut pid = String::new();
        // Only for the message.
        let _ = file.read_to_string(&mut pid);
        match errno {
            nix::Error::EWOULDBLOCK => anyhow::anyhow!(busy(does, &pid, otherwise)),
            errno => anyhow::anyhow!("cannot lock {}: {errno}", path.display()),
        }
    })?;
    if let Err(error) = note_pid(&mut lock) {
        warn!(%error, "the process id cannot be written to {}", path.display());
    }
    Ok(lock)
}

fn busy(does: &str, pid: &str, otherwise: &str) -> String {
    let pid = if pid.trim().is_empty() { "unknown" } else { pid.trim() };
    format!("another edgecore {does} (process {pid}); stop it first, or {otherwise}")
}

/// Over the old one, which takes no room that a full disk does not have.
fn note_pid(file: &mut File) -> std::io::Result<()> {
    let pid = std::process::id().to_string();
    file.rewind()?;
    file.write_all(pid.as_bytes())?;
    file.set_len(pid.len() as u64)
}

/// The process that holds the lock of a data directory, if any does.
pub fn running(data_dir: &Path) -> Option<i32> {
    holder(&data_dir.join(LOCK))?.trim().parse().ok()
}

/// What is written in a lock that somebody holds.
fn holder(lock: &Path) -> Option<String> {
    let mut file = File::open(lock).ok()?;
    let mut pid = String::new();
    file.read_to_string(&mut pid).ok()?;
    Flock::lock(file, FlockArg::LockSharedNonblock).is_err().then_some(pid)
}

/// Feeds systemd's watchdog from the main loop: if that hangs, so does this.
async fn watchdog() {
    let Some(period) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    let mut tick = tokio::time::interval(period / 3);
    loop {
        tick.tick().await;
        notify(&[NotifyState::Watchdog]);
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "systemd cannot be told");
    }
}

async fn join(name: &str, task: tokio::task::JoinHandle<()>) {
    let abort = task.abort_handle();
    if tokio::time::timeout(LAST_WORDS, task).await.is_err() {
        warn!(module = name, "the module did not end in time");
        abort.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_instance_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(running(dir.path()), None);
        let held = lock(&dir.path().join(LOCK)).unwrap();
        let refused = lock(&dir.path().join(LOCK)).unwrap_err().to_string();
        assert!(refused.contains(&std::process::id().to_string()), "{refused}");
        assert_eq!(running(dir.path()), Some(std::process::id().cast_signed()));
        drop(held);
        assert_eq!(running(dir.path()), None);
        lock(&dir.path().join(LOCK)).unwrap();
    }

    #[test]
    fn what_agents_would_fight_over_has_one_agent_however_it_is_called() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        File::create(at("cri.sock")).unwrap();
        std::os::unix::fs::symlink(at("cri.sock"), at("link")).unwrap();
        std::os::unix::fs::symlink(dir.path(), at("elsewhere")).unwrap();
        assert_eq!(lock_name(&at("cri.sock")), lock_name(&at("link")));
        assert_ne!(lock_name(&at("cri.sock")), lock_name(&at("other.sock")));
        assert_eq!(lock_name(Path::new("/no/such.sock")), "edgecore-no-such.sock.lock");
        assert_eq!(lock_name(Path::new(&"/long".repeat(60))).len(), "edgecore-0123456789abcdef.lock".len());
        // Also as long as nobody has made it, which must not change its name.
        let before = lock_name(&at("elsewhere/logs"));
        std::fs::create_dir(at("logs")).unwrap();
        assert_eq!((&before, &before), (&lock_name(&at("elsewhere/logs/")), &lock_name(&at("logs"))));
    }

    #[test]
    fn an_agent_beside_another_that_has_its_logs_there_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let config = |name: &str| {
            let mut config = Config::new(&"h:1".parse().unwrap(), name);
            config.runtime_endpoint = format!("unix://{}/{name}.sock", dir.path().display());
            config.pods_dir = dir.path().join(name);
            config.logs_dir = dir.path().join("logs");
            config
        };
        let locks = dir.path();
        let held = lock_pods(locks, &config("one")).unwrap();
        let said = lock_pods(locks, &config("two")).unwrap_err().to_string();
        for word in ["has logs of pods in", &std::process::id().to_string(), "stop it", "logs_dir in config.toml"] {
            assert!(said.contains(word), "{said}");
        }
        let taken: Vec<_> = shared(locks, &config("two")).unwrap().iter().filter_map(Shared::taken).collect();
        assert_eq!(taken[0], said);
        assert!(taken[1].contains("has the cgroups of pods"), "{taken:?}");
        drop(held);
        let mut two = config("two");
        two.pods_dir.clone_from(&two.logs_dir);
        // One directory for both is one lock.
        assert_eq!(lock_pods(locks, &two).unwrap().len(), 3);
        assert!(shared(locks, &config("one")).unwrap().iter().all(|one| one.taken().is_none()));
    }
}
