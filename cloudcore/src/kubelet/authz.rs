//! Whether they may: as a kubelet asks it, by SubjectAccessReviews of subresources of the node; and for what is of one device alone also of
//! that device, so that whoever may press its button need not be allowed all that a node can.

use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};
use skerry_proto::device::{GROUP, VERSION};
use skerry_proto::ops::percent_decode;

use super::cache::{Asked, Silence};
use super::reviews::{Reviews, User};
use crate::backend::BackendError;

/// How long a yes and a no are good.
const ALLOWED_TTL: Duration = Duration::from_secs(300);
const DENIED_TTL: Duration = Duration::from_secs(30);
const MAX_ANSWERS: usize = 64 << 10;
/// Reviews under way at once.
const AT_ONCE: usize = 64;

/// What a path is, for metrics and authorisation: by its first part.
const ROUTES: [(&str, &[&str]); 15] = [
    ("pods", &["pods", "proxy"]),
    ("runningpods", &["pods", "proxy"]),
    ("healthz", &["healthz", "proxy"]),
    ("configz", &["configz", "proxy"]),
    ("stats", &["stats"]),
    ("metrics", &["metrics"]),
    ("logs", &["log"]),
    ("checkpoint", &["checkpoint"]),
    ("statusz", &["statusz"]),
    ("flagz", &["configz"]),
    ("containerLogs", PROXY),
    ("exec", PROXY),
    ("attach", PROXY),
    ("portForward", PROXY),
    ("devices", PROXY),
];
const PROXY: &[&str] = &["proxy"];

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// A name for metrics.
    pub(crate) route: &'static str,
    /// Empty for methods that have none.
    pub(crate) verb: &'static str,
    /// Any of them is enough.
    pub(crate) subresources: &'static [&'static str],
    /// It is also enough to be allowed this.
    device: Option<Device>,
}

/// What of a device is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Device {
    namespace: String,
    name: String,
    subresource: &'static str,
}

impl Device {
    /// Of the paths that edgecore answers for one device. None of them has an escape that could be a slash: it would end a part for one
    /// reader only.
    fn of(path: &str, decoded: &str) -> Option<Self> {
        let slashes = |text: &str| text.bytes().filter(|byte| *byte == b'/').count();
        if slashes(path) != slashes(decoded) {
            return None;
        }
        let parts: Vec<&str> = decoded.split('/').filter(|part| !part.is_empty()).collect();
        let (namespace, name, subresource) = match *parts.as_slice() {
            ["devices", namespace, name]
            | ["devices", namespace, name, "properties", _]
            | ["devices", namespace, name, "properties", _, "history"] => (namespace, name, "values"),
            ["devices", namespace, name, "methods", _] => (namespace, name, "methods"),
            _ => return None,
        };
        Some(Self { namespace: namespace.to_owned(), name: name.to_owned(), subresource })
    }
}

/// Why it is not known whether they may.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unauthorised {
    /// The apiserver cannot be asked.
    #[error(transparent)]
    Unasked(#[from] BackendError),
    /// It does not answer.
    #[error("the apiserver does not answer whether this is allowed")]
    Silence,
}

impl Attributes {
    /// Of a request (KEP-2862, kubelet's `GetRequestAttributes`). `None`: the path could be read as another one.
    pub(crate) fn of(method: &Method, path: &str) -> Option<Self> {
        let verb = match *method {
            Method::GET => "get",
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            _ => "",
        };
        let decoded = plain(path)?;
        let first = decoded.strip_prefix('/')?.split('/').next().unwrap_or_default();
        let route = ROUTES.into_iter().find(|(name, _)| *name == first);
        let (route, subresources) = route.unwrap_or(if first == "run" { ("run", PROXY) } else { ("other", PROXY) });
        Some(Self { route, verb, subresources, device: Device::of(path, &decoded) })
    }

