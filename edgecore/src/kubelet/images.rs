//! Sees to it that a container's image is on the box: names, pull policy, credentials, one pull at a time.
//!
//! Identical pulls are one pull; it is cancelled when the last one who waits for it goes away. An image that must always be pulled
//! starts from the copy on the box when the registry cannot be reached: without a link the pod would otherwise not come back. While
//! the box is offline the copy does not wait for long, and a registry that could not be reached is left alone for a minute, so that
//! pods do not queue up behind pulls that cannot succeed. Online a pull may take as long as it takes.

mod credentials;
mod reference;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use skerry_proto::cri;
use tokio::sync::{Semaphore, watch};
use tonic::Code;

use super::references::PodEvent;
use crate::clock;
use crate::link::LinkState;
use crate::runtime::Cri;
use crate::runtime::cri::Error;

pub use credentials::{credentials, usable_secret};
pub(crate) use reference::canonical;
pub use reference::{Invalid, normalize, repository};

/// How long a pull may take on a box that is offline and has a copy.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a registry is left alone, for images with a copy on the box, after it could not be reached.
const LEFT_ALONE: Duration = Duration::from_secs(60);

/// When to pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullPolicy {
    /// Each time a container starts.
    Always,
    /// When it is not there.
    IfNotPresent,
    /// By no means.
    Never,
}

impl PullPolicy {
    /// As the container says; what it leaves out depends on the tag.
    pub fn of(given: Option<&str>, image: &str) -> Self {
        match given {
            Some("Always") => Self::Always,
            Some("Never") => Self::Never,
            Some("IfNotPresent") => Self::IfNotPresent,
            _ if normalize(image).is_ok_and(|image| image.ends_with(":latest")) => Self::Always,
            _ => Self::IfNotPresent,
        }
    }
}

/// What the policy comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Take what is there.
    Use,
    /// Pull.
    Pull,
    /// It is not there and may not be pulled.
    Refuse,
}

/// Decides by the policy and by whether the image is on the box.
pub fn decide(policy: PullPolicy, present: bool) -> Decision {
    match (policy, present) {
        (PullPolicy::Always, _) | (PullPolicy::IfNotPresent, false) => Decision::Pull,
        (PullPolicy::IfNotPresent | PullPolicy::Never, true) => Decision::Use,
        (PullPolicy::Never, false) => Decision::Refuse,
    }
}

/// An image that a container wants.
#[derive(Clone, Debug)]
pub struct Want<'a> {
    /// As the spec writes it.
    pub image: &'a str,
    /// When to pull.
    pub policy: PullPolicy,
    /// [`credentials`] for it; empty: anonymous.
    pub credentials: Vec<cri::AuthConfig>,
    /// Of the sandbox it is for.
    pub sandbox: Option<&'a cri::PodSandboxConfig>,
    /// CRI runtime handler.
    pub handler: &'a str,
    /// For events.
    pub field_path: Option<&'a str>,
}

/// An image on the box.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// For `ContainerConfig.image.image`.
    pub id: String,
    /// For `user_specified_image`.
    pub user_specified: String,
    /// The user it runs as, when that is a number: what `runAsNonRoot` asks for.
    pub uid: Option<i64>,
    /// The user it runs as, when that is a name.
    pub username: String,
    /// In bytes.
    pub size: u64,
}

/// Why a container does not get its image: the reason and message of its waiting state, and the events that say so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// InvalidImageName, ErrImageNeverPull, ImageInspectError, ErrImagePull, RegistryUnavailable, SignatureValidationFailed.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// What was found before pulling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// On the box, and it may be used.
    Ready(Image),
    /// To be pulled. With `Always`, what is on the box.
    Absent(Option<Image>),
}

type Pulled = Result<(String, Duration), Arc<Vec<Error>>>;
type Flight = Shared<BoxFuture<'static, Pulled>>;

