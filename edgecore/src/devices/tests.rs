//! The module over real sockets, with a store and mappers that do as they are told.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request as HttpRequest};
use serde_json::{Value as Json, json};
use skerry_proto::device::DeviceReport;
use skerry_proto::dmi::Twin as Said;
use skerry_proto::dmi::device_manager_service_client::DeviceManagerServiceClient;
use skerry_proto::dmi::device_mapper_service_server::{DeviceMapperService, DeviceMapperServiceServer};
use skerry_proto::dmi::extensions::device_method_service_server::{DeviceMethodService, DeviceMethodServiceServer};
use skerry_proto::dmi::extensions::device_report_service_client::DeviceReportServiceClient;
use skerry_proto::dmi::extensions::{CallRequest, CallResponse, PropertyReport, ReportRequest, Sample};
use skerry_proto::dmi::*;
use skerry_proto::sync::{Collection, Object, Op};
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixListener;
use tokio::sync::{broadcast, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::http;
use super::*;
use crate::link::LinkState;
use crate::runtime::connect;
use crate::store::Store;
use crate::supervise;

/// A node's devices, served.
pub(super) struct Bed {
    pub(super) devices: Devices,
    pub(super) store: Store,
    pub(super) dir: tempfile::TempDir,
    link: watch::Sender<LinkState>,
    stop: CancellationToken,
    done: tokio::task::JoinHandle<()>,
}

impl Bed {
    pub(super) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("data"), jiff::Timestamp::UNIX_EPOCH).unwrap();
        let offline = LinkState::Offline { since: jiff::Timestamp::UNIX_EPOCH, reason: String::new() };
        let link = watch::channel(offline).0;
        let devices = Devices::new(store.clone());
        let (stop, done) = start(&devices, &dir.path().join("dmi.sock"), &link);
        Self { devices, store, dir, link, stop, done }
    }

    pub(super) async fn put(&self, collection: Collection, name: &str, uid: &str, spec: Json) {
        let object = json!({ "metadata": { "name": name, "namespace": "ns", "uid": uid }, "spec": spec });
        let object = Object::new(collection, format!("ns/{name}"), uid.to_owned(), object.to_string().as_bytes());
        self.store.apply(vec![Op::Upsert(object)]).await.unwrap();
    }

    pub(super) async fn heater(&self) {
        self.put(Collection::DeviceModels, "heater", "m1", model()).await;
        self.put(Collection::Devices, "boiler", "u1", device("20")).await;
    }

    /// As after a crash of edgecore.
    async fn restart(&mut self) {
        self.stop.cancel();
        (&mut self.done).await.unwrap();
        self.devices = Devices::new(self.store.clone());
        (self.stop, self.done) = start(&self.devices, &self.dir.path().join("dmi.sock"), &self.link);
    }

    pub(super) async fn manager(&self) -> DeviceManagerServiceClient<Channel> {
        DeviceManagerServiceClient::new(self.channel().await)
    }

    async fn channel(&self) -> Channel {
        let path = self.dir.path().join("dmi.sock");
        eventually("the socket", || path.exists()).await;
        connect::channel(path.to_str().unwrap()).unwrap()
    }

    async fn register(&self, mapper: &FakeMapper) -> MapperRegisterResponse {
        let request = MapperRegisterRequest {
            with_data: true,
            mapper: Some(MapperInfo {
                name: "fake".to_owned(),
                protocol: "modbus".to_owned(),
                address: mapper.path.to_str().unwrap().as_bytes().to_vec(),
                ..MapperInfo::default()
            }),
        };
        self.manager().await.mapper_register(request).await.unwrap().into_inner()
    }

    async fn ask(&self, method: Method, path: &str, body: Json) -> (u16, Json) {
        let body = if body.is_null() { Bytes::new() } else { body.to_string().into() };
        let request = HttpRequest::builder().method(method).uri(path).body(Full::new(body)).unwrap();
        let answer = http::answer(&self.devices, request).await;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let json = serde_json::from_slice(&body).unwrap_or_else(|_| String::from_utf8_lossy(&body).into_owned().into());
        (status, json)
    }
}

