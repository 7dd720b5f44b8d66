//! How figures are told.

use anyhow::{Context as _, Result};
use skerry_tests::procfs;

/// One line on standard output.
pub(crate) fn tell(figure: &str, subject: &str, value: f64, unit: &str) {
    // Of what takes less than a second, milliseconds.
    let digits = if unit == "s" { 3 } else { 2 };
    println!("{figure}\t{subject}\t{value:.digits$}\t{unit}");
}

/// Resident memory of a process, in MB.
pub(crate) fn rss(pid: i32) -> Result<f64> {
    Ok(megabytes(u64::from(procfs::rss_kb(pid).context("no memory figures")?) * 1024))
}

#[expect(clippy::cast_precision_loss, reason = "two digits are told")]
pub(crate) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
