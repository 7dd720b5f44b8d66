//! Packets of MQTT 3.1.1 as bytes, after its chapters 2 and 3. Pure.

use bytes::{Buf as _, BytesMut};

/// A CONNECT.
#[derive(Clone, Copy, Debug)]
pub struct Connect<'a> {
    /// Unique at the broker.
    pub client_id: &'a str,
    /// User, if there is one.
    pub user: Option<&'a str>,
    /// Password, if there is one.
    pub password: Option<&'a str>,
    /// Seconds; 0: none.
    pub keep_alive: u16,
    /// Whether the broker forgets the session.
    pub clean: bool,
}

/// A PUBLISH.
#[derive(Clone, Copy, Debug)]
pub struct Publish<'a> {
    /// Topic; UTF-8, at most 65,535 bytes.
    pub topic: &'a [u8],
    /// Payload.
    pub payload: &'a [u8],
    /// 0, 1 or 2.
    pub qos: u8,
    /// Whether the broker keeps it.
    pub retain: bool,
}

pub(super) fn connect(connect: &Connect<'_>, out: &mut Vec<u8>) {
    let mut body = Vec::new();
    text(b"MQTT", &mut body);
    let user = u8::from(connect.user.is_some()) << 7;
    // A password without a user is not allowed.
    let password = connect.user.and(connect.password);
    let flags = user | u8::from(password.is_some()) << 6 | u8::from(connect.clean) << 1;
    body.extend_from_slice(&[4, flags]);
    body.extend_from_slice(&connect.keep_alive.to_be_bytes());
    for field in [Some(connect.client_id), connect.user, password].into_iter().flatten() {
        text(field.as_bytes(), &mut body);
    }
    head(0x10, body.len(), out);
    out.extend_from_slice(&body);
}

pub(super) fn publish(publish: &Publish<'_>, id: u16, out: &mut Vec<u8>) {
    let qos = publish.qos.min(2);
    let topic = &publish.topic[..publish.topic.len().min(65_535)];
    head(
        0x30 | qos << 1 | u8::from(publish.retain),
        2 + topic.len() + if qos > 0 { 2 } else { 0 } + publish.payload.len(),
        out,
    );
    text(topic, out);
    if qos > 0 {
        out.extend_from_slice(&id.to_be_bytes());
    }
    out.extend_from_slice(publish.payload);
}

pub(super) fn subscribe(topic: &str, qos: u8, id: u16, out: &mut Vec<u8>) {
    head(0x82, 2 + 2 + topic.len() + 1, out);
    out.extend_from_slice(&id.to_be_bytes());
    text(topic.as_bytes(), out);
    out.push(qos.min(2));
}

pub(super) fn unsubscribe(topic: &str, id: u16, out: &mut Vec<u8>) {
    head(0xa2, 2 + 2 + topic.len(), out);
    out.extend_from_slice(&id.to_be_bytes());
    text(topic.as_bytes(), out);
}

pub(super) fn ping(out: &mut Vec<u8>) {
    out.extend_from_slice(&[0xc0, 0]);
}

/// PUBACK or PUBREC, or nothing.
pub(super) fn acknowledge_publish(qos: u8, id: u16, out: &mut Vec<u8>) {
    match qos {
        1 => with_id(0x40, id, out),
        2 => with_id(0x50, id, out),
        _ => {}
    }
}

pub(super) fn pubrel(id: u16, out: &mut Vec<u8>) {
    with_id(0x62, id, out);
}

pub(super) fn pubcomp(id: u16, out: &mut Vec<u8>) {
    with_id(0x70, id, out);
}

fn with_id(kind: u8, id: u16, out: &mut Vec<u8>) {
    let [high, low] = id.to_be_bytes();
    out.extend_from_slice(&[kind, 2, high, low]);
}

fn text(text: &[u8], out: &mut Vec<u8>) {
    let text = &text[..text.len().min(65_535)];
    out.extend_from_slice(&u16::try_from(text.len()).unwrap_or(0).to_be_bytes());
    out.extend_from_slice(text);
}

fn head(first: u8, mut length: usize, out: &mut Vec<u8>) {
    out.push(first);
    loop {
        let more = if length >= 128 { 128 } else { 0 };
        out.push(u8::try_from(length % 128).unwrap_or(0) | more);
        length /= 128;
        if length == 0 {
            return;
        }
    }
}