fn start(
    devices: &Devices,
    socket: &Path,
    link: &watch::Sender<LinkState>,
) -> (CancellationToken, tokio::task::JoinHandle<()>) {
    let stop = CancellationToken::new();
    let parts = Parts {
        devices: devices.clone(),
        socket: Some(socket.to_owned()),
        link: link.subscribe(),
        wanted: broadcast::channel(8).0,
        shutdown: stop.clone(),
    };
    (stop, supervise::spawn("devices", run(parts)))
}

fn model() -> Json {
    json!({ "protocol": "modbus", "properties": [
        { "name": "temp", "type": "FLOAT", "accessMode": "ReadWrite", "maximum": "100" }, { "name": "on", "type": "BOOLEAN" }] })
}

fn device(desired: &str) -> Json {
    json!({ "deviceModelRef": { "name": "heater" }, "nodeName": "box",
        "properties": [{ "name": "temp", "reportToCloud": true, "desired": { "value": desired } }, { "name": "on" }],
        "methods": [{ "name": "warm", "propertyNames": ["temp"] }] })
}

pub(super) fn status(value: &str) -> ReportDeviceStatusRequest {
    let reported = Some(TwinProperty { value: value.to_owned(), ..TwinProperty::default() });
    let twin = Said { property_name: "temp".to_owned(), reported, observed_desired: None };
    ReportDeviceStatusRequest {
        device_name: "boiler".to_owned(),
        device_namespace: "ns".to_owned(),
        reported_device: Some(DeviceStatus { twins: vec![twin], ..DeviceStatus::default() }),
    }
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let patience = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(30), patience).await.is_ok(), "{what} did not come");
}

/// A mapper's process; dropping it kills it.
struct Serving(Option<(oneshot::Sender<()>, std::thread::JoinHandle<()>)>);

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some((end, thread)) = self.0.take() {
            drop(end);
            let _ = thread.join();
        }
    }
}

/// A mapper that keeps what it is told.
#[derive(Clone)]
struct FakeMapper {
    path: PathBuf,
    calls: Arc<Mutex<Vec<String>>>,
    hangs: Arc<std::sync::atomic::AtomicBool>,
    methods: bool,
}

impl FakeMapper {
    fn start(dir: &Path, name: &str, methods: bool) -> (Self, Serving) {
        let fake = Self { path: dir.join(name), calls: Arc::default(), hangs: Arc::default(), methods };
        let serving = fake.serve();
        (fake, serving)
    }

    /// On a runtime of its own, so that all of it ends at once.
    fn serve(&self) -> Serving {
        let _ = std::fs::remove_file(&self.path);
        let listener = std::os::unix::net::UnixListener::bind(&self.path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let fake = self.clone();
        let (end, ended) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async move {
                let listener = UnixListener::from_std(listener).unwrap();
                let incoming = stream::unfold(listener, |listener| async move {
                    let accepted = listener.accept().await.map(|(stream, _)| stream);
                    Some((accepted, listener))
                });
                let methods = fake.methods.then(|| DeviceMethodServiceServer::new(fake.clone()));
                let server = tonic::transport::Server::builder()
                    .add_service(DeviceMapperServiceServer::new(fake))
                    .add_optional_service(methods);
                tokio::select! {
                    _ = server.serve_with_incoming(incoming) => {}
                    _ = ended => {}
                }
            });
        });
        Serving(Some((end, thread)))
    }

    async fn called<T: Default>(&self, words: String) -> Result<Response<T>, Status> {
        self.calls.lock().unwrap().push(words);
        if self.hangs.load(std::sync::atomic::Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(T::default()))
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    fn said(&self, words: &str) -> bool {
        self.calls.lock().unwrap().iter().any(|call| call == words)
    }
}

fn words(verb: &str, device: Option<Device>) -> String {
    let device = device.unwrap();
    let desired = device.spec.unwrap().properties[0].desired.clone().unwrap().value;
    format!("{verb} {}/{} {desired}", device.namespace, device.name)
}

