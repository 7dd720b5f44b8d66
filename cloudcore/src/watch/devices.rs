//! Devices and DeviceModels: watched once the apiserver serves them, and whatever becomes of them, nothing else waits for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use kube::ResourceExt;
use kube::api::{DynamicObject, ListParams};
use tracing::warn;

use super::stream::follow;
use super::{Confirming, Sink, Watches};
use crate::apiserver::{Apiserver, Kind, backoff};
use crate::backend_k8s::Shared;
use crate::closure::{DeviceInput, Source};
use crate::retry::chain;
use crate::supervise;

/// Requests for single devices under way at once.
const AT_ONCE: usize = 16;

impl Watches {
    /// Devices, for ever. Which of them matter is known once the nodes are.
    pub(crate) async fn devices(self) {
        self.shared.until_ready(Source::Nodes).await;
        self.follow_devices(Kind::Device, Source::Devices).await;
    }

    /// DeviceModels, for ever.
    pub(crate) async fn device_models(self) {
        self.follow_devices(Kind::DeviceModel, Source::DeviceModels).await;
    }

    async fn follow_devices(self, kind: Kind, source: Source) {
        self.shared.until(|closures| closures.serves_devices()).await;
        let progress = self.progress(source);
        let sink = Devices { watches: self.clone(), kind, source, list: 0 };
        follow(&self.api, kind, self.api.api(kind, ""), ListParams::default(), progress, sink).await;
    }
}

struct Devices {
    watches: Watches,
    kind: Kind,
    source: Source,
    /// Number of the list under way or last complete.
    list: u64,
}

impl Sink<DynamicObject> for Devices {
    fn begin(&mut self) {
        self.list = self.watches.shared.closures().devices_list_begins();
    }

    fn apply(&mut self, object: DynamicObject) {
        there(&self.watches, self.kind, &object, self.list);
    }

    fn delete(&mut self, object: DynamicObject) {
        let key = format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any());
        gone(&self.watches.shared, self.kind, &key, &object.uid().unwrap_or_default());
    }

    fn complete(&mut self, _: &str) {
        let unseen = {
            let mut closures = self.watches.shared.closures();
            closures.source_ready(self.source);
            closures.review_wake().notify_one();
            let unseen = match self.kind {
                Kind::Device => closures.devices_unseen(self.list),
                _ => closures.models_unseen(self.list),
            };
            if unseen.is_empty() {
                return;
            }
            closures.confirming();
            unseen
        };
        let confirming = Confirming(self.watches.shared.clone());
        let (kind, list) = (self.kind, self.list);
        let take = move |watches: &Watches, key: &str, uid: &str, found: Option<&DynamicObject>| {
            if found.and_then(|object| object.metadata.uid.as_deref()) != Some(uid) {
                gone(&watches.shared, kind, key, uid);
            }
            found.into_iter().for_each(|object| there(watches, kind, object, list));
        };
        let confirm = self.watches.clone().confirm((kind, self.source), unseen, confirming, take);
        supervise::spawn("confirm deletions of devices", confirm);
    }
}

fn there(watches: &Watches, kind: Kind, object: &DynamicObject, list: u64) {
    let shared = &watches.shared;
    if kind == Kind::DeviceModel {
        let input = DeviceInput::model(kind.json(object));
        return shared.closures().model_applied(input, list);
    }
    let input = input(shared, object);
    let hidden = input.is_unknown().map(|(node, uid)| (node.to_owned(), uid.to_owned()));
    shared.closures().device_applied(input, list);
    if let Some((node, uid)) = hidden {
        watches.upstream.device_hidden(&node, &uid);
    }
}

fn input(shared: &Shared, device: &DynamicObject) -> DeviceInput {
    let node = device.data["spec"]["nodeName"].as_str().unwrap_or_default();
    let ours = shared.closures().knows(node);
    DeviceInput::device(Kind::Device.json(device), ours)
}

fn gone(shared: &Shared, kind: Kind, key: &str, uid: &str) {
    let mut closures = shared.closures();
    match kind {
        Kind::Device => closures.device_removed(key, uid),
        _ => closures.model_removed(key, uid),
    }
}

/// Fetches the devices that were there before their node was, for ever.
pub(crate) async fn fetch(api: Apiserver, shared: Arc<Shared>) {
    shared.closures().devices_abandoned();
    let wake = shared.closures().device_wake();
    let (mut under_way, mut retries) = (FuturesUnordered::new(), FuturesUnordered::new());
    let mut failures: HashMap<Arc<str>, u32> = HashMap::new();
    let mut again = Vec::new();
    loop {
        while under_way.len() < AT_ONCE {
            let Some(key) = again.pop().or_else(|| shared.closures().take_device()) else { break };
            let api = &api;
            under_way.push(async move {
                let (namespace, name) = key.split_once('/').unwrap_or_default();
                (api.get(Kind::Device, namespace, name).await, key)
            });
        }
        tokio::select! {
            Some((answer, key)) = under_way.next(), if !under_way.is_empty() => match answer {
                Ok(found) => {
                    failures.remove(&key);
                    let found = found.map(|device| {
                        shared.closures().shows(Source::Devices, &device.resource_version().unwrap_or_default());
                        input(&shared, &device)
                    });
                    shared.closures().device_fetched(&key, found);
                }
                Err(error) => {
                    let attempt = failures.entry(key.clone()).or_default();
                    let wait: Duration = backoff(*attempt, rand::random());
                    *attempt += 1;
                    if *attempt == 1 {
                        warn!(device = &*key, "cannot fetch a device: {}; trying again", chain(&error));
                    }
                    retries.push(async move {
                        tokio::time::sleep(wait).await;
                        key
                    });
                }
            },
            Some(key) = retries.next(), if !retries.is_empty() => {
                if shared.closures().is_missing(&key) {
                    again.push(key);
                } else {
                    failures.remove(&key);
                }
            }
            () = wake.notified() => {}
        }
    }
}
