//! `edgecore port-forward`: ports of this box that lead to ports of a pod. Each connection has a session of its own with the runtime.

use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;

use anyhow::Context as _;
use bytes::BytesMut;
use clap::Args;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::DataDir;
use super::node::Node;
use super::spdy::{Event, MAX_DATA, Parser, Writer};
use crate::supervise;

const PROTOCOL: &str = "portforward.k8s.io";
/// Connections of one port at once; the next waits.
const MAX_CONNECTIONS: usize = 64;
const MAX_ERROR: usize = 4 << 10;

/// Make ports of a pod reachable on this box's loopback, until ^C. It works with no cloud, as long as edgecore runs.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  edgecore port-forward web 8080:80     localhost:8080 leads to port 80 of pod web
  edgecore port-forward web 80 443      the same ports on both sides
  edgecore port-forward web :80 -n shop any free port of this box, which is then said")]
pub(super) struct PortForward {
    /// The pod, as `edgecore get pods` shows it.
    pod: String,
    /// [LOCAL:]REMOTE; without LOCAL the same, with an empty one any that is free.
    #[arg(required = true, value_name = "[LOCAL:]REMOTE", value_parser = ports)]
    ports: Vec<(u16, u16)>,
    /// Its namespace; unless given `default`, or the only one that has a pod of this name here.
    #[arg(short, long)]
    namespace: Option<String>,
    #[command(flatten)]
    data: DataDir,
}

impl PortForward {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let node = Node::of(&self.data)?;
        let pod = node.pod(self.namespace.as_deref(), &self.pod).await?;
        let path = pod.path("portForward", None);
        let mut tasks = Vec::new();
        for (local, remote) in self.ports {
            for listener in listen(local).await? {
                let at = listener.local_addr()?;
                super::print(&format!("Forwarding from {at} -> {remote}\n"));
                tasks.push(supervise::spawn("forward", serve(listener, node.clone(), path.clone(), remote)));
            }
        }
        for task in tasks {
            task.await?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn ports(text: &str) -> Result<(u16, u16), String> {
    let port = |text: &str| {
        let port = text.parse::<u16>().ok().filter(|port| *port > 0);
        port.ok_or_else(|| format!("{text:?} is not a port, which is a number from 1 to 65535"))
    };
    match text.split_once(':') {
        None => port(text).map(|port| (port, port)),
        Some(("", remote)) => Ok((0, port(remote)?)),
        Some((local, remote)) => Ok((port(local)?, port(remote)?)),
    }
}

/// On the loopback of both families, or of the one that there is.
async fn listen(port: u16) -> anyhow::Result<Vec<TcpListener>> {
    let first = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
    let first = first.with_context(|| format!("cannot listen on 127.0.0.1:{port}; take another LOCAL port"))?;
    let same = SocketAddr::from((Ipv6Addr::LOCALHOST, first.local_addr()?.port()));
    let second = TcpListener::bind(same).await.ok();
    Ok([Some(first), second].into_iter().flatten().collect())
}

async fn serve(listener: TcpListener, node: Node, path: String, remote: u16) {
    let places = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
    while let Ok(place) = std::sync::Arc::clone(&places).acquire_owned().await {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                let _ = writeln!(io::stderr(), "error: no connection can be taken: {error}");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                continue;
            }
        };
        super::print(&format!("Handling connection for {}\n", stream.local_addr().map_or(0, |at| at.port())));
        let (node, path) = (node.clone(), path.clone());
        supervise::spawn("connection", async move {
            let forwarded = async {
                let io = node.upgrade(&path, PROTOCOL).await?;
                forward(stream, io, remote).await
            };
            if let Err(error) = Box::pin(forwarded).await {
                let _ = writeln!(io::stderr(), "error: port {remote}: {error:#}");
            }
            drop(place);
        });
    }
}

