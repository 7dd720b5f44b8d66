//! The node's own status: computed every ten seconds, reported when it says something new or the last report is old; and the facts
//! that pods see of their node, kept up to date from the store.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use k8s_openapi::api::core::v1::{Node, NodeStatus, ObjectReference};
use k8s_openapi::api::node::v1::RuntimeClass;
use skerry_proto::cri;
use skerry_proto::payload::{NodeReport, Settings};
use skerry_proto::sync::{Collection, Report, ReportKind};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::context::{Context, blocking};
use super::gather::parse;
use super::node::{self, EVERY, Inputs, Load, Machine, Paths, Pressure, Resources, RuntimeVersion};
use super::quantity::Amount;
use super::references::{NodeFacts, PodEvent, RuntimeHandler};
use super::resources;
use crate::clock;
use crate::cni::{self, Network, Places};
use crate::config::Config;
use crate::devices::{Devices, mqtt};
use crate::link::{LinkState, NODE_NOTES, ReportWanted};
use crate::runtime::Cri;
use crate::runtime::cri::{Health, Setup};
use crate::store::Store;

/// While the runtime or its network is not ready, it is asked this often.
const IMPATIENT: Duration = Duration::from_millis(500);
/// The list of images in the status is as old as this at most.
const IMAGES_EVERY: Duration = Duration::from_secs(60);
/// The note of which start of the box edgecore saw last.
const BOOT_NOTE: &str = "boot";
/// The note of the conditions: since when each is as it is.
const CONDITIONS_NOTE: &str = "conditions";
/// As every kubelet has it.
const MAX_PODS: u32 = 110;

/// Watches the box and the runtime.
#[derive(Debug)]
pub struct NodeLoop {
    store: Store,
    cri: Cri,
    config: Arc<Config>,
    machine: Machine,
    capacity: Resources,
    addresses: Vec<IpAddr>,
    setup: Option<Setup>,
    /// What was found last where the runtime looks for a network.
    cni: Option<Network>,
    version: Option<RuntimeVersion>,
    images: Vec<cri::Image>,
    images_at: Option<Duration>,
    pressure: Pressure,
    devices: Devices,
    mqtt: watch::Receiver<mqtt::Status>,
    /// Of the last status, what the store keeps for another start of edgecore: the conditions.
    kept: NodeStatus,
    /// The last one, for whoever asks at the box.
    status: watch::Sender<Option<NodeStatus>>,
    sent: Option<Duration>,
    /// The events of a start were recorded.
    started: bool,
    facts: watch::Sender<Arc<NodeFacts>>,
    network: watch::Sender<Option<String>>,
    runtime_up: watch::Sender<bool>,
}

/// What the loop tells others.
#[derive(Clone, Debug)]
pub struct News {
    /// The node as pods see it.
    pub facts: watch::Receiver<Arc<NodeFacts>>,
    /// Why pods cannot have a network now.
    pub network: watch::Receiver<Option<String>>,
    /// The runtime has answered once, so that the facts are complete.
    pub runtime_up: watch::Receiver<bool>,
}

impl NodeLoop {
    /// Reads the box. The runtime is asked by [`NodeLoop::run`].
    pub async fn new(
        store: Store,
        cri: Cri,
        config: Arc<Config>,
        (devices, mqtt): (Devices, watch::Receiver<mqtt::Status>),
        status: watch::Sender<Option<NodeStatus>>,
    ) -> (Self, News) {
        // Of an earlier loop of this process.
        status.send_replace(None);
        let pods_root = config.pods_dir.clone();
        let (machine, capacity, addresses) = blocking(move || {
            let machine = Machine::read();
            let capacity = node::capacity(&machine, &pods_root, MAX_PODS);
            (machine, capacity, node::addresses())
        })
        .await;
        let empty =
            node::facts(&config.node_name, &capacity, addresses.clone(), paths(&config), &Setup::default(), None);
        let (facts, facts_receiver) = watch::channel(Arc::new(empty));
        let (network, network_receiver) = watch::channel(Some("the runtime has not answered yet".to_owned()));
        let (runtime_up, up_receiver) = watch::channel(false);
        let kept = store.note(NODE_NOTES, CONDITIONS_NOTE).await.unwrap_or_default();
        let kept =
            NodeStatus { conditions: kept.and_then(|json| serde_json::from_slice(&json).ok()), ..Default::default() };
        let news = News { facts: facts_receiver, network: network_receiver, runtime_up: up_receiver };
        let node = Self {
            store,
            cri,
            config,
            machine,
            capacity,
            addresses,
            setup: None,
            cni: None,
            version: None,
            images: Vec::new(),
            images_at: None,
            pressure: Pressure::default(),
            devices,
            mqtt,
            kept,
            status,
            sent: None,
            started: false,
            facts,
            network,
            runtime_up,
        };
        (node, news)
    }

