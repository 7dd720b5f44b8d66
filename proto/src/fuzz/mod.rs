//! Damaged input for everything that decodes what others send: nothing panics, and what comes of it is bounded.
//!
//! Each test here damages valid input ([`corpus`]) by seed ([`mutate`]) and hands it to one of the [`targets`]. `SEED=n` replays one input;
//! with `FUZZ=n` each goes on for so many seconds, as `scripts/soak fuzz` does.

use self::run::fuzz;

mod alloc;
mod corpus;
mod mutate;
mod run;
mod targets;

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
