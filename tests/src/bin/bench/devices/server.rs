//! An HTTP server of the benchmark's own: the sink that values are pushed to, which counts each by its sequence number, and a device that
//! is read and written.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::objects::PROPERTIES;

/// What came to the sink.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    /// Values.
    pub(super) values: u64,
    /// Sequence numbers that were left out.
    pub(super) lost: u64,
    /// Values whose number had been there before.
    pub(super) again: u64,
    /// The last number of each device and property.
    last: HashMap<String, u64>,
}

#[derive(Debug, Default)]
struct State {
    sink: Mutex<Counts>,
    /// What was written last.
    limit: Mutex<String>,
}

/// See the module. It ends with the process.
pub(super) struct Server {
    address: SocketAddr,
    state: Arc<State>,
    written: Receiver<(Instant, String)>,
}

impl Server {
    pub(super) fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let state = Arc::new(State::default());
        let (sender, written) = channel();
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (state, sender) = (Arc::clone(&shared), sender.clone());
                // A client that hangs up ends its thread.
                std::thread::spawn(move || serve(stream, &state, &sender));
            }
        });
        Ok(Self { address, state, written })
    }

    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }

    /// What the sink has counted so far.
    pub(super) fn counts(&self) -> Counts {
        lock(&self.state.sink).clone()
    }

    /// Forgets what came to the sink.
    pub(super) fn reset(&self) {
        *lock(&self.state.sink) = Counts::default();
    }

    /// Waits until a value is written to the device: when that was.
    pub(super) fn written(&self, value: &str, patience: Duration) -> Result<Instant> {
        let limit = Instant::now() + patience;
        loop {
            let left = limit.saturating_duration_since(Instant::now());
            let (at, said) = self.written.recv_timeout(left).with_context(|| format!("{value} was not written"))?;
            if said == value {
                return Ok(at);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers requests one after the other.
fn serve(mut stream: TcpStream, state: &State, written: &Sender<(Instant, String)>) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let (mut first, mut length) = (String::new(), 0);
        if reader.read_line(&mut first)? == 0 {
            return Ok(());
        }
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? <= 2 {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse()?;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let now = Instant::now();
        let body = String::from_utf8(body)?;
        let answer = if first.starts_with("POST") {
            lock(&state.sink).take(&body);
            String::new()
        } else if first.starts_with("PUT") {
            lock(&state.limit).clone_from(&body);
            written.send((now, body)).ok();
            String::new()
        } else {
            let limit = lock(&state.limit).clone();
            let limit = if limit.is_empty() { "0" } else { &limit };
            let properties: Vec<String> = (0..PROPERTIES).map(|number| format!("\"p{number}\":{limit}")).collect();
            format!("{{{}}}", properties.join(","))
        };
        write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{answer}", answer.len())?;
    }
}

impl Counts {
    /// Takes a batch: `[{…,"device":"a-1","property":"p1",…,"value":17,…},…]`.
    fn take(&mut self, batch: &str) {
        for record in batch.split("},{") {
            let text = |name: &str, end: char| {
                let at = record.find(name)? + name.len();
                record[at..].split(end).next()
            };
            let (Some(device), Some(property), Some(value)) =
                (text("\"device\":\"", '"'), text("\"property\":\"", '"'), text("\"value\":", ','))
            else {
                continue;
            };
            let Ok(number) = value.parse::<u64>() else { continue };
            self.values += 1;
            let key = format!("{device}/{property}");
            if let Some(last) = self.last.get_mut(&key) {
                self.lost += number.saturating_sub(*last + 1);
                self.again += u64::from(number <= *last);
                *last = number;
            } else {
                self.last.insert(key, number);
            }
        }
    }
}
