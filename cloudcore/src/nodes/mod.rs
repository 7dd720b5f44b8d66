//! The Node objects of edge nodes: registering them, their leases, what keeps their pods, and noticing that they are gone.

use std::collections::BTreeMap;

use kube::api::{DynamicObject, Patch};
use serde_json::{Value, json};
use skerry_proto::EDGE_LABEL;

use crate::apiserver::{Apiserver, Kind, Verdict, verdict};
use crate::backend::{Agents, BackendError, NodeCheck, NodeIdentity, RegisterError};
use crate::{clock, registry};

pub(crate) mod autonomy;
pub(crate) mod labels;
pub(crate) mod leases;

/// On a Node: the newest session that took it over from another replica, or wrote its status. On a lease: whose renewals count.
pub(crate) const EPOCH_ANNOTATION: &str = "skerry.dev/epoch";
/// On a Node: whose session that is, and after commas who had it before. As [`Agents`], in hexadecimal digits.
pub(crate) const AGENTS_ANNOTATION: &str = "skerry.dev/agents";
/// Which machine a Node is.
const MACHINE_ANNOTATION: &str = "skerry.dev/machine-id";
/// Someone else may create or delete the Node while we look.
const ATTEMPTS: usize = 4;

/// Creates the Node, or takes it over for the same machine, unless that is `connected`. `name` can be a Node's.
///
/// Never for another machine, however long the first has not been heard of: it may only be offline, and would come back as a second one
/// under the same name. Only whoever may delete the Node can say that it will not.
pub(crate) async fn register(
    api: &Apiserver,
    name: &str,
    machine_id: &str,
    wanted: &BTreeMap<String, String>,
    connected: bool,
) -> Result<NodeIdentity, RegisterError> {
    let failed = |source| RegisterError::Api(BackendError { action: format!("register node {name}"), source });
    let labels = labels::of_node(name, wanted);
    let mut attempt = 0;
    loop {
        attempt += 1;
        let answer = match api.get(Kind::Node, "", name).await.map_err(failed)? {
            None => api.create(Kind::Node, "", new_node(name, machine_id, &labels)).await,
            Some(node) => {
                may_take_over(name, machine_id, &node)?;
                if connected {
                    return Err(RegisterError::Connected(name.to_owned()));
                }
                let uid = node.metadata.uid.unwrap_or_default();
                let patch = json!({"metadata": {"uid": uid, "labels": labels, "annotations": {MACHINE_ANNOTATION: machine_id}}});
                api.patch(Kind::Node, "", name, &Patch::Merge(patch)).await
            }
        };
        match answer {
            Ok(node) => return Ok(NodeIdentity { name: name.to_owned(), uid: node.metadata.uid.unwrap_or_default() }),
            Err(error) => match verdict(&error) {
                Verdict::Conflict | Verdict::NotFound if attempt < ATTEMPTS => {}
                _ => return Err(failed(error)),
            },
        }
    }
}

/// What the apiserver says about an identity.
pub(crate) async fn check(api: &Apiserver, node: &NodeIdentity) -> Result<NodeCheck, BackendError> {
    let failed = |source| BackendError { action: format!("look up node {}", node.name), source };
    Ok(match api.get(Kind::Node, "", &node.name).await.map_err(failed)? {
        None => NodeCheck::Deleted,
        Some(found) if found.metadata.uid.as_deref() == Some(node.uid.as_str()) => {
            NodeCheck::Live { epoch: epoch_of(&found).unwrap_or_default(), agents: agents_of(&found) }
        }
        Some(_) => NodeCheck::OtherUid,
    })
}

/// What a Node says of its sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    /// The Node's version.
    pub(crate) version: String,
    /// The newest session.
    pub(crate) epoch: u64,
    /// Whose that is.
    pub(crate) agents: Agents,
}

