//! Installs the CRDs of devices where there are none, and says whether devices are served.
//!
//! What somebody else installed stays as it is, and so does what a newer cloudcore did: only an older revision of our own is replaced.
//! Without the right to install them, or while they do not have the version that is needed, there are no devices and all else goes on.

use std::sync::Arc;
use std::time::Duration;

use hyper::Request;
use hyper::header::{ACCEPT, CONTENT_TYPE};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::ResourceExt as _;
use kube::api::Api;
use serde_json::Value;
use skerry_proto::device::{GROUP, VERSION};
use tracing::{debug, info, warn};

use crate::backend_k8s::Shared;
use crate::retry::chain;

/// The definitions, in the order of [`NAMES`]; made by `schema.rs`.
pub(super) const DEVICES_YAML: &str = include_str!("../../../deploy/devices.yaml");
/// What they are called.
pub(super) const NAMES: [&str; 3] =
    ["devicemodels.devices.kubeedge.io", "devices.devices.kubeedge.io", "devicestatuses.devices.kubeedge.io"];
/// Raised with every change of them that is released.
pub(super) const REVISION: u32 = 1;
/// Where a definition of ours says its revision.
pub(super) const REVISION_ANNOTATION: &str = "skerry.dev/revision";

/// How often it is looked whether devices are served.
const ROUND: Duration = Duration::from_secs(60);
/// The same while they are not.
const SHORT_ROUND: Duration = Duration::from_secs(10);
/// A definition is served some moments after it was taken.
const SETTLING: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(15);

/// What to do about a definition that is there.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// It is ours, and not older.
    Current,
    /// It is ours, of an older revision.
    Older,
    /// Somebody else's.
    Foreign,
}

/// Installs them and tells the closures whether they are served, for ever.
pub(crate) async fn run(client: kube::Client, shared: Arc<Shared>) {
    let mut installed = false;
    let mut told = None;
    loop {
        let mut outcome = served(&client).await;
        let mut remedy = "kubectl apply --server-side -f deploy/devices.yaml".to_owned();
        // What is served may still be an older revision of ours. Once looked at, what is removed was removed on purpose.
        if !installed && let Ok(is_served) = outcome {
            match install(&client).await {
                Ok(changed) => {
                    installed = true;
                    if changed {
                        outcome = settled(&client).await;
                    }
                }
                Err(cause) if is_served => {
                    debug!("cannot look whether the CRDs of devices are current: {cause}");
                    installed = true;
                }
                Err(cause) => remedy = format!("{remedy}, or deploy/rbac.yaml so that cloudcore may: {cause}"),
            }
        }
        // One that does not answer says nothing about what it serves.
        if let Ok(is_served) = outcome
            && told != Some(is_served)
        {
            if is_served {
                info!("devices are served: {GROUP}/{VERSION}");
            } else {
                warn!("the apiserver does not serve {GROUP}/{VERSION}, no devices until it does: {remedy}");
            }
            told = Some(is_served);
            shared.closures().devices_served(is_served);
        }
        tokio::time::sleep(if told == Some(true) { ROUND } else { SHORT_ROUND }).await;
    }
}

/// Whether all three are.
async fn served(client: &kube::Client) -> Result<bool, String> {
    let path = format!("/apis/{GROUP}/{VERSION}");
    let request = Request::get(path).body(Vec::new()).map_err(|error| error.to_string())?;
    match asked(client, request).await {
        Ok(list) => {
            let resources: Vec<&str> =
                list["resources"].as_array().into_iter().flatten().filter_map(|one| one["name"].as_str()).collect();
            Ok(NAMES.iter().all(|name| name.split_once('.').is_some_and(|(plural, _)| resources.contains(&plural))))
        }
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(chain(&error)),
    }
}

async fn settled(client: &kube::Client) -> Result<bool, String> {
    let mut left = PATIENCE;
    loop {
        let outcome = served(client).await;
        if outcome == Ok(true) || left.is_zero() {
            return outcome;
        }
        left = left.saturating_sub(SETTLING);
        tokio::time::sleep(SETTLING).await;
    }
}

/// Answers whether anything had to be.
async fn install(client: &kube::Client) -> Result<bool, String> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut changed = false;
    for (name, definition) in definitions() {
        let there = match tokio::time::timeout(PATIENCE, api.get_metadata_opt(name)).await {
            Ok(there) => there.map_err(|error| chain(&error))?,
            Err(_) => return Err("the apiserver does not answer".to_owned()),
        };
        let found = there.map(|there| found(there.annotations().get(REVISION_ANNOTATION).map(String::as_str)));
        match found {
            Some(Found::Current) => continue,
            Some(Found::Foreign) => {
                debug!(name, "somebody else's CRD is there, and stays");
                continue;
            }
            Some(Found::Older) => info!(name, revision = REVISION, "an older revision of the CRD is replaced"),
            None => info!(name, "the CRD is not there, it is installed"),
        }
        apply(client, name, definition).await.map_err(|error| chain(&error))?;
        changed = true;
    }
    Ok(changed)
}

fn found(revision: Option<&str>) -> Found {
    match revision.map(str::parse::<u32>) {
        None => Found::Foreign,
        Some(Ok(revision)) if revision < REVISION => Found::Older,
        Some(_) => Found::Current,
    }
}

/// By server-side apply, which takes YAML as it is.
async fn apply(client: &kube::Client, name: &str, definition: &str) -> Result<Value, kube::Error> {
    let path = format!(
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}?fieldManager=skerry-cloudcore&force=true"
    );
    let request = Request::patch(path)
        .header(CONTENT_TYPE, "application/apply-patch+yaml")
        .header(ACCEPT, "application/json")
        .body(definition.as_bytes().to_vec())
        .map_err(kube::Error::HttpError)?;
    asked(client, request).await
}

async fn asked(client: &kube::Client, request: Request<Vec<u8>>) -> Result<Value, kube::Error> {
    tokio::time::timeout(PATIENCE, client.request(request))
        .await
        .unwrap_or_else(|_| Err(kube::Error::Service("the apiserver does not answer".into())))
}

fn definitions() -> impl Iterator<Item = (&'static str, &'static str)> {
    NAMES.into_iter().zip(DEVICES_YAML.split("---\n").skip(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_definition_is_a_document_of_its_name() {
        assert_eq!(definitions().count(), NAMES.len());
        for (name, definition) in definitions() {
            assert!(definition.contains(&format!("\n  name: {name}\n")), "{name}");
        }
    }

    #[test]
    fn only_what_is_ours_and_older_is_replaced() {
        assert_eq!(found(None), Found::Foreign);
        assert_eq!(found(Some("0")), Found::Older);
        assert_eq!(found(Some(&REVISION.to_string())), Found::Current);
        assert_eq!(found(Some("4294967295")), Found::Current);
        assert_eq!(found(Some("of tomorrow")), Found::Current);
    }
}
