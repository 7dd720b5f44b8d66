//! Whether a Device fits its DeviceModel, which no rule of a CRD can look at, and what would cost a rule too much.

use skerry_proto::device::{DeviceModelSpec, DeviceProperty, DeviceSpec};

/// The longest text made of what is wrong, in bytes.
const LONGEST: usize = 1000;

/// Protocols of the mappers that ship, which push to fewer places than a Device can name. What others do is theirs.
const OURS: [&str; 5] = ["http", "modbus", "mqtt", "opcua", "virtualProtocol"];

/// What is wrong, for people; `None`: nothing.
pub(super) fn problem(device: &DeviceSpec, model: Option<&DeviceModelSpec>) -> Option<String> {
    let name = device.device_model_ref.as_ref().map_or("", |reference| &reference.name);
    let Some(model) = model else { return Some(format!("the DeviceModel {name} is not there")) };
    let mut problems = Vec::new();
    let protocol = device.protocol.as_ref().map_or("", |protocol| &protocol.protocol_name);
    if !model.protocol.is_empty() && model.protocol != protocol {
        problems.push(format!("the DeviceModel {name} is for protocol {}, not {protocol}", model.protocol));
    }
    for property in &device.properties {
        let Some(modelled) = model.properties.iter().find(|modelled| modelled.name == property.name) else {
            problems.push(format!("property {} is not in the DeviceModel {name}", property.name));
            continue;
        };
        if let Some(desired) = property.desired.as_ref().filter(|desired| !desired.value.is_empty())
            && let Err(unfit) = modelled.takes(&desired.value)
        {
            problems.push(format!("as desired, property {} {unfit}", property.name));
        }
    }
    if OURS.contains(&protocol) {
        for property in &device.properties {
            problems.extend(unserved(property).map(|sink| {
                format!(
                    "property {} is pushed to {sink}, which Skerry's mappers do not do: use mqtt, http, file or dbMethod.influxdb2",
                    property.name
                )
            }));
        }
    }
    let has = |name: &String| device.properties.iter().any(|property| property.name == *name);
    for method in &device.methods {
        let absent = method.property_names.iter().filter(|name| !has(name));
        problems.extend(
            absent.map(|name| format!("method {} names property {name}, which the device does not have", method.name)),
        );
    }
    if problems.is_empty() {
        return None;
    }
    let mut text = problems.join("; ");
    text.truncate(text.floor_char_boundary(LONGEST));
    Some(text)
}

/// Where a property is to be pushed that no mapper of Skerry's serves.
fn unserved(property: &DeviceProperty) -> impl Iterator<Item = &'static str> {
    let push = property.push_method.as_ref();
    let db = push.and_then(|push| push.db_method.as_ref());
    let sinks = [
        (push.is_some_and(|push| push.otel.is_some()), "otel"),
        (db.is_some_and(|db| db.redis.is_some()), "dbMethod.redis"),
        (db.is_some_and(|db| db.tdengine.is_some()), "dbMethod.TDEngine"),
        (db.is_some_and(|db| db.mysql.is_some()), "dbMethod.mysql"),
    ];
    sinks.into_iter().filter_map(|(is_there, sink)| is_there.then_some(sink))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn found(properties: &Value) -> Option<String> {
        let device = json!({"deviceModelRef": {"name": "m"}, "protocol": {"protocolName": "modbus"}, "properties": properties, "methods": [
            {"name": "stop", "propertyNames": ["speed", "brake"]},
        ]});
        let model = json!({"protocol": "modbus", "properties": [
            {"name": "speed", "type": "INT", "accessMode": "ReadWrite", "minimum": "0", "maximum": "100"},
            {"name": "heat", "type": "FLOAT", "accessMode": "ReadOnly"},
            {"name": "brake", "type": "BOOLEAN", "accessMode": "ReadWrite"},
        ]});
        problem(&serde_json::from_value(device).unwrap(), Some(&serde_json::from_value(model).unwrap()))
    }

    #[test]
    fn a_device_that_fits_has_no_problem() {
        let properties = json!([{"name": "speed", "desired": {"value": "7"}}, {"name": "heat", "desired": {"value": ""}}, {"name": "brake"}]);
        assert_eq!(found(&properties), None);
    }

    #[test]
    fn all_that_does_not_fit_is_named() {
        let problem = found(&json!([
            {"name": "speed", "desired": {"value": "101"}}, {"name": "heat", "desired": {"value": "1"}}, {"name": "sped"},
        ]));
        insta::assert_snapshot!(problem.unwrap(), @r#"as desired, property speed is 101, above its maximum 100; as desired, property heat cannot be written: the device model says ReadOnly; property sped is not in the DeviceModel m; method stop names property brake, which the device does not have"#);
    }

    #[test]
    fn places_that_no_mapper_pushes_to_are_named() {
        let push = json!({
            "mqtt": {"address": "tcp://h:1883", "topic": "t"}, "otel": {"endpointURL": "http://h"},
            "dbMethod": {"redis": {"redisClientConfig": {"addr": "h"}}, "influxdb2": {"influxdb2ClientConfig": {"url": "http://h"}}},
        });
        let properties = json!([{"name": "speed", "pushMethod": push}, {"name": "heat"}, {"name": "brake"}]);
        let problem = found(&properties).unwrap();
        assert!(problem.starts_with("property speed is pushed to otel, which"), "{problem}");
        assert!(
            problem.contains("; property speed is pushed to dbMethod.redis, which") && !problem.contains("to mqtt,"),
            "{problem}"
        );
        // Another mapper may do it.
        let device = json!({"protocol": {"protocolName": "lorawan"}, "properties": properties});
        let device = serde_json::from_value(device).unwrap();
        let problem = super::problem(&device, Some(&DeviceModelSpec::default())).unwrap();
        assert!(!problem.contains("pushed"), "{problem}");
    }

    #[test]
    fn a_model_that_is_missing_or_another_protocol_s_is_a_problem() {
        let device = DeviceSpec::default();
        assert!(problem(&device, None).is_some_and(|problem| problem.contains("is not there")));
        let model = DeviceModelSpec { protocol: "opcua".into(), ..DeviceModelSpec::default() };
        assert!(problem(&device, Some(&model)).is_some_and(|problem| problem.contains("opcua")));
    }

    #[test]
    fn a_text_ends_somewhere() {
        let many: Vec<Value> = (0..500).map(|number| json!({"name": format!("é{number}")})).collect();
        assert!(found(&many.into()).unwrap().len() <= LONGEST);
    }
}
