//! The memory that work took and rest does not need.
//!
//! A start touches most of the program's code once: arguments, certificates, migrations, the first look at everything; and so does, later,
//! what there is newly to do. Those pages stay mapped, and count as this process's, until the kernel is short of memory. Given back, what is
//! needed again comes from the page cache.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::time::Duration;

use nix::sys::mman::{MmapAdvise, madvise};

/// So long after it began work is over: what runs is taken up, and who is to be reached has been or is being tried.
const SETTLED: Duration = Duration::from_secs(15);

/// Waits until the work that begins now is over, then gives back the code it used.
pub async fn settle() {
    tokio::time::sleep(SETTLED).await;
    give_back_code();
}

/// How many bytes that may be at most.
fn give_back_code() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().filter_map(code).map(give_back).sum()
}

/// The addresses of a mapping of code: a file's, private, and not writable. Nobody here makes code writable or writes into it, so what is
/// mapped again is what was dropped.
fn code(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_ascii_whitespace();
    let (range, permissions) = (words.next()?, words.next()?);
    let inode = words.nth(2)?;
    if permissions != "r-xp" || inode == "0" {
        return None;
    }
    let (from, to) = range.split_once('-')?;
    Some((usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?))
}

#[expect(unsafe_code, reason = "madvise")]
fn give_back((from, to): (usize, usize)) -> usize {
    let Some(start) = NonNull::new(std::ptr::with_exposed_provenance_mut::<c_void>(from)) else { return 0 };
    // SAFETY: the range is a private mapping of a file without write permission, so its pages are the file's: dropped ones are mapped
    // again at the next access with the same content.
    match unsafe { madvise(start, to - from, MmapAdvise::MADV_DONTNEED) } {
        Ok(()) => to - from,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_is_given_back() {
        assert_eq!(
            code("55d0a000-55d0c000 r-xp 00002000 fe:00 1234   /usr/bin/edgecore"),
            Some((0x55d0_a000, 0x55d0_c000))
        );
        for line in [
            "55d0a000-55d0c000 r--p 00002000 fe:00 1234   /usr/bin/edgecore",
            "55d0a000-55d0c000 rw-p 00002000 fe:00 1234   /usr/bin/edgecore",
            "7ffd1000-7ffd3000 r-xp 00000000 00:00 0      [vdso]",
            "",
        ] {
            assert_eq!(code(line), None, "{line}");
        }
    }

    #[test]
    fn the_program_goes_on_without_its_pages() {
        let given = give_back_code();
        assert!(given > 1 << 20, "{given}");
    }
}
