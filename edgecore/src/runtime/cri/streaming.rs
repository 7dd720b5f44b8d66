//! The one-time URLs at which the runtime serves exec, attach and port-forward, and where a container's log is.

use skerry_proto::cri;

use super::{Cri, DEADLINE, Error, call};
use crate::kubelet::observed::label;

/// Which streams of a process are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Bytes go to it.
    pub stdin: bool,
    /// What it says.
    pub stdout: bool,
    /// What it says of errors; not with a terminal, which has one stream.
    pub stderr: bool,
    /// It has a terminal.
    pub tty: bool,
}

/// Where a container's log is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFile {
    /// On this box, absolute; empty if the runtime writes none.
    pub path: String,
    /// Whether more may come.
    pub is_running: bool,
}

impl Cri {
    /// Where a command in a container is run by whoever connects within a minute.
    pub async fn exec(&self, id: &str, command: Vec<String>, stdio: Stdio) -> Result<String, Error> {
        let Stdio { stdin, stdout, stderr, tty } = stdio;
        let request = cri::ExecRequest { container_id: id.to_owned(), cmd: command, tty, stdin, stdout, stderr };
        Ok(call("Exec", DEADLINE, self.runtime.clone().exec(request)).await?.url)
    }

    /// Where a running container's own process is spoken to.
    pub async fn attach(&self, id: &str, stdio: Stdio) -> Result<String, Error> {
        let Stdio { stdin, stdout, stderr, tty } = stdio;
        let request = cri::AttachRequest { container_id: id.to_owned(), stdin, tty, stdout, stderr };
        Ok(call("Attach", DEADLINE, self.runtime.clone().attach(request)).await?.url)
    }

    /// Where ports of a sandbox are reached.
    pub async fn port_forward(&self, sandbox: &str, ports: Vec<i32>) -> Result<String, Error> {
        let request = cri::PortForwardRequest { pod_sandbox_id: sandbox.to_owned(), port: ports };
        Ok(call("PortForward", DEADLINE, self.runtime.clone().port_forward(request)).await?.url)
    }

    /// The pod's sandbox that is ready, the newest if there are several.
    pub async fn ready_sandbox(&self, uid: &str) -> Result<Option<String>, Error> {
        let filter = cri::PodSandboxFilter {
            state: Some(cri::PodSandboxStateValue { state: cri::PodSandboxState::SandboxReady.into() }),
            label_selector: [(label::POD_UID.to_owned(), uid.to_owned())].into(),
            ..Default::default()
        };
        let request = cri::ListPodSandboxRequest { filter: Some(filter) };
        let listed = call("ListPodSandbox", DEADLINE, self.runtime.clone().list_pod_sandbox(request)).await?.items;
        let ready = listed.into_iter().filter(|sandbox| sandbox.state() == cri::PodSandboxState::SandboxReady);
        Ok(ready.max_by_key(|sandbox| sandbox.created_at).map(|sandbox| sandbox.id))
    }

    /// A container's log; `None` when the container is gone.
    pub async fn log_file(&self, id: &str) -> Result<Option<LogFile>, Error> {
        let Some(status) = self.container_status(id).await? else { return Ok(None) };
        let is_running = status.state() == cri::ContainerState::ContainerRunning;
        Ok(Some(LogFile { path: status.log_path, is_running }))
    }
}
