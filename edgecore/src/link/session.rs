//! One session: steps the machine with what the socket, the disk, the outbox and the clock bring, and does what it says.
//!
//! Bounds: frames are not read while [`MAX_UNCOMMITTED`] bytes wait for the disk; statuses, or events, are not taken from the outbox while
//! [`MAX_GIVEN`] bytes of them are unanswered, nor either while [`MAX_UNSENT`] bytes wait for the socket. What the cloud gives back for a
//! while is not on its way, and holds nothing up.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use skerry_proto::sync::{self, Collection, Edge, EdgeInput, EdgeOutput, Op, Reason};
use skerry_proto::transport::{self, End};
use skerry_proto::wire::Goodbye;
use tracing::{debug, error, warn};

use super::Link;
use super::backoff::Backoff;
use super::connect::{Wire, ended};
use crate::clock;
use crate::store::{self, Revisions, Store};

const MAX_UNCOMMITTED: usize = 2 << 20;
// What the store refuses for its size would be tried for ever: the last object of a batch is read when a little less waits already.
const _: () = assert!(sync::MAX_OBJECT + 2 * MAX_UNCOMMITTED <= store::QUEUE_BYTES);
const MAX_GIVEN: usize = 256 << 10;
/// Of [`Given`].
const EVENTS: usize = 1;
const MAX_UNSENT: usize = 256 << 10;
/// An inventory of the largest store fits; a peer that asks again and again without reading does not.
const MAX_UNSENT_EVER: usize = 16 << 20;
/// How long the last words may take.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long a commit is tried after the connection has gone.
const LAST_COMMIT: Duration = Duration::from_secs(5);

/// Why a session ended.
pub(super) enum Ended {
    Shutdown,
    Broken {
        established: bool,
        /// Nothing was heard any more.
        silent: bool,
        cause: String,
        /// How long the cloud is not to be asked again, if it said so.
        retry_after: Option<Duration>,
    },
    Dismissed {
        established: bool,
        goodbye: Goodbye,
    },
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("edgecore ends or restarts"),
            Self::Broken { cause, .. } => f.write_str(cause),
            Self::Dismissed { goodbye, .. } => f.write_str(&goodbye.message),
        }
    }
}

/// Of statuses and of events, the last report that the machine was given: each is once in its life.
pub(super) type Given = [u64; 2];

/// What has to reach the disk, in order.
enum Job {
    Apply {
        ops: Vec<Op>,
        revisions: Revisions,
        ticket: u64,
    },
    Done {
        id: u64,
        refused: String,
    },
    /// The machine's pods are those of the cloud. Whether they are the store's too depends on whether it lost some.
    PodsKnown {
        damaged: u64,
    },
}

type Commit = Pin<Box<dyn Future<Output = Result<Option<u64>, store::Error>> + Send>>;

pub(super) struct Session<'a> {
    link: &'a Link,
    edge: Edge,
    /// [`Store::damaged`] from before the machine's rows were read.
    damaged: u64,
    wire: Wire,
    given: &'a mut Given,
    jobs: VecDeque<Job>,
    job_bytes: usize,
    /// The batch that is being written, kept until it is durable.
    writing: Option<(Vec<Job>, Commit)>,
    backoff: Backoff,
    established: Option<(u64, u64)>,
    was_established: bool,
    ending: Option<Ended>,
    /// The last words.
    goodbye: Option<Goodbye>,
}

