//! Exec, attach and port-forward are the runtime's to serve: the request goes to the one-time URL that it gave, on this box only, and once
//! both sides have changed their protocol bytes are copied both ways. What they say to each other is not looked at.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper::header::{self, HeaderMap};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader, copy_buf};
use tokio::net::TcpStream;

use super::answer::{Answer, Refusal, empty, whole};

/// What the runtime may take to connect and answer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a refusal of the runtime's that are passed on.
const MAX_REFUSAL: usize = 64 << 10;
/// Bytes that are on their way in each direction.
const BUFFER: usize = 16 << 10;
/// What the asking side has to say yet when the runtime has ended.
const LINGER: Duration = Duration::from_secs(1);
/// How long the runtime may be silent when nothing goes to it any more: what has a terminal does not end by itself. Twice this has to be well
/// within the second that a session may outlive its other end.
const HANGUP: Duration = Duration::from_millis(250);
/// How long what it said may wait then for the asking side to take some of it: the link may be slow.
const STALLED: Duration = Duration::from_secs(30);

/// What comes after the answer to a request that wanted to change the protocol.
#[derive(Debug)]
pub(super) struct Relay {
    pub(super) client: OnUpgrade,
    /// The other end, if it was granted.
    pub(super) runtime: Option<Upgraded>,
}

/// Whether a request wants to change the protocol.
pub(super) fn wants_upgrade(headers: &HeaderMap) -> bool {
    let connection = headers.get_all(header::CONNECTION);
    connection.iter().any(|value| value.as_bytes().to_ascii_lowercase().windows(7).any(|part| part == b"upgrade"))
}

/// Makes the request of the runtime. The answer is the runtime's own; with 101 comes its end of what is to be relayed.
pub(super) async fn open<B>(request: &Request<B>, url: &str) -> Result<(Answer, Option<Upgraded>), Refusal> {
    let (to, target) = target(url).map_err(Refusal::failed)?;
    let asked = tokio::time::timeout(TIMEOUT, ask(to, &target, request.method(), request.headers())).await;
    let no_answer = |why: String| {
        Refusal::failed(format!("the container runtime's streaming server at {to} does not answer: {why}"))
    };
    let (head, rest) = match asked {
        Ok(asked) => asked.map_err(|error| no_answer(error.to_string()))?,
        Err(_) => return Err(no_answer(format!("nothing within {} s", TIMEOUT.as_secs()))),
    };
    match rest {
        Rest::Upgraded(runtime) => {
            let mut answer = Response::new(empty());
            *answer.status_mut() = head.status();
            *answer.headers_mut() = without_framing(head.headers());
            Ok((answer, Some(runtime)))
        }
        Rest::Body(body) if head.status().as_u16() >= 400 => {
            let mut answer = whole("text/plain; charset=utf-8", body);
            *answer.status_mut() = head.status();
            answer.headers_mut().extend(without_framing(head.headers()));
            Ok((answer, None))
        }
        Rest::Body(_) => {
            Err(Refusal::failed(format!("invalid upgrade response: status code {}", head.status().as_u16())))
        }
    }
}

impl Relay {
    /// Copies until both sides have ended, or one has failed: then both are closed. Where nothing was granted, ends the connection in good
    /// order, which the server leaves to whoever wanted the upgrade.
    pub(super) async fn run(self) -> io::Result<()> {
        // An error is a connection that the server has ended already.
        let Ok(client) = self.client.await else { return Ok(()) };
        match self.runtime {
            Some(runtime) => copy(TokioIo::new(client), TokioIo::new(runtime)).await,
            None => TokioIo::new(client).shutdown().await,
        }
    }
}

/// Where what the runtime says is.
#[derive(Debug, Default)]
struct Telling {
    /// Some of it was read or taken since that was asked last.
    moved: AtomicBool,
    /// It waits for the asking side to take it.
    waits: AtomicBool,
}

