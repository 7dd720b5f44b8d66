use std::collections::VecDeque;
use std::sync::Arc;

use super::*;
use crate::pki::{COPY, CurrentAuthority};
use crate::secrets::fake::MemorySecrets;

const DAY: Duration = Duration::from_secs(86_400);

fn start() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

#[test]
fn each_step_has_its_time() {
    let now = start();
    let days = |days: u64| later(now, DAY * u32::try_from(days).unwrap());
    let fresh = Held { expires: later(now, LIFE), next: None, replaced: None };
    assert_eq!(plan(now, &fresh), None);
    assert_eq!(plan(days(1824), &fresh), None);
    assert_eq!(plan(days(1825), &fresh), Some(Step::Announce));
    assert_eq!(plan(days(9999), &fresh), Some(Step::Announce), "better late than never");

    let told = Held { next: Some(days(1825)), ..fresh };
    assert_eq!(plan(days(1825 + 364), &told), None);
    assert_eq!(plan(days(1825 + 365), &told), Some(Step::Switch));
    let late = Held { next: Some(days(3640)), ..fresh };
    assert_eq!(plan(days(3649), &late), None);
    assert_eq!(plan(days(3650), &late), Some(Step::Switch), "what expired signs nothing");

    let at = days(2190);
    let after = Held {
        expires: days(1825 + 3650),
        next: None,
        replaced: Some(Replaced { expires: fresh.expires, at: Some(at) }),
    };
    assert_eq!(plan(days(2190 + 1124), &after), None);
    assert_eq!(plan(days(2190 + 1125), &after), Some(Step::Drop));
    assert!(after.pins_previous(days(2190 + 300)) && !after.pins_previous(days(2190 + 400)));
    let unknown = Held { replaced: Some(Replaced { expires: fresh.expires, at: None }), ..after };
    assert_eq!(plan(days(3649), &unknown), None);
    assert_eq!(plan(days(3650), &unknown), Some(Step::Drop));
}

/// What the Secret would hold, by number of the CA.
struct World {
    made: Vec<Timestamp>,
    signer: usize,
    trusted: Vec<usize>,
    cross: Option<usize>,
    held: Held,
}

impl World {
    fn take(&mut self, step: Step, now: Timestamp) {
        match step {
            Step::Announce => {
                self.made.push(now);
                self.trusted.push(self.made.len() - 1);
                self.held.next = Some(now);
            }
            Step::Switch => {
                let before = std::mem::replace(&mut self.signer, self.made.len() - 1);
                self.cross = Some(before);
                self.held = Held {
                    expires: later(self.made[self.signer], LIFE),
                    next: None,
                    replaced: Some(Replaced { expires: self.held.expires, at: Some(now) }),
                };
            }
            Step::Drop => {
                self.trusted.retain(|ca| *ca == self.signer || self.held.next.is_some() && *ca > self.signer);
                self.cross = None;
                self.held.replaced = None;
            }
        }
    }
}

/// A certificate as it was issued, and whom its node trusts.
struct Issued {
    at: Timestamp,
    signer: usize,
    trusts: Vec<usize>,
}

#[test]
fn over_a_century_no_node_is_lost_that_was_off_for_twice_the_life_of_its_certificate() {
    let begin = start();
    let held = Held { expires: later(begin, LIFE), next: None, replaced: None };
    let mut world = World { made: vec![begin], signer: 0, trusted: vec![0], cross: None, held };
    let mut issued: VecDeque<Issued> = VecDeque::new();
    for week in 0..5200_u32 {
        let now = later(begin, week * 7 * DAY);
        if let Some(step) = plan(now, &world.held) {
            world.take(step, now);
        }
        assert!(world.trusted.len() <= 3, "{:?}", world.trusted);
        assert!(later(now, node::LIFE) <= world.held.expires, "a certificate has its whole life");
        issued.push_back(Issued { at: now, signer: world.signer, trusts: world.trusted.clone() });
        while issued.front().is_some_and(|old| later(old.at, 3 * node::LIFE) < now) {
            issued.pop_front();
        }
        for node in &issued {
            assert!(world.trusted.contains(&node.signer), "week {week}: its certificate is trusted");
            let believes = |ca| node.trusts.contains(&ca);
            assert!(believes(world.signer) || world.cross.is_some_and(believes), "week {week}: it trusts the server");
        }
    }
    assert!(world.made.len() > 15, "{} CAs", world.made.len());
}

#[tokio::test]
async fn replicas_take_the_same_steps_and_what_they_write_can_be_read() {
    let store = MemorySecrets::default();
    let begin = start();
    let load = async || CertificateAuthority::load_or_create(&store, None, begin).await.unwrap();
    let (one, other) = (CurrentAuthority::new(load().await), CurrentAuthority::new(load().await));
    let first = one.current();
    let mut steps = Vec::new();
    for month in 0..360 {
        let now = later(begin, 30 * DAY * month);
        let (a, b) = tokio::join!(one.refresh(&store, None, now), other.refresh(&store, None, now));
        let (a, b) = (a.unwrap(), b.unwrap());
        assert!(a.is_none() || b.is_none(), "one of them made it");
        steps.extend(a.or(b));
        one.refresh(&store, None, now).await.unwrap();
        other.refresh(&store, None, now).await.unwrap();
        assert_eq!(one.current().pem(), other.current().pem());
        assert_eq!(one.current().hash, other.current().hash);
    }
    let cycle = [Step::Announce, Step::Switch, Step::Drop];
    assert!(steps.len() >= 12 && steps.iter().eq(cycle.iter().cycle().take(steps.len())), "{steps:?}");
    assert!(!one.current().follows(&first.certificates), "nothing of the first one is left");
}

#[tokio::test]
async fn a_ca_that_is_swapped_or_gone_is_not_taken_over() {
    let store = MemorySecrets::default();
    let now = start();
    let current = CurrentAuthority::new(CertificateAuthority::load_or_create(&store, None, now).await.unwrap());
    let held = current.current();
    store.rows().clear();
    assert!(matches!(current.refresh(&store, None, now).await, Err(CaError::Gone)));
    CertificateAuthority::load_or_create(&store, None, now).await.unwrap();
    assert!(matches!(current.refresh(&store, None, now).await, Err(CaError::Swapped)));
    assert!(Arc::ptr_eq(&held, &current.current()));
}

#[tokio::test]
async fn the_copy_follows_the_ca() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(COPY);
    let dir = Some(dir.path());
    let store = MemorySecrets::default();
    let begin = start();
    let current = CurrentAuthority::new(CertificateAuthority::load_or_create(&store, dir, begin).await.unwrap());
    let half = later(begin, AHEAD);
    assert_eq!(current.refresh(&store, dir, half).await.unwrap(), Some(Step::Announce));
    CertificateAuthority::load_or_create(&store, dir, half).await.unwrap();
    assert_eq!(current.refresh(&store, None, later(half, TOLD)).await.unwrap(), Some(Step::Switch));
    // The copy is behind, and still one of the family.
    let loaded = CertificateAuthority::load_or_create(&store, dir, half).await.unwrap();
    let copy = std::fs::read_to_string(file).unwrap();
    assert_eq!(copy, loaded.pem());
}
