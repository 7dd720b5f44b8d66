//! Connections that sinks and drivers share: addresses, TCP with or without TLS, HTTP and MQTT clients.

mod http;
pub mod mqtt;
mod tls;

pub use http::{Answer, HttpClient, NoAnswer};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// A stream of bytes, encrypted or not.
pub trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for T {}

/// Where something listens: `scheme://user:password@host:port/path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Whether it is spoken to over TLS: `https`, `mqtts`, `ssl`, `tls`, `tcps`.
    pub tls: bool,
    /// Host name or IP address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// User, if one is named.
    pub user: Option<String>,
    /// Password, if one is given.
    pub password: Option<String>,
    /// Path and query, at least `/`.
    pub path: String,
}

impl Address {
    /// Takes an address apart. The port may be missing, and then is `port`, or that of https or mqtts.
    ///
    /// # Errors
    ///
    /// When it is none; the message says what one looks like.
    pub fn parse(text: &str, port: u16) -> Result<Self, String> {
        let wrong = || {
            let shown = without_password(text);
            format!("{shown:?} is no address: it has to look like tcp://host:1883 or http://host:80/path")
        };
        let (scheme, rest) = text.split_once("://").unwrap_or(("tcp", text));
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" | "mqtt" | "tcp" => false,
            "https" | "mqtts" | "ssl" | "tls" | "tcps" => true,
            _ => return Err(wrong()),
        };
        let port = match (tls, port) {
            (true, 80) => 443,
            (true, 1883) => 8883,
            (_, port) => port,
        };
        let (authority, path) = match rest.find('/') {
            Some(slash) => rest.split_at(slash),
            None => (rest, "/"),
        };
        let (credentials, endpoint) = match authority.rsplit_once('@') {
            Some((credentials, endpoint)) => (Some(credentials), endpoint),
            None => (None, authority),
        };
        let (user, password) =
            match credentials.map(|credentials| credentials.split_once(':').unwrap_or((credentials, ""))) {
                Some((user, password)) => (Some(user.to_owned()), Some(password.to_owned())),
                None => (None, None),
            };
        let (host, port) = match endpoint.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, port),
            Some((host, after)) => {
                (host, after.strip_prefix(':').and_then(|port| port.parse().ok()).ok_or_else(wrong)?)
            }
            None => match endpoint.split_once(':') {
                Some((host, port)) => (host, port.parse().map_err(|_| wrong())?),
                None => (endpoint, port),
            },
        };
        let printable = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if host.is_empty() || port == 0 || !printable(host) || !printable(path) {
            return Err(wrong());
        }
        Ok(Self { tls, host: host.to_owned(), port, user, password, path: path.to_owned() })
    }

    /// Connects, over TLS if it says so.
    ///
    /// # Errors
    ///
    /// Why it cannot be reached, or is not trusted.
    pub async fn connect(&self) -> Result<Box<dyn Stream>, String> {
        let at = |error: &dyn std::fmt::Display| format!("{}:{}: {error}", self.host, self.port);
        let connecting = TcpStream::connect((self.host.as_str(), self.port));
        let stream = tokio::time::timeout(std::time::Duration::from_secs(5), connecting)
            .await
            .map_err(|_| at(&"no answer within 5 s"))?
            .map_err(|error| at(&error))?;
        let _ = stream.set_nodelay(true);
        if !self.tls {
            return Ok(Box::new(stream));
        }
        Ok(Box::new(tls::connect(&self.host, stream).await.map_err(|error| at(&error))?))
    }
}

/// An address as it may be shown.
#[must_use]
pub fn without_password(address: &str) -> String {
    match address.split_once("://").and_then(|(scheme, rest)| Some((scheme, rest.rsplit_once('@')?))) {
        Some((scheme, (credentials, rest))) => {
            let user = credentials.split(':').next().unwrap_or_default();
            format!("{scheme}://{user}:…@{rest}")
        }
        None => address.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        let address = Address::parse("tcp://127.0.0.1:1883", 1883).unwrap();
        assert_eq!((address.host.as_str(), address.port, address.tls), ("127.0.0.1", 1883, false));
        let address = Address::parse("https://u:p@h/a/b?c=d", 80).unwrap();
        assert_eq!((address.port, address.tls, address.path.as_str()), (443, true, "/a/b?c=d"));
        assert_eq!((address.user.as_deref(), address.password.as_deref()), (Some("u"), Some("p")));
        let address = Address::parse("mqtts://[::1]:99", 1883).unwrap();
        assert_eq!((address.host.as_str(), address.port), ("::1", 99));
        assert_eq!(Address::parse("broker", 1883).unwrap().port, 1883);
        for wrong in ["", "ftp://h", "http://", "http://h:x", "http://h:99999", "http://h:0", "http://a b/"] {
            assert!(Address::parse(wrong, 80).is_err(), "{wrong}");
        }
        let error = Address::parse("http://u:secret@h:x", 80).unwrap_err();
        assert!(!error.contains("secret"), "{error}");
    }

    proptest! {
        #[test]
        fn no_text_breaks_it(text: String) {
            let _ = Address::parse(&text, 1);
            let _ = without_password(&text);
        }
    }
}
