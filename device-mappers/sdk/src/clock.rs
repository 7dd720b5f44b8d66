//! The only place that reads clocks.

use std::time::{Duration, Instant};

pub use skerry_proto::device::{AHEAD, stamp};

/// Wall time: milliseconds since the Unix epoch, as the device mapper interface counts.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one place that reads clocks")]
pub fn wall() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

/// Time since the process first asked, which no one can set back.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one place that reads clocks")]
pub fn monotonic() -> Duration {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}
