//! `/exec`, `/attach`, `/portForward` and `/run`: what is asked becomes a call of the runtime's.

use std::time::Duration;

use hyper::upgrade::Upgraded;
use hyper::{Request, StatusCode};
use k8s_openapi::api::core::v1::Pod;

use super::answer::{Answer, Refusal, whole};
use super::pods;
use super::query::Query;
use super::relay;
use super::route::{ContainerPath, PodPath};
use super::{MAX_RUNS, Ops};
use crate::runtime::cri::{Error, Stdio};

/// What the runtime may take to say where a stream is to be had.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a command of `/run` may take: as long as an idle stream of upstream's may stand.
const RUN_PATIENCE: Duration = Duration::from_secs(4 * 3600);

/// Runs a command, with its streams.
pub(super) async fn exec<B>(
    ops: &Ops,
    of: &ContainerPath,
    query: &Query,
    request: &Request<B>,
) -> Result<(Answer, Option<Upgraded>), Refusal> {
    let stdio = stdio(query)?;
    let (_, id) = pods::running(&ops.store, of).await?;
    must_upgrade(request)?;
    let command = query.all("command").map(str::to_owned).collect();
    relay::open(request, &promptly(ops.cri.exec(&id, command, stdio)).await?).await
}

/// Speaks to the container's own process, with a terminal if that has one.
pub(super) async fn attach<B>(
    ops: &Ops,
    of: &ContainerPath,
    query: &Query,
    request: &Request<B>,
) -> Result<(Answer, Option<Upgraded>), Refusal> {
    let mut stdio = stdio(query)?;
    let (pod, id) = pods::running(&ops.store, of).await?;
    must_upgrade(request)?;
    stdio.tty = has_terminal(&pod, &of.container);
    stdio.stderr &= !stdio.tty;
    relay::open(request, &promptly(ops.cri.attach(&id, stdio)).await?).await
}

/// Reaches ports of a pod.
pub(super) async fn port_forward<B>(
    ops: &Ops,
    of: &PodPath,
    query: &Query,
    request: &Request<B>,
) -> Result<(Answer, Option<Upgraded>), Refusal> {
    let ports = if is_websocket(request) { ports(query).map_err(Refusal::bad)? } else { Vec::new() };
    let pod = pods::pod(&ops.store, &PodPath { uid: None, ..of.clone() }).await?;
    if of.uid.is_some() && pod.metadata.uid != of.uid {
        return Err(Refusal::missing("pod not found"));
    }
    must_upgrade(request)?;
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let sandbox = promptly(ops.cri.ready_sandbox(uid)).await?;
    let sandbox = sandbox.ok_or_else(|| Refusal::failed(format!("pod not found ({:?})", of.name)))?;
    relay::open(request, &promptly(ops.cri.port_forward(&sandbox, ports)).await?).await
}

/// Runs a command to its end, and answers with what it said. Some at a time: all of that is in memory.
pub(super) async fn run(ops: &Ops, of: &ContainerPath, query: &Query) -> Result<Answer, Refusal> {
    let (_, id) = pods::running(&ops.store, of).await?;
    let Ok(_place) = ops.runs.try_acquire() else {
        let words = format!(
            "{MAX_RUNS} commands are being run on this node, which is all it takes; use exec, or try again later"
        );
        return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, words));
    };
    let command = query.first("cmd").unwrap_or_default();
    let words: Vec<String> = command.split(' ').map(str::to_owned).collect();
    let done =
        ops.cri.exec_sync(&id, &words, Some(RUN_PATIENCE)).await.map_err(|error| Refusal::failed(error.to_string()))?;
    if done.exit_code != 0 {
        let mut words = format!("command '{command}' exited with {}: ", done.exit_code);
        words += &String::from_utf8_lossy(&done.output);
        return Err(Refusal::failed(words));
    }
    Ok(whole("application/json", done.output.into()))
}

/// Asks the runtime with somebody waiting: pods' workers have more patience.
pub(super) async fn promptly<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, Refusal> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Refusal::failed(format!("the container runtime says nothing within {} s", PATIENCE.as_secs()))),
    }
}

/// Without a change of protocol there is nothing to stream on.
fn must_upgrade<B>(request: &Request<B>) -> Result<(), Refusal> {
    if relay::wants_upgrade(request.headers()) {
        return Ok(());
    }
    Err(Refusal::new(StatusCode::BAD_REQUEST, "Upgrade request required"))
}

fn stdio(query: &Query) -> Result<Stdio, Refusal> {
    let tty = query.is_one("tty");
    let stdio = Stdio {
        stdin: query.is_one("input"),
        stdout: query.is_one("output"),
        // A terminal has one stream for both.
        stderr: query.is_one("error") && !tty,
        tty,
    };
    if stdio.stdin || stdio.stdout || stdio.stderr {
        Ok(stdio)
    } else {
        Err(Refusal::bad("you must specify at least 1 of stdin, stdout, stderr"))
    }
}

fn is_websocket<B>(request: &Request<B>) -> bool {
    let upgrade = request.headers().get(hyper::header::UPGRADE);
    upgrade.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// The ports of a WebSocket, which cannot name them later.
fn ports(query: &Query) -> Result<Vec<i32>, String> {
    let mut ports = Vec::new();
    for list in query.all("port") {
        if list.is_empty() {
            return Err("query parameter \"port\" cannot be empty".to_owned());
        }
        for text in list.split(',') {
            let port: u16 = text.parse().map_err(|error| format!("unable to parse {text:?} as a port: {error}"))?;
            if port == 0 {
                return Err(format!("port {text:?} must be > 0"));
            }
            ports.push(i32::from(port));
        }
    }
    if ports.is_empty() { Err("query parameter \"port\" is required".to_owned()) } else { Ok(ports) }
}

fn has_terminal(pod: &Pod, container: &str) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let listed = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let listed = listed.map(|container| (&container.name, container.tty));
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|container| (&container.name, container.tty));
    listed.chain(ephemeral).any(|(name, tty)| name == container && tty == Some(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_upstreams() {
        let all = Stdio { stdin: true, stdout: true, stderr: true, tty: false };
        assert_eq!(stdio(&Query::parse("input=1&output=1&error=1")), Ok(all));
        let terminal = Stdio { stderr: false, tty: true, ..all };
        assert_eq!(stdio(&Query::parse("input=1&output=1&error=1&tty=1")), Ok(terminal));
        assert!(stdio(&Query::parse("input=true")).is_err() && stdio(&Query::parse("tty=1&error=1")).is_err());
        assert_eq!(ports(&Query::parse("port=80&port=1,2")), Ok(vec![80, 1, 2]));
        for bad in ["", "port=", "port=0", "port=x", "port=65536"] {
            assert!(ports(&Query::parse(bad)).is_err(), "{bad}");
        }
    }
}
