//! What edgecore is told: one TOML file, `<data-dir>/config.toml`, written by `edgecore join`. Every key but the two that say where
//! and who has a default that works.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::link::Transport;
use crate::link::dial::Server;

/// Where edgecore keeps its own state unless told otherwise.
pub const DATA_DIR: &str = "/var/lib/skerry/edgecore";
/// Name of the file in the data directory.
pub const FILE: &str = "config.toml";
/// A unix socket's path may have no more bytes.
const SOCKET_PATH_MAX: usize = 107;

/// The configuration of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where cloudcore is, `HOST:PORT`.
    pub server: String,
    /// The name of this node.
    pub node_name: String,
    /// What carries the link: `auto`, `quic` or `websocket`.
    #[serde(default)]
    pub transport: Transport,
    /// The CRI runtime's socket.
    #[serde(default = "default::runtime_endpoint")]
    pub runtime_endpoint: String,
    /// Pod directories: volumes and what else belongs to a pod.
    #[serde(default = "default::pods_dir")]
    pub pods_dir: PathBuf,
    /// Pod logs.
    #[serde(default = "default::logs_dir")]
    pub logs_dir: PathBuf,
    /// Links to the logs, where collectors look.
    #[serde(default = "default::log_links_dir")]
    pub log_links_dir: PathBuf,
    /// Where network configurations are looked for; if absent, where the runtime does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Where CNI plugins may be; if absent, where the runtime looks for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni_bin_dirs: Option<Vec<PathBuf>>,
    /// Addresses for pods, used in the network configuration that edgecore writes where there is none.
    #[serde(default = "default::pod_cidr")]
    pub pod_cidr: String,
    /// Where device mappers find edgecore; empty: nowhere, and no mapper is served.
    #[serde(default = "default::dmi_socket")]
    pub dmi_socket: PathBuf,
    /// Where the MQTT broker is: `auto`, `off`, `HOST:PORT` or `unix:///path`.
    #[serde(default, skip_serializing_if = "MqttBroker::is_auto")]
    pub mqtt_broker: MqttBroker,
    /// The socket for `edgecore status` and the like; `edgecore.sock` in the data directory if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_socket: Option<PathBuf>,
    /// Labels for the Node.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// Which MQTT broker the box has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MqttBroker {
    /// The one that listens on 127.0.0.1:1883; if there is none, a mosquitto that edgecore starts once there are devices, where
    /// one is installed.
    #[default]
    Auto,
    /// None, and no MQTT.
    Off,
    /// `HOST:PORT`, or `unix://` and the path of a socket. Without TLS, without a password.
    At(String),
}

impl MqttBroker {
    fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

impl TryFrom<String> for MqttBroker {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_port = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
        match text.as_str() {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ if text.starts_with("unix:///") => Ok(Self::At(text)),
            _ if text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && is_port(port)) => {
                Ok(Self::At(text))
            }
            _ => Err(format!(
                "{text:?} is no broker; write auto, off, an address such as 127.0.0.1:1883, or unix:///path"
            )),
        }
    }
}

impl From<MqttBroker> for String {
    fn from(broker: MqttBroker) -> Self {
        match broker {
            MqttBroker::Auto => "auto".to_owned(),
            MqttBroker::Off => "off".to_owned(),
            MqttBroker::At(address) => address,
        }
    }
}

mod default {
    use std::path::PathBuf;

