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

use skerry_mapper::{Config, ConfigError, DeviceInfo, Driver, Fault, Link, PropertyInfo, Reading, Value};
use tokio::sync::Mutex;

use bus::{Bus, Endpoint, NoAnswer};
use pdu::{Refusal, Table};
use register::{Register, Written, group};
use tty::{Parity, Settings, is_speed};

/// Registers between two properties that are read along rather than asking twice.
const GAP: u16 = 8;

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
        Ok(Unit { bus, number, patience, gap: GAP, alone: HashSet::new() })
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
        for span in spans {
            let outcome = self.read_span(span.table, span.start, span.count).await?;
            match outcome {
                Err(refusal) if span.members.len() > 1 && is_about_address(&refusal) => {
                    // Something in it, or between, cannot be read: each by itself, and henceforth nothing that no one asked for.
                    self.gap = 0;
                    for &member in &span.members {
                        let (index, register) = points[member];
                        let outcome = self.read_span(register.table, register.address, register.count).await?;
                        if outcome.is_err() {
                            self.alone.insert((register.table, register.address));
                        }
                        readings.push(reading(index, register, register.address, outcome));
                    }
                }
                outcome => {
                    for &member in &span.members {
                        let (index, register) = points[member];
                        readings.push(reading(index, register, span.start, outcome.clone()));
                    }
                }
            }
        }
        Ok(())
    }

    async fn write(&mut self, point: &Register, value: &Value) -> Result<(), Fault> {
        let request = match point.encode(value).map_err(Fault::Refused)? {
            Written::Bits(bits) => pdu::write_coils(point.address, &bits),
            Written::Registers(bytes) => pdu::write_registers(point.address, &bytes),
        };
        let answer = self.bus.lock().await.ask(self.number, &request, self.patience).await.map_err(fault)?;
        pdu::write_answer(&request, &answer).map_err(refused)
    }
}

impl Unit {
    /// The bytes of a read, or why the device refuses.
    async fn read_span(&mut self, table: Table, start: u16, count: u16) -> Result<Result<Vec<u8>, Refusal>, Fault> {
        let request = pdu::read(table, start, count);
        let mut bus = self.bus.lock().await;
        let answer = bus.ask(self.number, &request, self.patience).await.map_err(fault)?;
        match pdu::read_answer(table, count, &answer) {
            Ok(bytes) => Ok(Ok(bytes.to_vec())),
            Err(Refusal::Malformed(why)) => {
                bus.reset();
                Ok(Err(Refusal::Malformed(why)))
            }
            Err(refusal) => match refused(refusal) {
                Fault::Offline(why) => Err(Fault::Offline(why)),
                Fault::Refused(_) => Ok(Err(refusal)),
            },
        }
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
