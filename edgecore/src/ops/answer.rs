//! What goes back: a body of any kind, or a refusal with the words that the upstream kubelet has for it.

use std::convert::Infallible;
use std::io;

use bytes::Bytes;
use futures_util::Stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::Value;

use crate::runtime::cri;

/// A body of an answer.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;
/// An answer.
pub(crate) type Answer = Response<Body>;

/// Why there is none.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) words: String,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, words: impl Into<String>) -> Self {
        Self { status, words: words.into() }
    }

    pub(crate) fn bad(words: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, words)
    }

    pub(crate) fn missing(words: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, words)
    }

    pub(crate) fn failed(words: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, words)
    }
}

impl From<crate::store::Error> for Refusal {
    fn from(error: crate::store::Error) -> Self {
        Self::failed(error.to_string())
    }
}

/// As upstream's streaming endpoints answer for what the runtime says.
impl From<cri::Error> for Refusal {
    fn from(error: cri::Error) -> Self {
        let status = if error.is_not_found() { StatusCode::NOT_FOUND } else { StatusCode::INTERNAL_SERVER_ERROR };
        Self::new(status, error.to_string())
    }
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        let mut answer = text(refusal.words);
        *answer.status_mut() = refusal.status;
        answer
    }
}

/// Plain text.
pub(crate) fn text(text: impl Into<Bytes>) -> Answer {
    whole("text/plain; charset=utf-8", text.into())
}

/// JSON.
pub(crate) fn json(value: &Value) -> Answer {
    whole("application/json", value.to_string().into())
}

/// All at once.
pub(crate) fn whole(kind: &'static str, bytes: Bytes) -> Answer {
    with(kind, Full::new(bytes).map_err(|never: Infallible| match never {}).boxed_unsync())
}

/// Piece by piece, each when the reader has taken the one before.
pub(crate) fn pieces(kind: &'static str, pieces: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Answer {
    use futures_util::StreamExt as _;
    with(kind, StreamBody::new(pieces.map(|piece| piece.map(Frame::data))).boxed_unsync())
}

/// Nothing.
pub(crate) fn empty() -> Body {
    Full::new(Bytes::new()).map_err(|never: Infallible| match never {}).boxed_unsync()
}

fn with(kind: &'static str, body: Body) -> Answer {
    let mut answer = Response::new(body);
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}
