//! `/metrics/cadvisor`: names and labels as cAdvisor writes them, of the node, of all pods together, of each pod and each container.
//!
//! As with cAdvisor, a sum over everything counts twice: containers have `container` and `image`, what is above them has not. Traffic is
//! its sandbox's, whose `container` is empty.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;

use super::cgroup::{Cpu, Io, Memory, Pressure, Stall, Throttling, Usage};
use super::page::{Family, Labels, Page, Seconds};
use super::proc::{Interface, Traffic};
use super::snapshot::Snapshot;
use crate::kubelet::node::{Disk, Machine};

/// What belongs to the page beside the snapshot.
#[derive(Debug, Default)]
pub(super) struct Around {
    pub(super) machine: Machine,
    /// The sandbox's image.
    pub(super) sandbox_image: String,
    /// Where images and writable layers are, and the device that is on.
    pub(super) disk: Option<(Disk, String)>,
    /// Device files of block devices, by their numbers.
    pub(super) devices: BTreeMap<String, String>,
    /// The node's own.
    pub(super) interfaces: Vec<Interface>,
}

/// A cgroup and what it is called.
struct Row<'a> {
    labels: Labels,
    usage: &'a Usage,
    started: Option<Timestamp>,
    /// Bytes of its writable layer.
    layer: Option<u64>,
    /// Bytes; 0 is none.
    memory_limit: u64,
    is_container: bool,
}

/// Writes the page.
pub(super) fn page(snapshot: &Snapshot, around: &Around) -> Bytes {
    let mut page = Page::default();
    let rows = rows(snapshot, around.machine.memory);
    processor(&mut page, &rows);
    memory(&mut page, &rows);
    pressure(&mut page, &rows);
    file_systems(&mut page, &rows, around);
    network(&mut page, snapshot, around);
    limits(&mut page, &rows);
    let none = Labels::default();
    page.gauge("container_scrape_error", "1 if there was an error while getting container metrics, 0 otherwise").add(
        &none,
        u8::from(snapshot.is_lacking),
        None,
    );
    let version = Labels::new([
        ("cadvisorRevision", ""),
        ("cadvisorVersion", ""),
        ("dockerVersion", ""),
        ("kernelVersion", around.machine.kernel.as_str()),
        ("osVersion", around.machine.os_image.as_str()),
    ]);
    let help = "A metric with a constant '1' value labeled by kernel version, OS version, docker version, cadvisor version & cadvisor revision.";
    page.gauge("cadvisor_version_info", help).add(&version, 1, None);
    let machine = Labels::new([
        ("boot_id", around.machine.boot_id.as_str()),
        ("machine_id", around.machine.machine_id.as_str()),
        ("system_uuid", around.machine.system_uuid.as_str()),
    ]);
    page.gauge("machine_cpu_cores", "Number of logical CPU cores.").add(&machine, around.machine.cpus, None);
    for (name, help, bytes) in [
        ("machine_memory_bytes", "Amount of memory installed on the machine.", around.machine.memory),
        ("machine_swap_bytes", "Amount of swap memory available on the machine.", around.machine.swap),
    ] {
        page.gauge(name, help).add(&machine, bytes, None);
    }
    page.finish()
}

fn labels(id: &str, name: &str, image: &str, container: &str, pod: &str, namespace: &str) -> Labels {
    Labels::new([
        ("container", container),
        ("id", id),
        ("image", image),
        ("name", name),
        ("namespace", namespace),
        ("pod", pod),
    ])
}

fn rows(snapshot: &Snapshot, installed: u64) -> Vec<Row<'_>> {
    let limit = |usage: &Usage| usage.memory.and_then(|memory| memory.limit).unwrap_or_default();
    let above = |id: &str, usage, memory_limit| Row {
        labels: labels(id, "", "", "", "", ""),
        usage,
        started: snapshot.booted,
        layer: None,
        memory_limit,
        is_container: false,
    };
    let mut rows = vec![
        above("/", &snapshot.node, installed),
        above(&snapshot.top, &snapshot.all_pods, limit(&snapshot.all_pods)),
    ];
    for pod in &snapshot.pods {
        let (name, namespace) = (pod.listed.name.as_str(), pod.listed.namespace.as_str());
        if !pod.path.is_empty() {
            rows.push(Row {
                labels: labels(&pod.path, "", "", "", name, namespace),
                usage: &pod.usage,
                started: pod.listed.sandbox.as_ref().map(|sandbox| sandbox.created_at),
                layer: None,
                memory_limit: limit(&pod.usage),
                is_container: false,
            });
        }
        for container in pod.containers.iter().filter(|container| !container.path.is_empty()) {
            let instance = &container.instance;
            rows.push(Row {
                labels: labels(&container.path, &instance.id, &instance.image, &instance.name, name, namespace),
                usage: &container.usage,
                started: Some(instance.created_at),
                layer: container.layer.map(|layer| layer.bytes),
                memory_limit: limit(&container.usage),
                is_container: true,
            });
        }
    }
    rows
}

