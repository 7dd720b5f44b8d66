//! Clients that speak WebSockets to a node's port themselves. The apiserver makes SPDY of kubectl's, so that they alone come to the runtime as
//! what they are.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::Value;
use skerry_tests::cloudcore::kubelet_address;
use skerry_tests::peer::{Identity, connect};
use skerry_tests::wait::{patience, until};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::Message;

use super::cuts::{BOUND, PASSING};
use super::{FAR, TRANSPORTS, start_pod};
use crate::world::{World, control, story};

const V4: &str = "v4.channel.k8s.io";
/// With a message that ends a channel.
const V5: &str = "v5.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
/// How a command ended.
const STATUS: u8 = 3;
/// Of v5: the channel that follows ends.
const END: u8 = 255;
/// Of what is forwarded: the first port's bytes.
const DATA: u8 = 0;

#[test]
fn websockets_reach_the_runtime_as_they_are() -> Result<()> {
    story("ops-websockets", |world| {
        if !control()?.is_ours() {
            eprintln!("skipped: whom the cluster of $KUBECONFIG believes is not ours to say");
            return Ok(());
        }
        start_pod(world)?;
        let pair = control()?.authority()?.client(world.dir(), "socket", "admin", &["system:masters"])?;
        let [certificate, key] = [&pair.certificate, &pair.key].map(fs::read_to_string);
        let identity = Identity { certificate: certificate?, key: key? };
        for transport in TRANSPORTS {
            world.carry_over(transport)?;
            world.relay.set(|line| line.latency = FAR);
            told(world, &identity).with_context(|| format!("over {transport}"))?;
        }
        Ok(())
    })
}

fn told(world: &World, identity: &Identity) -> Result<()> {
    let open = |path: &str, protocol| Socket::open(world, identity, path, protocol);
    answers(open(&exec(world, "read%20line;echo%20heard%20$line;exit%207"), V4)?)?;
    match open(&exec(world, "cat;exit%207"), V5) {
        Ok(socket) => ends_its_input(socket)?,
        Err(error) => unspoken(&error)?,
    }
    serves(&mut open(&forward(world), V4)?)?;
    match open(&exec(world, "true"), "v9.channel.k8s.io") {
        Ok(_) => bail!("any protocol is spoken"),
        Err(error) => unspoken(&error)?,
    }

    let mut cat = open(&exec(world, "cat"), V4)?;
    cat.say(STDIN, b"hello\n")?;
    cat.hears(STDOUT, "hello\n")?;
    let mut forwarded = open(&forward(world), V4)?;
    serves(&mut forwarded)?;
    world.relay.cut();
    let begin = Instant::now();
    for (socket, is_command) in [(&mut cat, true), (&mut forwarded, false)] {
        let (heard, reason) = socket.ends(begin)?;
        let status: Option<Value> = serde_json::from_slice(&heard[usize::from(STATUS)]).ok();
        let after = begin.elapsed().as_secs_f64();
        eprintln!("after {after:.1} s: {reason:?}, {status:?}");
        ensure!(reason.contains("broke off"), "it was closed with {reason:?}");
        let says_why = status.is_some_and(|status| {
            status["status"] == "Failure" && status["message"].as_str().is_some_and(|text| text.contains("broke off"))
        });
        ensure!(says_why == is_command, "the command's status: {heard:?}");
    }
    world.relay.heal();
    until("the next try to work", 60, || {
        answers(open(&exec(world, "read%20line;echo%20heard%20$line;exit%207"), V4)?)?;
        serves(&mut open(&forward(world), V4)?)?;
        Ok(true)
    })
}

/// Only that the runtime does not speak a protocol is no fault.
fn unspoken(error: &anyhow::Error) -> Result<()> {
    let is_refusal = match error.downcast_ref() {
        Some(Error::Http(answer)) => answer.status().is_client_error(),
        Some(Error::Protocol(ProtocolError::SecWebSocketSubProtocolError(_))) => true,
        _ => false,
    };
    ensure!(is_refusal, "no WebSocket, for another reason than its protocol: {error:#}");
    Ok(())
}

/// A command in a shell, in the characters of a query.
fn exec(world: &World, script: &str) -> String {
    let namespace = world.kubectl.namespace();
    format!("/exec/{namespace}/ops/box?command=sh&command=-c&command={}&input=1&output=1", script.replace(';', "%3B"))
}

