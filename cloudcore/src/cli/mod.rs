//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use skerry_proto::DEFAULT_PORT;

use crate::config::{Advertise, Config, DEFAULT_NAMESPACE, PortRange, is_node_name, parse_host, parse_ttl};
use crate::log;
use crate::token::MAX_USES;

mod token;

/// The cloud side of Skerry: keeps edge nodes in step with a Kubernetes cluster.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:
  cloudcore run --kubeconfig ~/.kube/config --advertise-address cloud.example.com
  cloudcore token create --ttl 1h --uses 1 --node box-17
  cloudcore token list

Edge nodes dial the advertised address on one port, 10000 unless told otherwise; nothing ever dials them.
Everything that must last is in the cluster: Secrets in the namespace skerry-system. Any number of cloudcores may run side by side."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve edge nodes until SIGTERM.
    Run(Box<Run>),
    /// Make, list and revoke the tokens that boxes join with.
    #[command(subcommand)]
    Token(Token),
}

/// How to reach the cluster.
#[derive(Debug, Args)]
struct Cluster {
    /// Kubeconfig of the cluster [default: $KUBECONFIG, else the service account of the pod this runs in]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Namespace of cloudcore's own Secrets: its CA and the join tokens
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAMESPACE, value_parser = namespace)]
    namespace: String,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cloudcore run --kubeconfig ~/.kube/config --advertise-address 192.0.2.7
  cloudcore run --advertise-address cloud.example.com:443 --advertise-address 192.0.2.7      (in a pod, behind a balancer)

The first advertised address goes into the join commands that `cloudcore token create` prints; all of them go into the server
certificate, so that an edge may dial any. Health and metrics: curl http://127.0.0.1:10001/readyz")]
struct Run {
    #[command(flatten)]
    cluster: Cluster,
    /// Host name or IP address by which edge nodes reach this cloudcore, with a port if it differs from --port; may be repeated
    #[arg(long, value_name = "HOST[:PORT]", required = true)]
    advertise_address: Vec<Advertise>,
    /// The one port that edge nodes dial
    #[arg(long, value_name = "PORT", default_value_t = DEFAULT_PORT, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// Where /healthz, /readyz and /metrics are served
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:10001")]
    admin_address: SocketAddr,
    /// Keep a copy of the CA's certificate here, and refuse to go on with another CA when the one in the cluster was lost
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// DNS domain of the cluster, for pods on edge nodes
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local")]
    cluster_domain: String,
    /// Address of the cluster's DNS service, for pods on edge nodes; may be repeated
    #[arg(long, value_name = "IP")]
    cluster_dns: Vec<IpAddr>,
    /// Host name or IP address by which the apiserver, metrics-server and Prometheus reach this cloudcore, which is the kubelet of its
    /// nodes for them [default: the first advertised host]
    #[arg(long, value_name = "HOST", value_parser = parse_host)]
    kubelet_address: Option<String>,
    /// The ports that nodes get there, one each for as long as the Node exists
    #[arg(long, value_name = "FIRST-LAST", default_value = "20000-29999")]
    kubelet_ports: PortRange,
    /// Ask the cluster's signer kubernetes.io/kubelet-serving for their certificate; somebody has to approve the request
    #[arg(long)]
    kubelet_csr: bool,
    /// Form of the log on standard error
    #[arg(long, value_name = "FORM", default_value = "text")]
    log_format: log::Format,
    /// Log more; twice: log everything
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Token {
    /// Make a token and print the complete command that joins a box.
    Create(Create),
    /// List the tokens.
    List(Cluster),
    /// Revoke a token: no box can join with it from now on. Boxes that have joined stay.
    Revoke {
        /// The token's id, as `cloudcore token list` shows it, or the token itself
        id: String,
        #[command(flatten)]
        cluster: Cluster,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cloudcore token create                                  any number of boxes, for a day
  cloudcore token create --ttl 7d --uses 50               50 boxes within a week
  cloudcore token create --ttl 1h --uses 1 --node box-17  one box, under this name alone

The command to run on the box goes to standard output, and nothing else.")]
struct Create {
    #[command(flatten)]
    cluster: Cluster,
    /// How long it is good: 30m, 24h, 7d
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_ttl)]
    ttl: Duration,
    /// How many boxes may join with it [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_USES)))]
    uses: Option<u32>,
    /// The only node name it is good for
    #[arg(long, value_name = "NAME", value_parser = node_name)]
    node: Option<String>,
    /// Where the box finds cloudcore [default: what a running cloudcore advertises]
    #[arg(long, value_name = "HOST[:PORT]")]
    advertise_address: Option<Advertise>,
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(run) => {
            log::start(run.log_format, run.verbose);
            let config = run.config();
            runtime(true).and_then(|runtime| runtime.block_on(crate::app::run(config)))
        }
        Command::Token(command) => {
            log::start(log::Format::Text, 0);
            runtime(false).and_then(|runtime| runtime.block_on(token::run(command)))
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&error);
            ExitCode::FAILURE
        }
    }
}

