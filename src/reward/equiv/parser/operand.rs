//! The operands of the parser: numbers, names, functions, brackets, matrices.

use num_bigint::BigInt;
use num_rational::BigRational;

use super::super::lexer::Token;
use super::super::node::{Constant, Function, Node};
use super::super::{canonical, matrix};
use super::{Parser, Sign};

/// Digits and decimal exponent of a literal.
const MAX_DIGITS: usize = 4000;

impl<'a> Parser<'a> {
    pub(super) fn operand(&mut self) -> Option<Node> {
        let token = self.peek()?;
        self.at += 1;
        match token {
            Token::Number(text) => self.number(text),
            Token::Letter(c) => Some(self.letter(*c)),
            Token::Word(word) => self.word(word),
            Token::Text(text) => Some(Node::Symbol(canonical::plain(text))),
            Token::Command(name) => self.command(name),
            Token::Begin(environment) => matrix::is_environment(environment)
                .then(|| self.matrix(environment))
                .flatten(),
            Token::Op(op) => match op {
                '(' | '[' => self.bracket(*op),
                '{' => self.group(),
                '⦃' => self.set('⦄'),
                '⟨' => self.angle(),
                '|' => self.absolute(),
                '∞' => Some(Node::Constant(Constant::Infinity)),
                _ => None,
            },
            Token::End(_) | Token::Unknown(_) => None,
        }
    }

    fn number(&mut self, text: &str) -> Option<Node> {
        let (mut value, places) = decimal(text)?;
        // A repeating decimal: 0.1\overline{6}.
        let dot = usize::from(self.peek_op() == Some('.') && !text.contains('.'));
        if (dot == 1 || text.contains('.'))
            && !text.contains('e')
            && let Some(Token::Command(name)) = self.peek_at(dot)
            && name == "overline"
            && let Some([Token::Op('{'), Token::Number(digits), Token::Op('}')]) =
                self.tokens.get(self.at + dot + 1..self.at + dot + 4)
        {
            self.at += dot + 4;
            let period = integer(digits)?;
            let nines = BigInt::from(10).pow(u32::try_from(digits.len()).ok()?) - 1;
            let shift = BigInt::from(10).pow(places);
            value += BigRational::new(period, nines * shift);
            return Some(Node::Number { value, places: 0 });
        }
        Some(Node::Number { value, places })
    }

    fn letter(&self, c: char) -> Node {
        let plain = self.peek_op() != Some('_');
        match c {
            'π' if plain => Node::Constant(Constant::Pi),
            'e' if plain => Node::Constant(Constant::E),
            'i' if plain => Node::Constant(Constant::I),
            _ => Node::Symbol(c.to_string()),
        }
    }

    /// A word: a function, letters multiplied (up to three), or a name.
    fn word(&mut self, word: &str) -> Option<Node> {
        if let Some(function) = Function::named(word) {
            return self.call(function);
        }
        if word == "sqrt" {
            let operand = self.nested(Self::operand)?;
            return Some(Node::Call(Function::Root, vec![operand]));
        }
        if word.len() > 3 {
            return Some(Node::Symbol(canonical::plain(word)));
        }
        self.nodes += 3;
        let mut letters: Vec<Node> = word.chars().map(|c| self.letter(c)).collect();
        // A sign after the word belongs to its last letter, and so does a subscript.
        let last = letters.pop()?;
        let last = match self.peek_op() {
            Some('_') => self.subscript_of(Node::Symbol(word.chars().last()?.to_string()))?,
            _ => last,
        };
        let last = if self.peek_op() == Some('^') {
            self.power_of(last)?
        } else {
            last
        };
        letters.push(last);
        Some(Node::Product(letters))
    }

    fn command(&mut self, name: &str) -> Option<Node> {
        if let Some(function) = Function::named(name) {
            return self.call(function);
        }
        match name {
            "frac" => {
                let above = self.argument()?;
                let below = self.argument()?;
                matrix::product(vec![above, Node::Recip(Box::new(below))])
            }
            "sqrt" => self.root(),
            "binom" => {
                let above = self.argument()?;
                let below = self.argument()?;
                Some(Node::Call(Function::Binomial, vec![above, below]))
            }
            "boxed" => self.argument(),
            "lfloor" => self.fenced("rfloor", Function::Floor),
            "lceil" => self.fenced("rceil", Function::Ceiling),
            "emptyset" | "varnothing" => Some(Node::Set(Vec::new())),
            "sum" | "prod" | "int" | "iint" | "oint" | "lim" | "max" | "min" | "gcd" | "lcm"
            | "det" | "sup" | "Pr" | "arg" | "lg" | "dim" | "ker" | "deg" => self.opaque(name),
            "overline" | "bar" | "vec" | "hat" | "tilde" | "widehat" | "widetilde"
            | "overrightarrow" | "dot" | "ddot" | "underline" | "mathbb" | "mathcal"
            | "mathfrak" | "mathscr" | "overleftrightarrow" => {
                let inside = if self.peek_op() == Some('{') {
                    self.braced_tokens()?
                } else {
                    self.at += 1;
                    self.tokens.get(self.at - 1..self.at)?
                };
                Some(Node::Symbol(format!(
                    "\\{name} {}",
                    canonical::of_tokens(inside)
                )))
            }
            "angle" | "triangle" | "nabla" | "partial" | "perp" | "square" | "Re" | "Im"
            | "aleph" | "measuredangle" | "star" | "zzz" | "dagger" | "odot" | "oplus" | "Box"
            | "wp" | "top" => Some(Node::Symbol(format!("\\{name}"))),
            _ => None,
        }
    }