    pub(super) fn runtime_endpoint() -> String {
        "unix:///run/containerd/containerd.sock".to_owned()
    }
    pub(super) fn pods_dir() -> PathBuf {
        "/var/lib/kubelet".into()
    }
    pub(super) fn logs_dir() -> PathBuf {
        "/var/log/pods".into()
    }
    pub(super) fn log_links_dir() -> PathBuf {
        "/var/log/containers".into()
    }
    pub(super) fn dmi_socket() -> PathBuf {
        "/etc/kubeedge/dmi.sock".into()
    }
    pub(super) fn pod_cidr() -> String {
        "10.88.0.0/16".to_owned()
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No file.
    #[error(
        "{0} does not exist: this box has not joined a cluster; run the `edgecore join …` line that `cloudcore token create` prints"
    )]
    Missing(PathBuf),
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// It cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// Which.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{path}, line {line}: {cause}; correct that line, or remove it to get the default")]
    Syntax {
        /// Which.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong, with the key.
        cause: String,
    },
    /// A value that cannot be.
    #[error("{path}, line {line}, key `{key}`: {cause}")]
    Value {
        /// Which.
        path: PathBuf,
        /// From 1; 0 when the value is a default.
        line: usize,
        /// Which key.
        key: &'static str,
        /// What is wrong, and what would be right.
        cause: String,
    },
}

impl Config {
    /// The defaults, for a server and a node.
    pub fn new(server: &Server, node_name: &str) -> Self {
        Self {
            server: server.to_string(),
            node_name: node_name.to_owned(),
            transport: Transport::default(),
            runtime_endpoint: default::runtime_endpoint(),
            pods_dir: default::pods_dir(),
            logs_dir: default::logs_dir(),
            log_links_dir: default::log_links_dir(),
            cni_conf_dir: None,
            cni_bin_dirs: None,
            pod_cidr: default::pod_cidr(),
            dmi_socket: default::dmi_socket(),
            mqtt_broker: MqttBroker::Auto,
            control_socket: None,
            labels: BTreeMap::new(),
        }
    }

    /// Reads the file of a data directory.
    pub fn load(data_dir: &Path) -> Result<Self, ConfigError> {
        let path = data_dir.join(FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(&path, &text, data_dir),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(ConfigError::Missing(path)),
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    /// Reads a text; `path` is for messages.
    pub fn parse(path: &Path, text: &str, data_dir: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start).min(text.len());
            let line = text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
            let cause = error.message().trim().replace('\n', "; ");
            let shown = text.lines().nth(line - 1).unwrap_or_default().trim();
            let cause = if shown.is_empty() { cause } else { format!("{cause} (in `{shown}`)") };
            ConfigError::Syntax { path: path.to_owned(), line, cause }
        })?;
        config.check(data_dir).map_err(|(key, cause)| {
            let starts =
                |line: &str| line.trim_start().strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='));
            let line = text.lines().position(starts).map_or(0, |index| index + 1);
            ConfigError::Value { path: path.to_owned(), line, key, cause }
        })?;
        Ok(config)
    }

    /// Checks every value.
    pub fn check(&self, data_dir: &Path) -> Result<(), (&'static str, String)> {
        self.server.parse::<Server>().map_err(|error| ("server", error.to_string()))?;
        if !is_node_name(&self.node_name) {
            return Err(("node_name", name_error(&self.node_name)));
        }
        let socket = self.runtime_endpoint.strip_prefix("unix://").unwrap_or(&self.runtime_endpoint);
        if !socket.starts_with('/') {
            let cause = format!(
                "{:?} is not a unix socket; write it as unix:///run/containerd/containerd.sock",
                self.runtime_endpoint
            );
            return Err(("runtime_endpoint", cause));
        }
        let dirs = [("pods_dir", &self.pods_dir), ("logs_dir", &self.logs_dir), ("log_links_dir", &self.log_links_dir)];
        for (key, path) in dirs.into_iter().chain(self.cni_conf_dir.as_ref().map(|dir| ("cni_conf_dir", dir))) {
            // What reset removes under it must never be the whole disk.
            if !path.is_absolute() || path.parent().is_none() || path.components().any(|part| part.as_os_str() == "..")
            {
                return Err((key, format!("{path:?} must be an absolute path below the root, without `..`")));
            }
        }
        if let Some(dir) = self.cni_bin_dirs.iter().flatten().find(|dir| !dir.is_absolute()) {
            return Err(("cni_bin_dirs", format!("{dir:?} must be an absolute path")));
        }
        if !is_cidr(&self.pod_cidr) {
            return Err(("pod_cidr", format!("{:?} is not a network such as 10.88.0.0/16", self.pod_cidr)));
        }
        let control = self.control_socket(data_dir);
        if !control.is_absolute() || control.as_os_str().len() > SOCKET_PATH_MAX {
            let remedy = if self.control_socket.is_some() { "set" } else { "choose a shorter --data-dir, or set" };
            let cause = format!(
                "{control:?} must be an absolute path of at most {SOCKET_PATH_MAX} bytes; {remedy} a shorter one"
            );
            return Err(("control_socket", cause));
        }
        let dmi = &self.dmi_socket;
        if !dmi.as_os_str().is_empty() && (!dmi.is_absolute() || dmi.as_os_str().len() > SOCKET_PATH_MAX) {
            let cause = format!(
                "{dmi:?} must be an absolute path of at most {SOCKET_PATH_MAX} bytes, or empty where no mapper is to be served"
            );
            return Err(("dmi_socket", cause));
        }
        for (key, value) in &self.labels {
            check_label(key, value).map_err(|cause| ("labels", cause))?;
        }
        Ok(())
    }

    /// Writes the file of a data directory, whole or not at all.
    pub fn store(&self, data_dir: &Path) -> Result<(), ConfigError> {
        let path = data_dir.join(FILE);
        crate::files::write(&path, self.to_toml().as_bytes(), 0o644)
            .map_err(|source| ConfigError::Write { path, source })
    }

    /// The file's text.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_default()
    }

    /// Where the control socket is.
    pub fn control_socket(&self, data_dir: &Path) -> PathBuf {
        self.control_socket.clone().unwrap_or_else(|| data_dir.join("edgecore.sock"))
    }

    /// Where device mappers find edgecore, if they are served.
    pub fn dmi_socket(&self) -> Option<PathBuf> {
        Some(self.dmi_socket.clone()).filter(|path| !path.as_os_str().is_empty())
    }

    /// Where cloudcore is. Checked when the file was read.
    pub fn server(&self) -> Result<Server, crate::link::dial::ServerError> {
        self.server.parse()
    }
}

