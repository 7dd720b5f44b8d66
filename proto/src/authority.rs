//! Makes what gRPC clients say of a unix socket legal for HTTP/2 servers that look closely.
//!
//! grpc-go, grpc-java and Python's grpcio send the percent-encoded path of the socket as `:authority`, which h2 takes for malformed: it
//! refuses every call. Nobody reads an authority on a unix socket, so each one is replaced, on its way in, by as many `a`: a text of the
//! same length keeps the sender's and the receiver's dynamic tables (RFC 7541 section 2.3.2) alike, so no state of HPACK's is needed here.
//! Everything else goes through as it came, also what is malformed: h2 says so.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Of a connection, before its first frame (RFC 9113 section 3.4).
const PREFACE: usize = 24;
/// Of a frame (RFC 9113 section 4.1).
const HEAD: usize = 9;
/// The most payload of a frame, unless agreed otherwise, which h2's server does not.
const MAX_FRAME: usize = 16 << 10;
/// Of a header block with its frames; a longer one goes through as it is.
const MAX_BLOCK: usize = 64 << 10;
/// What is read at once.
const READ: usize = 16 << 10;

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

const NAME: &[u8] = b":authority";
/// [`NAME`] in HPACK's Huffman code.
const NAME_CODED: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
/// Index of `:authority` in HPACK's static table.
const NAME_INDEX: usize = 1;
/// How many symbols of HPACK's Huffman code (RFC 7541 appendix B) have a code of so many bits. The code is canonical: this is all of it that
/// it takes to count the symbols of a text.
const CODES: [u32; 31] =
    [0, 0, 0, 0, 0, 10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19, 29, 0, 4];

/// A stream of a client whose requests get a legal authority.
#[derive(Debug)]
pub struct Legal<T> {
    inner: T,
    rewriter: Rewriter,
    /// What is ready to be read, from `at` on.
    ready: Vec<u8>,
    at: usize,
}

impl<T> Legal<T> {
    /// Of a connection that was accepted, before anything is read from it.
    pub fn new(inner: T) -> Self {
        Self { inner, rewriter: Rewriter::default(), ready: Vec::new(), at: 0 }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Legal<T> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.at == this.ready.len() {
            (this.at, this.ready) = (0, Vec::new());
            let mut bytes = [0; READ];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.inner).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                // The end, in the middle of a block or not.
                return Poll::Ready(Ok(()));
            }
            this.rewriter.take(read.filled(), &mut this.ready);
        }
        let rest = &this.ready[this.at..];
        let count = rest.len().min(out.remaining());
        out.put_slice(&rest[..count]);
        this.at += count;
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Legal<T> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(context)
    }
}

impl<T: tonic::transport::server::Connected> tonic::transport::server::Connected for Legal<T> {
    type ConnectInfo = T::ConnectInfo;

    fn connect_info(&self) -> T::ConnectInfo {
        self.inner.connect_info()
    }
}

/// Where in a client's bytes it is.
#[derive(Debug)]
struct Rewriter {
    /// Bytes that go through before the next head of a frame.
    through: usize,
    /// The head of a frame as far as it came; of a header block, all of its frames.
    held: Vec<u8>,
    /// Where in `held` the frame begins that is being read.
    frame: usize,
}

impl Default for Rewriter {
    fn default() -> Self {
        Self { through: PREFACE, held: Vec::new(), frame: 0 }
    }
}

impl Rewriter {
    /// Takes what came, and gives what can go on.
    fn take(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        while !bytes.is_empty() {
            if self.through > 0 {
                let (now, later) = bytes.split_at(self.through.min(bytes.len()));
                out.extend_from_slice(now);
                self.through -= now.len();
                bytes = later;
                continue;
            }
            let have = self.held.len() - self.frame;
            let wanted = match head(&self.held[self.frame..]) {
                Some((length, ..)) => HEAD + length,
                None => HEAD,
            };
            let (now, later) = bytes.split_at((wanted - have).min(bytes.len()));
            self.held.extend_from_slice(now);
            bytes = later;
            self.step(out);
        }
    }

    /// Looks at the frame that has come so far.
    fn step(&mut self, out: &mut Vec<u8>) {
        let Some((length, kind, flags)) = head(&self.held[self.frame..]) else { return };
        let goes_on = self.frame > 0;
        if kind != if goes_on { CONTINUATION } else { HEADERS } || self.frame + length > MAX_BLOCK {
            // Nothing of ours; or an error of the client's, which h2 tells it.
            self.through = HEAD + length - (self.held.len() - self.frame);
            self.give(out);
            return;
        }
        if self.held.len() - self.frame < HEAD + length {
            return;
        }
        if flags & END_HEADERS == 0 {
            self.frame = self.held.len();
            return;
        }
        match rewritten(&self.held) {
            Some(frame) => {
                out.extend_from_slice(&frame);
                self.held.clear();
                self.frame = 0;
            }
            None => self.give(out),
        }
    }

    fn give(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.held);
        self.frame = 0;
    }
}

