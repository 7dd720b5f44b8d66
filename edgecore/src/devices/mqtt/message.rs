//! The payloads of KubeEdge's topics, and what they show of a twin.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value as Json, json};

use crate::devices::{Property, Twin};

/// The longest payload that is looked at, in bytes: a twin with several values of the longest kind. A longer one is answered with 400.
pub(super) const MAX_PAYLOAD: usize = 256 << 10;
/// The longest `event_id`, in bytes.
const MAX_EVENT_ID: usize = 256;

/// A twin update or a state update, whichever; what is not read here is ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Ask {
    #[serde(deserialize_with = "null_is_default")]
    pub(super) event_id: String,
    pub(super) state: Option<String>,
    pub(super) twin: Option<BTreeMap<String, Option<Wish>>>,
}

/// What a twin update says of a property.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Wish {
    pub(super) expected: Option<Wished>,
    pub(super) actual: Option<Wished>,
}

/// A value in it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Wished {
    pub(super) value: Option<String>,
    pub(super) metadata: Option<Stamp>,
}

/// When a value was sampled.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Stamp {
    /// Milliseconds since the Unix epoch.
    pub(super) timestamp: Option<i64>,
}

fn null_is_default<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Reads a request. Otherwise the code and the reason, with the `event_id` if that could be read.
pub(super) fn read(payload: &[u8]) -> Result<Ask, Failure> {
    if payload.len() > MAX_PAYLOAD {
        return Err(too_long(payload.len()));
    }
    // An empty payload asks like an empty object.
    let payload = if payload.is_empty() { b"{}" } else { payload };
    if payload.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        // A list would be taken for the fields in their order.
        return Err(Failure::bad("the payload is no JSON object".to_owned()));
    }
    let ask: Ask = serde_json::from_slice(payload)
        .map_err(|error| Failure::bad(format!("the payload is not as it should be: {error}")))?;
    if ask.event_id.len() > MAX_EVENT_ID {
        return Err(Failure::bad(format!(
            "event_id has {} bytes, at most {MAX_EVENT_ID} are taken",
            ask.event_id.len()
        )));
    }
    Ok(ask)
}

/// What to say of a payload that was not looked at.
pub(super) fn too_long(size: usize) -> Failure {
    Failure::bad(format!("the payload has {size} bytes, at most {MAX_PAYLOAD} are taken"))
}

/// Why something is not done, in KubeEdge's codes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// 400 a request that cannot be, 404 no such device, 409 it could be several, 500 ours.
    pub(super) code: u16,
    pub(super) reason: String,
}

impl Failure {
    pub(super) fn bad(reason: String) -> Self {
        Self { code: 400, reason }
    }
}

/// A message from edgecore: what every one begins with, and what it is about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head<'a> {
    /// That of the request, or one of ours.
    pub(super) event_id: &'a str,
    /// Milliseconds since the Unix epoch.
    pub(super) now: i64,
}

impl Head<'_> {
    /// `{code, reason}`.
    pub(super) fn failure(self, failure: &Failure) -> Vec<u8> {
        self.with([("code", failure.code.into()), ("reason", failure.reason.as_str().into())])
    }

    /// `{twin}`.
    pub(super) fn twin<'p>(self, of: impl IntoIterator<Item = &'p Property>) -> Vec<u8> {
        self.with([("twin", properties(of))])
    }

    /// `{twin: {…: {last, current}}}` of properties that changed, from what to what.
    pub(super) fn document<'p>(
        self,
        changes: impl IntoIterator<Item = (Option<&'p Property>, &'p Property)>,
    ) -> Vec<u8> {
        let of = changes.into_iter().map(|(last, current)| {
            let last = last.map_or(Json::Null, property);
            (current.name.clone(), json!({ "last": last, "current": property(current) }))
        });
        self.with([("twin", object(of))])
    }

    /// `{twin, delta}` of what should be other than it is; `None` if nothing should.
    pub(super) fn delta(self, twin: &Twin) -> Option<Vec<u8>> {
        let delta = object(twin.properties.iter().filter_map(|of| {
            let desired = of.desired.as_ref()?.value.as_str();
            let differs = of.reported.as_ref().is_none_or(|reported| reported.value != desired);
            differs.then(|| (of.name.clone(), desired.into()))
        }));
        let wanted = || properties(twin.properties.iter().filter(|of| of.desired.is_some()));
        delta
            .as_object()
            .is_some_and(|delta| !delta.is_empty())
            .then(|| self.with([("twin", wanted()), ("delta", delta)]))
    }

    /// `{device}`: its name, its state.
    pub(super) fn state(self, twin: &Twin) -> Vec<u8> {
        let mut shown = device(twin);
        shown.remove("id");
        self.with([("device", Json::Object(shown))])
    }

    /// `{devices}`.
    pub(super) fn devices(self, twins: &[Twin]) -> Vec<u8> {
        self.with([("devices", twins.iter().map(|twin| Json::Object(device(twin))).collect())])
    }

    /// `{added_devices, removed_devices}`: one that is there now, with its twin.
    pub(super) fn added(self, twin: &Twin) -> Vec<u8> {
        let mut shown = device(twin);
        shown.insert("twin".to_owned(), properties(&twin.properties));
        self.with([("added_devices", json!([shown])), ("removed_devices", json!([]))])
    }

    /// The same of one that is not there any more.
    pub(super) fn removed(self, key: &str) -> Vec<u8> {
        self.with([("added_devices", json!([])), ("removed_devices", json!([{ "id": key }]))])
    }

    fn with<const N: usize>(self, body: [(&str, Json); N]) -> Vec<u8> {
        let head = [("event_id", self.event_id.into()), ("timestamp", self.now.into())];
        let all = head.into_iter().chain(body).map(|(key, value)| (key.to_owned(), value));
        object(all).to_string().into_bytes()
    }
}

