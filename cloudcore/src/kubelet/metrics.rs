//! What is counted of the nodes' ports.

use hyper::StatusCode;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    code: u16,
}

/// The counters; cloning shares them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    requests: Family<RequestLabels, Counter>,
    connections: Gauge,
    streams: Gauge,
}

/// Something that is counted.
#[derive(Debug)]
pub(crate) struct Open(Gauge);

impl Metrics {
    /// Makes them known to a registry.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "skerry_kubelet_requests",
            "Requests to kubelets of nodes by the first part of their path; a code that a kubelet does not use counts as its hundred",
            metrics.requests.clone(),
        );
        registry.register(
            "skerry_kubelet_connections",
            "Connections to kubelets of nodes that are open",
            metrics.connections.clone(),
        );
        registry.register(
            "skerry_kubelet_streams",
            "Requests to kubelets of nodes that are under way, sessions of exec and the like among them",
            metrics.streams.clone(),
        );
        metrics
    }

    /// A request was answered.
    pub(crate) fn request(&self, route: &'static str, code: StatusCode) {
        // Nodes decide what they answer, not how many series there are.
        let code = match code.as_u16() {
            code @ (101 | 200 | 400 | 401 | 403 | 404 | 405 | 500 | 502 | 503) => code,
            other => other / 100 * 100,
        };
        self.requests.get_or_create(&RequestLabels { route, code }).inc();
    }

    /// A connection is open until what this answers is dropped.
    pub(crate) fn connection(&self) -> Open {
        Open::new(&self.connections)
    }

    /// The same for what a request is on.
    pub(crate) fn stream(&self) -> Open {
        Open::new(&self.streams)
    }

    #[cfg(test)]
    pub(super) fn open(&self) -> i64 {
        self.connections.get()
    }
}

impl Open {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}