/// Carries one connection until both its halves have ended.
async fn forward(
    local: impl AsyncRead + AsyncWrite,
    runtime: impl AsyncRead + AsyncWrite,
    remote: u16,
) -> anyhow::Result<()> {
    let (mut from_local, mut to_local) = tokio::io::split(local);
    let (mut from_runtime, mut to_runtime) = tokio::io::split(runtime);
    let (mut frames, mut first) = (Writer::default(), Vec::new());
    let port = remote.to_string();
    let mut open = |kind: &str| frames.open(&[("streamtype", kind), ("port", &port), ("requestid", "0")], &mut first);
    let (errors, data) = (open("error"), open("data"));
    Writer::end(errors, &mut first);
    let (ping, mut pings) = mpsc::channel(4);

    let up = async {
        to_runtime.write_all(&first).await?;
        let mut buffer = vec![0; MAX_DATA];
        let mut out = Vec::with_capacity(MAX_DATA + 8);
        let mut ended = false;
        loop {
            out.clear();
            tokio::select! {
                read = from_local.read(&mut buffer), if !ended => match read? {
                    0 => {
                        ended = true;
                        Writer::end(data, &mut out);
                    }
                    read => Writer::data(data, &buffer[..read], &mut out),
                },
                id = pings.recv() => match id {
                    Some(id) => Writer::ping(id, &mut out),
                    None => return Ok::<(), io::Error>(()),
                },
            }
            to_runtime.write_all(&out).await?;
        }
    };
    let down = async {
        let (mut parser, mut come, mut said) = (Parser::default(), BytesMut::with_capacity(32 << 10), Vec::new());
        let mut open = true;
        'over: loop {
            while let Some(event) = parser.next(&mut come)? {
                match event {
                    Event::Data(stream, piece) if stream == data => to_local.write_all(&piece).await?,
                    Event::Data(_, piece) if said.len() + piece.len() <= MAX_ERROR => said.extend_from_slice(&piece),
                    Event::Data(..) => {}
                    Event::End(stream) if stream == data => {
                        open = false;
                        to_local.shutdown().await?;
                    }
                    // The pod's side is done with it.
                    Event::End(_) | Event::Reset(_) | Event::GoAway => break 'over,
                    // Of more than a few at once one is enough.
                    Event::Ping(id) => drop(ping.try_send(id)),
                }
            }
            if from_runtime.read_buf(&mut come).await? == 0 {
                break;
            }
        }
        if open {
            to_local.shutdown().await?;
        }
        anyhow::ensure!(said.is_empty(), "{}", String::from_utf8_lossy(&said));
        Ok::<(), anyhow::Error>(())
    };
    tokio::select! {
        ended = up => ended.context("the connection broke off"),
        ended = down => ended,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_as_kubectl_takes_them() {
        assert_eq!((ports("80"), ports("8080:80"), ports(":80")), (Ok((80, 80)), Ok((8080, 80)), Ok((0, 80))));
        for wrong in ["", "0", "x:80", "80:", "70000", "1:2:3"] {
            assert!(ports(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn both_halves_of_a_connection_are_carried() {
        let (mut client, local) = tokio::io::duplex(1000);
        let (runtime, mut server) = tokio::io::duplex(1000);
        let frame = |stream: u8, fin: u8, data: &[u8]| {
            [&[0, 0, 0, stream, fin, 0, 0, u8::try_from(data.len()).unwrap()][..], data].concat()
        };
        let serve = async {
            client.write_all(b"ask").await.unwrap();
            client.shutdown().await.unwrap();
            let (mut heard, last) = (Vec::new(), [frame(3, 0, b"ask"), frame(3, 1, b"")].concat());
            while !heard.ends_with(&last) {
                assert!(server.read_buf(&mut heard).await.unwrap() > 0);
            }
            assert!(heard.windows(2).any(|part| part == b"80"));
            server.write_all(&[frame(3, 0, b"answer"), frame(3, 1, b""), frame(1, 1, b"")].concat()).await.unwrap();
            let mut got = String::new();
            client.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, "answer");
        };
        let (forwarded, ()) = tokio::join!(forward(local, runtime, 80), serve);
        forwarded.unwrap();

        let (_client, local) = tokio::io::duplex(1000);
        let (runtime, mut server) = tokio::io::duplex(1000);
        let refuse = async { server.write_all(&[frame(1, 0, b"refused"), frame(1, 1, b"")].concat()).await.unwrap() };
        let (forwarded, ()) = tokio::join!(forward(local, runtime, 80), refuse);
        assert_eq!(forwarded.unwrap_err().to_string(), "refused");
    }
}
