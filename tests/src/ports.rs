//! Free ports, taken below the kernel's ephemeral range so that no outgoing connection gets in between.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use anyhow::{Result, bail};
use rand::RngExt as _;

/// A port of the loopback address that nobody listens on, TCP and UDP.
pub fn free() -> Result<u16> {
    for _ in 0..200 {
        let port = rand::rng().random_range(25_001..32_000);
        let any = (Ipv4Addr::UNSPECIFIED, port);
        if TcpListener::bind(any).is_ok() && UdpSocket::bind(any).is_ok() {
            return Ok(port);
        }
    }
    bail!("found no free port between 25001 and 32000: see `ss -ltnp`")
}
