//! The state of one stream.

use bytes::{Bytes, BytesMut};

use super::{CLASS_BUFFER, CUT, Class, STREAM_BUFFER};

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) class: Class,
    /// To be sent before anything else: the peer has not heard of the stream.
    pub(super) header: Option<Bytes>,
    pub(super) buffer: BytesMut,
    /// What we may send.
    pub(super) credit: usize,
    pub(super) finish: Finish,
    /// A write took less than it was given.
    pub(super) starved: bool,
    /// It is in its class's queue of turns.
    pub(super) is_ready: bool,
    /// What the peer may send.
    pub(super) window: usize,
    /// What came and was not consumed.
    pub(super) unread: usize,
    /// What may be on its way and unread together.
    pub(super) limit: usize,
    /// It is to be fitted to what is read within a round trip.
    pub(super) measure: bool,
    /// What was read since the last round trip of that kind began.
    pub(super) taken: usize,
    /// It is in the queue of chores.
    pub(super) has_chore: bool,
    /// The peer sends nothing more.
    pub(super) ended: bool,
    /// Nobody reads: the reset that follows our last data.
    pub(super) abandoned: Option<String>,
    pub(super) reset: Reset,
}

/// Whether our last data went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    No,
    Wanted,
    Sent,
}

/// Whether our reset went; the peer's is [`Stream::ended`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reset {
    No,
    Due(String),
    Sent,
}

impl Stream {
    pub(super) fn new(class: Class, header: Option<Bytes>) -> Self {
        Self {
            class,
            header,
            buffer: BytesMut::new(),
            credit: class.window(),
            finish: Finish::No,
            starved: false,
            is_ready: false,
            window: class.window(),
            unread: 0,
            limit: class.window(),
            measure: false,
            taken: 0,
            has_chore: false,
            ended: false,
            abandoned: None,
            reset: Reset::No,
        }
    }

    pub(super) fn may_write(&self) -> bool {
        self.reset == Reset::No && self.finish == Finish::No
    }

    /// What more it takes while its class has so many bytes waiting.
    pub(super) fn room(&self, waiting: usize) -> usize {
        let frame = CUT.saturating_sub(self.buffer.len());
        (STREAM_BUFFER - self.buffer.len()).min(CLASS_BUFFER.saturating_sub(waiting).max(frame))
    }

    pub(super) fn can_send(&self) -> bool {
        let has_data = !self.buffer.is_empty() && self.credit > 0;
        let has_end = self.buffer.is_empty() && self.finish == Finish::Wanted;
        self.reset == Reset::No && (self.header.is_some() || has_data || has_end)
    }

    /// What more the peer may send, and has not been told of.
    pub(super) fn owed(&self) -> usize {
        self.limit.saturating_sub(self.window + self.unread)
    }

    /// Half a window at a time: credit for every few bytes would cost more than the bytes.
    pub(super) fn owes(&self) -> bool {
        self.reset == Reset::No && !self.ended && self.owed() * 2 >= self.limit
    }

    /// Neither side has anything more to say of it.
    pub(super) fn is_over(&self) -> bool {
        match self.reset {
            Reset::No => self.finish == Finish::Sent && self.ended,
            Reset::Due(_) => false,
            Reset::Sent => self.ended,
        }
    }
}
