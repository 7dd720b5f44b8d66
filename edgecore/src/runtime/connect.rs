//! A channel to the runtime's socket that connects when it is first used and again whenever the connection was lost.

use std::path::PathBuf;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// The largest message that is taken from the runtime: a list of very many containers.
pub const MAX_MESSAGE: usize = 16 << 20;

/// Why there can be no channel.
#[derive(Debug, thiserror::Error)]
#[expect(clippy::error_impl_error, reason = "it is named through its module")]
pub enum Error {
    /// Not a unix socket.
    #[error("runtime endpoint {0:?} is not a unix socket: write it as unix:///run/containerd/containerd.sock")]
    NotUnix(String),
}

/// Where the socket of an endpoint is: `unix:///path` or an absolute path.
pub fn socket_path(endpoint: &str) -> Result<PathBuf, Error> {
    let path = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
    if path.starts_with('/') { Ok(PathBuf::from(path)) } else { Err(Error::NotUnix(endpoint.to_owned())) }
}

/// A lazy channel: nothing is connected yet, and a call made while the runtime is away fails at once as unavailable.
/// Needs a tokio runtime around it.
pub fn channel(endpoint: &str) -> Result<Channel, Error> {
    let path = socket_path(endpoint)?;
    // The authority is never looked at on a unix socket, but HTTP/2 wants a legal one.
    Ok(Endpoint::from_static("http://localhost").connect_with_connector_lazy(tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        assert_eq!(socket_path("unix:///run/a.sock").ok(), Some(PathBuf::from("/run/a.sock")));
        assert_eq!(socket_path("/run/a.sock").ok(), Some(PathBuf::from("/run/a.sock")));
        assert!(socket_path("tcp://127.0.0.1:1").is_err());
        assert!(socket_path("run/a.sock").is_err());
    }
}
