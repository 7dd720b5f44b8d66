//! Device mappers of ours as processes beside an edge, and pymodbus's devices for them.

use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::edge::Edge;
use crate::process::{self, Process};
use crate::{paths, ports};

/// What starts the mapper of a protocol (`virtual`, `modbus`, …) beside an edge; its files are in `dir`.
pub fn command(edge: &Edge, protocol: &str, dir: &Path) -> Result<Command> {
    let name = format!("skerry-mapper-{protocol}");
    let mut command = Command::new(paths::product(&name)?);
    command.arg("--dmi-socket").arg(edge.dmi_socket()).arg("--store").arg(dir.join(name));
    Ok(command)
}

/// A Python that has what tests of devices are written with: the one that scripts/install-deps makes, or the system's.
pub fn python() -> Result<PathBuf> {
    let works = |python: &PathBuf| {
        let import = "from pymodbus.simulator import SimDevice";
        process::run(Command::new(python).args(["-c", import]), 30).is_ok_and(|output| output.success)
    };
    [paths::cache().join("venv/bin/python"), "python3".into()]
        .into_iter()
        .find(works)
        .context("no Python has pymodbus: run `scripts/install-deps tests`")
}

/// Modbus devices of pymodbus on a port of this machine: units 1 and 2, with the registers of device-mappers/modbus/tests/simulator.py.
#[derive(Debug)]
pub struct Modbus {
    python: PathBuf,
    script: PathBuf,
    port: u16,
    process: Option<Process>,
}

impl Modbus {
    /// Starts them, and waits until they answer. Their files are in `dir`; with `daemon` they live on after [`Self::detach`].
    pub fn start(dir: &Path, daemon: bool) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        // A copy, so that it is found by the directory's name when everything of that is to end.
        let script = dir.join("modbus-simulator.py");
        std::fs::copy(paths::repository().join("device-mappers/modbus/tests/simulator.py"), &script)?;
        let mut this = Self { python: python()?, script, port: ports::free()?, process: None };
        this.launch(daemon)?;
        Ok(this)
    }

    /// Where they listen.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
    }

    /// Starts them again, as new.
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        self.launch(false)
    }

    /// A holding register of a unit, as another client of the devices reads it.
    pub fn register(&self, unit: u8, address: u16) -> Result<u16> {
        let code = "print(client.read_holding_registers(address, count=1, device_id=unit).registers[0])";
        Ok(self.client(code, &[unit.into(), address])?.trim().parse()?)
    }

    /// Changes a holding register, as somebody at the device does.
    pub fn set_register(&self, unit: u8, address: u16, value: u16) -> Result<()> {
        let code = "assert not client.write_register(address, int(sys.argv[4]), device_id=unit).isError()";
        self.client(code, &[unit.into(), address, value]).map(drop)
    }

    /// Lets them live on.
    pub fn detach(mut self) {
        if let Some(process) = self.process.take() {
            process.detach();
        }
    }

    fn client(&self, code: &str, arguments: &[u16]) -> Result<String> {
        let head = "import sys; from pymodbus.client import ModbusTcpClient\n\
            port, unit, address = map(int, sys.argv[1:4]); client = ModbusTcpClient('127.0.0.1', port=port); assert client.connect()\n";
        let mut command = Command::new(&self.python);
        command.args(["-c", &format!("{head}{code}"), &self.port.to_string()]);
        command.args(arguments.iter().map(u16::to_string));
        let output = process::run(&mut command, 30)?;
        ensure!(output.success, "the Modbus client failed: {}", output.text());
        Ok(output.stdout)
    }

    fn launch(&mut self, daemon: bool) -> Result<()> {
        let mut command = Command::new(&self.python);
        command.arg(&self.script).args(["tcp", &self.port.to_string()]);
        let log = self.script.with_extension("log");
        let mut process = if daemon {
            Process::spawn_daemon("the Modbus simulator", &command, &log)?
        } else {
            Process::spawn("the Modbus simulator", &mut command, &log)?
        };
        process.wait_ready(30, || TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok())?;
        self.process = Some(process);
        Ok(())
    }
}
