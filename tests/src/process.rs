//! A child process whose output goes to a log file of its own name, and which does not outlive its handle.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::patience;

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    child: Option<Child>,
    pid: i32,
}

impl Process {
    /// Starts a program; what it prints is appended to `log`.
    pub fn spawn(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let output = append(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("cannot start {name} ({})", command.get_program().display()))?;
        let pid = i32::try_from(child.id())?;
        Ok(Self { name: name.to_owned(), log: log.to_owned(), child: Some(child), pid })
    }

    /// As [`Self::spawn`], in a session of its own, so that it outlives this process once [`Self::detach`]ed.
    pub fn spawn_daemon(name: &str, command: &Command, log: &Path) -> Result<Self> {
        Self::spawn(name, &mut under(&["setsid"], command), log)
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.exit_status().is_none()
    }

    /// How it ended, if it has.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().ok().flatten()
    }

    /// Waits until `ready` says so; fails with the end of its log if it exits before or takes more than `seconds`.
    pub fn wait_ready(&mut self, seconds: u64, mut ready: impl FnMut() -> bool) -> Result<()> {
        let begin = Instant::now();
        let limit = patience(seconds);
        loop {
            if let Some(status) = self.exit_status() {
                bail!(
                    "{} ended with {status} instead of becoming ready; its log ends:\n{}",
                    self.name,
                    self.log_tail(20)
                );
            }
            if ready() {
                return Ok(());
            }
            if begin.elapsed() > limit {
                bail!("{} was not ready within {} s; its log ends:\n{}", self.name, limit.as_secs(), self.log_tail(20));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for it to end by itself.
    pub fn wait_exit(&mut self, seconds: u64) -> Result<ExitStatus> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.exit_status() {
                return Ok(status);
            }
            if begin.elapsed() > patience(seconds) {
                bail!("{} still ran after {seconds} s; its log ends:\n{}", self.name, self.log_tail(20));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal to this very process.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid), signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// SIGTERM, and SIGKILL if it has not ended after `grace`.
    pub fn stop(mut self, grace: Duration) {
        if self.signal(Signal::SIGTERM).is_ok() {
            let begin = Instant::now();
            while begin.elapsed() < grace && self.is_running() {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(mut self) {
        self.end();
    }

    /// Lets it live on without this handle.
    pub fn detach(mut self) -> i32 {
        self.child = None;
        self.pid
    }

    /// The last lines it printed.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }

    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// A command as the last arguments of another that runs it, with its environment.
pub fn under(runner: &[&str], command: &Command) -> Command {
    let mut whole = Command::new(runner[0]);
    whole.args(&runner[1..]).arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => whole.env(key, value),
            None => whole.env_remove(key),
        };
    }
    whole
}

/// What a finished command said.
#[derive(Debug)]
pub struct Output {
    /// Whether it ended with 0.
    pub success: bool,
    /// Its exit code, or -1 if a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Both outputs, for looking for words in them.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// Runs a command to its end, whatever the end; kills it after `seconds`.
pub fn run(command: &mut Command, seconds: u64) -> Result<Output> {
    let (status, stdout, stderr) = finish(command.stdin(Stdio::null()), &[], patience(seconds))?;
    let (stdout, stderr) = (text(&stdout), text(&stderr));
    let Some(status) = status else {
        bail!("{} was still running after {seconds} s; it said: {stderr}", command.get_program().display());
    };
    Ok(Output { success: status.success(), code: status.code().unwrap_or(-1), stdout, stderr })
}

/// How a command with an input ended.
#[derive(Debug)]
pub struct Piped {
    /// Its exit code; `None` if it had to be ended.
    pub code: Option<i32>,
    /// What it printed.
    pub output: Vec<u8>,
    /// What it printed on standard error.
    pub errors: String,
}

/// Runs a command with this input, binary both ways, for two minutes at most.
pub fn pipe(command: &mut Command, input: &[u8]) -> Result<Piped> {
    let (status, output, errors) = finish(command.stdin(Stdio::piped()), input, Duration::from_secs(120))?;
    Ok(Piped { code: status.and_then(|status| status.code()), output, errors: text(&errors) })
}

/// Runs a command to its end, or ends it after so long; then it has no status. What it printed, and what on standard error.
fn finish(command: &mut Command, input: &[u8], patience: Duration) -> Result<(Option<ExitStatus>, Vec<u8>, Vec<u8>)> {
    let name = command.get_program().display().to_string();
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        // One that ends before it has read everything says so by its exit code.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
        let output = scope.spawn(move || read_all(stdout));
        let errors = scope.spawn(move || read_all(stderr));
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if begin.elapsed() > patience {
                child.kill()?;
                child.wait()?;
                break None;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        Ok((status, output.join().unwrap_or_default(), errors.join().unwrap_or_default()))
    })
}

/// The last lines of a file.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn append(log: &Path) -> Result<File> {
    if let Some(dir) = log.parent() {
        fs::create_dir_all(dir)?;
    }
    OpenOptions::new().create(true).append(true).open(log).with_context(|| format!("cannot open {}", log.display()))
}

/// All that comes of it. What came before an error is what there is.
pub fn read_all(source: Option<impl std::io::Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut source) = source {
        source.read_to_end(&mut bytes).ok();
    }
    bytes
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
