//! `edgecore reset`: takes everything of edgecore off a box. Goes on after a failure, and says at the end what is left. Wherever the
//! configuration points, what goes there is known by its name, and nothing else goes.

use std::ffi::OsStr;
use std::fs::DirEntry;
use std::io::{BufRead as _, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use skerry_proto::cri::runtime_service_client::RuntimeServiceClient;
use skerry_proto::cri::{ListPodSandboxRequest, RemovePodSandboxRequest, StopPodSandboxRequest};
use tokio::process::Command;

use super::unit::systemctl;
use super::{DataDir, join, unit};
use crate::config::{self, Config};
use crate::control::{self, Request};
use crate::devices::mqtt;
use crate::kubelet::observed::label;
use crate::kubelet::{cgroup, dirs};
use crate::runtime::{Cri, connect};
use crate::{app, cni, files, identity, store};

/// How long the agent may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(30);
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// What all pods are in where the runtime uses the systemd driver.
const SLICE: &str = "kubepods.slice";
/// In how many parts the name of a pod's directory comes, of which the last is the UID: `<uid>`.
const POD_PARTS: usize = 1;
/// The same of the directory of its logs: `<namespace>_<name>_<uid>`.
const LOG_PARTS: usize = 3;

#[derive(Args, Debug)]
pub(super) struct Reset {
    #[command(flatten)]
    data: DataDir,
    /// Do not ask.
    #[arg(short, long)]
    yes: bool,
}

impl Reset {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let mut out = std::io::stdout();
        let data_dir = &self.data.data_dir;
        // A damaged configuration must not keep anybody from cleaning up.
        let config = match Config::load(data_dir) {
            Ok(config) => config,
            // Without one, and without an agent that ran, nothing was joined from here: what lies in the system's directories is not this
            // data directory's.
            Err(config::ConfigError::Missing(_)) if !data_dir.join(app::LOCK).exists() => {
                let mut config = Config::new(&"localhost".parse()?, "unknown");
                config.dmi_socket = PathBuf::new();
                // What a join that was broken off left. Where none began, nothing is edgecore's.
                if data_dir.join(join::LOCK).exists() {
                    let _lock = app::lock(&data_dir.join(join::LOCK))?;
                    remove_state(data_dir, &config, false)?;
                }
                writeln!(out, "{} has not joined a cluster: there is nothing to reset", data_dir.display())?;
                return Ok(ExitCode::SUCCESS);
            }
            Err(error) => {
                writeln!(out, "the configuration cannot be read ({error}); the defaults are taken")?;
                Config::new(&"localhost".parse()?, "unknown")
            }
        };
        writeln!(out, "{}", intent(&config, data_dir))?;
        if !self.yes {
            write!(out, "Go on? [y/N] ")?;
            out.flush()?;
            let mut answer = String::new();
            std::io::stdin().lock().read_line(&mut answer)?;
            if !answer.trim().eq_ignore_ascii_case("y") {
                bail!("nothing was changed");
            }
        }
        let mut steps = Steps { out, left: Vec::new() };
        // Somebody else's pods are not this data directory's to end.
        let stopped = stop(&config, data_dir).await.and_then(|()| app::lock_pods(Path::new(app::LOCKS), &config));
        let (alone, _pods) = match stopped {
            Ok(lock) => {
                steps.done("stop the agent", Ok(()))?;
                (true, Some(lock))
            }
            Err(error) => {
                steps.done("stop the agent", Err(error))?;
                (false, None)
            }
        };
        // A running agent would start again what is ended here.
        if alone {
            let network = network(&config).await;
            let pods = remove_pods(&config.runtime_endpoint).await;
            let gone = pods.is_ok();
            steps.done("remove the pods", pods)?;
            // What is mounted beside these is not the pods'.
            let below = dirs::ROOT_DIRS.map(|name| unmount(&config.pods_dir.join(name)));
            let unmounted = below.into_iter().collect::<anyhow::Result<()>>();
            let safe = unmounted.is_ok();
            steps.done("unmount volumes", unmounted)?;
            // What is still mounted there is somebody's data.
            if gone && safe {
                let removed = remove_pods_in(&config.pods_dir.join("pods"), POD_PARTS);
                let removed = removed.and_then(|()| leave_root(&config.pods_dir));
                steps.done("remove pod directories", removed)?;
            } else {
                steps
                    .done("remove pod directories", Err(anyhow::anyhow!("left alone, for pods or mounts are left")))?;
            }
            steps.done("remove pod logs", remove_pods_in(&config.logs_dir, LOG_PARTS))?;
            steps.done("remove log links", remove_links(&config.log_links_dir, &config.logs_dir))?;
            if unit::installed().is_some_and(|unit| !unit::is_of(&unit, data_dir)) {
                writeln!(steps.out, "kept     {} and cgroups, for they are another data directory's", unit::PATH)?;
            } else {
                let stopped = stop_slices(Path::new("/sys/fs/cgroup")).await;
                let removed = remove_cgroups(Path::new("/sys/fs/cgroup"));
                steps.done("remove cgroups", stopped.and(removed))?;
                steps.done("remove the service", remove_unit().await)?;
            }
            steps.done("remove the pod network", remove_network(&network.conf_dir).await)?;
            steps.done("end what served MQTT", mqtt::end_left(data_dir).await.map_err(Into::into))?;
            let again = !steps.left.is_empty();
            steps.done("remove identity, store and configuration", remove_state(data_dir, &config, again))?;
            for shared in app::shared(Path::new(app::LOCKS), &config)? {
                files::remove(&shared.lock)?;
            }
        }
        let Steps { mut out, left } = steps;
        if left.is_empty() {
            writeln!(out, "nothing of edgecore is left but the program itself")?;
            return Ok(ExitCode::SUCCESS);
        }
        writeln!(out, "left; correct it and run `edgecore reset` again:")?;
        for line in &left {
            writeln!(out, "  {line}")?;
        }
        Ok(ExitCode::FAILURE)
    }
}

