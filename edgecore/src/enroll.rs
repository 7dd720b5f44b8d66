//! How a box becomes a node: fetches the CA and believes it by the hash in the token, then asks for a certificate, then writes it
//! down. Every step may be interrupted and done again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use hyper::Method;
use jiff::Timestamp;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use skerry_proto::payload::{JoinRequest, JoinResponse};
use skerry_proto::token::JoinToken;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::https::{self, Ask};
use crate::identity::{self, Identity, authorities};
use crate::link::dial::{DialError, Server, tls_error};

/// What a box says of itself when it joins.
#[derive(Clone, Debug)]
pub struct Applicant {
    /// Wanted node name.
    pub node: String,
    /// /etc/machine-id.
    pub machine_id: String,
    /// Labels for the Node.
    pub labels: BTreeMap<String, String>,
}

/// Why a box was not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The CA is another one than the token's.
    #[error(
        "{server} is not the cluster that the token was made for (its CA is {found}, the token says {wanted}); check the address, or make a token on that cluster with `cloudcore token create`"
    )]
    Pin {
        /// Who answered.
        server: Server,
        /// Hash of the CA it showed, or what it is instead.
        found: String,
        /// The token's hash.
        wanted: String,
    },
    /// The clock is so wrong that no certificate can be judged.
    #[error(
        "this box's clock is off by about {0} s, so that the cloud's certificates are not valid here; set the clock and join again"
    )]
    ClockOff(i64),
    /// The server said no, or there was no way to it.
    #[error(transparent)]
    Https(#[from] https::HttpsError),
    /// Keys, certificates and their files.
    #[error(transparent)]
    Identity(#[from] identity::IdentityError),
    /// The answer is no use.
    #[error(
        "{0} gave an answer that cannot be read ({1}); check that this is cloudcore's port, and that its version fits"
    )]
    Answer(Server, String),
}

/// What enrolling brought.
#[derive(Debug)]
pub struct Enrolled {
    /// The node's identity, on the disk.
    pub identity: Identity,
    /// The cloud's clock minus this box's, in seconds.
    pub skew: i64,
}

/// The CA of the server, as PEM, believed because its hash is the token's and because the server proved, in the same handshake, to hold
/// a certificate that this CA signed for the name it was called by. Also gives the server's clock.
pub async fn fetch_ca(
    server: &Server,
    token: &JoinToken,
    now: Timestamp,
) -> Result<(String, Option<i64>), EnrollError> {
    let witness = Arc::new(Witness { provider: rustls::crypto::ring::default_provider(), seen: Mutex::default() });
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| EnrollError::Answer(server.clone(), error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&witness) as Arc<dyn ServerCertVerifier>)
        .with_no_client_auth();
    let ask = Ask { method: Method::GET, path: "/v1/ca", bearer: None, body: Vec::new() };
    let answer = https::ask(server, Arc::new(config), ask).await?;
    let unreadable = |cause: String| EnrollError::Answer(server.clone(), cause);
    let text = String::from_utf8(answer.body.to_vec()).map_err(|_| unreadable("not text".to_owned()))?;
    let offered = authorities(&text).map_err(unreadable)?;
    let hashes: Vec<[u8; 32]> = offered.iter().filter_map(spki_hash).collect();
    let Some(pinned) = offered.iter().find(|ca| spki_hash(ca) == Some(token.ca_hash)) else {
        let found = hashes.first().map_or_else(|| "none".to_owned(), hex::encode);
        return Err(EnrollError::Pin { server: server.clone(), found, wanted: token.ca_hash_hex() });
    };
    witness.prove(server, pinned, now).map_err(|error| match error {
        DialError::Clock { .. } if answer.date.is_some() => {
            EnrollError::ClockOff(answer.date.map_or(0, |date| date - now.as_second()))
        }
        DialError::UnknownCa(server) => {
            let found = "one that did not sign the server's certificate".to_owned();
            EnrollError::Pin { server, found, wanted: token.ca_hash_hex() }
        }
        error => https::HttpsError::from(error).into(),
    })?;
    Ok((pem("CERTIFICATE", pinned), answer.date))
}