impl<'a> Session<'a> {
    pub(super) fn new(link: &'a Link, edge: Edge, damaged: u64, wire: Wire, given: &'a mut Given) -> Self {
        Self {
            link,
            edge,
            damaged,
            wire,
            given,
            jobs: VecDeque::new(),
            job_bytes: 0,
            writing: None,
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(30), rand::random()),
            established: None,
            was_established: false,
            ending: None,
            goodbye: None,
        }
    }

    /// To its end. The machine comes back if the store has all that it has.
    pub(super) async fn run(mut self) -> (Ended, Option<Edge>) {
        let outbox = self.link.store.outbox();
        let (mut damaged, known) = (self.link.store.damaged(), self.damaged);
        let mut network = self.link.network.clone();
        // The connection was made just now.
        network.mark_unchanged();
        // Whether the outbox may have statuses, and events, that the machine was not given.
        let mut look = [true; 2];
        self.step(EdgeInput::Connected);
        let ended = loop {
            if let Some((epoch, server_time)) = self.established.take() {
                if let Err(failed) = self.link.established(epoch, server_time, self.wire.is_quic()).await {
                    break self.broken(format!("the session's epoch cannot be recorded: {failed}"), None);
                }
                self.was_established = true;
                self.link.streams.send_replace(Some(self.wire.streams()));
            }
            if let Some(ended) = self.ending.take() {
                break ended;
            }
            self.start_commit();
            if let Some(which) = (0..2).find(|which| look[*which] && self.may_take(*which == EVENTS)) {
                look[which] = self.take_reports(which).await.unwrap_or_else(|failed| {
                    warn!(error = %failed, "the outbox cannot be read");
                    false
                });
                continue;
            }
            let due = self.edge.next_timeout().map(|at| at.saturating_sub(clock::monotonic()));
            let reading = self.job_bytes < MAX_UNCOMMITTED;
            let wants = tokio::select! {
                biased;
                () = self.link.shutdown.cancelled() => Event::Shutdown,
                result = write(&mut self.writing) => Event::Written(result),
                // Both ways at once: a peer that does not read until it has written must not stop us.
                result = self.wire.next(reading) => Event::Wire(result),
                () = outbox.notified() => Event::Outbox,
                Ok(_) = damaged.wait_for(|damaged| *damaged != known) => Event::Damaged,
                // What does not read hears no answer: it asks when it reads again.
                Ok(()) = network.changed(), if reading => Event::Network,
                () = tokio::time::sleep(due.unwrap_or(Duration::from_secs(3600))), if due.is_some() => Event::Timeout,
            };
            match wants {
                Event::Shutdown => {
                    self.goodbye(Reason::Shutdown, "edgecore ends or restarts");
                    break Ended::Shutdown;
                }
                Event::Written(Ok(ticket)) => {
                    if let Some((jobs, _)) = self.writing.take() {
                        self.job_bytes -= jobs.iter().map(Job::bytes).sum::<usize>();
                    }
                    self.backoff.reset();
                    look = [true; 2];
                    if let Some(ticket) = ticket {
                        self.step(EdgeInput::Committed { ticket });
                    }
                }
                Event::Written(Err(failed)) => self.write_again(&failed),
                Event::Wire(Ok(transport::Event::Heard)) => self.step(EdgeInput::Heard),
                Event::Wire(Ok(transport::Event::Opened(incoming))) => {
                    self.step(EdgeInput::Heard);
                    self.link.services.deliver(incoming, |incoming| incoming);
                }
                Event::Wire(Ok(transport::Event::Frame(frame))) => {
                    self.step(EdgeInput::Frame(frame));
                    if self.wire.waiting().control > MAX_UNSENT_EVER {
                        break self.broken("the cloud asks and does not read".to_owned(), None);
                    }
                }
                Event::Wire(Err(end)) => {
                    if let End::Garbage(cause) = &end {
                        self.goodbye(Reason::Protocol, cause);
                    }
                    let error = ended(&self.link.server, end);
                    break self.broken(error.to_string(), error.retry_after());
                }
                // There is room for reports again.
                Event::Wire(Ok(transport::Event::Drained)) => {}
                Event::Outbox => look = [true; 2],
                Event::Damaged => {
                    break self.broken("the store lost rows to damage, a new session fetches them".to_owned(), None);
                }
                Event::Network => self.step(EdgeInput::Doubt),
                Event::Timeout => self.step(EdgeInput::Timeout),
            }
        };
        self.finish(ended).await
    }

    /// Lets the connection go, and commits what was received, for the machine counts on it. A slow disk keeps no stream open meanwhile.
    async fn finish(mut self, ended: Ended) -> (Ended, Option<Edge>) {
        self.link.streams.send_replace(None);
        let (store, reason) = (self.link.store.clone(), ended.to_string());
        let farewell = self.wire.finish(&reason, self.goodbye, FAREWELL);
        let commits = async {
            if let Some((jobs, commit)) = self.writing.take()
                && commit.await.is_err()
            {
                commit_jobs(&store, &jobs).await?;
            }
            let rest: Vec<Job> = self.jobs.drain(..).collect();
            commit_jobs(&store, &rest).await
        };
        let ((), committed) = tokio::join!(farewell, tokio::time::timeout(LAST_COMMIT, commits));
        self.edge.step(clock::monotonic(), EdgeInput::Disconnected);
        (ended, matches!(committed, Ok(Ok(_))).then_some(self.edge))
    }

    fn step(&mut self, input: EdgeInput) {
        for output in self.edge.step(clock::monotonic(), input) {
            match output {
                EdgeOutput::Send(frame) => self.wire.push(frame),
                EdgeOutput::Established { epoch, server_time } => self.established = Some((epoch, server_time)),
                EdgeOutput::Apply { ops, ticket } => {
                    let revisions = self.edge.revisions().collect();
                    self.push(Job::Apply { ops, revisions, ticket });
                }
                EdgeOutput::Reported { id, refused } => {
                    if !refused.is_empty() {
                        warn!(report = id, %refused, "the cloud refused a report for good");
                    }
                    self.push(Job::Done { id, refused });
                }
                // Nobody listens while the kubelet starts; it reports everything then.
                EdgeOutput::ReportWanted { kind, uid } => drop(self.link.wanted.send((kind, uid))),
                EdgeOutput::InSync(Collection::Pods) => self.push(Job::PodsKnown { damaged: self.damaged }),
                EdgeOutput::InSync(collection) => debug!(?collection, "in sync"),
                EdgeOutput::Dismissed(goodbye) => {
                    self.ending = Some(Ended::Dismissed { established: self.was_established, goodbye });
                }
                EdgeOutput::Close(goodbye) => {
                    let cause = match &goodbye {
                        Some(goodbye) => format!("the cloud broke the protocol: {}", goodbye.message),
                        None => "nothing was heard of the cloud for too long".to_owned(),
                    };
                    let silent = goodbye.is_none();
                    self.goodbye = goodbye;
                    if self.ending.is_none() {
                        let established = self.was_established;
                        self.ending = Some(Ended::Broken { established, silent, cause, retry_after: None });
                    }
                }
            }
        }
    }

    fn push(&mut self, job: Job) {
        self.job_bytes += job.bytes();
        self.jobs.push_back(job);
    }

    /// Everything that waits, as one batch: what comes while it is written makes up the next.
    fn start_commit(&mut self) {
        if self.writing.is_some() || self.jobs.is_empty() {
            return;
        }
        let jobs: Vec<Job> = self.jobs.drain(..).collect();
        let commit = self.commit(&jobs, Duration::ZERO);
        self.writing = Some((jobs, commit));
    }

    fn write_again(&mut self, failed: &store::Error) {
        let Some((jobs, _)) = self.writing.take() else { return };
        if self.backoff.failures() == 0 {
            error!(error = %failed, "what the cloud sent cannot be written; it is tried again and not acknowledged before");
        }
        let wait = self.backoff.wait();
        let commit = self.commit(&jobs, wait);
        self.writing = Some((jobs, commit));
    }

    fn commit(&self, jobs: &[Job], after: Duration) -> Commit {
        let store = self.link.store.clone();
        let batch = Batch::of(jobs);
        Box::pin(async move {
            if !after.is_zero() {
                tokio::time::sleep(after).await;
            }
            batch.commit(&store).await
        })
    }

    fn may_take(&self, events: bool) -> bool {
        self.was_established && self.edge.waiting_bytes(events) < MAX_GIVEN && self.wire.waiting().control < MAX_UNSENT
    }

    /// Answers whether there may be more.
    async fn take_reports(&mut self, which: usize) -> Result<bool, store::Error> {
        let last = &mut self.given[which];
        let reports = self.link.store.pending_reports(which == EVENTS, *last, MAX_GIVEN / 4).await?;
        *last = reports.last().map_or(*last, |report| report.id);
        let any = !reports.is_empty();
        for report in reports {
            self.step(EdgeInput::Report(report));
        }
        Ok(any)
    }

    fn goodbye(&mut self, reason: Reason, message: &str) {
        self.goodbye = Some(Goodbye { reason: reason.into(), message: message.to_owned(), retry_after_ms: 0 });
    }

    fn broken(&self, cause: String, retry_after: Option<Duration>) -> Ended {
        Ended::Broken { established: self.was_established, silent: false, cause, retry_after }
    }
}

