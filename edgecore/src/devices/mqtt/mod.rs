//! Devices over MQTT, for programs and devices at the box: KubeEdge's topics, `$hw/events/…`, and a plain retained topic per value,
//! `devices/<namespace>/<name>/<property>`.
//!
//! | topic | from | what |
//! |---|---|---|
//! | `$hw/events/device/<ns>/<name>/twin/update` | clients | `twin: {property: {expected, actual}}`; what should be, and what a device measured |
//! | `…/twin/update/result` | edgecore | the same as it is now, or `code` and `reason` |
//! | `…/twin/get`, `…/twin/get/result` | clients, edgecore | the whole twin |
//! | `…/twin/update/document` | edgecore | each property that changed, `last` and `current` |
//! | `…/twin/update/delta` | edgecore | what should be other than it is |
//! | `…/state/update`, `…/state/update/result` | clients, edgecore | the state of a device |
//! | `$hw/events/node/<node>/membership/get`, `…/get/result` | clients, edgecore | all devices |
//! | `…/membership/detail` | edgecore | the same, when a broker is connected |
//! | `…/membership/updated` | edgecore | a device that came or went |
//! | `devices/<ns>/<name>/<property>` | edgecore | the value, retained |
//! | `devices/<ns>/<name>/$state` | edgecore | the state, retained |
//!
//! A device may be named by its name alone, as in older releases of KubeEdge, while only one has it. Requests are answered one after the
//! other. Documents, deltas and plain values are published of a device at most once a second, the newest of each ([`mirror`]); requests are
//! answered always. What it does not do: carry messages of apps to the cloud, or attributes, which devices no longer have.
//!
//! Without a broker nothing else is affected, and nothing is kept for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skerry_proto::dmi;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use self::broker::Broker;
use self::mirror::Mirror;
use self::outbox::Outbox;
use self::session::Session;
use super::{Devices, Refused, Twin};
use crate::config::MqttBroker;
use crate::link::backoff::Backoff;
use crate::store::Store;

pub use self::broker::end_left;

mod access;
mod answer;
mod broker;
mod message;
mod mirror;
mod outbox;
mod session;
#[cfg(test)]
mod tests;
mod topic;

/// Name of the file of passwords in the data directory, in the format of `mosquitto_passwd`.
pub const PASSWORDS: &str = "mqtt-passwd";
/// Name of the access list in the data directory, as mosquitto's `acl_file` has it: the broker that edgecore starts has the same.
pub const ACCESS: &str = "mqtt-access";

/// How often a broker is looked for that nobody needs yet.
const NO_DEVICES: Duration = Duration::from_secs(60);

/// What the module is given.
#[derive(Clone, Debug)]
pub struct Parts {
    /// What it speaks of.
    pub devices: Devices,
    /// Where it reads who may write.
    pub store: Store,
    /// The node's name.
    pub node: String,
    /// Which broker.
    pub broker: MqttBroker,
    /// Where the passwords of clients are.
    pub data_dir: PathBuf,
    /// How it is.
    pub status: watch::Sender<Status>,
    /// Ends it.
    pub shutdown: CancellationToken,
}

/// How MQTT is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether a broker is connected.
    pub connected: bool,
    /// Where it is; or why there is none, and what to do about it.
    pub message: String,
    /// Whether it is edgecore's own, so that the access list is in force.
    #[serde(default)]
    pub is_own: bool,
    /// Whether one was looked for in vain that somebody needs.
    #[serde(skip)]
    pub is_missed: bool,
    /// Plain values and states published.
    pub published: u64,
    /// Requests answered.
    pub requests: u64,
    /// Of them refused.
    pub refused: u64,
    /// Results and events that no broker took, dropped.
    pub dropped: u64,
}

