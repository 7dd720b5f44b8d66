//! What the link of one edge node carries, and what lies on its disk for it.
//!
//! Everything is real: edgecore with containerd, cloudcore, the apiserver, and between the two a relay that counts. What the wire would
//! carry is estimated from what passes: headers of IP and TCP for each piece of a segment's size, and as much again for its
//! acknowledgement; headers of IP and UDP for each datagram, among which are QUIC's acknowledgements.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rand::RngExt as _;
use serde_json::{Value, json};
use skerry_tests::cloudcore::Cloudcore;
use skerry_tests::edge::Edge;
use skerry_tests::images::BUSYBOX_NEXT;
use skerry_tests::kubectl::{Kubectl, is_ready};
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::relay::{Flow, Relay};
use skerry_tests::wait::{eventually, until};
use skerry_tests::{peer, procfs};

use crate::bed::{Bed, NODE};
use crate::control;
use crate::figures::{megabytes, tell};

/// The transports that are measured, and what edgecore's configuration calls them.
const SUBJECTS: [(&str, &str); 2] = [("ws", "websocket"), ("quic", "quic")];
/// What is given to things to calm down.
const SETTLE: Duration = Duration::from_secs(30);
/// The same before counting begins: what looks at new directories once a minute, whose time of access is written then, has been there.
const CALM: Duration = Duration::from_secs(90);
/// Nothing passed for so long: what was begun is over.
const QUIET: Duration = Duration::from_secs(4);
/// IPv4 and TCP headers with timestamps, of a segment and of its acknowledgement.
const HEADERS: u64 = 2 * 52;
/// IPv4 and UDP headers.
const DATAGRAM_HEADERS: u64 = 28;
const ROUNDS: usize = 5;
const DAY: f64 = 86_400.0;

pub(crate) fn run(dir: &Path, idle: Duration) -> Result<()> {
    SUBJECTS.into_iter().try_for_each(|(subject, _)| control::run(subject))?;
    let Bed { edge, relay, cloud, kubectl, control: _control, runtime: _runtime } = Bed::start(dir, &[])?;
    let mut link = Link { cloud, relay, edge, kubectl, subject: "" };
    for (subject, transport) in SUBJECTS {
        link.take(subject, transport)?;
        link.idle(idle)?;
        link.reconnect()?;
        link.config_map()?;
        link.image()?;
        link.silence()?;
    }
    link.edge.stop();
    Ok(())
}

struct Link {
    cloud: Cloudcore,
    relay: Relay,
    edge: Edge,
    kubectl: Kubectl,
    subject: &'static str,
}

impl Link {
    /// From an empty node, over this transport.
    fn take(&mut self, subject: &'static str, transport: &str) -> Result<()> {
        eprintln!("the link is carried by {transport}");
        self.subject = subject;
        self.kubectl.run(&["delete", "pods", "--all", "--force", "--grace-period=0"])?;
        self.edge.configure("transport", transport)?;
        self.edge.stop();
        self.edge.start()?;
        until("the session to stand", 60, || self.connected())
    }

    /// Eleven pods that sleep, and nothing to say.
    fn idle(&self, time: Duration) -> Result<()> {
        self.pods(0, 11)?;
        eprintln!("{} s to settle, then {} s of counting", CALM.as_secs(), time.as_secs());
        sleep(CALM);
        let pid = self.edge.pid().context("edgecore does not run")?;
        let written = || procfs::written_bytes(pid).context("/proc tells nothing of what edgecore writes");
        let (begin, before, disk) = (Instant::now(), self.wire(), written()?);
        sleep(time);
        let days = begin.elapsed().as_secs_f64() / DAY;
        let (wire, disk) = (self.wire() - before, written()? - disk);
        eprintln!("{wire} bytes on the wire, {disk} bytes written");
        tell("link.idle.day", self.subject, megabytes(wire) / days, "MB");
        tell("store.flash.day", self.subject, megabytes(disk) / days, "MB");
        Ok(())
    }

    /// The connection is reset, and nothing has changed.
    fn reconnect(&self) -> Result<()> {
        self.pods(11, 20)?;
        sleep(SETTLE);
        let handshake = self.handshake()?;
        let (mut bytes, mut times) = (Vec::new(), Vec::new());
        for round in 1..=ROUNDS {
            let (syncs, connections) = (self.syncs()?, self.relay.connections());
            let before = self.relay.bytes();
            self.relay.reset();
            spin("a new connection", || Ok(self.relay.connections() > connections))?;
            let begin = Instant::now();
            spin("the session to be in sync", || Ok(self.syncs()? > syncs))?;
            times.push(begin.elapsed().as_secs_f64());
            self.quiet()?;
            let (up, down) = self.relay.bytes();
            eprintln!(
                "round {round}: {} bytes up, {} down, of them {handshake} for TLS",
                up - before.0,
                down - before.1
            );
            bytes.push((up + down - before.0 - before.1).saturating_sub(handshake));
        }
        bytes.sort_unstable();
        times.sort_by(f64::total_cmp);
        tell("link.reconnect.bytes", self.subject, whole(bytes[ROUNDS / 2]), "B");
        tell("link.reconnect.s", self.subject, times[ROUNDS / 2], "s");
        Ok(())
    }

    /// What a TLS handshake with a node's certificate costs, by doing nothing else.
    fn handshake(&self) -> Result<u64> {
        let joined = peer::join(self.cloud.address(), &self.cloud.new_token(&[])?.token, "peer", "bench")?;
        let identity = joined.map_err(|refusal| anyhow::anyhow!("{}", refusal.message))?;
        let (up, down) = self.relay.bytes();
        let shake = if self.subject == "quic" { peer::quic_handshake } else { peer::handshake };
        shake(self.relay.address(), &identity)?;
        self.quiet()?;
        let after = self.relay.bytes();
        self.kubectl.delete("node", "peer")?;
        Ok(after.0 + after.1 - up - down)
    }

