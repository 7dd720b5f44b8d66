//! What workloads get: everything a kubelet gives them.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use skerry_proto::EDGE_LABEL;
use skerry_tests::cloudcore;
use skerry_tests::cri::POD_NAME;
use skerry_tests::images::{BUSYBOX, BUSYBOX_NEXT, SERVER};
use skerry_tests::kubectl::{container_ids, is_ready, restarts};
use skerry_tests::manifests::{container, sleeper};
use skerry_tests::procfs;
use skerry_tests::wait::{eventually, until};

use crate::world::{World, story};

#[test]
fn a_deployment_gets_its_settings_secrets_tokens_and_probes() -> Result<()> {
    story("work-deployment", |world| {
        settings(world, "blue")?;
        let pods = world.run_pods(&deployment(BUSYBOX).to_string(), "app=web", 3)?;
        ensure!(pods.iter().all(|pod| pod["spec"]["nodeName"] == world.edge.name()), "they run elsewhere");
        pods.iter().try_for_each(|pod| {
            let name = name_of(pod);
            has_its_due(world, &name, pod["status"]["podIP"].as_str().context("no pod IP")?).context(name)
        })
    })
}

/// A pod of [`deployment`] sees what it was promised.
fn has_its_due(world: &World, name: &str, ip: &str) -> Result<()> {
    let environment = world.inside(name, &["env"])?;
    for line in [
        "COLOUR=blue",
        "PASSWORD=hunter2",
        "FROM_size=large",
        &format!("POD={name}"),
        "KUBERNETES_SERVICE_HOST=10.96.0.1",
    ] {
        ensure!(environment.lines().any(|have| have == line), "no {line} in: {environment}");
    }
    ensure!(world.inside(name, &["cat", "/config/colour"])? == "blue");
    ensure!(world.inside(name, &["cat", "/secret/password"])? == "hunter2");
    let token = world.inside(name, &["cat", "/var/run/secrets/kubernetes.io/serviceaccount/token"])?;
    let review =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token.trim()}});
    let verdict = world.admin().create_and_get(&review)?;
    ensure!(verdict["status"]["authenticated"] == true, "the apiserver does not know the token: {}", verdict["status"]);
    let bound = &verdict["status"]["user"]["extra"]["authentication.kubernetes.io/pod-name"][0];
    ensure!(bound == &json!(name), "the token is not bound to the pod: {}", verdict["status"]["user"]);
    ensure!(
        world
            .inside(name, &["cat", "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"])?
            .contains("BEGIN CERTIFICATE")
    );
    let namespace = world.inside(name, &["cat", "/var/run/secrets/kubernetes.io/serviceaccount/namespace"])?;
    ensure!(namespace == world.kubectl.namespace(), "another namespace: {namespace}");
    ensure!(world.inside(name, &["hostname"])?.trim() == name, "another hostname");
    ensure!(world.inside(name, &["cat", "/etc/hosts"])?.contains(ip), "/etc/hosts lacks {ip}");
    Ok(())
}

#[test]
fn a_changed_configmap_is_in_the_mount_within_two_seconds() -> Result<()> {
    story("work-configmap", |world| {
        settings(world, "blue")?;
        let pods = world.run_pods(&deployment(BUSYBOX).to_string(), "app=web", 3)?;
        let names: Vec<String> = pods.iter().map(name_of).collect();
        let mut slowest = Duration::ZERO;
        for colour in ["green", "red", "grey"] {
            let begin = Instant::now();
            world.kubectl.patch("configmap", "settings", &json!({"data": {"colour": colour}}))?;
            for name in &names {
                until("the new value in the mount", 20, || {
                    Ok(world.inside(name, &["cat", "/config/colour"])? == colour)
                })?;
            }
            slowest = slowest.max(begin.elapsed());
        }
        eprintln!("a changed ConfigMap took {slowest:?} at most, kubectl included");
        ensure!(slowest < Duration::from_secs(2), "it took {slowest:?}");
        for name in &names {
            let colour = world.inside(name, &["sh", "-c", "echo $COLOUR"])?;
            ensure!(colour.trim() == "blue", "a running process's environment changed");
        }
        Ok(())
    })
}

