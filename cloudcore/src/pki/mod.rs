//! The one certificate authority of all replicas, and what it signs.
//!
//! It lives in the Secret `skerry-ca`, made by whoever comes first: create if absent, and read again when another was faster, so that
//! any number of replicas that start at once end with one. Its key never leaves that Secret and this process. What is signed is
//! written here from what cloudcore knows; a certificate signing request contributes its public key and nothing else.
//!
//! Long before it ends another takes its place: see [`rotation`].

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt as _;
use kube::api::ObjectMeta;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _,
    SerialNumber,
};
use ring::hmac;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::server::danger::ClientCertVerifier;
use skerry_proto::EDGE_LABEL;
use time::OffsetDateTime;
use x509_parser::time::ASN1Time;

use crate::secrets::{SecretError, SecretStore};

pub use self::current::CurrentAuthority;
pub use self::node::{CertificateError, CsrError, NodeCertificate, NodeKey, Standing, node_of};
pub use self::rotation::Step;
use self::rotation::{Held, Replaced};
pub use self::server::ServerCertificate;

mod clients;
mod current;
mod node;
pub mod rotation;
mod server;

/// The Secret that holds the CA.
pub const SECRET: &str = "skerry-ca";
/// Annotation of that Secret: the `HOST:PORT` by which edges reach cloudcore, for join commands.
pub const ADDRESS_ANNOTATION: &str = "skerry.dev/advertise-address";

/// The certificate of the one that signs; then those that signed before and are trusted still.
const CERTIFICATE_KEY: &str = "tls.crt";
const PRIVATE_KEY: &str = "tls.key";
/// The certificate of the one that signs, signed by the one before, for those who trust only that.
const CROSS_KEY: &str = "cross.crt";
/// When the one that signs began to, if there was one before; RFC 3339.
const SINCE_ANNOTATION: &str = "skerry.dev/ca-signs-since";
/// The one that signs next, trusted already.
const NEXT_CERTIFICATE_KEY: &str = "next.crt";
const NEXT_PRIVATE_KEY: &str = "next.key";
const NEXT_CROSS_KEY: &str = "next.cross.crt";
/// In the data directory: what to trust, to notice that the CA is another one.
const COPY: &str = "ca.crt";
const LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
/// A box whose clock lags must not take the CA or the server for not yet valid.
const CLOCK_LAG: Duration = Duration::from_secs(86_400);

