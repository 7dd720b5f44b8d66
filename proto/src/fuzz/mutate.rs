//! Damage: to bytes, to the order of frames in a sequence, and to the fields of a message without knowing which message it is. The tests of
//! edgecore have this file, too.

use std::ops::Range;

use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, key_len, skip_field,
};

use crate::dice::Dice;

/// Numbers at which something changes.
const NUMBERS: [u64; 12] =
    [0, 1, 2, 5, 127, 128, 65_536, 4_194_304, i32::MAX as u64, u32::MAX as u64, i64::MAX as u64, u64::MAX];
/// No input grows far beyond this.
const LARGEST: usize = 64 << 10;

/// One of the seeds, damaged a few times.
pub(super) fn bytes(dice: &mut Dice, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds[dice.roll(seeds.len())].clone();
    for _ in 0..=dice.roll(5) {
        let other = &seeds[dice.roll(seeds.len())];
        damage(dice, &mut bytes, other);
    }
    bytes
}

/// A sequence of messages, damaged a few times.
pub(super) fn sequence(dice: &mut Dice, seeds: &[Vec<Vec<u8>>]) -> Vec<Vec<u8>> {
    let mut sequence = seeds[dice.roll(seeds.len())].clone();
    for _ in 0..=dice.roll(5) {
        let other = &seeds[dice.roll(seeds.len())];
        let foreign = other.get(dice.roll(other.len())).cloned().unwrap_or_default();
        let (from, to) = (dice.roll(sequence.len()), dice.roll(sequence.len()));
        match dice.roll(12) {
            0 if !sequence.is_empty() => drop(sequence.remove(from)),
            1 if !sequence.is_empty() => sequence.insert(to, sequence[from].clone()),
            2 if !sequence.is_empty() => sequence.swap(from, to),
            3 => sequence.insert(to, foreign),
            4 => sequence.extend_from_slice(&other[dice.roll(other.len())..]),
            5 if !sequence.is_empty() => damage(dice, &mut sequence[from], &foreign),
            _ if !sequence.is_empty() => sequence[from] = field(dice, &sequence[from], &foreign, 0),
            _ => {}
        }
    }
    sequence
}

fn damage(dice: &mut Dice, bytes: &mut Vec<u8>, other: &[u8]) {
    let (a, b) = (dice.roll(bytes.len() + 1), dice.roll(bytes.len() + 1));
    let part = a.min(b)..a.max(b);
    match dice.roll(7) {
        0 | 1 if !bytes.is_empty() => {
            let at = dice.roll(bytes.len());
            bytes[at] ^= 1 << dice.roll(8);
        }
        2 if !bytes.is_empty() => {
            let at = dice.roll(bytes.len());
            bytes[at] = dice.pick(&[0, 1, 0x7f, 0x80, 0xff, b'.', b'"', b'[', 0x28, 0xb5]);
        }
        3 => bytes.truncate(a),
        4 => drop(bytes.drain(part)),
        5 if bytes.len() + part.len() <= LARGEST => {
            let copy = bytes[part].to_vec();
            bytes.splice(a..a, copy);
        }
        _ if bytes.len() + other.len() <= LARGEST => {
            let from = dice.roll(other.len() + 1);
            bytes.splice(part, other[from..].iter().copied());
        }
        _ => {}
    }
}

/// A message, damaged a few times.
pub(super) fn message(dice: &mut Dice, seeds: &[Vec<u8>]) -> Vec<u8> {
    if dice.one_in(4) {
        return bytes(dice, seeds);
    }
    let mut message = seeds[dice.roll(seeds.len())].clone();
    for _ in 0..=dice.roll(3) {
        let other = &seeds[dice.roll(seeds.len())];
        message = field(dice, &message, other, 0);
    }
    message
}

/// One field of a message is changed, doubled or left out, at any depth.
fn field(dice: &mut Dice, bytes: &[u8], other: &[u8], depth: usize) -> Vec<u8> {
    let Some(fields) = fields(bytes).filter(|fields| !fields.is_empty()) else {
        let mut damaged = bytes.to_vec();
        damage(dice, &mut damaged, other);
        return damaged;
    };
    let Field { whole, value, tag, kind } = fields[dice.roll(fields.len())].clone();
    let (head, tail) = (&bytes[..whole.start], &bytes[whole.end..]);
    let mut new = head.to_vec();
    match (dice.roll(8), kind) {
        (0, _) => {}
        (1, _) if bytes.len() < LARGEST => (0..2).for_each(|_| new.extend_from_slice(&bytes[whole.clone()])),
        (2, _) => {
            encode_key(1 + u32::try_from(dice.roll(22)).unwrap(), kind, &mut new);
            new.extend_from_slice(&bytes[whole.start + key_len(tag)..whole.end]);
        }
        (_, WireType::Varint) => {
            let mut was = &bytes[value];
            let was = decode_varint(&mut was).unwrap_or_default();
            let near = [was.wrapping_add(1), was.wrapping_sub(1)];
            let number = if dice.one_in(2) { dice.pick(&near) } else { dice.pick(&NUMBERS) };
            encode_key(tag, kind, &mut new);
            encode_varint(number, &mut new);
        }
        (_, WireType::LengthDelimited) => {
            let inner = &bytes[value];
            let inner = match dice.roll(8) {
                0 => other.to_vec(),
                1 => inner.repeat(1 + dice.pick(&[LARGEST / 4, 4 * LARGEST]) / inner.len().max(1)),
                2 => Vec::new(),
                _ if depth < 4 => field(dice, inner, other, depth + 1),
                _ => inner.to_vec(),
            };
            encode_key(tag, kind, &mut new);
            // Sometimes a length that is not its own.
            let length = if dice.one_in(20) { dice.pick(&NUMBERS) } else { inner.len() as u64 };
            encode_varint(length, &mut new);
            new.extend_from_slice(&inner);
        }
        _ => {
            let mut changed = bytes[whole].to_vec();
            damage(dice, &mut changed, other);
            new.extend_from_slice(&changed);
        }
    }
    new.extend_from_slice(tail);
    new
}

#[derive(Clone)]
struct Field {
    whole: Range<usize>,
    /// Without its key, and its length if it has one.
    value: Range<usize>,
    tag: u32,
    kind: WireType,
}

/// What this is made of, if it looks like a message.
fn fields(bytes: &[u8]) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let start = bytes.len() - rest.len();
        let (tag, kind) = decode_key(&mut rest).ok()?;
        let mut behind = rest;
        skip_field(kind, tag, &mut behind, DecodeContext::default()).ok()?;
        if kind == WireType::LengthDelimited {
            decode_varint(&mut rest).ok()?;
        }
        let value = bytes.len() - rest.len()..bytes.len() - behind.len();
        fields.push(Field { whole: start..value.end, value, tag, kind });
        rest = behind;
    }
    Some(fields)
}
