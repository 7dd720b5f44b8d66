//! Requests and answers, after the MODBUS Application Protocol Specification V1.1b3. Pure.

use std::fmt;

/// Registers that one request reads (chapter 6.3).
pub const MOST_REGISTERS: u16 = 125;
/// Coils that one request reads (chapter 6.1).
pub const MOST_BITS: u16 = 2000;

/// Where values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Bits that can be written.
    Coil,
    /// Bits that cannot.
    Discrete,
    /// Registers of 16 bits that can be written.
    Holding,
    /// Registers that cannot.
    Input,
}

impl Table {
    /// Function code for reading.
    fn read_code(self) -> u8 {
        match self {
            Self::Coil => 1,
            Self::Discrete => 2,
            Self::Holding => 3,
            Self::Input => 4,
        }
    }

    /// Whether it is one of bits.
    #[must_use]
    pub fn is_bits(self) -> bool {
        matches!(self, Self::Coil | Self::Discrete)
    }

    /// How many of it one request reads.
    #[must_use]
    pub fn most(self) -> u16 {
        if self.is_bits() { MOST_BITS } else { MOST_REGISTERS }
    }
}

/// Why an answer is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The device says no, with a code of chapter 7.
    Exception(u8),
    /// The answer does not belong to the request.
    Malformed(&'static str),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (code, what) = match self {
            Self::Malformed(why) => return write!(f, "the answer is malformed: {why}"),
            Self::Exception(code) => (
                code,
                match code {
                    1 => "illegal function: the device has no such registers, or not for this use",
                    2 => "illegal data address: the device has no such register; see `register`, `offset` and `limit`",
                    3 => "illegal data value",
                    4 => "device failure; some gateways say so of a device that is not there, see `slaveID`",
                    5 => "acknowledge: it needs more time",
                    6 => "device busy",
                    8 => "memory parity error",
                    10 => "gateway path unavailable",
                    11 => "the gateway gets no answer from the device; see `slaveID`",
                    _ => "unknown",
                },
            ),
        };
        write!(f, "exception {code}, {what}")
    }
}

/// Asks for `count` values from `address` on.
#[must_use]
pub fn read(table: Table, address: u16, count: u16) -> Vec<u8> {
    let ([a, b], [c, d]) = (address.to_be_bytes(), count.to_be_bytes());
    vec![table.read_code(), a, b, c, d]
}

/// Sets coils.
#[must_use]
pub fn write_coils(address: u16, bits: &[bool]) -> Vec<u8> {
    let [a, b] = address.to_be_bytes();
    if let [bit] = bits {
        return vec![5, a, b, if *bit { 0xff } else { 0 }, 0];
    }
    let mut packed = vec![0u8; bits.len().div_ceil(8)];
    for (index, _) in bits.iter().enumerate().filter(|(_, bit)| **bit) {
        packed[index / 8] |= 1 << (index % 8);
    }
    many(15, address, bits.len(), &packed)
}

/// Sets registers, two bytes each.
#[must_use]
pub fn write_registers(address: u16, bytes: &[u8]) -> Vec<u8> {
    let [a, b] = address.to_be_bytes();
    match bytes {
        [high, low] => vec![6, a, b, *high, *low],
        _ => many(16, address, bytes.len() / 2, bytes),
    }
}

fn many(code: u8, address: u16, count: usize, bytes: &[u8]) -> Vec<u8> {
    let ([a, b], [c, d]) = (address.to_be_bytes(), u16::try_from(count).unwrap_or(u16::MAX).to_be_bytes());
    let mut pdu = vec![code, a, b, c, d, u8::try_from(bytes.len()).unwrap_or(u8::MAX)];
    pdu.extend_from_slice(bytes);
    pdu
}

/// The values in the answer to [`read`]: bytes of registers, or packed bits.
///
/// # Errors
///
/// When it is an exception, or does not fit the request.
pub fn read_answer(table: Table, count: u16, answer: &[u8]) -> Result<&[u8], Refusal> {
    let body = body(table.read_code(), answer)?;
    let expected = if table.is_bits() { usize::from(count).div_ceil(8) } else { usize::from(count) * 2 };
    match body.split_first() {
        Some((&length, bytes)) if usize::from(length) == expected && bytes.len() == expected => Ok(bytes),
        _ => Err(Refusal::Malformed("it has not as many values as were asked for")),
    }
}

/// Whether the answer to a write confirms it.
///
/// # Errors
///
/// When it is an exception, or does not repeat what was asked.
pub fn write_answer(request: &[u8], answer: &[u8]) -> Result<(), Refusal> {
    let code = request.first().copied().unwrap_or(0);
    let body = body(code, answer)?;
    if request.get(1..5).is_some_and(|asked| asked == body) {
        Ok(())
    } else {
        Err(Refusal::Malformed("it does not repeat what was written"))
    }
}

fn body(code: u8, answer: &[u8]) -> Result<&[u8], Refusal> {
    match answer {
        [function, exception] if *function == code | 0x80 => Err(Refusal::Exception(*exception)),
        [function, body @ ..] if *function == code => Ok(body),
        _ => Err(Refusal::Malformed("it is to another function")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_are_as_the_specification_has_them() {
        assert_eq!(read(Table::Holding, 0x6b, 3), [3, 0, 0x6b, 0, 3]);
        assert_eq!(write_coils(0xac, &[true]), [5, 0, 0xac, 0xff, 0]);
        let bits = [true, false, true, true, false, false, true, true, true, false];
        assert_eq!(write_coils(0x13, &bits), [15, 0, 0x13, 0, 10, 2, 0xcd, 1]);
        assert_eq!(write_registers(1, &[0, 3]), [6, 0, 1, 0, 3]);
        assert_eq!(write_registers(1, &[0, 10, 1, 2]), [16, 0, 1, 0, 2, 4, 0, 10, 1, 2]);
    }

    #[test]
    fn answers_have_to_fit() {
        assert_eq!(read_answer(Table::Holding, 1, &[3, 2, 1, 2]), Ok([1, 2].as_slice()));
        assert_eq!(read_answer(Table::Coil, 10, &[1, 2, 0xff, 3]), Ok([0xff, 3].as_slice()));
        assert_eq!(read_answer(Table::Holding, 1, &[0x83, 2]), Err(Refusal::Exception(2)));
        assert!(read_answer(Table::Holding, 2, &[3, 2, 1, 2]).is_err());
        assert!(read_answer(Table::Holding, 1, &[4, 2, 1, 2]).is_err());
        assert_eq!(write_answer(&[6, 0, 1, 0, 3], &[6, 0, 1, 0, 3]), Ok(()));
        assert!(write_answer(&[6, 0, 1, 0, 3], &[6, 0, 1, 0, 4]).is_err());
    }

    proptest! {
        #[test]
        fn no_answer_breaks_it(answer: Vec<u8>, request: Vec<u8>, count in 0..2001u16) {
            for table in [Table::Coil, Table::Discrete, Table::Holding, Table::Input] {
                if let Ok(bytes) = read_answer(table, count, &answer) {
                    prop_assert!(bytes.len() <= 250);
                }
            }
            let _ = write_answer(&request, &answer);
        }
    }
}