#[tonic::async_trait]
impl DeviceMapperService for FakeMapper {
    async fn register_device(
        &self,
        r: Request<RegisterDeviceRequest>,
    ) -> Result<Response<RegisterDeviceResponse>, Status> {
        self.called(words("register", r.into_inner().device)).await
    }
    async fn remove_device(&self, r: Request<RemoveDeviceRequest>) -> Result<Response<RemoveDeviceResponse>, Status> {
        self.called(format!("remove {}", r.into_inner().device_name)).await
    }
    async fn update_device(&self, r: Request<UpdateDeviceRequest>) -> Result<Response<UpdateDeviceResponse>, Status> {
        self.called(words("update", r.into_inner().device)).await
    }
    async fn create_device_model(
        &self,
        r: Request<CreateDeviceModelRequest>,
    ) -> Result<Response<CreateDeviceModelResponse>, Status> {
        self.called(format!("model {}", r.into_inner().model.unwrap().name)).await
    }
    async fn remove_device_model(
        &self,
        r: Request<RemoveDeviceModelRequest>,
    ) -> Result<Response<RemoveDeviceModelResponse>, Status> {
        self.called(format!("no model {}", r.into_inner().model_name)).await
    }
    async fn update_device_model(
        &self,
        r: Request<UpdateDeviceModelRequest>,
    ) -> Result<Response<UpdateDeviceModelResponse>, Status> {
        self.called(format!("model again {}", r.into_inner().model.unwrap().name)).await
    }
    async fn get_device(&self, _: Request<GetDeviceRequest>) -> Result<Response<GetDeviceResponse>, Status> {
        Err(Status::not_found(""))
    }
}

#[tonic::async_trait]
impl DeviceMethodService for FakeMapper {
    async fn call(&self, request: Request<CallRequest>) -> Result<Response<CallResponse>, Status> {
        let call = request.into_inner();
        if call.arguments.contains_key("bad") {
            return Err(Status::failed_precondition("the door is open"));
        }
        if call.arguments.contains_key("far") {
            return Err(Status::unavailable("the device cannot be reached"));
        }
        let results = [("called".to_owned(), format!("{} {}", call.device_name, call.method))];
        Ok(Response::new(CallResponse { results: results.into(), written: !call.arguments.is_empty() }))
    }
}

