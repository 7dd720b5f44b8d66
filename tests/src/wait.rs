//! Waiting for something to come true, with a limit.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long a wait may last: `seconds`, or more when `SKERRY_TEST_PATIENCE` asks for it.
pub fn patience(seconds: u64) -> Duration {
    let asked = std::env::var("SKERRY_TEST_PATIENCE").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    Duration::from_secs(seconds.max(asked))
}

/// Asks until the answer is `Some`, for `seconds` at most (stretched by `SKERRY_TEST_PATIENCE`). An error of `ask` counts as "not
/// yet" and is told if time runs out.
pub fn eventually<T>(what: &str, seconds: u64, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let limit = patience(seconds);
    let begin = Instant::now();
    let mut last_error = None;
    loop {
        match ask() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(error) => last_error = Some(error),
        }
        if begin.elapsed() > limit {
            match last_error {
                Some(error) => bail!("waited {} s for {what}; the last error was: {error:#}", limit.as_secs()),
                None => bail!("waited {} s for {what}", limit.as_secs()),
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// As [`eventually`] for a plain condition.
pub fn until(what: &str, seconds: u64, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    eventually(what, seconds, || Ok(holds()?.then_some(())))
}

/// Watches that a condition holds for the whole of `duration`: for what must not happen, which no event announces.
pub fn stays(what: &str, duration: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < duration {
        if !holds()? {
            bail!("{what} did not last: it ended after {:.1} s", begin.elapsed().as_secs_f64());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}
