//! A box on which nobody gave any directory: pods, logs and edgecore's own files are where the rest of the world looks for them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;
use skerry_tests::controlplane::theirs;
use skerry_tests::guest;
use skerry_tests::kubectl::container_ids;
use skerry_tests::manifests::{container, sleeper};
use skerry_tests::paths;
use skerry_tests::process::{self, Output, Process};
use skerry_tests::runtime::Cni;

use crate::world::{Setup, World, alone, no_stage};

/// What has nothing in it on a new box.
const EMPTY: [&str; 2] = ["/run", "/var/log"];
/// What has, and what comes is laid over it: below /run, by these names.
const LAYERED: [(&str, &str); 2] = [("/etc", "etc"), ("/var/lib", "lib")];
/// And of that nothing.
const NOT_YET: [&str; 3] = ["/var/lib/kubelet", "/var/lib/skerry", "/var/lib/cni"];

#[test]
fn a_box_of_defaults_has_everything_where_others_look() -> Result<()> {
    if theirs().is_some() {
        eprintln!("skipped: what a run leaves in a mount namespace is not found by the next");
        return Ok(());
    }
    // A thread may have mounts of its own, which what it starts sees, and nobody else.
    let told = std::thread::scope(|scope| {
        let box_of_defaults = || {
            // The common stage has an edgecore, which has them.
            drop(no_stage());
            let _cgroups = the_cgroups()?;
            new_box()?;
            alone("defaults", setup(), tell)
        };
        scope.spawn(box_of_defaults).join()
    });
    told.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn setup() -> Setup {
    Setup { cni: Cni::Empty, joined: false, ..Setup::default() }
}

/// The lock on the cgroups of pods, which are the machine's: in a /run of its own the edgecore of this box would not see who has it.
fn the_cgroups() -> Result<Flock<File>> {
    let tree = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"].iter().find_map(|tree| fs::metadata(tree).ok());
    let tree = tree.context("no cgroups")?;
    let lock = File::create(format!("/run/edgecore-cgroups-{:x}-{}.lock", tree.dev(), tree.ino()))?;
    Flock::lock(lock, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, errno)| errno)
        .context("another edgecore has the cgroups of this machine: end it, or tell the story in a room")
}

/// System directories of this thread's own.
fn new_box() -> Result<()> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).context("no mount namespace")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let empty = |place| mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), none).context(place);
    EMPTY.into_iter().try_for_each(empty)?;
    for (place, name) in LAYERED {
        let (upper, work) = (format!("/run/{name}"), format!("/run/work-{name}"));
        fs::create_dir(&upper)?;
        fs::create_dir(&work)?;
        let layers = format!("lowerdir={place},upperdir={upper},workdir={work}");
        mount(Some("overlay"), place, Some("overlay"), MsFlags::empty(), Some(layers.as_str())).context(place)?;
    }
    // Mounted, too: below, others may make such directories meanwhile.
    NOT_YET
        .into_iter()
        .try_for_each(|place| fs::create_dir_all(place).map_err(Into::into).and_then(|()| empty(place)))?;
    fs::create_dir(Path::new("/run/containerd"))?;
    Ok(())
}

fn tell(world: &mut World) -> Result<()> {
    symlink(world.runtime.socket(), "/run/containerd/containerd.sock")?;
    let before = files()?;
    let token = world.cloud.new_token(&[])?.token;
    let address = world.address().to_string();
    let joined = edgecore(&["join", &address, "--token", &token, "--node-name", world.edge.name(), "--no-start"])?;
    ensure!(joined.success && joined.stdout.contains("edgecore run"), "join: {}", joined.text());
    guest::mark_node(world.admin(), world.edge.name())?;
    let mut agent =
        Process::spawn("edgecore", Command::new(paths::product("edgecore")?).arg("run"), &world.edge.log())?;
    world.wait_node_ready()?;

    let uid = pod(world)?;
    let status = edgecore(&["status"])?;
    ensure!(status.success && status.stdout.contains(world.edge.name()), "status: {}", status.text());
    let pods = edgecore(&["get", "pods"])?;
    ensure!(pods.success && pods.stdout.contains("placed"), "get pods: {}", pods.text());
    let log = edgecore(&["logs", "placed"])?;
    ensure!(log.success && log.stdout == "one line\n", "logs: {}", log.text());

    // A collector's own files, among ours.
    fs::write("/var/log/containers/collector.pos", "")?;
    fs::create_dir_all("/var/lib/kubelet/plugins/csi.example.org")?;
    let reset = process::pipe(Command::new(paths::product("edgecore")?).arg("reset"), b"y\n")?;
    let said = String::from_utf8_lossy(&reset.output);
    ensure!(reset.code == Some(0), "reset: {said}{}", reset.errors);
    for place in ["/var/lib/kubelet/pods", "/var/log/pods", "/var/lib/skerry/edgecore", "nothing of edgecore is left"] {
        ensure!(said.contains(place), "reset does not name {place}: {said}");
    }
    agent.wait_exit(5)?;
    ensure!(!Path::new("/var/lib/kubelet/pods").join(uid).exists(), "the pod's directory is left");
    fs::remove_file("/var/log/containers/collector.pos").context("reset took what is a collector's")?;
    fs::remove_dir("/var/lib/kubelet/plugins/csi.example.org").context("reset took what is a driver's")?;
    for place in ["/var/lib/kubelet/plugins", "/var/log/containers"] {
        fs::remove_dir(place).with_context(|| format!("more than others' files is left in {place}"))?;
    }
    let left: BTreeSet<PathBuf> = files()?.difference(&before).cloned().collect();
    ensure!(left.is_empty(), "reset left {left:?}");
    Ok(())
}

