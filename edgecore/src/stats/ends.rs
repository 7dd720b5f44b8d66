//! How often containers ended how, since edgecore was started.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::page::{Labels, Page};
use crate::kubelet::spec::Kind;

/// Most ways that are told apart; others are not counted. A way is 256 exit codes by a few reasons.
const MOST: usize = 1000;

/// The counts of all pods, by what a container is to its pod, exit code, and reason.
#[derive(Debug, Default)]
pub struct Ends(Mutex<BTreeMap<(&'static str, i32, String), u64>>);

impl Ends {
    /// Counts the end of a container.
    pub fn add(&self, kind: Kind, exit_code: i32, reason: &str) {
        let kind = match kind {
            Kind::Init | Kind::Sidecar => "init_container",
            Kind::App => "container",
            Kind::Ephemeral => "ephemeral_container",
        };
        let (way, mut counts) = ((kind, exit_code, reason.to_owned()), self.counts());
        if counts.len() < MOST || counts.contains_key(&way) {
            *counts.entry(way).or_default() += 1;
        }
    }

    /// Puts them on a page.
    pub(super) fn write(&self, page: &mut Page) {
        let name = "kubelet_terminated_containers_total";
        let mut family = page.counter(name, "[ALPHA] Cumulative number of container terminations.");
        for ((kind, exit_code, reason), count) in self.counts().iter() {
            let exit_code = exit_code.to_string();
            let labels = [("container_type", *kind), ("exit_code", exit_code.as_str()), ("reason", reason.as_str())];
            family.add(&Labels::new(labels), count, None);
        }
    }

    fn counts(&self) -> MutexGuard<'_, BTreeMap<(&'static str, i32, String), u64>> {
        // Counting cannot leave anything half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::page::strict;

    #[test]
    fn ends_are_counted_by_what_ended_and_how() {
        let ends = Ends::default();
        ends.add(Kind::App, 139, "Error");
        ends.add(Kind::App, 139, "Error");
        ends.add(Kind::Init, 0, "Completed");
        let mut page = Page::default();
        ends.write(&mut page);
        let samples = strict::parse(&page.finish()).unwrap();
        let count = |kind: &str, code: &str, reason: &str| {
            let labels = [("container_type", kind), ("exit_code", code), ("reason", reason)];
            let is_it = |sample: &&strict::Sample| sample.is("kubelet_terminated_containers_total", &labels);
            samples.iter().find(is_it).map(|sample| sample.value)
        };
        assert_eq!(count("container", "139", "Error"), Some(2.0));
        assert_eq!(count("init_container", "0", "Completed"), Some(1.0));
        assert_eq!(samples.len(), 2);
    }

    #[test]
    fn there_is_a_bound() {
        let ends = Ends::default();
        for code in 0..2000 {
            ends.add(Kind::App, code, "Error");
        }
        ends.add(Kind::App, 1, "Error");
        let counts = ends.counts();
        assert_eq!((counts.len(), counts[&("container", 1, "Error".to_owned())]), (MOST, 2));
    }
}
