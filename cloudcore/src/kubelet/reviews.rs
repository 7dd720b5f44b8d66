//! What the apiserver is asked about whoever asks a kubelet: who a token is, who may do what, and which CA signs clients.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};
use tracing::debug;

use super::authn::ClientAuthorities;
use crate::apiserver::{Apiserver, Kind};
use crate::backend::BackendError;
use crate::watch::{Sink, follow};

/// Where an apiserver tells extensions what it trusts.
const NAMESPACE: &str = "kube-system";
const CONFIG_MAP: &str = "extension-apiserver-authentication";
const CLIENT_CA: &str = "client-ca-file";

/// Whoever has been authenticated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct User {
    /// The name.
    pub(crate) name: String,
    /// Empty where there is none.
    pub(crate) uid: String,
    /// What the authenticator says, and `system:authenticated`.
    pub(crate) groups: Vec<String>,
    /// Whatever else the authenticator says.
    pub(crate) extra: BTreeMap<String, Vec<String>>,
}

/// An apiserver that reviews.
pub(crate) trait Reviews: Send + Sync + 'static {
    /// Who a bearer token is; `None`: nobody.
    fn token(&self, token: &str) -> impl Future<Output = Result<Option<User>, BackendError>> + Send;

    /// Whether the spec of a SubjectAccessReview is allowed.
    fn access(&self, spec: &Value) -> impl Future<Output = Result<bool, BackendError>> + Send;
}

/// [`Reviews`] by an apiserver.
pub(crate) struct ApiserverReviews(pub(crate) Apiserver);

impl Reviews for ApiserverReviews {
    async fn token(&self, token: &str) -> Result<Option<User>, BackendError> {
        let body = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": {"token": token}});
        let failed = |source| BackendError { action: "have the token reviewed".to_owned(), source };
        let review = self.0.create(Kind::TokenReview, "", body).await.map_err(failed)?;
        Ok(user_of(&review.data["status"]))
    }

    async fn access(&self, spec: &Value) -> Result<bool, BackendError> {
        let body = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "metadata": {}, "spec": spec});
        let failed = |source| BackendError { action: "have the access reviewed".to_owned(), source };
        let review = self.0.create(Kind::SubjectAccessReview, "", body).await.map_err(failed)?;
        let status = &review.data["status"];
        Ok(status["allowed"] == true && status["denied"] != true)
    }
}

/// The user of a TokenReview's status.
fn user_of(status: &Value) -> Option<User> {
    let (user, texts) = (&status["user"], |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
    });
    let name = user["username"].as_str().filter(|name| !name.is_empty() && status["authenticated"] == true)?;
    let extra = user["extra"].as_object().into_iter().flatten();
    Some(User {
        name: name.to_owned(),
        uid: user["uid"].as_str().unwrap_or_default().to_owned(),
        groups: texts(&user["groups"]),
        extra: extra.map(|(key, values)| (key.clone(), texts(values))).collect(),
    })
}

/// Keeps the CA of clients what the apiserver says it is, for ever.
pub(crate) async fn follow_client_ca(client: kube::Client, api: Apiserver, authorities: Arc<ClientAuthorities>) {
    let maps: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
    let this = ListParams::default().fields(&format!("metadata.name={CONFIG_MAP}"));
    follow(&api, Kind::ConfigMap, maps, this, None, ClientCa { authorities, seen: false }).await;
}

/// Takes the CA out of the ConfigMap. One that is deleted leaves what it said: the apiserver writes it anew.
struct ClientCa {
    authorities: Arc<ClientAuthorities>,
    /// The list under way shows it.
    seen: bool,
}

impl Sink<ConfigMap> for ClientCa {
    fn of(&self) -> &'static str {
        " of kube-system/extension-apiserver-authentication, by whose CA kubectl logs and exec are let in,"
    }

    fn begin(&mut self) {
        self.seen = false;
    }

    fn apply(&mut self, map: ConfigMap) {
        self.seen = true;
        self.authorities.set(map.data.and_then(|mut data| data.remove(CLIENT_CA)).as_deref());
    }

    fn delete(&mut self, _: ConfigMap) {}

    fn complete(&mut self, _: &str) {
        if !self.seen {
            debug!("there is no ConfigMap {NAMESPACE}/{CONFIG_MAP}: nobody is known by a certificate");
            self.authorities.set(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ca_of_clients_is_what_the_config_map_says() {
        let authorities = Arc::new(ClientAuthorities::default());
        let mut sink = ClientCa { authorities: Arc::clone(&authorities), seen: false };
        let map = |data: Value| -> ConfigMap { serde_json::from_value(json!({"data": data})).unwrap() };
        let pem = |name: &str| {
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
        };
        let (first, second) = (pem("first"), pem("second"));
        let told = || authorities.pem();
        sink.begin();
        assert_eq!(told(), None, "nothing is known before it was said");
        sink.apply(map(json!({ CLIENT_CA: first })));
        sink.complete("");
        assert_eq!(told().as_ref(), Some(&first));
        sink.apply(map(json!({ CLIENT_CA: second })));
        assert_eq!(told().as_ref(), Some(&second));
        // Deleted it stands: the apiserver writes it anew. Unless a whole list does not show it.
        sink.delete(map(json!({})));
        sink.begin();
        assert_eq!(told().as_ref(), Some(&second));
        sink.complete("");
        assert_eq!(told().as_deref(), Some(""));
        sink.begin();
        sink.apply(map(json!({ CLIENT_CA: first })));
        sink.complete("");
        assert_eq!(told().as_ref(), Some(&first));
        // Without the key, nobody signs clients.
        sink.apply(map(json!({ "requestheader-client-ca-file": second })));
        assert_eq!(told().as_deref(), Some(""));
    }

    #[test]
    fn a_review_tells_who_a_token_is() {
        let status = json!({"authenticated": true, "user": {
            "username": "system:serviceaccount:monitoring:prometheus", "uid": "u",
            "groups": ["system:serviceaccounts", "system:authenticated"], "extra": {"node": ["n"]},
        }});
        let user = user_of(&status).unwrap();
        assert_eq!((user.name.as_str(), user.uid.as_str()), ("system:serviceaccount:monitoring:prometheus", "u"));
        assert_eq!(user.groups, ["system:serviceaccounts", "system:authenticated"]);
        assert_eq!(user.extra["node"], ["n"]);
        assert_eq!(user_of(&json!({"authenticated": false, "user": {"username": "x"}})), None);
        assert_eq!(user_of(&json!({"user": {"username": "x"}})), None);
        assert_eq!(user_of(&json!({"authenticated": true, "user": {}})), None);
    }
}
