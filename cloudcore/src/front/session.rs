//! A session: one edge node, from its Hello to the end of the connection, as one task that moves inputs into a
//! [`Hub`](skerry_proto::sync::Hub) and carries out what it answers.
//!
//! An edge is told that its Node is deleted only when the apiserver has said so; whatever else goes wrong, it is told to come again.

use std::time::Duration;

use rand::RngExt as _;
use skerry_proto::sync::{COLLECTIONS, Hub, HubInput, HubOutput, Reason, check_hello, fingerprint};
use skerry_proto::transport::{End, Event};
use skerry_proto::wire::frame::Body;
use skerry_proto::wire::{Frame, Goodbye, Hello};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::TryRecvError;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::join::{deleted_message, expired_message, too_old_message};
use super::{AGENT, Front, Stranger, Wire, shown};
use crate::backend::{Backend, BackendError, Feed, FeedEvent, NodeCheck, NodeIdentity};
use crate::clock;
use crate::metrics;
use crate::pki::{NodeCertificate, Standing};
use crate::registry::{BeginError, Eviction, Place};
use crate::retry::chain;
use crate::secrets::SecretStore;

const HELLO_PATIENCE: Duration = Duration::from_secs(10);
const CHECK_PATIENCE: Duration = Duration::from_secs(10);
/// How long a session waits for the watches to come as far as another replica's had, once all is listed; bookmarks come every minute at the
/// latest.
const CATCH_UP: Duration = Duration::from_secs(75);
/// The same while not all is listed, which sessions that come again and again only hold up.
const LIST: Duration = Duration::from_secs(240);
/// How long the last words may take.
const FAREWELL: Duration = Duration::from_secs(3);
/// Bytes of control frames that wait, from which on no more is taken from whoever can wait, and the edge is not listened to.
const FULL: usize = 512 << 10;
/// How often an edge that is not listened to is looked at, whether it takes what is sent.
const LOOK: Duration = Duration::from_secs(1);

