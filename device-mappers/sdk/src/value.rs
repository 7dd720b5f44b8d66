//! Values between a device and the world: what was read becomes what its model says it is, and text becomes what is written.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
pub use skerry_proto::device::{MAX_VALUE, PropertyType as Kind};

/// A value as a driver reads or writes it.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    Int(i64),
    /// A number.
    Double(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    Text(Box<str>),
    /// Bytes.
    Bytes(Box<[u8]>),
}

/// A value that is refused; the message says why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(pub String);

fn refuse<T>(why: impl Into<String>) -> Result<T, ValueError> {
    Err(ValueError(why.into()))
}

impl Value {
    /// The value as its model has it: converted, if that loses nothing but digits.
    ///
    /// # Errors
    ///
    /// When it cannot be one of those, is no number, or is too long.
    pub fn conform(self, kind: Kind) -> Result<Self, ValueError> {
        match (&self, kind) {
            (Self::Text(text), _) if text.len() > MAX_VALUE => {
                return refuse(format!("it has {} bytes; {MAX_VALUE} is the most", text.len()));
            }
            (Self::Bytes(bytes), _) if bytes.len() > MAX_VALUE => {
                return refuse(format!("it has {} bytes; {MAX_VALUE} is the most", bytes.len()));
            }
            (Self::Double(number), _) if !number.is_finite() => return refuse(format!("it is {number}")),
            _ => {}
        }
        let value = match (self, kind) {
            (value @ Self::Int(_), Kind::Int)
            | (value @ Self::Double(_), Kind::Float | Kind::Double)
            | (value @ Self::Bool(_), Kind::Boolean)
            | (value @ Self::Text(_), Kind::String)
            | (value @ Self::Bytes(_), Kind::Bytes) => value,
            (Self::Double(number), Kind::Int) => Self::Int(whole(number)?),
            (Self::Bool(truth), Kind::Int) => Self::Int(truth.into()),
            #[expect(clippy::cast_precision_loss, reason = "the model asks for it")]
            (Self::Int(number), Kind::Float | Kind::Double) => Self::Double(number as f64),
            (Self::Bool(truth), Kind::Float | Kind::Double) => Self::Double(f64::from(u8::from(truth))),
            (Self::Int(number), Kind::Boolean) => Self::Bool(number != 0),
            (Self::Double(number), Kind::Boolean) => Self::Bool(number != 0.0),
            (Self::Text(text), Kind::Int | Kind::Float | Kind::Double | Kind::Boolean) => Self::parse(&text, kind)?,
            (Self::Bytes(bytes), Kind::Int | Kind::Float | Kind::Double | Kind::Boolean | Kind::String) => {
                match String::from_utf8(bytes.into_vec()) {
                    Ok(text) if kind == Kind::String => Self::Text(text.into()),
                    Ok(text) => Self::parse(&text, kind)?,
                    Err(_) => return refuse("it is not text (UTF-8); a property of type BYTES takes any bytes"),
                }
            }
            (value, Kind::String) => Self::Text(value.render(kind).into()),
            (Self::Text(text), Kind::Bytes) => Self::Bytes(text.into_boxed_bytes()),
            (value, Kind::Bytes) => Self::Bytes(value.render(kind).into_bytes().into()),
            (_, Kind::Stream) => return refuse("a property of type STREAM has no values"),
        };
        match &value {
            Self::Double(number) if !kind.holds(*number) => {
                refuse(format!("{number} does not fit into a FLOAT, which has 32 bits"))
            }
            Self::Bytes(bytes) if encoded(bytes) > MAX_VALUE => {
                refuse(format!("it has {} bytes in base64; {MAX_VALUE} is the most", encoded(bytes)))
            }
            _ => Ok(value),
        }
    }

