//! The server certificate: issued in memory, replaced ahead of its end with no connection noticing.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose};
use rustls::crypto::ring::sign::any_ecdsa_type;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::{CLOCK_LAG, CaError, CertificateAuthority, CurrentAuthority, serial, validity};
use crate::config::Advertise;

const LIFE: Duration = Duration::from_secs(90 * 86_400);
const RENEW_AFTER: Duration = Duration::from_secs(60 * 86_400);

/// The certificate that handshakes get.
pub struct ServerCertificate {
    authority: Arc<CurrentAuthority>,
    names: Vec<String>,
    current: RwLock<Current>,
}

struct Current {
    key: Arc<CertifiedKey>,
    renew_at: Timestamp,
    signer: [u8; 32],
}

impl ServerCertificate {
    /// Issues the first one, for the advertised hosts and this machine itself.
    pub fn issue(authority: Arc<CurrentAuthority>, advertise: &[Advertise], now: Timestamp) -> Result<Self, CaError> {
        let mut names: Vec<String> = advertise.iter().map(|address| address.host.clone()).collect();
        names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
        names.sort();
        names.dedup();
        let current = RwLock::new(sign(&authority.current(), &names, now)?);
        Ok(Self { authority, names, current })
    }

    /// Replaces the certificate if it is time or the CA is another; says whether it was. Connections that stand go on.
    pub fn renew_if_due(&self, now: Timestamp) -> Result<bool, CaError> {
        let authority = self.authority.current();
        {
            let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
            let shown = current.key.cert.get(1);
            if now < current.renew_at && current.signer == authority.hash && shown == authority.cross.as_ref() {
                return Ok(false);
            }
        }
        let next = sign(&authority, &self.names, now)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(true)
    }

    /// What the next handshake gets.
    pub fn current(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).key)
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl fmt::Debug for ServerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCertificate").field("names", &self.names).finish_non_exhaustive()
    }
}

fn sign(authority: &CertificateAuthority, names: &[String], now: Timestamp) -> Result<Current, CaError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "skerry-cloudcore");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial());
    validity(&mut params, now, CLOCK_LAG, LIFE);
    let certificate = params.signed_by(&key, &authority.issuer)?;
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let private = any_ecdsa_type(&private).map_err(|_| rcgen::Error::CouldNotParseKeyPair)?;
    let chain = std::iter::once(certificate.der().clone()).chain(authority.cross.clone()).collect();
    let key = Arc::new(CertifiedKey::new(chain, private));
    Ok(Current { key, renew_at: now.saturating_add(RENEW_AFTER).unwrap_or(now), signer: authority.hash })
}
