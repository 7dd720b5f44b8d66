//! What a property is in a device: which registers, and how their bytes are a value. Pure.

use skerry_mapper::{Config, ConfigError, Kind, Point, PropertyInfo, Value};

use crate::pdu::Table;

/// A property in a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Register {
    /// Where it is.
    pub table: Table,
    /// Address of the first coil or register, from 0 on.
    pub address: u16,
    /// How many.
    pub count: u16,
    form: Form,
    /// One bit of a register.
    bit: Option<u8>,
    scale: f64,
    /// The bytes of each register the other way round.
    swap_bytes: bool,
    /// The registers the other way round.
    swap_registers: bool,
}

/// What the bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Unsigned,
    Signed,
    Float,
    Text,
    Bytes,
}

impl Point for Register {
    fn tolerance(&self) -> f64 {
        match self.form {
            Form::Unsigned | Form::Signed if self.scale != 1.0 => self.scale.abs() * 0.501,
            _ => 0.0,
        }
    }
}

impl Register {
    /// Understands a visitor.
    ///
    /// # Errors
    ///
    /// What is missing or wrong.
    pub fn new(property: &PropertyInfo<'_>, visitor: &Config) -> Result<Self, ConfigError> {
        let table = match visitor.required("register")?.to_ascii_lowercase().trim_end_matches("register") {
            "coil" => Table::Coil,
            "discreteinput" => Table::Discrete,
            "holding" => Table::Holding,
            "input" => Table::Input,
            other => {
                return Err(ConfigError(format!(
                    "`register` is {other:?}, but has to be CoilRegister, DiscreteInputRegister, HoldingRegister or InputRegister"
                )));
            }
        };
        let address = visitor.integer("offset", 0, 65_535)?.and_then(|offset| u16::try_from(offset).ok());
        let address = address.ok_or_else(|| ConfigError("`offset` is missing from configData".to_owned()))?;
        let limit = visitor.integer("limit", 0, table.most().into())?.and_then(|limit| u16::try_from(limit).ok());
        let named = match visitor.text("dataType").as_deref() {
            Some("uint16") => Some((Form::Unsigned, 1)),
            Some("uint32") => Some((Form::Unsigned, 2)),
            Some("uint64") => Some((Form::Unsigned, 4)),
            Some("int16") => Some((Form::Signed, 1)),
            Some("int32") => Some((Form::Signed, 2)),
            Some("int64") => Some((Form::Signed, 4)),
            Some("float32") => Some((Form::Float, 2)),
            Some("float64") => Some((Form::Float, 4)),
            // Names without a size, such as KubeEdge's `int`, say no more than the model does.
            _ => None,
        };
        let usual = match property.kind {
            Kind::Int | Kind::Boolean => (Form::Unsigned, 1),
            Kind::Float | Kind::Double if limit == Some(1) || table.is_bits() => (Form::Unsigned, 1),
            Kind::Float => (Form::Float, 2),
            Kind::Double => (Form::Float, 4),
            Kind::String => (Form::Text, 0),
            Kind::Bytes | Kind::Stream => (Form::Bytes, 0),
        };
        let (form, natural) = named.unwrap_or(usual);
        let natural = if table.is_bits() { 1 } else { natural };
        let count = limit.filter(|&limit| limit > 0).unwrap_or(natural);
        let widths: &[u16] = match form {
            Form::Unsigned | Form::Signed => &[1, 2, 4],
            Form::Float => &[2, 4],
            Form::Text | Form::Bytes => &[],
        };
        if !table.is_bits() && !widths.is_empty() && !widths.contains(&count) {
            return Err(ConfigError(format!("`limit` is {count}, but a number has {widths:?} registers")));
        }
        if count == 0 || (table.is_bits() && count > 63) {
            return Err(ConfigError(format!(
                "`limit` is {count}, but has to say how many registers it is, or up to 63 coils"
            )));
        }
        if u32::from(address) + u32::from(count) > 65_536 {
            return Err(ConfigError(format!("`offset` {address} and `limit` {count} reach beyond register 65535")));
        }
        let bit = visitor.integer("bit", 0, 15)?.and_then(|bit| u8::try_from(bit).ok());
        if bit.is_some() && (table.is_bits() || count != 1) {
            return Err(ConfigError("`bit` is for one register".to_owned()));
        }
        Ok(Self {
            table,
            address,
            count,
            form,
            bit,
            scale: visitor.number("scale")?.filter(|&scale| scale != 0.0).unwrap_or(1.0),
            swap_bytes: visitor.flag("isSwap")?,
            swap_registers: visitor.flag("isRegisterSwap")?,
        })
    }

