//! The kubelet's endpoint: what `kubectl logs`, `exec`, `attach` and `port-forward` end at, with the upstream kubelet's paths, parameters and
//! answers. cloudcore reaches it by streams of the link, the box itself by the control socket; whether who asks may was decided there.
//!
//! One connection is one request. Nothing runs while nobody asks, and what is on its way is bounded, whatever the sides' pace.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming as RequestBody;
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::Upgraded;
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use skerry_proto::mux::MAX_STREAMS;
use skerry_proto::ops::KUBELET;
use skerry_proto::streams::Incoming;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tracing::debug;

use self::answer::{Answer, Refusal, json, text};
use self::query::Query;
use self::relay::Relay;
use self::route::Route;
use crate::config::Config;
use crate::devices::{self, Devices, mqtt};
use crate::runtime::Cri;
use crate::stats::Stats;
use crate::store::Store;
use crate::supervise;

pub(crate) mod answer;
mod configz;
mod files;
mod health;
mod logs;
mod metrics;
mod pods;
pub(crate) mod query;
mod relay;
mod route;
mod streaming;
#[cfg(test)]
mod tests;

/// Requests that are served at once; one more is refused.
const MAX_REQUESTS: usize = 256;
/// Commands of `/run` at once, whose output is kept until they end: as much of each as one message of the runtime's is.
const MAX_RUNS: usize = 4;
/// Streams of a class that may wait to be taken: all that there can be, for many may come before anybody gets to run.
pub const WAITING: usize = MAX_STREAMS;
/// The longest head of a request, and what is buffered of an answer.
const BUFFER: usize = 64 << 10;
/// How long a connection may say nothing before its request is there.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// Answers the requests that a kubelet answers; a clone is a handle.
#[derive(Clone, Debug)]
pub struct Ops {
    store: Store,
    cri: Cri,
    config: Arc<Config>,
    stats: watch::Receiver<Option<Stats>>,
    devices: Devices,
    mqtt: watch::Receiver<mqtt::Status>,
    places: Arc<Semaphore>,
    runs: Arc<Semaphore>,
}

/// The streams that cloudcore opens, over restarts of who serves them.
#[derive(Clone, Debug)]
pub struct Requests(Arc<Mutex<mpsc::Receiver<Incoming>>>);

impl Requests {
    /// What comes out of this receiver.
    pub fn new(streams: mpsc::Receiver<Incoming>) -> Self {
        Self(Arc::new(Mutex::new(streams)))
    }
}

/// Serves streams until the shutdown, each by a task of its own that ends with it.
pub async fn serve(ops: Ops, requests: Requests, shutdown: CancellationToken) {
    let mut requests = requests.0.lock().await;
    loop {
        let incoming = tokio::select! {
            () = shutdown.cancelled() => return,
            incoming = requests.recv() => incoming,
        };
        let Some(incoming) = incoming else { return shutdown.cancelled().await };
        if &incoming.header[..] != KUBELET {
            let header = String::from_utf8_lossy(&incoming.header[..incoming.header.len().min(32)]).into_owned();
            incoming.refuse(&format!("this edgecore does not know what {header:?} is, only \"kubelet\""));
            continue;
        }
        let Ok(place) = Arc::clone(&ops.places).try_acquire_owned() else {
            incoming.refuse(&too_many());
            continue;
        };
        let ops = ops.clone();
        supervise::spawn("kubelet request", async move {
            let gone = incoming.stream.gone();
            tokio::select! {
                () = ops.connection(incoming.stream) => {}
                // Whatever is under way ends with who asked for it.
                end = gone => debug!("a request ended before its answer: {end}"),
            }
            drop(place);
        });
    }
}

fn too_many() -> String {
    format!(
        "{MAX_REQUESTS} requests are being served on this node, which is all it takes; end some, or try again later"
    )
}

