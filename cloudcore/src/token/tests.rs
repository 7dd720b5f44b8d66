use std::sync::atomic::Ordering;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use proptest::prelude::*;

use super::*;
use crate::secrets::fake::MemorySecrets;

const NOW: Timestamp = Timestamp::UNIX_EPOCH;
const BOX: Joiner<'_> = Joiner { node: "box-1", machine: "m1" };
const OTHER: Joiner<'_> = Joiner { node: "box-2", machine: "m2" };

fn later(seconds: u64) -> Timestamp {
    NOW.saturating_add(Duration::from_secs(seconds)).unwrap()
}

fn tokens() -> (Arc<MemorySecrets>, JoinTokens<MemorySecrets>) {
    let store = Arc::new(MemorySecrets::default());
    (Arc::clone(&store), JoinTokens::new(store))
}

async fn made(tokens: &JoinTokens<MemorySecrets>, uses: Option<u32>, node: Option<&str>) -> JoinToken {
    let spec = TokenSpec { ttl: Duration::from_secs(3600), uses, node: node.map(str::to_owned) };
    tokens.create(&spec, [7; 32], NOW).await.unwrap().0
}

#[tokio::test]
async fn every_refusal_is_told_apart() {
    let (store, tokens) = tokens();
    let free = made(&tokens, None, None).await;
    assert!(tokens.verify(&free, BOX, later(3599)).await.is_ok());
    assert!(matches!(tokens.verify(&free, BOX, later(3600)).await, Err(TokenError::Expired(at)) if at == later(3600)));

    let wrong = JoinToken { secret: "x".repeat(32), ..free.clone() };
    assert!(
        matches!(tokens.verify(&wrong, BOX, later(3601)).await, Err(TokenError::Unknown)),
        "a wrong secret learns nothing"
    );
    let absent = JoinToken { id: "aaaaaa".to_owned(), ..free.clone() };
    assert!(matches!(tokens.verify(&absent, BOX, NOW).await, Err(TokenError::Unknown)));

    let bound = made(&tokens, None, Some("box-1")).await;
    assert!(tokens.verify(&bound, BOX, NOW).await.is_ok());
    assert!(matches!(tokens.verify(&bound, OTHER, NOW).await, Err(TokenError::OtherNode(node)) if node == "box-1"));

    store.fail(1);
    assert!(matches!(tokens.verify(&free, BOX, NOW).await, Err(TokenError::Store(error)) if error.is_transient()));

    assert!(tokens.revoke(&free.id).await.unwrap());
    assert!(!tokens.revoke(&free.id).await.unwrap());
    assert!(matches!(tokens.verify(&free, BOX, NOW).await, Err(TokenError::Unknown)));

    let name = format!("{PREFIX}{}", bound.id);
    store.rows().get_mut(&name).unwrap().data.as_mut().unwrap().remove("expires");
    assert!(matches!(tokens.verify(&bound, BOX, NOW).await, Err(TokenError::Damaged(_))));
    assert_eq!(tokens.list().await.unwrap().1, [bound.id]);
}

#[tokio::test]
async fn a_secret_without_the_label_is_no_token() {
    let (store, tokens) = tokens();
    let token = made(&tokens, None, None).await;
    store.rows().values_mut().for_each(|row| row.metadata.labels = None);
    assert!(matches!(tokens.verify(&token, BOX, NOW).await, Err(TokenError::Unknown)));
}

#[tokio::test]
async fn the_last_use_is_given_once() {
    let (store, tokens) = tokens();
    let token = made(&tokens, Some(1), None).await;
    let (a, b) = tokio::join!(tokens.consume(&token, BOX, NOW), tokens.consume(&token, OTHER, NOW));
    assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
    assert!(matches!(a.and(b), Err(TokenError::UsedUp)));
    assert_eq!(store.conflicts.load(Ordering::SeqCst), 1, "both have tried to take it");
    assert_eq!(tokens.list().await.unwrap().0[0].uses, Some(0));
}

