//! Which values a property takes: one rule for cloudcore, which says of a Device what does not fit its model, for edgecore, which refuses it,
//! and for mappers, which convert what they read.

use base64::Engine as _;

use super::{AccessMode, ModelProperty, PropertyType};

/// The longest value there is, in bytes of its text.
pub const MAX_VALUE: usize = 64 << 10;
/// Of a value that does not fit, so many characters are shown.
const SHOWN: usize = 32;

/// What a property's model says of its values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Domain {
    /// The type.
    pub kind: PropertyType,
    /// The least, of a number.
    pub minimum: Option<f64>,
    /// The most, of a number.
    pub maximum: Option<f64>,
}

/// Why a value does not fit; reads on from the property's name.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Unfit {
    /// Its text is longer than [`MAX_VALUE`].
    #[error("has {0} bytes, at most {MAX_VALUE} are taken")]
    TooLong(usize),
    /// It is no text of its type: the value, shortened, and what it should be.
    #[error("is {0:?}, which is not {1}")]
    Mistyped(String, &'static str),
    /// The number and the bound.
    #[error("is {0}, below its minimum {1}")]
    TooSmall(f64, f64),
    /// The number and the bound.
    #[error("is {0}, above its maximum {1}")]
    TooLarge(f64, f64),
    /// What it streams goes elsewhere.
    #[error("is of type STREAM, which has no values")]
    Stream,
    /// What was to be written cannot be.
    #[error("cannot be written: the device model says ReadOnly")]
    ReadOnly,
}

impl Domain {
    /// Of a property as its model has it. A bound that is no number is none; the CRD refuses it.
    #[must_use]
    pub fn of(property: &ModelProperty) -> Self {
        let bound = |text: &str| text.trim().parse().ok().filter(|bound: &f64| bound.is_finite());
        Self { kind: property.kind, minimum: bound(&property.minimum), maximum: bound(&property.maximum) }
    }

    /// Whether a text is one of the values: INT a whole number of 64 bits; FLOAT and DOUBLE a finite number that one of 32 or 64 bits
    /// can hold, in decimal; BOOLEAN `true` or `false`; BYTES base64 (RFC 4648, with padding); STRING any text.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn check(&self, value: &str) -> Result<(), Unfit> {
        if value.len() > MAX_VALUE {
            return Err(Unfit::TooLong(value.len()));
        }
        let wrong = |right| Unfit::Mistyped(value.chars().take(SHOWN).collect(), right);
        match self.kind {
            PropertyType::Int => {
                #[expect(clippy::cast_precision_loss, reason = "bounds are compared as the apiserver compares them")]
                let number = value.parse::<i64>().map_err(|_| wrong("a whole number"))? as f64;
                self.check_bounds(number)
            }
            PropertyType::Float | PropertyType::Double => {
                let number = value.parse::<f64>().ok().filter(|number| number.is_finite());
                let number = number.ok_or_else(|| wrong("a number"))?;
                if !self.kind.holds(number) {
                    return Err(wrong("a number of 32 bits"));
                }
                self.check_bounds(number)
            }
            PropertyType::Boolean if value == "true" || value == "false" => Ok(()),
            PropertyType::Boolean => Err(wrong("true or false")),
            PropertyType::Bytes => {
                let decoded = base64::engine::general_purpose::STANDARD.decode(value);
                decoded.map(drop).map_err(|_| wrong("bytes in base64"))
            }
            PropertyType::String => Ok(()),
            PropertyType::Stream => Err(Unfit::Stream),
        }
    }

    /// Whether a number is within the bounds.
    ///
    /// # Errors
    ///
    /// Which it is not within.
    pub fn check_bounds(&self, number: f64) -> Result<(), Unfit> {
        match (self.minimum, self.maximum) {
            (Some(minimum), _) if number < minimum => Err(Unfit::TooSmall(number, minimum)),
            (_, Some(maximum)) if number > maximum => Err(Unfit::TooLarge(number, maximum)),
            _ => Ok(()),
        }
    }
}

impl PropertyType {
    /// Whether a number is finite, and still is as one of this type.
    #[must_use]
    pub fn holds(self, number: f64) -> bool {
        #[expect(clippy::cast_possible_truncation, reason = "what is beyond a FLOAT becomes infinite")]
        match self {
            Self::Float => (number as f32).is_finite(),
            _ => number.is_finite(),
        }
    }
}

impl ModelProperty {
    /// Whether a value may be desired.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn takes(&self, value: &str) -> Result<(), Unfit> {
        match self.access_mode {
            AccessMode::ReadOnly => Err(Unfit::ReadOnly),
            AccessMode::ReadWrite => Domain::of(self).check(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn takes(kind: PropertyType, minimum: &str, maximum: &str, value: &str) -> Result<(), String> {
        let (minimum, maximum) = (minimum.to_owned(), maximum.to_owned());
        let access_mode = AccessMode::ReadWrite;
        let property = ModelProperty { kind, access_mode, minimum, maximum, ..ModelProperty::default() };
        property.takes(value).map_err(|unfit| unfit.to_string())
    }

    #[test]
    fn a_property_takes_what_its_type_and_bounds_allow() {
        for (kind, value) in [
            (PropertyType::Int, "-9223372036854775808"),
            (PropertyType::Float, "1.5e3"),
            (PropertyType::Double, "-0.1"),
            (PropertyType::Double, "1e300"),
            (PropertyType::Boolean, "true"),
            (PropertyType::String, ""),
            (PropertyType::Bytes, "AA=="),
        ] {
            assert_eq!(takes(kind, "", "", value), Ok(()), "{kind:?} {value}");
        }
        for (kind, value) in [
            (PropertyType::Int, "1.0"),
            (PropertyType::Int, "9223372036854775808"),
            (PropertyType::Float, "NaN"),
            (PropertyType::Float, "1e39"),
            (PropertyType::Double, "inf"),
            (PropertyType::Double, ""),
            (PropertyType::Boolean, "1"),
            (PropertyType::Bytes, "AA"),
            (PropertyType::Stream, "x"),
            (PropertyType::String, "x".repeat(MAX_VALUE + 1).as_str()),
        ] {
            assert!(takes(kind, "", "", value).unwrap_err().len() < 100, "{kind:?} {value}");
        }
        assert_eq!(takes(PropertyType::Int, "-5", "5", "5"), Ok(()));
        assert_eq!(takes(PropertyType::Int, "-5", "5", "-6").unwrap_err(), "is -6, below its minimum -5");
        assert_eq!(takes(PropertyType::Float, "-5", "5.6", "5.7").unwrap_err(), "is 5.7, above its maximum 5.6");
        // 5.6 of 32 bits is more than 5.6 of 64.
        assert_eq!(takes(PropertyType::Float, "-5", "5.6", "5.6"), Ok(()));
        assert_eq!(ModelProperty::default().takes("x"), Err(Unfit::ReadOnly));
    }

    proptest! {
        #[test]
        fn no_text_breaks_it(value: String, minimum: String) {
            use PropertyType::{Boolean, Bytes, Double, Float, Int, Stream, String};
            for kind in [Int, Float, Double, String, Boolean, Bytes, Stream] {
                let _ = takes(kind, &minimum, "", &value);
            }
        }
    }
}
