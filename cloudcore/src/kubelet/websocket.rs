//! What is looked at of a WebSocket on its way from a node to a client: where messages begin, so that what breaks off can be told so.
//!
//! The channels of exec and attach are the first byte of each message (`v5.channel.k8s.io` and its elders), or its first digit where
//! they are base64; how a command ended is the last message, in channel 3, and a session that ends without it is told of one. After it, and where
//! ports are forwarded, comes a Close frame with the reason (RFC 6455, 5.5.1). Nothing can be said inside a message: there the connection
//! just ends, which every client takes for the failure it is.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::spdy::{Kind, failure};

const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
/// The channel of how a command ended.
const ERROR_CHANNEL: u8 = 3;
/// The status of a Close frame for what went wrong at the server.
const INTERNAL_ERROR: u16 = 1011;
/// The longest reason in a Close frame, in bytes.
const MAX_REASON: usize = 123;

/// The messages of one direction.
#[derive(Debug)]
pub(super) struct Frames {
    kind: Kind,
    is_base64: bool,
    /// Of a head, what has come.
    head: Vec<u8>,
    /// Of a payload, what has not come.
    left: u64,
    /// A message has begun that this frame or a later one ends.
    inside: bool,
    /// The next byte is the channel of a message that says something.
    channel_next: bool,
    /// How it ends has come.
    told: bool,
}

impl Frames {
    /// In the protocol that was agreed on.
    pub(super) fn new(kind: Kind, protocol: &str) -> Self {
        let (head, is_base64) = (Vec::new(), protocol.contains("base64"));
        Self { kind, is_base64, head, left: 0, inside: false, channel_next: false, told: false }
    }

    /// Looks at what is passed on.
    pub(super) fn see(&mut self, mut input: &[u8]) {
        while let Some((&byte, rest)) = input.split_first() {
            if self.left > 0 {
                if std::mem::take(&mut self.channel_next) {
                    let error = if self.is_base64 { b'0' + ERROR_CHANNEL } else { ERROR_CHANNEL };
                    self.told |= self.kind == Kind::Command && byte == error;
                }
                let piece = input.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.left -= piece as u64;
                input = &input[piece..];
                continue;
            }
            self.head.push(byte);
            input = rest;
            if let Some(length) = payload(&self.head) {
                self.begin(length);
            }
        }
    }

    /// The head of a frame is whole.
    fn begin(&mut self, length: u64) {
        let [first, ..] = self.head[..] else { return };
        self.head.clear();
        self.left = length;
        match first & 0x0f {
            CLOSE => self.told = true,
            // Other control frames may come inside a message.
            opcode if opcode > CLOSE => {}
            opcode => {
                // An empty message in each channel says that it is there.
                self.channel_next = matches!(opcode, TEXT | BINARY) && length > 1;
                self.inside = first & FIN == 0;
            }
        }
    }

    /// What is to be said to a client whose connection broke off, if its end has not been told and anything can be said.
    pub(super) fn broken(&self, message: &str) -> Option<Vec<u8>> {
        if self.told || self.inside || self.left > 0 || !self.head.is_empty() {
            return None;
        }
        let mut out = Vec::new();
        if self.kind == Kind::Command {
            let status = failure(message);
            match self.is_base64 {
                true => frame(TEXT, format!("{ERROR_CHANNEL}{}", STANDARD.encode(status)).as_bytes(), &mut out),
                false => frame(BINARY, &[&[ERROR_CHANNEL], status.as_bytes()].concat(), &mut out),
            }
        }
        let reason = &message[..message.floor_char_boundary(MAX_REASON)];
        frame(CLOSE, &[&INTERNAL_ERROR.to_be_bytes(), reason.as_bytes()].concat(), &mut out);
        Some(out)
    }
}

