//! Equations, inequalities and memberships.

use num_traits::Zero;

use super::super::Notation;
use super::super::approx::Approx;
use super::super::exact;
use super::super::node::{Constant, Node, Relation};
use super::super::numeric::{POINTS, Point};
use super::{Comparer, Item, decimals, has_symbols, is_plus_minus};

impl Comparer<'_> {
    /// Whether inequalities for one name say that it lies in an interval: `2 < x ≤ 5` and `(2, 5]`.
    pub(super) fn interval(&self, relation: &Relation, other: &Node) -> bool {
        let Node::Tuple { open, close, items } = other else {
            return false;
        };
        let [low, high] = items.as_slice() else {
            return false;
        };
        let infinity = Node::Constant(Constant::Infinity);
        let minus_infinity = infinity.clone().negated();
        let steps = self.chain_steps(relation);
        let (lower, upper) = match steps.as_slice() {
            [only] if has_symbols(only.left) => (None, Some(only)),
            [only] => (Some(only), None),
            // A chain that falls, `5 ≥ x > 2`, gives its upper step first.
            [first, second] if first.right == second.left => (Some(first), Some(second)),
            [first, second] if second.right == first.left => (Some(second), Some(first)),
            _ => return false,
        };
        let bound =
            |step: Option<&Step>, limit: &Node, bracket: char, none: &Node, is_lower: bool| {
                match step {
                    None => limit == none && matches!(bracket, '(' | ')'),
                    Some(step) => {
                        let (value, name) = if is_lower {
                            (step.left, step.right)
                        } else {
                            (step.right, step.left)
                        };
                        let closed = matches!(bracket, '[' | ']');
                        (step.op == '≤') == closed
                            && matches!(step.op, '<' | '≤')
                            && has_symbols(name)
                            && !has_symbols(value)
                            && self.answers(value, limit)
                    }
                }
            };
        bound(lower, low, *open, &minus_infinity, true)
            && bound(upper, high, *close, &infinity, false)
    }

    pub(super) fn relations(
        &self,
        a: &Relation,
        a_minus: bool,
        b: &Relation,
        b_minus: bool,
    ) -> bool {
        let item = |node, minus| Item { node, minus };
        if let (false, false, Some(x), Some(y)) =
            (a.named, b.named, self.value_of(a), self.value_of(b))
        {
            return self.item(item(x, a_minus), item(y, b_minus)) || self.scaled(a, b);
        }
        let membership =
            |relation: &Relation| relation.named && matches!(relation.rest.as_slice(), [('∈', _)]);
        match (membership(a), membership(b)) {
            (true, false) => return self.interval(b, &a.rest[0].1),
            (false, true) => return self.interval(a, &b.rest[0].1),
            _ => {}
        }
        let (steps, others) = (self.chain_steps(a), self.chain_steps(b));
        let same = |x: &Step, y: &Step| self.steps(x, a_minus, y, b_minus);
        steps.len() == others.len()
            && steps.iter().all(|x| others.iter().any(|y| same(x, y)))
            && others.iter().all(|y| steps.iter().any(|x| same(x, y)))
    }

    fn steps(&self, a: &Step, a_minus: bool, b: &Step, b_minus: bool) -> bool {
        if a.op != b.op {
            return false;
        }
        let equal = |x: &Node, y: &Node| {
            if x.any(&is_plus_minus) || y.any(&is_plus_minus) {
                self.item(
                    Item {
                        node: x,
                        minus: a_minus,
                    },
                    Item {
                        node: y,
                        minus: b_minus,
                    },
                )
            } else {
                self.answers(x, y)
            }
        };
        if equal(a.left, b.left) && equal(a.right, b.right) {
            return true;
        }
        let symmetric = matches!(a.op, '=' | '≠');
        if symmetric && equal(a.left, b.right) && equal(a.right, b.left) {
            return true;
        }
        let scalar = [a.left, a.right, b.left, b.right]
            .into_iter()
            .all(Node::is_scalar);
        scalar && a.op != '∈' && self.proportional(a, a_minus, b, b_minus)
    }

    /// Whether `left - right` of one is a constant multiple of that of the other: a positive one for
    /// an inequality, ±1 where one side is solved for the only variable (`x = 3` is not `2x = 6`: the
    /// answer is to be given, not left to be worked out).
    fn proportional(&self, a: &Step, a_minus: bool, b: &Step, b_minus: bool) -> bool {
        let difference = |step: &Step, minus: bool, index: u64| {
            let point = Point::new(index, minus, self.fuel);
            Some(point.value(step.left)?.sub(point.value(step.right)?))
        };
        if !(has_symbols(a.left) || has_symbols(a.right)) {
            return false;
        }
        let solved = a.is_solved() || b.is_solved();
        let mut first: Option<(Approx, Approx)> = None;
        let mut agreed = 0;
        for index in 0..POINTS {
            let (x, y) = match (difference(a, a_minus, index), difference(b, b_minus, index)) {
                (Some(x), Some(y)) => (x, y),
                (None, None) => continue,
                _ => return false,
            };
            if x.is_zero() || y.is_zero() {
                if x.is_zero() != y.is_zero() {
                    return false;
                }
                continue;
            }
            match first {
                None => first = Some((x, y)),
                Some((x0, y0)) if x.mul(y0).same(y.mul(x0)) => {}
                Some(_) => return false,
            }
            agreed += 1;
        }
        let Some((x, y)) = first.filter(|_| agreed >= 2) else {
            return false;
        };
        let ratio = x.mul(y.recip());
        if !matches!(a.op, '=' | '≠') && (!ratio.is_real() || ratio.is_negative_real()) {
            return false;
        }
        !solved || ratio.same(Approx::ONE) || ratio.same(Approx::ONE.neg())
    }
}

