//! Reads the mount table, `/proc/self/mountinfo`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) mount_point: PathBuf,
    pub(crate) fs_type: String,
    /// Options of the file system; for cgroup v1 they name its controllers.
    pub(crate) super_options: String,
    /// Mounts made below it show up in the peers of its group.
    pub(crate) is_shared: bool,
}

/// The whole table, oldest mount first.
pub(crate) fn read() -> io::Result<Vec<Entry>> {
    scan(|_| true)
}

/// The mounts strictly below a directory or on it, oldest first. `dir` must hold no symbolic link.
///
/// The kernel hands the table out in pieces between which it may change, so it is read until two readings agree on these mounts: what
/// is deleted on the strength of it must not have a mount hidden in a seam.
pub(crate) fn at_or_below(dir: &Path) -> io::Result<Vec<Entry>> {
    const PATIENCE: usize = 8;
    let mut entries = scan(|mount_point| mount_point.starts_with(dir))?;
    for _ in 0..PATIENCE {
        let again = scan(|mount_point| mount_point.starts_with(dir))?;
        if again == entries {
            return Ok(entries);
        }
        entries = again;
    }
    Err(io::Error::new(io::ErrorKind::WouldBlock, "mounts come and go too fast to be listed"))
}

/// The mounts that a single reading of the table shows at points that matter, oldest first.
pub(crate) fn scan(matters: impl Fn(&Path) -> bool) -> io::Result<Vec<Entry>> {
    parse(BufReader::new(File::open("/proc/self/mountinfo")?), matters)
}

/// Parses a table line by line; lines that make no sense are left out.
fn parse(mut table: impl BufRead, matters: impl Fn(&Path) -> bool) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut line = Vec::new();
    while table.read_until(b'\n', &mut line)? > 0 {
        entries.extend(parse_line(line.strip_suffix(b"\n").unwrap_or(&line), &matters));
        line.clear();
    }
    Ok(entries)
}

fn parse_line(line: &[u8], matters: impl Fn(&Path) -> bool) -> Option<Entry> {
    // 36 35 98:0 /root /mount/point rw,noatime shared:1 master:2 - ext3 /dev/root rw,errors=continue
    let mut fields = line.split(|byte| *byte == b' ').filter(|field| !field.is_empty());
    let mount_point = unescape(fields.by_ref().nth(4)?);
    if !mount_point.starts_with(b"/") || mount_point.ends_with(b"//deleted") {
        return None;
    }
    let mount_point = PathBuf::from(OsString::from_vec(mount_point));
    if !matters(&mount_point) {
        return None;
    }
    let _options = fields.next()?;
    let mut is_shared = false;
    loop {
        match fields.next()? {
            b"-" => break,
            tag => is_shared |= tag.starts_with(b"shared:"),
        }
    }
    let fs_type = text(fields.next()?);
    let _source = fields.next()?;
    let super_options = text(fields.next().unwrap_or_default());
    Some(Entry { mount_point, fs_type, super_options, is_shared })
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&unescape(field)).into_owned()
}

/// Undoes the kernel's `\ooo`. A backslash without three octal digits stands for itself.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, after)) = rest.split_first() {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) = (*byte, after) {
            out.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
            rest = tail;
        } else {
            out.push(*byte);
            rest = after;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_of_all_kinds() {
        let table = b"36 35 98:0 /a /mnt/two\\040words\\134x rw shared:1 master:2 - ext3 /dev/sda rw,errors=x\n\
            31 23 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
            40 1 0:4 / /tmp/\\303\\244\\012b rw - tmpfs  rw\n\
            41 1 0:4 / /gone//deleted rw - tmpfs none rw\n\
            nonsense\n\n1 2 3 4 /short rw";
        let entries = parse(&table[..], |_| true).unwrap();
        let points: Vec<_> = entries.iter().map(|entry| entry.mount_point.as_path()).collect();
        assert_eq!(
            points,
            [Path::new("/mnt/two words\\x"), Path::new("/sys/fs/cgroup/cpu,cpuacct"), Path::new("/tmp/ä\nb")]
        );
        assert!(entries[0].is_shared && !entries[1].is_shared);
        let some = parse(&table[..], |path| path.starts_with("/sys")).unwrap();
        assert_eq!(some, entries[1..2]);
        assert_eq!((entries[1].fs_type.as_str(), entries[1].super_options.as_str()), ("cgroup", "rw,cpu,cpuacct"));
    }

    #[test]
    fn the_real_table_has_a_root() {
        assert!(read().unwrap().iter().any(|entry| entry.mount_point == Path::new("/")));
    }

    proptest! {
        #[test]
        fn escaping_is_undone(name in proptest::collection::vec(1u8.., 1..40)) {
            let mut escaped = Vec::new();
            for byte in &name {
                match byte {
                    b' ' | b'\t' | b'\n' | b'\\' | b'#' => escaped.extend(format!("\\{byte:03o}").bytes()),
                    other => escaped.push(*other),
                }
            }
            prop_assert_eq!(unescape(&escaped), name);
        }

        #[test]
        fn garbage_never_panics(table in proptest::collection::vec(any::<u8>(), 0..300)) {
            parse(&table[..], |_| true).unwrap();
        }
    }
}
