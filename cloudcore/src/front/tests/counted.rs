//! What the metrics say of a session, through the port.

use bytes::Bytes;
use skerry_proto::mux::STREAM_BUFFER;
use skerry_proto::sync::COLLECTIONS;
use skerry_proto::wire::{Ack, StreamOpen};

use super::*;

impl Cloud {
    /// What a series stands at.
    #[track_caller]
    fn metric(&self, series: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let shown = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        shown.unwrap_or_else(|| panic!("{series} is not in:\n{text}")).parse().unwrap()
    }
}

impl Edge {
    /// All that was sent before has been dealt with.
    async fn settle(&mut self) {
        self.send(Body::Ping(Ping { token: 9 })).await;
        while !matches!(self.body().await, Body::Pong(_)) {}
    }
}

#[tokio::test]
async fn what_an_edge_lacks_and_acknowledges() {
    let mut cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let (mut edge, opened, _) = cloud.session(&identity, "box-1", 0).await;
    assert_eq!((cloud.metric("skerry_sessions"), cloud.metric("skerry_sessions_behind")), (1, 1));
    let pod = Object::new(Collection::Pods, "ns/web".to_owned(), "u1".to_owned(), br#"{"kind":"Pod"}"#);
    let complete = COLLECTIONS.into_iter().map(FeedEvent::Complete);
    opened.events.send(std::iter::once(FeedEvent::Desired(pod.into())).chain(complete).collect()).await.unwrap();
    let (mut asked, mut sent, mut bytes) = (0, 0, 0);
    while asked < COLLECTIONS.len() || sent < 2 {
        let body = edge.body().await;
        match &body {
            Body::InventoryRequest(request) => {
                asked += 1;
                let inventory = Inventory { collection: request.collection, last: true, ..Inventory::default() };
                edge.send(Body::Inventory(inventory)).await;
                continue;
            }
            Body::Upsert(upsert) => sent = upsert.seq,
            Body::DigestCheck(check) => sent = check.seq,
            other => panic!("{other:?}"),
        }
        bytes += Frame { body: Some(body) }.encoded_len() as u64;
    }
    edge.settle().await;
    assert_eq!(cloud.metric("skerry_changes_unacknowledged_bytes"), bytes);
    assert_eq!((cloud.metric("skerry_sessions_behind"), cloud.metric("skerry_changes_acknowledged_total")), (1, 0));
    edge.send(Body::Ack(Ack { seq: sent })).await;
    edge.settle().await;
    assert_eq!(cloud.metric("skerry_changes_unacknowledged_bytes"), 0);
    assert_eq!((cloud.metric("skerry_sessions_behind"), cloud.metric("skerry_changes_acknowledged_total")), (0, 1));
    assert_eq!(cloud.metric("skerry_sync_seconds_count{after=\"hello\"}"), 1);
    drop(edge);
    until("the session ends", || cloud.metric("skerry_sessions") == 0).await;
    assert_eq!(cloud.metric("skerry_sessions_behind"), 0);
}

#[tokio::test]
async fn bytes_and_queues_by_class_and_what_is_refused() {
    let mut cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let (mut edge, _opened, _) = cloud.session(&identity, "box-1", 0).await;
    let bytes = |cloud: &Cloud, way: &str, class| {
        cloud.metric(&format!("skerry_bytes_total{{direction={way:?},class={class:?}}}"))
    };
    assert!(bytes(&cloud, "in", "control") > 0 && bytes(&cloud, "out", "control") > 0, "Hello and Welcome");

    // The first stream of class device that an edge opens; nobody serves those.
    let open = Body::StreamOpen(StreamOpen { id: 3 << 1 | 1, header: Bytes::new() });
    let length = Frame { body: Some(open.clone()) }.encoded_len() as u64;
    edge.send(open).await;
    assert!(matches!(edge.body().await, Body::StreamReset(_)));
    assert_eq!(cloud.metric("skerry_drops_total{reason=\"stream_refused\"}"), 1);
    assert_eq!((bytes(&cloud, "in", "device"), bytes(&cloud, "in", "ops")), (length, 0));

    // Of a kind that is not known.
    edge.send(Body::Report(skerry_proto::wire::Report { id: 1, ..Default::default() })).await;
    assert!(matches!(edge.body().await, Body::ReportAck(_)));
    assert_eq!(cloud.metric("skerry_drops_total{reason=\"report_refused\"}"), 1);

    // As much as goes without credit, and as much again waits.
    let window = Class::Ops.window();
    let mut stream = cloud.front.streams("box-1").unwrap().open(Class::Ops, Bytes::new()).unwrap();
    let data = vec![7; window + STREAM_BUFFER];
    let reads = async {
        let mut read = 0;
        while read < window {
            if let Body::StreamData(part) = edge.body().await {
                read += part.data.len();
            }
        }
    };
    let (wrote, ()) = tokio::join!(stream.write_all(&data), reads);
    wrote.unwrap();
    assert_eq!(cloud.metric("skerry_queue_bytes{class=\"ops\"}"), STREAM_BUFFER as u64);
    assert_eq!(cloud.metric("skerry_queue_bytes{class=\"control\"}"), 0);
    assert!(bytes(&cloud, "out", "ops") > window as u64);
    drop(edge);
    until("the session ends", || cloud.metric("skerry_sessions") == 0).await;
    assert_eq!(cloud.metric("skerry_queue_bytes{class=\"ops\"}"), 0);
}
