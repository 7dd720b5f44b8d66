//! Closures against a naive recomputation, and the orders that sessions rely on.

use proptest::prelude::*;
use serde_json::json;
use skerry_proto::sync::{Entry, decode};

use super::services::KUBERNETES;
use super::*;
use crate::backend::FeedEvent;

/// One start of the agent.
const WHO: u64 = 7;

const NOW: Timestamp = Timestamp::UNIX_EPOCH;

fn identity(name: &str) -> NodeIdentity {
    NodeIdentity { name: name.into(), uid: format!("uid-{name}") }
}

fn node_json(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "uid": format!("uid-{name}")}, "status": {"capacity": {"cpu": "1"}}})
}

/// A pod of namespace n on `node` that needs these ConfigMaps.
fn pod_json(name: &str, uid: &str, node: &str, version: u64, config_maps: &[&str], links: bool) -> Value {
    let env_from: Vec<Value> = config_maps.iter().map(|name| json!({"configMapRef": {"name": name}})).collect();
    json!({
        "metadata": {"namespace": "n", "name": name, "uid": uid, "resourceVersion": version.to_string()},
        "spec": {"nodeName": node, "enableServiceLinks": links, "containers": [{"name": "c", "envFrom": env_from}]},
    })
}

fn with_token(mut pod: Value) -> Value {
    pod["spec"]["volumes"] =
        json!([{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"expirationSeconds": 3607}}]}}]);
    pod
}

fn config_map(name: &str, content: u64) -> Value {
    json!({
        "metadata": {"namespace": "n", "name": name, "uid": format!("uid-{name}"), "resourceVersion": content.to_string()},
        "data": {"k": content.to_string()},
    })
}

fn service(key: &str) -> Value {
    service_at(key, 1)
}

fn service_at(key: &str, version: u64) -> Value {
    let (namespace, name) = key.split_once('/').unwrap();
    json!({
        "metadata": {"namespace": namespace, "name": name, "uid": format!("uid-{key}"), "resourceVersion": version.to_string()},
        "spec": {"clusterIP": format!("10.0.0.{version}")},
    })
}

/// A list of all Services shows these.
fn list_services(closures: &mut Closures, keys: &[&str]) {
    closures.services_begin();
    keys.iter().for_each(|key| closures.service_applied(service(key)));
    closures.services_listed(&keys.iter().map(|key| (*key).to_owned()).collect(), "1");
    closures.source_ready(Source::Services);
}

/// Lists each namespace that is to be listed.
fn list_namespaces(closures: &mut Closures, services: &BTreeMap<String, u64>) {
    while let Some(list) = closures.take_namespace() {
        show_namespace(closures, &list, services);
    }
}

fn show_namespace(closures: &mut Closures, list: &NamespaceList, services: &BTreeMap<String, u64>) {
    for (key, version) in services.iter().filter(|(key, _)| key.starts_with(&format!("{}/", list.namespace))) {
        closures.service_shown(list, service_at(key, *version));
    }
    closures.namespace_listed(list);
}

fn apply(closures: &mut Closures, pod: Value) -> bool {
    closures.pod_applied(PodInput::of(pod), 1, NOW)
}

/// One edge node, everything listed, nothing in it.
fn ready() -> Closures {
    let mut closures = Closures::new("cluster.local", vec!["10.0.0.10".into()]);
    closures.node_applied(NodeInput::of(node_json("e")));
    closures.node_listed(&identity("e"));
    for source in
        [Source::Nodes, Source::Pods, Source::Services, Source::RuntimeClasses, Source::ConfigMaps, Source::Secrets]
    {
        closures.source_ready(source);
    }
    closures
}

/// Fetches everything that is asked for; names that begin with "no" do not exist.
fn fetch_all(closures: &mut Closures) -> Vec<String> {
    let mut fetched = Vec::new();
    while let Some(reference) = closures.take_fetch() {
        let name = reference.1.split_once('/').unwrap().1.to_owned();
        let answer = (!name.starts_with("no")).then(|| config_map(&name, 1));
        closures.fetched(&reference, Ok(answer));
        fetched.push(name);
    }
    fetched
}

fn told(events: &[FeedEvent]) -> Vec<String> {
    let name = |collection: &Collection| format!("{collection:?}");
    events
        .iter()
        .filter(|event| !matches!(event, FeedEvent::Newest(..)))
        .map(|event| match event {
            FeedEvent::Newest(collection, revision) => format!("newest {} {revision}", name(collection)),
            FeedEvent::Reached(collection, revision) => format!("reached {} {revision}", name(collection)),
            FeedEvent::Desired(object) => format!("+ {} {}", name(&object.collection), object.entry.key),
            FeedEvent::Keep(collection, entry) => format!("= {} {}", name(collection), entry.key),
            FeedEvent::Gone(collection, uid) => format!("- {} {uid}", name(collection)),
            FeedEvent::Complete(collection) => format!("complete {}", name(collection)),
            FeedEvent::Ask(collection) => format!("ask {}", name(collection)),
            FeedEvent::ReportWanted(kind, uid) => format!("wanted {kind:?} {uid}"),
            FeedEvent::Superseded => "superseded".to_owned(),
            FeedEvent::ReportLater { id, .. } | FeedEvent::Reported { id, .. } => format!("reported {id}"),
        })
        .collect()
}

