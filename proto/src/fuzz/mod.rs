//! Damaged input for everything that decodes what others send: nothing panics, and what comes of it is bounded.
//!
//! Each test here damages valid input ([`corpus`]) by seed ([`mutate`]) and hands it to one of the [`targets`]. `SEED=n` replays one input;
//! with `FUZZ=n` each goes on for so many seconds, as `scripts/soak fuzz` does.

use std::time::{Duration, Instant};

use crate::dice::{self, Dice};

mod alloc;
mod corpus;
mod mutate;
mod targets;

/// Inputs for each target when nobody asks for more.
const USUAL: u64 = 3000;

#[test]
fn frames() {
    fuzz(targets::frame, &corpus::frames(), mutate::message);
}

#[test]
fn hub_sessions() {
    fuzz(targets::hub, &corpus::sessions().0, mutate::sequence);
}

#[test]
fn edge_sessions() {
    fuzz(targets::edge, &corpus::sessions().1, mutate::sequence);
}

#[test]
fn streams() {
    fuzz(targets::mux, &corpus::streams(), mutate::sequence);
}

#[test]
fn lanes() {
    fuzz(targets::lane, &corpus::lanes(), mutate::bytes);
}

#[test]
fn payloads() {
    fuzz(targets::payload, &corpus::payloads(), mutate::bytes);
}

#[test]
fn deltas() {
    fuzz(targets::delta, &corpus::deltas(), mutate::bytes);
}

#[test]
fn reports_and_answers() {
    fuzz(targets::json, &corpus::json(), mutate::bytes);
}

#[test]
fn join_tokens() {
    fuzz(targets::token, &corpus::tokens(), mutate::bytes);
}

#[test]
fn mqtt() {
    fuzz(targets::mqtt, &corpus::mqtt(), mutate::bytes);
}

/// An input is a string of bytes, or of messages.
fn fuzz<T: Sync>(target: fn(&[T]), seeds: &[Vec<T>], damaged: fn(&mut Dice, &[Vec<T>]) -> Vec<T>) {
    seeds.iter().for_each(|seed| target(seed));
    let one = |seed| target(&damaged(&mut Dice::new(seed), seeds));
    let seconds = std::env::var("FUZZ").ok().filter(|_| std::env::var("SEED").is_err());
    let Some(seconds) = seconds.map(|seconds| Duration::from_secs(seconds.parse().unwrap())) else {
        dice::seeds("RUNS", USUAL, one);
        return;
    };
    let begin = now();
    while begin.elapsed() < seconds {
        dice::seeds("RUNS", dice::MANY, |seed| {
            if begin.elapsed() < seconds {
                one(seed);
            }
        });
    }
}

#[expect(clippy::disallowed_methods, reason = "it says how long to go on, and nothing else depends on it")]
fn now() -> Instant {
    Instant::now()
}
