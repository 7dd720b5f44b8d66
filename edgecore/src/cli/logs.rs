//! `edgecore logs`: a container's log, with kubectl's flags.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Args;
use http_body_util::BodyExt as _;
use hyper::Method;
use jiff::Timestamp;

use super::DataDir;
use super::node::Node;

/// Print what a container says. It works with no cloud, as long as edgecore runs.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  edgecore logs web                          the log of the only container of pod web
  edgecore logs web -c proxy -n shop -f      follow container proxy of a pod of namespace shop
  edgecore logs web --tail 20 --timestamps   the last 20 lines, with their times
  edgecore logs web --since 10m              what was said in the last ten minutes
  edgecore logs web -p                       what the instance before this one said, as after a crash")]
pub(super) struct Logs {
    /// The pod, as `edgecore get pods` shows it.
    pod: String,
    /// Its namespace; unless given `default`, or the only one that has a pod of this name here.
    #[arg(short, long)]
    namespace: Option<String>,
    /// The container; the pod's default or first one unless given.
    #[arg(short, long)]
    container: Option<String>,
    /// Go on with what comes, until the container ends.
    #[arg(short, long)]
    follow: bool,
    /// Of the instance before.
    #[arg(short, long)]
    previous: bool,
    /// The last so many lines; all with -1.
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    tail: i64,
    /// No older than this, such as 30s, 10m or 1h30m.
    #[arg(long, value_name = "DURATION", value_parser = seconds)]
    since: Option<u64>,
    /// No older than this time, such as 2026-01-02T15:04:05Z.
    #[arg(long, value_name = "TIME", conflicts_with = "since")]
    since_time: Option<Timestamp>,
    /// No more bytes than these.
    #[arg(long, value_name = "N")]
    limit_bytes: Option<u64>,
    /// With the time of each line.
    #[arg(long)]
    timestamps: bool,
    #[command(flatten)]
    data: DataDir,
}

impl Logs {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let node = Node::of(&self.data)?;
        let pod = node.pod(self.namespace.as_deref(), &self.pod).await?;
        let container = pod.container(self.container.as_deref())?;
        let path = format!("{}?{}", pod.path("containerLogs", Some(&container)), self.query());
        let mut body = node.ask(Method::GET, &path, &[]).await?.into_body();
        let mut out = std::io::stdout().lock();
        while let Some(frame) = body.frame().await {
            let frame = frame.context("the log broke off; see whether edgecore still runs")?;
            let Ok(data) = frame.into_data() else { continue };
            if out.write_all(&data).and_then(|()| out.flush()).is_err() {
                // Who read it has gone (`| head`).
                break;
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    fn query(&self) -> String {
        let mut query = Vec::new();
        for (name, wanted) in [("follow", self.follow), ("previous", self.previous), ("timestamps", self.timestamps)] {
            if wanted {
                query.push(format!("{name}=true"));
            }
        }
        if self.tail >= 0 {
            query.push(format!("tailLines={}", self.tail));
        }
        query.extend(self.since.map(|since| format!("sinceSeconds={since}")));
        query.extend(self.since_time.map(|since| format!("sinceTime={since}")));
        query.extend(self.limit_bytes.map(|bytes| format!("limitBytes={bytes}")));
        query.join("&")
    }
}

/// A span as Go writes it, in whole seconds, rounded up.
fn seconds(text: &str) -> anyhow::Result<u64> {
    let wrong = || format!("{text:?} is not a span of time such as 30s, 10m or 1h30m");
    let mut milliseconds = 0_u64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest[..digits].parse().ok().with_context(wrong)?;
        rest = &rest[digits..];
        let unit = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let each = match &rest[..unit] {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1000,
            "ms" => 1,
            _ => bail!(wrong()),
        };
        rest = &rest[unit..];
        milliseconds = number.checked_mul(each).and_then(|sum| sum.checked_add(milliseconds)).with_context(wrong)?;
    }
    if milliseconds == 0 { bail!(wrong()) } else { Ok(milliseconds.div_ceil(1000)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_gos() {
        for (text, expected) in [("30s", 30), ("10m", 600), ("1h30m", 5400), ("1500ms", 2)] {
            assert_eq!(seconds(text).unwrap(), expected);
        }
        for wrong in ["", "10", "m", "5d", "-1s", "99999999999999999999h", "0s"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
