//! Both machines in a small world, by seeded schedules: an apiserver whose objects change, which refuses, fails, and dies between a write and
//! its answer, replicas of the cloud that see it late, a node with a disk, and connections that lose, delay, and overtake each other; any of
//! them dies between any two steps. Other nodes report to the same replicas, at times more than those take.
//!
//! What must hold is asserted where it would break: in [`node`] that no object goes backwards and nothing is deleted that is desired, in
//! [`world`] that what is acknowledged is durable, in [`reports`] that what is reported is taken, in order and once, and that in the end
//! everything is shown as it is, in [`desk`] that what waits is bounded, that no report is tried for ever, and that none waits longer for
//! what others report than until each of them had a turn. [`weather`] is what goes wrong, and that everything comes to rest and converges
//! when it clears. [`mutations`] says what this can notice. Within one connection nothing is lost, doubled or reordered, as its transport guarantees: what was sent on one that
//! broke is sent again on the next.
//!
//! `SEED=n` replays one schedule, `SCHEDULES=n` sets how many run; `scripts/soak sync` runs a million.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::*;

use self::mutations::Mutation;
use self::world::World;
use crate::dice::{self, Dice};

mod cloud;
mod desk;
mod mutations;
mod node;
mod reports;
mod stories;
mod weather;
mod world;

/// Answers how many deltas were sent and fitted.
fn run(seed: u64, mutation: Option<Mutation>) -> u64 {
    let mut world = World::new(seed, mutation);
    if world.dice.one_in(10) {
        world.begin_anew();
    }
    for _ in 0..50 + world.dice.roll(300) {
        world.chaos();
    }
    world.settle();
    world.assert_converged();
    world.settle();
    world.assert_converged();
    // No machine loses anything by itself: digests are for what nobody thought of.
    world.lose_row();
    world.settle_on();
    world.assert_converged();
    world.node.deltas
}

#[test]
fn any_schedule_converges() {
    let deltas = AtomicU64::new(0);
    let schedules = dice::seeds("SCHEDULES", 20_000, |seed| {
        deltas.fetch_add(run(seed, None), Relaxed);
    });
    assert!(schedules == 1 || deltas.into_inner() > schedules / 100, "hardly any deltas in {schedules} schedules");
}
