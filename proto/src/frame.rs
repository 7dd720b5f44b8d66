//! Decoding a frame that a peer sent, in memory that its length bounds.
//!
//! A row of an inventory takes two bytes on the wire and fifty in memory: who sends nothing but empty ones makes a frame of the largest
//! size take hundreds of megabytes. So the fields are counted before anything is made of them.

use bytes::Bytes;
#[cfg(any(feature = "transport", test))]
use bytes::{Buf as _, BytesMut};
use prost::Message as _;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use crate::sync::{MAX_FRAME, MAX_INVENTORY};
use crate::wire::Frame;

/// The most fields that what a frame holds may have: an inventory's rows are most of them. A larger inventory comes in several frames.
const MAX_FIELDS: usize = MAX_INVENTORY + 64;
/// The most that the length in front of a frame takes.
#[cfg(any(feature = "transport", test))]
const MAX_VARINT: usize = 10;

/// Why bytes are no frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Larger than [`MAX_FRAME`].
    #[error("its {0} bytes are more than {MAX_FRAME}")]
    TooLarge(usize),
    /// Longer than one that comes this way may be.
    #[error("its {0} bytes are more than {1}")]
    Longer(usize, usize),
    /// More of them than a frame has a use for.
    #[error("it has more than {MAX_FIELDS} fields")]
    TooMany,
    /// No protobuf, or another message.
    #[error(transparent)]
    Malformed(#[from] prost::DecodeError),
}

/// Reads a frame. Its payloads share the memory of `bytes`.
pub fn decode(bytes: Bytes) -> Result<Frame, FrameError> {
    if bytes.len() > MAX_FRAME {
        return Err(FrameError::TooLarge(bytes.len()));
    }
    // Two bytes are the least that a field takes.
    if bytes.len() > 2 * MAX_FIELDS {
        count_fields(&bytes)?;
    }
    Ok(Frame::decode(bytes)?)
}

/// Frames that follow each other, each behind its length as a varint.
#[cfg(any(feature = "transport", test))]
#[derive(Debug, Default)]
pub struct Lane {
    unread: BytesMut,
}

#[cfg(any(feature = "transport", test))]
impl Lane {
    /// This came.
    pub fn hear(&mut self, bytes: &[u8]) {
        self.unread.extend_from_slice(bytes);
    }

    /// Nothing more has come for now: what is empty keeps no room.
    pub fn rest(&mut self) {
        if self.unread.is_empty() {
            self.unread = BytesMut::new();
        }
    }

    /// The next frame that is complete, and how many bytes it took. No more than the `longest` one is waited for.
    pub fn take(&mut self, longest: usize) -> Result<Option<(Frame, usize)>, FrameError> {
        let mut rest = &self.unread[..];
        let length = match prost::decode_length_delimiter(&mut rest) {
            Ok(length) => length,
            Err(_) if self.unread.len() < MAX_VARINT => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if length > longest {
            return Err(FrameError::Longer(length, longest));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let head = self.unread.len() - rest.len();
        self.unread.advance(head);
        let bytes = self.unread.split_to(length).freeze();
        decode(bytes).map(|frame| Some((frame, head + length)))
    }
}

/// Counts the fields of the frame, and of each message in it. Every one counts, also if it is given twice.
fn count_fields(mut frame: &[u8]) -> Result<(), FrameError> {
    let mut fields = 0;
    while !frame.is_empty() {
        let (tag, kind) = decode_key(&mut frame)?;
        if kind != WireType::LengthDelimited {
            skip_field(kind, tag, &mut frame, DecodeContext::default())?;
            continue;
        }
        let length = usize::try_from(decode_varint(&mut frame)?).unwrap_or(usize::MAX);
        let Some((mut body, rest)) = frame.split_at_checked(length) else {
            // Decoding says what is wrong.
            return Ok(());
        };
        frame = rest;
        while !body.is_empty() {
            let (tag, kind) = decode_key(&mut body)?;
            skip_field(kind, tag, &mut body, DecodeContext::default())?;
            fields += 1;
            if fields > MAX_FIELDS {
                return Err(FrameError::TooMany);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{self, frame::Body};

    fn inventory(rows: usize) -> Bytes {
        let entries = vec![wire::Entry::default(); rows];
        Frame { body: Some(Body::Inventory(wire::Inventory { entries, ..Default::default() })) }.encode_to_vec().into()
    }

    #[test]
    fn rows_of_nothing_are_counted_before_they_are_made() {
        assert!(decode(inventory(MAX_INVENTORY)).is_ok());
        assert!(matches!(decode(inventory(MAX_INVENTORY + 100)), Err(FrameError::TooMany)));
        let mut twice = inventory(MAX_INVENTORY / 2 + 100).to_vec();
        twice.extend_from_slice(&twice.clone());
        assert!(matches!(decode(twice.into()), Err(FrameError::TooMany)));
        assert!(matches!(decode(vec![0; MAX_FRAME + 1].into()), Err(FrameError::TooLarge(_))));
        assert!(decode(vec![0xff; 50_000].into()).is_err());
    }

    #[test]
    fn what_is_large_and_no_list_passes() {
        let full = Bytes::from(vec![7; MAX_FRAME - 100]);
        let frame = Frame { body: Some(Body::Upsert(wire::Upsert { full, ..Default::default() })) };
        assert_eq!(decode(frame.encode_to_vec().into()).unwrap(), frame);
    }
}