    /// Runs until shutdown. `context` comes when there is one; before that nothing is recorded.
    pub async fn run(
        mut self,
        mut link: watch::Receiver<LinkState>,
        mut wanted: broadcast::Receiver<ReportWanted>,
        context: watch::Receiver<Option<Arc<Context>>>,
        shutdown: CancellationToken,
    ) {
        let mut changes = self.store.changes();
        let mut online = false;
        self.update_facts(None).await;
        loop {
            let known = context.borrow().clone();
            let healthy = self.look(known).await;
            let again = tokio::time::sleep(if healthy { EVERY } else { IMPATIENT });
            tokio::pin!(again);
            loop {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = &mut again => break,
                    change = changes.recv() => match change {
                        Ok(change) if !is_about_node(change.collection) => {}
                        Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => self.update_facts(None).await,
                        Err(broadcast::error::RecvError::Closed) => return,
                    },
                    again = wanted.recv() => match again {
                        Ok((ReportKind::NodeStatus, _)) | Err(broadcast::error::RecvError::Lagged(_)) => {
                            self.sent = None;
                            break;
                        }
                        Ok(_) => {}
                        Err(broadcast::error::RecvError::Closed) => return,
                    },
                    Ok(()) = link.changed() => {
                        let now_online = matches!(*link.borrow_and_update(), LinkState::Online { .. });
                        if now_online && !online {
                            // Controllers may have marked the node unknown meanwhile, and the cloud may be another process.
                            self.sent = None;
                            online = true;
                            break;
                        }
                        online = now_online;
                    }
                }
            }
        }
    }

    /// One look at the box and the runtime. Whether all is well.
    async fn look(&mut self, context: Option<Arc<Context>>) -> bool {
        if self.setup.is_none() {
            self.meet_runtime().await;
        }
        let health = self.cri.health().await;
        if let (Ok(health), Some(_)) = (&health, &self.setup)
            && !*self.runtime_up.borrow()
        {
            self.update_facts(Some(health)).await;
            self.runtime_up.send_replace(true);
        }
        let trouble = match &health {
            Ok(health) => health.network.clone(),
            Err(error) => Some(error.to_string()),
        };
        if let (Ok(Health { network: Some(_), .. }), Some(setup)) = (&health, &self.setup) {
            let places = Places::of(&self.config, setup);
            self.provide_network(places).await;
        }
        self.network.send_if_modified(|network| {
            let changed = *network != trouble;
            if changed {
                network.clone_from(&trouble);
            }
            changed
        });
        let now = clock::monotonic();
        if self.images_at.is_none_or(|at| now.saturating_sub(at) >= IMAGES_EVERY)
            && let Ok(images) = self.cri.list_images().await
        {
            (self.images, self.images_at) = (images, Some(now));
        }
        let pods_root = self.config.pods_dir.clone();
        let (load, addresses) = blocking(move || (Load::read(&pods_root, None), node::addresses())).await;
        if self.addresses != addresses {
            // At boot the box may have none yet; later the link it has them by may be another one.
            info!(?addresses, "the box has other addresses");
            self.addresses = addresses;
            self.update_facts(health.as_ref().ok()).await;
            self.sent = None;
        }
        let pressures = self.pressure.observe(now, &load);
        let is_needed = self.devices.need(&self.config.mqtt_broker);
        let status = {
            let broker = self.mqtt.borrow();
            let inputs = Inputs {
                machine: &self.machine,
                capacity: &self.capacity,
                pressures,
                health: &health,
                faults: &[],
                version: self.version.as_ref(),
                images: &self.images,
                broker: is_needed.then_some(&*broker),
            };
            node::status(&inputs, self.status.borrow().as_ref().or(Some(&self.kept)), clock::wall())
        };
        self.keep(&status).await;
        let is_ready = ready(&status);
        let changed = self.status.borrow().as_ref().map(ready) != Some(is_ready);
        let due = self.status.borrow().as_ref().is_none_or(|old| node::due(self.sent, now, old, &status));
        if due {
            self.report(&status, now).await;
        }
        self.status.send_replace(Some(status));
        let name = &self.config.node_name;
        if let Some(context) = context {
            let record = |warning, reason, message| {
                context.record(&reference(name), &PodEvent { warning, reason, message, field_path: None });
            };
            if !self.started {
                record(false, "Starting", "Starting kubelet.".to_owned());
                if self.has_rebooted().await {
                    let boot = &self.machine.boot_id;
                    record(true, "Rebooted", format!("Node {name} has been rebooted, boot id: {boot}"));
                }
            }
            if changed {
                let reason = if is_ready { "NodeReady" } else { "NodeNotReady" };
                record(false, reason, format!("Node {name} status is now: {reason}"));
            }
            self.started = true;
        }
        health.is_ok() && trouble.is_none()
    }

    /// Has the store keep since when the conditions are as they are.
    async fn keep(&mut self, status: &NodeStatus) {
        let since = |status: &NodeStatus| -> Vec<_> {
            let all = status.conditions.as_deref().unwrap_or_default().iter();
            all.map(|one| (one.type_.clone(), one.status.clone(), one.last_transition_time.clone())).collect()
        };
        if since(status) == since(&self.kept) {
            return;
        }
        self.kept.conditions.clone_from(&status.conditions);
        let json = serde_json::to_vec(&self.kept.conditions).unwrap_or_default();
        if let Err(error) = self.store.remember(NODE_NOTES, CONDITIONS_NOTE, json.into()).await {
            warn!(%error, "it cannot be kept since when the node is as it is");
        }
    }

    /// Whether the box was started anew since edgecore was; remembers this start of it.
    async fn has_rebooted(&self) -> bool {
        let boot = Bytes::copy_from_slice(self.machine.boot_id.as_bytes());
        let before = self.store.note(NODE_NOTES, BOOT_NOTE).await.unwrap_or_default();
        if before.as_ref() == Some(&boot) {
            return false;
        }
        if let Err(error) = self.store.remember(NODE_NOTES, BOOT_NOTE, boot).await {
            warn!(%error, "it cannot be kept which start of the box this is");
        }
        before.is_some()
    }

    /// The runtime lacks a network: if nobody has configured one, ours is.
    async fn provide_network(&mut self, places: Places) {
        let pod_cidr = self.config.pod_cidr.clone();
        let (found, places) = blocking(move || (cni::ensure(&places, &pod_cidr), places)).await;
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                return warn!(%error, dir = %places.conf_dir.display(), "the network configuration cannot be written: only pods with hostNetwork start");
            }
        };
        match &found {
            Network::Absent => {
                info!(dir = %places.conf_dir.display(), pod_cidr = self.config.pod_cidr, "wrote a network configuration")
            }
            Network::PluginsMissing(missing) if self.cni.as_ref() != Some(&found) => {
                warn!(?missing, dirs = ?places.bin_dirs, "no pod network: only pods with hostNetwork start; install containernetworking-plugins");
            }
            Network::PluginsMissing(_) | Network::Present(_) => {}
        }
        self.cni = Some(found);
    }

    /// Asks the runtime what it is, the first time it answers.
    async fn meet_runtime(&mut self) {
        let Ok(version) = self.cri.version().await else { return };
        let setup = match self.cri.setup().await {
            Ok(setup) => setup,
            Err(error) => {
                warn!(%error, "the runtime does not tell how it is set up");
                return;
            }
        };
        info!(runtime = version.runtime_name, version = version.runtime_version, "the runtime answers");
        self.version = Some(RuntimeVersion { name: version.runtime_name, version: version.runtime_version });
        self.setup = Some(setup);
    }

    async fn report(&mut self, status: &NodeStatus, now: Duration) {
        let mut labels = node::labels(&self.config.node_name, &self.machine);
        labels.extend(self.config.labels.clone());
        let payload = NodeReport {
            status: serde_json::to_value(status).unwrap_or_default(),
            addresses: self.addresses.iter().map(ToString::to_string).collect(),
            labels,
        };
        let report = Report {
            id: 0,
            kind: ReportKind::NodeStatus,
            namespace: String::new(),
            name: self.config.node_name.clone(),
            uid: String::new(),
            payload: serde_json::to_vec(&payload).unwrap_or_default().into(),
        };
        match self.store.report(report).await {
            Ok(()) => self.sent = Some(now),
            Err(error) => warn!(%error, "the node's status could not be kept"),
        }
    }

    /// Computes the facts again, from the box, the runtime and the store.
    async fn update_facts(&self, health: Option<&Health>) {
        let setup = self.setup.clone().unwrap_or_default();
        let name = &self.config.node_name;
        let mut facts = node::facts(name, &self.capacity, self.addresses.clone(), paths(&self.config), &setup, health);
        if health.is_none() {
            let known = self.facts.borrow();
            facts.runtime_handlers.clone_from(&known.runtime_handlers);
            facts.recursive_read_only.clone_from(&known.recursive_read_only);
            facts.strict_groups = known.strict_groups;
        }
        let rows = |collection| async move { self.store.list(collection).await.unwrap_or_default() };
        if let Some(node) = rows(Collection::Node).await.first().and_then(parse::<Node>) {
            facts.labels = node.metadata.labels.unwrap_or_default();
        }
        if let Some(settings) = rows(Collection::Settings).await.first().and_then(parse::<Settings>) {
            facts.settings = settings;
        }
        for class in rows(Collection::RuntimeClasses).await.iter().filter_map(parse::<RuntimeClass>) {
            let overhead = class.overhead.and_then(|overhead| overhead.pod_fixed).unwrap_or_default();
            let amount =
                |name: &str| overhead.get(name).and_then(|quantity| Amount::of(quantity).ok()).unwrap_or_default();
            let handler = RuntimeHandler {
                handler: class.handler,
                overhead_cpu_milli: amount("cpu").milli(),
                overhead_memory: amount("memory").units(),
            };
            facts.runtime_classes.insert(class.metadata.name.unwrap_or_default(), handler);
        }
        self.facts.send_replace(Arc::new(facts));
    }
}

