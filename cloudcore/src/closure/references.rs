//! What a pod needs on its node besides itself, read off its JSON.

use std::collections::BTreeSet;

use serde_json::Value;
use skerry_proto::sync::Collection;

use crate::sa_tokens::TokenRequest;

/// An object by collection and key.
pub(crate) type Reference = (Collection, String);

/// Everything one pod refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct References {
    /// ConfigMaps, Secrets and the RuntimeClass; each once, sorted.
    pub(crate) objects: Box<[Reference]>,
    /// The namespace whose Services become environment variables.
    pub(crate) service_namespace: Option<String>,
    /// Service account tokens to mint.
    pub(crate) tokens: Vec<TokenRequest>,
}

/// Reads them off a pod.
pub(crate) fn references(pod: &Value) -> References {
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
    let spec = &pod["spec"];
    let mut found = Finder { namespace, objects: BTreeSet::new() };
    let mut tokens: Vec<TokenRequest> = Vec::new();

    for container in
        ["initContainers", "containers", "ephemeralContainers"].into_iter().flat_map(|list| items(&spec[list]))
    {
        for variable in items(&container["env"]) {
            found.config_map(&variable["valueFrom"]["configMapKeyRef"]["name"]);
            found.secret(&variable["valueFrom"]["secretKeyRef"]["name"]);
        }
        for source in items(&container["envFrom"]) {
            found.config_map(&source["configMapRef"]["name"]);
            found.secret(&source["secretRef"]["name"]);
        }
    }
    for volume in items(&spec["volumes"]) {
        found.config_map(&volume["configMap"]["name"]);
        found.secret(&volume["secret"]["secretName"]);
        found.secret(&volume["azureFile"]["secretName"]);
        found.secret_refs(volume);
        for source in items(&volume["projected"]["sources"]) {
            found.config_map(&source["configMap"]["name"]);
            found.secret(&source["secret"]["name"]);
            if source["serviceAccountToken"].is_object() {
                let request = token_request(pod, namespace, &source["serviceAccountToken"]);
                if !tokens.contains(&request) {
                    tokens.push(request);
                }
            }
        }
    }
    for secret in items(&spec["imagePullSecrets"]) {
        found.secret(&secret["name"]);
    }
    let mut objects = found.objects;
    if let Some(class) = filled(&spec["runtimeClassName"]) {
        objects.insert((Collection::RuntimeClasses, class.to_owned()));
    }
    let service_namespace = (spec["enableServiceLinks"].as_bool() != Some(false)).then(|| namespace.to_owned());
    References { objects: objects.into_iter().collect(), service_namespace, tokens }
}

fn token_request(pod: &Value, namespace: &str, source: &Value) -> TokenRequest {
    TokenRequest {
        namespace: namespace.to_owned(),
        pod: pod["metadata"]["name"].as_str().unwrap_or_default().to_owned(),
        pod_uid: pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned(),
        service_account: filled(&pod["spec"]["serviceAccountName"]).unwrap_or("default").to_owned(),
        audience: source["audience"].as_str().unwrap_or_default().to_owned(),
        expiration_seconds: source["expirationSeconds"].as_i64().unwrap_or(3600),
    }
}

struct Finder<'a> {
    namespace: &'a str,
    objects: BTreeSet<Reference>,
}

impl Finder<'_> {
    fn config_map(&mut self, name: &Value) {
        self.add(Collection::ConfigMaps, name);
    }

    fn secret(&mut self, name: &Value) {
        self.add(Collection::Secrets, name);
    }

    fn add(&mut self, collection: Collection, name: &Value) {
        if let Some(name) = filled(name) {
            self.objects.insert((collection, format!("{}/{name}", self.namespace)));
        }
    }

    /// csi, flexVolume, cephfs, rbd, iscsi, scaleIO, storageos: all name their secret in a field called this way.
    fn secret_refs(&mut self, value: &Value) {
        let Value::Object(fields) = value else { return };
        for (name, field) in fields {
            match name.as_str() {
                "secretRef" | "nodePublishSecretRef" => self.secret(&field["name"]),
                _ => self.secret_refs(field),
            }
        }
    }
}

fn items(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

fn filled(name: &Value) -> Option<&str> {
    name.as_str().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_place_that_can_refer_is_read() {
        let pod = json!({
            "metadata": {"namespace": "n", "name": "p", "uid": "u"},
            "spec": {
                "runtimeClassName": "kata",
                "imagePullSecrets": [{"name": "pull"}, {"name": ""}],
                "initContainers": [{"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s-init", "key": "k"}}}]}],
                "containers": [{
                    "env": [{"name": "A", "value": "x"}, {"name": "B", "valueFrom": {"configMapKeyRef": {"name": "c-env", "key": "k"}}}],
                    "envFrom": [{"configMapRef": {"name": "c-from"}}, {"secretRef": {"name": "s-from"}}],
                }],
                "ephemeralContainers": [{"envFrom": [{"secretRef": {"name": "s-debug"}}]}],
                "volumes": [
                    {"name": "1", "configMap": {"name": "c-vol"}},
                    {"name": "2", "secret": {"secretName": "s-vol"}},
                    {"name": "3", "projected": {"sources": [
                        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                        {"configMap": {"name": "kube-root-ca.crt"}},
                        {"secret": {"name": "s-proj"}},
                        {"downwardAPI": {"items": []}},
                        {"clusterTrustBundle": {"name": "ignored"}},
                        {"serviceAccountToken": {"audience": "vault", "path": "vault"}},
                    ]}},
                    {"name": "4", "csi": {"driver": "d", "nodePublishSecretRef": {"name": "s-csi"}}},
                    {"name": "5", "flexVolume": {"secretRef": {"name": "s-flex"}}},
                    {"name": "6", "azureFile": {"secretName": "s-azure"}},
                    {"name": "7", "emptyDir": {}},
                ],
            },
        });
        let found = references(&pod);
        let keys: Vec<String> =
            found.objects.iter().map(|(collection, key)| format!("{} {key}", collection.as_str_name())).collect();
        insta::assert_snapshot!(keys.join("\n"), @r"
        COLLECTION_CONFIG_MAPS n/c-env
        COLLECTION_CONFIG_MAPS n/c-from
        COLLECTION_CONFIG_MAPS n/c-vol
        COLLECTION_CONFIG_MAPS n/kube-root-ca.crt
        COLLECTION_SECRETS n/pull
        COLLECTION_SECRETS n/s-azure
        COLLECTION_SECRETS n/s-csi
        COLLECTION_SECRETS n/s-debug
        COLLECTION_SECRETS n/s-flex
        COLLECTION_SECRETS n/s-from
        COLLECTION_SECRETS n/s-init
        COLLECTION_SECRETS n/s-proj
        COLLECTION_SECRETS n/s-vol
        COLLECTION_RUNTIME_CLASSES kata
        ");
        assert_eq!(found.service_namespace.as_deref(), Some("n"));
        let tokens: Vec<String> = found.tokens.iter().map(TokenRequest::key).collect();
        assert_eq!(tokens, ["n/u/3607/", "n/u/3600/vault"]);
        assert_eq!(found.tokens[0].service_account, "default");
    }

    #[test]
    fn no_service_links_means_no_namespace() {
        let pod = json!({"metadata": {"namespace": "n"}, "spec": {"enableServiceLinks": false}});
        assert_eq!(references(&pod), References::default());
    }
}
