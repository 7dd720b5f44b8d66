//! What the commands for pods share: the running agent's endpoint, and which pod and container are meant.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use skerry_proto::ops::percent_encode;
use tokio::net::UnixStream;

use super::DataDir;
use crate::config::Config;
use crate::control::{self, AskError, What};
use crate::supervise;

/// Bytes of a refusal that are shown.
const MAX_REFUSAL: usize = 64 << 10;

/// The agent that runs on this box.
#[derive(Clone, Debug)]
pub(super) struct Node {
    socket: PathBuf,
}

/// A pod of this node.
#[derive(Clone, Debug)]
pub(super) struct Pod {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) object: Value,
}

impl Node {
    pub(super) fn of(data: &DataDir) -> anyhow::Result<Self> {
        let config = Config::load(&data.data_dir)?;
        Ok(Self { socket: config.control_socket(&data.data_dir) })
    }

    /// The pod of a name, which may be written as kubectl takes it, `pod/NAME`.
    pub(super) async fn pod(&self, namespace: Option<&str>, name: &str) -> anyhow::Result<Pod> {
        let name = plain(name)?;
        let request = control::Request::Get { what: What::Pods, namespace: namespace.map(str::to_owned) };
        let pods: Vec<Value> = control::ask(&self.socket, &request).await?;
        find(&pods, namespace, name)
    }

    /// Asks; what is not 2xx or 101 is an error with the agent's words.
    pub(super) async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, &'static str)],
    ) -> anyhow::Result<Response<Incoming>> {
        self.send(method, path, headers, Bytes::new()).await
    }

    /// As [`Node::ask`], with a body.
    pub(super) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, &'static str)],
        body: Bytes,
    ) -> anyhow::Result<Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                AskError::NotRunning(self.socket.clone())
            }
            _ => AskError::Broken { path: self.socket.clone(), cause: error.to_string() },
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        supervise::spawn("request", async move {
            // Whoever asked sees it.
            let _ = connection.with_upgrades().await;
        });
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "edgecore");
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        let request = request.body(Full::new(body))?;
        let answer = sender.send_request(request).await.context("edgecore gave no answer; see its log")?;
        if answer.status().is_success() || answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(answer);
        }
        let status = answer.status();
        let words = Limited::new(answer.into_body(), MAX_REFUSAL).collect().await.map(|body| body.to_bytes());
        let words = words.map(|words| String::from_utf8_lossy(&words).trim().to_owned()).unwrap_or_default();
        if words.is_empty() { bail!("edgecore answered with HTTP status {status}") } else { bail!(words) }
    }

    /// Asks for streams of a pod's; SPDY/3.1 is spoken on what comes back.
    pub(super) async fn upgrade(&self, path: &str, protocol: &'static str) -> anyhow::Result<TokioIo<Upgraded>> {
        let headers = [
            (header::CONNECTION, "Upgrade"),
            (header::UPGRADE, "SPDY/3.1"),
            (header::HeaderName::from_static("x-stream-protocol-version"), protocol),
        ];
        let answer = self.ask(Method::POST, path, &headers).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            bail!("the container runtime does not speak SPDY/3.1 (HTTP status {})", answer.status());
        }
        Ok(TokioIo::new(hyper::upgrade::on(answer).await?))
    }
}

fn plain(name: &str) -> anyhow::Result<&str> {
    match name.split_once('/') {
        None => Ok(name),
        Some(("pod" | "pods" | "po", name)) => Ok(name),
        Some((kind, _)) => bail!("{kind:?} is not known here, only pods are; `edgecore get pods` lists them"),
    }
}

