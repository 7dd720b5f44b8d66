//! One edge node and its cloud, all of it real, and between the two a relay that counts.

use std::path::Path;

use anyhow::Result;
use skerry_tests::cloudcore::Cloudcore;
use skerry_tests::controlplane::ControlPlane;
use skerry_tests::edge::Edge;
use skerry_tests::kubectl::{Kubectl, is_ready};
use skerry_tests::relay::Relay;
use skerry_tests::runtime::{Cni, Runtime};

/// What the node is called.
pub(crate) const NODE: &str = "edge";

pub(crate) struct Bed {
    pub(crate) edge: Edge,
    pub(crate) relay: Relay,
    pub(crate) cloud: Cloudcore,
    pub(crate) kubectl: Kubectl,
    pub(crate) runtime: Runtime,
    pub(crate) control: ControlPlane,
}

impl Bed {
    /// Starts it, with these keys of edgecore's configuration set, and waits until the node is ready.
    pub(crate) fn start(dir: &Path, settings: &[(&str, &str)]) -> Result<Self> {
        eprintln!("starting a control plane, cloudcore and an edge node");
        let control = ControlPlane::start(&dir.join("control"))?;
        let runtime = Runtime::start(&dir.join("runtime"), Cni::Ours)?;
        let cloud = Cloudcore::start(&control, &dir.join("cloudcore"), None)?;
        let relay = Relay::start(cloud.address())?;
        let mut edge = Edge::new(&dir.join("edge"), NODE, &runtime)?;
        edge.join(&relay.address().to_string(), &cloud.new_token(&[])?.token)?;
        for (key, value) in settings {
            edge.configure(key, value)?;
        }
        edge.start()?;
        let kubectl = control.kubectl().clone();
        kubectl.wait("node", NODE, "Ready", 60, is_ready)?;
        Ok(Self { edge, relay, cloud, kubectl, runtime, control })
    }
}
