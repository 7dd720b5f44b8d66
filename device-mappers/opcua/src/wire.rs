//! The binary encoding, as much as this client needs (OPC 10000-6, chapter 5.2). Pure.

/// How deep values may be nested.
const DEPTH: u8 = 8;

/// Bytes that make no sense; says what was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

type Result<T> = std::result::Result<T, Malformed>;

/// Bytes that are taken apart.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
    depth: u8,
}

macro_rules! numbers {
    ($($name:ident: $type:ty),*) => {
        $(
            /// A number, little endian.
            pub fn $name(&mut self) -> Result<$type> {
                let (bytes, rest) = self.rest.split_first_chunk().ok_or(Malformed(concat!("there is no ", stringify!($type))))?;
                self.rest = rest;
                Ok(<$type>::from_le_bytes(*bytes))
            }
        )*
    };
}

#[expect(clippy::missing_errors_doc, reason = "all of them say so when the bytes are none of that kind")]
impl<'a> Reader<'a> {
    /// Reads from these.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, depth: 0 }
    }

    numbers!(u8: u8, u16: u16, u32: u32, u64: u64, i8: i8, i16: i16, i32: i32, i64: i64, f32: f32, f64: f64);

    /// What was not read yet.
    #[must_use]
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// As many bytes.
    pub fn bytes(&mut self, length: usize) -> Result<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(Malformed("it ends too early"))?;
        self.rest = rest;
        Ok(bytes)
    }

    /// A ByteString; none if it is null.
    pub fn byte_string(&mut self) -> Result<Option<&'a [u8]>> {
        match usize::try_from(self.i32()?) {
            Ok(length) => self.bytes(length).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// A String; empty if it is null.
    pub fn string(&mut self) -> Result<&'a str> {
        std::str::from_utf8(self.byte_string()?.unwrap_or_default()).map_err(|_| Malformed("a text is not UTF-8"))
    }

    /// How many elements an array has: no more than there are bytes.
    pub fn count(&mut self) -> Result<usize> {
        let count = usize::try_from(self.i32()?).unwrap_or(0);
        if count > self.rest.len() { Err(Malformed("an array is longer than the message")) } else { Ok(count) }
    }

    /// Reads something that may hold others of its kind.
    fn nested<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth >= DEPTH {
            return Err(Malformed("it is nested too deeply"));
        }
        self.depth += 1;
        let read = read(self);
        self.depth -= 1;
        read
    }

    /// A NodeId, or an ExpandedNodeId.
    pub fn node_id(&mut self) -> Result<NodeId> {
        let form = self.u8()?;
        let node = match form & 0x3f {
            0 => NodeId { namespace: 0, identifier: Identifier::Number(self.u8()?.into()) },
            1 => NodeId { namespace: self.u8()?.into(), identifier: Identifier::Number(self.u16()?.into()) },
            2 => NodeId { namespace: self.u16()?, identifier: Identifier::Number(self.u32()?) },
            3 => NodeId { namespace: self.u16()?, identifier: Identifier::Text(self.string()?.to_owned()) },
            4 => NodeId { namespace: self.u16()?, identifier: Identifier::Guid(self.guid()?) },
            5 => {
                let namespace = self.u16()?;
                NodeId { namespace, identifier: Identifier::Opaque(self.byte_string()?.unwrap_or_default().to_vec()) }
            }
            _ => return Err(Malformed("there is no such form of a node identifier")),
        };
        if form & 0x80 != 0 {
            self.string()?;
        }
        if form & 0x40 != 0 {
            self.u32()?;
        }
        Ok(node)
    }

    fn guid(&mut self) -> Result<[u8; 16]> {
        self.bytes(16)?.try_into().map_err(|_| Malformed("there is no Guid"))
    }

    /// Skips a DiagnosticInfo.
    pub fn diagnostic(&mut self) -> Result<()> {
        self.nested(|reader| {
            let mask = reader.u8()?;
            for bit in [1, 2, 4, 8] {
                if mask & bit != 0 {
                    reader.i32()?;
                }
            }
            if mask & 16 != 0 {
                reader.string()?;
            }
            if mask & 32 != 0 {
                reader.u32()?;
            }
            if mask & 64 != 0 {
                reader.diagnostic()?;
            }
            Ok(())
        })
    }

    /// Skips an array of DiagnosticInfo.
    pub fn diagnostics(&mut self) -> Result<()> {
        for _ in 0..self.count()? {
            self.diagnostic()?;
        }
        Ok(())
    }

    /// An ExtensionObject: its type and its bytes.
    pub fn extension(&mut self) -> Result<(NodeId, &'a [u8])> {
        let kind = self.node_id()?;
        let body = match self.u8()? {
            0 => &[],
            1 | 2 => self.byte_string()?.unwrap_or_default(),
            _ => return Err(Malformed("there is no such form of an extension object")),
        };
        Ok((kind, body))
    }

    /// A LocalizedText; its text.
    pub fn localized(&mut self) -> Result<&'a str> {
        let mask = self.u8()?;
        if mask & 1 != 0 {
            self.string()?;
        }
        if mask & 2 != 0 { self.string() } else { Ok("") }
    }

    /// A Variant.
    pub fn variant(&mut self) -> Result<Variant> {
        self.nested(|reader| {
            let form = reader.u8()?;
            let kind = form & 0x3f;
            if form & 0x80 == 0 {
                return reader.scalar(kind);
            }
            let count = reader.count()?;
            let mut elements = Vec::new();
            for _ in 0..count {
                elements.push(reader.scalar(kind)?);
            }
            if form & 0x40 != 0 {
                for _ in 0..reader.count()? {
                    reader.i32()?;
                }
            }
            Ok(Variant::Array(elements))
        })
    }

    fn scalar(&mut self, kind: u8) -> Result<Variant> {
        Ok(match kind {
            0 => Variant::Null,
            1 => Variant::Boolean(self.u8()? != 0),
            2 => Variant::SByte(self.i8()?),
            3 => Variant::Byte(self.u8()?),
            4 => Variant::Int16(self.i16()?),
            5 => Variant::UInt16(self.u16()?),
            6 => Variant::Int32(self.i32()?),
            7 | 19 => Variant::UInt32(self.u32()?),
            8 => Variant::Int64(self.i64()?),
            9 => Variant::UInt64(self.u64()?),
            10 => Variant::Float(self.f32()?),
            11 => Variant::Double(self.f64()?),
            12 | 16 => Variant::String(self.string()?.to_owned()),
            13 => Variant::DateTime(self.i64()?),
            14 => {
                self.guid()?;
                Variant::Other("a Guid")
            }
            15 => Variant::ByteString(self.byte_string()?.unwrap_or_default().to_vec()),
            17 | 18 => {
                self.node_id()?;
                Variant::Other("a node identifier")
            }
            20 => {
                self.u16()?;
                Variant::String(self.string()?.to_owned())
            }
            21 => Variant::String(self.localized()?.to_owned()),
            22 => {
                self.extension()?;
                Variant::Other("a structure")
            }
            23 => self.nested(Self::data_value)?.value,
            24 => self.variant()?,
            25 => {
                self.diagnostic()?;
                Variant::Other("a diagnosis")
            }
            _ => return Err(Malformed("there is no such type")),
        })
    }

    /// A DataValue.
    pub fn data_value(&mut self) -> Result<DataValue> {
        let mask = self.u8()?;
        let value = if mask & 1 != 0 { self.variant()? } else { Variant::Null };
        let status = if mask & 2 != 0 { self.u32()? } else { 0 };
        let source = if mask & 4 != 0 { Some(self.i64()?) } else { None };
        if mask & 0x10 != 0 {
            self.u16()?;
        }
        let server = if mask & 8 != 0 { Some(self.i64()?) } else { None };
        if mask & 0x20 != 0 {
            self.u16()?;
        }
        Ok(DataValue { value, status, time: source.or(server).and_then(milliseconds) })
    }
}

