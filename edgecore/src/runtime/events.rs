//! A stream of pods to look at, so that nobody has to ask the runtime every second.
//!
//! With containerd its own event stream (CRI of 1.6 has none), with another runtime CRI `GetContainerEvents`, and where there is
//! neither, a look at everything every few seconds. A wake is a hint and never a fact: whoever gets one asks the runtime. So what
//! is lost costs time, not truth, and what does not fit in the queue becomes one [`Wake::All`].

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use containerd_client::events::{ContainerDelete, TaskExit, TaskOom, TaskPaused, TaskStart};
use containerd_client::services::v1::SubscribeRequest;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::types::Envelope;
use futures_util::{FutureExt, Stream, StreamExt, stream};
use prost::Message;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::time::{Instant, sleep, sleep_until};
use tonic::transport::Channel;
use tracing::{debug, info, warn};

use super::connect::MAX_MESSAGE;
use super::cri::Cri;
use crate::supervise;

/// How many wakes may wait.
const QUEUE: usize = 256;
/// A look at everything although nothing was heard.
const SAFETY: Duration = Duration::from_secs(60);
/// The same where there are no events.
const POLL: Duration = Duration::from_secs(5);
/// A subscription is not acknowledged: what ended just before it took effect is found by looking again.
const SETTLE: Duration = Duration::from_secs(1);
/// First and last delay before asking an absent runtime again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How long a runtime may take to say its version.
const HELLO: Duration = Duration::from_secs(10);

/// Something may have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wake {
    /// In the pod of this UID.
    Pod(String),
    /// Anywhere.
    All,
    /// The runtime went away, or its stream broke, and why. Everything known of containers is in doubt until [`Wake::RuntimeUp`].
    RuntimeDown(String),
    /// The runtime answers (again): look at everything, it may be another one.
    RuntimeUp,
}

/// What a stream says: ids of containers or sandboxes, or of pods.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    /// Its process has ended.
    Ended(String),
    /// Something happened to it that matters whoever's it is.
    Changed(String),
    /// Something happened to it that only its pod cares for.
    Started(String),
    Pod {
        uid: String,
        container: String,
    },
}

type Events = Pin<Box<dyn Stream<Item = Result<Heard, String>> + Send>>;

/// Where hints come from.
enum Source {
    Events(Events),
    Poll,
}

/// Starts listening. The task ends when the receiver is dropped.
pub fn events(cri: Cri, channel: Channel) -> mpsc::Receiver<Wake> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let listener = Listener { cri, channel, queue: Queue { sender, lost: false, health: None }, up: None };
    let _detached = supervise::spawn("runtime-events", listener.run());
    receiver
}

struct Listener {
    cri: Cri,
    channel: Channel,
    queue: Queue,
    /// Whether it answered last; `None` before it was asked.
    up: Option<bool>,
}

impl Listener {
    async fn run(mut self) {
        let mut delay = BACKOFF.0;
        while !self.queue.sender.is_closed() {
            let since = Instant::now();
            let reason = self.session().await;
            if self.queue.sender.is_closed() {
                return;
            }
            self.cri.invalidate_all();
            let was_up = self.up == Some(true);
            if self.up != Some(false) {
                warn!(reason, "the container runtime is away");
                self.up = Some(false);
                self.queue.push(Wake::RuntimeDown(reason));
            }
            // A runtime that answers and breaks at once is asked no more often than one that is away.
            if was_up && since.elapsed() > BACKOFF.1 {
                delay = BACKOFF.0;
            }
            let wait = delay.mul_f64(rand::random_range(0.5..1.0));
            delay = (delay * 2).min(BACKOFF.1);
            self.queue.deliver_until(sleep(wait)).await;
        }
    }

    /// From the runtime's first answer to the end of its stream, and why it ended.
    async fn session(&mut self) -> String {
        let version = match tokio::time::timeout(HELLO, self.cri.version()).await {
            Ok(Ok(version)) => version,
            Ok(Err(error)) => return error.to_string(),
            Err(_) => return format!("the container runtime did not say its version within {} s", HELLO.as_secs()),
        };
        let mut source = if version.runtime_name == "containerd" {
            Source::Events(containerd(self.channel.clone()))
        } else {
            Source::Events(container_events(self.cri.clone()))
        };
        // Polled once, so that the subscription is on its way before everything is looked at.
        let mut first = match &mut source {
            Source::Events(events) => events.next().now_or_never(),
            Source::Poll => None,
        };
        info!(runtime = version.runtime_name, version = version.runtime_version, "the container runtime answers");
        self.up = Some(true);
        self.queue.push(Wake::RuntimeUp);
        self.queue.push(Wake::All);
        let mut look = Instant::now() + SETTLE;
        let receiver = self.queue.sender.clone();
        loop {
            let heard = if let Some(heard) = first.take() {
                heard
            } else {
                tokio::select! {
                    heard = next(&mut source) => heard,
                    () = self.queue.deliver() => continue,
                    () = receiver.closed() => return String::new(),
                    () = sleep_until(look) => {
                        self.queue.push(Wake::All);
                        look = Instant::now() + if matches!(source, Source::Poll) { POLL } else { SAFETY };
                        continue;
                    }
                }
            };
            match heard {
                Some(Ok(heard)) => self.heard(heard),
                Some(Err(reason)) if reason == UNIMPLEMENTED => {
                    info!("the container runtime has no events: it is asked every {} s", POLL.as_secs());
                    source = Source::Poll;
                    look = Instant::now() + POLL;
                }
                Some(Err(reason)) => return reason,
                None => return "the container runtime closed its event stream".to_owned(),
            }
        }
    }

