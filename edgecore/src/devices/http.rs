//! Devices over HTTP: for the cloud, through the node's endpoint, and for the box itself, through the control socket. Whether who asks may
//! was decided there.
//!
//! | request | |
//! |---|---|
//! | `GET /devices` | all devices; `?namespace=` those of one |
//! | `GET /devices/NAMESPACE/NAME` | one with its properties |
//! | `PUT /devices/NAMESPACE/NAME/properties/PROPERTY` | writes what it should be: `{"value": "21.5", "origin": "cli"}` |
//! | `GET /devices/NAMESPACE/NAME/properties/PROPERTY/history` | its last values |
//! | `POST /devices/NAMESPACE/NAME/methods/METHOD` | calls it: `{"arguments": {"speed": "3"}, "timeoutSeconds": 10}` |
//! | `GET /devices/values` | latest values, then what comes, one JSON object a line; `?namespace=`, `&name=`, `&property=`, `&follow=false` |
//! | `GET /metrics/devices` | latest values and states for Prometheus |

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Body;
use hyper::{Method, Request, StatusCode};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::broadcast::{self, error::RecvError, error::TryRecvError};

use super::twin::Filter;
use super::{CallError, Change, Devices, Refused, State, WriteError};
use crate::ops::answer::{Answer, Refusal, json, pieces};
use crate::ops::query::{Query, segments};
use crate::stats::METRICS_TYPE;

/// The longest body of a request, in bytes: a value of 64 KiB as JSON may write it.
const MAX_BODY: usize = 512 << 10;
/// The longest origin, in bytes.
const MAX_ORIGIN: usize = 64;
/// How long a method may take unless the caller says so, and at most.
const TIMEOUT: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(300)];
/// Devices in one piece of an answer.
const PAGE: usize = 128;
/// Changes in one piece of an answer.
const BATCH: usize = 64;

/// Whether a request is answered here.
pub(crate) fn is_ours(path: &str) -> bool {
    path == "/devices" || path.starts_with("/devices/") || path == "/metrics/devices"
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Write {
    value: String,
    #[serde(default)]
    origin: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct Call {
    arguments: BTreeMap<String, String>,
    timeout_seconds: Option<f64>,
}

/// Answers a request whose path [`is_ours`].
pub(crate) async fn answer<B>(devices: &Devices, request: Request<B>) -> Answer
where
    B: Body<Data = Bytes> + Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    route(devices, request).await.unwrap_or_else(Answer::from)
}

async fn route<B>(devices: &Devices, request: Request<B>) -> Result<Answer, Refusal>
where
    B: Body<Data = Bytes> + Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let filter = Filter {
        namespace: query.first("namespace").map(str::to_owned),
        name: query.first("name").map(str::to_owned),
        property: query.first("property").map(str::to_owned),
    };
    let nothing = || Refusal::missing("404: Page Not Found");
    let parts = segments(request.uri().path()).ok_or_else(nothing)?;
    let parts: Vec<&str> = parts.iter().map(String::as_str).filter(|part| !part.is_empty()).collect();
    let method = request.method().clone();
    let allow = |allowed: &[Method]| match allowed.contains(&method) {
        true => Ok(()),
        false => Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed")),
    };
    let get = [Method::GET, Method::HEAD];
    match *parts.as_slice() {
        ["devices"] => allow(&get).map(|()| list(devices.clone(), filter)),
        ["metrics", "devices"] => allow(&get).map(|()| metrics(devices.clone())),
        ["devices", "values"] => {
            allow(&get)?;
            Ok(values(devices, filter, query.first("follow") != Some("false")))
        }
        ["devices", namespace, name] => {
            allow(&get)?;
            let twin = devices.twin(&format!("{namespace}/{name}")).ok_or(Refused::NoDevice)?;
            Ok(json(&serde_json::to_value(twin).map_err(|error| Refusal::failed(error.to_string()))?))
        }
        ["devices", namespace, name, "properties", property, "history"] => {
            allow(&get)?;
            let samples = devices.history(&format!("{namespace}/{name}"), property)?;
            let samples =
                samples.into_iter().map(|(timestamp, value)| json!({ "timestamp": timestamp, "value": value }));
            Ok(json(&json!({ "samples": samples.collect::<Vec<_>>() })))
        }
        ["devices", namespace, name, "properties", property] => {
            allow(&[Method::PUT, Method::POST])?;
            let write: Write = body(request).await?;
            let origin = write.origin.as_deref().filter(|origin| !origin.is_empty()).unwrap_or("http");
            if origin.len() > MAX_ORIGIN || origin == super::twin::desired::CLOUD {
                return Err(Refusal::bad(format!(
                    "origin {origin:?}: any word but `cloud` of at most {MAX_ORIGIN} bytes"
                )));
            }
            let device = format!("{namespace}/{name}");
            devices.write(&device, property, &write.value, origin).await?;
            let twin = devices.twin(&device).ok_or(Refused::NoDevice)?;
            let of = twin.properties.into_iter().find(|of| of.name == property);
            Ok(json(&serde_json::to_value(of).map_err(|error| Refusal::failed(error.to_string()))?))
        }
        ["devices", namespace, name, "methods", called] => {
            allow(&[Method::POST])?;
            let call: Call = body(request).await?;
            let [usual, most] = TIMEOUT;
            let timeout = match call.timeout_seconds {
                None => usual,
                Some(seconds) => Duration::try_from_secs_f64(seconds)
                    .ok()
                    .filter(|of| !of.is_zero() && *of <= most)
                    .ok_or_else(|| {
                        Refusal::bad(format!("timeoutSeconds {seconds}: more than 0 and at most {}", most.as_secs()))
                    })?,
            };
            let results = devices.call(&format!("{namespace}/{name}"), called, call.arguments, timeout).await?;
            Ok(json(&json!({ "results": results })))
        }
        _ => Err(nothing()),
    }
}

