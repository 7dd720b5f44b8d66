//! What mappers call: `DeviceManagerService` on a unix socket.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::sys::stat::{Mode, umask};
use prost::Message as _;
use skerry_proto::PARTIAL;
use skerry_proto::authority::Legal;
use skerry_proto::dmi::device_manager_service_server::{DeviceManagerService, DeviceManagerServiceServer};
use skerry_proto::dmi::extensions::device_report_service_server::{
    self, DeviceReportService, DeviceReportServiceServer,
};
use skerry_proto::dmi::extensions::{DeviceReport, Refusal, ReportRequest, ReportResponse};
use skerry_proto::dmi::{
    MapperRegisterRequest, MapperRegisterResponse, ReportDeviceStatesRequest, ReportDeviceStatesResponse,
    ReportDeviceStatusRequest, ReportDeviceStatusResponse,
};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status};
use tower::Service as _;
use tracing::{debug, error, info, warn};

use super::mapper::keep;
use super::pace::Pace;
use crate::devices::twin::{MapperId, MapperInfo, Now, ToTell, Twins};
use crate::devices::{Devices, Refused, convert};
use crate::{clock, supervise};

/// Connections of one process; one more is closed.
const MAX_CONNECTIONS: u32 = 32;
/// Calls at a time on one connection.
const MAX_CALLS: u32 = 64;
/// The most of devices and models in the answer to a registration, in bytes. What does not fit is told by calls, a few at a time: before it is
/// encoded a device takes several times its bytes, and what thousands took at once the heap would keep.
const MAX_ANSWER: usize = 64 << 10;
/// The status of a call whose message is longer than tonic takes, which is 4 MiB: OUT_OF_RANGE.
const TOO_LONG: &str = "11";
/// Devices that one report speaks of at most.
const MAX_DEVICES: usize = 1024;
/// Devices of a report that are taken at once: what changes of them has room where followers wait.
const AT_ONCE: usize = 32;
/// The longest name, protocol, version or address, in bytes.
const MAX_TEXT: usize = 253;
/// Between attempts to make the socket.
const RETRY: Duration = Duration::from_secs(5);

/// Serves mappers until it is stopped.
pub(crate) async fn serve(devices: Devices, path: PathBuf, stop: CancellationToken) {
    let listener = loop {
        match bind(&path) {
            Ok(listener) => break listener,
            Err(error) => {
                error!(%error, socket = %path.display(), "mappers cannot reach this node: the socket cannot be made; set dmi_socket, or make room for it");
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(RETRY) => {}
                }
            }
        }
    };
    let processes = Processes::default();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
                let place = match Place::take(&processes, pid.unwrap_or(0), clock::monotonic()) {
                    Ok(place) => place,
                    Err(refused) => {
                        devices.lock().counters.refused_connections += 1;
                        // Twice as often each time that it is said.
                        if refused.is_power_of_two() {
                            warn!(
                                pid,
                                refused,
                                "a process has more than {MAX_CONNECTIONS} connections to the device mapper interface; the newest are closed"
                            );
                        }
                        continue;
                    }
                };
                let known = devices.0.store.pods_known();
                let service = Service { devices: devices.clone(), pid, place, known, stop: stop.clone() };
                let stop = stop.clone();
                supervise::spawn("dmi connection", async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = connection(stream, service) => {}
                    }
                });
            }
            Err(error) => {
                warn!(%error, "the device mapper interface takes no connection");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
    // Nobody answers on it any more.
    let _ = crate::files::remove(&path);
}

/// Makes the socket, for root and its group: as KubeEdge's mappers expect it.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    crate::files::remove(path)?;
    let before = umask(Mode::from_bits_truncate(0o117));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

/// What is known of each process that is connected, or has reported more than it may.
#[derive(Clone, Debug, Default)]
struct Processes(Arc<Mutex<HashMap<i32, Process>>>);

#[derive(Debug, Default)]
struct Process {
    /// Those that are open.
    connections: u32,
    /// How many more were refused meanwhile.
    refused: u32,
    pace: Pace,
}

