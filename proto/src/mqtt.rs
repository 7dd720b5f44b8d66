//! MQTT 3.1.1 (OASIS standard of 29 October 2014), a client's half: what it says as bytes, and bytes as what a broker says. No IO.
//!
//! What the standard has a client end the connection for is [`Malformed`], and so is whatever a broker does not say to a client. The payload
//! of a message that is longer than the decoder was told to keep is skipped as it comes: its topic is known, and it can be acknowledged.

use bytes::{Buf as _, BufMut, Bytes, BytesMut};

#[cfg(test)]
mod tests;

/// Bytes that are taken at once, at least; a mapper has a connection for each of its devices, and each has as much.
const CHUNK: usize = 1 << 10;
/// The longest text there can be, in bytes.
const MAX_TEXT: usize = u16::MAX as usize;
/// The most that stands before the payload of a PUBLISH: topic and identifier, in bytes.
const MAX_HEAD: usize = 2 + MAX_TEXT + 2;
/// A buffer that is larger is given back once it is empty, in bytes.
const KEPT: usize = 64 << 10;

/// CONNECT.
#[derive(Clone, Copy, Debug, Default)]
pub struct Connect<'a> {
    /// Unique at the broker.
    pub client_id: &'a str,
    /// User.
    pub user: Option<&'a str>,
    /// Password; none without a user.
    pub password: Option<&'a str>,
    /// Within how many seconds the broker hears of the client; 0: it does not look.
    pub keep_alive: u16,
    /// Whether the broker forgets subscriptions and messages with the connection.
    pub clean: bool,
}

/// PUBLISH.
#[derive(Clone, Copy, Debug)]
pub struct Publish<'a> {
    /// The topic.
    pub topic: &'a str,
    /// The payload.
    pub payload: &'a [u8],
    /// 0, 1 or 2.
    pub qos: u8,
    /// Whether the broker keeps it for those who subscribe later.
    pub retain: bool,
}

/// What a broker says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// CONNACK.
    ConnAck {
        /// 0 is a welcome.
        code: u8,
    },
    /// PUBLISH.
    Publish {
        /// The topic.
        topic: String,
        /// The payload, or its size in bytes if it is too long to be kept.
        payload: Result<Bytes, usize>,
        /// 0, 1 or 2.
        qos: u8,
        /// To be acknowledged; 0 with QoS 0.
        id: u16,
        /// The broker had kept it.
        retain: bool,
    },
    /// PUBACK: the end of a PUBLISH of QoS 1.
    PubAck {
        /// Of the PUBLISH.
        id: u16,
    },
    /// PUBREC: to be answered by [`pubrel`].
    PubRec {
        /// Of the PUBLISH.
        id: u16,
    },
    /// PUBREL: to be answered by [`pubcomp`].
    PubRel {
        /// Of the PUBLISH.
        id: u16,
    },
    /// PUBCOMP: the end of a PUBLISH of QoS 2.
    PubComp {
        /// Of the PUBLISH.
        id: u16,
    },
    /// SUBACK.
    SubAck {
        /// How many of the filters are refused.
        refused: usize,
    },
    /// UNSUBACK.
    UnsubAck,
    /// PINGRESP.
    PingResp,
}

/// What is no MQTT, or not what a broker says to a client: the connection is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the broker sent what is not MQTT 3.1.1: {0}")]
pub struct Malformed(&'static str);

/// Packets from bytes.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    skip: usize,
    max_payload: usize,
}

impl Decoder {
    /// Keeps payloads of up to so many bytes, and of anything not much more than that.
    #[must_use]
    pub fn new(max_payload: usize) -> Self {
        Self { buffer: BytesMut::new(), skip: 0, max_payload }
    }

    /// Where bytes are to be put; not much is kept of what a long message took.
    pub fn room(&mut self) -> &mut BytesMut {
        if self.buffer.is_empty() && self.buffer.capacity() > KEPT {
            self.buffer = BytesMut::new();
        }
        self.buffer.reserve(CHUNK);
        &mut self.buffer
    }

