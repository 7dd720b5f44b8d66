//! All nodes, and what they are told to do.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use rustls::ClientConfig;
use serde_json::json;
use tokio::sync::watch;

use super::dial::{Dialler, Transport};
use super::node::{Node, Seen};
use super::{Answer, Command, PODS, SHARED, Status, join, objects};
use crate::api::{Api, CORE, Connection};

/// Joins at once: cloudcore takes 64.
const JOINS: usize = 24;
/// Connections over which objects are created.
const WRITERS: usize = 24;

/// What a fleet needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many nodes.
    pub nodes: usize,
    /// Where cloudcore is.
    pub cloud: SocketAddr,
    /// What carries their sessions.
    pub transport: Transport,
    /// The kubeconfig with all rights.
    pub kubeconfig: PathBuf,
}

/// All nodes.
pub struct Fleet {
    options: Options,
    configs: Vec<Arc<ClientConfig>>,
    seen: Vec<Arc<Seen>>,
    begun: Instant,
    generation: watch::Sender<u64>,
    troubles: Arc<Troubles>,
    round: u64,
}

/// What went wrong, counted by cause.
#[derive(Debug, Default)]
pub(super) struct Troubles(Mutex<BTreeMap<String, u64>>);

impl Troubles {
    pub(super) fn note(&self, what: &str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(what.to_owned()).or_default() += 1;
    }
}

impl Fleet {
    /// None of them has joined yet.
    pub fn new(options: Options) -> Self {
        let seen = (0..options.nodes).map(|_| Arc::default()).collect();
        Self {
            options,
            configs: Vec::new(),
            seen,
            begun: Instant::now(),
            generation: watch::Sender::new(0),
            troubles: Arc::default(),
            round: 0,
        }
    }

    /// Does what it is told; the line that answers it.
    pub async fn obey(&mut self, command: Command) -> Result<String> {
        let begin = Instant::now();
        let done = match command {
            Command::Status => return Ok(serde_json::to_string(&self.status())?),
            Command::Join { token } => self.join(&token).await,
            Command::Populate => self.populate().await,
            Command::Touch => self.touch().await,
            Command::Dial => self.dial(),
            Command::Drop => {
                self.generation.send_modify(|generation| *generation += 1);
                // What is asked next must not see sessions that are about to be reset.
                for seen in &self.seen {
                    seen.in_sync.store(false, Ordering::Relaxed);
                }
                Ok(())
            }
        };
        let error = done.err().map(|error| format!("{error:#}"));
        Ok(serde_json::to_string(&Answer { error, seconds: begin.elapsed().as_secs_f64() })?)
    }

    async fn join(&mut self, token: &str) -> Result<()> {
        let cloud = self.options.cloud;
        let joins = (0..self.options.nodes).map(|index| {
            let token = token.to_owned();
            async move { tokio::spawn(async move { join::join(cloud, &token, index).await }).await? }
        });
        self.configs = stream::iter(joins).buffered(JOINS).try_collect().await?;
        Ok(())
    }

    async fn populate(&self) -> Result<()> {
        let api = Api::of(&self.options.kubeconfig)?;
        api.connect().await?.create(&format!("{CORE}/configmaps"), &objects::config_map(SHARED, 0)).await?;
        let nodes = self.options.nodes;
        let writers = (0..WRITERS).map(|writer| {
            let api = &api;
            async move {
                let mut connection = api.connect().await?;
                for index in (writer..nodes).step_by(WRITERS) {
                    populate_one(&mut connection, &objects::name(index)).await?;
                }
                Ok::<_, anyhow::Error>(())
            }
        });
        stream::iter(writers).buffer_unordered(WRITERS).try_collect().await
    }

    async fn touch(&mut self) -> Result<()> {
        self.round += 1;
        let data = json!({"data": objects::config_map(SHARED, self.round)["data"]});
        Api::of(&self.options.kubeconfig)?.connect().await?.merge(&format!("{CORE}/configmaps/{SHARED}"), &data).await
    }

    fn dial(&self) -> Result<()> {
        for (index, (config, seen)) in self.configs.iter().zip(&self.seen).enumerate() {
            let node = Node {
                index,
                cloud: self.options.cloud,
                dialler: Dialler::new(self.options.transport, config).context("a node cannot dial")?,
                seen: seen.clone(),
                generation: self.generation.subscribe(),
                begun: self.begun,
                troubles: self.troubles.clone(),
            };
            tokio::spawn(node.run());
        }
        Ok(())
    }

    fn status(&self) -> Status {
        let mut versions: BTreeMap<u64, usize> = BTreeMap::new();
        let mut status = Status::default();
        for seen in &self.seen {
            if let since @ 1.. = seen.established.load(Ordering::Relaxed) {
                status.established += 1;
                let stood = self.begun.elapsed().saturating_sub(Duration::from_millis(since));
                status.oldest = status.oldest.max(stood.as_secs_f64());
            }
            status.in_sync += usize::from(seen.in_sync.load(Ordering::Relaxed));
            status.reported += usize::from(seen.reported.load(Ordering::Relaxed));
            status.applied += seen.applied.load(Ordering::Relaxed);
            *versions.entry(seen.shared.load(Ordering::Relaxed)).or_default() += 1;
        }
        // Versions have no order: the one most nodes hold is told, and the caller waits for another than before.
        if let Some((version, count)) = versions.into_iter().max_by_key(|(_, count)| *count) {
            (status.version, status.newest) = (version, count);
        }
        status.troubles.clone_from(&self.troubles.0.lock().unwrap_or_else(PoisonError::into_inner));
        status
    }
}

async fn populate_one(connection: &mut Connection, name: &str) -> Result<()> {
    connection.create(&format!("{CORE}/configmaps"), &objects::config_map(name, 0)).await?;
    connection.create(&format!("{CORE}/secrets"), &objects::secret(name)).await?;
    for number in 0..PODS {
        connection
            .create(&format!("{CORE}/pods"), &objects::pod(name, number))
            .await
            .with_context(|| format!("pod {number} of {name}"))?;
    }
    Ok(())
}
