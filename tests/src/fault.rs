//! A proxy in front of the apiserver that answers chosen requests itself: with an error, or not at all.
//!
//! One request a connection (`Connection: close`), so that a watch is passed through like anything else.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::pki::Authority;

/// What a chosen request gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An error answer of Kubernetes' form.
    Status(u16),
    /// Nothing, until the client gives up.
    Silence,
    /// The connection is closed without an answer.
    Hangup,
    /// It is passed on once [`FaultProxy::release`] says so.
    Hold,
}

/// A request as the rules see it.
#[derive(Clone, Debug)]
pub struct Request {
    /// `GET`, `PATCH`, …
    pub method: String,
    /// Path and query.
    pub path: String,
}

type Choose = Box<dyn FnMut(&Request) -> Option<Fault> + Send>;

/// The proxy. Dropping it closes everything.
#[derive(Debug)]
pub struct FaultProxy {
    url: String,
    ca_pem: String,
    shared: Arc<Shared>,
    _runtime: Runtime,
}

struct Shared {
    target: SocketAddr,
    client: TlsConnector,
    choose: Mutex<Choose>,
    /// How often what is held was let go.
    released: watch::Sender<u64>,
    seen: Mutex<Vec<(Request, Option<Fault>)>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Shared").field("target", &self.target).finish_non_exhaustive()
    }
}

impl FaultProxy {
    /// A proxy for the apiserver at `server` (`https://host:port`), whose CA is `ca_pem`; its own certificate goes to `dir`.
    pub fn start(dir: &Path, server: &str, ca_pem: &str) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let target: SocketAddr =
            server.trim_start_matches("https://").parse().with_context(|| format!("{server} is no https://IP:PORT"))?;
        let authority = Authority::new(dir, "fault-ca")?;
        let pair = authority.server(dir, "fault", &["127.0.0.1", "localhost"])?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());

        let chain = CertificateDer::pem_file_iter(&pair.certificate)?.collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_file(&pair.key)?;
        let config = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let acceptor = TlsAcceptor::from(Arc::new(config.with_no_client_auth().with_single_cert(chain, key)?));

        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
            roots.add(certificate?)?;
        }
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let client = TlsConnector::from(Arc::new(config.with_root_certificates(roots).with_no_client_auth()));

        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let port = crate::ports::free()?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, port)))?;
        let shared = Arc::new(Shared {
            target,
            client,
            choose: Mutex::new(Box::new(|_| None)),
            released: watch::Sender::new(0),
            seen: Mutex::new(Vec::new()),
        });
        runtime.spawn(accept(listener, acceptor, shared.clone()));
        let ca_pem = std::fs::read_to_string(&authority.certificate)?;
        Ok(Self { url: format!("https://127.0.0.1:{port}"), ca_pem, shared, _runtime: runtime })
    }

    /// What a kubeconfig needs: URL and CA.
    pub fn front(&self) -> (&str, &str) {
        (&self.url, &self.ca_pem)
    }

    /// Asks `choose` for every request from now on.
    pub fn inject(&self, choose: impl FnMut(&Request) -> Option<Fault> + Send + 'static) {
        *self.shared.choose.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(choose);
    }

    /// Passes everything from now on.
    pub fn heal(&self) {
        self.inject(|_| None);
    }

    /// Passes on what is held.
    pub fn release(&self) {
        self.shared.released.send_modify(|times| *times += 1);
    }

    /// The requests so far, each with what was done to it; forgets them.
    pub fn take_seen(&self) -> Vec<(Request, Option<Fault>)> {
        std::mem::take(&mut *self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, shared) = (acceptor.clone(), shared.clone());
        tokio::spawn(async move {
            // A client that goes away in the middle is nobody's failure.
            let _ = serve(stream, &acceptor, &shared).await;
        });
    }
}

async fn serve(stream: TcpStream, acceptor: &TlsAcceptor, shared: &Shared) -> Result<()> {
    let mut near = acceptor.accept(stream).await?;
    let (head, rest) = read_head(&mut near).await?;
    let request = parse(&head)?;
    let mut released = shared.released.subscribe();
    let fault = {
        let mut choose = shared.choose.lock().unwrap_or_else(PoisonError::into_inner);
        choose(&request)
    };
    shared.seen.lock().unwrap_or_else(PoisonError::into_inner).push((request, fault));
    match fault {
        Some(Fault::Status(code)) => {
            discard_body(&mut near, &head, rest.len()).await;
            near.write_all(refusal(code).as_bytes()).await?;
            near.shutdown().await?;
        }
        Some(Fault::Silence) => std::future::pending().await,
        Some(Fault::Hangup) => {}
        Some(Fault::Hold) | None => {
            if fault.is_some() {
                released.changed().await?;
            }
            let far = TcpStream::connect(shared.target).await?;
            let mut far = shared.client.connect(ServerName::IpAddress(shared.target.ip().into()), far).await?;
            far.write_all(one_request(&head).as_bytes()).await?;
            far.write_all(&rest).await?;
            copy_bidirectional(&mut near, &mut far).await?;
        }
    }
    Ok(())
}

/// Reads up to the empty line; what came behind it is returned apart.
async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            return Ok((String::from_utf8(bytes)?, rest));
        }
        let count = stream.read(&mut buffer).await?;
        anyhow::ensure!(count > 0 && bytes.len() < 64 << 10, "no complete request");
        bytes.extend_from_slice(&buffer[..count]);
    }
}

fn parse(head: &str) -> Result<Request> {
    let mut words = head.split(' ');
    let (method, path) = (words.next(), words.next());
    Ok(Request { method: method.context("no method")?.to_owned(), path: path.context("no path")?.to_owned() })
}

/// The head with `Connection: close`.
fn one_request(head: &str) -> String {
    let mut lines: Vec<&str> = head
        .split("\r\n")
        .filter(|line| !line.is_empty() && !line.to_ascii_lowercase().starts_with("connection:"))
        .collect();
    lines.push("Connection: close");
    lines.join("\r\n") + "\r\n\r\n"
}

/// Reads a request body of known length, so that closing does not reset the answer away.
async fn discard_body(stream: &mut (impl AsyncRead + Unpin), head: &str, have: usize) {
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let mut left = length.unwrap_or(0).saturating_sub(have);
    let mut buffer = [0; 4096];
    while left > 0 {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => left = left.saturating_sub(count),
        }
    }
}

fn refusal(code: u16) -> String {
    let (reason, extra) = match code {
        409 => ("Conflict", ""),
        429 => ("TooManyRequests", "Retry-After: 1\r\n"),
        503 => ("ServiceUnavailable", ""),
        _ => ("InternalError", ""),
    };
    let message = format!("the test answers {code}");
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code});
    let body = body.to_string();
    let length = body.len();
    format!(
        "HTTP/1.1 {code} {reason}\r\n{extra}Content-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}
