//! Reads a log file through the filter, a bounded piece at a time, across rotation. Blocks on the disk.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use super::lines::{Filter, Wanted};
use super::tail::tail_start;

/// Bytes that are read at once.
const PIECE: usize = 64 << 10;
/// Reads of which nothing was wanted, before somebody else gets the thread.
const READS: usize = 32;

/// A log that is being read.
#[derive(Debug)]
pub(crate) struct Reader {
    path: PathBuf,
    file: File,
    filter: Filter,
    buffer: Vec<u8>,
    /// The file was replaced; what it still holds comes first.
    replaced: bool,
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
        Ok(Self { path, file, filter: Filter::new(wanted), buffer: vec![0; PIECE], replaced: false })
    }

    /// The next piece of what is wanted; empty when there is none now. `follow`: the file's name may come to be another file's.
    pub(crate) fn piece(&mut self, follow: bool) -> io::Result<(Vec<u8>, Next)> {
        let mut out = Vec::new();
        for _ in 0..READS {
            if self.filter.is_done() {
                return Ok((out, Next::Done));
            }
            let read = match self.file.read(&mut self.buffer) {
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
        let there = match fs::metadata(&self.path) {
            Ok(there) => there,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let here = self.file.metadata()?;
        if is_same(&here, &there) {
            if there.len() >= self.file.stream_position()? {
                return Ok(false);
            }
            // Cut short by somebody.
            self.file.rewind()?;
        } else if self.replaced {
            self.file = match open(&self.path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(error),
            };
            self.replaced = false;
        } else {
            // Between the end that was seen and the new file more may have been written to the old one, and after it nothing.
            self.replaced = true;
            return Ok(true);
        }
        self.filter.next_file();
        Ok(true)
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
