//! Kubernetes quantities (`100m`, `1.5Gi`, `1e3`): parsed exactly, kept in whole billionths, rounded away from zero.
//!
//! A quantity never becomes smaller than what was written: an amount below a billionth counts as one, a fraction of the wanted unit
//! as a whole unit. Amounts beyond `i64::MAX` units are cut to it. Floating point is not used anywhere.

use std::fmt;
use std::ops::Add;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

const NANO: i128 = 1_000_000_000;
const LARGEST: i128 = i64::MAX as i128;

/// Why a text is not a quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// There is no digit before the suffix.
    #[error("quantity {0:?} has no number: write it like 100m, 1.5Gi or 1e3")]
    NoNumber(String),
    /// What follows the number is no known suffix.
    #[error(
        "quantity {0:?} has the unknown suffix {1:?}: use n, u, m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, Ei or an exponent like e3"
    )]
    UnknownSuffix(String, String),
}

/// An amount of a resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Amount {
    nano: i128,
}

impl Amount {
    /// Nothing.
    pub const ZERO: Self = Self { nano: 0 };

    /// Parses the text of a quantity.
    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        let (negative, unsigned) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, suffix) = unsigned.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
            return Err(QuantityError::NoNumber(text.to_owned()));
        }
        let (exponent, unit) =
            multiplier(suffix).ok_or_else(|| QuantityError::UnknownSuffix(text.to_owned(), suffix.to_owned()))?;
        let nano = scale(whole.as_bytes(), fraction.as_bytes(), exponent, unit);
        Ok(Self { nano: if negative { -nano } else { nano } })
    }

    /// Parses a quantity of a Kubernetes object.
    pub fn of(quantity: &Quantity) -> Result<Self, QuantityError> {
        Self::parse(&quantity.0)
    }

    /// An amount given in thousandths.
    pub fn from_milli(milli: i64) -> Self {
        Self { nano: i128::from(milli) * (NANO / 1000) }
    }

    /// An amount given in whole units, such as bytes.
    pub fn from_units(units: i64) -> Self {
        Self { nano: i128::from(units) * NANO }
    }

    /// In thousandths, rounded away from zero, cut to what an `i64` holds.
    pub fn milli(self) -> i64 {
        narrow(divide_away(self.nano, NANO / 1000))
    }

    /// In whole units, rounded away from zero.
    pub fn units(self) -> i64 {
        narrow(divide_away(self.nano, NANO))
    }

    /// Neither more nor less than nothing.
    pub fn is_zero(self) -> bool {
        self.nano == 0
    }

    /// More than nothing.
    pub fn is_positive(self) -> bool {
        self.nano > 0
    }
}

impl Add for Amount {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { nano: (self.nano + other.nano).clamp(-LARGEST * NANO, LARGEST * NANO) }
    }
}

impl fmt::Display for Amount {
    /// The canonical decimal form: `250m`, `1`, `1k`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let below = [("n", 1), ("u", 1_000), ("m", 1_000_000), ("", NANO)];
        if let Some((suffix, unit)) = below.iter().find(|(_, unit)| self.nano % (unit * 1000) != 0) {
            return write!(f, "{}{suffix}", self.nano / unit);
        }
        let (mut rest, mut suffix) = (self.nano / NANO, "");
        for next in ["k", "M", "G", "T", "P", "E"] {
            if rest == 0 || rest % 1000 != 0 {
                break;
            }
            (rest, suffix) = (rest / 1000, next);
        }
        write!(f, "{rest}{suffix}")
    }
}

/// The quantity of so many thousandths in canonical decimal form: `250m`, `2`.
pub fn decimal(milli: i64) -> Quantity {
    Quantity(Amount::from_milli(milli).to_string())
}

