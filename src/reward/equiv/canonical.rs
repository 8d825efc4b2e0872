//! Answers as text, for those that are no mathematics and for equality of notation.

use std::sync::LazyLock;

use regex::Regex;

use super::lexer::Token;

/// The tokens as one string without spaces: two answers with the same string differ in notation
/// only. Degree signs are left out, as they are of equal numbers.
pub(super) fn of_tokens(tokens: &[Token]) -> String {
    let mut out = String::new();
    for token in tokens {
        match token {
            token if token.is_separator() => {
                if !out.ends_with(',') {
                    out.push(',');
                }
            }
            Token::Number(text) => {
                // `3 4` is not 34.
                if out.ends_with(|c: char| c.is_ascii_digit()) {
                    out.push('·');
                }
                out.push_str(text);
            }
            Token::Word(text) => out.push_str(text),
            Token::Text(text) => {
                out.extend(text.chars().filter(|c| !c.is_whitespace() && *c != '~'))
            }
            Token::Letter(c) => out.push(*c),
            Token::Op('°') => {}
            Token::Op(c) => out.push(*c),
            Token::Unknown(c) => out.extend(['\\', *c]),
            Token::Command(name) => {
                out.push('\\');
                out.push_str(name);
                out.push(' ');
            }
            Token::Begin(name) | Token::End(name) => {
                out.push('\\');
                out.push_str(match name.as_str() {
                    "pmatrix" | "bmatrix" | "Bmatrix" | "smallmatrix" => "matrix",
                    other => other,
                });
                out.push(' ');
            }
        }
    }
    out
}

/// A word or phrase without case, spaces, and punctuation around it.
pub(super) fn plain(text: &str) -> String {
    let inner = text.trim_matches(|c: char| c.is_whitespace() || ".'\"“”‘’~".contains(c));
    let inner = match inner
        .strip_prefix('(')
        .and_then(|inner| inner.strip_suffix(')'))
    {
        Some(choice) if !choice.contains(['(', ')']) => choice,
        _ => inner,
    };
    let mut out: String = inner
        .chars()
        .filter(|c| !c.is_whitespace() && *c != '~')
        .collect();
    if out.chars().count() > 1 {
        out = out.to_lowercase();
    }
    out
}

/// The text of an answer that is no mathematics, without the name it is given to, braces around it,
/// percent signs and case.
pub(super) fn prose(text: &str) -> String {
    let name = text.split_once('=').map(|(name, _)| name);
    // The name may be given to each item anew: `x = 1, x = 2`.
    let text = match name.filter(|name| name.chars().count() == 1) {
        Some(name) if name.starts_with(char::is_alphabetic) => {
            let value = |item| match str::split_once(item, '=') {
                Some((named, value)) if named == name => value,
                _ => item,
            };
            text.split(',').map(value).collect::<Vec<_>>().join(",")
        }
        _ => text.to_owned(),
    };
    let text = text
        .strip_prefix('⦃')
        .and_then(|text| text.strip_suffix('⦄'))
        .unwrap_or(&text);
    plain(&text.replace('%', ""))
}

/// Whether the text defines a function: `E(t)=…`.
pub(super) fn is_definition(text: &str) -> bool {
    static DEFINED: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"^[A-Za-z]\([a-z]\)=").expect("valid pattern"));
    DEFINED.is_match(text)
}

/// Whether two texts define the same function and differ only in whether its conditions include
/// their bounds: `E(t)=360t, t ≥ 0` and `E(t)=360t, t > 0`. The formula decides.
pub(super) fn is_same_definition(a: &str, b: &str) -> bool {
    let open = |text: &str| text.replace('≤', "<").replace('≥', ">");
    is_definition(a) && is_definition(b) && open(a) == open(b)
}

/// The text of an answer that is no mathematics, with one form for an x that multiplies, for the
/// parts of a set that only repeats inequalities, and for parts given twice.
pub(super) fn loose(text: &str) -> String {
    static TIMES: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"([0-9])x(\([0-9.])").expect("valid pattern"));
    static REPEATED: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"^[^:]*[<>≤≥][^:]*:").expect("valid pattern"));
    let text = without_outer_brackets(text);
    let mut text = TIMES.replace_all(text, "${1}*${2}").into_owned();
    if REPEATED.is_match(&text) {
        text = text.replace('∪', ",");
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in top_level_parts(&text) {
        let part = part.trim_matches('.');
        if !parts.contains(&part) {
            parts.push(part);
        }
    }
    parts.join(",")
}

/// `(concave up on (0, 1))` without the brackets around everything.
fn without_outer_brackets(text: &str) -> &str {
    let mut depth = 0usize;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            let around = at > 0 && at + 1 == text.len();
            return if around { &text[1..at] } else { text };
        }
    }
    text
}

/// The text between the commas that stand in no brackets.
fn top_level_parts(text: &str) -> Vec<&str> {
    let (mut depth, mut start) = (0usize, 0);
    let mut parts = Vec::new();
    for (at, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' | '⦃' => depth += 1,
            ')' | ']' | '}' | '⦄' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

/// Whether the answer is a set of all that has a property, such as `\{x \mid x > 0\}`.
pub(super) fn is_set_builder(tokens: &[Token]) -> bool {
    matches!(tokens, [Token::Op('⦃'), inner @ .., Token::Op('⦄')] if inner.contains(&Token::Op('|')))
}

/// An answer as it is written, without spaces and the sizes of brackets.
pub(super) fn written(text: &str) -> String {
    let mut text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    for (long, short) in [
        (r"\left", ""),
        (r"\right", ""),
        (r"\!", ""),
        (r"\,", ""),
        (r"\;", ""),
        (r"\quad", ""),
        (r"\geq", r"\ge"),
        (r"\leq", r"\le"),
        (r"\neq", r"\ne"),
        ("$", ""),
    ] {
        if text.contains(long) {
            text = text.replace(long, short);
        }
    }
    match text
        .strip_prefix(r"(\{")
        .and_then(|text| text.strip_suffix(r"\})"))
    {
        Some(inner) => format!(r"\{{{inner}\}}"),
        None => text,
    }
}
