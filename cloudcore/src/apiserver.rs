//! Requests to the apiserver: every one is counted, and every failure is sorted into what the caller should do about it.
//!
//! Objects are dynamic: fields this version does not know pass through unharmed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use k8s_openapi::api::authentication::v1::TokenReview;
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Node, Pod, Secret, Service};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions,
};
use kube::core::{ObjectList, Status};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use serde_json::Value;
use skerry_proto::device;

use crate::clock;
use crate::retry::pause;

/// What cloudcore deals with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// core/v1 Pod.
    Pod,
    /// core/v1 Node.
    Node,
    /// core/v1 Service.
    Service,
    /// core/v1 ConfigMap.
    ConfigMap,
    /// core/v1 Secret.
    Secret,
    /// core/v1 Event.
    Event,
    /// node.k8s.io/v1 RuntimeClass.
    RuntimeClass,
    /// coordination.k8s.io/v1 Lease.
    Lease,
    /// authentication.k8s.io/v1 TokenReview, which is only created.
    TokenReview,
    /// authorization.k8s.io/v1 SubjectAccessReview, which is only created.
    SubjectAccessReview,
    /// devices.kubeedge.io/v1beta1 Device.
    Device,
    /// devices.kubeedge.io/v1beta1 DeviceModel.
    DeviceModel,
    /// devices.kubeedge.io/v1beta1 DeviceStatus.
    DeviceStatus,
}

impl Kind {
    /// How kube addresses it.
    pub(crate) fn resource(self) -> ApiResource {
        match self {
            Self::Pod => ApiResource::erase::<Pod>(&()),
            Self::Node => ApiResource::erase::<Node>(&()),
            Self::Service => ApiResource::erase::<Service>(&()),
            Self::ConfigMap => ApiResource::erase::<ConfigMap>(&()),
            Self::Secret => ApiResource::erase::<Secret>(&()),
            Self::Event => ApiResource::erase::<Event>(&()),
            Self::RuntimeClass => ApiResource::erase::<RuntimeClass>(&()),
            Self::Lease => ApiResource::erase::<Lease>(&()),
            Self::TokenReview => ApiResource::erase::<TokenReview>(&()),
            Self::SubjectAccessReview => ApiResource::erase::<SubjectAccessReview>(&()),
            Self::Device => self.of_devices("Device"),
            Self::DeviceModel => self.of_devices("DeviceModel"),
            Self::DeviceStatus => self.of_devices("DeviceStatus"),
        }
    }