#[test]
fn a_new_image_rolls_out() -> Result<()> {
    story("work-rollout", |world| {
        settings(world, "blue")?;
        world.run_pods(&deployment(BUSYBOX).to_string(), "app=web", 3)?;
        world.kubectl.apply(&deployment(BUSYBOX_NEXT).to_string())?;
        world.kubectl.run(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
        let pods = world.wait_ready("app=web", 3)?;
        for pod in &pods {
            ensure!(pod["spec"]["containers"][0]["image"] == BUSYBOX_NEXT, "an old pod is left: {}", name_of(pod));
        }
        until("only the new containers to run", 60, || Ok(world.running()?.len() == 3))
    })
}

#[test]
fn a_job_completes() -> Result<()> {
    story("work-job", |world| {
        let job = json!({
            "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "sum"},
            "spec": {"completions": 3, "parallelism": 2, "template": {"spec": {
                "restartPolicy": "Never",
                "nodeSelector": {EDGE_LABEL: ""},
                "containers": [container("main", &["sh", "-c", "echo done > /dev/termination-log"])],
            }}},
        });
        world.kubectl.apply(&job.to_string())?;
        let complete = |job: &Value| job["status"]["succeeded"] == 3;
        world.kubectl.wait("job", "sum", "3 successes", 90, complete)?;
        let pods = world.kubectl.list("pods", "job-name=sum")?;
        for pod in &pods {
            ensure!(pod["status"]["phase"] == "Succeeded", "{} is {}", name_of(pod), pod["status"]["phase"]);
            let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
            ensure!(ended["exitCode"] == 0 && ended["message"] == "done\n", "it ended otherwise: {ended}");
        }
        Ok(())
    })
}

#[test]
fn a_crashing_container_backs_off_and_counts() -> Result<()> {
    story("work-crash", |world| {
        let mut pod = sleeper("falls", world.edge.name(), false);
        pod["spec"]["containers"][0] = container("main", &["sh", "-c", "exit 3"]);
        world.kubectl.apply(&pod.to_string())?;
        let backing_off = |pod: &Value| {
            restarts(pod) >= 2
                && pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
        };
        let pod = world.kubectl.wait("pod", "falls", "CrashLoopBackOff after two restarts", 90, backing_off)?;
        let last = &pod["status"]["containerStatuses"][0]["lastState"]["terminated"];
        ensure!(last["exitCode"] == 3 && last["reason"] == "Error", "its last end: {last}");
        ensure!(pod["status"]["phase"] == "Running", "its phase is {}", pod["status"]["phase"]);
        until("the BackOff event", 30, || has_event(world, "falls", "BackOff"))?;
        until("only the last of its dead containers to be kept", 30, || {
            let all = world.runtime.cri().containers()?;
            let name = |container: &skerry_proto::cri::Container| container.labels.get(POD_NAME).cloned();
            Ok(all.iter().filter(|container| name(container).as_deref() == Some("falls")).count() == 1)
        })
    })
}

#[test]
fn on_failure_a_container_is_tried_again_until_it_succeeds() -> Result<()> {
    story("work-on-failure", |world| {
        let mut pod = sleeper("tries", world.edge.name(), false);
        pod["spec"]["restartPolicy"] = json!("OnFailure");
        pod["spec"]["volumes"] = json!([{"name": "out", "emptyDir": {}}]);
        let script = "test -e /out/tried && exit 0; touch /out/tried; exit 4";
        pod["spec"]["containers"][0] = container("main", &["sh", "-c", script]);
        pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "out", "mountPath": "/out"}]);
        world.kubectl.apply(&pod.to_string())?;
        let pod = world.kubectl.wait("pod", "tries", "Succeeded", 60, |pod| pod["status"]["phase"] == "Succeeded")?;
        ensure!(restarts(&pod) == 1, "it was tried again {} times", restarts(&pod));
        let last = &pod["status"]["containerStatuses"][0]["lastState"]["terminated"];
        ensure!(last["exitCode"] == 4, "its first end: {last}");
        Ok(())
    })
}

