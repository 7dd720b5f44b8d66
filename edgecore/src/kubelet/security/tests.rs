use serde_json::{Value, json};

use super::*;
use crate::kubelet::container_config::fixtures::{machine, node};

fn pod(whole: Value, own: Value) -> Pod {
    let containers = json!([{"name": "c", "securityContext": own}]);
    serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "shop", "uid": "u"},
        "spec": {"securityContext": whole, "containers": containers}
    }))
    .unwrap()
}

fn with(pod: &Pod, image: &cri::Image) -> Result<cri::LinuxContainerSecurityContext, ConfigError> {
    container_security(pod, &pod.spec.as_ref().unwrap().containers[0], image, &node(), &machine())
}

fn image(uid: Option<i64>, username: &str) -> cri::Image {
    cri::Image { uid: uid.map(int64), username: username.to_owned(), ..Default::default() }
}

fn of(whole: Value, own: Value) -> cri::LinuxContainerSecurityContext {
    with(&pod(whole, own), &image(Some(5), "")).unwrap()
}

#[test]
fn who_runs() {
    for (whole, own, image, uid, username) in [
        (json!({}), json!({}), image(Some(5), ""), Some(5), ""),
        (json!({}), json!({}), image(None, ""), Some(0), ""),
        (json!({}), json!({}), image(None, "nginx"), None, "nginx"),
        (json!({"runAsUser": 7}), json!({}), image(None, "nginx"), Some(7), ""),
        (json!({"runAsUser": 7}), json!({"runAsUser": 0}), image(Some(5), ""), Some(0), ""),
        (json!({"runAsUser": 7, "runAsNonRoot": true}), json!({}), image(None, ""), Some(7), ""),
        (json!({"runAsNonRoot": true}), json!({"runAsNonRoot": false}), image(None, ""), Some(0), ""),
        (json!({"runAsNonRoot": true}), json!({}), image(Some(5), ""), Some(5), ""),
    ] {
        let found = with(&pod(whole, own), &image).unwrap();
        assert_eq!((found.run_as_user.map(|id| id.value), found.run_as_username.as_str()), (uid, username));
    }
    let groups = |whole, own| of(whole, own).run_as_group.map(|id| id.value);
    assert_eq!(groups(json!({"runAsGroup": 3}), json!({})), Some(3));
    assert_eq!(groups(json!({"runAsGroup": 3}), json!({"runAsGroup": 0})), Some(0));
    assert_eq!(groups(json!({}), json!({})), None);
}

#[test]
fn root_is_refused() {
    let suffix = "(pod: \"web_shop(u)\", container: c)";
    for (whole, own, image, message) in [
        (
            json!({"runAsNonRoot": true}),
            json!({"runAsUser": 0}),
            image(Some(5), ""),
            "container's runAsUser breaks non-root policy",
        ),
        (
            json!({"runAsUser": 0}),
            json!({"runAsNonRoot": true}),
            image(None, ""),
            "container's runAsUser breaks non-root policy",
        ),
        (
            json!({"runAsNonRoot": true}),
            json!({}),
            image(Some(0), ""),
            "container has runAsNonRoot and image will run as root",
        ),
        (
            json!({"runAsNonRoot": true}),
            json!({}),
            image(None, ""),
            "container has runAsNonRoot and image will run as root",
        ),
        (
            json!({"runAsNonRoot": true}),
            json!({}),
            image(None, "nginx"),
            "container has runAsNonRoot and image has non-numeric user (nginx), cannot verify user is non-root",
        ),
        (
            json!({"runAsNonRoot": true}),
            json!({}),
            image(Some(-1), ""),
            "container has runAsNonRoot and image has an invalid user id (-1): must be between 1 and 2147483647",
        ),
    ] {
        let error = with(&pod(whole, own), &image).unwrap_err();
        assert_eq!(error.to_string(), format!("{message} {suffix}"));
        assert_eq!(error.reason(), "CreateContainerConfigError");
    }
}

