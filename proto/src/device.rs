//! Devices as the apiserver has them, `devices.kubeedge.io/v1beta1`: DeviceModel, Device and DeviceStatus, with KubeEdge's field tree, so
//! that its manifests carry over. Values are text, as in the API; their types are the model's.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use self::stamp::{AHEAD, NANOSECONDS, cycle, stamp};
pub use self::value::{Domain, MAX_VALUE, Unfit};

mod stamp;
mod value;

/// The API group.
pub const GROUP: &str = "devices.kubeedge.io";
/// The version of it that is served.
pub const VERSION: &str = "v1beta1";

/// Spec of a DeviceModel: what devices of a kind can do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DeviceModelSpec {
    /// What can be read or written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub properties: Vec<ModelProperty>,
    /// The protocol such devices speak.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub protocol: String,
    /// Defaults for what a Device leaves out of `protocol.configData`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol_config_data: Option<Map<String, Value>>,
}

/// One property of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ModelProperty {
    /// Unique in the model.
    #[serde(default)]
    pub name: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// What its values are.
    #[serde(default, rename = "type")]
    pub kind: PropertyType,
    /// Whether it can be written.
    #[serde(default)]
    pub access_mode: AccessMode,
    /// The least value, of a number; empty: none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub minimum: String,
    /// The greatest value, of a number; empty: none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub maximum: String,
    /// Such as `°C`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unit: String,
    /// Default for what a Device leaves out of the property's `visitors`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub visitors: Option<ProtocolConfig>,
}

/// What the values of a property are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "UPPERCASE")]
pub enum PropertyType {
    /// A whole number of 64 bits.
    Int,
    /// A number of 32 bits.
    Float,
    /// A number of 64 bits.
    Double,
    /// Text.
    #[default]
    String,
    /// `true` or `false`.
    Boolean,
    /// Bytes, in base64.
    Bytes,
    /// Something that is no value: a video.
    Stream,
}

/// Whether a property can be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum AccessMode {
    /// It can.
    ReadWrite,
    /// It cannot.
    #[default]
    ReadOnly,
}

/// Spec of a Device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DeviceSpec {
    /// The DeviceModel, in the same namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_model_ref: Option<ModelReference>,
    /// The node whose mappers reach it; empty: nobody's yet.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node_name: String,
    /// How each property is reached, and what it should be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub properties: Vec<DeviceProperty>,
    /// How the device is reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<ProtocolConfig>,
    /// What it can be told to do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<DeviceMethod>,
    /// How its state is reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_report: Option<StateReport>,
}

/// A DeviceModel by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ModelReference {
    /// Its name.
    #[serde(default)]
    pub name: String,
}

/// How often a device's state goes to the cloud.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct StateReport {
    /// Whether it goes at all.
    #[serde(default)]
    pub report_to_cloud: bool,
    /// Milliseconds; 0: the default.
    #[serde(default)]
    pub report_cycle: i64,
}

/// One property of a device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DeviceProperty {
    /// That of the model.
    #[serde(default)]
    pub name: String,
    /// What it should be; none or an empty value without metadata: whatever it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired: Option<TwinProperty>,
    /// How it is reached: the mapper's keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub visitors: Option<ProtocolConfig>,
    /// Milliseconds between reports to the cloud; 0: the default, 60 s.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub report_cycle: i64,
    /// Milliseconds between reads; 0: the mapper's default, 1 s.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub collect_cycle: i64,
    /// Whether its latest value goes into the DeviceStatus.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub report_to_cloud: bool,
    /// Where its values go besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub push_method: Option<PushMethod>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// The name of a protocol and what it needs to know: of a device, or of one property.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ProtocolConfig {
    /// `modbus`, `opcua`, …
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub protocol_name: String,
    /// The mapper's keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_data: Option<Map<String, Value>>,
}

/// A method of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DeviceMethod {
    /// Unique in the device.
    #[serde(default)]
    pub name: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// What it writes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub property_names: Vec<String>,
}

/// Where the values of a property go besides DeviceStatus.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct PushMethod {
    /// POST.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<PushHttp>,
    /// PUBLISH.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mqtt: Option<PushMqtt>,
    /// OTLP over HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub otel: Option<PushOtel>,
    /// A database.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub db_method: Option<DbMethod>,
    /// Passed on to the mapper as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anomaly_detection: Option<Map<String, Value>>,
    /// A file on the node. Not in KubeEdge's tree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PushFile>,
}