async fn body<B, T>(request: Request<B>) -> Result<T, Refusal>
where
    B: Body<Data = Bytes> + Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    T: for<'de> Deserialize<'de>,
{
    let bytes = Limited::new(request.into_body(), MAX_BODY).collect().await;
    let bytes = bytes.map_err(|error| Refusal::bad(format!("the body cannot be read: {error}")))?.to_bytes();
    let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
    serde_json::from_slice(text).map_err(|error| Refusal::bad(format!("the body is not as it should be: {error}")))
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        let words = refused.to_string();
        match refused {
            Refused::NoDevice | Refused::NoProperty(_) => Self::missing(words),
            Refused::Value(_) => Self::new(StatusCode::UNPROCESSABLE_ENTITY, words),
            Refused::NotYours => Self::new(StatusCode::FORBIDDEN, words),
        }
    }
}

impl From<WriteError> for Refusal {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Refused(refused) => refused.into(),
            WriteError::NotKept(_) => Self::new(StatusCode::INSUFFICIENT_STORAGE, error.to_string()),
        }
    }
}

impl From<CallError> for Refusal {
    fn from(error: CallError) -> Self {
        let status = match &error {
            CallError::NoDevice(_) | CallError::NoMethod(..) => StatusCode::NOT_FOUND,
            CallError::Arguments(_) => StatusCode::UNPROCESSABLE_ENTITY,
            CallError::NoMapper => StatusCode::SERVICE_UNAVAILABLE,
            CallError::Failed(_) => StatusCode::BAD_GATEWAY,
            CallError::TimedOut(_) => StatusCode::GATEWAY_TIMEOUT,
            CallError::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string())
    }
}

/// All devices, a page at a time.
fn list(devices: Devices, filter: Filter) -> Answer {
    let next = move |from: Option<(usize, bool)>| {
        let (devices, filter) = (devices.clone(), filter.clone());
        async move {
            let (from, is_first) = from?;
            let (page, next) = devices.with(|twins, now| twins.page(from, PAGE, &filter, false, now));
            let mut text = String::new();
            if from == 0 {
                text.push_str("{\"devices\":[");
            }
            let mut first = is_first;
            for twin in page {
                if !std::mem::take(&mut first) {
                    text.push(',');
                }
                text.push_str(&serde_json::to_string(&twin).unwrap_or_default());
            }
            if next.is_none() {
                text.push_str("]}\n");
            }
            Some((Ok(Bytes::from(text)), next.map(|next| (next, first))))
        }
    };
    pieces("application/json", Box::pin(stream::unfold(Some((0, true)), next)))
}

