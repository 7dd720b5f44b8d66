//! Devices that speak MQTT: values come on topics, and are set by publishing to others.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use skerry_mapper::net::Address;
use skerry_mapper::net::mqtt::{Connect, Connection, Incoming, Publish};
use skerry_mapper::payload::Form;
use skerry_mapper::{
    Config, ConfigError, DeviceInfo, Driver, Fault, Kind, Link, Point, PropertyInfo, Reading, Sample, Value, clock,
};

/// How long a device may take to say what it was set to, each time it is looked at.
const ECHO: Duration = Duration::from_millis(300);
/// Readings that wait to be taken; then the oldest is dropped, for the newest is what matters.
const MOST: usize = 4096;

/// The protocol.
#[derive(Debug)]
pub struct Mqtt;

/// One property; who has it shares it.
#[derive(Clone, Debug)]
pub struct Topic(Arc<Route>);

#[derive(Debug)]
struct Route {
    /// Where its values come; may have wildcards.
    state: Option<String>,
    /// Where it is set.
    command: Option<String>,
    form: Form,
    qos: u8,
    retain: bool,
    kind: Kind,
}

/// A device's own connection to its broker.
#[derive(Debug)]
pub struct Device {
    connection: Connection,
    /// By index of the property.
    routes: Vec<(usize, Topic)>,
    waiting: VecDeque<Reading>,
    /// The latest of each property, by index.
    latest: Vec<(usize, Sample)>,
    keep_alive: Duration,
    next_ping: Duration,
    unanswered: bool,
}

impl Point for Topic {
    fn polled(&self) -> bool {
        false
    }

    fn verified(&self) -> bool {
        self.0.state.is_some()
    }
}

impl Driver for Mqtt {
    type Point = Topic;
    type Link = Device;

    fn protocol(&self) -> &'static str {
        "mqtt"
    }

    fn device_keys_of_visitors(&self) -> &'static [&'static str] {
        &["clientID", "username", "password", "keepAlive", "cleanSession"]
    }

    fn point(&self, property: &PropertyInfo<'_>, visitor: &Config) -> Result<Topic, ConfigError> {
        let (state, command) = (visitor.text("topic"), visitor.text("commandTopic"));
        if state.is_none() && command.is_none() {
            return Err(ConfigError("`topic` or `commandTopic` is missing from configData".to_owned()));
        }
        for (key, topic) in [("topic", &state), ("commandTopic", &command)] {
            if let Some(topic) = topic.as_ref().filter(|topic| topic.len() > 1024 || topic.contains('\0')) {
                return Err(ConfigError(format!("`{key}` has {} bytes or a NUL in it; 1024 is the most", topic.len())));
            }
        }
        if let Some(topic) = command.as_ref().filter(|topic| topic.contains(['#', '+'])) {
            return Err(ConfigError(format!("`commandTopic` is {topic:?}, but cannot have wildcards")));
        }
        Ok(Topic(Arc::new(Route {
            state,
            command,
            form: Form::new(visitor)?,
            qos: visitor.integer("qos", 0, 2)?.and_then(|qos| u8::try_from(qos).ok()).unwrap_or(0),
            retain: visitor.flag("retain")?,
            kind: property.kind,
        })))
    }

    async fn connect(&self, device: &DeviceInfo<'_>) -> Result<Device, Fault> {
        let wrong = |error: ConfigError| Fault::Refused(error.to_string());
        let config = device.config;
        let url = match config.text("brokerURL").or_else(|| config.text("url")) {
            Some(url) => url,
            None => {
                let ip = config.required("ip").map_err(|_| {
                    Fault::Refused("`brokerURL`, or `ip` and `port`, is missing from configData".to_owned())
                })?;
                format!("tcp://{ip}:{}", config.integer("port", 1, 65_535).map_err(wrong)?.unwrap_or(1883))
            }
        };
        let address = Address::parse(&url, 1883).map_err(Fault::Refused)?;
        let keep_alive = config.integer("keepAlive", 1, 65_535).map_err(wrong)?.unwrap_or(60);
        let clean = config.raw("cleanSession").is_none() || config.flag("cleanSession").map_err(wrong)?;
        // Two of one name would throw each other out for ever.
        let client_id = config.text("clientID").unwrap_or_else(|| format!("skerry-{:016x}", rand::random::<u64>()));
        let (user, password) = (config.text("username"), config.text("password"));
        let connect = Connect {
            client_id: &client_id,
            user: user.as_deref().or(address.user.as_deref()),
            password: password.as_deref().or(address.password.as_deref()),
            keep_alive: u16::try_from(keep_alive).unwrap_or(60),
            clean,
        };
        let keep_alive = Duration::from_secs(keep_alive.unsigned_abs());
        Ok(Device {
            connection: Connection::open(&address, &connect).await.map_err(Fault::Offline)?,
            routes: Vec::new(),
            waiting: VecDeque::new(),
            latest: Vec::new(),
            keep_alive,
            next_ping: clock::monotonic() + keep_alive / 2,
            unanswered: false,
        })
    }
}

impl Link for Device {
    type Point = Topic;

