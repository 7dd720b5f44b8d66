//! Makes `deploy/devices.yaml` of the types in `skerry_proto::device`, and holds the file against them.
//!
//! What types cannot say stands here: which fields must be there, bounds, and rules in CEL (KEP-2876) for what would otherwise be found
//! on the device only. Bounds are also what lets the apiserver estimate what a rule costs.

use std::fmt::Write as _;
use std::path::PathBuf;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};
use skerry_proto::device::{DeviceModelSpec, DeviceSpec, DeviceStatusStatus, GROUP, VERSION};

use super::crds::{DEVICES_YAML, NAMES, REVISION, REVISION_ANNOTATION};

const HEADER: &str = "\
# The CRDs of devices, with KubeEdge's field tree. cloudcore installs them where there are none; to do it yourself: kubectl apply --server-side -f FILE.
# Made of proto/src/device.rs and cloudcore/src/devices/schema.rs: SKERRY_WRITE=1 cargo test -p cloudcore devices::schema
";
const CATEGORY: &str = "iot";

#[test]
fn the_file_says_what_the_types_say() {
    let file = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/devices.yaml"));
    let mut text = HEADER.to_owned();
    for definition in definitions() {
        write!(text, "---\n{}", serde_saphyr::to_string(&definition).unwrap()).unwrap();
    }
    if std::env::var_os("SKERRY_WRITE").is_some() {
        std::fs::write(&file, &text).unwrap();
        return;
    }
    assert_eq!(
        DEVICES_YAML, text,
        "run SKERRY_WRITE=1 cargo test -p cloudcore devices::schema, and raise REVISION in crds.rs if one was released since it was raised"
    );
}

#[test]
fn the_definitions_have_the_names_that_cloudcore_looks_for() {
    let names: Vec<String> =
        definitions().iter().map(|one| one["metadata"]["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, NAMES);
}

fn definitions() -> [Value; 3] {
    let model = definition(
        "DeviceModel",
        "devicemodels",
        &object(model_spec(), None, &["spec"]),
        &[column("Protocol", "string", ".spec.protocol")],
    );
    let mut device = definition(
        "Device",
        "devices",
        &object(device_spec(), Some(device_status()), &["spec"]),
        &[
            column("Node", "string", ".spec.nodeName"),
            column("Model", "string", ".spec.deviceModelRef.name"),
            column("Protocol", "string", ".spec.protocol.protocolName"),
            column("State", "string", ".status.state"),
        ],
    );
    // kubectl get devices --field-selector spec.nodeName=NODE
    device["spec"]["versions"][0]["selectableFields"] = json!([{"jsonPath": ".spec.nodeName"}]);
    let mut twins = column("Twins", "string", ".status.twins");
    twins["priority"] = 1.into();
    let mut spec = json!({"description": "Nothing; some writers put an empty one here.", "type": "object"});
    spec["x-kubernetes-preserve-unknown-fields"] = true.into();
    let status = definition(
        "DeviceStatus",
        "devicestatuses",
        &object(spec, Some(status()), &[]),
        &[
            column("Node", "string", ".status.extensions.node"),
            column("State", "string", ".status.state"),
            column("Last seen", "date", ".status.lastOnlineTime"),
            twins,
        ],
    );
    [model, device, status]
}

fn definition(kind: &str, plural: &str, schema: &Value, columns: &[Value]) -> Value {
    let mut columns = columns.to_vec();
    columns.push(column("Age", "date", ".metadata.creationTimestamp"));
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{GROUP}"), "annotations": {REVISION_ANNOTATION: REVISION.to_string()}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind, "listKind": format!("{kind}List"), "plural": plural, "singular": kind.to_lowercase(), "categories": [CATEGORY],
            },
            "versions": [{
                "name": VERSION, "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}, "additionalPrinterColumns": columns,
            }],
        },
    })
}

fn column(name: &str, kind: &str, path: &str) -> Value {
    json!({"name": name, "type": kind, "jsonPath": path})
}

