//! Who asks: by a client certificate of the cluster's CA, as the apiserver does, or by a bearer token, as what scrapes metrics does.
//!
//! A handshake proves that the peer has the key of the certificate that it shows, and no more. Whose certificate it is is asked with each
//! request, by the CA as it is then. Nobody is anybody while that is not known.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use hyper::header::{AUTHORIZATION, HeaderMap};
use jiff::Timestamp;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use tracing::{debug, info, warn};

use super::cache::{Asked, Silence};
use super::reviews::{Reviews, User};
use crate::backend::BackendError;
use crate::clock;

/// How long what a review said of a token is good.
const TOKEN_TTL: Duration = Duration::from_secs(120);
/// A token that was nobody's may be somebody's soon.
const NOBODY_TTL: Duration = Duration::from_secs(10);
const MAX_TOKENS: usize = 4096;
/// Reviews under way at once.
const AT_ONCE: usize = 32;
/// Every user is in it who is not anonymous.
const AUTHENTICATED: &str = "system:authenticated";

/// The CAs that sign clients of the cluster.
#[derive(Debug, Default)]
pub(crate) struct ClientAuthorities(RwLock<Known>);

#[derive(Debug, Default)]
enum Known {
    /// The apiserver has not been asked yet.
    #[default]
    Unknown,
    /// There are none: nobody is known by a certificate.
    None,
    These {
        pem: String,
        verifier: Arc<dyn ClientCertVerifier>,
    },
}

/// Why it is not known who asks.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unauthenticated {
    /// Nobody, or somebody who cannot prove it.
    #[error("{0}")]
    Nobody(&'static str),
    /// The CA of clients is not known yet.
    #[error("which CA signs the clients of this cluster is not known yet: the apiserver has not said it")]
    NoAuthorities,
    /// The apiserver cannot be asked.
    #[error(transparent)]
    Unasked(#[from] BackendError),
    /// It does not answer.
    #[error("the apiserver does not answer who the token is")]
    Silence,
}

impl ClientAuthorities {
    /// The apiserver says that these are they.
    pub(crate) fn set(&self, pem: Option<&str>) {
        let pem = pem.unwrap_or_default();
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if matches!(&*known, Known::These { pem: held, .. } if held == pem) {
            return;
        }
        let mut roots = RootCertStore::empty();
        let (added, ignored) =
            roots.add_parsable_certificates(CertificateDer::pem_slice_iter(pem.as_bytes()).filter_map(Result::ok));
        if ignored > 0 {
            warn!(ignored, "certificates of the cluster's client CA cannot be used");
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        *known = match WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build() {
            Ok(verifier) => {
                info!(certificates = added, "the CA of the cluster's clients is known");
                Known::These { pem: pem.to_owned(), verifier }
            }
            Err(error) => {
                debug!("the cluster has no CA of clients: {error}");
                Known::None
            }
        };
    }

    /// The certificates that are known; empty: it is known that there are none.
    #[cfg(test)]
    pub(super) fn pem(&self) -> Option<String> {
        match &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            Known::Unknown => None,
            Known::None => Some(String::new()),
            Known::These { pem, .. } => Some(pem.clone()),
        }
    }

    /// Whose certificate this is, the first of the chain that a peer showed.
    fn user(&self, chain: &[CertificateDer<'_>], now: Timestamp) -> Result<User, Unauthenticated> {
        let verifier = match &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            Known::Unknown => return Err(Unauthenticated::NoAuthorities),
            Known::None => return Err(Unauthenticated::Nobody("no CA signs the clients of this cluster")),
            Known::These { verifier, .. } => Arc::clone(verifier),
        };
        let (own, intermediates) = chain.split_first().ok_or(Unauthenticated::Nobody("no certificate was shown"))?;
        let now = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(now.as_second()).unwrap_or_default()));
        verifier.verify_client_cert(own, intermediates, now).map_err(|error| {
            debug!("a client's certificate is not taken: {error}");
            Unauthenticated::Nobody("the certificate is not one of the cluster's CA, or not valid now")
        })?;
        let unreadable = Unauthenticated::Nobody("the certificate names nobody");
        let Ok((_, parsed)) = x509_parser::parse_x509_certificate(own) else { return Err(unreadable) };
        let text =
            |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| attribute.as_str().ok().map(str::to_owned);
        // Of several the last, as the apiserver reads it.
        let Some(Some(name)) = parsed.subject().iter_common_name().map(text).last() else { return Err(unreadable) };
        if name.is_empty() {
            return Err(unreadable);
        }
        let groups = parsed.subject().iter_organization().filter_map(text).collect();
        Ok(User { name, groups, ..User::default() })
    }
}

/// Says who asks.
pub(crate) struct Authenticator<R> {
    authorities: Arc<ClientAuthorities>,
    reviews: Arc<R>,
    tokens: Asked<Option<User>>,
}

impl<R: Reviews> Authenticator<R> {
    pub(crate) fn new(authorities: Arc<ClientAuthorities>, reviews: Arc<R>) -> Self {
        Self { authorities, reviews, tokens: Asked::new(MAX_TOKENS, AT_ONCE) }
    }

    /// By the certificates that the connection showed, else by the request's token.
    pub(crate) async fn user(
        &self,
        certificates: &[CertificateDer<'static>],
        headers: &HeaderMap,
    ) -> Result<User, Unauthenticated> {
        let mut refused = Unauthenticated::Nobody("neither a certificate nor a token was shown");
        if !certificates.is_empty() {
            match self.authorities.user(certificates, clock::wall()) {
                Ok(user) => return Ok(authenticated(user)),
                Err(error) => refused = error,
            }
        }
        match bearer(headers) {
            Some(token) => {
                let user = self.user_of_token(token).await?;
                user.map(authenticated).ok_or(Unauthenticated::Nobody("the token is nobody's"))
            }
            None => Err(refused),
        }
    }

    async fn user_of_token(&self, token: &str) -> Result<Option<User>, Unauthenticated> {
        let ask = async { Ok(self.reviews.token(token).await?) };
        let good_for = |user: &Option<User>| if user.is_some() { TOKEN_TTL } else { NOBODY_TTL };
        self.tokens.get(token.as_bytes(), ask, good_for).await
    }
}

impl From<Silence> for Unauthenticated {
    fn from(Silence: Silence) -> Self {
        Self::Silence
    }
}

fn authenticated(mut user: User) -> User {
    if !user.groups.iter().any(|group| group == AUTHENTICATED) {
        user.groups.push(AUTHENTICATED.to_owned());
    }
    user
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}
