use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

fn filter(wanted: &Wanted, pieces: &[&[u8]]) -> String {
    let mut filter = Filter::new(wanted);
    let mut out = Vec::new();
    for piece in pieces {
        filter.feed(piece, &mut out);
    }
    String::from_utf8(out).unwrap()
}

const LOG: &[u8] = b"2026-01-02T15:04:05.1Z stdout F one\n\
    2026-01-02T15:04:06.123456789Z stderr P tw\n\
    2026-01-02T15:04:06.2Z stderr P:x o\n\
    2026-01-02T15:04:06.3Z stderr F \n\
    nonsense\n\
    2026-01-02T15:04:07+00:00 stdout F  three \n\
    2026-01-02T17:04:08.000000001+02:00 stdout F four\n\
    2026-01-02T15:04:09Z stdout F unfinished";

#[test]
fn lines_are_stripped_joined_and_dated_where_one_begins() {
    assert_eq!(filter(&Wanted::default(), &[LOG]), "one\ntwo\n three \nfour\nunfinished");
    let dated = Wanted { timestamps: true, ..Wanted::default() };
    assert_eq!(
        filter(&dated, &[LOG]),
        "2026-01-02T15:04:05.100000000Z one\n2026-01-02T15:04:06.123456789Z two\n2026-01-02T15:04:07.000000000Z  three \n\
         2026-01-02T17:04:08.000000001+02:00 four\n2026-01-02T15:04:09.000000000Z unfinished"
    );
}

#[test]
fn a_stream_a_time_and_bounds_choose() {
    let stdout = Wanted { stream: Which::Stdout, ..Wanted::default() };
    assert_eq!(filter(&stdout, &[LOG]), "one\n three \nfour\nunfinished");
    let stderr = Wanted { stream: Which::Stderr, ..Wanted::default() };
    assert_eq!(filter(&stderr, &[LOG]), "two\n");
    let since = |text: &str| Wanted { since: Some(text.parse().unwrap()), ..Wanted::default() };
    assert_eq!(filter(&since("2026-01-02T15:04:07Z"), &[LOG]), " three \nfour\nunfinished");
    assert_eq!(filter(&since("2026-01-02T15:04:08Z"), &[LOG]), "four\nunfinished");
    assert_eq!(filter(&since("2026-01-02T15:04:08.000000002Z"), &[LOG]), "unfinished");
    assert_eq!(filter(&since("2026-01-02T15:04:05.1Z"), &[LOG])[..4], *"one\n");
    assert_eq!(filter(&since("2026-01-02T15:04:05.100000001Z"), &[LOG])[..4], *"two\n");
    assert_eq!(filter(&Wanted { lines: Some(3), ..Wanted::default() }, &[LOG]), "one\ntwo");
    for bytes in 0..40 {
        let whole = filter(&Wanted { timestamps: true, ..Wanted::default() }, &[LOG]);
        let cut = Wanted { timestamps: true, bytes: Some(bytes), ..Wanted::default() };
        assert_eq!(filter(&cut, &[LOG]), whole[..usize::try_from(bytes).unwrap()]);
    }
}

#[test]
fn what_is_no_line_is_left_out() {
    for noise in [
        "\n",
        "x\n",
        "2026-01-02T15:04:05Z stdout F\n",
        "2026-01-02T15:04:05 stdout F a\n",
        "2026-13-02T15:04:05Z stdout F a\n",
        "2026-01-02T15:04:05.Z stdout F a\n",
        "2026-01-02T15:04:05Z stdin F a\n",
        "{\"log\":\"a b c d\"}\n",
        &format!("{}\n", "x".repeat(1000)),
        &format!("2026-01-02T15:04:05Z stdout {} \n", "F:".repeat(200)),
    ] {
        let log = format!("{noise}2026-01-02T15:04:05Z stdout F a\n");
        assert_eq!(filter(&Wanted::default(), &[log.as_bytes()]), "a\n", "{noise:?}");
    }
}

