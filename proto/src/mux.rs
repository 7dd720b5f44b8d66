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
use crate::frame;
use crate::sync::MAX_FRAME;
use crate::wire::{self, Frame, frame::Body};

mod error;
mod id;
mod stream;
#[cfg(test)]
mod tests;

/// The most payload in one frame, in bytes: at 256 kbit/s it takes 128 ms.
pub const CUT: usize = 4 << 10;
/// Streams that one side may have opened at a time.
pub const MAX_STREAMS: usize = 128;
/// The longest header of a stream, in bytes.
pub const MAX_HEADER: usize = CUT;
/// The longest reason of a reset, in bytes; a longer one is cut.
pub const MAX_REASON: usize = 256;
/// What one stream may have waiting to be sent, in bytes.
pub const STREAM_BUFFER: usize = 64 << 10;
/// What all streams of one class may have waiting to be sent, in bytes.
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

    /// Puts a control frame behind those that wait. A ping or pong overtakes them, or a large one would delay what tells that the line
    /// is alive.
    pub fn control(&mut self, frame: Frame) {
        let length = frame.encoded_len();
        self.control_bytes += length;
        match &frame.body {
            Some(Body::Ping(_) | Body::Pong(_)) => self.urgent.push_back(frame),
            _ if length > CUT => self.control.push_back(Control::Parts(frame.encode_to_vec().into())),
            _ => self.control.push_back(Control::Whole(frame)),
        }
    }

    /// Opens a stream.
    pub fn open(&mut self, class: Class, header: Bytes) -> Result<StreamId, OpenError> {
        if header.len() > MAX_HEADER {
            return Err(OpenError::Header(header.len()));
        }
        if self.opened_by(self.side) >= MAX_STREAMS {
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
        let room = (STREAM_BUFFER - stream.buffer.len()).min(CLASS_BUFFER - lane.bytes);
        let taken = room.min(data.len());
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

    /// So many bytes of [`Event::Data`] are done with: the peer may send as many more.
    pub fn consumed(&mut self, id: StreamId, bytes: usize) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.unread -= bytes.min(stream.unread);
        if stream.measure && self.probe.is_none() {
            self.streams.values_mut().for_each(|stream| stream.taken = 0);
            self.probes += 1;
            let token = PROBE | self.probes;
            self.probe = Some(token);
            self.control(Frame { body: Some(Body::Ping(wire::Ping { token })) });
        }
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.taken += bytes;
        if stream.owes() {
            self.chore(id);
        }
    }

    /// Takes a frame of the peer's. After a violation the session has to end.
    pub fn receive(&mut self, frame: Frame) -> Result<(), Violation> {
        match frame.body {
            Some(Body::StreamOpen(open)) => self.opened(open),
            Some(Body::StreamData(data)) => self.data(data),
            Some(Body::StreamCredit(credit)) => self.credit(&credit),
            Some(Body::StreamReset(reset)) => self.was_reset(&reset),
            Some(Body::ControlPart(part)) => self.part(&part),
            Some(Body::Ping(ping)) if ping.token & PROBE != 0 => {
                self.answer = Some(ping.token);
                Ok(())
            }
            Some(Body::Pong(pong)) if pong.token & PROBE != 0 => {
                self.measured(pong.token);
                Ok(())
            }
            body => {
                let overtakes = matches!(body, None | Some(Body::Ping(_) | Body::Pong(_) | Body::Goodbye(_)));
                if self.assembly.is_some() && !overtakes {
                    return Err(Violation::Interleaved);
                }
                self.events.push_back(Event::Control(Frame { body }));
                Ok(())
            }
        }
    }

    /// What happened since it was asked last, one at a time.
    pub fn poll(&mut self) -> Option<Event> {
        pop(&mut self.events)
    }

    /// The next frame to send; taken is sent. [`Event::Writable`] may follow from it.
    pub fn next_frame(&mut self) -> Option<Frame> {
        // Credit and resets come between two control frames: they are small and few, and neither may keep the other from going.
        if (self.control_was_last || self.is_control_empty())
            && let Some(body) = Class::ALL.into_iter().find_map(|class| self.next_chore(class))
        {
            self.control_was_last = false;
            return Some(Frame { body: Some(body) });
        }
        if let Some(frame) = self.next_control() {
            self.control_was_last = true;
            return Some(frame);
        }
        let body = Class::ALL.into_iter().find_map(|class| self.next_of(class));
        self.control_was_last = false;
        body.map(|body| Frame { body: Some(body) })
    }

    /// The next frame to send of one class, or of control where that is `None`.
    pub fn next_frame_of(&mut self, class: Option<Class>) -> Option<Frame> {
        let Some(class) = class else { return self.next_control() };
        let body = self.next_chore(class).or_else(|| self.next_of(class))?;
        Some(Frame { body: Some(body) })
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

    fn next_control(&mut self) -> Option<Frame> {
        if let Some(token) = self.answer.take() {
            return Some(Frame { body: Some(Body::Pong(wire::Pong { token })) });
        }
        if let Some(frame) = pop(&mut self.urgent) {
            self.control_bytes -= frame.encoded_len();
            return Some(frame);
        }
        match pop(&mut self.control)? {
            Control::Whole(frame) => {
                self.control_bytes -= frame.encoded_len();
                Some(frame)
            }
            Control::Parts(mut rest) => {
                let data = rest.split_to(CUT.min(rest.len()));
                let last = rest.is_empty();
                self.control_bytes -= data.len();
                if !last {
                    self.control.push_front(Control::Parts(rest));
                }
                Some(Frame { body: Some(Body::ControlPart(wire::ControlPart { data, last })) })
            }
        }
    }

    fn next_chore(&mut self, class: Class) -> Option<Body> {
        let id = self.classes[class.index()].chores.pop_front()?;
        // Whatever is removed is taken out of the queue.
        let stream = self.streams.get_mut(&id)?;
        stream.has_chore = false;
        if let Reset::Due(reason) = &mut stream.reset {
            let reason = std::mem::take(reason);
            stream.reset = Reset::Sent;
            self.remove_if_over(id);
            return Some(Body::StreamReset(wire::StreamReset { id: id.into(), reason }));
        }
        let bytes = stream.owed();
        stream.window += bytes;
        stream.measure = true;
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        Some(Body::StreamCredit(wire::StreamCredit { id: id.into(), bytes }))
    }

    /// A round trip is over: windows are fitted to what was read in it.
    fn measured(&mut self, token: u64) {
        if self.probe.take_if(|probe| *probe == token).is_none() {
            return;
        }
        let mut owing = Vec::new();
        for (id, stream) in self.streams.iter_mut().filter(|(_, stream)| stream.measure) {
            stream.measure = false;
            if stream.taken * 2 >= stream.limit {
                let more = stream.limit.min(MAX_WINDOW - stream.limit).min(MAX_GROWTH - self.growth);
                self.growth += more;
                stream.limit += more;
                stream.measure = more > 0;
            } else if stream.taken * 4 >= stream.limit {
                // It may have begun in the middle of what came at once: once more, from the beginning of what comes next.
                stream.measure = true;
            } else if stream.taken * 8 < stream.limit {
                // Not what the peer was told of already.
                let less = (stream.limit / 2).min(stream.limit - stream.class.window()).min(stream.owed());
                self.growth -= less;
                stream.limit -= less;
            }
            if stream.owes() {
                owing.push(*id);
            }
        }
        for id in owing {
            self.chore(id);
        }
    }

    fn next_of(&mut self, class: Class) -> Option<Body> {
        let lane = &mut self.classes[class.index()];
        loop {
            let id = lane.ready.pop_front()?;
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.is_ready = false;
            if !stream.can_send() {
                continue;
            }
            if let Some(header) = stream.header.take() {
                self.schedule(id);
                return Some(Body::StreamOpen(wire::StreamOpen { id: id.into(), header }));
            }
            let data = stream.buffer.split_to(CUT.min(stream.credit).min(stream.buffer.len())).freeze();
            stream.credit -= data.len();
            let fin = stream.finish == Finish::Wanted && stream.buffer.is_empty();
            if fin {
                stream.finish = Finish::Sent;
            }
            let was_full = lane.bytes >= CLASS_BUFFER;
            lane.bytes -= data.len();
            if std::mem::take(&mut stream.starved) {
                self.events.push_back(Event::Writable(id));
            }
            if was_full {
                self.relieve(class);
            }
            self.schedule(id);
            if fin {
                self.finished(id);
            }
            return Some(Body::StreamData(wire::StreamData { id: id.into(), data, fin }));
        }
    }

    /// Our last data went.
    fn finished(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if let Some(reason) = stream.abandoned.take()
            && !stream.ended
        {
            self.reset(id, &reason);
        } else {
            self.remove_if_over(id);
        }
    }

    /// A class has room again.
    fn relieve(&mut self, class: Class) {
        for (id, stream) in self.streams.iter_mut().filter(|(id, _)| id.class() == class) {
            if stream.starved && stream.buffer.len() < STREAM_BUFFER {
                stream.starved = false;
                self.events.push_back(Event::Writable(*id));
            }
        }
    }

    fn opened(&mut self, open: wire::StreamOpen) -> Result<(), Violation> {
        let peer = self.side.other();
        let id = StreamId::parse(open.id).filter(|id| id.side() == peer).ok_or(Violation::Id(open.id))?;
        let next = &mut self.classes[id.class().index()].next[peer.index()];
        if id.number() < *next {
            return Err(Violation::Reused(id));
        }
        // Numbers may be left out: of streams that were reset before they were told of.
        *next = id.number() + 1;
        if open.header.len() > MAX_HEADER {
            return Err(Violation::Header(id, open.header.len()));
        }
        if self.opened_by(peer) >= MAX_STREAMS {
            return Err(Violation::TooMany);
        }
        self.streams.insert(id, Stream::new(id.class(), None));
        self.events.push_back(Event::Opened { id, header: open.header });
        Ok(())
    }

    fn data(&mut self, wire::StreamData { id, data, fin }: wire::StreamData) -> Result<(), Violation> {
        let id = self.known(id)?;
        let stream = self.streams.get_mut(&id).filter(|stream| !stream.ended).ok_or(Violation::Ended(id))?;
        if data.is_empty() && !fin {
            return Err(Violation::Empty(id));
        }
        if data.len() > stream.window {
            return Err(Violation::Overrun { id, bytes: data.len(), credit: stream.window });
        }
        stream.window -= data.len();
        stream.unread += data.len();
        stream.ended = fin;
        // On its way when we reset, or when the reader left.
        if stream.reset == Reset::No && stream.abandoned.is_none() {
            if !data.is_empty() {
                self.events.push_back(Event::Data(id, data));
            }
            if fin {
                self.events.push_back(Event::Finished(id));
            }
        }
        self.remove_if_over(id);
        Ok(())
    }

    fn credit(&mut self, credit: &wire::StreamCredit) -> Result<(), Violation> {
        let id = self.known(credit.id)?;
        // It may have crossed the end.
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        let bytes = usize::try_from(credit.bytes).unwrap_or(usize::MAX);
        if bytes > MAX_WINDOW - stream.credit {
            return Err(Violation::Credit(id, credit.bytes));
        }
        stream.credit += bytes;
        self.schedule(id);
        Ok(())
    }

    fn was_reset(&mut self, reset: &wire::StreamReset) -> Result<(), Violation> {
        let id = self.known(reset.id)?;
        // It may have crossed the end.
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        stream.ended = true;
        if stream.reset == Reset::No {
            self.events.push_back(Event::Reset(id, shortened(&reset.reason)));
            if stream.finish != Finish::Sent {
                stream.reset = Reset::Due(String::new());
                self.drop_buffer(id);
                self.chore(id);
            }
        }
        self.remove_if_over(id);
        Ok(())
    }

    fn part(&mut self, part: &wire::ControlPart) -> Result<(), Violation> {
        let assembly = self.assembly.get_or_insert_default();
        if assembly.len() + part.data.len() > MAX_FRAME {
            return Err(Violation::TooLarge);
        }
        assembly.extend_from_slice(&part.data);
        if !part.last {
            return Ok(());
        }
        let whole = self.assembly.take().unwrap_or_default().freeze();
        let frame = frame::decode(whole).map_err(|_| Violation::Malformed)?;
        if frame.body.as_ref().is_some_and(|body| !body.is_control()) {
            return Err(Violation::Malformed);
        }
        self.events.push_back(Event::Control(frame));
        Ok(())
    }

    /// The id of a stream that is or was.
    fn known(&self, id: u32) -> Result<StreamId, Violation> {
        let known = StreamId::parse(id).ok_or(Violation::Unknown(id))?;
        let next = self.classes[known.class().index()].next[known.side().index()];
        if known.number() < next { Ok(known) } else { Err(Violation::Unknown(id)) }
    }

    fn opened_by(&self, side: Side) -> usize {
        self.streams.keys().filter(|id| id.side() == side).count()
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
        let lane = &mut self.classes[id.class().index()];
        let was_full = lane.bytes >= CLASS_BUFFER;
        lane.bytes -= dropped;
        if was_full {
            self.relieve(id.class());
        }
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
