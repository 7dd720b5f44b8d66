use std::collections::HashSet;

use serde_json::json;
use skerry_proto::sync::decode;

use super::*;
use crate::backend::{FeedEvent, NodeIdentity};
use crate::closure::{NodeInput, Session};

/// One start of the agent.
const WHO: u64 = 7;

fn identity(name: &str) -> NodeIdentity {
    NodeIdentity { name: name.into(), uid: format!("uid-{name}") }
}

fn node(closures: &mut Closures, name: &str) {
    closures.node_applied(NodeInput::of(json!({"metadata": {"name": name, "uid": format!("uid-{name}")}})));
    closures.node_listed(&identity(name));
}

fn device(name: &str, node: &str, version: u64, model: &str) -> Value {
    json!({
        "metadata": {"namespace": "n", "name": name, "uid": format!("uid-{name}"), "resourceVersion": version.to_string(), "generation": version},
        "spec": {"nodeName": node, "deviceModelRef": {"name": model}},
        "status": {"state": "online"},
    })
}

fn model(name: &str, version: u64) -> DeviceInput {
    DeviceInput::model(json!({
        "metadata": {"namespace": "n", "name": name, "uid": format!("uid-{name}"), "resourceVersion": version.to_string()},
        "spec": {"protocol": version.to_string()},
    }))
}

fn apply(closures: &mut Closures, device: Value) {
    let ours = closures.knows(device["spec"]["nodeName"].as_str().unwrap_or_default());
    closures.device_applied(DeviceInput::device(device, ours), 1);
}

/// Edge nodes a and b; all that devices do not need is listed.
fn ready() -> Closures {
    let mut closures = Closures::new("cluster.local", vec!["10.0.0.10".into()]);
    for source in
        [Source::Nodes, Source::Pods, Source::Services, Source::RuntimeClasses, Source::ConfigMaps, Source::Secrets]
    {
        closures.source_ready(source);
    }
    node(&mut closures, "a");
    node(&mut closures, "b");
    closures
}

fn listed(closures: &mut Closures) {
    closures.devices_served(true);
    closures.source_ready(Source::Devices);
    closures.source_ready(Source::DeviceModels);
}

/// What is said of devices and models.
fn told(closures: &mut Closures, session: &mut Session) -> Vec<String> {
    let is_device = |collection: &Collection| matches!(collection, Collection::Devices | Collection::DeviceModels);
    let said = closures.drain(session).into_iter().filter_map(|event| match event {
        FeedEvent::Desired(object) if is_device(&object.collection) => Some(format!("+ {}", object.entry.key)),
        FeedEvent::Gone(collection, uid) if is_device(&collection) => Some(format!("- {uid}")),
        FeedEvent::Complete(collection) if is_device(&collection) => Some(format!("complete {collection:?}")),
        _ => None,
    });
    said.collect()
}

#[test]
fn a_node_gets_its_devices_and_the_models_they_refer_to() {
    let mut closures = ready();
    listed(&mut closures);
    closures.model_applied(model("m", 1), 1);
    closures.model_applied(model("unused", 1), 1);
    apply(&mut closures, device("d", "a", 1, "m"));
    apply(&mut closures, device("e", "b", 1, "m"));
    apply(&mut closures, device("nobody's", "", 1, "m"));
    apply(&mut closures, device("f", "a", 1, "late"));
    let mut session = closures.open(&identity("a"), 1, 0, WHO);
    assert_eq!(
        told(&mut closures, &mut session),
        ["+ n/m", "+ n/d", "+ n/f", "complete DeviceModels", "complete Devices"]
    );
    closures.model_applied(model("late", 2), 1);
    assert_eq!(told(&mut closures, &mut session), ["+ n/late"]);
    closures.device_removed("n/d", "uid-d");
    let mut gone = told(&mut closures, &mut session);
    gone.sort();
    assert_eq!(gone, ["- uid-d", "- uid-m"]);
}