/// Milliseconds since the Unix epoch of 100 ns since 1601; 0 is no time.
fn milliseconds(ticks: i64) -> Option<i64> {
    (ticks > 0).then(|| ticks / 10_000 - EPOCH)
}

/// 1970 less 1601, milliseconds.
const EPOCH: i64 = 11_644_473_600_000;

/// 100 ns since 1601 of milliseconds since the Unix epoch.
#[must_use]
pub fn ticks(milliseconds: i64) -> i64 {
    milliseconds.saturating_add(EPOCH).saturating_mul(10_000)
}

/// A node's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeId {
    /// Index of its namespace at the server.
    pub namespace: u16,
    /// Its name there.
    pub identifier: Identifier,
}

/// A name in a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Identifier {
    /// `i=85`
    Number(u32),
    /// `s=temperature`
    Text(String),
    /// `g=…`
    Guid([u8; 16]),
    /// `b=…`
    Opaque(Vec<u8>),
}

impl NodeId {
    /// One of the standard's.
    #[must_use]
    pub fn standard(number: u32) -> Self {
        Self { namespace: 0, identifier: Identifier::Number(number) }
    }

    /// `ns=2;s=temperature`, `i=85`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (namespace, rest) = match text.strip_prefix("ns=") {
            Some(rest) => {
                let (namespace, rest) = rest.split_once(';')?;
                (namespace.parse().ok()?, rest)
            }
            None => (0, text),
        };
        let identifier = match rest.split_once('=')? {
            ("i", number) => Identifier::Number(number.parse().ok()?),
            ("s", text) if !text.is_empty() => Identifier::Text(text.to_owned()),
            _ => return None,
        };
        Some(Self { namespace, identifier })
    }
}

