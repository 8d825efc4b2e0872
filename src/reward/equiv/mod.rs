//! Mathematical equality of two answers.
//!
//! An answer is read as LaTeX or plain text mathematics ([`lexer`], [`arguments`], [`parser`]) and
//! compared by what it is: numbers exactly ([`exact`]), expressions at several points to about thirty
//! digits ([`numeric`]), collections by their parts ([`compare`]). What cannot be read is compared as
//! text. Every step is bounded, in depth, nodes and arithmetic, whatever the input.
//!
//! What the comparison takes as equal, where one might ask:
//! - `50%` is 1/2, and it is 50; but 0.17 % is not 0.17: a percentage below 1 is a fraction only.
//! - Currency signs, units and the degree sign of an answer are dropped, as both Math-Verify and
//!   Qwen's grader do; so 5 cm equals 5 m. In a trigonometric function a degree is π/180.
//! - A decimal of six or more places may be the rounded value of the other answer; one of fewer
//!   places must be exact.
//! - `x = 5` equals `5`, not `y = 5`. Equations are equal up to a factor, inequalities up to a positive
//!   one; an equation solved for its only variable, only up to sign. Any two true equations of numbers
//!   are multiples of each other: of these the factor must be written, `2(log 0.01) = 2(-2)`.
//! - A function with a condition, `f(x) = x, x ≥ 0`, is compared by its formula: whether the condition
//!   includes its bound does not count.
//! - Lists and sets are equal in any order, and a list equals a tuple in the same order. Tuples and
//!   intervals keep their order and their brackets, also at infinity.
//! - An inequality equals an interval where the variable is named, `x ∈ (1, 2)`; a bare `(1, 2)`, which
//!   may be a point, equals it in [`Notation::Wide`] only.
//! - A number with a base equals only the same digits in the same base.
//! - Variables are sampled as real numbers of either sign; √(x²) is |x|, not x.
//! - `3e6` is 3·10⁶, and also 3·e·6, as LaTeX prints it.
//! - A missing closing brace is supplied.
//!
//! [`Notation::Standard`] leaves unread what the graders in common use do ([`strict`]).

mod approx;
mod arguments;
mod canonical;
mod compare;
mod dd;
mod exact;
mod lexer;
mod matrix;
mod node;
mod numeric;
mod parser;
mod strict;
mod symbols;
mod words;

use std::cell::Cell;

use lexer::Token;
use node::Node;
use parser::Slash;

/// Longest answer, in bytes, that is read as mathematics.
const MAX_BYTES: usize = 10_000;

/// Which ways of writing are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notation {
    /// What the graders in common use read: LaTeX, and plain text of the kind `3/4`, `x^2`, `2 cm`.
    Standard,
    /// Also Unicode symbols, words of currency, sizes of brackets and other dress.
    Wide,
}

/// A bound on the work of one comparison, in units of a double-double operation.
pub(super) struct Fuel(Cell<u32>);

impl Fuel {
    const PER_COMPARISON: u32 = 60_000;

    fn new() -> Self {
        Self(Cell::new(Self::PER_COMPARISON))
    }

    fn take(&self, cost: u32) -> Option<()> {
        let left = self.0.get().checked_sub(cost);
        self.0.set(left.unwrap_or(0));
        left.map(|_| ())
    }
}

/// Whether two answers are equal. Symmetric; `true` for identical answers that are not empty.
pub(super) fn equal(a: &str, b: &str, notation: Notation) -> bool {
    if a.trim().is_empty() || b.trim().is_empty() {
        return false;
    }
    if a == b {
        return true;
    }
    // One order for each pair: not even the bound on the work may tell which is the reference.
    let (a, b) = if a <= b { (a, b) } else { (b, a) };
    let (a, b) = (unboxed(a), unboxed(b));
    if a.len() > MAX_BYTES || b.len() > MAX_BYTES {
        let compact = |text: &str| {
            text.chars()
                .filter(|c| !c.is_whitespace())
                .collect::<String>()
        };
        return compact(&a) == compact(&b);
    }
    let fuel = Fuel::new();
    match same(&a, &b, notation, &fuel) {
        Verdict::Same => true,
        Verdict::Different => false,
        Verdict::OneUnread => [(&a, &b), (&b, &a)].into_iter().any(|(prose, other)| {
            is_statement(prose, notation)
                && super::final_answer::final_answer(prose)
                    .is_some_and(|answer| same(&answer, other, notation, &fuel) == Verdict::Same)
        }),
    }
}

