//! The one certificate authority of all replicas, and what it signs.
//!
//! It lives in the Secret `skerry-ca`, made by whoever comes first: create if absent, and read again when another was faster, so that
//! any number of replicas that start at once end with one. Its key never leaves that Secret and this process. What is signed is
//! written here from what cloudcore knows; a certificate signing request contributes its public key and nothing else.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::ObjectMeta;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SerialNumber};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use skerry_proto::EDGE_LABEL;
use time::OffsetDateTime;

use crate::secrets::{SecretError, SecretStore};

pub use self::node::{CertificateError, CsrError, NodeKey, node_of};
pub use self::server::ServerCertificate;

mod node;
mod server;

/// The Secret that holds the CA.
pub const SECRET: &str = "skerry-ca";
/// Annotation of that Secret: the `HOST:PORT` by which edges reach cloudcore, for join commands.
pub const ADDRESS_ANNOTATION: &str = "skerry.dev/advertise-address";

const CERTIFICATE_KEY: &str = "tls.crt";
const PRIVATE_KEY: &str = "tls.key";
const LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
/// A box whose clock lags must not take the CA or the server for not yet valid.
const CLOCK_LAG: Duration = Duration::from_secs(86_400);

/// The CA.
#[derive(Debug)]
pub struct CertificateAuthority {
    issuer: Issuer<'static, KeyPair>,
    certificates: Vec<CertificateDer<'static>>,
    pem: String,
    hash: [u8; 32],
    expires: Timestamp,
}

/// Why there is no CA.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The Secret cannot be read or written.
    #[error("cannot load the CA")]
    Secret(#[from] SecretError),
    /// The Secret holds something else.
    #[error(
        "the CA in the Secret {SECRET} is damaged: {0}; restore the Secret from a backup (deleting it makes a new CA, and every edge node \
         must join again)"
    )]
    Damaged(String),
    /// It is another one than this machine knows.
    #[error(
        "the CA in the Secret {SECRET} is not the one that {file} holds a copy of, so nodes that joined before will not trust it; restore the \
         Secret from a backup, or remove {file} to go on with the new CA and let every edge node join again"
    )]
    Replaced {
        /// The copy.
        file: String,
    },
    /// The CA is missing, and this machine knows that there was one.
    #[error(
        "the Secret {SECRET} is gone, and {file} says that there was a CA; restore the Secret from a backup, or remove {file} to make a new \
         CA and let every edge node join again"
    )]
    Lost {
        /// The copy.
        file: String,
    },
    /// The CA is missing, and nodes joined by it.
    #[error(
        "the Secret {SECRET} is gone, but there are edge nodes, which trust only the CA that was in it; restore the Secret from a backup, or \
         run `kubectl delete nodes -l {EDGE_LABEL}` to make a new CA and let every edge node join again"
    )]
    Orphaned,
    /// The copy cannot be read or written.
    #[error(
        "cannot keep the copy of the CA's certificate in {file}; make the data directory writable or leave --data-dir out"
    )]
    Copy {
        /// The copy.
        file: String,
        /// What went wrong.
        #[source]
        source: std::io::Error,
    },
    /// The cryptography refused.
    #[error("cannot make a certificate")]
    Crypto(#[from] rcgen::Error),
}

impl CaError {
    /// Whether the same call can succeed later with nobody's help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Secret(error) if error.is_transient())
    }
}

impl CertificateAuthority {
    /// Reads the CA, or makes it if there is none. With a data directory, a CA that was lost or replaced is noticed.
    pub async fn load_or_create(
        store: &impl SecretStore,
        data_dir: Option<&Path>,
        now: Timestamp,
    ) -> Result<Self, CaError> {
        let copy = data_dir.map(|dir| dir.join("ca.crt"));
        let known = match &copy {
            Some(file) => read_copy(file)?,
            None => None,
        };
        let secret = match store.read(SECRET).await? {
            Some(secret) => secret,
            None => {
                if let (Some(file), Some(_)) = (&copy, &known) {
                    return Err(CaError::Lost { file: file.display().to_string() });
                }
                match store.create(&Self::generate(now)?).await {
                    Ok(secret) => secret,
                    Err(SecretError::Conflict) => store.read(SECRET).await?.ok_or(SecretError::Conflict)?,
                    Err(error) => return Err(error.into()),
                }
            }
        };
        let authority = Self::from_secret(&secret)?;
        if let Some(file) = &copy {
            match known {
                Some(pem) if pem != authority.pem => {
                    return Err(CaError::Replaced { file: file.display().to_string() });
                }
                Some(_) => {}
                None => write_copy(file, &authority.pem)?,
            }
        }
        Ok(authority)
    }

    /// Reads the CA; `None` if there is none yet.
    pub async fn load(store: &impl SecretStore) -> Result<Option<Self>, CaError> {
        store.read(SECRET).await?.as_ref().map(Self::from_secret).transpose()
    }

