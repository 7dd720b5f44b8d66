//! Devices that answer to some registers and take no notice of others, and what answers like no device at all.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at the first thing that is not so")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use skerry_mapper::testing::{Edge, Process, desire, device, model};
use skerry_mapper_modbus::frame::{self, Frame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

const MAPPER: &str = env!("CARGO_BIN_EXE_skerry-mapper-modbus");
/// The register that is not answered to.
const DEAF: u16 = 40;
/// The one that can be read, and whose writes are not answered.
const STUCK: u16 = 41;

/// A server of holding registers, of which it keeps what is written; silent to all while `off`.
async fn server(off: Arc<AtomicBool>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let registers = Arc::new(Mutex::new([7_u16; 100]));
    let serve = async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (off, registers) = (Arc::clone(&off), Arc::clone(&registers));
            let answer = async move {
                let mut bytes = Vec::new();
                loop {
                    let Frame::Whole { transaction, unit, pdu, length } = frame::parse_tcp(&bytes) else {
                        if !matches!(stream.read_buf(&mut bytes).await, Ok(1..)) {
                            return;
                        }
                        continue;
                    };
                    bytes.drain(..length);
                    let code = pdu[0];
                    let words = [1, 3].map(|at| u16::from_be_bytes([pdu[at], pdu[at + 1]]));
                    // Writes of one register are all there are.
                    let (first, count) = (words[0], if code == 3 { words[1] } else { 1 });
                    let is_deaf = (first..first + count).contains(&DEAF) || (code != 3 && first == STUCK);
                    if off.load(Ordering::SeqCst) || is_deaf {
                        continue;
                    }
                    let answer: Vec<u8> = {
                        let mut registers = registers.lock().unwrap();
                        if code == 3 {
                            let asked = &registers[usize::from(first)..usize::from(first + count)];
                            let asked = asked.iter().flat_map(|word| word.to_be_bytes());
                            [3, u8::try_from(2 * count).unwrap()].into_iter().chain(asked).collect()
                        } else {
                            registers[usize::from(first)] = words[1];
                            pdu
                        }
                    };
                    if stream.write_all(&frame::tcp(transaction.unwrap(), unit, &answer)).await.is_err() {
                        return;
                    }
                }
            };
            drop(skerry_mapper::task::spawn("connection", answer));
        }
    };
    drop(skerry_mapper::task::spawn("server", serve));
    port
}

#[tokio::test]
async fn a_register_that_is_not_answered_to_takes_no_other_with_it() {
    let off = Arc::new(AtomicBool::new(false));
    let port = server(Arc::clone(&off)).await;
    let config = json!({"ip": "127.0.0.1", "port": port, "slaveID": 1, "timeout": 100});
    let holding = |offset: u16| json!({"register": "HoldingRegister", "offset": offset, "limit": 1});
    let properties = [("near", holding(39)), ("deaf", holding(DEAF)), ("stuck", holding(STUCK)), ("far", holding(80))];
    let model = model("m", &[("near", "INT!"), ("deaf", "INT!"), ("stuck", "INT!"), ("far", "INT!")]);
    let one = device("one", "m", &config, &properties);
    let directory = tempfile::tempdir().unwrap();
    // What is desired is written before anything is read.
    let one = desire(desire(one, "deaf", "1"), "stuck", "1");
    let edge = Edge::start(directory.path(), vec![model], vec![one.clone()]);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    for property in ["near", "stuck", "far"] {
        edge.reads("one", property, "7").await;
    }
    edge.is("one", "unhealthy").await;
    assert_eq!((edge.value("one", "deaf"), edge.written("one", "stuck")), (None, None));
    edge.update(desire(one, "far", "9")).await;
    edge.reads("one", "far", "9").await;
    assert_eq!(edge.written("one", "far").as_deref(), Some("9"));
    // All of it silent: offline, and back.
    off.store(true, Ordering::SeqCst);
    edge.is("one", "offline").await;
    off.store(false, Ordering::SeqCst);
    edge.is("one", "unhealthy").await;
}

#[tokio::test]
async fn what_is_no_device_is_tried_again_and_again() {
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let config = json!({"ip": "127.0.0.1", "port": port, "slaveID": 1, "timeout": 300});
    let one = device("one", "m", &config, &[("a", json!({"register": "HoldingRegister", "offset": 0, "limit": 1}))]);
    let edge = Edge::start(directory.path(), vec![model("m", &[("a", "INT")])], vec![one]);
    let _mapper = Process::mapper(MAPPER, &edge, &[]);
    // What follows the number of the request.
    for answer in [
        &b""[..],
        b"TP/1.1 400 Bad Request\r\n\r\n",
        // Of another protocol, of no length, of more than there can be, cut off.
        b"\x01\x00\x00\x05\x01\x03\x02\x00\x07",
        b"\x00\x00\x00\x00\x01\x03\x02\x00\x07",
        b"\x00\x00\xff\xff\x01\x03\x02\x00\x07",
        b"\x00\x00\x00\x05\x01\x03",
        // Of another function, of another count, of a count that is not its own, an exception that is none.
        b"\x00\x00\x00\x05\x01\x04\x02\x00\x07",
        b"\x00\x00\x00\x07\x01\x03\x04\x00\x07\x00\x08",
        b"\x00\x00\x00\x05\x01\x03\xfa\x00\x07",
        b"\x00\x00\x00\x03\x01\x83\x00",
    ] {
        let accepted = tokio::time::timeout(Duration::from_secs(20), listener.accept()).await.unwrap();
        let (mut stream, mut request) = (accepted.unwrap().0, [0; 64]);
        assert!(stream.read(&mut request).await.unwrap() > 2);
        let _ = stream.write_all(&[&request[..2], answer].concat()).await;
        let _ = tokio::time::timeout(Duration::from_millis(400), stream.read(&mut request)).await;
    }
    drop(listener);
    edge.is("one", "offline").await;
    assert_eq!(edge.value("one", "a"), None, "none of it is a value");
}
