//! What a value looks like to a sink, and which sink a `pushMethod` means. Pure.

use std::fmt::Write as _;
use std::path::PathBuf;

use skerry_proto::dmi;

use super::Target;
use crate::device::kind_name;
use crate::value::{Kind, Value, json_string};

/// How one property's values become records. What is the same of all of them is prepared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// `{"namespace": …, "device": …, "property": …, "type": …, "value": …, "timestamp": …}`; this is what is before the value.
    Json(Box<str>),
    /// The same, with what a PUBLISH needs before it.
    Publish { topic: Box<str>, qos: u8, retained: bool, json: Box<str> },
    /// Line protocol; this is what is before the value.
    Line(Box<str>),
}

/// The first bytes of a record of [`Format::Publish`]: QoS and retain, and the length of the topic.
pub(crate) const PUBLISH_HEAD: usize = 3;

impl Format {
    /// Appends a record.
    pub(crate) fn record(&self, value: &Value, kind: Kind, time: i64, out: &mut Vec<u8>) {
        let mut text = String::new();
        match self {
            Self::Json(json) => json_record(json, value, kind, time, &mut text),
            Self::Publish { topic, qos, retained, json } => {
                let length = u16::try_from(topic.len()).unwrap_or(0).to_be_bytes();
                out.extend_from_slice(&[qos | u8::from(*retained) << 2, length[0], length[1]]);
                out.extend_from_slice(topic.as_bytes());
                json_record(json, value, kind, time, &mut text);
            }
            Self::Line(line) => {
                text.push_str(line);
                match value {
                    Value::Int(number) => drop(write!(text, "{number}i")),
                    Value::Double(_) | Value::Bool(_) => value.render_into(kind, &mut text),
                    Value::Text(_) | Value::Bytes(_) => {
                        text.push('"');
                        for character in value.render(kind).chars() {
                            if matches!(character, '"' | '\\') {
                                text.push('\\');
                            }
                            text.push(character);
                        }
                        text.push('"');
                    }
                }
                let _ = write!(text, " {time}");
            }
        }
        out.extend_from_slice(text.as_bytes());
    }
}

fn json_record(before: &str, value: &Value, kind: Kind, time: i64, out: &mut String) {
    out.reserve(before.len() + 48);
    out.push_str(before);
    value.json_into(kind, out);
    let _ = write!(out, ",\"timestamp\":{time}}}");
}

type Wanted = Result<(Target, Format), String>;

/// What a property's `pushMethod` asks for.
pub(crate) fn targets(
    namespace: &str,
    device: &str,
    property: &str,
    kind: Kind,
    push: &dmi::PushMethod,
) -> Vec<Wanted> {
    let json = || -> Box<str> {
        let mut json = String::new();
        for (name, text) in [("{\"namespace\":", namespace), (",\"device\":", device), (",\"property\":", property)] {
            json.push_str(name);
            json_string(text, &mut json);
        }
        let _ = write!(json, ",\"type\":\"{}\",\"value\":", kind_name(kind));
        json.into()
    };
    let mut wanted = Vec::new();
    if let Some(mqtt) = &push.mqtt {
        wanted.push(publish(mqtt, json()));
    }
    if let Some(http) = &push.http {
        wanted.push(post(http, json()));
    }
    if let Some(db) = &push.db_method {
        if let Some(influx) = &db.influxdb2 {
            wanted.push(line(influx, device, property));
        }
        for (there, name) in
            [(db.redis.is_some(), "redis"), (db.tdengine.is_some(), "TDEngine"), (db.mysql.is_some(), "mysql")]
        {
            if there {
                wanted.push(Err(format!("pushMethod.dbMethod.{name} is not supported: use influxdb2, mqtt or http")));
            }
        }
    }
    if push.otel.is_some() {
        wanted.push(Err(
            "pushMethod.otel is not supported: use http or mqtt, and let the collector receive that".to_owned()
        ));
    }
    if let Some(file) = &push.file {
        wanted.push(lines(file, json()));
    }
    wanted
}

