//! Complex numbers in double-double arithmetic that carry a bound on their own error.

use super::dd::{Dd, EPSILON, PI};

/// `re + im·i`, off by at most about `error` in absolute value.
#[derive(Debug, Clone, Copy)]
pub(super) struct Approx {
    pub(super) re: Dd,
    pub(super) im: Dd,
    error: f64,
}

impl Approx {
    pub(super) const ZERO: Self = Self {
        re: Dd::ZERO,
        im: Dd::ZERO,
        error: 0.0,
    };
    pub(super) const ONE: Self = Self {
        re: Dd::ONE,
        im: Dd::ZERO,
        error: 0.0,
    };
    pub(super) const I: Self = Self {
        re: Dd::ZERO,
        im: Dd::ONE,
        error: 0.0,
    };

    /// A real number that is right to the last digit of double-double.
    pub(super) fn real(re: Dd) -> Self {
        Self {
            re,
            im: Dd::ZERO,
            error: re.to_f64().abs() * EPSILON,
        }
    }

    pub(super) fn magnitude(self) -> f64 {
        self.re.to_f64().hypot(self.im.to_f64())
    }

    /// The value, unless it or its error bound overflowed or is not a number.
    pub(super) fn checked(self) -> Option<Self> {
        (self.re.is_finite() && self.im.is_finite() && self.error.is_finite()).then_some(self)
    }

    /// Whether the two are the same number as far as their digits tell, and these tell enough: both
    /// are known to 14 digits or more.
    pub(super) fn same(self, other: Self) -> bool {
        let error = self.error + other.error;
        let size = self.magnitude().max(other.magnitude()).max(1e-3);
        error <= size * 1e-14 && self.sub(other).magnitude() <= 8.0 * error
    }

    /// Whether the imaginary part is nothing but rounding.
    pub(super) fn is_real(self) -> bool {
        self.im.to_f64().abs() <= 8.0 * self.error + self.magnitude() * EPSILON
    }

    pub(super) fn is_negative_real(self) -> bool {
        self.is_real() && self.re.is_negative()
    }

    pub(super) fn is_zero(self) -> bool {
        self.magnitude() <= 8.0 * self.error
    }

    fn rounded(re: Dd, im: Dd, error: f64) -> Self {
        let result = Self { re, im, error };
        Self {
            error: error + result.magnitude() * 4.0 * EPSILON,
            ..result
        }
    }

    pub(super) fn neg(self) -> Self {
        Self {
            re: -self.re,
            im: -self.im,
            ..self
        }
    }

    pub(super) fn add(self, other: Self) -> Self {
        // The rounding of a sum is relative to its parts: they may cancel.
        let error = self.error + other.error + (self.magnitude() + other.magnitude()) * EPSILON;
        Self {
            re: self.re + other.re,
            im: self.im + other.im,
            error,
        }
    }

    pub(super) fn sub(self, other: Self) -> Self {
        self.add(other.neg())
    }

    pub(super) fn mul(self, other: Self) -> Self {
        let error = self.magnitude() * other.error
            + other.magnitude() * self.error
            + self.error * other.error;
        if self.im.is_zero() && other.im.is_zero() {
            return Self::rounded(self.re * other.re, Dd::ZERO, error);
        }
        Self::rounded(
            self.re * other.re - self.im * other.im,
            self.re * other.im + self.im * other.re,
            error,
        )
    }

    /// `1 / self`; not finite when `self` may be zero.
    pub(super) fn recip(self) -> Self {
        let size = self.magnitude();
        if self.is_zero() {
            return Self::real(Dd::from(f64::NAN));
        }
        let error = self.error / (size * (size - self.error).max(f64::MIN_POSITIVE));
        if self.im.is_zero() {
            return Self::rounded(Dd::ONE / self.re, Dd::ZERO, error);
        }
        let square = self.re * self.re + self.im * self.im;
        Self::rounded(self.re / square, -(self.im / square), error)
    }

    pub(super) fn abs(self) -> Self {
        if self.im.is_zero() {
            return Self {
                re: self.re.abs(),
                ..self
            };
        }
        Self::rounded(
            (self.re * self.re + self.im * self.im).sqrt(),
            Dd::ZERO,
            self.error,
        )
    }

    pub(super) fn exp(self) -> Self {
        let size = self.re.exp();
        let error = size.to_f64() * self.error;
        if self.im.is_zero() {
            return Self::rounded(size, Dd::ZERO, error + error_of_exponent(self.re, size));
        }
        let (sin, cos) = self.im.sin_cos();
        let error = error
            + error_of_exponent(self.re, size)
            + self.im.to_f64().abs() * size.to_f64() * EPSILON;
        Self::rounded(size * cos, size * sin, error)
    }

