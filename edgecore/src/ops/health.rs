//! `/healthz` and `/metrics/slis`: whether the kubelet does its work.

use std::fmt::Write as _;
use std::time::Duration;

use super::Ops;

/// The loop that looks after pods has not come round for so long: something holds it up. As upstream's.
const PATIENCE: Duration = Duration::from_secs(300);

/// Whether pods are looked after, or why not.
pub(super) fn syncloop(ops: &Ops) -> Result<(), String> {
    let Some(stats) = ops.stats.borrow().clone() else {
        return Err("the kubelet does not run: it waits for the container runtime, or to be started again".to_owned());
    };
    let since = stats.since_round();
    if since > PATIENCE {
        return Err(format!("the loop that looks after pods has not come round for {} s", since.as_secs()));
    }
    Ok(())
}

/// The page `/metrics/slis`: each check's name and result.
pub(super) fn page(ops: &Ops) -> String {
    let mut page = "# HELP kubernetes_healthcheck [STABLE] This metric records the result of a single healthcheck.\n\
        # TYPE kubernetes_healthcheck gauge\n"
        .to_owned();
    for (name, is_well) in [("ping", true), ("syncloop", syncloop(ops).is_ok())] {
        // Writing to a string does not fail.
        let _ = writeln!(page, "kubernetes_healthcheck{{name=\"{name}\",type=\"healthz\"}} {}", u8::from(is_well));
    }
    page
}