enum Event {
    Shutdown,
    Written(Result<Option<u64>, store::Error>),
    Wire(Result<transport::Event, End>),
    Outbox,
    Damaged,
    Network,
    Timeout,
}

async fn write(writing: &mut Option<(Vec<Job>, Commit)>) -> Result<Option<u64>, store::Error> {
    match writing {
        Some((_, commit)) => commit.await,
        None => std::future::pending().await,
    }
}

impl Job {
    fn bytes(&self) -> usize {
        match self {
            Self::Apply { ops, .. } => ops
                .iter()
                .map(|op| match op {
                    Op::Upsert(object) => 256 + object.payload.len(),
                    Op::Patch(_, _, delta) => 256 + delta.payload.len(),
                    Op::Delete(..) => 128,
                })
                .sum(),
            Self::Done { refused, .. } => 64 + refused.len(),
            Self::PodsKnown { .. } => 0,
        }
    }
}

/// Jobs, made ready for the store.
struct Batch {
    ops: Vec<Op>,
    revisions: Revisions,
    ticket: Option<u64>,
    done: Vec<(u64, String)>,
    pods_known: Option<u64>,
}

impl Batch {
    fn of(jobs: &[Job]) -> Self {
        let mut batch =
            Self { ops: Vec::new(), revisions: Revisions::new(), ticket: None, done: Vec::new(), pods_known: None };
        for job in jobs {
            match job {
                Job::Apply { ops, revisions, ticket } => {
                    batch.ops.extend(ops.iter().cloned());
                    batch.revisions.clone_from(revisions);
                    batch.ticket = Some(*ticket);
                }
                Job::Done { id, refused } => batch.done.push((*id, refused.clone())),
                Job::PodsKnown { damaged } => batch.pods_known = Some(*damaged),
            }
        }
        batch
    }

    async fn commit(self, store: &Store) -> Result<Option<u64>, store::Error> {
        let Self { ops, revisions, ticket, done, pods_known } = self;
        let (applied, done) =
            tokio::join!(async { if ops.is_empty() { Ok(()) } else { store.apply_at(ops, revisions).await } }, async {
                if done.is_empty() { Ok(()) } else { store.reports_done(done).await }
            },);
        applied?;
        done?;
        if let Some(damaged) = pods_known
            && !*store.pods_known().borrow()
        {
            store.set_pods_known(damaged).await?;
        }
        Ok(ticket)
    }
}

async fn commit_jobs(store: &Store, jobs: &[Job]) -> Result<Option<u64>, store::Error> {
    if jobs.is_empty() { Ok(None) } else { Batch::of(jobs).commit(store).await }
}
