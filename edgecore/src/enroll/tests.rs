//! Enrolling against a server of the test's own, for every way in which it can go wrong.

use std::collections::VecDeque;

use skerry_proto::payload::{JoinRequest, Refusal};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;
use crate::identity::tests::Authority;
use crate::supervise;

/// How the fake cloud answers a request.
pub(crate) enum Reply {
    /// As a real one.
    Proper,
    /// With a refusal.
    Refuse(&'static str, &'static str),
    /// With this status and body.
    Raw(u16, String),
    /// By closing the connection after having done what was asked.
    Hang,
}

/// A cloud that answers `/v1/ca`, `/v1/join` and `/v1/renew`.
pub(crate) struct FakeCloud {
    pub(crate) server: Server,
    pub(crate) authority: Arc<Authority>,
    pub(crate) replies: Arc<Mutex<VecDeque<Reply>>>,
    /// The key of each request for a certificate, as its CSR.
    pub(crate) requests: Arc<Mutex<Vec<JoinRequest>>>,
    pub(crate) clock: Arc<Mutex<i64>>,
    task: JoinHandle<()>,
}

impl Drop for FakeCloud {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) fn now() -> Timestamp {
    crate::clock::wall()
}

impl FakeCloud {
    pub(crate) async fn new() -> Self {
        let authority = Arc::new(Authority::new());
        let certificate = authority.server("localhost");
        Self::with(authority, certificate).await
    }

    pub(crate) async fn with(
        authority: Arc<Authority>,
        (certificate, key): (CertificateDer<'static>, rustls::pki_types::PrivateKeyDer<'static>),
    ) -> Self {
        let trusted = authority.pem();
        Self::with_chain(authority, trusted, vec![certificate], key).await
    }

    /// Tells to trust these, and shows a chain of its own.
    async fn with_chain(
        authority: Arc<Authority>,
        trusted: String,
        chain: Vec<CertificateDer<'static>>,
        key: rustls::pki_types::PrivateKeyDer<'static>,
    ) -> Self {
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("localhost:0").await.unwrap();
        let server = Server { host: "localhost".to_owned(), port: listener.local_addr().unwrap().port() };
        let replies: Arc<Mutex<VecDeque<Reply>>> = Arc::default();
        let requests: Arc<Mutex<Vec<JoinRequest>>> = Arc::default();
        let clock = Arc::new(Mutex::new(now().as_second()));
        let (ca, queue, log, time) =
            (Arc::clone(&authority), Arc::clone(&replies), Arc::clone(&requests), Arc::clone(&clock));
        let task = supervise::spawn("fake cloud", async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let mut bytes = Vec::new();
                let (head, body) = loop {
                    let mut chunk = [0; 4096];
                    let Ok(read @ 1..) = stream.read(&mut chunk).await else { break (String::new(), Vec::new()) };
                    bytes.extend_from_slice(&chunk[..read]);
                    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
                    let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
                    let length = head
                        .lines()
                        .find_map(|line| line.strip_prefix("content-length: "))
                        .map_or(0, |n| n.parse().unwrap());
                    if bytes.len() >= end + 4 + length {
                        break (head, bytes[end + 4..].to_vec());
                    }
                };
                let proper = if head.starts_with("get /v1/ca ") {
                    assert!(!head.contains("authorization"), "the token goes to nobody before it is known who that is");
                    trusted.clone()
                } else if let Ok(request) = serde_json::from_slice::<JoinRequest>(&body) {
                    let time = *time.lock().unwrap();
                    let signed = Timestamp::from_second(time).unwrap();
                    let certificate = ca.sign_at(&request.node, &request.csr, signed);
                    let response = JoinResponse { certificate, ca: trusted.clone(), time };
                    log.lock().unwrap().push(request);
                    serde_json::to_string(&response).unwrap()
                } else {
                    String::new()
                };
                let reply = queue.lock().unwrap().pop_front().unwrap_or(Reply::Proper);
                let (status, body) = match reply {
                    Reply::Proper => (200, proper),
                    Reply::Refuse(reason, message) => (
                        403,
                        serde_json::to_string(&Refusal { reason: reason.to_owned(), message: message.to_owned() })
                            .unwrap(),
                    ),
                    Reply::Raw(status, body) => (status, body),
                    Reply::Hang => continue,
                };
                let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            }
        });
        Self { server, authority, replies, requests, clock, task }
    }

    pub(crate) fn token(&self) -> JoinToken {
        JoinToken { id: "abc123".to_owned(), secret: "s".repeat(32), ca_hash: self.authority.hash() }
    }

    pub(crate) fn reply(&self, replies: impl IntoIterator<Item = Reply>) {
        self.replies.lock().unwrap().extend(replies);
    }
}

