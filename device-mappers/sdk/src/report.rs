//! Reports to edgecore: values, states and written desired values.
//!
//! What waits is the latest of each property, so it is bounded by the devices there are, however long edgecore is away or however slow it
//! answers. One call is in flight, with what several devices say; the next begins some time after it, so that the more there is to say the
//! more goes in one. What a call had with it that broke is sent again, without what was said since; an edgecore that is new is told everything.

use std::collections::{HashMap, HashSet, VecDeque};
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use prost::Message as _;
use skerry_proto::dmi;
use skerry_proto::dmi::device_manager_service_client::DeviceManagerServiceClient;
use skerry_proto::dmi::extensions::device_report_service_client::DeviceReportServiceClient;
use skerry_proto::dmi::extensions::{DeviceReport, PropertyReport, ReportRequest, Sample};
use tokio::sync::{Notify, watch};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tracing::{debug, warn};

use crate::clock;
use crate::counters::COUNTERS;
use crate::health::State;

/// From the beginning of a call to that of the next.
const PACE: Duration = Duration::from_millis(10);
/// Devices that one call speaks of, and its bytes; what one device says goes whole.
const TOGETHER: (usize, usize) = (256, 1 << 20);
/// Calls in flight to an edgecore that takes what each device says by itself: enough that a busy machine, where each takes tens of
/// milliseconds, keeps up with a thousand devices.
const APART: usize = 16;
/// How long a call may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often a state or a written desired value that was refused is sent again, with [`PAUSE`] between.
const ATTEMPTS: u32 = 10;
/// After a refusal, and after a call that broke.
const PAUSE: Duration = Duration::from_secs(1);

/// edgecore, as it is called.
#[derive(Clone, Debug)]
pub(crate) struct Edge {
    manager: DeviceManagerServiceClient<Channel>,
    reports: DeviceReportServiceClient<Channel>,
    /// It said that it takes what each device says by itself.
    apart: Arc<AtomicBool>,
}

impl Edge {
    pub(crate) fn new(channel: Channel) -> Self {
        let reports = DeviceReportServiceClient::new(channel.clone());
        Self { manager: DeviceManagerServiceClient::new(channel), reports, apart: Arc::default() }
    }
}

/// The way to edgecore.
#[derive(Debug)]
pub(crate) struct Reports {
    pending: Mutex<Pending>,
    wake: Notify,
    edge: watch::Sender<Option<Edge>>,
    /// Grows with every registration: whoever sees it change tells everything again.
    epoch: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Pending {
    order: VecDeque<String>,
    reports: HashMap<String, Report>,
    /// What was refused, or did not arrive, and is sent again, and when.
    again: VecDeque<(Duration, Report)>,
    /// Devices that the call under way speaks of, but for those that were removed since.
    under_way: HashSet<String>,
}

/// What the answer to a call was of one of its devices, by its place.
type Failed = (usize, Status);

/// How many devices a call had with it for which it was no use.
#[derive(Debug, Default, PartialEq, Eq)]
struct Failures {
    refused: usize,
    broken: usize,
}

/// What is to be told of one device.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    said: DeviceReport,
    refusals: u32,
}