/// A value.
#[allow(missing_docs, reason = "they are named as the standard's")]
#[derive(Clone, Debug, PartialEq)]
pub enum Variant {
    Null,
    Boolean(bool),
    SByte(i8),
    Byte(u8),
    Int16(i16),
    UInt16(u16),
    Int32(i32),
    UInt32(u32),
    Int64(i64),
    UInt64(u64),
    Float(f32),
    Double(f64),
    String(String),
    DateTime(i64),
    ByteString(Vec<u8>),
    Array(Vec<Self>),
    /// What is no value here.
    Other(&'static str),
}

/// A value, whether it is good, and when it was.
#[derive(Clone, Debug, PartialEq)]
pub struct DataValue {
    /// The value.
    pub value: Variant,
    /// 0: good.
    pub status: u32,
    /// The source's time, else the server's; milliseconds since the Unix epoch.
    pub time: Option<i64>,
}

/// Bytes that are put together.
#[derive(Debug, Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    /// A byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Eight bytes.
    pub fn i64(&mut self, value: i64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Eight bytes.
    pub fn f64(&mut self, value: f64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// How many elements follow.
    pub fn count(&mut self, count: usize) -> &mut Self {
        self.u32(u32::try_from(count).unwrap_or(0))
    }

    /// A ByteString.
    pub fn byte_string(&mut self, bytes: &[u8]) -> &mut Self {
        self.count(bytes.len());
        self.0.extend_from_slice(bytes);
        self
    }

    /// A String.
    pub fn string(&mut self, text: &str) -> &mut Self {
        self.byte_string(text.as_bytes())
    }

    /// A null String, ByteString or array.
    pub fn null(&mut self) -> &mut Self {
        self.u32(u32::MAX)
    }

    /// A NodeId.
    pub fn node_id(&mut self, node: &NodeId) -> &mut Self {
        match &node.identifier {
            Identifier::Number(number) => self.u8(2).u16(node.namespace).u32(*number),
            Identifier::Text(text) => self.u8(3).u16(node.namespace).string(text),
            Identifier::Guid(guid) => {
                self.u8(4).u16(node.namespace).0.extend_from_slice(guid);
                self
            }
            Identifier::Opaque(bytes) => self.u8(5).u16(node.namespace).byte_string(bytes),
        }
    }

    /// An ExtensionObject of a standard type, in binary.
    pub fn extension(&mut self, kind: u32, body: &[u8]) -> &mut Self {
        self.node_id(&NodeId::standard(kind)).u8(1).byte_string(body)
    }

    /// No ExtensionObject.
    pub fn no_extension(&mut self) -> &mut Self {
        self.u8(0).u8(0).u8(0)
    }

    /// A Variant that is no array.
    pub fn variant(&mut self, value: &Variant) -> &mut Self {
        match value {
            Variant::Boolean(truth) => self.u8(1).u8((*truth).into()),
            Variant::SByte(number) => self.u8(2).u8(number.cast_unsigned()),
            Variant::Byte(number) => self.u8(3).u8(*number),
            Variant::Int16(number) => self.u8(4).u16(number.cast_unsigned()),
            Variant::UInt16(number) => self.u8(5).u16(*number),
            Variant::Int32(number) => self.u8(6).u32(number.cast_unsigned()),
            Variant::UInt32(number) => self.u8(7).u32(*number),
            Variant::Int64(number) => self.u8(8).i64(*number),
            Variant::UInt64(number) => self.u8(9).i64(number.cast_signed()),
            Variant::Float(number) => self.u8(10).u32(number.to_bits()),
            Variant::Double(number) => self.u8(11).f64(*number),
            Variant::String(text) => self.u8(12).string(text),
            Variant::DateTime(ticks) => self.u8(13).i64(*ticks),
            Variant::ByteString(bytes) => self.u8(15).byte_string(bytes),
            Variant::Null | Variant::Array(_) | Variant::Other(_) => self.u8(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn node_identifiers_are_written_as_people_write_them() {
        let text = NodeId { namespace: 2, identifier: Identifier::Text("a=b;c".into()) };
        assert_eq!(NodeId::parse("ns=2;s=a=b;c"), Some(text));
        assert_eq!(NodeId::parse("i=85"), Some(NodeId::standard(85)));
        for wrong in ["", "ns=2", "ns=x;i=1", "ns=2;i=x", "ns=2;s=", "85", "ns=99999;i=1"] {
            assert_eq!(NodeId::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn nesting_has_an_end() {
        // A Variant of a Variant of a Variant …
        let bytes = [24; 1000];
        assert_eq!(Reader::new(&bytes).variant(), Err(Malformed("it is nested too deeply")));
        let bytes = [64; 1000];
        assert!(Reader::new(&bytes).diagnostic().is_err());
        // An array that says to be longer than the message.
        let bytes = [0x86, 0xff, 0xff, 0xff, 0x7f, 0, 0];
        assert!(Reader::new(&bytes).variant().is_err());
    }

    #[test]
    fn times_are_milliseconds() {
        assert_eq!(milliseconds(ticks(1_700_000_000_123)), Some(1_700_000_000_123));
        assert_eq!(milliseconds(0), None);
    }

    proptest! {
        #[test]
        fn values_go_both_ways(number: i64, small: i8, double in proptest::num::f64::NORMAL, text: String, bytes: Vec<u8>) {
            for value in [
                Variant::Int64(number),
                Variant::UInt64(number.cast_unsigned()),
                Variant::SByte(small),
                Variant::Double(double),
                Variant::String(text),
                Variant::ByteString(bytes),
            ] {
                let mut writer = Writer::default();
                writer.variant(&value);
                prop_assert_eq!(Reader::new(&writer.0).variant(), Ok(value));
            }
        }

        #[test]
        fn no_bytes_break_it(bytes: Vec<u8>) {
            let _ = Reader::new(&bytes).variant();
            let _ = Reader::new(&bytes).data_value();
            let _ = Reader::new(&bytes).diagnostics();
            let _ = Reader::new(&bytes).extension();
            let _ = Reader::new(&bytes).node_id();
        }
    }
}
