//! As much of SPDY/3.1 as the container runtime's streaming server wants of who speaks to it: streams that are opened from here, data both
//! ways, and the end of each half. (Its WebSocket cannot end a half: `cat` would never hear that its input is over.) Pure.
//!
//! Headers are sent uncompressed, as stored blocks of the zlib stream that they have to be; those that come are not looked at. The server has no
//! flow control of its own but TCP's.

use bytes::{Buf as _, Bytes, BytesMut};

/// The longest control frame that is taken.
const MAX_CONTROL: usize = 64 << 10;
/// Data in one frame.
pub(super) const MAX_DATA: usize = 16 << 10;
const FIN: u8 = 1;
/// The beginning of a zlib stream with the dictionary of SPDY/3, which is named by its Adler-32 checksum.
const ZLIB: [u8; 6] = [0x78, 0x20, 0xe3, 0xc6, 0xa7, 0xc2];
/// An empty stored block: what came before is complete.
const SYNC: [u8; 5] = [0, 0, 0, 0xff, 0xff];

const SYN_STREAM: u16 = 1;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GO_AWAY: u16 = 7;

/// What the server said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// On a stream.
    Data(u32, Bytes),
    /// Nothing more comes on a stream.
    End(u32),
    /// A stream is over, both ways, for a reason.
    Reset(u32),
    /// To be answered with [`Writer::ping`].
    Ping(u32),
    /// It ends the session.
    GoAway,
}