/// A handle; a clone shares the queue of pulls.
#[derive(Clone, Debug)]
pub struct Images {
    cri: Cri,
    turn: Arc<Semaphore>,
    flights: Arc<Mutex<HashMap<Key, WeakShared<BoxFuture<'static, Pulled>>>>>,
    link: watch::Receiver<LinkState>,
    /// When each registry was last found to be out of reach (monotonic).
    unreachable: Arc<Mutex<HashMap<String, Duration>>>,
    patience: Duration,
}

/// Pulls with the same key are one pull.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    image: String,
    handler: String,
    credentials: Vec<(String, String, String, String)>,
}

impl Images {
    /// Pulls go through this runtime, one at a time.
    pub fn new(cri: Cri, link: watch::Receiver<LinkState>) -> Self {
        let turn = Arc::new(Semaphore::new(1));
        Self { cri, turn, flights: Arc::default(), link, unreachable: Arc::default(), patience: PATIENCE }
    }

    /// Whether the image is on the box.
    pub async fn is_at_hand(&self, image: &str) -> bool {
        let Ok(image) = normalize(image) else { return false };
        let spec = cri::ImageSpec { image, ..cri::ImageSpec::default() };
        self.cri.image_status(spec).await.is_ok_and(|found| found.is_some())
    }

    /// Looks whether the image is there and whether it has to be pulled, which is [`Self::pull`].
    pub async fn find(&self, want: &Want<'_>, events: &mut Vec<PodEvent>) -> Result<Found, Failure> {
        let name = match normalize(want.image) {
            Ok(name) => name,
            Err(error) => {
                let message = format!("Failed to apply default image tag {:?}: {error}", want.image);
                events.push(warning("InspectFailed", message.clone(), want.field_path));
                return Err(Failure { reason: "InvalidImageName", message });
            }
        };
        let present = match self.cri.image_status(spec(want, &name)).await {
            Ok(image) => image.map(|image| found(want, image)),
            Err(error) => {
                let message = format!("Failed to inspect image {name:?}: {error}");
                events.push(warning("InspectFailed", message.clone(), want.field_path));
                return Err(Failure { reason: "ImageInspectError", message });
            }
        };
        match (decide(want.policy, present.is_some()), present) {
            (Decision::Use, Some(image)) => {
                events.push(already_present(want.image, want.field_path));
                Ok(Found::Ready(image))
            }
            (Decision::Refuse, _) => {
                let event = never_pull(want.image, want.field_path);
                let message = event.message.clone();
                events.push(event);
                Err(Failure { reason: "ErrImageNeverPull", message })
            }
            (Decision::Pull | Decision::Use, present) => Ok(Found::Absent(present)),
        }
    }

