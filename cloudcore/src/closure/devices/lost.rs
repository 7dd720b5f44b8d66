//! Devices that go on showing a state although nobody hears of them.

use std::sync::Arc;

use super::Place;
use crate::closure::Closures;

/// What a Device shows of which nothing is known.
pub(crate) const UNKNOWN: &str = "unknown";
/// Devices of one node that are named at once.
const OF_A_NODE: usize = 2;
/// Devices that are named at once.
const AT_ONCE: usize = 10;

/// A device that shows a state which nobody vouches for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unheard {
    /// `namespace/name`.
    pub(crate) key: Arc<str>,
    /// metadata.uid
    pub(crate) uid: String,
    /// Why not.
    pub(crate) why: String,
}

impl Closures {
    /// Some of the devices whose node is lost, or that no edge node has any more. They are named until they show another state.
    pub(crate) fn unheard(&self) -> Vec<Unheard> {
        let shows = |key: &&Arc<str>| match self.devices.devices.get(*key).map(|device| &device.place) {
            Some(Place::Held(held)) => is_known(&held.state),
            place => place.is_some() && self.devices.left.contains(*key),
        };
        let named = |key: &Arc<str>, why: String| {
            let uid = self.devices.devices.get(key).map(|device| device.uid.clone()).unwrap_or_default();
            Unheard { key: key.clone(), uid, why }
        };
        let left =
            self.devices.left.iter().filter(shows).map(|key| named(key, "no edge node has it any more".to_owned()));
        let lost = self.nodes.iter().filter(|(name, node)| node.lost && !self.subscribers.any(name));
        let of_lost = lost.flat_map(|(name, _)| {
            let keys = self.devices.keys(name).filter(shows).take(OF_A_NODE);
            keys.map(move |key| named(key, format!("nothing is heard of its node {name}")))
        });
        left.chain(of_lost).take(AT_ONCE).collect()
    }

    /// A device shows from now on that nothing is known of it, or cannot be made to.
    pub(crate) fn marked_unheard(&mut self, device: &Unheard) {
        self.devices.left.remove(&device.key);
        let known = self.devices.devices.get_mut(&device.key).filter(|known| known.uid == device.uid);
        if let Some(Place::Held(held)) = known.map(|known| &mut known.place) {
            UNKNOWN.clone_into(&mut held.state);
        }
    }

    /// UIDs of a node's devices that show that nothing is known of them.
    pub(crate) fn unknown_devices(&self, node: &str) -> Vec<String> {
        let of = |key: &Arc<str>| {
            let device = self.devices.devices.get(key)?;
            matches!(&device.place, Place::Held(held) if held.state == UNKNOWN).then(|| device.uid.clone())
        };
        self.devices.keys(node).filter_map(of).collect()
    }
}

/// Whether it says that something is known.
pub(super) fn is_known(state: &str) -> bool {
    !state.is_empty() && state != UNKNOWN
}
