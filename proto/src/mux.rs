//! The classes of a session on a connection that has only one order: control frames, and streams of bytes of lower classes.
//!
//! What it guarantees: the highest class that can send is the one that sends, streams of one class take turns; no frame is much larger
//! than [`CUT`], so that a control frame waits for one other frame at most; a stream's bytes arrive complete and in order or the stream
//! is reset; no more is on its way than the receiver gave credit for; what waits to be sent is bounded for each stream and each class.
//! Control frames are not bounded here: who makes them looks at [`Mux::waiting`].
//!
//! The credit of a stream grows with what the line carries: a ping goes when its reader has taken something after new credit, and if that was
//! half a window by the time the answer is here, the window is what holds the sender up, and is doubled (gRPC finds its windows so). A reader
//! that is slow has taken less. This needs no clock.
//!
//! It does no IO and reads no clock: [`Mux::receive`] takes what came, [`Mux::poll`] says what that means, [`Mux::next_frame`] is what
//! to send next. A transport with an order for each class takes each from [`Mux::next_frame_of`] instead: what is said of a stream is in
//! the order of its class.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};
use prost::Message as _;

pub use self::error::{OpenError, Violation};
pub use self::id::{Class, Side, StreamId};
use self::stream::{Finish, Reset, Stream};
use crate::wire::{Frame, frame::Body};

mod error;
mod id;
mod receive;
mod send;
mod stream;
#[cfg(test)]
mod tests;

/// The most payload in one frame, in bytes: at 256 kbit/s it takes 128 ms.
pub const CUT: usize = 4 << 10;
/// Streams of one class that one side may have opened at a time.
pub const MAX_STREAMS: usize = 128;
/// The longest header of a stream, in bytes; it goes uncut.
pub const MAX_HEADER: usize = CUT;
/// The longest reason of a reset, in bytes; a longer one is cut.
pub const MAX_REASON: usize = 256;
/// What one stream may have waiting to be sent, in bytes.
pub const STREAM_BUFFER: usize = 64 << 10;
/// What all streams of one class may have waiting to be sent, in bytes. Beyond it a stream still takes one frame ([`CUT`]): those whose
/// readers have stopped would otherwise hold up all others.
pub const CLASS_BUFFER: usize = 1 << 20;
/// What a stream may have on its way and unread at the most, in bytes: at a round trip of 100 ms that is 10 MB/s.
pub const MAX_WINDOW: usize = 1 << 20;
/// What the windows of all streams of a session may have grown by, in bytes; beyond it they do not grow.
pub const MAX_GROWTH: usize = 4 << 20;
/// Tells our own pings from those of whoever sends control frames.
const PROBE: u64 = 1 << 63;

/// One side's end of a session's streams.
#[derive(Debug)]
pub struct Mux {
    side: Side,
    /// The most payload in one frame, in bytes.
    cut: usize,
    control: VecDeque<Control>,
    /// Pings and pongs, which overtake what has an order.
    urgent: VecDeque<Frame>,
    control_bytes: usize,
    control_was_last: bool,
    /// The parts of a control frame that came.
    assembly: Option<BytesMut>,
    streams: BTreeMap<StreamId, Stream>,
    classes: [Lane; Class::ALL.len()],
    /// What windows have grown by.
    growth: usize,
    /// The token of the ping whose answer is awaited: a round trip in which what is read of each stream is counted.
    probe: Option<u64>,
    probes: u64,
    /// The peer's ping that is to be answered. It has one at a time too.
    answer: Option<u64>,
    events: VecDeque<Event>,
}

/// What happened.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// A frame of the control class came.
    Control(Frame),
    /// The peer opened a stream.
    Opened {
        /// Which.
        id: StreamId,
        /// What it is for.
        header: Bytes,
    },
    /// Bytes of a stream, in order. What was done with is told by [`Mux::consumed`].
    Data(StreamId, Bytes),
    /// The peer has sent all.
    Finished(StreamId),
    /// The peer ended the stream: what it was sent may not have been read, and nothing more is taken.
    Reset(StreamId, String),
    /// A stream whose [`Mux::write`] took less than it was given has room again.
    Writable(StreamId),
}

