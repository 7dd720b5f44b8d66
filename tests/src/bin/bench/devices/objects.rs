//! The devices of the benchmark, and how so many come to the apiserver.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use skerry_tests::api::Api;

use crate::bed::NODE;

const COLLECTIONS: &str = "/apis/devices.kubeedge.io/v1beta1/namespaces/default";
/// Connections that objects are created over.
const WRITERS: usize = 16;
/// Properties of each device.
pub(super) const PROPERTIES: usize = 10;

/// A model of [`PROPERTIES`] whole numbers, `p0` and so on.
pub(super) fn model(name: &str, access: &str) -> Value {
    let properties: Vec<Value> = (0..PROPERTIES)
        .map(|number| json!({"name": format!("p{number}"), "type": "INT", "accessMode": access}))
        .collect();
    json!({
        "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "DeviceModel", "metadata": {"name": name},
        "spec": {"protocol": name, "properties": properties},
    })
}

/// A device of a model of the same name as its protocol; `property` completes each of its properties, which have their name.
pub(super) fn device(name: &str, model: &str, config: &Value, property: impl Fn(usize) -> Value) -> Value {
    let properties: Vec<Value> = (0..PROPERTIES)
        .map(|number| {
            let mut property = property(number);
            property["name"] = format!("p{number}").into();
            property
        })
        .collect();
    json!({
        "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device", "metadata": {"name": name},
        "spec": {
            "deviceModelRef": {"name": model}, "nodeName": NODE,
            "protocol": {"protocolName": model, "configData": config}, "properties": properties,
        },
    })
}

/// What one property is read by, in a cycle of milliseconds.
pub(super) fn read(model: &str, cycle: u64, visitor: &Value) -> Value {
    json!({
        "collectCycle": cycle, "reportToCloud": true,
        "visitors": {"protocolName": model, "configData": visitor},
    })
}

/// Creates devices, or models, over several connections: with kubectl tens of thousands take all day.
pub(super) fn create(
    kubeconfig: &Path,
    plural: &str,
    count: usize,
    object: impl Fn(usize) -> Value + Sync,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (api, path) = (Api::of(kubeconfig)?, format!("{COLLECTIONS}/{plural}"));
    let writers = (0..WRITERS.min(count)).map(|writer| {
        let (api, path, object) = (&api, &path, &object);
        async move {
            let mut connection = api.connect().await?;
            for number in (writer..count).step_by(WRITERS) {
                connection.create(path, &object(number)).await?;
            }
            anyhow::Ok(())
        }
    });
    runtime
        .block_on(futures_util::future::try_join_all(writers))
        .with_context(|| format!("creating {count} {plural}"))?;
    Ok(())
}

/// Writes what a property of a device is to be, as an apiserver's client does.
pub(super) struct Desire {
    runtime: tokio::runtime::Runtime,
    connection: skerry_tests::api::Connection,
}

impl Desire {
    pub(super) fn new(kubeconfig: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let connection = runtime.block_on(Api::of(kubeconfig)?.connect())?;
        Ok(Self { runtime, connection })
    }

    pub(super) fn write(&mut self, device: &str, patch: &Value) -> Result<()> {
        self.runtime.block_on(self.connection.merge(&format!("{COLLECTIONS}/devices/{device}"), patch))
    }
}
