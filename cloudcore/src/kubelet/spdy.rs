//! What is looked at of SPDY/3.1 on its way from a node to a client: where frames begin, so that what breaks off can be told so.
//!
//! The status of a remote command comes last, on the stream that client-go opens first. A connection that ends before it is taken for a
//! command that succeeded (client-go's `watchErrorStream` reads an empty error stream as no error), so that a link that breaks in the middle of `kubectl exec`
//! would end with exit code 0 and half of the output. So what breaks off is given the status that says so.
//!
//! A client of port-forward does not hear of the end at all: the apiserver that carries its frames in a WebSocket closes that under a lock
//! which its reader holds until the client says something (apiserver's `tunnelingWebsocketUpgraderConn`), and kubectl says nothing by itself. A frame GOAWAY
//! gets through, and ends the client's connection as any end would.
//!
//! Frames have a head of eight bytes (SPDY protocol draft 3.1, 2.2): data frames the stream's id, a control frame its version and type; then flags and a length of 24
//! bits. Data frames are passed on in pieces, each with a head of its own, so that there is always a boundary to end at.

use serde_json::json;

const HEAD: usize = 8;
const CONTROL: u8 = 0x80;
const FIN: u8 = 0x01;
/// The first stream that a client opens: client-go's error stream.
const ERROR_STREAM: u32 = 1;
/// The types of the control frames that end a stream at once, and the connection.
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;
/// A frame GOAWAY that answers for no stream, because of an `INTERNAL_ERROR`.
const GOING_AWAY: [u8; 16] = [CONTROL, 3, 0, GOAWAY, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 2];
/// The longest control frame that is looked for as a whole; their headers are few and short.
const MAX_CONTROL: usize = 64 << 10;

/// What a connection is for, and so what its client understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// exec and attach.
    Command,
    PortForward,
}

/// The frames of one direction.
#[derive(Debug)]
pub(super) struct Frames {
    kind: Kind,
    /// Of a head or a control frame, what has come.
    begun: Vec<u8>,
    data: Option<Data>,
    /// How it ends has come.
    told: bool,
    /// This is not what it should be: it is passed on as it is.
    lost: bool,
}

/// A data frame that is on its way.
#[derive(Debug)]
struct Data {
    stream: u32,
    flags: u8,
    left: usize,
}

impl Frames {
    pub(super) fn new(kind: Kind) -> Self {
        Self { kind, begun: Vec::new(), data: None, told: false, lost: false }
    }

    /// Passes on what can be.
    pub(super) fn step(&mut self, mut input: &[u8], out: &mut Vec<u8>) {
        while !input.is_empty() {
            if self.lost {
                out.extend_from_slice(input);
                return;
            }
            if let Some(data) = &mut self.data {
                let piece = data.left.min(input.len());
                let (now, rest) = input.split_at(piece);
                data.left -= piece;
                let flags = if data.left == 0 { data.flags } else { 0 };
                out.extend_from_slice(&head(data.stream, flags, piece));
                out.extend_from_slice(now);
                input = rest;
                if data.left == 0 {
                    self.told |= self.kind == Kind::Command && data.stream == ERROR_STREAM;
                    self.data = None;
                }
                continue;
            }
            self.begin(&mut input, out);
        }
    }

    /// A head, and the rest of a control frame.
    fn begin(&mut self, input: &mut &[u8], out: &mut Vec<u8>) {
        let wanted = match self.begun.first_chunk() {
            Some(head) => HEAD + length(head),
            None => HEAD,
        };
        let piece = (wanted - self.begun.len()).min(input.len());
        let (now, rest) = input.split_at(piece);
        self.begun.extend_from_slice(now);
        *input = rest;
        let Some(head) = self.begun.first_chunk::<HEAD>().copied() else { return };
        if head[0] & CONTROL != 0 {
            self.lost = length(&head) > MAX_CONTROL;
            if self.lost || self.begun.len() == HEAD + length(&head) {
                self.told |= match self.kind {
                    // A success of the oldest protocols has no status, the stream just ends.
                    Kind::Command => {
                        head[3] == RST_STREAM && self.begun[HEAD..].starts_with(&ERROR_STREAM.to_be_bytes())
                    }
                    Kind::PortForward => head[3] == GOAWAY,
                };
                out.append(&mut self.begun);
            }
            return;
        }
        self.begun.clear();
        let stream = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let (flags, left) = (head[4], length(&head));
        if left == 0 {
            out.extend_from_slice(&head);
            self.told |= self.kind == Kind::Command && stream == ERROR_STREAM && flags & FIN != 0;
        } else {
            self.data = Some(Data { stream, flags, left });
        }
    }

    /// What is to be said to a client whose connection broke off, if its end has not been told.
    pub(super) fn broken(&self, message: &str) -> Option<Vec<u8>> {
        if self.told || self.lost {
            return None;
        }
        if self.kind == Kind::PortForward {
            return Some(GOING_AWAY.to_vec());
        }
        let status = failure(message);
        let mut frame = head(ERROR_STREAM, FIN, status.len()).to_vec();
        frame.extend_from_slice(status.as_bytes());
        Some(frame)
    }
}

