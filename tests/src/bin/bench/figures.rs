//! How figures are told, and what is promised of them.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use skerry_tests::procfs;

use self::Promise::{Least, LeastOfKubelets, Most, MostOfKubelets};

/// What SPECIFICATION.md promises, which a test compares with this. Without a subject: of every one that is ours.
const PROMISES: [Promised; 39] = [
    promised("agent.binary", "", Most(10.0), "MB"),
    promised("agent.rss.idle", "", Most(10.0), "MB"),
    promised("agent.rss.11pods", "", Most(12.0), "MB"),
    promised("agent.cpu.11pods", "", Most(0.2), "%"),
    promised("cloud.rss.idle", "", Most(30.0), "MB"),
    promised("pods.ready.1", "", MostOfKubelets(1.0), "s"),
    promised("pods.ready.10", "", MostOfKubelets(1.0), "s"),
    promised("pods.powercycle.first", "", Most(0.7), "s"),
    promised("pods.powercycle.all", "", Most(1.5), "s"),
    promised("link.idle.day", "", Most(1.5), "MB"),
    promised("link.reconnect.bytes", "", Most(2048.0), "B"),
    promised("link.reconnect.s", "", Most(1.0), "s"),
    promised("link.configmap.1byte", "", Most(1536.0), "B"),
    promised("link.image.bump", "", Most(400.0), "B"),
    promised("link.dead.s", "", Most(30.0), "s"),
    promised("link.control.p99", "", Most(0.5), "s"),
    promised("store.flash.day", "", Most(5.0), "MB"),
    promised("ops.exec.s", "", MostOfKubelets(1.15), "s"),
    promised("ops.logs.MBps", "", LeastOfKubelets(0.8), "MB/s"),
    promised("ops.exec.MBps", "", LeastOfKubelets(0.8), "MB/s"),
    promised("ops.rss.50exec", "edgecore", Most(5.0), "MB"),
    promised("ops.rss.50exec", "cloudcore", Most(10.0), "MB"),
    promised("ops.metrics.s", "", MostOfKubelets(1.0), "s"),
    promised("ops.metrics.apart.s", "", MostOfKubelets(1.0), "s"),
    promised("devices.values.s", "", Least(20_000.0), "1/s"),
    promised("devices.lost", "", Most(0.0), "1"),
    promised("devices.cpu.10k", "", Most(25.0), "%"),
    promised("devices.recovery.s", "", Most(5.0), "s"),
    promised("devices.rss.1000", "", Most(10.0), "MB"),
    promised("devices.rss.idle", "edgecore", Most(1.0), "KB"),
    promised("devices.desired.s", "", Most(0.2), "s"),
    promised("devices.local.s", "", Most(0.01), "s"),
    promised("devices.desired.narrow.s", "", Most(0.2), "s"),
    promised("devices.api.writes", "", Most(5.0), "1/s"),
    promised("mapper.rss", "", Most(6.0), "MB"),
    // Of 10,000 nodes.
    promised("cloud.rss.pernode", "", Most(40.0), "KB"),
    promised("cloud.sync.10k.s", "", Most(90.0), "s"),
    promised("cloud.reconnect.10k.s", "", Most(60.0), "s"),
    promised("cloud.api.writes", "", Most(0.0), "1"),
];
/// Whom ours is compared with, and what else is measured for comparison.
const KUBELET: &str = "kubelet";
const OTHERS: [&str; 3] = [KUBELET, "kubelet-online", "containerd"];

/// What was told in this run that something may be promised of.
static TOLD: Mutex<Vec<Told>> = Mutex::new(Vec::new());

struct Promised {
    figure: &'static str,
    subject: &'static str,
    promise: Promise,
    unit: &'static str,
}

#[derive(Clone, Copy)]
enum Promise {
    Most(f64),
    Least(f64),
    /// So many times what the upstream kubelet has in the same run.
    MostOfKubelets(f64),
    LeastOfKubelets(f64),
}