/// What goes, before it goes.
fn intent(config: &Config, data_dir: &Path) -> String {
    format!(
        "This ends every pod of the runtime {}, and removes the pods' directories in {}, their logs in {}, and edgecore's own files in {}.",
        config.runtime_endpoint,
        config.pods_dir.join("pods").display(),
        config.logs_dir.display(),
        data_dir.display()
    )
}

/// Says what came of each step, and keeps what failed.
struct Steps {
    out: std::io::Stdout,
    left: Vec<String>,
}

impl Steps {
    fn done(&mut self, what: &str, result: anyhow::Result<()>) -> std::io::Result<()> {
        match result {
            Ok(()) => writeln!(self.out, "ok       {what}"),
            Err(error) => {
                let line = format!("{what}: {error:#}");
                writeln!(self.out, "failed   {line}")?;
                self.left.push(line);
                Ok(())
            }
        }
    }
}

/// Lets the agent end its pods in order while it can, then ends it.
async fn stop(config: &Config, data_dir: &Path) -> anyhow::Result<()> {
    if app::running(data_dir).is_some() {
        // What does not end in order is ended through the runtime below.
        let _ = control::ask::<serde_json::Value>(&config.control_socket(data_dir), &Request::ResetPrepare).await;
    }
    if unit::is_systemd() && unit::installed().is_some_and(|unit| unit::is_of(&unit, data_dir)) {
        systemctl(&["disable", "--now", "edgecore.service"]).await?;
    }
    let Some(pid) = app::running(data_dir) else { return Ok(()) };
    kill(Pid::from_raw(pid), Signal::SIGTERM).with_context(|| format!("cannot end process {pid}"))?;
    let ended = async {
        while app::running(data_dir).is_some() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(END_TIMEOUT, ended).await.with_context(|| {
        format!("process {pid} did not end within {} s; end it with `kill -9 {pid}`", END_TIMEOUT.as_secs())
    })
}

/// Where the network configuration was written: the runtime is asked as long as it is of use.
async fn network(config: &Config) -> cni::Places {
    let setup = async { Cri::new(connect::channel(&config.runtime_endpoint).ok()?).setup().await.ok() };
    let setup = tokio::time::timeout(CALL_TIMEOUT, setup).await.ok().flatten().unwrap_or_default();
    cni::Places::of(config, &setup)
}

/// Every sandbox that belongs to a pod: on an edge box no one else makes any.
async fn remove_pods(endpoint: &str) -> anyhow::Result<()> {
    if !connect::socket_path(endpoint)?.exists() {
        bail!(
            "the runtime does not run ({endpoint}), so its pods cannot be removed; start it and run `edgecore reset` again"
        );
    }
    let mut client = RuntimeServiceClient::new(connect::channel(endpoint)?);
    let list = client.list_pod_sandbox(ListPodSandboxRequest { filter: None });
    let list = tokio::time::timeout(CALL_TIMEOUT, list).await.context("the runtime does not answer")?;
    let sandboxes =
        list.map_err(|status| anyhow::anyhow!("the runtime does not list its pods: {}", status.message()))?;
    let mut failed = Vec::new();
    for sandbox in sandboxes.into_inner().items {
        if !sandbox.labels.contains_key(label::POD_UID) {
            continue;
        }
        let removed = async {
            client.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: sandbox.id.clone() }).await?;
            client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: sandbox.id.clone() }).await
        };
        match tokio::time::timeout(CALL_TIMEOUT, removed).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => failed.push(format!("{}: {}", sandbox.id, status.message())),
            Err(_) => failed.push(format!("{}: no answer", sandbox.id)),
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("; ")) }
}