#[tokio::test]
async fn a_mapper_is_told_all_that_changes_and_found_again_after_a_restart() {
    let mut bed = Bed::new().await;
    let (mapper, _serving) = FakeMapper::start(bed.dir.path(), "a.sock", false);
    // The mapper is there before its device.
    assert!(bed.register(&mapper).await.device_list.is_empty());
    bed.heater().await;
    eventually("the registration", || mapper.said("register ns/boiler 20")).await;
    assert_eq!(mapper.take(), ["model heater", "register ns/boiler 20"]);
    bed.put(Collection::Devices, "boiler", "u1", device("25")).await;
    eventually("the cloud's change", || mapper.said("update ns/boiler 25")).await;
    bed.devices.write("ns/boiler", "temp", "30", "cli").await.unwrap();
    eventually("the local change", || mapper.said("update ns/boiler 30")).await;
    mapper.take();

    bed.restart().await;
    eventually("the mapper to be found", || mapper.said("update ns/boiler 30")).await;
    eventually("readiness", || bed.devices.twin("ns/boiler").is_some_and(|twin| twin.ready)).await;
    assert_eq!(bed.devices.twin("ns/boiler").unwrap().properties[0].desired.as_ref().unwrap().origin, "cli");
    // A mapper that registers gets everything in the answer, and nothing besides.
    mapper.take();
    let answer = bed.register(&mapper).await;
    assert_eq!((answer.device_list.len(), answer.model_list.len()), (1, 1));
    let desired = answer.device_list[0].spec.as_ref().unwrap().properties[0].desired.clone().unwrap();
    assert_eq!((desired.value.as_str(), mapper.take().len()), ("30", 0));
    bed.store.apply(vec![Op::Delete(Collection::Devices, "u1".to_owned())]).await.unwrap();
    eventually("the removal", || mapper.said("remove boiler")).await;
    assert!(bed.store.notes("device-twin").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_mapper_that_hangs_hurts_only_its_own_and_one_that_dies_is_replaced() {
    let bed = Bed::new().await;
    let (a, serving) = FakeMapper::start(bed.dir.path(), "a.sock", false);
    let (b, _serving_b) = FakeMapper::start(bed.dir.path(), "b.sock", false);
    bed.put(Collection::DeviceModels, "heater", "m1", model()).await;
    bed.register(&a).await;
    bed.register(&b).await;
    for n in 0..20 {
        bed.put(Collection::Devices, &format!("d{n}"), &format!("u{n}"), device("1")).await;
    }
    let count = |mapper: &FakeMapper, verb: &str| {
        mapper.calls.lock().unwrap().iter().filter(|call| call.starts_with(verb)).count()
    };
    eventually("all devices", || count(&a, "register") + count(&b, "register") == 20).await;
    let of_a = count(&a, "register");
    assert!((1..20).contains(&of_a), "both have some: {of_a}");
    // One hangs: the other's are told all the same.
    a.hangs.store(true, std::sync::atomic::Ordering::SeqCst);
    b.take();
    for n in 0..20 {
        bed.put(Collection::Devices, &format!("d{n}"), &format!("u{n}"), device("2")).await;
    }
    eventually("the other's devices", || count(&b, "update") == 20 - of_a).await;
    // It dies: its devices find the other.
    drop(serving);
    b.take();
    eventually("its devices", || count(&b, "register") == of_a).await;
}

#[tokio::test]
async fn values_are_kept_streamed_and_reported_while_there_is_a_link() {
    let bed = Bed::new().await;
    bed.heater().await;
    let mut manager = bed.manager().await;
    eventually("the device", || bed.devices.twin("ns/boiler").is_some_and(|twin| !twin.properties.is_empty())).await;
    let mut changes = bed.devices.subscribe();
    manager.report_device_status(status("21.5")).await.unwrap();
    let refused = manager.report_device_status(status("hot")).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    let mut strange = status("1");
    strange.device_name = "toaster".to_owned();
    assert_eq!(manager.report_device_status(strange).await.unwrap_err().code(), tonic::Code::NotFound);
    let state = |state: &str| ReportDeviceStatesRequest {
        device_name: "boiler".to_owned(),
        device_namespace: "ns".to_owned(),
        state: state.to_owned(),
    };
    manager.report_device_states(state("ok")).await.unwrap();
    assert!(matches!(changes.recv().await.unwrap(), Change::Value { value: Some(value), .. } if &*value == "21.5"));
    assert!(matches!(changes.recv().await.unwrap(), Change::State { state: State::Online, .. }));
    // No link: nothing is written.
    assert!(bed.store.all_reports(0, 1 << 20).await.unwrap().is_empty());
    bed.link.send_replace(LinkState::Online {
        since: jiff::Timestamp::UNIX_EPOCH,
        epoch: 1,
        transport: crate::link::Transport::Quic,
    });
    let mut reports = Vec::new();
    while reports.is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
        reports = bed.store.all_reports(0, 1 << 20).await.unwrap();
    }
    assert_eq!((reports[0].name.as_str(), reports[0].uid.as_str()), ("boiler", "u1"));
    let report: DeviceReport = serde_json::from_slice(&reports[0].payload).unwrap();
    assert_eq!(report.status.twins[0].reported.as_ref().unwrap().value, "21.5");

    let (code, listed) = bed.ask(Method::GET, "/devices?namespace=ns", Json::Null).await;
    assert_eq!((code, &listed["devices"][0]["name"]), (200, &json!("boiler")));
    let (_, twin) = bed.ask(Method::GET, "/devices/ns/boiler", Json::Null).await;
    assert_eq!(twin["properties"][0]["reported"]["value"], "21.5");
    let (_, history) = bed.ask(Method::GET, "/devices/ns/boiler/properties/temp/history", Json::Null).await;
    assert_eq!(history["samples"][0]["value"], "21.5");
    let (_, latest) = bed.ask(Method::GET, "/devices/values?follow=false&property=temp", Json::Null).await;
    assert_eq!(latest["value"], "21.5");
    let (_, metrics) = bed.ask(Method::GET, "/metrics/devices", Json::Null).await;
    assert!(
        metrics
            .as_str()
            .unwrap()
            .contains("device_property_value{namespace=\"ns\",device=\"boiler\",property=\"temp\"} 21.5 ")
    );
    let temp = "/devices/ns/boiler/properties/temp";
    let (code, written) = bed.ask(Method::PUT, temp, json!({ "value": "30" })).await;
    assert_eq!((code, &written["desired"]["origin"]), (200, &json!("http")));
    for (method, path, body, code) in [
        (Method::PUT, temp, json!({ "value": "300" }), 422),
        (Method::PUT, temp, json!({ "value": 3 }), 400),
        (Method::PUT, temp, json!({ "value": "3", "origin": "cloud" }), 400),
        (Method::PUT, "/devices/ns/boiler/properties/on", json!({ "value": "true" }), 422),
        (Method::GET, temp, Json::Null, 405),
        (Method::GET, "/devices/ns/none", Json::Null, 404),
        (Method::POST, "/devices/ns/boiler/methods/none", Json::Null, 404),
        (Method::POST, "/devices/ns/boiler/methods/warm", Json::Null, 503),
        (Method::POST, "/devices/ns/boiler/methods/warm", json!({ "timeoutSeconds": 1e9 }), 400),
        (Method::GET, "/devices/ns", Json::Null, 404),
    ] {
        let (answered, words) = bed.ask(method, path, body).await;
        assert_eq!(answered, code, "{path}: {words}");
    }
}

#[tokio::test]
async fn methods_are_the_mappers_or_writes_that_are_waited_for() {
    let bed = Bed::new().await;
    bed.heater().await;
    let (with, serving) = FakeMapper::start(bed.dir.path(), "a.sock", true);
    bed.register(&with).await;
    eventually("the mapper", || bed.devices.twin("ns/boiler").is_some_and(|twin| twin.ready)).await;
    let call = |arguments: &[(&str, &str)], millis| {
        let arguments: BTreeMap<_, _> =
            arguments.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        bed.devices.call("ns/boiler", "warm", arguments, Duration::from_millis(millis))
    };
    assert_eq!(call(&[], 10_000).await.unwrap()["called"], "boiler warm");
    let failed = call(&[("bad", "1")], 10_000).await.unwrap_err();
    assert_eq!(failed.to_string(), "the mapper says: the door is open");
    let failed = call(&[("far", "1")], 10_000).await.unwrap_err();
    assert_eq!(failed.to_string(), "the mapper says: the device cannot be reached");
    let wanted = || bed.devices.twin("ns/boiler").unwrap().properties[0].desired.clone().unwrap();
    assert_eq!(wanted().value, "20");
    // What a mapper wrote by a method is wanted from then on, also of one that starts anew.
    assert_eq!(call(&[("temp", "50")], 10_000).await.unwrap()["called"], "boiler warm");
    assert_eq!((wanted().value.as_str(), wanted().origin.as_str()), ("50", "method warm"));
    let told = bed.register(&with).await.device_list[0].spec.as_ref().unwrap().properties[0].desired.clone();
    assert_eq!(told.unwrap().value, "50");
    drop(serving);
    // The same mapper by another that serves no methods.
    let without = FakeMapper { methods: false, ..with.clone() };
    let _serving = without.serve();
    bed.register(&without).await;
    eventually("the other mapper", || bed.devices.0.links.client(1).is_some()).await;
    let mut manager = bed.manager().await;
    let reported = async {
        eventually("the write", || without.said("update ns/boiler 55")).await;
        manager.report_device_status(status("55")).await.unwrap();
    };
    let patient = async {
        // The old connection may be the one that is asked first.
        loop {
            match call(&[("temp", "55")], 20_000).await {
                Err(CallError::NoMapper) => tokio::time::sleep(Duration::from_millis(20)).await,
                result => return result,
            }
        }
    };
    let (results, ()) = tokio::join!(patient, reported);
    assert_eq!(results.unwrap()["temp"], "55");
    assert!(matches!(call(&[("temp", "60")], 50).await, Err(CallError::TimedOut(_))));
    assert!(matches!(call(&[], 10_000).await, Err(CallError::Arguments(_))));
    assert!(matches!(call(&[("temp", "600")], 10_000).await, Err(CallError::Arguments(_))));
}

#[tokio::test]
async fn what_is_refused_of_one_device_leaves_the_others_of_a_call() {
    let bed = Bed::new().await;
    bed.heater().await;
    eventually("the device", || bed.devices.twin("ns/boiler").is_some_and(|twin| twin.message.is_none())).await;
    let sample = |value: &str| Some(Sample { value: value.to_owned(), timestamp: Some(1) });
    let said = |device: &str, property: &str, value: &str, state: &str| extensions::DeviceReport {
        device_namespace: "ns".to_owned(),
        device_name: device.to_owned(),
        properties: vec![PropertyReport { property: property.to_owned(), reported: sample(value), written: None }],
        state: state.to_owned(),
    };
    let devices = vec![
        said("toaster", "temp", "1", "ok"),
        extensions::DeviceReport { properties: Vec::new(), ..said("boiler", "", "", "unhealthy") },
        said("boiler", "none", "1", ""),
        said("boiler", "temp", "21.5", ""),
        said("boiler", "on", "true", "asleep"),
    ];
    let report = async |devices| {
        let mut reports = DeviceReportServiceClient::new(bed.channel().await);
        let answer = reports.report(ReportRequest { devices }).await.unwrap().into_inner();
        answer.refusals.iter().map(|of| (of.device, tonic::Code::from(of.code))).collect::<Vec<_>>()
    };
    use tonic::Code::{InvalidArgument, NotFound};
    assert_eq!(report(devices).await, [(0, NotFound), (2, InvalidArgument), (4, InvalidArgument)]);
    let twin = bed.devices.twin("ns/boiler").unwrap();
    let values: Vec<_> = twin.properties.iter().map(|of| &*of.reported.as_ref().unwrap().value).collect();
    assert_eq!((values, twin.state), (vec!["21.5", "true"], State::Unhealthy));
    assert_eq!(report(vec![extensions::DeviceReport::default(); 3]).await, []);
}

#[tokio::test]
async fn whoever_floods_or_sends_ten_mebibytes_is_refused_and_holds_up_nobody() {
    let bed = Bed::new().await;
    bed.heater().await;
    eventually("the device", || bed.devices.twin("ns/boiler").is_some_and(|twin| twin.message.is_none())).await;
    let refused = bed.manager().await.report_device_status(status(&"9".repeat(10 << 20))).await.unwrap_err();
    assert!(refused.message().contains("too large"), "{refused:?}");
    eventually("it to be counted", || bed.devices.lock().counters.refused == 1).await;
    let mut floods = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let mut manager = bed.manager().await;
        floods.spawn(async move {
            let mut taken = 0_u32;
            for number in 0..50 {
                taken += u32::from(manager.report_device_status(status(&number.to_string())).await.is_ok());
            }
            taken
        });
    }
    bed.devices.write("ns/boiler", "temp", "30", "cli").await.unwrap();
    assert_eq!(bed.ask(Method::GET, "/devices/ns/boiler", Json::Null).await.0, 200);
    let taken = floods.join_all().await.into_iter().sum::<u32>();
    // A process has 32 connections; what comes on others is refused.
    assert!((50 * 20..50 * 40).contains(&taken), "{taken} reports were taken");
    assert_eq!(bed.devices.lock().counters.values, u64::from(taken));
}