#[test]
fn groups_capabilities_and_flags() {
    let found = of(
        json!({"fsGroup": 2000, "supplementalGroups": [3000, 4000], "supplementalGroupsPolicy": "Strict",
               "seLinuxOptions": {"level": "s0"}}),
        json!({"capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]}, "privileged": true, "readOnlyRootFilesystem": true,
               "allowPrivilegeEscalation": false}),
    );
    assert_eq!(found.supplemental_groups, [2000, 3000, 4000]);
    assert_eq!(found.supplemental_groups_policy(), cri::SupplementalGroupsPolicy::Strict);
    let capabilities = found.capabilities.clone().unwrap();
    assert_eq!(
        (capabilities.add_capabilities, capabilities.drop_capabilities),
        (vec!["NET_ADMIN".into()], vec!["ALL".into()])
    );
    assert!(found.privileged && found.readonly_rootfs && found.no_new_privs);
    assert_eq!(found.selinux_options.unwrap().level, "s0");

    let plain = of(json!({}), json!({"allowPrivilegeEscalation": true}));
    assert!(!plain.privileged && !plain.readonly_rootfs && !plain.no_new_privs);
    assert_eq!((plain.capabilities, plain.selinux_options), (None, None));
    let error = with(&pod(json!({"supplementalGroupsPolicy": "Some"}), json!({})), &image(None, "")).unwrap_err();
    assert_eq!(error.to_string(), "unsupported supplementalGroupsPolicy: Some");
}

#[test]
fn paths_of_proc() {
    let found = of(json!({}), json!({"procMount": "Default"}));
    assert_eq!(found.masked_paths.len(), MASKED.len() + 1);
    assert_eq!(found.masked_paths.last().unwrap(), "/sys/devices/system/cpu/cpu0/thermal_throttle");
    assert_eq!(found.readonly_paths, READ_ONLY);
    let bare = of(json!({}), json!({"procMount": "Unmasked"}));
    assert_eq!((bare.masked_paths.len(), bare.readonly_paths.len()), (0, 0));
}

#[test]
fn seccomp() {
    let local = |name: &str| json!({"seccompProfile": {"type": "Localhost", "localhostProfile": name}});
    let kind = |name: &str| json!({"seccompProfile": {"type": name}});
    for (whole, own, expected) in [
        (json!({}), json!({}), Ok((ProfileType::Unconfined, ""))),
        (kind("RuntimeDefault"), json!({}), Ok((ProfileType::RuntimeDefault, ""))),
        (kind("RuntimeDefault"), kind("Unconfined"), Ok((ProfileType::Unconfined, ""))),
        (json!({}), local("a/b.json"), Ok((ProfileType::Localhost, "/var/lib/kubelet/seccomp/a/b.json"))),
        (json!({}), kind("Localhost"), Err("localhostProfile must be set if seccompProfile type is Localhost.")),
        (local(""), json!({}), Err("localhostProfile must be set if seccompProfile type is Localhost.")),
        (
            local("a/../../b"),
            json!({}),
            Err("seccomp localhostProfile \"a/../../b\" must be a relative path without .."),
        ),
        (local("/etc/x"), json!({}), Err("seccomp localhostProfile \"/etc/x\" must be a relative path without ..")),
        (kind("Mine"), json!({}), Err("unknown seccomp profile type: \"Mine\"")),
    ] {
        let found = with(&pod(whole, own), &image(None, "")).map(|found| found.seccomp.unwrap());
        let expected = expected.map(|(kind, path)| profile(kind, path.to_owned())).map_err(str::to_owned);
        assert_eq!(found.map_err(|error| error.to_string()), expected);
    }
}

#[test]
fn apparmor() {
    let kind = |name: &str| json!({"appArmorProfile": {"type": name}});
    let local = json!({"appArmorProfile": {"type": "Localhost", "localhostProfile": "mine"}});
    #[expect(deprecated, reason = "the old field is filled too")]
    let found = |whole: Value, own: Value, annotation: Option<&str>| {
        let mut pod = pod(whole, own);
        let entry = |text: &str| (format!("{APPARMOR_ANNOTATION}c"), text.to_owned());
        pod.metadata.annotations = annotation.map(|text| [entry(text)].into());
        with(&pod, &image(None, ""))
            .map(|found| {
                (found.apparmor.map(|profile| (profile.profile_type(), profile.localhost_ref)), found.apparmor_profile)
            })
            .map_err(|error| error.to_string())
    };
    let is = |kind, name: &str, old: &str| Ok((Some((kind, name.to_owned())), old.to_owned()));
    assert_eq!(found(json!({}), json!({}), None), Ok((None, String::new())));
    assert_eq!(found(kind("Unconfined"), json!({}), None), is(ProfileType::Unconfined, "", "unconfined"));
    assert_eq!(
        found(kind("Unconfined"), local, Some("unconfined")),
        is(ProfileType::Localhost, "mine", "localhost/mine")
    );
    assert_eq!(
        found(kind("Unconfined"), json!({}), Some("runtime/default")),
        is(ProfileType::RuntimeDefault, "", "runtime/default")
    );
    assert_eq!(found(json!({}), json!({}), Some("localhost/x")), is(ProfileType::Localhost, "x", "localhost/x"));
    assert_eq!(found(json!({}), kind("Localhost"), None), Err("missing localhost apparmor profile name".to_owned()));
    assert_eq!(found(json!({}), kind("Mine"), None), Err("unknown apparmor profile type: \"Mine\"".to_owned()));
}

