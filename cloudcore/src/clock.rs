//! The only place that reads clocks.

use std::time::{Duration, Instant};

use jiff::Timestamp;

/// Wall time now.
#[expect(clippy::disallowed_methods, reason = "the one place that reads clocks")]
pub fn wall() -> Timestamp {
    Timestamp::now()
}

/// [`wall`] as Unix milliseconds.
pub fn wall_millis() -> u64 {
    u64::try_from(wall().as_millisecond()).unwrap_or_default()
}

/// Time since a minute before the process first asked, which no one can set back: something may have been due before.
#[expect(clippy::disallowed_methods, reason = "the one place that reads clocks")]
pub fn monotonic() -> Duration {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed() + Duration::from_secs(60)
}