/// A packet from a broker.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Packet {
    ConnAck { code: u8 },
    Publish { topic: String, payload: Vec<u8>, qos: u8, id: u16, retain: bool },
    PubAck { id: u16 },
    PubRec { id: u16 },
    PubRel { id: u16 },
    PubComp { id: u16 },
    SubAck { refused: bool },
    UnsubAck,
    Pong,
}

/// What the bytes so far come to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// More bytes are needed.
    More,
    Packet(Packet),
    /// The beginning of a PUBLISH that is too long; the rest of it is skipped.
    TooLong {
        topic: String,
        qos: u8,
        id: u16,
        length: usize,
    },
    /// Not MQTT: the connection is of no more use.
    Broken(&'static str),
}

/// Bytes that came, and how many of those to come are skipped.
pub(super) struct Decoder {
    bytes: BytesMut,
    skip: usize,
    longest: usize,
}

impl Decoder {
    pub(super) fn new(longest: usize) -> Self {
        Self { bytes: BytesMut::new(), skip: 0, longest: longest.max(70_000) }
    }

    /// Where bytes are read to.
    pub(super) fn space(&mut self) -> &mut BytesMut {
        self.bytes.reserve(4096);
        &mut self.bytes
    }

    pub(super) fn step(&mut self) -> Step {
        if self.skip > 0 {
            let now = self.skip.min(self.bytes.len());
            self.bytes.advance(now);
            self.skip -= now;
            if self.skip > 0 {
                return Step::More;
            }
        }
        let (first, length, head) = match parse_head(&self.bytes) {
            Ok(Some(head)) => head,
            Ok(None) => return Step::More,
            Err(why) => return Step::Broken(why),
        };
        if length <= self.longest {
            let Some(body) = self.bytes.get(head..head + length) else { return Step::More };
            let step = parse(first, body).map_or_else(Step::Broken, Step::Packet);
            self.bytes.advance(head + length);
            if self.bytes.is_empty() && self.bytes.capacity() > 64 << 10 {
                self.bytes = BytesMut::new();
            }
            return step;
        }
        if first >> 4 != 3 {
            return Step::Broken("the broker sent a packet that is too long");
        }
        // As much as has the topic and the identifier in any case.
        let enough = 65_535 + 4;
        let Some(body) = self.bytes.get(head..head + enough) else { return Step::More };
        match parse(first, body) {
            Ok(Packet::Publish { topic, qos, id, .. }) => {
                self.skip = head + length;
                Step::TooLong { topic, qos, id, length }
            }
            Ok(_) => Step::Broken("the broker sent a packet that is too long"),
            Err(why) => Step::Broken(why),
        }
    }
}

/// First byte, remaining length, and how many bytes those took.
fn parse_head(bytes: &[u8]) -> Result<Option<(u8, usize, usize)>, &'static str> {
    let Some((&first, rest)) = bytes.split_first() else { return Ok(None) };
    let mut length = 0;
    for (index, &byte) in rest.iter().take(4).enumerate() {
        length |= usize::from(byte & 127) << (7 * index);
        if byte < 128 {
            return Ok(Some((first, length, index + 2)));
        }
    }
    if rest.len() >= 4 { Err("a remaining length of more than four bytes") } else { Ok(None) }
}