/// Line by line over the whole, as the upstream kubelet does it.
fn naive(wanted: &Wanted, log: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut left = wanted.lines.unwrap_or(u64::MAX);
    let mut begins = true;
    for line in log.split_inclusive(|byte| *byte == b'\n') {
        if left == 0 {
            break;
        }
        let parts: Vec<&[u8]> = line.splitn(4, |byte| *byte == b' ').collect();
        let [time, stream, tags, text] = parts[..] else { continue };
        let time = std::str::from_utf8(time).ok().filter(|_| tags.len() < 100);
        let Some(at) = time.and_then(|time| time.parse::<Timestamp>().ok()) else { continue };
        if stream != b"stdout" && stream != b"stderr" {
            continue;
        }
        let partial = tags == b"P" || tags.starts_with(b"P:");
        let text = if partial { text.strip_suffix(b"\n").unwrap_or(text) } else { text };
        let is_wanted = match wanted.stream {
            Which::All => true,
            Which::Stdout => stream == b"stdout",
            Which::Stderr => stream == b"stderr",
        };
        if is_wanted && wanted.since.is_none_or(|since| at >= since) {
            if wanted.timestamps && begins {
                out.extend_from_slice(format!("{at:.9} ").as_bytes());
            }
            out.extend_from_slice(text);
        }
        left -= 1;
        begins = text.last().is_none_or(|last| *last == b'\n');
    }
    out.truncate(usize::try_from(wanted.bytes.unwrap_or(u64::MAX)).unwrap());
    out
}

/// A log with some of everything, and damage.
fn log(dice: &mut StdRng) -> Vec<u8> {
    let mut log = Vec::new();
    for _ in 0..dice.random_range(0..30) {
        let second = dice.random_range(0..60);
        let fraction = ["", ".5", ".000000001", ".123456789"][dice.random_range(0..4)];
        let stream =
            ["stdout", "stderr", "stdin"][dice.random_range(0..100) % 3 % 2 + usize::from(dice.random_bool(0.05))];
        let tag = ["F", "P", "F:a", "P:b"][dice.random_range(0..4)];
        let text: String =
            (0..dice.random_range(0..40)).map(|_| ['a', ' ', 'é', ':'][dice.random_range(0..4)]).collect();
        let line = format!("2026-01-02T15:04:{second:02}{fraction}Z {stream} {tag} {text}\n");
        let line = match dice.random_range(0..20) {
            0 => "\n".to_owned(),
            1 => line.replace(' ', ""),
            2 => format!("{}\n", "y".repeat(dice.random_range(0..400))),
            _ => line,
        };
        log.extend_from_slice(line.as_bytes());
    }
    let cut = if log.is_empty() { 0 } else { dice.random_range(0..log.len()) };
    if dice.random_bool(0.5) {
        log.truncate(cut);
    }
    log
}

#[test]
fn any_log_in_any_pieces_reads_as_line_by_line() {
    let first = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    for seed in first.map_or(0..3000, |seed: u64| seed..seed + 1) {
        let mut dice = StdRng::seed_from_u64(seed);
        let log = log(&mut dice);
        let second = dice.random_range(0..60);
        let wanted = Wanted {
            since: dice.random_bool(0.3).then(|| format!("2026-01-02T15:04:{second:02}.5Z").parse().unwrap()),
            timestamps: dice.random(),
            bytes: dice.random_bool(0.3).then(|| dice.random_range(0..500)),
            lines: dice.random_bool(0.3).then(|| dice.random_range(0..20)),
            stream: [Which::All, Which::Stdout, Which::Stderr][dice.random_range(0..3)],
        };
        let mut filter = Filter::new(&wanted);
        let (mut out, mut rest) = (Vec::new(), &log[..]);
        while !rest.is_empty() {
            let (piece, left) = rest.split_at(dice.random_range(1..=rest.len().min(50)));
            filter.feed(piece, &mut out);
            rest = left;
        }
        // A head that was cut off by the end of the file is no line to either.
        assert_eq!(
            String::from_utf8_lossy(&out),
            String::from_utf8_lossy(&naive(&wanted, &log)),
            "seed {seed}: {wanted:?} of {:?}",
            String::from_utf8_lossy(&log)
        );
    }
}
