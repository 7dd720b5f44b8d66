//! `/metrics/resource`: what autoscaling reads. Names, labels and timestamps are those of the kubelet's stable resource metrics.

use std::fmt::Display;

use bytes::Bytes;
use jiff::Timestamp;

use super::cgroup::Usage;
use super::page::{Family, Labels, Page, Seconds};
use super::snapshot::Snapshot;

/// Writes the page.
pub(super) fn page(snapshot: &Snapshot) -> Bytes {
    let mut page = Page::default();
    let none = Labels::default();
    let node = [(&none, &snapshot.node)];
    let labelled = |pod: &super::snapshot::Pod| {
        Labels::new([("namespace", pod.listed.namespace.as_str()), ("pod", pod.listed.name.as_str())])
    };
    let pod_labels: Vec<Labels> = snapshot.pods.iter().map(labelled).collect();
    let pods = || pod_labels.iter().zip(snapshot.pods.iter().map(|pod| &pod.usage));
    let mut containers: Vec<(Labels, &Usage, Option<Timestamp>)> = Vec::new();
    for (labels, pod) in pod_labels.iter().zip(&snapshot.pods) {
        for container in &pod.containers {
            let labels = labels.and("container", &container.instance.name);
            containers.push((labels, &container.usage, container.instance.started_at));
        }
    }
    let of_containers = || containers.iter().map(|(labels, usage, _)| (labels, *usage));

    cpu(
        &mut page,
        "container_cpu_usage_seconds_total",
        "[STABLE] Cumulative cpu time consumed by the container in core-seconds",
        of_containers(),
    );
    memory(
        &mut page,
        "container_memory_working_set_bytes",
        "[STABLE] Current working set of the container in bytes",
        of_containers(),
    );
    let mut family =
        page.gauge("container_start_time_seconds", "[STABLE] Start time of the container since unix epoch in seconds");
    for (labels, _, started) in &containers {
        let started = started.and_then(|at| u64::try_from(at.as_nanosecond()).ok());
        if let Some(started) = started.filter(|started| *started > 0) {
            family.add(labels, Seconds(started), None);
        }
    }
    add(
        page.gauge(
            "container_swap_limit_bytes",
            "[ALPHA] Current amount of the container swap limit in bytes. Reported only on non-windows systems",
        ),
        of_containers(),
        |usage| usage.memory.as_ref()?.swap_limit,
    );
    swap(
        &mut page,
        "container_swap_usage_bytes",
        "[ALPHA] Current amount of the container swap usage in bytes. Reported only on non-windows systems",
        of_containers(),
    );
    cpu(
        &mut page,
        "node_cpu_usage_seconds_total",
        "[STABLE] Cumulative cpu time consumed by the node in core-seconds",
        node,
    );
    memory(&mut page, "node_memory_working_set_bytes", "[STABLE] Current working set of the node in bytes", node);
    swap(
        &mut page,
        "node_swap_usage_bytes",
        "[ALPHA] Current swap usage of the node in bytes. Reported only on non-windows systems",
        node,
    );
    cpu(
        &mut page,
        "pod_cpu_usage_seconds_total",
        "[STABLE] Cumulative cpu time consumed by the pod in core-seconds",
        pods(),
    );
    memory(&mut page, "pod_memory_working_set_bytes", "[STABLE] Current working set of the pod in bytes", pods());
    swap(
        &mut page,
        "pod_swap_usage_bytes",
        "[ALPHA] Current amount of the pod swap usage in bytes. Reported only on non-windows systems",
        pods(),
    );
    page.gauge(
        "resource_scrape_error",
        "[STABLE] 1 if there was an error while getting container metrics, 0 otherwise",
    )
    .add(&none, u8::from(snapshot.is_lacking), None);
    page.finish()
}

fn cpu<'a>(
    page: &mut Page,
    name: &'static str,
    help: &'static str,
    usages: impl IntoIterator<Item = (&'a Labels, &'a Usage)>,
) {
    add(page.counter(name, help), usages, |usage| Some(Seconds(usage.cpu.as_ref()?.usage)));
}

fn memory<'a>(
    page: &mut Page,
    name: &'static str,
    help: &'static str,
    usages: impl IntoIterator<Item = (&'a Labels, &'a Usage)>,
) {
    add(page.gauge(name, help), usages, |usage| Some(usage.memory.as_ref()?.working_set));
}

fn swap<'a>(
    page: &mut Page,
    name: &'static str,
    help: &'static str,
    usages: impl IntoIterator<Item = (&'a Labels, &'a Usage)>,
) {
    add(page.gauge(name, help), usages, |usage| usage.memory.as_ref()?.swap);
}

/// A sample of each usage that has the value, of the time at which it was read.
fn add<'a, V: Display>(
    mut family: Family<'_>,
    usages: impl IntoIterator<Item = (&'a Labels, &'a Usage)>,
    value: impl Fn(&Usage) -> Option<V>,
) {
    for (labels, usage) in usages {
        if let Some(value) = value(usage) {
            family.add(labels, value, Some(usage.at));
        }
    }
}
