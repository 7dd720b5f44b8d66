//! Tar archives in memory, the same bytes every time: no owners, no times, entries in the order they are added.

/// An archive being written.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
}

impl Archive {
    /// Adds a directory; `path` without a slash at its end.
    pub fn directory(&mut self, path: &str, mode: u32) {
        self.header(&format!("{path}/"), mode, 0, b'5', "");
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.header(path, mode, content.len(), b'0', "");
        self.bytes.extend_from_slice(content);
        let padding = content.len().next_multiple_of(512) - content.len();
        self.bytes.resize(self.bytes.len() + padding, 0);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.header(path, 0o777, 0, b'2', target);
    }

    /// The archive with its end mark.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }

    fn header(&mut self, path: &str, mode: u32, size: usize, kind: u8, target: &str) {
        let mut block = [0_u8; 512];
        put(&mut block, 0, path.as_bytes());
        put(&mut block, 100, format!("{mode:07o}").as_bytes());
        put(&mut block, 108, b"0000000");
        put(&mut block, 116, b"0000000");
        put(&mut block, 124, format!("{size:011o}").as_bytes());
        put(&mut block, 136, b"00000000000");
        put(&mut block, 148, b"        ");
        block[156] = kind;
        put(&mut block, 157, target.as_bytes());
        put(&mut block, 257, b"ustar\x0000");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        put(&mut block, 148, format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&block);
    }
}

fn put(block: &mut [u8; 512], at: usize, text: &[u8]) {
    block[at..at + text.len()].copy_from_slice(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_s_tar_reads_it() {
        let mut archive = Archive::default();
        archive.directory("bin", 0o755);
        archive.file("bin/hello", 0o755, b"hello\n");
        archive.link("bin/hi", "hello");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        std::fs::write(&path, archive.finish()).unwrap();
        let status =
            std::process::Command::new("tar").arg("-xf").arg(&path).arg("-C").arg(dir.path()).status().unwrap();
        assert!(status.success());
        assert_eq!(std::fs::read_to_string(dir.path().join("bin/hi")).unwrap(), "hello\n");
    }
}