/// What came is not SPDY/3.1.
#[derive(Debug, thiserror::Error)]
#[error("the container runtime sent what is not SPDY/3.1: {0}")]
pub(super) struct Malformed(&'static str);

/// Writes frames.
#[derive(Debug, Default)]
pub(super) struct Writer {
    opened: u32,
}

/// Reads frames.
#[derive(Debug, Default)]
pub(super) struct Parser {
    at: At,
}

#[derive(Clone, Copy, Debug, Default)]
enum At {
    #[default]
    Head,
    Data {
        stream: u32,
        left: usize,
        fin: bool,
    },
}

impl Writer {
    /// Opens a stream; answers with its number.
    pub(super) fn open(&mut self, headers: &[(&str, &str)], out: &mut Vec<u8>) -> u32 {
        let stream = 2 * self.opened + 1;
        self.opened += 1;
        let mut block = Vec::new();
        let mut text = |text: &str| {
            block.extend(length(text.len()).to_be_bytes());
            block.extend(text.as_bytes());
        };
        for (name, value) in headers {
            text(name);
            text(value);
        }
        let block = [&length(headers.len()).to_be_bytes()[..], &block].concat();
        let stored = u16::try_from(block.len()).unwrap_or(u16::MAX);
        let mut body = [stream.to_be_bytes(), [0; 4]].concat();
        body.extend([0; 2]);
        if stream == 1 {
            body.extend(ZLIB);
        }
        body.push(0);
        body.extend(stored.to_le_bytes());
        body.extend((!stored).to_le_bytes());
        body.extend(block);
        body.extend(SYNC);
        control(SYN_STREAM, &body, out);
        stream
    }

    /// Sends data, of which there is [`MAX_DATA`] at most.
    pub(super) fn data(stream: u32, data: &[u8], out: &mut Vec<u8>) {
        frame(stream, 0, data, out);
    }

    /// Ends this half of a stream.
    pub(super) fn end(stream: u32, out: &mut Vec<u8>) {
        frame(stream, FIN, &[], out);
    }

    /// Answers a ping.
    pub(super) fn ping(id: u32, out: &mut Vec<u8>) {
        control(PING, &id.to_be_bytes(), out);
    }
}

impl Parser {
    /// Takes the next event out of what has come; `None`: more has to come.
    pub(super) fn next(&mut self, input: &mut BytesMut) -> Result<Option<Event>, Malformed> {
        loop {
            match self.at {
                At::Data { stream, left: 0, fin } => {
                    self.at = At::Head;
                    if fin {
                        return Ok(Some(Event::End(stream)));
                    }
                }
                At::Data { .. } if input.is_empty() => return Ok(None),
                At::Data { stream, left, fin } => {
                    let piece = input.split_to(left.min(input.len()));
                    self.at = At::Data { stream, left: left - piece.len(), fin };
                    return Ok(Some(Event::Data(stream, piece.freeze())));
                }
                At::Head => {
                    let Some(head) = input.first_chunk::<8>() else { return Ok(None) };
                    let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
                    let (flags, left) = (head[4], u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize);
                    if first >> 31 == 0 {
                        input.advance(8);
                        self.at = At::Data { stream: first, left, fin: flags & FIN != 0 };
                        continue;
                    }
                    if first >> 16 != 0x8003 {
                        return Err(Malformed("another version"));
                    }
                    if left > MAX_CONTROL {
                        return Err(Malformed("a control frame that is too long"));
                    }
                    if input.len() < 8 + left {
                        return Ok(None);
                    }
                    input.advance(8);
                    let body = input.split_to(left);
                    if let Some(event) = event((first & 0xffff) as u16, flags, &body)? {
                        return Ok(Some(event));
                    }
                }
            }
        }
    }
}

fn event(kind: u16, flags: u8, body: &[u8]) -> Result<Option<Event>, Malformed> {
    const SYN_REPLY: u16 = 2;
    let number = || {
        let number = body.first_chunk::<4>().ok_or(Malformed("a control frame that is too short"))?;
        Ok(u32::from_be_bytes(*number) & (u32::MAX >> 1))
    };
    Ok(match kind {
        SYN_REPLY if flags & FIN != 0 => Some(Event::End(number()?)),
        RST_STREAM => Some(Event::Reset(number()?)),
        PING => Some(Event::Ping(body.first_chunk::<4>().map_or(0, |id| u32::from_be_bytes(*id)))),
        GO_AWAY => Some(Event::GoAway),
        _ => None,
    })
}

fn length(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

fn control(kind: u16, body: &[u8], out: &mut Vec<u8>) {
    frame(0x8003_0000 | u32::from(kind), 0, body, out);
}

fn frame(first: u32, flags: u8, body: &[u8], out: &mut Vec<u8>) {
    out.extend(first.to_be_bytes());
    out.extend((u32::from(flags) << 24 | length(body.len())).to_be_bytes());
    out.extend(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_opened_as_gos_server_reads_it() {
        let (mut writer, mut out) = (Writer::default(), Vec::new());
        assert_eq!(writer.open(&[("streamtype", "error")], &mut out), 1);
        let block = [&[0, 0, 0, 1, 0, 0, 0, 10][..], b"streamtype", &[0, 0, 0, 5], b"error"].concat();
        let stored = [&[0, 27, 0, 0xe4, 0xff][..], &block, &SYNC].concat();
        let body = [&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &ZLIB, &stored].concat();
        assert_eq!(out, [&[0x80, 3, 0, 1, 0, 0, 0, u8::try_from(body.len()).unwrap()][..], &body].concat());
        out.clear();
        assert_eq!(writer.open(&[("streamtype", "error")], &mut out), 3);
        // The zlib stream goes on.
        assert_eq!(out[18..], stored);
        assert_eq!((u16::from(ZLIB[0]) << 8 | u16::from(ZLIB[1])) % 31, 0);
    }

    #[test]
    fn frames_are_read_in_any_pieces() {
        let mut out = Vec::new();
        Writer::data(5, b"hello", &mut out);
        control(2, &[0, 0, 0, 5, 1, 2, 3], &mut out);
        Writer::ping(7, &mut out);
        Writer::end(5, &mut out);
        control(RST_STREAM, &[0, 0, 0, 3, 0, 0, 0, 1], &mut out);
        control(GO_AWAY, &[0; 8], &mut out);
        for step in 1..=out.len() {
            let (mut parser, mut input, mut data, mut events) =
                (Parser::default(), BytesMut::new(), Vec::new(), Vec::new());
            for piece in out.chunks(step) {
                input.extend_from_slice(piece);
                while let Some(event) = parser.next(&mut input).unwrap() {
                    match event {
                        Event::Data(5, piece) => data.extend_from_slice(&piece),
                        event => events.push(event),
                    }
                }
            }
            assert_eq!(data, b"hello");
            assert_eq!(events, [Event::Ping(7), Event::End(5), Event::Reset(3), Event::GoAway]);
        }
        let mut wrong = BytesMut::from(&b"HTTP/1.1 200 OK\r\n\r\n"[..]);
        wrong[0] |= 0x80;
        assert!(Parser::default().next(&mut wrong).is_err());
    }
}