/// Why a session does not begin, for the metrics, and what the edge is told.
type Refused = (&'static str, Option<Goodbye>);

/// A session that may begin.
struct Begun {
    hello: Hello,
    /// When it came.
    heard: Duration,
    place: Place,
    /// What the edge knows of the apiserver's revisions means nothing any more.
    restored: bool,
}

/// A session that stands. What lives as long as it does is in one piece, and nothing of how it began: there are thousands.
pub(super) struct Session<F> {
    wire: Wire,
    node: NodeIdentity,
    place: Place,
    feed: F,
    hub: Hub,
    /// What the hub wants done first.
    outputs: Vec<HubOutput>,
    counted: metrics::Standing,
}

/// The session of whoever comes, says Hello and may have one; others are told why not. A stranger is one of them, whose number is bounded,
/// until it has its place among the sessions, whose number is bounded too.
pub(super) async fn open<B, S>(
    front: &Front<B, S>,
    coming: impl Future<Output = Option<Stranger>>,
) -> Option<Box<Session<B::Feed>>>
where
    B: Backend,
    S: SecretStore,
{
    let (wire, certificate, stranger) = coming.await?;
    let mut wire = wire.full_at(FULL);
    let begun = begin(front, &mut wire, &certificate).await;
    let node = certificate.node;
    let Begun { hello, heard, place, restored } = match begun {
        Ok(begun) => begun,
        Err((result, goodbye)) => {
            front.metrics.session_start(result);
            debug!(node = shown(&node), result, "no session");
            finish(wire, goodbye).await;
            return None;
        }
    };
    drop(stranger);
    let epoch = place.epoch();
    front.metrics.session_start("ok");
    let counted = front.metrics.session(heard);
    info!(node = shown(&node), epoch, agent = hello.agent, "connected");
    let seen = if restored { &[] } else { hello.revisions.as_slice() };
    let feed = front.backend.open(&node, epoch, hello.last_epoch, who(&hello), seen);
    let (mut hub, mut outputs) = Hub::new(clock::monotonic(), &hello, epoch, clock::wall_millis(), AGENT);
    if restored {
        outputs.extend(hub.step(clock::monotonic(), HubInput::Restored));
    }
    Some(Box::new(Session { wire, node, place, feed, hub, outputs, counted }))
}

/// Runs a session to its end.
pub(super) async fn run<B, S>(front: &Front<B, S>, mut session: Box<Session<B::Feed>>)
where
    B: Backend,
    S: SecretStore,
{
    let goodbye = drive(front, &mut session).await;
    let (node, epoch) = (shown(&session.node), session.place.epoch());
    match goodbye.as_ref().map(|said| (said.reason(), &said.message)) {
        Some((Reason::Protocol, message)) => {
            warn!(node, epoch, "disconnected, for the edge broke the protocol: {message}")
        }
        Some((_, message)) => info!(node, epoch, "disconnected: {message}"),
        None => info!(node, epoch, "disconnected: the connection ended"),
    }
    front.metrics.session_end(goodbye.as_ref().map_or("closed", |said| result(said.reason())));
    // Boxed, for no session is to keep the room that its end needs.
    Box::pin(finish(session.over(), goodbye)).await;
}

impl<F> Session<F> {
    /// Lets go of all but the connection.
    #[expect(clippy::boxed_local, reason = "the box goes as well")]
    fn over(self: Box<Self>) -> Wire {
        self.wire
    }
}

async fn finish(wire: Wire, goodbye: Option<Goodbye>) {
    let reason = goodbye.as_ref().map_or_else(|| "the connection ended".to_owned(), |said| said.message.clone());
    wire.finish(&reason, goodbye, FAREWELL).await;
}

/// Hears the Hello, makes sure that the node is one, and takes its place.
async fn begin<B, S>(front: &Front<B, S>, wire: &mut Wire, certificate: &NodeCertificate) -> Result<Begun, Refused>
where
    B: Backend,
    S: SecretStore,
{
    let node = &certificate.node;
    let heard = tokio::select! {
        () = front.stop.cancelled() => return Err(shutdown()),
        heard = tokio::time::timeout(HELLO_PATIENCE, wire.next(true)) => heard,
    };
    let hello = match heard {
        Ok(Ok(Event::Frame(Frame { body: Some(Body::Hello(hello)) }))) => hello,
        Ok(Ok(Event::Frame(_) | Event::Opened(_) | Event::Heard | Event::Drained)) => {
            return Err(protocol("the first frame must be a Hello"));
        }
        Ok(Err(End::Garbage(what))) => return Err(protocol(&what)),
        Ok(Err(_)) => return Err(("closed", None)),
        Err(_) => return Err(protocol("no Hello came in time")),
    };
    let heard = clock::monotonic();
    // Before anything of it is remembered or logged.
    check_hello(&hello).map_err(|what| protocol(&what))?;
    if hello.node != node.name {
        let message = format!(
            "the certificate is the one of node {}, not of {:?}; `edgecore reset` and joining again makes the two agree",
            node.name, hello.node
        );
        warn!(node = shown(node), claimed = hello.node, "a node claims to be another");
        return Err(("other_name", Some(goodbye(Reason::Refused, message))));
    }
    // Deletions from here on are seen, so that none falls between the check and the place taken.
    let mut deletions = front.backend.deletions();
    let (mut known, agents) = match asked(&front.stop, "about this node", front.backend.check(node)).await? {
        NodeCheck::Live { epoch, agents } => (epoch, agents),
        NodeCheck::Deleted | NodeCheck::OtherUid => return Err(deleted(node)),
    };
    let seen = hello.revisions.iter().map(|revision| revision.newest).max().unwrap_or_default();
    let revision = asked(&front.stop, "how new its objects are", front.backend.revision(seen)).await?;
    let restored = revision < seen;
    if restored {
        warn!(
            node = shown(node),
            revision, seen, "the edge has seen later changes than the apiserver has: it was restored from a backup"
        );
    }
    // A node that was deleted is to hear that, however old its certificate is.
    match certificate.standing(clock::wall()) {
        Standing::Valid => {}
        Standing::Expired => {
            let said = goodbye(Reason::CertificateExpired, expired_message(certificate));
            return Err(("certificate_expired", Some(said)));
        }
        Standing::TooOld => {
            return Err(("certificate_too_old", Some(goodbye(Reason::Refused, too_old_message(certificate)))));
        }
    }
    let who = who(&hello);
    // Whoever was taken over and comes back is one of two, if the other's session stands, wherever that is; an edge that has lost what it
    // knew may have had sessions since that the Node does not name.
    let is_back = agents.have_ousted(who);
    if is_back || hello.last_epoch == 0 && known != 0 {
        let leased = asked(&front.stop, "about the node's lease", front.backend.leased(&node.name)).await?;
        if is_back && leased.is_some() {
            let error = BeginError::Twin(node.name.clone());
            warn!(node = shown(node), "{error}");
            return Err(("twin", Some(goodbye(Reason::Refused, error.to_string()))));
        }
        known = known.max(leased.unwrap_or_default());
    }
    let place = match front.sessions.begin(node, who, hello.last_epoch.max(known), clock::wall_millis()) {
        Ok(place) => place,
        Err(error) => {
            let result = match error {
                BeginError::Full => return Err(later("full", &error.to_string())),
                BeginError::Epoch(_) => "epoch",
                BeginError::Twin(_) => "twin",
            };
            warn!(node = shown(node), "{error}");
            return Err((result, Some(goodbye(Reason::Refused, error.to_string()))));
        }
    };
    match missed(&mut deletions, node) {
        Some(true) => Err(deleted(node)),
        Some(false) => Ok(Begun { hello, heard, place, restored }),
        None => Err(later("unavailable", "too much is going on")),
    }
}

/// What the apiserver answers, unless that takes too long or cloudcore goes down.
async fn asked<T>(
    stop: &CancellationToken,
    what: &str,
    answer: impl Future<Output = Result<T, BackendError>>,
) -> Result<T, Refused> {
    let answer = tokio::select! {
        () = stop.cancelled() => return Err(shutdown()),
        answer = tokio::time::timeout(CHECK_PATIENCE, answer) => answer,
    };
    let refused = || later("unavailable", &format!("the apiserver cannot be asked {what} now"));
    answer.map_err(|_| refused())?.map_err(|error| {
        debug!("no session begins: {}", chain(&error));
        refused()
    })
}

/// Which start of which box it is that says Hello; the same at every replica.
fn who(hello: &Hello) -> u64 {
    fingerprint(format!("{}\0{}", hello.run_id, hello.store_id).as_bytes())
}

/// Runs the hub until the session ends; says what the edge should hear.
async fn drive<B, S>(front: &Front<B, S>, session: &mut Session<B::Feed>) -> Option<Goodbye>
where
    B: Backend,
    S: SecretStore,
{
    let Session { wire, node, place, feed, hub, outputs, counted } = session;
    let mut patience = Patience::new(clock::monotonic());
    let mut pace = Pace::default();
    // Whoever opens a stream on it now is sent behind the Welcome.
    place.offer(wire.streams());
    loop {
        for output in std::mem::take(outputs) {
            match output {
                HubOutput::Send(frame) => wire.push(frame),
                HubOutput::Inventory(collection, entries) => feed.inventory(collection, entries),
                HubOutput::InSync => {
                    front.metrics.in_sync();
                    debug!(node = shown(node), "in sync");
                }
                HubOutput::Report(report) => feed.report(report),
                HubOutput::Close(goodbye) => return goodbye,
            }
        }
        let now = clock::monotonic();
        counted.goes_on(now, hub);
        let keeps_up = !wire.is_full();
        let due = hub.next_timeout().saturating_sub(now);
        let due = if keeps_up { due } else { due.min(LOOK) };
        let late = hub.is_behind().then(|| patience.until.saturating_sub(now));
        pace.goes_on(keeps_up, wire.waiting().control);
        tokio::select! {
            biased;
            eviction = place.evicted() => return Some(match eviction {
                Eviction::Superseded => goodbye(Reason::Superseded, "a newer session of this node took over"),
                Eviction::NodeDeleted => goodbye(Reason::NodeDeleted, deleted_message(&node.name)),
            }),
            () = front.stop.cancelled() => return Some(goodbye(Reason::Shutdown, "cloudcore is going down")),
            event = wire.next(keeps_up) => match event {
                Ok(Event::Frame(frame)) => *outputs = hub.step(clock::monotonic(), HubInput::Frame(frame)),
                Ok(Event::Heard) => *outputs = hub.step(clock::monotonic(), HubInput::Heard),
                Ok(Event::Opened(incoming)) => {
                    *outputs = hub.step(clock::monotonic(), HubInput::Heard);
                    if !front.services.deliver(incoming, |incoming| (node.clone(), incoming)) {
                        front.metrics.stream_refused();
                    }
                }
                Ok(Event::Drained) => {}
                Err(End::Garbage(what)) => return Some(goodbye(Reason::Protocol, what)),
                Err(end @ (End::Closed | End::Told(_) | End::Busy(_) | End::WebSocket(_) | End::Quic(_))) => {
                    debug!(node = shown(node), "{}", chain(&end));
                    return None;
                }
            },
            () = tokio::time::sleep(late.map_or(due, |late| late.min(due))) => {
                if late.is_some_and(|late| late <= due) {
                    warn!(node = shown(node), "the edge knows of newer changes than the watches here have come to");
                    let (_, said) = later("behind", "this replica of cloudcore has not seen what the node was told by another one");
                    return said;
                }
                let lives = pace.look(wire.waiting().control);
                let input = if lives { HubInput::Heard } else { HubInput::Timeout };
                *outputs = hub.step(clock::monotonic(), input);
            }
            events = feed.next(), if keeps_up => for event in events {
                let now = clock::monotonic();
                outputs.extend(match event {
                    FeedEvent::Superseded => {
                        return Some(goodbye(Reason::Superseded, "a newer session of this node took over, at another replica"));
                    }
                    FeedEvent::Newest(collection, revision) => hub.step(now, HubInput::Newest(collection, revision)),
                    FeedEvent::Reached(collection, revision) => hub.step(now, HubInput::Reached(collection, revision)),
                    FeedEvent::Desired(object) => hub.step(now, HubInput::Desired(object)),
                    FeedEvent::Keep(collection, entry) => hub.step(now, HubInput::Keep(collection, entry)),
                    FeedEvent::Gone(collection, uid) => hub.step(now, HubInput::Gone(collection, uid)),
                    FeedEvent::Complete(collection) => {
                        patience.listed(now);
                        hub.step(now, HubInput::Complete(collection))
                    }
                    FeedEvent::Ask(collection) => hub.ask(collection),
                    FeedEvent::ReportWanted(kind, uid) => hub.ask_report(kind, uid),
                    FeedEvent::ReportLater { id, after } => hub.step(now, HubInput::ReportLater { id, after }),
                    FeedEvent::Reported { id, refused } => hub.step(now, HubInput::Reported { id, refused }),
                });
            },
        }
    }
}

/// Until when a session may lag behind what its edge has seen.
#[derive(Debug)]
struct Patience {
    until: Duration,
    /// Collections.
    unlisted: usize,
}

impl Patience {
    fn new(now: Duration) -> Self {
        Self { until: now + LIST, unlisted: COLLECTIONS.len() }
    }

    /// One more collection is complete.
    fn listed(&mut self, now: Duration) {
        self.unlisted = self.unlisted.saturating_sub(1);
        if self.unlisted == 0 {
            self.until = now + CATCH_UP;
        }
    }
}

/// Whether an edge that is not listened to, because it does not keep up, takes what is sent: on a slow line that lasts longer than one that
/// is silent is taken for alive, and no silence.
#[derive(Debug, Default)]
struct Pace {
    /// Since the edge does not keep up: what waited at the last look.
    waited: Option<usize>,
}

impl Pace {
    /// The session goes on, with so many bytes that wait.
    fn goes_on(&mut self, keeps_up: bool, waiting: usize) {
        if keeps_up {
            self.waited = None;
        } else {
            self.waited.get_or_insert(waiting);
        }
    }

    /// Whether anything was taken since the last look.
    fn look(&mut self, waiting: usize) -> bool {
        self.waited.replace(waiting).is_some_and(|before| waiting < before)
    }
}

/// Whether this node was deleted since the receiver was made; `None` when that cannot be told.
fn missed(deletions: &mut Receiver<NodeIdentity>, node: &NodeIdentity) -> Option<bool> {
    loop {
        match deletions.try_recv() {
            Ok(gone) if gone == *node => return Some(true),
            Ok(_) => {}
            Err(TryRecvError::Empty | TryRecvError::Closed) => return Some(false),
            Err(TryRecvError::Lagged(_)) => return None,
        }
    }
}

fn goodbye(reason: Reason, message: impl Into<String>) -> Goodbye {
    Goodbye { reason: reason.into(), message: message.into(), retry_after_ms: 0 }
}

/// What the end of a session is called in the metrics, as a start is that fails for the same.
fn result(reason: Reason) -> &'static str {
    match reason {
        Reason::Shutdown => "shutdown",
        Reason::Superseded => "superseded",
        Reason::NodeDeleted => "node_deleted",
        Reason::Protocol => "protocol",
        Reason::Version => "version",
        Reason::Overloaded => "unavailable",
        Reason::CertificateExpired => "certificate_expired",
        Reason::Refused | Reason::Unspecified => "refused",
    }
}

