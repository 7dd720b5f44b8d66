//! An edge box as people have them: systemd, cgroups of version 2 alone, the system's own directories, and a power cut that loses what was
//! not on the disk. Such a machine is a virtual one, which takes minutes: `scripts/soak machine`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skerry_tests::cloudcore::Cloudcore;
use skerry_tests::guest;
use skerry_tests::images::PAUSE;
use skerry_tests::kubectl::{Kubectl, container_ids, is_ready};
use skerry_tests::machine::{HOST, IMAGES, Machine};
use skerry_tests::manifests::{GRACE, container, list};
use skerry_tests::paths::RunDir;
use skerry_tests::wait::{eventually, stays, until};

use crate::world::{control, janitor, no_stage};

/// The host name of the machine.
const NODE: &str = "machine";
/// Emulated, everything takes its time.
const SLOW: u64 = 240;
const NAMES: [&str; 3] = ["burstable", "guaranteed", "besteffort"];
/// All there can be of a node but what changes by itself and what is the runtime's own, of which directories are nobody's concern.
const TRACES: &str = r"
    find /etc /root /run /usr/local /var /opt -xdev -not -path '/run/systemd/*' -not -path '/run/udev/*' -not -path '/run/log/*' \
        -not -path '/var/log/journal*' -not -path '/var/lib/systemd/*' -not -path '/var/tmp/*' -not -path '*/io.containerd.*' \
        -not \( -type d \( -path '/run/containerd*' -o -path '/run/netns' -o -path '/var/lib/cni*' \) \) -printf '%y %p\n' | sort
    find /sys/fs/cgroup -maxdepth 1 -type d | sort
    find /run/systemd -path '*/system.control/*kube*' | sort
    systemctl list-units --all --no-legend --plain --type=service,slice,scope,mount '*edgecore*' '*kube*' '*cri-*' | sort
    ip -brief link | cut -d' ' -f1
    iptables-save | grep '^-' | sort
    findmnt -rno TARGET | sort";

#[test]
#[ignore = "minutes: scripts/soak machine"]
fn with_cgroupfs() -> Result<()> {
    play("machine-cgroupfs", false)
}

#[test]
#[ignore = "minutes: scripts/soak machine"]
fn with_the_systemd_driver() -> Result<()> {
    play("machine-systemd", true)
}

/// Joins, works, goes through a power cut, is reset.
fn play(namespace: &str, systemd: bool) -> Result<()> {
    let _alone = no_stage();
    let run = RunDir::temporary(janitor())?;
    let control = control()?;
    let cloud = Cloudcore::start(&control, &run.path().join("cloudcore"), None)?;
    let admin = control.kubectl().clone();
    let mut machine = Machine::new(&run.path().join("machine"))?;
    let kubectl = admin.in_namespace(namespace);
    admin.create(
        &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": guest::marks()}}),
    )?;
    machine.boot(true)?;
    let mut story = Story { machine, cloud, kubectl, admin, systemd };
    let told = story.tell().inspect_err(|_| story.autopsy(namespace));
    story.machine.power_off();
    story.admin.delete("node", NODE).ok();
    story.kubectl.run(&["delete", "pods", "--all", "--force", "--grace-period=0", "--wait=false"]).ok();
    story.admin.delete("namespace", namespace).ok();
    told
}

struct Story {
    machine: Machine,
    cloud: Cloudcore,
    kubectl: Kubectl,
    admin: Kubectl,
    systemd: bool,
}

impl Story {
    fn tell(&mut self) -> Result<()> {
        self.set_up_the_runtime()?;
        let before = self.machine.sh(TRACES)?;
        self.join()?;
        self.run_pods()?;
        self.limits_hold()?;
        self.is_measured()?;
        self.is_killed_for_want_of_memory()?;
        self.outlives_its_agent()?;
        self.comes_back_from_the_store_alone()?;
        self.is_reset(&before)
    }

