//! Braces around every argument: `\frac12` → `\frac{1}{2}`, `x^2` → `x^{2}`, balanced at the end.
//!
//! With this the parser has one form to read, and two answers that differ in such shorthand alone
//! have the same tokens.

use std::collections::VecDeque;

use super::Notation;
use super::lexer::Token;

/// How much of a bare number is one argument.
#[derive(Clone, Copy, PartialEq)]
enum Shorthand {
    /// One digit, as TeX reads it: `\frac12`.
    Digit,
    /// The whole number: `\sqrt12`.
    Number,
    /// The whole number and a sign before it: `10^-3`.
    Signed,
}

enum Frame {
    /// An open brace of the text.
    Group,
    /// A command that still wants arguments.
    Pending {
        wanted: u8,
        shorthand: Shorthand,
        /// The command is itself an argument without braces, whose closing brace is owed.
        owes_brace: bool,
    },
}

/// The same tokens with every argument in braces. A superfluous closing brace is dropped, a missing
/// one supplied at the end.
pub(super) fn brace(tokens: Vec<Token>) -> Vec<Token> {
    let mut writer = Writer {
        out: Vec::with_capacity(tokens.len() + 16),
        stack: Vec::new(),
        groups: 0,
    };
    let mut rest = VecDeque::from(tokens);
    while let Some(token) = rest.pop_front() {
        match &token {
            Token::Op('{') => writer.open(),
            Token::Op('}') => writer.close(),
            Token::Op('^') => match degree_length(&rest) {
                Some(length) => {
                    rest.drain(..length);
                    writer.out.push(Token::Op('°'));
                }
                None => writer.command(token, 1, Shorthand::Signed),
            },
            Token::Op('_') => writer.command(token, 1, Shorthand::Number),
            Token::Command(name) if name == "frac" || name == "binom" => {
                writer.command(token, 2, Shorthand::Digit);
            }
            Token::Command(name) if name == "sqrt" => {
                writer.command(token, 1, Shorthand::Number);
                if rest.front() == Some(&Token::Op('[')) {
                    let end = rest.iter().position(|t| *t == Token::Op(']'));
                    writer.out.extend(rest.drain(..=end.unwrap_or(0)));
                }
            }
            _ => writer.plain(token, &mut rest),
        }
    }
    writer.finish()
}

/// The tokens with the letter e in place of a decimal exponent, `3e-6` as `3·e - 6`; `None` if there
/// is no exponent.
pub(super) fn with_letter_e(tokens: &[Token]) -> Option<Vec<Token>> {
    let has_exponent = |token: &Token| matches!(token, Token::Number(text) if text.contains('e'));
    if !tokens.iter().any(has_exponent) {
        return None;
    }
    let mut out = Vec::with_capacity(tokens.len() + 4);
    for token in tokens {
        match token {
            Token::Number(text) if text.contains('e') => {
                let (mantissa, exponent) = text.split_once('e')?;
                out.extend([Token::Number(mantissa.to_owned()), Token::Letter('e')]);
                let digits = exponent.trim_start_matches(['+', '-']);
                if digits.len() < exponent.len() {
                    out.extend(exponent.chars().next().map(Token::Op));
                }
                out.push(Token::Number(digits.to_owned()));
            }
            other => out.push(other.clone()),
        }
    }
    Some(out)
}

/// The tokens with a union sign for each "or" between intervals and sets, and in the wide notation
/// for each comma; `None` if nothing is parted so. The strict notation has an interval first.
pub(super) fn with_unions(tokens: &[Token], notation: Notation) -> Option<Vec<Token>> {
    let interval_first = matches!(tokens, [Token::Op('(' | '['), ..]);
    if notation == Notation::Standard && !interval_first {
        return None;
    }
    let mut depth = 0usize;
    let mut parts = 1;
    let mut out = Vec::with_capacity(tokens.len());
    for (at, token) in tokens.iter().enumerate() {
        match token {
            Token::Op('(' | '[' | '{' | '⦃') => depth += 1,
            Token::Op(')' | ']' | '}' | '⦄') => depth = depth.saturating_sub(1),
            token if depth == 0 && token.is_separator() => {
                let before = matches!(out.last(), Some(Token::Op(')' | ']' | '⦄')));
                let after = matches!(tokens.get(at + 1), Some(Token::Op('(' | '[' | '⦃')));
                let joins = notation == Notation::Wide || token.is_or();
                if !(before && after && joins) {
                    return None;
                }
                parts += 1;
                out.push(Token::Op('∪'));
                continue;
            }
            _ => {}
        }
        out.push(token.clone());
    }
    (parts > 1).then_some(out)
}

/// Number of tokens of a degree sign after `^`: `\circ`, `°` or either in braces.
fn degree_length(rest: &VecDeque<Token>) -> Option<usize> {
    let is_degree = |at: usize| match rest.get(at) {
        Some(Token::Command(name)) => name == "circ",
        Some(Token::Op(op)) => *op == '°',
        _ => false,
    };
    let braced = rest.front() == Some(&Token::Op('{')) && rest.get(2) == Some(&Token::Op('}'));
    match () {
        () if is_degree(0) => Some(1),
        () if braced && is_degree(1) => Some(3),
        () => None,
    }
}

