//! Streams over a link in memory, with what serves them: an echo, a sink, a source.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::double::Line;
use super::*;
use crate::mux::{CLASS_BUFFER, MAX_STREAMS, STREAM_BUFFER};

async fn echo(mut stream: Stream) {
    let (mut read, mut write) = tokio::io::split(&mut stream);
    tokio::io::copy(&mut read, &mut write).await.unwrap();
    write.shutdown().await.unwrap();
}

async fn on<T>(line: &mut Line, story: impl Future<Output = T>) -> T {
    tokio::select! { violation = line.carry() => panic!("{violation}"), told = story => told }
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|n| u8::try_from(n % 251).unwrap()).collect()
}

#[tokio::test]
async fn either_side_opens_what_the_other_serves() {
    let mut line = Line::default();
    let (cloud, edge) = (line.cloud.streams(), line.edge.streams());
    let (mut at_cloud, mut at_edge) = (line.at_cloud.serve(Class::Api, 1), line.at_edge.serve(Class::Api, 1));
    on(&mut line, async {
        let up = edge.open(Class::Api, Bytes::from_static(b"up")).unwrap();
        let down = cloud.open(Class::Api, Bytes::from_static(b"down")).unwrap();
        assert_eq!(&at_cloud.recv().await.unwrap().header[..], b"up");
        assert_eq!(&at_edge.recv().await.unwrap().header[..], b"down");
        drop((up, down));
        // Nobody serves this one.
        let mut refused = edge.open(Class::Device, Bytes::new()).unwrap();
        assert_eq!(refused.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    })
    .await;
}

#[tokio::test]
async fn what_is_written_comes_back_whole() {
    let mut line = Line::default();
    let streams = line.cloud.streams();
    let mut incoming = line.at_edge.serve(Class::Ops, 1);
    let sent = pattern(1 << 20);
    on(&mut line, async {
        let stream = streams.open(Class::Ops, Bytes::from_static(b"echo")).unwrap();
        let served = incoming.recv().await.unwrap();
        assert_eq!((served.class, &served.header[..]), (Class::Ops, &b"echo"[..]));
        let (mut read, mut write) = tokio::io::split(stream);
        let mut got = Vec::new();
        let writes = async {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
            assert_eq!(write.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        };
        let (_, _, read) = tokio::join!(echo(served.stream), writes, read.read_to_end(&mut got));
        assert_eq!(read.unwrap(), sent.len());
        assert!(got == sent);
    })
    .await;
    assert_eq!((lock(&line.cloud.0).mux.streams(), lock(&line.edge.0).mux.streams()), (0, 0));
    assert!(lock(&line.cloud.0).pipes.is_empty() && lock(&line.edge.0).pipes.is_empty());
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_up_its_writer_and_nobody_else() {
    let mut line = Line::default();
    let streams = line.cloud.streams();
    let mut incoming = line.at_edge.serve(Class::Device, 2);
    on(&mut line, async {
        let mut slow = streams.open(Class::Device, Bytes::new()).unwrap();
        let _unread = incoming.recv().await.unwrap();
        let mut written = 0;
        while let Poll::Ready(taken) = futures_poll(&mut slow, &[0; 10_000]).await {
            written += taken.unwrap();
            // What can go goes.
            tokio::task::yield_now().await;
        }
        assert_eq!(written, STREAM_BUFFER + Class::Device.window());
        let other = streams.open(Class::Device, Bytes::new()).unwrap();
        let served = incoming.recv().await.unwrap();
        let (mut read, mut write) = tokio::io::split(other);
        let sent = pattern(300_000);
        let mut got = vec![0; sent.len()];
        let (_, wrote, read) = tokio::join!(
            async { tokio::time::timeout(std::time::Duration::from_secs(60), echo(served.stream)).await.unwrap() },
            async { write.write_all(&sent).await.and(write.shutdown().await) },
            read.read_exact(&mut got)
        );
        wrote.and(read).unwrap();
        assert!(got == sent);
    })
    .await;
}

/// One attempt to write.
async fn futures_poll(stream: &mut Stream, data: &[u8]) -> Poll<io::Result<usize>> {
    std::future::poll_fn(|context| Poll::Ready(Pin::new(&mut *stream).poll_write(context, data))).await
}

#[tokio::test]
async fn who_opens_what_nobody_serves_is_told() {
    let mut line = Line::default();
    let streams = line.cloud.streams();
    let mut busy = line.at_edge.serve(Class::Api, 1);
    drop(line.at_edge.serve(Class::Device, 1));
    on(&mut line, async {
        for (class, says) in [(Class::Ops, "nobody serves"), (Class::Device, "nobody serves")] {
            let mut stream = streams.open(class, Bytes::new()).unwrap();
            let error = stream.read(&mut [0]).await.unwrap_err();
            assert!(error.kind() == io::ErrorKind::ConnectionReset && error.to_string().contains(says), "{error}");
            assert!(stream.write(b"x").await.is_err());
        }
        let _first = streams.open(Class::Api, Bytes::new()).unwrap();
        let mut second = streams.open(Class::Api, Bytes::new()).unwrap();
        assert!(second.read(&mut [0]).await.unwrap_err().to_string().contains("try again later"));
        assert!(busy.recv().await.is_some());
        for _ in 0..3 * MAX_STREAMS {
            // Places come back.
            let mut stream = streams.open(Class::Ops, Bytes::new()).unwrap();
            stream.read(&mut [0]).await.unwrap_err();
        }
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_was_shut_down_arrives_though_its_writer_is_gone() {
    let mut line = Line::default();
    let streams = line.cloud.streams();
    let mut incoming = line.at_edge.serve(Class::Ops, 1);
    on(&mut line, async {
        let mut asking = streams.open(Class::Ops, Bytes::new()).unwrap();
        let mut source = incoming.recv().await.unwrap().stream;
        source.write_all(&pattern(50_000)).await.unwrap();
        source.shutdown().await.unwrap();
        drop(source);
        let mut got = Vec::new();
        asking.read_to_end(&mut got).await.unwrap();
        assert!(got == pattern(50_000));
        // And one that was not is an error, not an end.
        let mut asking = streams.open(Class::Ops, Bytes::new()).unwrap();
        let mut source = incoming.recv().await.unwrap().stream;
        source.write_all(b"half").await.unwrap();
        drop(source);
        assert_eq!(asking.read_to_end(&mut got).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    })
    .await;
}

#[tokio::test]
async fn who_watches_a_stream_hears_of_its_end_though_nobody_reads_or_writes() {
    let mut line = Line::default();
    let streams = line.cloud.streams();
    let mut incoming = line.at_edge.serve(Class::Ops, 1);
    on(&mut line, async {
        // The peer has finished its half, which is no end, and resets the rest later.
        let mut asking = streams.open(Class::Ops, Bytes::new()).unwrap();
        let served = incoming.recv().await.unwrap().stream;
        asking.shutdown().await.unwrap();
        let mut gone = served.gone();
        for _ in 0..5 {
            tokio::task::yield_now().await;
            let polled = std::future::poll_fn(|context| Poll::Ready(Pin::new(&mut gone).poll(context))).await;
            assert!(polled.is_pending());
        }
        let (end, ()) = tokio::join!(gone, async { drop(asking) });
        assert!(matches!(end, End::Finished(error) if error.kind() == io::ErrorKind::ConnectionReset));
        let (end, ()) = tokio::join!(served.gone(), async { drop(served) });
        assert!(matches!(end, End::Finished(_)));
        let asking = streams.open(Class::Ops, Bytes::new()).unwrap();
        let (end, ()) = tokio::join!(asking.gone(), async {
            tokio::task::yield_now().await;
            drop(incoming.recv().await.unwrap().stream);
        });
        assert!(matches!(end, End::Broken(error) if error.kind() == io::ErrorKind::ConnectionReset));
    })
    .await;
}

#[tokio::test]
async fn streams_end_with_their_session() {
    let mut line = Line::default();
    let streams = line.cloud.streams();
    let mut incoming = line.at_edge.serve(Class::Ops, 1);
    let (mut reader, mut served) = on(&mut line, async {
        let stream = streams.open(Class::Ops, Bytes::new()).unwrap();
        (stream, incoming.recv().await.unwrap().stream)
    })
    .await;
    let mut buffer = [0];
    let read = async { reader.read(&mut buffer).await.unwrap_err() };
    let write = async {
        loop {
            if let Err(error) = served.write_all(&[0; CLASS_BUFFER]).await {
                return error;
            }
        }
    };
    let end = async {
        tokio::task::yield_now().await;
        line.cloud.end("the cable was pulled");
        drop(line);
    };
    let (read, write, ()) = tokio::join!(read, write, end);
    assert!(read.kind() == io::ErrorKind::ConnectionAborted && read.to_string().contains("the cable was pulled"));
    assert_eq!(write.kind(), io::ErrorKind::ConnectionAborted);
    assert!(streams.is_ended());
    assert!(matches!(streams.open(Class::Ops, Bytes::new()), Err(StreamError::Ended(_))));
}
