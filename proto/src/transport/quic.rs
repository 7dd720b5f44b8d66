//! Frames on QUIC: one unidirectional stream for each class and side, strictly prioritised (RFC 9000).
//!
//! The protocol is [`quinn_proto`]'s, which does no IO; what does it (`endpoint.rs`, `connection.rs`) keeps for a connection that is idle
//! nothing but the connection itself.

use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use prost::Message as _;
use quinn_proto::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig};
use quinn_proto::{
    ConnectionError, Dir, IdleTimeout, ReadError, Side, StreamId, TransportErrorCode, VarInt, WriteError, rustls,
};

pub use self::connection::Connection;
pub use self::endpoint::{Caller, Endpoint};
use super::{BURST, End, Meter, congestion, longest, malformed};
use crate::frame::Lane;
use crate::mux::{Class, MAX_WINDOW, class_of};
use crate::streams::Carrier;
use crate::wire::Frame;

mod connection;
mod endpoint;
#[cfg(test)]
mod tests;
mod tls;

/// The protocol as TLS negotiates it (RFC 7301).
pub const ALPN: &[u8] = b"skerry/1";

/// What a client is closed with that is to come again later: the server has no room for it now.
pub const BUSY: VarInt = VarInt::from_u32(2);

/// What one class may have on its way and unread, in bytes: what one stream may.
#[expect(clippy::cast_possible_truncation, reason = "a megabyte")]
const CLASS_WINDOW: u32 = MAX_WINDOW as u32;
/// Longer than a session that hears nothing lives: it is the session that ends then, and says so.
const IDLE: Duration = Duration::from_secs(60);

const LANE_COUNT: usize = 4;
/// The lanes of one side, from the highest priority to the lowest; the QUIC stream's number among its side's is the place here.
const LANES: [Option<Class>; LANE_COUNT] = [None, Some(Class::Api), Some(Class::Ops), Some(Class::Device)];

/// QUIC as a node: `tls` proves it and names whom it trusts.
pub fn client_config(tls: &rustls::ClientConfig) -> Result<quinn_proto::ClientConfig, NoInitialCipherSuite> {
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = quinn_proto::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(transport());
    Ok(config)
}

/// QUIC as the cloud: `tls` proves it and says who may come.
pub fn server_config(tls: &rustls::ServerConfig) -> Result<quinn_proto::ServerConfig, NoInitialCipherSuite> {
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    // There is nothing after a handshake (`tls.rs`).
    tls.send_tls13_tickets = 0;
    let mut config = quinn_proto::ServerConfig::with_crypto(Arc::new(tls::Config::new(tls)?));
    config.transport_config(transport());
    Ok(config)
}

#[expect(clippy::cast_possible_truncation, reason = "four")]
fn transport() -> Arc<quinn_proto::TransportConfig> {
    let mut config = quinn_proto::TransportConfig::default();
    config
        .max_concurrent_uni_streams(VarInt::from_u32(LANE_COUNT as u32))
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(CLASS_WINDOW))
        // Neither may bind before the windows of all classes do: a full lower class would keep a higher one from sending.
        .receive_window(VarInt::from_u32(CLASS_WINDOW * LANE_COUNT as u32))
        .congestion_controller_factory(Arc::new(congestion::Config::default()))
        .datagram_receive_buffer_size(None)
        // The session's own pings keep NATs awake.
        .keep_alive_interval(None)
        .max_idle_timeout(IdleTimeout::try_from(IDLE).ok());
    Arc::new(config)
}

/// What is on its way between frames and QUIC; kept with the connection, in one piece with it.
#[derive(Default)]
struct Lanes {
    /// What of a frame of each lane QUIC has not taken yet.
    unsent: [Bytes; LANE_COUNT],
    /// The lanes whose priority QUIC knows: it keeps nothing for a stream of which it knows nothing.
    is_ranked: [bool; LANE_COUNT],
    /// What the peer sends on each lane, from when it has opened it.
    unread: [Option<Lane>; LANE_COUNT],
}

