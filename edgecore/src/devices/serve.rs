//! The module: fills the twins from the store and follows it, keeps notes, makes reports, and serves mappers.

use std::path::PathBuf;
use std::time::Duration;

use futures_util::future::join_all;
use skerry_proto::device::{DeviceModelSpec, DeviceSpec};
use skerry_proto::sync::{Collection, Report, ReportKind};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::twin::{MapperInfo, Note};
use super::{Devices, dmi, now};
use crate::link::{LinkState, ReportWanted};
use crate::store::{Error, Row};
use crate::supervise;

/// Kind of the notes of what was written at the box, by the Device's UID.
const TWIN_NOTES: &str = "device-twin";
/// Kind of the notes of mappers, by the path of their socket.
const MAPPER_NOTES: &str = "device-mapper";
/// Rows that are read at once.
const PAGE: usize = 256;
/// Between looks at what time brings about.
const TICK: Duration = Duration::from_secs(1);
/// Between attempts at a store that fails.
const RETRY: Duration = Duration::from_secs(5);
/// After more changes came than could be followed, until everything is read: there are more where they came from.
const SETTLE: Duration = Duration::from_millis(500);

/// What the module is given.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The handle it fills.
    pub devices: Devices,
    /// Where mappers find it; `None`: nowhere.
    pub socket: Option<PathBuf>,
    /// Reports are made while there is a link.
    pub link: watch::Receiver<LinkState>,
    /// What the cloud asks to be reported once more.
    pub wanted: broadcast::Sender<ReportWanted>,
    /// Ends it.
    pub shutdown: CancellationToken,
}

