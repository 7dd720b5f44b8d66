//! The command line: the agent itself, and what a technician does at the box.

use std::io::Write as _;
use std::path::{PathBuf, absolute};
use std::process::ExitCode;

use clap::builder::{PathBufValueParser, TypedValueParser as _};
use clap::{Args, Parser, Subcommand};
use tracing::level_filters::LevelFilter;

use crate::config::{Config, DATA_DIR};

mod describe;
mod device;
mod exec;
mod get;
mod join;
mod logs;
mod node;
mod port_forward;
mod reset;
mod spdy;
mod status;
mod terminal;
mod top;
mod unit;

/// The agent of an edge node of Skerry.
#[derive(Parser, Debug)]
#[command(name = "edgecore", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Say more on stderr (-vv: even more); SKERRY_LOG=error|warn|info|debug|trace says it exactly.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Make this box a node of a cluster; can be repeated and interrupted.
    Join(Box<join::Join>),
    /// Run the agent.
    Run(Run),
    /// How this node is: link, store, pods, certificate. Exit code 0: online, 3: running but offline, 4: not running.
    Status(status::StatusArgs),
    /// List what this node holds, with no cloud needed.
    Get(get::Get),
    Describe(describe::Describe),
    Logs(logs::Logs),
    Exec(exec::Exec),
    Attach(exec::Attach),
    PortForward(port_forward::PortForward),
    Device(device::Device),
    Top(top::Top),
    /// Take everything of edgecore off this box: pods, mounts, identity, state.
    Reset(reset::Reset),
}

#[derive(Args, Debug)]
struct Run {
    #[command(flatten)]
    data: DataDir,
    /// Print the configuration with every default, and end.
    #[arg(long)]
    print_config: bool,
}

#[derive(Args, Debug, Clone)]
struct DataDir {
    /// Where edgecore keeps its own state.
    // Absolute, for a service, a socket's clients and an agent may each work from another directory.
    #[arg(long, default_value = DATA_DIR, value_parser = PathBufValueParser::new().try_map(absolute::<PathBuf>))]
    data_dir: PathBuf,
}

impl Cli {
    /// Does what was asked.
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Join(join) => join.run().await,
            Command::Run(run) => {
                if run.print_config {
                    print(&Config::load(&run.data.data_dir)?.to_toml());
                } else {
                    Box::pin(crate::app::run(run.data.data_dir)).await?;
                }
                Ok(ExitCode::SUCCESS)
            }
            Command::Status(status) => status.run().await,
            Command::Get(get) => get.run().await,
            Command::Describe(describe) => describe.run().await,
            Command::Logs(logs) => logs.run().await,
            Command::Exec(exec) => Box::pin(exec.run()).await,
            Command::Attach(attach) => Box::pin(attach.run()).await,
            Command::PortForward(forward) => Box::pin(forward.run()).await,
            Command::Device(device) => device.run().await,
            Command::Top(top) => top.run().await,
            Command::Reset(reset) => reset.run().await,
        }
    }

    fn level(&self) -> LevelFilter {
        if let Some(level) = std::env::var("SKERRY_LOG").ok().and_then(|text| text.parse().ok()) {
            return level;
        }
        match (&self.command, self.verbose) {
            (Command::Run(_), 0) | (_, 1) => LevelFilter::INFO,
            (_, 0) => LevelFilter::ERROR,
            (_, 2) => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        }
    }
}

/// Sends the log to stderr, at the level asked for.
pub fn log(cli: &Cli) {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(cli.level()).with_target(false).init();
}

/// Says why nothing came of it, with all causes.
pub fn fail(error: &anyhow::Error) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {error:#}");
    ExitCode::FAILURE
}

/// Writes to stdout; a reader that went away (`| head`) is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Says something beside what was asked for.
fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Columns as wide as their widest cell, three spaces apart.
fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let header: Vec<String> = header.iter().map(|&cell| cell.to_owned()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            line.push_str(&format!("{cell:<width$}   "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn a_relative_data_directory_is_where_one_stands() {
        for (given, there) in [("state/edge", "state/edge"), ("./state", "state"), ("/srv/state", "/srv/state")] {
            let cli = Cli::try_parse_from(["edgecore", "run", "--data-dir", given]).unwrap();
            let Command::Run(run) = cli.command else { panic!("{given} is not taken") };
            assert_eq!(run.data.data_dir, std::env::current_dir().unwrap().join(there));
        }
        assert!(Cli::try_parse_from(["edgecore", "run", "--data-dir", ""]).is_err());
    }

    #[test]
    fn the_command_line_is_consistent_and_unknown_flags_are_refused() {
        Cli::command().debug_assert();
        assert!(Cli::try_parse_from(["edgecore", "run", "--daemonise"]).is_err());
        let token = format!("skerry.abc123.{}.{}", "s".repeat(32), "0f".repeat(32));
        let join = ["edgecore", "join", "h:1", "--token", &token, "--label", "a=b", "--label", "c=d", "--no-start"];
        assert!(Cli::try_parse_from(join).is_ok());
        assert!(Cli::try_parse_from(["edgecore", "join", "h:1", "--token", "t"]).is_err());
        assert!(Cli::try_parse_from(["edgecore", "join", "h:1"]).is_err());
        for line in [
            "logs web -n shop -c main -f -p --tail 3 --since 5m --timestamps",
            "logs web --tail -1",
            "logs web --since-time 2026-01-02T15:04:05+02:00",
            "get pod web -n shop -o json",
            "exec -it web -c main -- sh -c true",
            "attach -it web",
            "port-forward web 8080:80 :81",
            "describe pod web -n shop",
            "top node",
            "top pods -A --containers --sort-by memory",
        ] {
            let words = std::iter::once("edgecore").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        assert!(Cli::try_parse_from(["edgecore", "exec", "web"]).is_err());
        assert!(Cli::try_parse_from(["edgecore", "port-forward", "web"]).is_err());
    }
}
