//! Streams to the cloud for whoever outlives sessions: they are opened on the session that stands.

use bytes::Bytes;
use skerry_proto::mux::Class;
use skerry_proto::streams::{Stream, StreamError};
use tokio::sync::watch;

/// Opens streams to the cloud; cloning is cheap.
#[derive(Clone, Debug)]
pub struct Streams(watch::Receiver<Option<skerry_proto::streams::Streams>>);

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No session stands.
    #[error("there is no session with the cloud")]
    Offline,
    /// The session does not take it.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl Streams {
    /// On the session that [`Link`](super::Link) puts here.
    pub fn new(session: watch::Receiver<Option<skerry_proto::streams::Streams>>) -> Self {
        Self(session)
    }

    /// Opens a stream on the session that stands; it ends with that session.
    pub fn open(&self, class: Class, header: Bytes) -> Result<Stream, OpenError> {
        let session = self.0.borrow().clone().ok_or(OpenError::Offline)?;
        Ok(session.open(class, header)?)
    }
}
