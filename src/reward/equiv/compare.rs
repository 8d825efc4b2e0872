//! When two parsed answers are the same answer.

mod relations;

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{Signed, ToPrimitive};

use super::dd::Dd;
use super::node::{Constant, Node, Relation};
use super::numeric::{POINTS, Point};
use super::{Fuel, Notation, exact};

/// A decimal of at least this many places is read as a rounded value.
const ROUNDED_PLACES: u32 = 6;

/// One answer of possibly several: a node and the meaning of its `±`.
#[derive(Clone, Copy)]
struct Item<'n> {
    node: &'n Node,
    minus: bool,
}

pub(super) struct Comparer<'f> {
    fuel: &'f Fuel,
    notation: Notation,
}

impl<'f> Comparer<'f> {
    pub(super) fn new(fuel: &'f Fuel, notation: Notation) -> Self {
        Self { fuel, notation }
    }

    /// Whether two whole answers are equal.
    ///
    /// Lists and sets are equal when each item of one has an equal item in the other, whatever the
    /// order and repetitions; a tuple equals a list written in the same order.
    pub(super) fn answers(&self, a: &Node, b: &Node) -> bool {
        let (a, b) = (definition(a, b), definition(b, a));
        match (a, b) {
            (Node::List(relations), Node::Union(parts))
            | (Node::Union(parts), Node::List(relations)) => {
                relations
                    .iter()
                    .all(|relation| matches!(relation, Node::Relation(_)))
                    && self.same_parts(relations, parts)
            }
            (
                Node::Tuple {
                    open: '(',
                    close: ')',
                    items,
                },
                Node::List(others) | Node::Set(others),
            )
            | (
                Node::List(others) | Node::Set(others),
                Node::Tuple {
                    open: '(',
                    close: ')',
                    items,
                },
            ) => self.in_order(items, others),
            _ => {
                let (items, others) = (items(a), items(b));
                if items.len() == others.len() {
                    return self.matched(&items, &others);
                }
                let found = |item: &Item, others: &[Item]| {
                    others.iter().any(|other| self.item(*item, *other))
                };
                items.iter().all(|item| found(item, &others))
                    && others.iter().all(|other| found(other, &items))
            }
        }
    }

    /// Whether the items can be paired off, equal with equal.
    fn matched(&self, items: &[Item], others: &[Item]) -> bool {
        let mut free: Vec<Item> = others.to_vec();
        items.iter().all(|item| {
            let partner = free.iter().position(|other| self.item(*item, *other));
            partner.map(|at| free.swap_remove(at)).is_some()
        })
    }

    /// Whether each part of one equals some part of the other, and there are as many.
    fn same_parts(&self, parts: &[Node], others: &[Node]) -> bool {
        parts.len() == others.len()
            && parts
                .iter()
                .all(|x| others.iter().any(|y| self.answers(x, y)))
            && others
                .iter()
                .all(|y| parts.iter().any(|x| self.answers(x, y)))
    }

    fn in_order(&self, items: &[Node], others: &[Node]) -> bool {
        items.len() == others.len() && items.iter().zip(others).all(|(a, b)| self.answers(a, b))
    }

