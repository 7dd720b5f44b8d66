//! Who this node is: its key, its certificate, and the CAs it trusts, in `<data-dir>/identity`.
//!
//! The certificate file is the commit point of every change: a new key waits as `node.key.new` until the certificate that belongs to
//! it is in place. Whatever moment a power cut picks, either the old identity is there or the new one. Nothing damaged is ever
//! overwritten: a person decides.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use rcgen::{CertificateParams, DnType, KeyPair, PublicKeyData as _};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::files;

pub mod renew;
#[cfg(test)]
pub(crate) mod tests;

/// Name of the directory in the data directory.
pub const DIR: &str = "identity";
const CERTIFICATE: &str = "node.crt";
const KEY: &str = "node.key";
const NEW_KEY: &str = "node.key.new";
const CA: &str = "ca.crt";
/// What the names of its files begin with.
pub const FILES: [&str; 3] = [CERTIFICATE, KEY, CA];
/// What every node's common name begins with.
const NODE_PREFIX: &str = "system:node:";

/// A node's key, certificate and trust.
#[derive(Clone)]
pub struct Identity {
    /// The node name its certificate is for.
    pub node: String,
    /// Beginning of its validity.
    pub not_before: Timestamp,
    /// End of its validity.
    pub not_after: Timestamp,
    certificate: String,
    key: String,
    ca: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("node", &self.node).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// Why there is no usable identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read or written.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// A file's content is no use.
    #[error("{path} is damaged: {cause}; restore it from a backup, or run `edgecore reset` and join again")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// Key and certificate are not a pair.
    #[error(
        "{certificate} does not belong to {key}; restore both from one backup, or run `edgecore reset` and join again"
    )]
    Mismatch {
        /// Which certificate.
        certificate: PathBuf,
        /// Which key.
        key: PathBuf,
    },
    /// What the cloud sent cannot be an identity.
    #[error("the cloud sent an unusable certificate: {0}")]
    Unusable(String),
    /// TLS does not take what is on the disk.
    #[error("this node's certificate, key or CA cannot be used: {0}; run `edgecore reset` and join again")]
    Tls(String),
    /// A key cannot be made.
    #[error("cannot make a key: {0}")]
    Key(String),
}

impl Identity {
    /// Reads the identity of a data directory; `None` if the box was never joined. Finishes a change that was interrupted.
    pub fn load(data_dir: &Path) -> Result<Option<Self>, IdentityError> {
        let dir = data_dir.join(DIR);
        let Some(certificate) = read(&dir.join(CERTIFICATE))? else { return Ok(None) };
        let missing = |name: &str| IdentityError::Damaged { path: dir.join(name), cause: "it is missing".to_owned() };
        let key = read(&dir.join(KEY))?;
        let new = read(&dir.join(NEW_KEY))?;
        let ca = read(&dir.join(CA))?.ok_or_else(|| missing(CA))?;
        if key.is_none() && new.is_none() {
            return Err(missing(KEY));
        }
        let public =
            public_key(&certificate).map_err(|cause| IdentityError::Damaged { path: dir.join(CERTIFICATE), cause })?;
        let fits = |pem: &Option<String>| {
            pem.as_ref()
                .is_some_and(|pem| KeyPair::from_pem(pem).is_ok_and(|key| key.subject_public_key_info() == public))
        };
        if !fits(&key) && fits(&new) {
            files::rename(&dir.join(NEW_KEY), &dir.join(KEY)).map_err(io("put in place", &dir.join(KEY)))?;
            return Self::parse(&dir, certificate, new.unwrap_or_default(), ca).map(Some);
        }
        let key = key.ok_or_else(|| missing(KEY))?;
        if let Err(error) = KeyPair::from_pem(&key) {
            return Err(IdentityError::Damaged { path: dir.join(KEY), cause: error.to_string() });
        }
        if !fits(&Some(key.clone())) {
            return Err(IdentityError::Mismatch { certificate: dir.join(CERTIFICATE), key: dir.join(KEY) });
        }
        Self::parse(&dir, certificate, key, ca).map(Some)
    }

    fn parse(dir: &Path, certificate: String, key: String, ca: String) -> Result<Self, IdentityError> {
        let damaged = |name: &str, cause: String| IdentityError::Damaged { path: dir.join(name), cause };
        let (node, not_before, not_after) = describe(&certificate).map_err(|cause| damaged(CERTIFICATE, cause))?;
        if authorities(&ca).map_err(|cause| damaged(CA, cause))?.is_empty() {
            return Err(damaged(CA, "there is no certificate in it".to_owned()));
        }
        Ok(Self { node, not_before, not_after, certificate, key, ca })
    }

