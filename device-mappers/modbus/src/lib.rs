//! Modbus devices, over TCP and serial lines.
//!
//! Devices behind one address share its connection, and devices on one line the line: they are spoken to one at a time.

pub mod bus;
pub mod frame;
pub mod pdu;
pub mod register;
pub mod tty;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use skerry_mapper::{Config, ConfigError, DeviceInfo, Driver, Fault, Link, PropertyInfo, Reading, Value, clock};
use tokio::sync::Mutex;

use bus::{Bus, Endpoint, NoAnswer};
use pdu::{Refusal, Table};
use register::{Register, Span, Written, group};
use tty::{Parity, Settings, is_speed};

/// Registers between two properties that are read along rather than asking twice.
const GAP: u16 = 8;
/// So many requests without an answer before the device is asked for what it has answered before.
const MOST_SILENT: usize = 2;
/// How long what alone is not answered is not asked for.
const MUTE: Duration = Duration::from_secs(10);

/// The protocol.
#[derive(Debug, Default)]
pub struct Modbus {
    /// By address or line.
    buses: std::sync::Mutex<HashMap<String, Weak<Mutex<Bus>>>>,
}

/// A device on a bus.
#[derive(Debug)]
pub struct Unit {
    bus: Arc<Mutex<Bus>>,
    number: u8,
    patience: Duration,
    /// See [`GAP`]; none once the device refused to read what is between.
    gap: u16,
    /// What the device refused to read, and so is not read together with others.
    alone: HashSet<(Table, u16)>,
    /// What it does not answer to, while it answers to the rest; until when it is not asked, and why.
    mute: HashMap<(Table, u16), (Duration, String)>,
    /// What it answered to last: table, address and count.
    good: Option<(Table, u16, u16)>,
}

impl Driver for Modbus {
    type Point = Register;
    type Link = Unit;

    fn protocol(&self) -> &'static str {
        "modbus"
    }

    fn point(&self, property: &PropertyInfo<'_>, visitor: &Config) -> Result<Register, ConfigError> {
        Register::new(property, visitor)
    }

    async fn connect(&self, device: &DeviceInfo<'_>) -> Result<Unit, Fault> {
        let (endpoint, number, patience) =
            understand(device.config).map_err(|error| Fault::Refused(error.to_string()))?;
        let bus = self.bus(&endpoint);
        {
            let mut bus = bus.lock().await;
            if *bus.endpoint() != endpoint {
                return Err(Fault::Refused(format!(
                    "another device speaks on this line with other settings: {:?}",
                    bus.endpoint()
                )));
            }
            bus.connect().await.map_err(fault)?;
        }
        Ok(Unit { bus, number, patience, gap: GAP, alone: HashSet::new(), mute: HashMap::new(), good: None })
    }
}

impl Modbus {
    fn bus(&self, endpoint: &Endpoint) -> Arc<Mutex<Bus>> {
        let place = match endpoint {
            Endpoint::Tcp(host, port) => format!("{host}:{port}"),
            Endpoint::Serial(settings) => settings.path.clone(),
        };
        let mut buses = self.buses.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bus) = buses.get(&place).and_then(Weak::upgrade) {
            return bus;
        }
        buses.retain(|_, bus| bus.strong_count() > 0);
        let bus = Arc::new(Mutex::new(Bus::new(endpoint.clone())));
        buses.insert(place, Arc::downgrade(&bus));
        bus
    }
}

/// `configData` of a device: the keys of KubeEdge's Modbus mappers.
fn understand(config: &Config) -> Result<(Endpoint, u8, Duration), ConfigError> {
    let unit = config.integer("slaveID", 0, 255)?.unwrap_or(1);
    let patience = config.integer("timeout", 1, 60_000)?.unwrap_or(1000);
    // Older manifests have what belongs to a line or an address in an object of its own.
    let com = config.object("com")?;
    let tcp = config.object("tcp")?;
    let serial = com.as_ref().unwrap_or(config);
    let path = serial.text("serialPort").or_else(|| serial.text("serialName"));
    let rtu = match config.text("communicateMode").map(|mode| mode.to_ascii_uppercase()).as_deref() {
        Some("TCP") => false,
        Some("RTU") => true,
        Some(other) => return Err(ConfigError(format!("`communicateMode` is {other:?}, but has to be TCP or RTU"))),
        None => path.is_some(),
    };
    let endpoint = if rtu {
        let path = path.ok_or_else(|| ConfigError("`serialPort` is missing from configData".to_owned()))?;
        // As KubeEdge has it: a number is that of a /dev/ttyS.
        let path = if path.bytes().all(|byte| byte.is_ascii_digit()) { format!("/dev/ttyS{path}") } else { path };
        let baud = u32::try_from(serial.integer("baudRate", 1200, 921_600)?.unwrap_or(9600)).unwrap_or(9600);
        if !is_speed(baud) {
            return Err(ConfigError(format!("`baudRate` is {baud}, which no serial line has: 9600, 19200, 115200, …")));
        }
        let parity = match serial.text("parity").map(|parity| parity.to_ascii_lowercase()).as_deref() {
            None | Some("none" | "n") => Parity::None,
            Some("even" | "e") => Parity::Even,
            Some("odd" | "o") => Parity::Odd,
            Some(other) => return Err(ConfigError(format!("`parity` is {other:?}, but has to be none, even or odd"))),
        };
        let bits = |key, least, most, usual| {
            Ok(u8::try_from(serial.integer(key, least, most)?.unwrap_or(usual)).unwrap_or_default())
        };
        let (data_bits, stop_bits) = (bits("dataBits", 7, 8, 8)?, bits("stopBits", 1, 2, 1)?);
        Endpoint::Serial(Settings { path, baud, data_bits, parity, stop_bits })
    } else {
        let address = tcp.as_ref().unwrap_or(config);
        let port = address.integer("port", 1, 65_535)?.unwrap_or(502);
        Endpoint::Tcp(address.required("ip")?, u16::try_from(port).unwrap_or(502))
    };
    Ok((endpoint, u8::try_from(unit).unwrap_or(1), Duration::from_millis(patience.unsigned_abs())))
}