    /// Pulls. `present` is what [`Self::find`] found; it serves when the registry cannot be reached. Events are told as they happen.
    pub async fn pull(
        &self,
        want: &Want<'_>,
        present: Option<Image>,
        mut event: impl FnMut(PodEvent),
    ) -> Result<Image, Failure> {
        let name = normalize(want.image)
            .map_err(|error| Failure { reason: "InvalidImageName", message: error.to_string() })?;
        let asked = clock::monotonic();
        let registry = registry(&name);
        let copy = |cause: &str| {
            let message = format!("Failed to pull image {:?}, the copy on the machine is used: {cause}", want.image);
            warning("Failed", message, want.field_path)
        };
        if let Some(present) = &present
            && self.is_left_alone(&registry, asked)
        {
            event(copy(&format!("{registry} could not be reached a moment ago")));
            return Ok(present.clone());
        }
        event(pulling(want.image, want.field_path));
        let is_online = matches!(*self.link.borrow(), LinkState::Online { .. });
        let mut flight = self.flight(want, &name);
        let pulled = match &present {
            Some(present) if !is_online => match tokio::time::timeout(self.patience, &mut flight).await {
                Ok(pulled) => pulled,
                Err(_) => {
                    self.leave_alone(registry);
                    event(copy(&format!("the box is offline and nothing came within {:?}", self.patience)));
                    return Ok(present.clone());
                }
            },
            Some(_) | None => flight.await,
        };
        let errors = match pulled {
            Ok((reference, took)) => {
                self.lock_unreachable().remove(&registry);
                let pulled = cri::ImageSpec { image: reference.clone(), ..spec(want, &name) };
                let cause = match self.cri.image_status(pulled).await {
                    Ok(Some(image)) => Ok(found(want, image)),
                    Ok(None) => Err(format!("{reference} was pulled and is not there")),
                    Err(error) => Err(error.to_string()),
                };
                // Without its status nobody knows as which user it runs. The next try finds it on the box.
                let image = match cause {
                    Ok(image) => image,
                    Err(cause) => {
                        let message = format!("Failed to inspect image {name:?}: {cause}");
                        event(warning("InspectFailed", message.clone(), want.field_path));
                        return Err(Failure { reason: "ImageInspectError", message });
                    }
                };
                let waited = clock::monotonic().saturating_sub(asked).max(took);
                event(pulled_in(want.image, took, waited, image.size, want.field_path));
                return Ok(image);
            }
            Err(errors) => errors,
        };
        let text = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        if errors.iter().all(|error| !is_verdict(error)) {
            self.leave_alone(registry);
            if let Some(present) = present {
                event(copy(&text));
                return Ok(present);
            }
        }
        let reason = failure_reason(&text);
        event(warning("Failed", format!("Failed to pull image {:?}: {text}", want.image), want.field_path));
        event(failed(reason, want.field_path));
        Err(Failure { reason, message: text })
    }

    fn is_left_alone(&self, registry: &str, now: Duration) -> bool {
        self.lock_unreachable().get(registry).is_some_and(|at| now.saturating_sub(*at) < LEFT_ALONE)
    }

    fn leave_alone(&self, registry: String) {
        let now = clock::monotonic();
        let mut unreachable = self.lock_unreachable();
        unreachable.retain(|_, at| now.saturating_sub(*at) < LEFT_ALONE);
        unreachable.insert(registry, now);
    }

    fn lock_unreachable(&self) -> MutexGuard<'_, HashMap<String, Duration>> {
        self.unreachable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pull that is under way for this, or a new one.
    fn flight(&self, want: &Want<'_>, name: &str) -> Flight {
        let secret = |auth: &cri::AuthConfig| {
            (auth.username.clone(), auth.password.clone(), auth.identity_token.clone(), auth.registry_token.clone())
        };
        let key = Key {
            image: name.to_owned(),
            handler: want.handler.to_owned(),
            credentials: want.credentials.iter().map(secret).collect(),
        };
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        flights.retain(|_, flight| flight.upgrade().is_some_and(|flight| flight.peek().is_none()));
        if let Some(flight) = flights.get(&key).and_then(WeakShared::upgrade) {
            return flight;
        }
        let (cri, turn) = (self.cri.clone(), Arc::clone(&self.turn));
        let (spec, sandbox) = (spec(want, name), want.sandbox.cloned());
        let credentials = want.credentials.clone();
        let flight = async move {
            // Never closed; if it were, two pulls at a time would do no harm.
            let _turn = turn.acquire().await;
            let began = clock::monotonic();
            let mut attempts: Vec<Option<cri::AuthConfig>> = credentials.into_iter().map(Some).collect();
            if attempts.is_empty() {
                attempts.push(None);
            }
            let mut errors = Vec::new();
            for auth in attempts {
                match cri.pull_image(spec.clone(), auth, sandbox.clone()).await {
                    Ok(reference) => return Ok((reference, clock::monotonic().saturating_sub(began))),
                    Err(error) => errors.push(error),
                }
            }
            Err(Arc::new(errors))
        };
        let flight = flight.boxed().shared();
        if let Some(weak) = flight.downgrade() {
            flights.insert(key, weak);
        }
        flight
    }
}

