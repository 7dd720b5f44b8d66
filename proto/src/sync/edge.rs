//! The edge's side of the link: outlives sessions, lives as long as the store is open.

use std::time::Duration;

use super::{Entry, Object, Report};
use crate::wire::{self, Collection, Frame};

/// The edge's side of the link.
#[derive(Debug)]
pub struct Edge {}

/// One change of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Insert or replace the row of this UID.
    Upsert(Object),
    /// Remove the row of this UID.
    Delete(Collection, String),
}

/// What happens to an edge.
#[derive(Debug)]
pub enum EdgeInput {
    /// A connection stands: say Hello.
    Connected,
    /// A frame of the cloud's.
    Frame(Frame),
    /// The batch that ended with this sequence number is durable.
    Committed {
        /// [`EdgeOutput::Apply`]'s `seq`.
        seq: u64,
    },
    /// The outbox holds this report (new, or left from before): given in order of id, again after each reconnect is not needed.
    Report(Report),
    /// The connection is gone.
    Disconnected,
    /// The time of [`Edge::next_timeout`] has come.
    Timeout,
}

/// What an edge wants done, in order.
#[derive(Debug)]
pub enum EdgeOutput {
    /// Send this.
    Send(Frame),
    /// The session stands. Store the epoch.
    Established {
        /// The session's epoch.
        epoch: u64,
        /// The cloud's clock, Unix milliseconds.
        server_time: u64,
    },
    /// Write these to the store in one transaction, then answer [`EdgeInput::Committed`].
    Apply {
        /// In order.
        ops: Vec<Op>,
        /// Sequence number of the last one.
        seq: u64,
    },
    /// The cloud has taken (`refused` empty) or refused the report: remove it from the outbox.
    Reported {
        /// The report's id.
        id: u64,
        /// Why it was refused; empty if it was taken.
        refused: String,
    },
    /// A digest check agreed: what the store holds is what the cloud wants.
    InSync,
    /// End the connection; if `Some`, send this Goodbye first.
    Close(Option<wire::Goodbye>),
    /// The cloud ended the session and said why.
    Dismissed(wire::Goodbye),
}

impl Edge {
    /// An edge whose store holds `rows`.
    pub fn new(node: &str, boot_id: &str, store_id: &str, agent: &str, last_epoch: u64, rows: impl IntoIterator<Item = (Collection, Entry)>) -> Self {
        let _ = (node, boot_id, store_id, agent, last_epoch, rows.into_iter());
        todo!()
    }

    /// Takes an input at a time.
    pub fn step(&mut self, now: Duration, input: EdgeInput) -> Vec<EdgeOutput> {
        let _ = (now, input);
        todo!()
    }

    /// When [`EdgeInput::Timeout`] is due; `None` without a connection.
    pub fn next_timeout(&self) -> Option<Duration> {
        todo!()
    }
}
