//! For the tests of mappers: a stand-in for edgecore's side of the interface, a mapper's process, and a simulator's process.
//!
//! The stand-in takes registrations and keeps what is reported; it is no edgecore.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use prost::Message as _;
use serde_json::Value;
use skerry_proto::dmi;
use skerry_proto::dmi::device_manager_service_server::{DeviceManagerService, DeviceManagerServiceServer};
use skerry_proto::dmi::device_mapper_service_client::DeviceMapperServiceClient;
use skerry_proto::dmi::extensions::device_method_service_client::DeviceMethodServiceClient;
use skerry_proto::dmi::extensions::device_report_service_server::{DeviceReportService, DeviceReportServiceServer};
use skerry_proto::dmi::extensions::{CallRequest, Refusal, ReportRequest, ReportResponse};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::oneshot;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use crate::clock;
use crate::report::twin_property;

/// What the stand-in knows.
#[derive(Default)]
pub struct Seen {
    pub models: Vec<dmi::DeviceModel>,
    pub devices: Vec<dmi::Device>,
    pub mapper: Option<dmi::MapperInfo>,
    pub registrations: u32,
    /// By device and property: the latest.
    pub twins: HashMap<(String, String), dmi::Twin>,
    /// By device: all, in order.
    pub states: HashMap<String, Vec<String>>,
    pub reports: u64,
    pub values: u64,
    /// As an edgecore that takes what each device says by itself.
    pub apart: bool,
    /// Registrations are answered with nothing of what there is, and that this is not all.
    pub partial: bool,
}

impl Seen {
    fn value(&mut self, device: &str, twin: dmi::Twin) {
        self.values += u64::from(twin.reported.is_some());
        let latest = self.twins.entry((device.to_owned(), twin.property_name.clone())).or_default();
        latest.property_name = twin.property_name;
        latest.reported = twin.reported.or_else(|| latest.reported.take());
        latest.observed_desired = twin.observed_desired.or_else(|| latest.observed_desired.take());
    }
}

/// The stand-in for edgecore.
pub struct Edge {
    pub socket: PathBuf,
    pub seen: Arc<Mutex<Seen>>,
    server: Option<(oneshot::Sender<()>, std::thread::JoinHandle<()>)>,
}

struct Manager(Arc<Mutex<Seen>>);

#[tonic::async_trait]
impl DeviceManagerService for Manager {
    async fn mapper_register(
        &self,
        request: Request<dmi::MapperRegisterRequest>,
    ) -> Result<Response<dmi::MapperRegisterResponse>, Status> {
        let mut seen = self.0.lock().unwrap();
        seen.mapper = request.into_inner().mapper;
        seen.registrations += 1;
        if seen.partial {
            let mut answer = Response::new(dmi::MapperRegisterResponse::default());
            answer.metadata_mut().insert(skerry_proto::PARTIAL, tonic::metadata::MetadataValue::from_static("true"));
            return Ok(answer);
        }
        Ok(Response::new(dmi::MapperRegisterResponse {
            model_list: seen.models.clone(),
            device_list: seen.devices.clone(),
        }))
    }

    async fn report_device_status(
        &self,
        request: Request<dmi::ReportDeviceStatusRequest>,
    ) -> Result<Response<dmi::ReportDeviceStatusResponse>, Status> {
        let request = request.into_inner();
        let mut seen = self.0.lock().unwrap();
        seen.reports += 1;
        for twin in request.reported_device.unwrap_or_default().twins {
            seen.value(&request.device_name, twin);
        }
        Ok(Response::new(dmi::ReportDeviceStatusResponse {}))
    }

    async fn report_device_states(
        &self,
        request: Request<dmi::ReportDeviceStatesRequest>,
    ) -> Result<Response<dmi::ReportDeviceStatesResponse>, Status> {
        let request = request.into_inner();
        self.0.lock().unwrap().states.entry(request.device_name).or_default().push(request.state);
        Ok(Response::new(dmi::ReportDeviceStatesResponse {}))
    }
}

#[tonic::async_trait]
impl DeviceReportService for Manager {
    async fn report(&self, request: Request<ReportRequest>) -> Result<Response<ReportResponse>, Status> {
        let mut seen = self.0.lock().unwrap();
        if seen.apart {
            return Err(Status::unimplemented("as an older edgecore"));
        }
        let mut refusals = Vec::new();
        for (place, device) in (0..).zip(request.into_inner().devices) {
            if !seen.devices.iter().any(|known| known.name == device.device_name) {
                let (code, message) = (tonic::Code::NotFound.into(), "there is no such device".to_owned());
                refusals.push(Refusal { device: place, code, message });
                continue;
            }
            seen.reports += 1;
            for of in device.properties {
                let twin = dmi::Twin {
                    property_name: of.property,
                    reported: of.reported.map(twin_property),
                    observed_desired: of.written.map(twin_property),
                };
                seen.value(&device.device_name, twin);
            }
            if !device.state.is_empty() {
                seen.states.entry(device.device_name).or_default().push(device.state);
            }
        }
        Ok(Response::new(ReportResponse { refusals }))
    }
}

