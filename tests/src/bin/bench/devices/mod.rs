//! What devices cost a node, and how fast they are reached.
//!
//! Everything is real: the apiserver, cloudcore, the relay between it and edgecore, and the mappers that ship. The devices of the load count:
//! each value is its own sequence number, so that what is lost on the way to edgecore, or to the sink, is seen. The sink, and the device
//! that is written to, are an HTTP server of the benchmark's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use serde_json::json;
use skerry_tests::cloudcore::Cloudcore;
use skerry_tests::controlplane::ControlPlane;
use skerry_tests::edge::Edge;
use skerry_tests::kubectl::Kubectl;
use skerry_tests::process::Process;
use skerry_tests::relay::Relay;
use skerry_tests::runtime::Runtime;
use skerry_tests::wait::{eventually, until};
use skerry_tests::{paths, ports, procfs};

use self::local::Local;
use self::server::Server;
use crate::bed::{self, NODE};
use crate::figures::{rss, tell, tell_precisely};

mod idle;
mod load;
mod local;
mod mappers;
mod objects;
mod recovery;
mod server;
mod writes;

/// What memory is given to settle.
const SETTLE: Duration = Duration::from_secs(20);

/// What is measured, in this order.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// A thousand devices that are read, and more values until some are lost.
    Load,
    /// How long a desired value takes to the device.
    Writes,
    /// How long what was killed takes to come back.
    Recovery,
    /// The memory of each mapper.
    Mappers,
    /// Many devices that say nothing.
    Idle,
}

/// How much of it.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only this of `devices`.
    #[arg(long)]
    part: Option<Part>,
    /// For how long `devices` counts the values of its load.
    #[arg(long, default_value_t = 60)]
    load_seconds: u64,
    /// How many devices `devices` declares at once.
    #[arg(long, default_value_t = 50_000)]
    idle_devices: usize,
}

pub(crate) fn run(dir: &Path, options: &Options) -> Result<()> {
    let mut bed = Bed::start(dir)?;
    let wants = |part| options.part.is_none_or(|only| only == part);
    if wants(Part::Load) {
        load::measure(&bed, Duration::from_secs(options.load_seconds))?;
    }
    if wants(Part::Writes) {
        writes::measure(&bed)?;
    }
    if wants(Part::Recovery) {
        recovery::measure(&mut bed)?;
    }
    if wants(Part::Mappers) {
        mappers::measure(&bed)?;
    }
    if wants(Part::Idle) {
        idle::measure(&mut bed, options.idle_devices)?;
    }
    bed.edge.stop();
    Ok(())
}

/// One node with its cloud.
struct Bed {
    dir: PathBuf,
    kubectl: Kubectl,
    kubeconfig: PathBuf,
    edge: Edge,
    local: Local,
    server: Server,
    relay: Relay,
    cloud: Cloudcore,
    _runtime: Runtime,
    control: ControlPlane,
}

impl Bed {
    fn start(dir: &Path) -> Result<Self> {
        // Whether there is a broker shall not depend on the machine.
        let node = bed::Bed::start(dir, &[("mqtt_broker", "off")])?;
        let bed::Bed { edge, relay, cloud, kubectl, runtime, control } = node;
        for name in ["devicemodels", "devices", "devicestatuses"] {
            kubectl.run(&[
                "wait",
                "--for=condition=Established",
                "--timeout=60s",
                &format!("crd/{name}.devices.kubeedge.io"),
            ])?;
        }
        let local = Local(edge.data().join("edgecore.sock"));
        let kubeconfig = control.admin_kubeconfig().to_owned();
        let server = Server::start()?;
        Ok(Self {
            dir: dir.to_owned(),
            kubectl,
            kubeconfig,
            edge,
            local,
            server,
            relay,
            cloud,
            _runtime: runtime,
            control,
        })
    }

    /// Starts the mapper of a protocol, as devices may call it otherwise.
    fn mapper(&self, protocol: &str, alias: &str) -> Result<Process> {
        let dir = self.dir.join("mappers");
        fs::create_dir_all(&dir)?;
        let mut command = Command::new(paths::product(&format!("skerry-mapper-{protocol}"))?);
        command.args(["--name", alias, "--protocol", alias]);
        command.arg("--dmi-socket").arg(self.edge.dmi_socket());
        command.arg("--socket").arg(dir.join(format!("{alias}.sock"))).arg("--store").arg(dir.join(alias));
        Process::spawn(alias, &mut command, &dir.join(format!("{alias}.log")))
    }

    fn create(&self, plural: &str, count: usize, object: impl Fn(usize) -> serde_json::Value + Sync) -> Result<()> {
        objects::create(&self.kubeconfig, plural, count, object)
    }

    /// Waits until so many devices whose names begin so can be reached.
    fn reached(&self, prefix: &str, count: usize) -> Result<()> {
        until(&format!("{count} devices {prefix}… to be reached"), 120, || Ok(self.local.figures(prefix)?.2 == count))
    }

    fn edgecore(&self) -> Result<i32> {
        self.edge.pid().context("edgecore does not run")
    }

    /// What was written about devices so far, as the apiserver counts it: without what it refused.
    fn writes(&self) -> Result<f64> {
        let text = self.kubectl.run(&["get", "--raw", "/metrics"])?;
        let requests = text.lines().filter(|line| {
            line.starts_with("apiserver_request_total{")
                && line.contains("group=\"devices.kubeedge.io\"")
                && line.contains("code=\"2")
                && ["POST", "PUT", "PATCH", "DELETE"].iter().any(|verb| line.contains(&format!("verb=\"{verb}\"")))
        });
        Ok(requests.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }
}

/// The middle one, and the last.
fn median(mut all: Vec<f64>) -> (f64, f64) {
    all.sort_by(f64::total_cmp);
    (all[all.len() / 2], all[all.len() - 1])
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn float(number: u64) -> f64 {
    number as f64
}
