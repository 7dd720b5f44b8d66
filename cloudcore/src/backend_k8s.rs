//! The back of cloudcore on a real apiserver: ties watches, closures, tokens, reports, nodes and leases together behind [`Backend`].

use std::collections::BTreeMap;
use std::future::Future;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use skerry_proto::sync::{Collection, Entry, Report};
use skerry_proto::wire::Revision;
use tokio::sync::{Notify, broadcast};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::apiserver::{Apiserver, Kind, Metrics};
use crate::backend::{Backend, BackendError, Feed, FeedEvent, NodeCheck, NodeIdentity, RegisterError};
use crate::closure::{Closures, Session, Source};
use crate::devices::{crds, lost, review};
use crate::kubelet::{self, Kubelets, Ports};
use crate::nodes::autonomy::Autonomy;
use crate::nodes::leases::Leases;
use crate::upstream::{Reports, Upstream, WaitingBytes};
use crate::watch::{Watches, devices, fetch, services};
use crate::{clock, nodes, sa_tokens, supervise};

/// Deletions of Nodes a slow listener may fall behind; it must then check its own node.
const DELETIONS: usize = 1024;

/// What an operator may set.
#[derive(Clone, Debug, Default)]
pub struct BackendOptions {
    /// Such as `cluster.local`.
    pub cluster_domain: String,
    /// Addresses of the cluster DNS service; empty: those of the Service kube-system/kube-dns.
    pub cluster_dns: Vec<IpAddr>,
}

/// The closures, and who waits for them.
#[derive(Debug)]
pub(crate) struct Shared {
    closures: Mutex<Closures>,
    restored: CancellationToken,
    fetch_wake: Arc<Notify>,
    token_wake: Arc<Notify>,
}

impl Shared {
    pub(crate) fn new(closures: Closures) -> Arc<Self> {
        let (fetch_wake, token_wake) = (closures.fetch_wake(), closures.token_wake());
        Arc::new(Self { closures: Mutex::new(closures), restored: CancellationToken::new(), fetch_wake, token_wake })
    }

    /// For as long as one change takes; never across an await.
    pub(crate) fn closures(&self) -> MutexGuard<'_, Closures> {
        self.closures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The apiserver's revisions began anew.
    pub(crate) fn restored(&self) {
        self.restored.cancel();
    }

    pub(crate) fn fetch_wake(&self) -> &Notify {
        &self.fetch_wake
    }

    pub(crate) fn token_wake(&self) -> &Notify {
        &self.token_wake
    }

    /// Waits for the first list of a source.
    pub(crate) async fn until_ready(&self, source: Source) {
        self.until(|closures| closures.is_ready(source)).await;
    }

    /// Waits for something that [`Closures::ready_wake`] tells of.
    pub(crate) async fn until(&self, holds: impl Fn(&Closures) -> bool) {
        let wake = self.closures().ready_wake();
        loop {
            // Registered before the look, so that nothing is missed between the two.
            let mut ready = std::pin::pin!(wake.notified());
            ready.as_mut().enable();
            if holds(&self.closures()) {
                return;
            }
            ready.await;
        }
    }
}

/// Says how much is held when metrics are read.
#[derive(Debug)]
struct Held(Arc<Shared>);

