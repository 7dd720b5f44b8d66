//! The kubelets of edge nodes as the cluster sees them: a port here for each node, from which every request goes on over the node's
//! session.
//!
//! It authenticates and authorises as a kubelet does, so that the edge need not: nobody gets at a node through here whom the apiserver
//! does not let. A request to one node's port never reaches another node. What the node answers is passed on as it is.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use skerry_proto::streams::Streams;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::authn::ClientAuthorities;
use self::metrics::Metrics;
pub use self::ports::Ports;
pub(crate) use self::ports::Shown;
use self::reviews::ApiserverReviews;
use self::server::{Limits, Server};
pub use self::serving::ServingCertificate;
use crate::apiserver::Apiserver;
use crate::pki::CaError;
use crate::supervise;

mod authn;
mod authz;
mod cache;
mod metrics;
mod ports;
pub(crate) mod publish;
mod relay;
mod reviews;
mod server;
mod serving;
mod spdy;
#[cfg(test)]
mod tests;
mod tls;
mod websocket;

/// What cloudcore's back has for the endpoint: the ports, and whom to ask.
#[derive(Clone)]
pub struct Kubelets {
    pub(crate) ports: Arc<Ports>,
    pub(crate) api: Apiserver,
    pub(crate) client: kube::Client,
}

impl Kubelets {
    /// Serves every node's port until told to stop, by the certificate; `find` finds a node's session.
    pub fn start(
        self,
        certificate: Arc<ServingCertificate>,
        find: impl Fn(&str) -> Option<Streams> + Send + Sync + 'static,
        registry: &mut Registry,
        drain: Duration,
        stop: CancellationToken,
    ) -> Result<JoinHandle<()>, CaError> {
        let Self { ports, api, client } = self;
        let tls = tls::config(Arc::clone(&certificate))?;
        let authorities = Arc::new(ClientAuthorities::default());
        let asked = (Arc::clone(&authorities), ApiserverReviews(api.clone()));
        let server = Server::new(ports, tls, asked, find, (Metrics::new(registry), Limits::default()), stop);
        Ok(supervise::spawn("kubelets", async move {
            let follow = reviews::follow_client_ca(client.clone(), api, authorities);
            tokio::select! {
                () = server.serve(drain) => {}
                () = follow => {}
                () = certificate.follow(client) => {}
            }
        }))
    }
}