fn properties<'p>(properties: impl IntoIterator<Item = &'p Property>) -> Json {
    object(properties.into_iter().map(|of| (of.name.clone(), property(of))))
}

fn object(pairs: impl IntoIterator<Item = (String, Json)>) -> Json {
    let mut object = Map::new();
    object.extend(pairs);
    Json::Object(object)
}

fn property(of: &Property) -> Json {
    // KubeEdge has one for both.
    let kind = if of.kind == "DOUBLE" { "float".to_owned() } else { of.kind.to_ascii_lowercase() };
    let mut shown = json!({ "optional": false, "metadata": { "type": kind } });
    let value = |value: &str, at: i64| json!({ "value": value, "metadata": { "timestamp": at } });
    if let Some(wanted) = &of.desired {
        shown["expected"] = value(&wanted.value, wanted.timestamp);
        // One count of whoever writes, for which KubeEdge has two. Of what was before there is none.
        if wanted.version > 0 {
            shown["expected_version"] = json!({ "cloud": wanted.version, "edge": wanted.version });
        }
    }
    if let Some(reported) = &of.reported {
        shown["actual"] = value(&reported.value, reported.timestamp);
        // Nobody but the edge measures.
        if reported.version > 0 {
            shown["actual_version"] = json!({ "cloud": 0, "edge": reported.version });
        }
    }
    shown
}