impl Collector for Held {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let counts = self.0.closures().counts();
        let mut family = encoder.encode_descriptor(
            "skerry_cached_objects",
            "Objects held because an edge node needs them",
            None,
            MetricType::Gauge,
        )?;
        for (collection, count) in counts {
            let labels = [("collection", name(collection))];
            let gauge = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            gauge.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// [`Backend`] on a Kubernetes apiserver.
pub struct K8sBackend {
    api: Apiserver,
    shared: Arc<Shared>,
    upstream: Arc<Upstream>,
    leases: Arc<Leases>,
    kubelets: Kubelets,
    deletions: broadcast::Sender<NodeIdentity>,
    tasks: Vec<JoinHandle<()>>,
}

/// Starts watching. Returns at once; [`Backend::ready`] says when the caches are filled. `ports` are those of the nodes' kubelets.
pub async fn connect(
    client: kube::Client,
    options: BackendOptions,
    ports: Arc<Ports>,
    metrics: &mut Registry,
) -> anyhow::Result<K8sBackend> {
    let api = Apiserver::new(client.clone(), Metrics::new(metrics));
    let dns = options.cluster_dns.iter().map(ToString::to_string).collect();
    let shared = Shared::new(Closures::new(&options.cluster_domain, dns));
    metrics.register_collector(Box::new(Held(shared.clone())));
    let leases = Arc::new(Leases::default());
    let upstream = Upstream::new(api.clone(), shared.clone(), leases.clone(), ports.clone());
    metrics.register_collector(Box::new(WaitingBytes(upstream.clone())));
    let autonomy = Arc::new(Autonomy::default());
    let (deletions, _) = broadcast::channel(DELETIONS);
    let watches = Watches {
        api: api.clone(),
        client: client.clone(),
        shared: shared.clone(),
        upstream: upstream.clone(),
        autonomy: autonomy.clone(),
        ports: ports.clone(),
        deletions: deletions.clone(),
        doubtful: Arc::default(),
    };

    let watch = |name, run: fn(Watches) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
        let watches = watches.clone();
        supervise::keep(name, move || run(watches.clone()))
    };
    let tasks = vec![
        watch("watch nodes", |watches| Box::pin(watches.nodes())),
        watch("watch pods", |watches| Box::pin(watches.pods())),
        watch("watch services", |watches| Box::pin(watches.services())),
        watch("watch runtime classes", |watches| Box::pin(watches.runtime_classes())),
        watch("watch config maps", |watches| Box::pin(watches.config_maps())),
        watch("watch secrets", |watches| Box::pin(watches.secrets())),
        watch("watch devices", |watches| Box::pin(watches.devices())),
        watch("watch device models", |watches| Box::pin(watches.device_models())),
        supervise::keep("fetch devices", {
            let (api, shared) = (api.clone(), shared.clone());
            move || devices::fetch(api.clone(), shared.clone())
        }),
        supervise::keep("device CRDs", {
            let (client, shared) = (client.clone(), shared.clone());
            move || crds::run(client.clone(), shared.clone())
        }),
        supervise::keep("lost devices", {
            let (api, shared) = (api.clone(), shared.clone());
            move || lost::run(api.clone(), shared.clone())
        }),
        supervise::keep("device reviews", {
            let (api, shared) = (api.clone(), shared.clone());
            move || review::run(api.clone(), shared.clone())
        }),
        supervise::keep("list services", {
            let (api, shared) = (api.clone(), shared.clone());
            move || services::run(api.clone(), shared.clone())
        }),
        supervise::keep("fetch", {
            let (api, shared) = (api.clone(), shared.clone());
            move || fetch::run(api.clone(), shared.clone())
        }),
        supervise::keep("service account tokens", {
            let (api, shared) = (api.clone(), shared.clone());
            move || sa_tokens::run(api.clone(), shared.clone())
        }),
        supervise::keep("leases", {
            let (api, leases, shared) = (api.clone(), leases.clone(), shared.clone());
            move || leases.clone().run(api.clone(), shared.clone())
        }),
        supervise::keep("autonomy", {
            let api = api.clone();
            move || autonomy.clone().run(api.clone())
        }),
        supervise::keep("kubelet addresses", {
            let (api, shared, ports) = (api.clone(), shared.clone(), ports.clone());
            move || kubelet::publish::run(api.clone(), shared.clone(), ports.clone())
        }),
    ];
    let kubelets = Kubelets { ports, api: api.clone(), client };
    Ok(K8sBackend { api, shared, upstream, leases, kubelets, deletions, tasks })
}

impl K8sBackend {
    /// What serves the kubelets of nodes.
    pub fn kubelets(&self) -> Kubelets {
        self.kubelets.clone()
    }
}

impl K8sBackend {
    /// Ends when nothing that is known here can be compared with what the apiserver says any more: it was restored from a backup.
    pub fn restored(&self) -> impl Future<Output = ()> + Send + use<> {
        self.shared.restored.clone().cancelled_owned()
    }
}

impl Drop for K8sBackend {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Backend for K8sBackend {
    type Feed = K8sFeed;

    async fn register(
        &self,
        name: &str,
        machine_id: &str,
        labels: &BTreeMap<String, String>,
        connected: bool,
    ) -> Result<NodeIdentity, RegisterError> {
        nodes::register(&self.api, name, machine_id, labels, connected).await
    }

