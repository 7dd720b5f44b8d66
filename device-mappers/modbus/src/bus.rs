//! A bus: one TCP connection or one serial line, and the devices behind it, which are spoken to one at a time.

use std::time::Duration;

use skerry_mapper::clock;
use skerry_mapper::net::{Address, Stream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::frame::{self, Frame};
use crate::tty::{Settings, Tty};

/// Where a bus is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Host and port.
    Tcp(String, u16),
    /// A serial line.
    Serial(Settings),
}

/// A bus, connected or not.
pub struct Bus {
    endpoint: Endpoint,
    stream: Option<Box<dyn Stream>>,
    transaction: u16,
    /// When connecting failed last, and why: who asks right after is told the same.
    failed: Option<(Duration, String)>,
    /// The device on a serial line that did not answer in time, and until when it may.
    late: Option<(u8, Duration)>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoAnswer {
    /// The bus is gone.
    Gone(String),
    /// This device does not answer in time.
    Silent(String),
}

/// How long a failure to connect holds for others.
const FAILED: Duration = Duration::from_millis(400);
/// More bytes than any answer has.
const LONGEST: usize = 300;

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bus").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Bus {
    /// A bus that is not connected yet.
    #[must_use]
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, stream: None, transaction: 0, failed: None, late: None }
    }

    /// Where it is.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Connects it, if it is not connected.
    ///
    /// # Errors
    ///
    /// When it cannot be reached.
    pub async fn connect(&mut self) -> Result<(), NoAnswer> {
        if self.stream.is_some() {
            return Ok(());
        }
        if let Some((when, why)) = &self.failed
            && clock::monotonic().saturating_sub(*when) < FAILED
        {
            return Err(NoAnswer::Gone(why.clone()));
        }
        let connected = match &self.endpoint {
            Endpoint::Tcp(host, port) => {
                let address = Address {
                    tls: false,
                    host: host.clone(),
                    port: *port,
                    user: None,
                    password: None,
                    path: "/".to_owned(),
                };
                address.connect().await
            }
            Endpoint::Serial(settings) => match Tty::open(settings) {
                Ok(tty) => Ok(Box::new(tty) as Box<dyn Stream>),
                Err(error) => Err(format!("{}: {error}", settings.path)),
            },
        };
        match connected {
            Ok(stream) => {
                self.stream = Some(stream);
                self.failed = None;
                Ok(())
            }
            Err(why) => {
                self.failed = Some((clock::monotonic(), why.clone()));
                Err(NoAnswer::Gone(why))
            }
        }
    }

    /// Gives up the connection: what comes on it makes no sense.
    pub fn reset(&mut self) {
        self.stream = None;
    }

    /// Asks a device, and waits for its answer.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub async fn ask(&mut self, unit: u8, pdu: &[u8], patience: Duration) -> Result<Vec<u8>, NoAnswer> {
        self.connect().await?;
        // Until the exchange is over the stream is not the bus's: if this is dropped half-way, so is the stream.
        let Some(mut stream) = self.stream.take() else { return Err(NoAnswer::Gone("it is not connected".to_owned())) };
        self.transaction = self.transaction.wrapping_add(1);
        let transaction = self.transaction;
        let answer = match &self.endpoint {
            Endpoint::Tcp(..) => {
                let exchange = exchange(&mut *stream, frame::tcp(transaction, unit, pdu), frame::parse_tcp, |of, _| {
                    of == Some(transaction)
                });
                tokio::time::timeout(patience, exchange).await
            }
            Endpoint::Serial(settings) => {
                if let Some((_, until)) = self.late.take_if(|(late, _)| *late == unit) {
                    // A line has no numbers: what it still says to the request before would be taken for the answer to this one.
                    let said = exchange(&mut *stream, Vec::new(), frame::parse_rtu, |_, from| from == unit);
                    let _ = tokio::time::timeout(until.saturating_sub(clock::monotonic()), said).await;
                }
                quiet(&mut *stream, settings.baud).await;
                let exchange = exchange(&mut *stream, frame::rtu(unit, pdu), frame::parse_rtu, |_, from| from == unit);
                tokio::time::timeout(patience, exchange).await
            }
        };
        match answer {
            Ok(Ok(answer)) => {
                self.stream = Some(stream);
                Ok(answer)
            }
            Ok(Err(why)) => Err(NoAnswer::Gone(why)),
            // The answer may come later, and some devices give it the number of the next request: on TCP, a new connection is safe from
            // it; on a serial line, it is waited for before the next request, for as long again.
            Err(_) => {
                if matches!(self.endpoint, Endpoint::Serial(_)) {
                    self.stream = Some(stream);
                    self.late = Some((unit, clock::monotonic() + patience));
                }
                Err(NoAnswer::Silent(format!(
                    "unit {unit} does not answer within {patience:?}; see `slaveID` and `timeout`"
                )))
            }
        }
    }
}

/// Sends a request and takes the answer that is `mine`; what else comes, late answers for the most part, is left out.
async fn exchange(
    stream: &mut dyn Stream,
    request: Vec<u8>,
    parse: fn(&[u8]) -> Frame,
    mine: impl Fn(Option<u16>, u8) -> bool,
) -> Result<Vec<u8>, String> {
    stream.write_all(&request).await.map_err(|error| error.to_string())?;
    stream.flush().await.map_err(|error| error.to_string())?;
    let mut bytes = Vec::with_capacity(LONGEST);
    loop {
        match parse(&bytes) {
            Frame::Whole { transaction, unit, pdu, .. } if mine(transaction, unit) => return Ok(pdu),
            Frame::Whole { length, .. } => drop(bytes.drain(..length)),
            Frame::Broken(why) => return Err(why.to_owned()),
            Frame::More => {
                let mut more = [0; LONGEST];
                match stream.read(&mut more).await {
                    Ok(0) => return Err("the connection was closed".to_owned()),
                    Ok(length) => bytes.extend_from_slice(&more[..length]),
                    Err(error) => return Err(error.to_string()),
                }
            }
        }
    }
}

/// The silence before a frame on a serial line, of three and a half characters, and at least 1.75 ms (MODBUS over Serial Line V1.02,
/// chapter 2.5.1.1); what came during it is no answer to what will be asked.
async fn quiet(stream: &mut dyn Stream, baud: u32) {
    tokio::time::sleep(Duration::from_micros(1750).max(Duration::from_secs_f64(38.5 / f64::from(baud.max(1))))).await;
    let mut late = [0; LONGEST];
    for _ in 0..16 {
        match tokio::time::timeout(Duration::ZERO, stream.read(&mut late)).await {
            Ok(Ok(1..)) => {}
            _ => return,
        }
    }
}
