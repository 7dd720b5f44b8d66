//! Join tokens: Secrets `skerry-join-<id>` with a bounded life, perhaps a number of uses and a node name.
//!
//! The apiserver keeps the hash of a token's secret, never the secret. A use is counted after everything else went well, against the
//! resource version that was read, so that the last use is given once. A machine that used a token may use it again for the same node
//! without being counted, because a join that was interrupted is begun anew.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt as _;
use kube::api::ObjectMeta;
use rand::RngExt as _;
use skerry_proto::token::{ID_LEN, JoinToken, SECRET_LEN};

use crate::secrets::{SecretError, SecretStore};

const PREFIX: &str = "skerry-join-";
const LABEL: &str = "skerry.dev/join-token";
const UNLIMITED: &str = "unlimited";
/// An expired token stays for so long, so that whoever tries it hears that it expired and not that it never was.
const KEEP_EXPIRED: Duration = Duration::from_secs(7 * 86_400);
/// Bounds what is remembered of users, and with it the Secret.
pub const MAX_USES: u32 = 10_000;

/// What a new token should be.
#[derive(Clone, Debug)]
pub struct TokenSpec {
    /// How long it is good.
    pub ttl: Duration,
    /// How often; `None`: as often as wanted.
    pub uses: Option<u32>,
    /// The only node name it is good for.
    pub node: Option<String>,
}

/// What is known of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenInfo {
    /// Its id.
    pub id: String,
    /// Until when it is good.
    pub expires: Timestamp,
    /// How many uses are left; `None`: any number.
    pub uses: Option<u32>,
    /// The only node name it is good for.
    pub node: Option<String>,
}

/// Why a token does not open the door.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// No such token, or another secret. Which of the two is not told.
    #[error(
        "the join token is unknown: it was revoked, or belongs to another cluster; make a new one with `cloudcore token create`"
    )]
    Unknown,
    /// Its time is over.
    #[error("the join token expired at {0}; make a new one with `cloudcore token create`")]
    Expired(Timestamp),
    /// All its uses are used.
    #[error("the join token was used as often as it may be; make a new one with `cloudcore token create`")]
    UsedUp,
    /// Made for another node.
    #[error(
        "the join token is good for the node name {0} alone; join with `--node-name {0}`, or make a new one with `cloudcore token create`"
    )]
    OtherNode(String),
    /// Somebody edited the Secret.
    #[error("the join token {0} is damaged in the cluster; revoke it and make a new one with `cloudcore token create`")]
    Damaged(String),
    /// The apiserver does not play along.
    #[error("cannot look the join token up")]
    Store(#[from] SecretError),
}

/// Who wants to use a token.
#[derive(Clone, Copy, Debug)]
pub struct Joiner<'a> {
    /// The wanted node name.
    pub node: &'a str,
    /// The machine's id.
    pub machine: &'a str,
}

/// All tokens of a namespace.
#[derive(Debug)]
pub struct JoinTokens<S> {
    store: Arc<S>,
}

impl<S: SecretStore> JoinTokens<S> {
    /// Those in this store.
    pub fn new(store: Arc<S>) -> Self {
        Self { store }
    }

