//! Frames on QUIC: one unidirectional stream for each class and side, strictly prioritised (RFC 9000).

use std::future::{Future, poll_fn};
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use prost::Message as _;
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{
    Connection, ConnectionError, IdleTimeout, ReadError, RecvStream, SendStream, TransportErrorCode, VarInt,
    WriteError, rustls,
};

use super::{BURST, End, Meter, congestion, longest, malformed};
use crate::frame::Lane;
use crate::mux::{Class, MAX_WINDOW, class_of};
use crate::streams::Carrier;
use crate::wire::Frame;

/// The protocol as TLS negotiates it (RFC 7301).
pub const ALPN: &[u8] = b"skerry/1";

/// What one class may have on its way and unread, in bytes: what one stream may.
#[expect(clippy::cast_possible_truncation, reason = "a megabyte")]
const CLASS_WINDOW: u32 = MAX_WINDOW as u32;
/// Longer than a session that hears nothing lives: it is the session that ends then, and says so.
const IDLE: Duration = Duration::from_secs(60);
/// Bytes that are read at once.
const CHUNK: usize = 4 << 10;

const LANE_COUNT: usize = 4;
/// The lanes of one side, from the highest priority to the lowest; the QUIC stream's number among its side's is the place here.
const LANES: [Option<Class>; LANE_COUNT] = [None, Some(Class::Api), Some(Class::Ops), Some(Class::Device)];

/// QUIC as a node: `tls` proves it and names whom it trusts.
pub fn client_config(tls: &rustls::ClientConfig) -> Result<quinn::ClientConfig, NoInitialCipherSuite> {
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(transport());
    Ok(config)
}

/// QUIC as the cloud: `tls` proves it and says who may come.
pub fn server_config(tls: &rustls::ServerConfig) -> Result<quinn::ServerConfig, NoInitialCipherSuite> {
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(transport());
    Ok(config)
}

#[expect(clippy::cast_possible_truncation, reason = "four")]
fn transport() -> Arc<quinn::TransportConfig> {
    let mut config = quinn::TransportConfig::default();
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

type Accepting = Pin<Box<dyn Future<Output = Result<RecvStream, ConnectionError>> + Send + Sync>>;

pub(super) struct Quic {
    connection: Connection,
    outgoing: [Outgoing; LANE_COUNT],
    incoming: [Option<Incoming>; LANE_COUNT],
    /// Until the peer has opened all.
    accepting: Option<Accepting>,
    /// The connection is gone; what came before is still read.
    gone: Option<ConnectionError>,
}

struct Outgoing {
    stream: SendStream,
    /// What of a frame QUIC has not taken yet.
    unsent: Bytes,
}

struct Incoming {
    stream: RecvStream,
    unread: Lane,
}

impl std::fmt::Debug for Quic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Quic").field(&self.connection.remote_address()).finish()
    }
}

