//! Whether a device can be reached, without the flapping. Pure: time is an argument.

use std::time::Duration;

/// What is reported of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It answers.
    Ok,
    /// It is there, but something of it cannot be read or written, or is configured wrongly.
    Unhealthy,
    /// It cannot be reached.
    Offline,
}

impl State {
    /// As the interface names it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unhealthy => "unhealthy",
            Self::Offline => "offline",
        }
    }
}

/// A change for the worse has to last this long before it is reported.
const LASTING: Duration = Duration::from_secs(2);
/// Changes are reported no closer together than this.
const APART: Duration = Duration::from_secs(2);

/// What was seen and what was reported.
#[derive(Debug, Default)]
pub struct Health {
    seen: Option<(State, Duration)>,
    reported: Option<(State, Duration)>,
}

impl Health {
    /// Notes what is seen now.
    pub fn see(&mut self, now: Duration, state: State) {
        if self.seen.is_none_or(|(seen, _)| seen != state) {
            self.seen = Some((state, now));
        }
    }

    /// What was seen last.
    #[must_use]
    pub fn seen(&self) -> Option<State> {
        self.seen.map(|(state, _)| state)
    }

    /// What is to be reported now, if anything.
    pub fn take(&mut self, now: Duration) -> Option<State> {
        if self.due()? > now {
            return None;
        }
        let (state, _) = self.seen?;
        self.reported = Some((state, now));
        Some(state)
    }

    /// When something is to be reported, unless it changes until then.
    #[must_use]
    pub fn due(&self) -> Option<Duration> {
        let (state, since) = self.seen?;
        match self.reported {
            None => Some(since),
            Some((reported, _)) if reported == state => None,
            Some((_, at)) => {
                let lasting = if state == State::Ok { Duration::ZERO } else { LASTING };
                Some((since + lasting).max(at + APART))
            }
        }
    }

    /// Reports again what was reported: whoever was told has forgotten.
    pub fn forget(&mut self) {
        self.reported = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn the_first_state_is_told_at_once_and_a_change_for_the_worse_when_it_lasts() {
        let mut health = Health::default();
        assert_eq!(health.take(at(0)), None);
        health.see(at(0), State::Ok);
        assert_eq!(health.take(at(0)), Some(State::Ok));
        health.see(at(10_000), State::Offline);
        assert_eq!(health.take(at(10_500)), None);
        health.see(at(11_000), State::Ok);
        assert_eq!(health.take(at(20_000)), None, "it came back");
        health.see(at(21_000), State::Offline);
        health.see(at(22_000), State::Offline);
        assert_eq!(health.due(), Some(at(23_000)));
        assert_eq!(health.take(at(23_000)), Some(State::Offline));
        health.see(at(24_000), State::Ok);
        assert_eq!(health.take(at(24_000)), None);
        assert_eq!(health.take(at(25_000)), Some(State::Ok));
    }

    #[test]
    fn flapping_is_not_passed_on() {
        let mut health = Health::default();
        let mut told = 0;
        for step in 0..1000 {
            let state = if step % 2 == 0 { State::Ok } else { State::Offline };
            health.see(at(step * 100), state);
            told += u32::from(health.take(at(step * 100)).is_some());
        }
        assert_eq!(told, 1);
    }

    #[test]
    fn what_was_forgotten_is_told_again() {
        let mut health = Health::default();
        health.see(at(0), State::Ok);
        assert!(health.take(at(0)).is_some());
        assert!(health.take(at(9000)).is_none());
        health.forget();
        assert_eq!(health.take(at(9000)), Some(State::Ok));
    }
}
