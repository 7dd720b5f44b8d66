//! Security contexts of sandboxes and containers in CRI's terms, and what is refused: running as root against the pod's word, unsafe
//! sysctls, user namespaces.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, Pod, PodSecurityContext, PodSpec, SELinuxOptions, SeccompProfile, SecurityContext,
};
use skerry_proto::cri;
use skerry_proto::cri::security_profile::ProfileType;

use crate::kubelet::container_config::{ConfigError, ContainerSpec};
use crate::kubelet::field::Identity;
use crate::kubelet::references::NodeFacts;
use crate::kubelet::resources::Machine;

/// Masked in every container, besides the throttle counters of the CPUs there are.
const MASKED: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

const APPARMOR_ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";

/// The security context of a container. `image` is what the runtime says of its image: who it runs as, if the pod does not say.
pub fn container_security(
    pod: &Pod,
    container: &Container,
    image: &cri::Image,
    node: &NodeFacts,
    machine: &Machine,
) -> Result<cri::LinuxContainerSecurityContext, ConfigError> {
    let whole = pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref());
    let own = container.security_context.as_ref();
    let image_user = ImageUser::of(image);
    let run_as_user = own.and_then(|own| own.run_as_user).or_else(|| whole.and_then(|whole| whole.run_as_user));
    let run_as_group = own.and_then(|own| own.run_as_group).or_else(|| whole.and_then(|whole| whole.run_as_group));
    let non_root = own.and_then(|own| own.run_as_non_root).or_else(|| whole.and_then(|whole| whole.run_as_non_root));
    if non_root == Some(true) {
        verify_non_root(pod, container, run_as_user, &image_user)?;
    }
    let (user, username) = match (run_as_user, image_user) {
        (Some(uid), _) | (None, ImageUser::Id(uid)) => (Some(uid), String::new()),
        (None, ImageUser::Name(name)) => (None, name),
    };
    let (apparmor, apparmor_name) = match apparmor_profile(pod, container, whole)? {
        Some(profile) => {
            let name = match profile.profile_type() {
                ProfileType::RuntimeDefault => "runtime/default".to_owned(),
                ProfileType::Unconfined => "unconfined".to_owned(),
                ProfileType::Localhost => format!("localhost/{}", profile.localhost_ref),
            };
            (Some(profile), name)
        }
        None => (None, String::new()),
    };
    let unmasked = own.and_then(|own| own.proc_mount.as_deref()) == Some("Unmasked");
    let masked = MASKED.iter().map(|path| (*path).to_owned()).chain(machine.thermal_throttle.iter().cloned());
    let read_only = READ_ONLY.iter().map(|path| (*path).to_owned());
    #[expect(deprecated, reason = "runtimes before containerd 1.6 read the old AppArmor field only")]
    Ok(cri::LinuxContainerSecurityContext {
        capabilities: own.and_then(|own| own.capabilities.as_ref()).map(|capabilities| cri::Capability {
            add_capabilities: capabilities.add.clone().unwrap_or_default(),
            drop_capabilities: capabilities.drop.clone().unwrap_or_default(),
            add_ambient_capabilities: Vec::new(),
        }),
        privileged: is_privileged(own),
        namespace_options: Some(namespaces(pod)),
        selinux_options: own
            .and_then(|own| own.se_linux_options.as_ref())
            .or_else(|| whole.and_then(|whole| whole.se_linux_options.as_ref()))
            .map(selinux),
        run_as_user: user.map(int64),
        run_as_group: run_as_group.map(int64),
        run_as_username: username,
        readonly_rootfs: own.and_then(|own| own.read_only_root_filesystem).unwrap_or(false),
        supplemental_groups: supplemental_groups(whole),
        supplemental_groups_policy: supplemental_groups_policy(whole)?.into(),
        no_new_privs: own.and_then(|own| own.allow_privilege_escalation) == Some(false),
        masked_paths: if unmasked { Vec::new() } else { masked.collect() },
        readonly_paths: if unmasked { Vec::new() } else { read_only.collect() },
        seccomp: Some(seccomp_profile(own, whole, node)?),
        apparmor,
        apparmor_profile: apparmor_name,
        ..Default::default()
    })
}

/// The security context of a sandbox.
pub fn sandbox_security(pod: &Pod) -> Result<cri::LinuxSandboxSecurityContext, ConfigError> {
    let spec = pod.spec.as_ref();
    let whole = spec.and_then(|spec| spec.security_context.as_ref());
    let run_as_user = whole.and_then(|whole| whole.run_as_user);
    let privileged = spec.is_some_and(|spec| {
        ContainerSpec::all(spec).any(|container| is_privileged(container.container().security_context.as_ref()))
    });
    Ok(cri::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(pod)),
        selinux_options: whole.and_then(|whole| whole.se_linux_options.as_ref()).map(selinux),
        run_as_user: run_as_user.map(int64),
        // Runtimes refuse a group without a user, and the pause process does not care.
        run_as_group: run_as_user.and_then(|_| whole.and_then(|whole| whole.run_as_group)).map(int64),
        supplemental_groups: supplemental_groups(whole),
        supplemental_groups_policy: supplemental_groups_policy(whole)?.into(),
        privileged,
        // Whatever the containers are allowed, the pause process needs nothing special.
        seccomp: Some(profile(ProfileType::RuntimeDefault, String::new())),
        ..Default::default()
    })
}

