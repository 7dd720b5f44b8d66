//! Service account tokens: minted for one projected source of one pod, renewed ahead, never minted twice without need.
//!
//! [`Tokens`] is one node's table and decides; [`run`] asks the apiserver. A token survives its session: a reconnecting edge keeps what it
//! has, and the digests of the two sides agree with nothing sent. Only a cloudcore that knows of no token for some source, and cannot tell
//! that the edge has none either (it is new, or another replica served the edge in between), asks for the inventory first and mints what
//! is missing or used up. A table never holds a token for longer than its pod exists.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use skerry_proto::payload::{Token, token_key};
use skerry_proto::sync::{Collection, Entry, Object};
use tracing::{debug, warn};

use crate::apiserver::{Apiserver, backoff, verdict};
use crate::backend_k8s::Shared;
use crate::clock;

/// Token requests under way at once.
const AT_ONCE: usize = 8;
/// However long a token lives, it is renewed after this.
const OLDEST: SignedDuration = SignedDuration::from_hours(24);

/// One projected source of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TokenRequest {
    /// The pod's namespace.
    pub(crate) namespace: String,
    /// The pod's name.
    pub(crate) pod: String,
    /// The pod's UID.
    pub(crate) pod_uid: String,
    /// Whose token.
    pub(crate) service_account: String,
    /// For whom; empty for the apiserver.
    pub(crate) audience: String,
    /// How long it is asked to live.
    pub(crate) expiration_seconds: i64,
}

impl TokenRequest {
    /// Its key in the collection.
    pub(crate) fn key(&self) -> String {
        token_key(&self.namespace, &self.pod_uid, &self.audience, self.expiration_seconds)
    }

    fn body(&self) -> Value {
        let audiences: &[&str] = if self.audience.is_empty() { &[] } else { &[&self.audience] };
        json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": audiences,
                "expirationSeconds": self.expiration_seconds,
                "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": self.pod, "uid": self.pod_uid},
            },
        })
    }
}

/// What the edge should hold for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// This token.
    Object(Arc<Object>),
    /// What it has already.
    Keep(Entry),
}

#[derive(Debug)]
struct Row {
    request: TokenRequest,
    held: Option<Held>,
    /// A pod that has ended needs no new one.
    active: bool,
    attempts: u32,
    due: Timestamp,
    minting: bool,
}

#[derive(Debug)]
struct Held {
    /// Unix seconds; also the version.
    expires: i64,
    /// Absent when the edge has it and we never saw it.
    object: Option<Arc<Object>>,
}

/// One node's tokens.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    rows: BTreeMap<String, Row>,
    /// The last session's epoch.
    epoch: u64,
    /// The last session throughout which the edge held what this table says and nothing else: an edge that comes from it was nowhere else
    /// in between.
    known: Option<u64>,
    /// The edge's inventory is under way: nothing is minted until it is known.
    awaiting: bool,
    /// What became due when, since the last call of [`Tokens::scheduled`].
    scheduled: Vec<(Timestamp, String)>,
}

impl Tokens {
    /// What a pod wants now. Answers the keys that changed.
    pub(crate) fn set(
        &mut self,
        pod_uid: &str,
        requests: &[TokenRequest],
        active: bool,
        now: Timestamp,
    ) -> Vec<String> {
        let wanted: Vec<String> = requests.iter().map(TokenRequest::key).collect();
        let mut changed =
            self.retain(|key, row| row.request.pod_uid != pod_uid || wanted.iter().any(|wanted| wanted == key));
        for (key, request) in wanted.into_iter().zip(requests) {
            if let Some(row) = self.rows.get_mut(&key) {
                row.active = active;
                continue;
            }
            self.rows.insert(
                key.clone(),
                Row { request: request.clone(), held: None, active, attempts: 0, due: now, minting: false },
            );
            self.scheduled.push((now, key.clone()));
            changed.push(key);
        }
        changed
    }

    /// Forgets a pod's. Answers the keys that went.
    pub(crate) fn forget(&mut self, pod_uid: &str) -> Vec<String> {
        self.retain(|_, row| row.request.pod_uid != pod_uid)
    }

    /// A session begins; `last_epoch` is that of the one the edge had before, wherever that was. Answers whether the edge's inventory is
    /// needed before anything else. It is not when this table has something for every key: if the edge holds something else, the digests
    /// differ and the inventory comes by itself.
    pub(crate) fn open(&mut self, epoch: u64, last_epoch: u64) -> bool {
        if epoch < self.epoch {
            // It is over already: its successor has begun.
            return false;
        }
        self.awaiting = self.known != Some(last_epoch) && self.rows.values().any(|row| row.held.is_none());
        self.epoch = epoch;
        self.known = (!self.awaiting).then_some(epoch);
        self.reschedule();
        self.awaiting
    }

