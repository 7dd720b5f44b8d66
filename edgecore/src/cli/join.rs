//! `edgecore join`: makes a box a node. Every step says what came of it; every file it writes is there whole or not at all, so that it
//! can be interrupted anywhere and done again.

use std::io::Write;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Args;
use jiff::Timestamp;
use skerry_proto::token::JoinToken;

use super::unit::systemctl;
use super::{DataDir, unit};
use crate::config::{self, Config, parse_label};
use crate::enroll::{self, Applicant};
use crate::identity::Identity;
use crate::link::dial::Server;
use crate::link::{DELETED_NOTE, NODE_NOTES, Transport};
use crate::preflight::{self, Check, Places, Verdict};
use crate::store::Snapshot;
use crate::{app, clock, files, order};

/// Name of the lock's file in the data directory: what a join makes there first.
pub(super) const LOCK: &str = "join.lock";
/// The clocks of box and cloud may differ by this before somebody is told.
const SKEW_SECONDS: i64 = 300;

#[derive(Args, Debug)]
pub(super) struct Join {
    /// Where cloudcore is, HOST:PORT.
    server: Server,
    /// What `cloudcore token create` printed.
    #[arg(long)]
    token: JoinToken,
    /// The node's name; the host name unless given.
    #[arg(long)]
    node_name: Option<String>,
    #[command(flatten)]
    data: DataDir,
    /// The CRI runtime's socket, unix:///run/containerd/containerd.sock unless given.
    #[arg(long)]
    runtime_endpoint: Option<String>,
    /// What carries the link; auto takes QUIC, and a WebSocket where UDP does not come through.
    #[arg(long, value_enum)]
    transport: Option<Transport>,
    /// A label for the Node, key=value; can be repeated. Set when the box joins; afterwards `kubectl label node` decides.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Where the runtime looks for network configurations, /etc/cni/net.d unless given.
    #[arg(long)]
    cni_conf_dir: Option<PathBuf>,
    /// Where pod directories go, /var/lib/kubelet unless given.
    #[arg(long)]
    pods_dir: Option<PathBuf>,
    /// Only prepare: install and start no service.
    #[arg(long)]
    no_start: bool,
}

