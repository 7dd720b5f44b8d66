//! `edgecore top`: what the node and its pods use now, in kubectl's habits.

use std::cmp::Reverse;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use http_body_util::{BodyExt as _, Limited};
use hyper::Method;
use serde::Deserialize;

use super::node::Node;
use super::{DataDir, note, print, table};
use crate::config::Config;
use crate::kubelet::node::{Machine, Resources, capacity};
use crate::order;

/// A summary of all the pods that a node may have is smaller.
const MAX_SUMMARY: usize = 16 << 20;
/// CPU and memory alone; their rates are of the time since the last request, or of a tenth of a second.
const SUMMARY: &str = "/stats/summary?only_cpu_and_memory=true";

/// Show what is used now. It works with no cloud, as long as edgecore runs.
#[derive(Args, Debug)]
pub(super) struct Top {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// This node, and how much of what pods may have that is.
    #[command(alias = "nodes", alias = "no")]
    Node {
        #[command(flatten)]
        data: DataDir,
    },
    /// Its pods.
    #[command(
        alias = "pods",
        alias = "po",
        after_help = "\
Examples:
  edgecore top pod                     all pods of this node
  edgecore top pod -n shop             of namespace shop
  edgecore top pod web --containers    each container of pod web
  edgecore top pod --sort-by memory    the largest first"
    )]
    Pod(Pods),
}

#[derive(Args, Debug)]
struct Pods {
    /// Only the pod of this name.
    name: Option<String>,
    /// Only of this namespace.
    #[arg(short, long, conflicts_with = "all_namespaces")]
    namespace: Option<String>,
    /// Of all namespaces, which is the default.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Each container.
    #[arg(long)]
    containers: bool,
    /// The largest first.
    #[arg(long)]
    sort_by: Option<Sort>,
    #[command(flatten)]
    data: DataDir,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Cpu,
    Memory,
}