/// Copies both ways. The end of one direction is passed on, and the other goes on; also when what is said to the process is not taken any
/// more: how it ended is still to come, as long as that takes. Streams end one by one in what both sides speak; the end of the connection
/// is a client that has hung up, and what has nothing to say to it then is left.
async fn copy(client: impl AsyncRead + AsyncWrite, runtime: impl AsyncRead + AsyncWrite) -> io::Result<()> {
    let (from_client, to_client) = tokio::io::split(client);
    let (from_runtime, to_runtime) = tokio::io::split(runtime);
    let telling = Telling::default();
    let mut up = pin!(pump(from_client, to_runtime));
    let mut down = pin!(told(from_runtime, to_client, &telling));
    tokio::select! {
        ended = &mut up => {
            let mut still = Duration::ZERO;
            loop {
                if let Ok(ended) = tokio::time::timeout(HANGUP, &mut down).await {
                    return ended;
                }
                still = if telling.moved.swap(false, Ordering::Relaxed) { Duration::ZERO } else { still + HANGUP };
                if still >= if telling.waits.load(Ordering::Relaxed) { STALLED } else { HANGUP } {
                    return ended;
                }
            }
        }
        ended = &mut down => {
            ended?;
            // The process is gone: who asked has read so, and hangs up.
            tokio::time::timeout(LINGER, up).await.unwrap_or(Ok(()))
        }
    }
}

/// What the runtime says, to its end. It closes with input unread when a process ends before its input does, which is a reset behind the last
/// that it said: that is no less the end, and what came before it is to arrive. Whether a command said how it went is looked at
/// by cloudcore and by `edgecore exec`, who know its frames.
async fn told(from: impl AsyncRead, to: impl AsyncWrite, telling: &Telling) -> io::Result<()> {
    let (mut from, mut to) = (pin!(BufReader::with_capacity(BUFFER, from)), pin!(to));
    let copied = loop {
        let said = match from.fill_buf().await {
            Ok([]) => break Ok(()),
            Ok(said) => said,
            Err(error) => break Err(error),
        };
        telling.moved.store(true, Ordering::Relaxed);
        telling.waits.store(true, Ordering::Relaxed);
        match to.write(said).await {
            Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
            Ok(taken) => from.as_mut().consume(taken),
            Err(error) => break Err(error),
        }
        telling.moved.store(true, Ordering::Relaxed);
        telling.waits.store(false, Ordering::Relaxed);
    };
    // Fails if it was this side that failed.
    to.shutdown().await?;
    match copied {
        Err(error) if error.kind() != io::ErrorKind::ConnectionReset => Err(error),
        _ => Ok(()),
    }
}

async fn pump(from: impl AsyncRead, to: impl AsyncWrite) -> io::Result<()> {
    let (mut from, mut to) = (pin!(BufReader::with_capacity(BUFFER, from)), pin!(to));
    copy_buf(&mut from, &mut to).await?;
    to.shutdown().await
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

enum Rest {
    Upgraded(Upgraded),
    Body(Bytes),
}

async fn ask(
    to: SocketAddr,
    target: &str,
    method: &Method,
    headers: &HeaderMap,
) -> Result<(Response<()>, Rest), Failed> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.method_mut() = method.clone();
    *request.uri_mut() = target.parse()?;
    *request.headers_mut() = without_framing(headers);
    request.headers_mut().insert(header::HOST, to.to_string().parse()?);
    let (mut sender, connection) =
        http1::Builder::new().max_buf_size(MAX_REFUSAL).handshake(TokioIo::new(stream)).await?;
    let exchange = async {
        let mut response = sender.send_request(request).await?;
        let rest = if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            Rest::Upgraded(hyper::upgrade::on(&mut response).await?)
        } else {
            Rest::Body(Limited::new(response.body_mut(), MAX_REFUSAL).collect().await?.to_bytes())
        };
        Ok::<_, Failed>((response.map(drop), rest))
    };
    let (mut exchange, mut connection) = (pin!(exchange), pin!(connection.with_upgrades()));
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        ended = &mut connection => {
            ended?;
            // All has come that ever will.
            exchange.await
        }
    }
}