    /// The value that a device's answer has for it: `bytes` are those of a read of `start` and what follows.
    ///
    /// # Errors
    ///
    /// When they are no such value.
    pub fn decode(&self, start: u16, bytes: &[u8]) -> Result<Value, String> {
        let first = usize::from(self.address.checked_sub(start).ok_or("the answer begins after it")?);
        let count = usize::from(self.count);
        if self.table.is_bits() {
            let bit = |index: usize| bytes.get(index / 8).map(|byte| byte >> (index % 8) & 1);
            let bits = (first..first + count).rev().map(|index| bit(index).ok_or("the answer ends before it"));
            let number = bits.into_iter().try_fold(0, |number, bit| Ok::<_, &str>(number << 1 | i64::from(bit?)))?;
            return Ok(self.scaled_int(number));
        }
        let bytes = bytes.get(2 * first..2 * (first + count)).ok_or("the answer ends before it")?;
        let mut bytes = bytes.to_vec();
        self.reorder(&mut bytes);
        Ok(match self.form {
            Form::Text => {
                let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
                bytes.truncate(end);
                Value::Text(String::from_utf8(bytes).map_err(|_| "it is not text (UTF-8)")?.into())
            }
            Form::Bytes => Value::Bytes(bytes.into()),
            Form::Float => {
                let number = match bytes.as_slice() {
                    [a, b, c, d] => f64::from(f32::from_be_bytes([*a, *b, *c, *d])),
                    [a, b, c, d, e, f, g, h] => f64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]),
                    _ => return Err("a number of this size there is not".to_owned()),
                };
                Value::Double(number * self.scale)
            }
            Form::Unsigned | Form::Signed => {
                let raw = bytes.iter().fold(0u64, |number, &byte| number << 8 | u64::from(byte));
                let number = match (self.form, bytes.len()) {
                    (Form::Signed, length @ 1..=8) => {
                        let shift = 64 - 8 * u32::try_from(length).unwrap_or(8);
                        (raw << shift).cast_signed() >> shift
                    }
                    _ => {
                        i64::try_from(raw).map_err(|_| format!("{raw} does not fit into a whole number of 64 bits"))?
                    }
                };
                match self.bit {
                    Some(bit) => Value::Bool(number >> bit & 1 == 1),
                    None => self.scaled_int(number),
                }
            }
        })
    }

    fn scaled_int(&self, number: i64) -> Value {
        #[expect(clippy::cast_precision_loss, reason = "scaled numbers are measured ones")]
        if self.scale == 1.0 { Value::Int(number) } else { Value::Double(number as f64 * self.scale) }
    }

    /// What is written for a value: bytes of registers, or bits.
    ///
    /// # Errors
    ///
    /// When the registers cannot have it.
    pub fn encode(&self, value: &Value) -> Result<Written, String> {
        if matches!(self.table, Table::Discrete | Table::Input) {
            return Err("registers of this kind cannot be written: CoilRegister and HoldingRegister can".to_owned());
        }
        if self.bit.is_some() {
            return Err("one bit of a register cannot be written".to_owned());
        }
        if self.table.is_bits() {
            let number = self.raw_int(value, 0, (1 << self.count) - 1)?;
            return Ok(Written::Bits((0..self.count).map(|bit| number >> bit & 1 == 1).collect()));
        }
        let width = usize::from(self.count) * 2;
        let mut bytes = match (self.form, value) {
            (Form::Unsigned, _) => {
                let most = if width >= 8 { i64::MAX } else { (1 << (8 * width)) - 1 };
                self.raw_int(value, 0, most)?.to_be_bytes()[8 - width.min(8)..].to_vec()
            }
            (Form::Signed, _) => {
                let half = if width >= 8 { i64::MAX } else { (1 << (8 * width - 1)) - 1 };
                self.raw_int(value, -half - 1, half)?.to_be_bytes()[8 - width.min(8)..].to_vec()
            }
            (Form::Float, _) => {
                let number = value.number().ok_or("it is no number")? / self.scale;
                #[expect(clippy::cast_possible_truncation, reason = "the device has no more digits")]
                let short = number as f32;
                match width {
                    4 if short.is_finite() => short.to_be_bytes().to_vec(),
                    4 => return Err(format!("{number} does not fit into a number of 32 bits")),
                    _ => number.to_be_bytes().to_vec(),
                }
            }
            (Form::Text, Value::Text(text)) => text.as_bytes().to_vec(),
            (Form::Bytes, Value::Bytes(bytes)) => bytes.to_vec(),
            _ => return Err("the registers have another type".to_owned()),
        };
        if bytes.len() > width {
            return Err(format!("it has {} bytes, but the registers only {width}", bytes.len()));
        }
        bytes.resize(width, 0);
        self.reorder(&mut bytes);
        Ok(Written::Registers(bytes))
    }

    fn raw_int(&self, value: &Value, least: i64, most: i64) -> Result<i64, String> {
        let raw = match value {
            Value::Int(number) if self.scale == 1.0 => *number,
            _ => {
                let number = (value.number().ok_or("it is no number")? / self.scale).round();
                if number.abs() > 9e18 {
                    return Err(format!("{number} does not fit into the registers"));
                }
                #[expect(clippy::cast_possible_truncation, reason = "just checked")]
                let number = number as i64;
                number
            }
        };
        if (least..=most).contains(&raw) {
            Ok(raw)
        } else {
            Err(format!(
                "{raw} does not fit into the registers, which take {least} to {most}; see `dataType` and `limit`"
            ))
        }
    }

    /// Its own inverse.
    fn reorder(&self, bytes: &mut [u8]) {
        if self.swap_registers {
            bytes.reverse();
        }
        // Reversing the registers reverses their bytes, too.
        if self.swap_bytes != self.swap_registers {
            for register in bytes.chunks_exact_mut(2) {
                register.reverse();
            }
        }
    }
}