    /// Principal logarithm.
    pub(super) fn ln(self) -> Self {
        let size = self.magnitude();
        if self.is_zero() {
            return Self::real(Dd::from(f64::NAN));
        }
        let error = self.error / size + EPSILON;
        if self.im.is_zero() && !self.re.is_negative() {
            return Self::rounded(self.re.ln(), Dd::ZERO, error);
        }
        Self::rounded(self.abs().re.ln(), Dd::atan2(self.im, self.re), error)
    }

    /// Principal square root.
    pub(super) fn sqrt(self) -> Self {
        if self.is_zero() {
            return Self {
                error: self.error.sqrt(),
                ..Self::ZERO
            };
        }
        let error = self.error / self.magnitude().sqrt();
        if self.im.is_zero() {
            let root = self.re.abs().sqrt();
            return if self.re.is_negative() {
                Self::rounded(Dd::ZERO, root, error)
            } else {
                Self::rounded(root, Dd::ZERO, error)
            };
        }
        self.ln().mul(Self::real(Dd::from(0.5))).exp()
    }

    /// `self` to a whole power.
    pub(super) fn powi(self, exponent: u32) -> Self {
        let (mut result, mut square, mut rest) = (Self::ONE, self, exponent);
        while rest > 0 {
            if rest & 1 == 1 {
                result = result.mul(square);
            }
            rest >>= 1;
            if rest > 0 {
                square = square.mul(square);
            }
        }
        result
    }

    pub(super) fn pow(self, exponent: Self) -> Self {
        if self.is_zero() {
            return if exponent.is_real() && !exponent.re.is_negative() && !exponent.is_zero() {
                Self::ZERO
            } else {
                Self::real(Dd::from(f64::NAN))
            };
        }
        self.ln().mul(exponent).exp()
    }

    /// Sine and cosine, from exponentials where the argument is complex.
    pub(super) fn sin_cos(self) -> (Self, Self) {
        if self.im.is_zero() {
            let (sin, cos) = self.re.sin_cos();
            let error = self.error + (1.0 + self.re.to_f64().abs()) * EPSILON;
            return (
                Self::rounded(sin, Dd::ZERO, error),
                Self::rounded(cos, Dd::ZERO, error),
            );
        }
        let turned = self.mul(Self::I);
        let (plus, minus) = (turned.exp(), turned.neg().exp());
        let half = Self::real(Dd::from(0.5));
        let sin = plus.sub(minus).mul(half).mul(Self::I.neg());
        (sin, plus.add(minus).mul(half))
    }

    pub(super) fn atan(self) -> Self {
        if self.im.is_zero() {
            return Self::rounded(Dd::atan2(self.re, Dd::ONE), Dd::ZERO, self.error + EPSILON);
        }
        // atan z = (i/2)·(ln(1 - iz) - ln(1 + iz))
        let turned = self.mul(Self::I);
        let difference = Self::ONE.sub(turned).ln().sub(Self::ONE.add(turned).ln());
        difference.mul(Self::I).mul(Self::real(Dd::from(0.5)))
    }

    pub(super) fn asin(self) -> Self {
        // asin z = -i·ln(iz + √(1 - z²))
        let root = Self::ONE.sub(self.mul(self)).sqrt();
        self.mul(Self::I).add(root).ln().mul(Self::I.neg())
    }

    pub(super) fn acos(self) -> Self {
        Self::real(PI.scale(0.5)).sub(self.asin())
    }
}

/// Error of e^x from the rounding of x itself.
fn error_of_exponent(x: Dd, size: Dd) -> f64 {
    (1.0 + x.to_f64().abs()) * size.to_f64() * EPSILON
}

#[cfg(test)]
mod tests {
    use super::*;

    fn real(x: f64) -> Approx {
        Approx::real(Dd::from(x))
    }

    #[test]
    fn identities_hold_within_the_error_bound() {
        let two = real(2.0);
        assert!(two.sqrt().mul(two.sqrt()).same(two));
        assert!(real(-4.0).sqrt().same(Approx::I.mul(two)));
        assert!(real(0.3).asin().sin_cos().0.same(real(0.3)));
        assert!(real(3.0).acos().sin_cos().1.same(real(3.0)));
        assert!(two.add(Approx::I).ln().exp().same(two.add(Approx::I)));
        let turn = Approx::I.mul(Approx::real(PI)).exp();
        assert!(turn.same(Approx::ONE.neg()) && turn.is_negative_real());
        let (sin, cos) = two.add(Approx::I).sin_cos();
        assert!(sin.mul(sin).add(cos.mul(cos)).same(Approx::ONE));
    }

    #[test]
    fn near_misses_and_lost_digits_are_not_the_same() {
        let root = real(2.0).sqrt();
        assert!(!root.same(real(std::f64::consts::SQRT_2)));
        let huge = real(1e30);
        let lost = huge.add(root).sub(huge);
        assert!(!lost.same(root), "no digits are left to tell");
        assert!(real(1.0).sub(real(1.0)).same(Approx::ZERO));
        assert!(real(0.0).recip().checked().is_none());
    }
}
