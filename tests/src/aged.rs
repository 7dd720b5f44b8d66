//! Certificates as the years make them: for keys that are there, with the dates of another time.

use anyhow::{Context as _, Result, ensure};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData as _, SanType, SubjectPublicKeyInfo,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use time::{Duration, OffsetDateTime};
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;
use x509_parser::x509::X509Name;

/// How long a node's certificate is good for.
pub const NODE_LIFE: Duration = Duration::days(365);
/// Its beginning is dated back by so much,
pub const NODE_LAG: Duration = Duration::minutes(5);
/// and that of a CA by so much.
const CA_LAG: Duration = Duration::days(1);
/// How long a CA is.
const CA_LIFE: Duration = Duration::days(3650);

/// From when to when.
pub type Validity = (OffsetDateTime, OffsetDateTime);

/// When a node's certificate is good that was signed at this time.
pub fn since(signed: OffsetDateTime) -> Validity {
    (signed - NODE_LAG, signed + NODE_LIFE)
}

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its number.
    pub serial: String,
    /// Common name of whose it is.
    pub subject: String,
    /// Common name of who signed it.
    pub issuer: String,
    /// The URI that it names.
    pub uri: Option<String>,
    /// Its public key, a DER SubjectPublicKeyInfo.
    pub key: Vec<u8>,
    /// When it is good.
    pub validity: Validity,
}

impl Facts {
    /// Reads DER.
    pub fn of(certificate: &[u8]) -> Result<Self> {
        let (_, parsed) = parse_x509_certificate(certificate)?;
        let validity = parsed.validity();
        let names = parsed.subject_alternative_name()?.map(|names| &names.value.general_names);
        let uri = names.into_iter().flatten().find_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        });
        Ok(Self {
            serial: parsed.raw_serial_as_string(),
            subject: common_name(parsed.subject())?,
            issuer: common_name(parsed.issuer())?,
            uri,
            key: parsed.public_key().raw.to_vec(),
            validity: (validity.not_before.to_datetime(), validity.not_after.to_datetime()),
        })
    }

    /// Reads the first one in a PEM text.
    pub fn of_pem(certificate: &str) -> Result<Self> {
        Self::of(&CertificateDer::from_pem_slice(certificate.as_bytes())?)
    }

    /// Whether it is for this key, which is PEM.
    pub fn fits(&self, key: &str) -> Result<bool> {
        Ok(KeyPair::from_pem(key)?.subject_public_key_info() == self.key)
    }
}

/// One of cloudcore's CAs, as whoever holds its key can be it at any time.
#[derive(Clone, Debug)]
pub struct Signer {
    name: String,
    key: String,
}

impl Signer {
    /// The one of this certificate and key, PEM.
    pub fn new(certificate: &str, key: &str) -> Result<Self> {
        let facts = Facts::of_pem(certificate)?;
        ensure!(facts.fits(key)?, "the CA's key is not that of its certificate");
        Ok(Self { name: facts.subject, key: key.to_owned() })
    }

    /// One that no cluster knows.
    pub fn unknown() -> Result<Self> {
        Ok(Self { name: "skerry-ca-unknown".to_owned(), key: KeyPair::generate()?.serialize_pem() })
    }

    /// Its common name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its own certificate, if it was made at this time. PEM.
    pub fn made(&self, at: OffsetDateTime) -> Result<String> {
        let (mut params, key) = (self.params(), KeyPair::from_pem(&self.key)?);
        (params.not_before, params.not_after) = (at - CA_LAG, at + CA_LIFE);
        Ok(params.self_signed(&key)?.pem())
    }

    /// A node's certificate, PEM, as this one would have signed it with that life: for the same node and key.
    pub fn signed(&self, certificate: &str, (from, to): Validity) -> Result<String> {
        let facts = Facts::of_pem(certificate)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
        params.distinguished_name.push(DnType::CommonName, facts.subject);
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(facts.uri.context("it names no Node")?)?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (from, to);
        let issuer = Issuer::new(self.params(), KeyPair::from_pem(&self.key)?);
        Ok(params.signed_by(&SubjectPublicKeyInfo::from_der(&facts.key)?, &issuer)?.pem())
    }

    fn params(&self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "skerry");
        params.distinguished_name.push(DnType::CommonName, self.name.as_str());
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }
}

fn common_name(name: &X509Name<'_>) -> Result<String> {
    let first = name.iter_common_name().next().context("a certificate names nobody")?;
    Ok(first.as_str()?.to_owned())
}