/// Length of the payload, kind and flags of a frame.
fn head(bytes: &[u8]) -> Option<(usize, u8, u8)> {
    let head = bytes.get(..HEAD)?;
    let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
    Some((length, head[3], head[4]))
}

/// One HEADERS frame for the frames of a block, with a legal authority; `None` if they can stay, or are beyond understanding.
fn rewritten(frames: &[u8]) -> Option<Vec<u8>> {
    let mut block = Vec::with_capacity(frames.len());
    let (mut rest, mut first) = (frames, None);
    while !rest.is_empty() {
        let (length, kind, flags) = head(rest)?;
        let mut payload = rest.get(HEAD..HEAD + length)?;
        if kind == HEADERS {
            if flags & PADDED != 0 {
                let (&padding, after) = payload.split_first()?;
                payload = after.get(..after.len().checked_sub(padding.into())?)?;
            }
            if flags & PRIORITY != 0 {
                payload = payload.get(5..)?;
            }
            first = Some((flags, rest.get(5..HEAD)?));
        }
        block.extend_from_slice(payload);
        rest = &rest[HEAD + length..];
    }
    let (flags, stream) = first?;
    let block = legal(&block)?;
    if block.len() > MAX_FRAME {
        return None;
    }
    let mut frame = Vec::with_capacity(HEAD + block.len());
    frame.extend_from_slice(&u32::try_from(block.len()).ok()?.to_be_bytes()[1..]);
    frame.extend_from_slice(&[HEADERS, flags & !(PADDED | PRIORITY) | END_HEADERS]);
    frame.extend_from_slice(stream);
    frame.extend_from_slice(&block);
    Some(frame)
}

/// A header block (RFC 7541 section 6) with each authority that is spelled out replaced; `None` if there is none, or it is malformed.
fn legal(block: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(block.len());
    let (mut rest, mut found) = (block, false);
    while let Some(&first) = rest.first() {
        let before = rest;
        let bits = match first {
            // Indexed; a change of the table's size.
            0x80.. => 7,
            0x20..0x40 => 5,
            // Literals.
            0x40..0x80 => 6,
            0..0x20 => 4,
        };
        let index = number(&mut rest, bits)?;
        if matches!(first, 0x80.. | 0x20..0x40) {
            out.extend_from_slice(&before[..before.len() - rest.len()]);
            continue;
        }
        let is_authority = match index {
            0 => {
                let (coded, name) = text(&mut rest)?;
                name == if coded { NAME_CODED } else { NAME }
            }
            index => index == NAME_INDEX,
        };
        out.extend_from_slice(&before[..before.len() - rest.len()]);
        let value = rest;
        let (coded, bytes) = text(&mut rest)?;
        if is_authority {
            found = true;
            replacement(coded, if coded { symbols(bytes) } else { bytes.len() }, &mut out);
        } else {
            out.extend_from_slice(&value[..value.len() - rest.len()]);
        }
    }
    found.then_some(out)
}

/// An integer (RFC 7541 section 5.1).
fn number(rest: &mut &[u8], bits: u32) -> Option<usize> {
    let (&first, mut after) = rest.split_first()?;
    let most = (1_usize << bits) - 1;
    let mut value = usize::from(first) & most;
    if value == most {
        let mut shift = 0;
        loop {
            let (&byte, left) = after.split_first()?;
            after = left;
            value = value.checked_add(usize::from(byte & 0x7f) << shift)?;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
            if shift > 21 {
                return None;
            }
        }
    }
    *rest = after;
    Some(value)
}

fn put_number(value: usize, bits: u32, first: u8, out: &mut Vec<u8>) {
    let most = (1_usize << bits) - 1;
    let low = |value: usize| u8::try_from(value & 0xff).unwrap_or(0);
    if value < most {
        return out.push(first | low(value));
    }
    out.push(first | low(most));
    let mut value = value - most;
    while value >= 0x80 {
        out.push(low(value & 0x7f) | 0x80);
        value >>= 7;
    }
    out.push(low(value));
}

/// A text (RFC 7541 section 5.2): whether it is Huffman-coded, and its bytes.
fn text<'a>(rest: &mut &'a [u8]) -> Option<(bool, &'a [u8])> {
    let coded = rest.first()? & 0x80 != 0;
    let length = number(rest, 7)?;
    let (text, after) = (rest.get(..length)?, rest.get(length..)?);
    *rest = after;
    Some((coded, text))
}

/// How many symbols a Huffman-coded text has; what is left of the last byte is no symbol.
fn symbols(coded: &[u8]) -> usize {
    let (mut count, mut code, mut first, mut length) = (0, 0_u64, 0_u64, 0_usize);
    for byte in coded {
        for bit in (0..8).rev() {
            (code, first) = (code << 1 | u64::from(byte >> bit & 1), first << 1);
            length += 1;
            let codes = u64::from(CODES.get(length).copied().unwrap_or(1));
            if length >= CODES.len() || code - first < codes {
                count += 1;
                (code, first, length) = (0, 0, 0);
            } else {
                first += codes;
            }
        }
    }
    count
}

