//! A run of tests that is killed, with everything that would clean up behind it, leaves nothing that the next one does not remove.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use skerry_tests::controlplane::theirs;
use skerry_tests::manifests::sleeper;
use skerry_tests::paths::{self, RUN_PREFIX, RunDir};
use skerry_tests::process::Process;
use skerry_tests::wait::until;
use skerry_tests::{cleanup, network, procfs};

use crate::world::{janitor, no_stage, story};

/// Where a run that is to be killed says that it may be, and looks whether it need not wait for that.
const HOLD: &str = "SKERRY_TEST_HOLD";
/// Two runs in one place, of which the first is expected to be killed, and what there is before and after.
const TWO_RUNS: &str = r#"
seen() {
  cut -d ' ' -f 5- /proc/self/mountinfo | grep -E 'skerry|kube|netns|k8s'
  ip -o link | cut -d : -f 2 | grep -E 'veth|sk-t'
  ip netns list
  find /sys/fs/cgroup -type d | grep -E 'kube|k8s'
  { iptables -t nat -S; iptables -S INPUT; } 2>/dev/null | grep -E 'sk-t|skerry'
}
seen | sort > "$0/before"
"$@" && exit 99
"$@" & run=$!
wait $run || exit
# Its control plane is taken down when it is gone.
for _ in $(seq 300); do ls -d "${TMPDIR:-/tmp}/skerry-test-$run"-* >/dev/null 2>&1 || break; sleep 0.1; done
seen | sort > "$0/after"
"#;

#[test]
#[ignore = "it is for the story below to start and to kill"]
fn a_run_to_be_killed() -> Result<()> {
    let hold = PathBuf::from(std::env::var_os(HOLD).with_context(|| format!("no {HOLD}"))?);
    story("killed-pod", |world| {
        let mut pod = sleeper("held", world.edge.name(), true);
        pod["spec"]["volumes"] = json!([{"name": "memory", "emptyDir": {"medium": "Memory"}}]);
        pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "memory", "mountPath": "/memory"}]);
        pod["spec"]["containers"][0]["ports"] = json!([{"containerPort": 80, "hostPort": 18080}]);
        world.run_pods(&pod.to_string(), "app=sleeper", 1)?;
        fs::write(hold.join(std::process::id().to_string()), "")?;
        until("somebody to kill this", 120, || Ok(hold.join("go").exists()))
    })
}

#[test]
fn a_killed_run_leaves_nothing_to_the_next() -> Result<()> {
    if theirs().is_some() {
        eprintln!("skipped: what runs put into the cluster of $KUBECONFIG is theirs by one mark");
        return Ok(());
    }
    let run = RunDir::temporary(janitor())?;
    let hold = run.path().join("hold");
    fs::create_dir(&hold)?;
    let room = format!("killed-{}", std::process::id());
    let has_rooms = !Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let enter = paths::repository().join("scripts/room");
    let begin = |words: &[&str]| -> Result<Process> {
        let mut command = Command::new(if has_rooms { enter.as_os_str() } else { "env".as_ref() });
        if has_rooms {
            command.arg(&room);
        }
        command.args(words).arg(std::env::current_exe()?);
        command.args(["--ignored", "--exact", "killed::a_run_to_be_killed", "--test-threads=1"]);
        Process::spawn("the run", command.env(HOLD, &hold), &run.path().join("runs.log"))
    };
    let mut killed = Vec::new();
    let _alone = (!has_rooms).then(no_stage);

    if has_rooms {
        // Its room with it: whoever is in there answers to nobody any more.
        let mut whole = begin(&[])?;
        let held = Held::wait(&mut whole, &hold, &killed)?;
        held.kill()?;
        whole.kill();
        ensure!(held.still_runs() > 0, "nothing outlived the run: nothing is proven");
        killed.push(held);
    }
    // Then in a place that lives on, with its mounts, bridges and cgroups.
    let text = hold.display().to_string();
    let mut two = begin(&["sh", "-c", TWO_RUNS, &text])?;
    let held = Held::wait(&mut two, &hold, &killed)?;
    // Its successor need not wait. It neither, but it stands still.
    kill(Pid::from_raw(held.pid), Signal::SIGSTOP)?;
    fs::write(hold.join("go"), "")?;
    held.kill()?;
    killed.push(held);
    let status = two.wait_exit(300)?;
    ensure!(status.success(), "the next run failed ({status}): {}", two.log_tail(40));

    let seen = |name: &str| fs::read_to_string(hold.join(name)).with_context(|| format!("nothing was seen {name}"));
    let (before, after) = (seen("before")?, seen("after")?);
    // What there was before may be of somebody else, who has ended it meanwhile.
    let new: Vec<&str> = after.lines().filter(|line| before.lines().all(|other| other != *line)).collect();
    ensure!(new.is_empty(), "there is more than before: {new:#?} {}", two.log_tail(40));
    for held in &killed {
        let left = held.left();
        ensure!(left.is_empty(), "of the run {} is left: {left:#?}; {}", held.pid, two.log_tail(40));
    }
    let last = Held::others(&hold, &killed)?;
    ensure!(last.len() == 1, "not one run came through, but {last:?}");
    ensure!(dirs(last[0]).is_empty(), "the next run left {:?}", dirs(last[0]));
    if has_rooms {
        let groups = fs::read_dir("/sys/fs/cgroup")?.flatten().map(|at| at.path().join(format!("skerry-room-{room}")));
        let left: Vec<PathBuf> = groups.filter(|group| group.exists()).collect();
        ensure!(left.is_empty(), "of the room is left: {left:?}");
        fs::remove_file(format!("/run/skerry-room-{room}.lock"))?;
    }
    Ok(())
}