#[test]
fn a_device_that_moves_leaves_one_node_and_comes_to_the_other() {
    let mut closures = ready();
    listed(&mut closures);
    closures.model_applied(model("m", 1), 1);
    apply(&mut closures, device("d", "a", 1, "m"));
    let mut sessions = ["a", "b"].map(|name| closures.open(&identity(name), 1, 0, WHO));
    sessions.iter_mut().for_each(|session| drop(told(&mut closures, session)));
    apply(&mut closures, device("d", "b", 2, "m"));
    apply(&mut closures, device("d", "a", 1, "m"));
    let mut left = told(&mut closures, &mut sessions[0]);
    left.sort();
    assert_eq!(left, ["- uid-d", "- uid-m"]);
    assert_eq!(told(&mut closures, &mut sessions[1]), ["+ n/m", "+ n/d"]);
    assert_eq!(closures.device("n/d").unwrap().node, "b");
}

#[test]
fn what_a_report_writes_is_no_news_for_the_edge() {
    let mut closures = ready();
    listed(&mut closures);
    apply(&mut closures, device("d", "a", 1, "m"));
    let mut session = closures.open(&identity("a"), 1, 0, WHO);
    told(&mut closures, &mut session);
    for version in 2..1000 {
        let mut reported = device("d", "a", version, "m");
        reported["status"]["state"] = json!(if version % 2 == 0 { "offline" } else { "online" });
        apply(&mut closures, reported);
        assert_eq!(told(&mut closures, &mut session), [""; 0]);
    }
    assert_eq!(closures.device("n/d").unwrap().state, "online");
    let held = closures.devices.of("a", "n/d").unwrap();
    let json: Value = serde_json::from_slice(&decode(held.encoding, &held.payload).unwrap()).unwrap();
    assert_eq!((json.get("status"), json["metadata"].get("generation")), (None, None));
}

#[test]
fn nothing_is_complete_before_it_is_listed_and_nothing_else_waits() {
    let mut closures = ready();
    assert!(closures.ready(), "devices need not be served");
    let mut session = closures.open(&identity("a"), 1, 0, WHO);
    assert_eq!(told(&mut closures, &mut session), [""; 0]);
    closures.devices_served(false);
    assert_eq!(told(&mut closures, &mut session), [""; 0]);
    closures.devices_served(true);
    closures.source_ready(Source::DeviceModels);
    assert_eq!(told(&mut closures, &mut session), [""; 0], "which models it needs is not known");
    closures.source_ready(Source::Devices);
    assert_eq!(told(&mut closures, &mut session), ["complete DeviceModels", "complete Devices"]);
}

#[test]
fn devices_that_an_edge_has_seen_are_waited_for_only_where_there_are_devices() {
    let seen: Vec<skerry_proto::wire::Revision> = [(Collection::Pods, 5), (Collection::Devices, 9)]
        .map(|(collection, newest)| skerry_proto::wire::Revision { collection: collection.into(), newest })
        .into();
    let reached = |events: &[FeedEvent]| -> Vec<u64> {
        let of = |event: &FeedEvent| match event {
            FeedEvent::Reached(_, revision) => Some(*revision),
            _ => None,
        };
        events.iter().filter_map(of).collect()
    };
    for served in [true, false] {
        let mut closures = ready();
        closures.reached(Source::Pods, "7");
        let mut session = closures.open(&identity("a"), 1, 0, WHO);
        closures.expect(&mut session, &seen);
        let events = closures.drain(&mut session);
        assert_eq!(reached(&events), [0; 0], "it is not known whether there are any");
        closures.devices_served(served);
        let events = closures.drain(&mut session);
        assert_eq!(reached(&events), if served { vec![] } else { vec![7, 9] });
        closures.reached(Source::Devices, "11");
        closures.source_ready(Source::Devices);
        let events = closures.drain(&mut session);
        assert_eq!(reached(&events), if served { vec![7, 11] } else { vec![] });
    }
}