/// What is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// To coils.
    Bits(Vec<bool>),
    /// To registers.
    Registers(Vec<u8>),
}

/// Registers that one request reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Of which table.
    pub table: Table,
    /// From where.
    pub start: u16,
    /// How many.
    pub count: u16,
    /// Whose they are: places in the list of points.
    pub members: Vec<usize>,
}

/// Puts points into as few requests as they fit in: those that are next to each other or no more than `gap` registers apart (sixteen
/// times that for bits), up to what a request may ask for. `alone` are those that are asked for by themselves.
#[must_use]
pub fn group(points: &[&Register], gap: u16, alone: impl Fn(&Register) -> bool) -> Vec<Span> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by_key(|&index| (points[index].table, points[index].address));
    let mut spans: Vec<Span> = Vec::new();
    let mut open = false;
    for index in order {
        let point = points[index];
        let end = u32::from(point.address) + u32::from(point.count);
        let gap = if point.table.is_bits() { u32::from(gap) * 16 } else { u32::from(gap) };
        let joins = |span: &Span| {
            let reached = u32::from(span.start) + u32::from(span.count);
            span.table == point.table
                && u32::from(point.address) <= reached + gap
                && end.max(reached) - u32::from(span.start) <= u32::from(point.table.most())
        };
        let by_itself = alone(point);
        match spans.last_mut().filter(|span| open && !by_itself && joins(span)) {
            Some(span) => {
                let reached = u32::from(span.start) + u32::from(span.count);
                span.count = u16::try_from(end.max(reached) - u32::from(span.start)).unwrap_or(span.count);
                span.members.push(index);
            }
            None => {
                spans.push(Span { table: point.table, start: point.address, count: point.count, members: vec![index] })
            }
        }
        open = !by_itself;
    }
    spans
}

#[cfg(test)]
mod tests;