/// One comparison of a relation, turned so that its operator is one of `= ≠ < ≤ ∈`.
struct Step<'n> {
    left: &'n Node,
    op: char,
    right: &'n Node,
    /// The left side is a name; see [`Relation`].
    named: bool,
}

impl Step<'_> {
    /// `x = …` or `f(n) = …` with no other variable.
    fn is_solved(&self) -> bool {
        let known = |name: &Node| self.left.any(&|node| node == name);
        self.named
            && !self
                .right
                .any(&|node| matches!(node, Node::Symbol(_)) && !known(node))
    }
}

impl Comparer<'_> {
    /// Whether the sides of one equation of numbers are those of the other times one factor, and are
    /// written so: `2(\log 0.01) = 2(-2)`.
    fn scaled(&self, a: &Relation, b: &Relation) -> bool {
        let factor = |product: &Node, of: &Node| match product {
            Node::Product(factors) => match factors.as_slice() {
                [factor, rest] if rest == of && of.is_scalar() => exact::value(factor, self.fuel),
                _ => None,
            },
            _ => None,
        };
        let times = |x: &Relation, y: &Relation| match (x.rest.as_slice(), y.rest.as_slice()) {
            ([('=', x_right)], [('=', y_right)]) => {
                let left = factor(&x.first, &y.first);
                left.is_some_and(|c| !c.is_zero() && Some(c) == factor(x_right, y_right))
            }
            _ => false,
        };
        times(a, b) || times(b, a)
    }

    fn chain_steps<'n>(&self, relation: &'n Relation) -> Vec<Step<'n>> {
        // A chain of equalities says what its first member finally is.
        if relation
            .rest
            .iter()
            .all(|(op, _)| matches!(op, '=' | '≈' | '≡'))
            && let Some(right) = self.last_value(relation)
        {
            return vec![Step {
                left: &relation.first,
                op: '=',
                right,
                named: relation.named,
            }];
        }
        let mut left = &*relation.first;
        let mut steps = Vec::with_capacity(relation.rest.len());
        for (op, right) in &relation.rest {
            steps.push(match op {
                '>' => Step {
                    left: right,
                    op: '<',
                    right: left,
                    named: false,
                },
                '≥' => Step {
                    left: right,
                    op: '≤',
                    right: left,
                    named: false,
                },
                '≈' | '≡' => Step {
                    left,
                    op: '=',
                    right,
                    named: false,
                },
                op => Step {
                    left,
                    op: *op,
                    right,
                    named: false,
                },
            });
            left = right;
        }
        steps
    }

    /// What a relation says its name or its first member is: `x = 5`, `x ∈ S`, `187 + 1 = 188`.
    pub(super) fn value_of<'n>(&self, relation: &'n Relation) -> Option<&'n Node> {
        if !relation
            .rest
            .iter()
            .all(|(op, _)| matches!(op, '=' | '≈' | '≡' | '∈'))
        {
            return None;
        }
        if relation.named {
            return self.last_value(relation);
        }
        let members =
            || std::iter::once(&*relation.first).chain(relation.rest.iter().map(|(_, node)| node));
        let chain = relation.rest.len() > 1
            && relation
                .rest
                .last()
                .is_some_and(|(_, last)| !has_symbols(last));
        if (members().any(has_symbols) && !chain) || relation.rest.iter().any(|(op, _)| *op == '∈')
        {
            return None;
        }
        if relation.rest.iter().all(|(op, _)| *op == '≈') {
            Some(&relation.first)
        } else {
            self.last_value(relation)
        }
    }

    /// The last member, without approximations after it: neither `≈ 0.33` nor `= 0.33` after `1/3`.
    fn last_value<'n>(&self, relation: &'n Relation) -> Option<&'n Node> {
        let equal: Vec<&Node> = relation
            .rest
            .iter()
            .filter(|(op, _)| *op != '≈')
            .map(|(_, node)| node)
            .collect();
        let Some((last, before)) = equal.split_last() else {
            return relation.rest.first().map(|(_, node)| node);
        };
        let before = before
            .last()
            .copied()
            .or((!relation.named).then_some(&*relation.first));
        if self.notation == Notation::Wide
            && let (Some(before), Some(digits)) = (before, decimals(last))
        {
            let value = |node: &Node| Point::new(0, false, self.fuel).value(node);
            if digits >= 2
                && let (Some(exact), Some(rounded)) = (value(before), value(last))
                && exact.sub(rounded).magnitude() < 10f64.powi(-(digits as i32))
            {
                return Some(before);
            }
        }
        Some(last)
    }
}