    fn root(&mut self) -> Option<Node> {
        let index = if self.eat('[') {
            let index = self.nested(Self::sum)?;
            self.expect(']')?;
            Some(index)
        } else {
            None
        };
        let mut operands = vec![self.argument()?];
        operands.extend(index);
        Some(Node::Call(Function::Root, operands))
    }

    fn fenced(&mut self, end: &str, function: Function) -> Option<Node> {
        let inside = self.nested(Self::sum)?;
        match self.peek()? {
            Token::Command(name) if name == end => self.at += 1,
            _ => return None,
        }
        Some(Node::Call(function, vec![inside]))
    }

    /// `\sin`, `\log_2`, `\cos^2` and what they apply to.
    fn call(&mut self, function: Function) -> Option<Node> {
        self.nested(|parser| {
            let base = if function == Function::Ln && parser.eat('_') {
                Some(parser.argument()?)
            } else {
                None
            };
            let exponent = if parser.eat('^') {
                Some(parser.argument()?)
            } else {
                None
            };
            let operand = parser.call_operand()?;
            let mut operands = vec![operand];
            operands.extend(base);
            match exponent {
                Some(exponent)
                    if exponent == Node::integer(-1) || exponent == Node::integer(1).negated() =>
                {
                    let inverse = function.inverse();
                    Some(match inverse {
                        Some(inverse) => Node::Call(inverse, operands),
                        None => Node::Recip(Box::new(Node::Call(function, operands))),
                    })
                }
                Some(exponent) => Some(Node::Power(
                    Box::new(Node::Call(function, operands)),
                    Box::new(exponent),
                )),
                None => Some(Node::Call(function, operands)),
            }
        })
    }

    /// A bracketed operand, or the factors up to a sign, an operator or the next function.
    fn call_operand(&mut self) -> Option<Node> {
        if matches!(self.peek_op(), Some('(' | '{' | '[' | '|')) {
            return self.operand();
        }
        let sign = self.signs().unwrap_or(Sign::Plus);
        let mut factors = vec![self.factor()?];
        while self.starts_factor() && !self.at_function() {
            if matches!(self.peek(), Some(Token::Text(_) | Token::Word(_))) {
                break;
            }
            factors.push(self.factor()?);
        }
        let operand = if factors.len() == 1 {
            factors.pop()?
        } else {
            Node::Product(factors)
        };
        Some(sign.apply(operand))
    }

    fn at_function(&self) -> bool {
        match self.peek() {
            Some(Token::Command(name) | Token::Word(name)) => Function::named(name).is_some(),
            _ => false,
        }
    }

    /// A sum, integral, limit or maximum: its bounds and the factors after it.
    fn opaque(&mut self, name: &str) -> Option<Node> {
        let mut operands = Vec::new();
        let mut label = name.to_owned();
        for _ in 0..2 {
            match self.peek_op() {
                Some(op @ ('_' | '^')) => {
                    self.at += 1;
                    label.push(op);
                    let inside = self.nested(|parser| {
                        parser.expect('{')?;
                        let items = parser.items()?;
                        parser.expect('}')?;
                        Some(items)
                    })?;
                    operands.extend(inside);
                }
                _ => break,
            }
        }
        // `\min at n`: a word after it is prose.
        if matches!(self.peek(), Some(Token::Word(word)) if Function::named(word).is_none()) {
            return None;
        }
        if self.starts_factor() {
            let mut body = self.implicit_product()?;
            while self.eat('*') {
                body.push(self.factor()?);
            }
            operands.push(if body.len() == 1 {
                body.pop()?
            } else {
                Node::Product(body)
            });
        }
        Some(Node::Opaque(label, operands))
    }

