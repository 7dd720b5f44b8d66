//! A page of metrics in the Prometheus text format, version 0.0.4.

use std::fmt::{self, Display, Write as _};

use bytes::Bytes;
use jiff::Timestamp;

/// A page that is being written.
#[derive(Debug, Default)]
pub(super) struct Page(String);

/// What a family counts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Counter,
    Gauge,
}

/// Labels as they are written, without the braces: made once for all samples that have them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Labels(String);

/// Nanoseconds, written as seconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seconds(pub(super) u64);

/// All samples of one name. HELP and TYPE come with the first; without any there is nothing.
#[derive(Debug)]
pub(super) struct Family<'a> {
    page: &'a mut Page,
    name: &'static str,
    help: &'static str,
    kind: Kind,
    begun: bool,
}

impl Page {
    /// A family that only goes up.
    pub(super) fn counter(&mut self, name: &'static str, help: &'static str) -> Family<'_> {
        Family { page: self, name, help, kind: Kind::Counter, begun: false }
    }

    /// A family of what is so now.
    pub(super) fn gauge(&mut self, name: &'static str, help: &'static str) -> Family<'_> {
        Family { page: self, name, help, kind: Kind::Gauge, begun: false }
    }

    pub(super) fn finish(self) -> Bytes {
        Bytes::from(self.0)
    }
}

impl Family<'_> {
    /// A sample, of the time at which the page is read unless `at` says otherwise.
    pub(super) fn add(&mut self, labels: &Labels, value: impl Display, at: Option<Timestamp>) {
        let (name, text) = (self.name, &mut self.page.0);
        if !self.begun {
            self.begun = true;
            let kind = match self.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
            };
            // Writing to a string does not fail, here and below.
            let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}", self.help);
        }
        text.push_str(name);
        if !labels.0.is_empty() {
            let _ = write!(text, "{{{}}}", labels.0);
        }
        let _ = write!(text, " {value}");
        if let Some(at) = at {
            let _ = write!(text, " {}", at.as_millisecond());
        }
        text.push('\n');
    }
}

impl Labels {
    pub(super) fn new<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        pairs.into_iter().fold(Self::default(), |labels, (name, value)| labels.and(name, value))
    }

    /// These and one more.
    #[must_use]
    pub(super) fn and(&self, name: &str, value: &str) -> Self {
        let comma = if self.0.is_empty() { "" } else { "," };
        Self(format!("{}{comma}{name}=\"{}\"", self.0, Escaped(value)))
    }
}

struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '\\' => to.write_str("\\\\"),
                '"' => to.write_str("\\\""),
                '\n' => to.write_str("\\n"),
                other => to.write_char(other),
            }?;
        }
        Ok(())
    }
}

impl Display for Seconds {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}.{:09}", self.0 / 1_000_000_000, self.0 % 1_000_000_000)
    }
}

#[cfg(test)]
pub(super) mod strict {
    //! A parser that takes nothing but what the format allows.

    use std::collections::{BTreeMap, BTreeSet};

    /// One sample.
    #[derive(Clone, Debug, PartialEq)]
    pub(crate) struct Sample {
        pub(crate) name: String,
        pub(crate) labels: BTreeMap<String, String>,
        pub(crate) value: f64,
        pub(crate) at: Option<i64>,
    }

    impl Sample {
        pub(crate) fn is(&self, name: &str, labels: &[(&str, &str)]) -> bool {
            self.name == name && labels.iter().all(|(key, value)| self.labels.get(*key).is_some_and(|own| own == value))
        }
    }

