//! The dictionary that zstd has on both sides of the link: what Kubernetes objects and reports have in common, so that one costs what is its
//! own. `scripts/train-dictionary` makes it.
//!
//! A session uses it when both sides have named its id in their first frames; it is not used for what is stored, which has to be readable
//! when there is another one. A frame says itself which dictionary it wants.

use std::io;
use std::sync::LazyLock;

use zstd::bulk::{Compressor, Decompressor};
use zstd::dict::{DecoderDictionary, EncoderDictionary};

/// The id of the dictionary.
pub(crate) const ID: u32 = 1;

const DICTIONARY: &[u8] = include_bytes!("../dictionary/kubernetes.zdict");
/// What is larger has enough to refer to in itself.
const LARGEST: usize = 64 << 10;
/// What is smaller is not worth it.
const SMALLEST: usize = 128;
/// Higher ones take longer and gain 2 %.
const LEVEL: i32 = 6;

/// Prepared once for the process, in 220 KB and 50 KB; what compressing takes beside that, it takes while it goes on.
static ENCODER: LazyLock<EncoderDictionary<'static>> = LazyLock::new(|| EncoderDictionary::copy(DICTIONARY, LEVEL));
static DECODER: LazyLock<DecoderDictionary<'static>> = LazyLock::new(|| DecoderDictionary::copy(DICTIONARY));

/// Compresses what becomes smaller by it, for those who do so all the time.
pub(crate) fn compress(text: &[u8]) -> Option<Vec<u8>> {
    compress_with(text, || Compressor::with_prepared_dictionary(&ENCODER))
}

/// As [`compress`], for those who do so now and then: nothing stays in memory.
pub(crate) fn compress_once(text: &[u8]) -> Option<Vec<u8>> {
    compress_with(text, || Compressor::with_dictionary(LEVEL, DICTIONARY))
}

fn compress_with<'a>(text: &[u8], compressor: impl FnOnce() -> io::Result<Compressor<'a>>) -> Option<Vec<u8>> {
    if !(SMALLEST..=LARGEST).contains(&text.len()) {
        return None;
    }
    let small = compressor().ok()?.compress(text).ok()?;
    (small.len() < text.len()).then_some(small)
}

/// Undoes both, refusing more than `limit` bytes.
pub(crate) fn decompress(payload: &[u8], limit: usize) -> io::Result<Vec<u8>> {
    Decompressor::with_prepared_dictionary(&DECODER)?.decompress(payload, limit)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POD: &str = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"creationTimestamp":"2026-05-04T03:02:01Z","generation":1,"labels":{"app":"sleeper"},"name":"pod-0","namespace":"default","uid":"6f1d4a52-1c89-4a2e-9d54-0a6b3c1f7e88"},"spec":{"containers":[{"command":["sleep","1000000"],"image":"docker.io/library/busybox:1","imagePullPolicy":"IfNotPresent","name":"main","resources":{},"terminationMessagePath":"/dev/termination-log","terminationMessagePolicy":"File"}],"dnsPolicy":"ClusterFirst","enableServiceLinks":true,"nodeName":"edge","preemptionPolicy":"PreemptLowerPriority","priority":0,"restartPolicy":"Always","schedulerName":"default-scheduler","securityContext":{},"serviceAccount":"default","serviceAccountName":"default","terminationGracePeriodSeconds":1}}"#;

    #[test]
    fn a_pod_costs_what_is_its_own() {
        let small = compress(POD.as_bytes()).unwrap();
        assert!(small.len() < POD.len() / 4, "{} of {}", small.len(), POD.len());
        assert_eq!(compress_once(POD.as_bytes()).unwrap(), small);
        assert_eq!(decompress(&small, POD.len()).unwrap(), POD.as_bytes());
        assert!(decompress(&small, POD.len() - 1).is_err());
        assert_eq!(zstd::zstd_safe::get_dict_id_from_frame(&small).map(u32::from), Some(ID));
    }

    #[test]
    fn what_wants_another_dictionary_is_refused() {
        let mut other = DICTIONARY.to_vec();
        other[4..8].copy_from_slice(&(ID + 1).to_le_bytes());
        let foreign = Compressor::with_dictionary(LEVEL, &other).unwrap().compress(POD.as_bytes()).unwrap();
        assert!(decompress(&foreign, POD.len()).is_err());
    }

    #[test]
    fn what_is_large_or_tiny_is_left_to_itself() {
        assert_eq!(compress(&[b'a'; LARGEST + 1]), None);
        assert_eq!(compress(&[b'a'; SMALLEST - 1]), None);
    }

    proptest! {
        #[test]
        fn any_text(text in proptest::collection::vec(b'a'..b'd', 0..1000)) {
            if let Some(small) = compress(&text) {
                prop_assert_eq!(decompress(&small, text.len()).unwrap(), text);
            }
        }

        #[test]
        fn any_bytes_are_answered(bytes: Vec<u8>) {
            let _ = decompress(&bytes, 1000);
        }
    }
}