/// A Node as the apiserver has it; `None` if it is gone, or another one has its name.
pub(crate) async fn look(api: &Apiserver, node: &NodeIdentity) -> Result<Option<Named>, kube::Error> {
    let found = api.get(Kind::Node, "", &node.name).await?;
    let found = found.filter(|found| found.metadata.uid.as_deref() == Some(node.uid.as_str()));
    Ok(found.as_ref().map(named))
}

/// What a Node says of its sessions.
pub(crate) fn named(node: &DynamicObject) -> Named {
    Named {
        version: node.metadata.resource_version.clone().unwrap_or_default(),
        epoch: epoch_of(node).unwrap_or_default(),
        agents: agents_of(node),
    }
}

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// The Node names this session.
    Ours,
    /// It names another one that is as new or newer, and whose that is if that is known: of two that claim with the same epoch, who comes
    /// second has lost.
    Theirs(u64, Option<Agents>),
}

/// Says that a session of `who` has a Node from now on: whoever has an older one sees it, and ends it. `known` is what the watch shows;
/// without it the Node is asked for. Answers what the Node says then, too, if it was written.
pub(crate) async fn claim(
    api: &Apiserver,
    node: &NodeIdentity,
    (epoch, who): (u64, u64),
    known: Option<Named>,
) -> Result<(Claim, Option<Named>), kube::Error> {
    let known = match known {
        Some(known) => Some(known),
        None => look(api, node).await?,
    };
    // If it is gone, the session hears of that elsewhere.
    let Some(known) = known else { return Ok((Claim::Ours, None)) };
    if known.epoch >= epoch {
        return Ok((Claim::Theirs(known.epoch, Some(known.agents)), None));
    }
    // Only on what was looked at: of two that claim at once, the second is refused, and looks again.
    let annotations = annotations(epoch, known.agents.followed_by(who));
    let patch = json!({"metadata": {"uid": node.uid, "resourceVersion": known.version, "annotations": annotations}});
    let written = api.patch(Kind::Node, "", &node.name, &Patch::Merge(patch)).await?;
    Ok((Claim::Ours, Some(named(&written))))
}

/// What names a session on a Node.
pub(crate) fn annotations(epoch: u64, Agents { who, ousted }: Agents) -> Value {
    let ousted = ousted.into_iter().filter(|&one| one != 0);
    let agents: Vec<String> = std::iter::once(who).chain(ousted).map(|one| format!("{one:x}")).collect();
    json!({EPOCH_ANNOTATION: epoch.to_string(), AGENTS_ANNOTATION: agents.join(",")})
}

fn agents_of(node: &DynamicObject) -> Agents {
    let annotations = node.metadata.annotations.as_ref();
    annotations.and_then(|annotations| parse_agents(annotations.get(AGENTS_ANNOTATION)?)).unwrap_or_default()
}

/// Reads [`AGENTS_ANNOTATION`].
pub(crate) fn parse_agents(text: &str) -> Option<Agents> {
    let mut numbers = text.split(',').map(|text| u64::from_str_radix(text, 16).ok());
    let mut agents = Agents { who: numbers.next()??, ..Agents::default() };
    for (slot, number) in agents.ousted.iter_mut().zip(numbers) {
        *slot = number?;
    }
    Some(agents)
}

/// The epoch that a Node or lease is marked with. What no session can have had, whoever wrote it, says nothing: or it would bar the node
/// from every session to come.
pub(crate) fn epoch_of(object: &DynamicObject) -> Option<u64> {
    let epoch = object.metadata.annotations.as_ref()?.get(EPOCH_ANNOTATION)?.parse().ok()?;
    registry::is_possible(epoch, clock::wall_millis()).then_some(epoch)
}

/// Gives a Node its label back: what carries it is ours to serve.
pub(crate) async fn relabel(api: &Apiserver, node: &NodeIdentity) -> Result<(), kube::Error> {
    let patch = json!({"metadata": {"uid": node.uid, "labels": {EDGE_LABEL: ""}}});
    api.patch(Kind::Node, "", &node.name, &Patch::Merge(patch)).await.map(drop)
}

