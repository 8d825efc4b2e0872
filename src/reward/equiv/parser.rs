//! Tokens → [`Node`]. A recursive descent whose depth and number of nodes are bounded, so that no
//! input can exhaust the stack or the time. What it cannot read is `None`: such answers are compared
//! as text.

mod operand;

use num_rational::BigRational;
use num_traits::Zero;

use super::Notation;
use super::canonical;
use super::lexer::Token;
use super::matrix;
use super::node::{Function, Node, Relation};
use super::words;
use operand::integer;

/// Nesting of brackets, roots, fractions and functions.
const MAX_DEPTH: u32 = 48;
/// Nodes of one answer.
const MAX_NODES: u32 = 2000;

/// How a division without fraction bar binds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slash {
    /// `1/2x` is `1/(2x)`: a product without sign binds tighter.
    OverProduct,
    /// `1/2x` is `(1/2)x`.
    OverFactor,
}

/// Reads a whole answer; several items become a [`Node::List`].
pub(super) fn parse(tokens: &[Token], notation: Notation, slash: Slash) -> Option<Node> {
    if let [Token::Word(word) | Token::Text(word)] = tokens {
        return Some(Node::Symbol(canonical::plain(word)));
    }
    let groups = split_groups(tokens);
    if groups.len() > 1 {
        let groups = groups
            .into_iter()
            .map(|group| parse(group, notation, slash));
        return groups.collect::<Option<_>>().map(Node::List);
    }
    let wide = notation == Notation::Wide;
    let mut parser = Parser {
        tokens,
        at: 0,
        depth: 0,
        nodes: 0,
        bars: 0,
        wide,
        slash,
    };
    let mut items = parser.items()?;
    if parser.at < tokens.len() {
        return None;
    }
    if items.len() == 1 {
        items.pop()
    } else {
        Some(Node::List(items))
    }
}