/// Whether a text that is no mathematics looks like a statement with an answer in it rather than an
/// answer: it has formulas in delimiters, or several words, to the graders in use with a number.
fn is_statement(text: &str, notation: Notation) -> bool {
    let words = text.split_whitespace().filter(|word| {
        word.chars().count() > 1 && word.chars().all(|c| c.is_alphabetic() || "'.,".contains(c))
    });
    text.replace(r"\$", "").contains('$')
        || text.contains(r"\(")
        || text.contains(r"\[")
        || match notation {
            Notation::Wide => words.count() >= 4 || text.contains("answer"),
            Notation::Standard => {
                let has_number = text.contains(|c: char| c.is_ascii_digit());
                words.count() >= 4 && has_number && !text.contains("answer")
            }
        }
}

/// The answer in a text with boxes.
fn unboxed(answer: &str) -> std::borrow::Cow<'_, str> {
    match answer.contains(r"\boxed") {
        true => super::final_answer::final_answer(answer).map_or(answer.into(), Into::into),
        false => answer.into(),
    }
}

#[derive(PartialEq)]
enum Verdict {
    Same,
    Different,
    /// One of the two is mathematics and the other is not.
    OneUnread,
}

fn same(a: &str, b: &str, notation: Notation, fuel: &Fuel) -> Verdict {
    let written = (a, b);
    let (a, b) = (prepare(a, notation), prepare(b, notation));
    if a.is_empty() || b.is_empty() {
        return Verdict::Different;
    }
    let verdict = compared(written, (&a, &b), notation, fuel);
    let strict = notation == Notation::Standard && verdict != Verdict::Different;
    match strict && strict::apart((written.0, &a), (written.1, &b)) {
        true => Verdict::Different,
        false => verdict,
    }
}

/// As [`same`], of answers as they are written and as tokens.
fn compared(
    written: (&str, &str),
    (a, b): (&[Token], &[Token]),
    notation: Notation,
    fuel: &Fuel,
) -> Verdict {
    let strict = notation == Notation::Standard;
    let (text_a, text_b) = (canonical::of_tokens(a), canonical::of_tokens(b));
    if text_a == text_b {
        return match strict && differ_as_text(written, (a, b)) {
            true => Verdict::Different,
            false => Verdict::Same,
        };
    }
    let slashes: &[Slash] = match notation {
        Notation::Wide => &[Slash::OverProduct, Slash::OverFactor],
        _ => &[Slash::OverProduct],
    };
    let parse = |tokens: &[Token], slash| parser::parse(tokens, notation, slash);
    let equal = |a: &Option<Node>, b: &Option<Node>| {
        let pair = a.as_ref().zip(b.as_ref());
        pair.is_some_and(|(a, b)| compare::Comparer::new(fuel, notation).answers(a, b))
    };
    // Other readings of one side, each compared with the plain reading of the other.
    let others = |tokens: &[Token]| {
        let readings = [
            arguments::with_letter_e(tokens),
            arguments::with_unions(tokens, notation),
        ];
        readings.into_iter().flatten()
    };
    let mut read = (false, false);
    for slash in slashes {
        let nodes = (parse(a, *slash), parse(b, *slash));
        read = (nodes.0.is_some(), nodes.1.is_some());
        if equal(&nodes.0, &nodes.1)
            || others(a).any(|a| equal(&parse(&a, *slash), &nodes.1))
            || others(b).any(|b| equal(&nodes.0, &parse(&b, *slash)))
        {
            return Verdict::Same;
        }
    }
    if canonical::is_same_definition(&text_a, &text_b) {
        return Verdict::Same;
    }
    match read {
        (true, true) => Verdict::Different,
        (false, false) if alike(written, notation) => Verdict::Same,
        _ if canonical::prose(&text_a) == canonical::prose(&text_b) => {
            match strict && strict::texts_apart(written.0, written.1) {
                true => Verdict::Different,
                false => Verdict::Same,
            }
        }
        (false, false) => Verdict::Different,
        _ => Verdict::OneUnread,
    }
}