impl Report {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        let said = DeviceReport {
            device_namespace: namespace.to_owned(),
            device_name: name.to_owned(),
            ..DeviceReport::default()
        };
        Self { said, refusals: 0 }
    }

    pub(crate) fn state(mut self, state: State) -> Self {
        state.name().clone_into(&mut self.said.state);
        self
    }

    /// Adds a property: what was read, and what was written.
    pub(crate) fn property(&mut self, name: &str, reported: Option<Sample>, written: Option<Sample>) {
        self.said.properties.push(PropertyReport { property: name.to_owned(), reported, written });
    }

    fn is_empty(&self) -> bool {
        self.said.properties.is_empty() && self.said.state.is_empty()
    }

    fn is_of_the_same(&self, other: &Self) -> bool {
        self.said.device_name == other.said.device_name && self.said.device_namespace == other.said.device_namespace
    }

    fn key(&self) -> String {
        format!("{}/{}", self.said.device_namespace, self.said.device_name)
    }

    /// Whether something is said that no other report will say.
    fn is_lasting(&self) -> bool {
        !self.said.state.is_empty() || self.said.properties.iter().any(|of| of.written.is_some())
    }

    /// Leaves what a newer one says to that.
    fn yield_to(&mut self, newer: &Self) {
        if !newer.said.state.is_empty() {
            self.said.state.clear();
        }
        let newer = &newer.said.properties;
        self.said.properties.retain_mut(|of| {
            if let Some(newer) = newer.iter().find(|newer| newer.property == of.property) {
                of.reported.take_if(|_| newer.reported.is_some());
                of.written.take_if(|_| newer.written.is_some());
            }
            of.reported.is_some() || of.written.is_some()
        });
    }

    /// What is newer wins.
    fn merge(&mut self, newer: Self) {
        if newer.is_lasting() {
            // Not what was refused so often.
            self.refusals = newer.refusals;
        }
        for of in newer.said.properties {
            match self.said.properties.iter_mut().find(|older| older.property == of.property) {
                Some(older) => {
                    older.reported = of.reported.or_else(|| older.reported.take());
                    older.written = of.written.or_else(|| older.written.take());
                }
                None => self.said.properties.push(of),
            }
        }
        if !newer.said.state.is_empty() {
            self.said.state = newer.said.state;
        }
    }

    /// What has to arrive, should it be refused: newer values follow by themselves, these do not.
    fn lasting(&self) -> Option<Self> {
        let properties = self.said.properties.iter().filter(|of| of.written.is_some());
        let properties: Vec<_> = properties.map(|of| PropertyReport { reported: None, ..of.clone() }).collect();
        let said = DeviceReport {
            device_namespace: self.said.device_namespace.clone(),
            device_name: self.said.device_name.clone(),
            properties,
            state: self.said.state.clone(),
        };
        let lasting = Self { said, refusals: self.refusals + 1 };
        (lasting.refusals < ATTEMPTS && !lasting.is_empty()).then_some(lasting)
    }
}

impl Reports {
    pub(crate) fn new() -> Self {
        Self {
            pending: Mutex::default(),
            wake: Notify::new(),
            edge: watch::Sender::new(None),
            epoch: watch::Sender::new(0),
        }
    }

    /// edgecore is there, and knows nothing of this process's devices.
    pub(crate) fn attach(&self, edge: Edge) {
        self.edge.send_replace(Some(edge));
        self.epoch.send_modify(|epoch| *epoch += 1);
    }

    /// edgecore is gone.
    pub(crate) fn detach(&self) {
        self.edge.send_replace(None);
    }

    pub(crate) fn epoch(&self) -> watch::Receiver<u64> {
        self.epoch.subscribe()
    }

    /// Takes a report along.
    pub(crate) fn put(&self, report: Report) {
        if !report.is_empty() {
            self.lock().put(report);
            self.wake.notify_one();
        }
    }

