//! What cloudcore was told: parsed once, valid from then on.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// The namespace of cloudcore's own Secrets.
pub const DEFAULT_NAMESPACE: &str = "skerry-system";

/// Everything `cloudcore run` needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// `None`: the in-cluster configuration.
    pub kubeconfig: Option<PathBuf>,
    /// Where edges reach this cloudcore; the first one goes into join commands, all of them into the server certificate.
    pub advertise: Vec<Advertise>,
    /// The one port.
    pub port: u16,
    /// Where health and metrics are served.
    pub admin: SocketAddr,
    /// The namespace of the CA and of join tokens.
    pub namespace: String,
    /// Keeps a copy of the CA's certificate, which notices a CA that was replaced.
    pub data_dir: Option<PathBuf>,
    /// Such as `cluster.local`.
    pub cluster_domain: String,
    /// Addresses of the cluster DNS service, for pods on edge nodes.
    pub cluster_dns: Vec<IpAddr>,
    /// Where the apiserver reaches this cloudcore as the kubelet of its nodes, by name or address.
    pub kubelet_address: String,
    /// The ports that nodes get there, one each.
    pub kubelet_ports: PortRange,
    /// The cluster's signer is asked for the certificate of these ports.
    pub kubelet_csr: bool,
}

/// Ports from one to another, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest, not below the first.
    pub last: u16,
}

/// A host, by name or address, and perhaps a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advertise {
    /// A DNS name or an IP address, without brackets.
    pub host: String,
    /// `None`: the port that cloudcore listens on.
    pub port: Option<u16>,
}

/// Why a text is not an address to advertise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdvertiseError {
    /// A scheme or a path.
    #[error(
        "give a host name or an IP address, optionally with a port, and no scheme or path: `cloud.example.com` or `192.0.2.7:10000`"
    )]
    Url,
    /// Neither a name nor an address.
    #[error("{0:?} is neither a host name nor an IP address")]
    Host(String),
    /// An address that no one can dial.
    #[error("{0} is no address that an edge node could dial; give the one it reaches this machine by")]
    Unspecified(IpAddr),
    /// Not a port.
    #[error("{0:?} is not a port (1 to 65535)")]
    Port(String),
}

impl Advertise {
    /// `HOST:PORT` as it goes into a command line.
    pub fn with_port(&self, default: u16) -> String {
        Self { host: self.host.clone(), port: Some(self.port.unwrap_or(default)) }.to_string()
    }
}

impl FromStr for Advertise {
    type Err = AdvertiseError;

    fn from_str(text: &str) -> Result<Self, AdvertiseError> {
        if text.contains("://") || text.contains('/') {
            return Err(AdvertiseError::Url);
        }
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']').ok_or_else(|| AdvertiseError::Host(text.to_owned()))?;
            host.parse::<Ipv6Addr>().map_err(|_| AdvertiseError::Host(host.to_owned()))?;
            match rest.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if rest.is_empty() => (host, None),
                None => return Err(AdvertiseError::Host(text.to_owned())),
            }
        } else if text.parse::<Ipv6Addr>().is_ok() {
            (text, None)
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        let port = match port {
            None => None,
            Some(port) => match port.parse::<u16>() {
                Ok(number) if number > 0 => Some(number),
                _ => return Err(AdvertiseError::Port(port.to_owned())),
            },
        };
        match host.parse::<IpAddr>() {
            Ok(address) if address.is_unspecified() => Err(AdvertiseError::Unspecified(address)),
            Ok(address) => Ok(Self { host: address.to_string(), port }),
            Err(_) if is_dns_name(host) => Ok(Self { host: host.to_ascii_lowercase(), port }),
            Err(_) => Err(AdvertiseError::Host(host.to_owned())),
        }
    }
}

impl fmt::Display for Advertise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.port, self.host.contains(':')) {
            (Some(port), true) => write!(f, "[{}]:{port}", self.host),
            (Some(port), false) => write!(f, "{}:{port}", self.host),
            (None, _) => f.write_str(&self.host),
        }
    }
}

