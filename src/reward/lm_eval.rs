//! GSM8K as lm-evaluation-harness scores it: two filters, then `exact_match` after removals.

use std::sync::LazyLock;

use regex::Regex;

use super::gsm8k::HASH_ANSWER;

/// The number of the first `#### n`.
pub(super) fn extract_strict(completion: &str) -> Option<String> {
    HASH_ANSWER
        .captures(completion)
        .map(|found| found[1].to_owned())
}

/// The last run of two or more of `$0-9.,`, or of digits. A one-digit answer just before `$.` is
/// lost to that run: this filter is not for answers in mathematics mode.
pub(super) fn extract_flexible(completion: &str) -> Option<String> {
    static NUMBER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"-?[$0-9.,]{2,}|-?[0-9]+").expect("valid pattern"));
    NUMBER
        .find_iter(completion)
        .last()
        .map(|run| run.as_str().to_owned())
}

/// Equality after dropping `,` and `$`, all up to the last `#### `, one final dot, and case.
pub(super) fn equal(gold: &str, pred: &str) -> bool {
    normalise(gold) == normalise(pred)
}

fn normalise(text: &str) -> String {
    let mut text = text.replace([',', '$'], "");
    if let Some(marks) = text.rfind("#### ") {
        text.drain(..marks + "#### ".len());
    }
    // The reference's `\.$` also matches before a newline that ends the text.
    let end = text.strip_suffix('\n').unwrap_or(&text).len();
    if text[..end].ends_with('.') {
        text.remove(end - 1);
    }
    text.to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_takes_the_first_marked_number() {
        assert_eq!(extract_strict("#### 1\n#### 2").as_deref(), Some("1"));
        assert_eq!(extract_strict("#### $5"), None);
    }

    #[test]
    fn flexible_wants_two_characters_of_its_first_kind() {
        assert_eq!(extract_flexible(r"so $\boxed{3}$.").as_deref(), Some("$."));
        assert_eq!(extract_flexible(r"so \boxed{3}").as_deref(), Some("3"));
        assert_eq!(
            extract_flexible("cost -$1,200.").as_deref(),
            Some("-$1,200.")
        );
        assert_eq!(extract_flexible("no number"), None);
    }

    #[test]
    fn equality_drops_commas_dollars_marks_and_one_dot() {
        assert!(equal("a\n#### b #### 1,200", "$1200."));
        assert!(equal("42.\n", "42\n"));
        assert!(!equal("42", "42.."));
        assert!(!equal("42", "42.0"));
    }
}