fn shutdown() -> Refused {
    ("shutdown", Some(goodbye(Reason::Shutdown, "cloudcore is going down")))
}

fn protocol(what: &str) -> Refused {
    ("protocol", Some(goodbye(Reason::Protocol, what)))
}

fn deleted(node: &NodeIdentity) -> Refused {
    ("node_deleted", Some(goodbye(Reason::NodeDeleted, deleted_message(&node.name))))
}

/// Not now; spread out, so that a fleet does not come back as one.
fn later(result: &'static str, message: &str) -> Refused {
    let retry_after_ms = rand::rng().random_range(5_000..=15_000);
    let message = format!("{message}; nothing is lost, the node tries again by itself");
    (result, Some(Goodbye { retry_after_ms, ..goodbye(Reason::Overloaded, message) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The hub of an edge whose line takes so many bytes in each second, of those that wait: for how many seconds it lives. The edge itself
    /// says nothing.
    fn lives(mut waiting: usize, taken: impl Fn(u64) -> usize) -> u64 {
        let hello = Hello { protocol_min: 1, protocol_max: 1, ..Hello::default() };
        let (mut hub, _) = Hub::new(Duration::ZERO, &hello, 1, 0, "hub");
        let mut pace = Pace::default();
        for second in 1..600 {
            let keeps_up = waiting < FULL;
            pace.goes_on(keeps_up, waiting);
            waiting = waiting.saturating_sub(taken(second));
            let input = if !keeps_up && pace.look(waiting) { HubInput::Heard } else { HubInput::Timeout };
            if hub.step(Duration::from_secs(second), input).iter().any(|output| matches!(output, HubOutput::Close(_))) {
                return second;
            }
        }
        600
    }

    #[test]
    fn an_edge_that_takes_what_is_sent_lives_and_one_that_stops_does_not() {
        let slow = 1000;
        assert_eq!(
            lives(FULL - 1 + 100 * slow, |_| slow),
            100 + 28,
            "as long as it is full, and then nothing is heard of it"
        );
        assert_eq!(lives(FULL + 1000 * slow, |second| if second <= 50 { slow } else { 0 }), 50 + 28);
        assert_eq!(lives(FULL + slow, |_| 0), 28);
        assert_eq!(lives(FULL - 1, |_| slow), 28, "whoever is listened to has to be heard");
    }

    #[tokio::test]
    async fn nobody_waits_for_the_apiserver_when_cloudcore_goes_down() {
        let stop = CancellationToken::new();
        assert_eq!(asked(&stop, "anything", async { Ok(7) }).await, Ok(7));
        let source = kube::Error::LinesCodecMaxLineLengthExceeded;
        let failed = async { Err::<(), _>(BackendError { action: "ask".to_owned(), source }) };
        assert_eq!(asked(&stop, "anything", failed).await.unwrap_err().0, "unavailable");
        stop.cancel();
        assert_eq!(asked(&stop, "anything", std::future::pending::<Result<(), _>>()).await, Err(shutdown()));
    }

    #[test]
    fn who_lists_has_longer_to_catch_up() {
        let mut patience = Patience::new(Duration::ZERO);
        let late = Duration::from_secs(200);
        for _ in 1..COLLECTIONS.len() {
            patience.listed(late);
        }
        assert_eq!(patience.until, LIST);
        patience.listed(late);
        assert_eq!(patience.until, late + CATCH_UP);
    }
}