    /// One byte of a hundred kibibytes changes.
    fn config_map(&self) -> Result<()> {
        let mut noise = vec![0_u8; 75 << 10];
        rand::rng().fill(noise.as_mut_slice());
        let mut text = STANDARD.encode(noise);
        let map = |text: &str| {
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "large"}, "data": {"text": text}})
                .to_string()
        };
        self.kubectl.apply(&map(&text))?;
        let mut pod = sleeper("reader", NODE, false);
        pod["spec"]["volumes"] = json!([{"name": "large", "configMap": {"name": "large"}}]);
        pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "large", "mountPath": "/large"}]);
        self.kubectl.apply(&pod.to_string())?;
        self.kubectl.wait("pod", "reader", "Ready", 60, is_ready)?;
        self.quiet()?;
        let middle = text.len() / 2;
        let other = if text.as_bytes()[middle] == b'A' { "B" } else { "A" };
        text.replace_range(middle..=middle, other);
        let before = self.relay.bytes();
        self.kubectl.apply(&map(&text))?;
        until("the change to pass", 30, || Ok(self.relay.bytes().1 > before.1))?;
        self.quiet()?;
        let after = self.relay.bytes();
        eprintln!("{} bytes up, {} down", after.0 - before.0, after.1 - before.1);
        tell("link.configmap.1byte", self.subject, whole(after.0 + after.1 - before.0 - before.1), "B");
        Ok(())
    }

    /// A pod gets another image: what comes down until the edge acknowledges it.
    fn image(&self) -> Result<()> {
        self.quiet()?;
        let before = self.relay.bytes();
        self.kubectl.run(&["set", "image", "pod/pod-0", &format!("main={BUSYBOX_NEXT}")])?;
        let down = eventually("the change to be acknowledged", 30, || {
            let (up, down) = self.relay.bytes();
            Ok((up > before.0).then_some(down - before.1))
        });
        // The first look may be late: then a status that went up was answered too.
        tell("link.image.bump", self.subject, whole(down?), "B");
        Ok(())
    }

    /// Bytes go nowhere and the sockets stay open: until both sides know.
    fn silence(&self) -> Result<()> {
        let mut worst = 0.0_f64;
        for (name, up, down) in [
            ("both ways", Flow::Swallow, Flow::Swallow),
            ("up", Flow::Swallow, Flow::Pass),
            ("down", Flow::Pass, Flow::Swallow),
        ] {
            until("the session to stand", 90, || Ok(self.sessions()? == 1.0 && self.connected()?))?;
            sleep(QUIET);
            let begin = Instant::now();
            self.relay.set(|line| (line.up, line.down) = (up, down));
            let (mut cloud, mut edge) = (None, None);
            while cloud.is_none() || edge.is_none() {
                let passed = begin.elapsed().as_secs_f64();
                ensure!(
                    passed < 120.0,
                    "nothing {name} for two minutes, noticed by cloudcore {cloud:?}, by edgecore {edge:?}"
                );
                if cloud.is_none() && self.sessions()? == 0.0 {
                    cloud = Some(passed);
                }
                if edge.is_none() && !self.connected()? {
                    edge = Some(passed);
                }
                sleep(Duration::from_millis(100));
            }
            eprintln!("nothing {name}: noticed by cloudcore after {cloud:?} s, by edgecore after {edge:?} s");
            worst = worst.max(cloud.unwrap_or_default()).max(edge.unwrap_or_default());
            self.relay.heal();
        }
        tell("link.dead.s", self.subject, worst, "s");
        Ok(())
    }

    fn pods(&self, from: usize, to: usize) -> Result<()> {
        let pods: Vec<Value> = (from..to).map(|number| sleeper(&format!("pod-{number}"), NODE, true)).collect();
        self.kubectl.apply(&list(&pods))?;
        until("the pods to be ready", 90, || {
            Ok(self.kubectl.list("pods", "app=sleeper")?.iter().filter(|pod| is_ready(pod)).count() == to)
        })
    }

    fn wire(&self) -> u64 {
        let (up, down) = self.relay.bytes();
        let (segments, datagrams) = (self.relay.segments(), self.relay.datagrams());
        up + down + (segments - datagrams) * HEADERS + datagrams * DATAGRAM_HEADERS
    }

    /// Waits until nothing has passed for a while.
    fn quiet(&self) -> Result<()> {
        let (mut last, mut since) = (self.relay.bytes(), Instant::now());
        until("silence on the link", 120, || {
            let now = self.relay.bytes();
            if now != last {
                (last, since) = (now, Instant::now());
            }
            Ok(since.elapsed() >= QUIET)
        })
    }

    fn connected(&self) -> Result<bool> {
        Ok(self.edge.status()?.to_lowercase().contains("online for"))
    }

    fn syncs(&self) -> Result<f64> {
        self.cloud.metric("skerry_session_syncs_total")
    }

    fn sessions(&self) -> Result<f64> {
        self.cloud.metric("skerry_sessions")
    }
}

/// As [`until`], without its pauses.
fn spin(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while !holds()? {
        ensure!(begin.elapsed() < Duration::from_secs(90), "waited 90 s for {what}");
        sleep(Duration::from_millis(2));
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "bytes of one exchange")]
fn whole(bytes: u64) -> f64 {
    bytes as f64
}
