//! Secrets of cloudcore's own namespace, as the CA and the join tokens need them: read, create, replace what was read, delete, list.
//!
//! A replace carries the resource version that was read, so that of two writers one hears [`SecretError::Conflict`].

use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{DeleteParams, ListParams, ObjectMeta, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt as _};

use crate::apiserver::is_not_found;

const PATIENCE: Duration = Duration::from_secs(15);

/// Why the store of Secrets did not do it.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// It exists already, or was changed or deleted since it was read: read again.
    #[error("another writer was faster")]
    Conflict,
    /// The namespace is not there.
    #[error(
        "the namespace {0} does not exist; create it with `kubectl create namespace {0}`, or name another with --namespace"
    )]
    NoNamespace(String),
    /// RBAC says no.
    #[error("the apiserver does not allow cloudcore to {action}; apply deploy/rbac.yaml, or use credentials that may")]
    Forbidden {
        /// What was tried.
        action: String,
        /// What the apiserver said.
        #[source]
        source: kube::Error,
    },
    /// The apiserver finds fault with it.
    #[error("the apiserver refuses to {action}")]
    Refused {
        /// What was tried.
        action: String,
        /// What the apiserver said.
        #[source]
        source: kube::Error,
    },
    /// The apiserver is away or overloaded.
    #[error("cannot {action}: the apiserver is away or overloaded")]
    Unavailable {
        /// What was tried.
        action: String,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl SecretError {
    /// Whether the same call can succeed later with nobody's help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Conflict)
    }
}

/// Where the Secrets are.
pub trait SecretStore: Send + Sync + 'static {
    /// Reads one.
    fn read(&self, name: &str) -> impl Future<Output = Result<Option<Secret>, SecretError>> + Send;
    /// Creates one; [`SecretError::Conflict`] if it exists.
    fn create(&self, secret: &Secret) -> impl Future<Output = Result<Secret, SecretError>> + Send;
    /// Replaces one; [`SecretError::Conflict`] if it is not as it was read any more.
    fn replace(&self, secret: &Secret) -> impl Future<Output = Result<Secret, SecretError>> + Send;
    /// Deletes this very one; false if it was gone.
    fn delete(&self, secret: &Secret) -> impl Future<Output = Result<bool, SecretError>> + Send;
    /// Those that have a label.
    fn list(&self, label: &str, value: &str) -> impl Future<Output = Result<Vec<Secret>, SecretError>> + Send;
}

/// The apiserver's.
#[derive(Clone)]
pub struct KubeSecrets {
    client: Client,
    api: Api<Secret>,
    namespace: String,
}

impl KubeSecrets {
    /// Those of this namespace.
    pub fn new(client: Client, namespace: &str) -> Self {
        Self { api: Api::namespaced(client.clone(), namespace), client, namespace: namespace.to_owned() }
    }

    /// Creates the namespace; one that exists is fine.
    pub async fn create_namespace(&self) -> Result<(), SecretError> {
        let namespace = Namespace {
            metadata: ObjectMeta { name: Some(self.namespace.clone()), ..ObjectMeta::default() },
            ..Namespace::default()
        };
        let api: Api<Namespace> = Api::all(self.client.clone());
        match self.call("create the namespace", api.create(&PostParams::default(), &namespace)).await {
            Ok(_) | Err(SecretError::Conflict) => Ok(()),
            Err(SecretError::Forbidden { .. }) => Err(SecretError::NoNamespace(self.namespace.clone())),
            Err(other) => Err(other),
        }
    }

    async fn call<T>(&self, action: &str, call: impl Future<Output = kube::Result<T>>) -> Result<T, SecretError> {
        let action = || format!("{action} in {}", self.namespace);
        match tokio::time::timeout(PATIENCE, call).await {
            Err(late) => Err(SecretError::Unavailable { action: action(), source: late.into() }),
            Ok(Ok(value)) => Ok(value),
            Ok(Err(source)) => Err(match api_code(&source) {
                Some(409) => SecretError::Conflict,
                Some(401 | 403) => SecretError::Forbidden { action: action(), source },
                // A 404 or another answer that is not the apiserver's own is that of something before it.
                Some(0 | 429 | 500..) | None => SecretError::Unavailable { action: action(), source: source.into() },
                Some(404) if !is_not_found(&source) => {
                    SecretError::Unavailable { action: action(), source: source.into() }
                }
                Some(_) => SecretError::Refused { action: action(), source },
            }),
        }
    }
}

/// The HTTP status that an apiserver answered with; `None` if it did not answer.
pub fn api_code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

impl SecretStore for KubeSecrets {
    async fn read(&self, name: &str) -> Result<Option<Secret>, SecretError> {
        match self.call(&format!("read the Secret {name}"), self.api.get(name)).await {
            Err(SecretError::Refused { source, .. }) if is_not_found(&source) => Ok(None),
            read => read.map(Some),
        }
    }

