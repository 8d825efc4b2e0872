//! What an answer is once parsed: an expression, or a list, set, interval, relation of expressions.

use num_rational::BigRational;

/// A parsed answer or a part of one. Depth and size are bounded by the parser.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    /// A literal and the decimal places it was written with.
    Number {
        value: BigRational,
        places: u32,
    },
    /// `204_5`: digits and the base written beside them.
    Based {
        digits: String,
        base: u32,
    },
    /// A variable, with its subscript and decorations in the name.
    Symbol(String),
    Constant(Constant),
    Neg(Box<Node>),
    Sum(Vec<Node>),
    Product(Vec<Node>),
    /// One over the operand.
    Recip(Box<Node>),
    Power(Box<Node>, Box<Node>),
    /// `±x`; a minus-plus is a plus-minus of the negative.
    PlusMinus(Box<Node>),
    Percent(Box<Node>),
    Degrees(Box<Node>),
    Call(Function, Vec<Node>),
    /// A function without known values, such as a sum or an integral: equal for equal operands.
    Opaque(String, Vec<Node>),
    Matrix(Vec<Vec<Node>>),
    /// Two or more items in brackets: a point, a vector or an interval.
    Tuple {
        open: char,
        close: char,
        items: Vec<Node>,
    },
    Set(Vec<Node>),
    /// Items without brackets; their order does not count.
    List(Vec<Node>),
    Union(Vec<Node>),
    Intersection(Vec<Node>),
    /// The first without the second.
    Difference(Box<Node>, Box<Node>),
    Relation(Relation),
}

/// `first op rest[0] op …`, such as `x = 1 + 1 = 2` or `0 < x ≤ 3`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Relation {
    pub(super) first: Box<Node>,
    pub(super) rest: Vec<(char, Node)>,
    /// The first member is a name such as `x`, `f(x)`, `|AB|` or `\angle A`: the relation says what
    /// the name stands for.
    pub(super) named: bool,
}

impl Relation {
    /// `5 = x` as `x = 5`; the caller has seen that the last member is a name.
    pub(super) fn turned(mut self) -> Self {
        if let [('=', last)] = self.rest.as_mut_slice()
            && !self.named
        {
            std::mem::swap(&mut *self.first, last);
            self.named = true;
        }
        self
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Constant {
    Pi,
    E,
    I,
    Infinity,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Function {
    /// Square root, or root of the second operand's index.
    Root,
    Abs,
    Exp,
    /// Natural logarithm, or to the base of the second operand.
    Ln,
    Sin,
    Cos,
    Tan,
    Cot,
    Sec,
    Csc,
    Arcsin,
    Arccos,
    Arctan,
    Arccot,
    Sinh,
    Cosh,
    Tanh,
    Factorial,
    Binomial,
    Floor,
    Ceiling,
}

impl Function {
    /// The function of a command or a word.
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "exp" => Self::Exp,
            "ln" | "log" => Self::Ln,
            "sin" => Self::Sin,
            "cos" => Self::Cos,
            "tan" | "tg" => Self::Tan,
            "cot" | "ctg" => Self::Cot,
            "sec" => Self::Sec,
            "csc" | "cosec" => Self::Csc,
            "arcsin" | "asin" => Self::Arcsin,
            "arccos" | "acos" => Self::Arccos,
            "arctan" | "atan" => Self::Arctan,
            "arccot" => Self::Arccot,
            "sinh" => Self::Sinh,
            "cosh" => Self::Cosh,
            "tanh" => Self::Tanh,
            _ => return None,
        })
    }

    pub(super) fn is_trigonometric(self) -> bool {
        matches!(
            self,
            Self::Sin | Self::Cos | Self::Tan | Self::Cot | Self::Sec | Self::Csc
        )
    }

    /// What `f^{-1}` means.
    pub(super) fn inverse(self) -> Option<Self> {
        Some(match self {
            Self::Sin => Self::Arcsin,
            Self::Cos => Self::Arccos,
            Self::Tan => Self::Arctan,
            Self::Cot => Self::Arccot,
            _ => return None,
        })
    }
}

impl Node {
    pub(super) fn integer(value: i64) -> Self {
        Self::Number {
            value: BigRational::from_integer(value.into()),
            places: 0,
        }
    }

    /// The operand, negated without piling up signs.
    pub(super) fn negated(self) -> Self {
        match self {
            Self::Neg(inner) => *inner,
            other => Self::Neg(Box::new(other)),
        }
    }

    /// A number or expression, as opposed to a collection, matrix or relation.
    pub(super) fn is_scalar(&self) -> bool {
        !matches!(
            self,
            Self::Matrix(_)
                | Self::Tuple { .. }
                | Self::Set(_)
                | Self::List(_)
                | Self::Union(_)
                | Self::Intersection(_)
                | Self::Difference(..)
                | Self::Relation(_)
        )
    }

    /// The parts directly below this node.
    pub(super) fn children(&self) -> Vec<&Node> {
        match self {
            Self::Number { .. } | Self::Based { .. } | Self::Symbol(_) | Self::Constant(_) => {
                Vec::new()
            }
            Self::Neg(inner)
            | Self::Recip(inner)
            | Self::PlusMinus(inner)
            | Self::Percent(inner)
            | Self::Degrees(inner) => vec![inner],
            Self::Power(a, b) | Self::Difference(a, b) => vec![a, b],
            Self::Sum(items)
            | Self::Product(items)
            | Self::Call(_, items)
            | Self::Opaque(_, items)
            | Self::Tuple { items, .. }
            | Self::Set(items)
            | Self::List(items)
            | Self::Union(items)
            | Self::Intersection(items) => items.iter().collect(),
            Self::Matrix(rows) => rows.iter().flatten().collect(),
            Self::Relation(relation) => {
                let rest = relation.rest.iter().map(|(_, node)| node);
                std::iter::once(&*relation.first).chain(rest).collect()
            }
        }
    }

    /// Whether any node of the tree satisfies `test`.
    pub(super) fn any(&self, test: &dyn Fn(&Node) -> bool) -> bool {
        test(self) || self.children().into_iter().any(|child| child.any(test))
    }
}