fn forward(world: &World) -> String {
    format!("/portForward/{}/ops?port=8080", world.kubectl.namespace())
}

fn answers(mut socket: Socket) -> Result<()> {
    socket.say(STDIN, b"hello\n")?;
    exits_with_7(socket, "heard hello\n")
}

fn ends_its_input(mut socket: Socket) -> Result<()> {
    socket.say(STDIN, b"hello\n")?;
    socket.say(END, &[STDIN])?;
    exits_with_7(socket, "hello\n")
}

fn exits_with_7(mut socket: Socket, said: &str) -> Result<()> {
    let (heard, _) = socket.ends(Instant::now())?;
    ensure!(heard[usize::from(STDOUT)] == said.as_bytes(), "{heard:?}");
    let status: Value = serde_json::from_slice(&heard[usize::from(STATUS)]).context("no status")?;
    let cause = &status["details"]["causes"][0];
    ensure!(
        status["reason"] == "NonZeroExitCode" && cause["reason"] == "ExitCode" && cause["message"] == "7",
        "{status}"
    );
    Ok(())
}

fn serves(socket: &mut Socket) -> Result<()> {
    socket.say(DATA, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")?;
    socket.hears(DATA, "HTTP/1.1 200")
}

/// A client's end.
struct Socket {
    runtime: Runtime,
    socket: WebSocketStream<TlsStream<TcpStream>>,
}

/// What came in each channel.
type Heard = [Vec<u8>; 4];

impl Socket {
    fn open(world: &World, identity: &Identity, path: &str, protocol: &'static str) -> Result<Self> {
        let address = SocketAddr::new(kubelet_address(), world.port()?);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut request = format!("wss://{address}{path}").into_client_request()?;
        request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(protocol));
        let (socket, _) = runtime.block_on(async {
            let opening = async {
                let stream = connect(address, Some(identity)).await?;
                Ok::<_, anyhow::Error>(tokio_tungstenite::client_async(request, stream).await?)
            };
            tokio::time::timeout(patience(20), opening).await.context("no WebSocket within 20 s")?
        })?;
        Ok(Self { runtime, socket })
    }

    fn say(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let message = Message::Binary([&[channel], bytes].concat().into());
        Ok(self.runtime.block_on(self.socket.send(message))?)
    }

    /// The next message; `None` when there is no more.
    fn next(&mut self, limit: Duration) -> Result<Option<Message>> {
        let Self { runtime, socket } = self;
        let next = runtime.block_on(async { tokio::time::timeout(limit, socket.next()).await });
        let next = next.with_context(|| format!("nothing came for {} s", limit.as_secs()))?;
        // Without a Close the connection just ends.
        Ok(next.and_then(Result::ok))
    }

    /// Waits for this text in a channel.
    fn hears(&mut self, channel: u8, text: &str) -> Result<()> {
        let mut heard = String::new();
        while !heard.contains(text) {
            match self.next(patience(20)).with_context(|| format!("waiting for {text:?}, heard {heard:?}"))? {
                Some(Message::Binary(bytes)) if bytes.first() == Some(&channel) => {
                    heard += &String::from_utf8_lossy(&bytes[1..]);
                }
                Some(Message::Close(close)) => bail!("closed with {close:?} after {heard:?}"),
                Some(_) => {}
                None => bail!("ended after {heard:?}"),
            }
        }
        Ok(())
    }

    /// Waits for the end, within the link's bound since `begin`; what came until then, and the reason that was given.
    fn ends(&mut self, begin: Instant) -> Result<(Heard, String)> {
        let mut heard = Heard::default();
        loop {
            match self.next(patience(BOUND + PASSING).saturating_sub(begin.elapsed()))? {
                Some(Message::Binary(bytes)) => {
                    let [channel, bytes @ ..] = &bytes[..] else { bail!("a message without a channel") };
                    heard.get_mut(usize::from(*channel)).context("an unknown channel")?.extend(bytes);
                }
                Some(Message::Close(close)) => {
                    return Ok((heard, close.map_or_else(String::new, |close| close.reason.to_string())));
                }
                Some(_) => {}
                None => return Ok((heard, String::new())),
            }
        }
    }
}