/// Whether two texts that are no mathematics say the same but for signs that part and join, as
/// [`canonical::loose`] has it.
fn alike(written: (&str, &str), notation: Notation) -> bool {
    let loose = |text: &str| {
        let tokens = prepare(text, notation);
        let read = canonical::of_tokens(&tokens);
        if !canonical::is_definition(&read) {
            return canonical::loose(&read);
        }
        // A line break after the definition of a function parts as a comma does.
        let lines = text.trim().replace('\n', ", ");
        canonical::loose(&canonical::of_tokens(&prepare(&lines, notation)))
    };
    loose(written.0) == loose(written.1)
}

/// Whether two answers with the same signs are, to the graders in use, two texts.
fn differ_as_text(written: (&str, &str), tokens: (&[Token], &[Token])) -> bool {
    if canonical::is_set_builder(tokens.0) {
        return canonical::written(written.0) != canonical::written(written.1);
    }
    let unread = |tokens: &[Token]| {
        matches!(tokens, [Token::Text(_)])
            || parser::parse(tokens, Notation::Standard, Slash::OverProduct).is_none()
    };
    strict::texts_apart(written.0, written.1) && unread(tokens.0) && unread(tokens.1)
}

/// Whether an answer can be read as mathematics.
pub(super) fn is_readable(text: &str) -> bool {
    if text.len() > MAX_BYTES {
        return false;
    }
    let tokens = prepare(text, Notation::Wide);
    !tokens.is_empty() && parser::parse(&tokens, Notation::Wide, Slash::OverProduct).is_some()
}

/// Tokens of an answer without the dress around it.
fn prepare(text: &str, notation: Notation) -> Vec<Token> {
    let mut text = text.trim().to_owned();
    if notation == Notation::Wide {
        // Markdown's bold.
        text = text.trim_matches('*').trim().to_owned();
    }
    for _ in 0..4 {
        if let Some(number) = words::number(text.trim_end_matches('.')) {
            return vec![Token::Number(number.to_string())];
        }
        let tokens = undress(arguments::brace(lexer::tokens(&text, notation)));
        match tokens.as_slice() {
            [Token::Text(inner)] if *inner != text && is_dressed(inner, notation) => {
                text.clone_from(inner);
            }
            _ => return tokens,
        }
    }
    Vec::new()
}

/// Whether the content of a `\text{…}` that is the whole answer is an answer in text dress, such as
/// `54` or `(B)`, and not a phrase or an enumeration.
fn is_dressed(content: &str, notation: Notation) -> bool {
    let phrase = content.contains(' ') && !content.contains('\\');
    let enumeration = [",", " or ", " and "]
        .iter()
        .any(|separator| content.contains(separator));
    !enumeration && (notation == Notation::Wide || !phrase)
}

/// Drops outer braces, boxes and brackets around a set, and stops and row ends after the answer.
fn undress(mut tokens: Vec<Token>) -> Vec<Token> {
    for _ in 0..16 {
        if let [
            Token::Op('('),
            Token::Op('⦃'),
            ..,
            Token::Op('⦄'),
            Token::Op(')'),
        ] = tokens.as_slice()
        {
            tokens.pop();
            tokens.remove(0);
        }
        while matches!(tokens.last(), Some(Token::Op('.' | '⏎'))) {
            tokens.pop();
        }
        // A stop inside the brackets around everything: `(x = 1, y = 2.)`.
        if let [.., Token::Op('.'), Token::Op(')' | ']' | '⦄')] = tokens.as_slice() {
            tokens.remove(tokens.len() - 2);
        }
        let boxed = match tokens.as_slice() {
            [Token::Command(name), Token::Op('{'), ..] if name == "boxed" => 1,
            [Token::Op('{'), ..] => 0,
            _ => return tokens,
        };
        let over = tokens
            .iter()
            .any(|token| *token == Token::Command("over".to_owned()));
        if over || !closes_at_end(&tokens[boxed..]) {
            return tokens;
        }
        tokens.pop();
        tokens.drain(..=boxed);
    }
    tokens
}

/// Whether the brace that opens the tokens is closed by the last of them.
fn closes_at_end(tokens: &[Token]) -> bool {
    let mut depth = 0usize;
    for (at, token) in tokens.iter().enumerate() {
        match token {
            Token::Op('{') => depth += 1,
            Token::Op('}') => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at + 1 == tokens.len();
        }
    }
    false
}

#[cfg(test)]
mod tests;
