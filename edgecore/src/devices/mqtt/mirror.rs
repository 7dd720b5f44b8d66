//! What the broker's side was told of each device, and so what it is still to be told: retained plain values and states, and KubeEdge's
//! documents, deltas and membership.
//!
//! State, not a log: a change only says that a device is to be looked at. What is published is the difference between what it is then and
//! what was published last, so a value that changes faster than [`PACE`] shows the newest, and whatever is missed is made up for. A value
//! read again that is the same publishes nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use super::message::Head;
use super::outbox::Event;
use super::topic;
use crate::devices::{Property, State, Twin, Value, Wanted};

/// Between two looks at a device. The first change is published at once, those that follow together.
pub(super) const PACE: Duration = Duration::from_secs(1);
/// The longest value that is kept to be the `last` of a document, in bytes; of a longer one only what tells it from another.
const MAX_LAST: usize = 256;

/// All devices, as published.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    known: HashMap<Arc<str>, Known>,
    /// Devices that are to be looked at, by when, and when each is.
    due: BTreeSet<(Duration, Arc<str>)>,
    waiting: HashSet<Arc<str>>,
    seed: u64,
    events: u64,
}

#[derive(Debug, Default)]
struct Known {
    looked: Option<Duration>,
    /// Whether the broker may know nothing of it.
    is_stale: bool,
    state: State,
    properties: BTreeMap<String, Seen>,
}

/// A property's values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    desired: Option<SeenValue>,
    reported: Option<SeenValue>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct SeenValue {
    /// None if it is long.
    text: Option<Box<str>>,
    hash: u64,
    at: i64,
}

/// What is to be published of a device.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    /// QoS 0, retained.
    pub(super) retained: Vec<Event>,
    /// QoS 1.
    pub(super) events: Vec<Event>,
}

impl Mirror {
    /// The seed makes the `event_id`s unlike those of others.
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// A session with a broker begins, which may know nothing; or changes were missed. These are the devices there are.
    pub(super) fn all(&mut self, keys: impl IntoIterator<Item = Arc<str>>, is_new_session: bool, now: Duration) {
        let gone: Vec<_> = self.known.keys().cloned().collect();
        for key in keys {
            if is_new_session {
                // The list that is published then names it.
                self.known.entry(Arc::clone(&key)).or_default().is_stale = true;
            }
            self.touch(&key, now);
        }
        for key in gone {
            self.touch(&key, now);
        }
    }

    /// A device is to be looked at.
    pub(super) fn touch(&mut self, key: &Arc<str>, now: Duration) {
        if self.waiting.insert(Arc::clone(key)) {
            let looked = self.known.get(key).and_then(|known| known.looked);
            self.due.insert((looked.map_or(now, |looked| now.max(looked + PACE)), Arc::clone(key)));
        }
    }

    /// When the next look is due.
    pub(super) fn next_due(&self) -> Option<Duration> {
        self.due.first().map(|(due, _)| *due)
    }

    /// The next device whose look is due.
    pub(super) fn take(&mut self, now: Duration) -> Option<Arc<str>> {
        if self.next_due()? > now {
            return None;
        }
        let (_, key) = self.due.pop_first()?;
        self.waiting.remove(&key);
        Some(key)
    }