/// Event: the image is there.
pub fn already_present(image: &str, field_path: Option<&str>) -> PodEvent {
    let message = format!("Container image {image:?} already present on machine and can be accessed by the pod");
    normal("Pulled", message, field_path)
}

/// Event: the image is not there and must not be pulled.
pub fn never_pull(image: &str, field_path: Option<&str>) -> PodEvent {
    warning(
        "ErrImageNeverPull",
        format!("Container image {image:?} is not present with pull policy of Never"),
        field_path,
    )
}

/// Event: a pull begins.
pub fn pulling(image: &str, field_path: Option<&str>) -> PodEvent {
    normal("Pulling", format!("Pulling image {image:?}"), field_path)
}

/// Event: a pull ended well.
pub fn pulled_in(image: &str, took: Duration, waited: Duration, size: u64, field_path: Option<&str>) -> PodEvent {
    let (took, waited) = (go_duration(took), go_duration(waited));
    let message = format!(
        "Successfully pulled image {image:?} in {took} ({waited} including waiting). Image size: {size} bytes."
    );
    normal("Pulled", message, field_path)
}

/// Event: a container could not be started for a reason of its waiting state.
pub fn failed(reason: &str, field_path: Option<&str>) -> PodEvent {
    warning("Failed", format!("Error: {reason}"), field_path)
}

/// Event: a secret that the pod names is not there or of no use.
pub fn secret_missing(names: &[String]) -> PodEvent {
    let message = format!(
        "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
        names.join(", ")
    );
    warning("FailedToRetrieveImagePullSecret", message, None)
}

fn normal(reason: &'static str, message: String, field_path: Option<&str>) -> PodEvent {
    PodEvent { warning: false, reason, message, field_path: field_path.map(str::to_owned) }
}

fn warning(reason: &'static str, message: String, field_path: Option<&str>) -> PodEvent {
    PodEvent { warning: true, reason, message, field_path: field_path.map(str::to_owned) }
}

fn spec(want: &Want<'_>, name: &str) -> cri::ImageSpec {
    cri::ImageSpec {
        image: name.to_owned(),
        user_specified_image: want.image.to_owned(),
        runtime_handler: want.handler.to_owned(),
        ..Default::default()
    }
}

fn found(want: &Want<'_>, image: cri::Image) -> Image {
    Image {
        id: image.id,
        user_specified: want.image.to_owned(),
        uid: image.uid.map(|uid| uid.value),
        username: image.username,
        size: image.size,
    }
}

/// The host (and port) an image comes from.
fn registry(name: &str) -> String {
    let repository = repository(name).unwrap_or_default();
    repository.split('/').next().unwrap_or_default().to_owned()
}

fn failure_reason(text: &str) -> &'static str {
    ["RegistryUnavailable", "SignatureValidationFailed"]
        .into_iter()
        .find(|reason| text.starts_with(reason))
        .unwrap_or("ErrImagePull")
}

/// The registry was asked and said no. Everything else is a registry, a name server or a link that is not there.
fn is_verdict(error: &Error) -> bool {
    let Error::Refused { source, .. } = error else { return false };
    let text = source.message().to_lowercase();
    let words =
        ["unauthorized", "authorization failed", "forbidden", "denied", "not found", "signaturevalidationfailed"];
    matches!(source.code(), Code::NotFound | Code::PermissionDenied | Code::Unauthenticated | Code::InvalidArgument)
        || words.iter().any(|word| text.contains(word)) && !text.contains("no such host")
}

/// As Go prints a duration cut to milliseconds: `345ms`, `1.2s`, `1m2.5s`.
fn go_duration(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    if milliseconds < 1000 {
        return if milliseconds == 0 { "0s".to_owned() } else { format!("{milliseconds}ms") };
    }
    let (seconds, rest) = (milliseconds / 1000, milliseconds % 1000);
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let fraction = format!("{seconds}.{rest:03}");
    let seconds = fraction.trim_end_matches('0').trim_end_matches('.');
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests;