/// How a command failed, as remotecommand's v4 and v5 say it; older ones take any text for an error.
pub(super) fn failure(message: &str) -> String {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "InternalError",
        "message": message, "code": 500,
    });
    status.to_string()
}

fn length(head: &[u8; HEAD]) -> usize {
    usize::from(head[5]) << 16 | usize::from(head[6]) << 8 | usize::from(head[7])
}

#[expect(clippy::cast_possible_truncation, reason = "a piece of a frame, whose length has 24 bits")]
fn head(stream: u32, flags: u8, length: usize) -> [u8; HEAD] {
    let [a, b, c, d] = stream.to_be_bytes();
    let [_, e, f, g] = (length as u32).to_be_bytes();
    [a, b, c, d, flags, e, f, g]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn control(kind: u8, body: &[u8]) -> Vec<u8> {
        let [_, _, _, _, _, a, b, c] = head(0, 0, body.len());
        [&[CONTROL, 3, 0, kind, 0, a, b, c], body].concat()
    }

    fn data(stream: u32, flags: u8, body: &[u8]) -> Vec<u8> {
        [&head(stream, flags, body.len())[..], body].concat()
    }

    type Streams = BTreeMap<u32, (Vec<u8>, bool)>;

    /// Reads frames to the last: the controls, and of each stream its data and whether it ended.
    fn read(mut wire: &[u8]) -> (Vec<Vec<u8>>, Streams) {
        let (mut controls, mut streams) = (Vec::new(), Streams::new());
        while !wire.is_empty() {
            let head: &[u8; HEAD] = wire.first_chunk().expect("a boundary");
            let end = HEAD + length(head);
            if head[0] & CONTROL != 0 {
                controls.push(wire[..end].to_vec());
            } else {
                let entry: &mut (Vec<u8>, bool) =
                    streams.entry(u32::from_be_bytes([head[0], head[1], head[2], head[3]])).or_default();
                assert!(!entry.1, "data behind the end");
                entry.0.extend_from_slice(&wire[HEAD..end]);
                entry.1 = head[4] & FIN != 0;
            }
            wire = &wire[end..];
        }
        (controls, streams)
    }

    fn wire() -> Vec<u8> {
        [
            control(2, b"reply one"),
            data(5, 0, &[b'o'; 3000]),
            control(6, &[0, 0, 0, 9]),
            data(3, 0, b""),
            data(5, FIN, b"the end"),
            data(1, 0, b"{\"status\":\"Success\"}"),
        ]
        .concat()
    }

    proptest! {
        #[test]
        fn frames_arrive_whole_in_whatever_pieces(cuts in proptest::collection::vec(1usize..700, 1..40)) {
            let (wire, mut frames, mut out) = (wire(), Frames::new(Kind::Command), Vec::new());
            let (mut rest, mut cuts) = (&wire[..], cuts.into_iter().cycle());
            while !rest.is_empty() {
                let (now, then) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                frames.step(now, &mut out);
                rest = then;
            }
            prop_assert_eq!(read(&out), read(&wire));
            prop_assert_eq!(frames.broken("no"), None, "its end was told");
        }

        #[test]
        fn what_breaks_off_anywhere_says_so(at in 0usize..3060) {
            let (wire, mut frames, mut out) = (wire(), Frames::new(Kind::Command), Vec::new());
            let at = at.min(wire.len() - 1);
            frames.step(&wire[..at], &mut out);
            out.extend(frames.broken("the node's session ended").expect("it was not told"));
            let (_, streams) = read(&out);
            let (status, ended) = &streams[&1];
            // The status itself may have begun: then it is none that can be read.
            prop_assert!(*ended && String::from_utf8_lossy(status).contains("the node's session ended"));
        }

        #[test]
        fn forwarded_ports_that_break_off_anywhere_end_by_going_away(at in 0usize..3060) {
            let (wire, mut frames, mut out) = (wire(), Frames::new(Kind::PortForward), Vec::new());
            frames.step(&wire[..at.min(wire.len())], &mut out);
            out.extend(frames.broken("the node's session ended").expect("streams that end are no end of all"));
            let (controls, _) = read(&out);
            prop_assert_eq!(controls.last().unwrap(), &GOING_AWAY);
            frames.step(&GOING_AWAY, &mut out);
            prop_assert!(at < wire.len() || frames.broken("no").is_none(), "once is enough");
        }

        #[test]
        fn anything_is_passed_on(wire in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let (mut frames, mut out) = (Frames::new(Kind::Command), Vec::new());
            frames.step(&wire, &mut out);
            prop_assert!(frames.begun.len() <= MAX_CONTROL + HEAD);
        }
    }
}
