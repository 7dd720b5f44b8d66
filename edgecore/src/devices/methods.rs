//! Methods of devices. A method is the device's own, and then its mapper runs it; or it is the writing of the properties it names, which is a
//! write at the box like any other: it holds until somebody newer writes. A mapper that serves methods does the writing at once, and what it
//! says it has written is what is wanted from then on; of one that fails nothing is wanted. With any other mapper the values are wanted first,
//! and the method has been done when the device says that it has them.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::time::Duration;

use skerry_proto::device::{DeviceMethod, DeviceSpec};
use skerry_proto::dmi::extensions::{CallRequest, device_method_service_client::DeviceMethodServiceClient};
use skerry_proto::sync::Collection;
use tonic::Code;

use super::{Devices, Refused, WriteError, dmi, serve};

/// Between looks whether the device has got there.
const LOOK: Duration = Duration::from_millis(100);

/// Why a method did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No such device on this node.
    #[error(transparent)]
    NoDevice(Refused),
    /// No such method.
    #[error("the device has no method {0:?}; it has: {1}")]
    NoMethod(String, String),
    /// What it was given does not fit.
    #[error("{0}")]
    Arguments(String),
    /// Nobody to run it.
    #[error("the device's mapper is not connected; start the mapper of its protocol")]
    NoMapper,
    /// The mapper's word.
    #[error("the mapper says: {0}")]
    Failed(String),
    /// It may still come to its end.
    #[error("nothing came of it within {} s", .0.as_secs_f32())]
    TimedOut(Duration),
    /// The store's word.
    #[error(transparent)]
    Store(#[from] crate::store::Error),
}

impl Devices {
    /// Calls a method and waits for its results, `timeout` at most. Arguments are by name; of a mapper that serves no methods, the names are
    /// those of the properties that the method writes.
    pub async fn call(
        &self,
        device: &str,
        method: &str,
        arguments: BTreeMap<String, String>,
        timeout: Duration,
    ) -> Result<BTreeMap<String, String>, CallError> {
        let twin = self.twin(device).ok_or(CallError::NoDevice(Refused::NoDevice))?;
        let row = self.0.store.row(Collection::Devices, &twin.uid).await?;
        let spec: DeviceSpec = row.and_then(|row| serve::spec(&row).ok()).unwrap_or_default();
        let Some(of) = spec.methods.iter().find(|of| of.name == method) else {
            let names: Vec<&str> = spec.methods.iter().map(|method| method.name.as_str()).collect();
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(CallError::NoMethod(method.to_owned(), names));
        };
        let owner = self.lock().owner(device).ok_or(CallError::NoMapper)?;
        let client = self.0.links.client(owner).ok_or(CallError::NoMapper)?;
        let mut client = DeviceMethodServiceClient::with_origin(client, dmi::origin());
        let mut request = tonic::Request::new(CallRequest {
            device_namespace: twin.namespace.clone(),
            device_name: twin.name.clone(),
            method: method.to_owned(),
            arguments: arguments.clone().into_iter().collect(),
        });
        request.set_timeout(timeout);
        let started = tokio::time::Instant::now();
        match tokio::time::timeout(timeout, client.call(request)).await {
            Err(_) => Err(CallError::TimedOut(timeout)),
            Ok(Ok(answer)) => {
                let answer = answer.into_inner();
                if answer.written {
                    for (property, value) in &arguments {
                        self.write_by(of, device, property, value).await?;
                    }
                }
                Ok(answer.results.into_iter().collect())
            }
            Ok(Err(status)) => match status.code() {
                Code::Unimplemented => {
                    let left = timeout.saturating_sub(started.elapsed());
                    self.write_all(device, of, &arguments, left).await.map_err(|error| match error {
                        CallError::TimedOut(_) => CallError::TimedOut(timeout),
                        error => error,
                    })
                }
                Code::DeadlineExceeded => Err(CallError::TimedOut(timeout)),
                // The connection's word, not the mapper's.
                _ if status.source().is_some() => Err(CallError::NoMapper),
                Code::InvalidArgument => Err(CallError::Arguments(status.message().to_owned())),
                _ => Err(CallError::Failed(status.message().to_owned())),
            },
        }
    }

    async fn write_by(
        &self,
        method: &DeviceMethod,
        device: &str,
        property: &str,
        value: &str,
    ) -> Result<(), CallError> {
        let written = self.write(device, property, value, &format!("method {}", method.name)).await;
        written.map_err(|error| match error {
            WriteError::Refused(refused) => CallError::Arguments(refused.to_string()),
            WriteError::NotKept(error) => CallError::Store(error),
        })
    }

    async fn write_all(
        &self,
        device: &str,
        method: &DeviceMethod,
        arguments: &BTreeMap<String, String>,
        timeout: Duration,
    ) -> Result<BTreeMap<String, String>, CallError> {
        let names = &method.property_names;
        if names.is_empty() {
            let words = "the device's mapper serves no methods, and this one names no properties to write instead";
            return Err(CallError::Arguments(words.to_owned()));
        }
        let missing = names.iter().find(|name| !arguments.contains_key(*name));
        let unknown = arguments.keys().find(|name| !names.contains(name));
        if let Some(name) = missing.or(unknown) {
            let names = names.join(", ");
            return Err(CallError::Arguments(format!(
                "{name:?}: this method takes a value for each of {names}, and nothing else"
            )));
        }
        let before = self.twin(device).unwrap_or_default();
        let mut changes = self.subscribe();
        let mut waited = Vec::new();
        for (property, value) in arguments {
            let of = before.properties.iter().find(|of| of.name == *property);
            let is_wanted = of.and_then(|of| of.desired.as_ref()).is_some_and(|desired| desired.value == *value);
            let version = of.and_then(|of| of.reported.as_ref()).map_or(0, |reported| reported.version);
            self.write_by(method, device, property, value).await?;
            // What was wanted already may have been read already.
            waited.push((property, value, if is_wanted { u32::MAX } else { version }));
        }
        let done = async {
            loop {
                let is_done = self.with(|twins, _| {
                    waited.iter().all(|(property, value, since)| twins.has(device, property, value, *since))
                });
                if is_done {
                    return;
                }
                tokio::select! {
                    _ = changes.recv() => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        };
        tokio::time::timeout(timeout, done).await.map_err(|_| CallError::TimedOut(timeout))?;
        Ok(arguments.clone())
    }
}