impl Quic {
    pub(super) async fn open(connection: Connection) -> Result<Self, End> {
        let accepting = accept(&connection);
        let open = async |place: usize| {
            let stream = connection.open_uni().await.map_err(lost)?;
            // A stream that was just opened has not been closed.
            let _ = stream.set_priority(-i32::try_from(place).unwrap_or_default());
            Ok(Outgoing { stream, unsent: Bytes::new() })
        };
        let outgoing = [open(0).await?, open(1).await?, open(2).await?, open(3).await?];
        Ok(Self { connection, outgoing, incoming: Default::default(), accepting: Some(accepting), gone: None })
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
        let (mut sent, mut blocked, mut is_bounded) = (0, false, false);
        for (lane, class) in self.outgoing[places.clone()].iter_mut().zip(&LANES[places]) {
            loop {
                if lane.unsent.is_empty() {
                    if sent == BURST {
                        context.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    let Poll::Ready(frame) = carrier.poll_frame_of(*class, context) else { break };
                    lane.unsent = frame.encode_length_delimited_to_vec().into();
                    meter.sent(lane.unsent.len());
                    sent += 1;
                }
                if !std::mem::replace(&mut is_bounded, true) {
                    bound(&self.connection);
                }
                match Pin::new(&mut lane.stream).poll_write(context, &lane.unsent) {
                    Poll::Ready(Ok(taken)) => lane.unsent.advance(taken),
                    Poll::Ready(Err(WriteError::ConnectionLost(error))) => return Poll::Ready(Err(lost(error))),
                    Poll::Ready(Err(_)) => {
                        return Poll::Ready(Err(End::Garbage("a stream of the session was stopped".to_owned())));
                    }
                    Poll::Pending => {
                        blocked = true;
                        break;
                    }
                }
            }
        }
        if blocked { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    pub(super) fn poll_receive(&mut self, meter: &impl Meter, context: &mut Context<'_>) -> Poll<Result<Frame, End>> {
        while let Some(accepting) = &mut self.accepting {
            let Poll::Ready(accepted) = accepting.as_mut().poll(context) else { break };
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    (self.accepting, self.gone) = (None, Some(error));
                    break;
                }
            };
            let place = usize::try_from(stream.id().index()).unwrap_or(usize::MAX);
            let Some(lane) = self.incoming.get_mut(place) else {
                return Poll::Ready(Err(End::Garbage(format!("a stream number {place} that no class has"))));
            };
            *lane = Some(Incoming { stream, unread: Lane::default() });
            let complete = self.incoming.iter().all(Option::is_some);
            self.accepting = (!complete).then(|| accept(&self.connection));
        }
        // The last words may have come together with the end: it counts when nothing more can be read.
        let mut end = None;
        for (lane, class) in self.incoming.iter_mut().zip(LANES) {
            let Some(lane) = lane else { continue };
            let Poll::Ready(frame) = lane.poll_frame(longest(class), context) else { continue };
            let (frame, bytes) = match frame {
                Ok(frame) => frame,
                Err(garbage @ End::Garbage(_)) => return Poll::Ready(Err(garbage)),
                // The last one: that the connection is gone, and why, says more than that control has sent all.
                Err(other) => {
                    end = Some(other);
                    continue;
                }
            };
            meter.received(bytes);
            if class_of(&frame) != Some(class) {
                return Poll::Ready(Err(End::Garbage("a frame came on the stream of another class".to_owned())));
            }
            return Poll::Ready(Ok(frame));
        }
        match self.gone.clone().map(lost).or(end) {
            Some(end) => Poll::Ready(Err(end)),
            None => Poll::Pending,
        }
    }

    /// Sends what control has, says that this is all, and waits until the peer has it. What the other lanes have is for nobody any more, and
    /// a peer that does not read it is not waited for.
    pub(super) async fn finish(&mut self, carrier: &mut Carrier, meter: &impl Meter) -> Result<(), End> {
        poll_fn(|context| self.poll_lanes(0..1, carrier, meter, context)).await?;
        let control = &mut self.outgoing[0].stream;
        // It was not closed before, or the connection is gone.
        let _ = control.finish();
        let _ = control.stopped().await;
        Ok(())
    }

    pub(super) fn close(&self, reason: &str) {
        self.connection.close(VarInt::from_u32(0), reason.as_bytes());
    }
}

impl Incoming {
    fn poll_frame(&mut self, longest: usize, context: &mut Context<'_>) -> Poll<Result<(Frame, usize), End>> {
        loop {
            if let Some(frame) = self.unread.take(longest).map_err(|error| malformed(&error))? {
                return Poll::Ready(Ok(frame));
            }
            let mut chunk = [0; CHUNK];
            let bytes = match self.stream.poll_read(context, &mut chunk) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(End::Closed)),
                Poll::Ready(Ok(bytes)) => bytes,
                Poll::Ready(Err(ReadError::ConnectionLost(error))) => return Poll::Ready(Err(lost(error))),
                Poll::Ready(Err(_)) => return Poll::Ready(Err(End::Closed)),
                Poll::Pending => {
                    // Most sessions are idle.
                    self.unread.rest();
                    return Poll::Pending;
                }
            };
            self.unread.hear(&chunk[..bytes]);
        }
    }
}

/// Lets QUIC take no more than it may send now: while something waits that congestion control does not let go, it acknowledges nothing, and
/// two sides that both wait so wait until a timer of theirs ends it. What is urgent is also in front of whatever has not been handed over.
fn bound(connection: &Connection) {
    let path = connection.stats().path;
    let mtu = u64::from(path.current_mtu);
    // It wants room for a whole datagram, and counts what a datagram has beside data.
    let room = path.cwnd.saturating_sub(mtu) / 16 * 15;
    connection.set_send_window(room.max(mtu));
}

fn accept(connection: &Connection) -> Accepting {
    let connection = connection.clone();
    Box::pin(async move { connection.accept_uni().await })
}

/// Why a connection is gone.
pub fn lost(error: ConnectionError) -> End {
    match error {
        ConnectionError::ApplicationClosed(closed) if !closed.reason.is_empty() => {
            End::Told(String::from_utf8_lossy(&closed.reason).into_owned())
        }
        ConnectionError::ApplicationClosed(_) | ConnectionError::Reset => End::Closed,
        ConnectionError::ConnectionClosed(closed) => match alert(closed.error_code) {
            // As the TLS of a WebSocket says it.
            Some(alert) => End::Quic(io::Error::new(io::ErrorKind::InvalidData, rustls::Error::AlertReceived(alert))),
            None if closed.error_code == TransportErrorCode::NO_ERROR => End::Closed,
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
