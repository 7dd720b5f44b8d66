//! The kubelet: makes what the runtime holds of each pod agree with what the store says is wanted.
//!
//! Decisions are pure ([`plan`], [`status`], [`probe`]); what carries them out is thin ([`worker`], [`execute`]).

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{Semaphore, watch};
use tracing::{info, warn};

use self::cgroup::Cgroups;
use self::context::{Context, Parts as ContextParts, blocking, keep_events};
use self::images::Images;
use self::node_loop::NodeLoop;
use self::pods::Pods;
use self::volumes::Volumes;
use crate::app::KubeletParts;
use crate::config::Config;
use crate::runtime::Cri;
use crate::runtime::connect::socket_path;
use crate::stats::Stats;

pub mod admission;
pub mod backoff;
pub mod cgroup;
pub mod container_config;
pub mod context;
pub mod dirs;
pub mod dns;
pub mod env;
pub mod events;
pub mod execute;
pub mod expand;
pub mod field;
pub mod gather;
pub mod gc;
pub mod hooks;
pub mod hosts;
pub mod housekeeping;
pub mod image_gc;
pub mod images;
pub mod logs;
pub mod memory;
pub mod node;
pub mod node_loop;
pub mod observed;
mod panics;
pub mod plan;
pub mod pods;
pub mod ports;
pub mod probe;
pub mod prober;
pub mod probes;
pub mod quantity;
pub mod references;
pub mod resources;
pub mod sandbox_config;
pub mod security;
pub mod spec;
pub mod status;
pub mod volumes;
pub mod worker;

/// While the kubelet looks after pods it can be asked of them.
struct Measured<'a>(&'a watch::Sender<Option<Stats>>);

impl<'a> Measured<'a> {
    fn begin(stats: &'a watch::Sender<Option<Stats>>, context: Arc<Context>, runtime: PathBuf) -> Self {
        stats.send_replace(Some(Stats::new(context, runtime)));
        Self(stats)
    }
}

impl Drop for Measured<'_> {
    fn drop(&mut self) {
        self.0.send_replace(None);
    }
}

/// Runs the kubelet until shutdown.
pub async fn run(parts: KubeletParts) {
    let KubeletParts {
        store,
        config,
        devices,
        mqtt,
        link_state: link,
        wanted,
        reset,
        status,
        stats,
        runtime: channel,
        shutdown,
    } = parts;
    let cri = Cri::new(channel.clone());
    let volumes = Volumes::new(&config.pods_dir);
    prepare(&config, &volumes).await;
    let (node, mut news) = NodeLoop::new(store.clone(), cri.clone(), config.clone(), (devices, mqtt), status).await;
    let (context_sender, context_receiver) = watch::channel(None);
    let linked = link.clone();
    // In one task, so that a panic in either ends both, and the kubelet is started again as a whole.
    let node = node.run(link, wanted.subscribe(), context_receiver, shutdown.clone());
    let pods = async {
        // Nothing can be known or done of pods before the runtime has answered once.
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                up = news.runtime_up.wait_for(|up| *up) => if up.is_ok() { break } else { return },
                Some(request) = reset.next() => {
                    let answer = "the container runtime has not answered yet, so that pods cannot be stopped; start it";
                    // Whoever asked may be gone.
                    let _ = request.send(Err(answer.to_owned()));
                }
            }
        }
        let systemd = news.facts.borrow().systemd_cgroups;
        let (cgroups, machine) = blocking(move || (Cgroups::discover(systemd), node_loop::read_machine())).await;
        let cgroups = match cgroups {
            Ok(cgroups) => cgroups,
            Err(error) => {
                warn!(%error, "no pods without cgroups");
                return shutdown.cancelled().await;
            }
        };
        let sandbox_image = cri.setup().await.ok().and_then(|setup| setup.sandbox_image);
        let images = Images::new(cri.clone(), linked.clone());
        let (facts, network) = (news.facts.clone(), news.network.clone());
        let machine = resources::Machine { pods_memory: Some(facts.borrow().memory), ..machine };
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let sandbox_turns = Semaphore::new(cores + 1);
        let parts = ContextParts {
            store: store.clone(),
            cri: cri.clone(),
            volumes,
            cgroups,
            images,
            facts,
            machine,
            network,
            sandbox_turns,
        };
        let (context, events) = Context::new(parts, &config.node_name);
        let context = Arc::new(context);
        // There is a channel, so that it is one.
        let socket = socket_path(&config.runtime_endpoint).unwrap_or_default();
        let _measured = Measured::begin(&stats, context.clone(), socket);
        context_sender.send_replace(Some(context.clone()));
        let pods = Pods::new(context.clone()).run(
            crate::runtime::events(cri, channel),
            wanted.subscribe(),
            reset,
            shutdown.clone(),
        );
        let tidy = housekeeping::run(context, sandbox_image, shutdown.clone());
        tokio::select! {
            ((), ()) = async { tokio::join!(pods, tidy) } => {}
            () = keep_events(store, events) => {}
        }
    };
    tokio::join!(node, pods);
}

async fn prepare(config: &Config, volumes: &Volumes) {
    let (root, volumes) = (config.pods_dir.clone(), volumes.clone());
    let prepared = blocking(move || dirs::prepare_root(&root).and_then(|()| volumes.share())).await;
    match prepared {
        Ok(true) => {}
        Ok(false) => {
            info!("mounts of containers may not reach the box: there are mounts below the pods' directory already")
        }
        Err(error) => warn!(%error, "the pods' directory cannot be prepared"),
    }
}