    fn heard(&mut self, heard: Heard) {
        match heard {
            Heard::Ended(id) => {
                self.cri.note_end(&id);
                self.heard(Heard::Changed(id));
            }
            Heard::Changed(id) => {
                self.cri.invalidate(&id);
                let wake = self.cri.owner(&id).map_or(Wake::All, |uid| Wake::Pod(uid.to_string()));
                self.queue.push(wake);
            }
            Heard::Started(id) => {
                self.cri.invalidate(&id);
                // Unknown: whoever starts it is about to look anyway.
                if let Some(uid) = self.cri.owner(&id) {
                    self.queue.push(Wake::Pod(uid.to_string()));
                }
            }
            Heard::Pod { uid, container } => {
                self.cri.invalidate(&container);
                self.queue.push(Wake::Pod(uid));
            }
        }
    }
}

async fn next(source: &mut Source) -> Option<Result<Heard, String>> {
    match source {
        Source::Events(events) => events.next().await,
        Source::Poll => std::future::pending().await,
    }
}

/// The error of a stream that the runtime does not have.
const UNIMPLEMENTED: &str = "unimplemented";

fn reason(status: &tonic::Status) -> String {
    if status.code() == tonic::Code::Unimplemented {
        UNIMPLEMENTED.to_owned()
    } else {
        format!("its event stream ended: {}", status.message())
    }
}

/// containerd's events. The answer's headers come with the first event only, so waiting for them is part of the stream.
fn containerd(channel: Channel) -> Events {
    let mut client = EventsClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let topics = ["/tasks/exit", "/tasks/oom", "/tasks/start", "/tasks/paused", "/containers/delete"];
    let filters = topics.iter().map(|topic| format!("namespace==k8s.io,topic==\"{topic}\"")).collect();
    let subscribed = async move { client.subscribe(SubscribeRequest { filters }).await };
    let events = stream::once(subscribed).flat_map(|answer| match answer {
        Ok(answer) => answer.into_inner().left_stream(),
        Err(status) => stream::iter([Err(status)]).right_stream(),
    });
    Box::pin(events.filter_map(|event| {
        std::future::ready(match event {
            Ok(envelope) => decode(&envelope).map(Ok),
            Err(status) => Some(Err(reason(&status))),
        })
    }))
}

/// What an event of containerd means. The end of an exec is nobody's business: a probe makes one every few seconds.
fn decode(envelope: &Envelope) -> Option<Heard> {
    let value = envelope.event.as_ref()?.value.as_slice();
    match envelope.topic.as_str() {
        "/tasks/exit" => {
            let exit = TaskExit::decode(value).ok()?;
            (exit.id.is_empty() || exit.id == exit.container_id).then_some(Heard::Ended(exit.container_id))
        }
        "/tasks/oom" => Some(Heard::Changed(TaskOom::decode(value).ok()?.container_id)),
        "/tasks/paused" => Some(Heard::Changed(TaskPaused::decode(value).ok()?.container_id)),
        "/tasks/start" => Some(Heard::Started(TaskStart::decode(value).ok()?.container_id)),
        "/containers/delete" => Some(Heard::Started(ContainerDelete::decode(value).ok()?.id)),
        topic => {
            debug!(topic, "an event that was not asked for");
            None
        }
    }
}

/// The events of CRI.
fn container_events(cri: Cri) -> Events {
    let subscribed = async move { cri.container_events().await };
    let events = stream::once(subscribed).flat_map(|answer| match answer {
        Ok(events) => events.left_stream(),
        Err(super::Error::Refused { source, .. } | super::Error::Unreachable { source, .. }) => {
            stream::iter([Err(source)]).right_stream()
        }
        Err(error) => stream::iter([Err(tonic::Status::unknown(error.to_string()))]).right_stream(),
    });
    Box::pin(events.map(|event| match event {
        Ok(event) => {
            let sandbox = event.pod_sandbox_status.and_then(|status| status.metadata);
            Ok(match sandbox {
                Some(sandbox) if !sandbox.uid.is_empty() => {
                    Heard::Pod { uid: sandbox.uid, container: event.container_id }
                }
                _ => Heard::Changed(event.container_id),
            })
        }
        Err(status) => Err(reason(&status)),
    }))
}

/// The bounded way out. What does not fit is remembered as "everything", and of the runtime's state the newest.
struct Queue {
    sender: mpsc::Sender<Wake>,
    lost: bool,
    health: Option<Wake>,
}

