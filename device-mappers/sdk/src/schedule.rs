//! When which property is read. Pure: time is an argument.
//!
//! Properties of one cycle are due together, so that a driver can read them in one request. Devices of one cycle are spread over it, so
//! that a thousand of them do not ask at once. A cycle that was missed, because the device was slow, is left out and not made up for.

use std::time::Duration;

/// The cycles of a device's properties.
#[derive(Debug, Default)]
pub struct Schedule {
    /// One for each cycle, with the properties that have it.
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    cycle: Duration,
    next: Duration,
    properties: Vec<usize>,
}

impl Schedule {
    /// Properties, by index, and their cycles: all are due `now`, and then on the grid of their cycle.
    #[must_use]
    pub fn new(cycles: impl IntoIterator<Item = (usize, Duration)>, now: Duration) -> Self {
        let mut groups: Vec<Group> = Vec::new();
        for (property, cycle) in cycles {
            match groups.iter_mut().find(|group| group.cycle == cycle) {
                Some(group) => group.properties.push(property),
                None => groups.push(Group { cycle, next: now, properties: vec![property] }),
            }
        }
        Self { groups }
    }

    /// When something is due; none when nothing ever is.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        self.groups.iter().map(|group| group.next).min()
    }

    /// Appends what is due `now` to `due`, and plans its next time: a point of the cycle's grid, which the device's `seed` shifts.
    pub fn take_due(&mut self, now: Duration, seed: u64, due: &mut Vec<usize>) {
        for group in &mut self.groups {
            if group.next > now {
                continue;
            }
            due.extend_from_slice(&group.properties);
            group.next = next_point(now, group.cycle, seed);
        }
    }
}

/// The first point of the grid `phase + n · cycle` that lies after `now`, by at least half a cycle: a grid that is just about to strike
/// would have a property read twice in a row.
fn next_point(now: Duration, cycle: Duration, seed: u64) -> Duration {
    let cycle = nanoseconds(cycle).max(1);
    let now = nanoseconds(now);
    let phase = seed % cycle;
    let earliest = now.saturating_add(cycle / 2).max(now + 1);
    let steps = earliest.saturating_sub(phase).div_ceil(cycle);
    Duration::from_nanos(phase.saturating_add(steps.saturating_mul(cycle)))
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 4).min(u64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn properties_of_one_cycle_are_due_together() {
        let mut schedule = Schedule::new([(0, SECOND), (1, SECOND * 5), (2, SECOND)], Duration::ZERO);
        let mut due = Vec::new();
        schedule.take_due(Duration::ZERO, 0, &mut due);
        assert_eq!(due, [0, 2, 1]);
        due.clear();
        schedule.take_due(SECOND, 0, &mut due);
        assert_eq!(due, [0, 2]);
        assert_eq!(schedule.next(), Some(SECOND * 2));
    }

    #[test]
    fn devices_are_spread_over_the_cycle() {
        let mut counts = [0; 10];
        for device in 0..1000u64 {
            let mut schedule = Schedule::new([(0, SECOND)], Duration::ZERO);
            let seed = xxhash_rust::xxh3::xxh3_64(&device.to_le_bytes());
            schedule.take_due(Duration::ZERO, seed, &mut Vec::new());
            counts[usize::try_from(schedule.next().unwrap().as_millis() % 1000 / 100).unwrap()] += 1;
        }
        assert!(counts.iter().all(|&count| (60..140).contains(&count)), "{counts:?}");
    }

    proptest! {
        #[test]
        fn time_always_moves_on_and_missed_cycles_are_left_out(cycle_ms in 1..100_000u64, seed: u64, late in 0..1_000_000u64) {
            let cycle = Duration::from_millis(cycle_ms);
            let mut schedule = Schedule::new([(0, cycle)], Duration::ZERO);
            let mut due = Vec::new();
            schedule.take_due(Duration::ZERO, seed, &mut due);
            let now = schedule.next().unwrap() + Duration::from_millis(late);
            due.clear();
            schedule.take_due(now, seed, &mut due);
            prop_assert_eq!(due.len(), 1);
            let next = schedule.next().unwrap();
            prop_assert!(next > now && next <= now + cycle * 2);
        }
    }
}
