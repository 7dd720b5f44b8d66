//! Streams of a session, through the port.

use super::*;

/// A service for tests: sends back what comes.
async fn echo(stream: Stream) {
    let (mut read, mut write) = tokio::io::split(stream);
    if tokio::io::copy(&mut read, &mut write).await.is_ok() {
        write.shutdown().await.unwrap();
    }
}

/// Writes all of this, and reads to the end.
async fn exchange(stream: Stream, sent: &[u8]) -> io::Result<Vec<u8>> {
    let (mut read, mut write) = tokio::io::split(stream);
    let mut got = Vec::new();
    let writes = async { write.write_all(sent).await.and(write.shutdown().await) };
    let (wrote, read) = tokio::join!(writes, read.read_to_end(&mut got));
    wrote.and(read).map(|_| got)
}

impl Edge {
    /// Carries streams both ways until the connection ends; what the cloud opens is echoed.
    async fn carry(&mut self, carrier: &mut Carrier) {
        let mut echoes = tokio::task::JoinSet::new();
        loop {
            let message = tokio::select! {
                frame = poll_fn(|context| carrier.poll_frame(context)) => {
                    self.raw(Message::Binary(frame.encode_to_vec().into())).await;
                    continue;
                }
                message = self.0.next() => message,
            };
            let Some(Ok(Message::Binary(bytes))) = message else { return };
            if let Received::Opened(incoming) = carrier.receive(Frame::decode(bytes).unwrap()).unwrap() {
                echoes.spawn(echo(incoming.stream));
            }
        }
    }
}

#[tokio::test]
async fn streams_go_both_ways_and_end_with_the_session() {
    let mut cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    assert!(cloud.front.streams("box-1").is_none());
    let (mut edge, feed, _) = cloud.session(&identity, "box-1", 0).await;
    let streams = cloud.front.streams("box-1").expect("the session stands");
    let mut carrier = Carrier::new(Side::Edge);
    let theirs = carrier.streams();
    let sent: Vec<u8> = (0..600_000_u32).flat_map(u32::to_le_bytes).collect();
    let story = async {
        let down = async {
            let stream = streams.open(Class::Ops, bytes::Bytes::from_static(b"logs")).unwrap();
            assert!(exchange(stream, &sent).await.unwrap() == sent);
        };
        let up = async {
            let stream = theirs.open(Class::Api, bytes::Bytes::from_static(b"GET /")).unwrap();
            let (node, served) = cloud.incoming.recv().await.unwrap();
            assert_eq!((node.name.as_str(), served.class, &served.header[..]), ("box-1", Class::Api, &b"GET /"[..]));
            let (got, ()) = tokio::join!(exchange(stream, &sent), echo(served.stream));
            assert!(got.unwrap() == sent);
        };
        let unserved = async {
            let mut stream = theirs.open(Class::Device, bytes::Bytes::new()).unwrap();
            let error = stream.read(&mut [0]).await.unwrap_err();
            assert!(error.to_string().contains("nobody serves streams of class device"), "{error}");
        };
        tokio::join!(down, up, unserved);
        streams.open(Class::Ops, bytes::Bytes::new()).unwrap()
    };
    let story = tokio::time::timeout(PATIENCE, story);
    let mut unread = tokio::select! {
        unread = story => unread.expect("the streams get on"),
        () = edge.carry(&mut carrier) => panic!("the session ended"),
    };
    assert!(!feed.events.is_closed(), "it is still the same session");
    drop(edge);
    assert_eq!(unread.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    assert!(streams.is_ended());
    tokio::time::timeout(PATIENCE, feed.events.closed()).await.expect("the feed ends with the connection");
    assert!(cloud.front.streams("box-1").is_none());
}

#[tokio::test]
async fn who_breaks_the_rules_of_streams_is_told() {
    let mut cloud = Cloud::start().await;
    let identity = cloud.node("box-1").await;
    let (mut edge, feed, _) = cloud.session(&identity, "box-1", 0).await;
    let credit = skerry_proto::wire::StreamCredit { id: 3, bytes: 1 };
    edge.send(Body::StreamCredit(credit)).await;
    let (reason, said) = edge.goodbye().await;
    assert!(reason == Reason::Protocol && said.message.contains("never opened"), "{said:?}");
    feed.events.closed().await;
}
