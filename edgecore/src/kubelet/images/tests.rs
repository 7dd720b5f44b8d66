use skerry_proto::cri::AuthConfig;
use tonic::Status;

use super::*;
use crate::link::Transport;
use crate::runtime::connect;
use crate::runtime::fake::{FakeRuntime, Script};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn start() -> Result<(tempfile::TempDir, FakeRuntime, Images), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let (endpoint, fake) = FakeRuntime::start(dir.path())?;
    Ok((dir, fake, Images::new(Cri::new(connect::channel(&endpoint)?), link(true))))
}

fn link(online: bool) -> watch::Receiver<LinkState> {
    let since = jiff::Timestamp::UNIX_EPOCH;
    let offline = LinkState::Offline { since, reason: String::new() };
    watch::channel(if online { LinkState::Online { since, epoch: 1, transport: Transport::Quic } } else { offline }).1
}

fn want(image: &str, policy: PullPolicy) -> Want<'_> {
    Want { image, policy, credentials: Vec::new(), sandbox: None, handler: "", field_path: Some("spec.containers{c}") }
}

fn texts(events: &[PodEvent]) -> Vec<String> {
    events.iter().map(|event| format!("{} {}", event.reason, event.message)).collect()
}

#[test]
fn policies() {
    assert_eq!(PullPolicy::of(None, "a"), PullPolicy::Always);
    assert_eq!(PullPolicy::of(None, "a:1"), PullPolicy::IfNotPresent);
    assert_eq!(PullPolicy::of(Some("Never"), "a"), PullPolicy::Never);
    assert_eq!(decide(PullPolicy::Always, true), Decision::Pull);
    assert_eq!(decide(PullPolicy::IfNotPresent, true), Decision::Use);
    assert_eq!(decide(PullPolicy::Never, false), Decision::Refuse);
}

#[test]
fn durations_as_go_prints_them() {
    for (milliseconds, text) in
        [(0, "0s"), (345, "345ms"), (1200, "1.2s"), (2000, "2s"), (62_500, "1m2.5s"), (3_600_000, "1h0m0s")]
    {
        assert_eq!(go_duration(Duration::from_millis(milliseconds)), text);
    }
}

#[tokio::test]
async fn what_is_there_is_used_and_what_must_not_be_pulled_is_refused() -> Outcome {
    let (_dir, fake, images) = start()?;
    fake.image("app:1", Script::default());
    let mut events = Vec::new();
    let Found::Ready(image) =
        images.find(&want("app:1", PullPolicy::IfNotPresent), &mut events).await.map_err(|failure| failure.message)?
    else {
        return Err("it is not there".into());
    };
    assert!(image.id.starts_with("sha256:"));
    let failure = images.find(&want("none:1", PullPolicy::Never), &mut events).await;
    assert_eq!(failure.err().map(|failure| failure.reason), Some("ErrImageNeverPull"));
    let failure = images.find(&want("NO:such image", PullPolicy::Never), &mut events).await;
    assert_eq!(failure.err().map(|failure| failure.reason), Some("InvalidImageName"));
    assert_eq!(
        texts(&events)[..2],
        [
            "Pulled Container image \"app:1\" already present on machine and can be accessed by the pod",
            "ErrImageNeverPull Container image \"none:1\" is not present with pull policy of Never",
        ]
    );
    Ok(())
}

#[tokio::test]
async fn identical_pulls_are_one_and_credentials_are_tried_in_turn() -> Outcome {
    let (_dir, fake, images) = start()?;
    fake.registry("app:1", 4321);
    fake.fail("PullImage", Status::unknown("401 unauthorized"));
    let user = |name: &str| AuthConfig { username: name.into(), ..Default::default() };
    let wanted = Want { credentials: vec![user("a"), user("b")], ..want("app:1", PullPolicy::IfNotPresent) };
    let mut events = Vec::new();
    let (one, other) =
        tokio::join!(images.pull(&wanted, None, |event| events.push(event)), images.pull(&wanted, None, |_| ()));
    assert_eq!(one, other);
    let users: Vec<_> = fake.auths().into_iter().flatten().map(|auth| auth.username).collect();
    assert_eq!(users, ["a", "b"]);
    assert_eq!(events[0].message, "Pulling image \"app:1\"");
    assert!(events[1].message.starts_with("Successfully pulled image \"app:1\" in "));
    assert!(events[1].message.ends_with(" including waiting). Image size: 4321 bytes."));
    Ok(())
}

