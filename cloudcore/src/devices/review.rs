//! Looks at every Device that changed, or whose DeviceModel did, and says on it what is wrong: as an event, whose name is made of what it
//! says, so that replicas and restarts do not say it again.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use serde_json::{Value, json};
use skerry_proto::device::{DeviceModelSpec, DeviceSpec, GROUP, VERSION};
use skerry_proto::sync::{Object, decode};
use tracing::{debug, warn};

use super::check;
use crate::apiserver::{Apiserver, Kind, Verdict, verdict};
use crate::backend_k8s::Shared;
use crate::clock;
use crate::closure::devices::{MOST, Review};
use crate::retry::chain;

/// Reviews, for ever.
pub(crate) async fn run(api: Apiserver, shared: Arc<Shared>) {
    let wake = shared.closures().review_wake();
    loop {
        let review = shared.closures().take_review();
        let Some(review) = review else {
            wake.notified().await;
            continue;
        };
        let (reason, problem) = problem(&review);
        let is_news = shared.closures().reviewed(&review.key, &review.uid, problem.clone());
        if let Some(problem) = problem.filter(|_| is_news) {
            warn!(device = &*review.key, "{problem}");
            tell(&api, &review, reason, &problem).await;
        }
    }
}

fn problem(review: &Review) -> (&'static str, Option<String>) {
    let Some(device) = &review.device else {
        let problem = format!(
            "its node has {MOST} devices already, or as many bytes of their names: it does not get this one before another goes"
        );
        return ("TooManyDevices", Some(problem));
    };
    let problem = match spec::<DeviceSpec>(device) {
        Ok(device) => match review.model.as_deref().map(spec::<DeviceModelSpec>).transpose() {
            Ok(model) => check::problem(&device, model.as_ref()),
            Err(error) => Some(format!("its DeviceModel cannot be read: {error}")),
        },
        Err(error) => Some(format!("it cannot be read: {error}")),
    };
    ("DoesNotFitModel", problem)
}

fn spec<T: serde::de::DeserializeOwned>(object: &Object) -> Result<T, String> {
    let json = decode(object.encoding, &object.payload).map_err(|error| error.to_string())?;
    let mut value: Value = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
    serde_json::from_value(value["spec"].take()).map_err(|error| error.to_string())
}

async fn tell(api: &Apiserver, review: &Review, reason: &str, problem: &str) {
    let Some((namespace, name)) = review.key.split_once('/') else { return };
    match api.create(Kind::Event, namespace, event(namespace, name, &review.uid, reason, problem)).await {
        Ok(_) => {}
        Err(error) if verdict(&error) == Verdict::Conflict => {}
        // The log has it, and so has the DeviceStatus.
        Err(error) => debug!(device = &*review.key, "no event: {}", chain(&error)),
    }
}

fn event(namespace: &str, name: &str, uid: &str, reason: &str, problem: &str) -> Value {
    let mut hasher = DefaultHasher::new();
    (uid, problem).hash(&mut hasher);
    let now = clock::wall().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"name": format!("{name}.{:016x}", hasher.finish()), "namespace": namespace},
        "involvedObject": {"apiVersion": format!("{GROUP}/{VERSION}"), "kind": "Device", "namespace": namespace, "name": name, "uid": uid},
        "type": "Warning", "reason": reason, "message": problem, "count": 1, "firstTimestamp": now, "lastTimestamp": now,
        "source": {"component": "cloudcore"}, "reportingComponent": "cloudcore", "reportingInstance": "cloudcore",
    })
}
