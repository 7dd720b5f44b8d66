//! The few HTTPS requests of a node's life: joining and renewing. One connection each, answers bounded.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use skerry_proto::payload::Refusal;
use tokio_rustls::client::TlsStream;

use crate::link::dial::{CONNECT_TIMEOUT, DialError, Server, dial};
use crate::supervise;

/// The largest answer that is read.
const MAX_ANSWER: usize = 256 << 10;

/// What is asked.
pub struct Ask<'a> {
    /// GET or POST.
    pub method: Method,
    /// From the slash on.
    pub path: &'a str,
    /// For `Authorization: Bearer`.
    pub bearer: Option<&'a str>,
    /// JSON.
    pub body: Vec<u8>,
}

/// What came back with 200.
#[derive(Debug)]
pub struct Answer {
    /// The server's wall clock, seconds since the Unix epoch, from its `Date` header.
    pub date: Option<i64>,
    /// The content.
    pub body: Bytes,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpsError {
    /// No connection.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The server refused, and said why.
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// The server answered with another status, and nothing that explains it.
    #[error(
        "{server} answered {path} with HTTP status {status}; check that this is cloudcore's port, and cloudcore's log"
    )]
    Status {
        /// Who.
        server: Server,
        /// What was asked.
        path: String,
        /// What it said.
        status: u16,
    },
    /// The connection broke, or what came is not HTTP.
    #[error("{server} gave no usable answer to {path}: {cause}")]
    Broken {
        /// Who.
        server: Server,
        /// What was asked.
        path: String,
        /// Why.
        cause: String,
    },
}

/// Asks once.
pub async fn ask(server: &Server, config: Arc<rustls::ClientConfig>, ask: Ask<'_>) -> Result<Answer, HttpsError> {
    let stream = dial(server, config).await?;
    match tokio::time::timeout(CONNECT_TIMEOUT, exchange(server, stream, ask)).await {
        Ok(result) => result,
        Err(_) => Err(DialError::Timeout(server.clone(), CONNECT_TIMEOUT).into()),
    }
}

async fn exchange(
    server: &Server,
    stream: TlsStream<tokio::net::TcpStream>,
    ask: Ask<'_>,
) -> Result<Answer, HttpsError> {
    let broken = |cause: String| HttpsError::Broken { server: server.clone(), path: ask.path.to_owned(), cause };
    let hyper_broken = |error: hyper::Error| {
        let tls = std::error::Error::source(&error)
            .and_then(|source| source.downcast_ref::<std::io::Error>())
            .and_then(|io| io.get_ref())
            .and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match tls {
            Some(tls) => crate::link::dial::tls_error(server, std::io::Error::other(tls.clone())).into(),
            None => broken(chain(&error)),
        }
    };
    let mut request = Request::builder()
        .method(ask.method.clone())
        .uri(ask.path)
        .header(header::HOST, server.to_string())
        .header(header::CONTENT_TYPE, "application/json");
    if let Some(token) = ask.bearer {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    let request = request.body(Full::new(Bytes::from(ask.body.clone()))).map_err(|error| broken(error.to_string()))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(hyper_broken)?;
    let driver = supervise::spawn("https", async move {
        // The request says what went wrong.
        let _ = connection.await;
    });
    let response = sender.send_request(request).await;
    let result = match response {
        Ok(response) => read(server, &ask, response).await,
        Err(error) => Err(hyper_broken(error)),
    };
    driver.abort();
    result
}

async fn read(
    server: &Server,
    ask: &Ask<'_>,
    response: hyper::Response<hyper::body::Incoming>,
) -> Result<Answer, HttpsError> {
    let status = response.status();
    let date = response
        .headers()
        .get(header::DATE)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| jiff::fmt::rfc2822::parse(text).ok())
        .map(|date| date.timestamp().as_second());
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|error| HttpsError::Broken {
        server: server.clone(),
        path: ask.path.to_owned(),
        cause: error.to_string(),
    })?;
    let body = body.to_bytes();
    if status == hyper::StatusCode::OK {
        return Ok(Answer { date, body });
    }
    Err(match serde_json::from_slice(&body) {
        Ok(refusal) => HttpsError::Refused(refusal),
        Err(_) => HttpsError::Status { server: server.clone(), path: ask.path.to_owned(), status: status.as_u16() },
    })
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
