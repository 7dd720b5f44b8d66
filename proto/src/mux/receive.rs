//! What the peer sent, and what more it may send.

use super::error::Violation;
use super::stream::{Finish, Reset, Stream};
use super::{Event, MAX_GROWTH, MAX_HEADER, MAX_STREAMS, MAX_WINDOW, Mux, PROBE, StreamId, shortened};
use crate::frame;
use crate::sync::MAX_FRAME;
use crate::wire::{self, Frame, frame::Body};

impl Mux {
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
        if self.opened_by(peer, id.class()) >= MAX_STREAMS {
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
}
