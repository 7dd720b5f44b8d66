//! Lists the Services of namespaces that pods on edge nodes begin to use.

use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use kube::ResourceExt as _;
use tracing::{debug, warn};

use crate::apiserver::{Apiserver, Kind, backoff};
use crate::backend_k8s::Shared;
use crate::closure::{NamespaceList, Source};
use crate::retry::chain;

/// Lists under way at once: each holds a part in memory.
const AT_ONCE: usize = 4;
/// Services in one part of a list.
const PART: u32 = 500;

/// Lists what is to be listed, for ever.
pub(crate) async fn run(api: Apiserver, shared: Arc<Shared>) {
    let wake = {
        let mut closures = shared.closures();
        closures.namespaces_abandoned();
        closures.services_wake()
    };
    let mut lists = FuturesUnordered::new();
    loop {
        while lists.len() < AT_ONCE
            && let Some(namespace) = shared.closures().take_namespace()
        {
            lists.push(until_listed(&api, &shared, namespace));
        }
        tokio::select! {
            Some(()) = lists.next(), if !lists.is_empty() => {}
            () = wake.notified() => {}
        }
    }
}

async fn until_listed(api: &Apiserver, shared: &Shared, namespace: NamespaceList) {
    let mut attempt = 0;
    while let Err(error) = list(api, shared, &namespace).await {
        let namespace = &namespace.namespace;
        if attempt == 0 {
            warn!(
                namespace,
                "cannot list the Services, for which new pods wait: {}; trying again until it works",
                chain(&error)
            );
        } else {
            debug!(namespace, "cannot list the Services yet: {}", chain(&error));
        }
        tokio::time::sleep(backoff(attempt, rand::random())).await;
        attempt += 1;
    }
}

/// Until it is complete, or nobody wants it any more.
async fn list(api: &Apiserver, shared: &Shared, list: &NamespaceList) -> Result<(), kube::Error> {
    let mut from = None;
    loop {
        let part = api.list_part(Kind::Service, &list.namespace, PART, from.as_deref()).await?;
        // Of the list's own revision nothing is said: the watch, which tells of what changes, may not come to it for a minute, and an edge that
        // has seen it would wait for that in its next session.
        for service in &part.items {
            let mut closures = shared.closures();
            closures.shows(Source::Services, &service.resource_version().unwrap_or_default());
            if !closures.service_shown(list, Kind::Service.json(service)) {
                return Ok(());
            }
        }
        from = part.metadata.continue_.filter(|token| !token.is_empty());
        if from.is_none() {
            shared.closures().namespace_listed(list);
            return Ok(());
        }
    }
}