#[test]
fn a_session_hears_the_closure_then_that_it_is_complete() {
    let mut closures = ready();
    apply(&mut closures, pod_json("p", "u", "e", 1, &["c", "no"], true));
    list_services(&mut closures, &["default/kubernetes", "n/web", "other/db"]);
    assert_eq!(closures.services.len(), 2, "nobody uses the other");
    let mut session = closures.open(&identity("e"), 1, 0, WHO);

    let first = told(&closures.drain(&mut session));
    let missing = ["complete ConfigMaps", "+ Pods n/p", "complete Pods"];
    assert!(missing.iter().all(|event| !first.contains(&(*event).to_owned())), "{first:?}");

    assert_eq!(fetch_all(&mut closures), ["c", "no"]);
    let second = told(&closures.drain(&mut session));
    assert_eq!(
        [first, second].concat(),
        [
            "+ Settings settings",
            "+ Node e",
            "+ Services default/kubernetes",
            "+ Services n/web",
            "complete Settings",
            "complete Node",
            "complete Services",
            "complete RuntimeClasses",
            "complete Secrets",
            "complete Tokens",
            "+ ConfigMaps n/c",
            "+ Pods n/p",
            "complete ConfigMaps",
            "complete Pods",
        ]
    );
    assert_eq!(told(&closures.drain(&mut session)), [""; 0]);
}

#[test]
fn a_list_that_was_answered_before_takes_nothing_away_that_is_newer() {
    let mut closures = ready();
    let shown = HashSet::from(["n/old".to_owned()]);
    // The apiserver answers as of revision 5; then a namespace is used, listed and complete before the first part is taken in.
    apply(&mut closures, pod_json("p", "u", "e", 6, &[], true));
    let services = BTreeMap::from([("n/old".to_owned(), 3), ("n/new".to_owned(), 7)]);
    list_namespaces(&mut closures, &services);
    closures.services_begin();
    closures.services_listed(&shown, "5");
    assert!(closures.services.get("n/new").is_some(), "a Service that is there was taken away");
    closures.services_begin();
    closures.services_listed(&shown, "8");
    assert!(closures.services.get("n/new").is_none() && closures.services.get("n/old").is_some());
}

