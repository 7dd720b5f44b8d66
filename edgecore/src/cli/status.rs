//! `edgecore status`: how the node is, for people; the exit code for scripts.

use std::process::ExitCode;

use clap::Args;
use jiff::Timestamp;

use super::{DataDir, print};
use crate::clock;
use crate::config::Config;
use crate::control::{self, AskError, LinkStatus, Request, Status, age};
use crate::devices::mqtt;
use crate::identity::Identity;
use crate::link::{DELETED_NOTE, Deleted, NODE_NOTES};
use crate::store::{Snapshot, Stats};

/// Runs, has no session.
const OFFLINE: u8 = 3;
/// Does not run.
const NOT_RUNNING: u8 = 4;

#[derive(Args, Debug)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    data: DataDir,
    /// As JSON.
    #[arg(short, long, value_parser = ["json"])]
    output: Option<String>,
}

impl StatusArgs {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let data_dir = &self.data.data_dir;
        let config = Config::load(data_dir)?;
        match control::ask::<Status>(&config.control_socket(data_dir), &Request::Status).await {
            Ok(status) => {
                if self.output.is_some() {
                    print(&format!("{}\n", serde_json::to_string_pretty(&status)?));
                } else {
                    print(&human(&status, clock::wall()));
                }
                Ok(if matches!(status.link, LinkStatus::Online { .. }) { ExitCode::SUCCESS } else { OFFLINE.into() })
            }
            Err(AskError::NotRunning(_)) => {
                print(&self.without_daemon(&config)?);
                Ok(NOT_RUNNING.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What the files say.
    fn without_daemon(&self, config: &Config) -> anyhow::Result<String> {
        let data_dir = &self.data.data_dir;
        if self.output.is_some() {
            return Ok(format!(
                "{}\n",
                serde_json::json!({ "node": config.node_name, "server": config.server, "running": false })
            ));
        }
        let now = clock::wall();
        let mut text = head(&config.node_name, &config.server);
        text += &line("Agent", "not running; start it with `systemctl start edgecore` or `edgecore run`");
        if let Ok(mut snapshot) = Snapshot::open(data_dir) {
            let deleted =
                snapshot.notes(NODE_NOTES).unwrap_or_default().into_iter().find(|(key, _)| key == DELETED_NOTE);
            if let Some(deleted) = deleted.and_then(|(_, note)| serde_json::from_slice::<Deleted>(&note).ok()) {
                text += &line("Link", &deleted_words(&deleted.message));
            }
            if let Ok(stats) = snapshot.stats() {
                text += &store(&stats);
            }
        }
        match Identity::load(data_dir) {
            Ok(Some(identity)) => text += &certificate(identity.not_after, now),
            Ok(None) => {
                text +=
                    &line("Certificate", "none; run the `edgecore join …` line that `cloudcore token create` prints")
            }
            Err(error) => text += &line("Certificate", &error.to_string()),
        }
        Ok(text)
    }
}

fn human(status: &Status, now: Timestamp) -> String {
    let since = |seconds: i64| Timestamp::from_second(seconds).map_or_else(|_| "?".to_owned(), |at| age(at, now));
    let mut text = head(&status.node, &status.server);
    text += &line("Agent", &format!("running, version {}, process {}", status.version, status.pid));
    text += &match &status.link {
        LinkStatus::Online { since: at, epoch, transport } => {
            line("Link", &format!("online for {} over {transport}, session {epoch}", since(*at)))
        }
        LinkStatus::Offline { since: at, reason } => {
            line("Link", &format!("offline for {}; the pods go on", since(*at))) + &line("", reason)
        }
        LinkStatus::Connecting { attempt, last_error } => {
            line("Link", &format!("connecting, attempt {attempt}"))
                + &last_error.as_ref().map_or_else(String::new, |error| line("", error))
        }
        LinkStatus::Deleted { message } => line("Link", &deleted_words(message)),
    };
    let pods = status.pods;
    text += &line("Pods", &format!("{} wanted, {} running, {} ready", pods.total, pods.running, pods.ready));
    text += &store(&status.store);
    text += &mqtt(&status.mqtt);
    let until = status.certificate_expires.and_then(|seconds| Timestamp::from_second(seconds).ok());
    text + &until.map_or_else(|| line("Certificate", "none that can be used"), |at| certificate(at, now))
}

fn head(node: &str, server: &str) -> String {
    line("Node", node) + &line("Server", server)
}

fn line(name: &str, value: &str) -> String {
    let name = if name.is_empty() { String::new() } else { format!("{name}:") };
    format!("{name:<13}{value}\n")
}

fn deleted_words(message: &str) -> String {
    format!("this node was deleted in the cloud, its pods are ended ({message}); run `edgecore reset`, then join again")
}

fn store(stats: &Stats) -> String {
    let mut words = format!("{} objects, {} KiB, {} reports wait", stats.rows, stats.bytes / 1024, stats.pending);
    if stats.damaged > 0 {
        words += &format!(", {} damaged rows dropped (check the disk)", stats.damaged);
    }
    if !stats.pods_known {
        words += ", the list of pods is not confirmed by the cloud yet";
    }
    let mut text = line("Store", &words);
    if stats.refused > 0 {
        text += &line(
            "",
            &format!("{} reports were refused for good, the last one: {}", stats.refused, stats.last_refusal),
        );
    }
    text
}

fn mqtt(status: &mqtt::Status) -> String {
    if !status.connected {
        return line("MQTT", &status.message);
    }
    let mut words = format!("{}; {} requests, {} values published", status.message, status.requests, status.published);
    if status.refused > 0 {
        words += &format!(", {} requests refused", status.refused);
    }
    if status.dropped > 0 {
        words += &format!(", {} results dropped: the broker does not take them", status.dropped);
    }
    let rules = if status.is_own {
        "the access rules are in force"
    } else {
        "the access rules are not in force by themselves: the broker is not edgecore's; docs/mqtt.md says how to give them to it"
    };
    line("MQTT", &words) + &line("", rules)
}

fn certificate(until: Timestamp, now: Timestamp) -> String {
    let words = if until < now {
        format!(
            "expired {} ago; if it is not renewed when the link is back, run `edgecore reset` and join again",
            age(until, now)
        )
    } else {
        format!("valid for another {} (until {})", age(now, until), until.strftime("%Y-%m-%d"))
    };
    line("Certificate", &words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_read() {
        let status = Status {
            node: "box-1".to_owned(),
            server: "edge.example.org:10000".to_owned(),
            version: "0.1.0".to_owned(),
            pid: 7,
            link: LinkStatus::Offline {
                since: 0,
                reason: "edge.example.org:10000 did not answer within 10 s".to_owned(),
            },
            store: Stats {
                rows: 12,
                bytes: 40_960,
                pending: 3,
                damaged: 1,
                refused: 1,
                last_refusal: "gone".to_owned(),
                epoch: 4,
                pods_known: false,
            },
            pods: control::Pods { total: 3, running: 2, ready: 1 },
            certificate_expires: Some(864_000),
            mqtt: mqtt::Status {
                connected: true,
                message: "127.0.0.1:1883".to_owned(),
                is_own: false,
                is_missed: false,
                published: 9,
                requests: 2,
                refused: 1,
                dropped: 0,
            },
        };
        insta::assert_snapshot!(human(&status, Timestamp::from_second(3600).unwrap()), @r"
        Node:        box-1
        Server:      edge.example.org:10000
        Agent:       running, version 0.1.0, process 7
        Link:        offline for 60m; the pods go on
                     edge.example.org:10000 did not answer within 10 s
        Pods:        3 wanted, 2 running, 1 ready
        Store:       12 objects, 40 KiB, 3 reports wait, 1 damaged rows dropped (check the disk), the list of pods is not confirmed by the cloud yet
                     1 reports were refused for good, the last one: gone
        MQTT:        127.0.0.1:1883; 2 requests, 9 values published, 1 requests refused
                     the access rules are not in force by themselves: the broker is not edgecore's; docs/mqtt.md says how to give them to it
        Certificate: valid for another 9d (until 1970-01-11)
        ");
    }
}
