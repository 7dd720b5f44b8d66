//! OPC UA servers, over channels without security.

pub mod client;
pub mod status;
pub mod wire;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use client::{Client, Failure, Identity};
use skerry_mapper::net::Address;
use skerry_mapper::{
    Config, ConfigError, DeviceInfo, Driver, Fault, Link, Point, PropertyInfo, Reading, Sample, Value, clock,
};
use wire::{DataValue, NodeId, Variant};

/// A session without requests ends after a minute: something is asked well before.
const IDLE: Duration = Duration::from_secs(20);
/// `ServerStatus.State`, which every server has.
const STATE: u32 = 2259;

/// The protocol.
#[derive(Debug)]
pub struct OpcUa;

/// One property.
#[derive(Debug)]
pub struct Node {
    id: NodeId,
    subscribe: bool,
    interval: Duration,
}

/// A session at a server.
#[derive(Debug)]
pub struct Session {
    client: Client,
    methods: Vec<Method>,
    /// The types of nodes that were read, which writes have to have.
    types: HashMap<NodeId, Variant>,
    /// Nodes whose values are so long that they are read by themselves.
    alone: HashSet<NodeId>,
    waiting: Vec<Reading>,
    asked: Duration,
}

#[derive(Debug)]
struct Method {
    name: String,
    object: NodeId,
    method: NodeId,
    inputs: Vec<(String, Variant)>,
    outputs: Vec<String>,
}

impl Point for Node {
    fn polled(&self) -> bool {
        !self.subscribe
    }
}

impl Driver for OpcUa {
    type Point = Node;
    type Link = Session;

    fn protocol(&self) -> &'static str {
        "opcua"
    }

    fn point(&self, _: &PropertyInfo<'_>, visitor: &Config) -> Result<Node, ConfigError> {
        let interval = visitor.integer("samplingInterval", 10, 86_400_000)?.unwrap_or(500);
        Ok(Node {
            id: node(visitor, "nodeID")?,
            subscribe: visitor.flag("subscribe")?,
            interval: Duration::from_millis(interval.unsigned_abs()),
        })
    }

    async fn connect(&self, device: &DeviceInfo<'_>) -> Result<Session, Fault> {
        let (url, identity, patience, methods) =
            understand(device.config).map_err(|error| Fault::Refused(error.to_string()))?;
        let address = url.strip_prefix("opc.tcp://").map(|rest| Address::parse(&format!("tcp://{rest}"), 4840));
        let address =
            address.ok_or_else(|| Fault::Refused(format!("`url` is {url:?}, but has to begin with opc.tcp://")))?;
        let client = Client::open(&address.map_err(Fault::Refused)?, &url, &identity, patience).await.map_err(fault)?;
        Ok(Session {
            client,
            methods,
            types: HashMap::new(),
            alone: HashSet::new(),
            waiting: Vec::new(),
            asked: clock::monotonic(),
        })
    }
}

fn node(config: &Config, key: &str) -> Result<NodeId, ConfigError> {
    let text = config.required(key)?;
    NodeId::parse(&text)
        .ok_or_else(|| ConfigError(format!("`{key}` is {text:?}, but has to look like ns=2;s=name or ns=2;i=5")))
}

type Understood = (String, Identity, Duration, Vec<Method>);

fn understand(config: &Config) -> Result<Understood, ConfigError> {
    for key in ["securityPolicy", "securityMode"] {
        if let Some(wanted) = config.text(key).filter(|wanted| !wanted.eq_ignore_ascii_case("none")) {
            return Err(ConfigError(format!(
                "`{key}` is {wanted}, but only None is supported: use a network you trust"
            )));
        }
    }
    // Whoever gives one believes that it is used.
    if config.text("securityPolicy").is_none()
        && let Some(key) = ["certificate", "privateKey"].into_iter().find(|key| config.text(key).is_some())
    {
        return Err(ConfigError(format!(
            "`{key}` is of no use, for channels are without security; say `securityPolicy: None` if that is as it should be"
        )));
    }
    let user = match config.text("userName") {
        Some(user) => {
            let password = config.text("password").unwrap_or_default();
            // KubeEdge's manifests name a file.
            let password = if password.starts_with('/') {
                let read = std::fs::read_to_string(&password);
                read.map_err(|error| ConfigError(format!("`password` is the file {password}: {error}")))?
                    .trim()
                    .to_owned()
            } else {
                password
            };
            Some((user, password))
        }
        None => None,
    };
    let mut methods = Vec::new();
    if let Some(declared) = config.object("methods")? {
        for name in declared.keys() {
            let Some(method) = declared.object(name)? else { continue };
            methods.push(Method {
                name: name.to_owned(),
                object: node(&method, "objectID")?,
                method: node(&method, "methodID")?,
                inputs: inputs(&method)?,
                outputs: list(&method, "outputs")
                    .into_iter()
                    .filter_map(|name| Some(name.as_str()?.to_owned()))
                    .collect(),
            });
        }
    }
    let patience = config.integer("timeout", 1, 60_000)?.unwrap_or(5000);
    Ok((config.required("url")?, Identity { user }, Duration::from_millis(patience.unsigned_abs()), methods))
}