    /// A value from the text that the interface carries.
    ///
    /// # Errors
    ///
    /// When the text is no such value.
    pub fn parse(text: &str, kind: Kind) -> Result<Self, ValueError> {
        if text.len() > MAX_VALUE {
            return refuse(format!("it has {} bytes; {MAX_VALUE} is the most", text.len()));
        }
        let trimmed = text.trim();
        let wrong = |what: &str| ValueError(format!("{:?} is no {what}", shortened(text)));
        Ok(match kind {
            Kind::Int => match trimmed.parse::<i64>() {
                Ok(number) => Self::Int(number),
                Err(_) => Self::Int(whole(trimmed.parse::<f64>().map_err(|_| wrong("whole number"))?)?),
            },
            Kind::Float | Kind::Double => match trimmed.parse::<f64>() {
                Ok(number) if kind.holds(number) => Self::Double(number),
                _ => return Err(wrong("number")),
            },
            Kind::Boolean => match trimmed.to_ascii_lowercase().as_str() {
                "true" | "1" | "on" => Self::Bool(true),
                "false" | "0" | "off" => Self::Bool(false),
                _ => return Err(wrong("truth value: true or false")),
            },
            Kind::String => Self::Text(text.into()),
            Kind::Bytes => Self::Bytes(STANDARD.decode(trimmed).map_err(|_| wrong("base64"))?.into()),
            Kind::Stream => return refuse("a property of type STREAM has no values"),
        })
    }

    /// The text that the interface carries.
    #[must_use]
    pub fn render(&self, kind: Kind) -> String {
        let mut text = String::new();
        self.render_into(kind, &mut text);
        text
    }

    /// As [`Value::render`], appended.
    pub fn render_into(&self, kind: Kind, out: &mut String) {
        match self {
            Self::Int(number) => drop(write!(out, "{number}")),
            Self::Double(number) => render_number(*number, kind, out),
            Self::Bool(truth) => out.push_str(if *truth { "true" } else { "false" }),
            Self::Text(text) => out.push_str(text),
            Self::Bytes(bytes) => STANDARD.encode_string(bytes, out),
        }
    }

    /// The value in JSON, appended: numbers and truth values as such, bytes in base64.
    pub fn json_into(&self, kind: Kind, out: &mut String) {
        match self {
            Self::Text(text) => json_string(text, out),
            Self::Bytes(_) => {
                out.push('"');
                self.render_into(kind, out);
                out.push('"');
            }
            Self::Int(_) | Self::Double(_) | Self::Bool(_) => self.render_into(kind, out),
        }
    }

    /// As a number, if it is one.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "for comparing")]
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Int(number) => Some(*number as f64),
            Self::Double(number) => Some(*number),
            Self::Bool(truth) => Some(f64::from(u8::from(*truth))),
            Self::Text(_) | Self::Bytes(_) => None,
        }
    }

    /// Whether two values are the same, numbers within `tolerance` and what a 32-bit number can tell apart.
    #[must_use]
    pub fn matches(&self, other: &Self, kind: Kind, tolerance: f64) -> bool {
        match (self.number(), other.number()) {
            (Some(one), Some(two)) => {
                let digits = if matches!(kind, Kind::Float | Kind::Double) { 1e-6 } else { 0.0 };
                (one - two).abs() <= tolerance.max(one.abs().max(two.abs()) * digits)
            }
            _ => self == other,
        }
    }
}

/// Appends text as a JSON string.
pub(crate) fn json_string(text: &str, out: &mut String) {
    match serde_json::to_string(text) {
        Ok(json) => out.push_str(&json),
        Err(_) => out.push_str("\"\""),
    }
}

fn render_number(number: f64, kind: Kind, out: &mut String) {
    let plain = number == 0.0 || (1e-5..1e15).contains(&number.abs());
    #[expect(clippy::cast_possible_truncation, reason = "a FLOAT has no more digits")]
    let short = number as f32;
    let _ = match (plain, kind == Kind::Float && short.is_finite()) {
        (true, true) => write!(out, "{short}"),
        (true, false) => write!(out, "{number}"),
        (false, true) => write!(out, "{short:e}"),
        (false, false) => write!(out, "{number:e}"),
    };
}