#[tokio::test]
async fn many_at_once_use_no_more_than_there_are() {
    let (_, tokens) = tokens();
    let token = made(&tokens, Some(5), None).await;
    let names: Vec<String> = (0..12).map(|n| format!("box-{n}")).collect();
    let all = names.iter().map(|name| tokens.consume(&token, Joiner { node: name, machine: name }, NOW));
    let ends = futures_util::future::join_all(all).await;
    assert_eq!(ends.iter().filter(|end| end.is_ok()).count(), 5);
    assert!(ends.into_iter().filter_map(Result::err).all(|error| matches!(error, TokenError::UsedUp)));
}

#[tokio::test]
async fn a_join_begun_anew_is_not_counted_again() {
    let (_, tokens) = tokens();
    let token = made(&tokens, Some(1), None).await;
    for _ in 0..3 {
        tokens.verify(&token, BOX, NOW).await.unwrap();
        tokens.consume(&token, BOX, NOW).await.unwrap();
    }
    for joiner in [OTHER, Joiner { machine: "m2", ..BOX }, Joiner { node: "box-2", ..BOX }] {
        assert!(matches!(tokens.verify(&token, joiner, NOW).await, Err(TokenError::UsedUp)), "{joiner:?}");
    }
}

#[tokio::test]
async fn unlimited_uses_write_nothing() {
    let (store, tokens) = tokens();
    let token = made(&tokens, None, None).await;
    let before = store.rows().clone();
    tokens.consume(&token, BOX, NOW).await.unwrap();
    assert_eq!(*store.rows(), before);
}

#[tokio::test]
async fn the_store_holds_no_secret_and_the_sweep_leaves_what_is_good() {
    let (store, tokens) = tokens();
    let token = made(&tokens, None, None).await;
    let text = serde_json::to_string(&*store.rows()).unwrap();
    let encoded = {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode(&token.secret)
    };
    assert!(!text.contains(&token.secret) && !text.contains(&encoded));
    assert_eq!(tokens.sweep(later(3600 + 86_400)).await.unwrap(), 0);
    assert_eq!(tokens.sweep(later(3601 + 7 * 86_400)).await.unwrap(), 1);
    assert!(store.rows().is_empty());
}

#[tokio::test]
async fn what_nobody_can_read_is_swept_by_its_age() {
    let (store, tokens) = tokens();
    let token = made(&tokens, None, None).await;
    let mut damaged = store.read(&format!("{PREFIX}{}", token.id)).await.unwrap().unwrap();
    damaged.data = None;
    assert!(store.delete(&damaged).await.unwrap());
    damaged.metadata = ObjectMeta { creation_timestamp: Some(Time(NOW)), resource_version: None, ..damaged.metadata };
    store.create(&damaged).await.unwrap();
    assert_eq!(tokens.sweep(later(7 * 86_400)).await.unwrap(), 0);
    assert_eq!(tokens.sweep(later(1 + 7 * 86_400)).await.unwrap(), 1);
}

proptest! {
    #[test]
    fn records_are_read_back(id in "[a-z0-9]{6}", seconds in 0i64..4_000_000_000, uses in proptest::option::of(0u32..=MAX_USES),
        node in proptest::option::of("[a-z0-9]{1,20}"), marks in proptest::collection::vec("[0-9a-f]{24}", 0..4)) {
        let expires = Timestamp::from_second(seconds).unwrap();
        let record = Record { info: TokenInfo { id, expires, uses, node }, hash: "0".repeat(64), joined: marks };
        prop_assert_eq!(Record::from_secret(&record.to_secret()), Some(record));
    }

    #[test]
    fn any_secret_is_answered(name in "(skerry-join-)?[a-z0-9]{0,8}", rows in proptest::collection::btree_map("hash|expires|uses|node|joined", ".{0,70}", 0..5)) {
        let secret = Secret {
            metadata: ObjectMeta { name: Some(name), ..ObjectMeta::default() },
            data: Some(rows.into_iter().map(|(key, value)| (key, ByteString(value.into_bytes()))).collect()),
            ..Secret::default()
        };
        let _ = Record::from_secret(&secret);
    }
}
