//! What the strict notation leaves unread, because neither Math-Verify nor Qwen's grader reads it.
//!
//! To them an answer in such a notation is the text it is written with. Verdicts that are to be
//! compared with theirs must hold the same; [`Notation::Wide`](super::Notation) reads all of it.

use std::sync::LazyLock;

use regex::{Regex, RegexSet};

use super::canonical::written;
use super::lexer::Token;
use super::words;

/// Fewest words of a text that is compared word by word.
const SENTENCE_WORDS: usize = 4;

/// Notations found by their form, in an answer without spaces; see [`written`].
static FORMS: LazyLock<RegexSet> = LazyLock::new(|| {
    RegexSet::new([
        // A time of day that is all text, or none of it: `4:30 p.m.`
        r"\d:\d\d[ap]\.m\.",
        // A semicolon in a half-open interval: `[2; 3)`
        r"^(?:\([^()\[\]]*;[^()\[\]]*\]|\[[^()\[\]]*;[^()\[\]]*\))$",
        // Semicolons in a list with signs of both kinds: `3; \pm 2`
        r";.*\\pm|\\pm.*;",
        // A union by another sign than `\cup` in an answer that does not start with an interval.
        r"^[^(\[].*(?:\\bigcup|[)\]}]U[(\[\\])",
        // A tie before a unit: `9~\mathrm{kg}`
        r"\d~\\(?:mathrm|text)\{",
        // A name of words: `P(late or early) = 1/4`
        r"^[A-Z]\([^()\\]*[a-z]{4}[^()\\]*\)=",
        // An approximation after a unit: `3920 \mathrm{~N} \approx 3920.0`
        r"\\(?:mathrm|text|mbox)\{[^{}]*\}\\approx",
        // Text within a font: `\mathbf{\text{even}}`
        r"\\math(?:bf|it|rm|sf)\{\\text",
        // An enumeration in quotation marks.
        r#"^"[^"]*,[^"]*"$"#,
        // "and" as text between labelled parts: `domain: A\text{ and }range: B`
        r":.*[^,]\\text\{and\}.*:",
        // A command for `<` before a set that repeats the inequality: `x \lt 2:(-\infty, 2)`
        r"^[^:]*\\[lg]t[^a-z:][^:]*:[(\[]",
        // A stop after a formula with words in an index: `\lambda_{\text{red}} / \sqrt{2}.`
        r"_\{\\text\{[^{}]*\}\}.*\}\.$",
    ])
    .expect("valid patterns")
});

/// Whether two answers, given as text and as tokens, differ in a notation that is not read.
pub(super) fn apart(a: (&str, &[Token]), b: (&str, &[Token])) -> bool {
    let (text_a, text_b) = (written(a.0), written(b.0));
    if text_a == text_b {
        return ends_in_space_after_unit(a.0) != ends_in_space_after_unit(b.0);
    }
    let unread = |text: &str, tokens: &[Token]| {
        FORMS.is_match(text) || over_sum(tokens) || compound_unit_in_braces(tokens)
    };
    ends_in_space_after_unit(a.0)
        || ends_in_space_after_unit(b.0)
        || unread(&text_a, a.1)
        || unread(&text_b, b.1)
        || counted_in_two_ways(a.1, b.1)
}

/// `40 \mathrm{~kg} \quad`, `34\text{ units}\\`: a space command or a row's end after a unit.
fn ends_in_space_after_unit(text: &str) -> bool {
    static UNIT: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"\d\s*\\(?:mathrm|text|mbox)\{[^{}]*\}\s*(?:\\\\|\\q?quad)\s*$")
            .expect("valid pattern")
    });
    UNIT.is_match(text)
}

/// `{1 \over s+a}`: to the others `\over` is a division sign, so that sums end at it.
fn over_sum(tokens: &[Token]) -> bool {
    #[derive(Default)]
    struct Group {
        sum: bool,
        over: bool,
    }
    let mut outer = Vec::new();
    let mut group = Group::default();
    let mut at_start = true;
    for token in tokens {
        let opens = matches!(token, Token::Op('{' | '(' | '[' | '⦃'));
        let over = matches!(token, Token::Command(name) if name == "over");
        match token {
            _ if opens => outer.push(std::mem::take(&mut group)),
            Token::Op('}' | ')' | ']' | '⦄') => group = outer.pop().unwrap_or_default(),
            Token::Op('+' | '-') if !at_start => group.sum = true,
            _ => group.over |= over,
        }
        if group.sum && group.over {
            return true;
        }
        at_start = opens || over;
    }
    false
}

