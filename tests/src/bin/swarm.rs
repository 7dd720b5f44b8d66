//! `swarm`: the edge sides of `bench scale`. Commands come in on standard input, a line of JSON each; see [`skerry_tests::swarm`].
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use skerry_tests::swarm::{Command, Fleet, Options, Transport};

#[derive(Parser)]
struct Arguments {
    /// Names the run that this belongs to, so that it can be found and ended.
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    nodes: usize,
    #[arg(long)]
    cloud: SocketAddr,
    #[arg(long)]
    transport: Transport,
    #[arg(long)]
    kubeconfig: PathBuf,
}

fn main() -> Result<()> {
    let Arguments { dir: _, nodes, cloud, transport, kubeconfig } = Arguments::parse();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut fleet = Fleet::new(Options { nodes, cloud, transport, kubeconfig });
    for line in std::io::stdin().lines() {
        let command: Command = serde_json::from_str(&line?)?;
        println!("{}", runtime.block_on(fleet.obey(command))?);
    }
    Ok(())
}