#[test]
fn nothing_is_complete_before_its_source_is() {
    let mut closures = Closures::new("cluster.local", Vec::new());
    closures.node_applied(NodeInput::of(node_json("e")));
    let mut session = closures.open(&identity("e"), 1, 0, WHO);
    assert_eq!(told(&closures.drain(&mut session)), ["+ Settings settings", "+ Node e", "complete Node"]);
    closures.node_listed(&identity("e"));
    assert_eq!(told(&closures.drain(&mut session)), [""; 0], "the watch of pods is not complete");
    closures.source_ready(Source::Pods);
    assert_eq!(
        told(&closures.drain(&mut session)),
        ["complete ConfigMaps", "complete Secrets", "complete Tokens", "complete Pods"]
    );
    closures.service_applied(json!({
        "metadata": {"namespace": "kube-system", "name": "kube-dns", "uid": "d"}, "spec": {"clusterIP": "10.0.0.53", "clusterIPs": ["10.0.0.53"]},
    }));
    closures.source_ready(Source::Services);
    let events = closures.drain(&mut session);
    assert_eq!(told(&events), ["+ Settings settings", "complete Settings", "complete Services"]);
    let FeedEvent::Desired(settings) = &events[0] else { panic!("{events:?}") };
    let json = decode(settings.encoding, &settings.payload).unwrap();
    assert_eq!(String::from_utf8(json).unwrap(), r#"{"clusterDns":["10.0.0.53"],"clusterDomain":"cluster.local"}"#);
}

#[test]
fn a_new_pod_waits_for_what_it_needs_and_its_predecessor_goes_first() {
    let mut closures = ready();
    apply(&mut closures, pod_json("p", "old", "e", 1, &["a"], false));
    fetch_all(&mut closures);
    let mut session = closures.open(&identity("e"), 1, 0, WHO);
    closures.drain(&mut session);

    apply(&mut closures, pod_json("p", "new", "e", 2, &["b"], false));
    assert_eq!(told(&closures.drain(&mut session)), ["- ConfigMaps uid-a"], "the new pod's ConfigMap is not known yet");
    fetch_all(&mut closures);
    assert_eq!(told(&closures.drain(&mut session)), ["+ ConfigMaps n/b", "- Pods old", "+ Pods n/p"]);

    closures.pod_removed("e", "n/p", "old");
    assert_eq!(told(&closures.drain(&mut session)), [""; 0], "another one has the name");
    closures.pod_removed("e", "n/p", "new");
    assert_eq!(told(&closures.drain(&mut session)), ["- Pods new", "- ConfigMaps uid-b"]);
    assert!(closures.slots.is_empty() && closures.bound.is_empty());
}

#[test]
fn what_cannot_be_fetched_stays_at_the_edge_as_it_is_and_holds_nothing_up() {
    let mut closures = ready();
    apply(&mut closures, pod_json("p", "u", "e", 1, &["bad", "good", "worse"], false));
    let mut session = closures.open(&identity("e"), 1, 0, WHO);
    closures.drain(&mut session);
    let failing = [closures.take_fetch().unwrap(), closures.take_fetch().unwrap(), closures.take_fetch().unwrap()];
    closures.fetched(&failing[0], Err(()));
    closures.fetched(&failing[2], Err(()));
    assert_eq!(told(&closures.drain(&mut session)), [""; 0], "one is not known yet");
    closures.fetched(&failing[1], Ok(Some(config_map("good", 1))));
    assert_eq!(
        told(&closures.drain(&mut session)),
        ["ask ConfigMaps", "+ ConfigMaps n/good", "+ Pods n/p", "complete Pods"],
        "what the edge holds of it decides whether there is something to keep"
    );
    let held = |name: &str| Entry { key: format!("n/{name}"), uid: format!("uid-{name}"), version: 7 };
    closures.inventory(&mut session, Collection::ConfigMaps, &[held("bad"), held("good"), held("other")], NOW);
    assert_eq!(told(&closures.drain(&mut session)), ["= ConfigMaps n/bad", "complete ConfigMaps"]);

    closures.metadata_gone(&failing[0]);
    fetch_all(&mut closures);
    assert_eq!(told(&closures.drain(&mut session)), ["+ ConfigMaps n/bad"]);
    closures.inventory(&mut session, Collection::ConfigMaps, &[held("worse")], NOW);
    assert_eq!(told(&closures.drain(&mut session)), ["= ConfigMaps n/worse"]);
    closures.inventory(&mut session, Collection::ConfigMaps, &[], NOW);
    assert_eq!(told(&closures.drain(&mut session)), ["- ConfigMaps uid-worse"], "it is not there to be kept");
}

#[test]
fn metadata_decides_what_is_fetched_again() {
    let mut closures = ready();
    apply(&mut closures, pod_json("p", "u", "e", 1, &["c"], false));
    let reference = (Collection::ConfigMaps, "n/c".to_owned());
    closures.metadata_seen(&(Collection::ConfigMaps, "n/unneeded".into()), "5");
    assert_eq!(fetch_all(&mut closures), ["c"]);
    closures.metadata_seen(&reference, "1");
    assert_eq!(fetch_all(&mut closures), [""; 0], "this version is held");

    closures.metadata_seen(&reference, "2");
    assert_eq!(closures.take_fetch(), Some(reference.clone()));
    closures.metadata_seen(&reference, "3");
    assert_eq!(closures.take_fetch(), None, "one request at a time");
    closures.fetched(&reference, Ok(Some(config_map("c", 2))));
    assert_eq!(closures.take_fetch(), Some(reference), "it changed meanwhile");
}

#[test]
fn what_a_worker_that_died_had_in_hand_is_handed_out_again() {
    let mut closures = ready();
    apply(&mut closures, with_token(pod_json("p", "u", "e", 1, &["c"], false)));
    let mut session = closures.open(&identity("e"), 2, 0, WHO);
    closures.drain(&mut session);
    closures.inventory(&mut session, Collection::Tokens, &[], NOW);
    let (fetch, mint) = (closures.take_fetch().unwrap(), closures.due_token(NOW).0.unwrap());
    assert!(closures.take_fetch().is_none() && closures.due_token(NOW).0.is_none());
    closures.fetches_abandoned();
    closures.mints_abandoned();
    assert_eq!((closures.take_fetch(), closures.due_token(NOW).0), (Some(fetch), Some(mint)));
    assert_eq!((closures.list_begins(), closures.list_begins()), (1, 2));
}

#[test]
fn a_session_of_a_node_that_was_never_seen_is_noticed() {
    let mut closures = ready();
    let known = closures.open(&identity("e"), 1, 0, WHO);
    assert_eq!(closures.strangers(), []);
    let former = NodeIdentity { uid: "former".into(), ..identity("e") };
    let session = closures.open(&former, 1, 0, WHO);
    assert_eq!(closures.strangers(), std::slice::from_ref(&former));
    assert!(closures.has_session(&former) && closures.has_session(&identity("e")));
    closures.close(&session);
    closures.close(&known);
    assert!(!closures.has_session(&former) && !closures.has_session(&identity("e")));
}

#[test]
fn a_pod_with_a_token_waits_for_the_edges_inventory_and_the_mint() {
    let mut closures = ready();
    apply(&mut closures, with_token(pod_json("a", "u-a", "e", 1, &[], false)));
    apply(&mut closures, with_token(pod_json("b", "u-b", "e", 2, &[], false)));
    assert_eq!(closures.due_token(NOW).0.map(|(_, request)| request.pod), None, "the node is not connected");

    let mut session = closures.open(&identity("e"), 9, 0, WHO);
    let events = told(&closures.drain(&mut session));
    assert_eq!(events[0], "ask Tokens");
    assert!(!events.contains(&"complete Tokens".into()) && !events.contains(&"+ Pods n/a".into()), "{events:?}");
    assert!(closures.due_token(NOW).0.is_none());

    let key = "n/u-a/3607/".to_owned();
    closures.inventory(&mut session, Collection::Tokens, &[Entry { key: key.clone(), uid: key, version: 3000 }], NOW);
    assert_eq!(told(&closures.drain(&mut session)), ["= Tokens n/u-a/3607/", "+ Pods n/a"]);
    let (node, request) = closures.due_token(NOW).0.unwrap();
    assert_eq!(request.pod, "b");
    closures.token_minted(&node, &request.key(), Some(&Token { token: "t".into(), expires: 3607 }), NOW);
    assert_eq!(
        told(&closures.drain(&mut session)),
        ["+ Tokens n/u-b/3607/", "+ Pods n/b", "complete Tokens", "complete Pods"]
    );

    closures.close(&session);
    closures.pod_removed("e", "n/b", "u-b");
    let mut session = closures.open(&identity("e"), 10, 0, WHO);
    let events = told(&closures.drain(&mut session));
    assert!(events.contains(&"= Tokens n/u-a/3607/".into()) && !events.contains(&"ask Tokens".into()), "{events:?}");
}

#[test]
fn a_late_list_does_not_bring_a_deleted_pod_back() {
    let mut closures = ready();
    closures.node_applied(NodeInput::of(node_json("late")));
    closures.pod_removed("late", "n/p", "u");
    apply(&mut closures, pod_json("p", "u", "late", 1, &[], false));
    assert!(closures.pod("n/p").is_none());
    apply(&mut closures, pod_json("q", "v", "late", 5, &[], false));
    apply(&mut closures, pod_json("q", "v", "late", 4, &[], false));
    assert_eq!(closures.pod("n/q").unwrap().1.resource_version, "5", "an older state does not replace a newer one");
    closures.node_listed(&identity("late"));
    assert_eq!(closures.pods_unseen(2), [("n/q".to_owned(), "v".to_owned())]);
}

#[test]
fn a_node_of_another_uid_is_another_node() {
    let mut closures = ready();
    apply(&mut closures, pod_json("p", "u", "e", 1, &["c"], false));
    fetch_all(&mut closures);
    let mut session = closures.open(&identity("e"), 1, 0, WHO);
    closures.drain(&mut session);
    let mut successor = node_json("e");
    successor["metadata"]["uid"] = "another".into();
    let change = closures.node_applied(NodeInput::of(successor));
    assert_eq!((change.new, change.replaced), (true, Some(identity("e"))));
    assert_eq!(
        told(&closures.drain(&mut session)),
        [""; 0],
        "the old session hears of nothing, least of all of deletions"
    );
    assert!(closures.slots.is_empty());
}

#[test]
fn two_sessions_of_one_node_do_not_disturb_each_other() {
    let mut closures = ready();
    let mut old = closures.open(&identity("e"), 1, 0, WHO);
    let mut new = closures.open(&identity("e"), 2, 0, WHO);
    closures.drain(&mut old);
    closures.drain(&mut new);
    apply(&mut closures, pod_json("p", "u", "e", 1, &[], false));
    assert_eq!(told(&closures.drain(&mut old)), ["+ Pods n/p"]);
    closures.close(&old);
    assert_eq!(told(&closures.drain(&mut new)), ["+ Pods n/p"]);
}

fn claimed(by: u64) -> NodeInput {
    let mut node = node_json("e");
    node["metadata"]["annotations"] = serde_json::json!({"skerry.dev/epoch": by.to_string()});
    NodeInput::of(node)
}

#[test]
fn who_comes_from_another_replica_is_claimed_and_ends_the_session_there() {
    let mut closures = ready();
    let mut first = closures.open(&identity("e"), 5, 0, WHO);
    assert!(!first.claims(), "nobody had it before");
    closures.node_applied(claimed(5));
    assert!(!closures.drain(&mut first).contains(&FeedEvent::Superseded));
    assert!(closures.open(&identity("e"), 6, 5, WHO + 1).claims(), "its store may have been put back");
    assert!(!closures.open(&identity("e"), 6, 5, WHO).claims(), "the session before was here");
    // Another replica has it, and says so.
    closures.node_applied(claimed(9));
    assert_eq!(closures.drain(&mut first), [FeedEvent::Superseded]);
    assert_eq!(closures.claim(&identity("e")).map(|(epoch, _)| epoch), Some(9));
    assert!(closures.is_superseded(&identity("e"), 6) && !closures.is_superseded(&identity("e"), 9));
    let back = closures.open(&identity("e"), 10, 9, WHO);
    assert!(back.claims());
    // Its store is new: only the Node remembers.
    closures.claimed(&identity("e"), 10, Claim::Ours);
    closures.node_applied(claimed(11));
    assert!(closures.open(&identity("e"), 12, 0, WHO).claims());
    closures.claimed(&identity("e"), 12, Claim::Ours);
    assert!(!closures.open(&identity("e"), 13, 12, WHO).claims());
    assert!(closures.open(&identity("e"), 14, 0, WHO).claims(), "who has it may be shown late");
}

#[test]
fn a_node_is_ones_own_only_when_the_claim_is_written() {
    let mut closures = ready();
    closures.node_applied(claimed(9));
    assert!(closures.open(&identity("e"), 10, 9, WHO).claims());
    assert!(closures.open(&identity("e"), 11, 10, WHO).claims(), "the claim of the session before was never written");
    closures.claimed(&identity("e"), 11, Claim::Ours);
    assert!(!closures.open(&identity("e"), 12, 11, WHO).claims());
    // Of two replicas that had the same epoch, the one that came second is told so.
    let mut late = closures.open(&identity("e"), 13, 12, WHO);
    closures.claimed(&identity("e"), 13, Claim::Theirs(13, None));
    assert_eq!(closures.drain(&mut late), [FeedEvent::Superseded]);
    assert!(closures.open(&identity("e"), 14, 13, WHO).claims());
    // Whose the other one is counts before the watch shows it, and not when the watch has shown a newer one.
    let agents = |who| Agents { who, ..Agents::default() };
    closures.claimed(&identity("e"), 14, Claim::Theirs(20, Some(agents(7))));
    assert_eq!(closures.claim(&identity("e")), Some((20, agents(7))));
    closures.claimed(&identity("e"), 14, Claim::Theirs(19, Some(agents(8))));
    assert_eq!(closures.claim(&identity("e")), Some((20, agents(7))));
}

#[test]
fn what_a_node_was_answered_to_be_is_not_undone_by_a_watch_that_lags() {
    let mut closures = ready();
    let node = identity("e");
    let shown = |version: u64, epoch: u64| {
        let mut node = node_json("e");
        node["metadata"]["resourceVersion"] = version.to_string().into();
        node["metadata"]["annotations"] = json!({EPOCH_ANNOTATION: epoch.to_string()});
        NodeInput::of(node)
    };
    let version = |closures: &Closures| closures.node_named(&node).unwrap().version;
    let answered = |version: &str, epoch: u64| Named { version: version.into(), epoch, agents: Agents::default() };
    closures.node_applied(shown(5, 1));
    let mut session = closures.open(&node, 1, 1, WHO);
    closures.drain(&mut session);
    closures.node_written(&node, answered("9", 1));
    closures.node_applied(shown(7, 1));
    assert_eq!(version(&closures), "9");
    closures.node_applied(shown(11, 1));
    assert_eq!(version(&closures), "11");
    // What is written whoever has the node shows who has it.
    closures.node_written(&node, answered("12", 2));
    assert_eq!(closures.drain(&mut session), [FeedEvent::Superseded]);
    closures.node_written(&node, answered("10", 3));
    assert_eq!((version(&closures), closures.claim(&node).unwrap().0), ("12".to_owned(), 2));
}

#[test]
fn a_session_says_how_new_its_objects_are_and_when_it_has_come_as_far_as_its_edge() {
    use skerry_proto::wire::Revision;
    let mut closures = ready();
    let mut session = closures.open(&identity("e"), 1, 0, WHO);
    closures.expect(&mut session, &[Revision { collection: Collection::Pods.into(), newest: 7 }]);
    let reached = |events: &[FeedEvent]| events.iter().any(|event| matches!(event, FeedEvent::Reached(..)));
    assert!(closures.reached(Source::Pods, "6"));
    let first = closures.drain(&mut session);
    assert_eq!(first[0], FeedEvent::Newest(Collection::Pods, 6));
    assert!(!reached(&first));

    closures.shows(Source::Pods, "7");
    apply(&mut closures, pod_json("p", "u", "e", 7, &["c"], false));
    assert!(closures.reached(Source::Pods, "7"));
    assert!(!reached(&closures.drain(&mut session)), "what the pod refers to is not known");
    fetch_all(&mut closures);
    closures.confirming();
    let events = closures.drain(&mut session);
    assert!(!reached(&events), "something may be gone");
    assert!(events[..2].contains(&FeedEvent::Newest(Collection::Pods, 7)), "before what shows it: {events:?}");
    closures.confirmed();
    assert_eq!(closures.drain(&mut session), [FeedEvent::Reached(Collection::Pods, 7)]);
    assert_eq!(closures.drain(&mut session), []);
    assert!(!closures.reached(Source::Pods, "3"), "the apiserver was restored");
}

#[test]
fn what_changes_while_it_is_fetched_is_fetched_again_unless_the_answer_is_that_new() {
    let mut closures = ready();
    apply(&mut closures, pod_json("p", "u", "e", 1, &["c"], false));
    let reference = closures.take_fetch().unwrap();
    closures.metadata_seen(&reference, "55");
    closures.fetched(&reference, Ok(Some(config_map("c", 55))));
    assert_eq!(closures.take_fetch(), None);

    closures.metadata_seen(&reference, "56");
    assert_eq!(closures.take_fetch(), Some(reference.clone()));
    closures.metadata_seen(&reference, "57");
    closures.metadata_seen(&reference, "60");
    closures.fetched(&reference, Ok(Some(config_map("c", 57))));
    assert_eq!(closures.take_fetch(), Some(reference.clone()), "60 is still to come");
    closures.metadata_gone(&reference);
    closures.fetched(&reference, Ok(Some(config_map("c", 60))));
    assert_eq!(closures.take_fetch(), Some(reference.clone()), "it may be gone");
    closures.fetched(&reference, Ok(None));
    assert_eq!(closures.take_fetch(), None);
}

#[test]
fn an_answer_from_before_a_reference_came_back_is_no_older_than_it() {
    let mut closures = ready();
    apply(&mut closures, pod_json("p", "u", "e", 1, &["c"], false));
    let reference = closures.take_fetch().unwrap();
    closures.pod_removed("e", "n/p", "u");
    closures.metadata_seen(&reference, "2");
    apply(&mut closures, pod_json("q", "v", "e", 1, &["c"], false));
    assert_eq!(closures.take_fetch(), None, "one is under way");
    closures.fetched(&reference, Ok(Some(config_map("c", 1))));
    assert_eq!(closures.take_fetch(), Some(reference.clone()), "the change that came meanwhile");
    closures.pod_removed("e", "n/q", "v");
    closures.fetched(&reference, Ok(Some(config_map("c", 2))));
    assert!(closures.slots.is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Pod {
        name: u8,
        uid: u8,
        node: u8,
        config_maps: Vec<u8>,
        links: bool,
    },
    PodGone(u8),
    Service(u8),
    ServiceGone(u8),
    WatchService,
    ListNamespace,
    /// As it is now, or was when it began.
    NamespaceListed(bool),
    ListServices,
    ServicesListed(u8),
    ConfigMap(u8, u64),
    ConfigMapGone(u8),
    FetchAll,
    Drain,
    Reconnect,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let pod = (0..4u8, 0..2u8, 0..3u8, prop::collection::vec(0..4u8, 0..3), any::<bool>())
        .prop_map(|(name, uid, node, config_maps, links)| Step::Pod { name, uid, node, config_maps, links });
    let step = prop_oneof![
        6 => pod,
        3 => (0..4u8).prop_map(Step::PodGone),
        2 => (0..3u8).prop_map(Step::Service),
        1 => (0..3u8).prop_map(Step::ServiceGone),
        3 => Just(Step::WatchService),
        2 => Just(Step::ListNamespace),
        2 => any::<bool>().prop_map(Step::NamespaceListed),
        1 => Just(Step::ListServices),
        1 => (1..3u8).prop_map(Step::ServicesListed),
        2 => (0..4u8, 0..50u64).prop_map(|(name, content)| Step::ConfigMap(name, content)),
        1 => (0..4u8).prop_map(Step::ConfigMapGone),
        2 => Just(Step::FetchAll),
        3 => Just(Step::Drain),
        1 => Just(Step::Reconnect),
    ];
    prop::collection::vec(step, 1..60)
}

/// The apiserver as it is, and each edge as told.
#[derive(Default)]
struct World {
    pods: BTreeMap<String, Value>,
    services: BTreeMap<String, u64>,
    config_maps: BTreeMap<String, Value>,
}

type Held = BTreeMap<(Collection, String), Entry>;

/// The watch of Services, which may be late, and lists anew.
#[derive(Default)]
struct Watch {
    /// Key, whether it is there, version.
    log: Vec<(&'static str, bool, u64)>,
    seen: usize,
    listing: Option<Listing>,
}

struct Listing {
    /// What the log was when the apiserver answered, and the revision.
    until: (usize, u64),
    /// The first part is here.
    begun: bool,
    left: Vec<(String, u64)>,
    shown: HashSet<String>,
}

impl Watch {
    fn next(&mut self, closures: &mut Closures) -> bool {
        let Some((key, is_there, version)) = self.log.get(self.seen).filter(|_| self.listing.is_none()) else {
            return false;
        };
        self.seen += 1;
        if *is_there {
            closures.service_applied(service_at(key, *version));
        } else {
            closures.service_removed(key, &version.to_string());
        }
        true
    }

    fn list(&mut self, world: &World, revision: u64) {
        let left = world.services.iter().map(|(key, version)| (key.clone(), *version)).collect();
        let until = (self.log.len(), revision);
        self.listing = Some(Listing { until, begun: false, left, shown: HashSet::new() });
    }

    /// It begins, one more is shown, or all were.
    fn list_on(&mut self, closures: &mut Closures) {
        let Some(listing) = &mut self.listing else { return };
        if !std::mem::replace(&mut listing.begun, true) {
            return closures.services_begin();
        }
        if let Some((key, version)) = listing.left.pop() {
            closures.service_applied(service_at(&key, version));
            listing.shown.insert(key);
            return;
        }
        let (seen, revision) = listing.until;
        closures.services_listed(&listing.shown, &revision.to_string());
        self.seen = seen;
        self.listing = None;
    }
}

impl World {
    fn fetch(&self, closures: &mut Closures) {
        while let Some(reference) = closures.take_fetch() {
            let found = self.config_maps.get(&reference.1).cloned();
            closures.fetched(&reference, Ok(found));
        }
    }

    /// What a node should hold, computed from scratch.
    fn closure(&self, node: &str) -> Held {
        let mut objects = vec![sanitise::object(Collection::Node, node_json(node))];
        let mut services: BTreeMap<&String, &u64> =
            self.services.iter().filter(|(key, _)| *key == KUBERNETES).collect();
        for pod in self.pods.values().filter(|pod| pod["spec"]["nodeName"] == node) {
            objects.push(sanitise::object(Collection::Pods, pod.clone()));
            for source in pod["spec"]["containers"][0]["envFrom"].as_array().unwrap() {
                let key = format!("n/{}", source["configMapRef"]["name"].as_str().unwrap());
                objects.extend(
                    self.config_maps.get(&key).map(|value| sanitise::object(Collection::ConfigMaps, value.clone())),
                );
            }
            if pod["spec"]["enableServiceLinks"] == true {
                services.extend(self.services.iter().filter(|(key, _)| key.starts_with("n/")));
            }
        }
        objects.extend(
            services
                .into_iter()
                .map(|(key, version)| sanitise::object(Collection::Services, service_at(key, *version))),
        );
        let settings = settings("cluster.local", &["10.0.0.10".to_owned()]);
        objects.push(Object::clone(&settings));
        objects.into_iter().map(|object| ((object.collection, object.entry.uid.clone()), object.entry)).collect()
    }
}

fn hear(edge: &mut Held, events: Vec<FeedEvent>) {
    for event in events {
        match event {
            FeedEvent::Desired(object) => {
                edge.insert((object.collection, object.entry.uid.clone()), object.entry.clone());
            }
            FeedEvent::Gone(collection, uid) => {
                assert!(edge.remove(&(collection, uid)).is_some(), "told that something went that it never heard of");
            }
            FeedEvent::Complete(_) | FeedEvent::Newest(..) | FeedEvent::Reached(..) => {}
            FeedEvent::Keep(..)
            | FeedEvent::Ask(_)
            | FeedEvent::ReportWanted(..)
            | FeedEvent::ReportLater { .. }
            | FeedEvent::Reported { .. }
            | FeedEvent::Superseded => {
                panic!("there are neither tokens nor reports here")
            }
        }
    }
}

proptest! {
    #[test]
    fn edges_hear_exactly_their_closure(steps in steps()) {
        let mut closures = ready();
        closures.node_applied(NodeInput::of(node_json("f")));
        closures.node_listed(&identity("f"));
        let names = ["e", "f", "worker"];
        let mut world = World::default();
        let mut sessions: Vec<(Session, Held)> =
            ["e", "f"].iter().map(|name| (closures.open(&identity(name), 1, 0, WHO), Held::new())).collect();
        let mut version = 100;
        let services = [KUBERNETES, "n/web", "other/db"];
        let (mut watch, mut lists, mut newest) = (Watch::default(), Vec::new(), BTreeMap::<String, Option<u64>>::new());
        for step in steps {
            version += 1;
            match step {
                Step::Pod { name, uid, node, config_maps, links } => {
                    let config_maps: Vec<String> = config_maps.iter().map(|name| format!("c{name}")).collect();
                    let config_maps: Vec<&str> = config_maps.iter().map(String::as_str).collect();
                    let name = format!("p{name}");
                    let uid = format!("{name}-{uid}");
                    let pod = pod_json(&name, &uid, names[usize::from(node)], version, &config_maps, links);
                    apply(&mut closures, pod.clone());
                    world.pods.insert(format!("n/{name}"), pod);
                }
                Step::PodGone(name) => {
                    let key = format!("n/p{name}");
                    if let Some(pod) = world.pods.remove(&key) {
                        let (node, uid) = (pod["spec"]["nodeName"].as_str().unwrap(), pod["metadata"]["uid"].as_str().unwrap());
                        closures.pod_removed(node, &key, uid);
                    }
                }
                Step::Service(index) => {
                    let key = services[usize::from(index)];
                    world.services.insert(key.into(), version);
                    watch.log.push((key, true, version));
                }
                Step::ServiceGone(index) => {
                    let key = services[usize::from(index)];
                    if world.services.remove(key).is_some() {
                        watch.log.push((key, false, version));
                    }
                }
                Step::ConfigMap(name, content) => {
                    let mut value = config_map(&format!("c{name}"), content);
                    value["metadata"]["resourceVersion"] = version.to_string().into();
                    world.config_maps.insert(format!("n/c{name}"), value);
                    closures.metadata_seen(&(Collection::ConfigMaps, format!("n/c{name}")), &version.to_string());
                }
                Step::ConfigMapGone(name) => {
                    world.config_maps.remove(&format!("n/c{name}"));
                    closures.metadata_gone(&(Collection::ConfigMaps, format!("n/c{name}")));
                }
                Step::WatchService => drop(watch.next(&mut closures)),
                Step::ListNamespace => lists.extend(closures.take_namespace().map(|list| (list, world.services.clone()))),
                Step::NamespaceListed(is_fresh) => if let Some((list, then)) = lists.pop() {
                    let shown = if is_fresh { &world.services } else { &then };
                    show_namespace(&mut closures, &list, shown);
                },
                Step::ListServices => watch.list(&world, version),
                Step::ServicesListed(parts) => (0..parts).for_each(|_| watch.list_on(&mut closures)),
                Step::FetchAll => world.fetch(&mut closures),
                Step::Drain => for (session, edge) in &mut sessions {
                    hear(edge, closures.drain(session));
                    // A version is the only thing that a Service has of its own here.
                    for (_, entry) in edge.range((Collection::Services, String::new())..(Collection::RuntimeClasses, String::new())) {
                        let version = (100..=version).find(|at| sanitise::object(Collection::Services, service_at(&entry.key, *at)).entry == *entry);
                        let newest = newest.entry(entry.key.clone()).or_default();
                        prop_assert!(version >= *newest, "a Service went backwards");
                        *newest = version;
                    }
                },
                Step::Reconnect => for (index, (session, edge)) in sessions.iter_mut().enumerate() {
                    closures.close(session);
                    *session = closures.open(&identity(names[index]), version, 0, WHO);
                    edge.clear();
                },
            }
        }
        world.fetch(&mut closures);
        while watch.listing.is_some() {
            watch.list_on(&mut closures);
        }
        while watch.next(&mut closures) {}
        for (list, then) in lists {
            show_namespace(&mut closures, &list, &then);
        }
        list_namespaces(&mut closures, &world.services);
        prop_assert!(closures.services.len() <= 1 || closures.services.are_known("n"), "Services are held that nobody needs");
        for (index, (session, edge)) in sessions.iter_mut().enumerate() {
            hear(edge, closures.drain(session));
            prop_assert_eq!(&*edge, &world.closure(names[index]));
            let reference_counts: usize = closures.nodes[names[index]].references.len();
            prop_assert_eq!(reference_counts, closures.slots.values().filter(|slot| slot.nodes.contains(names[index])).count());
        }
        let in_hand = |slot: &Slot| matches!(slot.state, Fetch::UnderWay | Fetch::Again(_));
        prop_assert!(closures.slots.values().all(|slot| !slot.nodes.is_empty() || in_hand(slot)), "something is held that nobody needs");
    }
}
