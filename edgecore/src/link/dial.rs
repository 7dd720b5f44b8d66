//! From a server's name to a TLS connection with it, and what went wrong on the way in words that help.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use skerry_proto::transport::{TLS_BUFFER, UNSENT};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::clock;

/// For name resolution; and then for TCP and TLS, with all addresses of the name.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where cloudcore is: a name or an address, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// A DNS name or an IP address, an IPv6 one without brackets.
    pub host: String,
    /// TCP and UDP port.
    pub port: u16,
}

/// Why a text is not a server's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not the address of a cloudcore: {cause}; write HOST:PORT, for example edge.example.org:10000")]
pub struct ServerError {
    text: String,
    cause: &'static str,
}

impl FromStr for Server {
    type Err = ServerError;

    fn from_str(text: &str) -> Result<Self, ServerError> {
        let error = |cause| ServerError { text: text.to_owned(), cause };
        let port = |digits: &str| match digits.parse() {
            Ok(0) | Err(_) => Err(error("its port is not a number from 1 to 65535")),
            Ok(port) => Ok(port),
        };
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']').ok_or_else(|| error("a bracket is not closed"))?;
            match rest.strip_prefix(':') {
                Some(digits) => (host, port(digits)?),
                None if rest.is_empty() => (host, skerry_proto::DEFAULT_PORT),
                None => return Err(error("something other than a port follows the bracket")),
            }
        } else {
            match text.split_once(':') {
                Some((_, rest)) if rest.contains(':') => (text, skerry_proto::DEFAULT_PORT),
                Some((host, digits)) => (host, port(digits)?),
                None => (text, skerry_proto::DEFAULT_PORT),
            }
        };
        if text.contains("://") || text.contains('/') {
            return Err(error("it is a URL"));
        }
        ServerName::try_from(host).map_err(|_| error("its host is neither a DNS name nor an IP address"))?;
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// DNS.
    #[error("the name {0:?} cannot be resolved; check the spelling and this box's DNS servers")]
    Name(String, #[source] io::Error),
    /// Nothing listens.
    #[error(
        "{0} refused the connection: nothing listens on that port; check that cloudcore runs and that the port is right"
    )]
    Refused(Server),
    /// No answer.
    #[error("{0} did not answer within {secs:.0} s; check the network, and that no firewall is in between", secs = .1.as_secs_f64())]
    Timeout(Server, Duration),
    /// Any other failure below TLS.
    #[error("{0} cannot be reached: {1}")]
    Network(Server, #[source] io::Error),
    /// The certificate's validity and this box's clock do not agree.
    #[error(
        "the certificate of {server} is not valid at {now}, this box's time; set the clock (or renew the server's certificate)"
    )]
    Clock {
        /// Who.
        server: Server,
        /// This box's wall clock.
        now: jiff::Timestamp,
    },
    /// The certificate is for another name.
    #[error("the certificate of {0} is not for the name {name:?}; start cloudcore with --advertise-address {name}", name = .0.host)]
    OtherName(Server),
    /// The certificate is signed by somebody else.
    #[error(
        "{0} is not signed by this cluster's CA: another cluster answers there, or somebody in between; check the address, and if the cluster has another CA by now, run `edgecore reset` and join again"
    )]
    UnknownCa(Server),
    /// The server refused our certificate.
    #[error(
        "{0} refused this node's certificate ({1}); if it expired long ago, or the cluster has another CA by now, run `edgecore reset` and join again"
    )]
    Certificate(Server, String),
    /// Any other failure of TLS.
    #[error("no TLS with {0}: {1}; check that this is cloudcore's port")]
    Tls(Server, #[source] io::Error),
}

impl DialError {
    /// Whether somebody answered, and what they said is the trouble.
    pub(super) fn is_answer(&self) -> bool {
        match self {
            Self::Name(..) | Self::Refused(_) | Self::Timeout(..) | Self::Network(..) => false,
            Self::Clock { .. } | Self::OtherName(_) | Self::UnknownCa(_) | Self::Certificate(..) | Self::Tls(..) => {
                true
            }
        }
    }
}

/// Resolves the name and connects, within [`CONNECT_TIMEOUT`] each.
pub async fn dial(server: &Server, config: Arc<rustls::ClientConfig>) -> Result<TlsStream<TcpStream>, DialError> {
    let addresses = resolve(server).await?;
    dial_any(server, &addresses, config).await
}

/// The addresses behind a server's name.
pub(super) async fn resolve(server: &Server) -> Result<Vec<SocketAddr>, DialError> {
    let lookup = tokio::net::lookup_host((server.host.as_str(), server.port));
    match tokio::time::timeout(CONNECT_TIMEOUT, lookup).await {
        Ok(Ok(addresses)) => Ok(addresses.collect()),
        Ok(Err(error)) => Err(DialError::Name(server.host.clone(), error)),
        Err(_) => Err(DialError::Name(server.host.clone(), io::ErrorKind::TimedOut.into())),
    }
}

/// Connects to the first of the addresses that answers, within [`CONNECT_TIMEOUT`].
pub(super) async fn dial_any(
    server: &Server,
    addresses: &[SocketAddr],
    config: Arc<rustls::ClientConfig>,
) -> Result<TlsStream<TcpStream>, DialError> {
    let attempt = |address| dial_one(server, address, Arc::clone(&config));
    each(server, addresses, CONNECT_TIMEOUT, DialError::is_answer, attempt).await
}

