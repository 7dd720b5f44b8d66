//! Which client certificates a handshake takes: those of our CA, and none at all from whoever has none yet.
//!
//! One that expired is taken, too, so that its node can be told what is the matter, and can renew it. The handshake proves that the
//! peer has its key; what it is good for is decided where it is used ([`NodeCertificate::standing`](super::NodeCertificate)).

use std::sync::Arc;

use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, Error, RootCertStore};

/// Takes certificates of these CAs that have not expired.
pub(super) fn strict(roots: RootCertStore) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let strict = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).allow_unauthenticated().build();
    strict.map_err(|error| error.to_string())
}

/// As the strict one, but for the time: what expired must have been good at its last moment.
pub(super) fn verify(
    strict: &dyn ClientCertVerifier,
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<ClientCertVerified, Error> {
    match strict.verify_client_cert(end_entity, intermediates, now) {
        Err(Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. })) => {
            strict.verify_client_cert(end_entity, intermediates, not_after)
        }
        verified => verified,
    }
}