    async fn leased(&self, name: &str) -> Result<Option<u64>, BackendError> {
        nodes::leases::leased(&self.api, name).await
    }

    async fn check(&self, node: &NodeIdentity) -> Result<NodeCheck, BackendError> {
        // A watch that agrees is enough; whoever lost their Node is asked for by name. Everybody comes back to a cloudcore that has just
        // started: they are not all asked for.
        self.shared.until_ready(Source::Nodes).await;
        let known = self.shared.closures().claim(node);
        if let Some((epoch, agents)) = known {
            return Ok(NodeCheck::Live { epoch, agents });
        }
        nodes::check(&self.api, node).await
    }

    async fn revision(&self, at_least: u64) -> Result<u64, BackendError> {
        let known = self.shared.closures().revision();
        if known >= at_least {
            return Ok(known);
        }
        let failed = |source| BackendError { action: "ask for the apiserver's revision".to_owned(), source };
        let one = self.api.list_part(Kind::Node, "", 1, None).await.map_err(failed)?;
        // One that is no number is not to be compared.
        let revision = one.metadata.resource_version.and_then(|revision| revision.parse().ok()).unwrap_or(at_least);
        self.shared.closures().now_at(revision);
        Ok(revision)
    }

    fn open(&self, node: &NodeIdentity, epoch: u64, last_epoch: u64, who: u64, seen: &[Revision]) -> K8sFeed {
        let session = {
            let mut closures = self.shared.closures();
            let mut session = closures.open(node, epoch, last_epoch, who);
            closures.expect(&mut session, seen);
            session
        };
        self.leases.begin(node, epoch);
        self.kubelets.ports.connected(node, epoch, session.claims());
        let reports = self.upstream.open(node, epoch, who, session.claims());
        for (_, _, facts) in self.shared.closures().pods_of(&node.name) {
            self.upstream.pod_seen(&node.name, &facts);
        }
        for uid in self.shared.closures().unknown_devices(&node.name) {
            self.upstream.device_hidden(&node.name, &uid);
        }
        K8sFeed {
            shared: self.shared.clone(),
            wake: session.wake(),
            session,
            reports,
            leases: self.leases.clone(),
            ports: self.kubelets.ports.clone(),
            epoch,
        }
    }

    fn deletions(&self) -> broadcast::Receiver<NodeIdentity> {
        self.deletions.subscribe()
    }

    fn ready(&self) -> bool {
        self.shared.closures().ready()
    }
}

/// One session's view of a [`K8sBackend`].
pub struct K8sFeed {
    shared: Arc<Shared>,
    session: Session,
    wake: Arc<Notify>,
    reports: Reports,
    leases: Arc<Leases>,
    ports: Arc<Ports>,
    epoch: u64,
}

impl Feed for K8sFeed {
    async fn next(&mut self) -> Vec<FeedEvent> {
        loop {
            let mut events = self.shared.closures().drain(&mut self.session);
            // However much changes, what became of reports does not wait for it.
            while let Some(event) = self.reports.try_next() {
                events.push(event);
            }
            if !events.is_empty() {
                return events;
            }
            tokio::select! {
                () = self.wake.notified() => {}
                event = self.reports.next() => return vec![event],
            }
        }
    }

    fn inventory(&mut self, collection: Collection, entries: Vec<Entry>) {
        self.shared.closures().inventory(&mut self.session, collection, &entries, clock::wall());
    }

    fn report(&mut self, report: Report) {
        self.reports.push(report);
    }
}

impl Drop for K8sFeed {
    fn drop(&mut self) {
        self.shared.closures().close(&self.session);
        self.leases.end(self.session.node(), self.epoch);
        self.ports.disconnected(self.session.node(), self.epoch, clock::wall());
    }
}

const fn name(collection: Collection) -> &'static str {
    match collection {
        Collection::Settings => "settings",
        Collection::Node => "nodes",
        Collection::Pods => "pods",
        Collection::ConfigMaps => "configmaps",
        Collection::Secrets => "secrets",
        Collection::Tokens => "tokens",
        Collection::Services => "services",
        Collection::RuntimeClasses => "runtimeclasses",
        Collection::Devices => "devices",
        Collection::DeviceModels => "devicemodels",
        Collection::Unspecified => "unknown",
    }
}
