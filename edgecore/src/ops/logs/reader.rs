//! Reads a log file through the filter, a bounded piece at a time, across rotation: whoever is slower than the writer reads what was rotated
//! meanwhile in its order, as far as it is kept. A file that was removed is held while it is read, and no longer. Blocks on the disk.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::lines::{Filter, Wanted};
use super::tail::tail_start;
use crate::clock;
use crate::kubelet::logs;

/// Bytes that are read at once.
const PIECE: usize = 64 << 10;
/// Reads of which nothing was wanted, before somebody else gets the thread.
const READS: usize = 32;

/// A log that is being read.
#[derive(Debug)]
pub(crate) struct Reader {
    path: PathBuf,
    /// None: it was let go of.
    file: Option<File>,
    filter: Filter,
    buffer: Vec<u8>,
    /// The file was replaced; what it still holds comes first.
    replaced: bool,
    /// Something was read of it since it was looked at.
    is_read: bool,
    /// Bytes that were let go of, of which nobody has been told.
    lost: u64,
}

/// What comes after a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The next piece.
    More,
    /// Nothing yet: the end of what there is.
    End,
    /// Nothing ever: as many bytes or lines as were wanted have been read.
    Done,
}

impl Reader {
    /// Opens a log, at its last `tail` lines if there is such a number.
    pub(crate) fn open(path: &Path, wanted: &Wanted, tail: Option<u64>) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let mut file = open(&path)?;
        if let Some(lines) = tail {
            let size = file.metadata()?.len();
            let start = tail_start(size, lines, |from, buffer| file.read_exact_at(buffer, from))?;
            file.seek(SeekFrom::Start(start))?;
        }
        let (filter, buffer) = (Filter::new(wanted), vec![0; PIECE]);
        Ok(Self { path, file: Some(file), filter, buffer, replaced: false, is_read: true, lost: 0 })
    }

    /// Lets go of a file that was removed if nothing was read of it since this was called last: it takes room on the disk for as long as
    /// somebody holds it.
    pub(crate) fn let_go(&mut self) {
        if std::mem::take(&mut self.is_read) {
            return;
        }
        let Some(file) = &mut self.file else { return };
        if let (Ok(there), Ok(at)) = (file.metadata(), file.stream_position())
            && there.nlink() == 0
        {
            self.lost = there.len().saturating_sub(at);
            (self.file, self.replaced) = (None, false);
        }
    }

    /// The next piece of what is wanted; empty when there is none now. `follow`: the file's name may come to be another file's.
    pub(crate) fn piece(&mut self, follow: bool) -> io::Result<(Vec<u8>, Next)> {
        let mut out = Vec::new();
        self.is_read = true;
        for _ in 0..READS {
            if self.filter.is_done() {
                return Ok((out, Next::Done));
            }
            let Some(file) = &mut self.file else {
                self.tell_of_loss(&mut out);
                self.file = if follow { self.next_file()? } else { None };
                if self.file.is_none() {
                    return Ok((out, Next::End));
                }
                continue;
            };
            let read = match file.read(&mut self.buffer) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if read == 0 {
                if follow && self.goes_on()? {
                    continue;
                }
                return Ok((out, Next::End));
            }
            self.filter.feed(&self.buffer[..read], &mut out);
            if out.len() >= PIECE / 2 {
                break;
            }
        }
        let next = if self.filter.is_done() { Next::Done } else { Next::More };
        Ok((out, next))
    }

    /// At the end of the file: whether there is another one, or the same from its beginning.
    fn goes_on(&mut self) -> io::Result<bool> {
        let Some(file) = &mut self.file else { return Ok(false) };
        let here = file.metadata()?;
        let there = match fs::metadata(&self.path) {
            Ok(there) => there,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if is_same(&here, &there) {
            if there.len() >= file.stream_position()? {
                return Ok(false);
            }
            // Cut short by somebody.
            file.rewind()?;
        } else if self.replaced {
            let Some(next) = self.next_file()? else { return Ok(false) };
            self.file = Some(next);
            self.replaced = false;
        } else {
            // Between the end that was seen and the new file more may have been written to the old one, and after it nothing.
            self.replaced = true;
            return Ok(true);
        }
        self.filter.next_file();
        Ok(true)
    }

    /// The file that was begun after the one in hand. If that was removed it was the oldest: the oldest that there is came after it.
    fn next_file(&self) -> io::Result<Option<File>> {
        let here = self.file.as_ref().map(File::metadata).transpose()?;
        let is_here = |path: &PathBuf| {
            let there = fs::symlink_metadata(path).ok();
            here.as_ref().zip(there).is_some_and(|(here, there)| is_same(here, &there))
        };
        let mut rotated = logs::rotated(&self.path).map_err(io::Error::other)?;
        loop {
            let behind = rotated.iter().position(is_here).map_or(0, |at| at + 1);
            let mut found = None;
            for path in rotated[behind..].iter().chain([&self.path]) {
                found = match open(path) {
                    Ok(file) => Some(file),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                };
                break;
            }
            // One that was rotated just now comes before the one that was opened.
            let now = logs::rotated(&self.path).map_err(io::Error::other)?;
            if now == rotated {
                return Ok(found);
            }
            rotated = now;
        }
    }

    fn tell_of_loss(&mut self, out: &mut Vec<u8>) {
        self.filter.next_file();
        if self.lost > 0 {
            let words = format!(
                "{} stderr F skerry: {} bytes of this log were removed before they were read here\n",
                clock::wall(),
                std::mem::take(&mut self.lost)
            );
            self.filter.feed(words.as_bytes(), out);
        }
    }
}

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

