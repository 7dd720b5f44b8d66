//! The memory that work took and rest does not need.
//!
//! A start touches most of the program's code and constants once: relocations, arguments, certificates, migrations, the first look at
//! everything; and so does, later, what there is newly to do. Those pages stay mapped, and count as this process's, until the kernel is short of
//! memory. Given back, what is needed again comes from the page cache.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::time::Duration;

use nix::sys::mman::{MmapAdvise, madvise};

/// So long after it began work is over: what runs is taken up, and who is to be reached has been or is being tried.
const SETTLED: Duration = Duration::from_secs(15);

/// Waits until the work that begins now is over, then gives back the code and the constants it used.
pub async fn settle() {
    tokio::time::sleep(SETTLED).await;
    give_back_files();
}

/// How many bytes that may be at most.
fn give_back_files() -> usize {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    unwritten(&smaps).into_iter().map(give_back).sum()
}

/// The addresses of what is a file's, private, not writable, and as it is in the file (`Anonymous` in proc(5)): what the loader has
/// relocated and then protected is not. Nobody here makes code or constants writable, so what is mapped again is what was dropped.
fn unwritten(smaps: &str) -> Vec<(usize, usize)> {
    let (mut found, mut mapping) = (Vec::new(), None);
    for line in smaps.lines() {
        match line.split_once(' ') {
            Some(("Anonymous:", size)) => found.extend(mapping.take().filter(|_| size.trim() == "0 kB")),
            Some((field, _)) if field.ends_with(':') => {}
            _ => mapping = file(line),
        }
    }
    found
}

/// The addresses of a mapping if it is a file's, private and not writable.
fn file(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_ascii_whitespace();
    let (range, permissions) = (words.next()?, words.next()?);
    let inode = words.nth(2)?;
    if !matches!(permissions, "r-xp" | "r--p") || inode == "0" {
        return None;
    }
    let (from, to) = range.split_once('-')?;
    Some((usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?))
}

#[expect(unsafe_code, reason = "madvise")]
fn give_back((from, to): (usize, usize)) -> usize {
    let Some(start) = NonNull::new(std::ptr::with_exposed_provenance_mut::<c_void>(from)) else { return 0 };
    // SAFETY: the range is a private mapping of a file, cannot be written and has not been, so its pages are the file's: dropped ones are
    // mapped again at the next access with the same content.
    match unsafe { madvise(start, to - from, MmapAdvise::MADV_DONTNEED) } {
        Ok(()) => to - from,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_as_in_its_file_is_given_back() {
        let mapping = |header: &str, anonymous: usize| {
            format!("{header}\nSize:  8 kB\nRss:  8 kB\nAnonymous:  {anonymous} kB\nVmFlags: rd mr mw me\n")
        };
        let smaps = [
            mapping("55d08000-55d0a000 r--p 00000000 fe:00 1234   /usr/bin/edgecore", 0),
            mapping("55d0a000-55d0c000 r-xp 00002000 fe:00 1234   /usr/bin/edgecore", 0),
            mapping("55d0c000-55d0e000 r--p 00004000 fe:00 1234   /usr/bin/edgecore", 4),
            mapping("55d0e000-55d10000 rw-p 00006000 fe:00 1234   /usr/bin/edgecore", 0),
            mapping("55d10000-55d12000 r--s 00000000 fe:00 1235   /var/lib/shared", 0),
            mapping("7ffd1000-7ffd3000 r-xp 00000000 00:00 0      [vdso]", 0),
        ];
        assert_eq!(unwritten(&smaps.concat()), [(0x55d0_8000, 0x55d0_a000), (0x55d0_a000, 0x55d0_c000)]);
        assert_eq!(unwritten("Anonymous: 0 kB\n\nr-xp\n"), []);
    }

    #[test]
    fn the_program_goes_on_without_its_pages() {
        let given = give_back_files();
        assert!(given > 1 << 20, "{given}");
    }
}
