//! Streams of a session for whoever reads and writes them: [`Streams`] opens them, a [`Stream`] is a pipe both ways, and [`Carrier`] is
//! the end that the session's task moves frames through.
//!
//! Nothing here is a task: whoever reads or writes steps the [`Mux`] under a lock that is never held over an await, and wakes the
//! session. Backpressure goes from end to end: a write waits for room in the sender's buffer, that for the reader's credit. When the
//! session ends, so does every stream, with an error that says so; a stream that is dropped unfinished is reset.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;

use crate::mux::{CUT, Class, Event, Mux, OpenError, Side, StreamId, Violation, Waiting};
use crate::wire::Frame;

pub mod double;
#[cfg(test)]
mod tests;

/// The end of a session's streams that its task holds; the session's streams end when it is dropped.
#[derive(Debug)]
pub struct Carrier(Shared);

/// Opens streams of one session; cloning is cheap, and does not keep the session.
#[derive(Clone, Debug)]
pub struct Streams(Shared);

/// Bytes both ways. Its reader sees the end when the peer has shut down its writing half.
pub struct Stream {
    id: StreamId,
    shared: Shared,
}

/// Waits for what breaks a stream; see [`Stream::gone`].
#[derive(Clone, Debug)]
pub struct Gone {
    id: StreamId,
    shared: Shared,
}

/// How a stream came to be gone.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// It was let go of here.
    #[error("the stream was let go of")]
    Left,
    /// The peer had finished its half before, in good order: all that it sent is there to be read.
    #[error("{0}")]
    Finished(io::Error),
    /// It broke in the middle, and what was not read is lost.
    #[error("{0}")]
    Broken(io::Error),
}

/// A stream that the peer opened; dropping it resets the stream.
#[derive(Debug)]
pub struct Incoming {
    /// Its class.
    pub class: Class,
    /// What it is for.
    pub header: Bytes,
    /// The stream.
    pub stream: Stream,
}

/// What a frame of the peer's was.
#[derive(Debug)]
pub enum Received {
    /// One of the control class.
    Control(Frame),
    /// The peer opened a stream.
    Opened(Incoming),
    /// Anything else, which has been dealt with.
    Other,
}

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The session is over.
    #[error("the session has ended: {0}")]
    Ended(Arc<str>),
    /// The session cannot take it.
    #[error("no stream can be opened")]
    Refused(#[from] OpenError),
}

/// Who serves which class of streams that the peer opens. `T` is what a service gets of each: an [`Incoming`], and who it is from.
#[derive(Debug)]
pub struct Services<T>([Option<mpsc::Sender<T>>; Class::ALL.len()]);

type Shared = Arc<Mutex<State>>;

#[derive(Debug)]
struct State {
    mux: Mux,
    pipes: HashMap<StreamId, Pipe>,
    /// The session's task, which waits for something to send.
    session: Option<Waker>,
    ended: Option<Arc<str>>,
}

/// A stream as its owner sees it.
#[derive(Debug, Default)]
struct Pipe {
    /// In one piece: many small ones would take more memory than the credit for them says.
    unread: BytesMut,
    has_end: bool,
    is_shut: bool,
    reset: Option<Arc<str>>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    watcher: Option<Waker>,
}

impl Carrier {
    /// A session that begins.
    pub fn new(side: Side) -> Self {
        Self::cut_at(side, CUT)
    }

    /// As [`Carrier::new`], with frames cut at so many bytes, see [`Mux::cut_at`].
    pub fn cut_at(side: Side, cut: usize) -> Self {
        let mux = Mux::new(side).cut_at(cut);
        Self(Arc::new(Mutex::new(State { mux, pipes: HashMap::new(), session: None, ended: None })))
    }

    /// What opens streams of this session.
    pub fn streams(&self) -> Streams {
        Streams(Arc::clone(&self.0))
    }

    /// Puts a frame of the control class behind those that wait.
    pub fn control(&mut self, frame: Frame) {
        lock(&self.0).mux.control(frame);
    }

    /// What waits to be sent.
    pub fn waiting(&self) -> Waiting {
        lock(&self.0).mux.waiting()
    }

    /// The next frame to send, which is then out of these hands; waits until there is one.
    pub fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Frame> {
        self.poll_next(context, Mux::next_frame)
    }

    /// As [`Carrier::poll_frame`], of one class, or of control where that is `None`.
    pub fn poll_frame_of(&mut self, class: Option<Class>, context: &mut Context<'_>) -> Poll<Frame> {
        self.poll_next(context, |mux| mux.next_frame_of(class))
    }