/// What the kernel of this box gives to containers.
pub fn read_machine() -> resources::Machine {
    let root = Path::new("/sys/fs/cgroup");
    let v2 = root.join("cgroup.controllers").exists();
    let swap_accounting =
        if v2 { has_swap_limits(root) } else { root.join("memory/memory.memsw.limit_in_bytes").exists() };
    let names = |directory: &str| -> Vec<String> {
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    };
    let hugetlb = if v2 {
        std::fs::read_to_string(root.join("cgroup.controllers"))
            .is_ok_and(|all| all.split_whitespace().any(|one| one == "hugetlb"))
    } else {
        root.join("hugetlb").exists()
    };
    let sizes = if hugetlb { names("/sys/kernel/mm/hugepages") } else { Vec::new() };
    let cpus = "/sys/devices/system/cpu";
    let throttle = names(cpus).into_iter().map(|cpu| format!("{cpus}/{cpu}/thermal_throttle"));
    resources::Machine {
        cgroup_v2: v2,
        swap_accounting,
        memory: i64::try_from(Machine::read().memory).unwrap_or(i64::MAX),
        hugepage_sizes: resources::hugepage_sizes(sizes.iter().map(String::as_str)),
        thermal_throttle: throttle.filter(|directory| Path::new(directory).is_dir()).collect(),
        ..resources::Machine::default()
    }
}

