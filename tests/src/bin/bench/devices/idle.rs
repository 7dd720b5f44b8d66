//! Many devices that say nothing: no mapper has them.

use super::*;

/// How long so many may take to come to the edge.
const PATIENCE: u64 = 900;

pub(super) fn measure(bed: &mut Bed, count: usize) -> Result<()> {
    // Those of before are idle from now on.
    let (there, ..) = restarted(bed)?;
    let base = rss(bed.edgecore()?)?;
    let cloud = rss(bed.cloud.pid().context("cloudcore does not run")?)?;
    eprintln!("declaring {count} devices, beside {there}");
    let begin = Instant::now();
    bed.create("devicemodels", 1, |_| objects::model("idle", "ReadOnly"))?;
    bed.create("devices", count, |number| {
        objects::device(&format!("idle-{number}"), "idle", &json!({"number": number}), |number| {
            objects::read("idle", 1000, &json!({"register": number}))
        })
    })?;
    eprintln!("declared in {:.1} s", begin.elapsed().as_secs_f64());
    let all = there + float(count as u64);
    let mut told = Instant::now();
    until("all of them to be at the edge", PATIENCE, || {
        let (now, ..) = bed.local.figures("idle-")?;
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            eprintln!("{:.0} s: {now} devices at the edge", begin.elapsed().as_secs_f64());
        }
        Ok(float(now) >= all)
    })?;
    tell("devices.load.s", "edgecore", begin.elapsed().as_secs_f64(), "s");
    sleep(SETTLE);
    let of_each = |more: f64| 1e6 / 1024.0 * more / float(count as u64);
    let grown = rss(bed.edgecore()?)?;
    eprintln!("edgecore {base:.1} MB before, {grown:.1} MB after");
    tell("devices.rss.idle", "edgecore", of_each(grown - base), "KB");
    tell(
        "devices.rss.idle",
        "cloudcore",
        of_each(rss(bed.cloud.pid().context("cloudcore does not run")?)? - cloud),
        "KB",
    );
    let (found, seconds) = restarted(bed)?;
    ensure!(found >= all, "only {found} devices are there after a restart");
    tell("devices.restart.s", "edgecore", seconds, "s");
    let again = rss(bed.edgecore()?)?;
    eprintln!("edgecore {again:.1} MB after a restart");
    tell("devices.rss.idle.restarted", "edgecore", of_each(again - base), "KB");
    Ok(())
}

/// Starts edgecore anew, until it has its devices and is at rest: how many, and after how long.
fn restarted(bed: &mut Bed) -> Result<(f64, f64)> {
    bed.edge.stop();
    let syncs = bed.cloud.metric("skerry_session_syncs_total")?;
    let begin = Instant::now();
    bed.edge.start()?;
    let before = eventually("edgecore to answer", 120, || Ok(bed.local.figures("none").ok()))?;
    eprintln!("{} devices {:.1} s after its start", before.0, begin.elapsed().as_secs_f64());
    until("the session to be in sync", 300, || Ok(bed.cloud.metric("skerry_session_syncs_total")? > syncs))?;
    let seconds = begin.elapsed().as_secs_f64();
    sleep(SETTLE);
    Ok((float(bed.local.figures("none")?.0), seconds))
}