    /// What there is to say of a device, which then is as published.
    pub(super) fn look(&mut self, key: &Arc<str>, twin: Option<&Twin>, node: &str, now: Duration, wall: i64) -> News {
        let mut news = News::default();
        let known = self.known.remove(key);
        let Some(twin) = twin else {
            let Some(known) = known else { return news };
            news.retained.push(cleared(topic::state(key)));
            let published = known.properties.iter().filter(|(_, seen)| seen.reported.is_some());
            news.retained.extend(published.map(|(name, _)| cleared(topic::value(key, name))));
            let payload = self.head(wall, |head| head.removed(key));
            news.events.push(Event { topic: topic::membership(node, "updated"), payload });
            return news;
        };
        let is_new = known.is_none();
        let mut known = known.unwrap_or_default();
        let is_stale = std::mem::take(&mut known.is_stale);
        if is_new {
            let payload = self.head(wall, |head| head.added(twin));
            news.events.push(Event { topic: topic::membership(node, "updated"), payload });
        }
        if is_new || is_stale || known.state != twin.state {
            known.state = twin.state;
            news.retained.push(Event { topic: topic::state(key), payload: twin.state.as_str().into() });
        }
        let (mut changed, mut before) = (Vec::new(), std::mem::take(&mut known.properties));
        for property in &twin.properties {
            let last = before.remove(&property.name);
            let seen = Seen::of(property);
            let (old_desired, old_reported) =
                last.as_ref().map_or((None, None), |last| (last.desired.as_ref(), last.reported.as_ref()));
            let reported_differs = !alike(old_reported, seen.reported.as_ref());
            match &property.reported {
                Some(value) if is_stale || reported_differs => {
                    let payload = value.value.clone().into_bytes();
                    news.retained.push(Event { topic: topic::value(key, &property.name), payload });
                }
                None if old_reported.is_some() => news.retained.push(cleared(topic::value(key, &property.name))),
                _ => {}
            }
            if reported_differs || !alike(old_desired, seen.desired.as_ref()) {
                changed.push((last.map(|last| last.property(property)), property));
            }
            known.properties.insert(property.name.clone(), seen);
        }
        let gone = before.into_iter().filter(|(_, seen)| seen.reported.is_some());
        news.retained.extend(gone.map(|(name, _)| cleared(topic::value(key, &name))));
        if !changed.is_empty() {
            let changes = changed.iter().map(|(last, current)| (last.as_ref(), *current));
            let payload = self.head(wall, |head| head.document(changes));
            news.events.push(Event { topic: topic::device(key, "twin/update/document"), payload });
        }
        if (is_stale || !changed.is_empty())
            && let Some(payload) = self.head(wall, |head| head.delta(twin))
        {
            news.events.push(Event { topic: topic::device(key, "twin/update/delta"), payload });
        }
        known.looked = Some(now);
        self.known.insert(Arc::clone(key), known);
        news
    }

    /// The list of all devices, as it is published when a session begins.
    pub(super) fn list(&mut self, twins: &[Twin], node: &str, wall: i64) -> Event {
        let payload = self.head(wall, |head| head.devices(twins));
        Event { topic: topic::membership(node, "detail"), payload }
    }

    fn head<T>(&mut self, now: i64, say: impl FnOnce(Head<'_>) -> T) -> T {
        self.events += 1;
        say(Head { event_id: &format!("{:016x}-{}", self.seed, self.events), now })
    }
}

/// An empty retained message takes away the one before.
fn cleared(topic: String) -> Event {
    Event { topic, payload: Vec::new() }
}

/// Whether two values are the same but for their time.
fn alike(one: Option<&SeenValue>, other: Option<&SeenValue>) -> bool {
    one.map(|value| value.hash) == other.map(|value| value.hash)
}

impl Seen {
    fn of(property: &Property) -> Self {
        let of = |text: &str, at| {
            let mut hasher = DefaultHasher::new();
            text.hash(&mut hasher);
            SeenValue { text: (text.len() <= MAX_LAST).then(|| text.into()), hash: hasher.finish(), at }
        };
        Self {
            desired: property.desired.as_ref().map(|wanted| of(&wanted.value, wanted.timestamp)),
            reported: property.reported.as_ref().map(|value| of(&value.value, value.timestamp)),
        }
    }

    /// As it was, for a document.
    fn property(&self, now: &Property) -> Property {
        let known = |value: &SeenValue| Some((value.text.as_deref()?.to_owned(), value.at));
        let wanted = |(value, timestamp)| Wanted { value, timestamp, ..Wanted::default() };
        let reported = |(value, timestamp)| Value { value, timestamp, ..Value::default() };
        Property {
            name: now.name.clone(),
            kind: now.kind.clone(),
            desired: self.desired.as_ref().and_then(known).map(wanted),
            reported: self.reported.as_ref().and_then(known).map(reported),
            ..Property::default()
        }
    }
}

#[cfg(test)]
mod tests;