/// `p = 5, q = 2; p = 7, q = 3`: where both separators are used, semicolons part the answers.
fn split_groups(tokens: &[Token]) -> Vec<&[Token]> {
    let mut depth = 0usize;
    let mut commas = false;
    let mut groups = Vec::new();
    let mut start = 0;
    for (at, token) in tokens.iter().enumerate() {
        match token {
            Token::Op('(' | '[' | '{' | '⦃') | Token::Begin(_) => depth += 1,
            Token::Op(')' | ']' | '}' | '⦄') | Token::End(_) => depth = depth.saturating_sub(1),
            Token::Op(',') if depth == 0 => commas = true,
            Token::Op(';') if depth == 0 => {
                groups.push(&tokens[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    groups.push(&tokens[start..]);
    if commas { groups } else { vec![tokens] }
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
    depth: u32,
    nodes: u32,
    /// Absolute-value bars open in the current bracket.
    bars: u32,
    wide: bool,
    slash: Slash,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<&'a Token> {
        self.tokens.get(self.at)
    }

    fn peek_at(&self, offset: usize) -> Option<&'a Token> {
        self.tokens.get(self.at + offset)
    }

    fn peek_op(&self) -> Option<char> {
        match self.peek()? {
            Token::Op(op) => Some(*op),
            _ => None,
        }
    }

    fn eat(&mut self, op: char) -> bool {
        let found = self.peek_op() == Some(op);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, op: char) -> Option<()> {
        self.eat(op).then_some(())
    }

    /// Counts a node and a level of nesting around `inner`.
    fn nested<T>(&mut self, inner: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
        self.depth += 1;
        self.nodes += 1;
        if self.depth > MAX_DEPTH || self.nodes > MAX_NODES {
            return None;
        }
        let result = inner(self);
        self.depth -= 1;
        result
    }

    /// Chains separated by commas, semicolons, "and" or "or".
    fn items(&mut self) -> Option<Vec<Node>> {
        let mut items = vec![self.chain()?];
        while self.separator() {
            items.push(self.chain()?);
        }
        Some(items)
    }

    fn separator(&mut self) -> bool {
        let start = self.at;
        while self.peek().is_some_and(Token::is_separator) {
            self.at += 1;
        }
        self.at > start
    }

    /// Members joined by `=`, `<`, `∈` and so on.
    fn chain(&mut self) -> Option<Node> {
        while matches!(self.peek_op(), Some('≈' | '=')) {
            self.at += 1;
        }
        let start = self.at;
        let first = self.sets()?;
        let named = is_name(&self.tokens[start..self.at]);
        let mut rest = Vec::new();
        let mut last = start;
        while let Some(op @ ('=' | '<' | '>' | '≤' | '≥' | '≠' | '≈' | '∈' | '≡')) = self.peek_op()
        {
            self.at += 1;
            last = self.at;
            rest.push((op, self.sets()?));
        }
        if rest.is_empty() {
            return Some(first);
        }
        let relation = Relation {
            first: Box::new(first),
            rest,
            named,
        };
        Some(Node::Relation(
            if self.wide && is_name(&self.tokens[last..self.at]) {
                relation.turned()
            } else {
                relation
            },
        ))
    }

    /// Unions, intersections and differences, from left to right.
    fn sets(&mut self) -> Option<Node> {
        let mut left = self.sum()?;
        loop {
            let letter_u = self.peek() == Some(&Token::Letter('U')) && !left.is_scalar();
            let op = if letter_u {
                '∪'
            } else {
                self.peek_op().unwrap_or(' ')
            };
            if !matches!(op, '∪' | '∩' | '∖') {
                return Some(left);
            }
            self.at += 1;
            let right = self.sum()?;
            left = match (op, left) {
                ('∪', Node::Union(mut parts)) | ('∩', Node::Intersection(mut parts)) => {
                    parts.push(right);
                    if op == '∪' {
                        Node::Union(parts)
                    } else {
                        Node::Intersection(parts)
                    }
                }
                ('∪', left) => Node::Union(vec![left, right]),
                ('∩', left) => Node::Intersection(vec![left, right]),
                (_, left) => Node::Difference(Box::new(left), Box::new(right)),
            };
        }
    }

    fn sum(&mut self) -> Option<Node> {
        let mut terms = Vec::new();
        let mut sign = self.signs().unwrap_or(Sign::Plus);
        loop {
            let term = self.product()?;
            terms.push(sign.apply(term));
            match self.signs() {
                Some(next) => sign = next,
                None => break,
            }
        }
        if terms.len() == 1 {
            terms.pop()
        } else {
            matrix::sum(terms)
        }
    }

    /// A run of signs.
    fn signs(&mut self) -> Option<Sign> {
        let mut sign = None;
        while let Some(op @ ('+' | '-' | '±' | '∓')) = self.peek_op() {
            self.at += 1;
            sign = Some(sign.unwrap_or(Sign::Plus).then(op));
        }
        sign
    }

    fn product(&mut self) -> Option<Node> {
        let mut factors = self.implicit_product()?;
        loop {
            let op = match self.peek_op() {
                Some(':') if matches!(self.tokens.get(self.at - 1), Some(Token::Word(_))) => {
                    return None;
                }
                Some(op @ ('*' | '/' | ':')) => op,
                _ if self.at_times_ten() => '*',
                _ => break,
            };
            self.at += 1;
            let sign = self.signs().unwrap_or(Sign::Plus);
            let start = factors.len();
            if op == '*' || self.slash == Slash::OverFactor {
                let first = self.factor()?;
                let first = if op == '*' {
                    first
                } else {
                    Node::Recip(Box::new(first))
                };
                factors.push(sign.apply(first));
                self.more_factors(&mut factors)?;
            } else {
                let mut divisor = self.implicit_product()?;
                let divisor = if divisor.len() == 1 {
                    divisor.pop()?
                } else {
                    Node::Product(divisor)
                };
                factors.push(sign.apply(Node::Recip(Box::new(divisor))));
            }
            // `x < 2:(-∞, 2)`: a colon before a set, an interval or a point divides nothing.
            let by_set = |f: &Node| matches!(f, Node::Recip(divisor) if !divisor.is_scalar());
            if op == ':' && factors[start..].iter().any(by_set) {
                return None;
            }
        }
        if factors.len() == 1 {
            factors.pop()
        } else {
            matrix::product(factors)
        }
    }

    /// `1.4 x 10^3`, where the x is a multiplication sign.
    fn at_times_ten(&self) -> bool {
        let before = self.at.checked_sub(1).and_then(|at| self.tokens.get(at));
        matches!(
            (before, self.tokens.get(self.at..self.at + 3)),
            (Some(Token::Number(_)), Some([Token::Letter('x'), Token::Number(ten), Token::Op('^')])) if ten == "10"
        )
    }

    /// Factors side by side, with mixed numbers joined and a unit at the end dropped.
    fn implicit_product(&mut self) -> Option<Vec<Node>> {
        let first = match self.mixed_number() {
            Some(mixed) => mixed,
            None => self.factor()?,
        };
        let mut factors = vec![first];
        self.more_factors(&mut factors)?;
        Some(factors)
    }

    fn more_factors(&mut self, factors: &mut Vec<Node>) -> Option<()> {
        loop {
            let set_before = factors
                .last()
                .is_some_and(|last| !last.is_scalar() && !matches!(last, Node::Matrix(_)));
            if self.unit() || set_before || self.at_times_ten() || !self.starts_factor() {
                return Some(());
            }
            let before = self.tokens.get(self.at - 1);
            let after_word = matches!(before, Some(Token::Word(_) | Token::Text(_)));
            match self.peek()? {
                // Two numbers side by side are no product, and words beside anything are prose.
                Token::Number(_) if matches!(before, Some(Token::Number(_))) => return None,
                Token::Word(_) | Token::Text(_) if after_word => return None,
                _ if matches!(before, Some(Token::Word(word)) if word.len() > 3) => return None,
                _ if matches!(before, Some(Token::Text(text)) if text.contains(' ')) => {
                    return None;
                }
                _ => {}
            }
            factors.push(self.factor()?);
        }
    }

    /// Whether the next token can be a factor without a multiplication sign before it.
    fn starts_factor(&self) -> bool {
        match self.peek() {
            Some(token) if token.is_separator() => false,
            Some(
                Token::Number(_)
                | Token::Letter(_)
                | Token::Word(_)
                | Token::Text(_)
                | Token::Begin(_),
            ) => true,
            Some(Token::Command(name)) => !matches!(name.as_str(), "over" | "rfloor" | "rceil"),
            Some(Token::Op(op)) => match op {
                '(' | '[' | '{' | '∞' => true,
                '|' => self.bars == 0,
                _ => false,
            },
            Some(Token::End(_) | Token::Unknown(_)) | None => false,
        }
    }

    /// `2\frac{1}{3}`: a whole number beside a proper fraction of whole numbers.
    fn mixed_number(&mut self) -> Option<Node> {
        let Token::Number(whole) = self.peek()? else {
            return None;
        };
        let (above, below, length) = match self.tokens.get(self.at + 1..)? {
            [
                Token::Command(frac),
                Token::Op('{'),
                Token::Number(above),
                Token::Op('}'),
                Token::Op('{'),
                Token::Number(below),
                Token::Op('}'),
                ..,
            ] if frac == "frac" => (above, below, 8),
            [
                Token::Number(above),
                Token::Op('/'),
                Token::Number(below),
                ..,
            ] if self.wide => (above, below, 4),
            _ => return None,
        };
        let whole = integer(whole)?;
        let (above, below) = (integer(above)?, integer(below)?);
        if above.is_zero() || above >= below {
            return None;
        }
        self.at += length;
        self.nodes += 1;
        let value = BigRational::from_integer(whole) + BigRational::new(above, below);
        Some(Node::Number { value, places: 0 })
    }

    /// Skips a unit such as `\text{cm}^2`, `square feet` or `\mathrm{ft}/\mathrm{s}`.
    fn unit(&mut self) -> bool {
        let start = self.at;
        loop {
            match self.peek() {
                Some(token) if token.is_separator() => break,
                Some(Token::Text(text)) if text.chars().any(char::is_alphabetic) => self.at += 1,
                Some(Token::Word(word)) if words::is_unit(word) => self.at += 1,
                _ => break,
            }
            let is_text = matches!(self.tokens.get(self.at - 1), Some(Token::Text(_)));
            if is_text
                && let Some(
                    [
                        Token::Op('^'),
                        Token::Op('{'),
                        Token::Number(_),
                        Token::Op('}'),
                    ],
                ) = self.tokens.get(self.at..self.at + 4)
            {
                self.at += 4;
            }
            let another = matches!(self.peek_at(1), Some(Token::Text(_)))
                || matches!(self.peek_at(1), Some(Token::Word(word)) if words::is_unit(word));
            if matches!(self.peek_op(), Some('/' | '*' | '-' | '.')) && another {
                self.at += 1;
            }
        }
        let before = start.checked_sub(1).and_then(|at| self.tokens.get(at));
        let misplaced = match self.tokens.get(start) {
            Some(Token::Word(_)) => !matches!(
                before,
                Some(Token::Number(_) | Token::Letter('π') | Token::Op('}' | ')'))
            ),
            _ => matches!(before, Some(Token::Word(_) | Token::Text(_))),
        };
        let plain_word = matches!(self.tokens.get(start), Some(Token::Word(_)));
        if misplaced || (plain_word && !self.at_end_of_term()) {
            self.at = start;
        }
        self.at > start
    }

    fn at_end_of_term(&self) -> bool {
        match self.peek() {
            None => true,
            Some(token) if token.is_separator() => true,
            Some(Token::Op(op)) => ")]}⦄=<>≤≥≠≈&⏎.".contains(*op),
            Some(_) => false,
        }
    }

    /// An operand with its powers, factorials, percent and degree signs.
    fn factor(&mut self) -> Option<Node> {
        let mut node = self.nested(Self::operand)?;
        for _ in 0..8 {
            node = match self.peek_op() {
                Some('^') => self.power_of(node)?,
                Some('_') => self.subscript_of(node)?,
                Some('!') => {
                    self.at += 1;
                    Node::Call(Function::Factorial, vec![node])
                }
                Some('%') => {
                    self.at += 1;
                    Node::Percent(Box::new(node))
                }
                Some('°') => {
                    self.at += 1;
                    Node::Degrees(Box::new(node))
                }
                Some('\'') => {
                    self.at += 1;
                    match node {
                        Node::Symbol(name) => Node::Symbol(name + "'"),
                        _ => return None,
                    }
                }
                _ => return Some(node),
            };
        }
        None
    }

    fn power_of(&mut self, base: Node) -> Option<Node> {
        self.at += 1;
        if let Some([Token::Op('{'), first, Token::Op('}')]) = self.tokens.get(self.at..self.at + 3)
        {
            let transpose = match first {
                Token::Letter('T') => true,
                Token::Command(name) => name == "top" || name == "intercal",
                _ => false,
            };
            if let (true, Node::Matrix(_)) = (transpose, &base) {
                self.at += 3;
                return matrix::transpose(base);
            }
            if *first == Token::Op('\'') || *first == Token::Op('*') {
                self.at += 3;
                let Node::Symbol(name) = base else {
                    return None;
                };
                return Some(Node::Symbol(name + "'"));
            }
        }
        let exponent = self.argument()?;
        Some(Node::Power(Box::new(base), Box::new(exponent)))
    }

    fn subscript_of(&mut self, base: Node) -> Option<Node> {
        self.at += 1;
        let inside = self.braced_tokens()?;
        match base {
            Node::Symbol(name) => Some(Node::Symbol(format!(
                "{name}_{}",
                canonical::of_tokens(inside)
            ))),
            Node::Number { .. } => {
                let base = match inside {
                    [Token::Number(base)] => base,
                    [Token::Text(base)] => base,
                    _ => return None,
                };
                let base: u32 = base.parse().ok().filter(|base| (2..=36).contains(base))?;
                // The digits as written: the token before `_ { base }`.
                match self.tokens.get(self.at.checked_sub(5)?) {
                    Some(Token::Number(digits)) => Some(Node::Based {
                        digits: digits.clone(),
                        base,
                    }),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

#[derive(Clone, Copy)]
enum Sign {
    Plus,
    Minus,
    PlusMinus,
    MinusPlus,
}

impl Sign {
    fn then(self, op: char) -> Self {
        match (self, op) {
            (sign, '+') => sign,
            (Self::Plus, '-') => Self::Minus,
            (Self::Minus, '-') => Self::Plus,
            (Self::Plus, '±') | (Self::MinusPlus, '-') | (Self::Minus, '∓') => Self::PlusMinus,
            (Self::Plus, '∓') | (Self::PlusMinus, '-') | (Self::Minus, '±') => Self::MinusPlus,
            (sign, _) => sign,
        }
    }

    fn apply(self, node: Node) -> Node {
        match self {
            Self::Plus => node,
            Self::Minus => node.negated(),
            Self::PlusMinus => Node::PlusMinus(Box::new(node)),
            Self::MinusPlus => Node::PlusMinus(Box::new(node.negated())),
        }
    }
}

/// Whether the tokens of a left side are a name: letters, indices, arguments in brackets, ratios and
/// products of such, but no sum and no number of its own.
fn is_name(tokens: &[Token]) -> bool {
    let sum_of_letters = tokens
        .iter()
        .all(|t| matches!(t, Token::Letter(_) | Token::Op('+')));
    if sum_of_letters && matches!(tokens, [Token::Letter(_), .., Token::Letter(_)]) {
        return true;
    }
    let mut numbers_allowed = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let before = at.checked_sub(1).and_then(|at| tokens.get(at));
        match token {
            Token::Number(_) if numbers_allowed.last() != Some(&true) => return false,
            Token::Op('+' | '-' | '±' | '∓') if numbers_allowed.is_empty() => return false,
            Token::Op('(' | '[' | '{') => {
                let inner = match before {
                    Some(Token::Op('^' | '_')) => true,
                    Some(Token::Letter(_) | Token::Word(_)) => tokens[at] == Token::Op('('),
                    _ => numbers_allowed.last() == Some(&true),
                };
                numbers_allowed.push(inner);
            }
            Token::Op(')' | ']' | '}') => {
                numbers_allowed.pop();
            }
            Token::Command(name) if name == "sqrt" || Function::named(name).is_some() => {
                return false;
            }
            Token::Op('∪' | '∩' | '∞' | '%' | '⦃') | Token::Begin(_) => return false,
            _ => {}
        }
    }
    tokens.iter().any(|token| {
        matches!(
            token,
            Token::Letter(_) | Token::Word(_) | Token::Text(_) | Token::Command(_)
        )
    })
}
