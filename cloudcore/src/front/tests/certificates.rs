//! Certificates over the years, on real connections.

use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;

use super::*;
use crate::pki::{NodeKey, Step};

const RENEW: &str = "POST /v1/renew HTTP/1.1";

fn days(days: i64) -> jiff::SignedDuration {
    jiff::SignedDuration::from_hours(24 * days)
}

fn renewal() -> Vec<u8> {
    serde_json::json!({ "csr": Identity::new().csr() }).to_string().into_bytes()
}

impl Cloud {
    /// A node that was given its certificate so many days ago.
    async fn old_node(&self, name: &str, age: i64) -> Identity {
        let mut identity = self.node(name).await;
        let node = NodeIdentity { name: name.to_owned(), uid: format!("uid-of-{name}") };
        let key = NodeKey::from_csr(&identity.csr()).unwrap();
        identity.certificate = Some(self.authority().sign_node(&key, &node, clock::wall() - days(age)).unwrap());
        identity
    }

    async fn renew(&self, identity: &Identity) -> Result<JoinResponse, (u16, Refusal)> {
        self.post(Some(identity), RENEW, &renewal()).await
    }

    async fn sent_away(&self, identity: &Identity, name: &str) -> (Reason, Goodbye) {
        let mut edge = self.connect(identity).await;
        edge.send(hello(name, 0)).await;
        edge.goodbye().await
    }

    async fn refresh(&self, at: Timestamp) -> Option<Step> {
        let step = self.front.authority.refresh(&*self.secrets, None, at).await.unwrap();
        self.certificate.renew_if_due(clock::wall()).unwrap();
        step
    }
}

#[tokio::test]
async fn an_expired_certificate_gets_a_new_one_and_nothing_else() {
    let mut cloud = Cloud::start().await;
    let node = cloud.old_node("box-1", 1094).await;
    let (reason, said) = cloud.sent_away(&node, "box-1").await;
    assert_eq!(reason, Reason::CertificateExpired);
    assert!(said.message.contains("expired at") && said.message.contains("renews it by itself"), "{}", said.message);
    let (_endpoint, connection) = cloud.connection(Some(&node)).await;
    let mut edge = quic_sessions::Wire::over_quic(connection, Side::Edge, ()).await.unwrap();
    edge.push(Frame { body: Some(hello("box-1", 0)) });
    let Body::Goodbye(said) = quic_sessions::body(&mut edge).await else { panic!("it is sent away on QUIC, too") };
    assert_eq!(said.reason(), Reason::CertificateExpired);

    let (key, csr) = (Identity::new(), |key: &Identity| serde_json::json!({ "csr": key.csr() }).to_string());
    let renewed: JoinResponse = cloud.post(Some(&node), RENEW, csr(&key).as_bytes()).await.unwrap();
    let renewed = Identity { certificate: Some(renewed.certificate), ..key };
    let (_edge, ..) = cloud.session(&renewed, "box-1", 0).await;
}

#[tokio::test]
async fn deleting_the_node_revokes_an_expired_certificate_too() {
    let cloud = Cloud::start().await;
    let node = cloud.old_node("box-1", 400).await;
    let refused = |answer: Result<JoinResponse, (u16, Refusal)>| answer.map_err(|(status, no)| (status, no.reason));
    cloud.script().away = true;
    assert_eq!(refused(cloud.renew(&node).await).unwrap_err(), (503, "apiserver_unavailable".to_owned()));
    cloud.script().away = false;
    // One of the same name is another.
    cloud.script().nodes.insert("box-1".to_owned(), ("another".to_owned(), String::new()));
    assert_eq!(refused(cloud.renew(&node).await).unwrap_err(), (403, "node_deleted".to_owned()));
    cloud.script().nodes.clear();
    assert_eq!(refused(cloud.renew(&node).await).unwrap_err(), (403, "node_deleted".to_owned()));
    assert_eq!(cloud.sent_away(&node, "box-1").await.0, Reason::NodeDeleted, "so its pods end");
}

#[tokio::test]
async fn a_certificate_that_expired_long_ago_is_good_for_nothing() {
    let cloud = Cloud::start().await;
    let node = cloud.old_node("box-1", 1096).await;
    let (status, no) = cloud.renew(&node).await.unwrap_err();
    assert_eq!((status, no.reason.as_str()), (403, "certificate_too_old"));
    assert!(no.message.contains("`edgecore reset`") && no.message.contains("join again"), "{}", no.message);
    let (reason, said) = cloud.sent_away(&node, "box-1").await;
    assert_eq!(reason, Reason::Refused);
    assert_eq!(said.message, no.message);
}

/// Shows a certificate, with whatever key.
#[derive(Debug)]
struct Show(Arc<CertifiedKey>);

impl ResolvesClientCert for Show {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn an_expired_certificate_needs_its_key_and_our_ca() {
    let (cloud, other) = (Cloud::start().await, Cloud::start().await);
    let fails = async |config: ClientConfig| {
        let stream = TcpStream::connect(cloud.address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, stream).await else { return true };
        let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.is_err() && answer.is_empty()
    };
    let ours = cloud.old_node("box-1", 400).await;
    assert!(!fails(client(Some(&ours), &cloud.authority())).await);
    let theirs = other.old_node("box-1", 400).await;
    assert!(fails(client(Some(&theirs), &cloud.authority())).await);

