//! What becomes of a log's bytes: CRI lines (`time stream tag text`) in, what was asked for out. Pure.
//!
//! It takes the bytes in pieces of any size and holds back no more than the head of one line. A line that is none is left out. A time stands
//! before a line only where one begins: what follows a partial line (tag `P`) is its continuation.

use std::str::FromStr as _;

use jiff::Timestamp;

/// The longest head of a line: time, stream and tags.
const MAX_HEAD: usize = 160;

/// What is wanted of a log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Lines from then on.
    pub(crate) since: Option<Timestamp>,
    /// Each line's time before it.
    pub(crate) timestamps: bool,
    /// No more bytes than these.
    pub(crate) bytes: Option<u64>,
    /// No more lines of the file than these, whether they are wanted or not.
    pub(crate) lines: Option<u64>,
    /// Of which stream.
    pub(crate) stream: Which,
}

/// Which of the container's streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Which {
    /// Both, in the order of the file.
    #[default]
    All,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Turns lines into what is wanted of them.
#[derive(Debug)]
pub(crate) struct Filter {
    /// [`Wanted::since`] as a line would have it, in UTC with nine digits.
    since: Option<(Timestamp, [u8; 29])>,
    timestamps: bool,
    stream: Which,
    bytes: u64,
    lines: u64,
    /// The beginning of a head.
    head: Vec<u8>,
    at: At,
    /// What comes next goes on with a line that was written.
    continues: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Head,
    Text {
        wanted: bool,
        partial: bool,
        empty: bool,
    },
    /// In a line that is none.
    Noise,
}

/// What the beginning of a line is.
#[derive(Debug, PartialEq, Eq)]
enum Head<'a> {
    Line {
        length: usize,
        time: Time<'a>,
        stream: Which,
        partial: bool,
    },
    /// Not a line; `ended` if it is over after `length`.
    Noise {
        length: usize,
        ended: bool,
    },
    Short,
}

/// A time as it stands in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Time<'a> {
    text: &'a [u8],
    fraction: &'a [u8],
    zone: &'a [u8],
}

impl Filter {
    /// At the beginning of a line.
    pub(crate) fn new(wanted: &Wanted) -> Self {
        let since = wanted.since.map(|since| {
            let mut text = [b'0'; 29];
            let shown = format!("{since:.9}");
            if let Some(digits) = shown.as_bytes().get(..29) {
                text.copy_from_slice(digits);
            }
            (since, text)
        });
        Self {
            since,
            timestamps: wanted.timestamps,
            stream: wanted.stream,
            bytes: wanted.bytes.unwrap_or(u64::MAX),
            lines: wanted.lines.unwrap_or(u64::MAX),
            head: Vec::new(),
            at: At::Head,
            continues: false,
        }
    }

    /// Nothing more will come of it.
    pub(crate) fn is_done(&self) -> bool {
        self.bytes == 0 || self.lines == 0
    }

    /// What was read so far was all of its file, and the next is the beginning of another one's.
    pub(crate) fn next_file(&mut self) {
        self.head.clear();
        self.at = At::Head;
    }

    /// Takes what comes next, and puts behind `out` what is wanted of it.
    pub(crate) fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) {
        while !input.is_empty() && !self.is_done() {
            let taken = match self.at {
                At::Head => self.head(input, out),
                At::Text { wanted, partial, empty } => {
                    let end = memchr::memchr(b'\n', input);
                    let text = &input[..end.unwrap_or(input.len())];
                    let empty = empty && text.is_empty();
                    if wanted {
                        self.emit(text, out);
                    }
                    match end {
                        Some(_) => {
                            if wanted && !partial {
                                self.emit(b"\n", out);
                            }
                            self.continues = partial && !empty;
                            self.lines = if self.lines == u64::MAX { u64::MAX } else { self.lines - 1 };
                            self.at = At::Head;
                        }
                        None => self.at = At::Text { wanted, partial, empty },
                    }
                    end.map_or(input.len(), |end| end + 1)
                }
                At::Noise => match memchr::memchr(b'\n', input) {
                    Some(end) => {
                        self.at = At::Head;
                        end + 1
                    }
                    None => input.len(),
                },
            };
            input = &input[taken..];
        }
    }

    /// Takes the head of a line, or as much of it as there is; answers with how many bytes.
    fn head(&mut self, input: &[u8], out: &mut Vec<u8>) -> usize {
        if self.head.is_empty() {
            let head = Head::parse(input);
            if head == Head::Short {
                self.head.extend_from_slice(input);
                return input.len();
            }
            return self.begin(&head, out);
        }
        let before = self.head.len();
        let more = input.len().min(MAX_HEAD - before);
        let mut whole = std::mem::take(&mut self.head);
        whole.extend_from_slice(&input[..more]);
        let head = Head::parse(&whole);
        if head == Head::Short {
            self.head = whole;
            return more;
        }
        self.begin(&head, out) - before
    }

    fn begin(&mut self, head: &Head<'_>, out: &mut Vec<u8>) -> usize {
        match *head {
            Head::Line { length, time, stream, partial } => {
                let wanted = (self.stream == Which::All || self.stream == stream) && self.is_late_enough(time);
                if wanted && self.timestamps && !self.continues {
                    let mut prefix = [0; 48];
                    let length = time.write(&mut prefix);
                    self.emit(&prefix[..length], out);
                }
                self.at = At::Text { wanted, partial, empty: true };
                length
            }
            Head::Noise { length, ended } => {
                self.at = if ended { At::Head } else { At::Noise };
                length
            }
            Head::Short => 0,
        }
    }

    fn is_late_enough(&self, time: Time<'_>) -> bool {
        let Some((since, text)) = &self.since else { return true };
        if time.zone == b"Z" {
            let (whole, digits) = (&text[..19], &text[20..]);
            return match time.text[..19].cmp(whole) {
                std::cmp::Ordering::Equal => {
                    let mut fraction = [b'0'; 9];
                    let length = time.fraction.len().min(9);
                    fraction[..length].copy_from_slice(&time.fraction[..length]);
                    fraction[..] >= *digits
                }
                order => order.is_gt(),
            };
        }
        let parsed = std::str::from_utf8(time.text).ok().and_then(|text| Timestamp::from_str(text).ok());
        parsed.is_none_or(|time| time >= *since)
    }

    fn emit(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let room = usize::try_from(self.bytes).unwrap_or(usize::MAX).min(bytes.len());
        out.extend_from_slice(&bytes[..room]);
        if self.bytes != u64::MAX {
            self.bytes -= room as u64;
        }
    }
}