/// `\frac{2(81 \mathrm{~km} / \mathrm{hr})}{2}`: a unit of several parts that does not end the
/// answer but stands in braces.
fn compound_unit_in_braces(tokens: &[Token]) -> bool {
    let mut depth = 0usize;
    for (at, token) in tokens.iter().enumerate() {
        match token {
            Token::Op('{') => depth += 1,
            Token::Op('}') => depth = depth.saturating_sub(1),
            _ => {}
        }
        let unit = matches!(
            tokens.get(at..at + 4),
            Some([
                Token::Number(_),
                Token::Text(_),
                Token::Op('/' | '-' | '*'),
                Token::Text(_)
            ])
        );
        if depth > 0 && unit {
            return true;
        }
    }
    false
}

/// `9 values` beside `9\text{ values}`: things that are counted and are no unit, once as words and
/// once as text.
fn counted_in_two_ways(a: &[Token], b: &[Token]) -> bool {
    let counted = |word: &str| words::is_unit(word) && !words::is_measure(word);
    match (a, b) {
        ([Token::Number(_), Token::Word(word)], [Token::Number(_), Token::Text(text)])
        | ([Token::Number(_), Token::Text(text)], [Token::Number(_), Token::Word(word)]) => {
            word == text && counted(word)
        }
        _ => false,
    }
}

/// Whether two answers that are no mathematics are different texts, though letters and signs are
/// the same.
pub(super) fn texts_apart(a: &str, b: &str) -> bool {
    let (words_a, words_b) = (words_alone(a), words_alone(b));
    let long = words_a.len().max(words_b.len()) >= SENTENCE_WORDS;
    // Of "all real numbers" the number is a unit, of "ALL REAL NUMBERS" it is not.
    let measures = |words: &[&str]| {
        let names = words.iter().filter(|word| words::is_measure(word));
        names.map(ToString::to_string).collect::<Vec<_>>()
    };
    (long && !same_sentence(&words_a, &words_b))
        || measures(&words_a) != measures(&words_b)
        || is_display(a) != is_display(b)
}

/// Whether the words are the same; only the first may differ in case.
fn same_sentence(a: &[&str], b: &[&str]) -> bool {
    match (a, b) {
        ([first, a @ ..], [other, b @ ..]) => a == b && first.eq_ignore_ascii_case(other),
        _ => a == b,
    }
}

/// The words of a text that stand alone between spaces, without punctuation, outer brackets and
/// `\text`, and without those that may as well be signs.
fn words_alone(text: &str) -> Vec<&str> {
    text.split(|c: char| c.is_whitespace() || "~,=".contains(c))
        .map(without_dress)
        .filter(|word| word.len() > 1 && word.bytes().all(|b| b.is_ascii_alphabetic()))
        .filter(|word| !is_sign(word))
        .collect()
}

/// Whether a word may as well be written as a sign.
fn is_sign(word: &str) -> bool {
    matches!(
        word,
        "and" | "or" | "inf" | "infty" | "infinity" | "percent" | "pct" | "percentage"
    )
}

fn without_dress(piece: &str) -> &str {
    let mut piece = piece;
    for open in [r"\[", r"\{", r"\text{"] {
        piece = piece.strip_prefix(open).unwrap_or(piece);
    }
    for close in [r"\]", r"\}"] {
        piece = piece.strip_suffix(close).unwrap_or(piece);
    }
    piece.trim_matches(|c: char| "\"'`.:;!?(){}$".contains(c))
}

/// `\[…\]` around what does not start with a number; after a number at the start the others stop.
fn is_display(text: &str) -> bool {
    text.trim()
        .strip_prefix(r"\[")
        .is_some_and(|inner| !inner.trim_start().starts_with(|c: char| c.is_ascii_digit()))
}
