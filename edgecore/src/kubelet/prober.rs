//! Runs one probe: a command in the container, an HTTP request, a TCP connection, a gRPC health check.
//!
//! Failure and timeout are results; an error means that the probe could not be run at all. Nothing is verified about a TLS peer, as
//! probes promise, and nothing of an answer is kept beyond 10 KiB. Sockets are closed in the ordinary way: a lingering close blocks the
//! one thread that everything runs on, and the ports of closed connections are counted per peer, so they do not run out.

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION, USER_AGENT};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, EnvVar, ExecAction, GRPCAction, HTTPGetAction, HTTPHeader, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use skerry_proto::health::health_check_response::ServingStatus;
use skerry_proto::health::{HealthCheckRequest, health_client::HealthClient};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::Code;
use tonic::transport::Endpoint;

use super::probe::{Attempt, ProbeSpec};
use crate::runtime::cri::{self, Cri};

/// As much of a body or an output as anyone wants to read.
const OUTPUT_LIMIT: usize = 10 << 10;
const MAX_REDIRECTS: usize = 10;
const PROBE_AGENT: &str = "kube-probe/1.36";

/// The container that is probed, or whose hook is run.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// CRI id.
    pub container_id: &'a str,
    /// Its spec: ports by name, static environment.
    pub container: &'a Container,
    /// Where it listens: the pod's address, or the node's with host network.
    pub pod_ip: Option<IpAddr>,
}

/// Runs a probe once.
pub async fn run(cri: &Cri, target: &Target<'_>, probe: &Probe) -> Attempt {
    let timeout = ProbeSpec::from(probe).timeout;
    if let Some(action) = &probe.exec {
        return exec(cri, target, action, timeout).await;
    }
    if let Some(action) = &probe.http_get {
        return http(target, action, timeout).await;
    }
    if let Some(action) = &probe.tcp_socket {
        let address = host(target, action.host.as_deref()).and_then(|host| Ok((host, port(target, &action.port)?)));
        return match address {
            Ok((host, port)) => tcp(&host, port, timeout).await,
            Err(error) => Attempt::Error(error),
        };
    }
    if let Some(action) = &probe.grpc {
        return grpc(target, action, timeout).await;
    }
    Attempt::Error("the probe has no action".to_owned())
}

async fn exec(cri: &Cri, target: &Target<'_>, action: &ExecAction, timeout: Duration) -> Attempt {
    let environment = target.container.env.as_deref().unwrap_or_default();
    let command: Vec<String> = action.command.iter().flatten().map(|argument| expand(argument, environment)).collect();
    match cri.exec_sync(target.container_id, &command, Some(timeout)).await {
        Ok(exec) if exec.exit_code == 0 => Attempt::Success,
        Ok(exec) => {
            let output = &exec.output[..exec.output.len().min(OUTPUT_LIMIT)];
            Attempt::Failure(String::from_utf8_lossy(output).into_owned())
        }
        Err(cri::Error::Deadline { within, .. }) if within == timeout => Attempt::Failure(format!(
            "command timed out: {:?} timed out after {}s",
            command.join(" "),
            timeout.as_secs()
        )),
        Err(error) => Attempt::Error(error.to_string()),
    }
}

async fn tcp(host: &str, port: u16, timeout: Duration) -> Attempt {
    match tokio::time::timeout(timeout, dial(host, port)).await {
        Ok(Ok(_)) => Attempt::Success,
        Ok(Err(error)) => Attempt::Failure(error),
        Err(_) => Attempt::Failure(format!("dial tcp {}: i/o timeout", join(host, port))),
    }
}