/// Runs a pod and looks where its files are; its UID.
fn pod(world: &World) -> Result<String> {
    let name = world.edge.name();
    world.kubectl.create(
        &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "sea"}, "data": {"depth": "30 m"}}),
    )?;
    let mut pod = sleeper("placed", name, true);
    pod["spec"]["containers"] = json!([container("main", &["sh", "-c", "echo one line; exec sleep 1000000"])]);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "chart", "mountPath": "/chart"}]);
    pod["spec"]["volumes"] = json!([{"name": "chart", "configMap": {"name": "sea"}}]);
    let pods = world.run_pods(&pod.to_string(), "app=sleeper", 1)?;
    let uid = pods[0]["metadata"]["uid"].as_str().context("no UID")?.to_owned();
    let (namespace, id) = (world.kubectl.namespace(), &container_ids(&pods[0])["main"]);
    let id = id.rsplit('/').next().unwrap_or_default();

    let file = PathBuf::from(format!("/var/log/pods/{namespace}_placed_{uid}/main/0.log"));
    let link = PathBuf::from(format!("/var/log/containers/placed_{namespace}_main-{id}.log"));
    ensure!(
        fs::read_link(&link).with_context(|| format!("{}", link.display()))? == file,
        "{} leads elsewhere",
        link.display()
    );
    let log = fs::read_to_string(&link)?;
    ensure!(log.ends_with(" stdout F one line\n"), "the collector reads {log:?}");
    let volumes = Path::new("/var/lib/kubelet/pods").join(&uid).join("volumes");
    let depth = fs::read_to_string(volumes.join("kubernetes.io~configmap/chart/depth"))?;
    ensure!(depth == "30 m", "the ConfigMap says {depth:?}");
    let projected = fs::read_dir(volumes.join("kubernetes.io~projected"))?.next().context("no projected volume")??;
    ensure!(projected.file_name().to_string_lossy().starts_with("kube-api-access-"), "{:?}", projected.file_name());
    ensure!(fs::read_to_string(projected.path().join("token"))?.split('.').count() == 3, "the token is none");
    Ok(uid)
}

/// Runs edgecore as somebody does who knows of no directories.
fn edgecore(words: &[&str]) -> Result<Output> {
    process::run(Command::new(paths::product("edgecore")?).args(words), 60)
}

/// All that is where things come and go; what the runtime and the CNI plugins have is theirs.
fn files() -> Result<BTreeSet<PathBuf>> {
    const THEIRS: [&str; 6] = [
        "/run/containerd",
        "/run/work-etc",
        "/run/work-lib",
        "/run/xtables.lock",
        "/var/lib/cni/networks",
        "/var/lib/cni/results",
    ];
    fn walk(dir: &Path, found: &mut BTreeSet<PathBuf>) -> Result<()> {
        for entry in fs::read_dir(dir).with_context(|| format!("{}", dir.display()))? {
            let entry = entry?;
            if THEIRS.iter().any(|theirs| entry.path() == Path::new(theirs)) {
                continue;
            }
            if entry.file_type()?.is_dir() {
                walk(&entry.path(), found)?;
            }
            found.insert(entry.path());
        }
        Ok(())
    }
    let mut found = BTreeSet::new();
    for place in EMPTY.into_iter().chain(NOT_YET) {
        walk(Path::new(place), &mut found)?;
    }
    Ok(found)
}
