//! MQTT 3.1.1 (OASIS standard of 29 October 2014), as much of it as edgecore's client says and hears. Bytes in, packets out; no IO.
//!
//! A message longer than [`MAX_PACKET`] is not kept: its topic is read, the rest is skipped as it comes, and whoever sent it can be answered.

use bytes::{Buf as _, Bytes, BytesMut};

use super::message::MAX_PAYLOAD;

/// The longest packet that is kept, in bytes: payload, topic and what is around them.
const MAX_PACKET: usize = MAX_PAYLOAD + (64 << 10) + 16;
/// Bytes that are taken at once.
const CHUNK: usize = 8 << 10;

/// What a broker says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Packet {
    /// CONNACK: 0 is a welcome.
    Connected(u8),
    /// SUBACK: how many of the filters were refused.
    Subscribed {
        /// Of the SUBSCRIBE.
        refused: usize,
    },
    /// PUBLISH.
    Message {
        /// The topic.
        topic: String,
        /// To be acknowledged, of QoS 1.
        id: Option<u16>,
        /// The broker had kept it for whoever subscribes.
        is_retained: bool,
        /// The payload, or its size.
        payload: Result<Bytes, usize>,
    },
    /// PUBACK.
    Taken(u16),
    /// PINGRESP.
    Pong,
}

/// What is no MQTT, or not what a broker says to such a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the broker sent what is not MQTT 3.1.1: {0}")]
pub(super) struct Malformed(&'static str);

/// Packets from bytes.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    buffer: BytesMut,
    skip: usize,
}

impl Decoder {
    /// Where bytes are to be put; not much is kept for a long message that has passed.
    pub(super) fn room(&mut self) -> &mut BytesMut {
        if self.buffer.is_empty() && self.buffer.capacity() > 8 * CHUNK {
            self.buffer = BytesMut::new();
        }
        self.buffer.reserve(CHUNK);
        &mut self.buffer
    }

