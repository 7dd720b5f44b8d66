//! An HTTP/1.1 client that keeps its connection, and nothing else between two requests: a mapper has one for each of its devices.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::client::conn::http1::handshake;
use hyper::header::{AUTHORIZATION, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;

use super::{Address, Stream};

/// One server, one connection, one request at a time.
pub struct HttpClient {
    address: Address,
    timeout: Duration,
    /// The last answer on it was whole, and the server has not closed it then.
    kept: Option<Box<dyn Stream>>,
}

impl std::fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("HttpClient").field(&self.address).finish()
    }
}

/// An answer whose body is whole.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

/// Why there is no answer that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoAnswer {
    /// The server cannot be reached, or does not answer in time.
    Away(String),
    /// The request cannot be sent, or its answer is too long.
    Refused(String),
}

impl HttpClient {
    /// A client of the server of `url`, which is not connected yet.
    ///
    /// # Errors
    ///
    /// When that is no URL.
    pub fn new(url: &str, timeout: Duration) -> Result<Self, String> {
        Ok(Self::at(Address::parse(url, 80)?, timeout))
    }

    /// As [`HttpClient::new`].
    #[must_use]
    pub fn at(address: Address, timeout: Duration) -> Self {
        Self { address, timeout, kept: None }
    }

    /// Path and query of the URL.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.address.path
    }

    /// One request. A connection that was kept and turns out to be closed is made anew, once.
    ///
    /// # Errors
    ///
    /// When there is no answer in time, or its body is longer than `longest`.
    pub async fn request(
        &mut self,
        method: &Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
        longest: usize,
    ) -> Result<Answer, NoAnswer> {
        let limit = self.timeout;
        let exchange = async {
            if let Some(stream) = self.kept.take() {
                match self.exchange(stream, method, path, headers, body.clone(), longest).await {
                    Err(NoAnswer::Away(_)) => {}
                    answer => return answer,
                }
            }
            let stream = self.address.connect().await.map_err(NoAnswer::Away)?;
            self.exchange(stream, method, path, headers, body, longest).await
        };
        tokio::time::timeout(limit, exchange)
            .await
            .map_err(|_| NoAnswer::Away(format!("no answer within {limit:?}")))?
    }

    async fn exchange(
        &mut self,
        stream: Box<dyn Stream>,
        method: &Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
        longest: usize,
    ) -> Result<Answer, NoAnswer> {
        let Address { host, port, .. } = &self.address;
        let mut request = Request::builder().method(method).uri(path).header(HOST, format!("{host}:{port}"));
        if let Some(user) = &self.address.user {
            let password = self.address.password.as_deref().unwrap_or_default();
            let credentials = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
            request = request.header(AUTHORIZATION, format!("Basic {credentials}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body)).map_err(|error| NoAnswer::Refused(error.to_string()))?;
        let away = |error: hyper::Error| NoAnswer::Away(error.to_string());
        let (mut sender, mut connection) = handshake(TokioIo::new(stream)).await.map_err(away)?;
        let answer = {
            let mut asked = pin!(async {
                let answer = sender.send_request(request).await.map_err(away)?;
                let status = answer.status();
                let body = Limited::new(answer.into_body(), longest).collect().await;
                let body = body.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
                    Some(_) => NoAnswer::Refused(format!("the answer has more than {longest} bytes")),
                    None => NoAnswer::Away(format!("the answer is cut: {error}")),
                })?;
                Ok(Answer { status, body: body.to_bytes() })
            });
            let mut ended = false;
            poll_fn(|context| {
                // What ended it shows in the answer. It is not to be asked again then.
                ended = ended || connection.poll_without_shutdown(context).is_ready();
                let answer = std::task::ready!(asked.as_mut().poll(context));
                ended = ended || connection.poll_without_shutdown(context).is_ready();
                Poll::Ready(answer.map(|answer| (answer, !ended)))
            })
            .await
        };
        let (answer, stays) = answer?;
        let parts = connection.into_parts();
        // What a server says unasked answers nothing.
        self.kept = Some(parts.io.into_inner()).filter(|_| stays && parts.read_buf.is_empty());
        Ok(answer)
    }
}