/// What waits to be sent, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Frames of the control class.
    pub control: usize,
    /// Of these, what is left of the one that is being sent in parts.
    pub cut: usize,
    /// Data of the streams of each class, in the order of [`Class::ALL`].
    pub streams: [usize; Class::ALL.len()],
}

/// A control frame that waits.
#[derive(Debug)]
enum Control {
    Whole(Frame),
    /// What is left of the encoded frame.
    Parts(Bytes),
}

/// One class.
#[derive(Debug, Default)]
struct Lane {
    /// Streams that can send, in the order of their turns.
    ready: VecDeque<StreamId>,
    /// Streams whose credit or reset is to be sent.
    chores: VecDeque<StreamId>,
    bytes: usize,
    /// The numbers to come, ours and the peer's.
    next: [u32; 2],
}

impl Mux {
    /// Without streams.
    pub fn new(side: Side) -> Self {
        Self {
            side,
            cut: CUT,
            control: VecDeque::new(),
            urgent: VecDeque::new(),
            control_bytes: 0,
            control_was_last: false,
            assembly: None,
            streams: BTreeMap::new(),
            classes: Default::default(),
            growth: 0,
            probe: None,
            probes: 0,
            answer: None,
            events: VecDeque::new(),
        }
    }

    /// Cuts frames at so many bytes, of [`CUT`] at most: what is urgent waits for as much several times where a carrier and the system both
    /// hold frames.
    #[must_use]
    pub fn cut_at(self, bytes: usize) -> Self {
        Self { cut: bytes.min(CUT), ..self }
    }

    /// Puts a control frame behind those that wait. A ping or pong overtakes them, or a large one would delay what tells that the line
    /// is alive.
    pub fn control(&mut self, frame: Frame) {
        let length = frame.encoded_len();
        self.control_bytes += length;
        match &frame.body {
            Some(Body::Ping(_) | Body::Pong(_)) => self.urgent.push_back(frame),
            _ if length > self.cut => self.control.push_back(Control::Parts(frame.encode_to_vec().into())),
            _ => self.control.push_back(Control::Whole(frame)),
        }
    }

    /// Opens a stream.
    pub fn open(&mut self, class: Class, header: Bytes) -> Result<StreamId, OpenError> {
        if header.len() > MAX_HEADER {
            return Err(OpenError::Header(header.len()));
        }
        if self.opened_by(self.side, class) >= MAX_STREAMS {
            return Err(OpenError::TooMany);
        }
        let next = &mut self.classes[class.index()].next[self.side.index()];
        let id = StreamId::new(self.side, class, *next).ok_or(OpenError::Exhausted)?;
        *next += 1;
        self.streams.insert(id, Stream::new(class, Some(header)));
        self.schedule(id);
        Ok(id)
    }

