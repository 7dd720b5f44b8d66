//! What is answered to whom: KubeEdge's requests over MQTT, carried out on the twins.
//!
//! An update is taken whole or not at all: what is wrong with it is said in the result, and nothing of it is done. `expected` is a write at
//! the box of what should be; `actual` is what a device that speaks MQTT itself has measured. While a device has a mapper that is connected, what
//! it is is the mapper's word.

use std::sync::Arc;

use skerry_proto::dmi;
use tracing::debug;

use super::message::{self, Ask, Failure, Head};
use super::outbox::Event;
use super::topic::{self, Asked, Id};
use crate::devices::{Devices, Property, Refused, Twin, WriteError};

/// Who writes, where it is somebody over MQTT.
const ORIGIN: &str = "mqtt";

/// Answers a request: `payload` or its size if it was too long to be kept. `None` if the topic asks for nothing. And whether it was refused.
pub(super) async fn answer(
    devices: &Devices,
    node: &str,
    topic: &str,
    payload: Result<&[u8], usize>,
    now: i64,
) -> Option<(Event, bool)> {
    let asked = topic::parse(topic, node)?;
    let ask = payload.map_err(message::too_long).and_then(message::read);
    let event_id = ask.as_ref().map(|ask| ask.event_id.clone()).unwrap_or_default();
    let head = Head { event_id: &event_id, now };
    let (topic, done) = match asked {
        Asked::TwinUpdate(id) => {
            let done = match ask {
                Ok(ask) => update(devices, id, ask, head).await,
                Err(failure) => Err(failure),
            };
            (topic::device(id.text(), "twin/update/result"), done)
        }
        Asked::TwinGet(id) => {
            let done = ask.and_then(|_| Ok(head.twin(&find(devices, id)?.properties)));
            (topic::device(id.text(), "twin/get/result"), done)
        }
        Asked::StateUpdate(id) => {
            (topic::device(id.text(), "state/update/result"), ask.and_then(|ask| state(devices, id, &ask, head)))
        }
        Asked::MembershipGet => (topic::membership(node, "get/result"), ask.map(|_| head.devices(&devices.all()))),
    };
    let is_refused = done.is_err();
    let payload = done.unwrap_or_else(|failure| {
        debug!(topic, code = failure.code, reason = failure.reason, "an MQTT request is refused");
        head.failure(&failure)
    });
    Some((Event { topic, payload }, is_refused))
}

fn find(devices: &Devices, id: Id<'_>) -> Result<Twin, Failure> {
    let missing = || Failure { code: 404, reason: format!("there is no device {} on this node", id.text()) };
    let name = match id {
        Id::Full(key) => return devices.twin(key).ok_or_else(missing),
        Id::Name(name) => name,
    };
    let is_so_called = |key: &Arc<str>| key.split_once('/').is_some_and(|(_, own)| own == name);
    let mut keys = devices.keys().into_iter().filter(is_so_called);
    match (keys.next(), keys.next()) {
        (Some(one), Some(other)) => {
            let reason = format!("{name} can be {one} or {other}; write the namespace into the topic, too");
            Err(Failure { code: 409, reason })
        }
        (key, _) => key.and_then(|key| devices.twin(&key)).ok_or_else(missing),
    }
}

async fn update(devices: &Devices, id: Id<'_>, ask: Ask, head: Head<'_>) -> Result<Vec<u8>, Failure> {
    let wishes = ask.twin.ok_or_else(|| Failure::bad("the payload has no `twin`".to_owned()))?;
    let twin = find(devices, id)?;
    let key = format!("{}/{}", twin.namespace, twin.name);
    let (mut desired, mut reported) = (Vec::new(), Vec::new());
    for (name, wish) in wishes {
        let shown: String = name.chars().take(128).collect();
        let Some(wish) = wish else {
            let reason = format!("{shown} cannot be deleted here; take it out of the Device in the cluster");
            return Err(Failure::bad(reason));
        };
        if !twin.properties.iter().any(|of| of.name == name) {
            let why = twin.message.as_deref().unwrap_or("properties are those of the Device");
            return Err(Failure::bad(format!("there is no property {shown:?}; {why}")));
        }
        if let Some(said) = wish.expected {
            let value = said.value.ok_or_else(|| Failure::bad(format!("`expected` of {shown} has no `value`")))?;
            devices.check(&key, &name, &value, true)?;
            desired.push((name.clone(), value));
        }
        if let Some(said) = wish.actual {
            let value = said.value.ok_or_else(|| Failure::bad(format!("`actual` of {shown} has no `value`")))?;
            devices.check(&key, &name, &value, false)?;
            let at = said.metadata.and_then(|stamp| stamp.timestamp).unwrap_or(head.now);
            let metadata = [("timestamp".to_owned(), at.to_string())].into_iter().collect();
            let value = Some(dmi::TwinProperty { value, metadata });
            reported.push(dmi::Twin { property_name: name, reported: value, observed_desired: None });
        }
    }
    if !reported.is_empty() {
        devices.said(&key, &reported)?;
    }
    for (name, value) in &desired {
        devices.write(&key, name, value, ORIGIN).await?;
    }
    // As it is now: of each property what was asked to change.
    let has = |list: &[String], of: &Property| list.contains(&of.name);
    let desired: Vec<String> = desired.into_iter().map(|(name, _)| name).collect();
    let reported: Vec<String> = reported.into_iter().map(|said| said.property_name).collect();
    let mut now = devices.twin(&key).unwrap_or(twin).properties;
    now.retain(|of| has(&desired, of) || has(&reported, of));
    for of in &mut now {
        if !has(&desired, of) {
            of.desired = None;
        }
        if !has(&reported, of) {
            of.reported = None;
        }
    }
    Ok(head.twin(&now))
}

fn state(devices: &Devices, id: Id<'_>, ask: &Ask, head: Head<'_>) -> Result<Vec<u8>, Failure> {
    let state = ask.state.as_ref().ok_or_else(|| Failure::bad("the payload has no `state`".to_owned()))?;
    let twin = find(devices, id)?;
    let key = format!("{}/{}", twin.namespace, twin.name);
    devices.said_state(&key, state)?;
    Ok(head.state(&devices.twin(&key).unwrap_or(twin)))
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        let code = match refused {
            Refused::NoDevice => 404,
            Refused::NotYours => {
                let reason =
                    "what the device is, its mapper says, and that is connected; `expected` says what it should be";
                return Self::bad(reason.to_owned());
            }
            Refused::NoProperty(_) | Refused::Value(_) => 400,
        };
        Self { code, reason: refused.to_string() }
    }
}

impl From<WriteError> for Failure {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Refused(refused) => refused.into(),
            WriteError::NotKept(_) => Self { code: 500, reason: error.to_string() },
        }
    }
}

#[cfg(test)]
mod tests;