/// Joins with a CA from [`fetch_ca`] and puts the identity in place. By this box's clock it need not be valid: what counts is cloudcore's,
/// and the server's certificate, by which [`fetch_ca`] judges the clock, is dated back further than the node's.
pub async fn enroll(
    server: &Server,
    token: &JoinToken,
    ca: &str,
    applicant: &Applicant,
    data_dir: &Path,
    now: Timestamp,
) -> Result<Enrolled, EnrollError> {
    let key = identity::pending_key(data_dir)?;
    let request = JoinRequest {
        node: applicant.node.clone(),
        csr: identity::request(&applicant.node, &key)?,
        machine_id: applicant.machine_id.clone(),
        labels: applicant.labels.clone(),
        time: now.as_second(),
    };
    let body = serde_json::to_vec(&request).map_err(|error| EnrollError::Answer(server.clone(), error.to_string()))?;
    let bearer = token.to_string();
    let ask = Ask { method: Method::POST, path: "/v1/join", bearer: Some(&bearer), body };
    let answer = https::ask(server, identity::anonymous_config(ca)?, ask).await?;
    let answer: JoinResponse =
        serde_json::from_slice(&answer.body).map_err(|error| EnrollError::Answer(server.clone(), error.to_string()))?;
    let skew = answer.time - now.as_second();
    let identity = Identity::install(data_dir, &answer.certificate, &key, &answer.ca)?;
    Ok(Enrolled { identity, skew })
}

/// Whether a node's identity is of the token's cluster.
pub fn trusts(identity: &Identity, token: &JoinToken) -> bool {
    identity.authorities().iter().any(|ca| spki_hash(ca) == Some(token.ca_hash))
}

fn spki_hash(der: &CertificateDer<'_>) -> Option<[u8; 32]> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    ring::digest::digest(&ring::digest::SHA256, certificate.public_key().raw).as_ref().try_into().ok()
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem + &format!("-----END {label}-----\n")
}

/// Lets a handshake through that proves possession of the key, and keeps what was shown: whether to believe it is decided once the CA
/// is known ([`Witness::prove`]). Nothing secret is sent on such a connection and nothing from it is used before.
#[derive(Debug)]
struct Witness {
    provider: CryptoProvider,
    seen: Mutex<Option<Seen>>,
}

#[derive(Debug)]
struct Seen {
    end_entity: CertificateDer<'static>,
    intermediates: Vec<CertificateDer<'static>>,
    name: ServerName<'static>,
}

impl Witness {
    fn prove(&self, server: &Server, ca: &CertificateDer<'static>, now: Timestamp) -> Result<(), DialError> {
        let unknown = || DialError::UnknownCa(server.clone());
        let seen = self.seen.lock().ok().and_then(|mut seen| seen.take()).ok_or_else(unknown)?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca.clone()).map_err(|_| unknown())?;
        let provider = Arc::new(self.provider.clone());
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().map_err(|_| unknown())?;
        let at = std::time::Duration::from_secs(now.as_second().max(0).unsigned_abs());
        verifier
            .verify_server_cert(&seen.end_entity, &seen.intermediates, &seen.name, &[], UnixTime::since_unix_epoch(at))
            .map(drop)
            .map_err(|error| tls_error(server, std::io::Error::other(error)))
    }
}

impl ServerCertVerifier for Witness {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let seen = Seen {
            end_entity: end_entity.clone().into_owned(),
            intermediates: intermediates.iter().map(|der| der.clone().into_owned()).collect(),
            name: name.to_owned(),
        };
        if let Ok(mut slot) = self.seen.lock() {
            *slot = Some(seen);
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
pub(crate) mod tests;