    /// The resource's name, for metrics and messages.
    pub(crate) const fn plural(self) -> &'static str {
        match self {
            Self::Pod => "pods",
            Self::Node => "nodes",
            Self::Service => "services",
            Self::ConfigMap => "configmaps",
            Self::Secret => "secrets",
            Self::Event => "events",
            Self::RuntimeClass => "runtimeclasses",
            Self::Lease => "leases",
            Self::TokenReview => "tokenreviews",
            Self::SubjectAccessReview => "subjectaccessreviews",
            Self::Device => "devices",
            Self::DeviceModel => "devicemodels",
            Self::DeviceStatus => "devicestatuses",
        }
    }

    fn of_devices(self, kind: &str) -> ApiResource {
        let (group, version) = (device::GROUP.to_owned(), device::VERSION.to_owned());
        let api_version = format!("{group}/{version}");
        ApiResource { group, version, api_version, kind: kind.to_owned(), plural: self.plural().to_owned() }
    }

    /// The object as plain JSON, with the apiVersion and kind that lists leave out.
    pub(crate) fn json(self, object: &DynamicObject) -> Value {
        let mut value = serde_json::to_value(object).unwrap_or_default();
        if let Value::Object(map) = &mut value {
            let resource = self.resource();
            map.insert("apiVersion".into(), resource.api_version.into());
            map.insert("kind".into(), resource.kind.into());
        }
        value
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    verb: &'static str,
    resource: &'static str,
    code: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReportLabels {
    kind: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

/// What the back of cloudcore counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    requests: Family<RequestLabels, Counter>,
    reports: Family<ReportLabels, Counter>,
    claims: Family<ResultLabels, Counter>,
    tokens: Family<ResultLabels, Counter>,
}

impl Metrics {
    /// Registers them all.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "skerry_apiserver_requests",
            "Requests to the apiserver; code 0: no answer",
            metrics.requests.clone(),
        );
        registry.register("skerry_reports", "Reports of edge nodes by how they ended", metrics.reports.clone());
        registry.register("skerry_claims", "Tries to have a Node name its session", metrics.claims.clone());
        registry.register("skerry_tokens_minted", "Service account token requests", metrics.tokens.clone());
        metrics
    }

    /// A request that ended.
    pub(crate) fn request(&self, verb: &'static str, resource: &'static str, code: u16) {
        self.requests.get_or_create(&RequestLabels { verb, resource, code }).inc();
    }

    /// A report that ended: `taken`, `unchanged`, `gone`, `refused`, `superseded`; or that its edge has back: `later`.
    pub(crate) fn report(&self, kind: &'static str, result: &'static str) {
        self.reports.get_or_create(&ReportLabels { kind, result }).inc();
    }

    /// A try that ended: `taken`; `superseded`, a newer session has the Node; or it is tried again: `refused`, `later`.
    pub(crate) fn claim(&self, result: &'static str) {
        self.claims.get_or_create(&ResultLabels { result }).inc();
    }

    /// How often a try ended so.
    #[cfg(test)]
    pub(crate) fn claims(&self, result: &'static str) -> u64 {
        self.claims.get_or_create(&ResultLabels { result }).get()
    }

    /// A token request that ended.
    pub(crate) fn token(&self, result: &'static str) {
        self.tokens.get_or_create(&ResultLabels { result }).inc();
    }
}

/// What to do about a failed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// There is no such object.
    NotFound,
    /// It changed, exists already, or is another one (409).
    Conflict,
    /// Try again, not before this long if given.
    Later(Option<Duration>),
    /// Forbidden, or not in the apiserver's own words, and why. That passes mostly: an apiserver that starts forbids everything for some
    /// seconds (kubernetes#121635), and what stands before it answers as it likes.
    Doubtful(String),
    /// It will be refused again.
    Refused(String),
}

/// Sorts a failure.
pub(crate) fn verdict(error: &kube::Error) -> Verdict {
    match error {
        kube::Error::Api(_) if is_not_found(error) => Verdict::NotFound,
        kube::Error::Api(status) => match status.code {
            409 => Verdict::Conflict,
            // 401: our own credential is being rotated.
            401 | 408 | 429 | 500.. => Verdict::Later(
                status
                    .details
                    .as_ref()
                    .map(|details| details.retry_after_seconds)
                    .filter(|seconds| *seconds > 0)
                    .map(|seconds| Duration::from_secs(u64::from(seconds))),
            ),
            400 | 413 | 422 => Verdict::Refused(answer(status)),
            // A namespace that is being deleted takes nothing new and will not change its mind.
            403 if has_cause(status, "NamespaceTerminating") => Verdict::Refused(answer(status)),
            _ => Verdict::Doubtful(answer(status)),
        },
        kube::Error::BuildRequest(_) | kube::Error::HttpError(_) => Verdict::Refused(error.to_string()),
        _ => Verdict::Later(None),
    }
}

/// Whether the apiserver itself says that an object, which it names, is not there. A 404 of anything that stands before it says nothing
/// about objects.
pub(crate) fn is_not_found(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else { return false };
    let named = status.details.as_ref().is_some_and(|details| !details.name.is_empty());
    status.code == 404 && status.reason == "NotFound" && named
}

fn has_cause(status: &Status, reason: &str) -> bool {
    status.details.as_ref().is_some_and(|details| details.causes.iter().any(|cause| cause.reason == reason))
}

fn answer(status: &Status) -> String {
    format!("apiserver answered {}: {}", status.code, status.message)
}

/// How long to wait before a request is tried again: [`pause`] from 0.25 s to 30 s.
pub(crate) fn backoff(attempt: u32, spread: f64) -> Duration {
    pause(Duration::from_millis(250), Duration::from_secs(30), attempt, spread)
}

