//! The join token: one string that carries everything a box must be told about the cloud it joins, beside its address.
//!
//! `skerry.<id>.<secret>.<hash>`: a public id of 6 and a secret of 32 characters of `a-z0-9`, and the SHA-256 of the DER
//! SubjectPublicKeyInfo of the cloud's CA in 64 hex digits, by which the box knows that it talks to the right cloud. What is
//! malformed is refused with the part that is wrong, and without repeating the secret.

use std::fmt;
use std::str::FromStr;

const PREFIX: &str = "skerry";
/// Length of [`JoinToken::id`] in characters.
pub const ID_LEN: usize = 6;
/// Length of [`JoinToken::secret`] in characters.
pub const SECRET_LEN: usize = 32;

/// A join token, taken apart. `Display` gives the string, `FromStr` reads it; `Debug` leaves the secret out.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Names the token; not secret.
    pub id: String,
    /// What proves that the bearer was given the token.
    pub secret: String,
    /// SHA-256 of the DER SubjectPublicKeyInfo of the cloud's CA.
    pub ca_hash: [u8; 32],
}

/// Why a string is not a join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinTokenError {
    /// Nothing there.
    #[error("the join token is empty; `cloudcore token create` prints a complete join command")]
    Empty,
    /// Another first part.
    #[error(
        "not a join token: it must begin with `{PREFIX}.`; copy the whole token that `cloudcore token create` printed"
    )]
    Prefix,
    /// Cut off, or two pasted together.
    #[error(
        "a join token has 4 parts separated by dots, this one has {0}; copy the whole token that `cloudcore token create` printed"
    )]
    Parts(usize),
    /// The id's length or characters.
    #[error("the join token's id (its 2nd part) must be {ID_LEN} characters of a-z and 0-9; copy the token again")]
    Id,
    /// The secret's length or characters.
    #[error(
        "the join token's secret (its 3rd part) must be {SECRET_LEN} characters of a-z and 0-9; copy the token again"
    )]
    Secret,
    /// The hash's length or characters.
    #[error("the join token's CA hash (its 4th part) must be 64 hex digits; copy the token again, to its end")]
    Hash,
}

impl JoinToken {
    /// Whether `id` could be the id of a token.
    pub fn is_id(id: &str) -> bool {
        id.len() == ID_LEN && id.bytes().all(is_word)
    }

    /// [`JoinToken::ca_hash`] in hex, as in the token's string.
    pub fn ca_hash_hex(&self) -> String {
        self.ca_hash.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl FromStr for JoinToken {
    type Err = JoinTokenError;

    fn from_str(token: &str) -> Result<Self, JoinTokenError> {
        let token = token.trim();
        if token.is_empty() {
            return Err(JoinTokenError::Empty);
        }
        let parts: Vec<&str> = token.split('.').collect();
        if parts.first() != Some(&PREFIX) {
            return Err(JoinTokenError::Prefix);
        }
        let [_, id, secret, hash] = parts[..] else {
            return Err(JoinTokenError::Parts(parts.len()));
        };
        if !Self::is_id(id) {
            return Err(JoinTokenError::Id);
        }
        if secret.len() != SECRET_LEN || !secret.bytes().all(is_word) {
            return Err(JoinTokenError::Secret);
        }
        let ca_hash = unhex(hash).ok_or(JoinTokenError::Hash)?;
        Ok(Self { id: id.to_owned(), secret: secret.to_owned(), ca_hash })
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}.{}.{}.{}", self.id, self.secret, self.ca_hash_hex())
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("id", &self.id).field("ca_hash", &self.ca_hash_hex()).finish_non_exhaustive()
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> String {
        format!("skerry.abc123.{}.{}", "s".repeat(32), "0f".repeat(32))
    }

    #[test]
    fn each_damage_is_told_apart() {
        let good = sample();
        assert_eq!(good.parse::<JoinToken>().unwrap().ca_hash, [0x0f; 32]);
        assert!(format!(" {good}\n").parse::<JoinToken>().is_ok(), "white space around it is pasted easily");
        for (text, error) in [
            (String::new(), JoinTokenError::Empty),
            (good.replace("skerry", "token"), JoinTokenError::Prefix),
            (format!("x{good}"), JoinTokenError::Prefix),
            ("skerry.abc123".to_owned(), JoinTokenError::Parts(2)),
            (format!("{good}.{good}"), JoinTokenError::Parts(8)),
            (good.replace("abc123", "ABC123"), JoinTokenError::Id),
            (good.replace("abc123", "abc12"), JoinTokenError::Id),
            (good.replace(&"s".repeat(32), &"s".repeat(31)), JoinTokenError::Secret),
            (good.replace(&"s".repeat(32), &format!("{}/", "s".repeat(31))), JoinTokenError::Secret),
            (good[..good.len() - 1].to_owned(), JoinTokenError::Hash),
            (format!("{}g", &good[..good.len() - 1]), JoinTokenError::Hash),
        ] {
            assert_eq!(text.parse::<JoinToken>(), Err(error), "{text}");
        }
    }

    #[test]
    fn debug_hides_the_secret() {
        let token: JoinToken = sample().parse().unwrap();
        assert!(!format!("{token:?}").contains(&token.secret));
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(id in "[a-z0-9]{6}", secret in "[a-z0-9]{32}", ca_hash: [u8; 32]) {
            let token = JoinToken { id, secret, ca_hash };
            prop_assert_eq!(token.to_string().parse::<JoinToken>(), Ok(token));
        }

        #[test]
        fn any_text_is_answered(text in "\\PC{0,200}") {
            if let Ok(token) = text.parse::<JoinToken>() {
                prop_assert_eq!(token.to_string().to_lowercase(), text.trim().to_lowercase());
            }
        }

        #[test]
        fn near_tokens_are_answered(text in "skerry(\\.[a-zA-Z0-9]{0,40}){0,5}(\\.[0-9a-f]{62,66})?") {
            let _ = text.parse::<JoinToken>();
        }
    }
}