#[tokio::test]
async fn a_mapper_is_not_heard_on_a_device_that_is_not_its_own() {
    let bed = Bed::new().await;
    bed.heater().await;
    let (mapper, _serving) = FakeMapper::start(bed.dir.path(), "a.sock", false);
    // Nothing is known of this process before it registers, and its device speaks modbus.
    eventually("the device", || bed.devices.twin("ns/boiler").is_some_and(|twin| twin.message.is_none())).await;
    bed.manager().await.report_device_status(status("1")).await.unwrap();
    let info = MapperInfo {
        name: "stranger".to_owned(),
        protocol: "opcua".to_owned(),
        address: mapper.path.to_str().unwrap().as_bytes().to_vec(),
        ..MapperInfo::default()
    };
    let request = MapperRegisterRequest { with_data: true, mapper: Some(info) };
    bed.manager().await.mapper_register(request).await.unwrap();
    let refused = bed.manager().await.report_device_status(status("2")).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused:?}");
}

#[tokio::test]
async fn a_process_that_has_all_its_connections_gets_no_more_until_one_ends() {
    let bed = Bed::new().await;
    bed.heater().await;
    eventually("the device", || bed.devices.twin("ns/boiler").is_some_and(|twin| twin.message.is_none())).await;
    let path = bed.dir.path().join("dmi.sock");
    eventually("the socket", || path.exists()).await;
    let mut held = Vec::new();
    for _ in 0..32 {
        held.push(tokio::net::UnixStream::connect(&path).await.unwrap());
    }
    let mut more = tokio::net::UnixStream::connect(&path).await.unwrap();
    assert_eq!(more.read(&mut [0; 1]).await.unwrap(), 0, "it is open");
    assert_eq!(bed.devices.lock().counters.refused_connections, 1);
    held.pop();
    // Its end is noticed a moment later.
    for _ in 0..100 {
        if bed.manager().await.report_device_status(status("1")).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("no connection is taken any more");
}