    /// How a kubelet says no.
    pub(crate) fn forbidden(&self, user: &User) -> String {
        let device = self.device.as_ref().map_or_else(String::new, |device| {
            let Device { namespace, name, subresource } = device;
            format!("; nor resource=devices.{GROUP}, subresource={subresource}, namespace={namespace}, name={name}")
        });
        format!(
            "Forbidden (user={}, verb={}, resource=nodes, subresource(s)=[{}]{device})\n",
            user.name,
            self.verb,
            self.subresources.join(" ")
        )
    }
}

/// A path without escapes, unless some reader could take it for another: what is decided here is decided for what the edge reads.
fn plain(path: &str) -> Option<String> {
    let text = String::from_utf8(percent_decode(path)?).ok()?;
    let mut parts = text.strip_prefix('/')?.split('/').peekable();
    while let Some(part) = parts.next() {
        // A slash may end it.
        let empty_inside = part.is_empty() && parts.peek().is_some();
        if empty_inside
            || matches!(part, "." | "..")
            || part.contains(['\\', '?', '#'])
            || part.contains(char::is_control)
        {
            return None;
        }
    }
    Some(text)
}

/// Says whether they may.
pub(crate) struct Authoriser<R> {
    reviews: Arc<R>,
    answers: Asked<bool>,
}

impl<R: Reviews> Authoriser<R> {
    pub(crate) fn new(reviews: Arc<R>) -> Self {
        Self { reviews, answers: Asked::new(MAX_ANSWERS, AT_ONCE) }
    }