impl Edge {
    /// Listens in a directory.
    pub fn start(directory: &Path, models: Vec<dmi::DeviceModel>, devices: Vec<dmi::Device>) -> Self {
        let seen = Arc::new(Mutex::new(Seen { models, devices, ..Seen::default() }));
        let mut edge = Self { socket: directory.join("dmi.sock"), seen, server: None };
        edge.restart();
        edge
    }

    /// Ends, as if the process had, unless it did, and starts again with what it knew.
    pub fn restart(&mut self) {
        self.stop();
        let listener = std::os::unix::net::UnixListener::bind(&self.socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let manager = DeviceManagerServiceServer::new(Manager(Arc::clone(&self.seen)));
        let reports = DeviceReportServiceServer::new(Manager(Arc::clone(&self.seen)));
        let (stop, stopped) = oneshot::channel();
        // A runtime of its own, so that its connections end with it.
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = UnixListener::from_std(listener).unwrap();
                let incoming = futures_util::stream::unfold(listener, |listener| async {
                    Some((listener.accept().await.map(|(stream, _)| stream), listener))
                });
                let mut server = tonic::transport::Server::builder();
                let served = server.add_service(manager).add_service(reports).serve_with_incoming(incoming);
                tokio::select! {
                    _ = served => {}
                    _ = stopped => {}
                }
            });
        });
        self.server = Some((stop, thread));
    }

    /// Ends, as if the process had.
    pub fn stop(&mut self) {
        if let Some((stop, thread)) = self.server.take() {
            drop(stop);
            thread.join().unwrap();
        }
        let _ = std::fs::remove_file(&self.socket);
    }

    async fn channel(&self) -> Channel {
        let address = self.seen.lock().unwrap().mapper.clone().expect("a mapper registered").address;
        let path = PathBuf::from(String::from_utf8(address).unwrap());
        Endpoint::from_static("http://localhost")
            .connect_with_connector(tower::service_fn(move |_: hyper::Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .unwrap()
    }

    /// The mapper's service.
    pub async fn mapper(&self) -> DeviceMapperServiceClient<Channel> {
        DeviceMapperServiceClient::new(self.channel().await)
    }

    /// Calls a method of a device.
    pub async fn call(
        &self,
        device: &str,
        method: &str,
        arguments: &[(&str, &str)],
    ) -> Result<HashMap<String, String>, Status> {
        let request = CallRequest {
            device_namespace: "default".to_owned(),
            device_name: device.to_owned(),
            method: method.to_owned(),
            arguments: arguments.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        };
        let answer = DeviceMethodServiceClient::new(self.channel().await).call(request).await?;
        Ok(answer.into_inner().results)
    }

    /// Changes a device here, and tells the mapper.
    pub async fn update(&self, device: dmi::Device) {
        {
            let mut seen = self.seen.lock().unwrap();
            seen.devices.retain(|known| known.name != device.name);
            seen.devices.push(device.clone());
        }
        self.mapper().await.update_device(dmi::UpdateDeviceRequest { device: Some(device) }).await.unwrap();
    }

    /// The value that was reported last.
    pub fn value(&self, device: &str, property: &str) -> Option<String> {
        let seen = self.seen.lock().unwrap();
        seen.twins.get(&(device.to_owned(), property.to_owned()))?.reported.as_ref().map(|twin| twin.value.clone())
    }

    /// The desired value that was written last.
    pub fn written(&self, device: &str, property: &str) -> Option<String> {
        let seen = self.seen.lock().unwrap();
        let twin = seen.twins.get(&(device.to_owned(), property.to_owned()))?;
        twin.observed_desired.as_ref().map(|twin| twin.value.clone())
    }

    /// The state that was reported last.
    pub fn state(&self, device: &str) -> Option<String> {
        self.seen.lock().unwrap().states.get(device)?.last().cloned()
    }

    /// Waits until a value is reported.
    pub async fn reads(&self, device: &str, property: &str, value: &str) {
        let what = format!("{device}'s {property} reads {value}");
        eventually(
            &what,
            || self.value(device, property).as_deref() == Some(value),
            || format!("{:?}", self.value(device, property)),
        )
        .await;
    }

    /// Waits until a state is reported.
    pub async fn is(&self, device: &str, state: &str) {
        eventually(
            &format!("{device} is {state}"),
            || self.state(device).as_deref() == Some(state),
            || format!("{:?}", self.state(device)),
        )
        .await;
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Waits until something is so; after 30 s, says what is instead.
pub async fn eventually(what: &str, so: impl Fn() -> bool, instead: impl Fn() -> String) {
    let begin = clock::monotonic();
    while !so() {
        assert!(
            clock::monotonic() - begin < Duration::from_secs(30),
            "not within 30 s: {what}; instead: {}",
            instead()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A process that ends with the test.
pub struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    /// What it said first.
    pub ready: String,
}

impl Process {
    /// A mapper's.
    pub fn mapper(binary: &str, edge: &Edge, arguments: &[&str]) -> Self {
        let directory = edge.socket.parent().unwrap();
        let mut command = Command::new(binary);
        command.arg("--dmi-socket").arg(&edge.socket).arg("--store").arg(directory.join("store")).args(arguments);
        Self { child: command.kill_on_drop(true).spawn().unwrap(), stdin: None, ready: String::new() }
    }

    /// A simulator's, in Python, in the environment that `scripts/install-deps` makes; ready when it has said its first line.
    pub async fn python(script: &str, arguments: &[&str]) -> Self {
        let cache = std::env::var("SKERRY_CACHE")
            .unwrap_or_else(|_| format!("{}/.cache/skerry", std::env::var("HOME").unwrap()));
        let python = format!("{cache}/venv/bin/python");
        assert!(Path::new(&python).exists(), "{python} is missing: run scripts/install-deps");
        Self::start(Command::new(python).arg(script).args(arguments)).await
    }

    /// Any that says a line when it is ready.
    pub async fn start(command: &mut Command) -> Self {
        let mut child = command.kill_on_drop(true).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = tokio::time::timeout(Duration::from_secs(60), lines.next_line()).await;
        let ready = ready.expect("ready within a minute").unwrap().expect("it says that it is ready");
        let stdin = child.stdin.take();
        Self { child, stdin, ready }
    }

    /// Says a line to it.
    pub async fn say(&mut self, line: &str) {
        self.stdin.as_mut().unwrap().write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    /// Ends it without asking.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Asks it to end, and waits until it has.
    pub async fn terminate(&mut self) {
        let pid = self.child.id().unwrap();
        Command::new("kill").arg(pid.to_string()).status().await.unwrap();
        tokio::time::timeout(Duration::from_secs(15), self.child.wait()).await.expect("it ends").unwrap();
    }

    pub fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }
}

/// A port nobody listens on now.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A model whose properties are `(name, type)`, writable if the name of the type ends in `!`.
pub fn model(name: &str, properties: &[(&str, &str)]) -> dmi::DeviceModel {
    let properties = properties
        .iter()
        .map(|(name, kind)| dmi::ModelProperty {
            name: (*name).to_owned(),
            r#type: kind.trim_end_matches('!').to_owned(),
            access_mode: if kind.ends_with('!') { "ReadWrite" } else { "ReadOnly" }.to_owned(),
            ..dmi::ModelProperty::default()
        })
        .collect();
    let spec = Some(dmi::DeviceModelSpec { properties, commands: Vec::new() });
    dmi::DeviceModel { name: name.to_owned(), namespace: "default".to_owned(), spec }
}

/// A device of the model of the same name, from `configData`s; cycles of 100 ms.
pub fn device(name: &str, model: &str, config: &Value, properties: &[(&str, Value)]) -> dmi::Device {
    let properties = properties
        .iter()
        .map(|(name, visitor)| dmi::DeviceProperty {
            name: (*name).to_owned(),
            visitors: Some(dmi::VisitorConfig { protocol_name: String::new(), config_data: Some(pack(visitor)) }),
            collect_cycle: 100,
            report_cycle: 1000,
            report_to_cloud: true,
            ..dmi::DeviceProperty::default()
        })
        .collect();
    let spec = dmi::DeviceSpec {
        device_model_reference: model.to_owned(),
        protocol: Some(dmi::ProtocolConfig { protocol_name: String::new(), config_data: Some(pack(config)) }),
        properties,
        methods: Vec::new(),
    };
    dmi::Device { name: name.to_owned(), namespace: "default".to_owned(), spec: Some(spec), status: None }
}

/// The same device with a desired value.
pub fn desire(mut device: dmi::Device, property: &str, value: &str) -> dmi::Device {
    let metadata = BTreeMap::from([("timestamp".to_owned(), clock::wall().to_string())]);
    let desired = dmi::TwinProperty { value: value.to_owned(), metadata: metadata.into_iter().collect() };
    let properties = &mut device.spec.as_mut().unwrap().properties;
    properties.iter_mut().find(|there| there.name == property).unwrap().desired = Some(desired);
    device
}

/// A JSON object as the interface packs it.
pub fn pack(object: &Value) -> dmi::CustomizedValue {
    let any = |kind: &str, value: Vec<u8>| prost_types::Any {
        type_url: format!("type.googleapis.com/google.protobuf.{kind}"),
        value,
    };
    let data = object.as_object().unwrap().iter().map(|(key, value)| {
        let packed = match value {
            Value::String(text) => any("StringValue", text.encode_to_vec()),
            Value::Bool(truth) => any("BoolValue", truth.encode_to_vec()),
            Value::Number(number) if number.is_i64() => any("Int64Value", number.as_i64().unwrap().encode_to_vec()),
            Value::Number(number) => any("DoubleValue", number.as_f64().unwrap().encode_to_vec()),
            other => any("StringValue", other.to_string().encode_to_vec()),
        };
        (key.clone(), packed)
    });
    dmi::CustomizedValue { data: data.collect() }
}
