use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use nix::mount::{MntFlags, umount2};
use nix::unistd::geteuid;
use serde_json::{Value, json};
use skerry_proto::payload::{Settings, Token, token_key};

use super::*;

/// Mounting needs root; says so where it is missing.
#[expect(clippy::print_stdout, reason = "a test that is skipped says so")]
pub(crate) fn is_root(test: &str) -> bool {
    let is_root = geteuid().is_root();
    if !is_root {
        println!("skipped, as it needs root: {test}");
    }
    is_root
}

/// Takes all mounts below a directory away, also when the test failed.
pub(crate) struct Unmount(pub(crate) PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let Ok(real) = fs::canonicalize(&self.0) else { return };
        for entry in mountinfo::at_or_below(&real).unwrap_or_default().iter().rev() {
            let _ = umount2(&entry.mount_point, MntFlags::MNT_DETACH);
        }
    }
}

struct Bench {
    _unmount: Unmount,
    dir: tempfile::TempDir,
    volumes: Volumes,
    node: NodeFacts,
    refs: References,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("skerry volumes ").tempdir().unwrap();
        let root = dir.path().join("kubelet");
        let node = NodeFacts {
            name: "edge".to_owned(),
            host_ips: Vec::new(),
            cpu_milli: 2000,
            memory: 64 << 20,
            ephemeral_storage: 1 << 30,
            pods: 110,
            labels: BTreeMap::new(),
            settings: Settings::default(),
            pods_root: root.clone(),
            logs_root: PathBuf::new(),
            log_links: PathBuf::new(),
            systemd_cgroups: false,
            runtime_handlers: Vec::new(),
            recursive_read_only: Vec::new(),
            strict_groups: false,
            runtime_classes: BTreeMap::new(),
        };
        let mut refs = References::default();
        let put = |map: &mut BTreeMap<_, _>, value: Value| {
            let object: k8s_openapi::api::core::v1::ConfigMap = serde_json::from_value(value).unwrap();
            map.insert(object.metadata.name.clone().unwrap(), object);
        };
        put(
            &mut refs.config_maps,
            json!({"metadata": {"name": "cm"}, "data": {"key": "one"}, "binaryData": {"bin": "AAE="}}),
        );
        put(&mut refs.config_maps, json!({"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": "CA"}}));
        let secret: k8s_openapi::api::core::v1::Secret =
            serde_json::from_value(json!({"metadata": {"name": "sec"}, "data": {"password": "aHVudGVy"}})).unwrap();
        refs.secrets.insert("sec".to_owned(), secret);
        refs.tokens.insert(token_key("ns", "uid-1", "", 3607), Token { token: "JWT".to_owned(), expires: 0 });
        Self { _unmount: Unmount(dir.path().to_owned()), dir, volumes: Volumes::new(root), node, refs }
    }

    fn set_up(&self, pod: &Pod) -> Vec<String> {
        let field = |path: &str| match path {
            "metadata.namespace" => Ok("ns".to_owned()),
            other => Err(format!("unsupported fieldPath: {other}")),
        };
        let resource = |container: &str, resource: &str, divisor: Option<&Quantity>| {
            Ok(format!("{container} {resource} {}", divisor.map_or("1", |divisor| divisor.0.as_str())))
        };
        let context = VolumeContext {
            node: &self.node,
            pod_memory_limit: None,
            now: Timestamp::from_second(1_767_366_245).unwrap(),
            field: &field,
            resource: &resource,
        };
        let errors = self.volumes.set_up(pod, &self.refs, &context).err().unwrap_or_default();
        errors.iter().map(ToString::to_string).collect()
    }

    fn mounts(&self, pod: &Pod) -> Result<Vec<Mount>, VolumeError> {
        let env = [("POD".to_owned(), "p-1".to_owned())];
        self.volumes.mounts(pod, &pod.spec.as_ref().unwrap().containers[0], &env, false)
    }

    fn is_mounted(&self) -> bool {
        let pod = fs::canonicalize(self.dir.path()).unwrap().join("kubelet/pods/uid-1");
        !mountinfo::at_or_below(&pod).unwrap().is_empty()
    }

    fn volume(&self, plugin: &str, name: &str) -> PathBuf {
        self.dir.path().join(format!("kubelet/pods/uid-1/volumes/kubernetes.io~{plugin}/{name}"))
    }

    fn set_config_map(&mut self, data: Value) {
        self.refs.config_maps.get_mut("cm").unwrap().data = serde_json::from_value(data).unwrap();
    }
}

