use futures_util::FutureExt as _;
use serde_json::{Value, json};

use super::table::choose;
use super::*;

/// A range on an address of this machine that nobody else in this process listens on.
fn ports_at(host: &str, first: u16, last: u16) -> Ports {
    Ports::new(host, PortRange { first, last }, 65_536)
}

fn own_host() -> String {
    let [a, b, c]: [u8; 3] = rand::random();
    format!("127.{a}.{b}.{}", c.clamp(1, 254))
}

fn node(name: &str) -> NodeIdentity {
    NodeIdentity { name: name.to_owned(), uid: format!("uid-of-{name}") }
}

fn shown(mut node: Value) -> Shown {
    if node["metadata"].is_null() {
        node["metadata"] = json!({});
    }
    Shown::of(&serde_json::from_value(node).unwrap())
}

fn shows(host: &str, port: u16) -> Shown {
    shown(json!({"status": {
        "addresses": [{"type": "InternalIP", "address": host}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
    }}))
}

fn is_unknown(host: &str, port: u16) -> Shown {
    Shown { unknown_since: Some(Timestamp::UNIX_EPOCH), ..shows(host, port) }
}

impl Ports {
    fn port(&self, name: &str) -> Option<u16> {
        self.lock().nodes.get(name)?.door.as_ref().map(|door| door.port)
    }
}

#[test]
fn the_port_a_node_had_or_else_the_lowest() {
    let range = PortRange { first: 10, last: 13 };
    assert_eq!(choose(range, 12, 10, |_| false), Some(12));
    assert_eq!(choose(range, 12, 10, |port| port == 12), Some(10));
    assert_eq!(choose(range, 99, 10, |port| port < 12), Some(12), "not one of the range");
    assert_eq!(choose(range, 0, 11, |_| false), Some(11), "those below are known to be taken");
    assert_eq!(choose(range, 0, 10, |_| true), None);
    assert_eq!(choose(PortRange { first: 65535, last: 65535 }, 0, 0, |_| false), Some(65535));
}

#[test]
fn what_a_node_shows() {
    let one = shown(json!({"status": {
        "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 20001}},
        "conditions": [{"type": "Ready", "status": "Unknown", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
    }}));
    assert_eq!((one.port, one.unknown_since), (20001, Some("2026-01-01T00:00:00Z".parse().unwrap())));
    assert!(one.is_at(&Address::of("10.0.0.1")) && !one.is_at(&Address::of("10.0.0.2")));
    assert_eq!(Address::of("cloud.example.com").kind, "InternalDNS");
    let two = json!({"status": {"addresses": [
        {"type": "InternalIP", "address": "10.0.0.1"}, {"type": "Hostname", "address": "e"},
    ]}});
    assert!(!shown(two).is_at(&Address::of("10.0.0.1")), "a name beside it would be tried first");
    assert_eq!(shown(json!({})), Shown::default());
}

#[test]
fn a_port_stays_the_nodes_until_the_node_is_deleted() {
    let host = own_host();
    let ports = ports_at(&host, 20000, 20009);
    ports.listed();
    ports.connected(&node("b"), 1, false);
    ports.connected(&node("a"), 1, false);
    assert_eq!((ports.port("b"), ports.port("a")), (Some(20000), Some(20001)));
    let door = ports.wanted("b").expect("its Node does not show it yet");
    assert_eq!(ports.unpublished().now_or_never().as_deref(), Some("b"));
    ports.seen(&node("b"), &shows(&host, 20000));
    assert!(ports.wanted("b").is_none());

    let now = "2026-01-01T00:00:00Z".parse().unwrap();
    ports.disconnected(&node("b"), 0, now);
    assert_eq!(ports.away_since("b"), None, "an older session ended");
    ports.disconnected(&node("b"), 1, now);
    assert_eq!((ports.port("b"), ports.away_since("b")), (Some(20000), Some(now)));
    ports.connected(&node("b"), 2, false);
    assert!(ports.port("b") == Some(20000) && !door.closed.is_cancelled(), "through a reconnect");
    assert_eq!(ports.away_since("b"), None);

    ports.gone(&NodeIdentity { uid: "another".to_owned(), ..node("b") });
    assert_eq!(ports.port("b"), Some(20000));
    ports.gone(&node("b"));
    assert!(ports.port("b").is_none() && door.closed.is_cancelled());
    ports.connected(&node("c"), 1, false);
    assert_eq!(ports.port("c"), Some(20000), "nobody listened on it yet");
}

#[test]
fn who_comes_back_before_its_port_is_given_back_gets_it_again() {
    let host = own_host();
    let ports = ports_at(&host, 20000, 20009);
    ports.listed();
    ports.connected(&node("a"), 1, false);
    ports.seen(&node("a"), &shows(&host, 20000));
    let (_door, listener) = ports.opened().now_or_never().expect("it is to be listened on");
    // Another replica took it over, and it is back.
    ports.disconnected(&node("a"), 1, "2026-01-01T00:00:00Z".parse().unwrap());
    ports.seen(&node("a"), &shows("10.0.0.9", 20000));
    assert_eq!(ports.port("a"), None);
    ports.connected(&node("a"), 2, false);
    assert_eq!(ports.port("a"), None, "somebody listens on it yet");
    drop(listener);
    ports.released(20000);
    assert_eq!(ports.port("a"), Some(20000));
}

#[test]
fn a_restart_finds_the_ports_in_the_nodes() {
    let host = own_host();
    let ports = ports_at(&host, 20000, 20009);
    ports.seen(&node("here"), &shows(&host, 20007));
    ports.seen(&node("elsewhere"), &shows("10.9.9.9", 20000));
    ports.connected(&node("new"), 1, false);
    assert_eq!((ports.port("here"), ports.port("new")), (None, None), "not before all are known");
    ports.listed();
    assert_eq!((ports.port("here"), ports.port("elsewhere")), (Some(20007), None));
    assert_eq!(ports.port("new"), Some(20001), "the first that no Node shows");
    ports.connected(&node("elsewhere"), 1, false);
    assert_eq!(ports.port("elsewhere"), Some(20000), "it came here with its number");
    assert!(ports.wanted("elsewhere").is_some());
    // Another replica takes it over.
    ports.seen(&node("elsewhere"), &shows(&host, 20000));
    ports.seen(&node("elsewhere"), &shows("10.9.9.9", 20000));
    assert!(ports.wanted("elsewhere").is_some(), "not while its session is here");
    ports.disconnected(&node("elsewhere"), 1, Timestamp::UNIX_EPOCH);
    assert_eq!(ports.port("elsewhere"), None);
}

#[test]
fn who_is_nowhere_is_answered_for_and_not_fought_over() {
    let host = own_host();
    let ports = ports_at(&host, 20000, 20009);
    let unknown = |host: &str, status: &str| {
        shown(json!({"status": {
            "addresses": [{"type": "InternalIP", "address": host}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 20003}},
            "conditions": [{"type": "Ready", "status": status, "lastTransitionTime": "2026-01-01T00:00:00Z"}],
        }}))
    };
    ports.listed();
    ports.seen(&node("a"), &unknown("10.9.9.9", "True"));
    assert_eq!(ports.port("a"), None, "another replica has it");
    ports.seen(&node("a"), &unknown("10.9.9.9", "Unknown"));
    assert!(ports.port("a") == Some(20003) && ports.wanted("a").is_some());
    assert_eq!(ports.away_since("a"), Some("2026-01-01T00:00:00Z".parse().unwrap()));
    ports.seen(&node("a"), &unknown(&host, "Unknown"));
    assert!(ports.port("a") == Some(20003) && ports.wanted("a").is_none());
    ports.seen(&node("a"), &unknown("10.9.9.9", "Unknown"));
    assert_eq!(ports.port("a"), None, "another replica did the same, and be it so");
    // The next time it goes away from here is another time.
    ports.connected(&node("a"), 1, false);
    ports.seen(&node("a"), &unknown("10.9.9.9", "True"));
    ports.disconnected(&node("a"), 1, Timestamp::UNIX_EPOCH);
    assert_eq!(ports.port("a"), None);
    ports.seen(&node("a"), &unknown("10.9.9.9", "Unknown"));
    assert_eq!(ports.port("a"), Some(20003));
    // It turns up elsewhere before that was written.
    ports.seen(&node("a"), &unknown("10.9.9.9", "True"));
    assert_eq!(ports.port("a"), None);
}

#[test]
fn of_two_that_show_one_port_the_first_by_name_keeps_it() {
    for order in [["a", "b"], ["b", "a"]] {
        let host = own_host();
        let ports = ports_at(&host, 20000, 20009);
        for name in order {
            ports.seen(&node(name), &shows(&host, 20005));
        }
        ports.listed();
        assert_eq!((ports.port("a"), ports.port("b")), (Some(20005), Some(20000)), "{order:?}");
        assert!(ports.wanted("a").is_none() && ports.wanted("b").is_some());
        // Who comes later loses, whatever the name.
        ports.seen(&node("0"), &shows(&host, 20005));
        assert_eq!((ports.port("0"), ports.port("a")), (Some(20001), Some(20005)));
    }
}

#[test]
fn a_port_that_something_else_has_is_left_alone() {
    let host = own_host();
    let others: Vec<TcpListener> = [20000, 20002].map(|port| TcpListener::bind((host.as_str(), port)).unwrap()).into();
    let ports = ports_at(&host, 20000, 20002);
    ports.seen(&node("a"), &shows(&host, 20000));
    ports.listed();
    assert_eq!(ports.port("a"), None, "it may be at a replica that has this address too");
    ports.seen(&node("a"), &is_unknown(&host, 20000));
    assert_eq!(ports.port("a"), Some(20001), "it is nowhere");
    assert!(ports.wanted("a").is_some());
    ports.connected(&node("b"), 1, false);
    assert_eq!(ports.port("b"), None, "there is none");
    drop(others);
    ports.connected(&node("b"), 2, false);
    assert_eq!(ports.port("b"), Some(20000), "and then there is");
}

/// The first and a second that starts when the first has the node, at one address; what one wrote both see.
#[test]
fn replicas_at_one_address_do_not_overwrite_each_other() {
    let host = own_host();
    let (first, second) = (ports_at(&host, 20000, 20009), ports_at(&host, 20000, 20009));
    let both_see = |shown: &Shown| [&first, &second].iter().for_each(|ports| ports.seen(&node("a"), shown));
    first.listed();
    first.connected(&node("a"), 1, false);
    both_see(&shows(&host, 20000));
    second.listed();
    assert_eq!((second.port("a"), second.wanted("a").is_none()), (None, true), "it is at the first");
    // It comes to the second while its session at the first seems to live.
    second.connected(&node("a"), 2, true);
    assert_eq!(second.port("a"), Some(20001));
    assert!(first.wanted("a").is_none() && second.wanted("a").is_none(), "not before it is claimed");
    first.disconnected(&node("a"), 1, Timestamp::UNIX_EPOCH);
    assert_eq!(first.port("a"), Some(20000), "it may come back here");
    second.claimed(&node("a"), 1);
    assert!(second.wanted("a").is_none(), "a claim of another session");
    second.claimed(&node("a"), 2);
    assert!(second.wanted("a").is_some());
    both_see(&shows(&host, 20001));
    assert!(first.port("a").is_none() && first.wanted("a").is_none() && second.wanted("a").is_none());
    // And nobody has it any more.
    second.disconnected(&node("a"), 2, Timestamp::UNIX_EPOCH);
    both_see(&is_unknown(&host, 20001));
    assert!(second.port("a") == Some(20001) && second.wanted("a").is_none());
    assert!(first.port("a").is_none() && first.wanted("a").is_none(), "it is answered for");
    drop(second);
    first.seen(&node("a"), &is_unknown(&host, 20001));
    assert!(first.port("a") == Some(20001) && first.wanted("a").is_none(), "nobody else answers any more");
}

#[test]
fn a_session_that_a_newer_one_overtook_leaves_the_node_to_it() {
    let host = own_host();
    let (first, second) = (ports_at(&host, 20000, 20009), ports_at(&host, 20000, 20009));
    let both_see = |shown: &Shown| [&first, &second].iter().for_each(|ports| ports.seen(&node("a"), shown));
    let names = |epoch: u64, port: u16| Shown { epoch, ..shows(&host, port) };
    first.listed();
    first.connected(&node("a"), 1, false);
    both_see(&names(1, 20000));
    second.listed();
    second.connected(&node("a"), 2, true);
    both_see(&names(2, 20000));
    second.claimed(&node("a"), 2);
    assert!(first.wanted("a").is_none() && second.wanted("a").is_some());
    // The first does not know yet that its own has ended.
    both_see(&names(2, 20001));
    assert!(first.port("a").is_none() && first.wanted("a").is_none() && second.wanted("a").is_none());
    first.disconnected(&node("a"), 1, Timestamp::UNIX_EPOCH);
    assert!(first.port("a").is_none() && first.wanted("a").is_none());
}

#[test]
fn an_answer_that_comes_late_hides_nothing_newer() {
    let host = own_host();
    let ports = ports_at(&host, 20000, 20009);
    let version = |version: &str, port: u16| Shown { version: version.to_owned(), ..shows(&host, port) };
    ports.listed();
    ports.connected(&node("a"), 1, false);
    ports.seen(&node("a"), &version("9", 0));
    ports.written(&node("a"), &version("10", 20000));
    assert!(ports.wanted("a").is_none());
    // Somebody wrote another since, and the watch was faster than the answer.
    ports.seen(&node("a"), &version("12", 20005));
    ports.written(&node("a"), &version("11", 20000));
    assert!(ports.wanted("a").is_some());
    // And the other way round.
    ports.written(&node("a"), &version("14", 20000));
    ports.seen(&node("a"), &version("13", 20005));
    assert!(ports.wanted("a").is_none());
}

#[test]
fn a_port_out_of_the_range_is_not_looked_for_elsewhere() {
    let host = own_host();
    let ports = ports_at(&host, 20000, 20009);
    ports.listed();
    ports.seen(&node("a"), &shows(&host, 31000));
    assert!(ports.port("a").is_none() && !ports.lock().in_trouble, "that there is none left would be false");
    ports.connected(&node("a"), 1, false);
    assert_eq!(ports.port("a"), Some(20000));
}

#[test]
fn who_is_nowhere_is_moved_to_another_port_once() {
    let host = own_host();
    let (first, second) = (ports_at(&host, 20000, 20009), ports_at(&host, 20000, 20009));
    let both_see = |shown: &Shown| [&first, &second].iter().for_each(|ports| ports.seen(&node("a"), shown));
    first.listed();
    first.seen(&node("a"), &is_unknown(&host, 20000));
    second.listed();
    second.seen(&node("a"), &is_unknown(&host, 20000));
    assert!(first.wanted("a").is_none() && second.wanted("a").is_some(), "somebody has its port");
    both_see(&is_unknown(&host, 20001));
    assert_eq!((first.port("a"), second.port("a")), (None, Some(20001)), "and leaves it the node");
    both_see(&is_unknown(&host, 20001));
    assert!(first.wanted("a").is_none() && second.wanted("a").is_none());
}

#[test]
fn sessions_keep_their_share_of_open_files() {
    let ports = Ports::new(&own_host(), PortRange { first: 20000, last: 20009 }, 1);
    ports.listed();
    ports.connected(&node("a"), 1, false);
    ports.connected(&node("b"), 1, false);
    assert_eq!((ports.port("a"), ports.port("b")), (Some(20000), None));
    ports.gone(&node("a"));
    ports.connected(&node("b"), 2, false);
    assert_eq!(ports.port("b"), Some(20000));
}

#[test]
fn another_node_of_the_name_is_another_node() {
    let host = own_host();
    let ports = ports_at(&host, 20000, 20009);
    ports.listed();
    ports.connected(&node("a"), 1, false);
    let (door, listener) = ports.opened().now_or_never().unwrap();
    ports.seen(&node("a"), &shows(&host, 20000));
    drop(listener);
    let again = NodeIdentity { uid: "new".to_owned(), ..node("a") };
    ports.seen(&again, &Shown::default());
    assert!(door.closed.is_cancelled() && ports.port("a").is_none());
    ports.connected(&again, 2, false);
    assert_eq!(ports.port("a"), Some(20001), "the other may still be listened on");
    ports.released(20000);
    ports.connected(&node("b"), 1, false);
    assert_eq!(ports.port("b"), Some(20000));
    ports.gone(&node("a"));
    assert_eq!(ports.port("a"), Some(20001), "the one before was gone already");
}

#[test]
fn ten_thousand_nodes_get_a_port_each_quickly() {
    let mut inner = ports_at("192.0.2.1", 20000, 29999).inner.into_inner().unwrap();
    for _ in 0..10_000 {
        let port = inner.next_port(0, &HashSet::new()).unwrap();
        assert!(inner.taken.insert(port));
    }
    assert_eq!(inner.next_port(0, &HashSet::new()), None);
    inner.taken.remove(&23456);
    assert_eq!(inner.next_port(0, &HashSet::new()), Some(23456));
}
