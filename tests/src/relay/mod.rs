//! A relay between an edge and its cloud, TCP and UDP on one number, that does what bad networks do, on command.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

mod udp;

/// What happens to bytes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flow {
    /// They arrive.
    #[default]
    Pass,
    /// They wait and arrive when the flow passes again, as TCP's own retransmission would do after a short cut. Datagrams are lost.
    Hold,
    /// They are lost while the sockets stay open. A TCP connection that lost bytes never passes again, as when a NAT forgot it.
    Swallow,
}

/// The state of the line.
#[derive(Clone, Copy, Debug, Default)]
pub struct Line {
    /// From the edge to the cloud.
    pub up: Flow,
    /// From the cloud to the edge.
    pub down: Flow,
    /// New connections are reset at once, datagrams of new clients are lost.
    pub refuse: bool,
    /// Added to each direction.
    pub latency: Duration,
    /// Bytes a second in each direction, of each TCP connection, and of all datagrams; 0 is no limit.
    pub bandwidth: u64,
    /// How many datagrams of each direction are lost, from 0 to 1. TCP's own segments are not seen here.
    pub loss: f64,
    /// No datagrams pass.
    pub no_udp: bool,
    /// Bytes that a connection which comes now carries both ways until it is reset, and a client of UDP until it is lost without a word.
    /// What would pass this ends before, TCP's at the very byte; 0 is no limit.
    pub most: u64,
    /// Nothing listens.
    closed: bool,
    /// Connections from before the last reset are gone.
    generation: u64,
    /// How often the NAT gave clients of UDP other ports.
    rebindings: u64,
    /// Where new connections and new clients go, if not where the relay was started for.
    elsewhere: Option<SocketAddr>,
}

/// A relay. Dropping it closes everything.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    line: watch::Sender<Line>,
    counters: Arc<Counters>,
    _runtime: Runtime,
}

#[derive(Debug, Default)]
struct Counters {
    up: AtomicU64,
    down: AtomicU64,
    segments: AtomicU64,
    datagrams: AtomicU64,
    tried: AtomicU64,
    connections: AtomicU64,
}

/// What a segment carries on an Ethernet.
const SEGMENT: usize = 1448;
/// Reads of a direction of a TCP connection that are on their way at a time: a megabyte. Until the first has arrived no more is read.
const MOST: usize = 64;

impl Relay {
    /// Listens on a free loopback port and passes to `target`.
    pub fn start(target: SocketAddr) -> Result<Self> {
        Self::launch(target, None)
    }

    /// As [`Relay::start`], with so many bytes of room for TCP in each direction, as a modem has, where the system would give megabytes.
    pub fn start_narrow(target: SocketAddr, room: usize) -> Result<Self> {
        Self::launch(target, Some(room))
    }