    /// All samples of a page, or what is wrong with it.
    pub(crate) fn parse(page: &[u8]) -> Result<Vec<Sample>, String> {
        let page = std::str::from_utf8(page).map_err(|error| error.to_string())?;
        let mut samples: Vec<Sample> = Vec::new();
        let mut families = BTreeSet::new();
        let mut labels_of: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        let (mut helped, mut family) = (None, None);
        if !page.is_empty() && !page.ends_with('\n') {
            return Err("the last line has no end".to_owned());
        }
        for line in page.lines() {
            let wrong = |what: &str| format!("{what}: {line:?}");
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').ok_or_else(|| wrong("no help"))?;
                if !is_name(name) || help.is_empty() || !families.insert(name.to_owned()) {
                    return Err(wrong("bad or second HELP"));
                }
                helped = Some(name.to_owned());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').ok_or_else(|| wrong("no type"))?;
                let is_counter = kind == "counter";
                if helped.take().as_deref() != Some(name) || !(is_counter || kind == "gauge") {
                    return Err(wrong("TYPE without its HELP, or of no type"));
                }
                family = Some(name.to_owned());
            } else {
                let sample = sample(line).ok_or_else(|| wrong("no sample"))?;
                if family.as_deref() != Some(&sample.name) {
                    return Err(wrong("a sample outside its family"));
                }
                let names: Vec<String> = sample.labels.keys().cloned().collect();
                if labels_of.entry(sample.name.clone()).or_insert_with(|| names.clone()) != &names {
                    return Err(wrong("other labels than its family"));
                }
                if !seen.insert((sample.name.clone(), sample.labels.clone())) {
                    return Err(wrong("a second sample of the same labels"));
                }
                samples.push(sample);
            }
        }
        Ok(samples)
    }

    fn is_name(name: &str) -> bool {
        let is_start = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
        name.starts_with(is_start) && name.chars().all(|c| is_start(c) || c.is_ascii_digit())
    }

    fn sample(line: &str) -> Option<Sample> {
        let end = line.find(['{', ' '])?;
        let (name, mut rest) = line.split_at(end);
        let mut labels = BTreeMap::new();
        if let Some(mut inside) = rest.strip_prefix('{') {
            loop {
                let (key, value) = inside.split_once("=\"")?;
                let mut text = String::new();
                let mut characters = value.char_indices();
                let end = loop {
                    match characters.next()? {
                        (at, '"') => break at,
                        (_, '\\') => text.push(match characters.next()?.1 {
                            'n' => '\n',
                            c @ ('\\' | '"') => c,
                            _ => return None,
                        }),
                        (_, c) => text.push(c),
                    }
                };
                if !is_name(key) || key.contains(':') || labels.insert(key.to_owned(), text).is_some() {
                    return None;
                }
                inside = &value[end + 1..];
                match inside.strip_prefix(',') {
                    Some(next) => inside = next,
                    None => break,
                }
            }
            rest = inside.strip_prefix('}')?;
        }
        let mut words = rest.strip_prefix(' ')?.split(' ');
        let value = words.next()?;
        let is_number = value.chars().all(|c| c.is_ascii_digit() || matches!(c, '.' | '-' | '+' | 'e'));
        let value = value.parse().ok().filter(|_| is_number)?;
        let at = match words.next() {
            Some(at) => Some(at.parse().ok()?),
            None => None,
        };
        let is_all = words.next().is_none() && is_name(name);
        is_all.then(|| Sample { name: name.to_owned(), labels, value, at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_a_strict_reader_reads() {
        let mut page = Page::default();
        let odd = "a\\b\"c\nd,e}=ä";
        let at = Timestamp::from_millisecond(1_633_253_812_125).unwrap();
        let labels = Labels::new([("container", odd), ("pod", "")]);
        let mut family = page.counter("x_seconds_total", "Time.");
        family.add(&labels, Seconds(4_710_169_000), Some(at));
        family.add(&Labels::new([("container", ""), ("pod", "p")]), Seconds(1), None);
        page.gauge("empty", "Nothing.");
        page.gauge("y_bytes", "Bytes.").add(&Labels::default(), u64::MAX, None);
        page.gauge("z", "A share.").add(&Labels::default(), 0.25, None);
        let page = page.finish();
        let text = std::str::from_utf8(&page).unwrap();
        assert!(text.starts_with("# HELP x_seconds_total Time.\n# TYPE x_seconds_total counter\n"), "{text}");
        assert!(text.contains("} 4.710169000 1633253812125\n") && text.contains("} 0.000000001\n"), "{text}");
        assert!(text.contains("\ny_bytes 18446744073709551615\n") && !text.contains("empty"), "{text}");
        let samples = strict::parse(&page).unwrap();
        assert_eq!(samples.len(), 4);
        assert!(samples[0].is("x_seconds_total", &[("container", odd), ("pod", "")]));
        assert_eq!((samples[0].value, samples[0].at), (4.710_169, Some(1_633_253_812_125)));
    }

    #[test]
    fn the_strict_reader_is_strict() {
        let head = "# HELP a A.\n# TYPE a gauge\n";
        for bad in [
            "a 1\n",
            "# TYPE a gauge\na 1\n",
            "# HELP a A.\n# TYPE a gauge\na 1",
            "# HELP a A.\n# TYPE a gauge\nb 1\n",
            "# HELP a A.\n# TYPE a gauge\na NaNny\n",
            "# HELP a A.\n# TYPE a gauge\na 1\na 2\n",
            "# HELP a A.\n# TYPE a gauge\na{b=\"\\x\"} 1\n",
            "# HELP a A.\n# TYPE a gauge\na{b=\"1\"} 1\na{c=\"1\"} 1\n",
            "# HELP a A.\n# TYPE a gauge\na{b=\"1\" 1\n",
            "# HELP a A.\n# TYPE a gauge\na  1\n",
            "# HELP a A.\n# TYPE a gauge\na 1 2 3\n",
        ] {
            assert!(strict::parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert_eq!(strict::parse(format!("{head}a{{b=\"\"}} 1\n").as_bytes()).unwrap().len(), 1);
    }
}
