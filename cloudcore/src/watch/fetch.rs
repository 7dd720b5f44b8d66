//! Gets the ConfigMaps and Secrets that some node needs, each once however many nodes do: one by one, or by lists in parts where many of a
//! namespace are needed at once, as when cloudcore starts.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use kube::ResourceExt as _;
use skerry_proto::sync::Collection;
use tracing::{debug, warn};

use crate::apiserver::{Apiserver, Kind, Verdict, backoff, verdict};
use crate::backend_k8s::Shared;
use crate::closure::{Reference, Source};
use crate::retry::chain;

/// Requests for single objects under way at once.
const AT_ONCE: usize = 16;
/// From so many of one namespace on they are listed.
const BULK: usize = 100;
/// Lists under way at once: each holds a part in memory.
const LISTS: usize = 2;
/// Objects in one part of a list: 100 MB if all are as large as they may be.
const PART: u32 = 100;
/// A list of so many times what is needed is given up.
const WASTE: usize = 8;

/// Fetches what is needed, for ever.
pub(crate) async fn run(api: Apiserver, shared: Arc<Shared>) {
    // Before that, only a part of what is needed is known, and a list for each part would be one too many.
    shared.until_ready(Source::Pods).await;
    shared.closures().fetches_abandoned();
    let mut under_way = FuturesUnordered::new();
    let mut lists = FuturesUnordered::new();
    // What a list did not bring.
    let mut singly: VecDeque<Reference> = VecDeque::new();
    let mut retries = FuturesUnordered::new();
    let mut failures: HashMap<Reference, u32> = HashMap::new();
    // Looking for what is better listed takes a look at all that waits: only when there is more of it.
    let mut more = true;
    loop {
        while more
            && lists.len() < LISTS
            && let Some((collection, namespace, wanted)) = shared.closures().take_bulk(BULK)
        {
            lists.push(list(&api, &shared, collection, namespace, wanted));
        }
        more &= lists.len() == LISTS;
        while under_way.len() < AT_ONCE {
            let Some(reference) = singly.pop_front().or_else(|| shared.closures().take_fetch()) else { break };
            let api = &api;
            under_way.push(async move {
                let kind = kind(reference.0);
                let (namespace, name) = reference.1.split_once('/').unwrap_or_default();
                let answer = api.get(kind, namespace, name).await;
                (kind, answer, reference)
            });
        }
        tokio::select! {
            Some(rest) = lists.next(), if !lists.is_empty() => singly.extend(rest),
            Some((kind, answer, reference)) = under_way.next(), if !under_way.is_empty() => match answer {
                Ok(found) => {
                    failures.remove(&reference);
                    shared.closures().fetched(&reference, Ok(found.map(|object| kind.json(&object))));
                }
                // A name no object can have.
                Err(kube::Error::BuildRequest(_)) => shared.closures().fetched(&reference, Ok(None)),
                Err(error) => {
                    let attempt = failures.entry(reference.clone()).or_default();
                    let after = if let Verdict::Later(Some(after)) = verdict(&error) { after } else { Duration::ZERO };
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
            () = shared.fetch_wake().notified() => more = true,
        }
    }
}

/// Answers what has to be asked for singly: what the list did not show, for it may be newer than the list, and all that is left when the list
/// fails or turns out to be much longer than what is wanted.
async fn list(
    api: &Apiserver,
    shared: &Shared,
    collection: Collection,
    namespace: String,
    mut wanted: HashSet<Reference>,
) -> HashSet<Reference> {
    let kind = kind(collection);
    let most = wanted.len() * WASTE;
    let (mut from, mut seen) = (None, 0);
    while !wanted.is_empty() {
        let part = match api.list_part(kind, &namespace, PART, from.as_deref()).await {
            Ok(part) => part,
            Err(error) => {
                debug!(resource = kind.plural(), namespace, "the list broke off: {}", chain(&error));
                break;
            }
        };
        seen += part.items.len();
        let remaining = part.metadata.remaining_item_count.unwrap_or_default();
        for object in part.items {
            let reference = (collection, format!("{namespace}/{}", object.name_any()));
            if wanted.remove(&reference) {
                shared.closures().fetched(&reference, Ok(Some(kind.json(&object))));
            }
        }
        from = part.metadata.continue_.filter(|token| !token.is_empty());
        if from.is_none() || seen + usize::try_from(remaining).unwrap_or_default() > most {
            break;
        }
    }
    wanted
}

fn kind(collection: Collection) -> Kind {
    if collection == Collection::Secrets { Kind::Secret } else { Kind::ConfigMap }
}
