//! Datagrams through the relay: what a NAT and a line with a small buffer do with them.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::RngExt as _;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::{Counters, Direction, Flow, Limit, Line, flow, turned};

/// The longest datagram.
const LONGEST: usize = 64 << 10;
/// How long a datagram may wait for the line; one that would wait longer is lost.
const LONGEST_WAIT: Duration = Duration::from_millis(400);
/// Datagrams on their way at a time.
const MOST: usize = 16 << 10;

/// A client, as a NAT knows it.
struct Mapping {
    target: SocketAddr,
    far: Arc<UdpSocket>,
    /// [`Line::generation`] when it came.
    generation: u64,
    /// What it may carry, whatever its port.
    limit: Arc<Limit>,
    /// [`Line::rebindings`] when `far` was made.
    rebindings: u64,
    answers: tokio::task::JoinHandle<()>,
}

/// One direction of the line, which all clients share.
struct Lane {
    direction: Direction,
    busy_until: Instant,
    departures: mpsc::Sender<Departure>,
}

/// A datagram on its way.
struct Departure {
    at: Instant,
    datagram: Vec<u8>,
    socket: Arc<UdpSocket>,
    /// Where to, if the socket is not connected.
    to: Option<SocketAddr>,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.answers.abort();
    }
}

/// What the answers of all clients share.
struct Nat {
    near: Arc<UdpSocket>,
    down: Arc<tokio::sync::Mutex<Lane>>,
    line: watch::Receiver<Line>,
    counters: Arc<Counters>,
}

/// Passes datagrams while the line is open.
pub(super) async fn serve(
    mut near: UdpSocket,
    target: SocketAddr,
    mut line: watch::Receiver<Line>,
    counters: Arc<Counters>,
) -> anyhow::Result<()> {
    let address = near.local_addr()?;
    loop {
        tokio::select! {
            () = relay(near, target, line.clone(), counters.clone()) => {}
            closed = turned(&mut line, true) => closed?,
        }
        turned(&mut line, false).await?;
        near = loop {
            match UdpSocket::bind(address).await {
                Ok(near) => break near,
                // What was on its way when it was closed still holds the old one.
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => return Err(error.into()),
            }
        };
    }
}

async fn relay(near: UdpSocket, target: SocketAddr, line: watch::Receiver<Line>, counters: Arc<Counters>) {
    let near = Arc::new(near);
    let down = Arc::new(tokio::sync::Mutex::new(Lane::new(Direction::Down)));
    let nat = Nat { near: near.clone(), down, line: line.clone(), counters: counters.clone() };
    let mut up = Lane::new(Direction::Up);
    let mut clients: HashMap<SocketAddr, Mapping> = HashMap::new();
    let mut buffer = vec![0; LONGEST];
    loop {
        let Ok((bytes, client)) = near.recv_from(&mut buffer).await else { continue };
        let now = *line.borrow();
        let mapping = match clients.get(&client) {
            Some(mapping) if mapping.rebindings == now.rebindings => None,
            Some(mapping) => {
                Some(nat.map(client, mapping.target, mapping.generation, now.rebindings, mapping.limit.clone()).await)
            }
            None if now.refuse => continue,
            None => {
                counters.connections.fetch_add(1, Ordering::Relaxed);
                let target = now.elsewhere.unwrap_or(target);
                Some(nat.map(client, target, now.generation, now.rebindings, Arc::new(Limit::new(now.most))).await)
            }
        };
        match mapping {
            Some(Ok(mapping)) => drop(clients.insert(client, mapping)),
            // Out of sockets: the datagram is lost.
            Some(Err(_)) => continue,
            None => {}
        }
        let is_known = |mapping: &&Mapping| mapping.generation == now.generation;
        if let Some(mapping) = clients.get(&client).filter(is_known)
            && mapping.limit.take(bytes) == bytes
        {
            up.send(&now, &buffer[..bytes], &mapping.far, None, &counters);
        }
    }
}

impl Nat {
    async fn map(
        &self,
        client: SocketAddr,
        target: SocketAddr,
        generation: u64,
        rebindings: u64,
        limit: Arc<Limit>,
    ) -> std::io::Result<Mapping> {
        // A NAT with two addresses: which one somebody has changes with each rebinding.
        let local = Ipv4Addr::new(127, 0, 0, if rebindings.is_multiple_of(2) { 1 } else { 2 });
        let far = Arc::new(UdpSocket::bind((local, 0)).await?);
        far.connect(target).await?;
        let (near, down, from) = (self.near.clone(), self.down.clone(), far.clone());
        let (line, counters) = (self.line.clone(), self.counters.clone());
        let carried = limit.clone();
        let answers = tokio::spawn(async move {
            let mut buffer = vec![0; LONGEST];
            loop {
                let Ok(bytes) = from.recv(&mut buffer).await else { continue };
                let now = *line.borrow();
                if now.generation == generation && carried.take(bytes) == bytes {
                    down.lock().await.send(&now, &buffer[..bytes], &near, Some(client), &counters);
                }
            }
        });
        Ok(Mapping { target, far, generation, limit, rebindings, answers })
    }
}

impl Lane {
    fn new(direction: Direction) -> Self {
        let (departures, mut departing) = mpsc::channel(MOST);
        tokio::spawn(async move {
            while let Some(Departure { at, datagram, socket, to }) = departing.recv().await {
                sleep_until(at).await;
                // A datagram may be lost.
                match to {
                    Some(to) => socket.send_to(&datagram, to).await.ok(),
                    None => socket.send(&datagram).await.ok(),
                };
            }
        });
        Self { direction, busy_until: Instant::now(), departures }
    }

    fn send(
        &mut self,
        line: &Line,
        datagram: &[u8],
        socket: &Arc<UdpSocket>,
        to: Option<SocketAddr>,
        counters: &Counters,
    ) {
        let now = Instant::now();
        if matches!(self.direction, Direction::Up) {
            counters.tried.fetch_add(1, Ordering::Relaxed);
        }
        if line.no_udp || flow(line, self.direction) != Flow::Pass || rand::rng().random_bool(line.loss) {
            return;
        }
        let mut at = now.max(self.busy_until);
        if let Some(nanos) = (datagram.len() as u64 * 1_000_000_000).checked_div(line.bandwidth) {
            if at.duration_since(now) > LONGEST_WAIT {
                return;
            }
            at += Duration::from_nanos(nanos);
            self.busy_until = at;
        }
        counters.segments.fetch_add(1, Ordering::Relaxed);
        counters.datagrams.fetch_add(1, Ordering::Relaxed);
        match self.direction {
            Direction::Up => counters.up.fetch_add(datagram.len() as u64, Ordering::Relaxed),
            Direction::Down => counters.down.fetch_add(datagram.len() as u64, Ordering::Relaxed),
        };
        let (at, datagram, socket) = (at + line.latency, datagram.to_vec(), socket.clone());
        self.departures.try_send(Departure { at, datagram, socket, to }).ok();
    }
}