/// The quantity of so many bytes in canonical binary form: `64Mi`; below 1024 decimal, as upstream writes it.
pub fn binary(bytes: i64) -> Quantity {
    if bytes.unsigned_abs() < 1024 {
        return Quantity(Amount::from_units(bytes).to_string());
    }
    let (mut rest, mut suffix) = (bytes, "");
    for next in ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"] {
        if rest % 1024 != 0 {
            break;
        }
        (rest, suffix) = (rest / 1024, next);
    }
    Quantity(format!("{rest}{suffix}"))
}

/// Power of ten and factor that a suffix stands for.
fn multiplier(suffix: &str) -> Option<(i64, i128)> {
    let decimal = match suffix {
        "n" => Some(-9),
        "u" => Some(-6),
        "m" => Some(-3),
        "" => Some(0),
        "k" => Some(3),
        "M" => Some(6),
        "G" => Some(9),
        "T" => Some(12),
        "P" => Some(15),
        "E" => Some(18),
        _ => None,
    };
    if let Some(exponent) = decimal {
        return Some((exponent, 1));
    }
    let binary = match suffix {
        "Ki" => 10,
        "Mi" => 20,
        "Gi" => 30,
        "Ti" => 40,
        "Pi" => 50,
        "Ei" => 60,
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            return exponent.parse::<i32>().ok().map(|exponent| (i64::from(exponent), 1));
        }
    };
    Some((0, 1 << binary))
}

/// `whole.fraction * 10^exponent * unit` in billionths, rounded up and cut to the largest amount.
fn scale(whole: &[u8], fraction: &[u8], exponent: i64, unit: i128) -> i128 {
    let digits: Vec<i128> = whole.iter().chain(fraction).map(|digit| i128::from(digit - b'0')).collect();
    let point = i64::try_from(whole.len()).unwrap_or(i64::MAX).saturating_add(exponent);
    if digits.iter().all(|digit| *digit == 0) {
        return 0;
    }

    let mut integer: i128 = 0;
    let before = usize::try_from(point).unwrap_or(0);
    for index in 0..before {
        integer = integer * 10 + digits.get(index).copied().unwrap_or(0);
        if integer * unit > LARGEST {
            return LARGEST * NANO;
        }
        if index >= digits.len() && integer == 0 {
            break;
        }
    }

    // Digits after the point, last one first: each step divides what has gathered by ten, so whether anything was ever cut off is all
    // that is needed to round the exact sum up.
    let (mut below, mut cut) = (0, false);
    let mut push = |digit: i128| {
        let sum = below + digit * unit * NANO;
        cut |= sum % 10 != 0;
        below = sum / 10;
    };
    digits.iter().skip(before).rev().for_each(|digit| push(*digit));
    // 40 more divisions bring any sum to nothing.
    let leading_zeros = usize::try_from(point.saturating_neg()).unwrap_or(0).min(40);
    (0..leading_zeros).for_each(|_| push(0));
    (integer * unit * NANO + below + i128::from(cut)).min(LARGEST * NANO)
}

fn divide_away(dividend: i128, divisor: i128) -> i128 {
    let quotient = dividend / divisor;
    if dividend % divisor == 0 { quotient } else { quotient + dividend.signum() }
}