fn processor(page: &mut Page, rows: &[Row<'_>]) {
    let mut family = page.counter("container_cpu_usage_seconds_total", "Cumulative cpu time consumed in seconds.");
    for row in rows {
        if let Some(cpu) = &row.usage.cpu {
            family.add(&row.labels.and("cpu", "total"), Seconds(cpu.usage), Some(row.usage.at));
        }
    }
    let mut time = |name, help, value: fn(&Cpu) -> Option<u64>| {
        let mut family = page.counter(name, help);
        for row in rows {
            if let Some(nanoseconds) = row.usage.cpu.as_ref().and_then(value) {
                family.add(&row.labels, Seconds(nanoseconds), Some(row.usage.at));
            }
        }
    };
    time("container_cpu_user_seconds_total", "Cumulative user cpu time consumed in seconds.", |cpu| cpu.user);
    time("container_cpu_system_seconds_total", "Cumulative system cpu time consumed in seconds.", |cpu| cpu.system);
    time("container_cpu_cfs_throttled_seconds_total", "Total time duration the container has been throttled.", |cpu| {
        cpu.throttling.map(|throttling| throttling.time)
    });
    let mut count = |name, help, value: fn(&Throttling) -> u64| {
        let mut family = page.counter(name, help);
        for row in rows {
            if let Some(throttling) = row.usage.cpu.as_ref().and_then(|cpu| cpu.throttling.as_ref()) {
                family.add(&row.labels, value(throttling), Some(row.usage.at));
            }
        }
    };
    count("container_cpu_cfs_periods_total", "Number of elapsed enforcement period intervals.", |one| one.periods);
    count("container_cpu_cfs_throttled_periods_total", "Number of throttled period intervals.", |one| one.throttled);
}

fn memory(page: &mut Page, rows: &[Row<'_>]) {
    let mut gauge = |name, help, value: fn(&Memory) -> Option<u64>| {
        let mut family = page.gauge(name, help);
        for row in rows {
            if let Some(bytes) = row.usage.memory.as_ref().and_then(value) {
                family.add(&row.labels, bytes, Some(row.usage.at));
            }
        }
    };
    gauge(
        "container_memory_usage_bytes",
        "Current memory usage in bytes, including all memory regardless of when it was accessed",
        |memory| Some(memory.usage),
    );
    gauge("container_memory_working_set_bytes", "Current working set in bytes.", |memory| Some(memory.working_set));
    gauge("container_memory_rss", "Size of RSS in bytes.", |memory| memory.rss);
    gauge("container_memory_cache", "Number of bytes of page cache memory.", |memory| memory.cache);
    gauge("container_memory_mapped_file", "Size of memory mapped files in bytes.", |memory| memory.mapped);
    gauge("container_memory_swap", "Container swap usage in bytes.", |memory| memory.swap);
    gauge("container_memory_max_usage_bytes", "Maximum memory usage recorded in bytes", |memory| memory.peak);
    gauge("container_memory_total_active_file_bytes", "Current total active file in bytes.", |memory| {
        memory.active_file
    });
    gauge("container_memory_total_inactive_file_bytes", "Current total inactive file in bytes.", |memory| {
        memory.inactive_file
    });
    let mut family = page.counter("container_memory_failures_total", "Cumulative count of memory allocation failures.");
    for row in rows {
        let Some(memory) = &row.usage.memory else { continue };
        for (kind, count) in [("pgfault", memory.faults), ("pgmajfault", memory.major_faults)] {
            if let Some(count) = count {
                let labels = row.labels.and("failure_type", kind).and("scope", "hierarchy");
                family.add(&labels, count, Some(row.usage.at));
            }
        }
    }
    let each = |mut family: Family<'_>, value: fn(&Usage) -> Option<u64>| {
        for row in rows {
            if let Some(value) = value(row.usage) {
                family.add(&row.labels, value, Some(row.usage.at));
            }
        }
    };
    each(page.counter("container_memory_failcnt", "Number of memory usage hits limits"), |usage| {
        usage.memory.as_ref()?.failures
    });
    each(page.gauge("container_processes", "Number of processes running inside the container."), |usage| {
        usage.processes
    });
    each(page.gauge("container_threads", "Number of threads running inside the container"), |usage| usage.threads);
    let help = "Maximum number of threads allowed inside the container, infinity if value is zero";
    each(page.gauge("container_threads_max", help), |usage| {
        usage.threads.map(|_| usage.threads_max.unwrap_or_default())
    });
    let help = "Count of out of memory events observed for the container";
    each(page.counter("container_oom_events_total", help), |usage| usage.oom_kills);
    let mut family = page.gauge("container_last_seen", "Last time a container was seen by the exporter");
    for row in rows {
        family.add(&row.labels, row.usage.at.as_second(), Some(row.usage.at));
    }
}

/// How long something was waited for: all of it stalled, or some of it waiting.
fn pressure(page: &mut Page, rows: &[Row<'_>]) {
    type Part = (&'static str, &'static str, fn(&Pressure) -> Option<Stall>, bool);
    let parts: [Part; 6] = [
        (
            "container_pressure_cpu_stalled_seconds_total",
            "Total time duration no tasks in the container could make progress due to CPU congestion.",
            |pressure| pressure.cpu,
            true,
        ),
        (
            "container_pressure_cpu_waiting_seconds_total",
            "Total time duration tasks in the container have waited due to CPU congestion.",
            |pressure| pressure.cpu,
            false,
        ),
        (
            "container_pressure_memory_stalled_seconds_total",
            "Total time duration no tasks in the container could make progress due to memory congestion.",
            |pressure| pressure.memory,
            true,
        ),
        (
            "container_pressure_memory_waiting_seconds_total",
            "Total time duration tasks in the container have waited due to memory congestion.",
            |pressure| pressure.memory,
            false,
        ),
        (
            "container_pressure_io_stalled_seconds_total",
            "Total time duration no tasks in the container could make progress due to IO congestion.",
            |pressure| pressure.io,
            true,
        ),
        (
            "container_pressure_io_waiting_seconds_total",
            "Total time duration tasks in the container have waited due to IO congestion.",
            |pressure| pressure.io,
            false,
        ),
    ];
    for (name, help, of, is_full) in parts {
        let mut family = page.counter(name, help);
        for row in rows {
            if let Some(stall) = of(&row.usage.pressure) {
                let micros = if is_full { stall.full.total } else { stall.some.total };
                family.add(&row.labels, Seconds(micros.saturating_mul(1000)), Some(row.usage.at));
            }
        }
    }
}

fn file_systems(page: &mut Page, rows: &[Row<'_>], around: &Around) {
    let of = |row: &Row<'_>| row.labels.and("device", around.disk.as_ref().map_or("", |(_, device)| device));
    let mut family = page
        .gauge("container_fs_usage_bytes", "Number of bytes that are consumed by the container on this filesystem.");
    for row in rows {
        if let Some(bytes) = row.layer {
            family.add(&of(row), bytes, Some(row.usage.at));
        }
    }
    let mut of_disk = |name, help, value: fn(&Disk) -> u64| {
        let mut family = page.gauge(name, help);
        for row in rows.iter().filter(|row| row.is_container) {
            if let Some((disk, _)) = &around.disk {
                family.add(&of(row), value(disk), Some(row.usage.at));
            }
        }
    };
    of_disk(
        "container_fs_limit_bytes",
        "Number of bytes that can be consumed by the container on this filesystem.",
        |disk| disk.capacity,
    );
    of_disk("container_fs_inodes_total", "Number of Inodes", |disk| disk.inodes);
    of_disk("container_fs_inodes_free", "Number of available Inodes", |disk| disk.inodes_free);
    let mut of_devices = |name, help, value: fn(&Io) -> u64| {
        let mut family = page.counter(name, help);
        for row in rows {
            for io in &row.usage.io {
                let device = around.devices.get(&io.device).unwrap_or(&io.device);
                family.add(&row.labels.and("device", device), value(io), Some(row.usage.at));
            }
        }
    };
    of_devices("container_fs_reads_bytes_total", "Cumulative count of bytes read", |io| io.read);
    of_devices("container_fs_reads_total", "Cumulative count of reads completed", |io| io.reads);
    of_devices("container_fs_writes_bytes_total", "Cumulative count of bytes written", |io| io.written);
    of_devices("container_fs_writes_total", "Cumulative count of writes completed", |io| io.writes);
}

fn network(page: &mut Page, snapshot: &Snapshot, around: &Around) {
    let image = around.sandbox_image.as_str();
    let node = labels("/", "", "", "", "", "");
    let mut rows: Vec<(Labels, &Interface, Timestamp)> = Vec::new();
    for interface in &around.interfaces {
        rows.push((node.and("interface", &interface.name), interface, snapshot.node.at));
    }
    for pod in &snapshot.pods {
        let sandbox = pod.listed.sandbox.as_ref().map(|sandbox| sandbox.id.as_str()).unwrap_or_default();
        let id = if pod.sandbox_path.is_empty() { &pod.path } else { &pod.sandbox_path };
        let of_pod = labels(id, sandbox, image, "", &pod.listed.name, &pod.listed.namespace);
        for interface in &pod.interfaces {
            rows.push((of_pod.and("interface", &interface.name), interface, pod.usage.at));
        }
    }
    let each = |mut family: Family<'_>, value: &dyn Fn(&Interface) -> u64| {
        for (labels, interface, at) in &rows {
            family.add(labels, value(interface), Some(*at));
        }
    };
    type Part = (&'static str, &'static str, &'static str, &'static str, fn(&Traffic) -> u64);
    let parts: [Part; 4] = [
        (
            "container_network_receive_bytes_total",
            "Cumulative count of bytes received",
            "container_network_transmit_bytes_total",
            "Cumulative count of bytes transmitted",
            |traffic| traffic.bytes,
        ),
        (
            "container_network_receive_packets_total",
            "Cumulative count of packets received",
            "container_network_transmit_packets_total",
            "Cumulative count of packets transmitted",
            |traffic| traffic.packets,
        ),
        (
            "container_network_receive_errors_total",
            "Cumulative count of errors encountered while receiving",
            "container_network_transmit_errors_total",
            "Cumulative count of errors encountered while transmitting",
            |traffic| traffic.errors,
        ),
        (
            "container_network_receive_packets_dropped_total",
            "Cumulative count of packets dropped while receiving",
            "container_network_transmit_packets_dropped_total",
            "Cumulative count of packets dropped while transmitting",
            |traffic| traffic.dropped,
        ),
    ];
    for (received, help_received, sent, help_sent, value) in parts {
        each(page.counter(received, help_received), &|interface| value(&interface.received));
        each(page.counter(sent, help_sent), &|interface| value(&interface.sent));
    }
}

fn limits(page: &mut Page, rows: &[Row<'_>]) {
    let mut family =
        page.gauge("container_start_time_seconds", "Start time of the container since unix epoch in seconds.");
    for row in rows {
        if let Some(started) = row.started {
            family.add(&row.labels, started.as_second(), None);
        }
    }
    let mut limit = |name, help, value: &dyn Fn(&Row<'_>) -> Option<u64>| {
        let mut family = page.gauge(name, help);
        for row in rows {
            if let Some(value) = value(row) {
                family.add(&row.labels, value, None);
            }
        }
    };
    limit("container_spec_cpu_period", "CPU period of the container.", &|row| row.usage.limits.period);
    limit("container_spec_cpu_quota", "CPU quota of the container.", &|row| row.usage.limits.quota);
    limit("container_spec_cpu_shares", "CPU share of the container.", &|row| row.usage.limits.shares);
    limit("container_spec_memory_limit_bytes", "Memory limit for the container.", &|row| {
        row.usage.memory.map(|_| row.memory_limit)
    });
    limit("container_spec_memory_reservation_limit_bytes", "Memory reservation limit for the container.", &|row| {
        row.usage.memory.map(|memory| memory.reserved.unwrap_or_default())
    });
    limit("container_spec_memory_swap_limit_bytes", "Memory swap limit for the container.", &|row| {
        row.usage.memory.map(|memory| memory.swap_limit.unwrap_or_default())
    });
}
