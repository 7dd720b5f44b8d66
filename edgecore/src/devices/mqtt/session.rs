//! One connection to a broker: what is asked is answered, what changes is published.
//!
//! While a broker does not take what it is sent, nothing is read from it and nothing is looked at in the twins: what waits is bounded, and
//! what comes later is newer.

use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use skerry_proto::mqtt::{self, Connect, Decoder, Packet, Publish};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::message::MAX_PAYLOAD;
use super::mirror::Mirror;
use super::outbox::Outbox;
use super::{Status, answer, topic};
use crate::clock;
use crate::devices::{Change, Devices};

/// After so long a silence the broker is asked whether it is there.
const PING: Duration = Duration::from_secs(10);
/// After so long a silence it is not.
const DEAD: Duration = Duration::from_secs(20);
/// What the broker waits for a sign of life, in seconds.
const KEEP_ALIVE: u16 = 30;
/// How long a broker may take to let edgecore in.
const WELCOME: Duration = Duration::from_secs(5);
/// Messages a second that nobody asked for, at most: ten thousand values that change all the time are each published every few seconds.
const RATE: u32 = 2000;
/// What waits to be written before no more is made, in bytes.
const MAX_OUT: usize = 64 << 10;

/// What carries MQTT.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What outlives a connection.
pub(super) struct Session<'a> {
    pub(super) devices: &'a Devices,
    pub(super) node: &'a str,
    /// Words for where the broker is.
    pub(super) place: String,
    /// Whether it is edgecore's.
    pub(super) is_own: bool,
    pub(super) mirror: &'a mut Mirror,
    pub(super) outbox: &'a mut Outbox,
    pub(super) status: &'a watch::Sender<Status>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Connecting,
    Subscribing,
    Ready,
}