    /// The edge said what it holds. Answers the keys that changed.
    pub(crate) fn inventory(&mut self, entries: &[Entry], now: Timestamp) -> Vec<String> {
        self.awaiting = false;
        self.known = Some(self.epoch);
        let there: BTreeMap<&str, u64> = entries.iter().map(|entry| (entry.key.as_str(), entry.version)).collect();
        let mut changed = Vec::new();
        for (key, row) in &mut self.rows {
            let expires = there.get(key.as_str()).and_then(|version| i64::try_from(*version).ok());
            let held = row.held.as_ref().map(|held| held.expires);
            match expires {
                Some(expires) if expires > now.as_second() && held.is_none_or(|held| expires > held) => {
                    row.held = Some(Held { expires, object: None });
                    row.due = renewal(key, expires, expires.saturating_sub(row.request.expiration_seconds));
                }
                Some(expires) if held == Some(expires) => continue,
                _ if row.held.as_ref().is_some_and(|held| held.object.is_none()) => {
                    row.held = None;
                    row.due = now;
                }
                _ => continue,
            }
            changed.push(key.clone());
        }
        self.reschedule();
        changed
    }

    /// Hands out a request whose time, `due`, has come, once.
    pub(crate) fn take(&mut self, key: &str, due: Timestamp) -> Option<TokenRequest> {
        let row = self.rows.get_mut(key)?;
        if self.awaiting || row.minting || !row.active || row.due != due {
            return None;
        }
        row.minting = true;
        Some(row.request.clone())
    }

    /// What became of a request. Answers whether the key changed.
    pub(crate) fn minted(&mut self, key: &str, answer: Option<&Token>, now: Timestamp) -> bool {
        let Some(row) = self.rows.get_mut(key) else { return false };
        row.minting = false;
        let changed = if let Some(token) = answer {
            let version = u64::try_from(token.expires).unwrap_or_default();
            let entry = Entry { key: key.to_owned(), uid: key.to_owned(), version };
            let json = serde_json::to_vec(token).unwrap_or_default();
            row.held = Some(Held {
                expires: token.expires,
                object: Some(Object::with_version(Collection::Tokens, entry, &json).into()),
            });
            row.attempts = 0;
            row.due = renewal(key, token.expires, now.as_second());
            true
        } else {
            row.attempts = row.attempts.saturating_add(1);
            row.due = later(now, backoff(row.attempts, spread(key, i64::from(row.attempts))));
            row.held.is_none() && row.attempts == 1
        };
        self.scheduled.push((row.due, key.to_owned()));
        changed
    }

    /// Whoever was minting is gone: what it had in hand is due again.
    pub(crate) fn abandoned(&mut self) {
        for row in self.rows.values_mut() {
            row.minting = false;
        }
        self.reschedule();
    }

    /// What the edge should hold for this key.
    pub(crate) fn wanted(&self, key: &str) -> Option<Wanted> {
        let held = self.rows.get(key)?.held.as_ref()?;
        Some(held.object.clone().map_or_else(
            || {
                let version = u64::try_from(held.expires).unwrap_or_default();
                Wanted::Keep(Entry { key: key.to_owned(), uid: key.to_owned(), version })
            },
            Wanted::Object,
        ))
    }

    /// All keys.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &String> {
        self.rows.keys()
    }

    /// How many tokens are held or known to be held.
    pub(crate) fn held(&self) -> usize {
        self.rows.values().filter(|row| row.held.is_some()).count()
    }

    /// Whether nothing about any of them is open any more.
    pub(crate) fn settled(&self) -> bool {
        !self.awaiting && self.rows.values().all(Row::settled)
    }

    /// The same for one pod.
    pub(crate) fn pod_settled(&self, pod_uid: &str) -> bool {
        self.rows.values().filter(|row| row.request.pod_uid == pod_uid).all(|row| !self.awaiting && row.settled())
    }

    /// What became due when since the last call.
    pub(crate) fn scheduled(&mut self) -> Vec<(Timestamp, String)> {
        std::mem::take(&mut self.scheduled)
    }

    fn reschedule(&mut self) {
        self.scheduled = self.rows.iter().map(|(key, row)| (row.due, key.clone())).collect();
    }

    fn retain(&mut self, keep: impl Fn(&str, &Row) -> bool) -> Vec<String> {
        let gone: Vec<String> =
            self.rows.iter().filter(|(key, row)| !keep(key, row)).map(|(key, _)| key.clone()).collect();
        for key in &gone {
            self.rows.remove(key);
        }
        gone
    }
}

impl Row {
    /// There is one, there will be none, or it was tried and failed: the pod need not wait for it.
    const fn settled(&self) -> bool {
        self.held.is_some() || !self.active || self.attempts > 0
    }
}