    async fn subscribe(&mut self, points: &[(usize, &Topic)]) -> Result<(), Fault> {
        let wanted: Vec<(usize, Topic)> = points.iter().map(|(index, topic)| (*index, (*topic).clone())).collect();
        let topics = |routes: &[(usize, Topic)]| -> Vec<(String, u8)> {
            let mut topics: Vec<(String, u8)> =
                routes.iter().filter_map(|(_, topic)| Some((topic.0.state.clone()?, topic.0.qos))).collect();
            topics.sort_unstable();
            // Of two properties on one topic, the higher QoS.
            topics.dedup_by(|later, earlier| {
                later.0 == earlier.0 && {
                    earlier.1 = earlier.1.max(later.1);
                    true
                }
            });
            topics
        };
        let (before, after) = (topics(&self.routes), topics(&wanted));
        for (topic, _) in before.iter().filter(|(topic, _)| !after.iter().any(|(kept, _)| kept == topic)) {
            self.connection.queue_unsubscribe(topic);
        }
        for (topic, qos) in after.iter().filter(|topic| !before.contains(topic)) {
            self.connection.queue_subscribe(topic, *qos);
        }
        self.routes = wanted;
        self.latest = Vec::with_capacity(self.routes.len());
        self.waiting.clear();
        self.connection.flush().await.map_err(Fault::Offline)
    }

    /// What came last; if nothing did yet, it is waited for.
    async fn read(&mut self, points: &[(usize, &Topic)], readings: &mut Vec<Reading>) -> Result<(), Fault> {
        let deadline = clock::monotonic() + ECHO;
        let wanted = points.first().map(|(index, _)| *index);
        loop {
            let left = deadline.saturating_sub(clock::monotonic());
            match tokio::time::timeout(left, self.pump()).await {
                Err(_) => break,
                Ok(outcome) => outcome?,
            }
            if self.waiting.iter().any(|reading| Some(reading.point) == wanted) {
                break;
            }
        }
        for (index, _) in points {
            readings.push(match self.latest.iter().find(|(of, _)| of == index) {
                Some((_, sample)) => Reading { point: *index, outcome: Ok(sample.clone()) },
                None => Reading::failed(*index, "nothing was published to its topic yet"),
            });
        }
        Ok(())
    }

    async fn write(&mut self, Topic(point): &Topic, value: &Value) -> Result<(), Fault> {
        let topic = point
            .command
            .as_ref()
            .ok_or_else(|| Fault::Refused("`commandTopic` is missing from configData".to_owned()))?;
        let payload = point.form.compose(value, point.kind);
        let publish = Publish { topic, payload: &payload, qos: point.qos, retain: point.retain };
        // What is read back has to be newer.
        self.latest.clear();
        self.waiting.retain(|reading| reading.outcome.is_ok());
        self.connection.queue_publish(&publish);
        self.connection.flush().await.map_err(Fault::Offline)
    }

    async fn changes(&mut self, readings: &mut Vec<Reading>) -> Result<(), Fault> {
        while self.waiting.is_empty() {
            self.pump().await?;
        }
        // Most devices rest most of the time.
        readings.extend(std::mem::take(&mut self.waiting));
        Ok(())
    }
}

impl Device {
    /// Takes the next message, or keeps the connection alive. May be dropped before it ends.
    async fn pump(&mut self) -> Result<(), Fault> {
        self.connection.flush().await.map_err(Fault::Offline)?;
        let pause = self.next_ping.saturating_sub(clock::monotonic());
        let Ok(incoming) = tokio::time::timeout(pause, self.connection.next()).await else {
            if self.unanswered {
                return Err(Fault::Offline("the broker does not answer".to_owned()));
            }
            self.unanswered = true;
            self.next_ping = clock::monotonic() + self.keep_alive / 2;
            self.connection.queue_ping();
            return Ok(());
        };
        match incoming.map_err(Fault::Offline)? {
            Incoming::Pong => self.unanswered = false,
            Incoming::NotSubscribed => return Err(Fault::Offline("the broker refuses a subscription".to_owned())),
            Incoming::Message { topic, payload, .. } => self.take(&topic, |form| form.extract(&payload)),
            Incoming::TooLong { topic, length } => {
                self.take(&topic, |_| Err(format!("the message has {length} bytes and was skipped")));
            }
        }
        Ok(())
    }

    fn take(&mut self, topic: &str, extract: impl Fn(&Form) -> Result<Sample, String>) {
        for (index, Topic(route)) in &self.routes {
            if !route.state.as_ref().is_some_and(|filter| matches(filter, topic)) {
                continue;
            }
            let outcome = extract(&route.form);
            if let Ok(sample) = &outcome {
                match self.latest.iter_mut().find(|(of, _)| of == index) {
                    Some((_, latest)) => *latest = sample.clone(),
                    None => self.latest.push((*index, sample.clone())),
                }
            }
            if self.waiting.len() >= MOST {
                self.waiting.pop_front();
            }
            self.waiting.push_back(Reading { point: *index, outcome });
        }
    }
}

/// Whether a topic is one that a filter means (MQTT 3.1.1, chapter 4.7).
fn matches(filter: &str, topic: &str) -> bool {
    if topic.starts_with('$') && filter.starts_with(['#', '+']) {
        return false;
    }
    let (mut filter, mut topic) = (filter.split('/'), topic.split('/'));
    loop {
        match (filter.next(), topic.next()) {
            (Some("#"), _) | (None, None) => return true,
            (Some("+"), Some(_)) => {}
            (Some(wanted), Some(level)) if wanted == level => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_mean_what_the_standard_says() {
        for (filter, topic, so) in [
            ("a/b", "a/b", true),
            ("a/+", "a/b", true),
            ("a/#", "a", true),
            ("a/#", "a/b/c", true),
            ("#", "a/b", true),
            ("#", "$SYS/x", false),
            ("+/x", "$SYS/x", false),
            ("a/+", "a/b/c", false),
            ("a/b", "a", false),
            ("+", "/a", false),
            ("+/+", "/a", true),
        ] {
            assert_eq!(matches(filter, topic), so, "{filter} {topic}");
        }
    }
}
