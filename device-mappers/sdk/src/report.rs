//! Reports to edgecore: values, states and written desired values.
//!
//! What waits is the latest of each property, so it is bounded by the devices there are, however long edgecore is away or however slow it
//! answers. A device's reports stay in order: each device belongs to one of a few lanes, and a lane has one call in flight.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use skerry_proto::dmi;
use skerry_proto::dmi::device_manager_service_client::DeviceManagerServiceClient;
use tokio::sync::{Notify, watch};
use tonic::transport::Channel;
use tracing::{debug, warn};

use crate::counters::COUNTERS;
use crate::health::State;

/// Calls in flight at most: enough that a busy machine, where each takes tens of milliseconds, keeps up with a thousand devices.
const LANES: usize = 16;
/// How long a call may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often a state or a written desired value that was refused is sent again, with [`PAUSE`] between.
const ATTEMPTS: u32 = 10;
/// After a refusal.
const PAUSE: Duration = Duration::from_secs(1);

pub(crate) type Edge = DeviceManagerServiceClient<Channel>;

/// The way to edgecore.
#[derive(Debug)]
pub(crate) struct Reports {
    lanes: Vec<Lane>,
    edge: watch::Sender<Option<Edge>>,
    /// Grows with every registration: whoever sees it change tells everything again.
    epoch: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Lane {
    pending: Mutex<Pending>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    order: VecDeque<String>,
    reports: HashMap<String, Report>,
}

/// What is to be told of one device.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) twins: Vec<dmi::Twin>,
    pub(crate) state: Option<State>,
    refusals: u32,
}

impl Report {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned(), ..Self::default() }
    }

    /// What is newer wins.
    fn merge(&mut self, newer: Self) {
        for twin in newer.twins {
            match self.twins.iter_mut().find(|older| older.property_name == twin.property_name) {
                Some(older) => {
                    if twin.reported.is_some() {
                        older.reported = twin.reported;
                    }
                    if twin.observed_desired.is_some() {
                        older.observed_desired = twin.observed_desired;
                    }
                }
                None => self.twins.push(twin),
            }
        }
        if newer.state.is_some() {
            self.state = newer.state;
        }
    }

    /// What has to arrive: newer values follow by themselves, these do not.
    fn lasting(mut self) -> Option<Self> {
        self.refusals += 1;
        self.twins.retain_mut(|twin| {
            twin.reported = None;
            twin.observed_desired.is_some()
        });
        (self.refusals < ATTEMPTS && (self.state.is_some() || !self.twins.is_empty())).then_some(self)
    }
}