fn open(path: &Path) -> io::Result<File> {
    // A pipe in its place must hold up nobody.
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a file", path.display())))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn line(text: impl std::fmt::Display) -> String {
        format!("2026-01-02T15:04:05.123456789Z stdout F {text}\n")
    }

    fn all(reader: &mut Reader, follow: bool) -> String {
        let mut text = Vec::new();
        loop {
            let (piece, next) = reader.piece(follow).unwrap();
            text.extend(piece);
            if next != Next::More {
                return String::from_utf8(text).unwrap();
            }
        }
    }

    #[test]
    fn a_log_is_followed_across_rotation_and_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(&path, (0..5).map(line).collect::<String>()).unwrap();
        let mut reader = Reader::open(&path, &Wanted::default(), Some(2)).unwrap();
        assert_eq!(all(&mut reader, true), "3\n4\n");
        let mut old = OpenOptions::new().append(true).open(&path).unwrap();
        write!(old, "{}", line(5)).unwrap();
        fs::rename(&path, dir.path().join("0.log.1")).unwrap();
        write!(old, "{}", line(6)).unwrap();
        assert_eq!(all(&mut reader, true), "5\n6\n");
        write!(old, "{}", line(7)).unwrap();
        fs::write(&path, line(8)).unwrap();
        assert_eq!(all(&mut reader, true), "7\n8\n");
        fs::write(&path, line("")).unwrap();
        assert_eq!(all(&mut reader, true), "\n");
        fs::remove_file(&path).unwrap();
        assert_eq!(all(&mut reader, true), "");
        assert!(Reader::open(dir.path(), &Wanted::default(), None).is_err());
    }

    #[test]
    fn who_is_slower_than_rotation_reads_what_is_left_in_its_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let rotated = |stamp: &str| dir.path().join(format!("0.log.{stamp}"));
        fs::write(rotated("20260101-000000"), line("before")).unwrap();
        fs::write(&path, line(1)).unwrap();
        let mut reader = Reader::open(&path, &Wanted::default(), None).unwrap();
        assert_eq!(all(&mut reader, true), "1\n");
        for (text, stamp) in [(2, "20260102-000000"), (3, "20260102-000010"), (4, "20260102-000020")] {
            fs::rename(&path, rotated(stamp)).unwrap();
            fs::write(&path, line(text)).unwrap();
        }
        fs::write(rotated("20260102-000005.gz"), "packed by somebody").unwrap();
        assert_eq!(all(&mut reader, true), "2\n3\n4\n");
        // What was removed while it was read is read to its end, and what was removed unread is not held.
        let long = [line(5), line("x".repeat(1 << 20)), line("unread")].concat();
        fs::write(&path, &long).unwrap();
        let mut reader = Reader::open(&path, &Wanted::default(), None).unwrap();
        let (piece, _) = reader.piece(true).unwrap();
        assert!(piece.starts_with(b"5\n"));
        fs::remove_file(&path).unwrap();
        for stamp in ["20260101-000000", "20260102-000000", "20260102-000010", "20260102-000020"] {
            fs::remove_file(rotated(stamp)).unwrap();
        }
        fs::write(rotated("20260103-000000"), line(6)).unwrap();
        fs::write(&path, line(7)).unwrap();
        reader.let_go();
        assert!(reader.file.is_some(), "it is being read");
        reader.let_go();
        assert!(reader.file.is_none());
        let rest = all(&mut reader, true);
        assert!(rest.contains("bytes of this log were removed before") && rest.ends_with("\n6\n7\n"), "{rest}");
    }

    #[test]
    fn pieces_are_bounded_whatever_the_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let text = [line("x".repeat(1 << 20)), (0..20_000).map(line).collect()].concat();
        fs::write(&path, &text).unwrap();
        let mut reader = Reader::open(&path, &Wanted { timestamps: true, ..Wanted::default() }, None).unwrap();
        let mut length = 0;
        loop {
            let (piece, next) = reader.piece(false).unwrap();
            assert!(piece.len() <= 2 * PIECE, "{}", piece.len());
            length += piece.len();
            if next != Next::More {
                break;
            }
        }
        assert_eq!(length, text.len() - 20_001 * " stdout F".len());
    }
}
