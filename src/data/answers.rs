//! Reference answers as data sets write them, made into the answer alone.

/// How a data set's answer column is cleaned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerRule {
    /// User data and GSM8K-like sets: text after the last `####`, one pair of `$` around it
    /// dropped, plain numbers without thousands separators and without `.0`.
    Number,
    /// Trimmed only: MATH answers are compared as they stand.
    Verbatim,
    /// `$` dropped at both ends (OlympiadBench, as Qwen's evaluation does it).
    TrimDollars,
    /// Every `$` dropped (Gaokao 2023 En, College Math, as Qwen's evaluation does it).
    DropDollars,
    /// Whole numbers: leading zeros and a fraction of zeros go (AIME's `025`, AMC's `27.0`).
    Integer,
}

impl AnswerRule {
    /// The cleaned answer; empty when the data set has none.
    pub fn clean(self, raw: &str) -> String {
        let trimmed = raw.trim();
        match self {
            Self::Verbatim => trimmed.to_string(),
            Self::TrimDollars => trimmed.trim_matches('$').trim().to_string(),
            Self::DropDollars => trimmed.replace('$', "").trim().to_string(),
            Self::Integer => {
                let text = whole_without_fraction(trimmed);
                let (sign, digits) = split_sign(text);
                if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                    return trimmed.to_string();
                }
                let digits = digits.trim_start_matches('0');
                if digits.is_empty() {
                    "0".to_string()
                } else {
                    format!("{sign}{digits}")
                }
            }
            Self::Number => {
                let text = match trimmed.rfind("####") {
                    Some(at) => trimmed[at + 4..].trim(),
                    None => trimmed,
                };
                let text = unwrap_dollars(text);
                match plain_number(text) {
                    Some(number) => whole_without_fraction(&number).to_string(),
                    None => text.to_string(),
                }
            }
        }
    }
}

fn split_sign(text: &str) -> (&str, &str) {
    match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text),
    }
}

/// `27.0` and `27.` become `27`; anything else stays.
fn whole_without_fraction(text: &str) -> &str {
    match text.split_once('.') {
        Some((whole, fraction))
            if fraction.bytes().all(|b| b == b'0')
                && whole.bytes().last().is_some_and(|b| b.is_ascii_digit()) =>
        {
            whole
        }
        _ => text,
    }
}

/// `$x$` becomes `x` when these are the only two dollars; `$5` (money) loses its sign.
fn unwrap_dollars(text: &str) -> &str {
    let inner = text
        .strip_prefix('$')
        .map(|rest| rest.strip_suffix('$').unwrap_or(rest));
    match inner {
        Some(inner) if !inner.contains('$') => {
            if text.len() - inner.len() == 2 || plain_number(inner).is_some() {
                inner.trim()
            } else {
                text
            }
        }
        _ => text,
    }
}

/// A decimal number without its thousands separators, or `None` when `text` is anything else
/// (`1,2` is a list, not twelve).
fn plain_number(text: &str) -> Option<String> {
    let (sign, rest) = split_sign(text);
    let (whole, fraction) = match rest.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (rest, None),
    };
    if fraction.is_some_and(|f| !f.bytes().all(|b| b.is_ascii_digit())) {
        return None;
    }
    let mut groups = whole.split(',');
    let first = groups.next()?;
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    if !digits(first) {
        return None;
    }
    let mut out = format!("{sign}{first}");
    let mut grouped = false;
    for group in groups {
        if group.len() != 3 || !digits(group) {
            return None;
        }
        grouped = true;
        out.push_str(group);
    }
    if grouped && first.len() > 3 {
        return None;
    }
    if let Some(fraction) = fraction {
        out.push('.');
        out.push_str(fraction);
    }
    Some(out)
}