    /// Makes a token.
    pub async fn create(
        &self,
        spec: &TokenSpec,
        ca_hash: [u8; 32],
        now: Timestamp,
    ) -> Result<(JoinToken, TokenInfo), SecretError> {
        // Ids are short; a collision is drawn again.
        let mut tries = 0;
        loop {
            let token = JoinToken { id: random_word(ID_LEN), secret: random_word(SECRET_LEN), ca_hash };
            let info = TokenInfo {
                id: token.id.clone(),
                expires: now.saturating_add(spec.ttl).unwrap_or(Timestamp::MAX),
                uses: spec.uses,
                node: spec.node.clone(),
            };
            let record = Record { info, hash: digest(token.secret.as_bytes()), joined: Vec::new() };
            match self.store.create(&record.to_secret()).await {
                Ok(_) => return Ok((token, record.info)),
                Err(SecretError::Conflict) if tries < 5 => tries += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// All tokens, also expired ones not yet removed; damaged ones by id.
    pub async fn list(&self) -> Result<(Vec<TokenInfo>, Vec<String>), SecretError> {
        let (mut whole, mut damaged) = (Vec::new(), Vec::new());
        for secret in self.store.list(LABEL, "true").await? {
            match Record::from_secret(&secret) {
                Some(record) => whole.push(record.info),
                None => damaged.push(secret.name_any().trim_start_matches(PREFIX).to_owned()),
            }
        }
        whole.sort_by_key(|info| info.expires);
        Ok((whole, damaged))
    }

    /// Removes a token; false if there is none of this id.
    pub async fn revoke(&self, id: &str) -> Result<bool, SecretError> {
        match self.store.read(&format!("{PREFIX}{id}")).await? {
            Some(secret) => self.store.delete(&secret).await,
            None => Ok(false),
        }
    }

    /// Whether the token is good for this joiner now. Counts nothing.
    pub async fn verify(&self, token: &JoinToken, joiner: Joiner<'_>, now: Timestamp) -> Result<(), TokenError> {
        self.admit(token, joiner, now).await.map(drop)
    }

    /// Verifies again, and counts the use.
    pub async fn consume(&self, token: &JoinToken, joiner: Joiner<'_>, now: Timestamp) -> Result<(), TokenError> {
        // Every conflict means that another use was counted, so this ends.
        loop {
            let (secret, mut record) = self.admit(token, joiner, now).await?;
            let (Some(left), false) = (record.info.uses, record.knows(joiner)) else {
                return Ok(());
            };
            record.info.uses = Some(left.saturating_sub(1));
            record.joined.push(joiner.mark());
            let mut next = record.to_secret();
            next.metadata.resource_version = secret.metadata.resource_version;
            match self.store.replace(&next).await {
                Ok(_) => return Ok(()),
                Err(SecretError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Removes what expired long ago, and what cannot be read for as long; says how many those were.
    pub async fn sweep(&self, now: Timestamp) -> Result<usize, SecretError> {
        let mut removed = 0;
        for secret in self.store.list(LABEL, "true").await? {
            let end = match Record::from_secret(&secret) {
                Some(record) => Some(record.info.expires),
                None => secret.metadata.creation_timestamp.as_ref().map(|made| made.0),
            };
            let is_over = end.and_then(|end| end.checked_add(KEEP_EXPIRED).ok()).is_some_and(|end| end < now);
            if is_over && self.store.delete(&secret).await? {
                removed += 1;
            }
        }
        Ok(removed)
    }

    async fn admit(
        &self,
        token: &JoinToken,
        joiner: Joiner<'_>,
        now: Timestamp,
    ) -> Result<(Secret, Record), TokenError> {
        let secret = self.store.read(&format!("{PREFIX}{}", token.id)).await?.ok_or(TokenError::Unknown)?;
        if secret.labels().get(LABEL).is_none_or(|value| value != "true") {
            return Err(TokenError::Unknown);
        }
        let record = Record::from_secret(&secret).ok_or_else(|| TokenError::Damaged(token.id.clone()))?;
        if !same(&digest(token.secret.as_bytes()), &record.hash) {
            return Err(TokenError::Unknown);
        }
        if record.info.expires <= now {
            return Err(TokenError::Expired(record.info.expires));
        }
        if let Some(node) = record.info.node.as_ref().filter(|node| *node != joiner.node) {
            return Err(TokenError::OtherNode(node.clone()));
        }
        if record.info.uses == Some(0) && !record.knows(joiner) {
            return Err(TokenError::UsedUp);
        }
        Ok((secret, record))
    }
}

impl Joiner<'_> {
    /// Stands for this machine under this name in a token's list of users.
    fn mark(&self) -> String {
        let mut mark = digest(format!("{}\n{}", self.node, self.machine).as_bytes());
        mark.truncate(24);
        mark
    }
}

/// A token as its Secret holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    info: TokenInfo,
    hash: String,
    joined: Vec<String>,
}

impl Record {
    fn knows(&self, joiner: Joiner<'_>) -> bool {
        let mark = joiner.mark();
        self.joined.contains(&mark)
    }

    fn to_secret(&self) -> Secret {
        let mut data = BTreeMap::from([
            ("hash", self.hash.clone()),
            ("expires", self.info.expires.to_string()),
            ("uses", self.info.uses.map_or_else(|| UNLIMITED.to_owned(), |uses| uses.to_string())),
        ]);
        if let Some(node) = &self.info.node {
            data.insert("node", node.clone());
        }
        if !self.joined.is_empty() {
            data.insert("joined", self.joined.join("\n"));
        }
        Secret {
            metadata: ObjectMeta {
                name: Some(format!("{PREFIX}{}", self.info.id)),
                labels: Some(BTreeMap::from([(LABEL.to_owned(), "true".to_owned())])),
                ..ObjectMeta::default()
            },
            type_: Some("Opaque".to_owned()),
            data: Some(data.into_iter().map(|(key, value)| (key.to_owned(), ByteString(value.into_bytes()))).collect()),
            ..Secret::default()
        }
    }

    fn from_secret(secret: &Secret) -> Option<Self> {
        let text = |key: &str| {
            let bytes = secret.data.as_ref()?.get(key)?;
            std::str::from_utf8(&bytes.0).ok().map(str::trim)
        };
        let name = secret.metadata.name.as_deref()?;
        let uses = match text("uses")? {
            UNLIMITED => None,
            number => Some(number.parse().ok()?),
        };
        let hash = text("hash").filter(|hash| hash.len() == 64)?;
        Some(Self {
            info: TokenInfo {
                id: name.strip_prefix(PREFIX).filter(|id| JoinToken::is_id(id))?.to_owned(),
                expires: text("expires")?.parse().ok()?,
                uses,
                node: text("node").filter(|node| !node.is_empty()).map(str::to_owned),
            },
            hash: hash.to_owned(),
            joined: text("joined").map(|marks| marks.lines().map(str::to_owned).collect()).unwrap_or_default(),
        })
    }
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(ring::digest::digest(&ring::digest::SHA256, bytes))
}

/// Compares in a time that says nothing of where two hashes of one length differ.
fn same(a: &str, b: &str) -> bool {
    let differing = a.bytes().zip(b.bytes()).fold(0, |sum, (a, b)| std::hint::black_box(sum | (a ^ b)));
    a.len() == b.len() && differing == 0
}

fn random_word(len: usize) -> String {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut rng = rand::rng();
    (0..len).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())])).collect()
}

#[cfg(test)]
mod tests;
