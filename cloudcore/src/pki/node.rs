//! Certificates of nodes: signed for a node that cloudcore registered, and read back into that identity on every connection.

use std::time::Duration;

use jiff::Timestamp;
use rcgen::string::Ia5String;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyUsagePurpose, SanType,
    SubjectPublicKeyInfo,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;
use x509_parser::time::ASN1Time;

use super::{CertificateAuthority, serial, validity};
use crate::backend::NodeIdentity;
use crate::config::is_node_name;

const GROUP: &str = "system:nodes";
const USER_PREFIX: &str = "system:node:";
const UID_PREFIX: &str = "urn:skerry:node:";
/// How long a certificate is good for.
pub(super) const LIFE: Duration = Duration::from_secs(365 * 86_400);
const CLOCK_LAG: Duration = Duration::from_secs(300);

/// Why a certificate signing request is refused.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    /// Not a request.
    #[error("the certificate signing request is not one in PEM")]
    Malformed,
    /// Signed by another key than its own.
    #[error("the certificate signing request is not signed by the key it asks a certificate for")]
    Signature,
    /// A kind of key that is not signed here.
    #[error("the key of the certificate signing request is of a kind that is not supported; use ECDSA P-256")]
    Key,
    /// The identity cannot be written into a certificate.
    #[error("the node {0:?} cannot be written into a certificate")]
    Identity(String),
    /// The cryptography refused.
    #[error("cannot sign the certificate")]
    Crypto(#[source] rcgen::Error),
}

/// Why a certificate, though signed by the CA, is not a node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Not X.509.
    #[error("the certificate cannot be read")]
    Malformed,
    /// Not O=system:nodes, CN=system:node:NAME.
    #[error("the certificate's subject is not a node's")]
    Subject,
    /// Not one URI with a Node's UID.
    #[error("the certificate names no Node UID")]
    Uid,
}

/// What a node's certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeCertificate {
    /// Whose it is.
    pub node: NodeIdentity,
    /// Beginning of its validity.
    pub not_before: Timestamp,
    /// End of its validity.
    pub not_after: Timestamp,
}

/// What a node's certificate is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Everything.
    Valid,
    /// To be renewed, and nothing else: it expired, no longer ago than it was good for.
    Expired,
    /// Nothing any more.
    TooOld,
}

/// A verified request for a certificate: a public key whose owner asked for it.
#[derive(Debug)]
pub struct NodeKey(SubjectPublicKeyInfo);

impl NodeKey {
    /// Reads a PEM request, verifies that it is signed by its own key, and keeps the key alone.
    pub fn from_csr(pem: &str) -> Result<Self, CsrError> {
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).map_err(|_| CsrError::Malformed)?;
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|_| CsrError::Malformed)?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed);
        }
        let key = &request.certification_request_info.subject_pki;
        let public = SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| CsrError::Key)?;
        request.verify_signature().map_err(|_| CsrError::Signature)?;
        // Whoever signs with RSA here gets a certificate that costs every handshake dear.
        if key.parsed().map_or(true, |parsed| matches!(parsed, x509_parser::public_key::PublicKey::RSA(_))) {
            return Err(CsrError::Key);
        }
        Ok(Self(public))
    }
}

impl CertificateAuthority {
    /// Signs the certificate of a node for this key, valid for a year. PEM.
    pub fn sign_node(&self, key: &NodeKey, node: &NodeIdentity, now: Timestamp) -> Result<String, CsrError> {
        if !is_node_name(&node.name) || !is_uid(&node.uid) {
            return Err(CsrError::Identity(node.name.clone()));
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, GROUP);
        params.distinguished_name.push(DnType::CommonName, format!("{USER_PREFIX}{}", node.name));
        let uid = Ia5String::try_from(format!("{UID_PREFIX}{}", node.uid)).map_err(CsrError::Crypto)?;
        params.subject_alt_names = vec![SanType::URI(uid)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial());
        let left = Duration::try_from(self.expires().duration_since(now)).unwrap_or_default();
        validity(&mut params, now, CLOCK_LAG, LIFE.min(left));
        Ok(params.signed_by(&key.0, &self.issuer).map_err(CsrError::Crypto)?.pem())
    }
}

impl NodeCertificate {
    /// What it is good for at this time.
    pub fn standing(&self, now: Timestamp) -> Standing {
        let life = self.not_after.duration_since(self.not_before);
        if now <= self.not_after {
            Standing::Valid
        } else if now.duration_since(self.not_after) <= life * 2 {
            Standing::Expired
        } else {
            Standing::TooOld
        }
    }
}

/// The node that a certificate was signed for. That the CA signed it has been verified by the handshake, which lets expired ones
/// through: see [`NodeCertificate::standing`].
pub fn node_of(certificate: &CertificateDer<'_>) -> Result<NodeCertificate, CertificateError> {
    let (rest, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(|_| CertificateError::Malformed)?;
    if !rest.is_empty() {
        return Err(CertificateError::Malformed);
    }
    let subject = parsed.subject();
    let group = only(subject.iter_organization().map(|attribute| attribute.as_str().ok()));
    let user = only(subject.iter_common_name().map(|attribute| attribute.as_str().ok()));
    let (Some(Some(GROUP)), Some(Some(user))) = (group, user) else {
        return Err(CertificateError::Subject);
    };
    let name = user.strip_prefix(USER_PREFIX).filter(|name| is_node_name(name)).ok_or(CertificateError::Subject)?;
    let names = parsed.subject_alternative_name().ok().flatten().ok_or(CertificateError::Uid)?;
    let Some(GeneralName::URI(uri)) = only(names.value.general_names.iter()) else {
        return Err(CertificateError::Uid);
    };
    let uid = uri.strip_prefix(UID_PREFIX).filter(|uid| is_uid(uid)).ok_or(CertificateError::Uid)?;
    let at = |time: ASN1Time| Timestamp::from_second(time.timestamp()).map_err(|_| CertificateError::Malformed);
    Ok(NodeCertificate {
        node: NodeIdentity { name: name.to_owned(), uid: uid.to_owned() },
        not_before: at(parsed.validity().not_before)?,
        not_after: at(parsed.validity().not_after)?,
    })
}

fn is_uid(uid: &str) -> bool {
    (1..=64).contains(&uid.len()) && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn only<T>(mut items: impl Iterator<Item = T>) -> Option<T> {
    let first = items.next()?;
    items.next().is_none().then_some(first)
}