/// A file of JSON lines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct PushFile {
    /// Where: absolute, as the mapper sees it.
    pub path: String,
    /// The most it and the one before it have together, bytes; 0: 16 MiB.
    pub max_bytes: i64,
}

/// `http://hostName:port/requestPath`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct PushHttp {
    /// With or without `http://`.
    pub host_name: String,
    /// TCP port.
    pub port: i64,
    /// Path.
    pub request_path: String,
    /// Milliseconds.
    pub timeout: i64,
}

/// A broker and a topic.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct PushMqtt {
    /// `mqtt://127.0.0.1:1883`.
    pub address: String,
    /// The topic.
    pub topic: String,
    /// 0, 1 or 2.
    #[serde(rename = "qos")]
    pub qos: i32,
    /// Whether the broker keeps the last one.
    pub retained: bool,
}

/// An OTLP collector.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct PushOtel {
    /// `https://localhost:4318/v1/metrics`.
    #[serde(rename = "endpointURL")]
    pub endpoint_url: String,
}

/// A database, by kind. Skerry's own mappers write to InfluxDB; the others are passed on to mappers that know them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct DbMethod {
    /// InfluxDB 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub influxdb2: Option<Influxdb2>,
    /// Redis.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redis: Option<Redis>,
    /// TDengine.
    #[serde(rename = "TDEngine", skip_serializing_if = "Option::is_none")]
    pub tdengine: Option<TdEngine>,
    /// MySQL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mysql: Option<MySql>,
}

/// Where and as what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Influxdb2 {
    /// Where.
    #[serde(rename = "influxdb2ClientConfig")]
    pub client: Influxdb2Client,
    /// As what.
    #[serde(rename = "influxdb2DataConfig")]
    pub data: Influxdb2Data,
}

/// An InfluxDB's bucket. The token comes from the mapper's environment, `TOKEN`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Influxdb2Client {
    /// `http://127.0.0.1:8086`.
    pub url: String,
    /// Organisation.
    pub org: String,
    /// Bucket.
    pub bucket: String,
}

/// A point of line protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct Influxdb2Data {
    /// Measurement.
    pub measurement: String,
    /// Tags.
    pub tag: BTreeMap<String, String>,
    /// Name of the field that is the value.
    pub field_key: String,
}

/// A Redis.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Redis {
    /// Where.
    #[serde(rename = "redisClientConfig")]
    pub client: RedisClient,
}

/// A Redis.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct RedisClient {
    /// Host and port.
    pub addr: String,
    /// Number of the database.
    pub db: i32,
    /// Connections.
    pub poolsize: i32,
    /// Connections kept.
    pub min_idle_conns: i32,
}

/// A TDengine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct TdEngine {
    /// Where.
    #[serde(rename = "TDEngineClientConfig")]
    pub client: TdEngineClient,
}

/// A TDengine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct TdEngineClient {
    /// Host and port.
    pub addr: String,
    /// The database.
    pub db_name: String,
}

/// A MySQL.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct MySql {
    /// Where.
    #[serde(rename = "mysqlClientConfig")]
    pub client: MySqlClient,
}

/// A MySQL.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct MySqlClient {
    /// Host and port.
    pub addr: String,
    /// The database.
    pub database: String,
    /// The user. The password comes from the mapper's environment, `PASSWORD`.
    pub user_name: String,
}

/// `status` of a DeviceStatus, which has the name of its Device and is owned by it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct DeviceStatusStatus {
    /// One for each property that has anything to say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub twins: Vec<Twin>,
    /// `online`, `ok`, `offline`, `unhealthy`, `unknown` or `disconnected`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub state: String,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub last_online_time: String,
    /// What else there is to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extensions: Option<Map<String, Value>>,
}

/// One property, as it is and as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Twin {
    /// The property.
    #[serde(default)]
    pub property_name: String,
    /// What was read last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported: Option<TwinProperty>,
    /// The desired value that the mapper has written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_desired: Option<TwinProperty>,
}

/// A value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TwinProperty {
    /// As text.
    #[serde(default)]
    pub value: String,
    /// `timestamp` (milliseconds since the Unix epoch: when it was sampled or wanted), `type`, and whatever a mapper adds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// Payload of a device status report: what its DeviceStatus is to show.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// The whole of it.
    pub status: DeviceStatusStatus,
}
