//! `edgecore exec` and `edgecore attach`: a process in a container, with its streams, its terminal and its exit code.

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use bytes::{Bytes, BytesMut};
use clap::Args;
use serde_json::{Value, json};
use skerry_proto::ops::percent_encode;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;

use super::node::{Node, Pod};
use super::spdy::{Event, Parser, Writer};
use super::terminal::{self, Raw, Size};
use super::{DataDir, note};

const PROTOCOL: &str = "v4.channel.k8s.io";
/// What a status may be long.
const MAX_STATUS: usize = 64 << 10;

/// Run a command in a container. It works with no cloud, as long as edgecore runs; the exit code is the command's.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  edgecore exec web -- ls /tmp                       run a command in the only container of pod web
  edgecore exec -it web -n shop -c proxy -- sh       a shell, at this terminal
  tar cf - conf | edgecore exec -i web -- tar xf -   give it what it reads")]
pub(super) struct Exec {
    #[command(flatten)]
    target: Target,
    /// The command and its arguments, after `--`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Take part in what a container's own process says and hears. Ends when the process does, or with ^C.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  edgecore attach web                see what the only container of pod web says from now on
  edgecore attach -it web -n shop    speak to it at this terminal (its spec has stdin and tty)")]
pub(super) struct Attach {
    #[command(flatten)]
    target: Target,
}

#[derive(Args, Debug)]
struct Target {
    /// The pod, as `edgecore get pods` shows it.
    pod: String,
    /// Its namespace; unless given `default`, or the only one that has a pod of this name here.
    #[arg(short, long)]
    namespace: Option<String>,
    /// The container; the pod's default or first one unless given.
    #[arg(short, long)]
    container: Option<String>,
    /// Give it what is typed or piped in here.
    #[arg(short = 'i', long)]
    stdin: bool,
    /// With a terminal.
    #[arg(short, long)]
    tty: bool,
    #[command(flatten)]
    data: DataDir,
}

impl Exec {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let mut target = self.target;
        if target.tty && !(target.stdin && terminal::is_typed_at()) {
            note("Unable to use a TTY - input is not a terminal or the right kind of file");
            target.tty = false;
        }
        let (node, pod, container) = target.find().await?;
        let command: String = self.command.iter().map(|word| format!("command={}&", percent_encode(word))).collect();
        let path = format!("{}?{command}{}", pod.path("exec", Some(&container)), streams(target.stdin, target.tty));
        talk(&node, &path, target.stdin, target.tty).await
    }
}

impl Attach {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let target = self.target;
        let (node, pod, container) = target.find().await?;
        let spec = pod.containers().find(|spec| spec["name"] == *container).cloned().unwrap_or_default();
        let has_terminal = spec["tty"] == true;
        if target.tty && !has_terminal {
            note(&format!("Unable to use a TTY - container {container} did not allocate one"));
        }
        if target.stdin && spec["stdin"] != true {
            bail!(
                "container {container:?} does not read what is typed: its spec has no `stdin: true`; attach without -i"
            );
        }
        let path = pod.path("attach", Some(&container));
        let path = format!("{path}?{}", streams(target.stdin, has_terminal));
        if target.stdin && terminal::is_typed_at() {
            note("If you don't see a command prompt, try pressing enter.");
        }
        talk(&node, &path, target.stdin, has_terminal).await
    }
}

impl Target {
    async fn find(&self) -> anyhow::Result<(Node, Pod, String)> {
        let node = Node::of(&self.data)?;
        let pod = node.pod(self.namespace.as_deref(), &self.pod).await?;
        let container = pod.container(self.container.as_deref())?;
        Ok((node, pod, container))
    }
}

fn streams(stdin: bool, tty: bool) -> String {
    let flag = |name: &str, wanted: bool| if wanted { format!("&{name}=1") } else { String::new() };
    format!("output=1{}{}{}", flag("input", stdin), flag("error", !tty), flag("tty", tty))
}

async fn talk(node: &Node, path: &str, stdin: bool, tty: bool) -> anyhow::Result<ExitCode> {
    let io = node.upgrade(path, PROTOCOL).await?;
    let raw = (tty && stdin && terminal::is_typed_at()).then(Raw::new).transpose();
    let raw = raw.context("the terminal cannot be made raw")?;
    let input = if stdin { Some(terminal::input()?) } else { None };
    let sizes = if tty { Some(terminal::sizes()?) } else { None };
    let session = session(io, input, sizes, tty, show);
    if raw.is_none() {
        return session.await;
    }
    // A process that is just ended leaves the terminal as it is: without an echo, for whoever types next.
    tokio::select! {
        ended = session => ended,
        signal = terminal::told_to_end() => Ok(ExitCode::from(128 + u8::try_from(signal?.as_raw_value())?)),
    }
}

