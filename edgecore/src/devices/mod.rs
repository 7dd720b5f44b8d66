//! Devices: their twins, the mappers that reach them, and what they say.
//!
//! [`Devices`] is the handle that everything else has: it reads twins, writes what properties should be, calls methods and tells what changes,
//! with or without a cloud. The decisions are [`twin`]'s, which does no IO. Mappers speak the device mapper interface ([`dmi`]); people and
//! the cloud speak HTTP ([`http`]). What the cloud wants comes from the store, what is to be known over a restart goes into it as notes, and
//! statuses go up as reports; values go nowhere but to whoever asks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, broadcast, watch};

use self::twin::{Now, Twins};
use crate::clock;
use crate::store::Store;

pub(crate) mod convert;
pub(crate) mod dmi;
#[cfg(test)]
mod fuzz;
pub(crate) mod http;
mod methods;
pub mod mqtt;
mod serve;
#[cfg(test)]
mod tests;
pub(crate) mod twin;

pub use self::methods::CallError;
pub use self::serve::{Parts, run};
pub use self::twin::{Change, Property, Refused, State, Twin, Value, Wanted};

/// Changes that a subscriber may lag behind; it is told how many it missed.
const CHANGES: usize = 1024;

/// All devices of this node; a clone is a handle.
///
/// Devices are named by their key, `namespace/name`. Nothing here waits for the cloud, or for a mapper, unless it says so.
#[derive(Clone, Debug)]
pub struct Devices(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    store: Store,
    twins: Mutex<Twins>,
    changes: broadcast::Sender<Change>,
    /// Notes, reports and the like are to be dealt with.
    work: Notify,
    /// Counts up when there may be something to call mappers for.
    calls: watch::Sender<u64>,
    links: dmi::Links,
    /// Held while notes are written.
    keeping: tokio::sync::Mutex<()>,
}

/// Why a write did not happen, or will not last.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// It cannot be.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It is in force, but would not be after a restart.
    #[error("the value is written, but it would be forgotten at a restart: {0}")]
    NotKept(#[source] crate::store::Error),
}

impl Devices {
    /// None yet: [`run`] fills it from the store.
    pub fn new(store: Store) -> Self {
        Self(Arc::new(Shared {
            store,
            twins: Mutex::default(),
            changes: broadcast::channel(CHANGES).0,
            work: Notify::new(),
            calls: watch::channel(0).0,
            links: dmi::Links::default(),
            keeping: tokio::sync::Mutex::default(),
        }))
    }

    /// Writes what a property should be, by `origin`, such as `mqtt` or `cli`: in force at once, and durable when this returns. The mapper is
    /// told after that, also of what was wanted already: the device may have come to be otherwise.
    ///
    /// The cloud's value is set aside until the cloud writes another one; see `devices/twin/desired.rs` for who wins.
    pub async fn write(&self, device: &str, property: &str, value: &str, origin: &str) -> Result<(), WriteError> {
        self.with(|twins, now| twins.write(device, property, value, origin, now))?;
        self.called_for();
        self.keep().await.map_err(WriteError::NotKept)
    }

    /// A device as it is and as it should be.
    pub fn twin(&self, device: &str) -> Option<Twin> {
        self.with(|twins, now| twins.twin(device, now))
    }

    /// The last values of a property, each with its time in milliseconds since the Unix epoch, from the oldest to the newest.
    pub fn history(&self, device: &str, property: &str) -> Result<Vec<(i64, String)>, Refused> {
        self.with(|twins, _| twins.history(device, property))
    }

    /// What changes from now on: values as they are read, what is wanted, states, devices that come and go. A subscriber that falls behind
    /// loses the oldest and is told how many (`RecvError::Lagged`); the twins say what is.
    pub fn subscribe(&self) -> broadcast::Receiver<Change> {
        self.0.changes.subscribe()
    }

    /// Does something with the twins, and tells subscribers what came of it.
    fn with<T>(&self, act: impl FnOnce(&mut Twins, Now) -> T) -> T {
        let now = now();
        let (done, changes) = {
            let mut twins = self.lock();
            twins.watch(self.0.changes.receiver_count() > 0);
            (act(&mut twins, now), twins.take_changes())
        };
        for change in changes {
            // Nobody listening is fine.
            let _ = self.0.changes.send(change);
        }
        done
    }

    fn lock(&self) -> MutexGuard<'_, Twins> {
        // After a panic everything is read anew.
        self.0.twins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There may be something to call mappers for.
    fn called_for(&self) {
        self.0.calls.send_modify(|count| *count = count.wrapping_add(1));
    }
}

fn now() -> Now {
    Now { mono: clock::monotonic(), wall: clock::wall().as_millisecond() }
}