impl PortRange {
    /// Whether a port is one of them.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port > 0);
        let parsed = text.split_once('-').and_then(|(first, last)| Some((port(first)?, port(last)?)));
        match parsed {
            Some((first, last)) if first <= last => Ok(Self { first, last }),
            _ => Err(format!("{text:?} is not a range of ports such as `20000-29999`")),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// Reads a host alone, as [`Advertise`] reads one with a port.
pub fn parse_host(text: &str) -> Result<String, String> {
    match text.parse::<Advertise>() {
        Ok(Advertise { host, port: None }) => Ok(host),
        Ok(_) => Err("give a host name or an IP address alone; the ports are those of --kubelet-ports".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads `90s`, `30m`, `24h`, `7d` or a sequence such as `1h30m`; at least a second, at most 10 years.
pub fn parse_ttl(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration such as `30m`, `24h`, `7d` or `1h30m`, between 1s and 3650d");
    let mut total: u64 = 0;
    let mut digits = String::new();
    for character in text.chars() {
        if character.is_ascii_digit() {
            digits.push(character);
            continue;
        }
        let unit = match character {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return Err(wrong()),
        };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        digits.clear();
        total = number.checked_mul(unit).and_then(|seconds| total.checked_add(seconds)).ok_or_else(wrong)?;
    }
    if !digits.is_empty() || !(1..=3650 * 86_400).contains(&total) {
        return Err(wrong());
    }
    Ok(Duration::from_secs(total))
}

/// Whether this is a DNS subdomain in the sense of Kubernetes names, upper case allowed where `host` names are compared without it.
fn is_dns_name(host: &str) -> bool {
    is_node_name(&host.to_ascii_lowercase())
}

/// Whether this can be the name of a Node: a DNS subdomain in lower case.
pub fn is_node_name(name: &str) -> bool {
    name.len() <= 253
        && name.split('.').all(|label| {
            let bytes = label.as_bytes();
            (1..=63).contains(&bytes.len())
                && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
                && bytes.first() != Some(&b'-')
                && bytes.last() != Some(&b'-')
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn advertised_addresses() {
        for (text, host, port, shown) in [
            ("cloud.example.com", "cloud.example.com", None, "cloud.example.com:10000"),
            ("Cloud:443", "cloud", Some(443), "cloud:443"),
            ("192.0.2.7", "192.0.2.7", None, "192.0.2.7:10000"),
            ("2001:db8::7", "2001:db8::7", None, "[2001:db8::7]:10000"),
            ("[2001:db8::7]:8443", "2001:db8::7", Some(8443), "[2001:db8::7]:8443"),
        ] {
            let parsed: Advertise = text.parse().unwrap();
            assert_eq!((parsed.host.as_str(), parsed.port), (host, port));
            assert_eq!(parsed.with_port(10000), shown);
            assert_eq!(parsed.to_string().parse(), Ok(parsed));
        }
        for text in
            ["", "https://x", "x/y", "0.0.0.0", "::", "[::]:1", "a b", "x:0", "x:70000", "x:", "[::1", "[x]:1", "-x"]
        {
            assert!(text.parse::<Advertise>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn ranges_of_ports() {
        let range: PortRange = "20000-29999".parse().unwrap();
        assert_eq!((range.first, range.last, range.to_string().as_str()), (20000, 29999, "20000-29999"));
        assert!(range.contains(20000) && range.contains(29999) && !range.contains(30000));
        assert!("7-7".parse::<PortRange>().is_ok());
        for text in ["", "1", "2-1", "0-5", "1-70000", "a-b", "1-2-3"] {
            assert!(text.parse::<PortRange>().is_err(), "{text:?}");
        }
        assert_eq!(parse_host("10.0.0.7"), Ok("10.0.0.7".to_owned()));
        assert!(parse_host("10.0.0.7:80").is_err() && parse_host("0.0.0.0").is_err());
    }

    #[test]
    fn names_of_nodes() {
        for good in ["a", "edge-1", "edge.site-7.example", "0"] {
            assert!(is_node_name(good), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a..b", "a_b", "ä", ".a", &"a".repeat(64), &["a"; 128].join(".")] {
            assert!(!is_node_name(bad), "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_ttl("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(parse_ttl("1h30m"), Ok(Duration::from_secs(5400)));
        for text in ["", "24", "h", "-1h", "0s", "99999999999999999999d", "4000d", "1.5h", "1w"] {
            assert!(parse_ttl(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "\\PC{0,60}") {
            let _ = parse_ttl(&text);
            if let Ok(address) = text.parse::<Advertise>() {
                prop_assert_eq!(address.to_string().parse::<Advertise>(), Ok(address));
            }
        }
    }
}
