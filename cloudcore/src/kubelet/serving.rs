//! The certificate that nodes' ports show: one that the cluster's own signer signed, where that is wanted and as long as it is valid, else
//! one of Skerry's CA.
//!
//! It is asked for as a kubelet with `serverTLSBootstrap` does it: a CertificateSigningRequest for the signer `kubernetes.io/kubelet-serving`,
//! which somebody has to approve; cloudcore has no right to. What was signed, and the key of what is asked for, are [`kept`] over
//! starts, and a request is named by its key: another start goes on with what there is.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::Api;
use kube::api::{ObjectMeta, PostParams};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData as _};
use rustls::crypto::ring::sign::any_ecdsa_type;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tracing::{debug, info, warn};

use self::kept::Kept;
use crate::clock;
use crate::pki::ServerCertificate;
use crate::retry::chain;
use crate::secrets::{KubeSecrets, SecretError, SecretStore, api_code};

mod kept;

const SIGNER: &str = "kubernetes.io/kubelet-serving";
/// What the signer wants of a key that is not RSA's.
const USAGES: [&str; 2] = ["digital signature", "server auth"];
/// It signs for nobody but nodes, by these names.
const NAME: &str = "system:node:skerry-cloudcore";
const GROUP: &str = "system:nodes";
/// How often a request is looked at.
const LOOK: Duration = Duration::from_secs(10);
/// How long after a no, or an apiserver that cannot be asked, another request is made.
const AGAIN: Duration = Duration::from_secs(600);

/// What handshakes of nodes' ports get.
pub struct ServingCertificate {
    own: Arc<ServerCertificate>,
    /// Whom the cluster's signer is asked for, if it is, and where that is kept.
    asked_for: Option<(String, KubeSecrets)>,
    signed: RwLock<Option<Signed>>,
}

#[derive(Debug)]
struct Signed {
    key: Arc<CertifiedKey>,
    since: Timestamp,
    until: Timestamp,
}

