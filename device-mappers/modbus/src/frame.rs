//! Frames around requests and answers: MBAP on TCP, address and check sum on serial lines. Pure.

/// What the bytes that came so far are.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// The beginning of an answer.
    More,
    /// An answer.
    Whole {
        /// Of the request it belongs to; none on a serial line.
        transaction: Option<u16>,
        /// Which device it is from.
        unit: u8,
        /// The answer itself.
        pdu: Vec<u8>,
        /// Bytes it took.
        length: usize,
    },
    /// No answer.
    Broken(&'static str),
}

/// A request on TCP (MODBUS Messaging on TCP/IP Implementation Guide V1.0b, chapter 3.1.3).
#[must_use]
pub fn tcp(transaction: u16, unit: u8, pdu: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(7 + pdu.len());
    frame.extend_from_slice(&transaction.to_be_bytes());
    frame.extend_from_slice(&[0, 0]);
    frame.extend_from_slice(&u16::try_from(pdu.len() + 1).unwrap_or(u16::MAX).to_be_bytes());
    frame.push(unit);
    frame.extend_from_slice(pdu);
    frame
}

/// An answer on TCP.
#[must_use]
pub fn parse_tcp(bytes: &[u8]) -> Frame {
    let Some((&[t1, t2, p1, p2, l1, l2, unit], rest)) = bytes.split_first_chunk::<7>() else { return Frame::More };
    let length = usize::from(u16::from_be_bytes([l1, l2]));
    if (p1, p2) != (0, 0) || !(3..=254).contains(&length) {
        return Frame::Broken("what answers does not speak Modbus TCP");
    }
    match rest.get(..length - 1) {
        Some(pdu) => Frame::Whole {
            transaction: Some(u16::from_be_bytes([t1, t2])),
            unit,
            pdu: pdu.to_vec(),
            length: 6 + length,
        },
        None => Frame::More,
    }
}

/// A request on a serial line (MODBUS over Serial Line V1.02, chapter 2.5.1).
#[must_use]
pub fn rtu(unit: u8, pdu: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(3 + pdu.len());
    frame.push(unit);
    frame.extend_from_slice(pdu);
    frame.extend_from_slice(&crc(&frame).to_le_bytes());
    frame
}

/// An answer on a serial line. Its length follows from its function.
#[must_use]
pub fn parse_rtu(bytes: &[u8]) -> Frame {
    let (Some(&unit), Some(&function)) = (bytes.first(), bytes.get(1)) else { return Frame::More };
    let length = match (function, bytes.get(2)) {
        (0x81.., _) => 5,
        (1..=4, Some(&count)) => 5 + usize::from(count),
        (1..=4, None) => return Frame::More,
        (5 | 6 | 15 | 16, _) => 8,
        _ => return Frame::Broken("an answer to no function that was asked for"),
    };
    let Some(frame) = bytes.get(..length) else { return Frame::More };
    let (content, sum) = frame.split_at(length - 2);
    if sum != crc(content).to_le_bytes() {
        return Frame::Broken("the check sum of an answer is wrong: see `baudRate`, `parity` and the cable");
    }
    Frame::Whole { transaction: None, unit, pdu: content[1..].to_vec(), length }
}

/// CRC-16 of serial lines: polynomial 0xA001, reflected, from 0xFFFF.
fn crc(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0xffff, |sum, &byte| {
        (0..8).fold(sum ^ u16::from(byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xa001 } else { sum >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_are_as_the_specifications_have_them() {
        assert_eq!(rtu(1, &[3, 0, 0, 0, 1]), [1, 3, 0, 0, 0, 1, 0x84, 0x0a]);
        assert_eq!(tcp(0x1501, 0xff, &[3, 0, 4, 0, 1]), [0x15, 1, 0, 0, 0, 6, 0xff, 3, 0, 4, 0, 1]);
        assert_eq!(
            parse_tcp(&[0x15, 1, 0, 0, 0, 5, 0xff, 3, 2, 0, 5]),
            Frame::Whole { transaction: Some(0x1501), unit: 255, pdu: vec![3, 2, 0, 5], length: 11 }
        );
        assert!(matches!(parse_tcp(b"HTTP/1.1 400 Bad Request"), Frame::Broken(_)));
    }

    proptest! {
        #[test]
        fn an_answer_may_come_in_pieces(unit: u8, data in proptest::collection::vec(any::<u8>(), 1..250), cut in 0..300usize) {
            let mut pdu = vec![3, u8::try_from(data.len()).unwrap()];
            pdu.extend(data);
            let whole = rtu(unit, &pdu);
            let cut = cut.min(whole.len() - 1);
            prop_assert_eq!(parse_rtu(&whole[..cut]), Frame::More);
            prop_assert_eq!(parse_rtu(&whole), Frame::Whole { transaction: None, unit, pdu: pdu.clone(), length: whole.len() });
            let whole = tcp(7, unit, &pdu);
            prop_assert_eq!(parse_tcp(&whole[..cut.min(whole.len() - 1)]), Frame::More);
            let length = whole.len();
            prop_assert_eq!(parse_tcp(&whole), Frame::Whole { transaction: Some(7), unit, pdu, length });
        }

        #[test]
        fn no_bytes_break_it(bytes: Vec<u8>) {
            let _ = (parse_tcp(&bytes), parse_rtu(&bytes));
        }
    }
}