/// Until the shutdown.
pub async fn run(parts: Parts) {
    let Parts { devices, socket, mut link, wanted, shutdown } = parts;
    let mut changes = devices.0.store.changes();
    let mut wanted = wanted.subscribe();
    devices.lock().clear();
    let stop = shutdown.child_token();
    let _ends_with_us = stop.clone().drop_guard();
    while let Err(failed) = devices.load(&stop).await {
        error!(error = %failed, "devices cannot be read from the store yet");
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
    let server = socket.map(|path| {
        let (devices, stop) = (devices.clone(), stop.clone());
        supervise::spawn("dmi", dmi::serve(devices, path, stop))
    });
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut reread = None;
    loop {
        let is_busy = devices.lock().is_busy();
        let settled = async {
            match reread {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => break,
            change = changes.recv() => match change {
                Ok(change) => {
                    if matches!(change.collection, Collection::Devices | Collection::DeviceModels)
                        && let Err(failed) = devices.refresh(change.collection, &change.key, &change.uid).await
                    {
                        error!(error = %failed, "a device cannot be read from the store");
                        reread = Some(tokio::time::Instant::now() + RETRY);
                    }
                }
                Err(RecvError::Lagged(_)) => reread = Some(tokio::time::Instant::now() + SETTLE),
                Err(RecvError::Closed) => break,
            },
            () = settled => {
                reread = devices.reload().await.err().map(|failed| {
                    error!(error = %failed, "devices cannot be read from the store");
                    tokio::time::Instant::now() + RETRY
                });
            }
            again = wanted.recv() => match again {
                Ok((ReportKind::DeviceStatus, uid)) => devices.with(|twins, _| twins.report_again(&uid)),
                Err(RecvError::Lagged(_)) => devices.with(|twins, _| twins.report_again("")),
                Ok(_) => {}
                Err(RecvError::Closed) => break,
            },
            Ok(()) = link.changed() => {}
            _ = tick.tick(), if is_busy => {
                devices.with(|twins, now| twins.tick(now));
                devices.called_for();
            }
            () = devices.0.work.notified() => {}
        }
        if let Err(failed) = devices.keep().await {
            warn!(error = %failed, "what was written to devices cannot be kept yet");
        }
        devices.reread().await;
        if matches!(*link.borrow(), LinkState::Online { .. }) {
            devices.report().await;
        }
    }
    stop.cancel();
    if let Some(server) = server {
        // It ends with the token, and with it the connections.
        let _ = server.await;
    }
}

impl Devices {
    async fn load(&self, stop: &CancellationToken) -> Result<(), Error> {
        for (uid, note) in self.0.store.notes(TWIN_NOTES).await? {
            match serde_json::from_slice::<Note>(&note) {
                Ok(note) => self.lock().remember(&uid, note),
                Err(error) => warn!(%error, uid, "what was written to a device cannot be read and is forgotten"),
            }
        }
        self.reload().await?;
        self.lock().loaded();
        for (_, note) in self.0.store.notes(MAPPER_NOTES).await? {
            if let Ok(info) = serde_json::from_slice::<MapperInfo>(&note) {
                let address = info.address.clone();
                let id = self.with(|twins, now| twins.found(info, now));
                dmi::keep(self, id, &address, None, stop);
            }
        }
        Ok(())
    }

    /// Reads everything, a page at a time, and drops what is not there.
    async fn reload(&self) -> Result<(), Error> {
        let (mut devices, mut models) = self.lock().names();
        for (collection, known) in [(Collection::DeviceModels, &mut models), (Collection::Devices, &mut devices)] {
            let mut after = String::new();
            let mut there = std::collections::HashSet::new();
            loop {
                let rows = self.0.store.page(collection, &after, PAGE).await?;
                let Some(last) = rows.last() else { break };
                after.clone_from(&last.entry.uid);
                for row in &rows {
                    there.insert(row.entry.uid.clone());
                    self.take(collection, row);
                }
            }
            known.retain(|(_, uid)| !there.contains(&**uid));
        }
        self.with(|twins, now| {
            devices.iter().for_each(|(key, uid)| twins.device_gone(key, uid, now));
            models.iter().for_each(|(key, uid)| twins.model_gone(key, uid));
        });
        self.called_for();
        Ok(())
    }

    async fn refresh(&self, collection: Collection, key: &str, uid: &str) -> Result<(), Error> {
        match self.0.store.row(collection, uid).await? {
            Some(row) => self.take(collection, &row),
            None => self.with(|twins, now| match collection {
                Collection::Devices => twins.device_gone(key, uid, now),
                _ => twins.model_gone(key, uid),
            }),
        }
        self.called_for();
        Ok(())
    }

    fn take(&self, collection: Collection, row: &Row) {
        let entry = &row.entry;
        let taken = match collection {
            Collection::Devices => spec::<DeviceSpec>(row)
                .map(|spec| self.with(|twins, now| twins.device(&entry.key, &entry.uid, spec, now))),
            _ => {
                spec::<DeviceModelSpec>(row).map(|spec| self.with(|twins, _| twins.model(&entry.key, &entry.uid, spec)))
            }
        };
        if let Err(error) = taken {
            warn!(%error, key = entry.key, "a device or device model is not as the API has it, and is passed over");
        }
    }

    /// Devices whose model is another one.
    async fn reread(&self) {
        loop {
            let again = self.lock().take_rereads();
            if again.is_empty() {
                return;
            }
            for (key, uid) in again {
                if let Err(failed) = self.refresh(Collection::Devices, &key, &uid).await {
                    error!(error = %failed, "a device cannot be read from the store");
                }
            }
        }
    }

    /// Writes notes. When it returns, those of all that was written before are durable.
    pub(super) async fn keep(&self) -> Result<(), Error> {
        // One after the other: what this one finds taken has been written when it gets here.
        let _turn = self.0.keeping.lock().await;
        let (written, forgotten) = self.lock().take_notes();
        let mut result = Ok(());
        for (slot, uid, note) in written {
            let text = serde_json::to_vec(&note).unwrap_or_default();
            let kept = if note.is_empty() {
                self.0.store.forget(TWIN_NOTES, &uid).await
            } else {
                self.0.store.remember(TWIN_NOTES, &uid, text.into()).await
            };
            if kept.is_err() {
                self.lock().unkept(slot, &uid);
                result = kept;
            }
        }
        for uid in forgotten {
            self.0.store.forget(TWIN_NOTES, &uid).await?;
        }
        result
    }

    /// Remembers a mapper, so that it is found after a restart.
    pub(super) async fn keep_mapper(&self, info: &MapperInfo) {
        let note = serde_json::to_vec(info).unwrap_or_default();
        let kept = self.0.store.remember(MAPPER_NOTES, &info.address, note.into()).await;
        if let Err(failed) = kept {
            warn!(error = %failed, mapper = info.name, "the mapper will not be found after a restart");
        }
    }

    /// Forgets those that are no longer known.
    pub(super) async fn forget_mappers(&self) {
        let known: Vec<String> = self.lock().mappers().map(|(_, info)| info.address.clone()).collect();
        for (address, _) in self.0.store.notes(MAPPER_NOTES).await.unwrap_or_default() {
            if !known.contains(&address)
                && let Err(failed) = self.0.store.forget(MAPPER_NOTES, &address).await
            {
                debug!(error = %failed, "a mapper that is gone is still remembered");
            }
        }
    }

    /// Puts the reports that are due in the outbox, in one commit.
    async fn report(&self) {
        let mut due = Vec::new();
        while let Some(report) = self.lock().take_report(now()) {
            due.push(report);
        }
        let reports = due.iter().map(|due| {
            let (namespace, name) = due.key.split_once('/').unwrap_or_default();
            self.0.store.report(Report {
                id: 0,
                kind: ReportKind::DeviceStatus,
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                uid: due.uid.clone(),
                payload: serde_json::to_vec(&due.report).unwrap_or_default().into(),
            })
        });
        let results = join_all(reports).await;
        for (due, result) in due.iter().zip(results) {
            if let Err(failed) = result {
                warn!(error = %failed, device = due.key, "the device's status could not be kept");
                self.lock().report_again(&due.uid);
            }
        }
    }
}

/// The spec of an object.
pub(super) fn spec<T: serde::de::DeserializeOwned + Default>(row: &Row) -> serde_json::Result<T> {
    #[derive(serde::Deserialize)]
    struct Object<T: Default> {
        #[serde(default)]
        spec: T,
    }
    serde_json::from_slice::<Object<T>>(&row.json).map(|object| object.spec)
}
