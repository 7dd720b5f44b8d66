//! The control socket: how a technician at the box asks the running edgecore, with no cloud. One line of JSON each way; or HTTP, to ask
//! what a kubelet is asked ([`Ops`]). The first byte tells them apart.
//!
//! Only root can open it. Nothing in it is needed for pods to run.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::NodeStatus;
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use skerry_proto::sync::{Collection, Report};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::clock;
use crate::devices::mqtt;
use crate::identity::Identity;
use crate::link::{LinkState, Transport};
use crate::ops::Ops;
use crate::store::{Row, Stats, Store};
use crate::{order, supervise};

/// Kind of the notes in which the kubelet keeps each pod's last PodStatus, as JSON, by pod UID.
pub const POD_STATUS_NOTES: &str = "pod-status";

/// Bytes of an answer that are read and written.
const MAX_ANSWER: usize = 16 << 20;
/// Bytes of a request.
const MAX_REQUEST: u64 = 64 << 10;
/// Conversations at once; the next waits.
const MAX_CONVERSATIONS: usize = 8;
/// How long a silent client may hold its place.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the kubelet may take to end every pod.
const RESET_TIMEOUT: Duration = Duration::from_secs(120);

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Request {
    /// A [`Status`].
    Status,
    /// Objects, as an array.
    Get {
        /// Which.
        what: What,
        /// Only of this namespace.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        namespace: Option<String>,
    },
    /// The events about an object that the cloud does not have yet, as an array; the last one is the newest.
    Events {
        /// Of the object.
        uid: String,
    },
    /// Ends every pod and starts none any more.
    ResetPrepare,
}

/// What can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// Pods, with the status as this node knows it.
    Pods,
    /// This node, with the status as it knows it itself.
    Nodes,
    /// ConfigMaps that pods here use.
    ConfigMaps,
}

impl What {
    /// Where the store keeps it.
    pub fn collection(self) -> Collection {
        match self {
            Self::Pods => Collection::Pods,
            Self::Nodes => Collection::Node,
            Self::ConfigMaps => Collection::ConfigMaps,
        }
    }
}

/// What was answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Response {
    Ok(Value),
    Error(String),
}

/// How a node is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Node name.
    pub node: String,
    /// Where cloudcore is.
    pub server: String,
    /// edgecore's version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// The link.
    pub link: LinkStatus,
    /// The store.
    pub store: Stats,
    /// Pods by what they do.
    pub pods: Pods,
    /// When the certificate ends, seconds since the Unix epoch; `None` without a usable one.
    pub certificate_expires: Option<i64>,
    /// MQTT.
    #[serde(default)]
    pub mqtt: mqtt::Status,
}

/// [`LinkState`] on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
#[allow(missing_docs, reason = "fields are named as what they show")]
pub enum LinkStatus {
    Connecting { attempt: u32, last_error: Option<String> },
    Online { since: i64, epoch: u64, transport: Transport },
    Offline { since: i64, reason: String },
    Deleted { message: String },
}

impl From<&LinkState> for LinkStatus {
    fn from(state: &LinkState) -> Self {
        match state.clone() {
            LinkState::Connecting { attempt, last_error } => Self::Connecting { attempt, last_error },
            LinkState::Online { since, epoch, transport } => {
                Self::Online { since: since.as_second(), epoch, transport }
            }
            LinkState::Offline { since, reason } => Self::Offline { since: since.as_second(), reason },
            LinkState::Deleted { message } => Self::Deleted { message },
        }
    }
}

/// How many pods there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pods {
    /// Wanted here.
    pub total: u64,
    /// Of phase Running.
    pub running: u64,
    /// With condition Ready.
    pub ready: u64,
}

/// Asks the kubelet to end every pod and start none; it answers when that is done.
pub type ResetRequest = oneshot::Sender<Result<(), String>>;

/// What the server answers from.
#[derive(Clone)]
pub struct Control {
    /// Node name.
    pub node: String,
    /// Where cloudcore is.
    pub server: String,
    /// The store.
    pub store: Store,
    /// The link.
    pub link: watch::Receiver<LinkState>,
    /// How the node fares, once that is known.
    pub status: watch::Receiver<Option<NodeStatus>>,
    /// The certificate, if there is a usable one.
    pub identity: Option<watch::Receiver<Arc<Identity>>>,
    /// Served by the kubelet.
    pub reset: mpsc::Sender<ResetRequest>,
    /// What answers as a kubelet.
    pub ops: Ops,
    /// How MQTT is.
    pub mqtt: watch::Receiver<mqtt::Status>,
}

