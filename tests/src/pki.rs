//! The certificates of a throw-away cluster.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

/// A certificate authority with its files.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Authority").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// A certificate and its key, both PEM files.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The certificate.
    pub certificate: PathBuf,
    /// The key.
    pub key: PathBuf,
}

impl Authority {
    /// Makes an authority, `NAME.crt` and `NAME.key` in `dir`.
    pub fn new(dir: &Path, name: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = params(name)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::CrlSign];
        let pem = params.self_signed(&key)?.pem();
        let pair = write(dir, name, &pem, &key)?;
        Ok(Self { issuer: Issuer::new(params, key), certificate: pair.certificate, key: pair.key })
    }

    /// A server certificate for these names and addresses.
    pub fn server(&self, dir: &Path, name: &str, names: &[&str]) -> Result<Pair> {
        let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
        identify(&mut params, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(dir, name, params)
    }

    /// A client certificate; `groups` become its organisations.
    pub fn client(&self, dir: &Path, file: &str, user: &str, groups: &[&str]) -> Result<Pair> {
        let mut params = params(user)?;
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(dir, file, params)
    }

    fn sign(&self, dir: &Path, file: &str, mut params: CertificateParams) -> Result<Pair> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        let key = KeyPair::generate()?;
        let pem = params.signed_by(&key, &self.issuer)?.pem();
        write(dir, file, &pem, &key)
    }
}

/// A key pair for signing service account tokens: `NAME.key` and `NAME.pub`.
pub fn signing_key(dir: &Path, name: &str) -> Result<Pair> {
    let key = KeyPair::generate()?;
    let pair = Pair { certificate: dir.join(format!("{name}.pub")), key: dir.join(format!("{name}.key")) };
    fs::write(&pair.certificate, key.public_key_pem())?;
    fs::write(&pair.key, key.serialize_pem())?;
    Ok(pair)
}

/// Every address of loopback and `extra`, as names for a server certificate.
pub fn names_with(extra: &[IpAddr]) -> Vec<String> {
    let mut names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    names.extend(extra.iter().map(ToString::to_string));
    names
}

fn params(name: &str) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    identify(&mut params, name);
    Ok(params)
}

fn identify(params: &mut CertificateParams, name: &str) {
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = OffsetDateTime::now_utc() - Duration::hours(1);
    params.not_after = OffsetDateTime::now_utc() + Duration::days(365);
}

fn write(dir: &Path, name: &str, certificate: &str, key: &KeyPair) -> Result<Pair> {
    let pair = Pair { certificate: dir.join(format!("{name}.crt")), key: dir.join(format!("{name}.key")) };
    fs::write(&pair.certificate, certificate)
        .with_context(|| format!("cannot write {}", pair.certificate.display()))?;
    fs::write(&pair.key, key.serialize_pem())?;
    Ok(pair)
}