/// Why there is none of the signer's.
#[derive(Debug, thiserror::Error)]
enum Unsigned {
    #[error("the key or the request cannot be made")]
    Unmade(#[from] rcgen::Error),
    #[error("its key cannot be kept")]
    Unkept(#[from] SecretError),
    #[error("the apiserver does not take the request")]
    Untaken(#[source] Box<kube::Error>),
    #[error("{0}")]
    Refused(String),
    #[error("what was signed cannot be used: {0}")]
    Unusable(String),
}

impl ServingCertificate {
    /// Of Skerry's CA; `asked_for`: the cluster's signer is asked for this name or address, once [`follow`](Self::follow) runs.
    pub fn new(own: Arc<ServerCertificate>, asked_for: Option<(String, KubeSecrets)>) -> Self {
        Self { own, asked_for, signed: RwLock::default() }
    }

    /// Asks, and asks again ahead of the end of what was signed, for ever.
    pub(crate) async fn follow(&self, client: kube::Client) {
        let Some((host, secrets)) = &self.asked_for else { return std::future::pending().await };
        let requests: Api<CertificateSigningRequest> = Api::all(client);
        loop {
            let wait = match self.next(&requests, secrets, host).await {
                Ok(wait) => wait,
                // One at the same address, which asks for what is wanted here too.
                Err(Unsigned::Unkept(SecretError::Conflict)) => LOOK,
                Err(error) => {
                    warn!("the cluster's signer signs nothing for the ports of nodes: {}", chain(&error));
                    AGAIN
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// Shows what is kept, and asks for another where that is due; answers how long nothing is to be done then.
    async fn next(
        &self,
        requests: &Api<CertificateSigningRequest>,
        secrets: &impl SecretStore,
        host: &str,
    ) -> Result<Duration, Unsigned> {
        let mut kept = Kept::read(secrets, host).await?;
        if let Some(signed) = kept.signed().filter(|signed| clock::wall() < signed.until) {
            let wait = self.show(signed);
            if wait > LOOK {
                return Ok(wait);
            }
        }
        let key = match kept.next_key() {
            Some(key) => key,
            None => {
                let key = KeyPair::generate()?;
                kept.keep_key(secrets, Some(&key)).await?;
                key
            }
        };
        let signed = signed(requests, &key, host).await.and_then(|pem| Ok((Signed::new(&pem, &key)?, pem)));
        match signed {
            Ok((signed, pem)) => {
                let wait = self.show(signed);
                if let Err(error) = kept.keep_signed(secrets, &pem).await {
                    warn!("what the cluster's signer signed is asked for again at the next start: {}", chain(&error));
                }
                Ok(wait)
            }
            Err(error) => {
                if matches!(error, Unsigned::Refused(_) | Unsigned::Unusable(_)) {
                    kept.keep_key(secrets, None).await?;
                }
                Err(error)
            }
        }
    }

    /// Answers when another one is due.
    fn show(&self, signed: Signed) -> Duration {
        info!(until = %signed.until, "the ports of nodes show a certificate of the cluster's signer");
        let wait = signed.due_in(clock::wall());
        *self.signed.write().unwrap_or_else(PoisonError::into_inner) = Some(signed);
        wait
    }

    fn current(&self, now: Timestamp) -> Arc<CertifiedKey> {
        let signed = self.signed.read().unwrap_or_else(PoisonError::into_inner);
        let valid = signed.as_ref().filter(|signed| now < signed.until);
        valid.map_or_else(|| self.own.current(), |signed| Arc::clone(&signed.key))
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current(clock::wall()))
    }
}

impl std::fmt::Debug for ServingCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServingCertificate").finish_non_exhaustive()
    }
}

impl Signed {
    /// `pem`: the certificate, and those up to its CA.
    fn new(pem: &[u8], key: &KeyPair) -> Result<Self, Unsigned> {
        let unusable = |why: String| Unsigned::Unusable(why);
        let chain = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|error| unusable(error.to_string()))?;
        let own = chain.first().ok_or_else(|| unusable("there is no certificate in it".to_owned()))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(own).map_err(|error| unusable(error.to_string()))?;
        let time = |at: x509_parser::time::ASN1Time| {
            Timestamp::from_second(at.timestamp()).map_err(|error| unusable(error.to_string()))
        };
        let (since, until) = (time(parsed.validity().not_before)?, time(parsed.validity().not_after)?);
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let private = any_ecdsa_type(&private).map_err(|error| unusable(error.to_string()))?;
        let key = CertifiedKey::new(chain, private);
        key.keys_match().map_err(|error| unusable(error.to_string()))?;
        Ok(Self { key: Arc::new(key), since, until })
    }

    /// When the next one is asked for: when a fifth of its time is left.
    fn due_in(&self, now: Timestamp) -> Duration {
        let life = self.until.duration_since(self.since);
        let due = self.until.saturating_sub(life / 5).unwrap_or(self.until);
        Duration::try_from(due.duration_since(now)).unwrap_or_default().max(LOOK)
    }
}

/// Makes the request of a key, if it is not there yet, and waits until it is signed, however long that takes.
async fn signed(requests: &Api<CertificateSigningRequest>, key: &KeyPair, host: &str) -> Result<Vec<u8>, Unsigned> {
    let request = request(key, host)?;
    let name = request.metadata.name.clone().unwrap_or_default();
    match requests.create(&PostParams::default(), &request).await {
        Ok(_) => {}
        Err(error) if api_code(&error) == Some(409) => {}
        Err(error) => return Err(Unsigned::Untaken(Box::new(error))),
    }
    info!("waiting for somebody to approve: kubectl certificate approve {name}");
    loop {
        match requests.get_opt(&name).await {
            Ok(Some(request)) => {
                if let Some(pem) = answer(&request)? {
                    return Ok(pem.to_vec());
                }
            }
            // The controller-manager removes one that nobody approved for a day.
            Ok(None) => return Err(Unsigned::Refused(format!("CertificateSigningRequest {name} was removed"))),
            Err(error) => debug!(name, "cannot look at the CertificateSigningRequest: {}", chain(&error)),
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn request(key: &KeyPair, host: &str) -> Result<CertificateSigningRequest, rcgen::Error> {
    let mut params = CertificateParams::new([host.to_owned()])?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, GROUP);
    params.distinguished_name.push(DnType::CommonName, NAME);
    let pem = params.serialize_request(key)?.pem()?;
    let digest = ring::digest::digest(&ring::digest::SHA256, &key.subject_public_key_info());
    let name = format!("skerry-cloudcore-{}", hex::encode(&digest.as_ref()[..8]));
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta { name: Some(name), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: SIGNER.to_owned(),
            usages: Some(USAGES.map(str::to_owned).into()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    })
}

/// The certificate, once there is one.
fn answer(request: &CertificateSigningRequest) -> Result<Option<&[u8]>, Unsigned> {
    let Some(status) = &request.status else { return Ok(None) };
    let mut conditions = status.conditions.iter().flatten();
    if let Some(no) = conditions.find(|condition| matches!(condition.type_.as_str(), "Denied" | "Failed")) {
        let why = no.message.as_deref().or(no.reason.as_deref()).unwrap_or("no reason is given");
        return Err(Unsigned::Refused(format!("{}, {why}", no.type_.to_lowercase())));
    }
    Ok(status.certificate.as_ref().map(|pem| pem.0.as_slice()).filter(|pem| !pem.is_empty()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use rcgen::{BasicConstraints, IsCa, Issuer};
    use serde_json::{Value, json};
    use x509_parser::prelude::FromDer as _;

    use super::*;
    use crate::config::Advertise;
    use crate::pki::{CertificateAuthority, CurrentAuthority};
    use crate::secrets::fake::MemorySecrets;

    #[test]
    fn a_request_is_one_that_the_signer_takes() {
        let request = request(&KeyPair::generate().unwrap(), "192.0.2.7").unwrap();
        assert_eq!(request.spec.signer_name, SIGNER);
        let der = rustls::pki_types::CertificateSigningRequestDer::from_pem_slice(&request.spec.request.0).unwrap();
        let (_, csr) = x509_parser::certification_request::X509CertificationRequest::from_der(&der).unwrap();
        // ValidateKubeletServingCSR of k8s.io/kubernetes/pkg/apis/certificates.
        let subject = &csr.certification_request_info.subject;
        assert_eq!(subject.to_string(), "O=system:nodes, CN=system:node:skerry-cloudcore");
        let names = csr.requested_extensions().unwrap().find_map(|extension| match extension {
            x509_parser::extensions::ParsedExtension::SubjectAlternativeName(names) => Some(names.general_names.len()),
            _ => None,
        });
        assert_eq!(names, Some(1));
    }

    fn signer() -> Issuer<'static, KeyPair> {
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Issuer::new(ca, KeyPair::generate().unwrap())
    }

    /// An apiserver that has CertificateSigningRequests by name; what `sign` makes of one is there when it is looked at.
    fn apiserver(
        requests: &Arc<Mutex<BTreeMap<String, Value>>>,
        sign: impl Fn(&mut Value) + Clone + Send + 'static,
    ) -> Api<CertificateSigningRequest> {
        let requests = Arc::clone(requests);
        let serve = tower::service_fn(move |request: hyper::Request<kube::client::Body>| {
            let (requests, sign) = (Arc::clone(&requests), sign.clone());
            async move {
                let name = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
                let is_made = request.method() == "POST";
                let body = request.into_body().collect_bytes().await.unwrap();
                let mut requests = requests.lock().unwrap();
                let answer = if is_made {
                    let made: Value = serde_json::from_slice(&body).unwrap();
                    let name = made["metadata"]["name"].as_str().unwrap().to_owned();
                    let is_new = !requests.contains_key(&name);
                    requests.entry(name).or_insert_with(|| made.clone());
                    if is_new { Ok(made) } else { Err(409) }
                } else {
                    requests.get_mut(&name).ok_or(404).map(|request| {
                        sign(request);
                        request.clone()
                    })
                };
                let (code, body) = match answer {
                    Ok(body) => (200, body),
                    Err(code) => (
                        code,
                        json!({"status": "Failure", "code": code, "reason": if code == 404 { "NotFound" } else { "" }}),
                    ),
                };
                let body = kube::client::Body::from(body.to_string().into_bytes());
                Ok::<_, std::convert::Infallible>(hyper::Response::builder().status(code).body(body).unwrap())
            }
        });
        Api::all(kube::Client::new(serve, "default"))
    }

    async fn certificate() -> ServingCertificate {
        let authority = CertificateAuthority::load_or_create(&MemorySecrets::default(), None, clock::wall()).await;
        let authority = Arc::new(CurrentAuthority::new(authority.unwrap()));
        let advertised = [Advertise { host: "192.0.2.7".to_owned(), port: None }];
        let own = ServerCertificate::issue(authority, &advertised, clock::wall()).unwrap();
        ServingCertificate::new(Arc::new(own), None)
    }

    #[tokio::test]
    async fn another_start_goes_on_with_what_there_is() {
        let (secrets, made) = (MemorySecrets::default(), Arc::<Mutex<BTreeMap<String, Value>>>::default());
        let is_signed = |shown: &ServingCertificate| shown.signed.read().unwrap().is_some();
        // Nobody approves, and the process ends while it waits.
        let (first, unsigned) = (certificate().await, apiserver(&made, |_| {}));
        let asking = first.next(&unsigned, &secrets, "FD00::7");
        let asked = async {
            while made.lock().unwrap().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            _ = asking => panic!("nobody has signed"),
            () = asked => {}
        }
        assert!(secrets.rows().contains_key("skerry-kubelet-serving-fd00--7"));
        // Now somebody has.
        let issuer = Arc::new(signer());
        let signing = move |request: &mut Value| {
            let csr: CertificateSigningRequest = serde_json::from_value(request.clone()).unwrap();
            let pem = String::from_utf8(csr.spec.request.0).unwrap();
            let mut csr = rcgen::CertificateSigningRequestParams::from_pem(&pem).unwrap();
            csr.params.not_after = rcgen::date_time_ymd(2099, 1, 1);
            let pem = csr.signed_by(&issuer).unwrap().pem();
            request["status"] = json!({"certificate": ByteString(pem.into_bytes())});
        };
        let (second, signs) = (certificate().await, apiserver(&made, signing));
        assert!(second.next(&signs, &secrets, "FD00::7").await.unwrap() > LOOK && is_signed(&second));
        assert_eq!(made.lock().unwrap().len(), 1, "the request of the first start was the one");
        // And what was signed is shown again.
        let (third, away) = (certificate().await, apiserver(&Arc::default(), |_| panic!("nothing is asked")));
        assert!(third.next(&away, &secrets, "FD00::7").await.unwrap() > LOOK && is_signed(&third));
    }

    #[tokio::test]
    async fn after_a_no_another_key_is_asked_for() {
        let (secrets, made) = (MemorySecrets::default(), Arc::<Mutex<BTreeMap<String, Value>>>::default());
        let denies = apiserver(&made, |request| {
            request["status"] = json!({"conditions": [{"type": "Denied", "status": "True", "message": "no"}]});
        });
        let shown = certificate().await;
        for asked in 1..=2 {
            let no = shown.next(&denies, &secrets, "node.example").await.unwrap_err();
            assert!(matches!(no, Unsigned::Refused(_)), "{no}");
            assert_eq!(made.lock().unwrap().len(), asked);
        }
        secrets.fail(1);
        assert!(matches!(shown.next(&denies, &secrets, "node.example").await, Err(Unsigned::Unkept(_))));
    }

    #[test]
    fn what_was_signed_is_shown_while_it_is_valid() {
        let (key, issuer) = (KeyPair::generate().unwrap(), signer());
        let mut params = CertificateParams::new(["192.0.2.7".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2026, 1, 1);
        params.not_after = rcgen::date_time_ymd(2026, 1, 11);
        let pem = params.signed_by(&key, &issuer).unwrap().pem();
        let signed = Signed::new(pem.as_bytes(), &key).unwrap();
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        assert_eq!(signed.due_in(at("2026-01-08T00:00:00Z")), Duration::from_secs(86_400));
        assert_eq!(signed.due_in(at("2026-01-10T00:00:00Z")), LOOK);
        assert!(matches!(Signed::new(pem.as_bytes(), &KeyPair::generate().unwrap()), Err(Unsigned::Unusable(_))));
        assert!(matches!(Signed::new(b"nonsense", &key), Err(Unsigned::Unusable(_))));
    }

    #[test]
    fn an_answer_is_a_certificate_or_a_no() {
        let of = |status: Value| -> CertificateSigningRequest {
            let spec = json!({"request": "", "signerName": SIGNER});
            serde_json::from_value(json!({"metadata": {}, "spec": spec, "status": status})).unwrap()
        };
        assert_eq!(answer(&of(json!({}))).unwrap(), None);
        let approved = json!([{"type": "Approved", "status": "True"}]);
        assert_eq!(answer(&of(json!({"conditions": approved}))).unwrap(), None);
        assert_eq!(answer(&of(json!({"conditions": approved, "certificate": "UEVN"}))).unwrap(), Some(&b"PEM"[..]));
        let denied = of(json!({"conditions": [{"type": "Denied", "status": "True", "message": "not by me"}]}));
        assert_eq!(answer(&denied).unwrap_err().to_string(), "denied, not by me");
    }
}
