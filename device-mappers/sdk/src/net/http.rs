//! An HTTP/1.1 client that keeps its connection.

use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;

use super::Address;
use crate::task;

/// One server, one connection, one request at a time.
#[derive(Debug)]
pub struct HttpClient {
    address: Address,
    timeout: Duration,
    sender: Option<SendRequest<Full<Bytes>>>,
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
        Ok(Self { address: Address::parse(url, 80)?, timeout, sender: None })
    }

    /// As [`HttpClient::new`].
    #[must_use]
    pub fn at(address: Address, timeout: Duration) -> Self {
        Self { address, timeout, sender: None }
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
            if let Some(sender) = self.sender.take().filter(|sender| !sender.is_closed()) {
                match self.exchange(sender, method, path, headers, body.clone(), longest).await {
                    Err(NoAnswer::Away(_)) => {}
                    answer => return answer,
                }
            }
            let sender = self.connect().await.map_err(NoAnswer::Away)?;
            self.exchange(sender, method, path, headers, body, longest).await
        };
        tokio::time::timeout(limit, exchange)
            .await
            .map_err(|_| NoAnswer::Away(format!("no answer within {limit:?}")))?
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        let stream = self.address.connect().await?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        task::spawn("http connection", async move {
            let _ = connection.await;
        });
        Ok(sender)
    }

    async fn exchange(
        &mut self,
        mut sender: SendRequest<Full<Bytes>>,
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
        let answer = sender.send_request(request).await.map_err(|error| NoAnswer::Away(error.to_string()))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), longest).collect().await;
        let body = body.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
            Some(_) => NoAnswer::Refused(format!("the answer has more than {longest} bytes")),
            None => NoAnswer::Away(format!("the answer is cut: {error}")),
        })?;
        let body = body.to_bytes();
        self.sender = Some(sender);
        Ok(Answer { status, body })
    }
}