struct Writer {
    out: Vec<Token>,
    stack: Vec<Frame>,
    /// Number of [`Frame::Group`]s on the stack.
    groups: usize,
}

impl Writer {
    fn open(&mut self) {
        self.out.push(Token::Op('{'));
        self.stack.push(Frame::Group);
        self.groups += 1;
    }

    fn close(&mut self) {
        if self.groups == 0 {
            return;
        }
        self.groups -= 1;
        self.drop_pending();
        self.stack.pop();
        self.out.push(Token::Op('}'));
        self.argument_done();
    }

    /// Gives up on commands whose arguments did not come.
    fn drop_pending(&mut self) {
        while let Some(Frame::Pending { owes_brace, .. }) = self.stack.last() {
            if *owes_brace {
                self.out.push(Token::Op('}'));
            }
            self.stack.pop();
        }
    }

    fn pending(&self) -> Option<Shorthand> {
        match self.stack.last() {
            Some(Frame::Pending { shorthand, .. }) => Some(*shorthand),
            _ => None,
        }
    }

    fn command(&mut self, token: Token, wanted: u8, shorthand: Shorthand) {
        let owes_brace = self.pending().is_some();
        if owes_brace {
            self.out.push(Token::Op('{'));
        }
        self.out.push(token);
        self.stack.push(Frame::Pending {
            wanted,
            shorthand,
            owes_brace,
        });
    }

    fn plain(&mut self, token: Token, rest: &mut VecDeque<Token>) {
        let Some(shorthand) = self.pending() else {
            return self.out.push(token);
        };
        self.out.push(Token::Op('{'));
        match token {
            Token::Number(digits) if shorthand == Shorthand::Digit && digits.len() > 1 => {
                self.out.push(Token::Number(digits[..1].to_owned()));
                rest.push_front(Token::Number(digits[1..].to_owned()));
            }
            Token::Word(letters) => {
                let mut chars = letters.chars();
                self.out.extend(chars.next().map(Token::Letter));
                let tail = chars.as_str();
                let mut one = tail.chars();
                rest.push_front(match (one.next(), one.next()) {
                    (Some(letter), None) => Token::Letter(letter),
                    _ => Token::Word(tail.to_owned()),
                });
            }
            Token::Op('-' | '+') if shorthand == Shorthand::Signed => {
                self.out.push(token);
                let takes = |next: &&Token| matches!(next, Token::Number(_) | Token::Letter(_));
                if rest.front().as_ref().is_some_and(takes) {
                    self.out.extend(rest.pop_front());
                }
            }
            _ => self.out.push(token),
        }
        self.out.push(Token::Op('}'));
        self.argument_done();
    }

    /// One argument is complete; so may be the commands that waited for it.
    fn argument_done(&mut self) {
        while let Some(Frame::Pending {
            wanted, owes_brace, ..
        }) = self.stack.last_mut()
        {
            *wanted -= 1;
            if *wanted > 0 {
                return;
            }
            let owes_brace = *owes_brace;
            self.stack.pop();
            if !owes_brace {
                return;
            }
            self.out.push(Token::Op('}'));
        }
    }

    fn finish(mut self) -> Vec<Token> {
        while !self.stack.is_empty() {
            self.drop_pending();
            if self.stack.pop().is_some() {
                self.out.push(Token::Op('}'));
            }
        }
        self.out
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Notation, lexer};
    use super::*;

    fn braced(text: &str) -> String {
        let print = |token: &Token| match token {
            Token::Number(text) | Token::Word(text) => text.clone(),
            Token::Letter(c) | Token::Op(c) => c.to_string(),
            Token::Command(name) => format!("\\{name} "),
            other => format!("{other:?}"),
        };
        brace(lexer::tokens(text, Notation::Standard))
            .iter()
            .map(print)
            .collect()
    }

    #[test]
    fn arguments_get_braces() {
        assert_eq!(braced(r"\frac12"), r"\frac {1}{2}");
        assert_eq!(braced(r"\frac123"), r"\frac {1}{2}3");
        assert_eq!(braced(r"\frac\pi 2x"), r"\frac {π}{2}x");
        assert_eq!(braced(r"\frac{29}4"), r"\frac {29}{4}");
        assert_eq!(braced(r"x^10_a"), "x^{10}_{a}");
        assert_eq!(braced("10^-3x"), "10^{-3}x");
        assert_eq!(braced(r"\sqrt55+\sqrt[3]x"), r"\sqrt {55}+\sqrt [3]{x}");
        assert_eq!(braced(r"\frac\sqrt3 2"), r"\frac {\sqrt {3}}{2}");
        assert_eq!(braced(r"30^\circ+4^{\circ}"), "30°+4°");
    }

    #[test]
    fn braces_are_balanced() {
        assert_eq!(braced(r"\frac{1}{2"), r"\frac {1}{2}");
        assert_eq!(braced("1}"), "1");
        assert_eq!(braced("{x^"), "{x^}");
        assert_eq!(braced(r"\sqrt\sqrt"), r"\sqrt {\sqrt }");
    }
}