impl Join {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let mut out = std::io::stdout();
        let data_dir = &self.data.data_dir;
        let program = std::env::current_exe().context("cannot find out where edgecore is")?;
        let command = unit::command(&program, data_dir);
        // What cannot become the service is refused before anything is made.
        let service = if !self.no_start && unit::is_systemd() {
            Some(unit::text(unit::installed().as_deref(), &program, data_dir)?)
        } else {
            None
        };
        let changed = self.join(&Places::default(), clock::wall(), &mut out).await?;
        let running = app::running(data_dir);
        if let Some(service) = service {
            start(&service, changed, &mut out).await?;
        } else if let Some(pid) = running {
            let remedy = if changed { "; restart it to take the changes up" } else { "" };
            writeln!(out, "joined; edgecore runs already (process {pid}){remedy}")?;
        } else if self.no_start {
            writeln!(out, "joined; start it with: {command}")?;
        } else {
            writeln!(out, "joined; there is no systemd here, so run it under what there is: {command}")?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Everything but the service. Answers whether the configuration of a running agent changed.
    async fn join(&self, places: &Places, now: Timestamp, out: &mut impl Write) -> anyhow::Result<bool> {
        let data_dir = &self.data.data_dir;
        // One that is there already may be shared: what is secret in it has modes of its own.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(data_dir)
            .with_context(|| format!("cannot make {}", data_dir.display()))?;
        let _lock = app::lock(&data_dir.join(LOCK))?;
        let before = match Config::load(data_dir) {
            Ok(config) => Some(config),
            Err(config::ConfigError::Missing(_)) => None,
            Err(error) => return Err(error.into()),
        };
        let config = self.config(before.as_ref())?;
        let identity = Identity::load(data_dir)?;
        self.same_cluster(before.as_ref(), identity.as_ref(), &config)?;
        if identity.is_some() {
            not_deleted(data_dir, &config.node_name)?;
        }
        let checks = preflight::run(&config, data_dir, places, now, app::running(data_dir).is_some()).await;
        for check in &checks {
            writeln!(out, "{check}")?;
        }
        let fatal = checks.iter().filter(|check| check.is_fatal()).count();
        if fatal > 0 {
            let still = if identity.is_some() { "joined as before" } else { "not joined" };
            bail!("{fatal} of {} checks failed; {still}", checks.len());
        }
        if identity.is_none() {
            self.enroll(&config, now, out).await?;
        } else {
            say(out, "join", Verdict::Ok(format!("already joined to {} as {}", config.server, config.node_name)))?;
            if before.as_ref().is_some_and(|before| before.labels != config.labels) {
                let text = format!(
                    "the Node has joined: of these it only takes zone, region and instance type; set others with `kubectl label node {} KEY=VALUE`",
                    config.node_name
                );
                say(out, "labels", Verdict::Warning(text))?;
            }
        }
        let changed = before.as_ref() != Some(&config);
        if changed {
            config.store(data_dir)?;
            say(out, "configuration", Verdict::Ok(data_dir.join(config::FILE).display().to_string()))?;
        }
        Ok(changed && before.is_some())
    }

    /// Fetches the CA and a certificate.
    async fn enroll(&self, config: &Config, now: Timestamp, out: &mut impl Write) -> anyhow::Result<()> {
        let data_dir = &self.data.data_dir;
        let ca = match enroll::fetch_ca(&self.server, &self.token, now).await {
            Ok((ca, _)) => ca,
            Err(error) => return failed(out, "cluster", &error.into()),
        };
        say(out, "cluster", Verdict::Ok(format!("{} is the one the token was made for", self.server)))?;
        let applicant = Applicant {
            node: config.node_name.clone(),
            machine_id: machine_id(data_dir)?,
            labels: config.labels.clone(),
        };
        match enroll::enroll(&self.server, &self.token, &ca, &applicant, data_dir, now).await {
            Ok(enrolled) => {
                if enrolled.skew.abs() > SKEW_SECONDS {
                    let text = format!(
                        "this box's clock is off by {} s; set it, or times in statuses and events are wrong",
                        enrolled.skew
                    );
                    say(out, "clock", Verdict::Warning(text))?;
                }
                let until = enrolled.identity.not_after.strftime("%Y-%m-%d");
                say(
                    out,
                    "certificate",
                    Verdict::Ok(format!("for node {} until {until}, renewed by itself", enrolled.identity.node)),
                )
            }
            Err(error) => failed(out, "certificate", &error.into()),
        }
    }

    /// What was configured before, with what the flags ask for.
    fn config(&self, before: Option<&Config>) -> anyhow::Result<Config> {
        let name = match (&self.node_name, before) {
            (Some(name), _) => name.clone(),
            (None, Some(before)) => before.node_name.clone(),
            (None, None) => host_name()?,
        };
        let mut config = before.cloned().unwrap_or_else(|| Config::new(&self.server, &name));
        config.server = self.server.to_string();
        config.node_name = name;
        if let Some(endpoint) = &self.runtime_endpoint {
            config.runtime_endpoint.clone_from(endpoint);
        }
        if let Some(transport) = self.transport {
            config.transport = transport;
        }
        if let Some(dir) = &self.cni_conf_dir {
            config.cni_conf_dir = Some(dir.clone());
        }
        if let Some(dir) = &self.pods_dir {
            config.pods_dir.clone_from(dir);
        }
        if !self.labels.is_empty() {
            config.labels = order::map(self.labels.iter().cloned());
        }
        config.check(&self.data.data_dir).map_err(|(key, cause)| anyhow::anyhow!("{key}: {cause}"))?;
        Ok(config)
    }

    /// A box that belongs to another cluster, or goes by another name, is not taken over.
    fn same_cluster(
        &self,
        before: Option<&Config>,
        identity: Option<&Identity>,
        config: &Config,
    ) -> anyhow::Result<()> {
        let data_dir = self.data.data_dir.display();
        if let Some(before) = before
            && identity.is_some()
            && (before.server != config.server || before.node_name != config.node_name)
        {
            bail!(
                "{data_dir} is joined to {} as {} already; run `edgecore reset` first, or give another --data-dir",
                before.server,
                before.node_name
            );
        }
        let Some(identity) = identity else { return Ok(()) };
        if identity.node != config.node_name {
            bail!(
                "{data_dir} has the identity of node {} already; run `edgecore reset` first, or join with --node-name {0}",
                identity.node
            );
        }
        if !enroll::trusts(identity, &self.token) {
            bail!(
                "{data_dir} is joined to another cluster than the token's (its CA is another); run `edgecore reset` first, or give another --data-dir"
            );
        }
        Ok(())
    }
}

/// Installs the service, and has it run with what is configured now.
async fn start(service: &str, changed: bool, out: &mut impl Write) -> anyhow::Result<()> {
    let before = unit::installed();
    let is_new = before.as_deref() != Some(service);
    if is_new {
        files::write(Path::new(unit::PATH), service.as_bytes(), 0o644)
            .with_context(|| format!("cannot write {}", unit::PATH))?;
        systemctl(&["daemon-reload"]).await?;
    }
    systemctl(&["enable", "edgecore.service"]).await?;
    // One that runs goes on as it was started, whatever its unit says by now.
    let restart = changed || (is_new && before.is_some());
    systemctl(&[if restart { "restart" } else { "start" }, "edgecore.service"]).await?;
    say(out, "service", Verdict::Ok("edgecore.service runs and starts at boot; see `edgecore status`".to_owned()))
}

/// A box whose Node was deleted has ended its pods, and its certificate is refused: a new token alone does not bring it back.
fn not_deleted(data_dir: &Path, node: &str) -> anyhow::Result<()> {
    let notes = Snapshot::open(data_dir).and_then(|mut store| store.notes(NODE_NOTES)).unwrap_or_default();
    if notes.iter().any(|(key, _)| key == DELETED_NOTE) {
        bail!(
            "the Node {node} that this box joined as was deleted from the cluster; run `edgecore reset` first, then this again, with a token that is still good"
        );
    }
    Ok(())
}

fn say(out: &mut impl Write, what: &'static str, verdict: Verdict) -> anyhow::Result<()> {
    Ok(writeln!(out, "{}", Check { what, verdict })?)
}

fn failed(out: &mut impl Write, what: &'static str, error: &anyhow::Error) -> anyhow::Result<()> {
    say(out, what, Verdict::Failed(format!("{error:#}")))?;
    bail!("not joined; the same command can be run again")
}

fn host_name() -> anyhow::Result<String> {
    let name = nix::unistd::gethostname().context("cannot find out the host name; give --node-name")?;
    Ok(name.to_string_lossy().to_lowercase())
}

/// What tells this box from another of the same name: the system's id, or one of our own where there is none.
fn machine_id(data_dir: &Path) -> anyhow::Result<String> {
    let own = data_dir.join("machine-id");
    for path in [&own, Path::new("/etc/machine-id"), Path::new("/var/lib/dbus/machine-id")] {
        if let Ok(id) = std::fs::read_to_string(path)
            && !id.trim().is_empty()
        {
            return Ok(id.trim().to_owned());
        }
    }
    let id = format!("{:032x}", rand::random::<u128>());
    files::write(&own, id.as_bytes(), 0o600).with_context(|| format!("cannot write {}", own.display()))?;
    Ok(id)
}

#[cfg(test)]
mod tests;
