//! Batches on disk: files of some batches each, oldest first. Blocking; called off the main thread.
//!
//! A file is a sequence of `length, records, check sum, bytes`. What does not add up, because the power went while it was written, ends the
//! file.

use std::collections::{HashSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use super::queue::Batch;
use crate::counters::COUNTERS;

/// A file is closed when it has this many bytes, so the oldest is dropped in pieces of this size, and at most this much arrives twice.
const SEGMENT: u64 = 1 << 20;
const HEAD: usize = 16;
/// A file that could not be read so often is given up.
const ATTEMPTS: u8 = 3;
/// No batch is longer: 64 KiB and one value, which has at most 64 KiB before it is escaped.
const LONGEST: usize = 1 << 20;

/// The batches of one sink on disk.
#[derive(Debug)]
pub(crate) struct Store {
    directory: PathBuf,
    most: u64,
    segments: VecDeque<Segment>,
    /// Of the first segment: its batches that are not pushed yet, once it is read.
    head: Option<VecDeque<Batch>>,
    /// The last segment while it is written.
    tail: Option<File>,
    /// Whether some of it would not outlast a power cut yet.
    is_unsafe: bool,
    next: u64,
    /// How often the first segment could not be read.
    misread: u8,
}

#[derive(Debug)]
struct Segment {
    number: u64,
    bytes: u64,
    records: u64,
}

impl Store {
    /// Opens a sink's directory, which need not be there yet.
    pub(crate) fn open(directory: PathBuf, most: u64) -> io::Result<Self> {
        let mut numbers = Vec::new();
        match std::fs::read_dir(&directory) {
            Ok(entries) => {
                for entry in entries {
                    let name = entry?.file_name();
                    let number = name.to_str().and_then(|name| name.strip_suffix(".batches")?.parse::<u64>().ok());
                    numbers.extend(number);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        numbers.sort_unstable();
        let next = numbers.last().map_or(0, |last| last + 1);
        let mut store = Self {
            directory,
            most: most.max(2 * SEGMENT),
            segments: VecDeque::new(),
            head: None,
            tail: None,
            is_unsafe: false,
            next,
            misread: 0,
        };
        for number in numbers {
            // One that cannot be read is tried again when it is its turn.
            let batches = store.read(number).unwrap_or_default();
            let records = batches.iter().map(|batch| u64::from(batch.records)).sum();
            let bytes = std::fs::metadata(store.path(number)).map_or(0, |about| about.len());
            COUNTERS.stored_bytes.add(bytes);
            store.segments.push_back(Segment { number, bytes, records });
        }
        Ok(store)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Appends a batch; drops the oldest file when there are too many bytes. It outlasts a power cut after [`Store::sync`].
    pub(crate) fn append(&mut self, batch: &Batch) -> io::Result<()> {
        let tail = match &mut self.tail {
            Some(tail) => tail,
            None => {
                std::fs::create_dir_all(&self.directory)?;
                let number = self.next;
                let file = OpenOptions::new().create_new(true).append(true).open(self.path(number))?;
                File::open(&self.directory)?.sync_all()?;
                self.next += 1;
                self.segments.push_back(Segment { number, bytes: 0, records: 0 });
                self.tail.insert(file)
            }
        };
        let mut framed = Vec::with_capacity(HEAD + batch.bytes.len());
        framed.extend_from_slice(&u32::try_from(batch.bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
        framed.extend_from_slice(&batch.records.to_be_bytes());
        framed.extend_from_slice(&xxh3_64(&batch.bytes).to_be_bytes());
        framed.extend_from_slice(&batch.bytes);
        if let Err(error) = tail.write_all(&framed) {
            // Half a batch may be there: it goes, or else it ends that file.
            let whole = self.segments.back().map_or(0, |last| last.bytes);
            if tail.set_len(whole).is_err() {
                self.tail = None;
                if whole == 0
                    && let Some(empty) = self.segments.pop_back()
                {
                    self.head = self.head.take().filter(|_| !self.segments.is_empty());
                    let _ = std::fs::remove_file(self.path(empty.number));
                }
            }
            return Err(error);
        }
        self.is_unsafe = true;
        let bytes = framed.len() as u64;
        COUNTERS.stored_bytes.add(bytes);
        if self.segments.len() == 1
            && let Some(head) = &mut self.head
        {
            head.push_back(batch.clone());
        }
        if let Some(last) = self.segments.back_mut() {
            last.bytes += bytes;
            last.records += u64::from(batch.records);
            if last.bytes >= SEGMENT
                && let Some(tail) = self.tail.take()
            {
                tail.sync_data()?;
                self.is_unsafe = false;
            }
        }
        while self.segments.len() > 1 && self.segments.iter().map(|segment| segment.bytes).sum::<u64>() > self.most {
            let pushed = self.pushed_of_head();
            if let Some(oldest) = self.remove_head() {
                COUNTERS.dropped_values_total.add(oldest.records.saturating_sub(pushed));
            }
        }
        Ok(())
    }

    /// Makes what was appended outlast a power cut.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        if let Some(tail) = self.tail.as_ref().filter(|_| self.is_unsafe) {
            tail.sync_data()?;
        }
        self.is_unsafe = false;
        Ok(())
    }

    /// The oldest batch. A file that cannot be read is given up in the end, and the next one is the oldest.
    pub(crate) fn front(&mut self) -> io::Result<Option<Batch>> {
        loop {
            let Some(number) = self.segments.front().map(|segment| segment.number) else { return Ok(None) };
            if self.head.is_none() {
                match self.read(number) {
                    Ok(batches) => self.head = Some(batches.into()),
                    Err(error) => {
                        self.misread += 1;
                        if self.misread >= ATTEMPTS
                            && let Some(lost) = self.remove_head()
                        {
                            COUNTERS.dropped_values_total.add(lost.records);
                        }
                        return Err(error);
                    }
                }
            }
            match self.head.as_ref().and_then(VecDeque::front) {
                Some(batch) => return Ok(Some(batch.clone())),
                None => drop(self.remove_head()),
            }
        }
    }

    /// Forgets the oldest batch, if it is this one.
    pub(crate) fn done(&mut self, batch: &Batch) {
        let Some(head) = &mut self.head else { return };
        if head.front() == Some(batch) {
            head.pop_front();
            if head.is_empty() {
                self.remove_head();
            }
        }
    }

    fn pushed_of_head(&self) -> u64 {
        match (&self.head, self.segments.front()) {
            (Some(head), Some(segment)) => {
                let left: u64 = head.iter().map(|batch| u64::from(batch.records)).sum();
                segment.records.saturating_sub(left)
            }
            _ => 0,
        }
    }

    fn remove_head(&mut self) -> Option<Segment> {
        let segment = self.segments.pop_front()?;
        (self.head, self.misread) = (None, 0);
        if self.segments.is_empty() {
            self.tail = None;
        }
        let _ = std::fs::remove_file(self.path(segment.number));
        COUNTERS.stored_bytes.set(COUNTERS.stored_bytes.value().saturating_sub(segment.bytes));
        Some(segment)
    }

    fn path(&self, number: u64) -> PathBuf {
        path(&self.directory, number)
    }

    fn read(&self, number: u64) -> io::Result<Vec<Batch>> {
        let mut bytes = Vec::new();
        // A file is closed at the first batch that fills it.
        File::open(self.path(number))?.take(SEGMENT + 2 * LONGEST as u64).read_to_end(&mut bytes)?;
        Ok(parse(&bytes))
    }
}

/// Removes the directories of targets that are not `known`, and with them what waits there; how many bytes that was.
pub(crate) fn sweep(directory: &Path, known: &HashSet<String>) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name();
        let is_target = |name: &&str| name.len() == 16 && u64::from_str_radix(name, 16).is_ok();
        let Some(name) = name.to_str().filter(is_target).filter(|name| !known.contains(*name)) else { continue };
        let target = directory.join(name);
        for file in std::fs::read_dir(&target)? {
            let file = file?;
            if file.path().extension().is_some_and(|of| of == "batches") {
                bytes += file.metadata()?.len();
                std::fs::remove_file(file.path())?;
            }
        }
        std::fs::remove_dir(target)?;
    }
    Ok(bytes)
}

fn path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:012}.batches"))
}

/// The batches of a file, up to the first that is not whole.
fn parse(mut bytes: &[u8]) -> Vec<Batch> {
    let mut batches = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() {
        let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (length, records) = (word(0) as usize, word(4));
        let sum = u64::from(word(8)) << 32 | u64::from(word(12));
        let Some((content, after)) = rest.split_at_checked(length) else { break };
        if length > LONGEST || xxh3_64(content) != sum {
            break;
        }
        batches.push(Batch { bytes: content.to_vec(), records });
        bytes = after;
    }
    batches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn batch(text: &str, length: usize) -> Batch {
        let mut batch = Batch::default();
        batch.push(|bytes| {
            bytes.extend_from_slice(text.as_bytes());
            bytes.resize(bytes.len() + length, b'.');
        });
        batch
    }

    #[test]
    fn batches_come_back_in_order_also_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path().join("a"), 8 << 20).unwrap();
        let batches: Vec<Batch> = (0..100).map(|count| batch(&count.to_string(), 50_000)).collect();
        for batch in &batches[..90] {
            store.append(batch).unwrap();
        }
        for batch in &batches[..50] {
            assert_eq!(store.front().unwrap().as_ref(), Some(batch));
            store.done(batch);
        }
        drop(store);
        let mut store = Store::open(directory.path().join("a"), 8 << 20).unwrap();
        for batch in &batches[90..] {
            store.append(batch).unwrap();
        }
        let first = store.front().unwrap().unwrap();
        let at = batches.iter().position(|batch| *batch == first).unwrap();
        assert!(at <= 50 && at > 20, "at most one file is repeated: {at}");
        for batch in &batches[at..] {
            assert_eq!(store.front().unwrap().as_ref(), Some(batch));
            store.done(batch);
        }
        assert!(store.front().unwrap().is_none() && store.is_empty());
        assert_eq!(std::fs::read_dir(directory.path().join("a")).unwrap().count(), 0);
    }

    #[test]
    fn what_is_too_much_drops_the_oldest() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path().to_owned(), 3 << 20).unwrap();
        for count in 0..200 {
            store.append(&batch(&count.to_string(), 50_000)).unwrap();
        }
        let bytes: u64 =
            std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert!(bytes <= 3 << 20, "{bytes}");
        let first = store.front().unwrap().unwrap();
        let text = String::from_utf8(first.iter().next().unwrap().to_vec()).unwrap();
        let count: u32 = text.trim_end_matches('.').parse().unwrap();
        assert!((130..200).contains(&count), "{count}");
    }

    #[test]
    fn a_file_that_cannot_be_read_is_given_up_and_the_next_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path().to_owned(), 8 << 20).unwrap();
        store.append(&batch("one", 1 << 20)).unwrap();
        store.append(&batch("two", 100)).unwrap();
        drop(store);
        let file = path(directory.path(), 0);
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        let mut store = Store::open(directory.path().to_owned(), 8 << 20).unwrap();
        for _ in 0..ATTEMPTS {
            store.front().unwrap_err();
        }
        assert_eq!(store.front().unwrap(), Some(batch("two", 100)));
        store.append(&batch("three", 100)).unwrap();
        store.sync().unwrap();
        assert!(!store.is_unsafe);
    }

    #[test]
    fn what_waits_for_a_target_that_nobody_names_goes() {
        let directory = tempfile::tempdir().unwrap();
        let of = |name: &str| directory.path().join(name);
        for name in ["00000000000000aa", "00000000000000bb"] {
            Store::open(of(name), 8 << 20).unwrap().append(&batch("one", 100)).unwrap();
        }
        std::fs::create_dir(of("mine")).unwrap();
        let known = HashSet::from(["00000000000000bb".to_owned()]);
        assert!(sweep(directory.path(), &known).unwrap() > 100);
        assert!(!of("00000000000000aa").exists() && of("mine").exists());
        assert!(!Store::open(of("00000000000000bb"), 8 << 20).unwrap().is_empty());
        assert_eq!(sweep(directory.path(), &known).unwrap(), 0);
    }

    #[test]
    fn a_file_that_takes_nothing_does_not_stay() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path().to_owned(), 8 << 20).unwrap();
        File::create(path(directory.path(), 0)).unwrap();
        store.segments.push_back(Segment { number: 0, bytes: 0, records: 0 });
        (store.tail, store.next) = (Some(File::open(path(directory.path(), 0)).unwrap()), 1);
        store.append(&batch("one", 100)).unwrap_err();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        assert!(store.is_empty() && store.front().unwrap().is_none());
        store.append(&batch("one", 100)).unwrap();
        assert_eq!(store.front().unwrap(), Some(batch("one", 100)));
    }

    #[test]
    fn a_file_that_was_cut_ends_there() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path().to_owned(), 8 << 20).unwrap();
        store.append(&batch("one", 100)).unwrap();
        store.append(&batch("two", 100)).unwrap();
        drop(store);
        let file = path(directory.path(), 0);
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        let mut store = Store::open(directory.path().to_owned(), 8 << 20).unwrap();
        assert_eq!(store.front().unwrap(), Some(batch("one", 100)));
        store.done(&batch("one", 100));
        assert_eq!(store.front().unwrap(), None);
    }

    proptest! {
        #[test]
        fn no_file_breaks_it(bytes: Vec<u8>) {
            parse(&bytes);
        }
    }
}
