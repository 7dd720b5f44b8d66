//! One device: connected, read in cycles, written and reported, until it is removed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use skerry_proto::dmi::extensions::Sample;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use crate::backoff::Backoff;
use crate::clock;
use crate::counters::COUNTERS;
use crate::device::{Desired, Device};
use crate::driver::{DeviceInfo, Driver, Fault, Link, Point, PropertyInfo, Reading};
use crate::health::{Health, State};
use crate::report::{Report, Reports};
use crate::schedule::Schedule;
use crate::value::{Kind, Value};

mod write;

/// The last resort: no operation of a driver takes this long.
const STUCK: Duration = Duration::from_secs(30);

/// A method that is to be run. Queues of them are of boxes: each device has one, with room for many.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) method: String,
    pub(crate) arguments: BTreeMap<String, String>,
    /// Closed when whoever called waits no longer.
    pub(crate) reply: oneshot::Sender<Result<Done, CallError>>,
}

/// What a method came to.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) results: BTreeMap<String, String>,
    /// It was the writing of properties.
    pub(crate) written: bool,
}

/// Why a method was not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CallError {
    /// There is none of that name.
    Unknown(String),
    /// The arguments are not what it needs.
    Argument(String),
    /// The device cannot be reached.
    Offline(String),
    /// The device refused.
    Refused(String),
}

/// What a device's worker is and has.
pub(crate) struct Worker<D: Driver> {
    driver: Arc<D>,
    reports: Arc<Reports>,
    epoch: watch::Receiver<u64>,
    updates: watch::Receiver<Arc<Device>>,
    calls: mpsc::Receiver<Box<Call>>,
    device: Arc<Device>,
    /// Of the device, for spreading.
    seed: u64,
    properties: Vec<Running<D::Point>>,
    schedule: Schedule,
    health: Health,
    /// Whether it has answered since it was connected.
    proven: bool,
}

/// A property while it runs.
struct Running<P> {
    point: Result<P, String>,
    /// The latest value and its time.
    last: Option<(Value, i64)>,
    /// What edgecore was told, and when.
    told: Option<(Value, Duration)>,
    /// Why it is not read.
    unread: Option<String>,
    /// Why its desired value does not stand.
    unwritten: Option<String>,
    /// The desired value that stands in the device.
    written: Option<Desired>,
    /// What a method has just written, and when: edgecore desires it now, and it stands already.
    called: Option<(String, Duration)>,
    /// When a desired value that could not be written is tried again.
    retry: Option<Duration>,
    backoff: Backoff,
}

/// Why a connection ended.
enum End {
    /// The device was removed.
    Removed,
    /// Its configuration changed: it is connected anew at once.
    Changed,
    /// It cannot be reached.
    Offline(String),
}

enum Event {
    Updated(bool),
    Call(Option<Box<Call>>),
    Registered,
    Time,
    Values(Result<(), Fault>),
}

impl<D: Driver> Worker<D> {
    pub(crate) fn new(
        driver: Arc<D>,
        reports: Arc<Reports>,
        mut updates: watch::Receiver<Arc<Device>>,
        calls: mpsc::Receiver<Box<Call>>,
    ) -> Self {
        let device = Arc::clone(&updates.borrow_and_update());
        let mut worker = Self {
            driver,
            epoch: reports.epoch(),
            reports,
            updates,
            calls,
            seed: xxhash_rust::xxh3::xxh3_64(device.key().as_bytes()),
            device: Arc::clone(&device),
            properties: Vec::new(),
            schedule: Schedule::default(),
            health: Health::default(),
            proven: false,
        };
        worker.take_up(device);
        worker
    }

