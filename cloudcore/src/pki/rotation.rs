//! How one CA follows another without anybody noticing.
//!
//! 1. At half of its life a new one is made, and its certificate is signed by the old one, too. Everyone is told to trust it: who
//!    joins or renews gets all certificates to trust. It signs nothing yet, so that every replica and every node that is up knows it
//!    before it matters.
//! 2. After the life of a node's certificate it begins to sign. The server shows its certificate with the old one's signature on it,
//!    so that a node that was off all the while, or a box with an old token, believes it on the old one's word.
//! 3. The old one is trusted as long as a certificate that it signed can be used, that is: renewed. Then it goes.
//!
//! The Secret is the one place where this stands, and it is replaced only as it was read, so that all replicas take the same steps.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use rcgen::KeyPair;

use super::{
    CERTIFICATE_KEY, CROSS_KEY, CaError, CertificateAuthority, LIFE, NEXT_CERTIFICATE_KEY, NEXT_CROSS_KEY,
    NEXT_PRIVATE_KEY, PRIVATE_KEY, SECRET, SINCE_ANNOTATION, node, params_of,
};
use crate::secrets::{SecretError, SecretStore};

/// A new one is made when the one that signs has so much of its life left.
const AHEAD: Duration = Duration::from_secs(LIFE.as_secs() / 2);
/// The new one is told of for so long before it signs: every node that is up renews its certificate meanwhile.
const TOLD: Duration = node::LIFE;
/// The old one is trusted for so long after: its last certificates expire and are not renewed any more; and some days for a replica
/// that was behind.
const KEPT: Duration = Duration::from_secs(3 * node::LIFE.as_secs() + 30 * 86_400);
/// Attempts while other replicas are faster.
const TRIES: usize = 3;

/// What is done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make the next CA, and tell of it.
    Announce,
    /// Let the next one sign.
    Switch,
    /// Trust those before it no more.
    Drop,
}

/// What the Secret holds, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// When the one that signs expires.
    pub(super) expires: Timestamp,
    /// When the next one was made, if there is one.
    pub(super) next: Option<Timestamp>,
    /// The one before, if it is trusted still.
    pub(super) replaced: Option<Replaced>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Replaced {
    /// When it expires.
    pub(super) expires: Timestamp,
    /// When it was replaced, if that is known.
    pub(super) at: Option<Timestamp>,
}

impl Held {
    /// Whether tokens that are made now pin the one before.
    pub(super) fn pins_previous(&self, now: Timestamp) -> bool {
        self.replaced.and_then(|replaced| replaced.at).is_some_and(|at| now < later(at, TOLD))
    }
}

/// What is to be done now, if anything.
pub(super) fn plan(now: Timestamp, held: &Held) -> Option<Step> {
    if let Some(replaced) = held.replaced
        && now >= replaced.at.map_or(replaced.expires, |at| later(at, KEPT))
    {
        return Some(Step::Drop);
    }
    match held.next {
        // With one that has expired nothing can be signed.
        Some(made) => (now >= later(made, TOLD) || now >= held.expires).then_some(Step::Switch),
        None => (later(now, AHEAD) >= held.expires).then_some(Step::Announce),
    }
}

impl CertificateAuthority {
    /// Reads the CA, takes the step that is due if one is, and says which.
    pub(super) async fn advance(store: &impl SecretStore, now: Timestamp) -> Result<(Self, Option<Step>), CaError> {
        for _ in 0..TRIES {
            let secret = store.read(SECRET).await?.ok_or(CaError::Gone)?;
            let authority = Self::from_secret(&secret)?;
            let Some(step) = plan(now, &authority.held) else { return Ok((authority, None)) };
            let changed = authority.apply(step, secret, now)?;
            // What cannot be read again is not written.
            Self::from_secret(&changed)?;
            match store.replace(&changed).await {
                Ok(written) => return Ok((Self::from_secret(&written)?, Some(step))),
                Err(SecretError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(SecretError::Conflict.into())
    }

    fn apply(&self, step: Step, mut secret: Secret, now: Timestamp) -> Result<Secret, CaError> {
        let annotations = secret.metadata.annotations.get_or_insert_default();
        let data = secret.data.get_or_insert_default();
        let mut put = |name: &str, pem: String| data.insert(name.to_owned(), ByteString(pem.into_bytes()));
        match step {
            Step::Announce => {
                let key = KeyPair::generate()?;
                put(NEXT_CERTIFICATE_KEY, params_of(&key, 1, now, LIFE).self_signed(&key)?.pem());
                put(NEXT_PRIVATE_KEY, key.serialize_pem());
                let left = Duration::try_from(self.expires().duration_since(now)).unwrap_or_default();
                let mut cross = params_of(&key, 0, now, left);
                cross.use_authority_key_identifier_extension = true;
                put(NEXT_CROSS_KEY, cross.signed_by(&key, &self.issuer)?.pem());
            }
            Step::Switch => {
                let mut take = |name: &str| {
                    data.remove(name)
                        .ok_or_else(|| CaError::Damaged(format!("it has a {NEXT_CERTIFICATE_KEY} and no {name}")))
                };
                let (mut certificates, key) = (take(NEXT_CERTIFICATE_KEY)?, take(NEXT_PRIVATE_KEY)?);
                let cross = take(NEXT_CROSS_KEY)?;
                certificates.0.extend(take(CERTIFICATE_KEY)?.0);
                data.insert(CERTIFICATE_KEY.to_owned(), certificates);
                data.insert(PRIVATE_KEY.to_owned(), key);
                data.insert(CROSS_KEY.to_owned(), cross);
                annotations.insert(SINCE_ANNOTATION.to_owned(), now.to_string());
            }
            Step::Drop => {
                put(CERTIFICATE_KEY, self.issuing_pem());
                data.remove(CROSS_KEY);
                annotations.remove(SINCE_ANNOTATION);
            }
        }
        Ok(secret)
    }

    /// The certificate of the one that signs, alone.
    fn issuing_pem(&self) -> String {
        const END: &str = "-----END CERTIFICATE-----";
        let end = self.pem.find(END).map_or(self.pem.len(), |at| at + END.len());
        format!("{}\n", &self.pem[..end])
    }
}

fn later(at: Timestamp, by: Duration) -> Timestamp {
    SignedDuration::try_from(by).ok().and_then(|by| at.checked_add(by).ok()).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests;
