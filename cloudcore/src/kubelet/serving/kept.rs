//! What is kept over starts, in a Secret of cloudcore's own namespace: the certificate that was signed, and the key of the one that is
//! asked for. Each address of kubelets has its own.

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::ObjectMeta;
use rcgen::KeyPair;

use super::Signed;
use crate::secrets::{SecretError, SecretStore};

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
/// The key whose certificate is not signed yet.
const NEXT_KEY: &str = "next.key";

/// The Secret as it was read or written last.
#[derive(Debug)]
pub(super) struct Kept(Secret);

impl Kept {
    /// Of an address of kubelets.
    pub(super) async fn read(secrets: &impl SecretStore, host: &str) -> Result<Self, SecretError> {
        // An IPv6 address is no name of an object.
        let name = format!("skerry-kubelet-serving-{}", host.to_lowercase().replace(':', "-"));
        let name = name.trim_end_matches(['-', '.']);
        let none = || Secret {
            metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
            ..Secret::default()
        };
        Ok(Self(secrets.read(name).await?.unwrap_or_else(none)))
    }

    /// What was signed, if it can be used.
    pub(super) fn signed(&self) -> Option<Signed> {
        let key = KeyPair::from_pem(&self.text(KEY)?).ok()?;
        Signed::new(self.text(CERTIFICATE)?.as_bytes(), &key).ok()
    }

    /// The key that a certificate is asked for.
    pub(super) fn next_key(&self) -> Option<KeyPair> {
        KeyPair::from_pem(&self.text(NEXT_KEY)?).ok()
    }

    /// Keeps a key to ask for, or none.
    pub(super) async fn keep_key(
        &mut self,
        secrets: &impl SecretStore,
        key: Option<&KeyPair>,
    ) -> Result<(), SecretError> {
        let data = self.0.data.get_or_insert_default();
        match key {
            Some(key) => drop(data.insert(NEXT_KEY.to_owned(), ByteString(key.serialize_pem().into_bytes()))),
            None => drop(data.remove(NEXT_KEY)),
        }
        self.write(secrets).await
    }

    /// Keeps what was signed for the key that was asked for.
    pub(super) async fn keep_signed(&mut self, secrets: &impl SecretStore, pem: &[u8]) -> Result<(), SecretError> {
        let data = self.0.data.get_or_insert_default();
        if let Some(key) = data.remove(NEXT_KEY) {
            data.insert(KEY.to_owned(), key);
            data.insert(CERTIFICATE.to_owned(), ByteString(pem.to_vec()));
        }
        self.write(secrets).await
    }

    async fn write(&mut self, secrets: &impl SecretStore) -> Result<(), SecretError> {
        self.0 = match self.0.metadata.resource_version {
            Some(_) => secrets.replace(&self.0).await?,
            None => secrets.create(&self.0).await?,
        };
        Ok(())
    }

    fn text(&self, key: &str) -> Option<String> {
        String::from_utf8(self.0.data.as_ref()?.get(key)?.0.clone()).ok()
    }
}
