//! Devices and models of the API as the device mapper interface has them, with KubeEdge's habits, for mappers that were written to them.
//!
//! What a Device leaves out of its configuration is its model's. Messages inside are never left out, since mappers look into them without
//! looking for them. A number that is whole travels as Int64Value, any other as FloatValue: KubeEdge's mappers know no DoubleValue, and
//! refuse the device for it.

use std::collections::HashMap;

use prost::Message as _;
use prost_types::Any;
use serde_json::{Map, Value};
use skerry_proto::device::{
    AccessMode, DbMethod, DeviceModelSpec, DeviceProperty, DeviceSpec, PropertyType, ProtocolConfig, PushMethod,
};
use skerry_proto::dmi;

/// What the model adds to a device: protocol and visitors where the device is silent.
pub(crate) fn with_model(mut spec: DeviceSpec, model: &DeviceModelSpec) -> DeviceSpec {
    let protocol = spec.protocol.get_or_insert_default();
    if protocol.protocol_name.is_empty() {
        protocol.protocol_name.clone_from(&model.protocol);
    }
    merge(&mut protocol.config_data, model.protocol_config_data.as_ref());
    for property in &mut spec.properties {
        let defaults = model.properties.iter().find(|of| of.name == property.name).and_then(|of| of.visitors.as_ref());
        let visitors = property.visitors.get_or_insert_default();
        if let Some(defaults) = defaults {
            if visitors.protocol_name.is_empty() {
                visitors.protocol_name.clone_from(&defaults.protocol_name);
            }
            merge(&mut visitors.config_data, defaults.config_data.as_ref());
        }
    }
    spec
}

fn merge(own: &mut Option<Map<String, Value>>, defaults: Option<&Map<String, Value>>) {
    let Some(defaults) = defaults else { return };
    let own = own.get_or_insert_default();
    for (key, value) in defaults {
        if !own.contains_key(key) {
            own.insert(key.clone(), value.clone());
        }
    }
}

/// A value that is wanted, as a mapper is told.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) property: String,
    pub(crate) value: String,
    /// Milliseconds since the Unix epoch. None: the cloud gives no time.
    pub(crate) at: Option<i64>,
}

/// A device as mappers are told of it; what is wanted is `desired`, whatever the spec says.
pub(crate) fn device(key: &str, spec: DeviceSpec, model: &DeviceModelSpec, desired: &[Wanted]) -> dmi::Device {
    let (namespace, name) = key.split_once('/').unwrap_or_default();
    let spec = with_model(spec, model);
    let report = spec.state_report.clone().unwrap_or_default();
    let protocol = spec.protocol.unwrap_or_default();
    let property = |property: DeviceProperty| {
        let wanted = desired.iter().find(|wanted| wanted.property == property.name);
        let kind = model.properties.iter().find(|of| of.name == property.name).map_or("", |of| type_name(of.kind));
        self::property(property, wanted, kind)
    };
    dmi::Device {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        spec: Some(dmi::DeviceSpec {
            device_model_reference: spec.device_model_ref.map(|model| model.name).unwrap_or_default(),
            protocol: Some(dmi::ProtocolConfig {
                protocol_name: protocol.protocol_name,
                config_data: Some(config(protocol.config_data)),
            }),
            properties: spec.properties.into_iter().map(property).collect(),
            methods: spec
                .methods
                .into_iter()
                .map(|method| dmi::DeviceMethod {
                    name: method.name,
                    description: method.description,
                    property_names: method.property_names,
                })
                .collect(),
        }),
        status: Some(dmi::DeviceStatus {
            twins: Vec::new(),
            report_to_cloud: report.report_to_cloud,
            report_cycle: report.report_cycle,
        }),
    }
}

fn property(property: DeviceProperty, wanted: Option<&Wanted>, kind: &str) -> dmi::DeviceProperty {
    let mut desired = dmi::TwinProperty::default();
    if let Some(wanted) = wanted {
        desired.value.clone_from(&wanted.value);
        if let Some(at) = wanted.at {
            desired.metadata.insert("timestamp".to_owned(), at.to_string());
        }
        desired.metadata.insert("type".to_owned(), kind.to_owned());
    }
    let ProtocolConfig { protocol_name, config_data } = property.visitors.unwrap_or_default();
    dmi::DeviceProperty {
        name: property.name,
        desired: Some(desired),
        visitors: Some(dmi::VisitorConfig { protocol_name, config_data: Some(config(config_data)) }),
        report_cycle: property.report_cycle,
        collect_cycle: property.collect_cycle,
        report_to_cloud: property.report_to_cloud,
        push_method: property.push_method.map(push_method),
    }
}

