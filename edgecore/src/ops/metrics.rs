//! `/stats` and `/metrics`.

use hyper::StatusCode;

use super::Ops;
use super::answer::{Answer, Refusal, whole};
use super::health;
use super::query::Query;
use crate::stats::{METRICS_TYPE, SUMMARY_TYPE};

/// Answers `/stats/summary`, `/metrics`, `/metrics/resource`, `/metrics/cadvisor`, `/metrics/probes` and `/metrics/slis`.
pub(super) async fn metrics(ops: &Ops, path: &str, query: &Query) -> Result<Answer, Refusal> {
    if path == "/metrics/slis" {
        return Ok(whole(METRICS_TYPE, health::page(ops).into()));
    }
    let Some(stats) = ops.stats.borrow().clone() else {
        let words = "nothing is measured yet: the kubelet waits for the container runtime";
        return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, words));
    };
    Ok(match path {
        "/stats/summary" => {
            whole(SUMMARY_TYPE, stats.summary(query.first("only_cpu_and_memory") == Some("true")).await)
        }
        "/metrics" => {
            let mqtt = ops.mqtt.borrow().clone();
            whole(METRICS_TYPE, stats.metrics(&mqtt).await)
        }
        "/metrics/resource" => whole(METRICS_TYPE, stats.resource().await),
        "/metrics/cadvisor" => whole(METRICS_TYPE, stats.cadvisor().await),
        "/metrics/probes" => whole(METRICS_TYPE, stats.probes().await),
        _ => return Err(Refusal::missing("404: Page Not Found")),
    })
}