impl<'a> Head<'a> {
    fn parse(input: &'a [u8]) -> Self {
        let seen = &input[..input.len().min(MAX_HEAD)];
        let mut spaces = [0; 3];
        let mut found = 0;
        for at in memchr::memchr2_iter(b' ', b'\n', seen) {
            if seen[at] == b'\n' {
                return Self::Noise { length: at + 1, ended: true };
            }
            spaces[found] = at;
            found += 1;
            if found == 3 {
                break;
            }
        }
        if found < 3 {
            return if seen.len() == MAX_HEAD { Self::Noise { length: seen.len(), ended: false } } else { Self::Short };
        }
        let length = spaces[2] + 1;
        let stream = match &seen[spaces[0] + 1..spaces[1]] {
            b"stdout" => Which::Stdout,
            b"stderr" => Which::Stderr,
            _ => return Self::Noise { length, ended: false },
        };
        let tags = &seen[spaces[1] + 1..spaces[2]];
        let partial = tags.split(|byte| *byte == b':').next() == Some(b"P");
        match Time::parse(&seen[..spaces[0]]) {
            Some(time) => Self::Line { length, time, stream, partial },
            None => Self::Noise { length, ended: false },
        }
    }
}

impl<'a> Time<'a> {
    /// RFC 3339, with any fraction.
    fn parse(text: &'a [u8]) -> Option<Self> {
        let number = |from: usize, to: usize| -> Option<u32> {
            let digits = text.get(from..to)?;
            digits.iter().try_fold(0, |sum, byte| byte.is_ascii_digit().then(|| sum * 10 + u32::from(byte - b'0')))
        };
        let is = |at: usize, byte: u8| text.get(at) == Some(&byte);
        let plausible = is(4, b'-') && is(7, b'-') && is(10, b'T') && is(13, b':') && is(16, b':');
        let (_, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
        let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
        if !plausible || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
            return None;
        }
        if hour > 23 || minute > 59 || second > 59 {
            return None;
        }
        let rest = text.get(19..)?;
        let (fraction, zone) = match rest.split_first() {
            Some((b'.', rest)) => {
                let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
                (digits > 0).then(|| rest.split_at(digits))?
            }
            _ => (&rest[..0], rest),
        };
        let offset = |zone: &[u8]| {
            zone.len() == 6
                && matches!(zone[0], b'+' | b'-')
                && zone[3] == b':'
                && [1, 2, 4, 5].iter().all(|at| zone[*at].is_ascii_digit())
        };
        (zone == b"Z" || offset(zone)).then_some(Self { text, fraction, zone })
    }

    /// With nine digits of a second, and a space behind it. Answers with its length.
    fn write(self, out: &mut [u8; 48]) -> usize {
        out[..19].copy_from_slice(&self.text[..19]);
        out[19] = b'.';
        out[20..29].fill(b'0');
        let digits = self.fraction.len().min(9);
        out[20..20 + digits].copy_from_slice(&self.fraction[..digits]);
        let zone = if matches!(self.zone, b"+00:00" | b"-00:00") { b"Z" } else { self.zone };
        out[29..29 + zone.len()].copy_from_slice(zone);
        out[29 + zone.len()] = b' ';
        30 + zone.len()
    }
}

#[cfg(test)]
mod tests;