#[test]
fn devices_that_wait_for_their_node_are_fetched_when_it_joins() {
    let mut closures = ready();
    listed(&mut closures);
    apply(&mut closures, device("d", "new", 1, "m"));
    apply(&mut closures, device("gone", "new", 1, "m"));
    assert_eq!(closures.take_device(), None);
    node(&mut closures, "new");
    let mut session = closures.open(&identity("new"), 1, 0, WHO);
    let fetch: Vec<Arc<str>> = std::iter::from_fn(|| closures.take_device()).collect();
    assert_eq!(fetch.iter().map(|key| &**key).collect::<Vec<_>>(), ["n/d", "n/gone"]);
    assert_eq!(told(&mut closures, &mut session), [""; 0], "not complete before they came");
    closures.device_fetched("n/d", Some(DeviceInput::device(device("d", "new", 1, "m"), true)));
    // The watch says that it is gone while the answer that shows it is on its way.
    closures.device_removed("n/gone", "uid-gone");
    closures.device_fetched("n/gone", Some(DeviceInput::device(device("gone", "new", 1, "m"), true)));
    assert_eq!(told(&mut closures, &mut session), ["+ n/d", "complete DeviceModels", "complete Devices"]);
    closures.node_removed("new", None);
    assert_eq!(closures.devices.counts(), (0, 0));
    assert_eq!(closures.device("n/d").unwrap().node, "new");
}

#[test]
fn more_than_a_node_may_have_are_left_out_until_there_is_room() {
    let mut closures = ready();
    listed(&mut closures);
    for number in 0..=MOST {
        apply(&mut closures, device(&format!("d{number:05}"), "a", 1, "m"));
    }
    assert_eq!(closures.devices.counts().0, MOST);
    let left = format!("n/d{MOST:05}");
    let reviews: Vec<Review> = std::iter::from_fn(|| closures.take_review()).collect();
    let without: Vec<&str> =
        reviews.iter().filter(|review| review.device.is_none()).map(|review| &*review.key).collect();
    assert_eq!(without, [left.as_str()]);
    closures.device_removed("n/d00007", "uid-d00007");
    assert_eq!(closures.take_device().as_deref(), Some(left.as_str()));
    closures.device_fetched(&left, Some(DeviceInput::device(device(&left[2..], "a", 1, "m"), true)));
    assert_eq!(closures.devices.counts().0, MOST);
}

#[test]
fn devices_are_looked_at_when_they_or_their_models_change() {
    let mut closures = ready();
    apply(&mut closures, device("d", "a", 1, "m"));
    assert!(closures.take_review().is_none(), "models are not known yet");
    listed(&mut closures);
    let review = closures.take_review().unwrap();
    assert!(review.model.is_none());
    assert!(closures.reviewed("n/d", "uid-d", Some("no model".into())));
    assert!(!closures.reviewed("n/d", "uid-d", Some("no model".into())), "that was said");
    assert!(closures.take_review().is_none());
    closures.model_applied(model("m", 2), 1);
    assert!(closures.take_review().unwrap().model.is_some());
    assert!(!closures.reviewed("n/d", "uid-d", None));
    assert_eq!(closures.device("n/d").unwrap().problem, None);
    closures.model_removed("n/m", "another");
    assert!(closures.take_review().is_none());
    closures.model_removed("n/m", "uid-m");
    assert!(closures.take_review().is_some());
}

#[test]
fn a_list_that_lacks_something_says_what() {
    let mut closures = ready();
    closures.device_applied(DeviceInput::device(device("d", "a", 1, "m"), true), 1);
    closures.device_applied(DeviceInput::device(device("e", "x", 1, "m"), false), 2);
    closures.model_applied(model("m", 1), 1);
    assert_eq!(closures.devices_unseen(2), [("n/d".to_owned(), "uid-d".to_owned())]);
    assert_eq!(closures.models_unseen(2), [("n/m".to_owned(), "uid-m".to_owned())]);
    closures.device_applied(DeviceInput::device(device("d", "a", 1, "m"), true), 2);
    assert_eq!(closures.devices_unseen(2), []);
}