#[test]
fn hooks_run_and_a_sidecar_comes_first_and_goes_last() -> Result<()> {
    story("work-sidecar", |world| {
        let scratch = world.dir().join("lives");
        std::fs::create_dir_all(&scratch)?;
        let lives = |name: &str| {
            let script = format!(
                "echo {name} up >> /out/order; trap 'echo {name} down >> /out/order; exit 0' TERM; while :; do sleep 0.1; done"
            );
            let mut container = container(name, &["sh", "-c", &script]);
            container["volumeMounts"] = json!([{"name": "out", "mountPath": "/out"}]);
            container
        };
        let (mut sidecar, mut main) = (lives("sidecar"), lives("main"));
        sidecar["restartPolicy"] = json!("Always");
        sidecar["startupProbe"] = json!({"exec": {"command": ["grep", "sidecar", "/out/order"]}, "periodSeconds": 1});
        let hook = |script: &str| json!({"exec": {"command": ["sh", "-c", script]}});
        main["lifecycle"] = json!({
            "postStart": hook("until grep main /out/order; do sleep 0.1; done; echo started >> /out/order"),
            "preStop": hook("echo stopping >> /out/order; sleep 1"),
        });
        let mut pod = sleeper("pair", world.edge.name(), false);
        pod["spec"]["terminationGracePeriodSeconds"] = json!(30);
        pod["spec"]["volumes"] = json!([{"name": "out", "hostPath": {"path": scratch}}]);
        pod["spec"]["initContainers"] = json!([sidecar]);
        pod["spec"]["containers"] = json!([main]);
        world.run_pods(&pod.to_string(), "app=sleeper", 1)?;
        let sidecar = world.runtime.cri().container("pair", "sidecar")?;
        // One that ends is started again, with the pod as it is.
        let main = world.runtime.cri().container("pair", "main")?;
        // What was executed in a container ends with it, and may be said to have failed.
        let killed = world.runtime.cri().exec("pair", "sidecar", &["kill", "1"])?;
        until("the sidecar to run again", 60, || {
            Ok(world.runtime.cri().container("pair", "sidecar").is_ok_and(|id| id != sidecar))
        })
        .with_context(|| format!("ending it: {}", killed.text()))?;
        ensure!(world.runtime.cri().container("pair", "main")? == main, "its end restarted the other container");
        world.kubectl.run(&["delete", "pod", "pair"])?;
        let order = std::fs::read_to_string(scratch.join("order"))?;
        let expected = "sidecar up\nmain up\nstarted\nsidecar down\nsidecar up\nstopping\nmain down\nsidecar down\n";
        ensure!(order == expected, "in this order: {order:?}");
        Ok(())
    })
}

#[test]
fn deleting_is_graceful_and_forcing_is_not() -> Result<()> {
    story("work-delete", |world| {
        let scratch = world.dir().join("goodbyes");
        std::fs::create_dir_all(&scratch)?;
        let polite = |name: &str| {
            let mut pod = sleeper(name, world.edge.name(), false);
            let script = format!(
                "trap 'echo term > /out/{name}; sleep 1; echo left >> /out/{name}; exit 0' TERM; while :; do sleep 0.1; done"
            );
            pod["spec"]["terminationGracePeriodSeconds"] = json!(20);
            pod["spec"]["volumes"] = json!([{"name": "out", "hostPath": {"path": scratch}}]);
            pod["spec"]["containers"][0] = container("main", &["sh", "-c", &script]);
            pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "out", "mountPath": "/out"}]);
            pod.to_string()
        };
        world.kubectl.apply(&polite("graceful"))?;
        world.kubectl.apply(&polite("forced"))?;
        world.wait_ready("app=sleeper", 2)?;
        let begin = Instant::now();
        world.kubectl.run(&["delete", "pod", "graceful"])?;
        ensure!(
            begin.elapsed() < Duration::from_secs(15),
            "it took {:?}, though the process left after one second",
            begin.elapsed()
        );
        let words = std::fs::read_to_string(scratch.join("graceful"))?;
        ensure!(words == "term\nleft\n", "it was not left time: {words:?}");
        world.kubectl.run(&["delete", "pod", "forced", "--force", "--grace-period=0"])?;
        until("the forced one's container to end", 30, || Ok(world.running()?.is_empty()))
    })
}