impl Reports {
    pub(crate) fn new() -> Self {
        Self {
            lanes: (0..LANES).map(|_| Lane::default()).collect(),
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
    pub(crate) fn put(&self, device: &str, seed: u64, report: Report) {
        if report.twins.is_empty() && report.state.is_none() {
            return;
        }
        #[allow(clippy::cast_possible_truncation)] // of a hash
        let lane = &self.lanes[seed as usize % LANES];
        lane.lock().put(device.to_owned(), report);
        lane.wake.notify_one();
    }

    /// Forgets what waits of a device that was removed.
    pub(crate) fn forget(&self, device: &str) {
        for lane in &self.lanes {
            lane.lock().reports.remove(device);
        }
    }

    /// Sends, for as long as it is polled.
    pub(crate) async fn run(&self) {
        futures_util::future::join_all(self.lanes.iter().map(|lane| lane.run(self.edge.subscribe()))).await;
    }
}

impl Pending {
    fn put(&mut self, device: String, report: Report) {
        if let Some(waiting) = self.reports.get_mut(&device) {
            waiting.merge(report);
            return;
        }
        self.order.push_back(device.clone());
        self.reports.insert(device, report);
    }

    fn take(&mut self) -> Option<(String, Report)> {
        loop {
            let device = self.order.pop_front()?;
            if let Some(report) = self.reports.remove(&device) {
                return Some((device, report));
            }
        }
    }

    /// What could not be sent, under what came since.
    fn put_back(&mut self, device: String, mut older: Report) {
        match self.reports.remove(&device) {
            Some(newer) => {
                older.merge(newer);
                self.reports.insert(device, older);
            }
            None => self.put(device, older),
        }
    }
}

impl Lane {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(&self, mut edges: watch::Receiver<Option<Edge>>) {
        loop {
            let Some(mut edge) = edges.borrow_and_update().clone() else {
                if edges.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let taken = self.lock().take();
            let Some((device, report)) = taken else {
                self.wake.notified().await;
                continue;
            };
            match send(&mut edge, &report).await {
                Ok(()) => COUNTERS.reports_total.add(1),
                Err(status) => {
                    COUNTERS.report_failures_total.add(1);
                    if gone(&status) {
                        debug!(device, error = status.message(), "a report waits for edgecore");
                        self.lock().put_back(device, report);
                        let _ = tokio::time::timeout(PAUSE, edges.changed()).await;
                    } else {
                        warn!(device, code = ?status.code(), error = status.message(), "edgecore refused a report");
                        if let Some(lasting) = report.lasting() {
                            self.lock().put_back(device, lasting);
                        }
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        }
    }
}

/// Whether it is the connection that failed, not the report.
fn gone(status: &tonic::Status) -> bool {
    matches!(status.code(), tonic::Code::Unavailable | tonic::Code::Cancelled | tonic::Code::DeadlineExceeded)
        || std::error::Error::source(status).is_some()
}

async fn send(edge: &mut Edge, report: &Report) -> Result<(), tonic::Status> {
    if !report.twins.is_empty() {
        let request = dmi::ReportDeviceStatusRequest {
            device_name: report.name.clone(),
            device_namespace: report.namespace.clone(),
            reported_device: Some(dmi::DeviceStatus { twins: report.twins.clone(), ..dmi::DeviceStatus::default() }),
        };
        deadline(edge.report_device_status(request)).await?;
    }
    if let Some(state) = report.state {
        let request = dmi::ReportDeviceStatesRequest {
            device_name: report.name.clone(),
            device_namespace: report.namespace.clone(),
            state: state.name().to_owned(),
        };
        deadline(edge.report_device_states(request)).await?;
    }
    Ok(())
}

pub(crate) async fn deadline<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, tonic::Status> {
    match tokio::time::timeout(DEADLINE, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(tonic::Status::deadline_exceeded("no answer within 5 s")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn twin(property: &str, value: &str) -> dmi::Twin {
        let reported = Some(dmi::TwinProperty { value: value.to_owned(), ..dmi::TwinProperty::default() });
        dmi::Twin { property_name: property.to_owned(), reported, observed_desired: None }
    }

    fn report(twins: Vec<dmi::Twin>, state: Option<State>) -> Report {
        Report { twins, state, ..Report::default() }
    }

    fn value(twin: &dmi::Twin) -> &str {
        &twin.reported.as_ref().unwrap().value
    }

    #[test]
    fn what_waits_is_the_latest_of_each_property() {
        let mut pending = Pending::default();
        for count in 0..1000 {
            pending.put("a".into(), report(vec![twin("one", &count.to_string()), twin("two", "x")], None));
            pending.put("b".into(), report(vec![], Some(State::Ok)));
        }
        assert_eq!(pending.order.len(), 2);
        let (device, waiting) = pending.take().unwrap();
        assert_eq!((device.as_str(), waiting.twins.len(), value(&waiting.twins[0])), ("a", 2, "999"));
        pending.put("a".into(), report(vec![twin("one", "1000")], None));
        pending.put_back("a".into(), waiting);
        assert_eq!(pending.take().unwrap().0, "b");
        let (_, waiting) = pending.take().unwrap();
        assert_eq!((value(&waiting.twins[0]), value(&waiting.twins[1])), ("1000", "x"));
        assert!(pending.take().is_none());
    }

    #[test]
    fn a_refused_report_keeps_what_does_not_come_again_and_not_for_ever() {
        let mut written = twin("one", "1");
        written.observed_desired.clone_from(&written.reported);
        let mut refused = report(vec![written, twin("two", "2")], Some(State::Ok));
        for _ in 1..ATTEMPTS {
            refused = refused.lasting().unwrap();
            assert_eq!(refused.twins.len(), 1);
            assert!(refused.twins[0].reported.is_none());
        }
        assert!(refused.lasting().is_none());
        assert!(report(vec![twin("two", "2")], None).lasting().is_none());
    }
}
