//! The cloud's side of one session.

use std::time::Duration;

use super::{Entry, Object, Report};
use crate::wire::{self, Collection, Frame};

/// The cloud's side of one session: from the edge's Hello to the end of the connection.
#[derive(Debug)]
pub struct Hub {}

/// What happens to a hub.
#[derive(Debug)]
pub enum HubInput {
    /// A frame of the edge's.
    Frame(Frame),
    /// The edge should hold this object; replaces an older version, also one not sent yet.
    Desired(Object),
    /// The edge should hold this version, which it holds already as far as the caller knows (from [`HubOutput::Inventory`]), so that no
    /// payload is at hand.
    Keep(Collection, Entry),
    /// The edge should no longer hold this object.
    Gone(Collection, String),
    /// Everything the edge should hold of this collection has been said: from now on it is compared, sent and deleted.
    Complete(Collection),
    /// The apiserver took the report of this id (`refused` empty) or refused it for good.
    Reported {
        /// The report's id.
        id: u64,
        /// Why it was refused; empty if it was taken.
        refused: String,
    },
    /// The time of [`Hub::next_timeout`] has come.
    Timeout,
}

/// What a hub wants done, in order.
#[derive(Debug)]
pub enum HubOutput {
    /// Send this.
    Send(Frame),
    /// What the edge says it holds of a collection; asked for when digests differ or [`Hub::ask`] was called.
    Inventory(Collection, Vec<Entry>),
    /// The edge acknowledged everything sent so far and its digests agree.
    InSync,
    /// Hand this to the apiserver, then answer with [`HubInput::Reported`].
    Report(Report),
    /// End the connection. If `Some`, send this Goodbye first.
    Close(Option<wire::Goodbye>),
}

impl Hub {
    /// Answers a Hello. `epoch` must be greater than `hello.last_epoch`. `server_time` is Unix milliseconds.
    pub fn new(now: Duration, hello: &wire::Hello, epoch: u64, server_time: u64, agent: &str) -> (Self, Vec<HubOutput>) {
        let _ = (now, hello, epoch, server_time, agent);
        todo!()
    }

    /// Asks for the edge's inventory of a collection whatever its digest says.
    pub fn ask(&mut self, collection: Collection) -> Vec<HubOutput> {
        let _ = collection;
        todo!()
    }

    /// Takes an input at a time.
    pub fn step(&mut self, now: Duration, input: HubInput) -> Vec<HubOutput> {
        let _ = (now, input);
        todo!()
    }

    /// When [`HubInput::Timeout`] is due.
    pub fn next_timeout(&self) -> Duration {
        todo!()
    }
}
