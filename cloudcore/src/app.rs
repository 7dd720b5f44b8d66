//! Wires cloudcore's parts together, and takes them apart in order.

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use anyhow::Context as _;
use hyper::Request;
use hyper::header::DATE;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use prometheus_client::registry::Registry;
use skerry_proto::EDGE_LABEL;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::backend::Backend as _;
use crate::backend_k8s::{self, BackendOptions};
use crate::config::{Advertise, Config};
use crate::front::{self, AGENT, Front};
use crate::kubelet::{Ports, ServingCertificate};
use crate::metrics::Metrics;
use crate::pki::{self, CaError, CertificateAuthority, CurrentAuthority, ServerCertificate, Step};
use crate::retry::{chain, persist};
use crate::secrets::{KubeSecrets, SecretError, SecretStore as _};
use crate::supervise::spawn;
use crate::token::JoinTokens;
use crate::{admin, clock};

/// Sessions and requests get so long to end.
const DRAIN: Duration = Duration::from_secs(5);
/// Open files that a process may have wherever it runs.
const FILES: usize = 1024;
/// Open files that are kept for what is no session, where there are many: connections that begin, kubectl's, the apiserver's.
const STRANGERS: usize = 1024;
/// How often certificates and tokens are looked after.
const ROUND: Duration = Duration::from_secs(3600);

/// Runs cloudcore until SIGTERM or SIGINT.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let stop = CancellationToken::new();
    let running = serve(config, stop.clone());
    tokio::pin!(running);
    tokio::select! {
        ended = &mut running => return ended,
        _ = terminate.recv() => info!("SIGTERM: going down"),
        _ = interrupt.recv() => info!("SIGINT: going down"),
    }
    stop.cancel();
    running.await
}

/// A client of the apiserver that a kubeconfig names, or `$KUBECONFIG`, or the pod that this runs in.
pub async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<kube::Client> {
    let from_environment = std::env::var_os("KUBECONFIG").filter(|value| !value.is_empty());
    let path = kubeconfig.map(Path::to_path_buf).or_else(|| from_environment.map(Into::into));
    let mut config = match path {
        Some(path) => {
            let unusable = || format!("the kubeconfig {} cannot be used", path.display());
            let file = Kubeconfig::read_from(&path).with_context(unusable)?;
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.with_context(unusable)?
        }
        None => kube::Config::incluster().context(
            "no apiserver is named: give --kubeconfig FILE, set KUBECONFIG, or run in a pod whose service account token is mounted",
        )?,
    };
    config.connect_timeout = Some(Duration::from_secs(5));
    kube::Client::try_from(config).context("the apiserver's address or credentials cannot be used")
}

async fn serve(config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    info!("{AGENT} starts");
    let files = raise_file_limit();
    // What can be wrong on this machine is said first, before anything waits for the apiserver.
    let client = client(config.kubeconfig.as_deref()).await?;
    let admin_listener = TcpListener::bind(config.admin).await.with_context(|| {
        format!("cannot listen on {} for health and metrics; choose another with --admin-address", config.admin)
    })?;
    let listener = listen(config.port).await.with_context(|| {
        format!(
            "cannot listen on port {}; stop what uses it (`ss -ltnp 'sport = :{0}'`) or choose another with --port",
            config.port
        )
    })?;
    let datagrams = front::quic::bind(config.port).with_context(|| {
        format!(
            "cannot listen on UDP port {}; stop what uses it (`ss -lunp 'sport = :{0}'`) or choose another with --port",
            config.port
        )
    })?;
    let status = Arc::new(admin::Status::default());
    let admin_stop = CancellationToken::new();
    let admin = spawn("admin", admin::serve(admin_listener, Arc::clone(&status), admin_stop.clone()));

    let serving = tokio::select! {
        serving = start(&config, client, &status, stop.clone(), (listener, datagrams, files)) => serving?,
        () = stop.cancelled() => return Ok(()),
    };
    let ([port, quic, kubelets, deletions, rounds], restored) = serving;
    // In the order of the end: sessions, with the port; what served them; the outside view last.
    let mut tasks = [
        ("port", port),
        ("quic", quic),
        ("kubelets", kubelets),
        ("deletions", deletions),
        ("rounds", rounds),
        ("admin", admin),
    ];

    // None of them ends by itself; without one of them cloudcore would only seem to work.
    let broken = tokio::select! {
        biased;
        broken = first_to_break(&stop, &mut tasks) => broken,
        () = restored => anyhow::bail!(
            "the apiserver's revisions went back, as they do when its etcd is restored from a backup: cloudcore ends, for what it knows is \
             not true any more; start it again, it learns everything anew and no edge node loses anything"
        ),
    };
    if let Some(task) = broken {
        anyhow::bail!(
            "the task {task} ended, which is a bug of cloudcore: the log says where; start it again, nothing is lost"
        );
    }
    for (name, task) in tasks {
        if name == "admin" {
            admin_stop.cancel();
        }
        drop(task.await);
    }
    info!("down");
    Ok(())
}