async fn grpc(target: &Target<'_>, action: &GRPCAction, timeout: Duration) -> Attempt {
    let service = action.service.clone().unwrap_or_default();
    let (host, port) = match (host(target, None), u16::try_from(action.port)) {
        (Ok(host), Ok(port)) => (host, port),
        (Err(error), _) => return Attempt::Error(error),
        (_, Err(_)) => return Attempt::Error(format!("invalid port number: {}", action.port)),
    };
    let address = join(&host, port);
    let endpoint = Endpoint::from_shared(format!("http://{address}")).and_then(|to| to.user_agent(PROBE_AGENT));
    let endpoint = match endpoint {
        Ok(endpoint) => endpoint,
        Err(error) => return Attempt::Error(error.to_string()),
    };
    let mut connected = false;
    let check = async {
        let channel = endpoint.connect().await.map_err(|error| {
            let cause = root_cause(&error);
            format!("error: failed to connect service {address:?}: {cause}")
        })?;
        connected = true;
        let answer = HealthClient::new(channel).check(HealthCheckRequest { service }).await;
        let status = answer.map_err(|status| match status.code() {
            Code::Unimplemented => format!(
                "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}",
                status.message()
            ),
            Code::DeadlineExceeded => format!("timeout: health rpc did not complete within {}s", timeout.as_secs()),
            _ => format!("error: health rpc failed: {}", status.message()),
        })?;
        match status.into_inner().status() {
            ServingStatus::Serving => Ok(()),
            status => Err(format!("service unhealthy (responded with {:?})", status.as_str_name())),
        }
    };
    match tokio::time::timeout(timeout, check).await {
        Ok(Ok(())) => Attempt::Success,
        Ok(Err(failure)) => Attempt::Failure(failure),
        Err(_) if connected => {
            Attempt::Failure(format!("timeout: health rpc did not complete within {}s", timeout.as_secs()))
        }
        Err(_) => Attempt::Failure(format!(
            "timeout: failed to connect service {address:?} within {}s: context deadline exceeded",
            timeout.as_secs()
        )),
    }
}

async fn http(target: &Target<'_>, action: &HTTPGetAction, timeout: Duration) -> Attempt {
    let url = match url(target, action) {
        Ok(url) => url,
        Err(error) => return Attempt::Error(error),
    };
    let headers = match headers(action.http_headers.as_deref().unwrap_or_default(), PROBE_AGENT) {
        Ok(headers) => headers,
        Err(error) => return Attempt::Error(error),
    };
    let answer = match tokio::time::timeout(timeout, fetch(&url, &headers)).await {
        Ok(answer) => answer,
        Err(_) => Err(Failed::Transport(format!(
            "Get \"{url}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
        ))),
    };
    match answer {
        Ok(answer) if answer.status >= 400 || answer.status < 200 => {
            Attempt::Failure(format!("HTTP probe failed with statuscode: {}", answer.status))
        }
        Ok(answer) if answer.status >= 300 => {
            let body = String::from_utf8_lossy(&answer.body);
            Attempt::Warning(format!("Probe terminated redirects, Response body: {body}"))
        }
        Ok(_) => Attempt::Success,
        Err(error) => Attempt::Failure(error.to_string()),
    }
}

/// The last answer of a chain of redirects on one host.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    /// The peer speaks, but not TLS.
    #[error("Get \"{0}\": http: server gave HTTP response to HTTPS client")]
    PlainHttp(String),
    /// In the words of the transport.
    #[error("{0}")]
    Transport(String),
}

/// GETs a URL and follows redirects that stay on its host. No deadline of its own.
pub(crate) async fn fetch(url: &Uri, headers: &HeaderMap) -> Result<Answer, Failed> {
    let mut url = url.clone();
    for _ in 0..MAX_REDIRECTS {
        let (answer, location) = get(&url, headers).await?;
        let Some(next) = location.as_deref().and_then(|location| resolve(&url, location)) else { return Ok(answer) };
        if next.host() != url.host() {
            return Ok(answer);
        }
        url = next;
    }
    Err(Failed::Transport(format!("Get \"{url}\": stopped after {MAX_REDIRECTS} redirects")))
}