/// Until the shutdown.
pub async fn run(parts: Parts) {
    let at = match &parts.broker {
        MqttBroker::Auto => None,
        MqttBroker::At(address) => Some(address.clone()),
        MqttBroker::Off => {
            parts
                .status
                .send_modify(|status| "turned off (mqtt_broker in config.toml)".clone_into(&mut status.message));
            return;
        }
    };
    let broker = Broker::new(at, parts.store.clone(), &parts.data_dir);
    serve(parts, broker).await;
}

async fn serve(parts: Parts, mut broker: Broker) {
    let Parts { devices, node, status, shutdown, .. } = parts;
    let (mut mirror, mut outbox) = (Mirror::new(rand::random()), Outbox::default());
    let mut backoff = Backoff::new(Duration::from_millis(400), Duration::from_secs(3), rand::random());
    loop {
        let has_devices = devices.lock().len() > 0;
        let why = match broker.connect(has_devices).await {
            Ok((stream, place)) => {
                let (devices, node, is_own) = (&devices, node.as_str(), broker.is_own());
                let (mirror, outbox, status) = (&mut mirror, &mut outbox, &status);
                let mut session = Session { devices, node, place, is_own, mirror, outbox, status };
                let ended = tokio::select! {
                    ended = session.run(stream, &shutdown) => ended,
                    () = broker.follow() => Ok(()),
                };
                session.ended();
                if status.borrow().connected {
                    backoff.reset();
                }
                ended.err()
            }
            Err(why) => Some(why),
        };
        let is_news = why.as_ref().is_some_and(|why| *why != status.borrow().message);
        if let Some(why) = why {
            if is_news && has_devices {
                warn!(reason = why, "there is no MQTT for now; all else works");
            }
            status.send_modify(|status| {
                (status.connected, status.message) = (false, why);
                status.is_missed = has_devices || broker.is_named();
            });
        }
        tokio::select! {
            () = shutdown.cancelled() => break,
            () = pause(&devices, backoff.wait()) => {}
            // The list is for whoever has the broker, also before that can be used.
            () = broker.follow(), if has_devices => {}
        }
    }
    broker.end().await;
}

/// Waits before the next try: without devices until there is one, for a box that never has any is not to be woken for them.
async fn pause(devices: &Devices, wait: Duration) {
    let mut changes = devices.subscribe();
    let has_devices = devices.lock().len() > 0;
    if has_devices {
        tokio::time::sleep(wait).await;
    } else {
        drop(tokio::time::timeout(NO_DEVICES, changes.recv()).await);
    }
}

impl Devices {
    /// Whether somebody would miss a broker.
    pub(crate) fn need(&self, broker: &MqttBroker) -> bool {
        match broker {
            MqttBroker::Auto => self.lock().len() > 0,
            MqttBroker::At(_) => true,
            MqttBroker::Off => false,
        }
    }

    /// Keys of all devices.
    fn keys(&self) -> Vec<Arc<str>> {
        self.lock().names().0.into_iter().map(|(key, _)| key).collect()
    }

    /// All devices, without their properties.
    fn all(&self) -> Vec<Twin> {
        self.with(|twins, now| twins.page(0, usize::MAX, &super::twin::Filter::default(), false, now).0)
    }

    /// Whether a property could have a value, be it desired or reported.
    fn check(&self, device: &str, property: &str, value: &str, is_desired: bool) -> Result<(), Refused> {
        self.lock().check(device, property, value, is_desired)
    }

    /// What a device says of itself, without a mapper.
    fn said(&self, device: &str, said: &[dmi::Twin]) -> Result<(), Refused> {
        let taken = self.with(|twins, now| twins.report_values(device, &[], said, now));
        // It may be the first that is heard of any device: nobody looks at those before.
        self.0.work.notify_one();
        taken
    }

    /// The same of its state.
    fn said_state(&self, device: &str, state: &str) -> Result<(), Refused> {
        let taken = self.with(|twins, now| twins.report_state(device, &[], state, now));
        self.0.work.notify_one();
        taken
    }
}
