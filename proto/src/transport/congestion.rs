//! Congestion control that keeps the line's queue short, for what is urgent waits in it behind everything that is on its way.
//!
//! CUBIC fills the queue of a narrow line until it drops, which is a second of waiting where a modem has room for a second. Here no more is
//! on its way than what the line carries within a round trip and [`TARGET`] (as FAST and BBR do it; the figure is LEDBAT's, RFC 6817); CUBIC
//! decides below that. A queue that stays however little we send is made by others, or is no queue but a longer way to the peer: it is then
//! taken for the line itself, so that others do not starve us.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};

#[cfg(test)]
mod tests;

/// How long our own bytes may wait in the line's queue.
const TARGET: Duration = Duration::from_millis(100);
/// After so many rounds in a row in which even the quickest datagram waited, although less had been sent, the queue is not ours.
const STANDING: u32 = 3;
/// Datagrams that may always be on their way, however long the queue is.
const FLOOR: u64 = 5;

/// Makes the controllers of connections.
#[derive(Debug, Default)]
pub(super) struct Config(Arc<CubicConfig>);

struct Gentle {
    cubic: Box<dyn Controller>,
    queue: Queue,
    /// Bytes on their way.
    flying: u64,
    /// They were much of what may be when one was sent last. QUIC itself cannot tell: it is not given more than it may send.
    is_full: bool,
}

/// How long the queue is, and what may be on its way therefore, by what round trips take.
#[derive(Clone, Debug)]
struct Queue {
    mtu: u64,
    /// What may be on its way, in bytes.
    most: u64,
    /// What a round trip takes without a queue.
    base: Duration,
    /// What is sent from here on is acknowledged in the next round.
    begin: Instant,
    /// Of this round.
    round: Round,
    /// A change shows only in the round after this one.
    settles: bool,
    /// The quickest datagram of the round before which less was sent.
    before: Duration,
    /// Rounds in a row that less had been sent before, and that it was no quicker in.
    standing: u32,
}

/// The datagrams that were acknowledged in one round trip. They go in bursts: the first of one says nothing of the queue that the last one
/// meets.
#[derive(Clone, Copy, Debug)]
struct Round {
    quickest: Duration,
    total: Duration,
    count: u32,
    bytes: u64,
}

const EMPTY: Round = Round { quickest: Duration::MAX, total: Duration::ZERO, count: 0, bytes: 0 };

impl Queue {
    fn new(now: Instant, mtu: u16) -> Self {
        let (mtu, base) = (mtu.into(), Duration::MAX);
        Self { mtu, most: u64::MAX, base, begin: now, round: EMPTY, settles: false, before: base, standing: 0 }
    }

    /// So many bytes, sent at `sent`, are acknowledged; `window` may be on their way as far as losses tell, and `is_full` says that as much
    /// is.
    fn acknowledged(&mut self, now: Instant, sent: Instant, bytes: u64, window: u64, is_full: bool) {
        let took = now.saturating_duration_since(sent);
        self.base = self.base.min(took);
        self.round.quickest = self.round.quickest.min(took);
        self.round.total += took;
        self.round.count += 1;
        self.round.bytes += bytes;
        if sent < self.begin {
            return;
        }
        let round = std::mem::replace(&mut self.round, EMPTY);
        let time = now.saturating_duration_since(std::mem::replace(&mut self.begin, now));
        if std::mem::take(&mut self.settles) || !is_full {
            return;
        }
        let waited = round.total / round.count - self.base;
        // With so little on its way what is left of the wait is hardly ours.
        let least = FLOOR * self.mtu;
        let bound = if self.most <= least { TARGET / 2 } else { TARGET };
        let stands = round.quickest - self.base > bound;
        if waited <= TARGET && !(stands && self.most <= least) {
            self.standing = 0;
            if waited < TARGET / 2 {
                self.most = self.most.saturating_add(self.most / 4);
            }
            return;
        }
        let helped = round.quickest < self.before / 8 * 7;
        self.standing = if !stands || helped { 0 } else { self.standing + 1 };
        self.before = round.quickest;
        if self.standing >= STANDING {
            (self.base, self.standing) = (round.quickest, 0);
            return;
        }
        let carried = u128::from(round.bytes) * (self.base + TARGET).as_nanos() / time.as_nanos().max(1);
        let carried = u64::try_from(carried).unwrap_or(u64::MAX);
        self.most = carried.min(window).min(self.most).max(least);
        self.settles = true;
    }
}

impl Controller for Gentle {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
        self.flying += bytes;
        self.is_full = 2 * self.flying >= self.window();
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _: bool, rtt: &quinn_proto::RttEstimator) {
        let window = self.cubic.window();
        // It would grow by what it did not bring about.
        self.cubic.on_ack(now, sent, bytes, !self.is_full || window > self.queue.most, rtt);
        self.queue.acknowledged(now, sent, bytes, window, self.is_full);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_packet_num_acked: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
        self.flying = in_flight;
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        self.cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.queue.mtu = new_mtu.into();
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window().min(self.queue.most)
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = self.cubic.metrics();
        metrics.congestion_window = self.window();
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        let (cubic, queue) = (self.cubic.clone_box(), self.queue.clone());
        Box::new(Self { cubic, queue, flying: self.flying, is_full: self.is_full })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

impl ControllerFactory for Config {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let cubic = Arc::clone(&self.0).build(now, current_mtu);
        Box::new(Gentle { cubic, queue: Queue::new(now, current_mtu), flying: 0, is_full: false })
    }
}