/// The length of the payload behind a head, if that is whole (RFC 6455, 5.2).
fn payload(head: &[u8]) -> Option<u64> {
    let second = *head.get(1)?;
    let extended = match second & !MASKED {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    let mask = if second & MASKED == 0 { 0 } else { 4 };
    if head.len() < 2 + extended + mask {
        return None;
    }
    let length = head[2..2 + extended].iter().fold(0, |length, byte| length << 8 | u64::from(*byte));
    Some(if extended == 0 { u64::from(second & !MASKED) } else { length })
}

/// Appends a frame that is a whole message.
#[expect(clippy::cast_possible_truncation, reason = "each arm says how long it is")]
fn frame(opcode: u8, payload: &[u8], out: &mut Vec<u8>) {
    out.push(FIN | opcode);
    match payload.len() {
        length @ 0..126 => out.push(length as u8),
        length @ 126..0x1_0000 => {
            out.push(126);
            out.extend_from_slice(&(length as u16).to_be_bytes());
        }
        length => {
            out.push(127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(payload);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;
    use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocket, frame::coding::CloseCode};

    use super::*;

    /// The most that stands before a payload: two bytes, a length, and a mask, which a server does not use.
    const MAX_HEAD: usize = 14;

    /// What a client makes of it.
    fn read(bytes: Vec<u8>) -> Vec<Message> {
        let mut socket = WebSocket::from_raw_socket(Pipe(std::io::Cursor::new(bytes)), Role::Client, None);
        std::iter::from_fn(|| socket.read().ok()).collect()
    }

    /// What is read, and what is written goes nowhere.
    struct Pipe(std::io::Cursor<Vec<u8>>);

    impl std::io::Read for Pipe {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl std::io::Write for Pipe {
        fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
            Ok(buffer.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn message(opcode: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        frame(opcode, payload, &mut out);
        out
    }

    fn seen(kind: Kind, protocol: &str, bytes: &[u8]) -> Frames {
        let mut frames = Frames::new(kind, protocol);
        frames.see(bytes);
        frames
    }

    #[test]
    fn a_command_that_breaks_off_has_failed() {
        let mut bytes = [message(BINARY, &[1]), message(BINARY, b"\x01hello")].concat();
        bytes.extend(seen(Kind::Command, "v4.channel.k8s.io", &bytes).broken("node a is offline").unwrap());
        let messages = read(bytes);
        let [_, _, Message::Binary(status), Message::Close(Some(close))] = &messages[..] else {
            panic!("{messages:?}")
        };
        assert_eq!(status[0], ERROR_CHANNEL);
        let status: Value = serde_json::from_slice(&status[1..]).unwrap();
        assert_eq!((&status["status"], &status["message"]), (&"Failure".into(), &"node a is offline".into()));
        assert_eq!((close.code, close.reason.as_str()), (CloseCode::Error, "node a is offline"));
    }

    #[test]
    fn base64_is_told_in_base64() {
        let said = seen(Kind::Command, "v4.base64.channel.k8s.io", &[]).broken("gone").unwrap();
        let messages = read(said);
        let [Message::Text(status), Message::Close(_)] = &messages[..] else { panic!("{messages:?}") };
        let status = STANDARD.decode(status.strip_prefix('3').unwrap()).unwrap();
        assert!(String::from_utf8(status).unwrap().contains("\"gone\""));
    }

    #[test]
    fn what_has_been_told_is_not_told_again() {
        let status = message(BINARY, b"\x03{\"status\":\"Success\"}");
        assert_eq!(seen(Kind::Command, "v5.channel.k8s.io", &status).broken("gone"), None);
        let status = message(TEXT, b"3e30=");
        assert_eq!(seen(Kind::Command, "v4.base64.channel.k8s.io", &status).broken("gone"), None);
        let close = message(CLOSE, &1000_u16.to_be_bytes());
        assert_eq!(seen(Kind::PortForward, "v4.channel.k8s.io", &close).broken("gone"), None);
    }

    #[test]
    fn what_opens_a_channel_tells_nothing_of_the_end() {
        let opened = message(BINARY, &[ERROR_CHANNEL]);
        assert!(seen(Kind::Command, "v4.channel.k8s.io", &opened).broken("gone").is_some());
        // A port's own error.
        let error = message(BINARY, b"\x01refused");
        let messages = read(seen(Kind::PortForward, "v4.channel.k8s.io", &error).broken("gone").unwrap());
        assert!(matches!(&messages[..], [Message::Close(Some(_))]), "{messages:?}");
    }

    #[test]
    fn nothing_is_said_inside_a_message() {
        for part in [&b"\x82"[..], b"\x82\x05\x01abc", b"\x82\x7e\x01", b"\x02\x03\x01ab", b"\x02\x03\x01ab\x89\x00"] {
            assert_eq!(seen(Kind::Command, "v4.channel.k8s.io", part).broken("gone"), None, "{part:?}");
        }
    }

    #[test]
    fn a_long_reason_is_cut() {
        let long = "é".repeat(200);
        let messages = read(seen(Kind::PortForward, "", &[]).broken(&long).unwrap());
        let [Message::Close(Some(close))] = &messages[..] else { panic!("{messages:?}") };
        assert_eq!(close.reason.as_str(), "é".repeat(61));
    }

    proptest! {
        #[test]
        fn any_pieces_are_seen_as_the_whole(
            lengths in prop::collection::vec(prop_oneof![0_usize..300, 65_000_usize..70_000], 0..4),
            cuts in prop::collection::vec(1_usize..5000, 1..50),
            damage in prop::option::of((0_usize..1000, any::<u8>())),
        ) {
            let mut bytes: Vec<u8> = lengths.iter().flat_map(|length| message(BINARY, &vec![1; *length])).collect();
            if let Some((at, byte)) = damage && let Some(there) = bytes.get_mut(at) {
                *there = byte;
            }
            let whole = seen(Kind::Command, "v4.channel.k8s.io", &bytes);
            let mut pieces = Frames::new(Kind::Command, "v4.channel.k8s.io");
            let mut rest = &bytes[..];
            for cut in cuts.iter().cycle() {
                let (piece, after) = rest.split_at(rest.len().min(*cut));
                pieces.see(piece);
                prop_assert!(pieces.head.len() < MAX_HEAD);
                rest = after;
                if rest.is_empty() { break }
            }
            prop_assert_eq!(pieces.broken("gone"), whole.broken("gone"));
            if damage.is_none() {
                prop_assert!(whole.broken("gone").is_some());
            }
        }
    }
}