    let thief = Identity::new();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(thief.key.serialize_der()));
    let key = rustls::crypto::ring::sign::any_ecdsa_type(&key).unwrap();
    let stolen = CertificateDer::from_pem_slice(ours.certificate.as_ref().unwrap().as_bytes()).unwrap();
    let mut config = client(None, &cloud.authority());
    config.client_auth_cert_resolver = Arc::new(Show(Arc::new(CertifiedKey::new(vec![stolen], key))));
    assert!(fails(config).await, "a certificate is no secret");
}

/// The chain with which the server proved itself.
fn shown(connection: &transport::Connection) -> Vec<CertificateDer<'static>> {
    connection.peer_certificates().unwrap()
}

#[tokio::test]
async fn one_ca_follows_another_and_nobody_notices() {
    let now = clock::wall();
    let mut cloud = Cloud::with_ca_since(now - days(5 * 365)).await;
    let old = cloud.authority();
    let token = cloud.any_token().await;
    let first = cloud.node("box-1").await;
    let (mut standing, ..) = cloud.session(&first, "box-1", 0).await;
    let on_quic = cloud.node("box-4").await;
    let (_endpoint, connection) = cloud.connection(Some(&on_quic)).await;
    let shown_first = shown(&connection);
    let mut standing_on_quic = quic_sessions::Wire::over_quic(connection, Side::Edge, ()).await.unwrap();
    standing_on_quic.push(Frame { body: Some(hello("box-4", 0)) });
    assert!(matches!(quic_sessions::body(&mut standing_on_quic).await, Body::Welcome(_)));
    let roots = |pem: &str| pem.matches("BEGIN CERTIFICATE").count();
    let trusting = async |cloud: &Cloud, identity: Option<&Identity>, trusted: &CertificateAuthority| {
        let mut stream = cloud.try_tls(identity, trusted).await?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.map(|_| answer.starts_with(b"HTTP/1.1 200"))
    };

    // The next one is told of, and signs nothing.
    assert_eq!(cloud.refresh(now).await, Some(Step::Announce));
    assert_eq!(cloud.refresh(now + days(300)).await, None);
    let told = cloud.authority();
    assert_eq!((roots(old.pem()), roots(told.pem())), (1, 2));
    let second = Identity::new();
    let joined = cloud.join(&token.to_string(), &request("box-2", &second)).await.unwrap();
    let second = Identity { certificate: Some(joined.certificate), ..second };
    assert_eq!(joined.ca, told.pem());
    assert!(trusting(&cloud, Some(&second), &old).await.unwrap(), "the old one has signed all this");

    // It signs. Whoever trusts the old one trusts it, too, and whose certificate the old one signed is welcome.
    assert_eq!(cloud.refresh(now + days(366)).await, Some(Step::Switch));
    let new = cloud.authority();
    assert_eq!(cloud.certificate.current().cert.len(), 2, "it is introduced by the old one");
    for trusted in [&old, &told, &new] {
        assert!(trusting(&cloud, Some(&first), trusted).await.unwrap());
        assert!(trusting(&cloud, None, trusted).await.unwrap());
    }
    let (_endpoint, connection) = cloud.connection(None).await;
    assert_eq!(shown(&connection), cloud.certificate.current().cert);
    assert_ne!(shown(&connection), shown_first, "who connects anew is shown the new one");
    let third = Identity::new();
    let joined = cloud.join(&token.to_string(), &request("box-3", &third)).await.expect("an old token is good");
    let third = Identity { certificate: Some(joined.certificate), ..third };
    assert_eq!((joined.ca.as_str(), roots(new.pem())), (new.pem(), 2));
    assert_eq!((new.pin(now + days(367)), new.pin(now + days(800)) == old.pin(now)), (old.pin(now), false));
    assert_eq!(cloud.renew(&first).await.unwrap().ca, new.pem());
    // A replica that has not looked again yet knows it already.
    assert!(told.verifies(third.certificate.as_ref().unwrap()));

    // The sessions from before have seen nothing of all this.
    standing_on_quic.push(Frame { body: Some(Body::Ping(Ping { token: 6 })) });
    loop {
        match quic_sessions::body(&mut standing_on_quic).await {
            Body::Pong(pong) => break assert_eq!(pong.token, 6),
            Body::Goodbye(said) => panic!("{said:?}"),
            _ => {}
        }
    }
    standing.send(Body::Ping(Ping { token: 5 })).await;
    loop {
        match standing.body().await {
            Body::Pong(pong) => break assert_eq!(pong.token, 5),
            Body::Goodbye(said) => panic!("{said:?}"),
            _ => {}
        }
    }

    // What the old one signed is good for nothing any more, and it goes.
    assert_eq!(cloud.refresh(now + days(366 + 1124)).await, None);
    assert_eq!(cloud.refresh(now + days(366 + 1125)).await, Some(Step::Drop));
    assert_eq!((cloud.certificate.current().cert.len(), roots(cloud.authority().pem())), (1, 1));
    assert!(trusting(&cloud, Some(&third), &new).await.unwrap());
    assert!(trusting(&cloud, Some(&first), &new).await.is_err());
    assert!(trusting(&cloud, None, &old).await.is_err());
}
