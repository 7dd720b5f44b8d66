//! JSON lines in a file, which is turned over once when it is full: `PATH` and `PATH.1`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::PathBuf;

use super::queue::Batch;
use super::writer::PushError;
use crate::task;

pub(crate) struct Lines {
    path: PathBuf,
    most: u64,
}

impl Lines {
    pub(crate) fn new(path: PathBuf, most: u64) -> Self {
        Self { path, most }
    }

    pub(crate) async fn push(&mut self, batch: &Batch) -> Result<(), PushError> {
        let mut lines = Vec::with_capacity(batch.bytes.len());
        for record in batch.iter() {
            lines.extend_from_slice(record);
            lines.push(b'\n');
        }
        let (path, most) = (self.path.clone(), self.most);
        task::blocking(move || append(&path, most, &lines)).await.map_err(|error| PushError::Away(error.to_string()))
    }
}

/// Opens it each time, so that it may be moved or removed by others.
fn append(path: &PathBuf, most: u64, lines: &[u8]) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let open = || -> io::Result<File> { OpenOptions::new().create(true).append(true).open(path) };
    let mut file = open()?;
    // Two files share the bound.
    if file.metadata()?.len() + lines.len() as u64 > most / 2 {
        let mut old = path.clone().into_os_string();
        old.push(".1");
        std::fs::rename(path, old)?;
        file = open()?;
    }
    file.write_all(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_files_stay_within_the_bound() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/er/values.json");
        let lines = [b'x'; 1000];
        for _ in 0..500 {
            append(&path, 100_000, &lines).unwrap();
        }
        let sizes: Vec<u64> = std::fs::read_dir(path.parent().unwrap())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().sum::<u64>() <= 100_000 && sizes.iter().max() >= Some(&49_000), "{sizes:?}");
    }
}
