//! Calls of mappers: one connection for each, which also says whether the mapper is there, by a task of its own, so that one that hangs holds
//! up nobody else.

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper::{Request, Response, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};
use skerry_proto::device::DeviceSpec;
use skerry_proto::dmi::device_mapper_service_client::DeviceMapperServiceClient;
use skerry_proto::dmi::{
    CreateDeviceModelRequest, RegisterDeviceRequest, RemoveDeviceModelRequest, RemoveDeviceRequest,
    UpdateDeviceModelRequest, UpdateDeviceRequest,
};
use skerry_proto::sync::Collection;
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tracing::{debug, info, warn};

use crate::clock;
use crate::devices::twin::{Call, MapperId, NOT_TAKEN, Outcome, ToTell};
use crate::devices::{Devices, convert, now, serve};
use crate::link::backoff::Backoff;
use crate::supervise;

/// How long a mapper may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// Calls of one mapper at a time, each for another device.
const AT_ONCE: usize = 4;
/// Between attempts to reach one that is not there: from, to, and to after [`PATIENCE`].
const RETRY: [Duration; 3] = [Duration::from_millis(100), Duration::from_secs(2), Duration::from_secs(30)];
/// One that is away for longer comes back by registering, most likely.
const PATIENCE: Duration = Duration::from_secs(600);

/// A connection to a mapper; a clone is a handle.
#[derive(Clone, Debug)]
pub(crate) struct Client(http2::SendRequest<tonic::body::Body>);

