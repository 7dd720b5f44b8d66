//! What is kept of one connection to a node's port.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::StatusCode;
use rustls::pki_types::CertificateDer;
use skerry_proto::streams::{End, Gone};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};

use super::No;
use crate::kubelet::ports::Door;
use crate::kubelet::relay::Upgrades;

/// One connection's state.
pub(super) struct Peer {
    pub(super) door: Arc<Door>,
    pub(super) of_node: Arc<Semaphore>,
    pub(super) certificates: Vec<CertificateDer<'static>>,
    /// Held from the first request that was authenticated.
    pub(super) place: Mutex<Option<[OwnedSemaphorePermit; 2]>>,
    /// A head has come.
    pub(super) asked: AtomicBool,
    pub(super) known: Notify,
    /// What the request at hand is on.
    pub(super) stream: watch::Sender<Option<Gone>>,
    pub(super) upgrades: Mutex<Option<Upgrades>>,
}

impl Peer {
    /// Waits until the stream that the request at hand is on has been broken off for this long, by the node or with its session. One that
    /// the node finished is no matter of time: what it said is let get to the client.
    pub(super) async fn stream_gone(&self, farewell: Duration) {
        let mut stream = self.stream.subscribe();
        loop {
            let gone = stream.borrow_and_update().clone();
            let gone = async {
                let Some(gone) = gone else { return std::future::pending().await };
                match gone.await {
                    End::Left | End::Finished(_) => std::future::pending().await,
                    End::Broken(_) => tokio::time::sleep(farewell).await,
                }
            };
            tokio::select! {
                () = gone => return,
                // The sender is this connection's.
                _ = stream.changed() => {}
            }
        }
    }

    /// Somebody is known here: the connection has its place from now on.
    pub(super) fn settle(&self, all: &Arc<Semaphore>) -> Result<(), No> {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        if place.is_none() {
            let permits = Arc::clone(&self.of_node)
                .try_acquire_owned()
                .and_then(|of_node| Ok([of_node, Arc::clone(all).try_acquire_owned()?]));
            let permits = permits.map_err(|_| {
                let message = format!("too many connections to node {}, try again later\n", self.door.node.name);
                No { status: StatusCode::SERVICE_UNAVAILABLE, message }
            })?;
            *place = Some(permits);
            self.known.notify_one();
        }
        Ok(())
    }
}
