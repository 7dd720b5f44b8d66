//! What a node's sessions run on: the product's transport, with TLS and bounds as edgecore sets them.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use skerry_proto::mux::Side;
use skerry_proto::transport::{self, TLS_BUFFER, UNSENT, ws_config};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// A session's connection.
pub(super) type Wire = transport::Wire<TlsStream<TcpStream>, ()>;

/// What carries the sessions of a swarm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "lowercase")]
pub enum Transport {
    /// A WebSocket.
    #[default]
    WebSocket,
    /// QUIC.
    Quic,
}

/// Opens the sessions of one node.
#[derive(Debug)]
pub(super) enum Dialler {
    WebSocket(Arc<ClientConfig>),
    /// With a socket of the node's own, so that no node waits in another's queue.
    Quic(transport::Endpoint, quinn_proto::ClientConfig),
}

impl Dialler {
    pub(super) fn new(transport: Transport, config: &Arc<ClientConfig>) -> Result<Self> {
        Ok(match transport {
            Transport::WebSocket => Self::WebSocket(config.clone()),
            Transport::Quic => {
                let endpoint = transport::Endpoint::client(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
                Self::Quic(endpoint, transport::client_config(config)?)
            }
        })
    }

    /// Letting go of the connection resets it.
    pub(super) async fn connect(&self, cloud: SocketAddr) -> Result<Wire> {
        match self {
            Self::WebSocket(config) => over_websocket(cloud, config.clone()).await,
            Self::Quic(endpoint, config) => {
                let connection =
                    endpoint.connect(config.clone(), cloud, &cloud.ip().to_string())?.await.context("QUIC")?;
                Ok(Wire::over_quic(connection, Side::Edge, ()).await?)
            }
        }
    }
}

async fn over_websocket(cloud: SocketAddr, config: Arc<ClientConfig>) -> Result<Wire> {
    let stream = TcpStream::connect(cloud).await.context("connect")?;
    stream.set_nodelay(true)?;
    stream.set_zero_linger()?;
    SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT)?;
    let name = ServerName::IpAddress(cloud.ip().into());
    let mut stream = TlsConnector::from(config).connect(name, stream).await.context("TLS")?;
    stream.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
    let url = format!("wss://{cloud}/v1/session");
    let (socket, _) =
        tokio_tungstenite::client_async_with_config(url, stream, Some(ws_config())).await.context("upgrade")?;
    Ok(Wire::over_websocket(socket, Side::Edge, ()))
}