/// A run with a pod, and what it would leave.
struct Held {
    pid: i32,
    /// Processes that it does not end with, each with its time of birth.
    processes: BTreeSet<(i32, Option<u64>)>,
    /// Who cleans up behind it.
    janitors: Vec<i32>,
    dirs: Vec<PathBuf>,
    /// Outside of its directories, places that others have files in, too.
    files: Vec<PathBuf>,
}

impl Held {
    /// Waits until another run than these has its pod.
    fn wait(run: &mut Process, hold: &Path, before: &[Self]) -> Result<Self> {
        run.wait_ready(180, || Self::others(hold, before).is_ok_and(|pids| !pids.is_empty()))?;
        let pid = *Self::others(hold, before)?.first().context("it was there")?;
        let dirs = dirs(pid);
        let all = procfs::processes();
        let is_janitor = |entry: &&procfs::Entry| entry.arguments.get(1).is_some_and(|verb| verb == "janitor");
        let janitors: BTreeSet<i32> = all
            .iter()
            .filter(is_janitor)
            .filter(|entry| entry.arguments.get(2).is_some_and(|dir| dirs.iter().any(|own| own == Path::new(dir))))
            .map(|entry| entry.pid)
            .collect();
        let mut roots: BTreeSet<i32> =
            all.iter().filter(|entry| dirs.iter().any(|dir| entry.mentions(dir))).map(|entry| entry.pid).collect();
        roots.extend(procfs::descendants(&all, &roots));
        roots.extend(procfs::descendants(&all, &BTreeSet::from([pid])));
        let processes: BTreeSet<_> = roots.difference(&janitors).map(|pid| (*pid, procfs::start_time(*pid))).collect();
        let mut files = Vec::new();
        for dir in &dirs {
            let tasks = dir.join("runtime/state/io.containerd.runtime.v2.task/k8s.io");
            for id in cleanup::container_ids(dir) {
                let address = fs::read_to_string(tasks.join(&id).join("address")).unwrap_or_default();
                files.extend(address.trim().strip_prefix("unix://").map(PathBuf::from));
                for network in network::networks(&dir.join("runtime/cni")) {
                    files.push(format!("/var/lib/cni/results/{}-{id}-eth0", network.name).into());
                }
                files.push(format!("/var/lib/cni/results/cni-loopback-{id}-lo").into());
            }
            let lock = format!("edgecore{}-", dir.display()).replace('/', "-");
            let locks = fs::read_dir("/run")?.flatten().map(|entry| entry.path());
            files.extend(
                locks.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&lock))),
            );
        }
        // Else it is not looked where they are.
        ensure!(files.iter().filter(|file| file.exists()).count() >= 3, "where are they? {files:?}");
        ensure!(processes.len() > 8 && janitors.len() == 2 && dirs.len() == 2, "{processes:?} {janitors:?} {dirs:?}");
        Ok(Self { pid, processes, janitors: janitors.into_iter().collect(), dirs, files })
    }

    /// The runs that have, or had, a pod, but these.
    fn others(hold: &Path, known: &[Self]) -> Result<Vec<i32>> {
        let names = fs::read_dir(hold)?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        Ok(names.filter(|pid| known.iter().all(|other| other.pid != *pid)).collect())
    }

    /// SIGKILL to it and to those who clean up behind it, who hear of its end too late.
    fn kill(&self) -> Result<()> {
        for pid in self.janitors.iter().chain([&self.pid]) {
            kill(Pid::from_raw(*pid), Signal::SIGKILL).with_context(|| format!("{pid} was gone before"))?;
        }
        Ok(())
    }

    fn still_runs(&self) -> usize {
        let runs = |(pid, born): &&(i32, Option<u64>)| procfs::is_running(*pid) && procfs::start_time(*pid) == *born;
        self.processes.iter().filter(runs).count()
    }

    /// What there is of it yet.
    fn left(&self) -> Vec<String> {
        let paths = self.dirs.iter().chain(&self.files).filter(|path| path.symlink_metadata().is_ok());
        let mut left: Vec<String> = paths.map(|path| path.display().to_string()).collect();
        if self.still_runs() > 0 {
            left.push(format!("{} processes of {:?}", self.still_runs(), self.processes));
        }
        left
    }
}

/// The directories of a run.
fn dirs(pid: i32) -> Vec<PathBuf> {
    let prefix = format!("{RUN_PREFIX}{pid}-");
    let entries = fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)).map(|entry| entry.path()).collect()
}