    fn poll_next(&mut self, context: &mut Context<'_>, next: impl FnOnce(&mut Mux) -> Option<Frame>) -> Poll<Frame> {
        let mut state = lock(&self.0);
        match next(&mut state.mux) {
            Some(frame) => {
                let woken = state.writable();
                drop(state);
                woken.into_iter().for_each(Waker::wake);
                Poll::Ready(frame)
            }
            None => {
                state.session = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Takes a frame of the peer's. After a violation the session has to end.
    pub fn receive(&mut self, frame: Frame) -> Result<Received, Violation> {
        let mut state = lock(&self.0);
        state.mux.receive(frame)?;
        let mut received = Received::Other;
        let mut woken = Vec::new();
        while let Some(event) = state.mux.poll() {
            match event {
                Event::Control(frame) => received = Received::Control(frame),
                Event::Opened { id, header } => {
                    state.pipes.insert(id, Pipe::default());
                    let stream = Stream { id, shared: Arc::clone(&self.0) };
                    received = Received::Opened(Incoming { class: id.class(), header, stream });
                }
                Event::Data(id, data) => {
                    if let Some(pipe) = state.pipes.get_mut(&id) {
                        pipe.unread.extend_from_slice(&data);
                        woken.extend(pipe.reader.take());
                    }
                }
                Event::Finished(id) => {
                    if let Some(pipe) = state.pipes.get_mut(&id) {
                        pipe.has_end = true;
                        woken.extend(pipe.reader.take());
                    }
                }
                Event::Reset(id, reason) => {
                    let Some(pipe) = state.pipes.get_mut(&id) else { continue };
                    pipe.reset = Some(reason.into());
                    // Whoever reads what is whole is let finish.
                    if !pipe.has_end {
                        pipe.unread = BytesMut::new();
                    }
                    woken.extend(pipe.waiting());
                }
                Event::Writable(id) => woken.extend(state.pipes.get_mut(&id).and_then(|pipe| pipe.writer.take())),
            }
        }
        drop(state);
        woken.into_iter().for_each(Waker::wake);
        Ok(received)
    }

    /// Ends every stream and drops what waits; control frames that come behind it are still sent.
    pub fn end(&mut self, reason: &str) {
        let mut state = lock(&self.0);
        if state.ended.is_some() {
            return;
        }
        state.ended = Some(reason.into());
        state.mux.end();
        let woken: Vec<_> = state.pipes.values_mut().flat_map(Pipe::waiting).collect();
        drop(state);
        woken.into_iter().for_each(Waker::wake);
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.end("the connection is gone");
        // Whoever still holds a stream holds nothing of what waited.
        let mut state = lock(&self.0);
        state.mux = Mux::new(state.mux.side());
    }
}

impl Streams {
    /// Opens a stream. It is the peer's to refuse, by a reset that the first read shows.
    pub fn open(&self, class: Class, header: Bytes) -> Result<Stream, StreamError> {
        let mut state = lock(&self.0);
        if let Some(reason) = &state.ended {
            return Err(StreamError::Ended(Arc::clone(reason)));
        }
        let id = state.mux.open(class, header)?;
        state.pipes.insert(id, Pipe::default());
        unlock_and_send(state);
        Ok(Stream { id, shared: Arc::clone(&self.0) })
    }

    /// Whether the session is over.
    pub fn is_ended(&self) -> bool {
        lock(&self.0).ended.is_some()
    }

    /// What of the session waits to be sent.
    pub fn waiting(&self) -> Waiting {
        lock(&self.0).mux.waiting()
    }
}

impl Stream {
    /// Its class.
    pub fn class(&self) -> Class {
        self.id.class()
    }

    /// Ends when the peer has reset the stream or the session is over, and when the stream is dropped. A stream
    /// that the peer finished in good order is not gone before it is let go of, which its peer tells by a reset as well. For who neither reads nor writes for a while; the last one that waits is woken.
    pub fn gone(&self) -> Gone {
        Gone { id: self.id, shared: Arc::clone(&self.shared) }
    }

    /// Ends it both ways and tells the peer why.
    pub fn reset(self, reason: &str) {
        let mut state = lock(&self.shared);
        state.mux.reset(self.id, reason);
        unlock_and_send(state);
    }
}

impl Incoming {
    /// Says no.
    pub fn refuse(self, reason: &str) {
        self.stream.reset(reason);
    }
}

impl Future for Gone {
    type Output = End;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<End> {
        let mut state = lock(&self.shared);
        let State { pipes, ended, .. } = &mut *state;
        let Some(pipe) = pipes.get_mut(&self.id) else {
            return Poll::Ready(End::Left);
        };
        if let Some(error) = pipe.error(ended.as_ref()) {
            return Poll::Ready(if pipe.has_end { End::Finished(error) } else { End::Broken(error) });
        }
        pipe.watcher = Some(context.waker().clone());
        Poll::Pending
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = lock(&self.shared);
        let State { mux, pipes, ended, .. } = &mut *state;
        let Some(pipe) = pipes.get_mut(&self.id) else { return Poll::Ready(Ok(())) };
        let read = pipe.unread.len().min(buffer.remaining());
        if read > 0 {
            buffer.put_slice(&pipe.unread.split_to(read));
            if pipe.unread.is_empty() {
                pipe.unread = BytesMut::new();
            }
            mux.consumed(self.id, read);
            unlock_and_send(state);
            return Poll::Ready(Ok(()));
        }
        if pipe.has_end || buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if let Some(error) = pipe.error(ended.as_ref()) {
            return Poll::Ready(Err(error));
        }
        pipe.reader = Some(context.waker().clone());
        Poll::Pending
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = lock(&self.shared);
        let State { mux, pipes, ended, .. } = &mut *state;
        let Some(pipe) = pipes.get_mut(&self.id) else { return Poll::Ready(Ok(0)) };
        if let Some(error) = pipe.error(ended.as_ref()) {
            return Poll::Ready(Err(error));
        }
        if pipe.is_shut {
            let error = io::Error::new(io::ErrorKind::BrokenPipe, "the stream was shut down before");
            return Poll::Ready(Err(error));
        }
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        match mux.write(self.id, data) {
            0 => {
                pipe.writer = Some(context.waker().clone());
                Poll::Pending
            }
            taken => {
                unlock_and_send(state);
                Poll::Ready(Ok(taken))
            }
        }
    }

    /// What was written is sent without further asking.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Ends the writing half; what was written is still sent, also when the stream is dropped then.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = lock(&self.shared);
        let State { mux, pipes, ended, .. } = &mut *state;
        let Some(pipe) = pipes.get_mut(&self.id) else { return Poll::Ready(Ok(())) };
        if pipe.is_shut {
            return Poll::Ready(Ok(()));
        }
        if let Some(error) = pipe.error(ended.as_ref()) {
            return Poll::Ready(Err(error));
        }
        pipe.is_shut = true;
        mux.finish(self.id);
        unlock_and_send(state);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut state = lock(&self.shared);
        let mut watcher = None;
        if let Some(pipe) = state.pipes.remove(&self.id) {
            watcher = pipe.watcher;
            if !(pipe.has_end && pipe.is_shut) {
                state.mux.abandon(self.id, "the other side has let go of the stream");
            }
        }
        unlock_and_send(state);
        watcher.into_iter().for_each(Waker::wake);
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?})", self.id)
    }
}