/// An object; status is no subresource, as in KubeEdge: what is written for it, is.
fn object(spec: Value, status: Option<Value>, required: &[&str]) -> Value {
    let mut properties =
        json!({"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}});
    properties["spec"] = spec;
    if let Some(status) = status {
        properties["status"] = status;
    }
    let mut object = json!({"type": "object", "properties": properties});
    if !required.is_empty() {
        object["required"] = required.into();
    }
    object
}

fn model_spec() -> Value {
    let mut spec = schema::<DeviceModelSpec>();
    let is_given = |field: &str| format!("has(self.{field}) && self.{field} != ''");
    let (minimum, maximum) = (is_given("minimum"), is_given("maximum"));
    let number = json!({"maxLength": 32, "pattern": r"^(-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?)?$"});
    let rules = json!([
        rule(
            &format!("!({minimum} || {maximum}) || self.type in ['INT', 'FLOAT', 'DOUBLE']"),
            "minimum and maximum are for INT, FLOAT and DOUBLE"
        ),
        rule(
            &format!("!({minimum} && {maximum}) || double(self.minimum) <= double(self.maximum)"),
            "minimum must not be greater than maximum",
        ),
    ]);
    amend(
        &mut spec,
        &[
            ("properties", list_of("name", 1000)),
            ("properties[]", json!({"required": ["name", "type", "accessMode"], "x-kubernetes-validations": rules})),
            ("properties[].name", short()),
            ("properties[].minimum", number.clone()),
            ("properties[].maximum", number),
        ],
    );
    spec
}

fn device_spec() -> Value {
    let mut spec = schema::<DeviceSpec>();
    let named =
        |field: &str, name: &str| format!("has(self.{field}) && has(self.{field}.{name}) && self.{field}.{name} != ''");
    let rules = json!([
        rule(
            &named("protocol", "protocolName"),
            "protocol.protocolName must name a protocol, such as modbus: it says which mappers get the device",
        ),
        rule(&named("deviceModelRef", "name"), "deviceModelRef.name must name a DeviceModel of the same namespace"),
    ]);
    let cycle = json!({"minimum": 0});
    amend(
        &mut spec,
        &[
            ("", json!({"x-kubernetes-validations": rules})),
            ("nodeName", json!({"maxLength": 253})),
            ("deviceModelRef.name", json!({"maxLength": 253})),
            ("protocol.protocolName", json!({"maxLength": 128})),
            ("properties", list_of("name", 1000)),
            ("properties[]", json!({"required": ["name"]})),
            ("properties[].name", short()),
            ("properties[].desired", json!({"required": ["value"]})),
            ("properties[].reportCycle", cycle.clone()),
            ("properties[].collectCycle", cycle.clone()),
            ("properties[].pushMethod.http.port", json!({"minimum": 0, "maximum": 65535})),
            ("properties[].pushMethod.mqtt.qos", json!({"minimum": 0, "maximum": 2})),
            // Databases that are not known here are passed on as they are.
            ("properties[].pushMethod.dbMethod", json!({"x-kubernetes-preserve-unknown-fields": true})),
            ("methods", list_of("name", 100)),
            ("methods[]", json!({"required": ["name"]})),
            ("methods[].name", short()),
            ("methods[].propertyNames", json!({"maxItems": 1000})),
            ("methods[].propertyNames[]", json!({"maxLength": 128})),
            ("stateReport.reportCycle", cycle),
        ],
    );
    spec
}

fn status() -> Value {
    schema::<DeviceStatusStatus>()
}

/// What KubeEdge's manifests may have for it, up to 1.22; of it cloudcore writes the state.
fn device_status() -> Value {
    let mut status = status();
    status["description"] =
        "Only `state` is kept here, for `kubectl get devices`; the rest is in the DeviceStatus of the same name."
            .into();
    status["properties"]["reportToCloud"] = json!({"type": "boolean"});
    status["properties"]["reportCycle"] = json!({"type": "integer", "format": "int64"});
    status
}

/// A name that is there.
fn short() -> Value {
    json!({"minLength": 1, "maxLength": 128})
}

fn list_of(key: &str, most: u32) -> Value {
    json!({"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key], "maxItems": most})
}

fn rule(rule: &str, message: &str) -> Value {
    json!({"rule": rule, "message": message})
}

fn amend(schema: &mut Value, amendments: &[(&str, Value)]) {
    for (path, amendment) in amendments {
        let found = path.split_terminator('.').fold(&mut *schema, |at, part| {
            let name = part.trim_end_matches("[]");
            let at = &mut at["properties"][name];
            if name == part { at } else { &mut at["items"] }
        });
        let found = found.as_object_mut().unwrap_or_else(|| panic!("the types have no {path}"));
        found.extend(amendment.as_object().cloned().unwrap_or_default());
    }
}

fn schema<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::openapi3().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    structural(settings.into_generator().into_root_schema_for::<T>().to_value())
}

/// As a CRD has it. Values that are null are as if they were not there, and nothing is filled in that was not said.
fn structural(schema: Value) -> Value {
    let Value::Object(mut fields) = schema else { return schema };
    for field in ["$schema", "title", "default", "nullable"] {
        fields.remove(field);
    }
    // An enum whose values have documentation.
    if let Some(values) = fields.remove("oneOf") {
        let values: Vec<Value> = values.as_array().into_iter().flatten().map(|one| one["enum"][0].clone()).collect();
        fields.insert("type".into(), "string".into());
        fields.insert("enum".into(), values.into());
    }
    // A field that may be left out, with documentation of its own.
    if let Some(Value::Array(variants)) = fields.remove("anyOf").or_else(|| fields.remove("allOf")) {
        let variant = variants.into_iter().find_map(|variant| match variant {
            Value::Object(variant) if variant.contains_key("type") || variant.contains_key("oneOf") => Some(variant),
            _ => None,
        });
        let mut whole = variant.unwrap_or_default();
        whole.append(&mut fields);
        return structural(whole.into());
    }
    if fields.get("additionalProperties") == Some(&Value::Bool(true)) {
        fields.remove("additionalProperties");
        fields.insert("x-kubernetes-preserve-unknown-fields".into(), true.into());
    }
    if fields.get("additionalProperties") == Some(&Value::Bool(false)) {
        fields.remove("additionalProperties");
    }
    for of in ["items", "additionalProperties"] {
        if let Some(schema) = fields.remove(of) {
            fields.insert(of.into(), structural(schema));
        }
    }
    if let Some(Value::Object(properties)) = fields.remove("properties") {
        let properties: Map<String, Value> =
            properties.into_iter().map(|(name, schema)| (name, structural(schema))).collect();
        fields.insert("properties".into(), properties.into());
    }
    fields.into()
}
