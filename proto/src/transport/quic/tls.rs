//! The cloud's TLS in QUIC: a handshake, and after it the secrets alone.
//!
//! rustls keeps all of a handshake's state for as long as there may be messages after it. There are none here: tickets are not given out, and
//! a node proves itself once.

use std::any::Any;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::BytesMut;
use quinn_proto::crypto::rustls::{NoInitialCipherSuite, QuicServerConfig};
use quinn_proto::crypto::{
    CryptoError, ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey, ServerConfig, Session,
    UnsupportedVersion,
};
use quinn_proto::transport_parameters::TransportParameters;
use quinn_proto::{ConnectionId, Side, TransportError, TransportErrorCode};
use rustls::pki_types::CertificateDer;
use rustls::quic::{KeyChange, PacketKeySet, Secrets, ServerConnection, Version};

use super::rustls;

/// QUIC's first version (RFC 9000), the only one that is spoken.
pub(super) const V1: u32 = 1;

/// What sessions begin with.
pub(super) struct Config {
    tls: Arc<rustls::ServerConfig>,
    /// For what needs no session.
    quic: QuicServerConfig,
}

impl Config {
    pub(super) fn new(tls: rustls::ServerConfig) -> Result<Self, NoInitialCipherSuite> {
        let tls = Arc::new(tls);
        Ok(Self { quic: QuicServerConfig::try_from(Arc::clone(&tls))?, tls })
    }
}

impl ServerConfig for Config {
    fn initial_keys(&self, version: u32, dst_cid: &ConnectionId) -> Result<Keys, UnsupportedVersion> {
        if version == V1 { self.quic.initial_keys(version, dst_cid) } else { Err(UnsupportedVersion) }
    }

    fn retry_tag(&self, version: u32, orig_dst_cid: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.quic.retry_tag(version, orig_dst_cid, packet)
    }

    fn start_session(self: Arc<Self>, _: u32, params: &TransportParameters) -> Box<dyn Session> {
        let mut ours = Vec::new();
        params.write(&mut ours);
        let stage = match ServerConnection::new(Arc::clone(&self.tls), Version::V1, ours) {
            Ok(connection) => Stage::Shaking(Box::new(connection)),
            Err(error) => Stage::Impossible(error),
        };
        Box::new(Tls { config: self, secrets: None, next: None, stage })
    }
}

struct Tls {
    config: Arc<Config>,
    /// From which keys come, from when there are any.
    secrets: Option<Arc<Mutex<Secrets>>>,
    /// Those of the next change.
    next: Option<Arc<Next>>,
    stage: Stage,
}

/// The keys of a change, which most connections never come to: they are made when they are asked for.
struct Next {
    secrets: Arc<Mutex<Secrets>>,
    keys: OnceLock<PacketKeySet>,
}

/// One of the two.
struct NextKey {
    next: Arc<Next>,
    is_local: bool,
}

enum Stage {
    /// The handshake goes on.
    Shaking(Box<ServerConnection>),
    /// It is over: who the peer is, until that was asked.
    Done(Mutex<Option<Vec<CertificateDer<'static>>>>),
    /// It could not begin.
    Impossible(rustls::Error),
}

impl Tls {
    fn shaking(&self) -> Option<&ServerConnection> {
        match &self.stage {
            Stage::Shaking(connection) => Some(connection),
            Stage::Done(_) | Stage::Impossible(_) => None,
        }
    }
}

impl Session for Tls {
    fn initial_keys(&self, dst_cid: &ConnectionId, side: Side) -> Keys {
        debug_assert!(side == Side::Server, "the side that this is");
        match self.config.quic.initial_keys(V1, dst_cid) {
            Ok(keys) => keys,
            Err(UnsupportedVersion) => unreachable!("the version that everybody speaks"),
        }
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        None
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        match &self.stage {
            Stage::Done(chain) => {
                let chain = chain.lock().unwrap_or_else(PoisonError::into_inner).take()?;
                Some(Box::new(chain))
            }
            Stage::Shaking(_) | Stage::Impossible(_) => None,
        }
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        None
    }

    fn early_data_accepted(&self) -> Option<bool> {
        None
    }

