//! Desired values and methods: written, read back, and only then told to have been written.

use std::collections::BTreeMap;
use std::time::Duration;

use tracing::{info, warn};

use super::{Call, CallError, Done, Worker, in_trouble, sample, unstuck, written};
use crate::clock;
use crate::counters::COUNTERS;
use crate::device::Property;
use crate::driver::{Driver, Fault, Link as _, Point as _, Reading};
use crate::report::Report;
use skerry_proto::device::Domain;

use crate::value::{Value, shortened};

/// When a written value is read back: a device may need a moment to take it over.
const READ_BACK: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(200), Duration::from_millis(500)];

/// How long after a write that ended the connection the next one has to itself for reading: it may be that write alone that is not answered.
const SPARED: Duration = Duration::from_secs(3);
/// No method takes longer, whoever waits for it.
const LONGEST_CALL: Duration = Duration::from_secs(300);
/// How long after a method wrote a value edgecore may take to desire it.
const CALLED: Duration = Duration::from_secs(10);

/// Why a value was not written.
pub(super) enum WriteError {
    /// It never can be.
    Wrong(String),
    /// It can be tried again.
    Failed(String),
    /// The connection is gone.
    Gone(Fault),
}

impl<D: Driver> Worker<D> {
    /// Writes the desired values that do not stand yet. `fresh`: the device may have them already, and is asked first.
    pub(super) async fn write_desired(&mut self, link: &mut D::Link, fresh: bool) -> Result<(), Fault> {
        for index in 0..self.properties.len() {
            let (Some(property), Some(running)) = (self.device.properties.get(index), self.properties.get(index))
            else {
                continue;
            };
            let Some(desired) = property.desired.clone().filter(|desired| Some(desired) != running.written.as_ref())
            else {
                continue;
            };
            if running.retry.is_some_and(|retry| retry > clock::monotonic()) || running.point.is_err() {
                continue;
            }
            let called = self.properties.get_mut(index).and_then(|running| running.called.take());
            let stands = called
                .is_some_and(|(value, at)| value == desired.value && clock::monotonic().saturating_sub(at) < CALLED);
            let outcome = match stands {
                true => Ok(None),
                false => self.write(link, index, &desired.value, fresh).await,
            };
            let device = std::sync::Arc::clone(&self.device);
            let (Some(property), Some(running)) = (device.properties.get(index), self.properties.get_mut(index)) else {
                continue;
            };
            match outcome {
                Ok(stands) => {
                    running.unwritten = None;
                    running.retry = None;
                    running.backoff.reset();
                    running.written = Some(desired.clone());
                    let Some(kind) = property.kind else { continue };
                    let reported = stands.map(|value| {
                        let (now, last) = (clock::wall(), running.last.as_ref().map_or(0, |(_, time)| *time));
                        let (time, _) = clock::stamp(None, now, last);
                        let reported = sample(&value, kind, time);
                        running.told = Some((value.clone(), clock::monotonic()));
                        running.last = Some((value, time));
                        reported
                    });
                    let mut report = Report::new(&device.namespace, &device.name);
                    report.property(&property.name, reported, Some(written(&desired)));
                    self.reports.put(report);
                }
                Err(WriteError::Wrong(why)) => {
                    COUNTERS.write_failures_total.add(1);
                    running.retry = Some(Duration::MAX);
                    in_trouble(
                        &mut running.unwritten,
                        &device,
                        &property.name,
                        format!("its desired value cannot be written: {why}"),
                    );
                }
                Err(WriteError::Failed(why)) => {
                    COUNTERS.write_failures_total.add(1);
                    running.retry = Some(clock::monotonic() + running.backoff.wait());
                    in_trouble(
                        &mut running.unwritten,
                        &device,
                        &property.name,
                        format!("its desired value was not written: {why}"),
                    );
                }
                Err(WriteError::Gone(fault)) => {
                    COUNTERS.write_failures_total.add(1);
                    running.retry = Some(clock::monotonic() + SPARED);
                    return Err(fault);
                }
            }
        }
        Ok(())
    }

    /// What is left undone when a device is connected anew: all is tried again, at once but for what ended the connection before.
    pub(super) fn retry_soon(&mut self) {
        let soon = clock::monotonic() + SPARED;
        for property in &mut self.properties {
            (property.written, property.called) = (None, None);
            property.retry = property.retry.filter(|retry| *retry <= soon);
        }
    }

    /// Writes one property and reads it back; what it reads then, if it can be read.
    async fn write(
        &mut self,
        link: &mut D::Link,
        index: usize,
        text: &str,
        ask_first: bool,
    ) -> Result<Option<Value>, WriteError> {
        let wrong = |why: &str| WriteError::Wrong(why.to_owned());
        let property = self.device.properties.get(index).ok_or_else(|| wrong("there is no such property"))?;
        let point = self.properties.get(index).map(|running| &running.point);
        let point = point.and_then(|point| point.as_ref().ok()).ok_or_else(|| wrong("the property does not work"))?;
        let (value, kind) = acceptable(property, text).map_err(WriteError::Wrong)?;
        if ask_first
            && point.verified()
            && let Some(there) = read_one::<D>(link, index, point).await?
            && let Ok(there) = there.conform(kind)
            && there.matches(&value, kind, point.tolerance())
        {
            return Ok(Some(there));
        }
        match unstuck(link.write(point, &value)).await {
            Ok(()) => COUNTERS.writes_total.add(1),
            Err(Fault::Refused(why)) => return Err(WriteError::Failed(why)),
            Err(gone @ Fault::Offline(_)) => return Err(WriteError::Gone(gone)),
        }
        info!(device = self.device.key(), property = property.name, value = shortened(text), "written");
        if !point.verified() {
            return Ok(None);
        }
        let mut read = None;
        for wait in READ_BACK {
            tokio::time::sleep(wait).await;
            match read_one::<D>(link, index, point).await?.map(|value| value.conform(kind)) {
                Some(Ok(there)) if there.matches(&value, kind, point.tolerance()) => return Ok(Some(there)),
                other => read = other,
            }
        }
        Err(WriteError::Failed(match read {
            Some(Ok(there)) => format!("it reads {} afterwards", shortened(&there.render(kind))),
            Some(Err(error)) => format!("what it reads afterwards is refused: {error}"),
            None => "it cannot be read afterwards".to_owned(),
        }))
    }

