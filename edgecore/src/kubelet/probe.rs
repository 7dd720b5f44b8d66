//! When a probe is due and what its results add up to: one [`Worker`] per container and kind, pure.
//!
//! The shell asks [`Worker::step`] what to do, runs the probe, and hands the result to [`Worker::done`]. Whatever may change the
//! answer (the container started, became started, ended, the pod is being deleted) is a reason to ask again at once; nothing has
//! to be asked on a tick.
//!
//! A readiness probe that fails right after its container started is tried again sooner than its period says, quietly: a server
//! that takes 300 ms to listen is ready after 300 ms and not after ten seconds.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1;

/// How often a probe that could not be run is tried at once.
const TRIES: u8 = 3;
/// The first delay of the quiet tries of a readiness probe; doubled each time until it reaches the period.
const EAGER: Duration = Duration::from_millis(250);

/// Which probe of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Gates the other two.
    Startup,
    /// Its failure kills the container.
    Liveness,
    /// Its failure takes the pod out of service.
    Readiness,
}

/// What a probe's results add up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A startup probe that has not come to an end.
    Unknown,
    /// Fine.
    Success,
    /// Not.
    Failure,
}

/// The numbers of a probe, defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeSpec {
    /// Counted from the start of the container.
    pub initial_delay: Duration,
    /// Between starts of the probe.
    pub period: Duration,
    /// For one run.
    pub timeout: Duration,
    /// Successes in a row.
    pub success_threshold: u32,
    /// Failures in a row.
    pub failure_threshold: u32,
}

/// What is known of the container when asking.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Of its newest instance; `None` before there is one.
    pub container_id: Option<&'a str>,
    /// It runs.
    pub running: bool,
    /// It ended and will not be restarted.
    pub over: bool,
    /// When it started.
    pub started_at: Option<Timestamp>,
    /// It has no startup probe, or that one succeeded.
    pub started: bool,
    /// The pod is being deleted.
    pub deleting: bool,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Run the probe and hand its result to [`Worker::done`].
    Run,
    /// Ask again then (monotonic), or when the subject changes.
    Wait(Duration),
    /// Ask again when the subject changes.
    Idle,
    /// There will never be anything to do.
    Stop,
}

/// How one run went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// It answered as it should.
    Success,
    /// It answered well enough, but someone should know.
    Warning(String),
    /// It did not, and why.
    Failure(String),
    /// The probe could not be run, and why.
    Error(String),
}

/// What a run changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// [`Worker::outcome`] is another one now.
    pub changed: bool,
    /// Reason and message of the Warning event to record.
    pub event: Option<(&'static str, String)>,
}

/// One probe of one container.
#[derive(Clone, Debug)]
pub struct Worker {
    kind: Kind,
    spec: ProbeSpec,
    container: Option<String>,
    outcome: Outcome,
    last: Outcome,
    run: u32,
    hold: bool,
    /// Not before; monotonic.
    next: Duration,
    /// The initial delay was added to `next`.
    delayed: bool,
    /// When the current run began.
    began: Duration,
    errors: u8,
    /// Delay before the next quiet try; `None` when there are none any more. The container is not ready anyway then, so a failed one
    /// need not be counted.
    eager: Option<Duration>,
}

impl Kind {
    /// As events say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }

    fn initial(self) -> Outcome {
        match self {
            Self::Startup => Outcome::Unknown,
            Self::Liveness => Outcome::Success,
            Self::Readiness => Outcome::Failure,
        }
    }

    /// The probe of this kind that a container has.
    pub fn of(self, container: &v1::Container) -> Option<&v1::Probe> {
        match self {
            Self::Startup => container.startup_probe.as_ref(),
            Self::Liveness => container.liveness_probe.as_ref(),
            Self::Readiness => container.readiness_probe.as_ref(),
        }
    }
}

impl From<&v1::Probe> for ProbeSpec {
    fn from(probe: &v1::Probe) -> Self {
        let seconds = |value: Option<i32>, default: u64| {
            Duration::from_secs(value.and_then(|value| u64::try_from(value).ok()).unwrap_or(default))
        };
        let at_least_one = |value: Option<i32>, default: u32| {
            value.and_then(|value| u32::try_from(value).ok()).unwrap_or(default).max(1)
        };
        Self {
            initial_delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10).max(Duration::from_secs(1)),
            timeout: seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1)),
            success_threshold: at_least_one(probe.success_threshold, 1),
            failure_threshold: at_least_one(probe.failure_threshold, 3),
        }
    }
}

impl Worker {
    /// A worker whose first run is not before `first` (monotonic): now, or at a random point of one period when edgecore has just
    /// started and would probe everything at once.
    pub fn new(kind: Kind, spec: ProbeSpec, first: Duration) -> Self {
        let initial = kind.initial();
        Self {
            kind,
            spec,
            container: None,
            outcome: initial,
            last: initial,
            run: 0,
            hold: false,
            next: first,
            delayed: false,
            began: first,
            errors: 0,
            eager: None,
        }
    }

