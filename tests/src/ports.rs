//! Free ports, taken below the kernel's ephemeral range so that no outgoing connection gets in between.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::{LazyLock, Mutex, PoisonError};

use anyhow::{Result, bail};
use rand::RngExt as _;

/// The ports given out: who asked may not listen yet when the next one asks.
static GIVEN: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Mutex::default);

/// A port that nobody listens on, TCP and UDP, and that this process was never given before.
pub fn free() -> Result<u16> {
    for _ in 0..200 {
        let port = rand::rng().random_range(25_001..32_000);
        let any = (Ipv4Addr::UNSPECIFIED, port);
        if TcpListener::bind(any).is_ok()
            && UdpSocket::bind(any).is_ok()
            && GIVEN.lock().unwrap_or_else(PoisonError::into_inner).insert(port)
        {
            return Ok(port);
        }
    }
    bail!("found no free port between 25001 and 32000: see `ss -ltnp`")
}