    /// Forgets what waits of a device that was removed.
    pub(crate) fn forget(&self, device: &str) {
        self.lock().forget(device);
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends, for as long as it is polled.
    pub(crate) async fn run(&self) {
        let mut edges = self.edge.subscribe();
        loop {
            let Some(edge) = edges.borrow_and_update().clone() else {
                if edges.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let (batch, due) = self.lock().take(clock::monotonic());
            if batch.is_empty() {
                let wait = due.map_or(Duration::from_secs(3600), |due| due.saturating_sub(clock::monotonic()));
                let _ = tokio::time::timeout(wait, self.wake.notified()).await;
                continue;
            }
            let next = tokio::time::Instant::now() + PACE;
            let failed = send(&edge, batch.iter().map(|report| report.said.clone()).collect()).await;
            if let Some((place, status)) = failed.iter().find(|(_, status)| !is_broken(status)) {
                let (device, code, error) = (batch[*place].key(), status.code(), status.message());
                warn!(device, ?code, error, others = failed.len() - 1, "edgecore refused a report");
            } else if let Some((_, status)) = failed.first() {
                debug!(devices = failed.len(), error = status.message(), "reports did not get to edgecore");
            }
            let sent = batch.len();
            let Failures { refused, broken } = self.lock().settle(batch, &failed, clock::monotonic() + PAUSE);
            COUNTERS.reports_total.add((sent - refused - broken) as u64);
            COUNTERS.report_failures_total.add((refused + broken) as u64);
            if broken == sent {
                let _ = tokio::time::timeout(PAUSE, edges.changed()).await;
            }
            tokio::time::sleep_until(next).await;
        }
    }
}

impl Pending {
    fn put(&mut self, report: Report) {
        let device = report.key();
        // What is newer is not to be undone by what was refused before it.
        self.again
            .iter_mut()
            .filter(|(_, older)| older.is_of_the_same(&report))
            .for_each(|(_, older)| older.yield_to(&report));
        self.again.retain(|(_, older)| !older.is_empty());
        if let Some(waiting) = self.reports.get_mut(&device) {
            waiting.merge(report);
            return;
        }
        self.order.push_back(device.clone());
        self.reports.insert(device, report);
    }

    /// What one call takes, and when there is something else if there is nothing now.
    fn take(&mut self, now: Duration) -> (Vec<Report>, Option<Duration>) {
        while let Some((_, older)) = self.again.pop_front_if(|(due, _)| *due <= now) {
            self.put_under(older);
        }
        let (devices, mut room) = TOGETHER;
        let mut batch = Vec::new();
        self.under_way.clear();
        while batch.len() < devices
            && let Some(device) = self.order.front()
        {
            if let Some(report) = self.reports.get(device) {
                let bytes = report.said.encoded_len();
                if bytes > room && !batch.is_empty() {
                    break;
                }
                room = room.saturating_sub(bytes);
                batch.extend(self.reports.remove(device));
                self.under_way.extend(self.order.pop_front());
            } else {
                self.order.pop_front();
            }
        }
        (batch, self.again.front().map(|(due, _)| *due))
    }

    /// A call ended. What of it is to be sent again is, when it is `due`.
    fn settle(&mut self, batch: Vec<Report>, failed: &[Failed], due: Duration) -> Failures {
        let mut failures = Failures::default();
        let mut batch: Vec<_> = batch.into_iter().map(Some).collect();
        for (place, status) in failed {
            let Some(report) = batch.get_mut(*place).and_then(Option::take) else { continue };
            let is_broken = is_broken(status);
            *if is_broken { &mut failures.broken } else { &mut failures.refused } += 1;
            let device = report.key();
            let again = if is_broken { Some(report) } else { report.lasting() };
            let Some(mut again) = again else { continue };
            if let Some(newer) = self.reports.get(&device) {
                again.yield_to(newer);
            }
            if self.under_way.contains(&device) && !again.is_empty() {
                self.again.push_back((due, again));
            }
        }
        self.under_way.clear();
        failures
    }

    /// What was refused, under what came since.
    fn put_under(&mut self, mut older: Report) {
        match self.reports.get_mut(&older.key()) {
            Some(newer) => {
                older.merge(mem::take(newer));
                *newer = older;
            }
            None => self.put(older),
        }
    }

    fn forget(&mut self, device: &str) {
        self.reports.remove(device);
        self.under_way.remove(device);
        self.again.retain(|(_, report)| report.key() != device);
    }
}

/// Answers what did not get there or was refused.
async fn send(edge: &Edge, devices: Vec<DeviceReport>) -> Vec<Failed> {
    let count = devices.len();
    let all = |status: &Status| (0..count).map(|place| (place, status.clone())).collect();
    if !edge.apart.load(Ordering::Relaxed) {
        return match deadline(edge.reports.clone().report(ReportRequest { devices })).await {
            Ok(answer) => answer
                .refusals
                .into_iter()
                .filter_map(|of| Some((usize::try_from(of.device).ok()?, Status::new(Code::from(of.code), of.message))))
                .filter(|(place, _)| *place < count)
                .collect(),
            Err(status) if status.code() == Code::Unimplemented => {
                edge.apart.store(true, Ordering::Relaxed);
                all(&Status::unavailable("it takes what each device says by itself"))
            }
            Err(status) => all(&status),
        };
    }
    let calls = devices.into_iter().enumerate().map(|(place, said)| {
        let manager = edge.manager.clone();
        async move { (place, send_one(manager, said).await) }
    });
    let calls = futures_util::stream::iter(calls).buffer_unordered(APART);
    calls.filter_map(async |(place, outcome)| Some((place, outcome.err()?))).collect().await
}

/// Tells what one device says as every edgecore takes it.
async fn send_one(mut manager: DeviceManagerServiceClient<Channel>, said: DeviceReport) -> Result<(), Status> {
    let DeviceReport { device_namespace, device_name, properties, state } = said;
    if !properties.is_empty() {
        let twins = properties.into_iter().map(|of| dmi::Twin {
            property_name: of.property,
            reported: of.reported.map(twin_property),
            observed_desired: of.written.map(twin_property),
        });
        let reported_device = Some(dmi::DeviceStatus { twins: twins.collect(), ..dmi::DeviceStatus::default() });
        let (device_namespace, device_name) = (device_namespace.clone(), device_name.clone());
        let request = dmi::ReportDeviceStatusRequest { device_name, device_namespace, reported_device };
        deadline(manager.report_device_status(request)).await?;
    }
    if !state.is_empty() {
        let request = dmi::ReportDeviceStatesRequest { device_name, device_namespace, state };
        match deadline(manager.report_device_states(request)).await {
            // One of KubeEdge's first that have this interface.
            Err(status) if status.code() == Code::Unimplemented => debug!("edgecore takes no states of devices"),
            answer => drop(answer?),
        }
    }
    Ok(())
}

pub(crate) fn twin_property(sample: Sample) -> dmi::TwinProperty {
    let metadata = sample.timestamp.map(|at| ("timestamp".to_owned(), at.to_string()));
    dmi::TwinProperty { value: sample.value, metadata: metadata.into_iter().collect() }
}

/// Whether it is the call that failed, not what it told.
fn is_broken(status: &Status) -> bool {
    use Code::{Cancelled, DeadlineExceeded, ResourceExhausted, Unavailable};
    matches!(status.code(), Unavailable | Cancelled | DeadlineExceeded | ResourceExhausted)
        || std::error::Error::source(status).is_some()
}

pub(crate) async fn deadline<T>(call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(DEADLINE, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded("no answer within 5 s")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1);

    fn sample(value: &str) -> Option<Sample> {
        Some(Sample { value: value.to_owned(), timestamp: Some(1) })
    }

    fn report(name: &str, values: &[(&str, &str)]) -> Report {
        let mut report = Report::new("default", name);
        values.iter().for_each(|(property, value)| report.property(property, sample(value), None));
        report
    }

    fn says(report: &Report) -> Vec<(&str, &str)> {
        let properties = &report.said.properties;
        let mut says: Vec<_> = properties
            .iter()
            .map(|of| (&*of.property, of.reported.as_ref().map_or("", |sample| &sample.value)))
            .collect();
        says.sort_unstable();
        says
    }

    #[test]
    fn what_waits_is_the_latest_of_each_property() {
        let mut pending = Pending::default();
        for count in 0..1000 {
            pending.put(report("a", &[("one", &count.to_string()), ("two", "x")]));
            pending.put(report("b", &[]).state(State::Ok));
        }
        assert_eq!(pending.order.len(), 2);
        let (batch, due) = pending.take(NOW);
        assert_eq!((batch.len(), due), (2, None));
        assert_eq!(says(&batch[0]), [("one", "999"), ("two", "x")]);
        assert_eq!(batch[1].said.state, "ok");
        assert!(pending.take(NOW).0.is_empty());
    }

    #[test]
    fn what_was_refused_goes_under_what_came_since() {
        let mut pending = Pending::default();
        pending.again.push_back((NOW, report("a", &[("one", "1"), ("two", "2")]).state(State::Offline)));
        let (batch, due) = pending.take(Duration::ZERO);
        assert_eq!((batch.len(), due), (0, Some(NOW)));
        pending.put(report("a", &[("one", "3")]));
        let (batch, due) = pending.take(NOW);
        assert_eq!((says(&batch[0]), &*batch[0].said.state, due), (vec![("one", "3"), ("two", "2")], "offline", None));
        pending.again.push_back((NOW, report("a", &[("one", "1")])));
        pending.put(report("a", &[("one", "1")]));
        pending.forget("default/a");
        assert_eq!(pending.take(NOW).0.len(), 0);
    }

    #[test]
    fn what_was_refused_does_not_undo_what_came_since_and_was_taken() {
        let mut pending = Pending::default();
        let mut refused = report("a", &[]).state(State::Ok);
        refused.property("one", None, sample("1"));
        refused.property("two", None, sample("2"));
        pending.again.push_back((NOW, refused));
        let mut newer = report("a", &[("two", "3")]).state(State::Offline);
        newer.property("one", None, sample("3"));
        pending.put(newer);
        assert_eq!(pending.take(Duration::ZERO).0.len(), 1);
        let (batch, _) = pending.take(NOW);
        assert_eq!((says(&batch[0]), &*batch[0].said.state), (vec![("two", "")], ""));
    }

    /// What becomes of a call.
    fn settle(pending: &mut Pending, batch: Vec<Report>, failed: &[(usize, Code)], due: Duration) -> (usize, usize) {
        let failed: Vec<_> = failed.iter().map(|(place, code)| (*place, Status::new(*code, ""))).collect();
        let Failures { refused, broken } = pending.settle(batch, &failed, due);
        (refused, broken)
    }

    #[test]
    fn what_did_not_arrive_goes_again_under_what_came_since() {
        let mut pending = Pending::default();
        for name in ["a", "b", "c", "d"] {
            pending.put(report(name, &[("one", "1"), ("two", "2")]).state(State::Ok));
        }
        let (batch, _) = pending.take(NOW);
        pending.put(report("a", &[("one", "3")]).state(State::Offline));
        pending.forget("default/b");
        let failed = [(0, Code::Unavailable), (1, Code::DeadlineExceeded), (2, Code::NotFound), (9, Code::NotFound)];
        assert_eq!(settle(&mut pending, batch, &failed, 2 * NOW), (1, 2));
        // What came since does not wait for it.
        let (batch, due) = pending.take(NOW);
        assert_eq!((batch.len(), says(&batch[0]), due), (1, vec![("one", "3")], Some(2 * NOW)));
        assert_eq!(settle(&mut pending, batch, &[], NOW), (0, 0));
        let (batch, due) = pending.take(2 * NOW);
        let said: Vec<_> = batch.iter().map(|of| (&*of.said.device_name, says(of), &*of.said.state)).collect();
        assert_eq!(said, [("a", vec![("two", "2")], ""), ("c", vec![], "ok")], "nothing of the one that was removed");
        assert_eq!(due, None);
    }

    #[test]
    fn what_breaks_again_and_again_is_kept_once() {
        let mut pending = Pending::default();
        for count in 1..=100_u32 {
            pending.put(report("a", &[("one", &count.to_string())]).state(State::Ok));
            let (batch, _) = pending.take(Duration::ZERO);
            assert_eq!(settle(&mut pending, batch, &[(0, Code::Unavailable)], NOW), (0, 1));
            assert_eq!(pending.again.len(), 1);
        }
        let (batch, _) = pending.take(NOW);
        assert_eq!((batch.len(), says(&batch[0]), batch[0].refusals), (1, vec![("one", "100")], 0));
    }

    #[test]
    fn what_is_newly_said_is_not_given_up_for_what_was_refused_before() {
        let mut pending = Pending::default();
        let refused = Report { refusals: ATTEMPTS - 1, ..report("a", &[]).state(State::Ok) };
        for (newer, refusals) in
            [(report("a", &[("one", "1")]), ATTEMPTS - 1), (report("a", &[]).state(State::Offline), 0)]
        {
            pending.put(newer);
            pending.put_under(refused.clone());
            assert_eq!(pending.take(NOW).0[0].refusals, refusals);
        }
    }

    #[test]
    fn a_call_is_of_so_many_devices_and_bytes_or_of_one() {
        let mut pending = Pending::default();
        let (devices, bytes) = TOGETHER;
        for number in 0..=devices {
            pending.put(report(&number.to_string(), &[("p", "1")]));
        }
        assert_eq!(pending.take(NOW).0.len(), devices);
        let long = "x".repeat(bytes);
        pending.put(report("long", &[("p", &long)]));
        pending.put(report("short", &[("p", "1")]));
        for name in [devices.to_string().as_str(), "long", "short"] {
            let (batch, _) = pending.take(NOW);
            assert_eq!((batch.len(), &*batch[0].said.device_name), (1, name));
        }
        assert!(pending.order.is_empty() && pending.reports.is_empty());
    }

    #[test]
    fn a_refused_report_keeps_what_does_not_come_again_and_not_for_ever() {
        let mut refused = report("a", &[("two", "2")]).state(State::Ok);
        refused.property("one", sample("1"), sample("1"));
        for _ in 1..ATTEMPTS {
            refused = refused.lasting().unwrap();
            assert_eq!(says(&refused), [("one", "")]);
        }
        assert!(refused.lasting().is_none());
        assert!(report("a", &[("two", "2")]).lasting().is_none());
    }
}
