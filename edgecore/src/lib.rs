//! edgecore, the agent of an edge node: the link to cloudcore, the store that is its bus, and the kubelet.

pub mod clock;
pub mod kubelet;
pub mod store;
pub mod supervise;
