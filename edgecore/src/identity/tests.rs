//! Identities made by a CA of the test's own.

use std::fs;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

use super::*;

/// A CA.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new() -> Self {
        Self(CertifiedIssuer::self_signed(Self::params(), KeyPair::generate().unwrap()).unwrap())
    }

    /// The certificate of another one, signed by this one.
    pub(crate) fn introduce(&self, other: &Self) -> CertificateDer<'static> {
        Self::params().signed_by(other.0.key(), &self.0).unwrap().der().clone()
    }

    fn params() -> CertificateParams {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, "test ca");
        params
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    pub(crate) fn hash(&self) -> [u8; 32] {
        let spki = self.0.key().subject_public_key_info();
        ring::digest::digest(&ring::digest::SHA256, &spki).as_ref().try_into().unwrap()
    }

    /// A node's certificate for the key of a request.
    pub(crate) fn sign(&self, node: &str, csr: &str) -> String {
        self.sign_at(node, csr, crate::clock::wall())
    }

    /// Valid as cloudcore's are: from five minutes ago, for a year.
    pub(crate) fn sign_at(&self, node: &str, csr: &str, now: Timestamp) -> String {
        let at = |seconds: i64| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds.unsigned_abs());
        let mut csr = rcgen::CertificateSigningRequestParams::from_pem(csr).unwrap();
        csr.params.distinguished_name.push(DnType::CommonName, format!("system:node:{node}"));
        csr.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        csr.params.not_before = at(now.as_second() - 300);
        csr.params.not_after = at(now.as_second() + 365 * 86_400);
        csr.signed_by(&self.0).unwrap().pem()
    }

    pub(crate) fn server(&self, name: &str) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        self.server_valid(name, 2020, 4000)
    }

    pub(crate) fn server_valid(
        &self,
        name: &str,
        from: i32,
        to: i32,
    ) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(from, 1, 1);
        params.not_after = rcgen::date_time_ymd(to, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (certificate.der().clone(), PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }
}

pub(crate) fn identity_of(authority: &Authority, node: &str, data_dir: &Path) -> Identity {
    let key = pending_key(data_dir).unwrap();
    let certificate = authority.sign(node, &request(node, &key).unwrap());
    Identity::install(data_dir, &certificate, &key, &authority.pem()).unwrap()
}

pub(crate) fn identity(node: &str, data_dir: &Path) -> Identity {
    identity_of(&Authority::new(), node, data_dir)
}

#[test]
fn what_was_installed_is_read_back_and_only_the_owner_can() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    assert!(Identity::load(dir.path()).unwrap().is_none());
    identity("box", dir.path());
    let loaded = Identity::load(dir.path()).unwrap().unwrap();
    assert_eq!(loaded.node, "box");
    loaded.client_config().unwrap();
    for name in [CERTIFICATE, KEY, CA] {
        let mode = fs::metadata(dir.path().join(DIR).join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[test]
fn an_interrupted_change_leaves_the_old_identity_or_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    identity_of(&authority, "box", dir.path());
    let place = dir.path().join(DIR);
    let old = fs::read_to_string(place.join(CERTIFICATE)).unwrap();
    // The new key is there, its certificate is not.
    let key = pending_key(dir.path()).unwrap();
    assert_eq!(Identity::load(dir.path()).unwrap().unwrap().certificate, old);
    assert_eq!(pending_key(dir.path()).unwrap().serialize_pem(), key.serialize_pem(), "the same key is used again");
    // The certificate is there, the key is not in its place yet.
    let new = authority.sign("box", &request("box", &key).unwrap());
    files::write(&place.join(CERTIFICATE), new.as_bytes(), 0o600).unwrap();
    let loaded = Identity::load(dir.path()).unwrap().unwrap();
    assert_eq!((loaded.certificate, loaded.key), (new, key.serialize_pem()));
    assert!(!place.join(NEW_KEY).exists());
    Identity::load(dir.path()).unwrap().unwrap();
}

#[test]
fn damage_is_told_with_its_file_and_nothing_is_overwritten() {
    for (name, content) in [
        (CERTIFICATE, ""),
        (CERTIFICATE, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        (KEY, "x"),
        (CA, ""),
    ] {
        let dir = tempfile::tempdir().unwrap();
        identity("box", dir.path());
        let path = dir.path().join(DIR).join(name);
        fs::write(&path, content).unwrap();
        let error = Identity::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("edgecore reset"), "{name}: {error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), content);
    }
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    identity("box", one.path());
    identity("box", other.path());
    fs::copy(other.path().join(DIR).join(KEY), one.path().join(DIR).join(KEY)).unwrap();
    assert!(matches!(Identity::load(one.path()), Err(IdentityError::Mismatch { .. })));
    fs::remove_file(one.path().join(DIR).join(KEY)).unwrap();
    assert!(matches!(Identity::load(one.path()), Err(IdentityError::Damaged { .. })));
}

#[test]
fn renewal_is_due_around_sixty_percent() {
    let dir = tempfile::tempdir().unwrap();
    let mut identity = identity("box", dir.path());
    identity.not_before = Timestamp::from_second(1000).unwrap();
    identity.not_after = Timestamp::from_second(2000).unwrap();
    for jitter in [0.0, 0.3, 0.999, 1.0] {
        let at = renew::due(&identity, jitter).as_second();
        assert!((1540..=1660).contains(&at), "{jitter}: {at}");
    }
}
