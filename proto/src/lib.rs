//! What cloudcore and edgecore agree on: the frames of the link, the two sync state machines, the multiplexer of a session's streams,
//! the payloads of reports, devices, MQTT and, with the features `cri` and `dmi`, the bindings of the CRI and of the device mapper interface.
//!
//! But for what the features `transport` and `footprint` add nothing here does IO or reads a clock: the machines in [`sync`] are stepped with the time and an input and answer with outputs.

#[cfg(feature = "dmi")]
pub mod authority;
pub mod delta;
pub mod device;
#[cfg(test)]
mod dice;
mod dictionary;
#[cfg(feature = "footprint")]
pub mod footprint;
pub mod frame;
#[cfg(test)]
mod fuzz;
pub mod mqtt;
pub mod mux;
pub mod ops;
pub mod payload;
#[cfg(feature = "streams")]
pub mod streams;
pub mod sync;
pub mod token;
#[cfg(feature = "transport")]
pub mod transport;

/// The frames of the link, generated from `wire/link.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, unused_qualifications, reason = "generated")]
pub mod wire {
    include!(concat!(env!("OUT_DIR"), "/skerry.link.v1.rs"));
}

impl wire::frame::Body {
    /// Whether it is of the control class as it is: neither a stream's, nor a part of a larger frame.
    pub(crate) fn is_control(&self) -> bool {
        !matches!(
            self,
            Self::StreamOpen(_)
                | Self::StreamData(_)
                | Self::StreamCredit(_)
                | Self::StreamReset(_)
                | Self::ControlPart(_)
        )
    }
}

/// CRI v1, client and server, generated from `cri/cri.proto`.
#[cfg(feature = "cri")]
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    unreachable_pub,
    unused_qualifications,
    deprecated,
    reason = "generated"
)]
pub mod cri {
    include!(concat!(env!("OUT_DIR"), "/runtime.v1.rs"));
}

/// The gRPC health checking protocol, client and server, generated from `health/health.proto`.
#[cfg(feature = "cri")]
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, unused_qualifications, reason = "generated")]
pub mod health {
    include!(concat!(env!("OUT_DIR"), "/grpc.health.v1.rs"));
}

/// The device mapper interface v1beta1, client and server, generated from `dmi/dmi.proto`.
#[cfg(feature = "dmi")]
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, unused_qualifications, reason = "generated")]
pub mod dmi {
    include!(concat!(env!("OUT_DIR"), "/v1beta1.rs"));
    /// What the interface lacks, client and server, generated from `dmi/methods.proto` and `dmi/reports.proto`.
    pub mod extensions {
        include!(concat!(env!("OUT_DIR"), "/skerry.dmi.v1.rs"));
    }
}

/// gRPC metadata of the answer to a mapper's registration that has not all of its devices: the others are told by calls.
pub const PARTIAL: &str = "skerry-partial";

/// The label that makes a Node an edge node.
pub const EDGE_LABEL: &str = "node-role.kubernetes.io/edge";
/// Node annotation: `"false"` switches autonomy off (the default for edge nodes is on).
pub const AUTONOMY_ANNOTATION: &str = "skerry.dev/autonomy";
/// Node annotation: the addresses of the box itself, as a Node's `status.addresses` would list them: JSON, `[{"type": …, "address": …}]`.
pub const ADDRESSES_ANNOTATION: &str = "skerry.dev/addresses";
/// Node condition: whether edgecore is connected to an MQTT broker. Only a node that needs one has it.
pub const BROKER_CONDITION: &str = "MQTTBrokerReady";
/// The port of cloudcore, TCP and later UDP, unless told otherwise.
pub const DEFAULT_PORT: u16 = 10000;
