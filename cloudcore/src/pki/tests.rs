use std::sync::Arc;
use std::sync::atomic::Ordering;

use rcgen::{CertificateParams, KeyPair, SanType};

use super::*;
use crate::backend::NodeIdentity;
use crate::clock;
use crate::secrets::fake::MemorySecrets;

fn node() -> NodeIdentity {
    NodeIdentity { name: "box-1".to_owned(), uid: "0b7e7f5c-8f1f-4d8e-9a11-5a2e3c0d9f10".to_owned() }
}

async fn authority() -> CertificateAuthority {
    CertificateAuthority::load_or_create(&MemorySecrets::default(), None, clock::wall()).await.unwrap()
}

#[tokio::test]
async fn replicas_that_start_at_once_end_with_one_ca() {
    let store = MemorySecrets::default();
    let now = clock::wall();
    let (a, b, c) = tokio::join!(
        CertificateAuthority::load_or_create(&store, None, now),
        CertificateAuthority::load_or_create(&store, None, now),
        CertificateAuthority::load_or_create(&store, None, now),
    );
    let (a, b, c) = (a.unwrap(), b.unwrap(), c.unwrap());
    assert_eq!(store.conflicts.load(Ordering::SeqCst), 2, "all three have tried to create it");
    assert_eq!((a.pem(), b.pem()), (b.pem(), c.pem()));
    assert_eq!(a.pin(now), c.pin(now));
    let later = CertificateAuthority::load_or_create(&store, None, now).await.unwrap();
    assert_eq!(later.pem(), a.pem());
}

#[tokio::test]
async fn what_is_wrong_with_the_ca_is_said() {
    let mut absent = MemorySecrets::default();
    absent.missing_namespace = true;
    let error = CertificateAuthority::load_or_create(&absent, None, clock::wall()).await.unwrap_err();
    assert!(!error.is_transient());
    assert!(crate::retry::chain(&error).contains("kubectl create namespace"), "{}", crate::retry::chain(&error));

    let away = MemorySecrets::default();
    away.fail(1);
    assert!(CertificateAuthority::load_or_create(&away, None, clock::wall()).await.unwrap_err().is_transient());

    let store = MemorySecrets::default();
    CertificateAuthority::load_or_create(&store, None, clock::wall()).await.unwrap();
    let good = store.rows()[SECRET].clone();
    let other = CertificateAuthority::generate(clock::wall()).unwrap();
    type Damage = fn(&mut BTreeMap<String, ByteString>, &Secret);
    let damages: [(&str, Damage); 4] = [
        ("no tls.key", |data, _| drop(data.remove("tls.key"))),
        ("not a private key", |data, _| drop(data.insert("tls.key".to_owned(), ByteString(b"x".to_vec())))),
        ("holds no certificate", |data, _| drop(data.insert("tls.crt".to_owned(), ByteString(b"x".to_vec())))),
        ("does not belong", |data, other| {
            data.insert("tls.key".to_owned(), other.data.as_ref().unwrap()["tls.key"].clone());
        }),
    ];
    for (says, damage) in damages {
        let mut secret = good.clone();
        damage(secret.data.as_mut().unwrap(), &other);
        store.rows().insert(SECRET.to_owned(), secret);
        let error = CertificateAuthority::load_or_create(&store, None, clock::wall()).await.unwrap_err();
        assert!(matches!(&error, CaError::Damaged(why) if why.contains(says)), "{says}: {error}");
    }
}

#[tokio::test]
async fn a_lost_or_replaced_ca_is_noticed_by_the_copy() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("not/yet/there");
    let now = clock::wall();
    let store = MemorySecrets::default();
    let first = CertificateAuthority::load_or_create(&store, Some(&dir), now).await.unwrap();
    assert_eq!(std::fs::read_to_string(dir.join("ca.crt")).unwrap(), first.pem());
    CertificateAuthority::load_or_create(&store, Some(&dir), now).await.unwrap();

    store.rows().clear();
    let lost = CertificateAuthority::load_or_create(&store, Some(&dir), now).await.unwrap_err();
    assert!(matches!(lost, CaError::Lost { .. }), "{lost}");
    assert!(store.rows().is_empty(), "no new one was made");

    CertificateAuthority::load_or_create(&store, None, now).await.unwrap();
    let replaced = CertificateAuthority::load_or_create(&store, Some(&dir), now).await.unwrap_err();
    assert!(matches!(replaced, CaError::Replaced { .. }), "{replaced}");
}