/// One request on a connection of its own.
async fn get(url: &Uri, headers: &HeaderMap) -> Result<(Answer, Option<String>), Failed> {
    let failed = |error: &dyn std::fmt::Display| Failed::Transport(format!("Get \"{url}\": {error}"));
    let secure = url.scheme_str() == Some("https");
    let host = url.host().unwrap_or_default().trim_matches(['[', ']']);
    let port = url.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let stream = dial(host, port).await.map_err(|error| failed(&error))?;
    let response = if secure {
        let name = rustls::pki_types::ServerName::try_from(host.to_owned()).map_err(|error| failed(&error))?;
        let stream = unverified().map_err(|error| failed(&error))?.connect(name, stream).await.map_err(|error| {
            let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            if matches!(tls, Some(rustls::Error::InvalidMessage(_))) {
                Failed::PlainHttp(url.to_string())
            } else {
                failed(&error)
            }
        })?;
        exchange(stream, url, headers).await
    } else {
        exchange(stream, url, headers).await
    };
    response.map_err(|error| {
        let cause = root_cause(&error);
        failed(&cause)
    })
}

async fn exchange<S>(stream: S, url: &Uri, headers: &HeaderMap) -> Result<(Answer, Option<String>), hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.headers_mut() = headers.clone();
    if !headers.contains_key(HOST)
        && let Some(authority) = url.authority()
        && let Ok(value) = HeaderValue::from_str(authority.as_str())
    {
        request.headers_mut().insert(HOST, value);
    }
    *request.uri_mut() = url.path_and_query().map_or_else(|| Uri::from_static("/"), |path| Uri::from(path.clone()));
    let work = async move {
        let response = sender.send_request(request).await?;
        let location = location(&response);
        let status = response.status().as_u16();
        Ok((Answer { status, body: body(response).await }, location))
    };
    tokio::pin!(work);
    tokio::select! {
        biased;
        answer = &mut work => answer,
        // The connection may end before the answer is read; what it had is still there.
        _ = connection => work.await,
    }
}

fn location(response: &Response<Incoming>) -> Option<String> {
    let follows = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
    let location = response.headers().get(LOCATION).filter(|_| follows)?;
    location.to_str().ok().map(str::to_owned)
}

/// The beginning of a body; one that breaks off is as good as its beginning.
async fn body(response: Response<Incoming>) -> Vec<u8> {
    let mut body = response.into_body();
    let mut read = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        if let Some(data) = frame.data_ref() {
            let room = OUTPUT_LIMIT - read.len();
            read.extend_from_slice(&data[..data.len().min(room)]);
            if read.len() == OUTPUT_LIMIT {
                break;
            }
        }
    }
    read
}

/// Where a `Location` leads from here; `None` when it is no HTTP address.
fn resolve(from: &Uri, location: &str) -> Option<Uri> {
    let location = location.split('#').next().unwrap_or_default();
    let base = || Some(format!("{}://{}", from.scheme_str()?, from.authority()?));
    let url = if location.contains("://") {
        location.to_owned()
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{}://{rest}", from.scheme_str()?)
    } else if location.starts_with('/') {
        base()? + location
    } else if location.starts_with('?') {
        base()? + from.path() + location
    } else {
        let directory = from.path().rsplit_once('/').map_or("", |(directory, _)| directory);
        format!("{}{directory}/{location}", base()?)
    };
    let url: Uri = url.parse().ok()?;
    matches!(url.scheme_str(), Some("http" | "https")).then_some(url)
}

/// The URL of an HTTP action.
pub(crate) fn url(target: &Target<'_>, action: &HTTPGetAction) -> Result<Uri, String> {
    let scheme = action.scheme.as_deref().unwrap_or("HTTP").to_lowercase();
    let host = host(target, action.host.as_deref())?;
    let port = port(target, &action.port)?;
    let path = action.path.as_deref().unwrap_or("/");
    let slash = if path.starts_with('/') { "" } else { "/" };
    let path = escape(path);
    let url = format!("{scheme}://{}{slash}{path}", join(&host, port));
    url.parse().map_err(|error| format!("invalid URL {url:?}: {error}"))
}