impl Run {
    fn config(self) -> Config {
        let first = self.advertise_address.first().map(|address| address.host.clone());
        Config {
            kubelet_address: self.kubelet_address.or(first).unwrap_or_default(),
            kubelet_ports: self.kubelet_ports,
            kubelet_csr: self.kubelet_csr,
            kubeconfig: self.cluster.kubeconfig,
            advertise: self.advertise_address,
            port: self.port,
            admin: self.admin_address,
            namespace: self.cluster.namespace,
            data_dir: self.data_dir,
            cluster_domain: self.cluster_domain,
            cluster_dns: self.cluster_dns,
        }
    }
}

fn runtime(threads: bool) -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = match threads {
        true => tokio::runtime::Builder::new_multi_thread(),
        false => tokio::runtime::Builder::new_current_thread(),
    };
    Ok(builder.enable_all().build()?)
}

fn tell(error: &anyhow::Error) {
    use std::io::Write as _;
    let error: &(dyn std::error::Error + 'static) = error.as_ref();
    // Nobody is left to tell when standard error is closed.
    let _ = writeln!(std::io::stderr(), "cloudcore: {}", crate::retry::chain(error));
}

fn namespace(text: &str) -> Result<String, String> {
    match is_node_name(text) && !text.contains('.') {
        true => Ok(text.to_owned()),
        false => Err("not a namespace: lower case letters, digits and `-`, at most 63".to_owned()),
    }
}

fn node_name(text: &str) -> Result<String, String> {
    match is_node_name(text) {
        true => Ok(text.to_owned()),
        false => Err("not a node name: lower case letters, digits, `-` and `.`, such as box-17".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_run_has_defaults_that_work() {
        let Command::Run(run) = parse("cloudcore run --advertise-address cloud").unwrap().command else { panic!() };
        let config = run.config();
        assert_eq!((config.port, config.admin.to_string()), (10000, "127.0.0.1:10001".to_owned()));
        assert_eq!((config.kubelet_address.as_str(), config.kubelet_ports.first), ("cloud", 20000));
        assert_eq!((config.namespace.as_str(), config.cluster_domain.as_str()), ("skerry-system", "cluster.local"));
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for line in [
            "cloudcore",
            "cloudcore run",
            "cloudcore run --advertise-address https://x",
            "cloudcore run --advertise-address x --port 0",
            "cloudcore run --advertise-address x --frobnicate",
            "cloudcore run --advertise-address x --kubelet-ports 9-1",
            "cloudcore run --advertise-address x --kubelet-address y:1",
            "cloudcore run --advertise-address x --namespace A_b",
            "cloudcore token create --uses 0",
            "cloudcore token create --ttl 5",
            "cloudcore token create --node Box_1",
            "cloudcore token revoke",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        assert!(parse("cloudcore token create --ttl 7d --uses 3 --node box-1 --kubeconfig f").is_ok());
    }
}