#[tokio::test]
async fn a_pull_nobody_waits_for_is_dropped_and_the_next_one_has_its_turn() -> Outcome {
    let (_dir, fake, images) = start()?;
    fake.registry("slow:1", 1);
    fake.registry("quick:1", 1);
    fake.hold("PullImage");
    {
        let wanted = want("slow:1", PullPolicy::IfNotPresent);
        let slow = images.pull(&wanted, None, |_| ());
        let began = async {
            while !fake.calls().contains(&"PullImage slow:1".to_owned()) {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            _ = slow => return Err("it was held".into()),
            () = began => {}
        }
    }
    fake.release("PullImage");
    assert!(images.pull(&want("quick:1", PullPolicy::IfNotPresent), None, |_| ()).await.is_ok());
    Ok(())
}

#[tokio::test]
async fn without_a_link_the_copy_on_the_box_serves_but_not_against_the_registry_s_word() -> Outcome {
    let (_dir, fake, images) = start()?;
    fake.image("app:latest", Script::default());
    let wanted = want("app", PullPolicy::Always);
    let mut events = Vec::new();
    let Found::Absent(Some(present)) = images.find(&wanted, &mut events).await.map_err(|failure| failure.message)?
    else {
        return Err("it is to be pulled and there".into());
    };
    let used = images.pull(&wanted, Some(present.clone()), |event| events.push(event)).await;
    assert_eq!(used.as_ref(), Ok(&present));
    assert!(events[1].warning && events[1].message.contains("the copy on the machine is used"));

    // The registry is not asked again at once.
    fake.calls();
    fake.image("registry.local:5000/app:latest", Script::default());
    let used = images.pull(&wanted, Some(present.clone()), |_| ()).await;
    assert_eq!((used.as_ref(), fake.calls().len()), (Ok(&present), 0));

    events.clear();
    fake.fail("PullImage", Status::not_found("app:latest: not found"));
    let wanted = want("registry.local:5000/app", PullPolicy::Always);
    let failure = images.pull(&wanted, Some(present), |event| events.push(event)).await;
    assert_eq!(failure.err().map(|failure| failure.reason), Some("ErrImagePull"));
    assert_eq!(
        texts(&events)[1..],
        [
            "Failed Failed to pull image \"registry.local:5000/app\": app:latest: not found",
            "Failed Error: ErrImagePull"
        ]
    );
    Ok(())
}

#[tokio::test]
async fn offline_a_copy_does_not_wait_for_a_pull_that_gets_nowhere_and_online_it_does() -> Outcome {
    let (_dir, fake, online) = start()?;
    fake.image("app:latest", Script::default());
    fake.registry("app:latest", 7);
    let wanted = want("app", PullPolicy::Always);
    let Found::Absent(Some(present)) =
        online.find(&wanted, &mut Vec::new()).await.map_err(|failure| failure.message)?
    else {
        return Err("it is to be pulled and there".into());
    };
    let patience = Duration::from_millis(20);
    let offline = Images { link: link(false), patience, unreachable: Arc::default(), ..online.clone() };
    fake.hold("PullImage");
    let used = offline.pull(&wanted, Some(present.clone()), |_| ()).await;
    assert_eq!(used.as_ref(), Ok(&present));
    let online = Images { patience, ..online };
    let (pulled, ()) = tokio::join!(online.pull(&wanted, Some(present.clone()), |_| ()), async {
        tokio::time::sleep(patience * 3).await;
        fake.release("PullImage");
    });
    assert_eq!(pulled.map(|image| image.size), Ok(7));
    Ok(())
}

#[tokio::test]
async fn an_image_of_which_nobody_knows_the_user_is_not_started() -> Outcome {
    let (_dir, fake, images) = start()?;
    fake.registry("app:1", 1);
    fake.fail("ImageStatus", Status::internal("busy"));
    let wanted = want("app:1", PullPolicy::IfNotPresent);
    let mut events = Vec::new();
    let failure = images.pull(&wanted, None, |event| events.push(event)).await;
    assert_eq!(failure.map_err(|failure| failure.reason), Err("ImageInspectError"));
    assert_eq!(events[1].reason, "InspectFailed");
    assert!(matches!(images.find(&wanted, &mut events).await, Ok(Found::Ready(_))));
    Ok(())
}
