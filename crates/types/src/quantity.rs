//! Kubernetes resource quantities (`500m`, `128Mi`, `1e3`), kept exactly.

use std::{fmt, str::FromStr};

/// A text that is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid quantity {0:?}: must be a decimal number with an optional suffix (n, u, m, k, M, G, T, \
     P, E, Ki, Mi, Gi, Ti, Pi, Ei or an exponent)"
)]
pub struct QuantityError(String);

/// An exact amount, in units of 10⁻⁹ (the finest that Kubernetes keeps).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Quantity {
    nano: i128,
}

const NANO: i128 = 1_000_000_000;

impl Quantity {
    /// The amount of whole `units`.
    pub fn from_units(units: i64) -> Self {
        Self {
            nano: i128::from(units) * NANO,
        }
    }

    /// Whole units, rounded up as Kubernetes does; saturates at the bounds of `i64`.
    pub fn value(self) -> i64 {
        clamp(div_up(self.nano, NANO))
    }

    /// Thousandths, rounded up; saturates. The CPU unit "millicores".
    pub fn milli_value(self) -> i64 {
        clamp(div_up(self.nano, NANO / 1000))
    }
}

impl std::ops::Add for Quantity {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            nano: self.nano.saturating_add(other.nano),
        }
    }
}

impl std::ops::Sub for Quantity {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            nano: self.nano.saturating_sub(other.nano),
        }
    }
}

impl std::iter::Sum for Quantity {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::default(), std::ops::Add::add)
    }
}

fn div_up(value: i128, by: i128) -> i128 {
    let floor = value.div_euclid(by);
    if value.rem_euclid(by) == 0 {
        floor
    } else {
        floor + 1
    }
}

fn clamp(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        parse(text)
            .map(|nano| Self { nano })
            .ok_or_else(|| QuantityError(text.chars().take(64).collect()))
    }
}

fn parse(text: &str) -> Option<i128> {
    let (negative, body) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let end = body
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(body.len());
    let (number, suffix) = body.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || number.len() > 30 {
        return None;
    }
    let (multiplier, ten_power) = scale(suffix)?;
    let digits: i128 = format!("0{whole}{fraction}").parse().ok()?;
    // value = digits * multiplier * 10^(ten_power - fraction digits), counted in nano units.
    let exponent = ten_power - i32::try_from(fraction.len()).ok()? + 9;
    let scaled = digits.checked_mul(multiplier)?;
    let nano = if exponent >= 0 {
        scaled.checked_mul(10i128.checked_pow(exponent.unsigned_abs())?)?
    } else {
        // Finer than nano: rounded up, away from zero, as upstream does.
        match 10i128.checked_pow(exponent.unsigned_abs()) {
            Some(by) => div_up(scaled, by),
            None => i128::from(scaled > 0),
        }
    };
    Some(if negative { -nano } else { nano })
}

fn scale(suffix: &str) -> Option<(i128, i32)> {
    Some(match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        exponent => {
            let digits = exponent.strip_prefix(['e', 'E'])?;
            (1, digits.parse::<i32>().ok().filter(|e| e.abs() <= 18)?)
        }
    })
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nano % NANO == 0 {
            write!(f, "{}", self.nano / NANO)
        } else if self.nano % (NANO / 1000) == 0 {
            write!(f, "{}m", self.nano / (NANO / 1000))
        } else if self.nano % 1000 == 0 {
            write!(f, "{}u", self.nano / 1000)
        } else {
            write!(f, "{}n", self.nano)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn q(text: &str) -> Quantity {
        text.parse().unwrap()
    }

    #[test]
    fn suffixes_mean_what_kubernetes_says() {
        assert_eq!(q("128Mi").value(), 134_217_728);
        assert_eq!(q("1.5Gi").value(), 1_610_612_736);
        assert_eq!(q("250m").milli_value(), 250);
        assert_eq!(q("0.1").milli_value(), 100);
        assert_eq!(q("1e3").value(), 1000);
        assert_eq!(q("1E").value(), 1_000_000_000_000_000_000);
        assert_eq!(q("-1.5").value(), -1);
    }

    #[test]
    fn values_round_up() {
        assert_eq!(q("1m").value(), 1);
        assert_eq!(q("100u").milli_value(), 1);
        assert_eq!(q("0.0000000001"), q("1n"));
    }

    #[test]
    fn refuses_what_is_no_quantity() {
        for bad in ["", "-", "Mi", "1.2.3", "1 Gi", "1gi", "0x10", "1e99", "."] {
            assert!(bad.parse::<Quantity>().is_err(), "{bad}");
        }
    }
}