/// What a request may take. Watches are not made here.
const PATIENCE: Duration = Duration::from_secs(15);

/// An apiserver that has taken nothing for so long is out of order: leases alone are written more often.
const OUT_OF_ORDER: Duration = Duration::from_secs(30);

/// A client that counts.
#[derive(Clone)]
pub(crate) struct Apiserver {
    client: kube::Client,
    metrics: Metrics,
    /// When it last took a write, milliseconds of [`clock::monotonic`]; 0: never.
    taken: Arc<AtomicU64>,
}

impl Apiserver {
    pub(crate) fn new(client: kube::Client, metrics: Metrics) -> Self {
        Self { client, metrics, taken: Arc::default() }
    }

    /// Whether it has taken anything of late, of whomever: what it does not take then has the fault itself.
    pub(crate) fn takes_writes(&self) -> bool {
        let last = self.taken.load(Relaxed);
        last > 0 && clock::monotonic().saturating_sub(Duration::from_millis(last)) < OUT_OF_ORDER
    }

    pub(crate) const fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// kube's handle; an empty namespace means all, or none for what has none.
    pub(crate) fn api(&self, kind: Kind, namespace: &str) -> Api<DynamicObject> {
        let resource = kind.resource();
        if namespace.is_empty() {
            Api::all_with(self.client.clone(), &resource)
        } else {
            Api::namespaced_with(self.client.clone(), namespace, &resource)
        }
    }

    /// `None` when there is none.
    pub(crate) async fn get(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
    ) -> Result<Option<DynamicObject>, kube::Error> {
        let answer = self.count("get", kind.plural(), self.api(kind, namespace).get(name)).await;
        match answer {
            Err(error) if verdict(&error) == Verdict::NotFound => Ok(None),
            other => other.map(Some),
        }
    }

    /// An object's version, and nothing else of it; `None` when there is none.
    pub(crate) async fn version(&self, kind: Kind, namespace: &str, name: &str) -> Result<Option<String>, kube::Error> {
        let answer = self.count("get", kind.plural(), self.api(kind, namespace).get_metadata(name)).await;
        match answer {
            Err(error) if verdict(&error) == Verdict::NotFound => Ok(None),
            other => other.map(|found| found.metadata.resource_version),
        }
    }

    pub(crate) async fn list(&self, kind: Kind, fields: &str) -> Result<Vec<DynamicObject>, kube::Error> {
        let params = ListParams::default().fields(fields);
        self.count("list", kind.plural(), self.api(kind, "").list(&params)).await.map(|list| list.items)
    }

    /// A part of all objects of a namespace, and what continues it. The list is as of its first part.
    pub(crate) async fn list_part(
        &self,
        kind: Kind,
        namespace: &str,
        limit: u32,
        from: Option<&str>,
    ) -> Result<ObjectList<DynamicObject>, kube::Error> {
        let mut params = ListParams::default().limit(limit);
        params.continue_token = from.map(str::to_owned);
        self.count("list", kind.plural(), self.api(kind, namespace).list(&params)).await
    }

    pub(crate) async fn create(&self, kind: Kind, namespace: &str, body: Value) -> Result<DynamicObject, kube::Error> {
        let object: DynamicObject = serde_json::from_value(body).map_err(kube::Error::SerdeError)?;
        self.count("create", kind.plural(), self.api(kind, namespace).create(&PostParams::default(), &object)).await
    }

    pub(crate) async fn patch(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        patch: &Patch<Value>,
    ) -> Result<DynamicObject, kube::Error> {
        let (api, params) = (self.api(kind, namespace), PatchParams::default());
        self.count("patch", kind.plural(), api.patch(name, &params, patch)).await
    }

    /// Writes the object as it is to be; its resourceVersion says which one it replaces.
    pub(crate) async fn replace(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        body: Value,
    ) -> Result<DynamicObject, kube::Error> {
        let object: DynamicObject = serde_json::from_value(body).map_err(kube::Error::SerdeError)?;
        let (api, params) = (self.api(kind, namespace), PostParams::default());
        self.count("update", kind.plural(), api.replace(name, &params, &object)).await
    }