/// What may not be in a request line as it is.
fn escape(path: &str) -> String {
    let mut escaped = String::with_capacity(path.len());
    for character in path.split('#').next().unwrap_or_default().chars() {
        if character.is_ascii_graphic() && !matches!(character, '"' | '<' | '>' | '\\' | '^' | '`' | '{' | '|' | '}') {
            escaped.push(character);
        } else {
            let mut buffer = [0; 4];
            for byte in character.encode_utf8(&mut buffer).bytes() {
                escaped.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    escaped
}

/// The headers of an HTTP action; an empty value takes a default one away.
pub(crate) fn headers(wanted: &[HTTPHeader], agent: &'static str) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    let mut agent_given = false;
    let mut accept_given = false;
    for header in wanted {
        let name = HeaderName::from_bytes(header.name.as_bytes())
            .map_err(|_| format!("invalid header field name {:?}", header.name))?;
        agent_given |= name == USER_AGENT;
        accept_given |= name == ACCEPT;
        if header.value.is_empty() && (name == USER_AGENT || name == ACCEPT || name == HOST) {
            continue;
        }
        let value = HeaderValue::from_str(&header.value)
            .map_err(|_| format!("invalid header field value for {:?}", header.name))?;
        if name == HOST {
            headers.insert(name, value);
        } else {
            headers.append(name, value);
        }
    }
    if !agent_given {
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
    }
    if !accept_given {
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    }
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    Ok(headers)
}

fn host(target: &Target<'_>, given: Option<&str>) -> Result<String, String> {
    match (given.filter(|host| !host.is_empty()), target.pod_ip) {
        (Some(host), _) => Ok(host.trim_matches(['[', ']']).to_owned()),
        (None, Some(ip)) => Ok(ip.to_string()),
        (None, None) => Err("the pod has no IP address".to_owned()),
    }
}

fn port(target: &Target<'_>, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let ports = target.container.ports.as_deref().unwrap_or_default();
            match ports.iter().find(|port| port.name.as_deref() == Some(name)) {
                Some(port) => port.container_port,
                None => name
                    .parse()
                    .map_err(|_| format!("couldn't find port: {name:?} in container {:?}", target.container.name))?,
            }
        }
    };
    u16::try_from(number).ok().filter(|port| *port > 0).ok_or_else(|| format!("invalid port number: {number}"))
}

async fn dial(host: &str, port: u16) -> Result<TcpStream, String> {
    TcpStream::connect((host, port)).await.map_err(|error| {
        let text = match error.kind() {
            io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
            io::ErrorKind::ConnectionReset => "connection reset by peer".to_owned(),
            io::ErrorKind::HostUnreachable => "no route to host".to_owned(),
            io::ErrorKind::NetworkUnreachable => "network is unreachable".to_owned(),
            io::ErrorKind::TimedOut => "connection timed out".to_owned(),
            _ => error.to_string(),
        };
        format!("dial tcp {}: connect: {text}", join(host, port))
    })
}

/// The innermost of a chain of errors, which is the one that tells something.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

fn join(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// `$(NAME)` with the values that the spec itself gives; `$$(NAME)` stays `$(NAME)`, and what is not known stays as it is.
fn expand(argument: &str, environment: &[EnvVar]) -> String {
    let value = |name: &str| {
        let variable = environment.iter().rev().find(|variable| variable.name == name)?;
        if variable.value_from.is_some() { None } else { Some(variable.value.as_deref().unwrap_or_default()) }
    };
    super::expand::expand(argument, value)
}

/// TLS that trusts anyone: a probe asks whether something answers, not who.
fn unverified() -> Result<TlsConnector, rustls::Error> {
    static CONFIG: OnceLock<Arc<rustls::ClientConfig>> = OnceLock::new();
    if let Some(config) = CONFIG.get() {
        return Ok(TlsConnector::from(Arc::clone(config)));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Anyone(Arc::clone(&provider)));
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::clone(CONFIG.get_or_init(|| Arc::new(config)))))
}

#[derive(Debug)]
struct Anyone(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