/// The root of the unified hierarchy has no limits of its own, so that one below it tells. Where nothing is, nothing can be limited yet.
fn has_swap_limits(root: &Path) -> bool {
    let below = std::fs::read_dir(root).into_iter().flatten().flatten();
    below.map(|entry| entry.path().join("memory.swap.max")).any(|file| file.exists())
}

fn is_about_node(collection: Collection) -> bool {
    matches!(collection, Collection::Node | Collection::Settings | Collection::RuntimeClasses)
}

fn paths(config: &Config) -> Paths {
    Paths {
        pods_root: config.pods_dir.clone(),
        logs_root: config.logs_dir.clone(),
        log_links: config.log_links_dir.clone(),
    }
}

fn ready(status: &NodeStatus) -> bool {
    let conditions = status.conditions.as_deref().unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// How events name the node.
pub(super) fn reference(node: &str) -> ObjectReference {
    ObjectReference {
        kind: Some("Node".to_owned()),
        name: Some(node.to_owned()),
        uid: Some(node.to_owned()),
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubelet::pods::tests::Agent;
    use crate::runtime::{connect, fake::FakeRuntime};

    fn nothing(store: &Store) -> (Devices, watch::Receiver<mqtt::Status>) {
        (Devices::new(store.clone()), watch::channel(mqtt::Status::default()).1)
    }

    #[test]
    fn swap_is_limited_only_where_the_kernel_has_the_file() {
        let root = tempfile::tempdir().unwrap();
        assert!(!has_swap_limits(root.path()));
        let group = root.path().join("system.slice");
        std::fs::create_dir(&group).unwrap();
        assert!(!has_swap_limits(root.path()), "a kernel that does not account it");
        std::fs::write(group.join("memory.swap.max"), "max\n").unwrap();
        assert!(has_swap_limits(root.path()));
    }

    #[tokio::test]
    async fn addresses_that_come_after_the_start_are_told_to_pods_and_to_the_cloud() {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, _fake) = FakeRuntime::start(dir.path()).unwrap();
        let cri = Cri::new(connect::channel(&endpoint).unwrap());
        let store = Store::open(&dir.path().join("data"), jiff::Timestamp::UNIX_EPOCH).unwrap();
        let mut config = Config::new(&"localhost:1".parse().unwrap(), "box");
        config.pods_dir = dir.path().to_owned();
        let (mut node, news) =
            NodeLoop::new(store.clone(), cri, Arc::new(config), nothing(&store), watch::channel(None).0).await;
        let reported = async || {
            let reports = store.all_reports(0, 1 << 20).await.unwrap();
            serde_json::from_slice::<NodeReport>(&reports.last().unwrap().payload).unwrap().addresses
        };
        // As at a boot before the first lease.
        node.addresses = vec!["192.0.2.1".parse().unwrap()];
        node.update_facts(None).await;
        node.report(&NodeStatus::default(), Duration::ZERO).await;
        assert_eq!(reported().await, ["192.0.2.1"]);
        node.look(None).await;
        let now = node::addresses();
        assert_eq!(news.facts.borrow().host_ips, now);
        assert_eq!(reported().await, now.iter().map(ToString::to_string).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn since_when_the_node_is_as_it_is_outlives_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, fake) = FakeRuntime::start(dir.path()).unwrap();
        let store = Store::open(&dir.path().join("data"), jiff::Timestamp::UNIX_EPOCH).unwrap();
        let mut config = Config::new(&"localhost:1".parse().unwrap(), "box");
        config.pods_dir = dir.path().to_owned();
        let config = Arc::new(config);
        let ready = async |is_ready: bool| {
            fake.condition("NetworkReady", is_ready, "no network config found");
            let cri = Cri::new(connect::channel(&endpoint).unwrap());
            let status = watch::channel(None).0;
            let (mut node, _news) =
                NodeLoop::new(store.clone(), cri, config.clone(), nothing(&store), status.clone()).await;
            node.look(None).await;
            let conditions = status.borrow().clone().and_then(|status| status.conditions).unwrap();
            let ready = conditions.into_iter().find(|one| one.type_ == "Ready").unwrap();
            assert_eq!(ready.status == "True", is_ready);
            ready.last_transition_time.unwrap().0.to_string()
        };
        let long_ago = |status: &str| {
            let ready =
                serde_json::json!([{"type": "Ready", "status": status, "lastTransitionTime": "2020-01-01T00:00:00Z"}]);
            store.remember(NODE_NOTES, CONDITIONS_NOTE, ready.to_string().into())
        };
        store.remember(NODE_NOTES, CONDITIONS_NOTE, "[{".into()).await.unwrap();
        assert_ne!(ready(true).await, "2020-01-01T00:00:00Z", "what is damaged says nothing");
        long_ago("True").await.unwrap();
        assert_eq!(ready(true).await, "2020-01-01T00:00:00Z");
        assert_eq!(ready(true).await, "2020-01-01T00:00:00Z", "the other conditions were kept since, and it still is");
        assert_ne!(ready(false).await, "2020-01-01T00:00:00Z");
        long_ago("False").await.unwrap();
        assert_ne!(ready(true).await, "2020-01-01T00:00:00Z");
    }

    #[tokio::test]
    async fn a_start_is_an_event_and_so_is_one_of_the_box() {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, _fake) = FakeRuntime::start(dir.path()).unwrap();
        let agent = Agent::start(dir.path(), "data", &endpoint);
        let cri = Cri::new(connect::channel(&endpoint).unwrap());
        let mut config = Config::new(&"localhost:1".parse().unwrap(), "box");
        config.pods_dir = dir.path().to_owned();
        let (mut node, _news) =
            NodeLoop::new(agent.store.clone(), cri, Arc::new(config), nothing(&agent.store), watch::channel(None).0)
                .await;
        for (boot, is_another) in [("a", false), ("a", false), ("b", true), ("b", false)] {
            node.machine.boot_id = boot.to_owned();
            assert_eq!(node.has_rebooted().await, is_another, "{boot}");
        }
        node.machine.boot_id = "c".to_owned();
        node.look(Some(agent.context.clone())).await;
        agent.event("Starting").await;
        assert_eq!(agent.event("Rebooted").await["message"], "Node box has been rebooted, boot id: c");
        agent.end().await;
    }

    #[tokio::test]
    async fn a_network_is_written_where_the_runtime_looks_once_there_are_plugins() {
        let dir = tempfile::tempdir().unwrap();
        let (endpoint, fake) = FakeRuntime::start(dir.path()).unwrap();
        fake.condition("NetworkReady", false, "no network config found");
        let (conf, bin) = (dir.path().join("net.d"), dir.path().join("bin"));
        std::fs::create_dir(&bin).unwrap();
        let told = serde_json::json!({"cni": {"confDir": conf, "binDir": bin}});
        fake.setup(&told.to_string(), None);
        let cri = Cri::new(connect::channel(&endpoint).unwrap());
        let store = Store::open(&dir.path().join("data"), jiff::Timestamp::UNIX_EPOCH).unwrap();
        let mut config = Config::new(&"localhost:1".parse().unwrap(), "box");
        config.pods_dir = dir.path().to_owned();
        let (mut node, news) =
            NodeLoop::new(store.clone(), cri, Arc::new(config), nothing(&store), watch::channel(None).0).await;
        assert!(!node.look(None).await);
        assert!(news.network.borrow().is_some() && !conf.exists());
        // They are installed later.
        for plugin in ["bridge", "host-local", "portmap", "loopback"] {
            std::fs::write(bin.join(plugin), "").unwrap();
        }
        node.look(None).await;
        assert!(conf.join(cni::FILE).exists());
    }
}