/// So many `a`, coded as the text was, so that the block does not grow: the code of `a` is one of the shortest.
fn replacement(coded: bool, symbols: usize, out: &mut Vec<u8>) {
    if !coded {
        put_number(symbols, 7, 0, out);
        out.resize(out.len() + symbols, b'a');
        return;
    }
    put_number((symbols * 5).div_ceil(8), 7, 0x80, out);
    let (mut bits, mut count) = (0_u32, 0);
    for _ in 0..symbols {
        (bits, count) = ((bits << 5 | 0b00011) & 0xffff, count + 5);
        if count >= 8 {
            count -= 8;
            out.push(u8::try_from(bits >> count & 0xff).unwrap_or(0));
        }
    }
    if count > 0 {
        // Filled up with ones.
        out.push(u8::try_from((bits << (8 - count) | 0xff >> count) & 0xff).unwrap_or(0));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
        frame.extend_from_slice(&[kind, flags, 0, 0, 0, 1]);
        frame.extend_from_slice(payload);
        frame
    }

    fn through(frames: &[u8], cut: usize) -> Vec<u8> {
        let mut bytes = vec![b'p'; PREFACE];
        bytes.extend_from_slice(frames);
        let (mut rewriter, mut out) = (Rewriter::default(), Vec::new());
        for piece in bytes.chunks(cut.max(1)) {
            rewriter.take(piece, &mut out);
        }
        assert_eq!(out[..PREFACE], [b'p'; PREFACE]);
        out.split_off(PREFACE)
    }

    /// `:authority: %2Frun`, by index and by name, and what else requests have.
    fn block(authority: &[u8]) -> Vec<u8> {
        let mut block = vec![0x83, 0x86];
        block.extend_from_slice(authority);
        block.extend_from_slice(b"\x40\x02te\x08trailers");
        block
    }

    #[test]
    fn an_authority_becomes_a_legal_one_of_the_same_length() {
        let by_index = block(b"\x41\x06%2Frun");
        let by_name = block(b"\x40\x0a:authority\x06%2Frun");
        for cut in [1, 7, 1000] {
            assert_eq!(through(&frame(HEADERS, 5, &by_index), cut), frame(HEADERS, 5, &block(b"\x41\x06aaaaaa")));
            let named = block(b"\x40\x0a:authority\x06aaaaaa");
            assert_eq!(through(&frame(HEADERS, 5, &by_name), cut), frame(HEADERS, 5, &named));
            // In two frames, with padding and a priority: they become one.
            let mut first = vec![3, 0, 0, 0, 0, 16];
            first.extend_from_slice(&by_index[..5]);
            first.extend_from_slice(&[0; 3]);
            let mut frames = frame(HEADERS, PADDED | PRIORITY | 1, &first);
            frames.extend_from_slice(&frame(CONTINUATION, END_HEADERS, &by_index[5..]));
            frames.extend_from_slice(&frame(0, 1, b"data"));
            let mut whole = frame(HEADERS, 5, &block(b"\x41\x06aaaaaa"));
            whole.extend_from_slice(&frame(0, 1, b"data"));
            assert_eq!(through(&frames, cut), whole);
        }
    }

    #[test]
    fn a_coded_authority_is_counted_and_replaced_in_code() {
        // `www.example.com`, from RFC 7541 C.4.1: 15 symbols in 12 bytes.
        let coded = [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];
        assert_eq!(symbols(&coded), 15);
        assert_eq!(symbols(NAME_CODED), NAME.len());
        // `custom-value` and a date, from C.6.1: codes of many lengths.
        assert_eq!(symbols(&[0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xb8, 0xe8, 0xb4, 0xbf]), 12);
        let mut out = Vec::new();
        replacement(true, 15, &mut out);
        assert_eq!(out[0], 0x80 | 10);
        assert_eq!(symbols(&out[1..]), 15);
    }

    #[test]
    fn what_is_not_understood_goes_through() {
        for bytes in
            [frame(HEADERS, 5, &[0x41, 0x7f]), frame(HEADERS, 5, &[0x84]), frame(CONTINUATION, 4, b"\x41\x01%")]
        {
            assert_eq!(through(&bytes, 3), bytes);
        }
        let long =
            [frame(HEADERS, 1, &[0x84; 1000]), frame(CONTINUATION, 0, &vec![0x84; MAX_BLOCK]), frame(0, 0, b"x")]
                .concat();
        assert_eq!(through(&long, 4096), long);
    }

    proptest! {
        #[test]
        fn any_bytes_pass_whole_and_however_they_are_cut(bytes in proptest::collection::vec(any::<u8>(), 0..400), cut in 1..50_usize) {
            prop_assert_eq!(through(&bytes, cut), through(&bytes, 1000));
        }

        #[test]
        fn any_block_keeps_its_decoded_lengths(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(out) = legal(&bytes) {
                prop_assert!(out.len() <= bytes.len() + 8);
                let again = legal(&out);
                prop_assert_eq!(again, Some(out));
            }
        }
    }
}