/// Tries one address after the other until one works, or an error is an answer. None takes more than an even share of the time that is
/// left, so that a dead one leaves time for the next.
pub(super) async fn each<T, E, F>(
    server: &Server,
    addresses: &[SocketAddr],
    whole: Duration,
    is_answer: impl Fn(&E) -> bool,
    attempt: impl Fn(SocketAddr) -> F,
) -> Result<T, E>
where
    E: From<DialError>,
    F: Future<Output = Result<T, E>>,
{
    let until = clock::monotonic() + whole;
    let none = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut last = DialError::Name(server.host.clone(), none).into();
    let mut left = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
    for address in addresses {
        let share = until.saturating_sub(clock::monotonic()) / left.max(1);
        left -= 1;
        match tokio::time::timeout(share, attempt(*address)).await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) if is_answer(&error) => return Err(error),
            Ok(Err(error)) => last = error,
            Err(_) => last = DialError::Timeout(server.clone(), share).into(),
        }
    }
    Err(last)
}

async fn dial_one(
    server: &Server,
    address: SocketAddr,
    config: Arc<rustls::ClientConfig>,
) -> Result<TlsStream<TcpStream>, DialError> {
    let stream = TcpStream::connect(address).await.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => DialError::Refused(server.clone()),
        _ => DialError::Network(server.clone(), error),
    })?;
    stream.set_nodelay(true).map_err(|error| DialError::Network(server.clone(), error))?;
    SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT).map_err(|error| DialError::Network(server.clone(), error))?;
    let name = ServerName::try_from(server.host.clone())
        .map_err(|_| DialError::Name(server.host.clone(), io::Error::other("not a host name")))?;
    let mut stream =
        TlsConnector::from(config).connect(name, stream).await.map_err(|error| tls_error(server, error))?;
    stream.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
    Ok(stream)
}

/// What an error of a TLS stream means, during the handshake or after it: in TLS 1.3 a client learns only with its first read
/// that its certificate was refused.
pub fn tls_error(server: &Server, error: io::Error) -> DialError {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error as Tls};
    let server = server.clone();
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<Tls>()) else {
        return match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => DialError::Network(server, error),
            _ => DialError::Tls(server, error),
        };
    };
    match tls {
        Tls::InvalidCertificate(
            Bad::Expired | Bad::ExpiredContext { .. } | Bad::NotValidYet | Bad::NotValidYetContext { .. },
        ) => DialError::Clock { server, now: clock::wall() },
        Tls::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => {
            DialError::OtherName(server)
        }
        Tls::InvalidCertificate(_) => DialError::UnknownCa(server),
        Tls::AlertReceived(
            alert @ (Alert::BadCertificate
            | Alert::CertificateExpired
            | Alert::CertificateRevoked
            | Alert::CertificateRequired
            | Alert::CertificateUnknown
            | Alert::AccessDenied
            | Alert::UnknownCA
            | Alert::DecryptError),
        ) => DialError::Certificate(server, format!("{alert:?}")),
        _ => DialError::Tls(server, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, host, port) in [
            ("edge.example.org:10001", "edge.example.org", 10001),
            ("edge.example.org", "edge.example.org", 10000),
            ("10.0.0.1:443", "10.0.0.1", 443),
            ("[::1]:443", "::1", 443),
            ("[::1]", "::1", 10000),
            ("fe80::1", "fe80::1", 10000),
        ] {
            let server: Server = text.parse().unwrap();
            assert_eq!((server.host.as_str(), server.port), (host, port), "{text}");
            assert_eq!(server.to_string().parse(), Ok(server));
        }
        for text in ["", ":1", "host:", "host:0", "host:99999", "https://host:1", "a b:1", "[::1", "[::1]x", "host/x"] {
            assert!(text.parse::<Server>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_leaves_time_for_the_next() {
        let server = Server { host: "cloud".to_owned(), port: 1 };
        let addresses: Vec<SocketAddr> = (1..=3).map(|last| SocketAddr::from(([192, 0, 2, last], 1))).collect();
        let whole = Duration::from_millis(300);
        let third = async |address: SocketAddr| {
            if address == addresses[2] { Ok(address) } else { std::future::pending().await }
        };
        assert_eq!(each(&server, &addresses, whole, DialError::is_answer, third).await.unwrap(), addresses[2]);
        // The last one has all that is left; what is said is what it had.
        let none = async |_| std::future::pending::<Result<(), DialError>>().await;
        let error = each(&server, &addresses, Duration::from_secs(2), DialError::is_answer, none).await.unwrap_err();
        assert!(error.to_string().contains("did not answer within 1 s"), "{error}");
        let refused = async |_| Err::<(), _>(DialError::UnknownCa(server.clone()));
        let error = each(&server, &addresses, whole, DialError::is_answer, refused).await.unwrap_err();
        assert!(matches!(error, DialError::UnknownCa(_)), "an answer is one");
        assert!(matches!(each(&server, &[], whole, DialError::is_answer, none).await, Err(DialError::Name(..))));
    }
}