    /// The next packet, if it has come whole.
    pub(super) fn next(&mut self) -> Result<Option<Packet>, Malformed> {
        let skipped = self.skip.min(self.buffer.len());
        self.buffer.advance(skipped);
        self.skip -= skipped;
        let Some((first, size, header)) = self.header()? else { return Ok(None) };
        if size > MAX_PACKET {
            if first >> 4 != 3 {
                return Err(Malformed("a packet too long for its kind"));
            }
            return self.too_long(first, size, header);
        }
        if self.buffer.len() < header + size {
            return Ok(None);
        }
        self.buffer.advance(header);
        let body = self.buffer.split_to(size).freeze();
        decode(first, body).map(Some)
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

    fn too_long(&mut self, first: u8, size: usize, header: usize) -> Result<Option<Packet>, Malformed> {
        // Topic and identifier.
        let Some(length) = self.buffer.get(header..header + 2) else { return Ok(None) };
        let head = 2 + usize::from(u16::from_be_bytes([length[0], length[1]])) + 2;
        if self.buffer.len() < header + head {
            return Ok(None);
        }
        self.buffer.advance(header);
        let packet = decode(first, self.buffer.split_to(head).freeze())?;
        self.skip = size - head;
        Ok(Some(match packet {
            Packet::Message { topic, id, is_retained, payload } => {
                let had = payload.map_or(0, |payload| payload.len());
                Packet::Message { topic, id, is_retained, payload: Err(self.skip + had) }
            }
            other => other,
        }))
    }
}

fn decode(first: u8, mut body: Bytes) -> Result<Packet, Malformed> {
    let short = Malformed("a packet too short for its kind");
    match (first >> 4, first & 0x0f) {
        (2, 0) => match body[..] {
            [_, code] => Ok(Packet::Connected(code)),
            _ => Err(short),
        },
        (3, flags) => {
            if body.len() < 2 {
                return Err(short);
            }
            let length = usize::from(body.get_u16());
            if body.len() < length {
                return Err(short);
            }
            let topic =
                String::from_utf8(body.split_to(length).into()).map_err(|_| Malformed("a topic not in UTF-8"))?;
            let id = match (flags >> 1) & 3 {
                0 => None,
                1 if body.len() < 2 => return Err(short),
                1 => Some(body.get_u16()),
                _ => return Err(Malformed("a QoS that was not subscribed to")),
            };
            Ok(Packet::Message { topic, id, is_retained: flags & 1 == 1, payload: Ok(body) })
        }
        (4, 0) => match body[..] {
            [high, low] => Ok(Packet::Taken(u16::from_be_bytes([high, low]))),
            _ => Err(short),
        },
        (9, 0) if body.len() > 2 => {
            Ok(Packet::Subscribed { refused: body[2..].iter().filter(|code| **code > 2).count() })
        }
        (9, 0) => Err(short),
        (13, 0) => Ok(Packet::Pong),
        _ => Err(Malformed("a packet of a kind that is not for clients like this")),
    }
}

/// Writes CONNECT, of a clean session. Seconds of `keep_alive`.
pub(super) fn connect(out: &mut BytesMut, client: &str, keep_alive: u16) {
    packet(out, 0x10, |body| {
        text(body, "MQTT");
        body.extend_from_slice(&[4, 2]);
        body.extend_from_slice(&keep_alive.to_be_bytes());
        text(body, client);
    });
}

/// Writes SUBSCRIBE with QoS 1.
pub(super) fn subscribe(out: &mut BytesMut, filters: &[String]) {
    packet(out, 0x82, |body| {
        // Only one is ever on its way.
        body.extend_from_slice(&1_u16.to_be_bytes());
        for filter in filters {
            text(body, filter);
            body.extend_from_slice(&[1]);
        }
    });
}

/// Writes PUBLISH: of QoS 1 with an identifier, of QoS 0 without.
pub(super) fn publish(out: &mut BytesMut, topic: &str, payload: &[u8], id: Option<u16>, is_retained: bool) {
    packet(out, 0x30 | u8::from(id.is_some()) << 1 | u8::from(is_retained), |body| {
        text(body, topic);
        if let Some(id) = id {
            body.extend_from_slice(&id.to_be_bytes());
        }
        body.extend_from_slice(payload);
    });
}

/// Writes PUBACK.
pub(super) fn taken(out: &mut BytesMut, id: u16) {
    packet(out, 0x40, |body| body.extend_from_slice(&id.to_be_bytes()));
}

/// Writes PINGREQ.
pub(super) fn ping(out: &mut BytesMut) {
    out.extend_from_slice(&[0xc0, 0]);
}

/// Writes DISCONNECT.
pub(super) fn disconnect(out: &mut BytesMut) {
    out.extend_from_slice(&[0xe0, 0]);
}

fn packet(out: &mut BytesMut, first: u8, write: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    // The length takes one to four bytes: it is put between when it is known.
    out.extend_from_slice(&[first, 0, 0, 0, 0]);
    write(out);
    let mut size = out.len() - start - 5;
    let (mut length, mut bytes) = ([0_u8; 4], 0);
    loop {
        length[bytes] = u8::try_from(size & 0x7f).unwrap_or(0) | if size > 0x7f { 0x80 } else { 0 };
        (size, bytes) = (size >> 7, bytes + 1);
        if size == 0 || bytes == length.len() {
            break;
        }
    }
    let end = out.len();
    out.copy_within(start + 5..end, start + 1 + bytes);
    out[start + 1..start + 1 + bytes].copy_from_slice(&length[..bytes]);
    out.truncate(end - 4 + bytes);
}

/// A text has at most 65,535 bytes; what is longer ends there. Nothing that is said here comes near.
fn text(body: &mut BytesMut, text: &str) {
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    body.extend_from_slice(&length.to_be_bytes());
    body.extend_from_slice(&text.as_bytes()[..usize::from(length)]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(decoder: &mut Decoder) -> Result<Vec<Packet>, Malformed> {
        let mut packets = Vec::new();
        while let Some(packet) = decoder.next()? {
            packets.push(packet);
        }
        Ok(packets)
    }

    fn message(topic: &str, id: Option<u16>, payload: Result<&[u8], usize>) -> Packet {
        let payload = payload.map(Bytes::copy_from_slice);
        Packet::Message { topic: topic.to_owned(), id, is_retained: false, payload }
    }

    #[test]
    fn what_is_written_is_as_in_the_standard() {
        let mut out = BytesMut::new();
        connect(&mut out, "a", 10);
        assert_eq!(out[..], *b"\x10\x0d\0\x04MQTT\x04\x02\0\x0a\0\x01a");
        out.clear();
        subscribe(&mut out, &["a/b".to_owned(), "c".to_owned()]);
        assert_eq!(out[..], *b"\x82\x0c\0\x01\0\x03a/b\x01\0\x01c\x01");
        out.clear();
        publish(&mut out, "t", b"xy", Some(258), false);
        publish(&mut out, "t", b"", None, true);
        taken(&mut out, 7);
        ping(&mut out);
        disconnect(&mut out);
        assert_eq!(out[..], *b"\x32\x07\0\x01t\x01\x02xy\x31\x03\0\x01t\x40\x02\0\x07\xc0\0\xe0\0");
    }

    #[test]
    fn what_a_broker_says_is_read() {
        let mut decoder = Decoder::default();
        decoder.buffer.extend_from_slice(b"\x20\x02\0\0\x90\x05\0\x01\x01\x80\0\x40\x02\x01\x02\xd0\0");
        let heard = all(&mut decoder).unwrap();
        let subscribed = Packet::Subscribed { refused: 1 };
        assert_eq!(heard, [Packet::Connected(0), subscribed, Packet::Taken(258), Packet::Pong]);
        decoder.buffer.extend_from_slice(b"\x31\x03\0\x01t");
        let Some(Packet::Message { is_retained: true, .. }) = decoder.next().unwrap() else { panic!("not retained") };
        for bad in [
            &b"\x10\x02\0\0"[..],
            b"\x20\x01\0",
            b"\x30\x01\0",
            b"\x30\x02\0\x05",
            b"\x34\x05\0\x01t\0\x01",
            b"\x90\x02\0\x01",
            b"\x30\x03\0\x01\xff",
            b"\x30\xff\xff\xff\xff",
            b"\x40\xff\xff\xff\x7f",
        ] {
            let mut decoder = Decoder::default();
            decoder.buffer.extend_from_slice(bad);
            assert!(decoder.next().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_message_too_long_is_skipped_and_its_topic_known() {
        let mut out = BytesMut::new();
        let long = vec![b'x'; 10 << 20];
        publish(&mut out, "a/b", &long, Some(3), false);
        publish(&mut out, "a/b", &long, None, false);
        publish(&mut out, "c", &long[..MAX_PAYLOAD], Some(4), false);
        let mut decoder = Decoder::default();
        let mut heard = Vec::new();
        for part in out.chunks(100_000) {
            decoder.buffer.extend_from_slice(part);
            heard.append(&mut all(&mut decoder).unwrap());
            assert!(decoder.buffer.len() <= MAX_PACKET);
        }
        assert_eq!(
            heard,
            [
                message("a/b", Some(3), Err(10 << 20)),
                message("a/b", None, Err(10 << 20)),
                message("c", Some(4), Ok(&long[..MAX_PAYLOAD]))
            ]
        );
    }

    proptest! {
        #[test]
        fn messages_survive_any_cut(
            messages in proptest::collection::vec((".{0,20}", proptest::collection::vec(any::<u8>(), 0..300), any::<Option<u16>>()), 1..8),
            cut in 1_usize..50,
        ) {
            let mut out = BytesMut::new();
            for (topic, payload, id) in &messages {
                publish(&mut out, topic, payload, *id, false);
            }
            let mut decoder = Decoder::default();
            let mut heard = Vec::new();
            for part in out.chunks(cut) {
                decoder.buffer.extend_from_slice(part);
                heard.append(&mut all(&mut decoder).unwrap());
            }
            let said: Vec<_> = messages.iter().map(|(topic, payload, id)| message(topic, *id, Ok(payload))).collect();
            prop_assert_eq!(heard, said);
            prop_assert!(decoder.buffer.is_empty());
        }

        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::default();
            decoder.buffer.extend_from_slice(&bytes);
            let _ = all(&mut decoder);
        }
    }
}
