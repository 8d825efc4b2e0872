//! What the strict notation leaves unread, because neither Math-Verify nor Qwen's grader reads it.
//!
//! To them an answer in such a notation is the text it is written with. Verdicts that are to be
//! compared with theirs must hold the same; [`Notation::Wide`](super::Notation) reads all of it.

use std::sync::LazyLock;

use regex::{Regex, RegexSet};

use super::canonical::written;
use super::lexer::Token;
use super::node::Function;

/// Fewest words of a text that is compared word by word.
const SENTENCE_WORDS: usize = 4;

/// Notations found by their form, in an answer without spaces; see [`written`].
static FORMS: LazyLock<RegexSet> = LazyLock::new(|| {
    RegexSet::new([
        // A time of day that is all text, or none of it: `4:30 p.m.`
        r"\d:\d\d[ap]\.m\.",
        // A semicolon in a half-open interval: `[2; 3)`
        r"^(?:\([^()\[\]]*;[^()\[\]]*\]|\[[^()\[\]]*;[^()\[\]]*\))$",
        // A union by another sign than `\cup` in an answer that does not start with an interval.
        r"^[^(\[:][^:]*(?:\\bigcup|[)\]}]U[(\[\\])",
        // A tie before a unit: `9~\mathrm{kg}`
        r"\d~\\(?:mathrm|text)\{",
        // An approximation after a unit: `3920 \mathrm{~N} \approx 3920.0`
        r"\\(?:mathrm|text|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?\\approx",
        // An enumeration in quotation marks.
        r#"^"[^"]*,[^"]*"$"#,
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
        FORMS.is_match(text) || over_loose_terms(tokens) || compound_unit_in_braces(tokens)
    };
    ends_in_space_after_unit(a.0)
        || ends_in_space_after_unit(b.0)
        || unread(&text_a, a.1)
        || unread(&text_b, b.1)
        || names_no_value(&text_a, &text_b)
        || names_no_value(&text_b, &text_a)
}

/// `40 \mathrm{~kg} \quad`, `34\text{ units}\\`: a space command or a row's end after a unit.
fn ends_in_space_after_unit(text: &str) -> bool {
    static UNIT: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"[\d}]\s*(?:\\mathrm\{[^{}]*\}\s*/\s*)?\\(?:mathrm|text|mbox)\{[^{}]*\}\s*(?:\\\\|\\q?quad)\s*$")
            .expect("valid pattern")
    });
    UNIT.is_match(text)
}

/// `{1 \over s+a}`, `{\sin 2 \over 3}`: to the others `\over` is a division sign, so that sums end at
/// it and functions without brackets do not.
fn over_loose_terms(tokens: &[Token]) -> bool {
    #[derive(Default)]
    struct Group {
        loose: bool,
        over: bool,
    }
    let mut outer = Vec::new();
    let mut group = Group::default();
    let mut at_start = true;
    for (at, token) in tokens.iter().enumerate() {
        let opens = matches!(token, Token::Op('{' | '(' | '[' | '⦃'));
        let over = matches!(token, Token::Command(name) if name == "over");
        let bare_function = matches!(token, Token::Command(name) if Function::named(name).is_some())
            && !matches!(tokens.get(at + 1), Some(Token::Op('(' | '{' | '^')));
        match token {
            _ if opens => outer.push(std::mem::take(&mut group)),
            Token::Op('}' | ')' | ']' | '⦄') => group = outer.pop().unwrap_or_default(),
            Token::Op('+' | '-') if !at_start => group.loose = true,
            _ if bare_function => group.loose = true,
            _ => group.over |= over,
        }
        if group.loose && group.over {
            return true;
        }
        at_start = opens || over;
    }
    false
}

/// `\frac{2(81 \mathrm{~km} / \mathrm{hr})}{2}`: a unit of several parts, or with a power, that
/// does not end the answer but stands in braces.
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
            Some(
                [
                    Token::Number(_),
                    Token::Text(_),
                    Token::Op('/' | '-' | '*'),
                    Token::Text(_)
                ] | [Token::Number(_), Token::Text(_), Token::Op('^'), _]
            )
        );
        if depth > 0 && unit {
            return true;
        }
    }
    false
}

/// `P(late or early) = 1/4` beside `1/4`: words, a power or a derivative are no name of a value.
fn names_no_value(equation: &str, value: &str) -> bool {
    static NAME: LazyLock<Regex> = LazyLock::new(|| {
        let words = r"[A-Z]\([^()\\]*[a-z]{4}[^()\\]*\)";
        let power = r"[A-Za-z]\^\{?\d\}?";
        let derivative = r"\\frac\{d[A-Za-z]\}\{d[A-Za-z]\}";
        Regex::new(&format!("^(?:{words}|{power}|{derivative})=")).expect("valid pattern")
    });
    !value.contains('=') && NAME.is_match(equation)
}

/// Whether two answers that are no mathematics are different texts, though letters and signs are
/// the same.
pub(super) fn texts_apart(a: &str, b: &str) -> bool {
    let (words_a, words_b) = (words_alone(a), words_alone(b));
    let long = words_a.len().max(words_b.len()) >= SENTENCE_WORDS;
    long && (!same_sentence(&words_a, &words_b) || is_in_font(a) != is_in_font(b))
}

/// `\textbf{…}` or `\mathrm{…}`.
fn is_in_font(text: &str) -> bool {
    let text = text.trim_start();
    text.starts_with(r"\textbf{") || text.starts_with(r"\mathrm{")
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
        .filter(|word| word.len() > 1)
        .filter(|word| word.bytes().all(|b| b.is_ascii_alphabetic() || b == b'\''))
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
