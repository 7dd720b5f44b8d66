//! What tests put into the cluster of `$KUBECONFIG`: it carries [`LABEL`], is found by it, and removed after the run or, if that was killed,
//! before the next one. What does not carry it is somebody else's and stays, a Skerry that was there before among it.
//!
//! It does not tell runs apart: there is one at a time in a cluster, for their namespaces are called the same. What scripts/quickstart puts
//! there is none of its business: `testbed down` knows it.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::cloudcore::{self, CRDS, NAMESPACE};
use crate::controlplane::theirs;
use crate::kubectl::Kubectl;
use crate::wait::until;

/// Is on what tests make outside of namespaces, on the namespaces of stories, and on cloudcore's if it was not there before.
pub const LABEL: &str = "skerry.test/made";
/// Its value, but on cloudcore's namespace.
const STORY: &str = "story";
/// There.
const SKERRY: &str = "skerry";
/// There, if the CRDs of devices were not there before either.
const SKERRY_AND_CRDS: &str = "skerry-and-crds";

/// Nodes that stories join as by a bare client, of machines called `machine-…`. They are never Ready, and where most nodes are not,
/// controllers hold back: a story that waits for a taint would wait for ever.
pub const VISITORS: [&str; 10] = [
    "first-one",
    "hostile",
    "liar-quic",
    "liar-websocket",
    "short-lived",
    "slow-quic-1",
    "slow-quic-2",
    "slow-websocket-1",
    "slow-websocket-2",
    "too-early",
];
/// What a Node says of its machine.
const MACHINE_ANNOTATION: &str = "skerry.dev/machine-id";

/// The labels of what a story makes.
pub fn marks() -> Value {
    json!({ LABEL: STORY })
}

/// The labels of cloudcore's namespace where tests bring it; `crds`: and cloudcore the CRDs of devices.
pub fn marks_of_skerry(crds: bool) -> Value {
    let value = if crds { SKERRY_AND_CRDS } else { SKERRY };
    json!({ LABEL: value })
}

/// Marks a Node that has joined, in somebody else's cluster.
pub fn mark_node(kubectl: &Kubectl, name: &str) -> Result<()> {
    if theirs().is_none() {
        return Ok(());
    }
    kubectl.run(&["label", "node", name, &format!("{LABEL}={STORY}")]).map(drop)
}

/// Deletes the Nodes of [`VISITORS`], and nobody's that is called the same.
pub fn see_off(kubectl: &Kubectl) -> Result<()> {
    remove_nodes(kubectl, is_visitor)
}

/// Removes all that tests put there, and waits until it is gone.
pub fn clean(kubectl: &Kubectl) -> Result<()> {
    let marked = format!("{LABEL}={STORY}");
    remove_nodes(kubectl, |node| node["metadata"]["labels"][LABEL] == STORY || is_visitor(node))?;
    kubectl.in_namespace("kube-node-lease").run(&["delete", "leases", "-l", &marked, "--wait=false"])?;
    kubectl.run(&["delete", "clusterroles,clusterrolebindings", "-l", &marked, "--wait=false"])?;
    kubectl.run(&["delete", "namespaces", "-l", &marked, "--wait=false"])?;
    let left = || kubectl.list("namespaces", &marked);
    for namespace in left()?.iter().filter_map(name) {
        // Nobody is there any more who would say that they have ended.
        let pods = ["delete", "pods", "--all", "--force", "--grace-period=0", "--wait=false"];
        kubectl.in_namespace(namespace).run(&pods)?;
    }
    until("the namespaces of tests to be gone", 180, || Ok(left()?.is_empty()))
        .with_context(|| format!("`kubectl get namespaces -l {marked} -o yaml` says what holds them"))?;
    remove_skerry(kubectl)
}

/// Removes cloudcore's namespace, rights and CRDs, if tests brought them. The namespace says so: it goes last.
fn remove_skerry(kubectl: &Kubectl) -> Result<()> {
    let namespace = kubectl.find("namespace", NAMESPACE)?.unwrap_or_default();
    let Some(mark) = namespace["metadata"]["labels"][LABEL].as_str() else { return Ok(()) };
    if mark == SKERRY_AND_CRDS && cloudcore::remove_crds(kubectl, "")? {
        for crd in CRDS {
            kubectl.wait_gone("crd", crd, 60)?;
        }
    }
    cloudcore::remove_rights(kubectl)?;
    kubectl.wait_gone("namespace", NAMESPACE, 120)
}

fn remove_nodes(kubectl: &Kubectl, which: impl Fn(&Value) -> bool) -> Result<()> {
    let nodes = kubectl.list("nodes", "")?;
    let names: Vec<&str> = nodes.iter().filter(|node| which(node)).filter_map(name).collect();
    if names.is_empty() {
        return Ok(());
    }
    kubectl.run(&[&["delete", "node", "--ignore-not-found", "--wait=false"], &names[..]].concat()).map(drop)
}

fn is_visitor(node: &Value) -> bool {
    let machine = node["metadata"]["annotations"][MACHINE_ANNOTATION].as_str();
    name(node).is_some_and(|name| VISITORS.contains(&name))
        && machine.is_some_and(|machine| machine.starts_with("machine-"))
}

fn name(object: &Value) -> Option<&str> {
    object["metadata"]["name"].as_str()
}
