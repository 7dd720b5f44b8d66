//! A link in memory: the test double for whatever opens or serves streams, with the real machines and no transport between them.

use std::future::poll_fn;
use std::task::{Context, Poll};

use super::{Carrier, Incoming, Received, Services};
use crate::mux::{Side, Violation};

/// One session with both its ends. Streams are opened by the [`Carrier::streams`] of either, and served at the other.
#[derive(Debug)]
pub struct Line {
    /// The cloud's end.
    pub cloud: Carrier,
    /// The edge's end.
    pub edge: Carrier,
    /// Who serves what the cloud opens; a class that nobody serves is refused.
    pub at_edge: Services<Incoming>,
    /// Who serves what the edge opens.
    pub at_cloud: Services<Incoming>,
}

impl Default for Line {
    fn default() -> Self {
        let (at_edge, at_cloud) = Default::default();
        Self { cloud: Carrier::new(Side::Cloud), edge: Carrier::new(Side::Edge), at_edge, at_cloud }
    }
}

impl Line {
    /// Carries frames both ways for as long as it is polled, or until an end breaks the protocol. Dropped, it loses nothing.
    pub async fn carry(&mut self) -> Violation {
        poll_fn(|context| {
            loop {
                let down = carry(&mut self.cloud, &mut self.edge, &self.at_edge, context);
                let up = carry(&mut self.edge, &mut self.cloud, &self.at_cloud, context);
                let is_busy = match (down, up) {
                    (Err(violation), _) | (_, Err(violation)) => return Poll::Ready(violation),
                    (Ok(down), Ok(up)) => down || up,
                };
                if !is_busy {
                    return Poll::Pending;
                }
            }
        })
        .await
    }
}

/// One frame, if there is one.
fn carry(
    from: &mut Carrier,
    to: &mut Carrier,
    served: &Services<Incoming>,
    context: &mut Context<'_>,
) -> Result<bool, Violation> {
    let Poll::Ready(frame) = from.poll_frame(context) else { return Ok(false) };
    if let Received::Opened(incoming) = to.receive(frame)? {
        served.deliver(incoming, |incoming| incoming);
    }
    Ok(true)
}