    fn item(&self, a: Item, b: Item) -> bool {
        if self.fuel.take(1).is_none() {
            return false;
        }
        if a.node == b.node && a.minus == b.minus {
            return true;
        }
        let pair =
            |x: &'_ Node, y: &'_ Node| self.item(Item { node: x, ..a }, Item { node: y, ..b });
        match (a.node, b.node) {
            (Node::Relation(x), Node::Relation(y)) => self.relations(x, a.minus, y, b.minus),
            (Node::Relation(x), _) => match self.value_of(x) {
                Some(value) if a.node.any(&is_plus_minus) => pair(value, b.node),
                Some(value) => self.answers(value, b.node),
                // A bare `(1, 2)` may as well be a point.
                None => self.notation == Notation::Wide && self.interval(x, b.node),
            },
            (_, Node::Relation(_)) => self.item(b, a),
            (
                Node::Tuple { open, close, items },
                Node::Tuple {
                    open: other_open,
                    close: other_close,
                    items: others,
                },
            ) => {
                (open, close) == (other_open, other_close)
                    && items.len() == others.len()
                    && items.iter().zip(others).all(|(x, y)| pair(x, y))
            }
            (
                Node::Tuple {
                    open: '(',
                    close: ')',
                    items,
                },
                Node::Symbol(name),
            )
            | (
                Node::Symbol(name),
                Node::Tuple {
                    open: '(',
                    close: ')',
                    items,
                },
            ) => name == "\\mathbb R" && is_whole_line(items),
            (Node::Matrix(rows), Node::Matrix(others)) => {
                rows.len() == others.len()
                    && rows.iter().zip(others).all(|(row, other)| {
                        row.len() == other.len() && row.iter().zip(other).all(|(x, y)| pair(x, y))
                    })
            }
            (Node::Union(parts), Node::Union(others))
            | (Node::Intersection(parts), Node::Intersection(others)) => {
                self.same_parts(parts, others)
            }
            (Node::Difference(a1, a2), Node::Difference(b1, b2)) => pair(a1, b1) && pair(a2, b2),
            (Node::Set(_) | Node::List(_), _) | (_, Node::Set(_) | Node::List(_)) => {
                self.answers(a.node, b.node)
            }
            (x, y) if x.is_scalar() && y.is_scalar() => self.scalars(a, b),
            _ => false,
        }
    }

    /// Numbers, names and expressions.
    fn scalars(&self, a: Item, b: Item) -> bool {
        let (a, b) = (without_degrees(a), without_degrees(b));
        if let (Some(a), Some(b)) = (name_of(a.node), name_of(b.node)) {
            return a == b || a.to_lowercase() == b.to_lowercase();
        }
        match (percentage(a), percentage(b)) {
            (Some(a), Some(b)) => return self.values(a, b),
            (Some(percent), None) => return self.percent(percent, b),
            (None, Some(percent)) => return self.percent(percent, a),
            (None, None) => {}
        }
        match (a.node, b.node) {
            (
                Node::Based { digits, base },
                Node::Based {
                    digits: others,
                    base: other,
                },
            ) => {
                return digits == others && base == other;
            }
            (Node::Based { base, .. }, _) | (_, Node::Based { base, .. }) if *base != 10 => {
                return false;
            }
            _ => {}
        }
        self.values(a, b)
    }

    /// `p%` is p/100, and also the bare p where that is no fraction itself.
    fn percent(&self, percent: Item, other: Item) -> bool {
        let Some(p) = exact::value(percent.node, self.fuel) else {
            let percent = Node::Percent(Box::new(percent.node.clone()));
            return self.values(
                Item {
                    node: &percent,
                    minus: false,
                },
                other,
            );
        };
        let fraction = Node::Number {
            value: &p / BigInt::from(100),
            places: 0,
        };
        let fraction = Item {
            node: &fraction,
            minus: percent.minus,
        };
        self.values(fraction, other)
            || (p.abs() >= BigRational::from_integer(1.into()) && self.values(percent, other))
    }

    fn values(&self, a: Item, b: Item) -> bool {
        let (x, y) = (self.exact(a), self.exact(b));
        if let (Some(x), Some(y)) = (&x, &y) {
            return x == y || self.rounds(a.node, y) || self.rounds(b.node, x);
        }
        let literal = match (&x, &y) {
            (Some(_), None) => places(a.node).map(|places| (places, b)),
            (None, Some(_)) => places(b.node).map(|places| (places, a)),
            _ => None,
        };
        self.numerically(a, b)
            || literal.is_some_and(|(places, other)| {
                let value = Point::new(0, other.minus, self.fuel).value(other.node);
                let literal = x.or(y);
                match (value, literal) {
                    (Some(value), Some(literal)) if value.is_real() && !has_symbols(other.node) => {
                        is_rounded(
                            (value.re - Dd::from(&literal)).to_f64(),
                            value.re.to_f64(),
                            places,
                        )
                    }
                    _ => false,
                }
            })
    }

    fn exact(&self, item: Item) -> Option<BigRational> {
        exact::value(item.node, self.fuel)
    }

