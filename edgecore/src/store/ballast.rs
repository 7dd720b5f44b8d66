//! A file that holds nothing and takes a megabyte, so that the store can be opened on a disk that ran full: then it is let go.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use nix::sys::statvfs::statvfs;
use tracing::warn;

/// Its name in the data directory.
pub const FILE: &str = "ballast";
/// What opening a store takes, its log and index included, and a little for the first pods.
const SIZE: usize = 1 << 20;
/// It is only made where so many times as much is free.
const FREE: u64 = 8;

/// Lets the room go. Whether there was any.
pub(super) fn release(data_dir: &Path) -> bool {
    fs::remove_file(data_dir.join(FILE)).is_ok()
}

/// Makes the file if it is not there and there is room enough.
pub(super) fn keep(data_dir: &Path) {
    let path = data_dir.join(FILE);
    let is_whole = fs::metadata(&path).is_ok_and(|file| file.len() == SIZE as u64);
    let has_room = statvfs(data_dir)
        .is_ok_and(|disk| disk.blocks_available().saturating_mul(disk.fragment_size()) >= FREE * SIZE as u64);
    if is_whole || !has_room {
        return;
    }
    if let Err(error) = fill(&path) {
        warn!(%error, "no room can be kept for a full disk");
        let _ = crate::files::remove(&path);
    }
}

/// With what no file system makes smaller: zeros and patterns may take no room.
fn fill(path: &Path) -> io::Result<()> {
    let mut noise = vec![0; SIZE];
    rand::fill(&mut noise[..]);
    let mut file = fs::File::create(path)?;
    file.write_all(&noise)?;
    file.sync_all()
}
