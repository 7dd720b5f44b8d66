//! What is counted, for `--metrics`.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows, or a gauge.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// Sets a gauge.
    pub fn set(&self, to: u64) {
        self.0.store(to, Ordering::Relaxed);
    }

    /// Reads.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($name:ident: $kind:literal, $help:literal;)*) => {
        /// All that is counted.
        #[derive(Debug, Default)]
        pub struct Counters {
            $(#[doc = $help] pub $name: Counter,)*
        }

        /// This process's.
        pub static COUNTERS: Counters = Counters { $($name: Counter(AtomicU64::new(0)),)* };

        impl Counters {
            /// In the Prometheus text format 0.0.4.
            #[must_use]
            pub fn render(&self) -> String {
                let mut out = String::new();
                $(
                    let name = concat!("skerry_mapper_", stringify!($name));
                    let _ = write!(out, "# HELP {name} {}\n# TYPE {name} {}\n{name} {}\n", $help, $kind, self.$name.value());
                )*
                out
            }
        }
    };
}

counters! {
    devices: "gauge", "Devices that are run.";
    registered: "gauge", "Whether the mapper is registered with edgecore.";
    values_total: "counter", "Values that were read or came by themselves.";
    values_refused_total: "counter", "Values that were refused: no value of the property's type, or too long.";
    times_corrected_total: "counter", "Values whose time was corrected: from the future, or before the previous one.";
    read_failures_total: "counter", "Properties that could not be read.";
    connect_failures_total: "counter", "Attempts to connect a device that failed.";
    writes_total: "counter", "Desired values that were written.";
    write_failures_total: "counter", "Writes that failed or did not stand when read back.";
    reports_total: "counter", "Reports that edgecore took.";
    report_failures_total: "counter", "Reports that edgecore did not take.";
    pushed_values_total: "counter", "Values that sinks took.";
    push_failures_total: "counter", "Attempts to push a batch of values that failed.";
    pushed_values_refused_total: "counter", "Values that a sink refused, so that they were given up.";
    dropped_values_total: "counter", "Values that were dropped, oldest first, because a sink was away for longer than the store lasts.";
    stored_bytes: "gauge", "Bytes that wait on disk for sinks.";
    panics_total: "counter", "Panics of a device's worker, which was then started again.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_rendered_with_help_and_type() {
        let counters = Counters::default();
        counters.writes_total.add(3);
        let text = counters.render();
        assert!(text.contains("# TYPE skerry_mapper_writes_total counter\nskerry_mapper_writes_total 3\n"), "{text}");
    }
}