fn publish(mqtt: &dmi::PushMethodMqtt, json: Box<str>) -> Wanted {
    let topic = mqtt.topic.as_str();
    if topic.is_empty() || topic.len() > 1024 || topic.contains(['#', '+', '\0']) {
        return Err(format!("pushMethod.mqtt.topic {topic:?} has to have 1 to 1024 bytes and no wildcard"));
    }
    let qos = u8::try_from(mqtt.qos).ok().filter(|&qos| qos <= 2);
    let qos = qos.ok_or_else(|| format!("pushMethod.mqtt.qos is {}, but has to be 0, 1 or 2", mqtt.qos))?;
    crate::net::Address::parse(&mqtt.address, 1883).map_err(|error| format!("pushMethod.mqtt.address: {error}"))?;
    let format = Format::Publish { topic: topic.into(), qos, retained: mqtt.retained, json };
    Ok((Target::Mqtt(mqtt.address.clone()), format))
}

fn post(http: &dmi::PushMethodHttp, json: Box<str>) -> Wanted {
    let scheme = if http.hostname.contains("://") { "" } else { "http://" };
    let port = match http.port {
        0 => String::new(),
        port @ 1..=65535 => format!(":{port}"),
        port => return Err(format!("pushMethod.http.port is {port}, but has to be from 1 to 65535")),
    };
    let slash = if http.requestpath.starts_with('/') { "" } else { "/" };
    let url = format!("{scheme}{}{port}{slash}{}", http.hostname.trim_end_matches('/'), http.requestpath);
    crate::net::Address::parse(&url, 80).map_err(|error| format!("pushMethod.http: {error}"))?;
    let timeout = u32::try_from(http.timeout).ok().filter(|&timeout| timeout > 0).unwrap_or(10_000);
    Ok((Target::Http(url, timeout), Format::Json(json)))
}

fn line(influx: &dmi::DbMethodInfluxdb2, device: &str, property: &str) -> Wanted {
    let (Some(client), Some(data)) = (&influx.influxdb2_client_config, &influx.influxdb2_data_config) else {
        return Err("pushMethod.dbMethod.influxdb2 has to have a client and a data configuration".to_owned());
    };
    crate::net::Address::parse(&client.url, 8086).map_err(|error| format!("influxdb2ClientConfig.url: {error}"))?;
    let field = if data.field_key.is_empty() { property } else { &data.field_key };
    let measurement = if data.measurement.is_empty() { device } else { &data.measurement };
    let mut line = String::new();
    escape(measurement, &[',', ' '], &mut line);
    let mut tags: Vec<(&str, &str)> = data.tag.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    // Two devices that share a measurement would overwrite each other's points.
    if !data.tag.contains_key("device") {
        tags.push(("device", device));
    }
    tags.sort_unstable();
    for (key, value) in tags.into_iter().filter(|(key, value)| !key.is_empty() && !value.is_empty()) {
        line.push(',');
        escape(key, &[',', ' ', '='], &mut line);
        line.push('=');
        escape(value, &[',', ' ', '='], &mut line);
    }
    line.push(' ');
    escape(field, &[',', ' ', '='], &mut line);
    line.push('=');
    Ok((Target::Influx(client.url.clone(), client.org.clone(), client.bucket.clone()), Format::Line(line.into())))
}

fn lines(file: &dmi::PushMethodFile, json: Box<str>) -> Wanted {
    let path = PathBuf::from(&file.path);
    if !path.is_absolute() {
        return Err(format!("pushMethod.file.path {:?} has to be absolute", file.path));
    }
    let most = u64::try_from(file.max_bytes).ok().filter(|&most| most > 0).unwrap_or(16 << 20).max(64 << 10);
    Ok((Target::File(path, most), Format::Json(json)))
}

