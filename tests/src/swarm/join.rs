//! Joining as `edgecore join` does, one node after the other on each of some connections' worth of tasks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rcgen::{CertificateParams, KeyPair};
use rustls::ClientConfig;
use skerry_proto::payload::{JoinRequest, JoinResponse};

use super::objects;
use crate::api::client_config;
use crate::peer;

/// Joins as node number `index`; what its sessions are opened with.
pub(super) async fn join(cloud: SocketAddr, token: &str, index: usize) -> Result<Arc<ClientConfig>> {
    let key = KeyPair::generate()?;
    let request = JoinRequest {
        node: objects::name(index),
        csr: CertificateParams::new(Vec::new())?.serialize_request(&key)?.pem()?,
        machine_id: format!("{index:032x}"),
        labels: std::collections::BTreeMap::new(),
        time: time::OffsetDateTime::now_utc().unix_timestamp(),
    };
    let body = serde_json::to_vec(&request)?;
    let headers = format!("Authorization: Bearer {token}\r\n");
    for _ in 0..50 {
        let answer = peer::exchange(cloud, None, "/v1/join", &headers, &body);
        match tokio::time::timeout(Duration::from_secs(30), answer).await {
            Ok(Ok((200, answer))) => {
                let joined: JoinResponse = serde_json::from_slice(&answer)?;
                let config =
                    client_config(joined.ca.as_bytes(), joined.certificate.as_bytes(), key.serialize_pem().as_bytes())?;
                return Ok(Arc::new(config));
            }
            // Too many at once, or too slow a machine.
            Ok(Ok((408 | 503, _)) | Err(_)) | Err(_) => tokio::time::sleep(Duration::from_millis(500)).await,
            Ok(Ok((status, answer))) => bail!("{}: {status}: {}", request.node, String::from_utf8_lossy(&answer)),
        }
    }
    Err(anyhow::anyhow!("50 attempts")).with_context(|| format!("{} cannot join", request.node))
}
