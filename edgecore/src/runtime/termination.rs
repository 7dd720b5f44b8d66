//! The last words of a container: the file it wrote, or the end of its log.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// How much of the file counts.
const MESSAGE_BYTES: u64 = 4096;
/// How much of the log counts.
const LOG_BYTES: usize = 2048;
/// How many lines of the log count.
const LOG_LINES: usize = 80;

/// What is known of an ended container that its message depends on.
pub(crate) struct Ended<'a> {
    /// The runtime's message.
    pub(crate) message: &'a str,
    /// The runtime's reason.
    pub(crate) reason: &'a str,
    pub(crate) exit_code: i32,
    /// The file on this box that the container saw at its termination message path.
    pub(crate) file: Option<&'a str>,
    /// The policy is FallbackToLogsOnError.
    pub(crate) fall_back: bool,
    pub(crate) log_path: &'a str,
}

/// The runtime's message with the container's last words appended.
///
/// Reads files of a few KiB that were written a moment ago, so from memory: not worth another thread.
pub(crate) fn message(ended: &Ended<'_>) -> String {
    let mut words = ended.file.map(|path| tail(Path::new(path), MESSAGE_BYTES).0).unwrap_or_default();
    if words.is_empty() && ended.fall_back && ended.exit_code != 0 && ended.reason != "ContainerCannotRun" {
        let (bytes, cut) = tail(Path::new(ended.log_path), (LOG_BYTES + LOG_LINES * 64) as u64);
        words = log_tail(&bytes, cut);
    }
    let words = String::from_utf8_lossy(&words);
    match (ended.message.is_empty(), words.is_empty()) {
        (_, true) => ended.message.to_owned(),
        (true, false) => words.into_owned(),
        (false, false) => format!("{}: {words}", ended.message),
    }
}

/// The end of a regular file, and whether something before it was cut; nothing if it cannot be read.
fn tail(path: &Path, limit: u64) -> (Vec<u8>, bool) {
    let read = || -> std::io::Result<(Vec<u8>, bool)> {
        // A container that can reach the file's directory may have put a pipe or a link there.
        let flags = (nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_NOFOLLOW).bits();
        let mut file = File::options().read(true).custom_flags(flags).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Ok((Vec::new(), false));
        }
        let skip = metadata.len().saturating_sub(limit);
        file.seek(SeekFrom::Start(skip))?;
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok((bytes, skip > 0))
    };
    read().unwrap_or_default()
}

/// The text of the last lines of a CRI log (`<time> <stream> <tags> <text>`), without what CRI puts before each.
fn log_tail(log: &[u8], cut: bool) -> Vec<u8> {
    let lines: Vec<&[u8]> = log.split_inclusive(|byte| *byte == b'\n').skip(usize::from(cut)).collect();
    let mut text = Vec::new();
    for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let (Some(_), Some(stream), Some(tags), Some(content)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        if stream != b"stdout" && stream != b"stderr" {
            continue;
        }
        let partial = tags.split(|byte| *byte == b':').next() == Some(b"P");
        text.extend_from_slice(if partial { content.strip_suffix(b"\n").unwrap_or(content) } else { content });
    }
    let cut = text.len().saturating_sub(LOG_BYTES);
    text.split_off(cut)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended<'a>(file: Option<&'a str>, log_path: &'a str) -> Ended<'a> {
        Ended { message: "", reason: "Error", exit_code: 1, file, fall_back: true, log_path }
    }

    #[test]
    fn the_file_wins_over_the_log_and_the_runtime_speaks_first() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let (file, log) = (dir.path().join("message"), dir.path().join("0.log"));
        std::fs::write(&file, "x".repeat(5000) + "end")?;
        std::fs::write(&log, "2026-01-01T00:00:00.000000001Z stdout P a\n2026-01-01T00:00:00Z stderr F b\n")?;
        let (file, log) = (file.to_string_lossy(), log.to_string_lossy());

        let words = message(&Ended { message: "runtime", ..ended(Some(&file), &log) });
        assert_eq!(words.len(), "runtime: ".len() + 4096);
        assert!(words.starts_with("runtime: xxx") && words.ends_with("xend"));

        std::fs::write(&*file, "")?;
        assert_eq!(message(&ended(Some(&file), &log)), "ab\n");
        assert_eq!(message(&Ended { exit_code: 0, ..ended(Some(&file), &log) }), "");
        assert_eq!(message(&Ended { fall_back: false, ..ended(Some(&file), &log) }), "");
        assert_eq!(message(&Ended { reason: "ContainerCannotRun", ..ended(None, &log) }), "");
        Ok(())
    }

    #[test]
    fn a_log_is_cut_to_eighty_lines_and_two_kibibytes() {
        let line = |n: usize, width: usize| format!("2026-01-01T00:00:00.000000001Z stdout F {n:0width$}\n");
        let many: String = (0..200).map(|n| line(n, 3)).collect();
        let text = log_tail(many.as_bytes(), true);
        assert_eq!(text.iter().filter(|byte| **byte == b'\n').count(), 80);
        assert!(text.starts_with(b"120\n") && text.ends_with(b"199\n"));
        let wide: String = (0..60).map(|n| line(n, 99)).collect();
        assert_eq!(log_tail(wide.as_bytes(), false).len(), 2048);
    }

    #[test]
    fn a_pipe_does_not_block() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU)?;
        assert_eq!(message(&ended(Some(&pipe.to_string_lossy()), "/nowhere")), "");
        Ok(())
    }
}