/// Which of these ends first by itself; none if they are told to end.
async fn first_to_break(
    stop: &CancellationToken,
    tasks: &mut [(&'static str, JoinHandle<()>)],
) -> Option<&'static str> {
    let ended = std::future::poll_fn(|cx| {
        let ended = tasks.iter_mut().find_map(|(name, task)| Pin::new(task).poll(cx).is_ready().then_some(*name));
        ended.map_or(Poll::Pending, Poll::Ready)
    });
    tokio::select! {
        // Whoever has ended after that did as it was told.
        biased;
        () = stop.cancelled() => None,
        name = ended => Some(name),
    }
}

async fn start(
    config: &Config,
    client: kube::Client,
    status: &admin::Status,
    stop: CancellationToken,
    (listener, datagrams, files): (TcpListener, UdpSocket, usize),
) -> anyhow::Result<([JoinHandle<()>; 5], impl Future<Output = ()>)> {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let secrets = KubeSecrets::new(client.clone(), &config.namespace);
    let authority = Arc::new(CurrentAuthority::new(authority(config, &client, &secrets).await?));
    if let Some(first) = config.advertise.first() {
        let address = first.with_port(config.port);
        let record = || pki::record_address(&secrets, &address);
        persist("recording the advertised address", SecretError::is_transient, record).await?;
    }
    let certificate = ServerCertificate::issue(Arc::clone(&authority), &config.advertise, clock::wall())?;
    let certificate = Arc::new(certificate);
    // What the apiserver sees as the kubelets of nodes is in the cluster, and none of an edge's business.
    let kubelet = Advertise { host: config.kubelet_address.clone(), port: None };
    let serving = ServerCertificate::issue(Arc::clone(&authority), &[kubelet], clock::wall())?;
    let serving = Arc::new(serving);
    let tls = front::tls(Arc::clone(&authority), Arc::clone(&certificate))?;
    let endpoint = front::quic::endpoint(datagrams, &tls, &authority.current())?;

    let options =
        BackendOptions { cluster_domain: config.cluster_domain.clone(), cluster_dns: config.cluster_dns.clone() };
    let own_client = client.clone();
    let ports = Arc::new(Ports::new(&config.kubelet_address, config.kubelet_ports, most_ports(files)));
    let backend = backend_k8s::connect(client, options, ports, &mut registry).await?;
    let restored = backend.restored();
    let secrets = Arc::new(secrets);
    let tokens = JoinTokens::new(Arc::clone(&secrets));
    let front = Arc::new(Front::new(backend, Arc::clone(&authority), tokens, metrics.clone(), stop.clone()));
    front.count_queues(&mut registry);
    let kubelets = front.backend().kubelets();
    let sessions = Arc::clone(&front);
    let find = move |node: &str| sessions.streams(node);
    let asked_for = config.kubelet_csr.then(|| (config.kubelet_address.clone(), KubeSecrets::clone(&secrets)));
    let shown = Arc::new(ServingCertificate::new(Arc::clone(&serving), asked_for));
    let kubelets = kubelets.start(shown, find, &mut registry, DRAIN, stop.clone())?;
    let care = Care {
        client: own_client,
        authority,
        certificates: [certificate, serving],
        secrets,
        data_dir: config.data_dir.clone(),
        metrics,
    };

    let asked = Arc::clone(&front);
    status.running(registry, move || asked.backend().ready());
    info!(
        port = config.port,
        kubelets = format!("{}:{}", config.kubelet_address, config.kubelet_ports),
        advertised =
            config.advertise.iter().map(|address| address.with_port(config.port)).collect::<Vec<_>>().join(","),
        "serving edge nodes; `cloudcore token create` makes a join command"
    );
    let tasks = [
        spawn("port", Arc::clone(&front).serve(listener, tls, DRAIN)),
        spawn("quic", Arc::clone(&front).serve_quic(endpoint, DRAIN)),
        kubelets,
        spawn("deletions", front.watch_deletions()),
        spawn("rounds", care.rounds(stop)),
    ];
    Ok((tasks, restored))
}

/// Loads the CA or makes it, as long as that takes; makes the namespace too when that is allowed.
async fn authority(
    config: &Config,
    client: &kube::Client,
    secrets: &KubeSecrets,
) -> Result<CertificateAuthority, CaError> {
    let load = || async {
        // A new CA would lock out, without a word, every box that joined by the old one.
        if secrets.read(pki::SECRET).await?.is_none() && has_edge_nodes(client).await? {
            return Err(CaError::Orphaned);
        }
        let load = || CertificateAuthority::load_or_create(secrets, config.data_dir.as_deref(), clock::wall());
        match load().await {
            Err(CaError::Secret(SecretError::NoNamespace(namespace))) => {
                info!(namespace, "the namespace does not exist, creating it");
                secrets.create_namespace().await?;
                load().await
            }
            loaded => loaded,
        }
    };
    persist("loading the CA", CaError::is_transient, load).await
}

async fn has_edge_nodes(client: &kube::Client) -> Result<bool, SecretError> {
    let nodes: Api<Node> = Api::all(client.clone());
    let one = ListParams::default().labels(EDGE_LABEL).limit(1);
    match nodes.list_metadata(&one).await {
        Ok(found) => Ok(!found.items.is_empty()),
        Err(source) => {
            Err(SecretError::Unavailable { action: "look for edge nodes".to_owned(), source: source.into() })
        }
    }
}

/// As many files as the system lets this process have, which shells and service managers start with few: one for the session of an edge, and
/// one for its port.
fn raise_file_limit() -> usize {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard));
    match raised {
        Ok(files) => {
            info!(files, "limit of open files, two for each edge node");
            usize::try_from(files).unwrap_or(usize::MAX)
        }
        Err(error) => {
            warn!("the limit of open files cannot be raised: {error}");
            FILES
        }
    }
}

