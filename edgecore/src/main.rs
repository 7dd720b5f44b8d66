//! edgecore: the agent of an edge node, and the tool of whoever stands beside it.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use edgecore::cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    edgecore::cli::log(&cli);
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        return edgecore::cli::fail(&anyhow::anyhow!("the TLS provider is installed twice"));
    }
    // One thread for everything that waits, the store's for the disk, and few that come and go for what blocks.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_keep_alive(Duration::from_secs(5))
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(cli.run()).unwrap_or_else(|error| edgecore::cli::fail(&error)),
        Err(error) => edgecore::cli::fail(&error.into()),
    }
}
