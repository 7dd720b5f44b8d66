use std::sync::{Arc, Mutex};

use super::*;

fn frame(first: u32, fin: bool, data: &[u8]) -> Vec<u8> {
    let head = u64::from(first) << 32 | u64::from(fin) << 24 | data.len() as u64;
    [&head.to_be_bytes()[..], data].concat()
}

/// What the client sends, until a frame that is `last`.
async fn hear(io: &mut (impl AsyncRead + Unpin), last: &[u8]) -> Vec<u8> {
    let mut heard = Vec::new();
    while !heard.ends_with(last) {
        assert!(io.read_buf(&mut heard).await.unwrap() > 0, "{heard:?}");
    }
    heard
}

fn names(heard: &[u8]) -> Vec<&str> {
    let all = ["error", "stdin", "stdout", "stderr", "resize"];
    let at = |name: &&str| heard.windows(name.len()).position(|part| part == name.as_bytes());
    let mut names: Vec<_> = all.into_iter().filter(|name| at(name).is_some()).collect();
    names.sort_by_key(at);
    names
}

#[tokio::test]
async fn a_command_gets_its_input_to_the_end_and_its_exit_code_is_passed_on() {
    let (client, mut server) = tokio::io::duplex(1000);
    let (sender, input) = mpsc::channel(1);
    let shown = Arc::new(Mutex::new([String::new(), String::new()]));
    let show = |is_error: bool, data: &[u8]| {
        shown.lock().unwrap()[usize::from(is_error)] += std::str::from_utf8(data).unwrap();
        Ok(())
    };
    let serve = async {
        sender.send(Bytes::from(vec![b'Z'; 10_000])).await.unwrap();
        drop(sender);
        let heard = hear(&mut server, &frame(3, true, b"")).await;
        assert_eq!(names(&heard), ["error", "stdin", "stdout", "stderr"]);
        assert_eq!(heard.iter().filter(|byte| **byte == b'Z').count(), 10_000);
        let failed = json!({ "status": "Failure", "reason": "NonZeroExitCode",
            "details": { "causes": [{ "reason": "ExitCode", "message": "7" }] } });
        for said in [
            frame(0x8003_0002, false, &[0, 0, 0, 1, 0, 0]),
            frame(5, false, b"out"),
            frame(7, false, b"err"),
            frame(0x8003_0006, false, &[0, 0, 0, 2]),
            frame(1, false, failed.to_string().as_bytes()),
            frame(1, true, b""),
            frame(5, true, b"put"),
            frame(7, true, b""),
        ] {
            server.write_all(&said).await.unwrap();
        }
        server
    };
    let (outcome, mut server) = tokio::join!(session(client, Some(input), None, false, show), serve);
    assert_eq!(format!("{:?}", outcome.unwrap()), format!("{:?}", ExitCode::from(7)));
    assert_eq!(*shown.lock().unwrap(), ["output", "err"]);
    // The ping may have been answered before the end.
    let mut rest = Vec::new();
    server.read_to_end(&mut rest).await.unwrap();
}

#[tokio::test]
async fn a_terminal_says_its_size_and_a_session_that_breaks_off_says_so() {
    let (client, mut server) = tokio::io::duplex(1000);
    let (sender, sizes) = mpsc::channel(1);
    let (_input, input) = mpsc::channel(1);
    let serve = async {
        sender.send((80, 24)).await.unwrap();
        let heard = hear(&mut server, br#"{"Height":24,"Width":80}"#).await;
        assert_eq!(names(&heard), ["error", "stdin", "stdout", "resize"]);
        drop(server);
    };
    let (outcome, ()) = tokio::join!(session(client, Some(input), Some(sizes), true, |_, _| Ok(())), serve);
    assert!(outcome.unwrap_err().to_string().contains("broke off"));
}

#[test]
fn a_status_says_how_it_ended() {
    assert_eq!(format!("{:?}", outcome(br#"{"status":"Success"}"#).unwrap()), format!("{:?}", ExitCode::SUCCESS));
    let failed = outcome(br#"{"status":"Failure","message":"no such file"}"#).unwrap_err();
    assert_eq!(failed.to_string(), "no such file");
    assert_eq!(streams(true, false), "output=1&input=1&error=1");
    assert_eq!(streams(true, true), "output=1&input=1&tty=1");
}