/// When to renew: at 70 to 80 % of its life, spread by key so that what was minted together is not renewed together; after a day at the latest.
fn renewal(key: &str, expires: i64, issued: i64) -> Timestamp {
    let life = SignedDuration::from_secs(expires.saturating_sub(issued).max(0));
    let used = life.mul_f64(spread(key, expires).mul_add(0.1, 0.7)).min(OLDEST);
    Timestamp::from_second(issued).unwrap_or(Timestamp::MIN).checked_add(used).unwrap_or(Timestamp::MAX)
}

/// 0 to 1, the same for the same.
#[expect(clippy::cast_precision_loss, reason = "32 bits fit an f64")]
fn spread(key: &str, salt: i64) -> f64 {
    let mut hasher = DefaultHasher::new();
    (key, salt).hash(&mut hasher);
    (hasher.finish() >> 32) as f64 / f64::from(u32::MAX)
}

fn later(now: Timestamp, wait: std::time::Duration) -> Timestamp {
    now.checked_add(wait).unwrap_or(Timestamp::MAX)
}

/// Mints what is due for connected nodes, for ever.
pub(crate) async fn run(api: Apiserver, shared: Arc<Shared>) {
    shared.closures().mints_abandoned();
    let mut under_way = FuturesUnordered::new();
    loop {
        let now = clock::wall();
        let mut next = None;
        while under_way.len() < AT_ONCE {
            let (job, due) = shared.closures().due_token(now);
            next = due;
            let Some((node, request)) = job else { break };
            let api = api.clone();
            under_way.push(async move { (node, request.key(), mint(&api, &request).await) });
        }
        let wait = next.map_or(std::time::Duration::from_secs(3600), |due| {
            std::time::Duration::try_from(due.duration_since(now)).unwrap_or_default()
        });
        tokio::select! {
            Some((node, key, token)) = under_way.next(), if !under_way.is_empty() => {
                shared.closures().token_minted(&node, &key, token.as_ref(), clock::wall());
            }
            () = shared.token_wake().notified() => {}
            () = tokio::time::sleep(wait), if under_way.len() < AT_ONCE => {}
        }
    }
}

