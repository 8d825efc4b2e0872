//! English: numbers in words, and the units that may follow a number without any markup.

/// The value of a number in words, such as "fifty-nine" or "one hundred and five".
pub(super) fn number(text: &str) -> Option<u64> {
    const SMALL: [&str; 20] = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
    ];
    const TENS: [&str; 8] = [
        "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
    ];
    if text.len() > 120 {
        return None;
    }
    let lower = text.to_lowercase();
    let (mut total, mut part, mut last, mut seen) = (0u64, 0u64, 1000, false);
    for word in lower.split(|c: char| c.is_whitespace() || c == '-') {
        if word.is_empty() || (word == "and" && seen) {
            continue;
        }
        seen = true;
        // `last` is the size of the last addend: sizes must fall within a group.
        if let Some(small) = SMALL.iter().position(|name| *name == word) {
            if last < 20 || (last < 100 && small >= 10) {
                return None;
            }
            part += small as u64;
            last = 1;
        } else if let Some(tens) = TENS.iter().position(|name| *name == word) {
            if last < 100 {
                return None;
            }
            part += 10 * (tens as u64 + 2);
            last = 20;
        } else if word == "hundred" && (1..20).contains(&part) {
            part *= 100;
            last = 100;
        } else {
            let scale = match word {
                "thousand" => 1_000,
                "million" => 1_000_000,
                "billion" => 1_000_000_000,
                _ => return None,
            };
            if part == 0 || (total > 0 && total % (scale * 1000) != 0) {
                return None;
            }
            total += part * scale;
            (part, last) = (0, 1000);
        }
    }
    seen.then_some(total + part)
}

/// Whether a bare word after a number is read as its unit: a lower-case word of three letters or
/// more, or a common abbreviation. Functions and the words that join answers are none.
pub(super) fn is_unit(word: &str) -> bool {
    const SHORT: [&str; 26] = [
        "cm", "mm", "km", "dm", "nm", "kg", "mg", "lb", "oz", "ft", "in", "yd", "mi", "hr", "ms",
        "ml", "mL", "kW", "Hz", "kHz", "MHz", "kPa", "mph", "kmh", "rad", "deg",
    ];
    if SHORT.contains(&word) {
        return true;
    }
    word.len() >= 3
        && word.bytes().all(|b| b.is_ascii_lowercase())
        && super::node::Function::named(word).is_none()
        && !matches!(
            word,
            "and" | "for" | "where" | "when" | "sqrt" | "not" | "with" | "only" | "but" | "mod"
        )
}