/// Content of the last `\boxed{…}` or `\fbox{…}` (or the token after `\boxed `) of a worked
/// solution: where MATH keeps its answer.
pub fn last_boxed(solution: &str) -> Option<&str> {
    let at = solution.rfind("\\boxed").or(solution.rfind("\\fbox"))?;
    let rest = &solution[at..];
    let rest = rest
        .strip_prefix("\\boxed")
        .or(rest.strip_prefix("\\fbox"))?;
    if let Some(word) = rest.strip_prefix(' ')
        && !word.trim_start().starts_with('{')
    {
        return word.split(['$', ' ', '\n']).next();
    }
    let open = rest.trim_start();
    let inner = open.strip_prefix('{')?;
    let mut depth = 1usize;
    for (at, b) in inner.bytes().enumerate() {
        match b {
            b'{' => depth += 1,
            b'}' => {
                depth -= 1;
                if depth == 0 {
                    return Some(&inner[..at]);
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_lose_what_string_equality_would_trip_over() {
        for (raw, clean) in [
            ("18", "18"),
            ("She makes 9*2 = 18\n#### 18", "18"),
            ("#### 1,200", "1200"),
            ("1,234,567", "1234567"),
            ("-1,000.50", "-1000.50"),
            ("27.0", "27"),
            ("27.", "27"),
            ("2.50", "2.50"),
            ("$18", "18"),
            ("$ \\frac{1}{2} $", "\\frac{1}{2}"),
            ("1,2", "1,2"),
            ("1234,567", "1234,567"),
            ("$1$ and $2$", "$1$ and $2$"),
            ("", ""),
            ("####", ""),
            ("-", "-"),
            (".", "."),
            (".0", ".0"),
        ] {
            assert_eq!(AnswerRule::Number.clean(raw), clean, "{raw:?}");
        }
    }

    #[test]
    fn contest_integers_lose_leading_zeros_and_fractions() {
        for (raw, clean) in [
            ("025", "25"),
            ("27.0", "27"),
            ("000", "0"),
            ("-07", "-7"),
            ("204", "204"),
            ("x = 3", "x = 3"),
            ("", ""),
        ] {
            assert_eq!(AnswerRule::Integer.clean(raw), clean, "{raw:?}");
        }
    }

    #[test]
    fn dollars_go_as_the_data_set_wants() {
        assert_eq!(AnswerRule::TrimDollars.clean("$\\sqrt{3}$"), "\\sqrt{3}");
        assert_eq!(AnswerRule::TrimDollars.clean("$1$ or $2$"), "1$ or $2");
        assert_eq!(AnswerRule::DropDollars.clean("$1$ or $2$"), "1 or 2");
        assert_eq!(AnswerRule::Verbatim.clean(" 10,\\!000 "), "10,\\!000");
    }

    #[test]
    fn the_last_box_is_found_with_its_braces() {
        assert_eq!(
            last_boxed("so $\\boxed{\\frac{1}{2}}$."),
            Some("\\frac{1}{2}")
        );
        assert_eq!(last_boxed("\\boxed{1} then \\boxed{2}"), Some("2"));
        assert_eq!(last_boxed("is \\boxed 3$."), Some("3"));
        assert_eq!(last_boxed("\\fbox{7}"), Some("7"));
        assert_eq!(last_boxed("\\boxed{}"), Some(""));
        assert_eq!(last_boxed("\\boxed{1"), None);
        assert_eq!(last_boxed("no box"), None);
        assert_eq!(last_boxed(&"\\boxed{".repeat(10_000)), None);
    }

    proptest! {
        #[test]
        fn any_text_is_cleaned_without_a_panic(text in ".{0,40}") {
            for rule in [
                AnswerRule::Number,
                AnswerRule::Verbatim,
                AnswerRule::TrimDollars,
                AnswerRule::DropDollars,
                AnswerRule::Integer,
            ] {
                let clean = rule.clean(&text);
                prop_assert!(clean.len() <= text.len());
                prop_assert_eq!(clean.trim(), &clean);
            }
            let _ = last_boxed(&format!("\\boxed{text}"));
        }

        #[test]
        fn numbers_keep_their_value(n in -10_000_000i64..10_000_000) {
            for rule in [AnswerRule::Number, AnswerRule::Integer] {
                prop_assert_eq!(rule.clean(&format!("{n}.00")), n.to_string());
            }
        }
    }
}