#[tokio::test]
async fn of_a_request_only_the_key_is_used() {
    let authority = authority().await;
    let key = KeyPair::generate().unwrap();
    let mut wish = CertificateParams::new(vec!["apiserver".to_owned()]).unwrap();
    wish.distinguished_name.push(DnType::OrganizationName, "system:masters");
    wish.distinguished_name.push(DnType::CommonName, "system:node:other");
    wish.subject_alt_names.push(SanType::URI("urn:skerry:node:other".try_into().unwrap()));
    wish.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    wish.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    wish.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let csr = wish.serialize_request(&key).unwrap().pem().unwrap();

    let pem = authority.sign_node(&NodeKey::from_csr(&csr).unwrap(), &node(), clock::wall()).unwrap();
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    assert_eq!(node_of(&der).map(|certificate| certificate.node), Ok(node()));
    let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
    assert!(!parsed.is_ca());
    assert_eq!(parsed.subject().to_string(), "O=system:nodes, CN=system:node:box-1");
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && !usage.server_auth && !usage.any);
    assert_eq!(parsed.public_key().subject_public_key.as_ref(), key.public_key_raw());
    let life = parsed.validity().not_after.timestamp() - parsed.validity().not_before.timestamp();
    assert_eq!(life, 365 * 86_400 + 300);
}

/// The PEM of a request.
fn request_of(der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n")
}

/// A request with all that one may wish for, and the certificate of a node.
async fn request_and_certificate() -> (Vec<u8>, Vec<u8>) {
    let key = KeyPair::generate().unwrap();
    let mut wish = CertificateParams::new(vec!["cloud.example".to_owned(), "10.0.0.1".to_owned()]).unwrap();
    wish.subject_alt_names.push(SanType::URI("spiffe://a/b".try_into().unwrap()));
    wish.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    wish.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let csr = wish.serialize_request(&key).unwrap();
    let signed = NodeKey::from_csr(&csr.pem().unwrap()).unwrap();
    let pem = authority().await.sign_node(&signed, &node(), clock::wall()).unwrap();
    (csr.der().to_vec(), CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec())
}

#[test]
fn no_damage_to_a_request_or_a_certificate_makes_reading_it_panic() {
    use proptest::prelude::*;
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (request, certificate) = runtime.block_on(request_and_certificate());
    let damaged = |whole: &[u8], wounds: &[(prop::sample::Index, u8, u8)]| {
        let mut der = whole.to_vec();
        for (at, kind, byte) in wounds {
            let at = at.index(der.len().max(1)).min(der.len());
            match kind % 5 {
                0 | 1 if at < der.len() => der[at] = *byte,
                2 if at < der.len() => drop(der.remove(at)),
                3 => der.insert(at, *byte),
                // A length or a tag of another size.
                4 if at < der.len() => der[at] = [0, 1, 0x7f, 0x80, 0x82, 0x84, 0xff][usize::from(*byte) % 7],
                _ => der.truncate(at),
            }
        }
        der
    };
    let wounds = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<u8>()), 1..4);
    proptest!(ProptestConfig::with_cases(1000), |(wounds in wounds)| {
        let der = damaged(&request, &wounds);
        let _ = NodeKey::from_csr(&request_of(&der));
        let text = damaged(request_of(&request).as_bytes(), &wounds);
        let _ = NodeKey::from_csr(&String::from_utf8_lossy(&text));
        if let Ok(read) = node_of(&CertificateDer::from(damaged(&certificate, &wounds))) {
            prop_assert!(read.node.name.len() <= 253 && read.node.uid.len() <= 64);
        }
    });
}

