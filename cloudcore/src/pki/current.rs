//! The CA as it is now: handshakes, signatures and answers see a change at once.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use jiff::Timestamp;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::{CaError, CertificateAuthority, Step, clients, write_copy};
use crate::secrets::SecretStore;

/// The CA, which others may replace by its successor while this process runs.
#[derive(Debug)]
pub struct CurrentAuthority(RwLock<Arc<CertificateAuthority>>);

impl CurrentAuthority {
    /// Begins with this one.
    pub fn new(authority: CertificateAuthority) -> Self {
        Self(RwLock::new(Arc::new(authority)))
    }

    /// As it is now.
    pub fn current(&self) -> Arc<CertificateAuthority> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes the next step of the rotation if one is due, and takes over what other replicas made; says which step this one made.
    pub async fn refresh(
        &self,
        store: &impl SecretStore,
        data_dir: Option<&Path>,
        now: Timestamp,
    ) -> Result<Option<Step>, CaError> {
        let (next, step) = CertificateAuthority::advance(store, now).await?;
        let held = self.current();
        if next.pem == held.pem && next.cross == held.cross && next.held == held.held {
            return Ok(step);
        }
        if !next.follows(&held.certificates) {
            return Err(CaError::Swapped);
        }
        let copied = data_dir.map_or(Ok(()), |dir| write_copy(&dir.join(super::COPY), &next.pem));
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        copied.map(|()| step)
    }
}

/// Asks the CA as it is at that moment.
impl ClientCertVerifier for CurrentAuthority {
    fn client_auth_mandatory(&self) -> bool {
        self.current().clients.client_auth_mandatory()
    }

    /// No hints: a node has one certificate.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        clients::verify(&*self.current().clients, end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.current().clients.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.current().clients.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.current().clients.supported_verify_schemes()
    }
}