/// Namespaces of the sandbox and its containers.
pub fn namespaces(pod: &Pod) -> cri::NamespaceOption {
    let is = |flag: fn(&PodSpec) -> Option<bool>| pod.spec.as_ref().and_then(flag) == Some(true);
    let node_or_pod = |node: bool| if node { cri::NamespaceMode::Node } else { cri::NamespaceMode::Pod };
    let pid = if is(|spec| spec.host_pid) {
        cri::NamespaceMode::Node
    } else if is(|spec| spec.share_process_namespace) {
        cri::NamespaceMode::Pod
    } else {
        cri::NamespaceMode::Container
    };
    cri::NamespaceOption {
        network: node_or_pod(is(|spec| spec.host_network)).into(),
        pid: pid.into(),
        ipc: node_or_pod(is(|spec| spec.host_ipc)).into(),
        target_id: String::new(),
        userns_options: None,
    }
}

/// The sysctls of the sandbox, with dots between the parts of their names.
pub fn sysctls(pod: &Pod) -> HashMap<String, String> {
    let whole = pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref());
    let sysctls = whole.into_iter().flat_map(|whole| whole.sysctls.iter().flatten());
    sysctls.map(|sysctl| (dotted(&sysctl.name), sysctl.value.clone())).collect()
}

/// Why the pod must be rejected (`SysctlForbidden`) for what it wants to set, in the words of the API; for admission.
pub fn check_sysctls(pod: &Pod) -> Result<(), String> {
    let Some(spec) = &pod.spec else { return Ok(()) };
    for sysctl in spec.security_context.iter().flat_map(|whole| whole.sysctls.iter().flatten()) {
        let name = dotted(&sysctl.name);
        if !SAFE_SYSCTLS.contains(&name.as_str()) {
            return Err(format!("forbidden sysctl: \"{name}\" not allowlisted"));
        }
        let shared = [("net.", spec.host_network, "net"), ("kernel.", spec.host_ipc, "ipc")];
        if let Some((_, _, what)) =
            shared.iter().find(|(prefix, host, _)| *host == Some(true) && name.starts_with(prefix))
        {
            return Err(format!("forbidden sysctl: \"{name}\" not allowed with host {what} enabled"));
        }
    }
    Ok(())
}

/// User namespaces are not offered.
pub fn refuse_user_namespace(pod: &Pod, handler: &str) -> Result<(), ConfigError> {
    match pod.spec.as_ref().and_then(|spec| spec.host_users) {
        Some(false) if handler.is_empty() => Err(ConfigError::UserNamespace("runtime".to_owned())),
        Some(false) => Err(ConfigError::UserNamespace(format!("RuntimeClass handler \"{handler}\""))),
        _ => Ok(()),
    }
}

/// Who an image runs as. An image that does not say runs as root.
enum ImageUser {
    Id(i64),
    Name(String),
}

impl ImageUser {
    fn of(image: &cri::Image) -> Self {
        match &image.uid {
            Some(uid) => Self::Id(uid.value),
            None if image.username.is_empty() => Self::Id(0),
            None => Self::Name(image.username.clone()),
        }
    }
}

fn verify_non_root(
    pod: &Pod,
    container: &Container,
    run_as_user: Option<i64>,
    image_user: &ImageUser,
) -> Result<(), ConfigError> {
    let (pod, container) = (Identity::of(pod).to_string(), container.name.clone());
    match (run_as_user, image_user) {
        (Some(0), _) => Err(ConfigError::RunAsUserIsRoot { pod, container }),
        (None, ImageUser::Id(0)) => Err(ConfigError::ImageRunsAsRoot { pod, container }),
        (None, ImageUser::Id(uid)) if !(0..=i64::from(i32::MAX)).contains(uid) => {
            Err(ConfigError::ImageUserInvalid { uid: *uid, pod, container })
        }
        (Some(_), _) | (None, ImageUser::Id(_)) => Ok(()),
        (None, ImageUser::Name(user)) => Err(ConfigError::ImageUserNotNumeric { user: user.clone(), pod, container }),
    }
}