/// How long bytes are in base64.
fn encoded(bytes: &[u8]) -> usize {
    bytes.len().div_ceil(3) * 4
}

fn whole(number: f64) -> Result<i64, ValueError> {
    let rounded = number.round();
    if !(-9.2e18..=9.2e18).contains(&rounded) {
        return refuse(format!("{number} does not fit into a whole number of 64 bits"));
    }
    #[expect(clippy::cast_possible_truncation, reason = "just checked")]
    Ok(rounded as i64)
}

/// The beginning of a text, for messages.
#[must_use]
pub fn shortened(text: &str) -> &str {
    match text.char_indices().nth(60) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn values_become_what_the_model_says() {
        let cases = [
            (Value::Double(21.6), Kind::Int, "22"),
            (Value::Int(1), Kind::Boolean, "true"),
            (Value::Bool(true), Kind::Int, "1"),
            (Value::Int(7), Kind::Double, "7"),
            (Value::Double(0.1), Kind::Float, "0.1"),
            (Value::Double(0.1 + 0.2), Kind::Float, "0.3"),
            (Value::Double(1e300), Kind::Double, "1e300"),
            (Value::Text("42".into()), Kind::Int, "42"),
            (Value::Bytes(b"abc".as_slice().into()), Kind::String, "abc"),
            (Value::Bytes(vec![0, 255].into()), Kind::Bytes, "AP8="),
        ];
        for (value, kind, text) in cases {
            assert_eq!(value.clone().conform(kind).unwrap().render(kind), text, "{value:?} as {kind:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (value, kind) in [
            (Value::Double(f64::NAN), Kind::Double),
            (Value::Double(f64::INFINITY), Kind::Int),
            (Value::Double(1e30), Kind::Int),
            (Value::Text("warm".into()), Kind::Float),
            (Value::Bytes(vec![0xff].into()), Kind::String),
            (Value::Text("x".repeat(10 << 20).into()), Kind::String),
            (Value::Bytes(vec![0; 10 << 20].into()), Kind::Bytes),
            (Value::Bytes(vec![0; 50_000].into()), Kind::Bytes),
            (Value::Double(1e39), Kind::Float),
            (Value::Int(1), Kind::Stream),
        ] {
            assert!(value.conform(kind).is_err());
        }
        let long = "x".repeat(10 << 20);
        assert!(Value::parse(&long, Kind::String).unwrap_err().to_string().len() < 100);
    }

    proptest! {
        #[test]
        fn text_and_value_go_both_ways(number: i64, float in proptest::num::f64::NORMAL, truth: bool, bytes: Vec<u8>) {
            for (value, kind) in [
                (Value::Int(number), Kind::Int),
                (Value::Double(float), Kind::Double),
                (Value::Bool(truth), Kind::Boolean),
                (Value::Bytes(bytes.into()), Kind::Bytes),
            ] {
                prop_assert_eq!(Value::parse(&value.render(kind), kind).unwrap(), value);
            }
        }

        #[test]
        fn json_is_json(text: String, float in proptest::num::f64::NORMAL) {
            let mut json = String::new();
            Value::Text(text.clone().into()).json_into(Kind::String, &mut json);
            prop_assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
            let mut json = String::new();
            Value::Double(float).json_into(Kind::Double, &mut json);
            prop_assert!(serde_json::from_str::<serde_json::Value>(&json).unwrap().is_number());
        }

        #[test]
        fn no_text_breaks_it(text: String) {
            for kind in [Kind::Int, Kind::Float, Kind::Double, Kind::String, Kind::Boolean, Kind::Bytes, Kind::Stream] {
                let _ = Value::parse(&text, kind);
                let _ = Value::Text(text.clone().into()).conform(kind);
            }
        }
    }
}
