//! The parameters of a request for logs, decoded and judged as the upstream kubelet does: what is not a value is 400, what cannot be meant
//! is 422.

use std::time::Duration;

use hyper::StatusCode;
use jiff::Timestamp;

use super::lines::{Wanted, Which};
use crate::ops::answer::Refusal;
use crate::ops::query::Query;

/// What was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) follow: bool,
    pub(crate) previous: bool,
    pub(crate) timestamps: bool,
    pub(crate) since: Option<Timestamp>,
    pub(crate) tail: Option<u64>,
    pub(crate) bytes: Option<u64>,
    pub(crate) stream: Which,
}

impl Options {
    pub(crate) fn parse(query: &Query, now: Timestamp) -> Result<Self, Refusal> {
        let undecodable = || Refusal::new(StatusCode::BAD_REQUEST, r#"{"message": "Unable to decode query."}"#);
        let invalid = || Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, r#"{"message": "Invalid request."}"#);
        // As Go's conversion has it: there without a value is true.
        let flag =
            |name: &str| query.first(name).is_some_and(|value| !value.eq_ignore_ascii_case("false") && value != "0");
        let number = |name: &str| query.first(name).map(str::parse::<i64>).transpose().map_err(|_| undecodable());
        let tail = match query.first("tail").filter(|tail| !tail.is_empty()) {
            Some("all") => None,
            Some(tail) => Some(tail.parse::<i64>().map_err(|_| undecodable())?),
            None => number("tailLines")?,
        };
        let seconds = number("sinceSeconds")?;
        let time = query.first("sinceTime").filter(|time| !time.is_empty());
        let time = time.map(str::parse::<Timestamp>).transpose().map_err(|_| undecodable())?;
        let bytes = number("limitBytes")?;

        let stream = match query.first("stream") {
            None | Some("" | "All") => Which::All,
            Some("Stdout") => Which::Stdout,
            Some("Stderr") => Which::Stderr,
            Some(_) => return Err(invalid()),
        };
        // The last lines of one stream are not those of the file.
        if stream != Which::All && tail.is_some() {
            return Err(invalid());
        }
        if seconds.is_some() && time.is_some() || seconds.is_some_and(|seconds| seconds < 1) {
            return Err(invalid());
        }
        let tail = tail.map(u64::try_from).transpose().map_err(|_| invalid())?;
        let bytes = bytes.map(u64::try_from).transpose().map_err(|_| invalid())?;
        if bytes == Some(0) {
            return Err(invalid());
        }
        // Longer ago than time goes back is from the beginning.
        let ago = seconds.map(|seconds| now.checked_sub(Duration::from_secs(seconds.unsigned_abs())));
        let since = time.or_else(|| ago.and_then(Result::ok));
        Ok(Self {
            follow: flag("follow"),
            previous: flag("previous"),
            timestamps: flag("timestamps"),
            since,
            tail,
            bytes,
            stream,
        })
    }

    /// What is wanted of the file's lines.
    pub(crate) fn wanted(&self) -> Wanted {
        Wanted {
            since: self.since,
            timestamps: self.timestamps,
            bytes: self.bytes,
            lines: self.tail.filter(|_| !self.follow),
            stream: self.stream,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: &str) -> Result<Options, u16> {
        let now = "2026-01-02T00:01:00Z".parse().unwrap();
        Options::parse(&Query::parse(query), now).map_err(|refusal| refusal.status.as_u16())
    }

    #[test]
    fn parameters_are_decoded_as_upstream_does() {
        assert_eq!(parse(""), Ok(Options::default()));
        let since = Some("2026-01-02T00:00:00Z".parse().unwrap());
        let all = "follow=true&previous=false&timestamps&sinceSeconds=60&tailLines=5&limitBytes=7&stream=All";
        let wanted =
            Options { follow: true, timestamps: true, since, tail: Some(5), bytes: Some(7), ..Options::default() };
        assert_eq!(parse(all), Ok(wanted));
        assert_eq!(parse("sinceTime=2026-01-02T01%3A00%3A00%2B01%3A00").unwrap().since, since);
        assert_eq!((parse("tail=all").unwrap().tail, parse("tail=3&tailLines=9").unwrap().tail), (None, Some(3)));
        assert_eq!((parse("follow=1").unwrap().follow, parse("follow=0").unwrap().follow), (true, false));
        assert_eq!(parse("stream=Stderr").unwrap().stream, Which::Stderr);
        assert_eq!(parse("sinceSeconds=9223372036854775807").unwrap().since, None);
        for bad in ["tailLines=x", "tail=x", "sinceTime=yesterday", "limitBytes=1.5", "sinceSeconds="] {
            assert_eq!(parse(bad), Err(400), "{bad}");
        }
        for bad in [
            "tailLines=-1",
            "limitBytes=0",
            "sinceSeconds=0",
            "sinceSeconds=1&sinceTime=2026-01-02T00:00:00Z",
            "stream=stdout",
            "stream=Stdout&tailLines=1",
        ] {
            assert_eq!(parse(bad), Err(422), "{bad}");
        }
    }
}
