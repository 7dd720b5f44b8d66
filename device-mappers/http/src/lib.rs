//! Devices that answer HTTP: properties of one path are read by one request.

use std::time::Duration;

use bytes::Bytes;
use hyper::Method;
use skerry_mapper::net::{Address, HttpClient};
use skerry_mapper::payload::{Form, MAX_MESSAGE, brief};
use skerry_mapper::{Config, ConfigError, DeviceInfo, Driver, Fault, Kind, Link, Point, PropertyInfo, Reading, Value};

/// The protocol.
#[derive(Debug)]
pub struct Http;

/// One property.
#[derive(Debug)]
pub struct Resource {
    path: String,
    method: Method,
    write_path: String,
    write_method: Method,
    form: Form,
    kind: Kind,
    readable: bool,
}

/// A device's connection, which is kept.
#[derive(Debug)]
pub struct Server {
    client: HttpClient,
    base: String,
    headers: Vec<(String, String)>,
}

impl Point for Resource {
    fn polled(&self) -> bool {
        self.readable
    }

    fn verified(&self) -> bool {
        self.readable
    }
}

impl Driver for Http {
    type Point = Resource;
    type Link = Server;

    fn protocol(&self) -> &'static str {
        "http"
    }

    fn point(&self, property: &PropertyInfo<'_>, visitor: &Config) -> Result<Resource, ConfigError> {
        let path = |key: &str| match visitor.text(key) {
            Some(path) if !path.starts_with('/') || !path.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Err(ConfigError(format!("`{key}` is {path:?}, but has to begin with / and be percent-encoded")))
            }
            path => Ok(path),
        };
        let method =
            |key: &str, usual: Method| match visitor.text(key).map(|method| method.to_ascii_uppercase()).as_deref() {
                None => Ok(usual),
                Some("GET") => Ok(Method::GET),
                Some("POST") => Ok(Method::POST),
                Some("PUT") => Ok(Method::PUT),
                Some("PATCH") => Ok(Method::PATCH),
                Some(other) => Err(ConfigError(format!("`{key}` is {other:?}, but has to be GET, POST, PUT or PATCH"))),
            };
        let (read, write) = (path("path")?, path("writePath")?);
        let readable = read.is_some() || write.is_none();
        let path = read.unwrap_or_else(|| "/".to_owned());
        Ok(Resource {
            write_path: write.unwrap_or_else(|| path.clone()),
            path,
            method: method("method", Method::GET)?,
            write_method: method("writeMethod", Method::PUT)?,
            form: Form::new(visitor)?,
            kind: property.kind,
            readable,
        })
    }

    async fn connect(&self, device: &DeviceInfo<'_>) -> Result<Server, Fault> {
        let wrong = |error: ConfigError| Fault::Refused(error.to_string());
        let config = device.config;
        let url = match config.text("url") {
            Some(url) => url,
            None => {
                let ip = config.required("ip");
                let ip =
                    ip.map_err(|_| Fault::Refused("`url`, or `ip` and `port`, is missing from configData".to_owned()))?;
                format!("http://{ip}:{}", config.integer("port", 1, 65_535).map_err(wrong)?.unwrap_or(80))
            }
        };
        let timeout = config.integer("timeout", 1, 60_000).map_err(wrong)?.unwrap_or(3000);
        let mut headers = vec![("accept".to_owned(), "*/*".to_owned())];
        if let Some(wanted) = config.object("headers").map_err(wrong)? {
            headers.extend(wanted.keys().filter_map(|key| Some((key.to_owned(), wanted.text(key)?))));
        }
        let mut address = Address::parse(&url, 80).map_err(Fault::Refused)?;
        if let Some(user) = config.text("username") {
            (address.user, address.password) = (Some(user), config.text("password"));
        }
        let base = address.path.trim_end_matches('/').to_owned();
        let client = HttpClient::at(address, Duration::from_millis(timeout.unsigned_abs()));
        Ok(Server { client, base, headers })
    }
}

impl Link for Server {
    type Point = Resource;

    async fn read(&mut self, points: &[(usize, &Resource)], readings: &mut Vec<Reading>) -> Result<(), Fault> {
        let mut order: Vec<&(usize, &Resource)> = points.iter().collect();
        order.sort_by_key(|(_, resource)| (&resource.path, resource.method.as_str()));
        for group in order.chunk_by(|(_, one), (_, two)| one.path == two.path && one.method == two.method) {
            let Some((_, first)) = group.first() else { continue };
            let answer = self.ask(&first.method, &first.path, Bytes::new()).await?;
            for (index, resource) in group {
                readings.push(
                    match answer.as_ref().map_err(Clone::clone).and_then(|body| resource.form.extract(body)) {
                        Ok(sample) => Reading { point: *index, outcome: Ok(sample) },
                        Err(why) => Reading::failed(*index, why),
                    },
                );
            }
        }
        Ok(())
    }

    async fn write(&mut self, point: &Resource, value: &Value) -> Result<(), Fault> {
        let body = point.form.compose(value, point.kind);
        self.ask(&point.write_method, &point.write_path, body.into()).await?.map(drop).map_err(Fault::Refused)
    }
}

impl Server {
    /// The body of an answer, or why the device refuses.
    async fn ask(&mut self, method: &Method, path: &str, body: Bytes) -> Result<Result<Bytes, String>, Fault> {
        let path = format!("{}{path}", self.base);
        let mut headers: Vec<(&str, &str)> =
            self.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        if matches!(body.first(), Some(b'{' | b'[' | b'"')) {
            headers.push(("content-type", "application/json"));
        }
        match self.client.request(method, &path, &headers, body, MAX_MESSAGE).await {
            Ok(answer) if answer.status.is_success() => Ok(Ok(answer.body)),
            Ok(answer) => Ok(Err(format!("{method} {path}: {}: {}", answer.status, brief(&answer.body)))),
            Err(skerry_mapper::net::NoAnswer::Away(why)) => Err(Fault::Offline(why)),
            Err(skerry_mapper::net::NoAnswer::Refused(why)) => Ok(Err(format!("{method} {path}: {why}"))),
        }
    }
}