    fn launch(target: SocketAddr, room: Option<usize>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let port = crate::ports::free()?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let listener = runtime.block_on(async { listen(address, room) })?;
        let datagrams = runtime.block_on(UdpSocket::bind(address))?;
        let (line, seen) = watch::channel(Line::default());
        let counters = Arc::new(Counters::default());
        runtime.spawn(udp::serve(datagrams, target, seen.clone(), counters.clone()));
        runtime.spawn(serve(listener, target, room, seen, counters.clone()));
        Ok(Self { address, line, counters, _runtime: runtime })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the line.
    pub fn set(&self, change: impl FnOnce(&mut Line)) {
        self.line.send_modify(change);
    }

    /// New connections and new clients go there from now on, as behind a balancer.
    pub fn retarget(&self, target: SocketAddr) {
        self.set(|line| line.elsewhere = Some(target));
    }

    /// Gives every client of UDP another port, as NATs do.
    pub fn rebind(&self) {
        self.set(|line| line.rebindings += 1);
    }

    /// Silence both ways; the sockets stay open.
    pub fn cut(&self) {
        self.set(|line| (line.up, line.down) = (Flow::Swallow, Flow::Swallow));
    }

    /// The line as it was at the start. Connections that lost bytes stay dead.
    pub fn heal(&self) {
        self.set(|line| {
            let (generation, rebindings, elsewhere) = (line.generation, line.rebindings, line.elsewhere);
            *line = Line { generation, rebindings, elsewhere, ..Line::default() };
        });
    }

    /// Resets every connection; new ones pass. Clients of UDP are lost without a word.
    pub fn reset(&self) {
        self.set(|line| line.generation += 1);
    }

    /// It goes away with all that it carries: nothing listens, as on a machine that starts anew.
    pub fn close(&self) {
        self.set(|line| (line.generation, line.closed) = (line.generation + 1, true));
    }

    /// It listens again where it did, and knows no client.
    pub fn open(&self) {
        self.set(|line| line.closed = false);
    }

    /// Bytes that went up and down since the start.
    pub fn bytes(&self) -> (u64, u64) {
        (self.counters.up.load(Ordering::Relaxed), self.counters.down.load(Ordering::Relaxed))
    }

    /// Segments that the bytes of [`Self::bytes`] would have been on an Ethernet, taking what came at once for one write; datagrams
    /// among them.
    pub fn segments(&self) -> u64 {
        self.counters.segments.load(Ordering::Relaxed)
    }

    /// Datagrams that passed since the start.
    pub fn datagrams(&self) -> u64 {
        self.counters.datagrams.load(Ordering::Relaxed)
    }

    /// Datagrams that went up since the start, with those that got no further than here.
    pub fn datagrams_tried(&self) -> u64 {
        self.counters.tried.load(Ordering::Relaxed)
    }

    /// TCP connections accepted, and clients of UDP seen, since the start.
    pub fn connections(&self) -> u64 {
        self.counters.connections.load(Ordering::Relaxed)
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Up,
    Down,
}

fn narrow(socket: &TcpSocket, room: Option<usize>) -> std::io::Result<()> {
    let Some(room) = room.and_then(|room| u32::try_from(room).ok()) else { return Ok(()) };
    socket.set_recv_buffer_size(room)?;
    socket.set_send_buffer_size(room)
}

fn listen(address: SocketAddr, room: Option<usize>) -> std::io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    narrow(&socket, room)?;
    socket.bind(address)?;
    socket.listen(1024)
}

/// Waits until the line is closed or open; an error when the relay is gone.
async fn turned(line: &mut watch::Receiver<Line>, closed: bool) -> Result<(), watch::error::RecvError> {
    line.wait_for(|line| line.closed == closed).await.map(drop)
}

/// Accepts while the line is open.
async fn serve(
    mut listener: TcpListener,
    target: SocketAddr,
    room: Option<usize>,
    mut line: watch::Receiver<Line>,
    counters: Arc<Counters>,
) -> Result<()> {
    let address = listener.local_addr()?;
    loop {
        let accepting = accept(listener, target, room, line.clone(), counters.clone());
        tokio::select! {
            () = accepting => {}
            closed = turned(&mut line, true) => closed?,
        }
        turned(&mut line, false).await?;
        listener = listen(address, room)?;
    }
}

async fn accept(
    listener: TcpListener,
    target: SocketAddr,
    room: Option<usize>,
    line: watch::Receiver<Line>,
    counters: Arc<Counters>,
) {
    while let Ok((near, _)) = listener.accept().await {
        counters.connections.fetch_add(1, Ordering::Relaxed);
        if line.borrow().refuse {
            near.set_zero_linger().ok();
            continue;
        }
        let target = line.borrow().elsewhere.unwrap_or(target);
        tokio::spawn(connection(near, target, room, line.clone(), counters.clone()));
    }
}

async fn connection(
    near: TcpStream,
    target: SocketAddr,
    room: Option<usize>,
    mut line: watch::Receiver<Line>,
    counters: Arc<Counters>,
) {
    let first = *line.borrow();
    let generation = first.generation;
    // A cut network swallows the handshake too: the far side learns of the connection when the line passes.
    if line
        .wait_for(|line| line.generation != generation || (line.up == Flow::Pass && line.down == Flow::Pass))
        .await
        .is_err()
    {
        return;
    }
    if line.borrow().generation != generation {
        near.set_zero_linger().ok();
        return;
    }
    let connected = async {
        let socket = TcpSocket::new_v4()?;
        narrow(&socket, room)?;
        socket.connect(target).await
    };
    let Ok(far) = connected.await else {
        near.set_zero_linger().ok();
        return;
    };
    near.set_nodelay(true).ok();
    far.set_nodelay(true).ok();
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    let limit = Limit::new(first.most);
    let reset = async {
        let mut line = line.clone();
        line.wait_for(|line| line.generation != generation).await.ok();
    };
    let both = async {
        tokio::join!(
            pump(near_in, far_out, Direction::Up, room, line.clone(), counters.clone(), &limit),
            pump(far_in, near_out, Direction::Down, room, line.clone(), counters.clone(), &limit),
        )
    };
    // Dropping the halves closes both sockets; unread data makes that a reset.
    tokio::select! { () = reset => {} () = limit.reached.notified() => {} _ = both => {} }
}

/// What a connection may carry.
struct Limit {
    /// Bytes yet.
    left: AtomicU64,
    reached: Notify,
}

impl Limit {
    fn new(most: u64) -> Self {
        let left = if most == 0 { u64::MAX } else { most };
        Self { left: AtomicU64::new(left), reached: Notify::new() }
    }

