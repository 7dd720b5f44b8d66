//! An edge node: edgecore with its data directory, on a private runtime.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::paths;
use crate::process::{self, Output, Process};
use crate::runtime::Runtime;

/// A box that is, or will be, an edge node. Dropping it kills its edgecore and leaves its files.
#[derive(Debug)]
pub struct Edge {
    name: String,
    dir: PathBuf,
    endpoint: String,
    cni: PathBuf,
    process: Option<Process>,
    daemon: bool,
}

impl Edge {
    /// A box named `name` with its files in `dir`.
    pub fn new(dir: &Path, name: &str, runtime: &Runtime) -> Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self {
            name: name.to_owned(),
            dir: dir.to_owned(),
            endpoint: runtime.endpoint(),
            cni: runtime.cni_conf_dir(),
            process: None,
            daemon: false,
        })
    }

    /// Its edgecore will live on after [`Self::detach`].
    pub fn make_daemon(&mut self) {
        self.daemon = true;
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// edgecore's own state.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The pods' directories.
    pub fn pods(&self) -> PathBuf {
        self.dir.join("pods")
    }

    /// The pods' logs.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// The links to them.
    pub fn log_links(&self) -> PathBuf {
        self.dir.join("log-links")
    }

    /// Where device mappers find it.
    pub fn dmi_socket(&self) -> PathBuf {
        self.dir.join("dmi.sock")
    }

    /// edgecore's log.
    pub fn log(&self) -> PathBuf {
        self.dir.join("edgecore.log")
    }

    /// Runs `edgecore join --no-start`; `options` take the place of the defaults of the same name. Tells how it ended.
    pub fn try_join(&self, address: &str, token: &str, options: &[&str]) -> Result<Output> {
        process::run(self.join_command(address, token, options)?.arg("--no-start"), 60)
    }

    /// `edgecore join`, to be run.
    pub fn join_command(&self, address: &str, token: &str, options: &[&str]) -> Result<Command> {
        let mut command = Command::new(paths::product("edgecore")?);
        command.args(["join", address, "--token", token]);
        let defaults = [
            ("--runtime-endpoint", self.endpoint.clone()),
            ("--data-dir", self.data().display().to_string()),
            ("--pods-dir", self.pods().display().to_string()),
            ("--cni-conf-dir", self.cni.display().to_string()),
            ("--node-name", self.name.clone()),
        ];
        for (flag, value) in defaults {
            if !options.iter().any(|option| option.split('=').next() == Some(flag)) {
                command.arg(format!("{flag}={value}"));
            }
        }
        command.args(options);
        Ok(command)
    }

    /// Runs `edgecore join`, which must succeed, and moves what would lie in system directories into this box's own.
    pub fn join(&self, address: &str, token: &str) -> Result<()> {
        let output = self.try_join(address, token, &[])?;
        ensure!(output.success, "edgecore join failed: {}", output.text());
        self.configure("logs_dir", &self.logs().display().to_string())?;
        self.configure("dmi_socket", &self.dmi_socket().display().to_string())?;
        self.configure("log_links_dir", &self.log_links().display().to_string())
    }

    /// Sets a text key of its config.toml.
    pub fn configure(&self, key: &str, value: &str) -> Result<()> {
        self.configure_raw(key, &format!("\"{value}\""))
    }

    /// Sets a key of its config.toml to a TOML value.
    pub fn configure_raw(&self, key: &str, value: &str) -> Result<()> {
        let path = self.data().join("config.toml");
        let old = fs::read_to_string(&path).unwrap_or_default();
        let is_key = |line: &str| line.split('=').next().is_some_and(|word| word.trim() == key);
        let mut lines = vec![format!("{key} = {value}")];
        lines.extend(old.lines().filter(|line| !is_key(line)).map(str::to_owned));
        fs::write(&path, lines.join("\n") + "\n")?;
        Ok(())
    }

    /// A text key of its config.toml.
    pub fn configured(&self, key: &str) -> Result<Option<String>> {
        let text = fs::read_to_string(self.data().join("config.toml"))?;
        let value = |line: &str| {
            line.split_once('=')
                .filter(|(word, _)| word.trim() == key)
                .map(|(_, value)| value.trim().trim_matches('"').to_owned())
        };
        Ok(text.lines().find_map(value))
    }

    /// Starts `edgecore run`.
    pub fn start(&mut self) -> Result<()> {
        self.start_by(Command::new(paths::product("edgecore")?))
    }

    /// The same with mounts of its own, which this line of a shell makes.
    pub fn start_apart(&mut self, mounts: &str) -> Result<()> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &format!("set -e; {mounts}; exec \"$0\" \"$@\"")]);
        command.arg(paths::product("edgecore")?);
        self.start_by(command)
    }

    fn start_by(&mut self, mut command: Command) -> Result<()> {
        command.arg("run").arg("--data-dir").arg(self.data());
        let log = self.log();
        let process = if self.daemon {
            Process::spawn_daemon("edgecore", &command, &log)?
        } else {
            Process::spawn("edgecore", &mut command, &log)?
        };
        self.process = Some(process);
        Ok(())
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
            process.stop(Duration::from_secs(15));
        }
    }

    /// Whether its edgecore runs.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::is_running)
    }

    /// The process, while there is one.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<i32> {
        self.process.as_ref().map(Process::pid)
    }

    /// `edgecore VERB… --data-dir …`, to be given arguments.
    pub fn command(&self, verb: &[&str]) -> Result<Command> {
        let mut command = Command::new(paths::product("edgecore")?);
        command.args(verb).arg("--data-dir").arg(self.data());
        Ok(command)
    }

    /// Runs `edgecore COMMAND… --data-dir …` as the technician at the box does.
    pub fn cli(&self, arguments: &[&str]) -> Result<Output> {
        process::run(&mut self.command(arguments)?, 120)
    }

    /// `edgecore status`, whatever it says.
    pub fn status(&self) -> Result<String> {
        Ok(self.cli(&["status"])?.text())
    }

    /// All that edgecore logged so far.
    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log()).unwrap_or_default()).into_owned()
    }

    /// Files of the data directory whose names start so.
    pub fn data_files(&self, prefix: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.data()).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path())
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
            .collect()
    }

    /// Lets it live on.
    pub fn detach(mut self) {
        if let Some(process) = self.process.take() {
            process.detach();
        }
    }
}