fn lose(closures: &mut Closures, name: &str, ready: &str) {
    let conditions = json!([{"type": "Ready", "status": ready}]);
    let node = json!({"metadata": {"name": name, "uid": format!("uid-{name}")}, "status": {"conditions": conditions}});
    closures.node_applied(NodeInput::of(node));
}

fn unheard(closures: &mut Closures) -> Vec<String> {
    closures.unheard(&HashSet::new()).iter().map(|device| device.key.to_string()).collect()
}

/// Those that are named when a node that is lost has been so for some time.
fn at_last(closures: &mut Closures) -> Vec<String> {
    for _ in 1..lost::ROUNDS {
        unheard(closures);
    }
    unheard(closures)
}

#[test]
fn devices_of_a_lost_node_are_named_a_few_at_a_time_until_they_show_it() {
    let mut closures = ready();
    listed(&mut closures);
    for name in ["1", "2", "3"] {
        apply(&mut closures, device(name, "a", 1, "m"));
    }
    let mut silent = device("silent", "a", 1, "m");
    silent["status"] = Value::Null;
    apply(&mut closures, silent);
    apply(&mut closures, device("other", "b", 1, "m"));
    lose(&mut closures, "a", "False");
    assert!(at_last(&mut closures).is_empty(), "a node that is not ready is there");
    let session = closures.open(&identity("a"), 1, 0, WHO);
    lose(&mut closures, "a", "Unknown");
    assert!(at_last(&mut closures).is_empty(), "its session says more than its condition");
    closures.close(&session);
    assert!(unheard(&mut closures).is_empty(), "its session may be at another replica, which is about to say so");
    lose(&mut closures, "a", "True");
    assert!(at_last(&mut closures).is_empty());
    lose(&mut closures, "a", "Unknown");
    assert_eq!(at_last(&mut closures), ["n/1", "n/2"]);
    let put_off = HashSet::from(["uid-1".to_owned()]);
    assert_eq!(closures.unheard(&put_off).iter().map(|device| &*device.key).collect::<Vec<_>>(), ["n/2", "n/3"]);
    for device in closures.unheard(&HashSet::new()) {
        closures.marked_unheard(&device);
    }
    assert_eq!(unheard(&mut closures), ["n/3"]);
    assert_eq!(closures.unknown_devices("a"), ["uid-1", "uid-2"]);
    lose(&mut closures, "a", "True");
    assert!(unheard(&mut closures).is_empty());
    // What it reports of one is shown.
    apply(&mut closures, device("1", "a", 2, "m"));
    assert_eq!(closures.unknown_devices("a"), ["uid-2"]);
}

#[test]
fn a_device_that_no_edge_node_has_any_more_is_named() {
    let mut closures = ready();
    listed(&mut closures);
    for name in ["stays", "moved", "nobodys"] {
        apply(&mut closures, device(name, "a", 1, "m"));
    }
    apply(&mut closures, device("foreign", "worker", 1, "m"));
    apply(&mut closures, device("moved", "b", 2, "m"));
    apply(&mut closures, device("nobodys", "", 2, "m"));
    assert_eq!(unheard(&mut closures), ["n/nobodys"]);
    // Something else about it changes.
    apply(&mut closures, device("nobodys", "", 3, "m"));
    assert_eq!(unheard(&mut closures), ["n/nobodys"]);
    closures.node_removed("a", None);
    assert_eq!(unheard(&mut closures), ["n/nobodys", "n/stays"]);
    for device in closures.unheard(&HashSet::new()) {
        closures.marked_unheard(&device);
    }
    assert!(unheard(&mut closures).is_empty());
    // Back before it was marked: its node will say.
    closures.node_removed("b", None);
    node(&mut closures, "b");
    assert!(unheard(&mut closures).is_empty());
}