    /// Puts a certificate from the cloud, its key (from [`pending_key`]) and the CAs in place, durably.
    pub fn install(data_dir: &Path, certificate: &str, key: &KeyPair, ca: &str) -> Result<Self, IdentityError> {
        let dir = data_dir.join(DIR);
        let public = public_key(certificate).map_err(IdentityError::Unusable)?;
        if key.subject_public_key_info() != public {
            return Err(IdentityError::Unusable("it is for another key".to_owned()));
        }
        let identity = Self::parse(&dir, certificate.to_owned(), key.serialize_pem(), ca.to_owned()).map_err(
            |error| match error {
                IdentityError::Damaged { cause, .. } => IdentityError::Unusable(cause),
                error => error,
            },
        )?;
        make_dir(&dir)?;
        let put = |name: &str, content: &str| {
            files::write(&dir.join(name), content.as_bytes(), 0o600).map_err(io("write", &dir.join(name)))
        };
        put(NEW_KEY, &identity.key)?;
        put(CA, ca)?;
        put(CERTIFICATE, certificate)?;
        files::rename(&dir.join(NEW_KEY), &dir.join(KEY)).map_err(io("put in place", &dir.join(KEY)))?;
        Ok(identity)
    }

    /// The CAs it trusts.
    pub fn authorities(&self) -> Vec<CertificateDer<'static>> {
        authorities(&self.ca).unwrap_or_default()
    }

    /// TLS as this node: the pinned CAs, nothing else, and the client certificate.
    pub fn client_config(&self) -> Result<Arc<rustls::ClientConfig>, IdentityError> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(self.certificate.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|error| IdentityError::Tls(error.to_string()))?;
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes())
            .map_err(|error| IdentityError::Key(error.to_string()))?;
        let config = builder(&self.ca)?
            .with_client_auth_cert(chain, key)
            .map_err(|error| IdentityError::Tls(error.to_string()))?;
        Ok(Arc::new(config))
    }
}

/// TLS as nobody, trusting only these CAs.
pub fn anonymous_config(ca: &str) -> Result<Arc<rustls::ClientConfig>, IdentityError> {
    Ok(Arc::new(builder(ca)?.with_no_client_auth()))
}

fn builder(
    ca: &str,
) -> Result<rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert>, IdentityError> {
    let mut roots = rustls::RootCertStore::empty();
    for authority in authorities(ca).map_err(IdentityError::Tls)? {
        roots.add(authority).map_err(|error| IdentityError::Tls(error.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| IdentityError::Tls(error.to_string()))?;
    Ok(builder.with_root_certificates(roots))
}

/// The key for the next certificate. One that an interrupted attempt left is taken again, so that the cloud sees the same request.
pub fn pending_key(data_dir: &Path) -> Result<KeyPair, IdentityError> {
    let dir = data_dir.join(DIR);
    let path = dir.join(NEW_KEY);
    if let Some(pem) = read(&path)?
        && let Ok(key) = KeyPair::from_pem(&pem)
    {
        return Ok(key);
    }
    let key = KeyPair::generate().map_err(|error| IdentityError::Key(error.to_string()))?;
    make_dir(&dir)?;
    files::write(&path, key.serialize_pem().as_bytes(), 0o600).map_err(io("write", &path))?;
    Ok(key)
}

/// A certificate signing request as PEM. The server takes nothing of it but the key.
pub fn request(node: &str, key: &KeyPair) -> Result<String, IdentityError> {
    let failed = |error: rcgen::Error| IdentityError::Key(error.to_string());
    let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, format!("{NODE_PREFIX}{node}"));
    params.serialize_request(key).and_then(|request| request.pem()).map_err(failed)
}

/// The certificates in a PEM text.
pub fn authorities(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().map_err(|error| error.to_string())
}

fn describe(pem: &str) -> Result<(String, Timestamp, Timestamp), String> {
    let der = first(pem)?;
    let (_, certificate) = X509Certificate::from_der(&der).map_err(|error| error.to_string())?;
    let name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    let node = name.and_then(|name| name.strip_prefix(NODE_PREFIX)).ok_or("it is not a node's certificate")?;
    let at =
        |time: x509_parser::time::ASN1Time| Timestamp::from_second(time.timestamp()).map_err(|error| error.to_string());
    Ok((node.to_owned(), at(certificate.validity().not_before)?, at(certificate.validity().not_after)?))
}

fn public_key(pem: &str) -> Result<Vec<u8>, String> {
    let der = first(pem)?;
    let (_, certificate) = X509Certificate::from_der(&der).map_err(|error| error.to_string())?;
    Ok(certificate.public_key().raw.to_vec())
}

fn first(pem: &str) -> Result<CertificateDer<'static>, String> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| error.to_string())
}

fn make_dir(dir: &Path) -> Result<(), IdentityError> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io("make", dir))
}

fn read(path: &Path) -> Result<Option<String>, IdentityError> {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8(bytes)
            .map(Some)
            .map_err(|_| IdentityError::Damaged { path: path.to_owned(), cause: "it is not text".to_owned() }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io("read", path)(error)),
    }
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> IdentityError {
    let path = path.to_owned();
    move |source| IdentityError::Io { action, path, source }
}