fn applicant() -> Applicant {
    Applicant { node: "box".to_owned(), machine_id: "m".to_owned(), labels: BTreeMap::new() }
}

async fn both(cloud: &FakeCloud, data_dir: &Path) -> Result<Enrolled, EnrollError> {
    let (ca, _) = fetch_ca(&cloud.server, &cloud.token(), now()).await?;
    enroll(&cloud.server, &cloud.token(), &ca, &applicant(), data_dir, now()).await
}

#[tokio::test]
async fn a_box_becomes_a_node_and_the_identity_lasts() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = FakeCloud::new().await;
    let enrolled = both(&cloud, dir.path()).await.unwrap();
    assert_eq!(enrolled.identity.node, "box");
    let loaded = Identity::load(dir.path()).unwrap().unwrap();
    assert!(trusts(&loaded, &cloud.token()));
    let renewed = identity::renew::renew(dir.path(), &cloud.server, &loaded).await;
    assert!(renewed.is_err(), "a renewal's body is no join request, which the fake answers with nothing");
    assert_eq!(Identity::load(dir.path()).unwrap().unwrap().not_after, loaded.not_after, "the old identity stays");
}

#[tokio::test]
async fn another_clusters_ca_is_refused_before_the_token_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let (cloud, other) = (FakeCloud::new().await, FakeCloud::new().await);
    let error = fetch_ca(&cloud.server, &other.token(), now()).await.unwrap_err();
    assert!(matches!(error, EnrollError::Pin { .. }), "{error}");
    assert!(error.to_string().contains("not the cluster that the token was made for"), "{error}");
    // Somebody in between shows the right CA and has no certificate of it.
    let liar = FakeCloud::with(Arc::clone(&cloud.authority), other.authority.server("localhost")).await;
    let error = fetch_ca(&liar.server, &cloud.token(), now()).await.unwrap_err();
    assert!(matches!(error, EnrollError::Pin { .. }), "{error}");
    assert!(Identity::load(dir.path()).unwrap().is_none());
}

#[tokio::test]
async fn names_and_clocks_are_told_apart() {
    let authority = Arc::new(Authority::new());
    let elsewhere = FakeCloud::with(Arc::clone(&authority), authority.server("elsewhere.example")).await;
    let error = fetch_ca(&elsewhere.server, &elsewhere.token(), now()).await.unwrap_err().to_string();
    assert!(error.contains("--advertise-address localhost"), "{error}");
    let expired = FakeCloud::with(Arc::clone(&authority), authority.server_valid("localhost", 2000, 2001)).await;
    let error = fetch_ca(&expired.server, &expired.token(), now()).await.unwrap_err().to_string();
    assert!(error.contains("set the clock"), "{error}");
}

