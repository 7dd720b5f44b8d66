use std::collections::VecDeque;

use super::*;

/// The origin of simulated time.
#[expect(clippy::disallowed_methods, reason = "no moment but this can be made, and none is compared with it")]
fn origin() -> Instant {
    Instant::now()
}

/// A line with a queue that never drops, and a sender that has always more to send.
struct Line {
    /// There and back without a queue.
    way: Duration,
    /// What one datagram takes of the line.
    each: Duration,
    /// How much longer some take than others.
    jitter: Duration,
    now: Duration,
    free_at: Duration,
    /// When each was sent, and when it will be acknowledged.
    flying: VecDeque<(Duration, Duration)>,
    /// What losses let be on its way: there are none.
    window: u64,
}

const MTU: u16 = 1200;
const BYTES: u64 = 1200;

impl Line {
    fn new(way: u64, each: u64) -> Self {
        let (way, each) = (Duration::from_millis(way), Duration::from_millis(each));
        let zero = Duration::ZERO;
        Self { way, each, jitter: zero, now: zero, free_at: zero, flying: VecDeque::new(), window: 10 * BYTES }
    }

    /// Answers the longest wait in the queue, and how many were acknowledged.
    fn run(&mut self, origin: Instant, queue: &mut Queue, time: Duration) -> (Duration, u32) {
        let (end, mut longest, mut count) = (self.now + time, Duration::ZERO, 0);
        while self.now < end {
            while (self.flying.len() as u64 + 1) * BYTES <= queue.most.min(self.window) {
                let from = self.free_at.max(self.now);
                longest = longest.max(from - self.now);
                self.free_at = from + self.each;
                // None overtakes another.
                let late = self.jitter * (self.free_at.as_millis() * 7 % 11) as u32 / 10;
                let last = self.flying.back().map_or(self.now, |(_, at)| *at);
                self.flying.push_back((self.now, (self.free_at + self.way + late).max(last)));
            }
            let Some((sent, acknowledged)) = self.flying.pop_front() else { break };
            self.now = self.now.max(acknowledged);
            count += 1;
            if self.window <= queue.most.min(4000 * BYTES) {
                self.window += BYTES;
            }
            queue.acknowledged(origin + self.now, origin + sent, BYTES, self.window, true);
        }
        (longest, count)
    }
}

#[test]
fn our_own_queue_stays_short_and_the_line_busy() {
    let origin = origin();
    for (way, each) in [(5, 1), (50, 4), (50, 45), (100, 10), (600, 2), (600, 45)] {
        let (mut line, mut queue) = (Line::new(way, each), Queue::new(origin, MTU));
        line.run(origin, &mut queue, Duration::from_secs(60));
        let time = Duration::from_secs(120);
        let (longest, count) = line.run(origin, &mut queue, time);
        assert!(longest < 2 * TARGET + 4 * line.each, "{longest:?} at {way} ms, {each} ms each");
        assert!(line.each * count > time * 7 / 10, "{count} at {way} ms, {each} ms each");
    }
}

#[test]
fn a_narrower_line_is_found_out() {
    let origin = origin();
    let (mut line, mut queue) = (Line::new(50, 1), Queue::new(origin, MTU));
    line.run(origin, &mut queue, Duration::from_secs(60));
    line.each = Duration::from_millis(40);
    line.run(origin, &mut queue, Duration::from_secs(60));
    let (longest, _) = line.run(origin, &mut queue, Duration::from_secs(60));
    assert!(longest < 2 * TARGET + 4 * line.each, "{longest:?}");
}

#[test]
fn a_longer_way_is_taken_for_the_line_itself() {
    let origin = origin();
    for longer in [20, 40, 60, 80, 90, 95, 98, 100, 102, 105, 110, 120, 150, 200, 650] {
        let (mut line, mut queue) = (Line::new(3, 1), Queue::new(origin, MTU));
        line.run(origin, &mut queue, Duration::from_secs(60));
        line.way = Duration::from_millis(3 + longer);
        line.jitter = Duration::from_millis(4);
        line.run(origin, &mut queue, Duration::from_secs(60));
        let (_, count) = line.run(origin, &mut queue, Duration::from_secs(30));
        // Where it looks like a queue as long as ours may be, what was on its way before stays.
        assert!(count > 15_000, "{count} in 30 s, of 30000, {longer} ms longer");
        // And the shorter way again, if that comes back.
        line.way = Duration::from_millis(3);
        line.run(origin, &mut queue, Duration::from_secs(60));
        let (longest, _) = line.run(origin, &mut queue, Duration::from_secs(60));
        assert!(longest < 2 * TARGET + 4 * line.each, "{longest:?} after {longer} ms more");
    }
}

#[test]
fn who_has_little_to_send_is_not_told_to_send_less() {
    let origin = origin();
    let mut queue = Queue::new(origin, MTU);
    for n in 0..100 {
        let sent = origin + Duration::from_secs(n);
        let took = Duration::from_millis(if n < 10 { 50 } else { 900 });
        queue.acknowledged(sent + took, sent, BYTES, u64::MAX, false);
    }
    assert_eq!(queue.most, u64::MAX);
}