impl<T> Default for Services<T> {
    fn default() -> Self {
        Self(Default::default())
    }
}

impl<T> Clone for Services<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Services<T> {
    /// What the peer opens in this class comes here; one more than `waiting` that nobody has taken is refused.
    pub fn serve(&mut self, class: Class, waiting: usize) -> mpsc::Receiver<T> {
        let (sender, receiver) = mpsc::channel(waiting);
        self.0[class.index()] = Some(sender);
        receiver
    }

    /// Hands a stream to who serves its class, or refuses it; answers whether somebody has it. `with` adds who it is from.
    pub fn deliver(&self, incoming: Incoming, with: impl FnOnce(Incoming) -> T) -> bool {
        let class = incoming.class;
        let place = self.0[class.index()].as_ref().map(mpsc::Sender::try_reserve);
        match place {
            Some(Ok(place)) => {
                place.send(with(incoming));
                return true;
            }
            Some(Err(mpsc::error::TrySendError::Full(()))) => {
                incoming.refuse(&format!("too many streams of class {class} wait to be served here, try again later"));
            }
            Some(Err(mpsc::error::TrySendError::Closed(()))) | None => {
                incoming.refuse(&format!("nobody serves streams of class {class} here"));
            }
        }
        false
    }
}

impl State {
    /// Writers that have room again.
    fn writable(&mut self) -> Vec<Waker> {
        let mut woken = Vec::new();
        while let Some(event) = self.mux.poll() {
            if let Event::Writable(id) = event {
                woken.extend(self.pipes.get_mut(&id).and_then(|pipe| pipe.writer.take()));
            }
        }
        woken
    }
}

impl Pipe {
    /// Whoever waits for something of it.
    fn waiting(&mut self) -> impl Iterator<Item = Waker> + use<> {
        [self.reader.take(), self.writer.take(), self.watcher.take()].into_iter().flatten()
    }

    fn error(&self, ended: Option<&Arc<str>>) -> Option<io::Error> {
        match (&self.reset, ended) {
            (Some(reason), _) => Some(io::Error::new(
                io::ErrorKind::ConnectionReset,
                format!("the other side ended the stream: {reason}"),
            )),
            (None, Some(reason)) => {
                Some(io::Error::new(io::ErrorKind::ConnectionAborted, format!("the session has ended: {reason}")))
            }
            (None, None) => None,
        }
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets go of the lock and has the session look for something to send; writers that got room by a reset are woken too.
fn unlock_and_send(mut state: MutexGuard<'_, State>) {
    let woken = state.writable();
    let session = state.session.take();
    drop(state);
    session.into_iter().chain(woken).for_each(Waker::wake);
}