impl tower::Service<Request<tonic::body::Body>> for Client {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// What requests are for: nobody looks at it on a unix socket, but HTTP/2 wants it.
pub(crate) fn origin() -> Uri {
    Uri::from_static("http://localhost")
}

/// The connections to mappers.
#[derive(Debug, Default)]
pub(crate) struct Links(Mutex<HashMap<MapperId, Link>>);

#[derive(Debug)]
struct Link {
    /// It registered: time to look for it.
    kick: Arc<Notify>,
    /// Of the process that registered it, and of the one that serves its socket.
    pids: [Option<i32>; 2],
    client: Option<Client>,
}

impl Links {
    fn with<T>(&self, act: impl FnOnce(&mut HashMap<MapperId, Link>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Of a mapper that is connected.
    pub(crate) fn client(&self, id: MapperId) -> Option<Client> {
        self.with(|links| links.get(&id)?.client.clone())
    }

    /// The mappers of a process.
    pub(super) fn of_process(&self, pid: i32) -> Vec<MapperId> {
        self.with(|links| links.iter().filter(|(_, link)| link.pids.contains(&Some(pid))).map(|(id, _)| *id).collect())
    }
}

/// Keeps a mapper connected from now on; or looks for it at once, if it is kept already.
pub(crate) fn keep(devices: &Devices, id: MapperId, address: &str, pid: Option<i32>, stop: &CancellationToken) {
    let kick = devices.0.links.with(|links| {
        if let Some(link) = links.get_mut(&id) {
            link.pids[0] = pid.or(link.pids[0]);
            link.kick.notify_one();
            return None;
        }
        let kick = Arc::new(Notify::new());
        links.insert(id, Link { kick: Arc::clone(&kick), pids: [pid, None], client: None });
        Some(kick)
    });
    if let Some(kick) = kick {
        let (devices, address, stop) = (devices.clone(), PathBuf::from(address), stop.clone());
        supervise::spawn("mapper", async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = stay(&devices, id, &address, &kick) => {}
            }
            devices.0.links.with(|links| links.remove(&id));
        });
    }
}

/// Connects, talks, and connects again, for as long as the mapper is known.
async fn stay(devices: &Devices, id: MapperId, address: &Path, kick: &Notify) {
    let [first, soon, late] = RETRY;
    let mut backoff = Backoff::new(first, soon, rand::random());
    let mut away = clock::monotonic();
    loop {
        match connect(address).await {
            Ok((client, pid, ended)) => {
                info!(mapper = %address.display(), "the mapper is connected");
                devices.0.links.with(|links| {
                    if let Some(link) = links.get_mut(&id) {
                        (link.client, link.pids[1]) = (Some(client.clone()), pid);
                    }
                });
                devices.with(|twins, now| twins.connected(id, true, now));
                talk(devices, id, client, ended).await;
                info!(mapper = %address.display(), "the mapper is gone");
                devices.0.links.with(|links| {
                    if let Some(link) = links.get_mut(&id) {
                        link.client = None;
                    }
                });
                devices.with(|twins, now| twins.connected(id, false, now));
                // So that its devices find another mapper when it has been waited for.
                devices.0.work.notify_one();
                backoff.reset();
                away = clock::monotonic();
            }
            Err(error) => debug!(%error, mapper = %address.display(), "the mapper cannot be reached"),
        }
        if !devices.lock().mappers().any(|(of, _)| of == id) {
            return;
        }
        let wait = match clock::monotonic().saturating_sub(away) {
            since if since < PATIENCE => backoff.wait(),
            _ => late.mul_f64(rand::random_range(0.5..=1.0)),
        };
        tokio::select! {
            () = kick.notified() => backoff.reset(),
            () = tokio::time::sleep(wait) => {}
        }
    }
}

type Ended = tokio::task::JoinHandle<()>;

async fn connect(address: &Path) -> std::io::Result<(Client, Option<i32>, Ended)> {
    let opened = async {
        let stream = UnixStream::connect(address).await?;
        let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let connected = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
        let (client, connection) = connected.map_err(std::io::Error::other)?;
        let ended = supervise::spawn("mapper connection", async move {
            if let Err(error) = connection.await {
                debug!(%error, "a mapper's connection broke");
            }
        });
        Ok((Client(client), pid, ended))
    };
    tokio::time::timeout(DEADLINE, opened).await?
}

/// Tells the mapper what it is to know, until its connection ends.
async fn talk(devices: &Devices, id: MapperId, client: Client, mut ended: Ended) {
    let mut news = devices.0.calls.subscribe();
    let mut calls = FuturesUnordered::new();
    loop {
        while calls.len() < AT_ONCE
            && let Some(call) = devices.with(|twins, now| twins.next_call(id, now))
        {
            calls.push(perform(devices, client.clone(), call));
        }
        let due = if calls.len() < AT_ONCE { devices.lock().next_due(id) } else { None };
        let due = async {
            match due {
                Some(due) => tokio::time::sleep(due.saturating_sub(now().mono)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = &mut ended => return,
            Some((call, outcome)) = calls.next(), if !calls.is_empty() => {
                devices.with(|twins, now| twins.called(id, &call, outcome, now));
            }
            Ok(()) = news.changed() => {}
            () = due => {}
        }
    }
}

/// Makes a call; what it told is in the call that comes back.
async fn perform(devices: &Devices, client: Client, mut call: Call) -> (Call, Outcome) {
    let result = tokio::time::timeout(DEADLINE, send(devices, client, &mut call)).await;
    let (outcome, why) = match result {
        Ok(Ok(())) => (Outcome::Done, String::new()),
        Ok(Err(status)) => match status.code() {
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Aborted => {
                (Outcome::Lost, status.message().to_owned())
            }
            _ => (Outcome::Refused, status.message().to_owned()),
        },
        Err(_) => (Outcome::Lost, format!("no answer within {} s", DEADLINE.as_secs())),
    };
    if let Call::Device { key, .. } = &call
        && outcome != Outcome::Done
    {
        warn!(device = %key, why, "the mapper does not take the device; it is told again later");
        devices.lock().trouble(key, &format!("{NOT_TAKEN}{why}"));
    } else if outcome != Outcome::Done {
        debug!(?call, why, "a mapper does not take what it is told");
    }
    (call, outcome)
}

async fn send(devices: &Devices, client: Client, call: &mut Call) -> Result<(), Status> {
    let mut mapper = DeviceMapperServiceClient::with_origin(client, origin());
    match call {
        Call::Model { key, spec, update, .. } => {
            let model = Some(convert::model(key, spec));
            if *update {
                mapper.update_device_model(timed(UpdateDeviceModelRequest { model })).await?;
            } else {
                mapper.create_device_model(timed(CreateDeviceModelRequest { model })).await?;
            }
        }
        Call::DropModel { key } => {
            let (model_namespace, model_name) = split(key);
            mapper.remove_device_model(timed(RemoveDeviceModelRequest { model_name, model_namespace })).await?;
        }
        Call::Remove { key } => {
            let (device_namespace, device_name) = split(key);
            mapper.remove_device(timed(RemoveDeviceRequest { device_name, device_namespace })).await?;
        }
        Call::Device { key, uid, told, update, .. } => {
            let (device, mark) = devices.for_mapper(key, uid).await?;
            *told = mark;
            let device = Some(device);
            if *update {
                mapper.update_device(timed(UpdateDeviceRequest { device })).await?;
            } else {
                mapper.register_device(timed(RegisterDeviceRequest { device })).await?;
            }
        }
    }
    Ok(())
}

/// The mapper hears of the deadline, too.
fn timed<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(DEADLINE);
    request
}

fn split(key: &str) -> (String, String) {
    let (namespace, name) = key.split_once('/').unwrap_or_default();
    (namespace.to_owned(), name.to_owned())
}

impl Devices {
    /// A device as its mapper is told of it, and the mark of it.
    pub(super) async fn for_mapper(&self, key: &str, uid: &str) -> Result<(skerry_proto::dmi::Device, u64), Status> {
        let gone = || Status::aborted("the device is no longer there");
        let row = self.0.store.row(Collection::Devices, uid).await;
        let row = row.map_err(|error| Status::aborted(error.to_string()))?.ok_or_else(gone)?;
        let spec: DeviceSpec = serve::spec(&row).map_err(|error| Status::aborted(error.to_string()))?;
        // After the store was read: what is wanted is as new as it can be.
        let ToTell { model, wanted, mark, .. } = self.lock().to_tell(key).ok_or_else(gone)?;
        Ok((convert::device(key, spec, &model, &wanted), mark))
    }
}
