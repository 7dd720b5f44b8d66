//! The apiserver, asked over a few kept connections: creating tens of thousands of objects with kubectl would take all day.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// The core group, in the namespace `default`.
pub const CORE: &str = "/api/v1/namespaces/default";

/// Where the apiserver is and who we are.
pub struct Api {
    address: SocketAddr,
    connector: TlsConnector,
}

/// A connection to it.
pub struct Connection(SendRequest<Full<Bytes>>);

impl Api {
    /// From a kubeconfig of the harness's own, which is JSON and names files.
    pub fn of(kubeconfig: &Path) -> Result<Self> {
        let config: Value = serde_json::from_slice(&std::fs::read(kubeconfig)?).context("not a kubeconfig of ours")?;
        let cluster = &config["clusters"][0]["cluster"];
        let server = cluster["server"].as_str().context("no server")?;
        let address = server.trim_start_matches("https://").parse().context("the server is no address")?;
        let ca = STANDARD.decode(cluster["certificate-authority-data"].as_str().context("no CA")?)?;
        let user = &config["users"][0]["user"];
        let file =
            |key: &str| -> Result<Vec<u8>> { Ok(std::fs::read(user[key].as_str().context("no client certificate")?)?) };
        let connector =
            TlsConnector::from(Arc::new(client_config(&ca, &file("client-certificate")?, &file("client-key")?)?));
        Ok(Self { address, connector })
    }

    /// Connects once.
    pub async fn connect(&self) -> Result<Connection> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let stream = self.connector.connect(ServerName::IpAddress(self.address.ip().into()), stream).await?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Connection(sender))
    }
}

impl Connection {
    /// Creates an object in a collection, given by its path.
    pub async fn create(&mut self, collection: &str, object: &Value) -> Result<()> {
        self.send(Method::POST, collection, "application/json", object).await
    }

    /// Changes one, given by its path.
    pub async fn merge(&mut self, path: &str, patch: &Value) -> Result<()> {
        self.send(Method::PATCH, path, "application/merge-patch+json", patch).await
    }

    async fn send(&mut self, method: Method, path: &str, kind: &str, body: &Value) -> Result<()> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "apiserver")
            .header("content-type", kind)
            .body(Full::new(Bytes::from(body.to_string())))?;
        self.0.ready().await?;
        let answer = self.0.send_request(request).await?;
        let status = answer.status();
        let body = answer.into_body().collect().await?.to_bytes();
        if !status.is_success() {
            bail!("{path}: {status}: {}", String::from_utf8_lossy(&body));
        }
        Ok(())
    }
}

/// A client that trusts one CA and shows one certificate; all PEM.
pub(crate) fn client_config(ca: &[u8], certificate: &[u8], key: &[u8]) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(ca) {
        roots.add(root?)?;
    }
    let chain = CertificateDer::pem_slice_iter(certificate).collect::<Result<Vec<_>, _>>()?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key)?)?;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}