    /// Runs a method: the protocol's own, or the writing of the properties that the device says it is. For as long as somebody waits for it.
    pub(super) async fn call(&mut self, link: &mut D::Link, call: Call) -> Result<(), Fault> {
        let Call { method, arguments, mut reply } = call;
        let device = self.device.key();
        let ended = tokio::select! {
            biased;
            () = reply.closed() => None,
            ended = link.call(&method, &arguments) => Some(ended),
            () = tokio::time::sleep(LONGEST_CALL) => None,
        };
        let outcome = match ended {
            Some(Ok(Some(results))) => Ok(Done { results, written: false }),
            Some(Ok(None)) => match self.call_by_writing(link, &method, &arguments).await {
                Ok(results) => Ok(Done { results, written: true }),
                Err((error, fault)) => {
                    let _ = reply.send(Err(error));
                    return fault.map_or(Ok(()), Err);
                }
            },
            Some(Err(Fault::Refused(why))) => Err(CallError::Refused(why)),
            Some(Err(Fault::Offline(why))) => {
                let _ = reply.send(Err(CallError::Offline(why.clone())));
                return Err(Fault::Offline(why));
            }
            // The link works on, or says itself that it does not.
            None => Err(CallError::Refused("it has not ended while somebody waited for it".to_owned())),
        };
        if let Err(error) = &outcome {
            warn!(device, method, ?error, "a method failed");
        }
        let _ = reply.send(outcome);
        Ok(())
    }

    async fn call_by_writing(
        &mut self,
        link: &mut D::Link,
        method: &str,
        arguments: &BTreeMap<String, String>,
    ) -> Result<BTreeMap<String, String>, (CallError, Option<Fault>)> {
        let device = std::sync::Arc::clone(&self.device);
        let Some(declared) = device.methods.iter().find(|declared| declared.name == method) else {
            return Err((CallError::Unknown(format!("the device has no method {method:?}")), None));
        };
        let wrong = |why: String| (CallError::Argument(why), None);
        let mut writes = Vec::new();
        for name in &declared.property_names {
            let index = device.properties.iter().position(|property| &property.name == name);
            let index = index.ok_or_else(|| wrong(format!("the device has no property {name:?}")))?;
            let argument = arguments.get(name).ok_or_else(|| wrong(format!("an argument {name:?} is missing")))?;
            let property = device.properties.get(index).ok_or_else(|| wrong("no such property".to_owned()))?;
            acceptable(property, argument).map_err(|why| wrong(format!("{name}: {why}")))?;
            writes.push((index, property, argument));
        }
        if let Some(unknown) = arguments.keys().find(|name| !declared.property_names.contains(name)) {
            return Err(wrong(format!("the method has no parameter {unknown:?}")));
        }
        let (mut results, mut written) = (BTreeMap::new(), Vec::new());
        for (index, property, argument) in writes {
            match self.write(link, index, argument, false).await {
                Ok(value) => {
                    let text = match (value, property.kind) {
                        (Some(value), Some(kind)) => value.render(kind),
                        _ => argument.clone(),
                    };
                    results.insert(property.name.clone(), text);
                    written.push((index, argument.clone()));
                }
                Err(WriteError::Wrong(why)) => return Err(wrong(why)),
                Err(WriteError::Failed(why)) => {
                    return Err((CallError::Refused(format!("{}: {why}", property.name)), None));
                }
                Err(WriteError::Gone(fault)) => return Err((CallError::Offline(fault.to_string()), Some(fault))),
            }
        }
        for (index, value) in written {
            if let Some(running) = self.properties.get_mut(index) {
                running.called = Some((value, clock::monotonic()));
            }
        }
        Ok(results)
    }
}

/// The value that a text stands for, if the property takes it.
fn acceptable(property: &Property, text: &str) -> Result<(Value, crate::value::Kind), String> {
    let kind = property.kind.ok_or("its DeviceModel does not have it")?;
    if !property.writable {
        return Err("its DeviceModel says it is ReadOnly".to_owned());
    }
    let value = Value::parse(text, kind).map_err(|error| error.to_string())?;
    if let Some(number) = value.number() {
        let domain = Domain { kind, minimum: property.minimum, maximum: property.maximum };
        domain.check_bounds(number).map_err(|unfit| format!("it {unfit}"))?;
    }
    Ok((value, kind))
}

async fn read_one<D: Driver>(link: &mut D::Link, index: usize, point: &D::Point) -> Result<Option<Value>, WriteError> {
    let mut readings: Vec<Reading> = Vec::with_capacity(1);
    match unstuck(link.read(&[(index, point)], &mut readings)).await {
        Ok(()) => Ok(readings.pop().and_then(|reading| reading.outcome.ok()).map(|sample| sample.value)),
        Err(Fault::Refused(_)) => Ok(None),
        Err(gone @ Fault::Offline(_)) => Err(WriteError::Gone(gone)),
    }
}