/// The pod of a name. Unless a namespace is said it is the one of `default`, or else the only one of its name.
pub(super) fn find(pods: &[Value], namespace: Option<&str>, name: &str) -> anyhow::Result<Pod> {
    let named = || pods.iter().filter(|pod| pod["metadata"]["name"] == name);
    let namespace_of = |pod: &Value| pod["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
    let namespace = match namespace {
        Some(namespace) => namespace.to_owned(),
        None if named().any(|pod| namespace_of(pod) == "default") => "default".to_owned(),
        None => {
            let first = named().map(namespace_of).next().unwrap_or_else(|| "default".to_owned());
            if let Some(other) = named().map(namespace_of).find(|other| *other != first) {
                bail!("pod {name:?} is in namespaces {first:?} and {other:?}; say with -n which is meant");
            }
            first
        }
    };
    // Of two of a name, the one that is not on its way out.
    let of_namespace = named().filter(|pod| namespace_of(pod) == namespace);
    let object = of_namespace.min_by_key(|pod| pod["metadata"]["deletionTimestamp"].is_string()).with_context(|| {
        format!("pod {name:?} is not on this node in namespace {namespace:?}; `edgecore get pods` lists those of all namespaces")
    })?;
    Ok(Pod { namespace, name: name.to_owned(), object: object.clone() })
}

impl Pod {
    /// Its containers of each kind.
    pub(super) fn containers(&self) -> impl Iterator<Item = &Value> {
        let kinds = ["containers", "initContainers", "ephemeralContainers"];
        kinds.into_iter().flat_map(|kind| self.object["spec"][kind].as_array().into_iter().flatten())
    }

    /// The container that is meant: the one asked for, the pod's default, or the first, which is then said.
    pub(super) fn container(&self, asked: Option<&str>) -> anyhow::Result<String> {
        let names: Vec<&str> = self.containers().filter_map(|container| container["name"].as_str()).collect();
        let list = names.join(", ");
        if let Some(asked) = asked {
            if !names.contains(&asked) {
                bail!("container {asked:?} is not in pod {:?}, which has: {list}", self.name);
            }
            return Ok(asked.to_owned());
        }
        let annotation = &self.object["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"];
        if let Some(name) = annotation.as_str().filter(|name| names.contains(name)) {
            return Ok(name.to_owned());
        }
        let first = names.first().with_context(|| format!("pod {:?} has no containers", self.name))?;
        if names.len() > 1 {
            let _ = writeln!(std::io::stderr(), "Defaulted container {first:?} out of: {list}");
        }
        Ok((*first).to_owned())
    }

    /// `/verb/namespace/name`, and the container if there is one.
    pub(super) fn path(&self, verb: &str, container: Option<&str>) -> String {
        let mut path = format!("/{verb}/{}/{}", percent_encode(&self.namespace), percent_encode(&self.name));
        if let Some(container) = container {
            path = format!("{path}/{}", percent_encode(container));
        }
        path
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_pod_and_container_that_are_meant() {
        let pod = |name: &str, going: bool| {
            let mut pod = json!({ "metadata": { "name": name, "namespace": "ns" }, "spec": {
                "containers": [{ "name": "a" }, { "name": "b" }], "initContainers": [{ "name": "i" }] } });
            if going {
                pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            }
            pod
        };
        let mut found = find(&[pod("x", true), pod("x", false), pod("y", false)], Some("ns"), "x").unwrap();
        assert!(found.object["metadata"]["deletionTimestamp"].is_null());
        assert_eq!((found.container(None).unwrap(), found.container(Some("i")).unwrap()), ("a".into(), "i".into()));
        assert!(found.container(Some("z")).unwrap_err().to_string().contains("which has: a, b, i"));
        found.object["metadata"]["annotations"] = json!({ "kubectl.kubernetes.io/default-container": "b" });
        assert_eq!(found.container(None).unwrap(), "b");
        assert_eq!(found.path("exec", Some("a")), "/exec/ns/x/a");
        assert!(find(&[], Some("ns"), "x").unwrap_err().to_string().contains("edgecore get pods"));
        assert!(find(&[], None, "x").unwrap_err().to_string().contains("namespace \"default\""));
        // Without a namespace.
        let of = |namespace: &str| json!({ "metadata": { "name": "x", "namespace": namespace } });
        let found = |pods: &[Value]| find(pods, None, "x").map(|pod| pod.namespace);
        assert_eq!(found(&[of("shop")]).unwrap(), "shop");
        assert_eq!(found(&[of("shop"), of("default"), of("bar")]).unwrap(), "default");
        let several = found(&[of("shop"), of("bar")]).unwrap_err().to_string();
        assert!(several.contains("\"shop\" and \"bar\"; say with -n"), "{several}");
        assert_eq!(plain("pod/x").unwrap(), "x");
        assert!(plain("deploy/x").is_err());
    }
}
