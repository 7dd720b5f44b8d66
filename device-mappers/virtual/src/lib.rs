//! Devices that are made up: random, periodic and counting values, values that can be set, and faults on demand.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use skerry_mapper::{
    Config, ConfigError, DeviceInfo, Driver, Fault, Kind, Link, Point, PropertyInfo, Reading, Value, clock,
};

/// The protocol.
#[derive(Debug)]
pub struct Virtual;

/// One property.
#[derive(Debug)]
pub struct Made {
    pattern: Pattern,
    kind: Kind,
    least: f64,
    most: f64,
    period: Duration,
    /// What was set last. Outlives connections.
    set: Arc<Mutex<Option<Value>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pattern {
    Random,
    Sine,
    Counter,
    Settable,
}

/// A device that is there.
#[derive(Debug)]
pub struct Connected {
    delay: Duration,
    fail_every: u64,
    break_every: u64,
    reads: u64,
    random: u64,
}

impl Point for Made {}

impl Driver for Virtual {
    type Point = Made;
    type Link = Connected;

    fn protocol(&self) -> &'static str {
        "virtualProtocol"
    }

    fn point(&self, property: &PropertyInfo<'_>, visitor: &Config) -> Result<Made, ConfigError> {
        let pattern = match visitor.text("pattern").as_deref() {
            Some("sine") => Pattern::Sine,
            Some("counter") => Pattern::Counter,
            Some("settable") => Pattern::Settable,
            Some("random") => Pattern::Random,
            // One that can be written keeps what is written.
            None => [Pattern::Random, Pattern::Settable][usize::from(property.writable)],
            Some(other) => {
                return Err(ConfigError(format!(
                    "`pattern` is {other:?}, but has to be random, sine, counter or settable"
                )));
            }
        };
        Ok(Made {
            pattern,
            kind: property.kind,
            least: visitor.number("min")?.unwrap_or(0.0),
            most: visitor.number("max")?.unwrap_or(100.0),
            period: Duration::from_millis(visitor.integer("period", 1, 86_400_000)?.unwrap_or(60_000).unsigned_abs()),
            set: Arc::default(),
        })
    }

    async fn connect(&self, device: &DeviceInfo<'_>) -> Result<Connected, Fault> {
        let wrong = |error: ConfigError| Fault::Refused(error.to_string());
        let number = |key: &str| Ok(device.config.integer(key, 0, 1 << 40).map_err(wrong)?.unwrap_or(0).unsigned_abs());
        if device.config.flag("offline").map_err(wrong)? {
            return Err(Fault::Offline("it is configured to be offline".to_owned()));
        }
        Ok(Connected {
            delay: Duration::from_millis(number("delay")?),
            fail_every: number("failEvery")?,
            break_every: number("breakEvery")?,
            reads: 0,
            random: rand::random::<u64>() | 1,
        })
    }
}

impl Link for Connected {
    type Point = Made;

    async fn read(&mut self, points: &[(usize, &Made)], readings: &mut Vec<Reading>) -> Result<(), Fault> {
        self.reads += 1;
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        if self.break_every > 0 && self.reads.is_multiple_of(self.break_every) {
            return Err(Fault::Offline("it is configured to break".to_owned()));
        }
        let fails = self.fail_every > 0 && self.reads.is_multiple_of(self.fail_every);
        for (index, point) in points {
            readings.push(match fails {
                true => Reading::failed(*index, "it is configured to fail"),
                false => Reading::new(*index, self.make(point)),
            });
        }
        Ok(())
    }

    async fn write(&mut self, point: &Made, value: &Value) -> Result<(), Fault> {
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        if point.pattern != Pattern::Settable {
            return Err(Fault::Refused("only a property whose `pattern` is settable keeps what is written".to_owned()));
        }
        *point.set.lock().unwrap_or_else(PoisonError::into_inner) = Some(value.clone());
        Ok(())
    }
}

impl Connected {
    fn make(&mut self, point: &Made) -> Value {
        let number = match point.pattern {
            Pattern::Random => {
                // xorshift: quick, and good enough to look at.
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                #[expect(clippy::cast_precision_loss, reason = "53 bits")]
                let unit = (self.random >> 11) as f64 / (1u64 << 53) as f64;
                point.least + (point.most - point.least) * unit
            }
            Pattern::Sine => {
                let turns = clock::monotonic().as_secs_f64() / point.period.as_secs_f64();
                point.least + (point.most - point.least) * (0.5 + 0.5 * (turns * std::f64::consts::TAU).sin())
            }
            #[expect(clippy::cast_precision_loss, reason = "for looking at")]
            Pattern::Counter => point.least + self.reads as f64,
            Pattern::Settable => {
                let set = point.set.lock().unwrap_or_else(PoisonError::into_inner).clone();
                return set.unwrap_or_else(|| match point.kind {
                    Kind::String | Kind::Bytes => Value::Text("".into()),
                    _ => Value::Double(point.least),
                });
            }
        };
        match point.kind {
            Kind::Boolean => Value::Bool(number > f64::midpoint(point.least, point.most)),
            _ => Value::Double(number),
        }
    }
}
