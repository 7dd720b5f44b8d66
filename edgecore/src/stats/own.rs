//! `/metrics`: this kubelet's own figures, as far as dashboards and alerts ask for them.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;

use super::ends::Ends;
use super::page::{Labels, Page, Seconds};
use super::proc::Process;
use crate::devices::mqtt;
use crate::kubelet::observed::{Observed, State};

/// Writes the page; what is not known is left out.
pub(super) fn page(
    node: &str,
    observed: Option<&BTreeMap<String, Observed>>,
    ends: &Ends,
    own: Option<&Process>,
    booted: Option<Timestamp>,
    mqtt: &mqtt::Status,
) -> Bytes {
    let mut page = Page::default();
    let none = Labels::default();
    page.gauge("kubelet_node_name", "[ALPHA] The node's name. The count is always 1.").add(
        &Labels::new([("node", node)]),
        1,
        None,
    );
    if let Some(observed) = observed {
        let mut states = [("created", 0), ("exited", 0), ("running", 0), ("unknown", 0)];
        for instance in observed.values().flat_map(|pod| &pod.containers) {
            states[match instance.state {
                State::Created => 0,
                State::Exited => 1,
                State::Running => 2,
                State::Unknown => 3,
            }]
            .1 += 1;
        }
        let mut family = page.gauge("kubelet_running_containers", "[ALPHA] Number of containers currently running");
        for (state, count) in states {
            family.add(&Labels::new([("container_state", state)]), count, None);
        }
        let running = observed.values().filter(|pod| pod.sandboxes.iter().any(|sandbox| sandbox.ready)).count();
        page.gauge("kubelet_running_pods", "[ALPHA] Number of pods that have a running pod sandbox")
            .add(&none, running, None);
    }
    ends.write(&mut page);
    page.gauge("skerry_mqtt_connected", "Whether a broker is connected that devices are spoken of with.").add(
        &none,
        u8::from(mqtt.connected),
        None,
    );
    for (name, help, count) in [
        ("skerry_mqtt_published_total", "Plain values and states of devices published.", mqtt.published),
        ("skerry_mqtt_requests_total", "Requests about devices answered.", mqtt.requests),
        ("skerry_mqtt_refused_total", "Of them refused.", mqtt.refused),
        ("skerry_mqtt_dropped_total", "Results and events that no broker took, dropped.", mqtt.dropped),
    ] {
        page.counter(name, help).add(&none, count, None);
    }
    let Some(own) = own else { return page.finish() };
    if let Some(cpu) = own.cpu {
        page.counter("process_cpu_seconds_total", "Total user and system CPU time spent in seconds.").add(
            &none,
            Seconds(cpu),
            None,
        );
    }
    if let Some(open) = own.open_files {
        page.gauge("process_open_fds", "Number of open file descriptors.").add(&none, open, None);
    }
    page.gauge("process_resident_memory_bytes", "Resident memory size in bytes.").add(&none, own.resident, None);
    let started = booted.and_then(|booted| u64::try_from(super::after(booted, own.started).as_nanosecond()).ok());
    if let Some(started) = started {
        page.gauge("process_start_time_seconds", "Start time of the process since unix epoch in seconds.").add(
            &none,
            Seconds(started),
            None,
        );
    }
    page.gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.").add(&none, own.addressed, None);
    page.finish()
}
