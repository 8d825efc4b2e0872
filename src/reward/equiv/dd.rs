//! Double-double arithmetic: a real number as the unevaluated sum of two `f64`, about 31 digits.
//!
//! The algorithms are the classical ones (Dekker 1971; Hida, Li and Bailey 2001). Only what the
//! comparison of answers needs is here; overflow gives infinities and NaN, which callers check.

use std::cmp::Ordering;
use std::f64::consts;
use std::ops::{Add, Div, Mul, Neg, Sub};

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{Signed, ToPrimitive, Zero};

/// Relative error of one operation, with a margin: 2^-102.
pub(super) const EPSILON: f64 = 1.0 / (1u128 << 102) as f64;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Dd {
    hi: f64,
    lo: f64,
}

pub(super) const PI: Dd = Dd {
    hi: consts::PI,
    lo: 1.2246467991473532e-16,
};
const HALF_PI: Dd = Dd {
    hi: consts::FRAC_PI_2,
    lo: 6.123233995736766e-17,
};
const LN_2: Dd = Dd {
    hi: consts::LN_2,
    lo: 2.3190468138462996e-17,
};

fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let bb = sum - a;
    (sum, (a - (sum - bb)) + (b - bb))
}

fn quick_two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    (sum, b - (sum - a))
}

fn split(a: f64) -> (f64, f64) {
    const SPLITTER: f64 = 134217729.0; // 2^27 + 1
    let t = SPLITTER * a;
    let hi = t - (t - a);
    (hi, a - hi)
}

fn two_prod(a: f64, b: f64) -> (f64, f64) {
    let product = a * b;
    let (a_hi, a_lo) = split(a);
    let (b_hi, b_lo) = split(b);
    (
        product,
        ((a_hi * b_hi - product) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo,
    )
}

impl Dd {
    pub(super) const ZERO: Self = Self { hi: 0.0, lo: 0.0 };
    pub(super) const ONE: Self = Self { hi: 1.0, lo: 0.0 };

    fn normal((hi, lo): (f64, f64)) -> Self {
        let (hi, lo) = quick_two_sum(hi, lo);
        Self { hi, lo }
    }

    pub(super) fn to_f64(self) -> f64 {
        self.hi
    }

    pub(super) fn is_finite(self) -> bool {
        self.hi.is_finite() && self.lo.is_finite()
    }

    pub(super) fn is_zero(self) -> bool {
        self.hi == 0.0
    }

    pub(super) fn is_negative(self) -> bool {
        self.hi < 0.0
    }

    pub(super) fn abs(self) -> Self {
        if self.is_negative() { -self } else { self }
    }

    /// Multiplication by a power of two, exact.
    pub(super) fn scale(self, factor: f64) -> Self {
        Self {
            hi: self.hi * factor,
            lo: self.lo * factor,
        }
    }

    pub(super) fn floor(self) -> Self {
        let hi = self.hi.floor();
        if hi == self.hi {
            Self::normal((hi, self.lo.floor()))
        } else {
            Self::from(hi)
        }
    }

    pub(super) fn sqrt(self) -> Self {
        if self.hi <= 0.0 {
            return if self.is_zero() {
                Self::ZERO
            } else {
                Self::from(f64::NAN)
            };
        }
        // One Newton step from the double result (Karp's trick).
        let inverse = 1.0 / self.hi.sqrt();
        let root = self.hi * inverse;
        let rest = (self - Self::from(root) * Self::from(root)).hi;
        Self::normal(two_sum(root, rest * (inverse * 0.5)))
    }

    pub(super) fn exp(self) -> Self {
        if self.hi > 690.0 {
            return Self::from(f64::INFINITY);
        }
        if self.hi < -690.0 {
            return Self::ZERO;
        }
        // x = k·ln 2 + 512·r, so |r| < 7e-4; then exp(512 r) by nine squarings of (1 + s).
        let k = (self.hi / LN_2.hi).round();
        let r = (self - LN_2 * Self::from(k)).scale(1.0 / 512.0);
        let mut term = r;
        let mut s = r;
        for n in 2..=11 {
            term = term * r / Self::from(f64::from(n));
            s = s + term;
        }
        for _ in 0..9 {
            s = s.scale(2.0) + s * s;
        }
        (s + Self::ONE).scale(2f64.powi(k as i32))
    }

    /// Natural logarithm of a positive number.
    pub(super) fn ln(self) -> Self {
        if self.hi <= 0.0 {
            return Self::from(f64::NAN);
        }
        let guess = Self::from(self.hi.ln());
        let better = guess + self * (-guess).exp() - Self::ONE;
        better + self * (-better).exp() - Self::ONE
    }

    /// Sine and cosine; NaN where the argument is too large for a meaningful reduction.
    pub(super) fn sin_cos(self) -> (Self, Self) {
        let quarter = (self.hi / HALF_PI.hi).round();
        if quarter.is_nan() || quarter.abs() > 1e9 {
            return (Self::from(f64::NAN), Self::from(f64::NAN));
        }
        let r = self - HALF_PI * Self::from(quarter);
        let square = r * r;
        let (mut sin, mut cos) = (r, Self::ONE);
        let (mut sin_term, mut cos_term) = (r, Self::ONE);
        for n in 1..=14 {
            let n = f64::from(n);
            cos_term = -(cos_term * square) / Self::from((2.0 * n - 1.0) * (2.0 * n));
            cos = cos + cos_term;
            sin_term = -(sin_term * square) / Self::from((2.0 * n) * (2.0 * n + 1.0));
            sin = sin + sin_term;
        }
        match quarter.rem_euclid(4.0) as u8 {
            0 => (sin, cos),
            1 => (cos, -sin),
            2 => (-sin, -cos),
            _ => (-cos, sin),
        }
    }

    /// Angle of the point (`x`, `y`) in (-π, π].
    pub(super) fn atan2(y: Self, x: Self) -> Self {
        if y.is_zero() {
            return if x.is_negative() { PI } else { Self::ZERO };
        }
        // Scaled so that squares neither overflow nor vanish, then one Newton step.
        let size = x.hi.abs().max(y.hi.abs());
        let (x, y) = (x / Self::from(size), y / Self::from(size));
        let length = (x * x + y * y).sqrt();
        let guess = Self::from(y.hi.atan2(x.hi));
        let (sin, cos) = guess.sin_cos();
        guess + (y * cos - x * sin) / length
    }
}

impl From<f64> for Dd {
    fn from(hi: f64) -> Self {
        Self { hi, lo: 0.0 }
    }
}

impl From<&BigInt> for Dd {
    fn from(value: &BigInt) -> Self {
        let hi = value.to_f64().unwrap_or(f64::INFINITY);
        if !hi.is_finite() {
            return Self::from(hi);
        }
        let rest = num_traits::FromPrimitive::from_f64(hi)
            .map_or_else(BigInt::zero, |rounded: BigInt| value - rounded);
        Self::normal((hi, rest.to_f64().unwrap_or(0.0)))
    }
}

impl From<&BigRational> for Dd {
    fn from(value: &BigRational) -> Self {
        // Numerator and denominator are cut to about 160 bits, so that neither overflows while the
        // quotient keeps its 106 bits.
        let shift = |part: &BigInt| part.bits().saturating_sub(160);
        let (up, down) = (shift(&value.numer().abs()), shift(value.denom()));
        let quotient = Self::from(&(value.numer() >> up)) / Self::from(&(value.denom() >> down));
        let exponent = up as i64 - down as i64;
        match i32::try_from(exponent) {
            // Two steps: a single power of two may overflow where the product does not.
            Ok(e) => quotient.scale(2f64.powi(e / 2)).scale(2f64.powi(e - e / 2)),
            Err(_) => Self::from(f64::NAN),
        }
    }
}

impl Neg for Dd {
    type Output = Self;
    fn neg(self) -> Self {
        Self {
            hi: -self.hi,
            lo: -self.lo,
        }
    }
}

impl Add for Dd {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        let (hi, lo) = two_sum(self.hi, other.hi);
        let (t_hi, t_lo) = two_sum(self.lo, other.lo);
        let (hi, lo) = quick_two_sum(hi, lo + t_hi);
        Self::normal((hi, lo + t_lo))
    }
}