async fn mint(api: &Apiserver, request: &TokenRequest) -> Option<Token> {
    match api.mint(&request.namespace, &request.service_account, &request.body()).await {
        Ok(answer) => {
            let token = answer["status"]["token"].as_str();
            let expires =
                answer["status"]["expirationTimestamp"].as_str().and_then(|time| time.parse::<Timestamp>().ok());
            if let (Some(token), Some(expires)) = (token, expires) {
                api.metrics().token("minted");
                return Some(Token { token: token.to_owned(), expires: expires.as_second() });
            }
            api.metrics().token("failed");
            warn!(namespace = request.namespace, pod = request.pod, "the apiserver's token answer has no token");
            None
        }
        Err(error) => {
            api.metrics().token("failed");
            let (namespace, account) = (&request.namespace, &request.service_account);
            debug!(%namespace, %account, pod = request.pod, verdict = ?verdict(&error), "no token for now");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn request(pod_uid: &str) -> TokenRequest {
        TokenRequest {
            namespace: "n".into(),
            pod: "p".into(),
            pod_uid: pod_uid.into(),
            service_account: "default".into(),
            audience: String::new(),
            expiration_seconds: 3607,
        }
    }

    fn token(expires: i64) -> Token {
        Token { token: "t".into(), expires }
    }

    fn entry(pod_uid: &str, expires: u64) -> Entry {
        let key = request(pod_uid).key();
        Entry { uid: key.clone(), key, version: expires }
    }

    fn due(tokens: &mut Tokens, now: Timestamp) -> Vec<TokenRequest> {
        let scheduled = tokens.scheduled();
        scheduled.into_iter().filter(|(due, _)| *due <= now).filter_map(|(due, key)| tokens.take(&key, due)).collect()
    }

    #[test]
    fn a_new_pod_gets_one_and_it_is_renewed_ahead() {
        let mut tokens = Tokens::default();
        assert!(!tokens.open(1, 0), "no pods: nothing to ask for");
        tokens.set("a", &[request("a")], true, at(1000));
        assert!(!tokens.pod_settled("a"));
        assert_eq!(due(&mut tokens, at(1000)), [request("a")]);
        let key = request("a").key();
        assert!(tokens.minted(&key, Some(&token(4607)), at(1000)));
        assert!(tokens.pod_settled("a"));
        let (renew, _) = tokens.scheduled()[0];
        let used = (renew.as_second() - 1000) as f64 / 3607.0;
        assert!((0.69..=0.8).contains(&used), "renewed at {used}");
        assert_eq!(tokens.take(&key, renew), Some(request("a")));
        assert_eq!(tokens.take(&key, renew), None, "only once");
    }

    #[test]
    fn long_lived_ones_are_renewed_daily() {
        let renew = renewal("k", 30 * 86400, 0);
        assert_eq!(renew, at(86400));
    }

    #[test]
    fn a_reconnect_asks_nothing_unless_the_edge_may_hold_what_is_not_known_here() {
        let mut tokens = Tokens::default();
        assert!(!tokens.open(1000, 0));
        tokens.set("a", &[request("a")], true, at(1000));
        due(&mut tokens, at(1000));
        tokens.minted(&request("a").key(), Some(&token(4607)), at(1000));
        assert!(!tokens.open(2000, 1000), "nothing changed");
        assert!(!tokens.open(4000, 3000), "another replica served it, but what it changed shows in the digest");

        tokens.set("b", &[request("b")], true, at(1001));
        assert!(!tokens.open(5000, 4000), "a pod that came meanwhile: nobody else can have minted for it");
        assert_eq!(due(&mut tokens, at(1001)), [request("b")]);
        assert!(!tokens.open(4500, 4000), "a session that is over already changes nothing");
        assert!(tokens.open(7000, 6000), "another replica may have minted for it");
        assert!(tokens.open(8000, 7000), "the answer never came");
        tokens.inventory(&[entry("a", 4607)], at(1002));
        assert!(!tokens.open(9000, 8000));
    }

    #[test]
    fn a_fresh_cloudcore_takes_over_what_the_edge_holds() {
        let mut tokens = Tokens::default();
        tokens.set("fresh", &[request("fresh")], true, at(1000));
        tokens.set("used", &[request("used")], true, at(1000));
        tokens.set("missing", &[request("missing")], true, at(1000));
        tokens.set("expired", &[request("expired")], true, at(1000));
        assert!(tokens.open(1, 0));
        assert!(due(&mut tokens, at(1000)).is_empty(), "nothing before the inventory is known");
        assert!(!tokens.settled());

        tokens.inventory(
            &[entry("fresh", 4500), entry("used", 1100), entry("expired", 900), entry("stranger", 9999)],
            at(1000),
        );
        assert_eq!(tokens.wanted(&request("fresh").key()), Some(Wanted::Keep(entry("fresh", 4500))));
        assert_eq!(
            tokens.wanted(&request("used").key()),
            Some(Wanted::Keep(entry("used", 1100))),
            "good until the new one comes"
        );
        assert_eq!(tokens.wanted(&request("expired").key()), None);
        let mut minted: Vec<String> = due(&mut tokens, at(1000)).into_iter().map(|request| request.pod_uid).collect();
        minted.sort();
        assert_eq!(minted, ["expired", "missing", "used"]);
    }

    #[test]
    fn a_kept_token_that_the_edge_lost_is_minted_again() {
        let mut tokens = Tokens::default();
        tokens.set("a", &[request("a")], true, at(1000));
        tokens.open(1, 0);
        tokens.inventory(&[entry("a", 4500)], at(1000));
        assert!(due(&mut tokens, at(1000)).is_empty());
        tokens.inventory(&[], at(1100));
        assert_eq!(due(&mut tokens, at(1100)), [request("a")]);
    }

    #[test]
    fn an_edge_with_a_newer_token_than_ours_keeps_it() {
        let mut tokens = Tokens::default();
        tokens.set("a", &[request("a")], true, at(1000));
        due(&mut tokens, at(1000));
        tokens.minted(&request("a").key(), Some(&token(4000)), at(1000));
        tokens.inventory(&[entry("a", 5000)], at(1100));
        assert_eq!(tokens.wanted(&request("a").key()), Some(Wanted::Keep(entry("a", 5000))));
    }

    #[test]
    fn failures_are_retried_later_and_hold_no_pod_back() {
        let mut tokens = Tokens::default();
        tokens.set("a", &[request("a")], true, at(1000));
        due(&mut tokens, at(1000));
        assert!(tokens.minted(&request("a").key(), None, at(1000)));
        assert!(tokens.pod_settled("a"));
        let (retry, key) = tokens.scheduled()[0].clone();
        assert!(retry > at(1000) && retry < at(1031), "{retry}");
        assert!(tokens.take(&key, retry).is_some());
    }

    #[test]
    fn what_a_gone_or_ended_pod_had_is_not_minted() {
        let mut tokens = Tokens::default();
        tokens.set("a", &[request("a")], false, at(1000));
        assert!(due(&mut tokens, at(1000)).is_empty());
        assert!(tokens.settled());
        assert_eq!(tokens.forget("a"), [request("a").key()]);
        assert!(!tokens.minted(&request("a").key(), Some(&token(2000)), at(1000)), "an answer that comes too late");
    }
}