#[test]
fn probes_take_pods_out_of_service_and_restart_them() -> Result<()> {
    story("work-probes", |world| {
        let probe = |kind: &Value, threshold: u8| {
            let mut probe = json!({"periodSeconds": 1, "failureThreshold": threshold});
            if let (Some(to), Some(from)) = (probe.as_object_mut(), kind.as_object()) {
                to.extend(from.clone());
            }
            probe
        };
        let server = |name: &str, readiness: Value, liveness: Value| {
            let mut pod = sleeper(name, world.edge.name(), false);
            pod["spec"]["containers"][0] = json!({
                "name": "main", "image": SERVER, "imagePullPolicy": "Never",
                "startupProbe": probe(&json!({"tcpSocket": {"port": 8080}}), 30),
                "readinessProbe": probe(&readiness, 1),
                "livenessProbe": probe(&liveness, 4),
            });
            pod.to_string()
        };
        world.kubectl.apply(&server(
            "http",
            json!({"httpGet": {"path": "/healthz", "port": 8080}}),
            json!({"httpGet": {"path": "/healthz", "port": 8080}}),
        ))?;
        world.kubectl.apply(&server("grpc", json!({"grpc": {"port": 9090}}), json!({"grpc": {"port": 9090}})))?;
        let mut exec = sleeper("exec", world.edge.name(), false);
        exec["spec"]["terminationGracePeriodSeconds"] = 60.into();
        exec["spec"]["containers"][0]["readinessProbe"] =
            probe(&json!({"exec": {"command": ["test", "-e", "/tmp/ready"]}}), 1);
        world.kubectl.apply(&exec.to_string())?;
        for name in ["http", "grpc"] {
            world.kubectl.wait("pod", name, "Ready", 60, is_ready)?;
            let pod = world.kubectl.get("pod", name)?;
            let address = format!("{}:8080", pod["status"]["podIP"].as_str().unwrap_or_default()).parse()?;
            cloudcore::get(address, "/fail")?;
            world.kubectl.wait("pod", name, "not Ready", 20, |pod| !is_ready(pod))?;
            world.kubectl.wait("pod", name, "restarted and Ready", 60, |pod| restarts(pod) == 1 && is_ready(pod))?;
        }
        ensure!(!is_ready(&world.kubectl.get("pod", "exec")?), "Ready although its probe fails");
        world.inside("exec", &["touch", "/tmp/ready"])?;
        world.kubectl.wait("pod", "exec", "Ready", 20, is_ready)?;
        // Its process does not care about SIGTERM: it runs to the end of its grace, and is no less asked whether it is ready.
        world.kubectl.run(&["delete", "pod", "exec", "--wait=false"])?;
        world.inside("exec", &["rm", "/tmp/ready"])?;
        world.kubectl.wait("pod", "exec", "not Ready, but there", 20, |pod| {
            !is_ready(pod) && pod["status"]["containerStatuses"][0]["state"]["running"].is_object()
        })?;
        world.kubectl.run(&["delete", "pod", "exec", "--grace-period=1"]).map(drop)
    })
}

