//! The connection to edgecore: made, registered on, watched, and made again, for as long as the process runs.

use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use skerry_proto::dmi;
use skerry_proto::dmi::device_manager_service_client::DeviceManagerServiceClient;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tonic::transport::{Channel, Endpoint};
use tracing::{debug, info, warn};

use crate::backoff::Backoff;
use crate::counters::COUNTERS;
use crate::directory::Directory;
use crate::driver::Driver;
use crate::report::{Edge, Reports, deadline};

/// A registration's answer has all devices.
const LARGEST_ANSWER: usize = 64 << 20;

/// Keeps this mapper registered.
pub(crate) async fn run<D: Driver>(
    edgecore: &Path,
    info: dmi::MapperInfo,
    directory: Arc<Directory<D>>,
    reports: Arc<Reports>,
) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(2));
    loop {
        match registered(edgecore, &info, &directory).await {
            Ok((edge, closed)) => {
                info!(name = info.name, protocol = info.protocol, "registered with edgecore");
                COUNTERS.registered.set(1);
                backoff.reset();
                reports.attach(edge);
                let _ = closed.await;
                reports.detach();
                COUNTERS.registered.set(0);
                warn!("the connection to edgecore broke; devices are run on");
            }
            Err(error) if backoff.failures() == 0 => {
                warn!(socket = %edgecore.display(), error, "edgecore does not answer; it is tried again until it does");
            }
            Err(error) => debug!(error, "edgecore does not answer"),
        }
        tokio::time::sleep(backoff.wait()).await;
    }
}

async fn registered<D: Driver>(
    edgecore: &Path,
    info: &dmi::MapperInfo,
    directory: &Directory<D>,
) -> Result<(Edge, oneshot::Receiver<()>), String> {
    let (channel, closed) = connect(edgecore).await.map_err(|error| chain(&error))?;
    let edge = Edge::new(channel.clone());
    let mut manager = DeviceManagerServiceClient::new(channel).max_decoding_message_size(LARGEST_ANSWER);
    directory.registering();
    let request = dmi::MapperRegisterRequest { with_data: true, mapper: Some(info.clone()) };
    let answer = async {
        let answer = manager.mapper_register(request).await?;
        let is_whole = !answer.metadata().contains_key(skerry_proto::PARTIAL);
        Ok(tonic::Response::new((answer.into_inner(), is_whole)))
    };
    match deadline(answer).await {
        Ok((answer, is_whole)) => {
            directory.registered(answer.model_list, answer.device_list, is_whole);
            Ok((edge, closed))
        }
        Err(status) => {
            directory.not_registered();
            Err(format!("it refuses the registration: {:?}: {}", status.code(), status.message()))
        }
    }
}

/// Connects once; the receiver ends when the connection does.
async fn connect(edgecore: &Path) -> Result<(Channel, oneshot::Receiver<()>), tonic::transport::Error> {
    let (open, closed) = oneshot::channel();
    let open = Mutex::new(Some(open));
    let path = edgecore.to_owned();
    let connector = tower::service_fn(move |_: hyper::Uri| {
        // Not a second time: a new connection needs a new registration.
        let open = open.lock().ok().and_then(|mut open| open.take());
        let path = path.clone();
        async move {
            let open = open.ok_or_else(|| std::io::Error::other("the connection broke"))?;
            let stream = UnixStream::connect(path).await?;
            Ok::<_, std::io::Error>(TokioIo::new(Watched { stream, _open: open }))
        }
    });
    let endpoint = Endpoint::from_static("http://localhost").connect_timeout(Duration::from_secs(2));
    Ok((endpoint.connect_with_connector(connector).await?, closed))
}

/// A stream whose end is noticed by whoever holds the receiver.
struct Watched {
    stream: UnixStream,
    _open: oneshot::Sender<()>,
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// An error and what caused it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