    /// The certificates to trust, PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// SHA-256 of the signing certificate's DER SubjectPublicKeyInfo: what join tokens carry.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// When the signing certificate expires.
    pub fn expires(&self) -> Timestamp {
        self.expires
    }

    /// The certificates to trust.
    pub fn roots(&self) -> Result<RootCertStore, rustls::Error> {
        let mut roots = RootCertStore::empty();
        for certificate in &self.certificates {
            roots.add(certificate.clone())?;
        }
        Ok(roots)
    }

    fn generate(now: Timestamp) -> Result<Secret, CaError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "skerry");
        params.distinguished_name.push(DnType::CommonName, "skerry-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(serial());
        validity(&mut params, now, CLOCK_LAG, LIFE);
        let certificate = params.self_signed(&key)?;
        Ok(Secret {
            metadata: ObjectMeta { name: Some(SECRET.to_owned()), ..ObjectMeta::default() },
            type_: Some("kubernetes.io/tls".to_owned()),
            data: Some(BTreeMap::from([
                (CERTIFICATE_KEY.to_owned(), ByteString(certificate.pem().into_bytes())),
                (PRIVATE_KEY.to_owned(), ByteString(key.serialize_pem().into_bytes())),
            ])),
            ..Secret::default()
        })
    }

    fn from_secret(secret: &Secret) -> Result<Self, CaError> {
        let damaged = |what: &str| CaError::Damaged(what.to_owned());
        let part = |name: &str| {
            let bytes = secret.data.as_ref().and_then(|data| data.get(name));
            let bytes = bytes.ok_or_else(|| CaError::Damaged(format!("it has no {name}")))?;
            String::from_utf8(bytes.0.clone()).map_err(|_| CaError::Damaged(format!("{name} is not PEM")))
        };
        let pem = part(CERTIFICATE_KEY)?;
        let key = KeyPair::from_pem(&part(PRIVATE_KEY)?).map_err(|_| damaged("tls.key is not a private key in PEM"))?;
        let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|_| damaged("tls.crt is not certificates in PEM"))?;
        let signing = certificates.first().ok_or_else(|| damaged("tls.crt holds no certificate"))?;
        let (hash, expires) = {
            let (_, parsed) = x509_parser::parse_x509_certificate(signing)
                .map_err(|_| damaged("tls.crt holds no certificate that can be read"))?;
            if !parsed.is_ca() {
                return Err(damaged("the first certificate in tls.crt is not one of a CA"));
            }
            if parsed.public_key().subject_public_key.as_ref() != key.public_key_raw() {
                return Err(damaged("tls.key does not belong to the first certificate in tls.crt"));
            }
            let expires = Timestamp::from_second(parsed.validity().not_after.timestamp());
            (sha256(parsed.public_key().raw), expires.map_err(|_| damaged("the certificate in tls.crt never expires"))?)
        };
        let issuer = Issuer::from_ca_cert_der(signing, key)?;
        Ok(Self { issuer, certificates, pem, hash, expires })
    }
}

/// Writes the address by which edges reach cloudcore where `token create` looks for it.
pub async fn record_address(store: &impl SecretStore, address: &str) -> Result<(), SecretError> {
    let Some(mut secret) = store.read(SECRET).await? else {
        return Err(SecretError::Conflict);
    };
    let annotations = secret.metadata.annotations.get_or_insert_default();
    if annotations.get(ADDRESS_ANNOTATION).is_some_and(|held| held == address) {
        return Ok(());
    }
    annotations.insert(ADDRESS_ANNOTATION.to_owned(), address.to_owned());
    store.replace(&secret).await.map(drop)
}

/// The address that [`record_address`] wrote.
pub async fn recorded_address(store: &impl SecretStore) -> Result<Option<String>, SecretError> {
    let secret = store.read(SECRET).await?;
    Ok(secret.and_then(|secret| secret.metadata.annotations?.remove(ADDRESS_ANNOTATION)))
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
    hash
}

fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    // Positive, and never without a leading digit.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn validity(params: &mut CertificateParams, now: Timestamp, back: Duration, life: Duration) {
    let at = |timestamp: Timestamp| {
        OffsetDateTime::from_unix_timestamp(timestamp.as_second()).unwrap_or(OffsetDateTime::UNIX_EPOCH)
    };
    params.not_before = at(now.saturating_sub(back).unwrap_or(now));
    params.not_after = at(now.saturating_add(life).unwrap_or(now));
}

fn read_copy(file: &Path) -> Result<Option<String>, CaError> {
    match std::fs::read_to_string(file) {
        Ok(pem) => Ok(Some(pem)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CaError::Copy { file: file.display().to_string(), source }),
    }
}

fn write_copy(file: &Path, pem: &str) -> Result<(), CaError> {
    let failed = |source| CaError::Copy { file: file.display().to_string(), source };
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir).map_err(failed)?;
    }
    // Renamed into place, so that a crash leaves no half of it to be compared with.
    let half = file.with_extension("crt.new");
    std::fs::write(&half, pem).and_then(|()| std::fs::rename(&half, file)).map_err(failed)
}

#[cfg(test)]
mod tests;
