//! Which devices and models there are, and their workers.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use prost::Message as _;
use skerry_proto::dmi;
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use crate::backoff::Backoff;
use crate::counters::COUNTERS;
use crate::device::{Device, key};
use crate::driver::Driver;
use crate::report::Reports;
use crate::sink::Sinks;
use crate::task;
use crate::worker::{Call, Worker};

/// Calls of methods that wait for one device.
const CALLS: usize = 4;

/// What edgecore says.
#[derive(Debug)]
pub(crate) enum Change {
    Device(Box<dmi::Device>),
    DeviceGone(String),
    Model(Box<dmi::DeviceModel>),
    ModelGone(String),
}

pub(crate) struct Directory<D: Driver> {
    driver: Arc<D>,
    reports: Arc<Reports>,
    sinks: Arc<Sinks>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    models: HashMap<String, dmi::DeviceModel>,
    devices: HashMap<String, Entry>,
    /// What came while a registration is under way: its answer is older.
    held: Option<Vec<Change>>,
}

struct Entry {
    /// As it came, encoded, which takes a fraction of the memory: it is seldom looked at again.
    device: Vec<u8>,
    /// Its model's key.
    model: String,
    /// None: its model is not there yet.
    worker: Option<Handle>,
}

struct Handle {
    /// Dropping it ends the worker.
    updates: watch::Sender<Arc<Device>>,
    calls: mpsc::Sender<Box<Call>>,
}

impl<D: Driver> Directory<D> {
    pub(crate) fn new(driver: D, reports: Arc<Reports>, sinks: Arc<Sinks>) -> Self {
        Self { driver: Arc::new(driver), reports, sinks, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A registration begins: until [`Directory::registered`] or [`Directory::not_registered`], changes are held.
    pub(crate) fn registering(&self) {
        self.lock().held.get_or_insert_default();
    }

    /// The answer to a registration. What is not in one that `is_whole` is gone; of one that is not, the rest is told by calls, and so is what
    /// is gone, when it is reported.
    pub(crate) fn registered(&self, models: Vec<dmi::DeviceModel>, devices: Vec<dmi::Device>, is_whole: bool) {
        self.sinks.sweep();
        let mut state = self.lock();
        let held = state.held.take();
        if is_whole {
            state.models.clear();
        }
        state.models.extend(models.into_iter().map(|model| (key(&model.namespace, &model.name), model)));
        let present: HashSet<String> = devices.iter().map(|device| key(&device.namespace, &device.name)).collect();
        let gone = state.devices.keys().filter(|device| is_whole && !present.contains(*device));
        let gone: Vec<String> = gone.cloned().collect();
        for device in gone {
            self.apply_to(&mut state, Change::DeviceGone(device));
        }
        for device in devices {
            self.apply_to(&mut state, Change::Device(Box::new(device)));
        }
        for change in held.into_iter().flatten() {
            self.apply_to(&mut state, change);
        }
    }

    /// The registration failed.
    pub(crate) fn not_registered(&self) {
        let mut state = self.lock();
        for change in state.held.take().into_iter().flatten() {
            self.apply_to(&mut state, change);
        }
    }

    pub(crate) fn apply(&self, change: Change) {
        let mut state = self.lock();
        match &mut state.held {
            Some(held) => held.push(change),
            None => self.apply_to(&mut state, change),
        }
    }

    pub(crate) fn device(&self, key: &str) -> Option<dmi::Device> {
        decoded(&self.lock().devices.get(key)?.device)
    }

    /// Where a device's methods are called; an error when it has no worker.
    pub(crate) fn calls(&self, key: &str) -> Result<mpsc::Sender<Box<Call>>, String> {
        let state = self.lock();
        let entry = state.devices.get(key).ok_or_else(|| format!("this mapper has no device {key}"))?;
        let worker = entry.worker.as_ref().ok_or_else(|| format!("the model of {key} is not there yet"))?;
        Ok(worker.calls.clone())
    }

    /// Ends all workers.
    pub(crate) fn clear(&self) {
        self.lock().devices.clear();
    }

    fn apply_to(&self, state: &mut State, change: Change) {
        match change {
            Change::Device(device) => {
                let name = key(&device.namespace, &device.name);
                let worker = state.devices.remove(&name).and_then(|entry| entry.worker);
                let entry = self.run(&state.models, &device, worker);
                state.devices.insert(name, entry);
            }
            Change::DeviceGone(name) => {
                if state.devices.remove(&name).is_some() {
                    info!(device = name, "the device was removed");
                }
                self.reports.forget(&name);
            }
            Change::Model(model) => {
                let name = key(&model.namespace, &model.name);
                if state.models.get(&name) == Some(&*model) {
                    return;
                }
                state.models.insert(name.clone(), *model);
                let of_it: Vec<String> =
                    state.devices.iter().filter(|(_, entry)| entry.model == name).map(|(key, _)| key.clone()).collect();
                for device in of_it {
                    if let Some(Entry { device: of_it, worker, .. }) = state.devices.remove(&device)
                        && let Some(of_it) = decoded(&of_it)
                    {
                        let entry = self.run(&state.models, &of_it, worker);
                        state.devices.insert(device, entry);
                    }
                }
            }
            // Devices that still refer to it run on with what they know.
            Change::ModelGone(name) => drop(state.models.remove(&name)),
        }
        COUNTERS.devices.set(state.devices.len() as u64);
    }

    /// Hands a device to its worker, one that is started if there is none.
    fn run(&self, models: &HashMap<String, dmi::DeviceModel>, device: &dmi::Device, worker: Option<Handle>) -> Entry {
        let (name, encoded) = (model_of(device), device.encode_to_vec());
        let Some(model) = models.get(&name) else {
            if worker.is_none() {
                warn!(device = key(&device.namespace, &device.name), model = name, "the device waits for its model");
            }
            return Entry { device: encoded, model: name, worker };
        };
        let ready = Arc::new(Device::new(device, model, &self.sinks, self.driver.device_keys_of_visitors()));
        let worker = match worker {
            Some(worker) => {
                worker.updates.send_replace(ready);
                worker
            }
            None => self.start(ready),
        };
        Entry { device: encoded, model: name, worker: Some(worker) }
    }

    fn start(&self, device: Arc<Device>) -> Handle {
        let name = device.key();
        info!(device = name, properties = device.properties.len(), "the device is run");
        let (updates, receiver) = watch::channel(device);
        let (calls, called) = mpsc::channel(CALLS);
        let mut worker = Worker::new(Arc::clone(&self.driver), Arc::clone(&self.reports), receiver, called);
        task::spawn("device", async move {
            let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
            while AssertUnwindSafe(worker.run()).catch_unwind().await.is_err() {
                COUNTERS.panics_total.add(1);
                error!(device = name, "the device's worker panicked and is started again");
                tokio::time::sleep(backoff.wait()).await;
            }
        });
        Handle { updates, calls }
    }
}

fn decoded(device: &[u8]) -> Option<dmi::Device> {
    dmi::Device::decode(device).ok()
}

fn model_of(device: &dmi::Device) -> String {
    key(&device.namespace, device.spec.as_ref().map_or("", |spec| &spec.device_model_reference))
}
