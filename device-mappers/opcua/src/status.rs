//! Status codes, by name (OPC 10000-6, annex A).

/// Whether a code says that something failed.
#[must_use]
pub fn is_bad(status: u32) -> bool {
    status & 0x8000_0000 != 0
}

/// Whether a code says that the session or the channel is gone.
#[must_use]
pub fn is_gone(status: u32) -> bool {
    matches!(status >> 16, 0x8022 | 0x8025 | 0x8026 | 0x8027 | 0x807f | 0x8086)
}

/// A code as the standard names it, and what to do about it where that helps.
#[must_use]
pub fn name(status: u32) -> String {
    let known = match status >> 16 {
        0x800a => "BadTimeout",
        0x801f => "BadUserAccessDenied",
        0x8020 => "BadIdentityTokenInvalid: see `userName` and `password`",
        0x8021 => "BadIdentityTokenRejected: see `userName` and `password`",
        0x8022 => "BadSecureChannelIdInvalid",
        0x8025 => "BadSessionIdInvalid",
        0x8026 => "BadSessionClosed",
        0x8027 => "BadSessionNotActivated",
        0x8033 => "BadNodeIdInvalid: see `nodeID`",
        0x8034 => "BadNodeIdUnknown: the server has no such node, see `nodeID`",
        0x803a => "BadNotReadable",
        0x803b => "BadNotWritable",
        0x803c => "BadOutOfRange",
        0x8054 => "BadSecurityModeRejected: the server takes no connection without security",
        0x8055 => "BadSecurityPolicyRejected: the server takes no connection without security",
        0x8074 => "BadTypeMismatch",
        0x8075 => "BadMethodInvalid: see `methodID`",
        0x8076 => "BadArgumentsMissing",
        0x8079 => "BadNoSubscription",
        0x807f => "BadTcpSecureChannelUnknown",
        0x8080 => "BadTcpMessageTooLarge",
        0x8083 => "BadTcpEndpointUrlInvalid",
        0x8086 => "BadSecureChannelClosed",
        0x80ab => "BadInvalidArgument",
        0x80b9 => "BadResponseTooLarge",
        _ => return format!("status 0x{status:08x}"),
    };
    known.to_owned()
}
