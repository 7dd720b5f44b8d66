//! Views over a Pod: its containers by kind, restart rules, grace periods.
//!
//! Everything here borrows the Pod and answers questions about what was asked for; nothing knows what runs.

use k8s_openapi::api::core::v1::{Container, ContainerRestartRule, Pod, PodSpec, Probe};
use xxhash_rust::xxh3::xxh3_64;

/// Grace given to a pod that names none.
const DEFAULT_GRACE: i64 = 30;

/// What part a container plays in its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Runs to its end before what follows it.
    Init,
    /// An init container that is kept running (`restartPolicy: Always`).
    Sidecar,
    /// A regular container.
    App,
    /// Added to a running pod; started once.
    Ephemeral,
}

/// When a dead container is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestartPolicy {
    /// Whatever its exit code was.
    Always,
    /// When its exit code was not 0.
    OnFailure,
    /// Not at all.
    Never,
}

impl RestartPolicy {
    fn parse(text: &str) -> Self {
        match text {
            "Never" => Self::Never,
            "OnFailure" => Self::OnFailure,
            _ => Self::Always,
        }
    }
}

/// One container of a pod.
#[derive(Clone, Copy, Debug)]
pub struct ContainerView<'a> {
    /// Its part in the pod.
    pub kind: Kind,
    /// Position in its list of the spec (init containers and sidecars share one).
    pub index: usize,
    /// Its name, unique in the pod.
    pub name: &'a str,
    /// The image as the spec names it.
    pub image: &'a str,
    /// The spec's container; `None` for an ephemeral one, which is of another type.
    pub container: Option<&'a Container>,
    own_policy: Option<&'a str>,
    rules: &'a [ContainerRestartRule],
    pod_policy: RestartPolicy,
}

impl<'a> ContainerView<'a> {
    /// Hash of what makes a running container obsolete when it changes: name and image.
    pub fn hash(&self) -> u64 {
        container_hash(self.name, self.image)
    }

    /// The container declares a restart policy of its own.
    pub fn has_own_policy(&self) -> bool {
        self.own_policy.is_some()
    }

    /// The policy that holds for this container.
    pub fn policy(&self) -> RestartPolicy {
        match self.kind {
            Kind::Sidecar => RestartPolicy::Always,
            Kind::Ephemeral => RestartPolicy::Never,
            Kind::Init | Kind::App => self.own_policy.map_or(self.pod_policy, RestartPolicy::parse),
        }
    }

    /// Whether it runs again after this exit code.
    pub fn restarts(&self, exit_code: i32) -> bool {
        if matches!(self.kind, Kind::Init | Kind::App)
            && self.own_policy.is_some()
            && let Some(rule) = self.rules.iter().find(|rule| matches(rule, exit_code))
        {
            return rule.action == "Restart";
        }
        match (self.kind, self.policy()) {
            (Kind::Ephemeral, _) | (Kind::Init | Kind::App, RestartPolicy::Never) => false,
            (Kind::Sidecar, _) | (Kind::App, RestartPolicy::Always) => true,
            // A finished init container is finished whatever the policy.
            (Kind::Init, RestartPolicy::Always | RestartPolicy::OnFailure) | (Kind::App, RestartPolicy::OnFailure) => {
                exit_code != 0
            }
        }
    }

    /// Whether it runs again after a probe had it killed: exit code rules have no say.
    pub fn restarts_after_kill(&self) -> bool {
        self.policy() != RestartPolicy::Never
    }

    /// It has a probe of this kind.
    pub fn liveness_probe(&self) -> Option<&'a Probe> {
        self.probed()?.liveness_probe.as_ref()
    }

    /// It has a probe of this kind.
    pub fn readiness_probe(&self) -> Option<&'a Probe> {
        self.probed()?.readiness_probe.as_ref()
    }

    /// It has a probe of this kind.
    pub fn startup_probe(&self) -> Option<&'a Probe> {
        self.probed()?.startup_probe.as_ref()
    }

    /// It has a preStop hook.
    pub fn has_pre_stop(&self) -> bool {
        self.container.and_then(|container| container.lifecycle.as_ref()).is_some_and(|hooks| hooks.pre_stop.is_some())
    }

    fn probed(&self) -> Option<&'a Container> {
        self.container.filter(|_| matches!(self.kind, Kind::App | Kind::Sidecar))
    }
}

fn matches(rule: &ContainerRestartRule, exit_code: i32) -> bool {
    rule.exit_codes.as_ref().is_some_and(|codes| {
        let listed = codes.values.as_deref().unwrap_or_default().contains(&exit_code);
        if codes.operator == "NotIn" { !listed } else { listed }
    })
}

/// See [`ContainerView::hash`].
pub fn container_hash(name: &str, image: &str) -> u64 {
    xxh3_64([name.as_bytes(), b"\0", image.as_bytes()].concat().as_slice())
}

/// A pod as the kubelet looks at it.
#[derive(Clone, Copy, Debug)]
pub struct Spec<'a> {
    /// The object.
    pub pod: &'a Pod,
    spec: Option<&'a PodSpec>,
}