    /// Whether one of the subresources is allowed. What cannot be asked is not, and is an error unless another is allowed.
    pub(crate) async fn allows(&self, user: &User, node: &str, wanted: &Attributes) -> Result<bool, Unauthorised> {
        let mut failed = None;
        let of_node = wanted.subresources.iter().map(|subresource| of_node(node, wanted.verb, subresource));
        let of_device = wanted.device.iter().map(|device| of_device(device, wanted.verb));
        for resource in of_node.chain(of_device) {
            match self.review(&spec(user, &resource)).await {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                // Nor will it answer the next one.
                Err(Unauthorised::Silence) => return Err(Unauthorised::Silence),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(false), Err)
    }

    async fn review(&self, spec: &Value) -> Result<bool, Unauthorised> {
        let ask = async { Ok(self.reviews.access(spec).await?) };
        self.answers.get(spec.to_string().as_bytes(), ask, |allowed| good_for(*allowed)).await
    }
}

impl From<Silence> for Unauthorised {
    fn from(Silence: Silence) -> Self {
        Self::Silence
    }
}

fn good_for(allowed: bool) -> Duration {
    if allowed { ALLOWED_TTL } else { DENIED_TTL }
}

/// The spec of a SubjectAccessReview.
fn spec(user: &User, resource: &Value) -> Value {
    json!({
        "user": user.name,
        "uid": user.uid,
        "groups": user.groups,
        "extra": user.extra,
        "resourceAttributes": resource,
    })
}

fn of_node(node: &str, verb: &str, subresource: &str) -> Value {
    json!({"verb": verb, "version": "v1", "resource": "nodes", "subresource": subresource, "name": node})
}

fn of_device(device: &Device, verb: &str) -> Value {
    let Device { namespace, name, subresource } = device;
    json!({
        "verb": verb, "group": GROUP, "version": VERSION, "resource": "devices", "subresource": subresource,
        "namespace": namespace, "name": name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_need_what_a_kubelet_would_ask_for() {
        for (path, route, subresources) in [
            ("/pods", "pods", "pods proxy"),
            ("/pods/", "pods", "pods proxy"),
            ("/runningpods/", "runningpods", "pods proxy"),
            ("/healthz/ping", "healthz", "healthz proxy"),
            ("/configz", "configz", "configz proxy"),
            ("/stats/summary", "stats", "stats"),
            ("/metrics", "metrics", "metrics"),
            ("/metrics/cadvisor", "metrics", "metrics"),
            ("/logs/", "logs", "log"),
            ("/checkpoint/ns/pod/c", "checkpoint", "checkpoint"),
            ("/statusz", "statusz", "statusz"),
            ("/flagz", "flagz", "configz"),
            ("/exec/ns/pod/c", "exec", "proxy"),
            ("/run/ns/pod/c", "run", "proxy"),
            ("/containerLogs/ns/pod/c", "containerLogs", "proxy"),
            ("/metricsx", "other", "proxy"),
            ("/%6detrics", "metrics", "metrics"),
            ("/metrics%2Fcadvisor", "metrics", "metrics"),
            ("/debug/pprof/heap", "other", "proxy"),
            ("/", "other", "proxy"),
        ] {
            let found = Attributes::of(&Method::GET, path).unwrap();
            assert_eq!((found.route, found.subresources.join(" ").as_str()), (route, subresources), "{path}");
            assert_eq!(found.verb, "get");
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for path in [
            "",
            "metrics",
            "*",
            "//exec/ns/pod/c",
            "/metrics/../exec",
            "/metrics/%2e%2e/exec",
            "/metrics%2f..%2fexec",
            "/./exec",
            "/metrics/%",
            "/metrics/%4",
            "/metrics/%zz",
            "/metrics/%00",
            "/metrics/a%5cb",
            "/metrics/%ff",
            "/metrics%3fx",
        ] {
            assert_eq!(Attributes::of(&Method::GET, path), None, "{path:?}");
        }
    }

    #[test]
    fn what_is_of_one_device_may_be_allowed_of_it_alone() {
        for (path, of) in [
            ("/devices/plant/press/methods/start", "plant/press methods"),
            ("/devices/plant/press/methods/start/", "plant/press methods"),
            ("/devices/plant/press/methods/st%20art", "plant/press methods"),
            ("/devices/plant/press", "plant/press values"),
            ("/devices/values/press", "values/press values"),
            ("/devices/plant/press/properties/level", "plant/press values"),
            ("/devices/plant/press/properties/level/history", "plant/press values"),
            // What is of several, or of none.
            ("/devices", ""),
            ("/devices/values", ""),
            ("/devices/plant/press/methods", ""),
            ("/devices/plant/press/methods/start/now", ""),
            ("/metrics/devices", ""),
            ("/exec/plant/press/methods/start", ""),
            // To the edge a device named `b/methods`, or none.
            ("/devices/a/b%2fmethods/c", ""),
            ("/devices/a%2fb/methods/c", ""),
            ("/devices%2fa/b/methods/c", ""),
        ] {
            let found = Attributes::of(&Method::POST, path).unwrap();
            let device =
                found.device.map(|device| format!("{}/{} {}", device.namespace, device.name, device.subresource));
            assert_eq!(device.unwrap_or_default(), of, "{path}");
        }
        let wanted = Attributes::of(&Method::POST, "/devices/plant/press/methods/start").unwrap();
        let user = User { name: "eve".to_owned(), ..User::default() };
        assert_eq!(
            wanted.forbidden(&user),
            "Forbidden (user=eve, verb=create, resource=nodes, subresource(s)=[proxy]; nor resource=devices.devices.kubeedge.io, subresource=methods, namespace=plant, name=press)\n"
        );
        let spec = spec(&user, &of_device(&wanted.device.unwrap(), wanted.verb));
        assert_eq!(spec["resourceAttributes"]["group"], "devices.kubeedge.io");
    }

    #[test]
    fn a_no_is_a_kubelets() {
        let user = User { name: "eve".to_owned(), ..User::default() };
        let wanted = Attributes::of(&Method::POST, "/pods").unwrap();
        assert_eq!(
            wanted.forbidden(&user),
            "Forbidden (user=eve, verb=create, resource=nodes, subresource(s)=[pods proxy])\n"
        );
        let spec = spec(&user, &of_node("box-1", wanted.verb, "pods"));
        assert_eq!(spec["resourceAttributes"]["name"], "box-1");
        assert_eq!((good_for(true).as_secs(), good_for(false).as_secs()), (300, 30));
    }
}