/// A connection's place among those of its process.
struct Place(Processes, i32);

impl Processes {
    fn with<T>(&self, act: impl FnOnce(&mut HashMap<i32, Process>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Place {
    /// Or how many the process was refused.
    fn take(processes: &Processes, pid: i32, now: Duration) -> Result<Self, u32> {
        processes.with(|all| {
            // Whoever connects anew has no more for it.
            all.retain(|_, process| process.connections > 0 || process.pace.is_ahead(now));
            let process = all.entry(pid).or_default();
            if process.connections >= MAX_CONNECTIONS {
                process.refused = process.refused.saturating_add(1);
                return Err(process.refused);
            }
            process.connections += 1;
            Ok(Self(processes.clone(), pid))
        })
    }

    /// A call with so many values; or how many the process was refused.
    fn report(&self, values: usize, now: Duration) -> Result<(), u64> {
        self.0.with(|all| {
            let pace = &mut all.entry(self.1).or_default().pace;
            if pace.take(values, now) { Ok(()) } else { Err(pace.refused) }
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.with(|all| {
            if let Some(process) = all.get_mut(&self.1) {
                process.connections -= 1;
                if process.connections == 0 {
                    process.refused = 0;
                }
            }
        });
    }
}

/// Generic over nothing: the generated services, without a router around them.
async fn connection(stream: UnixStream, service: Service) {
    let (devices, pid, service) = (service.devices.clone(), service.pid, Arc::new(service));
    let manager = DeviceManagerServiceServer::from_arc(Arc::clone(&service));
    let reports = DeviceReportServiceServer::from_arc(service);
    let answer = service_fn(move |request: hyper::Request<Incoming>| {
        let (mut manager, mut reports, devices) = (manager.clone(), reports.clone(), devices.clone());
        async move {
            let answer: Result<_, Infallible> = match request.uri().path().trim_start_matches('/').split_once('/') {
                Some((device_report_service_server::SERVICE_NAME, _)) => reports.call(request).await,
                _ => manager.call(request).await,
            };
            if answer.as_ref().is_ok_and(|answer| answer.headers().get("grpc-status").is_some_and(|of| of == TOO_LONG))
            {
                let mut twins = devices.lock();
                (twins.counters.refused, twins.counters.too_long) =
                    (twins.counters.refused + 1, twins.counters.too_long + 1);
                // Twice as often each time that it is said.
                if twins.counters.too_long.is_power_of_two() {
                    warn!(pid, refused = twins.counters.too_long, "a mapper's report of more than 4 MiB was refused");
                }
            }
            answer
        }
    });
    let served = http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(MAX_CALLS)
        .serve_connection(TokioIo::new(Legal::new(stream)), answer)
        .await;
    if let Err(error) = served {
        debug!(%error, "a connection of a mapper ended");
    }
}

/// One connection's.
struct Service {
    devices: Devices,
    pid: Option<i32>,
    place: Place,
    /// Whether this node knows what is its own: false in a new store until the cloud has said it.
    known: watch::Receiver<bool>,
    stop: CancellationToken,
}

impl Service {
    fn reporters(&self) -> Vec<MapperId> {
        self.pid.map(|pid| self.devices.0.links.of_process(pid)).unwrap_or_default()
    }

    /// Whether the process may report so many values now.
    fn pace(&self, values: usize) -> Result<(), Status> {
        let Err(refused) = self.place.report(values, clock::monotonic()) else { return Ok(()) };
        self.devices.lock().counters.floods += 1;
        if refused.is_power_of_two() {
            warn!(
                pid = self.pid,
                refused, "a process reports more values than edgecore takes of one; some of them are refused"
            );
        }
        Err(Status::resource_exhausted("this process reports too many values; report what changed, and less often"))
    }
}

/// Lets a mapper be called once it was answered, however that ended.
struct Answering<'a>(&'a Devices, MapperId);

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.lock().answered(self.1);
        self.0.called_for();
    }
}

#[tonic::async_trait]
impl DeviceManagerService for Service {
    async fn mapper_register(
        &self,
        request: Request<MapperRegisterRequest>,
    ) -> Result<Response<MapperRegisterResponse>, Status> {
        let MapperRegisterRequest { with_data, mapper } = request.into_inner();
        let info = info(mapper.unwrap_or_default())?;
        info!(mapper = info.name, protocol = info.protocol, address = info.address, "a mapper registers");
        self.devices.keep_mapper(&info).await;
        let address = info.address.clone();
        let id = self.devices.with(|twins, now| twins.register(info, now));
        let answering = Answering(&self.devices, id);
        self.devices.forget_mappers().await;
        let mut answer = Response::new(MapperRegisterResponse::default());
        if with_data && !self.devices.fill(id, answer.get_mut()).await {
            answer.metadata_mut().insert(PARTIAL, MetadataValue::from_static("true"));
        }
        drop(answering);
        keep(&self.devices, id, &address, self.pid, &self.stop);
        // Others of its protocol may have to part with devices.
        self.devices.0.work.notify_one();
        Ok(answer)
    }

    async fn report_device_status(
        &self,
        request: Request<ReportDeviceStatusRequest>,
    ) -> Result<Response<ReportDeviceStatusResponse>, Status> {
        let said = request.into_inner();
        let key = key(said.device_namespace, &said.device_name);
        let twins = said.reported_device.unwrap_or_default().twins;
        self.pace(twins.len())?;
        let reporters = self.reporters();
        let taken = self.hear(|of, now| of.report_values(&key, &reporters, &twins, now));
        taken.map_err(|refused| self.refuse(&key, &refused))?;
        Ok(Response::new(ReportDeviceStatusResponse {}))
    }

    async fn report_device_states(
        &self,
        request: Request<ReportDeviceStatesRequest>,
    ) -> Result<Response<ReportDeviceStatesResponse>, Status> {
        let said = request.into_inner();
        let key = key(said.device_namespace, &said.device_name);
        self.pace(1)?;
        let reporters = self.reporters();
        let taken = self.hear(|of, now| of.report_state(&key, &reporters, &said.state, now));
        taken.map_err(|refused| self.refuse(&key, &refused))?;
        Ok(Response::new(ReportDeviceStatesResponse {}))
    }
}

#[tonic::async_trait]
impl DeviceReportService for Service {
    async fn report(&self, request: Request<ReportRequest>) -> Result<Response<ReportResponse>, Status> {
        let said = request.into_inner().devices;
        if said.len() > MAX_DEVICES {
            return Err(Status::resource_exhausted(format!("one call may speak of {MAX_DEVICES} devices")));
        }
        self.pace(said.iter().map(|device| device.properties.len() + 1).sum())?;
        let reporters = self.reporters();
        let mut refusals = Vec::new();
        for (said, first) in said.chunks(AT_ONCE).zip((0..).step_by(AT_ONCE)) {
            let taken = self.take(said, &reporters);
            let refused = (first..).zip(taken).filter_map(|(device, refused)| Some((device, refused?)));
            refusals.extend(refused.map(|(device, (key, refused))| {
                let status = self.refuse(&key, &refused);
                Refusal { device, code: status.code().into(), message: status.message().to_owned() }
            }));
            // Whoever follows what changes is to come in between.
            tokio::task::yield_now().await;
        }
        Ok(Response::new(ReportResponse { refusals }))
    }
}

impl Service {
    /// Takes what some devices say; of each why something was refused.
    fn take(&self, said: &[DeviceReport], reporters: &[MapperId]) -> Vec<Option<(String, Refused)>> {
        self.hear(|twins, now| {
            let taken = said.iter().map(|said| {
                let key = key(said.device_namespace.clone(), &said.device_name);
                // A value by itself would say that the device is online.
                let state = match &*said.state {
                    "" => Ok(()),
                    state => twins.report_state(&key, reporters, state, now),
                };
                let values = match &*said.properties {
                    [] => Ok(()),
                    of => twins.report_values(&key, reporters, of, now),
                };
                values.and(state).err().map(|refused| (key, refused))
            });
            taken.collect()
        })
    }

    /// Has the twins take something, and what is urgent of it sent.
    fn hear<T>(&self, take: impl FnOnce(&mut Twins, Now) -> T) -> T {
        let (taken, is_urgent) = self.devices.with(|twins, now| {
            let before = twins.is_urgent();
            (take(twins, now), twins.is_urgent() && !before)
        });
        if is_urgent {
            self.devices.0.work.notify_one();
        }
        taken
    }

    /// What follows from a refusal, and how the call ends.
    fn refuse(&self, key: &str, refused: &Refused) -> Status {
        if *refused == Refused::NoDevice && *self.known.borrow() {
            // Whoever holds it is to drop it.
            self.devices.with(|twins, now| twins.stranger(key, now));
            self.devices.0.work.notify_one();
        }
        if matches!(refused, Refused::NoDevice | Refused::NotYours) {
            self.devices.called_for();
        }
        let words = format!("{key}: {refused}");
        debug!(words, "a report was refused");
        match refused {
            Refused::NoDevice => Status::not_found(words),
            Refused::NotYours => Status::permission_denied(words),
            Refused::NoProperty(_) | Refused::Value(_) => Status::invalid_argument(words),
        }
    }
}

/// Older mappers know no namespaces.
pub(in crate::devices) fn key(mut namespace: String, name: &str) -> String {
    if namespace.is_empty() {
        namespace.push_str("default");
    }
    namespace.push('/');
    namespace.push_str(name);
    namespace
}

/// What a mapper says of itself, if that will do.
pub(in crate::devices) fn info(mapper: skerry_proto::dmi::MapperInfo) -> Result<MapperInfo, Status> {
    let address = String::from_utf8(mapper.address).map_err(|_| Status::invalid_argument("its address is no text"))?;
    let address = address.strip_prefix("unix://").or_else(|| address.strip_prefix("unix:")).unwrap_or(&address);
    let info = MapperInfo {
        name: mapper.name,
        version: mapper.version,
        protocol: mapper.protocol,
        address: address.to_owned(),
    };
    let wrong = if info.protocol.is_empty() {
        "it names no protocol; devices are given to mappers by spec.protocol.protocolName"
    } else if !info.address.starts_with('/') {
        "its address is to be the absolute path of the unix socket that it serves"
    } else if [&info.name, &info.version, &info.protocol, &info.address].into_iter().any(|text| text.len() > MAX_TEXT) {
        "its name, version, protocol and address may have 253 bytes each"
    } else {
        return Ok(info);
    };
    Err(Status::invalid_argument(format!("the mapper {:?} cannot be registered: {wrong}", info.name)))
}

impl Devices {
    /// Puts a mapper's devices and their models into an answer, as many as fit; answers whether those are all.
    async fn fill(&self, id: MapperId, answer: &mut MapperRegisterResponse) -> bool {
        let its = self.lock().for_answer(id);
        let mut room = MAX_ANSWER;
        let mut models = std::collections::BTreeSet::new();
        let mut is_whole = true;
        for (slot, key, uid) in its {
            let to_tell = self.for_mapper(&key, &uid).await.ok().zip(self.lock().to_tell(&key));
            let Some(((device, mark), ToTell { model_key, model: spec, .. })) = to_tell else {
                is_whole = false;
                continue;
            };
            let model = (!models.contains(&model_key)).then(|| convert::model(&model_key, &spec));
            // With what it takes to say how long each is.
            let bytes = device.encoded_len() + model.as_ref().map_or(0, |model| model.encoded_len() + 8) + 8;
            let Some(left) = room.checked_sub(bytes) else { return false };
            room = left;
            answer.model_list.extend(model);
            models.insert(model_key);
            answer.device_list.push(device);
            self.lock().told_in_answer(id, slot, mark);
        }
        is_whole
    }
}