    /// Runs the device until it is removed. May be called again after it panicked.
    pub(crate) async fn run(&mut self) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(3));
        loop {
            let started = clock::monotonic();
            let end = self.connected(&mut backoff).await;
            match end {
                End::Removed => return,
                End::Changed => continue,
                End::Offline(why) => {
                    COUNTERS.connect_failures_total.add(1);
                    if self.health.seen() != Some(State::Offline) {
                        warn!(
                            device = self.device.key(),
                            error = why,
                            "the device cannot be reached; it is tried again"
                        );
                    }
                    self.see(State::Offline);
                    let wait = started.max(clock::monotonic()) + backoff.wait();
                    if self.disconnected(wait, &why).await {
                        return;
                    }
                }
            }
        }
    }

    /// Until it is time to try again; true when the device was removed.
    async fn disconnected(&mut self, until: Duration, why: &str) -> bool {
        loop {
            let now = clock::monotonic();
            if now >= until {
                return false;
            }
            let next = self.health.due().map_or(until, |due| due.min(until)).max(now + Duration::from_millis(1));
            tokio::select! {
                changed = self.updates.changed() => {
                    if changed.is_err() {
                        return true;
                    }
                    if self.update() {
                        return false;
                    }
                }
                Some(call) = self.calls.recv() => {
                    let _ = call.reply.send(Err(CallError::Offline(why.to_owned())));
                }
                Ok(()) = self.epoch.changed() => self.registered(),
                () = tokio::time::sleep(next - now) => {}
            }
            self.tell_state();
        }
    }

    async fn connected(&mut self, backoff: &mut Backoff) -> End {
        let device = Arc::clone(&self.device);
        let info = DeviceInfo { namespace: &device.namespace, name: &device.name, config: &device.config };
        let connect = unstuck(self.driver.connect(&info));
        let mut link = tokio::select! {
            link = connect => match link {
                Ok(link) => link,
                Err(Fault::Offline(why) | Fault::Refused(why)) => return End::Offline(why),
            },
            changed = self.updates.changed() => {
                return match changed {
                    Ok(()) => { self.update(); End::Changed }
                    Err(_) => End::Removed,
                };
            }
        };
        match self.serve(&mut link, backoff).await {
            Ok(end) => end,
            Err(Fault::Offline(why) | Fault::Refused(why)) => End::Offline(why),
        }
    }

    /// Serves a connected device. Its faults end the connection.
    async fn serve(&mut self, link: &mut D::Link, backoff: &mut Backoff) -> Result<End, Fault> {
        self.proven = false;
        let mut subscribe = true;
        let mut due = Vec::new();
        let mut readings = Vec::new();
        self.plan();
        self.retry_soon();
        // A device that is just there may have the desired values already.
        let mut fresh = true;
        loop {
            if subscribe {
                let points = points(&self.properties, |point| !point.polled());
                unstuck(link.subscribe(&points)).await?;
                subscribe = false;
            }
            self.write_desired(link, fresh).await?;
            fresh = false;
            self.assess();
            self.tell_state();
            match self.event(link, &mut readings).await {
                // No one can call any more: the device is being removed.
                Event::Updated(false) | Event::Call(None) => return Ok(End::Removed),
                Event::Updated(true) => {
                    if self.update() {
                        return Ok(End::Changed);
                    }
                    subscribe = true;
                }
                Event::Call(Some(call)) => self.call(link, *call).await?,
                Event::Registered => self.registered(),
                Event::Values(outcome) => {
                    self.online(backoff);
                    self.deliver(&mut readings);
                    outcome?;
                }
                Event::Time => {
                    due.clear();
                    self.schedule.take_due(clock::monotonic(), self.seed, &mut due);
                    if !due.is_empty() {
                        self.read(link, &due, &mut readings).await?;
                        self.online(backoff);
                        self.deliver(&mut readings);
                    }
                }
            }
        }
    }

    async fn event(&mut self, link: &mut D::Link, readings: &mut Vec<Reading>) -> Event {
        let now = clock::monotonic();
        let retry = self.properties.iter().filter_map(|property| property.retry).min();
        let next = [self.schedule.next(), self.health.due(), retry].into_iter().flatten().min();
        let wait = next.map_or(Duration::from_secs(3600), |next| next.saturating_sub(now));
        tokio::select! {
            biased;
            changed = self.updates.changed() => Event::Updated(changed.is_ok()),
            call = self.calls.recv() => Event::Call(call),
            Ok(()) = self.epoch.changed() => Event::Registered,
            () = tokio::time::sleep(wait) => Event::Time,
            outcome = link.changes(readings) => Event::Values(outcome),
        }
    }

    async fn read(&mut self, link: &mut D::Link, due: &[usize], readings: &mut Vec<Reading>) -> Result<(), Fault> {
        let points: Vec<(usize, &D::Point)> =
            due.iter().filter_map(|&index| Some((index, self.properties.get(index)?.point.as_ref().ok()?))).collect();
        unstuck(link.read(&points, readings)).await
    }

    fn online(&mut self, backoff: &mut Backoff) {
        if self.health.seen() == Some(State::Offline) {
            info!(device = self.device.key(), "the device is back");
        }
        backoff.reset();
        self.proven = true;
    }

    /// Takes what was read to the sinks and, if it is news, to edgecore.
    fn deliver(&mut self, readings: &mut Vec<Reading>) {
        let (now, wall) = (clock::monotonic(), clock::wall());
        let mut report = Report::new(&self.device.namespace, &self.device.name);
        for reading in readings.drain(..) {
            let (Some(property), Some(running)) =
                (self.device.properties.get(reading.point), self.properties.get_mut(reading.point))
            else {
                continue;
            };
            let Some(kind) = property.kind else { continue };
            let outcome = reading.outcome.inspect_err(|_| COUNTERS.read_failures_total.add(1)).and_then(|sample| {
                COUNTERS.values_total.add(1);
                let value = sample.value.conform(kind).map_err(|error| {
                    COUNTERS.values_refused_total.add(1);
                    format!("the value is refused: {error}")
                })?;
                Ok((value, sample.time))
            });
            match outcome {
                Ok((value, time)) => {
                    if running.unread.take().is_some() {
                        info!(device = self.device.key(), property = property.name, "the property is read again");
                    }
                    let last = running.last.as_ref().map_or(0, |(_, time)| *time);
                    let (time, corrected) = clock::stamp(time, wall, last);
                    if corrected {
                        COUNTERS.times_corrected_total.add(1);
                    }
                    for outlet in &property.outlets {
                        outlet.push(&value, kind, time);
                    }
                    let news = running.told.as_ref().is_none_or(|(told, at)| {
                        now.saturating_sub(*at) >= property.report_cycle || !same(told, &value, property.dead_band)
                    });
                    if news {
                        report.property(&property.name, Some(sample(&value, kind, time)), None);
                        running.told = Some((value.clone(), now));
                    }
                    running.last = Some((value, time));
                }
                Err(why) => in_trouble(&mut running.unread, &self.device, &property.name, why),
            }
        }
        self.reports.put(report);
    }

    /// edgecore was started anew: it is told all there is.
    fn registered(&mut self) {
        let now = clock::monotonic();
        let mut report = Report::new(&self.device.namespace, &self.device.name);
        for (property, running) in self.device.properties.iter().zip(&mut self.properties) {
            let Some(kind) = property.kind else { continue };
            let reported = running.last.as_ref().map(|(value, time)| sample(value, kind, *time));
            let written = running.written.as_ref().map(written);
            if reported.is_some() || written.is_some() {
                report.property(&property.name, reported, written);
            }
            running.told = running.last.as_ref().map(|(value, _)| (value.clone(), now));
        }
        self.health.forget();
        self.reports.put(report);
    }

    /// A device is well once it has answered, or if nothing of it is ever asked.
    fn assess(&mut self) {
        if !self.proven && self.schedule.next().is_some() {
            return;
        }
        let trouble = self.properties.iter().any(|property| property.unread.is_some() || property.unwritten.is_some());
        self.see(if trouble { State::Unhealthy } else { State::Ok });
    }

    fn see(&mut self, state: State) {
        self.health.see(clock::monotonic(), state);
        self.tell_state();
    }

    fn tell_state(&mut self) {
        if let Some(state) = self.health.take(clock::monotonic()) {
            self.reports.put(Report::new(&self.device.namespace, &self.device.name).state(state));
        }
    }

    /// Takes the latest of the device; whether it has to be connected anew.
    fn update(&mut self) -> bool {
        let device = Arc::clone(&self.updates.borrow_and_update());
        let reconnect = device.config != self.device.config;
        self.take_up(device);
        if !reconnect {
            self.plan();
        }
        reconnect
    }

    fn take_up(&mut self, device: Arc<Device>) {
        let mut before: Vec<Option<Running<D::Point>>> =
            std::mem::take(&mut self.properties).into_iter().map(Some).collect();
        self.properties.reserve_exact(device.properties.len());
        let same_config = device.config == self.device.config;
        for property in &device.properties {
            let kept = self
                .device
                .properties
                .iter()
                .position(|old| same_config && property.same_but_desired(old))
                .and_then(|index| before.get_mut(index)?.take());
            let mut running = match kept {
                Some(kept) => kept,
                None => self.start(&device, property),
            };
            // A new wish is tried at once, and none leaves nothing undone.
            running.retry = None;
            running.backoff.reset();
            if property.desired.is_none() {
                running.unwritten = None;
            }
            self.properties.push(running);
        }
        self.device = device;
    }

    fn start(&self, device: &Arc<Device>, property: &crate::device::Property) -> Running<D::Point> {
        let point = match property.kind {
            None => Err("its DeviceModel does not have it, or has no type for it".to_owned()),
            Some(kind) => {
                let info =
                    PropertyInfo { name: &property.name, kind, writable: property.writable, device: &device.config };
                self.driver.point(&info, &property.visitor).map_err(|error| error.to_string())
            }
        };
        let mut running = Running {
            point,
            last: None,
            told: None,
            unread: None,
            unwritten: None,
            written: None,
            called: None,
            retry: None,
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(60)),
        };
        if let Err(why) = &running.point {
            let why = why.clone();
            in_trouble(&mut running.unread, device, &property.name, why);
        }
        running
    }

    fn plan(&mut self) {
        let cycles = self.device.properties.iter().enumerate().zip(&self.properties);
        let polled = cycles.filter(|(_, running)| running.point.as_ref().is_ok_and(Point::polled));
        self.schedule = Schedule::new(polled.map(|((index, property), _)| (index, property.cycle)), clock::monotonic());
    }
}

