//! Both machines in a small world, by seeded schedules: an apiserver whose objects change, replicas of the cloud that see it late, a node
//! with a disk, and connections that lose, delay, and overtake each other; any of them dies between any two steps.
//!
//! What must hold is asserted where it would break: in [`node`] that no object goes backwards and nothing is deleted that is desired, in
//! [`world`] that what is acknowledged is durable, that what is reported is taken, in order and once, and that everything converges when
//! the weather clears. [`mutations`] says what this can notice. Within one connection nothing is lost, doubled or reordered, as its
//! transport guarantees: what was sent on one that broke is sent again on the next.
//!
//! `SEED=n` replays one schedule, `SCHEDULES=n` sets how many run.

use super::*;

use self::dice::Dice;
use self::mutations::Mutation;
use self::world::World;

mod cloud;
mod dice;
mod mutations;
mod node;
mod stories;
mod world;

/// Answers how many deltas were sent and fitted.
fn run(seed: u64, mutation: Option<Mutation>) -> u64 {
    let mut world = World::new(seed, mutation);
    for _ in 0..50 + world.dice.roll(300) {
        world.chaos();
    }
    world.settle();
    world.assert_converged();
    world.settle();
    world.assert_converged();
    world.node.deltas
}

#[test]
fn any_schedule_converges() {
    if let Ok(seed) = std::env::var("SEED") {
        run(seed.parse().unwrap(), None);
        return;
    }
    let schedules = std::env::var("SCHEDULES").map_or(20_000, |n| n.parse().unwrap());
    let first = u64::from(rand::random::<u32>());
    let mut deltas = 0;
    for seed in first..first + schedules {
        match std::panic::catch_unwind(|| run(seed, None)) {
            Ok(fitted) => deltas += fitted,
            Err(panic) => {
                eprintln!("replay with SEED={seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    assert!(deltas > schedules / 100, "only {deltas} deltas in {schedules} schedules");
}