/// Unmounts everything below a directory, the innermost and latest first.
fn unmount(dir: &Path) -> anyhow::Result<()> {
    for path in mounts(dir)?.iter().rev() {
        if umount2(path, MntFlags::UMOUNT_NOFOLLOW).is_err() {
            // Still in use: out of sight now, gone with its last user.
            let _ = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
    let left = mounts(dir)?;
    if left.is_empty() {
        return Ok(());
    }
    bail!("still mounted: {}", left.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "))
}

/// Undoes what was done to the directory above the pods' own: the bind of it onto itself, and the empty directories in it. A file system
/// of its own that is mounted there stays.
fn leave_root(root: &Path) -> anyhow::Result<()> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
    let at = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    for _ in table.lines().filter(|line| is_bind_onto_itself(line, &at)) {
        umount2(&at, MntFlags::UMOUNT_NOFOLLOW).with_context(|| format!("cannot unmount {}", at.display()))?;
    }
    for name in dirs::ROOT_DIRS {
        // One that holds something is somebody else's by now.
        let _ = std::fs::remove_dir(root.join(name));
    }
    let _ = std::fs::remove_dir(root);
    Ok(())
}

/// Of the mounts on a directory, those that show the directory itself: their fourth field ends in its name, where a file system's own root is `/`.
fn is_bind_onto_itself(line: &str, dir: &Path) -> bool {
    let mut fields = line.split(' ').skip(3).map(unescape);
    let (Some(shown), Some(at)) = (fields.next(), fields.next()) else { return false };
    at == dir && shown.file_name().is_some() && shown.file_name() == dir.file_name()
}

fn mounts(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    Ok(mounts_below(&table, &dir))
}

/// Mount points strictly below a directory, in the order in which they were made.
fn mounts_below(table: &str, dir: &Path) -> Vec<PathBuf> {
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescape)
        .filter(|path| path.starts_with(dir) && path != dir)
        .collect()
}

/// The kernel writes space, tab, newline and backslash as octal numbers.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    let bytes = text.as_bytes();
    let mut path = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = (bytes[at] == b'\\')
            .then(|| bytes.get(at + 1..at + 4))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        path.push(octal.unwrap_or(bytes[at]));
        at += if octal.is_some() { 4 } else { 1 };
    }
    std::ffi::OsString::from_vec(path).into()
}