#[tokio::test]
async fn roads_that_lead_nowhere_are_told_apart() {
    let cloud = FakeCloud::new().await;
    let to = |host: &str, port| Server { host: host.to_owned(), port };
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let error = fetch_ca(&to("127.0.0.1", closed), &cloud.token(), now()).await.unwrap_err().to_string();
    assert!(error.contains("refused the connection"), "{error}");
    let error = fetch_ca(&to("no-such-host.invalid", 1), &cloud.token(), now()).await.unwrap_err().to_string();
    assert!(error.contains("cannot be resolved"), "{error}");
    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = plain.local_addr().unwrap().port();
    let (server, token) = (to("127.0.0.1", port), cloud.token());
    let (error, ()) = tokio::join!(fetch_ca(&server, &token, now()), async {
        let (mut stream, _) = plain.accept().await.unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await.unwrap();
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("check that this is cloudcore's port"), "{error}");
    cloud.reply([Reply::Raw(404, "nothing here".to_owned())]);
    let error = fetch_ca(&cloud.server, &cloud.token(), now()).await.unwrap_err().to_string();
    assert!(error.contains("HTTP status 404"), "{error}");
}

#[tokio::test]
async fn refusals_are_shown_and_leave_nothing_joined() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = FakeCloud::new().await;
    for (reason, message) in [
        ("token_expired", "the token expired 3 h ago; make a new one"),
        ("token_used_up", "the token was used 1 of 1 times; make a new one"),
        ("token_other_node", "the token is for node other"),
        ("name_taken", "a node of that name is another machine; choose another with --node-name"),
    ] {
        cloud.reply([Reply::Proper, Reply::Refuse(reason, message)]);
        assert_eq!(both(&cloud, dir.path()).await.unwrap_err().to_string(), message);
        assert!(Identity::load(dir.path()).unwrap().is_none());
    }
    let other = Authority::new();
    let key = rcgen::KeyPair::generate().unwrap();
    let foreign = other.sign("box", &identity::request("box", &key).unwrap());
    let wrong_key = JoinResponse { certificate: foreign, ca: cloud.authority.pem(), time: 0 };
    for body in ["{}".to_owned(), "x".repeat(1 << 20), serde_json::to_string(&wrong_key).unwrap()] {
        cloud.reply([Reply::Proper, Reply::Raw(200, body)]);
        assert!(both(&cloud, dir.path()).await.is_err());
        assert!(Identity::load(dir.path()).unwrap().is_none());
    }
    both(&cloud, dir.path()).await.unwrap();
}

#[tokio::test]
async fn an_answer_that_never_came_is_asked_for_again_with_the_same_key() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = FakeCloud::new().await;
    cloud.reply([Reply::Proper, Reply::Hang]);
    both(&cloud, dir.path()).await.unwrap_err();
    both(&cloud, dir.path()).await.unwrap();
    let requests = cloud.requests.lock().unwrap();
    let key = |csr: &str| {
        rcgen::CertificateSigningRequestParams::from_pem(csr)
            .map(|csr| rcgen::PublicKeyData::der_bytes(&csr.public_key).to_vec())
            .unwrap()
    };
    assert_eq!(key(&requests[0].csr), key(&requests[1].csr));
    assert_eq!(requests[0].machine_id, requests[1].machine_id);
}

#[tokio::test]
async fn a_token_of_the_ca_before_is_good_while_that_one_introduces_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (Authority::new(), Arc::new(Authority::new()));
    let trusted = new.pem() + &old.pem();
    let cloud = async |introduced: Option<CertificateDer<'static>>| {
        let (certificate, key) = new.server("localhost");
        let chain = std::iter::once(certificate).chain(introduced).collect();
        FakeCloud::with_chain(Arc::clone(&new), trusted.clone(), chain, key).await
    };
    let good = cloud(Some(old.introduce(&new))).await;
    let token = JoinToken { ca_hash: old.hash(), ..good.token() };
    let (ca, _) = fetch_ca(&good.server, &token, now()).await.unwrap();
    let enrolled = enroll(&good.server, &token, &ca, &applicant(), dir.path(), now()).await.unwrap();
    assert_eq!(enrolled.identity.authorities().len(), 2, "it trusts both from now on");
    // To show the old one's certificate is no proof: that is public.
    for introduced in [None, Some(Authority::new().introduce(&new))] {
        let liar = cloud(introduced).await;
        let error = fetch_ca(&liar.server, &token, now()).await.unwrap_err();
        assert!(matches!(error, EnrollError::Pin { .. }), "{error}");
    }
}
