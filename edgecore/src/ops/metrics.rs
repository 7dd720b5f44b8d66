//! `/stats` and `/metrics`.

use super::Ops;
use super::answer::{Answer, Refusal};

/// Answers `/stats/summary`, `/metrics`, `/metrics/resource`, `/metrics/cadvisor` and `/metrics/probes`. Nothing is measured yet.
pub(super) async fn metrics(_ops: &Ops, _path: &str) -> Result<Answer, Refusal> {
    Err(Refusal::missing("404: Page Not Found"))
}
