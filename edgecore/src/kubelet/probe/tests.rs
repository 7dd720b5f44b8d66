use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn spec(period: u64, success: u32, failure: u32) -> ProbeSpec {
    ProbeSpec {
        initial_delay: Duration::ZERO,
        period: Duration::from_secs(period),
        timeout: SECOND,
        success_threshold: success,
        failure_threshold: failure,
    }
}

fn wall(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap_or_default()
}

fn subject(id: &str) -> Subject<'_> {
    Subject {
        container_id: Some(id),
        running: true,
        over: false,
        started_at: Some(wall(0)),
        started: true,
        deleting: false,
    }
}

fn fails(worker: &mut Worker, at: u64) -> Done {
    let now = Duration::from_secs(at);
    assert_eq!(worker.step(now, wall(0), &subject("a")), Step::Run, "at {at}");
    worker.done(now, "a", &Attempt::Failure("no".into()))
}

#[test]
fn liveness_fails_after_its_threshold_and_holds_until_there_is_another_container() {
    let mut worker = Worker::new(Kind::Liveness, spec(10, 1, 3), Duration::ZERO);
    assert_eq!(worker.outcome("a"), Outcome::Success);
    let done = fails(&mut worker, 0);
    assert_eq!(done.event, Some(("Unhealthy", "Liveness probe failed: no".into())));
    assert_eq!(worker.step(SECOND, wall(1), &subject("a")), Step::Wait(10 * SECOND));
    assert!(!fails(&mut worker, 10).changed);
    assert!(fails(&mut worker, 20).changed);
    assert_eq!(worker.outcome("a"), Outcome::Failure);
    assert_eq!(worker.step(30 * SECOND, wall(30), &subject("a")), Step::Idle);
    assert_eq!(worker.step(31 * SECOND, wall(31), &subject("b")), Step::Run);
    assert_eq!((worker.outcome("b"), worker.outcome("a")), (Outcome::Success, Outcome::Success));
}

#[test]
fn a_success_in_between_starts_the_count_again() {
    let mut worker = Worker::new(Kind::Liveness, spec(1, 1, 2), Duration::ZERO);
    fails(&mut worker, 0);
    assert_eq!(worker.step(SECOND, wall(1), &subject("a")), Step::Run);
    worker.done(SECOND, "a", &Attempt::Success);
    assert!(!fails(&mut worker, 2).changed);
    assert!(fails(&mut worker, 3).changed);
}

#[test]
fn the_initial_delay_counts_from_the_start_and_survives_a_clock_that_jumps() {
    let delayed = ProbeSpec { initial_delay: 20 * SECOND, ..spec(10, 1, 3) };
    let mut worker = Worker::new(Kind::Liveness, delayed, Duration::ZERO);
    assert_eq!(worker.step(100 * SECOND, wall(5), &subject("a")), Step::Wait(115 * SECOND));
    assert_eq!(worker.step(115 * SECOND, wall(-9999), &subject("a")), Step::Run);
    let mut worker = Worker::new(Kind::Liveness, delayed, Duration::ZERO);
    assert_eq!(worker.step(SECOND, wall(-9999), &subject("a")), Step::Wait(21 * SECOND));
}

#[test]
fn startup_gates_the_others_and_runs_once() {
    let starting = Subject { started: false, ..subject("a") };
    let mut readiness = Worker::new(Kind::Readiness, spec(10, 1, 3), Duration::ZERO);
    let mut startup = Worker::new(Kind::Startup, spec(1, 1, 2), Duration::ZERO);
    assert_eq!(readiness.step(SECOND, wall(1), &starting), Step::Idle);
    assert_eq!(startup.step(SECOND, wall(1), &starting), Step::Run);
    assert_eq!(startup.outcome("a"), Outcome::Unknown);
    assert!(startup.done(SECOND, "a", &Attempt::Success).changed);
    assert_eq!(startup.step(9 * SECOND, wall(9), &subject("a")), Step::Idle);
    assert_eq!(readiness.step(2 * SECOND, wall(2), &subject("a")), Step::Run);
}