fn show(is_error: bool, data: &[u8]) -> io::Result<()> {
    if is_error {
        return io::stderr().write_all(data);
    }
    let mut out = io::stdout().lock();
    out.write_all(data).and_then(|()| out.flush())
}

/// Carries the streams until the process has ended, and says how it did.
async fn session(
    io: impl AsyncRead + AsyncWrite,
    mut input: Option<mpsc::Receiver<Bytes>>,
    sizes: Option<mpsc::Receiver<Size>>,
    tty: bool,
    mut show: impl FnMut(bool, &[u8]) -> io::Result<()>,
) -> anyhow::Result<ExitCode> {
    let (mut reader, mut writer) = tokio::io::split(io);
    let (mut frames, mut waiting) = (Writer::default(), Vec::new());
    let mut open =
        |kind: &str, wanted: bool, waiting: &mut Vec<u8>| wanted.then(|| frames.open(&[("streamtype", kind)], waiting));
    let status = open("error", true, &mut waiting);
    let stdin = open("stdin", input.is_some(), &mut waiting);
    let stdout = open("stdout", true, &mut waiting);
    let stderr = open("stderr", !tty, &mut waiting);
    let resize = open("resize", tty, &mut waiting);
    let mut sizes = sizes.filter(|_| resize.is_some());

    let (mut parser, mut come, mut said) = (Parser::default(), BytesMut::with_capacity(32 << 10), Vec::new());
    let mut open: Vec<u32> = [status, stdout, stderr].into_iter().flatten().collect();
    while !open.is_empty() {
        while let Some(event) = parser.next(&mut come)? {
            match event {
                Event::Data(stream, data) if Some(stream) == status => {
                    if said.len() + data.len() <= MAX_STATUS {
                        said.extend_from_slice(&data);
                    }
                }
                Event::Data(stream, data) if Some(stream) == stdout || Some(stream) == stderr => {
                    if show(Some(stream) == stderr, &data).is_err() {
                        // Who read it has gone (`| head`).
                        return Ok(ExitCode::SUCCESS);
                    }
                }
                Event::Data(..) | Event::GoAway => {}
                Event::End(stream) | Event::Reset(stream) => open.retain(|of| *of != stream),
                Event::Ping(id) => Writer::ping(id, &mut waiting),
            }
        }
        if open.is_empty() {
            break;
        }
        // What waits goes before more is taken.
        let idle = waiting.is_empty();
        tokio::select! {
            read = reader.read_buf(&mut come) => {
                if read.context("the session broke off")? == 0 {
                    break;
                }
            }
            written = writer.write(&waiting), if !idle => {
                waiting.drain(..written.context("the session broke off")?);
            }
            data = next(&mut input), if idle && input.is_some() => {
                let stdin = stdin.unwrap_or_default();
                match data {
                    Some(data) => Writer::data(stdin, &data, &mut waiting),
                    None => {
                        input = None;
                        Writer::end(stdin, &mut waiting);
                    }
                }
            }
            size = next(&mut sizes), if idle && sizes.is_some() => match (size, resize) {
                (Some((columns, rows)), Some(resize)) => {
                    let size = json!({ "Width": columns, "Height": rows }).to_string();
                    Writer::data(resize, size.as_bytes(), &mut waiting);
                }
                _ => sizes = None,
            },
        }
    }
    outcome(&said)
}

async fn next<T>(receiver: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    match receiver {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

/// How a process ended, by the status that came on the error stream.
fn outcome(said: &[u8]) -> anyhow::Result<ExitCode> {
    let status: Value = serde_json::from_slice(said).map_err(|_| {
        anyhow::anyhow!("the session broke off before the command had ended; see whether the container still runs")
    })?;
    if status["status"] == "Success" {
        return Ok(ExitCode::SUCCESS);
    }
    let causes = status["details"]["causes"].as_array();
    let code = causes.into_iter().flatten().find(|cause| cause["reason"] == "ExitCode");
    let code = code.and_then(|cause| cause["message"].as_str()?.parse::<u8>().ok());
    match code {
        Some(code) => {
            note(&format!("command terminated with exit code {code}"));
            Ok(ExitCode::from(code))
        }
        None => bail!("{}", status["message"].as_str().unwrap_or("the command failed, and nothing says why")),
    }
}

#[cfg(test)]
mod tests;
