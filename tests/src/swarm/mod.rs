//! Thousands of edge sides in one process: the real machine of the edge over the product's transport, WebSocket or QUIC, with a certificate
//! each, and a store in memory.
//!
//! `bin/swarm` runs [`Fleet`] and takes [`Command`]s on its standard input, one a line, each answered by one line of JSON; [`Swarm`] is the
//! handle of such a process. What a node does not do: run pods. It says at once that they run.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum as _;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use self::dial::Transport;
pub use self::fleet::{Fleet, Options};

mod dial;
mod fleet;
mod join;
mod node;
mod objects;

/// The ConfigMap that every node's pods refer to, in the namespace `default`.
pub const SHARED: &str = "shared";
/// Pods of each node.
pub const PODS: usize = 3;

/// What a swarm is told to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Join as every node, with this token. Answered by an [`Answer`] when all have.
    Join {
        /// Good for as many nodes as there are.
        token: String,
    },
    /// Create what the nodes shall hold in the apiserver.
    Populate,
    /// Change the shared ConfigMap.
    Touch,
    /// Every node dials, and goes on dialling.
    Dial,
    /// Every connection is reset, and dialled again.
    Drop,
    /// Answered by a [`Status`].
    Status,
}

/// What a command came to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Why it failed.
    pub error: Option<String>,
    /// How long it took.
    pub seconds: f64,
}

/// How the nodes fare.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// Nodes whose session stands.
    pub established: usize,
    /// Nodes that hold all they should, and whose digests agreed in the session that stands.
    pub in_sync: usize,
    /// For how many seconds the oldest session has stood.
    pub oldest: f64,
    /// Nodes of which cloudcore took a report in the session that stands.
    pub reported: usize,
    /// Nodes that hold the newest state of the shared ConfigMap that any node holds.
    pub newest: usize,
    /// The version of that state.
    pub version: u64,
    /// Changes applied so far, by all.
    pub applied: u64,
    /// Attempts that failed and sessions that ended, by cause.
    pub troubles: std::collections::BTreeMap<String, u64>,
}

/// A swarm in a process of its own. Dropping it ends it.
#[derive(Debug)]
pub struct Swarm {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Swarm {
    /// Starts `program`, whose files lie in `dir`.
    pub fn start(program: &Path, dir: &Path, options: &Options) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let log = std::fs::File::create(dir.join("swarm.log"))?;
        let mut child = std::process::Command::new(program)
            .arg("--dir")
            .arg(dir)
            .args(["--nodes", &options.nodes.to_string(), "--cloud", &options.cloud.to_string()])
            .args(["--transport", options.transport.to_possible_value().context("a transport")?.get_name()])
            .arg("--kubeconfig")
            .arg(&options.kubeconfig)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let input = child.stdin.take().context("the swarm has no input")?;
        let output = BufReader::new(child.stdout.take().context("the swarm has no output")?);
        Ok(Self { child, input, output })
    }

    /// Carries out a command; answers how many seconds that took.
    pub fn run(&mut self, command: &Command) -> Result<f64> {
        let Answer { error, seconds } = self.ask(command)?;
        match error {
            Some(error) => bail!("the swarm: {error}"),
            None => Ok(seconds),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> Option<i32> {
        i32::try_from(self.child.id()).ok()
    }

    /// How the nodes fare.
    pub fn status(&mut self) -> Result<Status> {
        self.ask(&Command::Status)
    }

    fn ask<T: DeserializeOwned>(&mut self, command: &Command) -> Result<T> {
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        self.input.write_all(&line).context("the swarm is gone")?;
        let mut answer = String::new();
        self.output.read_line(&mut answer)?;
        serde_json::from_str(&answer).with_context(|| format!("the swarm answered {command:?} with {answer:?}"))
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
