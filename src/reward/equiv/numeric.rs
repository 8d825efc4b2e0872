//! Values at fixed points, to about 30 digits.
//!
//! Variables get values from a hash of their name, so that two expressions in the same variables see
//! the same point; a function without known values gets a fixed polynomial of its operands.

use num_rational::BigRational;
use num_traits::ToPrimitive;

use super::approx::Approx;
use super::dd::{Dd, PI};
use super::node::{Constant, Function, Node};
use super::{Fuel, exact};

/// Where an expression is evaluated.
#[derive(Clone, Copy)]
pub(super) struct Point<'a> {
    /// 0 and 1: variables between 0.3 and 2.3; 2: between 3 and 11; 3 and 4: of either sign, each
    /// variable once positive and once negative.
    pub(super) index: u64,
    /// What `±x` means.
    pub(super) minus: bool,
    pub(super) fuel: &'a Fuel,
    /// Value of one degree: 1 as an answer, π/180 in a trigonometric function.
    degree: Dd,
}

/// Number of different points.
pub(super) const POINTS: u64 = 5;

/// Cost of a logarithm, exponential or the like, relative to a product.
const FUNCTION_COST: u32 = 20;

impl<'a> Point<'a> {
    pub(super) fn new(index: u64, minus: bool, fuel: &'a Fuel) -> Self {
        Self {
            index,
            minus,
            fuel,
            degree: Dd::ONE,
        }
    }

    /// The value of `node` here; `None` where it is undefined, overflows or the fuel is spent.
    pub(super) fn value(self, node: &Node) -> Option<Approx> {
        self.fuel.take(1)?;
        match node {
            Node::Number { value, .. } => Some(Approx::real(Dd::from(value))),
            Node::Based { digits, base } => Some(self.generic(digits, u64::from(*base), 1.0)),
            Node::Symbol(name) => Some(self.symbol(name)),
            Node::Constant(constant) => Some(match constant {
                Constant::Pi => Approx::real(PI),
                Constant::E => Approx::ONE.exp(),
                Constant::I => Approx::I,
                Constant::Infinity => self.generic("infinity", 0, 1000.0),
            }),
            Node::Neg(inner) => Some(self.value(inner)?.neg()),
            Node::Sum(terms) => terms.iter().try_fold(Approx::ZERO, |total, term| {
                Some(total.add(self.value(term)?))
            }),
            Node::Product(factors) => factors.iter().try_fold(Approx::ONE, |total, factor| {
                Some(total.mul(self.value(factor)?))
            }),
            Node::Recip(inner) => self.value(inner)?.recip().checked(),
            Node::Power(base, exponent) => self.power(base, exponent),
            Node::PlusMinus(inner) => {
                let inner = self.value(inner)?;
                Some(if self.minus { inner.neg() } else { inner })
            }
            Node::Percent(inner) => Some(
                self.value(inner)?
                    .mul(Approx::real(Dd::ONE / Dd::from(100.0))),
            ),
            Node::Degrees(inner) => Some(self.value(inner)?.mul(Approx::real(self.degree))),
            Node::Call(function, operands) => self.call(*function, operands),
            Node::Opaque(name, operands) => self.opaque(name, operands.iter()),
            Node::Set(items)
            | Node::List(items)
            | Node::Union(items)
            | Node::Intersection(items) => {
                // Order does not count: a sum over the items.
                let label = format!("{:?}", std::mem::discriminant(node));
                items
                    .iter()
                    .try_fold(self.generic(&label, 0, 1.0), |total, item| {
                        Some(total.add(self.opaque(&label, std::iter::once(item))?))
                    })
            }
            Node::Tuple { open, close, items } => {
                self.opaque(&format!("{open}{close}"), items.iter())
            }
            Node::Matrix(rows) => {
                self.opaque(&format!("matrix {}", rows.len()), rows.iter().flatten())
            }
            Node::Difference(a, b) => self.opaque("difference", [&**a, &**b].into_iter()),
            Node::Relation(relation) => {
                let label: String = relation.rest.iter().map(|(op, _)| *op).collect();
                self.opaque(&label, node.children().into_iter())
                    .filter(|_| !relation.rest.is_empty())
            }
        }
        .and_then(Approx::checked)
    }

    fn symbol(self, name: &str) -> Approx {
        let unit = unit_hash(name, self.index);
        let negative = (unit_hash(name, 3) < 0.5) == (self.index == 3);
        Approx::real(Dd::from(match self.index {
            0 | 1 => 0.3 + 2.0 * unit,
            2 => 3.0 + 8.0 * unit,
            _ if negative => -0.4 - 2.0 * unit,
            _ => 0.4 + 2.0 * unit,
        }))
    }

    /// A number that stands for `label`, the same at every point.
    fn generic(self, label: &str, salt: u64, scale: f64) -> Approx {
        Approx::real(Dd::from(
            scale * (1.0 + unit_hash(label, salt.wrapping_add(1000))),
        ))
    }