#[derive(Clone, Debug)]
struct Told {
    figure: String,
    subject: String,
    /// As it was told: what is promised is so of that.
    value: f64,
    unit: String,
}

const fn promised(figure: &'static str, subject: &'static str, promise: Promise, unit: &'static str) -> Promised {
    Promised { figure, subject, promise, unit }
}

/// One line on standard output.
pub(crate) fn tell(figure: &str, subject: &str, value: f64, unit: &str) {
    // Of what takes less than a second, milliseconds.
    tell_precisely(figure, subject, value, unit, if unit == "s" { 3 } else { 2 });
}

/// The same, with so many digits behind the point.
pub(crate) fn tell_precisely(figure: &str, subject: &str, value: f64, unit: &str, digits: usize) {
    let text = show(figure, subject, value, unit, digits);
    let (figure, subject, unit) = (figure.to_owned(), subject.to_owned(), unit.to_owned());
    let told = Told { figure, subject, value: text.parse().unwrap_or(value), unit };
    TOLD.lock().unwrap_or_else(PoisonError::into_inner).push(told);
}

/// The same, where nothing is promised, as it was measured with less than what is promised of.
pub(crate) fn tell_unpromised(figure: &str, subject: &str, value: f64, unit: &str) {
    show(figure, subject, value, unit, if unit == "s" { 3 } else { 2 });
}

fn show(figure: &str, subject: &str, value: f64, unit: &str, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    println!("{figure}\t{subject}\t{text}\t{unit}");
    text
}

/// Says of everything that was told and promised whether it is kept, on standard error; fails if anything is not.
pub(crate) fn judge() -> Result<()> {
    let told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    let broken = broken(&told);
    ensure!(broken.is_empty(), "not as SPECIFICATION.md promises:\n{}", broken.join("\n"));
    Ok(())
}

/// What is not kept.
fn broken(told: &[Told]) -> Vec<String> {
    let mut broken = Vec::new();
    for one in told.iter().filter(|one| !OTHERS.contains(&one.subject.as_str())) {
        let of_it = |promised: &&Promised| {
            promised.figure == one.figure && (promised.subject.is_empty() || promised.subject == one.subject)
        };
        let Some(promised) = PROMISES.iter().find(of_it) else { continue };
        let kubelet = told.iter().find(|other| other.figure == one.figure && other.subject == KUBELET);
        let Told { figure, subject, value, unit } = one;
        let line = format!("{figure} of {subject}: {value} {unit}, promised {promised}");
        match promised.promise.is_kept(*value, kubelet.map(|kubelet| kubelet.value)) {
            _ if unit != promised.unit => broken.push(format!("{line}: not in the same unit")),
            None => eprintln!("not compared: {line}"),
            Some(true) => eprintln!("kept: {line}"),
            Some(false) => {
                eprintln!("NOT KEPT: {line}");
                broken.push(line);
            }
        }
    }
    broken
}

impl Promise {
    /// None: there is nothing to compare with.
    fn is_kept(self, value: f64, kubelet: Option<f64>) -> Option<bool> {
        Some(match self {
            Most(limit) => value <= limit,
            Least(limit) => value >= limit,
            MostOfKubelets(times) => value <= times * kubelet?,
            LeastOfKubelets(times) => value >= times * kubelet?,
        })
    }
}

/// As SPECIFICATION.md says it.
impl fmt::Display for Promised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Counts have no unit, rates that of a time.
        let unit = self.unit.trim_start_matches('1');
        match self.promise {
            Most(0.0) => f.write_str("0"),
            Most(limit) => write!(f, "≤ {limit} {unit}"),
            Least(limit) => write!(f, "≥ {limit} {unit}"),
            MostOfKubelets(1.0) => f.write_str("≤ the kubelet's"),
            MostOfKubelets(times) => write!(f, "≤ {times} × the kubelet's"),
            LeastOfKubelets(times) => write!(f, "≥ {times} × the kubelet's"),
        }
    }
}

