//! Paths and queries of requests, taken apart as Go's `net/url` does.

use skerry_proto::ops::percent_decode;

/// The parameters of a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    /// What cannot be decoded is left out.
    pub(crate) fn parse(text: &str) -> Self {
        let pair = |pair: &str| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((decode(name, true)?, decode(value, true)?))
        };
        Self(text.split('&').filter(|text| !text.is_empty() && !text.contains(';')).filter_map(pair).collect())
    }

    /// The first value of a name.
    pub(crate) fn first(&self, name: &str) -> Option<&str> {
        self.all(name).next()
    }

    /// All values of a name.
    pub(crate) fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(of, _)| of == name).map(|(_, value)| value.as_str())
    }

    /// Whether it is `1`, as the streaming endpoints have their flags.
    pub(crate) fn is_one(&self, name: &str) -> bool {
        self.first(name) == Some("1")
    }
}

/// The parts of a path between its slashes, decoded; `None` if one cannot be.
pub(crate) fn segments(path: &str) -> Option<Vec<String>> {
    path.trim_start_matches('/').split('/').map(|part| decode(part, false)).collect()
}

fn decode(text: &str, plus_is_space: bool) -> Option<String> {
    let bytes = if plus_is_space { percent_decode(&text.replace('+', " ")) } else { percent_decode(text) };
    String::from_utf8(bytes?).ok()
}

#[cfg(test)]
mod tests {
    use skerry_proto::ops::percent_encode;

    use super::*;

    #[test]
    fn what_was_encoded_is_decoded() {
        let query = Query::parse("command=ls&command=-l+%2Fa%20b&tty=1&bad=%zz&x;y=1&empty");
        assert_eq!(query.all("command").collect::<Vec<_>>(), ["ls", "-l /a b"]);
        assert!(query.is_one("tty") && query.first("bad").is_none() && query.first("empty") == Some(""));
        assert_eq!(segments("/exec/ns/a%2Fb/c+d").unwrap(), ["exec", "ns", "a/b", "c+d"]);
        assert_eq!(segments("/%f"), None);
        for text in ["a b&c=d/é%+", ""] {
            assert_eq!(decode(&percent_encode(text), true).unwrap(), text);
        }
    }
}
