//! A link in memory: the test double for whatever opens or serves streams, with the real machines and no transport between them.

use std::future::poll_fn;
use std::task::Poll;

use super::{Carrier, Incoming, Received, Services};
use crate::mux::{Side, Violation};

/// One session with both its ends. Streams are opened at the cloud's, by [`Carrier::streams`], and served at the edge's.
#[derive(Debug)]
pub struct Line {
    /// The cloud's end.
    pub cloud: Carrier,
    /// The edge's end.
    pub edge: Carrier,
    /// Who serves what the cloud opens; a class that nobody serves is refused.
    pub services: Services<Incoming>,
}

impl Default for Line {
    fn default() -> Self {
        Self { cloud: Carrier::new(Side::Cloud), edge: Carrier::new(Side::Edge), services: Services::default() }
    }
}

impl Line {
    /// Carries frames both ways for as long as it is polled, or until an end breaks the protocol. Dropped, it loses nothing.
    pub async fn carry(&mut self) -> Violation {
        poll_fn(|context| {
            loop {
                let mut is_busy = false;
                if let Poll::Ready(frame) = self.cloud.poll_frame(context) {
                    is_busy = true;
                    match self.edge.receive(frame) {
                        Ok(Received::Opened(incoming)) => drop(self.services.deliver(incoming, |incoming| incoming)),
                        Ok(_) => {}
                        Err(violation) => return Poll::Ready(violation),
                    }
                }
                if let Poll::Ready(frame) = self.edge.poll_frame(context) {
                    is_busy = true;
                    if let Err(violation) = self.cloud.receive(frame) {
                        return Poll::Ready(violation);
                    }
                }
                if !is_busy {
                    return Poll::Pending;
                }
            }
        })
        .await
    }
}