    async fn create(&self, secret: &Secret) -> Result<Secret, SecretError> {
        let action = format!("create the Secret {}", secret.name_any());
        match self.call(&action, self.api.create(&PostParams::default(), secret)).await {
            Err(SecretError::Refused { source, .. }) if is_not_found(&source) => {
                Err(SecretError::NoNamespace(self.namespace.clone()))
            }
            done => done,
        }
    }

    async fn replace(&self, secret: &Secret) -> Result<Secret, SecretError> {
        let name = secret.name_any();
        let action = format!("update the Secret {name}");
        match self.call(&action, self.api.replace(&name, &PostParams::default(), secret)).await {
            Err(SecretError::Refused { source, .. }) if is_not_found(&source) => Err(SecretError::Conflict),
            done => done,
        }
    }

    async fn delete(&self, secret: &Secret) -> Result<bool, SecretError> {
        let name = secret.name_any();
        let params = DeleteParams {
            preconditions: Some(Preconditions { uid: secret.uid(), resource_version: None }),
            ..DeleteParams::default()
        };
        match self.call(&format!("delete the Secret {name}"), self.api.delete(&name, &params)).await {
            Ok(_) => Ok(true),
            Err(SecretError::Conflict) => Ok(false),
            Err(SecretError::Refused { source, .. }) if is_not_found(&source) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn list(&self, label: &str, value: &str) -> Result<Vec<Secret>, SecretError> {
        let params = ListParams::default().labels(&format!("{label}={value}"));
        Ok(self.call("list Secrets", self.api.list(&params)).await?.items)
    }
}

/// Secrets in memory, with the apiserver's rules and scripted trouble.
#[cfg(test)]
pub(crate) mod fake {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Mutex, PoisonError};

    use super::*;

    #[derive(Default)]
    pub(crate) struct MemorySecrets {
        rows: Mutex<BTreeMap<String, Secret>>,
        version: AtomicUsize,
        failures: AtomicUsize,
        pub(crate) conflicts: AtomicUsize,
        pub(crate) missing_namespace: bool,
    }

    impl MemorySecrets {
        /// The next `count` calls find the apiserver away.
        pub(crate) fn fail(&self, count: usize) {
            self.failures.store(count, Ordering::SeqCst);
        }

        pub(crate) fn rows(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Secret>> {
            self.rows.lock().unwrap_or_else(PoisonError::into_inner)
        }

        async fn begin(&self) -> Result<(), SecretError> {
            tokio::task::yield_now().await;
            let take = |left: usize| left.checked_sub(1);
            if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok() {
                let source = "connection refused".into();
                return Err(SecretError::Unavailable { action: "answer".to_owned(), source });
            }
            Ok(())
        }

        fn stamp(&self, secret: &Secret) -> Secret {
            let mut secret = secret.clone();
            let version = self.version.fetch_add(1, Ordering::SeqCst) + 1;
            secret.metadata.resource_version = Some(version.to_string());
            secret.metadata.uid.get_or_insert_with(|| format!("uid-{version}"));
            secret
        }

        fn conflict<T>(&self) -> Result<T, SecretError> {
            self.conflicts.fetch_add(1, Ordering::SeqCst);
            Err(SecretError::Conflict)
        }
    }

    impl SecretStore for MemorySecrets {
        async fn read(&self, name: &str) -> Result<Option<Secret>, SecretError> {
            self.begin().await?;
            Ok(self.rows().get(name).cloned())
        }

        async fn create(&self, secret: &Secret) -> Result<Secret, SecretError> {
            self.begin().await?;
            if self.missing_namespace {
                return Err(SecretError::NoNamespace("skerry-system".to_owned()));
            }
            if self.rows().contains_key(&secret.name_any()) {
                return self.conflict();
            }
            let stored = self.stamp(secret);
            self.rows().insert(secret.name_any(), stored.clone());
            Ok(stored)
        }

        async fn replace(&self, secret: &Secret) -> Result<Secret, SecretError> {
            self.begin().await?;
            let held = self.rows().get(&secret.name_any()).and_then(|held| held.metadata.resource_version.clone());
            if held.is_none() || held != secret.metadata.resource_version {
                return self.conflict();
            }
            let stored = self.stamp(secret);
            self.rows().insert(secret.name_any(), stored.clone());
            Ok(stored)
        }

        async fn delete(&self, secret: &Secret) -> Result<bool, SecretError> {
            self.begin().await?;
            Ok(self.rows().remove(&secret.name_any()).is_some())
        }

        async fn list(&self, label: &str, value: &str) -> Result<Vec<Secret>, SecretError> {
            self.begin().await?;
            Ok(self
                .rows()
                .values()
                .filter(|row| row.labels().get(label).is_some_and(|v| v == value))
                .cloned()
                .collect())
        }
    }
}