/// Latest numbers and states, a page at a time.
fn metrics(devices: Devices) -> Answer {
    let next = move |from: Option<usize>| {
        let devices = devices.clone();
        async move {
            let from = from?;
            let ((page, next), counters, count) = devices.with(|twins, now| {
                (twins.page(from, PAGE, &Filter::default(), true, now), twins.counters, twins.len())
            });
            let mut text = String::new();
            if from == 0 {
                let _ = writeln!(
                    text,
                    "# HELP devices Devices of this node.\n# TYPE devices gauge\ndevices {count}\n\
                     # HELP device_values_total Values that mappers reported and that were taken.\n# TYPE device_values_total counter\ndevice_values_total {}\n\
                     # HELP device_refused_total Values and states of mappers that were refused.\n# TYPE device_refused_total counter\ndevice_refused_total {}\n\
                     # HELP device_time_corrected_total Samples from the future, or from before the ones before them, whose time was put right.\n# TYPE device_time_corrected_total counter\ndevice_time_corrected_total {}\n\
                     # HELP device_mapper_connections_refused_total Connections to the device mapper interface that were closed: their process had as many as it may.\n# TYPE device_mapper_connections_refused_total counter\ndevice_mapper_connections_refused_total {}\n\
                     # HELP device_mapper_floods_total Reports that were refused: their process reported more values than it may.\n# TYPE device_mapper_floods_total counter\ndevice_mapper_floods_total {}\n\
                     # HELP device_mapper_too_long_total Reports that were refused: they were longer than 4 MiB.\n# TYPE device_mapper_too_long_total counter\ndevice_mapper_too_long_total {}\n\
                     # HELP device_cloud_writes_lost_total Desired values of the cloud that were older than what was written at the box.\n# TYPE device_cloud_writes_lost_total counter\ndevice_cloud_writes_lost_total {}\n\
                     # HELP device_mapper_calls_total Calls of mappers that were answered.\n# TYPE device_mapper_calls_total counter",
                    counters.values,
                    counters.refused,
                    counters.corrected,
                    counters.refused_connections,
                    counters.floods,
                    counters.too_long,
                    counters.lost
                );
                for (kind, calls) in ["register", "update", "remove", "model"].iter().zip(counters.calls) {
                    let _ = writeln!(text, "device_mapper_calls_total{{call=\"{kind}\"}} {calls}");
                }
                let _ = writeln!(
                    text,
                    "# HELP device_mapper_failures_total Calls of mappers that failed.\n# TYPE device_mapper_failures_total counter\ndevice_mapper_failures_total {}\n\
                     # HELP device_up Whether a device can be reached.\n# TYPE device_up gauge\n\
                     # HELP device_last_seen_seconds When something was heard of a device last.\n# TYPE device_last_seen_seconds gauge\n\
                     # HELP device_property_value Latest value of a property that is a number or a truth value.\n# TYPE device_property_value gauge",
                    counters.failed_calls
                );
            }
            for twin in page.iter().filter(|twin| twin.last_seen.is_some()) {
                let labels = format!("namespace=\"{}\",device=\"{}\"", label(&twin.namespace), label(&twin.name));
                let state = twin.state.as_str();
                let _ = writeln!(text, "device_up{{{labels},state=\"{state}\"}} {}", u8::from(twin.state.is_up()));
                #[expect(clippy::cast_precision_loss, reason = "milliseconds in seconds")]
                let seen = twin.last_seen.unwrap_or_default() as f64 / 1000.0;
                let _ = writeln!(text, "device_last_seen_seconds{{{labels}}} {seen}");
                for property in &twin.properties {
                    let Some(reported) = &property.reported else { continue };
                    let number = match property.kind.as_str() {
                        "INT" | "FLOAT" | "DOUBLE" => reported.value.as_str(),
                        "BOOLEAN" if reported.value == "true" => "1",
                        "BOOLEAN" => "0",
                        _ => continue,
                    };
                    let name = label(&property.name);
                    let _ = writeln!(
                        text,
                        "device_property_value{{{labels},property=\"{name}\"}} {number} {}",
                        reported.timestamp
                    );
                }
            }
            Some((Ok(Bytes::from(text)), next))
        }
    };
    pieces(METRICS_TYPE, Box::pin(stream::unfold(Some(0), next)))
}