impl Sub for Dd {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl Mul for Dd {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let (hi, lo) = two_prod(self.hi, other.hi);
        Self::normal((hi, lo + (self.hi * other.lo + self.lo * other.hi)))
    }
}

impl Div for Dd {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let first = self.hi / other.hi;
        let rest = self - other * Self::from(first);
        let second = rest.hi / other.hi;
        let rest = rest - other * Self::from(second);
        let (hi, lo) = quick_two_sum(first, second);
        Self::normal((hi, lo)) + Self::from(rest.hi / other.hi)
    }
}

impl PartialOrd for Dd {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        (*self - *other).hi.partial_cmp(&0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses a decimal of up to 40 digits exactly, then rounds to double-double.
    fn decimal(text: &str) -> Dd {
        let (whole, fraction) = text.split_once('.').unwrap();
        let digits: BigInt = format!("{whole}{fraction}").parse().unwrap();
        let scale = BigInt::from(10).pow(fraction.len() as u32);
        Dd::from(&BigRational::new(digits, scale))
    }

    fn close(a: Dd, b: Dd) {
        let error = (a - b).to_f64().abs() / b.to_f64().abs();
        assert!(error < 1e-30, "{a:?} against {b:?}: {error:e}");
    }

    #[test]
    fn functions_match_published_digits() {
        let one = Dd::ONE;
        let two = Dd::from(2.0);
        close(PI, decimal("3.1415926535897932384626433832795028842"));
        close(
            one.exp(),
            decimal("2.7182818284590452353602874713526624978"),
        );
        close(
            two.sqrt(),
            decimal("1.4142135623730950488016887242096980786"),
        );
        close(two.ln(), decimal("0.6931471805599453094172321214581765681"));
        close(
            one.sin_cos().0,
            decimal("0.8414709848078965066525023216302989996"),
        );
        close(
            one.sin_cos().1,
            decimal("0.5403023058681397174009366074429766037"),
        );
        close(
            Dd::from(100.0).sin_cos().0,
            decimal("-0.5063656411097587936565576104597854320"),
        );
        close(
            Dd::atan2(one, two),
            decimal("0.4636476090008061162142562314612144020"),
        );
        close(
            Dd::from(-20.5).exp(),
            decimal("0.000000001250152866386742628937553119231222182"),
        );
    }

    #[test]
    fn arithmetic_keeps_thirty_digits() {
        let third = Dd::ONE / Dd::from(3.0);
        close(third, decimal("0.3333333333333333333333333333333333333"));
        close(third * Dd::from(3.0), Dd::ONE);
        let big = Dd::from(1e20) + Dd::from(1e-8);
        assert_eq!((big - Dd::from(1e20)).to_f64(), 1e-8);
        let rational = BigRational::new(
            BigInt::from(10).pow(500),
            BigInt::from(3) * BigInt::from(10).pow(500),
        );
        close(Dd::from(&rational), third);
    }
}