fn may_take_over(name: &str, machine_id: &str, node: &DynamicObject) -> Result<(), RegisterError> {
    let metadata = &node.metadata;
    if !metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(EDGE_LABEL)) {
        return Err(RegisterError::NotEdge(name.to_owned()));
    }
    let machine = metadata.annotations.as_ref().and_then(|annotations| annotations.get(MACHINE_ANNOTATION));
    match machine {
        Some(machine) if machine != machine_id => Err(RegisterError::NameTaken(name.to_owned())),
        // One that an operator made beforehand has none.
        Some(_) | None => Ok(()),
    }
}

fn new_node(name: &str, machine_id: &str, labels: &BTreeMap<String, String>) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {MACHINE_ANNOTATION: machine_id}},
        // A cloud provider's controller would take a Node without one for a machine of its own, and delete it when it cannot find it.
        "spec": {"providerID": format!("skerry://{name}")},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_belongs_to_the_machine_that_has_it() {
        let object = |value: Value| serde_json::from_value::<DynamicObject>(value).unwrap();
        let node = |machine: Option<&str>| {
            object(
                json!({"metadata": {"name": "e", "labels": {EDGE_LABEL: ""}, "annotations": machine.map(|id| json!({MACHINE_ANNOTATION: id}))}}),
            )
        };
        assert!(may_take_over("e", "me", &node(Some("me"))).is_ok());
        assert!(may_take_over("e", "me", &node(None)).is_ok());
        let taken = may_take_over("e", "me", &node(Some("secret"))).unwrap_err().to_string();
        assert!(taken.contains("kubectl delete node e") && !taken.contains("secret"), "{taken}");
        let worker = object(json!({"metadata": {"name": "e"}}));
        assert!(matches!(may_take_over("e", "me", &worker), Err(RegisterError::NotEdge(_))));
    }

    #[test]
    fn who_comes_back_though_another_has_taken_over_is_one_of_two() {
        let written = |agents: Agents| {
            let annotations = annotations(1, agents);
            parse_agents(annotations[AGENTS_ANNOTATION].as_str().unwrap()).unwrap()
        };
        let first = written(Agents::default().followed_by(1));
        assert_eq!(first, Agents { who: 1, ..Agents::default() });
        assert!(!first.have_ousted(1) && !first.have_ousted(2));
        let second = written(first.followed_by(u64::MAX));
        assert!(second.have_ousted(1), "it comes again");
        assert!(!second.have_ousted(u64::MAX) && !second.have_ousted(3), "another start of whichever");
        assert_eq!(written(second.followed_by(u64::MAX)), second, "it comes back to another replica");
        let third = written(second.followed_by(3));
        assert!(third.have_ousted(1) && third.have_ousted(u64::MAX) && !third.have_ousted(3), "of three, both others");
        let turned = written(third.followed_by(1));
        assert_eq!(turned, Agents { who: 1, ousted: [3, u64::MAX, 0, 0] }, "one of them, when the last is gone");
        let many = (10..16).fold(turned, |agents, who| written(agents.followed_by(who)));
        assert_eq!(many, Agents { who: 15, ousted: [14, 13, 12, 11] });
        assert_eq!(parse_agents("1,0"), Some(first), "as it was written before there were more");
        assert_eq!((parse_agents(""), parse_agents("1,x")), (None, None));
    }

    #[test]
    fn an_epoch_that_cannot_have_been_says_nothing() {
        let marked = |epoch: String| {
            let node = json!({"metadata": {"name": "e", "annotations": {EPOCH_ANNOTATION: epoch}}});
            epoch_of(&serde_json::from_value(node).unwrap())
        };
        assert_eq!(marked("1800000000000".to_owned()), Some(1_800_000_000_000));
        for written in [(1_u64 << 62).to_string(), u64::MAX.to_string(), "-1".to_owned(), "soon".to_owned()] {
            assert_eq!(marked(written), None);
        }
    }
}