/// Headers but those that say whom a message is for and how long it is.
fn without_framing(headers: &HeaderMap) -> HeaderMap {
    let mut headers = headers.clone();
    for name in [header::HOST, header::CONTENT_LENGTH, header::TRANSFER_ENCODING] {
        headers.remove(name);
    }
    headers
}

/// Where a URL of the runtime's leads; only to this box.
fn target(url: &str) -> Result<(SocketAddr, String), String> {
    let remedy = "correct the streaming server's address and TLS in the runtime's configuration (containerd: stream_server_address = \"127.0.0.1\", enable_tls_streaming = false)";
    let uri: Uri = url.parse().map_err(|error| format!("the container runtime gave {url:?} to connect to: {error}"))?;
    if uri.scheme_str() != Some("http") {
        return Err(format!("the container runtime gave {url:?} to connect to, which is not plain HTTP; {remedy}"));
    }
    let host = uri.host().unwrap_or_default();
    let ip = match host.trim_start_matches('[').trim_end_matches(']') {
        "localhost" => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        host => host.parse::<IpAddr>().ok(),
    };
    let Some(ip) = ip.filter(IpAddr::is_loopback) else {
        return Err(format!(
            "the container runtime gave {url:?} to connect to, which is not on this box's loopback; {remedy}"
        ));
    };
    let target = uri.path_and_query().map_or("/", |target| target.as_str()).to_owned();
    Ok((SocketAddr::new(ip, uri.port_u16().unwrap_or(80)), target))
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn who_hangs_up_ends_what_says_nothing_and_hears_what_does() {
        let ((mut asking, client), (runtime, mut process)) = (tokio::io::duplex(64), tokio::io::duplex(64));
        let asked = async {
            asking.shutdown().await.unwrap();
            assert_eq!(process.read(&mut [0; 1]).await.unwrap(), 0, "it is not told");
            for _ in 0..6 {
                tokio::time::sleep(HANGUP / 4).await;
                process.write_all(b"more").await.unwrap();
            }
            let mut heard = String::new();
            asking.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, "more".repeat(6));
        };
        let (relayed, ()) = tokio::join!(copy(client, runtime), asked);
        relayed.unwrap();
        // It has not ended by itself.
        assert!(process.write_all(b"x").await.is_err(), "it is still read");
    }

    #[tokio::test]
    async fn what_was_said_arrives_however_slow_the_link_when_nothing_more_is_taken() {
        let said = [b'x'; 256];
        // Of a pipe whose other end is gone nothing is taken.
        let (runtime, (mut asking, client)) =
            (tokio::io::join(&said[..], tokio::io::duplex(1).0), tokio::io::duplex(64));
        let asked = async {
            asking.write_all(b"input that nobody takes").await.unwrap();
            let mut heard = [0; 256];
            for piece in heard.chunks_mut(64) {
                tokio::time::sleep(HANGUP + HANGUP / 4).await;
                asking.read_exact(piece).await.unwrap();
            }
            assert_eq!((heard, asking.read(&mut [0]).await.unwrap()), (said, 0));
        };
        // How what was said to it failed is no matter then.
        let (relayed, ()) = tokio::join!(copy(client, runtime), asked);
        relayed.unwrap();
    }

    #[tokio::test]
    async fn what_was_said_before_a_reset_arrives() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let runtime = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut process, _) = listener.accept().await.unwrap();
        let (mut asking, client) = tokio::io::duplex(1 << 10);
        let asked = async {
            asking.write_all(b"input that nobody reads").await.unwrap();
            process.readable().await.unwrap();
            process.write_all(b"how it went").await.unwrap();
            // With input unread this is a reset.
            drop(process);
            let mut heard = String::new();
            asking.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, "how it went");
            drop(asking);
        };
        let (relayed, ()) = tokio::join!(copy(client, runtime), asked);
        relayed.unwrap();
    }
}