    fn set_up_the_runtime(&self) -> Result<()> {
        let systemd = self.systemd;
        let config = format!(
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{PAUSE}\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\nSystemdCgroup = {systemd}\n"
        );
        self.machine
            .sh(&format!("cat > /etc/containerd/config.toml <<'TOML'\n{config}TOML\nsystemctl restart containerd"))?;
        self.machine.sh(&format!("ctr -n k8s.io images import {IMAGES} && rm {IMAGES}")).map(drop)
    }

    /// The printed command, as it is.
    fn join(&self) -> Result<()> {
        let token =
            self.cloud.token(&["create", "--advertise-address", &format!("{HOST}:{}", self.cloud.address().port())])?;
        ensure!(token.success, "cloudcore token create failed: {}", token.text());
        let said = self.machine.sh(&token.stdout)?;
        eprintln!("{said}");
        ensure!(said.lines().all(|line| line.starts_with("ok ")), "not all is well: {said}");
        for words in ["cgroups: v2", "edgecore.service runs", "container runtime: containerd"] {
            ensure!(said.contains(words), "it does not say {words:?}: {said}");
        }
        let states = self
            .machine
            .sh("systemctl is-active edgecore; systemctl is-enabled edgecore; systemctl show edgecore -p NRestarts")?;
        ensure!(states == "active\nenabled\nNRestarts=0", "the service is {states}");
        guest::mark_node(&self.admin, NODE)?;
        self.wait_node(true)?;
        self.machine.sh("edgecore status").map(drop)
    }