#[test]
fn an_early_failure_of_readiness_is_quiet_and_tried_again_soon() {
    let mut worker = Worker::new(Kind::Readiness, spec(10, 1, 3), Duration::ZERO);
    let mut now = Duration::ZERO;
    let mut quiet = 0;
    loop {
        assert_eq!(worker.step(now, wall(0), &subject("a")), Step::Run);
        let done = worker.done(now, "a", &Attempt::Failure("refused".into()));
        if done.event.is_some() {
            break;
        }
        quiet += 1;
        let Step::Wait(next) = worker.step(now, wall(0), &subject("a")) else { panic!("it does not wait") };
        now = next;
    }
    assert_eq!((quiet, now), (5, Duration::from_millis(7750)));
    assert_eq!(worker.step(now, wall(0), &subject("a")), Step::Wait(now + 10 * SECOND));
    assert_eq!(worker.outcome("a"), Outcome::Failure);
    // Once it was ready, a failure is a failure.
    now += 10 * SECOND;
    assert_eq!(worker.step(now, wall(0), &subject("a")), Step::Run);
    assert!(worker.done(now, "a", &Attempt::Success).changed);
    now += 10 * SECOND;
    assert_eq!(worker.step(now, wall(0), &subject("a")), Step::Run);
    assert!(worker.done(now, "a", &Attempt::Failure("x".into())).event.is_some());
}

#[test]
fn an_error_is_tried_three_times_and_changes_nothing() {
    let mut worker = Worker::new(Kind::Liveness, spec(10, 1, 1), Duration::ZERO);
    for _ in 0..2 {
        assert_eq!(worker.step(SECOND, wall(1), &subject("a")), Step::Run);
        assert_eq!(worker.done(SECOND, "a", &Attempt::Error("gone".into())), Done::default());
    }
    assert_eq!(worker.step(SECOND, wall(1), &subject("a")), Step::Run);
    let done = worker.done(SECOND, "a", &Attempt::Error("gone".into()));
    let text = "Liveness probe errored and resulted in unknown state: gone";
    assert_eq!(done, Done { changed: false, event: Some(("Unhealthy", text.into())) });
    assert_eq!(worker.outcome("a"), Outcome::Success);
    assert_eq!(worker.step(2 * SECOND, wall(2), &subject("a")), Step::Wait(11 * SECOND));
}

#[test]
fn a_deleted_pod_is_not_killed_by_its_probes_but_its_readiness_is_still_asked() {
    let deleting = Subject { deleting: true, ..subject("a") };
    let mut liveness = Worker::new(Kind::Liveness, spec(1, 1, 1), Duration::ZERO);
    fails(&mut liveness, 0);
    assert_eq!(liveness.step(SECOND, wall(1), &deleting), Step::Stop);
    assert_eq!(liveness.outcome("a"), Outcome::Success);
    let mut readiness = Worker::new(Kind::Readiness, spec(1, 1, 1), Duration::ZERO);
    assert_eq!(readiness.step(SECOND, wall(1), &deleting), Step::Run);
    assert_eq!(readiness.step(SECOND, wall(1), &Subject { running: false, ..deleting }), Step::Idle);
    let over = Subject { running: false, over: true, ..deleting };
    assert_eq!(readiness.step(SECOND, wall(1), &over), Step::Stop);
}

#[test]
fn an_adopted_container_keeps_what_it_was_until_a_result() {
    let mut worker = Worker::new(Kind::Readiness, spec(10, 1, 3), 4 * SECOND);
    worker.adopt("a", Outcome::Success);
    assert_eq!(worker.outcome("a"), Outcome::Success);
    assert_eq!(worker.step(SECOND, wall(99), &subject("a")), Step::Wait(4 * SECOND));
    assert!(fails(&mut worker, 4).event.is_some());
    assert_eq!(worker.outcome("a"), Outcome::Success);
    fails(&mut worker, 14);
    assert!(fails(&mut worker, 24).changed);
    let mut startup = Worker::new(Kind::Startup, spec(10, 1, 3), Duration::ZERO);
    startup.adopt("a", Outcome::Success);
    assert_eq!(startup.step(SECOND, wall(1), &Subject { started: false, ..subject("a") }), Step::Idle);
}

#[test]
fn a_late_result_of_another_container_is_thrown_away() {
    let mut worker = Worker::new(Kind::Liveness, spec(1, 1, 1), Duration::ZERO);
    assert_eq!(worker.step(SECOND, wall(1), &subject("a")), Step::Run);
    assert_eq!(worker.step(SECOND, wall(1), &subject("b")), Step::Run);
    assert_eq!(worker.done(2 * SECOND, "a", &Attempt::Failure("old".into())), Done::default());
    assert_eq!(worker.outcome("b"), Outcome::Success);
}
