//! What is sent next.

use prost::Message as _;

use super::stream::{Finish, Reset};
use super::{CLASS_BUFFER, Class, Control, Event, Mux, StreamId, pop};
use crate::wire::{self, Frame, frame::Body};

impl Mux {
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
                let data = rest.split_to(self.cut.min(rest.len()));
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
            let data = stream.buffer.split_to(self.cut.min(stream.credit).min(stream.buffer.len())).freeze();
            stream.credit -= data.len();
            let fin = stream.finish == Finish::Wanted && stream.buffer.is_empty();
            if fin {
                stream.finish = Finish::Sent;
            }
            // Its own room comes first.
            if stream.starved && stream.room(lane.bytes - data.len()) > 0 {
                stream.starved = false;
                self.events.push_back(Event::Writable(id));
            }
            self.relieve(class, data.len());
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

    /// So many bytes of a class wait no more: if it was full, others have room again.
    pub(super) fn relieve(&mut self, class: Class, bytes: usize) {
        let lane = &mut self.classes[class.index()];
        let was_full = lane.bytes >= CLASS_BUFFER;
        lane.bytes -= bytes;
        if !was_full || lane.bytes >= CLASS_BUFFER {
            return;
        }
        for (id, stream) in self.streams.iter_mut().filter(|(id, _)| id.class() == class) {
            if stream.starved && stream.room(lane.bytes) > 0 {
                stream.starved = false;
                self.events.push_back(Event::Writable(*id));
            }
        }
    }
}