    /// `{…}` as an argument.
    pub(super) fn argument(&mut self) -> Option<Node> {
        self.expect('{')?;
        self.nested(Self::group)
    }

    /// The inside of a TeX group whose brace is behind us; bare `{1, 2}` is a set.
    fn group(&mut self) -> Option<Node> {
        let bars = std::mem::take(&mut self.bars);
        if self.eat('}') {
            self.bars = bars;
            return Some(Node::Set(Vec::new()));
        }
        let mut items = self.items()?;
        if let Some(Token::Command(name)) = self.peek()
            && name == "over"
        {
            self.at += 1;
            let above = if items.len() == 1 {
                items.pop()?
            } else {
                return None;
            };
            let below = self.chain()?;
            items.push(matrix::product(vec![above, Node::Recip(Box::new(below))])?);
        }
        self.expect('}')?;
        self.bars = bars;
        if items.len() == 1 {
            items.pop()
        } else {
            Some(Node::Set(items))
        }
    }

    /// The tokens of a `{…}`, unread.
    pub(super) fn braced_tokens(&mut self) -> Option<&'a [Token]> {
        self.expect('{')?;
        let start = self.at;
        let mut depth = 1;
        loop {
            match self.peek()? {
                Token::Op('{') => depth += 1,
                Token::Op('}') => depth -= 1,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                return self.tokens.get(start..self.at - 1);
            }
        }
    }

    /// A parenthesised expression, a tuple or an interval; the opening bracket is behind us.
    fn bracket(&mut self, open: char) -> Option<Node> {
        let bars = std::mem::take(&mut self.bars);
        let mut items = self.items()?;
        let close = self.peek_op().filter(|op| matches!(op, ')' | ']'))?;
        self.at += 1;
        self.bars = bars;
        let matching = (open == '(') == (close == ')');
        match items.len() {
            1 if matching => items.pop(),
            1 => None,
            _ => Some(Node::Tuple { open, close, items }),
        }
    }

    fn set(&mut self, close: char) -> Option<Node> {
        let bars = std::mem::take(&mut self.bars);
        let items = if self.peek_op() == Some(close) {
            Vec::new()
        } else {
            self.items()?
        };
        self.expect(close)?;
        self.bars = bars;
        Some(Node::Set(items))
    }

    /// `⟨1, 2⟩` is the vector (1, 2).
    fn angle(&mut self) -> Option<Node> {
        match self.set('⟩')? {
            Node::Set(items) if items.len() > 1 => Some(Node::Tuple {
                open: '(',
                close: ')',
                items,
            }),
            _ => None,
        }
    }

    fn absolute(&mut self) -> Option<Node> {
        self.bars += 1;
        let inside = self.sum()?;
        self.expect('|')?;
        self.bars -= 1;
        match inside {
            Node::Matrix(_) => Some(Node::Opaque("det".to_owned(), vec![inside])),
            inside => Some(Node::Call(Function::Abs, vec![inside])),
        }
    }

    fn matrix(&mut self, environment: &str) -> Option<Node> {
        let bars = std::mem::take(&mut self.bars);
        let mut rows = Vec::new();
        let mut row = Vec::new();
        loop {
            row.push(self.chain()?);
            let ended = match self.peek()? {
                Token::Op('&') => {
                    self.at += 1;
                    continue;
                }
                Token::Op('⏎') => {
                    self.at += 1;
                    matches!(self.peek(), Some(Token::End(_)))
                }
                Token::End(_) => true,
                _ => return None,
            };
            rows.push(std::mem::take(&mut row));
            if ended {
                break;
            }
        }
        self.at += 1;
        self.bars = bars;
        let matrix = Node::Matrix(rows);
        Some(if environment.starts_with(['v', 'V']) {
            Node::Opaque("det".to_owned(), vec![matrix])
        } else {
            matrix
        })
    }
}

/// A whole number without sign.
pub(super) fn integer(text: &str) -> Option<BigInt> {
    let plain = text.len() <= MAX_DIGITS && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

/// The exact value of a decimal literal and its decimal places.
fn decimal(text: &str) -> Option<(BigRational, u32)> {
    let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let exponent: i64 = exponent
        .parse()
        .ok()
        .filter(|e: &i64| e.unsigned_abs() <= MAX_DIGITS as u64)?;
    let digits = integer(&format!("{whole}{fraction}"))?;
    let scale = fraction.len() as i64 - exponent;
    let ten = BigInt::from(10);
    let value = if scale >= 0 {
        BigRational::new(digits, ten.pow(u32::try_from(scale).ok()?))
    } else {
        BigRational::from_integer(digits * ten.pow(u32::try_from(-scale).ok()?))
    };
    Some((value, u32::try_from(scale.max(0)).ok()?))
}