    /// The next packet, if it has come whole.
    ///
    /// # Errors
    ///
    /// When the bytes are no packet of a broker's; there is no next one then.
    pub fn take(&mut self) -> Result<Option<Packet>, Malformed> {
        let skipped = self.skip.min(self.buffer.len());
        self.buffer.advance(skipped);
        self.skip -= skipped;
        let Some((first, size, header)) = self.header()? else { return Ok(None) };
        if size > MAX_HEAD + self.max_payload {
            return self.too_long(first, size, header);
        }
        if self.buffer.len() < header + size {
            return Ok(None);
        }
        self.buffer.advance(header);
        let body = self.buffer.split_to(size).freeze();
        self.decode(first, body, 0).map(Some)
    }

    /// The first byte, how much follows the header, and the header's length.
    fn header(&self) -> Result<Option<(u8, usize, usize)>, Malformed> {
        let mut size = 0;
        for at in 1..=4 {
            let (Some(&first), Some(&byte)) = (self.buffer.first(), self.buffer.get(at)) else { return Ok(None) };
            size |= usize::from(byte & 0x7f) << (7 * (at - 1));
            if byte & 0x80 == 0 {
                return Ok(Some((first, size, at + 1)));
            }
        }
        Err(Malformed("a length of more than four bytes"))
    }

    /// Takes what stands before the payload, and skips that.
    fn too_long(&mut self, first: u8, size: usize, header: usize) -> Result<Option<Packet>, Malformed> {
        if first >> 4 != 3 {
            return Err(Malformed("a packet too long for its kind"));
        }
        let Some(length) = self.buffer.get(header..header + 2) else { return Ok(None) };
        let id = if first & 6 == 0 { 0 } else { 2 };
        let head = 2 + usize::from(u16::from_be_bytes([length[0], length[1]])) + id;
        if self.buffer.len() < header + head {
            return Ok(None);
        }
        self.buffer.advance(header);
        let body = self.buffer.split_to(head).freeze();
        self.skip = size - head;
        self.decode(first, body, self.skip).map(Some)
    }

    /// A packet whose body lacks so many bytes at its end.
    fn decode(&self, first: u8, mut body: Bytes, missing: usize) -> Result<Packet, Malformed> {
        const LENGTH: Malformed = Malformed("a packet of another length than its kind has");
        let id = |body: &[u8]| match *body {
            [0, 0] => Err(Malformed("the packet identifier 0")),
            [high, low] => Ok(u16::from_be_bytes([high, low])),
            _ => Err(LENGTH),
        };
        Ok(match (first >> 4, first & 0x0f) {
            (2, 0) => match body[..] {
                [0 | 1, code] => Packet::ConnAck { code },
                [_, _] => return Err(Malformed("a CONNACK with flags that are reserved")),
                _ => return Err(LENGTH),
            },
            (3, flags) => {
                let (qos, is_again) = (flags >> 1 & 3, flags & 8 != 0);
                if qos == 3 || (qos == 0 && is_again) {
                    return Err(Malformed("a PUBLISH with flags that cannot be"));
                }
                if body.len() < 2 {
                    return Err(LENGTH);
                }
                let length = usize::from(body.get_u16());
                if body.len() < length {
                    return Err(LENGTH);
                }
                let topic = topic(body.split_to(length))?;
                let id = match qos {
                    0 => 0,
                    _ if body.len() < 2 => return Err(LENGTH),
                    _ => id(&body.split_to(2))?,
                };
                let length = body.len() + missing;
                let payload = if length > self.max_payload { Err(length) } else { Ok(body) };
                Packet::Publish { topic, payload, qos, id, retain: flags & 1 != 0 }
            }
            (4, 0) => Packet::PubAck { id: id(&body)? },
            (5, 0) => Packet::PubRec { id: id(&body)? },
            (6, 2) => Packet::PubRel { id: id(&body)? },
            (7, 0) => Packet::PubComp { id: id(&body)? },
            (9, 0) => {
                let (of, codes) = body.split_at_checked(2).filter(|(_, codes)| !codes.is_empty()).ok_or(LENGTH)?;
                id(of)?;
                if codes.iter().any(|code| !matches!(*code, 0..=2 | 0x80)) {
                    return Err(Malformed("a SUBACK with a code that is reserved"));
                }
                Packet::SubAck { refused: codes.iter().filter(|code| **code == 0x80).count() }
            }
            (11, 0) => {
                id(&body)?;
                Packet::UnsubAck
            }
            (13, 0) if body.is_empty() => Packet::PingResp,
            (13, 0) => return Err(LENGTH),
            _ => return Err(Malformed("a packet of a kind, or with flags, that is not for clients")),
        })
    }
}