fn label(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// What a stream of values has still to say.
struct Following {
    devices: Devices,
    filter: Filter,
    /// The next page of what there is already.
    page: Option<usize>,
    changes: Option<broadcast::Receiver<Change>>,
    waiting: VecDeque<Change>,
}

/// Latest values and states, then what comes. A reader that falls behind loses the oldest, and is told how many.
fn values(devices: &Devices, filter: Filter, follow: bool) -> Answer {
    let changes = follow.then(|| devices.subscribe());
    let following = Following { devices: devices.clone(), filter, page: Some(0), changes, waiting: VecDeque::new() };
    let next = |mut following: Following| async move {
        loop {
            let text = following.next().await?;
            if !text.is_empty() {
                return Some((Ok::<_, io::Error>(Bytes::from(text)), following));
            }
        }
    };
    pieces("application/x-ndjson", Box::pin(stream::unfold(following, next)))
}

impl Following {
    /// The next lines, or none at the end.
    async fn next(&mut self) -> Option<String> {
        let mut text = String::new();
        if let Some(from) = self.page {
            let (twins, next) = self.devices.with(|twins, now| twins.page(from, PAGE, &self.filter, true, now));
            self.page = next;
            for twin in twins.iter().filter(|twin| twin.last_seen.is_some()) {
                let key = format!("{}/{}", twin.namespace, twin.name);
                if self.filter.property.is_none() {
                    text.push_str(&state(&key, twin.state));
                }
                for property in twin.properties.iter().filter(|property| self.filter.takes_property(&property.name)) {
                    if let Some(reported) = &property.reported {
                        text.push_str(&value(&key, &property.name, &reported.value, reported.timestamp));
                    }
                }
            }
            return Some(text);
        }
        let changes = self.changes.as_mut()?;
        match changes.recv().await {
            Ok(change) => self.waiting.push_back(change),
            Err(RecvError::Lagged(count)) => text.push_str(&dropped(count)),
            Err(RecvError::Closed) => return None,
        }
        while self.waiting.len() < BATCH {
            match changes.try_recv() {
                Ok(change) => self.waiting.push_back(change),
                // Said when it is their turn.
                Err(TryRecvError::Lagged(count)) => text.push_str(&dropped(count)),
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
        }
        for change in std::mem::take(&mut self.waiting) {
            text.push_str(&self.line(change));
        }
        Some(text)
    }

    fn line(&self, change: Change) -> String {
        let filter = &self.filter;
        match change {
            Change::Value { device, property, value: said, at, changed: _ } => {
                if !filter.takes(&device) || !filter.takes_property(&property) {
                    return String::new();
                }
                // Too long to go along: it is what the twin says by now.
                let said = said.or_else(|| {
                    let twin = self.devices.twin(&device)?;
                    let of = twin.properties.into_iter().find(|of| *of.name == *property)?;
                    of.reported.map(|reported| Arc::from(reported.value))
                });
                said.map(|said| value(&device, &property, &said, at)).unwrap_or_default()
            }
            Change::State { device, state: to } if filter.property.is_none() && filter.takes(&device) => {
                state(&device, to)
            }
            Change::State { .. } | Change::Device { .. } | Change::Desired { .. } => String::new(),
        }
    }
}

fn value(key: &str, property: &str, value: &str, at: i64) -> String {
    let (namespace, name) = key.split_once('/').unwrap_or_default();
    format!(
        "{}\n",
        json!({ "namespace": namespace, "name": name, "property": property, "value": value, "timestamp": at })
    )
}

fn state(key: &str, state: State) -> String {
    let (namespace, name) = key.split_once('/').unwrap_or_default();
    format!("{}\n", json!({ "namespace": namespace, "name": name, "state": state.as_str() }))
}

fn dropped(count: u64) -> String {
    format!("{}\n", json!({ "dropped": count }))
}
