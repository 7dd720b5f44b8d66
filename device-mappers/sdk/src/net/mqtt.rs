//! An MQTT 3.1.1 client, as much as mappers need: connect, publish with any QoS, subscribe.
//!
//! A message that is longer than [`LONGEST`] is skipped as it comes in, so that no sender can fill the memory, and is acknowledged, so that
//! the broker does not send it again.

use std::collections::HashSet;
use std::time::Duration;

use bytes::Bytes;
use skerry_proto::mqtt::{self, Decoder, Packet};
pub use skerry_proto::mqtt::{Connect, Publish};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Address, Stream};

/// The longest message that is taken, bytes.
pub const LONGEST: usize = 128 << 10;
/// How long the broker may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection to a broker.
pub struct Connection {
    stream: Box<dyn Stream>,
    decoder: Decoder,
    out: Vec<u8>,
    /// How much of `out` is sent.
    sent: usize,
    next_id: u16,
    /// Packets that were sent and are not acknowledged.
    unacknowledged: HashSet<u16>,
}

/// What came in.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A message.
    Message {
        /// Its topic.
        topic: String,
        /// Its payload.
        payload: Bytes,
        /// Whether the broker had kept it.
        retained: bool,
    },
    /// A message that was skipped, for it is longer than [`LONGEST`].
    TooLong {
        /// Its topic.
        topic: String,
        /// How long it was, bytes.
        length: usize,
    },
    /// The broker refuses a subscription.
    NotSubscribed,
    /// The answer to [`Connection::queue_ping`].
    Pong,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects and waits for the broker to accept.
    ///
    /// # Errors
    ///
    /// When it cannot be reached, or refuses.
    pub async fn open(address: &Address, connect: &Connect<'_>) -> Result<Self, String> {
        let mut connection = Self {
            stream: address.connect().await?,
            decoder: Decoder::new(LONGEST),
            out: Vec::new(),
            sent: 0,
            next_id: 0,
            unacknowledged: HashSet::new(),
        };
        mqtt::connect(&mut connection.out, connect);
        let accepted = async {
            connection.flush().await?;
            connection.accepted().await
        };
        tokio::time::timeout(PATIENCE, accepted).await.map_err(|_| "the broker does not answer".to_owned())??;
        Ok(connection)
    }

    async fn accepted(&mut self) -> Result<(), String> {
        loop {
            match self.decode()? {
                Some(Packet::ConnAck { code: 0 }) => return Ok(()),
                Some(Packet::ConnAck { code }) => {
                    let why = match code {
                        2 => "the client ID",
                        4 => "user or password",
                        5 => "as not authorized",
                        _ => "the connection",
                    };
                    return Err(format!("the broker refuses {why} (code {code})"));
                }
                None => self.fill().await?,
                Some(_) => return Err("the broker says something before it accepts".to_owned()),
            }
        }
    }

    /// Appends a PUBLISH to what goes out with [`Connection::flush`] or [`Connection::confirm`].
    pub fn queue_publish(&mut self, publish: &Publish<'_>) {
        let id = if publish.qos > 0 { self.id() } else { 0 };
        if publish.qos > 0 {
            self.unacknowledged.insert(id);
        }
        mqtt::publish(&mut self.out, publish, id);
    }

    /// Appends a SUBSCRIBE.
    pub fn queue_subscribe(&mut self, topic: &str, qos: u8) {
        let id = self.id();
        mqtt::subscribe(&mut self.out, id, &[(topic, qos)]);
    }

    /// Appends an UNSUBSCRIBE.
    pub fn queue_unsubscribe(&mut self, topic: &str) {
        let id = self.id();
        mqtt::unsubscribe(&mut self.out, id, topic);
    }

    /// Appends a PINGREQ.
    pub fn queue_ping(&mut self) {
        mqtt::ping(&mut self.out);
    }

    fn id(&mut self) -> u16 {
        self.next_id = self.next_id.checked_add(1).unwrap_or(1);
        self.next_id
    }

    /// Sends what was queued. May be dropped before it ends, and called again.
    ///
    /// # Errors
    ///
    /// When the connection broke.
    pub async fn flush(&mut self) -> Result<(), String> {
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest).await {
                Ok(0) => return Err("the connection was closed".to_owned()),
                Ok(length) => self.sent += length,
                Err(error) => return Err(error.to_string()),
            }
        }
        self.out.clear();
        self.out.shrink_to(4096);
        self.sent = 0;
        self.stream.flush().await.map_err(|error| error.to_string())
    }

    /// Sends what was queued, and waits until all of it is acknowledged; with `ping`, also what has no acknowledgement.
    ///
    /// # Errors
    ///
    /// When the connection broke, or the broker does not answer.
    pub async fn confirm(&mut self, ping: bool) -> Result<(), String> {
        if ping {
            self.queue_ping();
        }
        let confirmed = async {
            self.flush().await?;
            let mut pong = !ping;
            while !pong || !self.unacknowledged.is_empty() {
                match self.decode()? {
                    None => self.fill().await?,
                    Some(packet) => {
                        if let Some(Incoming::Pong) = self.take(packet)? {
                            pong = true;
                        }
                        self.flush().await?;
                    }
                }
            }
            Ok(())
        };
        tokio::time::timeout(PATIENCE, confirmed).await.map_err(|_| "the broker does not answer".to_owned())?
    }

    /// Waits for the next packet that matters, and acknowledges what has to be. May be dropped before it ends.
    ///
    /// # Errors
    ///
    /// When the connection broke, or the broker does not speak MQTT.
    pub async fn next(&mut self) -> Result<Incoming, String> {
        loop {
            match self.decode()? {
                None => self.fill().await?,
                Some(packet) => {
                    if let Some(incoming) = self.take(packet)? {
                        return Ok(incoming);
                    }
                }
            }
        }
    }

    /// Whether acknowledgements wait to be sent by [`Connection::flush`].
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    fn decode(&mut self) -> Result<Option<Packet>, String> {
        self.decoder.take().map_err(|malformed| malformed.to_string())
    }

    fn take(&mut self, packet: Packet) -> Result<Option<Incoming>, String> {
        Ok(match packet {
            Packet::Publish { topic, payload, qos, id, retain } => {
                mqtt::acknowledge(&mut self.out, qos, id);
                Some(match payload {
                    Ok(payload) => Incoming::Message { topic, payload, retained: retain },
                    Err(length) => Incoming::TooLong { topic, length },
                })
            }
            Packet::PubAck { id } | Packet::PubComp { id } => {
                self.unacknowledged.remove(&id);
                None
            }
            Packet::PubRec { id } => {
                mqtt::pubrel(&mut self.out, id);
                None
            }
            Packet::PubRel { id } => {
                mqtt::pubcomp(&mut self.out, id);
                None
            }
            Packet::SubAck { refused: 0 } | Packet::UnsubAck => None,
            Packet::SubAck { .. } => Some(Incoming::NotSubscribed),
            Packet::PingResp => Some(Incoming::Pong),
            Packet::ConnAck { .. } => return Err("the broker accepts a second time".to_owned()),
        })
    }

    async fn fill(&mut self) -> Result<(), String> {
        match self.stream.read_buf(self.decoder.room()).await {
            Ok(0) => Err("the broker closed the connection".to_owned()),
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }
}