/// Removes the directories of pods in a directory, and it as well when it is empty then. What has no pod's name is somebody else's, as
/// in a `/var/log` that the logs of pods are put right into.
fn remove_pods_in(dir: &Path, parts: usize) -> anyhow::Result<()> {
    let mut result = Ok(());
    for entry in entries(dir)? {
        if is_of_pod(&entry.file_name(), parts) && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let removed = remove_tree(&entry.path());
            result = result.and(removed);
        }
    }
    let _ = std::fs::remove_dir(dir);
    result
}

/// Whether the last of so many parts of a name is the UID of a pod: a UUID, or a hash.
fn is_of_pod(name: &OsStr, parts: usize) -> bool {
    let name = name.to_string_lossy();
    let uid = name.rsplit('_').next().unwrap_or_default();
    name.split('_').count() == parts
        && uid.len() >= 32
        && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

/// What is in a directory; nothing when it is gone.
fn entries(dir: &Path) -> anyhow::Result<Vec<DirEntry>> {
    match std::fs::read_dir(dir) {
        Ok(entries) => Ok(entries.flatten().collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("cannot list {}", dir.display())),
    }
}

/// Only for directories that nobody else gives such a name.
fn remove_tree(dir: &Path) -> anyhow::Result<()> {
    if !mounts(dir)?.is_empty() {
        bail!("something is mounted below {}", dir.display());
    }
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Only links that lead to logs of pods.
fn remove_links(dir: &Path, logs: &Path) -> anyhow::Result<()> {
    let is_ours = |target: PathBuf| {
        let below = target.strip_prefix(logs).ok().and_then(|below| below.iter().next());
        below.is_some_and(|name| is_of_pod(name, LOG_PARTS))
    };
    for entry in entries(dir)? {
        if std::fs::read_link(entry.path()).is_ok_and(is_ours) {
            files::remove(&entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    // Fails when somebody else's are in it, which is right.
    let _ = std::fs::remove_dir(dir);
    Ok(())
}

/// Of a runtime with the systemd driver: units that nobody else stops, and what systemd was told of them.
async fn stop_slices(root: &Path) -> anyhow::Result<()> {
    let slices = ["", "systemd"].map(|name| root.join(name).join(SLICE));
    // They would be killed, and are another agent's, or pods that could not be removed.
    if let Some(slice) = slices.iter().find(|slice| has_processes(slice)) {
        bail!("processes are left in {}: `systemctl stop {SLICE}` ends them", slice.display());
    }
    if slices.iter().any(|slice| slice.exists()) && unit::is_systemd() {
        systemctl(&["stop", SLICE]).await?;
    }
    for entry in entries(Path::new(cgroup::TOLD))? {
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b"kubepods") && name.as_encoded_bytes().ends_with(b".slice.d") {
            std::fs::remove_dir_all(entry.path())
                .with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn has_processes(group: &Path) -> bool {
    let own = std::fs::read_to_string(group.join("cgroup.procs")).is_ok_and(|processes| !processes.is_empty());
    let below = || std::fs::read_dir(group).into_iter().flatten().flatten();
    own || below().any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()) && has_processes(&entry.path()))
}

/// The `kubepods` groups of the unified hierarchy or of every controller's.
fn remove_cgroups(root: &Path) -> anyhow::Result<()> {
    let unified = root.join("cgroup.controllers").exists();
    let roots: Vec<PathBuf> = if unified {
        vec![root.to_owned()]
    } else {
        std::fs::read_dir(root)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
            .collect()
    };
    let mut failed = Vec::new();
    for root in roots {
        for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("kubepods")
                && let Err(error) = remove_cgroup(&entry.path())
            {
                failed.push(format!("{}: {error}", entry.path().display()));
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("; ")) }
}

fn remove_cgroup(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    std::fs::remove_dir(dir)
}

async fn remove_network(conf_dir: &Path) -> anyhow::Result<()> {
    let ours = conf_dir.join(cni::FILE);
    files::remove(&ours).with_context(|| format!("cannot remove {}", ours.display()))?;
    remove_tree(Path::new("/var/lib/cni/networks/skerry"))?;
    // Unlike what is in /sys, it is that of whoever reads it.
    let links = std::fs::read_to_string("/proc/self/net/dev").context("cannot look for network interfaces")?;
    if !links.lines().any(|line| line.trim_start().starts_with(&format!("{}:", cni::BRIDGE))) {
        return Ok(());
    }
    let output = Command::new("ip").args(["link", "delete", cni::BRIDGE]).output().await;
    let output =
        output.with_context(|| format!("cannot run `ip`; remove the bridge with `ip link delete {}`", cni::BRIDGE))?;
    if !output.status.success() {
        bail!("bridge {}: {}", cni::BRIDGE, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

async fn remove_unit() -> anyhow::Result<()> {
    let path = Path::new(unit::PATH);
    if !path.exists() {
        return Ok(());
    }
    files::remove(path).with_context(|| format!("cannot remove {}", path.display()))?;
    if unit::is_systemd() { systemctl(&["daemon-reload"]).await } else { Ok(()) }
}

/// Only what edgecore made: the directory may be shared. The configuration stays when reset has to run `again`, for it says where
/// what is left is.
fn remove_state(data_dir: &Path, config: &Config, again: bool) -> anyhow::Result<()> {
    let identity = data_dir.join(identity::DIR);
    for entry in entries(&identity)? {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if identity::FILES.iter().any(|known| name.starts_with(*known)) {
            files::remove(&entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    let _ = std::fs::remove_dir(&identity);
    files::remove(&config.control_socket(data_dir))?;
    if let Some(socket) = config.dmi_socket() {
        files::remove(&socket)?;
        remove_if_empty(socket.parent());
    }
    for entry in std::fs::read_dir(data_dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let ours = name.starts_with(store::FILE)
            || name.starts_with("node.key")
            || (name == config::FILE && !again)
            || [
                store::BALLAST,
                "config.toml.tmp",
                "machine-id",
                "machine-id.tmp",
                mqtt::PASSWORDS,
                mqtt::ACCESS,
                "mqtt-access.tmp",
                app::LOCK,
                ".probe",
            ]
            .contains(&name.as_ref());
        if ours {
            files::remove(&entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    if again {
        return Ok(());
    }
    // It tells a data directory from any other, so it goes last.
    files::remove(&data_dir.join(join::LOCK))?;
    match std::fs::remove_dir(data_dir) {
        Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
            bail!("{} holds files that are not edgecore's", data_dir.display())
        }
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", data_dir.display()))
        }
        _ => {
            if data_dir == Path::new(config::DATA_DIR) {
                remove_if_empty(data_dir.parent());
            }
            Ok(())
        }
    }
}

/// A directory that was made for one thing of ours, and may be another's, too.
fn remove_if_empty(dir: Option<&Path>) {
    let _ = dir.map(std::fs::remove_dir);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_goes_with_the_runtime_and_every_directory() {
        let mut config = Config::new(&"h:1".parse().unwrap(), "n");
        config.runtime_endpoint = "unix:///run/other.sock".to_owned();
        let said = intent(&config, Path::new("/srv/edge"));
        for named in ["unix:///run/other.sock", "/var/lib/kubelet/pods", "/var/log/pods", "/srv/edge"] {
            assert!(said.contains(named), "{said}");
        }
    }

    #[test]
    fn pods_go_and_what_is_beside_them_stays() {
        let dir = tempfile::tempdir().unwrap();
        let uid = "0b7e6c1a-93d5-4f0e-8a52-6f1c2d3e4b5a";
        let hash = "0123456789abcdef0123456789abcdef";
        let logs = dir.path().join("log");
        for name in ["journal/1", "my_app_logs", uid, &format!("shop_web-0_{uid}/app"), &format!("shop_web-1_{hash}")] {
            std::fs::create_dir_all(logs.join(name)).unwrap();
        }
        let (file, link) = (format!("a_b_{uid}"), format!("c_d_{uid}"));
        std::fs::write(logs.join(&file), "").unwrap();
        std::os::unix::fs::symlink(logs.join("journal"), logs.join(&link)).unwrap();
        remove_pods_in(&logs, LOG_PARTS).unwrap();
        let mut left: Vec<_> = entries(&logs).unwrap().iter().map(DirEntry::file_name).collect();
        left.sort();
        assert_eq!(left, [uid, file.as_str(), link.as_str(), "journal", "my_app_logs"]);
        assert!(logs.join("journal/1").exists());

        let pods = dir.path().join("pods");
        std::fs::create_dir_all(pods.join(uid).join("volumes")).unwrap();
        remove_pods_in(&pods, POD_PARTS).unwrap();
        assert!(!pods.exists());
        remove_pods_in(&pods, POD_PARTS).unwrap();
    }

    #[test]
    fn mounts_are_found_below_a_directory_only() {
        let table = "22 1 0:20 / / rw - ext4 /dev/a rw\n30 22 0:30 / /var/lib/kubelet rw - ext4 /dev/b rw\n\
                     31 30 0:31 / /var/lib/kubelet/pods/a/x\\040y rw - tmpfs tmpfs rw\n32 30 0:32 / /var/lib/kubelet-other/z rw - tmpfs tmpfs rw\n";
        assert_eq!(mounts_below(table, Path::new("/var/lib/kubelet")), [Path::new("/var/lib/kubelet/pods/a/x y")]);
        assert_eq!(unescape("a\\0"), Path::new("a\\0"));
        assert_eq!(unescape("tab\\011\\134"), Path::new("tab\t\\"));
    }

    #[test]
    fn state_goes_and_what_is_not_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir_all(data.join(identity::DIR)).unwrap();
        for name in [
            "identity/node.crt",
            "identity/node.key.new.tmp",
            "identity/ca.crt",
            "identity/mine.txt",
            join::LOCK,
            "config.toml",
            "store.db",
            "store.db-wal",
            "store.db.damaged-1",
            "node.key",
            store::BALLAST,
            "machine-id",
            "edgecore.lock",
            "mine.txt",
        ] {
            std::fs::write(data.join(name), "x").unwrap();
        }
        let config = Config::new(&"h:1".parse().unwrap(), "n");
        assert!(remove_state(&data, &config, false).unwrap_err().to_string().contains("not edgecore's"));
        std::fs::write(data.join("config.toml"), "x").unwrap();
        remove_state(&data, &config, true).unwrap();
        assert!(data.join("config.toml").exists(), "a second reset needs it");
        let left: Vec<_> = entries(&data.join(identity::DIR)).unwrap().iter().map(DirEntry::file_name).collect();
        assert_eq!(left, ["mine.txt"]);
        std::fs::remove_file(data.join("identity/mine.txt")).unwrap();
        assert!(remove_state(&data, &config, false).is_err());
        let left: Vec<_> = std::fs::read_dir(&data).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["mine.txt"]);
        std::fs::remove_file(data.join("mine.txt")).unwrap();
        remove_state(&data, &config, false).unwrap();
        assert!(!data.exists());
        remove_state(&data, &config, false).unwrap();
    }

    #[test]
    fn only_links_to_our_logs_go() {
        let dir = tempfile::tempdir().unwrap();
        let (links, logs) = (dir.path().join("containers"), dir.path().join("pods"));
        std::fs::create_dir(&links).unwrap();
        let pod = "shop_web_0b7e6c1a-93d5-4f0e-8a52-6f1c2d3e4b5a/app/0.log";
        for (name, target) in [("a", logs.join(pod)), ("b", "/elsewhere".into()), ("c", logs.join("pods").join(pod))] {
            std::os::unix::fs::symlink(target, links.join(name)).unwrap();
        }
        remove_links(&links, &logs).unwrap();
        assert!(links.join("a").symlink_metadata().is_err());
        assert!(links.join("b").symlink_metadata().is_ok() && links.join("c").symlink_metadata().is_ok());
    }
}