    /// A fixed polynomial of the operands, with coefficients from the label.
    fn opaque<'n>(self, label: &str, operands: impl Iterator<Item = &'n Node>) -> Option<Approx> {
        let mut total = self.generic(label, 0, 1.0);
        for (at, operand) in operands.enumerate() {
            let x = self.value(operand)?;
            let at = 3 * at as u64;
            let linear = self.generic(label, at + 1, 1.0);
            let square = self.generic(label, at + 2, 0.5);
            let carry = self.generic(label, at + 3, 0.3);
            total = total.mul(carry).add(x.mul(linear.add(x.mul(square))));
        }
        total.checked()
    }

    fn power(self, base: &Node, exponent: &Node) -> Option<Approx> {
        let x = self.value(base)?;
        match exact::value(exponent, self.fuel) {
            Some(exponent) => self.rational_power(x, &exponent),
            None => {
                self.fuel.take(FUNCTION_COST)?;
                x.pow(self.value(exponent)?).checked()
            }
        }
    }

    /// Real where a real root exists: the cube root of -8 is -2.
    fn rational_power(self, x: Approx, exponent: &BigRational) -> Option<Approx> {
        let times = exponent.numer().to_i64()?;
        if exponent.is_integer() && times.unsigned_abs() <= 4096 {
            let power = x.powi(u32::try_from(times.unsigned_abs()).ok()?);
            return if times < 0 { power.recip() } else { power }.checked();
        }
        self.fuel.take(FUNCTION_COST)?;
        let index = exponent.denom().to_i64()?;
        if index == 2 && times == 1 {
            return x.sqrt().checked();
        }
        let exponent = Approx::real(Dd::from(exponent));
        if index % 2 == 1 && index > 1 && x.is_negative_real() {
            let power = x.abs().pow(exponent);
            return if times % 2 == 0 { power } else { power.neg() }.checked();
        }
        x.pow(exponent).checked()
    }

    fn call(self, function: Function, operands: &[Node]) -> Option<Approx> {
        let here = if function.is_trigonometric() {
            Self {
                degree: PI / Dd::from(180.0),
                ..self
            }
        } else {
            self
        };
        let x = here.value(operands.first()?)?;
        let second = operands.get(1);
        self.fuel.take(FUNCTION_COST)?;
        let result = match function {
            Function::Root => match second {
                None => x.sqrt(),
                Some(index) => match exact::value(index, self.fuel) {
                    Some(index) if index.is_integer() && index.numer().to_i64()? != 0 => {
                        return self.rational_power(x, &index.recip());
                    }
                    _ => x.pow(self.value(index)?.recip()),
                },
            },
            Function::Abs => x.abs(),
            Function::Exp => x.exp(),
            Function::Ln => match second {
                None => x.ln(),
                Some(base) => x.ln().mul(self.value(base)?.ln().recip()),
            },
            Function::Sin => x.sin_cos().0,
            Function::Cos => x.sin_cos().1,
            Function::Tan => ratio(x.sin_cos()),
            Function::Cot => ratio(swap(x.sin_cos())),
            Function::Sec => x.sin_cos().1.recip(),
            Function::Csc => x.sin_cos().0.recip(),
            Function::Arcsin => x.asin(),
            Function::Arccos => x.acos(),
            Function::Arctan => x.atan(),
            Function::Arccot => Approx::real(PI.scale(0.5)).sub(x.atan()),
            Function::Sinh => ratio(hyperbolic(x)).mul(hyperbolic(x).1),
            Function::Cosh => hyperbolic(x).1,
            Function::Tanh => ratio(hyperbolic(x)),
            Function::Factorial => return self.opaque("factorial", operands.iter()),
            Function::Binomial => return self.opaque("binomial", operands.iter()),
            Function::Floor | Function::Ceiling if !x.is_real() => return None,
            Function::Floor => Approx::real(x.re.floor()),
            Function::Ceiling => Approx::real(-(-x.re).floor()),
        };
        result.checked()
    }
}

fn ratio((above, below): (Approx, Approx)) -> Approx {
    above.mul(below.recip())
}

fn swap<T>((a, b): (T, T)) -> (T, T) {
    (b, a)
}

/// Hyperbolic sine and cosine.
fn hyperbolic(x: Approx) -> (Approx, Approx) {
    let (plus, minus) = (x.exp(), x.neg().exp());
    let half = Approx::real(Dd::from(0.5));
    (plus.sub(minus).mul(half), plus.add(minus).mul(half))
}

/// A number in [0, 1) that looks random in `name` and `salt` (FNV-1a, then the splitmix finaliser).
fn unit_hash(name: &str, salt: u64) -> f64 {
    let seed = 0xcbf2_9ce4_8422_2325 ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut hash = name.bytes().fold(seed, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((hash ^ (hash >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}