/// What is read of `/stats/summary`.
#[derive(Deserialize)]
struct Summary {
    node: NodeStats,
    pods: Vec<PodStats>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeStats {
    node_name: String,
    #[serde(flatten)]
    used: Used,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodStats {
    pod_ref: PodReference,
    containers: Vec<ContainerStats>,
}

#[derive(Deserialize)]
struct PodReference {
    name: String,
    namespace: String,
}

#[derive(Deserialize)]
struct ContainerStats {
    name: String,
    #[serde(flatten)]
    used: Used,
}

#[derive(Clone, Copy, Default, Deserialize)]
struct Used {
    #[serde(default)]
    cpu: Cpu,
    #[serde(default)]
    memory: Memory,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cpu {
    #[serde(default)]
    usage_nano_cores: u64,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Memory {
    #[serde(default)]
    working_set_bytes: u64,
}

impl Top {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        match self.what {
            What::Node { data } => {
                let pods_dir = Config::load(&data.data_dir)?.pods_dir;
                let capacity = capacity(&Machine::read(), &pods_dir, 0);
                print(&node_table(&summary(&data).await?, &capacity.allocatable()));
            }
            What::Pod(pods) => {
                let text = pods.table(&summary(&pods.data).await?);
                if let Some(name) = pods.name.as_ref().filter(|_| text.is_empty()) {
                    anyhow::bail!("nothing is known of pod {name:?}; `edgecore get pods` lists them");
                }
                if text.is_empty() {
                    note("No resources found.");
                }
                print(&text);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

async fn summary(data: &DataDir) -> anyhow::Result<Summary> {
    let answer = Node::of(data)?.ask(Method::GET, SUMMARY, &[]).await?;
    let body = Limited::new(answer.into_body(), MAX_SUMMARY).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("the answer broke off: {error}; see edgecore's log"))?;
    serde_json::from_slice(&body.to_bytes()).context("edgecore's answer is none of /stats/summary")
}

fn node_table(summary: &Summary, allocatable: &Resources) -> String {
    let NodeStats { node_name, used } = &summary.node;
    let cpus = u64::from(allocatable.cpus) * 1000;
    let row = vec![
        node_name.clone(),
        used.cores(),
        percent(used.milli(), cpus),
        used.mebibytes(),
        percent(used.memory.working_set_bytes, allocatable.memory),
    ];
    table(&["NAME", "CPU(cores)", "CPU(%)", "MEMORY(bytes)", "MEMORY(%)"], &[row])
}

impl Pods {
    /// Empty if there are none.
    fn table(&self, summary: &Summary) -> String {
        let wanted = |pod: &&PodStats| {
            self.namespace.as_ref().is_none_or(|namespace| *namespace == pod.pod_ref.namespace)
                && self.name.as_ref().is_none_or(|name| *name == pod.pod_ref.name)
        };
        let mut pods: Vec<&PodStats> = summary.pods.iter().filter(wanted).collect();
        order::sort_by(&mut pods, |one, other| one.key().cmp(&other.key()));
        match self.sort_by {
            Some(Sort::Cpu) => order::sort_by_key(&mut pods, |pod| Reverse(pod.used().cpu.usage_nano_cores)),
            Some(Sort::Memory) => order::sort_by_key(&mut pods, |pod| Reverse(pod.used().memory.working_set_bytes)),
            None => {}
        }
        let (mut header, mut rows) = (vec!["NAMESPACE", "NAME", "CPU(cores)", "MEMORY(bytes)"], Vec::new());
        for pod in pods {
            let names = [pod.pod_ref.namespace.clone(), pod.pod_ref.name.clone()];
            let row = |more: Option<&str>, used: Used| {
                let more = more.map(str::to_owned);
                names.iter().cloned().chain(more).chain([used.cores(), used.mebibytes()]).collect::<Vec<_>>()
            };
            if self.containers {
                rows.extend(pod.containers.iter().map(|container| row(Some(&container.name), container.used)));
            } else {
                rows.push(row(None, pod.used()));
            }
        }
        if self.containers {
            header[1] = "POD";
            header.insert(2, "NAME");
        }
        if rows.is_empty() { String::new() } else { table(&header, &rows) }
    }
}

impl PodStats {
    fn key(&self) -> (&str, &str) {
        (&self.pod_ref.namespace, &self.pod_ref.name)
    }

    /// The sum of its containers, as metrics-server has it.
    fn used(&self) -> Used {
        self.containers.iter().fold(Used::default(), |mut sum, container| {
            sum.cpu.usage_nano_cores += container.used.cpu.usage_nano_cores;
            sum.memory.working_set_bytes += container.used.memory.working_set_bytes;
            sum
        })
    }
}

impl Used {
    /// Thousandths of a core; what is begun counts.
    fn milli(self) -> u64 {
        self.cpu.usage_nano_cores.div_ceil(1_000_000)
    }

    fn cores(self) -> String {
        format!("{}m", self.milli())
    }

    fn mebibytes(self) -> String {
        format!("{}Mi", self.memory.working_set_bytes >> 20)
    }
}

fn percent(used: u64, of: u64) -> String {
    (used * 100).checked_div(of).map_or_else(|| "<unknown>".to_owned(), |percent| format!("{percent}%"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    fn used(cores: u64, bytes: u64) -> serde_json::Value {
        json!({ "usageNanoCores": cores, "workingSetBytes": bytes })
    }

    fn example() -> Summary {
        let container = |name: &str, cores, bytes| json!({ "name": name, "cpu": used(cores, 0), "memory": used(0, bytes), "startTime": null });
        let pod = |namespace: &str, name: &str, containers: &[serde_json::Value]| json!({ "podRef": { "name": name, "namespace": namespace, "uid": "u" }, "containers": containers });
        let summary = json!({
            "node": { "nodeName": "box", "cpu": used(123_000_001, 0), "memory": used(0, 300 << 20), "systemContainers": [] },
            "pods": [
                pod("shop", "web", &[container("main", 2_000_000, 10 << 20), container("proxy", 1, 5 << 20)]),
                pod("default", "db", &[container("main", 1_000_000, 40 << 20), json!({ "name": "just started" })]),
            ],
        });
        serde_json::from_value(summary).unwrap()
    }

    #[test]
    fn tables_read_as_kubectls() {
        let allocatable =
            Resources { cpus: 2, memory: 1 << 30, ephemeral_storage: 0, pods: 110, hugepages: BTreeMap::new() };
        insta::assert_snapshot!(node_table(&example(), &allocatable), @r"
        NAME   CPU(cores)   CPU(%)   MEMORY(bytes)   MEMORY(%)
        box    124m         6%       300Mi           29%
        ");
        let data = DataDir { data_dir: "/nowhere".into() };
        let mut pods =
            Pods { name: None, namespace: None, all_namespaces: false, containers: false, sort_by: None, data };
        insta::assert_snapshot!(pods.table(&example()), @r"
        NAMESPACE   NAME   CPU(cores)   MEMORY(bytes)
        default     db     1m           40Mi
        shop        web    3m           15Mi
        ");
        pods.sort_by = Some(Sort::Cpu);
        pods.containers = true;
        insta::assert_snapshot!(pods.table(&example()), @r"
        NAMESPACE   POD   NAME           CPU(cores)   MEMORY(bytes)
        shop        web   main           2m           10Mi
        shop        web   proxy          1m           5Mi
        default     db    main           1m           40Mi
        default     db    just started   0m           0Mi
        ");
        pods.namespace = Some("none".to_owned());
        assert_eq!(pods.table(&example()), "");
        assert_eq!(percent(1, 0), "<unknown>");
    }
}