/// Notes what is wrong, and says it once.
fn in_trouble(trouble: &mut Option<String>, device: &Device, property: &str, why: String) {
    if trouble.as_ref() != Some(&why) {
        warn!(device = device.key(), property, error = why, "the property does not work");
    }
    *trouble = Some(why);
}

fn points<P: Point>(properties: &[Running<P>], wanted: impl Fn(&P) -> bool) -> Vec<(usize, &P)> {
    let points = properties.iter().enumerate();
    points
        .filter_map(|(index, running)| Some((index, running.point.as_ref().ok().filter(|point| wanted(point))?)))
        .collect()
}

/// Whether a value is no news.
fn same(told: &Value, value: &Value, dead_band: f64) -> bool {
    match (told.number(), value.number()) {
        (Some(told), Some(value)) if dead_band > 0.0 => (told - value).abs() <= dead_band,
        _ => told == value,
    }
}

fn sample(value: &Value, kind: Kind, time: i64) -> Sample {
    Sample { value: value.render(kind), timestamp: Some(time) }
}

fn written(desired: &Desired) -> Sample {
    Sample { value: desired.value.clone(), timestamp: desired.timestamp.parse().ok() }
}

fn unstuck<T>(operation: impl Future<Output = Result<T, Fault>>) -> impl Future<Output = Result<T, Fault>> {
    // A driver's futures are kilobytes, and each device rests most of the time.
    let operation = Box::pin(tokio::time::timeout(STUCK, operation));
    async { operation.await.unwrap_or_else(|_| Err(Fault::Offline("no end of an operation within 30 s".to_owned()))) }
}
