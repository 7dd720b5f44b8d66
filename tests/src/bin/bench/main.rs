//! `bench`: the promised figures, ours and the upstream kubelet's, from one run on one machine.
//!
//! Standard output has one line a figure, `figure subject value unit`, separated by tabs; what is being done goes to standard error, and at
//! the end whether what is promised is kept. If anything is not, it fails.
#![allow(clippy::print_stdout, reason = "its output is its purpose")]
#![allow(clippy::disallowed_methods, reason = "it measures the time that passes outside")]

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use skerry_tests::cleanup;
use skerry_tests::controlplane::ControlPlane;
use skerry_tests::paths::RunDir;
use skerry_tests::swarm::Transport;

use crate::agents::Bench;

mod agents;
mod bed;
mod control;
mod devices;
mod figures;
mod link;
mod ops;
mod scale;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Group {
    /// Sizes, memory, processor time.
    Weight,
    /// How fast pods start, and start again.
    Pods,
    /// Many nodes on one cloudcore.
    Scale,
    /// What the link carries.
    Link,
    /// What kubectl and monitoring see of a node.
    Ops,
    /// What devices cost a node, and how fast they are reached.
    Devices,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Subject {
    Edgecore,
    Kubelet,
}

#[derive(Parser)]
struct Arguments {
    /// Only these figures.
    group: Option<Group>,
    /// Only this agent.
    #[arg(long)]
    subject: Option<Subject>,
    /// How many nodes `scale` has.
    #[arg(long, default_value_t = 10_000)]
    nodes: usize,
    /// What carries the sessions of `scale`.
    #[arg(long, value_enum, default_value_t)]
    transport: Transport,
    /// For how long `link` listens to an idle node.
    #[arg(long, default_value_t = 600)]
    idle_seconds: u64,
    #[command(flatten)]
    devices: devices::Options,
}

fn main() -> Result<()> {
    // As a janitor it is called `bench janitor DIR`, which is no group.
    let words: Vec<String> = std::env::args().collect();
    if let [_, word, dir] = words.as_slice()
        && word == "janitor"
    {
        std::io::stdin().read_to_end(&mut Vec::new())?;
        return cleanup::sweep(Path::new(dir));
    }
    let arguments = Arguments::parse();
    if std::env::var_os("KUBECONFIG").is_some_and(|value| !value.is_empty()) {
        bail!("the benchmark needs a control plane of its own, beside which nothing else runs: unset KUBECONFIG");
    }
    let run = RunDir::temporary(&std::env::current_exe()?)?;
    let measured = measure(&arguments, run.path());
    // Of what was told, also where that broke off.
    let judged = figures::judge();
    measured.and(judged)
}

fn measure(arguments: &Arguments, dir: &Path) -> Result<()> {
    match arguments.group {
        Some(Group::Scale) => return scale::run(dir, arguments.nodes, arguments.transport),
        Some(Group::Link) => return link::run(dir, Duration::from_secs(arguments.idle_seconds)),
        Some(Group::Devices) => return devices::run(dir, &arguments.devices),
        Some(Group::Weight | Group::Pods | Group::Ops) | None => {}
    }
    eprintln!("starting a control plane");
    let control = ControlPlane::start(&dir.join("control"))?;
    for subject in [Subject::Edgecore, Subject::Kubelet] {
        if arguments.subject.is_none_or(|only| only == subject) {
            let is_ops = arguments.group == Some(Group::Ops);
            let mut bench = Bench::start(&control, dir, subject, is_ops)?;
            if is_ops {
                ops::measure(&bench, &control.authority()?.client(dir, "scraper", "admin", &["system:masters"])?)?;
                continue;
            }
            if arguments.group != Some(Group::Pods) {
                bench.weight()?;
            }
            if arguments.group != Some(Group::Weight) {
                bench.pods()?;
            }
        }
    }
    Ok(())
}