/// The name of a topic, as chapters 1.5.3, 3.3.2 and 4.7 have it.
fn topic(bytes: Bytes) -> Result<String, Malformed> {
    let topic = String::from_utf8(bytes.into()).map_err(|_| Malformed("a topic that is not UTF-8"))?;
    if topic.is_empty() || topic.contains(['\0', '+', '#']) {
        return Err(Malformed("a topic that is empty, or has a wildcard or NUL in it"));
    }
    Ok(topic)
}

/// Writes CONNECT.
pub fn connect(out: &mut impl BufMut, connect: &Connect<'_>) {
    let password = connect.user.and(connect.password);
    let fields = [Some(connect.client_id), connect.user, password];
    let length = fields.iter().flatten().map(|field| 2 + clipped(field).len()).sum::<usize>();
    head(out, 0x10, 10 + length);
    text(out, "MQTT");
    out.put_u8(4);
    let flag = |is_set: bool, at: u8| u8::from(is_set) << at;
    out.put_u8(flag(connect.user.is_some(), 7) | flag(password.is_some(), 6) | flag(connect.clean, 1));
    out.put_u16(connect.keep_alive);
    fields.into_iter().flatten().for_each(|field| text(out, field));
}

/// Writes PUBLISH; `id` is of no meaning with QoS 0.
pub fn publish(out: &mut impl BufMut, publish: &Publish<'_>, id: u16) {
    let qos = publish.qos.min(2);
    let id_length = if qos > 0 { 2 } else { 0 };
    let length = 2 + clipped(publish.topic).len() + id_length + publish.payload.len();
    head(out, 0x30 | qos << 1 | u8::from(publish.retain), length);
    text(out, publish.topic);
    if qos > 0 {
        out.put_u16(id);
    }
    out.put_slice(publish.payload);
}

/// Writes SUBSCRIBE: filters, each with the highest QoS that is wanted.
pub fn subscribe(out: &mut impl BufMut, id: u16, filters: &[(&str, u8)]) {
    head(out, 0x82, 2 + filters.iter().map(|(filter, _)| 2 + clipped(filter).len() + 1).sum::<usize>());
    out.put_u16(id);
    for (filter, qos) in filters {
        text(out, filter);
        out.put_u8(*qos.min(&2));
    }
}

/// Writes UNSUBSCRIBE.
pub fn unsubscribe(out: &mut impl BufMut, id: u16, filter: &str) {
    head(out, 0xa2, 2 + 2 + clipped(filter).len());
    out.put_u16(id);
    text(out, filter);
}

/// Writes what a PUBLISH is answered with: PUBACK, PUBREC, or nothing.
pub fn acknowledge(out: &mut impl BufMut, qos: u8, id: u16) {
    match qos {
        1 => with_id(out, 0x40, id),
        2 => with_id(out, 0x50, id),
        _ => {}
    }
}

/// Writes PUBREL.
pub fn pubrel(out: &mut impl BufMut, id: u16) {
    with_id(out, 0x62, id);
}

/// Writes PUBCOMP.
pub fn pubcomp(out: &mut impl BufMut, id: u16) {
    with_id(out, 0x70, id);
}

/// Writes PINGREQ.
pub fn ping(out: &mut impl BufMut) {
    out.put_slice(&[0xc0, 0]);
}

/// Writes DISCONNECT.
pub fn disconnect(out: &mut impl BufMut) {
    out.put_slice(&[0xe0, 0]);
}

fn with_id(out: &mut impl BufMut, first: u8, id: u16) {
    out.put_slice(&[first, 2]);
    out.put_u16(id);
}

/// The first byte and the length of what follows, which is less than 256 MiB.
fn head(out: &mut impl BufMut, first: u8, mut length: usize) {
    out.put_u8(first);
    loop {
        let more = if length > 0x7f { 0x80 } else { 0 };
        out.put_u8(u8::try_from(length & 0x7f).unwrap_or(0) | more);
        length >>= 7;
        if length == 0 {
            return;
        }
    }
}

fn text(out: &mut impl BufMut, text: &str) {
    let text = clipped(text);
    out.put_u16(u16::try_from(text.len()).unwrap_or(u16::MAX));
    out.put_slice(text.as_bytes());
}

/// A text ends where MQTT has no more room for it; nothing that is said here comes near.
fn clipped(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