    fn is_handshaking(&self) -> bool {
        !matches!(self.stage, Stage::Done(_))
    }

    fn read_handshake(&mut self, bytes: &[u8]) -> Result<bool, TransportError> {
        let connection = match &mut self.stage {
            Stage::Shaking(connection) => connection,
            Stage::Done(_) => {
                let reason = "TLS goes on after the handshake".to_owned();
                return Err(failed(TransportErrorCode::PROTOCOL_VIOLATION, reason));
            }
            Stage::Impossible(error) => return Err(failed(TransportErrorCode::INTERNAL_ERROR, error.to_string())),
        };
        connection.read_hs(bytes).map_err(|error| {
            let alert = connection.alert().map(|alert| TransportErrorCode::crypto(alert.into()));
            failed(alert.unwrap_or(TransportErrorCode::PROTOCOL_VIOLATION), error.to_string())
        })?;
        if self.secrets.is_some() && !connection.is_handshaking() {
            let chain = connection.peer_certificates();
            let chain = chain.map(|chain| chain.iter().map(|certificate| certificate.clone().into_owned()).collect());
            self.stage = Stage::Done(Mutex::new(chain));
        }
        Ok(false)
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        let Some(mut theirs) = self.shaking().and_then(|connection| connection.quic_transport_parameters()) else {
            return Ok(None);
        };
        Ok(Some(TransportParameters::read(Side::Server, &mut theirs)?))
    }

    fn write_handshake(&mut self, buffer: &mut Vec<u8>) -> Option<Keys> {
        let Stage::Shaking(connection) = &mut self.stage else { return None };
        match connection.write_hs(buffer)? {
            KeyChange::Handshake { keys } => Some(pair(keys)),
            KeyChange::OneRtt { keys, next } => {
                self.secrets = Some(Arc::new(Mutex::new(next)));
                Some(pair(keys))
            }
        }
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        let secrets = Arc::clone(self.secrets.as_ref()?);
        if let Some(before) = self.next.take() {
            // Each change follows from the one before.
            before.keys();
        }
        let next = Arc::clone(self.next.insert(Arc::new(Next { secrets, keys: OnceLock::new() })));
        let local = Box::new(NextKey { next: Arc::clone(&next), is_local: true });
        Some(KeyPair { local, remote: Box::new(NextKey { next, is_local: false }) })
    }

    fn is_valid_retry(&self, _: &ConnectionId, _: &[u8], _: &[u8]) -> bool {
        // A client is told so, and this is a server.
        false
    }

    fn export_keying_material(&self, _: &mut [u8], _: &[u8], _: &[u8]) -> Result<(), ExportKeyingMaterialError> {
        Err(ExportKeyingMaterialError)
    }
}

impl Next {
    fn keys(&self) -> &PacketKeySet {
        self.keys.get_or_init(|| self.secrets.lock().unwrap_or_else(PoisonError::into_inner).next_packet_keys())
    }
}

impl NextKey {
    fn key(&self) -> &impl PacketKey {
        let keys = self.next.keys();
        if self.is_local { &keys.local } else { &keys.remote }
    }
}

impl PacketKey for NextKey {
    fn encrypt(&self, packet: u64, buffer: &mut [u8], header_len: usize) {
        PacketKey::encrypt(self.key(), packet, buffer, header_len);
    }

    fn decrypt(&self, packet: u64, header: &[u8], payload: &mut BytesMut) -> Result<(), CryptoError> {
        PacketKey::decrypt(self.key(), packet, header, payload)
    }

    fn tag_len(&self) -> usize {
        PacketKey::tag_len(self.key())
    }

    fn confidentiality_limit(&self) -> u64 {
        PacketKey::confidentiality_limit(self.key())
    }

    fn integrity_limit(&self) -> u64 {
        PacketKey::integrity_limit(self.key())
    }
}

fn failed(code: TransportErrorCode, reason: String) -> TransportError {
    TransportError { code, frame: None, reason }
}

fn pair(keys: rustls::quic::Keys) -> Keys {
    Keys {
        header: KeyPair { local: Box::new(keys.local.header), remote: Box::new(keys.remote.header) },
        packet: KeyPair { local: Box::new(keys.local.packet), remote: Box::new(keys.remote.packet) },
    }
}
