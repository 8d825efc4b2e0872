//! GSM8K as verl rewards it: only the last 300 characters count, equality is that of strings.

use std::sync::LazyLock;

use regex::Regex;

/// Characters at the end of a completion that are looked at.
const TAIL_CHARS: usize = 300;

/// The answer line of GSM8K, exactly one space after the marks.
pub(super) static HASH_ANSWER: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"#### (-?[0-9.,]+)").expect("valid pattern"));

fn tail(text: &str) -> &str {
    match text.char_indices().nth_back(TAIL_CHARS - 1) {
        Some((start, _)) => &text[start..],
        None => text,
    }
}

/// The number of the last `#### n`, without commas.
pub(super) fn extract_strict(completion: &str) -> Option<String> {
    let found = HASH_ANSWER.captures_iter(tail(completion)).last()?;
    Some(found[1].replace(',', ""))
}

/// The last run of digits, dots and commas that is not a lone dot; a lone dot if there is no other.
pub(super) fn extract_flexible(completion: &str) -> Option<String> {
    static NUMBER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"-?[0-9.,]+").expect("valid pattern"));
    let runs: Vec<&str> = NUMBER
        .find_iter(tail(completion))
        .map(|run| run.as_str())
        .collect();
    let answer = runs
        .iter()
        .rev()
        .find(|run| **run != ".")
        .or(runs.first())?;
    Some((*answer).to_owned())
}

/// Compares as strings. A `gold` that is a whole solution is first reduced to its number without
/// commas, as verl's data preparation does; a bare answer stands as it is.
pub(super) fn equal(gold: &str, pred: &str) -> bool {
    match HASH_ANSWER.captures(gold) {
        Some(found) => found[1].replace(',', "") == pred,
        None => gold == pred,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_takes_the_last_marked_number_of_the_tail() {
        assert_eq!(
            extract_strict("#### 1\n#### 1,234").as_deref(),
            Some("1234")
        );
        assert_eq!(extract_strict("####5").as_deref(), None);
        assert_eq!(extract_strict("####  5").as_deref(), None);
        let far = format!("#### 7{}", "x".repeat(294));
        assert_eq!(extract_strict(&far).as_deref(), Some("7"));
        assert_eq!(extract_strict(&format!("{far}é")).as_deref(), None);
    }

    #[test]
    fn flexible_skips_lone_dots_only() {
        assert_eq!(extract_flexible("it is 42.").as_deref(), Some("42."));
        assert_eq!(extract_flexible("it is 42 .").as_deref(), Some("42"));
        assert_eq!(extract_flexible("it is 42 ,").as_deref(), Some(","));
        assert_eq!(extract_flexible("nothing . here .").as_deref(), Some("."));
        assert_eq!(extract_flexible("nothing"), None);
    }

    #[test]
    fn equality_is_textual() {
        assert!(equal("1200", "1200"));
        assert!(equal("so 1190 + 10 = 1200\n#### 1,200", "1200"));
        assert!(!equal("1,200", "1200"));
        assert!(!equal("42", "42."));
        assert!(!equal("42", "42.00"));
    }
}
