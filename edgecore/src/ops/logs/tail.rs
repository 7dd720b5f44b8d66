//! Where the last lines of a log begin, found from its end.

use std::io;

const BLOCK: usize = 64 << 10;

/// Where the last `lines` lines that have an end begin; what follows the last end belongs to them. `read` fills a buffer from an offset.
pub(crate) fn tail_start(
    size: u64,
    lines: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<u64> {
    let mut block = vec![0; BLOCK.min(usize::try_from(size).unwrap_or(BLOCK))];
    let mut right = size;
    let mut found = 0;
    while right > 0 {
        let left = right.saturating_sub(BLOCK as u64);
        let length = usize::try_from(right - left).unwrap_or(BLOCK);
        read(left, &mut block[..length])?;
        for end in memchr::memrchr_iter(b'\n', &block[..length]) {
            if found == lines {
                return Ok(left + end as u64 + 1);
            }
            found += 1;
        }
        right = left;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(text: &[u8], lines: u64) -> u64 {
        tail_start(text.len() as u64, lines, |from, buffer| {
            let from = usize::try_from(from).unwrap();
            buffer.copy_from_slice(&text[from..from + buffer.len()]);
            Ok(())
        })
        .unwrap()
    }

    #[test]
    fn the_last_lines_are_found_whatever_their_length() {
        for (lines, at) in [(0, 6), (1, 4), (2, 2), (3, 0), (9, 0)] {
            assert_eq!(start(b"a\nb\nc\n", lines), at);
        }
        assert_eq!((start(b"a\nb", 0), start(b"a\nb", 1), start(b"", 3), start(b"ab", 0)), (2, 0, 0, 0));
        for length in [1, 10, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK] {
            let line = [vec![b'x'; length], vec![b'\n']].concat();
            let text = line.repeat(4);
            for lines in 0..5 {
                assert_eq!(start(&text, lines), line.len() as u64 * (4 - lines), "{length} {lines}");
            }
        }
    }
}
