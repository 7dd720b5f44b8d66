//! What can be wrong with streams: on our side, and on the peer's.

use super::{MAX_HEADER, MAX_STREAMS, MAX_WINDOW, StreamId};
use crate::sync::MAX_FRAME;

/// Why a stream cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// [`MAX_STREAMS`].
    #[error("{MAX_STREAMS} streams of the class are open already")]
    TooMany,
    /// [`MAX_HEADER`].
    #[error("a header of {0} bytes is longer than {MAX_HEADER}")]
    Header(usize),
    /// So many streams in one session, that their numbers are used up.
    #[error("this session can open no more streams")]
    Exhausted,
}

/// How the peer broke the protocol: the session has to end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// An id without a class, or of the other side's.
    #[error("stream {0} cannot be opened: its id belongs to the other side or to no class")]
    Id(u32),
    /// An id that was used before.
    #[error("stream {0} is opened a second time")]
    Reused(StreamId),
    /// [`MAX_STREAMS`].
    #[error("more than {MAX_STREAMS} streams of one class at a time")]
    TooMany,
    /// [`MAX_HEADER`].
    #[error("stream {0} has a header of {1} bytes where {MAX_HEADER} are allowed")]
    Header(StreamId, usize),
    /// Something of a stream that was never opened.
    #[error("a frame of stream {0}, which was never opened")]
    Unknown(u32),
    /// Data behind the last.
    #[error("data of stream {0}, which the sender had ended")]
    Ended(StreamId),
    /// A frame without data that is not the last one.
    #[error("a frame of stream {0} without data")]
    Empty(StreamId),
    /// More than there was credit for.
    #[error("{bytes} bytes of stream {id} where {credit} were allowed")]
    Overrun {
        /// The stream.
        id: StreamId,
        /// What came.
        bytes: usize,
        /// What might have come.
        credit: usize,
    },
    /// More credit at a time than [`MAX_WINDOW`].
    #[error("credit of {1} bytes for stream {0}, which makes more than {MAX_WINDOW}")]
    Credit(StreamId, u32),
    /// A control frame between the parts of another.
    #[error("a control frame between the parts of another")]
    Interleaved,
    /// A control frame that is larger than [`MAX_FRAME`] when put together.
    #[error("a control frame in parts is larger than {MAX_FRAME} bytes")]
    TooLarge,
    /// Parts that are not a control frame when put together.
    #[error("what came in parts is not a control frame")]
    Malformed,
}