    /// Takes over what was known of a container before edgecore was restarted, so that nothing flaps: it holds until the first
    /// result. A startup probe that had succeeded is not run again.
    pub fn adopt(&mut self, container_id: &str, outcome: Outcome) {
        self.container = Some(container_id.to_owned());
        self.outcome = outcome;
        self.last = outcome;
        self.run = 0;
        self.hold = self.kind == Kind::Startup && outcome == Outcome::Success;
        self.delayed = false;
        self.eager = None;
    }

    /// What the results add up to for this container; its initial value when nothing is known.
    pub fn outcome(&self, container_id: &str) -> Outcome {
        if self.container.as_deref() == Some(container_id) { self.outcome } else { self.kind.initial() }
    }

    /// The probe's numbers.
    pub fn spec(&self) -> &ProbeSpec {
        &self.spec
    }

    /// Which probe it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What to do at `now` (monotonic) and `wall`.
    pub fn step(&mut self, now: Duration, wall: Timestamp, subject: &Subject<'_>) -> Step {
        let Some(id) = subject.container_id else { return if subject.over { Step::Stop } else { Step::Idle } };
        if self.container.as_deref() != Some(id) {
            self.reset(now, id);
        }
        if !subject.running {
            self.outcome = Outcome::Failure;
            self.run = 0;
            self.last = Outcome::Failure;
            return if subject.over { Step::Stop } else { Step::Idle };
        }
        if subject.deleting && self.kind != Kind::Readiness {
            self.outcome = Outcome::Success;
            return Step::Stop;
        }
        if self.hold || subject.started == (self.kind == Kind::Startup) {
            return Step::Idle;
        }
        if !self.delayed {
            self.delayed = true;
            // The wall clock of a box jumps; no more than the whole delay is ever waited for.
            let ran = subject.started_at.map(|at| wall.duration_since(at)).unwrap_or_default();
            let ran = Duration::try_from(ran).unwrap_or_default();
            self.next = self.next.max(now + self.spec.initial_delay.saturating_sub(ran));
        }
        if now < self.next {
            return Step::Wait(self.next);
        }
        self.began = now;
        Step::Run
    }

    /// Takes the result of a run that was for this container, at `now` (monotonic).
    pub fn done(&mut self, now: Duration, container_id: &str, attempt: &Attempt) -> Done {
        if self.container.as_deref() != Some(container_id) || self.hold {
            return Done::default();
        }
        let kind = self.kind.name();
        if let Attempt::Error(error) = attempt {
            self.errors += 1;
            if self.errors < TRIES {
                self.next = now;
                return Done::default();
            }
            self.schedule(now);
            let message = format!("{kind} probe errored and resulted in unknown state: {error}");
            return Done { changed: false, event: Some(("Unhealthy", message)) };
        }
        let result = if matches!(attempt, Attempt::Failure(_)) { Outcome::Failure } else { Outcome::Success };
        if result == Outcome::Failure
            && let Some(delay) = self.eager
        {
            let following = delay * 2;
            self.errors = 0;
            self.eager = (following * 2 < self.spec.period).then_some(following);
            self.next = now + delay;
            return Done::default();
        }
        self.eager = None;
        self.schedule(now);
        let event = match attempt {
            Attempt::Warning(text) => Some(("ProbeWarning", format!("{kind} probe warning: {text}"))),
            Attempt::Failure(text) => Some(("Unhealthy", format!("{kind} probe failed: {text}"))),
            Attempt::Success | Attempt::Error(_) => None,
        };
        if self.last == result {
            self.run = self.run.saturating_add(1);
        } else {
            self.last = result;
            self.run = 1;
        }
        let needed = if result == Outcome::Failure { self.spec.failure_threshold } else { self.spec.success_threshold };
        if self.run < needed {
            return Done { changed: false, event };
        }
        let changed = self.outcome != result;
        self.outcome = result;
        self.hold = self.kind == Kind::Startup || (self.kind == Kind::Liveness && result == Outcome::Failure);
        Done { changed, event }
    }

    fn reset(&mut self, now: Duration, id: &str) {
        // The first container of all may have to wait for its random start; a restarted one not.
        let first = if self.container.is_none() { self.next } else { now };
        *self = Self::new(self.kind, self.spec, first);
        self.container = Some(id.to_owned());
        self.eager = (self.kind == Kind::Readiness).then_some(EAGER);
    }

    fn schedule(&mut self, now: Duration) {
        self.errors = 0;
        self.next = (self.began + self.spec.period).max(now);
    }
}

#[cfg(test)]
mod tests;