#[test]
fn init_containers_hooks_and_volumes_work_together() -> Result<()> {
    story("work-init", |world| {
        settings(world, "blue")?;
        let mounts = json!([{"name": "work", "mountPath": "/scratch"}]);
        let resources = json!({"limits": {"memory": "32Mi", "cpu": "200m"}});
        let mut first = container("first", &["sh", "-c", "echo first >> /scratch/order"]);
        let mut second = container("second", &["sh", "-c", "echo second >> /scratch/order"]);
        // Where one has no limits, its pod has none.
        first["resources"] = resources.clone();
        second["resources"] = resources.clone();
        first["volumeMounts"] = mounts.clone();
        second["volumeMounts"] = mounts;
        let mut pod = sleeper("whole", world.edge.name(), false);
        pod["metadata"]["annotations"] = json!({"note": "from the pod"});
        pod["spec"]["initContainers"] = json!([first, second]);
        pod["spec"]["securityContext"] = json!({"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000});
        pod["spec"]["volumes"] = json!([
            {"name": "work", "emptyDir": {}},
            {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
            {"name": "about", "downwardAPI": {"items": [{"path": "note", "fieldRef": {"fieldPath": "metadata.annotations['note']"}}]}},
            {"name": "all", "projected": {"sources": [
                {"configMap": {"name": "settings", "items": [{"key": "colour", "path": "c/colour"}]}},
                {"secret": {"name": "password"}},
            ]}},
            {"name": "config", "configMap": {"name": "settings"}},
        ]);
        let main = &mut pod["spec"]["containers"][0];
        main["lifecycle"] = json!({"postStart": {"exec": {"command": ["sh", "-c", "echo hook >> /scratch/order"]}}});
        main["resources"] = resources;
        main["env"] = json!([{"name": "LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}}]);
        main["volumeMounts"] = json!([
            {"name": "work", "mountPath": "/scratch"},
            {"name": "memory", "mountPath": "/memory"},
            {"name": "about", "mountPath": "/about"},
            {"name": "all", "mountPath": "/all", "readOnly": true},
            {"name": "config", "mountPath": "/etc/colour.conf", "subPath": "colour"},
        ]);
        world.run_pods(&pod.to_string(), "app=sleeper", 1)?;
        let shown = |command: &[&str]| world.inside("whole", command);
        ensure!(
            shown(&["cat", "/scratch/order"])? == "first\nsecond\nhook\n",
            "order: {}",
            shown(&["cat", "/scratch/order"])?
        );
        ensure!(shown(&["cat", "/about/note"])? == "from the pod");
        ensure!(shown(&["cat", "/all/c/colour"])? == "blue" && shown(&["cat", "/all/password"])? == "hunter2");
        ensure!(shown(&["cat", "/etc/colour.conf"])? == "blue");
        ensure!(shown(&["sh", "-c", "echo $LIMIT"])?.trim() == "33554432");
        ensure!(shown(&["id", "-u"])?.trim() == "1000" && shown(&["id", "-G"])?.contains("2000"));
        ensure!(shown(&["stat", "-c", "%g", "/scratch"])?.trim() == "2000", "the volume is not the group's");
        ensure!(shown(&["sh", "-c", "mount"])?.lines().any(|line| line.contains("/memory") && line.contains("tmpfs")));
        let id = world.runtime.cri().container("whole", "main")?;
        let linux =
            world.runtime.cri().status(&id)?.resources.and_then(|resources| resources.linux).unwrap_or_default();
        ensure!(linux.memory_limit_in_bytes == 33_554_432 && linux.cpu_quota > 0, "limits: {linux:?}");
        limits_are_the_kernel_s(world.runtime.cri().pid(&id)?)
    })
}

/// The kernel was told of 32 MiB and a fifth of a processor, for the process's container and for its pod, the one above that.
fn limits_are_the_kernel_s(pid: i32) -> Result<()> {
    let (memory, cpu) = (procfs::cgroup(pid, "memory"), procfs::cgroup(pid, "cpu"));
    let (memory, cpu) = memory.zip(cpu).with_context(|| format!("process {pid} is in no cgroup"))?;
    let mut limits = vec![
        (&memory, "memory.limit_in_bytes", "33554432"),
        (&cpu, "cpu.cfs_quota_us", "20000"),
        (&cpu, "cpu.shares", "204"),
    ];
    if memory.join("memory.max").exists() {
        limits = vec![(&memory, "memory.max", "33554432"), (&cpu, "cpu.max", "20000 100000")];
    }
    for (container, file, wanted) in limits {
        for dir in [container.as_path(), container.parent().context("a container's cgroup is its pod's")?] {
            let path = dir.join(file);
            let limit = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            ensure!(limit.trim() == wanted, "{} is {}, not {wanted}", path.display(), limit.trim());
        }
    }
    Ok(())
}

#[test]
fn pods_share_what_they_ask_of_the_host() -> Result<()> {
    story("work-host", |world| {
        let mut pod = sleeper("on-host", world.edge.name(), false);
        pod["spec"]["hostNetwork"] = json!(true);
        pod["spec"]["hostPID"] = json!(true);
        pod["spec"]["hostIPC"] = json!(true);
        let pods = world.run_pods(&pod.to_string(), "app=sleeper", 1)?;
        ensure!(
            pods[0]["status"]["podIP"] == pods[0]["status"]["hostIP"],
            "podIP differs from hostIP: {}",
            pods[0]["status"]
        );
        let edgecore = world.edge.pid().context("edgecore does not run")?;
        world.inside("on-host", &["test", "-d", &format!("/proc/{edgecore}")])?;
        ensure!(
            world.inside("on-host", &["cat", "/proc/net/route"])? == std::fs::read_to_string("/proc/net/route")?,
            "not the host's network"
        );
        let ipc = world.inside("on-host", &["readlink", "/proc/self/ns/ipc"])?;
        let host = std::fs::read_link("/proc/self/ns/ipc")?;
        ensure!(ipc.trim() == host.to_string_lossy(), "not the host's IPC: {ipc}");
        Ok(())
    })
}

#[test]
fn logs_are_files_where_collectors_look() -> Result<()> {
    story("work-logs", |world| {
        let mut pod = sleeper("talks", world.edge.name(), false);
        pod["spec"]["containers"][0] = container("main", &["sh", "-c", "echo hello; echo oops >&2; sleep 1000000"]);
        let pods = world.run_pods(&pod.to_string(), "app=sleeper", 1)?;
        let uid = pods[0]["metadata"]["uid"].as_str().unwrap_or_default();
        let log = world.edge.logs().join(format!("{}_talks_{uid}/main/0.log", world.kubectl.namespace()));
        let text = eventually("both lines in the log", 10, || {
            let text = std::fs::read_to_string(&log)?;
            Ok((text.lines().count() == 2).then_some(text))
        })?;
        ensure!(text.contains(" stdout F hello") && text.contains(" stderr F oops"), "{text}");
        let named = format!("talks_{}_main-", world.kubectl.namespace());
        let links = std::fs::read_dir(world.edge.log_links())?.collect::<Result<Vec<_>, _>>()?;
        let link = links.iter().find(|link| link.file_name().to_string_lossy().starts_with(&named));
        let link = link.with_context(|| format!("no link of the container among {links:?}"))?.path();
        ensure!(std::fs::canonicalize(&link)? == std::fs::canonicalize(&log)?, "{} leads elsewhere", link.display());
        Ok(())
    })
}

#[test]
fn a_log_that_grows_is_rotated() -> Result<()> {
    story("work-rotation", |world| {
        let mut pod = sleeper("chatters", world.edge.name(), false);
        let script = "yes \"$(printf %01000d 0)\" | head -n 11000; while :; do echo tick; sleep 0.2; done";
        pod["spec"]["containers"][0] = container("main", &["sh", "-c", script]);
        let pods = world.run_pods(&pod.to_string(), "app=sleeper", 1)?;
        let uid = pods[0]["metadata"]["uid"].as_str().unwrap_or_default();
        let logs = world.edge.logs().join(format!("{}_chatters_{uid}/main", world.kubectl.namespace()));
        let before = world.running()?;
        until("the large log to be put aside and a new one to be written", 60, || {
            let files = std::fs::read_dir(&logs)?.count();
            let now = std::fs::read_to_string(logs.join("0.log")).unwrap_or_default();
            Ok(files > 1 && now.len() < 1 << 20 && now.contains(" stdout F tick"))
        })?;
        ensure!(world.running()? == before, "the container was restarted for its log");
        Ok(())
    })
}

#[test]
fn what_is_not_supported_says_so() -> Result<()> {
    story("work-unsupported", |world| {
        let claim = json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "disk"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}},
        });
        world.kubectl.apply(&claim.to_string())?;
        let mut pod = sleeper("wants-disk", world.edge.name(), false);
        pod["spec"]["volumes"] = json!([{"name": "disk", "persistentVolumeClaim": {"claimName": "disk"}}]);
        pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "disk", "mountPath": "/disk"}]);
        world.kubectl.apply(&pod.to_string())?;
        until("an event that says what is not supported", 30, || {
            let events = world.kubectl.list("events", "")?;
            Ok(events.iter().any(|event| {
                event["involvedObject"]["name"] == "wants-disk"
                    && event["message"].as_str().unwrap_or_default().contains("not supported")
            }))
        })?;
        ensure!(world.running()?.is_empty(), "it runs without its disk: {:?}", world.running());
        Ok(())
    })
}