impl<'a> Spec<'a> {
    /// A view of this pod.
    pub fn new(pod: &'a Pod) -> Self {
        Self { pod, spec: pod.spec.as_ref() }
    }

    /// The spec; a pod known only from its containers has none.
    pub fn inner(&self) -> Option<&'a PodSpec> {
        self.spec
    }

    /// metadata.uid
    pub fn uid(&self) -> &'a str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    /// `name_namespace(uid)`, as messages name a pod.
    pub fn full_name(&self) -> String {
        let meta = &self.pod.metadata;
        let (name, namespace) =
            (meta.name.as_deref().unwrap_or_default(), meta.namespace.as_deref().unwrap_or_default());
        format!("{name}_{namespace}({})", self.uid())
    }

    /// The pod's restart policy.
    pub fn restart_policy(&self) -> RestartPolicy {
        self.spec.and_then(|spec| spec.restart_policy.as_deref()).map_or(RestartPolicy::Always, RestartPolicy::parse)
    }

    /// Init containers and sidecars, in order.
    pub fn inits(&self) -> Vec<ContainerView<'a>> {
        let containers = self.spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
        containers
            .iter()
            .enumerate()
            .map(|(index, container)| {
                let sidecar = container.restart_policy.as_deref() == Some("Always");
                self.view(if sidecar { Kind::Sidecar } else { Kind::Init }, index, container)
            })
            .collect()
    }

    /// Regular containers, in order.
    pub fn apps(&self) -> Vec<ContainerView<'a>> {
        let containers = self.spec.map(|spec| spec.containers.as_slice()).unwrap_or_default();
        containers.iter().enumerate().map(|(index, container)| self.view(Kind::App, index, container)).collect()
    }

    /// Ephemeral containers, in order.
    pub fn ephemerals(&self) -> Vec<ContainerView<'a>> {
        let containers = self.spec.and_then(|spec| spec.ephemeral_containers.as_deref()).unwrap_or_default();
        containers
            .iter()
            .enumerate()
            .map(|(index, container)| ContainerView {
                kind: Kind::Ephemeral,
                index,
                name: &container.name,
                image: container.image.as_deref().unwrap_or_default(),
                container: None,
                own_policy: None,
                rules: &[],
                pod_policy: self.restart_policy(),
            })
            .collect()
    }

    /// All of them: inits, apps, ephemerals.
    pub fn all(&self) -> Vec<ContainerView<'a>> {
        let mut all = self.inits();
        all.extend(self.apps());
        all.extend(self.ephemerals());
        all
    }

    /// The container of this name.
    pub fn find(&self, name: &str) -> Option<ContainerView<'a>> {
        self.all().into_iter().find(|view| view.name == name)
    }

    /// It uses the node's network namespace.
    pub fn host_network(&self) -> bool {
        self.spec.and_then(|spec| spec.host_network).unwrap_or(false)
    }

    /// terminationGracePeriodSeconds, defaulted.
    pub fn grace(&self) -> i64 {
        self.spec.and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(DEFAULT_GRACE)
    }

    /// deletionGracePeriodSeconds, once a deletion was asked for.
    pub fn deletion_grace(&self) -> Option<i64> {
        self.pod.metadata.deletion_grace_period_seconds
    }

    /// The object itself says that the pod is over.
    pub fn is_terminal(&self) -> bool {
        self.pod.status.as_ref().and_then(|status| status.phase.as_deref()).is_some_and(is_terminal_phase)
    }

    fn view(&self, kind: Kind, index: usize, container: &'a Container) -> ContainerView<'a> {
        ContainerView {
            kind,
            index,
            name: &container.name,
            image: container.image.as_deref().unwrap_or_default(),
            container: Some(container),
            own_policy: container.restart_policy.as_deref(),
            rules: container.restart_policy_rules.as_deref().unwrap_or_default(),
            pod_policy: self.restart_policy(),
        }
    }
}

/// Failed or Succeeded.
pub fn is_terminal_phase(phase: &str) -> bool {
    matches!(phase, "Failed" | "Succeeded")
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "json!(…) reads best as an argument")]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    #[test]
    fn exit_code_rules_come_before_the_policy() {
        let pod = pod(json!({"restartPolicy": "Never", "containers": [{"name": "a", "restartPolicy": "OnFailure",
            "restartPolicyRules": [
                {"action": "Restart", "exitCodes": {"operator": "In", "values": [0]}},
                {"action": "Restart", "exitCodes": {"operator": "NotIn", "values": [0, 7]}}]},
            {"name": "b"}]}));
        let apps = Spec::new(&pod).apps();
        assert!(apps[0].restarts(0) && apps[0].restarts(3) && apps[0].restarts(7));
        assert!(!apps[1].restarts(3));
    }

    #[test]
    fn a_finished_init_container_is_not_run_again_under_always() {
        let pod =
            pod(json!({"containers": [], "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}]}));
        let inits = Spec::new(&pod).inits();
        assert_eq!((inits[0].kind, inits[1].kind), (Kind::Init, Kind::Sidecar));
        assert!(!inits[0].restarts(0) && inits[0].restarts(1) && inits[1].restarts(0));
    }
}
