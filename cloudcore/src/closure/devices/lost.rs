//! Devices that go on showing a state although nobody hears of them.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Device, Place};
use crate::closure::Closures;

/// What a Device shows of which nothing is known.
pub(crate) const UNKNOWN: &str = "unknown";
/// Devices of one node that are named at once.
const OF_A_NODE: usize = 2;
/// Devices that are named at once, of lost nodes and of those that are gone each.
const AT_ONCE: usize = 5;
/// How many times in a row a node has to be found lost: one whose session is at another replica says within seconds that it is there.
pub(super) const ROUNDS: u8 = 10;

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
    /// Some of the devices whose node is lost, or that no edge node has any more, but those that are put off. They are named until they show
    /// another state.
    pub(crate) fn unheard(&mut self, put_off: &HashSet<String>) -> Vec<Unheard> {
        for (name, node) in &mut self.nodes {
            let is_lost = node.lost && !self.subscribers.any(name);
            node.lost_rounds = if is_lost { node.lost_rounds.saturating_add(1) } else { 0 };
        }
        let devices = &self.devices;
        let named = |key: &Arc<str>, why: &dyn Fn() -> String| {
            let device = devices.devices.get(key).filter(|device| !put_off.contains(&device.uid))?;
            let is_left = !matches!(device.place, Place::Held(_)) && devices.left.contains(key);
            (device.is_known() || is_left).then(|| Unheard { key: key.clone(), uid: device.uid.clone(), why: why() })
        };
        let why = || "no edge node has it any more".to_owned();
        let left = devices.left.iter().filter_map(|key| named(key, &why)).take(AT_ONCE);
        let lost = self.nodes.iter().filter(|(_, node)| node.lost_rounds >= ROUNDS);
        let of_lost = lost.filter(|(name, _)| devices.nodes.get(*name).is_some_and(|on| on.known > 0));
        let of_lost = of_lost.flat_map(|(name, _)| {
            let why = move || format!("nothing is heard of its node {name}");
            devices.keys(name).filter_map(move |key| named(key, &why)).take(OF_A_NODE)
        });
        left.chain(of_lost.take(AT_ONCE)).collect()
    }

    /// A device shows from now on that nothing is known of it, or cannot be made to.
    pub(crate) fn marked_unheard(&mut self, device: &Unheard) {
        self.devices.left.remove(&device.key);
        let Some(known) = self.devices.devices.get_mut(&device.key).filter(|known| known.uid == device.uid) else {
            return;
        };
        let was_known = known.is_known();
        if let Place::Held(held) = &mut known.place {
            UNKNOWN.clone_into(&mut held.state);
        }
        if was_known && let Some(on) = self.devices.nodes.get_mut(&known.node) {
            on.known -= 1;
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

impl Device {
    /// Whether it is held and shows that something is known of it.
    pub(super) fn is_known(&self) -> bool {
        matches!(&self.place, Place::Held(held) if is_known(&held.state))
    }
}

/// Whether it says that something is known.
pub(super) fn is_known(state: &str) -> bool {
    !state.is_empty() && state != UNKNOWN
}