impl Session<'_> {
    /// Until the connection is gone; why it is. `Ok` at the shutdown.
    pub(super) async fn run(&mut self, stream: Box<dyn Stream>, stop: &CancellationToken) -> Result<(), String> {
        let mut changes = self.devices.subscribe();
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (mut decoder, mut out) = (Decoder::new(MAX_PAYLOAD), BytesMut::new());
        let client_id = format!("skerry-{}", self.node);
        let hello = Connect { client_id: &client_id, keep_alive: KEEP_ALIVE, clean: true, ..Connect::default() };
        mqtt::connect(&mut out, &hello);
        let began = clock::monotonic();
        let (mut heard, mut pinged, mut phase) = (began, began, Phase::Connecting);
        let mut allowance = Allowance { left: RATE, at: began };
        loop {
            let now = clock::monotonic();
            if phase != Phase::Ready && now >= began + WELCOME {
                return Err(format!("the broker did not let edgecore in within {} s", WELCOME.as_secs()));
            }
            if now >= heard + DEAD {
                return Err(format!("the broker said nothing for {} s", DEAD.as_secs()));
            }
            if now >= heard.max(pinged) + PING {
                mqtt::ping(&mut out);
                pinged = now;
            }
            let mut wake = if phase == Phase::Ready { heard.max(pinged) + PING } else { began + WELCOME };
            if phase == Phase::Ready {
                self.outbox.send(&mut out);
                wake = wake.min(self.publish(&mut out, &mut allowance, now));
            }
            tokio::select! {
                () = stop.cancelled() => {
                    mqtt::disconnect(&mut out);
                    // It may be gone already.
                    let _ = tokio::time::timeout(Duration::from_secs(1), writer.write_all(&out)).await;
                    return Ok(());
                }
                read = reader.read_buf(decoder.room()), if out.len() < MAX_OUT * 2 => match read {
                    Ok(0) => return Err("the broker ended the connection".to_owned()),
                    Ok(_) => {
                        heard = clock::monotonic();
                        while let Some(packet) = decoder.take().map_err(|malformed| malformed.to_string())? {
                            self.take(packet, &mut phase, &mut out).await?;
                        }
                    }
                    Err(error) => return Err(format!("the broker cannot be heard: {error}")),
                },
                written = writer.write(&out), if !out.is_empty() => match written {
                    Ok(0) => return Err("the broker takes nothing any more".to_owned()),
                    Ok(bytes) => out.advance(bytes),
                    Err(error) => return Err(format!("the broker cannot be told: {error}")),
                },
                change = changes.recv() => self.changed(change, &mut changes)?,
                () = tokio::time::sleep(wake.saturating_sub(now)) => {}
            }
        }
    }

    /// The connection is gone.
    pub(super) fn ended(&mut self) {
        self.outbox.disconnected();
    }

    async fn take(&mut self, packet: Packet, phase: &mut Phase, out: &mut BytesMut) -> Result<(), String> {
        match packet {
            Packet::ConnAck { code: 0 } if *phase == Phase::Connecting => {
                let filters = topic::filters(self.node);
                let filters: Vec<(&str, u8)> = filters.iter().map(|filter| (filter.as_str(), 1)).collect();
                // Only one is ever on its way.
                mqtt::subscribe(out, 1, &filters);
                *phase = Phase::Subscribing;
            }
            Packet::ConnAck { code: 5 | 4 } => {
                return Err("the broker lets nobody in without a password; let it listen on a unix socket for edgecore, or allow anonymous clients on 127.0.0.1".to_owned());
            }
            Packet::ConnAck { code } => return Err(format!("the broker refused edgecore with code {code}")),
            Packet::SubAck { refused } if *phase == Phase::Subscribing => {
                if refused > 0 {
                    warn!(refused, "the MQTT broker does not let edgecore hear all that devices are asked");
                }
                *phase = Phase::Ready;
                let now = clock::monotonic();
                self.mirror.all(self.devices.keys(), true, now);
                let list = self.mirror.list(&self.devices.all(), self.node, wall());
                self.outbox.push(list);
                info!("the MQTT broker is connected");
                let place = std::mem::take(&mut self.place);
                self.status.send_modify(|status| {
                    (status.connected, status.message, status.is_own) = (true, place, self.is_own);
                });
            }
            Packet::Publish { topic, payload, qos, id, retain } => {
                let payload = payload.as_ref().map(|payload| &payload[..]).map_err(|size| *size);
                // One that the broker kept is of before, and would be done again with every connection.
                if !retain
                    && let Some((event, is_refused)) =
                        answer::answer(self.devices, self.node, &topic, payload, wall()).await
                {
                    self.outbox.push(event);
                    let dropped = self.outbox.dropped();
                    self.status.send_modify(|status| {
                        status.requests += 1;
                        status.refused += u64::from(is_refused);
                        status.dropped = dropped;
                    });
                }
                mqtt::acknowledge(out, qos, id);
            }
            Packet::PubAck { id } => self.outbox.taken(id),
            Packet::PingResp | Packet::SubAck { .. } => {}
            // Neither is anything said with QoS 2 nor subscribed to, nor a subscription ended.
            Packet::PubRec { .. } | Packet::PubRel { .. } | Packet::PubComp { .. } | Packet::UnsubAck => {
                return Err("the broker answers what was not said".to_owned());
            }
        }
        Ok(())
    }

    /// Writes what is due; answers when more is.
    fn publish(&mut self, out: &mut BytesMut, allowance: &mut Allowance, now: Duration) -> Duration {
        let mut published = 0;
        while out.len() < MAX_OUT && self.outbox.has_room() {
            if !allowance.is_left(now) {
                break;
            }
            let Some(key) = self.mirror.take(now) else { break };
            let twin = self.devices.twin(&key);
            let news = self.mirror.look(&key, twin.as_ref(), self.node, now, wall());
            for event in &news.retained {
                let publish = Publish { topic: &event.topic, payload: &event.payload, qos: 0, retain: true };
                mqtt::publish(out, &publish, 0);
            }
            published += news.retained.len() as u64;
            allowance.take(news.retained.len() + news.events.len());
            for event in news.events {
                self.outbox.push(event);
            }
            self.outbox.send(out);
        }
        if published > 0 {
            self.status.send_modify(|status| status.published += published);
        }
        let due = self.mirror.next_due().unwrap_or(Duration::MAX);
        // What holds it up now is gone when something was written or taken, which wakes, or in the next part of a second.
        if due <= now { now + Duration::from_millis(50) } else { due }
    }

    fn changed(
        &mut self,
        change: Result<Change, RecvError>,
        changes: &mut broadcast::Receiver<Change>,
    ) -> Result<(), String> {
        let now = clock::monotonic();
        let mut next = change;
        loop {
            match next {
                Ok(Change::Value { changed: false, .. }) => {}
                Ok(
                    Change::Value { device, .. }
                    | Change::Desired { device, .. }
                    | Change::State { device, .. }
                    | Change::Device { device, .. },
                ) => self.mirror.touch(&device, now),
                Err(RecvError::Lagged(_)) => self.mirror.all(self.devices.keys(), false, now),
                Err(RecvError::Closed) => return Err("the devices are no longer there".to_owned()),
            }
            next = match changes.try_recv() {
                Ok(change) => Ok(change),
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Lagged(missed)) => Err(RecvError::Lagged(missed)),
                Err(TryRecvError::Closed) => Err(RecvError::Closed),
            };
        }
    }
}

fn wall() -> i64 {
    clock::wall().as_millisecond()
}

/// How many messages may be made now.
#[derive(Debug)]
struct Allowance {
    left: u32,
    at: Duration,
}

impl Allowance {
    fn is_left(&mut self, now: Duration) -> bool {
        let earned =
            u32::try_from(now.saturating_sub(self.at).as_millis()).unwrap_or(u32::MAX).saturating_mul(RATE / 1000);
        if earned > 0 {
            (self.left, self.at) = (self.left.saturating_add(earned).min(RATE), now);
        }
        self.left > 0
    }

    fn take(&mut self, count: usize) {
        self.left = self.left.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
    }
}