impl Ops {
    /// Over a channel to the runtime. `stats` measures the pods, while the kubelet runs.
    pub fn new(store: Store, config: Arc<Config>, runtime: Channel, stats: watch::Receiver<Option<Stats>>) -> Self {
        let (devices, mqtt) = (Devices::new(store.clone()), watch::channel(mqtt::Status::default()).1);
        let places = |most| Arc::new(Semaphore::new(most));
        let (places, runs) = (places(MAX_REQUESTS), places(MAX_RUNS));
        Self { store, cri: Cri::new(runtime), config, stats, devices, mqtt, places, runs }
    }

    /// With the devices of the node, instead of none, and how their MQTT is.
    #[must_use]
    pub fn with_devices(self, devices: Devices, mqtt: watch::Receiver<mqtt::Status>) -> Self {
        Self { devices, mqtt, ..self }
    }

    /// Serves a connection of the control socket, as one of the link's.
    pub async fn local(&self, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        match Arc::clone(&self.places).try_acquire_owned() {
            Ok(_place) => self.connection(io).await,
            Err(_) => {
                let refuse = service_fn(|_: Request<RequestBody>| async {
                    let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, too_many());
                    Ok::<Answer, Infallible>(refusal.into())
                });
                // The other side is gone: nobody to tell.
                let _ = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(io), refuse).await;
            }
        }
    }

    /// Serves one request, and what becomes of its connection.
    async fn connection(&self, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let (relays, mut relay) = mpsc::channel(1);
        let service = service_fn(move |request| {
            let (ops, relays) = (self.clone(), relays.clone());
            async move { Ok::<_, Infallible>(ops.answer(request, &relays).await) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(BUFFER)
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades()
            .await;
        if let Err(error) = served {
            return debug!(%error, "a request was not answered to its end");
        }
        if let Ok(relay) = relay.try_recv()
            && let Err(error) = Relay::run(relay).await
        {
            debug!(%error, "a streaming session broke");
        }
    }

    async fn answer(&self, mut request: Request<RequestBody>, relays: &mpsc::Sender<Relay>) -> Answer {
        let client = hyper::upgrade::on(&mut request);
        let routed = if devices::http::is_ours(request.uri().path()) {
            Ok((Box::pin(devices::http::answer(&self.devices, request)).await, None))
        } else {
            Box::pin(self.route(&request)).await
        };
        let (mut answer, runtime) = match routed {
            Ok(answered) => answered,
            Err(refusal) => (refusal.into(), None),
        };
        if runtime.is_none() {
            answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        // There is one request on a connection, and room for what comes of it.
        let _ = relays.try_send(Relay { client, runtime });
        answer
    }

    async fn route(&self, request: &Request<RequestBody>) -> Result<(Answer, Option<Upgraded>), Refusal> {
        let query = Query::parse(request.uri().query().unwrap_or_default());
        let answer = match Route::of(request.method(), request.uri().path())? {
            Route::Exec(of) => return streaming::exec(self, &of, &query, request).await,
            Route::Attach(of) => return streaming::attach(self, &of, &query, request).await,
            Route::PortForward(of) => return streaming::port_forward(self, &of, &query, request).await,
            Route::Run(of) => streaming::run(self, &of, &query).await?,
            Route::ContainerLogs(of) => logs::logs(self, &of, &query).await?,
            Route::Pods => json(&pods::desired(&self.store).await?),
            Route::RunningPods => json(&pods::in_runtime(&self.cri).await?),
            Route::Healthz { syncloop } => {
                if syncloop {
                    health::syncloop(self).map_err(Refusal::failed)?;
                }
                text("ok")
            }
            Route::Configz => json(&configz::configz(&self.config)),
            Route::HostLogs(parts, slash) => files::host_logs(files::ROOT, parts, slash).await?,
            Route::Checkpoint => {
                let words = "containers on this node cannot be checkpointed: edgecore does not implement it";
                return Err(Refusal::new(StatusCode::NOT_IMPLEMENTED, words));
            }
            Route::Metrics(path) => metrics::metrics(self, &path, &query).await?,
        };
        Ok((answer, None))
    }
}
