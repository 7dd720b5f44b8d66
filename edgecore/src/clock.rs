//! The only place that reads clocks.

use std::time::{Duration, Instant};

use jiff::Timestamp;

/// Wall time now.
#[expect(clippy::disallowed_methods, reason = "the one place that reads clocks")]
pub fn wall() -> Timestamp {
    Timestamp::now()
}

/// Time since the process first asked, which no one can set back.
#[expect(clippy::disallowed_methods, reason = "the one place that reads clocks")]
pub fn monotonic() -> Duration {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}