fn fault(no: NoAnswer) -> Fault {
    match no {
        NoAnswer::Gone(why) | NoAnswer::Silent(why) => Fault::Offline(why),
    }
}

impl Link for Unit {
    type Point = Register;

    async fn read(&mut self, points: &[(usize, &Register)], readings: &mut Vec<Reading>) -> Result<(), Fault> {
        let registers: Vec<&Register> = points.iter().map(|(_, register)| *register).collect();
        let spans = group(&registers, self.gap, |register| self.alone.contains(&(register.table, register.address)));
        let (mut silent, mut answers) = (Vec::new(), false);
        for span in spans {
            let register = (span.table, span.start);
            if let Some((until, why)) = self.mute.get(&register) {
                if clock::monotonic() < *until {
                    readings.extend(span.members.iter().map(|&member| Reading::failed(points[member].0, why)));
                    continue;
                }
                self.mute.remove(&register);
            }
            match self.read_span(span.table, span.start, span.count).await? {
                Answer::None(why) => {
                    silent.push((span, why));
                    if !answers && silent.len() == MOST_SILENT {
                        self.answers(points, &silent).await?;
                        answers = true;
                    }
                }
                Answer::Is(Err(refusal)) if span.members.len() > 1 && is_about_address(&refusal) => {
                    answers = true;
                    // Something in it, or between, cannot be read: each by itself, and henceforth nothing that no one asked for.
                    self.gap = 0;
                    self.read_apart(points, &span, readings).await?;
                }
                Answer::Is(outcome) => {
                    answers = true;
                    for &member in &span.members {
                        let (index, register) = points[member];
                        readings.push(reading(index, register, span.start, outcome.clone()));
                    }
                }
            }
        }
        if !silent.is_empty() && !answers {
            self.answers(points, &silent).await?;
        }
        // It is there, and says nothing to some of it.
        for (span, why) in silent {
            if span.members.len() > 1 {
                self.gap = 0;
                self.read_apart(points, &span, readings).await?;
            } else {
                readings.extend(span.members.iter().map(|&member| Reading::failed(points[member].0, &why)));
                self.is_silent((span.table, span.start), why);
            }
        }
        Ok(())
    }

    async fn write(&mut self, point: &Register, value: &Value) -> Result<(), Fault> {
        let request = match point.encode(value).map_err(Fault::Refused)? {
            Written::Bits(bits) => pdu::write_coils(point.address, &bits),
            Written::Registers(bytes) => pdu::write_registers(point.address, &bytes),
        };
        let answer = self.bus.lock().await.ask(self.number, &request, self.patience).await;
        match answer {
            Ok(answer) => pdu::write_answer(&request, &answer).map_err(refused),
            Err(NoAnswer::Gone(why)) => Err(Fault::Offline(why)),
            // Whatever else it answers to says which of the two is silent.
            Err(NoAnswer::Silent(why)) => match self.good {
                Some((table, start, count)) => match self.read_span(table, start, count).await? {
                    Answer::Is(_) => Err(Fault::Refused(why)),
                    Answer::None(why) => Err(Fault::Offline(why)),
                },
                None => Err(Fault::Offline(why)),
            },
        }
    }
}

/// What comes of a read.
enum Answer {
    /// The bytes, or why the device refuses.
    Is(Result<Vec<u8>, Refusal>),
    /// None in time.
    None(String),
}

impl Unit {
    /// Reads the members of a span each by itself.
    async fn read_apart(
        &mut self,
        points: &[(usize, &Register)],
        span: &Span,
        readings: &mut Vec<Reading>,
    ) -> Result<(), Fault> {
        for &member in &span.members {
            let (index, register) = points[member];
            let place = (register.table, register.address);
            match self.read_span(register.table, register.address, register.count).await? {
                Answer::Is(outcome) => {
                    if outcome.is_err() {
                        self.alone.insert(place);
                    }
                    readings.push(reading(index, register, register.address, outcome));
                }
                Answer::None(why) => {
                    readings.push(Reading::failed(index, &why));
                    self.is_silent(place, why);
                }
            }
        }
        Ok(())
    }