#[derive(Debug)]
pub(super) struct Quic(Connection);

impl Quic {
    pub(super) async fn open(connection: Connection) -> Result<Self, End> {
        poll_fn(|context| {
            let mut state = connection.line().state();
            while let Some(stream) = state.quic.streams().open(Dir::Uni) {
                if stream.index() + 1 == LANES.len() as u64 {
                    return Poll::Ready(Ok(()));
                }
            }
            state.poll_gone(context).map(|cause| Err(lost(cause)))
        })
        .await?;
        Ok(Self(connection))
    }

    pub(super) fn poll_send(
        &mut self,
        carrier: &mut Carrier,
        meter: &impl Meter,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), End>> {
        self.poll_lanes(0..LANE_COUNT, carrier, meter, context)
    }

    fn poll_lanes(
        &mut self,
        places: Range<usize>,
        carrier: &mut Carrier,
        meter: &impl Meter,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), End>> {
        let line = self.0.line();
        let (mut sent, mut blocked) = (0, false);
        let mut lanes = line.lanes();
        // From when there is something to write.
        let mut writer = None;
        'lanes: for place in places {
            let Lanes { unsent, is_ranked, .. } = &mut *lanes;
            let unsent = &mut unsent[place];
            loop {
                if unsent.is_empty() {
                    if sent == BURST {
                        context.waker().wake_by_ref();
                        blocked = true;
                        break 'lanes;
                    }
                    let Poll::Ready(frame) = carrier.poll_frame_of(LANES[place], context) else { break };
                    *unsent = frame.encode_length_delimited_to_vec().into();
                    meter.sent(LANES[place], unsent.len());
                    sent += 1;
                }
                let state = writer.get_or_insert_with(|| {
                    let mut state = line.state();
                    bound(&mut state.quic);
                    state
                });
                if let Some(cause) = state.gone.clone() {
                    return Poll::Ready(Err(lost(cause)));
                }
                let stream = lane(state.quic.side(), place);
                if !std::mem::replace(&mut is_ranked[place], true) {
                    // Nothing has closed it before.
                    let _ = state.quic.send_stream(stream).set_priority(-i32::try_from(place).unwrap_or_default());
                }
                match state.quic.send_stream(stream).write(unsent) {
                    Ok(taken) => unsent.advance(taken),
                    Err(WriteError::Blocked) => {
                        state.wait(context);
                        blocked = true;
                        break;
                    }
                    Err(_) => return Poll::Ready(Err(End::Garbage("a stream of the session was stopped".to_owned()))),
                }
            }
        }
        if writer.take().is_some() {
            line.inbox.wake();
        }
        if blocked { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    pub(super) fn poll_receive(&mut self, meter: &impl Meter, context: &mut Context<'_>) -> Poll<Result<Frame, End>> {
        let line = self.0.line();
        let mut lanes = line.lanes();
        let mut state = line.state();
        while let Some(stream) = state.quic.streams().accept(Dir::Uni) {
            let place = usize::try_from(stream.index()).unwrap_or(usize::MAX);
            let Some(unread) = lanes.unread.get_mut(place) else {
                return Poll::Ready(Err(End::Garbage(format!("a stream number {place} that no class has"))));
            };
            *unread = Some(Lane::default());
        }
        // The last words may have come together with the end: it counts when nothing more can be read.
        let mut is_finished = false;
        for (place, (unread, class)) in lanes.unread.iter_mut().zip(LANES).enumerate() {
            let Some(unread) = unread else { continue };
            loop {
                if let Some((frame, bytes)) = unread.take(longest(class)).map_err(|error| malformed(&error))? {
                    meter.received(class, bytes);
                    if class_of(&frame) != Some(class) {
                        return Poll::Ready(Err(End::Garbage(
                            "a frame came on the stream of another class".to_owned(),
                        )));
                    }
                    return Poll::Ready(Ok(frame));
                }
                let stream = lane(!state.quic.side(), place);
                let mut stream = state.quic.recv_stream(stream);
                let Ok(mut chunks) = stream.read(true) else {
                    is_finished = true;
                    break;
                };
                let read = chunks.next(usize::MAX);
                if chunks.finalize().should_transmit() {
                    line.inbox.wake();
                }
                match read {
                    Ok(Some(chunk)) => unread.hear(&chunk.bytes),
                    Err(ReadError::Blocked) => {
                        // Most sessions are idle.
                        unread.rest();
                        break;
                    }
                    Ok(None) | Err(ReadError::Reset(_)) => {
                        is_finished = true;
                        break;
                    }
                }
            }
        }
        match state.poll_gone(context) {
            // That the connection is gone, and why, says more than that control has sent all.
            Poll::Ready(cause) => Poll::Ready(Err(lost(cause))),
            Poll::Pending if is_finished => Poll::Ready(Err(End::Closed)),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Sends what control has, says that this is all, and waits until the peer has it. What the other lanes have is for nobody any more, and
    /// a peer that does not read it is not waited for.
    pub(super) async fn finish(&mut self, carrier: &mut Carrier, meter: &impl Meter) -> Result<(), End> {
        poll_fn(|context| self.poll_lanes(0..1, carrier, meter, context)).await?;
        let line = self.0.line();
        let mut is_told = false;
        poll_fn(|context| {
            let mut state = line.state();
            if !std::mem::replace(&mut is_told, true) {
                let control = lane(state.quic.side(), 0);
                // It was not closed before, or the connection is gone.
                let _ = state.quic.send_stream(control).finish();
                line.inbox.wake();
            }
            if state.is_finished { Poll::Ready(()) } else { state.poll_gone(context).map(drop) }
        })
        .await;
        Ok(())
    }

    pub(super) fn close(&self, reason: &str) {
        self.0.close(VarInt::from_u32(0), reason.as_bytes());
    }
}

/// The stream of a lane of this side.
fn lane(side: Side, place: usize) -> StreamId {
    StreamId::new(side, Dir::Uni, place as u64)
}

/// Lets QUIC take no more than it may send now: while something waits that congestion control does not let go, it acknowledges nothing, and
/// two sides that both wait so wait until a timer of theirs ends it. What is urgent is also in front of whatever has not been handed over.
fn bound(quic: &mut quinn_proto::Connection) {
    let mtu = u64::from(quic.current_mtu());
    // It wants room for a whole datagram, and counts what a datagram has beside data.
    let room = quic.congestion_state().window().saturating_sub(mtu) / 16 * 15;
    quic.set_send_window(room.max(mtu));
}

/// Why a connection is gone.
pub fn lost(error: ConnectionError) -> End {
    match error {
        ConnectionError::ApplicationClosed(closed) if closed.error_code == BUSY => {
            End::Busy(String::from_utf8_lossy(&closed.reason).into_owned())
        }
        ConnectionError::ApplicationClosed(closed) if !closed.reason.is_empty() => {
            End::Told(String::from_utf8_lossy(&closed.reason).into_owned())
        }
        ConnectionError::ApplicationClosed(_) | ConnectionError::Reset => End::Closed,
        ConnectionError::ConnectionClosed(closed) => match alert(closed.error_code) {
            // As the TLS of a WebSocket says it.
            Some(alert) => End::Quic(io::Error::new(io::ErrorKind::InvalidData, rustls::Error::AlertReceived(alert))),
            None if closed.error_code == TransportErrorCode::NO_ERROR => End::Closed,
            // Nobody has looked at who it is: there is no room.
            None if closed.error_code == TransportErrorCode::CONNECTION_REFUSED => End::Busy(closed.to_string()),
            None => End::Told(closed.to_string()),
        },
        error => End::Quic(io::Error::from(error)),
    }
}

/// The alert of TLS that an error of QUIC stands for (RFC 9001, 4.8).
pub fn alert(code: TransportErrorCode) -> Option<rustls::AlertDescription> {
    let code = u64::from(code).checked_sub(0x100)?;
    u8::try_from(code).ok().map(rustls::AlertDescription::from)
}