    /// Strategic merge patch of the status.
    pub(crate) async fn patch_status(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        patch: Value,
    ) -> Result<DynamicObject, kube::Error> {
        let (api, params, patch) = (self.api(kind, namespace), PatchParams::default(), Patch::Strategic(patch));
        let resource = if kind == Kind::Node { "nodes/status" } else { "pods/status" };
        self.count("patch", resource, api.patch_status(name, &params, &patch)).await
    }

    /// Deletes at once, if it is still the one of this UID.
    pub(crate) async fn delete_now(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        uid: &str,
    ) -> Result<(), kube::Error> {
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: Some(uid.into()), resource_version: None }),
            ..DeleteParams::default()
        };
        self.count("delete", kind.plural(), self.api(kind, namespace).delete(name, &params)).await.map(drop)
    }

    /// `POST serviceaccounts/<name>/token`.
    pub(crate) async fn mint(
        &self,
        namespace: &str,
        service_account: &str,
        request: &Value,
    ) -> Result<Value, kube::Error> {
        let api: Api<k8s_openapi::api::core::v1::ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        let (params, body) = (PostParams::default(), request);
        self.count("create", "serviceaccounts/token", api.create_subresource("token", service_account, &params, body))
            .await
    }

    /// Waits for a request, for no longer than any of ours may take, and counts it.
    async fn count<T>(
        &self,
        verb: &'static str,
        resource: &'static str,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, kube::Error> {
        let answer = tokio::time::timeout(PATIENCE, request).await.unwrap_or_else(|_| {
            let silence = format!("no answer from the apiserver within {} s", PATIENCE.as_secs());
            Err(kube::Error::Service(silence.into()))
        });
        let code = match &answer {
            Ok(_) => 200,
            Err(kube::Error::Api(status)) => status.code,
            Err(_) => 0,
        };
        // Reviews are answered and not kept.
        if answer.is_ok() && !matches!(verb, "get" | "list") && !resource.ends_with("reviews") {
            let now = u64::try_from(clock::monotonic().as_millis()).unwrap_or(u64::MAX);
            self.taken.store(now.max(1), Relaxed);
        }
        self.metrics.request(verb, resource, code);
        answer
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn error(status: Value) -> kube::Error {
        kube::Error::Api(serde_json::from_value::<Status>(status).unwrap().boxed())
    }

    fn answer(code: u16, retry_after: u32) -> kube::Error {
        error(json!({
            "status": "Failure", "code": code, "message": "because", "details": {"retryAfterSeconds": retry_after},
        }))
    }

    #[test]
    fn failures_are_sorted() {
        assert_eq!(verdict(&answer(409, 0)), Verdict::Conflict);
        assert_eq!(verdict(&answer(429, 7)), Verdict::Later(Some(Duration::from_secs(7))));
        assert_eq!(verdict(&answer(401, 0)), Verdict::Later(None));
        assert_eq!(verdict(&answer(503, 0)), Verdict::Later(None));
        assert_eq!(verdict(&answer(422, 0)), Verdict::Refused("apiserver answered 422: because".into()));
        assert_eq!(verdict(&answer(403, 0)), Verdict::Doubtful("apiserver answered 403: because".into()));
        let terminating = json!({"code": 403, "details": {"causes": [{"reason": "NamespaceTerminating"}]}});
        assert!(matches!(verdict(&error(terminating)), Verdict::Refused(_)));
    }

    #[test]
    fn only_the_apiserver_says_that_something_is_not_there() {
        let status = |reason: &str, name: &str| {
            error(json!({"code": 404, "reason": reason, "details": {"name": name, "kind": "nodes"}}))
        };
        assert_eq!(verdict(&status("NotFound", "edge-1")), Verdict::NotFound);
        for other in [status("NotFound", ""), status("Failed to parse error data", "edge-1"), answer(404, 0)] {
            assert!(matches!(verdict(&other), Verdict::Doubtful(_)));
        }
    }
}
