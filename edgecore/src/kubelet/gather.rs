//! Reads from the store what a pod refers to. Everything is local: no remote call is on the path of a pod's start.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Container, Pod, Service};
use serde::de::DeserializeOwned;
use skerry_proto::payload::{Token, token_key};
use skerry_proto::sync::Collection;
use tracing::warn;

use super::references::References;
use crate::store::{Error, Row, Store};

/// The lifetime that a service account token has unless its volume says otherwise, in seconds.
const TOKEN_SECONDS: i64 = 3600;

/// Keys of what a pod refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    namespace: String,
    config_maps: BTreeSet<String>,
    secrets: BTreeSet<String>,
    tokens: BTreeSet<String>,
}

impl Needs {
    /// What this pod refers to, from every kind of container and volume.
    pub fn of(pod: &Pod) -> Self {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let mut needs = Self { namespace, ..Self::default() };
        let Some(spec) = &pod.spec else { return needs };
        for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
            needs.add_container(container);
        }
        for container in spec.ephemeral_containers.iter().flatten() {
            let (env, env_from) = (container.env.clone(), container.env_from.clone());
            needs.add_container(&Container { env, env_from, ..Container::default() });
        }
        for secret in spec.image_pull_secrets.iter().flatten() {
            needs.secrets.insert(secret.name.clone());
        }
        for volume in spec.volumes.iter().flatten() {
            needs.config_maps.extend(volume.config_map.iter().map(|source| source.name.clone()));
            needs.secrets.extend(volume.secret.iter().filter_map(|source| source.secret_name.clone()));
            for source in volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten()) {
                needs.config_maps.extend(source.config_map.iter().map(|source| source.name.clone()));
                needs.secrets.extend(source.secret.iter().map(|source| source.name.clone()));
                needs.tokens.extend(source.service_account_token.iter().map(|token| {
                    let audience = token.audience.as_deref().unwrap_or_default();
                    let seconds = token.expiration_seconds.unwrap_or(TOKEN_SECONDS);
                    token_key(&needs.namespace, &uid, audience, seconds)
                }));
            }
        }
        needs
    }

    /// Whether a change of this row concerns the pod while it runs.
    pub fn concern(&self, collection: Collection, key: &str) -> bool {
        let name = || key.strip_prefix(self.namespace.as_str()).and_then(|rest| rest.strip_prefix('/'));
        match collection {
            Collection::ConfigMaps => name().is_some_and(|name| self.config_maps.contains(name)),
            Collection::Secrets => name().is_some_and(|name| self.secrets.contains(name)),
            Collection::Tokens => self.tokens.contains(key),
            Collection::Unspecified
            | Collection::Settings
            | Collection::Node
            | Collection::Pods
            | Collection::Services
            | Collection::RuntimeClasses
            | Collection::Devices
            | Collection::DeviceModels => false,
        }
    }

    /// Reads what the store holds of it. What is missing is absent; what cannot be parsed is absent and logged.
    pub async fn read(&self, store: &Store) -> Result<References, Error> {
        let mut references = References::default();
        let full = |name: &String| format!("{}/{name}", self.namespace);
        for name in &self.config_maps {
            if let Some(row) = newest(store, Collection::ConfigMaps, &full(name)).await? {
                references.config_maps.extend(parse(&row).map(|object| (name.clone(), object)));
            }
        }
        for name in &self.secrets {
            if let Some(row) = newest(store, Collection::Secrets, &full(name)).await? {
                references.secrets.extend(parse(&row).map(|object| (name.clone(), object)));
            }
        }
        for key in &self.tokens {
            if let Some(row) = newest(store, Collection::Tokens, key).await? {
                references.tokens.extend(parse::<Token>(&row).map(|token| (key.clone(), token)));
            }
        }
        let own = format!("{}/", self.namespace);
        for row in store.list(Collection::Services).await? {
            if row.entry.key.starts_with(&own) || row.entry.key == "default/kubernetes" {
                references.services.extend(parse::<Service>(&row));
            }
        }
        Ok(references)
    }

    fn add_container(&mut self, container: &Container) {
        for source in container.env_from.iter().flatten() {
            self.config_maps.extend(source.config_map_ref.iter().map(|reference| reference.name.clone()));
            self.secrets.extend(source.secret_ref.iter().map(|reference| reference.name.clone()));
        }
        for source in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
            self.config_maps.extend(source.config_map_key_ref.iter().map(|reference| reference.name.clone()));
            self.secrets.extend(source.secret_key_ref.iter().map(|reference| reference.name.clone()));
        }
    }
}

/// Reads an object of the store; one that cannot be parsed is logged and counts as missing.
pub fn parse<T: DeserializeOwned>(row: &Row) -> Option<T> {
    match serde_json::from_slice(&row.json) {
        Ok(object) => Some(object),
        Err(error) => {
            warn!(key = row.entry.key, %error, "an object in the store cannot be read");
            None
        }
    }
}

/// The row of this key; while an old UID of the name is on its way out, the one that was created last.
async fn newest(store: &Store, collection: Collection, key: &str) -> Result<Option<Row>, Error> {
    let mut rows = store.named(collection, key).await?;
    if rows.len() < 2 {
        return Ok(rows.pop());
    }
    // RFC 3339 in UTC sorts as text.
    Ok(rows.into_iter().max_by_key(|row| {
        let object: Option<serde_json::Value> = parse(row);
        object.and_then(|object| Some(object["metadata"]["creationTimestamp"].as_str()?.to_owned()))
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_place_that_refers_to_something_is_found() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "shop", "uid": "u1"},
            "spec": {
                "imagePullSecrets": [{"name": "s-pull"}],
                "initContainers": [{"name": "i", "envFrom": [{"configMapRef": {"name": "c-from"}}, {"secretRef": {"name": "s-from"}}]}],
                "containers": [{"name": "c", "env": [
                    {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "c-key", "key": "k"}}},
                    {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s-key", "key": "k"}}},
                ]}],
                "ephemeralContainers": [{"name": "e", "envFrom": [{"configMapRef": {"name": "c-debug"}}]}],
                "volumes": [
                    {"name": "1", "configMap": {"name": "c-vol"}},
                    {"name": "2", "secret": {"secretName": "s-vol"}},
                    {"name": "3", "projected": {"sources": [
                        {"configMap": {"name": "kube-root-ca.crt"}},
                        {"secret": {"name": "s-proj"}},
                        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
                        {"serviceAccountToken": {"path": "vault", "audience": "vault"}},
                    ]}},
                ],
            },
        }))
        .unwrap();
        let needs = Needs::of(&pod);
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        assert_eq!(needs.config_maps, set(&["c-debug", "c-from", "c-key", "c-vol", "kube-root-ca.crt"]));
        assert_eq!(needs.secrets, set(&["s-from", "s-key", "s-proj", "s-pull", "s-vol"]));
        assert_eq!(needs.tokens, set(&["shop/u1/3600/vault", "shop/u1/3607/"]));
        assert!(needs.concern(Collection::ConfigMaps, "shop/c-vol"));
        assert!(!needs.concern(Collection::ConfigMaps, "shopper/c-vol"));
        assert!(!needs.concern(Collection::Secrets, "shop/c-vol"));
        assert!(needs.concern(Collection::Tokens, "shop/u1/3607/"));
    }
}