fn parse(first: u8, body: &[u8]) -> Result<Packet, &'static str> {
    let id = || body.first_chunk::<2>().map(|id| u16::from_be_bytes(*id)).ok_or("a packet without its identifier");
    Ok(match first >> 4 {
        2 => Packet::ConnAck { code: *body.get(1).ok_or("a CONNACK without a code")? },
        3 => {
            let qos = first >> 1 & 3;
            if qos == 3 {
                return Err("a PUBLISH with QoS 3");
            }
            let (length, rest) = body.split_first_chunk::<2>().ok_or("a PUBLISH without a topic")?;
            let length = usize::from(u16::from_be_bytes(*length));
            let (topic, rest) = rest.split_at_checked(length).ok_or("a PUBLISH whose topic is cut")?;
            let topic = std::str::from_utf8(topic).map_err(|_| "a topic that is not UTF-8")?.to_owned();
            let (id, payload) = match qos {
                0 => (0, rest),
                _ => {
                    let (id, payload) = rest.split_first_chunk::<2>().ok_or("a PUBLISH without its identifier")?;
                    (u16::from_be_bytes(*id), payload)
                }
            };
            Packet::Publish { topic, payload: payload.to_vec(), qos, id, retain: first & 1 != 0 }
        }
        4 => Packet::PubAck { id: id()? },
        5 => Packet::PubRec { id: id()? },
        6 => Packet::PubRel { id: id()? },
        7 => Packet::PubComp { id: id()? },
        9 => Packet::SubAck { refused: body.get(2..).is_none_or(|codes| codes.iter().any(|&code| code >= 128)) },
        11 => Packet::UnsubAck,
        13 => Packet::Pong,
        _ => return Err("a packet that a broker does not send"),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn feed(decoder: &mut Decoder, bytes: &[u8]) {
        decoder.space().extend_from_slice(bytes);
    }

    #[test]
    fn packets_are_as_the_standard_has_them() {
        let mut out = Vec::new();
        let hello = Connect { client_id: "c", user: Some("u"), password: Some("p"), keep_alive: 60, clean: true };
        connect(&hello, &mut out);
        assert_eq!(out, b"\x10\x13\0\x04MQTT\x04\xc2\0\x3c\0\x01c\0\x01u\0\x01p");
        out.clear();
        publish(&Publish { topic: b"a/b", payload: b"hi", qos: 1, retain: true }, 10, &mut out);
        assert_eq!(out, b"\x33\x09\0\x03a/b\0\x0ahi");
        out.clear();
        subscribe("a/#", 1, 2, &mut out);
        assert_eq!(out, b"\x82\x08\0\x02\0\x03a/#\x01");
    }

    #[test]
    fn a_packet_may_come_byte_by_byte() {
        let mut out = Vec::new();
        publish(&Publish { topic: b"t", payload: &[7; 300], qos: 2, retain: false }, 5, &mut out);
        let mut decoder = Decoder::new(1 << 20);
        for byte in &out[..out.len() - 1] {
            feed(&mut decoder, &[*byte]);
            assert_eq!(decoder.step(), Step::More);
        }
        feed(&mut decoder, &out[out.len() - 1..]);
        let expected = Packet::Publish { topic: "t".into(), payload: vec![7; 300], qos: 2, id: 5, retain: false };
        assert_eq!(decoder.step(), Step::Packet(expected));
        assert_eq!(decoder.step(), Step::More);
    }

    #[test]
    fn ten_mebibytes_are_skipped_and_what_follows_is_read() {
        let mut out = Vec::new();
        publish(&Publish { topic: b"big", payload: &vec![0; 10 << 20], qos: 1, retain: false }, 9, &mut out);
        ping(&mut out);
        *out.iter_mut().nth_back(1).unwrap() = 0xd0;
        let mut decoder = Decoder::new(128 << 10);
        let mut steps = Vec::new();
        let mut largest = 0;
        for chunk in out.chunks(10_000) {
            feed(&mut decoder, chunk);
            loop {
                match decoder.step() {
                    Step::More => break,
                    step => steps.push(step),
                }
            }
            largest = largest.max(decoder.bytes.len());
        }
        assert_eq!(steps.len(), 2);
        assert!(
            matches!(&steps[0], Step::TooLong { topic, qos: 1, id: 9, length } if topic == "big" && *length > 10 << 20)
        );
        assert_eq!(steps[1], Step::Packet(Packet::Pong));
        assert!(largest < 100_000, "{largest}");
    }

    proptest! {
        #[test]
        fn no_bytes_break_it(chunks: Vec<Vec<u8>>) {
            let mut decoder = Decoder::new(1000);
            for chunk in chunks {
                feed(&mut decoder, &chunk);
                for _ in 0..chunk.len() + 1 {
                    match decoder.step() {
                        Step::More => break,
                        Step::Broken(_) => return Ok(()),
                        _ => {}
                    }
                }
            }
        }

        #[test]
        fn what_is_published_is_received(topic in "[a-z/]{1,50}", payload: Vec<u8>, qos in 0..3u8, retain: bool, id in 1..u16::MAX) {
            let mut out = Vec::new();
            publish(&Publish { topic: topic.as_bytes(), payload: &payload, qos, retain }, id, &mut out);
            let mut decoder = Decoder::new(1 << 20);
            feed(&mut decoder, &out);
            let id = if qos > 0 { id } else { 0 };
            prop_assert_eq!(decoder.step(), Step::Packet(Packet::Publish { topic, payload, qos, id, retain }));
        }
    }
}