/// Names in line protocol: special characters get a backslash, line ends a space.
fn escape(text: &str, special: &[char], out: &mut String) {
    for character in text.chars() {
        match character {
            '\n' | '\r' => out.push_str("\\ "),
            _ if special.contains(&character) => out.extend(['\\', character]),
            _ => out.push(character),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(push: &dmi::PushMethod, value: &Value, kind: Kind) -> (Target, String) {
        let (target, format) = targets("default", "pump", "speed", kind, push).remove(0).unwrap();
        let mut bytes = Vec::new();
        format.record(value, kind, 1_700_000_000_000, &mut bytes);
        (target, String::from_utf8(bytes).unwrap())
    }

    fn influx() -> dmi::PushMethod {
        let client =
            dmi::Influxdb2ClientConfig { url: "http://127.0.0.1:8086".into(), org: "o".into(), bucket: "b".into() };
        let data = dmi::Influxdb2DataConfig {
            measurement: "my stats".into(),
            tag: [("unit".to_owned(), "a=b, c".to_owned())].into(),
            field_key: "v".into(),
        };
        let influxdb2 =
            dmi::DbMethodInfluxdb2 { influxdb2_client_config: Some(client), influxdb2_data_config: Some(data) };
        let db = dmi::DbMethod { influxdb2: Some(influxdb2), ..dmi::DbMethod::default() };
        dmi::PushMethod { db_method: Some(db), ..dmi::PushMethod::default() }
    }

    #[test]
    fn line_protocol_is_escaped() {
        let line = |value, kind| record(&influx(), &value, kind).1;
        let before = "my\\ stats,device=pump,unit=a\\=b\\,\\ c v=";
        assert_eq!(line(Value::Double(1.5), Kind::Double), format!("{before}1.5 1700000000000"));
        assert_eq!(line(Value::Int(-3), Kind::Int), format!("{before}-3i 1700000000000"));
        assert_eq!(
            line(Value::Text("a \"b\" \\".into()), Kind::String),
            format!("{before}\"a \\\"b\\\" \\\\\" 1700000000000")
        );
    }

    #[test]
    fn http_takes_kubeedges_keys() {
        let http =
            dmi::PushMethodHttp { hostname: "http://10.0.0.1".into(), port: 80, requestpath: "/in".into(), timeout: 0 };
        let push = dmi::PushMethod { http: Some(http), ..dmi::PushMethod::default() };
        let (target, json) = record(&push, &Value::Text("ja\n".into()), Kind::String);
        assert_eq!(target, Target::Http("http://10.0.0.1:80/in".to_owned(), 10_000));
        assert_eq!(
            json,
            r#"{"namespace":"default","device":"pump","property":"speed","type":"STRING","value":"ja\n","timestamp":1700000000000}"#
        );
    }

    #[test]
    fn a_publish_has_its_topic_before_it() {
        let mqtt =
            dmi::PushMethodMqtt { address: "tcp://127.0.0.1:1883".into(), topic: "t/1".into(), qos: 1, retained: true };
        let push = dmi::PushMethod { mqtt: Some(mqtt), ..dmi::PushMethod::default() };
        let (_, record) = record(&push, &Value::Bool(true), Kind::Boolean);
        assert!(record.starts_with("\u{5}\0\u{3}t/1{"), "{record:?}");
    }

    #[test]
    fn what_is_not_supported_is_said() {
        let mqtt = |topic: &str, qos| dmi::PushMethod {
            mqtt: Some(dmi::PushMethodMqtt { address: "tcp://h".into(), topic: topic.into(), qos, retained: false }),
            ..dmi::PushMethod::default()
        };
        let otel = dmi::PushMethod { otel: Some(dmi::PushMethodOtel::default()), ..dmi::PushMethod::default() };
        for push in [mqtt("a/#", 0), mqtt("", 0), mqtt("a", 3), otel] {
            let wanted = targets("n", "d", "p", Kind::Int, &push);
            assert!(wanted.len() == 1 && wanted[0].is_err(), "{push:?}");
        }
    }
}
