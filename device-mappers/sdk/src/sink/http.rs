//! Batches over HTTP: as a JSON array, or as lines for InfluxDB 2.

use std::time::Duration;

use bytes::Bytes;
use hyper::Method;
use skerry_proto::ops::percent_encode;

use super::queue::Batch;
use super::writer::PushError;
use crate::net::{HttpClient, NoAnswer};
use crate::value::shortened;

pub(crate) struct Http {
    client: Result<HttpClient, String>,
    path: String,
    headers: Vec<(&'static str, String)>,
    lines: bool,
}

impl Http {
    /// One POST of `[record, …]` for each batch.
    pub(crate) fn json(url: &str, timeout: u32) -> Self {
        let client = HttpClient::new(url, Duration::from_millis(timeout.into()));
        let path = client.as_ref().map(|client| client.path().to_owned()).unwrap_or_default();
        Self { client, path, headers: vec![("content-type", "application/json".to_owned())], lines: false }
    }

    /// `/api/v2/write`, with the token of the environment's `TOKEN`, as KubeEdge's mappers take it.
    pub(crate) fn influx(url: &str, org: &str, bucket: &str) -> Self {
        let client = HttpClient::new(url, Duration::from_secs(10));
        let base = client.as_ref().map(|client| client.path().trim_end_matches('/').to_owned()).unwrap_or_default();
        let path =
            format!("{base}/api/v2/write?org={}&bucket={}&precision=ms", percent_encode(org), percent_encode(bucket));
        let mut headers = vec![("content-type", "text/plain; charset=utf-8".to_owned())];
        if let Ok(token) = std::env::var("TOKEN") {
            headers.push(("authorization", format!("Token {token}")));
        }
        Self { client, path, headers, lines: true }
    }

    pub(crate) async fn push(&mut self, batch: &Batch) -> Result<(), PushError> {
        let client = self.client.as_mut().map_err(|error| PushError::Refused(error.clone()))?;
        let body = if self.lines { join(batch, b"", b"\n", b"\n") } else { join(batch, b"[", b",", b"]") };
        let headers: Vec<(&str, &str)> = self.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let answer = client.request(&Method::POST, &self.path, &headers, body, 64 << 10).await;
        let answer = answer.map_err(|(NoAnswer::Away(why) | NoAnswer::Refused(why))| PushError::Away(why))?;
        let why = || {
            let body = String::from_utf8_lossy(&answer.body).into_owned();
            format!("{}: {}", answer.status, shortened(body.trim()))
        };
        match answer.status.as_u16() {
            200..300 => Ok(()),
            // What the batch itself is blamed for will not get better.
            400 | 413 | 415 | 422 => Err(PushError::Refused(why())),
            _ => Err(PushError::Away(why())),
        }
    }
}

fn join(batch: &Batch, before: &[u8], between: &[u8], after: &[u8]) -> Bytes {
    let mut body = Vec::with_capacity(batch.bytes.len() + 8);
    body.extend_from_slice(before);
    for (index, record) in batch.iter().enumerate() {
        if index > 0 {
            body.extend_from_slice(between);
        }
        body.extend_from_slice(record);
    }
    body.extend_from_slice(after);
    body.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_an_array_or_lines() {
        let mut batch = Batch::default();
        batch.push(|bytes| bytes.extend_from_slice(b"1"));
        batch.push(|bytes| bytes.extend_from_slice(b"2"));
        assert_eq!(join(&batch, b"[", b",", b"]"), "[1,2]");
        assert_eq!(join(&batch, b"", b"\n", b"\n"), "1\n2\n");
    }
}
