//! The upstream kubelet on a private runtime: the peer, and the proof that the bed works.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::cleanup::KUBELET_ADDRESS;
use crate::controlplane::ControlPlane;
use crate::kubectl::is_ready;
use crate::process::Process;
use crate::runtime::Runtime;
use crate::{cleanup, paths, ports};

/// A kubelet.
#[derive(Debug)]
pub struct Kubelet {
    name: String,
    dir: PathBuf,
    kubeconfig: PathBuf,
    process: Option<Process>,
}

impl Kubelet {
    /// Configures one named `name` that runs pods on `runtime`.
    pub fn new(control: &ControlPlane, runtime: &Runtime, dir: &Path, name: &str) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let kubeconfig = control.certificate_kubeconfig(name, &format!("system:node:{name}"), &["system:nodes"])?;
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": false,
            "cgroupDriver": "cgroupfs",
            "enforceNodeAllocatable": [],
            "oomScoreAdj": 0,
            "containerRuntimeEndpoint": runtime.endpoint(),
            "port": ports::free()?,
            "healthzPort": 0,
            "address": KUBELET_ADDRESS,
            "podLogsDir": dir.join("logs"),
            // A log that is measured is not to be rotated meanwhile.
            "containerLogMaxSize": "1Gi",
            "resolvConf": "/etc/resolv.conf",
            "authentication": {"anonymous": {"enabled": false}, "x509": {"clientCAFile": control.authority()?.certificate}},
            "failSwapOn": false,
            // It would leave chains behind that nobody here asked for.
            "makeIPTablesUtilChains": false,
            // The machine's disk is not what is measured.
            "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"},
            "imageGCHighThresholdPercent": 100,
        });
        fs::write(dir.join("config.yaml"), serde_json::to_vec_pretty(&config)?)?;
        Ok(Self { name: name.to_owned(), dir: dir.to_owned(), kubeconfig, process: None })
    }

    /// Starts it; returns at once.
    pub fn start(&mut self) -> Result<()> {
        cleanup::set_kubelet_address("replace")?;
        let mut command = Command::new(paths::cached_binary("kubelet")?);
        command
            .arg(format!("--config={}", self.dir.join("config.yaml").display()))
            .arg(format!("--kubeconfig={}", self.kubeconfig.display()))
            .arg(format!("--root-dir={}", self.root().display()))
            .arg(format!("--cert-dir={}", self.dir.join("pki").display()))
            .arg(format!("--hostname-override={}", self.name))
            .arg(format!("--node-ip={KUBELET_ADDRESS}"));
        self.process = Some(Process::spawn("kubelet", &mut command, &self.dir.join("kubelet.log"))?);
        Ok(())
    }

    /// Waits until its node is Ready.
    pub fn wait_ready(&self, control: &ControlPlane) -> Result<()> {
        control.kubectl().wait("node", &self.name, "Ready", 60, is_ready).map(drop)
    }

    /// Its pods' directories.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// The pods' logs.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<i32> {
        self.process.as_ref().map(Process::pid)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
    }

    /// SIGTERM.
    pub fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            process.stop(Duration::from_secs(5));
        }
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.kill();
        cleanup::remove_kubelet_traces();
    }
}
