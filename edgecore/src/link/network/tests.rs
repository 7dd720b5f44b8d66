use std::process::Command;
use std::sync::mpsc;

use nix::sched::{CloneFlags, unshare};
use proptest::prelude::*;

use super::*;
use crate::kubelet::volumes::tests::is_root;

const UP: u32 = IFF_UP | IFF_RUNNING;
const ETH: u32 = 2;

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap();
    let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8], body].concat();
    bytes.resize(aligned(bytes.len()), 0);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap();
    let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(aligned(bytes.len()), 0);
    bytes
}

fn link_body(family: u8, index: u32, flags: u32, attributes: &[Vec<u8>]) -> Vec<u8> {
    let fixed = [&[family, 0, 0, 0][..], &index.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 4]].concat();
    [fixed, attributes.concat()].concat()
}

fn link(index: u32, kind: &str, master: u32, flags: u32) -> Vec<u8> {
    let mut attributes = vec![attribute(3, b"name\0")];
    if master != 0 {
        attributes.push(attribute(IFLA_MASTER, &master.to_ne_bytes()));
    }
    if !kind.is_empty() {
        // With the bit that says that there are more inside.
        attributes.push(attribute(IFLA_LINKINFO | 0x8000, &attribute(IFLA_INFO_KIND, format!("{kind}\0").as_bytes())));
    }
    message(RTM_NEWLINK, 0, &link_body(AF_UNSPEC, index, flags, &attributes))
}

fn address(index: u32, flags: u8, scope: u8) -> Vec<u8> {
    address_of(RTM_NEWADDR, index, flags, scope, &attribute(IFA_ADDRESS, &[192, 0, 2, 7]))
}

fn address_of(kind: u16, index: u32, flags: u8, scope: u8, attributes: &[u8]) -> Vec<u8> {
    message(kind, 0, &[&[2, 24, flags, scope][..], &index.to_ne_bytes(), attributes].concat())
}

fn route(to: u8, kind: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
    let fixed = [2, to, 0, 0, 254, 3, 0, kind, 0, 0, 0, 0];
    message(RTM_NEWROUTE, 0, &[fixed.to_vec(), attributes.concat()].concat())
}

/// Knows an uplink that carries, lo, a bridge of pods with a pod, and a bridge with a line to the outside.
fn interfaces() -> Interfaces {
    let mut known = Interfaces::default();
    let mut listed: Vec<u8> = [
        link(1, "", 0, UP | IFF_LOOPBACK),
        link(ETH, "", 0, UP),
        link(10, "bridge", 0, UP),
        link(11, "veth", 10, UP),
        link(20, "bridge", 0, UP),
        link(21, "", 20, UP),
    ]
    .concat();
    let mut at = 0;
    while at < listed.len() {
        listed[at + 6] = 2;
        at += aligned(usize::try_from(u32_at(&listed, at).unwrap()).unwrap());
    }
    assert!(!known.hear(&listed), "what was there before did not just come");
    assert_eq!(known.by_index.len(), 6);
    known
}

#[test]
fn routes_that_lead_out_count() {
    let gateway = || attribute(RTA_GATEWAY, &[192, 0, 2, 1]);
    let over = |index: u32| attribute(RTA_OIF, &index.to_ne_bytes());
    for (counts, what, bytes) in [
        (true, "default", route(0, RTN_UNICAST, &[gateway(), over(ETH)])),
        (true, "default without a gateway", route(0, RTN_UNICAST, &[over(ETH)])),
        (true, "net behind a gateway", route(8, RTN_UNICAST, &[gateway(), over(ETH)])),
        (true, "net behind several", route(8, RTN_UNICAST, &[attribute(RTA_MULTIPATH, &[0; 8])])),
        (true, "net behind the gateway of a bridge with a line", route(8, RTN_UNICAST, &[over(20), gateway()])),
        (false, "net of the pods' bridge", route(24, RTN_UNICAST, &[over(10)])),
        (false, "a pod's", route(32, RTN_UNICAST, &[over(11)])),
        (false, "behind a pod", route(24, RTN_UNICAST, &[over(11), gateway()])),
        (false, "net of an uplink, whose address says so", route(24, RTN_UNICAST, &[over(ETH)])),
        (false, "unreachable", route(0, 7, &[])),
        (false, "local", route(32, 2, &[over(ETH)])),
    ] {
        assert_eq!(interfaces().hear(&bytes), counts, "{what}");
    }
}