/// A pod that mounts each of the volumes at `/<name>`, plus `more` mounts.
fn pod(volumes: &Value, more: &Value, security: &Value) -> Pod {
    let names: Vec<&str> = volumes.as_array().unwrap().iter().map(|volume| volume["name"].as_str().unwrap()).collect();
    let mut mounts: Vec<Value> =
        names.iter().map(|name| json!({"name": name, "mountPath": format!("/{name}")})).collect();
    mounts.extend(more.as_array().unwrap().iter().cloned());
    let container = json!({"name": "app", "image": "x", "volumeMounts": mounts});
    serde_json::from_value(json!({
        "metadata": {"name": "pod", "namespace": "ns", "uid": "uid-1"},
        "spec": {"containers": [container], "volumes": volumes, "securityContext": security},
    }))
    .unwrap()
}

fn mode(path: &Path) -> (u32, u32) {
    let data = fs::metadata(path).unwrap();
    (data.mode() & 0o7777, data.gid())
}

fn none() -> Value {
    json!([])
}

#[test]
fn every_kind_of_volume_comes_and_goes() {
    if !is_root("every_kind_of_volume_comes_and_goes") {
        return;
    }
    let mut bench = Bench::new();
    let api = json!([
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
    ]);
    let volumes = json!([
        {"name": "disk", "emptyDir": {}},
        {"name": "mem", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": "host", "hostPath": {"path": bench.dir.path().join("made"), "type": "DirectoryOrCreate"}},
        {"name": "cm", "configMap": {"name": "cm", "defaultMode": 0o600}},
        {"name": "sec", "secret": {"secretName": "sec", "items": [{"key": "password", "path": "a/b", "mode": 0o400}]}},
        {"name": "down", "downwardAPI": {"items": [
            {"path": "mem", "resourceFieldRef": {"containerName": "app", "resource": "limits.memory", "divisor": "1Mi"}}]}},
        {"name": "api", "projected": {"defaultMode": 0o644, "sources": api}},
        {"name": "optional", "configMap": {"name": "later", "optional": true}},
    ]);
    let pod = pod(&volumes, &none(), &json!({}));
    assert_eq!(bench.set_up(&pod), Vec::<String>::new());
    let read = |plugin: &str, path: &str| fs::read_to_string(bench.volume(plugin, path)).unwrap();
    assert_eq!(read("configmap", "cm/key"), "one");
    assert_eq!(fs::read(bench.volume("configmap", "cm/bin")).unwrap(), [0, 1]);
    assert_eq!(mode(&bench.volume("configmap", "cm/key")).0, 0o600);
    assert_eq!(read("secret", "sec/a/b"), "hunter");
    assert_eq!(mode(&bench.volume("secret", "sec/a/b")).0, 0o400);
    assert_eq!(read("downward-api", "down/mem"), "app limits.memory 1Mi");
    assert_eq!(read("projected", "api/token") + &read("projected", "api/namespace"), "JWTns");
    assert_eq!(mode(&bench.volume("empty-dir", "disk")).0, 0o777);
    assert_eq!(mode(&bench.volume("empty-dir", "mem")).0, 0o777);
    assert!(bench.dir.path().join("made").is_dir());
    for (plugin, name, is_memory) in
        [("empty-dir", "mem", true), ("secret", "sec", true), ("projected", "api", true), ("configmap", "cm", false)]
    {
        assert_eq!(empty_dir::is_mounted(&bench.volume(plugin, name)), is_memory, "{name}");
    }
    let table = mountinfo::at_or_below(&fs::canonicalize(bench.volume("empty-dir", "mem")).unwrap()).unwrap();
    assert!(table[0].super_options.contains("size=1024k"), "{}", table[0].super_options);

    // Again: nothing changes, and content of the pod stays.
    fs::write(bench.volume("empty-dir", "mem/file"), "x").unwrap();
    fs::write(bench.volume("empty-dir", "disk/file"), "x").unwrap();
    fs::set_permissions(bench.volume("empty-dir", "disk"), fs::Permissions::from_mode(0o700)).unwrap();
    let data = fs::read_link(bench.volume("configmap", "cm/..data")).unwrap();
    assert_eq!(bench.set_up(&pod), Vec::<String>::new());
    assert!(bench.volume("empty-dir", "mem/file").exists());
    assert_eq!(mode(&bench.volume("empty-dir", "disk")).0, 0o700);
    assert_eq!(fs::read_link(bench.volume("configmap", "cm/..data")).unwrap(), data);

    // An object changes, one appears, one goes.
    bench.set_config_map(json!({"key": "two"}));
    let late = serde_json::from_value(json!({"metadata": {"name": "later"}, "data": {"x": "here"}})).unwrap();
    bench.refs.config_maps.insert("later".to_owned(), late);
    bench.refs.secrets.clear();
    assert_eq!(bench.set_up(&pod), [r#"MountVolume.SetUp failed for volume "sec" : secret "sec" not found"#]);
    assert_eq!(fs::read_to_string(bench.volume("configmap", "cm/key")).unwrap(), "two");
    assert_eq!(fs::read_to_string(bench.volume("configmap", "optional/x")).unwrap(), "here");
    assert_eq!(fs::read_to_string(bench.volume("secret", "sec/a/b")).unwrap(), "hunter");
    bench.refs.config_maps.remove("later");
    bench.set_up(&pod);
    assert!(!bench.volume("configmap", "optional/x").exists());

    let mounts = bench.mounts(&pod).unwrap();
    let read_only: Vec<&str> =
        mounts.iter().filter(|mount| mount.read_only).map(|mount| mount.container_path.as_str()).collect();
    assert_eq!(read_only, ["/cm", "/sec", "/down", "/api", "/optional"]);
    assert_eq!(mounts[2].host_path, bench.dir.path().join("made"));

    // The power goes: memory is empty, the disk is not.
    assert!(bench.is_mounted());
    drop(Unmount(bench.dir.path().to_owned()));
    bench.set_up(&pod);
    assert!(!bench.volume("empty-dir", "mem/file").exists() && bench.volume("empty-dir", "disk/file").exists());
    assert!(empty_dir::is_mounted(&bench.volume("empty-dir", "mem")));

    assert_eq!(bench.volumes.pod_uids_on_disk().unwrap(), ["uid-1"]);
    bench.volumes.tear_down_volumes("uid-1").unwrap();
    assert!(!bench.is_mounted());
    assert_eq!(bench.volumes.pod_uids_on_disk().unwrap(), ["uid-1"]);
    bench.volumes.tear_down("uid-1").unwrap();
    bench.volumes.tear_down("uid-1").unwrap();
    assert!(bench.volumes.pod_uids_on_disk().unwrap().is_empty());
    assert!(bench.dir.path().join("made").is_dir());
    assert!(bench.volumes.tear_down("../../etc").is_err());
}

#[test]
fn errors_say_what_people_know() {
    let bench = Bench::new();
    let volumes = json!([
        {"name": "a", "configMap": {"name": "missing"}},
        {"name": "b", "configMap": {"name": "cm", "items": [{"key": "nope", "path": "x"}]}},
        {"name": "c", "secret": {"secretName": "sec", "items": [{"key": "nope", "path": "x"}]}},
        {"name": "d", "projected": {"sources": [
            {"serviceAccountToken": {"path": "t", "audience": "vault"}}, {"secret": {"name": "gone"}}]}},
        {"name": "e", "persistentVolumeClaim": {"claimName": "x"}},
        {"name": "f", "hostPath": {"path": "/dev/null", "type": "Directory"}},
        {"name": "g", "emptyDir": {"medium": "HugePages-2Mi"}},
        {"name": "h", "downwardAPI": {"items": [{"path": "x", "fieldRef": {"fieldPath": "spec.x"}}]}},
        {"name": "i", "projected": {"sources": [{"clusterTrustBundle": {"path": "x"}}]}},
        {"name": "j", "configMap": {"name": "cm", "items": [{"key": "key", "path": "../x"}]}},
        {"name": "../k", "emptyDir": {}},
        {"name": "l", "configMap": {"name": "cm", "optional": true, "items": [{"key": "nope", "path": "x"}]}},
    ]);
    let mut pod = pod(&volumes, &none(), &json!({}));
    let unused = serde_json::from_value(json!({"name": "unused", "nfs": {"path": "/", "server": "x"}})).unwrap();
    pod.spec.as_mut().unwrap().volumes.as_mut().unwrap().push(unused);
    let texts = [
        ("a", r#"configmap "missing" not found"#),
        ("b", "configmap references non-existent config key: nope"),
        ("c", "references non-existent secret key: nope"),
        ("d", r#"[service account token for "vault" is not here yet, secret "gone" not found]"#),
        ("e", "volume type persistentVolumeClaim is not supported on this node"),
        ("f", "hostPath type check failed: /dev/null is not a directory"),
        ("g", "emptyDir medium \"HugePages-2Mi\" is not supported on this node; use \"\" or \"Memory\""),
        ("h", "unsupported fieldPath: spec.x"),
        ("i", "projected volume source clusterTrustBundle is not supported on this node"),
        ("j", "path \"../x\" is not allowed in a volume: it must not contain \"..\""),
        ("../k", "\"../k\" is not a volume name"),
    ];
    let want: Vec<String> =
        texts.iter().map(|(name, text)| format!("MountVolume.SetUp failed for volume \"{name}\" : {text}")).collect();
    assert_eq!(bench.set_up(&pod), want);
    let error = bench.mounts(&pod).unwrap_err().to_string();
    assert_eq!(error, r#"cannot find volume "a" to mount into container "app""#);
}

#[test]
fn groups_users_and_tokens() {
    if !is_root("groups_users_and_tokens") {
        return;
    }
    let bench = Bench::new();
    let volumes = json!([
        {"name": "disk", "emptyDir": {}},
        {"name": "cm", "configMap": {"name": "cm"}},
        {"name": "api", "projected": {"defaultMode": 0o644,
            "sources": [{"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}}]}},
    ]);
    let pod = pod(&volumes, &none(), &json!({"fsGroup": 3000, "runAsUser": 1000}));
    assert_eq!(bench.set_up(&pod), Vec::<String>::new());
    assert_eq!(mode(&bench.volume("empty-dir", "disk")), (0o2777, 3000));
    assert_eq!(mode(&bench.volume("configmap", "cm")), (0o2777, 3000));
    assert_eq!(mode(&bench.volume("configmap", "cm/key")), (0o644, 3000));
    assert_eq!(mode(&bench.volume("projected", "api/token")), (0o640, 3000));
    assert_eq!(fs::metadata(bench.volume("projected", "api/token")).unwrap().uid(), 1000);
    bench.volumes.tear_down("uid-1").unwrap();
}

#[test]
fn users_are_common_only_when_all_say_so() {
    let mut pod = pod(&none(), &none(), &json!({"runAsUser": 7}));
    assert_eq!(projected::common_user(&pod), Some(7));
    let more = json!({"name": "i", "securityContext": {"runAsUser": 8}});
    pod.spec.as_mut().unwrap().init_containers = Some(vec![serde_json::from_value(more).unwrap()]);
    assert_eq!(projected::common_user(&pod), None);
    pod.spec.as_mut().unwrap().security_context = None;
    assert_eq!(projected::common_user(&pod), None);
}

#[test]
fn parts_of_volumes() {
    if !is_root("parts_of_volumes") {
        return;
    }
    let mut bench = Bench::new();
    let volumes = json!([
        {"name": "disk", "emptyDir": {}},
        {"name": "cm", "configMap": {"name": "cm"}},
    ]);
    let more = json!([
        {"name": "disk", "mountPath": "/logs", "subPathExpr": "logs/$(POD)"},
        {"name": "cm", "mountPath": "/etc/app.conf", "subPath": "key"},
        {"name": "disk", "mountPath": "cm/inside", "mountPropagation": "Bidirectional", "readOnly": true},
    ]);
    let pod = pod(&volumes, &more, &json!({}));
    assert_eq!(bench.set_up(&pod), Vec::<String>::new());
    assert!(bench.volume("configmap", "cm/inside").is_dir());
    let mounts = bench.mounts(&pod).unwrap();
    let part = |volume: &str, index: usize| {
        bench.dir.path().join(format!("kubelet/pods/uid-1/volume-subpaths/{volume}/app/{index}"))
    };
    assert_eq!((&mounts[2].host_path, &mounts[3].host_path), (&part("disk", 2), &part("cm", 3)));
    assert!(mounts[3].read_only && !mounts[2].read_only);
    assert_eq!(mounts[4].container_path, "/cm/inside");
    assert_eq!((mounts[4].propagation, mounts[4].read_only), (Propagation::Bidirectional, true));
    fs::write(part("disk", 2).join("out"), "x").unwrap();
    assert!(bench.volume("empty-dir", "disk/logs/p-1/out").exists());
    assert_eq!(fs::read_to_string(part("cm", 3)).unwrap(), "one");

    // A running container keeps the old file; its next instance gets the new one.
    let subpath = part("cm", 3);
    bench.set_config_map(json!({"key": "two"}));
    bench.set_up(&pod);
    assert_eq!(fs::read_to_string(&subpath).unwrap(), "one");
    bench.mounts(&pod).unwrap();
    assert_eq!(fs::read_to_string(&subpath).unwrap(), "two");

    // A container plants a link; the next instance does not follow it.
    fs::remove_dir_all(bench.volume("empty-dir", "disk/logs")).unwrap();
    symlink("/etc", bench.volume("empty-dir", "disk/logs")).unwrap();
    let error = bench.mounts(&pod).unwrap_err().to_string();
    assert!(error.starts_with(r#"failed to prepare subPath for volumeMount "disk" of container "app": "#), "{error}");
    let mut no_env = pod;
    no_env.spec.as_mut().unwrap().containers[0].volume_mounts.as_mut().unwrap()[2].sub_path_expr =
        Some("$(NOT_SET)".to_owned());
    assert!(bench.mounts(&no_env).unwrap_err().to_string().ends_with(": missing value for NOT_SET"));

    bench.volumes.tear_down("uid-1").unwrap();
    assert!(Path::new("/etc/passwd").exists() && !bench.is_mounted());
}

#[test]
fn what_others_mounted_in_a_volume_is_not_deleted() {
    if !is_root("what_others_mounted_in_a_volume_is_not_deleted") {
        return;
    }
    let bench = Bench::new();
    let pod = pod(&json!([{"name": "disk", "emptyDir": {}}]), &none(), &json!({}));
    bench.set_up(&pod);
    let precious = bench.dir.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("data"), "x").unwrap();
    let inside = bench.volume("empty-dir", "disk/mnt");
    fs::create_dir(&inside).unwrap();
    let bind = || mount(Some(&precious), &inside, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    bind();
    bind();
    // In use: it stays, with everything.
    let held = fs::File::open(inside.join("data")).unwrap();
    assert!(matches!(bench.volumes.tear_down("uid-1"), Err(TearDownError::Busy { .. })));
    assert!(precious.join("data").exists() && bench.is_mounted());
    drop(held);
    bench.volumes.tear_down("uid-1").unwrap();
    assert!(precious.join("data").exists() && bench.volumes.pod_uids_on_disk().unwrap().is_empty());
}

#[test]
fn a_busy_volume_of_ours_does_not_keep_its_pod() {
    if !is_root("a_busy_volume_of_ours_does_not_keep_its_pod") {
        return;
    }
    let bench = Bench::new();
    let pod = pod(&json!([{"name": "mem", "emptyDir": {"medium": "Memory"}}]), &none(), &json!({}));
    bench.set_up(&pod);
    fs::write(bench.volume("empty-dir", "mem/file"), "x").unwrap();
    let held = fs::File::open(bench.volume("empty-dir", "mem/file")).unwrap();
    bench.volumes.tear_down("uid-1").unwrap();
    drop(held);
    assert!(bench.volumes.pod_uids_on_disk().unwrap().is_empty());
}

#[test]
fn the_root_is_shared_once() {
    if !is_root("the_root_is_shared_once") {
        return;
    }
    let bench = Bench::new();
    let root = bench.dir.path().join("kubelet");
    assert!(bench.volumes.share().unwrap());
    assert!(bench.volumes.share().unwrap());
    let real = fs::canonicalize(&root).unwrap();
    let mounts = mountinfo::at_or_below(&real).unwrap();
    if mounts.is_empty() {
        // The system's mounts are shared already.
        return;
    }
    assert!(mounts.len() == 1 && mounts[0].is_shared);
    let pod = pod(&json!([{"name": "mem", "emptyDir": {"medium": "Memory"}}]), &none(), &json!({}));
    assert_eq!(bench.set_up(&pod), Vec::<String>::new());
    bench.volumes.tear_down("uid-1").unwrap();
    umount2(&real, MntFlags::UMOUNT_NOFOLLOW).unwrap();
    assert!(mountinfo::at_or_below(&real).unwrap().is_empty());

    // Where pods have mounts already, they are not covered up.
    assert_eq!(bench.set_up(&pod), Vec::<String>::new());
    assert!(!bench.volumes.share().unwrap());
    bench.volumes.tear_down("uid-1").unwrap();
}
