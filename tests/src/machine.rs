//! A virtual machine as an edge box: systemd, cgroups of version 2 alone, the system's own directories, and a power switch that loses what was
//! not written to the disk. `scripts/machine` makes what it boots from.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::{self, Process};
use crate::tar::Archive;
use crate::wait::{eventually, patience};
use crate::{images, paths, ports};

/// Where the machine finds this one.
pub const HOST: &str = "10.0.2.2";
/// Where it has the archive of test images.
pub const IMAGES: &str = "/root/images.tar";
/// What the shell of scripts/machine says last, before the exit code.
const END: &str = "\nended with ";
/// Emulated it takes half a minute when nobody else wants the processors.
const BOOT: u64 = 240;

/// A machine. Dropping it cuts its power.
#[derive(Debug)]
pub struct Machine {
    dir: PathBuf,
    made: PathBuf,
    port: u16,
    process: Option<Process>,
}

impl Machine {
    /// One with its disk in `dir`, that has edgecore in its path and the test images in a file.
    pub fn new(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let made = process::run(&mut Command::new(paths::repository().join("scripts/machine")), 900)?;
        ensure!(made.success, "scripts/machine failed: {}", made.stderr);
        let this = Self { dir: dir.to_owned(), made: made.stdout.trim().into(), port: ports::free()?, process: None };
        let mut copy = Command::new("cp");
        copy.arg("--sparse=always").arg(this.made.join("disk")).arg(this.file("disk"));
        let copied = process::run(&mut copy, 120)?;
        ensure!(copied.success, "cp failed: {}", copied.stderr);
        let mut payload = Archive::default();
        payload.file("usr/local/bin/edgecore", 0o755, &fs::read(paths::product("edgecore")?)?);
        payload.file(IMAGES.trim_start_matches('/'), 0o644, &fs::read(images::archive()?)?);
        fs::write(this.file("payload"), payload.finish())?;
        Ok(this)
    }

    /// Switches it on; waits until it has come up. `plugged`: the network is there.
    pub fn boot(&mut self, plugged: bool) -> Result<()> {
        let mut command = Command::new(paths::tool("qemu-system-x86_64", "qemu-system-x86")?);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-m",
            "2048",
            "-smp",
            "2",
            "-S",
        ]);
        if has_virtualisation() {
            command.args(["-accel", "kvm", "-cpu", "host"]);
        } else {
            command.args(["-accel", "tcg,thread=multi", "-cpu", "max,svm=off,la57=off"]);
        }
        command.arg("-kernel").arg(self.made.join("kernel")).arg("-initrd").arg(self.made.join("initrd"));
        command.args(["-append", "root=/dev/vda rw console=ttyS0 panic=-1 quiet"]);
        for (name, options) in [("disk", ""), ("payload", ",readonly=on")] {
            let file = self.file(name);
            command.arg("-drive").arg(format!("file={},format=raw,if=virtio{options}", file.display()));
        }
        let control = format!(
            "user,id=control,net=10.0.3.0/24,ipv6=off,restrict=on,hostfwd=tcp:127.0.0.1:{}-10.0.3.15:2222",
            self.port
        );
        command.args(["-netdev", &control, "-device", "virtio-net-pci,netdev=control,mac=52:54:00:00:00:03"]);
        command.args([
            "-netdev",
            "user,id=uplink,ipv6=off",
            "-device",
            "virtio-net-pci,netdev=uplink,id=plug,mac=52:54:00:00:00:02",
        ]);
        command
            .args(["-device", "virtio-rng-pci", "-monitor"])
            .arg(format!("unix:{},server=on,wait=off", self.file("monitor").display()));
        command.arg("-serial").arg(format!("file:{}", self.file("console.log").display()));
        let mut process = Process::spawn("qemu", &mut command, &self.file("qemu.log"))?;
        let monitor = self.file("monitor");
        process.wait_ready(30, || UnixStream::connect(&monitor).is_ok())?;
        self.process = Some(process);
        self.plug(plugged)?;
        self.monitor("cont")?;
        let state = eventually("the machine to come up", BOOT, || {
            let (_, state) = self.run("systemctl is-system-running --wait", BOOT)?;
            Ok((!state.is_empty()).then_some(state))
        });
        let state =
            state.with_context(|| format!("its console ends:\n{}", process::tail(&self.file("console.log"), 20)))?;
        ensure!(state == "running", "it is {state}: {}", self.run("systemctl --failed --no-legend", 60)?.1);
        self.sh("[ -e /usr/local/bin/edgecore ] || { tar -xf /dev/vdb -C / && sync; }")?;
        Ok(())
    }

    /// Cuts the power: what it had not written to its disk is lost.
    pub fn power_off(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
        fs::remove_file(self.file("monitor")).ok();
    }

    /// Plugs in the cable to the cloud, or pulls it out. That by which it is told what to do stays.
    pub fn plug(&self, plugged: bool) -> Result<()> {
        self.monitor(&format!("set_link plug {}", if plugged { "on" } else { "off" }))
    }

    /// Runs a bash script in it: the exit code, and what it printed.
    pub fn run(&self, script: &str, seconds: u64) -> Result<(i32, String)> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(patience(seconds)))?;
        stream.write_all(script.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).with_context(|| format!("the machine does not answer to `{script}`"))?;
        let answer = String::from_utf8_lossy(&answer);
        let (text, code) = answer.rsplit_once(END).with_context(|| format!("the machine broke off: {answer}"))?;
        Ok((code.trim().parse()?, text.trim().to_owned()))
    }

    /// Runs a bash script in it that must succeed; what it printed.
    pub fn sh(&self, script: &str) -> Result<String> {
        let (code, text) = self.run(script, 120)?;
        if code != 0 {
            bail!("`{script}` ended with {code}: {text}");
        }
        Ok(text)
    }

    fn monitor(&self, command: &str) -> Result<()> {
        let mut stream = UnixStream::connect(self.file("monitor")).context("the machine is off")?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        writeln!(stream, "{command}")?;
        // It has been done when the next prompt is there: one comes first, one after.
        let (mut said, mut piece) = (String::new(), [0; 4096]);
        while said.matches("(qemu)").count() < 2 {
            let read = stream.read(&mut piece)?;
            ensure!(read > 0, "qemu hung up: {said}");
            said.push_str(&String::from_utf8_lossy(&piece[..read]));
        }
        Ok(())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.power_off();
    }
}

/// Whether the processor runs machines itself. A /dev/kvm without that is some other kind of virtualisation, and only takes guests made for it.
fn has_virtualisation() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    Path::new("/dev/kvm").exists() && flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"))
}