#[test]
fn namespaces_of_the_pod() {
    use cri::NamespaceMode::{Container, Node, Pod as Shared};
    let of = |spec: Value| {
        let mut pod = pod(json!({}), json!({}));
        pod.spec = serde_json::from_value(spec).unwrap();
        let found = namespaces(&pod);
        (found.network(), found.pid(), found.ipc())
    };
    assert_eq!(of(json!({"containers": []})), (Shared, Container, Shared));
    assert_eq!(of(json!({"containers": [], "shareProcessNamespace": true, "hostIPC": true})), (Shared, Shared, Node));
    assert_eq!(
        of(json!({"containers": [], "shareProcessNamespace": true, "hostPID": true, "hostNetwork": true})),
        (Node, Node, Shared)
    );
}

#[test]
fn sandboxes() {
    let plain = sandbox_security(&pod(json!({"runAsGroup": 3}), json!({}))).unwrap();
    assert_eq!((plain.run_as_user, plain.run_as_group, plain.privileged), (None, None, false));
    assert_eq!(plain.seccomp.unwrap().profile_type(), ProfileType::RuntimeDefault);
    let whole = json!({"runAsUser": 0, "runAsGroup": 3, "fsGroup": 2, "supplementalGroups": [1], "seccompProfile": {"type": "Unconfined"}});
    let found = sandbox_security(&pod(whole, json!({"privileged": true}))).unwrap();
    assert_eq!((found.run_as_user, found.run_as_group), (Some(int64(0)), Some(int64(3))));
    assert_eq!((found.supplemental_groups, found.privileged), (vec![2, 1], true));
    assert_eq!(found.seccomp.unwrap().profile_type(), ProfileType::RuntimeDefault);
    let mut hidden = pod(json!({}), json!({}));
    let init = json!([{"name": "i", "securityContext": {"privileged": true}}]);
    hidden.spec.as_mut().unwrap().init_containers = serde_json::from_value(init).unwrap();
    assert!(sandbox_security(&hidden).unwrap().privileged);
}

#[test]
fn sysctl_names_and_refusals() {
    let wants = |name: &str| pod(json!({"sysctls": [{"name": name, "value": "1"}]}), json!({}));
    for (written, dots) in [
        ("kernel.shm_rmid_forced", "kernel.shm_rmid_forced"),
        ("kernel/shm_rmid_forced", "kernel.shm_rmid_forced"),
        ("net/ipv4/conf/eth0.1/x", "net.ipv4.conf.eth0/1.x"),
        ("net.ipv4.conf.eth0/1.x", "net.ipv4.conf.eth0/1.x"),
    ] {
        assert_eq!(sysctls(&wants(written)), HashMap::from([(dots.to_owned(), "1".to_owned())]));
    }
    assert_eq!(check_sysctls(&wants("net/ipv4/tcp_syncookies")), Ok(()));
    assert_eq!(
        check_sysctls(&wants("kernel.msgmax")),
        Err("forbidden sysctl: \"kernel.msgmax\" not allowlisted".to_owned())
    );
    let mut host = wants("net.ipv4.tcp_rmem");
    host.spec.as_mut().unwrap().host_network = Some(true);
    assert_eq!(
        check_sysctls(&host),
        Err("forbidden sysctl: \"net.ipv4.tcp_rmem\" not allowed with host net enabled".to_owned())
    );
    let mut host = wants("kernel/shm_rmid_forced");
    host.spec.as_mut().unwrap().host_ipc = Some(true);
    assert!(check_sysctls(&host).unwrap_err().ends_with("not allowed with host ipc enabled"));
}