    fn run_pods(&self) -> Result<()> {
        for kind in ["serviceaccount/default", "configmap/kube-root-ca.crt"] {
            self.kubectl.run(&["wait", "--for=create", kind, "--timeout=60s"])?;
        }
        let settings = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"mode": "storm"}});
        let pods = NAMES.map(pod);
        self.kubectl.apply(&list(&[&[settings], &pods[..]].concat()))?;
        self.wait_pods()?;
        self.machine.sh(&format!("[ \"$(find /var/log/pods -name '*.log' | wc -l)\" = {0} ] && [ \"$(ls /var/log/containers | wc -l)\" = {0} ]", NAMES.len()))?;
        self.see_inside("storm")
    }

    /// What pods see of what they are given.
    fn see_inside(&self, expected: &str) -> Result<()> {
        for name in NAMES {
            let look = "cat /config/mode; echo; df -t tmpfs /scratch | tail -n 1; cat /var/run/secrets/kubernetes.io/serviceaccount/token";
            let said = self.inside(name, look)?;
            let lines: Vec<&str> = said.lines().collect();
            let [mode, scratch, token] = lines[..] else { anyhow::bail!("{name} sees {said}") };
            ensure!(
                mode == expected
                    && scratch.starts_with("tmpfs")
                    && scratch.contains(" 16384 ")
                    && token.split('.').count() == 3,
                "{name} sees {said}"
            );
        }
        Ok(())
    }

    /// The limits and weights stand where a kubelet would have them.
    fn limits_hold(&self) -> Result<()> {
        let limited = "67108864\n20000 100000";
        for (name, limits, weight) in
            [(NAMES[0], limited, "2"), (NAMES[1], limited, "8"), (NAMES[2], "max\nmax 100000", "1")]
        {
            let object = self.kubectl.get("pod", name)?;
            let uid = object["metadata"]["uid"].as_str().context("no UID")?;
            let id = container_ids(&object).remove("main").context("no container")?;
            let (pod_dir, container_dir) = self.places(name, uid, &id);
            for dir in [&pod_dir, &container_dir] {
                let have = self.machine.sh(&format!("cd {dir} && cat memory.max cpu.max"))?;
                ensure!(have == limits, "{name}: {dir} has {have:?}");
            }
            // Of the tiers, all that is in them; nobody waits for those.
            let dirs = if name == NAMES[1] { pod_dir } else { format!("{pod_dir} {pod_dir}/..") };
            for dir in dirs.split(' ') {
                let have = || self.machine.sh(&format!("cat {dir}/cpu.weight"));
                until("a weight", SLOW, || Ok(have()? == weight))
                    .with_context(|| format!("{name}: {dir} has {:?}, not {weight}", have()))?;
            }
        }
        Ok(())
    }

    /// Where the cgroups of a pod and its container are.
    fn places(&self, class: &str, uid: &str, id: &str) -> (String, String) {
        let root = "/sys/fs/cgroup";
        let inner = class != "guaranteed";
        let pod = if self.systemd {
            let uid = uid.replace('-', "_");
            let (tier, dash) =
                if inner { (format!("/kubepods-{class}.slice"), format!("-{class}")) } else { Default::default() };
            format!("{root}/kubepods.slice{tier}/kubepods{dash}-pod{uid}.slice")
        } else {
            let tier = if inner { format!("/{class}") } else { String::new() };
            format!("{root}/kubepods{tier}/pod{uid}")
        };
        let container = if self.systemd { format!("{pod}/cri-containerd-{id}.scope") } else { format!("{pod}/{id}") };
        (pod, container)
    }

    fn is_measured(&self) -> Result<()> {
        let page = format!("/api/v1/nodes/{NODE}/proxy/stats/summary");
        eventually("processor time and memory of every pod", SLOW, || {
            let summary: Value = serde_json::from_str(&self.admin.run(&["get", "--raw", &page])?)?;
            let pods = summary["pods"].as_array().context("no pods")?;
            let known = |stats: &Value| {
                stats["cpu"]["usageCoreNanoSeconds"].as_u64() > Some(0)
                    && stats["memory"]["workingSetBytes"].as_u64() > Some(0)
            };
            let all = pods.iter().filter(|pod| known(pod) && known(&pod["containers"][0])).count();
            ensure!(known(&summary["node"]) && all == NAMES.len(), "only {all} pods: {summary}");
            Ok(Some(()))
        })?;
        let top = self.machine.sh("edgecore top pod -A")?;
        eprintln!("{top}");
        ensure!(NAMES.iter().all(|name| top.contains(name)), "a pod is missing: {top}");
        Ok(())
    }

    fn is_killed_for_want_of_memory(&self) -> Result<()> {
        let mut hungry = pod("burstable");
        hungry["metadata"] = json!({"name": "hungry", "labels": {"app": "hungry"}});
        hungry["spec"]["restartPolicy"] = json!("Never");
        hungry["spec"]["containers"][0]["command"] = json!(["sh", "-c", "tail /dev/zero"]);
        hungry["spec"]["containers"][0].as_object_mut().context("no container")?.remove("readinessProbe");
        self.kubectl.create(&hungry)?;
        let ended = |pod: &Value| pod["status"]["phase"] == "Failed";
        let pod = self.kubectl.wait("pod", "hungry", "Failed", SLOW, ended)?;
        let state = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
        ensure!(state["reason"] == "OOMKilled" && state["exitCode"] == 137, "it ended otherwise: {state}");
        self.kubectl.delete("pod", "hungry")?;
        self.kubectl.wait_gone("pod", "hungry", SLOW)?;
        until("the cgroup of the pod to be gone", SLOW, || Ok(self.pod_cgroups()?.len() == NAMES.len()))
            .with_context(|| format!("there are {:?}", self.pod_cgroups()))
    }

    /// The cgroups of pods, and with the systemd driver the units that they are, and of which it was told something.
    fn pod_cgroups(&self) -> Result<Vec<String>> {
        let dirs = self.machine.sh("find /sys/fs/cgroup/kubepods* -type d -name '*pod????????[-_]*'")?;
        let units =
            self.machine.sh("systemctl list-units --all --no-legend --plain 'kubepods*-pod*' | cut -d' ' -f1")?;
        let told = self
            .machine
            .sh("cd /run/systemd/system.control 2>/dev/null && ls -d *-pod* 2>/dev/null | sed 's/\\.d$//'; true")?;
        let names = dirs.lines().filter_map(|dir| dir.rsplit('/').next()).chain(units.lines()).chain(told.lines());
        Ok(names.map(str::to_owned).collect::<BTreeSet<_>>().into_iter().collect())
    }

    /// systemd starts a killed agent again and leaves the pods alone, and so it does when told to restart it or the runtime.
    fn outlives_its_agent(&self) -> Result<()> {
        let before = self.tasks()?;
        for script in ["systemctl kill -s KILL edgecore", "systemctl restart edgecore", "systemctl restart containerd"]
        {
            let pid = self.machine.sh("systemctl show edgecore -p MainPID")?;
            self.machine.sh(script)?;
            if !script.ends_with("containerd") {
                until("another edgecore", SLOW, || Ok(self.machine.sh("systemctl show edgecore -p MainPID")? != pid))?;
            }
            self.machine.sh("for i in {1..100}; do systemctl is-active edgecore && edgecore status | grep -q 'online for' && exit; sleep 1; done; edgecore status; exit 1").context(script)?;
            self.nothing_changes(&before).context(script)?;
        }
        Ok(())
    }

    fn comes_back_from_the_store_alone(&mut self) -> Result<()> {
        let before = self.tasks()?;
        // What a pod has seen is on the disk.
        self.kubectl.patch("configmap", "settings", &json!({"data": {"mode": "gale"}}))?;
        until("the new settings in a pod", SLOW, || Ok(self.inside(NAMES[0], "cat /config/mode")? == "gale"))?;
        self.machine.power_off();
        self.machine.boot(false)?;
        until("all pods to run again", SLOW, || Ok(self.tasks()?.len() == before.len()))?;
        self.see_inside("gale").context("with the network cut")?;
        self.limits_hold_offline()?;
        let offline = self.tasks()?;
        self.wait_node(false)?;
        self.machine.plug(true)?;
        self.wait_node(true)?;
        self.wait_pods()?;
        self.nothing_changes(&offline).context("after the network came back")?;
        self.limits_hold()
    }

    /// The cloud knows nothing of the new containers yet.
    fn limits_hold_offline(&self) -> Result<()> {
        let limits =
            self.machine.sh("find /sys/fs/cgroup/kubepods* -name memory.max -exec cat {} + | grep -c '^67108864$'")?;
        ensure!(limits == "4", "{limits} cgroups are limited, not those of two pods and of their containers");
        Ok(())
    }

    fn is_reset(&self, before: &str) -> Result<()> {
        let said = self.machine.sh("edgecore reset --yes")?;
        eprintln!("{said}");
        // A shim ends by itself, a moment after it was told to.
        let running = || self.machine.sh("pgrep -a edgecore; pgrep -a containerd-shim; true");
        until("all processes to end", SLOW, || Ok(running()?.is_empty()))
            .with_context(|| format!("there are {:?}", running()))?;
        let unit = self.machine.run("systemctl cat edgecore", 60)?;
        ensure!(unit.0 != 0, "the unit is left: {}", unit.1);
        let after = self.machine.sh(TRACES)?;
        let left: Vec<&str> = after.lines().filter(|line| !before.lines().any(|old| old == *line)).collect();
        let gone: Vec<&str> = before.lines().filter(|line| !after.lines().any(|new| new == *line)).collect();
        ensure!(left.is_empty() && gone.is_empty(), "it leaves {left:#?} and takes {gone:#?}");
        Ok(())
    }

    fn wait_node(&self, ready: bool) -> Result<()> {
        let what = if ready { "Ready" } else { "not Ready" };
        self.admin.wait("node", NODE, what, SLOW, |node| is_ready(node) == ready).map(drop)
    }

    /// Waits until all are Ready, and the cloud knows their containers.
    fn wait_pods(&self) -> Result<()> {
        until("all pods to be Ready", SLOW, || {
            let (pods, tasks) = (self.kubectl.list("pods", "app=sleeper")?, self.tasks()?);
            let known = |pod: &Value| container_ids(pod).get("main").is_some_and(|id| tasks.contains_key(id));
            Ok(pods.len() == NAMES.len() && pods.iter().all(|pod| is_ready(pod) && known(pod)))
        })
    }

    /// Process ids of what runs, by the id of its container or sandbox. A shim may not say in time what it has: emulated on busy processors
    /// one was seen silent for seconds, with a probe under way.
    fn tasks(&self) -> Result<BTreeMap<String, String>> {
        let text = eventually("the runtime to know what runs", SLOW, || {
            let text = self.machine.sh("ctr -n k8s.io tasks ls")?;
            Ok((!text.contains("UNKNOWN")).then_some(text))
        })?;
        let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        Ok(words
            .filter(|words| words.last() == Some(&"RUNNING"))
            .map(|words| (words[0].to_owned(), words[1].to_owned()))
            .collect())
    }

    fn nothing_changes(&self, before: &BTreeMap<String, String>) -> Result<()> {
        let same = || Ok(self.tasks()? == *before);
        stays("what runs", Duration::from_secs(10), same)
            .with_context(|| format!("before: {before:?}; now: {:?}", self.tasks()))
    }

    /// Runs a command in the running container of a pod, past edgecore.
    fn inside(&self, pod: &str, command: &str) -> Result<String> {
        self.machine.sh(&format!(
            "for id in $(ctr -n k8s.io containers ls -q 'labels.\"io.kubernetes.pod.name\"=={pod},labels.\"io.cri-containerd.kind\"==container'); do \
             ctr -n k8s.io tasks ls | grep -q \"^$id .*RUNNING\" && exec ctr -n k8s.io tasks exec --exec-id look-$RANDOM $id sh -c '{command}'; done; exit 1"
        ))
    }

    /// Shows what is needed to understand a failure.
    fn autopsy(&self, name: &str) {
        let place = std::env::var_os("SKERRY_TEST_LOGS")
            .map_or_else(|| std::env::temp_dir().join("skerry-failed"), PathBuf::from);
        let file = place.join(name).join("journal.log");
        std::fs::create_dir_all(place.join(name)).ok();
        match self.machine.run("journalctl --no-pager -o short-precise", 120) {
            Ok((_, journal)) => drop(std::fs::write(&file, journal)),
            Err(error) => eprintln!("--- no journal: {error:#}"),
        }
        for script in [
            "edgecore status",
            "journalctl -u edgecore --no-pager -n 30",
            "systemctl status edgecore containerd --no-pager -n 5",
            "ctr -n k8s.io tasks ls; findmnt -rn | grep -v ^/sys/; systemd-cgls --no-pager",
        ] {
            eprintln!(
                "--- {script}\n{}",
                self.machine.run(script, 60).map_or_else(|error| format!("{error:#}"), |(_, text)| text)
            );
        }
        for what in [
            &["get", "pods", "-o", "wide"][..],
            &["get", "events", "--sort-by=.lastTimestamp"],
            &["describe", "node", NODE],
        ] {
            eprintln!(
                "--- kubectl {}\n{}",
                what.join(" "),
                self.kubectl.output(what).map_or_else(|error| format!("{error:#}"), |output| output.text())
            );
        }
        eprintln!("the machine's journal is kept in {}", file.display());
    }
}

/// A pod of that class of service.
fn pod(class: &str) -> Value {
    let mut main = container("main", &["sleep", "1000000"]);
    let limits = json!({"cpu": "200m", "memory": "64Mi"});
    match class {
        "guaranteed" => main["resources"] = json!({"limits": limits}),
        "burstable" => main["resources"] = json!({"limits": limits, "requests": {"cpu": "50m", "memory": "32Mi"}}),
        _ => {}
    }
    main["readinessProbe"] =
        json!({"exec": {"command": ["cat", "/config/mode"]}, "periodSeconds": 5, "timeoutSeconds": 30});
    main["volumeMounts"] =
        json!([{"name": "config", "mountPath": "/config"}, {"name": "scratch", "mountPath": "/scratch"}]);
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": class, "labels": {"app": "sleeper"}},
        "spec": {
            "nodeName": NODE,
            "terminationGracePeriodSeconds": GRACE,
            "volumes": [
                {"name": "config", "configMap": {"name": "settings"}},
                {"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
            ],
            "containers": [main],
        },
    })
}