#[test]
fn addresses_count_where_the_cloud_may_be() {
    for (counts, what, bytes) in [
        (true, "uplink", address(ETH, 0x80, 0)),
        (true, "bridge with a line", address(20, 0, 0)),
        (true, "unknown", address(99, 0, 0)),
        (false, "link-local", address(ETH, 0, RT_SCOPE_LINK)),
        (false, "host", address(ETH, 0, 254)),
        (false, "not checked for duplicates yet", address(ETH, IFA_F_TENTATIVE, 0)),
        (false, "a duplicate", address(ETH, IFA_F_DADFAILED | IFA_F_TENTATIVE, 0)),
        (false, "not to be used any more", address(ETH, IFA_F_DEPRECATED, 0)),
        (false, "lo", address(1, 0, 0)),
        (false, "pods' bridge", address(10, 0, 0)),
        (false, "pod", address(11, 0, 0)),
    ] {
        assert_eq!(interfaces().hear(&bytes), counts, "{what}");
    }
}

#[test]
fn an_address_that_is_prolonged_is_no_news() {
    let v6 = |last: u8| {
        let mut address = [0; 16];
        (address[0], address[15]) = (0x20, last);
        attribute(IFA_ADDRESS, &address)
    };
    let comes = |index: u32, flags: u8, own: &[u8]| address_of(RTM_NEWADDR, index, flags, 0, own);
    let mut known = interfaces();
    assert!(known.hear(&comes(ETH, 0, &v6(1))));
    for _ in 0..3 {
        assert!(!known.hear(&comes(ETH, 0, &v6(1))), "a router says again how long it holds");
    }
    assert!(known.hear(&comes(ETH, 0, &v6(2))), "another one");
    assert!(known.hear(&comes(21, 0, &v6(1))), "on another interface");
    assert!(!known.hear(&comes(ETH, IFA_F_DEPRECATED, &v6(1))));
    assert!(known.hear(&comes(ETH, 0, &v6(1))), "it could not be used meanwhile");
    assert!(!known.hear(&address_of(RTM_DELADDR, ETH, 0, 0, &v6(1))));
    assert!(known.hear(&comes(ETH, 0, &v6(1))), "it was gone");
    assert!(!known.hear(&comes(ETH, IFA_F_TENTATIVE, &v6(3))));
    assert!(known.hear(&comes(ETH, 0, &v6(3))), "now it is known to be nobody else's");
    // On a line to one peer, whose address is told first.
    let line = |own: u8| [attribute(IFA_ADDRESS, &[10, 0, 0, 1]), attribute(IFA_LOCAL, &[10, 0, 0, own])].concat();
    assert!(known.hear(&comes(ETH, 0, &line(2))) && !known.hear(&comes(ETH, 0, &line(2))));
    assert!(known.hear(&comes(ETH, 0, &line(3))));
}

#[test]
fn a_carrier_counts_when_it_comes() {
    let mut known = interfaces();
    assert!(!known.hear(&link(ETH, "", 0, UP)), "as it was");
    assert!(!known.hear(&link(ETH, "", 0, IFF_UP)));
    assert!(!known.hear(&link(ETH, "", 0, IFF_UP)));
    assert!(known.hear(&link(ETH, "", 0, UP)));
    assert!(!known.hear(&link(30, "wireguard", 0, 0)));
    assert!(known.hear(&link(30, "wireguard", 0, UP)), "a tunnel may lead to the cloud");
    assert!(known.hear(&link(31, "", 0, UP)), "a modem that was plugged in");
    for kind in ["veth", "bridge", "dummy", "vxlan"] {
        assert!(!known.hear(&link(40, kind, 0, UP)), "{kind}");
        assert!(!known.hear(&link(40, kind, 0, 0)), "{kind}");
        assert!(!known.hear(&link(40, kind, 0, UP)), "{kind}");
    }
}

#[test]
fn what_an_interface_is_survives_messages_that_do_not_say_it() {
    let mut known = interfaces();
    let before = known.by_index.clone();
    // Bridge ports are told of in the bridge's family, radios without what they are.
    known.hear(&message(RTM_NEWLINK, 0, &link_body(7, 11, UP, &[])));
    known.hear(&message(RTM_DELLINK, 0, &link_body(7, 11, UP, &[])));
    known.hear(&message(RTM_NEWLINK, 0, &link_body(AF_UNSPEC, 21, 0, &[attribute(IFLA_WIRELESS, &[0; 8])])));
    assert_eq!(known.by_index, before);
    known.hear(&message(RTM_DELLINK, 0, &link_body(AF_UNSPEC, 11, 0, &[])));
    assert_eq!(known.by_index.len(), before.len() - 1);
}