/// A model as mappers are told of it.
pub(crate) fn model(key: &str, spec: &DeviceModelSpec) -> dmi::DeviceModel {
    let (namespace, name) = key.split_once('/').unwrap_or_default();
    let properties = spec.properties.iter().map(|property| dmi::ModelProperty {
        name: property.name.clone(),
        description: property.description.clone(),
        r#type: type_name(property.kind).to_owned(),
        access_mode: match property.access_mode {
            AccessMode::ReadWrite => "ReadWrite",
            AccessMode::ReadOnly => "ReadOnly",
        }
        .to_owned(),
        minimum: property.minimum.clone(),
        maximum: property.maximum.clone(),
        unit: property.unit.clone(),
    });
    dmi::DeviceModel {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        spec: Some(dmi::DeviceModelSpec { properties: properties.collect(), commands: Vec::new() }),
    }
}

/// As the API has it.
pub(crate) fn type_name(kind: PropertyType) -> &'static str {
    match kind {
        PropertyType::Int => "INT",
        PropertyType::Float => "FLOAT",
        PropertyType::Double => "DOUBLE",
        PropertyType::String => "STRING",
        PropertyType::Boolean => "BOOLEAN",
        PropertyType::Bytes => "BYTES",
        PropertyType::Stream => "STREAM",
    }
}

fn config(data: Option<Map<String, Value>>) -> dmi::CustomizedValue {
    dmi::CustomizedValue { data: anys(data) }
}

fn anys(data: Option<Map<String, Value>>) -> HashMap<String, Any> {
    data.unwrap_or_default().into_iter().filter_map(|(key, value)| Some((key, any(&value)?))).collect()
}

/// A value in a wrapper of protobuf's; `null` is none.
fn any(value: &Value) -> Option<Any> {
    let (name, value) = match value {
        Value::Null => return None,
        Value::Bool(value) => ("Bool", value.encode_to_vec()),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => ("Int64", whole.encode_to_vec()),
            #[expect(clippy::cast_possible_truncation, reason = "there is no wider one that mappers know")]
            (None, number) => ("Float", (number.unwrap_or_default() as f32).encode_to_vec()),
        },
        Value::String(text) => ("String", text.encode_to_vec()),
        Value::Array(_) | Value::Object(_) => ("String", value.to_string().encode_to_vec()),
    };
    Some(Any { type_url: format!("type.googleapis.com/google.protobuf.{name}Value"), value })
}

fn push_method(push: PushMethod) -> dmi::PushMethod {
    dmi::PushMethod {
        http: push.http.map(|http| dmi::PushMethodHttp {
            hostname: http.host_name,
            port: http.port,
            requestpath: http.request_path,
            timeout: http.timeout,
        }),
        mqtt: push.mqtt.map(|mqtt| dmi::PushMethodMqtt {
            address: mqtt.address,
            topic: mqtt.topic,
            qos: mqtt.qos,
            retained: mqtt.retained,
        }),
        db_method: push.db_method.map(db_method),
        otel: push.otel.map(|otel| dmi::PushMethodOtel { endpoint_url: otel.endpoint_url }),
        anomaly_detection: push.anomaly_detection.map(|data| dmi::AnomalyDetection { data: anys(Some(data)) }),
        file: push.file.map(|file| dmi::PushMethodFile { path: file.path, max_bytes: file.max_bytes }),
    }
}

