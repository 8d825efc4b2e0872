//! Exact values: rational arithmetic with bounded size.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Signed, ToPrimitive, Zero};

use super::Fuel;
use super::node::{Function, Node};

/// Bits of a numerator or denominator.
const MAX_BITS: u64 = 1 << 14;

/// The value of an expression without variables whose value is rational, if that can be worked out
/// within the bounds.
pub(super) fn value(node: &Node, fuel: &Fuel) -> Option<BigRational> {
    fuel.take(1)?;
    let result = match node {
        Node::Number { value, .. } => return Some(value.clone()),
        Node::Neg(inner) => -value(inner, fuel)?,
        Node::Sum(terms) => {
            let mut total = BigRational::zero();
            for term in terms {
                total += value(term, fuel)?;
                bounded(&total, fuel)?;
            }
            total
        }
        Node::Product(factors) => {
            let mut total = BigRational::one();
            for factor in factors {
                total *= value(factor, fuel)?;
                bounded(&total, fuel)?;
            }
            total
        }
        Node::Recip(inner) => {
            let inner = value(inner, fuel)?;
            if inner.is_zero() {
                return None;
            }
            inner.recip()
        }
        Node::Power(base, exponent) => power(&value(base, fuel)?, &value(exponent, fuel)?)?,
        Node::Percent(inner) => value(inner, fuel)? / BigInt::from(100),
        Node::Degrees(inner) => value(inner, fuel)?,
        Node::Based { digits, base: 10 } => BigRational::from_integer(digits.parse().ok()?),
        Node::Call(function, operands) => call(*function, operands, fuel)?,
        _ => return None,
    };
    bounded(&result, fuel)?;
    Some(result)
}

fn bounded(value: &BigRational, fuel: &Fuel) -> Option<()> {
    let bits = value.numer().bits().max(value.denom().bits());
    fuel.take(1 + u32::try_from(bits / 64).ok()?)?;
    (bits <= MAX_BITS).then_some(())
}

fn call(function: Function, operands: &[Node], fuel: &Fuel) -> Option<BigRational> {
    let first = value(operands.first()?, fuel)?;
    let second = operands.get(1).map(|node| value(node, fuel));
    match (function, second) {
        (Function::Root, None) => root(&first, 2),
        (Function::Root, Some(index)) => root(&first, whole(&index?)?.to_u32()?),
        (Function::Abs, None) => Some(first.abs()),
        (Function::Floor, None) => Some(first.floor()),
        (Function::Ceiling, None) => Some(first.ceil()),
        (Function::Factorial, None) => {
            let n = whole(&first)?.to_u32().filter(|n| *n <= 1000)?;
            fuel.take(n)?;
            Some(BigRational::from_integer(
                (1..=n).map(BigInt::from).product(),
            ))
        }
        (Function::Binomial, Some(k)) => {
            let n = whole(&first)?.to_u32().filter(|n| *n <= 2000)?;
            let k = whole(&k?)?.to_u32().filter(|k| *k <= n)?;
            let k = k.min(n - k);
            fuel.take(k)?;
            let mut result = BigInt::one();
            for i in 0..k {
                result = result * (n - i) / (i + 1);
            }
            Some(BigRational::from_integer(result))
        }
        _ => None,
    }
}

fn whole(value: &BigRational) -> Option<BigInt> {
    value.is_integer().then(|| value.to_integer())
}

/// `base^exponent` where that is rational and of bounded size.
fn power(base: &BigRational, exponent: &BigRational) -> Option<BigRational> {
    let index = exponent.denom().to_u32()?;
    let times = exponent.numer().to_i32()?;
    let base = if index == 1 {
        base.clone()
    } else {
        root(base, index)?
    };
    if base.is_zero() {
        return (times > 0).then(BigRational::zero);
    }
    let bits = base.numer().bits().max(base.denom().bits());
    if !base.numer().abs().is_one() || !base.denom().is_one() {
        let grown = bits.checked_mul(u64::from(times.unsigned_abs()))?;
        if grown > MAX_BITS + 64 {
            return None;
        }
    }
    Some(num_traits::Pow::pow(&base, times))
}

/// The real `index`-th root where it is rational.
fn root(value: &BigRational, index: u32) -> Option<BigRational> {
    if index == 0 || index > 64 || (value.is_negative() && index.is_multiple_of(2)) {
        return None;
    }
    let part = |part: &BigInt| {
        let root = part.nth_root(index);
        (root.pow(index) == *part).then_some(root)
    };
    Some(BigRational::new(part(value.numer())?, part(value.denom())?))
}