    /// How many of so many bytes may pass.
    fn take(&self, bytes: usize) -> usize {
        let wanted = bytes as u64;
        let left =
            self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(wanted)));
        usize::try_from(left.unwrap_or_default().min(wanted)).unwrap_or(bytes)
    }
}

/// Bytes on their way, and when they arrive.
struct Arrival {
    at: Instant,
    bytes: Vec<u8>,
}

/// Carries one direction until its end of stream has arrived or nobody takes what it carries. As long as its connection, if it is dead.
async fn pump(
    from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    direction: Direction,
    room: Option<usize>,
    line: watch::Receiver<Line>,
    counters: Arc<Counters>,
    limit: &Limit,
) {
    // A narrow line has room for what it reads at once.
    let (arrivals, mut arriving) = mpsc::channel(if room.is_some() { 1 } else { MOST });
    let buffer = vec![0; room.unwrap_or(16 << 10)];
    let departing = depart(from, buffer, arrivals, direction, line, counters);
    let arriving = async move {
        while let Some(Arrival { at, bytes }) = arriving.recv().await {
            sleep_until(at).await;
            let passing = limit.take(bytes.len());
            if to.write_all(&bytes[..passing]).await.is_err() {
                return;
            }
            if passing < bytes.len() {
                limit.reached.notify_one();
                std::future::pending::<()>().await;
            }
        }
        to.shutdown().await.ok();
    };
    let departing = async {
        departing.await;
        std::future::pending::<()>().await;
    };
    tokio::select! { () = departing => {} () = arriving => {} }
}

/// Takes bytes at the pace of the line and says when they arrive. Ends with the stream, which is a packet like any other: on a dead line nobody
/// hears of it.
async fn depart(
    mut from: OwnedReadHalf,
    mut buffer: Vec<u8>,
    arrivals: mpsc::Sender<Arrival>,
    direction: Direction,
    mut line: watch::Receiver<Line>,
    counters: Arc<Counters>,
) {
    let mut lost = false;
    loop {
        let count = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        let now = *line.borrow();
        lost |= flow(&now, direction) == Flow::Swallow;
        if lost {
            continue;
        }
        if line.wait_for(|line| flow(line, direction) != Flow::Hold).await.is_err() {
            break;
        }
        if flow(&line.borrow(), direction) == Flow::Swallow {
            lost = true;
            continue;
        }
        if let Some(nanos) = (count as u64 * 1_000_000_000).checked_div(now.bandwidth) {
            sleep(Duration::from_nanos(nanos)).await;
        }
        counters.segments.fetch_add(count.div_ceil(SEGMENT) as u64, Ordering::Relaxed);
        match direction {
            Direction::Up => counters.up.fetch_add(count as u64, Ordering::Relaxed),
            Direction::Down => counters.down.fetch_add(count as u64, Ordering::Relaxed),
        };
        let arrival = Arrival { at: Instant::now() + now.latency, bytes: buffer[..count].to_vec() };
        if arrivals.send(arrival).await.is_err() {
            return;
        }
    }
    if lost || line.wait_for(|line| flow(line, direction) == Flow::Pass).await.is_err() {
        std::future::pending::<()>().await;
    }
    // The end is as far away as the bytes before it.
    let at = Instant::now() + line.borrow().latency;
    arrivals.send(Arrival { at, bytes: Vec::new() }).await.ok();
}