#[test]
fn there_is_a_bound_to_what_is_known() {
    let mut known = Interfaces::default();
    for index in 0..2 * u32::try_from(MAX_INTERFACES).unwrap() {
        known.hear(&link(index, "veth", 0, UP));
    }
    assert_eq!(known.by_index.len(), MAX_INTERFACES);
    for number in 0..2 * u32::try_from(MAX_ADDRESSES).unwrap() {
        known.hear(&address_of(RTM_NEWADDR, 1, 0, 0, &attribute(IFA_LOCAL, &number.to_be_bytes())));
    }
    assert_eq!(known.addresses.len(), MAX_ADDRESSES);
}

#[test]
fn a_message_in_a_datagram_of_many_is_found_and_one_that_breaks_off_is_not() {
    let many = [link(11, "veth", 10, UP), route(32, 2, &[]), route(0, RTN_UNICAST, &[]), link(12, "veth", 10, UP)];
    assert!(interfaces().hear(&many.concat()));
    for whole in [address(ETH, 0, 0), route(0, RTN_UNICAST, &[]), link(31, "", 0, UP)] {
        for length in 0..whole.len() - 8 {
            let mut cut = whole[..length].to_vec();
            assert!(!interfaces().hear(&cut), "{length} of {}", whole.len());
            if let Some(said) = cut.first_chunk_mut::<4>() {
                *said = u32::try_from(length).unwrap().to_ne_bytes();
                interfaces().hear(&cut);
            }
        }
    }
}

proptest! {
    #[test]
    fn garbage_says_nothing_and_never_panics(
        body in proptest::collection::vec(any::<u8>(), 0..200),
        kind in prop::sample::select(vec![RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR, RTM_NEWROUTE]),
    ) {
        let mut known = interfaces();
        known.hear(&body);
        known.hear(&message(kind, 0, &body));
        prop_assert!(known.by_index.len() <= 7);
    }
}

#[test]
fn a_burst_is_told_once_it_is_over_and_flapping_once_a_second() {
    let ms = Duration::from_millis;
    let mut burst = Burst::default();
    assert_eq!(burst.due(), None);
    burst.add(ms(0));
    burst.add(ms(150));
    assert_eq!(burst.due(), Some(ms(350)));
    burst.told(ms(350));
    assert_eq!(burst.due(), None);
    // Another one soon after waits for its turn.
    burst.add(ms(400));
    assert_eq!(burst.due(), Some(ms(1350)));
    burst.told(ms(1350));
    // One that does not end is told all the same.
    let mut told = Vec::new();
    for now in (10_000..20_000).step_by(100).map(ms) {
        if burst.due().is_some_and(|due| due <= now) {
            burst.told(now);
            told.push(now);
        }
        burst.add(now);
    }
    assert!((9..=10).contains(&told.len()), "{told:?}");
    assert!(told.windows(2).all(|pair| pair[1] - pair[0] >= PACE), "{told:?}");
}

/// In a network namespace of its own.
#[test]
fn the_kernel_tells_it() {
    if !is_root("the_kernel_tells_it") {
        return;
    }
    let (done, end) = mpsc::channel();
    // The namespace is that of the thread, and of what it starts.
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(in_a_namespace());
        done.send(()).unwrap();
    });
    let ended = end.recv_timeout(Duration::from_secs(30));
    assert!(ended.is_ok() && thread.join().is_ok(), "{ended:?}");
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

async fn in_a_namespace() {
    // The kernel of the test may know no other kind.
    ip("link add name uplink type veth peer name far");
    ip("link set far up");
    ip("link set uplink up");
    ip("address add 192.0.2.2/24 dev uplink");
    let (back, mut seen) = watch::channel(0);
    let stop = CancellationToken::new();
    let watcher = crate::supervise::spawn("network", run(back, stop.clone()));
    // It listens from its first turn on.
    tokio::time::sleep(Duration::from_millis(50)).await;
    // A pod comes and goes.
    for command in [
        "link add name pods type bridge",
        "link set pods up",
        "address add 10.88.0.1/24 dev pods",
        "link add name pod1 type veth peer name pod1in",
        "link set pod1 master pods up",
        "link set pod1in up",
        "address add 10.88.1.1/32 dev pod1",
        "link delete pod1",
    ] {
        ip(command);
    }
    let quiet = tokio::time::timeout(SETTLE + PACE, seen.changed()).await;
    assert!(quiet.is_err(), "pods are no news: {quiet:?}");
    ip("route add default via 192.0.2.1 dev uplink");
    tokio::time::timeout(Duration::from_secs(5), seen.changed()).await.expect("a route is news").unwrap();
    assert_eq!(*seen.borrow_and_update(), 1);
    ip("route delete default");
    let quiet = tokio::time::timeout(SETTLE + PACE, seen.changed()).await;
    assert!(quiet.is_err(), "a way that is gone is no news: {quiet:?}");
    stop.cancel();
    watcher.await.unwrap();
}
