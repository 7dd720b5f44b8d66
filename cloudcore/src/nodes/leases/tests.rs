use std::collections::VecDeque;

use super::*;

fn node() -> NodeIdentity {
    NodeIdentity { name: "e".into(), uid: "u".into() }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn a_session_renews_until_it_ends() {
    let mut wheel = Wheel::default();
    wheel.begin(&node(), 3, seconds(0));
    let first = wheel.take(seconds(0)).unwrap();
    assert_eq!(first, Renewal { node: node(), epoch: 3, whole: true, version: None });
    assert_eq!(wheel.take(seconds(0)), None, "one request at a time");
    wheel.renewed(&first, Renewed::Epoch(3), seconds(1), 0.5);
    assert_eq!(
        wheel.next(),
        Some(Duration::from_millis(7250)),
        "the second soon, so that those who began together part"
    );
    assert!(!wheel.take(seconds(8)).unwrap().whole);
    wheel.end("e", 3);
    wheel.renewed(&first, Renewed::Yes, seconds(12), 0.5);
    assert_eq!(wheel.next(), None, "an answer that comes after the end");
}

#[test]
fn many_nodes_are_renewed_more_seldom_and_not_together() {
    let mut wheel = Wheel::default();
    for number in 0..2000 {
        wheel.begin(&NodeIdentity { name: format!("e-{number}"), uid: "u".into() }, 1, seconds(0));
    }
    assert_eq!(wheel.period(), seconds(20));
    let mut spread = 0.0;
    while let Some(renewal) = wheel.take(seconds(0)) {
        wheel.renewed(&renewal, Renewed::Yes, seconds(0), spread);
        spread += 1.0 / 2000.0;
    }
    for quarter in [5, 10, 15] {
        let due = wheel.due.iter().filter(|(due, _)| (seconds(quarter)..seconds(quarter + 5)).contains(due)).count();
        assert!((640..690).contains(&due), "{due} from {quarter} s on");
    }
    let renewal = wheel.take(seconds(6)).unwrap();
    wheel.renewed(&renewal, Renewed::Yes, seconds(6), 1.0);
    assert_eq!(wheel.nodes[&renewal.node.name].due, seconds(26), "never later than the period");
    wheel.begin(&node(), 1, seconds(7));
    let renewal = wheel.take(seconds(7)).filter(|renewal| renewal.whole || renewal.node.name != "e").unwrap();
    wheel.renewed(&renewal, Renewed::Failed, seconds(7), 1.0);
    assert_eq!(wheel.take(seconds(7)).as_ref(), Some(&renewal), "at once, and before all others that are due");
    wheel.renewed(&renewal, Renewed::Failed, seconds(7), 1.0);
    let first_of_others = wheel.take(seconds(9)).filter(|taken| *taken == renewal);
    assert_eq!(first_of_others.as_ref(), Some(&renewal), "soon, and before all others again");
    wheel.renewed(&renewal, Renewed::Failed, seconds(9), 1.0);
    assert!(wheel.nodes[&renewal.node.name].due > seconds(13), "what fails again is tried again more seldom too");
}

#[test]
fn renewals_are_late_when_one_is_that_is_due() {
    let mut wheel = Wheel::default();
    assert!(!wheel.is_late(seconds(100)), "there is none");
    wheel.begin(&node(), 3, seconds(10));
    assert!(!wheel.is_late(seconds(10) + LATE - Duration::from_millis(1)));
    assert!(wheel.is_late(seconds(10) + LATE));
    let renewal = wheel.take(seconds(13)).unwrap();
    assert!(!wheel.is_late(seconds(100)), "it is under way");
    wheel.renewed(&renewal, Renewed::Failed, seconds(14), 0.5);
    assert!(!wheel.is_late(seconds(16)) && wheel.is_late(seconds(17)), "it is due at once");
}

#[test]
fn a_session_that_ends_leaves_its_successor_alone() {
    let mut wheel = Wheel::default();
    wheel.begin(&node(), 3, seconds(0));
    let old = wheel.take(seconds(0)).unwrap();
    wheel.begin(&node(), 4, seconds(1));
    wheel.end("e", 3);
    wheel.renewed(&old, Renewed::Yes, seconds(2), 0.5);
    assert_eq!(wheel.take(seconds(2)), Some(Renewal { node: node(), epoch: 4, whole: true, version: None }));
    wheel.begin(&node(), 3, seconds(3));
    assert_eq!(wheel.nodes["e"].epoch, 4, "an older one does not take over");
}

#[test]
fn a_higher_epoch_elsewhere_ends_renewal() {
    let mut wheel = Wheel::default();
    wheel.begin(&node(), 3, seconds(0));
    let renewal = wheel.take(seconds(0)).unwrap();
    assert_eq!(wheel.renewed(&renewal, Renewed::Epoch(5), seconds(1), 0.5), Some(5));
    assert_eq!((wheel.next(), wheel.nodes.len()), (None, 0));
    assert_eq!(wheel.renewed(&renewal, Renewed::Epoch(5), seconds(1), 0.5), None, "its session is over already");
}

#[test]
fn failures_are_tried_again_soon_and_keep_the_first_write_due() {
    let mut wheel = Wheel::default();
    wheel.begin(&node(), 3, seconds(0));
    let renewal = wheel.take(seconds(0)).unwrap();
    wheel.renewed(&renewal, Renewed::Failed, seconds(1), 0.5);
    assert_eq!(wheel.next(), Some(seconds(1)), "once at once");
    assert_eq!(wheel.take(seconds(1)), Some(renewal.clone()));
    wheel.renewed(&renewal, Renewed::Failed, seconds(1), 1.0);
    assert_eq!((wheel.next(), wheel.take(seconds(2))), (Some(seconds(3)), None), "then soon");
    assert_eq!(wheel.take(seconds(3)), Some(renewal.clone()));
    wheel.renewed(&renewal, Renewed::Failed, seconds(3), 0.5);
    assert_eq!((wheel.next(), wheel.take(seconds(4))), (Some(seconds(5)), None), "then as all others");
    let renewal = wheel.take(seconds(5)).unwrap();
    assert!(renewal.whole);
    wheel.renewed(&renewal, Renewed::Yes, seconds(5), 0.5);
    let renewal = wheel.take(seconds(20)).unwrap();
    wheel.renewed(&renewal, Renewed::Failed, seconds(20), 0.5);
    wheel.end("e", 3);
    assert_eq!((wheel.next(), wheel.take(seconds(20))), (None, None), "one that is lost and has ended");
}

#[test]
fn two_lost_renewals_show_nowhere_however_many_nodes_there_are() {
    let mut wheel = Wheel::default();
    let name = |number: u32| NodeIdentity { name: format!("e-{number}"), uid: "u".into() };
    for number in 0..10_000 {
        wheel.begin(&name(number), 1, seconds(0));
    }
    while let Some(renewal) = wheel.take(seconds(0)) {
        wheel.renewed(&renewal, Renewed::Yes, seconds(0), 1.0);
    }
    let at = wheel.next().unwrap();
    let renewal = wheel.take(at).unwrap();
    wheel.renewed(&renewal, Renewed::Yes, at, 1.0);
    let due = wheel.nodes[&renewal.node.name].due;
    // Until then all others are due, too.
    while wheel.take(due).is_some_and(|taken| taken.node != renewal.node) {}
    let given_up = due + PATIENCE;
    wheel.renewed(&renewal, Renewed::Failed, given_up, 1.0);
    assert_eq!(wheel.take(given_up).as_ref(), Some(&renewal));
    wheel.renewed(&renewal, Renewed::Failed, given_up + PATIENCE, 1.0);
    let last = given_up + PATIENCE + AGAIN;
    assert_eq!(wheel.take(last), Some(renewal));
    assert!(last + PATIENCE - at <= WORST && WORST < seconds(40));
}

#[test]
fn renewals_in_hand_are_due_again_when_their_worker_is_gone() {
    let mut wheel = Wheel::default();
    wheel.begin(&node(), 3, seconds(0));
    wheel.take(seconds(0)).unwrap();
    wheel.abandoned(seconds(5));
    assert!(wheel.take(seconds(5)).is_some());
    assert_eq!(wheel.take(seconds(5)), None);
}

fn lease(renewal: &Renewal, more: &Value) -> DynamicObject {
    let mut lease = whole(renewal, "2026-01-01T00:00:00Z".parse().unwrap());
    lease["metadata"]["uid"] = "of-the-lease".into();
    lease["metadata"]["resourceVersion"] = "7".into();
    lease["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
    lease["metadata"]["managedFields"] = json!([{"manager": "cloudcore", "operation": "Update"}]);
    for (part, fields) in more.as_object().unwrap() {
        lease[part].as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    }
    serde_json::from_value(lease).unwrap()
}

#[test]
fn a_lease_is_replaced_while_nothing_is_in_it_that_others_wrote() {
    let now: Timestamp = "2026-01-01T00:00:00.25Z".parse().unwrap();
    let renewal = Renewal { node: node(), epoch: 3, whole: false, version: None };
    assert_eq!(time(now), json!({"spec": {"renewTime": "2026-01-01T00:00:00.250000Z"}}));
    assert_eq!(replaceable(&lease(&renewal, &json!({})), &renewal).as_deref(), Some("7"));
    let lease_of_others = [
        json!({"metadata": {"labels": {"a": "b"}}}),
        json!({"metadata": {"annotations": {EPOCH_ANNOTATION: "3", "a": "b"}}}),
        json!({"metadata": {"annotations": {EPOCH_ANNOTATION: "4"}}}),
        json!({"metadata": {"finalizers": ["a/b"]}}),
        json!({"metadata": {"ownerReferences": []}}),
        json!({"spec": {"leaseTransitions": 1}}),
        json!({"spec": {"holderIdentity": "another"}}),
    ];
    for more in lease_of_others {
        assert_eq!(replaceable(&lease(&renewal, &more), &renewal), None, "{more}");
    }
    let replaced = replacement(&renewal, "7", now);
    assert_eq!(replaced["metadata"]["annotations"][EPOCH_ANNOTATION], "3");
    assert_eq!(replaced["metadata"]["ownerReferences"][0]["uid"], "u");
    assert_eq!(replaced["metadata"]["resourceVersion"], "7");
    assert_eq!(replaced["metadata"]["managedFields"], json!([{}]));
}

#[test]
fn a_lease_lasts_as_long_as_it_says() {
    let renewal = Renewal { node: node(), epoch: 3, whole: false, version: None };
    let lease = lease(&renewal, &json!({}));
    for (now, expected) in
        [("2025-12-31T23:00:00Z", false), ("2026-01-01T00:00:39Z", true), ("2026-01-01T00:00:40Z", false)]
    {
        assert_eq!(lasts(&lease, now.parse().unwrap()), expected, "{now}");
    }
}

#[test]
fn a_lease_that_names_another_session_or_none_is_written_over() {
    let mut wheel = Wheel::default();
    wheel.begin(&node(), 3, seconds(0));
    let first = wheel.take(seconds(0)).unwrap();
    wheel.renewed(&first, Renewed::Epoch(3), seconds(0), 0.5);
    let second = wheel.take(seconds(20)).unwrap();
    assert!(!second.whole);
    wheel.renewed(&second, Renewed::Epoch(2), seconds(20), 0.5);
    let third = wheel.take(seconds(40)).unwrap();
    assert!(third.whole);
    wheel.renewed(&third, Renewed::Yes, seconds(40), 0.5);
    assert!(wheel.take(seconds(60)).unwrap().whole, "somebody took away whose it is");
}

/// What is asked for, and the code of the answer.
type Exchange = (&'static str, u16);

/// Renews once, from an apiserver that expects these requests and answers so: with the lease, or with an error. What it was sent last,
/// and how that ended.
async fn renew_once(renewal: &mut Renewal, answers: &[Exchange]) -> (Value, Renewed) {
    let script = Arc::new(Mutex::new(VecDeque::from(answers.to_vec())));
    let sent = Arc::new(Mutex::new(Value::Null));
    let shown = Kind::Lease.json(&lease(renewal, &json!({})));
    let serve = {
        let (script, sent) = (script.clone(), sent.clone());
        tower::service_fn(move |request: hyper::Request<kube::client::Body>| {
            let (script, sent, shown) = (script.clone(), sent.clone(), shown.clone());
            async move {
                let (expected, code) =
                    script.lock().unwrap().pop_front().expect("no more is asked for than is scripted");
                assert_eq!(request.method(), expected);
                let body = request.into_body().collect_bytes().await.unwrap();
                *sent.lock().unwrap() = serde_json::from_slice(&body).unwrap();
                let reason = if code == 404 { "NotFound" } else { "" };
                let failure = json!({"status": "Failure", "code": code, "reason": reason, "details": {"name": "e", "kind": "leases"}});
                let body = if code == 200 { shown } else { failure };
                let answer = hyper::Response::builder()
                    .status(code)
                    .body(kube::client::Body::from(body.to_string().into_bytes()));
                Ok::<_, std::convert::Infallible>(answer.unwrap())
            }
        })
    };
    let api = Apiserver::new(kube::Client::new(serve, "default"), crate::apiserver::Metrics::default());
    let how = renew(&api, renewal, "2026-01-01T00:00:00Z".parse().unwrap()).await;
    assert!(script.lock().unwrap().is_empty(), "asked for less than {answers:?}");
    let sent = sent.lock().unwrap().clone();
    (sent, how)
}

#[tokio::test]
async fn what_cannot_be_replaced_is_patched_and_what_cannot_be_patched_is_made() {
    let mine = Renewed::Epoch(3);
    let cases: [(bool, &[Exchange], Renewed); 9] = [
        (false, &[("PATCH", 200)], mine),
        (true, &[("PUT", 200)], mine),
        (true, &[("PUT", 409), ("PATCH", 200)], mine),
        (true, &[("PUT", 403), ("PATCH", 200)], mine),
        (true, &[("PUT", 404), ("PATCH", 404), ("POST", 200)], mine),
        (true, &[("PUT", 503)], Renewed::Failed),
        (true, &[("PUT", 409), ("PATCH", 429)], Renewed::Failed),
        (false, &[("PATCH", 403)], Renewed::Failed),
        (false, &[("PATCH", 404), ("POST", 404)], Renewed::Failed),
    ];
    for (replaceable, answers, expected) in cases {
        let version = replaceable.then(|| "6".into());
        let mut renewal = Renewal { node: node(), epoch: 3, whole: false, version };
        let (sent, how) = renew_once(&mut renewal, answers).await;
        assert_eq!(how, expected, "{answers:?}");
        assert_eq!(renewal.version.as_deref(), (how == mine).then_some("7"), "{answers:?}");
        let (last, _) = answers[answers.len() - 1];
        assert_eq!(sent["metadata"]["resourceVersion"], if last == "PUT" { json!("6") } else { Value::Null });
        assert_eq!(sent["spec"]["holderIdentity"], if last == "PATCH" { Value::Null } else { json!("e") });
        assert_eq!(sent["spec"]["renewTime"], "2026-01-01T00:00:00.000000Z");
    }
}

#[test]
fn only_what_an_answer_showed_is_replaced() {
    let mut wheel = Wheel::default();
    wheel.begin(&node(), 3, seconds(0));
    let mut renewal = wheel.take(seconds(0)).unwrap();
    renewal.version = Some("7".into());
    wheel.renewed(&renewal, Renewed::Yes, seconds(0), 0.5);
    let mut renewal = wheel.take(seconds(20)).unwrap();
    assert_eq!(renewal.version.take().as_deref(), Some("7"));
    wheel.renewed(&renewal, Renewed::Failed, seconds(20), 0.5);
    assert_eq!(wheel.take(seconds(20)).unwrap().version, None, "what became of it is not known");
}