/// The CA as the Secret holds it: the one that signs, those before and after it, which are trusted too.
#[derive(Debug)]
pub struct CertificateAuthority {
    issuer: Issuer<'static, KeyPair>,
    /// All that are trusted; the first is the one that signs.
    certificates: Vec<CertificateDer<'static>>,
    cross: Option<CertificateDer<'static>>,
    pem: String,
    hash: [u8; 32],
    previous_hash: Option<[u8; 32]>,
    held: Held,
    clients: Arc<dyn ClientCertVerifier>,
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
    /// It went away while this cloudcore ran.
    #[error(
        "the Secret {SECRET} is gone; restore it from a backup: this cloudcore goes on with the CA that it holds, but no cloudcore starts \
         with it"
    )]
    Gone,
    /// It became another one while this cloudcore ran.
    #[error(
        "the CA in the Secret {SECRET} is not the one that this cloudcore started with, nor one that followed it; restore the Secret from a \
         backup, or start every cloudcore again to go on with the new CA and let every edge node join again"
    )]
    Swapped,
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
        let copy = data_dir.map(|dir| dir.join(COPY));
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
                Some(pem) if pem == authority.pem => {}
                Some(pem) if !authority.follows(&certificates_in(&pem).unwrap_or_default()) => {
                    return Err(CaError::Replaced { file: file.display().to_string() });
                }
                Some(_) | None => write_copy(file, &authority.pem)?,
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

    /// SHA-256 of a CA certificate's DER SubjectPublicKeyInfo: what a join token that is made now carries. For a good while after
    /// another began to sign it is the one before, which every replica can prove to be: by what it signed or by its signature on the
    /// new one.
    pub fn pin(&self, now: Timestamp) -> [u8; 32] {
        self.previous_hash.filter(|_| self.held.pins_previous(now)).unwrap_or(self.hash)
    }

    /// When the signing certificate expires.
    pub fn expires(&self) -> Timestamp {
        self.held.expires
    }

    /// A secret for one purpose: the same for whoever holds the CA's key, also after a restart.
    pub(crate) fn secret_for(&self, purpose: &str) -> [u8; 32] {
        let key = hmac::Key::new(hmac::HMAC_SHA256, self.issuer.key().serialized_der());
        let mut secret = [0; 32];
        secret.copy_from_slice(hmac::sign(&key, purpose.as_bytes()).as_ref());
        secret
    }

    /// Whether a node's certificate is taken.
    #[cfg(test)]
    pub(crate) fn verifies(&self, pem: &str) -> bool {
        let certificate = certificates_in(pem).and_then(|mut certificates| certificates.pop());
        let now = rustls::pki_types::UnixTime::now();
        certificate.is_some_and(|certificate| clients::verify(&*self.clients, &certificate, &[], now).is_ok())
    }

    /// Whether one of these is trusted still.
    fn follows(&self, known: &[CertificateDer<'_>]) -> bool {
        known.iter().any(|certificate| self.certificates.contains(certificate))
    }

    fn generate(now: Timestamp) -> Result<Secret, CaError> {
        let key = KeyPair::generate()?;
        // Another one below it is the next one, signed by this one.
        let params = params_of(&key, 1, now, LIFE);
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
        let optional = |name: &str| match secret.data.as_ref().is_some_and(|data| data.contains_key(name)) {
            true => part(name).map(Some),
            false => Ok(None),
        };
        let mut pem = part(CERTIFICATE_KEY)?;
        let key = KeyPair::from_pem(&part(PRIVATE_KEY)?).map_err(|_| damaged("tls.key is not a private key in PEM"))?;
        let mut certificates = certificates_in(&pem).ok_or_else(|| damaged("tls.crt is not certificates in PEM"))?;
        let signing = certificates.first().ok_or_else(|| damaged("tls.crt holds no certificate"))?;
        let facts = Facts::of(signing, CERTIFICATE_KEY)?;
        if facts.key != key.public_key_raw() {
            return Err(damaged("tls.key does not belong to the first certificate in tls.crt"));
        }
        let issuer = Issuer::from_ca_cert_der(signing, key)?;
        let previous = certificates.get(1).map(|before| Facts::of(before, CERTIFICATE_KEY)).transpose()?;
        let replaced = previous.as_ref().map(|previous| Replaced {
            expires: previous.expires,
            at: secret.annotations().get(SINCE_ANNOTATION).and_then(|text| text.parse().ok()),
        });
        let cross = match optional(CROSS_KEY)? {
            Some(pem) => certificates_in(&pem).ok_or_else(|| damaged("cross.crt is not a certificate in PEM"))?.pop(),
            None => None,
        };
        let next = match optional(NEXT_CERTIFICATE_KEY)? {
            Some(next) => {
                let parsed = certificates_in(&next).and_then(|mut certificates| certificates.pop());
                let parsed = parsed.ok_or_else(|| damaged("next.crt is not a certificate in PEM"))?;
                let made = Facts::of(&parsed, NEXT_CERTIFICATE_KEY)?.made;
                pem.push_str(&next);
                certificates.push(parsed);
                Some(made)
            }
            None => None,
        };
        let mut roots = RootCertStore::empty();
        for certificate in &certificates {
            roots.add(certificate.clone()).map_err(|error| CaError::Damaged(error.to_string()))?;
        }
        Ok(Self {
            issuer,
            certificates,
            cross,
            pem,
            hash: facts.hash,
            previous_hash: previous.map(|previous| previous.hash),
            held: Held { expires: facts.expires, next, replaced },
            clients: clients::strict(roots).map_err(CaError::Damaged)?,
        })
    }
}

/// What a CA's certificate says.
struct Facts {
    key: Vec<u8>,
    hash: [u8; 32],
    made: Timestamp,
    expires: Timestamp,
}

impl Facts {
    fn of(certificate: &CertificateDer<'_>, name: &str) -> Result<Self, CaError> {
        let damaged = |what: &str| CaError::Damaged(format!("{name} {what}"));
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
            .map_err(|_| damaged("holds a certificate that cannot be read"))?;
        if !parsed.is_ca() {
            return Err(damaged("holds a certificate that is not one of a CA"));
        }
        let at = |time: ASN1Time| {
            Timestamp::from_second(time.timestamp()).map_err(|_| damaged("holds a certificate that never expires"))
        };
        Ok(Self {
            key: parsed.public_key().subject_public_key.as_ref().to_vec(),
            hash: sha256(parsed.public_key().raw),
            made: at(parsed.validity().not_before)?.saturating_add(CLOCK_LAG).unwrap_or(Timestamp::MAX),
            expires: at(parsed.validity().not_after)?,
        })
    }
}

/// A CA's certificate with this key, below which there may be so many others.
fn params_of(key: &KeyPair, below: u8, now: Timestamp, life: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "skerry");
    // Told apart by name, so that nobody has to try them all.
    let name = hex::encode(&sha256(&key.subject_public_key_info())[..4]);
    params.distinguished_name.push(DnType::CommonName, format!("skerry-ca-{name}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial());
    validity(&mut params, now, CLOCK_LAG, life);
    params
}

fn certificates_in(pem: &str) -> Option<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().ok()
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