fn device(twin: &Twin) -> Map<String, Json> {
    let mut shown = Map::new();
    shown.insert("id".to_owned(), format!("{}/{}", twin.namespace, twin.name).into());
    shown.insert("name".to_owned(), twin.name.as_str().into());
    shown.insert("state".to_owned(), twin.state.as_str().into());
    if let Some(at) = twin.last_seen.and_then(|millis| Timestamp::from_millisecond(millis).ok()) {
        shown.insert("last_online".to_owned(), at.strftime("%Y-%m-%d %H:%M:%S").to_string().into());
    }
    shown
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use skerry_proto::device::AccessMode;

    use super::*;
    use crate::devices::{State, Value, Wanted};

    const HEAD: Head<'static> = Head { event_id: "e", now: 5 };

    fn lamp() -> Twin {
        let property = |name: &str, kind: &str, desired: Option<&str>, reported: Option<&str>| Property {
            name: name.to_owned(),
            kind: kind.to_owned(),
            access_mode: AccessMode::ReadWrite,
            desired: desired.map(|value| Wanted {
                value: value.to_owned(),
                timestamp: 1,
                version: 4,
                ..Wanted::default()
            }),
            reported: reported.map(|value| Value {
                value: value.to_owned(),
                timestamp: 2,
                version: 8,
                ..Value::default()
            }),
            ..Property::default()
        };
        Twin {
            namespace: "default".to_owned(),
            name: "lamp".to_owned(),
            state: State::Online,
            last_seen: Some(86_400_000),
            properties: vec![
                property("power", "BOOLEAN", Some("true"), Some("false")),
                property("level", "DOUBLE", Some("7"), Some("7")),
                property("hours", "INT", None, Some("3")),
            ],
            ..Twin::default()
        }
    }

    fn json(payload: &[u8]) -> Json {
        serde_json::from_slice(payload).unwrap()
    }

    #[test]
    fn messages_are_as_kubeedges() {
        let lamp = lamp();
        let power = json!({
            "optional": false,
            "metadata": { "type": "boolean" },
            "expected": { "value": "true", "metadata": { "timestamp": 1 } },
            "expected_version": { "cloud": 4, "edge": 4 },
            "actual": { "value": "false", "metadata": { "timestamp": 2 } },
            "actual_version": { "cloud": 0, "edge": 8 },
        });
        let hours = json!({
            "optional": false,
            "metadata": { "type": "int" },
            "actual": { "value": "3", "metadata": { "timestamp": 2 } },
            "actual_version": { "cloud": 0, "edge": 8 },
        });
        let got = json(&HEAD.twin([&lamp.properties[0], &lamp.properties[2]]));
        assert_eq!(got, json!({ "event_id": "e", "timestamp": 5, "twin": { "power": power, "hours": hours } }));
        let got = json(&HEAD.document([(None, &lamp.properties[0]), (Some(&lamp.properties[2]), &lamp.properties[2])]));
        let changes =
            json!({ "power": { "last": null, "current": power }, "hours": { "last": hours, "current": hours } });
        assert_eq!(got, json!({ "event_id": "e", "timestamp": 5, "twin": changes }));
        let got = json(&HEAD.delta(&lamp).unwrap());
        assert_eq!((&got["delta"], got["twin"].as_object().unwrap().len()), (&json!({ "power": "true" }), 2));
        assert_eq!(HEAD.delta(&Twin { properties: lamp.properties[1..].to_vec(), ..lamp.clone() }), None);
        let shown = json!({ "name": "lamp", "state": "online", "last_online": "1970-01-02 00:00:00" });
        assert_eq!(json(&HEAD.state(&lamp)), json!({ "event_id": "e", "timestamp": 5, "device": shown }));
        let got = json(&HEAD.devices(std::slice::from_ref(&lamp)));
        assert_eq!((&got["devices"][0]["id"], &got["devices"][0]["name"]), (&json!("default/lamp"), &json!("lamp")));
        let got = json(&HEAD.added(&lamp));
        assert_eq!((&got["added_devices"][0]["twin"]["hours"], &got["removed_devices"]), (&hours, &json!([])));
        assert_eq!(json(&HEAD.removed("default/lamp"))["removed_devices"], json!([{ "id": "default/lamp" }]));
        let got = json(&HEAD.failure(&Failure { code: 404, reason: "none".to_owned() }));
        assert_eq!(got, json!({ "event_id": "e", "timestamp": 5, "code": 404, "reason": "none" }));
    }

    #[test]
    fn requests_are_read_or_the_reason_is_said() {
        let ask = read(br#"{"event_id":"1","timestamp":3,"twin":{"a":{"actual":{"value":"x","metadata":{"timestamp":9}}},"b":null},"z":[]}"#).unwrap();
        let twin = ask.twin.unwrap();
        let actual = twin["a"].as_ref().unwrap().actual.as_ref().unwrap();
        assert_eq!((ask.event_id.as_str(), actual.value.as_deref()), ("1", Some("x")));
        assert_eq!(actual.metadata.unwrap().timestamp, Some(9));
        assert!(twin["b"].is_none());
        assert!(read(b"").unwrap().twin.is_none() && read(b"{\"event_id\":null}").unwrap().event_id.is_empty());
        for (payload, word) in [
            (&b"x"[..], "object"),
            (b"{x", "column"),
            (b"{\"event_id\":3}", "string"),
            (b"[]", "object"),
            (b"{\"twin\":[]}", "map"),
            (b"{\"twin\":{\"a\":{\"actual\":{\"value\":3}}}}", "string"),
            (b"\xff", "object"),
            ("{\"x\":".repeat(10_000).as_bytes(), "column"),
            (format!("{{\"event_id\":\"{}\"}}", "x".repeat(257)).as_bytes(), "257"),
            (&[b' '; MAX_PAYLOAD + 1], "262145"),
        ] {
            let failure = read(payload).unwrap_err();
            assert!(failure.code == 400 && failure.reason.contains(word), "{failure:?}");
            assert!(failure.reason.len() < 300);
        }
    }

    #[test]
    fn fuzzed_requests_are_answered() {
        let seeds = [
            &br#"{"event_id":"1","timestamp":3,"twin":{"a":{"expected":{"value":"x"},"actual":{"value":"7","metadata":{"timestamp":9}}},"b":null}}"#[..],
            br#"{"event_id":"2","timestamp":4,"state":"online"}"#,
        ];
        let answered = |payload: &[u8]| {
            if let Err(failure) = read(payload) {
                assert!(failure.code == 400 && failure.reason.len() < 1000, "{failure:?}");
            }
        };
        crate::fuzz::fuzz(answered, &seeds.map(<[u8]>::to_vec), crate::mutate::bytes);
    }

    proptest! {
        #[test]
        fn any_payload_is_answered(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&payload);
        }

        #[test]
        fn damaged_requests_are_answered(at in 0_usize..80, with in any::<u8>()) {
            let mut payload = br#"{"event_id":"1","timestamp":3,"twin":{"a":{"expected":{"value":"x"}}},"state":""}"#.to_vec();
            if let Some(byte) = payload.get_mut(at) {
                *byte = with;
            }
            let _ = read(&payload);
        }
    }
}