    /// Whether `literal` is a decimal that rounds `value`.
    fn rounds(&self, literal: &Node, value: &BigRational) -> bool {
        let Some(places) = places(literal) else {
            return false;
        };
        let Some(literal) = exact::value(literal, self.fuel) else {
            return false;
        };
        let difference = Dd::from(&(value - literal)).to_f64();
        is_rounded(difference, Dd::from(value).to_f64(), places)
    }

    /// Equality at several points. Points where a value is not real are passed over if there are
    /// others: roots and logarithms are meant where they are real.
    fn numerically(&self, a: Item, b: Item) -> bool {
        let symbols = has_symbols(a.node) || has_symbols(b.node);
        let points = if symbols { POINTS } else { 1 };
        let mut complex = None;
        let mut agreed = 0;
        for index in 0..points {
            let x = Point::new(index, a.minus, self.fuel).value(a.node);
            let y = Point::new(index, b.minus, self.fuel).value(b.node);
            let (x, y) = match (x, y) {
                (Some(x), Some(y)) => (x, y),
                (None, None) => continue,
                _ => return false,
            };
            if x.is_real() && y.is_real() {
                if !x.same(y) {
                    return false;
                }
                agreed += 1;
            } else if complex != Some(false) {
                complex = Some(x.same(y));
            }
        }
        agreed >= points.min(2) || complex == Some(true)
    }
}

/// An answer without the name it is given to, when the other answer has none: `x = {1, 2}`, `S = (0, 1]`.
fn definition<'n>(node: &'n Node, other: &Node) -> &'n Node {
    match node {
        Node::Relation(Relation {
            rest, named: true, ..
        }) if !matches!(other, Node::Relation(_))
            && rest.len() == 1
            && matches!(rest[0].0, '=' | '∈') =>
        {
            &rest[0].1
        }
        _ => node,
    }
}

/// The answers in a list or set, each `±` as two.
fn items(node: &Node) -> Vec<Item<'_>> {
    let parts = match node {
        Node::List(parts) | Node::Set(parts) => parts.as_slice(),
        other => std::slice::from_ref(other),
    };
    let mut items = Vec::with_capacity(parts.len());
    for part in parts {
        items.push(Item {
            node: part,
            minus: false,
        });
        if part.any(&is_plus_minus) {
            items.push(Item {
                node: part,
                minus: true,
            });
        }
    }
    items
}

fn is_plus_minus(node: &Node) -> bool {
    matches!(node, Node::PlusMinus(_))
}

fn has_symbols(node: &Node) -> bool {
    node.any(&|node| matches!(node, Node::Symbol(_)))
}

fn name_of(node: &Node) -> Option<&str> {
    match node {
        Node::Symbol(name) => Some(name),
        Node::Constant(Constant::E) => Some("e"),
        Node::Constant(Constant::I) => Some("i"),
        _ => None,
    }
}

fn without_degrees(item: Item) -> Item {
    match item.node {
        Node::Degrees(inner) => Item {
            node: inner,
            ..item
        },
        _ => item,
    }
}

fn percentage(item: Item) -> Option<Item> {
    match item.node {
        Node::Percent(inner) => Some(Item {
            node: inner,
            ..item
        }),
        _ => None,
    }
}

fn is_whole_line(items: &[Node]) -> bool {
    let infinity = Node::Constant(Constant::Infinity);
    matches!(items, [low, high] if *low == infinity.clone().negated() && *high == infinity)
}

/// Decimal places of a literal, signed or not.
fn decimals(node: &Node) -> Option<u32> {
    match node {
        Node::Number { places, .. } => Some(*places),
        Node::Neg(inner) | Node::Degrees(inner) => decimals(inner),
        _ => None,
    }
}

/// Places of a decimal precise enough to be read as a rounded value.
fn places(node: &Node) -> Option<u32> {
    decimals(node).filter(|places| *places >= ROUNDED_PLACES)
}

/// Whether a value is within the last place of a decimal that is off by `difference`, and that is a
/// small part of it.
fn is_rounded(difference: f64, value: f64, places: u32) -> bool {
    let unit = 10f64.powi(-(places.to_i32().unwrap_or(i32::MAX)));
    difference.abs() < unit && difference.abs() <= 1e-4 * value.abs()
}