fn seccomp_profile(
    own: Option<&SecurityContext>,
    whole: Option<&PodSecurityContext>,
    node: &NodeFacts,
) -> Result<cri::SecurityProfile, ConfigError> {
    let wanted: Option<&SeccompProfile> = own
        .and_then(|own| own.seccomp_profile.as_ref())
        .or_else(|| whole.and_then(|whole| whole.seccomp_profile.as_ref()));
    let Some(wanted) = wanted else { return Ok(profile(ProfileType::Unconfined, String::new())) };
    match wanted.type_.as_str() {
        "RuntimeDefault" => Ok(profile(ProfileType::RuntimeDefault, String::new())),
        "Unconfined" => Ok(profile(ProfileType::Unconfined, String::new())),
        "Localhost" => {
            let name = wanted.localhost_profile.as_deref().filter(|name| !name.is_empty());
            let name = name.ok_or(ConfigError::SeccompProfileMissing)?;
            if name.starts_with('/') || name.split('/').any(|part| part == "..") {
                return Err(ConfigError::SeccompProfileOutside(name.to_owned()));
            }
            let path = node.pods_root.join("seccomp").join(name);
            Ok(profile(ProfileType::Localhost, path.to_string_lossy().into_owned()))
        }
        other => Err(ConfigError::SeccompTypeUnknown(other.to_owned())),
    }
}

/// Container, annotation of old manifests, pod, in this order.
fn apparmor_profile(
    pod: &Pod,
    container: &Container,
    whole: Option<&PodSecurityContext>,
) -> Result<Option<cri::SecurityProfile>, ConfigError> {
    let annotations = pod.metadata.annotations.as_ref();
    let annotated = annotations.and_then(|all| all.get(&format!("{APPARMOR_ANNOTATION}{}", container.name)));
    let from_annotation = annotated.filter(|text| !text.is_empty()).map(|text| {
        let (type_, localhost_profile) = match text.as_str() {
            "runtime/default" => ("RuntimeDefault", None),
            "unconfined" => ("Unconfined", None),
            other => match other.strip_prefix("localhost/") {
                Some(name) => ("Localhost", Some(name.to_owned())),
                None => (other, None),
            },
        };
        AppArmorProfile { type_: type_.to_owned(), localhost_profile }
    });
    let own = container.security_context.as_ref().and_then(|own| own.app_armor_profile.clone());
    let wanted = own.or(from_annotation).or_else(|| whole.and_then(|whole| whole.app_armor_profile.clone()));
    let Some(wanted) = wanted else { return Ok(None) };
    match (wanted.type_.as_str(), wanted.localhost_profile) {
        ("RuntimeDefault", _) => Ok(Some(profile(ProfileType::RuntimeDefault, String::new()))),
        ("Unconfined", _) => Ok(Some(profile(ProfileType::Unconfined, String::new()))),
        ("Localhost", Some(name)) if !name.is_empty() => Ok(Some(profile(ProfileType::Localhost, name))),
        ("Localhost", _) => Err(ConfigError::AppArmorProfileMissing),
        (other, _) => Err(ConfigError::AppArmorTypeUnknown(other.to_owned())),
    }
}

fn supplemental_groups(whole: Option<&PodSecurityContext>) -> Vec<i64> {
    let Some(whole) = whole else { return Vec::new() };
    whole.fs_group.into_iter().chain(whole.supplemental_groups.iter().flatten().copied()).collect()
}

fn supplemental_groups_policy(
    whole: Option<&PodSecurityContext>,
) -> Result<cri::SupplementalGroupsPolicy, ConfigError> {
    match whole.and_then(|whole| whole.supplemental_groups_policy.as_deref()) {
        None | Some("Merge") => Ok(cri::SupplementalGroupsPolicy::Merge),
        Some("Strict") => Ok(cri::SupplementalGroupsPolicy::Strict),
        Some(other) => Err(ConfigError::GroupsPolicyUnknown(other.to_owned())),
    }
}

fn is_privileged(own: Option<&SecurityContext>) -> bool {
    own.and_then(|own| own.privileged) == Some(true)
}

fn selinux(options: &SELinuxOptions) -> cri::SeLinuxOption {
    cri::SeLinuxOption {
        user: options.user.clone().unwrap_or_default(),
        role: options.role.clone().unwrap_or_default(),
        r#type: options.type_.clone().unwrap_or_default(),
        level: options.level.clone().unwrap_or_default(),
    }
}

fn profile(profile_type: ProfileType, localhost_ref: String) -> cri::SecurityProfile {
    cri::SecurityProfile { profile_type: profile_type.into(), localhost_ref }
}

fn int64(value: i64) -> cri::Int64Value {
    cri::Int64Value { value }
}

/// `a/b.c` is another way to write `a.b/c`, where the part `b/c` has a dot in its name.
fn dotted(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name[at..].starts_with('/') => name
            .chars()
            .map(|c| {
                if c == '/' {
                    '.'
                } else if c == '.' {
                    '/'
                } else {
                    c
                }
            })
            .collect(),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
#[expect(clippy::needless_pass_by_value, reason = "a literal in a call reads best without a reference")]
mod tests;