    /// Takes as much of `data` as there is room for, and says how much that was; [`Event::Writable`] tells of room for more. Nothing is
    /// taken for a stream that was finished or reset.
    pub fn write(&mut self, id: StreamId, data: &[u8]) -> usize {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.may_write()) else { return 0 };
        let lane = &mut self.classes[id.class().index()];
        let taken = stream.room(lane.bytes).min(data.len());
        stream.buffer.extend_from_slice(&data[..taken]);
        stream.starved = taken < data.len();
        lane.bytes += taken;
        self.schedule(id);
        taken
    }

    /// Nothing more is written; what was is still sent.
    pub fn finish(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.may_write()) {
            stream.finish = Finish::Wanted;
            self.schedule(id);
        }
    }

    /// Ends the stream both ways; what waits is not sent.
    pub fn reset(&mut self, id: StreamId, reason: &str) {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.reset == Reset::No) else { return };
        if stream.header.is_some() {
            // The peer has not heard of it.
            self.remove(id);
            return;
        }
        stream.reset = Reset::Due(shortened(reason));
        self.drop_buffer(id);
        self.chore(id);
    }

    /// Nobody reads any more. A finished stream still sends what it has, and is then reset unless the peer ended too; one that is not
    /// finished is reset at once.
    pub fn abandon(&mut self, id: StreamId, reason: &str) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.finish == Finish::Wanted {
            stream.abandoned = Some(shortened(reason));
        } else {
            self.reset(id, reason);
        }
    }

    /// What happened since it was asked last, one at a time.
    pub fn poll(&mut self) -> Option<Event> {
        pop(&mut self.events)
    }

    /// What waits to be sent.
    pub fn waiting(&self) -> Waiting {
        let cut = match self.control.front() {
            Some(Control::Parts(rest)) => rest.len(),
            Some(Control::Whole(_)) | None => 0,
        };
        Waiting { control: self.control_bytes, cut, streams: self.classes.each_ref().map(|lane| lane.bytes) }
    }

    /// Whose end this is.
    pub fn side(&self) -> Side {
        self.side
    }

    /// Streams that have not ended, counting those whose end the peer has not confirmed.
    pub fn streams(&self) -> usize {
        self.streams.len()
    }

    /// Forgets every stream and every frame that waits: only control frames that come from now on are sent.
    pub fn end(&mut self) {
        for id in self.streams.keys().copied().collect::<Vec<_>>() {
            self.remove(id);
        }
        self.control.clear();
        self.urgent.clear();
        self.answer = None;
        self.control_bytes = 0;
    }

    fn is_control_empty(&self) -> bool {
        self.control.is_empty() && self.urgent.is_empty() && self.answer.is_none()
    }

    /// Of one class: what is said of streams of two has no order on some transports, and the peer may not have heard yet that one has ended.
    fn opened_by(&self, side: Side, class: Class) -> usize {
        self.streams.keys().filter(|id| (id.side(), id.class()) == (side, class)).count()
    }

    /// Gives a stream a turn if it can use one.
    fn schedule(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.is_ready
            && stream.can_send()
        {
            stream.is_ready = true;
            self.classes[id.class().index()].ready.push_back(id);
        }
    }

    fn chore(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.has_chore
        {
            stream.has_chore = true;
            self.classes[id.class().index()].chores.push_back(id);
        }
    }

    fn drop_buffer(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let dropped = std::mem::take(&mut stream.buffer).len();
        stream.starved = false;
        self.relieve(id.class(), dropped);
    }

    fn remove_if_over(&mut self, id: StreamId) {
        if self.streams.get(&id).is_some_and(Stream::is_over) {
            self.remove(id);
        }
    }

    fn remove(&mut self, id: StreamId) {
        self.drop_buffer(id);
        if let Some(stream) = self.streams.remove(&id) {
            self.growth -= stream.limit - stream.class.window();
            if stream.has_chore {
                self.classes[id.class().index()].chores.retain(|other| *other != id);
            }
            if stream.is_ready {
                self.classes[id.class().index()].ready.retain(|other| *other != id);
            }
        }
    }
}

/// The class in whose order a frame goes: `Some(None)` is control, `None` is a stream that no class has.
pub fn class_of(frame: &Frame) -> Option<Option<Class>> {
    let id = match &frame.body {
        Some(Body::StreamOpen(open)) => open.id,
        Some(Body::StreamData(data)) => data.id,
        Some(Body::StreamCredit(credit)) => credit.id,
        Some(Body::StreamReset(reset)) => reset.id,
        _ => return Some(None),
    };
    StreamId::parse(id).map(|id| Some(id.class()))
}

fn shortened(reason: &str) -> String {
    reason[..reason.floor_char_boundary(MAX_REASON)].to_owned()
}

/// Takes the first. A queue that is empty keeps no room: a cloud has many sessions, and most are idle.
fn pop<T>(queue: &mut VecDeque<T>) -> Option<T> {
    let first = queue.pop_front();
    if queue.is_empty() {
        *queue = VecDeque::new();
    }
    first
}