fn flow(line: &Line, direction: Direction) -> Flow {
    match direction {
        Direction::Up => line.up,
        Direction::Down => line.down,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// A server that sends back what it gets, and a connection to it through a relay.
    fn echo() -> (Relay, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut &stream).ok());
            }
        });
        let relay = Relay::start(address).unwrap();
        let stream = TcpStream::connect(relay.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        (relay, stream)
    }

    fn say(stream: &mut TcpStream, text: &str) -> Option<String> {
        stream.write_all(text.as_bytes()).unwrap();
        let mut buffer = [0; 64];
        let count = stream.read(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..count]).into_owned())
    }

    #[test]
    fn held_bytes_arrive_after_the_cut_and_swallowed_ones_never() {
        let (relay, mut stream) = echo();
        assert_eq!(say(&mut stream, "a").as_deref(), Some("a"));
        relay.set(|line| line.up = Flow::Hold);
        assert_eq!(say(&mut stream, "b"), None);
        relay.heal();
        let mut buffer = [0; 1];
        stream.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"b");
        relay.cut();
        assert_eq!(say(&mut stream, "c"), None);
        relay.heal();
        assert_eq!(say(&mut stream, "d"), None, "a connection that lost bytes is dead");
    }

    #[test]
    fn what_is_far_away_arrives_late_and_not_one_after_the_other() {
        let (relay, mut stream) = echo();
        let far = Duration::from_millis(200);
        relay.set(|line| line.latency = far);
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let sent: Vec<u8> = (0..4 << 20).map(|at: u32| at.to_le_bytes()[1]).collect();
        let begin = Instant::now();
        let mut writer = stream.try_clone().unwrap();
        let writing = std::thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
            sent
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert!(back == writing.join().unwrap(), "other bytes came back");
        assert!(begin.elapsed() >= 2 * far);
        // Of 256 reads there and back each would wait for the one before it.
        assert!(begin.elapsed() < 256 * far);
    }

    #[test]
    fn what_was_closed_refuses_and_carries_again_when_it_is_open() {
        let (relay, mut stream) = echo();
        assert_eq!(say(&mut stream, "a").as_deref(), Some("a"));
        relay.close();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
        let wait = |open| while TcpStream::connect(relay.address()).is_ok() != open {};
        wait(false);
        relay.open();
        wait(true);
        let mut stream = TcpStream::connect(relay.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(say(&mut stream, "b").as_deref(), Some("b"));
    }

    #[test]
    fn a_connection_that_may_carry_so_much_is_reset_after_it() {
        let (relay, mut stream) = echo();
        assert_eq!(say(&mut stream, "a").as_deref(), Some("a"));
        relay.set(|line| line.most = 5);
        // Nobody counted when this one came.
        assert_eq!(say(&mut stream, "a word").as_deref(), Some("a word"));
        let mut counted = TcpStream::connect(relay.address()).unwrap();
        counted.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // Three up, two down.
        counted.write_all(b"abc").unwrap();
        let mut got = Vec::new();
        let end = counted.read_to_end(&mut got);
        assert!(end.is_ok_and(|got| got == 2) || got == b"ab", "{got:?}");
        relay.heal();
        assert_eq!(say(&mut stream, "more").as_deref(), Some("more"));
    }

    #[test]
    fn a_reset_ends_connections_and_refusing_ends_new_ones() {
        let (relay, mut stream) = echo();
        assert_eq!(say(&mut stream, "a").as_deref(), Some("a"));
        relay.reset();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
        relay.set(|line| line.refuse = true);
        let mut refused = TcpStream::connect(relay.address()).unwrap();
        refused.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let answer = refused.read(&mut [0; 1]);
        assert!(matches!(&answer, Ok(0)) || answer.is_err_and(|error| error.kind() != std::io::ErrorKind::WouldBlock));
    }
}