/// Resident memory of a process, in MB.
pub(crate) fn rss(pid: i32) -> Result<f64> {
    Ok(megabytes(u64::from(procfs::rss_kb(pid).context("no memory figures")?) * 1024))
}

#[expect(clippy::cast_precision_loss, reason = "two digits are told")]
pub(crate) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use skerry_tests::paths;

    use super::*;

    /// Figures and what is promised of them, from the tables of SPECIFICATION.md that have both.
    fn specified() -> BTreeMap<String, String> {
        let text = fs::read_to_string(paths::repository().join("SPECIFICATION.md")).unwrap();
        let mut specified = BTreeMap::new();
        let mut promises = false;
        for line in text.lines() {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let [_, first, second, ..] = cells.as_slice() else {
                promises = false;
                continue;
            };
            promises |= *first == "figure" && second.starts_with("promise");
            if let Some((figure, _)) = first.strip_prefix('`').and_then(|rest| rest.split_once('`'))
                && promises
                && !matches!(*second, "-" | "flat")
            {
                let second = second.replace("not worse than the kubelet", "≤ the kubelet's");
                let second = second.trim_end_matches(" each").replace("20,000", "20000");
                assert_eq!(specified.insert(figure.replace(".N.", ".10k."), second), None, "{figure} is there twice");
            }
        }
        specified
    }

    #[test]
    fn what_is_promised_is_what_the_specification_says() {
        let mut promised: BTreeMap<String, Vec<&Promised>> = BTreeMap::new();
        for one in &PROMISES {
            promised.entry(one.figure.to_owned()).or_default().push(one);
        }
        let said = |all: Vec<&Promised>| match all.as_slice() {
            [one] => one.to_string(),
            several => several.iter().map(|one| format!("{} {one}", one.subject)).collect::<Vec<_>>().join(", "),
        };
        let promised: BTreeMap<_, _> = promised.into_iter().map(|(figure, all)| (figure, said(all))).collect();
        assert_eq!(promised, specified());
    }

    #[test]
    fn what_is_not_kept_is_found_and_others_promise_nothing() {
        let told = |figure: &str, subject: &str, value: f64, unit: &str| {
            let (figure, subject, unit) = (figure.to_owned(), subject.to_owned(), unit.to_owned());
            Told { figure, subject, value, unit }
        };
        let found = |all: &[Told]| broken(all).len();
        assert_eq!(
            found(&[told("agent.binary", "edgecore", 10.0, "MB"), told("agent.binary", "kubelet", 84.0, "MB")]),
            0
        );
        assert_eq!(found(&[told("agent.binary", "edgecore", 10.01, "MB")]), 1);
        assert_eq!(found(&[told("agent.binary", "edgecore", 9.0, "KB")]), 1, "another unit");
        assert_eq!(found(&[told("devices.values.s", "edgecore", 19_999.0, "1/s")]), 1);
        assert_eq!(
            found(&[told("devices.lost", "sink", 1.0, "1"), told("cloud.api.writes", "cloudcore/quic", 0.0, "1")]),
            1
        );
        assert_eq!(found(&[told("pods.powercycle.all", "kubelet-online", 4.0, "s")]), 0);
        assert_eq!(found(&[told("devices.rss.idle", "cloudcore", 9.0, "KB")]), 0);
        // Beside the kubelet's of the same run.
        let ours =
            |seconds: f64| [told("ops.exec.s", "edgecore", seconds, "s"), told("ops.exec.s", "kubelet", 1.0, "s")];
        assert_eq!((found(&ours(1.14)), found(&ours(1.16))), (0, 1));
        assert_eq!(found(&ours(1.16)[..1]), 0, "alone");
        let ours = |rate: f64| {
            [told("ops.exec.MBps", "kubelet", 100.0, "MB/s"), told("ops.exec.MBps", "edgecore", rate, "MB/s")]
        };
        assert_eq!((found(&ours(80.0)), found(&ours(79.0))), (0, 1));
    }
}