    /// What is not answered is asked for by itself, and for a while not at all.
    fn is_silent(&mut self, place: (Table, u16), why: String) {
        self.alone.insert(place);
        self.mute.insert(place, (clock::monotonic() + MUTE, why));
    }

    /// A device that answers to nothing is offline. Asks for what was answered last, or for some one of what was asked for together.
    async fn answers(&mut self, points: &[(usize, &Register)], silent: &[(Span, String)]) -> Result<(), Fault> {
        let offline = || Fault::Offline(silent.last().map_or_else(String::new, |(_, why)| why.clone()));
        let (last, _) = silent.last().ok_or_else(offline)?;
        let known =
            self.good.filter(|good| silent.iter().all(|(span, _)| (span.table, span.start, span.count) != *good));
        let one = || {
            // Another one each time.
            let turn = usize::try_from(clock::monotonic().as_millis()).unwrap_or(0) % last.members.len();
            let (_, register) = points[*last.members.get(turn).filter(|_| last.members.len() > 1)?];
            Some((register.table, register.address, register.count))
        };
        let (table, start, count) = known.or_else(one).ok_or_else(offline)?;
        match self.read_span(table, start, count).await? {
            Answer::Is(_) => Ok(()),
            Answer::None(_) => Err(offline()),
        }
    }

    async fn read_span(&mut self, table: Table, start: u16, count: u16) -> Result<Answer, Fault> {
        let request = pdu::read(table, start, count);
        let mut bus = self.bus.lock().await;
        let answer = match bus.ask(self.number, &request, self.patience).await {
            Ok(answer) => answer,
            Err(NoAnswer::Gone(why)) => return Err(Fault::Offline(why)),
            Err(NoAnswer::Silent(why)) => return Ok(Answer::None(why)),
        };
        let outcome = match pdu::read_answer(table, count, &answer) {
            Ok(bytes) => Ok(bytes.to_vec()),
            Err(Refusal::Malformed(why)) => {
                bus.reset();
                Err(Refusal::Malformed(why))
            }
            Err(refusal) => match refused(refusal) {
                Fault::Offline(why) => return Err(Fault::Offline(why)),
                Fault::Refused(_) => Err(refusal),
            },
        };
        self.good = Some((table, start, count));
        Ok(Answer::Is(outcome))
    }
}

fn is_about_address(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::Exception(1..=4))
}

/// A gateway that gets no answer means that the device is not there.
fn refused(refusal: Refusal) -> Fault {
    match refusal {
        Refusal::Exception(10 | 11) => Fault::Offline(refusal.to_string()),
        Refusal::Exception(_) | Refusal::Malformed(_) => Fault::Refused(refusal.to_string()),
    }
}

fn reading(index: usize, register: &Register, start: u16, outcome: Result<Vec<u8>, Refusal>) -> Reading {
    match outcome.map_err(|refusal| refusal.to_string()).and_then(|bytes| register.decode(start, &bytes)) {
        Ok(value) => Reading::new(index, value),
        Err(why) => Reading::failed(index, why),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn endpoint(config: serde_json::Value) -> Result<Endpoint, ConfigError> {
        understand(&Config::from(config)).map(|(endpoint, ..)| endpoint)
    }

    #[test]
    fn kubeedges_keys_say_where_a_device_is() {
        assert_eq!(endpoint(json!({"ip": "172.17.0.3", "port": 1502})), Ok(Endpoint::Tcp("172.17.0.3".into(), 1502)));
        let old = json!({"slaveID": 1, "serialPort": "1", "baudRate": 115_200, "dataBits": 8, "parity": "even", "stopBits": 1});
        let settings =
            Settings { path: "/dev/ttyS1".into(), baud: 115_200, data_bits: 8, parity: Parity::Even, stop_bits: 1 };
        assert_eq!(endpoint(old), Ok(Endpoint::Serial(settings)));
        assert!(matches!(endpoint(json!({"com": "{\"serialPort\": \"/dev/ttyUSB0\"}"})), Ok(Endpoint::Serial(_))));
        assert!(matches!(
            endpoint(json!({"communicateMode": "tcp", "ip": "h", "serialPort": "x"})),
            Ok(Endpoint::Tcp(_, 502))
        ));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for config in [
            json!({}),
            json!({"ip": "h", "port": 70_000}),
            json!({"ip": "h", "slaveID": 256}),
            json!({"communicateMode": "UDP", "ip": "h"}),
            json!({"communicateMode": "RTU"}),
            json!({"serialPort": "/dev/x", "baudRate": 9601}),
            json!({"serialPort": "/dev/x", "parity": "mark"}),
        ] {
            assert!(endpoint(config.clone()).is_err(), "{config}");
        }
    }
}
