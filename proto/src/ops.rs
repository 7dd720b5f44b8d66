//! What streams of the class [`ops`](crate::mux::Class::Ops) are for, told by their header.

/// Header of a stream, opened by the cloud, on which the edge is a kubelet's HTTP server.
///
/// The stream carries HTTP/1.1 without TLS, the cloud is the client, and there is one request on a stream: its path and query are a
/// kubelet's (`/containerLogs/…`, `/exec/…`, `/stats/summary`). Whoever asks has been authenticated and authorised, and no credentials
/// come along. After a `101` the stream is what the two ends have upgraded it to. Each writing half is shut down by whoever writes.
pub const KUBELET: &[u8] = b"kubelet";

/// The bytes that a part of a path or of a query stands for (RFC 3986, 2.1). `None`: a `%` without two hexadecimal digits behind it.
pub fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut bytes = text.bytes();
    let mut out = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => digit(bytes.next()?)? << 4 | digit(bytes.next()?)?,
            byte => byte,
        });
    }
    Some(out)
}

/// The spelling of a text in a path or a query: all but the unreserved characters (RFC 3986, 2.3) as `%XX`.
pub fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{percent_decode, percent_encode};

    #[test]
    fn only_what_is_unreserved_stands_for_itself() {
        assert_eq!(percent_encode("a b/ü"), "a%20b%2F%C3%BC");
        assert_eq!(percent_encode("-._~"), "-._~");
    }

    #[test]
    fn what_is_no_escape_is_nothing() {
        assert_eq!(percent_decode("/a%2Fb%2fc+%00%ff").unwrap(), b"/a/b/c+\0\xff");
        assert_eq!(percent_decode("").unwrap(), b"");
        for wrong in ["%", "%4", "%zz", "%4z", "a%", "%%41", "% 1", "%\u{e9}"] {
            assert_eq!(percent_decode(wrong), None, "{wrong:?}");
        }
        // Every byte has one spelling at least, and no text is more bytes than it has.
        for byte in 0..=255_u8 {
            assert_eq!(percent_decode(&format!("%{byte:02x}")).unwrap(), [byte]);
        }
    }
}
