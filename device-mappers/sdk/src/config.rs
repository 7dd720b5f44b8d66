//! `configData` of a device or a property: keys without regard to case, as KubeEdge's mappers read them, and values that may be text where
//! a number or a truth value is wanted.

use serde_json::Value;
use skerry_proto::dmi::{CustomizedValue, ProtocolConfig, VisitorConfig};

/// The keys of one `configData`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// Sorted by key. A list, for there are few, and thousands of these.
    entries: Box<[(Box<str>, Value)]>,
}

/// A key that is missing or is not what it has to be: the message says which, what it is, and what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

impl From<&CustomizedValue> for Config {
    fn from(data: &CustomizedValue) -> Self {
        Self::new(data.data.iter().filter_map(|(key, any)| Some((key.as_str().into(), unpack(any)?))))
    }
}

impl From<Option<&ProtocolConfig>> for Config {
    fn from(protocol: Option<&ProtocolConfig>) -> Self {
        protocol.and_then(|protocol| protocol.config_data.as_ref()).map(Self::from).unwrap_or_default()
    }
}

impl From<Option<&VisitorConfig>> for Config {
    fn from(visitor: Option<&VisitorConfig>) -> Self {
        visitor.and_then(|visitor| visitor.config_data.as_ref()).map(Self::from).unwrap_or_default()
    }
}

impl From<Value> for Config {
    fn from(value: Value) -> Self {
        match value {
            Value::Object(entries) => Self::new(entries.into_iter().map(|(key, value)| (key.into(), value))),
            _ => Self::default(),
        }
    }
}

impl Config {
    fn new(entries: impl Iterator<Item = (Box<str>, Value)>) -> Self {
        let mut entries: Vec<(Box<str>, Value)> = entries.collect();
        entries.sort_unstable_by(|(one, _), (two, _)| one.cmp(two));
        Self { entries: entries.into() }
    }

    /// The same with what it lacks of some keys, from another.
    #[must_use]
    pub(crate) fn or(self, keys: &[&str], other: &Self) -> Self {
        let lacking: Vec<_> = keys
            .iter()
            .filter(|key| self.raw(key).is_none())
            .filter_map(|key| Some(((*key).into(), other.raw(key)?.clone())))
            .collect();
        if lacking.is_empty() { self } else { Self::new(self.entries.into_iter().chain(lacking)) }
    }

    /// The value of a key, whatever its case.
    #[must_use]
    pub fn raw(&self, key: &str) -> Option<&Value> {
        let of = |wanted: &dyn Fn(&str) -> bool| self.entries.iter().find(|(name, _)| wanted(name));
        let found = of(&|name| name == key).or_else(|| of(&|name| name.eq_ignore_ascii_case(key)));
        found.map(|(_, value)| value).filter(|value| !value.is_null())
    }

    /// Text; a number or a truth value is written out. Empty text counts as none.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<String> {
        let text = match self.raw(key)? {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        (!text.is_empty()).then_some(text)
    }

    /// Text that has to be there.
    ///
    /// # Errors
    ///
    /// When it is not.
    pub fn required(&self, key: &str) -> Result<String, ConfigError> {
        self.text(key).ok_or_else(|| ConfigError(format!("`{key}` is missing from configData")))
    }

    /// A whole number of at least `least` and at most `most`.
    ///
    /// # Errors
    ///
    /// When it is something else.
    pub fn integer(&self, key: &str, least: i64, most: i64) -> Result<Option<i64>, ConfigError> {
        let Some(value) = self.raw(key) else { return Ok(None) };
        let number = match value {
            Value::String(text) if text.is_empty() => return Ok(None),
            Value::String(text) => text.trim().parse().ok(),
            #[expect(clippy::cast_possible_truncation, reason = "checked to be whole and small")]
            Value::Number(number) => number.as_i64().or_else(|| {
                number.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < 9e15).map(|float| float as i64)
            }),
            _ => None,
        };
        match number {
            Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => Err(ConfigError(format!("`{key}` is {value}, but has to be a whole number from {least} to {most}"))),
        }
    }

    /// A finite number.
    ///
    /// # Errors
    ///
    /// When it is something else.
    pub fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.raw(key) else { return Ok(None) };
        let number = match value {
            Value::String(text) if text.is_empty() => return Ok(None),
            Value::String(text) => text.trim().parse().ok(),
            Value::Number(number) => number.as_f64(),
            _ => None,
        };
        match number {
            Some(number) if f64::is_finite(number) => Ok(Some(number)),
            _ => Err(ConfigError(format!("`{key}` is {value}, but has to be a number"))),
        }
    }

    /// `true` or `false`; false when it is not there.
    ///
    /// # Errors
    ///
    /// When it is something else.
    pub fn flag(&self, key: &str) -> Result<bool, ConfigError> {
        match self.raw(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
            Some(Value::String(text)) if text.is_empty() || text.eq_ignore_ascii_case("false") => Ok(false),
            Some(other) => Err(ConfigError(format!("`{key}` is {other}, but has to be true or false"))),
        }
    }

    /// An object: DMI carries one as the text of its JSON.
    ///
    /// # Errors
    ///
    /// When it is something else.
    pub fn object(&self, key: &str) -> Result<Option<Self>, ConfigError> {
        let wrong = |what: &Value| ConfigError(format!("`{key}` is {what}, but has to be an object"));
        match self.raw(key) {
            None => Ok(None),
            Some(object @ Value::Object(_)) => Ok(Some(Self::from(object.clone()))),
            Some(text @ Value::String(json)) => match serde_json::from_str(json) {
                Ok(object @ Value::Object(_)) => Ok(Some(Self::from(object))),
                _ => Err(wrong(text)),
            },
            Some(other) => Err(wrong(other)),
        }
    }

    /// The keys.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|(key, _)| &**key)
    }
}