/// Makes the socket. The lock on the data directory says that nobody else serves it.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    crate::files::remove(path)?;
    // Not afterwards: there must be no moment at which others could connect.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

/// Serves until the shutdown.
pub async fn serve(listener: Arc<UnixListener>, control: Control, shutdown: CancellationToken) {
    let room = Arc::new(Semaphore::new(MAX_CONVERSATIONS));
    loop {
        let accepted = async {
            let place = Arc::clone(&room).acquire_owned().await.ok()?;
            Some((place, listener.accept().await))
        };
        let (place, accepted) = tokio::select! {
            () = shutdown.cancelled() => return,
            Some(accepted) = accepted => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let control = control.clone();
                supervise::spawn("control", async move {
                    let mut stream = BufReader::with_capacity(1 << 10, stream);
                    match tokio::time::timeout(REQUEST_TIMEOUT, stream.fill_buf()).await {
                        Ok(Ok(&[first, ..])) if first.is_ascii_uppercase() => {
                            // It may take long, and counts where such requests are counted.
                            drop(place);
                            control.ops.local(stream).await;
                        }
                        Ok(Ok([_, ..])) => {
                            // The other side is gone: nobody to tell.
                            let _ = converse(stream, &control).await;
                        }
                        _ => {}
                    }
                });
            }
            Err(error) => {
                warn!(%error, "the control socket takes no connection");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn converse(mut stream: BufReader<UnixStream>, control: &Control) -> io::Result<()> {
    let mut line = Vec::new();
    let mut reader = (&mut stream).take(MAX_REQUEST);
    tokio::time::timeout(REQUEST_TIMEOUT, reader.read_until(b'\n', &mut line)).await??;
    let response = match serde_json::from_slice(&line) {
        Ok(request) => control.answer(request).await,
        Err(error) => {
            Response::Error(format!("not a request: {error}; the edgecore that asks and the one that runs may differ"))
        }
    };
    let mut text = serde_json::to_vec(&response)?;
    if text.len() >= MAX_ANSWER {
        text =
            serde_json::to_vec(&Response::Error("the answer is too long; ask for one namespace with -n".to_owned()))?;
    }
    text.push(b'\n');
    stream.write_all(&text).await
}

impl Control {
    async fn answer(&self, request: Request) -> Response {
        let result = match request {
            Request::Status => self.status().await.and_then(|status| serde_json::to_value(status).map_err(text)),
            Request::Get { what, namespace } => self.get(what, namespace.as_deref()).await.map(Value::Array),
            Request::Events { uid } => {
                self.store.events(&uid).await.map(|reports| Value::Array(events(&reports))).map_err(text)
            }
            Request::ResetPrepare => self.prepare_reset().await.map(|()| Value::Null),
        };
        result.map_or_else(Response::Error, Response::Ok)
    }

    async fn status(&self) -> Result<Status, String> {
        let pods = self.get(What::Pods, None).await?;
        let store = self.store.stats().await.map_err(text)?;
        Ok(Status {
            node: self.node.clone(),
            server: self.server.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            link: (&*self.link.borrow()).into(),
            store,
            pods: count(&pods),
            certificate_expires: self.identity.as_ref().map(|identity| identity.borrow().not_after.as_second()),
            mqtt: self.mqtt.borrow().clone(),
        })
    }

    async fn get(&self, what: What, namespace: Option<&str>) -> Result<Vec<Value>, String> {
        let rows = self.store.list(what.collection()).await.map_err(text)?;
        let notes = match what {
            What::Pods => self.store.notes(POD_STATUS_NOTES).await.map_err(text)?,
            What::Nodes | What::ConfigMaps => Vec::new(),
        };
        let mut objects = objects(&rows, &notes, namespace);
        if what == What::Nodes
            && let Some(status) = self.status.borrow().as_ref().and_then(|status| serde_json::to_value(status).ok())
        {
            for fields in objects.iter_mut().filter_map(Value::as_object_mut) {
                fields.insert("status".to_owned(), status.clone());
            }
        }
        Ok(objects)
    }

    async fn prepare_reset(&self) -> Result<(), String> {
        let (done, answered) = oneshot::channel();
        self.reset.try_send(done).map_err(|_| "the kubelet takes no requests now".to_owned())?;
        match tokio::time::timeout(RESET_TIMEOUT, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err("the kubelet dropped the request".to_owned()),
            Err(_) => Err(format!("the pods did not end within {} s", RESET_TIMEOUT.as_secs())),
        }
    }
}

/// The objects of rows, pods with the status that this node noted last.
pub fn objects(rows: &[Row], notes: &[(String, Bytes)], namespace: Option<&str>) -> Vec<Value> {
    let wanted = |row: &&Row| {
        namespace.is_none_or(|namespace| row.entry.key.split_once('/').is_some_and(|(of, _)| of == namespace))
    };
    let mut rows: Vec<&Row> = rows.iter().filter(wanted).collect();
    order::sort_by(&mut rows, |a, b| a.entry.cmp(&b.entry));
    rows.into_iter()
        .filter_map(|row| {
            let mut object: Value = serde_json::from_slice(&row.json).ok()?;
            let note = notes.iter().find(|(uid, _)| *uid == row.entry.uid);
            if let Some(status) = note.and_then(|(_, status)| serde_json::from_slice(status).ok())
                && let Some(fields) = object.as_object_mut()
            {
                fields.insert("status".to_owned(), status);
            }
            Some(object)
        })
        .collect()
}

/// The Events that reports carry.
pub fn events(reports: &[Report]) -> Vec<Value> {
    reports.iter().filter_map(|report| serde_json::from_slice(&report.payload).ok()).collect()
}

/// Counts pods by their status.
pub fn count(pods: &[Value]) -> Pods {
    let is_ready = |pod: &&Value| {
        let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
        conditions.into_iter().flatten().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
    };
    Pods {
        total: pods.len() as u64,
        running: pods.iter().filter(|pod| pod["status"]["phase"] == "Running").count() as u64,
        ready: pods.iter().filter(is_ready).count() as u64,
    }
}

/// Why the running edgecore did not answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody serves the socket.
    #[error("edgecore is not running (nobody serves {0}); start it with `systemctl start edgecore` or `edgecore run`")]
    NotRunning(PathBuf),
    /// It answered that it cannot.
    #[error("{0}")]
    Refused(String),
    /// Anything else.
    #[error("no answer on {path}: {cause}")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// Why.
        cause: String,
    },
}

/// Asks the edgecore that serves a socket.
pub async fn ask<T: serde::de::DeserializeOwned>(path: &Path, request: &Request) -> Result<T, AskError> {
    let broken = |cause: String| AskError::Broken { path: path.to_owned(), cause };
    let mut stream = UnixStream::connect(path).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => AskError::NotRunning(path.to_owned()),
        _ => broken(error.to_string()),
    })?;
    let talk = async {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        (&mut stream).take(MAX_ANSWER as u64 + 1).read_to_end(&mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    let patience = if *request == Request::ResetPrepare { RESET_TIMEOUT + REQUEST_TIMEOUT } else { REQUEST_TIMEOUT };
    let answer = tokio::time::timeout(patience, talk)
        .await
        .map_err(|_| broken(format!("nothing within {} s", patience.as_secs())))?
        .map_err(|error| broken(error.to_string()))?;
    match serde_json::from_slice(&answer).map_err(|error| broken(error.to_string()))? {
        Response::Ok(value) => serde_json::from_value(value).map_err(|error| broken(error.to_string())),
        Response::Error(cause) => Err(AskError::Refused(cause)),
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A span of time in kubectl's habit: `45s`, `3m10s`, `7h`, `12d`.
pub fn age(since: Timestamp, now: Timestamp) -> String {
    let seconds = (now.as_second() - since.as_second()).max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 if seconds % 60 > 0 => format!("{minutes}m{}s", seconds % 60),
        120..10_800 => format!("{minutes}m"),
        10_800..28_800 if minutes % 60 > 0 => format!("{hours}h{}m", minutes % 60),
        10_800..172_800 => format!("{hours}h"),
        172_800..691_200 if hours % 24 > 0 => format!("{days}d{}h", hours % 24),
        _ if days < 730 => format!("{days}d"),
        _ => format!("{}y{}d", days / 365, days % 365),
    }
}

/// [`age`] until now.
pub fn age_now(since: Timestamp) -> String {
    age(since, clock::wall())
}

#[cfg(test)]
mod tests {
    use skerry_proto::sync::{Object, Op, ReportKind};

    use super::*;

    #[test]
    fn ages_read_as_kubectl_writes_them() {
        let at = |seconds| age(Timestamp::UNIX_EPOCH, Timestamp::from_second(seconds).unwrap());
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (190, "3m10s"),
            (660, "11m"),
            (11_000, "3h3m"),
            (90_000, "25h"),
            (200_000, "2d7h"),
            (900_000, "10d"),
        ] {
            assert_eq!(at(seconds), text, "{seconds}");
        }
    }

    #[tokio::test]
    async fn a_client_is_answered_from_the_store_and_a_bad_line_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Timestamp::UNIX_EPOCH).unwrap();
        let pod = br#"{"metadata":{"name":"a","namespace":"default","uid":"u1"}}"#;
        let object = Object::new(Collection::Pods, "default/a".to_owned(), "u1".to_owned(), pod);
        let node = br#"{"metadata":{"name":"box","uid":"u0"}}"#;
        let node = Object::new(Collection::Node, "box".to_owned(), "u0".to_owned(), node);
        store.apply(vec![Op::Upsert(object), Op::Upsert(node)]).await.unwrap();
        let status = r#"{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}"#;
        store.remember(POD_STATUS_NOTES, "u1", Bytes::from(status)).await.unwrap();
        let event = Report {
            id: 0,
            kind: ReportKind::Event,
            namespace: "default".to_owned(),
            name: "a.1".to_owned(),
            uid: "u1".to_owned(),
            payload: Bytes::from(r#"{"reason":"Started"}"#),
        };
        store.report(event).await.unwrap();
        let identity = crate::identity::tests::identity("box", dir.path());
        let (reset, mut resets) = mpsc::channel(1);
        let link = LinkState::Offline { since: Timestamp::UNIX_EPOCH, reason: "no route".to_owned() };
        let config = Arc::new(crate::config::Config::new(&"h:1".parse().unwrap(), "box"));
        let channel = crate::runtime::connect::channel(&config.runtime_endpoint).unwrap();
        let control = Control {
            node: "box".to_owned(),
            server: "h:1".to_owned(),
            ops: Ops::new(store.clone(), config, channel, watch::channel(None).1),
            store,
            link: watch::channel(link).1,
            status: watch::channel(Some(NodeStatus { phase: Some("Here".to_owned()), ..NodeStatus::default() })).1,
            identity: Some(watch::channel(Arc::new(identity)).1),
            reset,
            mqtt: watch::channel(mqtt::Status::default()).1,
        };
        let path = dir.path().join("sock");
        assert!(matches!(ask::<Value>(&path, &Request::Status).await, Err(AskError::NotRunning(_))));
        let listener = Arc::new(bind(&path).unwrap());
        let shutdown = CancellationToken::new();
        let server = supervise::spawn("server", serve(listener, control, shutdown.clone()));
        let status: Status = ask(&path, &Request::Status).await.unwrap();
        assert_eq!(status.pods, Pods { total: 1, running: 1, ready: 1 });
        assert_eq!(status.link, LinkStatus::Offline { since: 0, reason: "no route".to_owned() });
        let get = |namespace: &str| Request::Get { what: What::Pods, namespace: Some(namespace.to_owned()) };
        assert_eq!(ask::<Vec<Value>>(&path, &get("default")).await.unwrap()[0]["status"]["phase"], "Running");
        assert!(ask::<Vec<Value>>(&path, &get("other")).await.unwrap().is_empty());
        let nodes: Vec<Value> = ask(&path, &Request::Get { what: What::Nodes, namespace: None }).await.unwrap();
        assert_eq!((nodes.len(), &nodes[0]["status"]["phase"]), (1, &"Here".into()));
        let events = |uid: &str| Request::Events { uid: uid.to_owned() };
        assert_eq!(ask::<Vec<Value>>(&path, &events("u1")).await.unwrap()[0]["reason"], "Started");
        assert!(ask::<Vec<Value>>(&path, &events("u2")).await.unwrap().is_empty());
        let (prepared, ()) = tokio::join!(ask::<Value>(&path, &Request::ResetPrepare), async {
            resets.recv().await.unwrap().send(Err("a pod does not end".to_owned())).unwrap();
        });
        assert_eq!(prepared.unwrap_err().to_string(), "a pod does not end");
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.write_all(b"{\"do\":\"dance\"}\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains("not a request"), "{answer}");
        shutdown.cancel();
        server.await.unwrap();
    }
}
