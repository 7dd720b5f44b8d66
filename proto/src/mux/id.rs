//! What a stream is called: who opened it, its class, and its number among those.

use std::fmt;

/// Who one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// cloudcore.
    Cloud,
    /// edgecore.
    Edge,
}

/// What a stream is for: a higher class always goes first. Control frames are above all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Requests of the node's own Kubernetes API that pass through.
    Api,
    /// Logs, exec, attach, port-forward, metrics.
    Ops,
    /// Twins and telemetry.
    Device,
}

/// A stream of one session. It is what goes over the wire: the lowest bit is the side, the next two the class.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(u32);

impl Side {
    /// The peer.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Cloud => Self::Edge,
            Self::Edge => Self::Cloud,
        }
    }

    pub(super) fn index(self) -> usize {
        match self {
            Self::Cloud => 0,
            Self::Edge => 1,
        }
    }
}

impl Class {
    /// From the highest to the lowest.
    pub const ALL: [Self; 3] = [Self::Api, Self::Ops, Self::Device];

    /// What a stream of it may have on its way and unread at first, in bytes. Both sides have to know the same.
    pub fn window(self) -> usize {
        match self {
            Self::Api | Self::Ops | Self::Device => 64 << 10,
        }
    }

    /// Its place in [`Class::ALL`].
    pub fn index(self) -> usize {
        match self {
            Self::Api => 0,
            Self::Ops => 1,
            Self::Device => 2,
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Api => "api",
            Self::Ops => "ops",
            Self::Device => "device",
        })
    }
}

impl StreamId {
    /// `None` when the numbers are used up.
    pub(super) fn new(side: Side, class: Class, number: u32) -> Option<Self> {
        let (side, class) = (u32::from(side == Side::Edge), class as u32 + 1);
        (number < 1 << 29).then_some(Self(number << 3 | class << 1 | side))
    }

    /// `None` for what names no class of streams.
    pub(super) fn parse(id: u32) -> Option<Self> {
        (id >> 1 & 3 != 0).then_some(Self(id))
    }

    /// Who opened it.
    pub fn side(self) -> Side {
        if self.0 & 1 == 1 { Side::Edge } else { Side::Cloud }
    }

    /// Its class.
    pub fn class(self) -> Class {
        match self.0 >> 1 & 3 {
            1 => Class::Api,
            2 => Class::Ops,
            _ => Class::Device,
        }
    }

    pub(super) fn number(self) -> u32 {
        self.0 >> 3
    }
}

impl From<StreamId> for u32 {
    fn from(id: StreamId) -> Self {
        id.0
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.0, self.class())
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}/{}/{}", self.side(), self.class(), self.number())
    }
}