/// What an Any of a wrapper type holds; none for types that configuration is not made of.
fn unpack(any: &prost_types::Any) -> Option<Value> {
    use prost::Message as _;
    let bytes = any.value.as_slice();
    match any.type_url.rsplit('/').next()? {
        "google.protobuf.StringValue" => String::decode(bytes).ok().map(Value::from),
        "google.protobuf.BoolValue" => bool::decode(bytes).ok().map(Value::from),
        "google.protobuf.Int64Value" => i64::decode(bytes).ok().map(Value::from),
        "google.protobuf.Int32Value" => i32::decode(bytes).ok().map(Value::from),
        "google.protobuf.UInt64Value" => u64::decode(bytes).ok().map(Value::from),
        "google.protobuf.UInt32Value" => u32::decode(bytes).ok().map(Value::from),
        "google.protobuf.DoubleValue" => f64::decode(bytes).ok().map(Value::from),
        "google.protobuf.FloatValue" => f32::decode(bytes).ok().map(Value::from),
        "google.protobuf.BytesValue" => {
            Vec::<u8>::decode(bytes).ok().and_then(|raw| String::from_utf8(raw).ok()).map(Value::from)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use serde_json::json;

    use super::*;

    fn any(kind: &str, value: Vec<u8>) -> prost_types::Any {
        prost_types::Any { type_url: format!("type.googleapis.com/google.protobuf.{kind}"), value }
    }

    #[test]
    fn wrappers_are_unpacked_and_keys_found_in_any_case() {
        let data = CustomizedValue {
            data: [
                ("slaveId".to_owned(), any("Int64Value", 3i64.encode_to_vec())),
                ("scale".to_owned(), any("DoubleValue", 0.1f64.encode_to_vec())),
                ("ip".to_owned(), any("StringValue", "10.0.0.1".to_owned().encode_to_vec())),
                ("isSwap".to_owned(), any("BoolValue", true.encode_to_vec())),
                ("methods".to_owned(), any("StringValue", r#"{"a":{"b":1}}"#.to_owned().encode_to_vec())),
                ("strange".to_owned(), any("Struct", vec![1, 2, 3])),
            ]
            .into(),
        };
        let config = Config::from(&data);
        assert_eq!(config.integer("slaveID", 0, 255), Ok(Some(3)));
        assert_eq!(config.number("scale"), Ok(Some(0.1)));
        assert_eq!(config.text("ip").as_deref(), Some("10.0.0.1"));
        assert_eq!(config.flag("isswap"), Ok(true));
        assert_eq!(
            config.object("methods").unwrap().unwrap().object("A").unwrap().unwrap().integer("b", 0, 9),
            Ok(Some(1))
        );
        assert_eq!(config.raw("strange"), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let config = Config::from(json!({"port": "abc", "slaveID": 300, "scale": "x", "flag": 7, "text": ""}));
        assert_eq!(
            config.integer("port", 1, 65535).unwrap_err().to_string(),
            "`port` is \"abc\", but has to be a whole number from 1 to 65535"
        );
        assert!(config.integer("slaveID", 0, 255).is_err());
        assert!(config.number("scale").is_err());
        assert!(config.flag("flag").is_err());
        assert_eq!(config.required("text").unwrap_err().to_string(), "`text` is missing from configData");
        assert_eq!(config.integer("none", 0, 1), Ok(None));
    }

    #[test]
    fn what_is_lacking_is_taken_from_another() {
        let other = Config::from(json!({"clientId": "c", "username": "u", "password": "p", "topic": "t"}));
        let config =
            Config::from(json!({"ip": "h", "userName": "own"})).or(&["clientID", "username", "password"], &other);
        assert_eq!(config, Config::from(json!({"ip": "h", "userName": "own", "clientID": "c", "password": "p"})));
    }

    #[test]
    fn numbers_may_be_text() {
        let config = Config::from(json!({"port": "1502", "scale": "0.5", "whole": 3.0, "half": 3.5}));
        assert_eq!(config.integer("port", 1, 65535), Ok(Some(1502)));
        assert_eq!(config.number("scale"), Ok(Some(0.5)));
        assert_eq!(config.integer("whole", 0, 10), Ok(Some(3)));
        assert!(config.integer("half", 0, 10).is_err());
    }
}