fn list(config: &Config, key: &str) -> Vec<serde_json::Value> {
    config.raw(key).and_then(|list| list.as_array()).cloned().unwrap_or_default()
}

fn inputs(method: &Config) -> Result<Vec<(String, Variant)>, ConfigError> {
    let inputs = list(method, "inputs").into_iter().map(|input| {
        let input = Config::from(input);
        let kind = input.required("type")?;
        let kind = named(&kind).ok_or_else(|| {
            ConfigError(format!("`type` is {kind:?}, but has to be a scalar of OPC UA's: Double, Int32, String, …"))
        })?;
        Ok((input.required("name")?, kind))
    });
    inputs.collect()
}

/// A value of a type that the standard names so.
fn named(name: &str) -> Option<Variant> {
    Some(match name {
        "Boolean" => Variant::Boolean(false),
        "SByte" => Variant::SByte(0),
        "Byte" => Variant::Byte(0),
        "Int16" => Variant::Int16(0),
        "UInt16" => Variant::UInt16(0),
        "Int32" => Variant::Int32(0),
        "UInt32" => Variant::UInt32(0),
        "Int64" => Variant::Int64(0),
        "UInt64" => Variant::UInt64(0),
        "Float" => Variant::Float(0.0),
        "Double" => Variant::Double(0.0),
        "String" => Variant::String(String::new()),
        "ByteString" => Variant::ByteString(Vec::new()),
        _ => return None,
    })
}

fn fault(failure: Failure) -> Fault {
    match failure {
        Failure::Gone(why) => Fault::Offline(why),
        Failure::Bad(_) | Failure::TooLong => Fault::Refused(failure.to_string()),
    }
}

impl Link for Session {
    type Point = Node;

