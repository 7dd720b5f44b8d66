//! Values in messages: what a payload says a property is, and what is sent to set one. For protocols whose devices agree on no format.

use serde_json::Value as Json;

use crate::value::{Kind, MAX_VALUE, Value, shortened};
use crate::{Config, ConfigError, Sample};

/// A message longer than this is refused, bytes.
pub const MAX_MESSAGE: usize = 2 * MAX_VALUE;

/// Where in a message a property is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Form {
    /// JSON pointer (RFC 6901) of the value; none: the whole message is the value.
    pub value: Option<String>,
    /// JSON pointer of its time, milliseconds since the Unix epoch.
    pub time: Option<String>,
    /// What is sent to set it: `${value}` stands for the value in JSON. None: the value as text.
    pub template: Option<String>,
}

impl Form {
    /// The keys `jsonPointer`, `timestampPointer` and `writeTemplate` of a visitor.
    ///
    /// # Errors
    ///
    /// When one of them is wrong.
    pub fn new(visitor: &Config) -> Result<Self, ConfigError> {
        let pointer = |key: &str| match visitor.text(key) {
            Some(pointer) if !pointer.starts_with('/') => {
                Err(ConfigError(format!("`{key}` is {pointer:?}, but a JSON pointer begins with /: /data/temperature")))
            }
            pointer => Ok(pointer),
        };
        let template = visitor.text("writeTemplate");
        if let Some(template) = template.as_ref().filter(|template| !template.contains("${value}")) {
            return Err(ConfigError(format!("`writeTemplate` is {template:?}, but has to have ${{value}} in it")));
        }
        Ok(Self { value: pointer("jsonPointer")?, time: pointer("timestampPointer")?, template })
    }

    /// What a message says.
    ///
    /// # Errors
    ///
    /// When it is too long, is no JSON, or has no such value.
    pub fn extract(&self, message: &[u8]) -> Result<Sample, String> {
        if message.len() > MAX_MESSAGE {
            return Err(format!("the message has {} bytes; {MAX_MESSAGE} is the most", message.len()));
        }
        let Some(pointer) = &self.value else {
            // What is no text can still be a property of type BYTES.
            let value = match std::str::from_utf8(message) {
                Ok(text) => Value::Text(text.into()),
                Err(_) => Value::Bytes(message.into()),
            };
            return Ok(Sample { value, time: None });
        };
        let json: Json = serde_json::from_slice(message).map_err(|error| format!("the message is no JSON: {error}"))?;
        let found = json.pointer(pointer).ok_or_else(|| format!("the message has nothing at {pointer}"))?;
        let value = match found {
            Json::Null => return Err(format!("the message has null at {pointer}")),
            Json::Bool(truth) => Value::Bool(*truth),
            Json::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(number), _) => Value::Int(number),
                (None, Some(number)) => Value::Double(number),
                (None, None) => return Err(format!("the message has {number} at {pointer}, which is too large")),
            },
            Json::String(text) => Value::Text(text.as_str().into()),
            other => Value::Text(other.to_string().into()),
        };
        Ok(Sample { value, time: self.time.as_ref().and_then(|pointer| json.pointer(pointer)?.as_i64()) })
    }

    /// The message that sets a value.
    #[must_use]
    pub fn compose(&self, value: &Value, kind: Kind) -> Vec<u8> {
        match (&self.template, value) {
            (Some(template), _) => {
                let mut json = String::new();
                value.json_into(kind, &mut json);
                template.replace("${value}", &json).into_bytes()
            }
            (None, Value::Bytes(bytes)) => bytes.to_vec(),
            (None, value) => value.render(kind).into_bytes(),
        }
    }
}

/// A message in a few words, for logs.
#[must_use]
pub fn brief(message: &[u8]) -> String {
    let text = String::from_utf8_lossy(message.get(..240).unwrap_or(message)).into_owned();
    shortened(text.trim()).to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn form(visitor: Json) -> Form {
        Form::new(&Config::from(visitor)).unwrap()
    }

    #[test]
    fn a_pointer_finds_the_value_and_its_time() {
        let form = form(json!({"jsonPointer": "/data/1/t", "timestampPointer": "/ts"}));
        let message = br#"{"ts": 1700000000000, "data": [{}, {"t": 21.5}]}"#;
        let sample = Sample { value: Value::Double(21.5), time: Some(1_700_000_000_000) };
        assert_eq!(form.extract(message), Ok(sample));
        for message in [&b"{}"[..], b"", b"21.5", b"{\"data\": [0, {\"t\": null}]}", b"{\"data\"", &[0xff; 9]] {
            assert!(form.extract(message).is_err(), "{message:?}");
        }
    }

    #[test]
    fn without_a_pointer_the_message_is_the_value() {
        assert_eq!(Form::default().extract(b"on").unwrap().value, Value::Text("on".into()));
        assert_eq!(Form::default().extract(&[0xff]).unwrap().value, Value::Bytes([0xff].into()));
        let long = Form::default().extract(&vec![b'x'; 10 << 20]).unwrap_err();
        assert!(long.contains("10485760"), "{long}");
    }

    #[test]
    fn a_template_wraps_what_is_sent() {
        let form = form(json!({"writeTemplate": "{\"set\": ${value}}"}));
        assert_eq!(form.compose(&Value::Text("a\"b".into()), Kind::String), br#"{"set": "a\"b"}"#);
        assert_eq!(Form::default().compose(&Value::Double(1.5), Kind::Float), b"1.5");
        assert!(Form::new(&Config::from(json!({"writeTemplate": "x"}))).is_err());
        assert!(Form::new(&Config::from(json!({"jsonPointer": "a.b"}))).is_err());
    }

    proptest! {
        #[test]
        fn no_message_breaks_it(message: Vec<u8>, text: String) {
            let form = form(json!({"jsonPointer": "/a", "timestampPointer": "/b"}));
            let _ = (form.extract(&message), Form::default().extract(&message));
            let _ = form.extract(format!("{{\"a\": {text}, \"b\": {text}}}").as_bytes());
            let _ = brief(&message);
        }
    }
}