impl Queue {
    fn push(&mut self, wake: Wake) {
        if self.owes() {
            return self.owe(wake);
        }
        if let Err(TrySendError::Full(wake)) = self.sender.try_send(wake) {
            self.owe(wake);
        }
    }

    fn owe(&mut self, wake: Wake) {
        match wake {
            Wake::RuntimeDown(_) | Wake::RuntimeUp => self.health = Some(wake),
            Wake::Pod(_) | Wake::All => self.lost = true,
        }
    }

    fn owes(&self) -> bool {
        self.lost || self.health.is_some()
    }

    /// Hands over one thing that is owed, when there is room; never returns while nothing is.
    async fn deliver(&mut self) {
        if !self.owes() {
            return std::future::pending().await;
        }
        let Ok(permit) = self.sender.reserve().await else { return std::future::pending().await };
        match self.health.take() {
            Some(wake) => permit.send(wake),
            None => {
                self.lost = false;
                permit.send(Wake::All);
            }
        }
    }

    /// Delivers until `end`.
    async fn deliver_until(&mut self, end: impl Future<Output = ()>) {
        tokio::pin!(end);
        let receiver = self.sender.clone();
        loop {
            tokio::select! {
                () = self.deliver() => {}
                () = receiver.closed() => return,
                () = &mut end => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use skerry_proto::cri;

    use super::*;
    use crate::kubelet::observed::label;
    use crate::runtime::connect;
    use crate::runtime::fake::{FakeRuntime, Script};

    fn envelope(topic: &str, event: &impl Message) -> Envelope {
        let mut envelope = Envelope { topic: topic.to_owned(), ..Default::default() };
        envelope.event.get_or_insert_default().value = event.encode_to_vec();
        envelope
    }

    #[test]
    fn the_end_of_an_exec_wakes_nobody() {
        let mut exit = TaskExit { container_id: "c".into(), id: "c".into(), ..Default::default() };
        assert_eq!(decode(&envelope("/tasks/exit", &exit)), Some(Heard::Ended("c".into())));
        exit.id = "exec-1".into();
        assert_eq!(decode(&envelope("/tasks/exit", &exit)), None);
    }

    #[tokio::test]
    async fn what_does_not_fit_becomes_one_look_at_everything() {
        let (sender, mut receiver) = mpsc::channel(2);
        let mut queue = Queue { sender, lost: false, health: None };
        for n in 0..5 {
            queue.push(Wake::Pod(n.to_string()));
        }
        queue.push(Wake::RuntimeDown("a".into()));
        queue.push(Wake::RuntimeUp);
        assert_eq!(receiver.recv().await, Some(Wake::Pod("0".into())));
        assert_eq!(receiver.recv().await, Some(Wake::Pod("1".into())));
        queue.deliver().await;
        queue.deliver().await;
        assert_eq!(receiver.recv().await, Some(Wake::RuntimeUp));
        assert_eq!(receiver.recv().await, Some(Wake::All));
        assert!(!queue.owes());
    }

    async fn until(receiver: &mut mpsc::Receiver<Wake>, wanted: &Wake) -> bool {
        while let Some(wake) = receiver.recv().await {
            if wake == *wanted {
                return true;
            }
        }
        false
    }

    #[tokio::test]
    async fn an_exit_wakes_its_pod_and_a_runtime_that_comes_back_is_noticed() -> Result<(), Box<dyn std::error::Error>>
    {
        let dir = tempfile::tempdir()?;
        let (endpoint, fake) = FakeRuntime::start(dir.path())?;
        fake.image("app:1", Script::default());
        let channel = connect::channel(&endpoint)?;
        let cri = Cri::new(channel.clone());
        let labels: HashMap<_, _> = [(label::POD_UID.to_owned(), "pod-a".to_owned())].into();
        let metadata = cri::PodSandboxMetadata { uid: "pod-a".into(), ..Default::default() };
        let sandbox = cri::PodSandboxConfig { metadata: Some(metadata), labels: labels.clone(), ..Default::default() };
        let image = Some(cri::ImageSpec { image: "app:1".into(), ..Default::default() });
        let config = cri::ContainerConfig { image, labels, ..Default::default() };
        let pod = cri.run_sandbox(sandbox.clone(), "").await?;
        let id = cri.create_container(&pod, config, sandbox).await?;
        cri.start_container(&id).await?;

        let mut receiver = events(cri, channel);
        assert_eq!(receiver.recv().await, Some(Wake::RuntimeUp));
        assert_eq!(receiver.recv().await, Some(Wake::All));
        // What ends before the subscription took effect is found by looking again, not by a wake of its own.
        while !fake.calls().contains(&"GetContainerEvents".to_owned()) {
            tokio::task::yield_now().await;
        }
        fake.exit(&id, 1, "Error");
        assert!(until(&mut receiver, &Wake::Pod("pod-a".into())).await);
        fake.stop();
        loop {
            if let Some(Wake::RuntimeDown(_)) = receiver.recv().await {
                break;
            }
        }
        fake.serve()?;
        assert!(until(&mut receiver, &Wake::RuntimeUp).await);
        assert!(until(&mut receiver, &Wake::All).await);
        Ok(())
    }
}