#[tokio::test]
async fn requests_that_prove_nothing_are_refused() {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap();
    let mut der = csr.der().to_vec();
    let last = der.len() - 1;
    der[last] ^= 1;
    let forged = request_of(&der);
    assert!(matches!(NodeKey::from_csr(&forged), Err(CsrError::Signature)), "{:?}", NodeKey::from_csr(&forged));
    for text in [
        "",
        "hello",
        &csr.pem().unwrap()[..200],
        "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
    ] {
        assert!(matches!(NodeKey::from_csr(text), Err(CsrError::Malformed)), "{text}");
    }
}

#[tokio::test]
async fn other_certificates_of_the_ca_are_no_nodes() {
    let authority = authority().await;
    let current = Arc::new(CurrentAuthority::new(authority));
    let authority = current.current();
    let own = ServerCertificate::issue(current, &[], clock::wall()).unwrap();
    assert_eq!(node_of(&own.current().cert[0]), Err(CertificateError::Subject));
    assert_eq!(node_of(&authority.certificates[0]), Err(CertificateError::Subject));
    assert_eq!(node_of(&CertificateDer::from(vec![0x30, 0])), Err(CertificateError::Malformed));

    let key = KeyPair::generate().unwrap();
    let signed = |organisations: &[&str], name: &str, uris: &[&str]| {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for organisation in organisations {
            params.distinguished_name.push(DnType::OrganizationName, *organisation);
        }
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        node_of(params.signed_by(&key, &authority.issuer).unwrap().der())
    };
    let (group, uid) = ("system:nodes", "urn:skerry:node:1-2");
    assert!(signed(&[group], "system:node:a", &[uid]).is_ok());
    assert_eq!(signed(&[], "system:node:a", &[uid]), Err(CertificateError::Subject));
    assert_eq!(signed(&["system:masters"], "system:node:a", &[uid]), Err(CertificateError::Subject));
    assert_eq!(signed(&[group], "a", &[uid]), Err(CertificateError::Subject));
    assert_eq!(signed(&[group], "system:node:", &[uid]), Err(CertificateError::Subject));
    assert_eq!(signed(&[group], "system:node:../a", &[uid]), Err(CertificateError::Subject));
    assert_eq!(signed(&[group], "system:node:a", &[]), Err(CertificateError::Uid));
    assert_eq!(signed(&[group], "system:node:a", &[uid, uid]), Err(CertificateError::Uid));
    assert_eq!(signed(&[group], "system:node:a", &["urn:skerry:node:"]), Err(CertificateError::Uid));
    assert_eq!(signed(&[group], "system:node:a", &["urn:other:1"]), Err(CertificateError::Uid));
}

#[tokio::test]
async fn the_server_certificate_is_renewed_ahead_and_covers_what_is_advertised() {
    let authority = Arc::new(CurrentAuthority::new(authority().await));
    let now = clock::wall();
    let hosts = ["cloud.example.com".parse().unwrap(), "192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()];
    let server = ServerCertificate::issue(authority, &hosts, now).unwrap();
    let first = server.current();
    let (_, parsed) = x509_parser::parse_x509_certificate(&first.cert[0]).unwrap();
    assert_eq!(parsed.subject_alternative_name().unwrap().unwrap().value.general_names.len(), 6);

    assert!(!server.renew_if_due(now.saturating_add(Duration::from_secs(59 * 86_400)).unwrap()).unwrap());
    assert!(Arc::ptr_eq(&first, &server.current()));
    assert!(server.renew_if_due(now.saturating_add(Duration::from_secs(61 * 86_400)).unwrap()).unwrap());
    assert!(!Arc::ptr_eq(&first, &server.current()));
}

#[tokio::test]
async fn the_advertised_address_is_found_again() {
    let store = MemorySecrets::default();
    assert_eq!(recorded_address(&store).await.unwrap(), None);
    CertificateAuthority::load_or_create(&store, None, clock::wall()).await.unwrap();
    assert_eq!(recorded_address(&store).await.unwrap(), None);
    record_address(&store, "cloud:10000").await.unwrap();
    let version = store.rows()[SECRET].metadata.resource_version.clone();
    record_address(&store, "cloud:10000").await.unwrap();
    assert_eq!(store.rows()[SECRET].metadata.resource_version, version, "nothing is written when nothing changes");
    assert_eq!(recorded_address(&store).await.unwrap().as_deref(), Some("cloud:10000"));
}