    async fn read(&mut self, points: &[(usize, &Node)], readings: &mut Vec<Reading>) -> Result<(), Fault> {
        type Points<'a> = Vec<&'a (usize, &'a Node)>;
        let (alone, together): (Points<'_>, Points<'_>) =
            points.iter().partition(|(_, node)| self.alone.contains(&node.id));
        for point in alone {
            self.read_some(&[point], readings).await?;
        }
        // A server may bound how many it reads at once; 500 few do.
        for some in together.chunks(500) {
            match self.read_some(some, readings).await {
                Ok(()) => {}
                Err(Fault::Refused(_)) if some.len() > 1 => {
                    for point in some {
                        if self.read_some(&[point], readings).await.is_err() {
                            return Err(Fault::Offline("the server reads nothing any more".to_owned()));
                        }
                    }
                }
                Err(fault) => return Err(fault),
            }
        }
        Ok(())
    }

    async fn write(&mut self, point: &Node, value: &Value) -> Result<(), Fault> {
        let kind = match self.types.get(&point.id) {
            Some(kind) => kind.clone(),
            None => {
                let read = self.client.read(&[&point.id]).await.map_err(fault)?;
                let kind = read.into_iter().next().map_or(Variant::Null, |read| read.value);
                self.types.insert(point.id.clone(), kind.clone());
                kind
            }
        };
        let variant = variant(value, &kind).map_err(Fault::Refused)?;
        self.asked = clock::monotonic();
        self.client.write(&point.id, &variant).await.map_err(fault)
    }

    async fn subscribe(&mut self, points: &[(usize, &Node)]) -> Result<(), Fault> {
        self.client.unsubscribe().await.map_err(fault)?;
        let mut intervals: Vec<Duration> = points.iter().map(|(_, node)| node.interval).collect();
        intervals.sort_unstable();
        intervals.dedup();
        for interval in intervals {
            let nodes: Vec<(usize, &Node)> =
                points.iter().copied().filter(|(_, node)| node.interval == interval).collect();
            let handles: Vec<(u32, &NodeId)> =
                nodes.iter().map(|(index, node)| (u32::try_from(*index).unwrap_or(u32::MAX), &node.id)).collect();
            let codes = self.client.subscribe(&handles, interval).await.map_err(fault)?;
            for ((index, _), code) in nodes.iter().zip(codes).filter(|(_, code)| status::is_bad(*code)) {
                self.waiting.push(Reading::failed(*index, status::name(code)));
            }
        }
        Ok(())
    }

    async fn changes(&mut self, readings: &mut Vec<Reading>) -> Result<(), Fault> {
        readings.append(&mut self.waiting);
        while readings.is_empty() {
            let pause = (self.asked + IDLE).saturating_sub(clock::monotonic());
            match tokio::time::timeout(pause, self.client.changes()).await {
                Ok(changes) => {
                    for (handle, value) in changes.map_err(fault)? {
                        readings.push(reading(handle as usize, value));
                    }
                }
                Err(_) => {
                    self.asked = clock::monotonic();
                    self.client.read(&[&NodeId::standard(STATE)]).await.map_err(fault)?;
                }
            }
        }
        Ok(())
    }

    async fn call(
        &mut self,
        method: &str,
        arguments: &BTreeMap<String, String>,
    ) -> Result<Option<BTreeMap<String, String>>, Fault> {
        let Some(method) = self.methods.iter().find(|declared| declared.name == method) else { return Ok(None) };
        let mut inputs = Vec::new();
        for (name, kind) in &method.inputs {
            let text = arguments.get(name).ok_or_else(|| Fault::Refused(format!("an argument {name:?} is missing")))?;
            let value = Value::Text(text.as_str().into());
            inputs.push(variant(&value, kind).map_err(|why| Fault::Refused(format!("{name}: {why}")))?);
        }
        let outputs = self.client.call(&method.object, &method.method, &inputs).await.map_err(fault)?;
        let mut results = BTreeMap::new();
        for (index, output) in outputs.into_iter().enumerate() {
            let name = method.outputs.get(index).cloned().unwrap_or_else(|| format!("output{index}"));
            results.insert(name, value(output).map_err(Fault::Refused)?.render(skerry_mapper::Kind::Double));
        }
        Ok(Some(results))
    }
}

impl Session {
    async fn read_some(&mut self, points: &[&(usize, &Node)], readings: &mut Vec<Reading>) -> Result<(), Fault> {
        let nodes: Vec<&NodeId> = points.iter().map(|(_, node)| &node.id).collect();
        self.asked = clock::monotonic();
        match (self.client.read(&nodes).await, points) {
            (Ok(values), _) => {
                for ((index, node), value) in points.iter().zip(values) {
                    if !status::is_bad(value.status) && !self.types.contains_key(&node.id) {
                        self.types.insert(node.id.clone(), kind_of(&value.value));
                    }
                    readings.push(reading(*index, value));
                }
                Ok(())
            }
            (Err(failure @ (Failure::TooLong | Failure::Bad(_))), [(index, node)]) => {
                self.alone.insert(node.id.clone());
                readings.push(Reading::failed(*index, failure.to_string()));
                Ok(())
            }
            (Err(failure), _) => Err(fault(failure)),
        }
    }
}

/// The type alone: a value may be long.
fn kind_of(value: &Variant) -> Variant {
    match value {
        Variant::String(_) => Variant::String(String::new()),
        Variant::ByteString(_) => Variant::ByteString(Vec::new()),
        Variant::Array(_) => Variant::Array(Vec::new()),
        other => other.clone(),
    }
}

fn reading(index: usize, read: DataValue) -> Reading {
    if status::is_bad(read.status) {
        return Reading::failed(index, status::name(read.status));
    }
    match value(read.value) {
        Ok(value) => Reading { point: index, outcome: Ok(Sample { value, time: read.time }) },
        Err(why) => Reading::failed(index, why),
    }
}

/// A value as mappers have it.
fn value(variant: Variant) -> Result<Value, String> {
    Ok(match variant {
        Variant::Null => return Err("the server has no value".to_owned()),
        Variant::Boolean(truth) => Value::Bool(truth),
        Variant::SByte(number) => Value::Int(number.into()),
        Variant::Byte(number) => Value::Int(number.into()),
        Variant::Int16(number) => Value::Int(number.into()),
        Variant::UInt16(number) => Value::Int(number.into()),
        Variant::Int32(number) => Value::Int(number.into()),
        Variant::UInt32(number) => Value::Int(number.into()),
        Variant::Int64(number) => Value::Int(number),
        Variant::UInt64(number) => {
            Value::Int(i64::try_from(number).map_err(|_| format!("{number} does not fit into 64 bits with a sign"))?)
        }
        Variant::Float(number) => Value::Double(number.into()),
        Variant::Double(number) => Value::Double(number),
        Variant::String(text) => Value::Text(text.into()),
        Variant::DateTime(ticks) => Value::Int((ticks - wire::ticks(0)) / 10_000),
        Variant::ByteString(bytes) => Value::Bytes(bytes.into()),
        Variant::Array(_) => return Err("it is an array, which a property cannot be".to_owned()),
        Variant::Other(what) => return Err(format!("it is {what}, which a property cannot be")),
    })
}

/// A value as the server has it.
fn variant(value: &Value, kind: &Variant) -> Result<Variant, String> {
    use skerry_mapper::Kind;
    let as_kind = |kind| value.clone().conform(kind).map_err(|error| error.to_string());
    let int = || match as_kind(Kind::Int)? {
        Value::Int(number) => Ok(number),
        _ => Err("it is no whole number".to_owned()),
    };
    let double = || as_kind(Kind::Double)?.number().ok_or_else(|| "it is no number".to_owned());
    let fits = |number: i64| move |_| format!("{number} does not fit into the server's type");
    let number = if matches!(
        kind,
        Variant::SByte(_)
            | Variant::Byte(_)
            | Variant::Int16(_)
            | Variant::UInt16(_)
            | Variant::Int32(_)
            | Variant::UInt32(_)
            | Variant::Int64(_)
            | Variant::UInt64(_)
    ) {
        int()?
    } else {
        0
    };
    Ok(match kind {
        Variant::Boolean(_) => Variant::Boolean(as_kind(Kind::Boolean)? == Value::Bool(true)),
        Variant::SByte(_) => Variant::SByte(number.try_into().map_err(fits(number))?),
        Variant::Byte(_) => Variant::Byte(number.try_into().map_err(fits(number))?),
        Variant::Int16(_) => Variant::Int16(number.try_into().map_err(fits(number))?),
        Variant::UInt16(_) => Variant::UInt16(number.try_into().map_err(fits(number))?),
        Variant::Int32(_) => Variant::Int32(number.try_into().map_err(fits(number))?),
        Variant::UInt32(_) => Variant::UInt32(number.try_into().map_err(fits(number))?),
        Variant::Int64(_) => Variant::Int64(number),
        Variant::UInt64(_) => Variant::UInt64(number.try_into().map_err(fits(number))?),
        #[expect(clippy::cast_possible_truncation, reason = "the server has no more digits")]
        Variant::Float(_) => Variant::Float(double()? as f32),
        Variant::Double(_) => Variant::Double(double()?),
        Variant::String(_) => Variant::String(value.render(Kind::String)),
        Variant::ByteString(_) => match value {
            Value::Bytes(bytes) => Variant::ByteString(bytes.to_vec()),
            other => Variant::ByteString(other.render(Kind::String).into_bytes()),
        },
        Variant::DateTime(_) | Variant::Null | Variant::Array(_) | Variant::Other(_) => {
            return Err("the server's node has no value, or one of a type that is not written".to_owned());
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn kubeedges_keys_are_understood() {
        let config = Config::from(
            json!({"url": "opc.tcp://h:4840", "userName": "u", "password": "p", "securityPolicy": "None", "securityMode": "none"}),
        );
        let (url, identity, ..) = understand(&config).unwrap();
        assert_eq!((url.as_str(), identity.user), ("opc.tcp://h:4840", Some(("u".to_owned(), "p".to_owned()))));
        let secure = Config::from(json!({"url": "opc.tcp://h", "securityPolicy": "Basic256Sha256"}));
        assert!(understand(&secure).unwrap_err().to_string().contains("only None is supported"));
        let mut shown =
            json!({"url": "opc.tcp://h", "certificate": "/etc/client.pem", "privateKey": "/etc/client.key"});
        let refused = understand(&Config::from(shown.clone())).unwrap_err().to_string();
        assert!(refused.contains("`certificate` is of no use"), "{refused}");
        shown["securityPolicy"] = "None".into();
        assert!(understand(&Config::from(shown)).is_ok());
    }

    #[test]
    fn methods_are_declared_with_their_arguments() {
        let methods = r#"{"start": {"objectID": "ns=2;s=press", "methodID": "ns=2;i=7", "inputs": [{"name": "speed", "type": "Double"}], "outputs": ["done"]}}"#;
        let (.., methods) = understand(&Config::from(json!({"url": "opc.tcp://h", "methods": methods}))).unwrap();
        assert_eq!((methods[0].name.as_str(), methods[0].inputs.len(), methods[0].outputs.len()), ("start", 1, 1));
        let wrong = json!({"a": {"objectID": "x", "methodID": "i=1"}});
        assert!(understand(&Config::from(json!({"url": "opc.tcp://h", "methods": wrong}))).is_err());
    }

    #[test]
    fn values_are_written_in_the_servers_type() {
        assert_eq!(variant(&Value::Double(3.0), &Variant::UInt16(0)), Ok(Variant::UInt16(3)));
        assert_eq!(variant(&Value::Int(3), &Variant::Double(0.0)), Ok(Variant::Double(3.0)));
        assert_eq!(variant(&Value::Text("true".into()), &Variant::Boolean(false)), Ok(Variant::Boolean(true)));
        assert!(variant(&Value::Int(70_000), &Variant::UInt16(0)).is_err());
        assert!(variant(&Value::Int(-1), &Variant::UInt64(0)).is_err());
        assert!(variant(&Value::Int(1), &Variant::Array(vec![])).is_err());
    }
}
