//! Gets the ConfigMaps and Secrets that some node needs, each once however many nodes do.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use skerry_proto::sync::Collection;
use tracing::warn;

use crate::apiserver::{Apiserver, Kind, Verdict, backoff, verdict};
use crate::backend_k8s::Shared;
use crate::retry::chain;

/// Requests under way at once.
const AT_ONCE: usize = 16;

/// Fetches what is needed, for ever.
pub(crate) async fn run(api: Apiserver, shared: Arc<Shared>) {
    shared.closures().fetches_abandoned();
    let mut under_way = FuturesUnordered::new();
    let mut retries = FuturesUnordered::new();
    let mut failures: HashMap<(Collection, String), u32> = HashMap::new();
    loop {
        while under_way.len() < AT_ONCE {
            let Some(reference) = shared.closures().take_fetch() else { break };
            let api = &api;
            under_way.push(async move {
                let kind = if reference.0 == Collection::Secrets { Kind::Secret } else { Kind::ConfigMap };
                let (namespace, name) = reference.1.split_once('/').unwrap_or_default();
                let answer = api.get(kind, namespace, name).await;
                (kind, answer, reference)
            });
        }
        tokio::select! {
            Some((kind, answer, reference)) = under_way.next(), if !under_way.is_empty() => match answer {
                Ok(found) => {
                    failures.remove(&reference);
                    shared.closures().fetched(&reference, Ok(found.map(|object| kind.json(&object))));
                }
                // A name no object can have.
                Err(kube::Error::BuildRequest(_)) => shared.closures().fetched(&reference, Ok(None)),
                Err(error) => {
                    let attempt = failures.entry(reference.clone()).or_default();
                    let after = if let Verdict::Later(Some(after)) = verdict(&error) { after } else { std::time::Duration::ZERO };
                    let wait = backoff(*attempt, rand::random()).max(after);
                    *attempt += 1;
                    if *attempt == 1 {
                        warn!(resource = kind.plural(), key = reference.1, "cannot fetch what a pod refers to: {}; trying again", chain(&error));
                    }
                    shared.closures().fetched(&reference, Err(()));
                    retries.push(async move {
                        tokio::time::sleep(wait).await;
                        reference
                    });
                }
            },
            Some(reference) = retries.next(), if !retries.is_empty() => {
                let mut closures = shared.closures();
                if closures.needs(&reference) {
                    closures.metadata_gone(&reference);
                } else {
                    failures.remove(&reference);
                }
            }
            () = shared.fetch_wake().notified() => {}
        }
    }
}