/// Whether a text can name a node: a DNS-1123 subdomain.
pub fn is_node_name(name: &str) -> bool {
    let label = |label: &str| {
        let bytes = label.as_bytes();
        let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        bytes.iter().all(|byte| alphanumeric(byte) || *byte == b'-')
            && bytes.first().is_some_and(alphanumeric)
            && bytes.last().is_some_and(alphanumeric)
            && bytes.len() <= 63
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// What to say of a name that [`is_node_name`] refuses.
pub fn name_error(name: &str) -> String {
    format!(
        "{name:?} is not a node name: lower-case letters, digits, `-` and `.`, beginning and ending with a letter or digit, at most 253 characters; give one with --node-name"
    )
}

/// Reads `key=value`.
pub fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not a label; write key=value"))?;
    check_label(key, value)?;
    Ok((key.to_owned(), value.to_owned()))
}

fn check_label(key: &str, value: &str) -> Result<(), String> {
    let word = |text: &str| {
        let bytes = text.as_bytes();
        bytes.len() <= 63
            && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
            && bytes.first().is_none_or(u8::is_ascii_alphanumeric)
            && bytes.last().is_none_or(u8::is_ascii_alphanumeric)
    };
    let (prefix, name) = key.rsplit_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if name.is_empty() || !word(name) || prefix.is_some_and(|prefix| !is_node_name(prefix)) {
        return Err(format!("{key:?} is not a label's key"));
    }
    if !word(value) {
        return Err(format!("{value:?} is not a label's value: at most 63 letters, digits, `-`, `_`, `.`"));
    }
    Ok(())
}

fn is_cidr(text: &str) -> bool {
    text.split_once('/').is_some_and(|(address, bits)| {
        match (address.parse::<std::net::IpAddr>(), bits.parse::<u8>()) {
            (Ok(std::net::IpAddr::V4(_)), Ok(bits)) => bits <= 30,
            (Ok(std::net::IpAddr::V6(_)), Ok(bits)) => bits <= 126,
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("/data/config.toml"), text, Path::new("/data"))
    }

    #[test]
    fn two_keys_are_enough_and_what_is_written_is_read_back() {
        let config = parse("server = \"edge.example.org:10000\"\nnode_name = \"box-1\"\n").unwrap();
        assert_eq!(config, Config::new(&"edge.example.org:10000".parse().unwrap(), "box-1"));
        assert_eq!(config.control_socket(Path::new("/data")), Path::new("/data/edgecore.sock"));
        let mut config = config;
        config.labels.insert("example.org/site".to_owned(), "north".to_owned());
        assert!(!config.to_toml().contains("mqtt"));
        config.mqtt_broker = MqttBroker::At("unix:///run/broker.sock".to_owned());
        assert_eq!(parse(&config.to_toml()).unwrap(), config);
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let head = "server = \"h:1\"\nnode_name = \"n\"\n";
        for (text, words) in [
            (format!("{head}pod_dir = \"/x\"\n"), vec!["/data/config.toml, line 3", "pod_dir", "pods_dir"]),
            (format!("{head}labels = 3\n"), vec!["line 3", "labels"]),
            ("server = \"h:1\n".to_owned(), vec!["line 1"]),
            ("node_name = \"n\"\n".to_owned(), vec!["server"]),
            ("server = \"h:0\"\nnode_name = \"n\"\n".to_owned(), vec!["line 1", "`server`", "port"]),
            ("server = \"h:1\"\nnode_name = \"Box_1\"\n".to_owned(), vec!["line 2", "`node_name`", "Box_1"]),
            (format!("{head}\npods_dir = \"/\"\n"), vec!["line 4", "`pods_dir`", "absolute"]),
            (format!("{head}pods_dir = \"/var/../\"\n"), vec!["line 3", "`pods_dir`"]),
            (format!("{head}runtime_endpoint = \"tcp://1.2.3.4\"\n"), vec!["line 3", "`runtime_endpoint`", "unix://"]),
            (format!("{head}pod_cidr = \"10.88.0.0\"\n"), vec!["line 3", "`pod_cidr`"]),
            (format!("{head}control_socket = \"/{}\"\n", "x".repeat(120)), vec!["line 3", "`control_socket`", "107"]),
            (format!("{head}mqtt_broker = \"localhost\"\n"), vec!["line 3", "mqtt_broker", "127.0.0.1:1883"]),
            (format!("{head}mqtt_broker = \"h:0\"\n"), vec!["line 3", "unix:///path"]),
            (format!("{head}[labels]\n\"a b\" = \"c\"\n"), vec!["`labels`", "a b"]),
        ] {
            let error = parse(&text).unwrap_err().to_string();
            for word in words {
                assert!(error.contains(word), "{word:?} is not in: {error}");
            }
        }
    }

    #[test]
    fn a_data_directory_too_long_for_its_socket_is_named() {
        let text = "server = \"h:1\"\nnode_name = \"n\"\n";
        let error = Config::parse(Path::new("config.toml"), text, Path::new(&format!("/{}", "x".repeat(120))));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("`control_socket`") && error.contains("choose a shorter --data-dir"), "{error}");
    }

    #[test]
    fn node_names() {
        for good in ["a", "box-1", "box.site.example", "1"] {
            assert!(is_node_name(good), "{good}");
        }
        for bad in ["", "A", "-a", "a-", "a..b", "a_b", ".a", &"a".repeat(64), &"a.".repeat(130)] {
            assert!(!is_node_name(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "\\PC{0,200}") {
            let _ = parse(&text);
            let _ = parse_label(&text);
        }

        #[test]
        fn damaged_files_are_answered(at in 0usize..60, with in any::<char>()) {
            let text: String = "server = \"edge.example.org:10000\"\nnode_name = \"box-1\"\n"
                .chars().enumerate().map(|(index, c)| if index == at { with } else { c }).collect();
            let _ = parse(&text);
        }
    }
}