fn narrow(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn milli(text: &str) -> i64 {
        Amount::parse(text).unwrap().milli()
    }

    fn units(text: &str) -> i64 {
        Amount::parse(text).unwrap().units()
    }

    #[test]
    fn every_suffix() {
        for (text, expected) in [
            ("0", 0),
            ("100m", 100),
            ("1", 1000),
            ("+1", 1000),
            ("-1", -1000),
            (".5", 500),
            ("0.1", 100),
            ("1.", 1000),
            ("1.5", 1500),
            ("1k", 1_000_000),
            ("1e3", 1_000_000),
            ("1E3", 1_000_000),
            ("1e-3", 1),
            ("1E-3", 1),
            ("1e+2", 100_000),
            ("500u", 1),
            ("1n", 1),
            ("1500u", 2),
            ("-1500u", -2),
            ("0.0001", 1),
            ("0001.50", 1500),
            ("1Ki", 1_024_000),
            ("0.5Ki", 512_000),
        ] {
            assert_eq!(milli(text), expected, "{text}");
        }
        for (text, expected) in [
            ("1.5Gi", 1_610_612_736),
            ("64Mi", 67_108_864),
            ("1Ti", 1 << 40),
            ("1Pi", 1 << 50),
            ("1Ei", 1 << 60),
            ("129M", 129_000_000),
            ("128974848000m", 128_974_848),
            ("1E", 1_000_000_000_000_000_000),
            ("0.0000000001", 1),
            ("1e-400", 1),
            ("1e400", i64::MAX),
            ("0e400", 0),
            ("0e2147483647", 0),
            ("1e-2147483648", 1),
            ("8Ei", i64::MAX),
            ("-8Ei", -i64::MAX),
            ("99999999999999999999999999", i64::MAX),
            ("0.3Ei", 345_876_451_382_054_093),
        ] {
            assert_eq!(units(text), expected, "{text}");
        }
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for text in ["", ".", "+", "-", "Gi", "m", "1.2.3", "--1", " 1"] {
            assert!(matches!(Amount::parse(text), Err(QuantityError::NoNumber(_))), "{text:?}");
        }
        for (text, suffix) in [
            ("1x", "x"),
            ("1e", "e"),
            ("1ee3", "ee3"),
            ("1K", "K"),
            ("1mi", "mi"),
            ("1 ", " "),
            ("1Gi5", "Gi5"),
            ("1é", "é"),
        ] {
            assert_eq!(
                Amount::parse(text),
                Err(QuantityError::UnknownSuffix(text.to_owned(), suffix.to_owned())),
                "{text:?}"
            );
        }
    }

    #[test]
    fn canonical_forms() {
        for (amount, text) in
            [(0, "0"), (250, "250m"), (1000, "1"), (1500, "1500m"), (1_000_000, "1k"), (-250, "-250m")]
        {
            assert_eq!(decimal(amount).0, text);
        }
        for (bytes, text) in [
            (0, "0"),
            (1000, "1k"),
            (1023, "1023"),
            (1024, "1Ki"),
            (1025, "1025"),
            (1 << 30, "1Gi"),
            (3 << 29, "1536Mi"),
            (i64::MIN, "-8Ei"),
        ] {
            assert_eq!(binary(bytes).0, text);
        }
        assert_eq!(Amount::parse("12n").unwrap().to_string(), "12n");
        assert_eq!(Amount::parse("1.5u").unwrap().to_string(), "1500n");
    }

    proptest! {
        #[test]
        fn whole_numbers_are_exact(value in any::<i64>().prop_filter("symmetric", |value| *value != i64::MIN)) {
            prop_assert_eq!(units(&value.to_string()), value);
            prop_assert_eq!(units(&binary(value).0), value);
            let third = value / 1000;
            prop_assert_eq!(milli(&decimal(third).0), third);
        }

        #[test]
        fn fractions_round_up_and_never_by_more_than_one(whole in 0_u32.., fraction in "[0-9]{1,30}", suffix in 0_usize..4) {
            let (suffix, unit) = [("", 1_u64), ("Ki", 1 << 10), ("Mi", 1 << 20), ("k", 1000)][suffix];
            let low = i64::from(whole) * i64::try_from(unit).unwrap();
            let amount = units(&format!("{whole}.{fraction}{suffix}"));
            prop_assert!(amount >= low && amount <= low + i64::try_from(unit).unwrap());
            prop_assert_eq!(amount > low, fraction.bytes().any(|digit| digit != b'0'));
        }

        #[test]
        fn no_text_panics(text in "[-+]?[0-9.]{0,40}[eEinumkKMGTP]{0,3}[-+]?[0-9]{0,12}") {
            let _ = Amount::parse(&text).map(|amount| (amount.milli(), amount.units(), amount.to_string()));
        }
    }
}
