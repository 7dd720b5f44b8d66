use std::fs::{self, OpenOptions};
use std::io::Write as _;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream};

use super::*;
use crate::ops::tests::{Bed, head};

fn line(text: impl std::fmt::Display) -> String {
    format!("2026-01-02T15:04:05.5Z stdout F {text}\n")
}

const PATH: &str = "/containerLogs/default/web/main";

#[tokio::test]
async fn a_log_is_read_as_asked() {
    let bed = Bed::new().await;
    fs::write(bed.dir.path().join("0.log"), (0..100).map(line).collect::<String>()).unwrap();
    let all: String = (0..100).map(|n| format!("{n}\n")).collect();
    assert_eq!(bed.get(PATH).await, (200, all));
    assert_eq!(
        bed.get(&format!("{PATH}?tailLines=2&timestamps=true&limitBytes=41")).await.1,
        "2026-01-02T15:04:05.500000000Z 98\n2026-01"
    );
    assert_eq!(bed.get(&format!("{PATH}?tailLines=0")).await, (200, String::new()));
    assert_eq!(bed.get(&format!("{PATH}?sinceSeconds=60")).await, (200, String::new()));
}

#[tokio::test]
async fn what_cannot_be_read_is_refused_with_upstreams_words() {
    let bed = Bed::new().await;
    for (path, status, words) in [
        ("/containerLogs/default/none/main", 404, "pod \"none\" does not exist"),
        ("/containerLogs/default/web/none", 404, "container \"none\" not found in pod \"web\""),
        (
            "/containerLogs/default/web/late",
            400,
            "container \"late\" in pod \"web\" is waiting to start: ContainerCreating",
        ),
        ("/containerLogs/default/web/odd", 400, "container \"odd\" in pod \"web\" is not available"),
        (
            "/containerLogs/default/web/main?previous=true",
            400,
            "previous terminated container \"main\" in pod \"web\" not found",
        ),
        ("/containerLogs/default/web/main?tailLines=x", 400, r#"{"message": "Unable to decode query."}"#),
        ("/containerLogs/default/web/main?tailLines=-1", 422, r#"{"message": "Invalid request."}"#),
    ] {
        assert_eq!(bed.get(path).await, (status, words.to_owned()), "{path}");
    }
    let (status, words) = bed.get(PATH).await;
    assert!(status == 400 && words.contains("unable to retrieve container logs for containerd://"), "{words}");
}

async fn follow(bed: &Bed) -> BufReader<DuplexStream> {
    let mut client = BufReader::new(bed.pipe());
    client.write_all(format!("GET {PATH}?follow=true HTTP/1.1\r\nHost: n\r\n\r\n").as_bytes()).await.unwrap();
    assert!(head(&mut client).await.starts_with("HTTP/1.1 200 "));
    client
}

/// The text of the next chunk.
async fn chunk(client: &mut BufReader<DuplexStream>) -> String {
    let mut size = String::new();
    client.read_line(&mut size).await.unwrap();
    let mut text = vec![0; usize::from_str_radix(size.trim(), 16).unwrap() + 2];
    client.read_exact(&mut text).await.unwrap();
    String::from_utf8(text).unwrap().trim_end_matches("\r\n").to_owned()
}

#[tokio::test]
async fn a_log_is_followed_over_rotation_until_the_container_has_ended() {
    let bed = Bed::new().await;
    let path = bed.dir.path().join("0.log");
    fs::write(&path, line("one")).unwrap();
    let mut client = follow(&bed).await;
    assert_eq!(chunk(&mut client).await, "one\n");
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    write!(file, "{}", line("two")).unwrap();
    assert_eq!(chunk(&mut client).await, "two\n");
    fs::rename(&path, bed.dir.path().join("0.log.1")).unwrap();
    write!(file, "{}", line("three")).unwrap();
    assert_eq!(chunk(&mut client).await, "three\n");
    fs::write(&path, line("four")).unwrap();
    assert_eq!(chunk(&mut client).await, "four\n");
    // The runtime being away is not the container's end.
    bed.fake.fail("ContainerStatus", tonic::Status::unavailable("away"));
    bed.fake.exit(&bed.container, 0, "Completed");
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    write!(file, "{}", line("last")).unwrap();
    assert_eq!(chunk(&mut client).await, "last\n");
    assert_eq!(chunk(&mut client).await, "");
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
}

#[tokio::test]
async fn a_client_that_leaves_or_does_not_read_holds_nothing() {
    let bed = Bed::new().await;
    let path = bed.dir.path().join("0.log");
    fs::write(&path, line("x".repeat(1000)).repeat(10_000)).unwrap();
    let mut client = follow(&bed).await;
    assert!(!chunk(&mut client).await.is_empty());
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().flatten();
    let is_open = || descriptors().any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == path));
    assert!(is_open());
    drop(client);
    let closed = async {
        while is_open() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), closed).await.unwrap();
}

#[tokio::test]
async fn who_follows_and_leaves_leaves_no_task() {
    let bed = Bed::new().await;
    fs::write(bed.dir.path().join("0.log"), line("one")).unwrap();
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert_eq!(chunk(&mut follow(&bed).await).await, "one\n");
    let before = tasks();
    let clients = [follow(&bed).await, follow(&bed).await, follow(&bed).await, follow(&bed).await];
    assert!(tasks() >= before + clients.len());
    drop(clients);
    let ended = async {
        while tasks() > before {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ended).await.expect("something is left of them");
}

#[test]
fn the_instance_is_chosen_as_upstream_does() {
    let status = |status: serde_json::Value| -> PodStatus {
        let mut whole =
            serde_json::json!({ "name": "c", "ready": false, "restartCount": 0, "image": "", "imageID": "" });
        whole.as_object_mut().unwrap().extend(status.as_object().unwrap().clone());
        serde_json::from_value(serde_json::json!({ "initContainerStatuses": [whole] })).unwrap()
    };
    let ended = |id: &str| serde_json::json!({ "terminated": { "exitCode": 1, "containerID": id } });
    let waits = |reason: &str| serde_json::json!({ "waiting": { "reason": reason } });
    let choose = |of: serde_json::Value, previous| choose("p", Some(&status(of)), "c", previous);
    let running = serde_json::json!({ "containerID": "now", "state": { "running": {} }, "lastState": ended("old") });
    assert_eq!(choose(running.clone(), false).as_deref(), Ok("now"));
    assert_eq!(choose(running, true).as_deref(), Ok("old"));
    let json = |state, last| serde_json::json!({ "state": state, "lastState": last });
    assert_eq!(choose(json(ended("end"), ended("old")), false).as_deref(), Ok("end"));
    assert_eq!(choose(json(ended(""), ended("old")), false).as_deref(), Ok("old"));
    assert_eq!(choose(json(waits("CrashLoopBackOff"), ended("old")), false).as_deref(), Ok("old"));
    let nothing = serde_json::Value::Null;
    for (state, last, words) in [
        (ended(""), nothing.clone(), "is terminated"),
        (waits("ErrImagePull"), nothing.clone(), "is waiting to start: image can't be pulled"),
        (waits("ImagePullBackOff"), nothing.clone(), "is waiting to start: trying and failing to pull image"),
        (waits("CreateContainerError"), nothing.clone(), "is waiting to start: CreateContainerError"),
        (nothing.clone(), nothing, "is waiting to start - no logs yet"),
    ] {
        assert_eq!(choose(json(state, last), false), Err(format!("container \"c\" in pod \"p\" {words}")));
    }
}
