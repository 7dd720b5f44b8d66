//! Deltas: an object written as what differs from an older state of it.
//!
//! A delta is a zstd frame made with the older JSON as its prefix, so that one byte changed within a value of a hundred kilobytes costs a few
//! dozen bytes; a list of changed fields (RFC 6902) would carry the whole value. Both sides hold the older JSON byte for byte, and the
//! result is checked by its fingerprint.

use std::io::{Read as _, Write as _};

use bytes::Bytes;

use crate::sync::MAX_OBJECT;

/// Higher ones gain nothing on texts this small.
const LEVEL: i32 = 3;

/// Why a delta cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// Not zstd, or made against something else.
    #[error("the delta is damaged or does not fit")]
    Damaged(#[source] std::io::Error),
    /// The result would be larger than an object may be.
    #[error("the delta makes an object of more than {MAX_OBJECT} bytes")]
    TooLarge,
}

/// What makes `new` of `base`; `None` if that cannot be said in fewer than `limit` bytes.
pub fn diff(base: &[u8], new: &[u8], limit: usize) -> Option<Bytes> {
    let mut encoder = zstd::stream::Encoder::with_ref_prefix(Vec::new(), LEVEL, base).ok()?;
    encoder.window_log(window(base.len() + new.len())).ok()?;
    encoder.set_pledged_src_size(Some(new.len().try_into().ok()?)).ok()?;
    encoder.long_distance_matching(base.len() > 128 << 10).ok()?;
    encoder.write_all(new).ok()?;
    let delta = encoder.finish().ok()?;
    (delta.len() < limit).then(|| delta.into())
}

/// Undoes [`diff`].
pub fn apply(base: &[u8], delta: &[u8]) -> Result<Vec<u8>, DeltaError> {
    let mut decoder = zstd::stream::Decoder::with_ref_prefix(delta, base).map_err(DeltaError::Damaged)?;
    decoder.window_log_max(window(2 * MAX_OBJECT)).map_err(DeltaError::Damaged)?;
    let mut new = Vec::new();
    let limit = MAX_OBJECT as u64 + 1;
    decoder.take(limit).read_to_end(&mut new).map_err(DeltaError::Damaged)?;
    if new.len() > MAX_OBJECT { Err(DeltaError::TooLarge) } else { Ok(new) }
}

/// The window that sees both texts whole.
fn window(bytes: usize) -> u32 {
    bytes.max(1 << 10).next_power_of_two().ilog2()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut random = StdRng::seed_from_u64(seed);
        (0..length).map(|_| random.random_range(b' '..b'~')).collect()
    }

    #[test]
    fn one_byte_of_a_large_value_costs_little() {
        for length in [1_000, 100 << 10, 1 << 20, 5 << 20] {
            let base = noise(1, length);
            let mut new = base.clone();
            new[length / 2] = b'!';
            let delta = diff(&base, &new, length).unwrap();
            assert!(delta.len() < 200 + length / 10_000, "{length}: {}", delta.len());
            assert_eq!(apply(&base, &delta).unwrap(), new);
        }
    }

    #[test]
    fn what_has_nothing_in_common_is_no_delta() {
        let (base, new) = (noise(1, 5000), noise(2, 5000));
        assert_eq!(diff(&base, &new, 4000), None);
    }

    #[test]
    fn a_delta_of_something_else_does_not_pass_unnoticed() {
        let base = noise(1, 4000);
        let mut new = base.clone();
        new[7] = b'!';
        let delta = diff(&base, &new, 4000).unwrap();
        let other = apply(&noise(2, 4000), &delta);
        assert!(other.is_err() || other.unwrap() != new);
        assert!(apply(&base, b"junk").is_err());
        assert!(apply(&base, &delta[..delta.len() - 1]).is_err());
    }

    #[test]
    fn a_bomb_is_stopped() {
        let bomb = diff(b"x", &vec![b'a'; MAX_OBJECT + 1], MAX_OBJECT).unwrap();
        assert!(matches!(apply(b"x", &bomb), Err(DeltaError::TooLarge)));
    }

    proptest! {
        #[test]
        fn any_two_texts(base: Vec<u8>, new: Vec<u8>) {
            let delta = diff(&base, &new, usize::MAX).unwrap();
            prop_assert_eq!(apply(&base, &delta).unwrap(), new);
        }

        #[test]
        fn any_bytes_are_answered(base: Vec<u8>, delta: Vec<u8>) {
            let _ = apply(&base, &delta);
        }
    }
}