#[test]
fn a_missing_reference_waits_and_then_runs() -> Result<()> {
    story("work-missing", |world| {
        let mut pod = sleeper("waits", world.edge.name(), false);
        pod["spec"]["containers"][0]["envFrom"] = json!([{"configMapRef": {"name": "later"}}]);
        world.kubectl.apply(&pod.to_string())?;
        let waiting = |pod: &Value| {
            pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CreateContainerConfigError"
        };
        world.kubectl.wait("pod", "waits", "CreateContainerConfigError", 30, waiting)?;
        let later =
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "later"}, "data": {"KEY": "value"}});
        world.kubectl.apply(&later.to_string())?;
        world.kubectl.wait("pod", "waits", "Ready", 30, is_ready)?;
        ensure!(world.inside("waits", &["sh", "-c", "echo $KEY"])?.trim() == "value");
        ensure!(container_ids(&world.kubectl.get("pod", "waits")?).len() == 1);
        Ok(())
    })
}

fn settings(world: &World, colour: &str) -> Result<()> {
    let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"colour": colour, "size": "large"}});
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "password"}, "stringData": {"password": "hunter2"}});
    world.kubectl.apply(&config.to_string())?;
    world.kubectl.apply(&secret.to_string()).map(drop)
}

fn deployment(image: &str) -> Value {
    let probe = json!({"exec": {"command": ["test", "-e", "/config/colour"]}, "periodSeconds": 1});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {
            "replicas": 3,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {
                    "nodeSelector": {EDGE_LABEL: ""},
                    "terminationGracePeriodSeconds": 1,
                    "volumes": [
                        {"name": "config", "configMap": {"name": "settings"}},
                        {"name": "secret", "secret": {"secretName": "password"}},
                    ],
                    "containers": [{
                        "name": "main", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["sleep", "1000000"],
                        "env": [
                            {"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "colour"}}},
                            {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "password", "key": "password"}}},
                            {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                        ],
                        "envFrom": [{"prefix": "FROM_", "configMapRef": {"name": "settings"}}],
                        "volumeMounts": [{"name": "config", "mountPath": "/config"}, {"name": "secret", "mountPath": "/secret"}],
                        "readinessProbe": probe, "livenessProbe": probe,
                    }],
                },
            },
        },
    })
}

fn name_of(pod: &Value) -> String {
    pod["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

fn has_event(world: &World, pod: &str, reason: &str) -> Result<bool> {
    let events = world.kubectl.list("events", "")?;
    Ok(events.iter().any(|event| event["involvedObject"]["name"] == pod && event["reason"] == reason))
}
