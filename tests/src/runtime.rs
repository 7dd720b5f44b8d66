//! A private containerd: its own root, state, socket, CNI directory and bridge, and its own power switch.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::cri::Cri;
use crate::network::{self, Network};
use crate::process::Process;
use crate::{cleanup, images, paths};

/// Who brings the pod network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cni {
    /// The harness writes a conflist.
    Ours,
    /// The directory is empty: whoever joins this box has to.
    Empty,
}

/// A containerd. What a reboot would clear lies in `state`, what it would keep in `root` and `ipam`.
#[derive(Debug)]
pub struct Runtime {
    dir: PathBuf,
    process: Option<Process>,
    cri: Cri,
    daemon: bool,
}

impl Runtime {
    /// Starts one in `dir` with the test images in it.
    pub fn start(dir: &Path, cni: Cni) -> Result<Self> {
        Self::launch(dir, cni, false)
    }

    /// As [`Self::start`]; it lives on after [`Self::detach`].
    pub fn start_daemon(dir: &Path, cni: Cni) -> Result<Self> {
        Self::launch(dir, cni, true)
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        socket(&self.dir)
    }

    /// Its socket as kubelets are told.
    pub fn endpoint(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// Where it looks for its CNI configuration.
    pub fn cni_conf_dir(&self) -> PathBuf {
        self.dir.join("cni")
    }

    /// Where it keeps the network namespaces of its sandboxes.
    pub fn network_namespaces(&self) -> PathBuf {
        self.dir.join("state/io.containerd.grpc.v1.cri/netns")
    }

    /// What it says of its containers.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// The networks it is configured for.
    pub fn networks(&self) -> Vec<Network> {
        network::networks(&self.cni_conf_dir())
    }

    /// Ends containerd and starts it again; shims and containers live on.
    pub fn restart(&mut self) -> Result<()> {
        self.stop();
        self.boot()
    }

    /// SIGTERM to containerd alone.
    pub fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            process.stop(Duration::from_secs(10));
        }
    }

    /// SIGKILL to containerd alone.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
    }

    /// Starts containerd on what is there.
    pub fn boot(&mut self) -> Result<()> {
        let mut command = Command::new(paths::tool("containerd", "containerd")?);
        command.arg("--config").arg(self.dir.join("config.toml"));
        let log = self.dir.join("containerd.log");
        let mut process = if self.daemon {
            Process::spawn_daemon("containerd", &command, &log)?
        } else {
            Process::spawn("containerd", &mut command, &log)?
        };
        process.wait_ready(30, || self.cri.is_ready())?;
        self.process = Some(process);
        Ok(())
    }

    /// Cuts the power: containerd, shims and containers are gone without a goodbye, and so is everything that lives in memory
    /// (mounts, tmpfs, network namespaces, the bridge, cgroups). `memory` are further directories whose mounts go, the pods' for
    /// example. The disk stays. Whoever drives this runtime must be dead already; [`Self::boot`] switches on again.
    pub fn power_off(&mut self, memory: &[&Path]) -> Result<()> {
        self.kill();
        cleanup::kill_all(&self.dir);
        let mut owners = cleanup::container_ids(&self.dir);
        cleanup::remove_shim_sockets(&self.dir);
        cleanup::unmount_below(&self.dir);
        for dir in memory {
            owners.extend(cleanup::pod_ids(dir));
            cleanup::unmount_below(dir);
        }
        for network in self.networks() {
            network::unplug(&network);
        }
        cleanup::remove_cgroups(&owners);
        let state = self.dir.join("state");
        fs::remove_dir_all(&state).with_context(|| format!("cannot wipe {}", state.display()))
    }

    /// [`Self::power_off`] and [`Self::boot`].
    pub fn power_cycle(&mut self, memory: &[&Path]) -> Result<()> {
        self.power_off(memory)?;
        self.boot()
    }

    /// Lets it live on.
    pub fn detach(mut self) {
        if let Some(process) = self.process.take() {
            process.detach();
        }
    }

    fn launch(dir: &Path, cni: Cni, daemon: bool) -> Result<Self> {
        let archive = images::archive()?;
        fs::create_dir_all(dir.join("cni"))?;
        let configured = !network::networks(&dir.join("cni")).is_empty();
        if cni == Cni::Ours && !configured {
            network::write_conflist(&dir.join("cni"), &dir.join("ipam"))?;
        }
        fs::write(dir.join("config.toml"), config(dir))?;
        let mut this = Self { dir: dir.to_owned(), process: None, cri: Cri::new(&socket(dir))?, daemon };
        this.boot()?;
        images::import(&this.socket(), &archive)?;
        Ok(this)
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // A detached one has no process here.
        if self.process.is_some() {
            self.power_off(&[]).ok();
            for network in self.networks() {
                network::forget(&network);
            }
        }
    }
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("containerd.sock")
}

fn config(dir: &Path) -> String {
    let dir = dir.display();
    let pause = images::PAUSE;
    format!(
        r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt"]

[grpc]
address = "{dir}/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{dir}/cni"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "{dir}/state/runc"
"#
    )
}