fn db_method(db: DbMethod) -> dmi::DbMethod {
    dmi::DbMethod {
        influxdb2: db.influxdb2.map(|influx| dmi::DbMethodInfluxdb2 {
            influxdb2_client_config: Some(dmi::Influxdb2ClientConfig {
                url: influx.client.url,
                org: influx.client.org,
                bucket: influx.client.bucket,
            }),
            influxdb2_data_config: Some(dmi::Influxdb2DataConfig {
                measurement: influx.data.measurement,
                tag: influx.data.tag.into_iter().collect(),
                field_key: influx.data.field_key,
            }),
        }),
        redis: db.redis.map(|redis| dmi::DbMethodRedis {
            redis_client_config: Some(dmi::RedisClientConfig {
                addr: redis.client.addr,
                db: redis.client.db,
                poolsize: redis.client.poolsize,
                min_idle_conns: redis.client.min_idle_conns,
            }),
        }),
        tdengine: db.tdengine.map(|engine| dmi::DbMethodTdEngine {
            td_engine_client_config: Some(dmi::TdEngineClientConfig {
                addr: engine.client.addr,
                dbname: engine.client.db_name,
            }),
        }),
        mysql: db.mysql.map(|mysql| dmi::DbMethodMySql {
            mysql_client_config: Some(dmi::MySqlClientConfig {
                addr: mysql.client.addr,
                database: mysql.client.database,
                user_name: mysql.client.user_name,
            }),
        }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_wrapped_as_mappers_of_kubeedge_unwrap_them() {
        let data = json!({ "slaveID": 1, "scale": 0.1, "swap": true, "port": "/dev/ttyS0", "none": null, "list": [1, "a"], "big": u64::MAX });
        let Value::Object(data) = data else { unreachable!() };
        let wrapped = config(Some(data)).data;
        let of = |key: &str| (wrapped[key].type_url.rsplit('.').next().unwrap(), wrapped[key].value.as_slice());
        assert_eq!(wrapped["slaveID"].type_url, "type.googleapis.com/google.protobuf.Int64Value");
        assert_eq!(of("slaveID"), ("Int64Value", &[8, 1][..]));
        assert_eq!(of("scale"), ("FloatValue", &[&[13][..], &0.1_f32.to_le_bytes()].concat()[..]));
        assert_eq!(of("swap"), ("BoolValue", &[8, 1][..]));
        assert_eq!(of("port"), ("StringValue", &b"\x0a\x0a/dev/ttyS0"[..]));
        assert_eq!(of("list"), ("StringValue", &b"\x0a\x07[1,\"a\"]"[..]));
        assert_eq!(of("big").0, "FloatValue");
        assert!(!wrapped.contains_key("none"));
    }

    #[test]
    fn a_device_takes_from_its_model_what_it_leaves_out_and_lacks_no_message() {
        let model: DeviceModelSpec = serde_json::from_value(json!({
            "protocol": "modbus", "protocolConfigData": { "baud": 9600, "parity": "even" },
            "properties": [{ "name": "t", "type": "FLOAT", "accessMode": "ReadWrite",
                "visitors": { "protocolName": "modbus", "configData": { "register": "Holding", "offset": 1 } } }] }))
        .unwrap();
        let spec: DeviceSpec = serde_json::from_value(json!({
            "deviceModelRef": { "name": "m" }, "protocol": { "configData": { "parity": "odd" } },
            "properties": [{ "name": "t", "collectCycle": 500, "desired": { "value": "7" }, "visitors": { "configData": { "offset": 2 } } }, { "name": "u" }] }))
        .unwrap();
        let wanted = [Wanted { property: "t".to_owned(), value: "21.5".to_owned(), at: Some(1000) }];
        let device = device("shop/boiler", spec, &model, &wanted);
        assert_eq!((device.namespace.as_str(), device.name.as_str()), ("shop", "boiler"));
        let spec = device.spec.unwrap();
        let protocol = spec.protocol.unwrap();
        assert_eq!(protocol.protocol_name, "modbus");
        let protocol = protocol.config_data.unwrap().data;
        assert_eq!((protocol.len(), &protocol["parity"].value[..]), (2, &b"\x0a\x03odd"[..]));
        let desired = spec.properties[0].desired.clone().unwrap();
        assert_eq!((desired.value.as_str(), desired.metadata["timestamp"].as_str()), ("21.5", "1000"));
        assert_eq!(desired.metadata["type"], "FLOAT");
        let visitors = spec.properties[0].visitors.clone().unwrap();
        assert_eq!((visitors.protocol_name.as_str(), visitors.config_data.unwrap().data.len()), ("modbus", 2));
        assert!(
            spec.properties[1].visitors.clone().unwrap().config_data.is_some() && spec.properties[1].desired.is_some()
        );
        assert!(device.status.is_some());
    }
}
