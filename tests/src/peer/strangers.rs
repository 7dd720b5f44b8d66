//! Clients without a certificate that want nothing but to be in the way.

use std::any::Any;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use futures_util::future::join_all;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::client;
use crate::relay::{Flow, Relay};

/// What one of them takes to get as far as it means to.
const PATIENCE: Duration = Duration::from_secs(60);
/// The head of a record of TLS that does not come.
const BEGUN: [u8; 5] = [22, 3, 1, 2, 0];
/// Questions that one asks whose answers it does not read, and what the system may hold of these, in bytes.
const QUESTIONS: usize = 200;
const UNREAD: u32 = 4 << 10;
/// Clients of QUIC on one socket.
const SHARED: usize = 100;

type Held = Box<dyn Any + Send>;

/// A crowd of them, for as long as it is kept.
pub struct Strangers {
    _held: Vec<Held>,
    _endpoints: Vec<quinn::Endpoint>,
    /// What QUIC answers to a half of them is lost here.
    _deaf: Relay,
    _runtime: Runtime,
}

impl Strangers {
    /// So many over TCP: a quarter each says nothing, begins a handshake and no more, sends half a request, and asks without reading
    /// answers. And as many over QUIC, half of which never hear an answer. Done when all of them are as far as they get.
    pub fn come(address: SocketAddr, count: usize) -> Result<Self> {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let _entered = runtime.enter();
        let deaf = Relay::start(address)?;
        deaf.set(|line| line.down = Flow::Swallow);
        let tls = Arc::new(client(None)?);
        let quic = skerry_proto::transport::client_config(&tls)?;
        let mut endpoints = Vec::new();
        let mut coming = Vec::new();
        for number in 0..count {
            coming.push(tokio::spawn(timeout(PATIENCE, over_tcp(address, number % 4, tls.clone()))));
            if number % SHARED == 0 {
                endpoints.push(quinn::Endpoint::client(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?);
            }
            let endpoint = &endpoints[number / SHARED];
            let is_deaf = number % 2 == 0;
            let connecting =
                endpoint.connect_with(quic.clone(), if is_deaf { deaf.address() } else { address }, "localhost")?;
            // Whatever comes of it.
            let arriving = tokio::spawn(async move { Ok(Ok(Box::new(connecting.await) as Held)) });
            if !is_deaf {
                coming.push(arriving);
            }
        }
        let mut held = Vec::new();
        for came in runtime.block_on(join_all(coming)) {
            // One that is sent away on its way has been dealt with as well.
            if let Ok(Ok(stands)) = came? {
                held.push(stands);
            }
        }
        ensure!(held.len() > count, "only {} of {} got anywhere", held.len(), count + count / 2);
        drop(_entered);
        Ok(Self { _held: held, _endpoints: endpoints, _deaf: deaf, _runtime: runtime })
    }
}

async fn over_tcp(address: SocketAddr, kind: usize, tls: Arc<ClientConfig>) -> Result<Held> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(UNREAD)?;
    let mut stream: TcpStream = socket.connect(address).await?;
    if kind == 1 {
        stream.write_all(&BEGUN).await?;
    }
    if kind < 2 {
        return Ok(Box::new(stream));
    }
    let name = ServerName::IpAddress(address.ip().into());
    let mut stream = TlsConnector::from(tls).connect(name, stream).await?;
    if kind == 2 {
        stream.write_all(b"POST /v1/join HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n{").await?;
    } else {
        let questions = "GET /v1/ca HTTP/1.1\r\nHost: x\r\n\r\n".repeat(QUESTIONS);
        // It stops listening to them, as it should.
        let _ = timeout(Duration::from_secs(1), stream.write_all(questions.as_bytes())).await;
    }
    Ok(Box::new(stream))
}
