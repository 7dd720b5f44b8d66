//! kubectl, called as a user calls it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::paths;
use crate::process::{self, Output, Piped};
use crate::wait::eventually;

/// A kubectl for one cluster and, if set, one namespace.
#[derive(Clone, Debug)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    cache: PathBuf,
    namespace: Option<String>,
    websockets: Option<&'static str>,
}

impl Kubectl {
    /// A kubectl that uses this kubeconfig and keeps its discovery cache in `dir`.
    pub fn new(kubeconfig: &Path, dir: &Path) -> Result<Self> {
        let program = linked(dir, "kubectl")?;
        let cache = dir.join("kubectl-cache");
        Ok(Self { program, kubeconfig: kubeconfig.to_owned(), cache, namespace: None, websockets: None })
    }

    /// The same in a namespace.
    #[must_use]
    pub fn in_namespace(&self, namespace: &str) -> Self {
        Self { namespace: Some(namespace.to_owned()), ..self.clone() }
    }

    /// The same that is told whether to speak WebSockets (`true`) or SPDY alone (`false`); untold, it is WebSockets first.
    #[must_use]
    pub fn websockets(&self, whether: &'static str) -> Self {
        Self { websockets: Some(whether), ..self.clone() }
    }

    /// The namespace it works in.
    pub fn namespace(&self) -> &str {
        self.namespace.as_deref().unwrap_or("default")
    }

    /// The kubeconfig it uses.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Runs it; an error carries what it said.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.output(arguments)?;
        if !output.success {
            bail!("kubectl {} failed: {}", arguments.join(" "), output.stderr.trim());
        }
        Ok(output.stdout)
    }

    /// Runs it and tells how it ended.
    pub fn output(&self, arguments: &[&str]) -> Result<Output> {
        process::run(self.command().args(arguments), 60)
    }

    /// Runs it with `-o json`.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("kubectl {} printed no JSON", arguments.join(" ")))
    }

    /// One object, or `None` if there is none of that name.
    pub fn find(&self, kind: &str, name: &str) -> Result<Option<Value>> {
        let text = self.run(&["get", kind, name, "-o", "json", "--ignore-not-found"])?;
        if text.trim().is_empty() { Ok(None) } else { Ok(Some(serde_json::from_str(&text)?)) }
    }

    /// One object that must be there.
    pub fn get(&self, kind: &str, name: &str) -> Result<Value> {
        self.find(kind, name)?.with_context(|| format!("there is no {kind} {name}"))
    }

    /// The items of a list; `selector` may be empty.
    pub fn list(&self, kind: &str, selector: &str) -> Result<Vec<Value>> {
        let list = self.json(&["get", kind, "-l", selector])?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// Applies a manifest: YAML or JSON text.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        self.feed(&["apply", "-f", "-"], manifest)
    }

    /// Creates what a manifest describes.
    pub fn create(&self, manifest: &Value) -> Result<String> {
        self.feed(&["create", "-f", "-"], &manifest.to_string())
    }

    /// Creates an object and reads what the apiserver made of it, for reviews.
    pub fn create_and_get(&self, manifest: &Value) -> Result<Value> {
        Ok(serde_json::from_str(&self.feed(&["create", "-o", "json", "-f", "-"], &manifest.to_string())?)?)
    }

    /// Merges a patch into an object.
    pub fn patch(&self, kind: &str, name: &str, patch: &Value) -> Result<()> {
        self.run(&["patch", kind, name, "--type=merge", "-p", &patch.to_string()]).map(drop)
    }

    /// Deletes without waiting.
    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        self.run(&["delete", kind, name, "--wait=false", "--ignore-not-found"]).map(drop)
    }

    /// Waits for an object to satisfy `holds`.
    pub fn wait(
        &self,
        kind: &str,
        name: &str,
        what: &str,
        seconds: u64,
        holds: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        eventually(&format!("{kind} {name}: {what}"), seconds, || Ok(self.find(kind, name)?.filter(&holds)))
    }

    /// Waits until there is no such object any more.
    pub fn wait_gone(&self, kind: &str, name: &str, seconds: u64) -> Result<()> {
        eventually(&format!("{kind} {name} to be gone"), seconds, || Ok(self.find(kind, name)?.is_none().then_some(())))
    }

    /// Starts a watch whose lines the caller reads; kill it when done.
    pub fn stream(&self, arguments: &[&str]) -> Result<Child> {
        self.command()
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(Into::into)
    }

    fn feed(&self, arguments: &[&str], input: &str) -> Result<String> {
        let done = self.pipe(arguments, input.as_bytes())?;
        match done.code {
            Some(0) => {}
            Some(_) => bail!("kubectl {} failed: {}", arguments.join(" "), done.errors.trim()),
            None => bail!("kubectl {} was killed: it did not end", arguments.join(" ")),
        }
        Ok(String::from_utf8_lossy(&done.output).into_owned())
    }

    /// Runs it with this input, as [`process::pipe`] does.
    pub fn pipe(&self, arguments: &[&str], input: &[u8]) -> Result<Piped> {
        process::pipe(self.command().args(arguments), input)
    }

    /// The command, to be given arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--kubeconfig").arg(&self.kubeconfig).arg("--cache-dir").arg(&self.cache);
        if let Some(namespace) = &self.namespace {
            command.args(["-n", namespace]);
        }
        if let Some(whether) = self.websockets {
            command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", whether).env("KUBECTL_PORT_FORWARD_WEBSOCKETS", whether);
        }
        command
    }
}

/// A link to the multi-call binary, named after the program it is to be. Without that binary, kubectl is one that is nothing else: ours, or
/// else the machine's.
pub fn linked(dir: &Path, name: &str) -> Result<PathBuf> {
    let bin = dir.join("bin");
    fs::create_dir_all(&bin)?;
    let link = bin.join(name);
    if !link.exists() {
        symlink(program(name)?, &link)?;
    }
    Ok(link)
}

fn program(name: &str) -> Result<PathBuf> {
    let kube = paths::cached_binary("kube");
    if kube.is_ok() || name != "kubectl" {
        return kube;
    }
    paths::cached_binary("kubectl").or_else(|_| paths::tool("kubectl", "kubernetes-client")).or(kube)
}

/// The port at which a node's kubelet is to be asked, if its Node tells one.
pub fn kubelet_port(node: &Value) -> Option<u16> {
    node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64()?.try_into().ok()
}

/// Whether a pod's Ready condition is true.
pub fn is_ready(object: &Value) -> bool {
    condition(object, "Ready") == "True"
}

/// The status of a condition, or the empty string.
pub fn condition<'a>(object: &'a Value, kind: &str) -> &'a str {
    let conditions = object["status"]["conditions"].as_array();
    let found = conditions.and_then(|all| all.iter().find(|condition| condition["type"] == kind));
    found.and_then(|condition| condition["status"].as_str()).unwrap_or("")
}

/// The container ids of a pod, by container name.
pub fn container_ids(pod: &Value) -> std::collections::BTreeMap<String, String> {
    let statuses = pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
    statuses
        .iter()
        .filter_map(|status| {
            Some((status["name"].as_str()?.to_owned(), status["containerID"].as_str()?.rsplit('/').next()?.to_owned()))
        })
        .collect()
}

/// All restarts of a pod's containers.
pub fn restarts(pod: &Value) -> i64 {
    let statuses = pod["status"]["containerStatuses"].as_array();
    statuses.map_or(0, |all| all.iter().filter_map(|status| status["restartCount"].as_i64()).sum())
}