/// How many nodes may have a port: less than half of the files there may be, for a session comes before the port of its node, and those who
/// are no session yet have files open too.
fn most_ports(files: usize) -> usize {
    (files - STRANGERS.min(files / 4)) / 2
}

/// What is looked after from time to time.
struct Care {
    client: kube::Client,
    authority: Arc<CurrentAuthority>,
    certificates: [Arc<ServerCertificate>; 2],
    secrets: Arc<KubeSecrets>,
    data_dir: Option<PathBuf>,
    metrics: Metrics,
}

impl Care {
    /// Lets one CA follow another, renews the server certificate ahead of its end, and removes join tokens that expired.
    async fn rounds(self, stop: CancellationToken) {
        let tokens = JoinTokens::new(Arc::clone(&self.secrets));
        loop {
            // By the apiserver's clock, which all replicas have in common: one that is off by years must not rotate the CA away.
            let refreshed = match apiserver_clock(&self.client).await {
                Some(now) => self.authority.refresh(&*self.secrets, self.data_dir.as_deref(), now).await,
                None => {
                    debug!("the apiserver does not tell the time: the CA is looked after in the next round");
                    Ok(None)
                }
            };
            match refreshed {
                Ok(Some(Step::Announce)) => info!("a new CA was made; it signs once every node had time to hear of it"),
                Ok(Some(Step::Switch)) => info!("the new CA signs from now on; the old one is trusted for some time"),
                Ok(Some(Step::Drop)) => info!("the old CA is not trusted any more"),
                Ok(None) => {}
                Err(error) => warn!("cannot look after the CA: {}", chain(&error)),
            }
            self.metrics.ca_expires(self.authority.current().expires().as_second());
            for certificate in &self.certificates {
                match certificate.renew_if_due(clock::wall()) {
                    Ok(true) => info!("a server certificate was renewed"),
                    Ok(false) => {}
                    Err(error) => warn!("cannot renew a server certificate: {}", chain(&error)),
                }
            }
            match tokens.sweep(clock::wall()).await {
                Ok(0) => {}
                Ok(removed) => info!(removed, "expired join tokens were removed"),
                Err(error) => warn!("cannot remove expired join tokens: {}", chain(&error)),
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(ROUND) => {}
            }
        }
    }
}

/// What time it is for the apiserver, by the Date of an answer (RFC 9110 §6.6.1).
async fn apiserver_clock(client: &kube::Client) -> Option<Timestamp> {
    let request = Request::get("/version").body(kube::client::Body::empty()).ok()?;
    let answer = tokio::time::timeout(Duration::from_secs(10), client.send(request)).await.ok()?.ok()?;
    let date = answer.headers().get(DATE)?.to_str().ok()?;
    Some(jiff::fmt::rfc2822::parse(date).ok()?.timestamp())
}

/// Both families on one socket, or IPv4 where there is no IPv6.
async fn listen(port: u16) -> io::Result<TcpListener> {
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await
        }
        bound => bound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_ends_because_he_is_told_to_is_not_broken() {
        let (stop, broken) = (CancellationToken::new(), CancellationToken::new());
        let until = |token: &CancellationToken| spawn("test", token.clone().cancelled_owned());
        let mut tasks = [("one", until(&stop)), ("two", until(&broken))];
        broken.cancel();
        assert_eq!(first_to_break(&stop, &mut tasks).await, Some("two"));

        let mut tasks = [("one", until(&stop)), ("two", until(&stop))];
        stop.cancel();
        while !tasks.iter().all(|(_, task)| task.is_finished()) {
            tokio::task::yield_now().await;
        }
        for _ in 0..100 {
            assert_eq!(first_to_break(&stop, &mut tasks).await, None);
        }
    }
}
